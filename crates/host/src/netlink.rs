//! Netlink messages: just enough of the wire format for links, addresses, routes and nftables' generation counter.
//!
//! Written here rather than taken from a crate because a request is one send and one receive on a socket that the kernel
//! answers at once: no background task, no runtime, some 20 microseconds. Format: netlink(7), `linux/netlink.h`.
//! A socket belongs to the network namespace in which it was opened.

use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, sockopt};
use std::{io, os::fd::AsFd, os::fd::OwnedFd, time::Duration};

/// `NLM_F_REQUEST`.
const REQUEST: u16 = 1;
/// `NLM_F_ACK`.
const ACK: u16 = 4;
/// `NLM_F_DUMP_INTR`: the table changed while it was read.
const DUMP_INTERRUPTED: u16 = 0x10;
/// `NLM_F_DUMP`.
pub const DUMP: u16 = 0x300;
/// `NLM_F_EXCL`.
pub const EXCLUSIVE: u16 = 0x200;
/// `NLM_F_CREATE`.
pub const CREATE: u16 = 0x400;
/// `NLM_F_REPLACE`.
pub const REPLACE: u16 = 0x100;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;
/// Kernels build dump parts of at most 32 KiB; a single link's answer with all its statistics stays under this too.
const BUFFER: usize = 64 * 1024;

/// A request in the making: header, fixed part, attributes.
#[derive(Debug, Clone)]
pub struct Message(Vec<u8>);

impl Message {
    /// A message of `kind` with extra `flags` and the fixed part `body`.
    pub fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | REQUEST).to_ne_bytes());
        bytes.extend_from_slice(body);
        let mut message = Self(bytes);
        message.pad();
        message
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    /// Adds an attribute.
    pub fn attr(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(value.len() + 4).expect("attribute values are short");
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.pad();
        self
    }

    /// Adds bytes as they are: the fixed part of what is nested.
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self.pad();
        self
    }

    /// Adds a text attribute, ended by NUL.
    pub fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    /// Adds attributes inside an attribute.
    pub fn nested(mut self, kind: u16, fill: impl FnOnce(Message) -> Message) -> Self {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 2]);
        self.0.extend_from_slice(&kind.to_ne_bytes());
        let mut filled = fill(self);
        let length = u16::try_from(filled.0.len() - start).expect("attribute values are short");
        filled.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        filled
    }

    /// What was added after header and fixed part; for a message without a fixed part.
    pub fn attributes(&self) -> &[u8] {
        &self.0[HEADER..]
    }

    fn seal(mut self, sequence: u32, flags: u16) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).expect("messages are short");
        let all = u16::from_ne_bytes([self.0[6], self.0[7]]) | flags;
        self.0[0..4].copy_from_slice(&length.to_ne_bytes());
        self.0[6..8].copy_from_slice(&all.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

/// One answer: its type and what follows the header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Message type.
    pub kind: u16,
    /// Fixed part and attributes.
    pub body: Vec<u8>,
}

/// A netlink socket.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    /// Opens `NETLINK_ROUTE`.
    ///
    /// # Errors
    /// What `socket(2)` says.
    pub fn route() -> io::Result<Self> {
        Self::open(None, 0) // protocol 0
    }

    /// Opens `NETLINK_NETFILTER`, subscribed to the multicast `groups` (a bit mask).
    ///
    /// # Errors
    /// What `socket(2)` says.
    pub fn netfilter(groups: u32) -> io::Result<Self> {
        Self::open(Some(netlink::NETFILTER), groups)
    }

    fn open(protocol: Option<Protocol>, groups: u32) -> io::Result<Self> {
        let fd = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            protocol,
        )?;
        // The kernel answers within the call; the limit only keeps a defect from hanging a thread for ever.
        sockopt::set_socket_timeout(&fd, sockopt::Timeout::Recv, Some(Duration::from_secs(10)))?;
        rustix::net::bind(&fd, &netlink::SocketAddrNetlink::new(0, groups))?;
        Ok(Self { fd, sequence: 0 })
    }

    /// Sends `message` and waits until the kernel has done it.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn execute(&mut self, message: Message) -> io::Result<()> {
        self.exchange(message, ACK).map(drop)
    }

    /// Sends `message` and answers what the kernel says: one answer, or all parts of a dump.
    ///
    /// # Errors
    /// The kernel's errno; `Interrupted` when a dump's table changed while it was read, five times in a row.
    pub fn query(&mut self, message: Message) -> io::Result<Vec<Answer>> {
        for _ in 0..5 {
            match self.exchange(message.clone(), 0) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
        Err(io::ErrorKind::Interrupted.into())
    }

    fn exchange(&mut self, message: Message, flags: u16) -> io::Result<Vec<Answer>> {
        self.sequence += 1;
        let dump = u16::from_ne_bytes([message.0[6], message.0[7]]) & DUMP == DUMP;
        rustix::net::send(&self.fd, &message.seal(self.sequence, flags), SendFlags::empty())?;
        let mut answers = Vec::new();
        let mut interrupted = false;
        let mut buffer = vec![0u8; BUFFER];
        loop {
            let (_, received) = rustix::io::retry_on_intr(|| {
                rustix::net::recv(&self.fd, buffer.as_mut_slice(), RecvFlags::TRUNC)
            })?;
            if received > buffer.len() {
                return Err(io::Error::other("a netlink answer was longer than the buffer"));
            }
            let mut rest = &buffer[..received];
            while let Some((header, body, next)) = split(rest) {
                rest = next;
                if header.sequence != self.sequence {
                    continue; // the rest of an exchange that was given up
                }
                interrupted |= header.flags & DUMP_INTERRUPTED != 0;
                match header.kind {
                    NLMSG_ERROR | NLMSG_DONE => {
                        let code = body.first_chunk::<4>().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
                        return match code {
                            0 if interrupted => Err(io::ErrorKind::Interrupted.into()),
                            0 => Ok(answers),
                            code => Err(io::Error::from_raw_os_error(-code)),
                        };
                    }
                    kind => answers.push(Answer { kind, body: body.to_vec() }),
                }
            }
            if !dump && flags & ACK == 0 && !answers.is_empty() {
                return Ok(answers);
            }
        }
    }

    /// Reads what the kernel has sent by itself, without waiting: each message's type and what follows its header. `false` when
    /// so much came that the kernel dropped some.
    ///
    /// # Errors
    /// What `recv(2)` says.
    pub fn receive(&self, mut each: impl FnMut(u16, &[u8])) -> io::Result<bool> {
        let mut buffer = vec![0u8; BUFFER];
        let mut whole = true;
        loop {
            match rustix::net::recv(&self.fd, buffer.as_mut_slice(), RecvFlags::DONTWAIT) {
                Ok((_, received)) => {
                    let mut rest = &buffer[..received.min(buffer.len())];
                    while let Some((header, body, next)) = split(rest) {
                        rest = next;
                        each(header.kind, body);
                    }
                }
                Err(rustix::io::Errno::NOBUFS) => whole = false,
                Err(rustix::io::Errno::AGAIN) => return Ok(whole),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Reads and drops what multicast groups have sent, without waiting. `true` when there was something, also when so
    /// much came that the kernel dropped messages.
    ///
    /// # Errors
    /// What `recv(2)` says.
    pub fn drain(&self) -> io::Result<bool> {
        let mut buffer = vec![0u8; BUFFER];
        let mut any = false;
        loop {
            match rustix::net::recv(&self.fd, buffer.as_mut_slice(), RecvFlags::DONTWAIT) {
                Ok(_) | Err(rustix::io::Errno::NOBUFS) => any = true,
                Err(rustix::io::Errno::AGAIN) => return Ok(any),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl std::os::fd::AsRawFd for Socket {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&self.fd)
    }
}

struct Header {
    kind: u16,
    flags: u16,
    sequence: u32,
}

fn split(bytes: &[u8]) -> Option<(Header, &[u8], &[u8])> {
    let length = u32_at(bytes, 0)? as usize;
    if length < HEADER || length > bytes.len() {
        return None;
    }
    let header = Header {
        kind: u16::from_ne_bytes([bytes[4], bytes[5]]),
        flags: u16::from_ne_bytes([bytes[6], bytes[7]]),
        sequence: u32_at(bytes, 8)?,
    };
    let next = length.next_multiple_of(4).min(bytes.len());
    Some((header, &bytes[HEADER..length], &bytes[next..]))
}

/// The attributes in `bytes`: type without its flag bits, and value. Stops at the first malformed one.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk::<2>()?));
        let kind = u16::from_ne_bytes([*bytes.get(2)?, *bytes.get(3)?]) & 0x3fff;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, value))
    })
}

/// A native-endian u32 at `offset`.
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(offset..)?.first_chunk::<4>()?))
}

/// Text up to its NUL.
pub fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_written_and_read_back() {
        let message = Message::new(16, CREATE, &[7; 16])
            .text(3, "br0")
            .nested(18, |m| m.text(1, "bridge"))
            .attr(4, &1500u32.to_ne_bytes());
        let bytes = message.seal(9, ACK);
        let (header, body, rest) = split(&bytes).unwrap();
        assert_eq!((header.kind, header.flags, header.sequence), (16, CREATE | REQUEST | ACK, 9));
        assert!(rest.is_empty());
        let read: Vec<_> = attributes(&body[16..]).collect();
        assert_eq!(read.len(), 3);
        assert_eq!((read[0].0, text(read[0].1)), (3, "br0".into()));
        let inner: Vec<_> = attributes(read[1].1).collect();
        assert_eq!((inner[0].0, text(inner[0].1)), (1, "bridge".into()));
        assert_eq!(u32_at(read[2].1, 0), Some(1500));
    }

    #[test]
    fn malformed_answers_end_the_reading() {
        for bytes in [&[][..], &[3, 0, 1], &[200, 0, 1, 0, 9], &[0, 0, 0, 0], &[2, 0, 0, 0]] {
            assert_eq!(attributes(bytes).count(), 0, "{bytes:?}");
        }
        assert!(split(&[255; 20]).is_none());
        assert!(split(&[0; 20]).is_none());
    }
}
