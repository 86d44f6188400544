//! Recovering what a pool has and the database does not, by plain HTTP.
#![allow(clippy::disallowed_methods)] // a test

use crate::common::{PATIENCE, Server};
use karst_agent::{CallContext, HostAgent, PoolSurvey};
use karst_store::{Op, ROOT, Txn, list_prefix};
use serde_json::json;
use std::time::Duration;

/// Waits until the host has a description of everything, which is written some seconds later.
async fn described(s: &Server, count: usize) {
    let spec = s.engine.inner().inventory.read().pools.values().next().unwrap().spec().unwrap();
    tokio::time::timeout(PATIENCE, async {
        let mut said = 0;
        while said < count {
            tokio::time::sleep(Duration::from_millis(100)).await;
            said = 0;
            let mut after = None;
            loop {
                let request = PoolSurvey { spec: spec.clone(), after };
                let page = s.agent.pool_survey(&CallContext::read(PATIENCE), request).await.unwrap();
                said += page.volumes.iter().filter(|v| v.description.is_some()).count();
                after = page.volumes.last().map(|v| v.volume);
                if !page.more {
                    break;
                }
            }
        }
    })
    .await
    .expect("descriptions are written");
}

/// Everything about instances and volumes is gone from the database.
async fn lose(s: &Server) {
    let store = s.engine.inner().db.store();
    let (all, _) = list_prefix(store, ROOT).await.unwrap();
    let tables = ["instances", "volumes", "snapshots", "volume_snapshots", "vmids"];
    let gone = all.into_iter().map(|kv| kv.key).filter(|key| {
        let rest = key.strip_prefix(ROOT).unwrap();
        tables.contains(&rest.strip_prefix("index/").unwrap_or(rest).split('/').next().unwrap())
    });
    let txn = Txn { success: gone.map(Op::delete).collect(), ..Txn::default() };
    let revision = store.txn(txn).await.unwrap().committed().unwrap();
    s.engine.inner().inventory.wait_for(revision).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_volumes_are_recovered() {
    let s = Server::start().await;
    s.container("c1", false).await;
    let taken = s.post("/1.0/instances/c1/snapshots", json!({"name": "s1"})).await;
    s.done(taken).await;
    let volume = json!({"name": "data", "config": {"user.x": "y"}});
    s.post("/1.0/storage-pools/default/volumes/custom", volume).await.metadata();
    let before = s.get("/1.0/instances/c1").await.metadata();
    let volume_before = s.get("/1.0/storage-pools/default/volumes/custom/data").await.metadata();
    described(&s, 2).await;
    lose(&s).await;
    s.get("/1.0/instances/c1").await.refused(404);

    let pools = json!({"pools": [{"name": "default"}]});
    let found = s.post("/internal/recover/validate", pools.clone()).await.metadata();
    let mut unknown = found["UnknownVolumes"].as_array().unwrap().clone();
    unknown.sort_by_key(|v| v["name"].to_string());
    assert_eq!(
        json!(unknown),
        json!([
            {"name": "c1", "type": "container", "snapshotCount": 1, "project": "default", "pool": "default"},
            {"name": "data", "type": "volume", "snapshotCount": 0, "project": "default", "pool": "default"},
        ])
    );
    assert_eq!(found["DependencyErrors"], json!([]));
    s.get("/1.0/instances/c1").await.refused(404);
    s.post("/internal/recover/import", pools.clone()).await.metadata();
    assert_eq!(s.get("/1.0/instances/c1").await.metadata(), before);
    assert_eq!(s.get("/1.0/instances/c1/snapshots/s1").await.metadata()["name"], "s1");
    assert_eq!(s.get("/1.0/storage-pools/default/volumes/custom/data").await.metadata(), volume_before);
    let found = s.post("/internal/recover/validate", pools).await.metadata();
    assert_eq!(found["UnknownVolumes"], json!([]));

    for (body, word) in [
        (json!({}), "pools"),
        (json!({"pools": [{"name": "default"}, {"name": "default"}]}), "twice"),
        (json!({"pools": [{"name": "other", "driver": "drr"}]}), "driver"),
        (json!({"pools": [{"name": "other", "driver": "dir", "config": {"sourc": "/x"}}]}), "sourc"),
        (json!({"pools": [{"name": "other", "frobnicate": 1}]}), "frobnicate"),
    ] {
        for path in ["/internal/recover/validate", "/internal/recover/import"] {
            let said = s.post(path, body.clone()).await.refused(400);
            assert!(said.contains(word), "{said}");
        }
    }
    let body = json!({"pools": [{"name": "other"}]});
    assert!(s.post("/internal/recover/validate", body).await.refused(404).contains("other"));
}
