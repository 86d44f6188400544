//! Images of the OCI: layers over each other, users and programs, and archives that are hostile or broken.
#![allow(clippy::disallowed_methods)] // drivers and their tests are the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod common;

use karst_image::{Content, ImageStore, Staged, Upload, unpack::Bounds};
use karst_model::{Error, ErrorKind, ImageId, image::ImageFacts};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{
    io::Write,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
};

enum Entry<'a> {
    Dir(&'a str),
    File(&'a str, &'a str),
    Link(&'a str, &'a str),
    Hard(&'a str, &'a str),
    Node(&'a str),
}
use Entry::*;

fn tar_of(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut out = tar::Builder::new(Vec::new());
    for entry in entries {
        let (kind, path, link, content) = match entry {
            Dir(p) => (tar::EntryType::Directory, *p, "", ""),
            File(p, c) => (tar::EntryType::Regular, *p, "", *c),
            Link(p, to) => (tar::EntryType::Symlink, *p, *to, ""),
            Hard(p, to) => (tar::EntryType::Link, *p, *to, ""),
            Node(p) => (tar::EntryType::Char, *p, "", ""),
        };
        let mut h = tar::Header::new_gnu();
        h.set_entry_type(kind);
        h.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        h.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        h.set_size(content.len() as u64);
        h.set_mode(0o755);
        h.set_uid(0);
        h.set_gid(0);
        h.set_mtime(1_600_000_000);
        h.set_cksum();
        out.append(&h, content.as_bytes()).unwrap();
    }
    out.into_inner().unwrap()
}

fn hex(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

/// An archive of a layout.
struct Layout {
    blobs: Vec<(String, Vec<u8>)>,
    index: Value,
}

impl Layout {
    /// Of these layers, the first of them compressed.
    fn new(layers: &[Vec<u8>], config: Value) -> Self {
        let mut blobs = vec![];
        let mut put = |content: Vec<u8>, kind: &str| {
            let of = json!({"mediaType": kind, "digest": format!("sha256:{}", hex(&content)), "size": content.len()});
            blobs.push((hex(&content), content));
            of
        };
        let mut described = vec![];
        for (n, layer) in layers.iter().enumerate() {
            let tar = "application/vnd.oci.image.layer.v1.tar";
            described.push(match n {
                0 => put(zstd::encode_all(layer.as_slice(), 1).unwrap(), &format!("{tar}+zstd")),
                _ => put(layer.clone(), tar),
            });
        }
        let image = json!({"architecture": "amd64", "os": "linux", "created": "2024-01-02T03:04:05Z", "config": config});
        let config = put(image.to_string().into_bytes(), "application/vnd.oci.image.config.v1+json");
        let manifest = json!({"schemaVersion": 2, "config": config, "layers": described});
        let manifest = put(manifest.to_string().into_bytes(), "application/vnd.oci.image.manifest.v1+json");
        Self { blobs, index: json!({"schemaVersion": 2, "manifests": [manifest]}) }
    }

    fn digest(&self) -> String {
        self.index["manifests"][0]["digest"].as_str().unwrap()[7..].to_owned()
    }

    fn archive(&self) -> Vec<u8> {
        let mut out = tar::Builder::new(Vec::new());
        let mut put = |name: &str, content: &[u8]| {
            let mut h = tar::Header::new_ustar();
            h.set_size(content.len() as u64);
            h.set_mode(0o644);
            h.set_cksum();
            out.append_data(&mut h, name, content).unwrap();
        };
        for (name, content) in &self.blobs {
            put(&format!("./blobs/sha256/{name}"), content);
        }
        put("./index.json", self.index.to_string().as_bytes());
        put("./oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
        out.into_inner().unwrap()
    }
}

async fn import(store: &ImageStore, archive: &[u8]) -> Result<(ImageId, ImageFacts), Error> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(archive).unwrap();
    let id = ImageId(uuid::Uuid::new_v4());
    let facts = store.import(id, Upload::Unified { image: Staged::Foreign(file.into()) }).await?;
    Ok((id, facts))
}

async fn tree(store: &ImageStore, id: ImageId) -> std::path::PathBuf {
    match store.content(id).await.unwrap() {
        Content::Tree(path) => path,
        other => panic!("{other:?}"),
    }
}

fn leftovers(at: &Path) -> usize {
    ["tmp", "images"].iter().map(|d| std::fs::read_dir(at.join(d)).unwrap().count()).sum()
}

#[tokio::test]
async fn layers_lie_over_each_other() {
    if common::skip_without_root_and(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path(), common::launcher()).await.unwrap();
    let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:101:102:web:/srv/web:/bin/false\n";
    let first = tar_of(&[
        Dir("./"),
        Dir("usr/"),
        Dir("usr/lib/"),
        File("usr/lib/a", "a"),
        Link("lib", "usr/lib"),
        Dir("etc/"),
        File("etc/passwd", passwd),
        File("etc/group", "root:x:0:\nstaff:x:50:\n"),
        Dir("opaque/"),
        File("opaque/old", "old"),
        Dir("opaque/kept/"),
        File("opaque/kept/old", "old"),
        Dir("gone/"),
        File("gone/deep", "x"),
        File("file", "1"),
        Dir("turns/"),
        File("turns/inner", "x"),
        File("becomes", "a file"),
        Node("dev/null"),
    ]);
    let second = tar_of(&[
        // Before what marks the rest as gone, and after.
        File("opaque/new", "new"),
        File("opaque/.wh..wh..opq", ""),
        Dir("opaque/kept/"),
        File("opaque/kept/new", "new"),
        File(".wh.gone", ""),
        File(".wh.never", ""),
        File("file", "2"),
        File("lib/b", "through the link"),
        Hard("hard", "lib/b"),
        File("turns", "a file now"),
        Dir("becomes/"),
        File("becomes/inner", "x"),
        File(".wh..wh.plnk", "of aufs"),
    ]);
    let config = json!({
        "User": "web:staff", "Env": ["PATH=/bin", "A=b=c", "broken"], "Entrypoint": ["/bin/server"],
        "Cmd": ["--port", "80 81"], "WorkingDir": "/srv", "StopSignal": "SIGQUIT", "Labels": {"org.opencontainers.image.title": "A server"},
    });
    let layout = Layout::new(&[first, second], config);
    let (id, facts) = import(&store, &layout.archive()).await.unwrap();
    assert_eq!(facts.fingerprint, layout.digest());
    assert_eq!((facts.architecture.as_str(), facts.created_at), ("x86_64", 1_704_164_645));
    assert_eq!(
        (facts.properties["type"].as_str(), facts.properties["description"].as_str()),
        ("oci", "A server")
    );
    let application = facts.application.unwrap();
    assert_eq!(application.command, ["/bin/server", "--port", "80 81"]);
    assert_eq!((application.stop_signal, facts.properties["stop_signal"].as_str()), (Some(3), "SIGQUIT"));
    assert_eq!((application.uid, application.gid, application.cwd.as_str()), (101, 50, "/srv"));
    let environment: Vec<_> = application.environment.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    assert_eq!(environment, [("A", "b=c"), ("HOME", "/srv/web"), ("PATH", "/bin")]);

    let root = tree(&store, id).await;
    let text = |p: &str| std::fs::read_to_string(root.join(p)).ok();
    assert_eq!(text("file").as_deref(), Some("2"));
    assert_eq!(text("usr/lib/b").as_deref(), Some("through the link"));
    assert_eq!(std::fs::metadata(root.join("hard")).unwrap().nlink(), 2);
    assert!(root.join("lib").is_symlink() && text("usr/lib/a").is_some());
    for gone in [
        "gone",
        "opaque/old",
        "opaque/kept/old",
        ".wh.gone",
        ".wh.never",
        ".wh..wh.plnk",
        "opaque/.wh..wh..opq",
        "turns/inner",
        "dev/null",
    ] {
        assert!(std::fs::symlink_metadata(root.join(gone)).is_err(), "{gone}");
    }
    for there in ["opaque/new", "opaque/kept/new", "turns", "becomes/inner", "proc", "sys", "run"] {
        assert!(root.join(there).exists(), "{there}");
    }
    assert_eq!(std::fs::metadata(root.join("tmp")).unwrap().permissions().mode() & 0o7777, 0o1777);
    // The archive goes out as it came, and comes in again as the same image.
    let mut exported = store.export(id).await.unwrap();
    let mut bytes = vec![];
    std::io::Read::read_to_end(&mut std::fs::File::from(exported.parts.remove(0).file), &mut bytes).unwrap();
    assert_eq!(import(&store, &bytes).await.unwrap().1.fingerprint, layout.digest());
}

#[tokio::test]
async fn what_is_wrong_is_named_and_leaves_nothing() {
    if common::skip_without_root_and(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let bounds = Bounds { bytes: 1 << 20, entries: 100, ratio: 1000 };
    let store = ImageStore::open(dir.path(), common::launcher()).await.unwrap().with_bounds(bounds);
    let outside = dir.path().join("outside");
    std::fs::write(&outside, "untouched").unwrap();
    let base = || tar_of(&[Dir("a/"), File("a/b", "x"), Link("out", "/outside"), Link("up", "../../../..")]);
    let with = |entries: &[Entry<'_>]| Layout::new(&[base(), tar_of(entries)], json!({}));
    let big = "x".repeat(2 << 20);
    let many: Vec<String> = (0..120).map(|n| format!("f{n}")).collect();
    let crowd: Vec<Entry<'_>> = many.iter().map(|n| File(n, "")).collect();
    for (layout, word) in [
        (with(&[File("../escape", "x")]), "leads out"),
        (with(&[File("a/../../escape", "x")]), "leads out"),
        (with(&[Node("a/disk")]), "device node"),
        (with(&[Hard("h", "../../etc/passwd")]), "leads out"),
        (with(&[Hard("h", "never")]), "does not have"),
        (with(&[File("a/.wh...", "")]), "names nothing"),
        (with(&[File("big", &big)]), "larger than"),
        (with(&crowd), "entries"),
        (Layout::new(&[base()], json!({"User": "nobody-here"})), "does not know"),
        (Layout::new(&[base()], json!({"Cmd": ["a\nb"]})), "line breaks"),
        (Layout::new(&[], json!({})), "0 layers"),
    ] {
        let e = import(&store, &layout.archive()).await.unwrap_err();
        assert!(e.is(ErrorKind::Invalid) && e.message.contains(word), "{word}: {e} {:?}", e.context);
        assert_eq!(leftovers(dir.path()), 0, "{word}");
    }
    // Links that lead out lead nowhere: what is written through them stays inside.
    let through = with(&[File("up/outside", "y"), File("out/x", "z")]);
    match import(&store, &through.archive()).await {
        Ok((id, _)) => {
            assert_eq!(std::fs::read_to_string(tree(&store, id).await.join("outside")).unwrap(), "y");
            store.delete(id).await.unwrap();
        }
        Err(e) => assert!(e.is(ErrorKind::Invalid), "{e} {:?}", e.context),
    }
    assert_eq!(std::fs::read_to_string(&outside).unwrap(), "untouched");

    // Digests, sizes, platforms, missing and cut blobs.
    let good = || Layout::new(&[base()], json!({}));
    let broken = |change: fn(&mut Layout)| {
        let mut layout = good();
        change(&mut layout);
        layout.archive()
    };
    let cut = {
        let whole = good().archive();
        whole[..whole.len() / 3].to_vec()
    };
    for (archive, word) in [
        (broken(|l| l.blobs[0].1[20] ^= 1), "not what its digest says"),
        (broken(|l| l.blobs[0].1.push(0)), "bytes, not"),
        (broken(|l| drop(l.blobs.remove(0))), "lacks the blob"),
        (broken(|l| l.index["manifests"][0]["digest"] = "sha256:../../x".into()), "no digest"),
        (
            broken(|l| l.index["manifests"][0]["platform"] = json!({"os": "linux", "architecture": "s390x"})),
            "linux/s390x",
        ),
        (broken(|l| l.index = json!({"manifests": []})), "no image for linux"),
        (broken(|l| l.index = json!("x")), "index"),
        (cut, "cut off"),
        (zstd::encode_all(good().archive().as_slice(), 1).unwrap(), "metadata.yaml"),
    ] {
        let e = import(&store, &archive).await.unwrap_err();
        assert!(e.is(ErrorKind::Invalid) && e.message.contains(word), "{word}: {e} {:?}", e.context);
    }
    // What was half-made goes in the background.
    for _ in 0..1000 {
        if leftovers(dir.path()) == 0 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(leftovers(dir.path()), 0);
}
