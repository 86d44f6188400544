//! The bridge itself: link, mark, addresses and kernel settings. Synchronous.

use crate::{
    record::{Paths, Record},
    render,
};
use ipnet::IpNet;
use karst_host::{
    link::{self, Link},
    nic, sysctl,
};
use karst_model::{
    Error, NetworkId, Result,
    network::{BridgeSpec, ExternalInterface},
    spec::NetworkSpec,
};
use std::net::IpAddr;
use uuid::Uuid;

/// The bridge's MAC address: stable over its life, different on each host, and known before the bridge is made, so that one
/// whose mark was not yet set is recognized after a crash (the kernel takes address and kind in one step, the alias in a
/// second).
fn derived_mac(daemon: &str, id: NetworkId) -> [u8; 6] {
    let hash = Uuid::new_v5(&id.uuid(), daemon.as_bytes());
    let b = hash.as_bytes();
    [0x02, b[0], b[1], b[2], b[3], b[4]] // locally administered, unicast
}

/// The MAC address that it is to have.
fn wanted_mac(daemon: &str, record: &Record) -> Result<[u8; 6]> {
    match &record.spec.hwaddr {
        Some(mac) => link::parse_mac(mac),
        None => Ok(derived_mac(daemon, record.id)),
    }
}

fn is_ours(daemon: &str, id: NetworkId, recorded: bool, found: &Link) -> bool {
    if found.kind.as_deref() != Some("bridge") {
        return false;
    }
    match &found.alias {
        Some(alias) => *alias == render::alias(daemon, id),
        None => recorded && found.mac.as_deref() == Some(link::format_mac(&derived_mac(daemon, id)).as_str()),
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
        let overlap = |a: &IpNet, b: &IpNet| a.contains(&b.network()) || b.contains(&a.network());
        for b in wanted.spec.own() {
            if let Some(a) = other.spec.own().find(|a| overlap(a, &b)) {
                let key = if b.addr().is_ipv4() { "config.ipv4.address" } else { "config.ipv6.address" };
                let text = format!("{b} overlaps {a} of the network on {:?}", other.bridge);
                return Err(Error::conflict(text).at(key));
            }
        }
    }
    let recorded_external = before.as_ref().map(|r| r.spec.external_interfaces.clone()).unwrap_or_default();
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
        link::create_bridge(name, derived_mac(daemon, id), wanted.spec.mtu)?;
        tracing::info!(bridge = %name, network = %id, "bridge made");
        found = link::get(name)?;
    }
    let found =
        found.ok_or_else(|| Error::conflict(format!("the bridge {name:?} was deleted while it was made")))?;
    if found.alias.is_none() {
        link::set_alias(name, &render::alias(daemon, id))?;
    }
    let mac = wanted_mac(daemon, wanted)?;
    if found.mac.as_deref() != Some(link::format_mac(&mac).as_str()) {
        // Guests hear at once that their gateway has another address, rather than when their caches expire. A kernel
        // without these settings only lets them wait.
        sysctl::set(&["net", "ipv4", "conf", name, "arp_notify"], "1")?;
        sysctl::set(&["net", "ipv6", "conf", name, "ndisc_notify"], "1")?;
        link::set_mac(name, mac)?;
    }
    let tree = |spec: &BridgeSpec| spec.stp.is_some() || spec.forward_delay.is_some();
    let had_tree = before.as_ref().is_some_and(|b| tree(&b.spec));
    let mtu = wanted.spec.mtu.or_else(|| before.and_then(|b| b.spec.mtu).map(|_| 1500));
    if let Some(mtu) = mtu.filter(|m| *m != found.mtu) {
        link::set_mtu(name, mtu)?;
    }
    if let Some(on) = wanted.spec.multicast_snooping {
        link::set_multicast_snooping(name, on)?;
    }
    if tree(&wanted.spec) || had_tree {
        let on = wanted.spec.stp.unwrap_or(false);
        // Where no delay is said the least that there is: who starts waits for its address as long.
        link::set_spanning_tree(name, on, wanted.spec.forward_delay.unwrap_or(0))?;
    }
    settings(paths, wanted)?;
    if !found.up {
        link::set_up(name, true)?;
    }
    addresses(wanted, found.index)?;
    external(daemon, wanted, &recorded_external, found.index)
}

/// Interfaces of the host in the bridge: those that are wanted go in, those that no longer are come out; what was made of a
/// VLAN goes.
fn external(daemon: &str, wanted: &Record, before: &[String], bridge: u32) -> Result<()> {
    for text in before.iter().filter(|t| !wanted.spec.external_interfaces.contains(t)) {
        let interface = ExternalInterface::parse(text)?;
        let Some(found) = link::get(interface.name)? else { continue };
        if interface.vlan.is_some() && is_our_vlan(daemon, wanted.id, before, &found) {
            ignore_missing(link::delete(&found.name))?;
        } else if found.master == Some(bridge) {
            link::set_master(interface.name, None)?;
        }
    }
    for text in &wanted.spec.external_interfaces {
        let field = "config.bridge.external_interfaces";
        let interface = ExternalInterface::parse(text)?;
        let name = interface.name;
        if let Some((parent, vlan)) = interface.vlan {
            ensure_vlan(daemon, wanted, text, parent, vlan).map_err(|e| e.at(field))?;
        }
        let found = link::get(name)?
            .ok_or_else(|| Error::not_found(format!("this host has no interface {name:?}")).at(field))?;
        match found.master {
            Some(master) if master == bridge => continue,
            Some(_) => {
                return Err(Error::conflict(format!(
                    "the interface {name:?} is in another bridge, or part of a bond, which is named in its place"
                ))
                .at(field));
            }
            None => {}
        }
        if link::addresses(Some(found.index))?.iter().any(|a| a.scope == 0) {
            return Err(Error::conflict(format!(
                "the interface {name:?} has addresses of its own, which would stop working in a bridge; remove them first"
            ))
            .at(field));
        }
        link::set_master(name, Some(&wanted.bridge))?;
        link::set_up(name, true)?;
    }
    Ok(())
}

/// The MAC address of the interface that `text` (NAME/PARENT/VLAN) makes, by which it is recognized before its mark is set,
/// and by which one that was made of something else is told apart.
fn vlan_mac(daemon: &str, id: NetworkId, text: &str) -> [u8; 6] {
    let hash = Uuid::new_v5(&id.uuid(), format!("{daemon}/{text}").as_bytes());
    let b = hash.as_bytes();
    [0x02, b[0], b[1], b[2], b[3], b[4]]
}

fn has_vlan_mac(daemon: &str, id: NetworkId, text: &str, found: &Link) -> bool {
    found.mac.as_deref() == Some(link::format_mac(&vlan_mac(daemon, id, text)).as_str())
}

/// Was it made of a VLAN for this network, as one of `texts` says?
fn is_our_vlan(daemon: &str, id: NetworkId, texts: &[String], found: &Link) -> bool {
    found.kind.as_deref() == Some("vlan")
        && match &found.alias {
            Some(alias) => *alias == render::alias(daemon, id),
            None => texts.iter().any(|text| has_vlan_mac(daemon, id, text, found)),
        }
}

/// The interface of VLAN `vlan` of `parent`, as `text` names it.
fn ensure_vlan(daemon: &str, wanted: &Record, text: &str, parent: &str, vlan: u16) -> Result<()> {
    let name = ExternalInterface::parse(text)?.name;
    let parent = link::get(parent)?
        .ok_or_else(|| Error::not_found(format!("this host has no interface {parent:?}")))?;
    let mut found = link::get(name)?;
    if let Some(there) = &found {
        if !is_our_vlan(daemon, wanted.id, &wanted.spec.external_interfaces, there) {
            return Err(Error::conflict(format!(
                "the interface {name:?} is there already and was not made by this Karst; name it without parent and VLAN, or \
                 take another name"
            )));
        }
        if there.below != Some(parent.index) || !has_vlan_mac(daemon, wanted.id, text, there) {
            ignore_missing(link::delete(name))?;
            found = None;
        }
    }
    if found.is_none() {
        nic::create_host_vlan(&parent, vlan, name, vlan_mac(daemon, wanted.id, text))?;
    }
    if found.is_none_or(|f| f.alias.is_none()) {
        link::set_alias(name, &render::alias(daemon, wanted.id))?;
    }
    // What leaves by it needs its parent.
    if !parent.up {
        link::set_up(&parent.name, true)?;
    }
    Ok(())
}

/// Routes over the bridge: those of the network, and those of its guests. One guest's route that the host has otherwise is that
/// guest's loss, and nobody else's.
pub(crate) fn routes(spec: &NetworkSpec) -> Result<()> {
    let Some(found) = link::get(&spec.bridge)? else { return Ok(()) };
    let own = |net: IpNet| spec.spec.own().any(|n| n.trunc() == net);
    let pair = |n: IpNet| (n.addr(), n.prefix_len());
    let networks: Vec<(IpAddr, u8)> = spec.spec.subnets().filter(|n| !own(*n)).map(pair).collect();
    let guests = spec.hosts.iter().flat_map(|h| h.routes.iter().map(|n| pair(n.trunc())));
    let mut wanted: Vec<(IpAddr, u8)> = networks.iter().copied().chain(guests).collect();
    wanted.sort();
    wanted.dedup();
    for (route, e) in link::offer_routes(found.index, &wanted)? {
        if networks.contains(&route) {
            return Err(e);
        }
        let (address, prefix) = route;
        tracing::warn!(bridge = %spec.bridge, route = %format!("{address}/{prefix}"), error = %e, "a guest is without a route: the host has it otherwise");
    }
    Ok(())
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
    let own = |key: &'static str| ["net", "ipv6", "conf", name, key];
    if wanted.spec.ipv6.is_none() {
        // The host must not be reachable by link-local addresses that no rule knows.
        sysctl::set(&own("disable_ipv6"), "1")?;
        return Ok(());
    }
    if !sysctl::set(&own("disable_ipv6"), "0")? {
        return Err(Error::unsupported("this host's kernel has no IPv6; set ipv6.address=none")
            .at("config.ipv6.address"));
    }
    let forward = ["net", "ipv6", "conf", "all", "forwarding"];
    if sysctl::get(&forward)?.as_deref() == Some("0") {
        let mut host = paths.read_host()?;
        host.forwarding6_switched_on = true;
        // A router no longer listens to announcements, unless it is told so: the host would lose its own way out.
        let listening = |l: &Link| {
            sysctl::get(&["net", "ipv6", "conf", &l.name, "accept_ra"])
                .is_ok_and(|v| v.as_deref() == Some("1"))
        };
        let uplinks: Vec<String> =
            link::list()?.into_iter().filter(|l| l.name != *name && listening(l)).map(|l| l.name).collect();
        host.accept_ra.extend(uplinks.iter().cloned());
        paths.write_host(&host)?;
        for uplink in uplinks {
            sysctl::set(&["net", "ipv6", "conf", &uplink, "accept_ra"], "2")?;
        }
        sysctl::set(&forward, "1")?;
    }
    sysctl::set(&own("accept_ra"), "0")?;
    sysctl::set(&own("accept_dad"), "0")?;
    Ok(())
}

fn addresses(wanted: &Record, index: u32) -> Result<()> {
    let mut missing: Vec<(IpAddr, u8)> = wanted.spec.own().map(|n| (n.addr(), n.prefix_len())).collect();
    for found in link::addresses(Some(index))? {
        let link_local = matches!(found.address, IpAddr::V6(a) if a.is_unicast_link_local());
        let at = missing.iter().position(|w| *w == (found.address, found.prefix));
        match at {
            Some(at) => drop(missing.remove(at)),
            None if link_local => {}
            None => link::delete_address(&wanted.bridge, found.address, found.prefix)?,
        }
    }
    missing.into_iter().try_for_each(|(address, prefix)| link::add_address(&wanted.bridge, address, prefix))
}

/// Deletes the bridge of a network: the recorded one, and any that carries its mark.
pub(crate) fn delete(daemon: &str, paths: &Paths, id: NetworkId) -> Result<()> {
    let record = paths.read(id)?;
    let texts = record.as_ref().map(|r| r.spec.external_interfaces.as_slice()).unwrap_or_default();
    for found in link::list()? {
        let recorded = record.as_ref().is_some_and(|r| r.bridge == found.name);
        if is_ours(daemon, id, recorded, &found) || is_our_vlan(daemon, id, texts, &found) {
            ignore_missing(link::delete(&found.name))?;
        }
    }
    Ok(())
}

/// Deletes every bridge that carries this daemon's mark, and every interface that was made for one.
pub(crate) fn delete_all(daemon: &str) -> Result<()> {
    let mark = format!("karst:{daemon}:");
    for found in link::list()? {
        let made = matches!(found.kind.as_deref(), Some("bridge" | "vlan"));
        if made && found.alias.is_some_and(|a| a.starts_with(&mark)) {
            ignore_missing(link::delete(&found.name))?;
        }
    }
    Ok(())
}

/// Bridges and interfaces of VLANs with this daemon's mark that are not those of `records`.
pub(crate) fn strays(daemon: &str, records: &[Record]) -> Result<Vec<String>> {
    let mark = format!("karst:{daemon}:");
    let named = |r: &Record, name: &str| {
        let mut parsed = r.spec.external_interfaces.iter().filter_map(|t| ExternalInterface::parse(t).ok());
        parsed.any(|e| e.name == name && e.vlan.is_some())
    };
    let stray = |l: &Link| {
        let wanted = |r: &Record| match l.kind.as_deref() {
            Some("vlan") => named(r, &l.name) && is_our_vlan(daemon, r.id, &[], l),
            _ => r.bridge == l.name && is_ours(daemon, r.id, true, l),
        };
        matches!(l.kind.as_deref(), Some("bridge" | "vlan"))
            && l.alias.as_deref().is_some_and(|a| a.starts_with(&mark))
            && !records.iter().any(wanted)
    };
    let words = |l: &Link| format!("{} {}", l.kind.as_deref().unwrap_or_default(), l.name);
    Ok(link::list()?.iter().filter(|l| stray(l)).map(words).collect())
}

pub(crate) fn ignore_missing(result: Result<()>) -> Result<()> {
    match result {
        Err(e) if e.is(karst_model::ErrorKind::NotFound) => Ok(()),
        other => other,
    }
}
