//! Projects that share the custom volumes of the default project, and settings that a project has otherwise than the server.

use karst_engine::{
    Context, LiveOperation,
    compute::create::CreateInstance,
    snapshots::{Origin, create::CreateSnapshot},
    tenancy::UpdateProfile,
    volumes::{copy::CopyVolume, create::CreateVolume, relocate::MoveVolume, update::UpdateVolume, users},
};
use karst_env::SeededEnv;
use karst_model::{
    Config, Error, ErrorKind, PrincipalId, Result,
    access::{Grant, Identity, Permission, Principal, Role},
    device::Devices,
    storage::VolumeContent,
};
use karst_testkit::{World, scenarios::container};

const LENT: &str = "features.storage.volumes";

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

async fn set(w: &World, project: &str, keys: &[(&str, &str)]) -> Result<()> {
    let mut all = w.engine.project(&w.admin, project, Permission::ProjectView)?.config.clone();
    all.extend(config(keys));
    w.engine.project_update(&w.admin, project, "", all, None).await
}

async fn done(w: &World, operation: Result<LiveOperation>) -> Result<()> {
    w.ended(operation?).await.error.clone().map_or(Ok(()), Err)
}

fn volume(name: &str) -> CreateVolume {
    let config = config(&[("size", "1GiB")]);
    CreateVolume { name: name.into(), content: VolumeContent::Filesystem, description: String::new(), config }
}

async fn make(w: &World, context: &Context, project: &str, name: &str) -> Result<()> {
    done(w, w.engine.volume_create(context, project, "default", volume(name)).await).await
}

fn with_volume(name: &str, volume: &str) -> CreateInstance {
    let disk = config(&[("type", "disk"), ("pool", "default"), ("source", volume), ("path", "/srv")]);
    CreateInstance { devices: Devices::from([("data".into(), disk)]), ..container(name) }
}

async fn create(w: &World, context: &Context, project: &str, request: CreateInstance) -> Result<()> {
    let made = w.engine.instance_create(context, project, request).await;
    done(w, made.map(|(_, operation)| operation)).await
}

/// Somebody who operates these projects and nothing else.
fn somebody(w: &World, projects: &[&str]) -> Context {
    let grants = projects.iter().map(|name| {
        let project = w.engine.project(&w.admin, name, Permission::ProjectView).unwrap().id;
        Grant { role: Role::Operator, project: Some(project) }
    });
    let identity = Identity::Token { name: "tenant".into(), address: String::new() };
    Context::new(Principal::of(PrincipalId(uuid::Uuid::from_u128(99)), identity, grants.collect()))
}

#[track_caller]
fn refused<T>(result: Result<T>, kind: ErrorKind, says: &str) -> Error {
    let e = result.err().expect(says);
    assert_eq!(e.kind, kind, "{e}");
    assert!(e.to_string().contains(says), "{e}");
    e
}

/// Names of the custom volumes of a project.
fn custom(w: &World, context: &Context, project: Option<&str>) -> Vec<String> {
    let all = w.engine.volumes(context, "default", project).unwrap();
    let mut names: Vec<_> = all
        .iter()
        .filter(|v| v.owner == karst_model::storage::VolumeOwner::Custom)
        .map(|v| v.name.clone())
        .collect();
    names.sort();
    names
}

#[test]
fn a_project_may_share_the_custom_volumes_of_the_default_project() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        let (e, c) = (&w.engine, &w.admin);
        project(&w, "own", &[]).await;
        project(&w, "lean", &[(LENT, "false")]).await;
        make(&w, c, "own", "mine").await.unwrap();
        make(&w, c, "default", "v").await.unwrap();
        // Made from there it is the default project's, and counts there: 1 GiB each, and 3 of them.
        make(&w, c, "lean", "w").await.unwrap();
        make(&w, c, "lean", "x").await.unwrap();
        refused(make(&w, c, "lean", "v").await, ErrorKind::Conflict, "exists already");
        for place in ["default", "lean"] {
            assert_eq!(custom(&w, c, Some(place)), ["v", "w", "x"], "{place}");
            assert_eq!(
                e.custom_volume(c, place, "default", "w").unwrap().project,
                e.project(c, "default", Permission::ProjectView).unwrap().id
            );
        }
        assert_eq!(custom(&w, c, Some("own")), ["mine"]);
        assert_eq!(custom(&w, c, None), ["mine", "v", "w", "x"], "each once");
        let disk = |project: &str| {
            let state = e.project_state(c, project).unwrap();
            state.into_iter().find(|(name, ..)| name == "disk").map(|(_, _, used)| used >> 30)
        };
        assert_eq!((disk("lean"), disk("default"), disk("own")), (Some(0), Some(3), Some(1)));
        set(&w, "default", &[("limits.disk", "3GiB")]).await.unwrap();
        refused(make(&w, c, "lean", "y").await, ErrorKind::Quota, "limits.disk");
        set(&w, "default", &[("limits.disk", "30GiB"), ("restricted", "true")]).await.unwrap();
        let of = Origin::Volume { project: "lean", pool: "default", name: "v" };
        let snapshot = || CreateSnapshot { name: Some("s".into()), ..Default::default() };
        refused(e.snapshot_create(c, of, snapshot()).await, ErrorKind::Forbidden, "restricted.snapshots");
        set(&w, "default", &[("restricted", "false")]).await.unwrap();
        done(&w, e.snapshot_create(c, of, snapshot()).await).await.unwrap();
        let there = Origin::Volume { project: "default", pool: "default", name: "v" };
        assert_eq!(e.snapshots(c, there).unwrap().len(), 1);
        // Used from both sides, known from both.
        create(&w, c, "lean", with_volume("c1", "v")).await.unwrap();
        create(&w, c, "own", with_volume("c1", "mine")).await.unwrap();
        let used = |project: &str, name: &str| {
            let volume = e.custom_volume(c, project, "default", name).unwrap();
            let records = e.inner().inventory.read();
            users(&records, &volume).paths(&records)
        };
        assert_eq!(used("default", "v"), ["/1.0/instances/c1?project=lean"]);
        assert_eq!(used("own", "mine"), ["/1.0/instances/c1?project=own"]);
        refused(create(&w, c, "own", with_volume("c2", "v")).await, ErrorKind::NotFound, "v");
        let gone = done(&w, e.volume_delete(c, "default", "default", "v").await).await;
        refused(gone, ErrorKind::Conflict, "used by");
        // To a project that shares it, it would not go anywhere.
        let to = MoveVolume { project: Some("lean".into()), ..Default::default() };
        refused(
            e.volume_move(c, "default", "default", "x", to).await,
            ErrorKind::Invalid,
            "is there already",
        );
        let copy = CopyVolume {
            project: "lean".into(),
            pool: "default".into(),
            name: "w".into(),
            snapshot: None,
            volume_only: false,
            refresh: false,
            exclude_older: false,
            copy: CreateVolume { config: Config::new(), ..volume("copied") },
        };
        done(&w, e.volume_copy(c, "own", "default", copy).await).await.unwrap();
        assert_eq!(custom(&w, c, Some("own")), ["copied", "mine"]);
        // What is shared stays so while anything is there.
        for (name, value) in [("lean", "true"), ("own", "false")] {
            refused(set(&w, name, &[(LENT, value)]).await, ErrorKind::Conflict, "not empty");
        }
        project(&w, "empty", &[]).await;
        set(&w, "empty", &[(LENT, "false")]).await.unwrap();
        assert_eq!(custom(&w, c, Some("empty")), ["v", "w", "x"]);
        set(&w, "empty", &[(LENT, "true")]).await.unwrap();
        assert_eq!(custom(&w, c, Some("empty")), [""; 0]);
        w.settle().await;
        assert_eq!(w.faults().await, Vec::<String>::new());
        w.engine.close();
    });
}

#[test]
fn who_may_change_a_project_that_shares_volumes_may_use_them_and_no_more() {
    SeededEnv::run(2, |env| async move {
        let w = World::new(&env).await.unwrap();
        let e = &w.engine;
        project(&w, "lean", &[(LENT, "false")]).await;
        make(&w, &w.admin, "default", "v").await.unwrap();
        let tenant = somebody(&w, &["lean"]);
        assert_eq!(custom(&w, &tenant, Some("lean")), ["v"]);
        e.custom_volume(&tenant, "lean", "default", "v").unwrap();
        refused(e.volumes(&tenant, "default", Some("default")), ErrorKind::NotFound, "default");
        create(&w, &tenant, "lean", with_volume("c1", "v")).await.unwrap();
        let before = w.fingerprint();
        refused(make(&w, &tenant, "lean", "w").await, ErrorKind::Forbidden, "may not change");
        let update =
            UpdateVolume { description: "x".into(), config: config(&[("size", "2GiB")]), if_version: None };
        refused(
            e.volume_update(&tenant, "lean", "default", "v", update).await,
            ErrorKind::Forbidden,
            "change",
        );
        refused(e.volume_rename(&tenant, "lean", "default", "v", "x").await, ErrorKind::Forbidden, "change");
        refused(e.volume_delete(&tenant, "lean", "default", "v").await, ErrorKind::Forbidden, "change");
        let of = Origin::Volume { project: "lean", pool: "default", name: "v" };
        refused(
            e.snapshot_create(&tenant, of, CreateSnapshot::default()).await,
            ErrorKind::Forbidden,
            "change",
        );
        refused(e.backup_create(&tenant, of, Default::default()).await, ErrorKind::Forbidden, "change");
        assert_eq!(w.fingerprint(), before);
        // Who is an operator of both may.
        let both = somebody(&w, &["lean", "default"]);
        make(&w, &both, "lean", "w").await.unwrap();
        w.engine.close();
    });
}

/// A profile that projects share means by a volume's name the volume of whoever has the profile.
#[test]
fn a_shared_profile_names_each_projects_own_volume() {
    SeededEnv::run(3, |env| async move {
        let w = World::new(&env).await.unwrap();
        let (e, c) = (&w.engine, &w.admin);
        e.project_create(c, "p", "", config(&[("features.profiles", "false")])).await.unwrap();
        make(&w, c, "default", "v").await.unwrap();
        make(&w, c, "p", "v").await.unwrap();
        let update = UpdateProfile { devices: with_volume("x", "v").devices, ..Default::default() };
        e.profile_create(c, "default", "data", update).await.unwrap();
        let profiles = Some(vec!["default".into(), "data".into()]);
        create(&w, c, "p", CreateInstance { profiles, ..container("c1") }).await.unwrap();
        let gone = done(&w, e.volume_delete(c, "p", "default", "v").await).await;
        refused(gone, ErrorKind::Conflict, "c1");
        w.engine.close();
    });
}

#[test]
fn settings_of_a_project_are_checked_as_the_servers() {
    SeededEnv::run(4, |env| async move {
        let w = World::new(&env).await.unwrap();
        let e = &w.engine;
        let fine = [
            ("backups.compression_algorithm", "none"),
            ("images.auto_update_cached", "false"),
            ("images.auto_update_interval", "12"),
            ("images.compression_algorithm", "xz"),
            ("images.remote_cache_expiry", "0"),
            ("features.networks.zones", "false"),
            ("user.note", "x"),
        ];
        e.project_create(&w.admin, "p", "", config(&fine)).await.unwrap();
        for (key, value, kind, says) in [
            ("images.default_architecture", "sparc64", ErrorKind::Invalid, "does not run"),
            ("images.compression_algorithm", "rar", ErrorKind::Invalid, "zstd"),
            ("features.networks.zones", "true", ErrorKind::Unsupported, "zones"),
            ("features.storage.buckets", "false", ErrorKind::Unsupported, "its own"),
            ("restricted.idmap.uid", "1000-2000", ErrorKind::Unsupported, "raw.idmap"),
            ("restricted.networks.uplinks", "up", ErrorKind::Unsupported, "uplink"),
        ] {
            let before = w.fingerprint();
            let e1 = refused(set(&w, "p", &[(key, value)]).await, kind, says);
            assert_eq!(e1.field, Some(format!("config.{key}")), "{e1}");
            let made = e.project_create(&w.admin, "q", "", config(&[(key, value)])).await;
            refused(made, kind, says);
            assert_eq!(w.fingerprint(), before, "{key}");
        }
        w.engine.close();
    });
}
