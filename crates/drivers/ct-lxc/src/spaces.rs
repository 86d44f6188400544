//! File systems of a container for monitoring: of its root and its disks, as far as they have room of their own. What lies
//! in a plain directory of its pool has none: its figures would be the pool's. Asked for by the host's paths, never through
//! the guest's root, where a file system may be the guest's and never answer.

use crate::record::Record;
use karst_guest::FilesystemFigures;
use std::{
    ffi::OsString,
    os::unix::{ffi::OsStringExt, fs::MetadataExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// A remote file system that does not answer by then is left out.
const PATIENCE: Duration = Duration::from_millis(500);
/// Where none of them has room of its own, nobody looks again before this: it changes when somebody gives a volume a size.
const NOTHING: Duration = Duration::from_secs(20);

/// A place of the host that the guest has.
#[derive(Debug, Clone)]
struct Place {
    device: String,
    path: PathBuf,
    mount_point: String,
}

/// The places of one life of a guest.
#[derive(Debug, Clone)]
pub(crate) struct Spaces {
    places: Arc<Vec<Place>>,
    /// Somebody waits for the answer of a file system: nobody else does.
    asked: Arc<AtomicBool>,
    /// They were all found to lie where [`QUICK`] says: they are asked without a thread of their own, which costs more than the
    /// answers.
    quick: Arc<AtomicBool>,
    /// When it was seen that none of them has room of its own.
    nothing: Arc<Mutex<Option<Instant>>>,
}

impl Spaces {
    pub(crate) fn of(record: &Record) -> Self {
        let root = Place { device: "root".into(), path: record.root.clone(), mount_point: "/".into() };
        let disks = record.disks.iter().filter(|d| !d.file && d.memory.is_none() && d.node.is_none());
        let disk = |d: &crate::record::Disk| Place {
            device: d.name.clone(),
            path: d.source.clone(),
            mount_point: d.at.clone(),
        };
        let places = std::iter::once(root).chain(disks.map(disk)).collect();
        Self {
            places: Arc::new(places),
            asked: Arc::default(),
            quick: Arc::default(),
            nothing: Arc::default(),
        }
    }

    /// Figures of those with room of their own.
    pub(crate) async fn figures(&self) -> Vec<FilesystemFigures> {
        if self.nothing().is_some_and(|seen| seen.elapsed() < NOTHING) {
            return vec![];
        }
        if self.quick.load(Ordering::Relaxed) {
            return self.look();
        }
        if self.asked.swap(true, Ordering::Relaxed) {
            return vec![];
        }
        let this = self.clone();
        let work = tokio::task::spawn_blocking(move || {
            let found = this.look();
            this.asked.store(false, Ordering::Relaxed);
            found
        });
        match tokio::time::timeout(PATIENCE, work).await {
            Ok(Ok(found)) => found,
            _ => vec![],
        }
    }

    fn look(&self) -> Vec<FilesystemFigures> {
        let mut quick = true;
        let found: Vec<_> = self.places.iter().filter_map(|place| look(place, &mut quick)).collect();
        self.quick.store(quick, Ordering::Relaxed);
        *self.nothing() = found.is_empty().then(Instant::now);
        found
    }

    fn nothing(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.nothing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const BTRFS: u32 = 0x9123_683e;
const EXT4: u32 = 0xef53;
const XFS: u32 = 0x5846_5342;
const TMPFS: u32 = 0x0102_1994;

/// File systems that say out of memory what room they have.
const QUICK: [u32; 3] = [EXT4, XFS, TMPFS];

fn look(place: &Place, quick: &mut bool) -> Option<FilesystemFigures> {
    let device = |path: &Path| std::fs::metadata(path).map(|m| m.dev()).ok();
    let at = whole(&place.path);
    let (own, parent) = (rustix::fs::statfs(at).ok()?, at.parent()?);
    *quick &= QUICK.contains(&(own.f_type as u32));
    let around = rustix::fs::statfs(parent).ok()?;
    *quick &= QUICK.contains(&(around.f_type as u32));
    // What is free changes from one look to the next, and says nothing. A subvolume has a device of its own, and no room; a
    // quota of a project has room, and no device.
    let beside = own.f_type as u32 == BTRFS || device(at)? == device(parent)?;
    if beside && (own.f_type, own.f_blocks) == (around.f_type, around.f_blocks) {
        return None;
    }
    let bytes = |blocks: u64| blocks.saturating_mul(own.f_bsize as u64);
    let mounts = std::fs::read("/proc/self/mounts").unwrap_or_default();
    Some(FilesystemFigures {
        device: device_of(&mounts, at).unwrap_or_else(|| place.device.clone()),
        kind: kind(own.f_type as u32),
        mount_point: place.mount_point.clone(),
        size: bytes(own.f_blocks),
        free: bytes(own.f_bfree),
        available: bytes(own.f_bavail),
    })
}

/// Where the file system begins that a tree may have for itself: on pools of ZFS and LVM it lies in a directory of that.
fn whole(tree: &Path) -> &Path {
    tree.parent().filter(|_| tree.file_name().is_some_and(|name| name == "rootfs")).unwrap_or(tree)
}

/// What is mounted at `path`, out of a text like `/proc/self/mounts`; the last one covers those before.
fn device_of(mounts: &[u8], path: &Path) -> Option<String> {
    let line = |l: &[u8]| {
        let mut words = l.split(|b| *b == b' ');
        let (device, at) = (words.next()?, words.next()?);
        (Path::new(&OsString::from_vec(at.to_vec())) == path)
            .then(|| String::from_utf8_lossy(device).into_owned())
    };
    mounts.split(|b| *b == b'\n').rev().find_map(line)
}

/// statfs(2)'s magic numbers, as Incus calls what they stand for.
fn kind(magic: u32) -> String {
    let name = match magic {
        BTRFS => "btrfs",
        EXT4 => "ext4",
        XFS => "xfs",
        0x6969 => "nfs",
        TMPFS => "tmpfs",
        0x2fc1_2fc1 => "zfs",
        0x794c_7630 => "overlay",
        0x6573_5546 => "fuse",
        other => return format!("0x{other:x}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_by_their_mounts() {
        let mounts = b"/dev/a /x ext4 rw 0 0\n/dev/b /y ext4 rw 0 0\n/dev/c /x xfs rw 0 0\n";
        assert_eq!(device_of(mounts, Path::new("/x")).as_deref(), Some("/dev/c"));
        assert_eq!(device_of(mounts, Path::new("/z")), None);
        assert_eq!(whole(Path::new("/p/volumes/v/rootfs")), Path::new("/p/volumes/v"));
        assert_eq!(whole(Path::new("/p/volumes/v/tree")), Path::new("/p/volumes/v/tree"));
        assert_eq!((kind(0xef53).as_str(), kind(0x1234).as_str()), ("ext4", "0x1234"));
    }

    #[tokio::test]
    async fn only_what_has_room_of_its_own_is_told() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("plain")).unwrap();
        let place =
            |device: &str, path: PathBuf| Place { device: device.into(), path, mount_point: "/m".into() };
        let places = vec![
            place("plain", dir.path().join("plain")),
            // As a tree is on a file system of its own.
            place("proc", "/proc/rootfs".into()),
            place("gone", dir.path().join("gone")),
        ];
        let spaces = |places| Spaces {
            places: Arc::new(places),
            asked: Arc::default(),
            quick: Arc::default(),
            nothing: Arc::default(),
        };
        let plain = spaces(places[..1].to_vec());
        let spaces = spaces(places);
        for _ in 0..2 {
            let found = spaces.figures().await;
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!((found[0].device.as_str(), found[0].mount_point.as_str()), ("proc", "/m"));
        }
        // While one waits, nobody else does.
        assert!(!spaces.quick.load(Ordering::Relaxed), "/proc is not among those");
        spaces.asked.store(true, Ordering::Relaxed);
        assert!(spaces.figures().await.is_empty());
        // Where nothing is to be waited for, all are answered.
        spaces.quick.store(true, Ordering::Relaxed);
        assert_eq!(spaces.figures().await.len(), 1);
        assert!(!spaces.quick.load(Ordering::Relaxed), "it is found out again each time");
        // Where nothing has room of its own, that is kept for a while, and then looked at again.
        assert!(spaces.nothing().is_none());
        assert!(plain.figures().await.is_empty());
        let seen = plain.nothing().unwrap();
        assert!(plain.figures().await.is_empty());
        assert_eq!(*plain.nothing(), Some(seen));
        *plain.nothing() = seen.checked_sub(NOTHING);
        assert!(plain.figures().await.is_empty());
        assert!(plain.nothing().unwrap() >= seen);
    }
}
