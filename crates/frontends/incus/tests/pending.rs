//! Live against configured, over a socket: what waits for the next start is shown until it has come.

use crate::common::{Server, until};
use serde_json::json;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pending_changes_are_shown() {
    let s = Server::start().await;
    let pending = async |name: &str| s.get(&format!("/1.0/karst/instances/{name}/pending")).await;
    let body = json!({"name": "v1", "type": "virtual-machine", "source": {"type": "none"}, "start": true,
        "config": {"limits.memory": "256MiB"}});
    s.done(s.post("/1.0/instances", body).await).await;
    assert_eq!(pending("v1").await.metadata(), json!([]));

    let config =
        json!({"limits.memory": "512MiB", "user.note": "x", "cloud-init.user-data": "#cloud-config"});
    s.patch("/1.0/instances/v1", json!({"config": config})).await.metadata();
    let expected = json!([
        {"key": "cloud-init.user-data", "live": null, "configured": "#cloud-config"},
        {"key": "limits.memory", "live": "256MiB", "configured": "512MiB"},
    ]);
    assert_eq!(pending("v1").await.metadata(), expected);
    // A key that is live elsewhere is a warning here; one that never is was not expected to be.
    until("a warning of what waits", async || {
        let all = s.get("/1.0/warnings?recursion=1").await.metadata();
        let said =
            all.as_array().unwrap().iter().find(|w| w["type"] == "Change waits for a restart").cloned();
        let Some(said) = said else { return false };
        let text = said["last_message"].as_str().unwrap();
        assert!(text.contains("limits.memory=512MiB (now 256MiB)") && !text.contains("cloud-init"), "{text}");
        true
    })
    .await;
    // Another change does not make it forgotten; one of a profile is part of it.
    s.patch("/1.0/instances/v1", json!({"description": "y"})).await.metadata();
    assert_eq!(pending("v1").await.metadata(), expected);
    s.patch("/1.0/profiles/default", json!({"config": {"limits.cpu": "2"}})).await.metadata();
    let cpu = json!({"key": "limits.cpu", "live": null, "configured": "2"});
    assert_eq!(pending("v1").await.metadata()[1], cpu);
    s.patch("/1.0/profiles/default", json!({"config": {"limits.cpu": ""}})).await.metadata();

    // Back to what it has, and a start with the rest.
    s.patch("/1.0/instances/v1", json!({"config": {"limits.memory": "256MiB"}})).await.metadata();
    let left = pending("v1").await.metadata();
    assert_eq!((left.as_array().unwrap().len(), left[0]["key"].as_str()), (1, Some("cloud-init.user-data")));
    let restart = json!({"action": "restart", "force": true});
    s.done(s.put("/1.0/instances/v1/state", restart).await).await;
    assert_eq!(pending("v1").await.metadata(), json!([]));
    s.done(s.put("/1.0/instances/v1/state", json!({"action": "stop", "force": true})).await).await;
    assert_eq!(pending("v1").await.metadata(), json!([]), "nothing runs, nothing waits");
    pending("nobody").await.refused(404);
}
