//! Layers of disks, over a socket: they are put there, shown, and made one again.

use crate::common::Server;
use serde_json::json;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layers_of_disks_live() {
    let s = Server::start().await;
    let body = json!({"name": "v1", "type": "virtual-machine", "source": {"type": "none"}, "start": true});
    s.done(s.post("/1.0/instances", body).await).await;
    let at = "/1.0/karst/instances/v1/layers";
    let names = async || {
        let all = s.get(at).await.metadata();
        assert_eq!((all[0]["device"].as_str(), all[0]["owned"].as_bool()), (Some("root"), Some(true)));
        let layers = all[0]["layers"].as_array().unwrap().clone();
        layers.into_iter().map(|l| l["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert!(names().await.is_empty());
    s.done(s.post(at, json!({"snapshot": "before", "description": "an update"})).await).await;
    s.done(s.post(at, json!({"device": "root", "name": "mine"})).await).await;
    assert_eq!(names().await, ["instances/v1.before", "mine"]);
    s.post(at, json!({"name": "mine"})).await.refused(400);
    s.post(at, json!({"device": "root", "name": "mine"})).await.refused(409);
    s.post(&format!("{at}/commit"), json!({"top": "nope"})).await.refused(404);
    s.post(&format!("{at}/commit"), json!({"bandwidth": -1})).await.refused(400);
    s.get("/1.0/karst/instances/nobody/layers").await.refused(404);
    let commit = json!({"device": "root", "base": "instances/v1.before", "bandwidth": 0});
    s.done(s.post(&format!("{at}/commit"), commit).await).await;
    assert_eq!(names().await, ["instances/v1.before"]);
    s.done(s.post(&format!("{at}/pull"), json!({})).await).await;
    assert!(names().await.is_empty());
    s.done(s.delete("/1.0/instances/v1/snapshots/before").await).await;
}
