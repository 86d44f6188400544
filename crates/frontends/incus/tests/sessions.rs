//! Sessions with guests: none stays on the host when what it was for is over.
#![allow(clippy::disallowed_methods)] // a test

use crate::{
    api::{at, command, secrets},
    common::{PATIENCE, Server},
};
use hyper::Method;
use serde_json::json;
use std::time::{Duration, Instant};

/// The host keeps no session any more.
async fn none_is_kept(s: &Server) {
    let end = Instant::now() + PATIENCE;
    while s.agent.sessions_kept() > 0 {
        assert!(Instant::now() < end, "{} sessions stay on the host", s.agent.sessions_kept());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_are_over_are_closed() {
    let s = Server::start().await;
    s.container("c1", true).await;
    for code in 0..5 {
        let mut alone = command(&["sh", "-c", &format!("exit {code}")]);
        alone["wait-for-websocket"] = json!(false);
        let ended = s.done(s.post("/1.0/instances/c1/exec", alone).await).await;
        assert_eq!(ended["metadata"]["return"], code);
    }
    assert_eq!(s.agent.count("exec_start"), 5);
    none_is_kept(&s).await;

    let (operation, fds) = secrets(&s.post("/1.0/instances/c1/exec", command(&["true"])).await);
    let mut sockets = vec![];
    for name in ["control", "0", "1", "2"] {
        sockets.push(s.websocket(&at(&operation, &fds, name)).await);
    }
    let ended = s.get(&format!("{operation}/wait?timeout=60")).await.metadata();
    assert_eq!(ended["status"], "Success", "{ended}");
    none_is_kept(&s).await;

    for n in 0..5 {
        let path = format!("/1.0/instances/c1/files?path=/root/f{n}");
        let answer = s.send(Method::POST, &path, &[], "whole").await;
        assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
    }
    assert_eq!(s.agent.count("file_write"), 5);
    none_is_kept(&s).await;
}
