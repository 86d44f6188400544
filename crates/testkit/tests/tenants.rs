//! What keeps tenants within what they were given: every way in which something comes into a project, or becomes larger there,
//! is asked the same.

use karst_engine::{
    LiveOperation,
    backups::{
        create::CreateBackup,
        import::{ImportInstance, ImportVolume},
    },
    compute::{copy::CopyInstance, create::CreateInstance, relocate::MoveInstance},
    snapshots::{Origin, create::CreateSnapshot},
    tenancy::UpdateProfile,
    volumes::{copy::CopyVolume, create::CreateVolume, relocate::MoveVolume},
};
use karst_env::SeededEnv;
use karst_model::{Config, Error, ErrorKind, Result, storage::VolumeContent};
use karst_testkit::{
    World,
    scenarios::{container, upload},
};

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
