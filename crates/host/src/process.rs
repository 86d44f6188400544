//! Processes that are not our children: found by what they run, held by a pidfd, so that a reused pid never receives what
//! was meant for another (pidfd_open(2), proc(5)).

use karst_model::{Error, Result};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, PidfdFlags, WaitId, WaitIdOptions},
};
use std::{ffi::OsString, os::fd::OwnedFd, os::unix::ffi::OsStringExt, sync::Arc, time::Duration};
use tokio::io::{Interest, unix::AsyncFd};

pub use rustix::process::Signal;

/// A process, or what is left of it.
#[derive(Debug, Clone)]
pub struct Process {
    pid: Pid,
    fd: Arc<OwnedFd>,
}

impl Process {
    /// The process that has this pid now, with its argument list, read after the pidfd was taken: the two belong together.
    /// `None` when there is none, or only one without arguments: a zombie, a kernel thread, one in the midst of exec.
    pub fn open(pid: i32) -> Option<(Self, Vec<OsString>)> {
        let pid = Pid::from_raw(pid)?;
        let fd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
        let line = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).ok()?;
        let process = Self { pid, fd: Arc::new(fd) };
        // The pid could have been reused before the file was read only if the process had ended.
        (!line.is_empty() && process.alive()).then(|| {
            let line = line.strip_suffix(b"\0").unwrap_or(&line);
            let arguments = line.split(|b| *b == 0).map(|a| OsString::from_vec(a.to_vec())).collect();
            (process, arguments)
        })
    }

    /// All processes whose argument list `is_it` accepts. Reads all of `/proc`: some milliseconds.
    ///
    /// # Errors
    /// Internal.
    pub fn find(is_it: impl Fn(&[OsString]) -> bool) -> Result<Vec<Self>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc")? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().and_then(|n| n.parse().ok()) else {
                continue;
            };
            if let Some((process, arguments)) = Self::open(pid)
                && is_it(&arguments)
            {
                found.push(process);
            }
        }
        Ok(found)
    }

    /// Its pid.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Has it not ended? (A zombie has.)
    pub fn alive(&self) -> bool {
        !self.wait(Duration::ZERO)
    }

    /// Waits until it ended; blocks the thread. `false` when it still runs after `limit`.
    pub fn wait(&self, limit: Duration) -> bool {
        let until = std::time::Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(std::time::Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            match rustix::event::poll(&mut [PollFd::new(&*self.fd, PollFlags::IN)], Some(&timeout)) {
                Ok(n) => return n > 0,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }

    /// Waits until it ended.
    ///
    /// # Errors
    /// Internal.
    pub async fn ended(&self) -> Result<()> {
        // SAFETY: `PidFd` owns (shares) its descriptor and always names the same open one until it is dropped.
        let fd = unsafe { AsyncFd::register_with_interest(PidFd(self.fd.clone()), Interest::READABLE) }
            .map_err(std::io::Error::from)?;
        let _ = fd.readable().await?;
        self.reap();
        Ok(())
    }

    /// Sends a signal; nothing happens when it has ended.
    ///
    /// # Errors
    /// Internal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        match rustix::process::pidfd_send_signal(&*self.fd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(e) => Err(Error::internal("a process could not be signalled", e)),
        }
    }

    /// Ends it: asks, and kills after `patience`. Blocks the thread.
    ///
    /// # Errors
    /// Internal when it survives a kill by 5 s.
    pub fn end(&self, patience: Duration) -> Result<()> {
        self.signal(Signal::TERM)?;
        if !self.wait(patience) {
            self.signal(Signal::KILL)?;
            if !self.wait(Duration::from_secs(5)) {
                return Err(Error::internal("a process does not end", format!("pid {}", self.pid())));
            }
        }
        self.reap();
        Ok(())
    }

    /// Takes its exit status away if it is a child (an adopted orphan, where we are the subreaper), lest it stay a zombie.
    fn reap(&self) {
        use std::os::fd::AsFd;
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let _ = rustix::process::waitid(WaitId::PidFd(self.fd.as_fd()), options);
    }
}

#[derive(Debug)]
struct PidFd(Arc<OwnedFd>);

impl std::os::fd::AsRawFd for PidFd {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(tag: &str) -> std::process::Child {
        // The tag is an argument that nothing else on this machine has.
        std::process::Command::new("/bin/sh")
            .args(["-c", "read x", tag])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap()
    }

    #[tokio::test]
    async fn found_by_its_arguments_watched_and_ended() {
        let tag = format!("karst-process-test-{}", std::process::id());
        let mut child = sleeper(&tag);
        // A process in the midst of exec has no arguments for a moment.
        let until = std::time::Instant::now() + Duration::from_secs(10);
        let found = loop {
            let found = Process::find(|a| a.last().is_some_and(|l| *l == *tag)).unwrap();
            if !found.is_empty() {
                break found;
            }
            assert!(std::time::Instant::now() < until, "the process is not found");
            tokio::task::yield_now().await;
        };
        assert_eq!(found.iter().map(Process::pid).collect::<Vec<_>>(), [child.id() as i32]);
        let process = found[0].clone();
        assert!(process.alive());
        let watch = tokio::spawn({
            let process = process.clone();
            async move { process.ended().await }
        });
        tokio::task::spawn_blocking(move || process.end(Duration::from_secs(5))).await.unwrap().unwrap();
        tokio::time::timeout(Duration::from_secs(60), watch).await.unwrap().unwrap().unwrap();
        assert!(!found[0].alive());
        assert!(child.wait().is_err(), "its exit status was taken");
        found[0].signal(Signal::TERM).unwrap();
        assert!(Process::open(child.id() as i32).is_none());
    }
}
