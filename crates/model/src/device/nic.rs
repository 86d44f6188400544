//! NICs.

use super::Keys;
use crate::{
    Error, Result,
    firewall::{Action, policy},
    keys::parse_bool,
    spec::PortSpec,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, Ipv6Addr};

/// A NIC on a managed network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicDevice {
    /// Network name as written.
    pub network: String,
    /// Interface name in the guest (containers).
    pub name: Option<String>,
    /// MAC address as written, lower case.
    pub mac: Option<String>,
    /// Static IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// Static IPv6 address.
    #[serde(default)]
    pub ipv6: Option<Ipv6Addr>,
    /// Subnets that are reached over it.
    #[serde(default)]
    pub routes: Vec<IpNet>,
    /// Filters, limits and ACLs; the interface is not named yet.
    #[serde(default)]
    pub port: PortSpec,
    /// MTU.
    pub mtu: Option<u32>,
    /// Boot order: higher first.
    pub boot_priority: Option<u32>,
    /// What a virtual machine sees.
    #[serde(default)]
    pub model: NicModel,
    /// The cable is plugged.
    #[serde(default = "yes")]
    pub connected: bool,
    /// The device is there at all.
    #[serde(default = "yes")]
    pub attached: bool,
}

fn yes() -> bool {
    true
}

/// What a virtual machine sees as its NIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum NicModel {
    /// virtio-net.
    #[default]
    Virtio,
    /// Intel 82574L, for systems without virtio's drivers.
    E1000e,
}

/// Names of the models as users write them (`io.bus`).
pub const NIC_MODELS: &[(&str, NicModel)] = &[("virtio", NicModel::Virtio), ("e1000e", NicModel::E1000e)];

impl NicDevice {
    pub(super) fn parse(keys: &Keys<'_>) -> Result<Self> {
        keys.known(&[
            "type",
            "network",
            "nictype",
            "parent",
            "name",
            "hwaddr",
            "ipv4.address",
            "ipv4.routes",
            "ipv6.address",
            "ipv6.routes",
            "limits.egress",
            "limits.ingress",
            "limits.max",
            "security.acls",
            "security.acls.default.egress.action",
            "security.acls.default.egress.logged",
            "security.acls.default.ingress.action",
            "security.acls.default.ingress.logged",
            "security.ipv4_filtering",
            "security.ipv6_filtering",
            "security.mac_filtering",
            "security.port_isolation",
            "mtu",
            "boot.priority",
            "io.bus",
            "connected",
            "attached",
        ])?;
        let network = match (keys.get("network"), keys.get("nictype"), keys.get("parent")) {
            (Some(n), None, _) => n,
            // The older notation of the same thing.
            (None, Some("bridged"), Some(parent)) => parent,
            (Some(_), Some(_), _) => {
                return Err(Error::invalid(
                    keys.field("nictype"),
                    "give either network or nictype, not both",
                ));
            }
            (None, Some(t), _) if t != "bridged" => {
                return Err(Error::unsupported(format!("NICs of nictype {t:?} are not there yet"))
                    .at(keys.field("nictype")));
            }
            _ => return Err(Error::invalid(keys.field("network"), "a NIC needs the name of a network")),
        };
        let name = keys.get("name");
        if let Some(n) = name {
            interface_name(&keys.field("name"), n)?;
        }
        Ok(Self {
            network: network.to_owned(),
            name: name.map(str::to_owned),
            mac: keys.get("hwaddr").map(|m| parse_mac(&keys.field("hwaddr"), m)).transpose()?,
            ipv4: keys.parsed("ipv4.address", "an IPv4 address")?,
            ipv6: keys.parsed("ipv6.address", "an IPv6 address")?,
            routes: routes(keys)?,
            port: port(keys)?,
            mtu: keys.number("mtu")?,
            boot_priority: keys.number("boot.priority")?,
            model: keys.one_of("io.bus", NIC_MODELS)?.unwrap_or_default(),
            connected: keys.get("connected").is_none() || keys.boolean("connected")?,
            attached: keys.get("attached").is_none() || keys.boolean("attached")?,
        })
    }
}

fn routes(keys: &Keys<'_>) -> Result<Vec<IpNet>> {
    let mut all = vec![];
    for (key, v4) in [("ipv4.routes", true), ("ipv6.routes", false)] {
        for word in keys.get(key).unwrap_or_default().split(',').map(str::trim).filter(|w| !w.is_empty()) {
            let net = if v4 {
                word.parse::<Ipv4Net>().map(|n| IpNet::V4(n.trunc()))
            } else {
                word.parse::<Ipv6Net>().map(|n| IpNet::V6(n.trunc()))
            };
            all.push(net.map_err(|_| Error::invalid(keys.field(key), format!("{word:?} is not a subnet")))?);
        }
    }
    Ok(all)
}

fn port(keys: &Keys<'_>) -> Result<PortSpec> {
    let flag = |key: &str| keys.get(key).map_or(Ok(false), |v| parse_bool(&keys.field(key), v));
    let limit = |key: &str| keys.get(key).map(|v| bits(&keys.field(key), v)).transpose();
    let max = limit("limits.max")?;
    for key in ["limits.ingress", "limits.egress"] {
        if max.is_some() && keys.get(key).is_some() {
            return Err(Error::invalid(keys.field(key), "limits.max says both directions: give either"));
        }
    }
    let prefix = keys.field("");
    Ok(PortSpec {
        interface: String::new(),
        mac_filter: flag("security.mac_filtering")?,
        ipv4_filter: flag("security.ipv4_filtering")?,
        ipv6_filter: flag("security.ipv6_filtering")?,
        isolated: flag("security.port_isolation")?,
        ingress_limit: limit("limits.ingress")?.or(max),
        egress_limit: limit("limits.egress")?.or(max),
        policy: policy(&prefix, &|k| keys.get(k), Action::Drop)?,
    })
}

/// Bits a second, as Incus writes them: `10Mbit`, `1Gibit`, `250kbit`, or a number.
fn bits(field: &str, text: &str) -> Result<u64> {
    let wrong = || {
        Error::invalid(field, format!("{text:?} is not a rate of at least 8kbit, such as 10Mbit or 1Gbit"))
    };
    let at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let factor: u64 = match unit.trim().strip_suffix("bit").unwrap_or(unit.trim()) {
        "" => 1,
        "k" => 1000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return Err(wrong()),
    };
    number.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)).filter(|b| *b >= 8000).ok_or_else(wrong)
}

/// Checks an interface name as Linux takes it (1 to 15 bytes, no `/`, no white space); names that programs would take for
/// an option, or the kernel's settings for all interfaces, are refused too.
pub fn interface_name(field: &str, s: &str) -> Result<()> {
    let ok = (1..=15).contains(&s.len())
        && !matches!(s, "." | ".." | "all" | "default")
        && !s.starts_with('-')
        && s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if ok {
        Ok(())
    } else {
        Err(Error::invalid(field, format!("{s:?} is not an interface name (1 to 15 of A-Z a-z 0-9 . _ -)")))
    }
}

/// Parses a unicast MAC address into lower case with colons.
pub fn parse_mac(field: &str, s: &str) -> Result<String> {
    let wrong = |why: &str| {
        Error::invalid(field, format!("{s:?} is not a MAC address{why}; write it as 10:66:6a:12:34:56"))
    };
    let parts: Vec<u8> = s
        .split(':')
        .map(|p| if p.len() == 2 { u8::from_str_radix(p, 16).map_err(|_| wrong("")) } else { Err(wrong("")) })
        .collect::<Result<_>>()?;
    let octets: [u8; 6] = parts.try_into().map_err(|_| wrong(""))?;
    if octets[0] & 1 == 1 {
        return Err(wrong(" of one interface (the multicast bit is set)"));
    }
    Ok(octets.map(|o| format!("{o:02x}")).join(":"))
}
