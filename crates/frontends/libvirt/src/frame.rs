//! Frames of `virNetMessage`: a length that counts itself, a header of 24 bytes, a payload.

use crate::error::VirError;
use bytes::Bytes;
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Largest frame, the length field not counted.
pub const FRAME_MAX: usize = 32 << 20;
/// Length field and header.
const HEAD: usize = 28;
/// So much is read before more is made room for: a client that only claims a large frame costs nothing.
const CHUNK: usize = 64 << 10;

/// The remote program.
pub const REMOTE: u32 = 0x2000_8086;
/// The program of what goes past libvirt's own words to QEMU and its guest agent.
pub const QEMU: u32 = 0x2000_8087;
/// The program of what goes past them to containers: descriptors of their namespaces, and nothing else.
pub const LXC: u32 = 0x0006_8000;
/// Keepalive: either side asks, the other answers.
pub const KEEPALIVE: u32 = 0x6b65_6570;

/// Kinds of frames (`virNetMessageType`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A client's call.
    Call,
    /// The answer.
    Reply,
    /// Something that nobody asked for: events, keepalive.
    Message,
    /// Data of a stream.
    Stream,
    /// A call with descriptors.
    CallWithFds,
    /// An answer with descriptors.
    ReplyWithFds,
    /// A hole in a stream.
    StreamHole,
}

/// How a frame stands (`virNetMessageStatus`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Well; of a stream: its end.
    Ok,
    /// An error follows; of a client's stream: it gave up.
    Error,
    /// More of the stream follows.
    Continue,
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Program.
    pub program: u32,
    /// Its version, always 1.
    pub version: u32,
    /// Procedure of the program.
    pub procedure: i32,
    /// Kind.
    pub kind: Kind,
    /// Number of the call; a stream has that of the call which opened it.
    pub serial: u32,
    /// Status.
    pub status: Status,
}

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Header.
    pub header: Header,
    /// Payload.
    pub payload: Bytes,
}

impl Header {
    /// An answer to this call.
    pub fn reply(self, status: Status) -> Self {
        Self { kind: Kind::Reply, status, ..self }
    }

    /// A frame of the stream that this call opened.
    pub fn stream(self, status: Status) -> Self {
        Self { kind: Kind::Stream, status, ..self }
    }

    /// A message of the remote program.
    pub fn event(procedure: i32) -> Self {
        Self { program: REMOTE, version: 1, procedure, kind: Kind::Message, serial: 0, status: Status::Ok }
    }
}

impl Frame {
    /// A frame.
    pub fn new(header: Header, payload: impl Into<Bytes>) -> Self {
        Self { header, payload: payload.into() }
    }

    /// An answer that `count` descriptors follow: their number stands before the payload.
    pub fn with_fds(call: Header, count: usize, payload: &[u8]) -> Self {
        let header = Header { kind: Kind::ReplyWithFds, ..call.reply(Status::Ok) };
        Self::new(header, [&(count as u32).to_be_bytes()[..], payload].concat())
    }

    /// An answer that is an error.
    pub fn error(call: Header, error: &VirError) -> Self {
        Self::new(call.reply(Status::Error), error.encode())
    }

    /// As it goes over the wire.
    pub fn encode(&self) -> Vec<u8> {
        let h = &self.header;
        let mut bytes = Vec::with_capacity(HEAD + self.payload.len());
        let kind = match h.kind {
            Kind::Call => 0,
            Kind::Reply => 1,
            Kind::Message => 2,
            Kind::Stream => 3,
            Kind::CallWithFds => 4,
            Kind::ReplyWithFds => 5,
            Kind::StreamHole => 6,
        };
        let status = match h.status {
            Status::Ok => 0,
            Status::Error => 1,
            Status::Continue => 2,
        };
        let length = (HEAD + self.payload.len()) as u32;
        for word in [length, h.program, h.version, h.procedure as u32, kind, h.serial, status] {
            bytes.extend(word.to_be_bytes());
        }
        bytes.extend(&self.payload);
        bytes
    }

    /// Reads the next frame; `None` at the end of the connection.
    ///
    /// # Errors
    /// Those of the transport; invalid data for what is no frame, after which the connection is of no use.
    pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Self>> {
        Self::read_within(from, FRAME_MAX).await
    }

    /// As [`Frame::read`], of frames of at most `most` bytes.
    ///
    /// # Errors
    /// Those of [`Frame::read`].
    pub async fn read_within(from: &mut (impl AsyncRead + Unpin), most: usize) -> io::Result<Option<Self>> {
        let Some((header, length)) = Self::read_head(from, most).await? else { return Ok(None) };
        let payload = Self::read_payload(from, length).await?;
        Ok(Some(Self { header, payload }))
    }

    /// Reads the header of the next frame, which has at most `most` bytes, and how long its payload is.
    ///
    /// # Errors
    /// Those of [`Frame::read`].
    pub async fn read_head(
        from: &mut (impl AsyncRead + Unpin),
        most: usize,
    ) -> io::Result<Option<(Header, usize)>> {
        let mut head = [0u8; HEAD];
        match from.read_exact(&mut head[..1]).await {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            other => other?,
        };
        from.read_exact(&mut head[1..]).await?;
        let word =
            |n: usize| u32::from_be_bytes([head[4 * n], head[4 * n + 1], head[4 * n + 2], head[4 * n + 3]]);
        let bad = |what: &str, n: u32| io::Error::new(io::ErrorKind::InvalidData, format!("{what} {n}"));
        let length = word(0) as usize;
        if !(HEAD..=most + 4).contains(&length) {
            return Err(bad("length", word(0)));
        }
        let kind = match word(4) {
            0 => Kind::Call,
            1 => Kind::Reply,
            2 => Kind::Message,
            3 => Kind::Stream,
            4 => Kind::CallWithFds,
            5 => Kind::ReplyWithFds,
            6 => Kind::StreamHole,
            n => return Err(bad("type", n)),
        };
        let status = match word(6) {
            0 => Status::Ok,
            1 => Status::Error,
            2 => Status::Continue,
            n => return Err(bad("status", n)),
        };
        let (program, version, procedure, serial) = (word(1), word(2), word(3) as i32, word(5));
        let header = Header { program, version, procedure, kind, serial, status };
        Ok(Some((header, length - HEAD)))
    }

    /// Reads the payload that follows a header.
    ///
    /// # Errors
    /// Those of the transport.
    pub async fn read_payload(from: &mut (impl AsyncRead + Unpin), length: usize) -> io::Result<Bytes> {
        let mut left = length;
        let mut payload = Vec::with_capacity(left.min(CHUNK));
        while left > 0 {
            let n = left.min(CHUNK);
            let start = payload.len();
            payload.resize(start + n, 0);
            from.read_exact(&mut payload[start..]).await?;
            left -= n;
        }
        Ok(payload.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(mut bytes: &[u8]) -> io::Result<Option<Frame>> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(Frame::read(&mut bytes))
    }

    fn call() -> Header {
        Header { program: REMOTE, version: 1, procedure: 66, kind: Kind::Call, serial: 7, status: Status::Ok }
    }

    #[test]
    fn a_frame_is_what_clients_send() {
        let bytes = Frame::new(call(), vec![]).encode();
        assert_eq!(bytes[..8], [0, 0, 0, 28, 0x20, 0x00, 0x80, 0x86]);
        assert_eq!(read(&bytes).unwrap().unwrap(), Frame::new(call(), vec![]));
        assert!(read(&[]).unwrap().is_none());
    }

    #[test]
    fn lengths_that_cannot_be_are_refused() {
        for length in [0u32, 27, (FRAME_MAX + 5) as u32, u32::MAX] {
            let mut bytes = Frame::new(call(), vec![]).encode();
            bytes[..4].copy_from_slice(&length.to_be_bytes());
            assert_eq!(read(&bytes).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        let bytes = Frame::new(call(), vec![1; 100]).encode();
        assert_eq!(read(&bytes[..60]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_frame_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(Some(frame)) = read(&bytes) {
                prop_assert!(bytes.starts_with(&frame.encode()));
            }
        }
    }
}
