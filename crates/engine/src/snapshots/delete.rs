//! Deleting snapshots.

use super::{Found, Origin, Row2, Taken};
use crate::{
    Engine, EngineInner, Records,
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
};
use async_trait::async_trait;
use karst_agent::{MachineStateRef, VolumeSnapshotRef};
use karst_model::{
    Error, NodeId, Result, SnapshotId,
    instance::{Instance, InstanceKind},
    snapshot::Snapshot,
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

impl Engine {
    /// Deletes a snapshot; those that descend from it descend from its parent then.
    ///
    /// # Errors
    /// Not found, conflict when busy, forbidden.
    pub async fn snapshot_delete(
        &self,
        context: &Context,
        origin: Origin<'_>,
        name: &str,
    ) -> Result<LiveOperation> {
        self.snapshot_delete_if(context, origin, name, |_, _, _| true).await
    }

    /// The same of one that is `still` to go when the deletion begins: somebody may have claimed it, or given its name to
    /// another, since it was looked at.
    pub(crate) async fn snapshot_delete_if(
        &self,
        context: &Context,
        origin: Origin<'_>,
        name: &str,
        still: impl Fn(&Records, &Found, &Row2) -> bool + Send + Sync,
    ) -> Result<LiveOperation> {
        let project = origin.editor(self, context)?;
        let inner = self.inner();
        runner::start::<SnapshotDelete>(inner, context, |tx| {
            let records = inner.inventory.read();
            let found = origin.find(&records, project.id)?;
            let row = found.demand(&records, name)?;
            if !still(&records, &found, &row) {
                return Err(Error::conflict(format!("snapshot {name:?} is to stay now")));
            }
            row.expect(tx);
            let snapshot = row.taken();
            let path = found.path(&records, name);
            let plan = DeletePlan {
                volumes: snapshot.volumes(&records),
                machine: match &found {
                    Found::Instance(row) if row.kind == InstanceKind::VirtualMachine => {
                        Some(MachineStateRef { instance: row.id, snapshot: snapshot.id() })
                    }
                    _ => None,
                },
                snapshot,
                lock: found.lock(),
                node: match &found {
                    Found::Instance(row) => row.node,
                    Found::Volume(_) => inner.node,
                },
                path: path.clone(),
            };
            Ok((plan, NewOperation::task("Deleting snapshot", Some(project.id), found.kind(), path)))
        })
        .await
    }
}

/// Plan of [`SnapshotDelete`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeletePlan {
    snapshot: Taken,
    volumes: Vec<VolumeSnapshotRef>,
    #[serde(default)]
    machine: Option<MachineStateRef>,
    lock: String,
    node: NodeId,
    path: String,
}

/// Deletes what the host keeps of it, then the record. What is gone cannot be brought back: the step is tried several
/// times and has no undo; should it still fail, the snapshot stays and can be deleted again.
pub struct SnapshotDelete;

impl SnapshotDelete {
    /// Lets the children of a snapshot descend from its parent, in as many transactions as that takes.
    async fn adopt(engine: &EngineInner, gone: &Snapshot) -> Result<()> {
        loop {
            let left = engine
                .transact(|records, tx| {
                    let all = records.snapshots_of(gone.instance);
                    let children: Vec<_> = all.into_iter().filter(|s| s.parent == Some(gone.id)).collect();
                    for child in children.iter().take(40) {
                        tx.replace(child, &Snapshot { parent: gone.parent, ..child.value.clone() });
                    }
                    Ok(children.len() > 40)
                })
                .await?;
            if !left {
                return Ok(());
            }
        }
    }
}

#[async_trait]
impl Saga for SnapshotDelete {
    const NAME: &'static str = "snapshot-delete";
    const STEPS: &'static [&'static str] = &["volumes"];
    type Plan = DeletePlan;
    type Outputs = ();

    fn retries(_: usize) -> u32 {
        5
    }
    fn locks(plan: &DeletePlan) -> Vec<String> {
        vec![plan.lock.clone()]
    }
    fn begin(_: &DeletePlan, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    async fn run(cx: &StepContext, plan: &DeletePlan, _: &mut (), _: usize) -> Result<()> {
        for at in &plan.volumes {
            let agent = cx.agent(plan.node)?;
            agent.volume_snapshot_delete(&cx.mutate(Duration::from_secs(300)), *at).await?;
        }
        if let Some(machine) = plan.machine {
            cx.agent(plan.node)?.machine_state_delete(&cx.mutate(Duration::from_secs(300)), machine).await?;
        }
        match &plan.snapshot {
            Taken::Instance { snapshot } => Self::adopt(&cx.engine, snapshot).await,
            Taken::Volume { .. } => Ok(()),
        }
    }
    async fn undo(_: &StepContext, _: &DeletePlan, _: &(), _: usize) -> Result<()> {
        Ok(())
    }
    fn commit(plan: &DeletePlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        match &plan.snapshot {
            Taken::Instance { snapshot } => {
                let row = engine.instance_row(snapshot.instance)?;
                if row.current_snapshot == Some(snapshot.id) {
                    let instance = Instance { current_snapshot: snapshot.parent, ..row.value.clone() };
                    tx.replace(&row, &instance);
                }
            }
            Taken::Volume { .. } => {}
        }
        remove(engine, tx, &plan.snapshot);
        Ok(())
    }
    fn abort(_: &DeletePlan, _: &(), _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    fn announce(plan: &DeletePlan) -> Vec<(&'static str, String)> {
        let action = match plan.snapshot {
            Taken::Instance { .. } => "instance-snapshot-deleted",
            Taken::Volume { .. } => "storage-volume-snapshot-deleted",
        };
        vec![(action, plan.path.clone())]
    }
}

fn remove(engine: &EngineInner, tx: &mut Tx, gone: &Taken) {
    let records = engine.inventory.read();
    let id: SnapshotId = gone.id();
    let row = match gone {
        Taken::Instance { .. } => records.snapshots.get(&id).cloned().map(Row2::Instance),
        Taken::Volume { .. } => records.volume_snapshots.get(&id).cloned().map(Row2::Volume),
    };
    match &row {
        Some(Row2::Instance(s)) => tx.delete(s),
        Some(Row2::Volume(s)) => tx.delete(s),
        None => return,
    }
    if let Some(row) = row {
        // By the name of now: it may have been renamed, though not while this saga had the lock.
        row.taken().release_name(tx);
    }
}
