//! Bodies that nobody asked for.
#![allow(clippy::disallowed_methods)] // a test

use crate::common::Server;
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
        let line = tokio::time::timeout(crate::common::PATIENCE, answer(&mut stream)).await.unwrap();
        assert!(line.contains(status), "{line}");
    }
}

/// A client that sends all of its body before it looks at the answer finds one, also where the body is not wanted, and
/// never a broken connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_sends_more_than_is_wanted_gets_the_answer_all_the_same() {
    let s = Server::start().await;
    s.container("c1", false).await;
    let file = "Content-Type: application/octet-stream\r\n";
    for (target, kind, mebibytes, status) in [
        ("POST /1.0/instances", "", 2, "413"),
        ("PUT /1.0/instances/c1", "", 24, "413"),
        ("POST /1.0/nothing", "", 3, "404"),
        ("POST /1.0/instances/nobody/files?path=/x", file, 24, "404"),
        ("POST /1.0/instances/c1/files?path=/x", "X-Incus-type: pipe\r\n", 3, "400"),
        ("POST /1.0/images?project=nothing", file, 24, "404"),
        ("POST /1.0/images", "Content-Type: multipart/form-data; boundary=b\r\n", 24, "400"),
        ("POST /1.0/instances?project=nothing", file, 24, "404"),
        ("PATCH /1.0/events", "", 3, "405"),
    ] {
        let mut stream = UnixStream::connect(&s.socket).await.unwrap();
        let length = mebibytes << 20;
        let head = format!("{target} HTTP/1.1\r\nHost: x\r\n{kind}Content-Length: {length}\r\n\r\n");
        let exchange = async {
            stream.write_all(head.as_bytes()).await.unwrap();
            for _ in 0..mebibytes {
                stream.write_all(&[b' '; 1 << 20]).await.unwrap_or_else(|e| panic!("{target}: {e}"));
            }
            answer(&mut stream).await
        };
        let line = tokio::time::timeout(crate::common::PATIENCE, exchange).await.unwrap();
        assert!(line.contains(status), "{target}: {line}");
    }
    // Who waits for leave to send gets the answer at once.
    let mut stream = UnixStream::connect(&s.socket).await.unwrap();
    let head =
        "POST /1.0/nothing HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 9000000\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let line = tokio::time::timeout(crate::common::PATIENCE, answer(&mut stream)).await.unwrap();
    assert!(line.contains("404"), "{line}");
}
