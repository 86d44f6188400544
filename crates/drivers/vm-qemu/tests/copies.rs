//! A disk is copied while a small Linux writes to it, and the machine goes on from the copy, as if nothing had been.
#![allow(clippy::disallowed_methods)] // deals with the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod common;

use common::{Place, console::Shell};
use karst_guest::{DiskCopy, DiskCopyEnd, DiskCopyPhase, DiskFormat, GuestDriver, ResolvedDisk, StopMode};
use karst_model::{
    ErrorKind, InstanceId, VolumeId,
    device::{DiskLimits, DiskRate},
    instance::RuntimeState,
};
use karst_vm_qemu::QemuDriver;
use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

fn file(place: &Place, name: &str, mib: u64) -> PathBuf {
    let path = place.dir.join(name);
    std::fs::File::create(&path).unwrap().set_len(mib << 20).unwrap();
    path
}

fn volume(n: u128) -> VolumeId {
    VolumeId(uuid::Uuid::from_u128(n))
}

fn copy(n: u128, from: &Path, to: &Path) -> DiskCopy {
    DiskCopy {
        to: volume(n),
        from: from.to_owned(),
        path: to.to_owned(),
        format: DiskFormat::Raw,
        backing: None,
        speed: 0,
        synchronous: false,
    }
}

async fn phase(driver: &QemuDriver, id: InstanceId, n: u128) -> DiskCopyPhase {
    driver.disk_copies().unwrap().state(id, volume(n)).await.unwrap().phase
}

async fn until_ready(driver: &QemuDriver, id: InstanceId, n: u128) {
    let end = Instant::now() + Duration::from_secs(120);
    while phase(driver, id, n).await != DiskCopyPhase::Ready {
        assert!(Instant::now() < end, "{:?}", driver.disk_copies().unwrap().state(id, volume(n)).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

const WRITE: &str = "dd if=/dev/urandom of=/dev/vdb bs=1M conv=fsync 2>/dev/null";
const SUM: &str = "md5sum </dev/vdb";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_is_copied_while_it_is_written() {
    let Some(place) = Place::small("copies") else { return };
    let mut guest = place.guest(1);
    let id = guest.instance;
    guest.machine.as_mut().unwrap().ports = 8;
    guest.limits.cpu = None;
    (guest.root.slot, guest.root.pci) = ("scsi0".into(), None);
    guest.root.boot_priority = 1;
    guest.nics[0].pci = Some("01:00.0".into());
    let first = file(&place, "first", 16);
    let mut data =
        ResolvedDisk { name: "data".into(), path: first.clone(), boot_priority: 0, ..guest.root.clone() };
    (data.slot, data.pci) = ("virtio0".into(), Some("02:00.0".into()));
    data.io.limits = DiskLimits { read: None, write: Some(DiskRate::Bytes { per_second: 64 << 20 }) };
    guest.disks = vec![data.clone()];
    let driver = place.driver();
    driver.start(&guest).await.unwrap();
    let mut shell = Shell::open(&driver, id).await;
    shell.until_up();
    shell.run(&format!("{WRITE} count=8"));
    let copies = driver.disk_copies().unwrap();

    // What cannot be leaves nothing.
    let small = file(&place, "small", 8);
    let e = copies.begin(id, copy(1, &first, &small)).await.unwrap_err();
    assert!(e.is(ErrorKind::Invalid) && e.field.as_deref() == Some("to"), "{e:?}");
    assert_eq!(phase(&driver, id, 1).await, DiskCopyPhase::Gone);
    let nowhere = copies.begin(id, copy(1, Path::new("/nonexistent"), &small)).await.unwrap_err();
    assert!(nowhere.is(ErrorKind::NotFound), "{nowhere}");

    // One that takes a while: nothing else happens to the disk, and it does not end before it is whole.
    let second = file(&place, "second", 16);
    copies.begin(id, DiskCopy { speed: 1 << 20, ..copy(2, &first, &second) }).await.unwrap();
    copies.begin(id, copy(2, &first, &second)).await.expect("twice is once");
    let other = copies.begin(id, copy(3, &first, &small)).await.unwrap_err();
    assert!(other.is(ErrorKind::Conflict) && other.message.contains("elsewhere"), "{other}");
    for how in [DiskCopyEnd::Pivot, DiskCopyEnd::Finish] {
        assert!(copies.end(id, volume(2), how).await.unwrap_err().is(ErrorKind::Conflict), "{how:?}");
    }
    assert_eq!(driver.observe(id).await.unwrap().state, RuntimeState::Running);
    let grown = driver.machine().unwrap().grow(id, &first, 32 << 20).await.unwrap_err();
    assert!(grown.is(ErrorKind::Conflict) && grown.message.contains("copied"), "{grown}");
    let mut gone = guest.clone();
    gone.disks.clear();
    assert!(driver.update(&gone).await.unwrap_err().is(ErrorKind::Conflict));
    assert_eq!(copies.state(id, volume(2)).await.unwrap().speed, 1 << 20);
    copies.set_speed(id, volume(2), 0).await.unwrap();
    shell.run(&format!("{WRITE} seek=3 count=2"));
    until_ready(&driver, id, 2).await;
    let state = copies.state(id, volume(2)).await.unwrap();
    assert!(state.total >= 16 << 20 && state.done > 0 && state.speed == 0, "{state:?}");

    // The host's process is another one by now. What is written at the last moment is on the copy too.
    drop(driver);
    let driver = place.driver();
    assert_eq!(driver.adopt().await.unwrap().len(), 1);
    let copies = driver.disk_copies().unwrap();
    assert_eq!(phase(&driver, id, 2).await, DiskCopyPhase::Ready);
    shell.run(&format!("{WRITE} seek=14 count=1"));
    let sum = shell.run(SUM);
    copies.end(id, volume(2), DiskCopyEnd::Pivot).await.unwrap();
    copies.end(id, volume(2), DiskCopyEnd::Pivot).await.expect("twice is once");
    assert_eq!(driver.observe(id).await.unwrap().state, RuntimeState::Running);
    assert_eq!(phase(&driver, id, 2).await, DiskCopyPhase::Pivoted);
    assert!(copies.end(id, volume(2), DiskCopyEnd::Cancel).await.unwrap_err().is(ErrorKind::Conflict));
    shell.run("echo 3 >/proc/sys/vm/drop_caches");
    assert_eq!(shell.run(SUM), sum);
    assert_eq!(std::fs::read(&first).unwrap(), std::fs::read(&second).unwrap());
    // Holes are holes again: of 16 MiB 5 were never written.
    assert!(std::fs::metadata(&second).unwrap().blocks() * 512 < 14 << 20, "the copy has holes");
    let before = std::fs::read(&first).unwrap();
    shell.run(&format!("{WRITE} seek=1 count=1"));
    assert!(std::fs::read(&first).unwrap() == before && std::fs::read(&second).unwrap() != before);

    // Everything else finds the disk where it is now.
    let mut moved = guest.clone();
    moved.disks[0].path = second.clone();
    assert_eq!(driver.update(&moved).await.unwrap().pending, Vec::<String>::new());
    driver.machine().unwrap().grow(id, &second, 24 << 20).await.unwrap();
    shell.until("cat /sys/block/vdb/size", &(24 * 2048).to_string());
    assert_eq!(std::fs::metadata(&second).unwrap().len(), 24 << 20);
    moved.disks[0].io.limits =
        DiskLimits { read: None, write: Some(DiskRate::Bytes { per_second: 1 << 20 }) };
    assert_eq!(driver.update(&moved).await.unwrap().pending, Vec::<String>::new());
    let slow = format!(
        "s=$(cut -d. -f1 /proc/uptime); {WRITE} count=4; echo $(($(cut -d. -f1 /proc/uptime) - s >= 2))"
    );
    assert_eq!(shell.run(&slow), "1", "limits hold on the copy");
    assert!(driver.machine().unwrap().figures(id).await.unwrap().disks.contains_key("virtio0"));

    // A copy of the copy that is left as the disk was, and one that is broken off.
    let third = file(&place, "third", 24);
    copies.begin(id, DiskCopy { synchronous: true, ..copy(4, &second, &third) }).await.unwrap();
    until_ready(&driver, id, 4).await;
    copies.end(id, volume(4), DiskCopyEnd::Finish).await.unwrap();
    assert_eq!(std::fs::read(&third).unwrap(), std::fs::read(&second).unwrap());
    shell.run(&format!("{WRITE} count=1"));
    assert!(std::fs::read(&third).unwrap() != std::fs::read(&second).unwrap());
    let fourth = file(&place, "fourth", 24);
    copies.begin(id, DiskCopy { speed: 1 << 20, ..copy(5, &second, &fourth) }).await.unwrap();
    for _ in 0..2 {
        copies.end(id, volume(5), DiskCopyEnd::Cancel).await.unwrap();
    }
    assert_eq!(driver.observe(id).await.unwrap().state, RuntimeState::Running);

    // Back to the first names, while the machine is frozen; it stays so.
    driver.pause(id).await.unwrap();
    copies.begin(id, copy(6, &second, &fourth)).await.unwrap();
    until_ready(&driver, id, 6).await;
    copies.end(id, volume(6), DiskCopyEnd::Pivot).await.unwrap();
    assert_eq!(driver.observe(id).await.unwrap().state, RuntimeState::Paused);
    driver.resume(id).await.unwrap();
    let sum = shell.run(SUM);
    moved.disks[0].path = fourth.clone();

    // It goes and comes back as any other disk.
    gone.spec_version += 1;
    assert_eq!(driver.update(&gone).await.unwrap().pending, Vec::<String>::new());
    shell.until("ls /sys/block | grep -c vdb", "0");
    assert_eq!(driver.update(&moved).await.unwrap().pending, Vec::<String>::new());
    shell.until(SUM, &sum);

    // A machine that ends in the middle keeps its disk. Who begins the next copy has long written down how the last one ended.
    copies.begin(id, DiskCopy { speed: 1 << 20, ..copy(7, &fourth, &third) }).await.unwrap();
    driver.stop(id, StopMode::Force).await.unwrap();
    assert_eq!(phase(&driver, id, 7).await, DiskCopyPhase::Gone);
    assert!(copies.end(id, volume(7), DiskCopyEnd::Pivot).await.unwrap_err().is(ErrorKind::Conflict));
    copies.end(id, volume(7), DiskCopyEnd::Cancel).await.unwrap();
    assert_eq!(phase(&driver, id, 6).await, DiskCopyPhase::Gone);
    // One that went on from a copy says so until its next start, also when it has ended.
    moved.generation = moved.generation.next();
    driver.start(&moved).await.unwrap();
    copies.begin(id, copy(8, &fourth, &third)).await.unwrap();
    until_ready(&driver, id, 8).await;
    copies.end(id, volume(8), DiskCopyEnd::Pivot).await.unwrap();
    driver.stop(id, StopMode::Force).await.unwrap();
    assert_eq!(phase(&driver, id, 8).await, DiskCopyPhase::Pivoted);
    moved.disks[0].path = third.clone();
    moved.generation = moved.generation.next();
    driver.start(&moved).await.unwrap();
    assert_eq!(phase(&driver, id, 8).await, DiskCopyPhase::Gone);
    driver.stop(id, StopMode::Force).await.unwrap();
    driver.destroy(id).await.unwrap();
    place.assert_clean();
}
