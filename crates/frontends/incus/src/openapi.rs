//! The API as an OpenAPI 3.1 document, made of the table of routes: what is served, with which parameters, in which
//! envelope. Bodies are described as far as the table knows them: their fields are checked by the handlers, which name
//! what is wrong.

use crate::routes::{Row, State, TABLE};
use hyper::Method;
use serde_json::{Map, Value, json};

/// Collections whose things belong to a project.
const OF_PROJECTS: &[&str] =
    &["events", "images", "instances", "networks", "network-acls", "operations", "profiles"];

fn parameters(row: &Row) -> Vec<Value> {
    let mut all = vec![];
    for name in row.path.split('/').filter_map(|s| s.strip_prefix('{')?.strip_suffix('}')) {
        all.push(json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}}));
    }
    let query = |name: &str, kind: &str, text: &str| json!({"name": name, "in": "query", "description": text, "schema": {"type": kind}});
    let first = row.path.split('/').nth(2).unwrap_or_default();
    if OF_PROJECTS.contains(&first) || row.path.contains("/volumes") {
        all.push(query("project", "string", "Project; `default` when absent"));
    }
    // What ends with a collection's name is a list.
    let last = row.path.rsplit('/').next().unwrap_or_default();
    let list = last.ends_with('s') && !last.starts_with('{') && !row.path.contains("/karst/");
    let not_lists = ["metrics", "access", "status", "resources", "files", "events"];
    if row.method == Method::GET && list && !not_lists.contains(&last) {
        all.push(query("recursion", "integer", "0: paths; 1: objects; 2: objects with their state"));
        all.push(query("filter", "string", "Only what matches, such as `name eq c1 and status eq Running`"));
        if row.path == "/1.0/instances" {
            all.push(query(
                "limit",
                "integer",
                "At most so many (1 to 1000), by name; `link` of the answer's header is the next page",
            ));
            all.push(query(
                "after",
                "string",
                "Those behind this name (PROJECT/NAME with all-projects), which need not be there any more",
            ));
        }
    }
    if ["PUT", "PATCH"].contains(&row.method.as_str()) {
        all.push(json!({
            "name": "If-Match", "in": "header", "schema": {"type": "string"},
            "description": "ETag of the object as it was read; 412 when it has changed since",
        }));
    }
    all
}

fn identifier(row: &Row) -> String {
    let words: Vec<String> = row
        .path
        .split('/')
        .filter(|s| !s.is_empty() && *s != "1.0")
        .map(|s| s.trim_matches(['{', '}']).replace(['-', '.'], "_"))
        .collect();
    let words = if words.is_empty() { row.path.replace(['/', '.'], "_") } else { words.join("_") };
    format!("{}_{words}", row.method.as_str().to_lowercase())
}

fn operation(row: &Row) -> Value {
    let answer = |text: &str, schema: &str| {
        let schema = json!({"$ref": format!("#/components/schemas/{schema}")});
        json!({"description": text, "content": {"application/json": {"schema": schema}}})
    };
    let mut responses = Map::new();
    let mut extra = Map::new();
    match row.state {
        State::Done(_, test) => {
            responses.insert("200".into(), answer("The answer is in `metadata`", "Sync"));
            if row.method != Method::GET && row.method != Method::HEAD {
                responses.insert("202".into(), answer("An operation does it", "Async"));
            }
            extra.insert("x-karst-test".into(), test.into());
        }
        State::Open(why) => {
            responses.insert("501".into(), answer(why, "Error"));
            extra.insert("x-karst-open".into(), why.into());
        }
    }
    responses.insert("default".into(), answer("It was refused or failed", "Error"));
    let mut operation = Map::new();
    operation.insert("operationId".into(), identifier(row).into());
    let tag = row.path.split('/').nth(2).unwrap_or("server");
    operation.insert("tags".into(), json!([tag]));
    operation.insert("parameters".into(), parameters(row).into());
    if ["POST", "PUT", "PATCH"].contains(&row.method.as_str()) {
        operation.insert(
            "requestBody".into(),
            json!({"content": {"application/json": {"schema": {"type": "object"}}}}),
        );
    }
    operation.insert("responses".into(), responses.into());
    operation.extend(extra);
    operation.into()
}

/// The document.
pub fn document() -> Value {
    let mut rows: Vec<&Row> = TABLE.iter().collect();
    rows.sort_by_key(|r| (r.path, r.method.as_str().to_owned()));
    let mut paths: Map<String, Value> = Map::new();
    for row in rows {
        let path = paths.entry(row.path).or_insert_with(|| json!({}));
        if let Some(path) = path.as_object_mut() {
            path.insert(row.method.as_str().to_lowercase(), operation(row));
        }
    }
    let text = |description: &str| json!({"type": "string", "description": description});
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Karst: the Incus API and what Karst adds",
            "description": "Made of the table of routes. Paths below /1.0/karst are Karst's own.",
            "version": "1.0",
            "license": {"name": "Apache-2.0"},
        },
        "servers": [{"url": "https://localhost:8443"}],
        "security": [{"certificate": []}, {"token": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "certificate": {"type": "mutualTLS", "description": "A client certificate that the server trusts"},
                "token": {"type": "http", "scheme": "bearer", "description": "An API token"},
            },
            "schemas": {
                "Sync": {"type": "object", "properties": {
                    "type": text("`sync`"), "status": text("`Success`"), "status_code": {"type": "integer"}, "metadata": {},
                }},
                "Async": {"type": "object", "properties": {
                    "type": text("`async`"), "status_code": {"type": "integer"},
                    "operation": text("Path of the operation"), "metadata": {"type": "object"},
                }},
                "Error": {"type": "object", "properties": {
                    "type": text("`error`"), "error": text("What is wrong, and the field"), "error_code": {"type": "integer"},
                }},
            },
        },
    })
}
