//! Bad bodies and bad paths through every endpoint of the table that changes something: refused as the client's fault, with
//! words, and nothing has changed.

use crate::common::Server;
use hyper::Method;
use karst_frontend_incus::routes::{State, TABLE};
use serde_json::Value;

/// Those whose body is content, not JSON.
const CONTENT: &[&str] = &["/1.0/instances/{name}/files", "/1.0/images"];
/// Those that take no body: whatever comes with the request is not looked at.
const BODILESS: &[(&str, &str)] = &[("PUT", "/internal/shutdown")];

/// Fields that requests know, each of a type that none of them has.
const WRONG: &str = r#"{"name": [1], "description": [1], "config": [1], "devices": 1, "source": 1, "action": [1], "command": 1,
    "target": [1], "type": [1], "width": [1], "restore": [1], "rules": 1, "public": "x", "properties": [1], "size": [1],
    "expires_at": [1], "status": [1], "role": [1]}"#;

/// A path with objects that exist, as far as there are any.
fn real(path: &str) -> String {
    let mut before = "";
    let mut out = String::new();
    for segment in path.split('/').skip(1) {
        out.push('/');
        out += match (segment.starts_with('{'), before) {
            (false, _) => segment,
            (true, "instances" | "containers" | "virtual-machines") => "c1",
            (true, "networks") => "karstbr0",
            (true, "storage-pools" | "profiles" | "projects") => "default",
            (true, "volumes") => "custom",
            (true, _) => "nothing",
        };
        before = segment;
    }
    out
}

/// A path whose parameters lead elsewhere.
fn tricky(path: &str) -> String {
    let segments = path.split('/').skip(1);
    let all = segments.map(|s| if s.starts_with('{') { "..%2F..%2Fetc%2Fpasswd" } else { s });
    all.fold(String::new(), |path, s| path + "/" + s)
}

async fn everything(s: &Server) -> Vec<Value> {
    let mut all = vec![];
    for path in [
        "instances",
        "networks",
        "storage-pools",
        "profiles",
        "projects",
        "images",
        "network-acls",
        "certificates",
    ] {
        all.push(s.get(&format!("/1.0/{path}?recursion=1")).await.metadata());
    }
    all.push(s.get("/1.0").await.metadata()["config"].clone());
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_is_refused_everywhere() {
    let s = Server::start().await;
    s.container("c1", false).await;
    let before = everything(&s).await;
    let huge = format!("{{\"description\": \"{}\"}}", "x".repeat(2 << 20));
    let mut wrong = vec![];
    let changing = |m: &Method| [Method::POST, Method::PUT, Method::PATCH].contains(m);
    let rows: Vec<_> = TABLE
        .iter()
        .filter(|r| matches!(r.state, State::Done(..)) && changing(&r.method))
        .filter(|r| !BODILESS.contains(&(r.method.as_str(), r.path)))
        .collect();
    assert!(rows.len() > 60, "the table is looked at: {}", rows.len());
    for row in rows {
        let content = CONTENT.contains(&row.path);
        let bodies = [
            ("cut off", "{", 400..500),
            ("a list", "[1]", 400..500),
            ("an unknown field", "{\"frobnicate\": {\"x\": 1}}", 400..500),
            ("wrong types", WRONG, 400..500),
            ("huge", &*huge, 400..500),
        ];
        let json = [("content-type", "application/json")];
        for (what, body, class) in bodies.into_iter().filter(|_| !content) {
            let answer = s.send(row.method.clone(), &real(row.path), &json, body.to_owned()).await;
            let told = answer.json()["error"].as_str().is_some_and(|e| e.len() > 5);
            if !class.contains(&answer.status) || !told {
                wrong.push(format!(
                    "{} {} ({what}): {} {}",
                    row.method,
                    row.path,
                    answer.status,
                    answer.json()
                ));
            }
        }
        if row.path.contains('{') {
            let answer = s.send(row.method.clone(), &tricky(row.path), &json, "{}".to_owned()).await;
            if !(400..500).contains(&answer.status) {
                wrong.push(format!("{} {} (path): {}", row.method, row.path, answer.status));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let after = everything(&s).await;
    assert_eq!(after, before, "nothing has changed");
}
