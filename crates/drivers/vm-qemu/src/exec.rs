//! Programs inside a guest by the QEMU guest agent.
//!
//! The agent takes standard input at the start only and gives output at the end, and it has no terminals. So input is
//! collected to its end (at most 8 MiB) before the program starts; input that stays open and empty for a second is taken
//! as none (clients keep it open), and a byte that comes later ends the program with an error rather than being lost
//! silently. With a terminal the program runs without input, both outputs merged, lines ended as a terminal does; Ctrl-C
//! interrupts it. An interactive shell is on the console.

use crate::agent::{Agent, Ended};
use async_trait::async_trait;
use karst_guest::{Exec, ExecControl, ExecRequest, ExecStreams};
use karst_model::{Error, Result};
use rustix::{
    fs::{FileType, fstat},
    pipe::{PipeFlags, pipe_with},
};
use std::{collections::BTreeMap, os::fd::OwnedFd, pin::Pin, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::unix::pipe,
    sync::{mpsc, watch},
};

/// Most standard input.
const STDIN: usize = 8 << 20;
/// Silence after which open input is taken as none.
const NO_INPUT: Duration = Duration::from_secs(1);
/// What the guest's programs get when the request does not say otherwise.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// `$1` working directory or empty, `$2` uid, `$3` gid, `$4` merge outputs, then the program. Its own session, so that a
/// signal reaches all of it; 126 and 127 as a shell has them.
const SCRIPT: &str = r#"if [ -n "$1" ]; then cd -- "$1" || exit 126; else cd /root 2>/dev/null || cd /; fi
u=$2; g=$3; [ -z "$4" ] || exec 2>&1; shift 4
if [ "$u:$g" = 0:0 ]; then
  if command -v setsid >/dev/null; then exec setsid "$@"; else exec "$@"; fi
fi
exec setsid setpriv --reuid "$u" --regid "$g" --clear-groups -- "$@""#;

type Outcome = watch::Receiver<Option<Result<i32>>>;

struct Control {
    signals: mpsc::Sender<i32>,
    outcome: Outcome,
}

#[async_trait]
impl ExecControl for Control {
    async fn resize(&self, _columns: u16, _rows: u16) -> Result<()> {
        Ok(())
    }
    async fn signal(&self, signal: i32) -> Result<()> {
        if !(1..=64).contains(&signal) {
            return Err(Error::invalid("signal", format!("{signal} is no signal")));
        }
        match self.signals.try_send(signal) {
            Err(mpsc::error::TrySendError::Full(_)) => {
                Err(Error::unavailable("too many signals are on the way"))
            }
            _ => Ok(()),
        }
    }
    async fn wait(&self) -> Result<i32> {
        let mut outcome = self.outcome.clone();
        let result = outcome.wait_for(Option::is_some).await;
        match result.as_deref() {
            Ok(Some(r)) => r.clone(),
            _ => Err(Error::internal("the program's end was not seen", "its task ended")),
        }
    }
}

pub(crate) type Reader = Pin<Box<dyn AsyncRead + Send>>;
pub(crate) type Writer = Pin<Box<dyn AsyncWrite + Send>>;

fn nonblocking(fd: OwnedFd) -> Result<OwnedFd> {
    rustix::io::ioctl_fionbio(&fd, true).map_err(std::io::Error::from)?;
    Ok(fd)
}

/// What a client sends. On a pipe no thread waits for it: the host's are few, all else that it does with files needs them, and
/// a client may send nothing for as long as it likes. A regular file cannot be polled, and lets nobody wait.
pub(crate) fn source(fd: OwnedFd) -> Result<Reader> {
    let status = fstat(&fd).map_err(std::io::Error::from)?;
    let reader: Reader = match FileType::from_raw_mode(status.st_mode) {
        FileType::RegularFile => Box::pin(tokio::fs::File::from_std(std::fs::File::from(fd))),
        _ => Box::pin(pipe::Receiver::from_owned_fd(nonblocking(fd)?)?),
    };
    Ok(reader)
}

pub(crate) fn pipes() -> Result<(ExecStreams, Reader, Writer, Writer)> {
    let new = || pipe_with(PipeFlags::CLOEXEC).map_err(|e| Error::from(std::io::Error::from(e)));
    let ((in_read, in_write), (out_read, out_write), (err_read, err_write)) = (new()?, new()?, new()?);
    Ok((
        ExecStreams::Pipes { stdin: in_write, stdout: out_read, stderr: err_read },
        Box::pin(pipe::Receiver::from_owned_fd(nonblocking(in_read)?)?),
        Box::pin(pipe::Sender::from_owned_fd(nonblocking(out_write)?)?),
        Box::pin(pipe::Sender::from_owned_fd(nonblocking(err_write)?)?),
    ))
}

pub(crate) fn terminal() -> Result<(ExecStreams, Reader, Writer, Writer)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let (read, write) = tokio::net::UnixStream::from_std(ours)?.into_split();
    Ok((ExecStreams::Terminal(theirs.into()), Box::pin(read), Box::pin(write), Box::pin(tokio::io::sink())))
}

/// Starts it; `base` is the environment of the guest's record.
///
/// # Errors
/// Invalid for an empty command; unavailable when the agent does not answer; unsupported when it forbids programs.
pub async fn start(agent: Arc<Agent>, base: &BTreeMap<String, String>, request: ExecRequest) -> Result<Exec> {
    if request.command.is_empty() {
        return Err(Error::invalid("command", "the command is empty"));
    }
    for s in request.command.iter().chain(request.cwd.iter()) {
        if s.contains('\0') {
            return Err(Error::invalid("command", "the command holds a NUL byte"));
        }
    }
    // Told at once rather than by an exit code.
    match &request.cwd {
        None => agent.ping(Duration::from_secs(5)).await?,
        Some(cwd) => {
            let test =
                agent.run(&["/bin/sh", "-c", r#"[ -d "$1" ]"#, "sh", cwd], Duration::from_secs(10)).await?;
            if test.code != 0 {
                return Err(Error::invalid("cwd", format!("{cwd:?} is not a directory in the guest")));
            }
        }
    }
    let mut env: BTreeMap<String, String> =
        BTreeMap::from([("PATH".into(), PATH.into()), ("LANG".into(), "C.UTF-8".into())]);
    if request.uid == 0 {
        env.extend([("HOME".to_owned(), "/root".to_owned()), ("USER".to_owned(), "root".to_owned())]);
    }
    if let (Some(_), Some(term)) = (request.terminal, &request.term) {
        env.insert("TERM".into(), term.clone());
    }
    env.extend(base.clone());
    env.extend(request.environment.clone());
    let env: Vec<String> = env.iter().map(|(k, v)| format!("{k}={v}")).collect();

    let with_terminal = request.terminal.is_some();
    let (streams, stdin, stdout, stderr) = if with_terminal { terminal()? } else { pipes()? };
    let (signals, signal_receiver) = mpsc::channel(16);
    let (outcome_sender, outcome) = watch::channel(None);
    let mut task = Task { agent, env, request, signals: signal_receiver, stdin };
    tokio::spawn(async move {
        let result = match task.run(with_terminal).await {
            Ok(ended) => deliver(ended, stdout, stderr, with_terminal).await,
            Err(e) => {
                drop((stdout, stderr));
                Err(e)
            }
        };
        let _ = outcome_sender.send(Some(result));
    });
    Ok(Exec { streams, control: Box::new(Control { signals, outcome }) })
}

async fn deliver(ended: Ended, mut stdout: Writer, mut stderr: Writer, with_terminal: bool) -> Result<i32> {
    let out = if with_terminal { newlines(&ended.stdout) } else { ended.stdout };
    // A reader that left is its own matter.
    let _ = tokio::join!(async move { stdout.write_all(&out).await }, async move {
        stderr.write_all(&ended.stderr).await
    });
    if ended.truncated {
        return Err(Error::too_large(
            "the program wrote more than the 16 MiB that the guest agent keeps; let it write to a file and pull that",
        ));
    }
    Ok(ended.code)
}

fn newlines(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len() + text.len() / 16);
    for b in text {
        if *b == b'\n' {
            out.push(b'\r');
        }
        out.push(*b);
    }
    out
}

struct Task {
    agent: Arc<Agent>,
    env: Vec<String>,
    request: ExecRequest,
    signals: mpsc::Receiver<i32>,
    stdin: Reader,
}

fn gone() -> Error {
    Error::cancelled("nobody waits for the program any more")
}

impl Task {
    /// Collects standard input. `Err(n)`: a signal came before the start.
    async fn collect(&mut self) -> Result<Result<(Vec<u8>, bool), i32>> {
        let mut input = vec![];
        let silence = tokio::time::sleep(NO_INPUT);
        tokio::pin!(silence);
        loop {
            tokio::select! {
                n = self.stdin.read_buf(&mut input) => match n {
                    Ok(1..) if input.len() <= STDIN => {}
                    Ok(1..) => return Err(Error::too_large(
                        "a program in a virtual machine takes at most 8 MiB of standard input; push a file instead")),
                    _ => return Ok(Ok((input, true))),
                },
                () = &mut silence, if input.is_empty() => return Ok(Ok((input, false))),
                s = self.signals.recv() => match s {
                    Some(s) => return Ok(Err(128 + s)),
                    None => return Err(gone()),
                },
            }
        }
    }

    async fn run(&mut self, with_terminal: bool) -> Result<Ended> {
        let (input, mut input_ended) = if with_terminal {
            (vec![], false)
        } else {
            match self.collect().await? {
                Ok(x) => x,
                Err(code) => {
                    return Ok(Ended { code, ..Ended::default() });
                }
            }
        };
        let (uid, gid) = (self.request.uid.to_string(), self.request.gid.to_string());
        let merge = if with_terminal { "1" } else { "" };
        let cwd = self.request.cwd.as_deref().unwrap_or("");
        let mut argv = vec!["/bin/sh", "-c", SCRIPT, "sh", cwd, &uid, &gid, merge];
        argv.extend(self.request.command.iter().map(String::as_str));
        let pid = self.agent.spawn(&argv, &self.env, &input).await?;
        drop(input);

        let mut pause = Duration::from_millis(2);
        let mut late = [0u8; 256];
        loop {
            if let Some(ended) = self.agent.poll(pid).await? {
                return Ok(ended);
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => pause = (pause * 3 / 2).min(Duration::from_millis(200)),
                s = self.signals.recv() => match s {
                    Some(s) => {
                        kill(&self.agent, pid, s).await?;
                        pause = Duration::from_millis(2);
                    }
                    None => {
                        kill(&self.agent, pid, 9).await?;
                        return Err(gone());
                    }
                },
                n = self.stdin.read(&mut late), if !input_ended => match n {
                    Ok(n @ 1..) if with_terminal => {
                        if late[..n].contains(&3) {
                            kill(&self.agent, pid, 2).await?;
                        }
                    }
                    Ok(1..) => {
                        kill(&self.agent, pid, 9).await?;
                        return Err(Error::unsupported(
                            "standard input came later than one second after the start: the guest agent takes input \
                             only at once; push a file instead"));
                    }
                    _ => input_ended = true,
                },
            }
        }
    }
}

/// To the program's session, and to the program itself where there is no `setsid` in the guest.
async fn kill(agent: &Agent, pid: u64, signal: i32) -> Result<()> {
    let (signal, pid) = (signal.to_string(), pid.to_string());
    let script = r#"kill -s "$1" -- "-$2" 2>/dev/null || kill -s "$1" -- "$2""#;
    agent.run(&["/bin/sh", "-c", script, "sh", &signal, &pid], Duration::from_secs(10)).await.map(drop)
}

/// Clients that begin to send a file and then stop.
#[cfg(test)]
pub(crate) mod stalled {
    use super::*;
    use std::time::Instant;
    use tokio::task::JoinHandle;

    const PATIENCE: Duration = Duration::from_secs(30);

    /// Waits until somebody has taken what is in a client's pipe.
    pub(crate) async fn taken(client: &OwnedFd) {
        let end = Instant::now() + PATIENCE;
        while rustix::io::ioctl_fionread(client).unwrap() > 0 {
            assert!(Instant::now() < end, "nobody takes what a client has sent");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) struct Writes {
        clients: Vec<OwnedFd>,
        writes: Vec<JoinHandle<Result<()>>>,
    }

    impl Writes {
        /// Begins as many, each by `write` of its number and what its client sends.
        pub(crate) fn begin<F: Future<Output = Result<()>> + Send + 'static>(
            count: usize,
            write: impl Fn(usize, OwnedFd) -> F,
        ) -> Self {
            let (mut clients, mut writes) = (vec![], vec![]);
            for n in 0..count {
                let (source, client) = pipe_with(PipeFlags::CLOEXEC).unwrap();
                rustix::io::write(&client, b"some").unwrap();
                writes.push(tokio::spawn(write(n, source)));
                clients.push(client);
            }
            Self { clients, writes }
        }

        /// All go on at once in a runtime with one thread for work that blocks, and leave that to others; each is whole once
        /// its client has sent the rest.
        pub(crate) async fn hold_no_thread(self) {
            for client in &self.clients {
                taken(client).await;
            }
            let other = tokio::time::timeout(PATIENCE, tokio::task::spawn_blocking(|| ())).await;
            other.expect("the thread that all share waits for a client").unwrap();
            for client in self.clients {
                rustix::io::write(&client, b" and the rest").unwrap();
            }
            for write in self.writes {
                tokio::time::timeout(PATIENCE, write).await.expect("a write does not end").unwrap().unwrap();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::tests::{fake, sync};
    use serde_json::Value;
    use std::{
        io::{Read, Write},
        sync::Mutex,
    };

    fn request(command: &[&str]) -> ExecRequest {
        ExecRequest {
            command: command.iter().map(|s| s.to_string()).collect(),
            environment: BTreeMap::from([("A".into(), "b c".into())]),
            uid: 0,
            gid: 0,
            cwd: None,
            terminal: None,
            term: None,
        }
    }

    /// Answers `guest-exec` and keeps what was asked; every program says `hi` and exits with 7 at its second poll.
    fn recording() -> (tempfile::TempDir, Arc<Agent>, Arc<Mutex<Vec<Value>>>) {
        let seen: Arc<Mutex<Vec<Value>>> = Arc::default();
        let (dir, agent) = fake({
            let seen = seen.clone();
            move |v| {
                sync(v).or_else(|| {
                    let n = {
                        let mut seen = seen.lock().unwrap();
                        seen.push(v.clone());
                        seen.iter().filter(|s| s["execute"] == "guest-exec-status").count()
                    };
                    Some(match v["execute"].as_str() {
                        Some("guest-exec") => b"{\"return\": {\"pid\": 5}}\n".to_vec(),
                        Some("guest-exec-status") if n > 1 => {
                            b"{\"return\": {\"exited\": true, \"exitcode\": 7, \"out-data\": \"aGkK\"}}\n"
                                .to_vec()
                        }
                        Some("guest-exec-status") => b"{\"return\": {\"exited\": false}}\n".to_vec(),
                        _ => b"{\"return\": {}}\n".to_vec(),
                    })
                })
            }
        });
        (dir, Arc::new(agent), seen)
    }

    #[tokio::test]
    async fn input_goes_in_output_and_code_come_out() {
        let (_d, agent, seen) = recording();
        let exec = start(agent, &BTreeMap::new(), request(&["cat", "; rm -rf /"])).await.unwrap();
        let ExecStreams::Pipes { stdin, stdout, stderr } = exec.streams else { panic!("pipes") };
        std::fs::File::from(stdin).write_all(b"in").unwrap();
        assert_eq!(exec.control.wait().await.unwrap(), 7);
        let (mut out, mut err) = (String::new(), String::new());
        std::fs::File::from(stdout).read_to_string(&mut out).unwrap();
        std::fs::File::from(stderr).read_to_string(&mut err).unwrap();
        assert_eq!((out.as_str(), err.as_str()), ("hi\n", ""));
        let seen = seen.lock().unwrap();
        let run = seen.iter().find(|s| s["execute"] == "guest-exec").unwrap();
        assert_eq!(run["arguments"]["input-data"], "aW4=");
        let args = run["arguments"]["arg"].as_array().unwrap();
        assert_eq!(args[args.len() - 2..], ["cat", "; rm -rf /"], "arguments stay apart from the script");
        assert!(run["arguments"]["env"].as_array().unwrap().contains(&"A=b c".into()));
    }

    #[tokio::test]
    async fn a_terminal_is_merged_output_with_its_line_ends() {
        let (_d, agent, _) = recording();
        let exec =
            start(agent, &BTreeMap::new(), ExecRequest { terminal: Some((80, 24)), ..request(&["x"]) })
                .await
                .unwrap();
        let ExecStreams::Terminal(t) = exec.streams else { panic!("terminal") };
        assert_eq!(exec.control.wait().await.unwrap(), 7);
        let mut text = String::new();
        std::fs::File::from(t).read_to_string(&mut text).unwrap();
        assert_eq!(text, "hi\r\n");
    }

    #[tokio::test]
    async fn dropping_the_control_ends_the_program() {
        let seen: Arc<Mutex<Vec<String>>> = Arc::default();
        let (_d, agent) = fake({
            let seen = seen.clone();
            move |v| {
                sync(v).or_else(|| {
                    if v["execute"] == "guest-exec" {
                        seen.lock().unwrap().push(v["arguments"]["arg"].to_string());
                    }
                    let mine = v["arguments"]["pid"] == 1;
                    Some(match v["execute"].as_str() {
                        Some("guest-exec") => {
                            format!("{{\"return\": {{\"pid\": {}}}}}\n", seen.lock().unwrap().len())
                                .into_bytes()
                        }
                        Some("guest-exec-status") => {
                            format!("{{\"return\": {{\"exited\": {}}}}}\n", !mine).into_bytes()
                        }
                        _ => b"{\"return\": {}}\n".to_vec(),
                    })
                })
            }
        });
        let mut r = request(&["sleep", "1000"]);
        r.terminal = Some((80, 24));
        let exec = start(Arc::new(agent), &BTreeMap::new(), r).await.unwrap();
        let ended = async {
            while seen.lock().unwrap().is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            drop(exec.control);
            while !seen.lock().unwrap().iter().any(|a| a.contains("kill") && a.contains("\"9\",\"1\"")) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), ended).await.unwrap();
    }
}
