//! Bodies that nobody asked for.
#![allow(clippy::disallowed_methods)] // a test

mod common;

use common::Server;
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

/// Reads one answer whose length its head says; its status line.
async fn answer(stream: &mut UnixStream) -> String {
    let mut text = vec![];
    loop {
        let mut byte = [0];
        assert_eq!(
            stream.read(&mut byte).await.unwrap(),
            1,
            "closed after {:?}",
            String::from_utf8_lossy(&text)
        );
        text.push(byte[0]);
        if text.ends_with(b"\r\n\r\n") {
            break;
        }
    }
    let head = String::from_utf8(text).unwrap().to_lowercase();
    let length = head.lines().find_map(|l| l.strip_prefix("content-length: ")?.parse().ok()).unwrap();
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.unwrap();
    head.lines().next().unwrap().to_owned()
}

/// Ansible sends `null` with each request, in a segment of its own, and goes on with the connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_body_of_a_get_does_not_cost_the_connection() {
    let s = Server::start().await;
    let mut stream = UnixStream::connect(&s.socket).await.unwrap();
    for (method, path, status) in [
        ("GET", "/1.0", "200"),
        ("DELETE", "/1.0/instances/nothing", "404"),
        ("GET", "/1.0/instances", "200"),
    ] {
        let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        // Long enough for a server that does not wait to have answered.
        tokio::time::sleep(Duration::from_millis(100)).await;
        stream.write_all(b"null").await.unwrap();
        let line = tokio::time::timeout(common::PATIENCE, answer(&mut stream)).await.unwrap();
        assert!(line.contains(status), "{line}");
    }
}
