//! QEMU's machine protocol (`docs/interop/qmp-spec`): capability negotiation, commands by id, events.
//!
//! QEMU is trusted with its guest only: lines are bounded, garbage ends the connection, every command has a deadline.
//! A QMP socket serves one client and goes on listening. So there are two: one for commands, held for the time of one
//! command only, and one for events, held by the host process that follows them. A host process that hangs can thus keep
//! the events from its successor, but never the control.

use crate::{
    launch,
    line::{Lines, object, printable},
};
use karst_model::{Error, Result};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Map, Value, json};
use std::{
    collections::HashMap,
    io::IoSlice,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    sync::{Mutex as AsyncMutex, mpsc, oneshot},
    time::timeout,
};

/// Longest line accepted; answers to what we ask are a few KiB.
const LINE: usize = 1 << 20;
/// How long a command may take.
const COMMAND: Duration = Duration::from_secs(10);
/// Events kept for a slow owner; QEMU limits the rate of those a guest can cause.
const EVENTS: usize = 256;

/// Something that happened in QEMU.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Name, such as `SHUTDOWN`.
    pub name: String,
    /// What belongs to it.
    pub data: Map<String, Value>,
    /// When, in seconds since 1970 and microseconds, by QEMU.
    pub at: (i64, u32),
}

/// What QEMU says when it refuses a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Class, such as `CommandNotFound`.
    pub class: String,
    /// Why.
    pub description: String,
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Error::internal("QEMU refused", format!("{}: {}", refusal.class, refusal.description))
    }
}

type Said = std::result::Result<Value, Refusal>;
type Pending = Arc<Mutex<Option<HashMap<u64, oneshot::Sender<Said>>>>>;

/// A connection. Dropping it closes the socket.
pub struct Qmp {
    writer: AsyncMutex<Box<dyn AsyncWrite + Send + Unpin>>,
    pending: Pending,
    next: AtomicU64,
    /// The same socket, to send descriptors on.
    socket: Option<OwnedFd>,
    reader: tokio::task::JoinHandle<()>,
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

fn closed() -> Error {
    Error::unavailable("QEMU closed its control socket")
}

impl Qmp {
    /// Connects to the socket `name` in the state directory `dir` and negotiates. The receiver ends when the connection
    /// does.
    ///
    /// # Errors
    /// Unavailable when nobody listens or somebody else is connected (no greeting comes), timeout.
    pub async fn connect(dir: &Path, name: &str, limit: Duration) -> Result<(Self, mpsc::Receiver<Event>)> {
        let stream = launch::connect(dir, name)
            .await
            .map_err(|e| Error::unavailable("QEMU's control socket cannot be reached").with_context(e))?;
        let socket = stream.as_fd().try_clone_to_owned()?;
        let (read, write) = stream.into_split();
        let (mut qmp, events) = timeout(limit, Self::negotiate(read, write))
            .await
            .map_err(|_| Error::timeout("QEMU did not greet on its control socket"))??;
        qmp.socket = Some(socket);
        Ok((qmp, events))
    }

    /// Negotiates on a stream.
    ///
    /// # Errors
    /// When the peer is no QMP server.
    pub async fn negotiate(
        read: impl AsyncRead + Send + Unpin + 'static,
        write: impl AsyncWrite + Send + Unpin + 'static,
    ) -> Result<(Self, mpsc::Receiver<Event>)> {
        let mut lines = Lines::new(read, LINE);
        let mut before = 0;
        loop {
            let line = object(&lines.next().await?.ok_or_else(closed)?)?;
            if line.contains_key("QMP") {
                break;
            }
            // What happens just when QEMU takes a connection it may tell before it greets, as if to who was there before.
            before += 1;
            if !line.contains_key("event") || before > EVENTS {
                return Err(Error::internal("QEMU's control socket could not be understood", "no greeting"));
            }
        }
        let pending: Pending = Arc::new(Mutex::new(Some(HashMap::new())));
        let (events, receiver) = mpsc::channel(EVENTS);
        let reader = tokio::spawn({
            let pending = pending.clone();
            async move {
                if let Err(e) = read_all(lines, &pending, &events).await {
                    tracing::warn!(error = %e, context = e.context, "QMP connection given up");
                }
                // Drops the senders: every waiter learns that the connection is gone.
                if let Ok(mut p) = pending.lock() {
                    *p = None;
                }
            }
        });
        let qmp = Qmp {
            writer: AsyncMutex::new(Box::new(write)),
            pending,
            next: AtomicU64::new(1),
            socket: None,
            reader,
        };
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok((qmp, receiver))
    }

    /// Runs a command and answers its `return`.
    ///
    /// # Errors
    /// Internal with QEMU's class and text as context, timeout, unavailable when the connection is gone.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value> {
        Ok(self.run(command, arguments, None, COMMAND).await??)
    }

    /// Runs a command and answers what QEMU says to it, a refusal too.
    ///
    /// # Errors
    /// Timeout, unavailable when the connection is gone.
    pub async fn ask(&self, limit: Duration, command: &str, arguments: Value) -> Result<Said> {
        self.run(command, arguments, None, limit).await
    }

    /// As [`Self::execute`], for a command that takes long.
    ///
    /// # Errors
    /// Those of [`Self::execute`].
    pub async fn execute_within(&self, limit: Duration, command: &str, arguments: Value) -> Result<Value> {
        Ok(self.run(command, arguments, None, limit).await??)
    }

    /// As [`Self::execute`], with a descriptor for `add-fd` or `getfd`.
    ///
    /// # Errors
    /// Those of [`Self::execute`].
    pub async fn execute_with_fd(
        &self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value> {
        Ok(self.run(command, arguments, Some(fd), COMMAND).await??)
    }

    /// Sends the beginning of `line` with a descriptor; answers how much went.
    async fn send_fd(&self, line: &[u8], fd: BorrowedFd<'_>) -> Result<usize> {
        let socket = self.socket.as_ref().ok_or_else(closed)?;
        loop {
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = [fd];
            control.push(SendAncillaryMessage::ScmRights(&fds));
            match rustix::net::sendmsg(socket, &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL) {
                Ok(sent) => return Ok(sent),
                // QEMU reads slowly; the caller's deadline bounds this.
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Err(e) => return Err(closed().with_context(e)),
            }
        }
    }

    async fn run(
        &self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        limit: Duration,
    ) -> Result<Said> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (send, receive) = oneshot::channel();
        match self.pending.lock() {
            Ok(mut p) => match p.as_mut() {
                Some(p) => drop(p.insert(id, send)),
                None => return Err(closed()),
            },
            Err(_) => return Err(closed()),
        }
        let mut line = json!({"execute": command, "arguments": arguments, "id": id}).to_string();
        line.push('\n');
        let work = async {
            {
                let mut writer = self.writer.lock().await;
                let sent = match fd {
                    Some(fd) => self.send_fd(line.as_bytes(), fd).await?,
                    None => 0,
                };
                writer.write_all(&line.as_bytes()[sent..]).await.map_err(|e| closed().with_context(e))?;
            }
            receive.await.map_err(|_| closed())
        };
        let result = timeout(limit, work).await.unwrap_or_else(|_| {
            Err(Error::timeout(format!("QEMU did not answer {command} within {limit:?}")))
        });
        if result.is_err()
            && let Ok(mut p) = self.pending.lock()
            && let Some(p) = p.as_mut()
        {
            p.remove(&id);
        }
        result
    }
}

async fn read_all<R: AsyncRead + Unpin>(
    mut lines: Lines<R>,
    pending: &Pending,
    events: &mpsc::Sender<Event>,
) -> Result<()> {
    while let Some(line) = lines.next().await? {
        if line.is_empty() {
            continue;
        }
        let mut message = object(&line)?;
        if let Some(Value::String(name)) = message.remove("event") {
            let data = match message.remove("data") {
                Some(Value::Object(data)) => data,
                _ => Map::new(),
            };
            let at = message.get("timestamp");
            let number = |key: &str| at.and_then(|t| t.get(key)).and_then(Value::as_i64).unwrap_or(0);
            let at = (number("seconds"), u32::try_from(number("microseconds")).unwrap_or(0));
            if events.try_send(Event { name, data, at }).is_err() {
                tracing::debug!("a QMP event was dropped: its owner is slow or gone");
            }
            continue;
        }
        let Some(id) = message.get("id").and_then(Value::as_u64) else {
            continue;
        };
        let waiter = pending.lock().ok().and_then(|mut p| p.as_mut().and_then(|p| p.remove(&id)));
        // An id nobody waits for: the answer came after the deadline.
        let Some(waiter) = waiter else { continue };
        let result = match message.remove("error") {
            Some(e) => {
                let field = |k: &str| printable(e.get(k).and_then(Value::as_str).unwrap_or("?"), 500);
                Err(Refusal { class: field("class"), description: field("desc") })
            }
            None => Ok(message.remove("return").unwrap_or(Value::Null)),
        };
        let _ = waiter.send(result);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::ErrorKind;
    use tokio::io::{AsyncBufReadExt, BufReader, DuplexStream, duplex, split};

    const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\n";

    /// A server that greets, then answers each request line by `answer`.
    fn server(answer: impl Fn(Value) -> String + Send + 'static) -> DuplexStream {
        let (ours, theirs) = duplex(1 << 16);
        tokio::spawn(async move {
            let (read, mut write) = split(theirs);
            if write.write_all(GREETING.as_bytes()).await.is_err() {
                return;
            }
            let mut lines = BufReader::new(read).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let text = answer(serde_json::from_str(&line).unwrap());
                if write.write_all(text.as_bytes()).await.is_err() {
                    return;
                }
            }
        });
        ours
    }

    async fn open(stream: DuplexStream) -> Result<(Qmp, mpsc::Receiver<Event>)> {
        let (r, w) = split(stream);
        Qmp::negotiate(r, w).await
    }

    #[tokio::test]
    async fn what_is_told_before_the_greeting_is_passed_over() {
        let early = "{\"event\":\"STOP\",\"timestamp\":{\"seconds\":7,\"microseconds\":9}}\n";
        for (said, fine) in [(early, true), ("{\"return\":{}}\n", false)] {
            let (ours, mut theirs) = duplex(1 << 16);
            theirs.write_all(format!("{said}{GREETING}").as_bytes()).await.unwrap();
            let answering = tokio::spawn(async move {
                let mut lines = BufReader::new(&mut theirs).lines();
                let Ok(Some(line)) = lines.next_line().await else { return };
                let asked: Value = serde_json::from_str(&line).unwrap();
                let answer = ok(&asked);
                drop(lines);
                theirs.write_all(answer.as_bytes()).await.unwrap();
            });
            assert_eq!(open(ours).await.map(drop).is_ok(), fine, "{said}");
            answering.await.unwrap();
        }
    }

    fn ok(v: &Value) -> String {
        format!("{{\"return\": {{}}, \"id\": {}}}\n", v["id"])
    }

    #[tokio::test]
    async fn answers_events_and_errors() {
        let (q, mut events) = open(server(|v| match v["execute"].as_str().unwrap() {
            "query-status" => format!(
                "{{\"event\":\"STOP\",\"timestamp\":{{\"seconds\":7,\"microseconds\":9}}}}\n{{\"return\":{{\"x\":1}},\"id\":77777}}\n{{\"return\":{{\"status\":\"running\"}},\"id\":{}}}\n",
                v["id"]
            ),
            "bad" => format!("{{\"error\":{{\"class\":\"GenericError\",\"desc\":\"no\\u0007pe\"}},\"id\":{}}}\n", v["id"]),
            _ => ok(&v),
        }))
        .await
        .unwrap();
        assert_eq!(q.execute("query-status", json!({})).await.unwrap()["status"], "running");
        let stop = events.recv().await.unwrap();
        assert_eq!((stop.name.as_str(), stop.at), ("STOP", (7, 9)));
        let refused = q.ask(COMMAND, "bad", json!({})).await.unwrap().unwrap_err();
        assert_eq!(refused, Refusal { class: "GenericError".into(), description: "no pe".into() });
        let e = q.execute("bad", json!({})).await.unwrap_err();
        assert_eq!(e.context.as_deref(), Some("GenericError: no pe"));
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_a_timeout_and_a_late_answer_goes_nowhere() {
        let (q, _e) =
            open(server(|v| if v["execute"] == "mute" { String::new() } else { ok(&v) })).await.unwrap();
        assert!(q.execute("mute", json!({})).await.unwrap_err().is(ErrorKind::Timeout));
        q.execute("other", json!({})).await.unwrap();
        assert!(q.pending.lock().unwrap().as_ref().unwrap().is_empty(), "nothing is kept for it");
    }

    #[tokio::test]
    async fn garbage_and_endless_lines_end_the_connection() {
        for junk in ["not json\n".to_owned(), "[1]\n".to_owned(), "x".repeat(2 << 20)] {
            let (q, mut events) =
                open(server(move |v| if v["execute"] == "go" { junk.clone() } else { ok(&v) }))
                    .await
                    .unwrap();
            assert!(q.execute("go", json!({})).await.unwrap_err().is(ErrorKind::Unavailable));
            assert!(events.recv().await.is_none());
            assert!(q.execute("later", json!({})).await.unwrap_err().is(ErrorKind::Unavailable));
        }
    }

    #[tokio::test]
    async fn a_flood_of_events_does_not_grow_memory() {
        let (q, mut events) = open(server(|v| {
            if v["execute"] == "flood" {
                format!("{}{}", "{\"event\":\"RTC_CHANGE\"}\n".repeat(2000), ok(&v))
            } else {
                ok(&v)
            }
        }))
        .await
        .unwrap();
        q.execute("flood", json!({})).await.unwrap();
        drop(q);
        let mut n = 0;
        while events.recv().await.is_some() {
            n += 1;
        }
        assert_eq!(n, EVENTS);
    }
}
