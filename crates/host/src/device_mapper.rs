//! Device mapper, as far as Karst asks it itself: the rest is LVM's.

use std::{fs::File, io, os::fd::AsRawFd};

/// `DM_GET_TARGET_VERSION`: `_IOWR(0xfd, 17, struct dm_ioctl)`, of Linux 5.4 and later.
const TARGET_VERSION: libc::c_ulong = 0xc138_fd11;

/// `struct dm_ioctl` of linux/dm-ioctl.h, with room for the answer.
#[repr(C)]
struct Call {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event: u32,
    padding: u32,
    device: u64,
    name: [u8; 128],
    uuid: [u8; 129],
    data: [u8; 7],
    answer: [u64; 64],
}

/// Is there such a kind of targets (`thin-pool`)? The kernel loads the module that has it, which this process may not.
///
/// # Errors
/// The kernel has no device mapper, or none that tells.
pub fn has_target(kind: &str) -> io::Result<bool> {
    let control = File::options().read(true).write(true).open("/dev/mapper/control")?;
    let mut call = Call {
        version: [4, 0, 0],
        data_size: size_of::<Call>() as u32,
        data_start: std::mem::offset_of!(Call, answer) as u32,
        target_count: 0,
        open_count: 0,
        flags: 0,
        event: 0,
        padding: 0,
        device: 0,
        name: [0; 128],
        uuid: [0; 129],
        data: [0; 7],
        answer: [0; 64],
    };
    let name = call.name.get_mut(..kind.len()).filter(|name| name.len() < 128);
    name.ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(kind.as_bytes());
    // SAFETY: the kernel reads and writes as many bytes as `data_size` says, which are this structure's.
    if unsafe { libc::ioctl(control.as_raw_fd(), TARGET_VERSION, &raw mut call) } == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        e if e.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        e => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_the_kernels() {
        // As the number of the request says.
        assert_eq!(std::mem::offset_of!(Call, answer) as libc::c_ulong, (TARGET_VERSION >> 16) & 0x3fff);
        assert!(!has_target("no-such-target").unwrap_or(false));
        assert!(has_target(&"x".repeat(128)).is_err());
    }
}
