//! Making checkpoints.

use super::{CreateCheckpoint, Running, prepare, release_name, running, take_name};
use crate::{
    Engine, EngineInner, Row,
    compute::{lock, path},
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
};
use async_trait::async_trait;
use karst_agent::{GuestRef, MachineCheckpointCreate, MachineCheckpointDelete, NewMark, UnmarkedVolume};
use karst_model::{
    CheckpointId, InstanceId, NodeId, Result, access::Permission, checkpoint::Checkpoint, instance::Instance,
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

const CALL: Duration = Duration::from_secs(120);

impl Engine {
    /// Makes a checkpoint of a virtual machine that runs: from now on the host follows what changes of its disks.
    ///
    /// # Errors
    /// Invalid by field, not found, conflict (not running, busy, taken name), unsupported for containers, forbidden; the operation
    /// fails for a disk that cannot keep it, by its name.
    pub async fn checkpoint_create(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        request: CreateCheckpoint,
    ) -> Result<LiveOperation> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        let inner = self.inner();
        runner::start::<CheckpointCreate>(inner, context, |tx| {
            let records = inner.inventory.read();
            let Running { row, guest } = running(&records, records.instance(&project, name)?)?;
            tx.expect(row);
            tx.expect(&project);
            let (checkpoint, mark) = prepare(inner, &records, tx, row, &request)?;
            let known = records.checkpoints_of(row.id).iter().map(|c| c.id).collect();
            let path = path(&project.name, name);
            let plan = CreatePlan { checkpoint, mark, known, guest, node: row.node };
            Ok((plan, NewOperation::task("Creating checkpoint", Some(project.id), "instances", path)))
        })
        .await
    }
}

/// Plan of [`CheckpointCreate`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CreatePlan {
    checkpoint: Checkpoint,
    mark: NewMark,
    known: Vec<CheckpointId>,
    guest: GuestRef,
    node: NodeId,
}

/// What takes a checkpoint away that was made just now.
pub(super) fn taking_back(instance: InstanceId, mark: &NewMark) -> MachineCheckpointDelete {
    let disks = mark.disks.iter().map(|d| UnmarkedVolume { volume: d.volume, parent: d.before, last: true });
    MachineCheckpointDelete { instance, id: mark.id, disks: disks.collect() }
}

/// Writes the record of a checkpoint. The instance's own is written with it, as it is: whoever has decided meanwhile, by an instance
/// without checkpoints, that its disk may become another one decides anew.
pub(super) fn write(instance: &Row<Instance>, tx: &mut Tx, checkpoint: &Checkpoint) {
    tx.replace(instance, &instance.value);
    tx.create(checkpoint);
}

/// Lets the host follow what changes, then writes the record.
pub struct CheckpointCreate;

#[async_trait]
impl Saga for CheckpointCreate {
    const NAME: &'static str = "checkpoint-create";
    const STEPS: &'static [&'static str] = &["mark"];
    type Plan = CreatePlan;
    type Outputs = ();

    fn locks(plan: &CreatePlan) -> Vec<String> {
        vec![lock(plan.guest.instance)]
    }
    fn begin(plan: &CreatePlan, _: &EngineInner, tx: &mut Tx) -> Result<()> {
        take_name(tx, &plan.checkpoint);
        Ok(())
    }
    async fn run(cx: &StepContext, plan: &CreatePlan, _: &mut (), _: usize) -> Result<()> {
        let request =
            MachineCheckpointCreate { guest: plan.guest, mark: plan.mark.clone(), known: plan.known.clone() };
        cx.agent(plan.node)?.machine_checkpoint_create(&cx.mutate(CALL), request).await
    }
    async fn undo(cx: &StepContext, plan: &CreatePlan, _: &(), _: usize) -> Result<()> {
        let back = taking_back(plan.guest.instance, &plan.mark);
        cx.agent(plan.node)?.machine_checkpoint_delete(&cx.mutate(CALL), back).await
    }
    fn commit(plan: &CreatePlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        write(&engine.instance_row(plan.guest.instance)?, tx, &plan.checkpoint);
        Ok(())
    }
    fn abort(plan: &CreatePlan, _: &(), _: &EngineInner, tx: &mut Tx) -> Result<()> {
        release_name(tx, &plan.checkpoint);
        Ok(())
    }
}
