//! The container's init, seen from the host's `/proc`.

use karst_model::{Error, Result};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use std::{
    fs,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::Path,
};

/// What a process makes of signals, as the kernel shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Minded {
    /// It has a handler.
    caught: u64,
    /// It does not hear them now, and may wait for them.
    blocked: u64,
}

impl Minded {
    fn of(pid: u32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
    }

    fn parse(status: &str) -> Option<Self> {
        let mask = |key: &str| {
            let text = status.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
            u64::from_str_radix(text.trim(), 16).ok()
        };
        Some(Self { caught: mask("SigCgt")?, blocked: mask("SigBlk")? })
    }

    fn catches(&self, signal: i32) -> bool {
        self.caught & (1 << (signal - 1)) != 0
    }

    fn minds(&self, signal: i32) -> bool {
        (self.caught | self.blocked) & (1 << (signal - 1)) != 0
    }
}

/// SIGRTMIN+3 as the C library counts, by which systemd, and what follows it, shuts down.
const RTMIN_3: i32 = 37;

/// The signal by which the init that runs this program shuts down, once it minds it. Nothing of the guest is executed or read:
/// where the name of the program says nothing (a copy as `/sbin/init`, say), what it makes of signals does.
///
/// - systemd waits for SIGRTMIN+3 on a descriptor, which is blocked for that.
/// - openrc-init blocks everything that it has no handler for. SIGTERM shuts down in all its versions.
/// - busybox' init waits for its signals blocked, which the kernel does not show as such meanwhile; but it has a handler for SIGTSTP,
///   from just after it blocked them. SIGUSR2 powers off, after `::shutdown:` of its inittab, as on Alpine `openrc shutdown`.
/// - sysvinit, which starts OpenRC elsewhere, has a handler for SIGPWR and what its inittab makes of it. It has one for SIGTSTP as
///   well, which it installs later.
fn halt_signal(program: &str, minded: Minded) -> Option<i32> {
    let signal = match program {
        "systemd" => return minded.minds(RTMIN_3).then_some(RTMIN_3),
        "openrc-init" => return minded.catches(libc::SIGTERM).then_some(libc::SIGTERM),
        busybox if busybox.starts_with("busybox") => {
            return minded.catches(libc::SIGTSTP).then_some(libc::SIGUSR2);
        }
        _ if minded.catches(libc::SIGPWR) => libc::SIGPWR,
        _ if minded.catches(libc::SIGTSTP) => libc::SIGUSR2,
        _ if minded.minds(RTMIN_3) => RTMIN_3,
        _ if minded.minds(libc::SIGPWR) => libc::SIGPWR,
        _ => return None,
    };
    Some(signal)
}

/// A container's init that was seen to run.
#[derive(Debug)]
pub(crate) struct Init {
    /// Pid on the host.
    pub(crate) pid: u32,
    /// Names this process for ever.
    pub(crate) pidfd: OwnedFd,
}

/// A line of `/proc/PID/status`.
fn status_field(pid: u32, key: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?.trim().to_owned())
}

impl Init {
    /// The init below `monitor` (`lxc-start`), once its program was executed.
    pub(crate) fn find(monitor: u32) -> Option<Self> {
        let own = fs::metadata(format!("/proc/{monitor}/exe")).ok()?;
        let children = fs::read_to_string(format!("/proc/{monitor}/task/{monitor}/children")).ok()?;
        for pid in children.split_ascii_whitespace().filter_map(|p| p.parse::<u32>().ok()) {
            let Ok(pidfd) = pidfd_open(Pid::from_raw(pid as i32)?, PidfdFlags::empty()) else {
                continue;
            };
            // First in a pid namespace of its own, and no longer the copy of `lxc-start` that sets it up.
            let first = status_field(pid, "NSpid").is_some_and(|s| {
                let ids: Vec<_> = s.split_ascii_whitespace().collect();
                ids.len() > 1 && ids.last() == Some(&"1")
            });
            let executed = fs::metadata(format!("/proc/{pid}/exe"))
                .is_ok_and(|m| (m.dev(), m.ino()) != (own.dev(), own.ino()));
            let child = status_field(pid, "PPid").is_some_and(|p| p == monitor.to_string());
            if first && executed && child {
                return Some(Self { pid, pidfd });
            }
        }
        None
    }

    /// Has it not ended?
    pub(crate) fn lives(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&now)) == Ok(0)
    }

    /// Sends a signal; `false` when it has ended.
    pub(crate) fn signal(&self, signal: Signal) -> bool {
        rustix::process::pidfd_send_signal(&self.pidfd, signal).is_ok()
    }

    /// The signal that makes this init shut down: its number; `None` as long as it would ignore it. The kernel keeps from a
    /// namespace's first process what that does not handle.
    pub(crate) fn halt_signal(&self) -> Option<i32> {
        halt_signal(self.program().as_deref().unwrap_or_default(), Minded::of(self.pid)?)
    }

    fn program(&self) -> Option<String> {
        let exe = fs::read_link(format!("/proc/{}/exe", self.pid)).ok()?;
        Some(exe.file_name()?.to_str()?.to_owned())
    }

    /// Has a program that is no init a handler for this signal, or does it wait for it?
    pub(crate) fn minds(&self, signal: i32) -> bool {
        Minded::of(self.pid).is_some_and(|m| m.minds(signal))
    }

    /// Sends a signal by its number.
    pub(crate) fn signal_number(&self, signal: i32) -> Result<()> {
        // SAFETY: signals of the C library's range are valid for the kernel.
        let signal = unsafe { Signal::from_raw_unchecked(signal) };
        if self.signal(signal) { Ok(()) } else { Err(Error::not_found("the guest is not running")) }
    }
}

/// The network namespace that `lxc-start` has made for its container, as soon as it has, and the process whose it is.
pub(crate) fn new_network(monitor: u32) -> Option<(u32, OwnedFd)> {
    let own = fs::metadata("/proc/self/ns/net").ok()?;
    let children = fs::read_to_string(format!("/proc/{monitor}/task/{monitor}/children")).ok()?;
    children.split_ascii_whitespace().filter_map(|p| p.parse::<u32>().ok()).find_map(|pid| {
        let namespace = fs::File::open(format!("/proc/{pid}/ns/net")).ok()?;
        let found = namespace.metadata().ok()?;
        let first = status_field(pid, "NSpid")?.split_ascii_whitespace().last() == Some("1");
        // Asked last: the process is still that child.
        let child = status_field(pid, "PPid")? == monitor.to_string();
        ((found.dev(), found.ino()) != (own.dev(), own.ino()) && first && child)
            .then(|| (pid, namespace.into()))
    })
}

/// How a container's init ended, when not by itself with code 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InitEnd {
    /// With this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl std::fmt::Display for InitEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(n) => write!(f, "code {n}"),
            Self::Signal(n) => write!(f, "signal {n}"),
        }
    }
}

/// The end of `lxc-start`'s log, from the beginning of a line; `clear` empties it. There is none before the first start.
pub(crate) fn runner_log(path: &Path, max: usize, clear: bool) -> Result<Vec<u8>> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = match fs::File::options().read(true).write(clear).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => return Err(e.into()),
    };
    let start = file.metadata()?.len().saturating_sub(max as u64);
    file.seek(SeekFrom::Start(start))?;
    let mut text = vec![];
    Read::by_ref(&mut file).take(max as u64).read_to_end(&mut text)?;
    if start > 0 {
        let line = text.iter().position(|b| *b == b'\n').map_or(text.len(), |n| n + 1);
        text.drain(..line);
    }
    if clear {
        // `lxc-start` appends.
        file.set_len(0)?;
    }
    Ok(text)
}

/// The end of `lxc-start`'s log, at most 64 KiB.
fn log_tail(log: &Path) -> Option<String> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = fs::File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(64 * 1024))).ok()?;
    let mut text = vec![];
    file.take(64 * 1024).read_to_end(&mut text).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}

/// How init ended, as `lxc-start`'s log says last; its exit code is 0 whatever happened.
pub(crate) fn init_end(log: &Path) -> Option<InitEnd> {
    parse_end(&log_tail(log)?)
}

/// `… Child <PID> ended on signal NAME(NUMBER)` or `… ended on error (CODE)`.
fn parse_end(log: &str) -> Option<InitEnd> {
    let line = log.lines().rev().find(|l| l.contains("> ended on "))?;
    let number = line.rsplit_once('(')?.1.split(')').next()?.parse().ok()?;
    Some(if line.contains("> ended on signal ") { InitEnd::Signal(number) } else { InitEnd::Code(number) })
}

/// The first errors in `lxc-start`'s log, in words, bounded.
pub(crate) fn log_reason(log: &Path) -> Option<String> {
    reason(&log_tail(log)?)
}

/// `lxc-start NAME TIME ERROR module - file:function:line - words`: the words of the first errors, which name the cause.
fn reason(log: &str) -> Option<String> {
    let words: Vec<&str> = log
        .lines()
        .filter(|l| l.contains(" ERROR "))
        .filter_map(|l| l.splitn(3, " - ").nth(2))
        .filter(|w| {
            !w.starts_with("Failed to spawn container") && !w.starts_with("The container failed to start")
        })
        .take(3)
        .collect();
    (!words.is_empty()).then(|| words.join("; ").chars().take(600).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn minded(caught: &[i32], blocked: &[i32]) -> Minded {
        let mask = |all: &[i32]| all.iter().fold(0, |m, n| m | 1 << (n - 1));
        Minded { caught: mask(caught), blocked: mask(blocked) }
    }

    #[test]
    fn inits_are_known_by_their_name_or_by_what_they_mind() {
        use libc::{SIGALRM, SIGCHLD, SIGHUP, SIGINT, SIGPWR, SIGSEGV, SIGTERM, SIGTSTP, SIGUSR1, SIGUSR2};
        let nothing = Minded::default();
        let systemd = minded(&[SIGSEGV], &[SIGTERM, SIGPWR, SIGCHLD, RTMIN_3]);
        // While it waits, and while it does something.
        let busybox = [minded(&[SIGTSTP], &[]), minded(&[SIGTSTP], &[SIGPWR, SIGUSR1, SIGUSR2, SIGTERM])];
        let all: Vec<i32> = (1..65).filter(|n| ![SIGCHLD, SIGINT, SIGTERM, SIGPWR].contains(n)).collect();
        let openrc = minded(&[SIGCHLD, SIGINT, SIGTERM, SIGPWR], &all);
        let sysvinit = minded(&[SIGALRM, SIGHUP, SIGINT, SIGCHLD, SIGPWR, SIGTSTP], &[]);
        for (program, minds, wanted) in [
            ("systemd", systemd, Some(RTMIN_3)),
            ("init", systemd, Some(RTMIN_3)),
            ("systemd", nothing, None),
            ("busybox", busybox[0], Some(SIGUSR2)),
            ("busybox.static", busybox[1], Some(SIGUSR2)),
            ("init", busybox[0], Some(SIGUSR2)),
            ("init", busybox[1], Some(SIGUSR2)),
            // A shell script that is the first program; it hands over to an init later, or never does.
            ("busybox", nothing, None),
            ("dash", nothing, None),
            ("openrc-init", openrc, Some(SIGTERM)),
            ("openrc-init", minded(&[SIGCHLD, SIGINT, SIGTERM], &all), Some(SIGTERM)),
            ("openrc-init", minded(&[], &all), None),
            ("init", openrc, Some(SIGPWR)),
            ("init", sysvinit, Some(SIGPWR)),
            ("init", minded(&[SIGALRM, SIGHUP], &[]), None),
            ("other", minded(&[], &[SIGPWR, SIGTERM]), Some(SIGPWR)),
        ] {
            assert_eq!(halt_signal(program, minds), wanted, "{program}: {minds:x?}");
        }
    }

    #[test]
    fn what_is_minded_is_read_from_the_kernels_words() {
        let status =
            "Name:\tinit\nSigBlk:\t0000001000000000\nSigIgn:\t0000000000000000\nSigCgt:\t0000000000080000\n";
        let read = Minded::parse(status).unwrap();
        assert_eq!(read, minded(&[libc::SIGTSTP], &[RTMIN_3]));
        assert!(read.catches(libc::SIGTSTP) && read.minds(RTMIN_3) && !read.minds(libc::SIGTERM));
        assert_eq!(Minded::parse("Name:\tgone\n"), None);
        assert!(Minded::of(std::process::id()).is_some());
    }

    #[test]
    fn the_cause_is_found_in_the_log() {
        let log = "\
lxc-start x 20261121084443.539 WARN     start - ../src/lxc/start.c:f:1 - Inherited fd 10
lxc-start x 20261121084443.539 ERROR    network - ../src/lxc/network.c:g:2 - No such device - Failed to attach \"a\" to bridge \"b\"
lxc-start x 20261121084443.539 ERROR    start - ../src/lxc/start.c:lxc_spawn:3 - Failed to create the network
lxc-start x 20261121084443.539 ERROR    lxc_start - ../src/lxc/tools/lxc_start.c:main:4 - The container failed to start";
        assert_eq!(
            super::reason(log).unwrap(),
            "No such device - Failed to attach \"a\" to bridge \"b\"; Failed to create the network"
        );
        assert_eq!(super::reason("nothing"), None);
        let end =
            "lxc-start x T INFO     error - ../src/lxc/error.c:f:31 - Child <7> ended on signal Killed(9)";
        assert_eq!(super::parse_end(end), Some(super::InitEnd::Signal(9)));
        assert_eq!(super::parse_end("x - Child <7> ended on error (3)\ny"), Some(super::InitEnd::Code(3)));
        assert_eq!(super::parse_end(log), None);
    }
}
