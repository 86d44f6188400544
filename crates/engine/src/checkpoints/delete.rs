//! Deleting checkpoints.

use super::{demand, release_name, running};
use crate::{
    Engine, EngineInner,
    compute::{lock, path},
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    volumes,
};
use async_trait::async_trait;
use karst_agent::{MachineCheckpointDelete, UnmarkedVolume, VolumeRef};
use karst_model::{Error, NodeId, Result, access::Permission, checkpoint::Checkpoint};
use serde::{Deserialize, Serialize};
use std::time::Duration;

const CALL: Duration = Duration::from_secs(120);

impl Engine {
    /// Deletes a checkpoint: what the host has of it goes to the one before it, from which the next descends then. Of a machine
    /// that does not run only the oldest can go, which leaves nothing to any.
    ///
    /// # Errors
    /// Not found, conflict when busy or not running, forbidden.
    pub async fn checkpoint_delete(
        &self,
        context: &Context,
        project: &str,
        instance: &str,
        name: &str,
    ) -> Result<LiveOperation> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        let inner = self.inner();
        runner::start::<CheckpointDelete>(inner, context, |tx| {
            let records = inner.inventory.read();
            let row = records.instance(&project, instance)?;
            let gone = demand(&records, row, name)?;
            tx.expect(row);
            tx.expect(gone);
            let line = records.checkpoints_of(row.id);
            // Taken for the oldest, its changes would go to nobody.
            let at = line.iter().position(|c| c.id == gone.id);
            let at = at.ok_or_else(|| Error::internal("the checkpoint is not among the instance's", name))?;
            let (before, after) = (&line[..at], &line[at + 1..]);
            let mut disks = vec![];
            // Disks that cannot be told apart now, because what runs is not what is configured, count as detached: that refuses only.
            let attached = super::disks(&records, row, None).unwrap_or_default();
            for disk in &gone.disks {
                // One whose volume is gone has nothing of it any more.
                let Some(volume) = records.volumes.get(&disk.volume) else { continue };
                let parent = before.iter().rev().find(|c| c.has(disk.volume)).map(|c| c.id);
                if parent.is_some() && !attached.iter().any(|d| d.volume.id == disk.volume) {
                    return Err(Error::conflict(format!(
                        "the instance does not have disk {:?} of checkpoint {name:?} as it was then; attach it again, or delete the \
                         checkpoints before {name:?} as well: what it has goes to the one before it",
                        disk.device
                    )));
                }
                disks.push(UnmarkedVolume {
                    volume: VolumeRef { pool: volume.pool, volume: volume.id },
                    parent,
                    last: !after.iter().any(|c| c.has(disk.volume)),
                });
            }
            if disks.iter().any(|d| d.parent.is_some()) && !volumes::runs(&records, row) {
                running(&records, row).map_err(|e| {
                    let text = format!(
                        "{}, or delete the checkpoints before {name:?} as well: what it has goes to the one before it",
                        e.message
                    );
                    Error { message: text, ..e }
                })?;
            }
            let path = path(&project.name, instance);
            let plan = DeletePlan { checkpoint: gone.value.clone(), disks, node: row.node };
            Ok((plan, NewOperation::task("Deleting checkpoint", Some(project.id), "instances", path)))
        })
        .await
    }
}

/// Plan of [`CheckpointDelete`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeletePlan {
    checkpoint: Checkpoint,
    disks: Vec<UnmarkedVolume>,
    node: NodeId,
}

/// Takes away what the host has of it, then the record. What is merged cannot be taken apart again: the step is tried several times
/// and has no undo; should it still fail, the checkpoint stays and can be deleted again.
pub struct CheckpointDelete;

#[async_trait]
impl Saga for CheckpointDelete {
    const NAME: &'static str = "checkpoint-delete";
    const STEPS: &'static [&'static str] = &["unmark"];
    type Plan = DeletePlan;
    type Outputs = ();

    fn retries(_: usize) -> u32 {
        5
    }
    fn locks(plan: &DeletePlan) -> Vec<String> {
        vec![lock(plan.checkpoint.instance)]
    }
    fn begin(_: &DeletePlan, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    async fn run(cx: &StepContext, plan: &DeletePlan, _: &mut (), _: usize) -> Result<()> {
        let Checkpoint { id, instance, .. } = plan.checkpoint;
        let request = MachineCheckpointDelete { instance, id, disks: plan.disks.clone() };
        cx.agent(plan.node)?.machine_checkpoint_delete(&cx.mutate(CALL), request).await
    }
    async fn undo(_: &StepContext, _: &DeletePlan, _: &(), _: usize) -> Result<()> {
        Ok(())
    }
    fn commit(plan: &DeletePlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let records = engine.inventory.read();
        let gone = &plan.checkpoint;
        for row in records.checkpoints_of(gone.instance) {
            if row.id == gone.id {
                tx.delete(row);
            } else if row.parent == Some(gone.id) {
                tx.replace(row, &Checkpoint { parent: gone.parent, ..row.value.clone() });
            }
        }
        release_name(tx, gone);
        Ok(())
    }
    fn abort(_: &DeletePlan, _: &(), _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
}
