//! Deleting instances, with what they own or without it: then their volumes become custom ones.

use super::{lock, path};
use crate::{
    Engine, EngineInner,
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
};
use async_trait::async_trait;
use karst_agent::{VolumeRef, VolumeSnapshotRef};
use karst_model::{
    Error, InstanceId, Name, NodeId, Result,
    access::Permission,
    backup::BackupOwner,
    display::DisplayLock,
    instance::{Lifecycle, Runtime, Status},
    storage::{Volume, VolumeOwner},
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

impl Engine {
    /// Deletes a stopped instance with all that it owns.
    ///
    /// # Errors
    /// Not found, conflict when it runs or is busy or a pool of its volumes is not active, forbidden.
    pub async fn instance_delete(
        &self,
        context: &Context,
        project: &str,
        name: &str,
    ) -> Result<LiveOperation> {
        self.delete_instance(context, project, name, false).await
    }

    /// Deletes a stopped instance and keeps its volumes: one that it owns becomes a custom volume of the instance's name.
    /// What was a custom volume before stays one, as it does with [`Engine::instance_delete`].
    ///
    /// # Errors
    /// Not found, conflict when it runs or is busy or a custom volume has the name already, forbidden.
    pub async fn instance_undefine(
        &self,
        context: &Context,
        project: &str,
        name: &str,
    ) -> Result<LiveOperation> {
        self.volume_editor(context, project)?;
        self.delete_instance(context, project, name, true).await
    }

    async fn delete_instance(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        keep: bool,
    ) -> Result<LiveOperation> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        let inner = self.inner();
        runner::start::<InstanceDelete>(inner, context, |tx| {
            let records = inner.inventory.read();
            let row = records.instance(&project, name)?;
            let status = row.status(records.runtimes.get(&row.id).map(|r| &r.value));
            if !status.is_down() {
                let does = if status == Status::Error { "halted by an error and not stopped" } else { "running" };
                return Err(Error::conflict(format!(
                    "instance {name:?} is {does}; stop it first, or delete it with --force"
                )));
            }
            let (config, devices) = records.expanded(row);
            if karst_model::keys::flag(&config, "security.protection.delete")? {
                return Err(Error::conflict(format!(
                    "instance {name:?} is protected from being deleted; unset security.protection.delete first"
                )));
            }
            tx.expect(row);
            let (mut volumes, mut kept) = (vec![], vec![]);
            for volume in records.volumes.values() {
                if volume.owner != (VolumeOwner::Instance { instance: row.id }) {
                    continue;
                }
                if !keep || super::define::is_bare(&devices, volume) {
                    volumes.push(VolumeRef { pool: volume.pool, volume: volume.id });
                    continue;
                }
                let pool = records.pools.get(&volume.pool).ok_or_else(|| Error::not_found("its pool is gone"))?;
                let free = Name::parse("name", name)?;
                crate::volumes::demand_free(&records, &project, pool, &free)?;
                kept.push(Volume {
                    project: records.volume_project(project.id),
                    name: name.to_owned(),
                    owner: VolumeOwner::Custom,
                    spec_version: volume.spec_version + 1,
                    ..volume.value.clone()
                });
            }
            // What stays is without the instance's snapshots, of which nobody would know any more.
            let stays = |id| kept.iter().any(|v| v.id == id) || records.volumes.get(&id).is_some_and(|v| v.owner == VolumeOwner::Custom);
            let mut snapshots = vec![];
            for snapshot in records.snapshots_of(row.id).into_iter().rev() {
                for (volume, id) in snapshot.volumes.iter().filter(|(v, _)| stays(*v)) {
                    let Some(at) = records.volumes.get(volume) else { continue };
                    snapshots.push(VolumeSnapshotRef { pool: at.pool, volume: *volume, snapshot: *id });
                }
            }
            // Refused as a whole: what the host refuses of a pool that is not active leaves half of an instance.
            let pools = volumes.iter().map(|v| v.pool).chain(snapshots.iter().map(|s| s.pool));
            crate::storage::use_pools(&records, tx, pools)?;
            let path = path(&project.name, name);
            let plan = DeletePlan { instance: row.id, node: row.node, volumes, kept, snapshots, path: path.clone() };
            Ok((plan, NewOperation::task("Deleting instance", Some(project.id), "instances", path)))
        })
        .await
    }
}

/// Plan of [`InstanceDelete`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeletePlan {
    instance: InstanceId,
    node: NodeId,
    volumes: Vec<VolumeRef>,
    /// Volumes that stay, as they will be.
    #[serde(default)]
    kept: Vec<Volume>,
    /// Snapshots of volumes that stay.
    #[serde(default)]
    snapshots: Vec<VolumeSnapshotRef>,
    path: String,
}

/// Deletes the guest's traces on its host, its volumes, then its records. What a volume held cannot be brought back, so
/// the volumes come last, are tried several times, and have no undo: should they still fail, a stopped instance is left
/// that can be deleted again.
pub struct InstanceDelete;

#[async_trait]
impl Saga for InstanceDelete {
    const NAME: &'static str = "instance-delete";
    const STEPS: &'static [&'static str] = &["guest", "volumes"];
    type Plan = DeletePlan;
    type Outputs = ();

    fn retries(step: usize) -> u32 {
        if step == 1 { 5 } else { 0 }
    }

    fn locks(plan: &DeletePlan) -> Vec<String> {
        vec![lock(plan.instance)]
    }

    fn begin(plan: &DeletePlan, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        for volume in &plan.kept {
            tx.take_name("volumes", &crate::volumes::scope(volume), &volume.name, &volume.id.to_string());
        }
        mark(engine, tx, plan.instance, Lifecycle::Deleting)
    }

    async fn run(cx: &StepContext, plan: &DeletePlan, _: &mut (), step: usize) -> Result<()> {
        let agent = cx.agent(plan.node)?;
        match step {
            0 => agent.guest_destroy(&cx.mutate(Duration::from_secs(60)), plan.instance).await,
            _ => {
                for at in &plan.snapshots {
                    agent.volume_snapshot_delete(&cx.mutate(Duration::from_secs(300)), *at).await?;
                }
                for volume in &plan.volumes {
                    agent.volume_delete(&cx.mutate(Duration::from_secs(300)), *volume).await?;
                }
                let owner = BackupOwner::Instance { instance: plan.instance };
                cx.engine.forget_backups(cx, owner).await?;
                cx.engine.forget_checkpoints(plan.instance).await?;
                cx.engine.forget_snapshots(Some(plan.instance), None).await
            }
        }
    }

    async fn undo(_: &StepContext, _: &DeletePlan, _: &(), _: usize) -> Result<()> {
        Ok(())
    }

    fn commit(plan: &DeletePlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        for volume in &plan.kept {
            tx.replace(&engine.volume_row(volume.id)?, volume);
        }
        remove_all(engine, tx, plan.instance, &plan.kept)
    }

    fn abort(plan: &DeletePlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        for volume in &plan.kept {
            tx.release_name("volumes", &crate::volumes::scope(volume), &volume.name, &volume.id.to_string());
        }
        mark(engine, tx, plan.instance, Lifecycle::Ready)
    }

    fn announce(plan: &DeletePlan) -> Vec<(&'static str, String)> {
        vec![("instance-deleted", plan.path.clone())]
    }
}

fn mark(engine: &EngineInner, tx: &mut Tx, id: InstanceId, lifecycle: Lifecycle) -> Result<()> {
    // `prepare` holds the compare on the same row; a second one on the same key does no harm.
    let row = engine.instance_row(id)?;
    let mut instance = row.value.clone();
    instance.lifecycle = lifecycle;
    tx.replace(&row, &instance);
    Ok(())
}

/// Removes every record of an instance.
pub(crate) fn remove_records(engine: &EngineInner, tx: &mut Tx, id: InstanceId) -> Result<()> {
    remove_all(engine, tx, id, &[])
}

/// Those of its volumes that are `kept` are somebody else's affair.
fn remove_all(engine: &EngineInner, tx: &mut Tx, id: InstanceId, kept: &[Volume]) -> Result<()> {
    let records = engine.inventory.read();
    let Some(row) = records.instances.get(&id) else {
        return Ok(());
    };
    tx.delete(row);
    let owner = id.to_string();
    tx.release_name("instances", &row.project.to_string(), &row.name, &owner);
    tx.release_name("vmids", "", &row.vmid.to_string(), &owner);
    super::vmids::retire(tx, &records, row);
    tx.delete_id::<Runtime>(&id.to_string());
    tx.delete_id::<DisplayLock>(&id.to_string());
    for volume in records.volumes.values().filter(|v| v.owner == VolumeOwner::Instance { instance: id }) {
        if !kept.iter().any(|k| k.id == volume.id) {
            tx.delete(volume);
        }
    }
    Ok(())
}
