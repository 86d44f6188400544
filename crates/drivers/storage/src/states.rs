//! How a file system keeps *states*: directories that hold all of a volume or snapshot, made, cloned and removed whole.
//!
//! A state is `volume.json` with `rootfs/` (a tree; an empty one with `over/`, see [`crate::layers`]) or `disk.img` and perhaps `base.img` (a disk).

use crate::{
    Format, flush,
    moved::{self, Moved},
    projects::{self, Projects, Without},
};
use karst_host::{
    btrfs,
    fs::{self as hostfs, TreeMode},
};
use karst_model::{
    ByteSize, Error, ImageId, Result,
    storage::{PoolKind, VolumeContent},
};
use serde::{Deserialize, Serialize};
use std::{
    fs::{File, Permissions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::Path,
};

/// Name of the record in a state.
pub(crate) const RECORD: &str = "volume.json";

/// What is known of a state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub content: VolumeContent,
    pub format: Format,
    pub size: Option<ByteSize>,
    /// Has a `base.img`.
    #[serde(default)]
    pub based: bool,
    /// A tree over this image: see [`crate::layers`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageId>,
    /// Whose the files of a tree are on disk, if not those of the guest as they are: see [`crate::moved`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moved: Option<Moved>,
    /// Files of a disk in layers, lowest first: see [`crate::chain`]. None: `disk.img` alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub chain: Vec<u32>,
}

impl Record {
    pub fn read(state: &Path) -> Result<Option<Self>> {
        match std::fs::read(state.join(RECORD)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Replaces it in one step. Its content is on disk before its name: after a power cut there is no empty one. The
    /// content of trees is not synced here (that would cost as much as copying again): see [`flush`].
    pub fn write(&self, state: &Path) -> Result<()> {
        let fresh = state.join("volume.json.new");
        let mut file = File::create(&fresh)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()?;
        std::fs::rename(&fresh, state.join(RECORD)).map_err(Into::into)
    }

    /// Mode of the state's directory: a tree's setuid files, owned by root on disk, are out of reach of the host's users;
    /// to a disk its guest's own user (by the group) gets through.
    pub fn mode(content: VolumeContent) -> u32 {
        if content.is_disk() { 0o710 } else { 0o700 }
    }
}

/// A way to keep states. All calls block.
pub(crate) trait States: Send + Sync + std::fmt::Debug {
    fn kind(&self) -> PoolKind;
    /// Are clones made at one instant, for next to nothing?
    fn instant(&self) -> bool;
    /// Makes an empty one.
    fn make(&self, at: &Path) -> Result<()>;
    /// Makes an empty one that is about to get a content; see [`crate::flush`].
    fn make_to_fill(&self, at: &Path) -> Result<()> {
        self.make(at)
    }
    /// Lets what is going to be made in it be counted, where that is not so anyway: nothing of the volume's tree is there yet.
    fn account(&self, _: &Path) -> Result<()> {
        Ok(())
    }
    /// Makes `to` what `from` is; `to` cannot be changed with `frozen`, where the file system has that.
    fn clone(&self, from: &Path, to: &Path, record: &Record, frozen: bool) -> Result<()>;
    /// Removes one, or a directory of them.
    fn remove(&self, at: &Path) -> io::Result<()>;
    /// Are limits of trees held?
    fn limits(&self) -> bool;
    /// Limits what the state may hold.
    fn limit(&self, at: &Path, size: Option<ByteSize>) -> Result<()>;
    /// Why there are no limits, and what to do about it; of use where there are none.
    fn lacks(&self) -> String {
        String::new()
    }
    /// Bytes and entries of a state.
    fn used(&self, at: &Path, record: &Record) -> Result<(u64, u64)> {
        used(at, record)
    }
}

/// Lets a qcow2 file forget its bitmaps: those of a copy are what changed of its original, and of one that a machine has open they
/// are not whole. QEMU drops what they are without this bit. Source: QEMU's `docs/interop/qcow2.txt`, `autoclear_features`.
pub(crate) fn forget_bitmaps(disk: &Path) -> Result<()> {
    const MAGIC: &[u8] = b"QFI\xfb\0\0\0\x03";
    /// The lowest of 8 bytes at 88.
    const AUTOCLEAR: usize = 95;
    let file = File::options().read(true).write(true).custom_flags(NO_FOLLOW).open(disk)?;
    let mut head = [0; AUTOCLEAR + 1];
    match file.read_exact_at(&mut head, 0) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
        other => other?,
    }
    if head.starts_with(MAGIC) && head[AUTOCLEAR] & 1 != 0 {
        file.write_all_at(&[head[AUTOCLEAR] & !1], AUTOCLEAR as u64)?;
    }
    Ok(())
}

/// Lets a qcow2 file forget what it says lies below it: that is in no record of ours, and what QEMU has written there at the end of a
/// merge leads nowhere. Source: QEMU's `docs/interop/qcow2.txt`, `backing_file_offset` and `backing_file_size`.
pub(crate) fn forget_backing(disk: &Path) -> Result<()> {
    const MAGIC: &[u8] = b"QFI\xfb";
    let file = File::options().read(true).write(true).custom_flags(NO_FOLLOW).open(disk)?;
    let mut head = [0; 20];
    match file.read_exact_at(&mut head, 0) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
        other => other?,
    }
    if head.starts_with(MAGIC) && head[8..] != [0; 12] {
        file.write_all_at(&[0; 12], 8)?;
    }
    Ok(())
}

const NO_FOLLOW: i32 = rustix::fs::OFlags::NOFOLLOW.bits() as i32;

/// Plain directories: a clone shares blocks where the file system can, and is a copy otherwise.
#[derive(Debug)]
pub(crate) struct Directories {
    /// By which limits are held, or why they are not.
    pub projects: std::result::Result<Projects, Without>,
}

impl States for Directories {
    fn kind(&self) -> PoolKind {
        PoolKind::Dir
    }
    fn instant(&self) -> bool {
        false
    }
    fn make(&self, at: &Path) -> Result<()> {
        Ok(std::fs::DirBuilder::new().mode(0o700).create(at)?)
    }
    fn make_to_fill(&self, at: &Path) -> Result<()> {
        self.make(at)?;
        flush::mark(at)
    }
    fn account(&self, at: &Path) -> Result<()> {
        match &self.projects {
            Ok(projects) => projects.claim(at).map(drop),
            Err(_) => Ok(()),
        }
    }
    fn clone(&self, from: &Path, to: &Path, record: &Record, frozen: bool) -> Result<()> {
        flush::check(from)?;
        self.make_to_fill(to)?;
        if !frozen && !record.content.is_disk() {
            self.account(to)?;
        }
        if record.content.is_disk() {
            if record.based {
                link_or_copy(&from.join("base.img"), &to.join("base.img"))?;
            }
            // `record` is of the copy, which is one file under the usual name.
            let of = Record::read(from)?.map_or_else(|| "disk.img".to_owned(), |r| r.disk());
            copy_file(&from.join(of), &to.join("disk.img"), 0o600, TreeMode::Plain)?;
            if record.format == Format::Qcow2 {
                forget_bitmaps(&to.join("disk.img"))?;
            }
        } else if record.image.is_some() {
            crate::layers::prepare(to, None)?;
            copy_tree(&from.join("over/upper"), &to.join("over/upper"), TreeMode::Layer)?;
        } else {
            copy_tree(&from.join("rootfs"), &to.join("rootfs"), TreeMode::Plain)?;
            // Whatever lies still has its owners as they are in the guest.
            let from = Record::read(from)?.and_then(|record| record.moved);
            moved::back(to, from)?;
        }
        record.write(to)
    }
    fn remove(&self, at: &Path) -> io::Result<()> {
        projects::release(at);
        match std::fs::remove_dir_all(at) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
    fn limits(&self) -> bool {
        self.projects.is_ok()
    }
    fn limit(&self, at: &Path, size: Option<ByteSize>) -> Result<()> {
        match &self.projects {
            Ok(projects) => projects.limit(at, size),
            Err(_) => Ok(()),
        }
    }
    fn lacks(&self) -> String {
        self.projects.as_ref().err().map(|without| without.fix()).unwrap_or_default()
    }
    fn used(&self, at: &Path, record: &Record) -> Result<(u64, u64)> {
        if let Ok(projects) = &self.projects
            && !record.content.is_disk()
            && let Some(held) = projects.held(at)?
        {
            return Ok(held);
        }
        used(at, record)
    }
}

/// Subvolumes of btrfs: a clone is a snapshot, with which the kernel commits what it was made of.
#[derive(Debug)]
pub(crate) struct Subvolumes;

impl States for Subvolumes {
    fn kind(&self) -> PoolKind {
        PoolKind::Btrfs
    }
    fn instant(&self) -> bool {
        true
    }
    fn make(&self, at: &Path) -> Result<()> {
        btrfs::create(at)?;
        Ok(std::fs::set_permissions(at, Permissions::from_mode(0o700))?)
    }
    fn clone(&self, from: &Path, to: &Path, _: &Record, frozen: bool) -> Result<()> {
        Ok(btrfs::snapshot(from, to, frozen)?)
    }
    fn remove(&self, at: &Path) -> io::Result<()> {
        match btrfs::is_subvolume(at) {
            Ok(true) => return btrfs::destroy(at),
            Ok(false) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(e),
        }
        // A directory of states.
        for entry in std::fs::read_dir(at)?.flatten() {
            if entry.file_type()?.is_dir() {
                self.remove(&entry.path())?;
            } else {
                std::fs::remove_file(entry.path())?;
            }
        }
        std::fs::remove_dir(at)
    }
    fn limits(&self) -> bool {
        true
    }
    fn limit(&self, at: &Path, size: Option<ByteSize>) -> Result<()> {
        // The record lies in the state too.
        let bytes = size.map(|s| s.0.saturating_add(1 << 20));
        match btrfs::limit(at, bytes) {
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::NOTCONN.raw_os_error()) => {
                if bytes.is_none() {
                    return Ok(()); // nothing is counted, so nothing is limited
                }
                btrfs::enable_quota(at)?;
                Ok(btrfs::limit(at, bytes)?)
            }
            other => Ok(other?),
        }
    }
}

/// Copies a tree into a directory that is made for it.
pub(crate) fn copy_tree(from: &Path, to: &Path, mode: TreeMode) -> Result<hostfs::Copied> {
    std::fs::DirBuilder::new().mode(0o755).create(to)?;
    let done = hostfs::copy_tree(&hostfs::open_dir(from)?, &hostfs::open_dir(to)?, mode)?;
    tracing::debug!(done.entries, done.bytes, done.shared, "copied a tree");
    Ok(done)
}

/// Copies a file, holes kept; as a file of a tree that is copied in the way of `how` it shares blocks where the file system can.
pub(crate) fn copy_file(from: &Path, to: &Path, mode: u32, how: TreeMode) -> Result<()> {
    let read = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
    let source = File::options().read(true).custom_flags(read).open(from)?;
    let target = File::options().write(true).create_new(true).mode(mode).open(to)?;
    let apart = how == TreeMode::Apart;
    if apart || !hostfs::reflink(&source, &target)? {
        let size = if source.metadata()?.is_file() {
            source.metadata()?.len()
        } else {
            io::Seek::seek(&mut &source, io::SeekFrom::End(0))?
        };
        if apart {
            hostfs::copy_apart(&source, &target, size)?;
        } else {
            hostfs::copy_sparse(&source, &target, size)?;
        }
    }
    // The umask may have taken some.
    set_mode(to, mode)
}

/// Sets the mode of a file or directory. A file system that has none of its own for each (FAT) will do where nobody gets more by it.
pub(crate) fn set_mode(path: &Path, mode: u32) -> Result<()> {
    match std::fs::set_permissions(path, Permissions::from_mode(mode)) {
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied || e.kind() == io::ErrorKind::Unsupported => {
            let now = std::fs::metadata(path)?.mode() & 0o777;
            if now & 0o077 & !mode == 0 {
                return Ok(());
            }
            Err(Error::unsupported(
                "the file system of the pool keeps no modes of files, and lets users of the host at what lies there; mount it for root \
                 alone (such as -o umask=077)",
            )
            .with_context(e))
        }
        other => Ok(other?),
    }
}

/// A second name of a file that never changes, or a copy where that is not possible.
pub(crate) fn link_or_copy(from: &Path, to: &Path) -> Result<()> {
    match std::fs::hard_link(from, to) {
        // Some know no second names.
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::CrossesDevices
                    | io::ErrorKind::TooManyLinks
                    | io::ErrorKind::PermissionDenied
                    | io::ErrorKind::Unsupported
            ) =>
        {
            copy_file(from, to, 0o444, TreeMode::Plain)
        }
        other => Ok(other?),
    }
}

/// Bytes that a state takes.
pub(crate) fn used(state: &Path, record: &Record) -> Result<(u64, u64)> {
    if record.content.is_disk() {
        // The base is shared with the image and counts there.
        let mut bytes = 0;
        for number in record.numbers() {
            bytes += std::fs::symlink_metadata(state.join(crate::chain::file(number)))?.blocks() * 512;
        }
        return Ok((bytes, 0));
    }
    // What an image's tree below it takes counts there.
    let tree = if record.image.is_some() { "over/upper" } else { "rootfs" };
    Ok(hostfs::tree_usage(&hostfs::open_dir(&state.join(tree))?)?)
}

/// Gives a disk to a guest's user. QEMU gets it as a descriptor: where the file system keeps no owners it does without.
pub(crate) fn give(state: &Path, user: u32) -> Result<()> {
    let owned = |done: io::Result<()>| match done {
        Err(e) if keeps_no_owners(&e) => Ok(()),
        other => other,
    };
    let numbers = Record::read(state)?.map_or_else(|| vec![0], |record| record.numbers());
    for disk in numbers.into_iter().map(|n| state.join(crate::chain::file(n))) {
        if std::fs::symlink_metadata(&disk)?.uid() != user {
            owned(std::os::unix::fs::lchown(&disk, Some(user), Some(user)))?;
        }
    }
    if std::fs::symlink_metadata(state)?.gid() != user {
        owned(std::os::unix::fs::lchown(state, Some(0), Some(user)))?;
    }
    Ok(())
}

/// Is that what a file system says that keeps no owners, or none of root's choice (FAT, an NFS export that squashes root)?
pub(crate) fn keeps_no_owners(e: &io::Error) -> bool {
    use io::ErrorKind::{InvalidInput, PermissionDenied, Unsupported};
    matches!(e.kind(), PermissionDenied | InvalidInput | Unsupported)
}

/// Refuses what no disk can be.
pub(crate) fn check_disk_size(size: u64) -> Result<()> {
    /// 64 TiB.
    const LARGEST: u64 = 64 << 40;
    if size == 0 || size > LARGEST || !size.is_multiple_of(512) {
        return Err(Error::invalid("size", "a disk has 512 bytes to 64 TiB, in whole sectors of 512 bytes"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_qcow2_file_with_bitmaps_is_changed_and_only_in_that_bit() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk.img");
        let head = |magic: &[u8], autoclear: u8| {
            let mut bytes = vec![7; 200];
            bytes[..magic.len()].copy_from_slice(magic);
            bytes[95] = autoclear;
            bytes
        };
        let v3: &[u8] = b"QFI\xfb\0\0\0\x03";
        for (before, after) in [
            (head(v3, 0b011), head(v3, 0b010)),
            (head(v3, 0b010), head(v3, 0b010)),
            (head(b"QFI\xfb\0\0\0\x02", 1), head(b"QFI\xfb\0\0\0\x02", 1)),
            (head(b"raw", 1), head(b"raw", 1)),
            (vec![1; 95], vec![1; 95]),
        ] {
            std::fs::write(&disk, &before).unwrap();
            forget_bitmaps(&disk).unwrap();
            assert_eq!(std::fs::read(&disk).unwrap(), after);
        }
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&disk, &link).unwrap();
        assert!(forget_bitmaps(&link).is_err(), "no link is followed");
    }

    #[test]
    fn a_qcow2_file_forgets_what_it_says_lies_below_it_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk.img");
        let mut layer = vec![7; 100];
        layer[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        std::fs::write(&disk, &layer).unwrap();
        forget_backing(&disk).unwrap();
        layer[8..20].fill(0);
        assert_eq!(std::fs::read(&disk).unwrap(), layer);
        for other in [vec![7; 100], vec![1; 19]] {
            std::fs::write(&disk, &other).unwrap();
            forget_backing(&disk).unwrap();
            assert_eq!(std::fs::read(&disk).unwrap(), other);
        }
    }
}
