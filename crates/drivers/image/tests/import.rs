//! Imports of all formats, hostile archives, and what comes out again.
#![allow(clippy::disallowed_methods)] // drivers and their tests are the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod common;

use karst_image::{Content, ImageStore, Staged, Upload, unpack::Bounds};
use karst_model::{
    ErrorKind, ImageId,
    image::DiskFormat,
    instance::InstanceKind,
    template::{MAX_BYTES, Trigger},
};
use sha2::{Digest, Sha256};
use std::{
    io::{Read, Write},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    process::Command,
};

const YAML: &str = "architecture: x86_64\ncreation_date: 1700000000\nexpiry_date: 1900000000\nproperties: {os: Test, release: '1'}\ntemplates:\n  /etc/hosts: {when: [create, copy], template: hosts.tpl}\n";

struct Tar(tar::Builder<Vec<u8>>);

impl Tar {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }
    fn image() -> Self {
        Self::new().file("metadata.yaml", YAML.as_bytes(), 0o644, 0).dir("rootfs", 0o755, 0)
    }
    /// The path is written raw, whatever it is.
    fn raw(
        mut self,
        kind: tar::EntryType,
        path: &str,
        link: &str,
        content: &[u8],
        mode: u32,
        id: u64,
    ) -> Self {
        let mut h = tar::Header::new_gnu();
        h.set_entry_type(kind);
        h.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        h.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        h.set_size(content.len() as u64);
        h.set_mode(mode);
        h.set_uid(id);
        h.set_gid(id);
        h.set_mtime(1_600_000_000);
        if matches!(kind, tar::EntryType::Char | tar::EntryType::Block) {
            h.set_device_major(1).unwrap();
            h.set_device_minor(3).unwrap();
        }
        h.set_cksum();
        self.0.append(&h, content).unwrap();
        self
    }
    fn file(self, path: &str, content: &[u8], mode: u32, id: u64) -> Self {
        self.raw(tar::EntryType::Regular, path, "", content, mode, id)
    }
    fn dir(self, path: &str, mode: u32, id: u64) -> Self {
        self.raw(tar::EntryType::Directory, path, "", b"", mode, id)
    }
    fn link(self, path: &str, to: &str) -> Self {
        self.raw(tar::EntryType::Symlink, path, to, b"", 0o777, 0)
    }
    fn hard(self, path: &str, to: &str) -> Self {
        self.raw(tar::EntryType::Link, path, to, b"", 0o644, 0)
    }
    fn done(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn staged(bytes: &[u8]) -> Staged {
    let mut f = tempfile::tempfile().unwrap();
    f.write_all(bytes).unwrap();
    Staged::Foreign(f.into())
}

fn unified(bytes: &[u8]) -> Upload {
    Upload::Unified { image: staged(bytes) }
}

fn id() -> ImageId {
    ImageId(uuid::Uuid::new_v4())
}

async fn store(at: &Path) -> ImageStore {
    ImageStore::open(at, common::launcher()).await.unwrap()
}

fn left(at: &Path) -> usize {
    let count = |d: &str| std::fs::read_dir(at.join(d)).unwrap().count();
    count("images") + count("tmp")
}

fn good() -> Tar {
    Tar::image()
        .dir("rootfs/bin", 0o755, 0)
        .file("rootfs/bin/su", b"setuid", 0o4755, 0)
        .hard("rootfs/bin/su2", "rootfs/bin/su")
        .link("rootfs/etc", "/usr/etc")
        .dir("rootfs/home/user", 0o700, 1000)
        .file("rootfs/home/user/file", &[0; 1 << 20], 0o640, 65_535)
        .raw(tar::EntryType::Fifo, "rootfs/fifo", "", b"", 0o600, 7)
        .raw(tar::EntryType::Char, "rootfs/dev/null", "", b"", 0o666, 0)
        .dir("rootfs/locked", 0o555, 0)
        .file("rootfs/locked/in", b"x", 0o400, 33)
        .file("/rootfs/slashed", b"x", 0o644, 0)
        .file("templates/hosts.tpl", b"{{ container.name }}", 0o644, 0)
}

fn compressed(plain: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(plain).unwrap();
    let mut xz = xz2::write::XzEncoder::new(Vec::new(), 1);
    xz.write_all(plain).unwrap();
    let mut bz = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    bz.write_all(plain).unwrap();
    vec![
        ("tar", plain.to_vec()),
        ("tar.gz", gz.finish().unwrap()),
        ("tar.xz", xz.finish().unwrap()),
        ("tar.bz2", bz.finish().unwrap()),
        ("tar.zst", zstd::encode_all(plain, 1).unwrap()),
    ]
}

fn read_all(fd: std::os::fd::OwnedFd) -> Vec<u8> {
    let mut bytes = Vec::new();
    std::fs::File::from(fd).read_to_end(&mut bytes).unwrap();
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn unified_archives_of_each_compression_come_in_and_go_out_unchanged() {
    if common::skip_without_root_and(&[]) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let s = store(d.path()).await;
    for (extension, bytes) in compressed(&good().done()) {
        let i = id();
        let facts = s.import(i, unified(&bytes)).await.unwrap_or_else(|e| panic!("{extension}: {e:?}"));
        assert_eq!(facts.fingerprint, format!("{:x}", Sha256::digest(&bytes)));
        assert_eq!((facts.kind, facts.size), (InstanceKind::Container, bytes.len() as u64));
        assert_eq!((facts.created_at, facts.expires_at), (1_700_000_000, 1_900_000_000));
        assert_eq!(facts.properties["os"], "Test");
        let Content::Tree(tree) = s.content(i).await.unwrap() else { panic!() };
        let meta = |p: &str| std::fs::symlink_metadata(tree.join(p)).unwrap();
        assert_eq!(meta("slashed").len(), 1, "a leading slash is dropped, as tar does");
        assert_eq!(
            (meta("bin/su").uid(), meta("bin/su").mode() & 0o7777, meta("bin/su").nlink()),
            (0, 0o4755, 2)
        );
        assert_eq!((meta("home/user").uid(), meta("home/user").mode() & 0o7777), (1000, 0o700));
        let file = meta("home/user/file");
        assert_eq!((file.uid(), file.gid(), file.len(), file.blocks()), (65_535, 65_535, 1 << 20, 0));
        assert_eq!(
            (meta("fifo").uid(), meta("locked/in").uid(), meta("locked").mtime()),
            (7, 33, 1_600_000_000)
        );
        assert_eq!(std::fs::read_link(tree.join("etc")).unwrap(), Path::new("/usr/etc"));
        assert!(!tree.join("dev/null").exists(), "device nodes of /dev are left out");
        assert_eq!(facts.templates.files["hosts.tpl"], "{{ container.name }}");
        let rule = &facts.templates.rules["/etc/hosts"];
        assert_eq!(
            (rule.template.as_str(), rule.when.as_slice()),
            ("hosts.tpl", &[Trigger::Create, Trigger::Copy][..])
        );
        // Again under the same id: nothing happens; out again: the same bytes.
        assert_eq!(s.import(i, unified(b"other")).await.unwrap(), facts);
        let mut parts = s.export(i).await.unwrap().parts;
        assert_eq!(parts.len(), 1);
        let part = parts.remove(0);
        assert_eq!(part.filename, format!("{}.{extension}", facts.fingerprint));
        assert_eq!(read_all(part.file), bytes);
        s.delete(i).await.unwrap();
        s.delete(i).await.unwrap();
        assert!(s.facts(i).await.unwrap_err().is(ErrorKind::NotFound));
    }
    assert!(s.list().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn split_images_with_tar_and_squashfs_keep_their_fingerprint() {
    if common::skip_without_root_and(&["mksquashfs", "sqfs2tar"]) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let s = store(&d.path().join("store")).await;
    let root = d.path().join("root");
    std::fs::create_dir_all(root.join("usr/bin")).unwrap();
    std::fs::write(root.join("usr/bin/su"), "setuid").unwrap();
    std::fs::set_permissions(root.join("usr/bin/su"), PermissionsExt::from_mode(0o4755)).unwrap();
    std::os::unix::fs::chown(root.join("usr"), Some(12), Some(34)).unwrap();
    let squash = d.path().join("root.squashfs");
    let made =
        Command::new("mksquashfs").arg(&root).arg(&squash).args(["-quiet", "-no-progress"]).status().unwrap();
    assert!(made.success());
    let squashfs = std::fs::read(&squash).unwrap();
    let tarred = Tar::new()
        .dir("./", 0o755, 0)
        .dir("./usr", 0o755, 12)
        .file("./usr/bin/su", b"setuid", 0o4755, 0)
        .done();
    let meta = Tar::new().file("metadata.yaml", YAML.as_bytes(), 0o644, 0).done();
    for (field, rootfs) in [(".squashfs", squashfs.clone()), (".tar", tarred)] {
        let i = id();
        let upload = || Upload::Split { metadata: staged(&meta), rootfs: staged(&rootfs) };
        let facts = s.import(i, upload()).await.unwrap_or_else(|e| panic!("{field}: {e:?}"));
        let mut both = meta.clone();
        both.extend(&rootfs);
        assert_eq!(facts.fingerprint, format!("{:x}", Sha256::digest(&both)));
        let Content::Tree(tree) = s.content(i).await.unwrap() else { panic!() };
        let su = std::fs::metadata(tree.join("usr/bin/su")).unwrap();
        assert_eq!((su.uid(), su.mode() & 0o7777), (0, 0o4755));
        assert_eq!(std::fs::metadata(tree.join("usr")).unwrap().uid(), 12);
        let parts = s.export(i).await.unwrap().parts;
        assert_eq!(parts[0].filename, format!("meta-{}.tar", facts.fingerprint));
        assert_eq!(parts[1].filename, format!("{}{field}", facts.fingerprint));
        let again: Vec<Staged> = parts.into_iter().map(|p| Staged::Foreign(p.file)).collect();
        let [metadata, rootfs] = <[Staged; 2]>::try_from(again).unwrap();
        let back = s.import(id(), Upload::Split { metadata, rootfs }).await.unwrap();
        assert_eq!(back.fingerprint, facts.fingerprint);
    }
    let cut = Upload::Split { metadata: staged(&meta), rootfs: staged(&squashfs[..200]) };
    let e = s.import(id(), cut).await.unwrap_err();
    assert!(e.is(ErrorKind::Invalid) && e.field.as_deref() == Some("rootfs"), "{e:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_come_in_as_qcow2_only_and_without_references() {
    if common::skip_without_root_and(&["qemu-img"]) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let s = store(&d.path().join("store")).await;
    let img = |args: &[&str]| {
        assert!(Command::new("qemu-img").args(args).current_dir(d.path()).output().unwrap().status.success())
    };
    std::fs::write(d.path().join("raw"), [&[0xab; 4096][..], &[0; 1 << 20]].concat()).unwrap();
    img(&["convert", "-f", "raw", "-O", "qcow2", "raw", "good.qcow2"]);
    img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow", "backed.qcow2"]);
    img(&["create", "-q", "-f", "qcow2", "-o", "data_file=stolen,data_file_raw=on", "data.qcow2", "1M"]);
    let meta = Tar::new().file("metadata.yaml", YAML.as_bytes(), 0o644, 0).done();
    let read = |n: &str| std::fs::read(d.path().join(n)).unwrap();
    let split = |bytes: &[u8]| Upload::Split { metadata: staged(&meta), rootfs: staged(bytes) };

    let i = id();
    let facts = s.import(i, split(&read("good.qcow2"))).await.unwrap();
    assert_eq!((facts.kind, facts.disk_size), (InstanceKind::VirtualMachine, (1 << 20) + 4096));
    let Content::Disk { path, size } = s.content(i).await.unwrap() else { panic!() };
    assert_eq!((size, std::fs::metadata(&path).unwrap().mode() & 0o777), (facts.disk_size, 0o444));
    img(&["convert", "-f", "qcow2", "-O", "raw", path.to_str().unwrap(), "back"]);
    assert_eq!(read("back"), read("raw"));
    let in_one = Tar::new().file("metadata.yaml", YAML.as_bytes(), 0o644, 0).file(
        "rootfs.img",
        &read("good.qcow2"),
        0o644,
        0,
    );
    assert_eq!(s.import(id(), unified(&in_one.done())).await.unwrap().disk_size, facts.disk_size);

    let mut corrupt = read("good.qcow2");
    corrupt[40..48].copy_from_slice(&(1u64 << 60).to_be_bytes()); // the table of clusters lies outside
    for (what, bytes) in [
        ("backing file", read("backed.qcow2")),
        ("data file", read("data.qcow2")),
        ("corrupt", corrupt),
        ("cut", read("good.qcow2")[..300_000].to_vec()),
    ] {
        let e = s.import(id(), split(&bytes)).await.unwrap_err();
        assert!(e.is(ErrorKind::Invalid) && e.field.as_deref() == Some("rootfs"), "{what}: {e:?}");
    }
    assert_eq!(left(&d.path().join("store")), 2);
}

/// An appliance: what describes it, and its disk.
fn appliance(disk: &str, more: &str, bytes: &[u8]) -> Vec<u8> {
    let ovf = format!(
        "<Envelope xmlns:ovf='x'><References><File ovf:href='{disk}' ovf:id='f'/></References>\
         <DiskSection><Disk ovf:diskId='d' ovf:fileRef='f'/>{more}</DiskSection>\
         <VirtualSystem><Name>Gate</Name><OperatingSystemSection><Description>Debian</Description>\
         </OperatingSystemSection></VirtualSystem></Envelope>"
    );
    Tar::new().file("gate.ovf", ovf.as_bytes(), 0o644, 0).file("gate.vmdk", bytes, 0o644, 0).done()
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_by_themselves_become_images() {
    if common::skip_without_root_and(&["qemu-img"]) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let s = store(&d.path().join("store")).await;
    let img = |args: &[&str]| {
        assert!(Command::new("qemu-img").args(args).current_dir(d.path()).output().unwrap().status.success())
    };
    let content: Vec<u8> = (0..3u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    std::fs::write(d.path().join("raw"), [&content[..], &[0; 5 << 20][..]].concat()).unwrap();
    for kind in ["monolithicSparse", "streamOptimized", "monolithicFlat"] {
        let (sub, to) = (format!("subformat={kind}"), format!("{kind}.vmdk"));
        img(&["convert", "-f", "raw", "-O", "vmdk", "-o", &sub, "raw", &to]);
    }
    img(&["convert", "-f", "raw", "-O", "qcow2", "raw", "disk.qcow2"]);
    img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow", "backed.qcow2"]);
    img(&["create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", "monolithicSparse.vmdk", "child.vmdk"]);
    let read = |n: &str| std::fs::read(d.path().join(n)).unwrap();
    let disk = |bytes: &[u8], format| {
        let Staged::Foreign(disk) = staged(bytes) else { panic!() };
        Upload::Disk { disk, format }
    };
    let (sparse, stream) = (read("monolithicSparse.vmdk"), read("streamOptimized.vmdk"));
    let good = [
        ("raw", read("raw"), DiskFormat::Raw),
        ("qcow2", read("disk.qcow2"), DiskFormat::Qcow2),
        ("vmdk", sparse.clone(), DiskFormat::Vmdk),
        ("vmdk of a stream", stream.clone(), DiskFormat::Vmdk),
        ("ova", appliance("gate.vmdk", "", &stream), DiskFormat::Ova),
    ];
    for (what, bytes, format) in &good {
        let i = id();
        let facts = s.import(i, disk(bytes, *format)).await.unwrap_or_else(|e| panic!("{what}: {e:?}"));
        assert_eq!((facts.kind, facts.disk_size), (InstanceKind::VirtualMachine, 8 << 20), "{what}");
        if *what == "ova" {
            assert_eq!((&*facts.properties["os"], &*facts.properties["description"]), ("Debian", "Gate"));
        }
        let Content::Disk { path, .. } = s.content(i).await.unwrap() else { panic!() };
        img(&["convert", "-f", "qcow2", "-O", "raw", path.to_str().unwrap(), "back"]);
        assert!(read("back") == read("raw"), "{what}");
        // What goes out comes in again as the same image.
        let parts = s.export(i).await.unwrap().parts;
        let again: Vec<Staged> = parts.into_iter().map(|p| Staged::Foreign(p.file)).collect();
        let [metadata, rootfs] = <[Staged; 2]>::try_from(again).unwrap();
        let other = id();
        let back = s.import(other, Upload::Split { metadata, rootfs }).await.unwrap();
        assert_eq!(back.fingerprint, facts.fingerprint, "{what}");
        s.delete(i).await.unwrap();
        s.delete(other).await.unwrap();
    }
    let mut no_size = sparse.clone();
    no_size[12..20].fill(0);
    let two = "<Disk ovf:diskId='e' ovf:fileRef='f'/>";
    let whole = appliance("gate.vmdk", "", &stream);
    for (what, bytes, format, says) in [
        ("cut vmdk", sparse[..sparse.len() / 2].to_vec(), DiskFormat::Vmdk, "cut off"),
        ("cut stream", stream[..stream.len() / 2].to_vec(), DiskFormat::Vmdk, "cut off"),
        ("description alone", read("monolithicFlat.vmdk"), DiskFormat::Vmdk, "other files"),
        ("difference", read("child.vmdk"), DiskFormat::Vmdk, "snapshots"),
        ("no size", no_size, DiskFormat::Vmdk, "size"),
        ("another format", read("disk.qcow2"), DiskFormat::Vmdk, "not a VMDK"),
        ("another format", stream.clone(), DiskFormat::Qcow2, "not in qcow2"),
        ("backing file", read("backed.qcow2"), DiskFormat::Qcow2, "backing file"),
        ("cut qcow2", read("disk.qcow2")[..400_000].to_vec(), DiskFormat::Qcow2, "cut off"),
        ("cut raw", read("raw")[..1_000_000].to_vec(), DiskFormat::Raw, "sectors"),
        ("nothing", vec![], DiskFormat::Raw, "empty"),
        ("cut ova", whole[..whole.len() / 2].to_vec(), DiskFormat::Ova, "cut off"),
        ("two disks", appliance("gate.vmdk", two, &stream), DiskFormat::Ova, "2 disks"),
        ("a disk elsewhere", appliance("../gate.vmdk", "", &stream), DiskFormat::Ova, "beside"),
        ("a disk that is not there", appliance("other.vmdk", "", &stream), DiskFormat::Ova, "has no"),
        (
            "flat in an appliance",
            appliance("gate.vmdk", "", &read("monolithicFlat.vmdk")),
            DiskFormat::Ova,
            "other files",
        ),
        ("no appliance", stream, DiskFormat::Ova, ""),
    ] {
        let e =
            s.import(id(), disk(&bytes, format)).await.err().unwrap_or_else(|| panic!("{what}: was taken"));
        assert!(e.is(ErrorKind::Invalid) && e.field.as_deref() == Some("disk"), "{what}: {e:?}");
        assert!(e.message.contains(says), "{what}: {e:?}");
        assert_eq!(left(&d.path().join("store")), 0, "{what}: something is left");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_archives_are_refused_and_leave_nothing() {
    if common::skip_without_root_and(&[]) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let at = d.path().join("store");
    let s = store(&at).await.with_bounds(Bounds { bytes: 64 << 20, entries: 500, ratio: 1000 });
    let outside = d.path().join("outside");
    std::fs::write(&outside, "untouched").unwrap();
    let outside_text = outside.to_str().unwrap().to_owned();
    let plain = good().done();
    let zip = |b: &[u8]| zstd::encode_all(b, 1).unwrap();
    let mut flipped = compressed(&plain)[1].1.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0xff;
    let many = (0..600).fold(Tar::image(), |t, i| t.file(&format!("rootfs/{i}"), b"", 0o644, 0)).done();
    let mut sparse = tar::Header::new_gnu();
    sparse.set_entry_type(tar::EntryType::GNUSparse);
    sparse.set_path("rootfs/bomb").unwrap();
    sparse.set_size(0);
    sparse.set_mode(0o644);
    sparse.set_uid(0);
    sparse.set_gid(0);
    sparse.set_mtime(0);
    {
        let gnu = sparse.as_gnu_mut().unwrap();
        gnu.realsize[..].copy_from_slice(b"77777777777\0"); // 8 GiB - 1 of nothing
        gnu.sparse[0].offset[..].copy_from_slice(b"77777777777\0");
        gnu.sparse[0].numbytes[..].copy_from_slice(b"00000000000\0");
    }
    sparse.set_cksum();
    let mut bomb = Tar::image();
    bomb.0.append(&sparse, &b""[..]).unwrap();
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty file", vec![], ""),
        ("no archive", b"hello world".repeat(100), ""),
        ("no metadata", Tar::new().dir("rootfs", 0o755, 0).done(), "metadata.yaml"),
        ("no root", Tar::new().file("metadata.yaml", YAML.as_bytes(), 0o644, 0).done(), "rootfs"),
        (
            "bad yaml",
            Tar::new().file("metadata.yaml", b"a: [", 0o644, 0).dir("rootfs", 0o755, 0).done(),
            "metadata.yaml",
        ),
        ("dots", Tar::image().file("rootfs/../../outside", b"owned", 0o644, 0).done(), "leads out"),
        ("dots inside", Tar::image().file("rootfs/a/../b", b"x", 0o644, 0).done(), "leads out"),
        ("absolute", Tar::image().file(&outside_text, b"owned", 0o644, 0).done(), "absolute"),
        (
            "through a link out",
            Tar::image()
                .link("rootfs/x", d.path().to_str().unwrap())
                .file("rootfs/x/outside", b"owned", 0o644, 0)
                .done(),
            "symbolic link",
        ),
        (
            "through a link up",
            Tar::image().link("rootfs/x", "../..").file("rootfs/x/outside", b"owned", 0o644, 0).done(),
            "symbolic link",
        ),
        (
            "root is a link",
            Tar::new()
                .file("metadata.yaml", YAML.as_bytes(), 0o644, 0)
                .link("rootfs", "/")
                .file("rootfs/x", b"owned", 0o644, 0)
                .done(),
            "symbolic link",
        ),
        ("hard link out", Tar::image().hard("rootfs/x", "../outside").done(), "leads out"),
        ("hard link to metadata", Tar::image().hard("rootfs/x", "metadata.yaml").done(), "hard link"),
        ("hard link absolute", Tar::image().hard("rootfs/x", "/etc/shadow").done(), "absolute"),
        (
            "hard link through a link",
            Tar::image().link("rootfs/l", "/etc").hard("rootfs/x", "rootfs/l/shadow").done(),
            "symbolic link",
        ),
        (
            "device",
            Tar::image().raw(tar::EntryType::Block, "rootfs/disk", "", b"", 0o666, 0).done(),
            "device",
        ),
        (
            "device in a dev below",
            Tar::image().raw(tar::EntryType::Char, "rootfs/srv/dev/mem", "", b"", 0o666, 0).done(),
            "device",
        ),
        ("owner out of range", Tar::image().file("rootfs/f", b"", 0o644, 100_000).done(), "owner"),
        (
            "file over directory",
            Tar::image()
                .dir("rootfs/d", 0o755, 0)
                .file("rootfs/d/x", b"", 0o644, 0)
                .file("rootfs/d", b"", 0o644, 0)
                .done(),
            "directory",
        ),
        ("too many", many, "entries"),
        ("too large", zip(&Tar::image().file("rootfs/f", &vec![0; 65 << 20], 0o644, 0).done()), "larger"),
        ("sparse bomb", bomb.done(), ""),
        ("cut", plain[..plain.len() / 2].to_vec(), "cut off"),
        ("cut at an entry", plain[..plain.len() - 1024 - plain.len() % 1024].to_vec(), ""),
        (
            "cut when compressed",
            {
                let z = zip(&plain);
                z[..z.len() - 20].to_vec()
            },
            "",
        ),
        ("flipped bit", flipped, "corrupt"),
        ("squashfs as a whole", b"hsqs".repeat(200), "squashfs"),
        ("template is a link", Tar::image().link("templates/a", "/etc/shadow").done(), "not a file"),
        (
            "template elsewhere",
            Tar::image().file("templates/a/b", b"", 0o644, 0).done(),
            "name of a template",
        ),
        ("template no text", Tar::image().file("templates/a", &[0xff], 0o644, 0).done(), "UTF-8"),
        (
            "template too large",
            Tar::image().file("templates/a", &[b'a'; MAX_BYTES + 1], 0o644, 0).done(),
            "KiB",
        ),
        (
            "template out of the root",
            Tar::new()
                .file("metadata.yaml", YAML.replace("/etc/hosts", "/etc/../../x").as_bytes(), 0o644, 0)
                .dir("rootfs", 0o755, 0)
                .done(),
            "..",
        ),
        (
            "template at no moment",
            Tar::new()
                .file("metadata.yaml", YAML.replace("copy]", "boot]").as_bytes(), 0o644, 0)
                .dir("rootfs", 0o755, 0)
                .done(),
            "create, copy, rename or start",
        ),
    ];
    for (what, bytes, says) in cases {
        let e = s.import(id(), unified(&bytes)).await.err().unwrap_or_else(|| panic!("{what}: was taken"));
        assert!(e.is(ErrorKind::Invalid), "{what}: {e:?}");
        assert!(
            e.field.as_deref().is_some_and(|f| f == "image" || f.starts_with("image.templates.")),
            "{what}"
        );
        assert!(e.message.contains(says), "{what}: {e:?}");
        assert_eq!(left(&at), 0, "{what}: something is left");
        assert_eq!(std::fs::read_to_string(&outside).unwrap(), "untouched", "{what}");
    }
    s.import(id(), unified(&plain)).await.expect("and the good one is taken");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_told_and_leaves_nothing() {
    if common::skip_without_root_and(&[]) {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let mounted =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "karst-test"]).arg(d.path()).status();
    if !mounted.is_ok_and(|s| s.success()) {
        return backends::missing("tmpfs cannot be mounted here");
    }
    let s = store(&d.path().join("store")).await;
    let noise: Vec<u8> = (0..4u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8 | 1).collect();
    let e =
        s.import(id(), unified(&Tar::image().file("rootfs/f", &noise, 0o644, 0).done())).await.unwrap_err();
    let repeated: Vec<u8> = [1; 4 << 20].to_vec();
    let packed = zstd::encode_all(&Tar::image().file("rootfs/f", &repeated, 0o644, 0).done()[..], 1).unwrap();
    let inside = s.import(id(), unified(&packed)).await.unwrap_err();
    let nothing = left(&d.path().join("store"));
    assert!(Command::new("umount").arg(d.path()).status().unwrap().success());
    assert!(e.is(ErrorKind::Quota), "{e:?}");
    assert!(inside.is(ErrorKind::Quota), "told by the worker: {inside:?}");
    assert_eq!(nothing, 0);
}
