//! Writing a bootable disk image into a plain file, without loop devices, mounts or partitioning tools.
//!
//! Layout (GPT, UEFI specification 2.10 chapter 5; 512-byte sectors):
//!
//! | # | from | what |
//! |---|---|---|
//! | 1 | 1 MiB, 1 MiB | BIOS boot partition: GRUB's core image |
//! | 2 | 2 MiB, 16 MiB | EFI system partition, FAT16: shim, GRUB and its stub configuration |
//! | 3 | 18 MiB to the end | root file system |
//!
//! The root partition is the last one, so that the guest can grow it in place.

use flate2::Crc;
use std::{fs::File, io, os::unix::fs::FileExt};

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
const MIB: u64 = 1 << 20;
/// Where the root file system begins, in bytes.
pub const ROOT_OFFSET: u64 = 18 * MIB;
const BIOS_OFFSET: u64 = MIB;
const EFI_OFFSET: u64 = 2 * MIB;
/// Room behind the root file system for the backup partition table.
pub const TAIL: u64 = MIB;

/// GPT type GUIDs in the mixed-endian form of the disk.
const BIOS_BOOT: [u8; 16] = guid(0x21686148, 0x6449, 0x6e6f, 0x744e656564454649);
const EFI_SYSTEM: [u8; 16] = guid(0xc12a7328, 0xf81f, 0x11d2, 0xba4b00a0c93ec93b);
const LINUX_ROOT_X86_64: [u8; 16] = guid(0x4f68bce3, 0xe8cd, 0x4db1, 0x96e7fbcaf984b709);

const fn guid(a: u32, b: u16, c: u16, d: u64) -> [u8; 16] {
    let (a, b, c, d) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes(), d.to_be_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}

/// A UUID in the mixed-endian form of the disk.
fn on_disk(u: uuid::Uuid) -> [u8; 16] {
    u.to_bytes_le()
}

/// What to make bootable.
#[derive(Debug)]
pub struct Boot<'a> {
    /// GRUB's `boot.img` for `i386-pc`.
    pub boot_img: &'a [u8],
    /// `core.img` made by `grub-mkimage -O i386-pc`.
    pub core_img: &'a [u8],
    /// Files of the EFI system partition: upper-case 8.3 path, content.
    pub efi: &'a [(&'a str, Vec<u8>)],
}

/// Writes partition table, boot code and EFI partition into `disk` around a root file system that lies at
/// [`ROOT_OFFSET`]. `size` is the size of the disk in bytes, a multiple of 1 MiB.
///
/// # Errors
/// Writing fails; GRUB's images have an unexpected shape.
pub fn write(disk: &File, size: u64, boot: &Boot<'_>) -> io::Result<()> {
    let total = size / SECTOR;
    let last_usable = total - 34;
    let parts = [
        (BIOS_BOOT, BIOS_OFFSET, EFI_OFFSET, "bios"),
        (EFI_SYSTEM, EFI_OFFSET, ROOT_OFFSET, "efi"),
        (LINUX_ROOT_X86_64, ROOT_OFFSET, size - TAIL, "root"),
    ];
    let mut entries = vec![0u8; 128 * 128];
    for (i, (kind, from, to, name)) in parts.iter().enumerate() {
        let e = &mut entries[i * 128..(i + 1) * 128];
        e[..16].copy_from_slice(kind);
        e[16..32].copy_from_slice(&on_disk(uuid::Uuid::new_v4()));
        e[32..40].copy_from_slice(&(from / SECTOR).to_le_bytes());
        e[40..48].copy_from_slice(&(to / SECTOR - 1).to_le_bytes());
        for (k, unit) in name.encode_utf16().enumerate() {
            e[56 + 2 * k..58 + 2 * k].copy_from_slice(&unit.to_le_bytes());
        }
    }
    let disk_guid = on_disk(uuid::Uuid::new_v4());
    let header = |own: u64, other: u64, table: u64| {
        let mut h = vec![0u8; SECTOR as usize];
        h[..8].copy_from_slice(b"EFI PART");
        h[8..12].copy_from_slice(&0x0001_0000u32.to_le_bytes());
        h[12..16].copy_from_slice(&92u32.to_le_bytes());
        h[24..32].copy_from_slice(&own.to_le_bytes());
        h[32..40].copy_from_slice(&other.to_le_bytes());
        h[40..48].copy_from_slice(&34u64.to_le_bytes());
        h[48..56].copy_from_slice(&last_usable.to_le_bytes());
        h[56..72].copy_from_slice(&disk_guid);
        h[72..80].copy_from_slice(&table.to_le_bytes());
        h[80..84].copy_from_slice(&128u32.to_le_bytes());
        h[84..88].copy_from_slice(&128u32.to_le_bytes());
        h[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
        let crc = crc32(&h[..92]);
        h[16..20].copy_from_slice(&crc.to_le_bytes());
        h
    };
    disk.write_all_at(&header(1, total - 1, 2), SECTOR)?;
    disk.write_all_at(&entries, 2 * SECTOR)?;
    disk.write_all_at(&entries, (total - 33) * SECTOR)?;
    disk.write_all_at(&header(total - 1, 1, total - 33), (total - 1) * SECTOR)?;
    disk.write_all_at(&boot_sector(total, boot.boot_img)?, 0)?;
    disk.write_all_at(&core_with_blocklist(boot.core_img)?, BIOS_OFFSET)?;
    let fat = fat16(ROOT_OFFSET - EFI_OFFSET, boot.efi)?;
    disk.write_all_at(&fat, EFI_OFFSET)
}

fn crc32(data: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(data);
    crc.sum()
}

/// Protective MBR around GRUB's boot code; the fields are those of GRUB's `boot.S` (`GRUB_BOOT_MACHINE_*`).
fn boot_sector(total: u64, boot_img: &[u8]) -> io::Result<Vec<u8>> {
    if boot_img.len() != SECTOR as usize || boot_img[510..] != [0x55, 0xaa] {
        return Err(io::Error::other("boot.img is not a boot sector"));
    }
    let mut mbr = boot_img.to_vec();
    mbr[0x5c..0x64].copy_from_slice(&(BIOS_OFFSET / SECTOR).to_le_bytes());
    mbr[0x64] = 0xff; // the drive that the firmware booted from
    mbr[0x66..0x68].copy_from_slice(&[0x90, 0x90]); // some firmwares pass no valid drive number: do not trust it
    mbr[0x1b8..0x1fe].fill(0);
    let p = &mut mbr[0x1be..0x1ce];
    p[0] = 0x80; // some firmwares boot only from a disk with an active partition
    p[1..4].copy_from_slice(&[0, 2, 0]);
    p[4] = 0xee;
    p[5..8].copy_from_slice(&[0xff, 0xff, 0xff]);
    p[8..12].copy_from_slice(&1u32.to_le_bytes());
    let rest = u32::try_from(total - 1).unwrap_or(u32::MAX);
    p[12..16].copy_from_slice(&rest.to_le_bytes());
    Ok(mbr)
}

/// The core image with the block list at the end of its first sector filled in (GRUB's `diskboot.S`).
fn core_with_blocklist(core_img: &[u8]) -> io::Result<Vec<u8>> {
    let sectors = core_img.len().div_ceil(SECTOR as usize);
    if sectors < 2 || core_img.len() as u64 > EFI_OFFSET - BIOS_OFFSET {
        return Err(io::Error::other("core.img does not fit its partition"));
    }
    let mut core = core_img.to_vec();
    core.resize(sectors * SECTOR as usize, 0);
    core[0x1f4..0x1fc].copy_from_slice(&(BIOS_OFFSET / SECTOR + 1).to_le_bytes());
    core[0x1fc..0x1fe].copy_from_slice(&((sectors - 1) as u16).to_le_bytes());
    core[0x1fe..0x200].copy_from_slice(&0x0820u16.to_le_bytes());
    Ok(core)
}

#[derive(Default)]
struct Directory<'a> {
    directories: Vec<(&'a str, Directory<'a>)>,
    files: Vec<(&'a str, &'a [u8])>,
}

/// A FAT16 file system of `size` bytes with `files` (upper-case 8.3 names; ECMA-107, Microsoft's `fatgen103`).
fn fat16(size: u64, files: &[(&str, Vec<u8>)]) -> io::Result<Vec<u8>> {
    const CLUSTER: usize = 2048;
    const ROOT_ENTRIES: usize = 512;
    let sectors = (size / SECTOR) as usize;
    let fat_sectors = (sectors / (CLUSTER / 512) + 2).div_ceil(256);
    let data = (1 + 2 * fat_sectors) * 512 + ROOT_ENTRIES * 32;
    let mut image = vec![0u8; size as usize];
    image[..3].copy_from_slice(&[0xeb, 0x3c, 0x90]);
    image[3..11].copy_from_slice(b"KARST   ");
    image[11..13].copy_from_slice(&512u16.to_le_bytes());
    image[13] = (CLUSTER / 512) as u8;
    image[14..16].copy_from_slice(&1u16.to_le_bytes());
    image[16] = 2;
    image[17..19].copy_from_slice(&(ROOT_ENTRIES as u16).to_le_bytes());
    image[19..21].copy_from_slice(&u16::try_from(sectors).unwrap_or(0).to_le_bytes());
    image[21] = 0xf8;
    image[22..24].copy_from_slice(&(fat_sectors as u16).to_le_bytes());
    image[24..26].copy_from_slice(&63u16.to_le_bytes());
    image[26..28].copy_from_slice(&255u16.to_le_bytes());
    image[28..32].copy_from_slice(&((EFI_OFFSET / SECTOR) as u32).to_le_bytes());
    if sectors > 0xffff {
        image[32..36].copy_from_slice(&(sectors as u32).to_le_bytes());
    }
    image[36] = 0x80;
    image[38] = 0x29;
    image[39..43].copy_from_slice(&uuid::Uuid::new_v4().as_bytes()[..4]);
    image[43..54].copy_from_slice(b"EFI        ");
    image[54..62].copy_from_slice(b"FAT16   ");
    image[510..512].copy_from_slice(&[0x55, 0xaa]);

    let mut root = Directory::default();
    for (path, content) in files {
        let mut directory = &mut root;
        let (parents, name) = path.rsplit_once('/').unwrap_or(("", path));
        for part in parents.split('/').filter(|p| !p.is_empty()) {
            let i = directory.directories.iter().position(|(n, _)| *n == part).unwrap_or_else(|| {
                directory.directories.push((part, Directory::default()));
                directory.directories.len() - 1
            });
            directory = &mut directory.directories[i].1;
        }
        directory.files.push((name, content));
    }

    struct Writer {
        image: Vec<u8>,
        next: usize,
        data: usize,
        fat_sectors: usize,
    }
    impl Writer {
        /// Clusters for `content`, chained; answers the first (0 for nothing).
        fn put(&mut self, content: &[u8]) -> io::Result<u16> {
            let count = content.len().div_ceil(CLUSTER);
            let first = self.next;
            let at = self.data + (first - 2) * CLUSTER;
            let room = self
                .image
                .get_mut(at..at + count * CLUSTER)
                .ok_or_else(|| io::Error::other("the EFI partition is too small"))?;
            room[..content.len()].copy_from_slice(content);
            for i in 0..count {
                let value = if i + 1 == count { 0xffff } else { (first + i + 1) as u16 };
                self.chain(first + i, value);
            }
            self.next += count;
            Ok(if count == 0 { 0 } else { first as u16 })
        }
        fn chain(&mut self, cluster: usize, value: u16) {
            for copy in 0..2 {
                let at = 512 + copy * self.fat_sectors * 512 + 2 * cluster;
                self.image[at..at + 2].copy_from_slice(&value.to_le_bytes());
            }
        }
        /// Writes what is below a directory and answers its entries.
        fn directory(&mut self, d: &Directory<'_>) -> io::Result<Vec<u8>> {
            let mut entries = Vec::new();
            for (name, content) in &d.files {
                let first = self.put(content)?;
                entries.extend(entry(name, 0x20, first, content.len() as u32)?);
            }
            for (name, below) in &d.directories {
                let mut inner = self.directory(below)?;
                // Parents are written after their children, so "..", whose number is not known yet, is patched below
                // for the second level; for children of the root it is 0.
                let mut content = [entry(".", 0x10, 0, 0)?, entry("..", 0x10, 0, 0)?].concat();
                content.append(&mut inner);
                content.resize(content.len().next_multiple_of(CLUSTER), 0);
                let first = self.put(&content)?;
                let at = self.data + (usize::from(first) - 2) * CLUSTER;
                self.image[at + 26..at + 28].copy_from_slice(&first.to_le_bytes());
                for child in content[64..].chunks(32).filter(|e| e[0] != 0 && e[11] == 0x10) {
                    let cluster = usize::from(u16::from_le_bytes([child[26], child[27]]));
                    let dots = self.data + (cluster - 2) * CLUSTER + 32;
                    self.image[dots + 26..dots + 28].copy_from_slice(&first.to_le_bytes());
                }
                entries.extend(entry(name, 0x10, first, 0)?);
            }
            Ok(entries)
        }
    }
    fn entry(name: &str, attributes: u8, first: u16, size: u32) -> io::Result<Vec<u8>> {
        let mut e = vec![0u8; 32];
        e[..11].fill(b' ');
        let (stem, extension) = match name {
            "." | ".." => (name, ""),
            _ => name.split_once('.').unwrap_or((name, "")),
        };
        let fits = stem.len() <= 8 && extension.len() <= 3 && !name.bytes().any(|b| b.is_ascii_lowercase());
        if !fits {
            return Err(io::Error::other("an EFI file needs an upper-case 8.3 name"));
        }
        e[..stem.len()].copy_from_slice(stem.as_bytes());
        e[8..8 + extension.len()].copy_from_slice(extension.as_bytes());
        e[11] = attributes;
        e[24..26].copy_from_slice(&0x5821u16.to_le_bytes()); // 2024-01-01: fixed, for the same image each time
        e[26..28].copy_from_slice(&first.to_le_bytes());
        e[28..32].copy_from_slice(&size.to_le_bytes());
        Ok(e)
    }
    let mut w = Writer { image, next: 2, data, fat_sectors };
    w.chain(0, 0xfff8);
    w.chain(1, 0xffff);
    let entries = w.directory(&root)?;
    let at = (1 + 2 * fat_sectors) * 512;
    w.image[at..at + entries.len()].copy_from_slice(&entries);
    Ok(w.image)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(size: u64) -> Vec<u8> {
        let f = tempfile::tempfile().unwrap();
        f.set_len(size).unwrap();
        let mut boot = vec![0xcc; 512];
        boot[510..].copy_from_slice(&[0x55, 0xaa]);
        let efi = [("EFI/BOOT/BOOTX64.EFI", vec![7u8; 5000]), ("EFI/DEBIAN/GRUB.CFG", b"x".to_vec())];
        write(&f, size, &Boot { boot_img: &boot, core_img: &[1; 3000], efi: &efi }).unwrap();
        let mut b = vec![0; size as usize];
        f.read_exact_at(&mut b, 0).unwrap();
        b
    }

    #[test]
    fn both_partition_tables_carry_right_checksums() {
        let d = sample(64 * MIB);
        let last = d.len() - 512;
        for at in [512, last] {
            let h = &d[at..at + 92];
            let mut zeroed = h.to_vec();
            zeroed[16..20].fill(0);
            assert_eq!(crc32(&zeroed).to_le_bytes(), h[16..20]);
            let table = u64::from_le_bytes(h[72..80].try_into().unwrap()) as usize * 512;
            assert_eq!(crc32(&d[table..table + 128 * 128]).to_le_bytes(), h[88..92]);
        }
        assert_eq!(&d[510..512], [0x55, 0xaa]);
        assert_eq!(u64::from_le_bytes(d[0x5c..0x64].try_into().unwrap()), 2048);
        assert_eq!(u16::from_le_bytes([d[MIB as usize + 0x1fc], d[MIB as usize + 0x1fd]]), 5);
    }

    #[test]
    fn images_that_do_not_fit_are_refused() {
        assert!(core_with_blocklist(&vec![0; 2 << 20]).is_err());
        assert!(boot_sector(1000, &[0; 512]).is_err(), "no boot signature");
        assert!(fat16(1 << 20, &[("A", vec![0; 2 << 20])]).is_err());
        assert!(fat16(16 << 20, &[("lower.cfg", vec![])]).is_err());
    }
}
