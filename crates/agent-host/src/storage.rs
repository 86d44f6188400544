//! Pools and volumes: who may touch what when, and the streams in and out.
//!
//! A volume is changed by one call at a time (its lock); a call that reads another volume takes both locks, in the order of
//! their ids. What a running guest uses is never replaced or deleted, and only frozen or copied as `volume_snapshot_create`
//! of the protocol says.

use crate::{
    RealAgent,
    agent::{blocking, has_volume},
    pools::Purpose,
};
use karst_agent::*;
use karst_host::{
    Program,
    sandbox::{Ended, Limits, Sandbox},
};
use karst_image::{
    Content, qcow2,
    unpack::{Answer, Bounds, Part, Task},
};
use karst_model::{
    ByteSize, Error, ErrorKind, ImageId, InstanceId, PoolId, Result, SessionId, SnapshotId, VolumeId,
    instance::{InstanceKind, RuntimeState},
    spec::{VolumeSource, VolumeSpec},
    storage::{Usage, VolumeContent},
};
use karst_storage::{Contents, Filling, Format, NewVolume, PoolDriver, Reading, Snapshots, Source};
use rustix::{
    fs::OFlags,
    io::Errno,
    pipe::{PipeFlags, SpliceFlags, pipe_with, splice},
};
use std::{
    fs::File,
    os::{
        fd::OwnedFd,
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::Path,
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{OwnedMutexGuard, Semaphore},
};

/// A stream may take as long as the other end takes; its session ends it.
pub(crate) const STREAM: Limits = Limits {
    memory: 2 << 30,
    cpu_seconds: 86_400,
    file_size: 64 << 40,
    timeout: Duration::from_secs(86_400),
};
/// Devices are measured in blocks of their pools, of which none is larger as a rule.
const BLOCK: u64 = 64 << 20;
/// Volumes of one pool that are looked at at a time for their space, also those for which nobody waits any more.
const LOOKS: usize = 8;
/// What an import may hold: a volume may be larger than any image.
pub(crate) const BOUNDS: Bounds = Bounds { bytes: 64 << 40, entries: 1 << 32, ratio: 1 << 20 };

fn snapshots(pool: &dyn PoolDriver) -> Result<&dyn Snapshots> {
    pool.snapshots().ok_or_else(|| Error::unsupported("this pool has no snapshots"))
}

pub(crate) fn contents(pool: &dyn PoolDriver) -> Result<&dyn Contents> {
    pool.contents().ok_or_else(|| Error::unsupported("this pool cannot copy or stream volumes"))
}

pub(crate) fn open(path: &Path, write: bool) -> Result<OwnedFd> {
    let flags = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
    Ok(File::options().read(true).write(write).custom_flags(flags).open(path)?.into())
}

/// What a worker made, which is a file: a link or a pipe that it left in its place leads nowhere and holds nobody up.
pub(crate) fn made(path: &Path, write: bool) -> Result<File> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
    let file = File::options().read(true).write(write).custom_flags(flags).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(Error::internal("a worker made something else than a file", path.display())),
    }
}

fn check_format(content: VolumeContent, format: StreamFormat, export: bool) -> Result<()> {
    let fits = match format {
        StreamFormat::Tar => !content.is_disk(),
        StreamFormat::Raw | StreamFormat::Qcow2 => content.is_disk(),
        StreamFormat::Vmdk => content.is_disk() && !export,
    };
    if fits {
        return Ok(());
    }
    Err(Error::invalid("format", format!("a volume of content {} does not travel so", content.as_str())))
}

impl RealAgent {
    pub(crate) async fn remove_pool(&self, id: PoolId) -> Result<()> {
        let _lock = self.lock(id.0).await;
        let Some(spec) = self.registry.pool(id)? else { return Ok(()) };
        // One that was let go of is looked into first.
        let was_closed = self.registry.closed(id).is_some() && !self.has_pool(id);
        if was_closed {
            // What cannot be looked into is not removed: it may only be out of reach for now.
            self.open_pool(&spec, Purpose::Use).await?;
        }
        // One that could not be opened when the host started has nothing that anybody could use.
        if let Ok(pool) = self.pool(id) {
            if !pool.list().await?.is_empty() {
                drop(pool);
                if was_closed {
                    self.forget_pool(id);
                    self.pool_place(id).close(&spec).await?;
                }
                return Err(Error::conflict("the pool still has volumes"));
            }
            pool.settle().await;
        }
        if was_closed {
            // It was empty: a removal that is broken off goes on where nothing can be opened any more.
            let registry = self.registry.clone();
            blocking(move || registry.forget_closed(id)).await?;
        }
        self.forget_pool(id);
        self.pool_place(id).remove(&spec).await?;
        let registry = self.registry.clone();
        blocking(move || registry.remove_pool(id)).await
    }

    async fn lock_both(
        &self,
        a: VolumeId,
        b: VolumeId,
    ) -> (OwnedMutexGuard<()>, Option<OwnedMutexGuard<()>>) {
        let first = self.lock(a.min(b).0).await;
        (first, if a == b { None } else { Some(self.lock(a.max(b).0).await) })
    }

    /// Nothing that runs has the volume.
    pub(crate) async fn unused(&self, volume: VolumeId) -> Result<()> {
        match self.user(has_volume(volume)).await? {
            Some(user) => Err(Error::conflict(format!(
                "the volume is in use by instance {user}, which runs; stop it first"
            ))),
            None => Ok(()),
        }
    }

    /// The volume can be read whole: nothing runs from it, or what runs is paused, or the pool freezes it at one instant.
    pub(crate) async fn still(&self, pool: &dyn PoolDriver, volume: VolumeId) -> Result<()> {
        let Some(user) = self.user(has_volume(volume)).await? else { return Ok(()) };
        let (record, driver) = self.known(user)?;
        if record.kind == InstanceKind::Container || pool.snapshots().is_some_and(Snapshots::instant) {
            return Ok(());
        }
        match driver.observe(user).await?.state {
            // What an error halted may go on at any time, unless it is kept so, and then it is paused.
            RuntimeState::Paused | RuntimeState::Stopped => Ok(()),
            _ => Err(Error::conflict(format!(
                "the volume is in use by instance {user}, which runs; pause it first"
            ))),
        }
    }

    pub(crate) async fn create_volume(&self, spec: VolumeSpec) -> Result<()> {
        let other = match spec.source {
            VolumeSource::Copy { volume, .. } => volume,
            _ => spec.id,
        };
        let _locks = self.lock_both(spec.id, other).await;
        let pool = self.pool(spec.pool)?;
        self.reach_to_make(spec.pool, spec.id).await?;
        if spec.content == VolumeContent::Filesystem {
            self.demand_trees(spec.pool)?;
        }
        // What is there already was made of a source that may be gone by now.
        if let Ok(there) = pool.inspect(spec.id).await {
            if there.content != spec.content {
                return Err(Error::conflict(format!("volume {} is there already, and different", spec.id)));
            }
            return Ok(());
        }
        let (mut held, mut size, mut in_full) = (None, spec.size, false);
        let (mut image_held, mut container) = (None, None);
        let source = match spec.source {
            VolumeSource::Empty => Source::Empty,
            VolumeSource::Encrypted { .. } if spec.content != VolumeContent::Block => {
                return Err(Error::invalid("content", "only a disk can be encrypted"));
            }
            VolumeSource::Encrypted { encryption } => {
                container.insert(self.container(spec.id, encryption).await?).source()
            }
            VolumeSource::Image { image, full } => {
                in_full = full;
                let source = self.image_source(image).await?;
                image_held = Some(self.images.hold(image).await?);
                source
            }
            VolumeSource::Copy { pool: from, volume, snapshot, full } => {
                in_full = full;
                let (source, reading) =
                    self.source(VolumeRef { pool: from, volume }, snapshot, spec.pool, spec.content).await?;
                held = reading;
                // A device has more than was asked for when it was made, by less than a block of its pool. It goes along.
                if let Source::Disk { size: had, .. } = source
                    && self.pool(from)?.kind().has_names()
                {
                    let more = |size: ByteSize| had.checked_sub(size.bytes()).is_some_and(|n| n < BLOCK);
                    size = size.map(|size| if more(size) { ByteSize(had) } else { size });
                }
                source
            }
        };
        let new = NewVolume { content: spec.content, size, source: source.in_full(in_full) };
        pool.create(spec.id, &new).await?;
        drop((held, image_held, container));
        Ok(())
    }

    pub(crate) async fn image_source(&self, image: ImageId) -> Result<Source> {
        Ok(match self.images.content(image).await? {
            Content::Tree(path) => Source::Tree { path, image: Some(image) },
            Content::Disk { path, size } => {
                Source::Disk { path, format: Format::Qcow2, backing: None, size, image: Some(image) }
            }
        })
    }

    /// Another volume as the source of one in the pool `to`.
    async fn source(
        &self,
        from: VolumeRef,
        snapshot: Option<SnapshotId>,
        to: PoolId,
        content: VolumeContent,
    ) -> Result<(Source, Option<Reading>)> {
        let pool = self.pool(from.pool)?;
        let found = pool.inspect(from.volume).await?;
        if found.content != content {
            return Err(Error::invalid(
                "source",
                format!(
                    "the volume that is copied holds {}, not {}",
                    found.content.as_str(),
                    content.as_str()
                ),
            ));
        }
        if snapshot.is_none() {
            self.still(&*pool, from.volume).await?;
        }
        if from.pool == to {
            return Ok((Source::Volume { volume: from.volume, snapshot }, None));
        }
        let reading = contents(&*pool)?.read(from.volume, snapshot).await?;
        Ok((reading.source(), Some(reading)))
    }

    pub(crate) async fn delete_volume(&self, at: VolumeRef) -> Result<()> {
        let _lock = self.lock(at.volume.0).await;
        self.demand_open(at.pool)?;
        self.unused(at.volume).await?;
        match self.pool(at.pool) {
            Ok(pool) => {
                if self.was_never_made(at.volume) {
                    return Ok(());
                }
                self.reach(at.pool).await?;
                pool.delete(at.volume).await
            }
            Err(_) => Ok(()),
        }
    }

    /// Space of several volumes; see the protocol.
    pub(crate) async fn volume_usages(&self, all: Vec<VolumeRef>) -> Result<Vec<(VolumeId, Usage)>> {
        if all.len() > MAX_USAGES {
            return Err(Error::too_large(format!(
                "one call tells the space of at most {MAX_USAGES} volumes"
            )));
        }
        let ask = |at: VolumeRef| async move {
            let pool = self.pool(at.pool).ok()?;
            let room = {
                let mut all = self.looks.lock();
                all.entry(at.pool).or_insert_with(|| Arc::new(Semaphore::new(LOOKS))).clone()
            };
            let place = room.acquire_owned().await.ok()?;
            // The place is free when the look has ended, not when its caller has gone.
            let look = tokio::spawn(async move {
                let _place = place;
                pool.usage(at.volume).await
            });
            Some((at.volume, look.await.ok()?.ok()?))
        };
        Ok(crate::samples::within(&self.env, all, ask).await)
    }

    pub(crate) async fn resize_volume(&self, request: VolumeResize) -> Result<()> {
        let at = request.volume;
        let _lock = self.lock(at.volume.0).await;
        let pool = self.pool(at.pool)?;
        let now = pool.inspect(at.volume).await?;
        let there = now.size == Some(request.size);
        // What lies on a device may be behind it, after a kill: its file system, or what the guest was told.
        let devices = pool.kind().has_names();
        if !now.content.is_disk() {
            return match there && !devices {
                true => Ok(()),
                false => pool.resize(at.volume, request.size).await.map(drop),
            };
        }
        if !devices && now.size.is_some_and(|now| request.size < now) {
            return Err(Error::invalid("size", "a volume can only grow"));
        }
        let located = self.locate(at, None).await?;
        // A file that QEMU has open is QEMU's to grow; a block device grows first.
        let device = located.path.metadata().is_ok_and(|m| m.file_type().is_block_device());
        if there && !device {
            // That is written down when all that have it know it.
            return Ok(());
        }
        let mut size = request.size;
        if device {
            // It may have more than was asked for: whole blocks of its pool.
            size = pool.resize(at.volume, size).await?.size.unwrap_or(size);
        }
        // One that was broken off in between has grown and not told everybody.
        let held = self.grow_live(&located.path, size.bytes()).await?;
        match (device, held) {
            (true, _) => Ok(()),
            (false, true) => pool.grown(at.volume, size).await.map(drop),
            (false, false) => pool.resize(at.volume, size).await.map(drop),
        }
    }

    /// Grows a disk through the running virtual machines that have it; answers whether one has. Done again it does no harm to
    /// those that know already.
    async fn grow_live(&self, path: &Path, size: u64) -> Result<bool> {
        let mut held = false;
        for (id, record) in self.all_guests() {
            let Some(machine) = self.driver(record.kind)?.machine() else { continue };
            match machine.grow(id, path, size).await {
                Ok(()) => held = true,
                Err(e) if e.is(ErrorKind::NotFound) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(held)
    }

    pub(crate) async fn create_snapshot(&self, at: VolumeSnapshotRef) -> Result<()> {
        let _lock = self.lock(at.volume.0).await;
        let pool = self.pool(at.pool)?;
        let driver = snapshots(&*pool)?;
        let mut there = driver.list(at.volume).await?.iter().any(|(id, _)| *id == at.snapshot);
        if there && !driver.whole(at.volume, at.snapshot).await? {
            // Of a step that was done just before the power went, and is done again now.
            driver.delete(at.volume, at.snapshot).await?;
            there = false;
        }
        if !there {
            self.still(&*pool, at.volume).await?;
            driver.create(at.volume, at.snapshot).await?;
        }
        // A guest that runs may stand still for this: whoever made it so asks for the flush when it goes on again.
        match self.user(has_volume(at.volume)).await? {
            None => pool.flush().await,
            Some(_) => Ok(()),
        }
    }

    pub(crate) async fn delete_snapshot(&self, at: VolumeSnapshotRef) -> Result<()> {
        let _lock = self.lock(at.volume.0).await;
        self.demand_open(at.pool)?;
        match self.pool(at.pool) {
            Ok(pool) => snapshots(&*pool)?.delete(at.volume, at.snapshot).await,
            Err(_) => Ok(()),
        }
    }

    pub(crate) async fn restore_snapshot(&self, at: VolumeSnapshotRef) -> Result<()> {
        let _lock = self.lock(at.volume.0).await;
        let pool = self.pool(at.pool)?;
        self.unused(at.volume).await?;
        snapshots(&*pool)?.restore(at.volume, at.snapshot).await.map(drop)
    }

    pub(crate) async fn snapshots_of(&self, at: VolumeRef) -> Result<Vec<VolumeSnapshot>> {
        let pool = self.pool(at.pool)?;
        let all = snapshots(&*pool)?.list(at.volume).await?;
        Ok(all.into_iter().map(|(snapshot, info)| VolumeSnapshot { snapshot, size: info.size }).collect())
    }

    pub(crate) async fn refresh_volume(&self, request: VolumeRefresh) -> Result<()> {
        let VolumeRefresh { volume: at, from, snapshot, full } = request;
        let _locks = self.lock_both(at.volume, from.volume).await;
        let pool = self.pool(at.pool)?;
        let now = pool.inspect(at.volume).await?;
        self.unused(at.volume).await?;
        let (source, reading) = self.source(from, snapshot, at.pool, now.content).await?;
        contents(&*pool)?.replace(at.volume, &source.in_full(full)).await?;
        drop(reading);
        Ok(())
    }

    pub(crate) fn worker(&self) -> Sandbox {
        Sandbox::new(&self.launcher).limits(STREAM)
    }

    pub(crate) async fn export_volume(&self, request: VolumeExport) -> Result<WithFds<SessionId>> {
        let at = request.volume;
        let lock = self.lock(at.volume.0).await;
        let pool = self.pool(at.pool)?;
        let info = pool.inspect(at.volume).await?;
        check_format(info.content, request.format, true)?;
        if request.snapshot.is_none() {
            self.still(&*pool, at.volume).await?;
        }
        self.sessions.room()?;
        let reading = contents(&*pool)?.read(at.volume, request.snapshot).await?;
        let (source, sink): (OwnedFd, OwnedFd) =
            pipe_with(PipeFlags::CLOEXEC).map_err(std::io::Error::from)?;
        let located = &reading.located;
        let work: std::pin::Pin<Box<dyn Future<Output = Result<()>> + Send>> =
            match (request.format, located.format) {
                (StreamFormat::Tar, _) => {
                    let worker = tree(self.worker(), &reading).await?.stdout(sink);
                    Box::pin(async move {
                        let ended = worker.call("pack", serde_json::Value::Null).await?;
                        ended.ok("packing the volume").map(drop)
                    })
                }
                (StreamFormat::Raw, Format::Raw) => {
                    let disk = File::from(open(&located.path, false)?);
                    Box::pin(pour(disk, sink))
                }
                (format, _) => {
                    // Converting needs a file to write to, beside the staged parts of images; it loses its name at once.
                    let out = self.staging.work()?;
                    let from = if located.format == Format::Raw { "raw" } else { "qcow2" };
                    let to = if format == StreamFormat::Raw { "raw" } else { "qcow2" };
                    let mut worker = self
                        .worker()
                        .readable("disk.img", open(&located.path, false)?)
                        .writable("out", open(out.path(), false)?);
                    if let Some(base) = &located.backing {
                        worker = worker.readable("base.img", open(base, false)?);
                    }
                    Box::pin(async move {
                        let args = ["convert", "-U", "-f", from, "-O", to, "/disk.img", "/out/disk"];
                        let convert = |left| {
                            // A raw disk is mostly holes: of it only what it takes is bounded.
                            let file_size = if to == "qcow2" { left } else { STREAM.file_size };
                            worker.limits(Limits { file_size, ..STREAM }).exec(Program::QemuImg, &args)
                        };
                        converted(out.fill(convert).await?)?;
                        let disk = made(&out.path().join("disk"), false)?;
                        drop(out);
                        pour(disk, sink).await
                    })
                }
            };
        let session = self.sessions.transfer(async move {
            // Until its end nothing else happens to the volume.
            let _held = (lock, reading, pool);
            work.await
        });
        Ok(WithFds { value: session, fds: vec![source] })
    }

    pub(crate) async fn import_volume(
        &self,
        context: CallContext,
        request: VolumeImport,
    ) -> Result<WithFds<SessionId>> {
        let at = request.volume;
        let lock = self.lock(at.volume.0).await;
        let pool = self.pool(at.pool)?;
        let info = pool.inspect(at.volume).await?;
        check_format(info.content, request.format, false)?;
        self.unused(at.volume).await?;
        self.sessions.room()?;
        let filling = contents(&*pool)?.begin(at.volume).await?;
        let (source, sink): (OwnedFd, OwnedFd) =
            pipe_with(PipeFlags::CLOEXEC).map_err(std::io::Error::from)?;
        let launcher = self.launcher.clone();
        let worker = move || Sandbox::new(&launcher).limits(STREAM);
        let work = fill(worker, filling, source, request.format);
        let guard = self.guard.clone();
        let session = self.sessions.transfer(async move {
            let _held = (lock, pool);
            // It goes on after the call's answer, and must end as the call would when another executor takes over.
            guard.run(&context, work).await
        });
        Ok(WithFds { value: session, fds: vec![sink] })
    }
}

/// Shows a worker the tree that is read as `/tree`, with the owners of its disk.
pub(crate) async fn tree(worker: Sandbox, reading: &Reading) -> Result<Sandbox> {
    let Some(layers) = reading.located.layers.clone() else {
        return Ok(worker.readable("tree", open(&reading.located.path, false)?));
    };
    let ids = worker.ids();
    let mount = blocking(move || karst_host::overlay::mount(&layers, false, Some(ids))).await?;
    Ok(worker.mounted("tree", mount))
}

/// Puts a stream into a new content and makes it the volume's.
async fn fill(
    worker: impl Fn() -> Sandbox,
    filling: Box<dyn Filling>,
    source: OwnedFd,
    format: StreamFormat,
) -> Result<()> {
    let out = || open(filling.directory(), false);
    let first = worker().stdin(source).writable("out", out()?);
    if format == StreamFormat::Tar {
        let task = Task {
            part: Part::Root,
            bounds: BOUNDS,
            field: "volume".into(),
            within: None,
            beside: None,
            machine: None,
        };
        let ended = first.call("unpack", serde_json::to_value(task)?).await?;
        match (ended.code, serde_json::from_slice::<Answer>(&ended.stdout)) {
            (0, Ok(answer)) => karst_model::Result::<karst_image::unpack::Found>::from(answer)?,
            (125, _) => {
                return Err(Error::internal("the worker that unpacks could not be set up", said(&ended)));
            }
            _ => {
                return Err(Error::invalid(
                    "volume",
                    "the archive is corrupt or exceeds what a volume may be",
                )
                .with_context(said(&ended)));
            }
        };
        return filling.commit().await.map(drop);
    }
    let ended = first.call("store", serde_json::Value::Null).await?;
    match ended.code {
        0 => {}
        28 => return Err(Error::quota("no space left in the pool")),
        _ => return Err(Error::invalid("volume", "nothing usable came").with_context(said(&ended))),
    }
    let (upload, disk) = (filling.directory().join("upload"), filling.directory().join("disk.img"));
    if format == StreamFormat::Raw {
        std::fs::rename(upload, disk)?;
        return filling.commit().await.map(drop);
    }
    let name = if format == StreamFormat::Vmdk { "vmdk" } else { "qcow2" };
    if format == StreamFormat::Qcow2 {
        qcow2::check("volume", &made(&upload, false)?)?;
        // Converting reads what lies past the end as zeros; only the check tells a cut or damaged file. Its exit code 3
        // means lost clusters, which is harmless.
        let checking = worker().writable("out", out()?);
        let checked = checking.exec(Program::QemuImg, &["check", "-q", "-f", name, "/out/upload"]).await?;
        if checked.code != 3 {
            converted(checked)?;
        }
    }
    let args = ["convert", "-f", name, "-O", "raw", "/out/upload", "/out/disk.img"];
    converted(worker().writable("out", out()?).exec(Program::QemuImg, &args).await?)?;
    blocking(move || Ok(std::fs::remove_file(upload)?)).await?;
    filling.commit().await.map(drop)
}

pub(crate) fn said(ended: &Ended) -> String {
    format!("exit code {}: {}", ended.code, String::from_utf8_lossy(&ended.stderr).trim())
}

/// What `qemu-img` said of a disk.
pub(crate) fn converted(ended: Ended) -> Result<()> {
    let said = said(&ended);
    match ended.code {
        0 => Ok(()),
        125 => Err(Error::internal("the worker that reads disk images could not be set up", said)),
        _ if said.contains("No space left") => {
            Err(Error::quota("no space left in the pool").with_context(said))
        }
        // The signal of who writes more than it may (SIGXFSZ), or what it says where that does not end it.
        code if code == 153 || said.contains("File too large") => {
            let text = "no space left on the host for converting the disk, beyond what it keeps free";
            Err(Error::quota(text).with_context(said))
        }
        _ => Err(Error::invalid("volume", "the disk image is corrupt or cut off").with_context(said)),
    }
}

/// Bytes of a disk that one turn of [`pour`] moves at most, so that others have their turn with its thread.
const TURN: u64 = 16 << 20;

/// What ended a turn of [`pour`].
enum Turn {
    /// It was long enough.
    Over,
    /// The pipe is full.
    Full,
    /// So ends the disk.
    End,
}

/// Copies a disk into a pipe, in the kernel. A thread is at it only while there is room: the host's are few, all its other
/// work needs them, and whoever reads the pipe may be slow, or stop.
async fn pour(disk: File, sink: OwnedFd) -> Result<()> {
    rustix::io::ioctl_fionbio(&sink, true).map_err(std::io::Error::from)?;
    // SAFETY: an OwnedFd names the same open descriptor as long as it lives.
    let sink =
        unsafe { AsyncFd::register_with_interest(sink, Interest::WRITABLE) }.map_err(std::io::Error::from)?;
    let (disk, sink) = (Arc::new(disk), Arc::new(sink));
    let mut at = 0;
    loop {
        let mut room = sink.writable().await?;
        let (from, to) = (disk.clone(), sink.clone());
        let (reached, turn) = blocking(move || pour_some(&from, to.get_ref(), at)).await?;
        at = reached;
        match turn {
            Turn::Over => {}
            // Only what was known before: room that was made since then is not forgotten.
            Turn::Full => room.clear_ready(),
            Turn::End => return Ok(()),
        }
    }
}

/// One turn of [`pour`]: how far it came.
fn pour_some(disk: &File, sink: &OwnedFd, mut at: u64) -> Result<(u64, Turn)> {
    let until = at.saturating_add(TURN);
    while at < until {
        match splice(disk, Some(&mut at), sink, None, 1 << 20, SpliceFlags::NONBLOCK) {
            Ok(0) => return Ok((at, Turn::End)),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok((at, Turn::Full)),
            Err(Errno::PIPE) => return Err(Error::conflict("nobody reads the stream any more")),
            Err(e) => return Err(std::io::Error::from(e).into()),
        }
    }
    Ok((at, Turn::Over))
}

/// A session of its own: nobody's guest.
pub(crate) const NOBODY: InstanceId = InstanceId(uuid::Uuid::nil());

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use tokio::{io::AsyncReadExt, net::unix::pipe};

    const PATIENCE: Duration = Duration::from_secs(30);

    fn disk(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    #[test]
    fn a_worker_that_may_write_no_more_is_told_from_a_damaged_disk() {
        let kind = |code, stderr: &str| {
            let ended = Ended { code, stdout: vec![], stderr: stderr.as_bytes().to_vec() };
            converted(ended).map_err(|e| e.kind)
        };
        assert_eq!(kind(0, ""), Ok(()));
        for (code, stderr) in [(153, ""), (1, "qemu-img: File too large"), (1, "No space left on device")] {
            assert_eq!(kind(code, stderr), Err(ErrorKind::Quota), "{code} {stderr}");
        }
        assert_eq!(kind(1, "qemu-img: Invalid argument"), Err(ErrorKind::Invalid));
    }

    #[test]
    fn only_a_file_is_what_a_worker_made() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link, pipe) = (dir.path().join("disk"), dir.path().join("link"), dir.path().join("pipe"));
        std::fs::write(&file, "1234").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        made(&file, true).unwrap().set_len(2).unwrap();
        assert_eq!(made(&file, false).unwrap().metadata().unwrap().len(), 2);
        assert!(made(&link, false).is_err() && made(&link, true).is_err());
        assert!(made(&pipe, false).is_err(), "and nobody waits for who writes to it");
        assert!(made(dir.path(), false).is_err());
    }

    #[test]
    fn readers_that_do_not_read_hold_no_thread() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(1)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            // More than one turn.
            let content: Vec<u8> = (0..TURN + 300_001).map(|i| (i % 251) as u8).collect();
            let mut streams = vec![];
            for _ in 0..3 {
                let (source, sink) = pipe_with(PipeFlags::CLOEXEC).unwrap();
                streams.push((source, tokio::spawn(pour(disk(&content), sink))));
            }
            // All have begun, though none of them can go on.
            let end = std::time::Instant::now() + PATIENCE;
            while streams.iter().any(|(source, _)| rustix::io::ioctl_fionread(source).unwrap() == 0) {
                assert!(std::time::Instant::now() < end, "one waits for the thread of another");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            for _ in 0..20 {
                let other = tokio::time::timeout(PATIENCE, tokio::task::spawn_blocking(|| ())).await;
                other.expect("the thread that all share waits for a reader").unwrap();
            }
            // One leaves, the others read on.
            let (source, pouring) = streams.remove(0);
            drop(source);
            let left = tokio::time::timeout(PATIENCE, pouring).await.unwrap().unwrap().unwrap_err();
            assert!(left.is(ErrorKind::Conflict), "{left:?}");
            for (source, pouring) in streams {
                let mut all = vec![];
                let mut reader = pipe::Receiver::from_owned_fd(source).unwrap();
                tokio::time::timeout(PATIENCE, reader.read_to_end(&mut all)).await.unwrap().unwrap();
                assert!(all == content, "{} bytes", all.len());
                pouring.await.unwrap().unwrap();
            }
        });
    }
}
