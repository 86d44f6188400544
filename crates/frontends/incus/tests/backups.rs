//! Backups and imports over the API.
#![allow(clippy::disallowed_methods)] // a test

use crate::common::Server;
use hyper::Method;
use serde_json::json;

const FILE: (&str, &str) = ("content-type", "application/octet-stream");

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backups_of_instances_live() {
    let s = Server::start().await;
    s.container("c1", true).await;
    s.patch("/1.0/instances/c1", json!({"config": {"user.a": "1"}})).await.metadata();
    s.done(s.post("/1.0/instances/c1/snapshots", json!({"name": "snap"})).await).await;
    let all = "/1.0/instances/c1/backups";
    let made = s.done(s.post(all, json!({"compression_algorithm": "zstd"})).await).await;
    assert_eq!(made["resources"]["backups"][0], format!("{all}/backup0"));
    s.done(
        s.post(all, json!({"name": "two", "instance_only": true, "expires_at": "2100-01-01T00:00:00Z"}))
            .await,
    )
    .await;
    for (body, status) in [
        (json!({"name": "two"}), 409),
        (json!({"name": "a b"}), 400),
        (json!({"compression_algorithm": "rar"}), 400),
        (json!({"optimized_storage": true}), 400),
        (json!({"expires_at": "2000-01-01T00:00:00Z"}), 400),
        (json!({"nonsense": true}), 400),
    ] {
        s.post(all, body).await.refused(status);
    }
    s.post("/1.0/instances/nope/backups", json!({})).await.refused(404);
    let two = s.get(&format!("{all}/two")).await.metadata();
    assert_eq!(
        (two["instance_only"].as_bool(), two["expires_at"].as_str()),
        (Some(true), Some("2100-01-01T00:00:00Z"))
    );
    s.done(s.post(&format!("{all}/two"), json!({"name": "zwei"})).await).await;
    assert_eq!(s.get(all).await.metadata(), json!([format!("{all}/backup0"), format!("{all}/zwei")]));
    s.get(&format!("{all}/two")).await.refused(404);
    let file = s.get(&format!("{all}/backup0/export")).await;
    assert_eq!((file.status, file.header("content-length")), (200, &*file.body.len().to_string()));

    // And in again, under another name and into a named pool.
    let headers = [FILE, ("x-incus-name", "c2"), ("x-incus-pool", "default")];
    s.done(s.send(Method::POST, "/1.0/instances", &headers, file.body.clone()).await).await;
    let c2 = s.get("/1.0/instances/c2").await.metadata();
    assert_eq!((c2["status"].as_str(), c2["config"]["user.a"].as_str()), (Some("Stopped"), Some("1")));
    let c1 = s.get("/1.0/instances/c1").await.metadata();
    assert_ne!(c1["config"]["volatile.eth0.hwaddr"], c2["config"]["volatile.eth0.hwaddr"], "taken");
    assert_eq!(
        s.get("/1.0/instances/c2/snapshots").await.metadata(),
        json!(["/1.0/instances/c2/snapshots/snap"])
    );
    s.send(Method::POST, "/1.0/instances", &headers, file.body.clone()).await.refused(409);
    let wrong = [FILE, ("x-incus-name", "c3"), ("x-incus-pool", "nope")];
    s.send(Method::POST, "/1.0/instances", &wrong, file.body.clone()).await.refused(404);
    s.send(Method::POST, "/1.0/instances", &[FILE], "no backup").await.refused(400);
    s.send(Method::POST, "/1.0/instances", &[FILE], "").await.refused(400);

    // They go with what they are of, and nothing else is left.
    s.done(s.delete(&format!("{all}/zwei")).await).await;
    s.put("/1.0/instances/c1/state", json!({"action": "stop", "force": true})).await.metadata();
    for name in ["c1", "c2"] {
        let gone = s.delete(&format!("/1.0/instances/{name}")).await;
        if gone.status == 202 {
            s.wait(gone).await;
        }
    }
    let faults = left_over(&s).await;
    assert!(faults.is_empty(), "{faults:?}");
}

/// Backups that the host has and no record knows, or the other way round, and uploads that were left.
async fn left_over(s: &Server) -> Vec<String> {
    use karst_agent::{CallContext, HostAgent};
    let context = CallContext::read(std::time::Duration::from_secs(10));
    let check = s.agent.self_check(&context, ()).await.unwrap();
    let known = s.engine.inner().inventory.read().backups.len();
    let mut faults = check.leaks;
    if check.backups.len() != known {
        faults.push(format!("{} backups on the host, {known} known", check.backups.len()));
    }
    faults
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backups_of_volumes_live() {
    let s = Server::start().await;
    const POOL: &str = "/1.0/storage-pools/default/volumes/custom";
    assert_eq!(s.post(POOL, json!({"name": "data", "config": {"user.a": "b"}})).await.status, 201);
    s.done(s.post(&format!("{POOL}/data/snapshots"), json!({"name": "one"})).await).await;
    let all = format!("{POOL}/data/backups");
    let made = s.done(s.post(&all, json!({"name": "b", "volume_only": false})).await).await;
    assert_eq!(made["resources"]["backups"][0], format!("{all}/b"));
    let view = s.get(&format!("{all}/b")).await.metadata();
    assert_eq!((view["volume_only"].as_bool(), view.get("instance_only")), (Some(false), None));
    s.done(s.post(&all, json!({"name": "b2", "volume_only": true})).await).await;
    s.post(&format!("{all}/b2"), json!({"name": "b"})).await.refused(409);
    s.done(s.post(&format!("{all}/b2"), json!({"name": "b3"})).await).await;
    assert_eq!(s.get(&all).await.metadata(), json!([format!("{all}/b"), format!("{all}/b3")]));
    s.done(s.delete(&format!("{all}/b3")).await).await;
    s.delete(&format!("{all}/b3")).await.refused(404);
    assert_eq!(s.get(&format!("{all}?recursion=1")).await.metadata().as_array().unwrap().len(), 1);
    let file = s.get(&format!("{all}/b/export")).await.body;
    let headers = [FILE, ("x-incus-name", "copy")];
    s.done(s.send(Method::POST, POOL, &headers, file.clone()).await).await;
    let copy = s.get(&format!("{POOL}/copy")).await.metadata();
    assert_eq!(
        (copy["config"]["user.a"].as_str(), copy["content_type"].as_str()),
        (Some("b"), Some("filesystem"))
    );
    assert_eq!(
        s.get(&format!("{POOL}/copy/snapshots")).await.metadata(),
        json!([format!("{POOL}/copy/snapshots/one")])
    );
    s.send(Method::POST, POOL, &headers, file.clone()).await.refused(409);
    s.send(Method::POST, "/1.0/instances", &[FILE], file.clone()).await.refused(400);

    // Discs.
    let disc = [FILE, ("x-incus-name", "disc"), ("x-incus-type", "iso")];
    s.done(s.send(Method::POST, POOL, &disc, vec![7u8; 3 << 20]).await).await;
    let view = s.get(&format!("{POOL}/disc")).await.metadata();
    assert_eq!(view["content_type"], "iso");
    let grown = s.patch(&format!("{POOL}/disc"), json!({"config": {"size": "8MiB"}})).await.refused(400);
    assert!(grown.contains("config.size") && grown.contains("ISO"), "{grown}");
    let copy = json!({"name": "disc2", "config": {"size": "8MiB"}, "source": {"type": "copy", "name": "disc", "pool": "default"}});
    assert!(s.post(POOL, copy).await.refused(400).contains("config.size"));
    s.patch(&format!("{POOL}/disc"), json!({"config": {"size": "3MiB"}, "description": "x"}))
        .await
        .metadata();
    s.patch(&format!("{POOL}/disc"), json!({"description": ""})).await.metadata();
    // In many drives at once.
    let vm = |name: &str, bus: &str| {
        let drive = json!({"type": "disk", "pool": "default", "source": "disc", "io.bus": bus});
        json!({"name": name, "type": "virtual-machine", "source": {"type": "none"}, "devices": {"cd": drive}})
    };
    for (name, bus) in [("v1", "sata"), ("v2", "virtio-scsi")] {
        assert_eq!(s.done(s.post("/1.0/instances", vm(name, bus)).await).await["status"], "Success");
    }
    let refused = s.post("/1.0/instances", vm("v3", "nvme")).await.refused(400);
    assert!(refused.contains("devices.cd.io.bus"), "{refused}");
    assert!(s.delete(&format!("{POOL}/disc")).await.refused(409).contains("/1.0/instances/v1"));
    for name in ["v1", "v2"] {
        s.done(s.delete(&format!("/1.0/instances/{name}")).await).await;
    }
    s.post(&format!("{POOL}/disc/backups"), json!({})).await.refused(501);
    s.send(Method::POST, POOL, &[FILE, ("x-incus-type", "iso")], "x").await.refused(400);
    s.send(Method::POST, POOL, &[FILE, ("x-incus-name", "x"), ("x-incus-type", "tar")], "x")
        .await
        .refused(400);
    for name in ["data", "copy", "disc"] {
        s.delete(&format!("{POOL}/{name}")).await.metadata();
    }
    let faults = left_over(&s).await;
    assert!(faults.is_empty(), "{faults:?}");
}

/// Of one thing there are only so many, and what the host has no room for leaves nothing and says why.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backups_have_bounds() {
    let s = Server::start().await;
    for name in ["c1", "c2"] {
        s.container(name, false).await;
    }
    let all = "/1.0/instances/c1/backups";
    let full =
        karst_model::Error::quota("the host's disk has no more than the 512MiB free that backups must leave");
    s.agent.inject("backup_create", karst_agent::Fault::FailBefore(full));
    let failed = s.wait(s.post(all, json!({"name": "b"})).await).await;
    assert!(failed["err"].as_str().unwrap().contains("512MiB free that backups must leave"), "{failed}");
    assert_eq!(s.get(all).await.metadata(), json!([]));
    let faults = left_over(&s).await;
    assert!(faults.is_empty(), "{faults:?}");

    for _ in 0..karst_engine::backups::create::MOST {
        s.done(s.post(all, json!({"instance_only": true})).await).await;
    }
    let refused = s.post(all, json!({"name": "more"})).await.refused(403);
    assert!(refused.contains("c1") && refused.contains("expires_at"), "{refused}");
    s.done(s.post("/1.0/instances/c2/backups", json!({})).await).await;
    s.done(s.delete(&format!("{all}/backup7")).await).await;
    s.done(s.post(all, json!({"name": "more"})).await).await;
}
