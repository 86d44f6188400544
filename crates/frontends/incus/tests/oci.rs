//! Images of registries of the OCI, over the API, from a registry of this test.
#![allow(clippy::disallowed_methods)] // a test

use crate::common::Server;
use http_body_util::Full;
use hyper::{Method, Request, Response, body::Bytes, service::service_fn};
use hyper_util::rt::TokioIo;
use karst_frontend_incus::servers::NetworkServers;
use rcgen::{CertificateParams, KeyPair};
use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{collections::BTreeMap, convert::Infallible, sync::Arc};
use tokio::net::TcpListener;

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// What lies at which path, and of which type.
type Files = BTreeMap<String, (&'static str, Vec<u8>)>;

/// Whom a registry lets read.
#[derive(Clone, Copy, PartialEq)]
enum Readers {
    /// Everybody who asks for a token.
    Everybody,
    /// Who shows name and password with each request.
    Basic,
    /// Who gets a token by name and password.
    Token,
}

/// The name and the password that registries here know: `robot` and `open sesame`.
const KNOWN: &str = "Basic cm9ib3Q6b3BlbiBzZXNhbWU=";

/// A registry; answers its address and certificate.
async fn registry(files: Files, readers: Readers) -> (String, String) {
    let key = KeyPair::generate().unwrap();
    let made = CertificateParams::new(vec!["127.0.0.1".into()]).unwrap().self_signed(&key).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![made.der().clone()],
            PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        )
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("https://127.0.0.1:{}", listener.local_addr().unwrap().port());
    let (files, base) = (Arc::new(files), address.clone());
    tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else { return };
            let (acceptor, files, base) = (acceptor.clone(), files.clone(), base.clone());
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let answer = service_fn(move |request: Request<hyper::body::Incoming>| {
                    let (files, base) = (files.clone(), base.clone());
                    async move { Ok::<_, Infallible>(answer(&files, &base, readers, &request)) }
                });
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), answer)
                    .await;
            });
        }
    });
    (address, made.pem())
}

fn answer<B>(files: &Files, base: &str, readers: Readers, request: &Request<B>) -> Response<Full<Bytes>> {
    let path = request.uri().path();
    let body = |b: &[u8]| Full::new(Bytes::copy_from_slice(b));
    let shown = request.headers().get("authorization").map_or("", |v| v.to_str().unwrap());
    let refused = |asked: &str| {
        Response::builder().status(401).header("www-authenticate", asked).body(body(b"")).unwrap()
    };
    if readers == Readers::Basic && shown != KNOWN {
        return refused("Basic realm=\"a registry\"");
    }
    if path == "/token" {
        if readers == Readers::Token && shown != KNOWN {
            return refused("Basic realm=\"tokens\"");
        }
        assert!(request.uri().query().unwrap().contains("scope=repository%3Ateam%2Fserver%3Apull"));
        return Response::new(body(br#"{"token": "open-sesame"}"#));
    }
    if readers != Readers::Basic && shown != "Bearer open-sesame" {
        let scope = "repository:team/server:pull";
        return refused(&format!("Bearer realm=\"{base}/token\",service=\"test\",scope=\"{scope}\""));
    }
    match files.get(path) {
        Some((kind, content)) => {
            Response::builder().header("content-type", *kind).body(body(content)).unwrap()
        }
        None => Response::builder().status(404).body(body(b"")).unwrap(),
    }
}

const LIST: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// A repository with an image, one whose layer is not what it should be, and one for another machine; and the digest.
fn repository() -> (Files, String) {
    let mut files = Files::new();
    let mut put = |what: String, kind: &'static str, content: &[u8]| {
        files.insert(format!("/v2/team/server/{what}"), (kind, content.to_vec()));
    };
    let mut image = |layer: &[u8], sent: &[u8]| {
        let config = br#"{"os": "linux"}"#;
        for (content, come) in [(config.as_slice(), config.as_slice()), (layer, sent)] {
            put(format!("blobs/sha256:{}", hex(content)), "application/octet-stream", come);
        }
        let of = |kind: &str, content: &[u8]| json!({"mediaType": kind, "digest": format!("sha256:{}", hex(content)), "size": content.len()});
        let manifest = json!({
            "config": of("application/vnd.oci.image.config.v1+json", config),
            "layers": [of("application/vnd.oci.image.layer.v1.tar", layer)],
        })
        .to_string();
        put(format!("manifests/sha256:{}", hex(manifest.as_bytes())), MANIFEST, manifest.as_bytes());
        manifest
    };
    let good = image(b"a layer", b"a layer");
    let bad = image(b"what was announced", b"something is else!");
    let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let index = |manifest: &str, arch: &str| {
        json!({"manifests": [{"mediaType": MANIFEST, "digest": format!("sha256:{}", hex(manifest.as_bytes())),
            "size": manifest.len(), "platform": {"os": "linux", "architecture": arch}}]})
        .to_string()
    };
    put("manifests/v1".into(), LIST, index(&good, arch).as_bytes());
    put("manifests/latest".into(), MANIFEST, good.as_bytes());
    put("manifests/bad".into(), MANIFEST, bad.as_bytes());
    put("manifests/other".into(), LIST, index(&good, "s390x").as_bytes());
    let digest = hex(good.as_bytes());
    (files, digest)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn applications_come_from_registries() {
    let (files, digest) = repository();
    let (server, certificate) = registry(files, Readers::Everybody).await;
    let s = Server::start().await;
    s.engine.set_image_servers(Arc::new(NetworkServers::new()));
    let launch = |name: &str, alias: &str, more: Value| {
        let mut body = json!({"name": name, "source": {
            "type": "image", "mode": "pull", "protocol": "oci", "server": server, "certificate": certificate, "alias": alias,
        }});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let config = json!({"config": {"oci.uid": "5", "environment.PATH": "/mine"}});
    s.done(s.post("/1.0/instances", launch("app", "team/server:v1", config)).await).await;
    let app = s.get("/1.0/instances/app").await.metadata();
    let of = |key: &str| app["config"][key].as_str().unwrap_or_default().to_owned();
    // As the image says, where the request does not.
    assert_eq!(of("oci.entrypoint"), "/bin/server --port=80");
    assert_eq!((of("oci.cwd"), of("oci.uid"), of("oci.gid")), ("/srv".into(), "5".into(), "101".into()));
    assert_eq!((of("environment.PATH"), of("volatile.container.oci")), ("/mine".into(), "true".into()));
    assert_eq!((of("volatile.base_image"), of("image.type")), (digest.clone(), "oci".into()));
    let image = s.get(&format!("/1.0/images/{digest}")).await.metadata();
    assert_eq!((&image["update_source"]["protocol"], &image["cached"]), (&json!("oci"), &json!(true)));
    // Found here by the next, also by its digest and by no tag at all; a copy of it is one, too.
    for (name, alias) in
        [("app2", "team/server".to_owned()), ("app3", format!("team/server@sha256:{digest}"))]
    {
        s.done(s.post("/1.0/instances", launch(name, &alias, json!({}))).await).await;
    }
    let copy = json!({"name": "app4", "source": {"type": "copy", "source": "app"}});
    s.done(s.post("/1.0/instances", copy).await).await;
    let copied = s.get("/1.0/instances/app4").await.metadata();
    assert_eq!(copied["config"]["volatile.container.oci"], "true");
    // Its program is changed, and refused where it cannot be.
    let patch = |value: &str| json!({"config": {"oci.entrypoint": value}});
    s.patch("/1.0/instances/app", patch("/bin/other 'a b'")).await.metadata();
    for wrong in ["", "'open"] {
        let refused = s.patch("/1.0/instances/app", patch(wrong)).await;
        assert!(refused.refused(400).contains("oci.entrypoint"), "{wrong}");
    }
    s.container("plain", false).await;
    let refused = s.patch("/1.0/instances/plain", patch("/bin/x")).await;
    assert!(refused.refused(400).contains("application"));

    for (alias, word) in [
        ("team/server:bad", "SHA-256"),
        ("team/server:other", "s390x"),
        ("team/server:none", "does not have"),
        ("team/Server", "NAME:TAG"),
        ("../x", "NAME:TAG"),
    ] {
        let ended = s.wait(s.post("/1.0/instances", launch("never", alias, json!({}))).await).await;
        let text = ended["err"].as_str().unwrap();
        assert!(text.contains(word), "{alias}: {text}");
    }
    s.get("/1.0/instances/never").await.refused(404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registries_know_projects_by_name() {
    let (files, digest) = repository();
    let s = Server::start().await;
    s.engine.set_image_servers(Arc::new(NetworkServers::new()));
    let list = "/1.0/karst/registries";
    let at = |server: &str| format!("{list}/{}", server.trim_start_matches("https://"));
    let (basic, certificate) = registry(files.clone(), Readers::Basic).await;
    let login = |password: &str| json!({"user": "robot", "password": password, "certificate": certificate});
    s.put(&at(&basic), login("open sesame")).await.refused(503);
    s.engine.set_secret_key(karst_engine::secrets::SecretKey::new(&[7; 32]).unwrap());
    let copy = |server: &str, certificate: Option<&str>| {
        json!({"source": {"type": "image", "mode": "pull", "protocol": "oci", "server": server, "certificate": certificate,
            "alias": "team/server:v1"}})
    };
    // What is not said to be JSON is an image that is uploaded.
    let pull = async |body: Value| {
        s.send(Method::POST, "/1.0/images", &[("content-type", "application/json")], body.to_string()).await
    };
    let fetched = async |server: &str, certificate: Option<&str>| {
        let ended = s.wait(pull(copy(server, certificate)).await).await;
        ended["err"].as_str().unwrap().to_owned()
    };
    let forget = async || s.done(s.delete(&format!("/1.0/images/{digest}")).await).await;
    // Nobody has said who asks, then somebody who is not known, then the right one.
    let text = fetched(&basic, Some(&certificate)).await;
    assert!(text.contains("karst image registry add 127.0.0.1:"), "{text}");
    s.put(&at(&basic), login("wrong one")).await.metadata();
    let text = fetched(&basic, None).await;
    assert!(text.contains("does not let \"robot\" read") && !text.contains("wrong one"), "{text}");
    s.put(&at(&basic), login("open sesame")).await.metadata();
    assert_eq!(fetched(&basic, None).await, "");
    let host = basic.trim_start_matches("https://").to_owned();
    let told = json!([{"host": host, "user": "robot", "certificate": certificate}]);
    assert_eq!(s.get(list).await.metadata(), told, "and no password");
    let image = s.get(&format!("/1.0/images/{digest}")).await.metadata();
    assert_eq!(image["update_source"]["server"], json!(basic));
    forget().await;
    // Who states another certificate does not get the password to go there.
    let (_, other) = registry(Files::new(), Readers::Everybody).await;
    let text = fetched(&basic, Some(&other)).await;
    assert!(!text.is_empty() && !text.contains("robot"), "{text}");
    // By a token, in the address as clients of Incus say it; kept nowhere.
    let (token, certificate) = registry(files, Readers::Token).await;
    let named = |who: &str| token.replace("https://", &format!("https://{who}@"));
    for (who, word) in
        [("robot:wrong%20one", "does not let"), ("robot", "without a password"), ("a%3Ab:c", "colon")]
    {
        let answer = pull(copy(&named(who), Some(&certificate))).await;
        let text = match answer.status {
            202 => s.wait(answer).await["err"].as_str().unwrap().to_owned(),
            _ => answer.refused(400),
        };
        assert!(text.contains(word) && !text.contains("wrong"), "{who}: {text}");
    }
    assert_eq!(fetched(&named("robot:open%20sesame"), Some(&certificate)).await, "");
    let image = s.get(&format!("/1.0/images/{digest}")).await;
    assert_eq!(image.metadata()["update_source"]["server"], json!(token));
    for path in ["/1.0/images?recursion=1", "/1.0/operations?recursion=1", "/1.0/karst/audit", list] {
        let text = String::from_utf8_lossy(&s.get(path).await.body).into_owned();
        assert!(!text.contains("sesame"), "{path}: {text}");
    }
    let other = json!({"source": {"type": "image", "mode": "pull", "protocol": "simplestreams",
        "server": "https://robot:sesame@images.example", "alias": "x"}});
    let text = pull(other).await.refused(400);
    assert!(text.contains("protocol oci") && !text.contains("sesame"), "{text}");
    forget().await;
    // Wrong input changes nothing; what is forgotten is not used any more.
    for (path, body, word) in [
        (format!("{list}/a%2Fb"), login("x"), "HOST:PORT"),
        (at(&basic), json!({"user": "a:b", "password": "x"}), "colon"),
        (at(&basic), json!({"user": "a", "password": "x\n"}), "control"),
        (at(&basic), json!({"user": "a"}), "password"),
    ] {
        let text = s.put(&path, body).await.refused(400);
        assert!(text.contains(word), "{text}");
    }
    assert_eq!(s.get(list).await.metadata(), told);
    s.delete(&at(&basic)).await.metadata();
    s.delete(&at(&basic)).await.refused(404);
    assert_eq!(s.get(list).await.metadata(), json!([]));
    // A project's are its own, and keep it from being removed.
    assert_eq!(s.post("/1.0/projects", json!({"name": "other"})).await.status, 201);
    s.put(&format!("{}?project=other", at(&basic)), login("open sesame")).await.metadata();
    assert_eq!(s.get(list).await.metadata(), json!([]));
    let text = s.delete("/1.0/projects/other").await.refused(409);
    assert!(text.contains("not empty"), "{text}");
    s.delete(&format!("{}?project=other", at(&basic))).await.metadata();
    s.delete("/1.0/projects/other").await.metadata();
}
