//! The connection to Karst's own agent of one guest (`karst_guest_agent::wire`).
//!
//! The guest is not trusted. What is kept for it is bounded: a window for each channel of at most 64 streams, one reply and
//! one end each. What it may send is checked: bytes without credit, streams that never were and bytes that are no frames
//! end the connection, and the next one waits longer each time. Every wait of a caller has a deadline.
//!
//! The socket serves one client and goes on listening. So an unused connection is given back soon: there may be a
//! successor of ours.

use crate::{launch, line::printable};
use karst_guest_agent::{
    message::{self, Control, Ended, Refused, Reply, Request, Welcome, Wire, refusal},
    wire::{Decoded, Decoder, Frame, MAX_STREAMS, NONCE, VERSION, WINDOW, channel, kind},
};
use karst_model::{Error, ErrorKind, Result};
use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::{OwnedReadHalf, OwnedWriteHalf},
    sync::{Notify, mpsc},
    time::{Instant, timeout},
};

/// How long the handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(3);
/// Most bytes before the handshake's answer: what an agent had sent to somebody before us.
const LEFTOVERS: usize = 4 << 20;
/// An unused connection is given back after this.
const IDLE: Duration = Duration::from_millis(300);
/// Most small frames (credit, orders, ends) that wait for a guest that does not read.
const URGENT: usize = 4096;
/// Most frames of data that wait.
const DATA: usize = 16;

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

/// The agent of one guest.
#[derive(Debug)]
pub(crate) struct Link {
    dir: PathBuf,
    name: String,
    connection: tokio::sync::Mutex<Option<Arc<Connection>>>,
    trouble: Mutex<Trouble>,
    uses: AtomicU64,
}

/// What went wrong lately.
#[derive(Debug, Default)]
struct Trouble {
    times: u32,
    until: Option<Instant>,
}

impl Link {
    /// The agent behind the socket in the state directory `dir` of the guest that users call `name`. Connects when it is
    /// needed.
    pub(crate) fn new(dir: PathBuf, name: String) -> Self {
        Self { dir, name, connection: Default::default(), trouble: Mutex::default(), uses: AtomicU64::new(0) }
    }

    /// What users call the guest.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The error for an agent that is not there.
    fn silent(&self) -> Error {
        Error::unavailable(format!(
            "Karst's guest agent of {} does not answer; it starts during boot, so try again shortly",
            self.name
        ))
    }

    fn nonsense(&self, what: impl std::fmt::Display) -> Error {
        Error::unavailable(format!("Karst's guest agent of {} answers nonsense", self.name))
            .with_context(what)
    }

    async fn connect(&self) -> Result<Arc<Connection>> {
        let stream =
            launch::connect(&self.dir, launch::LINK).await.map_err(|e| self.silent().with_context(e))?;
        let (mut read, mut write) = stream.into_split();
        // Not a secret: it tells this connection from those before.
        let nonce: [u8; NONCE] = uuid::Uuid::new_v4().into_bytes();
        let hello = (nonce, (VERSION, VERSION)).encoded();
        // The zero ends whatever somebody before us left in the middle.
        let bytes = [&[0][..], &Frame::new(kind::HELLO, 0, hello).encode()].concat();
        write.write_all(&bytes).await.map_err(|e| self.silent().with_context(e))?;
        let mut decoder = Decoder::default();
        let mut buffer = vec![0; 64 << 10];
        let (mut welcome, mut early) = (None, vec![]);
        let mut seen = 0;
        while welcome.is_none() {
            let n = read.read(&mut buffer).await.map_err(|e| self.silent().with_context(e))?;
            if n == 0 {
                return Err(self.silent());
            }
            seen += n;
            if seen > LEFTOVERS {
                return Err(self.nonsense("no answer to the handshake among all it sends"));
            }
            decoder.push(&buffer[..n], |d| match d {
                Decoded::Frame(f) if welcome.is_some() => early.push(f),
                Decoded::Frame(f) if f.kind == kind::WELCOME => {
                    welcome = Welcome::decoded(&f.payload).ok().filter(|w| w.nonce == nonce);
                }
                _ => {}
            });
        }
        if welcome.is_none_or(|w| w.version != VERSION) {
            return Err(Error::unsupported(format!(
                "the agent in {} and this host have no version in common; restart {0}, so that it gets the host's",
                self.name
            )));
        }
        let (urgent, urgent_receiver) = mpsc::channel(URGENT);
        let (data, data_receiver) = mpsc::channel(DATA);
        let connection = Arc::new(Connection {
            name: self.name.clone(),
            urgent,
            data,
            streams: Mutex::new(Some(Streams { open: HashMap::new(), next: 1 })),
            over: Notify::new(),
            misbehaved: AtomicBool::new(false),
        });
        tokio::spawn(write_all(connection.clone(), write, urgent_receiver, data_receiver));
        tokio::spawn(read_all(connection.clone(), read, decoder, early));
        Ok(connection)
    }

    /// A connection that lives; one at a time.
    async fn connected(&self) -> Result<Arc<Connection>> {
        let mut slot = self.connection.lock().await;
        if let Some(c) = slot.as_ref().filter(|c| c.lives()) {
            return Ok(c.clone());
        }
        if slot.take().is_some_and(|c| c.misbehaved.load(Ordering::Relaxed)) {
            self.failed();
        }
        if lock(&self.trouble).until.is_some_and(|u| u > Instant::now()) {
            return Err(self.nonsense("it is left alone for a while"));
        }
        let result = timeout(HANDSHAKE, self.connect()).await.unwrap_or_else(|_| Err(self.silent()));
        match result {
            Ok(c) => {
                *slot = Some(c.clone());
                Ok(c)
            }
            Err(e) => {
                if e.message.contains("nonsense") {
                    self.failed();
                }
                Err(e)
            }
        }
    }

    /// The next attempt waits longer each time, half a minute at most.
    fn failed(&self) {
        let mut trouble = lock(&self.trouble);
        trouble.times = (trouble.times + 1).min(9);
        trouble.until = Some(Instant::now() + Duration::from_millis(50 << trouble.times));
    }

    /// Opens a stream.
    ///
    /// # Errors
    /// Unavailable when the agent does not answer or 64 streams are open.
    pub(crate) async fn open(self: &Arc<Self>, request: Request) -> Result<Arc<Stream>> {
        let payload = request.encoded();
        if payload.len() > karst_guest_agent::wire::MAX_PAYLOAD {
            return Err(Error::too_large("command, environment and paths together may have 64 KiB at most"));
        }
        self.uses.fetch_add(1, Ordering::Relaxed);
        let connection = self.connected().await?;
        let inbox = Arc::new(Inbox::default());
        let id = {
            let mut streams = lock(&connection.streams);
            let streams = streams.as_mut().ok_or_else(|| self.silent())?;
            if streams.open.len() >= MAX_STREAMS {
                return Err(Error::unavailable(format!(
                    "{} programs and transfers are going on in {} at once; end some",
                    MAX_STREAMS, self.name
                )));
            }
            let id = streams.next;
            streams.next = id.checked_add(1).ok_or_else(|| self.silent())?;
            streams.open.insert(id, inbox.clone());
            id
        };
        let stream = Stream { id, connection, inbox, link: self.clone() };
        stream.connection.urgent(Frame::new(kind::OPEN, id, payload));
        Ok(Arc::new(stream))
    }

    /// Asks for one thing.
    ///
    /// # Errors
    /// As [`Link::open`] and [`Stream::reply`].
    pub(crate) async fn call<T: Wire>(self: &Arc<Self>, request: Request, limit: Duration) -> Result<T> {
        let work = async {
            let stream = self.open(request).await?;
            stream.reply::<T>().await
        };
        timeout(limit, work).await.map_err(|_| self.silent())?
    }

    /// Gives an unused connection back after a while.
    fn unused(self: &Arc<Self>) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (link, uses) = (Arc::downgrade(self), self.uses.load(Ordering::Relaxed));
        runtime.spawn(async move {
            tokio::time::sleep(IDLE).await;
            let Some(link) = link.upgrade() else { return };
            if link.uses.load(Ordering::Relaxed) == uses
                && let Ok(mut slot) = link.connection.try_lock()
                && slot.as_ref().is_some_and(|c| c.is_idle())
                && let Some(c) = slot.take()
            {
                c.end(false);
            }
        });
    }

    /// The guest closed its side, or the machine ended: nothing that was open goes on.
    pub(crate) fn closed(&self) {
        if let Ok(mut slot) = self.connection.try_lock()
            && let Some(c) = slot.take()
        {
            c.end(false);
        }
    }
}

/// Its tasks hold a connection for as long as the guest's side is there: without an end it would keep the socket, which serves
/// one client, from whoever comes next. No stream is open here, because each holds the link.
impl Drop for Link {
    fn drop(&mut self) {
        if let Some(c) = self.connection.get_mut().take() {
            c.end(false);
        }
    }
}

#[derive(Debug)]
struct Connection {
    name: String,
    urgent: mpsc::Sender<Frame>,
    data: mpsc::Sender<Frame>,
    /// `None` when it is over.
    streams: Mutex<Option<Streams>>,
    over: Notify,
    /// It was ended because of what the guest sent.
    misbehaved: AtomicBool,
}

#[derive(Debug)]
struct Streams {
    open: HashMap<u32, Arc<Inbox>>,
    next: u32,
}

impl Connection {
    fn lives(&self) -> bool {
        lock(&self.streams).is_some()
    }

    fn is_idle(&self) -> bool {
        lock(&self.streams).as_ref().is_none_or(|s| s.open.is_empty())
    }

    /// Ends it and all of its streams.
    fn end(&self, misbehaved: bool) {
        let streams = lock(&self.streams).take();
        if misbehaved {
            self.misbehaved.store(true, Ordering::Relaxed);
        }
        for inbox in streams.into_iter().flat_map(|s| s.open.into_values()) {
            lock(&inbox.state).lost = true;
            inbox.changed.notify_waiters();
        }
        self.over.notify_waiters();
    }

    fn violation(&self, what: &str) {
        if self.lives() {
            tracing::warn!(
                guest = self.name,
                what,
                "a guest's agent breaks its protocol; the connection was ended"
            );
        }
        self.end(true);
    }

    /// Without waiting: a guest that does not read for so long is given up.
    fn urgent(&self, frame: Frame) {
        if self.urgent.try_send(frame).is_err() && self.lives() {
            tracing::warn!(guest = self.name, "a guest's agent does not read; the connection was ended");
            self.end(true);
        }
    }

    /// Takes a frame of the guest.
    fn take(&self, f: Frame) -> Result<(), &'static str> {
        if f.kind == kind::READY {
            // It started again and knows nothing of our streams. That is no fault.
            self.end(false);
            return Ok(());
        }
        let inbox = {
            let mut streams = lock(&self.streams);
            let Some(streams) = streams.as_mut() else { return Ok(()) };
            if f.stream == 0 {
                return Ok(()); // of a newer version
            }
            if f.stream >= streams.next {
                return Err("a stream that was never opened");
            }
            let Some(inbox) = streams.open.get(&f.stream).cloned() else { return Ok(()) };
            if f.kind == kind::CLOSE {
                streams.open.remove(&f.stream);
            }
            inbox
        };
        let mut state = lock(&inbox.state);
        match f.kind {
            kind::REPLY if state.reply.is_none() => state.reply = Some(f.payload),
            kind::END if state.end.is_none() => state.end = Some(f.payload),
            kind::REPLY | kind::END => return Err("a second answer"),
            kind::CLOSE => state.closed = true,
            kind::DATA => {
                let (c, bytes) = f.channel().ok_or("data without a channel")?;
                let out = state.out(c).ok_or("data of an unknown channel")?;
                out.unread += bytes.len();
                if out.unread > WINDOW as usize || out.eof {
                    return Err("data without credit");
                }
                out.bytes.extend_from_slice(bytes);
            }
            kind::EOF => match f.channel() {
                Some((channel::IN, _)) => state.input_refused = true,
                Some((c, _)) => state.out(c).ok_or("the end of an unknown channel")?.eof = true,
                None => return Err("an end without a channel"),
            },
            kind::CREDIT => {
                let (c, n) = f.as_credit().ok_or("credit that is none")?;
                if c == channel::IN {
                    let used = state.spent.checked_sub(n as usize);
                    state.spent = used.ok_or("more credit than was used")?;
                }
            }
            _ => {} // of a newer version
        }
        drop(state);
        inbox.changed.notify_waiters();
        Ok(())
    }
}

/// Takes bytes as those of a guest on a connection with one open stream, in pieces of `piece` bytes, as [`read_all`] does.
/// What is kept of them for the stream: reply, end, and the bytes of its channels.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn taken(bytes: &[u8], piece: usize) -> [usize; 4] {
    // Nobody reads what goes to the guest; there is room for it.
    let (urgent, _urgent) = mpsc::channel(URGENT);
    let (data, _data) = mpsc::channel(DATA);
    let inbox = Arc::new(Inbox::default());
    let connection = Connection {
        name: "fuzzed".into(),
        urgent,
        data,
        streams: Mutex::new(Some(Streams { open: HashMap::from([(1, inbox.clone())]), next: 2 })),
        over: Notify::new(),
        misbehaved: AtomicBool::new(false),
    };
    let mut decoder = Decoder::default();
    let mut result = Ok(());
    for chunk in bytes.chunks(piece.max(1)) {
        decoder.push(chunk, |d| {
            if result.is_ok() {
                result = match d {
                    Decoded::Frame(f) => connection.take(f),
                    Decoded::Malformed => Err("bytes that are no frame"),
                };
            }
        });
    }
    match result {
        Err(what) => connection.violation(what),
        Ok(()) => connection.end(false),
    }
    assert!(!connection.lives(), "it ended");
    let state = lock(&inbox.state);
    let length = |bytes: &Option<Vec<u8>>| bytes.as_ref().map_or(0, Vec::len);
    let [out, err] = &state.outputs;
    [length(&state.reply), length(&state.end), out.bytes.len(), err.bytes.len()]
}

async fn read_all(
    connection: Arc<Connection>,
    mut read: OwnedReadHalf,
    mut decoder: Decoder,
    early: Vec<Frame>,
) {
    let mut result = early.into_iter().try_for_each(|f| connection.take(f));
    let mut buffer = vec![0; 64 << 10];
    while result.is_ok() {
        let over = connection.over.notified();
        tokio::pin!(over);
        over.as_mut().enable();
        if !connection.lives() {
            break;
        }
        let n = tokio::select! {
            n = read.read(&mut buffer) => n,
            () = over => break,
        };
        match n {
            Ok(n @ 1..) => decoder.push(&buffer[..n], |d| {
                if result.is_ok() {
                    result = match d {
                        Decoded::Frame(f) => connection.take(f),
                        Decoded::Malformed => Err("bytes that are no frame"),
                    };
                }
            }),
            _ => break,
        }
    }
    match result {
        Err(what) => connection.violation(what),
        Ok(()) => connection.end(false),
    }
}

async fn write_all(
    connection: Arc<Connection>,
    mut write: OwnedWriteHalf,
    mut urgent: mpsc::Receiver<Frame>,
    mut data: mpsc::Receiver<Frame>,
) {
    loop {
        let over = connection.over.notified();
        tokio::pin!(over);
        over.as_mut().enable();
        if !connection.lives() {
            return;
        }
        let frame = tokio::select! {
            biased;
            () = &mut over => return,
            f = urgent.recv() => f,
            f = data.recv() => f,
        };
        let Some(frame) = frame else { return };
        let bytes = frame.encode();
        tokio::select! {
            written = write.write_all(&bytes) => if written.is_err() {
                return connection.end(false);
            },
            () = over => return,
        }
    }
}

/// What came of the guest for a stream.
#[derive(Debug, Default)]
struct Inbox {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    reply: Option<Vec<u8>>,
    end: Option<Vec<u8>>,
    /// [`channel::OUT`] and [`channel::ERR`].
    outputs: [Output; 2],
    /// Bytes sent without credit back.
    spent: usize,
    input_refused: bool,
    /// The guest is done with it.
    closed: bool,
    /// We are.
    left: bool,
    /// The connection is over.
    lost: bool,
}

#[derive(Debug, Default)]
struct Output {
    bytes: Vec<u8>,
    /// Bytes for which no credit was given back.
    unread: usize,
    eof: bool,
    /// Somebody is writing what was taken.
    busy: bool,
}

impl State {
    fn out(&mut self, c: u8) -> Option<&mut Output> {
        self.outputs.get_mut(usize::from(c).checked_sub(1)?)
    }

    fn over(&self) -> bool {
        self.closed || self.left || self.lost
    }
}

/// One stream. Dropping the last handle closes it.
#[derive(Debug)]
pub(crate) struct Stream {
    id: u32,
    connection: Arc<Connection>,
    inbox: Arc<Inbox>,
    link: Arc<Link>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.leave();
        self.link.unused();
    }
}

impl Stream {
    /// Ends it now; what came until then can still be taken.
    pub(crate) fn leave(&self) {
        let known =
            lock(&self.connection.streams).as_mut().is_some_and(|s| s.open.remove(&self.id).is_some());
        if known {
            self.connection.urgent(Frame::new(kind::CLOSE, self.id, vec![]));
        }
        lock(&self.inbox.state).left = true;
        self.inbox.changed.notify_waiters();
    }

    /// Waits until `ready` gives something.
    async fn until<T>(&self, mut ready: impl FnMut(&mut State) -> Option<T>) -> T {
        loop {
            let changed = self.inbox.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(value) = ready(&mut lock(&self.inbox.state)) {
                return value;
            }
            changed.await;
        }
    }

    fn understood<T: Wire>(&self, payload: &[u8]) -> Result<T> {
        match Reply::<T>::decoded(payload) {
            Ok(Reply(Ok(value))) => {
                *lock(&self.link.trouble) = Trouble::default();
                Ok(value)
            }
            Ok(Reply(Err(r))) => Err(explain(&self.connection.name, &r)),
            Err(message::Malformed) => {
                self.connection.violation("an answer that is none");
                Err(self.link.nonsense("an answer that is none"))
            }
        }
    }

    /// Waits for the answer.
    ///
    /// # Errors
    /// The guest's refusal; unavailable when the connection is lost.
    pub(crate) async fn reply<T: Wire>(&self) -> Result<T> {
        let payload = self
            .until(|s| match s.reply.take() {
                Some(p) => Some(Some(p)),
                None => s.over().then_some(None),
            })
            .await;
        match payload {
            Some(p) => self.understood(&p),
            None => Err(self.link.silent()),
        }
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// As [`Stream::reply`].
    pub(crate) async fn end(&self) -> Result<i32> {
        let payload = self
            .until(|s| match s.end.clone() {
                Some(p) => Some(Some(p)),
                None => s.over().then_some(None),
            })
            .await;
        match payload {
            Some(p) => self.understood::<Ended>(&p).map(|e| e.code),
            None if lock(&self.inbox.state).left => Err(Error::cancelled("nobody waits for it any more")),
            None => Err(Error::unavailable(format!(
                "the connection to the agent of {} was lost; what it did for this request was ended",
                self.connection.name
            ))),
        }
    }

    /// Waits until all output that came was taken and written.
    pub(crate) async fn flushed(&self) {
        self.until(|s| s.outputs.iter().all(|o| o.bytes.is_empty() && !o.busy).then_some(())).await;
    }

    /// Sends an order.
    pub(crate) fn control(&self, control: Control) {
        if !lock(&self.inbox.state).over() {
            self.connection.urgent(Frame::new(kind::CONTROL, self.id, control.encoded()));
        }
    }

    /// How many bytes of input may be sent, waiting until it is some; `None` when no more are wanted.
    pub(crate) async fn credit(&self) -> Option<usize> {
        self.until(|s| {
            if s.over() || s.input_refused || s.end.is_some() {
                return Some(None);
            }
            let room = (WINDOW as usize).saturating_sub(s.spent);
            (room > 0).then_some(Some(room))
        })
        .await
    }

    /// Waits until no more input is wanted.
    pub(crate) async fn input_over(&self) {
        self.until(|s| (s.over() || s.input_refused || s.end.is_some()).then_some(())).await;
    }

    /// Sends input within the credit.
    pub(crate) async fn send(&self, bytes: &[u8]) {
        lock(&self.inbox.state).spent += bytes.len();
        // Closed: the stream is over, which everybody sees.
        let over = async {
            self.until(|s| s.over().then_some(())).await;
        };
        tokio::select! {
            _ = self.connection.data.send(Frame::data(self.id, channel::IN, bytes)) => {}
            () = over => {}
        }
    }

    /// Ends the input.
    pub(crate) async fn end_input(&self) {
        let over = async {
            self.until(|s| s.over().then_some(())).await;
        };
        tokio::select! {
            _ = self.connection.data.send(Frame::eof(self.id, channel::IN)) => {}
            () = over => {}
        }
    }

    /// The next output of a channel; `None` at its end. [`Stream::taken`] has to follow.
    pub(crate) async fn output(&self, c: u8) -> Option<Vec<u8>> {
        self.until(|s| {
            let over = s.over();
            let Some(out) = s.out(c) else { return Some(None) };
            if !out.bytes.is_empty() {
                out.busy = true;
                return Some(Some(std::mem::take(&mut out.bytes)));
            }
            (out.eof || over).then_some(None)
        })
        .await
    }

    /// So many bytes of output went where they belong.
    pub(crate) fn taken(&self, c: u8, n: usize) {
        let credit = {
            let mut state = lock(&self.inbox.state);
            let over = state.over();
            let Some(out) = state.out(c) else { return };
            out.busy = false;
            out.unread = out.unread.saturating_sub(n);
            !over && !out.eof
        };
        if credit {
            self.connection.urgent(Frame::credit(self.id, c, n as u32));
        }
        self.inbox.changed.notify_waiters();
    }

    /// The connection broke before the end of a channel.
    pub(crate) fn was_cut(&self, c: u8) -> bool {
        let mut state = lock(&self.inbox.state);
        let ended = state.end.is_some();
        state.out(c).is_some_and(|o| !o.eof) && !ended
    }

    /// Where the guest's refusal of a running transfer is, if there was one.
    pub(crate) fn name(&self) -> &str {
        &self.connection.name
    }
}

/// A refusal of the guest in our words.
fn explain(name: &str, r: &Refused) -> Error {
    let text = printable(&r.text, 200);
    let in_guest = |what: &str| format!("{what} in {name}: {text}");
    let (kind, message) = match r.code {
        refusal::NOT_FOUND => (ErrorKind::NotFound, in_guest("it does not exist")),
        refusal::EXISTS => (ErrorKind::Conflict, in_guest("it exists already")),
        refusal::INVALID => (ErrorKind::Invalid, in_guest("it cannot be used")),
        refusal::NOT_EMPTY => (ErrorKind::Conflict, in_guest("the directory is not empty")),
        refusal::IS_DIRECTORY => (ErrorKind::Invalid, in_guest("it is a directory")),
        refusal::NO_SPACE => (ErrorKind::Quota, in_guest("there is no room left")),
        refusal::UNSUPPORTED => (ErrorKind::Unsupported, in_guest("it is not possible")),
        refusal::BUSY => (ErrorKind::Unavailable, in_guest("not now")),
        refusal::DENIED => (ErrorKind::Forbidden, in_guest("it is not permitted")),
        _ => (ErrorKind::Internal, in_guest("it failed")),
    };
    let error = Error::new(kind, message);
    let field: String =
        r.field.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_')).take(40).collect();
    if field.is_empty() { error } else { error.at(field) }
}
