//! Limits of trees on plain directories: each tree is a project of its own of its file system, where that has project quotas.
//!
//! A state gets its project before there is anything of the tree in it, so that all of the tree has it; snapshots have none. The number is
//! written down nowhere but there, by the file system itself: whoever takes one finds that nobody has it, gives it to his empty directory,
//! and has it if that is all that it counts then. Who was at the same number at the same time gives it up as well. So daemons and machines
//! that share a file system need no list, a pool that is carried elsewhere brings its numbers along, and a kill in between leaves a
//! state in the making like any other. A limit goes before what it limits: after the last file of a project nothing of it is left.

use crate::states::Record;
use karst_host::project_quota::{self, Held};
use karst_model::{ByteSize, Error, Result};
use std::{collections::HashSet, io, path::Path};

/// Numbers that are ours to take: above what administrators and their programs begin with, below what signed numbers break at.
const FIRST: u32 = 0x6b00_0000;
const COUNT: u32 = 0x0100_0000;
/// How often another number is tried.
const TRIES: u32 = 1000;
/// What is allowed beside the files of the tree: the state's record and the directories around it.
const BESIDE: u64 = 1 << 20;

fn ours(id: u32) -> bool {
    (FIRST..FIRST + COUNT).contains(&id)
}

/// What a state may have whose tree may have `size`.
pub(crate) fn allowed(size: ByteSize) -> u64 {
    size.0.saturating_add(BESIDE)
}

/// Projects of the file system of a pool.
#[derive(Debug, Default)]
pub(crate) struct Projects {
    /// Numbers that the machine's administrator has given a name.
    named: HashSet<u32>,
}

/// Why a pool has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Without {
    /// It was opened to be looked at.
    Looking,
    /// A file system that could have them.
    NotMounted,
    /// One that knows none.
    Unknown,
    /// The pool itself lies in a project of somebody.
    Within(u32),
}

impl Without {
    /// What to do about it.
    pub fn fix(self) -> String {
        match self {
            Self::Looking => "it is only looked at".into(),
            Self::NotMounted => "its file system is not mounted with project quotas (ext4 with the feature \"project\": -o prjquota; \
                                 XFS: -o pquota); mount it so and start the daemon anew, use a pool of another kind, or leave the size out"
                .into(),
            Self::Unknown => "its file system has no project quotas, as ext4 and XFS have; use a pool there or of another kind, or \
                              leave the size out"
                .into(),
            Self::Within(id) => format!(
                "its directory is in project {id} of its file system, which is somebody else's; use a pool in another directory or of \
                 another kind, or leave the size out"
            ),
        }
    }
}

/// Numbers in texts in the forms of `/etc/projid` (`name:number`) and `/etc/projects` (`number:directory`).
fn named(projid: &str, projects: &str) -> HashSet<u32> {
    let last = projid.lines().filter_map(|line| line.trim().rsplit(':').next()?.parse().ok());
    let first = projects.lines().filter_map(|line| line.trim().split(':').next()?.parse().ok());
    last.chain(first).collect()
}

impl Projects {
    /// Those of the pool in `root`; or why it has none. In `trial`, an empty directory of it, is tried what will be asked for.
    pub fn find(root: &Path, trial: &Path) -> Result<Result<Self, Without>> {
        const EXT4: i128 = 0xef53;
        const XFS: i128 = 0x5846_5342;
        const F2FS: i128 = 0xf2f5_2010;
        if !project_quota::enforced(root)? {
            let kind = rustix::fs::statfs(root).map_err(io::Error::from)?.f_type as i128;
            let could = [EXT4, XFS, F2FS].contains(&kind);
            return Ok(Err(if could { Without::NotMounted } else { Without::Unknown }));
        }
        for directory in [root, trial] {
            let own = project_quota::of(directory)?;
            if own.handed_on {
                return Ok(Err(Without::Within(own.id)));
            }
        }
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let found = Self { named: named(&read("/etc/projid"), &read("/etc/projects")) };
        let tried = (|| -> Result<bool> {
            let (id, below) = (found.claim(trial)?, trial.join("below"));
            std::fs::create_dir(&below)?;
            project_quota::limit(trial, id, Some(BESIDE))?;
            let (held, handed_on) = (project_quota::held(trial, id)?, project_quota::of(&below)?);
            project_quota::limit(trial, id, None)?;
            Ok(held.limit == Some(BESIDE) && held.entries == 2 && handed_on.id == id && handed_on.handed_on)
        })();
        match tried {
            Ok(true) => Ok(Ok(found)),
            Ok(false) => Ok(Err(Without::Unknown)),
            // The kernel says that they are held, and that is all that a full disk tells.
            Err(e) if e.is(karst_model::ErrorKind::Quota) => Ok(Ok(found)),
            Err(e) => {
                tracing::warn!(error = %e, context = e.context.as_deref(), "project quotas are there, but cannot be used");
                Ok(Err(Without::Unknown))
            }
        }
    }

    /// Gives a state in the making, in which is no directory yet, a project of its own.
    pub fn claim(&self, state: &Path) -> Result<u32> {
        for _ in 0..TRIES {
            let chance = uuid::Uuid::new_v4().as_u128() as u32;
            let id = FIRST + chance % COUNT;
            if self.named.contains(&id) || project_quota::held(state, id)? != Held::default() {
                continue;
            }
            project_quota::put(state, id)?;
            if project_quota::held(state, id)?.entries == 1 {
                return Ok(id);
            }
            project_quota::put(state, 0)?;
        }
        Err(Error::quota("no project of the pool's file system is free"))
    }

    /// The project of a state; none of one that was made when the file system had none.
    fn of(state: &Path) -> Result<Option<u32>> {
        let own = project_quota::of(state)?;
        Ok((own.handed_on && ours(own.id)).then_some(own.id))
    }

    /// Limits what the tree of a state may have.
    pub fn limit(&self, state: &Path, size: Option<ByteSize>) -> Result<()> {
        match (Self::of(state)?, size) {
            (Some(id), size) => Ok(project_quota::limit(state, id, size.map(allowed))?),
            (None, None) => Ok(()),
            (None, Some(_)) => Err(Error::conflict(
                "the volume was made when the file system of its pool had no project quotas, so nothing counts what it holds; restore \
                 a snapshot of it or make a copy: what is made now can have a size",
            )
            .at("size")),
        }
    }

    /// Bytes and entries of a state, where they are counted.
    pub fn held(&self, state: &Path) -> Result<Option<(u64, u64)>> {
        let Some(id) = Self::of(state)? else { return Ok(None) };
        let held = project_quota::held(state, id)?;
        Ok(Some((held.bytes, held.entries)))
    }

    /// Makes the limits of volumes what their records say: a daemon may have been killed between the two.
    pub fn repair(&self, root: &Path) -> Result<()> {
        let mut without = 0;
        for entry in std::fs::read_dir(root.join("volumes"))?.flatten() {
            let state = entry.path();
            let Ok(Some(record)) = Record::read(&state) else { continue };
            if record.content.is_disk() {
                continue;
            }
            match Self::of(&state)? {
                None => without += usize::from(record.size.is_some()),
                Some(id) => {
                    let wanted = record.size.map(|size| project_quota::rounded(allowed(size)));
                    if project_quota::held(&state, id)?.limit != wanted {
                        project_quota::limit(&state, id, wanted)?;
                    }
                }
            }
        }
        if without > 0 {
            tracing::warn!(
                pool = %root.display(),
                volumes = without,
                "sizes of volumes are not held: they were made where nothing counted what they hold; copy them, or restore a snapshot"
            );
        }
        Ok(())
    }
}

/// Takes the limit away of a state that goes, or of those in a directory of states.
pub(crate) fn release(at: &Path) {
    let states = |at: &Path| {
        let entries = std::fs::read_dir(at).into_iter().flatten().flatten();
        entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect::<Vec<_>>()
    };
    match Projects::of(at) {
        Ok(Some(id)) => {
            // One that is not mounted with quotas any more keeps a number that nobody has.
            if let Err(e) = project_quota::limit(at, id, None) {
                tracing::debug!(error = %e, id, "a limit could not be taken away");
            }
        }
        // What is in a tree is its guest's.
        Ok(None) if !at.join(crate::states::RECORD).exists() => {
            for state in states(at).into_iter().filter(|s| !matches!(Projects::of(s), Ok(None))) {
                release(&state);
            }
        }
        _ => {}
    }
}

/// Takes the limits away of all that the pool of plain directories in `root` has: it is about to be removed with all that it lies in.
pub fn release_limits(root: &Path) {
    for below in ["volumes", "tmp", "trash"] {
        release(&root.join(below));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_have_a_name_are_others() {
        let all = named("# comment\nweb:1795162112\nbad\n", "1795162113:/srv/web\n\n:x\n7:/srv\n");
        assert_eq!(all, HashSet::from([1_795_162_112, 1_795_162_113, 7]));
        assert!(
            ours(1_795_162_112) && !ours(FIRST - 1) && !ours(FIRST + COUNT) && FIRST + COUNT < 0x8000_0000
        );
    }

    #[test]
    fn a_pool_without_says_what_to_do() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let trial = dir.path().join("trial");
        std::fs::create_dir(&trial).unwrap();
        let without = Projects::find(dir.path(), &trial).unwrap().unwrap_err();
        assert_eq!(without, Without::Unknown);
        for without in [without, Without::NotMounted, Without::Within(7)] {
            assert!(without.fix().contains("leave the size out"), "{}", without.fix());
        }
        // Nothing is there to be taken away, and that is fine.
        release_limits(dir.path());
    }
}
