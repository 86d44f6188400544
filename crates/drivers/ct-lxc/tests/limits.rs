//! Each limit is shown by exceeding it from inside a real container; what cannot be had is told.
#![allow(clippy::disallowed_methods)] // tests live in the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

mod common;

use common::{Place, inside, shell};
use karst_guest::{GuestDriver, StopMode};
use karst_model::{
    ByteSize,
    spec::{CpuAllowance, CpuLimit, KernelLimit, Limits, SwapLimit},
};
use std::time::Duration;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_hold_against_the_guest_and_change_live() {
    let Some(place) = Place::new() else { return };
    let driver = place.driver();
    let (mut guest, neighbour) = (place.guest(21), place.guest(22));
    let mib = |n: u64| Some(ByteSize::mib(n));
    guest.limits = Limits {
        memory: mib(96),
        processes: Some(80),
        swap: Some(SwapLimit::Forbidden),
        cpu_allowance: Some(CpuAllowance::Quota { quota_us: 10_000, period_us: 100_000 }),
        kernel: [("nofile".to_owned(), KernelLimit { soft: Some(123), hard: Some(456) })].into(),
        ..Limits::default()
    };
    driver.start(&guest).await.unwrap();
    driver.start(&neighbour).await.unwrap();
    // Open files, of init and of what enters; systemd raises its soft limit to the hard one.
    assert_eq!(inside(&driver, &guest, "ulimit -Hn").await, "456");
    assert_ne!(shell(&driver, &guest, "ulimit -n 500").await.code, 0);

    // CPU: busy for a while, it gets a tenth of one at most.
    let used = async || driver.metrics(guest.instance).await.unwrap().cpu_ns.unwrap();
    let (before, clock) = (used().await, std::time::Instant::now());
    inside(
        &driver,
        &guest,
        "timeout 2 sh -c 'while :; do :; done' & timeout 2 sh -c 'while :; do :; done'; true",
    )
    .await;
    let (spent, elapsed) = (used().await - before, clock.elapsed());
    assert!(u128::from(spent) < elapsed.as_nanos() / 6, "{spent} ns of CPU in {elapsed:?}");
    guest.limits.cpu_allowance = None;
    guest.limits.cpu = Some(CpuLimit::Set { cpus: vec![0] });
    driver.update(&guest).await.unwrap();
    assert_eq!(
        inside(&driver, &guest, "nproc; grep Cpus_allowed_list /proc/self/status | cut -f2").await,
        "1\n0"
    );

    // Memory: whoever takes more is ended, and the rest of the guest goes on.
    let hog = |mib: u32| format!("head -c {mib}M /dev/zero | tail -c {mib}M | wc -c");
    let ran = shell(&driver, &guest, &hog(160)).await;
    assert_ne!(ran.stdout.trim(), (160 << 20).to_string(), "{ran:?}");
    guest.limits.memory = mib(400);
    driver.update(&guest).await.unwrap();
    assert_eq!(inside(&driver, &guest, &hog(160)).await, (160 << 20).to_string());
    // Soft: nobody is ended while the host has enough.
    guest.limits.memory = mib(96);
    guest.limits.memory_soft = true;
    driver.update(&guest).await.unwrap();
    assert_eq!(inside(&driver, &guest, &hog(160)).await, (160 << 20).to_string());

    // Processes: a fork bomb ends at the limit; what it leaves behind is ended with the guest.
    let bomb = "i=0; while [ $i -lt 200 ]; do sleep 600 >/dev/null 2>&1 & i=$((i+1)); done";
    shell(&driver, &guest, bomb).await;
    let processes = driver.metrics(guest.instance).await.unwrap().processes.unwrap();
    assert!((60..=80).contains(&processes), "{processes}");
    // The neighbour has noticed nothing.
    assert_eq!(inside(&driver, &neighbour, "echo well").await, "well");
    tokio::time::timeout(Duration::from_secs(60), driver.stop(guest.instance, StopMode::Force))
        .await
        .unwrap()
        .unwrap();

    // A priority of disks where their scheduler has none is told, and so is a resource that the kernel does not know.
    let mut odd = guest.clone();
    odd.generation = odd.generation.next();
    odd.limits = Limits {
        kernel: [("nofiles".to_owned(), KernelLimit { soft: None, hard: None })].into(),
        ..Limits::default()
    };
    let e = driver.start(&odd).await.unwrap_err();
    assert_eq!(e.field.as_deref(), Some("config.limits.kernel.nofiles"));
    driver.stop(neighbour.instance, StopMode::Force).await.unwrap();
    place.assert_clean();
}
