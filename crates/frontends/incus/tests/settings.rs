//! Settings of instances as they reach the host.
#![allow(clippy::disallowed_methods)] // a test

use crate::common::{Server, next};
use karst_engine::Context;
use karst_frontend_incus::serve_connection;
use karst_model::{ByteSize, InstanceId, access::Principal};
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, net::UnixStream};
use tokio_tungstenite::tungstenite::Message;

fn only_instance(s: &Server) -> InstanceId {
    s.engine.instances_all(&Context::new(Principal::unix_admin(0, 0, 1)))[0].instance.id
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_reach_the_host_live() {
    let s = Server::start().await;
    s.container("c1", true).await;
    let id = only_instance(&s);
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

/// A share of the host's memory stays one in the configuration, and is so much for the guest and for whoever asks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_may_be_a_share_of_the_hosts() {
    let s = Server::start().await;
    s.container("c1", true).await;
    let id = only_instance(&s);
    let set = |memory: &str| s.patch("/1.0/instances/c1", json!({"config": {"limits.memory": memory}}));
    // The simulated host has 64 GiB.
    for (share, size) in [("25%", ByteSize::gib(16)), ("50%", ByteSize::gib(32))] {
        set(share).await.metadata();
        assert_eq!(s.agent.guest_limits(id).unwrap().memory, Some(size));
        assert_eq!(s.get("/1.0/instances/c1").await.metadata()["config"]["limits.memory"], share);
    }
    // Figures are two seconds old at most.
    let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
    loop {
        let state = s.get("/1.0/instances/c1/state").await.metadata();
        if state["memory"]["total"] == ByteSize::gib(32).bytes() {
            break;
        }
        assert!(std::time::Instant::now() < end, "{state}");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    for wrong in ["0%", "101%", "half%"] {
        let why = set(wrong).await.refused(400);
        assert!(why.contains("limits.memory") && why.contains("1% to 100%"), "{why}");
    }
    s.patch("/1.0/instances/c1", json!({"config": {"limits.memory.swap": "50%"}})).await.refused(400);
    assert_eq!(s.agent.guest_limits(id).unwrap().memory, Some(ByteSize::gib(32)), "nothing has changed");
    set("1GiB").await.metadata();
    let limits = s.agent.guest_limits(id).unwrap();
    assert_eq!((limits.memory, limits.memory_share), (Some(ByteSize::gib(1)), None));
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_does_not_depend_on_who_asked_for_it() {
    let mut s = Server::start().await;
    s.container("slow", true).await;
    s.patch("/1.0/instances/slow", json!({"config": {"boot.host_shutdown_timeout": "1"}})).await.metadata();
    s.agent.set_ignores_shutdown(only_instance(&s), true);
    let mut events = s.websocket("/1.0/events?type=operation").await;
    let (mut near, far) = UnixStream::pair().unwrap();
    let context = Context::new(Principal::unix_admin(0, 0, 1));
    let served = tokio::spawn(serve_connection(s.app.clone(), context, far));
    near.write_all(b"PUT /internal/shutdown HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n").await.unwrap();
    assert!(next(&mut events).await.is_some(), "the guest is being stopped");
    drop(near);
    served.await.unwrap();
    s.shutdown.recv().await.expect("the server is asked to end");
    assert_eq!(s.get("/1.0/instances/slow").await.metadata()["status"], "Stopped");
}
