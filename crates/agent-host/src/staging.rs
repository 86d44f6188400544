//! Parts of images that are being uploaded: `DIR/host/staging`, one file a part, which control writes through a descriptor.
//!
//! What may lie there is bounded: uploads at a time, bytes of each, bytes of all, time without a byte, age, and the space
//! that the file system keeps for others. Control stops at the size that it is told; one that does not is cut off here: a
//! part over a limit loses its name, is emptied again and again for as long as somebody may still write to it, and its
//! import fails with the limit's name. Nothing survives the agent's process: the other end was lost with it.
//!
//! Backups and disks that are uploaded lie there too. Of them the number is bounded, and the space that the file system keeps:
//! they are as large as what they were made of.

use karst_agent::{ImagePart, ImageStaged};
use karst_env::{EnvExt, Mutex, SharedEnv};
use karst_model::{BackupId, Error, ImageId, Result, size::ByteSize};
use serde::{Deserialize, Deserializer};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Weak,
    time::Duration,
};
use tokio::sync::Notify;

/// How often open uploads are looked at, and how often the directory is when there are none.
const LOOK: Duration = Duration::from_millis(250);
const IDLE_LOOK: Duration = Duration::from_secs(5);
/// How the names of uploaded backups end, and when they are dropped after they were last touched.
const BACKUP: &str = ".backup";
const BACKUP_KEPT: Duration = Duration::from_secs(3600);

/// Backups, and contents of volumes, that may lie here at a time.
const BACKUPS: usize = 64;

/// What uploads of images may take of this host: the table `uploads` of `host-policy.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UploadLimits {
    /// Images at a time.
    pub number: usize,
    /// Bytes of a part.
    #[serde(deserialize_with = "size")]
    pub size: ByteSize,
    /// Bytes of all parts together.
    #[serde(deserialize_with = "size")]
    pub total: ByteSize,
    /// Bytes that the file system keeps free for others.
    #[serde(deserialize_with = "size")]
    pub reserve: ByteSize,
    /// Minutes after which a part to which nothing is added is dropped.
    pub idle_minutes: u64,
    /// Hours after which a part is dropped in any case.
    pub age_hours: u64,
}

impl Default for UploadLimits {
    fn default() -> Self {
        Self {
            number: 16,
            size: ByteSize::gib(100),
            total: ByteSize::gib(200),
            reserve: ByteSize::mib(512),
            idle_minutes: 60,
            age_hours: 24,
        }
    }
}

pub(crate) fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ByteSize, D::Error> {
    let text = String::deserialize(deserializer)?;
    ByteSize::parse("size", &text).map_err(serde::de::Error::custom)
}

/// The table of open uploads.
pub(crate) struct Staging {
    env: SharedEnv,
    directory: PathBuf,
    limits: UploadLimits,
    parts: Mutex<BTreeMap<(ImageId, ImagePart), Part>>,
    /// Backups and disks, as long as they are there or were cut off lately.
    backups: Mutex<BTreeMap<BackupId, Uploaded>>,
    /// An upload has begun.
    begun: Notify,
    /// Directories in which volumes are converted.
    work: Mutex<BTreeSet<PathBuf>>,
    /// Who has it fills one of them.
    turn: tokio::sync::Mutex<()>,
}

struct Uploaded {
    file: File,
    /// It has come whole and is read.
    whole: bool,
    /// Why it was cut off, and when.
    over: Option<(Error, Duration)>,
}

struct Part {
    file: File,
    begun: Duration,
    size: u64,
    grown: Duration,
    /// Why it was cut off.
    over: Option<Error>,
}

fn name(image: ImageId, part: ImagePart) -> String {
    let part = match part {
        ImagePart::Unified => "unified",
        ImagePart::Metadata => "metadata",
        ImagePart::Rootfs => "rootfs",
        ImagePart::Disk => "disk",
    };
    format!("{}.{part}", image.0)
}

fn over(text: String) -> Error {
    Error::quota(format!("{text} (uploads in host-policy.toml)"))
}

impl Staging {
    /// Over `directory`, which is emptied.
    pub fn open(env: SharedEnv, directory: PathBuf, limits: UploadLimits) -> Result<Self> {
        for entry in std::fs::read_dir(&directory)? {
            let entry = entry?;
            match entry.file_type()?.is_dir() {
                true => std::fs::remove_dir_all(entry.path())?,
                false => std::fs::remove_file(entry.path())?,
            }
        }
        Ok(Self {
            env,
            directory,
            limits,
            parts: Mutex::default(),
            backups: Mutex::default(),
            begun: Notify::new(),
            work: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
        })
    }

    fn backup_path(&self, id: BackupId) -> PathBuf {
        self.directory.join(format!("{}{BACKUP}", id.0))
    }

    /// Opens the file of a backup or disk that is uploaded, emptied. Blocks.
    ///
    /// # Errors
    /// Quota, naming the limit.
    pub fn stage_backup(&self, id: BackupId) -> Result<File> {
        let mut backups = self.backups.lock();
        self.demand_backup()?;
        let path = self.backup_path(id);
        let mut options = File::options();
        let theirs = options.write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        let file = File::options().write(true).open(&path)?;
        backups.insert(id, Uploaded { file, whole: false, over: None });
        self.begun.notify_one();
        Ok(theirs)
    }

    /// Opens one that was uploaded, to read it: nothing is added to it any more.
    ///
    /// # Errors
    /// Not found; quota when it was cut off.
    pub fn read_backup(&self, id: BackupId) -> Result<File> {
        let mut backups = self.backups.lock();
        match backups.get_mut(&id) {
            Some(Uploaded { over: Some((e, _)), .. }) => return Err(e.clone()),
            Some(found) => found.whole = true,
            None => {}
        }
        match File::open(self.backup_path(id)) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                Err(Error::not_found("the uploaded backup is gone; send it again"))
            }
            other => Ok(other?),
        }
    }

    /// Drops one; fine when there is none. Blocks.
    pub fn drop_backup(&self, id: BackupId) -> Result<()> {
        let mut backups = self.backups.lock();
        remove(&self.backup_path(id))?;
        backups.remove(&id);
        Ok(())
    }

    fn path(&self, image: ImageId, part: ImagePart) -> PathBuf {
        self.directory.join(name(image, part))
    }

    /// Opens the file of a part, emptied. Blocks.
    ///
    /// # Errors
    /// Quota, naming the limit.
    pub fn stage(&self, image: ImageId, part: ImagePart) -> Result<(File, ImageStaged)> {
        let mut parts = self.parts.lock();
        let images: BTreeSet<ImageId> =
            parts.iter().filter(|(_, p)| p.over.is_none()).map(|((i, _), _)| *i).collect();
        if !images.contains(&image) && images.len() >= self.limits.number {
            return Err(over(format!(
                "this host takes no more than {} uploads of images at a time; wait until one has ended",
                self.limits.number
            )));
        }
        let others = parts.iter().filter(|(at, _)| **at != (image, part));
        let taken: u64 = others.map(|(_, p)| allocated(&p.file)).sum();
        let left = self.limits.total.bytes().saturating_sub(taken);
        if left == 0 {
            return Err(self.total_reached());
        }
        let Some(free) = self.free().checked_sub(self.limits.reserve.bytes()).filter(|f| *f > 0) else {
            return Err(self.disk_full());
        };
        let limit = self.limits.size.bytes().min(left).min(free);
        let path = self.path(image, part);
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        // Theirs is another open of it, to write only.
        let theirs = File::options().write(true).open(&path)?;
        let now = self.env.monotonic();
        parts.insert((image, part), Part { file, begun: now, size: 0, grown: now, over: None });
        self.begun.notify_one();
        Ok((theirs, ImageStaged { limit }))
    }

    /// May another backup, or the content of a volume, be uploaded? Blocks.
    ///
    /// # Errors
    /// Quota, naming the limit.
    fn demand_backup(&self) -> Result<()> {
        let mut number = 0;
        for entry in std::fs::read_dir(&self.directory)? {
            number += usize::from(entry?.file_name().to_string_lossy().ends_with(BACKUP));
        }
        if number >= BACKUPS {
            return Err(Error::quota(format!(
                "this host takes no more than {BACKUPS} uploads of backups and volumes at a time; wait until one has ended"
            )));
        }
        match self.free() > self.limits.reserve.bytes() {
            true => Ok(()),
            false => Err(self.disk_full()),
        }
    }

    /// Opens a part that was uploaded, to read it.
    ///
    /// # Errors
    /// Not found; quota when it was cut off.
    pub fn read(&self, image: ImageId, part: ImagePart) -> Result<File> {
        let parts = self.parts.lock();
        let missing = || Error::not_found(format!("no {part:?} part of the image was uploaded"));
        let found = parts.get(&(image, part)).ok_or_else(missing)?;
        match &found.over {
            Some(e) => Err(e.clone()),
            None => Ok(File::open(self.path(image, part))?),
        }
    }

    /// Drops what was uploaded of an image; fine when there is nothing.
    pub fn drop_image(&self, image: ImageId) -> Result<()> {
        let mut parts = self.parts.lock();
        for part in [ImagePart::Unified, ImagePart::Metadata, ImagePart::Rootfs, ImagePart::Disk] {
            remove(&self.path(image, part))?;
            parts.remove(&(image, part));
        }
        Ok(())
    }

    /// Images of which something is here.
    pub fn images(&self) -> Vec<ImageId> {
        let images: BTreeSet<ImageId> = self.parts.lock().keys().map(|(i, _)| *i).collect();
        images.into_iter().collect()
    }

    /// A new directory to convert a volume in; it is gone when the answer is dropped.
    ///
    /// # Errors
    /// Quota where nothing is left that it may take.
    pub fn work(self: &std::sync::Arc<Self>) -> Result<Scratch> {
        if self.free() <= self.limits.reserve.bytes() {
            return Err(self.disk_full());
        }
        let path = self.directory.join(format!("{}.work", self.env.uuid()));
        self.work.lock().insert(path.clone());
        let scratch = Scratch { staging: self.clone(), path };
        std::fs::create_dir(&scratch.path)?;
        Ok(scratch)
    }

    /// Names in the directory that nobody here accounts for.
    pub fn strays(&self) -> Result<Vec<String>> {
        let parts = self.parts.lock();
        let work = self.work.lock();
        let mut found = vec![];
        for entry in std::fs::read_dir(&self.directory)? {
            let path = entry?.path();
            let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            // Backups that are uploaded are not parts of images, and are swept by their age.
            if !file.ends_with(BACKUP)
                && !work.contains(&path)
                && !parts.keys().any(|(image, part)| name(*image, *part) == file)
            {
                found.push(format!("staged file {file} of no upload"));
            }
        }
        Ok(found)
    }

    fn free(&self) -> u64 {
        rustix::fs::statvfs(&self.directory).map_or(u64::MAX, |s| s.f_bavail.saturating_mul(s.f_frsize))
    }

    fn total_reached(&self) -> Error {
        over(format!("uploads of images on this host may take {} together, which they do", self.limits.total))
    }

    fn disk_full(&self) -> Error {
        over(format!(
            "the host's disk has no more than the {} free that uploads and conversions must leave",
            self.limits.reserve
        ))
    }

    /// Cuts off what is over a limit. Blocks. Answers whether any upload is open.
    fn look(&self) -> bool {
        let mut parts = self.parts.lock();
        // Read under the lock: a part is not younger than this.
        let now = self.env.monotonic();
        let (mut total, mut free) = (0, self.free());
        let mut by_age: Vec<_> = parts.iter_mut().collect();
        by_age.sort_by_key(|(_, p)| p.begun);
        for ((image, part), p) in by_age {
            if p.over.is_some() {
                // Whoever has it open may go on writing.
                let _ = p.file.set_len(0);
                continue;
            }
            let size = p.file.metadata().map_or(0, |m| m.size());
            if size != p.size {
                (p.size, p.grown) = (size, now);
            }
            total += allocated(&p.file);
            let (idle, age) = (self.limits.idle_minutes, self.limits.age_hours);
            let fault = if size > self.limits.size.bytes() {
                over(format!("a part of an image may have {} on this host", self.limits.size))
            } else if total > self.limits.total.bytes() {
                self.total_reached()
            } else if free < self.limits.reserve.bytes() {
                self.disk_full()
            } else if now.saturating_sub(p.grown) > Duration::from_secs(idle * 60) {
                over(format!("nothing was added to the upload for {idle} minutes"))
            } else if now.saturating_sub(p.begun) > Duration::from_secs(age * 3600) {
                over(format!("the upload was not finished within {age} hours"))
            } else {
                continue;
            };
            tracing::warn!(%image, ?part, size, error = %fault, "an upload was cut off");
            let mine = allocated(&p.file);
            (total, free) = (total - mine, free.saturating_add(mine));
            let emptied = p.file.set_len(0).and_then(|()| remove(&self.path(*image, *part)));
            if let Err(e) = emptied {
                tracing::warn!(%image, error = %e, "a part that was cut off could not be emptied; trying again");
            }
            p.over = Some(fault);
            p.grown = now;
        }
        let kept = Duration::from_secs(3600 * self.limits.age_hours.max(1));
        parts.retain(|_, p| p.over.is_none() || now.saturating_sub(p.grown) < kept);
        let any = !parts.is_empty();
        drop(parts);
        self.look_at_backups(free) || any
    }

    /// The same of backups and disks; `free` is what the file system has.
    fn look_at_backups(&self, mut free: u64) -> bool {
        let mut backups = self.backups.lock();
        let now = self.env.monotonic();
        let mut by_size: Vec<_> = backups.iter_mut().filter(|(_, b)| !b.whole).collect();
        by_size.sort_by_key(|(_, b)| std::cmp::Reverse(allocated(&b.file)));
        for (id, backup) in by_size {
            if backup.over.is_some() {
                // As above.
                let _ = backup.file.set_len(0);
            } else if free < self.limits.reserve.bytes() {
                let fault = self.disk_full();
                tracing::warn!(upload = %id, error = %fault, "an upload was cut off");
                free = free.saturating_add(allocated(&backup.file));
                let emptied = backup.file.set_len(0).and_then(|()| remove(&self.backup_path(*id)));
                if let Err(e) = emptied {
                    tracing::warn!(upload = %id, error = %e, "an upload that was cut off could not be emptied; trying again");
                }
                backup.over = Some((fault, now));
            }
        }
        backups.retain(|id, b| match &b.over {
            Some((_, at)) => now.saturating_sub(*at) < BACKUP_KEPT,
            None => self.backup_path(*id).exists(),
        });
        backups.values().any(|b| !b.whole)
    }

    /// Drops uploaded backups that nobody has touched for long. Blocks.
    fn sweep_backups(&self) -> Result<()> {
        for entry in std::fs::read_dir(&self.directory)?.flatten() {
            let modified = entry.metadata().and_then(|m| m.modified()).ok();
            let age = modified.and_then(|m| std::time::SystemTime::now().duration_since(m).ok());
            if entry.file_name().to_string_lossy().ends_with(BACKUP) && age.is_some_and(|a| a >= BACKUP_KEPT)
            {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Looks for ever.
    pub async fn watch(this: Weak<Self>, env: SharedEnv) {
        loop {
            let Some(staging) = this.upgrade() else { return };
            let work = move || {
                if let Err(e) = staging.sweep_backups() {
                    tracing::warn!(error = %e, "uploaded backups could not be swept");
                }
                staging.look()
            };
            let any = tokio::task::spawn_blocking(work).await.unwrap_or(true);
            let Some(staging) = this.upgrade() else { return };
            match any {
                true => env.sleep(LOOK).await,
                false => {
                    // One that begins is not left alone for so long.
                    let _ = env.timeout(IDLE_LOOK, staging.begun.notified()).await;
                }
            }
        }
    }
}

fn allocated(file: &File) -> u64 {
    file.metadata().map_or(0, |m| m.blocks() * 512)
}

fn remove(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// A directory that goes with its holder.
pub(crate) struct Scratch {
    staging: std::sync::Arc<Staging>,
    path: PathBuf,
}

impl Scratch {
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Does what fills it, one such work of the host at a time: it is told how many bytes it may write, and is broken off where less
    /// is free than the file system keeps for others. What is there when it has ended counts as taken, so the next one finds less.
    ///
    /// # Errors
    /// Quota where nothing is left; those of the work.
    pub async fn fill<T, F: Future<Output = Result<T>>>(&self, work: impl FnOnce(u64) -> F) -> Result<T> {
        let _turn = self.staging.turn.lock().await;
        let left = self.staging.free().saturating_sub(self.staging.limits.reserve.bytes());
        match left {
            0 => Err(self.staging.disk_full()),
            _ => self.watched(work(left)).await,
        }
    }

    /// Does what fills it, and breaks that off where less is free than the file system keeps for others.
    ///
    /// # Errors
    /// Quota; those of the work.
    pub async fn watched<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                () = self.staging.env.sleep(LOOK) => {}
            }
            if self.staging.free() < self.staging.limits.reserve.bytes() {
                return Err(self.staging.disk_full());
            }
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), error = %e, "a directory of converted volumes stays until the next start");
        }
        self.staging.work.lock().remove(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_env::RealEnv;
    use karst_model::ErrorKind;
    use std::io::Write;

    fn image(n: u128) -> ImageId {
        ImageId(uuid::Uuid::from_u128(n))
    }

    fn staging(limits: UploadLimits) -> (tempfile::TempDir, std::sync::Arc<Staging>) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("left by a crash"), "x").unwrap();
        std::fs::create_dir(dir.path().join("left.work")).unwrap();
        let staging = Staging::open(RealEnv::shared(), dir.path().to_owned(), limits).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "a crash leaves nothing");
        (dir, std::sync::Arc::new(staging))
    }

    fn small() -> UploadLimits {
        UploadLimits { reserve: ByteSize(0), ..Default::default() }
    }

    #[tokio::test]
    async fn what_fills_the_directory_is_broken_off_where_the_disk_is_full() {
        let (_dir, s) = staging(small());
        let room = s.work().unwrap();
        let left = room.fill(|left| async move { Ok(left) }).await.unwrap();
        assert!(left > 0 && left < u64::MAX, "{left}");
        // One works and is in no hurry: the next one waits for it.
        let turn = s.turn.lock().await;
        let waits = room.fill(|_| async { Ok(()) });
        assert!(tokio::time::timeout(Duration::from_millis(50), waits).await.is_err());
        drop(turn);
        let e = room.fill(|_| async { Err::<(), _>(Error::conflict("its own")) }).await.unwrap_err();
        assert!(e.is(ErrorKind::Conflict), "{e}");

        let (_dir, mut full) = staging(small());
        let limits = UploadLimits { reserve: ByteSize(u64::MAX), ..Default::default() };
        std::sync::Arc::get_mut(&mut full).unwrap().limits = limits;
        let room = Scratch { staging: full.clone(), path: full.directory.join("x.work") };
        std::fs::create_dir(&room.path).unwrap();
        let never = std::future::pending::<Result<()>>();
        assert!(room.watched(never).await.unwrap_err().is(ErrorKind::Quota));
        assert!(room.fill(|_| async { Ok(()) }).await.unwrap_err().is(ErrorKind::Quota));
    }

    #[test]
    fn uploads_of_backups_are_bounded_in_number_and_by_the_space_that_is_kept() {
        let (dir, s) = staging(small());
        s.demand_backup().unwrap();
        for n in 0..BACKUPS {
            std::fs::write(dir.path().join(format!("{n}.backup")), "").unwrap();
        }
        assert!(s.demand_backup().unwrap_err().message.contains("64 uploads"));
        let (_dir, s) = staging(UploadLimits { reserve: ByteSize(u64::MAX), ..UploadLimits::default() });
        assert!(s.demand_backup().unwrap_err().message.contains("free"));
    }

    #[test]
    fn uploads_are_bounded_in_number_and_forgotten_when_dropped() {
        let (_dir, s) = staging(UploadLimits { number: 2, ..small() });
        s.stage(image(1), ImagePart::Metadata).unwrap();
        s.stage(image(2), ImagePart::Metadata).unwrap();
        s.stage(image(1), ImagePart::Rootfs).expect("a second part of one that is there");
        let refused = s.stage(image(3), ImagePart::Unified).unwrap_err();
        assert!(
            refused.is(karst_model::ErrorKind::Quota) && refused.message.contains("2 uploads"),
            "{refused}"
        );
        assert_eq!(s.images(), [image(1), image(2)]);
        s.drop_image(image(1)).unwrap();
        s.drop_image(image(1)).expect("twice is once");
        s.stage(image(3), ImagePart::Unified).unwrap();
        assert!(s.read(image(1), ImagePart::Rootfs).unwrap_err().is(karst_model::ErrorKind::NotFound));
        assert_eq!(s.strays().unwrap(), Vec::<String>::new(), "uploads that go on are no leaks");
        let work = s.work().unwrap();
        std::fs::write(s.directory.join("alien"), "").unwrap();
        assert_eq!(s.strays().unwrap(), ["staged file alien of no upload"]);
        let path = work.path().to_owned();
        drop(work);
        assert!(!path.exists());
    }

    #[test]
    fn an_upload_that_begins_while_others_are_looked_at_is_no_fault() {
        let (_dir, s) = staging(small());
        std::thread::scope(|threads| {
            threads.spawn(|| {
                for _ in 0..2000 {
                    s.look();
                }
            });
            for _ in 0..500 {
                s.stage(image(1), ImagePart::Unified).unwrap();
                s.drop_image(image(1)).unwrap();
            }
        });
        assert!(!s.look());
    }

    /// A hostile control process writes on, whatever it was told.
    #[test]
    fn what_is_too_large_is_emptied_for_as_long_as_somebody_writes() {
        let limits = UploadLimits { size: ByteSize(1 << 20), total: ByteSize(3 << 19), ..small() };
        let (_dir, s) = staging(limits);
        let (mut a, told) = s.stage(image(1), ImagePart::Unified).unwrap();
        assert_eq!(told.limit, 1 << 20);
        a.write_all(&vec![1; 1 << 20]).unwrap();
        assert!(s.look());
        s.read(image(1), ImagePart::Unified).expect("at the limit is within it");
        let (mut b, told) = s.stage(image(2), ImagePart::Unified).unwrap();
        assert_eq!(told.limit, 1 << 19, "what is left of the total");
        b.write_all(&vec![1; (1 << 19) + 4096]).unwrap();
        s.look();
        let refused = s.read(image(2), ImagePart::Unified).unwrap_err();
        assert!(refused.message.contains("may take 1536KiB together"), "{refused}");
        s.read(image(1), ImagePart::Unified).expect("the older one stays");
        a.write_all(b"x").unwrap();
        s.look();
        let refused = s.read(image(1), ImagePart::Unified).unwrap_err();
        assert!(refused.message.contains("may have 1MiB"), "{refused}");
        for _ in 0..3 {
            a.write_all(&vec![1; 1 << 20]).unwrap();
            s.look();
            assert_eq!(allocated(&a), 0, "no bytes stay");
        }
        assert_eq!(s.strays().unwrap(), Vec::<String>::new());
    }

    #[test]
    fn an_old_or_idle_upload_is_dropped_and_a_full_disk_told() {
        for (limits, words) in [
            (UploadLimits { idle_minutes: 0, ..small() }, "nothing was added"),
            (UploadLimits { age_hours: 0, ..small() }, "not finished within 0 hours"),
        ] {
            let (_dir, s) = staging(limits);
            s.stage(image(1), ImagePart::Unified).unwrap();
            s.look();
            let refused = s.read(image(1), ImagePart::Unified).unwrap_err();
            assert!(refused.message.contains(words), "{refused}");
        }
        let (_dir, s) = staging(UploadLimits { reserve: ByteSize(u64::MAX >> 1), ..small() });
        let refused = s.stage(image(1), ImagePart::Unified).unwrap_err();
        assert!(refused.message.contains("must leave"), "{refused}");
    }

    #[test]
    fn an_uploaded_backup_leaves_the_reserve() {
        let id = |n: u128| BackupId(uuid::Uuid::from_u128(n));
        let (_dir, s) = staging(small());
        let (mut a, mut b) = (s.stage_backup(id(1)).unwrap(), s.stage_backup(id(2)).unwrap());
        a.write_all(&[1; 4096]).unwrap();
        b.write_all(&vec![2; 1 << 20]).unwrap();
        assert!(s.look(), "they are looked at");
        s.read_backup(id(1)).expect("there was room");
        let full = Staging { limits: UploadLimits { reserve: ByteSize(1), ..small() }, ..unshared(s) };
        assert!(full.look_at_backups(0), "it may be written to");
        let refused = full.read_backup(id(2)).unwrap_err();
        assert!(
            refused.is(karst_model::ErrorKind::Quota) && refused.message.contains("must leave"),
            "{refused}"
        );
        full.read_backup(id(1)).expect("what is read has come whole");
        b.write_all(&vec![2; 1 << 20]).unwrap();
        full.look_at_backups(0);
        assert_eq!(allocated(&b), 0, "no bytes stay");
        full.drop_backup(id(1)).unwrap();
        full.drop_backup(id(1)).expect("twice is once");
        assert!(full.read_backup(id(1)).unwrap_err().is(karst_model::ErrorKind::NotFound));
        assert_eq!(full.strays().unwrap(), Vec::<String>::new());
        let (_dir, s) = staging(UploadLimits { reserve: ByteSize(u64::MAX >> 1), ..small() });
        for refused in [s.stage_backup(id(3)).map(drop), s.work().map(drop)] {
            assert!(refused.unwrap_err().message.contains("must leave"));
        }
    }

    fn unshared(s: std::sync::Arc<Staging>) -> Staging {
        std::sync::Arc::into_inner(s).unwrap()
    }

    #[test]
    fn the_table_is_read_as_written() {
        let policy: crate::HostPolicy = toml::from_str("[uploads]\nnumber = 3\nsize = \"2GiB\"\n").unwrap();
        assert_eq!(policy.uploads, UploadLimits { number: 3, size: ByteSize::gib(2), ..Default::default() });
        assert!(toml::from_str::<crate::HostPolicy>("[uploads]\nsize = \"2 horses\"\n").is_err());
        assert!(toml::from_str::<crate::HostPolicy>("[uploads]\nsise = \"2GiB\"\n").is_err());
    }
}
