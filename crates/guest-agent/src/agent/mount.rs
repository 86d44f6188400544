//! Directories of the host, mounted where its users want them (virtiofs, or 9p over virtio).
//!
//! The host says so whenever the port opens, so all of it can run again: what is mounted is asked of the kernel.

use super::{Refused, failed, freeze, refused};
use crate::message::{Mount, Nothing, refusal};
use std::{
    ffi::{CStr, CString},
    io,
    path::{Path, PathBuf},
    sync::Mutex,
};

/// A system that runs for longer has mounted what it ever will of its own: seconds.
const BOOTED: u64 = 60;
/// Longest tag that the kernel knows.
const MAX_TAG: usize = 31;

/// How the host shares a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// 9p over virtio.
    Plan9,
    /// virtiofs.
    Virtiofs,
}

impl Kind {
    /// The kernel's name of the file system.
    fn name(self) -> &'static CStr {
        match self {
            Self::Plan9 => c"9p",
            Self::Virtiofs => c"virtiofs",
        }
    }

    fn options(self) -> &'static CStr {
        match self {
            // `msize` is what one request carries.
            Self::Plan9 => c"trans=virtio,version=9p2000.L,msize=262144",
            Self::Virtiofs => c"",
        }
    }

    /// What to do about a kernel that does not have it.
    fn missing(self) -> &'static str {
        match self {
            Self::Plan9 => {
                "its kernel has no 9p; install one that has (on Debian linux-image-amd64 instead of linux-image-cloud-amd64)"
            }
            Self::Virtiofs => {
                "its kernel has no virtiofs (Linux 5.4 and later have); share the directory with io.bus=9p"
            }
        }
    }

    /// Is that what is mounted?
    fn is(self, entry: &Entry) -> bool {
        self.name().to_bytes() == entry.kind.as_bytes()
    }
}

/// One at a time: what is mounted is not mounted over itself.
static TURN: Mutex<()> = Mutex::new(());

/// A line of `/proc/self/mountinfo`.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    at: PathBuf,
    kind: String,
    source: String,
}

/// `\040` and the like as the bytes they stand for; bytes that are no text become marks.
fn unescaped(text: &str) -> String {
    let mut out = vec![];
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        if let (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..]) = (first, tail) {
            out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
            rest = tail;
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn entries(mountinfo: &str) -> Vec<Entry> {
    let line = |line: &str| {
        let mut words = line.split(' ');
        let at = PathBuf::from(unescaped(words.nth(4)?));
        words.find(|w| *w == "-")?;
        Some(Entry { at, kind: words.next()?.to_owned(), source: unescaped(words.next()?) })
    };
    mountinfo.lines().filter_map(line).collect()
}

/// A place above `path` at which the system will mount something of its own (fstab(5)), and has not yet: what were mounted
/// below before would be hidden.
fn awaited(fstab: &str, mounted: &[Entry], path: &Path) -> Option<PathBuf> {
    let lines = fstab.lines().map(|l| l.split_whitespace().collect::<Vec<_>>());
    let wanted = lines.filter_map(|words| match words[..] {
        [source, at, _, ref rest @ ..] if !source.starts_with('#') && at.starts_with('/') => {
            let options = rest.first().copied().unwrap_or_default();
            (!options.split(',').any(|o| o == "noauto")).then(|| PathBuf::from(unescaped(at)))
        }
        _ => None,
    });
    wanted
        .filter(|at| at.parent().is_some() && path.starts_with(at))
        .find(|at| !mounted.iter().any(|m| m.at == *at))
}

fn check(m: &Mount) -> Result<&Path, Refused> {
    let path = Path::new(&m.path);
    let plain = m.path.len() < 4096 && !m.path.split('/').any(|part| part == "." || part == "..");
    if !m.path.starts_with('/') || path.parent().is_none() || !plain || m.path.contains('\0') {
        return Err(refused(refusal::INVALID, "path", "nothing can be mounted there"));
    }
    let word = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if !(1..=MAX_TAG).contains(&m.tag.len()) || !m.tag.bytes().all(word) {
        return Err(refused(refusal::INVALID, "tag", "that is no tag of a directory"));
    }
    Ok(path)
}

fn now() -> io::Result<Vec<Entry>> {
    Ok(entries(&String::from_utf8_lossy(&std::fs::read("/proc/self/mountinfo")?)))
}

/// Mounts it, unless it is mounted.
pub(super) fn mount(m: &Mount, kind: Kind) -> Result<Nothing, Refused> {
    let path = check(m)?;
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    if freeze::is_frozen() {
        return Err(refused(refusal::BUSY, "", "the file systems of the guest are frozen"));
    }
    let fstab = std::fs::read("/etc/fstab").unwrap_or_default();
    if let Some(at) = awaited(&String::from_utf8_lossy(&fstab), &now().map_err(failed)?, path)
        && uptime() < BOOTED
    {
        let text = format!("the guest still boots and has not mounted {} yet", at.display());
        return Err(refused(refusal::BUSY, "", text));
    }
    std::fs::create_dir_all(path).map_err(failed)?;
    let at = std::fs::canonicalize(path).map_err(failed)?;
    // The last one is on top.
    let there = now().map_err(failed)?.into_iter().rev().find(|e| e.at == at);
    if there.is_some_and(|e| kind.is(&e) && e.source == m.tag) {
        return Ok(Nothing {});
    }
    attach(m, &at, kind).map_err(|e| match e.raw_os_error() {
        Some(libc::ENODEV) => refused(refusal::UNSUPPORTED, "", kind.missing()),
        // Without the driver of the device there is neither the tag nor the transport.
        Some(libc::ENOENT | libc::EINVAL) => {
            refused(refusal::BUSY, "", format!("its kernel does not know the directory {:?} yet", m.tag))
        }
        _ => failed(e),
    })?;
    Ok(Nothing {})
}

fn attach(m: &Mount, at: &Path, kind: Kind) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let (tag, at) = (CString::new(m.tag.as_str())?, CString::new(at.as_os_str().as_bytes())?);
    let (name, options) = (kind.name(), kind.options());
    let flags = libc::MS_NODEV | if m.readonly { libc::MS_RDONLY } else { 0 };
    // SAFETY: all strings end in NUL and live over the call.
    let done =
        unsafe { libc::mount(tag.as_ptr(), at.as_ptr(), name.as_ptr(), flags, options.as_ptr().cast()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Seconds since the system started.
fn uptime() -> u64 {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split(['.', ' ']).next().and_then(|s| s.parse().ok()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(tag: &str, path: &str) -> Mount {
        Mount { tag: tag.into(), path: path.into(), readonly: false }
    }

    #[test]
    fn places_and_tags_are_checked_before_anything_is_made() {
        for path in ["", "srv", "/", "//", "/srv/../etc", "/srv/./x", "/a\0b"] {
            let e = mount(&wanted("data", path), Kind::Plan9).unwrap_err();
            assert_eq!((e.code, e.field.as_str()), (refusal::INVALID, "path"), "{path:?}");
        }
        for tag in ["", "a,b", "a b", &"x".repeat(32)] {
            let e = mount(&wanted(tag, "/nonexistent-place"), Kind::Virtiofs).unwrap_err();
            assert_eq!((e.code, e.field.as_str()), (refusal::INVALID, "tag"), "{tag:?}");
        }
        assert!(!Path::new("/nonexistent-place").exists());
    }

    #[test]
    fn what_is_mounted_is_understood() {
        let text = "36 35 0:30 / /mnt/a\\040b rw,nodev shared:1 master:2 - 9p data rw,access=client\nx - y\n";
        let entry = Entry { at: "/mnt/a b".into(), kind: "9p".into(), source: "data".into() };
        assert_eq!(entries(text), [entry]);
        assert!(now().unwrap().iter().any(|e| e.kind == "proc"));
    }

    #[test]
    fn one_kind_is_not_taken_for_the_other() {
        let entry = |kind: &str| Entry { at: "/mnt".into(), kind: kind.into(), source: "data".into() };
        assert!(Kind::Plan9.is(&entry("9p")) && Kind::Virtiofs.is(&entry("virtiofs")));
        assert!(!Kind::Plan9.is(&entry("virtiofs")) && !Kind::Virtiofs.is(&entry("9p")));
        assert!(
            Kind::Virtiofs.missing().contains("io.bus=9p") && Kind::Plan9.missing().contains("linux-image")
        );
    }

    #[test]
    fn file_systems_of_the_guest_come_first() {
        let fstab = "# /dev/x /srv ext4 defaults 0 0\n/dev/sda1 / ext4 rw 0 1\nUUID=1 /srv ext4 rw,nofail 0 2\n\
            /dev/sdb /srv/cold ext4 noauto\n/dev/sdc none swap sw 0 0\n";
        let at = |mounted: &[&str], path: &str| {
            let entry = |at: &&str| Entry { at: at.into(), kind: "ext4".into(), source: "x".into() };
            awaited(fstab, &mounted.iter().map(entry).collect::<Vec<_>>(), Path::new(path))
        };
        assert_eq!(at(&["/"], "/srv/cold/data"), Some("/srv".into()));
        assert_eq!(at(&["/"], "/srv"), Some("/srv".into()));
        assert_eq!(at(&["/", "/srv"], "/srv/cold/data"), None);
        assert_eq!((at(&["/"], "/srvx"), at(&["/"], "/mnt/data"), at(&[], "/mnt")), (None, None, None));
    }
}
