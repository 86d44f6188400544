//! Scenarios of virtual machines: what they are beside their disks on its way, and file systems inside that are still.

use super::{
    OF_C1, Scenario, back_up, container, copy, defined, done, machine, power, refresh, second_pool,
    set_power, snapshot, snapshot_with_memory, upload, volume,
};
use crate::World;
use karst_agent::BackupListen;
use karst_engine::{
    LiveOperation,
    backups::import::ImportInstance,
    checkpoints::{
        CreateCheckpoint,
        backup::{BackupDisk, BackupTarget, BeginBackup, Since},
    },
    compute::{
        create::CreateInstance,
        disk_copy::{
            CopyDisk, CopyTarget,
            merge::{LayerName, MergeDisk, MergeLayers},
        },
        memory_files::{AfterDump, DumpMemory, SaveMemory},
        relocate::MoveInstance,
    },
    layers::create::CreateLayers,
    snapshots::{Origin, create::CreateSnapshot},
};
use karst_model::{
    Config, Result,
    instance::{InstanceKind, PowerAction},
    memory::DumpFormat,
    snapshot::Quiesce,
    storage::VolumeContent,
};
use std::time::Duration;

fn checkpoint(name: &str) -> CreateCheckpoint {
    CreateCheckpoint { name: name.into(), ..Default::default() }
}

async fn mark(w: &World, name: &str) -> Result<LiveOperation> {
    w.engine.checkpoint_create(&w.admin, "default", "c1", checkpoint(name)).await
}

/// Backs the root of the machine up: into the volume `b1`, or for others to read for a while.
async fn back_disk_up(
    w: &World,
    since: Since,
    new: Option<bool>,
    name: Option<&str>,
) -> Result<LiveOperation> {
    let target = new.map(|new| BackupTarget { pool: "default".into(), name: "b1".into(), new });
    let listen = new.is_none().then_some(BackupListen::Unix);
    let disk = BackupDisk {
        device: "root".into(),
        since,
        target,
        export: "vda".into(),
        bitmap: "backup-vda".into(),
    };
    let request = BeginBackup {
        disks: vec![disk],
        checkpoint: name.map(checkpoint),
        listen,
        limit: Some(Duration::from_secs(1)),
    };
    w.engine.disk_backup_begin(&w.admin, "default", "c1", request).await
}

/// Copies the disk of the machine on the custom volume `v1` to another one, from which it goes on.
async fn copy_disk(w: &World, pool: &str, new: bool) -> Result<LiveOperation> {
    let to = CopyTarget::Volume { pool: pool.into(), name: "v2".into(), new };
    let request = CopyDisk { device: Some("sda".into()), to, hold: false, speed: 0, synchronous: true };
    w.engine.disk_copy_begin(&w.admin, "default", "c1", request).await
}

async fn layer(w: &World, snapshot: &str, quiesce: bool) -> Result<LiveOperation> {
    let request = CreateLayers { snapshot: Some(snapshot.into()), quiesce, ..Default::default() };
    w.engine.layers_create(&w.admin, "default", "c1", request).await
}

async fn merge(w: &World, what: MergeLayers) -> Result<LiveOperation> {
    let request = MergeDisk { device: None, what, hold: false, speed: 0 };
    w.engine.layers_merge(&w.admin, "default", "c1", request).await
}

/// A machine that runs, with two layers.
async fn layered(w: &World) -> Result<()> {
    machine(w).await?;
    for name in ["s1", "s2"] {
        done(w, layer(w, name, false).await).await?;
    }
    Ok(())
}

async fn save_memory(w: &World) -> Result<LiveOperation> {
    let request = SaveMemory { path: "/srv/saves/c1".into(), document: "<domain/>".into(), paused: None };
    w.engine.machine_save(&w.admin, "default", "c1", request).await
}

async fn dump_memory(w: &World, after: AfterDump) -> Result<LiveOperation> {
    let request = DumpMemory { path: "/srv/saves/c1.dump".into(), format: DumpFormat::Elf, after };
    w.engine.machine_dump(&w.admin, "default", "c1", request).await
}

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!(
            "checkpoint-create",
            "after another",
            |w| {
                machine(w).await?;
                done(w, mark(w, "first").await).await
            },
            |w| mark(w, "second").await
        ),
        scenario!(
            "checkpoint-delete",
            "between two others",
            |w| {
                machine(w).await?;
                for name in ["first", "second", "third"] {
                    done(w, mark(w, name).await).await?;
                }
                Ok(())
            },
            |w| w.engine.checkpoint_delete(&w.admin, "default", "c1", "second").await
        ),
        scenario!(
            "instance-disk-backup",
            "of all of a disk into a volume that is made, with a checkpoint",
            |w| machine(w).await,
            |w| back_disk_up(w, Since::Whole, Some(true), Some("first")).await
        ),
        scenario!(
            "instance-disk-backup",
            "of what changed, over the backup before",
            |w| {
                machine(w).await?;
                done(w, back_disk_up(w, Since::Whole, Some(true), Some("first")).await).await
            },
            |w| back_disk_up(w, Since::Checkpoint("first".into()), Some(false), Some("second")).await
        ),
        scenario!(
            "instance-disk-backup",
            "which others read, of what changed",
            |w| {
                machine(w).await?;
                done(w, mark(w, "first").await).await
            },
            |w| back_disk_up(w, Since::Checkpoint("first".into()), None, Some("second")).await
        ),
        scenario!(
            "instance-copy",
            "of a running machine with a snapshot",
            |w| {
                machine(w).await?;
                done(w, snapshot_with_memory(w).await).await
            },
            |w| copy(w, None, true).await
        ),
        scenario!(
            "instance-disk-copy",
            "the root of a running machine with snapshots, to another pool",
            |w| {
                second_pool(w).await?;
                machine(w).await?;
                done(w, snapshot_with_memory(w).await).await?;
                done(w, snapshot(w, OF_C1, "s2").await).await
            },
            |w| {
                let request = MoveInstance { pool: Some("second".into()), ..Default::default() };
                w.engine.instance_move(&w.admin, "default", "c1", request).await
            }
        ),
        scenario!(
            "instance-disk-copy",
            "a custom volume, into one that is made in another pool",
            |w| {
                second_pool(w).await?;
                done(w, volume(w, "v1", VolumeContent::Block).await).await?;
                done(w, defined(w).await).await
            },
            |w| copy_disk(w, "second", true).await
        ),
        scenario!(
            "instance-disk-copy",
            "of a machine that is frozen, into a custom volume that is there",
            |w| {
                done(w, volume(w, "v1", VolumeContent::Block).await).await?;
                done(w, volume(w, "v2", VolumeContent::Block).await).await?;
                done(w, defined(w).await).await?;
                done(w, set_power(w, PowerAction::Freeze).await).await
            },
            |w| copy_disk(w, "default", false).await
        ),
        scenario!(
            "instance-disk-copy",
            "of no disk: its active layer goes into the lowest file",
            |w| layered(w).await,
            |w| merge(w, MergeLayers::Commit { top: None, base: LayerName::Lowest }).await
        ),
        scenario!(
            "instance-disk-copy",
            "of no disk: a layer goes into the one below it",
            |w| layered(w).await,
            |w| {
                let top = Some("instances/c1.s1".into());
                merge(w, MergeLayers::Commit { top, base: LayerName::Lowest }).await
            }
        ),
        scenario!(
            "instance-disk-copy",
            "of no disk: all that is below goes into the active layer",
            |w| layered(w).await,
            |w| merge(w, MergeLayers::Pull { base: None }).await
        ),
        scenario!(
            "layers-create",
            "of a machine that runs, with still file systems, over a layer",
            |w| {
                machine(w).await?;
                done(w, layer(w, "s1", false).await).await
            },
            |w| layer(w, "s2", true).await
        ),
        scenario!(
            "layers-create",
            "of a machine that does not run",
            |w| {
                machine(w).await?;
                done(w, set_power(w, PowerAction::Stop).await).await
            },
            |w| layer(w, "s1", false).await
        ),
        scenario!("machine-memory-writing", "a machine that runs, saved", |w| machine(w).await, |w| {
            save_memory(w).await
        }),
        scenario!(
            "machine-memory-writing",
            "a machine that is frozen, saved over an older file",
            |w| {
                machine(w).await?;
                done(w, save_memory(w).await).await?;
                let restored = w.engine.machine_restore(&w.admin, "default", "c1", "/srv/saves/c1", true);
                done(w, restored.await).await
            },
            |w| save_memory(w).await
        ),
        scenario!("machine-memory-writing", "a dump of a machine that goes on", |w| machine(w).await, |w| {
            dump_memory(w, AfterDump::GoesOn).await
        }),
        scenario!(
            "machine-memory-writing",
            "a dump of a machine that is reset then",
            |w| machine(w).await,
            |w| dump_memory(w, AfterDump::Reset).await
        ),
        scenario!(
            "instance-power",
            "start from a file",
            |w| {
                machine(w).await?;
                done(w, save_memory(w).await).await
            },
            |w| w.engine.machine_restore(&w.admin, "default", "c1", "/srv/saves/c1", false).await
        ),
        scenario!(
            "snapshot-create",
            "of a machine whose file systems are made still",
            |w| machine(w).await,
            |w| {
                let request = CreateSnapshot { quiesce: Some(Quiesce::Require), ..CreateSnapshot::default() };
                w.engine.snapshot_create(&w.admin, OF_C1, request).await
            }
        ),
        scenario!(
            "backup-create",
            "of a machine whose file systems are made still",
            |w| {
                let config = Config::from([("snapshots.quiesce".into(), "require".into())]);
                let kind = InstanceKind::VirtualMachine;
                let request = CreateInstance { start: true, kind, config, ..container("c1") };
                done(w, Ok(w.engine.instance_create(&w.admin, "default", request).await?.1)).await
            },
            |w| back_up(w, OF_C1).await
        ),
        scenario!(
            "content-refresh",
            "of a machine whose original runs, and that ran itself",
            |w| {
                machine(w).await?;
                done(w, snapshot(w, OF_C1, "s1").await).await?;
                done(w, copy(w, None, true).await).await?;
                let stop = power(PowerAction::Stop);
                done(w, w.engine.instance_power(&w.admin, "default", "c2", stop).await).await?;
                let of = Origin::Instance { project: "default", name: "c2" };
                done(w, snapshot(w, of, "own").await).await?;
                done(w, snapshot(w, OF_C1, "s2").await).await
            },
            |w| refresh(w).await
        ),
        scenario!(
            "backup-create",
            "of a running machine with a snapshot",
            |w| {
                machine(w).await?;
                done(w, snapshot(w, OF_C1, "s1").await).await
            },
            |w| back_up(w, OF_C1).await
        ),
        scenario!(
            "instance-import",
            "a machine with a snapshot",
            |w| {
                machine(w).await?;
                done(w, snapshot(w, OF_C1, "s1").await).await?;
                done(w, back_up(w, OF_C1).await).await
            },
            |w| {
                let request =
                    ImportInstance { upload: upload(w, OF_C1).await?, name: Some("c2".into()), pool: None };
                w.engine.instance_import(&w.admin, "default", request).await
            }
        ),
    ]
}
