//! The control process: front ends, engine and store, as a user without privileges.

use crate::{node, platform, privilege};
use karst_agent::{Client, HostAgent};
use karst_env::{RealEnv, SharedEnv};
use karst_model::{Error, Result};
use std::{
    future::Future,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// Time that requests in flight, and what is synced at the end, have when the process is asked to end; the launcher waits 40 s.
const GRACE: Duration = Duration::from_secs(35);
/// After so long a daemon has started, and most of what its start used is of no further use.
pub const SETTLED: Duration = Duration::from_secs(2);

/// Everything that control is made of.
pub struct ControlContext {
    /// DIR; control itself may write `DIR/state` only.
    pub dir: PathBuf,
    /// The API's socket: bound and listening, of the launcher, so that no connection is refused while control restarts.
    pub api_listener: UnixListener,
    /// The sockets of libvirt's protocol, in the same way.
    pub libvirt: LibvirtListeners,
    /// Hosts by name; the first one is this machine's. Calls wait for the host process within their deadline.
    pub agents: Vec<(String, Arc<dyn HostAgent>)>,
    /// Short id of the instance: part of every name outside DIR (see [`karst_agent::names`]).
    pub daemon_id: String,
    /// Clock, randomness, tasks.
    pub env: SharedEnv,
    /// Guests that each simulated host is to begin with; `None`: the hosts are real.
    pub simulated_guests: Option<u32>,
    /// Becomes true when the process is to end: take no more requests, finish those that run.
    pub shutdown: watch::Receiver<bool>,
}

/// The sockets of libvirt's protocol.
pub struct LibvirtListeners {
    /// Whose clients may change things.
    pub full: UnixListener,
    /// Whose clients see only.
    pub read_only: UnixListener,
}

/// With this code control ends because a client asked for the end of the whole daemon.
pub const ASKED: i32 = 17;

/// The control process' life. Ends when `context.shutdown` says so, or a client asks for it, which is what it answers.
///
/// # Errors
/// Whatever makes it impossible to go on; the launcher starts the process again.
pub async fn run(context: ControlContext) -> Result<bool> {
    platform::run(context).await
}

/// The role `control`.
///
/// # Errors
/// As [`run`], and when it was not started as it must be.
pub fn start(dir: &Path, inherited: &privilege::Inherited) -> Result<()> {
    privilege::small_heap();
    let [api, full, read_only] = privilege::enter(inherited, true)?;
    let asked = block_on(|env, shutdown| {
        let client = Client::start(env.clone(), dir.join("run/host.sock"), None);
        let agent: Arc<dyn HostAgent> = Arc::new(client.agent());
        Ok(run(ControlContext {
            dir: dir.to_owned(),
            api_listener: listener(api)?,
            libvirt: LibvirtListeners { full: listener(full)?, read_only: listener(read_only)? },
            agents: vec![(node::name(), agent)],
            daemon_id: inherited.daemon_id.clone(),
            env,
            simulated_guests: None,
            shutdown,
        }))
    })?;
    if asked {
        std::process::exit(ASKED);
    }
    Ok(())
}

/// A listening socket for tokio.
pub fn listener(socket: OwnedFd) -> Result<UnixListener> {
    let socket = std::os::unix::net::UnixListener::from(socket);
    socket.set_nonblocking(true)?;
    Ok(UnixListener::from_std(socket)?)
}

/// Runs `make`'s future on a small runtime until it is done, or a little longer than SIGTERM or SIGINT asks for.
pub fn block_on<T, F: Future<Output = Result<T>>>(
    make: impl FnOnce(SharedEnv, watch::Receiver<bool>) -> Result<F>,
) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(16)
        .thread_keep_alive(Duration::from_secs(2))
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(async {
        let (end, shutdown) = watch::channel(false);
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let work = make(RealEnv::shared(), shutdown)?;
        tokio::pin!(work);
        tokio::spawn(async {
            tokio::time::sleep(SETTLED).await;
            karst_host::memory::give_back();
        });
        tokio::select! {
            biased;
            outcome = &mut work => return outcome,
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        end.send_replace(true);
        match tokio::time::timeout(GRACE, work).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::timeout("requests in flight did not end in time")),
        }
    });
    runtime.shutdown_timeout(Duration::from_millis(500));
    outcome
}
