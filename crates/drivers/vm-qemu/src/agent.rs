//! Client of the QEMU guest agent (`docs/interop/qemu-ga`): JSON over a virtio-serial port, one command at a time.
//!
//! The agent is the guest's and so not trusted: answers are bounded in size and depth, every call has a deadline, an
//! answer counts only on a connection that was synchronised (`guest-sync-delimited`) after the last deadline passed.

use crate::{
    launch,
    line::{Lines, object, printable},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use karst_model::{Error, Result};
use serde_json::{Value, json};
use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::AsyncWriteExt,
    net::unix::{OwnedReadHalf, OwnedWriteHalf},
    sync::Mutex,
    time::timeout,
};

/// Longest answer: the agent keeps at most 16 MiB of each output of a program, sent in base64.
const ANSWER: usize = 48 << 20;
/// How long synchronising may take; an agent that runs answers within milliseconds.
const SYNC: Duration = Duration::from_secs(3);
/// An unused connection is given back after this: the port serves one client, and there may be a successor of ours.
const IDLE: Duration = Duration::from_millis(300);
/// The byte that `guest-sync-delimited` puts in front of its answer, and that clears the agent's parser.
const DELIMITER: u8 = 0xff;

/// An agent of one guest.
#[derive(Debug)]
pub struct Agent {
    dir: PathBuf,
    name: String,
    connection: Arc<Mutex<Option<Connection>>>,
    /// Grows with each call.
    calls: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Connection {
    lines: Lines<OwnedReadHalf>,
    write: OwnedWriteHalf,
}

/// A program that ran in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ended {
    /// Exit code; 128 + n when signal n ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// Output was cut by the agent at its 16 MiB.
    pub truncated: bool,
}

impl Agent {
    /// The agent behind the socket in the state directory `dir` of the guest that users call `name`. Connects at the first
    /// call.
    pub fn new(dir: PathBuf, name: String) -> Self {
        Self { dir, name, connection: Arc::default(), calls: Arc::default() }
    }

    /// The error for an agent that is not there.
    pub fn silent(&self) -> Error {
        Error::unavailable(format!(
            "the guest agent of {} does not answer; it starts during boot, so try again shortly, and check that the \
             package qemu-guest-agent is installed in the guest",
            self.name
        ))
    }

    fn nonsense(&self, what: impl std::fmt::Display) -> Error {
        Error::unavailable(format!("the guest agent of {} answers nonsense", self.name)).with_context(what)
    }

    async fn connect(&self) -> Result<Connection> {
        let stream =
            launch::connect(&self.dir, launch::AGENT).await.map_err(|e| self.silent().with_context(e))?;
        let (read, mut write) = stream.into_split();
        let mut lines = Lines::new(read, ANSWER);
        // Random enough to tell answers of an earlier connection from ours; not a secret.
        let id = uuid::Uuid::new_v4().as_u128() as u32;
        let mut request = vec![DELIMITER];
        request
            .extend(json!({"execute": "guest-sync-delimited", "arguments": {"id": id}}).to_string().bytes());
        request.push(b'\n');
        write.write_all(&request).await.map_err(|e| self.silent().with_context(e))?;
        // Whatever else was on the way belongs to somebody before us.
        while let Some(line) = lines.next().await? {
            let line = line.rsplit(|b| *b == DELIMITER).next().unwrap_or_default();
            if object(line).is_ok_and(|o| o.get("return").and_then(Value::as_u64) == Some(id.into())) {
                return Ok(Connection { lines, write });
            }
        }
        Err(self.silent())
    }

    /// Runs one command.
    ///
    /// # Errors
    /// Unavailable when the agent does not answer in time or not sensibly; unsupported when it does not have the command
    /// or its configuration forbids it; internal when it refuses, with its text as context.
    pub async fn call(&self, command: &str, arguments: Value, limit: Duration) -> Result<Value> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        let work = async {
            let mut slot = self.connection.lock().await;
            // Taken out, so that a deadline in the middle of an answer leaves no connection that is out of step.
            let mut connection = match slot.take() {
                Some(c) => c,
                None => timeout(SYNC, self.connect()).await.map_err(|_| self.silent())??,
            };
            let mut request = json!({"execute": command, "arguments": arguments}).to_string();
            request.push('\n');
            connection
                .write
                .write_all(request.as_bytes())
                .await
                .map_err(|e| self.silent().with_context(e))?;
            let line =
                connection.lines.next().await.map_err(|e| self.nonsense(e))?.ok_or_else(|| self.silent())?;
            let mut answer = object(&line).map_err(|e| self.nonsense(e.context.unwrap_or_default()))?;
            let result = match (answer.remove("return"), answer.get("error")) {
                (Some(value), None) => Ok(value),
                (None, Some(e)) => Err(self.refused(command, e)),
                _ => return Err(self.nonsense("neither return nor error")),
            };
            *slot = Some(connection);
            result
        };
        let result = timeout(limit, work).await.map_err(|_| self.silent())?;
        let (connection, calls) = (self.connection.clone(), self.calls.clone());
        tokio::spawn(async move {
            tokio::time::sleep(IDLE).await;
            if calls.load(Ordering::Relaxed) == call
                && let Ok(mut unused) = connection.try_lock()
            {
                *unused = None;
            }
        });
        result
    }

    fn refused(&self, command: &str, e: &Value) -> Error {
        let field = |k: &str| printable(e.get(k).and_then(Value::as_str).unwrap_or("?"), 300);
        let (class, text) = (field("class"), field("desc"));
        if class == "CommandNotFound" || text.contains("has been disabled") {
            return Error::unsupported(format!(
                "the guest agent of {} does not allow {command}; its configuration inside the guest decides",
                self.name
            ));
        }
        Error::internal(
            format!("the guest agent of {} refused {command}", self.name),
            format!("{class}: {text}"),
        )
    }

    /// Is it there?
    ///
    /// # Errors
    /// As [`Agent::call`].
    pub async fn ping(&self, limit: Duration) -> Result<()> {
        self.call("guest-ping", json!({}), limit).await.map(drop)
    }

    /// Starts a program; its process id in the guest.
    ///
    /// # Errors
    /// As [`Agent::call`].
    pub async fn spawn(&self, argv: &[&str], env: &[String], stdin: &[u8]) -> Result<u64> {
        let mut arguments = json!({"path": argv.first(), "arg": argv.get(1..), "capture-output": true});
        if !env.is_empty() {
            arguments["env"] = json!(env);
        }
        if !stdin.is_empty() {
            arguments["input-data"] = BASE64_STANDARD.encode(stdin).into();
        }
        let answer = self.call("guest-exec", arguments, Duration::from_secs(30)).await?;
        answer.get("pid").and_then(Value::as_u64).ok_or_else(|| self.nonsense("guest-exec without pid"))
    }

    /// Has it ended?
    ///
    /// # Errors
    /// As [`Agent::call`].
    pub async fn poll(&self, pid: u64) -> Result<Option<Ended>> {
        let a = self.call("guest-exec-status", json!({"pid": pid}), Duration::from_secs(60)).await?;
        if a.get("exited").and_then(Value::as_bool) != Some(true) {
            return Ok(None);
        }
        let data = |k: &str| match a.get(k).and_then(Value::as_str) {
            None => Ok(vec![]),
            Some(s) => BASE64_STANDARD.decode(s).map_err(|e| self.nonsense(e)),
        };
        let number = |k: &str| a.get(k).and_then(Value::as_i64);
        let flag = |k: &str| a.get(k).and_then(Value::as_bool) == Some(true);
        let code = match (number("signal"), number("exitcode")) {
            (Some(s), _) => 128 + (s.clamp(0, 127) as i32),
            (None, c) => c.unwrap_or(0).clamp(0, 255) as i32,
        };
        Ok(Some(Ended {
            code,
            stdout: data("out-data")?,
            stderr: data("err-data")?,
            truncated: flag("out-truncated") || flag("err-truncated"),
        }))
    }

    /// Runs a short program to its end.
    ///
    /// # Errors
    /// As [`Agent::call`]; timeout when it does not end in time.
    pub async fn run(&self, argv: &[&str], limit: Duration) -> Result<Ended> {
        let work = async {
            let pid = self.spawn(argv, &[], &[]).await?;
            let mut pause = Duration::from_millis(2);
            loop {
                if let Some(ended) = self.poll(pid).await? {
                    return Ok(ended);
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(100));
            }
        };
        timeout(limit, work)
            .await
            .map_err(|_| Error::timeout(format!("a program in {} did not end in time", self.name)))?
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use karst_model::ErrorKind;
    use tokio::{io::AsyncReadExt, net::UnixListener};

    /// An agent that answers each request (synchronising included) with what `answer` says; `None` is silence.
    pub(crate) fn fake(
        answer: impl Fn(&Value) -> Option<Vec<u8>> + Send + Sync + 'static,
    ) -> (tempfile::TempDir, Agent) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(launch::AGENT);
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            while let Ok((mut s, _)) = listener.accept().await {
                let mut kept = vec![];
                while let Ok(1..) = s.read_buf(&mut kept).await {
                    while let Some(i) = kept.iter().position(|b| *b == b'\n') {
                        let line: Vec<u8> = kept.drain(..=i).filter(|b| *b != DELIMITER).collect();
                        if let Some(a) = answer(&serde_json::from_slice(&line).unwrap())
                            && s.write_all(&a).await.is_err()
                        {
                            break;
                        }
                    }
                }
            }
        });
        let agent = Agent::new(dir.path().to_owned(), "v1".into());
        (dir, agent)
    }

    pub(crate) fn sync(v: &Value) -> Option<Vec<u8>> {
        (v["execute"] == "guest-sync-delimited").then(|| {
            [&b"\xff"[..], format!("{{\"return\": {}}}\n", v["arguments"]["id"]).as_bytes()].concat()
        })
    }

    const SHORT: Duration = Duration::from_millis(300);

    #[tokio::test]
    async fn synchronises_past_leftovers_and_answers() {
        let (_d, a) = fake(|v| match sync(v) {
            Some(s) => Some([&b"{\"return\": 12}\n\xff{\"return\": 99}\nleft"[..], &s].concat()),
            None => Some(b"{\"return\": {}}\n".to_vec()),
        });
        a.ping(Duration::from_secs(5)).await.unwrap();
        a.ping(Duration::from_secs(5)).await.unwrap();
    }

    #[tokio::test]
    async fn an_agent_that_never_answers_is_unavailable_with_the_reason() {
        let (_d, a) = fake(|_| None);
        let e = a.ping(SHORT).await.unwrap_err();
        assert!(
            e.is(ErrorKind::Unavailable) && e.message.contains("v1") && e.message.contains("boot"),
            "{e}"
        );
        let nobody = Agent::new("/nonexistent/agent".into(), "v1".into());
        assert!(nobody.ping(SHORT).await.unwrap_err().is(ErrorKind::Unavailable));
    }

    #[tokio::test]
    async fn garbage_wrong_ids_floods_and_depth_are_refused_and_the_next_call_starts_afresh() {
        for junk in [
            b"nonsense\n".to_vec(),
            b"[1]\n".to_vec(),
            b"{\"other\": 1}\n".to_vec(),
            format!("{{\"return\": {}{}}}\n", "[".repeat(100_000), "]".repeat(100_000)).into_bytes(),
            vec![b'x'; ANSWER + (1 << 20)],
        ] {
            let (_d, a) = fake(move |v| match v["execute"].as_str() {
                Some("guest-ping") => Some(b"{\"return\": {}}\n".to_vec()),
                Some("guest-info") => Some(junk.clone()),
                _ => sync(v),
            });
            let limit = Duration::from_secs(20);
            assert!(a.call("guest-info", json!({}), limit).await.unwrap_err().is(ErrorKind::Unavailable));
            a.ping(limit).await.unwrap();
        }
        // Answers to synchronisation with the wrong id never count.
        let (_d, a) = fake(|v| {
            Some(if v["execute"] == "guest-ping" {
                b"{\"return\": {}}\n".to_vec()
            } else {
                b"\xff{\"return\": 0}\n".to_vec()
            })
        });
        assert!(a.ping(SHORT).await.unwrap_err().is(ErrorKind::Unavailable));
    }

    #[tokio::test]
    async fn refusals_tell_what_to_do() {
        let (_d, a) = fake(|v| {
            sync(v).or_else(|| {
                Some(b"{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"Command guest-exec has been disabled\"}}\n".to_vec())
            })
        });
        let e = a.spawn(&["/bin/true"], &[], &[]).await.unwrap_err();
        assert!(e.is(ErrorKind::Unsupported) && e.message.contains("guest-exec"), "{e}");
    }

    #[tokio::test]
    async fn ends_by_signal_and_lying_codes() {
        for (body, code) in [
            ("\"exited\": true, \"signal\": 9", 137),
            ("\"exited\": true, \"exitcode\": 7", 7),
            ("\"exited\": true, \"signal\": 99999999", 255),
            ("\"exited\": true, \"exitcode\": -5", 0),
        ] {
            let (_d, a) =
                fake(move |v| sync(v).or_else(|| Some(format!("{{\"return\": {{{body}}}}}\n").into_bytes())));
            assert_eq!(a.poll(1).await.unwrap().unwrap().code, code);
        }
        let (_d, a) = fake(|v| {
            sync(v).or_else(|| Some(b"{\"return\": {\"exited\": true, \"out-data\": \"***\"}}\n".to_vec()))
        });
        assert!(a.poll(1).await.unwrap_err().is(ErrorKind::Unavailable));
    }
}
