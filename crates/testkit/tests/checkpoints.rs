//! Checkpoints and backups of disks over a simulated host: what the records say, what is refused beside them, and what a stop, a lost
//! answer or a host that starts anew makes of a backup.

use karst_agent::{BackupListen, Fault};
use karst_engine::{
    LiveOperation,
    checkpoints::{
        CreateCheckpoint,
        backup::{self, BackupDisk, BackupTarget, BeginBackup, Since},
    },
    compute::{
        create::CreateInstance,
        disk_copy::{CopyDisk, CopyTarget},
        power::PowerRequest,
        update::UpdateInstance,
    },
    snapshots::{Origin, create::CreateSnapshot},
    storage::CreatePool,
    volumes::create::CreateVolume,
};
use karst_env::{Env, SeededEnv};
use karst_model::{
    Config, Error, ErrorKind, Result,
    access::Permission,
    guest::DiskBackupPhase,
    instance::{InstanceKind, PowerAction, Status},
    operation::OperationState,
    storage::VolumeContent,
};
use karst_testkit::{World, scenarios::container};
use std::time::Duration;

const P: &str = "default";

async fn done(w: &World, operation: Result<LiveOperation>) {
    assert_eq!(w.ended(operation.unwrap()).await.error, None);
}

/// The error that it is refused or fails with.
async fn refused(w: &World, operation: Result<LiveOperation>) -> Error {
    match operation {
        Err(e) => e,
        Ok(operation) => w.ended(operation).await.error.clone().expect("it fails"),
    }
}

/// A second pool, and a machine `m` that runs on a disk of an image.
async fn world(env: &SeededEnv) -> World {
    let w = World::new(env).await.unwrap();
    let pool = CreatePool { name: "second".into(), driver: "dir".into(), ..Default::default() };
    done(&w, w.engine.pool_create(&w.admin, pool).await).await;
    let create = CreateInstance { kind: InstanceKind::VirtualMachine, start: true, ..container("m") };
    done(&w, w.engine.instance_create(&w.admin, P, create).await.map(|(_, o)| o)).await;
    w
}

fn named(name: &str) -> CreateCheckpoint {
    CreateCheckpoint { name: name.into(), ..Default::default() }
}

async fn mark(w: &World, name: &str) -> Result<LiveOperation> {
    w.engine.checkpoint_create(&w.admin, P, "m", named(name)).await
}

/// Names of checkpoints, each with its parent's.
fn line(w: &World) -> Vec<(String, Option<String>)> {
    let all = w.engine.checkpoints(&w.admin, P, "m").unwrap();
    let name = |id| all.iter().find(|c| c.id == id).map(|c| c.name.to_string());
    all.iter().map(|c| (c.name.to_string(), c.parent.and_then(name))).collect()
}

async fn marks(w: &World) -> usize {
    w.engine.checkpoint_marks(&w.admin, P, "m").await.unwrap().len()
}

fn to(name: &str, new: bool, since: Since, checkpoint: Option<&str>) -> BeginBackup {
    let target = Some(BackupTarget { pool: "second".into(), name: name.into(), new });
    let disk = BackupDisk {
        device: "root".into(),
        since,
        target,
        export: "vda".into(),
        bitmap: "backup-vda".into(),
    };
    BeginBackup { disks: vec![disk], checkpoint: checkpoint.map(named), listen: None, limit: None }
}

fn read(since: Since, checkpoint: Option<&str>) -> BeginBackup {
    let mut request = to("", true, since, checkpoint);
    request.disks[0].target = None;
    BeginBackup { listen: Some(BackupListen::Unix), ..request }
}

async fn begin(w: &World, request: BeginBackup) -> Result<LiveOperation> {
    let operation = w.engine.disk_backup_begin(&w.admin, P, "m", request).await?;
    backup::begun(&w.engine, &operation).await?;
    Ok(operation)
}

async fn stop(w: &World) {
    let request = PowerRequest { action: PowerAction::Stop, force: true, timeout: None, stateful: false };
    done(w, w.engine.instance_power(&w.admin, P, "m", request).await).await;
}

async fn demand_clean(w: &World) {
    w.settle().await;
    assert_eq!(w.faults().await, Vec::<String>::new());
}

#[test]
fn checkpoints_are_a_line_and_what_one_has_goes_to_the_one_before() {
    SeededEnv::run(51, |env| async move {
        let w = world(&env).await;
        for name in ["a", "b", "c"] {
            done(&w, mark(&w, name).await).await;
        }
        let of = |name: &str, parent: Option<&str>| (name.to_owned(), parent.map(str::to_owned));
        assert_eq!(line(&w), [of("a", None), of("b", Some("a")), of("c", Some("b"))]);
        assert_eq!(marks(&w).await, 3);
        let e = refused(&w, mark(&w, "b").await).await;
        assert!(e.is(ErrorKind::Conflict) && e.field.as_deref() == Some("name"), "{e:?}");
        let e = refused(&w, mark(&w, "no/name").await).await;
        assert!(e.is(ErrorKind::Invalid) && e.field.as_deref() == Some("name"), "{e:?}");
        let unknown = CreateCheckpoint { disks: Some(vec!["nope".into()]), ..named("d") };
        let e = w.engine.checkpoint_create(&w.admin, P, "m", unknown).await.map(drop).unwrap_err();
        assert!(e.is(ErrorKind::Invalid) && e.message.contains("nope"), "{e}");

        w.engine.checkpoint_describe(&w.admin, P, "m", "b", "before the upgrade").await.unwrap();
        assert_eq!(w.engine.checkpoints(&w.admin, P, "m").unwrap()[1].note, "before the upgrade");
        done(&w, w.engine.checkpoint_delete(&w.admin, P, "m", "b").await).await;
        assert_eq!(line(&w), [of("a", None), of("c", Some("a"))]);
        assert_eq!(marks(&w).await, 2);
        // The name is free again.
        done(&w, mark(&w, "b").await).await;
        assert_eq!(line(&w)[2], of("b", Some("c")));

        // Without QEMU nothing is merged.
        stop(&w).await;
        let e = refused(&w, w.engine.checkpoint_delete(&w.admin, P, "m", "c").await).await;
        assert!(e.is(ErrorKind::Conflict) && e.message.contains("start it first"), "{e}");
        let e = refused(&w, mark(&w, "d").await).await;
        assert!(e.is(ErrorKind::Conflict) && e.message.contains("not running"), "{e}");
        done(&w, w.engine.checkpoint_delete(&w.admin, P, "m", "a").await).await;
        assert_eq!(line(&w), [of("c", None), of("b", Some("c"))]);

        // They go with their instance.
        done(&w, w.engine.instance_delete(&w.admin, P, "m").await).await;
        assert!(w.engine.inner().inventory.read().checkpoints.is_empty());
        demand_clean(&w).await;
    });
}

#[test]
fn what_would_make_another_disk_is_refused_and_names_the_checkpoint() {
    SeededEnv::run(52, |env| async move {
        let w = world(&env).await;
        let of = Origin::Instance { project: P, name: "m" };
        let snapshot = CreateSnapshot { name: Some("s".into()), ..Default::default() };
        done(&w, w.engine.snapshot_create(&w.admin, of, snapshot).await).await;
        done(&w, mark(&w, "first").await).await;
        let copy = CopyTarget::Pool("second".into());
        let copy = CopyDisk { device: None, to: copy, hold: true, speed: 0, synchronous: false };
        let e = refused(&w, w.engine.disk_copy_begin(&w.admin, P, "m", copy).await).await;
        assert!(e.is(ErrorKind::Conflict) && e.message.contains("\"first\""), "{e}");
        stop(&w).await;
        let restored = refused(&w, w.engine.snapshot_restore(&w.admin, of, "s").await).await;
        let mut grown = w.engine.instance(&w.admin, P, "m").unwrap().expanded_devices["root"].clone();
        grown.insert("size".into(), "50GiB".into());
        let update = UpdateInstance {
            description: String::new(),
            ephemeral: false,
            config: w.engine.instance(&w.admin, P, "m").unwrap().instance.config.clone(),
            devices: [("root".to_owned(), grown)].into(),
            profiles: vec!["default".into()],
            if_version: None,
        };
        let resized = refused(&w, w.engine.instance_update(&w.admin, P, "m", update).await).await;
        let moved = karst_engine::compute::relocate::MoveInstance {
            pool: Some("second".into()),
            ..Default::default()
        };
        let moved = refused(&w, w.engine.instance_move(&w.admin, P, "m", moved).await).await;
        for e in [restored, resized, moved] {
            assert!(e.is(ErrorKind::Conflict) && e.message.contains("checkpoint \"first\""), "{e}");
        }
        // What leaves the disk as it is does not mind: a new name, and a copy, which has none of them.
        w.engine.instance_rename(&w.admin, P, "m", "n").await.map(drop).unwrap();
        w.settle().await;
        assert_eq!(w.engine.checkpoints(&w.admin, P, "n").unwrap().len(), 1);
        done(&w, w.engine.checkpoint_delete(&w.admin, P, "n", "first").await).await;
        let of = Origin::Instance { project: P, name: "n" };
        done(&w, w.engine.snapshot_restore(&w.admin, of, "s").await).await;
        demand_clean(&w).await;
    });
}

#[test]
fn a_backup_is_a_volume_and_the_next_one_goes_over_it() {
    SeededEnv::run(53, |env| async move {
        let w = world(&env).await;
        let operation = begin(&w, to("b", true, Since::Whole, Some("c1"))).await.unwrap();
        let view = w.engine.disk_backup(&w.admin, P, "m").await.unwrap().unwrap();
        assert_eq!((view.operation, view.state.phase), (operation.id(), DiskBackupPhase::Running));
        assert_eq!(view.disks[0].target, Some(("second".into(), "b".into())));
        assert_eq!(line(&w), [("c1".to_owned(), None)]);
        // One at a time, and nothing else.
        let e = refused(&w, mark(&w, "c2").await).await;
        assert!(e.is(ErrorKind::Conflict) && e.message.contains("busy"), "{e}");
        assert_eq!(w.ended(operation).await.error, None);
        assert!(w.engine.disk_backup(&w.admin, P, "m").await.unwrap().is_none());
        let size = |name: &str| w.engine.custom_volume(&w.admin, P, "second", name).unwrap().size;
        assert!(size("b").is_some());

        let since = || Since::Checkpoint("c1".into());
        let e = refused(&w, begin(&w, to("c", true, since(), None)).await).await;
        assert!(e.is(ErrorKind::Unsupported) && e.field.as_deref() == Some("target"), "{e:?}");
        let e = refused(&w, begin(&w, to("b", true, Since::Whole, None)).await).await;
        assert!(e.is(ErrorKind::Conflict), "it is there: {e}");
        let e = refused(&w, begin(&w, to("nope", false, since(), None)).await).await;
        assert!(e.is(ErrorKind::NotFound), "{e}");
        let e = refused(&w, begin(&w, to("b", false, Since::Checkpoint("c9".into()), None)).await).await;
        assert!(e.is(ErrorKind::NotFound) && e.field.as_deref() == Some("incremental"), "{e:?}");
        let afar = BackupListen::Tcp { address: "0.0.0.0:10809".parse().unwrap() };
        let e = refused(&w, begin(&w, BeginBackup { listen: Some(afar), ..read(since(), None) }).await).await;
        assert!(e.is(ErrorKind::Forbidden) && e.field.as_deref() == Some("server.name"), "{e:?}");
        let mut twice = read(Since::Whole, None);
        twice.disks.push(twice.disks[0].clone());
        assert_eq!(refused(&w, begin(&w, twice.clone()).await).await.field.as_deref(), Some("disks"));
        twice.disks[1].export = "other".into();
        let e = refused(&w, begin(&w, twice).await).await;
        assert!(e.is(ErrorKind::Invalid) && e.message.contains("\"root\" is there twice"), "{e}");
        let port = BackupListen::Tcp { address: "127.0.0.1:22".parse().unwrap() };
        let e = refused(&w, begin(&w, BeginBackup { listen: Some(port), ..read(Since::Whole, None) }).await)
            .await;
        assert!(e.is(ErrorKind::Forbidden) && e.field.as_deref() == Some("server.port"), "{e:?}");
        let mut odd = read(Since::Whole, None);
        odd.disks[0].bitmap = "karst-x".into();
        assert_eq!(refused(&w, begin(&w, odd).await).await.field.as_deref(), Some("exportbitmap"));

        let next = begin(&w, to("b", false, since(), Some("c2"))).await.unwrap();
        assert_eq!(w.ended(next).await.error, None);
        assert_eq!(line(&w).len(), 2);
        demand_clean(&w).await;
    });
}

#[test]
fn one_that_others_read_is_there_until_it_is_said_or_the_machine_stops() {
    SeededEnv::run(54, |env| async move {
        let w = world(&env).await;
        done(&w, mark(&w, "c1").await).await;
        let since = || Since::Checkpoint("c1".into());
        let operation = begin(&w, read(since(), Some("c2"))).await.unwrap();
        w.env.sleep(Duration::from_secs(300)).await;
        let view = w.engine.disk_backup(&w.admin, P, "m").await.unwrap().unwrap();
        assert_eq!(view.state.phase, DiskBackupPhase::Running);
        assert!(view.state.socket.is_some() && view.listen == Some(BackupListen::Unix));
        assert_eq!(view.disks[0].since.as_deref(), Some("c1"));
        w.engine.disk_backup_end(&w.admin, P, "m").await.unwrap();
        assert_eq!(operation.ended().await.state, OperationState::Success);
        assert_eq!(line(&w).len(), 2, "its checkpoint stays");
        demand_clean(&w).await;

        // It does not keep the machine from being stopped, and leaves no checkpoint then.
        let operation = begin(&w, read(since(), Some("c3"))).await.unwrap();
        stop(&w).await;
        assert_eq!(operation.ended().await.state, OperationState::Cancelled);
        assert_eq!(w.engine.instance(&w.admin, P, "m").unwrap().status, Status::Stopped);
        assert_eq!(line(&w).len(), 2);
        let e = w.engine.disk_backup_end(&w.admin, P, "m").await.unwrap_err();
        assert!(e.is(ErrorKind::Conflict), "{e}");
        demand_clean(&w).await;
    });
}

#[test]
fn what_fails_leaves_neither_volume_nor_checkpoint() {
    SeededEnv::run(55, |env| async move {
        let w = world(&env).await;
        let lost = || Error::internal("it broke", "");
        w.agent.inject("machine_backup_begin", Fault::FailAfter(lost()));
        let e = refused(&w, begin(&w, to("b", true, Since::Whole, Some("c1"))).await).await;
        assert!(e.message.contains("it broke"), "{e}");
        w.settle().await;
        assert!(line(&w).is_empty() && marks(&w).await == 0);
        assert!(w.engine.custom_volume(&w.admin, P, "second", "b").is_err());
        demand_clean(&w).await;

        // Broken off by whoever began it.
        let operation = begin(&w, to("b", true, Since::Whole, Some("c1"))).await.unwrap();
        w.engine.disk_backup_end(&w.admin, P, "m").await.unwrap();
        assert_eq!(operation.ended().await.state, OperationState::Cancelled);
        assert!(line(&w).is_empty() && marks(&w).await == 0);
        demand_clean(&w).await;

        // A host that does not answer for a while is asked again.
        let operation = begin(&w, to("b", true, Since::Whole, None)).await.unwrap();
        for _ in 0..3 {
            w.agent
                .inject("machine_backup_state", Fault::FailBefore(Error::unavailable("gone for a moment")));
        }
        assert_eq!(w.ended(operation).await.error, None);
        demand_clean(&w).await;
    });
}

#[test]
fn volumes_of_several_disks_are_within_the_limits_of_their_project_together() {
    SeededEnv::run(56, |env| async move {
        let w = World::new(&env).await.unwrap();
        let volume = CreateVolume {
            name: "data".into(),
            content: VolumeContent::Block,
            description: String::new(),
            config: [("size".to_owned(), "1GiB".to_owned())].into(),
        };
        done(&w, w.engine.volume_create(&w.admin, P, "default", volume).await).await;
        let data = [("type", "disk"), ("pool", "default"), ("source", "data")];
        let data: Config = data.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let create = CreateInstance {
            kind: InstanceKind::VirtualMachine,
            start: true,
            devices: [("data".to_owned(), data)].into(),
            ..container("m")
        };
        done(&w, w.engine.instance_create(&w.admin, P, create).await.map(|(_, o)| o)).await;

        let root = w.engine.instance(&w.admin, P, "m").unwrap().instance.root;
        let root = w.engine.inner().inventory.read().volumes[&root].size.unwrap().bytes();
        let state = w.engine.project_state(&w.admin, P).unwrap();
        let used = state.iter().find(|(name, ..)| name == "disk").unwrap().2;
        let limit = async |bytes: u64| {
            let mut config = w.engine.project(&w.admin, P, Permission::ProjectView).unwrap().config.clone();
            config.insert("limits.disk".into(), bytes.to_string());
            w.engine.project_update(&w.admin, P, "", config, None).await.unwrap();
        };
        let disk = |device: &str, name: &str| {
            let target = Some(BackupTarget { pool: "default".into(), name: name.into(), new: true });
            BackupDisk {
                device: device.into(),
                target,
                export: device.into(),
                ..to("", true, Since::Whole, None).disks.remove(0)
            }
        };
        let both = || BeginBackup {
            disks: vec![disk("root", "a"), disk("data", "b")],
            ..to("", true, Since::Whole, None)
        };
        // Either of them would be.
        limit(used + root + (1 << 30) - 1).await;
        let e = refused(&w, begin(&w, both()).await).await;
        assert!(e.is(ErrorKind::Quota) && e.message.contains("limits.disk"), "{e}");
        assert!(w.engine.custom_volume(&w.admin, P, "default", "a").is_err());
        limit(used + root + (1 << 30)).await;
        let operation = begin(&w, both()).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        demand_clean(&w).await;
    });
}
