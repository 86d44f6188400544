//! A file whose content becomes another only when all that comes has room: it is first written beside it into a file without a
//! name, which goes by itself when the agent ends, and takes its place by a rename when the stream has ended. That the stream
//! was cut off by its sender's death cannot be seen here, and nothing is synced before the rename. A file that has more than an
//! owner and permissions to lose by that (other names, attributes, a mount on it) is written over in place, once there is room.

use std::{
    fs::{File, Metadata, OpenOptions, Permissions},
    hash::{BuildHasher, Hasher},
    io::{self, Seek, SeekFrom},
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

/// Most links that a path may lead through.
const LINKS: usize = 40;

/// Owner and permissions that were asked for.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Wanted {
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mode: Option<u32>,
}

/// What is to come, beside the place where it is to be.
#[derive(Debug)]
pub(super) struct Beside {
    place: PathBuf,
    old: Option<File>,
    spool: File,
}

/// Where a path ends after all links; there may be nothing yet.
fn last(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..LINKS {
        match std::fs::read_link(&path) {
            Ok(target) => path = path.parent().unwrap_or(Path::new("/")).join(target),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => return Ok(path),
            Err(e) => return Err(e),
        }
    }
    Err(io::Error::from_raw_os_error(libc::ELOOP))
}

impl Beside {
    /// A nameless file beside what is at `path`, `old` if that is there; `None` where its file system makes no such files.
    pub(super) fn make(path: &Path, old: Option<File>) -> io::Result<Option<Self>> {
        let place = last(path)?;
        let Some(dir) = place.parent() else { return Ok(None) };
        let options =
            OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(dir);
        match options {
            Ok(spool) => Ok(Some(Self { place, old, spool })),
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::ENOENT)) => Err(e),
            Err(_) => Ok(None),
        }
    }

    /// Takes a part of what comes.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        io::Write::write_all(&mut self.spool, bytes)
    }

    /// Puts it in its place.
    pub(super) fn commit(mut self, wanted: Wanted) -> io::Result<()> {
        let Some(old) = self.old.take() else {
            own(&self.spool, wanted, None)?;
            return match self.link(&self.place) {
                // Made by somebody meanwhile: then it is replaced.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => self.swap(),
                other => other,
            };
        };
        let meta = old.metadata()?;
        let there = std::fs::symlink_metadata(&self.place);
        let same = there.is_ok_and(|m| (m.dev(), m.ino()) == (meta.dev(), meta.ino()));
        let plain =
            meta.nlink() == 1 && !rustix::fs::flistxattr(&old, &mut [0u8; 0]).is_ok_and(|size| size > 0);
        if same && plain && own(&self.spool, wanted, Some(&meta)).is_ok() && self.swap().is_ok() {
            return Ok(());
        }
        self.over(&old, meta.len())?;
        own(&old, wanted, Some(&meta))
    }

    fn link(&self, name: &Path) -> io::Result<()> {
        use rustix::fs::{AtFlags, CWD, linkat};
        let own = format!("/proc/self/fd/{}", self.spool.as_raw_fd());
        Ok(linkat(CWD, own, CWD, name, AtFlags::SYMLINK_FOLLOW)?)
    }

    fn swap(&self) -> io::Result<()> {
        let random = std::collections::hash_map::RandomState::new().build_hasher().finish();
        let name = self.place.with_file_name(format!(".karst-{random:016x}"));
        self.link(&name)?;
        let renamed = std::fs::rename(&name, &self.place);
        if renamed.is_err() {
            std::fs::remove_file(&name)?;
        }
        renamed
    }

    /// Writes it over what is there, when that has room.
    fn over(&mut self, old: &File, before: u64) -> io::Result<()> {
        use rustix::{
            fs::{FallocateFlags, fallocate},
            io::Errno,
        };
        let size = self.spool.metadata()?.len();
        if size > 0 {
            match fallocate(old, FallocateFlags::KEEP_SIZE, 0, size) {
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
                Err(e) => {
                    // What was got beyond its end goes back.
                    let _ = old.set_len(before);
                    return Err(e.into());
                }
            }
        }
        self.spool.seek(SeekFrom::Start(0))?;
        io::copy(&mut self.spool, &mut &*old)?;
        old.set_len(size)
    }
}

/// As asked, else as `old`, else root's and 0644.
fn own(file: &File, wanted: Wanted, old: Option<&Metadata>) -> io::Result<()> {
    let (uid, gid, mode) = old.map_or((0, 0, 0o644), |m| (m.uid(), m.gid(), m.mode()));
    let (uid, gid, mode) =
        (wanted.uid.unwrap_or(uid), wanted.gid.unwrap_or(gid), wanted.mode.unwrap_or(mode));
    let now = file.metadata()?;
    if (now.uid(), now.gid()) != (uid, gid) {
        std::os::unix::fs::fchown(file, Some(uid), Some(gid))?;
    }
    // At last: writing and another owner take the set-user-id bits away.
    file.set_permissions(Permissions::from_mode(mode & 0o7777))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn old(path: &Path) -> Option<File> {
        OpenOptions::new().write(true).open(path).ok()
    }

    fn begin(path: &Path, content: &str) -> Beside {
        let mut beside = Beside::make(path, old(path)).unwrap().expect("a nameless file");
        beside.write(content.as_bytes()).unwrap();
        beside
    }

    fn me() -> Wanted {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Wanted { uid: Some(uid), gid: Some(gid), mode: None }
    }

    #[test]
    fn all_of_it_or_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        let entries = || fs::read_dir(dir.path()).unwrap().count();
        drop(begin(&file, "broken off"));
        assert_eq!(entries(), 0);
        begin(&file, "one").commit(Wanted { mode: Some(0o4751), ..me() }).unwrap();
        drop(begin(&file, "broken off"));
        assert_eq!(fs::read_to_string(&file).unwrap(), "one");
        begin(&file, "2").commit(Wanted::default()).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "2");
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o4751, "as it was");
        assert_eq!(entries(), 1);
    }

    #[test]
    fn links_and_other_names_stay() {
        let dir = tempfile::tempdir().unwrap();
        let [file, link, other, dangling] = ["file", "link", "other", "dangling"].map(|n| dir.path().join(n));
        fs::write(&file, "a long one").unwrap();
        std::os::unix::fs::symlink("file", &link).unwrap();
        begin(&link, "two").commit(Wanted::default()).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&file).unwrap(), "two");
        fs::hard_link(&file, &other).unwrap();
        begin(&file, "3").commit(Wanted::default()).unwrap();
        assert_eq!(fs::read_to_string(&other).unwrap(), "3", "still one file");
        std::os::unix::fs::symlink("made", &dangling).unwrap();
        begin(&dangling, "new").commit(me()).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("made")).unwrap(), "new");
        std::os::unix::fs::symlink("round", dir.path().join("round")).unwrap();
        assert!(Beside::make(&dir.path().join("round"), None).is_err());
    }
}
