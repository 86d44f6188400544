//! Disks, discs and NICs come, change and go while a small Linux runs, and it sees that.
#![allow(clippy::disallowed_methods)] // deals with the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod common;

use common::{Place, console::Shell};
use karst_guest::{GuestDriver, ResolvedDisk, ResolvedNic, StopMode};
use karst_model::{
    ErrorKind,
    device::{DiskLimits, DiskRate, NicModel},
    instance::RuntimeState,
    node::AcceleratorKind,
    spec::CpuLimit,
};

fn disk(place: &Place, name: &str, slot: &str, mib: u64) -> ResolvedDisk {
    let path = place.dir.join(name);
    if !path.exists() {
        std::fs::File::create(&path).unwrap().set_len(mib << 20).unwrap();
    }
    let mut d = place.guest(1).root;
    (d.name, d.slot, d.path, d.pci) = (name.into(), slot.into(), path, None);
    d
}

fn at(mut disk: ResolvedDisk, pci: &str) -> ResolvedDisk {
    disk.pci = Some(pci.into());
    disk
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_come_and_go() {
    let Some(place) = Place::small("hotplug") else { return };
    let mut guest = place.guest(1);
    let id = guest.instance;
    {
        let machine = guest.machine.as_mut().unwrap();
        machine.ports = 8;
    }
    guest.limits.cpu = None;
    (guest.root.slot, guest.root.pci) = ("scsi0".into(), None);
    guest.root.boot_priority = 1;
    guest.nics[0].pci = Some("01:00.0".into());
    let mut disc = disk(&place, "disc", "sata0", 3);
    disc.cdrom = true;
    let data = at(disk(&place, "data", "virtio0", 5), "02:00.0");
    guest.disks = vec![data.clone(), disc.clone()];
    let driver = place.driver();
    driver.start(&guest).await.unwrap();
    let mut shell = Shell::open(&driver, id).await;
    shell.until_up();
    let blocks = "for b in sda sdb sr0 vdb nvme0n1; do [ ! -e /sys/block/$b ] || echo $b $(cat /sys/block/$b/size); done";
    let size = |mib: u64| mib * 2048;
    let root = std::fs::metadata(&guest.root.path).unwrap().len() / 512;
    shell.until(blocks, &format!("sda {root}\nsr0 {}\nvdb {}", size(3), size(5)));
    shell.until("ip link set eth0 up; cat /sys/class/net/eth0/carrier", "1");

    // One goes, two come, the disc is taken out, the cable too, and the root gets limits.
    let mut changed = guest.clone();
    changed.spec_version += 1;
    let more = disk(&place, "more", "scsi1", 7);
    let fast = at(disk(&place, "fast", "nvme0", 9), "03:00.0");
    changed.disks = vec![more.clone(), ResolvedDisk { ejected: true, ..disc.clone() }, fast.clone()];
    changed.root.io.limits = DiskLimits { read: None, write: Some(DiskRate::Bytes { per_second: 1 << 20 }) };
    changed.nics[0].disconnected = true;
    changed.nics.push(ResolvedNic {
        name: "eth1".into(),
        slot: "net1".into(),
        model: NicModel::E1000e,
        mac: "10:66:6a:00:00:08".into(),
        host_interface: place.tap().replace("ktw", "ktx"),
        pci: Some("04:00.0".into()),
        disconnected: false,
        ..guest.nics[0].clone()
    });
    assert_eq!(driver.update(&changed).await.unwrap().pending, Vec::<String>::new());
    let now = format!("sda {root}\nsdb {}\nnvme0n1 {}", size(7), size(9));
    shell.until(&format!("{blocks} | grep -v sr0"), &now);
    shell.until("dd if=/dev/sr0 of=/dev/null count=1 2>/dev/null || echo none", "none");
    shell.until("cat /sys/class/net/eth0/carrier", "0");
    shell.until("cat /sys/class/net/*/address | grep -c 10:66:6a", "2");
    assert!(std::path::Path::new("/sys/class/net").join(&changed.nics[1].host_interface).exists());
    // The same again changes nothing.
    driver.update(&changed).await.unwrap();

    // It grows under the guest, and not below what it is.
    driver.machine().unwrap().grow(id, &more.path, 11 << 20).await.unwrap();
    shell.until("cat /sys/block/sdb/size", &size(11).to_string());
    assert_eq!(std::fs::metadata(&more.path).unwrap().len(), 11 << 20);
    let e = driver.machine().unwrap().grow(id, &fast.path, 20 << 20).await.unwrap_err();
    assert!(e.is(ErrorKind::Conflict) && e.message.contains("NVMe"), "{e}");
    // The limit holds: 3 MiB at 1 MiB a second take a while. (Measured by the guest's clock, with room for a slow machine.)
    let taken = "s=$(cut -d. -f1 /proc/uptime); dd if=/dev/zero of=/dev/sda seek=20 bs=1M count=1 conv=fsync 2>/dev/null; \
                 dd if=/dev/zero of=/dev/sda seek=20 bs=1M count=3 conv=fsync 2>/dev/null; echo $(($(cut -d. -f1 /proc/uptime) - s >= 2))";
    assert_eq!(shell.run(taken), "1");

    // What cannot be: said with the device, and nothing has changed.
    let mut wrong = changed.clone();
    wrong.disks.push(ResolvedDisk { path: "/nonexistent".into(), ..disk(&place, "wrong", "scsi5", 1) });
    let e = driver.update(&wrong).await.unwrap_err();
    assert!(e.is(ErrorKind::NotFound) && e.message.contains("wrong"), "{e}");
    let mut waits = changed.clone();
    waits.disks.push(disk(&place, "later", "sata1", 1));
    assert_eq!(driver.update(&waits).await.unwrap().pending, ["devices.later"]);

    // Back, by a driver that has just adopted the machine.
    drop(driver);
    let driver = place.driver();
    assert_eq!(driver.adopt().await.unwrap().len(), 1);
    assert_eq!(driver.update(&guest).await.unwrap().pending, Vec::<String>::new());
    shell.until(blocks, &format!("sda {root}\nsr0 {}\nvdb {}", size(3), size(5)));
    shell.until("cat /sys/class/net/eth0/carrier", "1");
    shell.until("cat /sys/class/net/*/address | grep -c 10:66:6a", "1");
    assert!(!std::path::Path::new("/sys/class/net").join(&changed.nics[1].host_interface).exists());

    // A processor comes. One that is to go waits where it could not come back, which is so of emulated ones.
    if std::thread::available_parallelism().is_ok_and(|n| n.get() > 1) {
        let emulated = guest.accelerator == AcceleratorKind::Tcg;
        let mut changed = guest.clone();
        changed.spec_version += 10;
        changed.limits.cpu = Some(CpuLimit::Count { n: 2 });
        assert_eq!(driver.update(&changed).await.unwrap().pending, Vec::<String>::new());
        shell.until("echo 1 >/sys/devices/system/cpu/cpu1/online; nproc", "2");
        changed.spec_version += 1;
        changed.limits.cpu = None;
        let waits: &[&str] = if emulated { &["limits.cpu"] } else { &[] };
        assert_eq!(driver.update(&changed).await.unwrap().pending, waits);
        shell.until("nproc", if emulated { "2" } else { "1" });
    }

    assert_eq!(driver.observe(id).await.unwrap().state, RuntimeState::Running);
    driver.stop(id, StopMode::Force).await.unwrap();
    driver.destroy(id).await.unwrap();
    place.assert_clean();
}
