//! The bridge itself: link, mark, addresses and kernel settings. Synchronous.

use crate::{
    record::{Paths, Record},
    render,
};
use karst_host::{
    link::{self, Link},
    sysctl,
};
use karst_model::{Error, NetworkId, Result};
use std::net::IpAddr;
use uuid::Uuid;

/// The bridge's MAC address: stable over its life, different on each host, and known before the bridge is made, so that one
/// whose mark was not yet set is recognized after a crash (the kernel takes address and kind in one step, the alias in a
/// second).
pub(crate) fn mac(daemon: &str, id: NetworkId) -> [u8; 6] {
    let hash = Uuid::new_v5(&id.uuid(), daemon.as_bytes());
    let b = hash.as_bytes();
    [0x02, b[0], b[1], b[2], b[3], b[4]] // locally administered, unicast
}

fn is_ours(daemon: &str, id: NetworkId, recorded: bool, found: &Link) -> bool {
    if found.kind.as_deref() != Some("bridge") {
        return false;
    }
    match &found.alias {
        Some(alias) => *alias == render::alias(daemon, id),
        None => recorded && found.mac.as_deref() == Some(link::format_mac(&mac(daemon, id)).as_str()),
    }
}

/// Records the network, then makes or repairs its bridge.
pub(crate) fn ensure(daemon: &str, paths: &Paths, wanted: &Record) -> Result<()> {
    let id = wanted.id;
    let before = paths.read(id)?;
    for other in paths.records()?.iter().filter(|r| r.id != id) {
        if other.bridge == wanted.bridge {
            return Err(
                Error::conflict(format!("another network has the bridge {:?}", wanted.bridge)).at("name")
            );
        }
        if let (Some(a), Some(b)) = (other.spec.ipv4, wanted.spec.ipv4)
            && (a.contains(&b.network()) || b.contains(&a.network()))
        {
            return Err(Error::conflict(format!("{b} overlaps {a} of the network on {:?}", other.bridge))
                .at("config.ipv4.address"));
        }
    }
    let recorded = before.as_ref().is_some_and(|r| r.bridge == wanted.bridge);
    let mut found = link::get(&wanted.bridge)?;
    if let Some(other) = found.as_ref().filter(|f| !is_ours(daemon, id, recorded, f)) {
        return Err(Error::conflict(format!(
            "the interface {:?} exists already and was not made by this Karst; choose another name, or delete the interface",
            other.name
        ))
        .at("name"));
    }
    let renamed = before.as_ref().filter(|r| r.bridge != wanted.bridge);
    if let Some(old) = renamed
        && let Some(old) = link::get(&old.bridge)?.filter(|f| is_ours(daemon, id, true, f))
    {
        if link::list()?.iter().any(|l| l.master == Some(old.index)) {
            return Err(Error::conflict(format!(
                "the bridge {:?} is in use by guests; stop them first",
                old.name
            )));
        }
        link::delete(&old.name)?;
    }
    if before.as_ref() != Some(wanted) {
        std::fs::create_dir_all(paths.network(id))?;
        paths.write(wanted)?;
    }
    let name = &wanted.bridge;
    if found.is_none() {
        link::create_bridge(name, mac(daemon, id), wanted.spec.mtu)?;
        tracing::info!(bridge = %name, network = %id, "bridge made");
        found = link::get(name)?;
    }
    let found =
        found.ok_or_else(|| Error::conflict(format!("the bridge {name:?} was deleted while it was made")))?;
    if found.alias.is_none() {
        link::set_alias(name, &render::alias(daemon, id))?;
    }
    if found.mac.as_deref() != Some(link::format_mac(&mac(daemon, id)).as_str()) {
        link::set_mac(name, mac(daemon, id))?;
    }
    if let Some(mtu) = wanted.spec.mtu.filter(|m| *m != found.mtu) {
        link::set_mtu(name, mtu)?;
    }
    settings(paths, wanted)?;
    if !found.up {
        link::set_up(name, true)?;
    }
    addresses(wanted, found.index)
}

fn settings(paths: &Paths, wanted: &Record) -> Result<()> {
    let name = wanted.bridge.as_str();
    if wanted.spec.ipv4.is_some() {
        // First: switching it resets settings of single interfaces.
        let forward = ["net", "ipv4", "ip_forward"];
        if sysctl::get(&forward)?.as_deref() == Some("0") {
            let mut host = paths.read_host()?;
            host.forwarding_switched_on = true;
            paths.write_host(&host)?;
            sysctl::set(&forward, "1")?;
        }
        // No guest may send from an address that would not be routed back to it.
        sysctl::set(&["net", "ipv4", "conf", name, "rp_filter"], "1")?;
    }
    // Managed IPv6 is not there: the host must not be reachable by link-local addresses that no rule knows.
    sysctl::set(&["net", "ipv6", "conf", name, "disable_ipv6"], "1")?;
    Ok(())
}

fn addresses(wanted: &Record, index: u32) -> Result<()> {
    let mut there = false;
    for address in link::addresses(Some(index))? {
        let IpAddr::V4(own) = address.address else {
            continue;
        };
        if wanted.spec.ipv4.is_some_and(|w| w.addr() == own && w.prefix_len() == address.prefix) {
            there = true;
        } else {
            link::delete_address(&wanted.bridge, own, address.prefix)?;
        }
    }
    match wanted.spec.ipv4 {
        Some(net) if !there => link::add_address(&wanted.bridge, net.addr(), net.prefix_len()),
        _ => Ok(()),
    }
}

/// Deletes the bridge of a network: the recorded one, and any that carries its mark.
pub(crate) fn delete(daemon: &str, paths: &Paths, id: NetworkId) -> Result<()> {
    let record = paths.read(id)?;
    for found in link::list()? {
        let recorded = record.as_ref().is_some_and(|r| r.bridge == found.name);
        if is_ours(daemon, id, recorded, &found) {
            ignore_missing(link::delete(&found.name))?;
        }
    }
    Ok(())
}

/// Deletes every bridge that carries this daemon's mark.
pub(crate) fn delete_all(daemon: &str) -> Result<()> {
    let mark = format!("karst:{daemon}:");
    for found in link::list()? {
        if found.kind.as_deref() == Some("bridge") && found.alias.is_some_and(|a| a.starts_with(&mark)) {
            ignore_missing(link::delete(&found.name))?;
        }
    }
    Ok(())
}

fn ignore_missing(result: Result<()>) -> Result<()> {
    match result {
        Err(e) if e.is(karst_model::ErrorKind::NotFound) => Ok(()),
        other => other,
    }
}
