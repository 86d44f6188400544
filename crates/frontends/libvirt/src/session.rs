//! One connection: reads frames, runs calls, several at once, and sends what they answer. What is malformed ends this
//! connection and no other.

use crate::{
    Front,
    bounds::{Allowance, Bounds, SMALL, STREAM_FRAME},
    calls::monitor::Listeners,
    calls::plugged::Watchers,
    calls::power::end_doomed,
    error::{Code, Part, VirError},
    events::Callbacks,
    frame::{Frame, Header, KEEPALIVE, Kind, LXC, QEMU, REMOTE, Status},
    table,
    transport::{Incoming, Outgoing, Transport},
    xdr::Reader,
};
use bytes::Bytes;
use futures::future::BoxFuture;
use karst_engine::{Context, InstanceView, audit::AuditRequest};
use karst_model::{
    InstanceId,
    instance::{Generation, InstanceKind},
};
use std::{
    collections::hash_map::Entry,
    collections::{HashMap, HashSet},
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use uuid::Uuid;

/// Calls of one client that run at once; more wait in its socket.
const CALLS: usize = 20;
/// Frames that wait for a slow client before its calls have to.
const QUEUE: usize = 64;
/// Frames of a stream from the client that wait for the guest. A stream that has more is ended: the connection's other calls
/// do not wait for it.
const STREAM_QUEUE: usize = 1024;
/// Frames of an upload that wait for the disk; a client's have 256 KiB.
const UPLOAD_QUEUE: usize = 16;
/// So many bytes of a large frame a millisecond are awaited beyond the patience that a small one is met with.
const SLOWEST: usize = 64;

/// Time to say that the connection ends.
const FAREWELL: Duration = Duration::from_secs(5);

/// Which of a host's guests a connection is about: libvirt has a driver for each kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// Virtual machines, `qemu:///system`.
    Qemu,
    /// Containers, `lxc:///system`.
    Lxc,
}

impl Driver {
    /// Kind of its guests.
    pub fn kind(self) -> InstanceKind {
        match self {
            Self::Qemu => InstanceKind::VirtualMachine,
            Self::Lxc => InstanceKind::Container,
        }
    }

    /// Who errors are said to come from.
    pub fn part(self) -> Part {
        match self {
            Self::Qemu => Part::Qemu,
            Self::Lxc => Part::Lxc,
        }
    }
}

/// What a connection was opened for.
#[derive(Debug, Clone)]
pub struct Opened {
    /// Driver.
    pub driver: Driver,
    /// Project.
    pub project: String,
    /// The URI as it is shown.
    pub uri: String,
}

/// What a client sends into a stream.
#[derive(Debug)]
pub enum StreamInput {
    /// Bytes.
    Data(Bytes),
    /// So many zeros.
    Hole(u64),
    /// It is done.
    Finish,
    /// It gave up.
    Abort,
}

/// What a client sent into a stream, and the room that it takes up until it is taken.
struct Queued {
    input: StreamInput,
    _room: OwnedSemaphorePermit,
}

/// The session's end of a stream.
#[derive(Clone)]
struct Stream {
    sender: mpsc::Sender<Queued>,
    /// What takes the input always comes around to it: the connection waits for it.
    patient: bool,
}

/// What a client sends into a stream, to be taken.
pub struct Input {
    receiver: mpsc::Receiver<Queued>,
    _place: OwnedSemaphorePermit,
}

impl Input {
    /// The next of it; nothing when the stream is over without the client's word: something of it was lost, or the connection.
    pub async fn recv(&mut self) -> Option<StreamInput> {
        self.receiver.recv().await.map(|queued| queued.input)
    }
}

/// Says whether who is at the other end still is who he was.
pub type Stands = Box<dyn Fn() -> bool + Send + Sync>;

/// Who is at the other end of a connection.
pub struct Peer {
    /// The principal.
    pub context: Context,
    /// Can change nothing.
    pub read_only: bool,
    /// Where trust may be taken away while the connection lasts: asked by each call, and so often besides.
    pub stands: Option<(Stands, Duration)>,
    /// What they may have.
    pub allowance: Allowance,
}

/// A connection's state, shared by its calls.
pub struct Session {
    /// The front end.
    pub front: Arc<Front>,
    /// Who is at the other end.
    pub context: Context,
    /// Can change nothing: by its socket, or because the client said so.
    read_only: AtomicBool,
    stands: Option<(Stands, Duration)>,
    allowance: Allowance,
    /// Do descriptors go over it?
    pub passes_descriptors: bool,
    /// Callbacks for events.
    pub callbacks: Mutex<Callbacks>,
    /// Who listens for events of QEMU's monitors.
    pub monitor: Mutex<Listeners>,
    /// Who listens for events of node devices.
    pub plugged: Mutex<Watchers>,
    /// Starts of guests that end with the connection.
    pub doomed: Mutex<Vec<(InstanceId, Generation)>>,
    opened: OnceLock<Opened>,
    out: mpsc::Sender<(Frame, Vec<OwnedFd>)>,
    streams: Mutex<HashMap<u32, Stream>>,
    /// Serials of the calls that run.
    serials: Mutex<HashSet<u32>>,
    /// Bytes that may wait in streams that the connection waits for, and in the others.
    patient_room: Arc<Semaphore>,
    other_room: Arc<Semaphore>,
    over: watch::Sender<bool>,
}

/// A call with what it needs.
pub struct Call {
    /// The connection.
    pub session: Arc<Session>,
    /// The frame's header.
    pub header: Header,
    /// Arguments.
    pub payload: Bytes,
    /// Descriptors that came with them.
    pub fds: Vec<OwnedFd>,
}

/// What a call answers.
pub struct Answer {
    /// Its result.
    pub payload: Vec<u8>,
    /// Descriptors that go with it.
    pub fds: Vec<OwnedFd>,
    /// What begins when the client has been told: a stream.
    pub then: Option<BoxFuture<'static, ()>>,
}

impl Answer {
    /// The connection ends when the client has got this.
    pub fn and_then_end(self, session: &Arc<Session>) -> Self {
        let session = session.clone();
        Self { then: Some(Box::pin(async move { session.end() })), ..self }
    }
}

impl From<Vec<u8>> for Answer {
    fn from(payload: Vec<u8>) -> Self {
        Self { payload, fds: vec![], then: None }
    }
}

impl Call {
    /// Reads all arguments.
    ///
    /// # Errors
    /// RPC, when they are not what `read` takes.
    pub fn arguments<T>(
        &self,
        read: impl FnOnce(&mut Reader<'_>) -> Result<T, VirError>,
    ) -> Result<T, VirError> {
        let mut reader = Reader::new(&self.payload);
        let value = read(&mut reader)?;
        reader.end()?;
        Ok(value)
    }

    /// What the connection was opened for.
    ///
    /// # Errors
    /// No connection, before it was.
    pub fn opened(&self) -> Result<&Opened, VirError> {
        self.session.opened()
    }
}

impl Session {
    /// What the connection was opened for.
    ///
    /// # Errors
    /// Internal, before it was.
    pub fn opened(&self) -> Result<&Opened, VirError> {
        self.opened.get().ok_or_else(|| VirError::new(Code::InternalError, Part::Rpc, "connection not open"))
    }

    /// Opens the connection, once.
    ///
    /// # Errors
    /// Internal, when it is open.
    pub fn open(&self, opened: Opened) -> Result<(), VirError> {
        let again = |_| VirError::new(Code::InternalError, Part::Rpc, "connection already open");
        self.opened.set(opened).map_err(again)
    }

    /// Can it change nothing?
    pub fn read_only(&self) -> bool {
        self.read_only.load(Ordering::Relaxed)
    }

    /// From now on it can change nothing.
    pub fn restrict(&self) {
        self.read_only.store(true, Ordering::Relaxed);
    }

    /// The guests that this connection is about, by name.
    ///
    /// # Errors
    /// Those of the engine.
    pub fn guests(&self) -> Result<Vec<Arc<InstanceView>>, VirError> {
        let opened = self.opened()?;
        let mut all = self.front.engine.instances(&self.context, &opened.project)?;
        all.retain(|v| v.instance.kind == opened.driver.kind());
        Ok(all)
    }

    /// The guest of a name, when it is one of this connection's kind.
    ///
    /// # Errors
    /// No domain.
    pub fn guest(&self, name: &str) -> Result<Arc<InstanceView>, VirError> {
        let opened = self.opened()?;
        let missing = || {
            let text = format!("no domain with matching name '{name}'");
            VirError::new(Code::NoDomain, opened.driver.part(), text)
        };
        let view = self.front.engine.instance(&self.context, &opened.project, name).map_err(|_| missing())?;
        if view.instance.kind == opened.driver.kind() { Ok(view) } else { Err(missing()) }
    }

    /// The guest of a UUID.
    ///
    /// # Errors
    /// No domain.
    pub fn guest_by_uuid(&self, uuid: Uuid) -> Result<Arc<InstanceView>, VirError> {
        let part = self.opened()?.driver.part();
        self.guests()?.into_iter().find(|v| crate::domain_uuid(v) == uuid).ok_or_else(|| {
            VirError::new(Code::NoDomain, part, format!("no domain with matching uuid '{uuid}'"))
        })
    }

    /// Sends a frame; waits for a slow client.
    pub async fn send(&self, frame: Frame) {
        self.send_with(frame, vec![]).await;
    }

    /// Sends a frame with descriptors, of a kind that says so.
    async fn send_with(&self, frame: Frame, fds: Vec<OwnedFd>) {
        // The connection may have ended, which its calls need not know.
        let _ = self.out.send((frame, fds)).await;
    }

    /// Opens a stream beside the answer of a call; what the client sends comes out of the receiver. More of it than is taken
    /// ends the stream: a guest may never take it, and the connection's other calls do not wait for one.
    ///
    /// # Errors
    /// Operation failed, with as many streams as there may be; RPC, when there is one of this serial.
    pub fn stream(&self, call: Header) -> Result<Input, VirError> {
        self.open_stream(call, STREAM_QUEUE, false)
    }

    /// As [`Session::stream`], of what is taken as fast as disks are: the connection waits while it is not.
    ///
    /// # Errors
    /// Those of [`Session::stream`].
    pub fn upload(&self, call: Header) -> Result<Input, VirError> {
        self.open_stream(call, UPLOAD_QUEUE, true)
    }

    fn open_stream(&self, call: Header, queue: usize, patient: bool) -> Result<Input, VirError> {
        let many = |whose: &str, most: usize| {
            let text = format!("{whose} has {most} streams, which is as many as there may be; end one first");
            VirError::new(Code::OperationFailed, Part::Rpc, text)
        };
        let most = self.front.bounds.streams;
        let place = self.allowance.streams.clone().try_acquire_owned();
        let mut streams = self.streams.lock().unwrap_or_else(|e| e.into_inner());
        if streams.len() >= most {
            return Err(many("the connection", most));
        }
        let Entry::Vacant(free) = streams.entry(call.serial) else {
            return Err(VirError::rpc(format!("the stream of call {} goes on", call.serial)));
        };
        let place = place.map_err(|_| many("the client", self.allowance.all_streams))?;
        let (sender, receiver) = mpsc::channel(queue);
        free.insert(Stream { sender, patient });
        Ok(Input { receiver, _place: place })
    }

    /// Forgets a stream; was it still there, so that its end is to be told?
    pub fn stream_ended(&self, call: Header) -> bool {
        self.streams.lock().unwrap_or_else(|e| e.into_inner()).remove(&call.serial).is_some()
    }

    /// Is who is at the other end still who he was?
    fn stands(&self) -> bool {
        self.stands.as_ref().is_none_or(|(stands, _)| stands())
    }

    /// Completes when he is not.
    async fn distrusted(&self) {
        match &self.stands {
            None => std::future::pending().await,
            Some((stands, often)) => {
                while stands() {
                    tokio::time::sleep(*often).await;
                }
            }
        }
    }

    /// Ends the connection.
    pub fn end(&self) {
        self.over.send_replace(true);
    }

    /// Completes when the connection is over.
    pub async fn ended(&self) {
        let _ = self.over.subscribe().wait_for(|over| *over).await;
    }
}

/// A serial that a call has while it runs. Its stream has it from then on.
struct Serial {
    session: Arc<Session>,
    number: u32,
}

impl Serial {
    /// Nothing when another call has it, or its stream: what is sent into the one would go into the other.
    fn take(session: &Arc<Session>, number: u32) -> Option<Self> {
        // In this order wherever both are held.
        let mut serials = session.serials.lock().unwrap_or_else(|e| e.into_inner());
        let streams = session.streams.lock().unwrap_or_else(|e| e.into_inner());
        let free = !streams.contains_key(&number) && serials.insert(number);
        free.then(|| Self { session: session.clone(), number })
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        self.session.serials.lock().unwrap_or_else(|e| e.into_inner()).remove(&self.number);
    }
}

/// Ends a connection when it is dropped.
struct Ends(Arc<Session>);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Serves one connection to its end.
pub async fn serve(front: Arc<Front>, peer: Peer, transport: Transport) {
    let passes_descriptors = transport.passes_descriptors();
    let (reader, writer) = transport.split();
    let (out, queue) = mpsc::channel(QUEUE);
    let room = || Arc::new(Semaphore::new(front.bounds.stream_bytes.max(STREAM_FRAME)));
    let (patient_room, other_room) = (room(), room());
    let session = Arc::new(Session {
        front,
        context: peer.context,
        read_only: AtomicBool::new(peer.read_only),
        stands: peer.stands,
        allowance: peer.allowance,
        passes_descriptors,
        callbacks: Mutex::default(),
        monitor: Mutex::default(),
        plugged: Mutex::default(),
        doomed: Mutex::default(),
        opened: OnceLock::new(),
        out,
        streams: Mutex::default(),
        serials: Mutex::default(),
        patient_room,
        other_room,
        over: watch::channel(false).0,
    });
    // Also when whoever serves it lets go of it: what was spawned for it must not keep it open.
    let _ends = Ends(session.clone());
    let writing = tokio::spawn(write(session.clone(), writer, queue));
    tokio::select! {
        () = read(&session, reader) => {}
        () = session.ended() => {}
        // Nor is it sent what was to go to it.
        () = session.distrusted() => writing.abort(),
    }
    session.end();
    session.callbacks.lock().unwrap_or_else(|e| e.into_inner()).clear();
    session.monitor.lock().unwrap_or_else(|e| e.into_inner()).clear();
    session.plugged.lock().unwrap_or_else(|e| e.into_inner()).clear();
    session.streams.lock().unwrap_or_else(|e| e.into_inner()).clear();
    // Not waited for: whoever serves it lets go of it.
    tokio::spawn(end_doomed(session.clone()));
    let _ = writing.await;
}

async fn write(
    session: Arc<Session>,
    mut writer: Outgoing,
    mut queue: mpsc::Receiver<(Frame, Vec<OwnedFd>)>,
) {
    loop {
        let next = tokio::select! {
            biased;
            next = queue.recv() => next,
            () = session.ended() => None,
        };
        let Some((frame, with)) = next else { break };
        let bytes = frame.encode();
        match tokio::time::timeout(session.front.bounds.patience, writer.send(&bytes, with)).await {
            Ok(Ok(())) => {}
            _ => break,
        }
    }
    session.end();
    // Whoever is gone need not be told.
    let _ = tokio::time::timeout(FAREWELL, writer.close()).await;
}

async fn read(session: &Arc<Session>, mut reader: Incoming) {
    let places = Arc::new(Semaphore::new(CALLS));
    let patience = session.front.bounds.patience;
    let mut began = false;
    loop {
        let (Frame { header, mut payload }, room) = match next(session, &mut reader, began).await {
            Ok(Some(next)) => next,
            Ok(None) => return,
            Err(e) => {
                tracing::debug!(error = %e, "a libvirt connection ended badly");
                return;
            }
        };
        began = true;
        let mut with = vec![];
        if header.kind == Kind::CallWithFds {
            match tokio::time::timeout(patience, reader.descriptors(&mut payload)).await {
                Ok(Ok(taken)) => with = taken,
                // What follows cannot be told from descriptors.
                _ => return,
            }
        }
        match (header.program, header.kind) {
            (KEEPALIVE, Kind::Message) => {
                if header.procedure == 1 {
                    session.send(Frame::new(Header { procedure: 2, ..header }, Bytes::new())).await;
                }
            }
            (REMOTE | QEMU, Kind::Call | Kind::CallWithFds) => {
                let Ok(place) = places.clone().acquire_owned().await else { return };
                let Some(serial) = Serial::take(session, header.serial) else {
                    let text =
                        format!("the serial {} is that of a call or stream that goes on", header.serial);
                    session.send(Frame::error(header, &VirError::rpc(text))).await;
                    continue;
                };
                let call = Call { session: session.clone(), header, payload, fds: with };
                tokio::spawn(async move {
                    run(call, serial).await;
                    drop((place, room));
                });
            }
            (LXC, Kind::Call | Kind::CallWithFds) => {
                let error = VirError::no_support(
                    "virDomainLxcOpenNamespace: no descriptor of a container's namespaces is given to a client, who could \
                     do with it what the host's root can; run programs in it by `incus exec`, or on its console",
                );
                session.send(Frame::error(header, &error)).await;
            }
            (REMOTE, Kind::Stream | Kind::StreamHole) => streamed(session, header, payload).await,
            (_, Kind::Call | Kind::CallWithFds) => {
                let error = VirError::rpc(format!(
                    "Cannot find program {} version {}",
                    header.program, header.version
                ));
                session.send(Frame::error(header, &error)).await;
            }
            // Nothing that a client sends by itself.
            _ => return,
        }
    }
}

/// Reads the next frame; a large one when its client has room for it, which it takes up as long as what comes with it is kept.
/// What has begun must come to its end.
async fn next(
    session: &Session,
    reader: &mut Incoming,
    began: bool,
) -> io::Result<Option<(Frame, Option<OwnedSemaphorePermit>)>> {
    let Allowance { frame: most, large, .. } = &session.allowance;
    let Bounds { patience, first, .. } = session.front.bounds;
    let late = |what: &'static str| io::Error::new(io::ErrorKind::TimedOut, what);
    let head = Frame::read_head(reader, *most);
    let head = match began {
        true => head.await,
        false => tokio::time::timeout(first, head).await.map_err(|_| late("nothing is asked"))?,
    };
    let Some((header, length)) = head? else { return Ok(None) };
    if matches!(header.kind, Kind::Stream | Kind::StreamHole) && length > STREAM_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{length} bytes of a stream at once"),
        ));
    }
    let room = match u32::try_from(length) {
        Ok(length) if length as usize > SMALL => {
            let room = tokio::time::timeout(patience, large.clone().acquire_many_owned(length)).await;
            // It is never closed.
            Some(room.map_err(|_| late("there is no room"))?.map_err(io::Error::other)?)
        }
        _ => None,
    };
    let time = patience + Duration::from_millis((length / SLOWEST) as u64);
    let payload = tokio::time::timeout(time, Frame::read_payload(reader, length)).await;
    let payload = payload.map_err(|_| late("a frame does not end"))??;
    Ok(Some((Frame { header, payload }, room)))
}

/// Hands what a client sends on to its stream. One of which anything is lost is ended with an error, and never goes on.
async fn streamed(session: &Session, header: Header, payload: Bytes) {
    let stream = session.streams.lock().unwrap_or_else(|e| e.into_inner()).get(&header.serial).cloned();
    let Some(stream) = stream else {
        // It ended by itself meanwhile; a client that finishes it is told so.
        if header.status == Status::Ok {
            session.send(Frame::new(header.stream(Status::Ok), Bytes::new())).await;
        }
        return;
    };
    let input = match (header.kind, header.status) {
        (Kind::StreamHole, _) => match hole(&payload) {
            Some(length) => StreamInput::Hole(length),
            None => {
                let error =
                    VirError::rpc("a hole in a stream has a length that is not negative, and no flags");
                return lose(session, header, &error).await;
            }
        },
        (_, Status::Continue) => StreamInput::Data(payload),
        (_, Status::Ok) => StreamInput::Finish,
        (_, Status::Error) => StreamInput::Abort,
    };
    // Frames are smaller than that.
    let size =
        if let StreamInput::Data(data) = &input { u32::try_from(data.len()).unwrap_or(u32::MAX) } else { 0 };
    let taken = match stream.patient {
        true => {
            let put = async {
                let Ok(room) = session.patient_room.clone().acquire_many_owned(size).await else { return };
                // Whoever took it and has ended tells of that.
                let _ = stream.sender.send(Queued { input, _room: room }).await;
            };
            tokio::time::timeout(session.front.bounds.patience, put).await.is_ok()
        }
        false => match session.other_room.clone().try_acquire_many_owned(size) {
            Ok(room) => {
                let put = stream.sender.try_send(Queued { input, _room: room });
                !matches!(put, Err(mpsc::error::TrySendError::Full(_)))
            }
            Err(_) => false,
        },
    };
    if !taken {
        let text = "what was sent into the stream was not taken in time";
        lose(session, header, &VirError::new(Code::OperationAborted, Part::Rpc, text)).await;
    }
}

/// Ends a stream of which something was lost, and tells its client. Whoever takes its input sees an end without a word.
async fn lose(session: &Session, header: Header, error: &VirError) {
    if session.stream_ended(header) {
        session.send(Frame::new(header.stream(Status::Error), error.encode())).await;
    }
}

/// `virNetStreamHole`: its length; negative ones and flags are of no protocol.
fn hole(payload: &Bytes) -> Option<u64> {
    let mut reader = Reader::new(payload);
    let (length, flags) = (reader.u64().ok()?, reader.u32().ok()?);
    reader.end().ok()?;
    (flags == 0 && i64::try_from(length).is_ok()).then_some(length)
}

async fn run(call: Call, serial: Serial) {
    let (session, header) = (call.session.clone(), call.header);
    if !session.stands() {
        return session.end();
    }
    let procedure = table::find(header.program, header.procedure);
    let object = procedure.map(|p| object_of(p, &call.payload)).unwrap_or_default();
    let changes = procedure.filter(|p| p.demand == table::Demand::Change);
    let (engine, context) = (&session.front.engine, &session.context);
    let asked = changes.map(|procedure| {
        let project = session.opened().map(|o| o.project.clone()).unwrap_or_default();
        engine.audit_asked(context, &format!("libvirt {}", procedure.name), &object, &project)
    });
    let answered = match procedure {
        _ if header.version != 1 => {
            let text = format!("Cannot find program {} version {}", header.program, header.version);
            Err(VirError::rpc(text))
        }
        Some(procedure) => match procedure.admit(&session) {
            Ok(()) => match &asked {
                Some(asked) => asked.during((procedure.handler)(call)).await,
                None => (procedure.handler)(call).await,
            },
            Err(e) => Err(e),
        },
        None => Err(VirError::no_support(table::why_not(header.program, header.procedure))),
    };
    if let (Some(procedure), Some(asked)) = (changes, asked) {
        let outcome = match &answered {
            Ok(_) => ("done", String::new()),
            Err(e) if matches!(e.code, Code::OperationDenied | Code::AccessDenied) => {
                ("refused", e.message())
            }
            Err(e) => ("failed", e.message()),
        };
        let project = session.opened().map(|o| o.project.clone()).unwrap_or_default();
        let request = AuditRequest {
            what: format!("libvirt {}", procedure.name),
            object,
            project,
            outcome: outcome.0,
            detail: outcome.1,
        };
        asked.ended(request);
    }
    // Before the client is answered, which may use it again.
    drop(serial);
    match answered {
        Ok(answer) => {
            let frame = match answer.fds.len() {
                0 => Frame::new(header.reply(Status::Ok), answer.payload),
                n => Frame::with_fds(header, n, &answer.payload),
            };
            session.send_with(frame, answer.fds).await;
            if let Some(then) = answer.then {
                tokio::spawn(then);
            }
        }
        Err(e) => session.send(Frame::error(header, &e)).await,
    }
}

/// Name of the object that a call is about, for the audit log: what its arguments begin with.
fn object_of(procedure: &table::Procedure, payload: &Bytes) -> String {
    let xml = procedure.name.contains("XML");
    // They begin with a UUID, and a value may follow: nothing else of them is ever written down.
    if procedure.name.starts_with("SECRET_") {
        let uuid = Reader::new(payload).uuid().ok().filter(|_| !xml);
        return uuid.map(|u| u.to_string()).unwrap_or_default();
    }
    let name = Reader::new(payload).string().ok().filter(|_| !xml);
    name.filter(|n| n.len() <= 256).unwrap_or_default()
}
