//! Configuration of storage pools by plain HTTP.
#![allow(clippy::disallowed_methods)] // a test

use crate::common::Server;
use hyper::Method;
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pools_are_described() {
    let s = Server::start().await;
    let pool = "/1.0/storage-pools/default";
    let got = s.get(pool).await;
    let tag = got.header("etag").to_owned();
    let body = json!({"description": "fast", "config": {"user.note": "x"}}).to_string();
    s.send(Method::PUT, pool, &[("if-match", &tag)], body.clone()).await.metadata();
    s.send(Method::PUT, pool, &[("if-match", &tag)], body).await.refused(412);
    s.patch(pool, json!({"config": {"user.more": "y"}})).await.metadata();
    let seen = s.get(pool).await.metadata();
    assert_eq!((&seen["description"], &seen["config"]["user.note"]), (&json!("fast"), &json!("x")));
    assert_eq!(seen["config"]["user.more"], "y");
    // What it is made of is not changed afterwards but for its size, which grows; keys are checked as at its creation.
    let made = json!({"name": "p5", "driver": "btrfs", "config": {"size": "1GiB"}});
    assert_eq!(s.post("/1.0/storage-pools", made).await.status, 201);
    s.patch("/1.0/storage-pools/p5", json!({"config": {"size": "2GiB", "user.note": "more"}}))
        .await
        .metadata();
    let p5 = s.get("/1.0/storage-pools/p5").await.metadata();
    assert_eq!((&p5["config"]["size"], &p5["config"]["user.note"]), (&json!("2GiB"), &json!("more")));
    let space = s.get("/1.0/storage-pools/p5/resources").await.metadata();
    assert_eq!(space["space"]["total"], 2u64 << 30);
    for (config, key) in [
        (json!({"size": "1GiB"}), "only grows"),
        (json!({"size": "much"}), "size"),
        (json!({"size": ""}), "decided"),
        (json!({"nothing": "1"}), "nothing"),
    ] {
        let said = s.patch("/1.0/storage-pools/p5", json!({"config": config})).await.refused(400);
        assert!(said.contains(key), "{said}");
    }
    assert!(s.put("/1.0/storage-pools/p5", json!({"description": "x"})).await.refused(400).contains("size"));
    s.patch("/1.0/storage-pools/nothing", json!({})).await.refused(404);
    // A profile of another project is named with its project.
    assert_eq!(s.post("/1.0/projects", json!({"name": "team"})).await.status, 201);
    let devices = json!({"root": {"type": "disk", "path": "/", "pool": "p5"}});
    s.put("/1.0/profiles/default?project=team", json!({"devices": devices})).await.metadata();
    let users = s.get("/1.0/storage-pools/p5").await.metadata()["used_by"].clone();
    assert_eq!(users, json!(["/1.0/profiles/default?project=team"]));
    // A profile names what there is only.
    let wrong = json!({"devices": {"root": {"type": "disk", "path": "/", "pool": "none"}}});
    assert!(s.put("/1.0/profiles/default?project=team", wrong).await.refused(404).contains("none"));
    let wrong = json!({"name": "p", "devices": {"eth0": {"type": "nic", "network": "none0"}}});
    assert!(s.post("/1.0/profiles", wrong).await.refused(404).contains("none0"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pools_have_defaults_of_volumes() {
    let s = Server::start().await;
    let config = json!({"size": "100GiB", "volume.size": "3GiB", "volume.snapshots.expiry": "1w", "volume.snapshots.keep": "7"});
    let made = json!({"name": "p6", "driver": "btrfs", "config": config});
    assert_eq!(s.post("/1.0/storage-pools", made).await.status, 201);
    let volumes = "/1.0/storage-pools/p6/volumes/custom";
    let make = async |name: &str, config: serde_json::Value| {
        let answer = s.post(volumes, json!({"name": name, "config": config})).await;
        assert!(answer.status < 300, "{}", answer.json());
        s.get(&format!("{volumes}/{name}")).await.metadata()["config"].clone()
    };
    assert_eq!(
        make("plain", json!({})).await,
        json!({"size": "3GiB", "snapshots.expiry": "1w", "snapshots.keep": "7"})
    );
    let own = make("own", json!({"size": "2GiB", "snapshots.expiry": ""})).await;
    assert_eq!(own, json!({"size": "2GiB", "snapshots.keep": "7"}), "what is asked for as none stays none");
    // They change for volumes that are made from now on.
    s.patch("/1.0/storage-pools/p6", json!({"config": {"volume.size": "4GiB"}})).await.metadata();
    assert_eq!(make("later", json!({})).await["size"], "4GiB");
    assert_eq!(s.get(&format!("{volumes}/plain")).await.metadata()["config"]["size"], "3GiB");
    for (key, value) in [
        ("volume.size", "1KiB"),
        ("volume.sise", "1GiB"),
        ("volume.snapshots.keep", "0"),
        ("volume.snapshots.schedule", "x"),
    ] {
        let said = s.patch("/1.0/storage-pools/p6", json!({"config": {key: value}})).await.refused(400);
        assert!(said.contains("volume."), "{said}");
    }
    // Root disks too; a project's limit counts what they will have.
    let root = json!({"root": {"type": "disk", "path": "/", "pool": "p6"}});
    let config = json!({"features.images": "true", "features.profiles": "true", "limits.disk": "5GiB"});
    assert_eq!(s.post("/1.0/projects", json!({"name": "team", "config": config})).await.status, 201);
    let guest = |name: &str, kind: &str| json!({"name": name, "type": kind, "source": {"type": "none"}, "devices": root});
    s.done(s.post("/1.0/instances?project=team", guest("v1", "virtual-machine")).await).await;
    let over = s.post("/1.0/instances?project=team", guest("c1", "container")).await;
    assert!(
        (400..500).contains(&over.status) && over.json()["error"].as_str().unwrap().contains("limits.disk")
    );
}
