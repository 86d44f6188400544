//! The container's init, seen from the host's `/proc`.

use karst_model::{Error, Result};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use std::{
    fs,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::Path,
};

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

    /// The signal that makes this kind of init shut down: its number.
    pub(crate) fn halt_signal(&self) -> i32 {
        match self.program().as_deref() {
            Some("systemd") => 37,                // SIGRTMIN+3 as the C library counts
            Some("busybox") => libc::SIGUSR2,     // poweroff
            Some("openrc-init") => libc::SIGTERM, // shuts down
            _ => libc::SIGPWR,                    // sysvinit and LXC's convention
        }
    }

    fn program(&self) -> Option<String> {
        let exe = fs::read_link(format!("/proc/{}/exe", self.pid)).ok()?;
        Some(exe.file_name()?.to_str()?.to_owned())
    }

    /// Has the init a handler for this signal? Without one it ignores the signal: the kernel protects a namespace's
    /// first process.
    pub(crate) fn handles(&self, signal: i32) -> bool {
        // Busybox' init waits for signals that it has blocked, which the kernel does not show as such meanwhile. For this
        // one it has a handler, from just after it blocked them.
        let signal = if self.program().as_deref() == Some("busybox") { libc::SIGTSTP } else { signal };
        self.minds(signal)
    }

    /// As [`Init::handles`], of a program that is no init.
    pub(crate) fn minds(&self, signal: i32) -> bool {
        ["SigCgt", "SigBlk"]
            .iter()
            .filter_map(|k| u64::from_str_radix(&status_field(self.pid, k)?, 16).ok())
            .any(|mask| mask & (1 << (signal - 1)) != 0)
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
