//! The Incus API (`/1.0`) as translators over the engine's use cases: Incus 6.0's contract as `incus` 6.0 and `lxc` 5.0
//! use it. Wire types never leave this crate.
//!
//! [`serve`] answers on a listener that is bound already; the peer's credentials are the principal. [`remote`] listens on
//! the network; there the certificate or token that comes with each request makes the principal. A request goes
//! through [`routes`] (the one table of paths) to a handler, which calls one use case and answers in the envelope of
//! [`respond`].
// A front end serves real sockets on the real runtime; the seeded world ends at the engine, which gives all times that
// are shown.
#![allow(clippy::disallowed_methods)]

pub mod app;
pub mod describe;
pub mod extensions;
pub mod fields;
pub mod filter;
pub mod handlers;
mod image_files;
pub mod multipart;
pub mod observe;
pub mod openapi;
mod page;
pub mod places;
pub mod remote;
pub mod request;
pub mod respond;
pub mod routes;
pub mod servers;
pub mod sessions;
pub mod sftp;
pub mod socket;
pub use karst_engine::stream;
pub use karst_tls as tls;
pub mod wire;

pub use app::{App, ServerInfo};
pub use tls::Identity;

use app::Call;
use hyper::{
    Method, Request, StatusCode,
    body::Incoming,
    header::{ALLOW, AUTHORIZATION},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use karst_engine::{Context, audit::AuditRequest};
use karst_model::{Error, Result, access::Principal};
use places::Place;
use remote::Surface;
use request::{Query, RequestBody};
use respond::Reply;
use routes::{Found, State, TABLE};
use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};
use tls::ClientCertificate;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{UnixListener, UnixStream},
    sync::{Semaphore, watch},
};

/// How long a client may take to send the head of a request.
const HEAD: Duration = Duration::from_secs(30);
/// Largest head of a request.
const LARGEST_HEAD: usize = 64 << 10;
/// Most connections of the unix socket at once that speak HTTP; those that were upgraded no longer count: they are those of
/// administrators of this machine.
const CONNECTIONS: usize = 4096;
/// Methods and paths that answer nobody too: what they say to nobody is a formality, and a trust token makes a somebody.
const PUBLIC: [(Method, &[&str]); 5] = [
    (Method::GET, &[]),
    (Method::GET, &["1.0"]),
    (Method::POST, &["1.0", "certificates"]),
    (Method::GET, &["1.0", "images"]),
    (Method::GET, &["1.0", "images", "aliases"]),
];

/// Does the path show one image, or one alias, to nobody too? The use case shows what is public, or opened by a secret.
fn shows_image(method: &Method, segments: &[String]) -> bool {
    let path: Vec<&str> = segments.iter().map(String::as_str).collect();
    *method == Method::GET
        && matches!(
            path[..],
            ["1.0", "images", _] | ["1.0", "images", _, "export"] | ["1.0", "images", "aliases", ..]
        )
}

/// Does it show a secret that stands for somebody: with an image that is brought here, or to wait for what becomes of it? The use
/// cases say whether it is one.
fn shows_secret(request: &Request<RequestBody>, segments: &[String], query: &Query) -> bool {
    let path: Vec<&str> = segments.iter().map(String::as_str).collect();
    let header = |name: &str| request.headers().get(name).is_some_and(|v| !v.is_empty());
    match path[..] {
        ["1.0", "images"] if request.method() == Method::POST => {
            header("x-incus-secret") || header("x-lxd-secret")
        }
        ["1.0", "operations", _, "wait"] if request.method() == Method::GET => query.get("secret").is_some(),
        _ => false,
    }
}

/// Is this one of them?
fn answers_nobody(method: &Method, segments: &[String]) -> bool {
    PUBLIC.iter().any(|(m, p)| m == method && *p == segments) || shows_image(method, segments)
}

/// Pause after a failure to accept (no descriptors left), so that it does not spin.
const PAUSE: Duration = Duration::from_millis(50);

/// Answers on `listener` until dropped. Whoever can connect is an administrator: the socket's permissions decide.
pub async fn serve(app: Arc<App>, listener: UnixListener) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // Beyond the limit new connections wait in the listener's queue.
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let app = app.clone();
                tokio::spawn(async move {
                    connection(app, stream).await;
                    drop(place);
                });
            }
            Err(e) => {
                tracing::warn!(error = %e, "a connection could not be accepted");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Who is at the other end; nobody when the kernel does not say.
fn principal(stream: &UnixStream) -> Principal {
    match stream.peer_cred() {
        Ok(peer) => Principal::unix_admin(peer.uid(), peer.gid(), peer.pid().unwrap_or(0)),
        Err(e) => {
            tracing::warn!(error = %e, "the kernel does not tell who is at the other end");
            Principal::anonymous()
        }
    }
}

async fn connection(app: Arc<App>, stream: UnixStream) {
    let context = Context::new(principal(&stream));
    serve_connection(app, context, stream).await;
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub enum Peer {
    /// Known by the connection.
    Known(Context),
    /// Known by what comes with each request: trust may be given or taken away between two.
    Remote {
        /// The certificate that was shown, whose owner has its key.
        certificate: Option<Arc<ClientCertificate>>,
        /// Where from.
        address: SocketAddr,
        /// What the listener answers.
        surface: Surface,
        /// Its place among the connections.
        place: Arc<Place>,
    },
}

impl Peer {
    /// Who sends this request.
    ///
    /// # Errors
    /// Unauthenticated, for a token that is not valid.
    fn context(&self, app: &App, request: &Request<Incoming>) -> Result<Context> {
        let (certificate, address) = match self {
            Self::Known(context) => return Ok(context.clone()),
            Self::Remote { certificate, address, .. } => (certificate, address.to_string()),
        };
        let bearer = request.headers().get(AUTHORIZATION).map(|value| {
            let text = value.to_str().ok().and_then(|v| v.split_once(' '));
            text.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, token)| token.trim())
        });
        let principal = match (bearer, certificate) {
            (Some(token), _) => app.engine.principal_by_token(token.unwrap_or_default(), &address)?,
            (None, Some(c)) if c.is_valid_at(app.engine.inner().env.now().as_second()) => {
                app.engine.principal_by_certificate(&c.fingerprint, &address)
            }
            _ => Principal::anonymous(),
        };
        Ok(Context::new(principal))
    }
}

/// Answers on one connection of a known principal.
pub async fn serve_connection(app: Arc<App>, context: Context, stream: UnixStream) {
    let (_keep, never) = watch::channel(false);
    serve_stream(app, Peer::Known(context), stream, never).await;
}

/// Completes when `ended` says so; a sender that is gone says nothing.
async fn told(ended: &mut watch::Receiver<bool>) {
    if ended.wait_for(|e| *e).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Answers on one connection, until `ended` says that the answer in flight is the last.
pub async fn serve_stream<S>(app: Arc<App>, peer: Peer, stream: S, mut ended: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(|mut request: Request<Incoming>| {
        let (app, peer) = (app.clone(), peer.clone());
        if let Peer::Remote { place, .. } = &peer {
            // An upgrade keeps it.
            request.extensions_mut().insert(place.clone());
        }
        async move {
            let surface = match &peer {
                Peer::Remote { surface, .. } => *surface,
                Peer::Known(_) => Surface::Api,
            };
            if surface == Surface::Metrics && request.uri().path() != "/1.0/metrics" {
                let text = "not found: this address answers /1.0/metrics only";
                return Ok::<_, Infallible>(respond::envelope_error(StatusCode::NOT_FOUND, text));
            }
            Ok(match peer.context(&app, &request) {
                Ok(context) => {
                    let certificate = match &peer {
                        Peer::Remote { certificate, .. } => certificate.clone(),
                        Peer::Known(_) => None,
                    };
                    answer(app, context, certificate, request).await
                }
                Err(e) => {
                    let (_, unread) = RequestBody::of(request);
                    let mut reply = respond::error(&e);
                    unread.settle(&mut reply).await;
                    reply
                }
            })
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(LARGEST_HEAD.max(256 << 10))
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(served);
    let outcome = tokio::select! {
        biased;
        outcome = served.as_mut() => outcome,
        () = told(&mut ended) => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(e) = outcome {
        tracing::debug!(error = %e, "a connection ended badly");
    }
}

/// Answers one request.
pub async fn answer(
    app: Arc<App>,
    context: Context,
    certificate: Option<Arc<ClientCertificate>>,
    mut request: Request<Incoming>,
) -> Reply {
    // Roles are taken away by a body; no other request of these methods has one.
    let takes_nothing = match *request.method() {
        Method::GET | Method::HEAD => true,
        Method::DELETE => request.uri().path() != "/1.0/karst/access",
        _ => false,
    };
    if takes_nothing {
        request::discard(request.body_mut()).await;
    }
    let changes = ![Method::GET, Method::HEAD, Method::OPTIONS].contains(request.method());
    let (what, object) = (format!("request {}", request.method()), request.uri().path().to_owned());
    let project = Query::parse(request.uri().query()).ok().and_then(|q| q.get("project").map(str::to_owned));
    let project = project.unwrap_or_default();
    let (request, unread) = RequestBody::of(request);
    let asked = changes.then(|| app.engine.audit_asked(&context, &what, &object, &project));
    let work = routed(&app, &context, certificate, request);
    let answered = match &asked {
        Some(asked) => asked.during(work).await,
        None => work.await,
    };
    let (mut reply, detail) = match answered {
        Ok(reply) => (reply, String::new()),
        Err(e) => (respond::error(&e), e.to_string()),
    };
    let status = reply.status();
    if status.is_client_error() || status.is_server_error() {
        unread.settle(&mut reply).await;
    }
    if changes || status == StatusCode::FORBIDDEN {
        let outcome = match status {
            StatusCode::ACCEPTED => "accepted",
            s if s.is_success() => "done",
            StatusCode::FORBIDDEN => "refused",
            _ => "failed",
        };
        let request = AuditRequest { what, object, project, outcome, detail };
        match asked {
            Some(asked) => asked.ended(request),
            None => app.engine.audit(&context, request),
        }
    }
    reply
}

/// `/1.0/containers` and `/1.0/virtual-machines` are `/1.0/instances` of one type: clients older than that name, such as
/// Ansible's modules, know nothing else.
fn older_names(mut segments: Vec<String>, query: Query) -> (Vec<String>, Query) {
    let kind = match segments.get(1).map(String::as_str) {
        Some("containers") => "container",
        Some("virtual-machines") => "virtual-machine",
        _ => return (segments, query),
    };
    "instances".clone_into(&mut segments[1]);
    (segments, query.with("instance-type", kind))
}

async fn routed(
    app: &Arc<App>,
    context: &Context,
    certificate: Option<Arc<ClientCertificate>>,
    request: Request<RequestBody>,
) -> Result<Reply> {
    let uri = request.uri();
    let (segments, query) = older_names(request::segments(uri.path())?, Query::parse(uri.query())?);
    let public = answers_nobody(request.method(), &segments)
        || shows_secret(&request, &segments, &query)
        || (segments == ["1.0", "metrics"] && app.engine.server_settings().open_metrics);
    if !context.principal().is_known() && !public {
        return Err(Error::unauthenticated("authentication is required"));
    }
    match routes::find(request.method(), &segments) {
        Found::Row(place, params) => match TABLE[place].state {
            State::Done(handler, _) => {
                let context = context.clone();
                let call = Call { app: app.clone(), context, certificate, params, query, request };
                let reply = match app.recorder.get() {
                    None => handler(call).await?,
                    Some(recorder) => {
                        let reads = observe::Reads::default();
                        let answered = observe::during(&reads, handler(call)).await;
                        recorder(place, reads.take());
                        answered?
                    }
                };
                if reply.status().as_u16() < 400 {
                    app.served.note(place);
                }
                Ok(reply)
            }
            State::Open(why) => Ok(respond::envelope_error(StatusCode::NOT_IMPLEMENTED, why)),
        },
        Found::Methods(methods) => {
            let list = methods.iter().map(hyper::Method::as_str).collect::<Vec<_>>().join(", ");
            let mut reply = respond::envelope_error(
                StatusCode::METHOD_NOT_ALLOWED,
                &format!("{} is not a method of this path; {list} are", request.method()),
            );
            if let Ok(v) = list.parse() {
                reply.headers_mut().insert(ALLOW, v);
            }
            Ok(reply)
        }
        Found::Nothing => {
            Ok(respond::envelope_error(StatusCode::NOT_FOUND, "not found: the API has no such path"))
        }
    }
}
