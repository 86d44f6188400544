//! Full copies (`volume.full_copy` of pools, `full_copy` of volumes): whatever makes a volume of an image or of another volume
//! asks its host for one where the pool or the volume wants it, and nowhere else.

use karst_engine::{
    LiveOperation,
    compute::{
        copy::CopyInstance,
        create::{CreateInstance, InstanceSource},
        relocate::MoveInstance,
    },
    images::ImageOptions,
    snapshots::{Origin, create::CreateSnapshot},
    storage::{CreatePool, UpdatePool},
    volumes::{copy::CopyVolume, create::CreateVolume, relocate::MoveVolume},
};
use karst_env::SeededEnv;
use karst_model::{Config, Result, device::Devices, instance::InstanceKind, storage::VolumeContent};
use karst_testkit::{World, scenarios::container};

fn config(pairs: &[(&str, &str)]) -> Config {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

async fn done(w: &World, operation: Result<LiveOperation>) {
    assert_eq!(w.ended(operation.unwrap()).await.error, None);
}

/// A container whose root is in a pool.
fn in_pool(name: &str, pool: &str) -> CreateInstance {
    let root = [("type", "disk"), ("path", "/"), ("pool", pool)].map(|(k, v)| (k.to_owned(), v.to_owned()));
    CreateInstance { devices: Devices::from([("root".into(), root.into())]), ..container(name) }
}

fn image() -> InstanceSource {
    InstanceSource::Image("debian/12".into())
}

/// A world with two pools more: one of full copies, and one that is not.
async fn world(env: &SeededEnv) -> World {
    let w = World::new(env).await.unwrap();
    for (name, keys) in [("full", config(&[("volume.full_copy", "true")])), ("plain", Config::new())] {
        let pool = CreatePool { name: name.into(), driver: "dir".into(), config: keys, ..Default::default() };
        done(&w, w.engine.pool_create(&w.admin, pool).await).await;
    }
    let (container, options) = (InstanceKind::Container, ImageOptions::default());
    done(&w, w.engine.image_build(&w.admin, "default", "debian/12", container, options).await).await;
    w
}

fn is_full(w: &World, name: &str) -> bool {
    let root = w.engine.instance(&w.admin, "default", name).unwrap().instance.root;
    w.agent.is_full_copy(root).expect("the host has it")
}

async fn copy(w: &World, to: CreateInstance, refresh: bool) {
    let request = CopyInstance {
        project: "default".into(),
        name: "c1".into(),
        snapshot: None,
        instance_only: false,
        refresh,
        exclude_older: false,
        copy: to,
    };
    let copied = w.engine.instance_copy(&w.admin, "default", request).await;
    done(w, copied.map(|(_, operation)| operation)).await;
}

/// A copy of the volume `v1`.
async fn copy_volume(w: &World, to: &str, copy: CreateVolume) {
    let request = CopyVolume {
        project: "default".into(),
        pool: "plain".into(),
        name: "v1".into(),
        snapshot: None,
        volume_only: false,
        refresh: false,
        exclude_older: false,
        copy,
    };
    done(w, w.engine.volume_copy(&w.admin, "default", to, request).await).await;
}

#[test]
fn roots_are_full_copies_where_their_pool_says_so() {
    SeededEnv::run(1, |env| async move {
        let w = world(&env).await;
        for (name, pool) in [("c1", "plain"), ("c2", "full")] {
            let request = CreateInstance { source: image(), ..in_pool(name, pool) };
            let made = w.engine.instance_create(&w.admin, "default", request).await;
            done(&w, made.map(|(_, operation)| operation)).await;
        }
        assert_eq!((is_full(&w, "c1"), is_full(&w, "c2")), (false, true));
        done(&w, w.engine.instance_rebuild(&w.admin, "default", "c2", image()).await).await;
        assert!(is_full(&w, "c2"), "rebuilt");
        let of = Origin::Instance { project: "default", name: "c1" };
        for _ in 0..2 {
            done(&w, w.engine.snapshot_create(&w.admin, of, CreateSnapshot::default()).await).await;
        }
        // With their snapshots, which are copied one after the other.
        copy(&w, in_pool("c3", "full"), false).await;
        copy(&w, in_pool("c4", "plain"), false).await;
        assert_eq!((is_full(&w, "c3"), is_full(&w, "c4")), (true, false));
        let to = |pool: &str| MoveInstance { pool: Some(pool.into()), ..Default::default() };
        done(&w, w.engine.instance_move(&w.admin, "default", "c4", to("full")).await).await;
        assert!(is_full(&w, "c4"), "moved there");
        done(&w, w.engine.instance_move(&w.admin, "default", "c3", to("plain")).await).await;
        assert!(!is_full(&w, "c3"), "and back");
        // What the pool says counts at the time of the copy.
        let keys = config(&[("volume.full_copy", "true")]);
        let update = UpdatePool { config: keys, ..Default::default() };
        assert!(w.engine.pool_update(&w.admin, "plain", update).await.unwrap().is_none());
        copy(&w, container("c3"), true).await;
        assert!(is_full(&w, "c3"), "refreshed");
        assert!(!is_full(&w, "c1"), "what is there stays as it was made");
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}

#[test]
fn volumes_say_it_for_themselves() {
    SeededEnv::run(2, |env| async move {
        let w = world(&env).await;
        let new = |name: &str, keys: &[(&str, &str)]| CreateVolume {
            name: name.into(),
            content: VolumeContent::Filesystem,
            description: String::new(),
            config: config(keys),
        };
        let find = |pool: &str, name: &str| {
            let all = w.engine.volumes(&w.admin, pool, None).unwrap();
            all.into_iter().find(|v| v.name == name).expect("it is there")
        };
        let is_full = |pool: &str, name: &str| w.agent.is_full_copy(find(pool, name).id).unwrap();
        done(&w, w.engine.volume_create(&w.admin, "default", "plain", new("v1", &[])).await).await;
        done(&w, w.engine.volume_create(&w.admin, "default", "full", new("own", &[])).await).await;
        assert_eq!(find("full", "own").config["full_copy"], "true", "the pool's default becomes its own");
        copy_volume(&w, "plain", new("a", &[])).await;
        copy_volume(&w, "plain", new("b", &[("full_copy", "true")])).await;
        copy_volume(&w, "full", new("c", &[])).await;
        copy_volume(&w, "full", new("d", &[("full_copy", "false")])).await;
        let shown = [("plain", "a"), ("plain", "b"), ("full", "c"), ("full", "d")];
        assert_eq!(shown.map(|(pool, name)| is_full(pool, name)), [false, true, true, false]);
        // It goes along.
        let to = MoveVolume { name: None, pool: Some("full".into()), project: None };
        done(&w, w.engine.volume_move(&w.admin, "default", "plain", "a", to).await).await;
        assert!(is_full("full", "a"));
        let to = MoveVolume { name: None, pool: Some("plain".into()), project: None };
        done(&w, w.engine.volume_move(&w.admin, "default", "full", "d", to).await).await;
        assert!(!is_full("plain", "d"));
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}
