//! libvirt's remote protocol as a translator over the engine's use cases: `virsh` and what else speaks it connects to
//! Karst without any libvirtd. Wire types never leave this crate.
//!
//! A connection is [`session`], over a unix socket or, where the server's configuration says so, over TLS ([`remote`]); a call goes through [`table`] (the one table of procedures) to a function of [`calls`],
//! which calls one use case. `qemu:///system` shows the virtual machines of a project, `lxc:///system` its containers.
//!
//! Source of the protocol: `virnetprotocol.x` and `remote_protocol.x` of libvirt 9.0, read as facts.
// A front end serves real sockets on the real runtime; the seeded world ends at the engine.
#![allow(clippy::disallowed_methods)]

pub mod auth;
pub mod bounds;
pub mod calls;
pub mod cpu;
pub mod error;
pub mod events;
pub mod fds;
pub mod frame;
pub mod limits;
pub mod names;
pub mod remote;
pub mod session;
pub mod table;
pub mod transport;
pub mod xdr;
pub mod xml;

use bounds::{Bounds, Clients};
use calls::plugged::Looks;
use karst_engine::{Context, Engine, InstanceView};
use karst_model::{
    access::{Grant, Principal, Role},
    instance::Instance,
    network::Network,
};
use std::{sync::Arc, time::Duration};
use tokio::{
    net::{UnixListener, UnixStream, unix::UCred},
    sync::{Semaphore, broadcast},
};
use uuid::Uuid;

/// Most connections at once; libvirtd has as many.
const CONNECTIONS: usize = 5000;
/// Refreshed pools, and described and tuned domains, that a slow listener has not heard of yet; it misses older ones.
const REFRESHED: usize = 64;
/// Pause after a failure to accept (no descriptors left), so that it does not spin.
const PAUSE: Duration = Duration::from_millis(50);

/// The front end.
pub struct Front {
    /// The engine.
    pub engine: Engine,
    /// Pools that somebody asked to be looked at again: all connections that listen hear of it.
    pub refreshed: broadcast::Sender<Uuid>,
    /// Domains of which something else is said now.
    pub described: broadcast::Sender<events::Described>,
    /// Domains whose run is tuned otherwise now.
    pub tuned: broadcast::Sender<events::Tuned>,
    /// Looks at the host's devices, for those who listen for what becomes of them.
    pub looks: Looks,
    /// What clients may cost.
    pub bounds: Bounds,
}

impl Front {
    /// Over an engine.
    pub fn new(engine: Engine) -> Arc<Self> {
        Self::bounded(engine, Bounds::default())
    }

    /// The same with bounds of its own.
    pub fn bounded(engine: Engine, bounds: Bounds) -> Arc<Self> {
        let (refreshed, described) = (broadcast::channel(REFRESHED).0, broadcast::channel(REFRESHED).0);
        let tuned = broadcast::channel(REFRESHED).0;
        Arc::new(Self { engine, refreshed, described, tuned, looks: Looks::default(), bounds })
    }
}

/// Which of the two sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Surface {
    /// `libvirt-sock`: whoever can connect is an administrator.
    Full,
    /// `libvirt-sock-ro`: whoever connects sees, and changes nothing.
    ReadOnly,
}

/// Answers on `listener` until dropped.
pub async fn serve(front: Arc<Front>, surface: Surface, listener: UnixListener) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let clients = Clients::new(match surface {
        Surface::Full => front.bounds.full,
        Surface::ReadOnly => front.bounds.read_only,
    });
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let Some(peer) = peer(&stream) else { continue };
                let Some(of_one) = clients.admit(peer.uid()) else {
                    tracing::debug!(uid = peer.uid(), "a user has as many libvirt connections as one may");
                    continue;
                };
                let front = front.clone();
                tokio::spawn(async move {
                    let read_only = surface == Surface::ReadOnly;
                    let context = context(&peer, surface);
                    let allowance = of_one.allowance.clone();
                    let peer = session::Peer { context, read_only, stands: None, allowance };
                    session::serve(front, peer, transport::Transport::Unix(stream)).await;
                    drop((of_one, place));
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
fn peer(stream: &UnixStream) -> Option<UCred> {
    match stream.peer_cred() {
        Ok(peer) => Some(peer),
        Err(e) => {
            tracing::warn!(error = %e, "the kernel does not tell who is at the other end");
            None
        }
    }
}

/// What they may do.
fn context(peer: &UCred, surface: Surface) -> Context {
    let mut principal = Principal::unix_admin(peer.uid(), peer.gid(), peer.pid().unwrap_or(0));
    if surface == Surface::ReadOnly {
        principal.grants = vec![Grant { role: Role::Viewer, project: None }];
    }
    Context::new(principal)
}

/// The UUID of a domain: of a virtual machine that which its firmware shows.
pub fn domain_uuid(view: &InstanceView) -> Uuid {
    instance_uuid(&view.instance)
}

/// The same of an instance's record alone.
pub fn instance_uuid(instance: &Instance) -> Uuid {
    instance.hardware.as_ref().map_or(instance.id.uuid(), |h| h.uuid)
}

/// The UUID of a network: that which its document said, else its own.
pub fn network_uuid(network: &Network) -> Uuid {
    let said = network.config.get(xml::network::UUID).and_then(|u| u.parse().ok());
    said.unwrap_or_else(|| network.id.uuid())
}

/// The number of a domain that runs; -1 of one that does not.
pub fn domain_id(view: &InstanceView) -> i32 {
    let running = calls::domain::is_running(view);
    let id = view.runtime.as_ref().and_then(|r| r.domain_id);
    id.filter(|_| running).and_then(|id| i32::try_from(id).ok()).unwrap_or(-1)
}
