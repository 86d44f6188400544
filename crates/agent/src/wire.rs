//! Frames of the agent protocol on a unix stream socket.
//!
//! A frame is a header of eight bytes and a body. Header: length of the body (u32, little endian), number of
//! descriptors that come with the frame (u8), three bytes that are zero. Body: one message as JSON, at most
//! [`MAX_FRAME`] bytes. Descriptors travel as `SCM_RIGHTS` with the first byte of the header.
//!
//! The receiver takes the header and the body in separate reads, so a descriptor that arrives with anything but a
//! header, or in another number than the header says, is seen: the kernel closes it and the frame counts as malformed.
//! A side that accepts no descriptors (the host) offers the kernel no room for them at all.
//!
//! Whatever is malformed ends the connection that it came on, and nothing else.

use crate::calls::{AgentEvent, CallContext, Executor};
use karst_model::Error;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::value::RawValue;
use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};
use tokio::{io::Interest, net::UnixStream};

/// Largest body in bytes.
pub const MAX_FRAME: usize = 4 << 20;
/// Most descriptors with one frame.
pub const MAX_FDS: usize = 4;
/// Length of a header in bytes.
pub const HEADER: usize = 8;

/// What control sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ToHost {
    /// Must be the first frame.
    Hello {
        /// Lowest and highest version that control speaks.
        versions: (u32, u32),
        /// The executor, when it is known already: one of a lower epoch than the host has seen is refused at once.
        #[serde(default)]
        executor: Option<Executor>,
    },
    /// A call.
    Request {
        /// Chosen by control, not used before on this connection.
        id: u64,
        /// Deadline and fence.
        context: CallContext,
        /// The call; decoded apart, so that one that this host does not know is answered and not fatal.
        call: serde_json::Value,
    },
    /// Control wants no answer to this call any more: the host drops it where it waits.
    Cancel {
        /// Which.
        id: u64,
    },
    /// Control wants events on this connection.
    Subscribe,
}

/// What the host sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", try_from = "Received")]
pub enum FromHost {
    /// Answer to the hello.
    Welcome {
        /// The version to be used: the highest in common.
        version: u32,
    },
    /// Answer to a hello that does not fit; the connection ends.
    Refused {
        /// Why.
        error: Error,
    },
    /// Answer to a call; its descriptors come with the frame.
    Response {
        /// Which call.
        id: u64,
        /// Answer or error.
        outcome: Outcome,
    },
    /// Something happened.
    Event {
        /// What.
        event: AgentEvent,
    },
}

/// A message of the host as it comes. An answer stays text until its caller reads it, once and as what it is: by the tag among
/// the fields alone all of it would be taken apart before.
#[derive(Deserialize)]
struct Received {
    #[serde(rename = "type")]
    kind: String,
    version: Option<u32>,
    error: Option<Error>,
    id: Option<u64>,
    outcome: Option<Outcome>,
    event: Option<AgentEvent>,
}

impl TryFrom<Received> for FromHost {
    type Error = String;

    fn try_from(received: Received) -> Result<Self, String> {
        let Received { kind, version, error, id, outcome, event } = received;
        let missing = || format!("a message {kind:?} lacks a field");
        match kind.as_str() {
            "welcome" => Ok(Self::Welcome { version: version.ok_or_else(missing)? }),
            "refused" => Ok(Self::Refused { error: error.ok_or_else(missing)? }),
            "response" => {
                Ok(Self::Response { id: id.ok_or_else(missing)?, outcome: outcome.ok_or_else(missing)? })
            }
            "event" => Ok(Self::Event { event: event.ok_or_else(missing)? }),
            _ => Err(format!("a message {kind:?} is not known")),
        }
    }
}

/// How a call went.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Its answer, as text.
    Result(Box<RawValue>),
    /// Its error.
    Error(Error),
}

impl PartialEq for Outcome {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Result(one), Self::Result(other)) => one.get() == other.get(),
            (Self::Error(one), Self::Error(other)) => one == other,
            _ => false,
        }
    }
}

/// A frame to be sent.
#[derive(Debug)]
pub struct Frame {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Frame {
    /// Encodes a message with its descriptors.
    ///
    /// # Errors
    /// Too large for a frame, or more than [`MAX_FDS`] descriptors.
    pub fn new(message: &impl Serialize, fds: Vec<OwnedFd>) -> karst_model::Result<Self> {
        let mut bytes = vec![0; HEADER];
        serde_json::to_writer(&mut bytes, message)?;
        let body = bytes.len() - HEADER;
        if body > MAX_FRAME {
            return Err(Error::too_large(format!(
                "a message of {body} bytes does not fit a frame of {MAX_FRAME} bytes of the agent protocol"
            )));
        }
        if fds.len() > MAX_FDS {
            return Err(Error::internal("too many descriptors for one answer", fds.len()));
        }
        bytes[..4].copy_from_slice(&(body as u32).to_le_bytes());
        bytes[4] = fds.len() as u8;
        Ok(Self { bytes, fds })
    }

    /// Sends it whole; its descriptors are closed here afterwards. Not to be dropped half-way: the connection is unusable
    /// then.
    pub async fn send(self, stream: &UnixStream) -> io::Result<()> {
        let mut sent = 0;
        while sent < self.bytes.len() {
            let fds: Vec<BorrowedFd<'_>> =
                if sent == 0 { self.fds.iter().map(AsFd::as_fd).collect() } else { vec![] };
            sent += stream
                .async_io(Interest::WRITABLE, || {
                    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
                    let mut control = SendAncillaryBuffer::new(&mut space);
                    if !fds.is_empty() {
                        control.push(SendAncillaryMessage::ScmRights(&fds));
                    }
                    let data = [IoSlice::new(&self.bytes[sent..])];
                    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                    Ok(rustix::net::sendmsg(stream, &data, &mut control, flags)?)
                })
                .await?;
        }
        Ok(())
    }
}

/// Reads frames off a stream.
#[derive(Debug)]
pub struct FrameReader {
    stream: Arc<UnixStream>,
    accept_fds: bool,
}

fn malformed(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

impl FrameReader {
    /// A reader; `accept_fds` is false on the host, which never receives a descriptor.
    pub fn new(stream: Arc<UnixStream>, accept_fds: bool) -> Self {
        Self { stream, accept_fds }
    }

    /// The next message, or `None` at the end of the stream between two frames. Not to be dropped half-way.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] for a malformed frame, others from the socket; after either the connection is unusable.
    pub async fn next<M: DeserializeOwned>(&mut self) -> io::Result<Option<(M, Vec<OwnedFd>)>> {
        let mut header = [0; HEADER];
        let mut fds = vec![];
        let mut have = 0;
        while have < HEADER {
            match self.receive(&mut header[have..], Some(&mut fds)).await? {
                0 if have == 0 => return Ok(None),
                0 => return Err(malformed("the stream ended within a header")),
                n => have += n,
            }
        }
        let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
        if header[5..] != [0, 0, 0] {
            return Err(malformed("reserved bytes of a header are not zero"));
        }
        if length > MAX_FRAME {
            return Err(malformed(format!("a frame of {length} bytes")));
        }
        if usize::from(header[4]) != fds.len() {
            return Err(malformed(format!("{} descriptors where the header says {}", fds.len(), header[4])));
        }
        // Grown as it arrives: a header alone makes nobody allocate 4 MiB.
        let mut body = Vec::new();
        while body.len() < length {
            let start = body.len();
            body.resize((start + (64 << 10)).min(length), 0);
            let n = self.receive(&mut body[start..], None).await?;
            if n == 0 {
                return Err(malformed("the stream ended within a frame"));
            }
            body.truncate(start + n);
        }
        let message = serde_json::from_slice(&body).map_err(|e| malformed(format!("not a message: {e}")))?;
        Ok(Some((message, fds)))
    }

    async fn receive(&self, buffer: &mut [u8], fds: Option<&mut Vec<OwnedFd>>) -> io::Result<usize> {
        let room = if self.accept_fds && fds.is_some() { rustix::cmsg_space!(ScmRights(MAX_FDS)) } else { 0 };
        let mut received = vec![];
        let (bytes, flags) = self
            .stream
            .async_io(Interest::READABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
                let mut control = RecvAncillaryBuffer::new(&mut space[..room]);
                let mut data = [IoSliceMut::new(buffer)];
                let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
                let got = rustix::net::recvmsg(&*self.stream, &mut data, &mut control, flags)?;
                for message in control.drain() {
                    if let RecvAncillaryMessage::ScmRights(more) = message {
                        received.extend(more);
                    }
                }
                Ok((got.bytes, got.flags))
            })
            .await?;
        if flags.contains(ReturnFlags::CTRUNC) {
            return Err(malformed("descriptors where none, or not so many, are taken"));
        }
        if let Some(fds) = fds {
            fds.append(&mut received);
        }
        Ok(bytes)
    }
}
