//! Deleting custom volumes.

use super::{lock, path, scope, users};
use crate::{
    Engine, EngineInner,
    context::Context,
    db::Tx,
    inventory::Uses,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    storage::users_in_words,
};
use async_trait::async_trait;
use karst_agent::VolumeRef;
use karst_model::{Error, NodeId, Result, backup::BackupOwner, storage::Volume};
use serde::{Deserialize, Serialize};
use std::time::Duration;

impl Engine {
    /// Deletes a custom volume that nothing uses.
    ///
    /// # Errors
    /// Not found, conflict when an instance or profile has it or it is busy, forbidden.
    pub async fn volume_delete(
        &self,
        context: &Context,
        project: &str,
        pool: &str,
        name: &str,
    ) -> Result<LiveOperation> {
        let project = self.volume_home(context, project)?;
        let inner = self.inner();
        runner::start::<VolumeDelete>(inner, context, |tx| {
            let records = inner.inventory.read();
            let row = records.demand_volume(project.id, pool, name)?;
            crate::storage::life::demand_active(records.pool(pool)?)?;
            inner.demand_unread(row)?;
            let used = users(&records, row).paths(&records);
            if !used.is_empty() {
                let seen = users(&records, row).visible_to(context).paths(&records);
                let who = users_in_words(&seen, &used);
                return Err(Error::conflict(format!(
                    "custom volume {name:?} is used by {who}; detach it first"
                )));
            }
            tx.expect(row);
            tx.expect_untouched(&records, &lock(row.id));
            let path = path(&records, row);
            let plan = DeletePlan { volume: row.value.clone(), node: inner.node, path: path.clone() };
            Ok((
                plan,
                NewOperation::task("Deleting storage volume", Some(project.id), "storage_volumes", path),
            ))
        })
        .await
    }
}

/// Plan of [`VolumeDelete`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeletePlan {
    volume: Volume,
    node: NodeId,
    path: String,
}

/// Deletes the volume on its host, then the record. What it held cannot be brought back: the step is tried several times
/// and has no undo; should it still fail, the volume stays and can be deleted again.
pub struct VolumeDelete;

#[async_trait]
impl Saga for VolumeDelete {
    const NAME: &'static str = "volume-delete";
    const STEPS: &'static [&'static str] = &["volume"];
    type Plan = DeletePlan;
    type Outputs = ();

    fn retries(_: usize) -> u32 {
        5
    }
    fn locks(plan: &DeletePlan) -> Vec<String> {
        vec![lock(plan.volume.id)]
    }
    fn begin(_: &DeletePlan, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    async fn run(cx: &StepContext, plan: &DeletePlan, _: &mut (), _: usize) -> Result<()> {
        let volume = VolumeRef { pool: plan.volume.pool, volume: plan.volume.id };
        cx.agent(plan.node)?.volume_delete(&cx.mutate(Duration::from_secs(300)), volume).await?;
        cx.engine.forget_backups(cx, BackupOwner::Volume { volume: plan.volume.id }).await?;
        cx.engine.forget_snapshots(None, Some(plan.volume.id)).await
    }
    async fn undo(_: &StepContext, _: &DeletePlan, _: &(), _: usize) -> Result<()> {
        Ok(())
    }
    fn commit(plan: &DeletePlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let row = engine.volume_row(plan.volume.id)?;
        tx.delete(&row);
        tx.release_name("volumes", &scope(&row), &row.name, &row.id.to_string());
        tx.delete_id::<Uses>(&lock(row.id));
        Ok(())
    }
    fn abort(_: &DeletePlan, _: &(), _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    fn announce(plan: &DeletePlan) -> Vec<(&'static str, String)> {
        vec![("storage-volume-deleted", plan.path.clone())]
    }
}
