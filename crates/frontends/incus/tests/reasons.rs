//! Why an instance stands still or ended by itself, over a socket: in its state, its log, its warnings and where Incus has no place.

use crate::common::{Server, until};
use karst_engine::Context;
use karst_model::{InstanceId, access::Principal, instance::HaltReason};
use serde_json::{Value, json};

fn id_of(s: &Server, name: &str) -> InstanceId {
    s.engine.instance(&Context::new(Principal::system()), "default", name).unwrap().instance.id
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn why_an_instance_stands_still_is_said() {
    let s = Server::start().await;
    let vm = json!({"name": "v1", "type": "virtual-machine", "source": {"type": "none"}, "start": true});
    s.done(s.post("/1.0/instances", vm).await).await;
    let state = async || s.get("/1.0/instances/v1/state").await.metadata();
    let known = async || s.get("/1.0/karst/instances/v1").await.metadata();
    let log =
        async || String::from_utf8_lossy(&s.get("/1.0/instances/v1/logs/qemu.log").await.body).into_owned();
    let warned = async |text: &str| {
        let all = s.get("/1.0/warnings?recursion=1").await.metadata();
        let message = |w: &Value| w["last_message"].as_str().unwrap_or_default().to_owned();
        all.as_array().unwrap().iter().any(|w| w["status"] == "new" && message(w).contains(text))
    };
    assert!(state().await.get("karst_reason").is_none(), "it runs, and that was asked for");
    assert_eq!(known().await["reason"], Value::Null);

    let full = "no space is left for disk \"root\" on pool \"default\"";
    let id = id_of(&s, "v1");
    let slot = {
        let view = s.engine.instance(&Context::new(Principal::system()), "default", "v1").unwrap();
        view.instance.identities["root"].slot.clone()
    };
    assert!(s.agent.halt_guest(id, HaltReason::Disk { slot: Some(slot), full: true }));
    until("halted", async || state().await["status"] == "Error").await;
    let said = state().await;
    assert!(said["karst_reason"].as_str().unwrap().starts_with(full), "{said}");
    assert!(said["pid"].as_i64().unwrap() > 0, "its process lives: {said}");
    assert!(known().await["reason"].as_str().unwrap().starts_with(full));
    assert!(log().await.contains(full));
    until("a warning in words", async || warned(full).await).await;
    let refused = s.put("/1.0/instances/v1/state", json!({"action": "start"})).await;
    assert!(String::from_utf8_lossy(&refused.body).contains("resume it"), "{:?}", refused.body);

    s.done(s.put("/1.0/instances/v1/state", json!({"action": "unfreeze"})).await).await;
    assert_eq!(state().await["status"], "Running");
    assert!(state().await.get("karst_reason").is_none());
    until("no warning", async || !warned(full).await).await;

    assert!(s.agent.crash_guest(id));
    until("down", async || state().await["status"] == "Stopped").await;
    assert_eq!(state().await["karst_reason"], "killed by signal 9");
    let known = known().await;
    assert_eq!((&known["last_end"], &known["reason"]), (&json!("crashed"), &json!("killed by signal 9")));
    assert!(log().await.ends_with("killed by signal 9\n"));
    until("a warning", async || warned("ended by itself: killed by signal 9").await).await;
    s.done(s.put("/1.0/instances/v1/state", json!({"action": "start"})).await).await;
    assert!(state().await.get("karst_reason").is_none(), "that is over");
}
