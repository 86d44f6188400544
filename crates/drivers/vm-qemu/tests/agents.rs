//! Systems that were not made for Karst: with a loader of Incus' agent, and with the QEMU guest agent alone.
#![allow(clippy::disallowed_methods)] // deals with the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod common;

use common::{Inside, Place};
use karst_guest::{
    ExecStreams, GuestDriver, StopMode,
    contract::{collect, content, request, shell, until_inside, write_of},
};
use karst_model::{ErrorKind, guest::AgentKind};
use std::time::Duration;

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
