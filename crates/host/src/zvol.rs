//! Block devices of ZFS by the names of what they are.
//!
//! A zvol's link in `/dev/zvol` is udev's, which follows a rename some time later: until then it leads to what had the name
//! before. The device itself knows what it is.

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

/// `BLKZNAME`: `_IOR(0x12, 125, char[256])`.
const ZNAME: libc::c_ulong = 0x8100_127d;
/// Longest name of a data set, its end included.
const LONGEST: usize = 256;

/// The name of the zvol that a device is.
///
/// # Errors
/// It is none, or has gone.
pub fn name(device: &Path) -> io::Result<String> {
    let device = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(device)?;
    let mut name = [0u8; LONGEST];
    // SAFETY: the kernel writes as many bytes as the array has, which the request's number says.
    if unsafe { libc::ioctl(device.as_raw_fd(), ZNAME, name.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let end = name.iter().position(|b| *b == 0).unwrap_or(LONGEST);
    String::from_utf8(name[..end].to_vec()).map_err(io::Error::other)
}

/// The device of a zvol: where its link leads when that is the right one, else, with `all`, by asking all zvols of the machine.
pub fn find(zvol: &str, all: bool) -> Option<PathBuf> {
    let is = |device: &PathBuf| name(device).is_ok_and(|n| n == zvol);
    let linked = std::fs::canonicalize(Path::new("/dev/zvol").join(zvol)).ok().filter(is);
    linked.or_else(|| if all { devices().into_iter().find(is) } else { None })
}

/// Devices of all zvols, by the kernel's list; partitions are not among them.
fn devices() -> Vec<PathBuf> {
    let entries = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let named = entries.filter_map(|e| e.file_name().into_string().ok());
    named.filter(|n| is_zvol(n)).map(|n| Path::new("/dev").join(n)).collect()
}

fn is_zvol(name: &str) -> bool {
    name.strip_prefix("zd").is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_zvol_has_no_name() {
        assert!(is_zvol("zd0") && is_zvol("zd1616"));
        for other in ["zd", "zd0p1", "zram0", "dm-0", "sda"] {
            assert!(!is_zvol(other), "{other}");
        }
        assert!(name(Path::new("/dev/null")).is_err());
        assert_eq!(find("no/such/zvol", true), None);
    }
}
