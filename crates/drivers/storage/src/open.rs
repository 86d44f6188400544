//! Opening a pool on a file system: its lock, its directories, and what an earlier process left half-made.

use crate::{
    FilePool, abilities, descriptions,
    files::{blocking, fresh},
    flush,
    hold::{Hold, hold},
    places,
    projects::{self, Projects, Without},
    states::{Directories, States, Subvolumes, set_mode},
    sweep::{Live, sweeper},
};
use karst_host::sandbox::Launcher;
use karst_model::{Error, Result, storage::PoolKind};
use std::{
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::sync::mpsc;

/// What a pool is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Use,
    Look,
}

/// Where it is tried what the pool can have (layers, limits): not in the trash, where a sweep that this process began for an earlier use
/// of the pool would take it away.
const TRIAL: &str = "trial";

/// Tries something in an empty directory of the pool, of which nothing stays.
fn tried<T>(root: &Path, trial: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let at = root.join(TRIAL);
    // One that was killed in the midst of this left it.
    let gone = || {
        projects::release(&at);
        match std::fs::remove_dir_all(&at) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    };
    gone()?;
    std::fs::create_dir(&at)?;
    let found = trial(&at);
    gone()?;
    found
}

/// How plain directories are kept in `root`: by what its file system can.
fn directories(root: &Path, purpose: Purpose) -> Result<Directories> {
    let projects = match purpose {
        Purpose::Look => Err(Without::Looking),
        Purpose::Use => tried(root, |trial| Projects::find(root, trial))?,
    };
    if let Ok(projects) = &projects {
        projects.repair(root)?;
    }
    Ok(Directories { projects })
}

/// To the trash; that sweep may have been there first.
fn throw_away(state: &Path, root: &Path) -> io::Result<()> {
    match std::fs::rename(state, fresh(&root.join("trash"))) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Locks the pool in `root`; for use, makes its directories and gets what is half-made or of nothing out of the way.
fn prepare(root: &Path, purpose: Purpose) -> Result<Arc<Hold>> {
    let make = |dir: &Path, mode| -> Result<()> {
        std::fs::DirBuilder::new().recursive(true).mode(mode).create(dir)?;
        set_mode(dir, mode)
    };
    if purpose == Purpose::Look {
        return hold(root);
    }
    // Guests' ids pass through the pool's own and its volumes' directory.
    make(root, 0o711)?;
    let hold = hold(root)?;
    make(&root.join("volumes"), 0o711)?;
    for dir in ["snapshots", "images", "tmp", "trash"] {
        make(&root.join(dir), 0o700)?;
    }
    // Half-made states take the same way out as deleted ones: no start waits for it.
    for entry in std::fs::read_dir(root.join("tmp"))?.flatten() {
        throw_away(&entry.path(), root)?;
    }
    places::recover(root)?;
    // So do snapshots of volumes whose deletion was interrupted.
    for entry in std::fs::read_dir(root.join("snapshots"))?.flatten() {
        if !root.join("volumes").join(entry.file_name()).exists() {
            throw_away(&entry.path(), root)?;
        }
    }
    descriptions::sweep(root)?;
    Ok(hold)
}

impl FilePool {
    /// Opens (and makes) a pool of kind `dir` in the directory `root`; removes what an earlier process left half-made, and
    /// goes on freeing what it was deleting.
    ///
    /// # Errors
    /// The directory cannot be used, or another process has the pool.
    pub async fn directory(root: impl Into<PathBuf>, worker: Launcher) -> Result<Self> {
        Self::open(root.into(), PoolKind::Dir, worker, Purpose::Use).await
    }

    /// The same of kind `btrfs`; the directory is on a file system of that kind.
    ///
    /// # Errors
    /// It is not, or cannot be used.
    pub async fn btrfs(root: impl Into<PathBuf>, worker: Launcher) -> Result<Self> {
        Self::open(root.into(), PoolKind::Btrfs, worker, Purpose::Use).await
    }

    /// Opens a pool that is there, to look at what it has: nothing is made, removed or freed.
    ///
    /// # Errors
    /// As those of the others.
    pub async fn look(kind: PoolKind, root: impl Into<PathBuf>, worker: Launcher) -> Result<Self> {
        Self::open(root.into(), kind, worker, Purpose::Look).await
    }

    async fn open(root: PathBuf, kind: PoolKind, worker: Launcher, purpose: Purpose) -> Result<Self> {
        match kind {
            PoolKind::Btrfs if !karst_host::btrfs::is_btrfs(&root)? => {
                return Err(Error::invalid("source", "the directory is not on a btrfs file system"));
            }
            PoolKind::Zfs | PoolKind::Lvm => {
                return Err(Error::internal("a pool of this kind is not one of directories", kind.as_str()));
            }
            PoolKind::Dir | PoolKind::Btrfs => {}
        }
        let at = root.clone();
        let (hold, states, abilities) = blocking(move || {
            let hold = prepare(&at, purpose)?;
            let states: Arc<dyn States> = match kind {
                PoolKind::Btrfs => Arc::new(Subvolumes),
                _ => Arc::new(directories(&at, purpose)?),
            };
            let layered = purpose == Purpose::Use
                && !states.instant()
                && tried(&at, |trial| Ok(karst_host::overlay::works(trial)))?;
            let abilities = match purpose {
                Purpose::Use => tried(&at, |trial| abilities::find(trial, layered, states.limits()))?,
                Purpose::Look => abilities::unknown(&at)?,
            };
            tracing::debug!(pool = %at.display(), ?abilities, "what the pool's file system can");
            Ok((hold, states, abilities))
        })
        .await?;
        let (taking, live) = (Arc::default(), Arc::<Live>::default());
        let (sweep, wanted) = mpsc::channel(64);
        tokio::spawn(sweeper(root.clone(), states.clone(), Arc::clone(&taking), live.clone(), wanted));
        let (flush, wanted) = mpsc::channel(64);
        let root = Arc::new(root);
        tokio::spawn(flush::flusher(root.clone(), wanted));
        let pool = Self {
            root,
            states,
            layered: abilities.layers,
            abilities,
            moving: Arc::default(),
            tried: purpose == Purpose::Use,
            opened: Arc::default(),
            live,
            worker: worker.into(),
            sweep,
            flush,
            copies: Arc::new(tokio::sync::Semaphore::new(2)),
            taking,
            _hold: hold,
        };
        if purpose == Purpose::Use {
            pool.wake_sweeper();
            pool.wake_flusher();
        }
        Ok(pool)
    }

    /// Removes everything that is in it. The pool is of no use afterwards.
    ///
    /// # Errors
    /// The system refuses.
    pub async fn clear(&self) -> Result<()> {
        let (root, states) = (self.root.clone(), self.states.clone());
        blocking(move || {
            for below in ["snapshots", "volumes", "images", descriptions::DIRECTORY, "tmp", "trash", TRIAL] {
                states.remove(&root.join(below))?;
            }
            Ok(())
        })
        .await
    }
}
