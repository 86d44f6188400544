//! Project quotas: what a directory and all that is made in it may take of its file system (ext4 with `prjquota`, XFS with `pquota`).
//!
//! Every file has a project, a number; 0 is none. In a directory that hands its project on, what is made gets the same. The kernel
//! counts what each project has, and refuses (`EDQUOT`) what would be over its limit, but on ext4 not to who has `CAP_SYS_RESOURCE`.
//! In a user namespace of its own nobody changes a project. What has another project is neither renamed nor linked into such a
//! directory (`EXDEV`). By the kernel's own calls (`linux/fs.h`, `linux/quota.h`, `linux/dqblk_xfs.h`, quotactl(2)), which ext4 and XFS
//! answer alike; Linux 5.14.

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};
use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

/// `struct fsxattr`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Attributes {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    padding: [u8; 8],
}

/// `struct if_dqblk`. Limits are in KiB, what is taken in bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Block {
    hard: u64,
    soft: u64,
    taken: u64,
    entries_hard: u64,
    entries_soft: u64,
    entries: u64,
    time: u64,
    entries_time: u64,
    valid: u32,
}

/// `struct fs_quota_statv`, with more room than the kernel fills.
#[repr(C)]
struct Status {
    version: i8,
    padding: u8,
    flags: u16,
    rest: [u32; 63],
}

/// `FS_IOC_FSGETXATTR`: `_IOR('X', 31, struct fsxattr)`.
const GET_ATTRIBUTES: libc::c_ulong = 0x801c_581f;
/// `FS_IOC_FSSETXATTR`: `_IOW('X', 32, struct fsxattr)`.
const SET_ATTRIBUTES: libc::c_ulong = 0x401c_5820;
/// `FS_XFLAG_PROJINHERIT`.
const HANDED_ON: u32 = 0x200;
/// `Q_GETQUOTA`, `Q_SETQUOTA`, `Q_XGETQSTATV`.
const GET: u32 = 0x80_0007;
const SET: u32 = 0x80_0008;
const STATUS: u32 = 0x5808;
/// `PRJQUOTA`.
const PROJECTS: u32 = 2;
/// `FS_QUOTA_PDQ_ACCT` and `FS_QUOTA_PDQ_ENFD`: counted, and limits are held.
const ENFORCED: u16 = 1 << 4 | 1 << 5;
/// `QIF_BLIMITS`.
const LIMITS: u32 = 1;
const KIB: u64 = 1024;

/// What a directory belongs to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Project {
    /// Its number; 0 is none.
    pub id: u32,
    /// What is made in the directory gets it too.
    pub handed_on: bool,
}

/// What a project has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    /// Bytes.
    pub bytes: u64,
    /// Files and directories.
    pub entries: u64,
    /// The most bytes that it may have, a multiple of 1024.
    pub limit: Option<u64>,
}

fn open(directory: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(directory, flags, Mode::empty())?)
}

fn attributes(directory: &OwnedFd, request: libc::c_ulong, value: &mut Attributes) -> io::Result<()> {
    // SAFETY: the requests carry the size of the structure, which the kernel reads and writes no further than.
    let code = unsafe { libc::ioctl(directory.as_raw_fd(), request, std::ptr::from_mut(value)) };
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn quotas<T>(directory: &OwnedFd, command: u32, id: u32, value: &mut T) -> io::Result<()> {
    let command = command << 8 | PROJECTS;
    // SAFETY: `T` is what the command speaks of, or has more room, and lives over the call.
    let code = unsafe {
        libc::syscall(libc::SYS_quotactl_fd, directory.as_raw_fd(), command, id, std::ptr::from_mut(value))
    };
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn is(e: &io::Error, among: &[Errno]) -> bool {
    among.iter().any(|errno| e.raw_os_error() == Some(errno.raw_os_error()))
}

/// Are limits of projects held in the file system that `directory` is on? Not where it knows none, where it is mounted without
/// them, or where the kernel has no such call.
///
/// # Errors
/// The directory cannot be opened.
pub fn enforced(directory: &Path) -> io::Result<bool> {
    let directory = open(directory)?;
    let mut status = Status { version: 1, padding: 0, flags: 0, rest: [0; 63] };
    match quotas(&directory, STATUS, 0, &mut status) {
        Ok(()) => Ok(status.flags & ENFORCED == ENFORCED),
        Err(e) => {
            tracing::debug!(error = %e, "no quotas here");
            Ok(false)
        }
    }
}

/// The project of a directory: none where the file system has none.
///
/// # Errors
/// The directory cannot be opened, or the system's.
pub fn of(directory: &Path) -> io::Result<Project> {
    let mut found = Attributes::default();
    match attributes(&open(directory)?, GET_ATTRIBUTES, &mut found) {
        Ok(()) => Ok(Project { id: found.project, handed_on: found.flags & HANDED_ON != 0 }),
        Err(e) if is(&e, &[Errno::NOTTY, Errno::OPNOTSUPP, Errno::NOSYS, Errno::INVAL]) => {
            Ok(Project::default())
        }
        Err(e) => Err(e),
    }
}

/// Gives an empty directory a project that it hands on, or takes it away with 0.
///
/// # Errors
/// The file system has none, or the system's.
pub fn put(directory: &Path, id: u32) -> io::Result<()> {
    let directory = open(directory)?;
    let mut now = Attributes::default();
    attributes(&directory, GET_ATTRIBUTES, &mut now)?;
    now.project = id;
    now.flags = if id == 0 { now.flags & !HANDED_ON } else { now.flags | HANDED_ON };
    attributes(&directory, SET_ATTRIBUTES, &mut now)
}

/// What a project has on the file system of `directory`.
///
/// # Errors
/// `ESRCH` where nothing is counted; the system's.
pub fn held(directory: &Path, id: u32) -> io::Result<Held> {
    let mut found = Block::default();
    match quotas(&open(directory)?, GET, id, &mut found) {
        Ok(()) => Ok(Held {
            bytes: found.taken,
            entries: found.entries,
            limit: (found.hard > 0).then(|| found.hard.saturating_mul(KIB)),
        }),
        // Nobody has had it yet.
        Err(e) if is(&e, &[Errno::NOENT]) => Ok(Held::default()),
        Err(e) => Err(e),
    }
}

/// Limits what a project may have on the file system of `directory`, to `bytes` in whole KiB; `None`: no limit.
///
/// # Errors
/// `ESRCH` where nothing is counted; the system's.
pub fn limit(directory: &Path, id: u32, bytes: Option<u64>) -> io::Result<()> {
    // 0 is no limit, and no limit is 0.
    let hard = bytes.map_or(0, |b| b.div_ceil(KIB).max(1));
    let mut wanted = Block { hard, valid: LIMITS, ..Block::default() };
    quotas(&open(directory)?, SET, id, &mut wanted)
}

/// What a limit of so many bytes is when it is asked for.
pub fn rounded(bytes: u64) -> u64 {
    bytes.div_ceil(KIB).max(1).saturating_mul(KIB)
}

/// Does `work` as who holds the limits of file systems must do it: in a thread without the right to pass over them.
///
/// # Errors
/// The system refuses to give the right up.
pub fn within_limits<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    let worked = std::thread::scope(|scope| {
        let thread = scope.spawn(|| -> io::Result<T> {
            let mut own = capabilities(None)?;
            own.effective.remove(CapabilitySet::SYS_RESOURCE);
            set_capabilities(None, own)?;
            Ok(work())
        });
        thread.join()
    });
    worked.unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_the_kernels() {
        assert_eq!((size_of::<Attributes>(), size_of::<Block>()), (28, 72));
        assert!(size_of::<Status>() >= 160, "what the kernel writes");
        assert_eq!((rounded(1), rounded(1024), rounded(1025)), (1024, 1024, 2048));
    }

    #[test]
    fn where_there_are_none_nothing_is_held() {
        // A file system in memory has no projects.
        let at = Path::new("/dev/shm");
        if at.is_dir() {
            assert!(!enforced(at).unwrap());
            assert!(limit(at, 0x6bff_ffff, Some(1 << 20)).is_err());
        }
        assert!(enforced(Path::new("/nonexistent")).is_err());
    }

    #[test]
    fn who_works_within_limits_has_no_right_to_pass_over_them() {
        let effective = || rustix::thread::capabilities(None).unwrap().effective;
        let before = effective();
        let inside = within_limits(effective).unwrap();
        assert!(!inside.contains(rustix::thread::CapabilitySet::SYS_RESOURCE));
        assert_eq!(effective(), before, "the caller keeps it");
    }
}
