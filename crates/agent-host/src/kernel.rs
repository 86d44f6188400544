//! The kernel that a machine is started with: its files are read once, at the start.
//!
//! Root reads them and interprets nothing of them. QEMU gets copies of its own: files of its user without a name, which go with
//! it. So a volume or a file of the host is nobody's any more as soon as the machine runs.

use crate::{
    RealAgent,
    agent::blocking,
    storage::{contents, open},
};
use karst_guest::{Opened, ResolvedGuest, ResolvedKernel};
use karst_model::{Error, Result, spec::DiskSource};
use karst_storage::Format;
use rustix::fs::{FileType, Gid, Uid, fchown};
use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

/// Most bytes of a kernel, and of an initrd.
const MOST: u64 = 512 << 20;
/// What a copy is called before it has no name.
const FRESH: &str = "boot.new";

/// Where a copy goes, and whose it is.
struct BootCopy {
    directory: PathBuf,
    user: u32,
    field: String,
}

impl BootCopy {
    fn demand(&self, bytes: u64) -> Result<()> {
        match bytes {
            0 => Err(Error::invalid(&self.field, "there is nothing in it to start")),
            1..=MOST => Ok(()),
            _ => {
                let text = format!("it has {bytes} bytes; a kernel and an initrd have {MOST} at most");
                Err(Error::invalid(&self.field, text))
            }
        }
    }

    /// A copy, open to be read, which goes when it is closed.
    fn take(&self, source: OwnedFd) -> Result<Opened> {
        let mut source = File::from(source);
        let bytes = source.seek(SeekFrom::End(0))?;
        self.demand(bytes)?;
        source.rewind()?;
        let path = self.directory.join(FRESH);
        // One of a start that a crash ended.
        remove(&path)?;
        let mut file = File::options().write(true).create_new(true).mode(0o400).open(&path)?;
        let written = (|| {
            if source.metadata()?.is_file() {
                file.set_len(bytes)?;
                karst_host::fs::put_sparse(&source, &file, 0)?;
            } else {
                std::io::copy(&mut Read::take(&mut source, MOST + 1), &mut file)?;
            }
            // It may have grown meanwhile.
            self.demand(file.metadata()?.len())?;
            let (uid, gid) = (Uid::from_raw(self.user), Gid::from_raw(self.user));
            fchown(&file, Some(uid), Some(gid)).map_err(std::io::Error::from)?;
            open(&path, false)
        })();
        remove(&path)?;
        Ok(Opened(Arc::new(written?)))
    }
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

impl RealAgent {
    /// Copies of the files that a machine is started with, for its user; nothing of one that boots from its disks.
    pub(crate) async fn kernel(&self, guest: &ResolvedGuest) -> Result<Option<ResolvedKernel>> {
        let Some(spec) = guest.machine.as_ref().and_then(|m| m.kernel.as_ref()) else { return Ok(None) };
        let copy = |key: &str| BootCopy {
            directory: guest.state_dir.clone(),
            user: guest.ids.base,
            field: format!("devices.{}.{key}", spec.name),
        };
        let kernel = self.boot_file(&spec.kernel, copy("source")).await?;
        let initrd = match &spec.initrd {
            Some(initrd) => Some(self.boot_file(initrd, copy("initrd")).await?),
            None => None,
        };
        Ok(Some(ResolvedKernel { kernel, initrd }))
    }

    async fn boot_file(&self, source: &DiskSource, copy: BootCopy) -> Result<Opened> {
        match source {
            DiskSource::Host { path } => {
                let found =
                    karst_host::mountns::open_beneath(&self.options.policy.path_prefixes, Path::new(path));
                let found = found.map_err(|e| e.at(&copy.field))?;
                let stat = rustix::fs::fstat(&found).map_err(std::io::Error::from)?;
                if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                    return Err(Error::invalid(&copy.field, format!("{path:?} is not a file")));
                }
                // What was found, whatever its name leads to by now.
                let file = File::open(format!("/proc/self/fd/{}", found.as_raw_fd()))?;
                blocking(move || copy.take(file.into())).await
            }
            DiskSource::Volume { pool, volume } => {
                let pool = self.pool(*pool)?;
                let info = pool.inspect(*volume).await?;
                if !info.content.is_disk() {
                    return Err(Error::invalid(
                        &copy.field,
                        "a kernel is on a disk or a disc, not in a file system",
                    ));
                }
                copy.demand(info.size.unwrap_or_default().bytes())?;
                // No lock: whoever writes to it puts a new content in its place, and what is open stays.
                let reading = contents(&*pool)?.read(*volume, None).await?;
                let room = match reading.located.format {
                    Format::Raw => None,
                    _ => {
                        let room = self.staging.work()?;
                        self.flat(&reading, room.path()).await?;
                        Some(room)
                    }
                };
                let path = room.as_ref().map(|r| r.path().join("disk.img"));
                let disk = open(path.as_deref().unwrap_or(&reading.located.path), false)?;
                let taken = blocking(move || copy.take(disk)).await;
                drop((room, reading));
                taken
            }
            DiskSource::Memory { .. } => Err(Error::invalid(&copy.field, "there is no kernel in memory")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_copy_is_whole_has_no_name_and_is_its_users() {
        let place = tempfile::tempdir().unwrap();
        let (from, directory) = (place.path().join("k"), place.path().join("guest"));
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(directory.join(FRESH), "of a crash").unwrap();
        let copy = BootCopy { directory: directory.clone(), user: 4242, field: "devices.boot.source".into() };
        let take = |bytes: &[u8]| {
            std::fs::write(&from, bytes).unwrap();
            copy.take(open(&from, false).unwrap())
        };
        let whole = [&[0; 1 << 16][..], b"kernel", &[0; 5]].concat();
        let opened = take(&whole).unwrap();
        // What happens to the volume afterwards does not reach it.
        std::fs::write(&from, "other").unwrap();
        let mut file = File::from(opened.0.try_clone().unwrap());
        let mut read = vec![];
        file.read_to_end(&mut read).unwrap();
        assert_eq!(read, whole);
        let meta = file.metadata().unwrap();
        assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o777, meta.nlink()), (4242, 4242, 0o400, 0));
        assert!(rustix::io::write(&file, b"x").is_err(), "it is read only");
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0);
        assert!(take(b"").unwrap_err().message.contains("nothing in it"));
        File::create(&from).unwrap().set_len(MOST + 1).unwrap();
        let e = copy.take(open(&from, false).unwrap()).unwrap_err();
        assert_eq!(e.field.as_deref(), Some("devices.boot.source"));
    }
}
