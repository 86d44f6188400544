//! The user's terminal: raw mode that is always undone, its size, and threads that move bytes between the standard
//! streams and the runtime (which must never wait for a terminal or pipe).

use std::{
    io::{self, Read, Write},
    os::fd::BorrowedFd,
};

use bytes::Bytes;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::sync::{mpsc, oneshot};

use crate::error::Result;

/// Size of one read from stdin.
const CHUNK: usize = 64 * 1024;
/// Chunks in flight: bounds memory, keeps a pipe busy.
const QUEUE: usize = 8;

/// Whether a standard stream is a terminal.
pub fn is_terminal(stream: BorrowedFd<'_>) -> bool {
    rustix::termios::isatty(stream)
}

/// Raw mode of the terminal at stdin, until dropped.
#[derive(Debug)]
pub struct RawMode(Termios);

impl RawMode {
    /// Turns it on; `None` where stdin is no terminal.
    pub fn enter() -> Result<Option<Self>> {
        let stdin = rustix::stdio::stdin();
        if !is_terminal(stdin) {
            return Ok(None);
        }
        let before = tcgetattr(stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Columns and rows of the terminal, if stdout or stdin is one that knows.
pub fn size() -> Option<(u16, u16)> {
    [rustix::stdio::stdout(), rustix::stdio::stdin()]
        .into_iter()
        .filter_map(|stream| tcgetwinsize(stream).ok())
        .map(|size| (size.ws_col, size.ws_row))
        .find(|(columns, rows)| *columns > 0 && *rows > 0)
}

/// Reads stdin in a thread of its own. The channel closes at its end.
pub fn read_stdin() -> mpsc::Receiver<Bytes> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    std::thread::spawn(move || {
        // What cannot be read any more is at its end to who is at a terminal.
        let _ = each_of_stdin(|chunk| sender.blocking_send(chunk).is_ok());
    });
    receiver
}

/// The same of a file that is sent whole or not at all: an error while it is read is one of the stream.
pub fn read_stdin_whole() -> mpsc::Receiver<io::Result<Bytes>> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    std::thread::spawn(move || {
        if let Err(error) = each_of_stdin(|chunk| sender.blocking_send(Ok(chunk)).is_ok()) {
            let _ = sender.blocking_send(Err(error));
        }
    });
    receiver
}

/// Hands what is read on, to its end, or until nobody takes it.
fn each_of_stdin(mut take: impl FnMut(Bytes) -> bool) -> io::Result<()> {
    let mut stdin = io::stdin().lock();
    let mut buffer = vec![0; CHUNK];
    loop {
        match stdin.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) if take(Bytes::copy_from_slice(&buffer[..length])) => {}
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Where a [`Writer`] writes.
#[derive(Debug, Clone, Copy)]
pub enum Target {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A thread that writes to a standard stream.
#[derive(Debug)]
pub struct Writer {
    sender: mpsc::Sender<Bytes>,
    done: oneshot::Receiver<io::Result<()>>,
}

impl Writer {
    /// Starts the thread.
    pub fn new(target: Target) -> Self {
        let (sender, mut receiver) = mpsc::channel::<Bytes>(QUEUE);
        let (report, done) = oneshot::channel();
        std::thread::spawn(move || {
            let write = |data: &[u8]| match target {
                Target::Stdout => {
                    let mut stdout = io::stdout().lock();
                    stdout.write_all(data).and_then(|()| stdout.flush())
                }
                Target::Stderr => io::stderr().lock().write_all(data),
            };
            let mut result = Ok(());
            while let Some(data) = receiver.blocking_recv() {
                result = write(&data);
                if result.is_err() {
                    break;
                }
            }
            // Closed first: whoever sends next learns that nobody writes any more.
            drop(receiver);
            let _ = report.send(result);
        });
        Self { sender, done }
    }

    /// Hands bytes over; `false` when the stream cannot be written to any more.
    pub async fn write(&self, data: Bytes) -> bool {
        self.sender.send(data).await.is_ok()
    }

    /// Waits until the stream cannot be written to any more.
    pub async fn closed(&self) {
        self.sender.closed().await;
    }

    /// Waits until all is written.
    pub async fn finish(self) -> io::Result<()> {
        drop(self.sender);
        self.done.await.unwrap_or(Ok(()))
    }
}
