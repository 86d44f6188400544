//! Bad bodies, bad queries and bad paths through every endpoint of the table, at objects that exist: refused as the client's
//! fault with the exact status, the field is named, and nothing has changed.

use crate::access::{addressed, body, concrete, furnished};
use crate::common::{Answer, Server};
use hyper::Method;
use karst_frontend_incus::routes::{Row, State, TABLE};
use serde_json::{Value, json};

/// Those whose body is content, not JSON; what is wrong with them stands in [`content_is_refused`].
const CONTENT: &[&str] = &[
    "/1.0/instances/{name}/files",
    "/1.0/instances/{name}/metadata/templates",
    "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/files",
];
/// Those whose path says all: their body is nothing, or an object without fields.
const BODILESS: &[(&str, &str)] = &[
    ("POST", "/1.0/images/{fingerprint}/refresh"),
    ("POST", "/1.0/images/{fingerprint}/secret"),
    ("PUT", "/internal/shutdown"),
];

/// Fields that requests know, each of a type that none of them has.
const WRONG: &str = r#"{"name": [1], "description": [1], "config": [1], "devices": 1, "source": 1, "action": [1], "command": 1,
    "target": [1], "type": [1], "width": [1], "restore": [1], "rules": 1, "public": "x", "properties": [1], "size": [1],
    "expires_at": [1], "status": [1], "role": [1], "principal": [1], "password": [1], "value": [1],
    "recipe": 1, "listen_address": 1}"#;

/// Parameters that lead elsewhere, or are no names: what clients may not get through.
const TRICKS: &[&str] = &[
    "..%2F..%2Fetc%2Fpasswd",
    "%2e%2e",
    ".",
    "%2Fetc%2Fpasswd",
    "a%00b",
    "a%0ab",
    "%ff",
    "%zz",
    "~root",
    "*",
];

fn tricky(path: &str, trick: &str) -> String {
    let all = path.split('/').skip(1).map(|s| if s.starts_with('{') { trick } else { s });
    all.fold(String::new(), |path, s| path + "/" + s)
}

/// All that a client can see of the objects that there are.
pub async fn everything(s: &Server) -> Vec<Value> {
    let mut all = vec![];
    for path in [
        "instances",
        "networks",
        "storage-pools",
        "profiles",
        "projects",
        "images",
        "images/aliases",
        "network-acls",
        "network-address-sets",
        "certificates",
        "karst/access",
        "karst/tokens",
        "karst/registries",
        "karst/secrets",
        "warnings",
        "storage-pools/default/volumes",
        "storage-pools/default/volumes/custom/data/snapshots",
        "storage-pools/default/volumes/custom/data/backups",
        "instances/c1/snapshots",
        "instances/c1/backups",
        "instances/c1/metadata",
        "instances/c1/metadata/templates",
        "instances/c1/logs",
    ] {
        all.push(s.get(&format!("/1.0/{path}?recursion=1")).await.metadata());
    }
    for network in all[1].clone().as_array().unwrap() {
        let forwards = format!("/1.0/networks/{}/forwards?recursion=1", network["name"].as_str().unwrap());
        all.push(s.get(&forwards).await.metadata());
    }
    all.push(s.get("/1.0").await.metadata()["config"].clone());
    all
}

/// What is not as it must be.
#[derive(Default)]
struct Faults(Vec<String>);

impl Faults {
    /// Demands a refusal with this status whose text has one of these words.
    fn demand(&mut self, row: &Row, what: &str, answer: &Answer, status: u16, words: &[&str]) {
        let text = String::from_utf8_lossy(&answer.body);
        let error = answer.json_or_null()["error"].as_str().unwrap_or_default().to_owned();
        if answer.status != status || error.len() < 6 || !words.iter().any(|w| error.contains(w)) {
            let (method, path, was) = (&row.method, row.path, answer.status);
            self.0.push(format!(
                "{method} {path} ({what}): {was} {text}; {status} and one of {words:?} are due"
            ));
        }
    }

    /// Demands that there is none, and that nothing has changed.
    fn none(mut self, before: &[Value], after: &[Value]) {
        let changed = before.iter().zip(after).filter(|(before, after)| before != after);
        self.0.extend(changed.map(|(before, after)| format!("changed from {before} to {after}")));
        assert!(self.0.is_empty(), "{:#?}", self.0);
    }
}

fn done() -> impl Iterator<Item = &'static Row> {
    TABLE.iter().filter(|r| matches!(r.state, State::Done(..)))
}

const JSON: [(&str, &str); 1] = [("content-type", "application/json")];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_is_refused_everywhere() {
    let (s, names) = furnished().await;
    let machine = json!({"name": "v1", "type": "virtual-machine", "source": {"type": "none"}, "start": true});
    s.done(s.post("/1.0/instances", machine).await).await;
    let before = everything(&s).await;
    let huge = format!("{{\"description\": \"{}\"}}", "x".repeat(2 << 20));
    let fields: Vec<String> =
        serde_json::from_str::<Value>(WRONG).unwrap().as_object().unwrap().keys().cloned().collect();
    let fields: Vec<&str> = fields.iter().map(String::as_str).collect();
    let changing = |m: &Method| [Method::POST, Method::PUT, Method::PATCH].contains(m);
    let takes = |r: &&Row| {
        (changing(&r.method) || (r.method == Method::DELETE && r.path == "/1.0/karst/access"))
            && !CONTENT.contains(&r.path)
    };
    let mut faults = Faults::default();
    let mut rows = 0;
    for row in done().filter(takes) {
        rows += 1;
        // What only machines have is asked of one.
        let path = concrete(row.path, &names, "00000000-0000-0000-0000-000000000001");
        let path = addressed(&row.method, path.replace("/karst/instances/c1/", "/karst/instances/v1/"));
        for (what, bad, status, words) in [
            ("nothing", &b""[..], 400, &["JSON"][..]),
            ("cut off", b"{", 400, &["JSON"]),
            ("a list", b"[1]", 400, &["body"]),
            ("not UTF-8", b"{\"name\": \"\xff\"}", 400, &["JSON"]),
            ("an unknown field", b"{\"frobnicate\": {\"x\": 1}}", 400, &["frobnicate", "is missing"]),
            ("wrong types", WRONG.as_bytes(), 400, &fields),
            ("huge", huge.as_bytes(), 413, &["KiB"]),
        ] {
            if bad.is_empty() && BODILESS.contains(&(row.method.as_str(), row.path)) {
                continue;
            }
            let answer = s.send(row.method.clone(), &path, &JSON, bad.to_vec()).await;
            faults.demand(row, what, &answer, status, words);
        }
        // What would do, but for one thing.
        let Ok(Value::Object(good)) = serde_json::from_str(&body(&row.method, row.path, &names.image)) else {
            continue;
        };
        let mut more = good.clone();
        more.insert("frobnicate".into(), json!(1));
        let answer = s.send(row.method.clone(), &path, &JSON, Value::from(more).to_string()).await;
        faults.demand(row, "one field too many", &answer, 400, &["frobnicate"]);
        for field in good.keys() {
            let mut bad = good.clone();
            bad[field] = json!([[1]]);
            let answer = s.send(row.method.clone(), &path, &JSON, Value::from(bad).to_string()).await;
            faults.demand(row, &format!("{field} of a wrong type"), &answer, 400, &[field]);
        }
    }
    assert!(rows > 60, "the table is looked at: {rows}");
    content_is_refused(&s).await;
    faults.none(&before, &everything(&s).await);
}

/// Bodies that are content are right as they are: what comes with them is wrong.
async fn content_is_refused(s: &Server) {
    let files = "/1.0/instances/c1/files";
    let templates = "/1.0/instances/c1/metadata/templates";
    for (path, headers, body, status, word) in [
        (files.to_owned(), &[][..], "x", 400, "path"),
        (format!("{files}?path=/root/x"), &[("x-incus-mode", "rw")], "x", 400, "X-Incus-mode"),
        (format!("{files}?path=/root/x"), &[("x-incus-uid", "-1")], "x", 400, "X-Incus-uid"),
        (format!("{files}?path=/root/x"), &[("x-incus-gid", "many")], "x", 400, "X-Incus-gid"),
        (format!("{files}?path=/root/x"), &[("x-incus-type", "socket")], "x", 400, "X-Incus-type"),
        (format!("{files}?path=/root/x"), &[("x-incus-write", "twice")], "x", 400, "X-Incus-write"),
        (format!("{files}?path=/root/a%00b"), &[], "x", 400, "path"),
        (templates.to_owned(), &[], "x", 400, "path"),
        (format!("{templates}?path=../x.tpl"), &[], "x", 400, "path"),
        (format!("{templates}?path=%2Fetc%2Fpasswd"), &[], "x", 400, "path"),
        ("/1.0/images".to_owned(), &[("content-type", "multipart/form-data")], "x", 400, "boundary"),
        ("/1.0/images".to_owned(), &[("x-incus-fingerprint", "00ff")], "x", 400, "fingerprint"),
        ("/1.0/images".to_owned(), &[], "", 400, "empty"),
    ] {
        let text = s.send(Method::POST, &path, headers, body).await.refused(status);
        assert!(text.contains(word), "{path} {headers:?}: {text}");
    }
    let large = "x".repeat(2 << 20);
    let text = s.send(Method::POST, &format!("{templates}?path=x.tpl"), &[], large).await.refused(413);
    assert!(text.contains("KiB"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_path_leads_elsewhere() {
    let (s, names) = furnished().await;
    let before = everything(&s).await;
    let mut faults = Faults::default();
    let mut asked = 0;
    for row in done().filter(|r| r.path.contains('{')) {
        for trick in TRICKS {
            asked += 1;
            let mut path = tricky(row.path, trick);
            // What a method needs beside its path.
            for (suffix, query) in [("/files", "?path=/etc/hostname"), ("/templates", "?path=x.tpl")] {
                if path.ends_with(suffix) {
                    path += query;
                }
            }
            let body = body(&row.method, row.path, &names.image);
            let answer = s.send(row.method.clone(), &path, &JSON, body).await;
            let text = String::from_utf8_lossy(&answer.body);
            let error = answer.json_or_null()["error"].as_str().unwrap_or_default().to_owned();
            let told = error.len() > 5 || row.method == Method::HEAD;
            if ![400, 404].contains(&answer.status) || !told || text.contains("root:") {
                faults.0.push(format!("{} {path}: {} {text}", row.method, answer.status));
            }
        }
    }
    assert!(asked > 1000, "the table is looked at: {asked}");
    faults.none(&before, &everything(&s).await);
}

/// Escapes that are broken, numbers that are none, filters without sense, projects that are not there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_queries_are_refused_everywhere() {
    let (s, names) = furnished().await;
    let before = everything(&s).await;
    let mut faults = Faults::default();
    for row in done() {
        let path = concrete(row.path, &names, "00000000-0000-0000-0000-000000000001");
        let path = addressed(&row.method, path.replace("/karst/instances/c1/", "/karst/instances/v1/"));
        let with = |more: &str| format!("{path}{}{more}", if path.contains('?') { '&' } else { '?' });
        let body = body(&row.method, row.path, &names.image);
        let ask = async |query: &str| s.send(row.method.clone(), &with(query), &JSON, body.clone()).await;
        if row.method != Method::HEAD {
            faults.demand(row, "a broken escape", &ask("x=%zz").await, 400, &["query"]);
        }
        let lists = row.method == Method::GET && LISTS.contains(&row.path);
        if lists {
            faults.demand(row, "no number", &ask("recursion=much").await, 400, &["recursion"]);
            faults.demand(row, "no filter", &ask("filter=name+is+x").await, 400, &["filter"]);
            faults.demand(row, "an open filter", &ask("filter=(name+eq+x").await, 400, &["filter"]);
        }
    }
    faults.none(&before, &everything(&s).await);
}

/// Lists that take `recursion` and `filter`.
const LISTS: &[&str] = &[
    "/1.0/certificates",
    "/1.0/images",
    "/1.0/images/aliases",
    "/1.0/instances",
    "/1.0/instances/{name}/backups",
    "/1.0/instances/{name}/snapshots",
    "/1.0/network-acls",
    "/1.0/network-address-sets",
    "/1.0/networks",
    "/1.0/networks/{name}/forwards",
    "/1.0/profiles",
    "/1.0/projects",
    "/1.0/storage-pools",
    "/1.0/storage-pools/{name}/volumes",
    "/1.0/storage-pools/{name}/volumes/{type}",
    "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/backups",
    "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/snapshots",
    "/1.0/warnings",
];
