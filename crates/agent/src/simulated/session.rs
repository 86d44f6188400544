//! Sessions of simulated guests: real descriptors, and a thread that plays the program behind them.
#![allow(clippy::disallowed_methods)] // its sleep is a program's own, in real time and ended by signals

use karst_model::{InstanceId, Result, guest::ExecRequest};
use rustix::{
    event::{PollFd, PollFlags, poll},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
    pipe::{PipeFlags, pipe_with},
};
use std::{
    fs::File,
    io::{Read, Write},
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicI32, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// A session; clones share it.
#[derive(Clone)]
pub(super) struct Session {
    pub instance: InstanceId,
    pub kind: SessionKind,
    pub ends_with_guest: bool,
    /// The port that it is attached to; the console when there is none.
    pub port: Option<String>,
    shared: Arc<Shared>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SessionKind {
    Exec,
    Console,
    /// A display.
    Display,
    FileWrite,
}

struct Shared {
    exit: watch::Sender<Option<i32>>,
    signal: AtomicI32,
    /// Columns and rows.
    size: AtomicU32,
    /// A byte is written here when a signal comes.
    wake: OwnedFd,
}

impl Session {
    pub fn exit(&self) -> Option<i32> {
        *self.shared.exit.borrow()
    }

    pub async fn wait(&self) -> i32 {
        let mut exit = self.shared.exit.subscribe();
        // The sender lives in what we hold.
        let code = exit.wait_for(Option::is_some).await.ok().and_then(|c| *c);
        code.unwrap_or(255)
    }

    /// Delivers a signal; those that a program ignores by default do nothing.
    pub fn signal(&self, signal: i32) {
        if !matches!(signal, 0 | 17 | 18 | 23 | 28) {
            self.shared.signal.store(signal, Ordering::SeqCst);
            let _ = rustix::io::write(&self.shared.wake, &[1]);
        }
    }

    pub fn resize(&self, columns: u16, rows: u16) {
        self.shared.size.store(u32::from(columns) << 16 | u32::from(rows), Ordering::SeqCst);
    }

    pub fn end(&self) {
        self.signal(9);
    }

    fn new(instance: InstanceId, kind: SessionKind) -> Result<(Self, OwnedFd)> {
        let (woken, wake) =
            pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(std::io::Error::from)?;
        let session = Self {
            instance,
            kind,
            ends_with_guest: kind != SessionKind::FileWrite,
            port: None,
            shared: Arc::new(Shared {
                exit: watch::Sender::new(None),
                signal: AtomicI32::new(0),
                size: AtomicU32::new(0),
                wake,
            }),
        };
        Ok((session, woken))
    }

    fn play(&self, what: &str, program: impl FnOnce() -> i32 + Send + 'static) -> Result<()> {
        let shared = self.shared.clone();
        let run = move || {
            let code = program();
            shared.exit.send_replace(Some(code));
        };
        std::thread::Builder::new().name(what.into()).stack_size(128 << 10).spawn(run)?;
        Ok(())
    }

    /// Runs a program of the built-in few.
    pub fn exec(instance: InstanceId, hostname: &str, request: ExecRequest) -> Result<(Self, Vec<OwnedFd>)> {
        let (session, woken) = Self::new(instance, SessionKind::Exec)?;
        let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(std::io::Error::from);
        let (ours, theirs) = match request.terminal {
            Some((columns, rows)) => {
                session.resize(columns, rows);
                let (near, far) = pair()?;
                let far2 = far.try_clone()?;
                ((far.try_clone()?, far2, far), vec![near])
            }
            None => {
                let (stdin, stdout, stderr) = (pipe()?, pipe()?, pipe()?);
                ((stdin.0, stdout.1, stderr.1), vec![stdin.1, stdout.0, stderr.0])
            }
        };
        let mut process = Process {
            shared: session.shared.clone(),
            woken,
            stdin: Some(ours.0.into()),
            stdout: ours.1.into(),
            stderr: ours.2.into(),
            hostname: hostname.to_owned(),
            request: request.clone(),
        };
        session.play("simulated-exec", move || match process.run(&request.command) {
            Ok(code) | Err(code) => code,
        })?;
        Ok((session, theirs))
    }

    /// A console: what is typed is echoed and given to `log`.
    pub fn console(instance: InstanceId, log: impl Fn(&[u8]) + Send + 'static) -> Result<(Self, OwnedFd)> {
        Self::echo(instance, SessionKind::Console, (b"", false), log)
    }

    /// A display: greets as RFB does, offers "VNC authentication" alone if it is guarded, then echoes.
    pub fn display(instance: InstanceId, guarded: bool) -> Result<(Self, OwnedFd)> {
        let greeting: &[u8] = if guarded { b"RFB 003.008\n\x01\x02" } else { b"RFB 003.008\n" };
        Self::echo(instance, SessionKind::Display, (greeting, false), |_| {})
    }

    /// A display that speaks SPICE, as far as the header of its first answer, which comes when it was spoken to; then it echoes.
    pub fn spice(instance: InstanceId) -> Result<(Self, OwnedFd)> {
        // Magic, version 2.2, and the length of what is not there.
        let answer: &[u8] = b"REDQ\x02\0\0\0\x02\0\0\0\0\0\0\0";
        Self::echo(instance, SessionKind::Display, (answer, true), |_| {})
    }

    /// `after`: the greeting answers what is said first, which is not echoed then.
    fn echo(
        instance: InstanceId,
        kind: SessionKind,
        (greeting, after): (&'static [u8], bool),
        log: impl Fn(&[u8]) + Send + 'static,
    ) -> Result<(Self, OwnedFd)> {
        let (session, woken) = Self::new(instance, kind)?;
        let (near, far) = pair()?;
        session.play("simulated-console", move || {
            let mut far = File::from(far);
            let mut buffer = [0; 4096];
            if after && !(readable(&far, &woken, None) && matches!(far.read(&mut buffer), Ok(1..))) {
                return 0;
            }
            if far.write_all(greeting).is_err() {
                return 0;
            }
            while readable(&far, &woken, None) {
                match far.read(&mut buffer) {
                    Ok(n @ 1..) => {
                        log(&buffer[..n]);
                        if far.write_all(&buffer[..n]).is_err() {
                            break;
                        }
                    }
                    _ => break,
                }
            }
            0
        })?;
        Ok((session, near))
    }

    /// A file to be written: `commit` gets its whole content.
    pub fn file_write(
        instance: InstanceId,
        commit: impl FnOnce(Vec<u8>) -> Result<()> + Send + 'static,
    ) -> Result<(Self, OwnedFd)> {
        const LARGEST: u64 = 64 << 20;
        let (session, woken) = Self::new(instance, SessionKind::FileWrite)?;
        let (source, sink) = pipe_with(PipeFlags::CLOEXEC).map_err(std::io::Error::from)?;
        session.play("simulated-file", move || {
            let mut source = File::from(source);
            let (mut content, mut buffer) = (vec![], [0; 16 << 10]);
            while readable(&source, &woken, None) {
                match source.read(&mut buffer) {
                    Ok(0) => return if commit(content).is_ok() { 0 } else { 1 },
                    Ok(n) if content.len() as u64 + n as u64 <= LARGEST => {
                        content.extend_from_slice(&buffer[..n])
                    }
                    _ => return 1,
                }
            }
            1
        })?;
        Ok((session, sink))
    }
}

impl Session {
    /// Nothing goes on in it; it lasts until it is closed.
    pub fn held(instance: InstanceId) -> Result<Self> {
        let (session, woken) = Self::new(instance, SessionKind::FileWrite)?;
        let (never, keep) = pipe_with(PipeFlags::CLOEXEC).map_err(std::io::Error::from)?;
        session.play("simulated-held", move || {
            readable(&never, &woken, None);
            drop(keep);
            137
        })?;
        Ok(session)
    }

    /// A stream of `data` to read.
    pub fn export(instance: InstanceId, data: Vec<u8>) -> Result<(Self, OwnedFd)> {
        let (session, woken) = Self::new(instance, SessionKind::FileWrite)?;
        let (source, sink) = pipe_with(PipeFlags::CLOEXEC).map_err(std::io::Error::from)?;
        rustix::io::ioctl_fionbio(&sink, true).map_err(std::io::Error::from)?;
        session.play("simulated-export", move || {
            let mut rest = data.as_slice();
            while !rest.is_empty() {
                let mut set = [PollFd::new(&woken, PollFlags::IN), PollFd::new(&sink, PollFlags::OUT)];
                match poll(&mut set, None) {
                    Err(rustix::io::Errno::INTR) => continue,
                    Ok(_) if set[0].revents().is_empty() => {}
                    _ => return 1,
                }
                match rustix::io::write(&sink, rest) {
                    Ok(n) => rest = &rest[n..],
                    Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                    Err(_) => return 1,
                }
            }
            0
        })?;
        Ok((session, source))
    }
}

fn pair() -> Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(std::io::Error::from)?)
}

/// Waits until `source` can be read (or is at its end); false when a signal came first or the time is up.
fn readable(source: &impl AsFd, woken: &OwnedFd, limit: Option<Duration>) -> bool {
    let mut set = [PollFd::new(woken, PollFlags::IN), PollFd::new(source, PollFlags::IN)];
    let limit = limit
        .map(|d| rustix::event::Timespec { tv_sec: d.as_secs() as i64, tv_nsec: d.subsec_nanos().into() });
    loop {
        match poll(&mut set, limit.as_ref()) {
            Ok(0) => return false,
            Ok(_) => return set[0].revents().is_empty(),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// A program that runs; `Err` is its exit code too, when it ends early.
struct Process {
    shared: Arc<Shared>,
    woken: OwnedFd,
    stdin: Option<File>,
    stdout: File,
    stderr: File,
    hostname: String,
    request: ExecRequest,
}

impl Process {
    fn check(&self) -> Result<(), i32> {
        match self.shared.signal.load(Ordering::SeqCst) {
            0 => Ok(()),
            n => Err(128 + n),
        }
    }

    fn print(&mut self, error: bool, text: &str) -> Result<(), i32> {
        let text = if self.request.terminal.is_some() { text.replace('\n', "\r\n") } else { text.to_owned() };
        let sink = if error { &mut self.stderr } else { &mut self.stdout };
        sink.write_all(text.as_bytes()).map_err(|_| 128 + 13)
    }

    fn run(&mut self, command: &[String]) -> Result<i32, i32> {
        self.check()?;
        let words: Vec<&str> = command.iter().map(String::as_str).collect();
        let (program, args) = words.split_first().ok_or(127)?;
        match program.rsplit('/').next().unwrap_or(program) {
            "true" => Ok(0),
            "false" => Ok(1),
            "echo" => self.print(false, &(args.join(" ") + "\n")).map(|()| 0),
            "hostname" => self.print(false, &format!("{}\n", self.hostname)).map(|()| 0),
            "pwd" => {
                let cwd = self.request.cwd.clone().unwrap_or_else(|| "/root".into());
                self.print(false, &(cwd + "\n")).map(|()| 0)
            }
            "id" => {
                let n = if args.contains(&"-g") { self.request.gid } else { self.request.uid };
                self.print(false, &format!("{n}\n")).map(|()| 0)
            }
            "printenv" => match args.first().and_then(|k| self.request.environment.get(*k)).cloned() {
                Some(value) => self.print(false, &(value + "\n")).map(|()| 0),
                None => Ok(1),
            },
            "stty" if args == ["size"] => {
                let size = self.shared.size.load(Ordering::SeqCst);
                self.print(false, &format!("{} {}\n", size & 0xffff, size >> 16)).map(|()| 0)
            }
            "cat" if args.is_empty() => self.cat(),
            "sleep" => {
                let seconds =
                    args.first().and_then(|s| if *s == "infinity" { Some(1e9) } else { s.parse().ok() });
                let seconds: f64 = seconds.ok_or(1)?;
                let until = Instant::now() + Duration::from_secs_f64(seconds.clamp(0.0, 1e9));
                // Waits on nothing but the signal.
                let (never, _keep) = pipe_with(PipeFlags::CLOEXEC).map_err(|_| 1)?;
                while Instant::now() < until {
                    readable(&never, &self.woken, Some(until.saturating_duration_since(Instant::now())));
                    self.check()?;
                }
                Ok(0)
            }
            "exit" => Err(args.first().and_then(|s| s.parse().ok()).unwrap_or(0)),
            "sh" | "bash" => match args {
                ["-c", script, ..] => self.script(script),
                _ => self.cat(),
            },
            other => {
                let text = format!("sh: 1: {other}: not found\n");
                self.print(true, &text).map(|()| 127)
            }
        }
    }

    /// Commands separated by `;`, words by spaces; `>&2` at the end sends the output to stderr.
    fn script(&mut self, script: &str) -> Result<i32, i32> {
        let mut code = 0;
        for line in script.split([';', '\n']) {
            let mut words: Vec<String> =
                line.split_whitespace().map(|w| w.trim_matches(['\'', '"']).to_owned()).collect();
            let to_stderr = words.last().is_some_and(|w| w == ">&2");
            if to_stderr {
                words.pop();
                std::mem::swap(&mut self.stdout, &mut self.stderr);
            }
            if !words.is_empty() {
                let outcome = self.run(&words);
                if to_stderr {
                    std::mem::swap(&mut self.stdout, &mut self.stderr);
                }
                code = outcome?;
            }
        }
        Ok(code)
    }

    fn cat(&mut self) -> Result<i32, i32> {
        let Some(mut stdin) = self.stdin.take() else {
            return Ok(0);
        };
        let mut buffer = [0; 16 << 10];
        loop {
            if !readable(&stdin, &self.woken, None) {
                self.check()?;
                return Ok(1);
            }
            match stdin.read(&mut buffer) {
                Ok(0) => return Ok(0),
                Ok(n) => self.stdout.write_all(&buffer[..n]).map_err(|_| 128 + 13)?,
                Err(_) => return Err(1),
            }
        }
    }
}
