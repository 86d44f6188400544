//! Snapshots by the clock of the environment, and what does not fit together in one.

use karst_agent::Fault;
use karst_engine::{
    compute::{create::CreateInstance, update::UpdateInstance},
    snapshots::{Origin, Taken, change::UpdateSnapshot, create::CreateSnapshot},
    volumes::create::CreateVolume,
};
use karst_env::{Env, SeededEnv};
use karst_model::{Config, ErrorKind, device::Devices, instance::InstanceKind, storage::VolumeContent};
use karst_testkit::{World, scenarios::container};
use std::time::Duration;

const HOUR: Duration = Duration::from_secs(3600);
const MINUTE: Duration = Duration::from_secs(60);

fn names(w: &World, name: &str) -> Vec<String> {
    names_of(w, Origin::Instance { project: "default", name })
}

fn names_of(w: &World, of: Origin<'_>) -> Vec<String> {
    let name = |s: &Taken| match s {
        Taken::Instance { snapshot } => snapshot.name.to_string(),
        Taken::Volume { snapshot } => snapshot.name.to_string(),
    };
    w.engine.snapshots(&w.admin, of).unwrap().iter().map(name).collect()
}

#[test]
fn scheduled_snapshots_come_and_go() {
    let env = SeededEnv::new(5);
    env.clone().block_on(async move {
        let w = World::new(&env).await.unwrap();
        let config = |stopped: &str| {
            let keys = [
                ("snapshots.schedule", "0 * * * *"),
                ("snapshots.expiry", "2H 30M"),
                ("snapshots.pattern", "auto%d"),
                ("snapshots.schedule.stopped", stopped),
            ];
            Config::from(keys.map(|(k, v)| (k.to_owned(), v.to_owned())))
        };
        for (name, stopped, start) in
            [("runs", "false", true), ("rests", "false", false), ("kept", "true", false)]
        {
            let request = CreateInstance { config: config(stopped), start, ..container(name) };
            assert_eq!(request.kind, InstanceKind::Container);
            let (_, operation) = w.engine.instance_create(&w.admin, "default", request).await.unwrap();
            assert_eq!(w.ended(operation).await.error, None);
        }
        env.sleep(HOUR).await;
        assert_eq!(names(&w, "runs"), ["auto0"]);
        assert_eq!(names(&w, "rests"), [""; 0], "it is stopped");
        assert_eq!(names(&w, "kept"), ["auto0"], "its schedule says that this does not matter");
        env.sleep(HOUR * 4).await;
        // Five were taken; after two and a half hours each went.
        let left = names(&w, "runs");
        assert!(left.len() == 2 || left.len() == 3, "{left:?}");
        assert_eq!(left.last().map(String::as_str), Some("auto4"));
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}

/// What is slow holds up its own project at most: the others are served, and what has expired goes.
#[test]
fn nobody_waits_for_the_snapshots_of_others() {
    SeededEnv::run(6, |env| async move {
        let w = World::new(&env).await.unwrap();
        let shares = Config::from([("features.profiles".to_owned(), "false".to_owned())]);
        w.engine.project_create(&w.admin, "other", "", shares).await.unwrap();
        let keys = [("snapshots.schedule", "0 * * * *"), ("snapshots.schedule.stopped", "true")];
        let config = Config::from(keys.map(|(k, v)| (k.to_owned(), v.to_owned())));
        let all = [("default", "a"), ("default", "b"), ("default", "c"), ("other", "d")];
        for (project, name) in all {
            let request = CreateInstance { config: config.clone(), ..container(name) };
            let (_, operation) = w.engine.instance_create(&w.admin, project, request).await.unwrap();
            assert_eq!(w.ended(operation).await.error, None);
        }
        let (_, operation) =
            w.engine.instance_create(&w.admin, "default", container("expires")).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        // Ten minutes after the next full hour it goes.
        let hour = Duration::from_secs(3600 - u64::try_from(env.now().as_second()).unwrap() % 3600);
        let over = env.now() + hour + MINUTE * 10;
        let of = Origin::Instance { project: "default", name: "expires" };
        let request = CreateSnapshot { expires_at: Some(Some(over)), ..CreateSnapshot::default() };
        let taken = w.engine.snapshot_create(&w.admin, of, request).await.unwrap();
        assert_eq!(w.ended(taken).await.error, None);
        w.agent.inject("volume_snapshot_create", Fault::Delay(MINUTE * 25));
        env.sleep(hour + MINUTE).await;
        let taken = |project: &str, name: &str| {
            w.engine.snapshots(&w.admin, Origin::Instance { project, name }).unwrap().len()
        };
        let done = || all.iter().filter(|(project, name)| taken(project, name) == 1).count();
        assert_eq!((done(), taken("default", "expires")), (3, 1), "one of them takes long");
        env.sleep(MINUTE * 14).await;
        assert_eq!((done(), taken("default", "expires")), (3, 0), "what has expired goes meanwhile");
        env.sleep(MINUTE * 20).await;
        assert_eq!(done(), 4);
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}

#[test]
fn memory_is_not_kept_beside_a_disk_that_the_snapshot_does_not_hold() {
    SeededEnv::run(6, |env| async move {
        let w = World::new(&env).await.unwrap();
        let size = Config::from([("size".into(), "64MiB".into())]);
        let volume = CreateVolume {
            name: "data".into(),
            content: VolumeContent::Block,
            description: String::new(),
            config: size,
        };
        let operation = w.engine.volume_create(&w.admin, "default", "default", volume).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        for (name, readonly) in [("writes", "false"), ("reads", "true")] {
            let disk = [("type", "disk"), ("pool", "default"), ("source", "data"), ("readonly", readonly)];
            let disk = disk.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
            let request = CreateInstance {
                kind: InstanceKind::VirtualMachine,
                start: true,
                config: Config::from([("migration.stateful".into(), "true".into())]),
                devices: Devices::from([("data".into(), disk)]),
                ..container(name)
            };
            let (_, operation) = w.engine.instance_create(&w.admin, "default", request).await.unwrap();
            assert_eq!(w.ended(operation).await.error, None);
            let of = Origin::Instance { project: "default", name };
            let with = |stateful: bool| CreateSnapshot { stateful, ..CreateSnapshot::default() };
            let taken = w.engine.snapshot_create(&w.admin, of, with(true)).await;
            if readonly == "true" {
                assert_eq!(w.ended(taken.unwrap()).await.error, None);
            } else {
                let refused = taken.err().unwrap();
                assert!(
                    refused.kind == ErrorKind::Conflict && refused.message.contains("\"data\""),
                    "{refused}"
                );
                assert_eq!(names(&w, name), [""; 0]);
                let operation = w.engine.snapshot_create(&w.admin, of, with(false)).await.unwrap();
                assert_eq!(w.ended(operation).await.error, None);
            }
            assert_eq!(names(&w, name), ["snap0"]);
            // It lets go of the disk for the next one.
            let stop = karst_engine::compute::power::PowerRequest {
                action: karst_model::instance::PowerAction::Stop,
                force: true,
                timeout: None,
                stateful: false,
            };
            let operation = w.engine.instance_power(&w.admin, "default", name, stop).await.unwrap();
            assert_eq!(w.ended(operation).await.error, None);
            let operation = w.engine.instance_delete(&w.admin, "default", name).await.unwrap();
            assert_eq!(w.ended(operation).await.error, None);
        }
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}

/// What waits to go is looked at again before it goes: its user may want to keep it by now.
#[test]
fn a_snapshot_that_is_kept_longer_while_it_waits_stays() {
    SeededEnv::run(7, |env| async move {
        let w = World::new(&env).await.unwrap();
        let keys = [("snapshots.schedule", "0 * * * *"), ("snapshots.schedule.stopped", "true")];
        let config = Config::from(keys.map(|(k, v)| (k.to_owned(), v.to_owned())));
        let request = CreateInstance { config, ..container("a") };
        let (_, operation) = w.engine.instance_create(&w.admin, "default", request).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        let hour = Duration::from_secs(3600 - u64::try_from(env.now().as_second()).unwrap() % 3600);
        let over = env.now() + hour + MINUTE * 2;
        let of = Origin::Instance { project: "default", name: "a" };
        for name in ["kept", "gone"] {
            let request = CreateSnapshot {
                name: Some(name.into()),
                expires_at: Some(Some(over)),
                ..CreateSnapshot::default()
            };
            let taken = w.engine.snapshot_create(&w.admin, of, request).await.unwrap();
            assert_eq!(w.ended(taken).await.error, None);
        }
        // The one of the hour takes long, and both wait behind it.
        w.agent.inject("volume_snapshot_create", Fault::Delay(MINUTE * 25));
        env.sleep(hour + MINUTE * 5).await;
        let mut waiting = names(&w, "a");
        waiting.sort();
        assert_eq!(waiting, ["gone", "kept"], "they wait");
        w.engine.snapshot_update(&w.admin, of, "kept", UpdateSnapshot::default()).await.unwrap();
        env.sleep(MINUTE * 40).await;
        let left = names(&w, "a");
        let has = |name: &str| left.iter().any(|n| n == name);
        assert!(left.len() == 2 && has("kept") && !has("gone"), "{left:?}");
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}

/// Of instances and volumes: the schedule's own go, oldest first, when it has taken one; those of users stay, by whatever name.
#[test]
fn beyond_their_number_those_of_the_schedule_go() {
    SeededEnv::run(8, |env| async move {
        let w = World::new(&env).await.unwrap();
        // From five minutes after a full hour on, so that whole hours end between two of the schedule's.
        let hour = Duration::from_secs(3600 - u64::try_from(env.now().as_second()).unwrap() % 3600);
        env.sleep(hour + MINUTE * 5).await;
        let config = |keep: &str| {
            let keys = [
                ("snapshots.schedule", "0 * * * *"),
                ("snapshots.schedule.stopped", "true"),
                ("snapshots.pattern", "auto%d"),
                ("snapshots.keep", keep),
            ];
            Config::from(keys.map(|(k, v)| (k.to_owned(), v.to_owned())))
        };
        let request = CreateInstance { config: config("2"), ..container("a") };
        let (_, operation) = w.engine.instance_create(&w.admin, "default", request).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        let mut of_volume = config("2");
        of_volume.remove("snapshots.schedule.stopped");
        of_volume.insert("size".into(), "64MiB".into());
        let volume = CreateVolume {
            name: "data".into(),
            content: VolumeContent::Block,
            description: String::new(),
            config: of_volume,
        };
        let operation = w.engine.volume_create(&w.admin, "default", "default", volume).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        let instance = Origin::Instance { project: "default", name: "a" };
        let volume = Origin::Volume { project: "default", pool: "default", name: "data" };
        for of in [instance, volume] {
            // By hand, with a name as the schedule gives them.
            let request = CreateSnapshot { name: Some("auto0".into()), ..CreateSnapshot::default() };
            let taken = w.engine.snapshot_create(&w.admin, of, request).await.unwrap();
            assert_eq!(w.ended(taken).await.error, None);
        }
        env.sleep(HOUR * 2).await;
        for of in [instance, volume] {
            assert_eq!(names_of(&w, of), ["auto0", "auto1", "auto2"]);
        }
        env.sleep(HOUR * 2).await;
        for of in [instance, volume] {
            assert_eq!(names_of(&w, of), ["auto0", "auto3", "auto4"]);
            // Whose name or end its user gave it is his own.
            w.engine.snapshot_rename(&w.admin, of, "auto3", "mine").await.unwrap();
            let end = UpdateSnapshot { expires_at: Some(env.now() + HOUR * 1000), ..Default::default() };
            w.engine.snapshot_update(&w.admin, of, "auto4", end).await.unwrap();
        }
        env.sleep(HOUR * 3).await;
        for of in [instance, volume] {
            assert_eq!(names_of(&w, of), ["auto0", "mine", "auto4", "auto6", "auto7"]);
        }
        // Another number holds from the next one on; without any they all stay.
        let change = async |config: Config| {
            let records = w.engine.instance(&w.admin, "default", "a").unwrap();
            let request = UpdateInstance {
                description: String::new(),
                ephemeral: false,
                config,
                devices: records.instance.devices.clone(),
                profiles: vec!["default".into()],
                if_version: None,
            };
            let operation = w.engine.instance_update(&w.admin, "default", "a", request).await.unwrap();
            assert_eq!(w.ended(operation).await.error, None);
        };
        change(config("1")).await;
        env.sleep(MINUTE * 5).await;
        assert_eq!(names(&w, "a"), ["auto0", "mine", "auto4", "auto6", "auto7"]);
        env.sleep(MINUTE * 55).await;
        assert_eq!(names(&w, "a"), ["auto0", "mine", "auto4", "auto8"]);
        change(config("")).await;
        env.sleep(HOUR * 2).await;
        assert_eq!(names(&w, "a"), ["auto0", "mine", "auto4", "auto8", "auto9", "auto10"]);
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}
