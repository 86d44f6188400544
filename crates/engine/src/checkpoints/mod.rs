//! Checkpoints of virtual machines, and backups of their disks while they run: the use cases.
//!
//! The checkpoints of an instance are a line ([`karst_model::checkpoint`]): a new one descends from the newest, and of one that is
//! deleted the next descends from the one before it, which has on the host what it had. What a host follows is in the file of a
//! disk: where a disk becomes another one, or has another size, an instance must have no checkpoints of it (`demand_none`).

pub mod backup;
pub mod create;
pub mod delete;

use crate::{Engine, EngineInner, Records, Row, compute::expand, context::Context, db::Tx};
use karst_agent::{CallContext, GuestRef, MachineCheckpoints, MarkedVolume, NewMark, VolumeRef};
use karst_model::{
    CheckpointId, Config, Error, InstanceId, Name, Result, VolumeId,
    access::Permission,
    checkpoint::{Checkpoint, CheckpointDisk},
    device::DiskOrigin,
    guest::CheckpointMark,
    instance::{Instance, InstanceKind, Lifecycle},
    storage::{Volume, VolumeContent},
};
use std::time::Duration;

const CALL: Duration = Duration::from_secs(30);
/// Checkpoints of one instance: QEMU merges as many at one moment.
const MOST: usize = 64;

/// A checkpoint to be made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CreateCheckpoint {
    /// Its name.
    pub name: String,
    /// User's text.
    pub note: String,
    /// Devices of its disks; `None`: all that the guest writes to.
    pub disks: Option<Vec<String>>,
}

fn index(checkpoint: &Checkpoint) -> (&'static str, String) {
    ("checkpoints", checkpoint.instance.to_string())
}

fn take_name(tx: &mut Tx, checkpoint: &Checkpoint) {
    let (table, scope) = index(checkpoint);
    tx.take_name(table, &scope, &checkpoint.name, &checkpoint.id.to_string());
}

fn release_name(tx: &mut Tx, checkpoint: &Checkpoint) {
    let (table, scope) = index(checkpoint);
    tx.release_name(table, &scope, &checkpoint.name, &checkpoint.id.to_string());
}

/// Refuses what would make another disk of a volume while there are checkpoints of it. `why` ends the sentence: what that does to
/// them.
///
/// # Errors
/// Conflict, naming the oldest checkpoint.
pub(crate) fn demand_none(records: &Records, volume: VolumeId, why: &str) -> Result<()> {
    let found = oldest(records, |c| c.has(volume));
    found.map_or(Ok(()), |c| Err(in_the_way(records, c, why)))
}

/// The same of all disks of an instance.
///
/// # Errors
/// Conflict, naming the oldest checkpoint.
pub(crate) fn demand_none_of(records: &Records, instance: InstanceId, why: &str) -> Result<()> {
    let found = oldest(records, |c| c.instance == instance);
    found.map_or(Ok(()), |c| Err(in_the_way(records, c, why)))
}

/// Records stand in the order of their ids, which are random: an error that names one of several names the same each time.
fn oldest(records: &Records, wanted: impl Fn(&Checkpoint) -> bool) -> Option<&Row<Checkpoint>> {
    records.checkpoints.values().filter(|c| wanted(c)).min_by_key(|c| (c.created_at, c.id))
}

fn in_the_way(records: &Records, checkpoint: &Checkpoint, why: &str) -> Error {
    let instance = records.instances.get(&checkpoint.instance).map(|i| i.name.to_string());
    Error::conflict(format!(
        "instance {:?} has checkpoint {:?}, {why}; delete its checkpoints first",
        instance.unwrap_or_default(),
        &*checkpoint.name
    ))
}

/// A virtual machine that runs.
struct Running<'a> {
    row: &'a Row<Instance>,
    guest: GuestRef,
}

fn running<'a>(records: &Records, row: &'a Row<Instance>) -> Result<Running<'a>> {
    let name = &*row.name;
    if row.kind != InstanceKind::VirtualMachine {
        let text = format!("instance {name:?} is a container; disks of virtual machines have checkpoints");
        return Err(Error::unsupported(text));
    }
    let runtime = records.runtimes.get(&row.id);
    let status = row.status(runtime.map(|r| &r.value));
    if row.lifecycle != Lifecycle::Ready || !status.is_up() {
        return Err(Error::conflict(format!("instance {name:?} is not running; start it first")));
    }
    let generation = runtime.map_or(row.generation, |r| r.generation);
    Ok(Running { row, guest: GuestRef { instance: row.id, generation } })
}

/// A disk that the guest writes to.
pub(crate) struct OwnDisk<'a> {
    pub(crate) device: String,
    pub(crate) volume: &'a Row<Volume>,
}

impl OwnDisk<'_> {
    fn at(&self) -> VolumeRef {
        VolumeRef { pool: self.volume.pool, volume: self.volume.id }
    }
}

/// The disks of a machine that it writes to, as it runs with them: all, or those of the devices `wanted`.
pub(crate) fn disks<'a>(
    records: &'a Records,
    row: &Row<Instance>,
    wanted: Option<&[String]>,
) -> Result<Vec<OwnDisk<'a>>> {
    let devices = records.expanded(row).1;
    let parsed = expand::parse_devices(&devices)?;
    let mut all = vec![];
    // A machine without a disk has a root that it does not see.
    if let Some(volume) = records.volumes.get(&row.root).filter(|_| parsed.root.1.attached) {
        all.push(OwnDisk { device: parsed.root.0.clone(), volume });
    }
    for (device, disk) in &parsed.disks {
        if let DiskOrigin::Volume { pool, volume } = &disk.source
            && !disk.readonly
            && let Some(volume) = records.custom_volume(row.project, pool, volume)
        {
            all.push(OwnDisk { device: device.clone(), volume });
        }
    }
    all.retain(|d| d.volume.content == VolumeContent::Block);
    if let Some(wanted) = wanted {
        for device in wanted {
            if !all.iter().any(|d| d.device == *device) {
                let text = format!("{device:?} is no disk of the instance, in a pool, that it writes to");
                return Err(Error::invalid("disks", text));
            }
        }
        all.retain(|d| wanted.contains(&d.device));
    }
    let applied = records.runtimes.get(&row.id).and_then(|r| r.applied.as_ref());
    for disk in &all {
        let now = applied.map(|a| a.devices.get(&disk.device));
        let keys = devices.get(&disk.device);
        let same = |now: Option<&Config>| {
            ["pool", "source"]
                .iter()
                .all(|key| now.and_then(|d| d.get(*key)) == keys.and_then(|d| d.get(*key)))
        };
        if now.is_some_and(|now| !same(now)) {
            let text = format!(
                "the device {:?} changes with the next start of the instance; restart it first",
                disk.device
            );
            return Err(Error::conflict(text).at("disks"));
        }
    }
    if all.is_empty() {
        return Err(Error::invalid("disks", "there is no disk that the guest writes to"));
    }
    Ok(all)
}

/// Refuses disks that are encrypted: QEMU would write what it decrypted.
fn demand_plain(records: &Records, row: &Row<Instance>, disks: &[OwnDisk<'_>]) -> Result<()> {
    let devices = records.expanded(row).1;
    let parsed = expand::parse_devices(&devices)?;
    let io = |device: &str| {
        parsed.disks.iter().find(|(name, _)| name == device).map_or(parsed.root.1.io, |(_, disk)| disk.io)
    };
    match disks.iter().find(|d| crate::keys::is_encrypted(d.volume, &io(&d.device))) {
        None => Ok(()),
        Some(disk) => {
            let text = format!(
                "the disk {:?} is encrypted: QEMU would write what it decrypted into a backup; back up its volume instead, and name the \
                 other disks",
                disk.device
            );
            Err(Error::unsupported(text).at("disks"))
        }
    }
}

/// The record of a new checkpoint, what the host is told of it, and the checkpoints that there are.
fn prepare(
    inner: &EngineInner,
    records: &Records,
    tx: &mut Tx,
    row: &Row<Instance>,
    request: &CreateCheckpoint,
) -> Result<(Checkpoint, NewMark)> {
    crate::snapshots::check_note(&request.note)?;
    let name = Name::parse("name", &request.name)?;
    let line = records.checkpoints_of(row.id);
    if line.iter().any(|c| c.name == name) {
        let text = format!("instance {:?} has a checkpoint {:?} already", &*row.name, &*name);
        return Err(Error::conflict(text).at("name"));
    }
    if line.len() >= MOST {
        let text = format!("an instance has at most {MOST} checkpoints; delete some first");
        return Err(Error::conflict(text));
    }
    if let Some(last) = line.last() {
        tx.expect(last);
    }
    let disks = disks(records, row, request.disks.as_deref())?;
    demand_plain(records, row, &disks)?;
    let id = CheckpointId(inner.env.uuid());
    let mut mark = NewMark { id, disks: vec![] };
    let mut own = vec![];
    for disk in &disks {
        tx.expect(disk.volume);
        crate::layers::demand_one(records, disk.volume.id, "and a checkpoint is of one file")?;
        let before = line.iter().rev().find(|c| c.has(disk.volume.id)).map(|c| c.id);
        mark.disks.push(MarkedVolume { volume: disk.at(), before });
        own.push(CheckpointDisk { device: disk.device.clone(), volume: disk.volume.id });
    }
    let checkpoint = Checkpoint {
        id,
        instance: row.id,
        name,
        parent: line.last().map(|c| c.id),
        note: request.note.clone(),
        profiles: row.profiles.clone(),
        config: row.config.clone(),
        devices: row.devices.clone(),
        disks: own,
        created_at: inner.env.now(),
        spec_version: 1,
    };
    Ok((checkpoint, mark))
}

impl Engine {
    /// Checkpoints of an instance, in the order in which they descend from each other.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn checkpoints(&self, context: &Context, project: &str, name: &str) -> Result<Vec<Checkpoint>> {
        let project = self.project(context, project, Permission::ProjectView)?;
        let records = self.inner().inventory.read();
        let row = records.instance(&project, name)?;
        Ok(records.checkpoints_of(row.id).into_iter().map(|c| c.value.clone()).collect())
    }

    /// What the host has of the checkpoints of an instance that runs.
    ///
    /// # Errors
    /// Not found, conflict when it does not run, unavailable, forbidden.
    pub async fn checkpoint_marks(
        &self,
        context: &Context,
        project: &str,
        name: &str,
    ) -> Result<Vec<CheckpointMark>> {
        let project = self.project(context, project, Permission::ProjectView)?;
        let (node, request) = {
            let records = self.inner().inventory.read();
            let row = records.instance(&project, name)?;
            let Running { row, guest } = running(&records, row)?;
            let volumes = disks(&records, row, None)?.iter().map(OwnDisk::at).collect();
            (row.node, MachineCheckpoints { guest, volumes })
        };
        self.inner().agents.get(node)?.machine_checkpoints(&CallContext::read(CALL), request).await
    }

    /// Gives a checkpoint another text.
    ///
    /// # Errors
    /// Not found, invalid, forbidden.
    pub async fn checkpoint_describe(
        &self,
        context: &Context,
        project: &str,
        instance: &str,
        name: &str,
        note: &str,
    ) -> Result<()> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        crate::snapshots::check_note(note)?;
        self.inner()
            .transact(|records, tx| {
                let row = demand(records, records.instance(&project, instance)?, name)?;
                let mut checkpoint = row.value.clone();
                if checkpoint.note == note {
                    return Ok(());
                }
                checkpoint.note = note.to_owned();
                checkpoint.spec_version += 1;
                tx.replace(row, &checkpoint);
                Ok(())
            })
            .await
    }
}

fn demand<'a>(records: &'a Records, row: &Row<Instance>, name: &str) -> Result<&'a Row<Checkpoint>> {
    let found = records.checkpoints_of(row.id).into_iter().find(|c| *c.name == *name);
    let missing = || Error::not_found(format!("checkpoint {name:?} of instance {:?} not found", &*row.name));
    found.ok_or_else(missing)
}

impl EngineInner {
    /// Forgets the checkpoints of an instance that is being deleted, after its volumes went.
    pub(crate) async fn forget_checkpoints(&self, instance: InstanceId) -> Result<()> {
        loop {
            let more = self
                .transact(|records, tx| {
                    let all = records.checkpoints_of(instance);
                    for row in all.iter().take(30) {
                        tx.delete(*row);
                        release_name(tx, row);
                    }
                    Ok(all.len() > 30)
                })
                .await?;
            if !more {
                return Ok(());
            }
        }
    }
}
