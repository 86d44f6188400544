//! The host's end of the wire: takes connections of the one user that may, runs their calls on an agent.

use crate::{
    calls::{Call, CallContext, HostAgent, VERSIONS, dispatch},
    epoch::EpochGuard,
    lanes::Lane,
    wire::{Frame, FrameReader, FromHost, Outcome, ToHost},
};
use futures::{
    FutureExt,
    future::{Either, select},
};
use karst_env::{EnvExt, Mutex, SharedEnv};
use karst_model::{Error, ErrorKind, Result, SessionId};
use serde_json::value::RawValue;
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    pin::pin,
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc, oneshot},
};

/// Bounds of a server.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Users whose connections are taken, by the kernel's word; root always is.
    pub uids: Vec<u32>,
    /// Calls of one connection and [`Lane`] that may run at a time; more are refused as unavailable.
    pub max_in_flight: usize,
    /// The same of a lane in which the host only waits.
    pub max_waits: usize,
    /// Connections at a time; more are closed at once.
    pub max_connections: usize,
    /// Time a peer has for its hello.
    pub hello_timeout: Duration,
    /// Longest deadline that is granted; longer ones are shortened to it.
    pub max_deadline: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            uids: vec![],
            max_in_flight: 256,
            max_waits: 1024,
            max_connections: 16,
            hello_timeout: Duration::from_secs(10),
            max_deadline: Duration::from_secs(24 * 3600),
        }
    }
}

/// Answers that wait to be written; a peer that does not read holds its own calls up, no memory.
const OUTGOING: usize = 64;
/// Time a closing connection's sessions have to end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

struct Server {
    env: SharedEnv,
    agent: Arc<dyn HostAgent>,
    guard: Arc<EpochGuard>,
    options: ServerOptions,
}

/// Serves until the listener fails for good. Dropping the future takes no more connections; those that are there go on
/// until their peer ends them.
///
/// # Errors
/// The listener's, when it is not one connection's fault.
pub async fn serve(
    env: SharedEnv,
    listener: UnixListener,
    agent: Arc<dyn HostAgent>,
    guard: Arc<EpochGuard>,
    options: ServerOptions,
) -> io::Result<()> {
    let room = Arc::new(Semaphore::new(options.max_connections));
    let server = Arc::new(Server { env: env.clone(), agent, guard, options });
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            // Out of descriptors or memory, or a peer that is gone already: passes.
            Err(e) if matches!(e.raw_os_error(), Some(23 | 24 | 12 | 105 | 103 | 4)) => {
                tracing::warn!(error = %e, "a connection to the agent could not be taken");
                env.sleep(Duration::from_millis(50)).await;
                continue;
            }
            Err(e) => return Err(e),
        };
        let uid = match stream.peer_cred() {
            Ok(peer) => peer.uid(),
            Err(e) => {
                tracing::warn!(error = %e, "peer of the agent's socket without credentials");
                continue;
            }
        };
        if uid != 0 && !server.options.uids.contains(&uid) {
            tracing::warn!(uid, "refused a connection to the agent: not the control process' user");
            continue;
        }
        let Ok(permit) = room.clone().try_acquire_owned() else {
            tracing::warn!(uid, "refused a connection to the agent: too many");
            continue;
        };
        let server = server.clone();
        env.spawn_task("agent connection", async move {
            let _permit = permit;
            Connection::run(server, stream).await;
        });
    }
}

struct Connection {
    server: Arc<Server>,
    outgoing: mpsc::Sender<Frame>,
    /// Calls that run: dropping (or using) the sender cancels one.
    running: Mutex<BTreeMap<u64, (Lane, oneshot::Sender<()>)>>,
    sessions: Mutex<BTreeSet<SessionId>>,
}

impl Connection {
    async fn run(server: Arc<Server>, stream: UnixStream) {
        let stream = Arc::new(stream);
        let mut reader = FrameReader::new(stream.clone(), false);
        let hello = server
            .env
            .timeout(server.options.hello_timeout, Self::hello(&server, &mut reader, &stream))
            .await;
        match hello {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) | Err(_) => return,
            Ok(Err(e)) => return tracing::warn!(error = %e, "agent connection without a proper hello"),
        }
        let (outgoing, frames) = mpsc::channel(OUTGOING);
        let connection = Arc::new(Self {
            server: server.clone(),
            outgoing,
            running: Mutex::default(),
            sessions: Mutex::default(),
        });
        // Ends when it has no senders left or cannot write; the last sender goes with the last task.
        let (alive, mut all_ended) = mpsc::channel::<()>(1);
        let writing = Self::write(frames, stream.clone());
        let reading = connection.read(&mut reader, &alive);
        match select(pin!(reading), pin!(writing)).await {
            Either::Left((Ok(()), _)) => tracing::debug!("agent connection ended"),
            // Control ended, or was killed, with answers on their way: it need not have said so before.
            Either::Left((Err(e), _)) | Either::Right((e, _)) if gone(&e) => {
                tracing::info!(error = %e, "control has gone");
            }
            Either::Left((Err(e), _)) | Either::Right((e, _)) => {
                tracing::warn!(error = %e, "agent connection broken");
            }
        }
        connection.running.lock().clear();
        drop(alive);
        let _ = all_ended.recv().await;
        let sessions = std::mem::take(&mut *connection.sessions.lock());
        for session in sessions {
            let context = CallContext::read(CLOSE_TIMEOUT);
            let close = server.agent.session_close(&context, session);
            if let Ok(Err(e)) = server.env.timeout(CLOSE_TIMEOUT, close).await
                && !e.is(ErrorKind::NotFound)
            {
                tracing::warn!(%session, error = %e, "a session of an ended connection could not be closed");
            }
        }
    }

    async fn hello(server: &Server, reader: &mut FrameReader, stream: &UnixStream) -> io::Result<bool> {
        let Some((hello, _)) = reader.next::<ToHost>().await? else {
            return Ok(false);
        };
        let ToHost::Hello { versions: (low, high), executor } = hello else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the first frame is not a hello"));
        };
        let version = high.min(*VERSIONS.end());
        let outcome = if version < low || version < *VERSIONS.start() {
            Err(Error::unsupported(format!(
                "this host speaks versions {} to {} of the agent protocol, control {low} to {high}; bring both to one release",
                VERSIONS.start(),
                VERSIONS.end()
            )))
        } else {
            executor.map_or(Ok(()), |executor| server.guard.introduce(executor))
        };
        let (answer, welcome) = match outcome {
            Ok(()) => (FromHost::Welcome { version }, true),
            Err(error) => (FromHost::Refused { error }, false),
        };
        Frame::new(&answer, vec![]).map_err(io::Error::other)?.send(stream).await?;
        Ok(welcome)
    }

    async fn write(mut frames: mpsc::Receiver<Frame>, stream: Arc<UnixStream>) -> io::Error {
        while let Some(frame) = frames.recv().await {
            if let Err(e) = frame.send(&stream).await {
                return e;
            }
        }
        io::ErrorKind::BrokenPipe.into()
    }

    async fn read(self: &Arc<Self>, reader: &mut FrameReader, alive: &mpsc::Sender<()>) -> io::Result<()> {
        let malformed = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
        let mut subscribed = false;
        while let Some((message, _)) = reader.next::<ToHost>().await? {
            match message {
                ToHost::Hello { .. } => return Err(malformed("a second hello")),
                ToHost::Cancel { id } => drop(self.running.lock().remove(&id)),
                ToHost::Subscribe if subscribed => return Err(malformed("a second subscription")),
                ToHost::Subscribe => {
                    subscribed = true;
                    self.forward_events(alive.clone()).await;
                }
                ToHost::Request { id, context, call } => {
                    let call = match serde_json::from_value::<Call>(call) {
                        Ok(call) => call,
                        Err(e) => {
                            let error =
                                Error::unsupported("the host does not know this call or its arguments")
                                    .with_context(e);
                            self.answer(id, Err(error)).await;
                            continue;
                        }
                    };
                    let lane = call.lane();
                    let (cancel, cancelled) = oneshot::channel();
                    let full = {
                        let mut running = self.running.lock();
                        if running.contains_key(&id) {
                            return Err(malformed("an id of a call that still runs"));
                        }
                        let limit = if lane.waits() {
                            self.server.options.max_waits
                        } else {
                            self.server.options.max_in_flight
                        };
                        let full = running.values().filter(|(l, _)| *l == lane).count() >= limit;
                        if !full {
                            running.insert(id, (lane, cancel));
                        }
                        full
                    };
                    if full {
                        let error = Error::unavailable("the host is busy with too many calls; try again");
                        self.answer(id, Err(error)).await;
                        continue;
                    }
                    let (this, alive) = (self.clone(), alive.clone());
                    self.server.env.spawn_task("agent call", async move {
                        let _alive = alive;
                        // Whatever happens to the call, a panic too, it is answered and its place becomes free.
                        let work = std::panic::AssertUnwindSafe(this.call(context, call)).catch_unwind();
                        let outcome = match select(pin!(work), cancelled).await {
                            Either::Left((Ok(outcome), _)) => outcome,
                            Either::Left((Err(_), _)) => {
                                Err(Error::internal("the host failed at this call", "panic"))
                            }
                            Either::Right(_) => Err(Error::cancelled("cancelled by the caller")),
                        };
                        this.answer(id, outcome).await;
                        this.running.lock().remove(&id);
                    });
                }
            }
        }
        Ok(())
    }

    async fn call(
        &self,
        context: CallContext,
        call: Call,
    ) -> Result<(Box<RawValue>, Vec<std::os::fd::OwnedFd>)> {
        let (name, mutation) = (call.name(), call.is_mutation());
        let (opens, closes) = match &call {
            Call::ExecStart(_)
            | Call::ExecOutputKeep(_)
            | Call::ConsoleAttach(_)
            | Call::PortAttach(_)
            | Call::DisplayAttach(_)
            | Call::DisplayAttachGuarded(_)
            | Call::FileWrite(_) => (true, None),
            // These keep a volume from everybody else for as long as they live.
            Call::VolumeOpen(_) | Call::VolumeExport(_) | Call::VolumeImport(_) => (true, None),
            Call::SessionClose(session) => (false, Some(*session)),
            _ => (false, None),
        };
        let deadline = context.deadline.min(self.server.options.max_deadline);
        let agent = &*self.server.agent;
        let work = async {
            if mutation {
                self.server.guard.run(&context, dispatch(agent, &context, call)).await
            } else {
                dispatch(agent, &context, call).await
            }
        };
        let outcome = match self.server.env.timeout(deadline, work).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::timeout(format!("{name} did not end within its time ({deadline:?})"))),
        };
        if let Some(session) = closes {
            self.sessions.lock().remove(&session);
        }
        if let (true, Ok((value, _))) = (opens, &outcome)
            && let Ok(Some(session)) = serde_json::from_str::<Option<SessionId>>(value.get())
        {
            self.sessions.lock().insert(session);
        }
        outcome
    }

    async fn answer(&self, id: u64, outcome: Result<(Box<RawValue>, Vec<std::os::fd::OwnedFd>)>) {
        let (outcome, fds) = match outcome {
            Ok((value, fds)) => (Outcome::Result(value), fds),
            Err(error) => (Outcome::Error(error), vec![]),
        };
        let frame = Frame::new(&FromHost::Response { id, outcome }, fds).or_else(|error| {
            let outcome = Outcome::Error(error);
            Frame::new(&FromHost::Response { id, outcome }, vec![])
        });
        match frame {
            // Fails only when the connection is gone, and then nobody waits.
            Ok(frame) => drop(self.outgoing.send(frame).await),
            Err(e) => tracing::error!(error = %e, "an answer could not be encoded"),
        }
    }

    async fn forward_events(self: &Arc<Self>, alive: mpsc::Sender<()>) {
        let mut events = match self.server.agent.events().await {
            Ok(events) => events,
            Err(e) => return tracing::warn!(error = %e, "no events to be had"),
        };
        let this = self.clone();
        let (cancel, cancelled) = oneshot::channel::<()>();
        // Ids count up from 0; this one is never reached.
        self.running.lock().insert(u64::MAX, (Lane::Session, cancel));
        self.server.env.spawn_task("agent events", async move {
            let _alive = alive;
            let forward = async {
                while let Some(event) = events.recv().await {
                    match Frame::new(&FromHost::Event { event }, vec![]) {
                        Ok(frame) => {
                            if this.outgoing.send(frame).await.is_err() {
                                return;
                            }
                        }
                        Err(e) => tracing::error!(error = %e, "an event could not be encoded"),
                    }
                }
            };
            select(pin!(forward), cancelled).await;
        });
    }
}

/// Nobody is at the other end any more.
fn gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}
