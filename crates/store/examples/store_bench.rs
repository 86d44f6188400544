//! Figures of the SQLite store: `cargo run --release -p karst-store --example store_bench [DIRECTORY]`.
//!
//! The directory should be on the disk in question; the default is the system's temporary directory.
#![allow(clippy::disallowed_methods)] // it measures real time

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use karst_env::RealEnv;
use karst_store::*;

const SEQUENTIAL: u64 = 2_000;
const WRITERS: u64 = 16;
const EACH: u64 = 500;
const READS: u64 = 5_000;
const VALUE: usize = 1_000;

/// Three records of 1000 bytes and an index key with a condition: about what a step of the engine writes.
fn step(writer: u64, number: u64) -> Txn {
    let value = "x".repeat(VALUE);
    TxnBuilder::new()
        .expect_absent(format!("/karst/v1/index/i/default/i{writer}-{number}"))
        .put_raw(format!("/karst/v1/index/i/default/i{writer}-{number}"), "id")
        .put_raw(format!("/karst/v1/instances/{writer}-{number}"), value.clone())
        .put_raw(format!("/karst/v1/operations/{writer}-{number}"), value.clone())
        .put_raw(format!("/karst/v1/sagas/{writer}"), value)
        .build()
        .unwrap()
}

fn line(what: &str, count: u64, took: Duration, syncs: u64) {
    let rate = count as f64 / took.as_secs_f64();
    println!("{what:<44} {rate:>9.0} /s   {count} in {took:.2?}, {syncs} commits waited for the disk");
}

/// Resident memory of this process, in KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = std::env::args_os().nth(1).map_or_else(std::env::temp_dir, PathBuf::from);
    let directory = tempfile::tempdir_in(directory)?;
    let env = RealEnv::shared();
    let before = resident();
    let store = Arc::new(
        SqliteStore::open(directory.path().join("state.db"), env.clone(), SqliteOptions::default()).await?,
    );

    let (start, syncs) = (Instant::now(), store.sync_count());
    for number in 0..SEQUENTIAL {
        store.txn(step(99, number)).await?.committed().ok_or("refused")?;
    }
    line(
        "transactions one after the other (4 puts)",
        SEQUENTIAL,
        start.elapsed(),
        store.sync_count() - syncs,
    );

    let (start, syncs) = (Instant::now(), store.sync_count());
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let store = store.clone();
            tokio::spawn(async move {
                for number in 0..EACH {
                    assert!(store.txn(step(writer, number)).await.unwrap().committed().is_some());
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await?;
    }
    line("transactions by 16 writers", WRITERS * EACH, start.elapsed(), store.sync_count() - syncs);

    let mut times = Vec::new();
    for number in 0..READS {
        let start = Instant::now();
        let answer =
            store.get(&format!("/karst/v1/instances/{}-{}", number % WRITERS, number % EACH)).await?;
        times.push(start.elapsed());
        assert!(answer.kv.is_some());
    }
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    println!("{:<44} median {:.1?}, 99% {:.1?}", "get", at(0.5), at(0.99));

    let grown = resident().saturating_sub(before);
    let start = Instant::now();
    let (kvs, _) = list_prefix(store.as_ref(), "/karst/v1/instances/").await?;
    println!("{:<44} {} records in {:.1?}", "list", kvs.len(), start.elapsed());
    drop(kvs);
    let status = store.status().await?;
    println!(
        "revision {}, compacted to {}, {} KiB on disk, memory grew by {} KiB before the list",
        status.revision,
        status.compact_revision,
        status.size_bytes / 1024,
        grown
    );
    Ok(())
}
