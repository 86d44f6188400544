//! Copies of disks of machines that run: QEMU mirrors a disk into another file or device, and the machine goes on from the copy
//! (a pivot), or stays where it is. Source: QEMU's `docs/interop/live-block-operations.rst` and the schema of
//! `blockdev-mirror`, as they are from 7.2 to 10.
//!
//! What QEMU does decides. What it can tell nobody once it has ended is written down and synced (`copies.json`): that a copy
//! was begun, that the machine stands still for the end of one, and that it goes on from it.
//!
//! A machine stands still while it changes over. So nothing is written between the moment in which disk and copy are the same
//! and the moment in which it is on disk which of the two counts; and whatever ends the machine or the host's process in
//! between, nothing is lost by taking the disk.
//!
//! The copy has the other [`Side`]'s names of the disk's slot, and limits of its own: none while it is made, because they would
//! be taken from what the guest may use; those of the disk before the machine goes on from it.

use crate::{
    QemuDriver, backups,
    devices::{Disk, Side},
    driver::Slot,
    launch,
    line::printable,
    machine::{Ask, Inner, Machine},
    plug,
    qmp::Qmp,
};
use async_trait::async_trait;
use karst_guest::{DiskCopies, DiskCopy, DiskCopyEnd, DiskCopyPhase, DiskCopyState, ResolvedDisk};
use karst_model::{Error, ErrorKind, InstanceId, Result, VolumeId, instance::RuntimeState};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    fs::File,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::oneshot,
    time::{Instant, sleep},
};

const FILE: &str = "copies.json";
const GREETING: Duration = Duration::from_secs(5);
/// Between two looks at a job that is about to end.
const LOOK: Duration = Duration::from_millis(20);
/// How long a machine stands still for the end of a copy, at most.
const STILL: Duration = Duration::from_secs(30);
/// How long a copy that is broken off may take to end.
const BREAK: Duration = Duration::from_secs(60);

/// A copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Copying {
    /// What it is called.
    to: VolumeId,
    slot: String,
    /// The copy's names.
    side: Side,
    /// The disk as it is when the machine goes on from the copy.
    disk: ResolvedDisk,
    stage: Stage,
    /// The machine stands still for the end, and is to run again.
    resume: bool,
    /// It is no copy: files of the disk are made one, and `to` is the disk's own volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    merge: Option<merges::Merging>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Stage {
    Copying,
    /// The machine is to go on from it.
    Pivoting,
    /// It does.
    Pivoted,
}

pub(crate) mod merges;

fn read(dir: &Path) -> Result<Vec<Copying>> {
    Ok(karst_guest::record::read(dir, FILE)?.unwrap_or_default())
}

fn write(dir: &Path, all: &[Copying]) -> Result<()> {
    if all.is_empty() {
        return clear(dir);
    }
    let new = dir.join("copies.json.new");
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(&serde_json::to_vec(all)?)?;
    file.sync_all()?;
    std::fs::rename(&new, dir.join(FILE))?;
    Ok(File::open(dir)?.sync_all()?)
}

/// Nothing of an earlier run counts.
pub(crate) fn clear(dir: &Path) -> Result<()> {
    match std::fs::remove_file(dir.join(FILE)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

/// Changes what is written down; it is on disk when this answers.
async fn note(dir: &Path, change: impl FnOnce(&mut Vec<Copying>) + Send + 'static) -> Result<()> {
    let dir = dir.to_owned();
    let work = move || {
        let mut all = read(&dir)?;
        change(&mut all);
        write(&dir, &all)
    };
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Error::internal("the copy of a disk could not be written down", e))?
}

async fn put(dir: &Path, entry: &Copying) -> Result<()> {
    let entry = entry.clone();
    note(dir, move |all| {
        all.retain(|c| c.to != entry.to);
        all.push(entry);
    })
    .await
}

async fn remove(dir: &Path, to: VolumeId) -> Result<()> {
    note(dir, move |all| all.retain(|c| c.to != to)).await
}

fn find(dir: &Path, to: VolumeId) -> Result<Option<Copying>> {
    Ok(read(dir)?.into_iter().find(|c| c.to == to))
}

/// A job as QEMU tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Job {
    status: String,
    ready: bool,
    done: u64,
    total: u64,
    speed: u64,
    error: Option<String>,
}

impl Job {
    fn of(said: &Value, slot: &str) -> Option<Self> {
        let id = id(slot);
        let job = said.as_array()?.iter().find(|j| j.get("device").and_then(Value::as_str) == Some(&*id))?;
        let number = |key: &str| job.get(key).and_then(Value::as_u64).unwrap_or(0);
        let text = |key: &str| job.get(key).and_then(Value::as_str).map(str::to_owned);
        Some(Self {
            status: text("status").unwrap_or_default(),
            ready: job.get("ready").and_then(Value::as_bool).unwrap_or(false),
            done: number("offset"),
            total: number("len"),
            speed: number("speed"),
            error: text("error"),
        })
    }

    /// It has ended, and waits for somebody to see how.
    fn has_ended(&self) -> bool {
        self.status == "concluded"
    }

    fn state(&self) -> DiskCopyState {
        let phase = match &self.error {
            Some(error) if self.has_ended() => DiskCopyPhase::Failed { reason: reason(error) },
            // One that ended well is one whose end was broken off before it was seen to.
            _ if self.has_ended() || self.ready => DiskCopyPhase::Ready,
            _ => DiskCopyPhase::Copying,
        };
        DiskCopyState { phase, done: self.done.min(self.total), total: self.total, speed: self.speed }
    }
}

/// QEMU's id of the job on a slot.
fn id(slot: &str) -> String {
    format!("copy-{slot}")
}

/// QEMU's reason in words.
fn reason(error: &str) -> String {
    if error.contains("No space left") {
        return "there is no space left where the copy is made".into();
    }
    printable(error, 300)
}

fn other_size() -> Error {
    Error::invalid("to", "the copy has another size than the disk; make it of exactly the same")
}

/// The same of what it refused.
fn refused(e: Error) -> Error {
    let said = e.context.clone().unwrap_or_default();
    if said.contains("different sizes") {
        return other_size().with_context(said);
    }
    if said.contains("write\" lock") {
        return Error::conflict("what the disk is to be copied to is in use by another program")
            .with_context(said);
    }
    e
}

fn gone() -> Error {
    Error::conflict("the disk is not being copied, or not any more; begin again")
}

fn over() -> Error {
    Error::conflict("the guest goes on from the copy of its disk already")
}

fn early() -> Error {
    Error::conflict("the copy of the disk is not complete yet; wait until it is ready")
}

fn failed(error: &str) -> Error {
    Error::conflict(format!("the disk could not be copied: {}", reason(error))).with_context(error)
}

/// One command. The connection is not kept: others wait for it meanwhile, the machine's owner too.
async fn execute(machine: &Inner, command: &str, arguments: Value) -> Result<Value> {
    let (qmp, _) = Qmp::connect(&machine.dir, launch::QMP, GREETING).await?;
    qmp.execute(command, arguments).await
}

async fn job(machine: &Inner, slot: &str) -> Result<Option<Job>> {
    Ok(Job::of(&execute(machine, "query-block-jobs", json!({})).await?, slot))
}

/// The side that a disk's device drives.
async fn side(machine: &Inner, slot: &str) -> Result<Side> {
    let blocks = execute(machine, "query-block", json!({})).await?;
    Side::of(&blocks, slot).ok_or_else(|| Error::internal("the guest's disk is not known to QEMU", slot))
}

/// Refuses what cannot be done to disks while one is copied.
pub(crate) async fn demand_none(machine: &Inner) -> Result<()> {
    for entry in read(&machine.dir)?.into_iter().filter(|c| c.stage != Stage::Pivoted) {
        if job(machine, &entry.slot).await?.is_some_and(|j| !j.has_ended()) {
            let name = &entry.disk.name;
            return Err(Error::conflict(format!(
                "the disk {name:?} of the guest is being copied; wait until that has ended, or cancel it"
            ))
            .at(format!("devices.{name}")));
        }
    }
    Ok(())
}

/// Begins a copy. The caller holds the machine's lock of changes.
///
/// # Errors
/// Not found without such a disk, conflict while it is copied or the machine ends, unsupported for a disc, invalid for a
/// copy of another size.
pub(crate) async fn begin(machine: &Machine, copy: DiskCopy) -> Result<()> {
    let _turn = machine.copying.lock().await;
    let disk = {
        let record = machine.record();
        let mut disks = record.devices.iter().flat_map(|d| &d.disks);
        disks.find(|d| d.path == copy.from || d.path == copy.path).cloned()
    };
    let disk = disk.ok_or_else(|| Error::not_found("the guest has no such disk"))?;
    let slot = disk.slot.clone();
    for old in read(&machine.dir)?.into_iter().filter(|c| c.slot == slot) {
        let there = job(machine, &slot).await?.is_some();
        match (old.to == copy.to, old.stage) {
            // Of an earlier call.
            (true, Stage::Pivoting | Stage::Pivoted) => return Ok(()),
            (true, Stage::Copying) if there => return Ok(()),
            (false, Stage::Copying | Stage::Pivoting) if there => {
                return Err(Error::conflict("the disk is being copied elsewhere; wait until that has ended"));
            }
            _ => remove(&machine.dir, old.to).await?,
        }
    }
    match machine.now().state {
        RuntimeState::Running | RuntimeState::Paused | RuntimeState::Error => {}
        _ => return Err(Error::conflict("the guest starts or ends; try again")),
    }
    if disk.path == copy.path {
        return Err(Error::invalid("to", "the disk is there already"));
    }
    backups::demand_none(machine).await?;
    if disk.cdrom || disk.readonly {
        return Err(Error::unsupported("a disk that is only read is copied as a volume, not by its guest"));
    }
    if disk.io.secret.is_some() {
        return Err(Error::unsupported(
            "an encrypted disk is copied while its guest does not run, as a volume: QEMU would write what it decrypted",
        ));
    }
    if !disk.chain.below.is_empty() {
        let text = "the disk has layers, which do not go along; merge them first (blockcommit or blockpull)";
        return Err(Error::conflict(text));
    }
    if disk.shared {
        return Err(Error::unsupported(
            "a disk that other machines may write is copied while none of those that have it runs",
        ));
    }
    let side = side(machine, &slot).await?.other();
    let (path, chain) = (copy.path, Default::default());
    let disk = ResolvedDisk { path, format: copy.format, backing: copy.backing, chain, ..disk };
    let entry = Copying { to: copy.to, slot, side, disk, stage: Stage::Copying, resume: false, merge: None };
    put(&machine.dir, &entry).await?;
    let began = start(machine, &entry, copy.speed, copy.synchronous).await;
    if let Err(e) = began {
        match take_back(machine, &entry.slot, side).await {
            Ok(()) => remove(&machine.dir, entry.to).await?,
            // What QEMU did all the same is not forgotten: it is told of, and a cancel ends it.
            Err(e) => {
                tracing::warn!(slot = %entry.slot, error = %e, context = e.context, "what is left of a copy could not be taken from QEMU; cancel the copy");
            }
        }
        return Err(refused(e));
    }
    Ok(())
}

/// Takes from QEMU what it has done of a begin: also the job, of one that it did later than it was waited for.
async fn take_back(machine: &Inner, slot: &str, side: Side) -> Result<()> {
    stop(machine, slot, false).await?;
    sweep(machine, slot, side).await
}

async fn start(machine: &Inner, entry: &Copying, speed: u64, synchronous: bool) -> Result<()> {
    let (slot, side) = (&entry.slot, entry.side);
    // Nobody knows of one that there may be: whoever begins has seen to those that are written down.
    take_back(machine, slot, side).await?;
    let (qmp, _) = Qmp::connect(&machine.dir, launch::QMP, GREETING).await?;
    let mut bare = Disk { side, ..Disk::new(&entry.disk, false, true) };
    bare.limits = Default::default();
    qmp.execute("object-add", bare.group()).await?;
    plug::add_nodes(&qmp, &entry.disk, side).await?;
    // QEMU would grow a file that is too small, and leave the rest of one that is too large as it is.
    let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true})).await?;
    let size = |name: &str| {
        let node = nodes.as_array()?.iter().find(|node| node["node-name"] == name)?;
        node["image"]["virtual-size"].as_u64()
    };
    let (from, to) = (size(&side.other().name('d', slot)), size(&side.name('d', slot)));
    if from.is_none() || from != to {
        return Err(other_size().with_context(format!("{from:?} and {to:?} bytes")));
    }
    let mirror = json!({
        "job-id": id(slot),
        "device": side.other().name('d', slot),
        "target": side.name('d', slot),
        "filter-node-name": side.other().filter(slot),
        "sync": "full",
        "speed": speed,
        "copy-mode": if synchronous { "write-blocking" } else { "background" },
        "on-source-error": "report",
        "on-target-error": "report",
        // How it ended is kept until somebody has seen it.
        "auto-dismiss": false,
    });
    qmp.execute("blockdev-mirror", mirror).await.map(drop)
}

/// Lets QEMU forget a job on a slot that has ended.
async fn dismiss(qmp: &Qmp, slot: &str) -> Result<()> {
    let jobs = qmp.execute("query-block-jobs", json!({})).await?;
    if Job::of(&jobs, slot).is_some_and(|j| j.has_ended()) {
        qmp.execute("job-dismiss", json!({"id": id(slot)})).await?;
    }
    Ok(())
}

/// Takes what a machine does not drive from QEMU.
async fn sweep(machine: &Inner, slot: &str, side: Side) -> Result<()> {
    let (qmp, _) = Qmp::connect(&machine.dir, launch::QMP, GREETING).await?;
    dismiss(&qmp, slot).await?;
    plug::clear_side(&qmp, slot, side).await
}

/// How far a copy is. `machine` is that which runs in `dir`, if one does.
pub(crate) async fn state(dir: &Path, machine: Option<&Machine>, to: VolumeId) -> Result<DiskCopyState> {
    let Some(entry) = find(dir, to)? else { return Ok(DiskCopyState::default()) };
    if entry.stage == Stage::Pivoted {
        return Ok(DiskCopyState { phase: DiskCopyPhase::Pivoted, ..Default::default() });
    }
    let Some(machine) = machine else { return Ok(DiskCopyState::default()) };
    let job = job(machine, &entry.slot).await?;
    // Its end was broken off, or could not be written down: nothing leads back all the same.
    if has_gone_over(machine, &entry).await? {
        return Ok(DiskCopyState { phase: DiskCopyPhase::Pivoted, ..Default::default() });
    }
    Ok(job.map(|j| j.state()).unwrap_or_default())
}

/// Sets how fast it may be.
///
/// # Errors
/// Conflict when there is none.
pub(crate) async fn set_speed(machine: &Machine, to: VolumeId, speed: u64) -> Result<()> {
    let entry = find(&machine.dir, to)?.filter(|c| c.stage == Stage::Copying).ok_or_else(gone)?;
    if job(machine, &entry.slot).await?.is_none_or(|j| j.has_ended()) {
        return Err(gone());
    }
    let speed = json!({"device": id(&entry.slot), "speed": speed});
    execute(machine, "block-job-set-speed", speed).await.map(drop)
}

/// Ends a copy. `machine` is that which runs in `dir`, if one does.
///
/// # Errors
/// As [`karst_guest::DiskCopies::end`] says.
pub(crate) async fn end(dir: &Path, machine: Option<&Machine>, to: VolumeId, how: DiskCopyEnd) -> Result<()> {
    let _turn = match machine {
        Some(machine) => Some(machine.copying.lock().await),
        None => None,
    };
    let Some(entry) = find(dir, to)? else {
        // The others have been done before.
        return if how == DiskCopyEnd::Pivot { Err(gone()) } else { Ok(()) };
    };
    match (how, machine) {
        (DiskCopyEnd::Pivot, Some(machine)) => pivot(machine, entry).await,
        (DiskCopyEnd::Pivot, None) if entry.stage == Stage::Pivoted => Ok(()),
        (DiskCopyEnd::Pivot | DiskCopyEnd::Finish, None) => Err(gone()),
        _ if entry.stage == Stage::Pivoted => Err(over()),
        (DiskCopyEnd::Cancel, None) => remove(dir, to).await,
        (DiskCopyEnd::Finish | DiskCopyEnd::Cancel, Some(machine)) => {
            leave(machine, entry, how == DiskCopyEnd::Finish).await
        }
    }
}

/// Ends a copy, and once that has begun brings it to its end whoever waits for it: a machine stands still meanwhile, and would
/// until control is back when control goes.
async fn end_for_good(
    slot: Arc<Slot>,
    dir: PathBuf,
    machine: Option<Arc<Machine>>,
    to: VolumeId,
    how: DiskCopyEnd,
) -> Result<()> {
    let (answer, waits) = oneshot::channel();
    tokio::spawn(async move {
        let _changing = slot.changing.lock().await;
        // Of whoever has gone away before it began nothing is wanted any more.
        if !answer.is_closed() {
            let _ = answer.send(end(&dir, machine.as_deref(), to, how).await);
        }
    });
    waits.await.map_err(|e| Error::internal("the end of the copy broke off", e))?
}

async fn demand_ready(machine: &Inner, slot: &str) -> Result<()> {
    let job = job(machine, slot).await?.ok_or_else(gone)?;
    match job.state().phase {
        DiskCopyPhase::Ready => Ok(()),
        DiskCopyPhase::Failed { .. } => Err(failed(job.error.as_deref().unwrap_or_default())),
        _ => Err(early()),
    }
}

/// Lets the machine stand still. What is to be done after that is written down before.
async fn pause(machine: &Machine, entry: &mut Copying, stage: Stage) -> Result<()> {
    let state = machine.now().state;
    match state {
        // One that a full disk halted stands still, and tries again what failed when it goes on.
        RuntimeState::Running | RuntimeState::Error => entry.resume = true,
        RuntimeState::Paused => {}
        _ => return Err(Error::conflict("the guest is shutting down; wait, or force it to stop")),
    }
    entry.stage = stage;
    put(&machine.dir, entry).await?;
    if state == RuntimeState::Running {
        machine.ask(Ask::Pause).await?;
    }
    Ok(())
}

/// Lets it run again, if it ran before.
async fn go_on(machine: &Machine, entry: &mut Copying) -> Result<()> {
    if entry.resume {
        match machine.ask(Ask::Resume).await {
            Err(e) if e.is(ErrorKind::NotFound) => {} // it has ended meanwhile
            other => other?,
        }
        entry.resume = false;
    }
    put(&machine.dir, entry).await
}

/// Waits until the job on a slot has ended.
async fn ended(machine: &Inner, slot: &str, limit: Duration) -> Result<Job> {
    let until = Instant::now() + limit;
    loop {
        let job = job(machine, slot).await?.ok_or_else(gone)?;
        if job.has_ended() {
            return Ok(job);
        }
        if Instant::now() >= until {
            return Err(Error::timeout(format!(
                "the copy of the disk does not come to its end within {limit:?}"
            )));
        }
        sleep(LOOK).await;
    }
}

/// Lets the machine go on from the copy. Done again, it goes on where it was broken off. The caller holds `copying`.
async fn pivot(machine: &Machine, mut entry: Copying) -> Result<()> {
    if entry.stage == Stage::Copying {
        demand_ready(machine, &entry.slot).await?;
    }
    if entry.stage != Stage::Pivoted {
        // One that was broken off may have asked.
        let mut asked = entry.stage == Stage::Pivoting;
        let changed = match pause(machine, &mut entry, Stage::Pivoting).await {
            Ok(()) => change_over(machine, &entry, &mut asked).await,
            Err(e) => Err(e),
        };
        if let Err(e) = changed {
            // It runs on only from where it certainly is and stays; else it stands still until this is done again.
            if stays(machine, &entry, asked).await {
                entry.stage = Stage::Copying;
                go_on(machine, &mut entry).await?;
            }
            return Err(e);
        }
        entry.stage = Stage::Pivoted;
        put(&machine.dir, &entry).await?;
    }
    go_on(machine, &mut entry).await?;
    let swept = match &entry.merge {
        Some(merging) => merges::sweep(machine, &entry, merging).await,
        None => sweep(machine, &entry.slot, entry.side.other()).await,
    };
    if let Err(e) = swept {
        // As at the beginning; until then QEMU has the old disk open.
        tracing::warn!(slot = %entry.slot, error = %e, context = e.context, "what a guest has left could not be taken from QEMU");
    }
    Ok(())
}

/// Has a change-over that was broken off come to its end? Nothing leads back then, even if it is not written down yet.
async fn has_gone_over(machine: &Inner, entry: &Copying) -> Result<bool> {
    if let Some(merging) = &entry.merge {
        return merges::has_gone_over(machine, entry, merging).await;
    }
    Ok(entry.stage == Stage::Pivoting && side(machine, &entry.slot).await? == entry.side)
}

/// Is the machine certainly where it was, with no change-over to come that was `asked` for?
async fn stays(machine: &Inner, entry: &Copying, asked: bool) -> bool {
    let settled =
        !asked || job(machine, &entry.slot).await.is_ok_and(|job| job.is_none_or(|j| j.has_ended()));
    // In this order: a job that has ended changes nothing any more.
    if entry.merge.is_some() {
        return settled && has_gone_over(machine, entry).await.is_ok_and(|over| !over);
    }
    settled && side(machine, &entry.slot).await.is_ok_and(|now| now != entry.side)
}

/// The machine stands still: its device gets the copy, and the record and the limits follow. Notes when the change-over is
/// `asked` for: from then on QEMU may do it at any time.
async fn change_over(machine: &Inner, entry: &Copying, asked: &mut bool) -> Result<()> {
    if entry.merge.is_some() {
        return merges::change_over(machine, entry, asked).await;
    }
    let slot = &entry.slot;
    if side(machine, slot).await? != entry.side {
        if !job(machine, slot).await?.ok_or_else(gone)?.has_ended() {
            let told = execute(machine, "job-complete", json!({"id": id(slot)})).await;
            // Of what QEMU refuses nothing comes; of what it does not answer something may.
            *asked |= !told.as_ref().is_err_and(|e| e.is(ErrorKind::Internal));
            told?;
        }
        let job = match ended(machine, slot, STILL).await {
            Err(e) if e.is(ErrorKind::Timeout) => {
                // Nothing may change over by itself later, when the machine runs.
                execute(machine, "job-cancel", json!({"id": id(slot)})).await?;
                ended(machine, slot, BREAK).await?
            }
            other => other?,
        };
        if side(machine, slot).await? != entry.side {
            return Err(failed(job.error.as_deref().unwrap_or("it was broken off")));
        }
    }
    let limits = {
        let mut record = machine.record();
        let was = record.root.clone();
        let Some(devices) = &mut record.devices else {
            return Err(Error::internal("the guest's devices are not known", "no record of them"));
        };
        let root = devices.disks.iter().any(|d| d.slot == *slot && d.path == was);
        let disk = devices.disks.iter_mut().find(|d| d.slot == *slot);
        let disk = disk.ok_or_else(|| Error::internal("the guest's disk is not known", slot))?;
        (disk.path, disk.format, disk.backing) =
            (entry.disk.path.clone(), entry.disk.format, entry.disk.backing.clone());
        disk.chain = entry.disk.chain.clone();
        let limits = Disk::new(disk, false, true).throttle();
        if root {
            record.root.clone_from(&entry.disk.path);
        }
        record.write(&machine.dir)?;
        limits
    };
    let group = format!("/objects/{}", entry.side.name('t', slot));
    execute(machine, "qom-set", json!({"path": group, "property": "limits", "value": limits})).await.map(drop)
}

/// The machine stays where it is; with `finish` the copy is what the disk is now. The caller holds `copying`.
async fn leave(machine: &Machine, mut entry: Copying, finish: bool) -> Result<()> {
    if has_gone_over(machine, &entry).await? {
        pivot(machine, entry).await?;
        return Err(over());
    }
    let stage = entry.stage;
    let stopped = async {
        if finish {
            demand_ready(machine, &entry.slot).await?;
            // A guest that writes without a pause would never let it come to its end.
            pause(machine, &mut entry, stage).await?;
        }
        stop(machine, &entry.slot, finish).await
    };
    let stopped = stopped.await;
    // A change-over that was broken off may have come to its end meanwhile.
    if has_gone_over(machine, &entry).await? {
        pivot(machine, entry).await?;
        return Err(over());
    }
    // As with a pivot: it stands still as long as one may be to come.
    if stage == Stage::Pivoting
        && let Err(e) = &stopped
        && !stays(machine, &entry, true).await
    {
        return Err(e.clone());
    }
    entry.stage = Stage::Copying;
    go_on(machine, &mut entry).await?;
    stopped?;
    match entry.merge {
        Some(_) => merges::forget(machine, &entry.slot).await?,
        None => sweep(machine, &entry.slot, entry.side).await?,
    }
    remove(&machine.dir, entry.to).await
}

async fn stop(machine: &Inner, slot: &str, finish: bool) -> Result<()> {
    let job = match job(machine, slot).await? {
        Some(job) if !job.has_ended() => {
            // Without force one that is ready comes to its end.
            let cancel = json!({"device": id(slot), "force": !finish});
            execute(machine, "block-job-cancel", cancel).await?;
            match ended(machine, slot, if finish { STILL } else { BREAK }).await {
                Err(e) if finish && e.is(ErrorKind::Timeout) => {
                    execute(machine, "block-job-cancel", json!({"device": id(slot), "force": true})).await?;
                    ended(machine, slot, BREAK).await?;
                    return Err(e);
                }
                other => other?,
            }
        }
        Some(job) => job,
        None if finish => return Err(gone()),
        None => return Ok(()),
    };
    match job.error {
        Some(error) if finish => Err(failed(&error)),
        _ => Ok(()),
    }
}

/// Sees to a machine that an earlier process left standing still for the end of a copy; nothing to do for others.
pub(crate) fn adopted(machine: &Arc<Machine>) {
    let instance = machine.record().instance;
    let all = read(&machine.dir).unwrap_or_else(|e| {
        tracing::warn!(%instance, error = %e, context = e.context, "copies of a guest's disks are not known");
        vec![]
    });
    for to in all.into_iter().filter(|c| c.resume).map(|c| c.to) {
        let machine = Arc::downgrade(machine);
        tokio::spawn(async move {
            let Some(machine) = machine.upgrade() else { return };
            let _turn = machine.copying.lock().await;
            let done = match find(&machine.dir, to) {
                Ok(Some(mut entry)) if entry.resume => match entry.stage {
                    Stage::Copying => go_on(&machine, &mut entry).await,
                    Stage::Pivoting | Stage::Pivoted => pivot(&machine, entry).await,
                },
                other => other.map(drop),
            };
            if let Err(e) = done {
                tracing::warn!(%instance, error = %e, context = e.context, "a guest may stand still for the end of a copy of its disk; resume it, or end the copy");
            }
        });
    }
}

impl QemuDriver {
    /// The machine if it runs.
    async fn running(&self, instance: InstanceId) -> Result<Option<Arc<Machine>>> {
        match self.shared.machine(instance).await {
            Err(e) if e.is(ErrorKind::NotFound) => Ok(None),
            other => other.map(Some),
        }
    }
}

#[async_trait]
impl DiskCopies for QemuDriver {
    async fn begin(&self, instance: InstanceId, copy: DiskCopy) -> Result<()> {
        let machine = self.shared.machine(instance).await?;
        let slot = self.shared.slot(instance);
        let _changing = slot.changing.lock().await;
        begin(&machine, copy).await
    }

    async fn state(&self, instance: InstanceId, to: VolumeId) -> Result<DiskCopyState> {
        let machine = self.running(instance).await?;
        state(&self.shared.dir(instance), machine.as_deref(), to).await
    }

    async fn end(&self, instance: InstanceId, to: VolumeId, how: DiskCopyEnd) -> Result<()> {
        let machine = self.running(instance).await?;
        let (slot, dir) = (self.shared.slot(instance), self.shared.dir(instance));
        end_for_good(slot, dir, machine, to, how).await
    }

    async fn set_speed(&self, instance: InstanceId, to: VolumeId, speed: u64) -> Result<()> {
        set_speed(&*self.shared.machine(instance).await?, to, speed).await
    }
}

#[cfg(test)]
mod tests;
