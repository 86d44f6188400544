//! One or more scenarios for every saga: how to get there, and what starts it.

use crate::World;
use futures::future::BoxFuture;
use karst_engine::{
    LiveOperation,
    backups::{
        create::CreateBackup,
        import::{ImportInstance, ImportVolume},
    },
    compute::{
        copy::CopyInstance,
        create::{CreateInstance, InstanceSource},
        define::{DefineMachine, Place},
        power::PowerRequest,
        relocate::MoveInstance,
        update::UpdateInstance,
    },
    images::{ImageOptions, publish::PublishImage},
    snapshots::{Origin, create::CreateSnapshot},
    storage::CreatePool,
    tenancy::UpdateProfile,
    volumes::{
        content::WriteVolume, copy::CopyVolume, create::CreateVolume, relocate::MoveVolume,
        update::UpdateVolume,
    },
};
use karst_model::{
    BackupId, Config, Result,
    device::Devices,
    instance::{InstanceKind, PowerAction},
    storage::VolumeContent,
};
use std::{
    collections::BTreeMap,
    io::{Read, Write},
};

/// A way to run a saga.
pub struct Scenario {
    /// [`karst_engine::saga::Saga::NAME`] of the saga that `trigger` starts.
    pub saga: &'static str,
    /// What is special about this one.
    pub name: &'static str,
    /// Makes what must be there before.
    pub setup: for<'a> fn(&'a World) -> BoxFuture<'a, Result<()>>,
    /// Starts the saga.
    pub trigger: for<'a> fn(&'a World) -> BoxFuture<'a, Result<LiveOperation>>,
}

/// A container's request, of the test image or empty.
pub fn container(name: &str) -> CreateInstance {
    CreateInstance {
        name: Some(name.into()),
        kind: InstanceKind::Container,
        description: String::new(),
        ephemeral: false,
        config: Config::new(),
        devices: Devices::new(),
        profiles: None,
        source: InstanceSource::None,
        start: false,
        target: None,
        vmid: None,
    }
}

fn power(action: PowerAction) -> PowerRequest {
    PowerRequest { action, force: true, timeout: None, stateful: false }
}

async fn done(w: &World, operation: Result<LiveOperation>) -> Result<()> {
    match &w.ended(operation?).await.error {
        None => Ok(()),
        Some(e) => Err(e.clone()),
    }
}

async fn make(w: &World, name: &str, start: bool) -> Result<()> {
    let request = CreateInstance { start, ..container(name) };
    let (_, operation) = w.engine.instance_create(&w.admin, "default", request).await?;
    done(w, Ok(operation)).await
}

/// A virtual machine that runs and whose memory can be kept.
async fn machine(w: &World) -> Result<()> {
    let config = Config::from([("migration.stateful".into(), "true".into())]);
    let kind = InstanceKind::VirtualMachine;
    let request = CreateInstance { start: true, kind, config, ..container("c1") };
    let (_, operation) = w.engine.instance_create(&w.admin, "default", request).await?;
    done(w, Ok(operation)).await
}

/// A machine whose root is the custom volume `v1`.
async fn defined(w: &World) -> Result<LiveOperation> {
    let root = [("type", "disk"), ("path", "/"), ("pool", "default"), ("source", "v1")];
    let root = root.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    let create = CreateInstance {
        kind: InstanceKind::VirtualMachine,
        start: true,
        profiles: Some(vec![]),
        devices: Devices::from([("sda".into(), root)]),
        ..container("c1")
    };
    let places = BTreeMap::from([("sda".into(), Place { slot: "scsi3".into(), alias: None, pci: None })]);
    let uuid = Some(uuid::Uuid::from_u128(77));
    Ok(w.engine
        .machine_define(
            &w.admin,
            "default",
            DefineMachine { create, uuid, places, paused: false, memory: None },
        )
        .await?
        .1)
}

async fn stateful(w: &World, action: PowerAction) -> Result<LiveOperation> {
    let request = PowerRequest { force: false, stateful: true, ..power(action) };
    w.engine.instance_power(&w.admin, "default", "c1", request).await
}

async fn snapshot_with_memory(w: &World) -> Result<LiveOperation> {
    let request = CreateSnapshot { name: Some("s1".into()), stateful: true, ..CreateSnapshot::default() };
    w.engine.snapshot_create(&w.admin, OF_C1, request).await
}

async fn set_power(w: &World, action: PowerAction) -> Result<LiveOperation> {
    w.engine.instance_power(&w.admin, "default", "c1", power(action)).await
}

async fn build(w: &World) -> Result<LiveOperation> {
    w.engine
        .image_build(&w.admin, "default", "debian/12", InstanceKind::Container, ImageOptions::default())
        .await
}

async fn publish(w: &World, snapshot: Option<&str>) -> Result<LiveOperation> {
    let aliases = vec![("mine".into(), String::new())];
    let request = PublishImage {
        name: "c1".into(),
        snapshot: snapshot.map(str::to_owned),
        options: ImageOptions { aliases, ..Default::default() },
        ..Default::default()
    };
    w.engine.image_publish(&w.admin, "default", request).await
}

/// A custom volume of 1 GiB.
async fn volume(w: &World, name: &str, content: VolumeContent) -> Result<LiveOperation> {
    let config = Config::from([("size".into(), "1GiB".into())]);
    let request = CreateVolume { name: name.into(), content, description: String::new(), config };
    w.engine.volume_create(&w.admin, "default", "default", request).await
}

const OF_C1: Origin<'static> = Origin::Instance { project: "default", name: "c1" };
const OF_V1: Origin<'static> = Origin::Volume { project: "default", pool: "default", name: "v1" };

async fn snapshot(w: &World, of: Origin<'_>, name: &str) -> Result<LiveOperation> {
    let request = CreateSnapshot { name: Some(name.into()), ..CreateSnapshot::default() };
    w.engine.snapshot_create(&w.admin, of, request).await
}

/// A stopped container with three snapshots, changed after each.
async fn tree(w: &World) -> Result<()> {
    make(w, "c1", false).await?;
    for name in ["s1", "s2", "s3"] {
        done(w, snapshot(w, OF_C1, name).await).await?;
        let update = UpdateInstance {
            description: String::new(),
            ephemeral: false,
            config: Config::from([("user.after".into(), name.into())]),
            devices: Devices::new(),
            profiles: vec!["default".into()],
            if_version: None,
        };
        done(w, w.engine.instance_update(&w.admin, "default", "c1", update).await).await?;
    }
    Ok(())
}

async fn copy(w: &World, snapshot: Option<&str>, start: bool) -> Result<LiveOperation> {
    let request = CopyInstance {
        project: "default".into(),
        name: "c1".into(),
        snapshot: snapshot.map(str::to_owned),
        instance_only: false,
        refresh: false,
        exclude_older: false,
        copy: CreateInstance { start, ..container("c2") },
    };
    Ok(w.engine.instance_copy(&w.admin, "default", request).await?.1)
}

/// `c2`, which is a copy of `c1` already.
async fn refresh(w: &World) -> Result<LiveOperation> {
    let request = CopyInstance {
        project: "default".into(),
        name: "c1".into(),
        snapshot: None,
        instance_only: false,
        refresh: true,
        exclude_older: false,
        copy: container("c2"),
    };
    Ok(w.engine.instance_copy(&w.admin, "default", request).await?.1)
}

async fn back_up(w: &World, of: Origin<'_>) -> Result<LiveOperation> {
    let request = CreateBackup { name: Some("kept".into()), ..CreateBackup::default() };
    Ok(w.engine.backup_create(&w.admin, of, request).await?.1)
}

/// Uploads the backup `kept` as somebody would who fetched it before.
pub async fn upload(w: &World, of: Origin<'_>) -> Result<BackupId> {
    let mut data = vec![];
    for fd in w.engine.backup_open(&w.admin, of, "kept").await?.fds {
        std::fs::File::from(fd).read_to_end(&mut data)?;
    }
    let id = w.engine.backup_upload(&w.admin, "default")?;
    let staged = w.engine.backup_upload_open(&w.admin, "default", id).await?;
    std::fs::File::from(staged).write_all(&data)?;
    Ok(id)
}

/// A copy of `v1` in another pool.
pub async fn copy_volume(w: &World, snapshot: Option<&str>) -> Result<LiveOperation> {
    let copy = CreateVolume {
        name: "v2".into(),
        content: VolumeContent::Filesystem,
        description: String::new(),
        config: Config::new(),
    };
    let request = CopyVolume {
        project: "default".into(),
        pool: "default".into(),
        name: "v1".into(),
        snapshot: snapshot.map(str::to_owned),
        volume_only: false,
        refresh: true,
        exclude_older: false,
        copy,
    };
    w.engine.volume_copy(&w.admin, "default", "second", request).await
}

async fn second_pool(w: &World) -> Result<()> {
    let request = CreatePool { name: "second".into(), driver: "dir".into(), ..Default::default() };
    done(w, w.engine.pool_create(&w.admin, request).await).await
}

macro_rules! scenario {
    ($saga:literal, $name:literal, |$s:ident| $setup:expr, |$t:ident| $trigger:expr) => {
        Scenario {
            saga: $saga,
            name: $name,
            setup: |$s| Box::pin(async move { $setup }),
            trigger: |$t| Box::pin(async move { $trigger }),
        }
    };
}

mod machines;
mod networks;
mod pools;
mod profiles;
mod recover;
mod runs;
pub use {recover::lose, runs::change_run};

/// All scenarios.
pub fn all() -> Vec<Scenario> {
    let mut all = vec![
        scenario!("instance-create", "empty", |_w| Ok(()), |w| {
            Ok(w.engine.instance_create(&w.admin, "default", container("c1")).await?.1)
        }),
        scenario!("instance-create", "of an image, started", |w| done(w, build(w).await).await, |w| {
            let source = InstanceSource::Image("debian/12".into());
            let request = CreateInstance { source, start: true, ..container("c1") };
            Ok(w.engine.instance_create(&w.admin, "default", request).await?.1)
        }),
        scenario!("instance-create", "virtual machine", |_w| Ok(()), |w| {
            let request =
                CreateInstance { kind: InstanceKind::VirtualMachine, start: true, ..container("v1") };
            Ok(w.engine.instance_create(&w.admin, "default", request).await?.1)
        }),
        scenario!("profile-update", "with a running user", |w| make(w, "c1", true).await, |w| {
            profiles::profile_update(w).await
        }),
        scenario!("profile-update", "with a NIC for a running user", |w| make(w, "c1", true).await, |w| {
            profiles::profile_nic(w).await
        }),
        scenario!("instance-delete", "stopped", |w| make(w, "c1", false).await, |w| w
            .engine
            .instance_delete(&w.admin, "default", "c1")
            .await),
        scenario!(
            "instance-create",
            "defined on a custom volume",
            |w| done(w, volume(w, "v1", VolumeContent::Block).await).await,
            |w| defined(w).await
        ),
        scenario!(
            "instance-delete",
            "its volume stays, its snapshot does not",
            |w| {
                make(w, "c1", false).await?;
                done(w, snapshot(w, OF_C1, "s1").await).await
            },
            |w| w.engine.instance_undefine(&w.admin, "default", "c1").await
        ),
        scenario!(
            "instance-delete",
            "of a custom volume",
            |w| {
                done(w, volume(w, "v1", VolumeContent::Block).await).await?;
                done(w, defined(w).await).await?;
                done(w, snapshot(w, OF_C1, "s1").await).await?;
                done(w, set_power(w, PowerAction::Stop).await).await
            },
            |w| w.engine.instance_delete(&w.admin, "default", "c1").await
        ),
        scenario!("instance-update", "from the next start on", |w| make(w, "c1", true).await, |w| {
            let update = UpdateInstance {
                description: "changed".into(),
                ephemeral: false,
                config: Config::from([("limits.memory".into(), "64MiB".into())]),
                devices: Devices::new(),
                profiles: vec!["default".into()],
                if_version: None,
            };
            w.engine.instance_configure(&w.admin, "default", "c1", update).await
        }),
        scenario!("instance-power", "start", |w| make(w, "c1", false).await, |w| {
            set_power(w, PowerAction::Start).await
        }),
        scenario!("instance-power", "stop", |w| make(w, "c1", true).await, |w| {
            set_power(w, PowerAction::Stop).await
        }),
        scenario!("instance-power", "restart", |w| make(w, "c1", true).await, |w| {
            set_power(w, PowerAction::Restart).await
        }),
        scenario!("instance-power", "freeze", |w| make(w, "c1", true).await, |w| {
            set_power(w, PowerAction::Freeze).await
        }),
        scenario!(
            "instance-power",
            "unfreeze",
            |w| {
                make(w, "c1", true).await?;
                done(w, set_power(w, PowerAction::Freeze).await).await
            },
            |w| set_power(w, PowerAction::Unfreeze).await
        ),
        scenario!("instance-update", "limits of a running one", |w| make(w, "c1", true).await, |w| {
            let update = UpdateInstance {
                description: "changed".into(),
                ephemeral: false,
                config: Config::from([("limits.memory".into(), "64MiB".into())]),
                devices: Devices::new(),
                profiles: vec!["default".into()],
                if_version: None,
            };
            w.engine.instance_update(&w.admin, "default", "c1", update).await
        }),
        scenario!("instance-update", "a NIC for a running one", |w| make(w, "c1", true).await, |w| {
            let lan = [("type", "nic"), ("nictype", "macvlan"), ("parent", "granted0")];
            let lan = lan.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            let update = UpdateInstance {
                description: String::new(),
                ephemeral: false,
                config: Config::new(),
                devices: Devices::from([("lan0".into(), lan)]),
                profiles: vec!["default".into()],
                if_version: None,
            };
            w.engine.instance_update(&w.admin, "default", "c1", update).await
        }),
        scenario!(
            "instance-update",
            "a larger disk",
            |w| {
                let request = CreateInstance { kind: InstanceKind::VirtualMachine, ..container("c1") };
                done(w, Ok(w.engine.instance_create(&w.admin, "default", request).await?.1)).await
            },
            |w| {
                let root = [("type", "disk"), ("path", "/"), ("pool", "default"), ("size", "20GiB")];
                let root = root.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
                let update = UpdateInstance {
                    description: String::new(),
                    ephemeral: false,
                    config: Config::new(),
                    devices: Devices::from([("root".to_owned(), root)]),
                    profiles: vec!["default".into()],
                    if_version: None,
                };
                w.engine.instance_update(&w.admin, "default", "c1", update).await
            }
        ),
        scenario!("image-create", "built", |_w| Ok(()), |w| build(w).await),
        scenario!("image-create", "there already", |w| done(w, build(w).await).await, |w| build(w).await),
        scenario!("image-delete", "with an alias", |w| done(w, build(w).await).await, |w| w
            .engine
            .image_delete(&w.admin, "default", "debian/12")
            .await),
        scenario!("image-publish", "of a running instance", |w| make(w, "c1", true).await, |w| publish(
            w, None
        )
        .await),
        scenario!(
            "image-publish",
            "of a snapshot",
            |w| {
                make(w, "c1", false).await?;
                done(w, snapshot(w, OF_C1, "s1").await).await
            },
            |w| publish(w, Some("s1")).await
        ),
        scenario!(
            "content-refresh",
            "of an instance whose original runs and has other snapshots",
            |w| {
                tree(w).await?;
                done(w, copy(w, None, false).await).await?;
                let gone = w.engine.snapshot_delete(&w.admin, OF_C1, "s2").await;
                done(w, gone).await?;
                done(w, snapshot(w, OF_C1, "s4").await).await?;
                let of = Origin::Instance { project: "default", name: "c2" };
                done(w, snapshot(w, of, "own").await).await?;
                done(w, set_power(w, PowerAction::Start).await).await
            },
            |w| refresh(w).await
        ),
        scenario!(
            "content-refresh",
            "of a volume in another pool",
            |w| {
                second_pool(w).await?;
                done(w, volume(w, "v1", VolumeContent::Filesystem).await).await?;
                done(w, snapshot(w, OF_V1, "s1").await).await?;
                done(w, copy_volume(w, None).await).await?;
                done(w, snapshot(w, OF_V1, "s2").await).await?;
                let of = Origin::Volume { project: "default", pool: "second", name: "v2" };
                done(w, snapshot(w, of, "own").await).await
            },
            |w| copy_volume(w, None).await
        ),
        scenario!(
            "volume-move",
            "with snapshots and a user to another pool, under another name",
            |w| {
                second_pool(w).await?;
                done(w, volume(w, "v1", VolumeContent::Filesystem).await).await?;
                done(w, snapshot(w, OF_V1, "s1").await).await?;
                let data = [("type", "disk"), ("pool", "default"), ("source", "v1"), ("path", "/data")];
                let data = data.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
                let devices = Devices::from([("data".to_owned(), data)]);
                let request = CreateInstance { devices, ..container("c1") };
                done(w, Ok(w.engine.instance_create(&w.admin, "default", request).await?.1)).await
            },
            |w| {
                let request =
                    MoveVolume { name: Some("moved".into()), pool: Some("second".into()), project: None };
                w.engine.volume_move(&w.admin, "default", "default", "v1", request).await
            }
        ),
        scenario!(
            "volume-move",
            "to another project",
            |w| {
                w.engine.project_create(&w.admin, "other", "", Config::new()).await?;
                done(w, volume(w, "v1", VolumeContent::Block).await).await?;
                done(w, snapshot(w, OF_V1, "s1").await).await
            },
            |w| {
                let request = MoveVolume { project: Some("other".into()), ..Default::default() };
                w.engine.volume_move(&w.admin, "default", "default", "v1", request).await
            }
        ),
        scenario!(
            "instance-move",
            "with snapshots to another pool, under another name",
            |w| {
                second_pool(w).await?;
                tree(w).await
            },
            |w| {
                let request = MoveInstance {
                    name: Some("moved".into()),
                    pool: Some("second".into()),
                    ..Default::default()
                };
                w.engine.instance_move(&w.admin, "default", "c1", request).await
            }
        ),
        scenario!(
            "instance-move",
            "to another project",
            |w| {
                w.engine.project_create(&w.admin, "other", "", Config::new()).await?;
                let profile = w.engine.profile(&w.admin, "default", "default")?;
                let update = UpdateProfile { devices: profile.devices.clone(), ..Default::default() };
                w.engine.profile_update(&w.admin, "other", "default", update).await?;
                tree(w).await
            },
            |w| {
                let request = MoveInstance { project: Some("other".into()), ..Default::default() };
                w.engine.instance_move(&w.admin, "default", "c1", request).await
            }
        ),
        scenario!(
            "instance-rebuild",
            "of an image",
            |w| {
                make(w, "c1", false).await?;
                done(w, build(w).await).await
            },
            |w| {
                let source = InstanceSource::Image("debian/12".into());
                w.engine.instance_rebuild(&w.admin, "default", "c1", source).await
            }
        ),
        scenario!(
            "instance-rebuild",
            "a virtual machine that ran, empty",
            |w| {
                machine(w).await?;
                done(w, set_power(w, PowerAction::Stop).await).await
            },
            |w| w.engine.instance_rebuild(&w.admin, "default", "c1", InstanceSource::None).await
        ),
        scenario!("pool-create", "dir", |_w| Ok(()), |w| {
            let request = CreatePool { name: "second".into(), driver: "dir".into(), ..Default::default() };
            w.engine.pool_create(&w.admin, request).await
        }),
        scenario!(
            "pool-delete",
            "empty",
            |w| {
                let request =
                    CreatePool { name: "second".into(), driver: "dir".into(), ..Default::default() };
                done(w, w.engine.pool_create(&w.admin, request).await).await
            },
            |w| w.engine.pool_delete(&w.admin, "second").await
        ),
        scenario!("snapshot-create", "of a running instance", |w| make(w, "c1", true).await, |w| {
            snapshot(w, OF_C1, "s1").await
        }),
        scenario!(
            "snapshot-create",
            "of a volume",
            |w| done(w, volume(w, "v1", VolumeContent::Filesystem).await).await,
            |w| snapshot(w, OF_V1, "s1").await
        ),
        scenario!("instance-power", "stop that keeps the memory", |w| machine(w).await, |w| {
            stateful(w, PowerAction::Stop).await
        }),
        scenario!(
            "instance-power",
            "start from memory that was kept",
            |w| {
                machine(w).await?;
                done(w, stateful(w, PowerAction::Stop).await).await
            },
            |w| stateful(w, PowerAction::Start).await
        ),
        scenario!(
            "instance-memory-drop",
            "that was kept over a stop",
            |w| {
                machine(w).await?;
                done(w, stateful(w, PowerAction::Stop).await).await
            },
            |w| w.engine.instance_memory_drop(&w.admin, "default", "c1").await
        ),
        scenario!("snapshot-create", "of a virtual machine with its memory", |w| machine(w).await, |w| {
            snapshot_with_memory(w).await
        }),
        scenario!(
            "snapshot-delete",
            "of a virtual machine with its memory",
            |w| {
                machine(w).await?;
                done(w, snapshot_with_memory(w).await).await
            },
            |w| w.engine.snapshot_delete(&w.admin, OF_C1, "s1").await
        ),
        scenario!(
            "snapshot-restore",
            "of a virtual machine whose memory was kept over a stop",
            |w| {
                machine(w).await?;
                done(w, snapshot_with_memory(w).await).await?;
                done(w, stateful(w, PowerAction::Stop).await).await
            },
            |w| w.engine.snapshot_restore(&w.admin, OF_C1, "s1").await
        ),
        scenario!("snapshot-delete", "in the middle of a tree", |w| tree(w).await, |w| {
            w.engine.snapshot_delete(&w.admin, OF_C1, "s2").await
        }),
        scenario!("snapshot-restore", "of an instance", |w| tree(w).await, |w| {
            w.engine.snapshot_restore(&w.admin, OF_C1, "s2").await
        }),
        scenario!(
            "snapshot-restore-running",
            "of an instance that runs",
            |w| {
                tree(w).await?;
                done(w, set_power(w, PowerAction::Start).await).await
            },
            |w| w.engine.snapshot_restore(&w.admin, OF_C1, "s2").await
        ),
        scenario!(
            "snapshot-restore-running",
            "of an instance that is frozen",
            |w| {
                tree(w).await?;
                done(w, set_power(w, PowerAction::Start).await).await?;
                done(w, set_power(w, PowerAction::Freeze).await).await
            },
            |w| w.engine.snapshot_restore(&w.admin, OF_C1, "s2").await
        ),
        scenario!(
            "snapshot-restore-running",
            "of a virtual machine that runs, with its memory",
            |w| {
                machine(w).await?;
                done(w, snapshot_with_memory(w).await).await
            },
            |w| w.engine.snapshot_restore_with(&w.admin, OF_C1, "s1", true).await
        ),
        scenario!(
            "snapshot-restore-running",
            "with its memory, of a virtual machine whose memory was kept over a stop",
            |w| {
                machine(w).await?;
                done(w, snapshot_with_memory(w).await).await?;
                done(w, stateful(w, PowerAction::Stop).await).await
            },
            |w| w.engine.snapshot_restore_with(&w.admin, OF_C1, "s1", true).await
        ),
        scenario!(
            "snapshot-restore",
            "of a volume",
            |w| {
                done(w, volume(w, "v1", VolumeContent::Filesystem).await).await?;
                done(w, snapshot(w, OF_V1, "s1").await).await?;
                let config = Config::from([("size".into(), "100MiB".into())]);
                let update = UpdateVolume { description: "less".into(), config, if_version: None };
                done(w, w.engine.volume_update(&w.admin, "default", "default", "v1", update).await).await
            },
            |w| w.engine.snapshot_restore(&w.admin, OF_V1, "s1").await
        ),
        scenario!(
            "instance-copy",
            "of a running one with snapshots, started",
            |w| {
                tree(w).await?;
                done(w, set_power(w, PowerAction::Start).await).await
            },
            |w| copy(w, None, true).await
        ),
        scenario!("instance-copy", "of a snapshot", |w| tree(w).await, |w| copy(w, Some("s2"), false).await),
        scenario!(
            "backup-create",
            "of a running one with snapshots",
            |w| {
                tree(w).await?;
                done(w, set_power(w, PowerAction::Start).await).await
            },
            |w| back_up(w, OF_C1).await
        ),
        scenario!(
            "backup-create",
            "of a volume",
            |w| done(w, volume(w, "v1", VolumeContent::Block).await).await,
            |w| back_up(w, OF_V1).await
        ),
        scenario!(
            "backup-delete",
            "of an instance",
            |w| {
                make(w, "c1", false).await?;
                done(w, back_up(w, OF_C1).await).await
            },
            |w| w.engine.backup_delete(&w.admin, OF_C1, "kept").await
        ),
        scenario!(
            "instance-import",
            "with snapshots",
            |w| {
                tree(w).await?;
                done(w, back_up(w, OF_C1).await).await
            },
            |w| {
                let request = ImportInstance {
                    upload: upload(w, OF_C1).await?,
                    name: Some("c2".into()),
                    pool: Some("default".into()),
                };
                w.engine.instance_import(&w.admin, "default", request).await
            }
        ),
        scenario!(
            "volume-import",
            "with a snapshot",
            |w| {
                done(w, volume(w, "v1", VolumeContent::Block).await).await?;
                done(w, snapshot(w, OF_V1, "s1").await).await?;
                done(w, back_up(w, OF_V1).await).await
            },
            |w| {
                let upload = upload(w, OF_V1).await?;
                let request = ImportVolume { upload, name: Some("v2".into()), disc: false };
                w.engine.volume_import(&w.admin, "default", "default", request).await
            }
        ),
        scenario!(
            "volume-import",
            "a disc",
            |w| {
                done(w, volume(w, "v1", VolumeContent::Block).await).await?;
                done(w, back_up(w, OF_V1).await).await
            },
            |w| {
                let upload = upload(w, OF_V1).await?;
                let request = ImportVolume { upload, name: Some("disc".into()), disc: true };
                w.engine.volume_import(&w.admin, "default", "default", request).await
            }
        ),
        scenario!(
            "volume-copy",
            "with snapshots, in use by a running instance, to another pool",
            |w| {
                second_pool(w).await?;
                done(w, volume(w, "v1", VolumeContent::Filesystem).await).await?;
                done(w, snapshot(w, OF_V1, "s1").await).await?;
                done(w, snapshot(w, OF_V1, "s2").await).await?;
                let data = [("type", "disk"), ("pool", "default"), ("source", "v1"), ("path", "/data")];
                let data = data.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
                let devices = Devices::from([("data".to_owned(), data)]);
                let request = CreateInstance { start: true, devices, ..container("c1") };
                done(w, Ok(w.engine.instance_create(&w.admin, "default", request).await?.1)).await
            },
            |w| copy_volume(w, None).await
        ),
        scenario!(
            "volume-copy",
            "of a snapshot",
            |w| {
                second_pool(w).await?;
                done(w, volume(w, "v1", VolumeContent::Block).await).await?;
                done(w, snapshot(w, OF_V1, "s1").await).await
            },
            |w| copy_volume(w, Some("s1")).await
        ),
        scenario!("volume-create", "block", |_w| Ok(()), |w| volume(w, "v1", VolumeContent::Block).await),
        scenario!(
            "volume-wipe",
            "of a stopped machine",
            |w| {
                done(w, volume(w, "v1", VolumeContent::Block).await).await?;
                done(w, defined(w).await).await?;
                done(w, set_power(w, PowerAction::Stop).await).await
            },
            |w| w.engine.volume_wipe(&w.admin, "default", "default", "v1").await
        ),
        scenario!(
            "volume-write",
            "a part",
            |w| done(w, volume(w, "v1", VolumeContent::Block).await).await,
            |w| {
                let upload = w.engine.backup_upload(&w.admin, "default")?;
                let staged = w.engine.backup_upload_open(&w.admin, "default", upload).await?;
                std::fs::File::from(staged).write_all(b"written")?;
                let request = WriteVolume { upload, length: 7, offset: 512, image: false };
                w.engine.volume_write(&w.admin, "default", "default", "v1", request).await
            }
        ),
        scenario!(
            "volume-delete",
            "unused",
            |w| done(w, volume(w, "v1", VolumeContent::Filesystem).await).await,
            |w| w.engine.volume_delete(&w.admin, "default", "default", "v1").await
        ),
        scenario!(
            "volume-update",
            "a smaller limit",
            |w| done(w, volume(w, "v1", VolumeContent::Filesystem).await).await,
            |w| {
                let config = Config::from([("size".into(), "100MiB".into())]);
                let update = UpdateVolume { description: "less".into(), config, if_version: None };
                w.engine.volume_update(&w.admin, "default", "default", "v1", update).await
            }
        ),
    ];
    all.extend(machines::scenarios());
    all.extend(networks::scenarios());
    all.extend(pools::scenarios());
    all.extend(recover::scenarios());
    all.extend(runs::scenarios());
    all
}
