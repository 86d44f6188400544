//! Contents that somebody else writes: made beside the volume's, and put in its place in one step.

use crate::{
    Filling, Format, VolumeInfo,
    files::{blocking, info},
    states::{Record, check_disk_size, set_mode},
    sweep::Work,
};
use async_trait::async_trait;
use karst_model::{ByteSize, Result, VolumeId, storage::VolumeContent};
use std::{fs::File, path::Path};

pub(crate) struct FileFilling {
    pub work: Work,
    pub volume: VolumeId,
    pub old: Record,
}

#[async_trait]
impl Filling for FileFilling {
    fn directory(&self) -> &Path {
        self.work.path()
    }

    async fn commit(self: Box<Self>) -> Result<VolumeInfo> {
        let Self { work, volume, old } = *self;
        let at = work.path().to_owned();
        let record = blocking(move || {
            if !old.content.is_disk() {
                std::fs::rename(at.join("tree"), at.join("rootfs"))?;
                let format = Format::Directory;
                return Ok(Record { format, based: false, image: None, moved: None, chain: vec![], ..old });
            }
            let disk = File::options().write(true).open(at.join("disk.img"))?;
            let came = disk.metadata()?.len().next_multiple_of(512);
            // A disc is as large as what is on it; a disk keeps what it has beyond.
            let size = match old.content {
                VolumeContent::Iso => came,
                _ => came.max(old.size.map_or(0, |s| s.0)),
            };
            check_disk_size(size)?;
            disk.set_len(size)?;
            disk.sync_all()?;
            set_mode(&at.join("disk.img"), 0o600)?;
            Ok(Record { format: Format::Raw, based: false, size: Some(ByteSize(size)), chain: vec![], ..old })
        })
        .await?;
        let pool = work.pool.clone();
        pool.complete(work.path(), &record).await?;
        pool.exchange(work, volume, true).await?;
        Ok(info(volume, record))
    }
}
