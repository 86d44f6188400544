//! Whole contents of volumes: read of a clone, replaced by an exchange.

use super::{Kept, Object, ObjectPool, Work, blocking, clear_place, info};
use crate::{
    Contents, Filling, Format, Located, NewVolume, PoolDriver, Reading, Source, VolumeInfo, filling::made,
    states::check_disk_size,
};
use async_trait::async_trait;
use karst_model::{ByteSize, Error, ErrorKind, Result, SnapshotId, VolumeId, storage::VolumeContent};
use std::{
    fs::Permissions,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
};
use uuid::Uuid;

#[async_trait]
impl Contents for ObjectPool {
    /// A clone is read: of what goes on changing the state at this instant, and of a snapshot one that mounting may write to.
    async fn read(&self, volume: VolumeId, snapshot: Option<SnapshotId>) -> Result<Reading> {
        let kept = self.known(volume, snapshot).await?;
        let from = match snapshot {
            None => Object::Volume(volume),
            Some(snapshot) => Object::Snapshot(volume, snapshot),
        };
        let (mut object, mut work) = (from, None);
        if !self.inner.looking {
            let clone = self.work();
            match self.clone_now(from, clone.object(), kept).await {
                Ok(()) => (object, work) = (clone.object(), Some(clone)),
                // What a full pool has is still to be had: to make room elsewhere, say.
                Err(e) if e.is(ErrorKind::Quota) => {}
                Err(e) => return Err(e),
            }
        }
        let place = Place(self.inner.root.join("work").join(Uuid::new_v4().to_string()));
        let (path, format) = if kept.content.is_disk() {
            (self.node(object, place.0.clone(), 0).await?, Format::Raw)
        } else {
            self.mount(object, kept, place.0.clone()).await?;
            (place.0.join("rootfs"), Format::Directory)
        };
        Ok(Reading {
            info: info(volume, kept),
            located: Located { path, layers: None, format, backing: None, chain: Default::default() },
            // In this order: what is mounted cannot be freed.
            guard: Some(Box::new((place, work))),
        })
    }

    async fn replace(&self, volume: VolumeId, source: &Source) -> Result<VolumeInfo> {
        let old = self.known(volume, None).await?;
        // A tree keeps its own limit.
        let size = if old.content.is_disk() { None } else { old.size };
        let new = NewVolume { content: old.content, size, source: source.clone() };
        let work = self.work();
        self.build(&work, &new).await?;
        self.exchange(work, volume).await?;
        self.inspect(volume).await
    }

    async fn begin(&self, volume: VolumeId) -> Result<Box<dyn Filling>> {
        let old = self.known(volume, None).await?;
        if old.content.is_disk() {
            let (staging, work) = (self.staging()?, None);
            return Ok(Box::new(ObjectFilling {
                pool: self.clone(),
                staging: Some(staging),
                work,
                volume,
                old,
            }));
        }
        let work = self.work();
        self.make(work.object(), old).await?;
        self.mount(work.object(), old, work.place()).await?;
        std::fs::set_permissions(work.place(), Permissions::from_mode(0o700))?;
        let at = work.place();
        Ok(Box::new(ObjectFilling { pool: self.clone(), staging: None, work: Some((work, at)), volume, old }))
    }
}

/// A new content in the making: a disk is staged as a file, a tree is written into the pool at once.
struct ObjectFilling {
    pool: ObjectPool,
    staging: Option<Staging>,
    work: Option<(Work, PathBuf)>,
    volume: VolumeId,
    old: Kept,
}

#[async_trait]
impl Filling for ObjectFilling {
    fn directory(&self) -> &Path {
        match (&self.staging, &self.work) {
            (Some(staging), _) => &staging.0,
            (None, Some((_, at))) => at,
            (None, None) => Path::new("/nonexistent"),
        }
    }

    async fn commit(self: Box<Self>) -> Result<VolumeInfo> {
        let Self { pool, staging, work, volume, old } = *self;
        let work = match (staging, work) {
            (Some(staging), _) => {
                let came = made(&staging.0.join("disk.img"), false)?.len().next_multiple_of(512);
                // A disc is as large as what is on it; a disk keeps what it has beyond.
                let size = match old.content {
                    VolumeContent::Iso => came,
                    _ => came.max(old.size.map_or(0, |s| s.0)),
                };
                check_disk_size(size)?;
                let work = pool.work();
                let kept = Kept { size: Some(ByteSize(size)), ..old };
                pool.poured(&work, kept, staging.0.join("disk.img")).await?;
                work
            }
            (None, Some((work, at))) => {
                let inside = at.clone();
                blocking(move || {
                    made(&inside.join("tree"), true)?;
                    Ok(std::fs::rename(inside.join("tree"), inside.join("rootfs"))?)
                })
                .await?;
                pool.unmount(at).await?;
                work
            }
            (None, None) => return Err(Error::internal("a filling has neither staging nor work", "")),
        };
        pool.exchange(work, volume).await?;
        pool.inspect(volume).await
    }
}

/// A mount for reading, gone when it is dropped, and at the next start.
struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(e) = clear_place(&self.0) {
            tracing::warn!(error = %e, "a mount for reading was left; the next start removes it");
        }
    }
}

/// A directory for disks on their way into the pool.
pub(super) struct Staging(pub(super) PathBuf);

impl ObjectPool {
    pub(super) fn staging(&self) -> Result<Staging> {
        let path = self.inner.root.join("staging").join(Uuid::new_v4().to_string());
        std::fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Staging(path))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(error = %e, "a staged disk was left; the next start removes it");
        }
    }
}
