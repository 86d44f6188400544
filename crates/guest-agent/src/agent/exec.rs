//! Programs: with a terminal or with three pipes, all in one thread that never blocks but in `poll`.
//!
//! A program leads a session of its own. When the host ends the stream, or goes away, the whole session is killed; with a
//! terminal it is hung up on first. What a program left running in the background after its own end goes on, without us.

use super::{Refused, failed, mux::Stream, refused, users};
use crate::{
    message::{Control, Exec, Reply, Started, refusal},
    wire::{MAX_DATA, WINDOW, channel},
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::Timespec,
    io::Errno,
    pipe::{PipeFlags, pipe_with},
    process::{Pid, PidfdFlags, Signal, pidfd_open},
    termios::{Winsize, tcsetwinsize},
};
use std::{
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How long a session that was hung up on may take until it is killed.
const HANGUP: Duration = Duration::from_millis(500);

/// Runs one and stays until all is over.
pub(super) fn run(stream: &Stream, exec: Exec) -> Result<(), Refused> {
    let [program, arguments @ ..] = &exec.argv[..] else {
        return Err(refused(refusal::INVALID, "command", "the command is empty"));
    };
    let user = users::find(exec.uid);
    let cwd = match &exec.cwd {
        Some(cwd) if std::fs::metadata(cwd).is_ok_and(|m| m.is_dir()) => cwd.clone(),
        Some(_) => return Err(refused(refusal::INVALID, "cwd", "no such directory")),
        None => user
            .as_ref()
            .map(|u| u.home.clone())
            .filter(|h| std::fs::metadata(h).is_ok_and(|m| m.is_dir()))
            .unwrap_or_else(|| "/".into()),
    };
    let mut command = Command::new(program);
    command.args(arguments).env_clear().env("PATH", PATH).env("LANG", "C.UTF-8");
    if let Some(user) = &user {
        command.env("HOME", &user.home).env("USER", &user.name).env("LOGNAME", &user.name);
        if exec.terminal.is_some() {
            command.env("SHELL", &user.shell);
        }
    }
    for (key, value) in &exec.env {
        if key.is_empty() || key.contains(['=', '\0']) || value.contains('\0') {
            return Err(refused(refusal::INVALID, "environment", "a variable's name or value cannot be"));
        }
        command.env(key, value);
    }
    command.current_dir(cwd).gid(exec.gid).uid(exec.uid);

    let mut session = match exec.terminal {
        Some(size) => Session::with_terminal(&mut command, size, exec.uid)?,
        None => Session::with_pipes(&mut command)?,
    };
    let terminal = session.terminal;
    // SAFETY: only calls that are safe between fork and exec.
    unsafe { command.pre_exec(move || in_child(terminal)) };
    let spawned = command.spawn();
    // The command keeps the program's ends of the streams.
    drop(command);
    match spawned {
        Ok(child) => {
            stream.reply(&Reply(Ok(Started { pid: child.id() })));
            session.supervise(stream, child);
        }
        Err(e) => {
            // As a shell tells it: no such program, or one that cannot be executed.
            stream.reply(&Reply(Ok(Started { pid: 0 })));
            stream.eof(channel::OUT);
            stream.eof(channel::ERR);
            stream.end(if e.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 });
        }
    }
    Ok(())
}

/// Between fork and exec, as the program's user.
fn in_child(terminal: bool) -> std::io::Result<()> {
    // SAFETY: plain system calls.
    unsafe {
        if libc::setsid() < 0 || terminal && libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
            return Err(std::io::Error::last_os_error());
        }
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
        // Whoever started the agent may have ignored some: an interrupt that nothing heeds.
        for signal in 1..=64 {
            libc::signal(signal, libc::SIG_DFL);
        }
        // The agent may be spared by the out-of-memory killer; what it runs is not.
        let fd = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd >= 0 {
            libc::write(fd, c"0".as_ptr().cast(), 1);
            libc::close(fd);
        }
    }
    Ok(())
}

struct Session {
    terminal: bool,
    input: Option<OwnedFd>,
    /// With their channels.
    outputs: [Option<(u8, OwnedFd)>; 2],
}

fn nonblocking(fd: OwnedFd) -> Result<OwnedFd, Refused> {
    rustix::io::ioctl_fionbio(&fd, true).map_err(failed)?;
    Ok(fd)
}

/// Outputs of programs that have ended, which others still have.
const LEFT: usize = 256;

/// Goes on to take what is written to an output of a program that has ended, for nobody: what it has left in the background
/// would else be ended by its next word. Of very many the rest is.
fn leave(output: OwnedFd) {
    static TAKEN: AtomicUsize = AtomicUsize::new(0);
    if TAKEN.fetch_add(1, Ordering::Relaxed) >= LEFT {
        TAKEN.fetch_sub(1, Ordering::Relaxed);
        return;
    }
    let taking = move || {
        let mut buffer = [0; 4096];
        loop {
            match rustix::io::read(&output, &mut buffer) {
                Ok(0) => break,
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    // It was polled until now.
                    let _ = poll(&mut [PollFd::new(&output, PollFlags::IN)], None);
                }
                Err(_) => break,
            }
        }
        TAKEN.fetch_sub(1, Ordering::Relaxed);
    };
    // Without a thread it is as with too many.
    let began = std::thread::Builder::new().stack_size(64 << 10).spawn(taking);
    if began.is_err() {
        TAKEN.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Session {
    fn with_pipes(command: &mut Command) -> Result<Self, Refused> {
        let new = || pipe_with(PipeFlags::CLOEXEC).map_err(failed);
        let (theirs, input) = new()?;
        command.stdin(Stdio::from(theirs));
        let (out, theirs) = new()?;
        command.stdout(Stdio::from(theirs));
        let (err, theirs) = new()?;
        command.stderr(Stdio::from(theirs));
        let outputs = [Some((channel::OUT, nonblocking(out)?)), Some((channel::ERR, nonblocking(err)?))];
        Ok(Self { terminal: false, input: Some(nonblocking(input)?), outputs })
    }

    fn with_terminal(command: &mut Command, (columns, rows): (u16, u16), uid: u32) -> Result<Self, Refused> {
        use rustix::{
            fs::{Mode, OFlags},
            pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
        };
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).map_err(failed)?;
        grantpt(&master).map_err(failed)?;
        unlockpt(&master).map_err(failed)?;
        let name = ptsname(&master, vec![]).map_err(failed)?;
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let slave = rustix::fs::open(name.as_c_str(), flags, Mode::empty()).map_err(failed)?;
        let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&slave, size).map_err(failed)?;
        // So that the program can open it by its name.
        rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(uid)), None).map_err(failed)?;
        for take in [Command::stdin::<Stdio>, Command::stdout::<Stdio>, Command::stderr::<Stdio>] {
            take(command, Stdio::from(slave.try_clone().map_err(failed)?));
        }
        let master = nonblocking(master)?;
        let out = master.try_clone().map_err(failed)?;
        Ok(Self { terminal: true, input: Some(master), outputs: [Some((channel::OUT, out)), None] })
    }

    fn supervise(&mut self, stream: &Stream, mut child: Child) {
        let leader = child.id() as i32;
        let pid = Pid::from_child(&child);
        // Kernels before 5.3 have no pidfd: asked every now and then.
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok();
        let mut ended: Option<i32> = None;
        let mut told = false;
        let mut hung_up: Option<Instant> = None;
        let mut pending: Vec<u8> = vec![];
        let mut unacknowledged = 0;
        let mut buffer = vec![0; MAX_DATA];
        loop {
            stream.awake();
            while let Some(control) = stream.control() {
                match control {
                    Control::Signal(n) if ended.is_none() => {
                        // The whole foreground of a terminal, as a key would.
                        let group = self.input.as_ref().filter(|_| self.terminal);
                        let group = group.and_then(|t| rustix::termios::tcgetpgrp(t).ok());
                        signal(group.map_or(-leader, |g| -g.as_raw_nonzero().get()), n);
                    }
                    Control::Resize((columns, rows)) => {
                        let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
                        if let Some(terminal) = self.input.as_ref().filter(|_| self.terminal) {
                            // A terminal that is gone needs no size.
                            let _ = tcsetwinsize(terminal, size);
                        }
                    }
                    Control::Signal(_) => {}
                }
            }
            if stream.is_closed() {
                break;
            }
            self.feed(stream, &mut pending, &mut unacknowledged, &mut hung_up, leader);
            if hung_up.is_some_and(|at| at.elapsed() > HANGUP) && ended.is_none() {
                kill_session(leader);
            }
            // The end is looked at before the output: what was written until then is read below.
            if ended.is_none() {
                match child.try_wait() {
                    Ok(Some(status)) => {
                        ended = Some(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
                    }
                    Ok(None) => {}
                    Err(_) => ended = Some(255),
                }
            }
            let mut drained = true;
            for slot in &mut self.outputs {
                let Some((c, fd)) = slot else { continue };
                match pump(stream, *c, fd, &mut buffer) {
                    Pump::Empty if ended.is_some() && self.terminal => {}
                    Pump::Empty => continue,
                    Pump::More => {
                        drained = false;
                        continue;
                    }
                    Pump::End => {}
                }
                stream.eof(*c);
                *slot = None;
            }
            if let Some(code) = ended
                && drained
                && !told
            {
                stream.end(code);
                told = true;
            }
            if told && self.outputs.iter().all(Option::is_none) {
                break;
            }

            let mut fds = vec![PollFd::from_borrowed_fd(stream.waker(), PollFlags::IN)];
            if let (Some(pidfd), None) = (&pidfd, ended) {
                fds.push(PollFd::new(pidfd, PollFlags::IN));
            }
            if let Some(input) = self.input.as_ref().filter(|_| !pending.is_empty()) {
                fds.push(PollFd::new(input, PollFlags::OUT));
            }
            for (c, fd) in self.outputs.iter().flatten() {
                if stream.credit(*c) > 0 {
                    fds.push(PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN));
                }
            }
            let often = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
            let limit = (ended.is_none() && (pidfd.is_none() || hung_up.is_some())).then_some(often);
            let _ = poll(&mut fds, limit.as_ref());
        }
        // Closing a terminal's master hangs up on its session.
        self.input = None;
        let outputs = std::mem::take(&mut self.outputs).into_iter().flatten();
        match ended.is_some() && !self.terminal {
            true => outputs.for_each(|(_, fd)| leave(fd)),
            false => outputs.for_each(drop),
        }
        if ended.is_none() {
            let until = Instant::now() + if self.terminal { HANGUP } else { Duration::ZERO };
            while Instant::now() < until && matches!(child.try_wait(), Ok(None)) {
                std::thread::sleep(Duration::from_millis(10));
            }
            kill_session(leader);
            // It was killed.
            let _ = child.wait();
        }
    }

    /// Gives input to the program as it takes it.
    fn feed(
        &mut self,
        stream: &Stream,
        pending: &mut Vec<u8>,
        unacknowledged: &mut usize,
        hung_up: &mut Option<Instant>,
        leader: i32,
    ) {
        loop {
            if pending.is_empty() {
                match stream.input() {
                    Ok(bytes) => *pending = bytes,
                    Err(true) if self.terminal => {
                        if hung_up.is_none() {
                            *hung_up = Some(Instant::now());
                            signal(-leader, libc::SIGHUP);
                        }
                        break;
                    }
                    Err(at_end) => {
                        if at_end {
                            self.input = None;
                        }
                        break;
                    }
                }
            }
            let Some(input) = &self.input else {
                // Nobody reads it; the host was told.
                *unacknowledged += pending.len();
                pending.clear();
                continue;
            };
            match rustix::io::write(input, pending) {
                Ok(n) => {
                    pending.drain(..n);
                    *unacknowledged += n;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => {
                    stream.refuse_input();
                    if !self.terminal {
                        self.input = None;
                    }
                    *unacknowledged += pending.len();
                    pending.clear();
                }
            }
        }
        if *unacknowledged > 0 && (pending.is_empty() || *unacknowledged >= WINDOW as usize / 4) {
            stream.used(std::mem::take(unacknowledged));
        }
    }
}

enum Pump {
    /// Nothing more for the moment.
    Empty,
    /// There may be more, but no credit.
    More,
    /// It is at its end.
    End,
}

fn pump(stream: &Stream, c: u8, fd: &OwnedFd, buffer: &mut [u8]) -> Pump {
    // Others have their turn too.
    for _ in 0..8 {
        let room = stream.credit(c).min(buffer.len());
        if room == 0 {
            return Pump::More;
        }
        match rustix::io::read(fd, &mut buffer[..room]) {
            Ok(0) => return Pump::End,
            Ok(n) => {
                if !stream.data(c, &buffer[..n]) {
                    return Pump::End;
                }
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Pump::Empty,
            // A terminal whose last user went answers EIO.
            Err(_) => return Pump::End,
        }
    }
    Pump::More
}

/// To a process, or to the group `-pid`; what is gone needs none.
fn signal(target: i32, n: i32) {
    if (1..=64).contains(&n) {
        // SAFETY: plain call.
        unsafe { libc::kill(target, n) };
    }
}

/// Kills every process of a session.
fn kill_session(leader: i32) {
    signal(-leader, Signal::KILL.as_raw());
    // A shell puts its jobs into groups of their own. Twice, for one that was just being made.
    for _ in 0..2 {
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
            let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            // pid (name) state ppid pgrp session …; the name may hold anything.
            let session = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(3)?.parse().ok());
            if session == Some(leader) {
                signal(pid, Signal::KILL.as_raw());
            }
        }
    }
}
