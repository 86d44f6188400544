//! What a machine has of its host by tags and ports: QEMU takes it as it is said, and a small Linux mounts a directory by its tag.
#![allow(clippy::disallowed_methods)] // deals with the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod common;

use common::{Place, console::Shell};
use karst_guest::{DiskFormat, GuestDriver, Opened, ResolvedDisk, StopMode};
use karst_model::{
    device::{DiskBus, DiskIo, PortDevice, PortEnd, PortPlace, Share, ShareOptions},
    instance::RuntimeState,
    spec::LineSpec,
};
use std::{os::unix::fs::PermissionsExt, sync::Arc};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_with_a_tag_is_the_guests_to_mount() {
    let Some(place) = Place::small("given") else { return };
    let mut guest = place.guest(1);
    let id = guest.instance;
    let granted = place.dir.join("granted");
    std::fs::create_dir(&granted).unwrap();
    std::fs::set_permissions(&granted, PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::write(granted.join("note"), "of the host\n").unwrap();
    std::fs::set_permissions(granted.join("note"), PermissionsExt::from_mode(0o644)).unwrap();
    let directory = |name: &str, slot: &str, tag: &str, options: &str, pci: &str| {
        let options = ShareOptions::parse("share.options", options, Some(DiskBus::Plan9)).unwrap();
        let opened = karst_host::mountns::open_path(&granted).unwrap();
        ResolvedDisk {
            name: name.into(),
            slot: slot.into(),
            path: "/nonexistent".into(),
            format: DiskFormat::Directory,
            mount_point: None,
            readonly: true,
            foreign: true,
            opened: Some(Opened(Arc::new(opened))),
            io: DiskIo { bus: Some(DiskBus::Plan9), ..DiskIo::default() },
            pci: Some(pci.into()),
            share: Share { tag: Some(tag.into()), options },
            ..guest.root.clone()
        }
    };
    // All that 9p has, so that QEMU is asked for all of it.
    let mapped = "immediate,access=mapped,file-mode=0640,directory-mode=0750,devices=forbid,packed";
    let disks = vec![
        directory("filesystem0", "fs0", "/import/data", "access=squash,devices=warn", "00:09.0"),
        directory("filesystem1", "fs1", "mapped", mapped, "00:0a.0"),
        directory("filesystem2", "fs2", "passed", "access=passthrough", "00:0b.0"),
    ];
    guest.disks = disks;
    let machine = guest.machine.as_mut().unwrap();
    // Devices of others, of whom nobody is there yet: QEMU is what is asked.
    let line = |name: &str, place: PortPlace| LineSpec {
        name: name.into(),
        device: PortDevice { place, to: PortEnd::Stream {}, log: None },
    };
    machine.lines = vec![line("smartcard0", PortPlace::Smartcard {}), line("random0", PortPlace::Random {})];
    // It comes with SPICE's modules.
    if karst_vm_qemu::probe::spice() {
        machine.lines.push(line("redirect0", PortPlace::Redirect {}));
    }
    machine.board.usb_filter = Some("0x08:-1:-1:-1:0|-1:-1:-1:-1:1".into());
    let driver = place.driver();
    driver.start(&guest).await.unwrap();
    let mut shell = Shell::open(&driver, id).await;
    shell.until_up();
    let mount = "mkdir -p /m; grep -q ' /m ' /proc/mounts || mount -t 9p -o trans=virtio,version=9p2000.L /import/data /m; cat /m/note";
    shell.until(mount, "of the host");
    assert_eq!(shell.run("echo x 2>/dev/null >/m/x || echo read-only").lines().last(), Some("read-only"));
    let tags = "cat /sys/bus/virtio/drivers/9pnet_virtio/*/mount_tag | tr '\\0' '\\n' | grep -c -e mapped -e passed -e import";
    shell.until(tags, "3");

    // Another tag, or another way, waits for the next start.
    let mut changed = guest.clone();
    changed.spec_version += 1;
    changed.disks[1].share.tag = Some("other".into());
    assert_eq!(driver.update(&changed).await.unwrap().pending, ["devices.filesystem1"]);
    assert_eq!(driver.observe(id).await.unwrap().state, RuntimeState::Running);
    driver.stop(id, StopMode::Force).await.unwrap();
    driver.destroy(id).await.unwrap();
    place.assert_clean();
}
