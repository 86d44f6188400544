//! Screens by SPICE, as Incus' client takes them: many websockets under one secret, until it closes the one of control. And ports
//! of machines.
#![allow(clippy::disallowed_methods)] // a test

use crate::{
    api::{at, secrets},
    common::{PATIENCE, Server, expect, next, say},
};
use serde_json::json;
use std::time::{Duration, Instant};
use tokio_tungstenite::tungstenite::Message;

async fn machine(s: &Server, name: &str, config: serde_json::Value) {
    let body = json!({"name": name, "type": "virtual-machine", "source": {"type": "none"}, "config": config});
    s.done(s.post("/1.0/instances", body).await).await;
    let start = json!({"action": "start", "timeout": -1, "force": false, "stateful": false});
    s.done(s.put(&format!("/1.0/instances/{name}/state"), start).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_screen_comes_by_spice_on_many_websockets() {
    let s = Server::start().await;
    machine(&s, "v1", json!({"hardware.spice": "true"})).await;
    let console = "/1.0/instances/v1/console";
    let (incus, lxc) =
        (json!({"type": "vga", "force": true, "width": 0, "height": 0}), json!({"type": "vga", "width": 0}));
    for body in [incus, lxc] {
        let (operation, fds) = secrets(&s.post(console, body).await);
        assert_eq!(fds.as_object().unwrap().len(), 2);
        let control = s.websocket(&at(&operation, &fds, "control")).await;
        let mut channels = vec![];
        for n in 0..4 {
            let mut channel = s.websocket(&at(&operation, &fds, "0")).await;
            // It says nothing before it was spoken to, and then knows one channel from another.
            say(&mut channel, Message::binary(&b"REDQ"[..])).await;
            expect(&mut channel, "REDQ\u{2}").await;
            say(&mut channel, Message::binary(format!("channel {n}").into_bytes())).await;
            channels.push(channel);
        }
        for (n, channel) in channels.iter_mut().enumerate() {
            expect(channel, &format!("channel {n}")).await;
        }
        // The end of one is not that of the others.
        drop(channels.pop());
        let first = &mut channels[0];
        say(first, Message::binary(&b"still here"[..])).await;
        expect(first, "still here").await;
        assert_eq!(s.get(&operation).await.metadata()["status"], "Running");
        drop(control);
        let ended = s.get(&format!("{operation}/wait?timeout=60")).await.metadata();
        assert_eq!(ended["status"], "Success", "{ended}");
        for channel in &mut channels {
            assert!(!matches!(next(channel).await, Some(Message::Binary(_))), "it ends with the client");
        }
    }
    let end = Instant::now() + PATIENCE;
    while s.agent.sessions_kept() > 0 {
        assert!(Instant::now() < end, "{} sessions stay on the host", s.agent.sessions_kept());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_screen_that_is_not_there_by_spice_says_what_to_do() {
    let s = Server::start().await;
    s.container("c1", true).await;
    machine(&s, "v1", json!({})).await;
    let vga = || json!({"type": "vga", "force": false});
    let text = s.post("/1.0/instances/v1/console", vga()).await.refused(501);
    assert!(text.contains("hardware.spice=true"), "{text}");
    s.post("/1.0/instances/c1/console", vga()).await.refused(501);
    s.post("/1.0/instances/nope/console", vga()).await.refused(404);
    let text = s.post("/1.0/instances/v1/console", json!({"type": "spice"})).await.refused(400);
    assert!(text.contains("vga"), "{text}");
    s.post("/1.0/instances/v1/console", json!({"type": "vga", "sound": true})).await.refused(400);
    s.patch("/1.0/instances/c1", json!({"config": {"hardware.spice": "true"}})).await.refused(400);
    // A password that is over lets nobody in here either, and is said before there are websockets.
    machine(&s, "v2", json!({"hardware.spice": "true"})).await;
    s.engine.set_secret_key(karst_engine::secrets::SecretKey::new(&[7; 32]).unwrap());
    let over = json!({"password": "late", "valid_to": "2001-01-01T00:00:00Z"});
    s.put("/1.0/karst/instances/v2/vnc", over).await.metadata();
    assert!(s.post("/1.0/instances/v2/console", vga()).await.refused(409).contains("set a new one"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ports_of_machines_are_attached_to() {
    let s = Server::start().await;
    let devices = json!({
        "serial1": {"type": "port", "port": "serial", "number": "1"},
        "quiet": {"type": "port", "port": "channel", "name": "org.example.0", "to": "null"},
    });
    let body = json!({
        "name": "v1", "type": "virtual-machine", "source": {"type": "none"}, "start": true, "devices": devices,
    });
    s.done(s.post("/1.0/instances", body).await).await;
    let console = "/1.0/instances/v1/console";
    let open = json!({"type": "console", "port": "serial1"});
    let (operation, fds) = secrets(&s.post(console, open.clone()).await);
    let _control = s.websocket(&at(&operation, &fds, "control")).await;
    let mut port = s.websocket(&at(&operation, &fds, "0")).await;
    say(&mut port, Message::binary(&b"hello port\r"[..])).await;
    expect(&mut port, "hello port").await;
    // One at a time, beside who is at the console.
    s.post(console, open).await.refused(409);
    let (beside, _) = secrets(&s.post(console, json!({"type": "console"})).await);
    let forced = json!({"type": "console", "port": "serial1", "force": true});
    let (after, _) = secrets(&s.post(console, forced).await);
    s.delete(&beside).await.metadata();
    s.delete(&after).await.metadata();
    s.post(console, json!({"type": "console", "port": "none"})).await.refused(404);
    let text = s.post(console, json!({"type": "console", "port": "quiet"})).await.refused(501);
    assert!(text.contains("elsewhere"), "{text}");
    // It is hardware: another one comes with the next start.
    let changed = json!({"devices": {"serial1": {"type": "port", "port": "serial", "number": "2"}}});
    s.patch("/1.0/instances/v1", changed).await.metadata();
    let forced = json!({"type": "console", "port": "serial1", "force": true});
    secrets(&s.post(console, forced).await);
    let twice = json!({"devices": {"more": {"type": "port", "port": "serial", "number": "2"}}});
    let text = s.patch("/1.0/instances/v1", twice).await.refused(400);
    assert!(text.contains("the same to the guest"), "{text}");
}
