//! What instances use, now and over time.
#![allow(clippy::disallowed_methods)] // a test

use crate::common::Server;
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_instances_use_is_told() {
    let s = Server::start().await;
    s.container("c1", true).await;
    s.container("c2", false).await;
    let path = "/1.0/karst/instances/c1/history";
    let wait = async {
        loop {
            let all = s.get(path).await.metadata();
            if all["series"][0]["points"][0]["cpu"].is_number() {
                return all;
            }
            s.get("/1.0/instances/c1/state").await.metadata();
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let all = tokio::time::timeout(crate::common::PATIENCE, wait).await.expect("a history in time");
    let shown: Vec<_> =
        all["series"].as_array().unwrap().iter().map(|s| (&s["seconds"], &s["kept"])).collect();
    let number = |n: u32| json!(n);
    assert_eq!(
        shown,
        [(&number(60), &number(60)), (&number(600), &number(144)), (&number(3600), &number(744))]
    );
    let point = &all["series"][0]["points"][0];
    for figure in ["time", "measured_ms", "memory", "disk_read", "disk_written", "received", "sent"] {
        assert!(point[figure].is_u64(), "{figure}: {point}");
    }
    let one = s.get(&format!("{path}?seconds=600")).await.metadata();
    assert_eq!((one["series"].as_array().unwrap().len(), &one["series"][0]["seconds"]), (1, &json!(600)));
    assert!(s.get(&format!("{path}?seconds=61")).await.refused(400).contains("60, 600, 3600"));
    assert!(s.get(&format!("{path}?seconds=x")).await.refused(400).contains("seconds"));
    s.get("/1.0/karst/instances/nope/history").await.refused(404);
    // One that never ran has used nothing.
    let never = s.get("/1.0/karst/instances/c2/history").await.metadata();
    assert!(never["series"].as_array().unwrap().iter().all(|s| s["points"] == json!([])), "{never}");

    assert_eq!(s.post("/1.0/projects", json!({"name": "p2"})).await.status, 201);
    let body = json!({"name": "c3", "source": {"type": "none"}, "start": true,
        "devices": {"root": {"type": "disk", "path": "/", "pool": "default"}}});
    s.done(s.post("/1.0/instances?project=p2", body).await).await;
    let names = |all: &Value| -> Vec<String> {
        let names = all.as_array().unwrap().iter();
        let name = |i: &Value| format!("{}/{}", i["project"].as_str().unwrap(), i["name"].as_str().unwrap());
        let mut names: Vec<_> = names.map(name).collect();
        names.sort();
        names
    };
    // The sample is at most 2 s old: c3 comes with the next one.
    let wait = async {
        loop {
            let all = s.get("/1.0/karst/top?all-projects=true").await.metadata();
            if names(&all) == ["default/c1", "p2/c3"] {
                return all;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let all = tokio::time::timeout(crate::common::PATIENCE, wait).await.expect("all in time");
    let of = |name: &str| all.as_array().unwrap().iter().find(|i| i["name"] == name).unwrap();
    for figure in ["sampled_at", "cpu_ns", "memory", "memory_total", "disk_read", "received", "processes"] {
        assert!(of("c1")[figure].is_u64(), "{figure}: {all}");
    }
    assert_eq!((&of("c1")["type"], &of("c1")["status"]), (&json!("container"), &json!("Running")));
    assert!(of("c3")["received"].is_null(), "it has no NIC: {all}");
    assert_eq!(names(&s.get("/1.0/karst/top").await.metadata()), ["default/c1"]);
    s.get("/1.0/karst/top?project=nope").await.refused(404);
}
