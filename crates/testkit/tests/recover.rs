//! A database that is lost, and what is found again of it on the host.

use karst_agent::{CallContext, HostAgent};
use karst_engine::{
    Engine,
    compute::create::CreateInstance,
    compute::power::PowerRequest,
    recover::RecoverPool,
    snapshots::{Origin, create::CreateSnapshot},
    tenancy::UpdateProfile,
    volumes::create::CreateVolume,
};
use karst_env::{Env, EnvExt, SeededEnv};
use karst_model::{
    Config, ErrorKind, NodeId, VolumeId,
    device::Devices,
    instance::{DesiredPower, Generation, Instance, InstanceKind, PowerAction, Status},
    storage::VolumeContent,
};
use karst_store::{SqliteStore, Store};
use karst_testkit::{
    World,
    scenarios::{container, lose},
    world::open,
};
use std::{sync::Arc, time::Duration};

fn device(pairs: &[(&str, &str)]) -> std::collections::BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn pools() -> Vec<RecoverPool> {
    vec![RecoverPool { name: "default".into(), ..Default::default() }]
}

async fn create(w: &World, request: CreateInstance) {
    let (_, operation) = w.engine.instance_create(&w.admin, "default", request).await.unwrap();
    assert_eq!(w.ended(operation).await.error, None);
}

/// A container that runs, a machine that does not, with a volume, snapshots, profiles, a NIC of its own.
async fn furnished(w: &World) {
    let config = Config::from([("size".into(), "1GiB".into()), ("user.a".into(), "b".into())]);
    let data = CreateVolume {
        name: "data".into(),
        content: VolumeContent::Block,
        description: "of value".into(),
        config,
    };
    w.ended(w.engine.volume_create(&w.admin, "default", "default", data).await.unwrap()).await;
    let spare = UpdateProfile {
        config: Config::from([("limits.memory".into(), "512MiB".into())]),
        ..Default::default()
    };
    w.engine.profile_create(&w.admin, "default", "spare", spare).await.unwrap();
    let mut c1 = container("c1");
    c1.config = Config::from([("user.x".into(), "y".into())]);
    c1.profiles = Some(vec!["default".into(), "spare".into()]);
    c1.description = "the first".into();
    create(w, c1).await;
    let kind = InstanceKind::VirtualMachine;
    let disk = device(&[("type", "disk"), ("pool", "default"), ("source", "data")]);
    let devices = Devices::from([("data".into(), disk)]);
    create(w, CreateInstance { kind, devices, ..container("v1") }).await;
    let of = |name| Origin::Instance { project: "default", name };
    let data = Origin::Volume { project: "default", pool: "default", name: "data" };
    for (origin, name) in [(of("c1"), "s1"), (of("c1"), "s2"), (data, "before")] {
        let request = CreateSnapshot { name: Some(name.into()), ..CreateSnapshot::default() };
        let taken = w.engine.snapshot_create(&w.admin, origin, request).await.unwrap();
        assert_eq!(w.ended(taken).await.error, None);
    }
    power(w, &w.engine, PowerAction::Start).await;
    // Descriptions are written some seconds after the records.
    w.env.sleep(Duration::from_secs(8)).await;
}

async fn power(w: &World, engine: &Engine, action: PowerAction) {
    let request = PowerRequest { action, force: true, timeout: None, stateful: false };
    let operation = engine.instance_power(&w.admin, "default", "c1", request).await.unwrap();
    let ended = w.env.timeout(Duration::from_secs(3600), operation.ended()).await.unwrap();
    assert_eq!(ended.error, None);
}

/// Everything that is to come back, without what belongs to a start.
fn whole(engine: &Engine) -> String {
    let records = engine.inner().inventory.read();
    let instances: Vec<_> = records
        .instances
        .values()
        .map(|i| {
            let project = records.projects.get(&i.project).unwrap().name.to_string();
            let profiles: Vec<_> = i.profiles.iter().map(|p| records.profiles[p].name.to_string()).collect();
            let instance = Instance {
                // Made anew with the database.
                project: karst_model::ProjectId(uuid::Uuid::nil()),
                profiles: vec![],
                generation: Generation::default(),
                power: DesiredPower::Stopped,
                last_used_at: None,
                ..i.value.clone()
            };
            (project, profiles, instance)
        })
        .collect();
    let snapshots: Vec<_> = records
        .snapshots
        .values()
        .map(|s| karst_model::snapshot::Snapshot { profiles: vec![], ..s.value.clone() })
        .collect();
    let volumes: Vec<_> = records
        .volumes
        .values()
        .map(|v| karst_model::storage::Volume {
            project: karst_model::ProjectId(uuid::Uuid::nil()),
            ..v.value.clone()
        })
        .collect();
    let of_volumes: Vec<_> = records.volume_snapshots.values().map(|s| s.value.clone()).collect();
    format!("{instances:#?}\n{snapshots:#?}\n{volumes:#?}\n{of_volumes:#?}")
}

/// Another database over the same host, as after the first one is deleted.
async fn another(w: &World, env: &SeededEnv) -> (Arc<dyn Store>, Engine) {
    w.engine.close();
    env.sleep(Duration::from_secs(5)).await;
    let store: Arc<dyn Store> = Arc::new(SqliteStore::memory(env.shared()).unwrap());
    let engine = open(env, &store, &w.agent, NodeId(uuid::Uuid::from_u128(7))).await.unwrap();
    engine.bootstrap().await.unwrap();
    env.sleep(Duration::from_secs(2)).await;
    (store, engine)
}

#[test]
fn everything_comes_back_after_the_database_is_lost() {
    let env = SeededEnv::new(3);
    env.block_on({
        let env = env.clone();
        async move {
            let w = World::new(&env).await.unwrap();
            furnished(&w).await;
            let before = whole(&w.engine);
            let (pool, network) = {
                let records = w.engine.inner().inventory.read();
                let default = records.project("default").unwrap().id;
                let network = records.network(default, "karstbr0").unwrap().value.clone();
                (records.pool("default").unwrap().id, network)
            };
            let running =
                w.host().guest_observe_all(&CallContext::read(Duration::from_secs(9)), ()).await.unwrap();

            let (store, engine) = another(&w, &env).await;
            // The pool and the network came back by themselves, and nothing on the host was touched.
            {
                let records = engine.inner().inventory.read();
                assert_eq!(records.pools.keys().copied().collect::<Vec<_>>(), [pool]);
                assert_eq!(records.pool("default").unwrap().id, pool);
                let default = records.project("default").unwrap().id;
                let again = records.network(default, "karstbr0").unwrap();
                assert_eq!((again.id, &again.config), (network.id, &network.config));
                assert!(records.instances.is_empty() && records.volumes.is_empty());
            }
            let now =
                w.host().guest_observe_all(&CallContext::read(Duration::from_secs(9)), ()).await.unwrap();
            assert_eq!(now, running);

            // A profile is missing, and nothing happens before it is there.
            let survey = engine.recover_validate(&w.admin, &pools()).await.unwrap();
            assert_eq!(survey.missing, ["Profile \"spare\" in project \"default\""]);
            assert_eq!(survey.lost.len(), 3, "{survey:?}");
            assert_eq!(survey.unclear, Vec::<String>::new());
            let refused = engine.recover_import(&w.admin, &pools()).await.unwrap_err();
            assert!(refused.is(ErrorKind::Conflict) && refused.message.contains("spare"), "{refused}");
            let spare = UpdateProfile {
                config: Config::from([("limits.memory".into(), "512MiB".into())]),
                ..Default::default()
            };
            engine.profile_create(&w.admin, "default", "spare", spare).await.unwrap();
            assert_eq!(engine.recover_import(&w.admin, &pools()).await.unwrap().len(), 3);
            pretty(&before, &whole(&engine));
            let survey = engine.recover_validate(&w.admin, &pools()).await.unwrap();
            assert_eq!((survey.lost, survey.missing), (vec![], vec![]));

            // The guest that ran all the time is this instance's, and can be stopped and started.
            let status = |name: &str| engine.instance(&w.admin, "default", name).unwrap().status;
            assert_eq!((status("c1"), status("v1")), (Status::Running, Status::Stopped));
            power(&w, &engine, PowerAction::Stop).await;
            assert_eq!(status("c1"), Status::Stopped);
            power(&w, &engine, PowerAction::Start).await;
            assert_eq!(status("c1"), Status::Running);
            env.sleep(Duration::from_secs(10)).await;
            let faults = karst_testkit::world::faults(&engine, &*store, &[&w.agent]).await;
            assert_eq!(faults, Vec::<String>::new());
            engine.close();
        }
    });
}

fn pretty(before: &str, after: &str) {
    for (a, b) in before.lines().zip(after.lines()) {
        assert_eq!(a, b, "the first difference\n{before}\n{after}");
    }
    assert_eq!(before.lines().count(), after.lines().count());
}

/// What stands on a pool may be anything: it is refused or left out, and nothing is made of it.
#[test]
fn descriptions_are_not_believed() {
    let env = SeededEnv::new(4);
    env.block_on({
        let env = env.clone();
        async move {
            let w = World::new(&env).await.unwrap();
            furnished(&w).await;
            power(&w, &w.engine, PowerAction::Stop).await;
            let volume: VolumeId = {
                let records = w.engine.inner().inventory.read();
                records.instances.values().find(|i| &*i.name == "v1").unwrap().root
            };
            lose(&w, volume.uuid()).await.unwrap();
            let call = CallContext::read(Duration::from_secs(9));
            let spec = w.engine.pool(&w.admin, "default").unwrap().spec().unwrap();
            let mut after = None;
            let text = loop {
                let request = karst_agent::PoolSurvey { spec: spec.clone(), after };
                let page = w.agent.pool_survey(&call, request).await.unwrap();
                if let Some(found) = page.volumes.iter().find(|v| v.volume == volume) {
                    break found.description.clone().expect("it was described");
                }
                after = page.volumes.last().map(|v| v.volume);
            };
            let before = w.fingerprint();
            let set = |from: &str, to: &str| {
                assert!(text.contains(from), "{from} is in {text}");
                text.replace(from, to)
            };
            let other = uuid::Uuid::from_u128(1).to_string();
            // No description of this volume at all.
            for (wrong, word) in [
                ("{".to_owned(), "cannot be read"),
                ("[]".to_owned(), "cannot be read"),
                (set("\"version\":1", "\"version\":9"), "version 9"),
                (set("\"name\":\"v1\"", "\"name\":\"../v1\""), "cannot be read"),
                (text.replace(&volume.to_string(), &other), "another volume"),
                (set("\"content\":\"block\"", "\"content\":\"filesystem\""), "something else"),
                (set("\"kind\":\"virtual-machine\"", "\"kind\":\"container\""), "cannot run from it"),
            ] {
                w.agent.tamper_description(volume, Some(wrong));
                let survey = w.engine.recover_validate(&w.admin, &pools()).await.unwrap();
                assert_eq!(survey.lost, []);
                assert!(survey.unclear.len() == 1 && survey.unclear[0].contains(word), "{word}: {survey:?}");
            }
            w.agent.tamper_description(volume, None);
            let survey = w.engine.recover_validate(&w.admin, &pools()).await.unwrap();
            assert!(survey.lost.is_empty() && survey.unclear[0].contains("nothing is said"), "{survey:?}");
            // One that says what cannot be.
            for (wrong, word) in [
                (
                    set("\"machine\":\"pc-q35-7.2\"", "\"machine\":\"pc-q35-7.2,kernel=/etc/shadow\""),
                    "machine",
                ),
                (set("\"cpu_model\":\"host\"", "\"cpu_model\":\"host -drive file=/etc/shadow\""), "cpu"),
                (set("\"architecture\":\"x86_64\"", "\"architecture\":\"s390x\""), "s390x"),
                (set("\"config\":{}", "\"config\":{\"volatile.x\":\"1\"}"), "volatile"),
                (set("\"volatile\":{", "\"volatile\":{\"user.x\":\"1\","), "user.x"),
                (set("\"name\":\"v1\",\"vmid\"", "\"name\":\"c1\",\"vmid\""), "exists already"),
            ] {
                w.agent.tamper_description(volume, Some(wrong));
                let e = w.engine.recover_import(&w.admin, &pools()).await.unwrap_err();
                assert!(format!("{e} {:?}", e.field).contains(word), "{word}: {e:?}");
                assert_eq!(w.fingerprint(), before);
            }
            // What is only another's by now is given anew.
            let mac = {
                let records = w.engine.inner().inventory.read();
                let c1 = records.instances.values().find(|i| &*i.name == "c1").unwrap();
                (c1.identities["eth0"].mac.clone().unwrap(), c1.vmid)
            };
            let said: serde_json::Value = serde_json::from_str(&text).unwrap();
            let own = said["instance"]["instance"]["identities"]["eth0"]["mac"].as_str().unwrap();
            let vmid = &said["instance"]["instance"]["vmid"];
            let wrong = set(own, &mac.0).replace(&format!("\"vmid\":{vmid}"), &format!("\"vmid\":{}", mac.1));
            w.agent.tamper_description(volume, Some(wrong));
            w.engine.recover_import(&w.admin, &pools()).await.unwrap();
            let records = w.engine.inner().inventory.read();
            let v1 = records.instances.values().find(|i| &*i.name == "v1").unwrap();
            assert!(v1.vmid != mac.1 && v1.identities["eth0"].mac.as_ref() != Some(&mac.0), "{v1:?}");
        }
    });
}
