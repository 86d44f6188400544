//! Disks that an instance does not own: what it may attach, also as its root, and what must not be at work on it when it starts.

use super::expand::ParsedDevices;
use crate::{Records, Row, context::Context, db::Tx, saga::runner, volumes};
use karst_model::{
    Error, Missing, Result,
    access::Permission,
    device::{Devices, DiskBus, DiskDevice, DiskLimits, DiskOrigin, host_drive},
    instance::{Instance, InstanceKind},
    keys::parse_bool,
    spec::GuestSpec,
    storage::{Volume, VolumeContent},
};
use std::collections::BTreeMap;

/// What disks beside the root name exists, fits the instance, and may be used by it. The volumes are touched: whoever
/// deletes one, or decides that nobody else has it, compares that.
///
/// # Errors
/// Not found, invalid or conflict, naming the device and key.
pub(crate) fn check_disks(
    records: &Records,
    tx: &mut Tx,
    instance: &Instance,
    parsed: &ParsedDevices,
) -> Result<()> {
    let mut seen = std::collections::BTreeSet::new();
    if let Some(row) = custom_root(records, instance, parsed)? {
        seen.insert(row.id);
        take(records, tx, instance, row, &parsed.root.0)?;
    }
    for (device, disk) in &parsed.disks {
        let DiskOrigin::Volume { pool, volume } = &disk.source else {
            check_drive(records, tx, instance, device, disk)?;
            continue;
        };
        let row = find(records, instance, device, pool, volume)?;
        check_content(instance.kind, row, device, disk)?;
        if !seen.insert(row.id) && !row.is_shared() {
            return Err(Error::conflict(format!("two disks of the instance are block volume {volume:?}"))
                .at(format!("devices.{device}.source")));
        }
        take(records, tx, instance, row, device)?;
    }
    if let Some((device, kernel)) = &parsed.kernel {
        for (key, file) in kernel.files() {
            let DiskOrigin::Volume { pool, volume } = file else { continue };
            let row = find(records, instance, device, pool, volume)
                .map_err(|e| if key == "source" { e } else { e.at(format!("devices.{device}.{key}")) })?;
            if !row.content.is_disk() {
                let text =
                    format!("volume {volume:?} is {}; a kernel is on a disk or a disc", called(row.content));
                return Err(Error::invalid(format!("devices.{device}.{key}"), text));
            }
            // Only read: whoever else has it is no hindrance.
            let lock = volumes::lock(row.id);
            runner::demand_unlocked(records, std::slice::from_ref(&lock))?;
            tx.expect_unlocked(&lock);
            tx.expect(row);
            tx.touch(&lock);
        }
    }
    Ok(())
}

/// What a virtual machine has as a drive of the host's paths is its own device, and in no other machine as long as it may be
/// written. Discs are read, by as many as like.
fn check_drive(
    records: &Records,
    tx: &mut Tx,
    instance: &Instance,
    device: &str,
    disk: &DiskDevice,
) -> Result<()> {
    let (DiskOrigin::Host { path }, false, InstanceKind::VirtualMachine) =
        (&disk.source, disk.is_directory(), instance.kind)
    else {
        return Ok(());
    };
    let field = |key: &str| format!("devices.{device}.{key}");
    if !instance.devices.contains_key(device) {
        let text = format!(
            "{path:?} is a path of the host, which is a device of the instance itself and of no profile"
        );
        return Err(Error::invalid(field("source"), text));
    }
    if disk.is_disc() {
        return match disk.io.bus {
            None | Some(DiskBus::VirtioScsi | DiskBus::Sata | DiskBus::Ide) => Ok(()),
            Some(_) => {
                Err(Error::invalid(field("io.bus"), "a disc is in a drive of virtio-scsi, sata or ide"))
            }
        };
    }
    if !disk.attached {
        let text = format!("{path:?} is no disc, which alone leaves its drive. Remove the device");
        return Err(Error::invalid(field("attached"), text));
    }
    let is = |devices: &Devices| devices.values().any(|keys| host_drive(keys) == Some(path.as_str()));
    let runs_with = |i: &Instance| records.runtimes.get(&i.id).and_then(|r| r.applied.as_ref());
    let has = |i: &Instance| is(&i.devices) || runs_with(i).is_some_and(|run| is(&run.devices));
    if let Some(other) = records.instances.values().find(|i| i.id != instance.id && has(i)) {
        return Err(Error::conflict(format!(
            "{path:?} is a drive of {}; remove it there first",
            super::called(instance.project, other)
        ))
        .at(field("source")));
    }
    let target = format!("host-drives{path}");
    tx.expect_untouched(records, &target);
    tx.touch(&target);
    Ok(())
}

/// Only who administers the server says which of the host's paths a machine has as a drive, and which machine goes out as the
/// host itself; `now` are the devices that it has. What the host grants at all is its own policy's.
///
/// # Errors
/// Forbidden, naming the device.
pub(crate) fn demand_drives(context: &Context, now: &Devices, wanted: &Devices) -> Result<()> {
    let user = |keys: &BTreeMap<String, String>| {
        let is = |key: &str, value: &str| keys.get(key).is_some_and(|v| v == value);
        is("type", "nic") && is("nictype", "user")
    };
    let out =
        wanted.iter().find(|(device, keys)| user(keys) && now.get(*device).is_none_or(|had| !user(had)));
    if let Some((device, _)) = out.filter(|_| !context.principal().may(Permission::ServerEdit, None)) {
        let text = "only administrators of the server let a machine out as the host itself; use a network";
        return Err(Error::forbidden(text).at(format!("devices.{device}.nictype")));
    }
    let end = |keys: &BTreeMap<String, String>| {
        let port = keys.get("type").is_some_and(|t| t == "port");
        let of_host =
            ["path", "address", "log"].iter().any(|key| keys.get(*key).is_some_and(|v| !v.is_empty()));
        port && of_host
    };
    let new = wanted.iter().find(|(device, keys)| end(keys) && now.get(*device) != Some(*keys));
    if let Some((device, _)) = new.filter(|_| !context.principal().may(Permission::ServerEdit, None)) {
        let text = "only administrators of the server lead ports of a machine to paths and addresses of the host; use to=stream";
        return Err(Error::forbidden(text).at(format!("devices.{device}.to")));
    }
    let input = |keys: &BTreeMap<String, String>| keys.get("type").is_some_and(|t| t == "input");
    let new = wanted.iter().find(|(device, keys)| input(keys) && now.get(*device) != Some(*keys));
    if let Some((device, _)) = new.filter(|_| !context.principal().may(Permission::ServerEdit, None)) {
        let text = "only administrators of the server give a machine what somebody types and points with at the host";
        return Err(Error::forbidden(text).at(format!("devices.{device}.source")));
    }
    let new = wanted.iter().find(|(device, keys)| gains(now.get(*device), keys));
    let Some((device, _)) = new.filter(|_| !context.principal().may(Permission::ServerEdit, None)) else {
        return Ok(());
    };
    let text = "only administrators of the server give a machine a path of the host as a drive; use a volume of a pool";
    Err(Error::forbidden(text).at(format!("devices.{device}.source")))
}

/// Does a device become a drive of the host's that it was not, or one that its machine may write to now?
fn gains(before: Option<&BTreeMap<String, String>>, keys: &BTreeMap<String, String>) -> bool {
    let Some(path) = host_drive(keys) else { return false };
    let readonly = |keys: &BTreeMap<String, String>| {
        keys.get("readonly").is_some_and(|v| parse_bool("readonly", v).unwrap_or(false))
    };
    // Read as another format or kind it is another thing.
    let same = |had: &&BTreeMap<String, String>| {
        ["format", "media"]
            .iter()
            .all(|key| had.get(*key).unwrap_or(&String::new()) == keys.get(*key).unwrap_or(&String::new()))
    };
    let had = before.filter(|keys| host_drive(keys) == Some(path)).filter(same);
    had.is_none_or(|had| readonly(had) && !readonly(keys))
}

fn find<'a>(
    records: &'a Records,
    instance: &Instance,
    device: &str,
    pool: &str,
    volume: &str,
) -> Result<&'a Row<Volume>> {
    let field = |key: &str| format!("devices.{device}.{key}");
    records.pool(pool).map_err(|e| e.at(field("pool")))?;
    records.custom_volume(instance.project, pool, volume).ok_or_else(|| {
        let text = format!("custom volume {volume:?} not found in pool {pool:?}");
        Error::missing(Missing::Volume, text).at(field("source"))
    })
}

/// The custom volume that is an instance's root disk, if it is one.
///
/// # Errors
/// Not found, invalid or unsupported, naming the device and key.
pub(crate) fn custom_root<'a>(
    records: &'a Records,
    instance: &Instance,
    parsed: &ParsedDevices,
) -> Result<Option<&'a Row<Volume>>> {
    let (device, root) = &parsed.root;
    let Some(volume) = &root.source else { return Ok(None) };
    let field = format!("devices.{device}.source");
    if instance.kind == InstanceKind::Container {
        return Err(Error::unsupported("the root of a container is a volume of its own").at(field));
    }
    let row = find(records, instance, device, &root.pool, volume)?;
    match row.content {
        VolumeContent::Block => Ok(Some(row)),
        other => Err(Error::invalid(
            field,
            format!("volume {volume:?} is of type {:?}; a root disk is a block volume", other.as_str()),
        )),
    }
}

/// The instance may use the volume, and does from now on.
fn take(records: &Records, tx: &mut Tx, instance: &Instance, row: &Row<Volume>, device: &str) -> Result<()> {
    let lock = volumes::lock(row.id);
    runner::demand_unlocked(records, std::slice::from_ref(&lock))?;
    tx.expect_unlocked(&lock);
    if !row.is_shared() {
        if let Some(other) = volumes::attached(records, row).into_iter().find(|i| i.id != instance.id) {
            return Err(Error::conflict(format!(
                "block volume {:?} is attached to {}; set security.shared=true on it if what is in it may be used by several at once",
                row.name,
                super::called(instance.project, &other)
            ))
            .at(format!("devices.{device}.source")));
        }
        tx.expect_untouched(records, &lock);
    }
    tx.expect(row);
    tx.touch(&lock);
    Ok(())
}

fn check_content(kind: InstanceKind, volume: &Volume, device: &str, disk: &DiskDevice) -> Result<()> {
    let field = format!("devices.{device}.path");
    match (volume.content, kind, disk.is_directory()) {
        (VolumeContent::Filesystem, _, false) => Err(Error::invalid(
            field,
            "a file system needs a path where it is mounted in the guest; a virtual machine can do with a tag",
        )),
        // What a machine shares is checked with the rest of its devices.
        (VolumeContent::Filesystem, ..) => Ok(()),
        (content, InstanceKind::Container, _) => Err(Error::invalid(
            format!("devices.{device}.source"),
            format!("{:?} is {}; containers can attach file systems only", volume.name, called(content)),
        )),
        (content, InstanceKind::VirtualMachine, true) => Err(Error::invalid(
            field,
            format!("{} has no path and no tag; the guest sees it as a drive", called(content)),
        )),
        (VolumeContent::Block, ..) if !disk.attached => Err(Error::invalid(
            format!("devices.{device}.attached"),
            format!("{:?} is a block volume; only a disc leaves its drive. Remove the device", volume.name),
        )),
        (VolumeContent::Iso, ..)
            if !matches!(disk.io.bus, None | Some(DiskBus::VirtioScsi | DiskBus::Sata | DiskBus::Ide)) =>
        {
            Err(Error::invalid(
                format!("devices.{device}.io.bus"),
                "a disc is in a drive of virtio-scsi, sata or ide",
            ))
        }
        (_, InstanceKind::VirtualMachine, false) => Ok(()),
    }
}

/// Refuses what is said of directories of virtual machines alone.
pub(crate) fn demand_no_share(device: &str, disk: &DiskDevice) -> Result<()> {
    let key = match (&disk.share.tag, disk.share.options.is_usual()) {
        (Some(_), _) => "tag",
        (None, false) => "share.options",
        (None, true) => return Ok(()),
    };
    let text = "is said of a directory that a virtual machine shares; a container has it mounted at a path";
    Err(Error::invalid(format!("devices.{device}.{key}"), text))
}

/// Does a disk of a virtual machine fit as what it is: a directory that it shares with its host, which has a path or a tag, or a drive?
pub(crate) fn check_directory(device: &str, disk: &DiskDevice, stateful: bool) -> Result<()> {
    let field = |key: &str| format!("devices.{device}.{key}");
    if !disk.is_directory() {
        return match disk.io.bus {
            Some(DiskBus::Plan9 | DiskBus::Virtiofs) => Err(Error::invalid(
                field("io.bus"),
                "that is how directories are shared, which need a path or a tag; a drive has virtio-scsi, virtio-blk, nvme or sata",
            )),
            _ => Ok(()),
        };
    }
    if let Some(path) = disk.path.as_ref().filter(|p| ["/dev", "/proc", "/sys"].contains(&p.as_str())) {
        return Err(Error::invalid(field("path"), format!("nothing can be mounted at {path:?}")));
    }
    match disk.io.bus {
        None | Some(DiskBus::Plan9) => {}
        Some(DiskBus::Virtiofs) if disk.io.limits == DiskLimits::default() => {}
        Some(DiskBus::Virtiofs) => {
            return Err(Error::invalid(
                field("io.bus"),
                "virtiofs has no limits of rates; set io.bus=9p, or unset limits.read, limits.write and limits.max",
            ));
        }
        Some(_) => {
            return Err(Error::invalid(
                field("io.bus"),
                "a directory is shared by virtiofs or 9p and on no bus of drives; leave io.bus out, or set io.bus=9p",
            ));
        }
    }
    if disk.io.cache.is_some() {
        let text = "a shared directory has no cache mode; the guest chooses one when it mounts it";
        return Err(Error::invalid(field("io.cache"), text));
    }
    if disk.io.options != Default::default() {
        return Err(Error::invalid(field("io.options"), "a shared directory has no options of a drive"));
    }
    if disk.boot_priority.is_some() && disk.io.bus != Some(DiskBus::Virtiofs) {
        let text = "a machine boots from a shared directory by virtiofs alone; set io.bus=virtiofs";
        return Err(Error::invalid(field("boot.priority"), text));
    }
    if disk.follow {
        return Err(Error::unsupported(
            "a virtual machine sees of the host's mounts those of its start; use recursive=true",
        )
        .at(field("propagation")));
    }
    if stateful {
        return Err(Error::unsupported(
            "the memory of a virtual machine that shares directories cannot be kept; unset migration.stateful",
        )
        .at(field(if disk.path.is_some() { "path" } else { "tag" })));
    }
    Ok(())
}

fn called(content: VolumeContent) -> &'static str {
    match content {
        VolumeContent::Filesystem => "a file system",
        VolumeContent::Block => "a block volume",
        VolumeContent::Iso => "a disc (ISO volume)",
    }
}

/// Nothing is at work on the volumes that a start is to attach (a restore, a resize), and nothing begins meanwhile.
pub(crate) fn demand_idle(records: &Records, tx: &mut Tx, spec: &GuestSpec) -> Result<()> {
    let disks = spec.disks.iter().filter_map(|d| d.volume());
    let kernel = spec.machine.iter().filter_map(|m| m.kernel.as_ref()).flat_map(|k| k.volumes());
    let all: std::collections::BTreeSet<_> =
        disks.chain(kernel).chain([(spec.root.pool, spec.root.volume)]).collect();
    for (pool, volume) in all {
        if let Some(pool) = records.pools.get(&pool) {
            crate::storage::life::demand_active(pool)?;
        }
        let lock = volumes::lock(volume);
        runner::demand_unlocked(records, std::slice::from_ref(&lock))?;
        tx.expect_unlocked(&lock);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::device::Device;

    #[test]
    fn a_drive_of_the_host_is_kept_or_tightened_and_never_gained() {
        let drive = |more: &[(&str, &str)]| {
            let keys = [("type", "disk"), ("source", "/dev/sdb")].into_iter().chain(more.iter().copied());
            keys.map(|(k, v)| (k.to_owned(), v.to_owned())).collect::<BTreeMap<_, _>>()
        };
        let (written, read) = (drive(&[]), drive(&[("readonly", "true")]));
        assert!(gains(None, &read) && gains(None, &written));
        assert!(gains(Some(&read), &written), "what is read is not written next");
        assert!(gains(Some(&read), &drive(&[("readonly", "no")])));
        assert!(
            !gains(Some(&read), &read) && !gains(Some(&written), &written) && !gains(Some(&written), &read)
        );
        assert!(!gains(Some(&read), &drive(&[("readonly", "on"), ("boot.priority", "3")])));
        assert!(gains(Some(&drive(&[("source", "/dev/sdc")])), &written), "another path");
        assert!(gains(Some(&written), &drive(&[("format", "qcow2")])), "another format");
        assert!(gains(Some(&drive(&[("media", "cdrom")])), &written), "another kind");
        assert!(!gains(None, &drive(&[("pool", "default")])), "a volume");
    }

    fn disk(keys: &[(&str, &str)]) -> DiskDevice {
        let all = [("type", "disk"), ("source", "/srv/shared")].iter().chain(keys);
        let keys: std::collections::BTreeMap<String, String> =
            all.map(|(k, v)| (k.to_string(), v.to_string())).collect();
        match Device::parse("d", &keys).unwrap() {
            Device::Disk(disk) => disk,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_a_machine_shares_is_a_directory_and_nothing_else() {
        let check = |keys: &[(&str, &str)], stateful: bool| check_directory("d", &disk(keys), stateful);
        let path = ("path", "/mnt/data");
        for good in [
            &[path][..],
            &[path, ("io.bus", "9p"), ("limits.read", "1MiB")],
            &[path, ("io.bus", "virtiofs"), ("readonly", "true"), ("recursive", "true"), ("shift", "true")],
            &[path, ("io.bus", "auto"), ("limits.max", "50iops")],
            &[path, ("readonly", "true"), ("recursive", "true"), ("shift", "true"), ("limits.max", "1MiB")],
            &[("io.bus", "nvme"), ("boot.priority", "1")],
            &[("tag", "data")],
            &[
                ("tag", "data"),
                path,
                ("io.bus", "virtiofs"),
                ("boot.priority", "1"),
                ("share.options", "cache=none"),
            ],
        ] {
            check(good, false).unwrap();
        }
        for (keys, stateful, field) in [
            (&[path, ("io.bus", "nvme")][..], false, "devices.d.io.bus"),
            (&[("io.bus", "9p")], false, "devices.d.io.bus"),
            (&[("io.bus", "virtiofs")], false, "devices.d.io.bus"),
            (&[path, ("io.bus", "virtiofs"), ("limits.max", "1MiB")], false, "devices.d.io.bus"),
            (&[path, ("io.bus", "virtiofs"), ("limits.write", "9iops")], false, "devices.d.io.bus"),
            (&[path, ("io.bus", "virtiofs")], true, "devices.d.path"),
            (&[path, ("io.cache", "none")], false, "devices.d.io.cache"),
            (&[path, ("io.options", "rotation=1")], false, "devices.d.io.options"),
            (&[path, ("boot.priority", "1")], false, "devices.d.boot.priority"),
            (&[path, ("propagation", "rslave")], false, "devices.d.propagation"),
            (&[("path", "/proc")], false, "devices.d.path"),
            (&[path], true, "devices.d.path"),
            (&[("tag", "data")], true, "devices.d.tag"),
            (&[("tag", "data"), ("io.bus", "9p"), ("boot.priority", "1")], false, "devices.d.boot.priority"),
            (&[("tag", "data"), ("io.bus", "nvme")], false, "devices.d.io.bus"),
        ] {
            assert_eq!(check(keys, stateful).unwrap_err().field.as_deref(), Some(field), "{keys:?}");
        }
        check(&[("io.bus", "virtio-blk")], true).expect("its drives can be kept");
        demand_no_share("d", &disk(&[path])).unwrap();
        for (keys, field) in [
            (&[("tag", "t")][..], "devices.d.tag"),
            (&[path, ("share.options", "packed")], "devices.d.share.options"),
        ] {
            assert_eq!(demand_no_share("d", &disk(keys)).unwrap_err().field.as_deref(), Some(field));
        }
    }
}
