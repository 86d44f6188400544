//! Backups of disks of machines that run: QEMU writes what they were at one moment into other files or devices, or lets others
//! read it over NBD while the guest goes on. Source: QEMU's `docs/interop/bitmaps.rst`, `docs/interop/nbd.txt`, and the schema of
//! `blockdev-backup`, as they are from 7.2 to 10.
//!
//! All disks of a backup, and the checkpoint that is made with it, are of one moment: they begin in one transaction. What is
//! begun is written down and synced before (`backups.json`); a transaction is done or it is not, and the jobs that it has begun
//! are there until they are dismissed: whoever finds the file after a crash sees by them which it was.
//!
//! One that is read by others has a scratch image over each disk, which keeps what the guest overwrites; the export is of that. Its
//! names are those of the disk's other [`Side`], as of a copy, which there is none of meanwhile. A bitmap of what changed since a
//! checkpoint is QEMU's alone and goes with the backup.
//!
//! QEMU listens on a descriptor: it opens nothing, and the socket is root's.

use crate::{
    QemuDriver, bitmaps, copies,
    devices::{Disk, Side},
    launch,
    line::printable,
    machine::{Inner, Machine},
    plug,
    qmp::Qmp,
};
use async_trait::async_trait;
use karst_guest::{
    BackupServer, DiskBackup, DiskBackupPhase, DiskBackupState, DiskBackups, DiskFormat, DiskMark,
    NewCheckpoint, ResolvedDisk, UnmarkedDisk,
};
use karst_model::{CheckpointId, DiskBackupId, Error, ErrorKind, InstanceId, Result, instance::RuntimeState};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    fs::File,
    io::Write,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
    sync::Arc,
    time::Duration,
};
use tokio::time::{Instant, sleep};

const FILE: &str = "backups.json";
const GREETING: Duration = Duration::from_secs(5);
/// Between two looks at a job that is about to end.
const LOOK: Duration = Duration::from_millis(20);
/// How long a job may take to end, once it is broken off, and an empty image to be made.
const END: Duration = Duration::from_secs(60);
/// Connections of those who read, at a time.
const CONNECTIONS: u32 = 100;
/// QEMU's name of the descriptor on which it listens.
const LISTENER: &str = "backup";

/// A backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Running {
    id: DiskBackupId,
    disks: Vec<RunningDisk>,
    /// Others read it.
    served: bool,
    /// It began whole.
    begun: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct RunningDisk {
    /// The device's name, for messages.
    name: String,
    slot: String,
    /// The names of what it is written to.
    side: Side,
    /// The node that has the bitmap of this backup, and the bitmap.
    bitmap: Option<(String, String)>,
}

impl RunningDisk {
    fn job(&self) -> String {
        job_id(&self.slot)
    }
}

/// QEMU's id of the job on a slot.
fn job_id(slot: &str) -> String {
    format!("backup-{slot}")
}

fn read(dir: &Path) -> Result<Option<Running>> {
    karst_guest::record::read(dir, FILE)
}

fn write(dir: &Path, now: &Running) -> Result<()> {
    let new = dir.join("backups.json.new");
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(&serde_json::to_vec(now)?)?;
    file.sync_all()?;
    std::fs::rename(&new, dir.join(FILE))?;
    Ok(File::open(dir)?.sync_all()?)
}

/// It is on disk when this answers.
async fn note(dir: &Path, now: &Running) -> Result<()> {
    let (dir, now) = (dir.to_owned(), now.clone());
    tokio::task::spawn_blocking(move || write(&dir, &now))
        .await
        .map_err(|e| Error::internal("the backup of disks could not be written down", e))?
}

/// Nothing of an earlier run counts.
pub(crate) fn clear(dir: &Path) -> Result<()> {
    for name in [FILE, launch::BACKUP] {
        match std::fs::remove_file(dir.join(name)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
    }
    Ok(())
}

/// A job as QEMU tells of it (`query-jobs`).
#[derive(Debug, Clone, PartialEq, Eq)]
struct Job {
    status: String,
    done: u64,
    total: u64,
    error: Option<String>,
}

impl Job {
    fn of(said: &Value, id: &str) -> Option<Self> {
        let job = said.as_array()?.iter().find(|j| j["id"] == id)?;
        let number = |key: &str| job[key].as_u64().unwrap_or(0);
        Some(Self {
            status: job["status"].as_str().unwrap_or_default().to_owned(),
            done: number("current-progress"),
            total: number("total-progress"),
            error: job["error"].as_str().map(str::to_owned),
        })
    }

    /// It has ended, and waits for somebody to see how.
    fn has_ended(&self) -> bool {
        self.status == "concluded"
    }
}

/// QEMU's reason in words.
fn reason(disk: &str, error: &str) -> String {
    if error.contains("No space left") {
        return format!("there is no space left where disk {disk:?} is backed up");
    }
    format!("disk {disk:?}: {}", printable(error, 300))
}

/// What is to be made of the jobs of a backup that began.
fn state_of(now: &Running, jobs: &Value) -> DiskBackupState {
    let mut state = DiskBackupState { phase: DiskBackupPhase::Done, ..Default::default() };
    for disk in &now.disks {
        let Some(job) = Job::of(jobs, &disk.job()) else {
            state.phase = DiskBackupPhase::Failed { reason: reason(&disk.name, "QEMU has ended it") };
            return state;
        };
        state.done += job.done.min(job.total);
        state.total += job.total;
        match (&job.error, job.has_ended()) {
            (Some(error), true) => {
                state.phase = DiskBackupPhase::Failed { reason: reason(&disk.name, error) };
                return state;
            }
            (None, true) if !now.served => {}
            // Of one that is read nothing ends by itself but what fails.
            (None, true) => {
                state.phase = DiskBackupPhase::Failed { reason: reason(&disk.name, "QEMU has ended it") };
                return state;
            }
            (_, false) => state.phase = DiskBackupPhase::Running,
        }
    }
    state
}

fn busy() -> Error {
    Error::conflict("disks of the guest are being backed up; wait until that has ended, or cancel it")
}

/// The same of what QEMU refused.
fn refused(e: Error, disk: &str) -> Error {
    let said = e.context.clone().unwrap_or_default();
    let at = |e: Error| e.at(format!("devices.{disk}"));
    if said.contains("different size") {
        return at(Error::invalid(
            "disks",
            format!("disk {disk:?} has another size than what it is backed up to"),
        ))
        .with_context(said);
    }
    if said.contains("write\" lock") {
        let text = format!("what disk {disk:?} is to be backed up to is in use by another program");
        return at(Error::conflict(text)).with_context(said);
    }
    e
}

async fn connect(machine: &Inner) -> Result<Qmp> {
    Ok(Qmp::connect(&machine.dir, launch::QMP, GREETING).await?.0)
}

/// Refuses what cannot be done to disks while they are backed up.
pub(crate) async fn demand_none(machine: &Inner) -> Result<()> {
    let Some(now) = read(&machine.dir)? else { return Ok(()) };
    let jobs = connect(machine).await?.execute("query-jobs", json!({})).await?;
    match now.disks.iter().any(|d| Job::of(&jobs, &d.job()).is_some_and(|j| !j.has_ended())) {
        true => Err(busy()),
        false => Ok(()),
    }
}

/// Begins a backup. The caller holds the machine's lock of changes.
async fn begin(machine: &Machine, backup: &DiskBackup) -> Result<()> {
    if let Some(old) = read(&machine.dir)? {
        if old.id != backup.id {
            demand_none(machine).await?;
        } else if old.begun {
            return Ok(());
        }
        let qmp = connect(machine).await?;
        let jobs = qmp.execute("query-jobs", json!({})).await?;
        let began = old.disks.iter().all(|d| Job::of(&jobs, &d.job()).is_some());
        if old.id == backup.id && began {
            // Of a call that was broken off: its moment counts.
            let finished = finish(machine, &qmp, backup, old.clone()).await;
            if finished.is_err() {
                // QEMU serves one connection at a time.
                drop(qmp);
                undo(machine, backup, &old).await;
            }
            return finished;
        }
        end_all(machine, &qmp, &old).await?;
    }
    match machine.now().state {
        RuntimeState::Running | RuntimeState::Paused | RuntimeState::Error => {}
        _ => return Err(Error::conflict("the guest starts or ends; try again")),
    }
    copies::demand_none(machine).await?;
    let qmp = connect(machine).await?;
    let nodes = bitmaps::nodes(&qmp).await?;
    let mut now = Running { id: backup.id, disks: vec![], served: backup.server.is_some(), begun: false };
    for disk in &backup.disks {
        let at = bitmaps::tracked(machine, &qmp, &nodes, &disk.path).await?;
        let side = plug::side(&qmp, &at.disk.slot).await?.other();
        let own = if backup.server.is_some() { disk.bitmap.clone() } else { job_id(&at.disk.slot) };
        now.disks.push(RunningDisk {
            name: at.disk.name.clone(),
            slot: at.disk.slot.clone(),
            side,
            bitmap: (!disk.since.is_empty()).then_some((at.node, own)),
        });
    }
    note(&machine.dir, &now).await?;
    let began = match prepare(machine, &qmp, backup, &now).await {
        Ok(()) => finish(machine, &qmp, backup, now.clone()).await,
        Err(e) => Err(e),
    };
    if began.is_err() {
        // QEMU serves one connection at a time.
        drop(qmp);
        undo(machine, backup, &now).await;
    }
    began
}

/// Takes back what there is of a begin that failed: its transaction may have been done all the same, and a checkpoint of it is
/// nobody's then. What cannot be taken back now is known, and goes with its end.
async fn undo(machine: &Inner, backup: &DiskBackup, now: &Running) {
    let undone = async {
        let qmp = connect(machine).await?;
        end_all(machine, &qmp, now).await?;
        drop(qmp);
        if let Some(checkpoint) = &backup.checkpoint {
            bitmaps::unmark(machine, checkpoint.id, &unmarked(checkpoint)).await?;
        }
        clear(&machine.dir)
    };
    if let Err(e) = undone.await {
        tracing::warn!(backup = %now.id, error = %e, context = e.context, "what is left of a backup could not be taken from QEMU; cancel it");
    }
}

fn unmarked(checkpoint: &NewCheckpoint) -> Vec<UnmarkedDisk> {
    let one =
        |d: &karst_guest::MarkedDisk| UnmarkedDisk { path: d.path.clone(), parent: d.before, last: true };
    checkpoint.disks.iter().map(one).collect()
}

/// Makes ready what the disks are backed up to, and begins at one moment.
async fn prepare(machine: &Inner, qmp: &Qmp, backup: &DiskBackup, now: &Running) -> Result<()> {
    // Nobody knows of what there may be; whoever begins has seen to what is written down.
    for disk in &now.disks {
        plug::clear_side(qmp, &disk.slot, disk.side).await?;
    }
    let nodes = bitmaps::nodes(qmp).await?;
    let with: Vec<CheckpointId> =
        backup.known.iter().copied().chain(backup.checkpoint.as_ref().map(|c| c.id)).collect();
    bitmaps::transact(qmp, bitmaps::sweep(machine, qmp, &nodes, &with).await?).await?;
    let nodes = bitmaps::nodes(qmp).await?;
    // Before anything is made: a disk that cannot be in it says so at once.
    let mut actions = vec![];
    if let Some(checkpoint) = &backup.checkpoint {
        bitmaps::remember(&machine.dir)?;
        actions.extend(bitmaps::plan(machine, qmp, &nodes, checkpoint).await?);
    }
    let mut gathered = vec![];
    for (disk, running) in backup.disks.iter().zip(&now.disks) {
        let at = bitmaps::tracked(machine, qmp, &nodes, &disk.path).await?;
        if let Some((node, bitmap)) = &running.bitmap {
            // Of a backup that ended without anybody's seeing to it.
            if at.bitmaps.iter().any(|b| b.name == *bitmap) {
                qmp.execute("block-dirty-bitmap-remove", json!({"node": node, "name": bitmap})).await?;
            }
            gathered.extend(at.gather(bitmap, &disk.since)?);
        }
        let size = virtual_size(&nodes, &at.node)?;
        let made = match now.served {
            true => scratch(qmp, &at.disk, &disk.to, running.side, &at.node, size).await,
            false => target(qmp, &at.disk, &disk.to, running.side, size).await,
        };
        let to = made.map_err(|e| refused(e, &at.disk.name))?;
        let mut job = json!({
            "job-id": running.job(),
            "device": at.node,
            "target": to,
            "filter-node-name": running.side.other().filter(&running.slot),
            "sync": "full",
            "on-source-error": "report",
            "on-target-error": "report",
            // How it ended is kept until somebody has seen it.
            "auto-dismiss": false,
        });
        match (&running.bitmap, now.served) {
            (_, true) => job["sync"] = "none".into(),
            (Some((_, bitmap)), false) => {
                job["sync"] = "bitmap".into();
                job["bitmap"] = bitmap.as_str().into();
                job["bitmap-mode"] = "never".into();
            }
            (None, false) => {}
        }
        gathered.push(json!({"type": "blockdev-backup", "data": job}));
    }
    // QEMU does one after the other, and between two of them a guest may get to write. First the new checkpoint, so that what is
    // written from then on is in it, and in no case in neither; then what changed before is gathered.
    let (merges, jobs): (Vec<Value>, Vec<Value>) =
        gathered.into_iter().partition(|a| a["type"] != "blockdev-backup");
    bitmaps::transact(qmp, [actions, merges, jobs].concat()).await
}

fn virtual_size(nodes: &Value, node: &str) -> Result<u64> {
    let found = nodes.as_array().into_iter().flatten().find(|n| n["node-name"] == node);
    let size = found.and_then(|n| n["image"]["virtual-size"].as_u64());
    size.ok_or_else(|| Error::internal("the size of the guest's disk is not known", node))
}

/// What a disk is written to, by the names of `side`; answers its node.
async fn target(qmp: &Qmp, disk: &ResolvedDisk, to: &Path, side: Side, size: u64) -> Result<String> {
    let to = at_path(disk, to);
    let mut bare = Disk { side, ..Disk::new(&to, false, true) };
    bare.limits = Default::default();
    qmp.execute("object-add", bare.group()).await?;
    let node = plug::add_nodes(qmp, &to, side).await?;
    let nodes = bitmaps::nodes(qmp).await?;
    let has = virtual_size(&nodes, &node.top())?;
    if has != size {
        let text = format!(
            "what disk {:?} is backed up to has another size than the disk; make it of exactly the same",
            disk.name
        );
        return Err(Error::invalid("disks", text).with_context(format!("{size} and {has} bytes")));
    }
    Ok(node.top())
}

/// What keeps the old content of a disk, over the disk: an empty image, by the names of `side`; answers its node.
async fn scratch(
    qmp: &Qmp,
    disk: &ResolvedDisk,
    to: &Path,
    side: Side,
    below: &str,
    size: u64,
) -> Result<String> {
    let to = at_path(disk, to);
    let opened = tokio::task::spawn_blocking({
        let to = to.clone();
        move || launch::open_disk(&to)
    });
    let (file, _, block) =
        opened.await.map_err(|e| Error::internal("the scratch image could not be opened", e))??;
    let node = Disk { side, ..Disk::new(&to, block, true) };
    let set = json!({"fdset-id": node.fd_sets()?.0, "opaque": "scratch"});
    qmp.execute_with_fd("add-fd", set, file.as_fd()).await?;
    let lowest = node.nodes()?.into_iter().next();
    let lowest = lowest.ok_or_else(|| Error::internal("a disk without nodes", &disk.slot))?;
    qmp.execute("blockdev-add", lowest).await?;
    let below_it = side.name('f', &disk.slot);
    let create = format!("create-{}", disk.slot);
    let options = json!({"driver": "qcow2", "file": below_it, "size": size});
    qmp.execute("blockdev-create", json!({"job-id": create, "options": options})).await?;
    let made = ended(qmp, &create).await?;
    qmp.execute("job-dismiss", json!({"id": create})).await?;
    if let Some(error) = made.error {
        return Err(Error::conflict(reason(&disk.name, &error)).with_context(error));
    }
    let image = json!({
        "driver": "qcow2", "node-name": side.name('i', &disk.slot), "file": below_it, "backing": below,
        "discard": "unmap",
    });
    qmp.execute("blockdev-add", image).await?;
    Ok(side.name('i', &disk.slot))
}

/// A disk of its own at that place.
fn at_path(disk: &ResolvedDisk, to: &Path) -> ResolvedDisk {
    {
        let chain = Default::default();
        ResolvedDisk { path: to.to_owned(), format: DiskFormat::Raw, backing: None, chain, ..disk.clone() }
    }
}

/// Waits until a job has ended.
async fn ended(qmp: &Qmp, id: &str) -> Result<Job> {
    let until = Instant::now() + END;
    loop {
        let jobs = qmp.execute("query-jobs", json!({})).await?;
        let job = Job::of(&jobs, id).ok_or_else(|| Error::conflict("the backup has ended already"))?;
        if job.has_ended() {
            return Ok(job);
        }
        if Instant::now() >= until {
            return Err(Error::timeout(format!(
                "the backup of the disk does not come to its end within {END:?}"
            )));
        }
        sleep(LOOK).await;
    }
}

/// What comes after the moment: who reads it can do so from now on.
async fn finish(machine: &Inner, qmp: &Qmp, backup: &DiskBackup, mut now: Running) -> Result<()> {
    if let Some(server) = backup.server {
        serve(machine, qmp, backup, &now, server).await?;
    }
    now.begun = true;
    note(&machine.dir, &now).await
}

fn listen(dir: &Path, server: BackupServer) -> Result<OwnedFd> {
    match server {
        BackupServer::Unix => launch::listen(dir, launch::BACKUP),
        BackupServer::Tcp(address) => {
            let bound = std::net::TcpListener::bind(address);
            let taken = |e: std::io::Error| match e.kind() {
                std::io::ErrorKind::AddrInUse => {
                    Error::conflict(format!("{address} is in use on this host; choose another port"))
                        .at("server.port")
                }
                std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::AddrNotAvailable => {
                    Error::invalid("server", format!("nobody can listen at {address} on this host"))
                        .with_context(e)
                }
                _ => e.into(),
            };
            Ok(bound.map_err(taken)?.into())
        }
    }
}

async fn serve(
    machine: &Inner,
    qmp: &Qmp,
    backup: &DiskBackup,
    now: &Running,
    server: BackupServer,
) -> Result<()> {
    // Of a call that was broken off.
    stop_serving(qmp).await?;
    let listener = tokio::task::spawn_blocking({
        let dir = machine.dir.clone();
        move || listen(&dir, server)
    });
    let listener =
        listener.await.map_err(|e| Error::internal("the socket of the backup could not be made", e))??;
    qmp.execute_with_fd("getfd", json!({"fdname": LISTENER}), listener.as_fd()).await?;
    let address = json!({"type": "fd", "data": {"str": LISTENER}});
    // QEMU before 9.1 sets no bound itself.
    qmp.execute("nbd-server-start", json!({"addr": address, "max-connections": CONNECTIONS})).await?;
    for (disk, running) in backup.disks.iter().zip(&now.disks) {
        let mut export = json!({
            "type": "nbd", "id": running.job(), "node-name": running.side.name('i', &running.slot),
            "name": disk.export, "writable": false,
        });
        if let Some((_, bitmap)) = &running.bitmap {
            // Found in the scratch image's backing node, which is the disk.
            export["bitmaps"] = json!([bitmap]);
        }
        qmp.execute("block-export-add", export).await?;
    }
    Ok(())
}

/// Nobody reads any more; fine when nobody did.
async fn stop_serving(qmp: &Qmp) -> Result<()> {
    match qmp.execute("nbd-server-stop", json!({})).await {
        Err(e) if e.is(ErrorKind::Internal) => Ok(()), // there was none
        other => other.map(drop),
    }
}

/// Takes a backup from QEMU, however far it is.
async fn end_all(machine: &Inner, qmp: &Qmp, now: &Running) -> Result<()> {
    if now.served {
        stop_serving(qmp).await?;
    }
    let jobs = qmp.execute("query-jobs", json!({})).await?;
    let there = |id: &str| Job::of(&jobs, id);
    let ids = now.disks.iter().flat_map(|d| [d.job(), format!("create-{}", d.slot)]);
    let all: Vec<_> = ids.filter_map(|id| there(&id).map(|job| (id, job))).collect();
    for (id, _) in all.iter().filter(|(_, job)| !job.has_ended()) {
        match qmp.execute("job-cancel", json!({"id": id})).await {
            // It has ended just now.
            Err(e) if e.is(ErrorKind::Internal) => {}
            other => drop(other?),
        }
    }
    for (id, _) in &all {
        ended(qmp, id).await?;
        qmp.execute("job-dismiss", json!({"id": id})).await?;
    }
    let nodes = bitmaps::nodes(qmp).await?;
    for disk in &now.disks {
        plug::clear_side(qmp, &disk.slot, disk.side).await?;
        if let Some((node, bitmap)) = &disk.bitmap
            && bitmaps::of(&nodes, node).iter().any(|b| b.name == *bitmap)
        {
            qmp.execute("block-dirty-bitmap-remove", json!({"node": node, "name": bitmap})).await?;
        }
    }
    match std::fs::remove_file(machine.dir.join(launch::BACKUP)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

/// How far a backup is. `machine` is that which runs in `dir`, if one does.
async fn state(dir: &Path, machine: Option<&Machine>, id: DiskBackupId) -> Result<DiskBackupState> {
    let (Some(now), Some(machine)) = (read(dir)?.filter(|now| now.id == id), machine) else {
        return Ok(DiskBackupState::default());
    };
    let jobs = connect(machine).await?.execute("query-jobs", json!({})).await?;
    if !now.begun && now.disks.iter().any(|d| Job::of(&jobs, &d.job()).is_none()) {
        return Ok(DiskBackupState::default());
    }
    let mut state = state_of(&now, &jobs);
    let socket = dir.join(launch::BACKUP);
    if now.served && socket.exists() {
        state.socket = Some(socket.display().to_string());
    }
    Ok(state)
}

/// Ends one. The caller holds the machine's lock of changes.
async fn end(dir: &Path, machine: Option<&Machine>, id: DiskBackupId) -> Result<()> {
    let Some(now) = read(dir)?.filter(|now| now.id == id) else { return Ok(()) };
    if let Some(machine) = machine {
        end_all(machine, &connect(machine).await?, &now).await?;
    }
    clear(dir)
}

impl QemuDriver {
    /// The machine if it runs.
    async fn if_running(&self, instance: InstanceId) -> Result<Option<Arc<Machine>>> {
        match self.shared.machine(instance).await {
            Err(e) if e.is(ErrorKind::NotFound) => Ok(None),
            other => other.map(Some),
        }
    }
}

#[async_trait]
impl DiskBackups for QemuDriver {
    async fn mark(
        &self,
        instance: InstanceId,
        checkpoint: NewCheckpoint,
        known: Vec<CheckpointId>,
    ) -> Result<()> {
        let machine = self.shared.machine(instance).await?;
        let slot = self.shared.slot(instance);
        let _changing = slot.changing.lock().await;
        copies::demand_none(&machine).await?;
        demand_none(&machine).await?;
        bitmaps::mark(&machine, &checkpoint, &known).await
    }

    async fn unmark(&self, instance: InstanceId, id: CheckpointId, disks: Vec<UnmarkedDisk>) -> Result<()> {
        let Some(machine) = self.if_running(instance).await? else {
            // The newest leaves a gap that is seen; one between others would leave one that is not.
            return match disks.iter().any(|d| d.parent.is_some() && !d.last) {
                true => {
                    Err(Error::conflict("the guest is not running: what the checkpoint has cannot be merged"))
                }
                false => Ok(()),
            };
        };
        let slot = self.shared.slot(instance);
        let _changing = slot.changing.lock().await;
        demand_none(&machine).await?;
        bitmaps::unmark(&machine, id, &disks).await
    }

    async fn marks(&self, instance: InstanceId) -> Result<Vec<DiskMark>> {
        bitmaps::marks(&*self.shared.machine(instance).await?).await
    }

    async fn begin(&self, instance: InstanceId, backup: DiskBackup) -> Result<()> {
        let machine = self.shared.machine(instance).await?;
        let slot = self.shared.slot(instance);
        let _changing = slot.changing.lock().await;
        begin(&machine, &backup).await
    }

    async fn state(&self, instance: InstanceId, id: DiskBackupId) -> Result<DiskBackupState> {
        let machine = self.if_running(instance).await?;
        state(&self.shared.dir(instance), machine.as_deref(), id).await
    }

    async fn end(&self, instance: InstanceId, id: DiskBackupId) -> Result<()> {
        let machine = self.if_running(instance).await?;
        let (slot, dir) = (self.shared.slot(instance), self.shared.dir(instance));
        let _changing = slot.changing.lock().await;
        end(&dir, machine.as_deref(), id).await
    }
}

#[cfg(test)]
mod tests;
