//! The API as an OpenAPI 3.1 document, of which clients are generated: made of the table of routes and of its description
//! ([`crate::describe`]), which tests hold against what handlers read and answer. Rows that are not served yet are no
//! operations of it: they are listed under `x-karst-open`.

use crate::{
    describe::{
        self, Answer, Body, Described, Kind, Shape,
        answers::{NOTHING, OPERATION},
        requests::BLANK,
        rows,
    },
    routes::{Row, State, TABLE},
};
use hyper::Method;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Statuses of refusals and failures that any row may answer: status, name in the document, what it says.
const ERRORS: &[(&str, &str, &str)] = &[
    ("400", "Invalid", "Something of the request is wrong; the error names it"),
    ("403", "Forbidden", "The caller is not known, may not do this, or a limit would be passed"),
    ("404", "NotFound", "It is not there, or the caller may not know of it"),
    ("409", "Conflict", "It cannot be done as things are"),
    ("500", "Failed", "It failed; the server's log says why"),
    ("501", "Unsupported", "It cannot be done here"),
    ("503", "Unavailable", "A host does not answer in time"),
];
/// Where the request can have a condition.
const CHANGED: (&str, &str, &str) = ("412", "PreconditionFailed", "The object has changed since it was read");
/// Where the request has a body.
const TOO_LARGE: (&str, &str, &str) = ("413", "TooLarge", "The body is larger than what is accepted");

static BLANKS: &[&Shape] = &[&BLANK];

/// Whose schema it is: bodies of requests may lack what is not demanded and have nothing else, answers have all.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Request,
    Answer,
}

/// Schemas of the shapes that were met, by name.
#[derive(Default)]
struct Schemas(BTreeMap<&'static str, Value>);

impl Schemas {
    fn of(&mut self, kind: &Kind, side: Side) -> Value {
        let text = json!({"type": "string"});
        match kind {
            Kind::Text => text,
            Kind::Time => json!({"type": "string", "format": "date-time"}),
            Kind::Word(words) => json!({"type": "string", "enum": words}),
            Kind::Flag => json!({"type": "boolean"}),
            Kind::Integer => json!({"type": "integer", "format": "int64"}),
            Kind::Number => json!({"type": "number"}),
            Kind::Null => json!({"type": "null"}),
            Kind::Any => json!({}),
            Kind::Texts => json!({"type": "array", "items": text}),
            Kind::Config => self.named("Config", "Texts by key", text),
            Kind::Devices => {
                let keys = self.of(&Kind::Config, side);
                self.named("Devices", "Devices by name, each with its keys", keys)
            }
            Kind::List(item) => json!({"type": "array", "items": self.of(item, side)}),
            Kind::Map(item) => json!({"type": "object", "additionalProperties": self.of(item, side)}),
            Kind::Object(shape) => self.reference(shape, side),
            Kind::Nullable(kind) => nullable(self.of(kind, side)),
            Kind::Either(kinds) => {
                let all: Vec<Value> = kinds.iter().map(|kind| self.of(kind, side)).collect();
                json!({"anyOf": all})
            }
            Kind::Maybe(kind) | Kind::Must(kind) => self.of(kind, side),
        }
    }

    /// Values by key that stand in many places: under one name, so that a generated client has one type for them.
    fn named(&mut self, name: &'static str, text: &str, values: Value) -> Value {
        self.0.insert(name, json!({"type": "object", "description": text, "additionalProperties": values}));
        json!({"$ref": format!("#/components/schemas/{name}")})
    }

    fn reference(&mut self, shape: &'static Shape, side: Side) -> Value {
        if !self.0.contains_key(shape.name) {
            // Its place is taken before what lies below is looked at.
            self.0.insert(shape.name, Value::Null);
            let schema = self.object(shape, side);
            self.0.insert(shape.name, schema);
        }
        json!({"$ref": format!("#/components/schemas/{}", shape.name)})
    }

    fn object(&mut self, shape: &'static Shape, side: Side) -> Value {
        let mut properties = Map::new();
        let mut required = vec![];
        for (name, kind) in shape.fields {
            properties.insert((*name).to_owned(), self.of(kind, side));
            let always = match side {
                Side::Request => matches!(kind, Kind::Must(_)),
                Side::Answer => !matches!(kind, Kind::Maybe(_)),
            };
            if always {
                required.push(*name);
            }
        }
        for name in shape.carried {
            let text = "Without meaning here: taken because it stands in what was read";
            properties.insert((*name).to_owned(), json!({"readOnly": true, "description": text}));
        }
        let mut schema = Map::new();
        schema.insert("type".into(), "object".into());
        schema.insert("description".into(), shape.text.trim().into());
        schema.insert("properties".into(), properties.into());
        if !required.is_empty() {
            schema.insert("required".into(), json!(required));
        }
        if side == Side::Request {
            schema.insert("additionalProperties".into(), false.into());
        }
        schema.into()
    }
}

/// A schema that takes null too.
fn nullable(mut schema: Value) -> Value {
    let plain = schema.get("type").and_then(Value::as_str).map(str::to_owned);
    match plain.filter(|_| schema.get("enum").is_none()) {
        Some(kind) => {
            schema["type"] = json!([kind, "null"]);
            schema
        }
        None => json!({"anyOf": [schema, {"type": "null"}]}),
    }
}

fn parameters(row: &Row, described: &Described, schemas: &mut Schemas) -> Vec<Value> {
    let in_path = row.path.split('/').filter_map(|s| s.strip_prefix('{')?.strip_suffix('}'));
    let mut all: Vec<Value> = in_path
        .map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}}))
        .collect();
    all.extend(described.parameters.iter().map(|p| {
        json!({
            "name": p.name, "in": p.place, "required": matches!(p.kind, Kind::Must(_)), "description": p.text,
            "schema": schemas.of(&p.kind, Side::Request),
        })
    }));
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

/// The envelope of answers at once.
fn sync(metadata: Value) -> Value {
    let required = ["type", "status", "status_code", "operation", "error_code", "error", "metadata"];
    json!({"type": "object", "required": required, "properties": {
        "type": {"type": "string", "enum": ["sync"]},
        "status": {"type": "string", "enum": ["Success"]},
        "status_code": {"type": "integer"},
        "operation": {"type": "string"},
        "error_code": {"type": "integer"},
        "error": {"type": "string"},
        "metadata": metadata,
    }})
}

fn location(of: &str) -> Value {
    json!({"Location": {"required": true, "description": of, "schema": {"type": "string"}}})
}

fn responses(row: &Row, described: &Described, schemas: &mut Schemas) -> Map<String, Value> {
    let mut all = Map::new();
    let (mut metadata, mut content) = (vec![], Map::new());
    for answer in described.answers {
        match answer {
            Answer::Sync(kind) => metadata.push(schemas.of(kind, Side::Answer)),
            Answer::Listed(shape) => {
                // Generated clients try one after the other, and take a list of texts for what it is not.
                metadata.push(json!({"type": "array", "items": schemas.reference(shape, Side::Answer)}));
                metadata.push(json!({"type": "array", "items": {"type": "string"}}));
            }
            Answer::Done => metadata.push(schemas.reference(&NOTHING, Side::Answer)),
            Answer::Content(kind) => {
                content.insert((*kind).to_owned(), json!({"schema": {"type": "string", "format": "binary"}}));
            }
            Answer::Head => {
                all.insert("200".into(), json!({"description": "The headers are the answer"}));
            }
            Answer::Created => {
                let schema = sync(json!({"type": "null"}));
                all.insert(
                    "201".into(),
                    json!({"description": "It is made", "headers": location("Path of what was made"),
                        "content": {"application/json": {"schema": schema}}}),
                );
            }
            Answer::Operation => {
                let schema = json!({"$ref": "#/components/schemas/Async"});
                all.insert(
                    "202".into(),
                    json!({"description": "An operation does it", "headers": location("Path of the operation"),
                        "content": {"application/json": {"schema": schema}}}),
                );
            }
            Answer::Upgrade(protocol) => {
                let text = format!("The connection speaks {protocol} from here on (`Upgrade: {protocol}`)");
                all.insert("101".into(), json!({"description": text}));
            }
        }
    }
    if !metadata.is_empty() {
        let one = metadata.len() == 1;
        let metadata = if one { metadata.remove(0) } else { json!({"anyOf": metadata}) };
        content.insert("application/json".into(), json!({"schema": sync(metadata)}));
    }
    if !content.is_empty() {
        let mut answer = json!({"description": "It is done, or this is it", "content": content});
        let header = |text: &str| json!({"description": text, "schema": {"type": "string"}});
        let conditional = |d: &Described| d.path == row.path && d.parameter("header", "If-Match");
        if row.method == Method::GET && rows::all().any(conditional) {
            answer["headers"] = json!({"ETag": header("For `If-Match` of a change")});
        }
        if described.parameter("query", "after") {
            answer["headers"] =
                json!({"Link": header("The next page (`rel=\"next\"`), as long as there is one")});
        }
        all.insert("200".into(), answer);
    }
    for (status, name, _) in errors(described) {
        all.insert((*status).to_owned(), json!({"$ref": format!("#/components/responses/{name}")}));
    }
    all.insert("default".into(), json!({"$ref": "#/components/responses/Failed"}));
    all.sort_keys();
    all
}

/// The refusals and failures of a row.
fn errors(
    described: &Described,
) -> impl Iterator<Item = &'static (&'static str, &'static str, &'static str)> {
    let conditional = described.parameter("header", "If-Match").then_some(&CHANGED);
    let large = (!matches!(described.body, Body::Nothing)).then_some(&TOO_LARGE);
    ERRORS.iter().chain(conditional).chain(large)
}

fn body(described: &Described, schemas: &mut Schemas) -> Option<Value> {
    let mut content = Map::new();
    let (shapes, kinds): (&[&'static Shape], &[&str]) = match &described.body {
        Body::Nothing => return None,
        Body::Blank => (BLANKS, &[]),
        Body::Json(shape) => (std::slice::from_ref(shape), &[]),
        Body::Content(kinds) => (&[], *kinds),
        Body::Both(shapes, kinds) => (*shapes, *kinds),
    };
    let all: Vec<Value> = shapes.iter().map(|shape| schemas.reference(shape, Side::Request)).collect();
    let schema = match all.as_slice() {
        [] => None,
        [one] => Some(one.clone()),
        several => Some(json!({"anyOf": several})),
    };
    if let Some(schema) = schema {
        content.insert("application/json".into(), json!({"schema": schema}));
    }
    for kind in kinds {
        content.insert((*kind).to_owned(), json!({"schema": {"type": "string", "format": "binary"}}));
    }
    Some(json!({"required": !matches!(described.body, Body::Blank), "content": content}))
}

fn operation(row: &Row, test: &str, described: &Described, schemas: &mut Schemas) -> Value {
    let tag = row.path.split('/').nth(2).unwrap_or("server");
    let mut operation = Map::new();
    operation.insert("operationId".into(), identifier(row).into());
    operation.insert("summary".into(), described.text.into());
    operation.insert("tags".into(), json!([tag]));
    operation.insert("parameters".into(), parameters(row, described, schemas).into());
    if let Some(body) = body(described, schemas) {
        operation.insert("requestBody".into(), body);
    }
    operation.insert("responses".into(), responses(row, described, schemas).into());
    let segments: Vec<String> = row.path.split('/').filter(|s| !s.is_empty()).map(str::to_owned).collect();
    // Where a secret need not be shown it stands for somebody; where it must be, the caller is known besides.
    let secret = |p: &describe::Parameter| {
        ["secret", "X-Incus-secret"].contains(&p.name) && !matches!(p.kind, Kind::Must(_))
    };
    if crate::answers_nobody(&row.method, &segments) || described.parameters.iter().any(secret) {
        operation.insert("security".into(), json!([{}, {"certificate": []}, {"token": []}]));
    }
    operation.insert("x-karst-test".into(), test.into());
    operation.into()
}

/// The document.
pub fn document() -> Value {
    let mut sorted: Vec<&Row> = TABLE.iter().collect();
    sorted.sort_by_key(|r| (r.path, r.method.as_str().to_owned()));
    let mut schemas = Schemas::default();
    let mut paths: Map<String, Value> = Map::new();
    let mut open = vec![];
    for row in sorted {
        match row.state {
            State::Open(why) => {
                open.push(json!({"method": row.method.as_str(), "path": row.path, "reason": why}));
            }
            State::Done(_, test) => {
                // A test sees to it that each row that is served is described.
                let Some(described) = describe::of(&row.method, row.path) else { continue };
                let operation = operation(row, test, described, &mut schemas);
                let path = paths.entry(row.path).or_insert_with(|| json!({}));
                path[row.method.as_str().to_lowercase()] = operation;
            }
        }
    }
    let operation = schemas.reference(&OPERATION, Side::Answer);
    let mut all: Map<String, Value> = schemas.0.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
    all.insert(
        "Async".into(),
        envelope("async", &[("operation", json!({"type": "string"})), ("metadata", operation)]),
    );
    all.insert(
        "Error".into(),
        envelope("error", &[("error", json!({"type": "string"})), ("metadata", json!({"type": "null"}))]),
    );
    all.sort_keys();
    let responses: Map<String, Value> = ERRORS
        .iter()
        .chain([&CHANGED, &TOO_LARGE])
        .map(|(_, name, text)| {
            let schema = json!({"$ref": "#/components/schemas/Error"});
            (
                (*name).to_owned(),
                json!({"description": text, "content": {"application/json": {"schema": schema}}}),
            )
        })
        .collect();
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Karst: the Incus API and what Karst adds",
            "description": "Paths below /1.0/karst are Karst's own. What is asked for stands in `metadata` of the answer's \
                envelope. In a body null is the same as a field that is not there.",
            "version": "1.0",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "https://localhost:8443"}],
        "security": [{"certificate": []}, {"token": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "certificate": {"type": "mutualTLS", "description": "A client certificate that the server trusts"},
                "token": {"type": "http", "scheme": "bearer", "description": "An API token"},
            },
            "responses": responses,
            "schemas": all,
        },
        "x-karst-open": open,
    })
}

/// An envelope: what all have, and these.
fn envelope(kind: &str, own: &[(&str, Value)]) -> Value {
    let mut properties = Map::new();
    properties.insert("type".into(), json!({"type": "string", "enum": [kind]}));
    for name in ["status", "operation", "error"] {
        properties.insert(name.into(), json!({"type": "string"}));
    }
    for name in ["status_code", "error_code"] {
        properties.insert(name.into(), json!({"type": "integer"}));
    }
    properties.extend(own.iter().map(|(name, schema)| ((*name).to_owned(), schema.clone())));
    let required: Vec<&String> = properties.keys().collect();
    json!({"type": "object", "required": required, "properties": properties})
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Every object with this key, with its value and its path in the document.
    fn with_key<'a>(value: &'a Value, key: &str, at: &str, found: &mut Vec<(String, &'a Value)>) {
        match value {
            Value::Object(map) => {
                found.extend(map.get(key).map(|v| (at.to_owned(), v)));
                map.iter().for_each(|(k, v)| with_key(v, key, &format!("{at}/{k}"), found));
            }
            Value::Array(all) => all.iter().for_each(|v| with_key(v, key, &format!("{at}/[]"), found)),
            _ => {}
        }
    }

    #[test]
    fn references_resolve_and_nothing_is_left_over() {
        let document = document();
        let mut references = vec![];
        with_key(&document, "$ref", "", &mut references);
        let mut used = BTreeSet::new();
        for (at, reference) in references {
            let pointer = reference.as_str().and_then(|r| r.strip_prefix('#')).unwrap_or_default();
            assert!(
                document.pointer(pointer).is_some_and(Value::is_object),
                "{at}: {reference} leads nowhere"
            );
            used.insert(pointer.to_owned());
        }
        for part in ["schemas", "responses"] {
            for name in document["components"][part].as_object().unwrap().keys() {
                assert!(used.contains(&format!("/components/{part}/{name}")), "nothing refers to {name}");
            }
        }
    }

    #[test]
    fn it_has_what_openapi_demands() {
        let document = document();
        for key in ["openapi", "info", "paths", "components"] {
            assert!(document.get(key).is_some(), "{key}");
        }
        assert!(document["info"]["title"].is_string() && document["info"]["version"].is_string());
        let (mut names, mut operations) = (BTreeSet::new(), 0);
        for (path, methods) in document["paths"].as_object().unwrap() {
            for (method, operation) in methods.as_object().unwrap() {
                let at = format!("{method} {path}");
                operations += 1;
                let name = operation["operationId"].as_str().unwrap();
                assert!(names.insert(name.to_owned()), "{at}: {name} twice");
                assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'), "{at}: {name}");
                let mut declared = BTreeSet::new();
                for parameter in operation["parameters"].as_array().unwrap() {
                    let place = parameter["in"].as_str().unwrap();
                    let name = parameter["name"].as_str().unwrap();
                    assert!(declared.insert((place, name)), "{at}: {place} {name} twice");
                    assert!(parameter["schema"].is_object(), "{at}: {name}");
                    assert!(place != "path" || path.contains(&format!("{{{name}}}")), "{at}: {name}");
                }
                let in_path = declared.iter().filter(|(place, _)| *place == "path").count();
                assert_eq!(in_path, path.matches('{').count(), "{at}");
                let responses = operation["responses"].as_object().unwrap();
                assert!(
                    responses.keys().any(|s| s.starts_with(['1', '2'])),
                    "{at}: no answer when all is well"
                );
                for (status, response) in responses {
                    assert!(
                        status == "default" || (status.len() == 3 && status.parse::<u16>().is_ok()),
                        "{at}"
                    );
                    let told = response.get("$ref").is_some() || response["description"].is_string();
                    assert!(told, "{at}: {status}");
                }
                if let Some(body) = operation.get("requestBody") {
                    assert!(body["content"].as_object().is_some_and(|c| !c.is_empty()), "{at}");
                }
            }
        }
        let served = TABLE.iter().filter(|r| matches!(r.state, State::Done(..))).count();
        assert_eq!(operations, served);
        assert_eq!(document["x-karst-open"].as_array().unwrap().len(), TABLE.len() - served);
    }

    /// Each name stands for one shape, and a shape is that of a request or that of an answer.
    #[test]
    fn names_of_schemas_are_unique() {
        fn below(kind: &Kind, all: &mut Vec<&'static Shape>) {
            match kind {
                Kind::Object(shape) => {
                    all.push(shape);
                    shape.fields.iter().for_each(|(_, kind)| below(kind, all));
                }
                Kind::List(k) | Kind::Map(k) | Kind::Nullable(k) | Kind::Maybe(k) | Kind::Must(k) => {
                    below(k, all)
                }
                Kind::Either(kinds) => kinds.iter().for_each(|k| below(k, all)),
                _ => {}
            }
        }
        let (mut requests, mut answers) = (vec![], vec![]);
        for described in rows::all() {
            described.shapes().into_iter().for_each(|shape| below(&Kind::Object(shape), &mut requests));
            for answer in described.answers {
                match answer {
                    Answer::Sync(kind) => below(kind, &mut answers),
                    Answer::Listed(shape) => below(&Kind::Object(shape), &mut answers),
                    _ => {}
                }
            }
        }
        let mut by_name: BTreeMap<&str, (*const Shape, bool)> = BTreeMap::new();
        let all = requests.iter().map(|s| (*s, true)).chain(answers.iter().map(|s| (*s, false)));
        for (shape, request) in all {
            let known = by_name.entry(shape.name).or_insert((std::ptr::from_ref(shape), request));
            assert_eq!(*known, (std::ptr::from_ref(shape), request), "{}", shape.name);
            assert!(request || shape.carried.is_empty(), "{} is no request", shape.name);
            assert!(!["Async", "Config", "Devices", "Error"].contains(&shape.name), "{}", shape.name);
        }
    }
}
