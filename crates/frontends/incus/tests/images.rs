//! Images that are made of what is there, over the API.
#![allow(clippy::disallowed_methods)] // a test

use crate::common::{Answer, Server, unused_address};
use hyper::Method;
use karst_frontend_incus::servers::NetworkServers;
use karst_model::access::Principal;
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_begin_as_images_of_other_projects() {
    let s = Server::start().await;
    let project = json!({"name": "other", "config": {"features.profiles": "false"}});
    assert_eq!(s.post("/1.0/projects", project).await.status, 201);
    // One of the same alias in each.
    let publish = async |query: &str, content: &'static str| {
        let headers = [("x-incus-aliases", "alias=web"), ("x-incus-properties", "os=Mine")];
        let made =
            s.done(s.send(Method::POST, &format!("/1.0/images{query}"), &headers, content).await).await;
        made["metadata"]["fingerprint"].as_str().expect("the fingerprint").to_owned()
    };
    let (shared, own) = (publish("", "one").await, publish("?project=other", "another").await);
    assert_ne!(shared, own);
    let image = |project: &str| json!({"type": "image", "alias": "web", "project": project});
    let by_properties = json!({"type": "image", "properties": {"os": "Mine"}, "project": "default"});
    for (name, source, wanted) in [
        ("c1", json!({"type": "image", "alias": "web"}), &own),
        ("c2", image(""), &own),
        ("c3", image("other"), &own),
        ("c4", image("default"), &shared),
        ("c5", by_properties, &shared),
    ] {
        let body = json!({"name": name, "architecture": "x86_64", "source": source});
        s.done(s.post("/1.0/instances?project=other", body).await).await;
        let made = s.get(&format!("/1.0/instances/{name}?project=other")).await.metadata();
        assert_eq!(made["config"]["volatile.base_image"], json!(wanted), "{name}");
    }
    let rebuild = "/1.0/instances/c1/rebuild?project=other";
    s.done(s.post(rebuild, json!({"source": image("default")})).await).await;
    let made = s.get("/1.0/instances/c1?project=other").await.metadata();
    assert_eq!(made["config"]["volatile.base_image"], json!(shared));
    assert!(s.post(rebuild, json!({"source": image("nope")})).await.refused(404).contains("source.project"));
}

/// A server on the network, and its address and certificate.
async fn listening() -> (Server, String, String) {
    let s = Server::start().await;
    let address = unused_address();
    let config = json!({"config": {"core.https_address": address.to_string()}});
    assert_eq!(s.put("/1.0", config).await.status, 200);
    let certificate = s.app.info.identity.as_ref().unwrap().certificate.clone();
    (s, format!("https://{address}"), certificate)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_come_from_servers() {
    let (far, server, certificate) = listening().await;
    let here = Server::start().await;
    here.engine.set_image_servers(std::sync::Arc::new(NetworkServers::new()));
    let headers =
        [("x-incus-aliases", "alias=open"), ("x-incus-public", "1"), ("x-incus-properties", "os=Far")];
    let open = far.done(far.send(Method::POST, "/1.0/images", &headers, "an open image").await).await;
    let open = open["metadata"]["fingerprint"].as_str().unwrap().to_owned();
    let hidden = far.done(far.send(Method::POST, "/1.0/images", &[], "a hidden image").await).await;
    let hidden = hidden["metadata"]["fingerprint"].as_str().unwrap().to_owned();
    let source = |more: Value| {
        let mut source = json!({"type": "image", "mode": "pull", "protocol": "incus", "server": server, "certificate": certificate});
        source.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        source
    };
    let failed = async |body: Value| {
        let ended = here.wait(publish(&here, body).await).await;
        assert_eq!(ended["status"], "Failure", "{ended}");
        ended["err"].as_str().unwrap().to_owned()
    };

    // A public one, by its alias, into one that follows.
    let body = json!({"source": source(json!({"fingerprint": "open"})), "aliases": [{"name": "mine"}], "auto_update": true});
    let done = here.done(publish(&here, body).await).await;
    assert_eq!(done["metadata"]["fingerprint"], *open);
    let image = here.get(&format!("/1.0/images/{open}")).await.metadata();
    assert_eq!(
        (
            &image["auto_update"],
            &image["update_source"]["alias"],
            &image["properties"]["os"],
            &image["aliases"][0]["name"]
        ),
        (&json!(true), &json!("open"), &json!("Far"), &json!("mine"))
    );
    let refreshed = here.done(here.post(&format!("/1.0/images/{open}/refresh"), json!({})).await).await;
    assert_eq!(refreshed["metadata"]["refreshed"], false);

    // One that is not public needs a secret.
    let body = json!({"source": source(json!({"fingerprint": hidden}))});
    assert!(failed(body).await.contains("has no image"));
    let made = far.post(&format!("/1.0/images/{hidden}/secret"), json!({})).await;
    let secret = made.metadata()["metadata"]["secret"].as_str().unwrap().to_owned();
    let kept = far.done(made).await;
    assert_eq!(
        (&kept["metadata"]["fingerprint"], &kept["metadata"]["secret"]),
        (&json!(hidden), &json!(null))
    );
    let wrong = json!({"source": source(json!({"fingerprint": open, "secret": secret.replace(|c: char| c.is_ascii_digit(), "a")}))});
    here.done(publish(&here, wrong).await).await;
    let body = json!({"source": source(json!({"fingerprint": hidden, "secret": secret}))});
    here.done(publish(&here, body).await).await;
    here.post(&format!("/1.0/images/{hidden}/refresh"), json!({})).await.refused(400);

    // What is wrong with a request is said at once, with a server by the operation.
    for (source, status) in [
        (json!({"type": "image", "server": "http://127.0.0.1:1", "alias": "x"}), 400),
        (json!({"type": "image", "server": server}), 400),
        (json!({"type": "image", "server": server, "alias": "x", "protocol": "ftp"}), 400),
        (json!({"type": "image", "server": server, "alias": "x", "mode": "push"}), 400),
        (json!({"type": "image", "server": server, "alias": "x", "srv": 1}), 400),
    ] {
        publish(&here, json!({"source": source})).await.refused(status);
    }
    assert!(failed(json!({"source": source(json!({"alias": "nope"}))})).await.contains("has no image"));
    let other = Server::start().await.app.info.identity.as_ref().unwrap().certificate.clone();
    let text = failed(json!({"source": source(json!({"alias": "open", "certificate": other}))})).await;
    assert!(text.contains("cannot be reached"), "another certificate: {text}");
    let text = failed(json!({"source": source(json!({"alias": "open", "certificate": "nonsense"}))})).await;
    assert!(text.contains("PEM"), "{text}");

    // A launch fetches, and keeps what it fetched for the next.
    here.done(here.delete(&format!("/1.0/images/{open}")).await).await;
    for name in ["c1", "c2"] {
        let body = json!({"name": name, "source": source(json!({"alias": "open"}))});
        here.done(here.post("/1.0/instances", body).await).await;
        let c = here.get(&format!("/1.0/instances/{name}")).await.metadata();
        assert_eq!(
            (&c["config"]["volatile.base_image"], &c["config"]["image.os"]),
            (&json!(open), &json!("Far"))
        );
    }
    assert_eq!(here.get(&format!("/1.0/images/{open}")).await.metadata()["cached"], true);
    let body = json!({"name": "c3", "source": source(json!({"alias": "nope"}))});
    let ended = here.wait(here.post("/1.0/instances", body).await).await;
    assert_eq!(ended["status"], "Failure");
    here.get("/1.0/instances/c3").await.refused(404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_are_pushed_to_servers() {
    let (far, server, certificate) = listening().await;
    assert_eq!(far.post("/1.0/projects", json!({"name": "there"})).await.status, 201);
    let here = Server::start().await;
    here.engine.set_image_servers(std::sync::Arc::new(NetworkServers::new()));
    let properties = [("x-incus-properties", "os=Here"), ("x-incus-filename", "some image.tar")];
    let image =
        here.done(here.send(Method::POST, "/1.0/images", &properties, "an image to push").await).await;
    let image = image["metadata"]["fingerprint"].as_str().unwrap().to_owned();
    let export = format!("/1.0/images/{image}/export");
    let awaited = async |project: &str, more: Value| {
        let mut body = json!({"source": {"type": "", "mode": "push", "fingerprint": image}});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let json = [("content-type", "application/json")];
        let path = format!("/1.0/images?project={project}");
        let answer = far.send(Method::POST, &path, &json, body.to_string()).await;
        assert_eq!(answer.status, 202, "{}", answer.json());
        let secret = answer.json()["metadata"]["metadata"]["secret"].as_str().unwrap().to_owned();
        // The answer alone has it: who else sees the project sees the operation.
        let operation = answer.json()["operation"].as_str().unwrap().to_owned();
        for path in [operation.clone(), format!("{operation}/wait"), "/1.0/operations?recursion=1".into()] {
            let seen = far.get(&path).await.json();
            assert!(!seen.to_string().contains(&secret), "{path}: {seen}");
        }
        secret
    };
    let to = |secret: &str, project: &str| {
        // As clients do, which name all aliases that it has here.
        json!({"target": server, "certificate": certificate, "secret": secret, "project": project,
            "aliases": [{"name": "unwanted", "description": ""}]})
    };
    let failed = async |body: Value| {
        let ended = here.wait(here.post(&export, body).await).await;
        assert_eq!(ended["status"], "Failure", "{ended}");
        ended["err"].as_str().unwrap().to_owned()
    };

    // Into a project there, public and by the names that were said where the secret was made.
    let said = json!({"public": true, "aliases": [{"name": "pushed", "description": "d"}], "properties": {"os": "There"}});
    let secret = awaited("there", said).await;
    assert!(failed(to(&secret, "default")).await.contains("secret"), "it is for another project");
    let wrong: String = secret.chars().rev().collect();
    assert!(failed(to(&wrong, "there")).await.contains("secret"));
    here.done(here.post(&export, to(&secret, "there")).await).await;
    let got = far.get(&format!("/1.0/images/{image}?project=there")).await.metadata();
    assert_eq!(
        (&got["public"], &got["properties"]["os"], &got["filename"], &got["aliases"]),
        (
            &json!(true),
            &json!("There"),
            &json!("some_image.tar"),
            &json!([{"name": "pushed", "description": "d"}])
        ),
    );
    let bytes = far.get(&format!("/1.0/images/{image}/export?project=there")).await;
    assert_eq!(&bytes.body[..], b"an image to push");
    // Used up; and what is there is awaited no more.
    assert!(failed(to(&secret, "there")).await.contains("secret"));
    let body = json!({"source": {"mode": "push", "fingerprint": image}}).to_string();
    let json = [("content-type", "application/json")];
    far.send(Method::POST, "/1.0/images?project=there", &json, body).await.refused(409);

    // Whoever has no secret brings nothing, and a secret opens nothing else.
    let secret = awaited("default", json!({})).await;
    let nobody = Principal::anonymous();
    for (method, path) in [
        (Method::POST, "/1.0/images".to_owned()),
        (Method::GET, format!("/1.0/operations/{}/wait", uuid::Uuid::nil())),
        (Method::GET, format!("/1.0/operations/{}/wait?secret={secret}", uuid::Uuid::nil())),
    ] {
        assert_eq!(far.send_as(nobody.clone(), method, &path, "x".into()).await.status, 403, "{path}");
    }
    // Another image than the one that is awaited is not taken in.
    let other = here.done(here.send(Method::POST, "/1.0/images", &[], "another image").await).await;
    let other = other["metadata"]["fingerprint"].as_str().unwrap();
    let ended = here.wait(here.post(&format!("/1.0/images/{other}/export"), to(&secret, "")).await).await;
    assert!(ended["err"].as_str().unwrap().contains("secret"), "{ended}");
    here.done(here.post(&export, to(&secret, "")).await).await;
    assert_eq!(far.get(&format!("/1.0/images/{image}")).await.metadata()["public"], false);

    // What is wrong with a request is said at once, with the server by the operation.
    for (body, field) in [
        (json!({"target": server}), "secret"),
        (json!({"secret": "x"}), "target"),
        (json!({"target": "http://a.example", "secret": "x"}), "https"),
        (json!({"target": server, "secret": "x", "frobnicate": 1}), "frobnicate"),
    ] {
        assert!(here.post(&export, body).await.refused(400).contains(field), "{field}");
    }
    here.post(&format!("/1.0/images/{}/export", "0".repeat(64)), to("x", "")).await.refused(404);
    for (source, field) in [
        (json!({"mode": "push"}), "source.fingerprint"),
        (json!({"mode": "push", "fingerprint": "abc"}), "fingerprint"),
        (json!({"mode": "push", "fingerprint": image, "server": "https://a.example"}), "source.server"),
    ] {
        let text = publish(&here, json!({"source": source})).await.refused(400);
        assert!(text.contains(field), "{field}: {text}");
    }
    let unknown = Server::start().await.app.info.identity.as_ref().unwrap().certificate.clone();
    let body = json!({"target": server, "certificate": unknown, "secret": "x"});
    assert!(failed(body).await.contains("cannot be reached"), "another certificate");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_are_moved() {
    let s = Server::start().await;
    s.container("c1", false).await;
    s.done(s.post("/1.0/instances/c1/snapshots", json!({"name": "snap"})).await).await;
    let pool = json!({"name": "second", "driver": "dir", "config": {}});
    assert_eq!(s.post("/1.0/storage-pools", pool).await.status, 201);
    let before = s.get("/1.0/instances/c1").await.metadata();
    let elsewhere =
        json!({"name": "c1", "migration": true, "pool": "second", "live": false, "config": {"user.a": "b"}});
    s.done(s.post("/1.0/instances/c1", elsewhere.clone()).await).await;
    let after = s.get("/1.0/instances/c1").await.metadata();
    assert_eq!(
        (&after["devices"]["root"]["pool"], &after["config"]["user.a"], &after["config"]["volatile.uuid"]),
        (&json!("second"), &json!("b"), &before["config"]["volatile.uuid"])
    );
    assert_eq!(after["config"]["volatile.eth0.hwaddr"], before["config"]["volatile.eth0.hwaddr"]);
    let restore = json!({"restore": "snap"});
    s.done(s.put("/1.0/instances/c1", restore).await).await;
    s.post("/1.0/instances/c1", elsewhere).await.refused(400);

    assert_eq!(
        s.post("/1.0/projects", json!({"name": "other", "config": {"features.profiles": "false"}}))
            .await
            .status,
        201
    );
    let there = json!({"name": "c9", "migration": true, "project": "other"});
    s.done(s.post("/1.0/instances/c1", there).await).await;
    s.get("/1.0/instances/c1").await.refused(404);
    let moved = s.get("/1.0/instances/c9?project=other").await.metadata();
    assert_eq!((&moved["devices"]["root"]["pool"], &moved["project"]), (&json!("second"), &json!("other")));
    for (body, status) in [
        (json!({"name": "c9", "migration": true, "pool": "nope"}), 404),
        (json!({"name": "c9", "migration": true, "project": "nope"}), 404),
        (json!({"name": "c9", "migration": true, "pool": "default", "instance_only": true}), 400),
        (json!({"name": "c9", "migration": true, "pool": "default", "target": "node9"}), 400),
        (json!({"name": "c9", "migration": true, "pool": "default", "pol": ""}), 400),
    ] {
        s.post("/1.0/instances/c9?project=other", body).await.refused(status);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disks_become_images() {
    let s = Server::start().await;
    let send = async |format: &str, body: &'static [u8]| {
        let headers = [("x-karst-disk-format", format), ("x-incus-aliases", "alias=disk")];
        s.send(Method::POST, "/1.0/images", &headers, body).await
    };
    const SECTOR: &[u8] = &[7; 512];
    let made = s.done(send("raw", SECTOR).await).await;
    let fingerprint = made["metadata"]["fingerprint"].as_str().unwrap();
    assert_eq!(s.get(&format!("/1.0/images/{fingerprint}")).await.metadata()["type"], "virtual-machine");
    let launched =
        json!({"name": "v1", "type": "virtual-machine", "source": {"type": "image", "alias": "disk"}});
    s.done(s.post("/1.0/instances", launched).await).await;
    assert!(send("iso", SECTOR).await.refused(400).contains("vmdk"));
    assert!(send("vmdk", b"").await.refused(400).contains("empty"));
    let headers = [("x-karst-disk-format", "raw"), ("content-type", "multipart/form-data; boundary=x")];
    s.send(Method::POST, "/1.0/images", &headers, "--x--").await.refused(400);
    let ended = s.wait(send("vmdk", SECTOR).await).await;
    assert!(ended["err"].as_str().unwrap().contains("not a vmdk disk"), "{ended}");
    assert_eq!(s.get("/1.0/images").await.metadata().as_array().unwrap().len(), 1, "nothing is left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_are_uploaded_listed_and_exported() {
    let s = Server::start().await;
    let headers = [
        ("x-incus-filename", "u.tar.gz"),
        ("x-incus-properties", "distro=x&os=Debian"),
        ("x-incus-aliases", "alias=deb"),
    ];
    let operation = s.done(s.send(Method::POST, "/1.0/images", &headers, "a unified image").await).await;
    let fingerprint = operation["metadata"]["fingerprint"].as_str().expect("the fingerprint").to_owned();
    assert_eq!(fingerprint.len(), 64);
    let list = s.get("/1.0/images?recursion=1").await.metadata();
    assert_eq!(
        (list[0]["fingerprint"].as_str(), list[0]["properties"]["distro"].as_str()),
        (Some(&*fingerprint), Some("x"))
    );
    assert_eq!(
        (list[0]["aliases"][0]["name"].as_str(), list[0]["type"].as_str()),
        (Some("deb"), Some("container"))
    );
    assert_eq!(
        s.get("/1.0/images?all-projects=true").await.metadata(),
        json!([format!("/1.0/images/{fingerprint}")])
    );
    assert_eq!(s.get("/1.0/images?filter=properties.os+eq+fedora&recursion=1").await.metadata(), json!([]));
    let export = s.get(&format!("/1.0/images/{}/export", &fingerprint[..12])).await;
    assert_eq!((&export.body[..], export.header("x-incus-type")), (&b"a unified image"[..], "incus"));
    let got = s.get(&format!("/1.0/images/{fingerprint}")).await;
    let tag = got.header("etag").to_owned();
    let body = json!({"auto_update": false, "properties": {"os": "mine"}, "public": false, "profiles": ["default"], "expires_at": "0001-01-01T00:00:00Z"});
    let path = format!("/1.0/images/{fingerprint}");
    s.send(Method::PUT, &path, &[("if-match", &tag)], body.to_string()).await.metadata();
    s.send(Method::PUT, &path, &[("if-match", &tag)], body.to_string()).await.refused(412);
    s.patch(&path, json!({"properties": {"release": "12"}})).await.metadata();
    assert_eq!(s.get(&path).await.metadata()["properties"], json!({"os": "mine", "release": "12"}));
    // A split image, and what is wrong with some.
    let multipart = |parts: &[(&str, &str)]| {
        let mut body = String::new();
        for (name, data) in parts {
            body.push_str(&format!("--BB\r\nContent-Disposition: form-data; name=\"{name}\"; filename=\"{name}.tar\"\r\n\r\n{data}\r\n"));
        }
        body + "--BB--\r\n"
    };
    let kind = [("content-type", "multipart/form-data; boundary=BB")];
    let split = s
        .send(Method::POST, "/1.0/images", &kind, multipart(&[("metadata", "meta"), ("rootfs", "root")]))
        .await;
    let split = s.done(split).await["metadata"]["fingerprint"].as_str().unwrap().to_owned();
    let export = s.get(&format!("/1.0/images/{split}/export")).await;
    let text = String::from_utf8(export.body.to_vec()).unwrap();
    assert!(export.header("content-type").starts_with("multipart/form-data; boundary="));
    assert!(text.contains("name=\"metadata\"") && text.contains("\r\n\r\nroot\r\n"), "{text}");
    for parts in [&[("rootfs", "root")][..], &[("metadata", "m")], &[("metadata", "m"), ("sources", "x")]] {
        s.send(Method::POST, "/1.0/images", &kind, multipart(parts)).await.refused(400);
    }
    s.send(Method::POST, "/1.0/images", &[("content-type", "multipart/form-data")], "x").await.refused(400);
    s.send(Method::POST, "/1.0/images", &[], "").await.refused(400);
    let wrong = s.wait(s.send(Method::POST, "/1.0/images", &[], "not an image").await).await;
    assert_eq!(wrong["status"], "Failure");
    s.send(Method::POST, "/1.0/images", &[("x-incus-fingerprint", "00ff")], "x").await.refused(400);
    let other = [("x-incus-fingerprint", "00".repeat(32))];
    let other = other.each_ref().map(|(k, v)| (*k, v.as_str()));
    assert_eq!(
        s.wait(s.send(Method::POST, "/1.0/images", &other, "another").await).await["status"],
        "Failure"
    );
    // An instance of it; then both go.
    let body = json!({"name": "c1", "source": {"type": "image", "alias": "deb"}});
    s.done(s.post("/1.0/instances", body).await).await;
    let c1 = s.get("/1.0/instances/c1").await.metadata();
    assert_eq!(c1["config"]["volatile.base_image"], fingerprint);
    s.done(s.delete("/1.0/instances/c1").await).await;
    for f in [&fingerprint, &split] {
        s.done(s.delete(&format!("/1.0/images/{f}")).await).await;
    }
    assert_eq!(s.get("/1.0/images").await.metadata(), json!([]));
    assert_eq!(s.get("/1.0/images/aliases").await.metadata(), json!([]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn image_aliases_live() {
    let s = Server::start().await;
    let operation = s.done(s.send(Method::POST, "/1.0/images", &[], "an image").await).await;
    let target = operation["metadata"]["fingerprint"].as_str().unwrap().to_owned();
    let body = json!({"description": "", "target": target, "name": "debian/12", "type": ""});
    let created = s.post("/1.0/images/aliases", body.clone()).await;
    assert_eq!((created.status, created.header("location")), (201, "/1.0/images/aliases/debian%2F12"));
    s.post("/1.0/images/aliases", body).await.refused(409);
    let alias = s.get("/1.0/images/aliases/debian%2F12").await.metadata();
    assert_eq!(alias, json!({"description": "", "target": target, "name": "debian/12", "type": "container"}));
    s.patch("/1.0/images/aliases/debian%2F12", json!({"description": "mine"})).await.metadata();
    assert_eq!(s.get("/1.0/images/aliases?recursion=1").await.metadata()[0]["description"], "mine");
    s.put("/1.0/images/aliases/debian%2F12", json!({"description": "x"})).await.refused(400);
    s.put("/1.0/images/aliases/debian%2F12", json!({"target": target})).await.metadata();
    let replaced = s.get("/1.0/images/aliases/debian%2F12").await.metadata();
    assert_eq!((&replaced["description"], &replaced["target"]), (&json!(""), &json!(target)), "PUT replaces");
    assert_eq!(s.post("/1.0/images/aliases/debian%2F12", json!({"name": "deb"})).await.status, 201);
    s.get("/1.0/images/aliases/debian%2F12").await.refused(404);
    s.post("/1.0/images/aliases", json!({"name": "x", "target": "00000000"})).await.refused(404);
    s.post("/1.0/images/aliases", json!({"name": "../x", "target": target})).await.refused(400);
    s.delete("/1.0/images/aliases/deb").await.metadata();
    s.delete("/1.0/images/aliases/deb").await.refused(404);
}
