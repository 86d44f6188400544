//! Changing custom volumes: description, configuration, size, name.

use super::{attached, demand_free, lock, path, runs, scope, slots_of, users};
use crate::{
    Engine, EngineInner, Records, Row,
    compute::{
        called,
        slots::{kind_of, prefix},
    },
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::{MAX_LOCKS, Saga, StepContext, runner},
    tenancy::limits::{Planned, admit},
};
use async_trait::async_trait;
use karst_agent::{VolumeRef, VolumeResize};
use karst_model::{
    ByteSize, Config, Error, InstanceId, Name, NodeId, Result,
    device::{Devices, DiskBus, kernel_follow},
    instance::Instance,
    storage::{Volume, VolumeContent, check_volume_config},
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The whole of what a user may set of a custom volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpdateVolume {
    /// User's text.
    pub description: String,
    /// Configuration as written; `volatile.*` is ignored.
    pub config: Config,
    /// `spec_version` that was read (If-Match).
    pub if_version: Option<u64>,
}

impl Engine {
    /// Replaces what a user may set of a custom volume; a changed size takes effect at once.
    ///
    /// # Errors
    /// Invalid by field, not found, precondition failed, conflict when busy or in use, forbidden.
    pub async fn volume_update(
        &self,
        context: &Context,
        project: &str,
        pool: &str,
        name: &str,
        request: UpdateVolume,
    ) -> Result<LiveOperation> {
        let project = self.volume_home(context, project)?;
        let inner = self.inner();
        runner::start::<VolumeUpdate>(inner, context, |tx| {
            let records = inner.inventory.read();
            let row = records.demand_volume(project.id, pool, name)?;
            if request.if_version.is_some_and(|v| v != row.spec_version) {
                return Err(Error::precondition_failed(format!(
                    "volume {name:?} has changed since it was read; read it again"
                )));
            }
            let mut after = row.value.clone();
            after.description = request.description.clone();
            after.config = request
                .config
                .iter()
                .filter(|(k, v)| !k.starts_with("volatile.") && !v.is_empty())
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect();
            let size = check_volume_config(&after.config, row.content)?;
            crate::keys::demand_same(&row.config, &after.config)?;
            after.size = new_size(row, size)?;
            after.spec_version += 1;
            let attached = attached(&records, row);
            if row.is_shared() && !after.is_shared() {
                demand_one(row, &attached)?;
            }
            if !row.is_shared() && after.is_shared() {
                for user in &attached {
                    // Its QEMU lets nobody else write, and that cannot change while it has the disk.
                    if runs(&records, user) {
                        return Err(Error::conflict(format!(
                            "{} runs and has volume {name:?} for itself; stop it, or detach the volume from it, before others may \
                             share it",
                            called(row.project, user)
                        ))
                        .at("config.security.shared"));
                    }
                    demand_at_rest(&records, tx, user)?;
                }
            }
            let mut running = vec![];
            if after.size != row.size && row.content != VolumeContent::Filesystem {
                inner.demand_unread(row)?;
                crate::checkpoints::demand_none(
                    &records,
                    row.id,
                    "with backups of the size that the disk has",
                )
                .map_err(|e| e.at("config.size"))?;
                for user in &attached {
                    if runs(&records, user) {
                        demand_grows(&records, row, user)?;
                        tx.expect(user);
                        running.push(user.id);
                    } else {
                        demand_at_rest(&records, tx, user)?;
                    }
                }
                if running.len() >= MAX_LOCKS {
                    return Err(Error::conflict(format!(
                        "{} instances run with volume {name:?}, and under so many at once it cannot grow; stop all but {}",
                        running.len(),
                        MAX_LOCKS - 1
                    ))
                    .at("config.size"));
                }
            }
            tx.expect(row);
            if after.size != row.size {
                crate::storage::use_pools(&records, tx, [row.pool])?;
            }
            if after.size > row.size {
                let planned = Planned { volume: Some(&after), ..Default::default() };
                admit(&records, &mut Tx::default(), row.project, &planned)?;
            }
            tx.expect_untouched(&records, &lock(row.id));
            let path = path(&records, row);
            let plan = UpdatePlan { before: row.size, after, running, node: inner.node, path: path.clone() };
            Ok((
                plan,
                NewOperation::task("Updating storage volume", Some(project.id), "storage_volumes", path),
            ))
        })
        .await
    }

    /// Renames a custom volume; devices of instances and profiles that name it follow.
    ///
    /// # Errors
    /// Invalid name, not found, conflict (taken, used by a running instance, busy), forbidden.
    pub async fn volume_rename(
        &self,
        context: &Context,
        project: &str,
        pool: &str,
        name: &str,
        new: &str,
    ) -> Result<()> {
        let project = self.volume_home(context, project)?;
        let inner = self.inner();
        let new = Name::parse("name", new)?;
        let mut renamed = String::new();
        inner
            .transact(|records, tx| {
                let row = records.demand_volume(project.id, pool, name)?;
                let pool = records.pool(pool)?;
                if *row.name == *new {
                    return Ok(());
                }
                demand_free(records, &project, pool, &new)?;
                runner::demand_unlocked(records, &[lock(row.id)])?;
                tx.expect_unlocked(&lock(row.id));
                tx.expect_untouched(records, &lock(row.id));
                let users = users(records, row);
                for user in &users.instances {
                    if runs(records, user) {
                        return Err(Error::conflict(format!(
                            "{} runs with volume {name:?}; stop it before the volume is renamed",
                            called(row.project, user)
                        )));
                    }
                    let target = crate::compute::lock(user.id);
                    runner::demand_unlocked(records, std::slice::from_ref(&target))?;
                    tx.expect_unlocked(&target);
                    let mut instance = user.value.clone();
                    match follow(&mut instance.devices, &pool.name, name, &new) {
                        true => {
                            instance.spec_version += 1;
                            tx.replace(user, &instance);
                        }
                        // By a profile.
                        false => tx.expect(user),
                    }
                }
                for user in &users.profiles {
                    let mut profile = user.value.clone();
                    if follow(&mut profile.devices, &pool.name, name, &new) {
                        profile.spec_version += 1;
                        tx.replace(user, &profile);
                    }
                }
                let mut volume = row.value.clone();
                volume.name = new.to_string();
                volume.spec_version += 1;
                tx.replace(row, &volume);
                tx.release_name("volumes", &scope(row), name, &row.id.to_string());
                tx.take_name("volumes", &scope(row), &new, &row.id.to_string());
                renamed = path(records, &volume);
                Ok(())
            })
            .await?;
        inner.announce(context, Some(project.id), "storage-volume-renamed", renamed);
        Ok(())
    }
}

/// A start would expect the volume to be unlocked; a start that is under way has the lock of its instance.
fn demand_at_rest(records: &Records, tx: &mut Tx, user: &Row<Instance>) -> Result<()> {
    let lock = crate::compute::lock(user.id);
    runner::demand_unlocked(records, std::slice::from_ref(&lock))?;
    tx.expect_unlocked(&lock);
    tx.expect(user);
    Ok(())
}

/// Can the disk grow under an instance that runs with it?
///
/// # Errors
/// Conflict, with the reason.
fn demand_grows(records: &Records, volume: &Row<Volume>, user: &Row<Instance>) -> Result<()> {
    // The guest of an NVMe disk is told of no change.
    if slots_of(records, volume, user).iter().any(|slot| kind_of(slot) == prefix(DiskBus::Nvme)) {
        return Err(Error::conflict(format!(
            "{} runs with volume {:?} as an NVMe disk, which cannot grow under it; stop it before the volume grows",
            called(volume.project, user),
            volume.name
        ))
        .at("config.size"));
    }
    Ok(())
}

/// What one instance alone may have, several must not have already.
///
/// # Errors
/// Conflict, with how many have it.
pub(crate) fn demand_one(volume: &Volume, attached: &[Row<Instance>]) -> Result<()> {
    if attached.len() < 2 {
        return Ok(());
    }
    Err(Error::conflict(format!(
        "volume {:?} is attached to {} instances; detach it from all but one first",
        volume.name,
        attached.len()
    ))
    .at("config.security.shared"))
}

/// Lets devices name a volume by its new name; answers whether one did.
fn follow(devices: &mut Devices, pool: &str, old: &str, new: &str) -> bool {
    let mut changed = false;
    for keys in devices.values_mut() {
        let is = |key: &str, value: &str| keys.get(key).is_some_and(|v| v == value);
        if is("type", "kernel") {
            changed |= kernel_follow(keys, (pool, old), (pool, new));
        } else if is("type", "disk") && is("pool", pool) && is("source", old) {
            keys.insert("source".into(), new.into());
            changed = true;
        }
    }
    changed
}

/// The size that it is to have: disks grow only, and a limit that is there stays one.
fn new_size(volume: &Volume, wanted: Option<ByteSize>) -> Result<Option<ByteSize>> {
    let field = "config.size";
    match (volume.content, volume.size, wanted) {
        (VolumeContent::Filesystem, Some(now), None) => Err(Error::invalid(
            field,
            format!("the limit of a volume can be changed, not removed; it has {now}"),
        )),
        (VolumeContent::Filesystem, _, wanted) => Ok(wanted),
        (_, now, None) => Ok(now),
        (VolumeContent::Iso, Some(now), Some(wanted)) if wanted != now => Err(Error::invalid(
            field,
            format!(
                "a disc (ISO volume) is as large as its file, which has {now}; import another one instead"
            ),
        )),
        (_, Some(now), Some(wanted)) if wanted < now => {
            Err(Error::invalid(field, format!("a disk cannot shrink; it has {now}")))
        }
        (_, _, wanted) => Ok(wanted),
    }
}

/// Plan of [`VolumeUpdate`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UpdatePlan {
    /// Size before.
    before: Option<ByteSize>,
    after: Volume,
    /// Instances that run with it, of a disk that grows: none gets or loses a device meanwhile.
    #[serde(default)]
    running: Vec<InstanceId>,
    node: NodeId,
    path: String,
}

/// Changes the size on the host when it changes, also under the machines that run with it, then the record. A disk that grew
/// stays so when the saga is undone: it cannot shrink, and the record's smaller size lets it grow again.
pub struct VolumeUpdate;

impl VolumeUpdate {
    async fn resize(cx: &StepContext, plan: &UpdatePlan, size: ByteSize) -> Result<()> {
        let volume = VolumeRef { pool: plan.after.pool, volume: plan.after.id };
        let resize = VolumeResize { volume, size: plan.after.stored(size) };
        cx.agent(plan.node)?.volume_resize(&cx.mutate(Duration::from_secs(120)), resize).await
    }
}

#[async_trait]
impl Saga for VolumeUpdate {
    const NAME: &'static str = "volume-update";
    const STEPS: &'static [&'static str] = &["resize"];
    type Plan = UpdatePlan;
    type Outputs = ();

    fn locks(plan: &UpdatePlan) -> Vec<String> {
        let users = plan.running.iter().map(|id| crate::compute::lock(*id));
        [lock(plan.after.id)].into_iter().chain(users).collect()
    }
    fn begin(_: &UpdatePlan, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    async fn run(cx: &StepContext, plan: &UpdatePlan, _: &mut (), _: usize) -> Result<()> {
        match plan.after.size {
            Some(size) if plan.before != plan.after.size => Self::resize(cx, plan, size).await,
            _ => Ok(()),
        }
    }
    async fn undo(cx: &StepContext, plan: &UpdatePlan, _: &(), _: usize) -> Result<()> {
        // Disks do not shrink.
        match plan.before != plan.after.size {
            true => crate::compute::update::limit_again(cx, plan.node, plan.after.id).await,
            false => Ok(()),
        }
    }
    fn commit(plan: &UpdatePlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let row = engine.volume_row(plan.after.id)?;
        let records = engine.inventory.read();
        if plan.after.size > row.size {
            let planned = Planned { volume: Some(&plan.after), ..Default::default() };
            admit(&records, tx, row.project, &planned)?;
        }
        if row.is_shared() && !plan.after.is_shared() {
            if attached(&records, &row).len() > 1 {
                return Err(Error::conflict("the volume was attached to another instance meanwhile"));
            }
            tx.expect_untouched(&records, &lock(row.id));
        }
        tx.replace(&row, &plan.after);
        Ok(())
    }
    fn abort(_: &UpdatePlan, _: &(), _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    fn announce(plan: &UpdatePlan) -> Vec<(&'static str, String)> {
        vec![("storage-volume-updated", plan.path.clone())]
    }
}
