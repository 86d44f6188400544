//! Custom volumes, snapshots and copies over the API.
#![allow(clippy::disallowed_methods)] // a test

use crate::common::Server;
use hyper::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn custom_volumes_live() {
    let s = Server::start().await;
    s.container("c1", false).await;
    s.container("c2", false).await;
    const ALL: &str = "/1.0/storage-pools/default/volumes";
    let at = |name: &str| format!("{ALL}/custom/{name}").trim_end_matches('/').to_owned();
    let made = s
        .post(
            &at(""),
            json!({"name": "data", "config": {"size": "1GiB", "user.a": "b"}, "description": "mine"}),
        )
        .await;
    assert_eq!((made.status, made.header("location")), (201, &*at("data")));
    let made = s.post(ALL, json!({"name": "disk", "type": "custom", "content_type": "block"})).await;
    assert_eq!(made.status, 201);
    let disk = s.get(&at("disk")).await.metadata();
    assert_eq!(
        (disk["content_type"].as_str(), disk["config"]["size"].as_str()),
        (Some("block"), Some("10GiB"))
    );
    for (body, status) in [
        (json!({"name": "data"}), 409),
        (json!({"name": "a b"}), 400),
        (json!({"name": "x", "content_type": "weird"}), 400),
        (json!({"name": "x", "config": {"sise": "1GiB"}}), 400),
        (json!({"name": "x", "source": {"type": "none", "sise": 1}}), 400),
        (json!({"name": "x", "config": {"size": "big"}}), 400),
        (json!({"name": "x", "type": "container"}), 400),
        (json!({}), 400),
    ] {
        s.post(ALL, body).await.refused(status);
    }
    s.post("/1.0/storage-pools/nope/volumes/custom", json!({"name": "x"})).await.refused(404);
    let names = s.get(&at("")).await.metadata();
    assert_eq!(names, json!([at("data"), at("disk")]));
    let filtered = s.get(&format!("{ALL}?recursion=1&filter=content_type+eq+block")).await.metadata();
    assert_eq!((filtered.as_array().unwrap().len(), filtered[0]["name"].as_str()), (1, Some("disk")));

    // Changes, under the ETag.
    let seen = s.get(&at("data")).await;
    let tag = seen.header("etag").to_owned();
    let body = json!({"description": "changed", "config": {"size": "2GiB"}}).to_string();
    s.send(Method::PUT, &at("data"), &[("if-match", &tag)], body.clone()).await.metadata();
    s.send(Method::PUT, &at("data"), &[("if-match", &tag)], body).await.refused(412);
    s.patch(&at("data"), json!({"config": {"user.b": "c"}})).await.metadata();
    let seen = s.get(&at("data")).await.metadata();
    assert_eq!(seen["config"], json!({"size": "2GiB", "user.b": "c"}));
    assert_eq!(seen["description"], "changed");
    s.put(&at("disk"), json!({"config": {"size": "5GiB"}})).await.refused(400);
    s.put(&at("disk"), json!({"config": {"size": "11GiB"}})).await.metadata();
    s.put(&format!("{ALL}/container/c1"), json!({"description": "x"})).await.refused(400);

    // Attached: a file system to both, named by the devices; not a disk to a container.
    let disk = |source: &str, path: &str| json!({"devices": {"d": {"type": "disk", "pool": "default", "source": source, "path": path}}});
    for c in ["c1", "c2"] {
        s.patch(&format!("/1.0/instances/{c}"), disk("data", "/data")).await.metadata();
    }
    assert!(s.patch("/1.0/instances/c1", disk("disk", "")).await.refused(400).contains("block volume"));
    assert!(s.patch("/1.0/instances/c1", disk("data", "")).await.refused(400).contains("path"));
    assert!(s.patch("/1.0/instances/c1", disk("gone", "/x")).await.refused(404).contains("gone"));
    let seen = s.get(&at("data")).await.metadata();
    assert_eq!(seen["used_by"], json!(["/1.0/instances/c1", "/1.0/instances/c2"]));
    assert!(s.delete(&at("data")).await.refused(409).contains("/1.0/instances/c1"));
    let moved = s.post(&at("data"), json!({"name": "moved"})).await;
    assert_eq!((moved.status, moved.header("location")), (201, &*at("moved")));
    let c2 = s.get("/1.0/instances/c2").await.metadata();
    assert_eq!(c2["devices"]["d"]["source"], "moved", "devices follow");
    s.post(&at("moved"), json!({"name": "disk"})).await.refused(409);
    s.post(&at("moved"), json!({"name": "x", "pool": "other"})).await.refused(404);
    for c in ["c1", "c2"] {
        s.wait(s.put(&format!("/1.0/instances/{c}"), json!({"profiles": ["default"]})).await).await;
    }
    s.delete(&at("moved")).await.metadata();
    s.get(&at("moved")).await.refused(404);

    // A disk belongs to one virtual machine, unless it says otherwise.
    let vm = |name: &str| {
        let disk = json!({"type": "disk", "pool": "default", "source": "disk"});
        json!({"name": name, "type": "virtual-machine", "source": {"type": "none"}, "devices": {"d": disk}})
    };
    assert_eq!(s.done(s.post("/1.0/instances", vm("v1")).await).await["status"], "Success");
    assert!(s.post("/1.0/instances", vm("v2")).await.refused(409).contains("security.shared"));
    s.patch(&at("disk"), json!({"config": {"security.shared": "true"}})).await.metadata();
    assert_eq!(s.done(s.post("/1.0/instances", vm("v2")).await).await["status"], "Success");
    s.patch(&at("disk"), json!({"config": {"security.shared": "false"}})).await.refused(409);
    s.delete("/1.0/storage-pools/default").await.refused(409);
    let d = |keys: Value| {
        let mut disk = json!({"type": "disk", "pool": "default", "source": "disk"});
        disk.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        json!({"devices": {"d": disk}})
    };
    let refused = s.patch("/1.0/instances/v1", d(json!({"attached": "false"}))).await.refused(400);
    assert!(refused.contains("devices.d.attached"), "{refused}");

    // Another project has its own.
    assert_eq!(s.post("/1.0/projects", json!({"name": "other"})).await.status, 201);
    s.get(&format!("{}?project=other", at("disk"))).await.refused(404);
    let made = s.post(&format!("{}?project=other", at("")), json!({"name": "disk"})).await;
    assert_eq!(made.header("location"), format!("{}?project=other", at("disk")));
    s.delete("/1.0/projects/other").await.refused(409);
    s.delete(&format!("{}?project=other", at("disk"))).await.metadata();
    assert_eq!(s.delete("/1.0/projects/other").await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn file_systems_are_still_around_snapshots() {
    let s = Server::start().await;
    let config = json!({"migration.stateful": "true"});
    let machine = json!({
        "name": "v1", "type": "virtual-machine", "source": {"type": "none"}, "start": true, "config": config,
    });
    s.done(s.post("/1.0/instances", machine).await).await;
    const ALL: &str = "/1.0/instances/v1/snapshots";
    let calls = || (s.agent.count("guest_quiesce"), s.agent.count("guest_thaw"));
    s.done(s.post(ALL, json!({"name": "plain"})).await).await;
    assert_eq!(calls(), (0, 0), "nobody asked for it");
    s.done(s.post(ALL, json!({"name": "still", "quiesce": "require"})).await).await;
    assert_eq!(calls(), (1, 1));
    for body in [
        json!({"name": "x", "quiesce": "yes"}),
        json!({"name": "x", "quiesce": true}),
        json!({"name": "x", "quiesce": "try", "stateful": true}),
    ] {
        s.post(ALL, body).await.refused(400);
    }
    s.patch("/1.0/instances/v1", json!({"config": {"snapshots.quiesce": "always"}})).await.refused(400);
    s.patch("/1.0/instances/v1", json!({"config": {"snapshots.quiesce": "try"}})).await.metadata();
    s.done(s.post(ALL, json!({"name": "keyed"})).await).await;
    assert_eq!(calls(), (2, 2));
    s.done(s.post(ALL, json!({"name": "not", "quiesce": "no"})).await).await;
    assert_eq!(calls(), (2, 2));
    // Nobody answers inside: a warning, or nothing at all.
    let silent = || {
        let e = karst_model::Error::unavailable("the guest agent does not answer");
        s.agent.inject("guest_quiesce", karst_agent::Fault::FailBefore(e));
    };
    silent();
    let done = s.done(s.post(ALL, json!({"name": "tried"})).await).await;
    let warning = done["metadata"]["warnings"][0].as_str().unwrap();
    assert!(warning.contains("v1") && warning.contains("does not answer"), "{warning}");
    silent();
    let failed = s.wait(s.post(ALL, json!({"name": "none", "quiesce": "require"})).await).await;
    assert!(failed["err"].as_str().unwrap().contains("does not answer"), "{failed}");
    let there = s.get(ALL).await.metadata();
    let names: Vec<_> =
        there.as_array().unwrap().iter().map(|p| p.as_str().unwrap().rsplit('/').next().unwrap()).collect();
    assert_eq!(names, ["plain", "still", "keyed", "not", "tried"]);
    let state = s.get("/1.0/instances/v1/state").await.metadata();
    assert_eq!(state["status"], "Running");
    // One whose processors stand still cannot.
    s.done(s.put("/1.0/instances/v1/state", json!({"action": "freeze"})).await).await;
    s.post(ALL, json!({"name": "x", "quiesce": "require"})).await.refused(409);
    s.done(s.post(ALL, json!({"name": "frozen"})).await).await;
    // What is of containers is the host's.
    s.container("c1", true).await;
    s.patch("/1.0/instances/c1", json!({"config": {"snapshots.quiesce": "try"}})).await.refused(400);
    let all = "/1.0/instances/c1/snapshots";
    s.done(s.post(all, json!({"name": "one", "quiesce": "require"})).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_of_instances_live() {
    let s = Server::start().await;
    s.container("c1", true).await;
    const ALL: &str = "/1.0/instances/c1/snapshots";
    assert_eq!(s.get(ALL).await.metadata(), json!([]));
    s.done(s.post(ALL, json!({"name": "first", "stateful": false})).await).await;
    let c1 = s.get("/1.0/instances/c1?recursion=1").await.metadata();
    assert_eq!(
        (c1["status"].as_str(), c1["snapshots"][0]["name"].as_str()),
        (Some("Running"), Some("first"))
    );
    s.patch("/1.0/instances/c1", json!({"config": {"user.a": "b"}})).await.metadata();
    s.done(s.post(ALL, json!({})).await).await;
    assert_eq!(s.get(ALL).await.metadata(), json!([format!("{ALL}/first"), format!("{ALL}/snap0")]));
    for (body, status) in [
        (json!({"name": "first"}), 409),
        (json!({"name": "a b"}), 400),
        (json!({"nmae": "x"}), 400),
        (json!({"name": "x", "stateful": true}), 400),
        (json!({"name": "x", "expires_at": "tomorrow"}), 400),
        (json!({"name": "x", "expires_at": "2001-01-01T00:00:00Z"}), 400),
    ] {
        s.post(ALL, body).await.refused(status);
    }
    s.post("/1.0/instances/nope/snapshots", json!({})).await.refused(404);
    // When it goes.
    let snap = s.get(&format!("{ALL}/snap0")).await;
    assert_eq!(snap.metadata()["expires_at"], "0001-01-01T00:00:00Z");
    let (tag, body) =
        (snap.header("etag").to_owned(), json!({"expires_at": "2100-01-01T00:00:00Z"}).to_string());
    s.done(s.send(Method::PUT, &format!("{ALL}/snap0"), &[("if-match", &tag)], body.clone()).await).await;
    s.send(Method::PUT, &format!("{ALL}/snap0"), &[("if-match", &tag)], body).await.refused(412);
    let snap = s.get(&format!("{ALL}/snap0")).await.metadata();
    assert_eq!(
        (snap["expires_at"].as_str(), snap["config"]["user.a"].as_str()),
        (Some("2100-01-01T00:00:00Z"), Some("b"))
    );
    // PATCH keeps what it does not say; PUT does not.
    s.done(s.patch(&format!("{ALL}/snap0"), json!({})).await).await;
    assert_eq!(s.get(&format!("{ALL}/snap0")).await.metadata()["expires_at"], "2100-01-01T00:00:00Z");
    s.done(s.patch(&format!("{ALL}/snap0"), json!({"expires_at": "2101-01-01T00:00:00Z"})).await).await;
    assert_eq!(s.get(&format!("{ALL}/snap0")).await.metadata()["expires_at"], "2101-01-01T00:00:00Z");
    s.done(s.put(&format!("{ALL}/snap0"), json!({})).await).await;
    assert_eq!(s.get(&format!("{ALL}/snap0")).await.metadata()["expires_at"], "0001-01-01T00:00:00Z");
    s.patch(&format!("{ALL}/snap0"), json!({"expires_at": "soon"})).await.refused(400);
    // Back to the first, running as it was; the later one stays.
    s.put("/1.0/instances/c1", json!({"restore": "nope"})).await.refused(404);
    s.done(s.put("/1.0/instances/c1", json!({"restore": "c1/first", "stateful": false})).await).await;
    let c1 = s.get("/1.0/instances/c1").await.metadata();
    assert_eq!((c1["status"].as_str(), &c1["config"]["user.a"]), (Some("Running"), &json!(null)));
    assert_eq!(s.get(ALL).await.metadata().as_array().unwrap().len(), 2);
    // Renamed, deleted.
    s.post(&format!("{ALL}/snap0"), json!({"name": "first"})).await.refused(409);
    s.done(s.post(&format!("{ALL}/snap0"), json!({"name": "second"})).await).await;
    s.get(&format!("{ALL}/snap0")).await.refused(404);
    s.done(s.delete(&format!("{ALL}/second")).await).await;
    s.delete(&format!("{ALL}/second")).await.refused(404);
    // By keys: pattern and expiry, refused when malformed.
    let keys = json!({"config": {"snapshots.pattern": "auto-%d", "snapshots.expiry": "1d", "snapshots.schedule": "@daily",
        "snapshots.keep": "7"}});
    s.patch("/1.0/instances/c1", keys).await.metadata();
    for (key, value) in [
        ("snapshots.schedule", "often"),
        ("snapshots.expiry", "soon"),
        ("snapshots.keep", "0"),
        ("snapshots.pattern", "a/b"),
    ] {
        let why = s.patch("/1.0/instances/c1", json!({"config": {key: value}})).await.refused(400);
        assert!(why.contains(key), "{why}");
    }
    s.done(s.post(ALL, json!({})).await).await;
    let auto = s.get(&format!("{ALL}/auto-0")).await.metadata();
    assert_ne!(auto["expires_at"], "0001-01-01T00:00:00Z");
    s.done(s.put("/1.0/instances/c1/state", json!({"action": "stop", "force": true})).await).await;
    s.done(s.delete("/1.0/instances/c1").await).await;
    assert!(s.engine.inner().inventory.read().snapshots.is_empty(), "they go with their instance");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_of_volumes_live() {
    let s = Server::start().await;
    const POOL: &str = "/1.0/storage-pools/default/volumes/custom";
    assert_eq!(s.post(POOL, json!({"name": "data", "config": {"size": "1GiB"}})).await.status, 201);
    let all = format!("{POOL}/data/snapshots");
    s.done(s.post(&all, json!({"name": "one", "description": "before"})).await).await;
    s.post(&all, json!({"name": "one"})).await.refused(409);
    s.post(&format!("{POOL}/nope/snapshots"), json!({"name": "x"})).await.refused(404);
    s.post("/1.0/storage-pools/default/volumes/container/c1/snapshots", json!({})).await.refused(400);
    let one = s.get(&format!("{all}/one")).await.metadata();
    assert_eq!((one["config"]["size"].as_str(), one["description"].as_str()), (Some("1GiB"), Some("before")));
    s.put(&format!("{POOL}/data"), json!({"config": {"size": "2GiB", "snapshots.expiry": "1d"}}))
        .await
        .metadata();
    s.put(&format!("{all}/one"), json!({"expires_at": "2100-01-01T00:00:00Z"})).await.metadata();
    s.patch(&format!("{all}/one"), json!({"description": "first"})).await.metadata();
    let one = s.get(&format!("{all}/one")).await.metadata();
    assert_eq!((&one["expires_at"], &one["description"]), (&json!("2100-01-01T00:00:00Z"), &json!("first")));
    s.patch(&format!("{all}/one"), json!({"descripton": "x"})).await.refused(400);
    s.patch(&format!("{all}/nope"), json!({"description": "x"})).await.refused(404);
    s.done(s.post(&all, json!({})).await).await;
    let list = s.get(&format!("{all}?recursion=1")).await.metadata();
    assert_eq!((list[0]["name"].as_str(), list[1]["name"].as_str()), (Some("data/one"), Some("data/snap0")));
    s.put(&format!("{POOL}/data"), json!({"restore": "nope"})).await.refused(404);
    s.put(&format!("{POOL}/data"), json!({"restore": "one"})).await.metadata();
    assert_eq!(s.get(&format!("{POOL}/data")).await.metadata()["config"], json!({"size": "1GiB"}));
    s.done(s.post(&format!("{all}/one"), json!({"name": "uno"})).await).await;
    s.done(s.delete(&format!("{all}/snap0")).await).await;
    assert_eq!(s.get(&all).await.metadata(), json!([format!("{all}/uno")]));
    s.delete(&format!("{POOL}/data")).await.metadata();
    assert!(s.engine.inner().inventory.read().volume_snapshots.is_empty(), "they go with their volume");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_are_copied() {
    let s = Server::start().await;
    s.container("c1", true).await;
    s.patch("/1.0/instances/c1", json!({"config": {"user.a": "1", "user.b": "2"}})).await.metadata();
    s.done(s.post("/1.0/instances/c1/snapshots", json!({"name": "snap"})).await).await;
    let copy = |name: &str, source: &str, more: serde_json::Value| {
        let mut body = json!({"name": name, "source": {"type": "copy", "source": source}});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let all = "/1.0/instances";
    s.done(s.post(all, copy("c2", "c1", json!({"config": {"user.b": "3"}}))).await).await;
    let (c1, c2) = (s.get("/1.0/instances/c1").await.metadata(), s.get("/1.0/instances/c2").await.metadata());
    assert_eq!((c2["status"].as_str(), c1["status"].as_str()), (Some("Stopped"), Some("Running")));
    assert_eq!((c2["config"]["user.a"].as_str(), c2["config"]["user.b"].as_str()), (Some("1"), Some("3")));
    for key in ["volatile.eth0.hwaddr", "volatile.uuid"] {
        assert_ne!(c1["config"][key], c2["config"][key], "{key} is its own");
    }
    assert_eq!(
        s.get("/1.0/instances/c2/snapshots").await.metadata(),
        json!(["/1.0/instances/c2/snapshots/snap"])
    );
    s.done(s.post(all, copy("c3", "c1/snap", json!({"start": true}))).await).await;
    assert_eq!(s.get("/1.0/instances/c3/snapshots").await.metadata(), json!([]));
    assert_eq!(s.get("/1.0/instances/c3").await.metadata()["status"], "Running");
    let only = json!({"name": "c4", "source": {"type": "copy", "source": "c1", "instance_only": true}});
    s.done(s.post(all, only).await).await;
    assert_eq!(s.get("/1.0/instances/c4/snapshots").await.metadata(), json!([]));
    s.post(all, copy("c2", "c1", json!({}))).await.refused(409);
    s.post(all, copy("c9", "nope", json!({}))).await.refused(404);
    s.post(all, copy("c9", "c1/nope", json!({}))).await.refused(404);
    s.post(all, copy("c9", "c1", json!({"profiles": ["nope"]}))).await.refused(404);
    // Into another project.
    assert_eq!(s.post("/1.0/projects", json!({"name": "other"})).await.status, 201);
    let root = json!({"root": {"type": "disk", "path": "/", "pool": "default"}});
    let body = json!({"name": "c1", "profiles": [], "devices": root,
        "source": {"type": "copy", "source": "c1", "project": "default"}});
    s.done(s.post("/1.0/instances?project=other", body).await).await;
    assert_eq!(s.get("/1.0/instances/c1?project=other").await.metadata()["project"], "other");
    s.delete("/1.0/instances/c2").await.metadata();
    assert_eq!(s.get("/1.0/instances/c1/snapshots").await.metadata().as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn custom_volumes_are_copied() {
    let s = Server::start().await;
    assert_eq!(s.post("/1.0/storage-pools", json!({"name": "second", "driver": "dir"})).await.status, 201);
    const FROM: &str = "/1.0/storage-pools/default/volumes/custom";
    const TO: &str = "/1.0/storage-pools/second/volumes/custom";
    let body = json!({"name": "data", "content_type": "block", "config": {"size": "1GiB", "user.a": "1"}});
    assert_eq!(s.post(FROM, body).await.status, 201);
    s.done(s.post(&format!("{FROM}/data/snapshots"), json!({"name": "one"})).await).await;
    let copy = |name: &str, source: &str, more: serde_json::Value| {
        let mut from = json!({"type": "copy", "name": source, "pool": "default"});
        from.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"name": name, "type": "custom", "config": {"user.b": "2"}, "source": from})
    };
    s.done(s.post(TO, copy("data", "data", json!({}))).await).await;
    let made = s.get(&format!("{TO}/data")).await.metadata();
    assert_eq!(made["content_type"], "block");
    assert_eq!(made["config"], json!({"size": "1GiB", "user.a": "1", "user.b": "2"}));
    assert_eq!(
        s.get(&format!("{TO}/data/snapshots")).await.metadata(),
        json!([format!("{TO}/data/snapshots/one")])
    );
    s.done(s.post(FROM, copy("old", "data/one", json!({}))).await).await;
    s.done(s.post(FROM, copy("alone", "data", json!({"volume_only": true}))).await).await;
    assert_eq!(s.get(&format!("{FROM}/alone/snapshots")).await.metadata(), json!([]));
    s.post(TO, copy("data", "data", json!({}))).await.refused(409);
    s.post(TO, copy("x", "nope", json!({}))).await.refused(404);
    s.post(TO, copy("x", "data/nope", json!({}))).await.refused(404);
    s.post(TO, copy("x", "data", json!({"pool": "nope"}))).await.refused(404);
    s.post(TO, json!({"name": "x", "source": {"type": "migration"}})).await.refused(400);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_are_refreshed() {
    let s = Server::start().await;
    s.container("c1", true).await;
    let all = "/1.0/instances";
    let taken =
        async |name: &str| s.done(s.post("/1.0/instances/c1/snapshots", json!({"name": name})).await).await;
    let names = async |of: &str| {
        let found = s.get(&format!("/1.0/instances/{of}/snapshots")).await.metadata();
        let all = found.as_array().unwrap().iter();
        all.map(|p| p.as_str().unwrap().rsplit('/').next().unwrap().to_owned()).collect::<Vec<_>>()
    };
    taken("one").await;
    taken("two").await;
    let refresh = |name: &str, more: serde_json::Value| {
        let mut source = json!({"type": "copy", "source": "c1", "refresh": true});
        source.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"name": name, "source": source})
    };
    // One that is not there is made.
    s.done(s.post(all, refresh("c2", json!({}))).await).await;
    assert_eq!(names("c2").await, ["one", "two"]);
    let before = s.get("/1.0/instances/c2").await.metadata();
    let kept = s.get("/1.0/instances/c2/snapshots/two").await.metadata();
    s.done(s.delete("/1.0/instances/c1/snapshots/one").await).await;
    taken("three").await;
    s.done(s.post("/1.0/instances/c2/snapshots", json!({"name": "own"})).await).await;
    s.done(s.post(all, refresh("c2", json!({}))).await).await;
    assert_eq!(names("c2").await, ["two", "three"]);
    assert_eq!(s.get("/1.0/instances/c2/snapshots/two").await.metadata(), kept, "it stays as it is");
    let after = s.get("/1.0/instances/c2").await.metadata();
    for key in ["volatile.uuid", "volatile.eth0.hwaddr"] {
        assert_eq!(after["config"][key], before["config"][key], "it is the same instance");
    }
    s.done(s.delete("/1.0/instances/c1/snapshots/two").await).await;
    s.done(s.post(all, refresh("c2", json!({"instance_only": true}))).await).await;
    assert_eq!(names("c2").await, ["two", "three"]);
    for (name, more, status) in [
        ("c2", json!({"source": "nope"}), 404),
        ("c2", json!({"source": "c1/nope"}), 404),
        ("c1", json!({}), 400),
    ] {
        s.post(all, refresh(name, more)).await.refused(status);
    }
    s.done(s.put("/1.0/instances/c2/state", json!({"action": "start"})).await).await;
    assert!(s.post(all, refresh("c2", json!({}))).await.refused(409).contains("stop it"));
    let machine = json!({"name": "v1", "type": "virtual-machine", "source": {"type": "none"}});
    s.done(s.post(all, machine).await).await;
    s.post(all, refresh("v1", json!({}))).await.refused(409);
    assert_eq!(names("c2").await, ["two", "three"], "the refused change nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn custom_volumes_are_refreshed_and_moved() {
    let s = Server::start().await;
    assert_eq!(s.post("/1.0/storage-pools", json!({"name": "second", "driver": "dir"})).await.status, 201);
    assert_eq!(s.post("/1.0/projects", json!({"name": "other"})).await.status, 201);
    const FROM: &str = "/1.0/storage-pools/default/volumes/custom";
    const TO: &str = "/1.0/storage-pools/second/volumes/custom";
    assert_eq!(s.post(FROM, json!({"name": "data", "config": {"user.a": "1"}})).await.status, 201);
    let take = async |path: &str, name: &str| {
        s.done(s.post(&format!("{path}/data/snapshots"), json!({"name": name})).await).await;
    };
    let names = async |path: &str| {
        let found = s.get(&format!("{path}/snapshots")).await.metadata();
        let all = found.as_array().unwrap().iter();
        all.map(|p| p.as_str().unwrap().rsplit('/').next().unwrap().to_owned()).collect::<Vec<_>>()
    };
    take(FROM, "one").await;
    let refresh = |name: &str, source: &str| {
        json!({"name": name, "type": "custom",
               "source": {"type": "copy", "name": source, "pool": "default", "refresh": true}})
    };
    s.done(s.post(TO, refresh("data", "data")).await).await;
    assert_eq!(names(&format!("{TO}/data")).await, ["one"]);
    take(FROM, "two").await;
    take(TO, "own").await;
    s.done(s.post(TO, refresh("data", "data")).await).await;
    assert_eq!(names(&format!("{TO}/data")).await, ["one", "two"]);
    s.post(FROM, refresh("data", "data")).await.refused(400);
    s.post(TO, refresh("data", "nope")).await.refused(404);
    assert_eq!(s.post(TO, json!({"name": "disk", "content_type": "block"})).await.status, 201);
    s.post(TO, refresh("disk", "data")).await.refused(409);

    let mut far = refresh("far", "data");
    far["source"]["project"] = json!("default");
    let there = format!("{TO}?project=other");
    s.done(s.post(&there, far.clone()).await).await;
    s.done(s.post(&there, far.clone()).await).await;
    far["source"]["refresh"] = json!(false);
    s.post(&there, far).await.refused(409);
    let taken = s.get(&format!("{TO}/far/snapshots?project=other")).await.metadata();
    assert_eq!(taken.as_array().unwrap().len(), 2, "those of the other project");
    s.get(&format!("{TO}/far")).await.refused(404);

    // Who uses it follows it to another pool; to another project goes what nobody uses.
    s.container("c1", false).await;
    let disk =
        json!({"devices": {"data": {"type": "disk", "pool": "default", "source": "data", "path": "/data"}}});
    s.patch("/1.0/instances/c1", disk).await.metadata();
    let path = format!("{FROM}/data");
    let wrong = [
        (json!({"name": "data", "pool": "second"}), 409),
        (json!({"name": "data", "project": "other"}), 409),
        (json!({"name": "data", "pool": "nope"}), 404),
        (json!({"name": "data", "project": "nope"}), 404),
        (json!({"name": "a b", "pool": "second"}), 400),
        (json!({"name": "data", "pool": "second", "pol": ""}), 400),
    ];
    for (body, status) in wrong {
        s.post(&path, body).await.refused(status);
    }
    s.done(s.post(&path, json!({"name": "moved", "pool": "second"})).await).await;
    s.get(&path).await.refused(404);
    let moved = format!("{TO}/moved");
    assert_eq!(names(&moved).await, ["one", "two"]);
    assert_eq!(s.get(&moved).await.metadata()["used_by"], json!(["/1.0/instances/c1"]));
    let device = s.get("/1.0/instances/c1").await.metadata()["devices"]["data"].clone();
    assert_eq!((&device["pool"], &device["source"]), (&json!("second"), &json!("moved")));
    s.done(s.delete("/1.0/instances/c1").await).await;
    s.done(s.post(&moved, json!({"name": "data", "pool": "second", "project": "other"})).await).await;
    s.get(&moved).await.refused(404);
    let there = s.get(&format!("{TO}/data?project=other")).await.metadata();
    assert_eq!((&there["project"], &there["config"]["user.a"]), (&json!("other"), &json!("1")));
    let found = s.get(&format!("{TO}/data/snapshots?project=other")).await.metadata();
    assert_eq!(found.as_array().unwrap().len(), 2);
    // One of the same name is in the other project still.
    assert_eq!(s.get(&format!("{TO}/data")).await.metadata()["project"], "default");
    s.post(&format!("{TO}/data?project=other"), json!({"name": "data", "project": "default"}))
        .await
        .refused(409);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn directories_are_shared_with_machines() {
    let s = Server::start().await;
    const V1: &str = "/1.0/instances/v1";
    let volumes = "/1.0/storage-pools/default/volumes/custom";
    assert_eq!(s.post(volumes, json!({"name": "data"})).await.status, 201);
    let body = json!({"name": "v1", "type": "virtual-machine", "source": {"type": "none"}, "start": true});
    s.done(s.post("/1.0/instances", body).await).await;
    let device = |keys: Value| {
        let mut disk = json!({"type": "disk", "pool": "default", "source": "data", "path": "/mnt/data"});
        disk.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        json!({"devices": {"d": disk}})
    };
    for (keys, status, text) in [
        (json!({"path": ""}), 400, "devices.d.path"),
        (json!({"path": "/mnt/../etc"}), 400, "devices.d.path"),
        (json!({"path": "/sys"}), 400, "devices.d.path"),
        (json!({"source": "gone"}), 404, "gone"),
        (json!({"readonly": "maybe"}), 400, "devices.d.readonly"),
        (json!({"shift": "maybe"}), 400, "devices.d.shift"),
        (json!({"io.bus": "virtiofs", "limits.max": "1MiB"}), 400, "devices.d.io.bus"),
        (json!({"io.bus": "virtio-fs"}), 400, "devices.d.io.bus"),
        (json!({"io.bus": "nvme"}), 400, "devices.d.io.bus"),
        (json!({"io.cache": "unsafe"}), 400, "devices.d.io.cache"),
        (json!({"boot.priority": "1"}), 400, "devices.d.boot.priority"),
    ] {
        let refused = s.patch(V1, device(keys.clone())).await.refused(status);
        assert!(refused.contains(text), "{keys}: {refused}");
    }
    let pending = async || s.get("/1.0/karst/instances/v1/pending").await.metadata();
    assert_eq!(s.get(V1).await.metadata()["devices"], json!({}), "nothing was changed");
    assert_eq!(pending().await, json!([]));

    // Not plugged while it runs; there from the next start on, and its volume in use.
    for bus in ["virtiofs", "9p", "auto"] {
        s.patch(V1, device(json!({"readonly": "true", "io.bus": bus}))).await.metadata();
        assert_eq!(s.get(V1).await.metadata()["devices"]["d"]["io.bus"], bus, "it is kept as it was written");
        assert_eq!(pending().await[0]["key"], "devices.d");
    }
    s.patch(V1, device(json!({"readonly": "true"}))).await.metadata();
    assert_eq!(pending().await[0]["key"], "devices.d");
    assert!(s.delete(&format!("{volumes}/data")).await.refused(409).contains(V1));
    let restart = json!({"action": "restart", "force": true});
    s.done(s.put(&format!("{V1}/state"), restart.clone()).await).await;
    assert_eq!(pending().await, json!([]));
    s.patch(V1, device(json!({"path": "/srv", "readonly": "true"}))).await.metadata();
    let moved = json!([{"key": "devices.d.path", "live": "/mnt/data", "configured": "/srv"}]);
    assert_eq!(pending().await, moved);
    // Its memory could not be kept.
    let stateful = json!({"config": {"migration.stateful": "true"}});
    assert!(s.patch(V1, stateful).await.refused(400).contains("migration.stateful"));
    // A path of the host is the host's to grant.
    let host = json!({"devices": {"d": {"type": "disk", "source": "/srv/shared", "path": "/srv"}}});
    s.patch(V1, host).await.metadata();
    assert_eq!(pending().await[0]["key"], "devices.d.path");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_of_volumes() {
    let s = Server::start().await;
    let all = "/1.0/storage-pools/default/volumes/custom";
    assert_eq!(s.post(all, json!({"name": "data"})).await.status, 201);
    let block = json!({"name": "blocks", "content_type": "block", "config": {"size": "16MiB"}});
    assert_eq!(s.post(all, block).await.status, 201);
    let at = |path: &str| format!("{all}/data/files?path={path}");
    let headers = [("x-incus-uid", "5"), ("x-incus-gid", "6"), ("x-incus-mode", "0640")];
    s.send(Method::POST, &at("/etc/f1"), &headers, "hello\n").await.metadata();
    let got = s.get(&at("etc%2Ff1")).await;
    assert_eq!(&got.body[..], b"hello\n");
    for (name, value) in [("uid", "5"), ("gid", "6"), ("mode", "0640"), ("type", "file")] {
        assert_eq!(got.header(&format!("x-incus-{name}")), value);
    }
    s.send(Method::POST, &at("/d"), &[("x-incus-type", "directory")], "").await.metadata();
    s.send(Method::POST, &at("/d/l"), &[("x-incus-type", "symlink")], "../etc/f1").await.metadata();
    let directory = s.get(&at("/d")).await;
    assert_eq!((directory.header("x-incus-type"), directory.metadata()), ("directory", json!(["l"])));
    let head = s.send(Method::HEAD, &at("/etc/f1"), &[], "").await;
    assert_eq!((head.status, head.header("content-length")), (200, "6"));
    // As it is for a guest that has the volume, and for nobody else.
    s.delete(&at("/etc/f1")).await.metadata();
    s.get(&at("/etc/f1")).await.refused(404);
    s.delete(&at("/d")).await.refused(409);
    let other = at("/etc/hostname").replace("custom/data", "custom/none");
    assert!(s.get(&other).await.refused(404).contains("none"));
    let of_instances = at("/").replace("/custom/", "/container/");
    assert!(s.get(&of_instances).await.refused(404).contains("/1.0/instances"));
    assert!(s.get(&at("/").replace("custom/data", "custom/blocks")).await.refused(501).contains("disk"));
    s.get(&format!("{all}/data/files")).await.refused(400);
    s.get(&at("%2Fa%00b")).await.refused(400);
    s.send(Method::POST, &at("/x"), &[("x-incus-mode", "rw")], "").await.refused(400);
    // Made anew it has none, unless a snapshot still shows them.
    s.send(Method::POST, &at("/etc/f2"), &[], "x").await.metadata();
    let rebuild = format!("{all}/data/rebuild");
    s.post(&rebuild, json!({"size": "1GiB"})).await.refused(400);
    s.done(s.post(&rebuild, json!({})).await).await;
    s.get(&at("/etc/f2")).await.refused(404);
    s.post(&rebuild.replace("data", "none"), json!({})).await.refused(404);
    s.done(s.post(&format!("{all}/blocks/snapshots"), json!({"name": "snap"})).await).await;
    let text = s.post(&rebuild.replace("data", "blocks"), json!({})).await.refused(409);
    assert!(text.contains("snapshots"), "{text}");
    // SFTP, by hand: INIT is answered by a version, and a wrong volume before the upgrade.
    s.get(&format!("{all}/none/sftp")).await.refused(404);
    s.get(&format!("{all}/data/sftp")).await.refused(400);
    let mut stream = tokio::net::UnixStream::connect(&s.socket).await.unwrap();
    let head =
        format!("GET {all}/data/sftp HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: sftp\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = vec![];
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await.unwrap());
    }
    assert!(answer.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&answer));
    stream.write_all(&[0, 0, 0, 5, 1, 0, 0, 0, 3]).await.unwrap();
    let length = stream.read_u32().await.unwrap() as usize;
    let mut version = vec![0; length];
    stream.read_exact(&mut version).await.unwrap();
    assert_eq!(version[..5], [2, 0, 0, 0, 3]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roots_begin_as_their_devices_say() {
    let s = Server::start().await;
    let body = |name: &str, key: &str, value: &str| {
        let mut root = json!({"type": "disk", "path": "/", "pool": "default"});
        root[key] = json!(value);
        json!({"name": name, "source": {"type": "none"}, "devices": {"root": root}})
    };
    for (name, value) in [("c1", "true"), ("c2", "false")] {
        s.done(s.post("/1.0/instances", body(name, "initial.full_copy", value)).await).await;
        let volume = s.get(&format!("/1.0/storage-pools/default/volumes/container/{name}")).await.metadata();
        assert_eq!(volume["config"]["full_copy"], value, "{volume}");
    }
    // Later it changes nothing of the volume, and what is kept is what was written.
    s.patch(
        "/1.0/instances/c2",
        json!({"devices": {"root": {"type": "disk", "path": "/", "pool": "default"}}}),
    )
    .await;
    let volume = s.get("/1.0/storage-pools/default/volumes/container/c2").await.metadata();
    assert_eq!(volume["config"]["full_copy"], "false");
    let text = s.post("/1.0/instances", body("c3", "initial.zfs.blocksize", "16KiB")).await.refused(400);
    assert!(text.contains("initial.zfs.blocksize") && text.contains("volume.*"), "{text}");

    // Strings of the firmware are of virtual machines, and the next start tells them.
    let machine = json!({"name": "v1", "type": "virtual-machine", "source": {"type": "none"},
        "config": {"smbios11.io.example:role": "web", "systemd.credential.a": "b"}});
    s.done(s.post("/1.0/instances", machine).await).await;
    let config = s.get("/1.0/instances/v1").await.metadata()["config"].clone();
    assert_eq!(config["smbios11.io.example:role"], "web");
    let wrong = s.patch("/1.0/instances/v1", json!({"config": {"smbios11.a b": "x"}})).await.refused(400);
    assert!(wrong.contains("smbios11.a b"), "{wrong}");
    let container = json!({"name": "c4", "source": {"type": "none"}, "config": {"smbios11.a": "b"}});
    assert!(s.post("/1.0/instances", container).await.refused(400).contains("container"));
    let text = s.patch("/1.0/instances/v1", json!({"config": {"security.sev": "true"}})).await.refused(400);
    assert!(text.contains("security.sev"), "{text}");
}
