//! Contents that somebody else writes: made beside the volume's, and put in its place in one step.

use crate::{
    Filling, Format, VolumeInfo,
    files::{blocking, info},
    states::{Record, check_disk_size, set_mode},
    sweep::Work,
};
use async_trait::async_trait;
use karst_model::{ByteSize, Error, Result, VolumeId, storage::VolumeContent};
use std::{
    fs::{File, Metadata},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

/// Of what a worker was to make: a directory or a file, and no link that it left in its place and that would lead to something of
/// the host.
pub(crate) fn made(path: &Path, directory: bool) -> Result<Metadata> {
    let found = std::fs::symlink_metadata(path)?;
    match if directory { found.is_dir() } else { found.is_file() } {
        true => Ok(found),
        false => {
            let text = "what came is neither a disk nor a tree";
            Err(Error::invalid("volume", text).with_context(path.display()))
        }
    }
}

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
                made(&at.join("tree"), true)?;
                std::fs::rename(at.join("tree"), at.join("rootfs"))?;
                let format = Format::Directory;
                return Ok(Record { format, based: false, image: None, moved: None, chain: vec![], ..old });
            }
            made(&at.join("disk.img"), false)?;
            let flags = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
            let disk = File::options().write(true).custom_flags(flags).open(at.join("disk.img"))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_nothing_that_was_made() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, tree, link) =
            (dir.path().join("disk.img"), dir.path().join("tree"), dir.path().join("link"));
        std::fs::write(&disk, "1234").unwrap();
        std::fs::create_dir(&tree).unwrap();
        assert_eq!(made(&disk, false).unwrap().len(), 4);
        assert!(made(&tree, true).is_ok());
        for (to, directory) in [(&disk, false), (&tree, true)] {
            assert!(made(to, !directory).is_err());
            std::os::unix::fs::symlink(to, &link).unwrap();
            assert!(made(&link, directory).is_err());
            std::fs::remove_file(&link).unwrap();
        }
    }
}
