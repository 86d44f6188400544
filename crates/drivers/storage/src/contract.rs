//! The contract of [`PoolDriver`]: one suite that each kind of pool passes on a real backend. Panics at the first breach.

mod encrypted;

pub use encrypted::encrypted;

use crate::{Format, NewVolume, OpenTree, PoolDriver, Source};
use karst_host::{Program, project_quota::within_limits, run};
use karst_model::{ByteSize, ErrorKind, ImageId, SnapshotId, VolumeId, storage::VolumeContent};
use std::{
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
};

/// Runs the suite. `scratch` is an empty directory, on the file system where images would lie. Needs root.
pub async fn check(pool: &dyn PoolDriver, scratch: &Path) {
    trees(pool, scratch).await;
    disks(pool, scratch).await;
    disk_layers(pool).await;
    refusals(pool, scratch).await;
    limits(pool, scratch).await;
    snapshots(pool, scratch).await;
    contents(pool, scratch).await;
    full_trees(pool, scratch).await;
    full_disks(pool, scratch).await;
    descriptions(pool).await;
    assert!(pool.list().await.unwrap().is_empty(), "each part removed what it made");
    let space = pool.space().await.unwrap();
    assert!(space.total > 0 && space.used <= space.total, "{space:?}");
}

/// Descriptions lie beside their volumes and go with them.
async fn descriptions(pool: &dyn PoolDriver) {
    let Some(texts) = pool.descriptions() else { return };
    let new = NewVolume { content: VolumeContent::Filesystem, size: None, source: Source::Empty };
    let ids: Vec<VolumeId> = (0..6).map(|_| id()).collect();
    for volume in &ids {
        pool.create(*volume, &new).await.unwrap();
    }
    let all: Vec<_> = ids.iter().map(|id| (*id, format!("text of {id}"))).collect();
    texts.describe(Some("the pool".into()), all).await.unwrap();
    texts.describe(None, vec![(ids[0], "another".into()), (id(), "of nothing".into())]).await.unwrap();
    assert_eq!(texts.description(None, 100).await.unwrap().as_deref(), Some("the pool"));
    assert_eq!(texts.description(Some(ids[0]), 100).await.unwrap().as_deref(), Some("another"));
    assert_eq!(texts.description(Some(ids[5]), 100).await.unwrap(), Some(format!("text of {}", ids[5])));
    assert_eq!(texts.description(Some(ids[0]), 6).await.unwrap(), None, "too long is none");
    if let Some(snapshots) = pool.snapshots() {
        let taken = SnapshotId(uuid::Uuid::new_v4());
        snapshots.create(ids[0], taken).await.unwrap();
        texts.describe(None, vec![(ids[0], "since then".into())]).await.unwrap();
        snapshots.restore(ids[0], taken).await.unwrap();
        assert_eq!(texts.description(Some(ids[0]), 100).await.unwrap().as_deref(), Some("since then"));
    }
    for volume in ids {
        pool.delete(volume).await.unwrap();
        assert_eq!(texts.description(Some(volume), 100).await.unwrap(), None);
    }
    pool.settle().await;
}

fn id() -> VolumeId {
    VolumeId(uuid::Uuid::new_v4())
}

/// A tree with everything that a root file system can hold.
pub fn sample_tree(at: &Path) {
    let write = |name: &str, text: &[u8], mode: u32, owner: u32| {
        let path = at.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        std::os::unix::fs::chown(&path, Some(owner), Some(owner)).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
    };
    write("bin/su", b"setuid", 0o4755, 0);
    write("home/user/file", &vec![7; 100_000], 0o640, 1000);
    write("etc/empty", b"", 0o600, 65_534);
    std::fs::hard_link(at.join("bin/su"), at.join("home/user/su")).unwrap();
    symlink("/bin/su", at.join("etc/link")).unwrap();
    let sparse = std::fs::File::create(at.join("sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    sparse.write_all_at(b"end", (64 << 20) - 3).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, at.join("fifo"), rustix::fs::FileType::Fifo, 0o620.into(), 0)
        .unwrap();
    // cap_net_raw+ep, as ping carries it.
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(at.join("home/user/file"), "security.capability", &capability, flags).unwrap();
    for i in 0..300 {
        write(&format!("many/{}/{i}", i % 20), format!("{i}").as_bytes(), 0o644, i);
    }
    std::fs::set_permissions(at.join("home"), PermissionsExt::from_mode(0o500)).unwrap();
}

/// Everything that two copies of a tree must have in common, as lines.
pub fn describe(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    // How many names a file has in the tree; it may have others elsewhere.
    let mut names = std::collections::HashMap::<_, u64>::new();
    let mut waiting = vec![PathBuf::new()];
    while let Some(dir) = waiting.pop() {
        for entry in std::fs::read_dir(root.join(&dir)).unwrap() {
            let path = dir.join(entry.unwrap().file_name());
            let full = root.join(&path);
            let m = std::fs::symlink_metadata(&full).unwrap();
            let content = match m.is_file() {
                true => {
                    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
                    let mut sum = 0u64;
                    for piece in std::fs::read(&full).unwrap().chunks(ZEROS.len()) {
                        sum = sum.wrapping_mul(31).wrapping_add(piece.len() as u64);
                        // Most of a sparse file; byte by byte that takes minutes where all is emulated.
                        if piece != &ZEROS[..piece.len()] {
                            sum = piece.iter().fold(sum, |s, b| s.wrapping_mul(31).wrapping_add((*b).into()));
                        }
                    }
                    sum
                }
                false => 0,
            };
            let target = std::fs::read_link(&full).unwrap_or_default();
            let mut value = [0u8; 64];
            let n = rustix::fs::lgetxattr(&full, "security.capability", &mut value).unwrap_or(0);
            *names.entry((m.dev(), m.ino())).or_default() += 1;
            let line = format!(
                "{path:?} {:o} {}:{} {} {content} {target:?} {} {:?}",
                m.mode(),
                m.uid(),
                m.gid(),
                if m.is_file() { m.len() } else { 0 },
                m.mtime(),
                &value[..n],
            );
            lines.push((line, (m.dev(), m.ino())));
            if m.is_dir() {
                waiting.push(path);
            }
        }
    }
    let mut lines: Vec<_> =
        lines.into_iter().map(|(line, file)| format!("{line} {}", names[&file])).collect();
    lines.sort();
    lines
}

async fn trees(pool: &dyn PoolDriver, scratch: &Path) {
    let source = scratch.join("tree");
    std::fs::create_dir(&source).unwrap();
    sample_tree(&source);
    let image = ImageId(uuid::Uuid::new_v4());
    let new = NewVolume {
        content: VolumeContent::Filesystem,
        size: None,
        source: Source::Tree { path: source.clone(), image: Some(image) },
    };
    let a = id();
    let made = pool.create(a, &new).await.unwrap();
    assert_eq!((made.id, made.format), (a, Format::Directory));
    let at = pool.open_tree(a).await.unwrap();
    assert_eq!(describe(&at.path), describe(&source), "a copy is equal in all that counts");
    let sparse = std::fs::metadata(at.path.join("sparse")).unwrap();
    assert!(sparse.blocks() * 512 < 1 << 20, "holes stay holes");
    unreachable_by_users(&at.path);

    // Again: the same volume, with what was changed in it since.
    std::fs::write(at.path.join("mine"), b"x").unwrap();
    assert_eq!(pool.create(a, &new).await.unwrap(), made);
    assert!(at.path.join("mine").exists(), "create of a volume that is there touches nothing");
    assert!(!source.join("mine").exists());
    let disk =
        NewVolume { content: VolumeContent::Block, size: Some(ByteSize::mib(1)), source: Source::Empty };
    assert!(pool.create(a, &disk).await.unwrap_err().is(ErrorKind::Conflict));

    // Of one that lies over its image only what differs counts, and some file systems count with a delay of seconds.
    let whole = pool.locate(a, None).await.unwrap().layers.is_none();
    let mut usage = pool.usage(a).await.unwrap();
    for _ in 0..300 {
        if !whole || usage.used >= 100_000 && usage.inodes_used > 300 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        usage = pool.usage(a).await.unwrap();
    }
    assert!(
        usage.used < 10 << 20 && (!whole || usage.used >= 100_000 && usage.inodes_used > 300),
        "{usage:?}"
    );
    if !pool.supports_quota() {
        assert!(pool.resize(a, ByteSize::gib(1)).await.unwrap_err().is(ErrorKind::Unsupported));
    }
    assert_eq!(pool.list().await.unwrap(), std::slice::from_ref(&made));
    let b = id();
    let empty = NewVolume { content: VolumeContent::Filesystem, size: None, source: Source::Empty };
    pool.create(b, &empty).await.unwrap();
    assert_eq!(pool.list().await.unwrap().len(), 2);
    // Two at once for one id: both answer the one volume.
    let c = id();
    let (x, y) = tokio::join!(pool.create(c, &new), pool.create(c, &new));
    assert_eq!(x.unwrap(), y.unwrap());
    for v in [a, b, c, a] {
        pool.delete(v).await.unwrap();
        assert!(pool.inspect(v).await.unwrap_err().is(ErrorKind::NotFound));
    }
    let copied = NewVolume { source: Source::Tree { path: source.clone(), image: None }, ..new };
    pool.create(a, &copied).await.unwrap();
    let at = pool.open_tree(a).await.unwrap();
    assert_eq!(describe(&at.path), describe(&source));
    drop(at);
    let at = pool.locate(a, None).await.unwrap();
    pool.delete(a).await.unwrap();
    for _ in 0..2 {
        pool.forget_image(image).await.unwrap();
    }
    pool.settle().await;
    assert!(!at.path.exists());
    std::fs::remove_dir_all(source).unwrap();
}

/// Some directory above is closed to everybody but root.
fn unreachable_by_users(path: &Path) {
    let closed = path.ancestors().skip(1).any(|p| {
        let m = std::fs::symlink_metadata(p).unwrap();
        m.uid() == 0 && m.mode() & 0o077 == 0
    });
    assert!(closed, "setuid files in {path:?} can be reached by users of the host");
}

const IMAGE: ImageId = ImageId(uuid::Uuid::from_u128(77));

fn disk_of(image: &Path) -> Source {
    let path = image.to_owned();
    Source::Disk { path, format: Format::Qcow2, backing: None, size: 8 << 20, image: Some(IMAGE) }
}

async fn disks(pool: &dyn PoolDriver, scratch: &Path) {
    let image = scratch.join("image.qcow2");
    let raw = scratch.join("image.raw");
    let content: Vec<u8> = (0..1u32 << 20).map(|i| (i / 4096) as u8 ^ i as u8).collect();
    let file = std::fs::File::create(&raw).unwrap();
    file.write_all_at(&content, 1 << 20).unwrap();
    file.set_len(8 << 20).unwrap();
    let convert = run(Program::QemuImg).args(["convert", "-f", "raw", "-O", "qcow2"]);
    convert.arg(&raw).arg(&image).ok().await.unwrap();
    std::fs::set_permissions(&image, PermissionsExt::from_mode(0o444)).unwrap();

    let source = disk_of(&image);
    let new = NewVolume { content: VolumeContent::Block, size: Some(ByteSize::mib(16)), source };
    let a = id();
    let made = pool.create(a, &new).await.unwrap();
    assert_eq!(made.size, Some(ByteSize::mib(16)));
    assert_eq!(pool.create(a, &new).await.unwrap(), made);
    let user = 1_999_999_999;
    let at = pool.locate(a, Some(user)).await.unwrap();
    let m = std::fs::metadata(&at.path).unwrap();
    assert_eq!((m.uid(), m.mode() & 0o777), (user, 0o600), "the guest's own user has it, and nobody else");
    let dir = std::fs::metadata(at.path.parent().unwrap()).unwrap();
    assert_eq!((dir.gid(), dir.mode() & 0o777), (user, 0o710));

    // The clone lives on without the image, and reads as it, then as zeros.
    pool.forget_image(IMAGE).await.unwrap();
    std::fs::remove_file(&image).unwrap();
    let flat = scratch.join("flat.raw");
    let format = match made.format {
        Format::Qcow2 => "qcow2",
        _ => "raw",
    };
    let convert = run(Program::QemuImg).args(["convert", "-f", format, "-O", "raw"]);
    convert.arg(&at.path).arg(&flat).ok().await.unwrap();
    let got = std::fs::read(&flat).unwrap();
    assert_eq!(got.len(), 16 << 20);
    assert_eq!(got[1 << 20..2 << 20], content);
    assert!(got[..1 << 20].iter().chain(&got[2 << 20..]).all(|b| *b == 0));
    assert!(pool.usage(a).await.unwrap().used < 4 << 20);

    assert_eq!(pool.resize(a, ByteSize::mib(32)).await.unwrap().size, Some(ByteSize::mib(32)));
    assert_eq!(pool.inspect(a).await.unwrap().size, Some(ByteSize::mib(32)));
    let shrunk = pool.resize(a, ByteSize::mib(8)).await.unwrap_err();
    assert!(shrunk.is(ErrorKind::Invalid) && shrunk.field.as_deref() == Some("size"), "{shrunk:?}");
    assert_eq!(pool.inspect(a).await.unwrap().size, Some(ByteSize::mib(32)), "and nothing changed");

    let b = id();
    let empty =
        NewVolume { content: VolumeContent::Block, size: Some(ByteSize::gib(10)), source: Source::Empty };
    pool.create(b, &empty).await.unwrap();
    assert!(pool.usage(b).await.unwrap().used < 1 << 20, "thin");
    pool.resize(b, ByteSize::gib(11)).await.unwrap();
    let at = pool.locate(b, None).await.unwrap();
    let mut disk = std::fs::File::open(&at.path).unwrap();
    assert_eq!(std::io::Seek::seek(&mut disk, std::io::SeekFrom::End(0)).unwrap(), 11 << 30);
    drop(disk);
    for v in [a, b] {
        pool.delete(v).await.unwrap();
    }
    pool.settle().await;
    for f in [raw, flat] {
        std::fs::remove_file(f).unwrap();
    }
}

/// Layers of a disk, where volumes are files: what nobody names is not there, what is in layers is nothing else than a disk, and a
/// disk that is one file again is one like any other.
async fn disk_layers(pool: &dyn PoolDriver) {
    let Some(layers) = pool.disk_layers() else { return };
    let v = id();
    let gone = layers.chain(v).await.unwrap_err();
    assert!(gone.is(ErrorKind::NotFound), "{gone}");
    let size = Some(ByteSize::mib(16));
    let new = NewVolume { content: VolumeContent::Block, size, source: Source::Empty };
    pool.create(v, &new).await.unwrap();
    assert_eq!(layers.chain(v).await.unwrap(), [0]);
    let user = 1_999_999_998;
    for number in [2, 2, 5] {
        layers.add(v, number).await.unwrap();
    }
    assert!(layers.add(v, 3).await.unwrap_err().is(ErrorKind::Invalid), "numbers grow");
    let at = pool.locate(v, Some(user)).await.unwrap();
    assert_eq!((at.format, at.chain.number), (Format::Qcow2, 5));
    let below: Vec<_> = at.chain.below.iter().map(|f| (f.number, f.format)).collect();
    assert_eq!(below, [(2, Format::Qcow2), (0, Format::Raw)]);
    for path in at.chain.below.iter().map(|f| &f.path).chain([&at.path]) {
        let m = std::fs::metadata(path).unwrap();
        assert_eq!((m.uid(), m.mode() & 0o777), (user, 0o600), "{}", path.display());
    }
    assert_eq!(pool.resize(v, ByteSize::mib(32)).await.unwrap().size, Some(ByteSize::mib(32)));
    assert!(pool.usage(v).await.unwrap().used < 4 << 20);

    // What would make another disk of it, or would read a part of it, does nothing.
    let other = id();
    let copy = NewVolume { size: None, source: Source::Volume { volume: v, snapshot: None }, ..new };
    let snapshots = pool.snapshots().unwrap();
    let refused = [
        pool.create(other, &copy).await.err(),
        snapshots.create(v, SnapshotId(id().0)).await.err(),
        pool.contents().unwrap().read(v, None).await.err(),
        pool.contents().unwrap().replace(v, &Source::Empty).await.err(),
    ];
    for e in refused {
        let e = e.unwrap();
        assert!(e.is(ErrorKind::Conflict) && e.message.contains("layers"), "{e}");
    }
    assert!(pool.inspect(other).await.unwrap_err().is(ErrorKind::NotFound));

    for _ in 0..2 {
        layers.take_back(v, 5).await.unwrap();
    }
    assert!(layers.take_back(v, 0).await.is_ok() && layers.chain(v).await.unwrap() == [0, 2]);
    layers.add(v, 6).await.unwrap();
    for _ in 0..2 {
        layers.keep(v, &[0, 6]).await.unwrap();
    }
    assert_eq!(layers.chain(v).await.unwrap(), [0, 6]);
    assert!(layers.keep(v, &[9]).await.unwrap_err().is(ErrorKind::Invalid));
    layers.keep(v, &[6]).await.unwrap();
    let at = pool.locate(v, None).await.unwrap();
    assert_eq!((at.chain.number, at.chain.below.len(), at.format), (6, 0, Format::Qcow2));
    pool.resize(v, ByteSize::mib(48)).await.unwrap();

    // It is one file, under whatever name.
    pool.create(other, &copy).await.unwrap();
    assert_eq!(pool.inspect(other).await.unwrap().size, Some(ByteSize::mib(48)));
    let snapshot = SnapshotId(id().0);
    snapshots.create(v, snapshot).await.unwrap();
    snapshots.restore(v, snapshot).await.unwrap();
    layers.add(v, 7).await.unwrap();
    assert_eq!(layers.chain(v).await.unwrap().last(), Some(&7));
    for v in [v, other] {
        pool.delete(v).await.unwrap();
    }
    pool.settle().await;
}

async fn refusals(pool: &dyn PoolDriver, scratch: &Path) {
    let v = id();
    for gone in [pool.usage(v).await.err(), pool.inspect(v).await.err(), pool.locate(v, None).await.err()] {
        assert!(gone.unwrap().is(ErrorKind::NotFound));
    }
    assert!(pool.resize(v, ByteSize::gib(1)).await.unwrap_err().is(ErrorKind::NotFound));
    pool.delete(v).await.unwrap();
    let disk = |size, source| NewVolume { content: VolumeContent::Block, size, source };
    let image = || Source::Disk {
        path: scratch.join("none"),
        format: Format::Qcow2,
        backing: None,
        size: 1 << 30,
        image: Some(IMAGE),
    };
    let tree = Source::Tree { path: scratch.to_owned(), image: None };
    for (what, new) in [
        ("an empty disk without size", disk(None, Source::Empty)),
        ("a disk of half a sector", disk(Some(ByteSize(777)), Source::Empty)),
        ("an absurd disk", disk(Some(ByteSize(u64::MAX)), Source::Empty)),
        ("smaller than its image", disk(Some(ByteSize::mib(1)), image())),
        ("a disk of a tree", disk(Some(ByteSize::mib(1)), tree)),
    ] {
        let e = pool.create(v, &new).await.unwrap_err();
        assert!(e.is(ErrorKind::Invalid) && e.field.is_some(), "{what}: {e:?}");
        assert!(pool.inspect(v).await.unwrap_err().is(ErrorKind::NotFound), "{what}: nothing is left");
    }
    assert!(pool.create(v, &disk(None, image())).await.is_err(), "a source that is not there");
    assert!(pool.inspect(v).await.unwrap_err().is(ErrorKind::NotFound));
    pool.settle().await;
}

fn tree(size: Option<ByteSize>, source: Source) -> NewVolume {
    NewVolume { content: VolumeContent::Filesystem, size, source }
}

/// Limits of trees hold, or are refused.
async fn limits(pool: &dyn PoolDriver, scratch: &Path) {
    let (v, new) = (id(), tree(Some(ByteSize::mib(8)), Source::Empty));
    if !pool.supports_quota() {
        let e = pool.create(v, &new).await.unwrap_err();
        assert!(e.is(ErrorKind::Unsupported) && e.field.as_deref() == Some("size"), "{e:?}");
        return;
    }
    pool.create(v, &new).await.unwrap();
    let at = pool.locate(v, None).await.unwrap().path;
    // As a guest does, which has no right to pass over limits.
    let fill = |name: &str, mib| within_limits(|| fill(&at.join(name), mib)).unwrap();
    fill("fits", 5).unwrap();
    let e = fill("does-not", 40).unwrap_err();
    assert!(
        matches!(e.kind(), std::io::ErrorKind::QuotaExceeded | std::io::ErrorKind::StorageFull),
        "the limit holds: {e:?}"
    );
    std::fs::remove_file(at.join("does-not")).unwrap();
    assert_eq!(pool.usage(v).await.unwrap().total, 8 << 20);
    let small = pool.resize(v, ByteSize::mib(1)).await.unwrap_err();
    assert!(small.is(ErrorKind::Invalid) && small.field.as_deref() == Some("size"), "{small:?}");
    assert_eq!(pool.resize(v, ByteSize::mib(64)).await.unwrap().size, Some(ByteSize::mib(64)));
    fill("fits-now", 40).unwrap();
    let _ = scratch;
    pool.delete(v).await.unwrap();
    pool.settle().await;
}

/// Writes so many MiB that no file system can make smaller.
///
/// # Errors
/// The system's.
pub fn fill(file: &Path, mib: u64) -> std::io::Result<()> {
    let file = std::fs::File::create(file)?;
    let piece: Vec<u8> = (0..1u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    (0..mib).try_for_each(|i| {
        file.write_all_at(&piece, i << 20)?;
        file.sync_data()
    })
}

/// A tree as others are given it to work on.
async fn opened(pool: &dyn PoolDriver, v: VolumeId) -> OpenTree {
    pool.open_tree(v).await.unwrap()
}

/// Snapshots, of a tree that is an image's and of one that is not; the image is forgotten as soon as there is a volume of it.
async fn snapshots(pool: &dyn PoolDriver, scratch: &Path) {
    for image in [None, Some(IMAGE)] {
        snapshots_of(pool, scratch, image).await;
    }
}

async fn snapshots_of(pool: &dyn PoolDriver, scratch: &Path, image: Option<ImageId>) {
    let Some(snapshots) = pool.snapshots() else { return };
    let source = scratch.join("tree");
    std::fs::create_dir(&source).unwrap();
    sample_tree(&source);
    let (v, first, second) = (id(), snapshot(), snapshot());
    let made = tree(None, Source::Tree { path: source.clone(), image });
    pool.create(v, &made).await.unwrap();
    pool.forget_image(IMAGE).await.unwrap();
    let at = opened(pool, v).await;
    let path = &at.path;
    for _ in 0..2 {
        snapshots.create(v, first).await.unwrap();
    }
    let then = describe(path);
    std::fs::write(path.join("later"), b"x").unwrap();
    std::fs::remove_dir_all(path.join("many")).unwrap();
    // What was there comes again with something else in it, and a directory gets another name.
    std::fs::create_dir(path.join("many")).unwrap();
    std::fs::write(path.join("many/new"), b"x").unwrap();
    std::fs::rename(path.join("home/user"), path.join("home/moved")).unwrap();
    let later = describe(path);
    drop(at);
    snapshots.create(v, second).await.unwrap();
    snapshots.create(v, first).await.expect("twice is once");
    assert_eq!(snapshots.list(v).await.unwrap().len(), 2);
    let read = pool.contents().unwrap().read(v, Some(first)).await.unwrap();
    assert_eq!(describe(&read.located.path), then);
    unreachable_by_users(&read.located.path);
    drop(read);
    for (back, what) in [(first, &then), (second, &later), (first, &then), (first, &then)] {
        snapshots.restore(v, back).await.unwrap();
        let at = opened(pool, v).await;
        assert_eq!(&describe(&at.path), what);
        std::fs::write(at.path.join("changed"), b"after").unwrap();
    }
    let copy = id();
    let of = |snapshot| tree(None, Source::Volume { volume: v, snapshot });
    pool.create(copy, &of(Some(second))).await.unwrap();
    let at = opened(pool, copy).await;
    assert_eq!(describe(&at.path), later);
    std::fs::write(at.path.join("mine"), b"own").unwrap();
    assert!(!opened(pool, v).await.path.join("mine").exists());
    assert!(pool.create(id(), &of(Some(snapshot()))).await.unwrap_err().is(ErrorKind::NotFound));
    assert!(snapshots.restore(v, snapshot()).await.unwrap_err().is(ErrorKind::NotFound));
    assert!(snapshots.create(id(), first).await.unwrap_err().is(ErrorKind::NotFound));
    for _ in 0..2 {
        snapshots.delete(v, first).await.unwrap();
        snapshots.delete(id(), first).await.unwrap();
    }
    assert_eq!(snapshots.list(v).await.unwrap().len(), 1);
    pool.delete(v).await.unwrap();
    assert!(snapshots.list(v).await.unwrap_err().is(ErrorKind::NotFound));
    assert_eq!(describe(&at.path).len(), later.len() + 1, "a copy does not need what it was made of");
    // One that stands alone is the same.
    let mine = describe(&at.path);
    drop(at);
    for _ in 0..2 {
        pool.flatten(copy).await.unwrap();
        assert_eq!(describe(&pool.locate(copy, None).await.unwrap().path), mine);
    }
    pool.delete(copy).await.unwrap();
    pool.settle().await;
    std::fs::remove_dir_all(source).unwrap();
}

fn snapshot() -> SnapshotId {
    SnapshotId(uuid::Uuid::new_v4())
}

/// The bytes of a disk of the pool.
async fn bytes(pool: &dyn PoolDriver, v: VolumeId, at: Option<SnapshotId>, scratch: &Path) -> Vec<u8> {
    let reading = pool.contents().unwrap().read(v, at).await.unwrap();
    let flat = scratch.join("flat");
    let format = if reading.located.format == Format::Qcow2 { "qcow2" } else { "raw" };
    let convert = run(Program::QemuImg).args(["convert", "-U", "-f", format, "-O", "raw"]);
    convert.arg(&reading.located.path).arg(&flat).ok().await.unwrap();
    let bytes = std::fs::read(&flat).unwrap();
    std::fs::remove_file(flat).unwrap();
    bytes
}

/// Contents that come from elsewhere, and snapshots of disks.
async fn contents(pool: &dyn PoolDriver, scratch: &Path) {
    let (Some(contents), Some(snapshots)) = (pool.contents(), pool.snapshots()) else { return };
    let (image, raw) = (scratch.join("image.qcow2"), scratch.join("image.raw"));
    std::fs::write(&raw, vec![9; 8 << 20]).unwrap();
    let convert = run(Program::QemuImg).args(["convert", "-f", "raw", "-O", "qcow2"]);
    convert.arg(&raw).arg(&image).ok().await.unwrap();
    std::fs::set_permissions(&image, PermissionsExt::from_mode(0o444)).unwrap();
    let v = id();
    let size = Some(ByteSize::mib(8));
    let new = NewVolume { content: VolumeContent::Block, size, source: disk_of(&image) };
    pool.create(v, &new).await.unwrap();
    let (first, second) = (snapshot(), snapshot());
    snapshots.create(v, first).await.unwrap();
    let filling = contents.begin(v).await.unwrap();
    std::fs::write(filling.directory().join("disk.img"), vec![5; 1000]).unwrap();
    drop(filling);
    assert_eq!(bytes(pool, v, None, scratch).await, vec![9; 8 << 20], "what is dropped changes nothing");
    let filling = contents.begin(v).await.unwrap();
    std::fs::write(filling.directory().join("disk.img"), vec![5; (12 << 20) - 5]).unwrap();
    assert_eq!(filling.commit().await.unwrap().size, Some(ByteSize::mib(12)));
    snapshots.create(v, second).await.unwrap();
    let got = bytes(pool, v, None, scratch).await;
    assert!(got.len() == 12 << 20 && got[..(12 << 20) - 5].iter().all(|b| *b == 5));
    assert_eq!(got[(12 << 20) - 5..], [0; 5]);
    assert_eq!(snapshots.restore(v, first).await.unwrap().size, size);
    assert_eq!(bytes(pool, v, None, scratch).await, vec![9; 8 << 20]);
    assert_eq!(bytes(pool, v, Some(second), scratch).await, got);
    let user = 1_999_999_998;
    let at = pool.locate(v, Some(user)).await.unwrap();
    assert_eq!(std::fs::metadata(&at.path).unwrap().uid(), user);

    // A copy of a clone, of a snapshot, of another pool's disk, each larger than what it is of.
    let larger = |source| NewVolume { content: VolumeContent::Block, size: Some(ByteSize::mib(20)), source };
    let (a, b, c) = (id(), id(), id());
    pool.create(a, &larger(Source::Volume { volume: v, snapshot: None })).await.unwrap();
    pool.create(b, &larger(Source::Volume { volume: v, snapshot: Some(second) })).await.unwrap();
    let overlay = scratch.join("overlay.qcow2");
    let create = run(Program::QemuImg).args(["create", "-q", "-f", "qcow2", "-F", "qcow2"]);
    let create = create.arg("-o").arg("backing_file=base.img,backing_fmt=qcow2").arg("-u");
    create.arg(&overlay).arg("8M").ok().await.unwrap();
    let elsewhere = Source::Disk {
        path: overlay.clone(),
        format: Format::Qcow2,
        backing: Some(image.clone()),
        size: 8 << 20,
        image: None,
    };
    pool.create(c, &larger(elsewhere.clone())).await.unwrap();
    for (volume, first) in [(a, 9), (b, 5), (c, 9)] {
        let got = bytes(pool, volume, None, scratch).await;
        assert_eq!((got.len(), got[0], got[20 << 19]), (20 << 20, first, if first == 5 { 5 } else { 0 }));
    }
    contents.replace(b, &elsewhere).await.unwrap();
    contents.replace(b, &elsewhere).await.expect("twice is once");
    assert_eq!(bytes(pool, b, None, scratch).await, vec![9; 8 << 20]);
    let plain =
        Source::Disk { path: raw.clone(), format: Format::Raw, backing: None, size: 8 << 20, image: None };
    contents.replace(a, &plain).await.unwrap();
    assert_eq!(bytes(pool, a, None, scratch).await, vec![9; 8 << 20]);
    for v in [a, b, c, v] {
        pool.delete(v).await.unwrap();
    }

    // A tree from elsewhere.
    let t = id();
    pool.create(t, &tree(None, Source::Empty)).await.unwrap();
    let filling = contents.begin(t).await.unwrap();
    std::fs::create_dir(filling.directory().join("tree")).unwrap();
    sample_tree(&filling.directory().join("tree"));
    filling.commit().await.unwrap();
    let at = pool.locate(t, None).await.unwrap().path;
    assert!(at.join("bin/su").exists());
    unreachable_by_users(&at);
    pool.delete(t).await.unwrap();
    pool.forget_image(IMAGE).await.unwrap();
    pool.settle().await;
    for f in [raw, image, overlay] {
        std::fs::remove_file(f).unwrap();
    }
}

/// As a full copy.
fn full(source: Source) -> Source {
    source.in_full(true)
}

/// Full copies of an image's tree, of a volume that lies over it, and of a snapshot: plain trees, which need nothing of what they
/// were made of.
async fn full_trees(pool: &dyn PoolDriver, scratch: &Path) {
    let (Some(contents), Some(snapshots)) = (pool.contents(), pool.snapshots()) else { return };
    let source = scratch.join("tree");
    std::fs::create_dir(&source).unwrap();
    sample_tree(&source);
    let first = describe(&source);
    let of_image = Source::Tree { path: source.clone(), image: Some(IMAGE) };
    let (a, b, c, d) = (id(), id(), id(), id());
    let new = tree(None, full(of_image.clone()));
    let made = pool.create(a, &new).await.unwrap();
    assert_eq!(pool.create(a, &new).await.unwrap(), made, "twice is once");
    pool.create(b, &tree(None, of_image)).await.unwrap();
    let then = snapshot();
    snapshots.create(b, then).await.unwrap();
    let at = opened(pool, b).await;
    std::fs::write(at.path.join("later"), b"x").unwrap();
    std::fs::remove_dir_all(at.path.join("many")).unwrap();
    let later = describe(&at.path);
    drop(at);
    pool.create(c, &tree(None, full(Source::Volume { volume: b, snapshot: None }))).await.unwrap();
    pool.create(d, &tree(None, full(Source::Volume { volume: b, snapshot: Some(then) }))).await.unwrap();
    // All of that goes, and nothing waits for the copies.
    pool.delete(b).await.unwrap();
    pool.forget_image(IMAGE).await.unwrap();
    std::fs::remove_dir_all(&source).unwrap();
    pool.settle().await;
    for (volume, what) in [(a, &first), (c, &later), (d, &first)] {
        let located = pool.locate(volume, None).await.unwrap();
        assert!(located.layers.is_none(), "it lies over nothing");
        assert_eq!(&describe(&located.path), what);
        unreachable_by_users(&located.path);
    }
    // One that is there becomes one, and is apart from what it is of.
    for _ in 0..2 {
        contents.replace(c, &full(Source::Volume { volume: d, snapshot: None })).await.unwrap();
    }
    let at = opened(pool, c).await;
    assert_eq!(describe(&at.path), first);
    std::fs::write(at.path.join("mine"), b"own").unwrap();
    drop(at);
    let other = opened(pool, d).await;
    assert!(!other.path.join("mine").exists());
    drop(other);
    let lost = full(Source::Volume { volume: id(), snapshot: None });
    let e = pool.create(b, &tree(None, lost)).await.unwrap_err();
    assert!(e.is(ErrorKind::NotFound), "{e:?}");
    let wrong = NewVolume {
        content: VolumeContent::Block,
        size: None,
        source: full(Source::Volume { volume: a, snapshot: None }),
    };
    assert!(pool.create(b, &wrong).await.unwrap_err().is(ErrorKind::Invalid));
    assert!(pool.inspect(b).await.unwrap_err().is(ErrorKind::NotFound), "nothing is left");
    for volume in [a, c, d] {
        pool.delete(volume).await.unwrap();
    }
    pool.settle().await;
}

/// The same of disks: nothing lies below them.
async fn full_disks(pool: &dyn PoolDriver, scratch: &Path) {
    let (Some(_), Some(snapshots)) = (pool.contents(), pool.snapshots()) else { return };
    let (image, raw) = (scratch.join("image.qcow2"), scratch.join("image.raw"));
    std::fs::write(&raw, vec![9; 8 << 20]).unwrap();
    let convert = run(Program::QemuImg).args(["convert", "-f", "raw", "-O", "qcow2"]);
    convert.arg(&raw).arg(&image).ok().await.unwrap();
    std::fs::set_permissions(&image, PermissionsExt::from_mode(0o444)).unwrap();
    let disk =
        |mib, source| NewVolume { content: VolumeContent::Block, size: Some(ByteSize::mib(mib)), source };
    let (a, b, c, d) = (id(), id(), id(), id());
    pool.create(a, &disk(8, full(disk_of(&image)))).await.unwrap();
    pool.create(b, &disk(8, disk_of(&image))).await.unwrap();
    let then = snapshot();
    snapshots.create(b, then).await.unwrap();
    let now = Source::Volume { volume: b, snapshot: None };
    pool.create(c, &disk(20, full(now))).await.unwrap();
    let of_then = Source::Volume { volume: b, snapshot: Some(then) };
    let made = pool.create(d, &NewVolume { size: None, ..disk(8, full(of_then)) }).await.unwrap();
    assert_eq!((made.format, made.size), (Format::Raw, pool.inspect(b).await.unwrap().size));
    pool.delete(b).await.unwrap();
    pool.forget_image(IMAGE).await.unwrap();
    std::fs::remove_file(&image).unwrap();
    pool.settle().await;
    for (volume, size) in [(a, 8 << 20), (c, 20 << 20), (d, 8 << 20)] {
        let located = pool.locate(volume, None).await.unwrap();
        assert_eq!((located.format, located.backing), (Format::Raw, None));
        let got = bytes(pool, volume, None, scratch).await;
        assert_eq!(got.len(), size);
        assert!(got[..8 << 20].iter().all(|b| *b == 9) && got[8 << 20..].iter().all(|b| *b == 0));
    }
    for volume in [a, c, d] {
        pool.delete(volume).await.unwrap();
    }
    pool.settle().await;
    std::fs::remove_file(raw).unwrap();
}
