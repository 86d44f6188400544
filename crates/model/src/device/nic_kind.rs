//! Kinds of NICs: what a NIC is attached to, and which keys each kind has (Incus' `nictype`).

use super::{Keys, nic::interface_name};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What a NIC is attached to, as written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum NicKind {
    /// A network of this platform (`network=`), whatever that is made of.
    Network {
        /// Its name.
        network: String,
    },
    /// A bridge (`nictype=bridged`): a managed network's when there is one of this name, else one of the host.
    Bridged {
        /// Its name.
        parent: String,
    },
    /// An address of its own on an interface of the host (`nictype=macvlan`).
    Macvlan(ParentLink),
    /// An interface of the host itself (`nictype=physical`).
    Physical(ParentLink),
    /// A cable between host and guest (`nictype=p2p`).
    PointToPoint,
    /// A cable between host and guest, with addresses that the host answers for on its own network (`nictype=routed`).
    Routed(RoutedLink),
    /// What a virtual machine's QEMU reaches as a program of the host (`nictype=user`).
    User,
}

/// An interface of the host, or a VLAN on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParentLink {
    /// The interface.
    pub parent: String,
    /// VLAN on it, 1 to 4094.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// How guests share it, where it is shared.
    #[serde(default, skip_serializing_if = "MacvlanMode::is_usual")]
    pub mode: MacvlanMode,
}

/// How guests with addresses of their own share an interface of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum MacvlanMode {
    /// They reach each other.
    #[default]
    Bridge,
    /// They do not.
    Private,
    /// They do by way of a switch beyond the interface that sends back what it gets.
    Vepa,
    /// One has it alone.
    Passthrough,
}

impl MacvlanMode {
    /// All of them, by name.
    pub const ALL: [(&'static str, Self); 4] = [
        ("bridge", Self::Bridge),
        ("private", Self::Private),
        ("vepa", Self::Vepa),
        ("passthrough", Self::Passthrough),
    ];

    /// As users write it.
    pub fn as_str(self) -> &'static str {
        Self::ALL.iter().find(|(_, mode)| *mode == self).map_or("bridge", |(name, _)| name)
    }

    fn is_usual(&self) -> bool {
        *self == Self::default()
    }
}

/// What a routed NIC has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoutedLink {
    /// The interface of the host on whose network the addresses are answered for; none: routes only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<ParentLink>,
    /// Addresses of the guest.
    pub addresses: Vec<IpAddr>,
    /// The host's addresses on the cable, which are the guest's gateways: IPv4, IPv6.
    pub host: (Ipv4Addr, Ipv6Addr),
    /// The guest gets a default route by IPv4, by IPv6.
    pub gateways: (bool, bool),
}

const COMMON: &[&str] = &[
    "type",
    "nictype",
    "name",
    "hwaddr",
    "mtu",
    "boot.priority",
    "io.bus",
    "io.options",
    "connected",
    "attached",
];
const CABLE: &[&str] = &[
    "host_name",
    "limits.egress",
    "limits.egress.burst",
    "limits.egress.peak",
    "limits.ingress",
    "limits.ingress.burst",
    "limits.ingress.peak",
    "limits.max",
    "limits.priority",
    "queue.tx.length",
    "ipv4.routes",
    "ipv6.routes",
];
const BRIDGE: &[&str] = &[
    "parent",
    "ipv4.address",
    "ipv6.address",
    "security.ipv4_filtering",
    "security.ipv6_filtering",
    "security.mac_filtering",
    "security.port_isolation",
    "vlan",
    "vlan.tagged",
];
const NETWORK: &[&str] = &[
    "network",
    "portgroup",
    "security.acls",
    "security.acls.default.egress.action",
    "security.acls.default.egress.logged",
    "security.acls.default.ingress.action",
    "security.acls.default.ingress.logged",
];
const PARENT: &[&str] = &["parent", "vlan"];
const ROUTED: &[&str] = &[
    "parent",
    "vlan",
    "ipv4.address",
    "ipv4.gateway",
    "ipv4.host_address",
    "ipv6.address",
    "ipv6.gateway",
    "ipv6.host_address",
];
/// Kinds as users write them, and their keys.
const KINDS: &[(&str, &[&[&str]])] = &[
    ("bridged", &[COMMON, BRIDGE, CABLE, NETWORK]),
    ("macvlan", &[COMMON, PARENT]),
    ("p2p", &[COMMON, CABLE]),
    ("physical", &[COMMON, PARENT]),
    ("routed", &[COMMON, ROUTED, CABLE]),
    ("user", &[COMMON]),
];
const LATER: &[&str] = &["ipvlan", "ovn", "sriov"];

/// Kinds as users write them, and the keys that each has.
pub fn nic_kinds() -> impl Iterator<Item = (&'static str, Vec<&'static str>)> {
    KINDS.iter().map(|(kind, lists)| (*kind, lists.iter().flat_map(|l| l.iter().copied()).collect()))
}

impl NicKind {
    pub(super) fn parse(keys: &Keys<'_>) -> Result<Self> {
        let network = keys.get("network");
        let kind = match (network, keys.get("nictype")) {
            (Some(_), Some(_)) => {
                return Err(Error::invalid(
                    keys.field("nictype"),
                    "give either network or nictype, not both",
                ));
            }
            (Some(_), None) => "bridged",
            (None, Some(kind)) => kind,
            (None, None) => {
                let all: Vec<&str> = KINDS
                    .iter()
                    .flat_map(|(_, lists)| lists.iter().flat_map(|l| l.iter().copied()))
                    .collect();
                keys.known(&all)?;
                return Err(Error::invalid(
                    keys.field("network"),
                    "a NIC needs the name of a network, or a nictype (bridged, macvlan, p2p, physical, routed, user)",
                ));
            }
        };
        if LATER.contains(&kind) {
            return Err(Error::unsupported(format!("NICs of nictype {kind:?} are not there yet"))
                .at(keys.field("nictype")));
        }
        let Some((_, lists)) = KINDS.iter().find(|(k, _)| *k == kind) else {
            let known = KINDS.iter().map(|(k, _)| *k);
            let hint = crate::error::nearest(kind, known.clone()).map_or_else(
                || format!("; known are {}", known.collect::<Vec<_>>().join(", ")),
                |n| format!("; did you mean {n:?}?"),
            );
            return Err(Error::invalid(keys.field("nictype"), format!("{kind:?} is no kind of NIC{hint}")));
        };
        let allowed: Vec<&str> = lists.iter().flat_map(|l| l.iter().copied()).collect();
        // A key of another kind is not misspelt, it is out of place.
        for key in keys.names().filter(|k| !allowed.contains(k)) {
            let of: Vec<&str> = KINDS
                .iter()
                .filter(|(_, lists)| lists.iter().any(|l| l.contains(&key)))
                .map(|(k, _)| *k)
                .collect();
            if !of.is_empty() {
                return Err(Error::invalid(
                    keys.field(key),
                    format!(
                        "{key} is a key of NICs of nictype {}, and this one is {kind}; remove it",
                        of.join(", ")
                    ),
                ));
            }
        }
        keys.known(&allowed)?;
        match (kind, network) {
            (_, Some(network)) => {
                if let Some(parent) = keys.get("parent") {
                    return Err(Error::invalid(
                        keys.field("parent"),
                        format!("the network says what it is made of; remove parent={parent}, or network"),
                    ));
                }
                Ok(Self::Network { network: network.to_owned() })
            }
            ("bridged", None) => {
                if let Some(key) = keys.names().find(|k| k.starts_with("security.acls")) {
                    return Err(Error::invalid(
                        keys.field(key),
                        "ACLs are rules of a network: name it by network in place of parent",
                    ));
                }
                Ok(Self::Bridged { parent: parent_name(keys)? })
            }
            ("macvlan", None) => Ok(Self::Macvlan(parent(keys)?)),
            ("physical", None) => Ok(Self::Physical(parent(keys)?)),
            ("p2p", None) => Ok(Self::PointToPoint),
            ("user", None) => Ok(Self::User),
            _ => routed(keys).map(Self::Routed),
        }
    }

    /// The network that it may be on: certainly with `network`, and with `parent` when there is a managed one of this name.
    pub fn network(&self) -> Option<&str> {
        match self {
            Self::Network { network } => Some(network),
            Self::Bridged { parent } => Some(parent),
            _ => None,
        }
    }
}

fn parent(keys: &Keys<'_>) -> Result<ParentLink> {
    Ok(ParentLink { parent: parent_name(keys)?, vlan: vlan(keys)?, mode: MacvlanMode::default() })
}

fn parent_name(keys: &Keys<'_>) -> Result<String> {
    let name = keys.demand("parent", "name an interface of the host")?;
    interface_name(&keys.field("parent"), name)?;
    Ok(name.to_owned())
}

/// The VLAN of a NIC.
pub(super) fn vlan(keys: &Keys<'_>) -> Result<Option<u16>> {
    keys.get("vlan").map(|v| vlan_id(&keys.field("vlan"), v)).transpose()
}

/// A VLAN's number, 1 to 4094.
pub(crate) fn vlan_id(field: &str, text: &str) -> Result<u16> {
    let wrong = || Error::invalid(field, format!("{text:?} is not a VLAN: 1 to 4094"));
    text.parse().ok().filter(|n| (1..=4094).contains(n)).ok_or_else(wrong)
}

fn routed(keys: &Keys<'_>) -> Result<RoutedLink> {
    let parent = match keys.get("parent") {
        Some(_) => Some(parent(keys)?),
        None if keys.get("vlan").is_some() => {
            return Err(Error::invalid(keys.field("vlan"), "a VLAN needs a parent"));
        }
        None => None,
    };
    let mut addresses = vec![];
    for (key, v4) in [("ipv4.address", true), ("ipv6.address", false)] {
        for word in keys.get(key).unwrap_or_default().split(',').map(str::trim).filter(|w| !w.is_empty()) {
            let address = word.parse::<IpAddr>().ok().filter(|a| {
                a.is_ipv4() == v4 && !a.is_multicast() && !a.is_unspecified() && !a.is_loopback()
            });
            let Some(address) = address else {
                let family = if v4 { "IPv4" } else { "IPv6" };
                return Err(Error::invalid(
                    keys.field(key),
                    format!(
                        "{word:?} is not an {family} address of a guest (without prefix; several by commas)"
                    ),
                ));
            };
            if addresses.contains(&address) {
                return Err(Error::invalid(keys.field(key), format!("{address} is named twice")));
            }
            addresses.push(address);
        }
    }
    let gateway = |key: &str| match keys.get(key) {
        None | Some("auto") => Ok(true),
        Some("none") => Ok(false),
        Some(v) => Err(Error::invalid(keys.field(key), format!("{v:?} is neither \"auto\" nor \"none\""))),
    };
    Ok(RoutedLink {
        parent,
        gateways: (gateway("ipv4.gateway")?, gateway("ipv6.gateway")?),
        host: (
            keys.parsed("ipv4.host_address", "an IPv4 address")?.unwrap_or(Ipv4Addr::new(169, 254, 0, 1)),
            keys.parsed("ipv6.host_address", "an IPv6 address")?
                .unwrap_or(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1)),
        ),
        addresses,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Device, NicDevice};

    fn nic(pairs: &[(&str, &str)]) -> Result<NicDevice> {
        let mut keys: std::collections::BTreeMap<String, String> =
            pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        keys.insert("type".into(), "nic".into());
        match Device::parse("eth0", &keys)? {
            Device::Nic(nic) => Ok(nic),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn kinds() {
        let kind = |pairs: &[(&str, &str)]| nic(pairs).unwrap().kind;
        assert_eq!(kind(&[("network", "n")]).network(), Some("n"));
        assert_eq!(kind(&[("nictype", "bridged"), ("parent", "br0")]).network(), Some("br0"));
        let eth1 = |vlan| ParentLink { parent: "eth1".into(), vlan, mode: MacvlanMode::Bridge };
        assert_eq!(kind(&[("nictype", "macvlan"), ("parent", "eth1")]), NicKind::Macvlan(eth1(None)));
        assert_eq!(
            kind(&[("nictype", "physical"), ("parent", "eth1"), ("vlan", "7")]),
            NicKind::Physical(eth1(Some(7)))
        );
        assert_eq!(kind(&[("nictype", "p2p"), ("ipv4.routes", "10.0.0.0/24")]), NicKind::PointToPoint);
        let vlans = |pairs: &[(&str, &str)]| {
            let bridged = [("nictype", "bridged"), ("parent", "br0")];
            let vlans = nic(&[&bridged[..], pairs].concat()).unwrap().vlans;
            (vlans.untagged, vlans.tagged, vlans.closed)
        };
        assert_eq!(vlans(&[("vlan", "7"), ("vlan.tagged", "5-6,9")]), (Some(7), vec![5, 6, 9], false));
        assert_eq!(vlans(&[("vlan", "none"), ("vlan.tagged", "5")]), (None, vec![5], true));
        let routed = kind(&[
            ("nictype", "routed"),
            ("parent", "eth1"),
            ("ipv4.address", "192.0.2.5, 192.0.2.6"),
            ("ipv6.address", "2001:db8::5"),
            ("ipv6.gateway", "none"),
        ]);
        let NicKind::Routed(routed) = routed else { panic!("{routed:?}") };
        assert_eq!((routed.addresses.len(), routed.gateways), (3, (true, false)));
        assert_eq!(routed.host.0.to_string(), "169.254.0.1");
    }

    #[test]
    fn what_does_not_fit_is_named() {
        for (pairs, field, word) in [
            (&[("network", "n"), ("nictype", "bridged")][..], "nictype", "either"),
            (&[("network", "n"), ("parent", "br0")], "parent", "remove"),
            (&[("nictype", "bridged")], "parent", "interface"),
            (
                &[("nictype", "bridged"), ("parent", "br0"), ("security.acls", "a")],
                "security.acls",
                "network",
            ),
            (&[("nictype", "macvlan"), ("parent", "eth1"), ("limits.max", "1Mbit")], "limits.max", "macvlan"),
            (&[("nictype", "macvlan"), ("parent", "../eth1")], "parent", "interface name"),
            (
                &[("nictype", "physical"), ("parent", "eth1"), ("ipv4.address", "10.0.0.2")],
                "ipv4.address",
                "routed",
            ),
            (&[("nictype", "physical"), ("parent", "eth1"), ("vlan", "4095")], "vlan", "4094"),
            (&[("nictype", "p2p"), ("parent", "eth1")], "parent", "p2p"),
            (&[("nictype", "routed"), ("vlan", "3")], "vlan", "parent"),
            (&[("nictype", "macvlan"), ("parent", "eth1"), ("vlan", "none")], "vlan", "4094"),
            (&[("nictype", "routed"), ("ipv4.address", "10.0.0.0/24")], "ipv4.address", "prefix"),
            (&[("nictype", "routed"), ("ipv4.address", "10.0.0.1,10.0.0.1")], "ipv4.address", "twice"),
            (&[("nictype", "routed"), ("ipv4.gateway", "10.0.0.1")], "ipv4.gateway", "auto"),
            (&[("nictype", "sriov"), ("parent", "eth1")], "nictype", "not there"),
            (&[("nictype", "brigded"), ("parent", "eth1")], "nictype", "\"bridged\""),
            (&[("nictype", "p2p"), ("hwadr", "x")], "hwadr", "\"hwaddr\""),
            (&[("mtu", "1500")], "network", "network"),
            (&[("network", "n"), ("limits.priority", "-1")], "limits.priority", "number"),
            (&[("network", "n"), ("vlan.tagged", "5,x")], "vlan.tagged", "VLAN"),
            (&[("network", "n"), ("host_name", "a/b")], "host_name", "interface name"),
        ] {
            let e = nic(pairs).unwrap_err();
            assert_eq!(e.field, Some(format!("devices.eth0.{field}")), "{pairs:?}: {e}");
            assert!(e.message.contains(word), "{pairs:?}: {e}");
        }
    }
}
