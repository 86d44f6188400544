//! What custom volumes hold: wiped, read and written byte by byte.
//!
//! Reading holds the volume still for as long as it takes. What is written is uploaded to the host first, and then put in
//! place by a saga in one step of the host: a client that goes away in mid-transfer has changed nothing.

use super::{lock, path, runs, users};
use crate::{
    Engine, EngineInner, Records, Row,
    backups::lock as upload_lock,
    compute::{called, guest::Session},
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    tenancy::rules::ProjectRules,
};
use async_trait::async_trait;
use karst_agent::{
    CallContext, StreamFormat, VolumeExport, VolumeRebuild, VolumeRef, VolumeWrite as WriteCall,
};
use karst_model::{
    BackupId, ByteSize, Error, NodeId, ProjectId, Result, VolumeId, spec::VolumeSource, storage::Volume,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, Weak},
    time::Duration,
};

const CALL: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_secs(86_400);

/// A disk that is being read. Dropped it may change again.
pub struct OpenVolume {
    /// Its bytes, at any place, its holes as holes.
    pub file: OwnedFd,
    /// Keeps it as it is.
    pub session: Session,
    /// Says so.
    pub reading: VolumeReading,
}

/// How often volumes are being read.
pub(crate) type Reads = Arc<Mutex<BTreeMap<VolumeId, u32>>>;

/// Says that a volume is being read: what would change it meanwhile is refused rather than kept waiting.
#[derive(Debug)]
pub struct VolumeReading {
    volume: VolumeId,
    all: Reads,
}

impl Drop for VolumeReading {
    fn drop(&mut self) {
        let mut all = self.all.lock().unwrap_or_else(|e| e.into_inner());
        let last = all.get_mut(&self.volume).is_none_or(|n| {
            *n = n.saturating_sub(1);
            *n == 0
        });
        if last {
            all.remove(&self.volume);
        }
    }
}

impl EngineInner {
    fn begin_reading(&self, volume: VolumeId) -> VolumeReading {
        let all = self.volume_reads.clone();
        *all.lock().unwrap_or_else(|e| e.into_inner()).entry(volume).or_default() += 1;
        VolumeReading { volume, all }
    }

    /// Is the volume being read?
    pub(crate) fn is_read(&self, volume: VolumeId) -> bool {
        self.volume_reads.lock().unwrap_or_else(|e| e.into_inner()).contains_key(&volume)
    }

    /// Refuses what changes a volume that is being read.
    pub(crate) fn demand_unread(&self, volume: &Volume) -> Result<()> {
        match self.is_read(volume.id) {
            false => Ok(()),
            true => {
                let text = format!("volume {:?} is being read; try again when that has ended", volume.name);
                Err(Error::conflict(text))
            }
        }
    }
}

/// What is to be written into a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteVolume {
    /// The upload, all of it.
    pub upload: BackupId,
    /// Its bytes.
    pub length: u64,
    /// Byte of the volume that its first goes to.
    pub offset: u64,
    /// It is a self-contained image in the format qcow2 of what the whole volume is to be, rather than bytes of the disk.
    pub image: bool,
}

/// A disk on its way out as an image. Dropped it ends.
pub struct ImageOfVolume {
    /// The image, to its end; whole when the session ended with 0.
    pub stream: OwnedFd,
    /// Keeps the disk as it is.
    pub session: Session,
    /// Says so.
    pub reading: VolumeReading,
}

/// Most bytes that an image of a disk of this size may have: all of the disk, and what the format itself takes.
pub fn most_of_image(size: ByteSize) -> u64 {
    size.bytes().saturating_add(size.bytes() / 64).saturating_add(4 << 20)
}

/// Uploads into volumes that one project may have on their way at a time.
pub const UPLOADS: usize = 16;

/// Uploads into volumes that go on, with whose they are and how much they may stage: none outlives this process.
pub(crate) type Open = Mutex<BTreeMap<BackupId, (ProjectId, u64)>>;

/// The right to stage an upload into a volume; dropped it is another's. What is staged is given to [`Engine::volume_write`],
/// or abandoned.
#[derive(Debug)]
pub struct VolumeUpload {
    id: BackupId,
    engine: Weak<EngineInner>,
}

impl VolumeUpload {
    /// The upload.
    pub fn id(&self) -> BackupId {
        self.id
    }
}

impl Drop for VolumeUpload {
    fn drop(&mut self) {
        if let Some(inner) = self.engine.upgrade() {
            inner.volume_uploads.lock().unwrap_or_else(|e| e.into_inner()).remove(&self.id);
        }
    }
}

/// The volume is a disk, and `length` bytes from `offset` on are within it.
fn demand_room(volume: &Volume, offset: u64, length: u64) -> Result<()> {
    if !volume.content.is_disk() {
        let text = format!("volume {:?} is a file system, which has no bytes by place", volume.name);
        return Err(Error::unsupported(text));
    }
    // As it is stored: of an encrypted one the container.
    let size = volume.stored_size().unwrap_or_default().bytes();
    match offset.checked_add(length) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Error::invalid(
            "length",
            format!("volume {:?} has {size} bytes, and what is written would reach beyond", volume.name),
        )),
    }
}

/// No guest runs with the volume, and none begins to: a start expects what it attaches to be unlocked.
fn demand_still(records: &Records, tx: &mut Tx, row: &Row<Volume>) -> Result<()> {
    for user in &users(records, row).instances {
        if runs(records, user) {
            return Err(Error::conflict(format!(
                "{} runs with volume {:?}; stop it first",
                called(row.project, user),
                row.name
            )));
        }
        // A start or snapshot that is under way has this lock.
        let target = crate::compute::lock(user.id);
        runner::demand_unlocked(records, std::slice::from_ref(&target))?;
        tx.expect_unlocked(&target);
        tx.expect(user);
    }
    tx.expect(row);
    tx.expect_untouched(records, &lock(row.id));
    Ok(())
}

impl Engine {
    /// Makes a custom volume empty again: it reads as zeros, and its space is given back to the pool rather than overwritten.
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
        let project = self.volume_home(context, project)?;
        let inner = self.inner();
        runner::start::<VolumeWipe>(inner, context, |tx| {
            let records = inner.inventory.read();
            let row = records.demand_volume(project.id, pool, name)?;
            crate::checkpoints::demand_none(&records, row.id, "which would not know what was wiped")?;
            crate::layers::demand_one(&records, row.id, "and a wipe is of one file")?;
            if !records.volume_snapshots_of(row.id).is_empty() {
                return Err(Error::conflict(format!(
                    "volume {name:?} has snapshots, which would still show what was in it; delete them first"
                )));
            }
            for user in &users(&records, row).instances {
                if user.root == row.id && !records.snapshots_of(user.id).is_empty() {
                    return Err(Error::conflict(format!(
                        "{} has snapshots of volume {name:?}; delete them first",
                        called(row.project, user)
                    )));
                }
            }
            inner.demand_unread(row)?;
            demand_still(&records, tx, row)?;
            let path = path(&records, row);
            let plan = WipePlan {
                content: VolumeRebuild {
                    volume: VolumeRef { pool: row.pool, volume: row.id },
                    source: VolumeSource::Empty,
                    size: row.stored_size(),
                },
                node: inner.node,
                path: path.clone(),
            };
            let new = NewOperation::task("Wiping storage volume", Some(project.id), "storage_volumes", path);
            Ok((plan, new))
        })
        .await
    }

    /// Opens a custom volume that is a disk, to be read from any place. It holds everything that a guest wrote, so it takes
    /// the right to change it.
    ///
    /// # Errors
    /// Not found, unsupported (no disk), conflict when a guest runs with it that is not paused, forbidden.
    pub async fn volume_open(
        &self,
        context: &Context,
        project: &str,
        pool: &str,
        name: &str,
    ) -> Result<OpenVolume> {
        let project = self.volume_home(context, project)?;
        let inner = self.inner();
        let at = {
            let records = inner.inventory.read();
            let row = records.demand_volume(project.id, pool, name)?;
            demand_room(row, 0, 0)?;
            runner::demand_unlocked(&records, &[lock(row.id)])?;
            VolumeRef { pool: row.pool, volume: row.id }
        };
        let reading = inner.begin_reading(at.volume);
        let agent = inner.agents.get(inner.node)?;
        let answer = agent.volume_open(&CallContext::read(LONG), at).await?;
        let session = self.session(agent, answer.value);
        let file = answer.fds.into_iter().next();
        let file = file.ok_or_else(|| Error::internal("the host opened no disk", at.volume))?;
        Ok(OpenVolume { file, session, reading })
    }

    /// Has a custom volume that is a disk packed into an image in the format qcow2, which takes the right to change it.
    ///
    /// # Errors
    /// Not found, unsupported (no disk), conflict when a guest runs with it that is not paused, forbidden.
    pub async fn volume_image(
        &self,
        context: &Context,
        project: &str,
        pool: &str,
        name: &str,
    ) -> Result<ImageOfVolume> {
        let project = self.volume_home(context, project)?;
        let inner = self.inner();
        let volume = {
            let records = inner.inventory.read();
            let row = records.demand_volume(project.id, pool, name)?;
            demand_room(row, 0, 0)?;
            runner::demand_unlocked(&records, &[lock(row.id)])?;
            VolumeRef { pool: row.pool, volume: row.id }
        };
        let reading = inner.begin_reading(volume.volume);
        let agent = inner.agents.get(inner.node)?;
        let request = VolumeExport { volume, snapshot: None, format: StreamFormat::Qcow2 };
        let answer = agent.volume_export(&CallContext::read(LONG), request).await?;
        let session = self.session(agent, answer.value);
        let stream = answer.fds.into_iter().next();
        let stream = stream.ok_or_else(|| Error::internal("the host opened no stream", volume.volume))?;
        Ok(ImageOfVolume { stream, session, reading })
    }

    /// Could `length` bytes be written from `offset` on, as things are? Asked before they are uploaded.
    ///
    /// # Errors
    /// As [`Engine::volume_write`].
    pub fn volume_writable(
        &self,
        context: &Context,
        project: &str,
        pool: &str,
        name: &str,
        (offset, length): (u64, u64),
    ) -> Result<()> {
        let project = self.volume_home(context, project)?;
        let records = self.inner().inventory.read();
        let row = records.demand_volume(project.id, pool, name)?;
        demand_room(row, offset, length)?;
        self.inner().demand_unread(row)?;
        demand_still(&records, &mut Tx::default(), row)
    }

    /// Begins the upload of at most `room` bytes into a volume. Until it is put in place or given up it takes space of the host
    /// that no pool counts, so a project has few at a time, and together not more than it may have of disks.
    ///
    /// # Errors
    /// Quota, not found, forbidden.
    pub fn volume_upload(&self, context: &Context, project: &str, room: u64) -> Result<VolumeUpload> {
        let project = self.volume_home(context, project)?;
        let inner = self.inner();
        let limit = ProjectRules::parse(&project.config)?.limits.disk;
        let mut open = inner.volume_uploads.lock().unwrap_or_else(|e| e.into_inner());
        let (mut number, mut bytes) = (1, room);
        for (_, theirs) in open.values().filter(|(of, _)| *of == project.id) {
            number += 1;
            bytes = bytes.saturating_add(*theirs);
        }
        let name = &*project.name;
        if number > UPLOADS {
            return Err(Error::quota(format!(
                "project {name:?} has {UPLOADS} uploads into volumes on their way, which is as many as it may have; wait \
                 until one has ended"
            )));
        }
        if let Some(limit) = limit.filter(|limit| bytes > *limit) {
            return Err(Error::quota(format!(
                "uploads into volumes of project {name:?} would take {} aside, and limits.disk is {}; upload one after the \
                 other, or say how long each is",
                ByteSize(bytes),
                ByteSize(limit)
            )));
        }
        let id = BackupId(inner.env.uuid());
        open.insert(id, (project.id, room));
        Ok(VolumeUpload { id, engine: Arc::downgrade(inner) })
    }

    /// Puts what was uploaded ([`Engine::volume_upload`]) over a part of a custom volume, and drops the upload.
    ///
    /// # Errors
    /// Not found, unsupported (no disk), invalid (beyond its end), conflict when a guest runs with it or it is busy,
    /// forbidden.
    pub async fn volume_write(
        &self,
        context: &Context,
        project: &str,
        pool: &str,
        name: &str,
        request: WriteVolume,
    ) -> Result<LiveOperation> {
        let project = self.volume_home(context, project)?;
        let inner = self.inner();
        runner::start::<VolumeWrite>(inner, context, |tx| {
            let records = inner.inventory.read();
            let row = records.demand_volume(project.id, pool, name)?;
            match request.image {
                false => demand_room(row, request.offset, request.length)?,
                true if request.offset > 0 => {
                    return Err(Error::invalid(
                        "offset",
                        "an image is of a whole volume; leave the offset out",
                    ));
                }
                true => demand_room(row, 0, 0)?,
            }
            crate::checkpoints::demand_none(&records, row.id, "which would not know what was written")?;
            crate::layers::demand_one(&records, row.id, "and what is written goes into one file")?;
            inner.demand_unread(row)?;
            demand_still(&records, tx, row)?;
            let path = path(&records, row);
            let plan = WritePlan {
                volume: VolumeRef { pool: row.pool, volume: row.id },
                upload: request.upload,
                offset: request.offset,
                image: request.image,
                node: inner.node,
                path: path.clone(),
            };
            let new = NewOperation::task("Writing storage volume", Some(project.id), "storage_volumes", path);
            Ok((plan, new))
        })
        .await
    }
}

/// Its content changed: who read it before has read something else.
fn changed(id: VolumeId, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
    let row = engine.volume_row(id)?;
    tx.replace(&row, &Volume { spec_version: row.spec_version + 1, ..row.value.clone() });
    Ok(())
}

/// Plan of [`VolumeWipe`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WipePlan {
    content: VolumeRebuild,
    node: NodeId,
    path: String,
}

/// Replaces the content by nothing in one step of the host. What was there cannot be brought back: the step has no undo, and
/// should it fail to its end the volume is as it was.
pub struct VolumeWipe;

#[async_trait]
impl Saga for VolumeWipe {
    const NAME: &'static str = "volume-wipe";
    const STEPS: &'static [&'static str] = &["content"];
    type Plan = WipePlan;
    type Outputs = ();

    fn retries(_: usize) -> u32 {
        5
    }
    fn locks(plan: &WipePlan) -> Vec<String> {
        vec![lock(plan.content.volume.volume)]
    }
    fn begin(_: &WipePlan, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    async fn run(cx: &StepContext, plan: &WipePlan, _: &mut (), _: usize) -> Result<()> {
        cx.agent(plan.node)?.volume_rebuild(&cx.mutate(LONG), plan.content.clone()).await
    }
    async fn undo(_: &StepContext, _: &WipePlan, _: &(), _: usize) -> Result<()> {
        Ok(())
    }
    fn commit(plan: &WipePlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        changed(plan.content.volume.volume, engine, tx)
    }
    fn abort(_: &WipePlan, _: &(), _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    fn announce(plan: &WipePlan) -> Vec<(&'static str, String)> {
        vec![("storage-volume-updated", plan.path.clone())]
    }
}

/// Plan of [`VolumeWrite`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WritePlan {
    volume: VolumeRef,
    upload: BackupId,
    offset: u64,
    #[serde(default)]
    image: bool,
    node: NodeId,
    path: String,
}

/// Puts the upload in place, then drops it; neither is undone. When the first step fails to its end the volume is as it was,
/// and the upload goes with the next sweep of its host, if not before.
pub struct VolumeWrite;

#[async_trait]
impl Saga for VolumeWrite {
    const NAME: &'static str = "volume-write";
    const STEPS: &'static [&'static str] = &["content", "drop"];
    type Plan = WritePlan;
    type Outputs = ();

    fn retries(_: usize) -> u32 {
        5
    }
    fn locks(plan: &WritePlan) -> Vec<String> {
        vec![lock(plan.volume.volume), upload_lock(plan.upload)]
    }
    fn begin(_: &WritePlan, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    async fn run(cx: &StepContext, plan: &WritePlan, _: &mut (), step: usize) -> Result<()> {
        let agent = cx.agent(plan.node)?;
        match step {
            0 => {
                let call = WriteCall {
                    volume: plan.volume,
                    staged: plan.upload,
                    offset: plan.offset,
                    image: plan.image,
                };
                agent.volume_write(&cx.mutate(LONG), call).await
            }
            _ => agent.backup_delete(&cx.mutate(CALL), plan.upload).await,
        }
    }
    async fn undo(cx: &StepContext, plan: &WritePlan, _: &(), step: usize) -> Result<()> {
        match step {
            0 => cx.agent(plan.node)?.backup_delete(&cx.mutate(CALL), plan.upload).await,
            _ => Ok(()),
        }
    }
    fn commit(plan: &WritePlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        changed(plan.volume.volume, engine, tx)
    }
    fn abort(_: &WritePlan, _: &(), _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    fn announce(plan: &WritePlan) -> Vec<(&'static str, String)> {
        vec![("storage-volume-updated", plan.path.clone())]
    }
}
