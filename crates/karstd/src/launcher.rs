//! The launcher: makes DIR and the sockets, starts host and control, starts them again when they end, reaps what is
//! orphaned. One thread, no runtime.
//!
//! It keeps the listening sockets itself: while a daemon is away, connections queue and none is refused. It never touches
//! a guest: those belong to their keepers, whose orphans it merely reaps.

use crate::{
    directory::Directory,
    logging::Format,
    privilege::{self, Confined, User},
};
use karst_model::{Error, Result};
use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Time a daemon has to end by itself.
const GRACE: Duration = Duration::from_secs(10);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(5);
/// Having lived so long, a daemon counts as healthy.
const HEALTHY: Duration = Duration::from_secs(20);
/// Open files a daemon may have; each exec of a guest takes three of control.
const OPEN_FILES: u64 = 65_536;

struct Daemon {
    role: &'static str,
    confined: Confined,
    sockets: Vec<OwnedFd>,
    /// Process id while it lives.
    pid: Option<i32>,
    started: Instant,
    starts: u64,
    back_off: Duration,
    /// When it is to be started again.
    due: Option<Instant>,
}

/// Runs until SIGTERM or SIGINT; then stops both daemons, never a guest.
///
/// # Errors
/// When DIR cannot be served: not root, no user, taken, or not ours.
pub fn run(dir: &Path, user: &str, format: Format) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(Error::forbidden(
            "karstd needs root to run guests: start it by its systemd unit, or with sudo; --simulate needs no privileges",
        ));
    }
    let control = privilege::user(user)?;
    let signals = signals()?;
    rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1)).map_err(io::Error::from)?;
    raise_open_files();
    let directory = Directory::open(dir, Some(&control))?;
    let administrators = privilege::group("karst-admin");
    let api = [("unix.socket", 0o660), ("libvirt-sock", 0o660), ("libvirt-sock-ro", 0o666)]
        .map(|(name, mode)| directory.socket(name, mode, administrators))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let host = directory.socket("run/host.sock", 0o660, Some(control.gid))?;
    tracing::info!(dir = %directory.path.display(), daemon = directory.daemon_id, version = env!("CARGO_PKG_VERSION"), "karstd starts");
    let confined = Confined::Control { uid: control.uid, gid: control.gid };
    let daemon = |role, confined, sockets| Daemon {
        role,
        confined,
        sockets,
        pid: None,
        started: Instant::now(),
        starts: 0,
        back_off: Duration::ZERO,
        due: Some(Instant::now()),
    };
    let mut launcher = Launcher {
        directory,
        control,
        format,
        daemons: vec![daemon("host", Confined::Host, vec![host]), daemon("control", confined, api)],
    };
    launcher.supervise(&signals)?;
    launcher.stop(&signals);
    for name in ["unix.socket", "libvirt-sock", "libvirt-sock-ro", "run/host.sock", "run/daemons.json"] {
        launcher.directory.remove_socket(name);
    }
    tracing::info!("karstd ended; guests run on");
    Ok(())
}

struct Launcher {
    directory: Directory,
    control: User,
    format: Format,
    daemons: Vec<Daemon>,
}

impl Launcher {
    fn supervise(&mut self, signals: &OwnedFd) -> Result<()> {
        loop {
            self.start_due();
            let now = Instant::now();
            let next = self.daemons.iter().filter_map(|d| d.due).min();
            if next_signal(signals, next.map(|at| at.saturating_duration_since(now)))? {
                return Ok(());
            }
            self.reap(true);
        }
    }

    fn start_due(&mut self) {
        let now = Instant::now();
        let mut changed = false;
        for n in 0..self.daemons.len() {
            if self.daemons[n].due.is_some_and(|at| at <= now) {
                changed = true;
                let started = self.spawn(n);
                let daemon = &mut self.daemons[n];
                daemon.starts += 1;
                daemon.started = now;
                match started {
                    Ok(pid) => {
                        daemon.pid = Some(pid);
                        daemon.due = None;
                        tracing::info!(role = daemon.role, pid, starts = daemon.starts, "started");
                    }
                    Err(e) => {
                        tracing::error!(role = daemon.role, error = %e, "could not be started");
                        daemon.again(now);
                    }
                }
            }
        }
        if changed {
            self.record();
        }
    }

    fn spawn(&self, n: usize) -> io::Result<i32> {
        let daemon = &self.daemons[n];
        // By name, not by /proc/self/exe: after an upgrade the new program is started.
        let program = karst_host::exec::own_program().map_err(std::io::Error::other)?;
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C.UTF-8")
            .envs(["KARST_LOG", "RUST_BACKTRACE"].iter().filter_map(|k| Some((k, std::env::var_os(k)?))))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .arg("--dir")
            .arg(&self.directory.path)
            .args(["--log-format", self.format.as_str(), daemon.role])
            .args(["--listen-fd", &privilege::inherited_fd().to_string()])
            .args(["--sockets", &daemon.sockets.len().to_string()])
            .args(["--daemon-id", &self.directory.daemon_id])
            .args(["--parent", &std::process::id().to_string()])
            .args(["--control-uid", &self.control.uid.to_string()]);
        privilege::prepare(&mut command, daemon.sockets.iter().map(AsFd::as_fd), daemon.confined);
        Ok(command.spawn()?.id() as i32)
    }

    /// Takes note of every child that ended: a daemon, or an orphan of one.
    fn reap(&mut self, restart: bool) {
        loop {
            let mut status = 0;
            // SAFETY: asks for any child that ended; nobody else in this process waits.
            let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
            if pid <= 0 {
                return;
            }
            let Some(daemon) = self.daemons.iter_mut().find(|d| d.pid == Some(pid)) else {
                tracing::debug!(pid, "reaped");
                continue;
            };
            daemon.pid = None;
            let lived = daemon.started.elapsed();
            if restart {
                let how = describe(status);
                tracing::warn!(
                    role = daemon.role,
                    pid,
                    how,
                    lived_ms = lived.as_millis() as u64,
                    "ended by itself; starting it again"
                );
                daemon.again(Instant::now());
                self.record();
            }
        }
    }

    fn stop(&mut self, signals: &OwnedFd) {
        // Control first: it still needs the host to finish what it does.
        for n in [1, 0] {
            let Some(pid) = self.daemons[n].pid else { continue };
            tracing::info!(role = self.daemons[n].role, pid, "stopping");
            let until = Instant::now() + GRACE;
            let mut signal = libc::SIGTERM;
            loop {
                // SAFETY: our own child, which nobody has reaped.
                unsafe { libc::kill(pid, signal) };
                self.reap(false);
                while self.daemons[n].pid.is_some() && Instant::now() < until {
                    // A second request to end is a request to hurry.
                    let left = until.saturating_duration_since(Instant::now());
                    if next_signal(signals, Some(left)).unwrap_or(true) {
                        break;
                    }
                    self.reap(false);
                }
                if self.daemons[n].pid.is_none() || signal == libc::SIGKILL {
                    break;
                }
                tracing::warn!(role = self.daemons[n].role, pid, "did not end in time; killing it");
                signal = libc::SIGKILL;
            }
        }
        self.reap(false);
    }

    /// For people and tests: who runs as what, and how often it was started.
    fn record(&self) {
        let daemons: BTreeMap<_, _> = self
            .daemons
            .iter()
            .map(|d| (d.role, serde_json::json!({"pid": d.pid, "starts": d.starts})))
            .collect();
        let whole = serde_json::json!({"launcher": {"pid": std::process::id()}, "daemons": daemons});
        let file = self.directory.path.join("run/daemons.json");
        let fresh = file.with_extension("new");
        let written = std::fs::write(&fresh, whole.to_string()).and_then(|()| std::fs::rename(&fresh, &file));
        if let Err(e) = written {
            tracing::warn!(error = %e, "the record of daemons could not be written");
        }
    }
}

impl Daemon {
    /// At once after a healthy life; ever later when it keeps ending.
    fn again(&mut self, now: Instant) {
        if self.started.elapsed() >= HEALTHY {
            self.back_off = Duration::ZERO;
        }
        self.due = Some(now + self.back_off);
        self.back_off = (self.back_off * 2).clamp(Duration::from_millis(20), LONGEST_BACK_OFF);
    }
}

fn describe(status: i32) -> String {
    if libc::WIFSIGNALED(status) {
        format!("signal {}", libc::WTERMSIG(status))
    } else {
        format!("exit code {}", libc::WEXITSTATUS(status))
    }
}

fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    let raised = |maximum: Option<u64>| Rlimit {
        current: Some(maximum.map_or(OPEN_FILES, |m| m.min(OPEN_FILES))),
        maximum,
    };
    // Above the hard limit only where that is ours to raise; not so within some containers.
    let enough = now.maximum.is_none_or(|m| m >= OPEN_FILES);
    if !enough && setrlimit(Resource::Nofile, raised(Some(OPEN_FILES))).is_ok() {
        return;
    }
    if let Err(e) = setrlimit(Resource::Nofile, raised(now.maximum)) {
        tracing::warn!(error = %e, "the limit of open files stays as it is");
    }
}

/// From here on the signals come through a descriptor.
fn signals() -> Result<OwnedFd> {
    // SAFETY: plain system calls; the descriptor is new and ours.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGCHLD, libc::SIGHUP] {
            libc::sigaddset(&mut set, signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error().into());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Waits for a signal, at most so long. Answers whether it asks us to end.
fn next_signal(signals: &OwnedFd, limit: Option<Duration>) -> Result<bool> {
    let limit = limit.map_or(-1, |d| i32::try_from(d.as_millis() + 1).unwrap_or(i32::MAX));
    let mut set = libc::pollfd { fd: signals.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry, of ours; the buffer below is as large as what is read into it.
    unsafe {
        if libc::poll(&mut set, 1, limit) < 0 {
            let e = io::Error::last_os_error();
            return if e.kind() == io::ErrorKind::Interrupted { Ok(false) } else { Err(e.into()) };
        }
        let mut end = false;
        loop {
            let mut info: libc::signalfd_siginfo = std::mem::zeroed();
            let size = std::mem::size_of::<libc::signalfd_siginfo>();
            if libc::read(signals.as_raw_fd(), (&raw mut info).cast(), size) != size as isize {
                return Ok(end);
            }
            end |= matches!(info.ssi_signo as i32, libc::SIGTERM | libc::SIGINT);
        }
    }
}
