//! btrfs: subvolumes, snapshots, limits. By the kernel's own calls (`linux/btrfs.h`), since a program would cost more than
//! what it asks for.

use karst_model::{Error, Result};
use rustix::fs::{AtFlags, OFlags};
use std::{
    ffi::{CString, OsStr},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

const MAGIC: u32 = 0x9123_683e;
/// Inode number of the root of every subvolume.
const SUBVOLUME_ROOT: u64 = 256;
const READ_ONLY: u64 = 1 << 1;

/// `struct btrfs_ioctl_vol_args`.
#[repr(C)]
struct Named {
    fd: i64,
    name: [u8; 4088],
}

/// `struct btrfs_ioctl_vol_args_v2`.
#[repr(C)]
struct NamedV2 {
    fd: i64,
    transid: u64,
    flags: u64,
    unused: [u64; 4],
    name: [u8; 4040],
}

/// `struct btrfs_ioctl_qgroup_limit_args`.
#[repr(C)]
struct Limit {
    qgroup: u64,
    flags: u64,
    referenced: u64,
    exclusive: u64,
    reserved: [u64; 2],
}

/// `struct btrfs_ioctl_quota_ctl_args`.
#[repr(C)]
struct Control {
    command: u64,
    status: u64,
}

/// `struct btrfs_ioctl_quota_rescan_args`.
#[repr(C)]
struct Rescan {
    flags: u64,
    progress: u64,
    reserved: [u64; 6],
}

const fn request(direction: u64, number: u64, size: usize) -> libc::c_ulong {
    (direction << 30 | (size as u64) << 16 | 0x94 << 8 | number) as libc::c_ulong
}
const WRITE: u64 = 1;
const READ: u64 = 2;
const SUBVOL_CREATE: libc::c_ulong = request(WRITE, 14, size_of::<Named>());
const SNAP_DESTROY: libc::c_ulong = request(WRITE, 15, size_of::<Named>());
const RESIZE: libc::c_ulong = request(WRITE, 3, size_of::<Named>());
const SNAP_CREATE_V2: libc::c_ulong = request(WRITE, 23, size_of::<NamedV2>());
const QUOTA_CTL: libc::c_ulong = request(READ | WRITE, 40, size_of::<Control>());
const QGROUP_LIMIT: libc::c_ulong = request(READ, 43, size_of::<Limit>());
const QUOTA_RESCAN_STATUS: libc::c_ulong = request(READ, 45, size_of::<Rescan>());
const QUOTA_RESCAN_WAIT: libc::c_ulong = request(0, 46, 0);

fn call<T>(fd: impl AsFd, number: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: the number carries the size of `T`, which the kernel reads and writes no further than.
    let code = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), number, std::ptr::from_mut(argument)) };
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn named<const N: usize>(name: &OsStr) -> io::Result<[u8; N]> {
    let mut field = [0; N];
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes.len() >= 256 || bytes.contains(&b'/') || bytes.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    field[..bytes.len()].copy_from_slice(bytes);
    Ok(field)
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, rustix::fs::Mode::empty())?)
}

/// Parent and name of a path of ours.
fn split(path: &Path) -> io::Result<(OwnedFd, &OsStr)> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok((open(parent)?, name)),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Is this path on btrfs?
///
/// # Errors
/// The path cannot be reached.
pub fn is_btrfs(path: &Path) -> io::Result<bool> {
    Ok(rustix::fs::statfs(path)?.f_type as u32 == MAGIC)
}

/// Is this the root of a subvolume?
///
/// # Errors
/// The path cannot be reached.
pub fn is_subvolume(path: &Path) -> io::Result<bool> {
    let stat = rustix::fs::statat(rustix::fs::CWD, path, AtFlags::SYMLINK_NOFOLLOW)?;
    let directory = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory;
    Ok(directory && stat.st_ino == SUBVOLUME_ROOT && is_btrfs(path)?)
}

/// Makes an empty subvolume.
///
/// # Errors
/// It exists, or the system refuses.
pub fn create(path: &Path) -> io::Result<()> {
    let (parent, name) = split(path)?;
    call(parent, SUBVOL_CREATE, &mut Named { fd: 0, name: named(name)? })
}

/// Makes `to` a snapshot of the subvolume `from`: at one instant, in one step.
///
/// # Errors
/// It exists, or the system refuses.
pub fn snapshot(from: &Path, to: &Path, read_only: bool) -> io::Result<()> {
    let (parent, name) = split(to)?;
    let from = open(from)?;
    let mut arguments = NamedV2 {
        fd: from.as_raw_fd().into(),
        transid: 0,
        flags: if read_only { READ_ONLY } else { 0 },
        unused: [0; 4],
        name: named(name)?,
    };
    call(parent, SNAP_CREATE_V2, &mut arguments)
}

/// Removes a subvolume with those that a guest made inside; its space comes back in the background. One that is not there
/// is gone already. Blocking.
///
/// # Errors
/// The system refuses.
pub fn destroy(path: &Path) -> io::Result<()> {
    let (parent, name) = match split(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let mut again = true;
    loop {
        match call(&parent, SNAP_DESTROY, &mut Named { fd: 0, name: named(name)? }) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) if again && e.kind() == io::ErrorKind::DirectoryNotEmpty => {
                destroy_inner(&open(path)?)?;
                again = false;
            }
            Err(e) => return Err(e),
        }
    }
}

/// Removes the subvolumes below a directory. What a guest made is foreign: no link is followed.
fn destroy_inner(directory: &OwnedFd) -> io::Result<()> {
    for entry in rustix::fs::Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." || !entry.file_type().is_dir() {
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let inner = match rustix::fs::openat(directory, name, flags, rustix::fs::Mode::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => continue,
            Err(e) => return Err(e.into()),
        };
        destroy_inner(&inner)?;
        if rustix::fs::fstat(&inner)?.st_ino == SUBVOLUME_ROOT {
            let name = OsStr::from_bytes(name.to_bytes());
            call(directory, SNAP_DESTROY, &mut Named { fd: 0, name: named(name)? })?;
        }
    }
    Ok(())
}

/// Turns accounting on for the file system that `path` is on, and waits until it has counted what is there. Blocking.
///
/// # Errors
/// The system refuses.
pub fn enable_quota(path: &Path) -> Result<()> {
    let fd = open(path)?;
    call(&fd, QUOTA_CTL, &mut Control { command: 1, status: 0 })
        .map_err(|e| Error::unsupported("this btrfs file system cannot count for limits").with_context(e))?;
    let mut state = Rescan { flags: 0, progress: 0, reserved: [0; 6] };
    call(&fd, QUOTA_RESCAN_STATUS, &mut state)?;
    if state.flags != 0 {
        call(&fd, QUOTA_RESCAN_WAIT, &mut ())?;
    }
    Ok(())
}

/// Grows the file system that is mounted on `path` to the size of its one device. Blocking.
///
/// # Errors
/// The system refuses.
pub fn fill_device(path: &Path) -> io::Result<()> {
    call(open(path)?, RESIZE, &mut Named { fd: 0, name: named(OsStr::new("max"))? })
}

/// Limits what a subvolume refers to, in bytes; `None`: no limit. Accounting must be on.
///
/// # Errors
/// The system refuses; without accounting `ENOTCONN`.
pub fn limit(subvolume: &Path, bytes: Option<u64>) -> io::Result<()> {
    const REFERENCED: u64 = 1;
    let mut arguments = Limit {
        qgroup: 0, // the subvolume's own
        flags: REFERENCED,
        referenced: bytes.unwrap_or(u64::MAX), // all ones: clear
        exclusive: 0,
        reserved: [0; 2],
    };
    call(open(subvolume)?, QGROUP_LIMIT, &mut arguments)
}

/// Writes out what is pending on the file system of `path`.
///
/// # Errors
/// The system refuses.
pub fn sync(path: &Path) -> io::Result<()> {
    Ok(rustix::fs::syncfs(open(path)?)?)
}

/// A path for a C call.
pub(crate) fn c(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}
