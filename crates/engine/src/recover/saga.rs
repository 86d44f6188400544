//! Making records again of what is on a host. Nothing on the host is made, changed or removed, neither by a step nor by an
//! undo: what is not recovered stays as lost as it was.

use crate::{
    EngineInner,
    backups::import::record,
    compute,
    db::Tx,
    events::Subject,
    saga::{Saga, StepContext},
    snapshots::Taken,
    storage::pool_lock,
    volumes,
};
use async_trait::async_trait;
use karst_agent::{CallContext, VolumeRef};
use karst_model::{
    Error, NodeId, Result,
    guest::Observed,
    instance::{Instance, Lifecycle},
    storage::{Pool, Volume, VolumeOwner},
};
use serde::{Deserialize, Serialize};
use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

const CALL: Duration = Duration::from_secs(180);

/// Plan of [`PoolRecover`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PoolPlan {
    pub(super) pool: Pool,
    pub(super) node: NodeId,
}

/// Has the host use a pool that was made before; then its record is there. A host that has begun to use it goes on when
/// that fails: removing a pool would remove what is on it.
pub struct PoolRecover;

#[async_trait]
impl Saga for PoolRecover {
    const NAME: &'static str = "pool-recover";
    const STEPS: &'static [&'static str] = &["pool"];
    type Plan = PoolPlan;
    type Outputs = ();

    fn locks(plan: &PoolPlan) -> Vec<String> {
        vec![pool_lock(plan.pool.id)]
    }
    fn begin(plan: &PoolPlan, _: &EngineInner, tx: &mut Tx) -> Result<()> {
        tx.take_name("pools", "", &plan.pool.name, &plan.pool.id.to_string());
        Ok(())
    }
    async fn run(cx: &StepContext, plan: &PoolPlan, _: &mut (), _: usize) -> Result<()> {
        cx.agent(plan.node)?.pool_ensure(&cx.mutate(CALL), plan.pool.spec()?).await
    }
    async fn undo(_: &StepContext, _: &PoolPlan, _: &(), _: usize) -> Result<()> {
        Ok(())
    }
    fn commit(plan: &PoolPlan, _: &(), _: &EngineInner, tx: &mut Tx) -> Result<()> {
        tx.create(&plan.pool);
        Ok(())
    }
    fn abort(plan: &PoolPlan, _: &(), _: &EngineInner, tx: &mut Tx) -> Result<()> {
        tx.release_name("pools", "", &plan.pool.name, &plan.pool.id.to_string());
        Ok(())
    }
    fn announce(plan: &PoolPlan) -> Vec<(&'static str, String)> {
        vec![("storage-pool-created", format!("/1.0/storage-pools/{}", plan.pool.name))]
    }
    fn subject(plan: &PoolPlan) -> Option<Subject> {
        Some(Subject::Pool(Arc::new(plan.pool.clone())))
    }
}

/// Plan of [`VolumeRecover`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VolumePlan {
    pub(super) node: NodeId,
    pub(super) at: VolumeRef,
    /// The record to be made, unless there is one: an instance's custom root.
    pub(super) volume: Option<Volume>,
    pub(super) instance: Option<Box<Instance>>,
    pub(super) taken: Vec<Taken>,
    /// The guest as it runs.
    pub(super) observed: Option<Observed>,
    /// Of what is made, in the API.
    pub(super) path: String,
}

impl VolumePlan {
    /// A custom volume that is made, whose record is there in the end.
    fn custom(&self) -> Option<&Volume> {
        self.volume.as_ref().filter(|v| v.owner == VolumeOwner::Custom)
    }
}

/// Sees that the volume is there with its snapshots, writes the snapshots' records; then volume and instance are there.
pub struct VolumeRecover;

#[async_trait]
impl Saga for VolumeRecover {
    const NAME: &'static str = "volume-recover";
    const STEPS: &'static [&'static str] = &["volume", "snapshots"];
    type Plan = VolumePlan;
    type Outputs = ();

    fn has(plan: &VolumePlan, step: usize) -> bool {
        step == 0 || !plan.taken.is_empty()
    }

    fn locks(plan: &VolumePlan) -> Vec<String> {
        let instance = plan.instance.iter().map(|i| compute::lock(i.id));
        instance.chain(plan.custom().map(|v| volumes::lock(v.id))).collect()
    }

    fn begin(plan: &VolumePlan, _: &EngineInner, tx: &mut Tx) -> Result<()> {
        if let Some(i) = &plan.instance {
            tx.create(&**i);
            tx.take_name("instances", &i.project.to_string(), &i.name, &i.id.to_string());
            tx.take_name("vmids", "", &i.vmid.to_string(), &i.id.to_string());
        }
        if let Some(v) = plan.custom() {
            tx.take_name("volumes", &volumes::scope(v), &v.name, &v.id.to_string());
        } else if let Some(v) = &plan.volume {
            tx.create(v);
        }
        Ok(())
    }

    async fn run(cx: &StepContext, plan: &VolumePlan, _: &mut (), step: usize) -> Result<()> {
        if step > 0 {
            return record(cx, plan.taken.clone()).await;
        }
        let there = cx.agent(plan.node)?.volume_snapshots(&CallContext::read(CALL), plan.at).await?;
        let mut of_volume = plan.taken.iter().flat_map(|taken| match taken {
            Taken::Instance { snapshot } => snapshot.volumes.iter().map(|(_, id)| *id).collect::<Vec<_>>(),
            Taken::Volume { snapshot } => vec![snapshot.id],
        });
        match of_volume.find(|id| !there.iter().any(|s| s.snapshot == *id)) {
            None => Ok(()),
            Some(id) => Err(Error::conflict(format!("its snapshot {id} has vanished meanwhile; try again"))),
        }
    }

    async fn undo(cx: &StepContext, plan: &VolumePlan, _: &(), step: usize) -> Result<()> {
        if step == 0 {
            return Ok(());
        }
        let instance = plan.instance.as_ref().map(|i| i.id);
        let volume = plan.custom().filter(|_| instance.is_none()).map(|v| v.id);
        cx.engine.forget_snapshots(instance, volume).await
    }

    fn commit(plan: &VolumePlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        if let Some(v) = plan.custom() {
            tx.create(v);
        }
        let Some(i) = &plan.instance else { return Ok(()) };
        let row = engine.instance_row(i.id)?;
        tx.replace(&row, &Instance { lifecycle: Lifecycle::Ready, ..row.value.clone() });
        if let Some(observed) = &plan.observed {
            if let Some(domain) = observed.domain_id {
                engine.next_domain_id.fetch_max(domain + 1, Ordering::Relaxed);
            }
            tx.put(&engine.runtime_of(&engine.inventory.read(), observed));
        }
        Ok(())
    }

    fn abort(plan: &VolumePlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        if let Some(v) = plan.custom() {
            tx.release_name("volumes", &volumes::scope(v), &v.name, &v.id.to_string());
        }
        match &plan.instance {
            Some(i) => compute::delete::remove_records(engine, tx, i.id),
            None => Ok(()),
        }
    }

    fn announce(plan: &VolumePlan) -> Vec<(&'static str, String)> {
        let action = if plan.instance.is_some() { "instance-created" } else { "storage-volume-created" };
        vec![(action, plan.path.clone())]
    }
}
