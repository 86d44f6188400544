//! Settings of instances as they reach the host.
#![allow(clippy::disallowed_methods)] // a test

use crate::common::{Server, next};
use karst_model::{ByteSize, InstanceId};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_reach_the_host_live() {
    let s = Server::start().await;
    s.container("c1", true).await;
    let id: InstanceId = s
        .engine
        .instances_all(&karst_engine::Context::new(karst_model::access::Principal::unix_admin(0, 0, 1)))[0]
        .instance
        .id;
    let set = |config: Value| s.patch("/1.0/instances/c1", json!({"config": config}));
    set(json!({"limits.cpu.nodes": "0", "limits.cpu": "1", "limits.hugepages.2MB": "8MiB"})).await.metadata();
    let limits = s.agent.guest_limits(id).unwrap();
    assert_eq!(limits.cpu_nodes, Some(vec![0]));
    assert_eq!(limits.hugepages.get("2MB"), Some(&ByteSize::mib(8)));
    for (key, value) in [
        ("limits.cpu", "0-1"),
        ("limits.cpu.nodes", "some"),
        ("limits.hugepages.2MB", "many"),
        ("limits.hugepages.3MB", "4MiB"),
        ("limits.network.priority", "5"),
    ] {
        set(json!({key: value})).await.refused(400);
    }
    set(json!({"limits.cpu.nodes": "", "limits.hugepages.2MB": ""})).await.metadata();
    let limits = s.agent.guest_limits(id).unwrap();
    assert!(limits.cpu_nodes.is_none() && limits.hugepages.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_guests_stop_in_order() {
    let mut s = Server::start().await;
    let keys = [
        json!({"boot.stop.priority": "1", "boot.host_shutdown_action": "force-stop"}),
        json!({"boot.stop.priority": "9", "boot.host_shutdown_timeout": "0"}),
        json!({"boot.host_shutdown_timeout": "20"}),
    ];
    for (name, config) in ["second", "first", "third"].into_iter().zip(keys) {
        s.container(name, true).await;
        s.patch(&format!("/1.0/instances/{name}"), json!({"config": config})).await.metadata();
    }
    s.container("off", false).await;
    for (key, value) in [("boot.stop.priority", "first"), ("boot.host_shutdown_action", "halt")] {
        s.patch("/1.0/instances/off", json!({"config": {key: value}})).await.refused(400);
    }
    let mut events = s.websocket("/1.0/events?type=lifecycle").await;
    s.put("/internal/shutdown", json!({})).await.metadata();
    s.shutdown.recv().await.expect("the server is asked to end");
    let mut order = vec![];
    while order.len() < 3 {
        let Some(Message::Text(text)) = next(&mut events).await else { panic!("the events end") };
        let event: Value = serde_json::from_str(&text).unwrap();
        if event["metadata"]["action"] == "instance-stopped" {
            order.push(event["metadata"]["source"].as_str().unwrap().rsplit('/').next().unwrap().to_owned());
        }
    }
    assert_eq!(order, ["first", "second", "third"]);
    for name in ["first", "second", "third", "off"] {
        let shown = s.get(&format!("/1.0/instances/{name}")).await.metadata();
        assert_eq!(shown["status"], "Stopped", "{name}");
    }
    let start = s.put("/1.0/instances/off/state", json!({"action": "start"})).await;
    assert!(start.refused(503).contains("ends"));
}
