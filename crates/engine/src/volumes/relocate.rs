//! Moving custom volumes: to another pool, project or name, with their snapshots.
//!
//! Another pool means another volume. It is made beside the old one with its snapshots, then one transaction makes it the one
//! that devices name, and only then the old one goes. Should that fail, the old one stays where it was, to be deleted by hand.

use super::{demand_free, lock, path, runs, scope, users};
use crate::{
    Engine, EngineInner, Records,
    compute::{called, copy::VolumeCopy},
    context::Context,
    db::Tx,
    inventory::Uses,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    snapshots::{Taken, demand_welcome},
    storage::users_in_words,
    tenancy::limits::{Planned, admit},
};
use async_trait::async_trait;
use karst_agent::VolumeRef;
use karst_model::{
    Error, Name, NodeId, Result, SnapshotId, VolumeId,
    backup::BackupOwner,
    device::{Devices, kernel_follow},
    snapshot::VolumeSnapshot,
    spec::{VolumeSource, VolumeSpec},
    storage::Volume,
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(86_400);
/// Most instances and profiles that name a volume which is moved: one transaction changes all.
const MOST: usize = 40;

/// Where a custom volume is to be; what is absent or empty stays.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MoveVolume {
    /// Name.
    pub name: Option<String>,
    /// Pool.
    pub pool: Option<String>,
    /// Project.
    pub project: Option<String>,
}

fn said(text: &Option<String>) -> Option<&str> {
    text.as_deref().filter(|t| !t.is_empty())
}

impl Engine {
    /// Moves a custom volume. Devices of instances and profiles that name it follow; none of the instances may run, and to
    /// another project goes only what nothing uses.
    ///
    /// # Errors
    /// Invalid by field, not found, conflict (taken name, in use, busy, has backups), forbidden.
    pub async fn volume_move(
        &self,
        context: &Context,
        project: &str,
        pool: &str,
        name: &str,
        request: MoveVolume,
    ) -> Result<LiveOperation> {
        let from = self.volume_home(context, project)?;
        let to = match said(&request.project) {
            Some(project) => self.volume_home(context, project).map_err(|e| e.at("project"))?,
            None => from.clone(),
        };
        let inner = self.inner();
        runner::start::<VolumeMove>(inner, context, |tx| {
            let records = inner.inventory.read();
            let row = records.demand_volume(from.id, pool, name)?;
            let there = match said(&request.pool) {
                Some(wanted) => records.pool(wanted).map_err(|e| e.at("pool"))?,
                None => records.pool(pool)?,
            };
            let new_name = Name::parse("name", said(&request.name).unwrap_or(name))?;
            let owner = records.volume_project(to.id);
            let (elsewhere, other_pool) = (owner != row.project, there.id != row.pool);
            if !elsewhere && !other_pool && *new_name == *row.name {
                return Err(Error::invalid("pool", format!("volume {name:?} is there already")));
            }
            demand_free(&records, &to, there, &new_name)?;
            crate::storage::life::demand_active(there)?;
            tx.expect(row);
            tx.expect(&to);
            tx.expect(there);
            tx.expect_unlocked(&crate::storage::pool_lock(there.id));
            tx.touch(&crate::storage::pool_lock(there.id));
            tx.expect_untouched(&records, &lock(row.id));
            let used = users(&records, row);
            if elsewhere && !used.is_empty() {
                let seen = users(&records, row).visible_to(context).paths(&records);
                let who = users_in_words(&seen, &used.paths(&records));
                let text =
                    format!("volume {name:?} is used by {who}; detach it before it goes to another project");
                return Err(Error::conflict(text));
            }
            if used.instances.len() + used.profiles.len() > MOST {
                return Err(Error::conflict(format!("volume {name:?} is used by more than {MOST} others")));
            }
            for user in &used.instances {
                if runs(&records, user) {
                    let text =
                        format!("{} runs with volume {name:?}; stop it first", called(row.project, user));
                    return Err(Error::conflict(text));
                }
                let target = crate::compute::lock(user.id);
                runner::demand_unlocked(&records, std::slice::from_ref(&target))?;
                tx.expect_unlocked(&target);
                tx.expect(user);
            }
            if other_pool && !records.backups_of(BackupOwner::Volume { volume: row.id }).is_empty() {
                let text = format!(
                    "volume {name:?} has backups, which do not go to another pool; delete them first"
                );
                return Err(Error::conflict(text));
            }
            if elsewhere {
                let brought = records.volume_snapshots_of(row.id).len();
                demand_welcome(
                    &records,
                    tx,
                    to.id,
                    brought,
                    "delete them first, or move a copy without them",
                )?;
            }
            if other_pool {
                crate::checkpoints::demand_none(&records, row.id, "which does not go to another pool")?;
                crate::layers::demand_one(&records, row.id, "which does not go to another pool")?;
            }
            let mut volume = row.value.clone();
            volume.project = owner;
            volume.name = new_name.to_string();
            volume.pool = there.id;
            volume.spec_version += 1;
            let mut copy = None;
            let mut snapshots = vec![];
            if other_pool {
                volume.id = VolumeId(inner.env.uuid());
                let all = records.volume_snapshots_of(row.id);
                snapshots = all
                    .iter()
                    .map(|s| VolumeSnapshot {
                        id: SnapshotId(inner.env.uuid()),
                        volume: volume.id,
                        spec_version: 1,
                        ..s.value.clone()
                    })
                    .collect();
                copy = Some(VolumeCopy {
                    spec: VolumeSpec {
                        id: volume.id,
                        pool: volume.pool,
                        content: volume.content,
                        size: volume.stored_size(),
                        source: VolumeSource::Empty,
                    },
                    from: VolumeRef { pool: row.pool, volume: row.id },
                    history: all.iter().zip(&snapshots).map(|(old, new)| (old.id, new.id)).collect(),
                    last: None,
                    full: there.full_copy(&volume.config),
                });
            }
            if elsewhere {
                tx.touch(&crate::tenancy::project_uses(owner));
            }
            if elsewhere || other_pool {
                // Decided when the records follow; said now, before anything is made.
                let planned = Planned { volume: Some(&volume), replaced: Some(row.id), ..Default::default() };
                admit(&records, &mut Tx::default(), owner, &planned)?;
            }
            let path = path(&records, &volume);
            let plan = MovePlan {
                pools: (pool.to_owned(), there.name.to_string()),
                old: row.value.clone(),
                new: volume,
                copy,
                snapshots,
                node: inner.node,
                path: path.clone(),
            };
            let mut new = NewOperation::task("Moving storage volume", Some(from.id), "storage_volumes", path);
            new.may_cancel = true;
            Ok((plan, new))
        })
        .await
    }
}

/// Lets devices that name a volume by its pool and name name another; answers whether one did.
fn follow(devices: &mut Devices, old: (&str, &str), new: (&str, &str)) -> bool {
    let mut changed = false;
    for keys in devices.values_mut() {
        let is = |key: &str, value: &str| keys.get(key).is_some_and(|v| v == value);
        if is("type", "kernel") {
            changed |= kernel_follow(keys, old, new);
            continue;
        }
        if is("type", "disk") && is("pool", old.0) && is("source", old.1) {
            keys.insert("pool".into(), new.0.into());
            keys.insert("source".into(), new.1.into());
            changed = true;
        }
    }
    changed
}

/// Plan of [`VolumeMove`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MovePlan {
    old: Volume,
    /// As it is to be: another one where the pool is.
    new: Volume,
    /// Names of the pools.
    pools: (String, String),
    copy: Option<VolumeCopy>,
    /// Those of the new volume, when it is another one.
    snapshots: Vec<VolumeSnapshot>,
    node: NodeId,
    path: String,
}

impl MovePlan {
    /// Lets the record, and devices that name it, be as they are to be, or as they were; done already when they are.
    async fn switch(&self, cx: &StepContext, forward: bool) -> Result<()> {
        cx.engine.transact(|records, tx| self.write(records, tx, forward)).await
    }

    fn write(&self, records: &Records, tx: &mut Tx, forward: bool) -> Result<()> {
        let (there, here) = if forward { (&self.new, &self.old) } else { (&self.old, &self.new) };
        match records.volumes.get(&there.id) {
            None if forward => tx.create(there),
            Some(row) if row.id == here.id && scope(row) == scope(here) && row.name == here.name => {
                tx.replace(row, there);
            }
            _ if forward => return Ok(()),
            _ => match records.volumes.get(&here.id).filter(|row| row.id != there.id) {
                Some(row) => tx.delete(row),
                None => return Ok(()),
            },
        }
        if forward && (there.project, there.pool) != (here.project, here.pool) {
            // From here on it counts there: whoever came there first meanwhile has the room.
            let planned = Planned { volume: Some(there), replaced: Some(here.id), ..Default::default() };
            admit(records, tx, there.project, &planned)?;
        }
        let (mut old, mut new) = (
            (self.pools.0.as_str(), self.old.name.as_str()),
            (self.pools.1.as_str(), self.new.name.as_str()),
        );
        if !forward {
            std::mem::swap(&mut old, &mut new);
        }
        let used = users(records, here);
        for user in &used.instances {
            let mut instance = user.value.clone();
            if follow(&mut instance.devices, old, new) {
                instance.spec_version += 1;
                tx.replace(user, &instance);
            }
        }
        for user in &used.profiles {
            let mut profile = user.value.clone();
            if follow(&mut profile.devices, old, new) {
                profile.spec_version += 1;
                tx.replace(user, &profile);
            }
        }
        Ok(())
    }

    fn renamed(&self) -> bool {
        (scope(&self.old), &self.old.name) != (scope(&self.new), &self.new.name)
    }
}

/// Copies the volume where it is to be in another pool, lets the records and devices refer to it, and drops the old one.
pub struct VolumeMove;

#[async_trait]
impl Saga for VolumeMove {
    const NAME: &'static str = "volume-move";
    const STEPS: &'static [&'static str] = &["volume", "snapshots", "switch", "drop"];
    type Plan = MovePlan;
    /// The old volume could not be dropped.
    type Outputs = bool;

    // The last step never fails by itself, but destroys what no undo brings back.
    fn retries(step: usize) -> u32 {
        if step == 3 { 5 } else { 0 }
    }

    fn has(plan: &MovePlan, step: usize) -> bool {
        match step {
            1 => !plan.snapshots.is_empty(),
            2 => true,
            _ => plan.copy.is_some(),
        }
    }

    fn locks(plan: &MovePlan) -> Vec<String> {
        let mut locks = vec![lock(plan.old.id), lock(plan.new.id)];
        locks.sort();
        locks.dedup();
        locks
    }

    fn begin(plan: &MovePlan, _: &EngineInner, tx: &mut Tx) -> Result<()> {
        if plan.renamed() {
            tx.take_name("volumes", &scope(&plan.new), &plan.new.name, &plan.new.id.to_string());
        }
        Ok(())
    }

    async fn run(cx: &StepContext, plan: &MovePlan, left: &mut bool, step: usize) -> Result<()> {
        match (step, &plan.copy) {
            (0, Some(copy)) => copy.run(cx, &*cx.agent(plan.node)?).await,
            (1, _) => {
                let taken = plan.snapshots.iter().map(|s| Taken::Volume { snapshot: Box::new(s.clone()) });
                crate::backups::import::record(cx, taken.collect()).await
            }
            (2, _) => plan.switch(cx, true).await,
            (3, Some(copy)) => {
                let dropped = match cx.agent(plan.node)?.volume_delete(&cx.mutate(LONG), copy.from).await {
                    Ok(()) => cx.engine.forget_snapshots(None, Some(plan.old.id)).await,
                    Err(e) => Err(e),
                };
                *left = dropped.is_err();
                // Nothing is undone from here on: what refers to the new one is right, whatever became of the old one.
                if let Err(e) = dropped {
                    tracing::warn!(volume = %plan.old.id, error = %e, "the volume that was moved from stays until it is deleted");
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    async fn undo(cx: &StepContext, plan: &MovePlan, _: &bool, step: usize) -> Result<()> {
        match (step, &plan.copy) {
            (0, Some(copy)) => copy.undo(cx, &*cx.agent(plan.node)?).await,
            (1, _) => cx.engine.forget_snapshots(None, Some(plan.new.id)).await,
            (2, _) => plan.switch(cx, false).await,
            _ => Ok(()),
        }
    }

    fn commit(plan: &MovePlan, left: &bool, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        if *left {
            return Ok(());
        }
        let (old, records) = (&plan.old, engine.inventory.read());
        if plan.renamed() {
            tx.release_name("volumes", &scope(old), &old.name, &old.id.to_string());
        }
        if plan.copy.is_some()
            && let Some(row) = records.volumes.get(&old.id)
        {
            tx.delete(row);
            tx.delete_id::<Uses>(&lock(old.id));
        }
        Ok(())
    }

    fn abort(plan: &MovePlan, _: &bool, _: &EngineInner, tx: &mut Tx) -> Result<()> {
        if plan.renamed() {
            tx.release_name("volumes", &scope(&plan.new), &plan.new.name, &plan.new.id.to_string());
        }
        Ok(())
    }

    fn announce(plan: &MovePlan) -> Vec<(&'static str, String)> {
        vec![("storage-volume-updated", plan.path.clone())]
    }
}
