//! Files of a disk in layers that are made one while their machine runs: QEMU puts what is in some into the one below them
//! (`block-commit`) or what is below into the active one (`block-stream`). Source: QEMU's `docs/interop/live-block-operations.rst`
//! and the schemas of both, as they are from 7.2 to 10.
//!
//! As long as one goes on, and when it is broken off, the disk is what it was: what is put into a file lower down is hidden by what
//! lies over that. So only the end is a change-over as that of a copy, of which everything else is true as well; it says what is
//! left of the chain. Where the active layer goes, the machine stands still until it is on disk that it did.

use super::*;
use crate::{
    bitmaps,
    devices::{fd_sets, layer_set},
};
use karst_guest::{DiskMerge, LowerFile, MergedDisk};
use karst_model::layer::{Base, Merge};

/// What is made one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Merging {
    /// Which files.
    merge: Merge,
    /// The chain before, lowest first.
    chain: Vec<u32>,
}

/// Numbers of a disk's files, lowest first.
fn chain(disk: &ResolvedDisk) -> Vec<u32> {
    let below = disk.chain.below.iter().rev().map(|f| f.number);
    below.chain([disk.chain.number]).collect()
}

/// The disk as it is when only `left` of its files are there.
fn reduced(disk: &ResolvedDisk, left: &[u32]) -> ResolvedDisk {
    let own = LowerFile { number: disk.chain.number, path: disk.path.clone(), format: disk.format };
    let all = [own].into_iter().chain(disk.chain.below.iter().cloned());
    let mut files: Vec<LowerFile> = all.filter(|f| left.contains(&f.number)).collect();
    let mut now = disk.clone();
    if files.is_empty() {
        return now;
    }
    let active = files.remove(0);
    // An image lies below the lowest file of a chain only.
    let lowest = chain(disk).first().copied();
    if files.last().map_or(Some(active.number), |f| Some(f.number)) != lowest {
        now.backing = None;
    }
    (now.path, now.format, now.chain.number) = (active.path, active.format, active.number);
    now.chain.below = files;
    now
}

/// What a disk is after a merge.
fn after(disk: &ResolvedDisk, merge: Merge) -> ResolvedDisk {
    let mut now = reduced(disk, &merge.left(&chain(disk)));
    if merge == (Merge::Pull { base: None }) {
        now.backing = None;
    }
    now
}

/// Begins a merge. The caller holds the machine's lock of changes.
///
/// # Errors
/// Not found without such a disk, conflict while something else is done to it, the machine ends, or there is nothing to merge;
/// invalid for files that are none of its.
pub(crate) async fn begin(machine: &Machine, merge: DiskMerge) -> Result<()> {
    let _turn = machine.copying.lock().await;
    let disk = {
        let record = machine.record();
        let mut disks = record.devices.iter().flat_map(|d| &d.disks);
        disks.find(|d| d.path == merge.path).cloned()
    };
    let known = find(&machine.dir, merge.volume)?;
    let disk = match (disk, &known) {
        (Some(disk), _) => disk,
        // By an earlier call, of which the caller does not know what became.
        (None, Some(entry)) if entry.merge.is_some() && entry.stage != Stage::Copying => return Ok(()),
        (None, _) => return Err(Error::not_found("the guest has no such disk")),
    };
    let slot = disk.slot.clone();
    for old in read(&machine.dir)?.into_iter().filter(|c| c.slot == slot) {
        let there = job(machine, &slot).await?.is_some();
        let same = old.to == merge.volume && old.merge.as_ref().is_some_and(|m| m.merge == merge.merge);
        match old.stage {
            Stage::Copying if there && same => return Ok(()),
            Stage::Pivoting if same => return Ok(()),
            Stage::Copying | Stage::Pivoting if there => {
                let text =
                    "another copy or merge of the disk goes on; wait until that has ended, or cancel it";
                return Err(Error::conflict(text));
            }
            _ => remove(&machine.dir, old.to).await?,
        }
    }
    match machine.now().state {
        RuntimeState::Running | RuntimeState::Paused | RuntimeState::Error => {}
        _ => return Err(Error::conflict("the guest starts or ends; try again")),
    }
    backups::demand_none(machine).await?;
    let before = chain(&disk);
    merge.merge.check(&before)?;
    if merge.merge == (Merge::Pull { base: None }) && before.len() < 2 && disk.backing.is_none() {
        return Err(Error::conflict("nothing lies below the disk: it is one file already").at("device"));
    }
    let side = side(machine, &slot).await?;
    let disk = after(&disk, merge.merge);
    let merging = Merging { merge: merge.merge, chain: before };
    let stage = Stage::Copying;
    let entry = Copying { to: merge.volume, slot, side, disk, stage, resume: false, merge: Some(merging) };
    put(&machine.dir, &entry).await?;
    let Some(merging) = &entry.merge else { return Ok(()) };
    if let Err(e) = start(machine, &entry, merging, merge.speed).await {
        match take_back(machine, &entry.slot).await {
            Ok(()) => remove(&machine.dir, entry.to).await?,
            // As of a copy.
            Err(e) => {
                tracing::warn!(slot = %entry.slot, error = %e, context = e.context, "what is left of a merge could not be taken from QEMU; cancel it");
            }
        }
        return Err(refused(e));
    }
    Ok(())
}

async fn take_back(machine: &Inner, slot: &str) -> Result<()> {
    stop(machine, slot, false).await?;
    forget(machine, slot).await
}

/// The command, of a disk at a slot whose chain (lowest first) is `chain`.
fn command(slot: &str, side: Side, merging: &Merging, speed: u64) -> (&'static str, Value) {
    let node = |number: u32| side.of_layer('i', slot, number);
    let lowest = merging.chain.first().copied().unwrap_or(0);
    let number = |base: Base| match base {
        Base::Lowest => lowest,
        Base::Layer(n) => n,
    };
    let mut arguments = json!({
        "job-id": id(slot),
        "filter-node-name": side.filter(slot),
        "speed": speed,
        "on-error": "report",
        // How it ended is kept until somebody has seen it.
        "auto-dismiss": false,
    });
    match merging.merge {
        Merge::Commit { top, base } => {
            arguments["device"] = side.name('d', slot).into();
            arguments["top-node"] = node(top).into();
            arguments["base-node"] = node(number(base)).into();
            ("block-commit", arguments)
        }
        Merge::Pull { base } => {
            arguments["device"] = node(merging.chain.last().copied().unwrap_or(0)).into();
            if let Some(base) = base {
                arguments["base-node"] = node(number(base)).into();
            }
            ("block-stream", arguments)
        }
    }
}

async fn start(machine: &Inner, entry: &Copying, merging: &Merging, speed: u64) -> Result<()> {
    // Nobody knows of one that there may be: whoever begins has seen to those that are written down.
    take_back(machine, &entry.slot).await?;
    let (command, arguments) = command(&entry.slot, entry.side, merging, speed);
    execute(machine, command, arguments).await.map(drop)
}

/// Lets QEMU forget a job that has ended.
pub(super) async fn forget(machine: &Inner, slot: &str) -> Result<()> {
    let (qmp, _) = Qmp::connect(&machine.dir, launch::QMP, GREETING).await?;
    dismiss(&qmp, slot).await
}

/// Has it come to its end, so that the disk is what is left? One that does not take the active layer away ends by itself, and the
/// disk reads the same before and after.
pub(super) async fn has_gone_over(machine: &Inner, entry: &Copying, merging: &Merging) -> Result<bool> {
    if entry.stage == Stage::Copying && merging.merge.is_active(&merging.chain) {
        return Ok(false);
    }
    Ok(job(machine, &entry.slot).await?.is_some_and(|j| j.has_ended() && j.error.is_none()))
}

/// The machine stands still: the active layer goes, where it is to, and the record follows.
pub(super) async fn change_over(machine: &Inner, entry: &Copying, asked: &mut bool) -> Result<()> {
    let slot = &entry.slot;
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
    if let Some(error) = job.error {
        return Err(failed(&error));
    }
    // The job wrote the last of it while the machine stood still already: with this QEMU flushes once more, before files go.
    execute(machine, "stop", json!({})).await?;
    let mut record = machine.record();
    let was = record.root.clone();
    let Some(devices) = &mut record.devices else {
        return Err(Error::internal("the guest's devices are not known", "no record of them"));
    };
    let disk = devices.disks.iter_mut().find(|d| d.slot == *slot);
    let disk = disk.ok_or_else(|| Error::internal("the guest's disk is not known", slot))?;
    let root = disk.path == was;
    (disk.path, disk.format, disk.backing) =
        (entry.disk.path.clone(), entry.disk.format, entry.disk.backing.clone());
    disk.chain = entry.disk.chain.clone();
    if root {
        record.root.clone_from(&entry.disk.path);
    }
    record.write(&machine.dir)
}

/// What is left of disks of a machine by merges since its last start.
pub(crate) fn merged(dir: &Path) -> Result<Vec<MergedDisk>> {
    let of = |entry: Copying| {
        let merging = entry.merge.filter(|_| entry.stage == Stage::Pivoted)?;
        let left = chain(&entry.disk);
        let gone = merging.chain.iter().copied().filter(|n| !left.contains(n)).collect();
        Some(MergedDisk { volume: entry.to, before: merging.chain, gone })
    };
    Ok(read(dir)?.into_iter().filter_map(of).collect())
}

/// Takes from QEMU what is not of the disk any more: the job, and nodes and descriptors of the files that went.
pub(super) async fn sweep(machine: &Inner, entry: &Copying, merging: &Merging) -> Result<()> {
    let (slot, side) = (&entry.slot, entry.side);
    let (qmp, _) = Qmp::connect(&machine.dir, launch::QMP, GREETING).await?;
    dismiss(&qmp, slot).await?;
    let left = chain(&entry.disk);
    let went: Vec<u32> = merging.chain.iter().rev().copied().filter(|n| !left.contains(n)).collect();
    let mut nodes: Vec<String> =
        went.iter().flat_map(|n| ['i', 'f'].map(|kind| side.of_layer(kind, slot, *n))).collect();
    let image = entry.disk.backing.is_none();
    if image {
        nodes.extend(['b', 'c'].map(|kind| side.name(kind, slot)));
    }
    let has = bitmaps::nodes(&qmp).await?;
    let there = |name: &String| has.as_array().into_iter().flatten().any(|n| n["node-name"] == **name);
    let nodes: Vec<String> = nodes.into_iter().filter(there).collect();
    for node in nodes {
        plug::delete_node(&qmp, &node).await?;
    }
    let (first, base) = fd_sets(&format!("devices.{}", entry.disk.name), slot, side)?;
    let sets: Vec<u32> = went.iter().map(|n| layer_set(first, *n)).chain(image.then_some(base)).collect();
    plug::remove_sets(&qmp, |set| sets.contains(&set)).await
}

#[cfg(test)]
mod tests;
