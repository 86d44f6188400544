//! Networks of libvirt's documents as Karst's keys. What has no key and would change what the network is, is refused by name.

use super::UUID;
use crate::{
    error::VirError,
    xml::{
        Element,
        machine::{refuse, wrong},
        read::document,
    },
};
use karst_model::{Config, uplink::NetworkKind};
use std::net::IpAddr;
use uuid::Uuid;

/// Keys that a document says everything of; others are kept when it changes.
const SAID: &[&str] = &[
    "bridge.forward_delay",
    "bridge.hwaddr",
    "bridge.mtu",
    "bridge.stp",
    "dns.domain",
    "dns.forwarders",
    "dns.hosts",
    "dns.local",
    "dns.mode",
    "dns.plain",
    "dns.srv",
    "dns.txt",
    "ipv4.address",
    "ipv4.addresses",
    "ipv4.dhcp",
    "ipv4.dhcp.hosts",
    "ipv4.dhcp.ranges",
    "ipv4.firewall",
    "ipv4.nat",
    "ipv4.nat.address",
    "ipv4.nat.ports",
    "ipv4.routing",
    "ipv6.address",
    "ipv6.addresses",
    "ipv6.dhcp.ranges",
    "ipv6.dhcp.stateful",
    "ipv6.firewall",
    "ipv6.nat",
    "ipv6.nat.address",
    "ipv6.nat.ports",
    "ipv6.routing",
    "mode",
    "mtu",
    "parent",
];

/// Does a document say everything of this key?
pub fn is_said(key: &str) -> bool {
    SAID.contains(&key) || key.starts_with("limits.") || key.starts_with("portgroup.")
}

/// A network as its document says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewNetwork {
    /// Name.
    pub name: String,
    /// UUID, where it says one.
    pub uuid: Option<Uuid>,
    /// What it is made of.
    pub kind: NetworkKind,
    /// User's text.
    pub description: String,
    /// What the bridge is to be called, where that is not the network's name.
    pub interface: Option<String>,
    /// Keys of Karst.
    pub config: Config,
    /// Addresses that interfaces are to have.
    pub hosts: Vec<Host>,
}

/// An address that an interface is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// MAC address, lower case.
    pub mac: String,
    /// Name.
    pub name: Option<String>,
    /// Address.
    pub address: IpAddr,
}

/// What is said of such a host, to find one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostLike {
    /// MAC address, lower case.
    pub mac: Option<String>,
    /// Name.
    pub name: Option<String>,
    /// Address.
    pub address: Option<IpAddr>,
}

impl HostLike {
    /// All that is said is so of `host`.
    pub fn is(&self, host: &Host) -> bool {
        self.mac.as_ref().is_none_or(|m| *m == host.mac)
            && (self.name.is_none() || self.name == host.name)
            && self.address.is_none_or(|a| a == host.address)
    }

    /// Something that is said is so of `host`.
    pub fn touches(&self, host: &Host) -> bool {
        self.mac.as_ref() == Some(&host.mac)
            && self.address.is_none_or(|a| a.is_ipv4() == host.address.is_ipv4())
            || self.name.is_some() && self.name == host.name
            || self.address == Some(host.address)
    }
}

fn only(e: &Element, known: &[&str]) -> Result<(), VirError> {
    match e.elements().iter().find(|c| !known.contains(&c.name())) {
        None => Ok(()),
        Some(other) => Err(refuse(other.name(), format!("a network's <{}> has none of it here", e.name()))),
    }
}

fn number(e: &Element, name: &str) -> Result<Option<u32>, VirError> {
    let value = e.attribute(name);
    value
        .map(|v| v.parse().map_err(|_| wrong(format!("{name} of <{}> is no number: '{v}'", e.name()))))
        .transpose()
}

fn address(e: &Element, name: &str) -> Result<IpAddr, VirError> {
    let value = e.attribute(name).unwrap_or_default();
    value.parse().map_err(|_| wrong(format!("{name} of <{}> is no address: '{value}'", e.name())))
}

/// What is said of a host of DHCP.
///
/// # Errors
/// XML error, for what is none; unsupported for what is known by an identifier, or has a lease of its own.
pub fn host_like(e: &Element) -> Result<HostLike, VirError> {
    if e.name() != "host" {
        return Err(wrong(format!("expected <host>, found <{}>", e.name())));
    }
    only(e, &[])?;
    if e.attribute("id").is_some() {
        return Err(refuse("host id", "addresses are reserved by the MAC address of an interface"));
    }
    let address = e.attribute("ip").map(|_| address(e, "ip")).transpose()?;
    let said = HostLike {
        mac: e.attribute("mac").map(str::to_ascii_lowercase),
        name: e.attribute("name").map(str::to_owned),
        address,
    };
    match said.mac.is_none() && said.name.is_none() && said.address.is_none() {
        true => Err(wrong(
            "At least one of name, mac, or ip attribute must be specified for static host definition",
        )),
        false => Ok(said),
    }
}

/// A host of DHCP.
///
/// # Errors
/// XML error, for what is incomplete; unsupported for hosts without a MAC address.
pub fn host(e: &Element) -> Result<Host, VirError> {
    let HostLike { mac, name, address } = host_like(e)?;
    let Some(mac) = mac else {
        return Err(refuse("host", "addresses are reserved by the MAC address of an interface"));
    };
    let address = address.ok_or_else(|| wrong("Missing IP address in static host definition"))?;
    Ok(Host { mac, name, address })
}

/// A range of DHCP as Karst writes it.
///
/// # Errors
/// XML error, for what is none.
pub fn range(e: &Element) -> Result<String, VirError> {
    if e.name() != "range" {
        return Err(wrong(format!("expected <range>, found <{}>", e.name())));
    }
    only(e, &[])?;
    Ok(format!("{}-{}", address(e, "start")?, address(e, "end")?))
}

fn yes(e: &Element, name: &str) -> bool {
    e.attribute(name) == Some("yes")
}

/// Ports that libvirt translates to where a document says none, which it then shows.
const PORTS: &str = "1024-65535";

/// Addresses and ports that what leaves is translated to.
fn translation(nat: Option<&Element>, new: &mut NewNetwork) -> Result<(), VirError> {
    let both = nat.is_some_and(|nat| yes(nat, "ipv6"));
    let mut ports = PORTS.to_owned();
    if let Some(nat) = nat {
        only(nat, &["address", "port"])?;
        if let Some(range) = nat.find("address") {
            let start = address(range, "start")?;
            let end = if range.attribute("end").is_some() { address(range, "end")? } else { start };
            let family = if start.is_ipv4() { "ipv4" } else { "ipv6" };
            let said = if start == end { start.to_string() } else { format!("{start}-{end}") };
            new.config.insert(format!("{family}.nat.address"), said);
        }
        if let Some(range) = nat.find("port") {
            let bound = |name: &str| {
                let missing = || wrong(format!("Missing {name} of <port> in <nat>"));
                number(range, name)?.filter(|n| (1..=65535).contains(n)).ok_or_else(missing)
            };
            ports = format!("{}-{}", bound("start")?, bound("end")?);
        }
    }
    new.config.insert("ipv4.nat.ports".into(), ports.clone());
    if both && !new.config.contains_key("ipv6.nat.address") {
        new.config.insert("ipv6.nat.ports".into(), ports);
    }
    Ok(())
}

fn forward(network: &Element, new: &mut NewNetwork) -> Result<(), VirError> {
    let (v4, v6) = ("ipv4", "ipv6");
    let mut set = |family: &str, key: &str, value: bool| {
        new.config.insert(format!("{family}.{key}"), value.to_string());
    };
    let Some(e) = network.find("forward") else {
        for family in [v4, v6] {
            set(family, "nat", false);
            set(family, "routing", false);
        }
        return Ok(());
    };
    let mode = e.attribute("mode").unwrap_or("nat");
    let device = || {
        let inner = e.all("interface").next().and_then(|i| i.attribute("dev"));
        e.attribute("dev").or(inner).map(str::to_owned)
    };
    match mode {
        "nat" | "route" | "open" => {
            only(e, if mode == "nat" { &["nat"] } else { &[] })?;
            if let Some(device) = device() {
                let why =
                    format!("what leaves goes where the host's routes lead, not through {device} alone");
                return Err(refuse("forward dev", why));
            }
            set(v4, "nat", mode == "nat");
            set(v6, "nat", mode == "nat" && e.find("nat").is_some_and(|n| yes(n, "ipv6")));
            if mode == "open" {
                set(v4, "firewall", false);
                set(v6, "firewall", false);
            }
            if mode == "nat" { translation(e.find("nat"), new) } else { Ok(()) }
        }
        "bridge" | "private" | "vepa" | "passthrough" => {
            only(e, &["interface"])?;
            let bridge =
                network.find("bridge").and_then(|b| b.attribute("name")).filter(|_| mode == "bridge");
            let parent = match (device(), bridge) {
                (None, Some(bridge)) => {
                    new.kind = NetworkKind::HostBridge;
                    bridge.to_owned()
                }
                (Some(_), Some(_)) => {
                    return Err(wrong("bridge name and an interface of <forward> exclude each other"));
                }
                (Some(device), None) if e.all("interface").count() <= 1 => {
                    new.kind = NetworkKind::Macvlan;
                    if mode != "bridge" {
                        new.config.insert("mode".into(), mode.into());
                    }
                    device
                }
                (Some(_), None) => {
                    let why = "guests share one interface of the host; a bond is one too";
                    return Err(refuse("forward interface", why));
                }
                (None, None) => {
                    let why = "it leads to an interface of the host, <interface dev='…'/>, or with mode='bridge' to a bridge of \
                               the host, <bridge name='…'/>";
                    return Err(refuse(&format!("forward mode='{mode}'"), why));
                }
            };
            new.config.insert("parent".into(), parent);
            Ok(())
        }
        "hostdev" => {
            let why = "no device of the host is handed to a virtual machine: there is no VFIO here; a pool of them could give \
                       none. forward mode='passthrough' gives one guest an interface";
            Err(refuse("forward mode='hostdev'", why))
        }
        other => Err(refuse(
            &format!("forward mode='{other}'"),
            "known are nat, route, open, bridge, private, vepa and passthrough",
        )),
    }
}

/// The family, address and prefix of `<ip>`.
fn net(e: &Element) -> Result<(&'static str, IpAddr, u32), VirError> {
    only(e, &["dhcp"])?;
    let at = address(e, "address")?;
    let family = match e.attribute("family") {
        None | Some("ipv4") => "ipv4",
        Some("ipv6") => "ipv6",
        Some(other) => return Err(wrong(format!("unknown address family '{other}'"))),
    };
    if at.is_ipv4() != (family == "ipv4") {
        return Err(wrong(format!("family {family} specified for the address {at}")));
    }
    let prefix = match (number(e, "prefix")?, e.attribute("netmask")) {
        (Some(_), Some(_)) => return Err(wrong("an address has a prefix or a netmask, not both")),
        (Some(n), None) => n,
        (None, Some(mask)) => {
            let mask: IpAddr = mask.parse().map_err(|_| wrong(format!("netmask is none: '{mask}'")))?;
            u32::from(
                ipnet::ip_mask_to_prefix(mask).map_err(|_| wrong(format!("netmask is none: '{mask}'")))?,
            )
        }
        (None, None) => return Err(wrong(format!("the address {at} has neither a prefix nor a netmask"))),
    };
    Ok((family, at, prefix))
}

/// All `<ip>`: of each family the one with DHCP is the network's first, else the first is; the others are further addresses.
fn subnets(all: &[&Element], new: &mut NewNetwork) -> Result<(), VirError> {
    let nets: Vec<_> = all.iter().map(|e| Ok((net(e)?, *e))).collect::<Result<_, VirError>>()?;
    for family in ["ipv4", "ipv6"] {
        let of: Vec<_> = nets.iter().filter(|((f, ..), _)| *f == family).collect();
        let served = of.iter().filter(|(_, e)| e.find("dhcp").is_some()).count();
        if served > 1 {
            let why = format!("dhcp is supported only for a single {family} address on each network");
            return Err(refuse("ip dhcp", why));
        }
        let first = of.iter().position(|(_, e)| e.find("dhcp").is_some()).unwrap_or(0);
        let mut more = vec![];
        for (at, ((_, address, prefix), e)) in of.iter().enumerate() {
            match at == first {
                true => subnet(e, (family, *address, *prefix), new)?,
                false => more.push(format!("{address}/{prefix}")),
            }
        }
        if !more.is_empty() {
            new.config.insert(format!("{family}.addresses"), more.join(","));
        }
    }
    Ok(())
}

fn subnet(
    e: &Element,
    (family, at, prefix): (&str, IpAddr, u32),
    new: &mut NewNetwork,
) -> Result<(), VirError> {
    new.config.insert(format!("{family}.address"), format!("{at}/{prefix}"));
    let dhcp = e.find("dhcp");
    if family == "ipv4" {
        new.config.insert("ipv4.dhcp".into(), dhcp.is_some().to_string());
    } else if dhcp.is_some() {
        new.config.insert("ipv6.dhcp.stateful".into(), "true".into());
    }
    let Some(dhcp) = dhcp else { return Ok(()) };
    only(dhcp, &["range", "host"])?;
    let ranges: Vec<String> = dhcp.all("range").map(range).collect::<Result<_, _>>()?;
    // All of the subnet is what is shown where nothing is said.
    let all = format!("{at}/{prefix}").parse().ok().and_then(super::whole).map(|(a, b)| format!("{a}-{b}"));
    let whole = ranges.len() == 1 && all.as_ref() == ranges.first();
    if !ranges.is_empty() && !whole {
        new.config.insert(format!("{family}.dhcp.ranges"), ranges.join(","));
    }
    for e in dhcp.all("host") {
        new.hosts.push(host(e)?);
    }
    Ok(())
}

/// `<bridge>` of a network that is one; `there`: what the bridge of the network of this name is called, where there is one.
fn bridge(e: &Element, there: Option<String>, new: &mut NewNetwork) -> Result<(), VirError> {
    if let Some(name) = e.attribute("name") {
        match there {
            Some(there) if there != name => {
                let why = format!(
                    "what the bridge of a network is called ('{there}') stays as it was when it was made"
                );
                return Err(refuse("bridge name", why));
            }
            None if name != new.name => new.interface = Some(name.to_owned()),
            _ => {}
        }
    }
    for (attribute, fine) in [("zone", None), ("macTableManager", Some("kernel"))] {
        if let Some(said) = e.attribute(attribute).filter(|said| Some(*said) != fine) {
            return Err(refuse(&format!("bridge {attribute}"), format!("'{said}' is not there")));
        }
    }
    match e.attribute("stp") {
        Some("on") => drop(new.config.insert("bridge.stp".into(), "true".into())),
        None | Some("off") => {}
        Some(other) => return Err(wrong(format!("stp of <bridge> is neither on nor off: '{other}'"))),
    }
    if let Some(delay) = number(e, "delay")?.filter(|delay| *delay > 0) {
        new.config.insert("bridge.forward_delay".into(), delay.to_string());
    }
    Ok(())
}

/// Reads the document of a network.
///
/// # Errors
/// XML error, for what is none; unsupported by name.
pub fn network(text: &str) -> Result<NewNetwork, VirError> {
    network_again(text, &|_| None)
}

/// The same of one that may be there: `bridge_of` answers its bridge by its name, which is then said as it is.
///
/// # Errors
/// Those of [`network`].
pub fn network_again(text: &str, bridge_of: &dyn Fn(&str) -> Option<String>) -> Result<NewNetwork, VirError> {
    let e = document(text)?;
    if e.name() != "network" {
        return Err(wrong(format!("unexpected root element <{}>, expecting <network>", e.name())));
    }
    let named = e.find("name").map(Element::body).filter(|n| !n.is_empty());
    let name = named.ok_or_else(|| wrong("missing name in network"))?.to_owned();
    let mut new = NewNetwork {
        name,
        uuid: None,
        kind: NetworkKind::Bridge,
        description: String::new(),
        interface: None,
        config: Config::new(),
        hosts: vec![],
    };
    forward(&e, &mut new)?;
    let ips: Vec<&Element> = e.all("ip").collect();
    subnets(&ips, &mut new)?;
    for child in e.elements() {
        match child.name() {
            "name" | "forward" | "ip" => {}
            "uuid" => {
                let uuid = child.body().trim().parse().map_err(|_| wrong("malformed uuid element"))?;
                new.uuid = Some(uuid);
                new.config.insert(UUID.into(), uuid.to_string());
            }
            "description" => new.description = child.body().to_owned(),
            "bridge" if new.kind == NetworkKind::Bridge => bridge(child, bridge_of(&new.name), &mut new)?,
            "bridge" if new.kind == NetworkKind::HostBridge => {}
            "mtu" => {
                let size = number(child, "size")?.ok_or_else(|| wrong("mtu without a size"))?;
                let key = if new.kind == NetworkKind::Bridge { "bridge.mtu" } else { "mtu" };
                new.config.insert(key.into(), size.to_string());
            }
            "mac" => {
                let mac = child.attribute("address").ok_or_else(|| wrong("mac without an address"))?;
                new.config.insert("bridge.hwaddr".into(), mac.to_ascii_lowercase());
            }
            "domain" => {
                let name = child.attribute("name").ok_or_else(|| wrong("domain without a name"))?;
                new.config.insert("dns.domain".into(), name.to_owned());
                match child.attribute("localOnly") {
                    Some("yes") => {}
                    None | Some("no") => drop(new.config.insert("dns.local".into(), "false".into())),
                    Some(other) => {
                        let text = format!("localOnly of <domain> is neither yes nor no: '{other}'");
                        return Err(wrong(text));
                    }
                }
            }
            "dns" => super::dns::read(child, &mut new.config)?,
            "bandwidth" => super::ports::read_rates(&e, &mut new.config)?,
            "portgroup" => {
                let (name, keys) = super::ports::group(child)?;
                if keys.keys().any(|key| new.config.contains_key(key)) {
                    return Err(wrong(format!("multiple <portgroup> elements with the name '{name}'")));
                }
                new.config.extend(keys);
            }
            "route" => {
                let why = "the host routes what ipv4.routes and ipv6.routes say over the bridge itself, to guests of which it is known";
                return Err(refuse("route", why));
            }
            other => return Err(refuse(other, "networks have none of it here")),
        }
    }
    if new.kind == NetworkKind::Bridge {
        for family in ["ipv4", "ipv6"] {
            new.config.entry(format!("{family}.address")).or_insert_with(|| "none".into());
        }
        // Of a subnet that is not there nothing is said.
        for family in ["ipv4", "ipv6"] {
            if new.config[&format!("{family}.address")] == "none" {
                let prefix = format!("{family}.");
                let address = format!("{family}.address");
                new.config.retain(|key, _| !key.starts_with(&prefix) || *key == address);
            }
        }
    } else {
        let none = |e: &&Element| {
            let own =
                matches!(e.name(), "ip" | "dns" | "domain" | "mac" | "bridge" | "bandwidth" | "portgroup");
            own && !(e.name() == "bridge" && new.kind == NetworkKind::HostBridge)
        };
        if let Some(child) = e.elements().iter().find(none) {
            return Err(refuse(child.name(), "a network on an interface of the host has what is there"));
        }
        new.config.retain(|key, _| !key.starts_with("ipv"));
    }
    Ok(new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    fn keys(text: &str) -> Vec<String> {
        let new = network(text).unwrap();
        let mut all: Vec<String> = new.config.iter().map(|(k, v)| format!("{k}={v}")).collect();
        all.sort();
        all
    }

    #[test]
    fn forwarding() {
        let with = |forward: &str| {
            keys(&format!(
                "<network><name>n1</name>{forward}<ip address='10.9.8.1' netmask='255.255.255.0'><dhcp><range start='10.9.8.20' end='10.9.8.30'/></dhcp></ip></network>"
            ))
        };
        let rest = ["ipv4.address=10.9.8.1/24", "ipv4.dhcp=true", "ipv4.dhcp.ranges=10.9.8.20-10.9.8.30"];
        let expect = |more: &[&str]| {
            let mut all: Vec<String> = rest.iter().chain(more).map(|s| (*s).to_owned()).collect();
            all.push("ipv6.address=none".into());
            all.sort();
            all
        };
        assert_eq!(with(""), expect(&["ipv4.nat=false", "ipv4.routing=false"]));
        assert_eq!(with("<forward/>"), expect(&["ipv4.nat=true", "ipv4.nat.ports=1024-65535"]));
        assert_eq!(with("<forward mode='route'/>"), expect(&["ipv4.nat=false"]));
        assert_eq!(with("<forward mode='open'/>"), expect(&["ipv4.nat=false", "ipv4.firewall=false"]));
        let one = "<forward><nat><address start='192.0.2.1' end='192.0.2.1'/></nat></forward>";
        let ports = "ipv4.nat.ports=1024-65535";
        assert_eq!(with(one), expect(&["ipv4.nat=true", "ipv4.nat.address=192.0.2.1", ports]));
        let range = "<forward><nat><address start='192.0.2.1' end='192.0.2.9'/><port start='500' end='1000'/></nat></forward>";
        let all = ["ipv4.nat=true", "ipv4.nat.address=192.0.2.1-192.0.2.9", "ipv4.nat.ports=500-1000"];
        assert_eq!(with(range), expect(&all));
        let uplink = network(
            "<network><name>n1</name><forward mode='bridge'><interface dev='eth0'/></forward></network>",
        );
        let uplink = uplink.unwrap();
        assert_eq!((uplink.kind, uplink.config["parent"].as_str()), (NetworkKind::Macvlan, "eth0"));
        let of = |inner: &str| network(&format!("<network><name>n1</name>{inner}</network>")).unwrap();
        let vepa = of("<forward dev='eth0' mode='vepa'><interface dev='eth0'/></forward>");
        assert_eq!((vepa.kind, vepa.config["mode"].as_str()), (NetworkKind::Macvlan, "vepa"));
        let bridge = of("<forward mode='bridge'/><bridge name='br0'/>");
        assert_eq!((bridge.kind, bridge.config["parent"].as_str()), (NetworkKind::HostBridge, "br0"));
        let named = of("<bridge name='virbr7' stp='on' delay='3'/>");
        assert_eq!(named.interface.as_deref(), Some("virbr7"));
        assert_eq!(
            (named.config["bridge.stp"].as_str(), named.config["bridge.forward_delay"].as_str()),
            ("true", "3")
        );
        let two = of("<ip address='10.0.0.1' prefix='24'/><ip address='10.1.0.1' prefix='24'><dhcp/></ip>");
        assert_eq!(
            (two.config["ipv4.address"].as_str(), two.config["ipv4.addresses"].as_str()),
            ("10.1.0.1/24", "10.0.0.1/24")
        );
        let there = |name: &str| (name == "n1").then(|| "virbr1".to_owned());
        let other = "<network><name>n1</name><bridge name='virbr7'/></network>";
        assert!(network_again(other, &there).unwrap_err().text.contains("virbr1"));
    }

    #[test]
    fn what_is_refused_is_named() {
        for (inner, named) in [
            ("<bridge zone='public'/>", "bridge zone"),
            ("<bridge macTableManager='libvirt'/>", "macTableManager"),
            ("<forward mode='hostdev'><pf dev='eth0'/></forward>", "VFIO"),
            ("<forward mode='nat' dev='eth0'/>", "eth0"),
            ("<forward mode='bridge'/>", "forward mode='bridge'"),
            ("<forward mode='vepa'/><bridge name='br0'/>", "forward mode='vepa'"),
            (
                "<forward mode='vepa'><interface dev='eth0'/><interface dev='eth1'/></forward>",
                "forward interface",
            ),
            ("<forward dev='eth0' mode='bridge'/><ip address='10.0.0.1' prefix='24'/>", "ip"),
            ("<portgroup name='p'><virtualport/></portgroup>", "portgroup virtualport"),
            ("<forward dev='eth0' mode='bridge'/><portgroup name='p'/>", "portgroup"),
            ("<dns><cname/></dns>", "dns cname"),
            ("<route address='10.9.0.0' prefix='16' gateway='10.0.0.9'/>", "route"),
            ("<ip address='10.0.0.1' prefix='24'><tftp root='/x'/></ip>", "tftp"),
            (
                "<ip address='10.0.0.1' prefix='24'><dhcp/></ip><ip address='10.1.0.1' prefix='24'><dhcp/></ip>",
                "single ipv4 address",
            ),
        ] {
            let e = network(&format!("<network><name>n1</name>{inner}</network>")).unwrap_err();
            assert!(e.code == Code::ConfigUnsupported && e.text.contains(named), "{inner}: {e:?}");
        }
        for wrong in [
            "<network/>",
            "<domain/>",
            "<network><name>n</name><ip address='x' prefix='24'/></network>",
            "<network><name>n</name><ip address='10.0.0.1'/></network>",
            "<network><name>n</name><ip address='10.0.0.1' netmask='255.0.255.0'/></network>",
            "<network><name>n</name><uuid>x</uuid></network>",
        ] {
            assert_eq!(network(wrong).unwrap_err().code, Code::XmlError, "{wrong}");
        }
    }

    #[test]
    fn hosts() {
        let e = document("<host mac='52:54:00:AA:BB:CC' name='x' ip='10.0.0.7'/>").unwrap();
        let found = host(&e).unwrap();
        assert_eq!((found.mac.as_str(), found.address.to_string()), ("52:54:00:aa:bb:cc", "10.0.0.7".into()));
        assert!(host(&document("<host name='x' ip='10.0.0.7'/>").unwrap()).is_err());
    }
}
