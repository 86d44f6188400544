//! What all handlers share, and a request on its way to one.

use crate::{
    observe::{self, Read, Recorder},
    places::Bounds,
    remote::Remote,
    request::{self, Query, RequestBody},
    respond::{Etag, Reply, accepted},
    sessions::Sessions,
    wire::operation::OperationView,
};
use bytes::Bytes;
use hyper::{
    Request,
    header::{IF_MATCH, USER_AGENT},
};
use karst_engine::{Context, Engine, InstanceView, LiveOperation};
use karst_model::{Error, InstanceId, OperationId, Result};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, OnceLock},
};

/// What the server says of itself.
#[derive(Clone)]
pub struct ServerInfo {
    /// Version of Karst.
    pub version: String,
    /// Name of the server.
    pub name: String,
    /// Told to the process that runs the server when `incus admin shutdown` asks for its end.
    pub shutdown: Option<tokio::sync::mpsc::Sender<()>>,
    /// The certificate by which it is known on the network; without one it listens on its unix socket only.
    pub identity: Option<Arc<crate::tls::Identity>>,
    /// The authority of libvirt's certificates; without one there are none.
    pub authority: Option<Arc<crate::tls::Authority>>,
}

/// The front end.
pub struct App {
    /// The engine.
    pub engine: Engine,
    /// About the server.
    pub info: ServerInfo,
    /// Websockets that are awaited.
    pub sessions: Sessions,
    /// Listeners on the network.
    pub remote: Remote,
    /// What was answered.
    pub served: crate::routes::Served,
    /// Who wants to know what handlers read.
    pub(crate) recorder: OnceLock<Recorder>,
    /// JSON of instances, valid as long as the engine's view is the same object.
    rendered: Mutex<HashMap<InstanceId, (Arc<InstanceView>, Bytes)>>,
}

impl App {
    /// A front end over `engine`.
    pub fn new(engine: Engine, info: ServerInfo) -> Arc<Self> {
        Self::bounded(engine, info, Bounds::default())
    }

    /// The same with so many places for connections from the network.
    pub fn bounded(engine: Engine, info: ServerInfo, bounds: Bounds) -> Arc<Self> {
        Arc::new(Self {
            engine,
            info,
            sessions: Sessions::default(),
            remote: Remote::new(bounds),
            served: Default::default(),
            recorder: OnceLock::new(),
            rendered: Mutex::default(),
        })
    }

    /// From now on `recorder` is told what handlers read of each request. The first one stays.
    pub fn record(&self, recorder: Recorder) {
        self.recorder.get_or_init(|| recorder);
    }

    /// JSON of instances, in order, of so many that there are in `total`. Serialized when a view changed only.
    ///
    /// # Errors
    /// Internal, when a value cannot be encoded.
    pub fn render(&self, views: &[Arc<InstanceView>], total: usize) -> Result<Vec<Bytes>> {
        let mut cache = self.rendered.lock().unwrap_or_else(|e| e.into_inner());
        // What was deleted leaves when it has become much; a short page of a long list is no reason.
        if cache.len() > 2 * total + 64 {
            cache.clear();
        }
        views
            .iter()
            .map(|view| {
                if let Some((old, json)) = cache.get(&view.instance.id)
                    && Arc::ptr_eq(old, view)
                {
                    return Ok(json.clone());
                }
                let json = Bytes::from(serde_json::to_vec(&crate::wire::instance::InstanceView::of(view))?);
                cache.insert(view.instance.id, (view.clone(), json.clone()));
                Ok(json)
            })
            .collect()
    }
}

/// A request on its way to a handler.
pub struct Call {
    /// The front end.
    pub app: Arc<App>,
    /// Who asks.
    pub context: Context,
    /// The certificate that came with the connection, trusted or not.
    pub certificate: Option<Arc<crate::tls::ClientCertificate>>,
    /// Parameters of the path, decoded.
    pub params: Vec<String>,
    /// The query.
    pub query: Query,
    /// The request itself.
    pub request: Request<RequestBody>,
}

impl Call {
    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.app.engine
    }

    /// The n-th parameter of the path.
    pub fn param(&self, n: usize) -> &str {
        self.params.get(n).map_or("", String::as_str)
    }

    /// A parameter that is an operation's id.
    ///
    /// # Errors
    /// Not found, when it is no UUID.
    pub fn operation_id(&self) -> Result<OperationId> {
        self.param(0)
            .parse()
            .map_err(|_| Error::not_found(format!("operation {:?} not found", self.param(0))))
    }

    /// The project of the request.
    pub fn project(&self) -> &str {
        self.query.project()
    }

    /// A header as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        observe::note(|| Read::Header(name.to_ascii_lowercase()));
        self.request.headers().get(name).and_then(|v| v.to_str().ok())
    }

    /// A header of files and images: `X-Incus-NAME`, or `X-LXD-NAME` of older clients.
    pub fn incus_header(&self, name: &str) -> Option<&str> {
        self.header(&format!("x-incus-{name}")).or_else(|| self.header(&format!("x-lxd-{name}")))
    }

    /// Does the client know LXD's names only?
    pub fn is_lxd_client(&self) -> bool {
        self.header(USER_AGENT.as_str()).is_some_and(|u| u.starts_with("LXD "))
    }

    /// Demands that If-Match, if given, names this version of this view; answers the version to expect then.
    ///
    /// # Errors
    /// `PreconditionFailed`.
    pub fn expected(&self, view: &str, id: uuid::Uuid, version: u64) -> Result<Option<u64>> {
        let wanted = self.header(IF_MATCH.as_str());
        Etag::of(view, id, version).demand(wanted)?;
        Ok(wanted.filter(|w| !w.trim().is_empty() && w.trim() != "*").map(|_| version))
    }

    /// Demands that the body says nothing.
    ///
    /// # Errors
    /// Too large, or invalid.
    pub async fn bodiless(self) -> Result<Taken> {
        request::nothing(self.request.into_body()).await?;
        let Self { app, context, certificate, params, query, .. } = self;
        Ok(Taken { app, context, certificate, params, query })
    }

    /// Takes the body as a JSON object.
    ///
    /// # Errors
    /// Too large, malformed.
    pub async fn fields(self) -> Result<(Taken, crate::fields::Fields)> {
        let fields = request::fields(self.request.into_body()).await?;
        let Self { app, context, certificate, params, query, .. } = self;
        Ok((Taken { app, context, certificate, params, query }, fields))
    }
}

/// A request whose body was taken.
pub struct Taken {
    /// The front end.
    pub app: Arc<App>,
    /// Who asks.
    pub context: Context,
    /// The certificate that came with the connection, trusted or not.
    pub certificate: Option<Arc<crate::tls::ClientCertificate>>,
    /// Parameters of the path, decoded.
    pub params: Vec<String>,
    /// The query.
    pub query: Query,
}

impl Taken {
    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.app.engine
    }
    /// The n-th parameter of the path.
    pub fn param(&self, n: usize) -> &str {
        self.params.get(n).map_or("", String::as_str)
    }
    /// The project of the request.
    pub fn project(&self) -> &str {
        self.query.project()
    }
}

/// 202 for an operation that runs.
///
/// # Errors
/// Internal, when it cannot be encoded.
pub fn running(operation: &LiveOperation) -> Result<Reply> {
    let record = operation.snapshot();
    accepted(&record.id.to_string(), &OperationView::of(&record))
}

/// Waits for an operation behind a call that Incus answers at once.
///
/// # Errors
/// The operation's.
pub async fn finished(operation: &LiveOperation) -> Result<()> {
    let record = operation.ended().await;
    match &record.error {
        Some(e) => Err(e.clone()),
        None => Ok(()),
    }
}
