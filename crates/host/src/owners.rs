//! Owners of the files of a tree, moved from one range of ids to another: for file systems that cannot be mounted with other owners.
//!
//! Each entry is changed by itself, and one that has been is not again: the ranges lie apart. So what was interrupted is done again, in
//! the same direction or back. Nothing may have the tree in use.

use crate::fs::{join, open_below};
use karst_model::{Error, Result};
use rustix::{
    fs::{AtFlags, Dir, FileType, Gid, Mode, Stat, Uid, XattrFlags, chmodat, chownat, fstat, statat},
    io::Errno,
};
use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

/// What a change of owner takes away beside set-user-id.
const CAPABILITIES: &str = "security.capability";

/// From where to where: `count` ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shift {
    /// First id of those that are there.
    pub from: u32,
    /// What it becomes.
    pub to: u32,
    /// How many there are.
    pub count: u32,
}

impl Shift {
    fn of(self, id: u32) -> u32 {
        match id.checked_sub(self.from) {
            Some(inside) if inside < self.count => self.to.saturating_add(inside),
            _ => id,
        }
    }

    /// A range does not begin in what it comes from: an entry would be moved twice.
    fn check(self) -> Result<()> {
        let (low, high) = (self.from.min(self.to), self.from.max(self.to));
        if high - low >= self.count {
            return Ok(());
        }
        Err(Error::internal("owners of files cannot be moved", format!("{self:?} overlaps")))
    }
}

/// Moves the owners of a tree, its root included; answers how many entries have another now. Links are not followed. Blocking.
///
/// # Errors
/// A directory cannot be read, or an owner not be changed: what was changed until then stays so.
pub fn shift(root: &Path, by: Shift) -> Result<u64> {
    by.check()?;
    let root = crate::fs::open_dir(root)?;
    let mut changed = 0;
    let mut waiting = vec![Vec::new()];
    while let Some(path) = waiting.pop() {
        let directory = open_below(&root, &path)?;
        for entry in Dir::read_from(&directory).map_err(io::Error::from)? {
            let entry = entry.map_err(io::Error::from)?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let stat = statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW).map_err(io::Error::from)?;
            let kind = FileType::from_raw_mode(stat.st_mode);
            let moved = move_one(&directory, name, &stat, by);
            changed +=
                u64::from(moved.map_err(|e| Error::from(e).with_context(format!("the owner of {name:?}")))?);
            if kind == FileType::Directory {
                waiting.push(join(&path, name));
            }
        }
    }
    let stat = fstat(&root).map_err(io::Error::from)?;
    let (uid, gid) = (by.of(stat.st_uid), by.of(stat.st_gid));
    if (uid, gid) != (stat.st_uid, stat.st_gid) {
        rustix::fs::fchown(&root, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .map_err(io::Error::from)?;
        changed += 1;
    }
    Ok(changed)
}

fn move_one(directory: &OwnedFd, name: &std::ffi::CStr, stat: &Stat, by: Shift) -> io::Result<bool> {
    let (uid, gid) = (by.of(stat.st_uid), by.of(stat.st_gid));
    if (uid, gid) == (stat.st_uid, stat.st_gid) {
        return Ok(false);
    }
    let file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    let path = format!("/proc/self/fd/{}/", directory.as_raw_fd()).into_bytes();
    let path = [path.as_slice(), name.to_bytes()].concat();
    let mut value = [0u8; 64];
    let capabilities = match rustix::fs::lgetxattr(path.as_slice(), CAPABILITIES, &mut value) {
        Ok(n) if file => Some(n),
        Ok(_) | Err(Errno::NODATA | Errno::OPNOTSUPP) => None,
        Err(e) => return Err(e.into()),
    };
    let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    chownat(directory, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
    if stat.st_mode & 0o6000 != 0 && file {
        chmodat(directory, name, Mode::from_raw_mode(stat.st_mode & 0o7777), AtFlags::empty())?;
    }
    if let Some(n) = capabilities {
        rustix::fs::lsetxattr(path.as_slice(), CAPABILITIES, &value[..n], XattrFlags::empty())?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};

    #[test]
    fn owners_move_there_and_back_and_what_was_begun_is_ended() {
        if !crate::backends::root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("tree");
        std::fs::create_dir_all(root.join("home/user")).unwrap();
        let outside = dir.path().join("outside");
        for (file, id, mode) in
            [("home/user/file", 1000, 0o640), ("su", 0, 0o4755), ("foreign", 70_000, 0o600)]
        {
            std::fs::write(root.join(file), file).unwrap();
            chown(root.join(file), Some(id), Some(id)).unwrap();
            std::fs::set_permissions(root.join(file), PermissionsExt::from_mode(mode)).unwrap();
        }
        std::fs::write(&outside, "").unwrap();
        symlink(&outside, root.join("link")).unwrap();
        std::fs::hard_link(root.join("su"), root.join("home/su")).unwrap();
        let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let carries =
            rustix::fs::setxattr(root.join("su"), CAPABILITIES, &capability, XattrFlags::empty()).is_ok();
        let owner = |name: &str| std::fs::symlink_metadata(root.join(name)).unwrap().uid();
        let there = Shift { from: 0, to: 1_900_300_000, count: 65_536 };
        let back = Shift { from: there.to, to: 0, count: there.count };
        assert!(shift(&root, there).unwrap() >= 6);
        assert_eq!(shift(&root, there).unwrap(), 0, "twice is once");
        let found = ["", "home/user/file", "su", "home/su", "link", "foreign"].map(owner);
        assert_eq!(found, [there.to, there.to + 1000, there.to, there.to, there.to, 70_000]);
        assert_eq!(std::fs::metadata(&outside).unwrap().uid(), 0, "no link is followed");
        assert_eq!(std::fs::metadata(root.join("su")).unwrap().mode() & 0o7777, 0o4755);
        let mut value = [0u8; 64];
        let kept = rustix::fs::getxattr(root.join("su"), CAPABILITIES, &mut value).is_ok();
        assert_eq!(kept, carries);
        // One that was killed in the midst: some are there, some are not.
        chown(root.join("home/user/file"), Some(1000), Some(1000)).unwrap();
        shift(&root, back).unwrap();
        assert_eq!(["", "home/user/file", "su", "link"].map(owner), [0, 1000, 0, 0]);
        assert!(shift(&root, Shift { to: 100, ..there }).is_err(), "ranges lie apart");
    }
}
