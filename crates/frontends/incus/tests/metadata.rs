//! What is kept of an image's metadata with an instance, and its templates.
#![allow(clippy::disallowed_methods)] // a test

use crate::common::Server;
use hyper::Method;
use serde_json::json;

const METADATA: &str = "/1.0/instances/c1/metadata";
const TEMPLATES: &str = "/1.0/instances/c1/metadata/templates";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metadata_and_templates_live() {
    let s = Server::start().await;
    s.container("c1", false).await;
    let read = s.get(METADATA).await;
    assert_eq!(
        (&read.metadata()["architecture"], &read.metadata()["templates"]),
        (&json!("x86_64"), &json!({}))
    );
    assert_eq!(s.get(TEMPLATES).await.metadata(), json!([]));

    let template = format!("{TEMPLATES}?path=motd.tpl");
    let text = "{{ trigger }} of {{ container.name }} {{ config_get(\"user.a\", properties.a) }}\n";
    let octets = [("content-type", "application/octet-stream")];
    s.send(Method::POST, &template, &octets, text).await.metadata();
    assert_eq!(s.get(TEMPLATES).await.metadata(), json!(["motd.tpl"]));
    let back = s.get(&template).await;
    assert_eq!((back.header("content-type"), &back.body[..]), ("application/octet-stream", text.as_bytes()));

    let read = s.get(METADATA).await;
    let mut body = read.metadata();
    body["properties"] = json!({"os": "own"});
    body["templates"] = json!({
        "/etc/motd": {"when": ["create", "copy", "start"], "template": "motd.tpl", "create_only": false,
                      "properties": {"a": "b"}, "uid": "1000", "gid": "", "mode": "0600"},
    });
    let etag = read.header("etag").to_owned();
    let stale = [("if-match", "\"0000\"")];
    s.send(Method::PUT, METADATA, &stale, body.to_string()).await.refused(412);
    s.send(Method::PUT, METADATA, &[("if-match", &etag)], body.to_string()).await.metadata();
    s.send(Method::PUT, METADATA, &[("if-match", &etag)], body.to_string()).await.refused(412);
    s.patch(METADATA, json!({"properties": {"release": "1"}})).await.metadata();
    let now = s.get(METADATA).await.metadata();
    assert_eq!(now["properties"], json!({"os": "own", "release": "1"}));
    let rule = &now["templates"]["/etc/motd"];
    assert_eq!(
        (&rule["when"], &rule["properties"], &rule["uid"], &rule["gid"], &rule["mode"]),
        (
            &json!(["create", "copy", "start"]),
            &json!({"a": "b"}),
            &json!("1000"),
            &json!(null),
            &json!("0600")
        )
    );

    // An image of it has them, its instances wait for their first start, and a copy for its own.
    let publish = json!({"source": {"type": "instance", "name": "c1"}, "aliases": [{"name": "mine"}]});
    let json = [("content-type", "application/json")];
    s.done(s.send(Method::POST, "/1.0/images", &json, publish.to_string()).await).await;
    let launched = json!({"name": "c2", "source": {"type": "image", "alias": "mine"}});
    s.done(s.post("/1.0/instances", launched).await).await;
    let waits = async |name: &str| {
        let found = s.get(&format!("/1.0/instances/{name}")).await.metadata();
        found["config"]["volatile.apply_template"].clone()
    };
    assert_eq!(waits("c2").await, json!("create"));
    assert_eq!(s.get("/1.0/instances/c2/metadata").await.metadata()["templates"], now["templates"]);
    let copied = json!({"name": "c3", "source": {"type": "copy", "source": "c2"}});
    s.done(s.post("/1.0/instances", copied).await).await;
    assert_eq!(waits("c3").await, json!("copy"));
    s.done(s.put("/1.0/instances/c2/state", json!({"action": "start"})).await).await;
    assert_eq!(waits("c2").await, json!(null));
    let started = json!({"name": "c4", "source": {"type": "image", "alias": "mine"}, "start": true});
    s.done(s.post("/1.0/instances", started).await).await;
    assert_eq!(waits("c4").await, json!(null));

    // What is wrong is said, and changes nothing.
    for (body, field) in [
        (json!({"templates": {"/etc/x": {"when": ["boot"], "template": "a"}}}), "templates./etc/x.when"),
        (json!({"templates": {"/../x": {"when": ["start"], "template": "a"}}}), "templates./../x"),
        (
            json!({"templates": {"/etc/x": {"when": ["start"], "template": "a/b"}}}),
            "templates./etc/x.template",
        ),
        (json!({"templates": {"/etc/x": {"when": ["start"], "template": "a", "mode": "999"}}}), ".mode"),
        (json!({"templates": {"/etc/x": {"whn": ["start"]}}}), "templates./etc/x.whn"),
        (json!({"templates": []}), "templates"),
        (json!({"propertie": {}}), "propertie"),
    ] {
        let said = s.patch(METADATA, body).await.refused(400);
        assert!(said.contains(field), "{said}");
    }
    assert_eq!(s.get(METADATA).await.metadata(), now);
    for (path, body, says) in [
        ("?path=a/b", "x", "name of a template"),
        ("", "x", "?path=NAME"),
        ("?path=x", "{% include \"/etc/shadow\" %}", "line 1"),
        ("?path=x", "{{ open", "not closed"),
    ] {
        let said = s.send(Method::POST, &format!("{TEMPLATES}{path}"), &octets, body).await.refused(400);
        assert!(said.contains(says), "{said}");
    }
    s.send(Method::POST, &format!("{TEMPLATES}?path=x"), &octets, vec![b'x'; 40 << 10]).await.refused(413);
    s.send(Method::POST, &format!("{TEMPLATES}?path=x"), &octets, &[0xffu8, 0xfe][..]).await.refused(400);
    s.get(&format!("{TEMPLATES}?path=nope")).await.refused(404);
    s.delete(&format!("{TEMPLATES}?path=nope")).await.refused(404);
    s.get("/1.0/instances/nope/metadata").await.refused(404);
    s.send(Method::POST, "/1.0/instances/nope/metadata/templates?path=x", &octets, "x").await.refused(404);

    // A template that is gone stops the start that needs it, and says which.
    s.delete(&template).await.metadata();
    s.delete(&template).await.refused(404);
    let said = s.put("/1.0/instances/c1/state", json!({"action": "start"})).await.refused(400);
    assert!(said.contains("templates./etc/motd") && said.contains("motd.tpl"), "{said}");
}
