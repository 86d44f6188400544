//! Layers that are put over disks of machines that run: the guest goes on in new, empty files of all of them at one moment, and what
//! its disks were until then lies below. Source: QEMU's `docs/interop/live-block-operations.rst` and the schema of
//! `blockdev-snapshot`, as they are from 7.2 to 10.
//!
//! What QEMU has decides. A node of a layer that nothing has is of a call that failed, and is taken away; one that cannot be is that
//! in which the guest goes on, whoever heard of it. That the layer is of the disk is on disk before a guest is told to write to it: whatever
//! ends the machine in between, an empty layer over a disk is that disk.

use crate::{
    QemuDriver, backups, bitmaps, copies,
    devices::{Disk, Side, layer_set},
    launch,
    machine::Machine,
    plug,
    qmp::Qmp,
};
use async_trait::async_trait;
use karst_guest::{
    DiskChain, DiskFormat, DiskMerge, DiskMerges, LowerFile, MergedDisk, NewLayer, ResolvedDisk,
};
use karst_model::{Error, InstanceId, Result, instance::RuntimeState};
use serde_json::{Value, json};
use std::{os::fd::AsFd, time::Duration};

const GREETING: Duration = Duration::from_secs(5);

/// The disk of a layer, as the machine's record has it.
fn disk_of(machine: &Machine, new: &NewLayer) -> Result<ResolvedDisk> {
    let record = machine.record();
    let mut disks = record.devices.iter().flat_map(|d| &d.disks);
    let found = disks.find(|d| d.path == new.disk || d.path == new.path).cloned();
    found.ok_or_else(|| Error::not_found("the guest has no such disk"))
}

/// It is written down that the guest goes on in it.
fn is_done(disk: &ResolvedDisk, new: &NewLayer) -> bool {
    disk.path == new.path && disk.chain.number == new.number
}

/// The disk with the layer over it.
fn over(disk: &ResolvedDisk, new: &NewLayer) -> ResolvedDisk {
    let lower = LowerFile { number: disk.chain.number, path: disk.path.clone(), format: disk.format };
    let below = [lower].into_iter().chain(disk.chain.below.iter().cloned()).collect();
    ResolvedDisk {
        path: new.path.clone(),
        format: DiskFormat::Qcow2,
        chain: DiskChain { number: new.number, below },
        ..disk.clone()
    }
}

fn demand_writable(disk: &ResolvedDisk) -> Result<()> {
    let field = format!("devices.{}", disk.name);
    if disk.cdrom || disk.readonly {
        return Err(Error::unsupported(format!("the guest only reads {:?}", disk.name)).at(field));
    }
    if disk.shared {
        let text =
            format!("other machines may write {:?} too, and would not see what is in a layer", disk.name);
        return Err(Error::unsupported(text).at(field));
    }
    if disk.foreign {
        let text = format!("{:?} is a path of the host, not a volume; layers are of volumes", disk.name);
        return Err(Error::unsupported(text).at(field));
    }
    Ok(())
}

/// Takes from QEMU what there is of a layer that nothing has; false for one that the guest goes on in.
async fn drop_unused(qmp: &Qmp, disk: &ResolvedDisk, side: Side, number: u32) -> Result<bool> {
    let nodes = bitmaps::nodes(qmp).await?;
    let there = |name: &String| nodes.as_array().into_iter().flatten().any(|n| n["node-name"] == **name);
    for name in ['i', 'f'].map(|kind| side.of_layer(kind, &disk.slot, number)) {
        if !there(&name) {
            continue;
        }
        match qmp.execute("blockdev-del", json!({"node-name": name})).await {
            Err(e) if plug::is_in_use(&e) => return Ok(false),
            other => drop(other?),
        }
    }
    let (first, _) = crate::devices::fd_sets(&format!("devices.{}", disk.name), &disk.slot, side)?;
    let set = layer_set(first, number);
    plug::remove_sets(qmp, |s| s == set).await?;
    Ok(true)
}

/// Gives QEMU the nodes of a layer, over nothing yet; answers what makes the guest go on in it.
async fn prepare(qmp: &Qmp, disk: &ResolvedDisk, side: Side, new: &NewLayer) -> Result<Value> {
    let layered = over(disk, new);
    let opened = tokio::task::spawn_blocking({
        let layered = layered.clone();
        move || launch::open_disk(&ResolvedDisk { backing: None, ..layered })
    });
    let (file, _, block) =
        opened.await.map_err(|e| Error::internal("the layer could not be opened", e))??;
    let node = Disk { side, ..Disk::new(&layered, block, true) };
    let set = layer_set(node.fd_sets()?.0, new.number);
    qmp.execute_with_fd("add-fd", json!({"fdset-id": set, "opaque": "layer"}), file.as_fd()).await?;
    for n in node.file_nodes(new.number, DiskFormat::Qcow2, None, false)? {
        qmp.execute("blockdev-add", n).await?;
    }
    let below = side.of_layer('i', &disk.slot, disk.chain.number);
    Ok(json!({"type": "blockdev-snapshot", "data": {"node": below, "overlay": node.image()}}))
}

/// Writes down that the guest goes on in layers.
fn note(machine: &Machine, layers: &[NewLayer]) -> Result<()> {
    let mut record = machine.record();
    let mut root = record.root.clone();
    let Some(devices) = &mut record.devices else {
        return Err(Error::internal("the guest's devices are not known", "no record of them"));
    };
    for new in layers {
        let Some(disk) = devices.disks.iter_mut().find(|d| d.path == new.disk && !is_done(d, new)) else {
            continue;
        };
        if root == disk.path {
            root.clone_from(&new.path);
        }
        *disk = over(disk, new);
    }
    record.root = root;
    record.write(&machine.dir)
}

/// Lets the guest go on in new layers. The caller holds the machine's lock of changes.
async fn add(machine: &Machine, layers: &[NewLayer]) -> Result<()> {
    let _turn = machine.copying.lock().await;
    let mut wanted = vec![];
    for new in layers {
        let disk = disk_of(machine, new)?;
        if !is_done(&disk, new) {
            demand_writable(&disk)?;
            wanted.push((disk, new));
        }
    }
    if wanted.is_empty() {
        return Ok(());
    }
    match machine.now().state {
        RuntimeState::Running | RuntimeState::Paused | RuntimeState::Error => {}
        _ => return Err(Error::conflict("the guest starts or ends; try again")),
    }
    copies::demand_none(machine).await?;
    backups::demand_none(machine).await?;
    let (qmp, _) = Qmp::connect(&machine.dir, launch::QMP, GREETING).await?;
    let mut actions = vec![];
    for (disk, new) in wanted {
        let side = plug::side(&qmp, &disk.slot).await?;
        // Of a call of which nobody heard: all of them then, because it was one moment.
        if drop_unused(&qmp, &disk, side, new.number).await? {
            actions.push(prepare(&qmp, &disk, side, new).await?);
        }
    }
    bitmaps::transact(&qmp, actions).await?;
    note(machine, layers)
}

/// Takes away what an [`add`] that failed has left; answers whether the guest goes on in the layers all the same.
async fn take_back(machine: &Machine, layers: &[NewLayer]) -> Result<bool> {
    let _turn = machine.copying.lock().await;
    let mut disks = vec![];
    for new in layers {
        let disk = disk_of(machine, new)?;
        if is_done(&disk, new) {
            return Ok(true);
        }
        disks.push((disk, new));
    }
    let (qmp, _) = Qmp::connect(&machine.dir, launch::QMP, GREETING).await?;
    let mut goes_on = false;
    for (disk, new) in disks {
        let side = plug::side(&qmp, &disk.slot).await?;
        goes_on |= !drop_unused(&qmp, &disk, side, new.number).await?;
    }
    if goes_on {
        note(machine, layers)?;
    }
    Ok(goes_on)
}

#[async_trait]
impl DiskMerges for QemuDriver {
    async fn add(&self, instance: InstanceId, layers: Vec<NewLayer>) -> Result<()> {
        let machine = self.shared.machine(instance).await?;
        let slot = self.shared.slot(instance);
        let _changing = slot.changing.lock().await;
        add(&machine, &layers).await
    }

    async fn take_back(&self, instance: InstanceId, layers: Vec<NewLayer>) -> Result<bool> {
        let machine = self.shared.machine(instance).await?;
        let slot = self.shared.slot(instance);
        let _changing = slot.changing.lock().await;
        take_back(&machine, &layers).await
    }

    async fn merge(&self, instance: InstanceId, merge: DiskMerge) -> Result<()> {
        let machine = self.shared.machine(instance).await?;
        let slot = self.shared.slot(instance);
        let _changing = slot.changing.lock().await;
        copies::merges::begin(&machine, merge).await
    }

    async fn merged(&self, instance: InstanceId) -> Result<Vec<MergedDisk>> {
        let dir = self.shared.dir(instance);
        let found = tokio::task::spawn_blocking(move || copies::merges::merged(&dir)).await;
        found.map_err(|e| Error::internal("the merges of a guest's disks are not known", e))?
    }
}

#[cfg(test)]
mod tests;
