//! Figures of running domains.

use super::{Answered, Named, domain::is_running, domain::state_of, text, write_domain};
use crate::{
    domain_uuid,
    error::{Code, VirError},
    limits,
    session::Call,
    xdr::{Typed, Writer},
};
use karst_engine::InstanceView;
use karst_model::guest::Metrics;
use std::{net::IpAddr, sync::Arc};
use uuid::Uuid;

/// Groups of `virDomainStatsTypes` that are told.
const STATE: u32 = 1;
const CPU: u32 = 2;
const BALLOON: u32 = 4;
const VCPU: u32 = 8;
const INTERFACE: u32 = 16;
const KNOWN: u32 = STATE | CPU | BALLOON | VCPU | INTERFACE;
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
    let sample = call.session.front.engine.all_metrics().await;
    let mut rows = vec![];
    for view in guests {
        let is = is_running(&view);
        if (running || stopped) && !(running && is || stopped && !is) {
            continue;
        }
        let metrics = sample.get(&view.instance.id).filter(|_| is);
        let params = parameters(&call, &view, metrics, stats)?;
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

fn parameters(
    call: &Call,
    view: &InstanceView,
    metrics: Option<&Metrics>,
    stats: u32,
) -> Result<Vec<(String, Typed)>, VirError> {
    let mut all = vec![];
    let mut add = |field: &str, value| all.push((field.to_owned(), value));
    let limits = limits::of(view)?;
    let cpus = limits.cpus(call)?;
    if stats & STATE != 0 {
        let (state, reason) = state_of(view);
        add("state.state", Typed::Int(state));
        add("state.reason", Typed::Int(reason));
    }
    if let Some(used) = metrics.and_then(|m| m.cpu_ns).filter(|_| stats & CPU != 0) {
        add("cpu.time", Typed::Ullong(used));
    }
    if stats & BALLOON != 0 {
        let memory = limits.memory_kib(call)?;
        add("balloon.current", Typed::Ullong(memory));
        add("balloon.maximum", Typed::Ullong(memory));
        if let Some(rss) = metrics.and_then(|m| m.memory) {
            add("balloon.rss", Typed::Ullong(rss / 1024));
        }
    }
    if stats & VCPU != 0 {
        add("vcpu.current", Typed::Uint(cpus));
        add("vcpu.maximum", Typed::Uint(cpus));
    }
    if let Some(metrics) = metrics.filter(|_| stats & INTERFACE != 0) {
        let nics: Vec<_> = metrics.interfaces.values().filter(|i| !i.loopback).collect();
        add("net.count", Typed::Uint(nics.len() as u32));
        for (n, nic) in nics.iter().enumerate() {
            let name = if nic.host_name.is_empty() { nic.mac.clone() } else { nic.host_name.clone() };
            add(&format!("net.{n}.name"), Typed::Text(name));
            let [rx_bytes, tx_bytes, rx_packets, tx_packets] = nic.counters;
            for (field, value) in [
                ("rx.bytes", rx_bytes),
                ("rx.pkts", rx_packets),
                ("tx.bytes", tx_bytes),
                ("tx.pkts", tx_packets),
            ] {
                add(&format!("net.{n}.{field}"), Typed::Ullong(value));
            }
        }
    }
    Ok(all)
}

/// `DOMAIN_INTERFACE_STATS`, of an interface by the host's name or the MAC address.
pub async fn interface(call: Call) -> Answered {
    let (named, device) = call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?)))?;
    let view = call.guest(&named)?;
    let metrics = figures(&call, &view).await?;
    let found = metrics
        .interfaces
        .values()
        .find(|i| i.host_name == device || i.mac.eq_ignore_ascii_case(&device))
        .ok_or_else(|| VirError::argument(format!("invalid path, '{device}' is not a known interface")))?;
    let [rx_bytes, tx_bytes, rx_packets, tx_packets] = found.counters.map(|n| n as i64);
    let mut w = Writer::new();
    // -1: not counted.
    w.i64(rx_bytes).i64(rx_packets).i64(-1).i64(-1).i64(tx_bytes).i64(tx_packets).i64(-1).i64(-1);
    Ok(w.finish().into())
}

/// `DOMAIN_MEMORY_STATS`
pub async fn memory(call: Call) -> Answered {
    let (named, max, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let view = call.guest(&named)?;
    let metrics = figures(&call, &view).await?;
    // Tags of virDomainMemoryStatTags: the balloon's size and what the process takes, KiB.
    let mut all = vec![(6, limits::of(&view)?.memory_kib(&call)?)];
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
        LEASE | ARP => leased(&call, &view).await?,
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
