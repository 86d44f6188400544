//! What was acknowledged survives: kill -9 of the writer at random moments, and power cuts after every 17th change of the disk.
#![allow(clippy::disallowed_methods)] // tests live in the real world

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::block_on;
use common::power_cut::{self, Fault, Loss};
use futures::StreamExt;
use karst_env::{Env, RealEnv};
use karst_store::*;

const WRITERS: u64 = 4;
/// A value that fills some pages, so that a transaction cannot be whole by luck.
const PADDING: usize = 3000;

/// Transaction `number` of `writer`: two records that belong together, and the writer's last number.
fn paired(writer: u64, number: u64) -> Txn {
    let value = format!("{number:08}{}", "x".repeat(PADDING));
    let put = |part: &str| Op::put(format!("/pair/{writer}/{part}/{number:08}"), value.clone());
    let mut success = vec![put("left"), put("right"), Op::put(format!("/last/{writer}"), number.to_string())];
    if number > 20 {
        // Old ones go, so that the store stays small and pages are used again.
        let old = number - 20;
        success.push(Op::delete(format!("/pair/{writer}/left/{old:08}")));
        success.push(Op::delete(format!("/pair/{writer}/right/{old:08}")));
    }
    Txn { success, ..Txn::default() }
}

/// What is there after a crash: the last number of each writer. Panics (`Err`: says) when anything is half done.
async fn examine(store: &SqliteStore) -> Result<BTreeMap<u64, u64>, String> {
    let wrong = |error: StoreError| error.to_string();
    let mut last = BTreeMap::new();
    for writer in 0..WRITERS {
        let kv = store.get(&format!("/last/{writer}")).await.map_err(wrong)?.kv;
        let number: u64 = kv.map_or(0, |kv| String::from_utf8_lossy(&kv.value).parse().unwrap());
        let mut sides = Vec::new();
        for side in ["left", "right"] {
            let (kvs, _) = list_prefix(store, &format!("/pair/{writer}/{side}/")).await.map_err(wrong)?;
            let numbers =
                kvs.iter().map(|kv| String::from_utf8_lossy(&kv.value[..8]).parse::<u64>().unwrap());
            if kvs.iter().any(|kv| kv.value.len() != 8 + PADDING) {
                return Err("a value is cut off".into());
            }
            sides.push(numbers.collect::<BTreeSet<u64>>());
        }
        let expected: BTreeSet<u64> = (number.saturating_sub(19).max(1)..=number).collect();
        if sides[0] != expected || sides[1] != expected {
            return Err(format!("writer {writer} at {number} has {sides:?}"));
        }
        last.insert(writer, number);
    }
    Ok(last)
}

async fn open(path: &Path, options: SqliteOptions) -> Result<SqliteStore, StoreError> {
    SqliteStore::open(path, RealEnv::shared(), options).await
}

/// Opens what was closed: a process that another test is just starting has the lock still, until it executes its program.
async fn open_again(path: &Path, options: SqliteOptions) -> Result<SqliteStore, StoreError> {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        match open(path, options.clone()).await {
            Err(StoreError::Unavailable(text)) if text.contains("in use") && Instant::now() < end => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            opened => return opened,
        }
    }
}

/// Compacts all the time.
fn busy_options() -> SqliteOptions {
    SqliteOptions { keep_revisions: 30, ..SqliteOptions::default() }
}

/// Not a test: the process that the next test kills.
#[test]
fn child_that_writes() {
    let Some(path) = std::env::var_os("KARST_STORE_TEST_CHILD") else {
        return;
    };
    block_on(async {
        let store = Arc::new(open(Path::new(&path), busy_options()).await.unwrap());
        let last = examine(&store).await.unwrap();
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (store, mut number) = (store.clone(), last[&writer]);
                tokio::spawn(async move {
                    loop {
                        number += 1;
                        assert!(store.txn(paired(writer, number)).await.unwrap().committed().is_some());
                        let mut out = std::io::stdout().lock();
                        writeln!(out, "\nacknowledged {writer} {number}").unwrap();
                        out.flush().unwrap();
                    }
                })
            })
            .collect();
        // They go on until this process is killed.
        futures::future::join_all(writers).await;
    });
}

#[test]
fn kill_nine_loses_nothing_acknowledged_and_leaves_nothing_half_done() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.db");
    let env = RealEnv::new();
    let (mut acknowledged, mut further) = (BTreeMap::<u64, u64>::new(), 0);
    for round in 0..20 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["child_that_writes", "--exact", "--nocapture", "--test-threads=1"])
            .env("KARST_STORE_TEST_CHILD", &path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut take = |line: String| {
            let mut words = line.split(' ');
            if words.next() == Some("acknowledged") {
                let (writer, number) = (words.next().unwrap(), words.next().unwrap());
                acknowledged.insert(writer.parse().unwrap(), number.parse().unwrap());
                return 1;
            }
            0
        };
        // After some answers, and then somewhere in what comes next.
        let (answers, spin) = (1 + env.random_u64() % 60, Duration::from_micros(env.random_u64() % 3000));
        let mut seen = 0;
        while seen < answers {
            let line = lines.next().expect("the child goes on until it is killed").unwrap();
            seen += take(line);
        }
        let start = Instant::now();
        while start.elapsed() < spin {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        for line in lines {
            // The last line may be cut off in the middle.
            let Ok(line) = line else { break };
            if line.split(' ').count() == 3 && !line.ends_with(' ') {
                take(line);
            }
        }
        let found = block_on(async {
            let store = open(&path, busy_options()).await.unwrap();
            examine(&store).await.unwrap()
        });
        for (writer, number) in &acknowledged {
            assert!(found[writer] >= *number, "round {round}: writer {writer} lost {number}: {found:?}");
            further += found[writer] - number;
            assert!(found[writer] <= number + 1, "only one transaction of a writer is on its way");
        }
        acknowledged = found;
    }
    eprintln!("{acknowledged:?} after 20 kills; {further} were written and not yet acknowledged");
    assert!(acknowledged.values().sum::<u64>() >= 20);
}

/// Writes with the power-cut file system, then looks at what every possible cut would have left. `Err` names the first
/// loss. `Ok` counts the cuts.
fn cut_everywhere(no_sync: bool) -> Result<usize, String> {
    power_cut::register();
    let directory = tempfile::tempdir().unwrap();
    // SQLite resolves links in the path.
    let home = directory.path().canonicalize().unwrap();
    let path = home.join("state.db");
    let on_it = |no_sync| SqliteOptions { vfs: Some(power_cut::VFS.into()), no_sync, ..busy_options() };
    let acknowledged = Arc::new(Mutex::new(Vec::new()));
    block_on(async {
        // A store that has been in use and was closed in good order.
        let store = open(&path, on_it(false)).await.unwrap();
        for number in 1..=5 {
            assert!(store.txn(paired(0, number)).await.unwrap().committed().is_some());
        }
        drop(store);
        let store = open_again(&path, on_it(no_sync)).await.unwrap();
        power_cut::record(&home, acknowledged.clone());
        // Enough for compaction and for pages to be used again.
        for number in 6..=70 {
            assert!(store.txn(paired(0, number)).await.unwrap().committed().is_some());
            acknowledged.lock().unwrap().push(number);
        }
    });
    let snapshots = power_cut::stop_recording();
    assert!(
        snapshots.iter().filter(|snapshot| snapshot.has_unsynced()).count() > 100,
        "there was something to lose"
    );
    // Every 17th moment keeps it quick; 17 is prime to the number of changes in a transaction.
    let mut cuts = 0;
    for (moment, snapshot) in snapshots.iter().enumerate().step_by(17) {
        for loss in [Loss::All, Loss::Some(moment as u64), Loss::Some(!(moment as u64))] {
            let after = tempfile::tempdir().unwrap();
            snapshot.survive(loss, after.path());
            let path = after.path().join("state.db");
            let found = block_on(async {
                let store = open(&path, busy_options()).await.map_err(|error| error.to_string())?;
                let found = examine(&store).await?;
                // It goes on working.
                assert!(store.txn(paired(0, found[&0] + 1)).await.unwrap().committed().is_some());
                Ok::<u64, String>(found[&0])
            });
            let found = found.map_err(|error| format!("moment {moment}, {loss:?}: {error}"))?;
            let promised = snapshot.acknowledged.last().copied().unwrap_or(5);
            if found < promised {
                return Err(format!(
                    "moment {moment}, {loss:?}: {promised} was acknowledged, {found} is left"
                ));
            }
            let check = rusqlite::Connection::open(&path).unwrap();
            let verdict: String = check.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
            assert_eq!(verdict, "ok");
            cuts += 1;
        }
    }
    Ok(cuts)
}

/// One test, because the recording is one for the process.
#[test]
fn power_cuts_lose_nothing_acknowledged_and_without_syncing_the_test_notices() {
    match cut_everywhere(false) {
        Ok(cuts) => {
            eprintln!("{cuts} power cuts survived");
            assert!(cuts > 50);
        }
        Err(loss) => panic!("{loss}"),
    }
    let loss = cut_everywhere(true).expect_err("without syncing something must be lost");
    eprintln!("without syncing: {loss}");
}

/// Follows a watch up to `revision`.
async fn follow(watch: &mut WatchStream, revision: Revision, live: &mut BTreeMap<String, KeyValue>) {
    let mut at = 0;
    while at < revision {
        let item = watch.next().await.expect("the store is open").unwrap();
        assert!(item.revision() >= at, "{} after {at}", item.revision());
        at = item.revision();
        let WatchItem::Batch(batch) = item else { continue };
        for event in batch.events {
            match event.change {
                Change::Put(kv) => drop(live.insert(kv.key.clone(), kv)),
                Change::Delete { key } => drop(live.remove(&key)),
            }
        }
    }
}

/// Nobody has read before, so that the log is recovered when the database is opened again; or somebody watches.
async fn fail_and_go_on(watching: bool) {
    let directory = tempfile::tempdir().unwrap();
    let home = directory.path().canonicalize().unwrap();
    let path = home.join("state.db");
    let options = SqliteOptions { vfs: Some(power_cut::VFS.into()), ..SqliteOptions::default() };
    let store = open(&path, options).await.unwrap();
    let mut watch = store.watch("/", 1).await.unwrap();
    let mut live = BTreeMap::new();
    let lease = store.lease_grant(Duration::from_secs(600)).await.unwrap();
    let mut revision = store.txn(paired(0, 1)).await.unwrap().committed().unwrap();
    let mut known = 1;
    for fault in [Fault::Sync, Fault::Write, Fault::Sync] {
        if watching {
            follow(&mut watch, revision, &mut live).await;
        }
        power_cut::break_disk(&home, fault);
        let next = known + 1;
        assert_eq!(store.txn(paired(0, next)).await, Ok(TxnOutcome::Unknown), "{fault:?}");
        for _ in 0..3 {
            let refused = store.txn(paired(0, next)).await;
            assert!(matches!(refused, Err(StoreError::Unavailable(_))), "{fault:?}: {refused:?}");
        }
        power_cut::mend_disk();
        // By itself; and what was unknown is one of the two from now on.
        let mark = Txn { success: vec![Op::put("/mark", next.to_string())], ..Txn::default() };
        let marked = store.txn(mark).await.unwrap().committed().expect("the disk works again");
        let found = examine(&store).await.unwrap()[&0];
        assert!(found == known || found == next, "{fault:?}: {found}: applied or not, but whole");
        assert_eq!(marked, revision + 1 + u64::from(found == next), "no revision is given twice");
        known = found + 1;
        revision = store.txn(paired(0, known)).await.unwrap().committed().unwrap();
        assert_eq!(revision, marked + 1);
    }
    store.lease_keepalive(lease).await.unwrap();
    follow(&mut watch, revision, &mut live).await;
    let (all, _) = list_prefix(&store, "/").await.unwrap();
    assert_eq!(live.into_values().collect::<Vec<_>>(), all, "who watched has missed nothing");
    drop(watch);
    drop(store);
    let store = open_again(&path, SqliteOptions::default()).await.unwrap();
    assert_eq!(examine(&store).await.unwrap()[&0], known);
}

#[test]
fn after_a_failed_commit_nothing_is_believed_until_the_database_is_opened_again() {
    power_cut::register();
    block_on(async {
        for watching in [false, true] {
            fail_and_go_on(watching).await;
        }
    });
}
