//! Backups of disks of virtual machines while they run: all disks as they were at one moment, perhaps with a checkpoint of the same
//! moment, and of the whole or of what changed since a checkpoint. They are written into custom volumes, or others read them over
//! NBD until they say that they are done.
//!
//! It is one saga ([`DiskBackingUp`]): it makes the volumes, lets the host begin, writes the checkpoint's record, waits, and ends it on
//! the host. What is read has scratch volumes beside it, which are in the plan alone and go with it. A cancel, or a stop of the
//! machine, breaks one off: volumes that were made for it go, and so does its checkpoint, of which there is no backup.
//!
//! That one which is read has been read is kept in memory only: whoever says it waits for the end, and says it again to a daemon that
//! was started anew.

use super::{
    CreateCheckpoint, OwnDisk, Running,
    create::{taking_back, write},
    demand, disks, prepare, release_name, running, take_name,
};
use crate::{
    Engine, EngineInner, Records, Row,
    compute::{
        disk_copy::{cancel, new_volume, there},
        lock, path,
    },
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    tenancy::limits::{Planned, admit},
    volumes,
};
use async_trait::async_trait;
pub use karst_agent::BackupListen;
use karst_agent::{
    BackedUpVolume, CallContext, GuestRef, MachineBackupBegin, MachineBackupRef, NewMark, VolumeRef,
    is_export_name,
};
use karst_env::EnvExt;
use karst_model::{
    ByteSize, CheckpointId, Config, DiskBackupId, Error, ErrorKind, Name, NodeId, OperationId, Result,
    SagaId, VolumeId,
    access::Permission,
    checkpoint::Checkpoint,
    guest::{DiskBackupPhase, DiskBackupState, DiskCopyEnd, scratch_size},
    instance::Instance,
    project::Project,
    spec::{VolumeSource, VolumeSpec},
    storage::{Volume, VolumeContent, VolumeOwner},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, time::Duration};

const CALL: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_secs(86_400);
/// Time for begin and end, for which the host makes images and breaks jobs off.
const END: Duration = Duration::from_secs(180);
/// Between two looks at how far it is.
const LOOK: Duration = Duration::from_millis(250);
/// The same of one that is read, whose end is said.
const LOOK_READ: Duration = Duration::from_secs(2);
/// How long a host may be silent before a backup is given up; one that is started anew is back before.
const SILENCE: Duration = Duration::from_secs(300);

/// Key of an operation's metadata under which it says that it backs disks up: an object with `instance` (UUID), `mode` (`push` or
/// `pull`), `begun`, `done` and `total`.
pub const METADATA: &str = "disk_backup";

/// What a backup is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Since {
    /// All of the disk.
    Whole,
    /// What changed since the checkpoint of this name.
    Checkpoint(String),
}

/// The volume that a disk is written to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupTarget {
    /// Its pool.
    pub pool: String,
    /// Its name.
    pub name: String,
    /// It is made; else it is there, of exactly the disk's size. What is written of a backup of changes is written over what it
    /// has, which is the backup before: then it is the disk as it was at this moment. So such a one must be there.
    pub new: bool,
}

/// A disk to be backed up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupDisk {
    /// Its device.
    pub device: String,
    /// Of what.
    pub since: Since,
    /// Where it is written to; of one that is read nothing.
    pub target: Option<BackupTarget>,
    /// What it is called where it is read.
    pub export: String,
    /// What the bitmap of what changed is called there.
    pub bitmap: String,
}

/// A backup to be begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BeginBackup {
    /// The disks.
    pub disks: Vec<BackupDisk>,
    /// A checkpoint of the same moment.
    pub checkpoint: Option<CreateCheckpoint>,
    /// Others read it there.
    pub listen: Option<BackupListen>,
    /// How long they may; then it ends. Without: until they say so.
    pub limit: Option<Duration>,
}

/// A disk of a backup that goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupDiskView {
    /// Its device.
    pub device: String,
    /// The checkpoint since which.
    pub since: Option<String>,
    /// The volume that it is written to: names of its pool and its own.
    pub target: Option<(String, String)>,
    /// What it is called where it is read.
    pub export: String,
    /// The same of its bitmap.
    pub bitmap: String,
}

/// A backup that goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskBackupView {
    /// The operation that it is.
    pub operation: OperationId,
    /// Its disks.
    pub disks: Vec<BackupDiskView>,
    /// Others read it there.
    pub listen: Option<BackupListen>,
    /// How far it is.
    pub state: DiskBackupState,
}

/// The backup of an instance's disks that goes on; there is one at a time.
fn going(records: &Records, instance: &Instance) -> Option<(SagaId, OperationId, BackupPlan)> {
    let held = records.lock(&lock(instance.id))?;
    let saga = records.sagas.get(&held.saga).filter(|s| s.name == <DiskBackingUp as Saga>::NAME)?;
    let plan = serde_json::from_value(saga.plan.clone()).ok()?;
    Some((saga.id, saga.operation, plan))
}

/// Its operation.
pub(crate) fn operation_of(records: &Records, instance: &Instance) -> Option<OperationId> {
    going(records, instance).map(|(_, operation, _)| operation)
}

fn none() -> Error {
    Error::conflict("no disk of the instance is being backed up")
}

impl Engine {
    /// Backs disks of a running virtual machine up.
    ///
    /// # Errors
    /// Invalid by field, not found, conflict (not running, busy, in use, taken name), unsupported for containers and for what a volume
    /// cannot say, quota, forbidden. That the host cannot begin the operation says.
    pub async fn disk_backup_begin(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        request: BeginBackup,
    ) -> Result<LiveOperation> {
        let project = match request.listen {
            Some(_) => self.project(context, project, Permission::ResourceEdit)?,
            None => self.volume_editor(context, project)?,
        };
        let inner = self.inner();
        runner::start::<DiskBackingUp>(inner, context, |tx| {
            let records = inner.inventory.read();
            plan(inner, &records, tx, &project, name, &request)
        })
        .await
    }

    /// How far the backup of an instance's disks is; `None` when none goes on.
    ///
    /// # Errors
    /// Not found, unavailable, forbidden.
    pub async fn disk_backup(
        &self,
        context: &Context,
        project: &str,
        name: &str,
    ) -> Result<Option<DiskBackupView>> {
        let view = self.find(context, project, name, Permission::ProjectView)?;
        let found = going(&self.inner().inventory.read(), &view.instance);
        let Some((_, operation, plan)) = found else { return Ok(None) };
        let agent = self.inner().agents.get(plan.node)?;
        let state = agent.machine_backup_state(&CallContext::read(CALL), plan.at()).await?;
        let disks = plan.disks.into_iter().map(|d| BackupDiskView {
            target: plan.listen.is_none().then_some((d.pool, d.to.name)),
            device: d.device,
            since: d.since_name,
            export: d.export,
            bitmap: d.bitmap,
        });
        Ok(Some(DiskBackupView { operation, disks: disks.collect(), listen: plan.listen, state }))
    }

    /// Ends the backup of an instance's disks, and answers when it has ended: one that is read is done then, one that is written is
    /// broken off.
    ///
    /// # Errors
    /// Not found, conflict when none goes on, forbidden; and what its end failed of.
    pub async fn disk_backup_end(&self, context: &Context, project: &str, name: &str) -> Result<()> {
        let view = self.find(context, project, name, Permission::ResourceEdit)?;
        let inner = self.inner();
        let found = going(&inner.inventory.read(), &view.instance);
        let (saga, operation, plan) = found.ok_or_else(none)?;
        let live = inner.operations.live(operation).ok_or_else(none)?;
        match plan.listen {
            Some(_) => inner.copy_words.say(&inner.inventory.read(), saga, DiskCopyEnd::Finish),
            None => cancel(inner, &live)?,
        }
        let ended = live.ended().await;
        match &ended.error {
            Some(e) if e.is(ErrorKind::Cancelled) => Ok(()),
            Some(e) => Err(e.clone()),
            None => Ok(()),
        }
    }
}

/// Answers when a backup has begun, or that it has not.
///
/// # Errors
/// What it failed of.
pub async fn begun(engine: &Engine, operation: &LiveOperation) -> Result<()> {
    loop {
        let now = operation.snapshot();
        if now.state.is_final() {
            return now.error.clone().map_or(Ok(()), Err);
        }
        let begun = now.metadata.get(METADATA).and_then(|m| m.get("begun")?.as_bool());
        if begun == Some(true) {
            return Ok(());
        }
        engine.inner().env.sleep(Duration::from_millis(20)).await;
    }
}

/// A disk as the plan has it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PlannedDisk {
    device: String,
    from: VolumeRef,
    /// The instance does not own it.
    custom: bool,
    /// What it is written to, or what keeps what the guest overwrites.
    to: Volume,
    /// Name of its pool.
    pool: String,
    /// It is made.
    made: bool,
    since: Vec<CheckpointId>,
    since_name: Option<String>,
    export: String,
    bitmap: String,
}

impl PlannedDisk {
    fn at(&self) -> VolumeRef {
        VolumeRef { pool: self.to.pool, volume: self.to.id }
    }
}

/// Plan of [`DiskBackingUp`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BackupPlan {
    id: DiskBackupId,
    guest: GuestRef,
    node: NodeId,
    disks: Vec<PlannedDisk>,
    listen: Option<BackupListen>,
    limit: Option<Duration>,
    checkpoint: Option<Checkpoint>,
    mark: Option<NewMark>,
    known: Vec<CheckpointId>,
    /// Paths of the custom volumes that are made.
    volume_paths: Vec<String>,
}

fn plan(
    inner: &EngineInner,
    records: &Records,
    tx: &mut Tx,
    project: &Row<Project>,
    name: &str,
    request: &BeginBackup,
) -> Result<(BackupPlan, NewOperation)> {
    let Running { row, guest } = running(records, records.instance(project, name)?)?;
    tx.expect(row);
    tx.expect(project);
    request.listen.map_or(Ok(()), BackupListen::check)?;
    let wanted: Vec<String> = request.disks.iter().map(|d| d.device.clone()).collect();
    let found = disks(records, row, Some(&wanted))?;
    super::demand_plain(records, row, &found)?;
    let mut planned = vec![];
    let (mut devices, mut exports, mut targets) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for disk in &request.disks {
        let own = found.iter().find(|d| d.device == disk.device);
        let own = own.ok_or_else(|| Error::invalid("disks", "a disk is named that is not there"))?;
        if !devices.insert(&disk.device) {
            let text = format!("disk {:?} is there twice; a backup has each disk once", disk.device);
            return Err(Error::invalid("disks", text));
        }
        for (key, said) in [("exportname", &disk.export), ("exportbitmap", &disk.bitmap)] {
            if !is_export_name(said) {
                let text = format!("{said:?} is no name of an export: letters, digits, '.', '_' and '-'");
                return Err(Error::invalid(key, text));
            }
        }
        if !exports.insert(disk.export.clone()) {
            let text = format!("two disks are called {:?} where they are read", disk.export);
            return Err(Error::invalid("exportname", text));
        }
        let one = planned_disk(inner, records, tx, project, row, own, disk, request.listen.is_some())?;
        if !targets.insert((one.pool.clone(), one.to.name.clone())) {
            let text = format!("two disks are backed up to volume {:?}", one.to.name);
            return Err(Error::invalid("disks", text));
        }
        planned.push(one);
    }
    // Each was admitted by itself.
    let made = planned.iter().filter(|d| d.made && request.listen.is_none());
    let made: Vec<Volume> = made.map(|d| d.to.clone()).collect();
    if let [first, _, ..] = &made[..] {
        admit(records, tx, first.project, &Planned { more: &made, ..Default::default() })?;
    }
    let line = records.checkpoints_of(row.id);
    let known = line.iter().map(|c| c.id).collect();
    if planned.iter().any(|d| !d.since.is_empty())
        && let Some(last) = line.last()
    {
        tx.expect(*last);
    }
    let (checkpoint, mark) = match &request.checkpoint {
        Some(new) => {
            let (checkpoint, mark) = prepare(inner, records, tx, row, new)?;
            (Some(checkpoint), Some(mark))
        }
        None => (None, None),
    };
    let volume_paths = made.iter().map(|v| volumes::path(records, v)).collect();
    let plan = BackupPlan {
        id: DiskBackupId(inner.env.uuid()),
        guest,
        node: row.node,
        disks: planned,
        listen: request.listen,
        limit: request.limit,
        checkpoint,
        mark,
        known,
        volume_paths,
    };
    let path = path(&project.name, name);
    let mut new = NewOperation::task("Backing up disks of instance", Some(project.id), "instances", path);
    new.may_cancel = true;
    new.metadata.insert(METADATA.into(), plan.told(&DiskBackupState::default(), false));
    Ok((plan, new))
}

#[allow(clippy::too_many_arguments)] // of one use, taken out of a loop
fn planned_disk(
    inner: &EngineInner,
    records: &Records,
    tx: &mut Tx,
    project: &Row<Project>,
    row: &Row<Instance>,
    own: &OwnDisk<'_>,
    disk: &BackupDisk,
    read: bool,
) -> Result<PlannedDisk> {
    let old = own.volume;
    let size = old.size.ok_or_else(|| Error::internal("the size of the disk is not known", old.id))?;
    tx.expect(old);
    let line = records.checkpoints_of(row.id);
    let (mut since, mut since_name) = (vec![], None);
    if let Since::Checkpoint(name) = &disk.since {
        let first = demand(records, row, name).map_err(|e| e.at("incremental"))?;
        if !first.has(old.id) {
            let text = format!(
                "checkpoint {name:?} has no disk {:?} as it is now; back up all of that disk",
                disk.device
            );
            return Err(Error::invalid("incremental", text));
        }
        let from = line.iter().skip_while(|c| c.id != first.id);
        since = from.filter(|c| c.has(old.id)).map(|c| c.id).collect();
        since_name = Some(name.clone());
    }
    let (to, pool, made) = match (&disk.target, read) {
        (None, true) => {
            let pool = records.pools.get(&old.pool).ok_or_else(|| Error::not_found("the pool is gone"))?;
            let volume = Volume {
                id: VolumeId(inner.env.uuid()),
                pool: pool.id,
                project: records.volume_project(project.id),
                name: format!("scratch of {}", disk.device),
                content: VolumeContent::Block,
                owner: VolumeOwner::Custom,
                description: String::new(),
                size: Some(ByteSize(scratch_size(size.bytes()))),
                config: Config::new(),
                spec_version: 1,
                created_at: inner.env.now(),
                layers: Default::default(),
            };
            (volume, pool, true)
        }
        (Some(target), false) => {
            let pool = records.pool(&target.pool).map_err(|e| e.at("pool"))?;
            let name = Name::parse("target", &target.name)?;
            if target.new && !since.is_empty() {
                return Err(Error::unsupported(
                    "a volume cannot say what of it was never written: a backup of what changed is written over the one before it, \
                     which is there and is the disk as it is now afterwards; or let it be read",
                )
                .at("target"));
            }
            let volume = match target.new {
                true => new_volume(inner, records, tx, project, pool, &name, size)?,
                false => there(records, tx, project, &pool.name, &name, old)?,
            };
            (volume, pool, target.new)
        }
        (None, false) => return Err(Error::invalid("target", "a disk is written to a volume; name it")),
        (Some(_), true) => {
            return Err(Error::invalid("target", "what others read is written nowhere; leave it out"));
        }
    };
    crate::storage::life::demand_active(pool)?;
    tx.expect(pool);
    tx.expect_unlocked(&crate::storage::pool_lock(pool.id));
    tx.touch(&crate::storage::pool_lock(pool.id));
    Ok(PlannedDisk {
        device: disk.device.clone(),
        from: own.at(),
        custom: old.owner == VolumeOwner::Custom,
        pool: pool.name.to_string(),
        to,
        made,
        since,
        since_name,
        export: disk.export.clone(),
        bitmap: disk.bitmap.clone(),
    })
}

impl BackupPlan {
    fn at(&self) -> MachineBackupRef {
        MachineBackupRef { instance: self.guest.instance, id: self.id }
    }

    /// Custom volumes that are made for it.
    fn volumes(&self) -> impl Iterator<Item = &Volume> {
        self.disks.iter().filter(move |d| d.made && self.listen.is_none()).map(|d| &d.to)
    }

    /// What its operation says of it.
    fn told(&self, state: &DiskBackupState, begun: bool) -> serde_json::Value {
        let mode = if self.listen.is_some() { "pull" } else { "push" };
        serde_json::json!({
            "instance": self.guest.instance, "mode": mode, "begun": begun, "done": state.done,
            "total": state.total,
        })
    }

    async fn make(&self, cx: &StepContext) -> Result<()> {
        for disk in self.disks.iter().filter(|d| d.made) {
            let spec = VolumeSpec {
                id: disk.to.id,
                pool: disk.to.pool,
                content: disk.to.content,
                size: disk.to.size,
                source: VolumeSource::Empty,
            };
            cx.agent(self.node)?.volume_create(&cx.mutate(LONG), spec).await?;
        }
        Ok(())
    }

    async fn drop_made(&self, cx: &StepContext) -> Result<()> {
        for disk in self.disks.iter().filter(|d| d.made) {
            cx.agent(self.node)?.volume_delete(&cx.mutate(LONG), disk.at()).await?;
        }
        Ok(())
    }

    async fn begin(&self, cx: &StepContext) -> Result<()> {
        let disks = self.disks.iter().map(|d| BackedUpVolume {
            from: d.from,
            since: d.since.clone(),
            to: d.at(),
            export: d.export.clone(),
            bitmap: d.bitmap.clone(),
        });
        let request = MachineBackupBegin {
            guest: self.guest,
            id: self.id,
            disks: disks.collect(),
            mark: self.mark.clone(),
            known: self.known.clone(),
            listen: self.listen,
        };
        cx.agent(self.node)?.machine_backup_begin(&cx.mutate(END), request).await
    }

    /// Is its checkpoint written down?
    fn is_recorded(&self, records: &Records) -> bool {
        self.checkpoint.as_ref().is_some_and(|c| records.checkpoints.contains_key(&c.id))
    }

    /// How far it is, asked again while the host is silent.
    async fn look(&self, cx: &StepContext, silent: &mut Duration) -> Result<Option<DiskBackupState>> {
        let asked = match cx.agent(self.node) {
            Ok(agent) => agent.machine_backup_state(&CallContext::read(CALL), self.at()).await,
            Err(e) => Err(e),
        };
        match asked {
            Err(e) if matches!(e.kind, ErrorKind::Unavailable | ErrorKind::Timeout) && *silent < SILENCE => {
                *silent += LOOK;
                Ok(None)
            }
            other => {
                *silent = Duration::ZERO;
                other.map(Some)
            }
        }
    }

    /// Until all is written, or it is said that all is read.
    async fn wait(&self, cx: &StepContext) -> Result<()> {
        let since = cx.engine.env.monotonic();
        let (mut silent, mut told) = (Duration::ZERO, None);
        loop {
            let word = cx.engine.copy_words.next();
            let successor =
                cx.engine.inventory.read().sagas.get(&cx.saga).is_some_and(|s| s.epoch > cx.engine.epoch);
            if successor {
                return Err(Error::conflict("another daemon goes on with this"));
            }
            if let Some(state) = self.look(cx, &mut silent).await? {
                self.tell(cx, &state, &mut told);
                match state.phase {
                    DiskBackupPhase::Running => {}
                    DiskBackupPhase::Done => return Ok(()),
                    DiskBackupPhase::Failed { reason } => {
                        return Err(Error::conflict(format!("the disks could not be backed up: {reason}")));
                    }
                    DiskBackupPhase::Gone => {
                        return Err(Error::conflict(
                            "the virtual machine ended before its disks were backed up",
                        ));
                    }
                }
            }
            let over = self.limit.is_some_and(|l| cx.engine.env.monotonic().saturating_sub(since) >= l);
            if self.listen.is_some() && (over || cx.engine.copy_words.of(cx.saga).is_some()) {
                return Ok(());
            }
            let wait = if self.listen.is_some() && self.limit.is_none() { LOOK_READ } else { LOOK };
            // A word, or the time for the next look.
            let _ = cx.engine.env.timeout(wait, word).await;
        }
    }

    /// Tells of the progress: that it has begun, and at most once a second how far it is.
    fn tell(&self, cx: &StepContext, state: &DiskBackupState, told: &mut Option<(Duration, u64)>) {
        let now = cx.engine.env.monotonic();
        let percent = state.done / (state.total / 100).max(1);
        if let Some((last, before)) = *told
            && (before == percent || now.saturating_sub(last) < Duration::from_secs(1))
        {
            return;
        }
        *told = Some((now, percent));
        cx.engine.operations.progress(&cx.operation, |m| {
            m.insert(METADATA.into(), self.told(state, true));
        });
    }
}

/// Makes volumes, begins, writes the checkpoint's record, waits, ends it on the host, and drops scratch volumes.
pub struct DiskBackingUp;

#[async_trait]
impl Saga for DiskBackingUp {
    const NAME: &'static str = "instance-disk-backup";
    const STEPS: &'static [&'static str] = &["volumes", "begin", "checkpoint", "wait", "end", "drop"];
    type Plan = BackupPlan;
    type Outputs = ();

    // What is written, or was read, is so whatever the end takes.
    fn retries(step: usize) -> u32 {
        if step >= 4 { 5 } else { 0 }
    }

    fn has(plan: &BackupPlan, step: usize) -> bool {
        match step {
            0 => plan.disks.iter().any(|d| d.made),
            2 => plan.checkpoint.is_some(),
            5 => plan.listen.is_some(),
            _ => true,
        }
    }

    fn locks(plan: &BackupPlan) -> Vec<String> {
        let mut locks = vec![lock(plan.guest.instance)];
        for disk in &plan.disks {
            if disk.custom {
                locks.push(volumes::lock(disk.from.volume));
            }
            if plan.listen.is_none() {
                locks.push(volumes::lock(disk.to.id));
            }
        }
        locks
    }

    fn begin(plan: &BackupPlan, _: &EngineInner, tx: &mut Tx) -> Result<()> {
        if let Some(checkpoint) = &plan.checkpoint {
            take_name(tx, checkpoint);
        }
        for to in plan.volumes() {
            tx.take_name("volumes", &volumes::scope(to), &to.name, &to.id.to_string());
            tx.create(to);
        }
        Ok(())
    }

    async fn run(cx: &StepContext, plan: &BackupPlan, _: &mut (), step: usize) -> Result<()> {
        match step {
            0 => plan.make(cx).await,
            1 => plan.begin(cx).await,
            2 => {
                let new = plan.checkpoint.as_ref();
                cx.engine
                    .transact(|records, tx| {
                        let row = records.instances.get(&plan.guest.instance);
                        if let (Some(new), Some(row)) = (new.filter(|_| !plan.is_recorded(records)), row) {
                            write(row, tx, new);
                        }
                        Ok(())
                    })
                    .await
            }
            3 => plan.wait(cx).await,
            4 => cx.agent(plan.node)?.machine_backup_end(&cx.mutate(END), plan.at()).await,
            _ => plan.drop_made(cx).await,
        }
    }

    async fn undo(cx: &StepContext, plan: &BackupPlan, _: &(), step: usize) -> Result<()> {
        match step {
            0 => plan.drop_made(cx).await,
            // Of a machine that has ended its disks have it, and it is the newest: it stays.
            2 => {
                cx.engine
                    .transact(|records, tx| {
                        let row = records.instances.get(&plan.guest.instance);
                        let new = plan.checkpoint.as_ref().and_then(|c| records.checkpoints.get(&c.id));
                        if let (Some(new), true) = (new, row.is_some_and(|row| volumes::runs(records, row))) {
                            tx.delete(new);
                        }
                        Ok(())
                    })
                    .await
            }
            1 => {
                let agent = cx.agent(plan.node)?;
                agent.machine_backup_end(&cx.mutate(END), plan.at()).await?;
                let recorded = plan.is_recorded(&cx.engine.inventory.read());
                match &plan.mark {
                    Some(mark) if !recorded => {
                        let back = taking_back(plan.guest.instance, mark);
                        agent.machine_checkpoint_delete(&cx.mutate(CALL), back).await
                    }
                    _ => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    fn commit(_: &BackupPlan, _: &(), _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }

    fn abort(plan: &BackupPlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let records = engine.inventory.read();
        if let Some(checkpoint) = &plan.checkpoint
            && !plan.is_recorded(&records)
        {
            release_name(tx, checkpoint);
        }
        for to in plan.volumes() {
            tx.release_name("volumes", &volumes::scope(to), &to.name, &to.id.to_string());
            if let Some(row) = records.volumes.get(&to.id) {
                tx.delete(row);
            }
        }
        Ok(())
    }

    fn announce(plan: &BackupPlan) -> Vec<(&'static str, String)> {
        plan.volume_paths.iter().map(|path| ("storage-volume-created", path.clone())).collect()
    }
}
