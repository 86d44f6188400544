//! Wiping custom volumes: their content is forgotten, they stay.

use super::{lock, path, runs, users};
use crate::{
    Engine, EngineInner,
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
};
use async_trait::async_trait;
use karst_agent::VolumeRef;
use karst_model::{
    Error, NodeId, Result,
    spec::{VolumeSource, VolumeSpec},
    storage::Volume,
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(600);

impl Engine {
    /// Makes a custom volume empty again. Its space is given back to the pool, not overwritten.
    ///
    /// # Errors
    /// Not found, conflict when a guest runs with it, it has snapshots or is busy, forbidden.
    pub async fn volume_wipe(
        &self,
        context: &Context,
        project: &str,
        pool: &str,
        name: &str,
    ) -> Result<LiveOperation> {
        let project = self.volume_editor(context, project)?;
        let inner = self.inner();
        runner::start::<VolumeWipe>(inner, context, |tx| {
            let records = inner.inventory.read();
            let row = records.demand_volume(project.id, pool, name)?;
            if !records.volume_snapshots_of(row.id).is_empty() {
                return Err(Error::conflict(format!(
                    "volume {name:?} has snapshots, which would still show what was in it; delete them first"
                )));
            }
            for user in &users(&records, row).instances {
                if runs(&records, user) {
                    return Err(Error::conflict(format!(
                        "instance {:?} runs with volume {name:?}; stop it first",
                        &*user.name
                    )));
                }
                if !records.snapshots_of(user.id).is_empty() && user.root == row.id {
                    return Err(Error::conflict(format!(
                        "instance {:?} has snapshots of volume {name:?}; delete them first",
                        &*user.name
                    )));
                }
                // A start would expect this volume to be unlocked; a start or snapshot under way has this lock.
                runner::demand_unlocked(&records, &[crate::compute::lock(user.id)])?;
                tx.expect_unlocked(&crate::compute::lock(user.id));
                tx.expect(user);
            }
            tx.expect(row);
            tx.expect_untouched(&records, &lock(row.id));
            let path = path(&records, row);
            let plan = WipePlan { volume: row.value.clone(), node: inner.node, path: path.clone() };
            let new = NewOperation::task("Wiping storage volume", Some(project.id), "storage_volumes", path);
            Ok((plan, new))
        })
        .await
    }
}

/// Plan of [`VolumeWipe`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WipePlan {
    volume: Volume,
    node: NodeId,
    path: String,
}

/// Makes the volume anew under its own id. What was in it cannot be brought back: undone, it is there and empty as well.
pub struct VolumeWipe;

#[async_trait]
impl Saga for VolumeWipe {
    const NAME: &'static str = "volume-wipe";
    const STEPS: &'static [&'static str] = &["volume"];
    type Plan = WipePlan;
    type Outputs = ();

    fn retries(_: usize) -> u32 {
        5
    }
    fn locks(plan: &WipePlan) -> Vec<String> {
        vec![lock(plan.volume.id)]
    }
    fn begin(_: &WipePlan, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    async fn run(cx: &StepContext, plan: &WipePlan, _: &mut (), _: usize) -> Result<()> {
        let agent = cx.agent(plan.node)?;
        let volume = VolumeRef { pool: plan.volume.pool, volume: plan.volume.id };
        agent.volume_delete(&cx.mutate(LONG), volume).await?;
        agent.volume_create(&cx.mutate(LONG), empty(&plan.volume)).await
    }
    async fn undo(cx: &StepContext, plan: &WipePlan, _: &(), _: usize) -> Result<()> {
        cx.agent(plan.node)?.volume_create(&cx.mutate(LONG), empty(&plan.volume)).await
    }
    fn commit(plan: &WipePlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let row = engine.volume_row(plan.volume.id)?;
        tx.replace(&row, &Volume { spec_version: row.spec_version + 1, ..row.value.clone() });
        Ok(())
    }
    fn abort(_: &WipePlan, _: &(), _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    fn announce(plan: &WipePlan) -> Vec<(&'static str, String)> {
        vec![("storage-volume-updated", plan.path.clone())]
    }
}

fn empty(volume: &Volume) -> VolumeSpec {
    VolumeSpec {
        id: volume.id,
        pool: volume.pool,
        content: volume.content,
        size: volume.size,
        source: VolumeSource::Empty,
    }
}
