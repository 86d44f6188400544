//! Secrets of projects, and volumes that are encrypted with them.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::common::Server;
use serde_json::json;

const UUID: &str = "a2b1c0d9-0000-4000-8000-000000000001";
const SECRETS: &str = "/1.0/karst/secrets";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_of_projects_live() {
    let s = Server::start().await;
    let whole = json!({"uuid": UUID, "description": "of a test", "type": "volume", "usage": "/v1", "private": true,
        "ephemeral": false, "value": "open sesame"});
    // Without a key nothing is kept, and nothing is made that could not be.
    s.post(SECRETS, whole.clone()).await.refused(503);
    assert_eq!(s.get(SECRETS).await.metadata(), json!([]));
    s.engine.set_secret_key(karst_engine::secrets::SecretKey::new(&[7; 32]).unwrap());
    let made = s.post(SECRETS, whole.clone()).await.metadata();
    let shown = json!({"uuid": UUID, "description": "of a test", "type": "volume", "usage": "/v1", "private": true,
        "ephemeral": false});
    assert_eq!(made, shown, "and no value");
    assert_eq!(s.get(SECRETS).await.metadata(), json!([shown]));
    s.post(SECRETS, whole).await.refused(409);
    let drawn = s.post(SECRETS, json!({})).await.metadata();
    assert!(drawn["uuid"].as_str().is_some_and(|u| u.len() == 36) && drawn["type"] == "none", "{drawn}");
    for (body, word) in [
        (json!({"type": "nfs"}), "nfs"),
        (json!({"type": "volume"}), "usage"),
        (json!({"uuid": "mine"}), "mine"),
    ] {
        let text = s.post(SECRETS, body).await.refused(400);
        assert!(text.contains(word), "{text}");
    }

    // A volume names it; another that is not there is named.
    let volumes = "/1.0/storage-pools/default/volumes/custom";
    let volume = |name: &str, secret: &str| {
        json!({"name": name, "content_type": "block", "config": {"size": "64MiB", "encryption.secret": secret,
            "encryption.cipher": "aes-128-xts"}})
    };
    let made = s.post(volumes, volume("v1", UUID)).await;
    assert!([201, 202].contains(&made.status), "{}", made.status);
    let config = s.get(&format!("{volumes}/v1")).await.metadata()["config"].clone();
    assert_eq!(config["encryption.secret"], json!(UUID));
    let gone = UUID.replace('1', "2");
    let text = s.post(volumes, volume("v2", &gone)).await.refused(404);
    assert!(text.contains(&gone), "{text}");
    let text =
        s.post(volumes, json!({"name": "v3", "config": {"encryption.secret": UUID}})).await.refused(400);
    assert!(text.contains("block volumes"), "{text}");

    // Another value, and none; what is used may go too.
    let one = format!("{SECRETS}/{UUID}");
    s.put(&one, json!({"value": "open barley"})).await.metadata();
    let text = s.put(&one, json!({})).await.refused(400);
    assert!(text.contains("value"), "{text}");
    s.put(&format!("{SECRETS}/mine"), json!({"value": "x"})).await.refused(404);
    s.delete(&one).await.metadata();
    s.delete(&one).await.refused(404);
    assert_eq!(s.get(SECRETS).await.metadata(), json!([drawn]));
    let records = format!("{:?}", s.engine.inner().inventory.read());
    assert!(!records.contains("sesame") && !records.contains("barley"));
}
