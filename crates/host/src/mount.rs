//! Mounting file systems of pools: loop devices and `mount(2)`.
//!
//! A loop device is attached so that the kernel detaches it with the last unmount (autoclear): nothing of it is left when
//! the mount is gone, also after a crash between the two.

use crate::btrfs::c;
use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
};

const CTL_GET_FREE: libc::c_ulong = 0x4C82;
const CONFIGURE: libc::c_ulong = 0x4C0A;
const SET_CAPACITY: libc::c_ulong = 0x4C07;
const AUTOCLEAR: u32 = 4;
const DIRECT_IO: u32 = 16;

/// `struct loop_info64`.
#[repr(C)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

/// A loop device over a file; it goes when this is dropped and nothing has it mounted.
#[derive(Debug)]
pub struct Loop {
    /// `/dev/loopN`.
    pub path: PathBuf,
    _device: OwnedFd,
}

/// Attaches a file.
///
/// # Errors
/// The host has no loop devices, or the system refuses.
pub fn attach(file: &Path) -> io::Result<Loop> {
    let control = File::options().read(true).write(true).open("/dev/loop-control")?;
    let backing = File::options().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(file)?;
    // Somebody else may take the free one between the two calls.
    for _ in 0..64 {
        // SAFETY: no pointer is passed.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), CTL_GET_FREE) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let path = PathBuf::from(format!("/dev/loop{number}"));
        if !path.exists() {
            // Where nobody runs udev (containers) the node does not come by itself.
            rustix::fs::mknodat(
                rustix::fs::CWD,
                &path,
                rustix::fs::FileType::BlockDevice,
                0o660.into(),
                rustix::fs::makedev(7, number as u32),
            )?;
        }
        let device = File::options().read(true).write(true).open(&path)?;
        let mut name = [0; 64];
        let text = file.file_name().map(|n| n.as_encoded_bytes()).unwrap_or_default();
        name[..text.len().min(63)].copy_from_slice(&text[..text.len().min(63)]);
        // Direct I/O keeps a second copy of everything out of the page cache; not every file system below has it.
        for flags in [AUTOCLEAR | DIRECT_IO, AUTOCLEAR] {
            let mut config = Config {
                fd: backing.as_raw_fd() as u32,
                block_size: 0,
                info: Info {
                    device: 0,
                    inode: 0,
                    rdevice: 0,
                    offset: 0,
                    size_limit: 0,
                    number: 0,
                    encrypt_type: 0,
                    encrypt_key_size: 0,
                    flags,
                    file_name: name,
                    crypt_name: [0; 64],
                    encrypt_key: [0; 32],
                    init: [0; 2],
                },
                reserved: [0; 8],
            };
            // SAFETY: the kernel reads a `loop_config`, which this is.
            if unsafe { libc::ioctl(device.as_raw_fd(), CONFIGURE, &raw mut config) } == 0 {
                return Ok(Loop { path, _device: device.into() });
            }
            let e = io::Error::last_os_error();
            match e.raw_os_error() {
                Some(libc::EBUSY) => break,
                Some(libc::EINVAL) => {}
                _ => return Err(e),
            }
        }
    }
    Err(io::ErrorKind::ResourceBusy.into())
}

/// The loop device that a file is attached to, by the kernel's list.
pub fn attached(file: &Path) -> Option<PathBuf> {
    let wanted = std::fs::canonicalize(file).ok()?;
    for entry in std::fs::read_dir("/sys/block").ok()?.flatten() {
        let backing = std::fs::read_to_string(entry.path().join("loop/backing_file"));
        if backing.is_ok_and(|b| Path::new(b.trim_end()) == wanted) {
            return Some(Path::new("/dev").join(entry.file_name()));
        }
    }
    None
}

/// Loop devices in use, with the files that they are attached to, by the kernel's list.
pub fn loops() -> Vec<(PathBuf, PathBuf)> {
    let entries = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let attached = entries.filter_map(|entry| {
        let backing = std::fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
        let file = backing.trim_end_matches('\n');
        // The kernel marks a file that has lost its name.
        let file = file.strip_suffix(" (deleted)").unwrap_or(file);
        Some((Path::new("/dev").join(entry.file_name()), PathBuf::from(file)))
    });
    attached.collect()
}

/// Tells a loop device that its file has grown.
///
/// # Errors
/// The system refuses.
pub fn grown(device: &Path) -> io::Result<()> {
    let device = File::options().read(true).write(true).open(device)?;
    // SAFETY: no pointer is passed.
    match unsafe { libc::ioctl(device.as_raw_fd(), SET_CAPACITY, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Mounts `source` on the directory `target`, without setuid or devices: what guests need of both they get by mounts of
/// their own.
///
/// # Errors
/// The system refuses.
pub fn mount(source: &Path, target: &Path, kind: &str, options: &str) -> io::Result<()> {
    mount_with(source, target, kind, options, libc::MS_NOATIME)
}

fn mount_with(
    source: &Path,
    target: &Path,
    kind: &str,
    options: &str,
    flags: libc::c_ulong,
) -> io::Result<()> {
    let (source, target) = (c(source)?, c(target)?);
    let kind = std::ffi::CString::new(kind)?;
    let options = std::ffi::CString::new(options)?;
    // SAFETY: four strings that live as long as the call.
    let code = unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, options.as_ptr().cast())
    };
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The same, for reading only: the file system is not told that it is in use. What it needs besides is in `options`.
///
/// # Errors
/// The system refuses.
pub fn mount_read_only(source: &Path, target: &Path, kind: &str, options: &str) -> io::Result<()> {
    mount_with(source, target, kind, options, libc::MS_NOATIME | libc::MS_RDONLY)
}

/// Mounts what a descriptor names (a namespace, say) on the file `target` too.
///
/// # Errors
/// The system refuses.
pub fn bind(source: std::os::fd::BorrowedFd<'_>, target: &Path) -> io::Result<()> {
    let source = c(Path::new(&format!("/proc/self/fd/{}", source.as_raw_fd())))?;
    let target = c(target)?;
    // SAFETY: two strings that live as long as the call; the other pointers may be null for a bind mount.
    let code = unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), std::ptr::null(), libc::MS_BIND, std::ptr::null())
    };
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Unmounts what is on `target`; nothing mounted is fine. `lazy`: at once, whoever still uses it.
///
/// # Errors
/// It is in use, or the system refuses.
pub fn unmount(target: &Path, lazy: bool) -> io::Result<()> {
    let flags = libc::UMOUNT_NOFOLLOW | if lazy { libc::MNT_DETACH } else { 0 };
    let target = c(target)?;
    // SAFETY: a string that lives as long as the call.
    match unsafe { libc::umount2(target.as_ptr(), flags) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            e if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => Ok(()),
            e => Err(e),
        },
    }
}

/// Is something mounted on exactly this directory?
///
/// # Errors
/// The path cannot be reached.
pub fn is_mount_point(path: &Path) -> io::Result<bool> {
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    let stat = rustix::fs::statx(rustix::fs::CWD, path, flags, rustix::fs::StatxFlags::BASIC_STATS)?;
    Ok(stat.stx_attributes.bits() & libc::STATX_ATTR_MOUNT_ROOT as u64 != 0)
}
