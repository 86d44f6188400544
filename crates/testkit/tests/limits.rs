//! Limits and restrictions of projects, and profiles that change under running users: what must hold also when two come
//! at once.

use karst_agent::simulated::Fault;
use karst_engine::{
    compute::{create::CreateInstance, relocate::MoveInstance, update::UpdateInstance},
    storage::CreatePool,
    tenancy::UpdateProfile,
};
use karst_env::{Env, SeededEnv};
use karst_model::{
    Config, Error, ErrorKind, Result, device::Devices, instance::InstanceKind, operation::OperationState,
};
use karst_testkit::{World, scenarios::container};
use std::time::Duration;

fn config(pairs: &[(&str, &str)]) -> Config {
    pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
}

/// A project with these keys whose default profile has the devices of the default project's.
async fn project(w: &World, name: &str, keys: &[(&str, &str)]) {
    w.engine.project_create(&w.admin, name, "", config(keys)).await.unwrap();
    let devices = w.engine.profile(&w.admin, "default", "default").unwrap().devices.clone();
    let update = UpdateProfile { devices, ..Default::default() };
    w.engine.profile_update(&w.admin, name, "default", update).await.unwrap();
}

async fn create(w: &World, project: &str, request: CreateInstance) -> Result<()> {
    let (_, operation) = w.engine.instance_create(&w.admin, project, request).await?;
    match &w.ended(operation).await.error {
        None => Ok(()),
        Some(e) => Err(e.clone()),
    }
}

async fn e_volume(w: &World, request: karst_engine::volumes::create::CreateVolume) -> Result<()> {
    let operation = w.engine.volume_create(&w.admin, "p", "default", request).await?;
    w.ended(operation).await.error.clone().map_or(Ok(()), Err)
}

fn with(name: &str, keys: &[(&str, &str)]) -> CreateInstance {
    CreateInstance { config: config(keys), ..container(name) }
}

fn update(keys: &[(&str, &str)]) -> UpdateInstance {
    UpdateInstance {
        description: String::new(),
        ephemeral: false,
        config: config(keys),
        devices: Devices::new(),
        profiles: vec!["default".into()],
        if_version: None,
    }
}

#[track_caller]
fn refused(result: Result<()>, kind: ErrorKind, says: &str) -> Error {
    let e = result.expect_err(says);
    assert_eq!(e.kind, kind, "{e}");
    assert!(e.to_string().contains(says), "{e}");
    e
}

#[test]
fn limits_are_never_passed_also_by_many_at_once() {
    for seed in 1..=8 {
        SeededEnv::run(seed, |env| async move {
            let w = World::new(&env).await.unwrap();
            project(&w, "p", &[("limits.instances", "3"), ("limits.memory", "1GiB")]).await;
            let many = (0..8).map(|n| {
                let request = with(&format!("c{n}"), &[("limits.memory", "256MiB")]);
                let delay = env.below(3);
                let (w, env) = (&w, &env);
                async move {
                    env.sleep(Duration::from_micros(delay)).await;
                    create(w, "p", request).await
                }
            });
            let results = futures::future::join_all(many).await;
            let made = results.iter().filter(|r| r.is_ok()).count();
            assert_eq!(made, 3, "seed {seed}: {results:?}");
            for e in results.into_iter().filter_map(Result::err) {
                assert!(matches!(e.kind, ErrorKind::Quota | ErrorKind::Conflict), "{e}");
            }
            let names: Vec<_> = w
                .engine
                .instances(&w.admin, "p")
                .unwrap()
                .iter()
                .map(|i| i.instance.name.to_string())
                .collect();
            // Two that grow at once: 768 MiB are used, 256 MiB are left, each wants 192 MiB more.
            let grow = async |name: &str| {
                let keys = [("limits.memory", "448MiB")];
                let operation = w.engine.instance_update(&w.admin, "p", name, update(&keys)).await?;
                w.ended(operation).await.error.clone().map_or(Ok(()), Err)
            };
            let (a, b) = futures::join!(grow(&names[0]), grow(&names[1]));
            assert!(a.is_ok() != b.is_ok(), "seed {seed}: {a:?} {b:?}");
            let state = w.engine.project_state(&w.admin, "p").unwrap();
            let memory = state.iter().find(|(n, ..)| n == "memory").unwrap();
            assert_eq!((memory.1, memory.2), (Some(1 << 30), 960 << 20));
            w.engine.close();
        });
    }
}

#[test]
fn each_limit_counts_what_it_says() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        let keys = &[("limits.containers", "1"), ("limits.cpu", "3"), ("limits.disk", "12GiB")];
        project(&w, "p", keys).await;
        // What a limit sums up must be said.
        let e = refused(
            create(&w, "p", container("c1")).await,
            ErrorKind::Invalid,
            "instance \"c1\" has no limits.cpu",
        );
        assert_eq!(e.field.as_deref(), Some("config.limits.cpu"));
        let sized = |name: &str, size: &str, cpus: &str| {
            let mut devices = w.engine.profile(&w.admin, "default", "default").unwrap().devices.clone();
            devices.retain(|n, _| n == "root");
            devices.get_mut("root").unwrap().insert("size".into(), size.into());
            CreateInstance { devices, ..with(name, &[("limits.cpu", cpus)]) }
        };
        refused(
            create(&w, "p", with("c1", &[("limits.cpu", "1")])).await,
            ErrorKind::Invalid,
            "the root disk of instance \"c1\" has no size",
        );
        create(&w, "p", sized("c1", "2GiB", "0-1")).await.unwrap();
        refused(create(&w, "p", sized("c2", "1GiB", "1")).await, ErrorKind::Quota, "limits.containers");
        let machine = |size: &str, cpus: &str| CreateInstance {
            kind: InstanceKind::VirtualMachine,
            ..sized("v1", size, cpus)
        };
        refused(
            create(&w, "p", machine("10GiB", "2")).await,
            ErrorKind::Quota,
            "would use 4 of limits.cpu, which is 3",
        );
        refused(create(&w, "p", machine("11GiB", "1")).await, ErrorKind::Quota, "limits.disk");
        create(&w, "p", machine("10GiB", "1")).await.unwrap();
        // A limit below what is used already is refused and changes nothing; one at it is taken.
        let set = async |keys: &[(&str, &str)]| {
            w.engine
                .project_update(
                    &w.admin,
                    "p",
                    "",
                    {
                        let mut all = w
                            .engine
                            .project(&w.admin, "p", karst_model::access::Permission::ProjectView)
                            .unwrap()
                            .config
                            .clone();
                        all.extend(config(keys));
                        all
                    },
                    None,
                )
                .await
        };
        refused(set(&[("limits.instances", "1")]).await, ErrorKind::Quota, "would use 2 of limits.instances");
        refused(set(&[("limits.memory", "1GiB")]).await, ErrorKind::Invalid, "has no limits.memory");
        refused(set(&[("features.images", "false")]).await, ErrorKind::Conflict, "not empty");
        set(&[("limits.instances", "2"), ("limits.virtual-machines", "1")]).await.unwrap();
        // Custom volumes count as well.
        let volume = |name: &str, size: &str| karst_engine::volumes::create::CreateVolume {
            name: name.into(),
            content: karst_model::storage::VolumeContent::Block,
            description: String::new(),
            config: config(&[("size", size)]),
        };
        let made = e_volume(&w, volume("v", "1GiB")).await;
        refused(made, ErrorKind::Quota, "limits.disk");
        // The profile of all is measured for all.
        let profile = UpdateProfile {
            config: config(&[("limits.cpu", "4")]),
            devices: w.engine.profile(&w.admin, "p", "default").unwrap().devices.clone(),
            ..Default::default()
        };
        w.engine.profile_update(&w.admin, "p", "default", profile).await.unwrap();
        let own = w
            .engine
            .instance_update(
                &w.admin,
                "p",
                "c1",
                UpdateInstance { devices: sized("c1", "2GiB", "1").devices, ..update(&[]) },
            )
            .await;
        refused(own.map(drop), ErrorKind::Quota, "limits.cpu");
        w.engine.close();
    });
}

#[test]
fn restrictions_hold_for_instances_profiles_and_what_is_there_already() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        project(&w, "p", &[("restricted", "true")]).await;
        create(&w, "p", container("c1")).await.unwrap();
        refused(
            create(&w, "p", with("c2", &[("security.nesting", "true")])).await,
            ErrorKind::Forbidden,
            "restricted.containers.nesting",
        );
        let nested = update(&[("security.nesting", "true")]);
        let changed = w.engine.instance_update(&w.admin, "p", "c1", nested).await;
        refused(changed.map(drop), ErrorKind::Forbidden, "restricted.containers.nesting");
        let devices = w.engine.profile(&w.admin, "p", "default").unwrap().devices.clone();
        let profile =
            UpdateProfile { config: config(&[("security.nesting", "true")]), devices, ..Default::default() };
        let e = refused(
            w.engine.profile_update(&w.admin, "p", "default", profile).await,
            ErrorKind::Forbidden,
            "c1",
        );
        assert_eq!(e.field.as_deref(), Some("config.security.nesting"));
        // A project is not restricted while something in it could not be.
        project(&w, "q", &[]).await;
        create(&w, "q", with("c1", &[("security.nesting", "true")])).await.unwrap();
        let restrict = async |keys: &[(&str, &str)]| {
            let mut all = config(&[
                ("features.images", "true"),
                ("features.profiles", "true"),
                ("features.storage.volumes", "true"),
                ("features.storage.buckets", "true"),
                ("features.networks", "false"),
            ]);
            all.extend(config(keys));
            w.engine.project_update(&w.admin, "q", "", all, None).await
        };
        refused(restrict(&[("restricted", "true")]).await, ErrorKind::Forbidden, "instance \"c1\"");
        restrict(&[("restricted", "true"), ("restricted.containers.nesting", "allow")]).await.unwrap();
        w.engine.close();
    });
}

#[test]
fn a_project_may_share_profiles_and_images_of_the_default_project() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        let (e, c) = (&w.engine, &w.admin);
        e.project_create(c, "p", "", config(&[("features.profiles", "false"), ("features.images", "false")]))
            .await
            .unwrap();
        let options = karst_engine::images::ImageOptions::default();
        let build = e.image_build(c, "default", "debian/12", InstanceKind::Container, options).await.unwrap();
        assert_eq!(w.ended(build).await.error, None);
        assert_eq!(e.images(c, "p").unwrap().len(), 1);
        let source = karst_engine::compute::create::InstanceSource::Image("debian/12".into());
        create(&w, "p", CreateInstance { source, ..container("c1") }).await.unwrap();
        let shared = e.profile(c, "p", "default").unwrap();
        assert_eq!(shared.id, e.profile(c, "default", "default").unwrap().id);
        assert_eq!(e.profile_used_by(c, &shared), ["/1.0/instances/c1?project=p"]);
        refused(e.profile_delete(c, "p", "default").await, ErrorKind::Conflict, "default");
        w.engine.close();
    });
}

#[test]
fn a_profile_reaches_all_running_users_or_none() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        let (e, c) = (&w.engine, &w.admin);
        for n in 0..40 {
            create(&w, "default", CreateInstance { start: true, ..container(&format!("c{n}")) })
                .await
                .unwrap();
        }
        let devices = e.profile(c, "default", "default").unwrap().devices.clone();
        let change = async |memory: &str| {
            let config = config(&[("limits.memory", memory)]);
            e.profile_update(
                c,
                "default",
                "default",
                UpdateProfile { config, devices: devices.clone(), ..Default::default() },
            )
            .await
        };
        change("64MiB").await.unwrap();
        let memory = || {
            let all = e.instances(c, "default").unwrap();
            all.iter()
                .map(|i| w.agent.guest_limits(i.instance.id).and_then(|l| l.memory).map(|m| m.0 >> 20))
                .collect::<Vec<_>>()
        };
        assert_eq!(memory(), [Some(64)].repeat(40));
        // One of them refuses: it is named, and the others have what they had.
        let stubborn = e.instance(c, "default", "c27").unwrap().instance.id;
        w.agent.set_refuses_update(stubborn, true);
        let e27 = change("128MiB").await.unwrap_err();
        assert!(e27.message.contains("\"c27\""), "{e27}");
        assert_eq!(memory(), [Some(64)].repeat(40));
        assert_eq!(e.profile(c, "default", "default").unwrap().config["limits.memory"], "64MiB");
        // Who starts while a profile changes gets one or the other, whole.
        w.agent.set_refuses_update(stubborn, false);
        let fresh = CreateInstance { start: true, ..container("late") };
        let (changed, late) = futures::join!(change("96MiB"), create(&w, "default", fresh));
        changed.unwrap();
        if late.is_ok() {
            assert_eq!(memory(), [Some(96)].repeat(41));
        }
        assert!(e.operations(c, None).unwrap().iter().all(|o| o.state != OperationState::NeedsAttention));
        w.engine.close();
    });
}

#[test]
fn a_root_moves_only_to_a_pool_where_its_project_has_room() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        let pool = CreatePool { name: "second".into(), driver: "dir".into(), ..Default::default() };
        let made = w.engine.pool_create(&w.admin, pool).await.unwrap();
        assert_eq!(w.ended(made).await.error, None);
        project(&w, "p", &[("limits.disk.pool.second", "5GiB")]).await;
        // One that runs, and one that does not.
        for (name, start) in [("m", true), ("s", false)] {
            let request = CreateInstance { kind: InstanceKind::VirtualMachine, start, ..container(name) };
            create(&w, "p", request).await.unwrap();
        }
        let moves = async |name: &str| {
            let request = MoveInstance { pool: Some("second".into()), ..Default::default() };
            let operation = w.engine.instance_move(&w.admin, "p", name, request).await?;
            w.ended(operation).await.error.clone().map_or(Ok(()), Err)
        };
        let pool_of = |name: &str| w.engine.instance(&w.admin, "p", name).unwrap().pool.clone();
        for name in ["m", "s"] {
            let e = refused(moves(name).await, ErrorKind::Quota, "limits.disk.pool.second");
            assert_eq!((e.field.as_deref(), &*pool_of(name)), (Some("pool"), "default"));
        }
        let view = karst_model::access::Permission::ProjectView;
        let mut keys = w.engine.project(&w.admin, "p", view).unwrap().config.clone();
        keys.insert("limits.disk.pool.second".into(), "15GiB".into());
        w.engine.project_update(&w.admin, "p", "", keys, None).await.unwrap();
        moves("m").await.unwrap();
        refused(moves("s").await, ErrorKind::Quota, "limits.disk.pool.second");
        assert_eq!((&*pool_of("m"), &*pool_of("s")), ("second", "default"));
        w.settle().await;
        assert_eq!(w.faults().await, Vec::<String>::new());
        w.engine.close();
    });
}

#[test]
fn the_root_of_a_container_has_the_size_that_it_is_given_later() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        let pool = CreatePool { name: "fast".into(), driver: "btrfs".into(), ..Default::default() };
        let made = w.engine.pool_create(&w.admin, pool).await.unwrap();
        assert!(w.ended(made).await.error.is_none());
        let devices = |size: &str| {
            let keys = [("type", "disk"), ("path", "/"), ("pool", "fast"), ("size", size)];
            Devices::from([("root".into(), keys.map(|(k, v)| (k.into(), v.into())).into())])
        };
        create(&w, "default", CreateInstance { devices: devices("1GiB"), ..container("c1") }).await.unwrap();
        // A tree may also shrink, as far as its host lets it.
        for (size, bytes) in [("3GiB", 3u64 << 30), ("2GiB", 2 << 30)] {
            let request = UpdateInstance { devices: devices(size), ..update(&[]) };
            let operation = w.engine.instance_update(&w.admin, "default", "c1", request).await.unwrap();
            let ended = w.ended(operation).await;
            assert!(ended.error.is_none(), "{:?}", ended.error);
            let volumes = w.engine.volumes(&w.admin, "fast", None).unwrap();
            assert_eq!(volumes[0].size.map(|s| s.bytes()), Some(bytes));
            let usage = w.engine.volume_usage(&volumes[0]).await.unwrap();
            assert_eq!(usage.total, bytes, "the host knows it");
        }
        w.engine.close();
    });
}

/// A project that sums up memory has no instance whose memory is a share of its host's; others may have it.
#[test]
fn shares_of_memory_are_not_summed_up() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        project(&w, "free", &[]).await;
        create(&w, "free", with("c1", &[("limits.memory", "25%")])).await.unwrap();
        project(&w, "p", &[("limits.memory", "1GiB")]).await;
        let share = [("limits.memory", "25%")];
        let named = |outcome: Result<()>| {
            let e = refused(outcome, ErrorKind::Invalid, "has 25% of its host's memory");
            assert_eq!(e.field.as_deref(), Some("config.limits.memory"), "{e}");
        };
        named(create(&w, "p", with("c1", &share)).await);
        create(&w, "p", with("c1", &[("limits.memory", "256MiB")])).await.unwrap();
        named(w.engine.instance_update(&w.admin, "p", "c1", update(&share)).await.map(drop));
        let devices = w.engine.profile(&w.admin, "p", "default").unwrap().devices.clone();
        let profile = UpdateProfile { config: config(&share), devices, ..Default::default() };
        // What the instance says itself counts.
        w.engine.profile_update(&w.admin, "p", "default", profile).await.unwrap();
        named(create(&w, "p", container("c2")).await);
        let state = w.engine.project_state(&w.admin, "p").unwrap();
        let memory = state.iter().find(|(n, ..)| n == "memory").unwrap();
        assert_eq!((memory.1, memory.2), (Some(1 << 30), 256 << 20));
        // Nor does a project with one get such a limit.
        let view = karst_model::access::Permission::ProjectView;
        let mut limited = w.engine.project(&w.admin, "free", view).unwrap().config.clone();
        limited.extend(config(&[("limits.memory", "1GiB")]));
        named(w.engine.project_update(&w.admin, "free", "", limited, None).await);
        w.engine.close();
    });
}

/// A size that its pool does not hold is refused also where it is set later, and by a profile: what is recorded binds.
#[test]
fn a_size_that_nothing_holds_is_not_recorded() {
    SeededEnv::run(21, |env| async move {
        let w = World::new(&env).await.unwrap();
        create(&w, "default", container("c1")).await.unwrap();
        // As a pool of directories does whose file system limits no tree.
        let not_there = || {
            let text = "this pool does not limit the size of containers' volumes; leave the size out or use another pool";
            w.agent.inject("volume_resize", Fault::FailBefore(Error::unsupported(text)));
        };
        let before = w.fingerprint();
        let root = config(&[("type", "disk"), ("path", "/"), ("pool", "default"), ("size", "1GiB")]);
        let devices = Devices::from([("root".into(), root)]);
        let change = UpdateInstance { devices, ..update(&[]) };
        not_there();
        let operation = w.engine.instance_update(&w.admin, "default", "c1", change.clone()).await.unwrap();
        let done = w.ended(operation).await.error.clone().map_or(Ok(()), Err);
        refused(done, ErrorKind::Unsupported, "use another pool");
        w.settle().await;
        assert_eq!(w.fingerprint(), before, "nothing of it is recorded");

        let row = w.engine.profile(&w.admin, "default", "default").unwrap();
        let mut profile =
            UpdateProfile { config: row.config.clone(), devices: row.devices.clone(), ..Default::default() };
        profile.devices.get_mut("root").unwrap().insert("size".into(), "1GiB".into());
        not_there();
        let done = w.engine.profile_update(&w.admin, "default", "default", profile).await;
        refused(done, ErrorKind::Unsupported, "use another pool");
        let row = w.engine.profile(&w.admin, "default", "default").unwrap();
        assert!(!row.devices["root"].contains_key("size"), "{:?}", row.devices);
        w.settle().await;
        assert_eq!(w.fingerprint(), before);

        // Where it is held it is taken, and what is so already is asked of nobody.
        let operation = w.engine.instance_update(&w.admin, "default", "c1", change.clone()).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        not_there();
        let operation = w.engine.instance_update(&w.admin, "default", "c1", change).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        assert_eq!(w.faults().await, Vec::<String>::new());
        w.engine.close();
    });
}

/// A guest can have what is set aside for it, whatever its balloon is to hold: that is what counts.
#[test]
fn what_is_set_aside_counts_in_a_projects_memory() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        project(&w, "p", &[("limits.memory", "1GiB")]).await;
        let machine = |name: &str, most: &str| CreateInstance {
            kind: InstanceKind::VirtualMachine,
            ..with(name, &[("limits.memory", "256MiB"), ("limits.memory.maximum", most)])
        };
        create(&w, "p", machine("v1", "512MiB")).await.unwrap();
        refused(create(&w, "p", machine("v2", "768MiB")).await, ErrorKind::Quota, "limits.memory");
        let e = refused(create(&w, "p", machine("v2", "128MiB")).await, ErrorKind::Invalid, "limits.memory");
        assert_eq!(e.field.as_deref(), Some("config.limits.memory.maximum"), "{e}");
        create(&w, "p", machine("v2", "512MiB")).await.unwrap();
    });
}
