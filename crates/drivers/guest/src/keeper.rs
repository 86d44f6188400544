//! The keeper's client: launches a keeper, finds the ones that live, and talks to them.
//!
//! The formats are [`karst_keeper`]'s. Every call opens a connection of its own (tens of microseconds, on a unix socket of
//! this host) and has a deadline, so a wedged keeper never holds up the caller and nothing has to be kept alive.

use crate::packet::PacketSocket;
use karst_keeper::{files, protocol as p};
use karst_model::{Error, ErrorKind, Result};
use rustix::{
    fs::{FlockOperation, Mode, OFlags, flock},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::time::timeout;

pub use karst_keeper::{Console, Exit, Requested, Spec, State, Status};

/// How long a keeper may take to answer one request.
const ANSWER: Duration = Duration::from_secs(5);
/// How long a launch may take, from the call to the executed program.
const LAUNCH: Duration = Duration::from_secs(15);

/// How a guest's main process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The keeper saw it end.
    Exited(Status),
    /// The keeper itself was killed, and the main process with it; the last status that it wrote, if any.
    KeeperLost(Option<Status>),
}

impl End {
    /// The last status, if one was written.
    pub fn status(&self) -> Option<&Status> {
        match self {
            End::Exited(s) => Some(s),
            End::KeeperLost(s) => s.as_ref(),
        }
    }
}

/// A keeper that answered, or was just launched.
#[derive(Debug, Clone)]
pub struct Keeper {
    dir: PathBuf,
}

/// A guest directory with traces of a keeper.
#[derive(Debug, Clone)]
pub struct Found {
    /// State directory.
    pub dir: PathBuf,
    /// The last status it wrote.
    pub status: Status,
    /// Does a keeper live that watches a guest?
    pub alive: bool,
}

/// Starts a keeper in `dir` and answers when the main process' program was executed. `fds` are handed on under the
/// numbers of [`Spec::fds`], in their order.
///
/// # Errors
/// Conflict when a keeper lives there; internal, with the step and the reason as context, when the program could not
/// be executed. Nothing is left then.
pub async fn launch(dir: &Path, spec: &Spec, fds: Vec<OwnedFd>) -> Result<Keeper> {
    if fds.len() != spec.passed() || fds.len() > p::MAX_FDS {
        return Err(Error::internal(
            "the guest could not be started",
            "descriptors do not match the specification",
        ));
    }
    if is_alive(dir) {
        return Err(Error::conflict("the guest is already running"));
    }
    write_private(&dir.join(files::SPEC), &spec.render())?;
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(std::io::Error::from)?;
    let connection = PacketSocket::new(ours)?;
    connection.send(&[p::LAUNCH], &fds).await?;
    drop(fds);
    let work = async {
        karst_host::run(karst_host::Program::Keeper)
            .args(["--daemon", &spec.daemon, "--instance", &spec.instance, "--dir"])
            .arg(dir)
            .stdin_fd(theirs)
            .output()
            .await?;
        receive(&connection).await
    };
    let failure = match timeout(LAUNCH, work).await {
        // A keeper that answers a refusal has ended by itself.
        Ok(Ok(Some(answer))) if answer.code != p::code::OK => {
            let text = String::from_utf8_lossy(&answer.body).into_owned();
            return Err(Error::internal("the guest could not be started", text));
        }
        Ok(Ok(Some(_))) => return Ok(Keeper { dir: dir.to_owned() }),
        Ok(Ok(None)) => Error::internal("the guest could not be started", "its keeper died"),
        Ok(Err(e)) => e,
        Err(_) => no_answer(),
    };
    end_keeper(dir)?;
    Err(failure)
}

/// Connects to the keeper of `dir`.
///
/// # Errors
/// Not found when none lives there.
pub async fn connect(dir: &Path) -> Result<(Keeper, Status)> {
    let keeper = Keeper { dir: dir.to_owned() };
    let status = keeper.status().await?;
    Ok((keeper, status))
}

/// All directories below `guests_dir` that hold a keeper's status, dead or alive.
///
/// # Errors
/// When the directory cannot be read.
pub fn find_all(guests_dir: &Path) -> Result<Vec<Found>> {
    let mut found = vec![];
    for entry in std::fs::read_dir(guests_dir)? {
        let dir = entry?.path();
        if let Some(status) = read_status(&dir) {
            found.push(Found { alive: is_alive(&dir), dir, status });
        }
    }
    Ok(found)
}

/// The status file of `dir`, if there is a whole one.
pub fn read_status(dir: &Path) -> Option<Status> {
    Status::parse(&std::fs::read(dir.join(files::STATUS)).ok()?).ok()
}

/// Does a keeper live in `dir` whose guest has not ended?
pub fn is_alive(dir: &Path) -> bool {
    let Ok(lock) = File::open(dir.join(files::LOCK)) else {
        return false;
    };
    flock(&lock, FlockOperation::NonBlockingLockShared).is_err()
        && read_status(dir).is_none_or(|s| !matches!(s.state, State::Exited | State::Failed))
}

/// Waits until no keeper holds the lock of `dir`, also not one that only syncs its last status.
///
/// # Errors
/// Timeout after 10 s.
pub async fn wait_gone(dir: &Path) -> Result<()> {
    let Ok(lock) = File::open(dir.join(files::LOCK)) else {
        return Ok(());
    };
    // Asked again and again: a thread that waited in the kernel could not be called back from a keeper that is stuck, and
    // the host's threads are few.
    let gone = async {
        let mut pause = Duration::from_millis(1);
        while flock(&lock, FlockOperation::NonBlockingLockShared).is_err() {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    };
    timeout(Duration::from_secs(10), gone).await.map_err(|_| Error::timeout("the guest's keeper did not end"))
}

/// Kills the keeper of `dir` itself, and with it the guest; for a keeper that does not answer. Nothing to do when it is
/// not there.
///
/// # Errors
/// When it may not be killed.
pub fn end_keeper(dir: &Path) -> Result<()> {
    let Some(status) = read_status(dir) else {
        return Ok(());
    };
    let Some(pid) = Pid::from_raw(status.keeper_pid as i32) else {
        return Ok(());
    };
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
        return Ok(());
    };
    // The descriptor now names one process; its start time tells whether that is the keeper or a reused number.
    if start_time(status.keeper_pid) != Some(status.keeper_start) {
        return Ok(());
    }
    match pidfd_send_signal(&pidfd, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(e) => Err(Error::internal("the guest's keeper could not be ended", e)),
    }
}

/// Has this process ended, reaped or not?
pub fn has_ended(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']))
}

/// Start time of a process in clock ticks since boot; tells a reused pid.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The kept console log of `dir`, newest at the end, at most `max` bytes.
///
/// # Errors
/// When it is there and cannot be read.
pub fn console_log(dir: &Path, max: usize) -> Result<Vec<u8>> {
    let mut log = vec![];
    for name in [files::CONSOLE, files::CONSOLE_OLD] {
        let room = max - log.len();
        match File::open(dir.join(name)) {
            Ok(mut file) if room > 0 => {
                let length = file.metadata()?.len();
                file.seek(SeekFrom::Start(length.saturating_sub(room as u64)))?;
                let mut part = vec![];
                file.take(room as u64).read_to_end(&mut part)?;
                part.extend_from_slice(&log);
                log = part;
            }
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(log)
}

/// Empties the console log of `dir`, by the keeper when there is one.
///
/// # Errors
/// When it cannot.
pub async fn clear_console_log(dir: &Path) -> Result<()> {
    match (Keeper { dir: dir.to_owned() }).call(p::op::CLEAR_LOG, &[]).await {
        Err(e) if e.is(ErrorKind::NotFound) => {
            for name in [files::CONSOLE, files::CONSOLE_OLD] {
                match std::fs::remove_file(dir.join(name)) {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
                    _ => {}
                }
            }
            Ok(())
        }
        other => other.map(drop),
    }
}

impl Keeper {
    /// The keeper of `dir`, which nobody has asked whether it lives.
    pub fn unasked(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// State directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What it says now.
    ///
    /// # Errors
    /// Not found when it is gone.
    pub async fn status(&self) -> Result<Status> {
        let answer = self.call(p::op::STATUS, &[]).await?;
        parse_status(&answer.body)
    }

    /// Waits for the end of the main process; answers at once when it has ended. Learns also of an end that happened
    /// while nobody watched, and of the keeper's own.
    ///
    /// # Errors
    /// When the keeper speaks another version or nonsense.
    pub async fn wait_exit(&self) -> Result<End> {
        let watch = async {
            let connection = self.open()?;
            request(&connection, p::op::WATCH, &[]).await?;
            timeout(ANSWER, receive(&connection))
                .await
                .map_err(|_| no_answer())??
                .ok_or_else(gone)?
                .check()?;
            match receive(&connection).await? {
                Some(answer) if answer.code == p::code::EVENT => parse_status(&answer.body),
                _ => Err(gone()),
            }
        };
        match watch.await {
            Ok(status) => Ok(End::Exited(status)),
            Err(e) if e.is(ErrorKind::NotFound) => Ok(match read_status(&self.dir) {
                Some(s) if matches!(s.state, State::Exited | State::Failed) => End::Exited(s),
                other => End::KeeperLost(other),
            }),
            Err(e) => Err(e),
        }
    }

    /// Attaches to the console: a stream socket.
    ///
    /// # Errors
    /// Conflict when somebody is attached and `force` is not set; unsupported without a console.
    pub async fn attach(&self, force: bool) -> Result<OwnedFd> {
        let flags = if force { p::ATTACH_FORCE } else { 0 };
        self.call(p::op::ATTACH, &[flags])
            .await?
            .fd
            .ok_or_else(|| Error::internal("the console could not be attached", "no descriptor came"))
    }

    /// New size of a terminal console.
    ///
    /// # Errors
    /// Unsupported when the console is no terminal.
    pub async fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let ([a, b], [c, d]) = (columns.to_le_bytes(), rows.to_le_bytes());
        self.call(p::op::RESIZE, &[a, b, c, d]).await.map(drop)
    }

    /// Ends the main process now (SIGKILL); the end is recorded as asked for.
    ///
    /// # Errors
    /// Not found when it has ended already.
    pub async fn kill(&self) -> Result<()> {
        self.signal(9).await
    }

    /// Sends a signal to the main process.
    ///
    /// # Errors
    /// Not found when it has ended.
    pub async fn signal(&self, signal: i32) -> Result<()> {
        let signal = u8::try_from(signal).map_err(|_| Error::invalid("signal", "no such signal"))?;
        self.call(p::op::SIGNAL, &[signal]).await.map(drop)
    }

    /// Kills the guest when `CLOCK_BOOTTIME` passes `at`; `None` clears. Kept by the kernel for the keeper: a keeper that
    /// is stopped or stuck is itself killed one second later, and the guest with it.
    ///
    /// # Errors
    /// Not found when the keeper is gone.
    pub async fn set_deadline(&self, at: Option<Duration>) -> Result<()> {
        // 0 would clear: a deadline at the very boot has passed, as has 1 ns.
        let ns = at.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX / 2).max(1));
        self.call(p::op::DEADLINE, &ns.to_le_bytes()).await.map(drop)
    }

    /// Records who asked for the end, before asking.
    ///
    /// # Errors
    /// Not found when the keeper is gone.
    pub async fn mark(&self, requested: Requested) -> Result<()> {
        self.call(p::op::MARK, &[requested as u8]).await.map(drop)
    }

    fn open(&self) -> Result<PacketSocket> {
        let fd = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .map_err(std::io::Error::from)?;
        // Through a descriptor of the directory, because a socket's path may have 107 bytes only.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(&self.dir, flags, Mode::empty()).map_err(|_| gone())?;
        let path = format!("/proc/self/fd/{}/{}", dir.as_raw_fd(), files::SOCKET);
        let address = SocketAddrUnix::new(path).map_err(std::io::Error::from)?;
        rustix::net::connect(&fd, &address).map_err(|e| match e {
            rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED => gone(),
            rustix::io::Errno::AGAIN => no_answer(),
            e => Error::internal("the guest's keeper could not be reached", e),
        })?;
        Ok(PacketSocket::new(fd)?)
    }

    async fn call(&self, operation: u8, body: &[u8]) -> Result<Answer> {
        let work = async {
            let connection = self.open()?;
            request(&connection, operation, body).await?;
            receive(&connection).await?.ok_or_else(gone)?.check()
        };
        timeout(ANSWER, work).await.map_err(|_| no_answer())?
    }
}

fn gone() -> Error {
    Error::not_found("the guest is not running")
}

fn no_answer() -> Error {
    Error::timeout("the guest's keeper did not answer")
}

fn parse_status(body: &[u8]) -> Result<Status> {
    Status::parse(body).map_err(|e| Error::internal("the guest's keeper could not be understood", e))
}

struct Answer {
    code: u8,
    body: Vec<u8>,
    fd: Option<OwnedFd>,
}

impl Answer {
    fn check(self) -> Result<Self> {
        let text = String::from_utf8_lossy(&self.body);
        Err(match self.code {
            p::code::OK => return Ok(self),
            p::code::BUSY => Error::conflict("the console is in use; force to take it over"),
            p::code::UNSUPPORTED => Error::unsupported("the guest has no such console"),
            p::code::GONE => gone(),
            code => Error::internal("the guest's keeper refused", format!("code {code}: {text}")),
        })
    }
}

async fn request(to: &PacketSocket, operation: u8, body: &[u8]) -> Result<()> {
    let packet = [&[p::VERSION, operation], body].concat();
    to.send(&packet, &[]).await.map_err(|_| gone())
}

/// One reply; `None` at the end.
async fn receive(from: &PacketSocket) -> Result<Option<Answer>> {
    let Some((packet, fd)) = from.receive(p::MAX).await? else {
        return Ok(None);
    };
    match packet.as_slice() {
        [version, code, body @ ..] if (p::OLDEST..=p::VERSION).contains(version) => {
            Ok(Some(Answer { code: *code, body: body.to_vec(), fd }))
        }
        other => Err(Error::internal(
            "the guest's keeper could not be understood",
            format!("version {:?}", other.first()),
        )),
    }
}

/// Replaces a file that only root may read.
///
/// # Errors
/// When it cannot be written.
pub fn write_private(path: &Path, content: &[u8]) -> Result<()> {
    let temporary = path.with_extension("new");
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits() as i32)
        .open(&temporary)?;
    file.write_all(content)?;
    karst_host::fs::replace(&temporary, path)?;
    Ok(())
}
