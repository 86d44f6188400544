//! One daemon to a pool.
//!
//! `POOL/.lock` is locked (flock, exclusive) by the process that has the pool open: what lies in a directory that several
//! daemons are granted is swept, changed and removed by one of them only. The kernel frees it with the process. Opening a
//! pool again in the same process shares the lock, which is of the daemon, not of the handle.
//!
//! A pool of objects has no directory that all daemons see: its lock is `/run/karst/pool-<id>.lock`, which goes when it is let
//! go (one that a killed daemon left goes with the next, or with the machine's next start).

use karst_model::{Error, Result};
use rustix::fs::{FlockOperation, Mode, OFlags, fstat, openat};
use std::{
    collections::BTreeMap,
    fs::File,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, Weak},
    time::Duration,
};

/// The file's name.
const NAME: &str = ".lock";

/// Where locks lie that all daemons of the machine share.
const SHARED: &str = "/run/karst";

/// A locked pool; others may have it when the last of these is dropped.
#[derive(Debug)]
pub struct Hold {
    /// What is locked, for as long as it is open.
    file: OwnedFd,
    /// The file's name goes first, while it is locked.
    goes: Option<PathBuf>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(path) = &self.goes {
            let _ = std::fs::remove_file(path); // an empty file in memory
        }
    }
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
    hold_file(&File::open(root)?, NAME, None)
}

/// Locks a pool that has no directory which all daemons of the machine see.
///
/// # Errors
/// As [`hold`].
pub fn hold_by_id(pool: uuid::Uuid) -> Result<Arc<Hold>> {
    let name = format!("pool-{pool}.lock");
    for _ in 0..TRIES {
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(SHARED)?;
        let path = Path::new(SHARED).join(&name);
        let hold = hold_file(&File::open(SHARED)?, &name, Some(path.clone()))?;
        // Whoever had it before may have taken the name away while we waited.
        let there = std::fs::symlink_metadata(&path).ok().map(|m| (m.dev(), m.ino()));
        let ours = fstat(&hold.file).map_err(std::io::Error::from)?;
        if there == Some((ours.st_dev, ours.st_ino)) {
            return Ok(hold);
        }
        // The name is another's by now, which must not go with this.
        if let Some(mut alone) = Arc::into_inner(hold) {
            alone.goes = None;
        }
    }
    Err(Error::conflict(TAKEN))
}

const TAKEN: &str = "another daemon on this host uses the pool; stop that one first";

fn hold_file(directory: &File, name: &str, goes: Option<PathBuf>) -> Result<Arc<Hold>> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = openat(directory, name, flags, Mode::RUSR | Mode::WUSR).map_err(std::io::Error::from)?;
    let found = fstat(&file).map_err(std::io::Error::from)?;
    let key = (found.st_dev, found.st_ino);
    for tried in 0..TRIES {
        if tried > 0 {
            // Not with what others look into: they may want other pools.
            std::thread::sleep(PAUSE);
        }
        let mut held = HELD.lock().unwrap_or_else(|e| e.into_inner());
        held.retain(|_, hold| hold.strong_count() > 0);
        if let Some(hold) = held.get(&key).and_then(Weak::upgrade) {
            return Ok(hold);
        }
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => continue,
            other => other.map_err(std::io::Error::from)?,
        }
        let hold = Arc::new(Hold { file, goes });
        held.insert(key, Arc::downgrade(&hold));
        return Ok(hold);
    }
    Err(Error::conflict(TAKEN))
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
    fn one_that_is_shared_by_its_id_leaves_no_file() {
        if !crate::backends::root() {
            return;
        }
        let id = uuid::Uuid::new_v4();
        let path = Path::new(SHARED).join(format!("pool-{id}.lock"));
        let first = hold_by_id(id).unwrap();
        assert!(Arc::ptr_eq(&first, &hold_by_id(id).unwrap()));
        let other = || {
            let file = File::options().write(true).open(&path).unwrap();
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map(|()| file)
        };
        assert!(other().is_err());
        drop(first);
        assert!(!path.exists());
        // What a killed process left is taken over.
        std::fs::write(&path, "").unwrap();
        let foreign = other().unwrap();
        assert_eq!(hold_by_id(id).unwrap_err().kind, karst_model::ErrorKind::Conflict);
        assert!(path.exists(), "refused, it takes nothing away");
        drop(foreign);
        drop(hold_by_id(id).unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn a_link_in_its_place_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), dir.path().join(NAME)).unwrap();
        hold(dir.path()).unwrap_err();
        assert!(!dir.path().join("elsewhere").exists());
    }
}
