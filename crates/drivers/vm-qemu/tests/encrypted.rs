//! Encrypted disks of a small Linux: at its start and while it runs, and where the passphrase is not.
#![allow(clippy::disallowed_methods)] // deals with the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod common;

use common::{Place, console::Shell};
use karst_guest::{DiskFormat, GuestDriver, ResolvedDisk, StopMode, samples};
use karst_model::{ErrorKind, encryption::Passphrase, instance::RuntimeState};
use std::{path::Path, process::Command};

const WORDS: &str = "open sesame, says Ali";

/// A container of 8 MiB.
fn disk(place: &Place, name: &str, slot: &str) -> ResolvedDisk {
    let (path, key) = (place.dir.join(name), place.dir.join("words"));
    std::fs::write(&key, WORDS).unwrap();
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "luks", "-o", "key-secret=key,iter-time=10", "--object"])
        .arg(format!("secret,id=key,file={}", key.display()))
        .arg(&path)
        .arg("8M")
        .status();
    assert!(made.unwrap().success());
    std::fs::remove_file(key).unwrap();
    let mut disk = samples::disk(name, slot, path, DiskFormat::Raw);
    disk.io.secret = Some(uuid::Uuid::from_u128(0x5ec));
    with(&disk, WORDS)
}

fn with(disk: &ResolvedDisk, words: &str) -> ResolvedDisk {
    ResolvedDisk { key: Some(Passphrase::of(words.as_bytes()).unwrap()), ..disk.clone() }
}

/// Files below a directory that have these words.
fn files_with(words: &str, below: &Path) -> String {
    let found = Command::new("grep").args(["-rlFa", words]).arg(below).output().unwrap();
    String::from_utf8_lossy(&found.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn encrypted_disks_are_opened_and_their_passphrase_is_nowhere() {
    let Some(place) = Place::small("encrypted") else { return };
    let mut guest = place.guest(1);
    let id = guest.instance;
    guest.machine.as_mut().unwrap().ports = 8;
    (guest.root.slot, guest.root.pci) = ("scsi0".into(), None);
    guest.root.boot_priority = 1;
    guest.limits.cpu = None;
    let data = disk(&place, "data", "scsi1");
    let more = disk(&place, "more", "scsi2");
    let driver = place.driver();

    // Without, with another, and of what is no container: said with the disk and what to do.
    guest.disks = vec![ResolvedDisk { key: None, ..data.clone() }];
    let e = driver.start(&guest).await.unwrap_err();
    assert!(e.is(ErrorKind::Conflict) && e.message.contains("secret"), "{e}");
    guest.disks = vec![with(&data, "open barley")];
    let e = driver.start(&guest).await.unwrap_err();
    assert!(
        e.is(ErrorKind::Invalid) && e.message.contains("does not open the disk \"data\""),
        "{e} {:?}",
        e.context
    );
    let plain = place.dir.join("plain");
    std::fs::File::create(&plain).unwrap().set_len(8 << 20).unwrap();
    guest.disks = vec![ResolvedDisk { path: plain, ..data.clone() }];
    let e = driver.start(&guest).await.unwrap_err();
    assert!(e.is(ErrorKind::Invalid) && e.message.contains("no container"), "{e} {:?}", e.context);

    guest.disks = vec![data.clone()];
    let observed = driver.start(&guest).await.unwrap();
    let mut shell = Shell::open(&driver, id).await;
    shell.until_up();
    shell.until("cat /sys/block/sdb/size", "16384");
    let mark = "printf 'KARSTMARKKARSTMARK' | dd of=/dev/sdb bs=512 seek=100 conv=sync,fsync 2>/dev/null; \
                dd if=/dev/sdb bs=512 skip=100 count=1 2>/dev/null | tr -d '\\000'";
    assert_eq!(shell.run(mark), "KARSTMARKKARSTMARK");

    // One comes while it runs; with a wrong passphrase it does not, and can be tried again.
    let mut changed = guest.clone();
    changed.spec_version += 1;
    changed.disks = vec![ResolvedDisk { key: None, ..data.clone() }, with(&more, "open barley")];
    let e = driver.update(&changed).await.unwrap_err();
    assert!(
        e.is(ErrorKind::Invalid) && e.message.contains("does not open the disk \"more\""),
        "{e} {:?}",
        e.context
    );
    changed.disks[1] = more.clone();
    assert_eq!(driver.update(&changed).await.unwrap().pending, Vec::<String>::new());
    shell.until("cat /sys/block/sdc/size", "16384");
    assert_eq!(shell.run(&mark.replace("sdb", "sdc")), "KARSTMARKKARSTMARK");

    // It is in no argument and no record, and QEMU tells it to nobody.
    let pid = observed.pid.unwrap();
    for file in ["cmdline", "environ"] {
        let bytes = std::fs::read(format!("/proc/{pid}/{file}")).unwrap();
        assert!(!bytes.windows(WORDS.len()).any(|w| w == WORDS.as_bytes()), "{file}");
    }
    assert_eq!(files_with(WORDS, &place.dir), "");
    let stored = [&data.path, &more.path].map(|p| std::fs::read(p).unwrap());
    assert!(stored.iter().all(|s| !s.windows(9).any(|w| w == b"KARSTMARK")), "what lies there is encrypted");

    // It grows: what is stored has a header more than what the guest sees.
    let header = std::fs::metadata(&data.path).unwrap().len() - (8 << 20);
    driver.machine().unwrap().grow(id, &data.path, header + (12 << 20)).await.unwrap();
    shell.until("cat /sys/block/sdb/size", "24576");
    assert_eq!(std::fs::metadata(&data.path).unwrap().len(), header + (12 << 20));

    // A driver that has just adopted it needs no passphrase for what runs.
    drop(driver);
    let driver = place.driver();
    assert_eq!(driver.adopt().await.unwrap().len(), 1);
    let mut without = changed.clone();
    without.spec_version += 1;
    without.disks = vec![ResolvedDisk { key: None, ..data.clone() }];
    assert_eq!(driver.update(&without).await.unwrap().pending, Vec::<String>::new());
    shell.until("ls /sys/block | grep -c '^sd[bc]'", "1");
    assert_eq!(driver.observe(id).await.unwrap().state, RuntimeState::Running);
    driver.stop(id, StopMode::Force).await.unwrap();
    driver.destroy(id).await.unwrap();
    place.assert_clean();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_state_of_a_tpm_is_read_with_its_passphrase_only() {
    if !Path::new("/usr/bin/swtpm").exists() {
        return backends::missing("swtpm is missing (package swtpm)");
    }
    let Some(place) = Place::small("tpmkey") else { return };
    let mut guest = place.guest(1);
    let id = guest.instance;
    guest.limits.cpu = None;
    let machine = guest.machine.as_mut().unwrap();
    (machine.tpm, machine.tpm_secret) = (true, Some(uuid::Uuid::from_u128(0x5ec)));
    let driver = place.driver();
    let e = driver.start(&guest).await.unwrap_err();
    assert!(e.is(ErrorKind::Conflict) && e.message.contains("TPM") && e.message.contains("05ec"), "{e}");
    let key = |words: &str| Some(Passphrase::of(words.as_bytes()).unwrap());
    guest.tpm_key = key(WORDS);
    driver.start(&guest).await.unwrap();
    let swtpm = Command::new("pgrep").args(["-fa", "^swtpm .*--key"]).output().unwrap();
    let lines = String::from_utf8_lossy(&swtpm.stdout).into_owned();
    assert!(lines.contains("pwdfd=") && !lines.contains("sesame"), "{lines}");
    assert_eq!(files_with(WORDS, &place.dir), "");
    driver.stop(id, StopMode::Force).await.unwrap();
    for (words, opens) in [("open barley", false), (WORDS, true)] {
        guest.generation.n += 1;
        guest.tpm_key = key(words);
        match driver.start(&guest).await {
            Ok(_) => assert!(opens, "{words}"),
            Err(e) => assert!(!opens && e.message.contains("TPM"), "{words}: {e} {:?}", e.context),
        }
    }
    driver.stop(id, StopMode::Force).await.unwrap();
    driver.destroy(id).await.unwrap();
    place.assert_clean();
}
