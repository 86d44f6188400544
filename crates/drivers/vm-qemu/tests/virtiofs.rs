//! Directories that a machine shares by virtiofs: owners that are true, processes that are nobody on the host and go with their
//! machine, and what is known when one of them is killed.
#![allow(clippy::disallowed_methods)] // deals with the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod common;

use common::{Place, console::Shell};
use karst_guest::{DiskFormat, GuestDriver, IdRange, Opened, ResolvedDisk, ResolvedGuest, StopMode};
use karst_model::{
    ByteSize, ErrorKind,
    device::{DiskBus, DiskIo},
};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

/// A place for a machine, where this host has virtiofsd.
async fn place(test: &str) -> Option<Place> {
    if karst_vm_qemu::virtiofs::demand_program().await.is_err() {
        backends::absent(backends::Optional::Virtiofsd);
        return None;
    }
    Place::small(test)
}

/// A machine with ids of its own.
fn machine(place: &Place, base: u32) -> ResolvedGuest {
    let mut guest = place.guest(1);
    guest.ids = IdRange { base, count: 65_536 };
    guest.limits.cpu = None;
    guest.limits.memory = Some(ByteSize::mib(256));
    guest
}

/// A volume of files.
fn volume(guest: &ResolvedGuest, path: &Path) -> ResolvedDisk {
    std::fs::create_dir(path).unwrap();
    ResolvedDisk {
        name: "data".into(),
        slot: "fs0".into(),
        path: path.to_owned(),
        format: DiskFormat::Directory,
        mount_point: Some("/mnt/data".into()),
        pci: Some("00:09.0".into()),
        ..guest.root.clone()
    }
}

/// Process ids of virtiofsd whose user is that of the host.
fn servers(user: u32) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let ours = |pid: &u32| {
        let read = |file: &str| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let users = format!("Uid:\t{user}\t{user}\t{user}\t{user}\n");
        read("cmdline").starts_with(b"virtiofsd\0")
            && String::from_utf8_lossy(&read("status")).contains(&users)
    };
    processes.filter_map(|e| e.file_name().to_str()?.parse().ok()).filter(ours).collect()
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(120);
    while !condition() {
        assert!(Instant::now() < end, "{what} does not come");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn owners_are_true_and_the_host_has_nothing_attached() {
    const USER: u32 = 1_300_000;
    let Some(place) = place("virtiofs").await else { return };
    let (driver, mut guest) = (place.driver(), machine(&place, USER));
    let id = guest.instance;
    let granted = place.dir.join("granted");
    std::fs::create_dir(&granted).unwrap();
    std::fs::write(granted.join("secret"), "of the host").unwrap();
    std::fs::set_permissions(granted.join("secret"), PermissionsExt::from_mode(0o600)).unwrap();
    let data = volume(&guest, &place.dir.join("volume"));
    let opened = karst_host::mountns::open_path(&granted).unwrap();
    let host = ResolvedDisk {
        name: "host".into(),
        slot: "fs1".into(),
        path: "/nonexistent".into(),
        mount_point: Some("/srv/host".into()),
        readonly: true,
        foreign: true,
        shift: true,
        opened: Some(Opened(Arc::new(opened))),
        pci: Some("00:0a.0".into()),
        ..data.clone()
    };
    guest.disks = vec![data.clone(), host];
    driver.start(&guest).await.unwrap();

    // Each is a process that waits and one that serves, with network, mounts and users of its own.
    let found = servers(USER);
    assert_eq!(found.len(), 4, "{found:?}");
    for kind in ["user", "mnt", "net"] {
        let own = std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
        for pid in &found {
            assert_ne!(std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap(), own, "{kind} of {pid}");
        }
    }
    let mounts = karst_host::mountns::entries(None).unwrap();
    assert!(mounts.iter().all(|m| !m.at.starts_with(&place.dir)), "{mounts:?}");

    let mut shell = Shell::open(&driver, id).await;
    shell.until_up();
    let mount = "mkdir -p /mnt/data /mnt/host && mount -t virtiofs data /mnt/data && mount -t virtiofs host /mnt/host && echo mounted";
    assert_eq!(shell.run(mount), "mounted");
    let made = "cd /mnt/data && echo inside >f && chown 1000:1001 f && chmod 4750 f && ln -s f l && mkdir d \
        && stat -c '%u %g %a' f && readlink l; cd /";
    assert_eq!(shell.run(made), "1000 1001 4750\nf");
    let file = std::fs::metadata(data.path.join("f")).unwrap();
    assert_eq!(
        (file.uid(), file.gid(), file.mode() & 0o7777),
        (1000, 1001, 0o4750),
        "as a container sees them"
    );
    assert_eq!(std::fs::read_link(data.path.join("l")).unwrap(), Path::new("f"));
    assert_eq!(std::fs::metadata(data.path.join("d")).unwrap().uid(), 0);
    // Beyond its range there is nobody, and what is no file of a volume does not become one of the host.
    for line in [
        "chown 70000 /mnt/data/f",
        "mknod /mnt/data/n b 8 0",
        "touch /mnt/host/x",
        "chown 5 /mnt/host/secret",
    ] {
        assert_eq!(shell.run(&format!("{line} 2>/dev/null || echo refused")), "refused", "{line}");
    }
    assert_eq!(shell.run("cat /mnt/host/secret"), "of the host");
    std::fs::write(data.path.join("later"), "from the host").unwrap();
    shell.until("cat /mnt/data/later", "from the host");

    // Its memory is not kept, and it goes on.
    let kept = driver.stop(id, StopMode::Save).await.unwrap_err();
    assert!(kept.is(ErrorKind::Unsupported), "{kept}");
    assert_eq!(shell.run("cat /mnt/data/f"), "inside");

    // What changes waits; how it is shared only where another way is asked for. The next process of the host finds it all.
    let with = |bus: Option<DiskBus>| {
        let data = ResolvedDisk { io: DiskIo { bus, ..DiskIo::default() }, ..data.clone() };
        ResolvedGuest { disks: vec![data, guest.disks[1].clone()], ..guest.clone() }
    };
    let without = ResolvedGuest { disks: vec![], ..guest.clone() };
    drop(driver);
    let driver = place.driver();
    driver.adopt().await.unwrap();
    let none: &[&str] = &[];
    for (wanted, pending) in [
        (with(None), none),
        (with(Some(DiskBus::Virtiofs)), none),
        (with(Some(DiskBus::Plan9)), &["devices.data"][..]),
        (without, &["devices.data", "devices.host"][..]),
    ] {
        assert_eq!(driver.update(&wanted).await.unwrap().pending, pending);
    }
    assert_eq!(servers(USER), found, "none of it ended with the process that started it");
    let mut shell = Shell::open(&driver, id).await;
    assert_eq!(shell.run("echo more >>/mnt/data/f; cat /mnt/data/f"), "inside\nmore");

    driver.stop(id, StopMode::Force).await.unwrap();
    assert_eq!(servers(USER), Vec::<u32>::new(), "they end with their machine");
    driver.destroy(id).await.unwrap();
    place.assert_clean();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_is_killed_is_told_of_and_the_next_start_has_another() {
    const USER: u32 = 1_400_000;
    let Some(place) = place("killed").await else { return };
    let (driver, mut guest) = (place.driver(), machine(&place, USER));
    let id = guest.instance;
    guest.disks = vec![volume(&guest, &place.dir.join("volume"))];
    std::fs::write(guest.disks[0].path.join("f"), "still there").unwrap();
    driver.start(&guest).await.unwrap();
    let mut shell = Shell::open(&driver, id).await;
    shell.until_up();
    let mount = "mkdir -p /mnt/data && mount -t virtiofs data /mnt/data && cat /mnt/data/f";
    assert_eq!(shell.run(mount), "still there");
    assert_eq!(driver.warnings(), Vec::<String>::new());
    for pid in servers(USER) {
        // One goes with the other.
        let _ = kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL);
    }
    until("a warning", || {
        driver.warnings().iter().any(|w| w.contains("\"data\"") && w.contains("virtiofsd"))
    })
    .await;
    assert_eq!(servers(USER), Vec::<u32>::new());
    // The machine runs on, and who wants something of the directory waits.
    let waits = "(ls /mnt/data/never >/dev/null 2>&1; touch /came) & sleep 3; [ -e /came ] || echo waits";
    assert_eq!(shell.run(waits), "waits");

    driver.stop(id, StopMode::Force).await.unwrap();
    assert_eq!(driver.warnings(), Vec::<String>::new());
    guest.generation.n += 1;
    driver.start(&guest).await.unwrap();
    let mut shell = Shell::open(&driver, id).await;
    shell.until_up();
    assert_eq!(shell.run(mount), "still there");
    // The keeper's end is one of them too.
    let state = guest.state_dir.join("virtiofs/fs0");
    karst_guest::keeper::end_keeper(&state).unwrap();
    until("a warning", || !driver.warnings().is_empty()).await;
    driver.stop(id, StopMode::Force).await.unwrap();
    driver.destroy(id).await.unwrap();
    place.assert_clean();
}
