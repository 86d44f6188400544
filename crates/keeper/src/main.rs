//! The keeper: one tiny process per guest. It is the parent of QEMU or of `lxc-start`, reaps all that daemonizes below it,
//! keeps the console log and the guest's deadline, and writes down how the guest ended. It belongs to no daemon.
//!
//! `karst-keeper --daemon ID --instance UUID --dir DIR`, standard input a `SOCK_SEQPACKET` socket (see
//! [`karst_keeper::protocol`]). It reads `DIR/keeper.spec`, takes `DIR/keeper.lock` and leaves its caller's session. One
//! thread, one poll loop, no heap growth: every buffer is bounded.
//!
//! `karst-keeper --attach --daemon ID --instance UUID` is the helper that does one thing inside a container: see
//! [`attached`].
//!
//! `karst-keeper --forward` passes connections on: see [`forward`].
//!
//! `karst-keeper --guest-api` serves a guest its own data: see [`guest_api`].
//!
//! If the keeper itself is killed, the main process follows it (`PR_SET_PDEATHSIG`), so a guest never runs unwatched.
#![allow(clippy::disallowed_methods)] // works on the real machine: its clock and tasks are real

mod attached;
mod child;
mod console;
mod forward;
mod guest_api;
mod server;
mod sys;

use karst_keeper::{Spec, State, Status, files, protocol as p};
use std::{
    ffi::CString,
    fs::File,
    io::{Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::PathBuf,
    time::{Duration, Instant},
};

/// How long the lock may be held by those who only look whether a keeper lives (see the client's `is_alive`), and by a
/// child of theirs before it executes its program.
const LOOKS: Duration = Duration::from_secs(1);

/// The guest's state directory: everything in it is reached by descriptor, so that its path may be long or move.
pub(crate) struct Dir {
    fd: OwnedFd,
    /// The statuses that were replaced: to give back what they occupied may wait for the disk.
    replaced: std::cell::RefCell<Vec<OwnedFd>>,
}

impl Dir {
    /// The path of a file in it, through the descriptor.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.fd.as_raw_fd()))
    }

    /// Replaces the status file by rename.
    pub(crate) fn write_status(&self, status: &Status, durable: bool) -> std::io::Result<()> {
        let temporary = self.path("keeper.status.new");
        let mut file =
            File::options().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(&status.render())?;
        if durable {
            file.sync_all()?;
        }
        let status = self.path(files::STATUS);
        use rustix::fs::{Mode, OFlags};
        let old = rustix::fs::open(&status, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
        std::fs::rename(&temporary, &status)?;
        self.replaced.borrow_mut().extend(old);
        if durable {
            rustix::fs::fsync(&self.fd)?;
        }
        Ok(())
    }

    /// Lets go of the statuses that were replaced; called when nobody waits.
    pub(crate) fn let_go(&self) {
        self.replaced.borrow_mut().clear();
    }
}

struct Arguments {
    daemon: String,
    instance: String,
    dir: PathBuf,
}

fn arguments() -> Result<Arguments, String> {
    let (mut daemon, mut instance, mut dir) = (None, None, None);
    let mut args = std::env::args_os().skip(1);
    while let Some(key) = args.next() {
        let value = args.next();
        match key.to_str() {
            Some("--daemon") => daemon = value.and_then(|v| v.into_string().ok()),
            Some("--instance") => instance = value.and_then(|v| v.into_string().ok()),
            Some("--dir") => dir = value.map(PathBuf::from),
            _ => return Err(format!("unknown argument {key:?}")),
        }
    }
    match (daemon, instance, dir) {
        (Some(daemon), Some(instance), Some(dir)) => Ok(Arguments { daemon, instance, dir }),
        _ => Err("usage: karst-keeper --daemon ID --instance UUID --dir DIR".into()),
    }
}

/// Reads the specification and takes the lock.
fn prepare(a: &Arguments) -> Result<(Dir, Spec, OwnedFd), String> {
    let fd = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECTORY)
        .open(&a.dir)
        .map_err(|e| format!("state directory: {e}"))?;
    let dir = Dir { fd: fd.into(), replaced: Default::default() };
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(dir.path(files::SPEC))
        .map_err(|e| format!("specification: {e}"))?;
    let meta = file.metadata().map_err(|e| format!("specification: {e}"))?;
    if meta.uid() != rustix::process::geteuid().as_raw() || meta.mode() & 0o022 != 0 || meta.len() > 1 << 20 {
        return Err("the specification must belong to the keeper's user, be writable by nobody else, and be at most 1 MiB".into());
    }
    let mut content = vec![];
    let mut file = file;
    file.read_to_end(&mut content).map_err(|e| format!("specification: {e}"))?;
    let spec = Spec::parse(&content).map_err(|e| format!("specification: {e}"))?;
    if spec.daemon != a.daemon || spec.instance != a.instance {
        return Err("the specification is of another guest".into());
    }
    let lock: OwnedFd = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(dir.path(files::LOCK))
        .map_err(|e| format!("lock: {e}"))?
        .into();
    use rustix::fs::{FlockOperation, flock};
    let patience = Instant::now() + LOOKS;
    while flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        // A keeper whose guest has ended only syncs its last status and goes: worth waiting for. Any other is not, but
        // who looks whether there is one holds the lock for a moment too.
        let status = std::fs::read(dir.path(files::STATUS)).unwrap_or_default();
        if Status::parse(&status).is_ok_and(|s| s.state == State::Exited) {
            flock(&lock, FlockOperation::LockExclusive).map_err(|e| format!("lock: {e}"))?;
            break;
        }
        if Instant::now() >= patience {
            return Err("this guest already has a keeper".into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok((dir, spec, lock))
}

fn main() {
    if std::env::args_os().nth(1).is_some_and(|a| a == "--attach") {
        attached::main();
    }
    if std::env::args_os().nth(1).is_some_and(|a| a == "--forward") {
        forward::main();
    }
    if std::env::args_os().nth(1).is_some_and(|a| a == "--guest-api") {
        guest_api::main();
    }
    // Nothing may be inherited that was not passed on purpose; standard input is the launch socket.
    sys::close_from(3);
    let launch = sys::take_stdin();
    let refuse = |text: &str| -> ! {
        sys::send(launch.as_fd(), &[p::VERSION, p::code::FAILED], text.as_bytes(), None);
        eprintln!("karst-keeper: {text}");
        std::process::exit(1)
    };
    let a = match arguments() {
        Ok(a) => a,
        Err(e) => refuse(&e),
    };
    let (dir, spec, lock) = match prepare(&a) {
        Ok(x) => x,
        Err(e) => refuse(&e),
    };
    let passed = match sys::receive_launch(launch.as_fd()) {
        Ok(fds) if fds.len() == spec.passed() => fds,
        Ok(fds) => refuse(&format!("{} descriptors passed, {} specified", fds.len(), spec.passed())),
        Err(e) => refuse(&format!("launch socket: {e}")),
    };
    for cgroup in &spec.keeper_cgroups {
        if let Err(e) = sys::write_file(&cgroup.join("cgroup.procs"), b"0") {
            refuse(&format!("entering {}: {e}", cgroup.display()));
        }
    }
    // Twice, so that the keeper is neither a session leader nor a child of its caller. The lock goes along.
    sys::detach();

    let mut status = Status {
        keeper_pid: std::process::id(),
        keeper_start: sys::start_time(std::process::id()),
        daemon: spec.daemon.clone(),
        instance: spec.instance.clone(),
        generation: spec.generation,
        started_at: sys::now(),
        ..Status::default()
    };
    let failed = |status: &mut Status, text: String| -> ! {
        status.state = State::Failed;
        status.ended_at = sys::now();
        status.reason = text;
        let _ = dir.write_status(status, false);
        sys::send(launch.as_fd(), &[p::VERSION, p::code::FAILED], status.reason.as_bytes(), None);
        std::process::exit(1)
    };
    if let Err(e) = dir.write_status(&status, false) {
        failed(&mut status, format!("status: {e}"));
    }
    let name = CString::new("karst-keeper").unwrap_or_default();
    sys::become_subreaper(&name);
    let signals = match sys::block_signals() {
        Ok(fd) => fd,
        Err(e) => failed(&mut status, format!("signalfd: {e}")),
    };
    let listener = match sys::listen(&dir.path(files::SOCKET)) {
        Ok(fd) => fd,
        Err(e) => failed(&mut status, format!("socket: {e}")),
    };
    let (console, child_end) = match console::Console::new(&spec, &dir) {
        Ok(c) => c,
        Err(e) => failed(&mut status, format!("console: {e}")),
    };
    if sys::hung_up(launch.as_fd()) {
        failed(&mut status, "the caller left before the start".into());
    }
    let main = match child::spawn(&spec, passed, child_end) {
        Ok(m) => m,
        Err(e) => failed(&mut status, e),
    };
    status.pid = Some(main.pid);
    status.pid_start = sys::start_time(main.pid);
    status.state = State::Running;
    sys::send(launch.as_fd(), &[p::VERSION, p::code::OK], &status.render(), None);
    drop(launch);
    // A failure to write it is no reason to end a guest that runs: who connects is told the truth anyway.
    let _ = dir.write_status(&status, false);
    dir.let_go();
    server::Server::new(dir, spec, status, signals, listener, console, main).run();
    drop(lock);
}
