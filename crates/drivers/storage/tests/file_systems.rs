//! Pools of the kind `dir` on file systems that cannot all that ext4 can: the contract of all pools where owners are kept, and what is
//! refused where they are not. An overlay over memory stands for NFS: it takes no mounts with other owners, and no overlays. NFS itself
//! is the lab's suite `storage-nfs`.
#![allow(clippy::disallowed_methods)] // drivers and their tests are the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

use karst_host::{overlay::Mapped, sandbox::Launcher};
use karst_model::{
    ByteSize, ErrorKind, ImageId, SnapshotId, VolumeId,
    storage::{Abilities, VolumeContent},
};
use karst_storage::{FilePool, Format, NewVolume, PoolDriver, Source, contract};
use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
};

const GUEST: Mapped = Mapped { base: 1_900_300_000, count: 65_536 };
const OTHER: Mapped = Mapped { base: 1_900_400_000, count: 65_536 };

fn launcher() -> Launcher {
    let built = env!("CARGO_BIN_EXE_karst-storage-worker").into();
    let program = std::env::var_os("KARST_STORAGE_WORKER").map_or(built, PathBuf::from);
    Launcher { program, args: vec![], id_base: 1_900_100_000 }
}

async fn open_dir(root: &Path) -> karst_model::Result<FilePool> {
    FilePool::directory(root, launcher()).await
}

fn id() -> VolumeId {
    VolumeId(uuid::Uuid::new_v4())
}

fn tree(source: Source) -> NewVolume {
    NewVolume { content: VolumeContent::Filesystem, size: None, source }
}

/// Unmounted when dropped, the last first.
struct Mounts(Vec<PathBuf>);

impl Mounts {
    fn mount(&mut self, args: &[&str], at: &Path) -> bool {
        std::fs::create_dir_all(at).unwrap();
        let done = Command::new("mount").args(args).arg(at).status().is_ok_and(|s| s.success());
        if done {
            self.0.push(at.to_owned());
        }
        done
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        for at in self.0.iter().rev() {
            let _ = Command::new("umount").arg("--lazy").arg(at).status();
        }
    }
}

/// A file system in memory, and an overlay in it.
fn overlay(below: &Path) -> Option<(Mounts, PathBuf, PathBuf)> {
    if !backends::root() {
        return None;
    }
    let mut mounts = Mounts(vec![]);
    let (memory, at) = (below.join("memory"), below.join("overlay"));
    assert!(mounts.mount(&["-t", "tmpfs", "-o", "size=1g,mode=0755", "karst-test"], &memory), "memory");
    for name in ["lower", "upper", "work"] {
        std::fs::create_dir(memory.join(name)).unwrap();
    }
    let dir = |name: &str| memory.join(name).display().to_string();
    let options = format!("lowerdir={},upperdir={},workdir={}", dir("lower"), dir("upper"), dir("work"));
    if !mounts.mount(&["-t", "overlay", "-o", &options, "karst-test"], &at) {
        backends::missing("overlays cannot be mounted here");
        return None;
    }
    Some((mounts, memory, at))
}

#[tokio::test(flavor = "multi_thread")]
async fn pools_in_memory_and_on_an_overlay_keep_the_contract() {
    let d = tempfile::tempdir().unwrap();
    let Some((_mounts, memory, at)) = overlay(d.path()) else { return };
    let scratch = d.path().join("scratch");
    std::fs::create_dir(&scratch).unwrap();
    for root in [memory.join("pool"), at.join("pool")] {
        let pool = open_dir(&root).await.unwrap();
        contract::check(&pool, &scratch).await;
        assert!(!root.join("trial").exists());
    }
    let can = open_dir(&at.join("pool")).await.unwrap().abilities().unwrap();
    let expected = Abilities { owners: true, links: true, ..can };
    assert_eq!(can, Abilities { mapped: false, layers: false, limits: false, clones: false, ..expected });
}

#[tokio::test(flavor = "multi_thread")]
async fn trees_that_no_mount_maps_are_moved_to_their_guest_and_lie_still_as_they_are() {
    let d = tempfile::tempdir().unwrap();
    let Some((_mounts, _, at)) = overlay(d.path()) else { return };
    let (root, source) = (at.join("pool"), d.path().join("source"));
    std::fs::create_dir(&source).unwrap();
    contract::sample_tree(&source);
    let as_made = contract::describe(&source);
    let pool = open_dir(&root).await.unwrap();
    let (v, copy, first) = (id(), id(), SnapshotId(uuid::Uuid::new_v4()));
    let image = Some(ImageId(uuid::Uuid::new_v4()));
    pool.create(v, &tree(Source::Tree { path: source.clone(), image })).await.unwrap();
    let rootfs = |v: VolumeId| root.join("volumes").join(v.to_string()).join("rootfs");
    assert_eq!(contract::describe(&rootfs(v)), as_made);
    let owner = |v, name: &str| std::fs::symlink_metadata(rootfs(v).join(name)).unwrap().uid();
    let owners = |v| ["", "home/user/file", "bin/su", "etc/link"].map(|name| owner(v, name));
    for guest in [GUEST, GUEST, OTHER] {
        pool.move_owners(v, guest).await.unwrap();
        assert_eq!(owners(v), [guest.base, guest.base + 1000, guest.base, guest.base]);
    }
    let su = std::fs::metadata(rootfs(v).join("bin/su")).unwrap();
    assert_eq!(su.mode() & 0o7777, 0o4755, "what was set-user-id is");

    // What is made of it while a guest has it has owners of its own: a snapshot, a copy, what is read.
    let snapshots = pool.snapshots().unwrap();
    snapshots.create(v, first).await.unwrap();
    pool.create(copy, &tree(Source::Volume { volume: v, snapshot: None })).await.unwrap();
    assert_eq!(contract::describe(&rootfs(copy)), as_made);
    let contents = pool.contents().unwrap();
    for snapshot in [None, Some(first)] {
        let reading = contents.read(v, snapshot).await.unwrap();
        assert_eq!(contract::describe(&reading.located.path), as_made, "{snapshot:?}");
    }
    assert_eq!(owner(v, "bin/su"), OTHER.base, "and the guest's is the guest's still");
    pool.settle().await;
    assert_eq!(std::fs::read_dir(root.join("trash")).unwrap().count(), 0, "what was made to be read is gone");

    // A restored one lies still; so does one whose files are worked on, also after another process was killed in its midst.
    snapshots.restore(v, first).await.unwrap();
    assert_eq!(owners(v), [0, 1000, 0, 0]);
    pool.move_owners(v, GUEST).await.unwrap();
    let record = root.join("volumes").join(v.to_string()).join("volume.json");
    let half = std::fs::read_to_string(&record).unwrap().replace("\"whole\":true", "\"whole\":false");
    assert!(half.contains("\"whole\":false"), "{half}");
    std::fs::write(&record, half).unwrap();
    // A file that loses nothing by it, as one with capabilities would.
    std::os::unix::fs::lchown(rootfs(v).join("many/1/1"), Some(1), Some(1)).unwrap();
    drop(pool);
    let pool = open_dir(&root).await.unwrap();
    let tree = pool.open_tree(v).await.unwrap();
    assert_eq!(contract::describe(&tree.path), as_made);
    drop(tree);
    pool.move_owners(v, Mapped { base: 0, count: u32::MAX })
        .await
        .expect("a privileged guest has them as they are");
    assert_eq!(contract::describe(&rootfs(v)), as_made);
    for volume in [v, copy] {
        pool.delete(volume).await.unwrap();
    }
    pool.settle().await;
}

/// A pool whose file system keeps no owners takes disks, and nothing else.
async fn takes_disks_alone(root: &Path, scratch: &Path) {
    let pool = open_dir(root).await.unwrap();
    assert!(!pool.abilities().unwrap().owners);
    for source in [Source::Empty, Source::Tree { path: scratch.to_owned(), image: None }] {
        let e = pool.create(id(), &tree(source)).await.unwrap_err();
        assert!(e.is(ErrorKind::Unsupported) && e.message.contains("no owners"), "{e:?}");
    }
    let (raw, image) = (scratch.join("raw"), scratch.join("image.qcow2"));
    std::fs::write(&raw, vec![7; 8 << 20]).unwrap();
    let made =
        Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).args([&raw, &image]).status();
    assert!(made.unwrap().success());
    let of_image = Source::Disk {
        path: image.clone(),
        format: Format::Qcow2,
        backing: None,
        size: 8 << 20,
        image: Some(ImageId(uuid::Uuid::new_v4())),
    };
    let disk = |source| NewVolume { content: VolumeContent::Block, size: Some(ByteSize::mib(16)), source };
    let (a, b, s) = (id(), id(), SnapshotId(uuid::Uuid::new_v4()));
    pool.create(a, &disk(of_image)).await.unwrap();
    let located = pool.locate(a, Some(1_999_999_999)).await.expect("its guest gets a descriptor of it");
    let others = std::fs::metadata(&located.path).unwrap().mode() & 0o077;
    assert_eq!(others, 0, "nobody else has anything of it");
    let snapshots = pool.snapshots().unwrap();
    snapshots.create(a, s).await.unwrap();
    snapshots.restore(a, s).await.unwrap();
    // Converted by the worker, which has the file and nothing else.
    pool.create(b, &disk(Source::Volume { volume: a, snapshot: Some(s) }.in_full(true))).await.unwrap();
    let located = pool.locate(b, None).await.unwrap();
    let got = std::fs::read(located.path).unwrap();
    assert!(got.len() == 16 << 20 && got[..8 << 20].iter().all(|b| *b == 7));
    pool.resize(a, ByteSize::mib(32)).await.unwrap();
    for volume in [a, b] {
        pool.delete(volume).await.unwrap();
    }
    pool.settle().await;
    pool.clear().await.unwrap();
    for file in [raw, image] {
        std::fs::remove_file(file).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_on_fat_takes_disks_alone_and_is_root_s() {
    if !backends::root() {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let (image, at, scratch) = (d.path().join("fat"), d.path().join("mnt"), d.path().join("scratch"));
    std::fs::create_dir(&scratch).unwrap();
    std::fs::File::create(&image).unwrap().set_len(256 << 20).unwrap();
    let made = Command::new("mkfs.vfat").arg(&image).output();
    let mut mounts = Mounts(vec![]);
    let file = image.display().to_string();
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default().contains("vfat");
    if !known || !made.is_ok_and(|o| o.status.success()) {
        return backends::absent(backends::Optional::Fat);
    }
    // Everybody could read it there.
    if !mounts.mount(&["-o", "loop,umask=022", &file], &at) {
        return backends::absent(backends::Optional::Fat);
    }
    let e = open_dir(&at.join("pool")).await.map(drop).unwrap_err();
    assert!(e.is(ErrorKind::Unsupported) && e.message.contains("umask=077"), "{e:?}");
    drop(mounts);
    let mut mounts = Mounts(vec![]);
    assert!(mounts.mount(&["-o", "loop,umask=077", &file], &at));
    takes_disks_alone(&at.join("pool"), &scratch).await;
}
