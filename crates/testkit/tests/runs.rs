//! What runs and what is defined, each changed by itself: a device of the run only is in use, survives all but the end of its run,
//! and is in nothing that outlives it.

use karst_engine::{
    LiveOperation,
    compute::{
        create::CreateInstance, memory_files::SaveMemory, power::PowerRequest, update::UpdateInstance,
    },
    saga::runner::{Interference, Moment},
    snapshots::{Origin, create::CreateSnapshot},
    tenancy::UpdateProfile,
    volumes::create::CreateVolume,
};
use karst_env::{Env, SeededEnv};
use karst_model::{
    Config, ErrorKind, Result,
    device::Devices,
    instance::{InstanceKind, PowerAction},
    storage::VolumeContent,
};
use karst_testkit::{
    World,
    scenarios::{change_run, container},
};
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

const P: &str = "default";

fn keys(pairs: &[(&str, &str)]) -> Config {
    pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
}

fn disk(volume: &str) -> Config {
    keys(&[("type", "disk"), ("pool", P), ("source", volume)])
}

async fn ended(w: &World, operation: Result<LiveOperation>) -> Result<()> {
    w.ended(operation?).await.error.clone().map_or(Ok(()), Err)
}

async fn volume(w: &World, name: &str) {
    let config = keys(&[("size", "1GiB")]);
    let request =
        CreateVolume { name: name.into(), content: VolumeContent::Block, description: String::new(), config };
    ended(w, w.engine.volume_create(&w.admin, P, P, request).await).await.unwrap();
}

async fn create(w: &World, project: &str, request: CreateInstance) -> Result<()> {
    ended(w, w.engine.instance_create(&w.admin, project, request).await.map(|(_, operation)| operation)).await
}

/// A machine `c1` that runs, and the volumes `v1` and `v2`.
async fn world(env: &SeededEnv) -> World {
    let w = World::new(env).await.unwrap();
    volume(&w, "v1").await;
    volume(&w, "v2").await;
    let (kind, config) = (InstanceKind::VirtualMachine, keys(&[("migration.stateful", "true")]));
    create(&w, P, CreateInstance { kind, config, start: true, ..container("c1") }).await.unwrap();
    w
}

/// The disks beside the root that the guest has, by their devices.
fn has(w: &World) -> Vec<String> {
    let id = w.engine.instance(&w.admin, P, "c1").unwrap().instance.id;
    let mut names: Vec<_> =
        w.agent.guest_spec(id).unwrap().disks.iter().map(|disk| disk.name.clone()).collect();
    names.sort();
    names
}

/// The disks beside the root that the next start takes.
fn defined(w: &World) -> Vec<String> {
    let view = w.engine.instance(&w.admin, P, "c1").unwrap();
    let all = view.expanded_devices.iter();
    let disks = all.filter(|(_, keys)| keys["type"] == "disk" && !keys.contains_key("path"));
    disks.map(|(name, _)| name.clone()).collect()
}

fn held(w: &World) -> Vec<String> {
    let view = w.engine.instance(&w.admin, P, "c1").unwrap();
    view.run().map(|run| run.held.iter().cloned().collect()).unwrap_or_default()
}

/// Puts a volume into what runs, and into the definition as well when there are `devices` for that.
async fn attach(w: &World, name: &str, volume: &str, devices: Option<Devices>) -> Result<()> {
    ended(w, change_run(w, |run| drop(run.insert(name.into(), disk(volume))), devices).await).await
}

async fn detach(w: &World, name: &str) -> Result<()> {
    ended(w, change_run(w, |run| drop(run.remove(name)), None).await).await
}

fn update(w: &World, config: Config, devices: Devices) -> UpdateInstance {
    let view = w.engine.instance(&w.admin, P, "c1").unwrap();
    let mut all = view.instance.config.clone();
    all.extend(config);
    UpdateInstance {
        description: String::new(),
        ephemeral: false,
        config: all,
        devices,
        profiles: vec!["default".into()],
        if_version: None,
    }
}

async fn power(w: &World, action: PowerAction, stateful: bool) -> Result<()> {
    let request = PowerRequest { action, force: !stateful, timeout: None, stateful };
    ended(w, w.engine.instance_power(&w.admin, P, "c1", request).await).await
}

#[test]
fn a_disk_of_the_run_only_is_in_use_and_ends_with_the_run() {
    SeededEnv::run(41, |env| async move {
        let mut w = world(&env).await;
        let before = w.engine.instance(&w.admin, P, "c1").unwrap().instance.spec_version;
        attach(&w, "more", "v1", None).await.unwrap();
        assert_eq!((has(&w), defined(&w)), (vec!["more".to_owned()], vec![]));
        let view = w.engine.instance(&w.admin, P, "c1").unwrap();
        assert_eq!(view.instance.spec_version, before, "the definition has not changed");
        let pending = w.engine.instance_pending(&w.admin, P, "c1").unwrap();
        assert_eq!(pending.len(), 1, "{pending:?}");
        assert_eq!((pending[0].key.as_str(), &pending[0].configured), ("devices.more", &None));

        // The volume is in use: not deleted, and nobody else's.
        let used = w.engine.volume_delete(&w.admin, P, P, "v1").await.map(drop).unwrap_err();
        assert!(used.is(ErrorKind::Conflict) && used.message.contains("is used by"), "{used}");
        let devices = Devices::from([("mine".to_owned(), disk("v1"))]);
        let kind = InstanceKind::VirtualMachine;
        let taken = create(&w, P, CreateInstance { kind, devices, ..container("c2") }).await.unwrap_err();
        assert!(taken.is(ErrorKind::Conflict) && taken.message.contains("attached"), "{taken}");

        // Changes of other things leave it: of the instance, of its definition only, of a profile; and so does a crash.
        let live = update(&w, keys(&[("user.a", "1")]), Devices::new());
        ended(&w, w.engine.instance_update(&w.admin, P, "c1", live).await).await.unwrap();
        let later = update(&w, Config::new(), Devices::from([("later".to_owned(), disk("v2"))]));
        ended(&w, w.engine.instance_configure(&w.admin, P, "c1", later).await).await.unwrap();
        let row = w.engine.profile(&w.admin, P, "default").unwrap();
        let config = keys(&[("user.b", "1")]);
        let profile = UpdateProfile { config, devices: row.devices.clone(), ..Default::default() };
        w.engine.profile_update(&w.admin, P, "default", profile).await.unwrap();
        w.reopen().await.unwrap();
        w.settle().await;
        assert_eq!((has(&w), defined(&w)), (vec!["more".to_owned()], vec!["later".to_owned()]));
        assert_eq!(held(&w), ["devices.later", "devices.more"]);
        let live = update(&w, keys(&[("user.a", "2")]), Devices::from([("later".to_owned(), disk("v2"))]));
        ended(&w, w.engine.instance_update(&w.admin, P, "c1", live).await).await.unwrap();
        assert_eq!(has(&w), ["more"], "what waits for the next start goes on waiting");

        // Memory goes on with what is defined: it is not kept with a device that is not.
        let file = SaveMemory { path: "/srv/saves/c1".into(), document: String::new(), paused: None };
        for refused in [
            power(&w, PowerAction::Stop, true).await,
            ended(&w, w.engine.machine_save(&w.admin, P, "c1", file).await).await,
        ] {
            let e = refused.unwrap_err();
            assert!(e.is(ErrorKind::Conflict) && e.field.as_deref() == Some("devices.later"), "{e:?}");
        }
        power(&w, PowerAction::Stop, false).await.unwrap();
        assert_eq!(held(&w), [""; 0]);
        power(&w, PowerAction::Start, false).await.unwrap();
        assert_eq!((has(&w), held(&w)), (vec!["later".to_owned()], vec![]));
        let view = w.engine.instance(&w.admin, P, "c1").unwrap();
        assert!(!view.instance.identities.contains_key("more"), "nothing is known of it any more");
        ended(&w, w.engine.volume_delete(&w.admin, P, P, "v1").await).await.unwrap();
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}

#[test]
fn a_disk_that_the_run_gave_back_is_there_again_with_the_next() {
    SeededEnv::run(42, |env| async move {
        let w = world(&env).await;
        let both = Devices::from([("more".to_owned(), disk("v1"))]);
        attach(&w, "more", "v1", Some(both.clone())).await.unwrap();
        assert_eq!(
            (has(&w), defined(&w), held(&w)),
            (vec!["more".to_owned()], vec!["more".to_owned()], vec![])
        );
        let slot = w.engine.instance(&w.admin, P, "c1").unwrap().instance.identities["more"].slot.clone();
        detach(&w, "more").await.unwrap();
        assert_eq!((has(&w), defined(&w)), (vec![], vec!["more".to_owned()]));
        let live = update(&w, keys(&[("user.a", "1")]), both);
        ended(&w, w.engine.instance_update(&w.admin, P, "c1", live).await).await.unwrap();
        assert_eq!(has(&w), [""; 0], "an update of something else does not bring it back");
        // Whoever changes that device itself is followed.
        let fast = Devices::from([("more".to_owned(), {
            let mut keys = disk("v1");
            keys.insert("limits.read".into(), "5MB".into());
            keys
        })]);
        let live = update(&w, Config::new(), fast);
        ended(&w, w.engine.instance_update(&w.admin, P, "c1", live).await).await.unwrap();
        assert_eq!((has(&w), held(&w)), (vec!["more".to_owned()], vec![]));
        detach(&w, "more").await.unwrap();
        power(&w, PowerAction::Restart, false).await.unwrap();
        assert_eq!((has(&w), held(&w)), (vec!["more".to_owned()], vec![]));
        assert_eq!(w.engine.instance(&w.admin, P, "c1").unwrap().instance.identities["more"].slot, slot);
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}

/// As virt-manager does it: adding live and then to the definition, removing from the definition and then live.
#[test]
fn one_side_follows_the_other_and_nothing_is_held() {
    SeededEnv::run(43, |env| async move {
        let w = world(&env).await;
        attach(&w, "more", "v1", None).await.unwrap();
        let known = w.engine.instance(&w.admin, P, "c1").unwrap().instance.identities["more"].clone();
        let defining = update(&w, Config::new(), Devices::from([("more".to_owned(), disk("v1"))]));
        ended(&w, w.engine.instance_configure(&w.admin, P, "c1", defining).await).await.unwrap();
        assert_eq!(
            (has(&w), defined(&w), held(&w)),
            (vec!["more".to_owned()], vec!["more".to_owned()], vec![])
        );
        let view = w.engine.instance(&w.admin, P, "c1").unwrap();
        assert_eq!(view.instance.identities["more"], known, "it is the same device");
        let without = update(&w, Config::new(), Devices::new());
        ended(&w, w.engine.instance_configure(&w.admin, P, "c1", without).await).await.unwrap();
        assert_eq!((has(&w), held(&w)), (vec!["more".to_owned()], vec!["devices.more".to_owned()]));
        detach(&w, "more").await.unwrap();
        assert_eq!((has(&w), defined(&w), held(&w)), (vec![], vec![], vec![]));
        assert_eq!(w.engine.instance_pending(&w.admin, P, "c1").unwrap(), []);
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}

#[test]
fn what_runs_apart_is_asked_what_any_device_is_asked() {
    SeededEnv::run(44, |env| async move {
        let w = world(&env).await;
        let kind = InstanceKind::VirtualMachine;
        let devices = Devices::from([("mine".to_owned(), disk("v1"))]);
        create(&w, P, CreateInstance { kind, devices, ..container("c2") }).await.unwrap();
        let e = attach(&w, "more", "v1", None).await.unwrap_err();
        assert!(e.is(ErrorKind::Conflict) && e.field.as_deref() == Some("devices.more.source"), "{e:?}");
        let e = attach(&w, "more", "nope", None).await.unwrap_err();
        assert!(e.is(ErrorKind::NotFound) && e.field.as_deref() == Some("devices.more.source"), "{e:?}");
        let e = ended(
            &w,
            change_run(
                &w,
                |run| drop(run.insert("bad".into(), keys(&[("type", "disk"), ("sauce", "v1")]))),
                None,
            )
            .await,
        )
        .await
        .unwrap_err();
        assert!(e.is(ErrorKind::Invalid) && e.message.contains("sauce"), "{e:?}");
        let root = change_run(
            &w,
            |run| drop(run.get_mut("root").unwrap().insert("size".into(), "99GiB".into())),
            None,
        );
        let e = root.await.map(drop).unwrap_err();
        assert!(e.is(ErrorKind::Unsupported) && e.field.as_deref() == Some("devices.root.size"), "{e:?}");
        let address = |n: &str| {
            keys(&[("type", "nic"), ("network", "karstbr0"), ("name", n), ("ipv4.address", "1.2.3.4")])
        };
        let e = change_run(&w, |run| drop(run.insert("eth9".into(), address("eth9"))), None).await.map(drop);
        assert_eq!(e.unwrap_err().field.as_deref(), Some("devices.eth9.ipv4.address"));
        assert_eq!((has(&w), held(&w)), (vec![], vec![]), "what was refused has changed nothing");
        // What does not run has no run.
        power(&w, PowerAction::Stop, false).await.unwrap();
        let e = attach(&w, "more", "v2", None).await.unwrap_err();
        assert!(e.is(ErrorKind::Conflict), "{e:?}");
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}

/// An interface of the run only is its network's as any other: known by its address there as long as it lasts.
#[test]
fn an_interface_of_the_run_only_is_known_to_its_network() {
    const MAC: &str = "10:66:6a:00:00:99";
    SeededEnv::run(45, |env| async move {
        let w = world(&env).await;
        let network = w.engine.network(&w.admin, P, "karstbr0").unwrap().id;
        let nic = keys(&[("type", "nic"), ("network", "karstbr0"), ("name", "eth1"), ("hwaddr", MAC)]);
        ended(&w, change_run(&w, |run| drop(run.insert("eth1".into(), nic)), None).await).await.unwrap();
        let knows = || w.agent.network_hosts(network).iter().any(|host| host.mac == MAC);
        assert!(knows());
        let live = update(&w, keys(&[("user.a", "1")]), Devices::new());
        ended(&w, w.engine.instance_update(&w.admin, P, "c1", live).await).await.unwrap();
        w.settle().await;
        let id = w.engine.instance(&w.admin, P, "c1").unwrap().instance.id;
        assert!(knows() && w.agent.guest_spec(id).unwrap().nics.iter().any(|nic| nic.mac == MAC));
        power(&w, PowerAction::Stop, false).await.unwrap();
        power(&w, PowerAction::Start, false).await.unwrap();
        w.settle().await;
        assert!(!w.agent.guest_spec(id).unwrap().nics.iter().any(|nic| nic.mac == MAC));
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}

/// A limit that only the run has counts in its project, as does the one that the next start takes.
#[test]
fn what_a_run_has_more_of_counts() {
    SeededEnv::run(46, |env| async move {
        let w = World::new(&env).await.unwrap();
        create(
            &w,
            P,
            CreateInstance { config: keys(&[("limits.processes", "100")]), start: true, ..container("c1") },
        )
        .await
        .unwrap();
        let limits = keys(&[("limits.processes", "300")]);
        let project = w.engine.project(&w.admin, P, karst_model::access::Permission::ProjectView).unwrap();
        let mut config = project.config.clone();
        config.extend(limits);
        w.engine.project_update(&w.admin, P, "", config, None).await.unwrap();
        let set = async |processes: &str| {
            let view = w.engine.instance(&w.admin, P, "c1").unwrap();
            let was = view.run().unwrap().clone();
            let mut config = was.config.clone();
            config.insert("limits.processes".into(), processes.into());
            let run = karst_engine::compute::run::RunChange { config, devices: was.devices.clone(), was };
            let change = karst_engine::compute::run::MachineChange { run: Some(run), ..Default::default() };
            ended(&w, w.engine.machine_change(&w.admin, P, "c1", change).await).await
        };
        assert!(set("301").await.unwrap_err().is(ErrorKind::Quota));
        set("250").await.unwrap();
        assert_eq!(held(&w), ["limits.processes"]);
        let second = || CreateInstance { config: keys(&[("limits.processes", "100")]), ..container("c2") };
        let e = create(&w, P, second()).await.unwrap_err();
        assert!(e.is(ErrorKind::Quota), "{e}");
        power(&w, PowerAction::Stop, false).await.unwrap();
        create(&w, P, second()).await.unwrap();
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}

/// A snapshot with memory is not taken of what no definition has.
#[test]
fn no_memory_is_kept_of_devices_that_are_not_defined() {
    SeededEnv::run(47, |env| async move {
        let w = world(&env).await;
        let of = Origin::Instance { project: P, name: "c1" };
        let snapshot =
            |name: &str| CreateSnapshot { name: Some(name.into()), stateful: true, ..Default::default() };
        ended(&w, w.engine.snapshot_create(&w.admin, of, snapshot("s1")).await).await.unwrap();
        let nic = keys(&[("type", "nic"), ("network", "karstbr0"), ("name", "eth1")]);
        ended(&w, change_run(&w, |run| drop(run.insert("eth1".into(), nic)), None).await).await.unwrap();
        let e = w.engine.snapshot_create(&w.admin, of, snapshot("s2")).await.map(drop).unwrap_err();
        assert!(e.is(ErrorKind::Conflict) && e.field.as_deref() == Some("devices.eth1"), "{e:?}");
        w.engine.close();
    });
}

/// Whenever the executor dies, what is held and what the guest has are of one mind.
#[test]
fn a_crash_in_the_middle_leaves_both_sides_of_one_mind() {
    // The last step is logged by the last write of all.
    for moment in [Moment::BeforeStep(0), Moment::AfterStep(0)] {
        SeededEnv::run(48, |env| async move {
            let mut w = world(&env).await;
            let landed = Arc::new(AtomicBool::new(false));
            let flag = landed.clone();
            w.engine.set_hook(Some(Arc::new(move |name: &str, now: Moment| {
                let here = name == "instance-update" && now == moment;
                match here && !flag.swap(true, Ordering::SeqCst) {
                    true => Interference::Crash,
                    false => Interference::None,
                }
            })));
            change_run(&w, |run| drop(run.insert("more".into(), disk("v1"))), None).await.unwrap();
            env.sleep(std::time::Duration::from_secs(60)).await;
            assert!(landed.load(Ordering::SeqCst), "{moment:?}: it did not land");
            w.reopen().await.unwrap();
            w.settle().await;
            assert_eq!(
                (has(&w), held(&w)),
                (vec!["more".to_owned()], vec!["devices.more".to_owned()]),
                "{moment:?}"
            );
            assert_eq!(w.faults().await, [""; 0], "{moment:?}");
            w.engine.close();
        });
    }
}
