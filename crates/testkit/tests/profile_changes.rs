//! Changes of profiles where they are most likely to go wrong: an executor that dies in the middle, users with much of their own,
//! more users than one transaction can ask of, and what a profile said when a snapshot was taken.

use karst_agent::Fault;
use karst_engine::{
    LiveOperation,
    compute::create::CreateInstance,
    saga::runner::{Interference, Moment},
    snapshots::{Origin, create::CreateSnapshot},
    storage::CreatePool,
    tenancy::UpdateProfile,
    volumes::create::CreateVolume,
};
use karst_env::{Env, SeededEnv};
use karst_model::{
    Config, Error, ErrorKind, Result, device::Devices, instance::InstanceKind, storage::VolumeContent,
};
use karst_testkit::{World, scenarios::container};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

const P: &str = "default";

fn config(pairs: &[(&str, &str)]) -> Config {
    pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
}

async fn ended(w: &World, operation: Result<LiveOperation>) -> Result<()> {
    w.ended(operation?).await.error.clone().map_or(Ok(()), Err)
}

async fn create(w: &World, project: &str, request: CreateInstance) -> Result<()> {
    let made = w.engine.instance_create(&w.admin, project, request).await;
    ended(w, made.map(|(_, operation)| operation)).await
}

async fn volume(w: &World, project: &str, name: &str, size: &str) -> Result<()> {
    let config = config(&[("size", size)]);
    let request =
        CreateVolume { name: name.into(), content: VolumeContent::Block, description: String::new(), config };
    ended(w, w.engine.volume_create(&w.admin, project, P, request).await).await
}

fn profile(w: &World, project: &str) -> UpdateProfile {
    let row = w.engine.profile(&w.admin, project, "default").unwrap();
    UpdateProfile { config: row.config.clone(), devices: row.devices.clone(), ..Default::default() }
}

/// Whenever the executor dies: in the end each guest has the address that its record says, and the host knows it by.
#[test]
fn a_crash_leaves_no_user_with_another_address_than_it_is_known_by() {
    const MAC: &str = "10:66:6a:00:00:77";
    let steps = 0..3;
    let moments = steps.flat_map(|step| [Moment::BeforeStep(step), Moment::AfterStep(step)]);
    for moment in moments.chain([Moment::Logged(0), Moment::Logged(1)]) {
        SeededEnv::run(7, |env| async move {
            let mut w = World::new(&env).await.unwrap();
            create(&w, P, CreateInstance { start: true, ..container("c1") }).await.unwrap();
            let id = w.engine.instance(&w.admin, P, "c1").unwrap().instance.id;
            let network = w.engine.network(&w.admin, P, "karstbr0").unwrap().id;
            let landed = Arc::new(AtomicBool::new(false));
            let flag = landed.clone();
            w.engine.set_hook(Some(Arc::new(move |name: &str, now: Moment| {
                let here = name == "profile-update" && now == moment;
                match here && !flag.swap(true, Ordering::SeqCst) {
                    true => Interference::Crash,
                    false => Interference::None,
                }
            })));
            let mut update = profile(&w, P);
            update.devices.get_mut("eth0").unwrap().insert("hwaddr".into(), MAC.into());
            w.engine.profile_update_begin(&w.admin, P, "default", update).await.unwrap();
            env.sleep(Duration::from_secs(60)).await;
            assert!(landed.load(Ordering::SeqCst), "{moment:?}: it did not land");
            w.reopen().await.unwrap();
            w.settle().await;
            let said = w.engine.instance(&w.admin, P, "c1").unwrap();
            assert_eq!(said.expanded_devices["eth0"]["hwaddr"], MAC, "{moment:?}");
            assert_eq!(said.instance.identities["eth0"].mac.as_deref(), Some(MAC), "{moment:?}");
            let has: Vec<_> = w.agent.guest_spec(id).unwrap().nics.iter().map(|n| n.mac.clone()).collect();
            assert_eq!(has, [MAC], "{moment:?}");
            let known: Vec<_> = w.agent.network_hosts(network).into_iter().map(|h| h.mac).collect();
            assert_eq!(known, [MAC], "{moment:?}");
            assert_eq!(w.faults().await, [""; 0], "{moment:?}");
            w.engine.close();
        });
    }
}

/// What users have of their own is not asked for again: so many could not be, in one transaction, and one of these volumes that is
/// at work is nobody's hindrance.
#[test]
fn users_with_much_of_their_own_get_what_a_profile_brings() {
    SeededEnv::run(8, |env| async move {
        let w = World::new(&env).await.unwrap();
        let kind = InstanceKind::VirtualMachine;
        for n in 0..50 {
            volume(&w, P, &format!("data{n}"), "1GiB").await.unwrap();
            let source = format!("data{n}");
            let disk = config(&[("type", "disk"), ("pool", P), ("source", source.as_str())]);
            let devices = Devices::from([("data".to_owned(), disk)]);
            create(&w, P, CreateInstance { kind, devices, start: n < 2, ..container(&format!("v{n}")) })
                .await
                .unwrap();
        }
        let mut update = profile(&w, P);
        let mut second = update.devices["eth0"].clone();
        second.insert("name".into(), "eth1".into());
        update.devices.insert("eth1".into(), second);
        w.engine.profile_update(&w.admin, P, "default", update).await.unwrap();
        let id = w.engine.instance(&w.admin, P, "v1").unwrap().instance.id;
        assert_eq!(w.agent.guest_spec(id).unwrap().nics.len(), 2);
        // Under another name it is the same volume: that is asked.
        let mut update = profile(&w, P);
        let disk = config(&[("type", "disk"), ("pool", P), ("source", "data3")]);
        update.devices.insert("more".into(), disk);
        let e = w.engine.profile_update(&w.admin, P, "default", update).await.unwrap_err();
        assert!(e.is(ErrorKind::Conflict) && e.message.contains("data3"), "{e}");
        w.settle().await;
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}

/// Whoever edits a project edits its profiles: they lead no port to the host, nor let a machine out as the host itself, neither
/// of those who have them nor of who comes to have them. An administrator gives that to an instance.
#[test]
fn a_profile_leads_no_port_to_the_host() {
    SeededEnv::run(11, |env| async move {
        let w = World::new(&env).await.unwrap();
        let kind = InstanceKind::VirtualMachine;
        create(&w, P, CreateInstance { kind, ..container("v1") }).await.unwrap();
        let own = profile(&w, P);
        let with = |keys: &[(&str, &str)]| {
            let mut update = profile(&w, P);
            update.devices.insert("p".into(), config(keys));
            update
        };
        let serial = [("type", "port"), ("port", "serial"), ("number", "1")];
        for (more, key) in [
            (&[("to", "file"), ("path", "/srv/p")][..], "to"),
            (&[("to", "device"), ("path", "/dev/ttyS0")], "to"),
            (&[("to", "unix"), ("path", "/srv/p")], "to"),
            (&[("to", "tcp"), ("address", "127.0.0.1:4555")], "to"),
            (&[("to", "stream"), ("log", "/srv/p")], "log"),
        ] {
            let e =
                w.engine.profile_update(&w.admin, P, "default", with(&[&serial[..], more].concat())).await;
            let e = e.unwrap_err();
            assert!(e.is(ErrorKind::Invalid) && e.message.contains("of no profile"), "{more:?}: {e}");
            assert_eq!(e.field, Some(format!("devices.p.{key}")), "{more:?}");
        }
        let out = with(&[("type", "nic"), ("nictype", "user")]);
        let e = w.engine.profile_update(&w.admin, P, "default", out).await.unwrap_err();
        assert_eq!(e.field.as_deref(), Some("devices.p.nictype"), "{e}");
        w.engine.profile_update(&w.admin, P, "default", with(&serial)).await.unwrap();
        w.engine.profile_update(&w.admin, P, "default", own).await.unwrap();
        // Nobody has it yet, and nobody gets it.
        let mut wanted = profile(&w, P);
        let file = [&serial[..], &[("to", "file"), ("path", "/srv/p")]].concat();
        wanted.devices.insert("p".into(), config(&file));
        w.engine.project_create(&w.admin, "p", "", config(&[])).await.unwrap();
        w.engine.profile_update(&w.admin, "p", "default", wanted).await.unwrap();
        let e = create(&w, "p", CreateInstance { kind, ..container("v2") }).await.unwrap_err();
        assert_eq!(e.field.as_deref(), Some("devices.p.to"), "{e}");
        let devices = Devices::from([("p".to_owned(), config(&file))]);
        create(&w, "p", CreateInstance { kind, devices, ..container("v2") }).await.unwrap();
        w.settle().await;
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}

/// What one transaction cannot ask is said before anything is done, and nothing stays locked.
#[test]
fn a_profile_of_too_many_projects_does_not_begin_to_change() {
    SeededEnv::run(9, |env| async move {
        let w = World::new(&env).await.unwrap();
        let keys = config(&[
            ("features.profiles", "false"),
            ("features.images", "false"),
            ("limits.instances", "5"),
        ]);
        for n in 0..70 {
            let project = format!("p{n}");
            w.engine.project_create(&w.admin, &project, "", keys.clone()).await.unwrap();
            create(&w, &project, container("c1")).await.unwrap();
        }
        let before = w.fingerprint();
        let mut update = profile(&w, P);
        update.config.insert("limits.memory".into(), "64MiB".into());
        let e = w.engine.profile_update(&w.admin, P, "default", update).await.unwrap_err();
        assert!(e.is(ErrorKind::TooLarge) && e.message.contains("another profile"), "{e}");
        assert_eq!(w.fingerprint(), before);
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}

/// A disk that is as large again as it was counts as that, whatever the profile says by now.
#[test]
fn a_restore_makes_no_disk_larger_than_its_project_has_room_for() {
    SeededEnv::run(10, |env| async move {
        let w = World::new(&env).await.unwrap();
        let (e, c) = (&w.engine, &w.admin);
        e.project_create(c, "p", "", config(&[("limits.disk", "25GiB")])).await.unwrap();
        let resize = async |size: &str| {
            let mut update = profile(&w, P);
            update.devices.get_mut("root").unwrap().insert("size".into(), size.into());
            e.profile_update(c, "p", "default", update).await
        };
        resize("10GiB").await.unwrap();
        create(&w, "p", CreateInstance { kind: InstanceKind::VirtualMachine, ..container("v") })
            .await
            .unwrap();
        let v = Origin::Instance { project: "p", name: "v" };
        let snapshot = async |name: &str| {
            let request = CreateSnapshot { name: Some(name.into()), ..Default::default() };
            ended(&w, e.snapshot_create(c, v, request).await).await
        };
        let restore = async |name: &str| ended(&w, e.snapshot_restore(c, v, name).await).await;
        snapshot("small").await.unwrap();
        resize("20GiB").await.unwrap();
        snapshot("large").await.unwrap();
        restore("small").await.unwrap();
        resize("10GiB").await.unwrap();
        let used = || {
            let state = e.project_state(c, "p").unwrap();
            state.iter().find(|(name, ..)| name == "disk").map(|(.., used)| *used >> 30)
        };
        assert_eq!(used(), Some(10));
        // There is room for it yet.
        restore("large").await.unwrap();
        assert_eq!(used(), Some(20));
        restore("small").await.unwrap();
        volume(&w, "p", "other", "14GiB").await.unwrap();
        let refused = restore("large").await.unwrap_err();
        assert!(refused.is(ErrorKind::Quota) && refused.message.contains("limits.disk"), "{refused}");
        assert_eq!(used(), Some(24));
        w.settle().await;
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}

/// A change that is undone leaves the host with the limits that the records say.
#[test]
fn a_tree_that_was_given_less_has_what_it_had_when_that_is_undone() {
    SeededEnv::run(11, |env| async move {
        let w = World::new(&env).await.unwrap();
        let (e, c) = (&w.engine, &w.admin);
        let pool = CreatePool { name: "fast".into(), driver: "btrfs".into(), ..Default::default() };
        ended(&w, e.pool_create(c, pool).await).await.unwrap();
        let tree = |size: &str| {
            let root = config(&[("type", "disk"), ("path", "/"), ("pool", "fast"), ("size", size)]);
            UpdateProfile { devices: Devices::from([("root".to_owned(), root)]), ..Default::default() }
        };
        e.profile_create(c, P, "tree", tree("3GiB")).await.unwrap();
        let profiles = Some(vec!["default".to_owned(), "tree".to_owned()]);
        create(&w, P, CreateInstance { profiles, ..container("c1") }).await.unwrap();
        let sizes = async || {
            let volumes = e.volumes(c, "fast", None).unwrap();
            assert_eq!(volumes.len(), 1);
            let there = e.volume_usage(&volumes[0]).await.unwrap().total;
            (volumes[0].size.map(|size| size.bytes() >> 30), there >> 30)
        };
        assert_eq!(sizes().await, (Some(3), 3));
        w.agent.inject("volume_resize", Fault::FailAfter(Error::timeout("it took too long")));
        e.profile_update(c, P, "tree", tree("2GiB")).await.unwrap_err();
        assert_eq!(w.agent.faults_left(), 0);
        assert_eq!(sizes().await, (Some(3), 3));
        e.profile_update(c, P, "tree", tree("2GiB")).await.unwrap();
        assert_eq!(sizes().await, (Some(2), 2));
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}
