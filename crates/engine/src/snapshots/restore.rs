//! Putting instances and custom volumes back to a snapshot.

use super::{Found, Origin, Taken};
use crate::{
    Engine, EngineInner, Records,
    compute::disks::{check_disks, demand_drives},
    compute::expand,
    compute::update::follow_keys,
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    tenancy::limits::{Planned, admit, grows},
    volumes::{self, update::demand_one},
};
use async_trait::async_trait;
use karst_agent::{
    CallContext, MachineStateRef, MachineStateRestore, MachineStateSave, VolumeRef, VolumeSnapshotRef,
};
use karst_model::{
    ByteSize, Config, Error, ErrorKind, NodeId, Result, SnapshotId, VolumeId,
    instance::{Hardware, Instance, InstanceKind},
    keys_machine,
    snapshot::Snapshot,
    storage::Volume,
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

impl Engine {
    /// Makes an instance or custom volume what it was at a snapshot, its configuration included; other snapshots, also
    /// later ones, stay. An instance that runs is stopped by force for it and started again, as one piece of work: whatever
    /// fails or crashes, it runs again afterwards, as it was before or as it was at the snapshot.
    ///
    /// # Errors
    /// Not found, conflict when a running instance uses the volume or something is busy, forbidden.
    pub async fn snapshot_restore(
        &self,
        context: &Context,
        origin: Origin<'_>,
        name: &str,
    ) -> Result<LiveOperation> {
        self.snapshot_restore_with(context, origin, name, false).await
    }

    /// As [`Engine::snapshot_restore`]; with `memory` a virtual machine then runs on from where it was at the snapshot.
    ///
    /// # Errors
    /// Those, and invalid for a snapshot without memory.
    pub async fn snapshot_restore_with(
        &self,
        context: &Context,
        origin: Origin<'_>,
        name: &str,
        memory: bool,
    ) -> Result<LiveOperation> {
        let project = origin.editor(self, context)?;
        let runs = {
            let records = self.inner().inventory.read();
            let found = origin.find(&records, project.id)?;
            let taken = found.demand(&records, name)?.taken();
            demand_memory(&taken, memory)?;
            demand_own_drives(context, &found, &taken)?;
            matches!(&found, Found::Instance(row) if volumes::runs(&records, row))
        };
        if runs || memory {
            return self.restore_running(context, origin, name, memory, false).await;
        }
        let inner = self.inner();
        runner::start::<SnapshotRestore>(inner, context, |tx| {
            let records = inner.inventory.read();
            let found = origin.find(&records, project.id)?;
            if let Found::Instance(row) = &found
                && volumes::runs(&records, row)
            {
                return Err(Error::conflict(format!(
                    "instance {:?} has just been started; try again",
                    &*row.name
                )));
            }
            let plan = plan(inner, &records, tx, &found, name, memory)?;
            let path = plan.path.clone();
            Ok((plan, NewOperation::task("Restoring snapshot", Some(project.id), found.kind(), path)))
        })
        .await
    }
}

impl Engine {
    /// As [`Engine::snapshot_restore_with`] with the memory of a virtual machine, which stands still then until it is unfrozen.
    ///
    /// # Errors
    /// Those of [`Engine::snapshot_restore_with`].
    pub async fn snapshot_restore_paused(
        &self,
        context: &Context,
        origin: Origin<'_>,
        name: &str,
    ) -> Result<LiveOperation> {
        let project = origin.editor(self, context)?;
        {
            let records = self.inner().inventory.read();
            let found = origin.find(&records, project.id)?;
            let taken = found.demand(&records, name)?.taken();
            demand_memory(&taken, true)?;
            demand_own_drives(context, &found, &taken)?;
        }
        self.restore_running(context, origin, name, true, true).await
    }
}

/// A drive of the host's that the instance has no more comes back by an administrator only.
fn demand_own_drives(context: &Context, found: &Found, taken: &Taken) -> Result<()> {
    match (found, taken) {
        (Found::Instance(row), Taken::Instance { snapshot }) => {
            demand_drives(context, &row.devices, &snapshot.devices)
        }
        _ => Ok(()),
    }
}

/// What is to be done, of an instance once it does not run.
pub(super) fn plan(
    inner: &EngineInner,
    records: &Records,
    tx: &mut Tx,
    found: &Found,
    name: &str,
    memory: bool,
) -> Result<RestorePlan> {
    found.expect(tx);
    let row = found.demand(records, name)?;
    row.expect(tx);
    demand_memory(&row.taken(), memory)?;
    let over = "which would not know what the restore changed";
    match found {
        Found::Instance(row) => crate::checkpoints::demand_none_of(records, row.id, over)?,
        Found::Volume(row) => crate::checkpoints::demand_none(records, row.id, over)?,
    }
    let layered = "which a restore would take away with what is in it";
    match found {
        Found::Instance(row) => crate::layers::demand_one_of(records, row, layered)?,
        Found::Volume(row) => crate::layers::demand_one(records, row.id, layered)?,
    }
    if let Taken::Instance { snapshot } = row.taken()
        && snapshot.external.is_some()
    {
        return Err(Error::unsupported(format!(
            "snapshot {name:?} is the moment in which the disks went on in new layers, and holds nothing to go back to; what the disks \
             were then lies below those layers"
        )));
    }
    let target = match (found, row.taken()) {
        (Found::Instance(row), Taken::Instance { snapshot }) => {
            let instance = before(inner, records, tx, row, &snapshot, memory)?;
            Target::Instance { instance: Box::new(instance) }
        }
        (Found::Volume(row), Taken::Volume { snapshot }) => {
            for user in volumes::users(records, row).instances {
                if volumes::runs(records, &user) {
                    return Err(Error::conflict(format!(
                        "{} runs with volume {:?}; stop it before the volume is restored",
                        crate::compute::called(row.project, &user),
                        row.name
                    )));
                }
                let lock = crate::compute::lock(user.id);
                runner::demand_unlocked(records, std::slice::from_ref(&lock))?;
                tx.expect_unlocked(&lock);
                tx.expect(&user);
            }
            let mut volume = row.value.clone();
            volume.config = snapshot.config.clone();
            volume.size = snapshot.size;
            volume.spec_version += 1;
            if row.is_shared() && !volume.is_shared() {
                tx.expect_untouched(records, &volumes::lock(row.id));
                let attached = volumes::attached(records, row);
                demand_one(row, &attached).map_err(|e| {
                    let text = format!(
                        "as the snapshot has it one instance alone may have the volume; {}",
                        e.message
                    );
                    Error::conflict(text)
                })?;
            }
            let grown = grows(row.size, volume.size);
            if grown {
                let planned = Planned { volume: Some(&volume), ..Default::default() };
                admit(records, tx, volume.project, &planned)?;
            }
            Target::Volume { volume: Box::new(volume), grown, before: row.size }
        }
        _ => return Err(Error::internal("a snapshot of another kind", name)),
    };
    let volumes = row.taken().volumes(records);
    crate::storage::use_pools(records, tx, volumes.iter().map(|at| at.pool))?;
    let machine = match found {
        Found::Instance(i) if i.kind == InstanceKind::VirtualMachine => Some(RestoredMachine {
            at: MachineStateRef { instance: i.id, snapshot: row.taken().id() },
            saved: MachineStateRef { instance: i.id, snapshot: SnapshotId(inner.env.uuid()) },
            memory,
            stateful: i.stateful,
        }),
        _ => None,
    };
    let saved = volumes.iter().map(|v| VolumeSnapshotRef { snapshot: SnapshotId(inner.env.uuid()), ..*v });
    Ok(RestorePlan {
        saved: saved.collect(),
        volumes,
        machine,
        target,
        lock: found.lock(),
        node: match found {
            Found::Instance(row) => row.node,
            Found::Volume(_) => inner.node,
        },
        path: found.path(records, name),
    })
}

/// Writes down what sizes the volumes have now.
pub(super) fn write_sizes(records: &Records, tx: &mut Tx, outputs: &RestoreOutputs) {
    for (id, size) in &outputs.sizes {
        let Some(volume) = records.volumes.get(id) else { continue };
        let size = size.map(|stored| volume.shown(stored));
        if volume.size != size {
            tx.replace(volume, &Volume { size, ..volume.value.clone() });
        }
    }
}

/// What a machine of the snapshot is: its firmware, whose variables come back with it, and its CPU model were those; the rest
/// never changes. `before` is the configuration of now, `then` that of the snapshot, both with their profiles'.
pub(crate) fn hardware_of(now: &Hardware, at: &Snapshot, before: &Config, then: &Config) -> Result<Hardware> {
    Ok(match &at.hardware {
        Some(was) => Hardware { firmware: was.firmware, cpu_model: was.cpu_model.clone(), ..now.clone() },
        None => follow_keys(now, before, &keys_machine::hardware(then)?),
    })
}

/// An instance as it was at a snapshot, as far as what it refers to is still there.
fn before(
    inner: &EngineInner,
    records: &Records,
    tx: &mut Tx,
    row: &Instance,
    snapshot: &Snapshot,
    memory: bool,
) -> Result<Instance> {
    let mut instance = row.clone();
    // Memory that was kept over a stop is not that of the disks of then.
    instance.stateful = memory;
    instance.description = snapshot.description.clone();
    instance.ephemeral = snapshot.ephemeral;
    instance.config = snapshot.config.clone();
    instance.devices = snapshot.devices.clone();
    instance.profiles =
        snapshot.profiles.iter().copied().filter(|p| records.profiles.contains_key(p)).collect();
    for profile in instance.profiles.iter().filter_map(|id| records.profiles.get(id)) {
        tx.expect(profile);
        tx.touch(&crate::tenancy::profile_uses(profile.id));
    }
    instance.current_snapshot = Some(snapshot.id);
    instance.spec_version += 1;
    let (config, devices) = records.expanded(&instance);
    if let Some(now) = &row.hardware {
        instance.hardware = Some(hardware_of(now, snapshot, &records.expanded(row).0, &config)?);
    }
    let parsed = expand::parse_devices(&devices)?;
    let (device, root) = &parsed.root;
    if records.pool(&root.pool).map_err(|e| e.at(format!("devices.{device}.pool")))?.id != row.pool {
        return Err(Error::conflict(format!(
            "at that time the root disk was in pool {:?}, and it is in another one now",
            root.pool
        ))
        .at(format!("devices.{device}.pool")));
    }
    check_disks(records, tx, &instance, &parsed)?;
    let held: Vec<_> = snapshot.volumes.iter().map(|(volume, _)| *volume).collect();
    if memory && let Some(disk) = super::uncovered(records, &instance, &devices, &held)?.first() {
        return Err(Error::conflict(format!(
            "nothing of disk {disk:?} is in the snapshot: the memory of then does not fit what is on it now; restore the \
             snapshot without memory"
        ))
        .at("stateful"));
    }
    instance.identities =
        inner.assign_identities(records, &row.identities, &parsed, row.hardware.as_ref(), row.root);
    inner.check_nics(records, tx, &instance, &parsed)?;
    inner.guest_spec(records, &instance, 0)?;
    // What it was then may be more than the project has room for now, or than it may have.
    admit(records, tx, instance.project, &Planned { instance: Some(&instance), ..Default::default() })?;
    Ok(instance)
}

fn demand_memory(snapshot: &Taken, memory: bool) -> Result<()> {
    let has = matches!(snapshot, Taken::Instance { snapshot } if snapshot.stateful);
    if memory && !has {
        return Err(Error::invalid("stateful", "the snapshot was taken without the memory"));
    }
    Ok(())
}

/// What a virtual machine is beside its disks.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct RestoredMachine {
    at: MachineStateRef,
    /// What it is now, until the end.
    saved: MachineStateRef,
    memory: bool,
    /// Its memory is kept now.
    stateful: bool,
}

/// What is restored, as its record will be.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "of", rename_all = "snake_case")]
pub(super) enum Target {
    Instance {
        instance: Box<Instance>,
    },
    Volume {
        volume: Box<Volume>,
        /// It becomes larger than it was: that is recorded from the beginning, so that nobody else takes the room.
        #[serde(default)]
        grown: bool,
        #[serde(default)]
        before: Option<ByteSize>,
    },
}

/// Plan of [`SnapshotRestore`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RestorePlan {
    pub(super) target: Target,
    volumes: Vec<VolumeSnapshotRef>,
    #[serde(default)]
    machine: Option<RestoredMachine>,
    /// What the volumes are now, until the end.
    saved: Vec<VolumeSnapshotRef>,
    pub(super) lock: String,
    pub(super) node: NodeId,
    pub(super) path: String,
}

impl RestorePlan {
    /// Records the size that a volume is to have, or had, where it grows.
    fn claim(&self, engine: &EngineInner, tx: &mut Tx, forward: bool) -> Result<()> {
        let Target::Volume { volume, grown: true, before } = &self.target else { return Ok(()) };
        let row = engine.volume_row(volume.id)?;
        let size = if forward { volume.size } else { *before };
        tx.replace(&row, &Volume { size, ..row.value.clone() });
        Ok(())
    }

    /// A machine's disk is as large again as it was then. Where that is more than it has now, and than what is written says, its
    /// project has to have room for it.
    fn demand_room(&self, engine: &EngineInner, sizes: &[(VolumeId, Option<ByteSize>)]) -> Result<()> {
        let Target::Instance { instance } = &self.target else { return Ok(()) };
        let records = engine.inventory.read();
        let volume = records.volumes.get(&instance.root);
        let now = volume.and_then(|v| v.size);
        let stored = sizes.iter().find(|(id, _)| *id == instance.root).and_then(|(_, size)| *size);
        let root = stored.map(|size| volume.map_or(size, |v| v.shown(size)));
        if root.is_none() || !grows(now, root) {
            return Ok(());
        }
        let planned = Planned { instance: Some(instance), root, ..Default::default() };
        admit(&records, &mut Tx::default(), instance.project, &planned)
    }
}

/// Outputs of [`SnapshotRestore`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct RestoreOutputs {
    /// What the volumes have in their pools.
    pub(super) sizes: Vec<(VolumeId, Option<ByteSize>)>,
}

/// Saves what the volumes are, restores them, writes the record as it was and drops what was saved. Until the last step
/// all can be undone. Dropping is tried several times; should it still fail, what was saved is put back.
pub struct SnapshotRestore;

const LONG: Duration = Duration::from_secs(1800);

#[async_trait]
impl Saga for SnapshotRestore {
    const NAME: &'static str = "snapshot-restore";
    const STEPS: &'static [&'static str] = &["save", "restore", "clean"];
    type Plan = RestorePlan;
    type Outputs = RestoreOutputs;

    fn retries(step: usize) -> u32 {
        if step == 2 { 5 } else { 0 }
    }
    fn locks(plan: &RestorePlan) -> Vec<String> {
        vec![plan.lock.clone()]
    }
    fn begin(plan: &RestorePlan, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        plan.claim(engine, tx, true)
    }
    async fn run(
        cx: &StepContext,
        plan: &RestorePlan,
        outputs: &mut RestoreOutputs,
        step: usize,
    ) -> Result<()> {
        let agent = cx.agent(plan.node)?;
        match step {
            0 => {
                for at in &plan.saved {
                    agent.volume_snapshot_create(&cx.mutate(LONG), *at).await?;
                }
                if let Some(machine) = &plan.machine {
                    let save = MachineStateSave { at: machine.saved, memory: false };
                    agent.machine_state_save(&cx.mutate(LONG), save).await?;
                }
            }
            1 => {
                outputs.sizes.clear();
                for at in &plan.volumes {
                    agent.volume_snapshot_restore(&cx.mutate(LONG), *at).await?;
                    let volume = VolumeRef { pool: at.pool, volume: at.volume };
                    let all =
                        agent.volume_snapshots(&CallContext::read(Duration::from_secs(30)), volume).await?;
                    let size = all.iter().find(|s| s.snapshot == at.snapshot).and_then(|s| s.size);
                    outputs.sizes.push((at.volume, size));
                }
                plan.demand_room(&cx.engine, &outputs.sizes)?;
                if let Some(machine) = &plan.machine {
                    let restore = MachineStateRestore { at: machine.at, memory: machine.memory };
                    agent.machine_state_restore(&cx.mutate(LONG), restore).await?;
                }
            }
            _ => {
                for at in &plan.saved {
                    agent.volume_snapshot_delete(&cx.mutate(LONG), *at).await?;
                }
                if let Some(machine) = &plan.machine {
                    agent.machine_state_delete(&cx.mutate(LONG), machine.saved).await?;
                }
            }
        }
        Ok(())
    }
    async fn undo(cx: &StepContext, plan: &RestorePlan, _: &RestoreOutputs, step: usize) -> Result<()> {
        let agent = cx.agent(plan.node)?;
        let mut dropped = false;
        for at in &plan.saved {
            match step {
                0 => agent.volume_snapshot_delete(&cx.mutate(LONG), *at).await?,
                1 => match agent.volume_snapshot_restore(&cx.mutate(LONG), *at).await {
                    // Dropped already, by a last step that failed in the middle: it stays restored.
                    Err(e) if e.is(ErrorKind::NotFound) => dropped = true,
                    other => other?,
                },
                _ => {}
            }
        }
        match (&plan.machine, step) {
            (Some(machine), 0) => agent.machine_state_delete(&cx.mutate(LONG), machine.saved).await?,
            (Some(machine), 1) if !dropped => {
                let restore = MachineStateRestore { at: machine.saved, memory: machine.stateful };
                agent.machine_state_restore(&cx.mutate(LONG), restore).await?;
            }
            _ => {}
        }
        Ok(())
    }
    fn commit(plan: &RestorePlan, outputs: &RestoreOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        match &plan.target {
            Target::Instance { instance } => {
                let row = engine.instance_row(instance.id)?;
                let restored =
                    Instance { power: row.power, generation: row.generation, ..(**instance).clone() };
                tx.replace(&row, &restored);
                write_sizes(&engine.inventory.read(), tx, outputs);
            }
            Target::Volume { volume, .. } => {
                let row = engine.volume_row(volume.id)?;
                let records = engine.inventory.read();
                if row.is_shared() && !volume.is_shared() {
                    // Its lock keeps others from attaching it; a profile may have brought it to some all the same.
                    demand_one(&row, &volumes::attached(&records, &row))?;
                    tx.expect_untouched(&records, &volumes::lock(row.id));
                }
                tx.replace(&row, &**volume);
            }
        }
        Ok(())
    }
    fn abort(plan: &RestorePlan, _: &RestoreOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        plan.claim(engine, tx, false)
    }
    fn announce(plan: &RestorePlan) -> Vec<(&'static str, String)> {
        let action = match plan.target {
            Target::Instance { .. } => "instance-restored",
            Target::Volume { .. } => "storage-volume-restored",
        };
        vec![(action, plan.path.clone())]
    }
}
