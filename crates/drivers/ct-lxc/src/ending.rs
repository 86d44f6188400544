//! What makes a killed container die slowly, kept out of its way.
//!
//! The kernel lets the last close of an inotify descriptor wait for a grace period, ten to twenty milliseconds, and a process
//! that ends closes one after the other; systemd as a container's init has five. So before a kill these descriptors are
//! taken a second time here: the dying process closes none of them for the last time, and they are closed afterwards, where
//! nobody waits. That is all that is done with them. What cannot be taken only takes longer.

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::{
    fs,
    os::fd::{OwnedFd, RawFd},
};

/// Processes that are looked into, the oldest first: init and what a system runs before its services.
const PROCESSES: usize = 32;
/// Descriptors of one process that are looked at.
const LOOKED_AT: usize = 256;
/// Descriptors that are held.
const HELD: usize = 64;

/// Second descriptors of what dying processes would wait for; closed in the background.
#[derive(Debug, Default)]
pub(crate) struct Held(Vec<OwnedFd>);

impl Held {
    /// Takes those of `processes`, as far as they can be had. Blocks for some system calls, never for a process.
    pub(crate) fn take(processes: &[u32]) -> Self {
        let mut held = Self::default();
        for pid in processes.iter().take(PROCESSES) {
            held.of(*pid);
        }
        held
    }

    fn of(&mut self, pid: u32) {
        let Some(pidfd) = Pid::from_raw(pid as i32).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())
        else {
            return;
        };
        let Ok(open) = fs::read_dir(format!("/proc/{pid}/fd")) else { return };
        for entry in open.flatten().take(LOOKED_AT) {
            if self.0.len() >= HELD {
                return;
            }
            // A number that has come to mean another file meanwhile, or another process', is only closed here in turn.
            if fs::read_link(entry.path()).is_ok_and(|to| to.as_os_str() == "anon_inode:inotify")
                && let Some(number) = entry.file_name().to_str().and_then(|n| n.parse::<RawFd>().ok())
                && let Ok(descriptor) = pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty())
            {
                self.0.push(descriptor);
            }
        }
    }

    /// How many there are.
    #[cfg(test)]
    fn len(&self) -> usize {
        self.0.len()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let held = std::mem::take(&mut self.0);
        if held.is_empty() {
            return;
        }
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || drop(held))),
            Err(_) => drop(held),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::inotify;

    #[test]
    fn only_what_is_waited_for_is_taken() {
        let count = || Held::take(&[std::process::id()]).len();
        let _other = fs::File::open("/proc/self/status").unwrap();
        // Other tests of this process have such descriptors too: it counts when theirs stayed the same meanwhile.
        let held = (0..1000).find_map(|_| {
            let before = count();
            let watches = [(); 3].map(|()| inotify::init(inotify::CreateFlags::CLOEXEC).unwrap());
            let held = Held::take(&[std::process::id(), 0, u32::MAX >> 2]);
            drop(watches);
            let added = held.len().checked_sub(before);
            (count() == before + held.len() && added == Some(3)).then_some(held)
        });
        let held = held.expect("three are added");
        for descriptor in &held.0 {
            // The same open file, not one of the same kind.
            let at = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(descriptor));
            assert_eq!(fs::read_link(at).unwrap().as_os_str(), "anon_inode:inotify");
        }
    }
}
