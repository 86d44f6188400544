//! VMIDs over a socket: chosen in the body that makes an instance, shown where Incus has no place for them.

use crate::common::Server;
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vmid_is_chosen_and_shown() {
    let s = Server::start().await;
    let known = async |name: &str| s.get(&format!("/1.0/karst/instances/{name}")).await.metadata();
    let body = |name: &str, vmid: Value| json!({"name": name, "source": {"type": "none"}, "vmid": vmid});
    s.done(s.post("/1.0/instances", body("c1", json!(4711))).await).await;
    // Who says none, or nothing, is given the next, wherever a chosen one stands.
    s.done(s.post("/1.0/instances", body("c2", json!(null))).await).await;
    s.container("c3", false).await;
    let c1 = known("c1").await;
    let id = s.get("/1.0/instances/c1").await.metadata()["config"]["volatile.uuid"].clone();
    let expected = json!({"name": "c1", "project": "default", "id": id, "vmid": 4711, "vmid_chosen": true,
        "last_end": null, "reason": null});
    assert_eq!(c1, expected);
    for (name, vmid) in [("c2", 100), ("c3", 101)] {
        let drawn = known(name).await;
        assert_eq!((&drawn["vmid"], &drawn["vmid_chosen"]), (&json!(vmid), &json!(false)), "{name}");
    }
    // Copies have their own, machines too; a name changes, the number stays.
    let copy = json!({"name": "c4", "source": {"type": "copy", "source": "c1"}, "vmid": 4712});
    s.done(s.post("/1.0/instances", copy).await).await;
    let machine =
        json!({"name": "v1", "type": "virtual-machine", "source": {"type": "none"}, "vmid": 999_999_999});
    s.done(s.post("/1.0/instances", machine).await).await;
    assert_eq!([&known("c4").await["vmid"], &known("v1").await["vmid"]], [&json!(4712), &json!(999_999_999)]);
    s.done(s.post("/1.0/instances/c1", json!({"name": "c5"})).await).await;
    assert_eq!(known("c5").await["vmid"], json!(4711));
    s.get("/1.0/karst/instances/nobody").await.refused(404);
    s.get("/1.0/karst/instances/c5?project=nowhere").await.refused(404);

    // Each refusal says why, and nothing is made.
    s.done(s.delete("/1.0/instances/c4").await).await;
    for (vmid, status, part) in [
        (json!(4711), 409, "VMID 4711 is taken"),
        (json!(101), 409, "VMID 101 is taken"),
        (json!(4712), 409, "VMID 4712 was given out before"),
        (json!(99), 400, "100 to 999999999"),
        (json!(0), 400, "100 to 999999999"),
        (json!(-4711), 400, "-4711 is not a VMID"),
        (json!(1_000_000_000), 400, "100 to 999999999"),
        (json!(4_294_967_396_i64), 400, "4294967396 is not a VMID"),
        (json!("4713"), 400, "a whole number"),
        (json!(4713.5), 400, "a whole number"),
    ] {
        let error = s.post("/1.0/instances", body("c9", vmid.clone())).await.refused(status);
        assert!(error.contains(part), "{vmid}: {error}");
    }
    let again = json!({"type": "copy", "source": "c5", "refresh": true});
    let again = json!({"name": "c2", "source": again, "vmid": 4713});
    assert!(s.post("/1.0/instances", again).await.refused(400).contains("refresh"));
    let all = s.get("/1.0/instances").await.metadata();
    assert_eq!(all, json!(["c2", "c3", "c5", "v1"].map(|name| format!("/1.0/instances/{name}"))));
    // What was refused has taken none.
    s.done(s.post("/1.0/instances", body("c9", json!(4713))).await).await;
    assert_eq!(known("c9").await["vmid"], json!(4713));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_is_dumped() {
    let s = Server::start().await;
    s.container("c1", true).await;
    let body = json!({"name": "v1", "type": "virtual-machine", "source": {"type": "none"}, "start": true});
    s.done(s.post("/1.0/instances", body).await).await;
    let dump = |name: &str, query: &str| format!("/1.0/instances/{name}/debug/memory{query}");
    for (query, begins) in
        [("", &b"\x7fELF"[..]), ("?format=elf", b"\x7fELF"), ("?format=kdump-zlib", b"KDUMP")]
    {
        let answer = s.get(&dump("v1", query)).await;
        assert_eq!((answer.status, answer.header("content-type")), (200, "application/octet-stream"));
        assert_eq!(answer.header("content-length"), answer.body.len().to_string());
        assert!(answer.body.starts_with(begins), "{query}");
    }
    assert_eq!(s.get("/1.0/instances/v1").await.metadata()["status"], "Running");
    let text = s.get(&dump("v1", "?format=raw")).await.refused(400);
    assert!(text.contains("raw") && text.contains("win-dmp"), "{text}");
    s.get(&dump("v1", "?format=win-dmp")).await.refused(400);
    s.get(&dump("c1", "")).await.refused(501);
    s.get(&dump("none", "")).await.refused(404);
    s.done(s.put("/1.0/instances/v1/state", json!({"action": "stop", "force": true})).await).await;
    s.get(&dump("v1", "")).await.refused(409);
}
