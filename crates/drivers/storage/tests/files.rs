//! The pool kind `dir` on real file systems.
#![allow(clippy::disallowed_methods)] // drivers and their tests are the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

use karst_host::sandbox::Launcher;
use karst_model::{
    ErrorKind, VolumeId,
    storage::{PoolKind, VolumeContent},
};
use karst_storage::{FilePool, Format, NewVolume, PoolDriver, Source, contract};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

const BELOW: [&str; 5] = ["volumes", "snapshots", "images", "tmp", "trash"];

fn skipped() -> bool {
    !backends::root()
}

fn launcher() -> Launcher {
    let program = env!("CARGO_BIN_EXE_karst-storage-worker").into();
    Launcher { program, args: vec![], id_base: 1_900_100_000 }
}

async fn open_dir(root: impl Into<PathBuf>) -> karst_model::Result<FilePool> {
    FilePool::directory(root, launcher()).await
}

fn tree_of(path: &Path) -> Source {
    Source::Tree { path: path.to_owned(), image: None }
}

fn entries(dir: impl AsRef<Path>) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

fn id() -> VolumeId {
    VolumeId(uuid::Uuid::new_v4())
}

#[tokio::test(flavor = "multi_thread")]
async fn dir_pool_keeps_the_contract() {
    if skipped() {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let pool = open_dir(d.path().join("pool")).await.unwrap();
    let scratch = d.path().join("scratch");
    std::fs::create_dir(&scratch).unwrap();
    contract::check(&pool, &scratch).await;
    contract::encrypted(&pool, &scratch, &launcher()).await;
    for below in BELOW {
        assert_eq!(entries(d.path().join("pool").join(below)), 0, "{below}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_power_cut_may_have_left_incomplete_is_not_used() {
    if skipped() {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let (tree, root) = (d.path().join("tree"), d.path().join("pool"));
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("file"), "content").unwrap();
    let new = |source| NewVolume { content: VolumeContent::Filesystem, size: None, source };
    let pool = open_dir(&root).await.unwrap();
    let (v, snapshot) = (id(), karst_model::SnapshotId(uuid::Uuid::new_v4()));
    pool.create(v, &new(tree_of(&tree))).await.unwrap();
    let mark = root.join(format!("volumes/{v}/unflushed"));
    let taken = root.join(format!("snapshots/{v}/{snapshot}/unflushed"));
    assert!(!mark.exists(), "a copy, whose source may go next, is on disk before it has its name");
    pool.snapshots().unwrap().create(v, snapshot).await.unwrap();
    assert!(taken.exists(), "until it is synced");
    pool.flush().await.unwrap();
    assert!(!mark.exists() && !taken.exists());
    pool.locate(v, None).await.unwrap();
    let (source, clone) = (Source::Volume { volume: v, snapshot: None }, id());
    pool.create(clone, &new(source.clone())).await.unwrap();
    pool.contents().unwrap().replace(clone, &source).await.unwrap();
    assert!(
        !root.join(format!("volumes/{clone}/unflushed")).exists(),
        "nor does a clone wait, or a new content"
    );
    pool.delete(clone).await.unwrap();

    // As it would be found after a power cut before that.
    std::fs::write(&mark, "another boot").unwrap();
    drop(pool);
    let pool = open_dir(&root).await.unwrap();
    pool.flush().await.unwrap();
    assert!(mark.exists(), "nobody but a restore takes it away");
    let copy = Source::Volume { volume: v, snapshot: None };
    let other = karst_model::SnapshotId(uuid::Uuid::new_v4());
    for e in [
        pool.locate(v, None).await.unwrap_err(),
        pool.contents().unwrap().read(v, None).await.map(drop).unwrap_err(),
        pool.create(id(), &new(copy)).await.unwrap_err(),
        pool.snapshots().unwrap().create(v, other).await.unwrap_err(),
    ] {
        assert!(e.is(ErrorKind::Conflict) && e.message.contains("lost its power"), "{e}");
    }
    pool.snapshots().unwrap().restore(v, snapshot).await.unwrap();
    assert!(!mark.exists(), "what takes an old content's place is on disk before");
    let at = pool.locate(v, None).await.unwrap().path;
    assert_eq!(std::fs::read_to_string(at.join("file")).unwrap(), "content");
    std::fs::write(root.join(format!("volumes/{v}/unflushed")), "another boot").unwrap();
    pool.delete(v).await.unwrap();
    pool.settle().await;
    for below in BELOW {
        assert!(below == "snapshots" || entries(root.join(below)) == 0, "{below}");
    }
}

/// A file system in a loop file or memory, unmounted when dropped.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// A fresh btrfs file system, if this host can have one.
fn btrfs(below: &Path) -> Option<Mounted> {
    let (image, at) = (below.join("btrfs"), below.join("mnt"));
    std::fs::File::create(&image).unwrap().set_len(1 << 30).unwrap();
    std::fs::create_dir(&at).unwrap();
    if !Command::new("mkfs.btrfs").arg("-q").arg(&image).status().is_ok_and(|s| s.success()) {
        backends::missing("btrfs cannot be made (package btrfs-progs)");
        return None;
    }
    if !Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&at).status().unwrap().success() {
        backends::absent(backends::Optional::LoopDevices);
        return None;
    }
    Some(Mounted(at))
}

#[tokio::test(flavor = "multi_thread")]
async fn dir_pool_on_btrfs_shares_blocks() {
    if skipped() {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let Some(mounted) = btrfs(d.path()) else { return };
    let at = mounted.0.clone();
    let pool = open_dir(at.join("pool")).await.unwrap();
    let scratch = at.join("scratch");
    std::fs::create_dir(&scratch).unwrap();
    contract::check(&pool, &scratch).await;
    let (from, to) = (at.join("from"), at.join("to"));
    std::fs::create_dir(&from).unwrap();
    std::fs::create_dir(&to).unwrap();
    contract::sample_tree(&from);
    let fd = |p| karst_host::fs::open_dir(p).unwrap();
    assert!(karst_host::fs::copy_tree(&fd(&from), &fd(&to), karst_host::fs::TreeMode::Plain).unwrap().shared);
    let apart = at.join("apart");
    std::fs::create_dir(&apart).unwrap();
    let copied = karst_host::fs::copy_tree(&fd(&from), &fd(&apart), karst_host::fs::TreeMode::Apart).unwrap();
    assert!(!copied.shared && copied.bytes > 0, "{copied:?}");
    assert_eq!(contract::describe(&apart), contract::describe(&from));
}

/// What a clone and a full copy take of the space of their file system.
#[tokio::test(flavor = "multi_thread")]
async fn full_copies_have_blocks_of_their_own_on_btrfs() {
    if skipped() {
        return;
    }
    const SIZE: u64 = 48 << 20;
    let d = tempfile::tempdir().unwrap();
    let Some(mounted) = btrfs(d.path()) else { return };
    let root = mounted.0.join("pool");
    std::fs::create_dir(&root).unwrap();
    let pool = FilePool::btrfs(&root, launcher()).await.unwrap();
    let new = |content, size, source| NewVolume { content, size, source };
    let (tree, disk) = (id(), id());
    pool.create(tree, &new(VolumeContent::Filesystem, None, Source::Empty)).await.unwrap();
    let size = Some(karst_model::ByteSize(SIZE));
    pool.create(disk, &new(VolumeContent::Block, size, Source::Empty)).await.unwrap();
    let noise: Vec<u8> = (0..SIZE as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::fs::write(pool.locate(tree, None).await.unwrap().path.join("noise"), &noise).unwrap();
    std::fs::write(pool.locate(disk, None).await.unwrap().path, &noise).unwrap();
    let mut made = vec![tree, disk];
    let used = async || {
        assert!(Command::new("sync").arg("-f").arg(&root).status().unwrap().success());
        pool.space().await.unwrap().used
    };
    for (volume, content) in [(tree, VolumeContent::Filesystem), (disk, VolumeContent::Block)] {
        for full in [false, true] {
            let before = used().await;
            let source = Source::Volume { volume, snapshot: None }.in_full(full);
            let copy = id();
            pool.create(copy, &new(content, None, source)).await.unwrap();
            let more = used().await.saturating_sub(before);
            // Space is given back some time after what had it: nothing goes before the end.
            assert_eq!(more >= SIZE / 2, full, "{content:?}: {more}");
            made.push(copy);
        }
    }
    for volume in made {
        pool.delete(volume).await.unwrap();
    }
    pool.settle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn btrfs_pool_keeps_the_contract() {
    if skipped() {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let Some(mounted) = btrfs(d.path()) else { return };
    let root = mounted.0.join("pool");
    std::fs::create_dir(&root).unwrap();
    let pool = FilePool::btrfs(&root, launcher()).await.unwrap();
    // Images lie elsewhere.
    let scratch = d.path().join("scratch");
    std::fs::create_dir(&scratch).unwrap();
    contract::check(&pool, &scratch).await;
    for below in BELOW {
        assert_eq!(entries(root.join(below)), 0, "{below}");
    }

    // What a guest makes inside goes with it, and what a killed process left at the next start.
    let v = id();
    let new = NewVolume { content: VolumeContent::Filesystem, size: None, source: Source::Empty };
    pool.create(v, &new).await.unwrap();
    let inside = pool.locate(v, None).await.unwrap().path.join("inner");
    karst_host::btrfs::create(&inside).unwrap();
    std::fs::create_dir(inside.join("deep")).unwrap();
    karst_host::btrfs::create(&inside.join("deep/er")).unwrap();
    pool.delete(v).await.unwrap();
    pool.settle().await;
    assert_eq!(entries(root.join("trash")), 0);
    drop(pool);
    karst_host::btrfs::create(&root.join("tmp/half")).unwrap();
    let orphan = root.join("snapshots").join(id().to_string());
    std::fs::create_dir(&orphan).unwrap();
    karst_host::btrfs::snapshot(&root.join("tmp/half"), &orphan.join("s"), true).unwrap();
    let pool = FilePool::btrfs(&root, launcher()).await.unwrap();
    pool.settle().await;
    for below in BELOW {
        assert_eq!(entries(root.join(below)), 0, "{below}");
    }
    assert!(FilePool::btrfs(d.path(), launcher()).await.is_err(), "only on btrfs");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_told_and_leaves_nothing() {
    if skipped() {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let at = d.path().join("small");
    std::fs::create_dir(&at).unwrap();
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "karst-test"]).arg(&at).status();
    if !mount.is_ok_and(|s| s.success()) {
        return backends::missing("tmpfs cannot be mounted here");
    }
    let _mounted = Mounted(at.clone());
    let source = d.path().join("source");
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("big"), vec![1; 4 << 20]).unwrap();
    let pool = open_dir(at.join("pool")).await.unwrap();
    let new = NewVolume { content: VolumeContent::Filesystem, size: None, source: tree_of(&source) };
    let v = id();
    let e = pool.create(v, &new).await.unwrap_err();
    assert!(e.is(ErrorKind::Quota), "{e:?}");
    pool.settle().await;
    for below in ["volumes", "tmp", "trash"] {
        assert_eq!(entries(at.join("pool").join(below)), 0, "{below}");
    }
    // The base of a disk on another file system is a copy: it does not fit either.
    let disk = source.join("big");
    let new = NewVolume {
        content: VolumeContent::Block,
        size: None,
        source: Source::Disk {
            path: disk,
            format: Format::Qcow2,
            backing: None,
            size: 4 << 20,
            image: Some(karst_model::ImageId(uuid::Uuid::new_v4())),
        },
    };
    assert!(pool.create(v, &new).await.unwrap_err().is(ErrorKind::Quota));
    pool.settle().await;
    assert_eq!(entries(at.join("pool/trash")) + entries(at.join("pool/tmp")), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_process_left_is_cleared_at_the_next_start() {
    if skipped() {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let pool = open_dir(d.path()).await.unwrap();
    let v = id();
    let new = NewVolume { content: VolumeContent::Filesystem, size: None, source: Source::Empty };
    pool.create(v, &new).await.unwrap();
    drop(pool);
    for left in ["tmp/half/rootfs/etc", "trash/deleted/rootfs/usr"] {
        std::fs::create_dir_all(d.path().join(left)).unwrap();
    }
    let pool = open_dir(d.path()).await.unwrap();
    assert_eq!(pool.list().await.unwrap().len(), 1, "complete volumes stay");
    pool.settle().await;
    assert_eq!(entries(d.path().join("tmp")) + entries(d.path().join("trash")), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_only_looks_changes_nothing_and_another_process_is_refused() {
    if skipped() {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let look = || FilePool::look(PoolKind::Dir, d.path(), launcher());
    assert_eq!(look().await.unwrap().list().await.unwrap().len(), 0, "nothing is made for a look");
    assert_eq!(entries(d.path()), 1, "its lock");
    let pool = open_dir(d.path()).await.unwrap();
    let v = id();
    let new = NewVolume { content: VolumeContent::Filesystem, size: None, source: Source::Empty };
    pool.create(v, &new).await.unwrap();
    pool.settle().await;
    drop(pool);
    let orphan = format!("snapshots/{}/s", id());
    let left = ["tmp/half/rootfs/etc", "trash/deleted/rootfs/usr", &orphan];
    for left in left {
        std::fs::create_dir_all(d.path().join(left)).unwrap();
    }
    let looked = look().await.unwrap();
    assert_eq!(looked.list().await.unwrap().into_iter().map(|v| v.id).collect::<Vec<_>>(), [v]);
    for left in left {
        assert!(d.path().join(left).is_dir(), "{left}");
    }
    drop(looked);
    // Another process has it, once no process that another test is just starting has it still.
    let lock = std::fs::File::options().write(true).open(d.path().join(".lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    for refused in [look().await, open_dir(d.path()).await] {
        let refused = refused.map(drop).unwrap_err();
        assert!(refused.is(ErrorKind::Conflict), "{refused:?}");
    }
    assert!(d.path().join(left[0]).is_dir(), "whoever is refused sweeps nothing");
    drop(lock);
    open_dir(d.path()).await.unwrap().settle().await;
    assert!(!d.path().join(left[0]).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_create_leaves_nothing() {
    if skipped() {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let source = d.path().join("source");
    std::fs::create_dir(&source).unwrap();
    for i in 0..20_000 {
        std::fs::write(source.join(i.to_string()), "x").unwrap();
    }
    let pool = open_dir(d.path().join("pool")).await.unwrap();
    let new = NewVolume { content: VolumeContent::Filesystem, size: None, source: tree_of(&source) };
    // Where the thread that waits stands still for long enough the copy is there before its time is over.
    let mut cut = None;
    for _ in 0..10 {
        let v = id();
        if tokio::time::timeout(std::time::Duration::from_millis(5), pool.create(v, &new)).await.is_err() {
            cut = Some(v);
            break;
        }
    }
    let v = cut.expect("copying 20,000 files takes longer than 5 ms");
    assert!(pool.inspect(v).await.unwrap_err().is(ErrorKind::NotFound));
    // One that begins only after its caller was cancelled.
    let late = d.path().join("pool/tmp").join(uuid::Uuid::new_v4().to_string());
    std::fs::create_dir(&late).unwrap();
    pool.settle().await;
    assert!(!late.exists());
    // The copying thread notices by and by; each sweep takes what is there.
    let trash = d.path().join("pool/trash");
    let left = || entries(&trash) + entries(d.path().join("pool/tmp"));
    for _ in 0..12_000 {
        pool.settle().await;
        if left() == 0 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    assert_eq!(left(), 0);
    pool.create(v, &new).await.unwrap();
}

/// Trees of an image on a `dir` pool, where this kernel and the file system can have overlays with mapped layers.
#[tokio::test(flavor = "multi_thread")]
async fn trees_of_an_image_are_instant_and_keep_it() {
    if skipped() {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let root = d.path().join("pool");
    let pool = open_dir(&root).await.unwrap();
    let source = d.path().join("source");
    std::fs::create_dir(&source).unwrap();
    contract::sample_tree(&source);
    let image = karst_model::ImageId(uuid::Uuid::new_v4());
    let new = NewVolume {
        content: VolumeContent::Filesystem,
        size: None,
        source: Source::Tree { path: source.clone(), image: Some(image) },
    };
    let (a, b) = (id(), id());
    pool.create(a, &new).await.unwrap();
    let Some(layers) = pool.locate(a, None).await.unwrap().layers else {
        return backends::absent(backends::Optional::MappedOverlays);
    };
    // The lower layer has second names of the image's files, no copies; it is not changed through the tree.
    let inode = |at: &Path| std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(at).unwrap());
    let lower = layers.directory.join(&layers.lower);
    assert_eq!(inode(&lower.join("bin/su")), inode(&source.join("bin/su")));
    let before = contract::describe(&source);
    let at = pool.open_tree(a).await.unwrap();
    let again = pool.open_tree(a).await.unwrap();
    std::fs::write(at.path.join("bin/su"), b"changed").unwrap();
    assert_eq!(std::fs::read(again.path.join("bin/su")).unwrap(), b"changed", "there is one mount");
    std::fs::remove_dir_all(at.path.join("many")).unwrap();
    assert_eq!(contract::describe(&source), before);

    // A guest's view: its own ids, which are unshifted on disk; setuid programs work, device nodes do not.
    let ids = karst_host::overlay::Mapped { base: 1_800_000_000, count: 70_000 };
    drop((at, again));
    let mapped = karst_host::overlay::mount(&layers, true, Some(ids)).unwrap();
    let stat = |name: &str| rustix::fs::statat(&mapped, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
    assert_eq!((stat("home/user/file").st_uid, stat("bin/su").st_uid), (1_800_001_000, 1_800_000_000));
    drop(mapped);

    // The image stays as long as something lies over it, and no longer.
    pool.create(b, &new).await.unwrap();
    for _ in 0..2 {
        pool.forget_image(image).await.unwrap();
    }
    pool.delete(a).await.unwrap();
    pool.settle().await;
    let at = pool.open_tree(b).await.unwrap();
    assert_eq!(contract::describe(&at.path), before);
    drop((at, pool));
    let pool = open_dir(&root).await.unwrap();
    pool.settle().await;
    assert_eq!(entries(root.join("images")), 1, "also over a restart");
    pool.delete(b).await.unwrap();
    pool.settle().await;
    for below in BELOW {
        assert_eq!(entries(root.join(below)), 0, "{below}");
    }
    // One that is asked for again while it is forgotten is an image like any other.
    pool.create(a, &new).await.unwrap();
    pool.forget_image(image).await.unwrap();
    pool.create(b, &new).await.unwrap();
    pool.delete(a).await.unwrap();
    pool.delete(b).await.unwrap();
    pool.settle().await;
    assert_eq!(entries(root.join("images")), 1);
    pool.forget_image(image).await.unwrap();
    pool.settle().await;
    for below in BELOW {
        assert_eq!(entries(root.join(below)), 0, "{below}");
    }
}
