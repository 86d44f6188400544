//! Block volumes that several machines have at the same time, over a simulated host: who may share one, what the machines are
//! started with, and how a volume grows under those that run.

use karst_engine::{
    LiveOperation,
    compute::{create::CreateInstance, power::PowerRequest},
    snapshots::{Origin, create::CreateSnapshot},
    volumes::{create::CreateVolume, update::UpdateVolume},
};
use karst_env::{Env, SeededEnv};
use karst_model::{
    Config, Error, ErrorKind, InstanceId, Result,
    device::Devices,
    instance::{InstanceKind, PowerAction},
    storage::VolumeContent,
};
use karst_testkit::{World, scenarios::container};
use std::time::Duration;

const P: &str = "default";
const V: Origin<'static> = Origin::Volume { project: P, pool: P, name: "v" };

async fn ended(w: &World, operation: Result<LiveOperation>) -> Result<()> {
    w.ended(operation?).await.error.clone().map_or(Ok(()), Err)
}

async fn world(env: &SeededEnv) -> World {
    let w = World::new(env).await.unwrap();
    let request = CreateVolume {
        name: "v".into(),
        content: VolumeContent::Block,
        description: String::new(),
        config: config("1GiB", false),
    };
    ended(&w, w.engine.volume_create(&w.admin, P, P, request).await).await.unwrap();
    w
}

fn config(size: &str, shared: bool) -> Config {
    [("size", size.to_owned()), ("security.shared", shared.to_string())]
        .map(|(k, v)| (k.to_owned(), v))
        .into()
}

async fn set(w: &World, size: &str, shared: bool) -> Result<()> {
    let request = UpdateVolume { description: String::new(), config: config(size, shared), if_version: None };
    ended(w, w.engine.volume_update(&w.admin, P, P, "v", request).await).await
}

/// A machine that has the volume, by other keys of its device too.
async fn machine(w: &World, name: &str, start: bool, more: &[(&str, &str)]) -> Result<()> {
    let keys = [("type", "disk"), ("pool", P), ("source", "v")].iter().chain(more);
    let device = keys.map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let devices = Devices::from([("d".to_owned(), device)]);
    let request = CreateInstance { kind: InstanceKind::VirtualMachine, start, devices, ..container(name) };
    ended(w, w.engine.instance_create(&w.admin, P, request).await.map(|(_, o)| o)).await
}

async fn restore(w: &World) -> Result<()> {
    ended(w, w.engine.snapshot_restore(&w.admin, V, "alone").await).await
}

async fn power(w: &World, name: &str, action: PowerAction) {
    let request = PowerRequest { action, force: true, timeout: None, stateful: false };
    ended(w, w.engine.instance_power(&w.admin, P, name, request).await).await.unwrap();
}

fn id(w: &World, name: &str) -> InstanceId {
    w.engine.instance(&w.admin, P, name).unwrap().instance.id
}

/// Was the machine's disk plugged as one that others write?
fn plugged_shared(w: &World, name: &str) -> bool {
    let disks = w.agent.guest_disks(id(w, name)).unwrap();
    assert_eq!(disks.len(), 1, "{disks:?}");
    disks[0].shared
}

fn size(w: &World) -> u64 {
    w.engine.custom_volume(&w.admin, P, P, "v").unwrap().size.unwrap().bytes()
}

fn conflict(outcome: Result<()>, field: &str) -> Error {
    let e = outcome.unwrap_err();
    assert!(e.is(ErrorKind::Conflict), "{e}");
    assert_eq!(e.field.as_deref(), Some(field), "{e}");
    e
}

#[test]
fn machines_share_what_they_know_to_be_shared() {
    SeededEnv::run(51, |env| async move {
        let w = world(&env).await;
        machine(&w, "a", true, &[]).await.unwrap();
        assert!(!plugged_shared(&w, "a"));
        // Its QEMU would let nobody else write.
        let e = conflict(set(&w, "1GiB", true).await, "config.security.shared");
        assert!(e.message.contains("\"a\" runs"), "{e}");
        assert!(machine(&w, "b", false, &[]).await.is_err(), "it is not shared");
        power(&w, "a", PowerAction::Stop).await;
        set(&w, "1GiB", true).await.unwrap();
        power(&w, "a", PowerAction::Start).await;
        machine(&w, "b", true, &[]).await.unwrap();
        assert!(plugged_shared(&w, "a") && plugged_shared(&w, "b"));
        let e = conflict(set(&w, "1GiB", false).await, "config.security.shared");
        assert!(e.message.contains("2 instances"), "{e}");
        w.settle().await;
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}

#[test]
fn a_restore_takes_a_volume_from_nobody() {
    SeededEnv::run(52, |env| async move {
        let w = world(&env).await;
        let snapshot = CreateSnapshot { name: Some("alone".into()), ..Default::default() };
        ended(&w, w.engine.snapshot_create(&w.admin, V, snapshot).await).await.unwrap();
        set(&w, "1GiB", true).await.unwrap();
        machine(&w, "a", false, &[]).await.unwrap();
        machine(&w, "b", false, &[]).await.unwrap();
        let e = restore(&w).await.unwrap_err();
        assert!(e.is(ErrorKind::Conflict) && e.message.contains("2 instances"), "{e}");
        let volume = || w.engine.custom_volume(&w.admin, P, P, "v").unwrap();
        assert!(volume().is_shared(), "nothing has changed");
        ended(&w, w.engine.instance_delete(&w.admin, P, "b").await).await.unwrap();
        restore(&w).await.unwrap();
        assert!(!volume().is_shared());
        w.settle().await;
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}

#[test]
fn a_volume_grows_under_the_machines_that_have_it() {
    SeededEnv::run(53, |env| async move {
        let w = world(&env).await;
        machine(&w, "a", true, &[]).await.unwrap();
        set(&w, "2GiB", false).await.unwrap();
        assert_eq!(size(&w), 2 << 30);
        power(&w, "a", PowerAction::Stop).await;
        set(&w, "2GiB", true).await.unwrap();
        power(&w, "a", PowerAction::Start).await;
        machine(&w, "b", true, &[]).await.unwrap();
        machine(&w, "c", false, &[]).await.unwrap();
        set(&w, "3GiB", true).await.unwrap();
        assert_eq!(size(&w), 3 << 30);
        // Who runs with it neither gets nor gives back a device meanwhile, and who does not run does not start.
        w.agent.inject("volume_resize", karst_agent::Fault::Delay(Duration::from_secs(20)));
        let request =
            UpdateVolume { description: String::new(), config: config("4GiB", true), if_version: None };
        let growing = w.engine.volume_update(&w.admin, P, P, "v", request).await.unwrap();
        w.env.sleep(Duration::from_secs(1)).await;
        for (name, action) in
            [("a", PowerAction::Restart), ("b", PowerAction::Restart), ("c", PowerAction::Start)]
        {
            let request = PowerRequest { action, force: true, timeout: None, stateful: false };
            let outcome = w.engine.instance_power(&w.admin, P, name, request).await;
            let e = ended(&w, outcome).await.unwrap_err();
            assert!(e.is(ErrorKind::Conflict), "{name}: {e}");
        }
        assert_eq!(w.ended(growing).await.error, None);
        assert_eq!(size(&w), 4 << 30);
        let e = set(&w, "1GiB", true).await.unwrap_err();
        assert!(e.is(ErrorKind::Invalid) && e.message.contains("shrink"), "{e}");
        w.settle().await;
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}

#[test]
fn a_disk_whose_guest_is_told_of_nothing_grows_while_it_is_stopped() {
    SeededEnv::run(54, |env| async move {
        let w = world(&env).await;
        machine(&w, "a", true, &[("io.bus", "nvme")]).await.unwrap();
        let e = conflict(set(&w, "2GiB", false).await, "config.size");
        assert!(e.message.contains("\"a\"") && e.message.contains("NVMe"), "{e}");
        assert_eq!((size(&w), w.agent.count("volume_resize")), (1 << 30, 0));
        power(&w, "a", PowerAction::Stop).await;
        set(&w, "2GiB", false).await.unwrap();
        assert_eq!(size(&w), 2 << 30);
        w.settle().await;
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}
