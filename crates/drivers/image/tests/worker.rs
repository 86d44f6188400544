//! The room that foreign data is worked on in, probed from inside with real programs.
#![allow(clippy::disallowed_methods)] // drivers and their tests are the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod common;

use karst_host::{
    Program,
    sandbox::{Limits, Sandbox},
};
use karst_model::ErrorKind;
use std::{os::unix::fs::MetadataExt, time::Duration};

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_has_no_network_and_sees_only_what_it_is_granted() {
    if common::skip_without_root_and(&["ip", "mksquashfs", "qemu-img"]) {
        return;
    }
    let l = common::launcher();
    let ended = Sandbox::new(&l).exec(Program::Ip, &["link"]).await.unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(ended.code != 0 && said.contains("Operation not permitted"), "sockets are refused: {said}");

    let d = tempfile::tempdir().unwrap();
    for secret in ["/etc/shadow", "/proc/1/environ", d.path().to_str().unwrap()] {
        let ended = Sandbox::new(&l).exec(Program::QemuImg, &["info", "-f", "raw", secret]).await.unwrap();
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(ended.code != 0 && said.contains("No such file"), "{secret}: {said}");
    }

    // Written as id 0 inside, 0 on disk, through a directory that the worker's host ids may not even enter.
    let out = d.path().join("out");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("in"), "x").unwrap();
    let grant = || karst_host::fs::open_dir(&out).unwrap();
    let create = ["create", "-q", "-f", "qcow2", "/out/new", "1M"];
    Sandbox::new(&l)
        .writable("out", grant())
        .exec(Program::QemuImg, &create)
        .await
        .unwrap()
        .ok("create")
        .unwrap();
    assert_eq!(std::fs::metadata(out.join("new")).unwrap().uid(), 0);
    std::fs::remove_file(out.join("new")).unwrap();
    let ended = Sandbox::new(&l).readable("out", grant()).exec(Program::QemuImg, &create).await.unwrap();
    assert!(ended.code != 0 && !out.join("new").exists(), "granted for reading only");
    let elsewhere = ["create", "-q", "-f", "qcow2", "/new", "1M"];
    let ended = Sandbox::new(&l).writable("out", grant()).exec(Program::QemuImg, &elsewhere).await.unwrap();
    assert!(ended.code != 0, "its root is read-only");
}

/// Processes whose command line names `mark`.
fn processes(mark: &str) -> usize {
    let dirs = std::fs::read_dir("/proc").unwrap().flatten();
    dirs.filter(|d| {
        std::fs::read(d.path().join("cmdline")).is_ok_and(|c| String::from_utf8_lossy(&c).contains(mark))
    })
    .count()
}

async fn gone(mark: &str) {
    for _ in 0..6000 {
        if processes(mark) == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("a worker outlives its task");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_ends_with_its_task_and_at_its_time() {
    if common::skip_without_root_and(&["ip"]) {
        return;
    }
    let l = common::launcher();
    let out = tempfile::tempdir().unwrap();
    let grant = || std::os::fd::OwnedFd::from(std::fs::File::open(out.path()).unwrap());
    // Inside, standard input never ends: the worker waits for its archive.
    let (read, _write) = std::io::pipe().unwrap();
    let mark = format!("karst-test-{}", std::process::id());
    let task =
        serde_json::json!({"part": "Root", "bounds": {"bytes": 1, "entries": 1, "ratio": 1}, "field": mark});
    let limits = Limits { timeout: Duration::from_millis(300), ..Limits::default() };
    let late = Sandbox::new(&l)
        .limits(limits)
        .writable("out", grant())
        .stdin(read.try_clone().unwrap().into())
        .call("unpack", task.clone());
    let running = tokio::spawn(late);
    for _ in 0..500 {
        if processes(&mark) > 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(running.await.unwrap().unwrap_err().is(ErrorKind::Timeout));
    gone(&mark).await;
    let dropped = Sandbox::new(&l).writable("out", grant()).stdin(read.into()).call("unpack", task);
    assert!(tokio::time::timeout(Duration::from_millis(300), dropped).await.is_err());
    gone(&mark).await;
    // The contained form too: what it started ends with it.
    let mark = format!("{}", 100_000_000 + std::process::id());
    let args = ["-rcvbuf", &mark, "monitor"];
    let contained = Sandbox::new(&l).contained(Program::Ip, &args, std::path::Path::new("/"), &[]);
    assert!(tokio::time::timeout(Duration::from_millis(300), contained).await.is_err());
    gone(&mark).await;
}
