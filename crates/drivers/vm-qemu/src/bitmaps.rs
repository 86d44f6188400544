//! Checkpoints of disks: bitmaps in their qcow2 files of what changed. Source: QEMU's `docs/interop/bitmaps.rst`.
//!
//! A checkpoint is a bitmap of its name ([`name`]) on the node of each disk's format. Only the newest of a disk records; what
//! changed since an older one is what is in its bitmap and in all later ones. So a checkpoint that goes leaves what it has to the one
//! before it.
//!
//! QEMU writes bitmaps into the file when it ends, and marks them while it runs: one of a QEMU that was killed says of itself that
//! it is not whole, and nobody backs up by it. When one that is not whole goes, the one before it cannot have what it had: an empty
//! bitmap ([`lost`]) in its place says that it is not whole either. Nothing is written down here; what QEMU says of its nodes
//! decides. What a disk has that nobody knows is dropped when the next checkpoint is made or the next backup begins.

use crate::{launch, machine::Inner, plug, qmp::Qmp};
use karst_guest::{DiskFormat, DiskMark, MarkedDisk, NewCheckpoint, ResolvedDisk, UnmarkedDisk};
use karst_model::{CheckpointId, Error, ErrorKind, Result};
use serde_json::{Value, json};
use std::{path::Path, time::Duration};

const GREETING: Duration = Duration::from_secs(5);
/// How long QEMU may take for many bitmaps at one moment.
const TRANSACTION: Duration = Duration::from_secs(60);
/// What the names of checkpoints' bitmaps begin with.
const PREFIX: &str = "karst-";
const LOST: &str = "lost-";
/// In the guest's directory: its disks may have checkpoints, so that it is worth to let QEMU write them at its end.
const MARK: &str = "bitmaps";

/// QEMU's name of a checkpoint.
pub(crate) fn name(id: CheckpointId) -> String {
    format!("{PREFIX}{id}")
}

/// The name of what stands for a checkpoint that is not whole for good.
fn lost(id: CheckpointId) -> String {
    format!("{PREFIX}{LOST}{id}")
}

/// The checkpoint that a bitmap is of, and whether it stands for a lost one.
fn checkpoint(name: &str) -> Option<(CheckpointId, bool)> {
    let rest = name.strip_prefix(PREFIX)?;
    match rest.strip_prefix(LOST) {
        Some(id) => Some((id.parse().ok()?, true)),
        None => Some((rest.parse().ok()?, false)),
    }
}

/// A bitmap as QEMU tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bitmap {
    pub(crate) name: String,
    /// It follows what is written.
    pub(crate) recording: bool,
    /// It is marked as not whole.
    pub(crate) broken: bool,
    /// Bytes that changed.
    pub(crate) bytes: u64,
}

/// The bitmaps of a node, by what QEMU says of its nodes.
pub(crate) fn of(nodes: &Value, node: &str) -> Vec<Bitmap> {
    let found = nodes.as_array().into_iter().flatten().find(|n| n["node-name"] == node);
    let all = found.and_then(|n| n["dirty-bitmaps"].as_array()).into_iter().flatten();
    all.filter_map(|b| {
        let flag = |key: &str| b[key].as_bool().unwrap_or(false);
        Some(Bitmap {
            name: b["name"].as_str()?.to_owned(),
            recording: flag("recording"),
            broken: flag("inconsistent"),
            bytes: b["count"].as_u64().unwrap_or(0),
        })
    })
    .collect()
}

/// A disk with what QEMU has of it.
#[derive(Debug, Clone)]
pub(crate) struct Tracked {
    pub(crate) disk: ResolvedDisk,
    /// The node of its format, which has its bitmaps.
    pub(crate) node: String,
    pub(crate) bitmaps: Vec<Bitmap>,
}

impl Tracked {
    pub(crate) fn find(&self, id: CheckpointId) -> Option<&Bitmap> {
        let name = name(id);
        self.bitmaps.iter().find(|b| b.name == name)
    }

    fn has(&self, name: &str) -> bool {
        self.bitmaps.iter().any(|b| b.name == name)
    }

    /// A bitmap that stays in the file.
    fn add(&self, name: &str, disabled: bool) -> Value {
        let mut add = self.action("add", name);
        add["data"]["persistent"] = true.into();
        if disabled {
            add["data"]["disabled"] = true.into();
        }
        add
    }

    pub(crate) fn action(&self, kind: &str, bitmap: &str) -> Value {
        json!({"type": format!("block-dirty-bitmap-{kind}"), "data": {"node": self.node, "name": bitmap}})
    }

    fn merge(&self, target: &str, from: &[String]) -> Value {
        let data = json!({"node": self.node, "target": target, "bitmaps": from});
        json!({"type": "block-dirty-bitmap-merge", "data": data})
    }

    /// Drops what nobody knows.
    fn sweep(&self, known: &[CheckpointId]) -> Vec<Value> {
        let strange = |b: &&Bitmap| {
            b.name.starts_with(PREFIX) && checkpoint(&b.name).is_none_or(|(id, _)| !known.contains(&id))
        };
        self.bitmaps.iter().filter(strange).map(|b| self.action("remove", &b.name)).collect()
    }

    /// A new checkpoint.
    fn mark(&self, id: CheckpointId, before: Option<CheckpointId>) -> Vec<Value> {
        let mut actions = vec![self.add(&name(id), false)];
        let before = before.and_then(|id| Some((id, self.find(id)?)));
        match before {
            Some((_, old)) if old.recording => actions.push(self.action("disable", &old.name)),
            // It did not follow until now: what is missing in it the new one does not have.
            Some((id, old)) if !old.broken => actions.extend(self.lose(id, Some(old))),
            _ => {}
        }
        actions
    }

    /// Puts what says so in the place of a checkpoint that is not whole any more.
    fn lose(&self, id: CheckpointId, now: Option<&Bitmap>) -> Vec<Value> {
        let mut actions: Vec<_> = now.map(|b| self.action("remove", &b.name)).into_iter().collect();
        let lost = lost(id);
        if !self.has(&lost) {
            actions.push(self.add(&lost, true));
        }
        actions
    }

    /// A checkpoint that goes.
    fn unmark(&self, id: CheckpointId, parent: Option<CheckpointId>, last: bool) -> Vec<Value> {
        let own = self.find(id);
        let name = own.map_or_else(|| lost(id), |b| b.name.clone());
        if !self.has(&name) {
            return vec![];
        }
        // The newest that does not follow lacks what came after it: another was made that nobody knows.
        let whole = own.filter(|b| !b.broken && (b.recording || !last));
        let mut actions = vec![];
        if let Some(parent) = parent {
            match (whole, self.find(parent)) {
                // It is not whole for good already.
                (_, Some(before)) if before.broken => {}
                (Some(_), Some(before)) => {
                    if last && !before.recording {
                        actions.push(self.action("enable", &before.name));
                    }
                    actions.push(self.merge(&before.name, std::slice::from_ref(&name)));
                }
                // What the one before would have to say of the time after it nobody knows.
                (_, before) => actions.extend(self.lose(parent, before)),
            }
        }
        actions.push(self.action("remove", &name));
        actions
    }

    /// A bitmap for the time of a backup, of all that changed since the first of `since`.
    ///
    /// # Errors
    /// Conflict when one of them is not there or not whole.
    pub(crate) fn gather(&self, into: &str, since: &[CheckpointId]) -> Result<Vec<Value>> {
        let mut from = vec![];
        for id in since {
            match self.find(*id) {
                Some(bitmap) if !bitmap.broken => from.push(bitmap.name.clone()),
                found => return Err(self.lost(found.is_some())),
            }
        }
        if !self.bitmaps.iter().any(|b| from.last() == Some(&b.name) && b.recording) {
            return Err(self.lost(true));
        }
        let mut add = self.action("add", into);
        add["data"]["disabled"] = true.into();
        Ok(vec![add, self.merge(into, &from)])
    }

    fn lost(&self, there: bool) -> Error {
        let disk = &self.disk.name;
        let why = match there {
            true => "the machine was killed while it followed them",
            false => "its disk was another one, or the machine was killed",
        };
        Error::conflict(format!(
            "what changed of disk {disk:?} since that checkpoint is not known any more: {why}; back up all of the disk, with a \
             new checkpoint, and delete the old ones"
        ))
        .at(format!("devices.{disk}"))
    }
}

/// The disk at `path`, one that the guest writes to.
pub(crate) fn disk_at(machine: &Inner, path: &Path) -> Option<ResolvedDisk> {
    let record = machine.record();
    let mut disks = record.devices.iter().flat_map(|d| &d.disks);
    disks.find(|d| d.path == path && !d.cdrom && !d.readonly).cloned()
}

/// What QEMU has of the disk at `path`.
///
/// # Errors
/// Not found without such a disk.
pub(crate) async fn tracked(machine: &Inner, qmp: &Qmp, nodes: &Value, path: &Path) -> Result<Tracked> {
    let disk = disk_at(machine, path);
    let disk = disk.ok_or_else(|| Error::not_found("the guest has no such disk that it writes to"))?;
    let node = plug::side(qmp, &disk.slot).await?.of_layer('i', &disk.slot, disk.chain.number);
    let bitmaps = of(nodes, &node);
    Ok(Tracked { disk, node, bitmaps })
}

pub(crate) async fn nodes(qmp: &Qmp) -> Result<Value> {
    qmp.execute("query-named-block-nodes", json!({"flat": true})).await
}

/// All or nothing, at one moment.
pub(crate) async fn transact(qmp: &Qmp, actions: Vec<Value>) -> Result<()> {
    if actions.is_empty() {
        return Ok(());
    }
    qmp.execute_within(TRANSACTION, "transaction", json!({"actions": actions})).await.map(drop)
}

/// What a new checkpoint is made of, and dropped of disks beside it. Nothing of one that is there already.
///
/// # Errors
/// Not found, unsupported for a disk that is no qcow2 file.
pub(crate) async fn plan(
    machine: &Inner,
    qmp: &Qmp,
    nodes: &Value,
    new: &NewCheckpoint,
) -> Result<Vec<Value>> {
    let mut actions = vec![];
    for MarkedDisk { path, before } in &new.disks {
        let at = tracked(machine, qmp, nodes, path).await?;
        if !at.disk.chain.below.is_empty() {
            let disk = &at.disk.name;
            let text = format!(
                "the disk {disk:?} has layers, and a checkpoint would follow the highest alone; merge them first"
            );
            return Err(Error::unsupported(text).at(format!("devices.{disk}")));
        }
        if at.disk.format != DiskFormat::Qcow2 {
            let disk = &at.disk.name;
            let text = format!(
                "the disk {disk:?} is raw: what changes of it can be kept in qcow2 files only, which disks of images in pools of \
                 kind dir are; leave it out of the checkpoint, and back up all of it"
            );
            return Err(Error::unsupported(text).at(format!("devices.{disk}")));
        }
        if at.find(new.id).is_none() {
            actions.extend(at.mark(new.id, *before));
        }
    }
    Ok(actions)
}

/// What disks have that nobody knows: of earlier records, of a disk that was another machine's, of a delete while it stood still.
pub(crate) async fn sweep(
    machine: &Inner,
    qmp: &Qmp,
    nodes: &Value,
    known: &[CheckpointId],
) -> Result<Vec<Value>> {
    let paths: Vec<_> = {
        let record = machine.record();
        let disks = record.devices.iter().flat_map(|d| &d.disks);
        // What is in files of the host is its administrator's.
        disks.filter(|d| d.format == DiskFormat::Qcow2 && !d.foreign).map(|d| d.path.clone()).collect()
    };
    let mut actions = vec![];
    for path in paths {
        if disk_at(machine, &path).is_some() {
            actions.extend(tracked(machine, qmp, nodes, &path).await?.sweep(known));
        }
    }
    Ok(actions)
}

/// Says that QEMU is worth to be waited for at its end.
pub(crate) fn remember(dir: &Path) -> Result<()> {
    Ok(std::fs::write(dir.join(MARK), "")?)
}

/// Lets a QEMU whose disks have checkpoints end by itself, which writes them into its files. Whoever asks for it ends it by force
/// when it does not, and sees to it that this does not take forever.
///
/// # Errors
/// Not found when there is nothing to be written, which one without checkpoints knows at once.
pub(crate) async fn quit(machine: &Inner) -> Result<()> {
    let nothing = || Error::not_found("there is nothing that QEMU had to write");
    if !machine.dir.join(MARK).exists() {
        return Err(nothing());
    }
    let (qmp, _) = Qmp::connect(&machine.dir, launch::QMP, GREETING).await?;
    // They may have been deleted since; a disk that has some may come back at any time, so that the mark stays.
    if !any(&nodes(&qmp).await?) {
        return Err(nothing());
    }
    match qmp.execute("quit", json!({})).await {
        // It was quicker to close than to answer.
        Err(e) if e.is(ErrorKind::Unavailable) => Ok(()),
        other => other.map(drop),
    }
}

/// Has any disk a checkpoint, or what is left of one?
fn any(nodes: &Value) -> bool {
    let all = nodes.as_array().into_iter().flatten();
    let mut bitmaps = all.filter_map(|n| n["dirty-bitmaps"].as_array()).flatten();
    bitmaps.any(|b| b["name"].as_str().is_some_and(|name| name.starts_with(PREFIX)))
}

/// Drops what a node has that is not whole: QEMU lets no disk grow that has such. Nobody backs up by them, and of one without
/// checkpoints they are what its machine's being killed has left.
pub(crate) async fn drop_broken(qmp: &Qmp, node: &str) -> Result<()> {
    let all = of(&nodes(qmp).await?, node);
    transact(qmp, dropping(node, &all)).await
}

fn dropping(node: &str, all: &[Bitmap]) -> Vec<Value> {
    let ours = all.iter().filter(|b| b.broken && b.name.starts_with(PREFIX));
    ours.map(|b| json!({"type": "block-dirty-bitmap-remove", "data": {"node": node, "name": b.name}}))
        .collect()
}

/// Makes a checkpoint. The caller holds the machine's lock of changes.
pub(crate) async fn mark(machine: &Inner, new: &NewCheckpoint, known: &[CheckpointId]) -> Result<()> {
    let (qmp, _) = Qmp::connect(&machine.dir, launch::QMP, GREETING).await?;
    let now = nodes(&qmp).await?;
    let actions = plan(machine, &qmp, &now, new).await?;
    if actions.is_empty() {
        return Ok(());
    }
    remember(&machine.dir)?;
    let with: Vec<_> = known.iter().copied().chain([new.id]).collect();
    // Apart from it, so that the plan is of what is there then.
    transact(&qmp, sweep(machine, &qmp, &now, &with).await?).await?;
    transact(&qmp, actions).await
}

/// Takes a checkpoint away. The caller holds the machine's lock of changes.
pub(crate) async fn unmark(machine: &Inner, id: CheckpointId, disks: &[UnmarkedDisk]) -> Result<()> {
    let (qmp, _) = Qmp::connect(&machine.dir, launch::QMP, GREETING).await?;
    let now = nodes(&qmp).await?;
    let mut actions = vec![];
    for UnmarkedDisk { path, parent, last } in disks {
        if disk_at(machine, path).is_some() {
            actions.extend(tracked(machine, &qmp, &now, path).await?.unmark(id, *parent, *last));
        } else if parent.is_some() && !last {
            return Err(Error::conflict("the guest does not have a disk of the checkpoint; attach it again"));
        }
    }
    transact(&qmp, actions).await
}

/// What the disks of a machine have.
pub(crate) async fn marks(machine: &Inner) -> Result<Vec<DiskMark>> {
    let (qmp, _) = Qmp::connect(&machine.dir, launch::QMP, GREETING).await?;
    let now = nodes(&qmp).await?;
    let paths: Vec<_> = {
        let record = machine.record();
        record.devices.iter().flat_map(|d| &d.disks).map(|d| d.path.clone()).collect()
    };
    let mut found = vec![];
    for path in paths {
        if disk_at(machine, &path).is_none() {
            continue;
        }
        for bitmap in tracked(machine, &qmp, &now, &path).await?.bitmaps {
            let of = checkpoint(&bitmap.name);
            found.extend(of.map(|(id, lost)| (path.clone(), id, bitmap.bytes, !lost && !bitmap.broken)));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u128) -> CheckpointId {
        CheckpointId(uuid::Uuid::from_u128(n))
    }

    fn bitmap(n: u128, recording: bool, broken: bool) -> Bitmap {
        Bitmap { name: name(id(n)), recording, broken, bytes: 0 }
    }

    fn disk(bitmaps: Vec<Bitmap>) -> Tracked {
        Tracked {
            disk: karst_guest::samples::disk("root", "scsi0", "/a", DiskFormat::Qcow2),
            node: "i-scsi0".into(),
            bitmaps,
        }
    }

    /// Actions in few words: what is done to which.
    fn words(actions: &[Value]) -> Vec<String> {
        let short = |v: &Value| {
            let text = v.as_str().unwrap_or_default();
            match checkpoint(text) {
                Some((id, false)) => id.to_string()[35..].to_owned(),
                Some((id, true)) => format!("lost{}", &id.to_string()[35..]),
                None => text.to_owned(),
            }
        };
        let one = |a: &Value| {
            let kind = a["type"].as_str().unwrap().strip_prefix("block-dirty-bitmap-").unwrap();
            assert_eq!(a["data"]["node"], "i-scsi0");
            let more = a["data"]["bitmaps"].as_array().map(|all| all.iter().map(short).collect::<String>());
            let on = if more.is_some() { &a["data"]["target"] } else { &a["data"]["name"] };
            format!("{kind} {}{}", short(on), more.map_or(String::new(), |m| format!("<{m}")))
        };
        actions.iter().map(one).collect()
    }

    #[test]
    fn bitmaps_are_read_of_their_node() {
        let nodes = json!([
            {"node-name": "d-scsi0"},
            {"node-name": "i-scsi0", "dirty-bitmaps": [
                {"name": "a", "recording": true, "busy": false, "persistent": true, "granularity": 65536, "count": 131072},
                {"name": "b", "recording": false, "inconsistent": true, "count": 0},
            ]},
        ]);
        let found = of(&nodes, "i-scsi0");
        assert_eq!((found.len(), found[0].recording, found[0].bytes), (2, true, 131_072));
        assert!(found[1].broken && !found[0].broken);
        assert!(of(&nodes, "d-scsi0").is_empty() && of(&nodes, "x").is_empty());
        // Those of others are no reason to wait for QEMU's end.
        assert!(!any(&nodes) && !any(&json!([])));
        for mine in [name(id(1)), lost(id(1))] {
            assert!(any(&json!([{"node-name": "d"}, {"node-name": "i", "dirty-bitmaps": [{"name": mine}]}])));
        }
    }

    #[test]
    fn what_is_not_whole_does_not_keep_a_disk_from_growing() {
        let mut all = vec![bitmap(1, false, true), bitmap(2, true, false)];
        all.push(Bitmap { name: "mine".into(), recording: false, broken: true, bytes: 0 });
        assert_eq!(words(&dropping("i-scsi0", &all)), ["remove 1"]);
    }

    #[test]
    fn only_the_newest_follows() {
        assert_eq!(words(&disk(vec![]).mark(id(1), None)), ["add 1"]);
        let one = disk(vec![bitmap(1, true, false)]);
        let actions = one.mark(id(2), Some(id(1)));
        assert_eq!(words(&actions), ["add 2", "disable 1"]);
        assert_eq!(actions[0]["data"]["persistent"], true);
        // One that is not whole cannot be touched, and follows nothing.
        assert_eq!(words(&disk(vec![bitmap(1, false, true)]).mark(id(2), Some(id(1)))), ["add 2"]);
        assert_eq!(words(&disk(vec![]).mark(id(2), Some(id(1)))), ["add 2"]);
        // One that did not follow until now, because another was made and nobody knows it, is lost with what came after it.
        let stale = disk(vec![bitmap(1, false, false), bitmap(9, true, false)]);
        assert_eq!(words(&stale.mark(id(2), Some(id(1)))), ["add 2", "remove 1", "add lost1"]);
    }

    #[test]
    fn what_goes_leaves_what_it_has_to_the_one_before() {
        let all = disk(vec![bitmap(1, false, false), bitmap(2, false, false), bitmap(3, true, false)]);
        assert_eq!(words(&all.unmark(id(1), None, false)), ["remove 1"]);
        assert_eq!(words(&all.unmark(id(2), Some(id(1)), false)), ["merge 1<2", "remove 2"]);
        assert_eq!(words(&all.unmark(id(3), Some(id(2)), true)), ["enable 2", "merge 2<3", "remove 3"]);
        assert!(all.unmark(id(4), Some(id(3)), true).is_empty(), "it is gone");
        // The newest did not follow to the end, because another was made and nobody knows it: the one before has not all either.
        let stale = disk(vec![bitmap(1, false, false), bitmap(2, false, false), bitmap(9, true, false)]);
        assert_eq!(words(&stale.unmark(id(2), Some(id(1)), true)), ["remove 1", "add lost1", "remove 2"]);
        assert_eq!(words(&stale.unmark(id(2), None, true)), ["remove 2"]);
        // Of what is not whole the one before must not be taken for whole.
        let broken = disk(vec![bitmap(1, false, false), bitmap(2, false, true)]);
        assert_eq!(words(&broken.unmark(id(2), Some(id(1)), true)), ["remove 1", "add lost1", "remove 2"]);
        let gone = Bitmap { name: lost(id(2)), recording: false, broken: false, bytes: 0 };
        let lost = disk(vec![bitmap(1, false, false), gone]);
        assert_eq!(words(&lost.unmark(id(2), Some(id(1)), false)), ["remove 1", "add lost1", "remove lost2"]);
        assert!(lost.gather("b", &[id(1), id(2)]).is_err());
        assert!(lost.sweep(&[id(1), id(2)]).is_empty());
        let both = disk(vec![bitmap(1, false, true), bitmap(2, false, true)]);
        assert_eq!(words(&both.unmark(id(2), Some(id(1)), true)), ["remove 2"]);
    }

    #[test]
    fn what_changed_since_one_is_in_all_after_it() {
        let all = disk(vec![bitmap(1, false, false), bitmap(2, true, false)]);
        let actions = all.gather("backup-vda", &[id(1), id(2)]).unwrap();
        assert_eq!(words(&actions), ["add backup-vda", "merge backup-vda<12"]);
        assert_eq!(actions[0]["data"]["disabled"], true);
        assert_eq!(actions[0]["data"].get("persistent"), None, "it goes with QEMU");
        for bad in [
            disk(vec![bitmap(2, true, false)]),
            disk(vec![bitmap(1, false, true), bitmap(2, true, false)]),
            disk(vec![bitmap(1, false, false), bitmap(2, false, false)]),
        ] {
            let e = bad.gather("b", &[id(1), id(2)]).unwrap_err();
            assert_eq!(e.field.as_deref(), Some("devices.root"), "{e:?}");
            assert!(e.is(karst_model::ErrorKind::Conflict) && e.message.contains("\"root\""), "{e}");
        }
    }

    #[test]
    fn only_checkpoints_that_nobody_knows_are_dropped() {
        let mut all = disk(vec![bitmap(1, false, true), bitmap(2, true, false)]);
        all.bitmaps.push(Bitmap { name: "mine".into(), recording: true, broken: false, bytes: 0 });
        assert_eq!(words(&all.sweep(&[id(2)])), ["remove 1"]);
    }
}
