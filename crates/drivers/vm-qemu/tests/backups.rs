//! Disks are followed and backed up while a small Linux writes to them: whole, what changed, and read over NBD.
#![allow(clippy::disallowed_methods)] // deals with the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod common;

use common::{Place, console::Shell};
use karst_guest::{
    BackedUpDisk, BackupServer, DiskBackup, DiskBackupPhase, DiskFormat, GuestDriver, MarkedDisk,
    NewCheckpoint, ResolvedDisk, StopMode, UnmarkedDisk, scratch_size,
};
use karst_model::{CheckpointId, DiskBackupId, ErrorKind, InstanceId};
use karst_vm_qemu::QemuDriver;
use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const MIB: u64 = 1 << 20;

fn file(place: &Place, name: &str, bytes: u64) -> PathBuf {
    let path = place.dir.join(name);
    std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

fn id(n: u128) -> CheckpointId {
    CheckpointId(uuid::Uuid::from_u128(n))
}

fn backup(n: u128, from: &Path, to: &Path, since: &[CheckpointId]) -> DiskBackup {
    DiskBackup {
        id: DiskBackupId(uuid::Uuid::from_u128(n)),
        disks: vec![BackedUpDisk {
            path: from.to_owned(),
            since: since.to_vec(),
            to: to.to_owned(),
            export: "vdb".into(),
            bitmap: "backup-vdb".into(),
        }],
        checkpoint: None,
        known: vec![id(1), id(2)],
        server: None,
    }
}

fn mark(n: u128, disk: &Path, before: Option<u128>) -> NewCheckpoint {
    NewCheckpoint { id: id(n), disks: vec![MarkedDisk { path: disk.to_owned(), before: before.map(id) }] }
}

async fn done(driver: &QemuDriver, instance: InstanceId, backup: &DiskBackup) {
    let backups = driver.disk_backups().unwrap();
    backups.begin(instance, backup.clone()).await.unwrap();
    let end = Instant::now() + Duration::from_secs(120);
    loop {
        let state = backups.state(instance, backup.id).await.unwrap();
        match state.phase {
            DiskBackupPhase::Done => break,
            DiskBackupPhase::Running => {}
            other => panic!("{other:?}"),
        }
        assert!(Instant::now() < end, "{state:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    backups.end(instance, backup.id).await.unwrap();
}

/// What a disk has, as a plain file: read when nothing writes to it.
fn plain(place: &Place, disk: &Path) -> Vec<u8> {
    let to = place.dir.join("plain");
    let args = ["convert", "-U", "-f", "qcow2", "-O", "raw", disk.to_str().unwrap(), to.to_str().unwrap()];
    common::run("qemu-img", &args);
    std::fs::read(to).unwrap()
}

async fn marks(driver: &QemuDriver, instance: InstanceId) -> Vec<(CheckpointId, u64, bool)> {
    let all = driver.disk_backups().unwrap().marks(instance).await.unwrap();
    let mut all: Vec<_> = all.into_iter().map(|(_, id, bytes, whole)| (id, bytes, whole)).collect();
    all.sort();
    all
}

const WRITE: &str = "dd if=/dev/urandom of=/dev/vdb bs=1M conv=fsync 2>/dev/null";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_is_followed_and_backed_up_while_it_is_written() {
    let Some(place) = Place::small("backups") else { return };
    let mut guest = place.guest(1);
    let instance = guest.instance;
    guest.machine.as_mut().unwrap().ports = 8;
    guest.limits.cpu = None;
    (guest.root.slot, guest.root.pci) = ("scsi0".into(), None);
    guest.root.boot_priority = 1;
    guest.nics[0].pci = Some("01:00.0".into());
    let disk = place.dir.join("disk.qcow2");
    common::run("qemu-img", &["create", "-q", "-f", "qcow2", disk.to_str().unwrap(), "16M"]);
    let mut data = ResolvedDisk {
        name: "data".into(),
        path: disk.clone(),
        format: DiskFormat::Qcow2,
        boot_priority: 0,
        ..guest.root.clone()
    };
    (data.slot, data.pci) = ("virtio0".into(), Some("02:00.0".into()));
    guest.disks = vec![data];
    let driver = place.driver();
    driver.start(&guest).await.unwrap();
    let mut shell = Shell::open(&driver, instance).await;
    shell.until_up();
    shell.run(&format!("{WRITE} count=4"));
    let backups = driver.disk_backups().unwrap();

    // What cannot be leaves nothing.
    let raw = backups.mark(instance, mark(1, &guest.root.path, None), vec![]).await.unwrap_err();
    assert!(raw.is(ErrorKind::Unsupported) && raw.message.contains("\"root\" is raw"), "{raw}");
    let both = NewCheckpoint {
        id: id(1),
        disks: [&disk, &guest.root.path].map(|path| MarkedDisk { path: path.clone(), before: None }).to_vec(),
    };
    assert!(backups.mark(instance, both, vec![]).await.is_err());
    assert!(marks(&driver, instance).await.is_empty());
    let small = file(&place, "small", 8 * MIB);
    let e = backups.begin(instance, backup(1, &disk, &small, &[])).await.unwrap_err();
    assert!(e.is(ErrorKind::Invalid) && e.message.contains("size"), "{e}");

    // A whole backup with a checkpoint of the same moment.
    let to = file(&place, "to", 16 * MIB);
    let whole = DiskBackup { checkpoint: Some(mark(1, &disk, None)), ..backup(2, &disk, &to, &[]) };
    done(&driver, instance, &whole).await;
    assert_eq!(plain(&place, &disk), std::fs::read(&to).unwrap());
    assert_eq!(marks(&driver, instance).await, [(id(1), 0, true)]);
    // Another checkpoint between two writes: what changed since the first is in both.
    shell.run(&format!("{WRITE} seek=6 count=1"));
    backups.mark(instance, mark(2, &disk, Some(1)), vec![id(1)]).await.unwrap();
    backups.mark(instance, mark(2, &disk, Some(1)), vec![id(1)]).await.expect("twice is once");
    shell.run(&format!("{WRITE} seek=9 count=2"));
    assert_eq!(marks(&driver, instance).await, [(id(1), MIB, true), (id(2), 2 * MIB, true)]);
    let before = std::fs::read(&to).unwrap();
    done(&driver, instance, &backup(3, &disk, &to, &[id(1), id(2)])).await;
    let after = std::fs::read(&to).unwrap();
    assert!(before != after && plain(&place, &disk) == after, "it is brought up to date");
    let lost = backups.begin(instance, backup(4, &disk, &to, &[id(9), id(2)])).await.unwrap_err();
    assert!(lost.is(ErrorKind::Conflict) && lost.message.contains("\"data\""), "{lost}");

    // One that is read has the content of its moment, whatever is written meanwhile, and outlives the host's process.
    let scratch = file(&place, "scratch", scratch_size(16 * MIB));
    let read = DiskBackup { server: Some(BackupServer::Unix), ..backup(5, &disk, &scratch, &[id(2)]) };
    backups.begin(instance, read.clone()).await.unwrap();
    shell.run(&format!("{WRITE} count=3"));
    let grown = driver.machine().unwrap().grow(instance, &disk, 32 * MIB).await.unwrap_err();
    assert!(grown.is(ErrorKind::Conflict) && grown.message.contains("backed up"), "{grown}");
    drop(driver);
    let driver = place.driver();
    assert_eq!(driver.adopt().await.unwrap().len(), 1);
    let backups = driver.disk_backups().unwrap();
    backups.begin(instance, read.clone()).await.expect("it goes on");
    let state = backups.state(instance, read.id).await.unwrap();
    assert_eq!(state.phase, DiskBackupPhase::Running);
    let socket = state.socket.unwrap();
    let copy = place.dir.join("copy");
    let from = format!("nbd+unix:///vdb?socket={socket}");
    common::run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &from, copy.to_str().unwrap()]);
    assert!(std::fs::read(&copy).unwrap() == after, "as it was at the moment");
    assert!(plain(&place, &disk) != after, "and not as it is");
    let bitmap = format!(
        "driver=nbd,server.type=unix,server.path={socket},export=vdb,x-dirty-bitmap=qemu:dirty-bitmap:backup-vdb"
    );
    let map = std::process::Command::new("qemu-img")
        .args(["map", "--output=json", "--image-opts", &bitmap])
        .output()
        .unwrap();
    let map: Vec<serde_json::Value> = serde_json::from_slice(&map.stdout).unwrap();
    let changed: u64 = map.iter().filter(|e| e["data"] == false).map(|e| e["length"].as_u64().unwrap()).sum();
    assert_eq!(changed, 2 * MIB, "{map:?}");
    for _ in 0..2 {
        backups.end(instance, read.id).await.unwrap();
    }
    assert!(!Path::new(&socket).exists());

    // It ends by force and begins anew: what was followed is known.
    driver.stop(instance, StopMode::Force).await.unwrap();
    guest.generation = guest.generation.next();
    driver.start(&guest).await.unwrap();
    assert_eq!(marks(&driver, instance).await, [(id(1), MIB, true), (id(2), 5 * MIB, true)]);
    done(&driver, instance, &backup(6, &disk, &to, &[id(1), id(2)])).await;
    assert_eq!(plain(&place, &disk), std::fs::read(&to).unwrap());
    // What goes leaves what it has to the one before, which follows then.
    let gone = vec![UnmarkedDisk { path: disk.clone(), parent: Some(id(1)), last: true }];
    for _ in 0..2 {
        backups.unmark(instance, id(2), gone.clone()).await.unwrap();
    }
    // MiB 0 to 2, 6, 9 and 10.
    assert_eq!(marks(&driver, instance).await, [(id(1), 6 * MIB, true)]);
    done(&driver, instance, &DiskBackup { known: vec![id(1)], ..backup(7, &disk, &to, &[id(1)]) }).await;

    // One that ends while it is read leaves nothing.
    let scratch = file(&place, "scratch2", scratch_size(16 * MIB));
    let mut last = DiskBackup { id: DiskBackupId(uuid::Uuid::from_u128(8)), known: vec![id(1)], ..read };
    (last.disks[0].to, last.disks[0].since) = (scratch, vec![]);
    backups.begin(instance, last.clone()).await.unwrap();
    driver.stop(instance, StopMode::Force).await.unwrap();
    assert_eq!(backups.state(instance, last.id).await.unwrap().phase, DiskBackupPhase::Gone);
    backups.end(instance, last.id).await.unwrap();
    driver.destroy(instance).await.unwrap();
    place.assert_clean();
}
