//! Memory that was kept over a stop, dropped: the next start begins afresh.

use super::{lock, path};
use crate::{
    Engine, EngineInner,
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    volumes,
};
use async_trait::async_trait;
use karst_model::{Error, InstanceId, NodeId, Result, access::Permission, instance::Instance};
use serde::{Deserialize, Serialize};
use std::time::Duration;

const CALL: Duration = Duration::from_secs(60);

impl Engine {
    /// Drops the memory that a stopped instance keeps; fine when it keeps none.
    ///
    /// # Errors
    /// Not found, conflict when it runs or is busy, forbidden.
    pub async fn instance_memory_drop(
        &self,
        context: &Context,
        project: &str,
        name: &str,
    ) -> Result<LiveOperation> {
        let project = self.project(context, project, Permission::InstanceUse)?;
        let inner = self.inner();
        runner::start::<MemoryDrop>(inner, context, |tx| {
            let records = inner.inventory.read();
            let row = records.instance(&project, name)?;
            if volumes::runs(&records, row) {
                return Err(Error::conflict(format!(
                    "instance {name:?} is running, and keeps no memory then"
                )));
            }
            tx.expect(row);
            let path = path(&project.name, name);
            let plan = DropPlan { instance: row.id, node: row.node, path: path.clone() };
            let new = NewOperation::task("Dropping instance memory", Some(project.id), "instances", path);
            Ok((plan, new))
        })
        .await
    }
}

/// Plan of [`MemoryDrop`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DropPlan {
    instance: InstanceId,
    node: NodeId,
    path: String,
}

/// Drops it in one step of the host, which nothing brings back. Should that fail to its end, the record goes on to say that
/// there is memory; a start from what is half gone is refused by the host, with the way out.
pub struct MemoryDrop;

#[async_trait]
impl Saga for MemoryDrop {
    const NAME: &'static str = "instance-memory-drop";
    const STEPS: &'static [&'static str] = &["drop"];
    type Plan = DropPlan;
    type Outputs = ();

    fn retries(_: usize) -> u32 {
        5
    }
    fn locks(plan: &DropPlan) -> Vec<String> {
        vec![lock(plan.instance)]
    }
    fn begin(_: &DropPlan, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    async fn run(cx: &StepContext, plan: &DropPlan, _: &mut (), _: usize) -> Result<()> {
        cx.agent(plan.node)?.machine_memory_drop(&cx.mutate(CALL), plan.instance).await
    }
    async fn undo(_: &StepContext, _: &DropPlan, _: &(), _: usize) -> Result<()> {
        Ok(())
    }
    fn commit(plan: &DropPlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let row = engine.instance_row(plan.instance)?;
        tx.replace(&row, &Instance { stateful: false, ..row.value.clone() });
        Ok(())
    }
    fn abort(_: &DropPlan, _: &(), _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    fn announce(plan: &DropPlan) -> Vec<(&'static str, String)> {
        vec![("instance-updated", plan.path.clone())]
    }
}
