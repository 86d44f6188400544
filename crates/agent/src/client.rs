//! Control's end of the wire: one connection, many calls in flight, made again when the host process comes back.

use crate::{
    calls::{AgentEvent, Call, CallContext, Executor, Remote, Transport, VERSIONS},
    events::EventHub,
    lanes::Lane,
    wire::{Frame, FrameReader, FromHost, Outcome, ToHost},
};
use async_trait::async_trait;
use futures::future::{Either, select};
use karst_env::{EnvExt, Mutex, SharedEnv, TaskHandle};
use karst_model::{Error, ErrorKind, Result};
use serde_json::value::RawValue;
use std::{
    collections::BTreeMap,
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    net::UnixStream,
    sync::{Notify, Semaphore, mpsc, oneshot, watch},
};

/// Calls of a lane in flight at a time, below the server's bound; later ones wait for their turn within their deadline.
const MAX_IN_FLIGHT: usize = 192;
/// The same of a lane in which the host only waits.
const MAX_WAITS: usize = 768;
const OUTGOING: usize = 64;
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));

type Answer = Result<(Box<RawValue>, Vec<OwnedFd>)>;

/// The client. [`Client::agent`] makes the whole trait of it.
pub struct Client {
    shared: Arc<Shared>,
    task: TaskHandle,
}

struct Shared {
    env: SharedEnv,
    path: PathBuf,
    executor: Option<Executor>,
    link: watch::Sender<Link>,
    next: AtomicU64,
    /// For each [`Lane`] by its number.
    places: [Semaphore; Lane::ALL.len()],
    events: EventHub,
}

/// State of the connection.
#[derive(Clone)]
enum Link {
    /// Being made; the last failure, if any.
    Down(Option<Error>),
    Up(Arc<Connection>),
}

struct Connection {
    outgoing: mpsc::Sender<Frame>,
    state: Mutex<ConnectionState>,
    control: Notify,
}

#[derive(Default)]
struct ConnectionState {
    /// The connection is gone: nobody will answer.
    broken: bool,
    pending: BTreeMap<u64, oneshot::Sender<Answer>>,
    /// Calls whose callers left; the writer tells the host. Bounded by the calls in flight.
    cancelled: Vec<u64>,
    subscribe: bool,
    subscribed: bool,
}

impl Client {
    /// Connects to the host's socket and keeps the connection: when it breaks, calls in flight fail as unavailable, and
    /// later ones wait for the next connection within their deadline. `executor` goes with the hello if it is known.
    ///
    /// # Errors
    /// When the host does not answer a hello within 10 s, or refuses it.
    pub async fn connect(
        env: SharedEnv,
        path: impl Into<PathBuf>,
        executor: Option<Executor>,
    ) -> Result<Self> {
        let client = Self::start(env.clone(), path, executor);
        let settled = async {
            let mut link = client.shared.link.subscribe();
            // Not being there yet may pass; being refused does not.
            let settled = |l: &Link| match l {
                Link::Up(_) => true,
                Link::Down(error) => error.as_ref().is_some_and(|e| !e.is(ErrorKind::Unavailable)),
            };
            link.wait_for(settled).await.is_ok_and(|l| matches!(&*l, Link::Up(_)))
        };
        match env.timeout(HELLO_TIMEOUT, settled).await {
            Ok(true) => Ok(client),
            _ => Err(client.shared.why_down()),
        }
    }

    /// As [`Client::connect`], without waiting for the first connection.
    pub fn start(env: SharedEnv, path: impl Into<PathBuf>, executor: Option<Executor>) -> Self {
        let shared = Arc::new(Shared {
            env: env.clone(),
            path: path.into(),
            executor,
            link: watch::Sender::new(Link::Down(None)),
            next: AtomicU64::new(0),
            places: Lane::ALL
                .map(|lane| Semaphore::new(if lane.waits() { MAX_WAITS } else { MAX_IN_FLIGHT })),
            events: EventHub::default(),
        });
        let task = env.spawn_task("agent client", Shared::keep_connected(shared.clone()));
        Self { shared, task }
    }

    /// The whole trait over this client.
    pub fn agent(self) -> Remote<Client> {
        Remote(self)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.task.abort();
        if let Link::Up(connection) = &*self.shared.link.borrow() {
            connection.fail();
        }
    }
}

impl Shared {
    async fn keep_connected(self: Arc<Self>) {
        let mut back_off = BACK_OFF.0;
        loop {
            let error = match self.env.timeout(HELLO_TIMEOUT, self.hello()).await {
                Ok(Ok((stream, reader))) => {
                    back_off = BACK_OFF.0;
                    let error = self.hold(stream, reader).await;
                    tracing::warn!(%error, "the connection to the host process broke");
                    Error::unavailable("the host process does not answer").with_context(error)
                }
                Ok(Err(e)) => e,
                Err(_) => Error::unavailable("the host process does not answer"),
            };
            tracing::debug!(%error, "not connected to the host process");
            self.link.send_replace(Link::Down(Some(error)));
            self.env.sleep(back_off).await;
            back_off = (back_off * 2).min(BACK_OFF.1);
        }
    }

    async fn hello(&self) -> Result<(Arc<UnixStream>, FrameReader)> {
        let down = |e: io::Error| Error::unavailable("the host process does not answer").with_context(e);
        let stream = Arc::new(UnixStream::connect(&self.path).await.map_err(down)?);
        let hello = ToHost::Hello { versions: (*VERSIONS.start(), *VERSIONS.end()), executor: self.executor };
        Frame::new(&hello, vec![])?.send(&stream).await.map_err(down)?;
        let mut reader = FrameReader::new(stream.clone(), true);
        match reader.next::<FromHost>().await.map_err(down)? {
            Some((FromHost::Welcome { version }, _)) if VERSIONS.contains(&version) => Ok((stream, reader)),
            Some((FromHost::Refused { error }, _)) => Err(error),
            Some(_) => {
                Err(Error::internal("the host process answered a hello with something else", "protocol"))
            }
            None => Err(Error::unavailable("the host process closed the connection")),
        }
    }

    /// Serves one connection until it breaks.
    async fn hold(&self, stream: Arc<UnixStream>, mut reader: FrameReader) -> io::Error {
        let (outgoing, frames) = mpsc::channel(OUTGOING);
        let connection = Arc::new(Connection {
            outgoing,
            state: Mutex::new(ConnectionState {
                subscribe: !self.events.is_empty(),
                ..ConnectionState::default()
            }),
            control: Notify::new(),
        });
        connection.control.notify_one();
        self.link.send_replace(Link::Up(connection.clone()));
        // Whatever happened while nobody listened is lost; receivers ask for the whole again.
        self.events.publish(&AgentEvent::Lost);
        let error = {
            let writing = connection.write(frames, &stream);
            let reading = self.read(&connection, &mut reader);
            match select(pin!(reading), pin!(writing)).await {
                Either::Left((e, _)) | Either::Right((e, _)) => e,
            }
        };
        connection.fail();
        error
    }

    async fn read(&self, connection: &Connection, reader: &mut FrameReader) -> io::Error {
        loop {
            match reader.next::<FromHost>().await {
                Ok(Some((FromHost::Response { id, outcome }, fds))) => {
                    let waiting = connection.state.lock().pending.remove(&id);
                    if let Some(waiting) = waiting {
                        // Nobody there any more: its descriptors are closed by the drop.
                        let _ = waiting.send(match outcome {
                            Outcome::Result(value) => Ok((value, fds)),
                            Outcome::Error(error) => Err(error),
                        });
                    }
                }
                Ok(Some((FromHost::Event { event }, _))) => self.events.publish(&event),
                Ok(Some(_)) => {
                    return io::Error::new(io::ErrorKind::InvalidData, "a second answer to the hello");
                }
                Ok(None) => return io::ErrorKind::UnexpectedEof.into(),
                Err(e) => return e,
            }
        }
    }

    /// The connection, as soon as there is one.
    async fn connection(&self) -> Option<Arc<Connection>> {
        let mut link = self.link.subscribe();
        match link.wait_for(|l| matches!(l, Link::Up(_))).await.as_deref() {
            Ok(Link::Up(connection)) => Some(connection.clone()),
            _ => None,
        }
    }

    fn why_down(&self) -> Error {
        match &*self.link.borrow() {
            Link::Down(Some(error)) => error.clone(),
            _ => Error::unavailable("the host process does not answer"),
        }
    }

    async fn call(&self, context: &CallContext, call: Call) -> Answer {
        let began = self.env.monotonic();
        let places = &self.places[call.lane() as usize];
        let _place = places.acquire().await.map_err(|_| Error::unavailable("shutting down"))?;
        let connection = self.connection().await.ok_or_else(|| self.why_down())?;
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let left = context.deadline.saturating_sub(self.env.monotonic().saturating_sub(began));
        let request = ToHost::Request {
            id,
            context: CallContext { deadline: left, fence: context.fence },
            call: serde_json::to_value(&call)?,
        };
        let frame = Frame::new(&request, vec![])?;
        let broke = || Error::unavailable("the host process ended while it worked on this");
        let (sender, answer) = oneshot::channel();
        {
            let mut state = connection.state.lock();
            if state.broken {
                return Err(broke());
            }
            state.pending.insert(id, sender);
        }
        // From here on, leaving early tells the host to drop the call.
        let _left = CancelOnDrop { connection: &connection, id };
        connection.outgoing.send(frame).await.map_err(|_| broke())?;
        answer.await.unwrap_or_else(|_| Err(broke()))
    }
}

struct CancelOnDrop<'a> {
    connection: &'a Connection,
    id: u64,
}

impl Drop for CancelOnDrop<'_> {
    fn drop(&mut self) {
        let mut state = self.connection.state.lock();
        if state.pending.remove(&self.id).is_some() {
            state.cancelled.push(self.id);
            self.connection.control.notify_one();
        }
    }
}

impl Connection {
    fn fail(&self) {
        let mut state = self.state.lock();
        state.broken = true;
        state.pending.clear();
    }

    async fn write(&self, mut frames: mpsc::Receiver<Frame>, stream: &UnixStream) -> io::Error {
        loop {
            let next = {
                let (frame, control) = (pin!(frames.recv()), pin!(self.control.notified()));
                match select(frame, control).await {
                    Either::Left((frame, _)) => frame.into_iter().collect(),
                    Either::Right(_) => vec![],
                }
            };
            // Whatever is cancelled was queued before: requests first.
            let mut next: Vec<_> = next;
            if next.is_empty() {
                next.extend(std::iter::from_fn(|| frames.try_recv().ok()));
                next.extend(self.control_frames());
            }
            for frame in next {
                if let Err(e) = frame.send(stream).await {
                    return e;
                }
            }
        }
    }

    fn control_frames(&self) -> Vec<Frame> {
        let mut state = self.state.lock();
        let cancels = std::mem::take(&mut state.cancelled);
        let mut messages: Vec<_> = cancels.into_iter().map(|id| ToHost::Cancel { id }).collect();
        if state.subscribe && !state.subscribed {
            state.subscribed = true;
            messages.push(ToHost::Subscribe);
        }
        messages.iter().filter_map(|m| Frame::new(m, vec![]).ok()).collect()
    }
}

#[async_trait]
impl Transport for Client {
    async fn carry(&self, context: &CallContext, call: Call) -> Answer {
        let name = call.name();
        let shared = &self.shared;
        // A little longer than the host's own limit, so that its answer, which knows more, comes first.
        let patience = context.deadline + context.deadline.mul_f64(0.05).min(Duration::from_millis(200));
        match shared.env.timeout(patience, shared.call(context, call)).await {
            Ok(answer) => answer,
            Err(_) if matches!(&*shared.link.borrow(), Link::Down(_)) => Err(shared.why_down()),
            Err(_) => {
                Err(Error::timeout(format!("{name} did not end within its time ({:?})", context.deadline)))
            }
        }
    }

    async fn subscribe(&self) -> Result<mpsc::Receiver<AgentEvent>> {
        let receiver = self.shared.events.subscribe();
        if let Link::Up(connection) = &*self.shared.link.borrow() {
            connection.state.lock().subscribe = true;
            connection.control.notify_one();
        }
        Ok(receiver)
    }
}
