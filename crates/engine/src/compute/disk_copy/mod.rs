//! Disks of virtual machines that are copied while they run: to another pool, from which the machine goes on, or into a custom
//! volume, by which it can go on or which is left as the disk was.
//!
//! It is one saga ([`saga::DiskCopying`]): it makes the volume, lets the host mirror the disk into it, and, once it is ready, lets the
//! machine go on from it, the records follow, and what the instance owned before goes. Who wants to say the last word
//! ([`CopyDisk::hold`]) says it by [`Engine::disk_copy_end`]; until then the copy follows the disk. A cancel, or a stop of the
//! machine, ends a copy and leaves everything as it was.
//!
//! Such a word is kept in memory only: whoever gave it waits for what comes of it, and gives it again to a daemon that was
//! started anew.

pub mod merge;
pub mod saga;

use self::{
    merge::Work,
    saga::{CopyPlan, DiskCopying},
};
use super::{expand, lock, path, relocate::pin};
use crate::{
    Engine, EngineInner, Records, Row,
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::runner,
    tenancy::limits::{Planned, admit},
    volumes,
};
use karst_agent::{CallContext, GuestRef, MachineCopyRef, MachineCopySpeed, VolumeRef};
use karst_env::EnvExt;
use karst_model::{
    Config, Error, ErrorKind, Name, OperationId, Result, SagaId, VolumeId,
    access::Permission,
    device::DiskOrigin,
    guest::{DiskCopyEnd, DiskCopyPhase, DiskCopyState},
    instance::{Instance, InstanceKind, Lifecycle},
    project::Project,
    storage::{Volume, VolumeContent, VolumeOwner},
};
use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard},
    time::Duration,
};
use tokio::sync::{Notify, futures::Notified};

/// Most snapshots of an instance whose root is moved: one transaction changes all.
const MOST: usize = 80;
const CALL: Duration = Duration::from_secs(30);
/// How long whoever stops a machine waits for the end of a copy.
const BREAK: Duration = Duration::from_secs(120);

/// Key of an operation's metadata under which it says that it copies a disk, or merges layers of one: an object with `instance` (UUID),
/// `device`, `ready`, and `job`: `copy`, `pull`, `commit` or `active-commit`.
pub const METADATA: &str = "disk_copy";

/// Where a disk is to be copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CopyTarget {
    /// The disk that an instance owns goes to another pool, with its snapshots.
    Pool(String),
    /// A custom volume.
    Volume {
        /// Its pool.
        pool: String,
        /// Its name.
        name: String,
        /// It is made; else it is there, of exactly the disk's size, and what is in it is lost.
        new: bool,
    },
}

/// A disk to be copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyDisk {
    /// Its device; `None`: the root.
    pub device: Option<String>,
    /// Where to.
    pub to: CopyTarget,
    /// Once it is ready the copy follows the disk until [`Engine::disk_copy_end`] says how it is to end; else the machine goes
    /// on from it.
    pub hold: bool,
    /// Bytes a second at most; 0: as fast as it goes.
    pub speed: u64,
    /// What the guest writes is in both before it is told so: the copy then keeps up with any guest.
    pub synchronous: bool,
}

/// A copy that goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskCopyView {
    /// Device of the disk.
    pub device: String,
    /// How far it is.
    pub state: DiskCopyState,
    /// The operation that it is.
    pub operation: OperationId,
    /// It is no copy: layers of the disk are merged.
    pub work: Option<Work>,
}

/// What was said of copies that wait for a word.
#[derive(Debug, Default)]
pub(crate) struct Words {
    said: Mutex<BTreeMap<SagaId, DiskCopyEnd>>,
    news: Notify,
}

impl Words {
    fn all(&self) -> MutexGuard<'_, BTreeMap<SagaId, DiskCopyEnd>> {
        self.said.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(crate) fn say(&self, records: &Records, saga: SagaId, word: DiskCopyEnd) {
        let mut all = self.all();
        all.retain(|saga, _| records.sagas.contains_key(saga));
        all.insert(saga, word);
        drop(all);
        self.news.notify_waiters();
    }

    /// Until a word is said, of any copy, after this call.
    pub(crate) fn next(&self) -> Notified<'_> {
        self.news.notified()
    }

    pub(crate) fn of(&self, saga: SagaId) -> Option<DiskCopyEnd> {
        self.all().get(&saga).copied()
    }
}

/// A copy as its saga says it.
struct Going {
    saga: SagaId,
    operation: OperationId,
    plan: CopyPlan,
}

/// The copy of a disk of an instance that goes on; there is one at a time.
fn going(records: &Records, instance: &Instance) -> Option<Going> {
    let held = records.lock(&lock(instance.id))?;
    let saga =
        records.sagas.get(&held.saga).filter(|s| s.name == <DiskCopying as crate::saga::Saga>::NAME)?;
    let plan = serde_json::from_value(saga.plan.clone()).ok()?;
    Some(Going { saga: saga.id, operation: saga.operation, plan })
}

fn none() -> Error {
    Error::conflict("no disk of the instance is being copied")
}

impl Engine {
    /// Copies a disk of a running virtual machine.
    ///
    /// # Errors
    /// Invalid by field, not found, conflict (not running, busy, in use, taken name), unsupported for containers and for what is
    /// no disk of its own, quota, forbidden.
    pub async fn disk_copy_begin(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        request: CopyDisk,
    ) -> Result<LiveOperation> {
        let project = match request.to {
            CopyTarget::Pool(_) => self.project(context, project, Permission::ResourceEdit)?,
            CopyTarget::Volume { .. } => self.volume_editor(context, project)?,
        };
        let inner = self.inner();
        runner::start::<DiskCopying>(inner, context, |tx| {
            let records = inner.inventory.read();
            prepare(inner, &records, tx, &project, name, &request)
        })
        .await
    }

    /// How far the copy of a disk of an instance is; `None` when none goes on.
    ///
    /// # Errors
    /// Not found, unavailable, forbidden.
    pub async fn disk_copy(
        &self,
        context: &Context,
        project: &str,
        name: &str,
    ) -> Result<Option<DiskCopyView>> {
        let view = self.find(context, project, name, Permission::ProjectView)?;
        let found = going(&self.inner().inventory.read(), &view.instance);
        let Some(Going { operation, plan, .. }) = found else { return Ok(None) };
        let agent = self.inner().agents.get(plan.node)?;
        let state = agent.machine_copy_state(&CallContext::read(CALL), plan.copy()).await?;
        let work = plan.merge.map(|m| m.work());
        Ok(Some(DiskCopyView { device: plan.device, state, operation, work }))
    }

    /// Ends the copy of a disk, and with `wait` answers when it has ended. One that the machine is to go on from, or that is to be
    /// left as the disk is, must be ready; what was made for a disk to move to is nobody's without that, and is not left.
    ///
    /// # Errors
    /// Not found, conflict when it is not ready, has gone too far, or none goes on; unsupported when the machine cannot go on from
    /// it, with the reason; forbidden; and what its end failed of.
    pub async fn disk_copy_end(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        device: &str,
        how: DiskCopyEnd,
        wait: bool,
    ) -> Result<()> {
        let view = self.find(context, project, name, Permission::ResourceEdit)?;
        let inner = self.inner();
        let found = going(&inner.inventory.read(), &view.instance);
        let Going { saga, operation, plan } = found.filter(|g| g.plan.device == device).ok_or_else(none)?;
        let live = inner.operations.live(operation).ok_or_else(none)?;
        let left = plan.volume_path.is_some();
        let how = if how == DiskCopyEnd::Finish && !left { DiskCopyEnd::Cancel } else { how };
        if how == DiskCopyEnd::Cancel {
            cancel(inner, &live)?;
        } else {
            if let (DiskCopyEnd::Pivot, Some(why)) = (how, &plan.stays) {
                return Err(Error::unsupported(why.clone()));
            }
            if !plan.hold {
                return Err(Error::conflict("this copy ends by itself: the machine goes on from it"));
            }
            let agent = inner.agents.get(plan.node)?;
            let state = agent.machine_copy_state(&CallContext::read(CALL), plan.copy()).await?;
            if !matches!(state.phase, DiskCopyPhase::Ready | DiskCopyPhase::Pivoted) {
                return Err(Error::conflict(
                    "the copy of the disk is not complete yet; wait until it is ready",
                ));
            }
            inner.copy_words.say(&inner.inventory.read(), saga, how);
        }
        if !wait {
            return Ok(());
        }
        let ended = live.ended().await;
        match (&ended.error, how) {
            (Some(e), DiskCopyEnd::Cancel) if e.is(ErrorKind::Cancelled) => Ok(()),
            (Some(e), _) => Err(e.clone()),
            (None, DiskCopyEnd::Cancel) => Err(Error::conflict("the machine goes on from the copy already")),
            (None, _) => Ok(()),
        }
    }

    /// Sets the bytes a second that the copy of a disk may take; 0: as fast as it goes.
    ///
    /// # Errors
    /// Not found, conflict when none goes on, forbidden.
    pub async fn disk_copy_speed(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        device: &str,
        speed: u64,
    ) -> Result<()> {
        let view = self.find(context, project, name, Permission::ResourceEdit)?;
        let inner = self.inner();
        let found = going(&inner.inventory.read(), &view.instance);
        let plan = found.map(|g| g.plan).filter(|p| p.device == device).ok_or_else(none)?;
        let request = MachineCopySpeed { copy: plan.copy(), speed };
        inner.agents.get(plan.node)?.machine_copy_speed(&inner.reconcile_context(CALL), request).await
    }

    /// Neither a copy nor a backup, nor memory that is written, keeps a machine from being stopped: it ends before, if it does in time.
    pub(crate) async fn break_off_copy(&self, project: &Project, name: &str) -> Result<()> {
        let inner = self.inner();
        let found = {
            let records = inner.inventory.read();
            let row = records.instance(project, name).ok();
            let copy = row.and_then(|row| going(&records, row)).map(|g| g.operation);
            let copy =
                copy.or_else(|| row.and_then(|row| crate::checkpoints::backup::operation_of(&records, row)));
            copy.or_else(|| row.and_then(|row| super::memory_files::operation_of(&records, row)))
        };
        let Some(live) = found.and_then(|operation| inner.operations.live(operation)) else {
            return Ok(());
        };
        cancel(inner, &live)?;
        // One that does not end in time holds the instance, which whoever stops it is told then.
        let _ = inner.env.timeout(BREAK, live.ended()).await;
        Ok(())
    }
}

/// Asks for the end, unless somebody has.
pub(crate) fn cancel(inner: &EngineInner, live: &LiveOperation) -> Result<()> {
    let now = live.snapshot();
    match now.may_cancel && !now.state.is_final() {
        true => inner.operations.cancel(live),
        false => Ok(()),
    }
}

/// What is there to be copied.
struct Origin<'a> {
    device: String,
    /// Keys of the device as they hold now.
    keys: Config,
    root: bool,
    /// The instance owns it.
    owned: bool,
    volume: &'a Row<Volume>,
}

fn origin<'a>(records: &'a Records, row: &Row<Instance>, device: Option<&str>) -> Result<Origin<'a>> {
    let devices = records.expanded(row).1;
    let parsed = expand::parse_devices(&devices)?;
    let device = device.map_or_else(|| parsed.root.0.clone(), str::to_owned);
    let keys = devices.get(&device).cloned();
    let keys =
        keys.ok_or_else(|| Error::not_found(format!("the instance has no device {device:?}")).at("device"))?;
    let runs_with = records.runtimes.get(&row.id).and_then(|r| r.applied.as_ref());
    if let Some(applied) = runs_with {
        let now = applied.devices.get(&device);
        if ["pool", "source"].iter().any(|key| now.and_then(|d| d.get(*key)) != keys.get(*key)) {
            let text = format!(
                "the device {device:?} changes with the next start of the instance; restart it first"
            );
            return Err(Error::conflict(text).at("device"));
        }
    }
    let root = device == parsed.root.0;
    if root && !parsed.root.1.attached {
        let text = format!("{device:?} is not seen by the guest, which writes nothing to it");
        return Err(Error::unsupported(text).at("device"));
    }
    let volume = if root {
        records.volumes.get(&row.root)
    } else {
        let disk = parsed.disks.iter().find(|(n, _)| *n == device).map(|(_, d)| d);
        let disk = disk.ok_or_else(|| Error::invalid("device", format!("{device:?} is no disk")))?;
        match &disk.source {
            DiskOrigin::Volume { pool, volume } if !disk.readonly => {
                records.custom_volume(row.project, pool, volume)
            }
            _ => {
                let text = format!("{device:?} is no disk that the guest writes to, in a pool");
                return Err(Error::unsupported(text).at("device"));
            }
        }
    };
    let volume = volume.ok_or_else(|| Error::not_found("the volume of the disk is gone"))?;
    if volume.content != VolumeContent::Block {
        return Err(Error::unsupported("a disc is copied as a volume, not by its guest").at("device"));
    }
    let io = parsed.disks.iter().find(|(n, _)| *n == device).map(|(_, d)| d.io).unwrap_or(parsed.root.1.io);
    if crate::keys::is_encrypted(volume, &io) {
        let text = "an encrypted disk is copied as a volume while its guest does not run: QEMU would write what it decrypted";
        return Err(Error::unsupported(text).at("device"));
    }
    let owned = volume.owner != VolumeOwner::Custom;
    if !owned {
        let others = volumes::attached(records, volume);
        if let Some(other) = others.iter().find(|i| i.id != row.id) {
            let who = super::called(row.project, other);
            let text =
                format!("volume {:?} is attached to {who} as well; both would write to it", volume.name);
            return Err(Error::conflict(text).at("device"));
        }
    }
    Ok(Origin { device, keys, root, owned, volume })
}

fn prepare(
    inner: &EngineInner,
    records: &Records,
    tx: &mut Tx,
    project: &Row<Project>,
    name: &str,
    request: &CopyDisk,
) -> Result<(CopyPlan, NewOperation)> {
    let row = records.instance(project, name)?;
    if row.kind != InstanceKind::VirtualMachine {
        let text =
            format!("instance {name:?} is a container; disks of virtual machines are copied while they run");
        return Err(Error::unsupported(text));
    }
    let runtime = records.runtimes.get(&row.id);
    let status = row.status(runtime.map(|r| &r.value));
    if row.lifecycle != Lifecycle::Ready || !status.is_up() {
        let text = format!("instance {name:?} is not running; its volumes are copied as they are");
        return Err(Error::conflict(text));
    }
    tx.expect(row);
    tx.expect(project);
    let Origin { device, keys, root, owned, volume: old } = origin(records, row, request.device.as_deref())?;
    let size = old.size.ok_or_else(|| Error::internal("the size of the disk is not known", old.id))?;
    tx.expect(old);
    crate::layers::demand_one(records, old.id, "and a copy is of a disk that is one file")?;
    let all = if root { records.snapshots_of(row.id) } else { vec![] };
    let mut after = keys;
    let (mut stays, mut snapshots) = (None, vec![]);
    let (pool, to, made) = match &request.to {
        CopyTarget::Pool(pool) => {
            let pool = records.pool(pool).map_err(|e| e.at("pool"))?;
            if !owned {
                let text = format!(
                    "the disk is custom volume {:?}; name the volume that it is to be copied to",
                    old.name
                );
                return Err(Error::unsupported(text).at("pool"));
            }
            crate::checkpoints::demand_none(records, old.id, "which does not go to another pool")?;
            if pool.id == old.pool {
                return Err(Error::invalid(
                    "pool",
                    format!("the disk of instance {name:?} is there already"),
                ));
            }
            if all.len() > MOST {
                let text = format!("instance {name:?} has {} snapshots; at most {MOST} are moved", all.len());
                return Err(Error::conflict(text));
            }
            snapshots = all.iter().map(|s| s.id).collect();
            let mut volume = old.value.clone();
            volume.id = VolumeId(inner.env.uuid());
            volume.pool = pool.id;
            volume.spec_version += 1;
            let mut own = row.devices.clone();
            pin(&mut own, &[(device.clone(), after)].into(), &device, &pool.name);
            // Its root is measured as it is: only the pool that it counts for becomes another one.
            let moved = Instance { devices: own.clone(), ..row.value.clone() };
            let planned = Planned { instance: Some(&moved), ..Default::default() };
            admit(records, tx, row.project, &planned)
                .map_err(|e| if e.field.is_none() { e.at("pool") } else { e })?;
            after = own.remove(&device).unwrap_or_default();
            (pool, volume, true)
        }
        CopyTarget::Volume { pool, name: wanted, new } => {
            let pool = records.pool(pool).map_err(|e| e.at("pool"))?;
            let wanted = Name::parse("to", wanted)?;
            if owned {
                stays = Some(format!(
                    "the disk belongs to instance {name:?}, which goes on from it in another pool only; a copy under \
                     another name is left as the disk is"
                ));
            } else if let Err(e) = crate::checkpoints::demand_none(records, old.id, "which does not go along")
            {
                stays = Some(format!("{}; a copy is left as the disk is", e.message));
            } else if !all.is_empty() {
                stays = Some(format!(
                    "instance {name:?} has snapshots, which would not go along; a copy is left as the disk is"
                ));
            }
            let volume = match new {
                true => new_volume(inner, records, tx, project, pool, &wanted, size)?,
                false => there(records, tx, project, &pool.name, &wanted, old)?,
            };
            after.insert("pool".into(), pool.name.to_string());
            after.insert("source".into(), volume.name.clone());
            (pool, volume, *new)
        }
    };
    if let (false, Some(why)) = (request.hold, &stays) {
        return Err(Error::unsupported(why.clone()).at("to"));
    }
    crate::storage::use_pool(tx, pool)?;
    let history = snapshots.iter().filter_map(|id| {
        let kept = records.snapshots.get(id)?.volumes.iter().find(|(v, _)| *v == old.id)?.1;
        Some((kept, kept))
    });
    let generation = runtime.map_or(row.generation, |r| r.generation);
    let path = path(&project.name, name);
    let plan = CopyPlan {
        guest: GuestRef { instance: row.id, generation },
        node: row.node,
        root,
        owned,
        made,
        hold: request.hold,
        speed: request.speed,
        synchronous: request.synchronous,
        stays,
        from: VolumeRef { pool: old.pool, volume: old.id },
        history: history.collect(),
        snapshots,
        pool: pool.name.to_string(),
        full: pool.full_copy(&to.config),
        volume_path: (!owned_target(&to)).then(|| volumes::path(records, &to)),
        to,
        after,
        path: path.clone(),
        device,
        merge: None,
    };
    let words = if plan.hold || !owned { "Copying disk of instance" } else { "Moving instance" };
    let mut new = NewOperation::task(words, Some(project.id), "instances", path);
    new.may_cancel = true;
    new.metadata.insert(METADATA.into(), plan.told(false));
    Ok((plan, new))
}

fn owned_target(volume: &Volume) -> bool {
    volume.owner != VolumeOwner::Custom
}

/// A custom volume that is made for a copy or backup.
pub(crate) fn new_volume(
    inner: &EngineInner,
    records: &Records,
    tx: &mut Tx,
    project: &Row<Project>,
    pool: &Row<karst_model::storage::Pool>,
    name: &Name,
    size: karst_model::ByteSize,
) -> Result<Volume> {
    volumes::demand_free(records, project, pool, name).map_err(|e| e.at("to"))?;
    let volume = Volume {
        id: VolumeId(inner.env.uuid()),
        pool: pool.id,
        project: records.volume_project(project.id),
        name: name.to_string(),
        content: VolumeContent::Block,
        owner: VolumeOwner::Custom,
        description: String::new(),
        size: Some(size),
        config: Config::from([("size".into(), size.bytes().to_string())]),
        spec_version: 1,
        created_at: inner.env.now(),
        layers: Default::default(),
    };
    admit(records, tx, volume.project, &Planned { volume: Some(&volume), ..Default::default() })?;
    Ok(volume)
}

/// A custom volume that is there and that nothing has.
pub(crate) fn there(
    records: &Records,
    tx: &mut Tx,
    project: &Row<Project>,
    pool: &str,
    name: &Name,
    disk: &Volume,
) -> Result<Volume> {
    let row = records.demand_volume(project.id, pool, name).map_err(|e| e.at("to"))?;
    if row.id == disk.id {
        return Err(Error::invalid("to", "the disk is there already"));
    }
    if row.content != VolumeContent::Block {
        return Err(Error::invalid("to", format!("volume {:?} is no block volume", row.name)));
    }
    if row.encryption().is_some() {
        let text =
            format!("volume {:?} is encrypted, and QEMU would write over what it is opened by", row.name);
        return Err(Error::unsupported(text).at("to"));
    }
    crate::layers::demand_one(records, row.id, "and a copy is written to a disk that is one file")
        .map_err(|e| e.at("to"))?;
    if row.size != disk.size {
        let (has, wanted) = (row.size.unwrap_or_default(), disk.size.unwrap_or_default());
        let text =
            format!("volume {:?} has {has}, and the disk {wanted}; make it of exactly that size", row.name);
        return Err(Error::invalid("to", text));
    }
    if !volumes::users(records, row).is_empty() {
        return Err(Error::conflict(format!("volume {:?} is in use; detach it first", row.name)).at("to"));
    }
    tx.expect(row);
    tx.expect_untouched(records, &volumes::lock(row.id));
    tx.touch(&volumes::lock(row.id));
    Ok(row.value.clone())
}

impl CopyPlan {
    /// The copy as the host knows it.
    fn copy(&self) -> MachineCopyRef {
        MachineCopyRef { instance: self.guest.instance, to: self.to.id }
    }

    /// What its operation says of it.
    fn told(&self, ready: bool) -> serde_json::Value {
        let job = match self.merge.map(|m| m.work()) {
            None => "copy",
            Some(Work::Pull) => "pull",
            Some(Work::Commit) => "commit",
            Some(Work::ActiveCommit) => "active-commit",
        };
        serde_json::json!({"instance": self.guest.instance, "device": self.device, "ready": ready, "job": job})
    }
}
