//! The recipes, built for real. The store lies in the target directory, so that a second run of the day builds nothing.
#![allow(clippy::disallowed_methods)] // drivers and their tests are the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod common;

use karst_image::{Content, Upload};
use karst_model::{ImageId, instance::InstanceKind};
use std::{
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{Arc, Mutex},
};

async fn build(kind: InstanceKind) -> (karst_image::ImageStore, ImageId) {
    let store = common::cached_store().await;
    let stages = Arc::new(Mutex::new(Vec::<(String, u8)>::new()));
    let seen = stages.clone();
    let progress = Arc::new(move |what: &str, percent: u8| {
        eprintln!("{percent:3}% {what}");
        seen.lock().unwrap().push((what.to_owned(), percent));
    });
    let started = std::time::Instant::now();
    let upload = store.build("debian/12", kind, false, progress).await.unwrap();
    eprintln!("built in {:?}", started.elapsed());
    assert!(matches!(upload, Upload::Split { .. }));
    let stages = stages.lock().unwrap().clone();
    assert_eq!(stages.last().unwrap().1, 100);
    assert!(stages.windows(2).all(|w| w[0].1 <= w[1].1), "percent only grows: {stages:?}");
    let id = ImageId(uuid::Uuid::new_v4());
    let started = std::time::Instant::now();
    let facts = store.import(id, upload).await.unwrap();
    eprintln!("imported in {:?}: {facts:?}", started.elapsed());
    assert_eq!(facts.kind, kind);
    assert_eq!(facts.properties["release"], "bookworm");
    (store, id)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_container_recipe_makes_a_system_that_systemd_can_start() {
    if common::skip_without_root_and(&["mmdebstrap"]) {
        return;
    }
    let (store, id) = build(InstanceKind::Container).await;
    let Content::Tree(tree) = store.content(id).await.unwrap() else { panic!("a container image is a tree") };
    let meta = |p: &str| std::fs::symlink_metadata(tree.join(p)).unwrap_or_else(|e| panic!("{p}: {e}"));
    assert!(meta("sbin").is_symlink() && tree.join("usr/sbin/init").is_symlink());
    assert_eq!(meta("etc/machine-id").len(), 0, "each instance makes its own");
    assert_eq!(
        (meta("usr/bin/su").uid(), meta("usr/bin/su").mode() & 0o7777),
        (0, 0o4755),
        "owners are unshifted"
    );
    assert_eq!(meta("etc/shadow").gid(), 42);
    assert!(
        std::fs::read_to_string(tree.join("etc/shadow"))
            .unwrap()
            .lines()
            .any(|l| l.starts_with("root:!") || l.starts_with("root:*"))
    );
    assert!(!tree.join("karst").exists() && !Path::new(&tree.join("dev/null")).exists());
    let outside = std::fs::symlink_metadata(tree.parent().unwrap()).unwrap();
    assert_eq!(outside.mode() & 0o077, 0, "no user of the host reaches setuid files in it");
    store.delete(id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_vm_recipe_makes_a_partitioned_disk() {
    if common::skip_without_root_and(&["mmdebstrap", "qemu-img", "mkfs.ext4"]) {
        return;
    }
    if std::env::var_os("KARST_TEST_LONG").is_none() && !common::cached_vm() {
        println!("skipped: building the VM image takes minutes; set KARST_TEST_LONG=1");
        return;
    }
    let (store, id) = build(InstanceKind::VirtualMachine).await;
    let facts = store.facts(id).await.unwrap();
    assert_eq!(facts.disk_size, 2 << 30);
    let Content::Disk { path, size } = store.content(id).await.unwrap() else {
        panic!("a VM image is a disk")
    };
    assert_eq!(size, 2 << 30);
    let header = karst_image::qcow2::check("disk", &std::fs::File::open(path).unwrap()).unwrap();
    assert_eq!(header.size, size);
    store.delete(id).await.unwrap();
}
