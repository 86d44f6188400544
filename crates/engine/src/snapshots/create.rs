//! Taking snapshots.

use super::{
    Found, Origin, Taken, automatic_name, check_note, expiry, owned,
    pause::{PausedGuest, guest, pause, quiesce, release, resume},
    uncovered_now,
};
use crate::{
    Engine, EngineInner, Records,
    compute::power::SAVING,
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    tenancy::{restricted, rules::ProjectRules},
    volumes,
};
use async_trait::async_trait;
use jiff::Timestamp;
use karst_agent::{CallContext, MachineStateRef, MachineStateSave, VolumeSnapshotRef};
use karst_model::{
    Error, Name, NodeId, Result, SnapshotId,
    guest::Observed,
    instance::{Instance, InstanceKind, Status},
    snapshot::{QUIESCE, Quiesce, Snapshot, VolumeSnapshot},
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Longest that the disk is waited for, on which others write too.
const FLUSH: Duration = Duration::from_secs(600);

/// What a user wants.
#[derive(Debug, Clone, Default)]
pub struct CreateSnapshot {
    /// Name; by the pattern of the configuration when absent.
    pub name: Option<String>,
    /// When it goes: as the configuration says (`None`), never (`Some(None)`), or then.
    pub expires_at: Option<Option<Timestamp>>,
    /// User's text; volumes only.
    pub description: String,
    /// User's text of a snapshot of an instance.
    pub note: String,
    /// Taken by the schedule.
    pub automatic: bool,
    /// With the memory of the running virtual machine.
    pub stateful: bool,
    /// Are file systems inside virtual machines made still before? As the configuration of each says when absent.
    pub quiesce: Option<Quiesce>,
}

impl Engine {
    /// Takes a snapshot of an instance or custom volume. Guests that run are paused for the moment it takes.
    ///
    /// # Errors
    /// Invalid by field, not found, conflict (taken name, busy), forbidden.
    pub async fn snapshot_create(
        &self,
        context: &Context,
        origin: Origin<'_>,
        request: CreateSnapshot,
    ) -> Result<LiveOperation> {
        let project = origin.editor(self, context)?;
        let inner = self.inner();
        restricted::check_snapshot(&ProjectRules::parse(&project.config)?)?;
        runner::start::<SnapshotCreate>(inner, context, |tx| {
            let records = inner.inventory.read();
            let found = origin.find(&records, project.id)?;
            found.demand_ready()?;
            found.expect(tx);
            check_note(&request.note)?;
            let (now, config, taken) = (inner.env.now(), found.config(&records), found.taken(&records));
            let name = match request.name.as_deref().filter(|n| !n.is_empty()) {
                Some(name) => Name::parse("name", name)?,
                None => Name::parse("config.snapshots.pattern", &automatic_name(&config, &taken, now)?)?,
            };
            if taken.iter().any(|s| s.name() == &*name) {
                return Err(Error::conflict(format!(
                    "{} has a snapshot {:?} already",
                    found.words(),
                    &*name
                ))
                .at("name"));
            }
            let expires_at = match request.expires_at {
                Some(chosen) => chosen,
                None => expiry(&config, !request.automatic, now)?,
            };
            if expires_at.is_some_and(|t| t <= now) {
                return Err(Error::invalid("expires_at", "the time at which it goes is over already"));
            }
            let id = SnapshotId(inner.env.uuid());
            let path = found.path(&records, &name);
            let mut guests = vec![];
            let mut machine = None;
            if request.stateful {
                demand_memory(&records, &found)?;
                if request.quiesce.is_some_and(|q| q != Quiesce::No) {
                    let text =
                        "memory is kept of a machine as it runs; take the snapshot with the one or the other";
                    return Err(Error::invalid("quiesce", text));
                }
            }
            let alone = "which a snapshot would not hold whole";
            match &found {
                Found::Instance(row) => crate::layers::demand_one_of(&records, row, alone)?,
                Found::Volume(row) => crate::layers::demand_one(&records, row.id, alone)?,
            }
            let (snapshot, refs) = match &found {
                Found::Instance(row) => {
                    machine = (row.kind == InstanceKind::VirtualMachine).then_some(MachineStateSave {
                        at: MachineStateRef { instance: row.id, snapshot: id },
                        memory: request.stateful,
                    });
                    let volumes = owned(&records, row);
                    guests.extend(guest(&records, row));
                    let refs: Vec<_> = volumes
                        .iter()
                        .map(|v| VolumeSnapshotRef { pool: v.pool, volume: v.id, snapshot: id })
                        .collect();
                    let snapshot = Snapshot {
                        id,
                        instance: row.id,
                        name,
                        parent: row.current_snapshot,
                        description: row.description.clone(),
                        note: request.note.clone(),
                        ephemeral: row.ephemeral,
                        profiles: row.profiles.clone(),
                        config: row.config.clone(),
                        devices: row.devices.clone(),
                        hardware: row.hardware.clone(),
                        volumes: volumes.iter().map(|v| (v.id, id)).collect(),
                        stateful: request.stateful,
                        created_at: now,
                        expires_at,
                        scheduled: request.automatic,
                        spec_version: 1,
                        external: None,
                    };
                    (Taken::Instance { snapshot: Box::new(snapshot) }, refs)
                }
                Found::Volume(row) => {
                    for user in volumes::attached(&records, row) {
                        guests.extend(guest(&records, &user));
                    }
                    let snapshot = VolumeSnapshot {
                        id,
                        volume: row.id,
                        name,
                        description: request.description.clone(),
                        size: row.size,
                        config: row.config.clone(),
                        created_at: now,
                        expires_at,
                        scheduled: request.automatic,
                        spec_version: 1,
                    };
                    let at = VolumeSnapshotRef { pool: row.pool, volume: row.id, snapshot: id };
                    (Taken::Volume { snapshot: Box::new(snapshot) }, vec![at])
                }
            };
            crate::storage::use_pools(&records, tx, refs.iter().map(|at| at.pool))?;
            for guest in &mut guests {
                guest.quiesce = match request.stateful {
                    true => Quiesce::No,
                    false => request.quiesce.unwrap_or(guest.quiesce),
                };
            }
            if let Found::Instance(row) = &found
                && !request.stateful
                && request.quiesce.unwrap_or_else(|| quiesce(&records, row)) == Quiesce::Require
            {
                demand_awake(&records, row)?;
            }
            let mut locks = vec![found.lock()];
            locks.extend(guests.iter().map(|g| crate::compute::lock(g.at.instance)));
            locks.sort();
            locks.dedup();
            let node = match &found {
                Found::Instance(row) => row.node,
                Found::Volume(_) => inner.node,
            };
            let plan =
                SnapshotPlan { snapshot, volumes: refs, machine, guests, locks, node, path: path.clone() };
            Ok((plan, NewOperation::task("Snapshotting", Some(project.id), found.kind(), path)))
        })
        .await
    }
}

/// A machine whose processors stand still cannot make its file systems so.
fn demand_awake(records: &Records, row: &Instance) -> Result<()> {
    let status = row.status(records.runtimes.get(&row.id).map(|r| &r.value));
    let still = match status {
        Status::Frozen => "frozen",
        Status::Error => "halted by an error",
        _ => return Ok(()),
    };
    if row.kind == InstanceKind::VirtualMachine {
        return Err(Error::conflict(format!(
            "instance {:?} is {still}: its file systems cannot be made still; resume it, or take the snapshot with {QUIESCE}=no",
            &*row.name
        ))
        .at("quiesce"));
    }
    Ok(())
}

/// Can the memory go into a snapshot?
fn demand_memory(records: &Records, found: &Found) -> Result<()> {
    let Found::Instance(row) = found else {
        return Err(Error::unsupported("a volume has no memory").at("stateful"));
    };
    crate::compute::power::demand_stateful(row, &records.expanded(row).0)?;
    crate::compute::run::demand_defined(records, row)?;
    let status = row.status(records.runtimes.get(&row.id).map(|r| &r.value));
    if status == Status::Error {
        return Err(Error::conflict(format!(
            "instance {:?} is halted by an error; resume it when the cause is gone, or take the snapshot without memory",
            &*row.name
        ))
        .at("stateful"));
    }
    if !status.is_up() {
        return Err(Error::conflict(format!(
            "instance {:?} is not running: it has no memory to be kept",
            &*row.name
        ))
        .at("stateful"));
    }
    if let Some(disk) = uncovered_now(records, row)?.first() {
        // Whoever went back to it would have the memory of then beside a disk of now: its file systems would be destroyed.
        return Err(Error::conflict(format!(
            "disk {disk:?} of instance {:?} is a volume with snapshots of its own, which no snapshot of the instance \
             holds, so that memory kept with one would not fit it; take the snapshot without memory, or detach the disk",
            &*row.name
        ))
        .at("stateful"));
    }
    Ok(())
}

/// Plan of [`SnapshotCreate`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SnapshotPlan {
    snapshot: Taken,
    volumes: Vec<VolumeSnapshotRef>,
    /// What a virtual machine is beside its disks.
    #[serde(default)]
    machine: Option<MachineStateSave>,
    guests: Vec<PausedGuest>,
    locks: Vec<String>,
    node: NodeId,
    path: String,
}

impl SnapshotPlan {
    /// Waits until the snapshots are on disk: who was told of one may delete what it is of.
    async fn flush(&self, cx: &StepContext) -> Result<()> {
        let pools: std::collections::BTreeSet<_> = self.volumes.iter().map(|at| at.pool).collect();
        for pool in pools {
            cx.agent(self.node)?.pool_flush(&CallContext::read(FLUSH), pool).await?;
        }
        Ok(())
    }
}

/// Outputs of [`SnapshotCreate`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SnapshotOutputs {
    resumed: Vec<Observed>,
    /// What was tried and did not go.
    #[serde(default)]
    warnings: Vec<String>,
}

/// Pauses the guests, takes a snapshot of each volume, lets the guests go on, then the record is there.
pub struct SnapshotCreate;

#[async_trait]
impl Saga for SnapshotCreate {
    const NAME: &'static str = "snapshot-create";
    const STEPS: &'static [&'static str] = &["pause", "machine", "volumes", "resume"];
    type Plan = SnapshotPlan;
    type Outputs = SnapshotOutputs;

    fn has(plan: &SnapshotPlan, step: usize) -> bool {
        match step {
            1 => plan.machine.is_some(),
            2 => true,
            _ => !plan.guests.is_empty(),
        }
    }

    fn locks(plan: &SnapshotPlan) -> Vec<String> {
        plan.locks.clone()
    }
    fn begin(plan: &SnapshotPlan, _: &EngineInner, tx: &mut Tx) -> Result<()> {
        plan.snapshot.take_name(tx);
        Ok(())
    }
    async fn run(
        cx: &StepContext,
        plan: &SnapshotPlan,
        outputs: &mut SnapshotOutputs,
        step: usize,
    ) -> Result<()> {
        match step {
            0 => outputs.warnings = pause(cx, &plan.guests).await?,
            1 => {
                if let Some(machine) = plan.machine {
                    cx.agent(plan.node)?.machine_state_save(&cx.mutate(SAVING), machine).await?;
                }
            }
            2 => {
                for at in &plan.volumes {
                    let agent = cx.agent(plan.node)?;
                    agent.volume_snapshot_create(&cx.mutate(Duration::from_secs(1800)), *at).await?;
                }
                // Guests that stand still for it do not wait for the disk.
                if plan.guests.is_empty() {
                    plan.flush(cx).await?;
                }
            }
            _ => {
                outputs.resumed = resume(cx, &plan.guests).await?;
                plan.flush(cx).await?;
            }
        }
        Ok(())
    }
    async fn undo(cx: &StepContext, plan: &SnapshotPlan, _: &SnapshotOutputs, step: usize) -> Result<()> {
        match step {
            0 => release(cx, &plan.guests).await?,
            1 => {
                if let Some(machine) = plan.machine {
                    let time = Duration::from_secs(300);
                    cx.agent(plan.node)?.machine_state_delete(&cx.mutate(time), machine.at).await?;
                }
            }
            2 => {
                for at in &plan.volumes {
                    let agent = cx.agent(plan.node)?;
                    agent.volume_snapshot_delete(&cx.mutate(Duration::from_secs(300)), *at).await?;
                }
            }
            _ => {}
        }
        Ok(())
    }
    fn commit(
        plan: &SnapshotPlan,
        outputs: &SnapshotOutputs,
        engine: &EngineInner,
        tx: &mut Tx,
    ) -> Result<()> {
        match &plan.snapshot {
            Taken::Instance { snapshot } => {
                tx.create(&**snapshot);
                let row = engine.instance_row(snapshot.instance)?;
                let instance = Instance { current_snapshot: Some(snapshot.id), ..row.value.clone() };
                tx.replace(&row, &instance);
            }
            Taken::Volume { snapshot } => tx.create(&**snapshot),
        }
        engine.note_resumed(&engine.inventory.read(), &outputs.resumed, tx);
        Ok(())
    }
    fn abort(plan: &SnapshotPlan, _: &SnapshotOutputs, _: &EngineInner, tx: &mut Tx) -> Result<()> {
        plan.snapshot.release_name(tx);
        Ok(())
    }
    fn result(
        _: &SnapshotPlan,
        outputs: &SnapshotOutputs,
        _: &EngineInner,
    ) -> serde_json::Map<String, serde_json::Value> {
        let warnings =
            (!outputs.warnings.is_empty()).then(|| ("warnings".into(), outputs.warnings.clone().into()));
        warnings.into_iter().collect()
    }
    fn announce(plan: &SnapshotPlan) -> Vec<(&'static str, String)> {
        let action = match plan.snapshot {
            Taken::Instance { .. } => "instance-snapshot-created",
            Taken::Volume { .. } => "storage-volume-snapshot-created",
        };
        vec![(action, plan.path.clone())]
    }
}
