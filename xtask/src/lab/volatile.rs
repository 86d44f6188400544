//! A guest's disk whose cache forgets at a power cut what was not flushed: the hardest that a disk may do and still be honest.
//!
//! ```text
//! disk.raw        what is safe: it changes only while no QEMU runs
//! volatile.qcow2  what this boot wrote, over it
//! writes.log      the same as a log, with the flushes in it (QEMU's blklogwrites, in the format of the kernel's dm-log-writes)
//! ```
//! When QEMU is gone, writes up to the last flush go to `disk.raw`; the rest is dropped with overlay and log. Interrupted,
//! that is done once more from the start.

use super::{Result, output};
use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
};

const DISK: &str = "disk.raw";
const OVERLAY: &str = "volatile.qcow2";
const LOG: &str = "writes.log";
const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const DISCARD: u64 = 4;

/// Has the guest such a disk?
pub fn is(dir: &Path) -> bool {
    dir.join(DISK).exists()
}

/// Makes the disk of an image's; complete or not there.
pub fn make(dir: &Path, image: &Path) -> Result<()> {
    let image = image.display().to_string();
    output("qemu-img", &["convert", "-O", "raw", &image, "disk.raw.new"], dir)?;
    fs::rename(dir.join("disk.raw.new"), dir.join(DISK)).map_err(|e| format!("{DISK}: {e}"))
}

/// Overlay and log of a boot, and QEMU's arguments for them.
pub fn begin(dir: &Path) -> Result<Vec<String>> {
    settle(dir)?;
    output("qemu-img", &["create", "-q", "-f", "qcow2", "-b", DISK, "-F", "raw", OVERLAY], dir)?;
    output("truncate", &["-s", "64G", LOG], dir)?;
    let at = |name: &str| dir.join(name).display().to_string();
    // Flushes reach the log, and no further: what this machine's own disk has is not asked for.
    let quick = |node: &str| format!("{node}.cache.direct=off,{node}.cache.no-flush=on");
    let node = [
        "driver=blklogwrites,node-name=root,cache.direct=off,cache.no-flush=off".to_owned(),
        format!("file.driver=qcow2,file.file.driver=file,file.file.filename={}", at(OVERLAY)),
        quick("file"),
        format!("log.driver=file,log.filename={}", at(LOG)),
        quick("log"),
    ];
    let device = "virtio-blk-pci,drive=root,write-cache=on";
    Ok(["-blockdev", &node.join(","), "-device", device].map(str::to_owned).to_vec())
}

/// Brings what was flushed to the disk, and drops the rest. No QEMU runs on it.
pub fn settle(dir: &Path) -> Result<()> {
    let log = dir.join(LOG);
    if !log.exists() {
        return Ok(());
    }
    let wrong = |e: std::io::Error| format!("{}: {e}", log.display());
    let disk = File::options().write(true).open(dir.join(DISK)).map_err(|e| format!("{DISK}: {e}"))?;
    replay(&File::open(&log).map_err(wrong)?, &disk).map_err(wrong)?;
    fs::remove_file(&log).map_err(wrong)?;
    fs::remove_file(dir.join(OVERLAY)).map_err(|e| format!("{OVERLAY}: {e}"))
}

/// Writes of the log up to its last flush.
fn replay(log: &File, disk: &File) -> std::io::Result<()> {
    let word =
        |bytes: &[u8], n: usize| u64::from_le_bytes(bytes[n * 8..n * 8 + 8].try_into().expect("eight bytes"));
    let mut head = [0; 512];
    log.read_exact_at(&mut head, 0)?;
    if word(&head, 0) != MAGIC {
        return Ok(()); // nothing was ever written
    }
    let step = u64::from(u32::from_le_bytes(head[24..28].try_into().expect("four bytes")));
    let (mut safe, mut entries, mut at) = (0, vec![], step);
    for _ in 0..word(&head, 2) {
        log.read_exact_at(&mut head[..32], at)?;
        let (sector, sectors, flags) = (word(&head, 0), word(&head, 1), word(&head, 2));
        at += step;
        // What was discarded may as well read as before.
        if flags & DISCARD == 0 {
            entries.push((sector, sectors, at));
            at += sectors * step;
        }
        if flags & FLUSH != 0 {
            safe = entries.len();
        }
    }
    let mut bytes = vec![];
    for (sector, sectors, at) in &entries[..safe] {
        bytes.resize(usize::try_from(sectors * step).expect("a request fits into memory"), 0);
        log.read_exact_at(&mut bytes, *at)?;
        disk.write_all_at(&bytes, sector * step)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn what_was_not_flushed_is_lost() {
        let dir = std::env::temp_dir().join(format!("karst-xtask-volatile-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        File::create(dir.join(DISK)).unwrap().set_len(1 << 20).unwrap();
        let arguments = begin(&dir).unwrap();
        // Its own end would flush: it is killed, after it has said that all was done.
        let mut program = Command::new("stdbuf")
            .args([
                "-oL",
                "qemu-io",
                "-t",
                "writeback",
                "--image-opts",
                &arguments[1].replace(",node-name=root", ""),
            ])
            .args([
                "-c",
                "write -P 1 0 4k",
                "-c",
                "write -P 2 64k 4k",
                "-c",
                "flush",
                "-c",
                "write -P 3 0 4k",
            ])
            .args(["-c", "write -P 4 128k 4k", "-c", "sleep 100000"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = std::io::BufRead::lines(std::io::BufReader::new(program.stdout.take().unwrap()));
        assert_eq!(said.by_ref().filter(|l| l.as_ref().unwrap().starts_with("wrote")).take(4).count(), 4);
        program.kill().unwrap();
        program.wait().unwrap();
        settle(&dir).unwrap();
        let disk = fs::read(dir.join(DISK)).unwrap();
        assert_eq!([disk[0], disk[4095], disk[64 << 10], disk[128 << 10]], [1, 1, 2, 0]);
        assert!(!dir.join(LOG).exists() && !dir.join(OVERLAY).exists());
        settle(&dir).unwrap();
        fs::remove_dir_all(&dir).unwrap();
    }
}
