//! Websockets of operations and events, over connections of their own.

use futures::{SinkExt, StreamExt};
use tokio::net::UnixStream;
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{self, Message},
};

use super::{Client, Event, Operation, Url, refusal};
use crate::error::{Error, Result};

/// An open websocket.
pub type Socket = WebSocketStream<UnixStream>;

impl Client {
    /// Opens a websocket at a path of the API.
    pub async fn websocket(&self, url: &Url) -> Result<Socket> {
        let stream = self.transport().connect().await?;
        let address = format!("ws://karst{}", self.target(url));
        match client_async(address, stream).await {
            Ok((socket, _)) => Ok(socket),
            Err(tungstenite::Error::Http(response)) => {
                let body = response.body().as_deref().unwrap_or_default();
                Err(refusal(response.status().as_u16(), body))
            }
            Err(error) => Err(Error::Unreachable(format!("no websocket: {error}"))),
        }
    }

    /// Opens the websocket of one stream of an operation (`0`, `1`, `2`, `control`).
    pub async fn stream(&self, operation: &Operation, name: &str) -> Result<Socket> {
        let secret = operation
            .stream_secret(name)
            .ok_or_else(|| Error::local(format!("the server's operation has no stream \"{name}\"")))?;
        self.websocket(&Url::new(&["operations", &operation.id, "websocket"]).with("secret", secret)).await
    }
}

/// The next event; `None` when the server has closed the websocket.
pub async fn next_event(socket: &mut Socket) -> Option<Result<Event>> {
    loop {
        match socket.next().await? {
            Ok(Message::Text(text)) => {
                return Some(
                    serde_json::from_str(&text)
                        .map_err(|error| Error::local(format!("unknown event: {error}"))),
                );
            }
            Ok(Message::Close(_)) => return None,
            Ok(_) => {}
            Err(error) => return Some(Err(Error::Unreachable(format!("the events ended: {error}")))),
        }
    }
}

/// Sends a JSON message.
pub async fn send_json<S>(sink: &mut S, value: &serde_json::Value) -> Result<()>
where
    S: SinkExt<Message, Error = tungstenite::Error> + Unpin,
{
    sink.send(Message::text(value.to_string()))
        .await
        .map_err(|error| Error::Unreachable(format!("a websocket broke: {error}")))
}
