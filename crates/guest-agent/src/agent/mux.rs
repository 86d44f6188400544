//! Streams over the port.
//!
//! A life is the time between two handshakes. Everything belongs to one life, and nothing of an earlier one is sent in a
//! later one: its streams are closed, and a frame that was half out is followed by a zero.

use super::port::{Port, Waiter};
use crate::{
    message::{Control, Hello, Refused, Reply, Request, Welcome, Wire},
    wire::{Decoded, Decoder, Frame, MAX_STREAMS, VERSION, WINDOW, channel, kind},
};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd, poll},
    fs::Timespec,
};
use std::{
    collections::{HashMap, VecDeque},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

/// Most orders that wait for a program.
const MAX_CONTROLS: usize = 64;

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

#[derive(Debug, Default)]
pub(super) struct Mux {
    out: Mutex<Out>,
    streams: Mutex<HashMap<u32, Arc<Stream>>>,
    life: AtomicU64,
}

#[derive(Debug, Default)]
struct Out {
    port: Option<Arc<OwnedFd>>,
    torn: bool,
}

impl Mux {
    /// Serves a port to its end; `start` takes each new stream.
    pub(super) fn serve(self: &Arc<Self>, fd: OwnedFd, port: &Port, start: fn(Arc<Stream>, Request)) {
        let fd = Arc::new(fd);
        let waiter = match Waiter::new(&fd) {
            Ok(w) => w,
            Err(e) => {
                eprintln!("the port cannot be waited for: {e}");
                return std::thread::sleep(Duration::from_secs(1));
            }
        };
        *lock(&self.out) = Out { port: Some(fd.clone()), torn: true };
        let mut life = self.begin();
        // Where the host is there already it may have streams of an agent before this one.
        let mut state = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::OUT)];
        let here = poll(&mut state, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok();
        if here && !state[0].revents().contains(PollFlags::HUP) {
            self.send(life, &Frame::new(kind::READY, 0, vec![]));
        }
        let mut decoder = Decoder::default();
        let mut buffer = vec![0; 64 << 10];
        let mut welcomed = false;
        loop {
            match rustix::io::read(&fd, &mut buffer) {
                Ok(0) => {
                    // The host closed its side.
                    if welcomed || port.ends() {
                        life = self.begin();
                        welcomed = false;
                    }
                    if port.ends() {
                        break;
                    }
                    decoder = Decoder::default();
                    waiter.wait();
                }
                Ok(n) => decoder.push(&buffer[..n], |decoded| match decoded {
                    Decoded::Frame(f) if f.kind == kind::HELLO => {
                        if let Ok((nonce, (low, high))) = Hello::decoded(&f.payload) {
                            life = self.begin();
                            let version = if (low..=high).contains(&VERSION) { VERSION } else { 0 };
                            welcomed = version != 0;
                            let program = env!("CARGO_PKG_VERSION").to_owned();
                            let welcome = Welcome { nonce, version, program };
                            self.send(life, &Frame::new(kind::WELCOME, 0, welcome.encoded()));
                        }
                    }
                    Decoded::Frame(f) if welcomed => self.frame(life, f, start),
                    // Of a host that was there before.
                    Decoded::Frame(_) | Decoded::Malformed => {}
                }),
                Err(rustix::io::Errno::AGAIN) => waiter.wait(),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => {
                    if !port.ends() {
                        eprintln!("the port failed: {e}");
                        std::thread::sleep(Duration::from_millis(500));
                    }
                    break;
                }
            }
        }
        self.begin();
        lock(&self.out).port = None;
    }

    /// Ends all streams and begins a new life.
    fn begin(&self) -> u64 {
        let life = self.life.fetch_add(1, Ordering::SeqCst) + 1;
        let old: Vec<_> = lock(&self.streams).drain().map(|(_, s)| s).collect();
        old.iter().for_each(|s| s.close());
        life
    }

    fn frame(self: &Arc<Self>, life: u64, f: Frame, start: fn(Arc<Stream>, Request)) {
        if f.kind == kind::OPEN {
            let Some(stream) = self.open(life, f.stream) else { return };
            return match Request::decoded(&f.payload) {
                Ok(request) => start(stream, request),
                Err(_) => {
                    stream.fail(super::refused(
                        crate::message::refusal::UNSUPPORTED,
                        "",
                        "the guest's agent is older than the host and cannot do this; restart the guest",
                    ));
                    stream.finished();
                }
            };
        }
        let Some(stream) = lock(&self.streams).get(&f.stream).cloned() else { return };
        let mut inbox = lock(&stream.inbox);
        match f.kind {
            kind::DATA => {
                let Some((channel::IN, bytes)) = f.channel() else { return };
                inbox.unread = inbox.unread.saturating_add(bytes.len() as u32);
                if inbox.unread > WINDOW {
                    inbox.closed = true; // it sends what it has no credit for
                } else if !bytes.is_empty() {
                    inbox.data.push_back(bytes.to_vec());
                }
            }
            kind::EOF => inbox.eof = true,
            kind::CREDIT => {
                let Some((c, n)) = f.as_credit() else { return };
                if let Some(credit) = inbox.credit.get_mut(usize::from(c)) {
                    *credit = credit.saturating_add(n);
                }
            }
            kind::CONTROL => match Control::decoded(&f.payload) {
                Ok(control) if inbox.controls.len() < MAX_CONTROLS => inbox.controls.push_back(control),
                _ => return,
            },
            kind::CLOSE => inbox.closed = true,
            _ => return,
        }
        drop(inbox);
        stream.wake();
    }

    fn open(self: &Arc<Self>, life: u64, id: u32) -> Option<Arc<Stream>> {
        let wake = match eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK) {
            Ok(w) => w,
            Err(_) => {
                self.send(life, &Frame::new(kind::CLOSE, id, vec![]));
                return None;
            }
        };
        let stream = Arc::new(Stream {
            id,
            life,
            mux: self.clone(),
            wake,
            replied: AtomicBool::new(false),
            inbox: Mutex::new(Inbox { credit: [WINDOW; 3], ..Inbox::default() }),
        });
        let mut streams = lock(&self.streams);
        if streams.contains_key(&id) {
            return None; // the host never numbers two alike
        }
        if streams.len() >= MAX_STREAMS {
            drop(streams);
            stream.fail(super::refused(crate::message::refusal::BUSY, "", "too much is going on at once"));
            stream.finished();
            return None;
        }
        streams.insert(id, stream.clone());
        Some(stream)
    }

    /// Sends a frame of this life; false when the life is over.
    fn send(&self, life: u64, frame: &Frame) -> bool {
        let mut bytes = frame.encode();
        let mut out = lock(&self.out);
        let Some(port) = out.port.clone() else { return false };
        if out.torn {
            bytes.insert(0, 0);
            out.torn = false;
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            if self.life.load(Ordering::SeqCst) != life {
                out.torn = rest.len() != bytes.len();
                return false;
            }
            match rustix::io::write(&port, rest) {
                Ok(n) => rest = &rest[n..],
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    let mut fds = [PollFd::from_borrowed_fd(port.as_fd(), PollFlags::OUT)];
                    let limit = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
                    let _ = poll(&mut fds, Some(&limit));
                    if fds[0].revents().contains(PollFlags::HUP) {
                        // Nobody is there; the reader will see it too.
                        std::thread::sleep(Duration::from_millis(20));
                    }
                }
                Err(_) => {
                    out.torn = true;
                    return false;
                }
            }
        }
        true
    }
}

/// What came for a stream.
#[derive(Debug, Default)]
struct Inbox {
    data: VecDeque<Vec<u8>>,
    /// Bytes for which no credit was given back.
    unread: u32,
    eof: bool,
    closed: bool,
    controls: VecDeque<Control>,
    /// By channel.
    credit: [u32; 3],
}

/// One stream, as the thread that answers it sees it.
#[derive(Debug)]
pub(super) struct Stream {
    id: u32,
    life: u64,
    mux: Arc<Mux>,
    wake: OwnedFd,
    replied: AtomicBool,
    inbox: Mutex<Inbox>,
}

impl Stream {
    /// The answer.
    pub(super) fn reply<T: Wire>(&self, reply: &Reply<T>) {
        if !self.replied.swap(true, Ordering::SeqCst) {
            self.send(kind::REPLY, reply.encoded());
        }
    }

    /// What was asked for has ended.
    pub(super) fn end(&self, code: i32) {
        self.send(kind::END, Reply(Ok(crate::message::Ended { code })).encoded());
    }

    /// It cannot be, or cannot go on.
    pub(super) fn fail(&self, refused: Refused) {
        let reply = Reply::<crate::message::Nothing>(Err(refused));
        match self.replied.swap(true, Ordering::SeqCst) {
            false => self.send(kind::REPLY, reply.encoded()),
            true => self.send(kind::END, reply.encoded()),
        };
    }

    /// Nothing more comes.
    pub(super) fn finished(&self) {
        let mut streams = lock(&self.mux.streams);
        if streams.get(&self.id).is_some_and(|s| s.life == self.life) {
            streams.remove(&self.id);
        }
        drop(streams);
        self.send(kind::CLOSE, vec![]);
    }

    fn send(&self, kind: u8, payload: Vec<u8>) -> bool {
        // An answer that does not fit is a fault of ours; the stream then just closes.
        payload.len() <= crate::wire::MAX_PAYLOAD
            && self.mux.send(self.life, &Frame::new(kind, self.id, payload))
    }

    fn close(&self) {
        lock(&self.inbox).closed = true;
        self.wake();
    }

    fn wake(&self) {
        // Full means that it is awake already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Readable when something changed; see [`Stream::awake`].
    pub(super) fn waker(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// To be called before looking at what changed.
    pub(super) fn awake(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
    }

    /// Waits until something changes.
    pub(super) fn wait(&self) {
        let _ = poll(&mut [PollFd::new(&self.wake, PollFlags::IN)], None);
        self.awake();
    }

    /// The host ended it.
    pub(super) fn is_closed(&self) -> bool {
        lock(&self.inbox).closed
    }

    /// The next order.
    pub(super) fn control(&self) -> Option<Control> {
        lock(&self.inbox).controls.pop_front()
    }

    /// Input: the next bytes, `Err(true)` at its end, `Err(false)` when there is none for the moment.
    pub(super) fn input(&self) -> Result<Vec<u8>, bool> {
        let mut inbox = lock(&self.inbox);
        inbox.data.pop_front().ok_or(inbox.eof)
    }

    /// So many bytes of input are used up.
    pub(super) fn used(&self, n: usize) {
        lock(&self.inbox).unread -= n as u32;
        let mut payload = vec![channel::IN];
        payload.extend((n as u32).to_le_bytes());
        self.send(kind::CREDIT, payload);
    }

    /// No more input is wanted.
    pub(super) fn refuse_input(&self) {
        self.send(kind::EOF, vec![channel::IN]);
    }

    /// How much may be sent.
    pub(super) fn credit(&self, channel: u8) -> usize {
        lock(&self.inbox).credit[usize::from(channel)] as usize
    }

    /// Sends bytes within the credit.
    pub(super) fn data(&self, channel: u8, bytes: &[u8]) -> bool {
        lock(&self.inbox).credit[usize::from(channel)] -= bytes.len() as u32;
        self.mux.send(self.life, &Frame::data(self.id, channel, bytes))
    }

    /// Ends a channel.
    pub(super) fn eof(&self, channel: u8) {
        self.send(kind::EOF, vec![channel]);
    }

    /// Sends bytes, waiting for credit; false when the host ended the stream.
    pub(super) fn put(&self, channel: u8, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            if self.is_closed() {
                return false;
            }
            let n = self.credit(channel).min(crate::wire::MAX_DATA).min(bytes.len());
            if n == 0 {
                self.wait();
                continue;
            }
            if !self.data(channel, &bytes[..n]) {
                return false;
            }
            bytes = &bytes[n..];
        }
        true
    }
}
