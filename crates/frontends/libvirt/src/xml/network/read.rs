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
    "bridge.hwaddr",
    "bridge.mtu",
    "dns.domain",
    "dns.forwarders",
    "dns.hosts",
    "dns.local",
    "dns.mode",
    "dns.plain",
    "dns.srv",
    "dns.txt",
    "ipv4.address",
    "ipv4.dhcp",
    "ipv4.dhcp.hosts",
    "ipv4.dhcp.ranges",
    "ipv4.firewall",
    "ipv4.nat",
    "ipv4.nat.address",
    "ipv4.routing",
    "ipv6.address",
    "ipv6.dhcp.ranges",
    "ipv6.dhcp.stateful",
    "ipv6.firewall",
    "ipv6.nat",
    "ipv6.nat.address",
    "ipv6.routing",
    "mtu",
    "parent",
];

/// Does a document say everything of this key?
pub fn is_said(key: &str) -> bool {
    SAID.contains(&key)
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

fn forward(e: Option<&Element>, new: &mut NewNetwork) -> Result<(), VirError> {
    let (v4, v6) = ("ipv4", "ipv6");
    let mut set = |family: &str, key: &str, value: bool| {
        new.config.insert(format!("{family}.{key}"), value.to_string());
    };
    let Some(e) = e else {
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
            set(
                v6,
                "nat",
                mode == "nat" && e.find("nat").is_some_and(|n| n.attribute("ipv6") == Some("yes")),
            );
            if mode == "open" {
                set(v4, "firewall", false);
                set(v6, "firewall", false);
            }
            let Some(nat) = e.find("nat") else { return Ok(()) };
            only(nat, &["address", "port"])?;
            if nat.find("port").is_some() {
                return Err(refuse("port", "ports of translated connections are chosen by the kernel"));
            }
            if let Some(range) = nat.find("address") {
                let (start, end) = (address(range, "start")?, address(range, "end")?);
                if start != end {
                    return Err(refuse("address", "what leaves is translated to one address, not a range"));
                }
                let family = if start.is_ipv4() { v4 } else { v6 };
                new.config.insert(format!("{family}.nat.address"), start.to_string());
            }
            Ok(())
        }
        "bridge" => {
            only(e, &["interface"])?;
            let Some(device) = device().filter(|_| e.all("interface").count() <= 1) else {
                let why = "a bridge of the host is named by the interface of a domain; a network of this mode has one \
                           <interface dev='…'/> of the host, on which guests get addresses of their own (macvtap)";
                return Err(refuse("forward mode='bridge'", why));
            };
            new.kind = NetworkKind::Macvlan;
            new.config.insert("parent".into(), device);
            Ok(())
        }
        other => Err(refuse(&format!("forward mode='{other}'"), "known are nat, route, open and bridge")),
    }
}

fn subnet(e: &Element, new: &mut NewNetwork) -> Result<(), VirError> {
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
    if new.config.contains_key(&format!("{family}.address")) {
        return Err(refuse("ip", format!("a network has one subnet of {family}")));
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
        config: Config::new(),
        hosts: vec![],
    };
    forward(e.find("forward"), &mut new)?;
    for child in e.elements() {
        match child.name() {
            "name" | "forward" => {}
            "uuid" => {
                let uuid = child.body().trim().parse().map_err(|_| wrong("malformed uuid element"))?;
                new.uuid = Some(uuid);
                new.config.insert(UUID.into(), uuid.to_string());
            }
            "description" => new.description = child.body().to_owned(),
            "bridge" => {
                // Whether it spans a tree, and how soon, is the kernel's default.
                let is = |n: &&str| *n == new.name || bridge_of(&new.name).as_deref() == Some(*n);
                if let Some(other) = child.attribute("name").filter(|n| !is(n)) {
                    let why = format!(
                        "a network's bridge has its name; call the network '{other}', or leave it out"
                    );
                    return Err(refuse("bridge name", why));
                }
            }
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
            "ip" => subnet(child, &mut new)?,
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
        let none = |e: &&Element| matches!(e.name(), "ip" | "dns" | "domain" | "mac" | "bridge");
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
        assert_eq!(with("<forward/>"), expect(&["ipv4.nat=true"]));
        assert_eq!(with("<forward mode='route'/>"), expect(&["ipv4.nat=false"]));
        assert_eq!(with("<forward mode='open'/>"), expect(&["ipv4.nat=false", "ipv4.firewall=false"]));
        let one = "<forward><nat><address start='192.0.2.1' end='192.0.2.1'/></nat></forward>";
        assert_eq!(with(one), expect(&["ipv4.nat=true", "ipv4.nat.address=192.0.2.1"]));
        let uplink = network(
            "<network><name>n1</name><forward mode='bridge'><interface dev='eth0'/></forward></network>",
        );
        let uplink = uplink.unwrap();
        assert_eq!((uplink.kind, uplink.config["parent"].as_str()), (NetworkKind::Macvlan, "eth0"));
    }

    #[test]
    fn what_is_refused_is_named() {
        for (inner, named) in [
            ("<bridge name='virbr7'/>", "bridge name"),
            ("<forward mode='hostdev'/>", "hostdev"),
            ("<forward mode='nat' dev='eth0'/>", "eth0"),
            ("<forward mode='bridge'/><bridge name='br0'/>", "bridge"),
            ("<portgroup name='p'/>", "portgroup"),
            ("<dns><cname/></dns>", "dns cname"),
            ("<ip address='10.0.0.1' prefix='24'><tftp root='/x'/></ip>", "tftp"),
            ("<ip address='10.0.0.1' prefix='24'/><ip address='10.1.0.1' prefix='24'/>", "one subnet"),
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
