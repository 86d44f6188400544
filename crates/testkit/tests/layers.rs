//! Layers of disks of virtual machines, over a simulated host: what the records say of them, what is refused meanwhile, and what merges,
//! stops and an executor that is killed make of them.

use karst_agent::Fault;
use karst_engine::{
    LiveOperation,
    checkpoints::CreateCheckpoint,
    compute::{
        copy::CopyInstance,
        create::CreateInstance,
        disk_copy::merge::{LayerName, MergeDisk, MergeLayers, Work},
        power::PowerRequest,
        relocate::MoveInstance,
    },
    layers::create::{CreateLayers, NewLayer},
    saga::runner::{Interference, Moment},
    snapshots::{Origin, Taken, create::CreateSnapshot},
    storage::CreatePool,
    volumes::create::CreateVolume,
};
use karst_env::{Env, SeededEnv};
use karst_model::{
    Config, Error, ErrorKind, Result,
    device::Devices,
    guest::{DiskCopyEnd, DiskCopyPhase},
    instance::{InstanceKind, PowerAction},
    layer::MOST_BELOW,
    operation::OperationState,
    storage::VolumeContent,
};
use karst_testkit::{World, scenarios::container};
use std::{sync::Arc, time::Duration};

const P: &str = "default";
const OF_M: Origin<'_> = Origin::Instance { project: P, name: "m" };

async fn done(w: &World, operation: Result<LiveOperation>) {
    assert_eq!(w.ended(operation.unwrap()).await.error, None);
}

/// A machine `m` that runs, and a second pool.
async fn world(env: &SeededEnv) -> World {
    let w = World::new(env).await.unwrap();
    let pool = CreatePool { name: "second".into(), driver: "dir".into(), ..Default::default() };
    done(&w, w.engine.pool_create(&w.admin, pool).await).await;
    let create = CreateInstance { kind: InstanceKind::VirtualMachine, start: true, ..container("m") };
    done(&w, w.engine.instance_create(&w.admin, P, create).await.map(|(_, o)| o)).await;
    w
}

async fn layer(w: &World, snapshot: Option<&str>, name: Option<&str>) -> Result<LiveOperation> {
    let disks = name.map(|name| vec![NewLayer { device: "root".into(), name: Some(name.into()) }]);
    let request = CreateLayers { snapshot: snapshot.map(str::to_owned), disks, ..Default::default() };
    w.engine.layers_create(&w.admin, P, "m", request).await
}

async fn merge(w: &World, what: MergeLayers, hold: bool) -> Result<LiveOperation> {
    let request = MergeDisk { device: None, what, hold, speed: 0 };
    w.engine.layers_merge(&w.admin, P, "m", request).await
}

fn commit(top: Option<&str>, base: LayerName) -> MergeLayers {
    MergeLayers::Commit { top: top.map(str::to_owned), base }
}

fn names(w: &World) -> Vec<String> {
    let mut disks = w.engine.disk_layers(&w.admin, P, "m").unwrap();
    assert_eq!((disks.len(), disks[0].device.as_str(), disks[0].owned), (1, "root", true));
    disks.remove(0).layers.into_iter().map(|l| l.name).collect()
}

async fn stop(w: &World) {
    let request = PowerRequest { action: PowerAction::Stop, timeout: None, force: true, stateful: false };
    done(w, w.engine.instance_power(&w.admin, P, "m", request).await).await;
}

#[test]
fn disks_go_on_in_layers_which_the_records_name() {
    SeededEnv::run(41, |env| async move {
        let w = world(&env).await;
        done(&w, layer(&w, Some("s1"), None).await).await;
        done(&w, layer(&w, None, Some("of-mine")).await).await;
        assert_eq!(names(&w), ["instances/m.s1", "of-mine"]);
        let all = w.engine.snapshots(&w.admin, OF_M).unwrap();
        let Taken::Instance { snapshot } = &all[0] else { panic!("of an instance") };
        let external = snapshot.external.clone().unwrap();
        assert!(all.len() == 1 && external.running && snapshot.volumes.is_empty());
        let disk = &external.disks[0];
        assert_eq!(
            (disk.device.as_str(), disk.pool.as_str(), disk.layer.as_str()),
            ("root", P, "instances/m.s1")
        );

        // What is taken, or is no name, changes nothing.
        for (snapshot, name, kind, field) in [
            (Some("s1"), None, ErrorKind::Conflict, "name"),
            (Some("s2"), Some("of-mine"), ErrorKind::Conflict, "disks.root"),
            (None, Some("../x"), ErrorKind::Invalid, "disks.root"),
        ] {
            let e = layer(&w, snapshot, name).await.unwrap_err();
            assert!(e.is(kind) && e.field.as_deref() == Some(field), "{e:?}");
        }
        let no_disk = vec![NewLayer { device: "eth0".into(), name: None }];
        let request = CreateLayers { disks: Some(no_disk), ..Default::default() };
        let e = w.engine.layers_create(&w.admin, P, "m", request).await.unwrap_err();
        assert!(e.is(ErrorKind::Invalid), "{e}");
        assert_eq!(names(&w).len(), 2);

        // Over a stop and a start they are there, and of a machine that does not run they can be made.
        stop(&w).await;
        done(&w, layer(&w, None, None).await).await;
        assert_eq!(names(&w)[2], "instances/m.layer3");
        let start = PowerRequest { action: PowerAction::Start, timeout: None, force: false, stateful: false };
        done(&w, w.engine.instance_power(&w.admin, P, "m", start).await).await;
        let faults = w.faults().await;
        assert!(faults.is_empty(), "{faults:?}");
    });
}

#[test]
fn what_would_make_another_disk_is_refused_with_the_way_out() {
    SeededEnv::run(42, |env| async move {
        let w = world(&env).await;
        let taken = CreateSnapshot { name: Some("whole".into()), ..Default::default() };
        done(&w, w.engine.snapshot_create(&w.admin, OF_M, taken).await).await;
        done(&w, layer(&w, Some("s1"), None).await).await;
        let again = CreateSnapshot { name: Some("more".into()), ..Default::default() };
        let moved = MoveInstance { pool: Some("second".into()), ..Default::default() };
        let marked = CreateCheckpoint { name: "c".into(), ..Default::default() };
        let copied = CopyInstance {
            project: P.into(),
            name: "m".into(),
            snapshot: None,
            copy: CreateInstance { kind: InstanceKind::VirtualMachine, ..container("n") },
            instance_only: false,
            refresh: false,
            exclude_older: false,
        };
        let refused = [
            w.engine.snapshot_create(&w.admin, OF_M, again).await.err(),
            w.engine.instance_move(&w.admin, P, "m", moved).await.err(),
            w.engine.checkpoint_create(&w.admin, P, "m", marked).await.err(),
            w.engine.instance_copy(&w.admin, P, copied).await.err(),
        ];
        for e in refused {
            let e = e.unwrap();
            assert!(e.is(ErrorKind::Conflict) && e.message.contains("blockcommit"), "{e}");
        }
        done(&w, merge(&w, commit(None, LayerName::Lowest), false).await).await;
        assert!(names(&w).is_empty());
        let again = CreateSnapshot { name: Some("more".into()), ..Default::default() };
        done(&w, w.engine.snapshot_create(&w.admin, OF_M, again).await).await;

        // A moment is nothing to go back to, and its record goes by itself.
        stop(&w).await;
        let back = w.engine.snapshot_restore(&w.admin, OF_M, "s1").await.unwrap_err();
        assert!(back.is(ErrorKind::Unsupported), "{back}");
        let copied = CopyInstance {
            project: P.into(),
            name: "m".into(),
            snapshot: Some("s1".into()),
            copy: CreateInstance { kind: InstanceKind::VirtualMachine, ..container("n") },
            instance_only: false,
            refresh: false,
            exclude_older: false,
        };
        let e = w.engine.instance_copy(&w.admin, P, copied).await.err().unwrap();
        assert!(e.is(ErrorKind::Unsupported) && e.field.as_deref() == Some("source.source"), "{e}");
        done(&w, w.engine.snapshot_delete(&w.admin, OF_M, "s1").await).await;
        let faults = w.faults().await;
        assert!(faults.is_empty(), "{faults:?}");
    });
}

#[test]
fn a_machine_has_as_many_layers_as_its_host_opens() {
    SeededEnv::run(46, |env| async move {
        let w = World::new(&env).await.unwrap();
        let config = Config::from([("size".to_owned(), "1GiB".to_owned())]);
        let (name, content) = ("data".to_owned(), VolumeContent::Block);
        let volume = CreateVolume { name, content, description: String::new(), config };
        done(&w, w.engine.volume_create(&w.admin, P, P, volume).await).await;
        let keys = [("type", "disk"), ("pool", P), ("source", "data")];
        let keys: Config = keys.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let devices = Devices::from([("data".to_owned(), keys)]);
        let create = CreateInstance { kind: InstanceKind::VirtualMachine, devices, ..container("m") };
        done(&w, w.engine.instance_create(&w.admin, P, create).await.map(|(_, o)| o)).await;
        for _ in 0..MOST_BELOW / 2 {
            done(&w, layer(&w, None, None).await).await;
        }
        let e = layer(&w, None, None).await.unwrap_err();
        assert!(e.is(ErrorKind::Conflict) && e.message.contains("in all"), "{e}");
        assert!(e.field.is_some_and(|field| field.starts_with("disks.")));
        let disks = w.engine.disk_layers(&w.admin, P, "m").unwrap();
        assert_eq!(disks.iter().map(|d| d.layers.len()).sum::<usize>(), MOST_BELOW);
        let faults = w.faults().await;
        assert!(faults.is_empty(), "{faults:?}");
    });
}

#[test]
fn a_commit_of_the_active_layer_ends_by_a_word() {
    SeededEnv::run(43, |env| async move {
        let w = world(&env).await;
        for name in ["s1", "s2"] {
            done(&w, layer(&w, Some(name), None).await).await;
        }
        let hold = merge(&w, commit(Some("instances/m.s1"), LayerName::Lowest), true).await.unwrap_err();
        assert!(hold.is(ErrorKind::Invalid) && hold.field.as_deref() == Some("hold"), "{hold:?}");
        let wrong = merge(&w, commit(None, LayerName::Layer("nope".into())), false).await.unwrap_err();
        assert!(wrong.is(ErrorKind::NotFound) && wrong.message.contains("instances/m.s2"), "{wrong}");
        for how in [DiskCopyEnd::Finish, DiskCopyEnd::Cancel] {
            let operation = merge(&w, commit(None, LayerName::Lowest), true).await.unwrap();
            let ready = async || {
                let view = w.engine.disk_copy(&w.admin, P, "m").await.unwrap()?;
                assert_eq!(view.work, Some(Work::ActiveCommit));
                (view.state.phase == DiskCopyPhase::Ready).then_some(())
            };
            while ready().await.is_none() {
                w.env.sleep(Duration::from_millis(200)).await;
            }
            w.engine.disk_copy_end(&w.admin, P, "m", "root", how, true).await.unwrap();
            assert_eq!(w.ended(operation).await.state, OperationState::Cancelled);
            assert_eq!(names(&w), ["instances/m.s1", "instances/m.s2"], "{how:?}");
        }
        let operation =
            merge(&w, commit(None, LayerName::Layer("instances/m.s1".into())), true).await.unwrap();
        while w.engine.disk_copy_end(&w.admin, P, "m", "root", DiskCopyEnd::Pivot, true).await.is_err() {
            w.env.sleep(Duration::from_millis(200)).await;
        }
        assert_eq!(w.ended(operation).await.error, None);
        assert_eq!(names(&w), ["instances/m.s1"]);
        done(&w, merge(&w, MergeLayers::Pull { base: None }, false).await).await;
        assert!(names(&w).is_empty());
    });
}

#[test]
fn an_executor_that_is_killed_at_any_moment_of_a_merge_is_followed() {
    for moment in [Moment::AfterStep(1), Moment::AfterStep(2), Moment::Logged(2)] {
        SeededEnv::run(44, move |env| async move {
            let mut w = world(&env).await;
            for name in ["s1", "s2"] {
                done(&w, layer(&w, Some(name), None).await).await;
            }
            w.engine.set_hook(Some(Arc::new(move |name: &str, at: Moment| match name {
                "instance-disk-copy" if at == moment => Interference::Crash,
                _ => Interference::None,
            })));
            let id = merge(&w, commit(None, LayerName::Lowest), false).await.unwrap().id();
            w.env.sleep(Duration::from_secs(120)).await;
            w.reopen().await.unwrap();
            w.settle().await;
            assert_eq!(
                w.engine.operation(&w.admin, id).unwrap().state,
                OperationState::Success,
                "{moment:?}"
            );
            assert!(names(&w).is_empty(), "{moment:?}");
            let faults = w.faults().await;
            assert!(faults.is_empty(), "{moment:?}: {faults:?}");
        });
    }
}

#[test]
fn an_answer_that_is_lost_is_asked_for_again() {
    for call in ["machine_layers_add", "machine_merge_begin", "machine_merge_end"] {
        for hangs in [false, true] {
            SeededEnv::run(45, move |env| async move {
                let w = world(&env).await;
                done(&w, layer(&w, Some("s1"), None).await).await;
                let lost = Error::unavailable("lost on its way");
                w.agent.inject(call, if hangs { Fault::HangAfter } else { Fault::FailAfter(lost) });
                done(&w, layer(&w, Some("s2"), None).await).await;
                assert_eq!(names(&w), ["instances/m.s1", "instances/m.s2"], "{call}");
                let merged = merge(&w, commit(None, LayerName::Lowest), false).await.unwrap();
                let ended = w.ended(merged).await;
                // A begin of which nobody heard is taken back, an end of which nobody heard is an end.
                match call {
                    "machine_merge_begin" => {
                        assert!(ended.error.is_some(), "{call}");
                        assert_eq!(names(&w).len(), 2, "{call}");
                    }
                    _ => {
                        assert_eq!(ended.error, None, "{call}");
                        assert!(names(&w).is_empty(), "{call}");
                    }
                }
                assert_eq!(w.agent.faults_left(), 0, "{call}");
                let faults = w.faults().await;
                assert!(faults.is_empty(), "{call}: {faults:?}");
            });
        }
    }
}
