//! Disks of virtual machines that are copied while they run, over a simulated host: what follows the records, who may say how a
//! copy ends, and what a stop, a lost answer or a host that starts anew makes of it.

use karst_agent::Fault;
use karst_engine::{
    LiveOperation,
    compute::{
        create::CreateInstance,
        disk_copy::{CopyDisk, CopyTarget},
        power::PowerRequest,
        relocate::MoveInstance,
    },
    saga::runner::{Interference, Moment},
    snapshots::{Origin, create::CreateSnapshot},
    storage::CreatePool,
    volumes::create::CreateVolume,
};
use karst_env::{Env, SeededEnv};
use karst_model::{
    Config, Error, ErrorKind, Result,
    device::Devices,
    guest::{DiskCopyEnd, DiskCopyPhase},
    instance::{InstanceKind, PowerAction, Status},
    operation::OperationState,
    storage::VolumeContent,
};
use karst_testkit::{World, scenarios::container};
use std::{sync::Arc, time::Duration};

const P: &str = "default";

async fn done(w: &World, operation: Result<LiveOperation>) {
    assert_eq!(w.ended(operation.unwrap()).await.error, None);
}

/// A second pool, and a machine `m` that runs: on its own root, or on the custom volume `v1`.
async fn world(env: &SeededEnv, custom: bool) -> World {
    let w = World::new(env).await.unwrap();
    let pool = CreatePool { name: "second".into(), driver: "dir".into(), ..Default::default() };
    done(&w, w.engine.pool_create(&w.admin, pool).await).await;
    let mut create = CreateInstance { kind: InstanceKind::VirtualMachine, start: true, ..container("m") };
    if custom {
        volume(&w, "v1", "10GiB").await;
        let root = [("type", "disk"), ("path", "/"), ("pool", P), ("source", "v1")];
        let root = root.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        create.devices = Devices::from([("root".into(), root)]);
    }
    done(&w, w.engine.instance_create(&w.admin, P, create).await.map(|(_, o)| o)).await;
    w
}

async fn volume(w: &World, name: &str, size: &str) {
    let config = Config::from([("size".into(), size.into())]);
    let request =
        CreateVolume { name: name.into(), content: VolumeContent::Block, description: String::new(), config };
    done(w, w.engine.volume_create(&w.admin, P, P, request).await).await;
}

fn to(pool: &str, name: &str, new: bool) -> CopyDisk {
    let to = CopyTarget::Volume { pool: pool.into(), name: name.into(), new };
    CopyDisk { device: None, to, hold: true, speed: 0, synchronous: false }
}

async fn begin(w: &World, request: CopyDisk) -> Result<LiveOperation> {
    w.engine.disk_copy_begin(&w.admin, P, "m", request).await
}

async fn end(w: &World, how: DiskCopyEnd) -> Result<()> {
    w.engine.disk_copy_end(&w.admin, P, "m", "root", how, true).await
}

async fn until_ready(w: &World) {
    for _ in 0..600 {
        let found = w.engine.disk_copy(&w.admin, P, "m").await.unwrap();
        if found.is_some_and(|f| f.state.phase == DiskCopyPhase::Ready) {
            return;
        }
        w.env.sleep(Duration::from_millis(100)).await;
    }
    panic!("the copy is not ready");
}

async fn stop(w: &World) -> Result<()> {
    let request = PowerRequest { action: PowerAction::Stop, force: true, timeout: None, stateful: false };
    let operation = w.engine.instance_power(&w.admin, P, "m", request).await?;
    w.ended(operation).await.error.clone().map_or(Ok(()), Err)
}

fn pool_of(w: &World) -> (String, String) {
    let view = w.engine.instance(&w.admin, P, "m").unwrap();
    (view.pool.clone(), view.expanded_devices["root"]["pool"].clone())
}

async fn demand_clean(w: &World) {
    w.settle().await;
    assert_eq!(w.faults().await, Vec::<String>::new());
}

#[test]
fn a_running_machine_moves_to_another_pool_with_its_snapshots() {
    SeededEnv::run(31, |env| async move {
        let w = world(&env, false).await;
        let of = Origin::Instance { project: P, name: "m" };
        let snapshot = CreateSnapshot { name: Some("s1".into()), ..Default::default() };
        done(&w, w.engine.snapshot_create(&w.admin, of, snapshot).await).await;
        let before = w.engine.instance(&w.admin, P, "m").unwrap();
        // As clients say it, with all that stays.
        let request = MoveInstance {
            name: Some("m".into()),
            pool: Some("second".into()),
            config: before.instance.config.clone(),
            devices: before.instance.devices.clone(),
            profiles: Some(vec!["default".into()]),
            ..Default::default()
        };
        let operation = w.engine.instance_move(&w.admin, P, "m", request).await.unwrap();
        let ended = w.ended(operation).await;
        assert_eq!(ended.error, None);
        let told = ended.metadata["disk_copy_progress"].as_str().unwrap();
        assert_eq!(told, "root: 100%");
        let after = w.engine.instance(&w.admin, P, "m").unwrap();
        assert_eq!(pool_of(&w), ("second".into(), "second".into()));
        assert_eq!((after.status, after.instance.id), (Status::Running, before.instance.id));
        assert_eq!(after.instance.generation, before.instance.generation, "it was not started anew");
        assert_ne!(after.instance.root, before.instance.root);
        assert_eq!(w.engine.instance_pending(&w.admin, P, "m").unwrap(), []);
        demand_clean(&w).await;
        // It starts from there, and its snapshot is where it is.
        stop(&w).await.unwrap();
        done(&w, w.engine.snapshot_restore(&w.admin, of, "s1").await).await;
        let start = PowerRequest { action: PowerAction::Start, force: false, timeout: None, stateful: false };
        done(&w, w.engine.instance_power(&w.admin, P, "m", start).await).await;
        assert_eq!(pool_of(&w), ("second".into(), "second".into()));
        demand_clean(&w).await;
    });
}

#[test]
fn more_than_the_pool_does_not_change_while_it_runs() {
    SeededEnv::run(32, |env| async move {
        let w = world(&env, false).await;
        let elsewhere = |change: fn(&mut MoveInstance)| {
            let mut request = MoveInstance { pool: Some("second".into()), ..Default::default() };
            change(&mut request);
            request
        };
        for request in [
            elsewhere(|r| r.name = Some("other".into())),
            elsewhere(|r| r.config = Config::from([("limits.cpu".into(), "2".into())])),
            elsewhere(|r| r.profiles = Some(vec![])),
        ] {
            let e = w.engine.instance_move(&w.admin, P, "m", request).await.unwrap_err();
            assert!(e.is(ErrorKind::Conflict) && e.message.contains("only its pool"), "{e}");
        }
        let there = MoveInstance { pool: Some(P.into()), ..Default::default() };
        let e = w.engine.instance_move(&w.admin, P, "m", there).await.unwrap_err();
        assert!(e.is(ErrorKind::Invalid) && e.field.as_deref() == Some("pool"), "{e:?}");
        let nowhere = MoveInstance { pool: Some("nope".into()), ..Default::default() };
        assert!(w.engine.instance_move(&w.admin, P, "m", nowhere).await.unwrap_err().is(ErrorKind::NotFound));
        demand_clean(&w).await;
    });
}

#[test]
fn a_copy_follows_the_disk_until_somebody_says_how_it_ends() {
    SeededEnv::run(33, |env| async move {
        let w = world(&env, true).await;
        let operation = begin(&w, CopyDisk { speed: 1 << 30, ..to("second", "v2", true) }).await.unwrap();
        let early = end(&w, DiskCopyEnd::Pivot).await.unwrap_err();
        assert!(early.is(ErrorKind::Conflict) && early.message.contains("ready"), "{early}");
        let again = begin(&w, to("second", "v3", true)).await.unwrap_err();
        assert!(again.is(ErrorKind::Conflict) && again.message.contains("busy"), "{again}");
        w.env.sleep(Duration::from_secs(1)).await;
        let found = w.engine.disk_copy(&w.admin, P, "m").await.unwrap().unwrap();
        assert_eq!((found.device.as_str(), found.state.speed), ("root", 1 << 30));
        w.engine.disk_copy_speed(&w.admin, P, "m", "root", 0).await.unwrap();
        until_ready(&w).await;
        w.env.sleep(Duration::from_secs(30)).await;
        assert_eq!(operation.snapshot().state, OperationState::Running, "nobody has said anything");
        end(&w, DiskCopyEnd::Finish).await.unwrap();
        assert_eq!(operation.ended().await.state, OperationState::Success);
        assert!(w.engine.custom_volume(&w.admin, P, "second", "v2").is_ok(), "it is left");
        assert_eq!(pool_of(&w).0, P);
        demand_clean(&w).await;

        // Into one that is there; the old volume stays, and is nobody's.
        begin(&w, to("second", "v2", false)).await.unwrap();
        until_ready(&w).await;
        end(&w, DiskCopyEnd::Pivot).await.unwrap();
        assert_eq!(pool_of(&w), ("second".into(), "second".into()));
        let view = w.engine.instance(&w.admin, P, "m").unwrap();
        assert_eq!(view.expanded_devices["root"]["source"], "v2");
        assert_eq!(w.engine.instance_pending(&w.admin, P, "m").unwrap(), []);
        done(&w, w.engine.volume_delete(&w.admin, P, P, "v1").await).await;
        let used = w.engine.volume_delete(&w.admin, P, "second", "v2").await.map(drop).unwrap_err();
        assert!(used.is(ErrorKind::Conflict), "{used}");
        demand_clean(&w).await;
    });
}

#[test]
fn what_cannot_be_copied_to_is_refused_and_changes_nothing() {
    SeededEnv::run(34, |env| async move {
        let w = world(&env, true).await;
        volume(&w, "small", "1GiB").await;
        let shown = w.fingerprint();
        let refused = async |request: CopyDisk| -> Error { begin(&w, request).await.map(drop).unwrap_err() };
        let small = refused(to(P, "small", false)).await;
        assert!(small.is(ErrorKind::Invalid) && small.message.contains("10GiB"), "{small}");
        assert!(refused(to(P, "nope", false)).await.is(ErrorKind::NotFound));
        assert!(refused(to("nope", "v2", true)).await.is(ErrorKind::NotFound));
        let taken = refused(to(P, "small", true)).await;
        assert!(taken.is(ErrorKind::Conflict) && taken.field.as_deref() == Some("to"), "{taken:?}");
        assert!(refused(to(P, "v1", false)).await.is(ErrorKind::Invalid), "the disk itself");
        let pool = CopyDisk { to: CopyTarget::Pool("second".into()), hold: false, ..to(P, "x", true) };
        assert!(refused(pool).await.is(ErrorKind::Unsupported), "it is a volume of the user's");
        let nic = CopyDisk { device: Some("eth0".into()), ..to("second", "v2", true) };
        assert!(refused(nic).await.is(ErrorKind::Invalid));
        let none = CopyDisk { device: Some("nope".into()), ..to("second", "v2", true) };
        assert!(refused(none).await.is(ErrorKind::NotFound));
        assert_eq!(w.fingerprint(), shown);
        demand_clean(&w).await;
    });
}

#[test]
fn a_disk_that_an_instance_owns_goes_on_in_another_pool_only() {
    SeededEnv::run(35, |env| async move {
        let w = world(&env, false).await;
        let go_on = CopyDisk { hold: false, ..to("second", "v2", true) };
        assert!(begin(&w, go_on).await.map(drop).unwrap_err().is(ErrorKind::Unsupported));
        begin(&w, to("second", "v2", true)).await.unwrap();
        until_ready(&w).await;
        let refused = end(&w, DiskCopyEnd::Pivot).await.unwrap_err();
        assert!(refused.is(ErrorKind::Unsupported) && refused.message.contains("another pool"), "{refused}");
        // By which it has not ended.
        assert!(w.engine.disk_copy(&w.admin, P, "m").await.unwrap().is_some());
        end(&w, DiskCopyEnd::Finish).await.unwrap();
        assert!(w.engine.custom_volume(&w.admin, P, "second", "v2").is_ok());
        // What was made for it to move to is not left.
        let shown = w.fingerprint();
        begin(&w, CopyDisk { to: CopyTarget::Pool("second".into()), ..to(P, "x", true) }).await.unwrap();
        until_ready(&w).await;
        end(&w, DiskCopyEnd::Finish).await.unwrap();
        assert_eq!(w.fingerprint(), shown);
        begin(&w, CopyDisk { to: CopyTarget::Pool("second".into()), ..to(P, "x", true) }).await.unwrap();
        until_ready(&w).await;
        end(&w, DiskCopyEnd::Pivot).await.unwrap();
        assert_eq!(pool_of(&w), ("second".into(), "second".into()));
        demand_clean(&w).await;
    });
}

#[test]
fn a_cancel_and_a_stop_leave_everything_as_it_was() {
    SeededEnv::run(36, |env| async move {
        let w = world(&env, true).await;
        let shown = w.fingerprint();
        let slow = || CopyDisk { speed: 1 << 20, ..to("second", "v2", true) };
        let operation = begin(&w, slow()).await.unwrap();
        w.env.sleep(Duration::from_secs(2)).await;
        end(&w, DiskCopyEnd::Cancel).await.unwrap();
        assert_eq!(operation.ended().await.state, OperationState::Cancelled);
        assert_eq!(w.fingerprint(), shown);
        // One that is ready is cancelled as well.
        begin(&w, to("second", "v2", true)).await.unwrap();
        until_ready(&w).await;
        end(&w, DiskCopyEnd::Cancel).await.unwrap();
        assert_eq!(w.fingerprint(), shown);
        // A stop does not wait for hours.
        let operation = begin(&w, slow()).await.unwrap();
        stop(&w).await.unwrap();
        assert_eq!(operation.ended().await.state, OperationState::Cancelled);
        assert!(w.engine.custom_volume(&w.admin, P, "second", "v2").is_err());
        assert_eq!(pool_of(&w).0, P);
        demand_clean(&w).await;
    });
}

#[test]
fn a_machine_that_ends_by_itself_keeps_its_disk() {
    SeededEnv::run(37, |env| async move {
        let w = world(&env, true).await;
        let operation = begin(&w, CopyDisk { speed: 1 << 20, ..to("second", "v2", true) }).await.unwrap();
        w.env.sleep(Duration::from_secs(2)).await;
        assert!(w.agent.crash_guest(w.engine.instance(&w.admin, P, "m").unwrap().instance.id));
        let ended = operation.ended().await;
        assert!(
            ended.error.as_ref().is_some_and(|e| e.message.contains("ended before")),
            "{:?}",
            ended.error
        );
        assert_eq!(pool_of(&w).0, P);
        demand_clean(&w).await;
    });
}

#[test]
fn an_answer_that_is_lost_does_not_lead_back() {
    for fault in ["after", "hang", "crash"] {
        SeededEnv::run(38, move |env| async move {
            let w = world(&env, false).await;
            let lost = || Error::unavailable("lost on its way");
            w.agent.inject(
                "machine_copy_end",
                match fault {
                    "after" => Fault::FailAfter(lost()),
                    "hang" => Fault::HangAfter,
                    _ => Fault::CrashAfter,
                },
            );
            for _ in 0..3 {
                w.agent.inject("machine_copy_state", Fault::FailBefore(lost()));
            }
            let request = MoveInstance { pool: Some("second".into()), ..Default::default() };
            done(&w, w.engine.instance_move(&w.admin, P, "m", request).await).await;
            assert_eq!(pool_of(&w), ("second".into(), "second".into()), "{fault}");
            assert_eq!(w.agent.faults_left(), 0, "{fault}");
            demand_clean(&w).await;
        });
    }
}

#[test]
fn a_host_that_is_away_for_a_while_is_waited_for() {
    SeededEnv::run(39, |env| async move {
        let w = world(&env, false).await;
        let request = MoveInstance { pool: Some("second".into()), ..Default::default() };
        let operation = w.engine.instance_move(&w.admin, P, "m", request).await.unwrap();
        w.env.sleep(Duration::from_millis(200)).await;
        w.agent.set_reachable(false);
        w.env.sleep(Duration::from_secs(60)).await;
        assert_eq!(operation.snapshot().state, OperationState::Running);
        w.agent.set_reachable(true);
        done(&w, Ok(operation)).await;
        assert_eq!(pool_of(&w).0, "second");
        demand_clean(&w).await;
    });
}

#[test]
fn a_copy_that_waits_for_a_word_outlives_the_engine() {
    SeededEnv::run(40, |env| async move {
        let mut w = world(&env, true).await;
        begin(&w, to("second", "v2", true)).await.unwrap();
        until_ready(&w).await;
        w.reopen().await.unwrap();
        until_ready(&w).await;
        end(&w, DiskCopyEnd::Pivot).await.unwrap();
        assert_eq!(pool_of(&w).0, "second");
        demand_clean(&w).await;
    });
}

#[test]
fn a_change_over_that_the_host_cannot_bring_to_its_end_counts() {
    SeededEnv::run(41, |env| async move {
        let w = world(&env, false).await;
        for _ in 0..100 {
            let full = Error::internal("the host's disk is full", "ENOSPC");
            w.agent.inject("machine_copy_end", Fault::FailAfter(full));
        }
        let request = MoveInstance { pool: Some("second".into()), ..Default::default() };
        done(&w, w.engine.instance_move(&w.admin, P, "m", request).await).await;
        assert!(w.agent.faults_left() < 50, "it was asked again and again");
        assert_eq!(pool_of(&w), ("second".into(), "second".into()));
        demand_clean(&w).await;
    });
}

#[test]
fn an_undo_follows_a_machine_that_goes_on_from_the_copy() {
    SeededEnv::run(42, |env| async move {
        let w = world(&env, false).await;
        let before = w.engine.instance(&w.admin, P, "m").unwrap().instance.clone();
        w.engine.set_hook(Some(Arc::new(|saga: &str, moment: Moment| match (saga, moment) {
            ("instance-disk-copy", Moment::AfterStep(2)) => {
                Interference::Fail(Error::unavailable("it is not known whether it does"))
            }
            _ => Interference::None,
        })));
        let request = MoveInstance { pool: Some("second".into()), ..Default::default() };
        let operation = w.engine.instance_move(&w.admin, P, "m", request).await.unwrap();
        assert_eq!(w.ended(operation).await.state, OperationState::Failure, "it says so, and needs nobody");
        w.engine.set_hook(None);
        assert_eq!(pool_of(&w), ("second".into(), "second".into()));
        let after = w.engine.instance(&w.admin, P, "m").unwrap().instance.clone();
        assert_ne!(after.root, before.root);
        // It starts from what it wrote to.
        stop(&w).await.unwrap();
        let start = PowerRequest { action: PowerAction::Start, force: false, timeout: None, stateful: false };
        done(&w, w.engine.instance_power(&w.admin, P, "m", start).await).await;
        demand_clean(&w).await;
    });
}

#[test]
fn a_shutdown_of_the_host_does_not_wait_for_a_word_and_keeps_the_memory() {
    SeededEnv::run(43, |env| async move {
        let w = World::new(&env).await.unwrap();
        let pool = CreatePool { name: "second".into(), driver: "dir".into(), ..Default::default() };
        done(&w, w.engine.pool_create(&w.admin, pool).await).await;
        let keys = [("boot.host_shutdown_action", "stateful-stop"), ("migration.stateful", "true")];
        let config: Config = keys.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let kind = InstanceKind::VirtualMachine;
        let create = CreateInstance { kind, config, start: true, ..container("m") };
        done(&w, w.engine.instance_create(&w.admin, P, create).await.map(|(_, o)| o)).await;
        let operation = begin(&w, to("second", "v2", true)).await.unwrap();
        until_ready(&w).await;
        let begun = w.env.monotonic();
        assert_eq!(w.engine.host_stop(&w.admin).await.unwrap(), Vec::<String>::new());
        let took = w.env.monotonic() - begun;
        assert!(took < Duration::from_secs(10), "{took:?}");
        assert_eq!(operation.ended().await.state, OperationState::Cancelled);
        let view = w.engine.instance(&w.admin, P, "m").unwrap();
        assert!(view.status == Status::Stopped && view.instance.stateful, "its memory is kept");
        demand_clean(&w).await;
    });
}

#[test]
fn a_stop_that_is_refused_ends_no_copy() {
    SeededEnv::run(44, |env| async move {
        let w = world(&env, true).await;
        begin(&w, to("second", "v2", true)).await.unwrap();
        until_ready(&w).await;
        let save = PowerRequest { action: PowerAction::Stop, force: false, timeout: None, stateful: true };
        let refused = w.engine.instance_power(&w.admin, P, "m", save).await.map(drop).unwrap_err();
        assert_eq!(refused.field.as_deref(), Some("stateful"), "{refused}");
        assert!(w.engine.disk_copy(&w.admin, P, "m").await.unwrap().is_some());
        end(&w, DiskCopyEnd::Cancel).await.unwrap();
        demand_clean(&w).await;
    });
}

#[test]
fn a_copy_that_waits_for_a_word_is_hardly_looked_at_and_hears_it_at_once() {
    SeededEnv::run(45, |env| async move {
        let w = world(&env, true).await;
        begin(&w, to("second", "v2", true)).await.unwrap();
        until_ready(&w).await;
        w.env.sleep(Duration::from_secs(5)).await;
        let asked = || ["guest_observe_all", "machine_copy_state"].map(|call| w.agent.count(call));
        let before = asked();
        w.env.sleep(Duration::from_secs(300)).await;
        let [looks, states] = std::array::from_fn(|n| asked()[n] - before[n]);
        assert!((5..=15).contains(&looks), "the host is looked at as ever: {looks}");
        assert!((100..=200).contains(&states), "{states}");
        let begun = w.env.monotonic();
        end(&w, DiskCopyEnd::Finish).await.unwrap();
        let took = w.env.monotonic() - begun;
        assert!(took < Duration::from_secs(1), "{took:?}");
        demand_clean(&w).await;
    });
}
