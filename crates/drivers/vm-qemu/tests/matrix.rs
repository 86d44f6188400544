//! Firmware x machine x disk bus x NIC: a small Linux boots, sees its hardware, which comes, goes and grows, reaches its bridge by a NIC
//! that is plugged, is reset, is saved with its memory, goes on, and is brought back to a snapshot, with what was on its disk then. A
//! sample runs always, the whole with `KARST_TEST_LONG=1`.
#![allow(clippy::disallowed_methods)] // deals with the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod common;

use common::{Place, console::Shell};
use karst_guest::{GuestDriver, ResolvedDisk, ResolvedGuest, ResolvedNic, StopMode};
use karst_model::{
    ByteSize, ErrorKind, SnapshotId,
    device::NicModel,
    display::{DisplayGuard, DisplayPassword, DisplayProtocol},
    instance::{ExitReason, Firmware, HaltReason, RuntimeState},
    node::AcceleratorKind,
    spec::CpuLimit,
};
use std::{
    io::{Read, Write},
    time::Duration,
};

#[derive(Debug, Clone, Copy)]
struct Kind {
    firmware: Firmware,
    machine: &'static str,
    bus: &'static str,
    nic: NicModel,
}

/// The host at the machines' bridge.
const BRIDGE: &str = "198.18.77.1";

const SAMPLE: &[Kind] =
    &[Kind { firmware: Firmware::UefiSecure, machine: "pc-q35-7.2", bus: "scsi0", nic: NicModel::Virtio }];

fn all() -> Vec<Kind> {
    let mut all = vec![];
    for (firmware, machine) in [
        (Firmware::Bios, "pc-q35-7.2"),
        (Firmware::Bios, "pc-i440fx-7.2"),
        (Firmware::Uefi, "pc-q35-7.2"),
        (Firmware::Uefi, "pc-i440fx-7.2"),
        (Firmware::UefiSecure, "pc-q35-7.2"),
    ] {
        for bus in ["scsi0", "virtio0", "sata0", "nvme0"] {
            for nic in [NicModel::Virtio, NicModel::E1000e] {
                all.push(Kind { firmware, machine, bus, nic });
            }
        }
    }
    all
}

fn guest(place: &Place, kind: Kind, n: u128) -> ResolvedGuest {
    let mut guest = place.guest(n);
    let pc = kind.machine.starts_with("pc-i440fx");
    {
        let machine = guest.machine.as_mut().unwrap();
        machine.firmware = kind.firmware;
        machine.machine = kind.machine.into();
        machine.ports = if pc { 0 } else { 8 };
        machine.stateful = true;
        machine.display = true;
        machine.spice = true;
        machine.tpm = true;
        machine.balloon = true;
    }
    guest.limits.cpu = None;
    guest.limits.memory = Some(ByteSize::mib(384));
    guest.limits.memory_maximum = Some(ByteSize::mib(512));
    guest.root.slot = kind.bus.into();
    let pci = matches!(kind.bus, "virtio0" | "nvme0");
    guest.root.pci = pci.then(|| if pc { "00:09.0".into() } else { "02:00.0".into() });
    guest.root.boot_priority = 1;
    guest.nics[0].model = kind.nic;
    guest.nics[0].pci = Some(if pc { "00:08.0".into() } else { "01:00.0".into() });
    guest
}

fn next(guest: &mut ResolvedGuest, resume: bool) {
    guest.generation = guest.generation.next();
    guest.machine.as_mut().unwrap().resume = resume;
}

/// The ways to be let in that a display offers.
async fn offered(display: std::os::fd::OwnedFd) -> Vec<u8> {
    let talk = move || {
        let mut stream = std::os::unix::net::UnixStream::from(display);
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut greeting = [0; 12];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting, b"RFB 003.008\n");
        stream.write_all(&greeting).unwrap();
        let mut count = [0];
        stream.read_exact(&mut count).unwrap();
        let mut all = vec![0; count[0].into()];
        stream.read_exact(&mut all).unwrap();
        all
    };
    tokio::task::spawn_blocking(talk).await.unwrap()
}

/// What a viewer's main channel says first in SPICE: magic, version 2.2, length; connection 0, kind 1, number 0, no capabilities.
const LINK: &[u8; 34] = b"REDQ\x02\0\0\0\x02\0\0\0\x12\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\x12\0\0\0";

/// Begins a channel by SPICE: the server answers with its version and, where all is well, with its key.
async fn linked(display: std::os::fd::OwnedFd) -> std::os::unix::net::UnixStream {
    let talk = move || {
        let mut stream = std::os::unix::net::UnixStream::from(display);
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.write_all(LINK).unwrap();
        let mut head = [0; 20];
        stream.read_exact(&mut head).unwrap();
        assert_eq!(&head[..8], b"REDQ\x02\0\0\0");
        assert_eq!(head[16..], [0; 4], "no error");
        let mut rest = vec![0; u32::from_le_bytes(head[12..16].try_into().unwrap()) as usize - 4];
        stream.read_exact(&mut rest).unwrap();
        assert!(rest.len() >= 162, "a public key and capabilities: {} bytes", rest.len());
        stream
    };
    tokio::task::spawn_blocking(talk).await.unwrap()
}

async fn one(place: &Place, driver: &dyn GuestDriver, kind: Kind, n: u128) {
    println!("{kind:?}");
    let mut guest = guest(place, kind, n);
    let id = guest.instance;
    let machine = driver.machine().unwrap();
    driver.start(&guest).await.unwrap();
    let mut shell = Shell::open(driver, id).await;
    shell.until_up();

    // The hardware is what was asked for.
    let efi = if kind.firmware == Firmware::Bios { "no" } else { "yes" };
    assert_eq!(shell.run("[ -d /sys/firmware/efi ] && echo yes || echo no"), efi);
    let secure = if kind.firmware == Firmware::UefiSecure { "yes" } else { "no" };
    assert_eq!(shell.run("dmesg | grep -qi 'secure boot enabled' && echo yes || echo no"), secure);
    let disk = match kind.bus {
        "virtio0" => "vda",
        "nvme0" => "nvme0n1",
        _ => "sda",
    };
    let sectors = std::fs::metadata(&guest.root.path).unwrap().len() / 512;
    assert_eq!(shell.run(&format!("cat /sys/block/{disk}/size")), sectors.to_string());
    assert_eq!(shell.run("ip link set eth0 up; cat /sys/class/net/eth0/address"), guest.nics[0].mac);
    shell.until("cat /sys/class/net/eth0/carrier", "1");
    assert_eq!(shell.run("cat /sys/class/tpm/tpm0/tpm_version_major"), "2");
    let status = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|e| {
        let line = std::fs::read(e.path().join("cmdline")).ok()?;
        let ours = line.starts_with(b"swtpm\0");
        (ours && std::fs::read_to_string(e.path().join("status")).ok()?.contains("Uid:\t1234567\t"))
            .then_some(())
    });
    assert_eq!(status.count(), 1, "the TPM is a process of the guest's user");

    // A disk comes and goes, and grows meanwhile.
    let data = place.dir.join(format!("data{n}"));
    std::fs::File::create(&data).unwrap().set_len(5 << 20).unwrap();
    let mut more = guest.clone();
    more.spec_version += 1;
    more.disks.push(ResolvedDisk {
        name: "data".into(),
        slot: "scsi7".into(),
        path: data.clone(),
        pci: None,
        ..guest.root.clone()
    });
    assert_eq!(driver.update(&more).await.unwrap().pending, Vec::<String>::new());
    let sizes = "cat /sys/block/sd*/size 2>/dev/null | tr '\\n' ' '";
    let with = |mib: u64| {
        let root = if disk == "sda" { format!("{sectors} ") } else { String::new() };
        format!("{root}{}", mib * 2048)
    };
    shell.until(sizes, &with(5));
    machine.grow(id, &data, 9 << 20).await.unwrap();
    shell.until(sizes, &with(9));
    guest.spec_version += 2;
    assert_eq!(driver.update(&guest).await.unwrap().pending, Vec::<String>::new());
    let gone = if disk == "sda" { sectors.to_string() } else { String::new() };
    shell.until(sizes, &gone);

    // So does a NIC, with packets.
    let second = place.tap().replace("ktw", "ktx");
    let mut more = guest.clone();
    more.spec_version += 1;
    more.nics.push(ResolvedNic {
        name: "eth1".into(),
        slot: "net1".into(),
        mac: "10:66:6a:00:00:08".into(),
        host_interface: second.clone(),
        pci: Some(if kind.machine.starts_with("pc-i440fx") { "00:0a.0" } else { "03:00.0" }.into()),
        ..guest.nics[0].clone()
    });
    assert_eq!(driver.update(&more).await.unwrap().pending, Vec::<String>::new());
    let nics = "cat /sys/class/net/*/address | grep -c 10:66:6a";
    shell.until(nics, "2");
    shell.run("ip link set eth1 up; ip addr add 198.18.77.2/24 dev eth1");
    shell.until(&format!("ping -c 1 -W 5 {BRIDGE} >/dev/null && echo reached"), "reached");
    guest.spec_version += 2;
    assert_eq!(driver.update(&guest).await.unwrap().pending, Vec::<String>::new());
    shell.until(nics, "1");
    assert!(!std::path::Path::new("/sys/class/net").join(&second).exists());

    // The root grows. On virtio its system is told; by SATA it sees that when it starts anew; NVMe has to be off for it.
    let size = format!("cat /sys/block/{disk}/size");
    let mark = sectors - 1;
    let larger = (sectors << 9) + (1 << 20);
    let grown = match kind.bus {
        "nvme0" => {
            let e = machine.grow(id, &guest.root.path, larger).await.unwrap_err();
            assert!(e.is(ErrorKind::Conflict) && e.message.contains("NVMe"), "{e}");
            sectors
        }
        _ => {
            machine.grow(id, &guest.root.path, larger).await.unwrap();
            larger >> 9
        }
    };
    assert_eq!(std::fs::metadata(&guest.root.path).unwrap().len() >> 9, grown);
    if matches!(kind.bus, "scsi0" | "virtio0") {
        shell.until(&size, &grown.to_string());
    }

    // It begins with less than was set aside for it.
    shell.until("free -m | awk '/^Mem/ { print ($2 > 260 && $2 < 390) }'", "1");
    // Processors and memory within what was set aside; more waits for the next start.
    guest.spec_version += 1;
    let hotplug = kind.firmware != Firmware::UefiSecure;
    // An emulated processor that has gone could not come back: it stays until the next start.
    let stays = hotplug && guest.accelerator == AcceleratorKind::Tcg;
    guest.limits.cpu = hotplug.then_some(CpuLimit::Count { n: 2 });
    guest.limits.memory = Some(ByteSize::mib(256));
    assert_eq!(driver.update(&guest).await.unwrap().pending, Vec::<String>::new());
    let total = |m: &karst_guest::Metrics| m.memory_total;
    assert_eq!(total(&driver.metrics(id).await.unwrap()), Some(256 << 20));
    if hotplug {
        shell.until("echo 1 >/sys/devices/system/cpu/cpu1/online; nproc", "2");
    }
    shell.until("free -m | awk '/^Mem/ { print ($2 < 260) }'", "1");
    guest.spec_version += 1;
    guest.limits.cpu = None;
    guest.limits.memory = Some(ByteSize::mib(384));
    let waits: &[&str] = if stays { &["limits.cpu"] } else { &[] };
    assert_eq!(driver.update(&guest).await.unwrap().pending, waits);
    shell.until("nproc", if stays { "2" } else { "1" });
    if stays {
        guest.limits.cpu = Some(CpuLimit::Count { n: 2 });
        assert_eq!(driver.update(&guest).await.unwrap().pending, Vec::<String>::new());
    }
    shell.until("free -m | awk '/^Mem/ { print ($2 > 260) }'", "1");
    // Beyond what it began with.
    guest.spec_version += 1;
    guest.limits.memory = Some(ByteSize::mib(512));
    assert_eq!(driver.update(&guest).await.unwrap().pending, Vec::<String>::new());
    shell.until("free -m | awk '/^Mem/ { print ($2 > 400) }'", "1");
    let mut more = guest.clone();
    more.limits.cpu = Some(CpuLimit::Count { n: 4000 });
    more.limits.memory = Some(ByteSize::mib(640));
    assert_eq!(driver.update(&more).await.unwrap().pending, ["limits.memory", "limits.cpu"]);
    driver.update(&guest).await.unwrap();

    // A reset: the same QEMU, and the system boots again.
    let pid = driver.observe(id).await.unwrap().pid;
    machine.reset(id).await.unwrap();
    shell.until_up();
    assert_eq!(shell.run(&size), grown.to_string());
    assert_eq!(driver.observe(id).await.unwrap().pid, pid);
    shell.run("ip link set eth0 up; word=first");
    let picture = machine.screenshot(id).await.unwrap();
    let mut head = [0; 8];
    std::io::Read::read_exact(&mut std::fs::File::from(picture), &mut head).unwrap();
    assert_eq!(&head, b"\x89PNG\r\n\x1a\n");

    // Viewers are let in (1), or asked for a password (2), as is said with each; a change does not end who looks.
    let guard = |text: &str| DisplayGuard {
        password: DisplayPassword::parse("password", text.into()).unwrap(),
        valid_to: None,
    };
    assert_eq!(offered(machine.display(id, DisplayProtocol::Vnc, None).await.unwrap()).await, [1]);
    assert_eq!(
        offered(machine.display(id, DisplayProtocol::Vnc, Some(&guard("one"))).await.unwrap()).await,
        [2]
    );
    machine.guard_display(id, Some(&guard("two"))).await.unwrap();
    assert_eq!(
        offered(machine.display(id, DisplayProtocol::Vnc, Some(&guard("two"))).await.unwrap()).await,
        [2]
    );
    machine.guard_display(id, None).await.unwrap();
    assert_eq!(offered(machine.display(id, DisplayProtocol::Vnc, None).await.unwrap()).await, [1]);

    // By SPICE: several channels, with and without a password to come; where QEMU has none, it says what to install.
    let spice = async |guard: Option<&DisplayGuard>| machine.display(id, DisplayProtocol::Spice, guard).await;
    if karst_vm_qemu::probe::spice() {
        let first = linked(spice(None).await.unwrap()).await;
        let second = linked(spice(Some(&guard("three"))).await.unwrap()).await;
        machine.guard_display(id, None).await.unwrap();
        drop((first, second));
        linked(spice(None).await.unwrap()).await;
        assert_eq!(offered(machine.display(id, DisplayProtocol::Vnc, None).await.unwrap()).await, [1]);
    } else {
        let e = spice(None).await.unwrap_err();
        assert!(e.is(ErrorKind::Unsupported) && e.message.contains("qemu-system-modules-spice"), "{e}");
    }
    let mut without = guest.clone();
    without.spec_version += 1;
    without.machine.as_mut().unwrap().spice = false;
    assert_eq!(driver.update(&without).await.unwrap().pending, ["hardware.spice"]);
    driver.update(&guest).await.unwrap();

    // With its memory over a stop.
    let stopped = driver.stop(id, StopMode::Save).await.unwrap();
    assert_eq!((stopped.state, stopped.exit), (RuntimeState::Stopped, Some(ExitReason::Forced)));
    assert_eq!(driver.stop(id, StopMode::Save).await.unwrap().state, RuntimeState::Stopped, "twice is once");
    // It fits this machine only; that is said and it stays.
    let mut other = guest.clone();
    next(&mut other, true);
    other.limits.memory = Some(ByteSize::mib(640));
    let e = driver.start(&other).await.unwrap_err();
    assert!(e.is(ErrorKind::Conflict) && e.message.contains("limits.memory"), "{e}");
    next(&mut guest, true);
    driver.start(&guest).await.unwrap();
    let mut shell = Shell::open(driver, id).await;
    assert_eq!(shell.run("echo $word; cat /sys/class/net/eth0/carrier"), "first\n1");
    assert!(!guest.state_dir.join("saved").exists(), "memory of the past is gone");

    // With its memory in a snapshot, to which it is brought back after it went on, and so is its disk: a mark where neither loader nor
    // system is, behind all that the file system holds.
    let snapshot = SnapshotId(uuid::Uuid::from_u128(77));
    let write = |word: &str| {
        format!(
            "word={word}; echo $word | dd of=/dev/{disk} bs=512 seek={mark} count=1 conv=sync,fsync 2>/dev/null"
        )
    };
    let read = format!(
        "echo 3 >/proc/sys/vm/drop_caches; echo $word; dd if=/dev/{disk} bs=512 skip={mark} count=1 2>/dev/null | head -n 1"
    );
    let kept = place.dir.join("kept.raw");
    shell.run(&write("second"));
    assert_eq!(shell.run(&read), "second\nsecond");
    let e = machine.state_save(id, snapshot, true).await.unwrap_err();
    assert!(e.is(ErrorKind::Conflict) && e.message.contains("paused"), "{e}");
    driver.pause(id).await.unwrap();
    machine.state_save(id, snapshot, true).await.unwrap();
    machine.state_save(id, snapshot, true).await.unwrap();
    std::fs::copy(&guest.root.path, &kept).unwrap();
    driver.resume(id).await.unwrap();
    assert_eq!(shell.run(&read), "second\nsecond");
    shell.run(&write("third"));
    assert_eq!(shell.run(&read), "third\nthird");
    assert!(machine.state_restore(id, snapshot, true).await.unwrap_err().is(ErrorKind::Conflict));
    driver.stop(id, StopMode::Force).await.unwrap();
    std::fs::copy(&kept, &guest.root.path).unwrap();
    machine.state_restore(id, snapshot, true).await.unwrap();
    next(&mut guest, true);
    driver.start(&guest).await.unwrap();
    assert!(machine.memory_drop(id).await.unwrap_err().is(ErrorKind::Conflict), "it runs");
    let mut shell = Shell::open(driver, id).await;
    assert_eq!(shell.run(&read), "second\nsecond");
    // The snapshot outlives its use.
    driver.stop(id, StopMode::Force).await.unwrap();
    machine.state_restore(id, snapshot, true).await.unwrap();
    machine.state_restore(id, snapshot, false).await.unwrap();
    assert!(!guest.state_dir.join("saved").exists());
    machine.state_delete(id, snapshot).await.unwrap();
    machine.state_delete(id, snapshot).await.unwrap();
    next(&mut guest, true);
    assert!(driver.start(&guest).await.unwrap_err().is(ErrorKind::NotFound), "nothing is saved");
    driver.destroy(id).await.unwrap();
    assert!(!guest.state_dir.exists());
    place.assert_clean();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_kind_of_machine() {
    let Some(place) = Place::small("matrix") else { return };
    let long = std::env::var_os("KARST_TEST_LONG").is_some();
    let kinds = if long { all() } else { SAMPLE.to_vec() };
    let driver = place.driver();
    common::run("ip", &["addr", "add", &format!("{BRIDGE}/24"), "dev", &place.bridge]);
    for (n, kind) in kinds.into_iter().enumerate() {
        one(&place, &driver, kind, n as u128 + 1).await;
    }
}

/// The words for Windows are words of this QEMU, with whatever accelerator it has here.
#[test]
fn qemu_knows_what_windows_wants_to_know() {
    let qemu = "qemu-system-x86_64";
    if std::process::Command::new(qemu).arg("--version").output().is_err() {
        return backends::missing("QEMU is not installed");
    }
    let start = |cpu: &str| {
        let mut child = std::process::Command::new(qemu)
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-S", "-monitor", "stdio"])
            .args([
                "-machine",
                "q35",
                // The words are the processor's, whatever runs it; a kernel may know less of them than its QEMU.
                "-accel",
                "tcg",
                "-cpu",
                cpu,
                "-rtc",
                "base=localtime",
            ])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // One that refused has ended before it reads.
        let _ = child.stdin.take().unwrap().write_all(b"quit\n");
        let out = child.wait_with_output().unwrap();
        (out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let (accepted, said) = start(&format!("max{}", karst_vm_qemu::argv::HYPER_V));
    assert!(accepted, "{said}");
    let (accepted, said) = start("max,hv-no-such-word");
    assert!(!accepted && said.contains("hv-no-such-word"), "{said}");
}

/// As the preset for Windows makes it: a Linux finds all of it there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_for_windows_starts() {
    if std::env::var_os("KARST_TEST_LONG").is_none() {
        return println!("skipped: a long test; `make test-all` runs it (KARST_TEST_LONG=1)");
    }
    let Some(place) = Place::small("windows") else { return };
    let driver = place.driver();
    let kind =
        Kind { firmware: Firmware::UefiSecure, machine: "pc-q35-7.2", bus: "sata0", nic: NicModel::E1000e };
    let mut guest = guest(&place, kind, 90);
    guest.machine.as_mut().unwrap().windows = true;
    driver.start(&guest).await.unwrap();
    let mut shell = Shell::open(&driver, guest.instance).await;
    shell.until_up();
    assert_eq!(shell.run("basename $(readlink /sys/class/net/eth0/device/driver)"), "e1000e");
    assert_eq!(shell.run("ls /sys/bus/pci/drivers/ahci | grep -c 0000:"), "1");
    assert_eq!(shell.run("cat /sys/class/tpm/tpm0/tpm_version_major"), "2");
    driver.stop(guest.instance, StopMode::Force).await.unwrap();
    driver.destroy(guest.instance).await.unwrap();
    place.assert_clean();
}

/// Under secure boot Debian's signed kernel starts, one with a changed byte does not; without it, both do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secure_boot_refuses_what_is_not_signed() {
    if std::env::var_os("KARST_TEST_LONG").is_none() {
        return println!("skipped: a long test; `make test-all` runs it (KARST_TEST_LONG=1)");
    }
    let Some(place) = Place::small("unsigned") else { return };
    // A letter of the version that the boot header points to: signed like everything else, and nobody executes it.
    let at = format!("{}@@1M", place.dir.join("root.raw").display());
    let kernel = place.dir.join("vmlinuz");
    let kernel = kernel.to_str().unwrap();
    common::run("mcopy", &["-n", "-i", &at, "::/vmlinuz", kernel]);
    let mut image = std::fs::read(kernel).unwrap();
    let text = b"debian-kernel@";
    let found = image.windows(text.len()).position(|w| w == text).expect("the version in the header");
    image[found] = b'D';
    std::fs::write(kernel, image).unwrap();
    common::run("mcopy", &["-o", "-i", &at, kernel, "::/vmlinuz"]);

    let driver = place.driver();
    let kind = Kind { firmware: Firmware::UefiSecure, ..SAMPLE[0] };
    let secure = guest(&place, kind, 1);
    driver.start(&secure).await.unwrap();
    let end = std::time::Instant::now() + std::time::Duration::from_secs(240);
    loop {
        let log = driver.console_log(secure.instance, 1 << 20, false).await.unwrap();
        let log = String::from_utf8_lossy(&log).into_owned();
        assert!(!log.contains("small linux is up"), "it started: {log}");
        if log.contains("bad shim signature") {
            break;
        }
        assert!(std::time::Instant::now() < end, "{log}");
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    driver.stop(secure.instance, StopMode::Force).await.unwrap();
    driver.destroy(secure.instance).await.unwrap();
    let plain = guest(&place, Kind { firmware: Firmware::Uefi, ..kind }, 2);
    driver.start(&plain).await.unwrap();
    Shell::open(&driver, plain.instance).await.until_up();
    driver.stop(plain.instance, StopMode::Force).await.unwrap();
    driver.destroy(plain.instance).await.unwrap();
    place.assert_clean();
}

/// A file system of its own, unmounted when the test ends.
struct Room(std::path::PathBuf);

impl Room {
    fn new(place: &Place, size: &str) -> Self {
        let at = place.dir.join("room");
        std::fs::create_dir(&at).unwrap();
        common::run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "none", at.to_str().unwrap()]);
        Self(at)
    }

    fn grow(&self, size: &str) {
        common::run("mount", &["-o", &format!("remount,size={size}"), self.0.to_str().unwrap()]);
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // QEMU may still have it open after a failure; it goes when that ends.
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

async fn until_state(driver: &dyn GuestDriver, guest: &ResolvedGuest, wanted: RuntimeState) {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(240);
    loop {
        let now = driver.observe(guest.instance).await.unwrap().state;
        if now == wanted {
            return;
        }
        assert!(std::time::Instant::now() < end, "{now:?}, not {wanted:?}");
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
}

/// What the guest writes is neither lost nor an error inside: it waits, and goes on by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_halts_the_machine_until_there_is_room() {
    if std::env::var_os("KARST_TEST_LONG").is_none() {
        return println!("skipped: a long test; `make test-all` runs it (KARST_TEST_LONG=1)");
    }
    let Some(place) = Place::small("full") else { return };
    let room = Room::new(&place, "24m");
    let mut guest = guest(&place, Kind { firmware: Firmware::Bios, ..SAMPLE[0] }, 1);
    guest.machine.as_mut().unwrap().tpm = false;
    let path = room.0.join("data");
    std::fs::File::create(&path).unwrap().set_len(200 << 20).unwrap();
    guest.disks.push(ResolvedDisk { name: "data".into(), slot: "scsi1".into(), path, ..guest.root.clone() });
    let driver = place.driver();
    driver.start(&guest).await.unwrap();
    let mut shell = Shell::open(&driver, guest.instance).await;
    shell.until_up();
    shell.run("(dd if=/dev/urandom of=/dev/sdb bs=1M count=60 conv=fsync 2>/dev/null && echo written >/done) & true");
    until_state(&driver, &guest, RuntimeState::Error).await;
    let why = Some(HaltReason::Disk { slot: Some("scsi1".into()), full: true });
    let now = driver.observe(guest.instance).await.unwrap();
    assert_eq!((now.halt, now.pid.is_some()), (why.clone(), true));
    // Kept so for a copy of its disks, it does not go on by itself, whatever room there is and whoever looks after it.
    assert_eq!(driver.pause(guest.instance).await.unwrap().state, RuntimeState::Paused);
    room.grow("300m");
    let driver = place.driver();
    assert_eq!(driver.adopt().await.unwrap()[0].state, RuntimeState::Paused);
    // Longer than between two looks at the room that there is.
    tokio::time::sleep(std::time::Duration::from_secs(7)).await;
    let now = driver.observe(guest.instance).await.unwrap();
    assert_eq!((now.state, now.halt), (RuntimeState::Paused, why));
    assert_eq!(driver.resume(guest.instance).await.unwrap().state, RuntimeState::Error, "as it was");
    until_state(&driver, &guest, RuntimeState::Running).await;
    assert_eq!(driver.observe(guest.instance).await.unwrap().halt, None);
    shell.until("cat /done", "written");
    driver.stop(guest.instance, StopMode::Force).await.unwrap();
    driver.destroy(guest.instance).await.unwrap();
    place.assert_clean();
}
