//! Streams between the user and a command or console in a guest. Data are binary messages; an empty text message or
//! the end of the websocket is the end of the stream.

use std::future::pending;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tokio_tungstenite::tungstenite::Message;

use crate::{
    client::websocket::{Socket, send_json},
    error::Result,
    terminal::{self, Writer},
};

/// Signals that go to the command in the guest instead of ending this program: HUP, INT, QUIT, USR1, USR2, TERM. Their
/// numbers are the same on all architectures that Karst runs on.
const FORWARDED: [i32; 6] = [1, 2, 3, 10, 12, 15];
/// What a command gets whose output nobody reads any more.
pub const BROKEN_PIPE: i32 = 13;
/// Control messages that may wait for a slow server.
const QUEUE: usize = 16;

/// Why a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The other side has sent everything.
    Eof,
    /// The user detached with ctrl-a q.
    Detached,
    /// Whoever read our stdout or stderr has gone away.
    OutputClosed,
}

/// Moves the bytes of one websocket.
#[derive(Debug, Default)]
pub struct Pump {
    /// What goes to the guest.
    pub input: Option<mpsc::Receiver<Bytes>>,
    /// Where what comes from the guest goes.
    pub output: Option<Writer>,
    /// Whether the end of the input is told to the guest.
    pub tell_end: bool,
    /// Whether ctrl-a q detaches.
    pub escape: bool,
}

impl Pump {
    /// Runs until the guest's side ends, or the user detaches, or the output is closed.
    pub async fn run(self, socket: Socket) -> End {
        let (mut sink, mut stream) = socket.split();
        let Self { input, output, tell_end, escape } = self;
        let send = async {
            let Some(mut input) = input else {
                return pending().await;
            };
            let mut escape = escape.then(Escape::default);
            while let Some(data) = input.recv().await {
                let (data, detach) = match &mut escape {
                    Some(escape) => escape.filter(&data),
                    None => (data, false),
                };
                if !data.is_empty() && sink.send(Message::Binary(data)).await.is_err() {
                    return pending().await;
                }
                if detach {
                    return End::Detached;
                }
            }
            if tell_end {
                let _ = sink.send(Message::text("")).await;
            }
            pending().await
        };
        let receive = async {
            let closed = async {
                match &output {
                    Some(output) => output.closed().await,
                    None => pending().await,
                }
            };
            let copy = async {
                while let Some(Ok(message)) = stream.next().await {
                    let open = match (message, &output) {
                        (Message::Binary(data), Some(output)) => output.write(data).await,
                        (Message::Text(_), Some(_)) | (Message::Close(_), _) => break,
                        _ => true,
                    };
                    if !open {
                        return End::OutputClosed;
                    }
                }
                End::Eof
            };
            tokio::select! {
                end = copy => end,
                () = closed => End::OutputClosed,
            }
        };
        let end = tokio::select! {
            end = receive => end,
            end = send => end,
        };
        let written = match output {
            Some(output) => output.finish().await,
            None => Ok(()),
        };
        if written.is_err() { End::OutputClosed } else { end }
    }
}

/// Sends signals and changes of the terminal's size over the control websocket for as long as it stands.
/// More messages can be put in through the sender.
pub fn control(socket: Socket, signals: bool, resize: bool) -> Result<mpsc::Sender<Value>> {
    let (sender, mut messages) = mpsc::channel::<Value>(QUEUE);
    if signals {
        for number in FORWARDED {
            let mut stream = signal(SignalKind::from_raw(number))?;
            let sender = sender.clone();
            tokio::spawn(async move {
                while stream.recv().await.is_some() && sender.send(signal_message(number)).await.is_ok() {}
            });
        }
    }
    if resize {
        let mut stream = signal(SignalKind::window_change())?;
        let sender = sender.clone();
        tokio::spawn(async move {
            while stream.recv().await.is_some() {
                if let Some((columns, rows)) = terminal::size()
                    && sender.send(resize_message(columns, rows)).await.is_err()
                {
                    return;
                }
            }
        });
    }
    tokio::spawn(async move {
        let (mut sink, mut stream) = socket.split();
        loop {
            tokio::select! {
                message = messages.recv() => match message {
                    Some(message) => if send_json(&mut sink, &message).await.is_err() { return },
                    None => return,
                },
                // Read as well: pings are answered and the end is noticed.
                message = stream.next() => if !matches!(message, Some(Ok(_))) { return },
            }
        }
    });
    Ok(sender)
}

/// Delivers a signal to the command.
pub fn signal_message(number: i32) -> Value {
    json!({"command": "signal", "signal": number})
}

/// Tells the guest's terminal its size.
fn resize_message(columns: u16, rows: u16) -> Value {
    json!({"command": "window-resize", "args": {"width": columns.to_string(), "height": rows.to_string()}})
}

/// Finds ctrl-a q in what is typed; ctrl-a ctrl-a sends one ctrl-a, other keys after ctrl-a go through with it.
#[derive(Debug, Default)]
struct Escape {
    pending: bool,
}

impl Escape {
    const PREFIX: u8 = 0x01;

    /// The bytes to send on, and whether the user detached.
    fn filter(&mut self, data: &[u8]) -> (Bytes, bool) {
        let mut out = Vec::with_capacity(data.len() + 1);
        for &byte in data {
            match (std::mem::take(&mut self.pending), byte) {
                (true, b'q') => return (out.into(), true),
                (true, Self::PREFIX) => out.push(byte),
                (true, _) => out.extend([Self::PREFIX, byte]),
                (false, Self::PREFIX) => self.pending = true,
                (false, _) => out.push(byte),
            }
        }
        (out.into(), false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(parts: &[&[u8]]) -> (Vec<u8>, bool) {
        let mut escape = Escape::default();
        let mut all = Vec::new();
        for part in parts {
            let (data, detached) = escape.filter(part);
            all.extend_from_slice(&data);
            if detached {
                return (all, true);
            }
        }
        (all, false)
    }

    #[test]
    fn escape_key() {
        assert_eq!(filter(&[b"ls\r"]), (b"ls\r".to_vec(), false));
        assert_eq!(filter(&[b"ab\x01qcd"]), (b"ab".to_vec(), true));
        assert_eq!(filter(&[b"ab\x01", b"q"]), (b"ab".to_vec(), true));
        assert_eq!(filter(&[b"\x01", b"x"]), (b"\x01x".to_vec(), false));
        assert_eq!(filter(&[b"\x01\x01q"]), (b"\x01q".to_vec(), false));
    }

    #[test]
    fn control_messages() {
        assert_eq!(signal_message(15).to_string(), r#"{"command":"signal","signal":15}"#);
        assert_eq!(
            resize_message(80, 24).to_string(),
            r#"{"command":"window-resize","args":{"width":"80","height":"24"}}"#
        );
    }
}
