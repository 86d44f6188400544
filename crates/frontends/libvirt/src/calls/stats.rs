//! Figures of running domains.

use super::{
    Answered, Named,
    domain::{is_running, state_of},
    figures::{Disk, disks},
    nothing,
    sides::{CONFIG, LIVE, affects},
    text,
    tuning::set,
    write_domain,
};
use crate::{
    domain_uuid,
    error::{Code, VirError},
    limits,
    session::{Call, Driver},
    xdr::{Typed, Writer},
};
use karst_engine::InstanceView;
use karst_model::{
    VolumeId,
    board::PERIOD,
    guest::{BalloonFigures, Interface, MachineFigures, MemoryInside, Metrics, NicFigures},
    keys::optional_flag,
    storage::Usage,
};
use std::{collections::HashMap, net::IpAddr, sync::Arc};
use uuid::Uuid;

/// Groups of `virDomainStatsTypes` that are told.
const STATE: u32 = 1;
const CPU: u32 = 2;
const BALLOON: u32 = 4;
const VCPU: u32 = 8;
const INTERFACE: u32 = 16;
const BLOCK: u32 = 32;
const PERF: u32 = 64;
const IOTHREAD: u32 = 128;
const MEMORY: u32 = 256;
const DIRTYRATE: u32 = 512;
/// Of three of the last four there is never anything to tell, as with libvirt's own guests that have none of it.
const KNOWN: u32 = STATE | CPU | BALLOON | VCPU | INTERFACE | BLOCK | PERF | IOTHREAD | MEMORY | DIRTYRATE;
/// What QEMU has to be asked for.
const OF_MACHINES: u32 = CPU | BALLOON | VCPU | INTERFACE | BLOCK | IOTHREAD | DIRTYRATE;
/// Flags of the list, as of [`super::domain::list`]; the two highest are of the statistics: do not wait for a busy guest,
/// and insist on every group.
const INSIST: u32 = 1 << 31;
const NO_WAIT: u32 = 1 << 29;
const BACKING: u32 = 1 << 30;

async fn figures(call: &Call, view: &InstanceView) -> Result<Metrics, VirError> {
    if !is_running(view) {
        return Err(VirError::state("domain is not running"));
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let found = engine.instance_metrics(context, &view.project.name, &view.instance.name).await?;
    found.ok_or_else(|| VirError::state("domain is not running"))
}

/// `CONNECT_GET_ALL_DOMAIN_STATS`
pub async fn all(call: Call) -> Answered {
    let (named, stats, flags) =
        call.arguments(|r| Ok((r.array(super::LIST_MAX, Named::read_domain)?, r.u32()?, r.u32()?)))?;
    call.known_flags(flags, 0xff | INSIST | NO_WAIT | BACKING)?;
    if flags & INSIST != 0 && stats & !KNOWN != 0 {
        let text = format!("Stats types bits 0x{:x} are not supported by this daemon", stats & !KNOWN);
        return Err(VirError::new(Code::OperationUnsupported, call.opened()?.driver.part(), text));
    }
    let stats = if stats == 0 { KNOWN } else { stats };
    let guests: Vec<Arc<InstanceView>> = match named.is_empty() {
        true => call.session.guests()?,
        // Those that are gone meanwhile are left out.
        false => {
            let wanted: Vec<Uuid> = named.iter().map(|n| n.uuid).collect();
            let mut all = call.session.guests()?;
            all.retain(|v| wanted.contains(&domain_uuid(v)));
            all
        }
    };
    let (running, stopped) = (flags & 1 != 0, flags & 2 != 0);
    let engine = &call.session.front.engine;
    let sample = engine.all_metrics().await;
    let machines = match stats & OF_MACHINES != 0 && call.opened()?.driver == Driver::Qemu {
        // Only when there is one: otherwise no host need be asked.
        true if guests.iter().any(|v| is_running(v)) => engine.all_machine_figures().await,
        _ => HashMap::new(),
    };
    // Disks of containers are not told: nobody need look at their trees.
    let with_disks = stats & BLOCK != 0 && call.opened()?.driver == Driver::Qemu;
    let mut told: Vec<(Arc<InstanceView>, Figures<'_>)> = vec![];
    {
        let records = engine.inner().inventory.read();
        for view in guests {
            let is = is_running(&view);
            if (running || stopped) && !(running && is || stopped && !is) {
                continue;
            }
            let of = Figures {
                metrics: sample.get(&view.instance.id).filter(|_| is),
                machine: machines.get(&view.instance.id).filter(|_| is),
                disks: if with_disks { disks(&records, &view) } else { vec![] },
            };
            told.push((view, of));
        }
    }
    // What QEMU does not tell the host does, of all disks at once.
    let mut quiet = vec![];
    for (_, of) in &told {
        let unknown = of.disks.iter().filter(|d| of.allocation(d).is_none());
        quiet.extend(unknown.filter_map(|d| d.volume.as_ref().map(|v| (v.pool, v.id))));
    }
    let spaces = engine.volume_usages(&quiet).await;
    let mut rows = vec![];
    for (view, of) in told {
        let params = parameters(&call, &view, of, &spaces, stats)?;
        rows.push((view, params));
    }
    let mut w = Writer::new();
    w.array(rows, |w, (view, params)| {
        write_domain(w, &view);
        w.array(params, |w, (field, value)| {
            w.typed(&field, &value);
        });
    });
    Ok(w.finish().into())
}

/// What is known of a guest: its disks, and of one that runs what it did.
struct Figures<'a> {
    metrics: Option<&'a Metrics>,
    machine: Option<&'a MachineFigures>,
    disks: Vec<Disk>,
}

impl Figures<'_> {
    /// What a disk takes and how long its file is, where QEMU tells.
    fn allocation(&self, disk: &Disk) -> Option<(u64, u64)> {
        let figures = self.machine?.disks.get(&disk.slot)?;
        Some((figures.allocation?, figures.physical?))
    }
}

fn parameters(
    call: &Call,
    view: &InstanceView,
    of: Figures<'_>,
    spaces: &HashMap<VolumeId, Usage>,
    stats: u32,
) -> Result<Vec<(String, Typed)>, VirError> {
    let Figures { metrics, machine, .. } = of;
    let mut all = vec![];
    let mut add = |field: &str, value| all.push((field.to_owned(), value));
    let limits = limits::of(view)?;
    let cpus = limits.cpus(call)?;
    if stats & STATE != 0 {
        let (state, reason) = state_of(view);
        add("state.state", Typed::Int(state));
        add("state.reason", Typed::Int(reason));
    }
    if stats & CPU != 0 {
        let machine = |of: fn(&MachineFigures) -> Option<u64>| machine.and_then(of);
        for (field, value) in [
            ("cpu.time", metrics.and_then(|m| m.cpu_ns)),
            ("cpu.user", machine(|m| m.user_ns)),
            ("cpu.system", machine(|m| m.system_ns)),
        ] {
            value.into_iter().for_each(|v| add(field, Typed::Ullong(v)));
        }
    }
    if stats & BALLOON != 0 {
        let memory = limits.memory_kib(call)?;
        let actual = machine.and_then(|m| m.balloon.as_ref()).map_or(memory, |b| b.actual / 1024);
        add("balloon.current", Typed::Ullong(actual));
        add("balloon.maximum", Typed::Ullong(limits.most_memory_kib(call)?));
        let inside = machine.and_then(|m| m.balloon.as_ref()?.inside.as_ref());
        for (_, field, value) in inside.map(inside_of).unwrap_or_default() {
            add(&format!("balloon.{field}"), Typed::Ullong(value));
        }
        if let Some(rss) = metrics.and_then(|m| m.memory) {
            add("balloon.rss", Typed::Ullong(rss / 1024));
        }
    }
    if stats & VCPU != 0 {
        add("vcpu.current", Typed::Uint(cpus));
        add("vcpu.maximum", Typed::Uint(limits.most_cpus(call)?));
        for vcpu in machine.iter().flat_map(|m| &m.vcpus) {
            add(&format!("vcpu.{}.state", vcpu.index), Typed::Int(1));
            for (field, value) in [("time", vcpu.time_ns), ("wait", vcpu.wait_ns), ("delay", vcpu.delay_ns)] {
                add(&format!("vcpu.{}.{field}", vcpu.index), Typed::Ullong(value));
            }
        }
    }
    if stats & INTERFACE != 0 {
        let nics: Vec<(String, NicFigures)> = match (machine, metrics) {
            (Some(machine), _) => machine.nics.iter().map(|(name, n)| (name.clone(), n.clone())).collect(),
            (None, Some(metrics)) => metrics.interfaces.values().filter(|i| !i.loopback).map(seen).collect(),
            (None, None) => vec![],
        };
        if machine.is_some() || metrics.is_some() {
            add("net.count", Typed::Uint(nics.len() as u32));
        }
        for (n, (name, nic)) in nics.into_iter().enumerate() {
            add(&format!("net.{n}.name"), Typed::Text(name));
            for (field, value) in [
                ("rx.bytes", nic.received_bytes),
                ("rx.pkts", nic.received_packets),
                ("rx.errs", nic.received_errors),
                ("rx.drop", nic.received_drops),
                ("tx.bytes", nic.sent_bytes),
                ("tx.pkts", nic.sent_packets),
                ("tx.errs", nic.sent_errors),
                ("tx.drop", nic.sent_drops),
            ] {
                add(&format!("net.{n}.{field}"), Typed::Ullong(value));
            }
        }
    }
    if let Some(rate) = machine.and_then(|m| m.dirty_rate.as_ref()).filter(|_| stats & DIRTYRATE != 0) {
        // virDomainDirtyRateStatus.
        add("dirtyrate.calc_status", Typed::Int(if rate.measured { 2 } else { 1 }));
        add("dirtyrate.calc_start_time", Typed::Llong(rate.started));
        add("dirtyrate.calc_period", Typed::Int(rate.seconds));
        add("dirtyrate.calc_mode", Typed::Text(rate.mode.as_str().into()));
        if let Some(whole) = rate.rate.filter(|_| rate.measured) {
            add("dirtyrate.megabytes_per_second", Typed::Llong(whole));
            for (number, part) in &rate.processors {
                let field = format!("dirtyrate.vcpu.{number}.megabytes_per_second");
                add(&field, Typed::Ullong(part.unsigned_abs()));
            }
        }
    }
    if stats & BLOCK != 0 && call.opened()?.driver == Driver::Qemu {
        add("block.count", Typed::Uint(of.disks.len() as u32));
        for (n, disk) in of.disks.iter().enumerate() {
            let mut add = |field: &str, value| add(&format!("block.{n}.{field}"), value);
            add("name", Typed::Text(disk.target.clone()));
            if let Some(path) = &disk.path {
                add("path", Typed::Text(path.clone()));
            }
            let figures = machine.and_then(|m| m.disks.get(&disk.slot));
            if let Some(d) = figures {
                for (field, value) in [
                    ("rd.reqs", d.read_requests),
                    ("rd.bytes", d.read_bytes),
                    ("rd.times", d.read_ns),
                    ("wr.reqs", d.write_requests),
                    ("wr.bytes", d.write_bytes),
                    ("wr.times", d.write_ns),
                    ("fl.reqs", d.flush_requests),
                    ("fl.times", d.flush_ns),
                ] {
                    add(field, Typed::Ullong(value));
                }
            }
            let Some(volume) = &disk.volume else { continue };
            let space = || spaces.get(&volume.id).map(|usage| (usage.used, usage.used));
            let known = of.allocation(disk).or_else(space);
            if let Some((used, _)) = known {
                add("allocation", Typed::Ullong(used));
            }
            add("capacity", Typed::Ullong(volume.size.unwrap_or_default().bytes()));
            if let Some((_, file)) = known {
                add("physical", Typed::Ullong(file));
            }
        }
    }
    if stats & IOTHREAD != 0 && metrics.is_some() && call.opened()?.driver == Driver::Qemu {
        let threads = machine.map_or(&[][..], |m| &m.iothreads);
        add("iothread.count", Typed::Uint(threads.len() as u32));
        for thread in threads {
            for (field, value) in [
                ("poll-max-ns", thread.poll_max_ns.map(|n| Typed::Ullong(n.into()))),
                ("poll-grow", thread.poll_grow.map(Typed::Uint)),
                ("poll-shrink", thread.poll_shrink.map(Typed::Uint)),
            ] {
                value.into_iter().for_each(|value| add(&format!("iothread.{}.{field}", thread.id), value));
            }
        }
    }
    Ok(all)
}

/// An interface as the guest sees it, by the host's name where it has one.
fn seen(nic: &Interface) -> (String, NicFigures) {
    let name = if nic.host_name.is_empty() { nic.mac.clone() } else { nic.host_name.clone() };
    let [received_bytes, sent_bytes, received_packets, sent_packets] = nic.counters;
    (name, NicFigures { received_bytes, sent_bytes, received_packets, sent_packets, ..Default::default() })
}

/// `DOMAIN_INTERFACE_STATS`, of an interface by the host's name or the MAC address.
pub async fn interface(call: Call) -> Answered {
    let (named, device) = call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?)))?;
    let view = call.guest(&named)?;
    let metrics = figures(&call, &view).await?;
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let machine = engine.machine_figures(context, &view.project.name, &view.instance.name).await?;
    let unknown = || VirError::argument(format!("'{device}' is not a known interface"));
    let mut w = Writer::new();
    if let Some(machine) = machine {
        let by_mac = crate::xml::domain::nics(&view)?.into_iter();
        let mut by_mac = by_mac.filter(|n| n.mac.eq_ignore_ascii_case(&device)).map(|n| n.host_interface);
        let name = by_mac.next().unwrap_or_else(|| device.clone());
        let n = super::figures::nic(&machine, &name).ok_or_else(unknown)?;
        for value in [
            n.received_bytes,
            n.received_packets,
            n.received_errors,
            n.received_drops,
            n.sent_bytes,
            n.sent_packets,
            n.sent_errors,
            n.sent_drops,
        ] {
            w.i64(value as i64);
        }
        return Ok(w.finish().into());
    }
    let found = metrics
        .interfaces
        .values()
        .find(|i| i.host_name == device || i.mac.eq_ignore_ascii_case(&device))
        .ok_or_else(unknown)?;
    let [rx_bytes, tx_bytes, rx_packets, tx_packets] = found.counters.map(|n| n as i64);
    // -1: not counted.
    w.i64(rx_bytes).i64(rx_packets).i64(-1).i64(-1).i64(tx_bytes).i64(tx_packets).i64(-1).i64(-1);
    Ok(w.finish().into())
}

/// The balloon of a machine that runs.
pub(super) async fn balloon_of(call: &Call, view: &InstanceView) -> Result<Option<BalloonFigures>, VirError> {
    if call.opened()?.driver == Driver::Lxc || !is_running(view) {
        return Ok(None);
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let machine = engine.machine_figures(context, &view.project.name, &view.instance.name).await?;
    Ok(machine.and_then(|m| m.balloon))
}

/// What a system tells of its memory: tags of `virDomainMemoryStatTags`, the fields of the group of statistics, and values, in
/// KiB where they are sizes.
fn inside_of(inside: &MemoryInside) -> Vec<(i32, &'static str, u64)> {
    let kib = |bytes: Option<u64>| bytes.map(|b| b / 1024);
    let told_at = u64::try_from(inside.told_at).ok();
    let all = [
        (0, "swap_in", kib(inside.swapped_in)),
        (1, "swap_out", kib(inside.swapped_out)),
        (2, "major_fault", inside.major_faults),
        (3, "minor_fault", inside.minor_faults),
        (4, "unused", kib(inside.free)),
        (5, "available", kib(inside.total)),
        (8, "usable", kib(inside.available)),
        (9, "last-update", told_at),
        (10, "disk_caches", kib(inside.caches)),
        (11, "hugetlb_pgalloc", inside.huge_given),
        (12, "hugetlb_pgfail", inside.huge_refused),
    ];
    all.into_iter().filter_map(|(tag, name, value)| Some((tag, name, value?))).collect()
}

/// `DOMAIN_SET_MEMORY_STATS_PERIOD`
pub async fn memory_period(call: Call) -> Answered {
    let (named, period, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, LIVE | CONFIG)?;
    let view = call.guest(&named)?;
    let affected = affects(&view, flags)?;
    let period = u32::try_from(period).map_err(|_| VirError::argument("period must not be negative"))?;
    if affected.definition {
        let balloon = optional_flag(&view.expanded_config, "hardware.balloon") != Some(false);
        if call.opened()?.driver == Driver::Lxc || !balloon {
            let text = "Memory balloon model must be virtio to set the collection period";
            return Err(VirError::state(text));
        }
        set(&call, &view, CONFIG, PERIOD, Some(period.to_string())).await?;
    }
    if !affected.run {
        return Ok(nothing());
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    engine.machine_memory_period(context, &view.project.name, &view.instance.name, period).await?;
    Ok(nothing())
}

/// `DOMAIN_MEMORY_STATS`
pub async fn memory(call: Call) -> Answered {
    let (named, max, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let view = call.guest(&named)?;
    let metrics = figures(&call, &view).await?;
    let balloon = balloon_of(&call, &view).await?;
    let mut all = vec![];
    if let Some(inside) = balloon.as_ref().and_then(|b| b.inside.as_ref()) {
        all.extend(inside_of(inside).into_iter().map(|(tag, _, value)| (tag, value)));
    }
    // The balloon's size and what the process takes, KiB.
    let actual = match balloon {
        Some(balloon) => balloon.actual / 1024,
        None => limits::of(&view)?.memory_kib(&call)?,
    };
    all.push((6, actual));
    all.extend(metrics.memory.map(|m| (7, m / 1024)));
    all.truncate(max as usize);
    let mut w = Writer::new();
    w.array(all, |w, (tag, value)| {
        w.i32(tag).u64(value);
    });
    Ok(w.finish().into())
}

/// Sources of `virDomainInterfaceAddressesSource`.
const LEASE: u32 = 0;
const AGENT: u32 = 1;
const ARP: u32 = 2;

/// `DOMAIN_INTERFACE_ADDRESSES`
pub async fn addresses(call: Call) -> Answered {
    let (named, source, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let view = call.guest(&named)?;
    if !is_running(&view) {
        return Err(VirError::state("domain is not running"));
    }
    let found = match source {
        LEASE => leased(&call, &view).await?,
        ARP => spoken(&call, &view).await?,
        AGENT if call.session.read_only() => {
            let text = "read only access prevents virDomainInterfaceAddresses";
            return Err(VirError::new(Code::OperationDenied, call.opened()?.driver.part(), text));
        }
        AGENT => {
            let metrics = figures(&call, &view).await?;
            let shown = metrics.interfaces.into_iter();
            shown
                .map(|(name, i)| (name, i.mac, i.addresses.into_iter().map(|(a, p, _)| (a, p)).collect()))
                .collect()
        }
        n => return Err(VirError::argument(format!("Unknown IP address data source {n}"))),
    };
    let mut w = Writer::new();
    w.array(found, |w, (name, mac, addresses): (String, String, Vec<(IpAddr, u8)>)| {
        w.string(&name).optional(Some(mac.as_str()).filter(|m| !m.is_empty()));
        w.array(addresses, |w, (address, prefix)| {
            let kind = i32::from(address.is_ipv6());
            w.i32(kind).string(&address.to_string()).u32(u32::from(prefix));
        });
    });
    Ok(w.finish().into())
}

/// By the neighbours that the host's kernel knows, whoever gave them their addresses.
async fn spoken(
    call: &Call,
    view: &InstanceView,
) -> Result<Vec<(String, String, Vec<(IpAddr, u8)>)>, VirError> {
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let known = engine.instance_neighbours(context, &view.project.name, &view.instance.name).await?;
    let mut all = vec![];
    for nic in crate::xml::domain::nics(view)? {
        let mine = known.iter().filter(|n| n.mac.eq_ignore_ascii_case(&nic.mac));
        // Of how many others are near nothing is known.
        let addresses: Vec<(IpAddr, u8)> = mine.map(|n| (n.address, 0)).collect();
        if !addresses.is_empty() {
            all.push((nic.host_interface, nic.mac, addresses));
        }
    }
    Ok(all)
}

/// By the DHCP server's leases and what is assigned.
async fn leased(
    call: &Call,
    view: &InstanceView,
) -> Result<Vec<(String, String, Vec<(IpAddr, u8)>)>, VirError> {
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let mut all = vec![];
    for nic in crate::xml::domain::nics(view)? {
        // It may be on something of the host.
        if super::network::find(call, &nic.network).is_err() {
            continue;
        }
        let leases = engine.network_leases(context, &view.project.name, &nic.network).await?;
        let prefix = super::network::prefixes(call, &nic.network)?;
        let mine = leases.into_iter().filter(|l| l.mac.eq_ignore_ascii_case(&nic.mac));
        let addresses: Vec<_> = mine.map(|l| (l.address, prefix.of(l.address))).collect();
        if !addresses.is_empty() {
            all.push((nic.host_interface, nic.mac, addresses));
        }
    }
    Ok(all)
}

/// `DOMAIN_GET_HOSTNAME`: as the agent inside tells, otherwise as DHCP knows it.
pub async fn hostname(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?)))?;
    call.known_flags(flags, 3)?;
    let view = call.guest(&named)?;
    let metrics = figures(&call, &view).await?;
    let told = metrics.system.map(|s| s.hostname).filter(|h| !h.is_empty());
    Ok(text(&told.unwrap_or_else(|| view.instance.name.dns_label())))
}
