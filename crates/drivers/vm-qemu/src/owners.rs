//! Where the owners of the files in a volume are kept that machines share: with the files, as virtiofs does and containers do, or
//! beside them in attributes, as QEMU's 9p does for what a guest can write (`mapped-xattr`).
//!
//! Shared in the other way a volume would show its guests root's files of mode 0600, and links as files. So a mark at its root says
//! how machines began with it. One from before there were marks is looked through, as far as that is quick.

use karst_model::Result;
use rustix::{
    fs::{Mode, OFlags, XattrFlags, getxattr, lgetxattr, setxattr},
    io::Errno,
};
use std::{
    collections::VecDeque,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

/// Where QEMU keeps the owner that a guest gives a file.
const OWNER: &str = "user.virtfs.uid";
/// The mark. What begins so QEMU keeps from its guests.
const MARK: &str = "user.virtfs.karst";
/// Its words.
const BESIDE: &[u8] = b"beside";
const WITH: &[u8] = b"files";
/// Files and directories that are looked at in a volume without a mark.
const MOST: usize = 4096;
/// Directories that wait to be looked into, each open.
const WAITING: usize = 64;

fn place(directory: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", directory.as_raw_fd())
}

fn is_there(answer: std::result::Result<usize, Errno>) -> bool {
    matches!(answer, Ok(_) | Err(Errno::RANGE))
}

/// Can a file there have attributes of users? A file system in memory has none on older kernels.
pub(crate) fn can_be_beside(directory: &OwnedFd) -> bool {
    let mut value = [0u8; 64];
    !matches!(getxattr(place(directory).as_str(), OWNER, &mut value[..]), Err(Errno::OPNOTSUPP))
}

/// Has machines find out at once how they began with a volume: with owners beside its files, or not.
pub(crate) fn mark(volume: &OwnedFd, beside: bool) {
    if marked(volume) == Some(beside) {
        return;
    }
    let word = if beside { BESIDE } else { WITH };
    if let Err(e) = setxattr(place(volume).as_str(), MARK, word, XattrFlags::empty()) {
        // Nothing is lost by it: what machines write there says the same.
        tracing::debug!(error = %e, "a volume could not be marked with how machines share it");
    }
}

fn marked(volume: &OwnedFd) -> Option<bool> {
    let mut value = [0u8; 16];
    let length = getxattr(place(volume).as_str(), MARK, &mut value[..]).ok()?;
    match &value[..length] {
        word if word == BESIDE => Some(true),
        word if word == WITH => Some(false),
        _ => None,
    }
}

/// Are the owners of a volume's files kept beside them? Blocks.
///
/// # Errors
/// When it cannot be read.
pub(crate) fn are_beside(volume: &OwnedFd) -> Result<bool> {
    match marked(volume) {
        Some(beside) => Ok(beside),
        None => Ok(looked_through(volume, MOST)?),
    }
}

fn looked_through(volume: &OwnedFd, most: usize) -> std::io::Result<bool> {
    let mut value = [0u8; 64];
    if is_there(getxattr(place(volume).as_str(), OWNER, &mut value[..])) {
        return Ok(true);
    }
    let mut left = most;
    let mut waiting = VecDeque::from([volume.try_clone()?]);
    // What is above a name is a descriptor, and no link is followed: nothing leads out of the volume.
    while let Some(directory) = waiting.pop_front() {
        for entry in std::fs::read_dir(place(&directory))? {
            let entry = entry?;
            let path = entry.path();
            if is_there(lgetxattr(path.as_path(), OWNER, &mut value[..])) {
                return Ok(true);
            }
            left -= 1;
            if left == 0 {
                return Ok(false);
            }
            if waiting.len() < WAITING && entry.file_type()?.is_dir() {
                waiting.extend(into(&path));
            }
        }
    }
    Ok(false)
}

/// Opens a directory; none that is gone meanwhile, or is one no more.
fn into(path: &Path) -> Option<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(dir: &Path) -> OwnedFd {
        into(dir).unwrap()
    }

    #[test]
    fn a_volume_is_what_its_mark_says_or_what_is_found_in_it() {
        // Not in /tmp, which may be in memory and have no attributes.
        let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let at = volume(dir.path());
        if !can_be_beside(&at) {
            return crate::backends::missing("this file system keeps no attributes");
        }
        assert!(!are_beside(&at).unwrap());
        let deep = dir.path().join("a/b");
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::write(deep.join("file"), "x").unwrap();
        std::os::unix::fs::symlink("/proc/self", dir.path().join("out")).unwrap();
        assert!(!are_beside(&at).unwrap());
        setxattr(deep.join("file"), OWNER, &[1, 2, 0, 0], XattrFlags::empty()).unwrap();
        assert!(are_beside(&at).unwrap(), "a guest's file");
        // It is the fourth, whatever the order within a directory is: that is not for ever.
        assert!(!looked_through(&at, 3).unwrap() && looked_through(&at, 4).unwrap());
        mark(&at, false);
        assert!(!are_beside(&at).unwrap());
        mark(&at, true);
        mark(&at, true);
        std::fs::remove_file(deep.join("file")).unwrap();
        assert!(are_beside(&at).unwrap());
        // What it does not know is no mark.
        setxattr(dir.path(), MARK, b"else", XattrFlags::empty()).unwrap();
        assert!(!are_beside(&at).unwrap());
    }
}
