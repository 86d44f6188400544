//! A file whose content becomes another only when all that comes has room.
//!
//! What comes is first written beside the old file, into one without a name, which goes by itself when this process ends. The
//! end of the stream is taken for the end of the content: who breaks off says so by leaving, but a caller that is killed is not
//! told from one that is done. Nor is anything synced before the rename, so that a power cut may leave an empty file. When
//! all of it is there, and has room, it takes the old one's place: by a rename, which nobody sees half of, with the old owner
//! and permissions. Where a new file would lose what the old one is beyond that (other names, attributes, a mount on it) its
//! content is written over in place, for which room was made first.

use super::{At, Failure, Outcome, Root};
use crate::sys;
use rustix::{
    fs::{
        AtFlags, FallocateFlags, Gid, Mode, OFlags, Stat, Uid, fallocate, fchmod, fchown, flistxattr, fstat,
        ftruncate, linkat, openat, readlinkat, renameat, statat, unlinkat,
    },
    io::Errno,
};
use std::{
    ffi::{OsStr, OsString},
    fs::File,
    hash::{BuildHasher, Hasher},
    io::{Seek, SeekFrom},
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
};

/// Most links that a path may lead through.
const LINKS: usize = 40;

/// Owner and permissions that a file is to have.
pub(super) struct Wanted {
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mode: Option<u32>,
}

impl Wanted {
    /// Of a file that is there, or would be: as asked, else as `old`, else root's and `default`.
    fn or(&self, old: Option<&Stat>, default: u32) -> (u32, u32, u32) {
        let old = old.map(|s| (s.st_uid, s.st_gid, s.st_mode & 0o7777)).unwrap_or((0, 0, default));
        (self.uid.unwrap_or(old.0), self.gid.unwrap_or(old.1), self.mode.unwrap_or(old.2))
    }
}

impl Root {
    /// Where a path ends after all links: the directory, and the name in it of what is no link, or nothing yet.
    fn last(&self, path: &OsStr) -> Outcome<(OwnedFd, OsString)> {
        let mut path = path.to_owned();
        for _ in 0..LINKS {
            let (dir, name) = self.parent(&path)?;
            match readlinkat(&dir, name.as_os_str(), vec![]) {
                Err(Errno::INVAL | Errno::NOENT) => return Ok((dir, name)),
                Err(e) => return Err(e).at("following a link"),
                Ok(target) if target.to_bytes().starts_with(b"/") => {
                    path = OsString::from_vec(target.into_bytes());
                }
                Ok(target) => {
                    let text = path.as_bytes();
                    let end = text.iter().rposition(|b| *b != b'/').map_or(0, |at| at + 1);
                    let at = text[..end].iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1);
                    path = OsString::from_vec([&text[..at], target.to_bytes()].concat());
                }
            }
        }
        Err(Failure::new("the path leads through too many links", libc::ELOOP))
    }
}

/// What is to come, beside the place where it is to be.
pub(super) struct Beside<'a> {
    root: &'a Root,
    dir: OwnedFd,
    name: OsString,
    old: Option<OwnedFd>,
    spool: File,
}

impl<'a> Beside<'a> {
    /// A nameless file beside what is at `path`, `old` if that is there. `None` where there can be none: its file system makes
    /// no such files (the kernel's own, say).
    pub(super) fn make(
        root: &'a Root,
        path: &OsStr,
        old: Option<OwnedFd>,
    ) -> Outcome<Result<Self, Option<OwnedFd>>> {
        let (dir, name) = match root.last(path) {
            Ok(place) => place,
            Err(_) if old.is_some() => return Ok(Err(old)),
            Err(e) => return Err(e),
        };
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        match openat(&dir, ".", flags, Mode::from_raw_mode(0o600)) {
            Ok(spool) => Ok(Ok(Self { root, dir, name, old, spool: spool.into() })),
            Err(e @ (Errno::NOSPC | Errno::DQUOT)) => Err(e).at("writing"),
            Err(_) => Ok(Err(old)),
        }
    }

    /// Takes what comes.
    pub(super) fn fill(&mut self, content: File) -> Outcome<()> {
        super::file::copy(content, &mut self.spool).at("writing")
    }

    /// Puts it in its place; not if whoever asked for it has left, who may have broken off in the middle.
    pub(super) fn commit(mut self, wanted: &Wanted, default: u32, launch: BorrowedFd) -> Outcome<()> {
        if sys::hung_up(launch) {
            return Err(Failure::new("the caller has left", libc::ECANCELED));
        }
        let Some(old) = self.old.take() else {
            self.own(wanted, None, default)?;
            return match self.link(&self.name.clone()) {
                // Made by somebody meanwhile: then it is replaced.
                Err(Errno::EXIST) => self.swap().at("writing"),
                other => other.at("writing"),
            };
        };
        let stat = fstat(&old).at("writing")?;
        let there = statat(&self.dir, self.name.as_os_str(), AtFlags::SYMLINK_NOFOLLOW);
        let same = there.is_ok_and(|s| (s.st_dev, s.st_ino) == (stat.st_dev, stat.st_ino));
        let plain = stat.st_nlink == 1 && !flistxattr(&old, &mut [0u8; 0]).is_ok_and(|size| size > 0);
        if same && plain && self.own(wanted, Some(&stat), default).is_ok() && self.swap().is_ok() {
            return Ok(());
        }
        self.over(&old)?;
        let (uid, gid, mode) = wanted.or(Some(&stat), default);
        chown_and_chmod(&old, uid, gid, mode)
    }

    fn own(&self, wanted: &Wanted, old: Option<&Stat>, default: u32) -> Outcome<()> {
        let (uid, gid, mode) = wanted.or(old, default);
        chown_and_chmod(&self.spool, uid, gid, mode)
    }

    /// Gives it a name: by the link that `/proc` has for each descriptor of this process, which the host's must be, for the
    /// container's does not know it.
    fn link(&self, name: &OsStr) -> rustix::io::Result<()> {
        let number = self.spool.as_raw_fd().to_string();
        let descriptors = self.root.descriptors.as_ref().ok_or(Errno::NOENT)?;
        linkat(descriptors, number, &self.dir, name, AtFlags::SYMLINK_FOLLOW)
    }

    /// Takes the place of what has the name.
    fn swap(&self) -> rustix::io::Result<()> {
        let random = std::collections::hash_map::RandomState::new().build_hasher().finish();
        let name = OsString::from(format!(".karst-{random:016x}"));
        self.link(&name)?;
        let renamed = renameat(&self.dir, name.as_os_str(), &self.dir, self.name.as_os_str());
        if renamed.is_err() {
            unlinkat(&self.dir, name.as_os_str(), AtFlags::empty())?;
        }
        renamed
    }

    /// Writes it over what is there, when that has room.
    fn over(&mut self, old: &OwnedFd) -> Outcome<()> {
        let (before, size) =
            (fstat(old).at("writing")?.st_size as u64, self.spool.metadata().at("writing")?.len());
        if size > 0 {
            match fallocate(old, FallocateFlags::KEEP_SIZE, 0, size) {
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
                Err(e) => {
                    // What was got beyond its end goes back.
                    let _ = ftruncate(old, before);
                    return Err(e).at("writing");
                }
            }
        }
        self.spool.seek(SeekFrom::Start(0)).at("writing")?;
        let from = self.spool.try_clone().at("writing")?;
        let mut to = File::from(old.try_clone().at("writing")?);
        super::file::copy(from, &mut to).at("writing")?;
        ftruncate(old, size).at("writing")
    }
}

fn chown_and_chmod(fd: &impl std::os::fd::AsFd, uid: u32, gid: u32, mode: u32) -> Outcome<()> {
    let now = fstat(fd).at("setting the owner")?;
    if (now.st_uid, now.st_gid) != (uid, gid) {
        fchown(fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).at("setting the owner")?;
    }
    // After the owner, whose change clears set-user-id.
    fchmod(fd, Mode::from_raw_mode(mode & 0o7777)).at("setting the permissions")
}
