//! A program inside a container.

use super::{
    At, Failure, Outcome, alive, become_user, bound, enter, init_bounding, packet_pair, seccomp,
    user_namespace,
};
use crate::sys;
use karst_keeper::{
    attach::{Request, SIGNAL},
    protocol as p,
};
use rustix::termios::{Winsize, tcsetwinsize};
use std::{
    ffi::{CString, OsStr},
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
};

/// What is read of the container's init before entering.
struct Facts {
    bounding: u64,
    /// The flag by which its user namespace is entered.
    user: i32,
    limits: Vec<(u32, libc::rlimit)>,
    /// AppArmor label, when it is confined.
    label: Option<String>,
}

fn facts(pid: u32) -> Outcome<Facts> {
    let mut limits = vec![];
    for resource in 0..16u32 {
        let mut limit = MaybeUninit::<libc::rlimit>::zeroed();
        // SAFETY: the kernel fills the structure; no new limit is given.
        unsafe {
            if libc::prlimit(pid as i32, resource as _, std::ptr::null(), limit.as_mut_ptr()) == 0 {
                limits.push((resource, limit.assume_init()));
            }
        }
    }
    let read = |f: &str| std::fs::read_to_string(format!("/proc/{pid}/attr/{f}")).ok();
    let label = read("apparmor/current")
        .or_else(|| read("current"))
        .map(|l| l.trim_end_matches(['\n', '\0']).to_owned())
        // `name (enforce)`: the mode is no part of the name.
        .map(|l| l.rsplit_once(" (").map_or(l.clone(), |(name, _)| name.to_owned()))
        .filter(|l| !l.is_empty() && l != "unconfined");
    Ok(Facts { bounding: init_bounding(pid)?, user: user_namespace(pid)?, limits, label })
}

fn c(s: &OsStr) -> Outcome<CString> {
    CString::new(s.as_bytes()).map_err(|_| Failure::new("an argument holds a NUL byte", libc::EINVAL))
}

/// Runs it and stays until it has ended.
pub(super) fn run(
    request: &Request,
    init: OwnedFd,
    streams: Vec<OwnedFd>,
    launch: BorrowedFd,
) -> Outcome<()> {
    let facts = facts(request.pid)?;
    alive(&init)?;
    let argv = request.argv.iter().map(|a| c(a)).collect::<Outcome<Vec<_>>>()?;
    let mut env = vec![];
    for (k, v) in &request.env {
        let mut line = k.clone();
        line.push("=");
        line.push(v);
        env.push(c(&line)?);
    }
    let path = request.env.iter().find(|(k, _)| k == "PATH").map(|(_, v)| v.as_os_str());
    let candidates =
        candidates(&request.argv[0], path.unwrap_or(OsStr::new("/usr/sbin:/usr/bin:/sbin:/bin")))?;
    // Children only: the helper itself stays on the host's side of everything, so it is neither frozen nor killed with
    // the container, and its signals always arrive.
    enter(&init, libc::CLONE_NEWPID)?;
    let (ours, theirs) = packet_pair().at("starting the program")?;
    // SAFETY: the process has one thread.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(io::Error::last_os_error()).at("starting the program");
    }
    if pid == 0 {
        drop(ours);
        let Err(failure) = child(request, &facts, init, streams, theirs.as_fd(), &argv, &env, &candidates);
        sys::send(theirs.as_fd(), b"E", &failure.body(), None);
        // SAFETY: ends the child without running destructors.
        unsafe { libc::_exit(127) };
    }
    drop((theirs, streams));
    let pidfd = rustix::process::Pid::from_raw(pid)
        .ok_or(rustix::io::Errno::SRCH)
        .and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()))
        .at("starting the program")?;
    let (terminal, failure) = handshake(ours)?;
    if let Some(failure) = failure {
        wait(pid);
        return Err(failure);
    }
    if !sys::send(launch, &[p::VERSION, p::code::OK], &[], terminal.as_ref().map(|t| t.as_fd())) {
        kill(&pidfd, libc::SIGKILL);
    }
    drop(terminal);
    supervise(launch, &pidfd);
    let code = wait(pid);
    sys::send(launch, &[p::VERSION, p::code::EVENT], &code.to_le_bytes(), None);
    Ok(())
}

/// Receives from the child: the master of its terminal, a failure, and at last end-of-file, by the executed program.
fn handshake(from: OwnedFd) -> Outcome<(Option<OwnedFd>, Option<Failure>)> {
    use rustix::net::*;
    let (mut terminal, mut failure) = (None, None);
    loop {
        let mut packet = [0u8; 256];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got =
            recvmsg(&from, &mut [io::IoSliceMut::new(&mut packet)], &mut control, RecvFlags::CMSG_CLOEXEC);
        let n = match got {
            Err(rustix::io::Errno::INTR) => continue,
            r => r.at("starting the program")?.bytes,
        };
        match packet[..n] {
            [] => return Ok((terminal, failure)),
            [b'T', ..] => {
                terminal = control.drain().find_map(|m| match m {
                    RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                    _ => None,
                });
            }
            [b'E', a, b, c, d, ref text @ ..] => {
                let text = String::from_utf8_lossy(text);
                let what = text.split(": ").next().unwrap_or("").to_owned();
                failure = Some(Failure::new(what, i32::from_le_bytes([a, b, c, d])));
            }
            _ => return Err(Failure::new("starting the program", libc::EPROTO)),
        }
    }
}

fn kill(pidfd: &OwnedFd, signal: i32) {
    // SAFETY: the descriptor is a pidfd, no siginfo is given.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
}

/// Delivers signals until the program has ended; kills it when the driver goes.
fn supervise(launch: BorrowedFd, pidfd: &OwnedFd) {
    let mut connected = true;
    loop {
        let mut fds = [
            libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 },
            libc::pollfd {
                fd: if connected { launch.as_raw_fd() } else { -1 },
                events: libc::POLLIN,
                revents: 0,
            },
        ];
        // SAFETY: two initialised entries.
        if unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) } < 0 {
            continue;
        }
        if fds[1].revents != 0 {
            let mut packet = [0u8; 16];
            match rustix::io::read(launch, &mut packet) {
                Ok(2) if packet[0] == SIGNAL => kill(pidfd, packet[1] as i32),
                Ok(1..) => {}
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                _ => {
                    connected = false;
                    kill(pidfd, libc::SIGKILL);
                }
            }
        }
        if fds[0].revents != 0 {
            return;
        }
    }
}

/// Reaps it: exit code, 128 + n when signal n ended it.
fn wait(pid: i32) -> i32 {
    let mut raw = 0;
    // SAFETY: waits for our own child.
    while unsafe { libc::waitpid(pid, &mut raw, 0) } < 0 {
        if io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            return 255;
        }
    }
    if libc::WIFSIGNALED(raw) { 128 + libc::WTERMSIG(raw) } else { libc::WEXITSTATUS(raw) }
}

/// Where a program may lie: itself when it has a slash, else in each directory of `PATH`.
fn candidates(program: &OsStr, path: &OsStr) -> Outcome<Vec<CString>> {
    if program.as_bytes().contains(&b'/') {
        return Ok(vec![c(program)?]);
    }
    path.as_bytes()
        .split(|b| *b == b':')
        .filter(|d| d.starts_with(b"/"))
        .map(|d| c(OsStr::from_bytes(&[d, b"/", program.as_bytes()].concat())))
        .collect()
}

enum Never {}

#[allow(clippy::too_many_arguments)] // called once
fn child(
    request: &Request,
    facts: &Facts,
    init: OwnedFd,
    streams: Vec<OwnedFd>,
    parent: BorrowedFd,
    argv: &[CString],
    env: &[CString],
    candidates: &[CString],
) -> Result<Never, Failure> {
    rustix::process::setsid().at("starting the program")?;
    for dir in &request.cgroups {
        sys::write_file(&dir.join("cgroup.procs"), b"0").at("entering the container's control group")?;
    }
    let _ = sys::write_file(std::path::Path::new("/proc/self/oom_score_adj"), b"0");
    // Opened while the host's own /proc is in sight, used at last.
    let label = match &facts.label {
        Some(label) => {
            let open = |f: &str| std::fs::File::options().write(true).open(f);
            let file = open("/proc/thread-self/attr/apparmor/exec")
                .or_else(|_| open("/proc/thread-self/attr/exec"))
                .at("taking the container's AppArmor profile")?;
            Some((file, format!("exec {label}")))
        }
        None => None,
    };
    let namespaces = facts.user
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    enter(&init, namespaces)?;
    drop(init);
    become_user(0, 0)?;
    let (uid, gid) = (request.uid.unwrap_or(0), request.gid.unwrap_or(0));
    match request.terminal {
        Some((columns, rows)) => terminal(columns, rows, uid, parent)?,
        None => {
            let [stdin, stdout, stderr] = streams.as_slice() else {
                return Err(Failure::new("passing the streams", libc::EINVAL));
            };
            for (fd, n) in [(stdin, 0), (stdout, 1), (stderr, 2)] {
                // SAFETY: plain call; duplicates are not close-on-exec. Passed descriptors have higher numbers.
                sys::check(unsafe { libc::dup2(fd.as_raw_fd(), n) }).at("passing the streams")?;
            }
        }
    }
    // SAFETY: plain calls with initialised arguments.
    unsafe {
        let mut empty = MaybeUninit::<libc::sigset_t>::zeroed().assume_init();
        libc::sigemptyset(&mut empty);
        libc::sigprocmask(libc::SIG_SETMASK, &empty, std::ptr::null_mut());
        for s in 1..=64 {
            libc::signal(s, libc::SIG_DFL);
        }
        libc::umask(0o022);
        for (resource, limit) in &facts.limits {
            libc::setrlimit(*resource as _, limit);
        }
    }
    seccomp::install(&request.denied)?;
    bound(facts.bounding)?;
    become_user(uid, gid)?;
    let enter_directory = |d: &OsStr| rustix::process::chdir(d);
    match &request.cwd {
        Some(cwd) => enter_directory(cwd).at("working directory")?,
        None => enter_directory(OsStr::new("/root"))
            .or_else(|_| enter_directory(OsStr::new("/")))
            .at("working directory")?,
    }
    // SAFETY: plain calls; all strings outlive execve, which only returns on failure.
    unsafe {
        // After the change of user, which clears it. If the helper dies, so does the program.
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
        if let Some((mut file, text)) = label {
            io::Write::write_all(&mut file, text.as_bytes()).at("taking the container's AppArmor profile")?;
        }
        sys::check(libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) as i32)
            .at("closing descriptors")?;
        let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
            list.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
        };
        let (argv, env) = (pointers(argv), pointers(env));
        let mut code = 127;
        for candidate in candidates {
            libc::execve(candidate.as_ptr(), argv.as_ptr(), env.as_ptr());
            match io::Error::last_os_error().raw_os_error() {
                Some(libc::ENOENT | libc::ENOTDIR) => {}
                // Found, and not executable: like a shell, look further but remember.
                _ => code = 126,
            }
        }
        libc::_exit(code)
    }
}

/// Opens a terminal of the container, makes it the controlling one and the standard streams, and sends its master out.
fn terminal(columns: u16, rows: u16, uid: u32, parent: BorrowedFd) -> Outcome<()> {
    use rustix::{
        fs::{Mode, OFlags, fstat, fstatfs, open},
        pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt},
    };
    const STEP: &str = "opening a terminal";
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let master = open("/dev/pts/ptmx", flags | OFlags::NOFOLLOW, Mode::empty()).at(STEP)?;
    // The container could have put anything there: only the kernel's own multiplexer goes out to the host's side.
    let (kind, stat) = (fstatfs(&master).at(STEP)?, fstat(&master).at(STEP)?);
    if kind.f_type as u64 != 0x1cd1 || stat.st_rdev != libc::makedev(5, 2) {
        return Err(Failure::new(STEP, libc::ENODEV));
    }
    rustix::fs::fcntl_setfl(&master, OFlags::RDWR).at(STEP)?;
    unlockpt(&master).at(STEP)?;
    let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
        .at(STEP)?;
    let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&slave, size).at(STEP)?;
    // The group stays what the mount gives (tty).
    rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(uid)), None).at(STEP)?;
    for n in 0..3 {
        // SAFETY: plain calls.
        sys::check(unsafe { libc::dup2(slave.as_raw_fd(), n) }).at(STEP)?;
    }
    // SAFETY: plain call; the process leads a session without a terminal.
    sys::check(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) }).at(STEP)?;
    if !sys::send(parent, b"T", &[], Some(master.as_fd())) {
        return Err(Failure::new(STEP, libc::EPIPE));
    }
    Ok(())
}
