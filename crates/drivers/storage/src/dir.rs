//! Pool kind `dir`: a directory of the host.
//!
//! ```text
//! POOL/volumes/<uuid>/  volume.json · rootfs/ (tree) | disk.img [+ base.img] (disk)
//! POOL/tmp/<uuid>/      a volume in the making; removed at the next start
//! POOL/trash/<uuid>/    a deleted volume on its way out
//! ```
//! Modes: POOL, `volumes` are 0711, so that a QEMU without privileges gets to its own disk; a tree's directory is 0700
//! (its setuid files, owned by root on disk, are out of reach of the host's users), a disk's is 0710 with the group of
//! the guest's own user, its `disk.img` 0600 and owned by that user.
//!
//! A disk made of an image is a qcow2 overlay on `base.img`, a hard link to the image's read-only disk: it costs a few
//! milliseconds and the image may be deleted at any time. Where the image lies on another file system the base is a copy.
//! A tree is reflinked file by file where the file system can and copied otherwise; an overlay mount over the image's tree
//! would be faster but cannot be id-mapped.

use crate::{Format, Located, NewVolume, PoolDriver, Source, VolumeInfo};
use async_trait::async_trait;
use karst_host::{Program, fs as hostfs, run};
use karst_model::{
    ByteSize, Error, Result, VolumeId,
    storage::{PoolKind, Usage, VolumeContent},
};
use serde::{Deserialize, Serialize};
use std::{
    fs::{File, Permissions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::sync::{mpsc, oneshot};

/// Largest disk: 64 TiB.
const MAX_DISK: u64 = 64 << 40;

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    content: VolumeContent,
    format: Format,
    size: Option<ByteSize>,
    /// Has a `base.img`.
    #[serde(default)]
    based: bool,
}

/// A directory as a pool. Cheap to clone.
#[derive(Debug, Clone)]
pub struct DirPool {
    root: Arc<PathBuf>,
    /// Wakes the sweeper; an answer is wanted by those who wait for it.
    sweep: mpsc::Sender<Option<oneshot::Sender<()>>>,
    /// Trees being copied at the same time: more than a few only make the disk seek.
    copies: Arc<tokio::sync::Semaphore>,
}

impl DirPool {
    /// Opens (and makes) the pool in the directory `root`; removes what an earlier process left half-made, and goes on
    /// freeing what it was deleting.
    ///
    /// # Errors
    /// The directory cannot be used.
    pub async fn open(root: impl Into<PathBuf>) -> Result<Self> {
        let root: PathBuf = root.into();
        let at = root.clone();
        blocking(move || {
            for (dir, mode) in [("", 0o711), ("volumes", 0o711), ("tmp", 0o700), ("trash", 0o700)] {
                let dir = at.join(dir);
                std::fs::DirBuilder::new().recursive(true).mode(mode).create(&dir)?;
                std::fs::set_permissions(&dir, Permissions::from_mode(mode))?;
            }
            // Half-made volumes take the same way out as deleted ones: no start waits for it.
            for entry in std::fs::read_dir(at.join("tmp"))?.flatten() {
                std::fs::rename(entry.path(), at.join("trash").join(uuid::Uuid::new_v4().to_string()))?;
            }
            Ok(())
        })
        .await?;
        let (sweep, wanted) = mpsc::channel(64);
        tokio::spawn(sweeper(root.join("trash"), wanted));
        let pool = Self { root: root.into(), sweep, copies: Arc::new(tokio::sync::Semaphore::new(2)) };
        pool.wake_sweeper();
        Ok(pool)
    }

    fn dir(&self, volume: VolumeId) -> PathBuf {
        self.root.join("volumes").join(volume.to_string())
    }

    fn wake_sweeper(&self) {
        // A full channel means that it will run anyway.
        let _ = self.sweep.try_send(None);
    }

    async fn record(&self, volume: VolumeId) -> Result<Option<Record>> {
        match tokio::fs::read(self.dir(volume).join("volume.json")).await {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    async fn known(&self, volume: VolumeId) -> Result<Record> {
        self.record(volume).await?.ok_or_else(|| Error::not_found("the pool does not have the volume"))
    }

    async fn build(&self, work: &Path, new: &NewVolume) -> Result<Record> {
        let size = new.size;
        match (new.content, &new.source) {
            (VolumeContent::Filesystem, source) => {
                let target = work.join("rootfs");
                std::fs::DirBuilder::new().mode(0o755).create(&target)?;
                match source {
                    Source::Empty => {}
                    Source::Tree(from) => {
                        let _turn = self
                            .copies
                            .acquire()
                            .await
                            .map_err(|e| Error::internal("the pool is closed", e))?;
                        let from = from.clone();
                        blocking(move || {
                            let done =
                                hostfs::copy_tree(&hostfs::open_dir(&from)?, &hostfs::open_dir(&target)?)?;
                            tracing::debug!(done.entries, done.bytes, done.shared, "copied a tree");
                            Ok(())
                        })
                        .await?;
                    }
                    Source::Disk { .. } => return Err(mismatch()),
                }
                Ok(Record { content: new.content, format: Format::Directory, size, based: false })
            }
            (VolumeContent::Block, Source::Empty) => {
                let size = size.ok_or_else(|| Error::invalid("size", "an empty disk needs a size"))?;
                check_disk_size(size.0)?;
                let disk = work.join("disk.img");
                let file = File::options().write(true).create_new(true).mode(0o600).open(disk)?;
                file.set_len(size.0)?;
                Ok(Record { content: new.content, format: Format::Raw, size: Some(size), based: false })
            }
            (VolumeContent::Block, Source::Disk { path, size: of_image }) => {
                let size = size.map_or(*of_image, |s| s.0);
                check_disk_size(size)?;
                if size < *of_image {
                    return Err(Error::invalid(
                        "size",
                        format!(
                            "the disk would be smaller than its image, which has {of_image} bytes; choose a larger size"
                        ),
                    ));
                }
                let (from, base) = (path.clone(), work.join("base.img"));
                blocking(move || link_or_copy(&from, &base)).await?;
                let disk = work.join("disk.img");
                // -u: the backing file is not opened. Its name is relative to the overlay's directory.
                run(Program::QemuImg)
                    .args([
                        "create",
                        "-q",
                        "-u",
                        "-f",
                        "qcow2",
                        "-o",
                        "backing_file=base.img,backing_fmt=qcow2",
                    ])
                    .arg(&disk)
                    .arg(size.to_string())
                    .ok()
                    .await
                    .map_err(full)?;
                std::fs::set_permissions(&disk, Permissions::from_mode(0o600))?;
                Ok(Record {
                    content: new.content,
                    format: Format::Qcow2,
                    size: Some(ByteSize(size)),
                    based: true,
                })
            }
            (VolumeContent::Block, Source::Tree(_)) => Err(mismatch()),
        }
    }
}

fn mismatch() -> Error {
    Error::invalid(
        "source",
        "a container's volume is made of a container image and a disk of a virtual machine's",
    )
}

fn check_disk_size(size: u64) -> Result<()> {
    if size == 0 || size > MAX_DISK || !size.is_multiple_of(512) {
        return Err(Error::invalid("size", "a disk has 512 bytes to 64 TiB, in whole sectors of 512 bytes"));
    }
    Ok(())
}

/// `qemu-img` says in words that the disk is full.
fn full(e: Error) -> Error {
    match &e.context {
        Some(c) if c.contains("No space left") || c.contains("quota exceeded") => {
            Error::quota("no space left in the pool").with_context(c)
        }
        _ => e,
    }
}

fn link_or_copy(from: &Path, to: &Path) -> Result<()> {
    match std::fs::hard_link(from, to) {
        Ok(()) => return Ok(()),
        Err(e) if matches!(e.kind(), io::ErrorKind::CrossesDevices | io::ErrorKind::TooManyLinks) => {}
        Err(e) => return Err(e.into()),
    }
    let (source, target) =
        (File::open(from)?, File::options().write(true).create_new(true).mode(0o444).open(to)?);
    if !hostfs::reflink(&source, &target)? {
        hostfs::copy_sparse(&source, &target, source.metadata()?.len())?;
    }
    // The umask may have taken what every guest's user needs.
    target.set_permissions(Permissions::from_mode(0o444))?;
    Ok(())
}

#[async_trait]
impl PoolDriver for DirPool {
    fn kind(&self) -> PoolKind {
        PoolKind::Dir
    }

    async fn create(&self, volume: VolumeId, new: &NewVolume) -> Result<VolumeInfo> {
        if let Some(record) = self.record(volume).await? {
            if record.content != new.content {
                return Err(Error::conflict("a volume of another kind has this id"));
            }
            return Ok(info(volume, record));
        }
        let work = self.root.join("tmp").join(uuid::Uuid::new_v4().to_string());
        let mode = if new.content == VolumeContent::Filesystem { 0o700 } else { 0o710 };
        tokio::fs::DirBuilder::new().mode(mode).create(&work).await?;
        let guard = Abandoned { pool: self, work: Some(work.clone()) };
        let record = self.build(&work, new).await?;
        let (to, written) = (self.dir(volume), record.clone());
        let made = blocking(move || {
            std::fs::set_permissions(&work, Permissions::from_mode(mode))?;
            write_record(&work, &written)?;
            match std::fs::rename(&work, &to) {
                // Another call was faster; ours is thrown away by the guard.
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists
                    ) =>
                {
                    return Ok(false);
                }
                r => r?,
            }
            Ok(true)
        })
        .await?;
        if made {
            guard.keep();
            return Ok(info(volume, record));
        }
        drop(guard);
        self.inspect(volume).await
    }

    async fn delete(&self, volume: VolumeId) -> Result<()> {
        let to = self.root.join("trash").join(uuid::Uuid::new_v4().to_string());
        match tokio::fs::rename(self.dir(volume), &to).await {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            r => r?,
        }
        // Not synced: after a power cut the volume may be back, and whoever compares `list` with its records removes it.
        self.wake_sweeper();
        Ok(())
    }

    async fn inspect(&self, volume: VolumeId) -> Result<VolumeInfo> {
        Ok(info(volume, self.known(volume).await?))
    }

    async fn locate(&self, volume: VolumeId, user: Option<u32>) -> Result<Located> {
        let record = self.known(volume).await?;
        let dir = self.dir(volume);
        if record.format == Format::Directory {
            return Ok(Located { path: dir.join("rootfs"), format: record.format, backing: None });
        }
        let path = dir.join("disk.img");
        let id = user.unwrap_or(0);
        let (at, disk) = (dir.clone(), path.clone());
        blocking(move || {
            if std::fs::symlink_metadata(&disk)?.uid() != id {
                std::os::unix::fs::lchown(&disk, Some(id), Some(id))?;
            }
            if std::fs::symlink_metadata(&at)?.gid() != id {
                std::os::unix::fs::lchown(&at, Some(0), Some(id))?;
            }
            Ok(())
        })
        .await?;
        let backing = record.based.then(|| dir.join("base.img"));
        Ok(Located { path, format: record.format, backing })
    }

    async fn usage(&self, volume: VolumeId) -> Result<Usage> {
        let record = self.known(volume).await?;
        let dir = self.dir(volume);
        blocking(move || {
            let total = record.size.map_or(0, |s| s.0);
            if record.format != Format::Directory {
                // The base is shared with the image and counts there.
                let used = std::fs::symlink_metadata(dir.join("disk.img"))?.blocks() * 512;
                return Ok(Usage { used, total, ..Usage::default() });
            }
            let (used, inodes_used) = hostfs::tree_usage(&hostfs::open_dir(&dir.join("rootfs"))?)?;
            Ok(Usage { used, total: 0, inodes_used, inodes_total: 0 })
        })
        .await
    }

    async fn resize(&self, volume: VolumeId, size: ByteSize) -> Result<VolumeInfo> {
        let mut record = self.known(volume).await?;
        if record.format == Format::Directory {
            return Err(Error::unsupported(
                "this pool does not limit the size of containers' volumes; leave the size out or use another pool",
            ));
        }
        check_disk_size(size.0)?;
        let old = record.size.unwrap_or_default();
        if size < old {
            return Err(Error::invalid("size", format!("a disk cannot shrink; it has {} bytes", old.0)));
        }
        if size > old {
            let dir = self.dir(volume);
            let disk = dir.join("disk.img");
            if record.format == Format::Raw {
                let disk = File::options().write(true).open(&disk)?;
                disk.set_len(size.0)?;
                disk.sync_all()?;
            } else {
                run(Program::QemuImg)
                    .args(["resize", "-q", "-f", "qcow2"])
                    .arg(&disk)
                    .arg(size.0.to_string())
                    .ok()
                    .await
                    .map_err(busy)
                    .map_err(full)?;
            }
            record.size = Some(size);
            let written = record.clone();
            blocking(move || write_record(&dir, &written)).await?;
        }
        Ok(info(volume, record))
    }

    async fn grown(&self, volume: VolumeId, size: ByteSize) -> Result<VolumeInfo> {
        let mut record = self.known(volume).await?;
        record.size = Some(size.max(record.size.unwrap_or_default()));
        let (dir, written) = (self.dir(volume), record.clone());
        blocking(move || write_record(&dir, &written)).await?;
        Ok(info(volume, record))
    }

    async fn list(&self) -> Result<Vec<VolumeInfo>> {
        let mut dir = tokio::fs::read_dir(self.root.join("volumes")).await?;
        let mut found = Vec::new();
        while let Some(entry) = dir.next_entry().await? {
            let Some(id) = entry.file_name().to_str().and_then(|n| n.parse::<VolumeId>().ok()) else {
                continue;
            };
            if let Some(record) = self.record(id).await? {
                found.push(info(id, record));
            }
        }
        found.sort_by_key(|v| v.id);
        Ok(found)
    }

    async fn space(&self) -> Result<Usage> {
        let root = self.root.clone();
        blocking(move || {
            let s = rustix::fs::statvfs(root.as_path()).map_err(io::Error::from)?;
            Ok(Usage {
                used: (s.f_blocks - s.f_bfree) * s.f_frsize,
                total: s.f_blocks * s.f_frsize,
                inodes_used: s.f_files - s.f_ffree,
                inodes_total: s.f_files,
            })
        })
        .await
    }

    fn supports_quota(&self) -> bool {
        false
    }

    async fn settle(&self) {
        let (done, wait) = oneshot::channel();
        if self.sweep.send(Some(done)).await.is_ok() {
            let _ = wait.await;
        }
    }
}

/// QEMU holds a lock on images that it has open.
fn busy(e: Error) -> Error {
    match &e.context {
        Some(c) if c.contains("lock") => {
            Error::conflict("the disk is in use; stop the virtual machine first").with_context(c)
        }
        _ => e,
    }
}

fn info(id: VolumeId, r: Record) -> VolumeInfo {
    VolumeInfo { id, content: r.content, format: r.format, size: r.size }
}

/// Replaces `volume.json` in one step. Its content is on disk before its name: after a power cut there is no empty one.
/// The content of trees is not synced (that would cost as much as copying again): see the decision record.
fn write_record(dir: &Path, record: &Record) -> Result<()> {
    let fresh = dir.join("volume.json.new");
    let mut file = File::create(&fresh)?;
    file.write_all(&serde_json::to_vec(record)?)?;
    file.sync_all()?;
    std::fs::rename(&fresh, dir.join("volume.json")).map_err(Into::into)
}

/// A volume in the making: to the trash unless it was finished, whatever ended the making (error, cancellation).
struct Abandoned<'a> {
    pool: &'a DirPool,
    work: Option<PathBuf>,
}

impl Abandoned<'_> {
    fn keep(mut self) {
        self.work = None;
    }
}

impl Drop for Abandoned<'_> {
    fn drop(&mut self) {
        if let Some(work) = self.work.take() {
            let trash = self.pool.root.join("trash").join(uuid::Uuid::new_v4().to_string());
            match std::fs::rename(&work, &trash) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(error = %e, "a half-made volume was left; the next start removes it");
                }
                _ => self.pool.wake_sweeper(),
            }
        }
    }
}

/// Frees deleted volumes, one after the other. Ends with the pool.
async fn sweeper(trash: PathBuf, mut wanted: mpsc::Receiver<Option<oneshot::Sender<()>>>) {
    while let Some(answer) = wanted.recv().await {
        let trash = trash.clone();
        let swept = blocking(move || {
            for entry in std::fs::read_dir(&trash)?.flatten() {
                match std::fs::remove_dir_all(entry.path()) {
                    // Its making was cancelled and is just noticing; the next sweep gets it.
                    Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {}
                    Err(e) if e.kind() != io::ErrorKind::NotFound => {
                        tracing::warn!(error = %e, volume = ?entry.file_name(), "a deleted volume could not be freed");
                    }
                    _ => {}
                }
            }
            Ok(())
        })
        .await;
        if let Err(e) = swept {
            tracing::warn!(error = %e, context = e.context, "deleted volumes could not be freed");
        }
        if let Some(answer) = answer {
            let _ = answer.send(());
        }
    }
}

async fn blocking<T: Send + 'static>(f: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(f).await.map_err(|e| Error::internal("a task ended unexpectedly", e))?
}
