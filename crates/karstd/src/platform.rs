//! The platform inside control: the store, the engine over it, and the front ends over that.

use crate::{control::ControlContext, node, state};
use karst_engine::{
    Agents, Context, Engine, EngineConfig,
    compute::create::{CreateInstance, InstanceSource},
};
use karst_frontend_incus::{App, Identity, ServerInfo, remote::Remote, servers::NetworkServers};
use karst_frontend_libvirt::{
    Front, Surface,
    remote::{Bounds, Network},
};
use karst_model::{
    NodeId, Result, access::Principal, instance::InstanceKind, node::Node, project::DEFAULT_PROJECT,
};
use karst_store::{SqliteStore, Store, Table};
use karst_tls::Authority;
use std::{sync::Arc, time::Duration};
use tokio::sync::mpsc;

/// Stem of the two files of the authority of libvirt's certificates, below `DIR/state`.
const LIBVIRT_AUTHORITY: &str = "libvirt-ca";
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
    let name = context.agents[0].0.clone();
    let (store, own) = open_store(&context, &name).await?;
    let agents = Agents::default();
    let mut nodes = vec![];
    for (n, (name, agent)) in context.agents.iter().enumerate() {
        // All but this machine are simulated.
        let id = if n == 0 { own } else { node::first_id(&context.daemon_id, name) };
        agents.insert(id, agent.clone());
        nodes.push((id, name.clone()));
    }
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
    // Another host may have the name that this one would have.
    let name = engine.inner().inventory.read().nodes.get(&own).map_or(name, |n| n.name.to_string());
    let (shutdown, mut asked) = mpsc::channel(1);
    let identity = identity(&context, &name);
    let authority = Arc::new(Authority::new(context.dir.join("state"), LIBVIRT_AUTHORITY, &name));
    let front = Front::new(engine.clone());
    let network = Network::new(front.clone(), authority.clone(), Bounds::default());
    engine.set_network_listener(network.clone());
    engine.screens_open();
    let info = ServerInfo {
        version: env!("CARGO_PKG_VERSION").into(),
        name,
        shutdown: Some(shutdown),
        identity,
        authority: Some(authority),
    };
    let app = App::new(engine.clone(), info);
    let listening = tokio::spawn(Remote::start(app.clone()));
    let serving = tokio::spawn(karst_frontend_incus::serve(app, context.api_listener));
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
    network.stop().await;
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

/// The store, and which of its nodes this machine is, now called `name`.
async fn open_store(context: &ControlContext, name: &str) -> Result<(Arc<dyn Store>, NodeId)> {
    let (dir, daemon_id) = (&context.dir, &context.daemon_id);
    if context.simulated_guests.is_some() {
        let store: Arc<dyn Store> = Arc::new(SqliteStore::memory(context.env.clone())?);
        return Ok((store, node::first_id(daemon_id, name)));
    }
    let files = dir.join("state");
    let mut kept = node::kept(&files)?;
    if kept.is_none() && !state::has_begun(dir) {
        // Before it sees what others have in the store: a host that has just come must not take their place.
        let id = node::first_id(daemon_id, name);
        node::keep(&files, id)?;
        kept = Some(id);
    }
    let store = state::open(dir, daemon_id, context.env.clone()).await?;
    let (rows, _) = Table::<Node>::new().list(&*store).await?;
    let recorded: Vec<Node> = rows.into_iter().map(|row| row.value).collect();
    let own = node::own(&recorded, kept, !state::is_shared(dir), daemon_id, name)?;
    if kept != Some(own) {
        node::keep(&files, own)?;
    }
    Ok((store, own))
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
