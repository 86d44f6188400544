//! The fault wrapper, and what the rest makes of faults: unknown outcomes are resolved, watches are taken up again,
//! and engines on two sides of a partition never both win. All of it under a seed.
#![allow(clippy::disallowed_methods)] // tests live in the real world

mod common;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::block_on;
use futures::StreamExt;
use karst_env::{Cut, Env, EnvExt, RealEnv, SeededEnv};
use karst_store::*;

const PATIENCE: Duration = Duration::from_secs(300);

fn put(key: &str, value: &'static str) -> Txn {
    Txn { success: vec![Op::put(key, value)], ..Txn::default() }
}

fn seeded_store(env: &SeededEnv) -> (Arc<SqliteStore>, FaultStore) {
    let inner = Arc::new(SqliteStore::memory(env.shared()).unwrap());
    (inner.clone(), FaultStore::new(inner, env.shared()))
}

#[test]
fn without_faults_the_wrapper_keeps_the_contract() {
    block_on(async {
        let env = RealEnv::shared();
        let inner = Arc::new(SqliteStore::memory(env.clone()).unwrap());
        let store = Arc::new(FaultStore::new(inner, env.clone()));
        contract::run(store.clone(), env).await;
        assert_eq!(store.injected(), 0);
    });
}

#[test]
fn each_fault_does_what_it_says() {
    SeededEnv::run(1, |env| async move {
        let (inner, store) = seeded_store(&env);
        let value = |key: &'static str| {
            let inner = inner.clone();
            async move { inner.get(key).await.unwrap().kv }
        };
        store.plan(Calls::Txn, 0, Fault::FailBefore);
        assert!(matches!(store.txn(put("/a", "1")).await, Err(StoreError::Unavailable(_))));
        assert_eq!(value("/a").await, None);

        store.plan(Calls::Txn, 0, Fault::LoseRequest);
        assert_eq!(store.txn(put("/a", "1")).await, Ok(TxnOutcome::Unknown));
        assert_eq!(value("/a").await, None);

        store.plan(Calls::Txn, 1, Fault::LoseAnswer);
        assert!(store.txn(put("/b", "1")).await.unwrap().committed().is_some());
        assert_eq!(store.txn(put("/a", "1")).await, Ok(TxnOutcome::Unknown));
        assert!(value("/a").await.is_some());

        let before = env.monotonic();
        store.plan(Calls::Read, 0, Fault::Delay(Duration::from_secs(3)));
        assert!(store.get("/a").await.unwrap().kv.is_some());
        assert_eq!(env.monotonic() - before, Duration::from_secs(3));

        let mut watch = store.watch("/", 1).await.unwrap();
        assert!(watch.next().await.unwrap().is_ok());
        store.drop_watches();
        let mut items = watch.collect::<Vec<_>>().await;
        assert!(matches!(items.pop(), Some(Err(StoreError::Unavailable(_)))));
        assert!(items.iter().all(Result::is_ok));

        store.set_cut(true);
        assert!(store.get("/a").await.is_err());
        assert_eq!(store.txn(put("/c", "1")).await, Ok(TxnOutcome::Unknown));
        store.set_cut(false);
        assert!(store.get("/a").await.is_ok());
        assert_eq!((store.injected(), store.still_planned()), (7, 0));
    });
}

/// Adds 1 to a counter fifty times through a store that loses a good part of everything, and counts on each answer.
fn count_through_faults(seed: u64) -> u64 {
    SeededEnv::run(seed, |env| async move {
        let (inner, store) = seeded_store(&env);
        store.set_rates(FaultRates {
            lose_request: 0.2,
            lose_answer: 0.2,
            delay: 0.3,
            longest_delay: Duration::from_millis(500),
            ..FaultRates::default()
        });
        let store = Arc::new(store);
        let requests = Requests::new(store.clone(), env.shared());
        let mut done = 0;
        while done < 50 {
            let Ok(read) = store.get("/count").await else {
                continue;
            };
            let old =
                read.kv.as_ref().map_or(0, |kv| String::from_utf8_lossy(&kv.value).parse::<u64>().unwrap());
            let revision = read.kv.as_ref().map_or(0, |kv| kv.mod_revision);
            let txn =
                TxnBuilder::new().expect_mod("/count", revision).put_raw("/count", (old + 1).to_string());
            match requests.txn(txn, PATIENCE).await {
                Ok(Resolved::Committed { revision, .. }) => {
                    done += 1;
                    let kv = inner.get("/count").await.unwrap().kv.unwrap();
                    assert_eq!((kv.mod_revision, kv.version), (revision, done), "applied exactly once");
                }
                Ok(Resolved::Refused { .. }) => panic!("nobody else writes: a retry was applied twice"),
                Err(StoreError::Unavailable(_)) => {} // the lease for the marks was not to be had
                Err(other) => panic!("{other}"),
            }
        }
        assert_eq!(inner.get("/count").await.unwrap().kv.unwrap().value, "50");
        assert!(store.injected() > 20, "the faults landed");
        store.injected()
    })
}

#[test]
fn unknown_outcomes_are_resolved_to_exactly_once() {
    for seed in 0..20 {
        count_through_faults(seed);
    }
    assert_eq!(count_through_faults(3), count_through_faults(3), "reproducible");
}

/// An inventory as the engine has it: lists, watches, and begins again when the watch breaks or history is gone.
async fn follow(store: Arc<dyn Store>, env: SeededEnv, seen: Arc<Mutex<BTreeMap<String, String>>>) {
    let text = |kv: &KeyValue| String::from_utf8_lossy(&kv.value).into_owned();
    loop {
        let Ok((kvs, revision)) = list_prefix(store.as_ref(), ROOT).await else {
            env.sleep(Duration::from_millis(100)).await;
            continue;
        };
        *seen.lock().unwrap() = kvs.iter().map(|kv| (kv.key.clone(), text(kv))).collect();
        let mut next = revision + 1;
        'watch: while let Ok(mut watch) = store.watch(ROOT, next).await {
            loop {
                match watch.next().await {
                    Some(Ok(item)) => {
                        next = item.revision() + 1;
                        let WatchItem::Batch(batch) = item else { continue };
                        let mut seen = seen.lock().unwrap();
                        for event in batch.events {
                            match event.change {
                                Change::Put(kv) => seen.insert(kv.key.clone(), text(&kv)),
                                Change::Delete { key } => seen.remove(&key),
                            };
                        }
                    }
                    Some(Err(StoreError::Compacted { .. })) => break 'watch,
                    _ => break,
                }
            }
            env.sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Two engines on one store: each tries to take free slots and to give up its own, through links that are cut again
/// and again; one of them is killed and starts anew. Returns what the store holds in the end, and the trace's digest.
fn two_engines(seed: u64) -> (Vec<String>, u64) {
    let env = SeededEnv::new(seed);
    let world = env.clone();
    let left = env.block_on(async move {
        let options = SqliteOptions { keep_revisions: 40, ..SqliteOptions::default() };
        let inner: Arc<dyn Store> = Arc::new(SqliteStore::memory_with(world.shared(), options).unwrap());
        world.partition().set_latency(Duration::from_micros(100), Duration::from_millis(20));
        let slot = |number: u64| format!("{ROOT}slots/{number}");
        let mut views = Vec::new();
        let stopping = Arc::new(AtomicBool::new(false));
        let start = |name: &'static str, views: &mut Vec<Arc<Mutex<BTreeMap<String, String>>>>| {
            let node = world.node(name);
            let store: Arc<dyn Store> =
                Arc::new(FaultStore::over_link(inner.clone(), node.shared(), name, "store"));
            let requests = Requests::new(store.clone(), node.shared());
            let seen = Arc::<Mutex<BTreeMap<String, String>>>::default();
            views.push(seen.clone());
            node.spawn_task("inventory", follow(store.clone(), node.clone(), seen.clone()));
            let (engine, stop) = (node.clone(), stopping.clone());
            node.spawn_task("engine", async move {
                // The inventory goes on when the engine has been told to stop.
                while !stop.load(Ordering::Relaxed) {
                    engine.sleep(Duration::from_millis(1 + engine.below(50))).await;
                    let key = slot(engine.below(4));
                    let holder = seen.lock().unwrap().get(&key).cloned();
                    // Decided from the inventory, which may be old: the compare is what protects.
                    let txn = match holder.as_deref() {
                        None => TxnBuilder::new().expect_absent(key.clone()).put_raw(key.clone(), name),
                        Some(holder) if holder == name => TxnBuilder::new()
                            .expect(Compare::value(key.clone(), name))
                            .delete_raw(key.clone()),
                        Some(_) => continue,
                    };
                    let result = requests.txn(txn, Duration::from_secs(60)).await;
                    engine.trace(&format!("{name} {key} {result:?}"));
                }
            });
        };
        start("one", &mut views);
        start("two", &mut views);
        for round in 0..10 {
            world.sleep(Duration::from_millis(400)).await;
            let victim = ["one", "two"][world.below(2) as usize];
            match world.below(3) {
                0 => world.partition().cut(victim, "store", Cut::Refuse),
                1 => world.partition().cut_one_way("store", victim, Cut::Hang(Duration::from_millis(700))),
                _ => world.partition().cut_one_way(victim, "store", Cut::Refuse),
            }
            if round == 5 {
                assert_eq!(world.crash_node("one"), 2);
                views.remove(0);
                start("one", &mut views);
            }
            world.sleep(Duration::from_millis(400)).await;
            world.partition().heal_all();
        }
        // Stop changing; then both inventories must come to what the store holds.
        stopping.store(true, Ordering::Relaxed);
        world.sleep(Duration::from_secs(120)).await;
        let (kvs, revision) = list_prefix(inner.as_ref(), ROOT).await.unwrap();
        assert!(revision > 100, "they did work: {revision}");
        let held = kvs.iter().map(|kv| (kv.key.clone(), String::from_utf8_lossy(&kv.value).into_owned()));
        let held: BTreeMap<String, String> = held.collect();
        for view in &views {
            assert_eq!(*view.lock().unwrap(), held);
        }
        // Each slot was taken and freed in turn, never taken twice: the history says so.
        let mut free = BTreeMap::<String, bool>::new();
        let compacted = inner.status().await.unwrap().compact_revision;
        let mut watch = inner.watch(ROOT, compacted + 1).await.unwrap();
        while let Some(Ok(WatchItem::Batch(batch))) = watch.next().await {
            for event in &batch.events {
                let puts = matches!(event.change, Change::Put(_));
                if let Some(was_free) = free.insert(event.key().to_owned(), !puts) {
                    assert_eq!(was_free, puts, "{event:?}");
                }
                assert_eq!(event.prev_mod_revision.is_none(), puts, "{event:?}");
            }
        }
        held.into_iter().map(|(key, value)| format!("{key} {value} {revision}")).collect()
    });
    (left, env.trace_digest())
}

#[test]
fn two_engines_with_partitions_and_a_crash_are_safe_and_reproducible() {
    let mut digests = std::collections::BTreeSet::new();
    for seed in 0..8 {
        digests.insert(two_engines(seed).1);
    }
    assert_eq!(digests.len(), 8, "each seed is another run");
    assert_eq!(two_engines(5), two_engines(5), "the same seed is the same run");
}
