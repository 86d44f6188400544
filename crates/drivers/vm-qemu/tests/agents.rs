//! Systems that were not made for Karst: with a loader of Incus' agent, and with the QEMU guest agent alone.
#![allow(clippy::disallowed_methods)] // deals with the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod common;

use common::{Inside, Place};
use karst_guest::{
    DiskFormat, ExecStreams, GuestDriver, Opened, ResolvedDisk, StopMode,
    contract::{collect, content, request, shell, until_inside, write_of},
};
use karst_model::{
    ErrorKind,
    device::{DiskBus, DiskIo},
    guest::AgentKind,
};
use std::{
    os::unix::fs::{MetadataExt, PermissionsExt},
    sync::Arc,
    time::Duration,
};

const BOOT: Duration = Duration::from_secs(600);

fn long() -> bool {
    let long = std::env::var_os("KARST_TEST_LONG").is_some();
    if !long {
        println!("skipped: a long test; `make test-all` runs it (KARST_TEST_LONG=1)");
    }
    long
}

async fn agent(driver: &dyn GuestDriver, place: &Place) -> AgentKind {
    driver.metrics(place.guest(1).instance).await.unwrap().system.expect("an agent tells").agent
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_made_for_incus_starts_our_agent() {
    if !long() {
        return;
    }
    let Some(place) = Place::with("incus", Inside::Incus) else { return };
    let (driver, guest) = (place.driver(), place.guest(1));
    driver.start(&guest).await.unwrap();
    until_inside(&driver, &guest, "true", BOOT).await;
    assert_eq!(agent(&driver, &place).await, AgentKind::Karst);
    let mut r = request(&["tty"]);
    r.terminal = Some((80, 24));
    let ran = collect(driver.exec(guest.instance, r).await.unwrap(), b"").await;
    assert!(ran.code == 0 && ran.stdout.contains("/dev/pts/"), "{ran:?}");
    // The unit of the image took it for its own, and left nothing mounted that would forbid saving the machine.
    let unit =
        shell(&driver, &guest, "systemctl is-active incus-agent.service; grep -c 9p /proc/mounts").await;
    assert_eq!(unit.stdout, "active\n0\n", "{unit:?}");
    // The share is there for the next boot, read-only, and holds nothing of this host but the agent.
    let share = shell(
        &driver,
        &guest,
        "mount -t 9p -o trans=virtio,version=9p2000.L config /mnt && ls -A /mnt; \
         touch /mnt/x 2>/dev/null || echo read-only; cat /mnt/../etc/hostname; umount /mnt",
    )
    .await;
    assert_eq!(
        share.stdout,
        "99-karst-agent.rules\nincus-agent\ninstall.sh\nkarst-agent-setup\nkarst-agent.service\nlxd-agent\nread-only\ntest\n",
        "{share:?}"
    );
    driver.stop(guest.instance, StopMode::Force).await.unwrap();
    driver.destroy(guest.instance).await.unwrap();
    place.assert_clean();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_qemu_guest_agent_answers_where_only_that_is_there() {
    if !long() {
        return;
    }
    let Some(place) = Place::with("qemu", Inside::Qemu) else { return };
    let (driver, guest) = (place.driver(), place.guest(1));
    driver.start(&guest).await.unwrap();
    until_inside(&driver, &guest, "true", BOOT).await;
    assert_eq!(agent(&driver, &place).await, AgentKind::Qemu);
    let exec = driver.exec(guest.instance, request(&["cat"])).await.unwrap();
    assert!(matches!(exec.streams, ExecStreams::Pipes { .. }));
    assert_eq!(collect(exec, b"through").await.stdout, "through");
    assert_eq!(shell(&driver, &guest, "exit 7").await.code, 7);
    let files = driver.files().unwrap();
    files.write(guest.instance, None, write_of("/root/f"), Some(content(b"x"))).await.unwrap();
    assert_eq!(files.open(guest.instance, None, "/root/f").await.unwrap().info.size, 1);
    assert!(files.open(guest.instance, None, "/root/g").await.unwrap_err().is(ErrorKind::NotFound));
    let quiesce = driver.quiesce().unwrap();
    assert!(quiesce.freeze(guest.instance, Duration::from_secs(60)).await.unwrap() > 0);
    assert!(quiesce.thaw(guest.instance).await.unwrap() > 0);
    assert_eq!(quiesce.thaw(guest.instance).await.unwrap(), 0, "twice is once");
    // Nobody lets them go on, and this agent has no limit: the host does, and says so to who comes too late.
    assert!(quiesce.freeze(guest.instance, Duration::from_secs(5)).await.unwrap() > 0);
    until_inside(&driver, &guest, "touch /root/late", BOOT).await;
    assert!(quiesce.thaw(guest.instance).await.unwrap_err().is(ErrorKind::Conflict));
    assert!(quiesce.freeze(guest.instance, Duration::from_secs(60)).await.unwrap() > 0);
    assert!(quiesce.thaw(guest.instance).await.unwrap() > 0);
    let timeout = Duration::from_secs(120);
    driver.stop(guest.instance, StopMode::Graceful { timeout }).await.unwrap();
    driver.destroy(guest.instance).await.unwrap();
    place.assert_clean();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn directories_of_the_host_are_mounted_inside_by_9p() {
    if !long() {
        return;
    }
    let Some(place) = Place::with("directories", Inside::Incus) else { return };
    let (driver, mut guest) = (place.driver(), place.guest(1));
    let (volume, granted) = (place.dir.join("volume"), place.dir.join("granted"));
    for dir in [&volume, &granted] {
        std::fs::create_dir(dir).unwrap();
    }
    std::fs::write(granted.join("secret"), "of the host").unwrap();
    std::fs::set_permissions(granted.join("secret"), PermissionsExt::from_mode(0o600)).unwrap();
    let data = ResolvedDisk {
        name: "data".into(),
        slot: "fs0".into(),
        path: volume.clone(),
        format: DiskFormat::Directory,
        mount_point: Some("/mnt/data".into()),
        pci: Some("00:09.0".into()),
        // Also where there is virtiofs.
        io: DiskIo { bus: Some(DiskBus::Plan9), ..DiskIo::default() },
        ..guest.root.clone()
    };
    let opened = karst_host::mountns::open_path(&granted).unwrap();
    let host = ResolvedDisk {
        name: "host".into(),
        slot: "fs1".into(),
        // A name from then on: what it leads to meanwhile is no matter.
        path: "/nonexistent".into(),
        mount_point: Some("/srv/made for it".into()),
        readonly: true,
        foreign: true,
        shift: true,
        opened: Some(Opened(Arc::new(opened))),
        pci: Some("00:0a.0".into()),
        ..data.clone()
    };
    guest.disks = vec![data.clone(), host];
    driver.start(&guest).await.unwrap();
    // Nothing of it is attached on the host, so nothing can be left there.
    let mounts = karst_host::mountns::entries(None).unwrap();
    assert!(mounts.iter().all(|m| !m.at.starts_with(&place.dir)), "{mounts:?}");
    until_inside(&driver, &guest, "grep -q '^data /mnt/data 9p' /proc/mounts", BOOT).await;
    until_inside(&driver, &guest, "grep -q '^host /srv/made' /proc/mounts", BOOT).await;

    // The guest's root is the directory's; what it says of owners, modes and links is kept for it alone.
    let script = "cd /mnt/data && echo inside >f && chown 1000:1001 f && chmod 4750 f && ln -s f l && mkdir d \
        && stat -c '%u %g %a' f && readlink l && cat '/srv/made for it/secret'; echo; \
        touch '/srv/made for it/x' 2>/dev/null || echo read-only";
    let ran = shell(&driver, &guest, script).await;
    assert_eq!(ran.stdout, "1000 1001 4750\nf\nof the host\nread-only\n", "{ran:?}");
    let file = std::fs::metadata(volume.join("f")).unwrap();
    assert_eq!((file.uid(), file.gid(), file.mode() & 0o7777), (0, 0, 0o600), "no set-user-id program here");
    assert_eq!(std::fs::read_to_string(volume.join("f")).unwrap(), "inside\n");
    assert_eq!(std::fs::read_dir(&granted).unwrap().count(), 1);
    std::fs::write(volume.join("later"), "from the host").unwrap();
    assert_eq!(shell(&driver, &guest, "cat /mnt/data/later").await.stdout, "from the host");

    // What changes waits, and says so; another process of the host finds it as it is.
    let without = karst_guest::ResolvedGuest { disks: vec![], ..guest.clone() };
    let pending = driver.update(&without).await.unwrap().pending;
    assert_eq!(pending, ["devices.data", "devices.host"]);
    drop(driver);
    let driver = place.driver();
    driver.adopt().await.unwrap();
    assert_eq!(driver.update(&without).await.unwrap().pending, pending);
    // An agent that begins anew mounts nothing twice.
    until_inside(&driver, &guest, "true", BOOT).await;
    let of_agent = "systemctl show -p MainPID --value incus-agent.service";
    let old = shell(&driver, &guest, of_agent).await.stdout;
    // Not while it answers.
    let restart =
        "systemd-run --on-active=3 --timer-property=AccuracySec=100ms systemctl restart incus-agent.service";
    let restarted = shell(&driver, &guest, restart).await;
    assert_eq!(restarted.code, 0, "{restarted:?}");
    let new = format!("pid=$({of_agent}); test $pid != 0 && test $pid != {}", old.trim());
    let twice = format!("{new} && test $(grep -c ' 9p ' /proc/mounts) = 2");
    until_inside(&driver, &guest, &twice, BOOT).await;

    driver.stop(guest.instance, StopMode::Force).await.unwrap();
    // The next start has what the last change said.
    let mut next = without.clone();
    next.generation.n += 1;
    driver.start(&next).await.unwrap();
    until_inside(&driver, &next, "! grep -q 9p /proc/mounts && test ! -e /mnt/data/f", BOOT).await;
    driver.stop(next.instance, StopMode::Force).await.unwrap();
    driver.destroy(next.instance).await.unwrap();
    place.assert_clean();
}
