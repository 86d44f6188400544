//! A disk goes on in layers while a small Linux writes to it, which are made one again in all ways, as if nothing had been.
#![allow(clippy::disallowed_methods)] // deals with the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod common;

use common::{Place, console::Shell};
use karst_guest::{
    DiskChain, DiskCopyEnd, DiskCopyPhase, DiskFormat, DiskMerge, GuestDriver, LowerFile, NewLayer,
    ResolvedDisk, StopMode,
};
use karst_host::{Program, run};
use karst_model::{
    ErrorKind, InstanceId, VolumeId,
    instance::RuntimeState,
    layer::{Base, Merge},
};
use karst_vm_qemu::QemuDriver;
use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const VOLUME: VolumeId = VolumeId(uuid::Uuid::from_u128(1));
const WRITE: &str = "dd if=/dev/urandom of=/dev/vdb bs=1M conv=fsync 2>/dev/null";
const SUM: &str = "sync; echo 3 >/proc/sys/vm/drop_caches; md5sum </dev/vdb";

/// An empty layer of 16 MiB, as a pool makes it.
async fn blank(place: &Place, name: &str) -> PathBuf {
    let path = place.dir.join(name);
    let made = run(Program::QemuImg).args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("16M").ok().await;
    made.unwrap();
    path
}

fn layer(disk: &Path, path: &Path, number: u32) -> Vec<NewLayer> {
    vec![NewLayer { disk: disk.to_owned(), path: path.to_owned(), number }]
}

fn lower(number: u32, path: &Path, format: DiskFormat) -> LowerFile {
    LowerFile { number, path: path.to_owned(), format }
}

async fn phase(driver: &QemuDriver, id: InstanceId) -> DiskCopyPhase {
    driver.disk_copies().unwrap().state(id, VOLUME).await.unwrap().phase
}

/// A merge from its begin to its end.
async fn merge(driver: &QemuDriver, id: InstanceId, path: &Path, merge: Merge) {
    let request = DiskMerge { volume: VOLUME, path: path.to_owned(), merge, speed: 0 };
    for _ in 0..2 {
        driver.disk_merges().unwrap().merge(id, request.clone()).await.unwrap();
    }
    let limit = Instant::now() + Duration::from_secs(120);
    while !matches!(phase(driver, id).await, DiskCopyPhase::Ready | DiskCopyPhase::Pivoted) {
        assert!(Instant::now() < limit, "{merge:?}: {:?}", phase(driver, id).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for _ in 0..2 {
        driver.disk_copies().unwrap().end(id, VOLUME, DiskCopyEnd::Pivot).await.unwrap();
    }
    assert_eq!(phase(driver, id).await, DiskCopyPhase::Pivoted, "{merge:?}");
    assert_eq!(driver.observe(id).await.unwrap().state, RuntimeState::Running, "{merge:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layers_come_and_go_below_a_guest_that_writes() {
    let Some(place) = Place::small("layers") else { return };
    let mut guest = place.guest(1);
    let id = guest.instance;
    guest.machine.as_mut().unwrap().ports = 8;
    guest.limits.cpu = None;
    (guest.root.slot, guest.root.pci) = ("scsi0".into(), None);
    guest.root.boot_priority = 1;
    guest.nics[0].pci = Some("01:00.0".into());
    let first = place.dir.join("first");
    std::fs::File::create(&first).unwrap().set_len(16 << 20).unwrap();
    let mut data =
        ResolvedDisk { name: "data".into(), path: first.clone(), boot_priority: 0, ..guest.root.clone() };
    (data.slot, data.pci, data.format) = ("virtio0".into(), Some("02:00.0".into()), DiskFormat::Raw);
    guest.disks = vec![data];
    let driver = place.driver();
    driver.start(&guest).await.unwrap();
    let mut shell = Shell::open(&driver, id).await;
    shell.until_up();
    shell.run(&format!("{WRITE} count=8"));
    let files =
        [blank(&place, "layer-1").await, blank(&place, "layer-2").await, blank(&place, "layer-3").await];

    // What cannot be leaves nothing.
    let nowhere = layer(Path::new("/nonexistent"), &files[0], 1);
    assert!(driver.disk_merges().unwrap().add(id, nowhere).await.unwrap_err().is(ErrorKind::NotFound));
    let missing = layer(&first, &place.dir.join("missing"), 1);
    driver.disk_merges().unwrap().add(id, missing.clone()).await.unwrap_err();
    assert!(!driver.disk_merges().unwrap().take_back(id, missing).await.unwrap());

    // What the disk was until then does not change any more, also when the host's process is another one.
    let sum = shell.run(SUM);
    let before = std::fs::read(&first).unwrap();
    for _ in 0..2 {
        driver.disk_merges().unwrap().add(id, layer(&first, &files[0], 1)).await.unwrap();
    }
    assert_eq!(shell.run(SUM), sum);
    shell.run(&format!("{WRITE} seek=3 count=2"));
    drop(driver);
    let driver = place.driver();
    assert_eq!(driver.adopt().await.unwrap().len(), 1);
    driver.disk_merges().unwrap().add(id, layer(&files[0], &files[1], 2)).await.unwrap();
    shell.run(&format!("{WRITE} seek=12 count=2"));
    assert!(std::fs::read(&first).unwrap() == before, "the lowest is as it was");
    let mut now = guest.clone();
    now.disks[0].path = files[1].clone();
    now.disks[0].format = DiskFormat::Qcow2;
    now.disks[0].chain = DiskChain {
        number: 2,
        below: vec![lower(1, &files[0], DiskFormat::Qcow2), lower(0, &first, DiskFormat::Raw)],
    };
    assert_eq!(driver.update(&now).await.unwrap().pending, Vec::<String>::new(), "it is that disk");
    driver.machine().unwrap().grow(id, &files[1], 24 << 20).await.unwrap();
    shell.until("cat /sys/block/vdb/size", &(24 * 2048).to_string());
    shell.run(&format!("{WRITE} seek=20 count=2"));

    // A merge that is broken off by the end of the machine has changed nothing that the guest reads.
    let sum = shell.run(SUM);
    let slow = DiskMerge {
        volume: VOLUME,
        path: files[1].clone(),
        merge: Merge::Pull { base: None },
        speed: 1 << 20,
    };
    driver.disk_merges().unwrap().merge(id, slow).await.unwrap();
    let busy = driver.machine().unwrap().grow(id, &files[1], 32 << 20).await.unwrap_err();
    assert!(busy.is(ErrorKind::Conflict), "{busy}");
    driver.stop(id, StopMode::Force).await.unwrap();
    assert_eq!(phase(&driver, id).await, DiskCopyPhase::Gone);
    now.generation = now.generation.next();
    driver.start(&now).await.unwrap();
    let mut shell = Shell::open(&driver, id).await;
    shell.until_up();
    assert_eq!(shell.run(SUM), sum);

    // The one in the middle goes, while the guest writes to the highest.
    merge(&driver, id, &files[1], Merge::Commit { top: 1, base: Base::Lowest }).await;
    std::fs::remove_file(&files[0]).unwrap();
    assert_eq!(shell.run(SUM), sum);
    // Then the highest: what is written from then on is in the lowest alone.
    shell.run(&format!("{WRITE} seek=5 count=1"));
    let sum = shell.run(SUM);
    merge(&driver, id, &files[1], Merge::Commit { top: 2, base: Base::Lowest }).await;
    std::fs::remove_file(&files[1]).unwrap();
    assert_eq!(shell.run(SUM), sum);
    assert_eq!(std::fs::metadata(&first).unwrap().len(), 24 << 20, "it has grown with them");
    let before = std::fs::read(&first).unwrap();
    shell.run(&format!("{WRITE} count=1"));
    assert!(std::fs::read(&first).unwrap() != before);

    // And a layer gets all that is below it.
    let grown =
        run(Program::QemuImg).args(["resize", "-q", "-f", "qcow2"]).arg(&files[2]).arg("24M").ok().await;
    grown.unwrap();
    driver.disk_merges().unwrap().add(id, layer(&first, &files[2], 3)).await.unwrap();
    shell.run(&format!("{WRITE} seek=9 count=1"));
    let sum = shell.run(SUM);
    merge(&driver, id, &files[2], Merge::Pull { base: None }).await;
    std::fs::remove_file(&first).unwrap();
    assert_eq!(shell.run(SUM), sum);
    driver.stop(id, StopMode::Force).await.unwrap();
    now.disks[0].path = files[2].clone();
    now.disks[0].chain = DiskChain { number: 3, below: vec![] };
    now.generation = now.generation.next();
    driver.start(&now).await.unwrap();
    let mut shell = Shell::open(&driver, id).await;
    shell.until_up();
    assert_eq!(shell.run(SUM), sum, "one file is the disk");
    driver.stop(id, StopMode::Force).await.unwrap();
    driver.destroy(id).await.unwrap();
    place.assert_clean();
}
