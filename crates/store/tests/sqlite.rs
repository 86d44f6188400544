//! What SQLite's store promises beyond the contract: shared commits, one process, compaction, a full disk.
#![allow(clippy::disallowed_methods)] // tests live in the real world

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::block_on;
use futures::StreamExt;
use karst_env::RealEnv;
use karst_store::*;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};

async fn open(path: &Path) -> Result<SqliteStore, StoreError> {
    SqliteStore::open(path, RealEnv::shared(), SqliteOptions::default()).await
}

fn put(key: impl Into<String>, bytes: usize) -> Txn {
    Txn { success: vec![Op::put(key, vec![b'x'; bytes])], ..Txn::default() }
}

#[test]
fn transactions_that_queue_share_a_commit_and_keep_their_revisions() {
    block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.db");
        let store = Arc::new(open(&path).await.unwrap());
        let first = store.txn(put("/first", 1)).await.unwrap().committed().unwrap();
        assert_eq!((first, store.sync_count()), (2, 1));
        // Until all of them are in the queue nothing can be written; otherwise the writer could be done with each of them
        // before the next has come, as it is where the two take turns on one processor.
        let busy = rusqlite::Connection::open(&path).unwrap();
        busy.execute_batch("BEGIN IMMEDIATE").unwrap();
        let mut all = Box::pin(futures::future::join_all((0..64).map(|number| {
            let store = store.clone();
            async move { store.txn(put(format!("/k{number}"), 10)).await.unwrap().committed().unwrap() }
        })));
        assert!(futures::poll!(&mut all).is_pending());
        drop(busy);
        let mut revisions = all.await;
        revisions.sort();
        assert_eq!(revisions, (first + 1..=first + 64).collect::<Vec<_>>());
        let counters = store.counters();
        assert_eq!(counters.transactions, 65);
        assert!(counters.durable_commits < 30, "{counters:?}");
        // What changes nothing does not wait for the disk.
        let nothing = Txn { compares: vec![Compare::absent("/first")], ..Txn::default() };
        assert_eq!(store.txn(nothing).await.unwrap().committed(), None);
        assert_eq!(store.counters(), counters);
    });
}

#[test]
fn a_reopened_store_goes_on_where_it_was_and_is_private() {
    block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.db");
        let store = open(&path).await.unwrap();
        let lease = store.lease_grant(Duration::from_secs(60)).await.unwrap();
        let leased = Op::Put { key: "/leased".into(), value: "x".into(), lease: Some(lease) };
        assert_eq!(store.txn(put("/a", 1)).await.unwrap().committed(), Some(2));
        let txn = Txn { success: vec![leased, Op::delete("/a")], ..Txn::default() };
        assert_eq!(store.txn(txn).await.unwrap().committed(), Some(3));
        store.compact(3).await.unwrap();
        for entry in std::fs::read_dir(directory.path()).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o077, 0, "{:?}", entry.path());
        }
        match open(&path).await {
            Err(StoreError::Unavailable(text)) => {
                assert!(text.contains("in use by another process"), "{text}")
            }
            other => panic!("{other:?}"),
        }
        drop(store);

        let store = open(&path).await.unwrap();
        let status = store.status().await.unwrap();
        assert_eq!((status.revision, status.compact_revision, status.backend), (3, 3, "sqlite"));
        assert!(store.get("/leased").await.unwrap().kv.is_some());
        assert_eq!(store.lease_keepalive(lease).await, Ok(Duration::from_secs(60)));
        assert_eq!(store.txn(put("/b", 1)).await.unwrap().committed(), Some(4));
        store.lease_revoke(lease).await.unwrap();
        assert_eq!(store.get("/leased").await.unwrap(), GetResponse { kv: None, revision: 5 });
    });
}

#[test]
fn tables_of_a_newer_program_are_refused() {
    block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.db");
        drop(open(&path).await.unwrap());
        rusqlite::Connection::open(&path).unwrap().execute_batch("PRAGMA user_version = 99").unwrap();
        match open(&path).await {
            Err(StoreError::Unavailable(text)) => assert!(text.contains("tables of version 99"), "{text}"),
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn history_is_compacted_by_and_by_and_the_present_stays() {
    block_on(async {
        let options = SqliteOptions { keep_revisions: 100, ..SqliteOptions::default() };
        let store = SqliteStore::memory_with(RealEnv::shared(), options).unwrap();
        assert!(store.txn(put("/old", 1)).await.unwrap().committed().is_some());
        for number in 0..1000 {
            assert!(store.txn(put(format!("/k{}", number % 7), 1000)).await.unwrap().committed().is_some());
        }
        let status = store.status().await.unwrap();
        let kept = status.revision - status.compact_revision;
        assert!((100..=300).contains(&kept), "{status:?}");
        assert!(status.size_bytes < 1 << 20, "what is gone gives its room back: {status:?}");
        assert!(store.get("/old").await.unwrap().kv.is_some());
        assert_eq!(list_prefix(&store, "/").await.unwrap().0.len(), 8);
        let mut watch = store.watch("/", 2).await.unwrap();
        let compact_revision = status.compact_revision;
        assert_eq!(watch.next().await, Some(Err(StoreError::Compacted { compact_revision })));
    });
}

#[test]
fn a_watch_says_when_it_has_caught_up_and_when_others_went_on() {
    block_on(async {
        let store = SqliteStore::memory(RealEnv::shared()).unwrap();
        assert!(store.txn(put("/a/1", 1)).await.unwrap().committed().is_some());
        let mut watch = store.watch("/a/", 1).await.unwrap();
        assert_eq!(watch.next().await.unwrap().unwrap().revision(), 2);
        assert_eq!(watch.next().await, Some(Ok(WatchItem::Progress(2))));
        for _ in 0..3 {
            assert!(store.txn(put("/elsewhere", 1)).await.unwrap().committed().is_some());
        }
        assert_eq!(watch.next().await, Some(Ok(WatchItem::Progress(5))));
        drop(store);
        assert!(matches!(watch.next().await, Some(Err(StoreError::Unavailable(_)))));
        assert_eq!(watch.next().await, None);
    });
}

/// A small file system of the test's own.
struct SmallDisk(tempfile::TempDir);

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

#[test]
fn a_full_disk_refuses_changes_keeps_everything_and_recovers() {
    if !common::backends::root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    if let Err(error) = mount("tmpfs", directory.path(), "tmpfs", MountFlags::empty(), c"size=2m") {
        return common::backends::missing(&format!("a small file system cannot be mounted: {error}"));
    }
    let disk = SmallDisk(directory);
    block_on(async {
        let store = open(&disk.0.path().join("state.db")).await.unwrap();
        let mut written = 0;
        let error = loop {
            match store.txn(put(format!("/k{written:05}"), 20_000)).await {
                Ok(outcome) => {
                    assert!(outcome.committed().is_some(), "{outcome:?}");
                    written += 1;
                }
                Err(error) => break error,
            }
            assert!(written < 1000, "the disk is not small");
        };
        assert!(matches!(error, StoreError::Full(_)), "{error:?}");
        assert!(written > 10);
        assert_eq!(karst_model::Error::from(error).kind, karst_model::ErrorKind::Quota);
        let all = async || list_prefix(&store, "/").await.unwrap().0.len();
        assert_eq!(all().await, written, "reads go on, and the refused one is not there");

        // With room again, so does everything.
        mount_remount(disk.0.path(), MountFlags::empty(), c"size=32m").unwrap();
        assert!(store.txn(put("/more", 20_000)).await.unwrap().committed().is_some());
        assert_eq!(all().await, written + 1);
        drop(store);
        let store = open(&disk.0.path().join("state.db")).await.unwrap();
        assert_eq!(list_prefix(&store, "/").await.unwrap().0.len(), written + 1);
    });
}
