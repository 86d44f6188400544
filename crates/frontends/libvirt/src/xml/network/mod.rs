//! Networks as XML.

pub mod dns;
pub mod ports;
pub mod read;

use super::Element;
use karst_engine::InstanceView;
use karst_model::{
    Result,
    network::{BridgeSpec, Network},
    uplink::NetworkKind,
};
use std::{net::IpAddr, sync::Arc};

/// The user key that holds the UUID which a network's document said.
pub const UUID: &str = "user.libvirt.uuid";

/// Reserved addresses of a network's guests, by address.
pub fn hosts_of(guests: &[Arc<InstanceView>], network: &str) -> Vec<read::Host> {
    let mut all = vec![];
    for view in guests {
        for (name, identity) in &view.instance.identities {
            let keys =
                view.expanded_devices.get(name).filter(|k| k.get("network").is_some_and(|n| n == network));
            let (Some(keys), Some(mac)) = (keys, &identity.mac) else { continue };
            for key in ["ipv4.address", "ipv6.address"] {
                // "none" is no address.
                let address: Option<IpAddr> = keys.get(key).and_then(|a| a.parse().ok());
                all.extend(address.map(|address| read::Host { mac: mac.clone(), name: None, address }));
            }
        }
    }
    all.sort_by(|a, b| (a.address, &a.mac).cmp(&(b.address, &b.mac)));
    all
}

/// A side of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// What it runs by.
    Running,
    /// Its definition.
    Defined,
}

/// The document of a network as it runs, or would; `guests` are those whose reserved addresses are shown.
///
/// # Errors
/// Invalid, when its configuration is.
pub fn document(network: &Network, guests: &[Arc<InstanceView>]) -> Result<String> {
    document_of(network, guests, Side::Running)
}

/// The same of either side.
///
/// # Errors
/// Invalid, when its configuration is.
pub fn document_of(network: &Network, guests: &[Arc<InstanceView>], side: Side) -> Result<String> {
    let config = match side {
        Side::Running => network.running_config(),
        Side::Defined => &network.config,
    };
    let mut e = Element::new("network")
        .child(Element::text("name", &network.name))
        .child(Element::text("uuid", crate::network_uuid(network)));
    if !network.description.is_empty() {
        e.push(Element::text("description", &network.description));
    }
    if network.kind != NetworkKind::Bridge {
        let device = config.get("parent").cloned().unwrap_or_default();
        if network.kind == NetworkKind::HostBridge {
            e.push(Element::new("forward").with("mode", "bridge"));
            e.push(Element::new("bridge").with("name", &device));
        } else {
            let mode = config.get("mode").map_or("bridge", String::as_str);
            let interface = Element::new("interface").with("dev", &device);
            e.push(Element::new("forward").with("dev", &device).with("mode", mode).child(interface));
        }
        e.push_some(config.get("mtu").map(|size| Element::new("mtu").with("size", size)));
        return Ok(e.document());
    }
    let spec = BridgeSpec::parse(network.interface(), config)?;
    // Routed without translation is libvirt's "route", "open" where other firewalls are left alone; neither is an isolated network.
    if spec.nat || spec.nat6 {
        let mut forward = Element::new("forward").with("mode", "nat");
        let range4 =
            spec.nat_address.map(|a| (IpAddr::V4(a), spec.nat_last.map_or(IpAddr::V4(a), IpAddr::V4)));
        let range6 =
            spec.nat6_address.map(|a| (IpAddr::V6(a), spec.nat6_last.map_or(IpAddr::V6(a), IpAddr::V6)));
        let (addresses, ports) = (range4.or(range6), spec.nat_ports.or(spec.nat6_ports));
        if spec.nat6 || addresses.is_some() || ports.is_some() {
            let mut nat = Element::new("nat").with_some("ipv6", spec.nat6.then_some("yes"));
            nat.push_some(addresses.map(|(a, b)| Element::new("address").with("start", a).with("end", b)));
            nat.push_some(ports.map(|(a, b)| Element::new("port").with("start", a).with("end", b)));
            forward.push(nat);
        }
        e.push(forward);
    } else if spec.ipv4.is_some() && spec.routing || spec.ipv6.is_some() && spec.routing6 {
        let closed = spec.ipv4.is_some() && spec.firewall || spec.ipv6.is_some() && spec.firewall6;
        e.push(Element::new("forward").with("mode", if closed { "route" } else { "open" }));
    }
    let stp = if spec.stp == Some(true) { "on" } else { "off" };
    let bridge = Element::new("bridge").with("name", network.interface()).with("stp", stp);
    e.push(bridge.with("delay", spec.forward_delay.unwrap_or(0)));
    if let Some(mtu) = spec.mtu {
        e.push(Element::new("mtu").with("size", mtu));
    }
    if let Some(mac) = &spec.hwaddr {
        e.push(Element::new("mac").with("address", mac));
    }
    if !spec.domain.is_empty() {
        let local = (!spec.names.beyond).then_some("yes");
        e.push(Element::new("domain").with("name", &spec.domain).with_some("localOnly", local));
    }
    e.push_some(dns::written(&spec));
    e.push_some(ports::rates(&spec.ports));
    let mut hosts = hosts_of(guests, &network.name);
    for kept in &spec.names.reserved {
        if !hosts.iter().any(|h| h.mac == kept.mac && h.address == kept.address) {
            hosts.push(read::Host {
                mac: kept.mac.clone(),
                name: kept.name.clone(),
                address: kept.address.into(),
            });
        }
    }
    let reserved = |v4: bool| {
        let hosts = hosts.iter().filter(move |h| h.address.is_ipv4() == v4);
        hosts.map(|h| {
            let e = Element::new("host").with("mac", &h.mac).with_some("name", h.name.as_ref());
            e.with("ip", h.address)
        })
    };
    if let Some(net) = spec.ipv4 {
        let mut ip = Element::new("ip").with("address", net.addr()).with("netmask", net.netmask());
        if spec.dhcp {
            let ranges = match spec.dhcp_ranges.is_empty() {
                true => whole(net).into_iter().collect(),
                false => spec.dhcp_ranges.clone(),
            };
            let ranges = ranges.iter().map(|(a, b)| Element::new("range").with("start", a).with("end", b));
            ip.push(Element::new("dhcp").children(ranges).children(reserved(true)));
        }
        e.push(ip);
    }
    for net in &spec.more {
        e.push(Element::new("ip").with("address", net.addr()).with("netmask", net.netmask()));
    }
    if let Some(net) = spec.ipv6 {
        let ip = Element::new("ip").with("family", "ipv6").with("address", net.addr());
        let mut ip = ip.with("prefix", net.prefix_len());
        if spec.dhcp6 && spec.dhcp6_stateful {
            let ranges = spec.dhcp6_ranges.iter();
            let ranges = ranges.map(|(a, b)| Element::new("range").with("start", a).with("end", b));
            ip.push(Element::new("dhcp").children(ranges).children(reserved(false)));
        }
        e.push(ip);
    }
    for net in &spec.more6 {
        let ip = Element::new("ip").with("family", "ipv6").with("address", net.addr());
        e.push(ip.with("prefix", net.prefix_len()));
    }
    ports::groups(&spec.ports).for_each(|group| e.push(group));
    Ok(e.document())
}

/// The hosts of a subnet, first and last, without the bridge at its beginning.
fn whole(net: ipnet::Ipv4Net) -> Option<(std::net::Ipv4Addr, std::net::Ipv4Addr)> {
    let others = || net.hosts().filter(|a| *a != net.addr());
    Some((others().next()?, net.hosts().next_back().filter(|a| *a != net.addr())?))
}
