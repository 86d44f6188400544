//! The description of the API, and the document that is made of it, beside what happens.
//!
//! Each server of each test of this program has a [`Watch`]: what a handler reads must be described, and each answer must be
//! as the document says. The tests here see to the other direction: what is described is read, and what must be there is
//! demanded.

use crate::access::{Names, addressed, body, concrete, furnished};
use crate::common::{Answer, Server};
use hyper::Method;
use karst_frontend_incus::{
    describe::{self, Body, Described, Kind},
    observe::Read,
    openapi, request,
    routes::{self, Found, Row, State, TABLE},
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{LazyLock, Mutex},
};

static DOCUMENT: LazyLock<Value> = LazyLock::new(openapi::document);

/// Headers that say how to talk, not what about.
const UNSAID: &[&str] = &["accept", "content-type", "user-agent"];

/// What the servers of a test read and answered.
#[derive(Default)]
pub struct Watch {
    reads: Mutex<BTreeMap<usize, BTreeSet<Read>>>,
    faults: Mutex<BTreeSet<String>>,
}

impl Watch {
    fn fault(&self, row: &Row, text: &str) {
        self.faults.lock().unwrap().insert(format!("{} {}: {text}", row.method, row.path));
    }

    /// A handler read this.
    pub fn read(&self, place: usize, reads: BTreeSet<Read>) {
        let row = &TABLE[place];
        let Some(described) = describe::of(&row.method, row.path) else {
            return self.fault(row, "it is not described");
        };
        for read in &reads {
            let known = match read {
                Read::Query(name) => described.parameter("query", name),
                Read::Header(name) => {
                    let unsaid = UNSAID.contains(&name.as_str()) || name.starts_with("x-lxd-");
                    unsaid || described.parameter("header", name)
                }
                Read::Field(path, kind) => described.reads(path, *kind).is_some(),
                Read::Carried(path) => described.carries(path).is_some(),
            };
            if !known {
                self.fault(row, &format!("{read:?} is not described"));
            }
        }
        self.reads.lock().unwrap().entry(place).or_default().extend(reads);
    }

    /// The server answered this.
    pub fn answered(&self, method: &Method, uri: &str, answer: &Answer) {
        let Some(row) = row_of(method, uri) else { return };
        let mut faults = vec![];
        conforms(row, answer, &mut faults);
        for fault in faults {
            self.fault(row, &format!("{}: {fault}", answer.status));
        }
    }

    /// What was not as described.
    pub fn faults(&self) -> BTreeSet<String> {
        self.faults.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
}

/// The row that answers, where it is one that is served.
fn row_of(method: &Method, uri: &str) -> Option<&'static Row> {
    let mut segments = request::segments(uri.split('?').next()?).ok()?;
    // Older names of instances.
    if let Some(second) = segments.get_mut(1)
        && ["containers", "virtual-machines"].contains(&second.as_str())
    {
        "instances".clone_into(second);
    }
    match routes::find(method, &segments) {
        Found::Row(place, _) => Some(&TABLE[place]).filter(|row| matches!(row.state, State::Done(..))),
        Found::Methods(_) | Found::Nothing => None,
    }
}

fn resolved(schema: &Value) -> &Value {
    match schema["$ref"].as_str().and_then(|r| r.strip_prefix('#')) {
        Some(pointer) => DOCUMENT.pointer(pointer).expect("a reference that resolves"),
        None => schema,
    }
}

/// Is the answer as the document says?
fn conforms(row: &Row, answer: &Answer, faults: &mut Vec<String>) {
    let operation = &DOCUMENT["paths"][row.path][row.method.as_str().to_lowercase()];
    let Some(response) = operation["responses"].get(answer.status.to_string()) else {
        faults.push(format!("the status is not described: {}", String::from_utf8_lossy(&answer.body)));
        return;
    };
    let response = resolved(response);
    for (name, header) in response["headers"].as_object().into_iter().flatten() {
        if header["required"] == true && answer.headers.get(name.as_str()).is_none() {
            faults.push(format!("the header {name} is missing"));
        }
    }
    let Some(content) = response["content"].as_object() else { return };
    if row.method == Method::HEAD {
        return;
    }
    let kind = answer.header("content-type").split(';').next().unwrap_or_default().trim().to_owned();
    match content.get(&kind) {
        None => faults.push(format!("content of type {kind:?} is not described")),
        Some(described) if kind == "application/json" => {
            check(&described["schema"], &answer.json_or_null(), "", faults);
        }
        Some(_) => {}
    }
}

/// Holds a value against a schema of the document: what of JSON Schema is in it, and no field beside those that are described.
fn check(schema: &Value, value: &Value, at: &str, faults: &mut Vec<String>) {
    let schema = resolved(schema);
    if let Some(several) = schema["anyOf"].as_array() {
        let each = several.iter().map(|one| {
            let mut found = vec![];
            check(one, value, at, &mut found);
            found
        });
        // Those of the one that comes nearest.
        faults.extend(each.min_by_key(Vec::len).unwrap_or_default());
        return;
    }
    let kinds: Vec<&str> = match &schema["type"] {
        Value::String(kind) => vec![kind],
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
        // Anything.
        _ => return,
    };
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(n) if n.is_i64() || n.is_u64() => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    if !(kinds.contains(&kind) || kind == "integer" && kinds.contains(&"number")) {
        faults.push(format!("{at} is of type {kind}, where {kinds:?} is described"));
        return;
    }
    if schema["enum"].as_array().is_some_and(|words| !words.contains(value)) {
        faults.push(format!("{at} is {value}, where one of {} is described", schema["enum"]));
    }
    match value {
        Value::String(text)
            if schema["format"] == "date-time" && text.parse::<jiff::Timestamp>().is_err() =>
        {
            faults.push(format!("{at} is {text:?}, which is no time"));
        }
        Value::Array(items) => {
            items.iter().for_each(|item| check(&schema["items"], item, &format!("{at}[]"), faults));
        }
        Value::Object(fields) => {
            for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                if !fields.contains_key(name) {
                    faults.push(format!("{at}.{name} is missing"));
                }
            }
            let properties = schema["properties"].as_object();
            let others = &schema["additionalProperties"];
            for (name, value) in fields {
                match properties.and_then(|p| p.get(name)) {
                    Some(described) => check(described, value, &format!("{at}.{name}"), faults),
                    None if others.is_object() => check(others, value, &format!("{at}.*"), faults),
                    None => faults.push(format!("{at}.{name} is not described")),
                }
            }
        }
        _ => {}
    }
}

#[test]
fn what_differs_is_found() {
    let schema = json!({"type": "object", "required": ["name"], "properties": {
        "name": {"type": "string", "enum": ["a", "b"]},
        "time": {"type": ["string", "null"], "format": "date-time"},
        "list": {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "null"}]}},
        "map": {"type": "object", "additionalProperties": {"type": "number"}},
    }});
    for (value, wanted) in [
        (json!({"name": "a"}), 0),
        (json!({"name": "a", "time": null, "list": [1, null], "map": {"x": 1, "y": 0.5}}), 0),
        (json!({"name": "a", "time": "2026-11-23T06:00:00Z"}), 0),
        (json!({}), 1),
        (json!([]), 1),
        (json!({"name": "c"}), 1),
        (json!({"name": 1}), 1),
        (json!({"name": "a", "time": "yesterday"}), 1),
        (json!({"name": "a", "list": ["x", 0.5]}), 2),
        (json!({"name": "a", "map": {"x": "y"}}), 1),
        (json!({"name": "a", "more": 1}), 1),
    ] {
        let mut faults = vec![];
        check(&schema, &value, "", &mut faults);
        assert_eq!(faults.len(), wanted, "{value}: {faults:?}");
    }
    let image = DOCUMENT.pointer("/components/schemas/Image").expect("a shape of the description");
    let mut faults = vec![];
    check(image, &json!({"fingerprint": "x"}), "", &mut faults);
    assert!(faults.iter().any(|f| f == ".aliases is missing"), "{faults:?}");
}

const JSON: [(&str, &str); 1] = [("content-type", "application/json")];
const FILE: [(&str, &str); 1] = [("content-type", "application/octet-stream")];

/// Bodies by which handlers read what others of theirs leave alone.
fn variants(method: &str, path: &str) -> Vec<Value> {
    let far = json!({"type": "image", "server": "https://images.invalid", "protocol": "simplestreams", "alias": "x"});
    match (method, path) {
        ("PUT" | "PATCH", "/1.0/certificates/{fingerprint}") => {
            vec![json!({"name": "n9", "restricted": true})]
        }
        ("PUT", "/1.0/instances/{name}") => vec![json!({"restore": "nope", "stateful": false})],
        ("POST", "/1.0/instances/{name}") => vec![json!({"name": "n9", "migration": true})],
        ("POST", "/1.0/instances") => vec![
            json!({"name": "c9", "source": {"type": "copy", "source": "c1"}}),
            json!({"name": "c9", "source": {"type": "image", "properties": {"os": "none"}}}),
            json!({"name": "c9", "source": far}),
        ],
        ("POST", "/1.0/instances/{name}/rebuild") => {
            vec![json!({"source": {"type": "image", "properties": {"os": "none"}}})]
        }
        ("POST", "/1.0/images") => vec![
            json!({"source": {"type": "instance", "name": "c1"}, "aliases": [{"name": "a", "description": ""}]}),
            json!({"source": far}),
            json!({"source": {"type": "", "mode": "push", "fingerprint": "0".repeat(64)}}),
        ],
        ("POST", "/1.0/images/{fingerprint}/export") => {
            let aliases = json!([{"name": "a", "description": ""}]);
            vec![json!({"target": "https://other.example", "secret": "s3cret", "aliases": aliases})]
        }
        ("PUT" | "PATCH", "/1.0/instances/{name}/metadata") => {
            vec![json!({"templates": {"/etc/x.conf": {"template": "x.tpl"}}})]
        }
        ("POST" | "PUT" | "PATCH", "/1.0/network-acls" | "/1.0/network-acls/{name}") => {
            vec![json!({"name": "n9", "ingress": [{}], "egress": [{}]})]
        }
        (
            "POST" | "PUT" | "PATCH",
            "/1.0/networks/{name}/forwards" | "/1.0/networks/{name}/forwards/{listenAddress}",
        ) => vec![json!({"listen_address": "192.0.2.51", "ports": [{}]})],
        ("PUT", "/1.0/instances") => vec![json!({"state": {"action": "start"}})],
        ("POST", "/1.0/storage-pools/{name}/volumes" | "/1.0/storage-pools/{name}/volumes/{type}") => {
            vec![json!({"name": "n9", "source": {"type": "copy", "name": "data", "pool": "default"}})]
        }
        _ => vec![],
    }
}

fn served() -> impl Iterator<Item = (usize, &'static Row, &'static Described)> {
    let done = TABLE.iter().enumerate().filter(|(_, row)| matches!(row.state, State::Done(..)));
    done.map(|(place, row)| (place, row, describe::of(&row.method, row.path).expect("a description")))
}

fn path_of(row: &Row, names: &Names) -> String {
    let path = concrete(row.path, names, "00000000-0000-0000-0000-000000000001");
    // What only machines have is asked of one.
    addressed(&row.method, path.replace("/karst/instances/c1", "/karst/instances/v1"))
}

async fn machine(s: &Server) {
    let machine = json!({"name": "v1", "type": "virtual-machine", "source": {"type": "none"}, "start": true});
    s.done(s.post("/1.0/instances", machine).await).await;
}

/// What is looked at comes first, what is deleted last: what lies deeper before what it lies in.
fn order(row: &Row) -> (u8, std::cmp::Reverse<usize>) {
    let rank = match row.method {
        Method::GET | Method::HEAD => 0,
        Method::POST if !row.path.ends_with('}') => 1,
        Method::PUT | Method::PATCH => 2,
        Method::DELETE => 4,
        _ => 3,
    };
    (rank, std::cmp::Reverse(if rank == 4 { row.path.len() } else { 0 }))
}

/// What the description says of requests, handlers do read. And as each row is asked for everything once, its answers are
/// held against the document.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_described_is_read() {
    let (s, names) = furnished().await;
    machine(&s).await;
    // First with one field too many: all is read by then, and nothing is done.
    for (_, row, described) in served().filter(|(_, _, d)| !d.shapes().is_empty()) {
        let first: Option<Value> = serde_json::from_str(&body(&row.method, row.path, &names.image)).ok();
        for mut sent in first.into_iter().chain(variants(row.method.as_str(), row.path)) {
            let Some(fields) = sent.as_object_mut() else { continue };
            fields.insert("frobnicate".into(), json!(1));
            let answer = s.send(row.method.clone(), &path_of(row, &names), &JSON, sent.to_string()).await;
            assert!(answer.status >= 400, "{} {} takes {sent}", described.methods, row.path);
        }
    }
    // These look at what lies within a list after all else.
    for path in ["/internal/recover/validate", "/internal/recover/import"] {
        s.post(path, json!({"pools": [{"name": "nope", "driver": "nonsense"}]})).await;
    }
    for path in
        ["/1.0/instances", "/1.0/storage-pools/default/volumes", "/1.0/storage-pools/default/volumes/custom"]
    {
        s.send(Method::POST, path, &FILE, "").await.refused(400);
    }
    // Then as they are.
    let mut rows: Vec<&Row> =
        served().map(|(_, row, _)| row).filter(|row| row.path != "/internal/shutdown").collect();
    rows.sort_by_key(|row| order(row));
    for row in rows {
        let body = body(&row.method, row.path, &names.image);
        s.send(row.method.clone(), &path_of(row, &names), &[], body).await;
    }
    let reads = s.watch.reads.lock().unwrap().clone();
    let mut faults = vec![];
    for (place, row, described) in served() {
        let read = reads.get(&place).cloned().unwrap_or_default();
        let mut fault = |what: &str| faults.push(format!("{} {}: {what} is not read", row.method, row.path));
        for p in described.parameters {
            let wanted = match p.place {
                "query" => Read::Query(p.name.to_owned()),
                _ => Read::Header(p.name.to_ascii_lowercase()),
            };
            if !read.contains(&wanted) {
                fault(&format!("{} {}", p.place, p.name));
            }
        }
        let fields: BTreeSet<String> = read
            .iter()
            .filter_map(|r| match r {
                Read::Field(path, kind) => described.reads(path, *kind),
                _ => None,
            })
            .collect();
        let carried: BTreeSet<String> = read
            .iter()
            .filter_map(|r| match r {
                Read::Carried(path) => described.carries(path),
                _ => None,
            })
            .collect();
        for (path, kind) in described.shapes().into_iter().flat_map(|shape| shape.places()) {
            if !(if kind.is_some() { &fields } else { &carried }).contains(&path) {
                fault(&path);
            }
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

/// What the description says must be there is demanded, and its absence named.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_must_be_there_is_demanded() {
    let (s, names) = furnished().await;
    machine(&s).await;
    let (mut faults, mut looked) = (vec![], 0);
    for (_, row, described) in served() {
        let Body::Json(shape) = described.body else { continue };
        let Ok(good) = serde_json::from_str::<Value>(&body(&row.method, row.path, &names.image)) else {
            continue;
        };
        for (name, _) in shape.fields.iter().filter(|(_, kind)| matches!(kind, Kind::Must(_))) {
            looked += 1;
            let mut less = good.clone();
            if let Some(fields) = less.as_object_mut() {
                // Its place is empty in any case.
                fields.insert((*name).to_owned(), Value::Null);
            }
            let answer = s.send(row.method.clone(), &path_of(row, &names), &JSON, less.to_string()).await;
            let error = answer.json_or_null()["error"].as_str().unwrap_or_default().to_owned();
            if answer.status != 400 || !error.contains(*name) {
                faults
                    .push(format!("{} {}: without {name}: {} {error}", row.method, row.path, answer.status));
            }
        }
    }
    assert!(looked > 30, "the description is looked at: {looked}");
    assert!(faults.is_empty(), "{faults:#?}");
}
