//! What the file systems of pools differ in, where guests meet it: owners that no mount maps, and disks past the page cache.

use crate::{
    RealAgent,
    agent::{blocking, has_volume},
};
use karst_agent::{FileRef, VolumeRef};
use karst_guest::IdRange;
use karst_host::overlay::Mapped;
use karst_model::{
    Error, PoolId, Result, VolumeId,
    device::{DiskCache, DiskIo},
    spec::PoolSource,
    storage::{Abilities, PoolKind, Usage, VolumeContent},
};
use karst_storage::OpenTree;
use std::{
    collections::HashSet,
    sync::{LazyLock, Mutex, MutexGuard},
};

/// Volumes whose making ended before it began, because their pool's file system did not answer: whoever undoes that has nothing to
/// wait for. Forgotten with the process; then it is tried again by command.
static NEVER_MADE: LazyLock<Mutex<HashSet<VolumeId>>> = LazyLock::new(Mutex::default);
/// More than that nobody undoes at a time.
const MOST_NEVER_MADE: usize = 4096;

fn never_made() -> MutexGuard<'static, HashSet<VolumeId>> {
    NEVER_MADE.lock().unwrap_or_else(|e| e.into_inner())
}

/// The cache mode without direct input and output that comes nearest to the one that is asked for.
fn through_the_cache(mode: DiskCache) -> DiskCache {
    match mode {
        DiskCache::None => DiskCache::Writeback,
        DiskCache::Directsync => DiskCache::Writethrough,
        other => other,
    }
}

impl RealAgent {
    /// Gives the files of a tree to the container that is about to have it, where its pool cannot mount them so. `ids` are the
    /// container's, whether it is privileged or not.
    pub(crate) async fn give_tree(&self, at: VolumeRef, ids: IdRange, privileged: bool) -> Result<()> {
        let pool = self.pool(at.pool)?;
        let inside = ids.inside(privileged);
        let mapped = Mapped { base: inside.base, count: inside.count };
        match pool.abilities() {
            None => return Ok(()),
            // Its kernel may have learnt it since: then they are given back.
            Some(can) if can.mapped => return pool.move_owners(at.volume, mapped).await,
            Some(_) => self.demand_trees(at.pool)?,
        }
        let has = has_volume(at.volume);
        // The container itself may run, and gets something else.
        if let Some(user) = self.user(|record| has(record) && record.ids.base != ids.base).await? {
            return Err(Error::conflict(format!(
                "the file system of the volume's pool cannot show it to two containers, each with owners of its own, and instance {user} \
                 has it; stop that one first, or use a pool on another file system"
            )));
        }
        pool.move_owners(at.volume, mapped).await
    }

    /// Refuses trees on a pool whose file system maps no owners, where the host's administrator has not asked for that.
    ///
    /// # Errors
    /// Unsupported, naming what to write.
    pub(crate) fn demand_trees(&self, pool: PoolId) -> Result<()> {
        let moves = self.pool(pool)?.abilities().is_some_and(|can| can.owners && !can.mapped);
        if !moves || self.options.policy.trial_pools.contains(&PoolKind::Dir) {
            return Ok(());
        }
        Err(Error::unsupported(format!(
            "containers and file systems on a pool whose file system cannot mount them with other owners (NFS, FUSE) are on trial; the \
             administrator of this host who wants them adds \"dir\" to trial_pools in {}; disks of virtual machines are not concerned",
            crate::policy::FILE
        )))
    }

    /// The root of a container that is stopped, to work on its files; none when it runs by now.
    pub(crate) async fn open_root(&self, file: &FileRef) -> Result<Option<OpenTree>> {
        let (pool, root) = (self.pool(file.root.pool)?, file.root.volume);
        // One that is just starting would find its files another's where they are given to it on disk.
        let moves = pool.abilities().is_some_and(|can| !can.mapped);
        let _lock = if moves { Some(self.lock(root.0).await) } else { None };
        self.reach(file.root.pool).await?;
        if moves && self.runs(file.instance).await? {
            return Ok(None);
        }
        // A volume of others, which would find its files another's.
        if moves && let Some(user) = self.user(has_volume(root)).await? {
            return Err(Error::conflict(format!(
                "instance {user} has the volume, on a file system that cannot show it to others meanwhile; stop it first"
            )));
        }
        if pool.inspect(root).await?.content != VolumeContent::Filesystem {
            return Err(Error::invalid("root", "the volume is a disk, which has no files"));
        }
        pool.open_tree(root).await.map(Some)
    }

    pub(crate) async fn space_of(&self, id: PoolId) -> Result<Usage> {
        let pool = self.pool(id)?;
        self.reach(id).await?;
        pool.space().await
    }

    /// Does the file system of a pool in a directory of the host answer?
    pub(crate) async fn reach(&self, pool: PoolId) -> Result<()> {
        match self.registry.pool(pool)?.map(|spec| spec.source) {
            Some(PoolSource::Granted { source }) if source.starts_with('/') => {
                crate::reach::answers(std::path::Path::new(&source)).await
            }
            _ => Ok(()),
        }
    }

    /// The same, for who is about to make a volume there.
    pub(crate) async fn reach_to_make(&self, pool: PoolId, volume: VolumeId) -> Result<()> {
        let reached = self.reach(pool).await;
        let mut all = never_made();
        if reached.is_ok() {
            all.remove(&volume);
        } else {
            if all.len() >= MOST_NEVER_MADE {
                all.clear();
            }
            all.insert(volume);
        }
        reached
    }

    pub(crate) fn was_never_made(&self, volume: VolumeId) -> bool {
        never_made().contains(&volume)
    }

    /// Writes down what a pool's file system can, and says so when that is no longer what it was: what lies in the pool was made by it.
    pub(crate) async fn note_abilities(&self, pool: PoolId, now: Option<Abilities>) {
        let (Some(now), registry) = (now, self.registry.clone()) else { return };
        let noted = blocking(move || {
            let before = registry.abilities(pool)?;
            if before != Some(now) {
                registry.put_abilities(pool, &now)?;
            }
            Ok(before)
        });
        match noted.await {
            Ok(Some(before)) if before != now => {
                tracing::info!(%pool, ?before, ?now, "the file system of a pool can something else than it could");
            }
            Ok(_) => {}
            Err(e) => {
                tracing::warn!(%pool, error = %e, context = e.context.as_deref(), "what a pool can is not written down");
            }
        }
    }

    /// How a disk of the pool is driven, where its file system knows no direct input and output.
    pub(crate) fn driven(&self, pool: PoolId, io: DiskIo) -> Result<DiskIo> {
        let direct = self.pool(pool)?.abilities().is_none_or(|can| can.direct);
        Ok(if direct { io } else { DiskIo { cache: io.cache.map(through_the_cache), ..io } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_direct_modes_have_another() {
        for mode in [DiskCache::Writeback, DiskCache::Writethrough, DiskCache::Unsafe] {
            assert_eq!(through_the_cache(mode), mode);
        }
        assert_eq!(through_the_cache(DiskCache::None), DiskCache::Writeback);
        assert_eq!(
            through_the_cache(DiskCache::Directsync),
            DiskCache::Writethrough,
            "what is told is written is"
        );
    }
}
