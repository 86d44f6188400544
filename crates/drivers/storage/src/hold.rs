//! One daemon to a pool.
//!
//! `POOL/.lock` is locked (flock, exclusive) by the process that has the pool open: what lies in a directory that several
//! daemons are granted is swept, changed and removed by one of them only. The kernel frees it with the process. Opening a
//! pool again in the same process shares the lock, which is of the daemon, not of the handle.

use karst_model::{Error, Result};
use rustix::fs::{FlockOperation, Mode, OFlags, fstat, openat};
use std::{
    collections::BTreeMap,
    fs::File,
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, Mutex, Weak},
    time::Duration,
};

/// The file's name.
const NAME: &str = ".lock";

/// A locked pool; others may have it when the last of these is dropped.
#[derive(Debug)]
pub(crate) struct Hold {
    _file: OwnedFd,
}

/// What this process has locked, by device and inode.
static HELD: Mutex<BTreeMap<(u64, u64), Weak<Hold>>> = Mutex::new(BTreeMap::new());

/// How often it is tried, and how long apart: a daemon that was killed a moment ago has its files until it is gone.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(50);

/// Locks the pool in the directory `root`. Waits up to a second.
///
/// # Errors
/// `Conflict` while another process has it; the system's.
pub(crate) fn hold(root: &Path) -> Result<Arc<Hold>> {
    // By a descriptor, so that the file is in the directory that was opened.
    let root = File::open(root)?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = openat(&root, NAME, flags, Mode::RUSR | Mode::WUSR).map_err(std::io::Error::from)?;
    let found = fstat(&file).map_err(std::io::Error::from)?;
    let mut held = HELD.lock().unwrap_or_else(|e| e.into_inner());
    held.retain(|_, hold| hold.strong_count() > 0);
    if let Some(hold) = held.get(&(found.st_dev, found.st_ino)).and_then(Weak::upgrade) {
        return Ok(hold);
    }
    for wait in (0..TRIES).rev() {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) if wait > 0 => std::thread::sleep(PAUSE),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(Error::conflict(
                    "another daemon on this host uses the pool; stop that one first",
                ));
            }
            other => {
                other.map_err(std::io::Error::from)?;
                break;
            }
        }
    }
    let hold = Arc::new(Hold { _file: file });
    held.insert((found.st_dev, found.st_ino), Arc::downgrade(&hold));
    Ok(hold)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Another process is another open file to the kernel.
    fn foreign(root: &Path) -> File {
        let file = File::options().write(true).create(true).truncate(false).open(root.join(NAME)).unwrap();
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
        file
    }

    #[test]
    fn one_process_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let other = foreign(dir.path());
        let refused = hold(dir.path()).unwrap_err();
        assert_eq!(refused.kind, karst_model::ErrorKind::Conflict, "{refused:?}");
        drop(other);
        let (first, second) = (hold(dir.path()).unwrap(), hold(dir.path()).unwrap());
        assert!(Arc::ptr_eq(&first, &second));
        drop(first);
        let again = File::open(dir.path().join(NAME)).unwrap();
        let try_lock = || rustix::fs::flock(&again, FlockOperation::NonBlockingLockExclusive);
        assert!(try_lock().is_err(), "the second has it still");
        drop(second);
        try_lock().unwrap();
    }

    #[test]
    fn a_link_in_its_place_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), dir.path().join(NAME)).unwrap();
        hold(dir.path()).unwrap_err();
        assert!(!dir.path().join("elsewhere").exists());
    }
}
