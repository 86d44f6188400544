//! HTTP/1.1 over the unix socket. A connection is kept for the next request once its answer has been read; requests
//! that overlap open connections of their own.

use std::{
    convert::Infallible,
    ffi::OsString,
    io,
    os::fd::{AsRawFd, OwnedFd},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::Mutex,
};

use bytes::{Buf, Bytes};
use futures::Stream;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Request, Response,
    body::{Frame, Incoming},
    client::conn::http1,
    header::{HOST, HeaderValue},
};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use crate::error::{Error, Result, io_text};

/// Body of a request.
pub type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Longest path that fits into `sockaddr_un` with its final zero.
const LONGEST_SOCKET_PATH: usize = 107;

/// Bytes that are read from a file at once to be sent.
pub const CHUNK: usize = 256 * 1024;

/// No body.
pub fn empty() -> Body {
    full(Bytes::new())
}

/// A body that is in memory.
pub fn full(data: impl Into<Bytes>) -> Body {
    Full::new(data.into()).map_err(|never: Infallible| match never {}).boxed_unsync()
}

/// A body that is produced while it is sent.
pub fn streamed(chunks: impl Stream<Item = io::Result<Bytes>> + Send + 'static) -> Body {
    use futures::StreamExt as _;
    StreamBody::new(chunks.map(|chunk| chunk.map(Frame::data))).boxed_unsync()
}

/// The way to the server.
#[derive(Debug)]
pub struct Transport {
    socket: PathBuf,
    idle: Mutex<Vec<http1::SendRequest<Body>>>,
}

impl Transport {
    /// Over the socket at this path.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket, idle: Mutex::new(Vec::new()) }
    }

    /// Another way to the same server.
    pub fn another(&self) -> Self {
        Self::new(self.socket.clone())
    }

    /// Opens a connection; used as it is for websockets.
    pub async fn connect(&self) -> Result<UnixStream> {
        connect(&self.socket).await.map_err(|error| self.unreachable(&error))
    }

    /// Sends a request over a kept or new connection and waits for the head of the answer.
    pub async fn send(&self, mut request: Request<Body>) -> Result<Response<Incoming>> {
        request.headers_mut().insert(HOST, HeaderValue::from_static("karst"));
        request.headers_mut().insert(
            hyper::header::USER_AGENT,
            HeaderValue::from_static(concat!("karst/", env!("CARGO_PKG_VERSION"))),
        );
        let mut sender = match self.take_idle() {
            Some(sender) => sender,
            None => self.open().await?,
        };
        let mut response = sender.send_request(request).await.map_err(|error| self.lost(&error))?;
        response.extensions_mut().insert(Kept(std::sync::Arc::new(Mutex::new(Some(sender)))));
        Ok(response)
    }

    /// Reads the whole body of an answer, at most `limit` bytes, and keeps its connection.
    pub async fn collect(&self, mut response: Response<Incoming>, limit: usize) -> Result<Bytes> {
        let kept = response.extensions_mut().remove::<Kept>();
        let mut parts: Vec<Bytes> = Vec::new();
        let mut length = 0;
        while let Some(frame) = response.body_mut().frame().await {
            let Ok(data) = frame.map_err(|error| self.lost(&error))?.into_data() else {
                continue;
            };
            length += data.len();
            if length > limit {
                return Err(Error::local(format!("the server's answer is larger than {limit} bytes")));
            }
            parts.push(data);
        }
        if let Some(sender) = kept.and_then(|kept| kept.0.lock().expect("no panic inside").take()) {
            self.idle.lock().expect("no panic inside").push(sender);
        }
        if parts.len() == 1 {
            return Ok(parts.remove(0));
        }
        let mut whole = bytes::BytesMut::with_capacity(length);
        for part in &parts {
            whole.extend_from_slice(part.chunk());
        }
        Ok(whole.freeze())
    }

    /// A connection whose last answer was read, if the server has not closed it.
    fn take_idle(&self) -> Option<http1::SendRequest<Body>> {
        let mut idle = self.idle.lock().expect("no panic inside");
        while let Some(sender) = idle.pop() {
            if sender.is_ready() {
                return Some(sender);
            }
        }
        None
    }

    /// Connects and starts the task that drives the connection.
    async fn open(&self) -> Result<http1::SendRequest<Body>> {
        let stream = self.connect().await?;
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.lost(&error))?;
        tokio::spawn(async move {
            // Its error reaches whoever waits for the answer.
            let _ = connection.await;
        });
        Ok(sender)
    }

    /// Why there is no connection, and what to do about it.
    fn unreachable(&self, error: &io::Error) -> Error {
        let socket = self.socket.display();
        Error::Unreachable(match error.kind() {
            io::ErrorKind::NotFound => {
                format!(
                    "no server at {socket}: is karstd running? (--dir or KARST_DIR names another directory)"
                )
            }
            io::ErrorKind::ConnectionRefused => format!("nothing answers at {socket}: karstd is not running"),
            io::ErrorKind::PermissionDenied => {
                format!("{socket}: permission denied (root and the group karst-admin may use it)")
            }
            _ => format!("{socket}: {}", io_text(error)),
        })
    }

    /// The connection broke after it stood.
    fn lost(&self, error: &hyper::Error) -> Error {
        // A failing body of ours (a file that cannot be read) is our error, not the server's.
        let mut source = std::error::Error::source(error);
        while let Some(inner) = source {
            if error.is_user()
                && let Some(io) = inner.downcast_ref::<io::Error>()
            {
                return Error::Local(io_text(io));
            }
            source = inner.source();
        }
        Error::Unreachable(format!("the connection to {} was lost: {error}", self.socket.display()))
    }
}

/// The sender that an answer came over, carried with it until its body has been read.
#[derive(Clone)]
struct Kept(std::sync::Arc<Mutex<Option<http1::SendRequest<Body>>>>);

/// Connects to a socket, also where its path is longer than a socket address can hold.
async fn connect(socket: &Path) -> io::Result<UnixStream> {
    if socket.as_os_str().as_bytes().len() <= LONGEST_SOCKET_PATH {
        return UnixStream::connect(socket).await;
    }
    use rustix::fs::{Mode, OFlags};
    let parent = socket.parent().unwrap_or(Path::new("/"));
    let directory: OwnedFd =
        rustix::fs::open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut short = OsString::from(format!("/proc/self/fd/{}/", directory.as_raw_fd()));
    short.push(socket.file_name().unwrap_or_default());
    UnixStream::connect(short).await
}
