//! What keeps tenants within what they were given: every way in which something comes into a project, or becomes larger there,
//! is asked the same.

use karst_agent::simulated::SimulatedOptions;
use karst_engine::{
    Context, LiveOperation,
    backups::{
        create::CreateBackup,
        import::{ImportInstance, ImportVolume},
    },
    compute::{copy::CopyInstance, create::CreateInstance, relocate::MoveInstance, update::UpdateInstance},
    firewall::{UpdateAcl, UpdateAddressSet, UpdateForward},
    network::{CreateNetwork, UpdateNetwork},
    snapshots::{Origin, create::CreateSnapshot},
    storage::CreatePool,
    tenancy::UpdateProfile,
    volumes::{copy::CopyVolume, create::CreateVolume, relocate::MoveVolume, update::UpdateVolume},
};
use karst_env::SeededEnv;
use karst_model::{
    Config, Error, ErrorKind, PrincipalId, Result,
    access::{Grant, Identity, Permission, Principal, Role},
    device::Devices,
    firewall::AclRule,
    instance::InstanceKind,
    storage::VolumeContent,
};
use karst_testkit::{
    World,
    scenarios::{container, upload},
};
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

async fn done(w: &World, operation: Result<LiveOperation>) -> Result<()> {
    w.ended(operation?).await.error.clone().map_or(Ok(()), Err)
}

async fn create(w: &World, project: &str, request: CreateInstance) -> Result<()> {
    let made = w.engine.instance_create(&w.admin, project, request).await;
    done(w, made.map(|(_, operation)| operation)).await
}

fn volume(name: &str, content: VolumeContent, size: &str) -> CreateVolume {
    let config = config(&[("size", size)]);
    CreateVolume { name: name.into(), content, description: String::new(), config }
}

async fn create_volume(w: &World, project: &str, pool: &str, request: CreateVolume) -> Result<()> {
    done(w, w.engine.volume_create(&w.admin, project, pool, request).await).await
}

async fn snapshot(w: &World, of: Origin<'_>, name: &str) -> Result<()> {
    let request = CreateSnapshot { name: Some(name.into()), ..Default::default() };
    done(w, w.engine.snapshot_create(&w.admin, of, request).await).await
}

async fn back_up(w: &World, of: Origin<'_>) -> Result<()> {
    let request = CreateBackup { name: Some("kept".into()), ..Default::default() };
    let made = w.engine.backup_create(&w.admin, of, request).await;
    done(w, made.map(|(_, operation)| operation)).await
}

/// A copy out of the default project into `to`.
async fn copy(w: &World, to: &str, name: &str, new: &str, only: bool, refresh: bool) -> Result<()> {
    let request = CopyInstance {
        project: "default".into(),
        name: name.into(),
        snapshot: None,
        instance_only: only,
        refresh,
        exclude_older: false,
        copy: container(new),
    };
    let made = w.engine.instance_copy(&w.admin, to, request).await;
    done(w, made.map(|(_, operation)| operation)).await
}

/// The same of a volume, from pool `default` to it.
async fn copy_volume(w: &World, to: &str, name: &str, new: &str, only: bool, refresh: bool) -> Result<()> {
    let copy = CreateVolume {
        name: new.into(),
        content: VolumeContent::Filesystem,
        description: String::new(),
        config: Config::new(),
    };
    let request = CopyVolume {
        project: "default".into(),
        pool: "default".into(),
        name: name.into(),
        snapshot: None,
        volume_only: only,
        refresh,
        exclude_older: false,
        copy,
    };
    done(w, w.engine.volume_copy(&w.admin, to, "default", request).await).await
}

#[track_caller]
fn refused(result: Result<()>, kind: ErrorKind, says: &str) -> Error {
    let e = result.expect_err(says);
    assert_eq!(e.kind, kind, "{e}");
    assert!(e.to_string().contains(says), "{e}");
    e
}

/// `restricted.snapshots=block` would mean little if a tenant could bring them from where he may take them.
#[test]
fn snapshots_do_not_come_along_where_they_are_blocked() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        let of_c1 = Origin::Instance { project: "default", name: "c1" };
        let of_v1 = Origin::Volume { project: "default", pool: "default", name: "v1" };
        create(&w, "default", container("c1")).await.unwrap();
        create_volume(&w, "default", "default", volume("v1", VolumeContent::Filesystem, "1GiB"))
            .await
            .unwrap();
        for of in [of_c1, of_v1] {
            snapshot(&w, of, "s1").await.unwrap();
            back_up(&w, of).await.unwrap();
        }
        project(&w, "p", &[("restricted", "true")]).await;
        let blocked = |what: &str, result: Result<()>| {
            let e = result.expect_err(what);
            assert_eq!(e.kind, ErrorKind::Forbidden, "{what}: {e}");
            assert!(e.message.contains("restricted.snapshots"), "{what}: {e}");
        };
        blocked("a copy", copy(&w, "p", "c1", "c2", false, false).await);
        blocked("a copy of a volume", copy_volume(&w, "p", "v1", "v2", false, false).await);
        // Without them they are welcome, and get none later.
        copy(&w, "p", "c1", "c2", true, false).await.unwrap();
        copy_volume(&w, "p", "v1", "v2", true, false).await.unwrap();
        blocked("a refresh", copy(&w, "p", "c1", "c2", false, true).await);
        blocked("a refresh of a volume", copy_volume(&w, "p", "v1", "v2", false, true).await);
        copy(&w, "p", "c1", "c2", true, true).await.unwrap();
        let import =
            ImportInstance { upload: upload(&w, of_c1).await.unwrap(), name: Some("c3".into()), pool: None };
        blocked("an import", done(&w, w.engine.instance_import(&w.admin, "p", import).await).await);
        let import =
            ImportVolume { upload: upload(&w, of_v1).await.unwrap(), name: Some("v3".into()), disc: false };
        let imported = w.engine.volume_import(&w.admin, "p", "default", import).await;
        blocked("an import of a volume", done(&w, imported).await);
        let to_p = MoveInstance { project: Some("p".into()), ..Default::default() };
        let moved = w.engine.instance_move(&w.admin, "default", "c1", to_p).await;
        blocked("a move", done(&w, moved).await);
        let to_p = MoveVolume { name: None, pool: None, project: Some("p".into()) };
        let moved = w.engine.volume_move(&w.admin, "default", "default", "v1", to_p).await;
        blocked("a move of a volume", done(&w, moved).await);
        let records = w.engine.inner().inventory.read();
        assert_eq!(
            (records.snapshots.len(), records.volume_snapshots.len()),
            (1, 1),
            "those of the originals"
        );
        drop(records);
        w.engine.close();
    });
}

/// What a project uses of a limit.
fn used(w: &World, project: &str, limit: &str) -> u64 {
    let state = w.engine.project_state(&w.admin, project).unwrap();
    state.iter().find(|(name, ..)| name == limit).map(|(.., used)| *used).unwrap()
}

async fn second_pool(w: &World) {
    let pool = CreatePool { name: "second".into(), driver: "dir".into(), ..Default::default() };
    done(w, w.engine.pool_create(&w.admin, pool).await).await.unwrap();
}

async fn resize(w: &World, project: &str, name: &str, size: &str) -> Result<()> {
    let update =
        UpdateVolume { description: String::new(), config: config(&[("size", size)]), if_version: None };
    done(w, w.engine.volume_update(&w.admin, project, "default", name, update).await).await
}

async fn move_volume(w: &World, from: &str, name: &str, pool: &str, to: &str) -> Result<()> {
    let request = MoveVolume { name: None, pool: Some(pool.into()), project: Some(to.into()) };
    done(w, w.engine.volume_move(&w.admin, from, "default", name, request).await).await
}

/// Ways of getting bytes: what it is, and what is asked of the project of that name.
const WAYS: &[&str] = &[
    "create-volume",
    "grow-volume",
    "copy-volume",
    "refresh-volume",
    "restore-volume",
    "import-volume",
    "move-volume",
    "move-pool",
    "copy-machine",
    "refresh-machine",
    "import-machine",
    "move-machine",
];

/// Does one of [`WAYS`] in the project of its name, which has 14 GiB, of pool `second` 2 GiB. What comes from the default
/// project has 15 GiB.
async fn get_more(w: &World, way: &str) -> Result<()> {
    let block = |name: &str, size: &str| volume(name, VolumeContent::Block, size);
    let own = |name: &'static str| Origin::Volume { project: "restore-volume", pool: "default", name };
    match way {
        "create-volume" => create_volume(w, way, "default", block("v", "15GiB")).await,
        "grow-volume" => {
            create_volume(w, way, "default", block("v", "1GiB")).await?;
            resize(w, way, "v", "15GiB").await
        }
        "copy-volume" => copy_volume(w, way, "src", "v", true, false).await,
        "refresh-volume" => {
            create_volume(w, way, "default", block("v", "1GiB")).await?;
            copy_volume(w, way, "src", "v", true, true).await
        }
        "restore-volume" => {
            create_volume(w, way, "default", volume("v", VolumeContent::Filesystem, "10GiB")).await?;
            snapshot(w, own("v"), "s1").await?;
            resize(w, way, "v", "1GiB").await?;
            create_volume(w, way, "default", volume("rest", VolumeContent::Filesystem, "9GiB")).await?;
            done(w, w.engine.snapshot_restore(&w.admin, own("v"), "s1").await).await
        }
        "import-volume" => {
            let of = Origin::Volume { project: "default", pool: "default", name: "src" };
            let import = ImportVolume { upload: upload(w, of).await?, name: Some("v".into()), disc: false };
            done(w, w.engine.volume_import(&w.admin, way, "default", import).await).await
        }
        "move-volume" => move_volume(w, "default", "src", "default", way).await,
        "move-pool" => {
            create_volume(w, way, "default", block("v", "3GiB")).await?;
            move_volume(w, way, "v", "second", way).await
        }
        "copy-machine" => copy(w, way, "big", "m", true, false).await,
        "refresh-machine" => {
            let kind = InstanceKind::VirtualMachine;
            create(w, way, CreateInstance { kind, ..container("m") }).await?;
            copy(w, way, "big", "m", true, true).await
        }
        "import-machine" => {
            let upload = upload(w, Origin::Instance { project: "default", name: "big" }).await?;
            let import = ImportInstance { upload, name: Some("m".into()), pool: None };
            done(w, w.engine.instance_import(&w.admin, way, import).await).await
        }
        "move-machine" => {
            let request = MoveInstance { project: Some(way.into()), ..Default::default() };
            done(w, w.engine.instance_move(&w.admin, "default", "big", request).await).await
        }
        other => panic!("{other}"),
    }
}

/// The size of what comes stands in a profile, as people have it, and the profile of that name in the project says none.
#[test]
fn no_way_leads_past_the_limit_of_bytes() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        second_pool(&w).await;
        let mut root = w.engine.profile(&w.admin, "default", "default").unwrap().devices.clone();
        root.retain(|name, _| name == "root");
        let large = |size: Option<&str>| {
            let mut devices = root.clone();
            let keys = devices.get_mut("root").unwrap();
            keys.extend(size.map(|s| ("size".to_owned(), s.to_owned())));
            UpdateProfile { devices, ..Default::default() }
        };
        w.engine.profile_create(&w.admin, "default", "large", large(Some("15GiB"))).await.unwrap();
        for way in WAYS {
            project(&w, way, &[("limits.disk", "14GiB"), ("limits.disk.pool.second", "2GiB")]).await;
            w.engine.profile_create(&w.admin, way, "large", large(None)).await.unwrap();
        }
        let profiles = Some(vec!["default".into(), "large".into()]);
        let kind = InstanceKind::VirtualMachine;
        create(&w, "default", CreateInstance { kind, profiles, ..container("big") }).await.unwrap();
        create_volume(&w, "default", "default", volume("src", VolumeContent::Block, "15GiB")).await.unwrap();
        back_up(&w, Origin::Instance { project: "default", name: "big" }).await.unwrap();
        back_up(&w, Origin::Volume { project: "default", pool: "default", name: "src" }).await.unwrap();
        for way in WAYS {
            refused(get_more(&w, way).await, ErrorKind::Quota, "limits.disk");
            // What the host has is what is counted, and both are within the limit.
            let limit = (14 << 30, 2 << 30);
            let now = (used(&w, way, "disk"), used(&w, way, "disk.pool.second"));
            assert!(now.0 <= limit.0 && now.1 <= limit.1, "{way}: {now:?}");
            let view = karst_model::access::Permission::ProjectView;
            let id = w.engine.project(&w.admin, way, view).unwrap().id;
            let records = w.engine.inner().inventory.read();
            let all = records.volumes.values().filter(|v| v.project == id);
            let bytes: u64 = all.filter_map(|v| v.size).map(|size| size.0).sum();
            assert!(bytes <= limit.0, "{way}: {bytes}");
        }
        w.settle().await;
        assert_eq!(w.engine.inner().inventory.read().sagas.len(), 0);
        w.engine.close();
    });
}

/// A pool that the project may not use is none that its volumes are moved to.
#[test]
fn a_volume_moves_only_to_a_pool_that_its_project_may_use() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        second_pool(&w).await;
        let keys = [("restricted", "true"), ("restricted.storage-pools.access", "default")];
        project(&w, "p", &keys).await;
        create_volume(&w, "p", "default", volume("v", VolumeContent::Block, "1GiB")).await.unwrap();
        let e = refused(
            move_volume(&w, "p", "v", "second", "p").await,
            ErrorKind::Forbidden,
            "restricted.storage-pools.access",
        );
        assert_eq!(e.field.as_deref(), Some("pool"));
        w.engine.custom_volume(&w.admin, "p", "default", "v").unwrap();
        w.engine.close();
    });
}

/// Each alone would fit. They come from other pools, so that both are on their way at the same time.
#[test]
fn of_two_that_move_into_a_project_at_once_one_gets_the_last_room() {
    for seed in 1..=8 {
        SeededEnv::run(seed, |env| async move {
            let latency = (Duration::from_millis(1), Duration::from_millis(20));
            let options = SimulatedOptions { latency, ..Default::default() };
            let w = World::with(&env, options).await.unwrap();
            second_pool(&w).await;
            project(&w, "p", &[("limits.disk", "10GiB")]).await;
            project(&w, "q", &[("limits.instances", "1")]).await;
            for name in ["x", "y"] {
                create_volume(&w, "default", "default", volume(name, VolumeContent::Block, "8GiB"))
                    .await
                    .unwrap();
                create(&w, "default", container(name)).await.unwrap();
            }
            let moves = (
                move_volume(&w, "default", "x", "second", "p"),
                move_volume(&w, "default", "y", "second", "p"),
            );
            let (x, y) = futures::join!(moves.0, moves.1);
            assert!(x.is_ok() != y.is_ok(), "seed {seed}: {x:?} {y:?}");
            refused(x.and(y), ErrorKind::Quota, "limits.disk");
            assert_eq!(used(&w, "p", "disk"), 8 << 30, "seed {seed}");
            let instance = async |name: &str| {
                let (pool, project) = (Some("second".into()), Some("q".into()));
                let request = MoveInstance { pool, project, ..Default::default() };
                done(&w, w.engine.instance_move(&w.admin, "default", name, request).await).await
            };
            let (x, y) = futures::join!(instance("x"), instance("y"));
            assert!(x.is_ok() != y.is_ok(), "seed {seed}: {x:?} {y:?}");
            refused(x.and(y), ErrorKind::Quota, "limits.instances");
            assert_eq!(used(&w, "q", "instances"), 1, "seed {seed}");
            w.settle().await;
            assert_eq!(w.faults().await, Vec::<String>::new());
            w.engine.close();
        });
    }
}

/// The address `n` of the network's subnet.
fn address(w: &World, n: u32) -> String {
    let network = w.engine.network(&w.admin, "default", "karstbr0").unwrap();
    let subnet = network.bridge().unwrap().ipv4.unwrap();
    std::net::Ipv4Addr::from(u32::from(subnet.network()) + n).to_string()
}

fn nic(keys: &[(&str, &str)]) -> Devices {
    let mut nic = config(&[("type", "nic"), ("network", "karstbr0")]);
    nic.extend(config(keys));
    Devices::from([("eth0".into(), nic)])
}

fn with_nic(name: &str, keys: &[(&str, &str)]) -> CreateInstance {
    CreateInstance { devices: nic(keys), ..container(name) }
}

/// Changes keys of the network that all share.
async fn set_network(w: &World, keys: &[(&str, &str)]) -> Result<()> {
    let mut all = w.engine.network(&w.admin, "default", "karstbr0").unwrap().config.clone();
    all.extend(config(keys));
    let request = UpdateNetwork { description: String::new(), config: all, if_version: None };
    done(w, w.engine.network_update(&w.admin, "default", "karstbr0", request).await).await
}

/// The ways in which a NIC comes about or changes.
const EDITS: &[&str] = &["create", "edit", "configure", "profile", "copy", "move"];

/// Writes keys of a NIC into something of project `p` whose instance `mine` has its NIC of the profile `nics`.
async fn write_nic(w: &World, way: &str, keys: &[(&str, &str)]) -> Result<()> {
    let (e, c) = (&w.engine, &w.admin);
    let update = || UpdateInstance {
        description: String::new(),
        ephemeral: false,
        config: Config::new(),
        devices: nic(keys),
        profiles: vec!["default".into(), "nics".into()],
        if_version: None,
    };
    match way {
        "create" => create(w, "p", with_nic("new", keys)).await,
        "edit" => done(w, e.instance_update(c, "p", "mine", update()).await).await,
        "configure" => done(w, e.instance_configure(c, "p", "mine", update()).await).await,
        "profile" => {
            let update = UpdateProfile { devices: nic(keys), ..Default::default() };
            e.profile_update(c, "p", "nics", update).await
        }
        "copy" => {
            let request = CopyInstance {
                project: "p".into(),
                name: "mine".into(),
                snapshot: None,
                instance_only: true,
                refresh: false,
                exclude_older: false,
                copy: with_nic("new", keys),
            };
            done(w, e.instance_copy(c, "p", request).await.map(|(_, operation)| operation)).await
        }
        "move" => {
            let request = MoveInstance { name: Some("new".into()), devices: nic(keys), ..Default::default() };
            done(w, e.instance_move(c, "p", "mine", request).await).await
        }
        other => panic!("{other}"),
    }
}

/// What NICs say becomes addresses and routes of the host: whoever says it, in whatever way, gets no more than the network gives,
/// and nothing of another's.
#[test]
fn no_nic_takes_what_is_the_hosts_or_anothers() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        project(&w, "p", &[("restricted", "true")]).await;
        project(&w, "theirs", &[]).await;
        let profile = UpdateProfile { devices: nic(&[]), ..Default::default() };
        w.engine.profile_create(&w.admin, "p", "nics", profile).await.unwrap();
        let profiles = Some(vec!["default".into(), "nics".into()]);
        create(&w, "p", CreateInstance { profiles, ..container("mine") }).await.unwrap();
        set_network(&w, &[("ipv4.routes", "192.0.2.0/24")]).await.unwrap();
        let (fixed, mac) = (address(&w, 60), "10:66:6a:00:00:60");
        let keys = [("ipv4.address", fixed.as_str()), ("hwaddr", mac), ("ipv4.routes", "192.0.2.64/26")];
        create(&w, "theirs", with_nic("victim", &keys)).await.unwrap();
        let network = w.engine.network(&w.admin, "default", "karstbr0").unwrap();
        let (own, invalid, conflict) = (address(&w, 1), ErrorKind::Invalid, ErrorKind::Conflict);
        w.settle().await;
        let before = (w.fingerprint(), w.agent.network_hosts(network.id));
        for (key, value, kind) in [
            ("ipv4.routes", "1.1.1.1/32", invalid),
            ("ipv4.routes", "0.0.0.0/1", invalid),
            ("ipv4.routes", "192.0.0.0/16", invalid),
            ("ipv6.routes", "2001:db8::/32", invalid),
            ("ipv4.routes.external", "1.1.1.1/32", invalid),
            ("ipv4.address", "10.99.99.99", invalid),
            ("ipv4.address", own.as_str(), invalid),
            ("ipv6.address", "2001:db8::9", invalid),
            ("parent", "karstbr0", invalid),
            ("security.acls", "none-such", ErrorKind::NotFound),
            ("ipv4.address", fixed.as_str(), conflict),
            ("hwaddr", mac, conflict),
            // Also a part of what is another's.
            ("ipv4.routes", "192.0.2.70/32", conflict),
            ("ipv4.routes", "192.0.2.0/25", conflict),
        ] {
            for way in EDITS {
                let e = write_nic(&w, way, &[(key, value)]).await.expect_err(way);
                let field = format!("devices.eth0.{key}");
                assert_eq!((e.kind, e.field), (kind, Some(field)), "{way}: {key}={value}: {}", e.message);
                assert!(!e.message.contains("victim"), "{way}: {}", e.message);
            }
        }
        w.settle().await;
        assert_eq!((w.fingerprint(), w.agent.network_hosts(network.id)), before, "nothing has changed");
        // What the network gives and nobody has.
        for way in EDITS.iter().filter(|way| ["edit", "profile"].contains(way)) {
            write_nic(&w, way, &[("ipv4.routes", "192.0.2.0/26"), ("ipv4.address", &address(&w, 61))])
                .await
                .unwrap();
        }
        // A network keeps what its guests have of it.
        let e = refused(set_network(&w, &[("ipv4.routes", "192.0.2.0/26")]).await, conflict, "192.0.2.64/26");
        assert_eq!(e.field.as_deref(), Some("config.ipv4.routes"));
        w.engine.close();
    });
}

fn device(keys: &[(&str, &str)]) -> std::collections::BTreeMap<String, String> {
    config(keys)
}

/// Names of the devices that a guest has, beside its root, and the MAC addresses of its NICs.
fn has(w: &World, name: &str) -> (Vec<String>, Vec<String>) {
    let id = w.engine.instance(&w.admin, "default", name).unwrap().instance.id;
    let spec = w.agent.guest_spec(id).expect("a guest");
    let disks = spec.disks.iter().map(|d| d.name.clone());
    let mut names: Vec<_> = disks.chain(spec.nics.iter().map(|n| n.name.clone())).collect();
    names.sort();
    (names, spec.nics.iter().map(|n| n.mac.clone()).collect())
}

async fn set_profile(w: &World, name: &str, devices: &Devices) -> Result<()> {
    let update = UpdateProfile { devices: devices.clone(), ..Default::default() };
    w.engine.profile_update(&w.admin, "default", name, update).await
}

#[test]
fn devices_of_a_profile_come_to_all_its_running_users_or_to_none() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        let (e, c) = (&w.engine, &w.admin);
        e.profile_create(c, "default", "extra", UpdateProfile::default()).await.unwrap();
        create_volume(&w, "default", "default", volume("shared", VolumeContent::Filesystem, "1GiB"))
            .await
            .unwrap();
        let profiles = || Some(vec!["default".into(), "extra".into()]);
        for name in ["c0", "c1", "c2", "stopped"] {
            let start = name != "stopped";
            create(&w, "default", CreateInstance { start, profiles: profiles(), ..container(name) })
                .await
                .unwrap();
        }
        let disk = device(&[("type", "disk"), ("pool", "default"), ("source", "shared"), ("path", "/srv")]);
        let more = Devices::from([("data".into(), disk), ("eth1".into(), nic(&[])["eth0"].clone())]);
        let network = e.network(c, "default", "karstbr0").unwrap().id;
        set_profile(&w, "extra", &more).await.unwrap();
        for name in ["c0", "c1", "c2"] {
            let (names, macs) = has(&w, name);
            assert_eq!(names, ["data", "eth0", "eth1"], "{name}");
            // They are the same ones when it starts again, and the host knows them.
            let view = e.instance(c, "default", name).unwrap();
            assert_eq!(view.instance.identities["eth1"].mac.as_ref(), macs.get(1), "{name}");
            let known: Vec<_> = w.agent.network_hosts(network).into_iter().map(|h| h.mac).collect();
            assert!(macs.iter().all(|mac| known.contains(mac)), "{name}: {macs:?} {known:?}");
            assert_eq!(e.instance_pending(c, "default", name).unwrap(), [], "{name}");
        }
        // One of them will not give them back: it is named, and all keep them.
        let stubborn = e.instance(c, "default", "c1").unwrap().instance.id;
        w.agent.set_refuses_update(stubborn, true);
        let before = ["c0", "c1", "c2"].map(|name| has(&w, name));
        refused(
            set_profile(&w, "extra", &Devices::new()).await,
            ErrorKind::Conflict,
            "instance \"c1\" refuses",
        );
        assert_eq!(["c0", "c1", "c2"].map(|name| has(&w, name)), before);
        assert_eq!(e.profile(c, "default", "extra").unwrap().devices, more);
        w.agent.set_refuses_update(stubborn, false);
        // Who is a virtual machine cannot have a node: said at once, of one that is stopped too.
        let kind = InstanceKind::VirtualMachine;
        create(&w, "default", CreateInstance { kind, profiles: profiles(), ..container("v1") })
            .await
            .unwrap();
        let mut node = more.clone();
        node.insert("node".into(), device(&[("type", "unix-char"), ("path", "/dev/fuse")]));
        let e1 = refused(set_profile(&w, "extra", &node).await, ErrorKind::Unsupported, "instance \"v1\"");
        assert_eq!(e1.field.as_deref(), Some("devices.node.type"));
        assert_eq!(["c0", "c1", "c2"].map(|name| has(&w, name)), before);
        set_profile(&w, "extra", &Devices::new()).await.unwrap();
        assert_eq!(["c0", "c1", "c2"].map(|name| has(&w, name).0), [["eth0"]; 3]);
        w.settle().await;
        assert_eq!(w.faults().await, Vec::<String>::new());
        w.engine.close();
    });
}

#[test]
fn machines_get_of_a_profile_what_they_can_take_while_they_run() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        let (e, c) = (&w.engine, &w.admin);
        let root =
            |size: &str| device(&[("type", "disk"), ("path", "/"), ("pool", "default"), ("size", size)]);
        let of = |size: &str, more: &[(&str, &[(&str, &str)])]| {
            let more = more.iter().map(|(name, keys)| (name.to_string(), device(keys)));
            Devices::from([("root".to_owned(), root(size))]).into_iter().chain(more).collect::<Devices>()
        };
        let profile = UpdateProfile { devices: of("10GiB", &[]), ..Default::default() };
        e.profile_create(c, "default", "machine", profile).await.unwrap();
        for (name, start) in [("v1", true), ("v2", false)] {
            let (kind, profiles) =
                (InstanceKind::VirtualMachine, Some(vec!["default".into(), "machine".into()]));
            create(&w, "default", CreateInstance { kind, start, profiles, ..container(name) }).await.unwrap();
        }
        for (name, content) in [("shared", VolumeContent::Filesystem), ("block", VolumeContent::Block)] {
            create_volume(&w, "default", "default", volume(name, content, "1GiB")).await.unwrap();
        }
        let size = |name: &str| {
            let root = e.instance(c, "default", name).unwrap().instance.root;
            e.inner().inventory.read().volumes[&root].size.map(|size| size.0 >> 30)
        };
        // Roots grow, of those that run and of those that do not, and never shrink.
        set_profile(&w, "machine", &of("20GiB", &[])).await.unwrap();
        assert_eq!((size("v1"), size("v2")), (Some(20), Some(20)));
        let e1 =
            refused(set_profile(&w, "machine", &of("15GiB", &[])).await, ErrorKind::Invalid, "cannot shrink");
        assert_eq!(e1.field.as_deref(), Some("devices.root.size"));
        // What a machine takes only when it starts.
        let disk: &[(&str, &str)] =
            &[("type", "disk"), ("pool", "default"), ("source", "shared"), ("path", "/srv")];
        let before = has(&w, "v1");
        let tried = set_profile(&w, "machine", &of("30GiB", &[("data", disk)])).await;
        let e1 =
            refused(tried, ErrorKind::Conflict, "instance \"v1\" cannot take the change of device \"data\"");
        assert_eq!(e1.field.as_deref(), Some("devices.data"));
        assert_eq!((has(&w, "v1"), size("v1")), (before, Some(20)));
        assert_eq!(e.profile(c, "default", "machine").unwrap().devices, of("20GiB", &[]));
        // A block volume is one machine's.
        let disk: &[(&str, &str)] = &[("type", "disk"), ("pool", "default"), ("source", "block")];
        let tried = set_profile(&w, "machine", &of("20GiB", &[("data", disk)])).await;
        refused(tried, ErrorKind::Conflict, "security.shared");
        w.settle().await;
        assert_eq!(w.faults().await, Vec::<String>::new());
        w.engine.close();
    });
}

/// What users of a profile get counts: also their roots, as they are to be.
#[test]
fn a_profile_makes_no_root_larger_than_its_project_has_room_for() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        project(&w, "p", &[("limits.disk", "25GiB")]).await;
        for (name, start) in [("v1", true), ("v2", false)] {
            let request = CreateInstance { kind: InstanceKind::VirtualMachine, start, ..container(name) };
            create(&w, "p", request).await.unwrap();
        }
        let larger = async |size: &str| {
            let mut devices = w.engine.profile(&w.admin, "p", "default").unwrap().devices.clone();
            devices.get_mut("root").unwrap().insert("size".into(), size.into());
            let update = UpdateProfile { devices, ..Default::default() };
            w.engine.profile_update(&w.admin, "p", "default", update).await
        };
        refused(larger("13GiB").await, ErrorKind::Quota, "limits.disk");
        assert_eq!(used(&w, "p", "disk"), 20 << 30);
        larger("12GiB").await.unwrap();
        assert_eq!(used(&w, "p", "disk"), 24 << 30);
        w.engine.close();
    });
}

/// Who has a role in one project and nowhere else.
fn somebody(w: &World, project: &str) -> Context {
    let view = Permission::ProjectView;
    let id = w.engine.project(&w.admin, project, view).unwrap().id;
    let grants = vec![Grant { role: Role::Operator, project: Some(id) }];
    let identity = Identity::Token { name: "tenant".into(), address: String::new() };
    Context::new(Principal::of(PrincipalId(uuid::Uuid::from_u128(99)), identity, grants))
}

/// What a project may not use it does not see: it answers as what is nowhere.
#[test]
fn a_restricted_project_sees_of_what_all_share_what_it_may_use() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        second_pool(&w).await;
        let (e, c) = (&w.engine, &w.admin);
        for (name, subnet) in [("acmebr", "10.71.1.1/24"), ("betabr", "10.71.2.1/24")] {
            let config = config(&[("ipv4.address", subnet), ("ipv6.address", "none")]);
            let request = CreateNetwork { name: name.into(), config, ..Default::default() };
            let made = e.network_create(c, "default", request).await;
            done(&w, made.map(|(_, operation)| operation)).await.unwrap();
        }
        for set in ["ours", "theirs"] {
            let new = UpdateAddressSet { addresses: vec!["192.0.2.0/28".into()], ..Default::default() };
            e.address_set_create(c, "default", set, new).await.unwrap();
            let source = format!("${set}");
            let rule =
                AclRule { action: "allow".into(), source, state: "enabled".into(), ..Default::default() };
            let new = UpdateAcl { ingress: vec![rule], ..Default::default() };
            e.acl_create(c, "default", &format!("{set}-acl"), new).await.unwrap();
        }
        project(&w, "free", &[]).await;
        for (name, keys) in [
            (
                "acme",
                &[("restricted.networks.access", "acmebr"), ("restricted.storage-pools.access", "default")][..],
            ),
            ("none", &[("restricted.devices.nic", "block"), ("limits.disk.pool.second", "0")][..]),
        ] {
            let mut keys = config(keys);
            keys.insert("restricted".into(), "true".into());
            e.project_create(c, name, "", keys).await.unwrap();
        }
        let mut own = nic(&[("security.acls", "ours-acl")]);
        own.get_mut("eth0").unwrap().insert("network".into(), "acmebr".into());
        let own = UpdateProfile { devices: own, ..Default::default() };
        e.profile_update(c, "acme", "default", own).await.unwrap();
        let forward =
            UpdateForward { config: config(&[("target_address", "10.71.1.9")]), ..Default::default() };
        e.forward_create(c, "default", "acmebr", "198.51.100.9", forward).await.unwrap();
        for (name, networks, acls, sets, pools) in [
            ("acme", &["acmebr"][..], &["ours-acl"][..], &["ours"][..], &["default"][..]),
            ("none", &[], &[], &[], &["default"]),
            (
                "free",
                &["acmebr", "betabr", "karstbr0"],
                &["ours-acl", "theirs-acl"],
                &["ours", "theirs"],
                &["default", "second"],
            ),
        ] {
            let tenant = somebody(&w, name);
            let seen: Vec<_> =
                e.networks(&tenant, name).unwrap().iter().map(|n| n.name.to_string()).collect();
            assert_eq!(seen, networks, "{name}");
            let seen: Vec<_> = e.acls(&tenant, name).unwrap().iter().map(|n| n.name.to_string()).collect();
            assert_eq!(seen, acls, "{name}");
            let seen: Vec<_> =
                e.address_sets(&tenant, name).unwrap().iter().map(|n| n.name.to_string()).collect();
            assert_eq!(seen, sets, "{name}");
            let seen: Vec<_> = e.pools(&tenant).unwrap().iter().map(|n| n.name.to_string()).collect();
            assert_eq!(seen, pools, "{name}");
            for (there, nowhere) in [("betabr", "zetabr"), ("karstbr0", "karstbr9")] {
                if networks.contains(&there) {
                    continue;
                }
                let said = |name: &str, e: Error| (e.kind, e.message.replace(name, "X"));
                let ask = async |which: &str| {
                    vec![
                        e.network(&tenant, name, which).map(drop).unwrap_err(),
                        e.network_state(&tenant, name, which).await.map(drop).unwrap_err(),
                        e.network_leases(&tenant, name, which).await.map(drop).unwrap_err(),
                        e.forwards(&tenant, name, which).await.map(drop).unwrap_err(),
                    ]
                };
                let real = ask(there).await.into_iter().map(|e| said(there, e)).collect::<Vec<_>>();
                let none = ask(nowhere).await.into_iter().map(|e| said(nowhere, e)).collect::<Vec<_>>();
                assert_eq!(real, none, "{name}: {there}");
            }
        }
        let tenant = somebody(&w, "acme");
        assert_eq!(e.acl(&tenant, "acme", "theirs-acl").unwrap_err().kind, ErrorKind::NotFound);
        assert_eq!(e.address_set(&tenant, "acme", "theirs").unwrap_err().kind, ErrorKind::NotFound);
        // Nor does it get to see one by naming it.
        let name_it = async |acl: &str| {
            let devices = nic(&[("network", "acmebr"), ("security.acls", acl)]);
            let request = CreateInstance { devices: devices.clone(), ..container("namer") };
            let made = e.instance_create(&tenant, "acme", request).await.map(drop);
            let update = UpdateProfile { devices, ..Default::default() };
            [made, e.profile_update(&tenant, "acme", "default", update).await]
        };
        for (there, nowhere) in name_it("theirs-acl").await.into_iter().zip(name_it("no-acl").await) {
            let (e1, e2) = (there.unwrap_err(), nowhere.unwrap_err());
            assert_eq!(
                (e1.kind, e1.field.as_deref()),
                (ErrorKind::NotFound, Some("devices.eth0.security.acls"))
            );
            assert_eq!((e2.kind, e2.message), (e1.kind, e1.message.replace("theirs-acl", "no-acl")));
        }
        assert_eq!(e.pool(&tenant, "second").unwrap_err().kind, ErrorKind::NotFound);
        // Where a forward leads is told to who sees the guest, and to who sees the project that it is in.
        let target = async |context: &Context, project: &str| {
            let forward = e.forward(context, project, "acmebr", "198.51.100.9").await.unwrap();
            forward.config.get("target_address").cloned()
        };
        assert_eq!(target(&tenant, "acme").await, None);
        assert_eq!(target(c, "default").await.as_deref(), Some("10.71.1.9"));
        let keys = [("network", "acmebr"), ("ipv4.address", "10.71.1.9")];
        let request = CreateInstance { start: true, ..with_nic("mine", &keys) };
        let mut devices = request.devices.clone();
        devices.insert("root".into(), device(&[("type", "disk"), ("path", "/"), ("pool", "default")]));
        create(&w, "acme", CreateInstance { devices, ..request }).await.unwrap();
        assert_eq!(target(&tenant, "acme").await.as_deref(), Some("10.71.1.9"));
        w.engine.close();
    });
}

/// A bridge is one wire for all who are on it: who is restricted sends there as himself only, whatever his NIC says.
#[test]
fn guests_of_restricted_projects_do_not_forge_senders() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        let (e, c) = (&w.engine, &w.admin);
        project(&w, "p", &[("restricted", "true")]).await;
        let network = e.network(c, "default", "karstbr0").unwrap().id;
        // Of each kind: bound to the NIC of a profile that says nothing, and free.
        create(&w, "default", CreateInstance { start: true, ..container("free") }).await.unwrap();
        create(&w, "p", CreateInstance { start: true, ..container("bound") }).await.unwrap();
        let filters = |project: &str, name: &str| {
            let view = e.instance(c, project, name).unwrap();
            let mac = view.instance.identities["eth0"].mac.clone().unwrap();
            let host = w.agent.network_hosts(network).into_iter().find(|h| h.mac == mac).expect("a guest");
            let port = host.port.expect("a port");
            (port.mac_filter, port.ipv4_filter, port.ipv6_filter)
        };
        assert_eq!(
            (filters("default", "free"), filters("p", "bound")),
            ((false, false, false), (true, true, true))
        );
        for key in ["security.mac_filtering", "security.ipv4_filtering", "security.ipv6_filtering"] {
            for way in ["create", "edit", "profile"] {
                let keys = [(key, "false")];
                let tried = match way {
                    "create" => create(&w, "p", with_nic("new", &keys)).await,
                    "edit" => {
                        let update = UpdateInstance {
                            description: String::new(),
                            ephemeral: false,
                            config: Config::new(),
                            devices: nic(&keys),
                            profiles: vec!["default".into()],
                            if_version: None,
                        };
                        done(&w, e.instance_update(c, "p", "bound", update).await).await
                    }
                    _ => {
                        let mut devices = e.profile(c, "p", "default").unwrap().devices.clone();
                        devices.extend(nic(&keys));
                        let update = UpdateProfile { devices, ..Default::default() };
                        e.profile_update(c, "p", "default", update).await
                    }
                };
                let e1 = refused(tried, ErrorKind::Forbidden, "restricted.networks.spoofing");
                assert_eq!(e1.field, Some(format!("devices.eth0.{key}")), "{way}");
            }
        }
        // The administrator decides otherwise, and at once.
        let set = async |value: &str| {
            let mut all = e.project(c, "p", Permission::ProjectView).unwrap().config.clone();
            all.insert("restricted.networks.spoofing".into(), value.into());
            e.project_update(c, "p", "", all, None).await.unwrap();
            w.settle().await;
        };
        set("ipv6").await;
        assert_eq!(filters("p", "bound"), (true, true, false));
        set("allow").await;
        assert_eq!(filters("p", "bound"), (false, false, false));
        set("block").await;
        assert_eq!(filters("p", "bound"), (true, true, true));
        w.engine.close();
    });
}
