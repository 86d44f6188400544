//! What a running machine has done: its disks, processors and interfaces.

use super::{Answered, Named, devices::parameters, domain::is_running, nothing};
use crate::{
    error::{Code, VirError},
    limits,
    session::{Call, Driver},
    xdr::{Typed, Writer},
    xml::machine::{is_no_drive, owned, read::VOLUMES, target},
};
use karst_engine::{InstanceView, Records, Row};
use karst_model::{
    device::{DISK_BUSES, DiskBus},
    guest::{DiskFigures, MachineFigures, NicFigures},
    options::DiskOptions,
    storage::Volume,
    threads::Thread,
};

/// A disk of a domain.
pub(crate) struct Disk {
    /// Its bus slot.
    pub slot: String,
    /// Its name in libvirt's words, such as `vda`.
    pub target: String,
    /// What is in it; nothing in an empty drive.
    pub volume: Option<Row<Volume>>,
    /// The volume's path in libvirt's words.
    pub path: Option<String>,
    /// The serial number that it shows to its guest.
    pub serial: String,
}

/// Characters of a serial number that a bus has, on SCSI and elsewhere.
const SHOWN: (usize, usize) = (36, 20);

/// The serial number that a disk shows: its own, or one that is made of the name of its device.
fn serial(name: &str, bus: DiskBus, options: &DiskOptions) -> String {
    let most = if bus == DiskBus::VirtioScsi { SHOWN.0 } else { SHOWN.1 };
    let whole = match &options.serial {
        Some(own) => own.as_str().to_owned(),
        None => format!("incus_{name}"),
    };
    whole.chars().take(most).collect()
}

/// As systems write what devices say of themselves in one word: without what lies around it, and `_` for what has no place there.
fn in_a_word(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "#+-.:=@_".contains(c);
    let spaced = text.split_whitespace().collect::<Vec<_>>().join("_");
    spaced.chars().map(|c| if plain(c) { c } else { '_' }).collect()
}

/// The disk of which the system inside tells this serial number: as it is, or behind who made the disk and what it is, and before
/// what that system counts of it (LUNs on USB, namespaces of NVMe).
pub(super) fn by_serial<'a>(disks: &'a [Disk], told: &str) -> Option<&'a Disk> {
    let told = in_a_word(told);
    let at_the_end = |told: &str| -> Option<&'a Disk> {
        let is = |disk: &&Disk| {
            let before = told.strip_suffix(in_a_word(&disk.serial).as_str());
            before.is_some_and(|before| before.is_empty() || before.ends_with('_'))
        };
        // Of two, one of which ends as the other is called, the one that says more.
        disks.iter().filter(is).max_by_key(|disk| disk.serial.len())
    };
    at_the_end(&told)
        .or_else(|| ["-0:0", "_1"].into_iter().find_map(|end| at_the_end(told.strip_suffix(end)?)))
}

/// Disks of a domain, by target: those that it runs with, else those of its next start.
pub(crate) fn disks(records: &Records, view: &InstanceView) -> Vec<Disk> {
    let applied = view.runtime.as_ref().and_then(|r| r.applied.as_ref()).filter(|_| is_running(view));
    let mut all = vec![];
    let devices = applied.map_or(&view.expanded_devices, |a| &a.devices);
    for (name, keys) in devices {
        let key = |key: &str| keys.get(key).map(String::as_str);
        let Some(identity) = view.identity(name, devices).filter(|_| key("type") == Some("disk")) else {
            continue;
        };
        if is_no_drive(identity) {
            continue;
        }
        let said = DISK_BUSES.iter().find(|(n, _)| Some(*n) == key("io.bus")).map(|(_, b)| *b);
        let bus = said.unwrap_or(DiskBus::VirtioScsi);
        let root = key("path") == Some("/");
        let (volume, path) = match (key("pool"), key("source")) {
            (Some(pool), Some(source)) => (
                records.custom_volume(view.instance.project, pool, source).cloned(),
                Some(format!("{VOLUMES}{pool}/{source}")),
            ),
            (pool, _) if root => (
                records.volumes.get(&view.instance.root).cloned(),
                pool.map(|pool| format!("{VOLUMES}{pool}/{}", owned(&view.instance.name))),
            ),
            _ => (None, None),
        };
        // They were read when they were written.
        let options = key("io.options").and_then(|text| DiskOptions::parse("", text, said).ok());
        all.push(Disk {
            slot: identity.slot.clone(),
            target: target(&identity.slot, bus).0,
            volume,
            path,
            serial: serial(name, bus, &options.unwrap_or_default()),
        });
    }
    all.sort_by(|a, b| a.target.cmp(&b.target));
    all
}

pub(super) fn disk(call: &Call, view: &InstanceView, which: &str) -> Option<Disk> {
    let all = disks(&call.session.front.engine.inner().inventory.read(), view);
    all.into_iter().find(|d| d.target == which || d.path.as_deref() == Some(which))
}

/// What a running domain has done.
pub(super) async fn of(call: &Call, view: &InstanceView) -> Result<MachineFigures, VirError> {
    let stopped = || VirError::state("domain is not running");
    if !is_running(view) {
        return Err(stopped());
    }
    if call.opened()?.driver == Driver::Lxc {
        let text = "disks and processors of containers are counted together with the host's";
        return Err(VirError::new(Code::OperationUnsupported, Driver::Lxc.part(), text));
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    engine.machine_figures(context, &view.project.name, &view.instance.name).await?.ok_or_else(stopped)
}

/// Counters of a disk, or of all disks together.
async fn block(call: &Call, named: &Named, which: &str) -> Result<DiskFigures, VirError> {
    let view = call.guest(named)?;
    if !is_running(&view) {
        return Err(VirError::state("domain is not running"));
    }
    if which.is_empty() {
        let mut sum = DiskFigures::default();
        for d in of(call, &view).await?.disks.values() {
            sum.read_requests += d.read_requests;
            sum.read_bytes += d.read_bytes;
            sum.read_ns += d.read_ns;
            sum.write_requests += d.write_requests;
            sum.write_bytes += d.write_bytes;
            sum.write_ns += d.write_ns;
            sum.flush_requests += d.flush_requests;
            sum.flush_ns += d.flush_ns;
        }
        return Ok(sum);
    }
    let disk = disk(call, &view, which);
    let disk = disk.ok_or_else(|| VirError::argument(format!("invalid path: {which}")))?;
    let found = of(call, &view).await?.disks.remove(&disk.slot);
    found.ok_or_else(|| VirError::state(format!("disk {which} comes with the next start")))
}

/// `DOMAIN_BLOCK_STATS`
pub async fn block_stats(call: Call) -> Answered {
    let (named, which) = call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?)))?;
    let d = block(&call, &named, &which).await?;
    let mut w = Writer::new();
    for n in [d.read_requests, d.read_bytes, d.write_requests, d.write_bytes] {
        w.i64(n as i64);
    }
    // Errors are not counted.
    w.i64(-1);
    Ok(w.finish().into())
}

/// `DOMAIN_BLOCK_STATS_FLAGS`
pub async fn block_stats_flags(call: Call) -> Answered {
    let (named, which, wanted, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.i32()?, r.u32()?)))?;
    // Strings among them are fine.
    call.known_flags(flags, 4)?;
    let d = block(&call, &named, &which).await?;
    let all = [
        ("rd_operations", d.read_requests),
        ("rd_bytes", d.read_bytes),
        ("rd_total_times", d.read_ns),
        ("wr_operations", d.write_requests),
        ("wr_bytes", d.write_bytes),
        ("wr_total_times", d.write_ns),
        ("flush_operations", d.flush_requests),
        ("flush_total_times", d.flush_ns),
    ];
    parameters(all.map(|(field, n)| (field, Typed::Llong(n as i64))).into(), wanted)
}

/// Of the interface that the host calls so.
pub(super) fn nic(figures: &MachineFigures, name: &str) -> Option<NicFigures> {
    figures.nics.get(name).cloned()
}

/// `DOMAIN_GET_DISK_ERRORS`: a machine whose disk failed halts; which of them it was is not told.
pub async fn disk_errors(call: Call) -> Answered {
    let (named, max, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let view = call.guest(&named)?;
    if !is_running(&view) {
        return Err(VirError::state("domain is not running"));
    }
    let count = match max {
        0 => disks(&call.session.front.engine.inner().inventory.read(), &view).len(),
        _ => 0,
    };
    let mut w = Writer::new();
    w.u32(0).i32(count as i32);
    Ok(w.finish().into())
}

/// `DOMAIN_GET_CPU_STATS`: of all processors of the host together; the kernel does not count a group's by processor.
pub async fn cpu_stats(call: Call) -> Answered {
    let (named, wanted, start, count, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?, r.i32()?, r.u32()?, r.u32()?)))?;
    call.known_flags(flags, 4)?;
    let view = call.guest(&named)?;
    if !is_running(&view) {
        return Err(VirError::state("domain is not running"));
    }
    if start != -1 {
        let text = "times are counted of all processors together; ask for the total";
        return Err(VirError::new(Code::OperationUnsupported, call.opened()?.driver.part(), text));
    }
    if count != 1 {
        return Err(VirError::argument("ncpus must be 1 when start_cpu is -1"));
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let (project, name) = (&view.project.name, &view.instance.name);
    let metrics = engine.instance_metrics(context, project, name).await?;
    let mut all = vec![("cpu_time", metrics.and_then(|m| m.cpu_ns))];
    if let Some(figures) = engine.machine_figures(context, project, name).await? {
        all.extend([("user_time", figures.user_ns), ("system_time", figures.system_ns)]);
    }
    let all = all.into_iter().filter_map(|(field, n)| Some((field, Typed::Ullong(n?)))).collect();
    parameters(all, i32::try_from(wanted).unwrap_or(i32::MAX))
}

/// A map of `length` bytes with these processors of the host; all of them when there is no choice.
pub(super) fn cpu_map(chosen: Option<&[u32]>, host: u32, length: usize) -> Vec<u8> {
    let mut map = vec![0u8; length];
    let all: Vec<u32> = (0..host).collect();
    for cpu in chosen.unwrap_or(&all) {
        if let Some(byte) = map.get_mut(*cpu as usize / 8) {
            *byte |= 1 << (cpu % 8);
        }
    }
    map
}

/// A length of a processor map as clients say it.
pub(super) fn map_length(n: i32) -> Result<usize, VirError> {
    let length = usize::try_from(n).ok().filter(|n| *n <= 2048);
    length.ok_or_else(|| VirError::argument("maplen must be 0 to 2048"))
}

/// `DOMAIN_GET_VCPUS`
pub async fn vcpus(call: Call) -> Answered {
    let (named, max, length) = call.arguments(|r| Ok((Named::read_domain(r)?, r.i32()?, r.i32()?)))?;
    let length = map_length(length)?;
    let view = call.guest(&named)?;
    if !is_running(&view) {
        return Err(VirError::state("cannot retrieve vcpu information for inactive domain"));
    }
    let figures = of(&call, &view).await?;
    let limits = limits::of(&view)?;
    let host = super::connect::facts(&call)?.cpus;
    let vcpus: Vec<_> = figures.vcpus.iter().take(usize::try_from(max).unwrap_or(0)).collect();
    let map = |n| cpu_map(limits.runs_on(Thread::Vcpu(n)), host, length);
    let map: Vec<u8> = vcpus.iter().flat_map(|vcpu| map(vcpu.index)).collect();
    let mut w = Writer::new();
    w.array(vcpus, |w, vcpu| {
        // State 1: running.
        w.u32(vcpu.index).i32(1).u64(vcpu.time_ns).i32(vcpu.processor.max(0));
    });
    w.opaque(&map);
    Ok(w.finish().into())
}

/// `DOMAIN_SET_BLOCK_THRESHOLD`: listeners are told, once, that the guest has written behind a byte of what a disk lies in.
pub async fn set_threshold(call: Call) -> Answered {
    let (named, which, bytes, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.u64()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let view = call.guest(&named)?;
    if call.opened()?.driver == Driver::Lxc {
        return Err(VirError::no_support(crate::table::name_of(call.header.program, call.header.procedure)));
    }
    if !is_running(&view) {
        return Err(VirError::state("domain is not running"));
    }
    let disk = disk(&call, &view, &which);
    let disk = disk.ok_or_else(|| VirError::argument(format!("invalid path: {which}")))?;
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let (project, name) = (&view.project.name, &view.instance.name);
    engine.machine_threshold(context, project, name, &disk.slot, bytes).await?;
    Ok(nothing())
}

async fn machine(call: &Call, view: &InstanceView, wake: bool) -> Answered {
    if !is_running(view) {
        return Err(VirError::state("domain is not running"));
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let (project, name) = (&view.project.name, &view.instance.name);
    match wake {
        true => engine.machine_wake(context, project, name).await?,
        false => engine.machine_interrupt(context, project, name).await?,
    }
    Ok(nothing())
}

/// `DOMAIN_INJECT_NMI`
pub async fn inject_nmi(call: Call) -> Answered {
    machine(&call, &*call.guest_without_flags()?, false).await
}

/// `DOMAIN_PM_WAKEUP`
pub async fn wake(call: Call) -> Answered {
    machine(&call, &*call.guest_without_flags()?, true).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_found_by_what_systems_tell_of_them() {
        let disk = |name: &str, bus: DiskBus, options: &str| {
            let options = match options {
                "" => DiskOptions::default(),
                text => DiskOptions::parse("", text, Some(bus)).unwrap(),
            };
            let serial = serial(name, bus, &options);
            Disk { slot: String::new(), target: name.into(), volume: None, path: None, serial }
        };
        let all = [
            disk("root", DiskBus::VirtioScsi, ""),
            disk("my_data", DiskBus::VirtioBlk, ""),
            disk("own", DiskBus::VirtioScsi, "serial=WD  9A 96"),
            disk("short", DiskBus::VirtioBlk, "serial=96"),
            disk("a-name-that-is-rather-long", DiskBus::VirtioBlk, ""),
            disk("stick", DiskBus::Usb, ""),
        ];
        for (told, name) in [
            ("0QEMU_QEMU_HARDDISK_incus_root", Some("root")),
            ("incus_root", Some("root")),
            ("incus_my_data", Some("my_data")),
            ("0QEMU_QEMU_HARDDISK_WD_9A_96", Some("own")),
            ("WD  9A 96", Some("own")),
            ("96", Some("short")),
            ("incus_a-name-that-is", Some("a-name-that-is-rather-long")),
            ("QEMU_QEMU_HARDDISK_incus_stick-0:0", Some("stick")),
            ("root", None),
            ("196", None),
            ("", None),
        ] {
            assert_eq!(by_serial(&all, told).map(|d| d.target.as_str()), name, "{told}");
        }
    }

    #[test]
    fn maps_of_processors() {
        assert_eq!(cpu_map(None, 3, 1), [0b111]);
        assert_eq!(cpu_map(Some(&[1, 9, 400]), 12, 2), [0b10, 0b10]);
        assert!(cpu_map(None, 8, 0).is_empty());
        assert!(map_length(-1).is_err() && map_length(4096).is_err());
    }
}
