//! `exec`, `console` and progress: bytes, signals, terminals.
#![allow(clippy::disallowed_methods)] // tests live in the real world

mod common;

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::OwnedFd,
    process::Stdio,
    sync::{Arc, Mutex},
};

use common::{Fake, PATIENCE, signal, texts};
use rustix::{
    process::Signal,
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcgetattr, tcsetwinsize},
};
use serde_json::json;
use tokio::sync::watch;

/// A terminal: what is written to it is collected.
struct Terminal {
    master: File,
    seen: Arc<Mutex<Vec<u8>>>,
    changed: watch::Receiver<()>,
}

impl Terminal {
    fn new() -> (Self, OwnedFd) {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
        let slave = rustix::fs::open(name, flags, rustix::fs::Mode::empty()).unwrap();
        let master = File::from(master);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (sender, changed) = watch::channel(());
        let (mut reader, collected) = (master.try_clone().unwrap(), seen.clone());
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = reader.read(&mut buffer) {
                collected.lock().unwrap().extend_from_slice(&buffer[..length]);
                let _ = sender.send(());
            }
        });
        (Self { master, seen, changed }, slave)
    }

    fn resize(&self, columns: u16, rows: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.master, size).unwrap();
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().unwrap()).into_owned()
    }

    async fn shows(&self, text: &str) {
        let mut changed = self.changed.clone();
        let wait = async {
            while !self.text().contains(text) {
                changed.changed().await.unwrap();
            }
        };
        tokio::time::timeout(PATIENCE, wait)
            .await
            .unwrap_or_else(|_| panic!("never shown: {text:?}; shown: {:?}", self.text()));
    }
}

#[tokio::test]
async fn exec_keeps_streams_apart_and_passes_the_exit_code() {
    let fake = Fake::start().await;
    let command = ["exec", "c1", "--env", "A=b", "--", "sh", "-c", "echo out; echo err >&2; echo $A; exit 7"];
    let (out, err, code) = texts(&fake.run(&command).await);
    assert_eq!((out.as_str(), err.as_str(), code), ("out\nb\n", "err\n", 7));
}

#[tokio::test]
async fn exec_takes_few_round_trips() {
    let fake = Fake::start().await;
    let (_, _, code) = texts(&fake.run(&["exec", "c1", "true"]).await);
    assert_eq!(code, 0);
    let mut requests = fake.requests();
    assert_eq!(requests.remove(0), "POST /1.0/instances/c1/exec");
    // All at once after it: four websockets and the wait.
    assert_eq!(requests.len(), 5, "{requests:?}");
    assert_eq!(requests.iter().filter(|request| request.contains("/websocket?secret=")).count(), 4);
}

#[tokio::test]
async fn exec_passes_stdin_and_its_end() {
    let fake = Fake::start().await;
    let input: Vec<u8> = (0..1_000_000u32).map(|n| (n % 253) as u8).collect();
    let output = fake.run_with(&["exec", "c1", "cat"], &input).await;
    assert!(output.status.success() && output.stdout == input);
    let output = fake.run_with(&["exec", "-n", "c1", "cat"], b"ignored").await;
    assert!(output.status.success() && output.stdout.is_empty(), "-n: nothing on stdin");
}

#[tokio::test]
async fn exec_of_what_is_not_there() {
    let fake = Fake::start().await;
    let (_, err, code) = texts(&fake.run(&["exec", "c1", "/nonexistent/program"]).await);
    assert_eq!((err.as_str(), code), ("karst: Command not found\n", 127));
    let (_, err, code) = texts(&fake.run(&["exec", "nope", "true"]).await);
    assert_eq!(code, 1);
    assert!(err.starts_with("karst: instance \"nope\" not found"), "{err}");
}

#[tokio::test]
async fn exec_forwards_signals() {
    let fake = Fake::start().await;
    let script = "trap 'echo got; exit 5' TERM; echo ready; while :; do sleep 0.05; done";
    let mut child = fake.karst(&["exec", "c1", "--", "sh", "-c", script]).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut ready = [0; 6];
    tokio::io::AsyncReadExt::read_exact(&mut out, &mut ready).await.unwrap();
    assert_eq!(&ready, b"ready\n");
    signal(&child, Signal::TERM);
    let mut rest = String::new();
    tokio::time::timeout(PATIENCE, tokio::io::AsyncReadExt::read_to_string(&mut out, &mut rest))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(rest, "got\n");
    assert_eq!(child.wait().await.unwrap().code(), Some(5));
    assert_eq!(fake.control(), [json!({"command": "signal", "signal": 15})]);
}

#[tokio::test]
async fn exec_ends_a_command_whose_output_nobody_reads() {
    let fake = Fake::start().await;
    let (mut reader, writer) = std::io::pipe().unwrap();
    let child = fake.karst(&["exec", "c1", "yes"]).stdout(Stdio::from(writer)).spawn().unwrap();
    let first = tokio::task::spawn_blocking(move || {
        let mut first = [0; 2];
        reader.read_exact(&mut first).unwrap();
        first
    });
    assert_eq!(&first.await.unwrap(), b"y\n");
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await.expect("yes ends").unwrap();
    let (_, err, code) = texts(&output);
    assert_eq!((err.as_str(), code), ("", 128 + 13));
}

#[tokio::test]
async fn exec_with_a_terminal() {
    let fake = Fake::start().await;
    let (mut terminal, slave) = Terminal::new();
    terminal.resize(90, 30);
    let before = format!("{:?}", tcgetattr(&slave).unwrap());
    let mut child = fake
        .karst(&["exec", "c1", "bash"])
        .stdin(Stdio::from(slave.try_clone().unwrap()))
        .stdout(Stdio::from(slave.try_clone().unwrap()))
        .spawn()
        .unwrap();
    terminal.shows("ready> ").await;
    let body = &fake.bodies()[0];
    assert_eq!(
        (&body["interactive"], &body["width"], &body["height"]),
        (&json!(true), &json!(90), &json!(30))
    );
    assert_eq!(body["environment"]["TERM"], "xterm");
    // Raw: ctrl-C is a byte for the guest, not a signal for us, and a line needs no end.
    terminal.master.write_all(b"a\x03").unwrap();
    fake.until("typing", |fake| fake.typed() == b"a\x03").await;
    terminal.resize(100, 40);
    signal(&child, Signal::WINCH);
    let resized = json!({"command": "window-resize", "args": {"width": "100", "height": "40"}});
    fake.until("resize", |fake| fake.control().contains(&resized)).await;
    terminal.master.write_all(b"\x04").unwrap();
    let status = tokio::time::timeout(PATIENCE, child.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(3));
    assert_eq!(format!("{:?}", tcgetattr(&slave).unwrap()), before, "the terminal is as it was");
}

#[tokio::test]
async fn console_detaches() {
    let fake = Fake::start().await;
    let (mut terminal, slave) = Terminal::new();
    let before = format!("{:?}", tcgetattr(&slave).unwrap());
    let mut child = fake
        .karst(&["console", "c1"])
        .stdin(Stdio::from(slave.try_clone().unwrap()))
        .stdout(Stdio::from(slave.try_clone().unwrap()))
        .spawn()
        .unwrap();
    terminal.shows("ready> ").await;
    terminal.master.write_all(b"ls\x01q").unwrap();
    let status = tokio::time::timeout(PATIENCE, child.wait()).await.expect("it detaches").unwrap();
    assert_eq!(status.code(), Some(0));
    fake.until("typing", |fake| fake.typed() == b"ls").await;
    assert_eq!(format!("{:?}", tcgetattr(&slave).unwrap()), before, "the terminal is as it was");
}

#[tokio::test]
async fn progress_is_shown_on_a_terminal() {
    let fake = Fake::start().await;
    let (terminal, slave) = Terminal::new();
    terminal.resize(100, 30);
    let child = fake.karst(&["launch", "progress", "c2"]).stderr(Stdio::from(slave)).spawn().unwrap();
    terminal.shows("launching c2: Unpack: 34% (1.20GB/s)").await;
    // Lets the operation end.
    fake.run(&["query", "/1.0/instances?progress-seen"]).await;
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await.unwrap().unwrap();
    assert!(output.status.success() && output.stdout.is_empty());
}

#[tokio::test]
async fn progress_is_not_shown_elsewhere() {
    let fake = Fake::start().await;
    let child = fake.karst(&["launch", "slow", "c2"]).spawn().unwrap();
    fake.until("the wait", |fake| fake.requests().iter().any(|request| request.contains("/wait"))).await;
    fake.run(&["operation", "cancel", "00000000-0000-4000-8000-000000000001"]).await;
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await.unwrap().unwrap();
    let (out, err, code) = texts(&output);
    assert_eq!((out.as_str(), err.as_str(), code), ("", "karst: cancelled\n", 130));
    assert!(
        !fake.requests().iter().any(|request| request.contains("/1.0/events")),
        "nobody would see the figures"
    );
}
