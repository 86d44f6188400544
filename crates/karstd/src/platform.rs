//! The platform inside control: the store, the engine over it, and the front ends over that.

use crate::control::ControlContext;
use karst_engine::{
    Agents, Context, Engine, EngineConfig,
    compute::create::{CreateInstance, InstanceSource},
};
use karst_frontend_incus::{App, Identity, ServerInfo, remote::Remote, servers::NetworkServers};
use karst_frontend_libvirt::{Front, Surface};
use karst_model::{NodeId, Result, access::Principal, instance::InstanceKind, project::DEFAULT_PROJECT};
use karst_store::{SqliteStore, Store};
use std::{sync::Arc, time::Duration};
use tokio::sync::mpsc;

/// Time that answers in flight have when the process is to end.
const DRAIN: Duration = Duration::from_secs(5);
/// Time for the answer to who asked for the end.
const ANSWER: Duration = Duration::from_millis(300);
/// Time for the last entries of the audit log.
const FLUSH: Duration = Duration::from_secs(5);

/// Serves until it is told to end; answers whether a client asked for the end of the whole daemon.
///
/// # Errors
/// When the store cannot be opened.
pub async fn run(mut context: ControlContext) -> Result<bool> {
    let store = open_store(&context).await?;
    let agents = Agents::default();
    let mut nodes = vec![];
    for (name, agent) in &context.agents {
        let id = NodeId(node_id(&context.daemon_id, name));
        agents.insert(id, agent.clone());
        nodes.push((id, name.clone()));
    }
    let name = context.agents[0].0.clone();
    let engine = Engine::open(EngineConfig {
        env: context.env.clone(),
        store,
        agents,
        nodes: nodes.clone(),
        daemon_id: context.daemon_id.clone(),
    })
    .await?;
    engine.set_image_servers(Arc::new(NetworkServers::new()));
    match crate::secret_key::load(&context.dir.join("state"), &*context.env) {
        Ok(key) => engine.set_secret_key(key),
        Err(e) => {
            tracing::error!(error = %e, context = e.context.as_deref().unwrap_or_default(), "no secrets")
        }
    }
    let (shutdown, mut asked) = mpsc::channel(1);
    let identity = identity(&context, &name);
    let info =
        ServerInfo { version: env!("CARGO_PKG_VERSION").into(), name, shutdown: Some(shutdown), identity };
    let app = App::new(engine.clone(), info);
    let listening = tokio::spawn(Remote::start(app.clone()));
    let serving = tokio::spawn(karst_frontend_incus::serve(app, context.api_listener));
    let front = Front::new(engine.clone());
    let libvirt = [(Surface::Full, context.libvirt.full), (Surface::ReadOnly, context.libvirt.read_only)]
        .map(|(surface, listener)| {
            tokio::spawn(karst_frontend_libvirt::serve(front.clone(), surface, listener))
        });
    let guests = context.simulated_guests.unwrap_or(0);
    let first = tokio::spawn(begin(engine.clone(), nodes, guests));
    let by_client = tokio::select! {
        _ = context.shutdown.wait_for(|end| *end) => false,
        _ = asked.recv() => true,
    };
    if by_client {
        tracing::info!("a client asked the server to end");
        tokio::time::sleep(ANSWER).await;
    }
    first.abort();
    listening.abort();
    serving.abort();
    libvirt.iter().for_each(|task| task.abort());
    if let Err(e) = engine.audit_flush(FLUSH).await {
        tracing::warn!(error = %e, "the last requests are not in the audit log");
    }
    engine.close();
    let _ = tokio::time::timeout(DRAIN, serving).await;
    Ok(by_client)
}

/// The certificate of the API over HTTPS; without it the unix socket is served all the same.
fn identity(context: &ControlContext, name: &str) -> Option<Arc<Identity>> {
    let today = context.env.now().to_zoned(jiff::tz::TimeZone::UTC).date();
    match Identity::load(&context.dir.join("state"), name, today) {
        Ok(identity) => Some(Arc::new(identity)),
        Err(e) => {
            tracing::error!(error = %e, context = e.context.as_deref().unwrap_or_default(), "no HTTPS");
            None
        }
    }
}

async fn open_store(context: &ControlContext) -> Result<Arc<dyn Store>> {
    if context.simulated_guests.is_some() {
        return Ok(Arc::new(SqliteStore::memory(context.env.clone())?));
    }
    crate::state::open(&context.dir, &context.daemon_id, context.env.clone()).await
}

/// What is done after a start, while requests are answered already.
async fn begin(engine: Engine, nodes: Vec<(NodeId, String)>, simulated_guests: u32) {
    bootstrap(engine.clone()).await;
    for (_, node) in nodes.iter().filter(|_| simulated_guests > 0) {
        if let Err(e) = populate(&engine, node, simulated_guests).await {
            tracing::error!(node, error = %e, "a simulated host could not be populated");
        }
    }
}

/// Makes running containers on a simulated host.
async fn populate(engine: &Engine, node: &str, guests: u32) -> Result<()> {
    let admin = Context::new(Principal::system());
    for n in 1..=guests {
        let request = CreateInstance {
            name: Some(format!("{node}-guest{n}")),
            kind: InstanceKind::Container,
            description: "simulated".into(),
            ephemeral: false,
            config: Default::default(),
            devices: Default::default(),
            profiles: None,
            source: InstanceSource::None,
            start: true,
            target: Some(node.to_owned()),
            vmid: None,
        };
        let (_, operation) = engine.instance_create(&admin, DEFAULT_PROJECT, request).await?;
        if let Some(e) = &operation.ended().await.error {
            return Err(e.clone());
        }
    }
    Ok(())
}

/// The first start makes a pool, a network and the default profile; tried again while the host is not ready.
async fn bootstrap(engine: Engine) {
    let mut wait = Duration::from_millis(200);
    loop {
        match engine.bootstrap().await {
            Ok(()) => return,
            Err(e) => {
                tracing::warn!(error = %e, context = e.context.as_deref().unwrap_or_default(),
                    "the default pool and network could not be made; trying again");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(Duration::from_secs(30));
            }
        }
    }
}

/// A node's id follows from the daemon's and its name: the same after the database is lost.
fn node_id(daemon_id: &str, name: &str) -> uuid::Uuid {
    uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_OID, format!("karst:{daemon_id}:{name}").as_bytes())
}

/// This machine's node: its host name where that is a name, else `local`.
pub fn node_name() -> String {
    let hostname = rustix::system::uname().nodename().to_string_lossy().into_owned();
    karst_model::Name::parse("node", &hostname).map_or_else(|_| "local".to_owned(), |n| n.to_string())
}
