//! The API by plain HTTP and websockets. Tests named in the table of paths and in the list of extensions stand here.
#![allow(clippy::disallowed_methods)] // a test

use crate::common::{Answer, Server, expect, next, say, stream_of};
use hyper::Method;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_describes_itself() {
    let s = Server::start().await;
    assert_eq!(s.get("/").await.metadata(), json!(["/1.0"]));
    let server = s.get("/1.0").await.metadata();
    assert_eq!(server["auth"], "trusted");
    assert_eq!(server["auth_user_method"], "unix");
    assert_eq!(server["environment"]["server_clustered"], false);
    assert_eq!(server["environment"]["storage_supported_drivers"][0]["Name"], "dir");
    assert!(server["api_extensions"].as_array().unwrap().contains(&json!("instances")));
    assert!(s.get("/1.0/resources").await.metadata()["memory"]["total"].is_number());
    assert!(s.get("/1.0/warnings?recursion=1").await.metadata().is_array());
    let keys = s.get("/1.0/metadata/configuration").await.metadata();
    assert!(keys["configs"]["instance"]["limits"]["keys"].to_string().contains("limits.memory"));
    assert_eq!(s.get("/1.0/certificates").await.metadata(), json!([]));
    assert_eq!(s.get("/1.0/cluster").await.metadata()["enabled"], false);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_there_says_so() {
    let s = Server::start().await;
    assert!(s.get("/1.0/nonsense").await.refused(404).contains("no such path"));
    assert!(s.get("/2.0").await.refused(404).contains("no such path"));
    assert!(s.get("/1.0/instances/%2e%2e").await.refused(400).contains("path"));
    let answer = s.send(Method::DELETE, "/1.0", &[], "").await;
    assert!(answer.header("allow").contains("GET"));
    answer.refused(405);
    assert!(s.get("/1.0/instances/c1/nbd").await.refused(501).contains("backups"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_is_launched_in_one_operation() {
    let s = Server::start().await;
    let number = if cfg!(target_arch = "aarch64") { "4" } else { "2" };
    let body = json!({"architecture": number, "config": {"limits.memory": "64MiB"}, "devices": {}, "ephemeral": false,
        "profiles": null, "stateful": false, "description": "", "name": "c1", "source": {"type": "none", "certificate": "",
        "allow_inconsistent": false}, "instance_type": "", "type": "container", "start": true});
    let answer = s.post("/1.0/instances", body.clone()).await;
    assert_eq!(answer.json()["metadata"]["resources"]["instances"][0], "/1.0/instances/c1");
    s.done(answer).await;
    let c1 = s.get("/1.0/instances/c1").await.metadata();
    assert_eq!((c1["status"].as_str(), c1["status_code"].as_u64()), (Some("Running"), Some(103)));
    assert_eq!(c1["config"]["limits.memory"], "64MiB");
    assert!(c1["expanded_devices"]["root"]["pool"].is_string());
    assert!(c1["config"]["volatile.eth0.hwaddr"].is_string());
    let mut vm = body.clone();
    vm["name"] = json!("v1");
    vm["type"] = json!("virtual-machine");
    s.done(s.post("/1.0/instances", vm).await).await;
    assert_eq!(s.get("/1.0/instances/v1").await.metadata()["type"], "virtual-machine");
    // Each refusal names its field, and nothing is made.
    for (change, status, part) in [
        (json!({"name": "c1"}), 409, "c1"),
        (json!({"name": "bad/name"}), 400, "'/'"),
        (json!({"config": {"limits.memry": "1"}}), 400, "limits.memory"),
        (json!({"config": {"limits.memory": "lots"}}), 400, "limits.memory"),
        (json!({"profiles": ["nope"]}), 404, "nope"),
        (json!({"source": {"type": "image", "fingerprint": "aabbccddeeff"}}), 404, "aabbccddeeff"),
        (json!({"source": {"type": "image", "alias": "x", "project": "nope"}}), 404, "source.project"),
        (json!({"architecture": "armv7l"}), 400, "architecture"),
        (json!({"architecture": "nonsense"}), 400, "architecture"),
        (json!({"architecture": "3"}), 400, "architecture"),
        (json!({"source": {"type": "iso"}}), 400, "source.type"),
        (json!({"source": null}), 400, "source"),
        (json!({"type": "jail"}), 400, "type"),
        (json!({"devices": {"root": {"type": "disk", "path": "/", "pool": "nope"}}}), 404, "nope"),
        (json!({"devices": {"eth0": {"type": "nic", "network": "nope"}}}), 404, "nope"),
        (json!({"descripton": "x"}), 400, "description"),
        (json!({"config": []}), 400, "config"),
    ] {
        let mut wrong = body.clone();
        wrong["name"] = json!("c9");
        wrong.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let error = s.post("/1.0/instances", wrong).await.refused(status);
        assert!(error.contains(part), "{change}: {error}");
    }
    assert_eq!(s.get("/1.0/instances").await.metadata(), json!(["/1.0/instances/c1", "/1.0/instances/v1"]));
    for malformed in ["", "{", "[1]", "nonsense", "{\"name\": \"x\"} trailing"] {
        s.send(Method::POST, "/1.0/instances", &[], malformed).await.refused(400);
    }
    let huge = format!("{{\"description\": \"{}\"}}", "x".repeat(2 << 20));
    assert!(s.send(Method::POST, "/1.0/instances", &[], huge).await.refused(413).contains("KiB"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_filter_and_recurse() {
    let s = Server::start().await;
    s.container("c1", true).await;
    s.container("c2", false).await;
    let short = s.get("/1.0/instances").await.metadata();
    assert_eq!(short, json!(["/1.0/instances/c1", "/1.0/instances/c2"]));
    let long = s.get("/1.0/instances?recursion=1&filter=").await.metadata();
    assert_eq!(long.as_array().unwrap().len(), 2);
    assert!(long[0].get("state").is_none());
    let full = s.get("/1.0/instances?recursion=2").await.metadata();
    assert_eq!(full[0]["state"]["status"], "Running");
    assert!(full[0]["state"]["pid"].as_i64().unwrap() > 0);
    assert!(full[0]["state"]["memory"]["total"].is_number());
    assert_eq!(full[1]["state"]["status"], "Stopped");
    assert!(full[1]["snapshots"].is_null() && full[1]["backups"].is_null());
    let none = s.get("/1.0/instances?recursion=2;fields=").await.metadata();
    assert_eq!(
        (&none[0]["state"]["status"], &none[0]["state"]["network"]),
        (&json!("Running"), &json!(null))
    );
    let network = s.get("/1.0/instances?recursion=2;fields=state.disk,state.network").await.metadata();
    assert!(network[0]["state"]["network"].is_object());
    assert!(
        s.get("/1.0/instances?recursion=2;fields=state.cpu").await.refused(400).contains("state.network")
    );
    // A NIC by the name of its network is what the default profile has.
    assert!(long[0]["expanded_devices"].as_object().unwrap().values().any(|d| d.get("network").is_some()));
    let running = s.get("/1.0/instances?recursion=2&filter=status+eq+running").await.metadata();
    assert_eq!((running.as_array().unwrap().len(), running[0]["name"].as_str()), (1, Some("c1")));
    let filtered = s.get("/1.0/instances?filter=name+eq+c2").await.metadata();
    assert_eq!(filtered, json!(["/1.0/instances/c2"]));
    assert!(s.get("/1.0/instances?filter=name+is+c2").await.refused(400).contains("filter"));
    assert_eq!(s.get("/1.0/instances?all-projects=true").await.metadata().as_array().unwrap().len(), 2);
    assert!(s.get("/1.0/instances?project=nope").await.refused(404).contains("nope"));
    let one = s.get("/1.0/instances/c1?recursion=1").await.metadata();
    assert_eq!(one["state"]["status"], "Running");
    let state = s.get("/1.0/instances/c1/state").await.metadata();
    assert_eq!(state["pid"], one["state"]["pid"]);
    s.get("/1.0/instances/nope").await.refused(404);
    // What changed is seen at once, although lists are kept rendered.
    s.done(s.put("/1.0/instances/c1/state", json!({"action": "stop", "force": true, "timeout": -1})).await)
        .await;
    assert_eq!(s.get("/1.0/instances?recursion=1").await.metadata()[0]["status"], "Stopped");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_come_in_pages() {
    let s = Server::start().await;
    for name in ["c3", "c1", "c5", "c2", "c4"] {
        s.container(name, false).await;
    }
    let names = |a: &Answer| -> Vec<String> {
        let all = a.metadata();
        all.as_array().unwrap().iter().map(|i| i["name"].as_str().unwrap().to_owned()).collect()
    };
    let next = |a: &Answer| {
        let link = a.header("link").strip_prefix('<')?.split_once('>')?;
        assert_eq!(link.1, "; rel=\"next\"");
        Some(link.0.to_owned())
    };
    // Page by page, while what stands at its end goes.
    let first = s.get("/1.0/instances?recursion=1&limit=2").await;
    assert_eq!(names(&first), ["c1", "c2"]);
    s.done(s.delete("/1.0/instances/c2").await).await;
    let second = s.get(&next(&first).unwrap()).await;
    assert_eq!(names(&second), ["c3", "c4"]);
    let third = s.get(&next(&second).unwrap()).await;
    assert_eq!((names(&third), next(&third)), (vec!["c5".to_owned()], None));
    // Paths, states and filters as in the whole list.
    let paths = s.get("/1.0/instances?limit=1&after=c3").await;
    assert_eq!(paths.metadata(), json!(["/1.0/instances/c4"]));
    assert_eq!(next(&paths).unwrap(), "/1.0/instances?limit=1&after=c4");
    let full = s.get("/1.0/instances?recursion=2&limit=1").await;
    assert_eq!(full.metadata()[0]["state"]["status"], "Stopped");
    let some = s.get("/1.0/instances?recursion=1&limit=1&filter=name+ne+c1").await;
    assert_eq!(names(&some), ["c3"]);
    let rest = s.get(&next(&some).unwrap()).await;
    assert_eq!(names(&rest), ["c4"]);
    let all = s.get("/1.0/instances?recursion=1&all-projects=true&limit=3").await;
    assert_eq!(next(&all).unwrap(), "/1.0/instances?recursion=1&all-projects=true&limit=3&after=default/c4");
    assert_eq!(names(&s.get(&next(&all).unwrap()).await), ["c5"]);
    for (query, word) in
        [("limit=0", "limit"), ("limit=2000", "1000"), ("limit=x", "limit"), ("after=a/b", "name")]
    {
        assert!(s.get(&format!("/1.0/instances?{query}")).await.refused(400).contains(word), "{query}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn presets_fill_in_devices() {
    let s = Server::start().await;
    let new = |preset: &str, kind: &str| {
        let config = json!({"hardware.preset": preset});
        json!({"name": "w1", "type": kind, "source": {"type": "none"}, "config": config})
    };
    assert!(
        s.post("/1.0/instances", new("windoze", "virtual-machine")).await.refused(400).contains("windows")
    );
    s.post("/1.0/instances", new("windows", "container")).await.refused(400);
    s.done(s.post("/1.0/instances", new("windows", "virtual-machine")).await).await;
    let w1 = s.get("/1.0/instances/w1").await.metadata();
    assert_eq!(w1["devices"], json!({}), "what was written stays as it is");
    let of = |kind: &str| -> Vec<Value> {
        let all = w1["expanded_devices"].as_object().unwrap();
        all.values().filter(|d| d["type"] == kind).cloned().collect()
    };
    assert_eq!(
        (of("disk")[0]["io.bus"].as_str(), of("nic")[0]["io.bus"].as_str()),
        (Some("sata"), Some("e1000e"))
    );
    assert_eq!(of("tpm").len(), 1);
    s.done(s.put("/1.0/instances/w1/state", json!({"action": "start", "timeout": -1})).await).await;
    // Once its drivers are there, it may go, and the devices are as they are without it.
    s.done(s.put("/1.0/instances/w1/state", json!({"action": "stop", "force": true, "timeout": -1})).await)
        .await;
    s.patch("/1.0/instances/w1", json!({"config": {"hardware.preset": ""}})).await.metadata();
    let w1 = s.get("/1.0/instances/w1").await.metadata();
    assert!(w1["expanded_devices"].as_object().unwrap().values().all(|d| d.get("io.bus").is_none()), "{w1}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn older_names_of_collections() {
    let s = Server::start().await;
    s.container("c1", false).await;
    assert_eq!(s.get("/1.0/containers").await.metadata(), json!(["/1.0/instances/c1"]));
    assert_eq!(s.get("/1.0/virtual-machines").await.metadata(), json!([]));
    assert_eq!(s.get("/1.0/containers/c1").await.metadata()["type"], "container");
    let new = json!({"name": "v1", "source": {"type": "none"}});
    s.done(s.post("/1.0/virtual-machines", new).await).await;
    assert_eq!(s.get("/1.0/instances/v1").await.metadata()["type"], "virtual-machine");
    s.get("/1.0/containers/nothing").await.refused(404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resources_are_the_hosts() {
    let s = Server::start().await;
    let r = s.get("/1.0/resources").await.metadata();
    let threads = r["cpu"]["sockets"][0]["cores"][0]["threads"].as_array().unwrap().len();
    assert_eq!(r["cpu"]["total"].as_u64().unwrap(), threads as u64);
    assert_eq!(r["cpu"]["architecture"], "x86_64");
    assert!(r["memory"]["total"].as_u64().unwrap() > 0 && r["load"]["Processes"].as_u64().unwrap() > 0);
    assert!(r["system"]["firmware"].is_null(), "a simulated host has none");
    assert_eq!(r["cpu"]["sockets"][0]["cores"][0]["die"], 0);
    assert!(r["system"]["type"].is_string());
    for (kind, list) in [("pci", "devices"), ("usb", "devices"), ("storage", "disks"), ("network", "cards")] {
        assert_eq!(r[kind]["total"].as_u64().unwrap(), r[kind][list].as_array().unwrap().len() as u64);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_changes_are_operations() {
    let s = Server::start().await;
    s.container("c1", false).await;
    let power = |action: &'static str| {
        s.put(
            "/1.0/instances/c1/state",
            json!({"action": action, "timeout": -1, "force": true, "stateful": false}),
        )
    };
    let status = async || s.get("/1.0/instances/c1").await.metadata()["status"].as_str().unwrap().to_owned();
    for (action, expected) in [
        ("start", "Running"),
        ("freeze", "Frozen"),
        ("unfreeze", "Running"),
        ("restart", "Running"),
        ("stop", "Stopped"),
    ] {
        let operation = s.done(power(action).await).await;
        assert_eq!(operation["class"], "task");
        assert!(!operation["description"].as_str().unwrap().is_empty());
        assert_eq!(status().await, expected, "{action}");
    }
    assert!(power("stop").await.refused(409).contains("already stopped"));
    assert!(power("strt").await.refused(400).contains("start"));
    s.put("/1.0/instances/c1/state", json!({"action": "start", "frce": true})).await.refused(400);
    s.done(s.put("/1.0/instances", json!({"state": {"action": "start"}})).await).await;
    assert_eq!(status().await, "Running");
    assert!(s.delete("/1.0/instances/c1").await.refused(400).contains("running"));
    assert!(s.get("/1.0/operations?all-projects=true&recursion=1").await.metadata().is_object());
    s.get("/1.0/operations/00000000-0000-0000-0000-000000000009").await.refused(404);
    s.get("/1.0/operations/nonsense").await.refused(404);
    s.done(power("stop").await).await;
    let answer = s.delete("/1.0/instances/c1").await;
    let path = answer.json()["operation"].as_str().unwrap().to_owned();
    s.done(answer).await;
    assert_eq!(s.get(&path).await.metadata()["status"], "Success");
    assert_eq!(s.get("/1.0/instances").await.metadata(), json!([]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_are_changed_under_their_etag() {
    let s = Server::start().await;
    s.container("c1", false).await;
    let got = s.get("/1.0/instances/c1").await;
    let tag = got.header("etag").to_owned();
    assert!(tag.starts_with('"') && tag.len() == 66);
    // As the client does it: the whole of what it got goes back.
    let mut body = got.metadata();
    body["config"]["limits.memory"] = json!("1GiB");
    body["description"] = json!("mine");
    let change = s.send(Method::PUT, "/1.0/instances/c1", &[("if-match", &tag)], body.to_string()).await;
    s.done(change).await;
    let now = s.get("/1.0/instances/c1").await;
    assert_ne!(now.header("etag"), tag);
    assert_eq!(now.metadata()["config"]["limits.memory"], "1GiB");
    assert_eq!(now.metadata()["description"], "mine");
    let late = s.send(Method::PUT, "/1.0/instances/c1", &[("if-match", &tag)], body.to_string()).await;
    assert!(late.refused(412).contains("ETag"));
    s.patch("/1.0/instances/c1", json!({"config": {"user.a": "b"}})).await.metadata();
    let patched = s.get("/1.0/instances/c1").await.metadata();
    assert_eq!(
        (patched["config"]["user.a"].as_str(), patched["config"]["limits.memory"].as_str()),
        (Some("b"), Some("1GiB"))
    );
    assert_eq!(patched["description"], "mine");
    assert!(
        s.put("/1.0/instances/c1", json!({"config": {"limits.cpus": "2"}}))
            .await
            .refused(400)
            .contains("limits.cpu")
    );
    let renamed = s
        .post("/1.0/instances/c1", json!({"name": "c2", "migration": false, "live": false, "Config": null}))
        .await;
    s.done(renamed).await;
    s.get("/1.0/instances/c1").await.refused(404);
    assert_eq!(s.get("/1.0/instances/c2").await.metadata()["name"], "c2");
    s.post("/1.0/instances/c2", json!({"name": "a/b"})).await.refused(400);
}

pub fn secrets(answer: &crate::common::Answer) -> (String, Value) {
    assert_eq!(answer.status, 202, "{}", String::from_utf8_lossy(&answer.body));
    let json = answer.json();
    (json["operation"].as_str().unwrap().to_owned(), json["metadata"]["metadata"]["fds"].clone())
}

pub fn at(operation: &str, secrets: &Value, name: &str) -> String {
    format!("{operation}/websocket?secret={}", secrets[name].as_str().unwrap())
}

pub fn command(words: &[&str]) -> Value {
    json!({"command": words, "wait-for-websocket": true, "interactive": false, "environment": {"TERM": "xterm"},
        "width": 0, "height": 0, "record-output": false, "user": 0, "group": 0, "cwd": ""})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exec_joins_three_pipes() {
    let s = Server::start().await;
    s.container("c1", true).await;
    let answer = s.post("/1.0/instances/c1/exec", command(&["sh", "-c", "cat; echo err >&2; exit 7"])).await;
    let (operation, fds) = secrets(&answer);
    assert_eq!(fds.as_object().unwrap().len(), 4);
    let control = s.websocket(&at(&operation, &fds, "control")).await;
    let mut stdin = s.websocket(&at(&operation, &fds, "0")).await;
    let mut stdout = s.websocket(&at(&operation, &fds, "1")).await;
    let mut stderr = s.websocket(&at(&operation, &fds, "2")).await;
    say(&mut stdin, Message::binary(&b"through the pipe\n"[..])).await;
    say(&mut stdin, Message::text("")).await;
    assert_eq!(stream_of(&mut stdout).await, "through the pipe\n");
    assert_eq!(stream_of(&mut stderr).await, "err\n");
    let ended = s.get(&format!("{operation}/wait?timeout=60")).await.metadata();
    assert_eq!((ended["status"].as_str(), ended["metadata"]["return"].as_i64()), (Some("Success"), Some(7)));
    assert!(ended["metadata"].get("fds").is_none(), "secrets stay out of records");
    drop(control);
    s.get(&format!("{operation}/websocket?secret=x")).await.refused(400);
    // Much output arrives whole.
    let answer = s.post("/1.0/instances/c1/exec", command(&["cat"])).await;
    let (operation, fds) = secrets(&answer);
    let mut stdin = s.websocket(&at(&operation, &fds, "0")).await;
    let mut stdout = s.websocket(&at(&operation, &fds, "1")).await;
    let _stderr = s.websocket(&at(&operation, &fds, "2")).await;
    let writer = tokio::spawn(async move {
        for _ in 0..64 {
            say(&mut stdin, Message::binary(vec![b'x'; 32 << 10])).await;
        }
        say(&mut stdin, Message::text("")).await;
        stdin
    });
    assert_eq!(stream_of(&mut stdout).await.len(), 64 * (32 << 10));
    writer.await.unwrap();
    // Without websockets it runs all the same.
    let mut alone = command(&["sh", "-c", "exit 3"]);
    alone["wait-for-websocket"] = json!(false);
    let ended = s.done(s.post("/1.0/instances/c1/exec", alone).await).await;
    assert_eq!(ended["metadata"]["return"], 3);
    // Refusals.
    s.post("/1.0/instances/c1/exec", command(&[])).await.refused(400);
    s.post("/1.0/instances/nope/exec", command(&["true"])).await.refused(404);
    let mut negative = command(&["true"]);
    negative["user"] = json!(-1);
    assert!(s.post("/1.0/instances/c1/exec", negative).await.refused(400).contains("user"));
    s.container("c2", false).await;
    s.post("/1.0/instances/c2/exec", command(&["true"])).await.refused(409);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_connects_late_hears_why_nothing_runs() {
    let s = Server::start().await;
    s.container("c1", true).await;
    let why = karst_model::Error::unavailable("the guest's agent has not answered yet");
    s.agent.inject("exec_start", karst_agent::simulated::Fault::FailBefore(why));
    let (operation, fds) = secrets(&s.post("/1.0/instances/c1/exec", command(&["true"])).await);
    let _first = s.websocket(&at(&operation, &fds, "0")).await;
    let ended = s.get(&format!("{operation}/wait?timeout=60")).await.metadata();
    assert_eq!(ended["status"], "Failure", "{ended}");
    let upgrade = [
        ("connection", "upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    let late = s.send(Method::GET, &at(&operation, &fds, "1"), &upgrade, "").await;
    assert!(late.refused(503).contains("has not answered yet"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exec_resizes_and_signals() {
    let s = Server::start().await;
    s.container("c1", true).await;
    let mut body = command(&["sh", "-c", "stty size; cat; exit 4"]);
    body["interactive"] = json!(true);
    body["width"] = json!(100);
    body["height"] = json!(30);
    let (operation, fds) = secrets(&s.post("/1.0/instances/c1/exec", body).await);
    assert_eq!(fds.as_object().unwrap().len(), 2);
    let mut control = s.websocket(&at(&operation, &fds, "control")).await;
    let mut terminal = s.websocket(&at(&operation, &fds, "0")).await;
    expect(&mut terminal, "30 100").await;
    say(
        &mut control,
        Message::text(r#"{"command":"window-resize","args":{"height":"40","width":"120"},"signal":0}"#),
    )
    .await;
    say(&mut terminal, Message::binary(&b"typed\n"[..])).await;
    expect(&mut terminal, "typed").await;
    say(&mut control, Message::text(r#"{"command":"signal","args":null,"signal":15}"#)).await;
    while matches!(next(&mut terminal).await, Some(Message::Binary(_))) {}
    let ended = s.get(&format!("{operation}/wait?timeout=60")).await.metadata();
    assert_eq!(ended["metadata"]["return"], 128 + 15);
    // A client that goes away takes its program with it.
    let (operation, fds) = secrets(&s.post("/1.0/instances/c1/exec", command(&["sleep", "infinity"])).await);
    let control = s.websocket(&at(&operation, &fds, "control")).await;
    let _streams = (
        s.websocket(&at(&operation, &fds, "0")).await,
        s.websocket(&at(&operation, &fds, "1")).await,
        s.websocket(&at(&operation, &fds, "2")).await,
    );
    drop(control);
    let ended = s.get(&format!("{operation}/wait?timeout=60")).await.metadata();
    assert_eq!(ended["status"], "Cancelled", "{ended}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exec_carries_user_group_and_directory() {
    let s = Server::start().await;
    s.container("c1", true).await;
    let mut body = command(&["sh", "-c", "id; id -g; pwd; printenv A"]);
    body["user"] = json!(1000);
    body["group"] = json!(1001);
    body["cwd"] = json!("/tmp");
    body["environment"] = json!({"A": "b"});
    let (operation, fds) = secrets(&s.post("/1.0/instances/c1/exec", body).await);
    let _stdin = s.websocket(&at(&operation, &fds, "0")).await;
    let mut stdout = s.websocket(&at(&operation, &fds, "1")).await;
    let _stderr = s.websocket(&at(&operation, &fds, "2")).await;
    assert_eq!(stream_of(&mut stdout).await, "1000\n1001\n/tmp\nb\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn machines_are_seen_and_operated() {
    let s = Server::start().await;
    s.container("c1", true).await;
    let body = json!({"name": "v1", "type": "virtual-machine", "source": {"type": "none"}, "start": true});
    s.done(s.post("/1.0/instances", body).await).await;
    for path in ["/1.0/karst/instances/v1/screenshot", "/1.0/instances/v1/console?type=vga"] {
        let picture = s.get(path).await;
        assert_eq!((picture.status, picture.header("content-type")), (200, "image/png"));
        assert!(picture.body.starts_with(b"\x89PNG"));
    }
    s.post("/1.0/karst/instances/v1/keys", json!({"keys": ["ctrl-alt-del", "a"]})).await.metadata();
    let log = s.get("/1.0/instances/v1/console").await;
    assert!(String::from_utf8_lossy(&log.body).contains("ctrl-alt-deletea"));
    s.post("/1.0/karst/instances/v1/reset", json!({})).await.metadata();
    let (operation, fds) = secrets(&s.post("/1.0/karst/instances/v1/vnc", json!({})).await);
    let mut display = s.websocket(&at(&operation, &fds, "0")).await;
    let _control = s.websocket(&at(&operation, &fds, "control")).await;
    expect(&mut display, "RFB 003.008").await;
    // What cannot be says why.
    s.post("/1.0/karst/instances/v1/keys", json!({"keys": ["ctrl-delte"]})).await.refused(400);
    s.post("/1.0/karst/instances/v1/keys", json!({})).await.refused(400);
    s.get("/1.0/instances/v1/console?type=spice").await.refused(400);
    for what in ["keys", "reset", "vnc"] {
        let body = if what == "keys" { json!({"keys": ["a"]}) } else { json!({}) };
        s.post(&format!("/1.0/karst/instances/c1/{what}"), body.clone()).await.refused(501);
        s.post(&format!("/1.0/karst/instances/nope/{what}"), body).await.refused(404);
    }
    s.get("/1.0/karst/instances/c1/screenshot").await.refused(501);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn displays_have_passwords() {
    let s = Server::start().await;
    s.container("c1", true).await;
    let body = json!({"name": "v1", "type": "virtual-machine", "source": {"type": "none"}, "start": true});
    s.done(s.post("/1.0/instances", body).await).await;
    let (v1, c1) = ("/1.0/karst/instances/v1/vnc", "/1.0/karst/instances/c1/vnc");
    let told = json!({"display": true, "password": false, "valid_to": null, "listeners": []});
    assert_eq!(s.get(v1).await.metadata(), told);
    assert_eq!(s.get(c1).await.metadata()["display"], false);
    // A server without a key for secrets takes none.
    s.put(v1, json!({"password": "opensesa"})).await.refused(503);
    s.engine.set_secret_key(karst_engine::secrets::SecretKey::new(&[7; 32]).unwrap());
    for (bad, word) in [
        (json!({"password": ""}), "missing"),
        (json!({"password": "ninechars"}), "9 characters"),
        (json!({"password": "tab\t"}), "ASCII"),
        (json!({"password": "x", "valid_to": "soon"}), "valid_to"),
        (json!({"password": "x", "until": "soon"}), "until"),
    ] {
        let text = s.put(v1, bad).await.refused(400);
        assert!(text.contains(word) && !text.contains("ninechars"), "{text}");
    }
    s.put(c1, json!({"password": "x"})).await.refused(501);
    s.delete(v1).await.refused(404);
    assert_eq!(s.get(v1).await.metadata()["password"], false, "what was refused changed nothing");
    s.put(v1, json!({"password": "opensesa", "valid_to": "2200-01-01T00:00:00Z"})).await.metadata();
    let told =
        json!({"display": true, "password": true, "valid_to": "2200-01-01T00:00:00Z", "listeners": []});
    assert_eq!(s.get(v1).await.metadata(), told);
    // Who comes now is asked for it, the administrator too.
    let (operation, fds) = secrets(&s.post(v1, json!({})).await);
    let mut display = s.websocket(&at(&operation, &fds, "0")).await;
    let _control = s.websocket(&at(&operation, &fds, "control")).await;
    expect(&mut display, "RFB 003.008\n\u{1}\u{2}").await;
    s.put(v1, json!({"password": "late", "valid_to": "2001-01-01T00:00:00Z"})).await.metadata();
    s.post(v1, json!({})).await.refused(409);
    s.delete(v1).await.metadata();
    let (operation, fds) = secrets(&s.post(v1, json!({})).await);
    let mut display = s.websocket(&at(&operation, &fds, "0")).await;
    let _control = s.websocket(&at(&operation, &fds, "control")).await;
    expect(&mut display, "RFB 003.008").await;
    // What was said is nowhere to be read.
    for path in ["/1.0/instances/v1?recursion=1", "/1.0/karst/audit", "/1.0/operations?recursion=1"] {
        let text = String::from_utf8_lossy(&s.get(path).await.body).into_owned();
        assert!(!text.contains("opensesa"), "{path}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn console_joins_both_ways() {
    let s = Server::start().await;
    s.container("c1", true).await;
    let open = json!({"width": 80, "height": 24, "type": "console", "force": false});
    let (operation, fds) = secrets(&s.post("/1.0/instances/c1/console", open.clone()).await);
    let _control = s.websocket(&at(&operation, &fds, "control")).await;
    let mut console = s.websocket(&at(&operation, &fds, "0")).await;
    say(&mut console, Message::binary(&b"hello console\r"[..])).await;
    expect(&mut console, "hello console").await;
    drop(console);
    let ended = s.get(&format!("{operation}/wait?timeout=60")).await.metadata();
    assert_eq!(ended["status"], "Success");
    let log = s.get("/1.0/instances/c1/console").await;
    assert_eq!(log.header("content-type"), "application/octet-stream");
    assert!(String::from_utf8_lossy(&log.body).contains("hello console"));
    s.delete("/1.0/instances/c1/console").await.metadata();
    assert!(s.get("/1.0/instances/c1/console").await.body.is_empty());
    // An attachment can be cancelled.
    let (operation, fds) = secrets(&s.post("/1.0/instances/c1/console", open).await);
    let _console = s.websocket(&at(&operation, &fds, "0")).await;
    s.delete(&operation).await.metadata();
    assert_eq!(s.get(&format!("{operation}/wait?timeout=60")).await.metadata()["status"], "Cancelled");
    s.post("/1.0/instances/c1/console", json!({"type": "vga"})).await.refused(501);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_over_http() {
    let s = Server::start().await;
    s.container("c1", true).await;
    let at = |path: &str| format!("/1.0/instances/c1/files?path={path}");
    let headers =
        [("x-incus-uid", "5"), ("x-incus-gid", "6"), ("x-incus-mode", "0640"), ("x-incus-type", "file")];
    s.send(Method::POST, &at("%2Froot%2Ff1"), &headers, "hello\n").await.metadata();
    let got = s.get(&at("root%2Ff1")).await;
    assert_eq!(&got.body[..], b"hello\n");
    for prefix in ["x-incus", "x-lxd"] {
        for (name, value) in [("uid", "5"), ("gid", "6"), ("mode", "0640"), ("type", "file")] {
            assert_eq!(got.header(&format!("{prefix}-{name}")), value);
        }
    }
    s.send(Method::POST, &at("/root/f1"), &[("x-lxd-write", "append")], "more\n").await.metadata();
    assert_eq!(&s.get(&at("/root/f1")).await.body[..], b"hello\nmore\n");
    let head = s.send(Method::HEAD, &at("/root/f1"), &[], "").await;
    assert_eq!(
        (head.status, head.header("content-length"), head.header("x-incus-type")),
        (200, "11", "file")
    );
    s.send(Method::POST, &at("/root/d"), &[("x-incus-type", "directory"), ("x-incus-mode", "0750")], "")
        .await
        .metadata();
    s.send(Method::POST, &at("/root/d/l"), &[("x-incus-type", "symlink")], "../f1").await.metadata();
    let directory = s.get(&at("/root/d")).await;
    assert_eq!((directory.header("x-incus-type"), directory.metadata()), ("directory", json!(["l"])));
    let link = s.get(&at("/root/d/l")).await;
    assert_eq!((link.header("x-incus-type"), &link.body[..]), ("symlink", &b"../f1"[..]));
    s.delete(&at("/root/f1")).await.metadata();
    s.get(&at("/root/f1")).await.refused(404);
    s.delete(&at("/root/f1")).await.refused(404);
    assert!(s.get("/1.0/instances/c1/files").await.refused(400).contains("path"));
    let bad = s.send(Method::POST, &at("/root/x"), &[("x-incus-mode", "rw")], "").await;
    assert!(bad.refused(400).contains("X-Incus-mode"));
    s.send(Method::POST, &at("/root/x"), &[("x-incus-type", "socket")], "").await.refused(400);
    s.send(Method::POST, &at("/nowhere/x"), &[], "x").await.refused(404);
    s.get(&at("%2Fa%00b")).await.refused(400);
    // What climbs stays below the root.
    s.get(&at("/../../etc/hostname")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_tell_what_happened() {
    let s = Server::start().await;
    let mut events = s.websocket("/1.0/events").await;
    let mut lifecycle = s.websocket("/1.0/events?type=lifecycle&all-projects=true").await;
    s.container("c1", true).await;
    let mut seen = vec![];
    loop {
        let Some(Message::Text(text)) = next(&mut events).await else { panic!("the events end") };
        let event: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(event["location"], "none");
        if event["type"] == "operation" {
            assert_eq!(event["project"], "default");
            seen.push(event["metadata"]["status"].as_str().unwrap().to_owned());
            if event["metadata"]["status"] == "Success" {
                break;
            }
        }
    }
    assert!(seen.len() >= 2, "{seen:?}");
    let Some(Message::Text(text)) = next(&mut lifecycle).await else { panic!("the events end") };
    let event: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (event["type"].as_str(), event["metadata"]["action"].as_str()),
        (Some("lifecycle"), Some("instance-created"))
    );
    assert_eq!(event["metadata"]["source"], "/1.0/instances/c1");
    assert_eq!(
        (event["metadata"]["name"].as_str(), event["metadata"]["project"].as_str()),
        (Some("c1"), Some("default"))
    );
    assert_eq!(event["metadata"]["requestor"]["protocol"], "unix");
    s.get("/1.0/events").await.refused(400);
    assert!(s.get("/1.0/events?type=lifecicle").await.refused(400).contains("lifecycle"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn storage_pools_are_started_and_stopped() {
    let s = Server::start().await;
    let life = "/1.0/karst/storage-pools/p1";
    let status = async |s: &Server| s.get("/1.0/storage-pools/p1").await.metadata()["status"].clone();
    let made = s.post("/1.0/storage-pools", json!({"name": "p1", "driver": "dir"})).await;
    assert_eq!(made.status, 201);
    let shown = s.get(life).await.metadata();
    assert_eq!(
        (&shown["active"], &shown["autostart"], &shown["persistent"], &shown["built"]),
        (&json!(true), &json!(true), &json!(true), &json!(true))
    );
    s.put(life, json!({"active": false, "autostart": false})).await.metadata();
    let shown = s.get(life).await.metadata();
    assert_eq!(
        (&shown["active"], &shown["autostart"], &shown["built"], &shown["file_system"]),
        (&json!(false), &json!(false), &json!(true), &Value::Null)
    );
    assert_eq!(status(&s).await, "Unavailable");
    assert!(s.get("/1.0/storage-pools/p1/resources").await.refused(409).contains("not active"));
    let volume = json!({"name": "v1", "content_type": "block", "config": {"size": "4MiB"}});
    let made = s.post("/1.0/storage-pools/p1/volumes/custom", volume).await;
    assert!(made.refused(409).contains("not active"));
    assert!(s.put(life, json!({"active": false})).await.refused(409).contains("not active"));
    s.put(life, json!({"active": "soon"})).await.refused(400);
    s.put(life, json!({"active": true})).await.metadata();
    assert_eq!(status(&s).await, "Created");
    s.put("/1.0/karst/storage-pools/nope", json!({"active": true})).await.refused(404);
    s.delete("/1.0/storage-pools/p1").await.metadata();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn storage_pools_live() {
    let s = Server::start().await;
    s.container("c1", false).await;
    let pools = s.get("/1.0/storage-pools?recursion=1").await.metadata();
    assert_eq!((pools[0]["name"].as_str(), pools[0]["driver"].as_str()), (Some("default"), Some("dir")));
    assert!(pools[0]["used_by"].to_string().contains("/1.0/instances/c1"));
    assert!(s.get("/1.0/storage-pools/default").await.header("etag").len() == 66);
    assert!(
        s.get("/1.0/storage-pools/default/resources").await.metadata()["space"]["total"].as_u64().unwrap()
            > 0
    );
    let found = s.get("/1.0/karst/storage-pools/default").await.metadata();
    assert_eq!(
        (&found["file_system"]["owners"], &found["file_system"]["limits"]),
        (&json!(true), &json!(false))
    );
    s.get("/1.0/karst/storage-pools/nope").await.refused(404);
    let volumes = s.get("/1.0/storage-pools/default/volumes?recursion=1&filter=").await.metadata();
    assert_eq!((volumes[0]["name"].as_str(), volumes[0]["type"].as_str()), (Some("c1"), Some("container")));
    assert_eq!(s.get("/1.0/storage-pools/default/volumes?filter=name+eq+x").await.metadata(), json!([]));
    assert_eq!(
        s.get("/1.0/storage-pools/default/volumes/container?all-projects=true").await.metadata(),
        json!(["/1.0/storage-pools/default/volumes/container/c1"])
    );
    assert_eq!(
        s.get("/1.0/storage-pools/default/volumes/container/c1").await.metadata()["used_by"][0],
        "/1.0/instances/c1"
    );
    assert!(
        s.get("/1.0/storage-pools/default/volumes/container/c1/state").await.metadata()["usage"].is_object()
    );
    s.get("/1.0/storage-pools/default/volumes/container/nope").await.refused(404);
    s.get("/1.0/storage-pools/default/volumes/weird/c1").await.refused(400);
    let created = s
        .post("/1.0/storage-pools", json!({"name": "p2", "driver": "dir", "config": {}, "description": ""}))
        .await;
    assert_eq!((created.status, created.header("location")), (201, "/1.0/storage-pools/p2"));
    s.post("/1.0/storage-pools", json!({"name": "p2", "driver": "dir"})).await.refused(409);
    s.post("/1.0/storage-pools", json!({"name": "p3", "driver": "ceph"})).await.refused(400);
    // The simulated host has all that Karst knows, but for one, and says why.
    let lacking = s.post("/1.0/storage-pools", json!({"name": "p3", "driver": "zfs"})).await.refused(400);
    assert!(lacking.contains("zfsutils-linux"), "{lacking}");
    let group = json!({"name": "p4", "driver": "lvm", "config": {"source": "vg0"}});
    assert_eq!(s.post("/1.0/storage-pools", group).await.status, 201);
    s.delete("/1.0/storage-pools/p4").await.metadata();
    s.post("/1.0/storage-pools", json!({"name": "p3"})).await.refused(400);
    s.delete("/1.0/storage-pools/p2").await.metadata();
    s.delete("/1.0/storage-pools/default").await.refused(409);
    s.get("/1.0/storage-pools/p2").await.refused(404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn profiles_and_projects_live() {
    let s = Server::start().await;
    let created = s
        .post("/1.0/profiles", json!({"config": null, "description": "", "devices": null, "name": "p1"}))
        .await;
    assert_eq!((created.status, created.header("location")), (201, "/1.0/profiles/p1"));
    s.post("/1.0/profiles", json!({"name": "p1"})).await.refused(409);
    let tag = s.get("/1.0/profiles/p1").await.header("etag").to_owned();
    let body = json!({"config": {"limits.cpu": "1"}, "description": "", "devices": {}}).to_string();
    s.send(Method::PUT, "/1.0/profiles/p1", &[("if-match", &tag)], body.clone()).await.metadata();
    s.send(Method::PUT, "/1.0/profiles/p1", &[("if-match", &tag)], body).await.refused(412);
    s.patch("/1.0/profiles/p1", json!({"devices": {"e1": {"type": "none"}}})).await.metadata();
    let p1 = s.get("/1.0/profiles/p1").await.metadata();
    assert_eq!(
        (p1["config"]["limits.cpu"].as_str(), p1["devices"]["e1"]["type"].as_str()),
        (Some("1"), Some("none"))
    );
    assert!(
        s.put("/1.0/profiles/p1", json!({"config": {"limits.cpo": "1"}}))
            .await
            .refused(400)
            .contains("limits.cpu")
    );
    for (key, keys) in [
        ("pool", json!({"type": "kernel", "source": "k", "pool": "nope"})),
        ("initrd.pool", json!({"type": "kernel", "source": "/k", "initrd": "i", "initrd.pool": "nope"})),
    ] {
        let refused = s.patch("/1.0/profiles/p1", json!({"devices": {"k": keys}})).await.refused(404);
        assert!(refused.contains(&format!("devices.k.{key}")), "{refused}");
    }
    assert_eq!(s.post("/1.0/profiles/p1", json!({"name": "p2"})).await.status, 201);
    s.done(
        s.post(
            "/1.0/instances",
            json!({"name": "c1", "profiles": ["default", "p2"], "source": {"type": "none"}}),
        )
        .await,
    )
    .await;
    assert_eq!(s.get("/1.0/profiles/p2").await.metadata()["used_by"], json!(["/1.0/instances/c1"]));
    s.delete("/1.0/profiles/p2").await.refused(409);
    assert_eq!(s.get("/1.0/profiles?all-projects=true").await.metadata().as_array().unwrap().len(), 2);
    s.done(s.delete("/1.0/instances/c1").await).await;
    s.delete("/1.0/profiles/p2").await.metadata();

    assert_eq!(
        s.post("/1.0/projects", json!({"name": "pr1", "description": "", "config": {}})).await.status,
        201
    );
    s.post("/1.0/projects", json!({"name": "pr1"})).await.refused(409);
    assert_eq!(
        s.get("/1.0/projects").await.metadata(),
        json!(["/1.0/projects/default", "/1.0/projects/pr1"])
    );
    s.patch("/1.0/projects/pr1", json!({"description": "mine"})).await.metadata();
    assert_eq!(s.get("/1.0/projects/pr1").await.metadata()["description"], "mine");
    let tag = s.get("/1.0/projects/pr1").await.header("etag").to_owned();
    let config = s.get("/1.0/projects/pr1").await.metadata()["config"].clone();
    let body = json!({"description": "ours", "config": config}).to_string();
    s.send(Method::PUT, "/1.0/projects/pr1", &[("if-match", &tag)], body).await.metadata();
    assert_eq!(
        s.get("/1.0/projects/pr1/state").await.metadata()["resources"]["instances"],
        json!({"Limit": -1, "Usage": 0})
    );
    assert_eq!(s.get("/1.0/instances?project=pr1").await.metadata(), json!([]));
    s.done(s.post("/1.0/projects/pr1", json!({"name": "pr2"})).await).await;
    s.delete("/1.0/projects/pr2").await.metadata();
    s.delete("/1.0/projects/default").await.refused(409);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn karst_paths_answer() {
    let mut s = Server::start().await;
    let host = s.get("/1.0/karst/host").await.metadata();
    assert_eq!(
        (host["nodes"][0]["name"].as_str(), host["nodes"][0]["this"].as_bool()),
        (Some("node1"), Some(true))
    );
    s.done(
        s.post(
            "/1.0/karst/images/build",
            json!({"recipe": "debian/12", "type": "container", "alias": "deb"}),
        )
        .await,
    )
    .await;
    assert_eq!(s.get("/1.0/images/aliases/deb").await.metadata()["type"], "container");
    let ubuntu = json!({"recipe": "ubuntu/24.04", "type": "virtual-machine", "alias": "noble"});
    s.done(s.post("/1.0/karst/images/build", ubuntu).await).await;
    assert_eq!(s.get("/1.0/images/aliases/noble").await.metadata()["type"], "virtual-machine");
    s.post("/1.0/karst/images/build", json!({"recipe": "../x"})).await.refused(400);
    let check = s.get("/1.0/karst/check").await.metadata();
    assert_eq!((&check["leaks"], &check["sagas"]), (&json!([]), &json!([])), "{check}");
    let status = s.get("/1.0/karst/status").await.metadata();
    assert_eq!(
        (status["daemon"].as_str(), status["hosts"].as_u64(), status["pid"].as_u64()),
        (Some("5eed00"), Some(1), Some(u64::from(std::process::id())))
    );
    assert_eq!(status["host"]["architecture"], host["nodes"][0]["facts"]["architecture"]);
    s.get("/internal/ready").await.metadata();
    s.put("/internal/shutdown", json!({})).await.metadata();
    s.shutdown.recv().await.expect("the server is asked to end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_openapi_document_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../docs/openapi.json");
    let now = serde_json::to_string_pretty(&karst_frontend_incus::openapi::document()).unwrap() + "\n";
    if std::env::var_os("KARST_BLESS").is_some() {
        std::fs::write(path, &now).unwrap();
    }
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    assert!(kept == now, "docs/openapi.json is stale: run this test with KARST_BLESS=1");
    let served = Server::start().await.get("/1.0/karst/openapi").await.metadata();
    assert_eq!(served, serde_json::from_str::<Value>(&kept).unwrap());
}
