//! The calls of the system that the keeper needs and `std` does not have.

use karst_keeper::protocol as p;
use std::{
    ffi::CStr,
    io::{self, Write},
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    path::Path,
};

/// The last error of a call that answered `-1`.
pub(crate) fn check(r: libc::c_int) -> io::Result<libc::c_int> {
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r) }
}

/// Closes every descriptor from `first` on.
pub(crate) fn close_from(first: u32) {
    // SAFETY: called first in `main`, when nothing owns a descriptor yet.
    unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
}

/// Takes the socket off standard input and puts `/dev/null` there.
pub(crate) fn take_stdin() -> OwnedFd {
    // SAFETY: plain calls; the new descriptor is owned by nobody else.
    unsafe {
        let fd = libc::fcntl(0, libc::F_DUPFD_CLOEXEC, 3);
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        if null >= 0 {
            libc::dup2(null, 0);
            if null > 2 {
                libc::close(null);
            }
        }
        OwnedFd::from_raw_fd(if fd >= 0 { fd } else { libc::dup(0) })
    }
}

/// Leaves the caller's session for good: fork, `setsid`, fork. The callers of both forks exit at once.
pub(crate) fn detach() {
    for round in 0..2 {
        // SAFETY: the process has one thread.
        match unsafe { libc::fork() } {
            0 => {}
            // SAFETY: ends only this process, without running anything of the child's.
            pid => unsafe { libc::_exit(if pid < 0 { 1 } else { 0 }) },
        }
        if round == 0 {
            let _ = rustix::process::setsid();
        }
    }
    let _ = std::env::set_current_dir("/");
    // SAFETY: the caller's standard error may be a pipe whose other end waits for us to close it.
    unsafe {
        libc::dup2(0, 1);
        libc::dup2(0, 2);
        libc::umask(0o077);
    }
}

/// Orphans below come to us. The name is what `ps` shows.
pub(crate) fn become_subreaper(name: &CStr) {
    // SAFETY: plain prctl calls.
    unsafe {
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
        libc::prctl(libc::PR_SET_NAME, name.as_ptr(), 0, 0, 0);
    }
    // The keeper is what ends the guest; it is to be the last to be chosen. Not permitted in some containers: fine.
    let _ = write_file(Path::new("/proc/self/oom_score_adj"), b"-900");
}

/// Blocks all signals that could end us and hands `SIGCHLD` to a descriptor. A host that shuts down asks its daemon to
/// stop guests; a stray `SIGTERM` to everything must not.
pub(crate) fn block_signals() -> io::Result<OwnedFd> {
    // SAFETY: the sets are initialised by sigemptyset.
    unsafe {
        let mut set = MaybeUninit::<libc::sigset_t>::zeroed().assume_init();
        libc::sigemptyset(&mut set);
        for s in [
            libc::SIGCHLD,
            libc::SIGTERM,
            libc::SIGINT,
            libc::SIGHUP,
            libc::SIGQUIT,
            libc::SIGUSR1,
            libc::SIGUSR2,
            libc::SIGALRM,
        ] {
            libc::sigaddset(&mut set, s);
        }
        check(libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()))?;
        let fd = check(libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Empties the descriptor of [`block_signals`].
pub(crate) fn drain(fd: BorrowedFd) {
    let mut buffer = [0u8; 1024];
    while matches!(rustix::io::read(fd, &mut buffer), Ok(n) if n > 0) {}
}

/// Listens at `path`, mode 0600, replacing what a dead keeper left.
pub(crate) fn listen(path: &Path) -> io::Result<OwnedFd> {
    use rustix::net::*;
    let fd = socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    let _ = std::fs::remove_file(path);
    // SAFETY: umask cannot fail; the socket must never be reachable by others, not even between bind and chmod.
    let before = unsafe { libc::umask(0o177) };
    let bound = bind(&fd, &SocketAddrUnix::new(path)?);
    // SAFETY: as above.
    unsafe { libc::umask(before) };
    bound?;
    listen(&fd, 16)?;
    Ok(fd)
}

/// May this peer talk to us? Its effective user must be ours.
pub(crate) fn peer_allowed(fd: BorrowedFd) -> bool {
    rustix::net::sockopt::socket_peercred(fd).is_ok_and(|c| c.uid == rustix::process::geteuid())
}

/// Sends one packet, with a descriptor when there is one; `false` when the peer is gone or does not read.
pub(crate) fn send(to: BorrowedFd, head: &[u8], body: &[u8], fd: Option<BorrowedFd>) -> bool {
    use rustix::net::*;
    let body = &body[..body.len().min(p::MAX - head.len())];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|f| [f]);
    if let Some(fds) = &fds {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    let parts = [io::IoSlice::new(head), io::IoSlice::new(body)];
    sendmsg(to, &parts, &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT).is_ok()
}

/// Receives the launch packet with its descriptors.
pub(crate) fn receive_launch(from: BorrowedFd) -> io::Result<Vec<OwnedFd>> {
    use rustix::net::*;
    let mut byte = [0u8; 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(p::MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(from, &mut [io::IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    if got.bytes != 1 || byte[0] != p::LAUNCH || got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other("unexpected packet"));
    }
    let mut fds = vec![];
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(list) = message {
            fds.extend(list);
        }
    }
    Ok(fds)
}

/// Is the other end of this socket gone?
pub(crate) fn hung_up(fd: BorrowedFd) -> bool {
    let mut entry = libc::pollfd { fd: fd.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one initialised entry, no waiting.
    unsafe { libc::poll(&mut entry, 1, 0) == 1 && entry.revents & libc::POLLHUP != 0 }
}

/// Writes a file of the kernel in one call.
pub(crate) fn write_file(path: &Path, value: &[u8]) -> io::Result<()> {
    std::fs::File::options().write(true).open(path)?.write_all(value)
}

/// Start time of a process, clock ticks since boot; 0 when it is gone.
pub(crate) fn start_time(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name may hold anything, even parentheses: count from the last one.
    stat.rsplit_once(')')
        .and_then(|(_, rest)| rest.split_ascii_whitespace().nth(19)?.parse().ok())
        .unwrap_or(0)
}

/// Seconds since the epoch.
pub(crate) fn now() -> i64 {
    rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_sec
}

/// A pair of connected stream sockets.
pub(crate) fn stream_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    use rustix::net::*;
    Ok(socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

/// Sets `O_NONBLOCK`.
pub(crate) fn nonblocking(fd: impl AsFd) {
    let fd = fd.as_fd();
    if let Ok(flags) = rustix::fs::fcntl_getfl(fd) {
        let _ = rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK);
    }
}

/// Moves a descriptor to a number of at least `above`.
pub(crate) fn move_above(fd: OwnedFd, above: RawFd) -> io::Result<OwnedFd> {
    if fd.as_raw_fd() >= above {
        return Ok(fd);
    }
    // SAFETY: the new descriptor is ours.
    unsafe { Ok(OwnedFd::from_raw_fd(check(libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, above))?)) }
}

/// The deadline: a descriptor that becomes readable at `at`, and a second bolt in the kernel.
///
/// The bolt is a POSIX timer that sends `SIGKILL` to the keeper itself one second later. It works although the keeper is
/// stopped or stuck, and the guest follows by its parent-death signal.
pub(crate) struct Deadline {
    fd: OwnedFd,
    bolt: libc::timer_t,
}

const BOLT_AFTER_NS: u64 = 1_000_000_000;

impl Deadline {
    /// Not armed.
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: plain calls with initialised arguments; the timer lives as long as the process.
        unsafe {
            let fd =
                check(libc::timerfd_create(libc::CLOCK_BOOTTIME, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK))?;
            let fd = OwnedFd::from_raw_fd(fd);
            let mut event = MaybeUninit::<libc::sigevent>::zeroed().assume_init();
            event.sigev_notify = libc::SIGEV_SIGNAL;
            event.sigev_signo = libc::SIGKILL;
            let mut bolt = MaybeUninit::<libc::timer_t>::zeroed().assume_init();
            check(libc::timer_create(libc::CLOCK_BOOTTIME, &mut event, &mut bolt))?;
            Ok(Self { fd, bolt })
        }
    }

    /// Arms it for `at`, nanoseconds of `CLOCK_BOOTTIME`; 0 disarms.
    pub(crate) fn set(&self, at: u64) -> io::Result<()> {
        let spec = |ns: u64| libc::itimerspec {
            it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: libc::timespec {
                tv_sec: (ns / 1_000_000_000) as libc::time_t,
                tv_nsec: (ns % 1_000_000_000) as libc::c_long,
            },
        };
        let bolt = if at == 0 { 0 } else { at.saturating_add(BOLT_AFTER_NS) };
        // SAFETY: both timers exist.
        unsafe {
            check(libc::timer_settime(self.bolt, libc::TIMER_ABSTIME, &spec(bolt), std::ptr::null_mut()))?;
            check(libc::timerfd_settime(
                self.fd.as_raw_fd(),
                libc::TFD_TIMER_ABSTIME,
                &spec(at),
                std::ptr::null_mut(),
            ))?;
        }
        Ok(())
    }
}

impl AsFd for Deadline {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
