//! Disks byte by byte: opened to be read from any place, and written to in part.
//!
//! Neither lets control near a file that a guest has: reading holds the volume's lock as an export does, and writing makes a
//! new content beside the old one, which takes its place by one rename.

use crate::{
    RealAgent,
    agent::blocking,
    storage::{contents, converted, made, open},
};
use karst_agent::{VolumeRef, VolumeWrite, WithFds};
use karst_host::Program;
use karst_image::qcow2;
use karst_model::{Error, Result, SessionId, storage::VolumeContent};
use karst_storage::{Format, PoolDriver, Reading};
use std::{
    fs::File,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
    path::Path,
    time::Duration,
};

/// Longest that a disk may be held open: as long as a stream may take.
const HELD: Duration = Duration::from_secs(86_400);

fn demand_disk(content: VolumeContent) -> Result<()> {
    match content.is_disk() {
        true => Ok(()),
        false => Err(Error::invalid("volume", "a file system has no bytes to be read or written by place")),
    }
}

impl RealAgent {
    /// What a reading holds as `disk.img` in `directory`, raw, its holes as holes; by a worker that sees nothing else.
    pub(crate) async fn flat(&self, reading: &Reading, directory: &Path) -> Result<()> {
        let located = &reading.located;
        let from = if located.format == Format::Raw { "raw" } else { "qcow2" };
        let mut worker = self
            .worker()
            .readable("disk.img", open(&located.path, false)?)
            .writable("out", open(directory, false)?);
        if let Some(base) = &located.backing {
            worker = worker.readable("base.img", open(base, false)?);
        }
        let args = ["convert", "-U", "-f", from, "-O", "raw", "/disk.img", "/out/disk.img"];
        converted(worker.exec(Program::QemuImg, &args).await?)
    }

    pub(crate) async fn open_volume(&self, at: VolumeRef) -> Result<WithFds<SessionId>> {
        let lock = self.lock(at.volume.0).await;
        let pool = self.pool(at.pool)?;
        demand_disk(pool.inspect(at.volume).await?.content)?;
        self.still(&*pool, at.volume).await?;
        self.sessions.room()?;
        let reading = contents(&*pool)?.read(at.volume, None).await?;
        let (disk, room): (OwnedFd, _) = match reading.located.format {
            Format::Raw => (open(&reading.located.path, false)?, None),
            _ => {
                let room = self.staging.work()?;
                room.watched(self.flat(&reading, room.path())).await?;
                (OwnedFd::from(made(&room.path().join("disk.img"), false)?), Some(room))
            }
        };
        let env = self.env.clone();
        let session = self.sessions.transfer(async move {
            let _held = (lock, reading, pool, room);
            env.sleep(HELD).await;
            Err(Error::timeout("the volume was held open for a day"))
        });
        Ok(WithFds { value: session, fds: vec![disk] })
    }

    pub(crate) async fn write_volume(&self, request: VolumeWrite) -> Result<()> {
        let at = request.volume;
        let _lock = self.lock(at.volume.0).await;
        let pool = self.pool(at.pool)?;
        let info = pool.inspect(at.volume).await?;
        demand_disk(info.content)?;
        let staged = self.open_staged(request.staged)?;
        let (size, length) = (info.size.unwrap_or_default().bytes(), staged.metadata()?.len());
        if request.image {
            return self.write_image(&*pool, request, staged, size).await;
        }
        if request.offset.checked_add(length).is_none_or(|end| end > size) {
            let text = format!("what is written reaches beyond the end of the disk at {size} bytes");
            return Err(Error::invalid("length", text));
        }
        self.unused(at.volume).await?;
        let pool = contents(&*pool)?;
        let filling = pool.begin(at.volume).await?;
        let path = filling.directory().join("disk.img");
        if request.offset > 0 || length < size {
            let reading = pool.read(at.volume, None).await?;
            self.flat(&reading, filling.directory()).await?;
        }
        let offset = request.offset;
        blocking(move || {
            let flags = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
            let mut options = File::options();
            options.write(true).create(true).truncate(false).custom_flags(flags);
            let disk = options.open(path)?;
            disk.set_len(size)?;
            Ok(karst_host::fs::put_sparse(&staged, &disk, offset)?)
        })
        .await?;
        filling.commit().await.map(drop)
    }

    /// Makes a disk of `size` bytes what a staged image is, by workers that see nothing else.
    async fn write_image(
        &self,
        pool: &dyn PoolDriver,
        request: VolumeWrite,
        staged: File,
        size: u64,
    ) -> Result<()> {
        if request.offset > 0 {
            return Err(Error::invalid("offset", "an image is of a whole disk"));
        }
        let header = qcow2::check("volume", &staged)?;
        if header.size > size {
            let text = format!(
                "the image is of a disk of {} bytes, and the volume has {size}; let it grow first",
                header.size
            );
            return Err(Error::invalid("volume", text));
        }
        let at = request.volume;
        self.unused(at.volume).await?;
        let filling = contents(pool)?.begin(at.volume).await?;
        let image = || -> Result<OwnedFd> { Ok(staged.try_clone()?.into()) };
        // Converting reads what lies past the end as zeros; only the check tells a cut or damaged file. Its exit code 3 means lost
        // clusters, which is harmless.
        let checking = self.worker().readable("upload", image()?);
        let checked = checking.exec(Program::QemuImg, &["check", "-q", "-f", "qcow2", "/upload"]).await?;
        if checked.code != 3 {
            converted(checked)?;
        }
        let worker = self.worker().readable("upload", image()?);
        let worker = worker.writable("out", open(filling.directory(), false)?);
        let args = ["convert", "-f", "qcow2", "-O", "raw", "/upload", "/out/disk.img"];
        converted(worker.exec(Program::QemuImg, &args).await?)?;
        let path = filling.directory().join("disk.img");
        blocking(move || Ok(made(&path, true)?.set_len(size)?)).await?;
        filling.commit().await.map(drop)
    }
}
