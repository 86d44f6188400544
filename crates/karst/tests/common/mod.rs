//! A small server that answers like Incus over a unix socket, and runs the commands of `exec` as real processes here.
#![allow(dead_code, reason = "each test file uses a part")]

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{
        Path as UrlPath, Query, Request, State,
        ws::{Message, WebSocket, WebSocketUpgrade},
    },
    http::{HeaderMap, StatusCode},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{delete, get, post, put},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixListener,
    process::Command,
    sync::{broadcast, mpsc, watch},
};

/// Bound of every wait.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Work of the fake server.
struct Work {
    /// The operation as the API shows it; watched by waiters.
    state: watch::Sender<Value>,
    /// Websockets that came in, by secret.
    sockets: mpsc::Sender<(String, WebSocket)>,
}

#[derive(Default)]
struct Inner {
    requests: Mutex<Vec<String>>,
    bodies: Mutex<Vec<Value>>,
    operations: Mutex<HashMap<String, Work>>,
    files: Mutex<HashMap<String, (HeaderMap, Bytes)>>,
    /// What came over control websockets.
    control: Mutex<Vec<Value>>,
    /// What was typed into terminals.
    typed: Mutex<Vec<u8>>,
    changed: watch::Sender<u64>,
    events: std::sync::OnceLock<broadcast::Sender<Value>>,
}

impl Inner {
    fn note(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    fn events(&self) -> &broadcast::Sender<Value> {
        self.events.get_or_init(|| broadcast::channel(64).0)
    }
}

type Shared = State<Arc<Inner>>;

/// A running fake server.
pub struct Fake {
    /// Holds `unix.socket`.
    pub dir: tempfile::TempDir,
    inner: Arc<Inner>,
}

impl Fake {
    /// Starts it.
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let inner = Arc::new(Inner::default());
        let router = Router::new()
            .route("/1.0/instances", get(instances).post(create))
            .route("/1.0/instances/{name}", get(instance).put(put_instance).delete(delete_instance))
            .route("/1.0/instances/{name}/state", put(change_state))
            .route("/1.0/instances/{name}/exec", post(exec))
            .route("/1.0/instances/{name}/console", post(console))
            .route("/1.0/instances/{name}/files", get(get_file).post(put_file))
            .route("/1.0/karst/images/build", post(build))
            .route("/1.0/karst/registries", get(registries))
            .route("/1.0/karst/registries/{host}", put(put_display).delete(registries))
            .route("/1.0/karst/instances/{name}/vnc", get(display).put(put_display))
            .route("/1.0/operations/{id}", get(operation).delete(cancel))
            .route("/1.0/operations/{id}/wait", get(wait))
            .route("/1.0/operations/{id}/websocket", get(stream))
            .route("/1.0/events", get(events))
            .route("/1.0/broken", delete(|| async { (StatusCode::BAD_GATEWAY, "a\nb") }))
            .layer(middleware::from_fn_with_state(inner.clone(), log))
            .with_state(inner.clone());
        let listener = UnixListener::bind(dir.path().join("unix.socket")).unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { dir, inner }
    }

    /// `karst` with these arguments, talking to this server; stdin, stdout and stderr as the caller sets them.
    pub fn karst(&self, arguments: &[&str]) -> Command {
        karst(self.dir.path(), arguments)
    }

    /// Runs `karst` to its end.
    pub async fn run(&self, arguments: &[&str]) -> Output {
        self.run_with(arguments, b"").await
    }

    /// Runs `karst` to its end with this on its stdin.
    pub async fn run_with(&self, arguments: &[&str], input: &[u8]) -> Output {
        let mut child = self.karst(arguments).stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        let feed = tokio::spawn(async move {
            let _ = stdin.write_all(&input).await;
        });
        let output =
            tokio::time::timeout(PATIENCE, child.wait_with_output()).await.expect("karst ends").unwrap();
        feed.abort();
        output
    }

    /// `METHOD target` of all requests so far.
    pub fn requests(&self) -> Vec<String> {
        self.inner.requests.lock().unwrap().clone()
    }

    /// Bodies of requests that create something.
    pub fn bodies(&self) -> Vec<Value> {
        self.inner.bodies.lock().unwrap().clone()
    }

    /// Messages of control websockets.
    pub fn control(&self) -> Vec<Value> {
        self.inner.control.lock().unwrap().clone()
    }

    /// Bytes typed into terminals.
    pub fn typed(&self) -> Vec<u8> {
        self.inner.typed.lock().unwrap().clone()
    }

    /// Waits until a condition on this server holds.
    pub async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let mut changed = self.inner.changed.subscribe();
        let wait = async {
            while !condition(self) {
                changed.changed().await.unwrap();
            }
        };
        tokio::time::timeout(PATIENCE, wait)
            .await
            .unwrap_or_else(|_| panic!("never: {what}; requests: {:#?}", self.requests()));
    }
}

/// `karst` with a server directory and a clean environment.
pub fn karst(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_karst"));
    command
        .args(arguments)
        .env_clear()
        .env("KARST_DIR", dir)
        .env("TZ", "UTC")
        .env("TERM", "xterm")
        .kill_on_drop(true);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// stdout and stderr as text, and the exit code.
pub fn texts(output: &Output) -> (String, String, i32) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (text(&output.stdout), text(&output.stderr), output.status.code().unwrap_or(-1))
}

/// Sends a signal to a child of the test.
pub fn signal(child: &tokio::process::Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(child.id().expect("it runs") as i32).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

async fn log(State(inner): Shared, request: Request, next: Next) -> Response {
    let target = request.uri().path_and_query().map(|target| target.as_str().to_owned()).unwrap_or_default();
    inner.requests.lock().unwrap().push(format!("{} {target}", request.method()));
    inner.note();
    next.run(request).await
}

fn sync(metadata: Value) -> Response {
    Json(json!({"type": "sync", "status": "Success", "status_code": 200, "metadata": metadata}))
        .into_response()
}

fn error(code: u16, text: &str) -> Response {
    let body = Json(json!({"type": "error", "error_code": code, "error": text}));
    (StatusCode::from_u16(code).unwrap(), body).into_response()
}

async fn instances(Query(query): Query<HashMap<String, String>>) -> Response {
    if !query.contains_key("recursion") {
        return sync(json!(["/1.0/instances/c1", "/1.0/instances/web"]));
    }
    let state = json!({"pid": 42, "processes": 7, "cpu": {"usage": 1_500_000_000u64},
        "memory": {"usage": 52_428_800, "total": 104_857_600},
        "network": {"eth0": {"type": "broadcast", "addresses": [
            {"family": "inet", "address": "10.0.0.2", "netmask": "24", "scope": "global"},
            {"family": "inet6", "address": "fd00::2", "netmask": "64", "scope": "global"},
            {"family": "inet6", "address": "fe80::1", "netmask": "64", "scope": "link"}]}}});
    sync(json!([
        {"name": "web", "status": "Stopped", "type": "virtual-machine", "project": "default", "profiles": null,
         "snapshots": null, "state": {"pid": 0, "network": null}},
        {"name": "c1", "status": "Running", "type": "container", "project": "default", "profiles": ["default"],
         "state": state}
    ]))
}

/// The ETag changes with each answered change, and once by itself: somebody else was faster.
async fn instance(State(inner): Shared, UrlPath(name): UrlPath<String>) -> Response {
    match name.as_str() {
        "c1" => {
            let etag = inner.bodies.lock().unwrap().len().to_string();
            let object = json!({"name": "c1", "status": "Running", "type": "container", "description": "kept",
                "config": {"user.before": "1"}, "expanded_config": {"user.before": "1", "user.inherited": "2"}});
            ([("ETag", etag)], sync(object)).into_response()
        }
        "wbe" => error(404, "instance \"wbe\" not found; did you mean \"web\"?"),
        _ => error(404, "Instance not found"),
    }
}

async fn put_instance(State(inner): Shared, headers: HeaderMap, Json(body): Json<Value>) -> Response {
    let mut bodies = inner.bodies.lock().unwrap();
    if bodies.is_empty() {
        bodies.push(json!("somebody else's change"));
    }
    let expected = bodies.len().to_string();
    if headers.get("If-Match").and_then(|value| value.to_str().ok()) != Some(expected.as_str()) {
        return error(412, "ETag doesn't match");
    }
    bodies.push(body);
    drop(bodies);
    accepted(&inner, &finished(&inner, 200, ""))
}

async fn delete_instance(State(inner): Shared, UrlPath(name): UrlPath<String>) -> Response {
    match name.as_str() {
        "c1" => error(400, "Instance is running"),
        "gone" => error(404, "Instance not found"),
        _ => accepted(&inner, &finished(&inner, 200, "")),
    }
}

async fn change_state(State(inner): Shared, Json(body): Json<Value>) -> Response {
    inner.bodies.lock().unwrap().push(body);
    accepted(&inner, &finished(&inner, 200, ""))
}

/// Operations come and go by the alias of the image.
async fn create(State(inner): Shared, Json(body): Json<Value>) -> Response {
    inner.bodies.lock().unwrap().push(body.clone());
    let alias = body["source"]["alias"].as_str().unwrap_or_default();
    let id = match alias {
        "bad" => finished(&inner, 400, "Failed creating instance:\n  no space left"),
        "slow" | "stuck" => begun(&inner, alias == "slow", Value::Null).0,
        "progress" => {
            let (id, _sockets) = begun(&inner, false, Value::Null);
            let inner = inner.clone();
            let operation = id.clone();
            tokio::spawn(async move {
                // Only once somebody listens, so that the test does not depend on time.
                let mut changed = inner.changed.subscribe();
                while inner.events().receiver_count() == 0 {
                    changed.changed().await.unwrap();
                }
                let metadata =
                    json!({"create_instance_from_image_unpack_progress": "Unpack: 34% (1.20GB/s)"});
                update(&inner, &operation, |state| state["metadata"] = metadata.clone());
                let seen = |request: &String| request.contains("progress-seen");
                while !inner.requests.lock().unwrap().iter().any(seen) {
                    changed.changed().await.unwrap();
                }
                end(&inner, &operation, 200, "");
            });
            id
        }
        "restart" => {
            let id = finished(&inner, 200, "");
            update(&inner, &id, |state| state["description"] = json!("restart"));
            id
        }
        "absent" => return error(404, "Image not found"),
        _ => finished(&inner, 200, ""),
    };
    accepted(&inner, &id)
}

async fn display(State(inner): Shared) -> Response {
    let last = inner.bodies.lock().unwrap().last().cloned();
    let end = last.as_ref().map_or(Value::Null, |body| body["valid_to"].clone());
    sync(json!({"display": true, "password": last.is_some(), "valid_to": end}))
}

async fn registries() -> Response {
    sync(json!([{"host": "registry.example:5000", "user": "robot", "certificate": null}]))
}

async fn put_display(State(inner): Shared, Json(body): Json<Value>) -> Response {
    inner.bodies.lock().unwrap().push(body);
    sync(json!({}))
}

async fn build(State(inner): Shared, Json(body): Json<Value>) -> Response {
    inner.bodies.lock().unwrap().push(body);
    let id = finished(&inner, 103, "");
    update(&inner, &id, |state| state["metadata"] = json!({"fingerprint": "f00dfeed"}));
    end(&inner, &id, 200, "");
    accepted(&inner, &id)
}

/// A new operation that goes on.
fn begun(inner: &Inner, may_cancel: bool, metadata: Value) -> (String, mpsc::Receiver<(String, WebSocket)>) {
    let mut operations = inner.operations.lock().unwrap();
    let id = format!("00000000-0000-4000-8000-{:012}", operations.len() + 1);
    let state = json!({"id": id, "class": "task", "description": "Creating instance", "status": "Running", "status_code": 103,
        "may_cancel": may_cancel, "metadata": metadata, "err": "", "resources": {"instances": ["/1.0/instances/chosen"]}});
    let (sockets, receiver) = mpsc::channel(8);
    operations.insert(id.clone(), Work { state: watch::Sender::new(state), sockets });
    (id, receiver)
}

fn finished(inner: &Inner, code: u16, err: &str) -> String {
    let id = begun(inner, false, Value::Null).0;
    if code >= 200 {
        end(inner, &id, code, err);
    }
    id
}

fn update(inner: &Inner, id: &str, change: impl Fn(&mut Value)) {
    let operations = inner.operations.lock().unwrap();
    let state = &operations[id].state;
    state.send_modify(|state| change(state));
    let event =
        json!({"type": "operation", "timestamp": "2026-11-21T08:00:00Z", "metadata": state.borrow().clone()});
    let _ = inner.events().send(event);
}

fn end(inner: &Inner, id: &str, code: u16, err: &str) {
    update(inner, id, |state| {
        state["status_code"] = json!(code);
        state["err"] = json!(err);
    });
}

/// As servers do: the operation as it was accepted, even if it has ended by now.
fn accepted(inner: &Inner, id: &str) -> Response {
    let mut state = inner.operations.lock().unwrap()[id].state.borrow().clone();
    state["status_code"] = json!(103);
    state["err"] = json!("");
    let body = json!({"type": "async", "status": "Operation created", "status_code": 100,
        "operation": format!("/1.0/operations/{id}"), "metadata": state});
    (StatusCode::ACCEPTED, Json(body)).into_response()
}

async fn operation(State(inner): Shared, UrlPath(id): UrlPath<String>) -> Response {
    match inner.operations.lock().unwrap().get(&id) {
        Some(work) => sync(work.state.borrow().clone()),
        None => error(404, "Operation not found"),
    }
}

async fn wait(State(inner): Shared, UrlPath(id): UrlPath<String>) -> Response {
    let Some(mut state) = inner.operations.lock().unwrap().get(&id).map(|work| work.state.subscribe()) else {
        return error(404, "Operation not found");
    };
    let is_wait = |request: &&String| request.contains("/wait");
    let first = inner.requests.lock().unwrap().iter().filter(is_wait).count() == 1;
    if first && state.borrow()["description"] == "restart" {
        // The connection breaks in the middle of the answer, as when a server is killed.
        let broken =
            futures::stream::iter([Ok(Bytes::from_static(b"{")), Err(std::io::Error::other("killed"))]);
        return axum::body::Body::from_stream(broken).into_response();
    }
    let ended = state.wait_for(|state| state["status_code"].as_u64() >= Some(200)).await.unwrap().clone();
    match ended["err"].as_str() {
        // Incus answers so.
        Some(text) if !text.is_empty() => error(400, text),
        _ => sync(ended),
    }
}

async fn cancel(State(inner): Shared, UrlPath(id): UrlPath<String>) -> Response {
    let may = inner.operations.lock().unwrap()[&id].state.borrow()["may_cancel"] == true;
    if !may {
        return error(400, "This operation can't be cancelled");
    }
    end(&inner, &id, 401, "");
    sync(json!({}))
}

async fn events(State(inner): Shared, upgrade: WebSocketUpgrade) -> Response {
    let mut events = inner.events().subscribe();
    inner.note();
    upgrade.on_upgrade(move |mut socket| async move {
        while let Ok(event) = events.recv().await {
            if socket.send(Message::text(event.to_string())).await.is_err() {
                return;
            }
        }
    })
}

async fn stream(
    State(inner): Shared,
    UrlPath(id): UrlPath<String>,
    Query(query): Query<HashMap<String, String>>,
    upgrade: WebSocketUpgrade,
) -> Response {
    let sockets = inner.operations.lock().unwrap()[&id].sockets.clone();
    let secret = query["secret"].clone();
    upgrade.on_upgrade(move |socket| async move {
        let _ = sockets.send((secret, socket)).await;
    })
}

/// Waits for the named websockets of an operation.
async fn collect<const N: usize>(
    mut sockets: mpsc::Receiver<(String, WebSocket)>,
    names: [&str; N],
) -> [WebSocket; N] {
    let mut found = HashMap::new();
    while found.len() < N {
        let (name, socket) = sockets.recv().await.unwrap();
        found.insert(name, socket);
    }
    names.map(|name| found.remove(&format!("secret-{name}")).unwrap())
}

async fn exec(State(inner): Shared, UrlPath(name): UrlPath<String>, Json(body): Json<Value>) -> Response {
    if name != "c1" {
        return error(404, "Instance not found");
    }
    inner.bodies.lock().unwrap().push(body.clone());
    let fds = if body["interactive"] == true {
        json!({"0": "secret-0", "control": "secret-control"})
    } else {
        json!({"0": "secret-0", "1": "secret-1", "2": "secret-2", "control": "secret-control"})
    };
    let (id, sockets) = begun(&inner, false, json!({"fds": fds}));
    let (shared, operation) = (inner.clone(), id.clone());
    tokio::spawn(async move {
        let code = if body["interactive"] == true {
            terminal(&shared, sockets).await
        } else {
            process(&shared, sockets, &body).await
        };
        update(&shared, &operation, |state| state["metadata"] = json!({"return": code}));
        let err = if code == 127 { "Command not found" } else { "" };
        end(&shared, &operation, if code == 127 { 400 } else { 200 }, err);
    });
    accepted(&inner, &id)
}

/// Runs the command here, its streams on websockets.
async fn process(inner: &Inner, sockets: mpsc::Receiver<(String, WebSocket)>, body: &Value) -> i32 {
    let words: Vec<&str> =
        body["command"].as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
    let mut command = Command::new(words[0]);
    command
        .args(&words[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    for (key, value) in body["environment"].as_object().unwrap() {
        command.env(key, value.as_str().unwrap());
    }
    let Ok(mut child) = command.spawn() else {
        return 127;
    };
    let [mut input, output, errors, mut control] = collect(sockets, ["0", "1", "2", "control"]).await;
    let mut stdin = child.stdin.take();
    let feed = async move {
        while let Some(Ok(message)) = input.recv().await {
            match (message, &mut stdin) {
                (Message::Binary(data), Some(pipe)) => {
                    let _ = pipe.write_all(&data).await;
                }
                (Message::Text(_), _) => stdin = None,
                _ => {}
            }
        }
        std::future::pending::<()>().await
    };
    let pid = rustix::process::Pid::from_raw(child.id().unwrap() as i32).unwrap();
    let signals = async {
        while let Some(Ok(message)) = control.recv().await {
            let Message::Text(text) = message else { continue };
            let message: Value = serde_json::from_str(&text).unwrap();
            if let Some(signal) =
                message["signal"].as_i64().and_then(|n| rustix::process::Signal::from_named_raw(n as i32))
            {
                let _ = rustix::process::kill_process(pid, signal);
            }
            inner.control.lock().unwrap().push(message);
            inner.note();
        }
        std::future::pending::<()>().await
    };
    let copies = async {
        tokio::join!(copy(child.stdout.take().unwrap(), output), copy(child.stderr.take().unwrap(), errors));
        child.wait().await.unwrap()
    };
    let status = tokio::select! {
        status = copies => status,
        () = feed => unreachable!(),
        () = signals => unreachable!(),
    };
    use std::os::unix::process::ExitStatusExt as _;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap())
}

async fn copy(mut from: impl tokio::io::AsyncRead + Unpin, mut to: WebSocket) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        // A closed websocket does not end the command: that is what the signal is for.
        let _ = to.send(Message::binary(Bytes::copy_from_slice(&buffer[..length]))).await;
    }
    let _ = to.send(Message::text("")).await;
}

/// A terminal that shows what is typed and ends with code 3 at ctrl-D.
async fn terminal(inner: &Inner, sockets: mpsc::Receiver<(String, WebSocket)>) -> i32 {
    let [mut data, mut control] = collect(sockets, ["0", "control"]).await;
    let _ = data.send(Message::binary(&b"ready> "[..])).await;
    loop {
        tokio::select! {
            message = data.recv() => match message {
                Some(Ok(Message::Binary(bytes))) => {
                    inner.typed.lock().unwrap().extend_from_slice(&bytes);
                    inner.note();
                    if bytes.contains(&4) {
                        let _ = data.send(Message::text("")).await;
                        return 3;
                    }
                    let _ = data.send(Message::binary(bytes)).await;
                }
                Some(Ok(_)) => {}
                _ => return 0,
            },
            message = control.recv() => if let Some(Ok(Message::Text(text))) = message {
                inner.control.lock().unwrap().push(serde_json::from_str(&text).unwrap());
                inner.note();
            },
        }
    }
}

async fn console(State(inner): Shared, Json(body): Json<Value>) -> Response {
    inner.bodies.lock().unwrap().push(body);
    let (id, sockets) = begun(&inner, false, json!({"fds": {"0": "secret-0", "control": "secret-control"}}));
    let (shared, operation) = (inner.clone(), id.clone());
    tokio::spawn(async move {
        terminal(&shared, sockets).await;
        end(&shared, &operation, 200, "");
    });
    accepted(&inner, &id)
}

async fn put_file(
    State(inner): Shared,
    UrlPath(name): UrlPath<String>,
    Query(query): Query<HashMap<String, String>>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    inner.files.lock().unwrap().insert(format!("{name}{}", query["path"]), (headers, body));
    sync(json!({}))
}

async fn get_file(
    State(inner): Shared,
    UrlPath(name): UrlPath<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    let path = format!("{name}{}", query["path"]);
    if query["path"] == "/evil" {
        let body = Json(json!({"type": "sync", "metadata": ["../escaped"]}));
        return ([("X-Incus-type", "directory")], body).into_response();
    }
    let Some((headers, body)) = inner.files.lock().unwrap().get(&path).cloned() else {
        return error(404, "Not Found");
    };
    let mut response = body.into_response();
    for (key, value) in headers.iter().filter(|(key, _)| key.as_str().starts_with("x-incus-")) {
        response.headers_mut().insert(key, value.clone());
    }
    response
}

/// The directory of a server that is not there.
pub fn nowhere() -> PathBuf {
    PathBuf::from("/nonexistent/karst")
}
