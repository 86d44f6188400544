//! What only a real etcd shows: outcomes that stay unknown while it is down, and work that goes on when it is back.
#![allow(clippy::disallowed_methods)] // tests live in the real world

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::block_on;
use common::etcd_server::EtcdServer;
use futures::StreamExt;
use karst_env::RealEnv;
use karst_store::*;

const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn transactions_across_kills_of_the_server_are_applied_exactly_once() {
    let Some(mut server) = EtcdServer::start() else {
        return;
    };
    block_on(async {
        let env = RealEnv::shared();
        let store: Arc<dyn Store> =
            Arc::new(EtcdStore::connect(&server.endpoints(), env.clone()).await.unwrap());
        let requests = Arc::new(Requests::new(store.clone(), env.clone()));
        // A counter that is raised without a condition: a transaction applied twice would show.
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let writer = tokio::spawn({
            let requests = requests.clone();
            async move {
                let (mut committed, mut lost) = (0u64, 0u64);
                while !*stopped.borrow() {
                    let txn = TxnBuilder::new().put_raw("/count", format!("{}", committed + lost));
                    match requests.txn(txn, PATIENCE).await.unwrap() {
                        Resolved::Committed { responses: Some(_), .. } => committed += 1,
                        Resolved::Committed { responses: None, .. } => lost += 1,
                        Resolved::Refused { .. } => panic!("nothing to refuse"),
                    }
                }
                (committed, lost)
            }
        });
        let version =
            async || store.get("/count").await.ok().and_then(|read| read.kv).map_or(0, |kv| kv.version);
        for round in 0..3 {
            let (before, deadline) = (version().await, std::time::Instant::now() + PATIENCE);
            while version().await < before + 20 {
                assert!(std::time::Instant::now() < deadline, "round {round}: no progress");
                tokio::task::yield_now().await;
            }
            server.restart();
        }
        let deadline = std::time::Instant::now() + PATIENCE;
        while version().await == 0 {
            assert!(std::time::Instant::now() < deadline, "it does not come back");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        stop.send(true).unwrap();
        let (committed, lost) = tokio::time::timeout(PATIENCE, writer).await.unwrap().unwrap();
        eprintln!("{committed} answered, {lost} found to be applied later");
        assert_eq!(version().await, committed + lost);

        // A watch that the kill broke says so, and can be taken up from where it was.
        let revision = store.get("/count").await.unwrap().revision;
        let mut watch = store.watch("/after/", revision + 1).await.unwrap();
        server.restart();
        let mut ended = None;
        while ended.is_none() {
            ended = match tokio::time::timeout(PATIENCE, watch.next()).await.expect("it hears of it") {
                Some(Ok(WatchItem::Progress(_))) => None,
                other => Some(other),
            };
        }
        assert!(matches!(ended, Some(Some(Err(StoreError::Unavailable(_))))), "{ended:?}");
        let txn = TxnBuilder::new().put_raw("/after/k", "1");
        let resolved = requests.txn(txn, PATIENCE).await.unwrap();
        let Resolved::Committed { revision: after, .. } = resolved else { panic!("{resolved:?}") };
        let mut watch = store.watch("/after/", revision + 1).await.unwrap();
        loop {
            match tokio::time::timeout(PATIENCE, watch.next()).await.unwrap().unwrap().unwrap() {
                WatchItem::Progress(_) => {}
                WatchItem::Batch(batch) => {
                    assert_eq!(batch.revision, after);
                    break;
                }
            }
        }
    });
}
