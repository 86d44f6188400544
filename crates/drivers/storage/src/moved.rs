//! Owners of trees on file systems that cannot be mounted with other owners (NFS, FUSE): for as long as a container has such a tree its
//! files belong to the container's own ids on disk.
//!
//! What lies still (snapshots, copies, what is exported, what was not started yet) has its owners unshifted, as on every other file system. A
//! volume is moved when a container is about to have it, and stays so until somebody else wants it: a container with other ids, or who
//! works on its files while it is stopped. The record says so before the first file is changed, and whether all are: what was
//! interrupted is ended in either direction.

use crate::{FilePool, files::blocking, states::Record};
use karst_host::{
    overlay::Mapped,
    owners::{self, Shift},
};
use karst_model::{Result, VolumeId};
use serde::{Deserialize, Serialize};
use std::{io, path::Path};

/// Id 0 of the guest is `base` on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Moved {
    pub base: u32,
    pub count: u32,
    /// All files are: else some are, and the others are as they are in the guest.
    pub whole: bool,
}

/// Gives the tree of a state in the making, a copy of one that was moved, its owners back.
pub(crate) fn back(state: &Path, from: Option<Moved>) -> Result<()> {
    if let Some(Moved { base, count, .. }) = from {
        owners::shift(&state.join("rootfs"), Shift { from: base, to: 0, count })?;
    }
    Ok(())
}

/// On disk before its record says that it is.
fn sync(state: &Path) -> Result<()> {
    Ok(rustix::fs::syncfs(karst_host::fs::open_dir(state)?).map_err(io::Error::from)?)
}

/// Moves the tree of a state to `wanted`, or back.
fn change(state: &Path, mut record: Record, wanted: Option<(u32, u32)>) -> Result<()> {
    if record.moved.is_some_and(|now| now.whole && Some((now.base, now.count)) == wanted)
        || record.moved.is_none() && wanted.is_none()
    {
        return Ok(());
    }
    if let Some(now) = record.moved.filter(|now| Some((now.base, now.count)) != wanted) {
        record.moved = Some(Moved { whole: false, ..now });
        record.write(state)?;
        back(state, record.moved)?;
        sync(state)?;
        record.moved = None;
        record.write(state)?;
    }
    if let Some((base, count)) = wanted {
        record.moved = Some(Moved { base, count, whole: false });
        record.write(state)?;
        let changed = owners::shift(&state.join("rootfs"), Shift { from: 0, to: base, count })?;
        tracing::debug!(changed, base, "owners of a tree are a guest's");
        sync(state)?;
        record.moved = Some(Moved { base, count, whole: true });
        record.write(state)?;
    }
    Ok(())
}

impl FilePool {
    /// Makes the owners of a tree those of a guest with these ids, where no mount does.
    pub(crate) async fn move_to(&self, volume: VolumeId, ids: Mapped) -> Result<()> {
        if self.abilities.mapped || !self.tried {
            return self.move_back(volume).await;
        }
        self.moved(volume, (ids.base != 0).then_some((ids.base, ids.count))).await
    }

    /// Makes them what they are in the guest.
    pub(crate) async fn move_back(&self, volume: VolumeId) -> Result<()> {
        self.moved(volume, None).await
    }

    async fn moved(&self, volume: VolumeId, wanted: Option<(u32, u32)>) -> Result<()> {
        // Held by the thread that moves: it goes on when nobody waits for it any more.
        let one = self.moving.clone().lock_owned().await;
        let record = self.known(volume, None).await?;
        if record.content.is_disk() || record.moved.is_none() && wanted.is_none() {
            return Ok(());
        }
        let state = self.dir(volume);
        blocking(move || {
            let _one = one;
            change(&state, record, wanted)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Format;
    use karst_model::storage::VolumeContent;
    use std::os::unix::fs::{MetadataExt, chown};

    #[test]
    fn a_tree_is_whole_on_either_side_of_a_kill() {
        if !crate::backends::root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path();
        std::fs::create_dir(state.join("rootfs")).unwrap();
        for (name, id) in [("a", 0), ("b", 1000)] {
            std::fs::write(state.join("rootfs").join(name), name).unwrap();
            chown(state.join("rootfs").join(name), Some(id), Some(id)).unwrap();
        }
        let record = Record {
            content: VolumeContent::Filesystem,
            format: Format::Directory,
            size: None,
            based: false,
            image: None,
            moved: None,
            chain: vec![],
        };
        let owners = || ["a", "b"].map(|n| std::fs::metadata(state.join("rootfs").join(n)).unwrap().uid());
        let now = || Record::read(state).unwrap().unwrap();
        let (first, second) = ((1_900_300_000, 65_536), (1_900_400_000, 65_536));
        change(state, record, Some(first)).unwrap();
        assert_eq!((owners(), now().moved.unwrap().whole), ([first.0, first.0 + 1000], true));
        change(state, now(), Some(second)).unwrap();
        assert_eq!(owners(), [second.0, second.0 + 1000]);
        // Killed on the way back, and asked for the same again; and on the way there, and asked for the other direction.
        for wanted in [Some(second), None] {
            let half = Moved { base: second.0, count: second.1, whole: false };
            chown(state.join("rootfs/a"), Some(0), Some(0)).unwrap();
            let torn = Record { moved: Some(half), ..now() };
            torn.write(state).unwrap();
            change(state, torn, wanted).unwrap();
            let base = wanted.map_or(0, |(base, _)| base);
            assert_eq!((owners(), now().moved.is_some()), ([base, base + 1000], wanted.is_some()));
        }
        change(state, now(), None).unwrap();
        assert_eq!(owners(), [0, 1000]);
    }
}
