//! Pools over the start of their host, and pools that are forgotten and come back with all that is in them.

use karst_engine::{
    compute::{create::CreateInstance, power::PowerRequest},
    snapshots::{Origin, create::CreateSnapshot},
    storage::CreatePool,
    volumes::create::CreateVolume,
};
use karst_env::{Env, SeededEnv};
use karst_model::{
    Config, ErrorKind, VolumeId,
    device::Devices,
    instance::{PowerAction, Status},
    pool_life::{PoolChange, PoolLife},
    storage::VolumeContent,
};
use karst_testkit::{World, scenarios::container};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

fn pool(name: &str) -> CreatePool {
    CreatePool { name: name.into(), driver: "dir".into(), ..Default::default() }
}

async fn made(w: &World, name: &str) {
    let operation = w.engine.pool_create(&w.admin, pool(name)).await.unwrap();
    assert_eq!(w.ended(operation).await.error, None);
}

fn life(w: &World, name: &str) -> Option<PoolLife> {
    w.engine.pool(&w.admin, name).ok().map(|pool| pool.life)
}

/// A container that runs, with its root in a pool.
async fn runs_from(w: &World, name: &str, pool: &str) {
    let root = [("type", "disk"), ("path", "/"), ("pool", pool)];
    let root: BTreeMap<String, String> = root.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    let devices = Devices::from([("root".to_owned(), root)]);
    let request = CreateInstance { devices, start: true, ..container(name) };
    let (_, operation) = w.engine.instance_create(&w.admin, "default", request).await.unwrap();
    assert_eq!(w.ended(operation).await.error, None);
}

#[test]
fn what_does_not_begin_with_its_host_is_stopped_after_its_start() {
    SeededEnv::run(1, |env| async move {
        let mut w = World::new(&env).await.unwrap();
        for name in ["begins", "rests", "needed"] {
            made(&w, name).await;
        }
        w.engine.pool_define(&w.admin, CreatePool { transient: true, ..pool("passing") }).await.unwrap();
        w.engine.pool_start(&w.admin, "passing").await.unwrap();
        let autostart = w.engine.pool_set_autostart(&w.admin, "passing", true).await.unwrap_err();
        assert!(autostart.is(ErrorKind::Conflict), "{autostart}");
        for name in ["rests", "needed"] {
            w.engine.pool_set_autostart(&w.admin, name, false).await.unwrap();
        }
        runs_from(&w, "c1", "needed").await;
        // What runs from it keeps it, and says which it is.
        let refused = w.engine.pool_stop(&w.admin, "needed").await.unwrap_err();
        assert!(refused.message.contains("\"c1\""), "{refused}");
        // A daemon that ends is no start of the host.
        w.engine.close();
        w.reopen().await.unwrap();
        w.settle().await;
        let active = |w: &World, name: &str| life(w, name).map(|life| !life.stopped);
        assert_eq!(active(&w, "rests"), Some(true));

        w.engine.close();
        w.agent.power_cut();
        w.reopen().await.unwrap();
        for _ in 0..1200 {
            let up = w.engine.instance(&w.admin, "default", "c1").unwrap().status == Status::Running;
            if up && active(&w, "rests") == Some(false) && active(&w, "passing").is_none() {
                break;
            }
            w.env.sleep(Duration::from_millis(100)).await;
        }
        w.settle().await;
        assert_eq!(w.engine.instance(&w.admin, "default", "c1").unwrap().status, Status::Running);
        let found = ["begins", "rests", "needed", "passing"].map(|name| active(&w, name));
        assert_eq!(found, [Some(true), Some(false), Some(true), None]);
        w.engine.pool_start(&w.admin, "rests").await.unwrap();
        assert_eq!(life(&w, "rests").map(|life| (life.stopped, life.manual)), Some((false, true)));
    });
}

#[test]
fn nothing_is_begun_in_a_pool_that_is_stopped() {
    const OF_C1: Origin<'_> = Origin::Instance { project: "default", name: "c1" };
    SeededEnv::run(3, |env| async move {
        let w = World::new(&env).await.unwrap();
        made(&w, "second").await;
        runs_from(&w, "c1", "second").await;
        let stop = PowerRequest { action: PowerAction::Stop, timeout: None, force: true, stateful: false };
        let operation = w.engine.instance_power(&w.admin, "default", "c1", stop).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        let take = |name: &str| CreateSnapshot { name: Some(name.into()), ..Default::default() };
        let operation = w.engine.snapshot_create(&w.admin, OF_C1, take("s1")).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);

        w.engine.pool_stop(&w.admin, "second").await.unwrap();
        let refused = [
            w.engine.snapshot_create(&w.admin, OF_C1, take("s2")).await.err(),
            w.engine.snapshot_restore(&w.admin, OF_C1, "s1").await.err(),
            w.engine.instance_delete(&w.admin, "default", "c1").await.err(),
        ];
        for (n, e) in refused.into_iter().enumerate() {
            let e = e.unwrap_or_else(|| panic!("{n} is begun"));
            assert!(e.is(ErrorKind::Conflict) && e.message.contains("not active"), "{n}: {e}");
        }
        w.engine.pool_start(&w.admin, "second").await.unwrap();
        assert_eq!(w.engine.snapshots(&w.admin, OF_C1).unwrap().len(), 1);
        let operation = w.engine.instance_delete(&w.admin, "default", "c1").await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        w.settle().await;
        assert_eq!(w.faults().await, Vec::<String>::new());
    });
}

#[test]
fn a_pool_that_is_forgotten_comes_back_with_its_volumes() {
    SeededEnv::run(2, |env| async move {
        let w = World::new(&env).await.unwrap();
        made(&w, "second").await;
        let id = w.engine.pool(&w.admin, "second").unwrap().id;
        // More than are forgotten at once.
        for n in 0..45 {
            let config = Config::from([("size".to_owned(), "1MiB".to_owned())]);
            let (name, content) = (format!("v{n}"), VolumeContent::Block);
            let request = CreateVolume { name, content, description: String::new(), config };
            let operation = w.engine.volume_create(&w.admin, "default", "second", request).await.unwrap();
            assert_eq!(w.ended(operation).await.error, None);
        }
        let volumes = |w: &World| -> BTreeSet<VolumeId> {
            let records = w.engine.inner().inventory.read();
            records.volumes.values().filter(|v| v.pool == id).map(|v| v.id).collect()
        };
        let before = volumes(&w);
        assert_eq!(before.len(), 45);
        // Some with snapshots, one of them with more than are forgotten at once.
        let of = |volume| Origin::Volume { project: "default", pool: "second", name: volume };
        let takes = [("v0", 35), ("v7", 4), ("v8", 4)];
        for (volume, count) in takes {
            for n in 0..count {
                let take = CreateSnapshot { name: Some(format!("s{n}")), ..Default::default() };
                let operation = w.engine.snapshot_create(&w.admin, of(volume), take).await.unwrap();
                assert_eq!(w.ended(operation).await.error, None);
            }
        }
        w.engine.pool_stop(&w.admin, "second").await.unwrap();
        let clear = w.engine.pool_change(&w.admin, "second", PoolChange::Clear).await.unwrap_err();
        assert!(clear.message.contains("has volume"), "{clear}");
        // Nothing passes over what cannot be looked into.
        let deleted = w.engine.volume_delete(&w.admin, "default", "second", "v0").await.unwrap_err();
        assert!(deleted.message.contains("not active"), "{deleted}");
        w.engine.pool_forget(&w.admin, "second").await.unwrap();
        assert!(volumes(&w).is_empty() && life(&w, "second").is_none());
        {
            let records = w.engine.inner().inventory.read();
            assert!(before.iter().all(|v| records.volume_snapshots_of(*v).is_empty()));
        }
        w.engine.pool_define(&w.admin, pool("second")).await.unwrap();
        assert_eq!(w.engine.pool(&w.admin, "second").unwrap().id, id);
        assert!(volumes(&w).is_empty(), "nobody has looked into it yet");
        w.engine.pool_start(&w.admin, "second").await.unwrap();
        assert_eq!(volumes(&w), before);
        w.settle().await;
        assert_eq!(w.faults().await, Vec::<String>::new());
        // Another name is another pool beside it.
        w.engine.pool_stop(&w.admin, "second").await.unwrap();
        w.engine.pool_forget(&w.admin, "second").await.unwrap();
        w.engine.pool_define(&w.admin, pool("third")).await.unwrap();
        assert_ne!(w.engine.pool(&w.admin, "third").unwrap().id, id);
        // The id that is asked for finds it under any name.
        w.engine.pool_define(&w.admin, CreatePool { id: Some(id), ..pool("fourth") }).await.unwrap();
        w.engine.pool_start(&w.admin, "fourth").await.unwrap();
        assert_eq!(volumes(&w), before);
    });
}
