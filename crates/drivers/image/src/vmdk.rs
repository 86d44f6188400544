//! The header of a VMDK file ("Virtual Disk Format 1.1", VMware), checked before any tool opens the file: only disks that
//! are one sparse file (`monolithicSparse`, `streamOptimized`) and refer to no other.

use crate::qcow2::MAX_SIZE;
use karst_model::{Error, Result};
use std::{fs::File, io, os::unix::fs::FileExt};

/// First bytes of a sparse extent.
pub const MAGIC: [u8; 4] = *b"KDMV";
const SECTOR: u64 = 512;
/// Bytes of a descriptor that are read.
const DESCRIPTOR: u64 = 64 << 10;

/// Reads and checks the header and the descriptor of a foreign file; answers the virtual size in bytes.
///
/// # Errors
/// Invalid at `field` for anything but a self-contained disk of a sane size.
pub fn check(field: &str, file: &File) -> Result<u64> {
    let wrong = |what: &str| Error::invalid(field, format!("the VMDK disk {what}"));
    let mut h = [0u8; 512];
    match file.read_exact_at(&mut h, 0) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Err(wrong("is cut off")),
        r => r?,
    }
    if h.starts_with(b"# Disk Descriptor") {
        return Err(wrong(
            "is only the description of other files; make one file of them with qemu-img convert -O qcow2",
        ));
    }
    if h[..4] != MAGIC {
        return Err(Error::invalid(field, "the file is not a VMDK disk"));
    }
    let le64 = |at: usize| u64::from_le_bytes(h[at..at + 8].try_into().expect("eight bytes"));
    let version = u32::from_le_bytes(h[4..8].try_into().expect("four bytes"));
    if !(1..=3).contains(&version) {
        return Err(wrong("has an unknown version"));
    }
    let size = le64(12).checked_mul(SECTOR).filter(|s| (1..=MAX_SIZE).contains(s));
    let size = size.ok_or_else(|| wrong("has an impossible size; 1 byte to 8 TiB are taken"))?;
    // Tools look where the header says, and behind it.
    for (sector, sectors) in [(le64(28), le64(36)), (1, DESCRIPTOR / SECTOR)] {
        let (Some(at), Some(length)) = (sector.checked_mul(SECTOR), sectors.checked_mul(SECTOR)) else {
            return Err(wrong("has an impossible descriptor"));
        };
        if sector == 0 {
            continue;
        }
        let mut text = vec![0; length.min(DESCRIPTOR) as usize];
        let read = read_at(file, &mut text, at)?;
        let end = text[..read].iter().position(|b| *b == 0).unwrap_or(read);
        describe(&String::from_utf8_lossy(&text[..end])).map_err(|what| wrong(&what))?;
    }
    Ok(size)
}

fn read_at(file: &File, buffer: &mut [u8], at: u64) -> Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], at + filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(filled)
}

/// Checks a descriptor: what it is not one of is no matter.
fn describe(text: &str) -> std::result::Result<(), String> {
    if !text.trim_start().starts_with("# Disk Descriptor") {
        return Ok(());
    }
    let mut extents = 0;
    for line in text.lines().map(str::trim) {
        let (key, value) =
            line.split_once('=').map_or((line, ""), |(k, v)| (k.trim(), v.trim().trim_matches('"')));
        match key.to_ascii_lowercase().as_str() {
            "parentcid" if !value.eq_ignore_ascii_case("ffffffff") => {
                return Err("is the difference to another one; consolidate its snapshots first".into());
            }
            "parentfilenamehint" => {
                return Err("refers to another file; consolidate its snapshots first".into());
            }
            "createtype" if !matches!(value, "monolithicSparse" | "streamOptimized") => {
                let shown: String = value.chars().take(40).collect();
                return Err(format!(
                    "is of the kind {shown:?}; make it one file with qemu-img convert -O qcow2, or export it as OVA"
                ));
            }
            _ => {}
        }
        let mut words = line.split_whitespace();
        if let (Some("RW" | "RDONLY" | "NOACCESS"), Some(_), Some(kind)) =
            (words.next(), words.next(), words.next())
        {
            extents += 1;
            if kind != "SPARSE" || extents > 1 {
                return Err("keeps its data in other files".into());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(descriptor: &str, change: impl Fn(&mut Vec<u8>)) -> Result<u64> {
        let mut h = vec![0u8; 4096];
        h[..4].copy_from_slice(&MAGIC);
        h[4] = 1;
        h[12..20].copy_from_slice(&(2048u64).to_le_bytes());
        h[28] = 1;
        h[36] = 4;
        h[512..512 + descriptor.len()].copy_from_slice(descriptor.as_bytes());
        change(&mut h);
        let f = tempfile::tempfile().unwrap();
        f.write_all_at(&h, 0).unwrap();
        check("disk", &f)
    }

    const GOOD: &str = "# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\ncreateType=\"streamOptimized\"\nRW 2048 SPARSE \"x.vmdk\"\n";

    #[test]
    fn only_self_contained_disks_pass() {
        assert_eq!(disk(GOOD, |_| ()).unwrap(), 1 << 20);
        for (what, text, says) in [
            ("parent", GOOD.replace("ffffffff", "12345678"), "difference"),
            ("hint", format!("{GOOD}parentFileNameHint=\"/etc/shadow\"\n"), "another file"),
            ("flat", GOOD.replace("SPARSE", "FLAT"), "other files"),
            ("two", format!("{GOOD}RW 1 SPARSE \"y\"\n"), "other files"),
            ("kind", GOOD.replace("streamOptimized", "vmfs"), "vmfs"),
        ] {
            let e = disk(&text, |_| ()).unwrap_err();
            assert!(e.message.contains(says), "{what}: {e}");
        }
        type Change = fn(&mut Vec<u8>);
        let changes: [(&str, Change); 6] = [
            ("magic", |h| h[0] = 0),
            ("version", |h| h[4] = 9),
            ("no size: tools would look for extents", |h| h[13] = 0),
            ("huge", |h| h[19] = 0x7f),
            ("descriptor", |h| h[28..36].fill(0xff)),
            ("short", |h| h.truncate(100)),
        ];
        for (what, change) in changes {
            let change = |h: &mut Vec<u8>| {
                change(h);
                if what.starts_with("no size") {
                    h[12..20].fill(0);
                }
            };
            assert!(disk(GOOD, change).unwrap_err().is(karst_model::ErrorKind::Invalid), "{what}");
        }
        // A descriptor elsewhere does not hide the one that tools read.
        let hidden = disk(&GOOD.replace("SPARSE", "FLAT"), |h| h[28] = 7);
        assert!(hidden.unwrap_err().message.contains("other files"));
    }
}
