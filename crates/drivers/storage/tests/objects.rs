//! The pool kinds `zfs` and `lvm` on real ones, in files. Where the kernel or the programs lack them (the machine that
//! most of this runs on) each test says so; the lab's suite `storage-backends` runs them for real.
#![allow(clippy::disallowed_methods)] // drivers and their tests are the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;
use backends::Optional;

use karst_host::{mount, sandbox::Launcher};
use karst_model::{ByteSize, ErrorKind, SnapshotId, VolumeId, storage::VolumeContent};
use karst_storage::{
    Hold, NewVolume, ObjectPool, PoolDriver, Source, contract, hold_by_id,
    objects::{FileSystem, lvm, zfs},
};
use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

/// The worker lies elsewhere where these programs were copied to.
fn launcher() -> Launcher {
    let built = env!("CARGO_BIN_EXE_karst-storage-worker").into();
    let program = std::env::var_os("KARST_STORAGE_WORKER").map_or(built, PathBuf::from);
    Launcher { program, args: vec![], id_base: 1_900_100_000 }
}

fn ran(program: &str, args: &[&str]) -> bool {
    Command::new(program).args(args).status().is_ok_and(|s| s.success())
}

fn out(program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).output().unwrap();
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap().trim().to_owned()
}

fn skipped(what: Optional, there: bool) -> bool {
    let runs = there && rustix::process::geteuid().is_root();
    if !runs {
        // The lab's suite demands all: there nothing may be missing.
        backends::absent(what);
    }
    !runs
}

fn hold() -> Arc<Hold> {
    hold_by_id(uuid::Uuid::new_v4()).unwrap()
}

fn id() -> VolumeId {
    VolumeId(uuid::Uuid::new_v4())
}

fn volume(size: Option<ByteSize>, source: Source) -> NewVolume {
    NewVolume { content: VolumeContent::Filesystem, size, source }
}

/// A zpool in a file, destroyed when dropped.
struct Zpool(String);

impl Zpool {
    fn make(below: &Path, size: u64) -> Self {
        let file = below.join("zpool");
        std::fs::File::create(&file).unwrap().set_len(size).unwrap();
        let name = format!("karst-test-{}", uuid::Uuid::new_v4().simple());
        let file = file.to_str().unwrap();
        out("zpool", &["create", "-f", "-o", "cachefile=none", "-O", "mountpoint=none", &name, file]);
        Self(name)
    }
}

impl Drop for Zpool {
    fn drop(&mut self) {
        ran("zpool", &["destroy", "-f", &self.0]);
    }
}

fn no_zfs() -> bool {
    skipped(Optional::Zfs, Path::new("/dev/zfs").exists())
}

#[tokio::test(flavor = "multi_thread")]
async fn zfs_data_sets_keep_the_contract() {
    zfs_pool("data-sets", None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn zfs_block_mode_keeps_the_contract() {
    zfs_pool("block-mode", Some(FileSystem::Ext4)).await;
}

async fn zfs_pool(name: &str, block_mode: Option<FileSystem>) {
    if no_zfs() {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let zpool = Zpool::make(d.path(), 3 << 30);
    let parent = format!("{}/{name}", zpool.0);
    let options = zfs::ZfsOptions { block_mode, ..Default::default() };
    let open = || zfs::open(&parent, d.path().join(name), options.clone(), launcher(), hold());
    let pool = open().await.unwrap();
    let scratch = d.path().join("scratch");
    std::fs::create_dir(&scratch).unwrap();
    contract::check(&pool, &scratch).await;
    contract::encrypted(&pool, &scratch, &launcher()).await;
    std::fs::remove_dir_all(&scratch).unwrap();
    let children = || out("zfs", &["list", "-H", "-o", "name", "-r", "-t", "all", &parent]);
    let texts = format!("{parent}\n{parent}/descriptions");
    assert_eq!(children(), texts, "all that was made is gone");
    interrupted(&pool, |from, to| {
        let name = |n: &str| format!("{parent}/{n}");
        out("zfs", &["rename", &name(from), &name(to)]);
    })
    .await;
    drop(pool);
    let before = children();
    looked_at(&zfs::look(&parent, d.path().join(name), launcher(), hold()).await.unwrap()).await;
    assert_eq!(children(), before, "whoever only looks changes nothing");
    unmounted(&d.path().join(name).join("meta"));
    let pool = open().await.unwrap();
    after_interruption(&pool).await;
    assert_eq!(children(), texts);
    left_behind(&pool, |from, to| {
        let name = |n: &str| format!("{parent}/{n}");
        out("zfs", &["rename", &name(from), &name(to)]);
    })
    .await;
    // Of a clone that was never made; and one that is somebody else's.
    let taken = uuid::Uuid::new_v4().simple();
    for snapshot in [taken.to_string(), "daily".to_owned()] {
        out("zfs", &["snapshot", &format!("{parent}/descriptions@{snapshot}")]);
    }
    drop(pool);
    let pool = open().await.unwrap();
    pool.settle().await;
    assert_eq!(children(), format!("{texts}\n{parent}/descriptions@daily"));
    out("zfs", &["destroy", &format!("{parent}/descriptions@daily")]);
    assert_eq!(out("zfs", &["get", "-H", "-o", "value", "volmode", &parent]), "dev");
    full_of_things(&pool, &d.path().join(name)).await;
    drop(pool);
    zfs::clear(&parent).await.unwrap();
    zfs::clear(&parent).await.expect("twice is once");
}

/// A volume group in a file on a loop device, removed when dropped.
struct Group {
    name: String,
    id: uuid::Uuid,
    device: mount::Loop,
}

impl Group {
    fn make(below: &Path, size: u64) -> Self {
        let name = format!("karst-test-{}", &uuid::Uuid::new_v4().simple().to_string()[..8]);
        Self::named(below, size, name, uuid::Uuid::from_u128(0xabcd << 96))
    }

    /// One as a pool has it that is alone in its group.
    fn own(below: &Path, size: u64) -> Self {
        let id = uuid::Uuid::new_v4();
        Self::named(below, size, lvm::own_group(id), id)
    }

    fn named(below: &Path, size: u64, name: String, id: uuid::Uuid) -> Self {
        let file = below.join("group");
        std::fs::File::create(&file).unwrap().set_len(size).unwrap();
        let device = mount::attach(&file).unwrap();
        out("vgcreate", &["-q", &name, device.path.to_str().unwrap()]);
        Self { name, id, device }
    }

    fn place(&self) -> lvm::LvmPlace {
        let thin_pool = "thin".to_owned();
        lvm::LvmPlace { group: self.name.clone(), thin_pool, id: self.id }
    }

    fn volumes(&self) -> String {
        out("lvs", &["--noheadings", "-o", "lv_name", &self.name])
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        ran("vgremove", &["-f", "-y", &self.name]);
        ran("pvremove", &["-f", "-y", self.device.path.to_str().unwrap()]);
    }
}

fn no_lvm() -> bool {
    skipped(Optional::DeviceMapper, Path::new("/dev/mapper/control").exists() && ran("dmsetup", &["targets"]))
}

#[tokio::test(flavor = "multi_thread")]
async fn lvm_pool_keeps_the_contract() {
    if no_lvm() {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let group = Group::make(d.path(), 3 << 30);
    // Somebody else's.
    out("lvcreate", &["-y", "-L", "16m", "-n", "other", &group.name]);
    let open = || lvm::open(group.place(), d.path().join("pool"), FileSystem::Ext4, launcher(), hold());
    let pool = open().await.unwrap();
    let scratch = d.path().join("scratch");
    std::fs::create_dir(&scratch).unwrap();
    contract::check(&pool, &scratch).await;
    contract::encrypted(&pool, &scratch, &launcher()).await;
    let left = || group.volumes().split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(left(), ["k0000abcd_descriptions", "other", "thin"], "all that was made is gone");
    let of_group = lvm::pools(&group.name).await.unwrap();
    assert_eq!(of_group, [(group.place().id, "thin".to_owned())]);
    interrupted(&pool, |from, to| {
        out("lvrename", &[&group.name, &format!("k0000abcd_{from}"), &format!("k0000abcd_{to}")]);
    })
    .await;
    drop(pool);
    let before = left();
    let look = lvm::look(group.place(), d.path().join("pool"), launcher(), hold()).await.unwrap();
    looked_at(&look).await;
    drop(look);
    assert_eq!(left(), before, "whoever only looks changes nothing");
    unmounted(&d.path().join("pool/meta"));
    let pool = open().await.unwrap();
    after_interruption(&pool).await;
    left_behind(&pool, |from, to| {
        out("lvrename", &[&group.name, &format!("k0000abcd_{from}"), &format!("k0000abcd_{to}")]);
    })
    .await;
    drop(pool);
    let pool = open().await.unwrap();
    pool.settle().await;
    assert_eq!(left(), ["k0000abcd_descriptions", "other", "thin"]);
    unmounted(&d.path().join("pool/meta"));
    drop(pool);
    let thin = format!("{}/thin", group.name);
    out("lvchange", &["-Zn", &thin]);
    let e = open().await.unwrap_err();
    assert!(e.message.contains("lvchange -Zy"), "what one guest wrote another would read: {e}");
    out("lvchange", &["-Zy", &thin]);

    // XFS, which clones with its own id.
    let root = d.path().join("xfs");
    let pool = lvm::open(group.place(), &root, FileSystem::Xfs, launcher(), hold()).await.unwrap();
    let (a, b) = (id(), id());
    pool.create(a, &volume(Some(ByteSize::mib(320)), Source::Empty)).await.unwrap();
    std::fs::write(pool.locate(a, None).await.unwrap().path.join("x"), b"y").unwrap();
    let copy = volume(Some(ByteSize::mib(400)), Source::Volume { volume: a, snapshot: None });
    pool.create(b, &copy).await.unwrap();
    let at = pool.locate(b, None).await.unwrap().path;
    assert_eq!(std::fs::read(at.join("x")).unwrap(), b"y");
    assert!(rustix::fs::statvfs(&at).unwrap().f_blocks * 4096 > 330 << 20, "grown with its volume");
    for v in [a, b] {
        pool.delete(v).await.unwrap();
    }
    pool.settle().await;
    full_of_things(&pool, &root).await;
    drop(pool);
    for _ in 0..2 {
        lvm::clear(&group.place()).await.unwrap();
    }
    assert_eq!(group.volumes(), "other");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_pool_is_told_and_leaves_nothing() {
    if no_lvm() {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let group = Group::own(d.path(), 128 << 20);
    let root = d.path().join("pool");
    let pool = lvm::open(group.place(), &root, FileSystem::Ext4, launcher(), hold()).await.unwrap();
    let source = d.path().join("raw");
    std::fs::write(&source, vec![7; 160 << 20]).unwrap();
    let disk = NewVolume {
        content: VolumeContent::Block,
        size: None,
        source: Source::Disk {
            path: source,
            format: karst_storage::Format::Raw,
            backing: None,
            size: 160 << 20,
            image: None,
        },
    };
    let v = id();
    let e = pool.create(v, &disk).await.unwrap_err();
    assert!(e.is(ErrorKind::Quota), "{e:?}");
    assert!(pool.inspect(v).await.unwrap_err().is(ErrorKind::NotFound));
    pool.settle().await;
    assert_eq!(group.volumes(), "thin");
    pool.create(v, &volume(Some(ByteSize::mib(16)), Source::Empty)).await.expect("there is room again");
}

const VOLUME: VolumeId = VolumeId(uuid::Uuid::from_u128(1));
const SNAPSHOT: SnapshotId = SnapshotId(uuid::Uuid::from_u128(2));

fn file(at: &Path) -> String {
    std::fs::read_to_string(at.join("which")).unwrap_or_default()
}

fn unmounted(at: &Path) {
    mount::unmount(at, false).unwrap();
}

/// What a survey sees of a pool that was interrupted.
async fn looked_at(pool: &ObjectPool) {
    let found: Vec<_> = pool.list().await.unwrap().into_iter().map(|v| v.id).collect();
    assert_eq!(found, [VOLUME]);
    assert_eq!(pool.snapshots().unwrap().list(VOLUME).await.unwrap()[0].0, SNAPSHOT);
    let texts = pool.descriptions().unwrap();
    assert_eq!(texts.description(Some(VOLUME), 100).await.unwrap().as_deref(), Some("a volume"));
    let refused = texts.describe(Some("other".into()), vec![]).await;
    assert!(refused.is_err(), "it is there for reading only");
}

/// A pool that is removed with what is in it: things that were made of each other.
async fn full_of_things(pool: &ObjectPool, root: &Path) {
    let (a, b, s) = (id(), id(), SnapshotId(uuid::Uuid::new_v4()));
    let size = Some(ByteSize::mib(320));
    pool.create(a, &volume(size, Source::Empty)).await.unwrap();
    pool.snapshots().unwrap().create(a, s).await.unwrap();
    pool.create(b, &volume(size, Source::Volume { volume: a, snapshot: Some(s) })).await.unwrap();
    pool.descriptions().unwrap().describe(Some("a pool".into()), vec![]).await.unwrap();
    pool.locate(b, None).await.unwrap();
    for below in ["meta".to_owned(), format!("volumes/{a}"), format!("volumes/{b}")] {
        unmounted(&root.join(below));
    }
}

/// A daemon that was killed between the renames of a restore, and one in the making of a volume.
async fn interrupted(pool: &ObjectPool, rename: impl Fn(&str, &str)) {
    let size = Some(ByteSize::mib(16));
    pool.create(VOLUME, &volume(size, Source::Empty)).await.unwrap();
    let at = pool.locate(VOLUME, None).await.unwrap().path;
    std::fs::write(at.join("which"), b"old").unwrap();
    pool.snapshots().unwrap().create(VOLUME, SNAPSHOT).await.unwrap();
    let texts = vec![(VOLUME, "a volume".to_owned())];
    pool.descriptions().unwrap().describe(None, texts).await.unwrap();
    let (next, half) = (id(), id());
    let source = || Source::Volume { volume: VOLUME, snapshot: None };
    for (v, text) in [(next, "new"), (half, "half")] {
        pool.create(v, &volume(size, source())).await.unwrap();
        let at = pool.locate(v, None).await.unwrap().path;
        std::fs::write(at.join("which"), text).unwrap();
        rustix::fs::syncfs(std::fs::File::open(&at).unwrap()).unwrap();
        mount::unmount(at.parent().unwrap(), false).unwrap();
    }
    let simple = |v: VolumeId| v.0.simple().to_string();
    rename(&format!("volume_{}", simple(next)), &format!("next_{}", simple(VOLUME)));
    rename(&format!("volume_{}", simple(half)), &format!("work_{}", simple(half)));
    mount::unmount(at.parent().unwrap(), false).unwrap();
    unmounted(&at.ancestors().nth(3).unwrap().join("meta"));
}

/// What kills leave: what was about to take a deleted volume's place, and a mount of what has gone. What is read stays as it was.
async fn left_behind(pool: &ObjectPool, rename: impl Fn(&str, &str)) {
    let size = Some(ByteSize::mib(16));
    let (deleted, next, mounted) = (id(), id(), id());
    for v in [deleted, next, mounted] {
        pool.create(v, &volume(size, Source::Empty)).await.unwrap();
    }
    let at = pool.locate(mounted, None).await.unwrap().path;
    std::fs::write(at.join("which"), b"then").unwrap();
    let reading = pool.contents().unwrap().read(mounted, None).await.unwrap();
    std::fs::write(at.join("which"), b"later").unwrap();
    assert_eq!(file(&reading.located.path), "then");
    assert_eq!(file(&at), "later");
    drop(reading);
    let simple = |v: VolumeId| v.0.simple().to_string();
    rename(&format!("volume_{}", simple(next)), &format!("next_{}", simple(deleted)));
    pool.delete(deleted).await.unwrap();
    rename(&format!("volume_{}", simple(mounted)), &format!("trash_{}", simple(mounted)));
    pool.settle().await;
    assert!(pool.list().await.unwrap().is_empty());
}

async fn after_interruption(pool: &ObjectPool) {
    let at = pool.locate(VOLUME, None).await.unwrap().path;
    assert_eq!(file(&at), "new", "what had begun was completed");
    assert_eq!(pool.list().await.unwrap().len(), 1);
    pool.snapshots().unwrap().restore(VOLUME, SNAPSHOT).await.unwrap();
    assert_eq!(file(&pool.locate(VOLUME, None).await.unwrap().path), "old");
    pool.delete(VOLUME).await.unwrap();
    pool.settle().await;
    assert!(pool.list().await.unwrap().is_empty());
}
