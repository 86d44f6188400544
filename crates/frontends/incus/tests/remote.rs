//! The API over HTTPS as clients on the network meet it: who is trusted, by what, and since when no longer.
#![allow(clippy::disallowed_methods)] // a test

use crate::common::{Answer, Server, unused_address};
use base64::Engine as _;
use futures::{SinkExt, StreamExt};
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, body::Bytes, client::conn::http1::SendRequest};
use hyper_util::rt::TokioIo;
use karst_engine::tenancy::server::{NetworkListener, ServerSettings};
use karst_frontend_incus::places::Bounds;
use karst_model::access::Principal;
use rcgen::{CertificateParams, KeyPair};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime},
};
use serde_json::{Value, json};
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::net::TcpStream;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{self, Message},
};

/// A client: its certificate, if it has one, and the server's fingerprint that it insists on.
struct Client {
    config: Arc<ClientConfig>,
    der: Vec<u8>,
    fingerprint: String,
    address: SocketAddr,
}

/// Takes the server with this fingerprint, as `incus remote add` does.
#[derive(Debug)]
struct Pinned(String);

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match karst_frontend_incus::tls::fingerprint(end) == self.0 {
            true => Ok(ServerCertVerified::assertion()),
            false => Err(rustls::Error::General("another server".into())),
        }
    }
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = ring::default_provider().signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, &algorithms)
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = ring::default_provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, &algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

impl Client {
    fn new(
        s: &Server,
        address: SocketAddr,
        certificate: bool,
        versions: &[&'static rustls::SupportedProtocolVersion],
    ) -> Self {
        let pinned = Pinned(s.app.info.identity.as_ref().unwrap().fingerprint.clone());
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(versions)
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(pinned));
        let key = KeyPair::generate().unwrap();
        let made = CertificateParams::new(vec!["client".into()]).unwrap().self_signed(&key).unwrap();
        let der = made.der().to_vec();
        let config = match certificate {
            false => builder.with_no_client_auth(),
            true => {
                let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
                builder.with_client_auth_cert(vec![made.der().clone()], key).unwrap()
            }
        };
        let fingerprint = karst_frontend_incus::tls::fingerprint(&der);
        Self { config: Arc::new(config), der, fingerprint, address }
    }

    async fn connect(&self) -> std::io::Result<SendRequest<Full<Bytes>>> {
        let stream = TcpStream::connect(self.address).await?;
        let name = ServerName::try_from("karst").unwrap();
        let stream = tokio_rustls::TlsConnector::from(self.config.clone()).connect(name, stream).await?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(std::io::Error::other)?;
        tokio::spawn(connection);
        Ok(sender)
    }

    async fn on(
        sender: &mut SendRequest<Full<Bytes>>,
        method: Method,
        path: &str,
        bearer: Option<&str>,
        body: Value,
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(path).header("host", "karst");
        if let Some(token) = bearer {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let body = if body.is_null() { String::new() } else { body.to_string() };
        sender.ready().await.unwrap();
        let exchange = sender.send_request(request.body(Full::new(body.into())).unwrap());
        let (head, body) =
            tokio::time::timeout(crate::common::PATIENCE, exchange).await.unwrap().unwrap().into_parts();
        Answer {
            status: head.status.as_u16(),
            headers: head.headers,
            body: body.collect().await.unwrap().to_bytes(),
        }
    }

    /// A websocket; the server's refusal when there is none.
    async fn websocket(&self, path: &str) -> Result<Socket, tungstenite::Error> {
        let stream = TcpStream::connect(self.address).await?;
        let name = ServerName::try_from("karst").unwrap();
        let stream = tokio_rustls::TlsConnector::from(self.config.clone()).connect(name, stream).await?;
        let url = format!("ws://karst{path}");
        tokio_tungstenite::client_async(url, stream).await.map(|(socket, _)| socket)
    }

    async fn get(&self, path: &str) -> Answer {
        Self::on(&mut self.connect().await.unwrap(), Method::GET, path, None, Value::Null).await
    }

    async fn post(&self, path: &str, body: Value) -> Answer {
        Self::on(&mut self.connect().await.unwrap(), Method::POST, path, None, body).await
    }
}

type Socket = WebSocketStream<tokio_rustls::client::TlsStream<TcpStream>>;

const BOTH: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS12, &rustls::version::TLS13];

async fn listening() -> (Server, SocketAddr) {
    listening_with(Bounds::default()).await
}

async fn listening_with(bounds: Bounds) -> (Server, SocketAddr) {
    let s = Server::with_places(bounds).await;
    let address = unused_address();
    let config = json!({"config": {"core.https_address": address.to_string()}});
    assert_eq!(s.put("/1.0", config).await.status, 200);
    (s, address)
}

/// What a client makes of a token's operation.
fn token_of(answer: &Answer) -> String {
    assert_eq!(answer.status, 202, "{}", String::from_utf8_lossy(&answer.body));
    let metadata = answer.json()["metadata"]["metadata"].clone();
    let token = json!({
        "client_name": metadata["request"]["name"], "fingerprint": metadata["fingerprint"],
        "addresses": metadata["addresses"], "secret": metadata["secret"],
    });
    base64::engine::general_purpose::STANDARD.encode(token.to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_server_is_configured_and_listens() {
    let (s, address) = listening().await;
    for versions in [&BOTH[..1], &BOTH[1..]] {
        let server = Client::new(&s, address, false, versions).get("/1.0").await.metadata();
        assert_eq!(server["auth"], "untrusted");
        assert_eq!(server["config"], json!({}));
        assert!(server.get("environment").is_none());
    }
    let server = s.get("/1.0").await;
    let tag = server.header("etag").to_owned();
    let server = server.metadata();
    assert_eq!(server["environment"]["addresses"], json!([address.to_string()]));
    assert_eq!(server["config"]["core.https_address"], address.to_string());
    let fingerprint = &s.app.info.identity.as_ref().unwrap().fingerprint;
    assert_eq!(server["environment"]["certificate_fingerprint"], **fingerprint);
    // What cannot be listened on changes nothing, and the old address serves again.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    for (bad, field) in [
        (json!({"core.https_address": taken.local_addr().unwrap().to_string()}), "core.https_address"),
        (json!({"core.https_address": "nonsense"}), "core.https_address"),
        (json!({"core.htps_address": ":1"}), "core.htps_address"),
    ] {
        let text = s.put("/1.0", json!({"config": bad})).await.refused(400);
        assert!(text.contains(field), "{text}");
    }
    assert_eq!(s.get("/1.0").await.metadata()["config"], server["config"]);
    assert_eq!(Client::new(&s, address, false, BOTH).get("/1.0").await.status, 200);
    // Under its ETag, and by PATCH.
    let put = async |tag: &str| {
        s.send(Method::PATCH, "/1.0", &[("if-match", tag)], r#"{"config":{"user.a":"b"}}"#).await
    };
    assert_eq!(put(&tag).await.status, 200);
    put(&tag).await.refused(412);
    assert_eq!(s.get("/1.0").await.metadata()["config"]["core.https_address"], address.to_string());
    // The port moves to another address of the host while its old listener goes.
    let moved = SocketAddr::new("127.0.0.2".parse().unwrap(), address.port());
    let config = json!({"config": {"core.https_address": format!(":{}", address.port())}});
    assert_eq!(s.put("/1.0", config).await.status, 200);
    assert_eq!(Client::new(&s, moved, false, BOTH).get("/1.0").await.status, 200);
    assert_eq!(s.put("/1.0", json!({"config": {}})).await.status, 200);
    assert!(TcpStream::connect(address).await.is_err(), "it listens no more");
}

/// The timer that the kernel runs for the server's end of a connection, if that is there: what it is for (2 is keepalive)
/// and how long it runs on.
fn timer(server: SocketAddr, client: SocketAddr) -> Option<(u32, Duration)> {
    let shown = |address: SocketAddr| {
        let IpAddr::V4(ip) = address.ip() else { panic!("{address}") };
        format!("{:08X}:{:04X}", u32::from_le_bytes(ip.octets()), address.port())
    };
    let (server, client) = (shown(server), shown(client));
    let all = std::fs::read_to_string("/proc/net/tcp").unwrap();
    all.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if fields.get(1..3)? != [server.as_str(), client.as_str()] {
            return None;
        }
        let (what, ticks) = fields.get(5)?.split_once(':')?;
        let hundredths = u64::from_str_radix(ticks, 16).ok()?;
        Some((what.parse().ok()?, Duration::from_millis(hundredths * 10)))
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_vanishes_is_noticed() {
    let (_s, address) = listening().await;
    let stream = TcpStream::connect(address).await.unwrap();
    let near = stream.local_addr().unwrap();
    let end = Instant::now() + crate::common::PATIENCE;
    // Nothing is said on it: only keepalive tells whether anybody is there, and by default after two hours.
    loop {
        let found = timer(address, near);
        if found.is_some_and(|(what, left)| what == 2 && left <= Duration::from_secs(61)) {
            break;
        }
        assert!(Instant::now() < end, "{found:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(stream);
}

/// A connection keeps its place after its upgrade, one client has so many, and strangers take none of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn places_are_kept_by_websockets_and_taken_from_nobody() {
    let bounds = Bounds { handshakes: 16, connections: 8, of_one: 3, strangers: 8, of_address: 4 };
    let (s, address) = listening_with(bounds).await;
    let trusted = async |name: &str| {
        let client = Client::new(&s, address, true, &BOTH[1..]);
        let pem = base64::engine::general_purpose::STANDARD.encode(&client.der);
        let add = json!({"name": name, "type": "client", "certificate": pem});
        assert_eq!(s.post("/1.0/certificates", add).await.status, 201);
        client
    };
    let (viewer, other) = (trusted("viewer").await, trusted("other").await);
    let mut sockets = vec![];
    for _ in 0..bounds.of_one {
        sockets.push(viewer.websocket("/1.0/events").await.unwrap());
    }
    assert!(viewer.websocket("/1.0/events").await.is_err(), "it has as many as one may have");
    assert_eq!(other.get("/1.0/instances").await.status, 200, "others have theirs");

    // Strangers of one address, who say nothing. Which of those that come together is let in first is left to the server,
    // so that one of the silent may be turned away in favour of one who asks: another takes its place.
    let mut silent = vec![];
    until("the address has no place left", async || {
        silent.push(TcpStream::connect(address).await.unwrap());
        silent.len() > bounds.of_address
            && Client::new(&s, address, false, &BOTH[1..]).connect().await.is_err()
    })
    .await;
    silent.clear();
    until("they are gone", async || other.connect().await.is_ok()).await;

    // A listener that says more than a listener may is not listened to.
    let mut talker = sockets.pop().unwrap();
    let large = "x".repeat(karst_frontend_incus::socket::LISTENER + 1);
    // It may be ended before it has sent all.
    let _ = talker.send(Message::text(large)).await;
    let ended = async {
        while let Some(Ok(message)) = talker.next().await {
            if message.is_close() {
                return;
            }
        }
    };
    tokio::time::timeout(crate::common::PATIENCE, ended).await.expect("it is ended");
    drop(talker);
    // Its place is free again, and the others listen on.
    until("a place is free", async || viewer.websocket("/1.0/events").await.is_ok()).await;
    for socket in &mut sockets {
        socket.send(Message::Ping("there?".into())).await.unwrap();
        let answered = async {
            while let Some(Ok(message)) = socket.next().await {
                if message.is_pong() {
                    return true;
                }
            }
            false
        };
        assert!(
            tokio::time::timeout(crate::common::PATIENCE, answered).await.expect("it answers"),
            "it ended"
        );
    }
}

async fn until(what: &str, mut probe: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + crate::common::PATIENCE;
    while !probe().await {
        assert!(Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_live() {
    let (s, address) = listening().await;
    s.container("secret", false).await;
    assert_eq!(s.post("/1.0/projects", json!({"name": "tenant"})).await.status, 201);
    let client = Client::new(&s, address, true, BOTH);
    let path = format!("/1.0/certificates/{}", client.fingerprint);
    assert_eq!(client.get("/1.0").await.metadata()["auth"], "untrusted");
    client.get("/1.0/instances").await.refused(403);
    client.get("/1.0/metrics").await.refused(403);
    // Nobody trusts himself.
    client.post("/1.0/certificates", json!({"name": "me"})).await.refused(403);
    client.post("/1.0/certificates", json!({"name": "me", "token": true})).await.refused(403);
    client.post("/1.0/certificates", json!({"trust_token": "x"})).await.refused(403);
    // A token for a restricted certificate.
    let request = json!({"name": "me", "token": true, "restricted": true, "projects": ["tenant"]});
    let issued = s.post("/1.0/certificates", request.clone()).await;
    let token = token_of(&issued);
    let operation = issued.json()["operation"].as_str().unwrap().to_owned();
    let listed = s.get("/1.0/operations?recursion=1").await.metadata();
    assert_eq!(listed["running"][0]["class"], "token");
    assert_eq!(listed["running"][0]["metadata"]["request"]["name"], "me");
    assert_eq!(listed["running"][0]["metadata"]["secret"], "", "it is not known any more");
    // It is of use to who has a certificate only, and once.
    Client::new(&s, address, false, BOTH)
        .post("/1.0/certificates", json!({"trust_token": token}))
        .await
        .refused(400);
    let joined = client.post("/1.0/certificates", json!({"trust_token": token})).await;
    assert_eq!((joined.status, joined.header("location")), (201, path.as_str()));
    let late = Client::new(&s, address, true, BOTH);
    late.post("/1.0/certificates", json!({"trust_token": token})).await.refused(403);
    s.get(&operation).await.refused(404);
    // It sees its project and that the server is there.
    let server = client.get("/1.0").await.metadata();
    assert_eq!(
        (server["auth"].as_str(), server["auth_user_method"].as_str()),
        (Some("trusted"), Some("tls"))
    );
    assert_eq!((&server["auth_user_name"], &server["config"]), (&json!(client.fingerprint), &json!({})));
    assert_eq!(client.get("/1.0/projects").await.metadata(), json!(["/1.0/projects/tenant"]));
    client.get("/1.0/instances").await.refused(404);
    assert_eq!(client.get("/1.0/instances?all-projects=true").await.metadata(), json!([]));
    client.get("/1.0/instances/secret").await.refused(404);
    let pools = client.get("/1.0/storage-pools?recursion=1").await.metadata();
    assert_eq!((pools[0]["config"].clone(), pools[0]["used_by"].clone()), (json!({}), json!([])));
    assert_eq!(client.get("/1.0/certificates").await.metadata(), json!([path]), "its own only");
    let body = json!({"name": "c1", "source": {"type": "none"}, "devices": {"root": {"type": "disk", "path": "/", "pool": "default"}}});
    assert_eq!(client.post("/1.0/instances?project=tenant", body).await.status, 202);
    client.post("/1.0/projects", json!({"name": "more"})).await.refused(403);
    // The record is changed under its ETag.
    let record = s.get(&path).await;
    let tag = record.header("etag").to_owned();
    let mut record = record.metadata();
    assert_eq!((&record["name"], &record["restricted"]), (&json!("me"), &json!(true)));
    assert_eq!((&record["projects"], &record["type"]), (&json!(["tenant"]), &json!("client")));
    record["projects"] = json!(["default"]);
    let put = s.send(Method::PUT, &path, &[("if-match", &tag)], record.to_string()).await;
    assert_eq!(put.status, 200);
    s.send(Method::PUT, &path, &[("if-match", &tag)], record.to_string()).await.refused(412);
    assert_eq!(client.get("/1.0/projects").await.metadata(), json!(["/1.0/projects/default"]));
    s.patch(&path, json!({"projects": ["never"]})).await.refused(404);
    assert_eq!(s.patch(&path, json!({"description": "of the tenant"})).await.status, 200);
    assert_eq!(s.get(&path).await.metadata()["description"], "of the tenant");
    assert_eq!(s.patch(&path, json!({"restricted": false, "projects": []})).await.status, 200);
    assert_eq!(client.get("/1.0/projects").await.metadata().as_array().unwrap().len(), 2);
    client.patch_self(&path).await;
    // Distrusted, also on a connection that is open already.
    let mut open = client.connect().await.unwrap();
    assert_eq!(Client::on(&mut open, Method::GET, "/1.0/instances", None, Value::Null).await.status, 200);
    assert_eq!(s.delete(&path).await.status, 200);
    Client::on(&mut open, Method::GET, "/1.0/instances", None, Value::Null).await.refused(403);
    // By its content; twice is a conflict; metrics certificates read metrics only.
    let pem = base64::engine::general_purpose::STANDARD.encode(&client.der);
    let add = json!({"name": "prometheus", "type": "metrics", "certificate": pem});
    assert_eq!(s.post("/1.0/certificates", add.clone()).await.status, 201);
    s.post("/1.0/certificates", add).await.refused(409);
    client.get("/1.0/instances").await.refused(404);
    assert_eq!(client.get("/1.0/warnings").await.metadata(), json!([]));
    assert_eq!(client.get("/1.0").await.metadata()["auth"], "trusted");
    s.post("/1.0/certificates", json!({"name": "x", "certificate": "AAAA"})).await.refused(400);
    s.post("/1.0/certificates", json!({"name": "x", "type": "server", "certificate": "AAAA"}))
        .await
        .refused(400);
}

impl Client {
    /// Who is not restricted may change what he finds; here, his own name.
    async fn patch_self(&self, path: &str) {
        let mut open = self.connect().await.unwrap();
        let answer = Self::on(&mut open, Method::PATCH, path, None, json!({"name": "myself"})).await;
        assert_eq!(answer.status, 200);
        assert_eq!(self.get(path).await.metadata()["name"], "myself");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_are_shown_with_each_request() {
    let (s, address) = listening().await;
    let body = json!({"name": "robot", "role": "viewer", "projects": ["default"], "description": "d"});
    let made = s.post("/1.0/karst/tokens", body.clone()).await.metadata();
    let token = made["token"].as_str().unwrap();
    s.post("/1.0/karst/tokens", body).await.refused(409);
    s.post("/1.0/karst/tokens", json!({"name": "x", "role": "king"})).await.refused(400);
    s.post("/1.0/karst/tokens", json!({"name": "x", "role": "user", "expires_at": "2001-01-01T00:00:00Z"}))
        .await
        .refused(400);
    let listed = s.get("/1.0/karst/tokens").await;
    assert!(
        !String::from_utf8_lossy(&listed.body).contains(&token[token.len() - 64..]),
        "no secret in lists"
    );
    assert_eq!(listed.metadata()[0]["grants"], json!([{"role": "viewer", "project": "default"}]));
    let client = Client::new(&s, address, false, BOTH);
    let mut open = client.connect().await.unwrap();
    let on = async |open: &mut _, method, path: &str, token: &str| {
        Client::on(open, method, path, Some(token), Value::Null).await
    };
    assert_eq!(on(&mut open, Method::GET, "/1.0/instances", token).await.status, 200);
    assert_eq!(on(&mut open, Method::GET, "/1.0", token).await.metadata()["auth_user_name"], "robot");
    on(&mut open, Method::DELETE, "/1.0/instances/x", token).await.refused(403);
    let mut wrong = token.to_owned();
    wrong.replace_range(token.len() - 1.., if token.ends_with('0') { "1" } else { "0" });
    for bad in [wrong.as_str(), "", "karst_", "karst_x_y", &token[..40]] {
        on(&mut open, Method::GET, "/1.0", bad).await.refused(403);
    }
    assert_eq!(s.delete("/1.0/karst/tokens/robot").await.status, 200);
    on(&mut open, Method::GET, "/1.0/instances", token).await.refused(403);
    s.delete("/1.0/karst/tokens/robot").await.refused(404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roles_are_given_and_explained() {
    let s = Server::start().await;
    s.container("c1", false).await;
    let body = json!({"name": "robot", "role": "viewer", "projects": ["default"]});
    s.post("/1.0/karst/tokens", body).await.metadata();
    let grant = json!({"principal": "token/robot", "role": "operator", "project": "default"});
    assert_eq!(s.post("/1.0/karst/access", grant.clone()).await.status, 200);
    assert_eq!(s.post("/1.0/karst/access", grant.clone()).await.status, 200, "given already");
    s.post("/1.0/karst/access", json!({"principal": "nobody", "role": "user"})).await.refused(404);
    s.post("/1.0/karst/access", json!({"principal": "robot", "role": "owner"})).await.refused(400);
    s.post("/1.0/karst/access", json!({"principal": "unix", "role": "user"})).await.refused(400);
    let wanted = json!([
        {"identifier": "robot", "role": "operator", "provider": "token"},
        {"identifier": "robot", "role": "viewer", "provider": "token"},
    ]);
    assert_eq!(s.get("/1.0/projects/default/access").await.metadata(), wanted);
    assert_eq!(s.get("/1.0/instances/c1/access").await.metadata(), wanted);
    assert_eq!(s.get("/1.0/karst/access").await.metadata()[0]["project"], "default");
    let why = |object: &str| {
        format!("/1.0/karst/access/why?principal=robot&permission=resource_edit&object={object}")
    };
    let yes = s.get(&why("/1.0/instances/c1")).await.metadata();
    assert_eq!((&yes["allowed"], &yes["object"]), (&json!(true), &json!("project default")));
    let no = s.get(&why("server")).await.metadata();
    assert_eq!(no["allowed"], false);
    assert_eq!(no["because"].as_array().unwrap().len(), 2, "{no}");
    s.get("/1.0/karst/access/why?permission=fly&object=server").await.refused(400);
    let raw = s.send(Method::DELETE, "/1.0/karst/access", &[], grant.to_string()).await;
    assert_eq!(raw.status, 200);
    s.send(Method::DELETE, "/1.0/karst/access", &[], grant.to_string()).await.refused(404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_are_incus() {
    let (s, address) = listening().await;
    assert_eq!(s.post("/1.0/projects", json!({"name": "tenant"})).await.status, 201);
    // Made in an order that is none of names.
    for (name, runs) in [("c1", true), ("idle", false), ("b1", true)] {
        s.container(name, runs).await;
    }
    let text = |a: &Answer| String::from_utf8(a.body.to_vec()).unwrap();
    let answer = s.get("/1.0/metrics").await;
    assert!(answer.header("content-type").starts_with("text/plain; version=0.0.4"));
    let all = text(&answer);
    for line in [
        "# TYPE incus_cpu_seconds_total counter",
        "# TYPE incus_procs_total gauge",
        "incus_operations_total 0",
        "# EOF",
    ] {
        assert!(all.lines().any(|l| l == line), "{line}: {all}");
    }
    for start in [
        "incus_cpu_seconds_total{cpu=\"0\",mode=\"user\"",
        "incus_disk_read_bytes_total{device=\"sda\"",
        "incus_disk_writes_completed_total{device=\"sda\"",
        "incus_filesystem_size_bytes{device=\"/dev/sda1\",fstype=\"ext4\",mountpoint=\"/\"",
        "incus_memory_OOM_kills_total{",
        "incus_memory_Active_file_bytes{",
        "incus_memory_MemTotal_bytes{",
        "incus_memory_Writeback_bytes{",
        "incus_network_receive_drop_total{device=\"lo\"",
        "incus_network_transmit_errs_total{device=\"lo\"",
    ] {
        assert!(all.lines().any(|l| l.starts_with(start)), "{start}: {all}");
    }
    // Those that run, in the order of their names.
    let of = |name: &str| format!("incus_memory_MemTotal_bytes{{name=\"{name}\",project=\"default\"");
    let totals: Vec<&str> = all.lines().filter(|l| l.starts_with("incus_memory_MemTotal_bytes{")).collect();
    assert!(
        totals.len() == 2 && totals[0].starts_with(&of("b1")) && totals[1].starts_with(&of("c1")),
        "{all}"
    );
    assert!(!all.contains("name=\"idle\""), "{all}");
    assert!(
        all.contains("incus_memory_RSS_bytes{name=\"c1\",project=\"default\",type=\"container\"}"),
        "{all}"
    );
    let open = s
        .send(Method::GET, "/1.0/metrics", &[("accept", "application/openmetrics-text; version=1.0.0")], "")
        .await;
    assert!(open.header("content-type").starts_with("application/openmetrics-text"));
    assert!(text(&open).contains("# TYPE incus_cpu_seconds counter"));
    // Of one project, and of those that the caller sees.
    assert!(!text(&s.get("/1.0/metrics?project=tenant").await).contains("c1"));
    s.get("/1.0/metrics?project=never").await.refused(404);
    let scraper = Client::new(&s, address, true, BOTH);
    let add = |restricted: bool| {
        let der = base64::engine::general_purpose::STANDARD.encode(&scraper.der);
        let projects = if restricted { json!(["tenant"]) } else { json!([]) };
        json!({"name": "p", "type": "metrics", "certificate": der, "restricted": restricted, "projects": projects})
    };
    scraper.get("/1.0/metrics").await.refused(403);
    assert_eq!(s.post("/1.0/certificates", add(true)).await.status, 201);
    let seen = text(&scraper.get("/1.0/metrics").await);
    assert!(!seen.contains("c1") && !seen.contains("operations"), "{seen}");
    assert_eq!(s.delete(&format!("/1.0/certificates/{}", scraper.fingerprint)).await.status, 200);
    assert_eq!(s.post("/1.0/certificates", add(false)).await.status, 201);
    assert!(text(&scraper.get("/1.0/metrics").await).contains("c1"));
    // An address of their own, open to whoever reaches it.
    let own = unused_address();
    let config = json!({"config": {"core.metrics_address": own.to_string()}});
    assert_eq!(s.patch("/1.0", config).await.status, 200);
    let stranger = Client::new(&s, own, false, BOTH);
    stranger.get("/1.0/metrics").await.refused(403);
    stranger.get("/1.0").await.refused(404);
    assert_eq!(
        s.patch("/1.0", json!({"config": {"core.metrics_authentication": "false"}})).await.status,
        200
    );
    assert!(text(&stranger.get("/1.0/metrics").await).contains("c1"));
    stranger.get("/1.0/instances").await.refused(404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_and_refusals_are_audited() {
    let (s, address) = listening().await;
    s.container("c1", false).await;
    s.delete("/1.0/instances/nope?project=default").await.refused(404);
    let stranger = Client::new(&s, address, true, BOTH);
    stranger.get("/1.0/instances").await.refused(403);
    for _ in 0..20 {
        stranger.get("/1.0/profiles").await.refused(403);
    }
    s.engine.audit_flush(crate::common::PATIENCE).await.unwrap();
    let records = s.get("/1.0/karst/audit").await.metadata();
    let all: Vec<&Value> = records.as_array().unwrap().iter().map(|r| &r["entry"]).collect();
    let has = |what: &str, object: &str, outcome: &str| {
        let found =
            all.iter().filter(|e| e["what"] == what && e["object"] == object && e["outcome"] == outcome);
        found.count()
    };
    assert_eq!(has("request POST", "/1.0/instances", "accepted"), 1, "{all:#?}");
    assert_eq!(has("instance-created", "/1.0/instances/c1", "done"), 1);
    assert_eq!(has("request DELETE", "/1.0/instances/nope", "failed"), 1);
    assert_eq!(has("request GET", "/1.0/instances", "refused"), 1);
    assert!(has("request GET", "/1.0/profiles", "refused") <= 15, "strangers do not fill the log");
    let refused = all.iter().find(|e| e["outcome"] == "refused").unwrap();
    assert_eq!(refused["who"], "anonymous");
    let last = records.as_array().unwrap().last().unwrap();
    let verdict = s.get("/1.0/karst/audit/verify").await.metadata()[0].clone();
    assert_eq!((&verdict["fault"], &verdict["node"]), (&Value::Null, &json!("node1")));
    assert!(verdict["head"]["seq"].as_u64() >= last["seq"].as_u64());
    let page = s.get("/1.0/karst/audit?from=2&limit=1").await.metadata();
    assert_eq!((page.as_array().unwrap().len(), &page[0]["seq"]), (1, &json!(2)));
    s.get("/1.0/karst/audit?from=-1").await.refused(400);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn warnings_live() {
    let s = Server::start().await;
    // The simulated host says of itself that it is simulated.
    let list = async || s.get("/1.0/warnings?recursion=1").await.metadata();
    let first = async |status: &str| {
        let wait = async {
            loop {
                let all = list().await;
                match all.as_array().unwrap().iter().find(|w| w["status"] == status) {
                    Some(found) => return found.clone(),
                    None => tokio::time::sleep(std::time::Duration::from_millis(50)).await,
                }
            }
        };
        tokio::time::timeout(crate::common::PATIENCE, wait).await.expect("a warning in time")
    };
    let found = first("new").await;
    let path = format!("/1.0/warnings/{}", found["uuid"].as_str().unwrap());
    assert_eq!(
        (&found["type"], &found["severity"], &found["count"]),
        (&json!("Host"), &json!("moderate"), &json!(1))
    );
    assert!(found["last_message"].as_str().unwrap().contains("simulated"));
    assert_eq!(s.get(&path).await.metadata(), found);
    assert_eq!(s.get("/1.0/warnings").await.metadata(), json!([path]));
    assert_eq!(s.get("/1.0/warnings?project=default").await.metadata(), json!([]));
    s.put(&path, json!({"status": "resolved"})).await.refused(400);
    assert_eq!(s.patch(&path, json!({"status": "acknowledged"})).await.status, 200);
    assert_eq!(s.get(&path).await.metadata()["status"], "acknowledged");
    // As clients do it: the whole of what they got goes back.
    let mut whole = s.get(&path).await.metadata();
    whole["status"] = json!("new");
    s.put(&path, whole).await.metadata();
    assert_eq!(s.get(&path).await.metadata()["status"], "new");
    let more = s.put(&path, json!({"status": "acknowledged", "statu": "x"})).await.refused(400);
    assert!(more.contains("status"), "{more}");
    // It comes again while its reason lasts.
    assert_eq!(s.delete(&path).await.status, 200);
    assert_eq!(first("new").await["uuid"], found["uuid"]);
    s.get("/1.0/warnings/00000000-0000-0000-0000-000000000001").await.refused(404);
    s.get("/1.0/warnings/x").await.refused(404);
}

/// Another front end's listener, which notes what it is told.
struct Listener(std::sync::Mutex<Vec<String>>);

#[async_trait::async_trait]
impl NetworkListener for Listener {
    async fn release(&self, settings: &ServerSettings) {
        let said = settings.libvirt_address.map(|a| a.to_string()).unwrap_or_default();
        self.0.lock().unwrap().push(format!("release {said}"));
    }
    async fn ensure(&self, settings: &ServerSettings) -> karst_model::Result<()> {
        let said = settings.libvirt_address.map(|a| a.to_string()).unwrap_or_default();
        self.0.lock().unwrap().push(format!("ensure {said}"));
        match said == "192.0.2.1:16514" {
            true => {
                Err(karst_model::Error::invalid("config.core.libvirt_address", "not an address of this host"))
            }
            false => Ok(()),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_libvirt_get_certificates() {
    let s = Server::start().await;
    let listener = Arc::new(Listener(Default::default()));
    s.engine.set_network_listener(listener.clone());
    let told = || std::mem::take(&mut *listener.0.lock().unwrap());
    let state = s.get("/1.0/karst/libvirt").await.metadata();
    assert_eq!(state["address"], "");
    let authority = state["certificate_authority"].as_str().unwrap().to_owned();
    assert!(authority.starts_with("-----BEGIN CERTIFICATE-----"));
    assert_eq!(s.put("/1.0", json!({"config": {"core.libvirt_address": "127.0.0.1"}})).await.status, 200);
    assert_eq!(told(), ["release 127.0.0.1:16514", "ensure 127.0.0.1:16514"]);
    assert_eq!(s.get("/1.0/karst/libvirt").await.metadata()["address"], "127.0.0.1:16514");
    // What cannot be listened on is not recorded, and what was comes back.
    let refused = s.put("/1.0", json!({"config": {"core.libvirt_address": "192.0.2.1"}})).await.refused(400);
    assert!(refused.contains("not an address of this host"), "{refused}");
    assert_eq!(told()[2..], ["release 127.0.0.1:16514", "ensure 127.0.0.1:16514"]);
    assert_eq!(s.get("/1.0").await.metadata()["config"], json!({"core.libvirt_address": "127.0.0.1"}));
    for (key, value) in [("core.libvirt_address", "x"), ("core.libvirt_names", "a b")] {
        assert!(s.put("/1.0", json!({"config": {key: value}})).await.refused(400).contains(key));
    }
    // A client's certificate is trusted, and its key is told once.
    assert_eq!(s.post("/1.0/projects", json!({"name": "tenant"})).await.status, 201);
    let body = json!({"name": "laptop", "restricted": true, "projects": ["tenant"]});
    let made = s.post("/1.0/karst/libvirt/clients", body.clone()).await.metadata();
    assert_eq!(made["certificate_authority"], authority);
    assert!(made["key"].as_str().unwrap().contains("PRIVATE KEY"));
    let path = format!("/1.0/certificates/{}", made["fingerprint"].as_str().unwrap());
    let record = s.get(&path).await.metadata();
    assert_eq!((&record["name"], &record["projects"]), (&json!("laptop"), &json!(["tenant"])));
    assert_eq!((&record["restricted"], &record["certificate"]), (&json!(true), &made["certificate"]));
    let count = async || s.get("/1.0/certificates").await.metadata().as_array().unwrap().len();
    for (wrong, field) in [
        (json!({}), "name"),
        (json!({"name": ""}), "name"),
        (json!({"name": "a", "projects": ["tenant"]}), "projects"),
        (json!({"name": "a", "colour": "red"}), "colour"),
    ] {
        assert!(s.post("/1.0/karst/libvirt/clients", wrong).await.refused(400).contains(field));
    }
    let body = json!({"name": "a", "restricted": true, "projects": ["never"]});
    s.post("/1.0/karst/libvirt/clients", body).await.refused(404);
    assert_eq!(count().await, 1);
    let operator = Principal::of(
        karst_model::PrincipalId(uuid::Uuid::from_u128(5)),
        karst_model::access::Identity::System,
        vec![karst_model::access::Grant { role: karst_model::access::Role::Operator, project: None }],
    );
    let body = json!({"name": "mine"}).to_string();
    s.send_as(operator, Method::POST, "/1.0/karst/libvirt/clients", body).await.refused(403);
    s.send_as(Principal::anonymous(), Method::GET, "/1.0/karst/libvirt", String::new()).await.refused(403);
    assert_eq!(count().await, 1);
}
