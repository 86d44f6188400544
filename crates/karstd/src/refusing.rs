//! What clients of the API are told while control keeps ending: 503 with the reason, in place of no answer at all. One
//! thread, nothing waits: the launcher polls these connections beside its signals.
//!
//! It takes connections only while control does not run, and answers none of them otherwise than with a refusal.

use rustix::{
    event::PollFlags,
    net::{SocketFlags, accept_with},
};
use std::{
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

/// Connections at a time; the others wait in the socket's queue.
const MOST: usize = 64;
/// How long a client may take to ask.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of a request that are read before it is answered.
const REQUEST: usize = 64 << 10;

/// Clients that are about to be refused.
#[derive(Debug, Default)]
pub struct Refusing {
    clients: Vec<Client>,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    until: Instant,
    /// The end of what it asked, and how much that was.
    tail: Vec<u8>,
    read: usize,
}

impl Refusing {
    /// What to wait for: clients that ask, and with `listener` new ones.
    pub fn interests<'a>(&'a self, listener: Option<BorrowedFd<'a>>) -> Vec<rustix::event::PollFd<'a>> {
        let room = listener.filter(|_| self.clients.len() < MOST);
        let streams = self.clients.iter().map(|c| c.stream.as_fd());
        room.into_iter()
            .chain(streams)
            .map(|fd| rustix::event::PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect()
    }

    /// When the next client has had its time.
    pub fn next(&self) -> Option<Instant> {
        self.clients.iter().map(|c| c.until).min()
    }

    /// Takes those who have come (with `listener`), and answers those who have asked.
    pub fn serve(&mut self, listener: Option<BorrowedFd<'_>>, reason: &str) {
        let now = Instant::now();
        if let Some(listener) = listener {
            while self.clients.len() < MOST {
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let Ok(socket) = accept_with(listener, flags) else { break };
                let stream = UnixStream::from(socket);
                self.clients.push(Client { stream, until: now + PATIENCE, tail: vec![], read: 0 });
            }
        }
        self.clients.retain_mut(|client| now < client.until && !client.settle(reason));
    }
}

impl Client {
    /// Reads what has come and answers when that is a request; true when there is nothing more to do.
    fn settle(&mut self, reason: &str) -> bool {
        let mut buffer = [0u8; 4096];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    self.read += n;
                    let kept = self.tail.len().saturating_sub(3);
                    self.tail.drain(..kept);
                    self.tail.extend_from_slice(&buffer[..n]);
                    let whole = self.tail.windows(4).any(|w| w == b"\r\n\r\n");
                    if whole || self.read >= REQUEST {
                        break;
                    }
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return false,
                Err(_) => return true,
            }
        }
        if self.read > 0 {
            // It fits into the socket's buffer; who does not read it has left.
            let _ = self.stream.write_all(&answer(reason));
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        true
    }
}

/// Incus' form of an error.
fn answer(reason: &str) -> Vec<u8> {
    let body = serde_json::json!({
        "type": "error", "status": "", "status_code": 0, "operation": "", "metadata": null,
        "error_code": 503, "error": reason,
    })
    .to_string();
    format!(
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Retry-After: 5\r\nConnection: close\r\n\r\n{body}\n",
        body.len() + 1
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn who_asks_is_told_and_who_does_not_is_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut refusing = Refusing::default();
        let mut asks = UnixStream::connect(&path).unwrap();
        let silent = UnixStream::connect(&path).unwrap();
        asks.write_all(b"GET /1.0 HTTP/1.1\r\nHost: x\r").unwrap();
        refusing.serve(Some(listener.as_fd()), "why");
        assert_eq!(refusing.clients.len(), 2, "neither has asked whole");
        assert!(refusing.next().is_some());
        asks.write_all(b"\n\r\n").unwrap();
        refusing.serve(None, "because of a \"quote\"");
        let mut text = String::new();
        asks.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("HTTP/1.1 503 "), "{text}");
        let body: serde_json::Value = serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap();
        assert_eq!((&body["error_code"], &body["error"]), (&503.into(), &"because of a \"quote\"".into()));
        drop(silent);
        refusing.serve(None, "why");
        assert_eq!(refusing.clients.len(), 0, "who has left is forgotten");
        // Never more than it can hold.
        let crowd: Vec<_> = (0..MOST + 6).map(|_| UnixStream::connect(&path).unwrap()).collect();
        refusing.serve(Some(listener.as_fd()), "why");
        assert_eq!(refusing.clients.len(), MOST);
        assert_eq!(refusing.interests(Some(listener.as_fd())).len(), MOST, "and takes no more");
        drop(crowd);
    }
}
