//! A whole platform behind a unix socket: the front end over an engine on an in-memory store and a simulated host.
#![allow(clippy::disallowed_methods)] // a test tool

use crate::described::Watch;
use futures::{SinkExt, StreamExt};
use http_body_util::{BodyExt, Full};
use hyper::{HeaderMap, Method, Request, body::Bytes};
use hyper_util::rt::TokioIo;
use karst_agent::simulated::{SimulatedAgent, SimulatedOptions};
use karst_engine::{Agents, Context, Engine, EngineConfig};
use karst_env::RealEnv;
use karst_frontend_incus::{
    App, Identity, ServerInfo,
    places::Bounds,
    routes::{State, TABLE},
    serve, serve_connection,
};
use karst_model::{ByteSize, NodeId, access::Principal};
use karst_store::{SqliteStore, Store};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::{path::PathBuf, time::Duration};
use tokio::net::{UnixListener, UnixStream};
use tokio_tungstenite::{WebSocketStream, tungstenite::Message};

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A port of loopback that nobody has and nobody is given by chance: below those that the kernel draws for connections
/// and for port 0, and never the same twice in one program.
pub fn unused_address() -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id().wrapping_mul(64);
    let drawn = || 10_000 + (first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % 20_000) as u16;
    // On every address: a test moves its server from one to all.
    let free = |port: &u16| TcpListener::bind(("0.0.0.0", *port)).is_ok();
    let mut ports = std::iter::repeat_with(drawn).take(1000);
    SocketAddr::from(([127, 0, 0, 1], ports.find(free).expect("one of 1,000 ports is free")))
}

pub struct Server {
    pub app: Arc<App>,
    pub engine: Engine,
    /// Hears when the server is asked to end.
    pub shutdown: tokio::sync::mpsc::Receiver<()>,
    pub agent: Arc<SimulatedAgent>,
    pub socket: PathBuf,
    pub dir: tempfile::TempDir,
    /// What it reads and answers, beside the description of the API.
    pub watch: Arc<Watch>,
    /// The test that started it.
    test: String,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        self.engine.close();
        let untouched = Touched::end(&self.test, self.app.served.places());
        if !std::thread::panicking() {
            let name = &self.test;
            assert!(
                untouched.is_empty(),
                "the table names {name}, which never had an answer of {untouched:#?}"
            );
            let faults = self.watch.faults();
            assert!(faults.is_empty(), "what happens and what `describe` says differ: {faults:#?}");
        }
    }
}

/// What the servers of a test answered. The rows of the table that name the test are demanded of it when its last server
/// ends: so each test is checked by itself, whatever else runs, before it or beside it.
#[derive(Default)]
struct Touched {
    running: usize,
    places: BTreeSet<usize>,
}

static TOUCHED: Mutex<BTreeMap<String, Touched>> = Mutex::new(BTreeMap::new());

impl Touched {
    /// A server begins; answers the name of the test, which is that of its thread.
    fn begin() -> String {
        let thread = std::thread::current();
        let name = thread.name().and_then(|n| n.rsplit("::").next()).filter(|n| *n != "main");
        let name = name.expect("a server is started by the thread of a test").to_owned();
        assert!(!name.starts_with("tokio"), "a server is started by the test itself, not by a task of it");
        TOUCHED.lock().unwrap().entry(name.clone()).or_default().running += 1;
        name
    }

    /// A server ends; answers the rows that name its test and that none of its servers answered, if it was the last.
    fn end(test: &str, places: impl Iterator<Item = usize>) -> Vec<String> {
        let mut all = TOUCHED.lock().unwrap_or_else(|e| e.into_inner());
        let Some(touched) = all.get_mut(test) else { return vec![] };
        touched.places.extend(places);
        touched.running -= 1;
        if touched.running > 0 {
            return vec![];
        }
        let rows = TABLE.iter().enumerate().filter(|(place, row)| {
            matches!(row.state, State::Done(_, named) if named == test) && !touched.places.contains(place)
        });
        rows.map(|(_, row)| format!("{} {}", row.method, row.path)).collect()
    }
}

pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }
    /// As [`Self::json`], null where the body is something else.
    pub fn json_or_null(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }
    pub fn metadata(&self) -> Value {
        assert!(self.status < 300, "{}: {}", self.status, String::from_utf8_lossy(&self.body));
        self.json()["metadata"].clone()
    }
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }
    /// The error's text, after its status was checked.
    pub fn refused(&self, status: u16) -> String {
        let json = self.json();
        assert_eq!((self.status, json["type"].as_str()), (status, Some("error")), "{json}");
        assert_eq!(json["error_code"], status);
        json["error"].as_str().unwrap().to_owned()
    }
}

impl Server {
    pub async fn start() -> Server {
        Self::with_places(Bounds::default()).await
    }

    /// With so many places for connections from the network.
    pub async fn with_places(bounds: Bounds) -> Server {
        let test = Touched::begin();
        let env = RealEnv::shared();
        let store: Arc<dyn Store> = Arc::new(SqliteStore::memory(env.clone()).unwrap());
        let options = SimulatedOptions {
            address_after: Duration::from_millis(20),
            pool_size: ByteSize::gib(1024),
            ..Default::default()
        };
        let agent = SimulatedAgent::new(env.clone(), options);
        let node = NodeId(uuid::Uuid::from_u128(7));
        let agents = Agents::default();
        agents.insert(node, agent.clone());
        let engine = Engine::open(EngineConfig {
            env,
            store,
            agents,
            nodes: vec![(node, "node1".into())],
            daemon_id: "5eed00".into(),
        })
        .await
        .unwrap();
        engine.bootstrap().await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("unix.socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let (tell, shutdown) = tokio::sync::mpsc::channel(1);
        let identity = Identity::load(dir.path(), "node1", jiff::civil::date(2026, 1, 1)).unwrap();
        let identity = Some(Arc::new(identity));
        let authority = karst_tls::Authority::new(dir.path().to_owned(), "libvirt-ca", "node1");
        let info = ServerInfo {
            version: "test".into(),
            name: "node1".into(),
            shutdown: Some(tell),
            identity,
            authority: Some(Arc::new(authority)),
        };
        let app = App::bounded(engine.clone(), info, bounds);
        let watch = Arc::new(Watch::default());
        let watching = watch.clone();
        app.record(Box::new(move |place, reads| watching.read(place, reads)));
        let task = tokio::spawn(serve(app.clone(), listener));
        Server { app, engine, shutdown, agent, socket, dir, watch, test, task }
    }

    pub async fn raw(&self, request: Request<Full<Bytes>>) -> Answer {
        let stream = UnixStream::connect(&self.socket).await.unwrap();
        self.watched(stream, request).await
    }

    /// A request of somebody else than who runs the test.
    pub async fn send_as(&self, principal: Principal, method: Method, path: &str, body: String) -> Answer {
        let (near, far) = UnixStream::pair().unwrap();
        tokio::spawn(serve_connection(self.app.clone(), Context::new(principal), far));
        let request = Request::builder().method(method).uri(path).header("host", "unix.socket");
        self.watched(near, request.body(Full::new(body.into())).unwrap()).await
    }

    /// An exchange whose answer must be as the document says.
    async fn watched(&self, stream: UnixStream, request: Request<Full<Bytes>>) -> Answer {
        let (method, uri) = (request.method().clone(), request.uri().to_string());
        let answer = Self::exchange(stream, request).await;
        self.watch.answered(&method, &uri, &answer);
        answer
    }

    pub async fn exchange<S>(stream: S, request: Request<Full<Bytes>>) -> Answer
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        let exchange = async {
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            let (head, body) = sender.send_request(request).await.unwrap().into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            Answer { status: head.status.as_u16(), headers: head.headers, body }
        };
        tokio::time::timeout(PATIENCE, exchange).await.expect("an answer in time")
    }

    pub async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(path).header("host", "unix.socket");
        for (k, v) in headers {
            request = request.header(*k, *v);
        }
        self.raw(request.body(Full::new(body.into())).unwrap()).await
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, path, &[], "").await
    }
    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.send(Method::POST, path, &[], body.to_string()).await
    }
    pub async fn put(&self, path: &str, body: Value) -> Answer {
        self.send(Method::PUT, path, &[], body.to_string()).await
    }
    pub async fn patch(&self, path: &str, body: Value) -> Answer {
        self.send(Method::PATCH, path, &[], body.to_string()).await
    }
    pub async fn delete(&self, path: &str) -> Answer {
        self.send(Method::DELETE, path, &[], "").await
    }

    /// Waits for the operation behind a 202 and answers it.
    pub async fn wait(&self, answer: Answer) -> Value {
        assert_eq!(answer.status, 202, "{}", String::from_utf8_lossy(&answer.body));
        let path = answer.json()["operation"].as_str().unwrap().to_owned();
        assert_eq!(answer.header("location"), path);
        self.get(&format!("{path}/wait?timeout=60")).await.metadata()
    }

    /// As [`Server::wait`], and it must have ended well.
    pub async fn done(&self, answer: Answer) -> Value {
        let operation = self.wait(answer).await;
        assert_eq!(operation["status_code"], 200, "{operation}");
        operation
    }

    /// An empty container.
    pub async fn container(&self, name: &str, start: bool) {
        let body = json!({"name": name, "source": {"type": "none"}, "start": start});
        self.done(self.post("/1.0/instances", body).await).await;
    }

    pub async fn websocket(&self, path: &str) -> WebSocketStream<UnixStream> {
        let stream = UnixStream::connect(&self.socket).await.unwrap();
        let url = format!("ws://unix.socket{path}");
        tokio_tungstenite::client_async(url, stream).await.expect("a websocket").0
    }
}

/// The next message that carries anything.
pub async fn next(socket: &mut WebSocketStream<UnixStream>) -> Option<Message> {
    loop {
        let message = tokio::time::timeout(PATIENCE, socket.next()).await.expect("a message in time");
        match message {
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(message)) => return Some(message),
            Some(Err(_)) | None => return None,
        }
    }
}

/// All that is sent until the end of the stream (an empty text), as text.
pub async fn stream_of(socket: &mut WebSocketStream<UnixStream>) -> String {
    let mut all = vec![];
    while let Some(Message::Binary(data)) = next(socket).await {
        all.extend_from_slice(&data);
    }
    String::from_utf8(all).unwrap()
}

/// Reads binary messages until `wanted` has come.
pub async fn expect(socket: &mut WebSocketStream<UnixStream>, wanted: &str) {
    let mut all = String::new();
    while !all.contains(wanted) {
        match next(socket).await {
            Some(Message::Binary(data)) => all.push_str(std::str::from_utf8(&data).unwrap()),
            other => panic!("{other:?} where {wanted:?} is expected, after {all:?}"),
        }
    }
}

pub async fn say(socket: &mut WebSocketStream<UnixStream>, message: Message) {
    socket.send(message).await.unwrap();
}

/// Waits until it holds, looking again and again.
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let look = async {
        while !holds().await {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    if tokio::time::timeout(PATIENCE, look).await.is_err() {
        panic!("never: {what}");
    }
}
