//! Upgrades of HTTP connections: websockets (RFC 6455) for events, exec and console, and bare streams (SFTP).

use crate::{
    places::Place,
    request::RequestBody,
    respond::{Reply, full},
};
use futures::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use hyper::{
    Request, Response, StatusCode,
    header::{CONNECTION, HeaderMap, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, UPGRADE},
    upgrade::Upgraded,
};
use hyper_util::rt::TokioIo;
use karst_model::{Error, Result};
use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{self, Poll},
    time::Duration,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Message,
        handshake::derive_accept_key,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};

/// A server's side of a websocket.
pub type Socket = WebSocketStream<Connection>;
/// Its sending half.
pub type Sender = SplitSink<Socket, Message>;
/// Its receiving half.
pub type Receiver = SplitStream<Socket>;

/// Largest message of a client that sends a stream, in bytes: some send the whole of an input as one message. Each is kept
/// whole until it has come, so this times the places of a client is what he may take.
pub const STREAM: usize = 4 << 20;
/// Largest message of a client that has nothing to say.
pub const LISTENER: usize = 64 << 10;
/// Bytes sent in one message.
const CHUNK: usize = 64 << 10;
/// Time between pings that keep an idle connection from being forgotten.
pub const PING: Duration = Duration::from_secs(10);

fn has_token(headers: &HeaderMap, name: hyper::header::HeaderName, token: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .any(|v| v.split(',').any(|t| t.trim().eq_ignore_ascii_case(token)))
}

/// Does the request ask for this protocol on its connection?
pub fn asks_for(request: &Request<RequestBody>, protocol: &str) -> bool {
    has_token(request.headers(), CONNECTION, "upgrade") && has_token(request.headers(), UPGRADE, protocol)
}

/// A connection that no longer speaks HTTP, with its place among the connections from the network if it came from there.
#[derive(Debug)]
pub struct Connection {
    io: TokioIo<Upgraded>,
    _place: Option<Arc<Place>>,
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

/// Answers 101 and hands the websocket to `serve`, once the connection has switched. No message of the client's may have more
/// than `largest` bytes: one that has ends it.
///
/// # Errors
/// Invalid, when the request is no websocket handshake.
pub fn websocket<F, Fut>(mut request: Request<RequestBody>, largest: usize, serve: F) -> Result<Reply>
where
    F: FnOnce(Socket) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send,
{
    if !asks_for(&request, "websocket") {
        return Err(Error::invalid("Upgrade", "this path speaks websocket: the Upgrade header is missing"));
    }
    let key = request
        .headers()
        .get(SEC_WEBSOCKET_KEY)
        .ok_or_else(|| Error::invalid("Sec-WebSocket-Key", "Sec-WebSocket-Key is missing"))?;
    let accept = HeaderValue::from_str(&derive_accept_key(key.as_bytes()))
        .map_err(|e| Error::internal("the handshake failed", e))?;
    let place = request.extensions().get::<Arc<Place>>().cloned();
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgrade.await {
            Ok(upgraded) => {
                let mut config = WebSocketConfig::default();
                config.max_message_size = Some(largest);
                config.max_frame_size = Some(largest);
                let io = Connection { io: TokioIo::new(upgraded), _place: place };
                serve(WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await).await;
            }
            Err(e) => tracing::debug!(error = %e, "a client went away during its upgrade"),
        }
    });
    let mut reply = switching("websocket");
    reply.headers_mut().insert(SEC_WEBSOCKET_ACCEPT, accept);
    Ok(reply)
}

/// Answers 101 and hands the bare stream to `serve`.
///
/// # Errors
/// Invalid, when the request does not ask for `protocol`.
pub fn raw<F, Fut>(mut request: Request<RequestBody>, protocol: &'static str, serve: F) -> Result<Reply>
where
    F: FnOnce(Connection) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send,
{
    if !asks_for(&request, protocol) {
        return Err(Error::invalid("Upgrade", format!("this path needs the header Upgrade: {protocol}")));
    }
    let place = request.extensions().get::<Arc<Place>>().cloned();
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgrade.await {
            Ok(upgraded) => serve(Connection { io: TokioIo::new(upgraded), _place: place }).await,
            Err(e) => tracing::debug!(error = %e, "a client went away during its upgrade"),
        }
    });
    Ok(switching(protocol))
}

fn switching(protocol: &'static str) -> Reply {
    let mut reply = Response::new(full(""));
    *reply.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    reply.headers_mut().insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    reply.headers_mut().insert(UPGRADE, HeaderValue::from_static(protocol));
    reply
}

fn io_error(e: tungstenite::Error) -> io::Error {
    io::Error::other(e)
}

/// Sends what `source` gives as binary messages, then an empty text message, which Incus' clients read as the end of the
/// stream.
///
/// # Errors
/// When the client or the source breaks.
pub async fn pump_out(mut source: impl AsyncRead + Unpin, sender: &mut Sender) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let n = source.read(&mut buffer).await?;
        if n == 0 {
            return sender.send(Message::text("")).await.map_err(io_error);
        }
        sender.send(Message::binary(buffer[..n].to_vec())).await.map_err(io_error)?;
    }
}

/// Writes binary messages to `sink` until the client says the end (a text message, or its close).
///
/// # Errors
/// When the client or the sink breaks.
pub async fn pump_in(receiver: &mut Receiver, mut sink: impl AsyncWrite + Unpin) -> io::Result<()> {
    while let Some(message) = receiver.next().await {
        match message.map_err(io_error)? {
            Message::Binary(data) => sink.write_all(&data).await?,
            Message::Text(_) | Message::Close(_) => break,
            _ => {}
        }
    }
    sink.flush().await
}

/// Says that all is well and closes. Bounded: a client that does not answer is left.
pub async fn close(mut sender: Sender) {
    let bye = Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() }));
    let _ = tokio::time::timeout(Duration::from_secs(2), async {
        let _ = sender.send(bye).await;
        let _ = sender.close().await;
    })
    .await;
}
