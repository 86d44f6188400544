//! Pools whose volumes are objects of their own: data sets and zvols of ZFS, logical volumes of LVM.
//!
//! ```text
//! POOL/volumes/<volume>/    where a tree is mounted, or the directory of a disk's node
//! POOL/work/<uuid>/         where something is mounted while it is made or read; cleared at the next start
//! POOL/meta/                where descriptions are mounted
//! POOL/staging/<uuid>/      disks that came from elsewhere and are not yet in the pool; cleared at the next start
//! ```
//! What is in the pool itself has names ([`Object`]). Something is made under a name of work and appears by being renamed;
//! one that replaces a volume is first renamed to the volume's successor, and [`ObjectPool::open`] completes what was
//! interrupted after that. A snapshot is an object of its own, so that restoring any of them in any order loses none.
//! Removing is renaming to trash, which one background task frees, also after a restart.
//!
//! A tree lies in the directory `rootfs` of its file system, whose own root is closed to everybody but root. A disk's node is
//! made here with the numbers of its device, for its guest's own user: udev's is left alone.

mod backend;
mod contents;
pub mod lvm;
mod names;
mod sweep;
mod texts;
pub mod zfs;

use crate::{
    Contents, Descriptions, Format, Hold, Located, NewVolume, PoolDriver, Snapshots, Source, VolumeInfo,
    driver::apart,
    files::{convert, grown_size, mismatch, open},
    states::{check_disk_size, copy_tree},
};
use async_trait::async_trait;
pub use backend::FileSystem;
use backend::{Backend, Kept};
use karst_host::{fs::TreeMode, mount, sandbox::Launcher};
use karst_model::{
    ByteSize, Error, ErrorKind, ImageId, Result, SnapshotId, VolumeId,
    storage::{PoolKind, Usage, VolumeContent},
};
use names::Object;
use rustix::fs::{CWD, FileType};
use std::{
    collections::HashSet,
    fs::{File, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};
use sweep::{Work, sweeper};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

/// How often the last rename of an exchange is tried, and how long apart.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_secs(1);

/// Such a pool. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ObjectPool {
    inner: Arc<Inner>,
    /// Wakes the sweeper; an answer is wanted by those who wait for it.
    sweep: mpsc::Sender<Option<oneshot::Sender<()>>>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    backend: Arc<dyn Backend>,
    worker: Launcher,
    /// What is being made now: not the sweeper's.
    active: Mutex<HashSet<Uuid>>,
    /// One mount or unmount of a volume at a time.
    mounting: tokio::sync::Mutex<()>,
    /// One image, or what descriptions lie on, is taken in at a time.
    taking: tokio::sync::Mutex<()>,
    /// It is only looked at: nothing is mounted for writing.
    looking: bool,
    /// No other daemon has it open.
    _hold: Arc<Hold>,
}

impl ObjectPool {
    /// Opens a pool whose backend is there, to look at what it has: nothing is made, completed or freed.
    pub(crate) fn look(root: PathBuf, backend: Arc<dyn Backend>, worker: Launcher, hold: Arc<Hold>) -> Self {
        Self::with(root, backend, worker, hold, true)
    }

    fn with(
        root: PathBuf,
        backend: Arc<dyn Backend>,
        worker: Launcher,
        hold: Arc<Hold>,
        looking: bool,
    ) -> Self {
        let (sweep, wanted) = mpsc::channel(64);
        let inner = Arc::new(Inner {
            root,
            backend,
            worker,
            active: Mutex::default(),
            mounting: tokio::sync::Mutex::default(),
            taking: tokio::sync::Mutex::default(),
            looking,
            _hold: hold,
        });
        tokio::spawn(sweeper(inner.clone(), wanted));
        Self { inner, sweep }
    }

    /// Opens a pool whose backend is there; `root` is a directory of this pool alone.
    ///
    /// # Errors
    /// The directory or the backend cannot be used.
    pub(crate) async fn open(
        root: PathBuf,
        backend: Arc<dyn Backend>,
        worker: Launcher,
        hold: Arc<Hold>,
    ) -> Result<Self> {
        let at = root.clone();
        blocking(move || {
            for (dir, mode) in [("", 0o711), ("volumes", 0o711), ("work", 0o700), ("staging", 0o700)] {
                let dir = at.join(dir);
                std::fs::DirBuilder::new().recursive(true).mode(mode).create(&dir)?;
                std::fs::set_permissions(&dir, Permissions::from_mode(mode))?;
            }
            for entry in std::fs::read_dir(at.join("work"))?.flatten() {
                clear_place(&entry.path())?;
            }
            for entry in std::fs::read_dir(at.join("staging"))?.flatten() {
                std::fs::remove_dir_all(entry.path())?;
            }
            Ok(())
        })
        .await?;
        let found: HashSet<_> = backend.list().await?.into_iter().map(|(object, _)| object).collect();
        for object in &found {
            match *object {
                // Whole, and its turn was interrupted.
                Object::Next(v) => {
                    if found.contains(&Object::Volume(v)) {
                        backend.rename(Object::Volume(v), Object::trash()).await?;
                    }
                    backend.rename(*object, Object::Volume(v)).await?;
                }
                Object::Snapshot(v, _)
                    if !found.contains(&Object::Volume(v)) && !found.contains(&Object::Next(v)) =>
                {
                    backend.rename(*object, Object::trash()).await?;
                }
                _ => {}
            }
        }
        backend.tidy().await?;
        let volumes: HashSet<VolumeId> = found
            .iter()
            .filter_map(|object| match object {
                Object::Volume(v) | Object::Next(v) => Some(*v),
                _ => None,
            })
            .collect();
        let (at, known) = (root.join("volumes"), volumes.clone());
        blocking(move || {
            // What is still mounted of a volume that has gone could not be freed.
            for entry in std::fs::read_dir(at)?.flatten() {
                let id = entry.file_name().to_str().and_then(|name| name.parse::<VolumeId>().ok());
                if !id.is_some_and(|id| known.contains(&id)) {
                    clear_place(&entry.path())?;
                }
            }
            Ok(())
        })
        .await?;
        let pool = Self::with(root, backend, worker, hold, false);
        if found.contains(&Object::Descriptions) {
            pool.sweep_texts(volumes).await?;
        }
        pool.wake_sweeper();
        Ok(pool)
    }

    fn wake_sweeper(&self) {
        // A full channel means that it will run anyway.
        let _ = self.sweep.try_send(None);
    }

    fn backend(&self) -> &dyn Backend {
        &*self.inner.backend
    }

    fn place(&self, volume: VolumeId) -> PathBuf {
        self.inner.root.join("volumes").join(volume.to_string())
    }

    async fn known(&self, volume: VolumeId, snapshot: Option<SnapshotId>) -> Result<Kept> {
        let found = self.backend().find(Object::Volume(volume)).await?;
        let found = found.ok_or_else(|| Error::not_found("the pool does not have the volume"))?;
        match snapshot {
            None => Ok(found),
            Some(snapshot) => self
                .backend()
                .find(Object::Snapshot(volume, snapshot))
                .await?
                .ok_or_else(|| Error::not_found("the volume does not have the snapshot")),
        }
    }

    /// Is the pool so full that what is made now would be cut off?
    async fn room(&self) -> Result<()> {
        let space = self.backend().space().await?;
        if space.total > 0 && space.used.saturating_mul(100) >= space.total.saturating_mul(98) {
            return Err(Error::quota("no space left in the pool"));
        }
        Ok(())
    }

    /// The kernel writes what was said later, and then knows an error of input and output only: where the pool is full that was why.
    async fn explained(&self, e: Error) -> Error {
        match self.room().await {
            Err(full) if full.is(ErrorKind::Quota) && !e.is(ErrorKind::Quota) => {
                full.with_context(format!("{}: {}", e.message, e.context.unwrap_or_default()))
            }
            _ => e,
        }
    }

    /// Mounts a tree; nothing happens when it is mounted already.
    async fn mount(&self, object: Object, kept: Kept, at: PathBuf) -> Result<()> {
        let _one = self.inner.mounting.lock().await;
        let place = at.clone();
        let mounted = blocking(move || {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&place)?;
            Ok(mount::is_mount_point(&place)?)
        })
        .await?;
        if mounted {
            return Ok(());
        }
        let mounted = self.mount_at(object, kept, &at).await;
        if mounted.is_err() {
            let _ = tokio::fs::remove_dir(&at).await; // it was made for this, and is empty
        }
        mounted
    }

    async fn mount_at(&self, object: Object, kept: Kept, at: &Path) -> Result<()> {
        let read_only = self.inner.looking;
        let Some(on) = kept.on else { return self.backend().mount(object, at, read_only).await };
        let device = self.backend().device(object).await?;
        let mount = if read_only { FileSystem::mount_read_only } else { FileSystem::mount };
        let at = at.to_owned();
        blocking(move || mount(on, &device, &at)).await
    }

    async fn unmount(&self, at: PathBuf) -> Result<()> {
        let _one = self.inner.mounting.lock().await;
        blocking(move || clear_place(&at)).await
    }

    /// Makes the tree of `work` by `fill`, which gets the root of its file system.
    async fn filled(
        &self,
        work: &Work,
        kept: Kept,
        fill: impl FnOnce(&Path) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        self.make(work.object(), kept).await?;
        let at = work.place();
        self.mount(work.object(), kept, at.clone()).await?;
        let inside = at.clone();
        let filled = blocking(move || {
            std::fs::set_permissions(&inside, Permissions::from_mode(0o700))?;
            fill(&inside)
        })
        .await;
        self.unmount(at).await?;
        match filled {
            Ok(()) => Ok(()),
            Err(e) => Err(self.explained(e).await),
        }
    }

    async fn make(&self, object: Object, kept: Kept) -> Result<()> {
        self.room().await?;
        self.backend().make(object, kept).await?;
        if let Some(on) = kept.on {
            let device = self.backend().device(object).await?;
            on.make(&device).await?;
        }
        Ok(())
    }

    /// A disk in `work` with the bytes of a file.
    async fn poured(&self, work: &Work, kept: Kept, from: PathBuf) -> Result<()> {
        self.make(work.object(), kept).await?;
        let device = self.backend().device(work.object()).await?;
        let poured = blocking(move || {
            let source = File::from(open(&from, false)?);
            let size = io::Seek::seek(&mut &source, io::SeekFrom::End(0))?;
            let target = File::options().write(true).open(&device)?;
            karst_host::fs::copy_sparse(&source, &target, size)?;
            Ok(target.sync_all()?)
        })
        .await;
        match poured {
            Ok(()) => Ok(()),
            Err(e) => Err(self.explained(e).await),
        }
    }

    /// A clone with all that was written before the call. What the kernel has still to write to a device the device has not:
    /// ZFS takes a zvol as it is, whatever is mounted from it.
    async fn clone_now(&self, from: Object, to: Object, kept: Kept) -> Result<()> {
        if let Object::Volume(volume) = from {
            if kept.content.is_disk() {
                let device = self.backend().device(from).await?;
                blocking(move || Ok(File::open(device)?.sync_all()?)).await?;
            } else {
                let at = self.place(volume);
                blocking(move || {
                    if mount::is_mount_point(&at).unwrap_or(false) {
                        rustix::fs::syncfs(File::open(&at)?).map_err(io::Error::from)?;
                    }
                    Ok(())
                })
                .await?;
            }
        }
        self.backend().clone(from, to, kept).await
    }

    /// A clone in `work`, with the size that is wanted.
    async fn cloned(&self, work: &Work, from: Object, old: Kept, size: Option<ByteSize>) -> Result<Kept> {
        self.room().await?;
        self.clone_now(from, work.object(), old).await?;
        let kept = Kept { size, ..old };
        if size != old.size {
            self.set_size(work.object(), kept, work.place(), true).await?;
        }
        Ok(kept)
    }

    /// Changes the size of an object, and of the file system on it. `once`: it is mounted for this only.
    async fn set_size(&self, object: Object, kept: Kept, at: PathBuf, once: bool) -> Result<()> {
        self.backend().resize(object, kept).await?;
        let Some(on) = kept.on else { return Ok(()) };
        self.mount(object, kept, at.clone()).await?;
        let device = self.backend().device(object).await?;
        let grown = on.grow(&device, &at).await;
        if once {
            self.unmount(at).await?;
        }
        grown
    }

    /// How a tree of a wanted size is kept: on a device, in whole blocks of the pool.
    async fn tree(&self, size: Option<ByteSize>) -> Result<Kept> {
        let mut kept = self.backend().tree(size);
        if let (Some(on), Some(size)) = (kept.on, kept.size) {
            if size < on.smallest() {
                let text = format!("a volume with {} has at least {}", on.as_str(), on.smallest());
                return Err(Error::invalid("size", text));
            }
            kept.size = Some(self.backend().rounded(size).await?);
        }
        Ok(kept)
    }

    /// Makes what a new volume begins as.
    async fn build(&self, work: &Work, new: &NewVolume) -> Result<Kept> {
        let Source::Full(of) = &new.source else { return self.build_of(work, new, TreeMode::Plain).await };
        let mut size = new.size;
        if let Source::Volume { volume, snapshot } = &**of {
            let old = self.known(*volume, *snapshot).await?;
            size = match size {
                // As of a clone: what is copied has up to a block of the pool more than was asked for, and of a file system on a
                // device the size is what it was.
                Some(size) if old.content.is_disk() => Some(self.backend().rounded(size).await?),
                None if old.on.is_some() => old.size,
                size => size,
            };
        }
        let (source, reading) = apart(self, of).await?;
        let new = NewVolume { content: new.content, size, source };
        let built = self.build_of(work, &new, TreeMode::Apart).await;
        drop(reading);
        built
    }

    /// `how`: what is copied, rather than cloned.
    async fn build_of(&self, work: &Work, new: &NewVolume, how: TreeMode) -> Result<Kept> {
        let disk = |size| Kept { content: new.content, size: Some(ByteSize(size)), on: None };
        match (&new.source, new.content.is_disk()) {
            (Source::Empty, false) => {
                let kept = self.tree(new.size).await?;
                self.filled(work, kept, |at| {
                    Ok(std::fs::DirBuilder::new().mode(0o755).create(at.join("rootfs"))?)
                })
                .await?;
                Ok(kept)
            }
            (Source::Empty, true) => {
                let size = new.size.ok_or_else(|| Error::invalid("size", "an empty disk needs a size"))?;
                check_disk_size(size.0)?;
                self.make(work.object(), disk(size.0)).await?;
                Ok(disk(size.0))
            }
            (Source::Tree { path, image }, false) => {
                let kept = self.tree(new.size).await?;
                if let Some(image) = image {
                    let (from, old) = self.image(*image, &new.source).await?;
                    if old.on == kept.on && !smaller(old, kept) {
                        return self.cloned(work, from, old, kept.size).await;
                    }
                }
                let from = path.clone();
                self.filled(work, kept, move |at| copy_tree(&from, &at.join("rootfs"), how).map(drop))
                    .await?;
                Ok(kept)
            }
            (Source::Disk { path, format, backing, size: of_image, image }, true) => {
                let kept = disk(grown_size(new.size, *of_image)?);
                match (format, image) {
                    (Format::Directory, _) => return Err(mismatch()),
                    (Format::Qcow2, Some(image)) => {
                        let (from, old) = self.image(*image, &new.source).await?;
                        let old = Kept { content: new.content, ..old };
                        return self.cloned(work, from, old, kept.size).await;
                    }
                    (Format::Qcow2, None) => {
                        let staging = self.staging()?;
                        convert(&self.inner.worker, path, backing.as_deref(), &staging.0).await?;
                        self.poured(work, kept, staging.0.join("disk.img")).await?;
                    }
                    (Format::Raw, _) => self.poured(work, kept, path.clone()).await?,
                }
                Ok(kept)
            }
            (Source::Volume { volume, snapshot }, is_disk) => {
                let old = self.known(*volume, *snapshot).await?;
                if old.content.is_disk() != is_disk {
                    return Err(mismatch());
                }
                let from = match snapshot {
                    None => Object::Volume(*volume),
                    Some(s) => Object::Snapshot(*volume, *s),
                };
                let old = Kept { content: new.content, ..old };
                if is_disk {
                    // What is copied has more than was asked for when it was made, by less than a block of the pool.
                    let wanted = match new.size {
                        Some(size) => Some(self.backend().rounded(size).await?),
                        None => None,
                    };
                    let size = grown_size(wanted, old.size.map_or(0, |s| s.0))?;
                    return self.cloned(work, from, old, Some(ByteSize(size))).await;
                }
                let wanted = Kept { on: old.on, ..self.tree(new.size.or(old.size)).await? };
                let wanted =
                    if new.size.is_none() && old.on.is_none() { Kept { size: None, ..old } } else { wanted };
                if smaller(old, wanted) {
                    // A file system on a device does not shrink; a smaller one gets the files.
                    let reading = self.read(*volume, *snapshot).await?;
                    let path = reading.located.path.clone();
                    self.filled(work, wanted, move |at| {
                        copy_tree(&path, &at.join("rootfs"), TreeMode::Plain).map(drop)
                    })
                    .await?;
                    drop(reading);
                    return Ok(wanted);
                }
                self.cloned(work, from, old, wanted.size).await
            }
            _ => Err(mismatch()),
        }
    }

    /// What an image's volumes are cloned from; made when it is first asked for.
    async fn image(&self, image: ImageId, source: &Source) -> Result<(Object, Kept)> {
        let object = Object::Image(image);
        let _one = self.inner.taking.lock().await;
        if let Some(kept) = self.backend().find(object).await? {
            return Ok((object, kept));
        }
        let (content, source) = match source.clone() {
            Source::Tree { path, .. } => (VolumeContent::Filesystem, Source::Tree { path, image: None }),
            Source::Disk { path, format, backing, size, .. } => {
                (VolumeContent::Block, Source::Disk { path, format, backing, size, image: None })
            }
            _ => return Err(mismatch()),
        };
        let work = self.work();
        let kept = Box::pin(self.build(&work, &NewVolume { content, size: None, source })).await?;
        self.backend().rename(work.object(), object).await?;
        Ok((object, kept))
    }

    /// Puts what is in `work` in the volume's place. Once begun it is not given up.
    async fn exchange(&self, work: Work, volume: VolumeId) -> Result<()> {
        let pool = self.clone();
        let exchanged = tokio::spawn(async move {
            let backend = pool.backend();
            let (now, next) = (Object::Volume(volume), Object::Next(volume));
            // Nobody mounts what goes: who asks meanwhile waits for what comes.
            let _one = pool.inner.mounting.lock().await;
            let at = pool.place(volume);
            blocking(move || clear_place(&at)).await?;
            if backend.find(next).await?.is_some() {
                // Of an exchange that failed before the volume was moved; this one is wanted now.
                backend.rename(next, Object::trash()).await?;
            }
            backend.rename(work.object(), next).await?;
            if let Err(e) = backend.rename(now, Object::trash()).await
                && backend.find(now).await?.is_some()
            {
                // Nothing has changed, and nothing is to be completed later.
                backend.rename(next, Object::trash()).await?;
                return Err(e);
            }
            let mut tries = 0;
            while let Err(e) = backend.rename(next, now).await {
                tries += 1;
                if tries == TRIES {
                    // It is whole, and gets its name when the pool is opened next.
                    return Err(e);
                }
                tokio::time::sleep(PAUSE).await;
            }
            pool.wake_sweeper();
            Ok(())
        });
        exchanged.await.map_err(|e| Error::internal("a task ended unexpectedly", e))?
    }

    /// The node of a disk in a directory of ours, for `user`.
    async fn node(&self, object: Object, directory: PathBuf, user: u32) -> Result<PathBuf> {
        let device = self.backend().device(object).await?;
        blocking(move || {
            let numbers = std::fs::metadata(&device)?.rdev();
            std::fs::DirBuilder::new().recursive(true).mode(0o710).create(&directory)?;
            let node = directory.join("disk.img");
            match std::fs::symlink_metadata(&node) {
                Ok(m)
                    if m.rdev() == numbers && FileType::from_raw_mode(m.mode()) == FileType::BlockDevice => {}
                found => {
                    if found.is_ok() {
                        std::fs::remove_file(&node)?; // of an earlier start of the machine
                    }
                    rustix::fs::mknodat(CWD, &node, FileType::BlockDevice, 0o600.into(), numbers)
                        .map_err(io::Error::from)?;
                }
            }
            std::os::unix::fs::lchown(&node, Some(user), Some(user))?;
            std::fs::set_permissions(&node, Permissions::from_mode(0o600))?;
            std::os::unix::fs::lchown(&directory, Some(0), Some(user))?;
            std::fs::set_permissions(&directory, Permissions::from_mode(0o710))?;
            Ok(node)
        })
        .await
    }
}

/// Would it have to shrink?
fn smaller(old: Kept, new: Kept) -> bool {
    old.on.is_some() && new.size.unwrap_or_default() < old.size.unwrap_or_default()
}

fn info(id: VolumeId, kept: Kept) -> VolumeInfo {
    let format = if kept.content.is_disk() { Format::Raw } else { Format::Directory };
    VolumeInfo { id, content: kept.content, format, size: kept.size }
}

/// Takes a mount point or a directory of a node away.
fn clear_place(at: &Path) -> Result<()> {
    if mount::unmount(at, false).is_err() {
        // Somebody looks into it: it goes when he leaves.
        mount::unmount(at, true)?;
    }
    let gone = |outcome: io::Result<()>| match outcome {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    };
    gone(std::fs::remove_file(at.join("disk.img")))?;
    Ok(gone(std::fs::remove_dir(at))?)
}

#[async_trait]
impl PoolDriver for ObjectPool {
    fn kind(&self) -> PoolKind {
        self.backend().kind()
    }

    async fn create(&self, volume: VolumeId, new: &NewVolume) -> Result<VolumeInfo> {
        let object = Object::Volume(volume);
        if let Some(kept) = self.backend().find(object).await? {
            if kept.content != new.content {
                return Err(Error::conflict("a volume of another kind has this id"));
            }
            return Ok(info(volume, kept));
        }
        let work = self.work();
        self.build(&work, new).await?;
        if let Err(e) = self.backend().rename(work.object(), object).await {
            // Another call was faster; ours is thrown away.
            return self.inspect(volume).await.map_err(|_| e);
        }
        self.inspect(volume).await
    }

    async fn delete(&self, volume: VolumeId) -> Result<()> {
        let all = self.backend().list().await?.into_iter().map(|(object, _)| object);
        let (snapshots, mut own): (Vec<_>, Vec<_>) = all
            .filter(|o| match o {
                Object::Volume(v) | Object::Next(v) | Object::Snapshot(v, _) => *v == volume,
                _ => false,
            })
            .partition(|o| matches!(o, Object::Snapshot(..)));
        // What was about to take its place first: it would be completed. Then the volume: snapshots without one go at the next
        // start.
        own.sort_by_key(|o| matches!(o, Object::Volume(_)));
        {
            // Nobody mounts what goes.
            let _one = self.inner.mounting.lock().await;
            let at = self.place(volume);
            blocking(move || clear_place(&at)).await?;
            for object in own {
                self.backend().rename(object, Object::trash()).await?;
            }
        }
        for object in snapshots {
            self.backend().rename(object, Object::trash()).await?;
        }
        self.forget_text(volume).await?;
        self.wake_sweeper();
        Ok(())
    }

    async fn inspect(&self, volume: VolumeId) -> Result<VolumeInfo> {
        Ok(info(volume, self.known(volume, None).await?))
    }

    async fn locate(&self, volume: VolumeId, user: Option<u32>) -> Result<Located> {
        let kept = self.known(volume, None).await?;
        let place = self.place(volume);
        if kept.content.is_disk() {
            let path = self.node(Object::Volume(volume), place, user.unwrap_or(0)).await?;
            let chain = Default::default();
            return Ok(Located { path, layers: None, format: Format::Raw, backing: None, chain });
        }
        self.mount(Object::Volume(volume), kept, place.clone()).await?;
        let (path, chain) = (place.join("rootfs"), Default::default());
        Ok(Located { path, layers: None, format: Format::Directory, backing: None, chain })
    }

    async fn usage(&self, volume: VolumeId) -> Result<Usage> {
        let kept = self.known(volume, None).await?;
        let total = kept.size.map_or(0, |s| s.0);
        if kept.content.is_disk() {
            let used = self.backend().used(Object::Volume(volume), kept).await?;
            return Ok(Usage { used, total, ..Usage::default() });
        }
        let at = self.locate(volume, None).await?.path;
        let space = blocking(move || file_system(&at)).await?;
        Ok(Usage { total, inodes_total: 0, ..space })
    }

    async fn resize(&self, volume: VolumeId, size: ByteSize) -> Result<VolumeInfo> {
        let old = self.known(volume, None).await?;
        let before = old.size.unwrap_or_default();
        let device = old.on.is_some() || old.content.is_disk();
        if old.content.is_disk() {
            check_disk_size(size.0)?;
        }
        // A device has more than was wanted, by less than a block of the pool.
        let size = if device { self.backend().rounded(size).await? } else { size };
        if old.content.is_disk() && size < before {
            return Err(Error::invalid("size", format!("a disk cannot shrink; it has {} bytes", before.0)));
        }
        if !old.content.is_disk() {
            let used = self.usage(volume).await?.used;
            if used > size.0 {
                return Err(Error::invalid(
                    "size",
                    format!("the volume holds {used} bytes, which is more than the new limit"),
                ));
            }
            if smaller(old, Kept { size: Some(size), ..old }) {
                return Err(Error::invalid(
                    "size",
                    "a volume with a file system of its own cannot shrink; copy it to a smaller one",
                ));
            }
        }
        // A file system may be behind its device, which grew just before the daemon was killed.
        if size != before || old.on.is_some() {
            let kept = Kept { size: Some(size), ..old };
            self.set_size(Object::Volume(volume), kept, self.place(volume), false).await?;
        }
        self.inspect(volume).await
    }

    async fn list(&self) -> Result<Vec<VolumeInfo>> {
        let all = self.backend().list().await?.into_iter();
        let mut found: Vec<_> = all
            .filter_map(|(object, kept)| match object {
                Object::Volume(v) => Some(info(v, kept)),
                _ => None,
            })
            .collect();
        found.sort_by_key(|v| v.id);
        Ok(found)
    }

    async fn space(&self) -> Result<Usage> {
        self.backend().space().await
    }

    fn supports_quota(&self) -> bool {
        true
    }

    async fn settle(&self) {
        let (done, wait) = oneshot::channel();
        if self.sweep.send(Some(done)).await.is_ok() {
            let _ = wait.await; // the sweeper ends with the pool only
        }
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        Some(self)
    }

    fn contents(&self) -> Option<&dyn Contents> {
        Some(self)
    }

    fn descriptions(&self) -> Option<&dyn Descriptions> {
        Some(self)
    }

    async fn forget_image(&self, image: ImageId) -> Result<()> {
        let _one = self.inner.taking.lock().await;
        if self.backend().find(Object::Image(image)).await?.is_some() {
            self.backend().rename(Object::Image(image), Object::trash()).await?;
            self.wake_sweeper();
        }
        Ok(())
    }
}

fn file_system(at: &Path) -> Result<Usage> {
    let s = rustix::fs::statvfs(at).map_err(io::Error::from)?;
    Ok(Usage {
        used: (s.f_blocks - s.f_bfree) * s.f_frsize,
        total: s.f_blocks * s.f_frsize,
        inodes_used: s.f_files - s.f_ffree,
        inodes_total: s.f_files,
    })
}

#[async_trait]
impl Snapshots for ObjectPool {
    fn instant(&self) -> bool {
        true
    }

    async fn create(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<()> {
        let kept = self.known(volume, None).await?;
        let object = Object::Snapshot(volume, snapshot);
        if self.backend().find(object).await?.is_some() {
            return Ok(());
        }
        self.room().await?;
        let work = self.work();
        self.clone_now(Object::Volume(volume), work.object(), kept).await?;
        self.backend().rename(work.object(), object).await
    }

    async fn delete(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<()> {
        let object = Object::Snapshot(volume, snapshot);
        if self.backend().find(object).await?.is_some() {
            self.backend().rename(object, Object::trash()).await?;
            self.wake_sweeper();
        }
        Ok(())
    }

    async fn restore(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<VolumeInfo> {
        let kept = self.known(volume, Some(snapshot)).await?;
        let work = self.work();
        self.backend().clone(Object::Snapshot(volume, snapshot), work.object(), kept).await?;
        self.exchange(work, volume).await?;
        Ok(info(volume, kept))
    }

    async fn list(&self, volume: VolumeId) -> Result<Vec<(SnapshotId, VolumeInfo)>> {
        self.known(volume, None).await?;
        let all = self.backend().list().await?.into_iter();
        let mut found: Vec<_> = all
            .filter_map(|(object, kept)| match object {
                Object::Snapshot(v, s) if v == volume => Some((s, info(volume, kept))),
                _ => None,
            })
            .collect();
        found.sort_by_key(|(id, _)| *id);
        Ok(found)
    }
}

async fn blocking<T: Send + 'static>(f: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(f).await.map_err(|e| Error::internal("a task ended unexpectedly", e))?
}
