//! The API by the real programs `incus` 6 and `lxc` 5. Where one is not installed its tests say so and are skipped.
#![allow(clippy::disallowed_methods)] // a test

use crate::common::{PATIENCE, Server};
use serde_json::json;
use std::{
    path::{Path, PathBuf},
    process::Stdio,
};
use tokio::{io::AsyncWriteExt, process::Command};

/// A client program with a home of its own.
struct Client<'a> {
    program: PathBuf,
    server: &'a Server,
}

struct Output {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let found = std::env::split_paths(&path).map(|d| d.join(program)).find(|p| p.is_file());
    if found.is_none() {
        crate::backends::missing(&format!("{program} is not installed"));
    }
    found
}

impl Client<'_> {
    async fn run_with(&self, input: &str, args: &[&str]) -> Output {
        let home = self.server.dir.path().join("home");
        std::fs::create_dir_all(&home).unwrap();
        let mut child = Command::new(&self.program)
            .args(args)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", &home)
            .env("INCUS_SOCKET", &self.server.socket)
            .env("INCUS_CONF", home.join("incus"))
            .env("LXD_SOCKET", &self.server.socket)
            .env("LXD_CONF", home.join("lxc"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(input.as_bytes()).await.unwrap();
        drop(stdin);
        let output = tokio::time::timeout(PATIENCE, child.wait_with_output())
            .await
            .unwrap_or_else(|_| panic!("{args:?} does not end"))
            .unwrap();
        Output {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Runs, and it must end well.
    async fn ok(&self, args: &[&str]) -> String {
        let o = self.run_with("", args).await;
        assert_eq!(o.code, Some(0), "{args:?}: {}{}", o.stdout, o.stderr);
        o.stdout
    }

    /// Runs, and it must fail with this text.
    async fn fails(&self, args: &[&str], part: &str) {
        let o = self.run_with("", args).await;
        assert!(
            o.code != Some(0) && o.stderr.contains(part),
            "{args:?}: {:?} {}{}",
            o.code,
            o.stdout,
            o.stderr
        );
    }
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn incus_lives_a_day() {
    let Some(program) = find("incus") else { return };
    let s = Server::start().await;
    let c = Client { program, server: &s };
    c.ok(&["version"]).await;
    c.ok(&["info"]).await;
    c.ok(&["init", "--empty", "c0", "-c", "limits.memory=64MiB", "-c", "user.x=y"]).await;
    let image = s.dir.path().join("image.tar.gz");
    std::fs::write(&image, "a unified image").unwrap();
    c.ok(&["image", "import", image.to_str().unwrap(), "--alias", "deb", "distro=x"]).await;
    assert!(c.ok(&["image", "list", "-f", "csv"]).await.contains("deb"));
    assert!(c.ok(&["image", "info", "deb"]).await.contains("distro: x"));
    c.ok(&["image", "set-property", "deb", "os", "Mine"]).await;
    c.ok(&["image", "alias", "rename", "deb", "debian/12"]).await;
    let exported = s.dir.path().join("exported");
    c.ok(&["image", "export", "debian/12", exported.to_str().unwrap()]).await;
    c.ok(&["launch", "debian/12", "c1"]).await;
    let list = c.ok(&["list", "-f", "csv", "-c", "nst"]).await;
    assert_eq!(list, "c0,STOPPED,CONTAINER\nc1,RUNNING,CONTAINER\n");
    c.ok(&["list"]).await;
    c.ok(&["list", "--fast"]).await;
    c.ok(&["list", "-f", "json", "--all-projects"]).await;
    assert_eq!(c.ok(&["list", "-f", "csv", "-c", "n", "status=running"]).await, "c1\n");
    assert!(
        c.ok(&["list", "-f", "csv", "-c", "n,volatile.eth0.hwaddr,devices:root.pool"])
            .await
            .contains("default")
    );
    assert!(c.ok(&["info", "c1"]).await.contains("RUNNING"));
    assert_eq!(c.ok(&["exec", "c1", "--", "hostname"]).await, "c1\n");
    let o = c
        .run_with(
            "through\n",
            &["exec", "c1", "--env", "A=b", "--", "sh", "-c", "cat; printenv A; echo err >&2; exit 7"],
        )
        .await;
    assert_eq!((o.code, &*o.stdout, &*o.stderr), (Some(7), "through\nb\n", "err\n"));
    let o = c.run_with("", &["exec", "-t", "c1", "--", "sh", "-c", "echo on a terminal; exit 3"]).await;
    assert!(o.code == Some(3) && o.stdout.contains("on a terminal"), "{:?} {}", o.code, o.stdout);
    c.fails(&["exec", "c0", "--", "true"], "c0").await;
    assert!(c.ok(&["console", "c1", "--show-log"]).await.is_ascii());
    c.ok(&["config", "set", "c1", "limits.memory", "128MiB"]).await;
    assert_eq!(c.ok(&["config", "get", "c1", "limits.memory"]).await, "128MiB\n");
    c.fails(&["config", "set", "c1", "limits.memry", "1"], "limits.memory").await;
    c.ok(&["config", "unset", "c1", "limits.memory"]).await;
    assert!(c.ok(&["config", "show", "c1", "-e"]).await.contains("type: nic"));
    let shown = c.ok(&["config", "show", "c0"]).await.replace("description: \"\"", "description: edited");
    let o = c.run_with(&shown, &["config", "edit", "c0"]).await;
    assert_eq!(o.code, Some(0), "{}", o.stderr);
    assert!(c.ok(&["config", "show", "c0"]).await.contains("edited"));
    c.ok(&["config", "device", "override", "c0", "root", "size=2GiB"]).await;
    assert_eq!(c.ok(&["config", "device", "get", "c0", "root", "size"]).await, "2GiB\n");
    let state = c.ok(&["query", "/1.0/storage-pools/default/volumes/container/c0/state"]).await;
    assert!(state.contains("2147483648"), "its root has it: {state}");
    for action in [&["pause"][..], &["resume"], &["restart", "-f"], &["stop", "-f"], &["start"], &["stop"]] {
        let args: Vec<&str> = action.iter().copied().chain(["c1"]).collect();
        c.ok(&args).await;
    }
    c.fails(&["stop", "c1"], "already stopped").await;
    c.ok(&["start", "c1"]).await;
    c.fails(&["delete", "c1"], "running").await;
    c.ok(&["rename", "c0", "c2"]).await;
    c.ok(&["move", "c2", "c3"]).await;
    c.fails(&["init", "--empty", "c1"], "c1").await;
    c.fails(&["init", "--empty", "bad_na/me"], "'/'").await;
    c.fails(&["init", "nope", "c9"], "not found").await;
    c.fails(&["init", "debian/12", "c9", "-p", "nope"], "nope").await;
    c.fails(&["init", "debian/12", "c9", "-s", "nope"], "nope").await;
    c.fails(&["init", "debian/12", "c9", "-n", "nope"], "nope").await;
    c.ok(&["delete", "-f", "c1", "c3"]).await;
    assert_eq!(c.ok(&["list", "-f", "csv"]).await, "");
    c.ok(&["image", "delete", "debian/12"]).await;
    c.fails(&["image", "delete", "debian/12"], "not found").await;
    c.ok(&["operation", "list"]).await;
    c.ok(&["warning", "list"]).await;
    assert!(c.ok(&["query", "/1.0/instances"]).await.contains("[]"));
    c.ok(&[
        "query",
        "--wait",
        "-X",
        "POST",
        "-d",
        "{\"name\":\"q1\",\"source\":{\"type\":\"none\"}}",
        "/1.0/instances",
    ])
    .await;
    c.fails(&["cluster", "list"], "cluster").await;
    c.ok(&["snapshot", "create", "q1", "s1"]).await;
    assert!(c.ok(&["snapshot", "list", "q1", "--format", "csv"]).await.starts_with("s1,"));
    c.fails(&["snapshot", "create", "q1", "s1"], "s1").await;
    c.ok(&["snapshot", "delete", "q1", "s1"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn incus_administers() {
    let Some(program) = find("incus") else { return };
    let s = Server::start().await;
    let c = Client { program, server: &s };
    c.ok(&["network", "list"]).await;
    c.ok(&["network", "create", "n1", "ipv4.address=10.221.9.1/24", "ipv6.address=none"]).await;
    c.fails(&["network", "create", "n2", "ipv4.addres=10.1.1.1/24"], "ipv4.address").await;
    c.ok(&["network", "set", "n1", "user.a", "b"]).await;
    assert_eq!(c.ok(&["network", "get", "n1", "user.a"]).await, "b\n");
    c.ok(&["network", "unset", "n1", "user.a"]).await;
    c.ok(&["network", "show", "n1"]).await;
    assert!(c.ok(&["network", "info", "n1"]).await.contains("10.221.9.1"));
    c.ok(&["network", "list-leases", "n1"]).await;
    c.ok(&["network", "delete", "n1"]).await;
    c.ok(&["storage", "list"]).await;
    c.ok(&["storage", "show", "default"]).await;
    assert!(c.ok(&["storage", "info", "default"]).await.contains("driver: dir"));
    c.ok(&["storage", "volume", "list", "default"]).await;
    c.ok(&["storage", "create", "p2", "dir"]).await;
    c.ok(&["storage", "delete", "p2"]).await;
    c.ok(&["profile", "create", "p1"]).await;
    c.ok(&["profile", "set", "p1", "limits.cpu", "1"]).await;
    c.ok(&["profile", "device", "add", "p1", "data", "none"]).await;
    c.ok(&["profile", "copy", "p1", "p3"]).await;
    c.ok(&["profile", "rename", "p1", "p2"]).await;
    c.ok(&["init", "--empty", "c1"]).await;
    c.ok(&["profile", "add", "c1", "p2"]).await;
    c.fails(&["profile", "delete", "p2"], "p2").await;
    c.ok(&["profile", "assign", "c1", "default"]).await;
    c.ok(&["profile", "delete", "p2"]).await;
    c.ok(&["profile", "list", "--all-projects"]).await;
    c.ok(&["project", "create", "pr1"]).await;
    c.ok(&["project", "list"]).await;
    c.ok(&["project", "info", "pr1"]).await;
    c.ok(&["project", "rename", "pr1", "pr2"]).await;
    assert_eq!(c.ok(&["list", "--project", "pr2", "-f", "csv"]).await, "");
    c.ok(&["project", "delete", "pr2"]).await;
    c.ok(&["config", "show"]).await;
    c.ok(&["config", "trust", "list"]).await;
    assert!(c.ok(&["info", "--resources"]).await.contains("Total: 64.00GiB"));
    let allocations = c.ok(&["network", "list-allocations", "--format", "csv"]).await;
    assert!(allocations.contains("/1.0/networks/"), "{allocations}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_over_sftp() {
    let Some(program) = find("incus") else { return };
    let s = Server::start().await;
    let c = Client { program, server: &s };
    s.container("c1", true).await;
    let dir = s.dir.path();
    let (f1, tree, back) = (dir.join("f1"), dir.join("tree"), dir.join("back"));
    // More than one packet of the protocol.
    let content = "0123456789abcdef".repeat(20_000);
    std::fs::write(&f1, &content).unwrap();
    std::fs::create_dir_all(tree.join("sub")).unwrap();
    std::fs::write(tree.join("a"), "in a\n").unwrap();
    std::fs::write(tree.join("sub/b"), "in b\n").unwrap();
    std::os::unix::fs::symlink("a", tree.join("link")).unwrap();
    c.ok(&["file", "push", f1.to_str().unwrap(), "c1/root/f1", "--mode", "0640", "--uid", "5", "--gid", "6"])
        .await;
    let info = s.get("/1.0/instances/c1/files?path=/root/f1").await;
    assert_eq!(
        (info.header("x-incus-uid"), info.header("x-incus-gid"), info.header("x-incus-mode")),
        ("5", "6", "0640")
    );
    assert!(info.body == content.as_bytes());
    c.ok(&["file", "pull", "c1/root/f1", back.to_str().unwrap()]).await;
    assert!(text(&back) == content);
    assert!(c.ok(&["file", "pull", "c1/root/f1", "-"]).await == content);
    c.ok(&["file", "push", "-p", f1.to_str().unwrap(), "c1/root/x/y/f1"]).await;
    c.ok(&["file", "push", "-r", tree.to_str().unwrap(), "c1/root/"]).await;
    let link = s.get("/1.0/instances/c1/files?path=/root/tree/link").await;
    assert_eq!((link.header("x-incus-type"), &link.body[..]), ("symlink", &b"a"[..]));
    assert_eq!(&s.get("/1.0/instances/c1/files?path=/root/tree/sub/b").await.body[..], b"in b\n");
    let out = dir.join("out");
    std::fs::create_dir(&out).unwrap();
    c.ok(&["file", "pull", "-r", "c1/root/tree/sub", out.to_str().unwrap()]).await;
    assert_eq!(text(&out.join("sub/b")), "in b\n");
    c.ok(&["file", "create", "c1/root/new"]).await;
    c.ok(&["file", "create", "--type", "directory", "c1/root/newd"]).await;
    c.ok(&["file", "create", "--type", "symlink", "c1/root/newl", "/etc/passwd"]).await;
    c.ok(&["file", "delete", "c1/root/new"]).await;
    c.fails(&["file", "delete", "c1/root/new"], "not exist").await;
    c.fails(&["file", "pull", "c1/root/nope", back.to_str().unwrap()], "not exist").await;
    c.fails(&["file", "pull", "nope/root/f1", back.to_str().unwrap()], "nope").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lxc_lives_a_day() {
    let Some(program) = find("lxc") else { return };
    let s = Server::start().await;
    let c = Client { program, server: &s };
    c.ok(&["version"]).await;
    c.ok(&["info"]).await;
    let image = s.dir.path().join("meta.tar");
    let root = s.dir.path().join("root.tar");
    // The client looks whether they are archives.
    let mut tar = vec![0; 1024];
    tar[257..262].copy_from_slice(b"ustar");
    std::fs::write(&image, &tar).unwrap();
    std::fs::write(&root, [tar, vec![0; 512]].concat()).unwrap();
    c.ok(&["image", "import", image.to_str().unwrap(), root.to_str().unwrap(), "--alias", "split"]).await;
    c.ok(&["image", "list"]).await;
    c.ok(&["launch", "split", "l1"]).await;
    assert_eq!(c.ok(&["list", "-f", "csv", "-c", "ns"]).await, "l1,RUNNING\n");
    c.ok(&["list"]).await;
    c.ok(&["list", "--all-projects"]).await;
    c.ok(&["info", "l1"]).await;
    let o = c.run_with("", &["exec", "l1", "--", "sh", "-c", "echo x; exit 7"]).await;
    assert_eq!((o.code, &*o.stdout), (Some(7), "x\n"), "{}", o.stderr);
    let dir = s.dir.path();
    let (f1, tree, back) = (dir.join("f1"), dir.join("tree"), dir.join("back"));
    std::fs::write(&f1, "hello\n").unwrap();
    std::fs::create_dir_all(tree.join("sub")).unwrap();
    std::fs::write(tree.join("sub/b"), "in b\n").unwrap();
    std::os::unix::fs::symlink("sub", tree.join("link")).unwrap();
    c.ok(&["file", "push", f1.to_str().unwrap(), "l1/root/f1"]).await;
    c.ok(&["file", "pull", "l1/root/f1", back.to_str().unwrap()]).await;
    assert_eq!(text(&back), "hello\n");
    c.ok(&["file", "push", "-r", tree.to_str().unwrap(), "l1/root/"]).await;
    let out = dir.join("out");
    std::fs::create_dir(&out).unwrap();
    c.ok(&["file", "pull", "-r", "l1/root/tree", out.to_str().unwrap()]).await;
    assert_eq!(text(&out.join("tree/sub/b")), "in b\n");
    c.ok(&["file", "delete", "l1/root/f1"]).await;
    c.ok(&["config", "set", "l1", "user.a", "b"]).await;
    c.ok(&["config", "show", "l1"]).await;
    c.ok(&["console", "l1", "--show-log"]).await;
    c.ok(&["pause", "l1"]).await;
    c.ok(&["start", "l1"]).await;
    c.ok(&["stop", "-f", "l1"]).await;
    c.ok(&["rename", "l1", "l2"]).await;
    c.ok(&["delete", "l2"]).await;
    c.ok(&["image", "delete", "split"]).await;
    for list in ["network", "storage", "profile", "project", "operation", "warning"] {
        c.ok(&[list, "list"]).await;
    }
    c.ok(&["storage", "volume", "list", "default"]).await;
    c.ok(&["query", "/1.0/instances"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn incus_monitors() {
    let Some(program) = find("incus") else { return };
    let s = Server::start().await;
    let client = Client { program, server: &s };
    let mut monitor = Command::new(&client.program)
        .args(["monitor", "--type", "lifecycle", "-f", "json"])
        .env("INCUS_SOCKET", &s.socket)
        .env("INCUS_CONF", s.dir.path())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines =
        tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(monitor.stdout.take().unwrap()));
    // Until the listener is there nothing is told to it: make something happen until it is heard.
    let heard = async {
        for n in 0.. {
            client.ok(&["profile", "create", &format!("p{n}")]).await;
            if let Ok(Ok(Some(line))) =
                tokio::time::timeout(std::time::Duration::from_millis(500), lines.next_line()).await
            {
                return line;
            }
        }
        String::new()
    };
    let line = tokio::time::timeout(PATIENCE, heard).await.expect("an event in time");
    assert!(line.contains("profile-created") && line.contains("\"username\":\"root\""), "{line}");
}

/// `incus info --show-log` reads the log of what runs the guest, by a name of its own for each kind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_programs_print_is_kept() {
    let s = Server::start().await;
    s.container("c1", true).await;
    let all = "/1.0/instances/c1/logs/exec-output";
    assert_eq!(s.get(all).await.metadata(), json!([]));
    let run = |command: serde_json::Value, more: serde_json::Value| {
        let mut body = json!({"command": command, "record-output": true, "wait-for-websocket": false});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let ran = s
        .post("/1.0/instances/c1/exec", run(json!(["sh", "-c", "echo out; echo err >&2; exit 7"]), json!({})))
        .await;
    let metadata = s.done(ran).await["metadata"].clone();
    assert_eq!(metadata["return"], 7);
    let (out, err) = (metadata["output"]["1"].as_str().unwrap(), metadata["output"]["2"].as_str().unwrap());
    assert!(out.starts_with(&format!("{all}/exec_")) && out.ends_with(".stdout"), "{metadata}");
    assert_eq!(&s.get(out).await.body[..], b"out\n");
    assert_eq!(&s.get(err).await.body[..], b"err\n");
    let listed = s.get(all).await.metadata();
    assert!([out, err].iter().all(|p| listed.as_array().unwrap().contains(&json!(p))), "{listed}");
    s.delete(out).await.metadata();
    s.delete(out).await.refused(404);
    s.get(out).await.refused(404);
    assert_eq!(s.get(all).await.metadata(), json!([err]));
    // With websockets the client has it; a terminal has one stream for both.
    s.post("/1.0/instances/c1/exec", run(json!(["true"]), json!({"interactive": true}))).await.refused(400);
    for wrong in ["exec_x.stdout", "..%2Fguest.json", "lxc.log"] {
        s.get(&format!("{all}/{wrong}")).await.refused(404);
    }
    s.get("/1.0/instances/nope/logs/exec-output").await.refused(404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_have_logs() {
    let s = Server::start().await;
    s.container("c1", false).await;
    assert_eq!(s.get("/1.0/instances/c1/logs").await.metadata(), json!([]), "it never ran");
    s.container("c2", true).await;
    let vm = json!({"name": "v1", "type": "virtual-machine", "source": {"type": "none"}, "start": true});
    s.done(s.post("/1.0/instances", vm).await).await;
    for (name, log) in [("c2", "lxc.log"), ("v1", "qemu.log")] {
        let path = format!("/1.0/instances/{name}/logs/{log}");
        assert_eq!(s.get(&format!("/1.0/instances/{name}/logs")).await.metadata(), json!([path]));
        let text = s.get(&path).await;
        assert_eq!((text.status, &text.body[..]), (200, b"simulated: started\n".as_slice()));
        s.delete(&path).await.metadata();
        assert!(s.get(&path).await.body.is_empty());
    }
    for wrong in ["c2/logs/qemu.log", "c2/logs/..%2Fguest.json", "nope/logs/lxc.log"] {
        s.get(&format!("/1.0/instances/{wrong}")).await.refused(404);
    }
    s.get("/1.0/instances/nope/logs").await.refused(404);
}
