//! Sizes of trees in pools of the kind `dir`, on file systems with project quotas: ext4 and XFS in files. Where the kernel or the
//! programs lack them (the machine that most of this runs on) each test says so; the lab's suite `storage-backends` runs them for real.
#![allow(clippy::disallowed_methods)] // drivers and their tests are the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

use karst_host::{
    overlay::{self, Mapped},
    project_quota::{self, Held, within_limits},
    sandbox::Launcher,
};
use karst_model::{ByteSize, ErrorKind, ImageId, SnapshotId, VolumeId, storage::VolumeContent};
use karst_storage::{FilePool, NewVolume, PoolDriver, Source, contract, release_limits};
use std::{
    io::ErrorKind as Io,
    path::{Path, PathBuf},
    process::Command,
};

const SIZE: ByteSize = ByteSize::mib(8);

fn launcher() -> Launcher {
    let built = env!("CARGO_BIN_EXE_karst-storage-worker").into();
    let program = std::env::var_os("KARST_STORAGE_WORKER").map_or(built, PathBuf::from);
    Launcher { program, args: vec![], id_base: 1_900_100_000 }
}

async fn open_dir(root: &Path) -> FilePool {
    FilePool::directory(root, launcher()).await.unwrap()
}

fn id() -> VolumeId {
    VolumeId(uuid::Uuid::new_v4())
}

fn tree(size: Option<ByteSize>, source: Source) -> NewVolume {
    NewVolume { content: VolumeContent::Filesystem, size, source }
}

/// A file system in a file, unmounted when dropped.
struct Mounted {
    at: PathBuf,
    image: PathBuf,
    _below: tempfile::TempDir,
}

impl Mounted {
    fn mount(&self, options: &str) -> bool {
        let mount = Command::new("mount").arg("-o").arg(options).arg(&self.image).arg(&self.at).status();
        mount.is_ok_and(|s| s.success())
    }

    /// What the pool did last may have it in use for a moment.
    fn unmount(&self) {
        for _ in 0..200 {
            if Command::new("umount").arg(&self.at).output().unwrap().status.success() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        panic!("{} is in use", self.at.display());
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg("--quiet").arg(&self.at).status();
    }
}

/// How a file system with project quotas is made, and mounted with them.
const KINDS: [(&str, &[&str], &str); 2] = [
    ("mkfs.ext4", &["-q", "-F", "-O", "quota,project"], "loop,prjquota"),
    ("mkfs.xfs", &["-q"], "loop,pquota"),
];

/// A fresh one, if this host can have it.
fn fresh((make, args, options): (&str, &[&str], &str)) -> Option<Mounted> {
    if !backends::root() {
        return None;
    }
    let below = tempfile::tempdir().unwrap();
    let mounted = Mounted { at: below.path().join("mnt"), image: below.path().join("image"), _below: below };
    std::fs::create_dir(&mounted.at).unwrap();
    std::fs::File::create(&mounted.image).unwrap().set_len(1 << 30).unwrap();
    let made = Command::new(make).args(args).arg(&mounted.image).status();
    if !made.is_ok_and(|s| s.success()) || !mounted.mount(options) {
        backends::absent(backends::Optional::ProjectQuotas);
        return None;
    }
    if !project_quota::enforced(&mounted.at).unwrap() {
        backends::absent(backends::Optional::ProjectQuotas);
        return None;
    }
    Some(mounted)
}

/// The project of a volume's state.
fn project_of(state: &Path) -> u32 {
    let found = project_quota::of(state).unwrap();
    assert!(found.handed_on && found.id >= 0x6b00_0000, "{found:?}");
    found.id
}

/// Does `work` in a thread of a user of the host.
fn as_user<T: Send>(id: u32, work: impl FnOnce() -> T + Send) -> T {
    use rustix::thread::{Gid, Uid, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
    let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            set_thread_groups(&[]).unwrap();
            set_thread_res_gid(gid, gid, gid).unwrap();
            set_thread_res_uid(uid, uid, uid).unwrap();
            work()
        });
        thread.join().unwrap()
    })
}

fn is_full(e: &std::io::Error) -> bool {
    matches!(e.kind(), Io::QuotaExceeded | Io::StorageFull)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_with_project_quotas_keeps_the_contract_and_its_limits() {
    for kind in KINDS {
        let Some(mounted) = fresh(kind) else { continue };
        let root = mounted.at.join("pool");
        let pool = open_dir(&root).await;
        assert!(pool.supports_quota(), "{}", kind.0);
        let scratch = mounted.at.join("scratch");
        std::fs::create_dir(&scratch).unwrap();
        contract::check(&pool, &scratch).await;
        copies_and_restores_keep_it(&pool, &root).await;
        what_a_kill_left_is_put_right(pool, &root).await;
    }
}

async fn copies_and_restores_keep_it(pool: &FilePool, root: &Path) {
    let (v, copy, first) = (id(), id(), SnapshotId(uuid::Uuid::new_v4()));
    let state = |v: VolumeId| root.join("volumes").join(v.to_string());
    pool.create(v, &tree(Some(SIZE), Source::Empty)).await.unwrap();
    let write = |v: VolumeId, name: &str, mib| {
        let file = state(v).join("rootfs").join(name);
        within_limits(|| contract::fill(&file, mib)).unwrap()
    };
    write(v, "five", 5).unwrap();
    let before = project_of(&state(v));
    let used = pool.usage(v).await.unwrap();
    assert!((5 << 20..7 << 20).contains(&used.used) && used.total == SIZE.0, "{used:?}");
    pool.snapshots().unwrap().create(v, first).await.unwrap();
    assert_eq!(
        project_quota::of(&root.join("snapshots").join(v.to_string()).join(first.0.to_string())).unwrap(),
        project_quota::Project::default(),
        "what a snapshot keeps is not its volume's"
    );
    let of = |size| tree(size, Source::Volume { volume: v, snapshot: None });
    let small = pool.create(id(), &of(Some(ByteSize::mib(2)))).await.unwrap_err();
    assert!(small.is(ErrorKind::Quota) && small.field.as_deref() == Some("size"), "{small:?}");
    pool.create(copy, &of(Some(SIZE))).await.unwrap();
    assert_ne!(project_of(&state(copy)), before);
    assert!(is_full(&write(copy, "more", 10).unwrap_err()));
    write(v, "one", 1).expect("the copy's is not the original's");
    // A restored one, one that was filled from elsewhere, and one that is another now: each with the limit.
    pool.snapshots().unwrap().restore(v, first).await.unwrap();
    assert!(!state(v).join("rootfs/one").exists());
    assert_ne!(project_of(&state(v)), before);
    assert!(is_full(&write(v, "more", 10).unwrap_err()));
    let contents = pool.contents().unwrap();
    let filling = contents.begin(v).await.unwrap();
    let at = filling.directory().join("tree");
    std::fs::create_dir(&at).unwrap();
    assert!(is_full(&within_limits(|| contract::fill(&at.join("large"), 20)).unwrap().unwrap_err()));
    std::fs::remove_file(at.join("large")).unwrap();
    filling.commit().await.unwrap();
    assert!(is_full(&write(v, "more", 20).unwrap_err()));
    contents.replace(v, &Source::Volume { volume: copy, snapshot: None }).await.unwrap();
    assert!(is_full(&write(v, "again", 20).unwrap_err()));
    // One without a size is counted, and gets one while it is in use.
    let free = id();
    pool.create(free, &tree(None, Source::Empty)).await.unwrap();
    write(free, "twelve", 12).unwrap();
    let used = pool.usage(free).await.unwrap();
    assert!(used.used >= 12 << 20 && used.total == 0, "{used:?}");
    let e = pool.resize(free, SIZE).await.unwrap_err();
    assert!(e.is(ErrorKind::Invalid), "{e:?}");
    pool.resize(free, ByteSize::mib(16)).await.unwrap();
    assert!(is_full(&write(free, "more", 10).unwrap_err()));
    let ids: Vec<_> = [v, copy, free].iter().map(|v| project_of(&state(*v))).collect();
    for volume in [v, copy, free] {
        pool.delete(volume).await.unwrap();
    }
    pool.settle().await;
    // XFS takes what was deleted out of its books a moment later.
    for id in ids {
        let mut held = project_quota::held(root, id).unwrap();
        for _ in 0..150 {
            if held == Held::default() {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
            held = project_quota::held(root, id).unwrap();
        }
        assert_eq!(held, Held::default(), "nothing of it is left");
    }
}

async fn what_a_kill_left_is_put_right(pool: FilePool, root: &Path) {
    let (limited, free) = (id(), id());
    let state = |v: VolumeId| root.join("volumes").join(v.to_string());
    pool.create(limited, &tree(Some(SIZE), Source::Empty)).await.unwrap();
    pool.create(free, &tree(None, Source::Empty)).await.unwrap();
    drop(pool);
    let ids = [limited, free].map(|v| project_of(&state(v)));
    // Killed between a limit and its record; and in the midst of a create and a delete.
    project_quota::limit(root, ids[0], Some(1 << 30)).unwrap();
    project_quota::limit(root, ids[1], Some(1 << 30)).unwrap();
    let mut left = vec![];
    for (n, half) in ["tmp/half", "trash/gone"].into_iter().enumerate() {
        let at = root.join(half);
        std::fs::create_dir(&at).unwrap();
        let id = 0x6b12_3450 + n as u32;
        project_quota::put(&at, id).unwrap();
        std::fs::create_dir(at.join("rootfs")).unwrap();
        project_quota::limit(root, id, Some(1 << 20)).unwrap();
        left.push(id);
    }
    let pool = open_dir(root).await;
    pool.settle().await;
    for id in left {
        assert_eq!(project_quota::held(root, id).unwrap(), Held::default());
    }
    let limit = |id| project_quota::held(root, id).unwrap().limit;
    assert_eq!((limit(ids[0]), limit(ids[1])), (Some(SIZE.0 + (1 << 20)), None));
    // The end of the daemon, of which DIR goes next.
    release_limits(root);
    assert_eq!(limit(ids[0]), None);
    pool.clear().await.unwrap();
    assert_eq!(project_quota::held(root, ids[0]).unwrap(), Held::default());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_overlay_holds_the_limit_before_a_guest() {
    for kind in KINDS {
        let Some(mounted) = fresh(kind) else { continue };
        let root = mounted.at.join("pool");
        let pool = open_dir(&root).await;
        let source = mounted.at.join("source");
        std::fs::create_dir(&source).unwrap();
        contract::sample_tree(&source);
        contract::fill(&source.join("large"), 12).unwrap();
        let v = id();
        let of = Source::Tree { path: source.clone(), image: Some(ImageId(uuid::Uuid::new_v4())) };
        pool.create(v, &tree(Some(SIZE), of.clone())).await.expect("what is the image's does not count");
        let Some(layers) = pool.locate(v, None).await.unwrap().layers else {
            backends::absent(backends::Optional::MappedOverlays);
            continue;
        };
        // As the guest sees it: a mount with its ids, and its root without the host's rights.
        let ids = Mapped { base: 1_800_000_000, count: 70_000 };
        let at = overlay::Held::new(overlay::mount(&layers, true, Some(ids)).unwrap());
        let more = at.path().join("more");
        let e = as_user(ids.base, || contract::fill(&more, 20)).unwrap_err();
        assert!(is_full(&e), "{e:?}");
        as_user(ids.base, || std::fs::remove_file(&more)).unwrap();
        drop(at);
        // As files of a stopped one are written.
        let at = pool.open_tree(v).await.unwrap();
        let path = at.path.clone();
        let e = within_limits(|| contract::fill(&path.join("more"), 20)).unwrap().unwrap_err();
        assert!(is_full(&e), "{e:?}");
        std::fs::remove_file(path.join("more")).unwrap();
        // All that changes layers goes on as it does elsewhere: a copy up, a renamed directory, a whiteout that is written over.
        std::fs::write(path.join("home/user/file"), b"changed").unwrap();
        std::fs::rename(path.join("home"), path.join("moved")).unwrap();
        std::fs::remove_file(path.join("etc/empty")).unwrap();
        std::fs::write(path.join("etc/empty"), b"new").unwrap();
        std::fs::remove_dir_all(path.join("many")).unwrap();
        std::fs::create_dir(path.join("many")).unwrap();
        // What the file system is to its guest is its limit.
        let space = rustix::fs::statvfs(&path).unwrap();
        let total = space.f_blocks * space.f_frsize;
        assert!((SIZE.0..SIZE.0 + (2 << 20)).contains(&total), "{total}");
        // Its copy, and a plain one, which would have to hold the image too.
        drop(at);
        let copy = id();
        pool.create(copy, &tree(Some(SIZE), Source::Volume { volume: v, snapshot: None })).await.unwrap();
        let layers = pool.locate(copy, None).await.unwrap().layers.unwrap();
        let at = overlay::Held::new(overlay::mount(&layers, true, Some(ids)).unwrap());
        let path = at.path();
        assert_eq!(std::fs::read(path.join("etc/empty")).unwrap(), b"new");
        assert!(is_full(&as_user(ids.base, || contract::fill(&path.join("more"), 20)).unwrap_err()));
        drop(at);
        let plain = pool.create(id(), &tree(Some(SIZE), of.in_full(true))).await.unwrap_err();
        assert!(plain.is(ErrorKind::Quota), "{plain:?}");
        assert!(pool.flatten(v).await.unwrap_err().is(ErrorKind::Quota));
        assert!(pool.locate(v, None).await.unwrap().layers.is_some(), "it is as it was");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_them_a_size_is_refused_with_the_fix() {
    for kind in KINDS {
        let Some(mounted) = fresh(kind) else { continue };
        mounted.unmount();
        assert!(mounted.mount("loop"));
        let root = mounted.at.join("pool");
        let pool = open_dir(&root).await;
        let old = id();
        pool.create(old, &tree(None, Source::Empty)).await.unwrap();
        let e = pool.create(id(), &tree(Some(SIZE), Source::Empty)).await.unwrap_err();
        assert!(e.is(ErrorKind::Unsupported) && e.message.contains("prjquota"), "{e:?}");
        drop(pool);
        mounted.unmount();
        assert!(mounted.mount(kind.2));
        // What is there from before is not counted, and says so.
        let pool = open_dir(&root).await;
        let e = pool.resize(old, SIZE).await.unwrap_err();
        assert!(e.is(ErrorKind::Conflict) && e.message.contains("copy"), "{e:?}");
        let copy = id();
        pool.create(copy, &tree(Some(SIZE), Source::Volume { volume: old, snapshot: None })).await.unwrap();
        // Somebody else's project around the pool is left alone.
        drop(pool);
        let within = mounted.at.join("within");
        std::fs::create_dir(&within).unwrap();
        project_quota::put(&within, 7).unwrap();
        let pool = open_dir(&within.join("pool")).await;
        let e = pool.create(id(), &tree(Some(SIZE), Source::Empty)).await.unwrap_err();
        assert!(e.is(ErrorKind::Unsupported) && e.message.contains("project 7"), "{e:?}");
        pool.create(id(), &tree(None, Source::Empty)).await.unwrap();
    }
}
