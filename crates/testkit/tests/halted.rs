//! A machine that a full pool has halted, over a simulated host: its process lives with its disks open, so nothing takes it for
//! stopped, whoever takes back a start does not end it, and there is a way on.

use karst_engine::{
    LiveOperation,
    backups::create::CreateBackup,
    compute::{
        create::{CreateInstance, InstanceSource},
        power::PowerRequest,
        relocate::MoveInstance,
        update::UpdateInstance,
    },
    snapshots::{Origin, create::CreateSnapshot},
    storage::CreatePool,
    volumes::create::CreateVolume,
};
use karst_env::{Env, SeededEnv};
use karst_model::{
    Config, Error, ErrorKind, InstanceId, Result,
    device::Devices,
    instance::{DesiredPower, HaltReason, InstanceKind, PowerAction, RuntimeState, Status},
    snapshot::Quiesce,
    storage::VolumeContent,
};
use karst_testkit::{World, scenarios::container};
use std::time::Duration;

const P: &str = "default";
const M: Origin<'static> = Origin::Instance { project: P, name: "m" };
const V: Origin<'static> = Origin::Volume { project: P, pool: P, name: "v1" };

/// Waits for the end and answers the operation's error as the call's own.
async fn end(w: &World, begun: Result<LiveOperation>) -> Result<()> {
    w.ended(begun?).await.error.clone().map_or(Ok(()), Err)
}

async fn power(w: &World, action: PowerAction, force: bool) -> Result<()> {
    let request = PowerRequest { action, force, timeout: Some(Duration::from_secs(5)), stateful: false };
    end(w, w.engine.instance_power(&w.admin, P, "m", request).await).await
}

async fn snapshot(
    w: &World,
    of: Origin<'_>,
    name: &str,
    stateful: bool,
    quiesce: Option<Quiesce>,
) -> Result<()> {
    let request = CreateSnapshot { name: Some(name.into()), stateful, quiesce, ..Default::default() };
    end(w, w.engine.snapshot_create(&w.admin, of, request).await).await
}

fn status(w: &World) -> Status {
    w.engine.instance(&w.admin, P, "m").unwrap().status
}

async fn until(w: &World, wanted: Status) {
    for _ in 0..600 {
        if status(w) == wanted {
            return;
        }
        w.env.sleep(Duration::from_millis(100)).await;
    }
    panic!("it does not become {wanted:?}: {}", w.fingerprint());
}

/// A machine `m` with a custom volume `v1`, both with a snapshot `s1`, that runs and is then halted by its full disk.
async fn world(env: &SeededEnv) -> (World, InstanceId, u32) {
    let w = World::new(env).await.unwrap();
    let pool = CreatePool { name: "second".into(), driver: "dir".into(), ..Default::default() };
    end(&w, w.engine.pool_create(&w.admin, pool).await).await.unwrap();
    let config = Config::from([("size".into(), "1GiB".into())]);
    let volume =
        CreateVolume { name: "v1".into(), content: VolumeContent::Block, description: String::new(), config };
    end(&w, w.engine.volume_create(&w.admin, P, P, volume).await).await.unwrap();
    let data = [("type", "disk"), ("pool", P), ("source", "v1")].map(|(k, v)| (k.to_owned(), v.to_owned()));
    let request = CreateInstance {
        kind: InstanceKind::VirtualMachine,
        start: true,
        config: Config::from([("migration.stateful".into(), "true".into())]),
        devices: Devices::from([("data".into(), data.into())]),
        ..container("m")
    };
    let created = w.engine.instance_create(&w.admin, P, request).await;
    end(&w, created.map(|(_, o)| o)).await.unwrap();
    snapshot(&w, V, "s1", false, None).await.unwrap();
    snapshot(&w, M, "s1", false, None).await.unwrap();
    w.settle().await;
    let id = w.engine.instance(&w.admin, P, "m").unwrap().instance.id;
    let pid = w.agent.pid_of(id).expect("it runs");
    halt(&w, id).await;
    (w, id, pid)
}

async fn halt(w: &World, id: InstanceId) {
    let slot = w.engine.instance(&w.admin, P, "m").unwrap().instance.identities["root"].slot.clone();
    assert!(w.agent.halt_guest(id, HaltReason::Disk { slot: Some(slot), full: true }));
    until(w, Status::Error).await;
}

/// It is the process of before, halted as before, and its record says so.
fn demand_same(w: &World, id: InstanceId, pid: u32, after: &str) {
    assert_eq!(w.agent.pid_of(id), Some(pid), "{after}: its process is another");
    let view = w.engine.instance(&w.admin, P, "m").unwrap();
    assert_eq!(view.status, Status::Error, "{after}");
    let runtime = view.runtime.as_ref().unwrap();
    assert_eq!(runtime.pid, Some(pid), "{after}");
    assert!(matches!(runtime.halt, Some(HaltReason::Disk { full: true, .. })), "{after}: {:?}", runtime.halt);
    assert!(runtime.applied.is_some(), "{after}: what it runs with is forgotten");
    assert_eq!(view.instance.generation, runtime.generation, "{after}");
    assert_eq!(view.instance.power, DesiredPower::Running, "{after}");
}

fn refused(done: Result<()>, word: &str) -> Error {
    let e = done.expect_err("what needs its disks at rest is refused");
    assert_eq!(e.kind, ErrorKind::Conflict, "{e:?}");
    assert!(e.message.contains(word), "{e:?}");
    e
}

#[test]
fn what_needs_its_disks_at_rest_is_refused_and_harms_nothing() {
    SeededEnv::run(41, |env| async move {
        let (w, id, pid) = world(&env).await;
        let said = refused(power(&w, PowerAction::Start, false).await, "resume it");
        assert!(said.message.contains("no space is left for disk \"root\" on pool \"default\""), "{said:?}");
        demand_same(&w, id, pid, "start");
        refused(power(&w, PowerAction::Freeze, false).await, "stands still");
        refused(power(&w, PowerAction::Stop, false).await, "resume it or force it");
        w.settle().await;
        demand_same(&w, id, pid, "a graceful stop");
        let rebuilt = w.engine.instance_rebuild(&w.admin, P, "m", InstanceSource::None).await;
        refused(end(&w, rebuilt).await, "is running");
        refused(end(&w, w.engine.instance_delete(&w.admin, P, "m").await).await, "halted by an error");
        refused(w.engine.instance_rename(&w.admin, P, "m", "n").await, "");
        refused(end(&w, w.engine.snapshot_restore(&w.admin, V, "s1").await).await, "runs with volume");
        refused(snapshot(&w, M, "s2", true, None).await, "halted by an error");
        refused(snapshot(&w, M, "s2", false, Some(Quiesce::Require)).await, "halted by an error");
        w.settle().await;
        demand_same(&w, id, pid, "all refusals");
        assert_eq!(w.faults().await, Vec::<String>::new());
        w.engine.close();
    });
}

#[test]
fn what_a_running_machine_can_it_can_too() {
    SeededEnv::run(42, |env| async move {
        let (w, id, pid) = world(&env).await;
        // Copies of its disks are of one moment: it is kept halted for so long.
        snapshot(&w, M, "s2", false, Some(Quiesce::Try)).await.unwrap();
        w.settle().await;
        demand_same(&w, id, pid, "a snapshot");
        let backup = CreateBackup { name: Some("b".into()), ..Default::default() };
        end(&w, w.engine.backup_create(&w.admin, M, backup).await.map(|x| x.1)).await.unwrap();
        w.settle().await;
        demand_same(&w, id, pid, "a backup");
        // It is changed as it runs.
        let view = w.engine.instance(&w.admin, P, "m").unwrap();
        let mut config = view.instance.config.clone();
        config.insert("limits.memory".into(), "2GiB".into());
        let update = UpdateInstance {
            description: String::new(),
            ephemeral: false,
            config,
            devices: view.instance.devices.clone(),
            profiles: vec!["default".into()],
            if_version: None,
        };
        let changed = w.engine.instance_update(&w.admin, P, "m", update).await.unwrap();
        let changed = w.ended(changed).await;
        assert_eq!(changed.error, None);
        assert_eq!(
            changed.metadata["karst_pending"],
            serde_json::json!(["limits.memory"]),
            "what waits is said"
        );
        w.settle().await;
        demand_same(&w, id, pid, "a change");
        // The cure of a full pool is another one. It keeps its process, and its disk.
        let request = MoveInstance {
            name: Some("m".into()),
            pool: Some("second".into()),
            profiles: Some(vec!["default".into()]),
            config: w.engine.instance(&w.admin, P, "m").unwrap().instance.config.clone(),
            devices: view.instance.devices.clone(),
            ..Default::default()
        };
        end(&w, w.engine.instance_move(&w.admin, P, "m", request).await).await.unwrap();
        w.settle().await;
        assert_eq!(w.agent.pid_of(id), Some(pid));
        assert_eq!(w.engine.instance(&w.admin, P, "m").unwrap().pool, "second");
        assert_eq!(w.faults().await, Vec::<String>::new());
        w.engine.close();
    });
}

#[test]
fn it_can_be_resumed_stopped_by_force_and_put_back() {
    SeededEnv::run(43, |env| async move {
        let (w, id, pid) = world(&env).await;
        power(&w, PowerAction::Unfreeze, false).await.unwrap();
        until(&w, Status::Running).await;
        assert_eq!(w.agent.pid_of(id), Some(pid));
        let runtime = w.engine.instance(&w.admin, P, "m").unwrap().runtime.clone().unwrap();
        assert_eq!((runtime.state, runtime.halt.clone()), (RuntimeState::Running, None));

        // As one that runs, it begins anew at the snapshot.
        halt(&w, id).await;
        end(&w, w.engine.snapshot_restore(&w.admin, M, "s1").await).await.unwrap();
        until(&w, Status::Running).await;
        let pid = w.agent.pid_of(id).unwrap();

        // A daemon that starts anew finds it as it is, and starts nothing.
        halt(&w, id).await;
        let mut w = w;
        w.reopen().await.unwrap();
        w.settle().await;
        demand_same(&w, id, pid, "a new daemon");

        power(&w, PowerAction::Stop, true).await.unwrap();
        assert_eq!((status(&w), w.agent.pid_of(id)), (Status::Stopped, None));
        power(&w, PowerAction::Start, false).await.unwrap();
        halt(&w, id).await;
        power(&w, PowerAction::Restart, true).await.unwrap();
        until(&w, Status::Running).await;
        w.settle().await;
        assert_eq!(w.faults().await, Vec::<String>::new());
        w.engine.close();
    });
}

#[test]
fn it_stops_with_its_host() {
    SeededEnv::run(44, |env| async move {
        let (w, id, _) = world(&env).await;
        assert_eq!(w.engine.host_stop(&w.admin).await.unwrap(), Vec::<String>::new());
        assert_eq!((status(&w), w.agent.pid_of(id)), (Status::Stopped, None), "nothing stays behind");
        assert_eq!(
            w.engine.instance(&w.admin, P, "m").unwrap().instance.power,
            DesiredPower::Running,
            "it starts again with its host"
        );
        w.engine.close();
    });
}
