//! Every path that is served, asked by nobody, by somebody of another project, and by somebody who may only look.
#![allow(clippy::disallowed_methods)] // a test

use crate::common::Server;
use hyper::Method;
use karst_frontend_incus::routes::{State, TABLE};
use karst_model::{
    ProjectId,
    access::{Grant, Permission, Principal, Role},
};
use serde_json::json;

/// A certificate that is trusted, its fingerprint, and one that is not.
const CERTIFICATE: &str = "MIIBbzCCARWgAwIBAgIULLqgqUeG8tQlE8CqXzfKu13SeAswCgYIKoZIzj0EAwIwDDEKMAgGA1UEAwwBYTAgFw0yNjExMjExNDE2\
    MTdaGA8yMTI2MTAyODE0MTYxN1owDDEKMAgGA1UEAwwBYTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABH7UFHxLWhqPhRS6KInc\
    6Zvo6nhjx61WkHdCR4MsUDfTYtDl+jVgkRdhuK8+8UndJMSIBXGru4Cr4gouFaougvKjUzBRMB0GA1UdDgQWBBS2k9KPjSEFUTE9\
    XY//2Yp/c5keTDAfBgNVHSMEGDAWgBS2k9KPjSEFUTE9XY//2Yp/c5keTDAPBgNVHRMBAf8EBTADAQH/MAoGCCqGSM49BAMCA0gA\
    MEUCIQC6wnaMOztpQqPhD0vZGbAAn+KxwPcknVHAUPBLzLO77AIgZWywG6GeL5k0N/ALxTFh/qY3FQ9xysaiLm6bM0Iw4Ow=";
pub const FINGERPRINT: &str = "cef7c8b474a140f2b141709f088d9fa2051e2380c674225ffd3a9ea7feb755ca";
pub const OTHER_CERTIFICATE: &str = "MIIBcDCCARWgAwIBAgIUG6HarbvXAkPYfQ0iFG07kfzANWMwCgYIKoZIzj0EAwIwDDEKMAgGA1UEAwwBYjAgFw0yNjExMjExNDE2\
    MThaGA8yMTI2MTAyODE0MTYxOFowDDEKMAgGA1UEAwwBYjBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABLjJMQKHI9f6smQmPErg\
    CkvkX7CzggTsuWyZN2pcUgtJ1PA6zijfqLkWe0iINoNB0yFYRws63/5/yM91xv9In9qjUzBRMB0GA1UdDgQWBBQ3rvV3pVuI/y67\
    MsIcg/7S6og8iTAfBgNVHSMEGDAWgBQ3rvV3pVuI/y67MsIcg/7S6og8iTAPBgNVHRMBAf8EBTADAQH/MAoGCCqGSM49BAMCA0kA\
    MEYCIQCu0V5WUA8cKVmLY9GILRPOzHd1Mvoh+azaLak59kAoLwIhAOmncpPOisiVY5OEHqNG7cR9YJjri0SGeLmSUuUWFeyQ";

/// What is there to be asked for: an instance, an image with an alias, a network, a pool, a profile, a project.
pub struct Names {
    pub network: String,
    pub image: String,
    warning: String,
}

pub async fn furnished() -> (Server, Names) {
    let s = Server::start().await;
    s.container("c1", true).await;
    let headers = [("x-incus-aliases", "alias=deb")];
    let operation = s.done(s.send(Method::POST, "/1.0/images", &headers, "an image").await).await;
    let image = operation["metadata"]["fingerprint"].as_str().unwrap().to_owned();
    let network = s.get("/1.0/networks?recursion=1").await.metadata()[0]["name"].as_str().unwrap().to_owned();
    assert_eq!(s.post("/1.0/projects", json!({"name": "other"})).await.status, 201);
    assert_eq!(s.post("/1.0/network-acls", json!({"name": "web"})).await.status, 201);
    assert_eq!(s.post("/1.0/network-address-sets", json!({"name": "office"})).await.status, 201);
    let forward = json!({"listen_address": "192.0.2.50"});
    assert_eq!(s.post(&format!("/1.0/networks/{network}/forwards"), forward).await.status, 201);
    let certificate = json!({"name": "friend", "certificate": CERTIFICATE});
    assert_eq!(s.post("/1.0/certificates", certificate).await.status, 201);
    let robot = json!({"name": "robot", "role": "viewer"});
    assert_eq!(s.post("/1.0/karst/tokens", robot).await.status, 200);
    for volume in ["data", "spare"] {
        let path = "/1.0/storage-pools/default/volumes/custom";
        assert_eq!(s.post(path, json!({"name": volume})).await.status, 201);
    }
    for path in ["/1.0/instances/c1", "/1.0/storage-pools/default/volumes/custom/data"] {
        s.done(s.post(&format!("{path}/snapshots"), json!({"name": "snap"})).await).await;
        s.done(s.post(&format!("{path}/backups"), json!({"name": "kept"})).await).await;
    }
    let first = async {
        loop {
            let all = s.get("/1.0/warnings?recursion=1").await.metadata();
            match all[0]["uuid"].as_str() {
                Some(id) => return id.to_owned(),
                None => tokio::time::sleep(std::time::Duration::from_millis(50)).await,
            }
        }
    };
    let warning = tokio::time::timeout(crate::common::PATIENCE, first).await.expect("a warning in time");
    (s, Names { network, image, warning })
}

pub fn concrete(path: &str, names: &Names, operation: &str) -> String {
    let of = |collection: &str, name: &str, path: String| {
        path.replace(&format!("{collection}/{{name}}"), &format!("{collection}/{name}"))
    };
    let mut p = path.to_owned();
    for (collection, name) in [
        ("instances", "c1"),
        ("networks", names.network.as_str()),
        ("network-acls", "web"),
        ("network-address-sets", "office"),
        ("storage-pools", "default"),
        ("profiles", "default"),
        ("projects", "default"),
        ("images/aliases", "deb"),
        ("karst/tokens", "robot"),
    ] {
        p = of(collection, name, p);
    }
    p = p
        .replace("secrets/{uuid}", "secrets/00000000-0000-0000-0000-000000000005")
        .replace("warnings/{uuid}", &format!("warnings/{}", names.warning))
        .replace("certificates/{fingerprint}", &format!("certificates/{FINGERPRINT}"))
        .replace("{fingerprint}", &names.image)
        .replace("operations/{id}", &format!("operations/{operation}"));
    p = p.replace("{listenAddress}", "192.0.2.50").replace("{host}", "registry.example");
    if p.ends_with("/network/explain") {
        p += "?from=c1&to=192.0.2.9&port=80";
    }
    p = p.replace("{type}", "custom").replace("{volumeName}", "data");
    p = p.replace("{snapshot}", "snap").replace("{snapshotName}", "snap");
    p = p.replace("{backup}", "kept").replace("{backupName}", "kept");
    p = p.replace("{filename}", "lxc.log");
    assert!(!p.contains('{'), "{p}");
    if p.ends_with("/access/why") {
        return p + "?permission=instance_use&object=server";
    }
    if p.ends_with("/files") { p + "?path=/etc/hostname" } else { p }
}

/// The same, where a method names its object in the query.
pub fn addressed(method: &Method, path: String) -> String {
    if method != Method::GET && path.ends_with("/metadata/templates") { path + "?path=x.tpl" } else { path }
}

/// A body that is well-formed, so that the refusal is about who asks.
pub fn body(method: &Method, path: &str, image: &str) -> String {
    let value = match (method.as_str(), path) {
        ("POST" | "DELETE", "/1.0/karst/access") => json!({"principal": "robot", "role": "user"}),
        ("PUT" | "PATCH", "/1.0/warnings/{uuid}") => json!({"status": "acknowledged"}),
        ("PUT", "/1.0/karst/registries/{host}") => json!({"user": "robot", "password": "s3cret"}),
        ("PUT", "/1.0/karst/storage-pools/{name}") => json!({"autostart": true}),
        ("POST", "/1.0/karst/instances/{name}/layers") => json!({"snapshot": "s9"}),
        ("POST", "/1.0/karst/instances/{name}/layers/commit" | "/1.0/karst/instances/{name}/layers/pull") => {
            json!({"device": "root"})
        }
        ("POST", "/1.0/karst/secrets") => json!({"type": "volume", "usage": "/n9"}),
        ("PUT", "/1.0/karst/secrets/{uuid}") => json!({"value": "s3cret"}),
        ("POST", "/1.0/karst/tokens") => json!({"name": "n9", "role": "viewer"}),
        ("POST", "/1.0/certificates") => json!({"name": "n9", "certificate": OTHER_CERTIFICATE}),
        ("PUT" | "PATCH", "/1.0/certificates/{fingerprint}") => json!({"name": "n9"}),
        ("PUT" | "PATCH", "/1.0") => json!({"config": {"user.x": "y"}}),
        ("POST", "/1.0/images") => return "x".into(),
        ("POST", "/1.0/instances") => json!({"name": "c9", "source": {"type": "none"}}),
        ("PUT", "/1.0/instances") => json!({"state": {"action": "start"}}),
        ("POST", "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/rebuild") => json!({}),
        ("POST", "/1.0/instances/{name}/rebuild") => json!({"source": {"type": "none"}}),
        ("PUT", "/1.0/instances/{name}/state") => json!({"action": "stop"}),
        ("POST", "/1.0/instances/{name}/exec") => json!({"command": ["true"]}),
        (
            "POST",
            "/1.0/instances/{name}/files"
            | "/1.0/instances/{name}/metadata/templates"
            | "/1.0/storage-pools/{name}/volumes/{type}/{volumeName}/files",
        ) => return "x".into(),
        ("PUT" | "PATCH", "/1.0/instances/{name}/metadata") => json!({"properties": {}}),
        ("POST", "/1.0/storage-pools") => json!({"name": "n9", "driver": "dir"}),
        ("POST", "/1.0/images/{fingerprint}/export") => {
            json!({"target": "https://other.example", "secret": "s3cret"})
        }
        ("POST", "/1.0/images/aliases") => json!({"name": "n9", "target": image}),
        ("PUT", "/1.0/images/aliases/{name}") => json!({"target": image, "description": ""}),
        ("POST", "/1.0/karst/images/build") => json!({"recipe": "debian/12"}),
        ("POST", "/1.0/instances/{name}/console") => json!({}),
        ("PUT" | "PATCH", "/1.0/images/{fingerprint}") => json!({"public": false}),
        ("POST", "/1.0/networks/{name}/forwards") => json!({"listen_address": "192.0.2.51"}),
        ("POST", "/1.0/karst/instances/{name}/keys") => json!({"keys": ["a"]}),
        ("PUT", "/1.0/karst/networks/{name}") => json!({"autostart": true}),
        ("PUT", "/1.0/karst/instances/{name}/vnc") => json!({"password": "s3cret"}),
        ("POST", "/1.0/karst/instances/{name}/reset" | "/1.0/karst/instances/{name}/vnc") => json!({}),
        // Their paths say all.
        ("POST", "/1.0/images/{fingerprint}/secret" | "/1.0/images/{fingerprint}/refresh")
        | ("PUT", "/internal/shutdown") => return String::new(),
        ("POST", "/internal/recover/import" | "/internal/recover/validate") => json!({"pools": []}),
        ("POST", _) => json!({"name": "n9"}),
        ("PUT" | "PATCH", _) => json!({"description": "x"}),
        _ => return String::new(),
    };
    value.to_string()
}

pub fn with(role: Role, project: Option<ProjectId>) -> Principal {
    Principal { grants: vec![Grant { role, project }], ..Principal::unix_admin(4242, 4242, 1) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_gets_anything() {
    let (s, names) = furnished().await;
    for row in TABLE.iter() {
        let path = match row.state {
            State::Done(..) => concrete(row.path, &names, "00000000-0000-0000-0000-000000000001"),
            State::Open(_) => continue,
        };
        let answer = s
            .send_as(
                Principal::anonymous(),
                row.method.clone(),
                &path,
                body(&row.method, row.path, &names.image),
            )
            .await;
        match row.path {
            "/" | "/1.0" if row.method == Method::GET => assert_eq!(answer.status, 200),
            // Those that are public would be there; this one is not.
            "/1.0/images" | "/1.0/images/aliases" if row.method == Method::GET => {
                assert_eq!(answer.metadata(), json!([]), "{path}");
            }
            p if p.starts_with("/1.0/images/") && row.method == Method::GET => {
                answer.refused(404);
            }
            _ => assert_eq!(answer.status, 403, "{} {path}", row.method),
        }
    }
    let server = s.send_as(Principal::anonymous(), Method::GET, "/1.0", String::new()).await.metadata();
    assert_eq!(server["auth"], "untrusted");
    assert!(server.get("environment").is_none());
    assert_eq!(s.get("/1.0/instances").await.metadata(), json!(["/1.0/instances/c1"]), "nothing was made");
}

/// What an operator of another project sees all the same: the server in general, and what is filtered by project.
pub const SHARED: &[&str] = &[
    "/",
    "/1.0",
    "/1.0/certificates",
    "/1.0/cluster",
    "/1.0/karst/access/why",
    "/1.0/karst/libvirt",
    "/1.0/karst/openapi",
    "/1.0/metadata/configuration",
    "/1.0/metrics",
    "/1.0/projects",
    "/1.0/resources",
    "/1.0/storage-pools",
    "/1.0/storage-pools/{name}",
    "/1.0/storage-pools/{name}/resources",
    "/1.0/karst/storage-pools/{name}",
    "/1.0/warnings",
    "/internal/ready",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_project_is_a_wall() {
    let (s, names) = furnished().await;
    let admin = karst_engine::Context::new(Principal::unix_admin(0, 0, 1));
    let other = s.engine.project(&admin, "other", Permission::ProjectView).unwrap().id;
    let operation = s.put("/1.0/instances/c1/state", json!({"action": "freeze"})).await;
    let operation = operation.json()["operation"].as_str().unwrap().rsplit('/').next().unwrap().to_owned();
    for row in TABLE.iter() {
        let State::Done(..) = row.state else { continue };
        let path = addressed(&row.method, concrete(row.path, &names, &operation));
        let answer = s
            .send_as(
                with(Role::Operator, Some(other)),
                row.method.clone(),
                &path,
                body(&row.method, row.path, &names.image),
            )
            .await;
        if row.method == Method::GET && SHARED.contains(&row.path) {
            assert_eq!(
                answer.status,
                200,
                "{} {path}: {}",
                row.method,
                String::from_utf8_lossy(&answer.body)
            );
        } else if row.path.ends_with("/websocket") {
            assert_eq!(answer.status, 400, "a secret is needed, and an upgrade");
        } else {
            assert!(
                [403, 404].contains(&answer.status),
                "{} {path}: {} {}",
                row.method,
                answer.status,
                String::from_utf8_lossy(&answer.body)
            );
        }
    }
    let seen = s
        .send_as(with(Role::Operator, Some(other)), Method::GET, "/1.0/projects", String::new())
        .await
        .metadata();
    assert_eq!(seen, json!(["/1.0/projects/other"]));
    for path in ["/1.0/instances?all-projects=true", "/1.0/images?all-projects=true"] {
        let seen =
            s.send_as(with(Role::Operator, Some(other)), Method::GET, path, String::new()).await.metadata();
        assert_eq!(seen, json!([]), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_look_may_not_touch() {
    let (s, names) = furnished().await;
    for row in TABLE.iter() {
        let State::Done(..) = row.state else { continue };
        let path = addressed(&row.method, concrete(row.path, &names, "00000000-0000-0000-0000-000000000001"));
        let answer = s
            .send_as(
                with(Role::Viewer, None),
                row.method.clone(),
                &path,
                body(&row.method, row.path, &names.image),
            )
            .await;
        // The file of a backup is all that the owner holds.
        let whole = row.path.contains("/backups/") && row.path.ends_with("/export");
        // What a guest's programs and its console say is for those who use it.
        let uses = whole
            || row.path.contains("/logs")
            || ["/log", "/debug/memory", "/files", "/console", "/sftp", "/karst/check", "/screenshot"]
                .iter()
                .any(|e| row.path.ends_with(e));
        if row.path.starts_with("/1.0/operations/") || row.path == "/1.0/events" {
            assert!([400, 404].contains(&answer.status), "{} {path}: {}", row.method, answer.status);
        } else if row.method == Method::GET && !uses {
            assert_eq!(
                answer.status,
                200,
                "{} {path}: {}",
                row.method,
                String::from_utf8_lossy(&answer.body)
            );
        } else {
            assert_eq!(
                answer.status,
                403,
                "{} {path}: {}",
                row.method,
                String::from_utf8_lossy(&answer.body)
            );
        }
    }
    let c1 = s.get("/1.0/instances/c1").await.metadata();
    assert_eq!((c1["status"].as_str(), c1["description"].as_str()), (Some("Running"), Some("")));
}
