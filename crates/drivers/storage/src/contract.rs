//! The contract of [`PoolDriver`]: one suite that each kind of pool passes on a real backend. Panics at the first breach.

use crate::{Format, NewVolume, PoolDriver, Source};
use karst_host::{Program, run};
use karst_model::{ByteSize, ErrorKind, VolumeId, storage::VolumeContent};
use std::{
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
};

/// Runs the suite. `scratch` is an empty directory, on the file system where images would lie. Needs root.
pub async fn check(pool: &dyn PoolDriver, scratch: &Path) {
    trees(pool, scratch).await;
    disks(pool, scratch).await;
    refusals(pool, scratch).await;
    assert!(pool.list().await.unwrap().is_empty(), "each part removed what it made");
    let space = pool.space().await.unwrap();
    assert!(space.total > 0 && space.used <= space.total, "{space:?}");
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
    let mut waiting = vec![PathBuf::new()];
    while let Some(dir) = waiting.pop() {
        for entry in std::fs::read_dir(root.join(&dir)).unwrap() {
            let path = dir.join(entry.unwrap().file_name());
            let full = root.join(&path);
            let m = std::fs::symlink_metadata(&full).unwrap();
            let content = match m.is_file() {
                true => {
                    let mut sum = 0u64;
                    for b in std::fs::read(&full).unwrap() {
                        sum = sum.wrapping_mul(31).wrapping_add(b.into());
                    }
                    sum
                }
                false => 0,
            };
            let target = std::fs::read_link(&full).unwrap_or_default();
            let mut value = [0u8; 64];
            let n = rustix::fs::lgetxattr(&full, "security.capability", &mut value).unwrap_or(0);
            let nlink = if m.is_dir() { 0 } else { m.nlink() };
            lines.push(format!(
                "{path:?} {:o} {}:{} {nlink} {} {content} {target:?} {} {:?}",
                m.mode(),
                m.uid(),
                m.gid(),
                if m.is_file() { m.len() } else { 0 },
                m.mtime(),
                &value[..n],
            ));
            if m.is_dir() {
                waiting.push(path);
            }
        }
    }
    lines.sort();
    lines
}

async fn trees(pool: &dyn PoolDriver, scratch: &Path) {
    let source = scratch.join("tree");
    std::fs::create_dir(&source).unwrap();
    sample_tree(&source);
    let new =
        NewVolume { content: VolumeContent::Filesystem, size: None, source: Source::Tree(source.clone()) };
    let a = id();
    let made = pool.create(a, &new).await.unwrap();
    assert_eq!((made.id, made.format), (a, Format::Directory));
    let at = pool.locate(a, None).await.unwrap();
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

    let usage = pool.usage(a).await.unwrap();
    assert!(usage.used >= 100_000 && usage.used < 10 << 20 && usage.inodes_used > 300, "{usage:?}");
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

    let source = Source::Disk { path: image.clone(), size: 8 << 20 };
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
    assert_eq!(std::fs::metadata(&at.path).unwrap().len(), 11 << 30);
    for v in [a, b] {
        pool.delete(v).await.unwrap();
    }
    pool.settle().await;
    for f in [raw, flat] {
        std::fs::remove_file(f).unwrap();
    }
}

async fn refusals(pool: &dyn PoolDriver, scratch: &Path) {
    let v = id();
    for gone in [pool.usage(v).await.err(), pool.inspect(v).await.err(), pool.locate(v, None).await.err()] {
        assert!(gone.unwrap().is(ErrorKind::NotFound));
    }
    assert!(pool.resize(v, ByteSize::gib(1)).await.unwrap_err().is(ErrorKind::NotFound));
    pool.delete(v).await.unwrap();
    let disk = |size, source| NewVolume { content: VolumeContent::Block, size, source };
    let image = || Source::Disk { path: scratch.join("none"), size: 1 << 30 };
    let tree = Source::Tree(scratch.to_owned());
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
