//! Images that are made of what is there, over the API.
#![allow(clippy::disallowed_methods)] // a test

mod common;

use common::{Answer, Server};
use hyper::Method;
use serde_json::{Value, json};

/// What is no upload says so, as every client does.
async fn publish(s: &Server, body: Value) -> Answer {
    let json = [("content-type", "application/json")];
    s.send(Method::POST, "/1.0/images", &json, body.to_string()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_are_published() {
    let s = Server::start().await;
    s.container("c1", true).await;
    s.done(s.post("/1.0/instances/c1/snapshots", json!({"name": "snap"})).await).await;
    let body = json!({
        "source": {"type": "instance", "name": "c1"},
        "aliases": [{"name": "mine", "description": "made"}],
        "properties": {"os": "own"},
        "public": true,
        "expires_at": "2100-01-01T00:00:00Z",
        "compression_algorithm": "zstd",
    });
    let made = s.done(publish(&s, body.clone()).await).await;
    let fingerprint = made["metadata"]["fingerprint"].as_str().expect("the fingerprint").to_owned();
    let image = s.get(&format!("/1.0/images/{fingerprint}")).await.metadata();
    assert_eq!(
        (&image["aliases"], &image["public"], &image["properties"]["os"], &image["expires_at"]),
        (
            &json!([{"name": "mine", "description": "made"}]),
            &json!(true),
            &json!("own"),
            &json!("2100-01-01T00:00:00Z")
        )
    );
    publish(&s, body).await.refused(409);
    let of_snapshot =
        json!({"source": {"type": "snapshot", "name": "c1/snap"}, "properties": {"os": "then"}});
    let made = s.done(publish(&s, of_snapshot).await).await;
    assert_ne!(made["metadata"]["fingerprint"], fingerprint);
    for (body, status) in [
        (json!({"source": {"type": "instance", "name": "nope"}}), 404),
        (json!({"source": {"type": "instance"}}), 400),
        (json!({"source": {"type": "snapshot", "name": "c1"}}), 400),
        (json!({"source": {"type": "snapshot", "name": "c1/nope"}}), 404),
        (json!({"source": {"type": "nonsense", "name": "c1"}}), 400),
        (json!({"source": {"type": "instance", "name": "c1", "nme": ""}}), 400),
        (json!({"source": {"type": "instance", "name": "c1"}, "compression_algorithm": "rar"}), 400),
        (json!({"source": {"type": "instance", "name": "c1"}, "aliases": [{"name": "a b"}]}), 400),
        (json!({"source": {"type": "instance", "name": "c1"}, "aliases": "a"}), 400),
        (json!({"source": {"type": "instance", "name": "c1"}, "expires_at": "2000-01-01T00:00:00Z"}), 400),
        (json!({"source": {"type": "instance", "name": "c1", "project": "nope"}}), 404),
    ] {
        publish(&s, body).await.refused(status);
    }
    assert_eq!(
        s.get("/1.0/images").await.metadata().as_array().unwrap().len(),
        2,
        "the refused left nothing"
    );
    let launched = json!({"name": "c2", "source": {"type": "image", "alias": "mine"}});
    s.done(s.post("/1.0/instances", launched).await).await;
    let path = format!("/1.0/images/{fingerprint}");
    s.patch(&path, json!({"expires_at": "2101-01-01T00:00:00Z"})).await.metadata();
    assert_eq!(s.get(&path).await.metadata()["expires_at"], "2101-01-01T00:00:00Z");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_are_rebuilt() {
    let s = Server::start().await;
    s.container("c1", true).await;
    let body = json!({"source": {"type": "instance", "name": "c1"}, "aliases": [{"name": "mine"}], "properties": {"os": "own"}});
    let made = s.done(publish(&s, body).await).await;
    let rebuild = "/1.0/instances/c1/rebuild";
    let of_image = json!({"source": {"type": "image", "alias": "mine"}});
    s.post(rebuild, of_image.clone()).await.refused(409);
    s.done(s.put("/1.0/instances/c1/state", json!({"action": "stop", "force": true})).await).await;
    s.patch("/1.0/instances/c1", json!({"config": {"user.a": "kept"}})).await.metadata();
    s.done(s.post(rebuild, of_image).await).await;
    let c1 = s.get("/1.0/instances/c1").await.metadata();
    assert_eq!(
        (&c1["config"]["volatile.base_image"], &c1["config"]["image.os"], &c1["config"]["user.a"]),
        (&made["metadata"]["fingerprint"], &json!("own"), &json!("kept"))
    );
    s.done(s.post(rebuild, json!({"source": {"type": "none"}})).await).await;
    assert_eq!(s.get("/1.0/instances/c1").await.metadata()["config"]["volatile.base_image"], json!(null));
    for (body, status) in [
        (json!({"source": {"type": "image", "alias": "nope"}}), 404),
        (json!({"source": {"type": "image"}}), 400),
        (json!({}), 400),
        (json!({"source": {"type": "none"}, "nonsense": 1}), 400),
    ] {
        s.post(rebuild, body).await.refused(status);
    }
    s.post("/1.0/instances/nope/rebuild", json!({"source": {"type": "none"}})).await.refused(404);
}
