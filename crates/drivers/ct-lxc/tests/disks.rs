//! Disks beside the root, in real containers: at the start, while it runs, over its own reboot and the host's.
#![allow(clippy::disallowed_methods)] // tests live in the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod common;

use common::{Place, bare_disk, inside, shell, until};
use karst_guest::{DiskFormat, GuestDriver, Opened, ResolvedDisk, ResolvedGuest, ResolvedNode, StopMode};
use karst_host::mountns::DeviceNumber;
use karst_model::{
    ErrorKind,
    device::{DiskIo, DiskLimits, DiskRate},
    instance::RuntimeState,
};
use std::{
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

/// A volume: a directory whose files carry unshifted owners.
fn volume(place: &Place, name: &str, at: &str) -> ResolvedDisk {
    let path = place.dir.path().join(name);
    std::fs::create_dir_all(&path).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    ResolvedDisk { mount_point: Some(at.into()), path, ..bare_disk(name) }
}

/// A path of the host, opened as the agent does.
fn foreign(disk: ResolvedDisk) -> ResolvedDisk {
    let opened = karst_host::mountns::open_path(&disk.path).unwrap();
    ResolvedDisk { foreign: true, opened: Some(Opened(Arc::new(opened))), ..disk }
}

const SETTLED: &str = "until systemctl list-units >/dev/null 2>&1; do sleep 0.1; done";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disks_are_there_from_the_start_and_come_and_go() {
    let Some(place) = Place::new() else { return };
    let driver = place.driver();
    let mut guest = place.guest(11);
    let mut data = volume(&place, "data", "/srv/my data");
    std::fs::write(data.path.join("greeting"), "hello").unwrap();
    let sealed = ResolvedDisk { readonly: true, ..volume(&place, "sealed", "/srv/sealed") };
    let file = place.dir.path().join("note");
    std::fs::write(&file, "note").unwrap();
    let note = foreign(ResolvedDisk {
        path: file,
        format: DiskFormat::Raw,
        readonly: true,
        mount_point: Some("/etc/note".into()),
        ..bare_disk("note")
    });
    guest.disks = vec![data.clone(), sealed, note];
    driver.start(&guest).await.unwrap();

    // Owners are the guest's own inside and unshifted on disk.
    assert_eq!(
        inside(&driver, &guest, "cat '/srv/my data/greeting'; echo; cat /etc/note").await,
        "hello\nnote"
    );
    inside(&driver, &guest, "echo x >'/srv/my data/new'; chown 33:33 '/srv/my data/new'").await;
    let written = std::fs::metadata(data.path.join("new")).unwrap();
    assert_eq!((written.uid(), written.gid()), (33, 33));
    // Read-only cannot be taken back from inside, and a device node is none.
    assert_ne!(shell(&driver, &guest, "touch /srv/sealed/x").await.code, 0);
    assert_ne!(
        shell(&driver, &guest, "mount -o remount,rw,bind /srv/sealed && touch /srv/sealed/x").await.code,
        0
    );
    assert_ne!(shell(&driver, &guest, "echo x >>/etc/note").await.code, 0);

    // Plugged while it runs: by another process of the host than the one that started it.
    let again = place.driver();
    again.adopt().await.unwrap();
    let extra = ResolvedDisk { readonly: true, ..volume(&place, "extra", "/mnt/a/b") };
    std::fs::write(extra.path.join("f"), "extra").unwrap();
    guest.disks.push(extra.clone());
    guest.spec_version += 1;
    for _ in 0..2 {
        assert!(again.update(&guest).await.unwrap().pending.is_empty());
    }
    assert_eq!(
        inside(&again, &guest, "cat /mnt/a/b/f; grep -c ' /mnt/a/b ' /proc/self/mountinfo").await,
        "extra1"
    );
    assert_ne!(shell(&again, &guest, "mount -o remount,rw,bind /mnt/a/b && touch /mnt/a/b/x").await.code, 0);

    // Changed: writable now. And another taken away although the guest moved it and hid it under a mount of its own.
    guest.disks.last_mut().unwrap().readonly = false;
    inside(
        &again,
        &guest,
        "mkdir /mnt/moved && mount --bind '/srv/my data' /mnt/moved && mount -t tmpfs none /mnt/moved",
    )
    .await;
    guest.disks.retain(|d| d.name != "data");
    again.update(&guest).await.unwrap();
    inside(&again, &guest, "touch /mnt/a/b/x").await;
    assert!(extra.path.join("x").exists());
    let seen = inside(
        &again,
        &guest,
        "ls -A /mnt/moved '/srv/my data'; grep -c test-cache.*/data /proc/self/mountinfo || true",
    )
    .await;
    assert!(!seen.contains("greeting") && seen.ends_with('0'), "{seen}");

    // The guest's own reboot mounts what it has now.
    until_settled(&again, &guest).await;
    let pid = again.observe(guest.instance).await.unwrap().pid;
    shell(&again, &guest, "systemctl reboot").await;
    let end = Instant::now() + Duration::from_secs(180);
    while again.observe(guest.instance).await.is_ok_and(|o| o.state != RuntimeState::Running || o.pid == pid)
    {
        assert!(Instant::now() < end, "no reboot");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(inside(&again, &guest, "cat /mnt/a/b/f").await, "extra");
    assert_ne!(shell(&again, &guest, "test -e '/srv/my data/greeting'").await.code, 0);

    // What cannot be mounted changes nothing and names the device.
    let before = guest.clone();
    data.mount_point = Some("/proc".into());
    guest.disks.push(data.clone());
    assert_eq!(again.update(&guest).await.unwrap_err().field.as_deref(), Some("devices.data.path"));
    data.mount_point = Some("/etc/passwd".into());
    *guest.disks.last_mut().unwrap() = data;
    assert_eq!(again.update(&guest).await.unwrap_err().field.as_deref(), Some("devices.data.path"));
    guest = before;
    again.update(&guest).await.unwrap();
    assert_eq!(inside(&again, &guest, "cat /mnt/a/b/f; wc -l </proc/self/mountinfo >/dev/null; grep -c passwd /proc/self/mountinfo || true").await, "extra0");

    again.stop(guest.instance, StopMode::Force).await.unwrap();
    place.assert_clean();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(place.dir.path().to_str().unwrap()), "the host has no mounts of it");
}

async fn until_settled(driver: &dyn GuestDriver, guest: &ResolvedGuest) {
    inside(driver, guest, SETTLED).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paths_of_the_host_keep_their_owners_unless_shifted() {
    let Some(place) = Place::new() else { return };
    let driver = place.driver();
    let mut guest = place.guest(12);
    let plain = foreign(volume(&place, "plain", "/srv/plain"));
    let shifted = ResolvedDisk { shift: true, ..foreign(volume(&place, "shifted", "/srv/shifted")) };
    std::fs::set_permissions(&plain.path, std::fs::Permissions::from_mode(0o755)).unwrap();
    // What is renamed after it was opened does not change what is mounted.
    let other = place.dir.path().join("secret");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("key"), "").unwrap();
    guest.disks = vec![plain.clone(), shifted.clone()];
    std::fs::rename(&plain.path, place.dir.path().join("plain.was")).unwrap();
    std::os::unix::fs::symlink("secret", &plain.path).unwrap();
    driver.start(&guest).await.unwrap();
    assert_eq!(inside(&driver, &guest, "stat -c %u /srv/plain; ls /srv/plain").await, "65534");
    assert_ne!(shell(&driver, &guest, "touch /srv/plain/x").await.code, 0, "the host's root owns it");
    inside(&driver, &guest, "touch /srv/shifted/x").await;
    assert_eq!(std::fs::metadata(shifted.path.join("x")).unwrap().uid(), 0);

    // With what the host mounts below, also later.
    let below = shifted.path.join("below");
    std::fs::create_dir(&below).unwrap();
    let tree =
        foreign(ResolvedDisk { recursive: true, follow: true, ..volume(&place, "shifted", "/srv/tree") });
    guest.disks.push(ResolvedDisk { name: "tree".into(), ..tree });
    driver.update(&guest).await.unwrap();
    assert_eq!(inside(&driver, &guest, "ls /srv/tree").await, "below\nx");
    driver.stop(guest.instance, StopMode::Force).await.unwrap();
    place.assert_clean();

    // Block volumes and devices are refused before anything runs.
    guest.disks = vec![ResolvedDisk { format: DiskFormat::Qcow2, ..volume(&place, "block", "/srv/block") }];
    guest.generation = guest.generation.next();
    let e = driver.start(&guest).await.unwrap_err();
    assert_eq!((e.kind, e.field.as_deref()), (ErrorKind::Invalid, Some("devices.block.source")));
    place.assert_clean();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rates_of_disks_hold_from_the_start_and_live() {
    let Some(place) = Place::new() else { return };
    if karst_host::mountns::block_device(place.dir.path()).is_none()
        || !Path::new("/sys/fs/cgroup/blkio").exists()
    {
        return backends::absent(backends::Optional::BlockRates);
    }
    let driver = place.driver();
    let mut guest = place.guest(13);
    let data = volume(&place, "data", "/data");
    let big = data.path.join("big");
    std::fs::write(&big, vec![7u8; 3 << 20]).unwrap();
    std::fs::File::open(&big).unwrap().sync_all().unwrap();
    let limited = DiskIo {
        limits: DiskLimits { read: Some(DiskRate::Bytes { per_second: 1 << 20 }), write: None },
        ..DiskIo::default()
    };
    guest.disks = vec![ResolvedDisk { io: limited, ..data.clone() }];
    driver.start(&guest).await.unwrap();
    let read = "dd if=/data/big of=/dev/null bs=256k iflag=direct 2>/dev/null";
    let start = Instant::now();
    inside(&driver, &guest, read).await;
    // The least that the limit demands; no bound of the other side, which a busy host could break.
    assert!(start.elapsed() >= Duration::from_millis(1800), "3 MiB at 1 MiB/s took {:?}", start.elapsed());
    guest.disks = vec![data];
    driver.update(&guest).await.unwrap();
    let cgroups = karst_host::cgroup::Cgroups::detect().unwrap();
    let group = format!("karst-{}/{}", place.daemon_id, guest.instance);
    let file = "blkio.throttle.read_bps_device";
    let limit =
        || cgroups.dirs(&group).iter().find_map(|d| std::fs::read_to_string(d.join(file)).ok()).unwrap();
    assert_eq!(limit(), "");
    // It has no group of its own there, in which it could leave the limit behind.
    let own = inside(&driver, &guest, "grep blkio: /proc/1/cgroup").await;
    assert!(own.ends_with(":/") || own.ends_with(&group), "{own}");
    driver.stop(guest.instance, StopMode::Force).await.unwrap();
    until("its end", || place.guests.exists()).await;
    place.assert_clean();
}

/// Major and minor number of `/dev/loop-control`.
const LOOPS: (u32, u32) = (10, 237);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn device_nodes_are_given_and_taken() {
    let Some(place) = Place::new() else { return };
    if !Path::new("/dev/loop-control").exists() {
        return backends::absent(backends::Optional::LoopDevices);
    }
    let driver = place.driver();
    let mut guest = place.guest(14);
    // A device that no container has otherwise and that needs no right to be opened.
    let node = |name: &str, path: &str, (major, minor), uid| ResolvedNode {
        name: name.into(),
        path: path.into(),
        device: DeviceNumber { block: false, major, minor },
        uid,
        gid: 7,
        mode: 0o640,
    };
    guest.nodes = vec![node("loops", "/dev/of/loops", LOOPS, 5)];
    driver.start(&guest).await.unwrap();
    let described = "stat -c '%F %t:%T %u:%g %a' /dev/of/loops";
    assert_eq!(inside(&driver, &guest, described).await, "character special file a:ed 5:7 640");
    inside(&driver, &guest, ": <>/dev/of/loops").await;
    // Live: another comes, the first goes, and its number is forbidden again.
    guest.nodes = vec![node("again", "/dev/again", LOOPS, 0), node("null", "/dev/null2", (1, 3), 0)];
    driver.update(&guest).await.unwrap();
    inside(&driver, &guest, ": <>/dev/again && echo x >/dev/null2").await;
    assert_ne!(shell(&driver, &guest, "test -c /dev/of/loops").await.code, 0);
    guest.nodes.clear();
    driver.update(&guest).await.unwrap();
    inside(&driver, &guest, "echo still >/dev/null && ! test -e /dev/again && ! test -e /dev/null2").await;
    // Its own node of that number would be of no use either.
    inside(&driver, &guest, "! mknod /tmp/k c 10 237").await;
    let e = {
        guest.nodes = vec![node("bad", "/dev/bad", LOOPS, 70_000)];
        driver.update(&guest).await.unwrap_err()
    };
    assert_eq!(e.field.as_deref(), Some("devices.bad.uid"));
    driver.stop(guest.instance, StopMode::Force).await.unwrap();
    place.assert_clean();
}
