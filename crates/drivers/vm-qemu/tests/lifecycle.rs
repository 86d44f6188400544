//! A real guest under a real QEMU: privileges, limits, seed, network, console, a killed driver process, failures in words.
#![allow(clippy::disallowed_methods)] // deals with the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod common;

use common::Place;
use karst_guest::{
    AskedBy, GuestDriver, GuestWish, ResolvedGuest, StopMode,
    contract::{shell, until_inside},
};
use karst_model::{
    ByteSize, ErrorKind,
    instance::{ExitReason, Firmware, RuntimeState},
    spec::CpuLimit,
};
use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Run by the test below in a process of its own, which is then killed.
#[tokio::test]
#[ignore = "a part of a_guest_outlives_its_driver"]
async fn child_that_starts_a_guest() {
    let var = |k| std::env::var(k).unwrap();
    let place = Place::of_parent(&var("VM_TEST_DIR"), &var("VM_TEST_BRIDGE"), &var("VM_TEST_DAEMON"));
    let driver = place.driver();
    let o = driver.start(&place.guest(1)).await.unwrap();
    println!("\nstarted {}", o.pid.unwrap());
    // Until it is killed.
    std::future::pending().await
}

fn start_in_child(place: &Place) -> u32 {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_that_starts_a_guest", "--ignored", "--nocapture"])
        .env("VM_TEST_DIR", &place.dir)
        .env("VM_TEST_BRIDGE", &place.bridge)
        .env("VM_TEST_DAEMON", &place.daemon)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let pid = lines.map_while(Result::ok).find_map(|l| l.strip_prefix("started ")?.parse().ok());
    child.kill().unwrap();
    child.wait().unwrap();
    pid.expect("the child starts the guest")
}

async fn out(driver: &dyn GuestDriver, guest: &ResolvedGuest, script: &str) -> String {
    let ran = shell(driver, guest, script).await;
    assert_eq!(ran.code, 0, "{script}: {ran:?}");
    ran.stdout.trim().to_owned()
}

/// A machine whose keeper hangs is adopted, shown as what it is, and ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keeper_that_does_not_answer_keeps_nobody_from_its_machine() {
    use karst_guest::keeper;
    use rustix::process::{Pid, Signal, kill_process};
    let Some(place) = Place::small("keeper") else { return };
    let guest = place.guest(1);
    let id = guest.instance;
    place.driver().start(&guest).await.unwrap();
    let pid = Pid::from_raw(keeper::read_status(&guest.state_dir).unwrap().keeper_pid as i32).unwrap();
    kill_process(pid, Signal::STOP).unwrap();

    let driver = place.driver();
    let adopted = driver.adopt().await.unwrap();
    assert_eq!(
        adopted.iter().map(|o| (o.instance, o.state)).collect::<Vec<_>>(),
        [(id, RuntimeState::Running)]
    );
    assert!(driver.warnings().iter().any(|w| w.contains(&id.to_string())), "{:?}", driver.warnings());
    driver.pause(id).await.unwrap();
    assert_eq!(driver.observe(id).await.unwrap().state, RuntimeState::Paused);
    driver.resume(id).await.unwrap();

    kill_process(pid, Signal::CONT).unwrap();
    let end = Instant::now() + Duration::from_secs(120);
    while !driver.warnings().is_empty() {
        assert!(Instant::now() < end, "the keeper answers again and that is not seen");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    kill_process(pid, Signal::STOP).unwrap();
    let mut events = driver.events();
    assert_eq!(driver.stop(id, StopMode::Force).await.unwrap().state, RuntimeState::Stopped);
    assert_eq!(events.recv().await.unwrap().state, RuntimeState::Stopped);
    driver.destroy(id).await.unwrap();
    assert!(!guest.state_dir.exists() && driver.warnings().is_empty());
}

/// No time that is given for a shutdown harms who watches the machine.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_with_all_the_time_there_is_can_be_forced() {
    let Some(place) = Place::small("patience") else { return };
    let guest = place.guest(1);
    let id = guest.instance;
    let driver = place.driver();
    driver.start(&guest).await.unwrap();
    let asked = tokio::spawn({
        let driver = driver.clone();
        async move { driver.stop(id, StopMode::Graceful { timeout: Duration::MAX }).await }
    });
    let end = Instant::now() + Duration::from_secs(60);
    while driver.observe(id).await.unwrap().state == RuntimeState::Running {
        assert!(Instant::now() < end, "nobody asked it to shut down");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(driver.stop(id, StopMode::Force).await.unwrap().state, RuntimeState::Stopped);
    assert_eq!(asked.await.unwrap().unwrap().state, RuntimeState::Stopped);
    driver.destroy(id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_outlives_its_driver() {
    // The contract suite boots a machine in every run; this one, which kills and resets it, is for the long suites.
    if std::env::var_os("KARST_TEST_LONG").is_none() {
        return println!("skipped: a long test; `make test-all` runs it (KARST_TEST_LONG=1)");
    }
    let Some(place) = Place::new("lifecycle") else {
        return;
    };
    let pid = start_in_child(&place);
    let guest = place.guest(1);
    let id = guest.instance;
    let driver = place.driver();
    let adopted = driver.adopt().await.unwrap();
    assert_eq!(adopted.len(), 1);
    assert_eq!((adopted[0].pid, adopted[0].state), (Some(pid), RuntimeState::Running));
    let mut events = driver.events();

    // QEMU is nobody: its own user, no capability now or ever, a filter of system calls.
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |k: &str| {
        status.lines().find_map(|l| l.strip_prefix(k)).unwrap().split_whitespace().collect::<Vec<_>>()
    };
    assert_eq!(field("Uid:"), ["1234567"; 4]);
    assert_eq!(field("Gid:"), ["1234567"; 4]);
    assert!(field("Groups:").is_empty());
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(set), ["0000000000000000"], "{set}");
    }
    assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), (vec!["1"], vec!["2"]));
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(groups.contains(&format!("karst-{}/{id}", place.daemon)), "{groups}");
    let argv = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(!String::from_utf8_lossy(&argv).contains("xyzzy"), "no user data in argv");
    for socket in ["qmp.sock", "events.sock", "agent.sock", "keeper.sock"] {
        let mode = std::fs::metadata(guest.state_dir.join(socket)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{socket}");
    }

    // A guest that still boots does not follow; that is said, and it runs on.
    let mode = StopMode::Graceful { timeout: Duration::from_millis(200) };
    let e = driver.stop(id, mode).await.unwrap_err();
    assert!(e.is(ErrorKind::Timeout) && e.message.contains("force"), "{e}");
    assert_eq!(driver.observe(id).await.unwrap().state, RuntimeState::Running);
    // Nor has it an agent: an error at once, and figures without waiting for it.
    let asked = Instant::now();
    let e = driver.exec(id, karst_guest::contract::request(&["true"])).await.err().unwrap();
    assert!(e.is(ErrorKind::Unavailable) && e.message.contains("boot"), "{e}");
    driver.metrics(id).await.unwrap();
    assert!(asked.elapsed() < Duration::from_secs(1));

    until_inside(&driver, &guest, "true", Duration::from_secs(180)).await;

    // The hardware that was described.
    assert_eq!(
        out(&driver, &guest, "nproc; cat /sys/class/dmi/id/product_uuid").await,
        "2\n00000000-0000-0000-0000-00000000abcd"
    );
    let kb: u64 = out(&driver, &guest, "sed -n 's/MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo")
        .await
        .parse()
        .unwrap();
    assert!((400_000..524_288).contains(&kb), "{kb}");
    let disks = out(
        &driver,
        &guest,
        "cd /sys/bus/pci/devices; for a in 01 02 04 06 08; do cat 0000:00:$a.0/device; done",
    )
    .await;
    assert_eq!(
        disks.split_whitespace().collect::<Vec<_>>(),
        ["0x1044", "0x1043", "0x1042", "0x1042", "0x1041"]
    );
    assert_eq!(out(&driver, &guest, "echo $FROM_RECORD").await, "yes");

    // The seed, read by the guest's kernel.
    let seed = out(
        &driver,
        &guest,
        "mount -o ro /dev/disk/by-label/cidata /mnt && ls /mnt && cat /mnt/meta-data /mnt/user-data; umount /mnt",
    )
    .await;
    assert!(
        seed.starts_with("meta-data\nuser-data\n{\"instance-id\":\"first\",\"local-hostname\":\"v1\"}"),
        "{seed}"
    );
    assert!(seed.contains("secret: xyzzy"));
    let ran = shell(&driver, &guest, "dd if=/dev/zero of=/dev/disk/by-label/cidata count=1 conv=fsync").await;
    assert_ne!(ran.code, 0, "read-only");

    // The network: frames flow between guest and bridge, and the figures name both ends.
    out(&driver, &guest, "ip link set dev $(ls /sys/class/net | grep -v lo) up; ip addr add 169.254.9.2/24 dev $(ls /sys/class/net | grep -v lo)").await;
    common::run("ip", &["addr", "add", "169.254.9.1/24", "dev", &place.bridge]);
    let reached = Command::new("ip").args(["route", "get", "169.254.9.2"]).output().unwrap();
    assert!(reached.status.success());
    until_inside(
        &driver,
        &guest,
        "bash -c 'echo > /dev/udp/169.254.9.1/9'; ip neigh | grep -q 169.254.9.1.*lladdr",
        Duration::from_secs(20),
    )
    .await;
    let m = driver.metrics(id).await.unwrap();
    assert!(m.cpu_ns.is_some_and(|n| n > 1_000_000_000) && m.memory_total == Some(512 << 20), "{m:?}");
    let nic = m.interfaces.values().find(|i| i.mac == "10:66:6a:00:00:07").expect("the NIC");
    assert_eq!((nic.host_name.as_str(), nic.mtu, nic.up), (place.tap().as_str(), 1500, true));
    assert!(
        nic.addresses.iter().any(|(a, p, s)| a.to_string() == "169.254.9.2" && *p == 24 && s == "link"),
        "{nic:?}"
    );

    // The console goes both ways.
    let mut console = UnixStream::from(driver.console(id, false).await.unwrap());
    let asked = tokio::task::spawn_blocking(move || {
        console.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        console.write_all(b"\n").unwrap();
        let (mut seen, mut buffer) = (String::new(), [0; 1024]);
        while !seen.contains("login:") {
            let n = console.read(&mut buffer).expect("a prompt in time");
            seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
    });
    asked.await.unwrap();

    // A big file, byte for byte, both ways.
    let files = driver.files().unwrap();
    let big: Vec<u8> = (0..3_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let write = karst_guest::contract::write_of("/root/big");
    files.write(id, None, write, Some(karst_guest::contract::content(&big))).await.unwrap();
    let opened = files.open(id, None, "/root/big").await.unwrap();
    let back = tokio::task::spawn_blocking(move || {
        let mut v = vec![];
        std::fs::File::from(opened.content.unwrap()).read_to_end(&mut v).unwrap();
        v
    });
    assert!(back.await.unwrap() == big);

    // What changes live, and what waits.
    let mut changed = guest.clone();
    changed.spec_version = 4;
    changed.limits.memory = Some(ByteSize::mib(768));
    changed.limits.cpu = Some(CpuLimit::Set { cpus: vec![0] });
    let emulated = guest.accelerator == karst_model::node::AcceleratorKind::Tcg;
    let waits: &[&str] = if emulated { &["limits.memory", "limits.cpu"] } else { &["limits.memory"] };
    assert_eq!(driver.update(&changed).await.unwrap().pending, waits);
    assert_eq!(driver.observe(id).await.unwrap().applied_spec_version, 4);
    let allowed = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(allowed.contains("Cpus_allowed_list:\t0\n"), "the set holds at once");

    // A reset stays in the same QEMU.
    let before = driver.console_log(id, 1 << 20, true).await.unwrap();
    assert!(String::from_utf8_lossy(&before).contains("Linux version"));
    let end = Instant::now() + Duration::from_secs(120);
    let (mut asked, mut again) = (0, Instant::now());
    loop {
        // A busy machine's agent may miss an order that its reset would have answered: say it again.
        if Instant::now() >= again && asked < 4 {
            let reset = karst_guest::contract::request(&["sh", "-c", "echo b > /proc/sysrq-trigger"]);
            drop(driver.exec(id, reset).await);
            (asked, again) = (asked + 1, Instant::now() + Duration::from_secs(25));
        }
        let log = driver.console_log(id, 1 << 20, false).await.unwrap();
        if String::from_utf8_lossy(&log).contains("SeaBIOS") {
            break;
        }
        assert!(Instant::now() < end, "the firmware speaks again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(driver.observe(id).await.unwrap().pid, Some(pid));

    // Nor does it become another when the guest boots anew by its power button, whoever has it shut down then.
    until_inside(&driver, &guest, "true", Duration::from_secs(180)).await;
    driver.console_log(id, 1 << 20, true).await.unwrap();
    driver.ask(id, GuestWish::Reboot, AskedBy::Button).await.unwrap();
    let end = Instant::now() + Duration::from_secs(120);
    let (mut asked, mut again) = (0, Instant::now());
    loop {
        if Instant::now() >= again && asked < 4 {
            let off = karst_guest::contract::request(&["sh", "-c", "echo o > /proc/sysrq-trigger"]);
            drop(driver.exec(id, off).await);
            (asked, again) = (asked + 1, Instant::now() + Duration::from_secs(25));
        }
        let log = driver.console_log(id, 1 << 20, false).await.unwrap();
        if String::from_utf8_lossy(&log).contains("SeaBIOS") {
            break;
        }
        assert!(Instant::now() < end, "the firmware speaks once more");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let now = driver.observe(id).await.unwrap();
    assert_eq!((now.pid, now.state), (Some(pid), RuntimeState::Running));

    // QEMU dies: that is told, with the reason, and everything is cleared up.
    common::run("kill", &["-SEGV", &pid.to_string()]);
    let event = tokio::time::timeout(Duration::from_secs(10), events.recv()).await.unwrap().unwrap();
    assert_eq!(event.state, RuntimeState::Stopped);
    assert!(
        matches!(&event.exit, Some(ExitReason::Crashed { detail }) if detail.contains("signal 11")),
        "{event:?}"
    );
    assert_eq!(driver.observe(id).await.unwrap().exit, event.exit);
    place.assert_clean();

    failures(&place, &driver).await;
}

/// Starts that cannot succeed: said in words, and nothing is left.
async fn failures(place: &Place, driver: &dyn GuestDriver) {
    let base = place.guest(2);
    let fails = async |change: &dyn Fn(&mut ResolvedGuest)| {
        let mut g = base.clone();
        change(&mut g);
        let e = driver.start(&g).await.unwrap_err();
        place.assert_clean_of(&g.instance.to_string());
        assert_eq!(driver.observe(g.instance).await.unwrap().state, RuntimeState::Stopped);
        e
    };
    let e = fails(&|g| g.nics[0].link = karst_guest::ResolvedLink::Bridge("ktv-none".into())).await;
    assert!(e.is(ErrorKind::NotFound) && e.message.contains("ktv-none"), "{e}");
    let e = fails(&|g| g.root.path = "/nonexistent".into()).await;
    assert!(e.is(ErrorKind::NotFound), "{e}");
    let e = fails(&|g| g.root.format = karst_guest::DiskFormat::Qcow2).await;
    assert!(e.is(ErrorKind::Invalid) && e.message.contains("qcow2"), "{e}");
    let e = fails(&|g| g.machine.as_mut().unwrap().machine = "pc-q35-99.0".into()).await;
    assert!(e.is(ErrorKind::Unsupported) && e.message.contains("machine type"), "{e}");
    let e = fails(&|g| g.limits.memory = Some(ByteSize::gib(1 << 20))).await;
    assert!(!e.message.is_empty(), "{e}");
    if karst_vm_qemu::probe::accelerator().kind == karst_model::node::AcceleratorKind::Tcg {
        let e = fails(&|g| g.accelerator = karst_model::node::AcceleratorKind::Kvm).await;
        assert!(e.is(ErrorKind::Unsupported) && e.message.contains("KVM"), "{e}");
    }

    // The same disk twice.
    let mut g = place.guest(3);
    g.nics.clear();
    let began = Instant::now();
    driver.start(&g).await.unwrap();
    println!("start to running: {:?}", began.elapsed());
    let e = fails(&|_| {}).await;
    assert!(e.is(ErrorKind::Conflict) && e.message.contains("in use"), "{e}");
    let began = Instant::now();
    let o = driver.stop(g.instance, StopMode::Force).await.unwrap();
    println!("forced stop: {:?}", began.elapsed());
    assert_eq!(o.exit, Some(ExitReason::Forced));

    // UEFI, with variables of its own.
    if std::path::Path::new("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd").exists() {
        for firmware in [Firmware::Uefi, Firmware::UefiSecure] {
            g.machine.as_mut().unwrap().firmware = firmware;
            g.generation = g.generation.next();
            driver.start(&g).await.unwrap();
            driver.stop(g.instance, StopMode::Force).await.unwrap();
            let variables = if firmware == Firmware::Uefi { "nvram.fd" } else { "nvram.secure.fd" };
            assert!(g.state_dir.join(variables).exists());
        }
    } else {
        backends::missing("UEFI is not installed (package ovmf)");
    }
    driver.destroy(g.instance).await.unwrap();
    place.assert_clean();
}
