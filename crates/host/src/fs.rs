//! Files: opening beneath a directory, cloning, copying trees.

use karst_model::{Error, Result};
use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags, Timestamps, XattrFlags},
    io::Errno,
};
use std::{
    collections::HashMap,
    ffi::CStr,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

/// Opens `path` beneath `dir`: no `..` out of it, no symbolic link on the way, no magic link.
///
/// # Errors
/// As the kernel answers; a link on the way is `ELOOP`, a way out `EXDEV`.
pub fn open_beneath(dir: impl AsFd, path: &str, flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    Ok(rustix::fs::openat2(dir, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)?)
}

/// Renames `from` over `to`. What the old file occupied is given back where nobody waits for it: a file system that is
/// mounted with `discard` and has no journal asks the disk, milliseconds for each file.
///
/// # Errors
/// As `rename(2)`.
pub fn replace(from: &std::path::Path, to: &std::path::Path) -> io::Result<()> {
    // Holds the old file, not its content: no access is needed and none is had.
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let old = rustix::fs::open(to, flags, Mode::empty());
    std::fs::rename(from, to)?;
    if let (Ok(old), Ok(runtime)) = (old, tokio::runtime::Handle::try_current()) {
        drop(runtime.spawn_blocking(move || drop(old)));
    }
    Ok(())
}

/// Makes `to` share the blocks of `from`; false where the file system cannot (other than btrfs, xfs and the like).
///
/// # Errors
/// No space, or reading or writing fails.
pub fn reflink(from: impl AsFd, to: impl AsFd) -> io::Result<bool> {
    match rustix::fs::ioctl_ficlone(to, from) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS | Errno::TXTBSY) => {
            Ok(false)
        }
        Err(e) => Err(e.into()),
    }
}

/// Copies `size` bytes, in the kernel, leaving holes as holes. `to` must be empty, a block device all zeros.
///
/// # Errors
/// No space, or reading or writing fails.
pub fn copy_sparse(from: impl AsFd, to: impl AsFd, size: u64) -> io::Result<()> {
    copy_data(from.as_fd(), to.as_fd(), size, copy_range)
}

/// As [`copy_sparse`], and no block is shared: some file systems let the kernel share what it is told to copy.
///
/// # Errors
/// No space, or reading or writing fails.
pub fn copy_apart(from: impl AsFd, to: impl AsFd, size: u64) -> io::Result<()> {
    copy_data(from.as_fd(), to.as_fd(), size, write_range)
}

/// Copies what is no hole by `range`.
fn copy_data(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    size: u64,
    range: impl Fn(BorrowedFd<'_>, BorrowedFd<'_>, u64, u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let source = rustix::fs::fstat(from)?;
    if rustix::fs::FileType::from_raw_mode(source.st_mode) == rustix::fs::FileType::BlockDevice {
        return copy_device(from, to, size);
    }
    let sparse = source.st_blocks as u64 * 512 < size;
    let mut at = 0u64;
    while at < size {
        let (data, end) = if sparse {
            let data = match rustix::fs::seek(from, rustix::fs::SeekFrom::Data(at)) {
                Ok(d) => d,
                Err(Errno::NXIO) => break,
                Err(e) => return Err(e.into()),
            };
            (data, rustix::fs::seek(from, rustix::fs::SeekFrom::Hole(data))?.min(size))
        } else {
            (at, size)
        };
        range(from, to, data, end, 0)?;
        at = end;
    }
    let stat = rustix::fs::fstat(to)?;
    // A block device has the size that it has, and holes stay what is there.
    if sparse && rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() {
        rustix::fs::ftruncate(to, size)?;
    }
    Ok(())
}

/// Zeros as far as they are looked for at a time.
static ZEROS: [u8; 256 << 10] = [0; 256 << 10];

/// A block device does not say where it holds data: what is all zeros is left out.
fn copy_device(from: BorrowedFd<'_>, to: BorrowedFd<'_>, size: u64) -> io::Result<()> {
    let mut buffer = vec![0u8; ZEROS.len()];
    let mut at = 0;
    while at < size {
        let want = (size - at).min(buffer.len() as u64) as usize;
        let n = match rustix::io::pread(from, &mut buffer[..want], at) {
            Ok(0) => break,
            Ok(n) => n,
            Err(Errno::INTR) => continue,
            Err(e) => return Err(e.into()),
        };
        let mut done = if buffer[..n] == ZEROS[..n] { n } else { 0 };
        while done < n {
            done += rustix::io::pwrite(to, &buffer[done..n], at + done as u64)?;
        }
        at += n as u64;
    }
    let target = rustix::fs::fstat(to)?;
    if rustix::fs::FileType::from_raw_mode(target.st_mode).is_file() {
        rustix::fs::ftruncate(to, size)?;
    }
    Ok(())
}

/// Puts the file `from` over a part of the file `to`, from `offset` on: data as data, holes as holes where the file system
/// has them, as zeros otherwise.
///
/// # Errors
/// No space, or reading or writing fails.
pub fn put_sparse(from: impl AsFd, to: impl AsFd, offset: u64) -> io::Result<()> {
    use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
    let (from, to) = (from.as_fd(), to.as_fd());
    let size = rustix::fs::fstat(from)?.st_size as u64;
    let mut at = 0;
    while at < size {
        let data = match seek(from, SeekFrom::Data(at)) {
            Ok(data) => data.min(size),
            Err(Errno::NXIO) => size,
            Err(e) => return Err(e.into()),
        };
        if data > at {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match fallocate(to, flags, offset + at, data - at) {
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => zero(to, offset + at, offset + data)?,
                other => other?,
            }
        }
        if data < size {
            at = seek(from, SeekFrom::Hole(data))?.min(size);
            copy_range(from, to, data, at, offset)?;
        } else {
            at = size;
        }
    }
    Ok(())
}

fn zero(to: BorrowedFd<'_>, start: u64, end: u64) -> io::Result<()> {
    let zeros = vec![0; 256 << 10];
    let mut at = start;
    while at < end {
        let n = (end - at).min(zeros.len() as u64) as usize;
        at += rustix::io::pwrite(to, &zeros[..n], at)? as u64;
    }
    Ok(())
}

/// Copies from `start` to `end`, to as many bytes further on.
fn copy_range(from: BorrowedFd<'_>, to: BorrowedFd<'_>, start: u64, end: u64, offset: u64) -> io::Result<()> {
    let (mut source, mut target) = (start, start + offset);
    while source < end {
        let want = (end - source).min(1 << 30) as usize;
        match rustix::fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), want) {
            Ok(0) => break, // the file became shorter
            Ok(_) => {}
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                return write_range(from, to, source, end, offset);
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// As [`copy_range`], by reading and writing.
fn write_range(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    start: u64,
    end: u64,
    offset: u64,
) -> io::Result<()> {
    let mut buffer = vec![0; end.saturating_sub(start).min(256 << 10) as usize];
    let mut at = start;
    while at < end {
        let want = (end - at).min(buffer.len() as u64) as usize;
        let n = match rustix::io::pread(from, &mut buffer[..want], at) {
            Ok(0) => break, // the file became shorter
            Ok(n) => n,
            Err(Errno::INTR) => continue,
            Err(e) => return Err(e.into()),
        };
        let mut done = 0;
        while done < n {
            done += rustix::io::pwrite(to, &buffer[done..n], at + offset + done as u64)?;
        }
        at += n as u64;
    }
    Ok(())
}

/// What a copy of a tree did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copied {
    /// Entries of all kinds.
    pub entries: u64,
    /// Bytes of regular files.
    pub bytes: u64,
    /// Were blocks shared instead of copied?
    pub shared: bool,
}

/// How a tree is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TreeMode {
    /// Device nodes are left out: a container gets its own `/dev`.
    Plain,
    /// The upper layer of an overlay: its marks of what is gone (character devices 0:0) come along.
    Layer,
    /// Files of a tree that never changes get a second name instead of a copy, where the file system can; else as plain.
    Names,
    /// As plain, and no block is shared with the original.
    Apart,
}

/// Copies the tree `from` into the existing empty directory `to`: owners, modes, times, extended attributes, hard links,
/// holes. Regular files share their blocks where the file system can, unless they are to be apart. Works on two threads. Blocking.
///
/// # Errors
/// Quota when the disk is full; internal otherwise. What was copied until then is left for the caller to remove.
pub fn copy_tree(from: &OwnedFd, to: &OwnedFd, mode: TreeMode) -> Result<Copied> {
    let job = TreeCopy { from, to, mode, state: State::default() };
    job.share.store(mode != TreeMode::Apart, Ordering::Relaxed);
    let work = || -> Result<()> {
        while let Some(path) = job.take() {
            let done = job.directory(&path);
            job.finish();
            if let Err(e) = done {
                job.failed.store(true, Ordering::Release);
                job.wake.notify_all();
                return Err(e);
            }
        }
        Ok(())
    };
    job.push(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(4));
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mine = work();
        others
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|_| Err(Error::internal("a copy ended unexpectedly", "panic"))))
            .fold(mine, Result::and)
    })?;
    // Times of directories last: storing into them changed them.
    let state = job.state;
    for (path, times) in state.directories.into_inner().unwrap_or_default() {
        let dir = open_below(to, &path)?;
        rustix::fs::futimens(&dir, &times).map_err(io::Error::from)?;
    }
    Ok(Copied {
        entries: state.entries.into_inner(),
        bytes: state.bytes.into_inner(),
        shared: state.share.into_inner() && state.shared_any.into_inner(),
    })
}

/// A directory below `root` by its relative path, links nowhere followed. Paths rather than descriptors are remembered:
/// a tree may have more directories than a process may have descriptors.
pub(crate) fn open_below(root: &OwnedFd, path: &[u8]) -> io::Result<OwnedFd> {
    let path = if path.is_empty() { b".".as_slice() } else { path };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat2(root, path, flags, Mode::empty(), resolve)?)
}

pub(crate) fn join(dir: &[u8], name: &CStr) -> Vec<u8> {
    if dir.is_empty() { name.to_bytes().to_vec() } else { [dir, b"/", name.to_bytes()].concat() }
}

#[derive(Default)]
struct Queue {
    waiting: Vec<Vec<u8>>,
    running: usize,
}

struct TreeCopy<'a> {
    from: &'a OwnedFd,
    to: &'a OwnedFd,
    mode: TreeMode,
    state: State,
}

impl std::ops::Deref for TreeCopy<'_> {
    type Target = State;
    fn deref(&self) -> &State {
        &self.state
    }
}

#[derive(Default)]
struct State {
    queue: Mutex<Queue>,
    wake: std::sync::Condvar,
    failed: AtomicBool,
    /// Cleared at the first file that could not share its blocks.
    share: AtomicBool,
    shared_any: AtomicBool,
    entries: AtomicU64,
    bytes: AtomicU64,
    /// Files with several names: (device, inode) to the copy's path.
    links: Mutex<HashMap<(u64, u64), Vec<u8>>>,
    directories: Mutex<Vec<(Vec<u8>, Timestamps)>>,
}

impl TreeCopy<'_> {
    fn push(&self, path: Vec<u8>) {
        if let Ok(mut q) = self.queue.lock() {
            q.waiting.push(path);
            self.wake.notify_one();
        }
    }

    fn take(&self) -> Option<Vec<u8>> {
        let mut q = self.queue.lock().ok()?;
        loop {
            if self.failed.load(Ordering::Acquire) {
                return None;
            }
            if let Some(next) = q.waiting.pop() {
                q.running += 1;
                return Some(next);
            }
            if q.running == 0 {
                self.wake.notify_all();
                return None;
            }
            q = self.wake.wait(q).ok()?;
        }
    }

    fn finish(&self) {
        if let Ok(mut q) = self.queue.lock() {
            q.running -= 1;
            if q.running == 0 {
                self.wake.notify_all();
            }
        }
    }

    fn directory(&self, path: &[u8]) -> Result<()> {
        let (source, target) = (open_below(self.from, path)?, open_below(self.to, path)?);
        for entry in Dir::read_from(&source).map_err(io::Error::from)? {
            let entry = entry.map_err(io::Error::from)?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            self.entry(path, &source, &target, name)
                .map_err(|e| Error::from(e).with_context(format!("copying {name:?}")))?;
            self.entries.fetch_add(1, Ordering::Relaxed);
        }
        let stat = statx(&source, c"")?;
        own(&source, &target, &stat)?;
        if let Ok(mut d) = self.directories.lock() {
            d.push((path.to_vec(), times(&stat)));
        }
        Ok(())
    }

    fn entry(&self, dir: &[u8], source: &OwnedFd, target: &OwnedFd, name: &CStr) -> io::Result<()> {
        let stat = statx(source, name)?;
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        if kind == FileType::RegularFile && self.mode == TreeMode::Names {
            match rustix::fs::linkat(source, name, target, name, AtFlags::empty()) {
                Err(Errno::XDEV | Errno::MLINK | Errno::PERM | Errno::OPNOTSUPP) => {}
                done => return Ok(done?),
            }
        }
        if kind != FileType::Directory && stat.stx_nlink > 1 {
            let key = (u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor), stat.stx_ino);
            let mut links = self.links.lock().map_err(|_| io::Error::other("a copy panicked"))?;
            if let Some(first) = links.get(&key) {
                return Ok(rustix::fs::linkat(self.to, first.as_slice(), target, name, AtFlags::empty())?);
            }
            // Under the lock: the other thread must not find the entry before the file is there.
            self.leaf(source, target, name, &stat, kind)?;
            links.insert(key, join(dir, name));
            return Ok(());
        }
        if kind == FileType::Directory {
            rustix::fs::mkdirat(target, name, Mode::from(0o700))?;
            self.push(join(dir, name));
            return Ok(());
        }
        self.leaf(source, target, name, &stat, kind)
    }

    fn leaf(
        &self,
        source: &OwnedFd,
        target: &OwnedFd,
        name: &CStr,
        stat: &Statx,
        kind: FileType,
    ) -> io::Result<()> {
        let (uid, gid) = owner(stat);
        match kind {
            FileType::RegularFile => {
                let read = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOATIME;
                let write =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let from = rustix::fs::openat(source, name, read, Mode::empty())?;
                let to = rustix::fs::openat(target, name, write, Mode::from(0o600))?;
                if stat.stx_size > 0 {
                    let shared = self.share.load(Ordering::Relaxed) && reflink(&from, &to)?;
                    if shared {
                        self.shared_any.store(true, Ordering::Relaxed);
                    } else {
                        self.share.store(false, Ordering::Relaxed);
                        match self.mode {
                            TreeMode::Apart => copy_apart(&from, &to, stat.stx_size)?,
                            _ => copy_sparse(&from, &to, stat.stx_size)?,
                        }
                    }
                }
                self.bytes.fetch_add(stat.stx_size, Ordering::Relaxed);
                own(&from, &to, stat)?;
                rustix::fs::futimens(&to, &times(stat))?;
                return Ok(());
            }
            FileType::Symlink => {
                let text = rustix::fs::readlinkat(source, name, Vec::new())?;
                rustix::fs::symlinkat(&text, target, name)?;
            }
            FileType::Fifo | FileType::Socket => {
                let mode = Mode::from_raw_mode(stat.stx_mode.into());
                rustix::fs::mknodat(target, name, kind, mode, 0)?;
            }
            FileType::CharacterDevice
                if self.mode == TreeMode::Layer && (stat.stx_rdev_major, stat.stx_rdev_minor) == (0, 0) =>
            {
                rustix::fs::mknodat(target, name, kind, Mode::empty(), 0)?;
            }
            _ => return Ok(()),
        }
        rustix::fs::chownat(target, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
        if kind != FileType::Symlink {
            rustix::fs::chmodat(target, name, Mode::from_raw_mode(stat.stx_mode.into()), AtFlags::empty())?;
        }
        Ok(rustix::fs::utimensat(target, name, &times(stat), AtFlags::SYMLINK_NOFOLLOW)?)
    }
}

/// Owner, mode and extended attributes; in this order, because changing the owner clears setuid and capabilities.
fn own(from: &OwnedFd, to: &OwnedFd, stat: &Statx) -> io::Result<()> {
    let (uid, gid) = owner(stat);
    if stat.stx_uid != 0 || stat.stx_gid != 0 {
        rustix::fs::fchown(to, uid, gid)?;
    }
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.stx_mode.into()))?;
    let mut names = [0u8; 4096];
    let n = match rustix::fs::flistxattr(from, &mut names) {
        Ok(n) => n,
        Err(Errno::OPNOTSUPP) => 0,
        Err(e) => return Err(e.into()),
    };
    for name in names[..n].split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let mut value = vec![0u8; 64 << 10];
        let len = rustix::fs::fgetxattr(from, name, &mut value)?;
        match rustix::fs::fsetxattr(to, name, &value[..len], XattrFlags::empty()) {
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Gives the directory `to` the owner, mode, extended attributes and times of `from`.
///
/// # Errors
/// The system refuses.
pub fn copy_attributes(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    let stat = statx(from, c"")?;
    own(from, to, &stat)?;
    Ok(rustix::fs::futimens(to, &times(&stat))?)
}

fn statx(dir: &OwnedFd, name: &CStr) -> io::Result<Statx> {
    let flags = if name.is_empty() { AtFlags::EMPTY_PATH } else { AtFlags::SYMLINK_NOFOLLOW };
    Ok(rustix::fs::statx(dir, name, flags, StatxFlags::BASIC_STATS)?)
}

fn owner(stat: &Statx) -> (Option<rustix::fs::Uid>, Option<rustix::fs::Gid>) {
    (Some(rustix::fs::Uid::from_raw(stat.stx_uid)), Some(rustix::fs::Gid::from_raw(stat.stx_gid)))
}

fn times(stat: &Statx) -> Timestamps {
    let spec =
        |t: &rustix::fs::StatxTimestamp| rustix::fs::Timespec { tv_sec: t.tv_sec, tv_nsec: t.tv_nsec.into() };
    Timestamps { last_access: spec(&stat.stx_atime), last_modification: spec(&stat.stx_mtime) }
}

/// Bytes (allocated) and entries below a directory; files with several names count once. Blocking.
///
/// # Errors
/// A directory cannot be read.
pub fn tree_usage(dir: &OwnedFd) -> io::Result<(u64, u64)> {
    let mut waiting = vec![dir.try_clone()?];
    let mut seen = std::collections::HashSet::new();
    let (mut bytes, mut entries) = (0, 0);
    while let Some(dir) = waiting.pop() {
        for entry in Dir::read_from(&dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let stat = match statx(&dir, name) {
                Ok(s) => s,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue, // the guest lives
                Err(e) => return Err(e),
            };
            let kind = FileType::from_raw_mode(stat.stx_mode.into());
            if kind != FileType::Directory && stat.stx_nlink > 1 && !seen.insert(stat.stx_ino) {
                continue;
            }
            bytes += stat.stx_blocks * 512;
            entries += 1;
            if kind == FileType::Directory {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                match rustix::fs::openat(&dir, name, flags, Mode::empty()) {
                    Ok(fd) => waiting.push(fd),
                    Err(Errno::NOENT) => {}
                    Err(e) => return Err(e.into()),
                }
            }
        }
    }
    Ok((bytes, entries))
}

/// The file at `path` as a descriptor for granting to a sandbox or cloning.
///
/// # Errors
/// As the kernel answers.
pub fn open_dir(path: &std::path::Path) -> io::Result<OwnedFd> {
    let f = File::options().read(true).open(path)?;
    Ok(f.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_replaced_file_is_whole_at_once_and_the_old_one_goes() {
        let dir = tempfile::tempdir().unwrap();
        let (new, at) = (dir.path().join("new"), dir.path().join("at"));
        for content in ["one", "two", "three"] {
            std::fs::write(&new, content).unwrap();
            replace(&new, &at).unwrap();
            assert_eq!(std::fs::read_to_string(&at).unwrap(), content);
            assert!(!new.exists());
        }
        assert!(replace(&new, &at).is_err() && at.exists());
    }
}
