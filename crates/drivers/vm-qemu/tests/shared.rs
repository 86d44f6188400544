//! A disk that two machines have at the same time: both write it, each sees what the other wrote, and it grows under both. One
//! that is not shared stays its machine's own.
#![allow(clippy::disallowed_methods)] // deals with the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod common;

use common::{Place, console::Shell};
use karst_guest::{GuestDriver, ResolvedDisk, ResolvedGuest, StopMode};
use karst_model::{ByteSize, ErrorKind};

fn machine(place: &Place, n: u128) -> ResolvedGuest {
    let mut guest = place.guest(n);
    guest.machine.as_mut().unwrap().ports = 4;
    guest.limits.cpu = None;
    guest.limits.memory = Some(ByteSize::mib(256));
    (guest.root.slot, guest.root.pci) = ("scsi0".into(), None);
    let own = place.dir.join(format!("root{n}.raw"));
    std::fs::copy(&guest.root.path, &own).unwrap();
    guest.root.path = own;
    guest.nics[0].pci = Some("01:00.0".into());
    guest.nics[0].mac = format!("10:66:6a:00:01:{n:02x}");
    if n > 1 {
        guest.nics[0].host_interface = place.tap().replace("ktw", "ktx");
    }
    guest
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_machines_write_one_disk() {
    let Some(place) = Place::small("shared") else { return };
    let path = place.dir.join("both");
    std::fs::File::create(&path).unwrap().set_len(8 << 20).unwrap();
    let driver = place.driver();
    let (mut first, second) = (machine(&place, 1), machine(&place, 2));
    let alone = ResolvedDisk {
        name: "both".into(),
        slot: "scsi1".into(),
        path: path.clone(),
        pci: None,
        boot_priority: 0,
        ..first.root.clone()
    };
    let shared = ResolvedDisk { shared: true, ..alone.clone() };
    first.disks = vec![shared.clone()];
    driver.start(&first).await.unwrap();
    driver.start(&second).await.unwrap();
    let mut one = Shell::open(&driver, first.instance).await;
    let mut two = Shell::open(&driver, second.instance).await;
    one.until_up();
    two.until_up();

    // Who does not know of others gets it from nobody who writes; who knows has it at once.
    let mut with = second.clone();
    with.spec_version += 1;
    with.disks = vec![alone];
    let e = driver.update(&with).await.unwrap_err();
    assert!(e.is(ErrorKind::Conflict) && e.message.contains("in use"), "{e}");
    with.disks = vec![shared];
    assert_eq!(driver.update(&with).await.unwrap().pending, Vec::<String>::new());
    two.until("cat /sys/block/sdb/size", &(8 * 2048).to_string());

    // Each reads from the disk what the other has written to it.
    let write = |word: &str, at: u32| {
        format!("echo {word} | dd of=/dev/sdb bs=4096 seek={at} conv=notrunc,fsync 2>/dev/null; sync")
    };
    let read = |at: u32| {
        format!(
            "echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/sdb bs=4096 skip={at} count=1 2>/dev/null | head -n 1"
        )
    };
    one.run(&write("first", 0));
    assert_eq!(two.run(&read(0)), "first");
    two.run(&write("second", 1));
    assert_eq!(one.run(&read(1)), "second");

    // It grows under both, one after the other.
    for guest in [&first, &with] {
        driver.machine().unwrap().grow(guest.instance, &path, 16 << 20).await.unwrap();
    }
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 16 << 20);
    for shell in [&mut one, &mut two] {
        shell.until("cat /sys/block/sdb/size", &(16 * 2048).to_string());
    }
    two.run(&write("beyond", 3000));
    assert_eq!(one.run(&read(3000)), "beyond");

    // The second gives it back, and the first has it still.
    let mut without = second.clone();
    without.spec_version += 2;
    assert_eq!(driver.update(&without).await.unwrap().pending, Vec::<String>::new());
    one.run(&write("last", 2));
    assert_eq!(one.run(&read(2)), "last");
    for guest in [&first, &second] {
        driver.stop(guest.instance, StopMode::Force).await.unwrap();
        driver.destroy(guest.instance).await.unwrap();
    }
    place.assert_clean();
}
