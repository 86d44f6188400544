//! Configuration of storage pools by plain HTTP.
#![allow(clippy::disallowed_methods)] // a test

mod common;

use common::Server;
use serde_json::json;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_keys_of_a_pool_are_checked_and_shown() {
    let s = Server::start().await;
    for (driver, key, value) in [
        ("dir", "size", "1GiB"),
        ("btrfs", "siez", "1GiB"),
        ("btrfs", "size", "much"),
        ("dir", "source", "srv"),
    ] {
        let body = json!({"name": "p3", "driver": driver, "config": {key: value}});
        let said = s.post("/1.0/storage-pools", body).await.refused(400);
        assert!(said.contains(key), "{said}");
    }
    s.get("/1.0/storage-pools/p3").await.refused(404);
    let body = json!({"name": "p4", "driver": "btrfs", "config": {"size": "1GiB", "user.note": "x"}});
    assert_eq!(s.post("/1.0/storage-pools", body).await.status, 201);
    let p4 = s.get("/1.0/storage-pools/p4").await.metadata();
    assert_eq!((&p4["driver"], &p4["config"]["size"]), (&json!("btrfs"), &json!("1GiB")));
    s.delete("/1.0/storage-pools/p4").await.metadata();
}
