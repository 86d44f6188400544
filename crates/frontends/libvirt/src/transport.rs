//! What a connection goes over: a unix socket, which passes descriptors, or TLS, which does not.

use crate::fds;
use bytes::Bytes;
use std::{
    io,
    os::fd::OwnedFd,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::{
    io::{AsyncRead, AsyncWriteExt, ReadBuf, ReadHalf, WriteHalf},
    net::{
        TcpStream, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};
use tokio_rustls::server::TlsStream;

/// A connection before it is served.
pub enum Transport {
    /// A unix socket.
    Unix(UnixStream),
    /// TLS, its handshake done.
    Tls(Box<TlsStream<TcpStream>>),
}

/// Its end that is read.
pub enum Incoming {
    /// Of a unix socket.
    Unix(OwnedReadHalf),
    /// Of TLS.
    Tls(ReadHalf<Box<TlsStream<TcpStream>>>),
}

/// Its end that is written.
pub enum Outgoing {
    /// Of a unix socket.
    Unix(OwnedWriteHalf),
    /// Of TLS.
    Tls(WriteHalf<Box<TlsStream<TcpStream>>>),
}

impl Transport {
    /// Both ends.
    pub fn split(self) -> (Incoming, Outgoing) {
        match self {
            Self::Unix(stream) => {
                let (incoming, outgoing) = stream.into_split();
                (Incoming::Unix(incoming), Outgoing::Unix(outgoing))
            }
            Self::Tls(stream) => {
                let (incoming, outgoing) = tokio::io::split(stream);
                (Incoming::Tls(incoming), Outgoing::Tls(outgoing))
            }
        }
    }

    /// Do descriptors go over it?
    pub fn passes_descriptors(&self) -> bool {
        matches!(self, Self::Unix(_))
    }
}

impl AsyncRead for Incoming {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl Incoming {
    /// Takes the descriptors of a call; their number is taken off its payload.
    ///
    /// # Errors
    /// As [`fds::of_call`]; unsupported over TLS.
    pub async fn descriptors(&self, payload: &mut Bytes) -> io::Result<Vec<OwnedFd>> {
        match self {
            Self::Unix(stream) => fds::of_call(stream.as_ref(), payload).await,
            Self::Tls(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

impl Outgoing {
    /// Sends a frame, and the descriptors that go with it.
    ///
    /// # Errors
    /// Those of the transport; unsupported for descriptors over TLS.
    pub async fn send(&mut self, frame: &[u8], with: Vec<OwnedFd>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => {
                stream.write_all(frame).await?;
                fds::send(stream.as_ref(), with).await
            }
            Self::Tls(_) if !with.is_empty() => Err(io::ErrorKind::Unsupported.into()),
            Self::Tls(stream) => {
                stream.write_all(frame).await?;
                stream.flush().await
            }
        }
    }

    /// Says that no more comes.
    ///
    /// # Errors
    /// Those of the transport.
    pub async fn close(&mut self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.shutdown().await,
            Self::Tls(stream) => stream.shutdown().await,
        }
    }
}
