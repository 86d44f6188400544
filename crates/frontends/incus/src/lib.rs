//! The Incus API (`/1.0`) as translators over the engine's use cases: Incus 6.0's contract as `incus` 6.0 and `lxc` 5.0
//! use it. Wire types never leave this crate.
//!
//! [`serve`] answers on a listener that is bound already; the peer's credentials are the principal. A request goes
//! through [`routes`] (the one table of paths) to a handler, which calls one use case and answers in the envelope of
//! [`respond`].
// A front end serves real sockets on the real runtime; the seeded world ends at the engine, which gives all times that
// are shown.
#![allow(clippy::disallowed_methods)]

pub mod app;
pub mod extensions;
pub mod fields;
pub mod filter;
pub mod handlers;
pub mod multipart;
pub mod request;
pub mod respond;
pub mod routes;
pub mod sessions;
pub mod sftp;
pub mod socket;
pub mod stream;
pub mod wire;

pub use app::{App, ServerInfo};

use app::Call;
use hyper::{Request, StatusCode, body::Incoming, header::ALLOW, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use karst_engine::Context;
use karst_model::{Error, access::Principal};
use request::Query;
use respond::Reply;
use routes::{Found, State};
use std::{convert::Infallible, sync::Arc, time::Duration};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::Semaphore,
};

/// How long a client may take to send the head of a request.
const HEAD: Duration = Duration::from_secs(30);
/// Largest head of a request.
const LARGEST_HEAD: usize = 64 << 10;
/// Most connections at once that speak HTTP; those that were upgraded no longer count.
const CONNECTIONS: usize = 4096;
/// Paths that answer nobody too; what they say to nobody is a formality.
const PUBLIC: [&[&str]; 2] = [&[], &["1.0"]];
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

/// Answers on one connection of a known principal.
pub async fn serve_connection(app: Arc<App>, context: Context, stream: UnixStream) {
    let service = service_fn(|request: Request<Incoming>| {
        let (app, context) = (app.clone(), context.clone());
        async move { Ok::<_, Infallible>(answer(app, context, request).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(LARGEST_HEAD.max(256 << 10))
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await;
    if let Err(e) = served {
        tracing::debug!(error = %e, "a connection ended badly");
    }
}

/// Answers one request.
pub async fn answer(app: Arc<App>, context: Context, request: Request<Incoming>) -> Reply {
    let uri = request.uri();
    let parsed = request::segments(uri.path()).and_then(|s| Ok((s, Query::parse(uri.query())?)));
    let (segments, query) = match parsed {
        Ok(parsed) => parsed,
        Err(e) => return respond::error(&e),
    };
    if context.principal().grants.is_empty() && !PUBLIC.iter().any(|p| *p == segments) {
        return respond::error(&Error::unauthenticated("authentication is required"));
    }
    match routes::find(request.method(), &segments) {
        Found::Row(State::Done(handler, _), params) => {
            let call = Call { app, context, params, query, request };
            match handler(call).await {
                Ok(reply) => reply,
                Err(e) => respond::error(&e),
            }
        }
        Found::Row(State::Open(why), _) => respond::envelope_error(StatusCode::NOT_IMPLEMENTED, why),
        Found::Methods(methods) => {
            let list = methods.iter().map(hyper::Method::as_str).collect::<Vec<_>>().join(", ");
            let mut reply = respond::envelope_error(
                StatusCode::METHOD_NOT_ALLOWED,
                &format!("{} is not a method of this path; {list} are", request.method()),
            );
            if let Ok(v) = list.parse() {
                reply.headers_mut().insert(ALLOW, v);
            }
            reply
        }
        Found::Nothing => {
            respond::envelope_error(StatusCode::NOT_FOUND, "not found: the API has no such path")
        }
    }
}
