//! What changes in a machine that runs: disks and NICs come and go, limits, discs and cables change.
//!
//! What QEMU really has decides, not what is written down: a change that a crash or a slow guest broke off is finished or
//! taken back by the next one. The record names a device before it is plugged and until it is gone, and everything of a
//! device is named after its slot, so nothing of it can be missed.

use crate::{
    backups, bitmaps, copies,
    devices::{Disk, Layout, Nic, Side, device_id, layer_of_set, layer_set, rates},
    directories, keys, launch,
    machine::Inner,
    qmp::{Event, Qmp},
    record::{Devices, Record},
};
use karst_guest::{ResolvedDisk, ResolvedGuest, ResolvedNic};
use karst_model::{Error, ErrorKind, Result, news::Happened};
use serde_json::{Value, json};
use std::{collections::BTreeSet, os::fd::AsFd, time::Duration};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};

/// How long a guest may take to give a device back.
const UNPLUG: Duration = Duration::from_secs(20);
/// How long QEMU may take to greet.
const GREETING: Duration = Duration::from_secs(5);
/// Between two looks at whether a device has gone.
const LOOK: Duration = Duration::from_millis(50);

/// What makes a disk another one: a change of anything else is done without unplugging it.
fn same_disk(a: &ResolvedDisk, b: &ResolvedDisk) -> bool {
    let medium = a.cdrom && b.cdrom;
    let plain = |d: &ResolvedDisk| {
        let mut d = d.clone();
        d.io.limits = Default::default();
        d.io.rates = None;
        // It stays with its thread, and what it was made with, until the next start.
        d.io.thread = None;
        d.io.options = Default::default();
        d.boot_priority = 0;
        d.name = String::new();
        d.mount_point = None;
        d.share = Default::default();
        // Whether others may write it too is said when it is plugged, and holds as long as it is.
        d.shared = false;
        // Opened anew each time.
        d.opened = None;
        d.key = None;
        // It is open, whatever opened it; but what is no container any more, or is one now, is another disk.
        d.io.secret = d.io.secret.map(|_| uuid::Uuid::nil());
        if medium {
            d.path = Default::default();
            d.ejected = false;
            d.backing = None;
            d.chain = Default::default();
            d.readonly = true;
            // One of a pool, or a path of the host.
            d.foreign = false;
            d.shift = false;
        }
        d
    };
    plain(a) == plain(b)
}

fn same_medium(a: &ResolvedDisk, b: &ResolvedDisk) -> bool {
    a.ejected == b.ejected && (a.ejected || a.path == b.path)
}

fn same_nic(a: &ResolvedNic, b: &ResolvedNic) -> bool {
    let plain = |n: &ResolvedNic| ResolvedNic {
        name: String::new(),
        guest_name: String::new(),
        disconnected: false,
        boot_priority: 0,
        options: Default::default(),
        ..n.clone()
    };
    plain(a) == plain(b)
}

/// One change of a machine.
struct Change<'a> {
    machine: &'a Inner,
    qmp: Qmp,
    events: mpsc::Receiver<Event>,
    layout: Layout,
    /// Ids of the devices that QEMU has.
    present: BTreeSet<String>,
}

/// Brings disks and NICs of a running machine to what `guest` says; answers the devices that wait for the next start.
/// The caller holds the machine's lock of changes.
///
/// # Errors
/// What a disk or tap lacks, what QEMU refuses, and conflict when the guest does not give a device back in time. What was
/// done until then is written down.
pub(crate) async fn apply(machine: &Inner, guest: &ResolvedGuest) -> Result<Vec<String>> {
    let (Some(applied), Some(mut wanted)) = (machine.record().devices.clone(), Devices::of(guest)) else {
        return Ok(vec![]);
    };
    if applied.disks == wanted.disks && applied.nics == wanted.nics {
        return Ok(vec![]);
    }
    // Not kept, but needed for what is new.
    for (disk, whole) in wanted.disks.iter_mut().zip(directories::drives(guest)) {
        disk.key = whole.key.clone();
    }
    // A thread, or options, that wait for the next start are no change.
    let plain = |disks: &[ResolvedDisk]| -> Vec<ResolvedDisk> {
        let mut disks = disks.to_vec();
        for disk in &mut disks {
            disk.io.thread = None;
            disk.io.options = Default::default();
            disk.key = None;
        }
        disks
    };
    if plain(&applied.disks) != plain(&wanted.disks) {
        copies::demand_none(machine).await?;
        backups::demand_none(machine).await?;
    }
    let layout = Layout::of(&applied.machine, applied.ports)?;
    let (qmp, events) = Qmp::connect(&machine.dir, launch::QMP, GREETING).await?;
    let mut change = Change { machine, qmp, events, layout, present: BTreeSet::new() };
    change.present = change.devices().await?;
    let mut pending = vec![];
    change.remove(&applied, &wanted, &mut pending).await?;
    change.adjust(&wanted, &mut pending).await?;
    change.add(&wanted, &mut pending).await?;
    pending.sort();
    pending.dedup();
    Ok(pending)
}

/// Grows the disk at a slot; the guest sees it at once.
///
/// # Errors
/// Conflict for a disk that cannot grow while the machine runs.
pub(crate) async fn grow(machine: &Inner, slot: &str, size: u64) -> Result<()> {
    if slot.starts_with("nvme") {
        return Err(Error::conflict("an NVMe disk cannot grow while the machine runs; stop it first"));
    }
    copies::demand_none(machine).await?;
    backups::demand_none(machine).await?;
    let (qmp, _) = Qmp::connect(&machine.dir, launch::QMP, GREETING).await?;
    let side = side(&qmp, slot).await?;
    bitmaps::drop_broken(&qmp, &side.of_layer('i', slot, layer(machine, slot))).await?;
    let node = side.name('d', slot);
    let encrypted = {
        let record = machine.record();
        let mut disks = record.devices.iter().flat_map(|d| &d.disks);
        disks.any(|d| d.slot == slot && d.io.secret.is_some())
    };
    // What stands before the content is in the size that is stored, and not in that of the disk.
    let before = match encrypted {
        true => keys::header(&qmp, &side.name('i', slot)).await?,
        false => 0,
    };
    let size = size.saturating_sub(before);
    qmp.execute("block_resize", json!({"node-name": node, "size": size})).await.map(drop)
}

/// The number of the file that is written of the disk at a slot, of those of a disk in layers.
pub(crate) fn layer(machine: &Inner, slot: &str) -> u32 {
    let record = machine.record();
    let mut disks = record.devices.iter().flat_map(|d| &d.disks);
    disks.find(|d| d.slot == slot).map_or(0, |d| d.chain.number)
}

/// The side that a slot's device drives; of an empty drive the first.
pub(crate) async fn side(qmp: &Qmp, slot: &str) -> Result<Side> {
    Ok(Side::of(&qmp.execute("query-block", json!({})).await?, slot).unwrap_or_default())
}

/// One property of everything that a query lists.
async fn names(qmp: &Qmp, query: &str, arguments: Value, property: &str) -> Result<BTreeSet<String>> {
    let list = qmp.execute(query, arguments).await?;
    let names = list.as_array().into_iter().flatten().filter_map(|d| d.get(property)?.as_str());
    Ok(names.map(str::to_owned).collect())
}

/// Gives QEMU the descriptors and nodes of a disk or disc, by the names of a side.
pub(crate) async fn add_nodes(qmp: &Qmp, disk: &ResolvedDisk, side: Side) -> Result<Disk> {
    let opened = tokio::task::spawn_blocking({
        let disk = disk.clone();
        move || Ok::<_, Error>((launch::open_disk(&disk)?, launch::open_lower(&disk)?))
    });
    let ((file, base, block), lower) =
        opened.await.map_err(|e| Error::internal("the disk could not be opened", e))??;
    let node = Disk { side, ..Disk::new(disk, block, true) };
    let (file_set, base_set) = node.fd_sets()?;
    let own = (layer_set(file_set, node.layer), &file);
    let lower = node.below.iter().map(|(number, _)| layer_set(file_set, *number)).zip(&lower);
    let all: Vec<_> = [own].into_iter().chain(base.as_ref().map(|b| (base_set, b))).chain(lower).collect();
    for (set, fd) in all {
        qmp.execute_with_fd("add-fd", json!({"fdset-id": set, "opaque": "disk"}), fd.as_fd()).await?;
    }
    let nodes = node.nodes()?;
    if node.encrypted {
        // Of an earlier try.
        keys::take_back(qmp, &node).await?;
        keys::give(qmp, disk, &node).await?;
    }
    let mut outcome = Ok(());
    for n in nodes {
        if outcome.is_ok() {
            outcome = qmp.execute("blockdev-add", n).await.map(drop);
        }
    }
    if node.encrypted {
        keys::take_back(qmp, &node).await?;
    }
    outcome.map(|()| node)
}

/// Takes the nodes and descriptors of a slot's side from QEMU; nothing may drive them.
pub(crate) async fn clear_nodes(qmp: &Qmp, slot: &str, side: Side) -> Result<()> {
    let nodes = names(qmp, "query-named-block-nodes", json!({"flat": true}), "node-name").await?;
    let [top, others @ ..] = Disk::node_names(slot, side);
    let layers = Disk::layer_names(slot, side, &nodes);
    let all = [top].into_iter().chain(layers).chain(others).filter(|n| nodes.contains(n));
    for node in all {
        delete_node(qmp, &node).await?;
    }
    let (a, b) = crate::devices::fd_sets(&format!("devices.{slot}"), slot, side)?;
    remove_sets(qmp, |set| set == b || layer_set(a, layer_of_set(a, set)) == set).await
}

/// Does QEMU refuse to take a node away because something has it, a device, or a node over it?
pub(crate) fn is_in_use(e: &Error) -> bool {
    e.context.as_deref().is_some_and(|c| c.contains("in use") || c.contains("is busy"))
}

/// Takes a node from QEMU that nothing has any more.
pub(crate) async fn delete_node(qmp: &Qmp, node: &str) -> Result<()> {
    // A device that has gone lets go of its node a little later.
    let until = Instant::now() + GREETING;
    while let Err(e) = qmp.execute("blockdev-del", json!({"node-name": node})).await {
        if !is_in_use(&e) || Instant::now() >= until {
            return Err(e);
        }
        sleep(LOOK).await;
    }
    Ok(())
}

/// Takes descriptor sets from QEMU.
pub(crate) async fn remove_sets(qmp: &Qmp, wanted: impl Fn(u32) -> bool) -> Result<()> {
    let sets = qmp.execute("query-fdsets", json!({})).await?;
    for set in sets.as_array().into_iter().flatten().filter_map(|s| s.get("fdset-id")?.as_u64()) {
        if u32::try_from(set).is_ok_and(&wanted) {
            qmp.execute("remove-fd", json!({"fdset-id": set})).await?;
        }
    }
    Ok(())
}

/// The same with the limits.
pub(crate) async fn clear_side(qmp: &Qmp, slot: &str, side: Side) -> Result<()> {
    clear_nodes(qmp, slot, side).await?;
    let objects = names(qmp, "qom-list", json!({"path": "/objects"}), "name").await?;
    let group = side.name('t', slot);
    if objects.contains(&group) {
        qmp.execute("object-del", json!({"id": group})).await?;
    }
    Ok(())
}

/// Says what has to be said before the first instruction.
///
/// # Errors
/// What QEMU refuses.
pub(crate) async fn before_first(qmp: &Qmp, guest: &ResolvedGuest) -> Result<()> {
    for nic in guest.nics.iter().filter(|n| n.disconnected) {
        qmp.execute("set_link", json!({"name": nic.slot, "up": false})).await?;
    }
    Ok(())
}

impl Change<'_> {
    /// The ids of the devices that QEMU has.
    async fn devices(&self) -> Result<BTreeSet<String>> {
        names(&self.qmp, "qom-list", json!({"path": "/machine/peripheral"}), "name").await
    }

    fn note(&self, change: impl FnOnce(&mut Devices)) -> Result<()> {
        let mut record = self.machine.record();
        let record: &mut Record = &mut record;
        if let Some(devices) = &mut record.devices {
            change(devices);
        }
        record.write(&self.machine.dir)
    }

    fn written(&self) -> Result<Devices> {
        let devices = self.machine.record().devices.clone();
        devices.ok_or_else(|| Error::internal("the guest's devices are not known", "no record of them"))
    }

    async fn remove(&mut self, applied: &Devices, wanted: &Devices, pending: &mut Vec<String>) -> Result<()> {
        for disk in &applied.disks {
            if wanted.disks.iter().any(|w| w.slot == disk.slot && same_disk(w, disk)) {
                continue;
            }
            // The root stays where it is whatever happens; what cannot go waits for the next start.
            // The first disk is another where the guest does not see its root.
            let root = self.machine.record().root == disk.path;
            let there = self.present.contains(&device_id(&disk.slot));
            if there && (root || !Disk::new(disk, false, true).hotplug(self.layout)?) {
                pending.push(format!("devices.{}", disk.name));
                continue;
            }
            self.unplug(&device_id(&disk.slot), &disk.name).await?;
            self.clear_disk(&disk.slot).await?;
            self.note(|d| d.disks.retain(|x| x.slot != disk.slot))?;
        }
        for nic in &applied.nics {
            if wanted.nics.iter().any(|w| w.slot == nic.slot && same_nic(w, nic)) {
                continue;
            }
            if self.present.contains(&nic.slot) && !Nic::new(nic).hotplug(self.layout) {
                pending.push(format!("devices.{}", nic.name));
                continue;
            }
            self.unplug(&nic.slot, &nic.name).await?;
            self.clear_nic(&nic.slot).await?;
            launch::drop_link(nic)?;
            self.note(|d| d.nics.retain(|x| x.slot != nic.slot))?;
        }
        Ok(())
    }

    /// Limits, discs and cables of what stays.
    async fn adjust(&mut self, wanted: &Devices, pending: &mut Vec<String>) -> Result<()> {
        let now = self.written()?;
        for disk in &wanted.disks {
            let Some(old) = now.disks.iter().find(|d| d.slot == disk.slot && same_disk(d, disk)) else {
                continue;
            };
            if !self.present.contains(&device_id(&disk.slot)) {
                continue;
            }
            if rates(&old.io) != rates(&disk.io) {
                let limits = Disk::new(disk, false, true).throttle();
                let side = side(&self.qmp, &disk.slot).await?;
                let group = format!("/objects/{}", side.name('t', &disk.slot));
                let set = json!({"path": group, "property": "limits", "value": limits});
                self.qmp.execute("qom-set", set).await?;
            }
            if disk.cdrom && !same_medium(old, disk) {
                self.change_medium(disk).await?;
            }
            if old.boot_priority != disk.boot_priority {
                pending.push(format!("devices.{}.boot.priority", disk.name));
            }
            if (old.io.thread, old.io.options) != (disk.io.thread, disk.io.options) {
                pending.push(format!("devices.{}", disk.name));
            }
            self.note(|d| {
                if let Some(d) = d.disks.iter_mut().find(|d| d.slot == disk.slot) {
                    let (thread, options) = (d.io.thread, d.io.options);
                    *d = Devices::without_key(disk);
                    (d.io.thread, d.io.options) = (thread, options);
                }
            })?;
        }
        for nic in &wanted.nics {
            let Some(old) = now.nics.iter().find(|n| n.slot == nic.slot && same_nic(n, nic)) else {
                continue;
            };
            if !self.present.contains(&nic.slot) {
                continue;
            }
            if old.disconnected != nic.disconnected {
                let link = json!({"name": nic.slot, "up": !nic.disconnected});
                self.qmp.execute("set_link", link).await?;
            }
            if old.boot_priority != nic.boot_priority {
                pending.push(format!("devices.{}.boot.priority", nic.name));
            }
            if old.options != nic.options {
                pending.push(format!("devices.{}", nic.name));
            }
            self.note(|d| {
                if let Some(n) = d.nics.iter_mut().find(|n| n.slot == nic.slot) {
                    let options = n.options;
                    *n = nic.clone();
                    n.options = options;
                }
            })?;
        }
        Ok(())
    }

    async fn add(&mut self, wanted: &Devices, pending: &mut Vec<String>) -> Result<()> {
        for disk in &wanted.disks {
            let waits = pending.contains(&format!("devices.{}", disk.name));
            if waits || self.present.contains(&device_id(&disk.slot)) {
                continue;
            }
            if !Disk::new(disk, false, true).hotplug(self.layout)? {
                pending.push(format!("devices.{}", disk.name));
                continue;
            }
            self.note(|d| {
                d.disks.retain(|x| x.slot != disk.slot);
                d.disks.push(Devices::without_key(disk));
            })?;
            self.clear_disk(&disk.slot).await?;
            if let Err(e) = self.plug_disk(disk).await {
                self.clear_disk(&disk.slot).await?;
                self.note(|d| d.disks.retain(|x| x.slot != disk.slot))?;
                let said = e.context.clone().unwrap_or_default();
                return Err(match keys::explain(&said, Some(disk)) {
                    Some(explained) => explained.with_context(said),
                    None => refused(e, &disk.name),
                });
            }
            self.machine.tell(Happened::DeviceAdded { slot: disk.slot.clone() });
        }
        for nic in &wanted.nics {
            let waits = pending.contains(&format!("devices.{}", nic.name));
            if waits || self.present.contains(&nic.slot) {
                continue;
            }
            if !Nic::new(nic).hotplug(self.layout) {
                pending.push(format!("devices.{}", nic.name));
                continue;
            }
            self.note(|d| {
                d.nics.retain(|x| x.slot != nic.slot);
                d.nics.push(nic.clone());
            })?;
            self.clear_nic(&nic.slot).await?;
            if let Err(e) = self.plug_nic(nic).await {
                self.clear_nic(&nic.slot).await?;
                launch::drop_link(nic)?;
                self.note(|d| d.nics.retain(|x| x.slot != nic.slot))?;
                return Err(refused(e, &nic.name));
            }
            self.machine.tell(Happened::DeviceAdded { slot: nic.slot.clone() });
        }
        Ok(())
    }

    async fn plug_disk(&self, disk: &ResolvedDisk) -> Result<()> {
        self.qmp.execute("object-add", Disk::new(disk, false, true).group()).await?;
        let disk = if disk.ejected {
            Disk::new(disk, false, true)
        } else {
            add_nodes(&self.qmp, disk, Side::First).await?
        };
        self.qmp.execute("device_add", disk.device(self.layout)?).await.map(drop)
    }

    async fn plug_nic(&self, nic: &ResolvedNic) -> Result<()> {
        let device = Nic::new(nic);
        let name = format!("tap-{}", nic.slot);
        if !device.user {
            let tap = launch::open_tap(&self.machine.dir, nic)?;
            self.qmp.execute_with_fd("getfd", json!({"fdname": name}), tap.as_fd()).await?;
        }
        self.qmp.execute("netdev_add", device.host(&name)).await?;
        self.qmp.execute("device_add", device.device(self.layout)?).await?;
        if nic.disconnected {
            self.qmp.execute("set_link", json!({"name": nic.slot, "up": false})).await?;
        }
        Ok(())
    }

    /// Asks the guest to give a device back and waits until it has; nothing to do when it is not there.
    async fn unplug(&mut self, id: &str, name: &str) -> Result<()> {
        if !self.present.contains(id) {
            return Ok(());
        }
        let until = Instant::now() + UNPLUG;
        let mut ask = Instant::now();
        loop {
            let now = self.devices().await?;
            if !now.contains(id) {
                self.present = now;
                return Ok(());
            }
            while let Ok(event) = self.events.try_recv() {
                if event.name == "DEVICE_UNPLUG_GUEST_ERROR" {
                    return Err(keeps(name));
                }
            }
            if Instant::now() >= until {
                return Err(keeps(name));
            }
            if Instant::now() >= ask {
                // Said again: a guest that still boots misses the first time. QEMU refuses while it waits already.
                ask += Duration::from_secs(6);
                if let Err(e) = self.qmp.execute("device_del", json!({"id": id})).await {
                    tracing::debug!(error = %e, context = e.context, device = name, "a device is not asked for now");
                }
            }
            sleep(LOOK).await;
        }
    }

    /// Removes nodes, limits and descriptors of a slot whose device is gone.
    async fn clear_disk(&self, slot: &str) -> Result<()> {
        for side in Side::BOTH {
            clear_side(&self.qmp, slot, side).await?;
        }
        Ok(())
    }

    async fn clear_nic(&self, slot: &str) -> Result<()> {
        match self.qmp.execute("netdev_del", json!({"id": Nic::netdev(slot)})).await {
            Err(e) if e.is(ErrorKind::Internal) => {} // there was none
            other => drop(other?),
        }
        match self.qmp.execute("closefd", json!({"fdname": format!("tap-{slot}")})).await {
            Err(e) if e.is(ErrorKind::Internal) => Ok(()), // as above
            other => other.map(drop),
        }
    }

    /// Another disc, or none.
    async fn change_medium(&self, disk: &ResolvedDisk) -> Result<()> {
        let id = device_id(&disk.slot);
        // A guest that has locked the tray is asked by this, and not waited for: the user's word counts.
        self.qmp.execute("blockdev-open-tray", json!({"id": id, "force": true})).await?;
        self.qmp.execute("blockdev-remove-medium", json!({"id": id})).await?;
        clear_nodes(&self.qmp, &disk.slot, Side::First).await?;
        if !disk.ejected {
            let node = add_nodes(&self.qmp, disk, Side::First).await?.top();
            self.qmp.execute("blockdev-insert-medium", json!({"id": id, "node-name": node})).await?;
        }
        self.qmp.execute("blockdev-close-tray", json!({"id": id})).await.map(drop)
    }
}

fn keeps(name: &str) -> Error {
    Error::conflict(format!(
        "the guest does not give the device {name:?} back; release it inside (unmount it) and try again, or stop the guest"
    ))
    .at(format!("devices.{name}"))
}

/// A refusal of QEMU's, in words and with the device.
fn refused(e: Error, name: &str) -> Error {
    let field = format!("devices.{name}");
    let context = e.context.clone().unwrap_or_default();
    if context.contains("write\" lock") {
        return Error::conflict(format!("the disk of {name:?} is in use by another program"))
            .at(field)
            .with_context(context);
    }
    if e.field.is_some() { e } else { e.at(field) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_guest::DiskFormat;

    fn disk() -> ResolvedDisk {
        karst_guest::samples::disk("d", "scsi1", "/a", DiskFormat::Raw)
    }

    #[test]
    fn only_what_makes_another_disk_unplugs_it() {
        let a = disk();
        let mut b = ResolvedDisk { boot_priority: 3, ..disk() };
        b.io.thread = Some(1);
        b.io.options.rotation = Some(7200);
        b.io.rates = Some(karst_model::device::Rates::parse("f", "total-bytes=5").unwrap());
        b.io.limits.read = Some(karst_model::device::DiskRate::Operations { per_second: 5 });
        assert!(same_disk(&a, &b));
        assert!(same_disk(&a, &ResolvedDisk { shared: true, ..disk() }), "its guest has it in use");
        assert!(!same_disk(&a, &ResolvedDisk { path: "/b".into(), ..disk() }));
        let null = std::fs::File::open("/dev/null").unwrap();
        let opened = Some(karst_guest::Opened(std::sync::Arc::new(null.into())));
        assert!(
            same_disk(&a, &ResolvedDisk { opened, ..disk() }),
            "of a path it is the same, opened once more"
        );
        assert!(!same_disk(&a, &ResolvedDisk { readonly: true, ..disk() }));
        let disc = ResolvedDisk { cdrom: true, readonly: true, ..disk() };
        let other = ResolvedDisk { path: "/b".into(), ..disc.clone() };
        assert!(same_disk(&disc, &other) && !same_medium(&disc, &other), "a disc is changed in its drive");
        let empty = ResolvedDisk { ejected: true, ..other.clone() };
        assert!(same_medium(&empty, &ResolvedDisk { ejected: true, ..disc }) && !same_medium(&empty, &other));
    }
}
