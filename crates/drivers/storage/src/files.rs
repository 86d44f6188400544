//! Pools on a file system that is mounted already: `dir` and `btrfs`.
//!
//! ```text
//! POOL/volumes/<volume>/               a state: volume.json · rootfs/ [+ over/] (tree) | disk.img [+ base.img] [+ layer-N.img] (disk)
//! POOL/snapshots/<volume>/<snapshot>/  a state
//! POOL/images/<image>/                 a state to clone from, where clones are instant, or that trees lie over (`layers`)
//! POOL/descriptions/                   what the pool and its volumes are (`descriptions`)
//! POOL/tmp/<uuid>/                     a state in the making; removed at the next start
//! POOL/trash/<uuid>/                   a state on its way out
//! POOL/.lock                           held by the one process that has it open (`hold`)
//! ```
//! Everything is one step: a state is made in `tmp` and appears by a rename, or by an exchange with the one that it
//! replaces. Modes: POOL, `volumes` are 0711, so that a QEMU without privileges gets to its own disk; a tree's state is 0700
//! (its setuid files, owned by root on disk, are out of reach of the host's users), a disk's is 0710 with the group of the
//! guest's own user, its `disk.img` 0600 and owned by that user.
//!
//! What the guest's side has written (a qcow2 header can name any file of the host) is only read by a worker without
//! privileges.

use crate::{
    Contents, Descriptions, DiskLayers, Filling, Format, Located, NewVolume, OpenTree, PoolDriver, Reading,
    Snapshots, Source, VolumeInfo, abilities, descriptions,
    driver::apart,
    filling::{FileFilling, made},
    flush,
    growth::grow_raw,
    hold::Hold,
    layers::{self, Opened},
    places,
    states::{self, Record, States, check_disk_size, copy_file, link_or_copy},
    sweep::{Live, Work},
};
use async_trait::async_trait;
use karst_host::{
    Program,
    fs::TreeMode,
    overlay::{Held, Mapped},
    run,
    sandbox::{Launcher, Sandbox},
};
use karst_model::{
    ByteSize, Error, ImageId, Result, SnapshotId, VolumeId,
    storage::{Abilities, PoolKind, Usage, VolumeContent},
};
use std::{
    fs::File,
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::sync::{mpsc, oneshot};

/// A directory of a mounted file system as a pool. Cheap to clone.
#[derive(Debug, Clone)]
pub struct FilePool {
    pub(crate) root: Arc<PathBuf>,
    pub(crate) states: Arc<dyn States>,
    /// Trees of images are overlays.
    pub(crate) layered: bool,
    pub(crate) opened: Arc<Opened>,
    /// What its file system can.
    pub(crate) abilities: Abilities,
    /// Trees being given other owners, one at a time.
    pub(crate) moving: Arc<tokio::sync::Mutex<()>>,
    /// It was opened to be used: that was tried.
    pub(crate) tried: bool,
    /// Places in `tmp` that somebody answers for.
    pub(crate) live: Arc<Live>,
    /// How disks are converted without privileges.
    pub(crate) worker: Arc<Launcher>,
    /// Wakes the sweeper; an answer is wanted by those who wait for it.
    pub(crate) sweep: mpsc::Sender<Option<oneshot::Sender<()>>>,
    /// Wakes the flusher, in the same way.
    pub(crate) flush: mpsc::Sender<flush::Waiter>,
    /// Trees being copied at the same time: more than a few only make the disk seek.
    pub(crate) copies: Arc<tokio::sync::Semaphore>,
    /// Images being taken in, one at a time.
    pub(crate) taking: Arc<tokio::sync::Mutex<()>>,
    /// No other daemon has it open.
    pub(crate) _hold: Arc<Hold>,
}

impl FilePool {
    pub(crate) fn dir(&self, volume: VolumeId) -> PathBuf {
        self.root.join("volumes").join(volume.to_string())
    }

    fn snapshots_of(&self, volume: VolumeId) -> PathBuf {
        self.root.join("snapshots").join(volume.to_string())
    }

    /// The record of what is cloned of a disk that is one file: where a clone is a copy of that, it has the usual name.
    fn cloned(&self, record: &Record) -> Record {
        if self.states.instant() { record.clone() } else { record.as_one() }
    }

    fn state(&self, volume: VolumeId, snapshot: Option<SnapshotId>) -> PathBuf {
        match snapshot {
            None => self.dir(volume),
            Some(s) => self.snapshots_of(volume).join(s.to_string()),
        }
    }

    pub(crate) fn wake_sweeper(&self) {
        // A full channel means that it will run anyway.
        let _ = self.sweep.try_send(None);
    }

    /// Something has a content that is not on disk yet.
    pub(crate) fn wake_flusher(&self) {
        let _ = self.flush.try_send(None); // as the sweeper
    }

    async fn record(&self, state: PathBuf) -> Result<Option<Record>> {
        blocking(move || Record::read(&state)).await
    }

    pub(crate) async fn known(&self, volume: VolumeId, snapshot: Option<SnapshotId>) -> Result<Record> {
        let found = self.record(self.dir(volume)).await?;
        let found = found.ok_or_else(|| Error::not_found("the pool does not have the volume"))?;
        match snapshot {
            None => Ok(found),
            Some(_) => self
                .record(self.state(volume, snapshot))
                .await?
                .ok_or_else(|| Error::not_found("the volume does not have the snapshot")),
        }
    }

    /// Refuses a state that a power cut may have left incomplete.
    async fn complete_on_disk(&self, state: &Path) -> Result<()> {
        let state = state.to_owned();
        blocking(move || flush::check(&state)).await
    }

    /// Puts what was made of `source` in `work` on disk, unless it is of an image, of which it can be made again.
    async fn finish(&self, work: &Path, source: &Source) -> Result<()> {
        let copied = match source {
            Source::Empty | Source::Tree { image: Some(_), .. } | Source::Disk { image: Some(_), .. } => {
                return Ok(());
            }
            Source::Tree { .. } | Source::Disk { .. } | Source::Full(_) => true,
            Source::Volume { .. } => false,
        };
        self.on_disk(work, copied).await
    }

    /// Puts what is in `work` on disk; `filled`: although native clones have no mark.
    async fn on_disk(&self, work: &Path, filled: bool) -> Result<()> {
        let at = work.to_owned();
        blocking(move || flush::finish(&at, filled)).await
    }

    /// A place in `tmp`, cleared unless it is kept.
    fn work(&self) -> Work {
        let path = fresh(&self.root.join("tmp"));
        self.live.insert(&path);
        Work { pool: self.clone(), path: Some(path) }
    }

    /// Work on states where it may block, counted when it copies.
    async fn with_states<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn States) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let states = self.states.clone();
        if states.instant() {
            return blocking(move || work(&*states)).await;
        }
        let _turn = self.copies.acquire().await.map_err(|e| Error::internal("the pool is closed", e))?;
        blocking(move || work(&*states)).await
    }

    /// Makes a state at `work` of a source, without its record.
    async fn build(&self, work: &Path, new: &NewVolume) -> Result<Record> {
        let Source::Full(of) = &new.source else { return self.build_of(work, new, TreeMode::Plain).await };
        let (source, reading) = apart(self, of).await?;
        let new = NewVolume { source, ..new.clone() };
        let built = self.build_of(work, &new, TreeMode::Apart).await;
        drop(reading);
        built
    }

    /// `how`: what is copied, rather than cloned.
    async fn build_of(&self, work: &Path, new: &NewVolume, how: TreeMode) -> Result<Record> {
        let content = new.content;
        let record = |format, size, based| Record {
            content,
            format,
            size,
            based,
            image: None,
            moved: None,
            chain: vec![],
        };
        let at = work.to_owned();
        match (&new.source, new.content.is_disk()) {
            (Source::Empty, false) => {
                self.with_states(move |states| {
                    states.make(&at)?;
                    states.account(&at)?;
                    Ok(std::fs::DirBuilder::new().mode(0o755).create(at.join("rootfs"))?)
                })
                .await?;
                Ok(record(Format::Directory, new.size, false))
            }
            (Source::Empty, true) => {
                let size = new.size.ok_or_else(|| Error::invalid("size", "an empty disk needs a size"))?;
                check_disk_size(size.0)?;
                self.with_states(move |states| {
                    states.make(&at)?;
                    let disk = at.join("disk.img");
                    let file = File::options().write(true).create_new(true).mode(0o600).open(disk)?;
                    Ok(file.set_len(size.0)?)
                })
                .await?;
                Ok(record(Format::Raw, Some(size), false))
            }
            (Source::Tree { path, image }, false) => {
                match image {
                    Some(image) if self.layered => return self.over_image(work, *image, new).await,
                    Some(image) if self.states.instant() => {
                        let base = self.image(*image, &new.source).await?;
                        self.with_states(move |states| states.clone(&base.0, &at, &base.1, false)).await?;
                    }
                    _ => {
                        let from = path.clone();
                        self.with_states(move |states| {
                            states.make_to_fill(&at)?;
                            states.account(&at)?;
                            states::copy_tree(&from, &at.join("rootfs"), how).map(drop)
                        })
                        .await?;
                    }
                }
                Ok(record(Format::Directory, new.size, false))
            }
            (Source::Disk { path, format, backing, size: of_image, image }, true) => {
                let size = grown_size(new.size, *of_image)?;
                let disk = at.join("disk.img");
                let (from, of_image) = (path.clone(), *of_image);
                match (format, image) {
                    (Format::Qcow2, Some(_)) if !self.states.instant() => {
                        let base = at.join("base.img");
                        self.with_states(move |states| {
                            states.make_to_fill(&at)?;
                            link_or_copy(&from, &base)
                        })
                        .await?;
                        overlay(&disk, size).await?;
                        return Ok(record(Format::Qcow2, Some(ByteSize(size)), true));
                    }
                    (Format::Qcow2, Some(image)) => {
                        let base = self.image(*image, &new.source).await?;
                        self.with_states(move |states| states.clone(&base.0, &at, &base.1, false)).await?;
                    }
                    (Format::Raw, _) => {
                        self.with_states(move |states| {
                            states.make_to_fill(&at)?;
                            copy_file(&from, &at.join("disk.img"), 0o600, how)
                        })
                        .await?;
                    }
                    (Format::Qcow2, None) => {
                        let made = at.clone();
                        self.with_states(move |states| states.make_to_fill(&made)).await?;
                        convert(&self.worker, path, backing.as_deref(), &at).await?;
                    }
                    (Format::Directory, _) => return Err(mismatch()),
                }
                if size > of_image {
                    blocking(move || grow_raw(&disk, size)).await?;
                }
                Ok(record(Format::Raw, Some(ByteSize(size)), false))
            }
            (Source::Volume { volume, snapshot }, disk) => {
                let old = self.known(*volume, *snapshot).await?;
                if old.content.is_disk() != disk {
                    return Err(mismatch());
                }
                old.demand_one()?;
                let old = self.cloned(&old);
                let size = match (disk, old.size) {
                    (true, Some(old)) => Some(ByteSize(grown_size(new.size, old.0)?)),
                    _ => new.size,
                };
                let (from, record) = (
                    self.state(*volume, *snapshot),
                    Record { size, content: new.content, moved: None, ..old.clone() },
                );
                let cloned = record.clone();
                self.with_states(move |states| states.clone(&from, &at, &cloned, false)).await?;
                if disk && size != old.size {
                    self.grow(work, &record, size.unwrap_or_default()).await?;
                }
                Ok(record)
            }
            _ => Err(mismatch()),
        }
    }

    pub(crate) fn sandbox(&self) -> Sandbox {
        Sandbox::new(&self.worker)
    }

    async fn image(&self, image: ImageId, source: &Source) -> Result<(PathBuf, Record)> {
        let _one = self.taking.lock().await;
        self.taken(image, source).await
    }

    /// The state that an image's volumes are cloned from; made when it is first asked for. The caller holds `taking`.
    pub(crate) async fn taken(&self, image: ImageId, source: &Source) -> Result<(PathBuf, Record)> {
        let at = self.root.join("images").join(image.to_string());
        if let Some(record) = self.record(at.clone()).await? {
            return Ok((at, record));
        }
        let (content, source) = match source.clone() {
            Source::Tree { path, .. } => (VolumeContent::Filesystem, Source::Tree { path, image: None }),
            Source::Disk { path, format, backing, size, .. } => {
                (VolumeContent::Block, Source::Disk { path, format, backing, size, image: None })
            }
            _ => return Err(mismatch()),
        };
        let work = self.work();
        let record = match source {
            Source::Tree { path, .. } if self.layered => {
                let at = work.path().to_owned();
                self.with_states(move |states| {
                    states.make(&at)?;
                    layers::take(&path, &at.join("rootfs"))
                })
                .await?;
                Record {
                    content,
                    format: Format::Directory,
                    size: None,
                    based: false,
                    image: None,
                    moved: None,
                    chain: vec![],
                }
            }
            source => Box::pin(self.build(work.path(), &NewVolume { content, size: None, source })).await?,
        };
        let (from, to, written) = (work.path().to_owned(), at.clone(), record.clone());
        blocking(move || {
            written.write(&from)?;
            Ok(std::fs::rename(&from, &to)?)
        })
        .await?;
        work.keep();
        Ok((at, record))
    }

    /// Completes the state in `work`: mode, record, limit.
    pub(crate) async fn complete(&self, work: &Path, record: &Record) -> Result<()> {
        let (at, record) = (work.to_owned(), record.clone());
        self.with_states(move |states| {
            states::set_mode(&at, Record::mode(record.content))?;
            if Record::read(&at)?.as_ref() != Some(&record) {
                record.write(&at)?;
            }
            if states.limits() && !record.content.is_disk() && record.size.is_some() {
                states.limit(&at, record.size)?;
            }
            Ok(())
        })
        .await
    }

    async fn used(&self, state: &Path, record: &Record) -> Result<(u64, u64)> {
        let (states, at, record) = (self.states.clone(), state.to_owned(), record.clone());
        blocking(move || states.used(&at, &record)).await
    }

    /// Refuses a new tree that holds more than it may: its maker is bound by no limit where clones are copies.
    async fn demand_room(&self, work: &Path, record: &Record) -> Result<()> {
        let copied = !record.content.is_disk() && !self.states.instant() && self.states.limits();
        let Some(size) = record.size.filter(|_| copied) else { return Ok(()) };
        let (used, _) = self.used(work, record).await?;
        // What stood beside the tree that was full may stand there again.
        if used <= crate::projects::allowed(size) {
            return Ok(());
        }
        Err(Error::quota(format!(
            "it would hold {used} bytes, which is more than its size; choose a larger one"
        ))
        .at("size"))
    }

    /// Puts the state in `work` in the place of the volume's, which goes: so it is on disk before.
    pub(crate) async fn exchange(&self, work: Work, volume: VolumeId, filled: bool) -> Result<()> {
        self.on_disk(work.path(), filled).await?;
        self.opened.forget(volume);
        let (new, now) = (work.path().to_owned(), self.dir(volume));
        blocking(move || {
            places::exchange(&new, &now)?;
            sync_parent(&now)
        })
        .await
        // What `work` has now is the old state: it goes with it.
    }

    fn no_limits(&self) -> Error {
        let text = "this pool does not limit the size of containers' volumes";
        Error::unsupported(format!("{text}; {}", self.states.lacks()))
    }

    fn check(&self, new: &NewVolume) -> Result<()> {
        if !new.content.is_disk() && !self.abilities.owners {
            return Err(abilities::no_owners());
        }
        if !new.content.is_disk() && new.size.is_some() && !self.states.limits() {
            return Err(self.no_limits().at("size"));
        }
        Ok(())
    }
}

pub(crate) fn mismatch() -> Error {
    Error::invalid(
        "source",
        "a container's volume is made of a container image or volume, and a disk of a virtual machine's",
    )
}

pub(crate) fn fresh(below: &Path) -> PathBuf {
    below.join(uuid::Uuid::new_v4().to_string())
}

/// Whoever is told that it is there finds it after a power cut.
fn sync_parent(of: &Path) -> Result<()> {
    Ok(File::open(of.parent().unwrap_or(of))?.sync_all()?)
}

pub(crate) fn open(path: &Path, write: bool) -> Result<std::os::fd::OwnedFd> {
    let flags = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
    Ok(File::options().read(true).write(write).custom_flags(flags).open(path)?.into())
}

/// The size of a clone.
pub(crate) fn grown_size(wanted: Option<ByteSize>, source: u64) -> Result<u64> {
    let size = wanted.map_or(source, |s| s.0);
    check_disk_size(size)?;
    if size < source {
        return Err(Error::invalid(
            "size",
            format!(
                "the disk would be smaller than its image, which has {source} bytes; choose a larger size"
            ),
        ));
    }
    Ok(size)
}

/// A qcow2 disk as `disk.img` in `to`, raw, by a worker that sees nothing else.
pub(crate) async fn convert(worker: &Launcher, disk: &Path, backing: Option<&Path>, to: &Path) -> Result<()> {
    let mut sandbox =
        Sandbox::new(worker).readable("disk.img", open(disk, false)?).writable("out", open(to, false)?);
    // An overlay names its base relative to itself.
    if let Some(base) = backing {
        sandbox = sandbox.readable("base.img", open(base, false)?);
    }
    // -U: whoever has it open was paused; there is no lock to wait for.
    let args = ["convert", "-U", "-f", "qcow2", "-O", "raw", "/disk.img", "/out/disk.img"];
    done(sandbox.exec(Program::QemuImg, &args).await?)?;
    let disk = to.join("disk.img");
    made(&disk, false)?;
    states::set_mode(&disk, 0o600)
}

/// A qcow2 overlay over `base.img` beside it.
async fn overlay(disk: &Path, size: u64) -> Result<()> {
    // -u: the backing file is not opened. Its name is relative to the overlay's directory.
    run(Program::QemuImg)
        .args(["create", "-q", "-u", "-f", "qcow2", "-o", "backing_file=base.img,backing_fmt=qcow2"])
        .arg(disk)
        .arg(size.to_string())
        .ok()
        .await
        .map_err(full)?;
    states::set_mode(disk, 0o600)
}

/// `qemu-img` says in words that the disk is full.
pub(crate) fn full(e: Error) -> Error {
    match &e.context {
        Some(c) if c.contains("No space left") || c.contains("quota exceeded") => {
            Error::quota("no space left in the pool").with_context(c)
        }
        // QEMU holds a lock on images that it has open.
        Some(c) if c.contains("Failed to get") && c.contains("lock") => {
            Error::conflict("the disk is in use; stop the virtual machine first").with_context(c)
        }
        _ => e,
    }
}

pub(crate) fn done(ended: karst_host::sandbox::Ended) -> Result<()> {
    ended.ok("qemu-img").map(drop).map_err(full)
}

pub(crate) fn info(id: VolumeId, r: Record) -> VolumeInfo {
    VolumeInfo { id, content: r.content, format: r.active_format(), size: r.size }
}

#[async_trait]
impl PoolDriver for FilePool {
    fn kind(&self) -> PoolKind {
        self.states.kind()
    }

    async fn create(&self, volume: VolumeId, new: &NewVolume) -> Result<VolumeInfo> {
        if let Some(record) = self.record(self.dir(volume)).await? {
            if record.content != new.content {
                return Err(Error::conflict("a volume of another kind has this id"));
            }
            return Ok(info(volume, record));
        }
        self.check(new)?;
        let work = self.work();
        let record = self.build(work.path(), new).await?;
        self.complete(work.path(), &record).await?;
        self.demand_room(work.path(), &record).await?;
        self.finish(work.path(), &new.source).await?;
        let (from, to) = (work.path().to_owned(), self.dir(volume));
        let named = blocking(move || {
            let named = places::give_name(&from, &to)?;
            if named {
                sync_parent(&to)?;
            }
            Ok(named)
        });
        if !named.await? {
            // Another call was faster; ours is thrown away.
            return self.inspect(volume).await;
        }
        work.keep();
        self.wake_flusher();
        Ok(info(volume, record))
    }

    async fn delete(&self, volume: VolumeId) -> Result<()> {
        self.opened.forget(volume);
        // The volume first: snapshots without one are swept at the next start.
        for from in [self.dir(volume), self.snapshots_of(volume)] {
            match tokio::fs::rename(from, fresh(&self.root.join("trash"))).await {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                r => r?,
            }
        }
        let root = self.root.clone();
        blocking(move || Ok(descriptions::forget(&root, volume)?)).await?;
        // Not synced: after a power cut the volume may be back, and whoever compares `list` with its records removes it.
        self.wake_sweeper();
        Ok(())
    }

    async fn inspect(&self, volume: VolumeId) -> Result<VolumeInfo> {
        Ok(info(volume, self.known(volume, None).await?))
    }

    async fn locate(&self, volume: VolumeId, user: Option<u32>) -> Result<Located> {
        let record = self.known(volume, None).await?;
        let dir = self.dir(volume);
        self.complete_on_disk(&dir).await?;
        if record.format == Format::Directory {
            let layers = self.layers(&dir, &record)?;
            let (path, chain) = (dir.join("rootfs"), Default::default());
            return Ok(Located { path, layers, format: record.format, backing: None, chain });
        }
        let at = dir.clone();
        blocking(move || states::give(&at, user.unwrap_or(0))).await?;
        let backing = record.based.then(|| dir.join("base.img"));
        let (path, format, chain) = (dir.join(record.disk()), record.active_format(), record.located(&dir));
        Ok(Located { path, layers: None, format, backing, chain })
    }

    async fn open_tree(&self, volume: VolumeId) -> Result<OpenTree> {
        let located = self.locate(volume, None).await?;
        match located.layers {
            Some(layers) => self.open_layered(volume, layers).await,
            None => {
                self.move_back(volume).await?;
                Ok(OpenTree { path: located.path, guard: None })
            }
        }
    }

    fn abilities(&self) -> Option<Abilities> {
        self.tried.then_some(self.abilities)
    }

    async fn move_owners(&self, volume: VolumeId, ids: Mapped) -> Result<()> {
        self.move_to(volume, ids).await
    }

    async fn flatten(&self, volume: VolumeId) -> Result<()> {
        if self.known(volume, None).await?.image.is_none() {
            return Ok(());
        }
        let whole = self.read(volume, None).await?;
        let source = Source::Tree { path: whole.located.path.clone(), image: None };
        self.replace(volume, &source).await.map(drop)
    }

    async fn usage(&self, volume: VolumeId) -> Result<Usage> {
        let record = self.known(volume, None).await?;
        let dir = self.dir(volume);
        let limited = record.content.is_disk() || self.states.limits();
        let states = self.states.clone();
        blocking(move || {
            let total = record.size.filter(|_| limited).map_or(0, |s| s.0);
            let (used, inodes_used) = states.used(&dir, &record)?;
            Ok(Usage { used, total, inodes_used, inodes_total: 0 })
        })
        .await
    }

    async fn grown(&self, volume: VolumeId, size: ByteSize) -> Result<VolumeInfo> {
        let mut record = self.known(volume, None).await?;
        record.size = Some(size.max(record.size.unwrap_or_default()));
        let (dir, written) = (self.dir(volume), record.clone());
        blocking(move || written.write(&dir)).await?;
        Ok(info(volume, record))
    }

    async fn resize(&self, volume: VolumeId, size: ByteSize) -> Result<VolumeInfo> {
        let mut record = self.known(volume, None).await?;
        let dir = self.dir(volume);
        if record.format == Format::Directory {
            if !self.states.limits() {
                return Err(self.no_limits());
            }
            let (used, _) = self.used(&dir, &record).await?;
            if used > size.0 {
                return Err(Error::invalid(
                    "size",
                    format!("the volume holds {used} bytes, which is more than the new limit"),
                ));
            }
            record.size = Some(size);
            let written = record.clone();
            self.with_states(move |states| {
                states.limit(&dir, Some(size))?;
                written.write(&dir)
            })
            .await?;
            return Ok(info(volume, record));
        }
        check_disk_size(size.0)?;
        let old = record.size.unwrap_or_default();
        if size < old {
            return Err(Error::invalid("size", format!("a disk cannot shrink; it has {} bytes", old.0)));
        }
        if size > old {
            self.grow(&dir, &record, size).await?;
            record.size = Some(size);
            let written = record.clone();
            blocking(move || written.write(&dir)).await?;
        }
        Ok(info(volume, record))
    }

    async fn list(&self) -> Result<Vec<VolumeInfo>> {
        let volumes = self.root.join("volumes");
        blocking(move || {
            let mut found: Vec<_> =
                states_in(&volumes)?.into_iter().map(|(id, r)| info(VolumeId(id), r)).collect();
            found.sort_by_key(|v| v.id);
            Ok(found)
        })
        .await
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
        self.states.limits()
    }

    async fn flush(&self) -> Result<()> {
        if self.states.instant() {
            return Ok(()); // it makes no marks
        }
        let (done, wait) = oneshot::channel();
        let ended = |_| Error::internal("the pool is being closed", "its flusher has ended");
        self.flush.send(Some(done)).await.map_err(|_| ended(()))?;
        wait.await.map_err(|_| ended(()))?
    }

    async fn settle(&self) {
        let (done, wait) = oneshot::channel();
        if self.sweep.send(Some(done)).await.is_ok() {
            let _ = wait.await;
        }
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        Some(self)
    }

    fn contents(&self) -> Option<&dyn Contents> {
        Some(self)
    }

    fn disk_layers(&self) -> Option<&dyn DiskLayers> {
        Some(self)
    }

    fn descriptions(&self) -> Option<&dyn Descriptions> {
        Some(self)
    }

    async fn forget_image(&self, image: ImageId) -> Result<()> {
        let from = self.root.join("images").join(image.to_string());
        let _one = self.taking.lock().await;
        if self.keep_for_volumes(image).await? {
            return Ok(());
        }
        match tokio::fs::rename(from, fresh(&self.root.join("trash"))).await {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            r => r?,
        }
        self.wake_sweeper();
        Ok(())
    }
}

#[async_trait]
impl Snapshots for FilePool {
    fn instant(&self) -> bool {
        self.states.instant()
    }

    async fn create(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<()> {
        let record = Record { moved: None, ..self.known(volume, None).await? };
        record.demand_one()?;
        let record = self.cloned(&record);
        let (from, to) = (self.dir(volume), self.state(volume, Some(snapshot)));
        let parent = self.snapshots_of(volume);
        let work = self.work();
        let making = work.path().to_owned();
        let kept = self
            .with_states(move |states| {
                if Record::read(&to)?.is_some() {
                    return Ok(false);
                }
                match std::fs::DirBuilder::new().mode(0o700).create(&parent) {
                    Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e.into()),
                    _ => {}
                }
                if states.instant() {
                    // At once in its place: what cannot be changed cannot be moved either.
                    states.clone(&from, &to, &record, true)?;
                    return Ok(false);
                }
                states.clone(&from, &making, &record, true)?;
                std::fs::rename(&making, &to)?;
                sync_parent(&to)?;
                Ok(true)
            })
            .await?;
        if kept {
            work.keep();
            self.wake_flusher();
        }
        Ok(())
    }

    async fn whole(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<bool> {
        match self.complete_on_disk(&self.state(volume, Some(snapshot))).await {
            Err(e) if e.is(karst_model::ErrorKind::Conflict) => Ok(false),
            other => other.map(|()| true),
        }
    }

    async fn delete(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<()> {
        let from = self.state(volume, Some(snapshot));
        if self.states.instant() {
            return self.with_states(move |states| Ok(states.remove(&from)?)).await;
        }
        match tokio::fs::rename(from, fresh(&self.root.join("trash"))).await {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            r => r?,
        }
        self.wake_sweeper();
        Ok(())
    }

    async fn restore(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<VolumeInfo> {
        self.known(volume, None).await?.demand_one()?;
        let record = self.cloned(&self.known(volume, Some(snapshot)).await?);
        let (from, at, copied) = (self.state(volume, Some(snapshot)), self.work(), record.clone());
        let to = at.path().to_owned();
        self.with_states(move |states| states.clone(&from, &to, &copied, false)).await?;
        self.complete(at.path(), &record).await?;
        self.exchange(at, volume, false).await?;
        Ok(info(volume, record))
    }

    async fn list(&self, volume: VolumeId) -> Result<Vec<(SnapshotId, VolumeInfo)>> {
        self.known(volume, None).await?;
        let at = self.snapshots_of(volume);
        blocking(move || {
            let all = states_in(&at)?.into_iter();
            let mut found: Vec<_> = all.map(|(id, r)| (SnapshotId(id), info(volume, r))).collect();
            found.sort_by_key(|(id, _)| *id);
            Ok(found)
        })
        .await
    }
}

#[async_trait]
impl Contents for FilePool {
    async fn read(&self, volume: VolumeId, snapshot: Option<SnapshotId>) -> Result<Reading> {
        let record = self.known(volume, snapshot).await?;
        let dir = self.state(volume, snapshot);
        self.complete_on_disk(&dir).await?;
        if let Some(layers) = self.layers(&dir, &record)? {
            let mounted = layers.clone();
            let mount =
                blocking(move || Ok(Held::new(karst_host::overlay::mount(&mounted, false, None)?))).await?;
            let located = Located {
                path: mount.path(),
                layers: Some(layers),
                format: record.format,
                backing: None,
                chain: Default::default(),
            };
            return Ok(Reading { info: info(volume, record), located, guard: Some(Box::new(mount)) });
        }
        if record.moved.is_some() {
            // A guest may have it, to which it belongs as it is: what is read is a copy.
            let (work, copied) = (self.work(), Record { moved: None, ..record.clone() });
            let to = work.path().to_owned();
            self.with_states(move |states| states.clone(&dir, &to, &copied, true)).await?;
            let path = work.path().join("rootfs");
            let chain = Default::default();
            let located = Located { path, layers: None, format: record.format, backing: None, chain };
            return Ok(Reading { info: info(volume, record), located, guard: Some(Box::new(work)) });
        }
        record.demand_one()?;
        let name = if record.content.is_disk() { record.disk() } else { "rootfs".into() };
        let format = record.active_format();
        if format == Format::Qcow2 {
            // Whoever has it open keeps it, the next start gives it back; the worker that converts it has no guest's ids.
            let at = dir.clone();
            blocking(move || states::give(&at, 0)).await?;
        }
        let backing = record.based.then(|| dir.join("base.img"));
        let (path, chain) = (dir.join(name), Default::default());
        let located = Located { path, layers: None, format, backing, chain };
        Ok(Reading { info: info(volume, record), located, guard: None })
    }

    async fn replace(&self, volume: VolumeId, source: &Source) -> Result<VolumeInfo> {
        let old = self.known(volume, None).await?;
        old.demand_one()?;
        // A tree keeps its own limit.
        let size = if old.content.is_disk() { None } else { old.size };
        let new = NewVolume { content: old.content, size, source: source.clone() };
        let work = self.work();
        let record = self.build(work.path(), &new).await?;
        self.complete(work.path(), &record).await?;
        self.demand_room(work.path(), &record).await?;
        let filled = matches!(
            source,
            Source::Tree { image: None, .. } | Source::Disk { image: None, .. } | Source::Full(_)
        );
        self.exchange(work, volume, filled).await?;
        Ok(info(volume, record))
    }

    async fn begin(&self, volume: VolumeId) -> Result<Box<dyn Filling>> {
        let old = self.known(volume, None).await?;
        old.demand_one()?;
        let work = self.work();
        let at = work.path().to_owned();
        let (tree, limit) = (!old.content.is_disk(), old.size.filter(|_| self.states.limits()));
        self.with_states(move |states| {
            states.make_to_fill(&at)?;
            if tree {
                states.account(&at)?;
            }
            if tree && limit.is_some() {
                states.limit(&at, limit)?;
            }
            Ok(())
        })
        .await?;
        Ok(Box::new(FileFilling { work, volume, old }))
    }
}

/// States in a directory, by the ids that are their names.
fn states_in(directory: &Path) -> Result<Vec<(uuid::Uuid, Record)>> {
    let entries = match std::fs::read_dir(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        other => other?,
    };
    let mut found = vec![];
    for entry in entries.flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        found.extend(Record::read(&entry.path())?.map(|r| (id, r)));
    }
    Ok(found)
}

pub(crate) async fn blocking<T: Send + 'static>(f: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(f).await.map_err(|e| Error::internal("a task ended unexpectedly", e))?
}
