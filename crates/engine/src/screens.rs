//! Screens with ports: what listens for viewers, as the keys `screen.*` say.
//!
//! It listens in this process, which has no privileges, and joins each viewer to the machine's screen as every other way of
//! Karst's does ([`Engine::machine_display`]): QEMU itself listens nowhere. Which addresses there are is the host's to say
//! ([`ScreenGrants`](karst_model::screens::ScreenGrants)), and where it says no more a screen without a password does not listen:
//! whoever reaches an address needs no other permission.
//!
//! A reconciler: what listens follows the records of what runs. A port that was free is recorded with the running guest, so that
//! the next daemon takes the same.

use crate::{
    Engine, EngineInner, Records,
    compute::guest::ExecSession,
    context::Context,
    stream::FdStream,
    tenancy::{restricted::may_listen, rules::ProjectRules},
};
use futures::{SinkExt, StreamExt};
use karst_env::{EnvExt, TaskHandle};
use karst_model::{
    Config, Error, InstanceId, NodeId, Result,
    instance::{Generation, Instance, InstanceKind, RuntimeState},
    keys_machine,
    screens::{ScreenKind, ScreenPort, Screens},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr, TcpListener as Listening},
    ops::Bound,
    sync::{Arc, Mutex, Weak},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_tungstenite::{
    accept_hdr_async_with_config,
    tungstenite::{
        Message,
        handshake::server::{ErrorResponse, Request, Response},
        http::HeaderValue,
        protocol::WebSocketConfig,
    },
};

/// Connections at a time to one listener; a viewer that speaks SPICE has about ten.
const VIEWERS: usize = 32;
/// Connections at a time to all of them.
const ALL_VIEWERS: usize = 256;
/// How often it is looked even when nothing was announced, and when a port that was taken is tried again.
const SWEEP: Duration = Duration::from_secs(30);
/// Changes come in bursts.
const PAUSE: Duration = Duration::from_millis(50);
/// After a connection could not be taken, for want of descriptors mostly.
const BREATH: Duration = Duration::from_secs(1);
/// Time that a viewer has to ask for a websocket.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Bytes that are read of a screen at once.
const CHUNK: usize = 32 << 10;
/// Largest message of a viewer on a websocket: what is pasted.
const MESSAGE: usize = 1 << 20;

/// One of a machine's listeners.
type At = (InstanceId, ScreenKind);

/// What is told of a listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScreenListener {
    /// What is spoken there.
    pub kind: ScreenKind,
    /// Where it listens; nothing where it does not.
    pub at: Option<SocketAddr>,
    /// Why it does not.
    pub why: Option<String>,
}

/// What is to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wanted {
    project: String,
    name: String,
    generation: Generation,
    address: IpAddr,
    port: ScreenPort,
    /// Why it may not.
    refusal: Option<String>,
    /// The port that it had.
    last: Option<u16>,
}

impl Wanted {
    /// Is it the same to those who connect?
    fn is(&self, other: &Self) -> bool {
        Self { last: None, ..self.clone() } == Self { last: None, ..other.clone() }
    }
}

/// What became of it.
struct Entry {
    wanted: Wanted,
    at: Option<SocketAddr>,
    why: Option<String>,
    /// Looked at anew from then on, when it does not listen.
    again: Duration,
    task: Option<TaskHandle>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        // Who looks already goes on doing so, until the machine ends.
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}

/// All listeners of this process.
pub(crate) struct Listeners {
    open: Mutex<BTreeMap<At, Entry>>,
    viewers: Arc<Semaphore>,
}

impl Default for Listeners {
    fn default() -> Self {
        Self { open: Mutex::default(), viewers: Arc::new(Semaphore::new(ALL_VIEWERS)) }
    }
}

impl Listeners {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<At, Entry>> {
        self.open.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Those of a machine.
    pub(crate) fn of(&self, instance: InstanceId) -> Vec<ScreenListener> {
        let open = self.lock();
        let own = open.range((instance, ScreenKind::Vnc)..=(instance, ScreenKind::Spice));
        own.map(|((_, kind), e)| ScreenListener { kind: *kind, at: e.at, why: e.why.clone() }).collect()
    }

    /// Ends all.
    pub(crate) fn close(&self) {
        self.lock().clear();
    }
}

impl Engine {
    /// Begins to listen for viewers of screens, until the engine is closed. In the daemon only: it takes ports of this machine.
    pub fn screens_open(&self) {
        let inner = self.inner();
        let task = inner.env.spawn_task("screens", follow(Arc::downgrade(inner)));
        inner.tasks.lock().unwrap_or_else(|e| e.into_inner()).push(task);
    }
}

/// Runs as long as the engine.
async fn follow(weak: Weak<EngineInner>) {
    let Some(mut changes) = weak.upgrade().map(|i| i.inventory.changes()) else { return };
    loop {
        let Some(inner) = weak.upgrade() else { return };
        round(&inner).await;
        let env = inner.env.clone();
        drop(inner);
        env.sleep(PAUSE).await;
        if let Ok(Err(_)) = env.timeout(SWEEP, changes.changed()).await {
            return;
        }
    }
}

/// What is to listen now, on this node.
fn wanted(records: &Records, node: NodeId) -> BTreeMap<At, Wanted> {
    let mut all = BTreeMap::new();
    for runtime in records.runtimes.values() {
        // What an error has halted is looked at most of all.
        if runtime.state.is_down() || runtime.state == RuntimeState::Starting {
            continue;
        }
        // Most say nothing of it, which is looked at first.
        let says = |config: &Config| {
            let keys = (Bound::Included("screen."), Bound::Excluded("screen/"));
            config.range::<str, _>(keys).any(|(_, value)| !value.is_empty())
        };
        if runtime.applied.as_ref().is_some_and(|a| !says(&a.config)) {
            continue;
        }
        let Some(instance) = records.instances.get(&runtime.instance).filter(|i| i.node == node) else {
            continue;
        };
        let display = instance.hardware.as_ref().is_some_and(|h| h.display);
        if instance.kind != InstanceKind::VirtualMachine || !display {
            continue;
        }
        let expanded = runtime.applied.is_none().then(|| records.expanded(instance).0);
        let config = runtime.applied.as_ref().map(|a| &a.config).or(expanded.as_ref());
        let Some(screens) = config.and_then(|c| Screens::of(c).ok()) else { continue };
        let Some(project) = records.projects.get(&instance.project) else { continue };
        let spice = config.is_some_and(keys_machine::spice);
        let allowed = ProjectRules::parse(&project.config).is_ok_and(|rules| may_listen(&rules));
        for (kind, listen) in screens.listeners() {
            let refusal = refusal(records, instance.node, instance.id, listen.at());
            let served = kind != ScreenKind::Spice || spice;
            let none = || Error::unsupported("the machine was started without SPICE");
            let refusal = refusal.and_then(|()| served.then_some(()).ok_or_else(none)).err();
            let low = || Error::forbidden("machines of this project have no ports of the host");
            let refusal = refusal.or_else(|| (!allowed).then(low));
            let one = Wanted {
                project: project.name.to_string(),
                name: instance.name.to_string(),
                generation: runtime.generation,
                address: listen.at(),
                port: listen.port,
                refusal: refusal.map(|e| e.message),
                last: runtime.screens.get(&kind).copied(),
            };
            all.insert((instance.id, kind), one);
        }
    }
    all
}

/// Refuses what the host does not let.
fn refusal(records: &Records, node: NodeId, instance: InstanceId, address: IpAddr) -> Result<()> {
    let facts = records.nodes.get(&node).and_then(|n| n.facts.as_ref());
    let facts =
        facts.ok_or_else(|| Error::unavailable("the host has not said yet where screens may listen"))?;
    facts.screens.demand(address)?;
    match records.display_locks.contains_key(&instance) {
        true => Ok(()),
        false => facts.screens.demand_open(address),
    }
}

/// Demands of what is new in a configuration that the host lets it. What says of no place listens where it may.
pub(crate) fn demand(records: &Records, instance: &Instance, before: &Config, config: &Config) -> Result<()> {
    if instance.kind != InstanceKind::VirtualMachine {
        return Ok(());
    }
    let now = Screens::of(config)?;
    // What was granted once does not stand in the way of other changes.
    let known: Vec<_> = Screens::of(before).unwrap_or_default().listeners().collect();
    let facts = records.nodes.get(&instance.node).and_then(|n| n.facts.as_ref());
    for (kind, listen) in now.listeners().filter(|one| !known.contains(one)) {
        if let (false, Some(facts)) = (listen.is_free(), facts) {
            facts.screens.demand(listen.at()).map_err(|e| e.at(format!("config.{}", kind.key())))?;
        }
    }
    Ok(())
}

/// Ends what is not wanted any more, and begins what is new.
async fn round(inner: &Arc<EngineInner>) {
    let wanted = wanted(&inner.inventory.read(), inner.node);
    let now = inner.env.monotonic();
    {
        let mut open = inner.screens.lock();
        let stays = |at: &At, e: &Entry| {
            wanted.get(at).is_some_and(|w| w.is(&e.wanted)) && (e.at.is_some() || e.again > now)
        };
        open.retain(|at, entry| stays(at, entry));
        // Ports that somebody names are not for those who take any; who had one takes it again before others choose.
        let fixed = wanted.values().filter_map(|w| match w.port {
            ScreenPort::Fixed(port) => Some(port),
            ScreenPort::Auto => w.last,
        });
        let kept: BTreeSet<u16> = fixed.collect();
        let mut new: Vec<_> = wanted.into_iter().filter(|(at, _)| !open.contains_key(at)).collect();
        new.sort_by_key(|(_, w)| (w.port == ScreenPort::Auto, w.last.is_none()));
        for (at, one) in new {
            let entry = begin(inner, at, one, &kept, now);
            open.insert(at, entry);
        }
    }
    if let Err(e) = note(inner).await {
        tracing::warn!(error = %e, "the ports of screens could not be recorded; another daemon may take others");
    }
}

fn begin(inner: &Arc<EngineInner>, at: At, wanted: Wanted, kept: &BTreeSet<u16>, now: Duration) -> Entry {
    let mut entry = Entry { at: None, why: wanted.refusal.clone(), again: now + SWEEP, task: None, wanted };
    if entry.why.is_some() {
        return entry;
    }
    match bind(at.1, &entry.wanted, kept) {
        Ok((address, listener)) => {
            let one = Arc::new(entry.wanted.clone());
            let task = serve(Arc::downgrade(inner), at, one, listener);
            entry.at = Some(address);
            entry.task = Some(inner.env.spawn_task("screen", task));
        }
        Err(e) => {
            let Wanted { name, address, port, .. } = &entry.wanted;
            tracing::info!(instance = %name, %address, %port, error = %e, "a screen does not listen; trying again");
            entry.why = Some(format!("{} port {port} cannot be had: {e}", entry.wanted.address));
        }
    }
    entry
}

/// The port that is wanted, that it had, or the first that is free.
fn bind(kind: ScreenKind, wanted: &Wanted, kept: &BTreeSet<u16>) -> io::Result<(SocketAddr, TcpListener)> {
    let open = |port: u16| -> io::Result<(SocketAddr, TcpListener)> {
        let listener = Listening::bind((wanted.address, port))?;
        listener.set_nonblocking(true)?;
        Ok((listener.local_addr()?, TcpListener::from_std(listener)?))
    };
    if let ScreenPort::Fixed(port) = wanted.port {
        return open(port);
    }
    let free = (kind.first_port()..=u16::MAX).filter(|port| !kept.contains(port));
    for port in wanted.last.into_iter().chain(free) {
        match open(port) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {}
            other => return other,
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}

/// Records the ports that were chosen with the guests that have them.
async fn note(inner: &EngineInner) -> Result<()> {
    let mut now: BTreeMap<InstanceId, (Generation, BTreeMap<ScreenKind, u16>)> = BTreeMap::new();
    for ((instance, kind), entry) in inner.screens.lock().iter() {
        if let (ScreenPort::Auto, Some(at)) = (entry.wanted.port, entry.at) {
            let of = now.entry(*instance).or_insert_with(|| (entry.wanted.generation, BTreeMap::new()));
            of.1.insert(*kind, at.port());
        }
    }
    {
        let records = inner.inventory.read();
        now.retain(|id, (generation, ports)| {
            let runtime = records.runtimes.get(id).filter(|r| r.generation == *generation);
            runtime.is_some_and(|r| r.screens != *ports)
        });
    }
    for (id, (generation, ports)) in now {
        inner
            .transact(|records, tx| {
                let runtime = records.runtimes.get(&id).filter(|r| r.generation == generation);
                let Some(runtime) = runtime.filter(|r| r.screens != ports) else { return Ok(()) };
                let lock = crate::compute::lock(id);
                if records.lock(&lock).is_some() {
                    // Its saga writes the record; the next round comes when that has ended.
                    return Ok(());
                }
                tx.expect_unlocked(&lock);
                let mut new = runtime.value.clone();
                new.screens = ports.clone();
                new.seq += 1;
                tx.replace(runtime, &new);
                Ok(())
            })
            .await?;
    }
    Ok(())
}

/// Takes viewers, until it is aborted.
async fn serve(weak: Weak<EngineInner>, at: At, wanted: Arc<Wanted>, listener: TcpListener) {
    let places = Arc::new(Semaphore::new(VIEWERS));
    loop {
        let taken = listener.accept().await;
        let Some(inner) = weak.upgrade() else { return };
        let (stream, peer) = match taken {
            Ok(taken) => taken,
            Err(e) => {
                tracing::warn!(instance = %wanted.name, error = %e, "a viewer could not be taken");
                let env = inner.env.clone();
                drop(inner);
                env.sleep(BREATH).await;
                continue;
            }
        };
        // Who comes when there is no place is let go at once, as by a server that is full.
        let Ok(own) = places.clone().try_acquire_owned() else { continue };
        let Ok(all) = inner.screens.viewers.clone().try_acquire_owned() else { continue };
        let task = viewer(inner.clone(), at, wanted.clone(), stream, peer, [own, all]);
        inner.env.spawn_task("viewer", task);
    }
}

/// One viewer, until either side ends.
async fn viewer(
    inner: Arc<EngineInner>,
    at: At,
    wanted: Arc<Wanted>,
    stream: TcpStream,
    peer: SocketAddr,
    places: [OwnedSemaphorePermit; 2],
) {
    // A viewer whose machine has gone is found out some day; without it works as well, only later.
    let _ = rustix::net::sockopt::set_socket_keepalive(&stream, true);
    let _ = stream.set_nodelay(true);
    let joined = match at.1 {
        ScreenKind::Vnc | ScreenKind::Spice => plain(inner, at, &wanted, stream, peer).await,
        ScreenKind::Websocket => websocket(inner, at, &wanted, stream, peer).await,
    };
    if let Err(e) = joined {
        // Its connection closes, which is all that a viewer can be told.
        tracing::info!(instance = %wanted.name, %peer, error = %e, "a viewer got no screen");
    }
    drop(places);
}

/// The machine's end of it, when the host still lets it.
async fn attach(
    inner: Arc<EngineInner>,
    at: At,
    wanted: &Wanted,
    peer: SocketAddr,
) -> Result<(ExecSession, FdStream)> {
    let open = {
        let records = inner.inventory.read();
        let running = records.runtimes.get(&at.0).is_some_and(|r| r.generation == wanted.generation);
        if !running {
            return Err(Error::conflict("the machine does not run any more"));
        }
        refusal(&records, inner.node, at.0, wanted.address)?;
        let facts = records.nodes.get(&inner.node).and_then(|n| n.facts.as_ref());
        facts.is_some_and(|f| f.screens.demand_open(wanted.address).is_ok())
    };
    let engine = Engine { inner };
    let protocol = at.1.protocol();
    let whose = (wanted.project.as_str(), wanted.name.as_str());
    let mut session = engine.screen_for(&Context::system(), whose, protocol, !open, peer).await?;
    let fd = session.fds.pop().ok_or_else(|| Error::internal("the screen has no stream", "no descriptor"))?;
    Ok((session, FdStream::new(fd)?))
}

async fn plain(
    inner: Arc<EngineInner>,
    at: At,
    wanted: &Wanted,
    stream: TcpStream,
    peer: SocketAddr,
) -> Result<()> {
    let (session, screen) = attach(inner, at, wanted, peer).await?;
    let (mut from_viewer, mut to_viewer) = stream.into_split();
    let (mut from_screen, mut to_screen) = (screen.clone(), screen);
    // However it ends, both ends are closed then; there is nobody to tell why. What one side has not taken yet the other waits for.
    tokio::select! {
        biased;
        _ = tokio::io::copy(&mut from_viewer, &mut to_screen) => {}
        _ = tokio::io::copy(&mut from_screen, &mut to_viewer) => {}
    }
    drop(session);
    Ok(())
}

/// The protocol that viewers in browsers name, if they name any.
#[allow(clippy::result_large_err)] // its type is the library's
fn answer(request: &Request, mut response: Response) -> std::result::Result<Response, ErrorResponse> {
    let offered = request.headers().get_all("Sec-WebSocket-Protocol").iter();
    let mut offered = offered.filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(','));
    if offered.any(|p| p.trim() == "binary") {
        response.headers_mut().insert("Sec-WebSocket-Protocol", HeaderValue::from_static("binary"));
    }
    Ok(response)
}

async fn websocket(
    inner: Arc<EngineInner>,
    at: At,
    wanted: &Wanted,
    stream: TcpStream,
    peer: SocketAddr,
) -> Result<()> {
    let bounds = WebSocketConfig::default()
        .max_message_size(Some(MESSAGE))
        .max_frame_size(Some(MESSAGE))
        .max_write_buffer_size(4 * CHUNK)
        .write_buffer_size(CHUNK);
    let asked = accept_hdr_async_with_config(stream, answer, Some(bounds));
    let asked = inner.env.timeout(HANDSHAKE, asked).await;
    let socket = match asked {
        Ok(Ok(socket)) => socket,
        Ok(Err(e)) => return Err(Error::invalid("websocket", e.to_string())),
        Err(_) => return Err(Error::timeout("the viewer did not ask for a websocket")),
    };
    let (session, screen) = attach(inner, at, wanted, peer).await?;
    let (mut to_viewer, mut from_viewer) = socket.split();
    let (mut from_screen, mut to_screen) = (screen.clone(), screen);
    let out = async {
        let mut buffer = vec![0; CHUNK];
        while let Ok(n @ 1..) = from_screen.read(&mut buffer).await {
            let message = Message::Binary(bytes::Bytes::copy_from_slice(&buffer[..n]));
            if to_viewer.send(message).await.is_err() {
                return;
            }
        }
    };
    let back = async {
        while let Some(Ok(message)) = from_viewer.next().await {
            match message {
                Message::Binary(data) => {
                    if to_screen.write_all(&data).await.is_err() {
                        return;
                    }
                }
                Message::Ping(_) | Message::Pong(_) => {}
                // What is no bytes is none of the protocol's.
                _ => return,
            }
        }
    };
    tokio::select! {
        biased;
        () = back => {}
        () = out => {}
    }
    drop(session);
    Ok(())
}
