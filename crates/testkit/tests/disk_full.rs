//! A full disk, met by each use case that needs room on a host: the user is told that it is the space, the records are as they
//! were, and the host keeps nothing of what was begun.

use futures::future::BoxFuture;
use karst_agent::{ImagePart, simulated::Fault};
use karst_engine::{
    LiveOperation,
    backups::{create::CreateBackup, import::ImportInstance},
    compute::{
        copy::CopyInstance,
        create::{CreateInstance, InstanceSource},
        power::PowerRequest,
        relocate::MoveInstance,
        update::UpdateInstance,
    },
    images::{ImageOptions, publish::PublishImage},
    snapshots::{Origin, create::CreateSnapshot},
    storage::CreatePool,
    volumes::{copy::CopyVolume, create::CreateVolume},
};
use karst_env::SeededEnv;
use karst_model::{
    Config, Error, ErrorKind, Result,
    device::Devices,
    guest::{FileKind, FileWrite},
    instance::{InstanceKind, PowerAction},
    storage::VolumeContent,
};
use karst_store::list_prefix;
use karst_testkit::{World, scenarios::container};
use std::io::Write;

const P: &str = "default";
const STILL: Origin<'static> = Origin::Instance { project: P, name: "still" };
const KEPT: Origin<'static> = Origin::Volume { project: P, pool: P, name: "kept" };

struct Case {
    what: &'static str,
    /// The call of the host that finds no room.
    at: &'static str,
    run: for<'a> fn(&'a World) -> BoxFuture<'a, Result<()>>,
}

/// Waits for the end and answers the operation's error as the call's own.
async fn end(w: &World, begun: Result<LiveOperation>) -> Result<()> {
    w.ended(begun?).await.error.clone().map_or(Ok(()), Err)
}

macro_rules! cases {
    ($( $what:literal at $at:literal => |$w:ident| $call:expr; )+) => {
        vec![$( Case { what: $what, at: $at, run: |$w| Box::pin(async move { end($w, $call.await).await }) } ),+]
    };
}

fn copy(request: CreateInstance, snapshot: Option<&str>) -> CopyInstance {
    CopyInstance {
        project: P.into(),
        name: "still".into(),
        snapshot: snapshot.map(str::to_owned),
        instance_only: false,
        refresh: false,
        exclude_older: false,
        copy: request,
    }
}

fn volume(name: &str, content: VolumeContent) -> CreateVolume {
    let config = Config::from([("size".into(), "1GiB".into())]);
    CreateVolume { name: name.into(), content, description: String::new(), config }
}

fn grown(size: &str) -> UpdateInstance {
    let keys = [("type", "disk"), ("path", "/"), ("pool", "default"), ("size", size)];
    UpdateInstance {
        description: String::new(),
        ephemeral: false,
        config: Config::new(),
        devices: Devices::from([("root".into(), keys.map(|(k, v)| (k.into(), v.into())).into())]),
        profiles: vec!["default".into()],
        if_version: None,
    }
}

fn push(path: &str) -> FileWrite {
    let (uid, gid, mode) = (None, None, None);
    FileWrite { path: path.into(), kind: FileKind::File, uid, gid, mode, append: false, target: None }
}

/// An image of two parts' worth of bytes is uploaded; the operation is its import.
async fn import(w: &World) -> Result<LiveOperation> {
    let upload = w.engine.image_upload(&w.admin, P)?;
    let part = w.engine.image_upload_part(&w.admin, P, &upload, ImagePart::Unified).await?;
    std::fs::File::from(part.file).write_all(b"an image of a container, not there before")?;
    w.engine.image_import(&w.admin, P, upload, vec![ImagePart::Unified], ImageOptions::default()).await
}

async fn restored(w: &World) -> Result<LiveOperation> {
    let upload = karst_testkit::scenarios::upload(w, STILL).await?;
    let request = ImportInstance { upload, name: Some("new".into()), pool: None };
    w.engine.instance_import(&w.admin, P, request).await
}

fn power(action: PowerAction, stateful: bool) -> PowerRequest {
    PowerRequest { action, force: false, timeout: None, stateful }
}

#[rustfmt::skip]
fn cases() -> Vec<Case> {
    let mut all = cases! {
        "an instance of an image" at "volume_create" => |w| async { Ok(w.engine.instance_create(&w.admin, P, CreateInstance { source: InstanceSource::Image("debian/12".into()), ..container("new") }).await?.1) };
        "an instance that is to start" at "guest_start" => |w| async { Ok(w.engine.instance_create(&w.admin, P, CreateInstance { start: true, ..container("new") }).await?.1) };
        "a machine" at "volume_create" => |w| async { Ok(w.engine.instance_create(&w.admin, P, CreateInstance { kind: InstanceKind::VirtualMachine, ..container("new") }).await?.1) };
        "a copy" at "volume_create" => |w| async { Ok(w.engine.instance_copy(&w.admin, P, copy(container("new"), None)).await?.1) };
        "a copy with its snapshots" at "volume_snapshot_create" => |w| async { Ok(w.engine.instance_copy(&w.admin, P, copy(container("new"), None)).await?.1) };
        "a copy of a snapshot" at "volume_create" => |w| async { Ok(w.engine.instance_copy(&w.admin, P, copy(container("new"), Some("s0"))).await?.1) };
        "a move to another pool" at "volume_create" => |w| w.engine.instance_move(&w.admin, P, "still", MoveInstance { pool: Some("second".into()), ..Default::default() });
        "a rebuild" at "volume_rebuild" => |w| w.engine.instance_rebuild(&w.admin, P, "still", InstanceSource::Image("debian/12".into()));
        "a snapshot" at "volume_snapshot_create" => |w| w.engine.snapshot_create(&w.admin, STILL, CreateSnapshot::default());
        "a snapshot of what runs" at "volume_snapshot_create" => |w| w.engine.snapshot_create(&w.admin, Origin::Instance { project: P, name: "run" }, CreateSnapshot::default());
        "a snapshot with memory" at "machine_state_save" => |w| w.engine.snapshot_create(&w.admin, Origin::Instance { project: P, name: "vm" }, CreateSnapshot { stateful: true, ..Default::default() });
        "a larger disk" at "volume_resize" => |w| w.engine.instance_update(&w.admin, P, "vm", grown("20GiB"));
        "a stop that keeps the memory" at "guest_stop" => |w| w.engine.instance_power(&w.admin, P, "vm", power(PowerAction::Stop, true));
        "a backup" at "backup_create" => |w| async { Ok(w.engine.backup_create(&w.admin, STILL, CreateBackup::default()).await?.1) };
        "a backup brought back" at "volume_create" => |w| restored(w);
        "the content of a backup" at "volume_fill" => |w| restored(w);
        "a volume" at "volume_create" => |w| w.engine.volume_create(&w.admin, P, P, volume("new", VolumeContent::Block));
        "a copy of a volume" at "volume_create" => |w| w.engine.volume_copy(&w.admin, P, P, CopyVolume { project: P.into(), pool: P.into(), name: "kept".into(), snapshot: None, volume_only: false, refresh: false, exclude_older: false, copy: volume("new", VolumeContent::Block) });
        "a snapshot of a volume" at "volume_snapshot_create" => |w| w.engine.snapshot_create(&w.admin, KEPT, CreateSnapshot::default());
        "a backup of a volume" at "backup_create" => |w| async { Ok(w.engine.backup_create(&w.admin, KEPT, CreateBackup::default()).await?.1) };
        "an image that is built" at "image_build" => |w| w.engine.image_build(&w.admin, P, "debian/13", InstanceKind::Container, ImageOptions::default());
        "an image that is uploaded" at "image_stage" => |w| import(w);
        "an image that is taken in" at "image_import" => |w| import(w);
        "an image of an instance" at "image_publish" => |w| w.engine.image_publish(&w.admin, P, PublishImage { name: "still".into(), ..Default::default() });
    };
    // No operations: the answer is the call's.
    all.push(Case { what: "a file", at: "file_write", run: |w| Box::pin(async move {
        w.engine.file_write(&w.admin, P, "run", push("/root/new")).await.map(drop)
    }) });
    all.push(Case { what: "the content of a file", at: "session_wait", run: |w| Box::pin(async move {
        let upload = w.engine.file_write(&w.admin, P, "still", push("/root/new")).await?;
        upload.finish().await
    }) });
    all
}

/// All records but operations, which tell of the failure, and marks of the database: who writes, below which numbers of machines
/// are not given again, and what was ever used (for deletes to compare with).
async fn raw(w: &World) -> Vec<(String, String)> {
    let (kvs, _) = list_prefix(&*w.store, "/").await.unwrap();
    let of = kvs.into_iter().map(|kv| (kv.key, String::from_utf8_lossy(&kv.value).into_owned()));
    let beside =
        ["/karst/requests/", "/karst/v1/operations/", "/karst/v1/meta/highest-vmid", "/karst/v1/uses/"];
    of.filter(|(key, _)| !beside.iter().any(|p| key.starts_with(p))).collect()
}

#[test]
fn a_full_disk_is_said_and_leaves_nothing() {
    SeededEnv::run(34, |env| async move {
        let w = World::new(&env).await.unwrap();
        let (e, c) = (&w.engine, &w.admin);
        end(&w, e.image_build(c, P, "debian/12", InstanceKind::Container, ImageOptions::default()).await)
            .await
            .unwrap();
        let second = CreatePool { name: "second".into(), driver: "dir".into(), ..Default::default() };
        end(&w, e.pool_create(c, second).await).await.unwrap();
        let machine = CreateInstance { kind: InstanceKind::VirtualMachine, ..container("vm") };
        let stateful = Config::from([("migration.stateful".into(), "true".into())]);
        for request in [
            CreateInstance { start: true, ..container("run") },
            CreateInstance { start: true, config: stateful, ..machine },
            container("still"),
        ] {
            end(&w, e.instance_create(c, P, request).await.map(|x| x.1)).await.unwrap();
        }
        end(&w, e.volume_create(c, P, P, volume("kept", VolumeContent::Block)).await).await.unwrap();
        let named = CreateSnapshot { name: Some("s0".into()), ..Default::default() };
        end(&w, e.snapshot_create(c, STILL, named).await).await.unwrap();
        let backup = CreateBackup { name: Some("kept".into()), ..Default::default() };
        end(&w, e.backup_create(c, STILL, backup).await.map(|x| x.1)).await.unwrap();
        w.settle().await;

        let (before, shown) = (raw(&w).await, w.fingerprint());
        let mut wrong = vec![];
        for Case { what, at, run } in cases() {
            // What cannot be undone is tried again before it is given up.
            let tries = if at == "volume_rebuild" { 6 } else { 1 };
            for _ in 0..tries {
                w.agent.inject(at, Fault::FailBefore(Error::quota("no space left in the pool")));
            }
            match run(&w).await {
                Ok(()) => wrong.push(format!("{what}: was done")),
                Err(e) if e.kind == ErrorKind::Quota && e.message.contains("no space left") => {}
                Err(e) => wrong.push(format!("{what}: {e:?}")),
            }
            if w.agent.faults_left() > 0 {
                wrong.push(format!("{what}: {at} was never called"));
                break;
            }
            w.settle().await;
            let now = raw(&w).await;
            if now != before {
                // What was left is there for all that come later.
                let changed: Vec<_> = now.iter().filter(|x| !before.contains(x)).collect();
                let gone: Vec<_> = before.iter().filter(|x| !now.contains(x)).collect();
                wrong.push(format!("{what}: changed {changed:#?}, which was {gone:#?}"));
                break;
            }
            wrong.extend(w.faults().await.into_iter().map(|f| format!("{what}: {f}")));
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        assert_eq!(w.fingerprint(), shown);
        w.engine.close();
    });
}
