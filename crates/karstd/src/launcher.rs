//! The launcher: makes DIR and the sockets, starts host and control, starts them again when they end, reaps what is
//! orphaned. One thread, no runtime.
//!
//! It keeps the listening sockets itself: while a daemon is away, connections queue and none is refused; only when control
//! ends again and again are its clients told why ([`crate::refusing`]). It never touches a guest: those belong to their
//! keepers, whose orphans it merely reaps.

use crate::{
    control,
    directory::Directory,
    host::POLICY,
    log_file::{self, LogFile},
    logging::Format,
    privilege::{self, Confined, User},
    refusing::Refusing,
};
use karst_agent_host::HostPolicy;
use karst_model::{Error, Result};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Seek},
    os::fd::{AsFd, FromRawFd, OwnedFd},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Places of the two in [`Launcher::daemons`].
const HOST: usize = 0;
const CONTROL: usize = 1;
/// Time a daemon has to end by itself.
pub const GRACE: Duration = Duration::from_secs(40);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(5);
/// Having lived so long, a daemon counts as healthy.
const HEALTHY: Duration = Duration::from_secs(20);
/// Open files a daemon may have; each exec of a guest takes three of control.
const OPEN_FILES: u64 = 65_536;
/// Having ended so often without a healthy life between, control is spoken for.
const FAILURES: u32 = 3;
/// Bytes of what a daemon says that it ended of.
const LAST_WORDS: u64 = 2048;

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
    /// How often it ended since it was last healthy.
    failures: u32,
    /// Its standard output, in memory: what it says at its end.
    words: Option<File>,
    /// Why it ended, in words for users.
    reason: String,
}

/// Runs until SIGTERM or SIGINT, or until a client asked for the end; then stops both daemons, never a guest.
///
/// # Errors
/// When DIR cannot be served: not root, no user, taken, or not ours.
pub fn run(dir: &Path, user: &str, format: Format, log: Option<LogFile>) -> Result<()> {
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
        failures: 0,
        words: None,
        reason: String::new(),
    };
    let mut launcher = Launcher {
        directory,
        control,
        format,
        log,
        refusing: Refusing::default(),
        settled: Some(Instant::now() + control::SETTLED),
        daemons: vec![
            daemon("host", Confined::Host { privileged: false }, vec![host]),
            daemon("control", confined, api),
        ],
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
    /// Where standard error leads to, when that is a file of the daemon's own.
    log: Option<LogFile>,
    daemons: Vec<Daemon>,
    refusing: Refusing,
    /// When what its own start used is given back.
    settled: Option<Instant>,
}

impl Launcher {
    fn supervise(&mut self, signals: &OwnedFd) -> Result<()> {
        loop {
            self.start_due();
            let now = Instant::now();
            if self.settled.take_if(|at| *at <= now).is_some() {
                karst_host::memory::give_back();
            }
            let dues = self.daemons.iter().filter_map(|d| d.due);
            let log_look = self.log.as_ref().map(|_| now + log_file::LOOK);
            let next = dues.chain(self.refusing.next()).chain(log_look).chain(self.settled).min();
            let control = &self.daemons[CONTROL];
            // Its sockets are ours as well; while it is away nobody else takes who comes.
            let listener = control.sockets.first().filter(|_| control.keeps_ending()).map(AsFd::as_fd);
            let interests = self.refusing.interests(listener);
            if next_signal(signals, interests, next.map(|at| at.saturating_duration_since(now)))? {
                return Ok(());
            }
            self.refusing.serve(listener, &control.excuse());
            if self.reap(true) {
                return Ok(());
            }
            if let Some(log) = &self.log {
                log.cut_when_long();
            }
        }
    }

    fn start_due(&mut self) {
        let now = Instant::now();
        let mut changed = false;
        for n in 0..self.daemons.len() {
            if self.daemons[n].due.is_some_and(|at| at <= now) {
                changed = true;
                let words = words();
                let started = self.spawn(n, words.as_ref());
                let daemon = &mut self.daemons[n];
                daemon.words = words;
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
                        daemon.reason = e.to_string();
                        daemon.again(now);
                    }
                }
            }
        }
        if changed {
            self.record();
        }
    }

    fn spawn(&self, n: usize, words: Option<&File>) -> io::Result<i32> {
        let daemon = &self.daemons[n];
        let output = match words {
            Some(words) => words.try_clone()?.into(),
            None => Stdio::null(),
        };
        // By name, not by /proc/self/exe: after an upgrade the new program is started.
        let program = karst_host::exec::own_program().map_err(std::io::Error::other)?;
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C.UTF-8")
            .envs(
                ["KARST_LOG", "RUST_BACKTRACE", "SSL_CERT_FILE"]
                    .iter()
                    .filter_map(|k| Some((k, std::env::var_os(k)?))),
            )
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(output)
            .arg("--dir")
            .arg(&self.directory.path)
            .args(["--log-format", self.format.as_str(), daemon.role])
            .args(["--listen-fd", &privilege::inherited_fd().to_string()])
            .args(["--sockets", &daemon.sockets.len().to_string()])
            .args(["--daemon-id", &self.directory.daemon_id])
            .args(["--parent", &std::process::id().to_string()])
            .args(["--control-uid", &self.control.uid.to_string()]);
        let confined = match daemon.confined {
            // As the host process will find it. One that cannot be read grants nothing, which that process says.
            Confined::Host { .. } => Confined::Host {
                privileged: HostPolicy::load(&[Path::new(POLICY), &self.directory.path])
                    .is_ok_and(|policy| policy.privileged_containers),
            },
            control => control,
        };
        privilege::prepare(&mut command, daemon.sockets.iter().map(AsFd::as_fd), confined);
        Ok(command.spawn()?.id() as i32)
    }

    /// Takes note of every child that ended: a daemon, or an orphan of one. Answers whether control says that a client asked
    /// for the end of all.
    fn reap(&mut self, restart: bool) -> bool {
        loop {
            let mut status = 0;
            // SAFETY: asks for any child that ended; nobody else in this process waits.
            let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
            if pid <= 0 {
                return false;
            }
            let Some(daemon) = self.daemons.iter_mut().find(|d| d.pid == Some(pid)) else {
                tracing::debug!(pid, "reaped");
                continue;
            };
            daemon.pid = None;
            let lived = daemon.started.elapsed();
            if daemon.role == "control"
                && libc::WIFEXITED(status)
                && libc::WEXITSTATUS(status) == control::ASKED
            {
                tracing::info!("a client asked for the end");
                return true;
            }
            if restart {
                let how = describe(status);
                tracing::warn!(
                    role = daemon.role,
                    pid,
                    how = how.as_str(),
                    lived_ms = lived.as_millis() as u64,
                    "ended by itself; starting it again"
                );
                daemon.reason = daemon.last_words().unwrap_or(how);
                daemon.again(Instant::now());
                // Whoever kills it ends something that worked: it comes back, and its clients wait for that.
                if libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL {
                    daemon.failures -= 1;
                }
                self.record();
            }
        }
    }

    fn stop(&mut self, signals: &OwnedFd) {
        // Control first: it still needs the host to finish what it does.
        for n in [CONTROL, HOST] {
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
                    if next_signal(signals, vec![], Some(left)).unwrap_or(true) {
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
            self.failures = 0;
        }
        self.failures = self.failures.saturating_add(1);
        self.due = Some(now + self.back_off);
        self.back_off = (self.back_off * 2).clamp(Duration::from_millis(20), LONGEST_BACK_OFF);
    }

    /// It is away, and was so too often to let clients wait.
    fn keeps_ending(&self) -> bool {
        self.pid.is_none() && self.failures >= FAILURES
    }

    /// What clients are told then.
    fn excuse(&self) -> String {
        format!(
            "karstd's {} process does not stay up ({} times in a row): {}; guests run on, it is tried again every {} s, \
             and karstd's log says more",
            self.role,
            self.failures,
            self.reason,
            LONGEST_BACK_OFF.as_secs()
        )
    }

    /// The last line that it wrote to its standard output; nothing that users see is written there otherwise.
    fn last_words(&mut self) -> Option<String> {
        let mut words = self.words.take()?;
        words.rewind().ok()?;
        let mut text = vec![];
        words.take(LAST_WORDS).read_to_end(&mut text).ok()?;
        let text = String::from_utf8_lossy(&text);
        let line = text.lines().map(str::trim).rfind(|l| !l.is_empty())?;
        Some(line.chars().filter(|c| !c.is_control()).collect())
    }
}

/// A place in memory for a daemon's last words; it cannot make them wait, whatever it writes.
fn words() -> Option<File> {
    let made = rustix::fs::memfd_create("karstd", rustix::fs::MemfdFlags::CLOEXEC);
    made.map(File::from).inspect_err(|e| tracing::debug!(error = %e, "no place for last words")).ok()
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

/// Waits for a signal or one of `interests`, at most so long. Answers whether a signal asks us to end.
fn next_signal<'a>(
    signals: &'a OwnedFd,
    mut interests: Vec<rustix::event::PollFd<'a>>,
    limit: Option<Duration>,
) -> Result<bool> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let limit =
        limit.map(|d| Timespec { tv_sec: d.as_secs().min(86_400) as i64, tv_nsec: d.subsec_nanos().into() });
    interests.push(PollFd::new(signals, PollFlags::IN));
    match poll(&mut interests, limit.as_ref()) {
        Ok(_) => {}
        Err(rustix::io::Errno::INTR) => return Ok(false),
        Err(e) => return Err(io::Error::from(e).into()),
    }
    let mut end = false;
    loop {
        // SAFETY: plain integers, for which zeros are a value; the buffer is as large as what is read into it.
        let (info, got) = unsafe {
            use std::os::fd::AsRawFd;
            let mut info: libc::signalfd_siginfo = std::mem::zeroed();
            let size = size_of::<libc::signalfd_siginfo>();
            let got = libc::read(signals.as_raw_fd(), (&raw mut info).cast(), size);
            (info, got == size as isize)
        };
        if !got {
            return Ok(end);
        }
        end |= matches!(info.ssi_signo as i32, libc::SIGTERM | libc::SIGINT);
    }
}
