//! NICs.

use super::{Keys, NicKind, nic_kind};
use crate::{
    Error, Result,
    firewall::{Action, policy},
    keys::parse_bool,
    network_ports::RateMore,
    options::NicOptions,
    spec::PortSpec,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, Ipv6Addr};

/// A NIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicDevice {
    /// What it is attached to.
    pub kind: NicKind,
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
    /// Another name of the host's interface.
    #[serde(default)]
    pub host_name: Option<String>,
    /// Packets that may wait to be sent, on the host's side.
    #[serde(default)]
    pub queue_length: Option<u32>,
    /// VLANs of a port of a bridge.
    #[serde(default)]
    pub vlans: PortVlans,
    /// Boot order: higher first.
    pub boot_priority: Option<u32>,
    /// What a virtual machine sees.
    #[serde(default)]
    pub model: NicModel,
    /// What of it is not as usual there.
    #[serde(default)]
    pub options: NicOptions,
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
    /// Intel 82540EM, of older systems.
    E1000,
    /// Realtek's, of older systems.
    Rtl8139,
    /// AMD's PCnet, of older systems.
    Pcnet,
    /// NE2000 on PCI, of older systems.
    #[serde(rename = "ne2k_pci")]
    Ne2k,
}

/// Names of the models as users write them (`io.bus`).
pub const NIC_MODELS: &[(&str, NicModel)] = &[
    ("virtio", NicModel::Virtio),
    ("e1000e", NicModel::E1000e),
    ("e1000", NicModel::E1000),
    ("rtl8139", NicModel::Rtl8139),
    ("pcnet", NicModel::Pcnet),
    ("ne2k_pci", NicModel::Ne2k),
];

/// VLANs of a port of a bridge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct PortVlans {
    /// What has no tag is of this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub untagged: Option<u16>,
    /// Those that pass with their tag.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tagged: Vec<u16>,
    /// What has no tag is of none, and is dropped (`vlan=none`).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub closed: bool,
}

impl PortVlans {
    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.untagged.is_none() && self.tagged.is_empty() && !self.closed
    }
}

impl NicDevice {
    /// The network that it may be on, see [`NicKind::network`].
    pub fn network(&self) -> Option<&str> {
        self.kind.network()
    }

    pub(super) fn parse(keys: &Keys<'_>) -> Result<Self> {
        let kind = NicKind::parse(keys)?;
        let name = keys.get("name");
        if let Some(n) = name {
            interface_name(&keys.field("name"), n)?;
        }
        let routed = matches!(kind, NicKind::Routed(_));
        let host_name = keys.get("host_name");
        if let Some(n) = host_name {
            interface_name(&keys.field("host_name"), n)?;
        }
        let vlans = match kind.network() {
            Some(_) if keys.get("vlan") == Some("none") => {
                PortVlans { untagged: None, tagged: tagged(keys)?, closed: true }
            }
            Some(_) => PortVlans { untagged: nic_kind::vlan(keys)?, tagged: tagged(keys)?, closed: false },
            None => PortVlans::default(),
        };
        let mtu = keys.number("mtu")?;
        if mtu.is_some_and(|m| !(68..=65535).contains(&m)) {
            return Err(Error::invalid(keys.field("mtu"), "an MTU is 68 to 65535 bytes"));
        }
        let model = keys.one_of("io.bus", NIC_MODELS)?.unwrap_or_default();
        let options = match keys.get("io.options") {
            Some(text) => NicOptions::parse(&keys.field("io.options"), text, model == NicModel::Virtio)?,
            None => NicOptions::default(),
        };
        if (options.ipv4.is_some() || options.ipv6.is_some()) && kind != NicKind::User {
            let text = "ipv4= and ipv6= are of nictype=user; others have the addresses of their network";
            return Err(Error::invalid(keys.field("io.options"), text));
        }
        Ok(Self {
            kind,
            name: name.map(str::to_owned),
            mac: keys.get("hwaddr").map(|m| parse_mac(&keys.field("hwaddr"), m)).transpose()?,
            ipv4: if routed { None } else { keys.parsed("ipv4.address", "an IPv4 address")? },
            ipv6: if routed { None } else { keys.parsed("ipv6.address", "an IPv6 address")? },
            routes: routes(keys)?,
            port: port(keys)?,
            mtu,
            host_name: host_name.map(str::to_owned),
            queue_length: keys.number("queue.tx.length")?,
            vlans,
            boot_priority: keys.number("boot.priority")?,
            model,
            options,
            connected: keys.get("connected").is_none() || keys.boolean("connected")?,
            attached: keys.get("attached").is_none() || keys.boolean("attached")?,
        })
    }
}

fn tagged(keys: &Keys<'_>) -> Result<Vec<u16>> {
    let field = keys.field("vlan.tagged");
    let words =
        keys.get("vlan.tagged").unwrap_or_default().split(',').map(str::trim).filter(|w| !w.is_empty());
    let mut all = vec![];
    for word in words {
        let (first, last) = word.split_once('-').unwrap_or((word, word));
        let (first, last) = (nic_kind::vlan_id(&field, first)?, nic_kind::vlan_id(&field, last)?);
        if first > last {
            return Err(Error::invalid(field, format!("{word:?} is not a range of VLANs")));
        }
        all.extend(first..=last);
    }
    all.sort_unstable();
    all.dedup();
    Ok(all)
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
    let (get, field) = (|k: &str| keys.get(k), |k: &str| keys.field(k));
    let (ingress_limit, egress_limit) = (limit("limits.ingress")?, limit("limits.egress")?);
    Ok(PortSpec {
        group: keys.get("portgroup").map(str::to_owned),
        ingress: RateMore::parse("limits.ingress", ingress_limit, &get, &field)?,
        egress: RateMore::parse("limits.egress", egress_limit, &get, &field)?,
        interface: String::new(),
        mac_filter: flag("security.mac_filtering")?,
        ipv4_filter: flag("security.ipv4_filtering")?,
        ipv6_filter: flag("security.ipv6_filtering")?,
        isolated: flag("security.port_isolation")?,
        ingress_limit: ingress_limit.or(max),
        egress_limit: egress_limit.or(max),
        priority: keys.number("limits.priority")?,
        policy: policy(&prefix, &|k| keys.get(k), Action::Drop)?,
    })
}

/// What a rate may be, in bits a second. The kernel counts nanoseconds times bytes in 64 bits: with a burst beside it more than
/// this does not fit for long, and it would refuse the tables of the whole host.
const RATES: std::ops::RangeInclusive<u64> = 8000..=100_000_000_000;

/// Bits a second, as Incus writes them: `10Mbit`, `1Gibit`, `250kbit`, or a number.
pub(crate) fn bits(field: &str, text: &str) -> Result<u64> {
    let wrong = || {
        Error::invalid(
            field,
            format!("{text:?} is not a rate from 8kbit to 100Gbit, such as 10Mbit or 1Gbit"),
        )
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
    number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(factor))
        .filter(|b| RATES.contains(b))
        .ok_or_else(wrong)
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
