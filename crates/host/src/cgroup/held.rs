//! Files of a control group that are read again and again. They are held open: a look at one is a single call that walks
//! no path and makes nothing in the kernel. Each reading from the beginning tells anew (kernel, `seq_file`), and of a group
//! that is gone nothing (`ENODEV`), also when another of its name has come.
//!
//! What is held of a file costs the kernel about 4.5 KiB, and a descriptor: only what is asked for is held, from its first
//! reading on, and of all groups together so many at most. What is not held is opened for each reading.

use rustix::{
    buffer::spare_capacity,
    fs::{self, Mode, OFlags},
    io::{Errno, pread},
};
use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Files that are held at most: a quarter of what a daemon may have open.
const MOST: usize = 16 << 10;
/// Those that are.
static HELD: AtomicUsize = AtomicUsize::new(0);
/// More than these files have as a rule.
const USUAL: usize = 4096;

/// The directory of a group in the hierarchy of one controller, and what was read of it.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) v1: bool,
    directory: Arc<OwnedFd>,
    /// `None` of a file that this kernel does not have.
    files: Vec<(&'static str, Option<OwnedFd>)>,
    most: usize,
}

enum Opened<'a> {
    Held(BorrowedFd<'a>),
    Now(OwnedFd),
}

impl AsFd for Opened<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Held(file) => *file,
            Self::Now(file) => file.as_fd(),
        }
    }
}

/// A group's directory, to be held.
pub(super) fn open(path: &Path) -> Option<Arc<OwnedFd>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Some(Arc::new(fs::open(path, flags, Mode::empty()).ok()?))
}

impl Held {
    pub(super) fn new(v1: bool, directory: Arc<OwnedFd>) -> Self {
        Self { v1, directory, files: vec![], most: MOST }
    }

    fn file(&mut self, name: &'static str) -> Option<Opened<'_>> {
        let at = match self.files.iter().position(|(known, _)| *known == name) {
            Some(at) => at,
            None => {
                let flags = OFlags::RDONLY | OFlags::CLOEXEC;
                let opened = match fs::openat(&self.directory, name, flags, Mode::empty()) {
                    Ok(file) if self.place() => Some(file),
                    Ok(file) => return Some(Opened::Now(file)),
                    Err(Errno::NOENT) => None,
                    // Of a moment, such as a lack of descriptors: the next sample tries again.
                    Err(_) => return None,
                };
                self.files.push((name, opened));
                self.files.len() - 1
            }
        };
        self.files[at].1.as_ref().map(|file| Opened::Held(file.as_fd()))
    }

    /// Takes a place for one more that is held, where there is one.
    fn place(&self) -> bool {
        let one_more = |held| (held < self.most).then_some(held + 1);
        HELD.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
    }

    /// The text of a file, without white space at its end.
    pub(super) fn text(&mut self, name: &'static str) -> Option<String> {
        let file = self.file(name)?;
        let mut bytes = Vec::<u8>::with_capacity(USUAL);
        loop {
            let (at, room) = (bytes.len() as u64, bytes.capacity() - bytes.len());
            // The kernel hands out as much as there is room for: less is all.
            if pread(&file, spare_capacity(&mut bytes), at).ok()? < room {
                break;
            }
            bytes.reserve(USUAL);
        }
        bytes.truncate(bytes.trim_ascii_end().len());
        String::from_utf8(bytes).ok()
    }

    /// The number that a file is.
    pub(super) fn number(&mut self, name: &'static str) -> Option<u64> {
        // More than any number has: a single look tells it.
        let mut bytes = [0; 64];
        let length = pread(self.file(name)?, &mut bytes, 0).ok()?;
        std::str::from_utf8(&bytes[..length]).ok()?.trim().parse().ok()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let held = self.files.iter().filter(|(_, file)| file.is_some()).count();
        HELD.fetch_sub(held, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::Cgroups;

    #[test]
    fn each_reading_tells_anew_and_whole() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("memory.stat");
        std::fs::write(&path, "1\n").unwrap();
        let mut held = Held::new(false, open(root.path()).unwrap());
        assert_eq!((held.number("memory.stat"), held.text("memory.stat").as_deref()), (Some(1), Some("1")));
        // Longer than one look, and exactly as long as one.
        for length in [USUAL - 1, USUAL, USUAL + 1, 3 * USUAL + 7] {
            let text = "x".repeat(length);
            std::fs::write(&path, &text).unwrap();
            assert_eq!(held.text("memory.stat").unwrap(), text);
        }
        assert_eq!((held.number("memory.stat"), held.number("memory.peak")), (None, None));
        assert_eq!(held.files.len(), 2, "what is not there is asked for once: {held:?}");
        assert!(open(&root.path().join("gone")).is_none());
        // Where there is no place left each reading opens it, and tells the same.
        let mut full = Held::new(false, open(root.path()).unwrap());
        full.most = 0;
        assert_eq!(full.text("memory.stat"), held.text("memory.stat"));
        assert_eq!((full.number("memory.peak"), full.number("memory.stat")), (None, None));
        assert!(full.files.iter().all(|(_, file)| file.is_none()), "{full:?}");
    }

    /// A real group: what is held of it tells nothing when it is gone, also when another has come in its place, and keeps
    /// nobody from removing it.
    #[tokio::test]
    async fn a_group_that_is_gone_tells_nothing() {
        if !crate::backends::root() {
            return;
        }
        let Ok(cgroups) = Cgroups::detect() else { return };
        let group = format!("karst-held-{}", std::process::id());
        cgroups.create(&group).unwrap();
        let counted = cgroups.counted(&group);
        let before = counted.detailed().0;
        let (again, some) = (counted.stats(), counted.processor_and_swap());
        cgroups.remove(&group).await.unwrap();
        let gone = counted.detailed();
        cgroups.create(&group).unwrap();
        let (still, other) = (counted.detailed(), cgroups.counted(&group).stats());
        cgroups.remove(&group).await.unwrap();
        assert_eq!((&again, some), (&before, (before.cpu_ns, before.swap)));
        assert!(before.cpu_ns.is_some() && before.processes.is_none_or(|n| n == 0), "{before:?}");
        assert_eq!((gone, still), Default::default());
        assert_eq!(other.cpu_ns.is_some(), before.cpu_ns.is_some());
    }
}
