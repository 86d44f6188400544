//! The header of a qcow2 file (QEMU's `docs/interop/qcow2.rst`), checked before any tool opens the file.

use karst_model::{Error, Result};
use std::{fs::File, io, os::unix::fs::FileExt};

/// First bytes of a qcow2 file.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// What a safe header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Virtual size in bytes.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
}

/// Largest virtual size that is taken: 8 TiB.
pub const MAX_SIZE: u64 = 8 << 40;

/// Reads and checks the header of a foreign file.
///
/// # Errors
/// Invalid at `field` for anything but a self-contained, unencrypted image of a sane size.
pub fn check(field: &str, file: &File) -> Result<Header> {
    let mut h = [0u8; 112];
    match file.read_exact_at(&mut h[..72], 0) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(Error::invalid(field, "the disk image is cut off"));
        }
        r => r?,
    }
    let be32 = |at: usize| u32::from_be_bytes(h[at..at + 4].try_into().expect("four bytes"));
    let be64 = |at: usize| u64::from_be_bytes(h[at..at + 8].try_into().expect("eight bytes"));
    let wrong = |what: &str| Error::invalid(field, format!("the disk image {what}"));
    if h[..4] != MAGIC {
        return Err(wrong("is not in qcow2 format; convert it with qemu-img convert -O qcow2"));
    }
    let (version, cluster_bits, size) = (be32(4), be32(20), be64(24));
    if !(2..=3).contains(&version) {
        return Err(wrong("has an unknown version of qcow2"));
    }
    if be64(8) != 0 || be32(16) != 0 {
        return Err(wrong("refers to a backing file; flatten it with qemu-img convert"));
    }
    if !(9..=21).contains(&cluster_bits) {
        return Err(wrong("has an impossible cluster size"));
    }
    if size == 0 || size > MAX_SIZE {
        return Err(wrong("has an impossible size; 1 byte to 8 TiB are taken"));
    }
    if be32(32) != 0 {
        return Err(wrong("is encrypted"));
    }
    if be32(60) != 0 {
        return Err(wrong("has internal snapshots; flatten it with qemu-img convert"));
    }
    if version == 3 {
        file.read_exact_at(&mut h[72..104], 72).map_err(|_| wrong("is cut off"))?;
        let incompatible = u64::from_be_bytes(h[72..80].try_into().expect("eight bytes"));
        if incompatible & (1 << 2) != 0 {
            return Err(wrong("keeps its data in another file"));
        }
        if incompatible & 1 << 1 != 0 {
            return Err(wrong("is marked corrupt"));
        }
        // Known and harmless: dirty refcounts, compression type, extended L2 entries.
        if incompatible & !(1 | 1 << 3 | 1 << 4) != 0 {
            return Err(wrong("needs features of qcow2 that are not known here"));
        }
    }
    Ok(Header { size, version })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(change: impl Fn(&mut Vec<u8>)) -> Result<Header> {
        let mut h = vec![0u8; 512];
        h[..4].copy_from_slice(&MAGIC);
        h[7] = 3;
        h[23] = 16;
        h[24..32].copy_from_slice(&(1u64 << 30).to_be_bytes());
        change(&mut h);
        let f = tempfile::tempfile().unwrap();
        f.write_all_at(&h, 0).unwrap();
        check("rootfs", &f)
    }

    #[test]
    fn only_self_contained_images_pass() {
        assert_eq!(header(|_| ()).unwrap(), Header { size: 1 << 30, version: 3 });
        type Change = fn(&mut Vec<u8>);
        let changes: [(&str, Change); 9] = [
            ("magic", |h| h[0] = 0),
            ("version", |h| h[7] = 9),
            ("backing file", |h| h[15] = 200),
            ("backing length", |h| h[19] = 7),
            ("cluster", |h| h[23] = 40),
            ("huge", |h| h[24] = 0x7f),
            ("encrypted", |h| h[35] = 1),
            ("data file", |h| h[79] = 4),
            ("short", |h| h.truncate(60)),
        ];
        for (what, change) in changes {
            assert!(header(change).unwrap_err().is(karst_model::ErrorKind::Invalid), "{what}");
        }
    }
}
