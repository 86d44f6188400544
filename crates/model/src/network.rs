//! Managed networks.

use crate::{Config, Error, Name, NetworkId, ProjectId, Result, device::interface_name, error::nearest};
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;

/// A managed network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Reference.
    pub id: NetworkId,
    /// Project that owns it.
    pub project: ProjectId,
    /// Name; for a bridge also the interface's, at most 15 bytes.
    pub name: Name,
    /// User's text.
    #[serde(default)]
    pub description: String,
    /// As written (`ipv4.address`, `ipv4.nat`, `dns.domain`, …), `auto` already replaced by the value chosen.
    #[serde(default)]
    pub config: Config,
    /// Grows with each change.
    pub spec_version: u64,
}

/// A bridge, parsed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BridgeSpec {
    /// IPv4 address of the bridge with its prefix; `None` when `ipv4.address=none`.
    pub ipv4: Option<Ipv4Net>,
    /// Masquerade traffic that leaves.
    pub nat: bool,
    /// Serve DHCP.
    pub dhcp: bool,
    /// Range of DHCP addresses, inclusive; the whole subnet when absent.
    pub dhcp_range: Option<(Ipv4Addr, Ipv4Addr)>,
    /// DNS domain of the guests.
    pub domain: String,
    /// MTU of the bridge.
    pub mtu: Option<u32>,
}

/// Keys of a bridge network.
pub const BRIDGE_KEYS: &[&str] = &[
    "ipv4.address",
    "ipv4.nat",
    "ipv4.dhcp",
    "ipv4.dhcp.ranges",
    "ipv6.address",
    "dns.domain",
    "bridge.mtu",
];

impl BridgeSpec {
    /// Parses a network's configuration; `auto` must have been replaced before.
    pub fn parse(name: &str, config: &Config) -> Result<Self> {
        interface_name("name", name)?;
        for (key, value) in config {
            crate::keys::check_free(key, value)?;
            if !BRIDGE_KEYS.contains(&key.as_str()) && !key.starts_with("user.") {
                let hint = match nearest(key, BRIDGE_KEYS.iter().copied()) {
                    Some(n) => format!("; did you mean {n:?}?"),
                    None => format!("; known are {}, user.*", BRIDGE_KEYS.join(", ")),
                };
                return Err(Error::invalid(
                    format!("config.{key}"),
                    format!("unknown network key {key:?}{hint}"),
                ));
            }
        }
        let flag = |key: &str, default: bool| match config.get(key).map(String::as_str) {
            None | Some("") => Ok(default),
            Some("true" | "1" | "on" | "yes") => Ok(true),
            Some("false" | "0" | "off" | "no") => Ok(false),
            Some(v) => Err(Error::invalid(
                format!("config.{key}"),
                format!("{v:?} is not a boolean; use true or false"),
            )),
        };
        let ipv4 = match config.get("ipv4.address").map(String::as_str) {
            None | Some("" | "none") => None,
            Some(s) => {
                let net: Ipv4Net = s.parse().map_err(|_| {
                    Error::invalid(
                        "config.ipv4.address",
                        format!("{s:?} is not an address with prefix, such as 10.20.30.1/24"),
                    )
                })?;
                if net.prefix_len() > 29 || net.addr() == net.network() || net.addr() == net.broadcast() {
                    return Err(Error::invalid(
                        "config.ipv4.address",
                        format!(
                            "{s:?} must be a host address in a subnet of /29 or larger, such as 10.20.30.1/24"
                        ),
                    ));
                }
                Some(net)
            }
        };
        match config.get("ipv6.address").map(String::as_str) {
            None | Some("" | "none") => {}
            Some(_) => {
                return Err(Error::unsupported("managed IPv6 is not there yet; set it to \"none\"")
                    .at("config.ipv6.address"));
            }
        }
        let dhcp_range = match config.get("ipv4.dhcp.ranges").filter(|s| !s.is_empty()) {
            None => None,
            Some(s) => {
                let wrong = || {
                    Error::invalid(
                        "config.ipv4.dhcp.ranges",
                        format!("{s:?} is not a range FIRST-LAST inside the subnet"),
                    )
                };
                let (a, b) = s.split_once('-').ok_or_else(wrong)?;
                let (a, b): (Ipv4Addr, Ipv4Addr) =
                    (a.trim().parse().map_err(|_| wrong())?, b.trim().parse().map_err(|_| wrong())?);
                if a > b || !ipv4.is_some_and(|n| n.contains(&a) && n.contains(&b)) {
                    return Err(wrong());
                }
                Some((a, b))
            }
        };
        let mtu = config
            .get("bridge.mtu")
            .map(|s| {
                s.parse().ok().filter(|m| (1280..=65535).contains(m)).ok_or_else(|| {
                    Error::invalid("config.bridge.mtu", format!("{s:?} is not an MTU from 1280 to 65535"))
                })
            })
            .transpose()?;
        let domain = config.get("dns.domain").cloned().unwrap_or_else(|| "karst".into());
        if domain.is_empty() || domain.split('.').any(|l| crate::Name::parse("x", l).is_err()) {
            return Err(Error::invalid("config.dns.domain", format!("{domain:?} is not a DNS domain")));
        }
        Ok(Self {
            ipv4,
            nat: flag("ipv4.nat", false)?,
            dhcp: flag("ipv4.dhcp", true)?,
            dhcp_range,
            domain,
            mtu,
        })
    }
}

/// A DHCP lease or static assignment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Name that the guest sent or has.
    pub hostname: String,
    /// MAC address.
    pub mac: String,
    /// Address.
    pub address: std::net::IpAddr,
    /// Assigned by configuration rather than from the pool.
    pub fixed: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cfg(pairs: &[(&str, &str)]) -> Config {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    #[test]
    fn parses_and_refuses() {
        let s =
            BridgeSpec::parse("br0", &cfg(&[("ipv4.address", "10.1.2.1/24"), ("ipv4.nat", "true")])).unwrap();
        assert!(s.nat && s.dhcp && s.ipv4.unwrap().prefix_len() == 24);
        for (k, v) in [
            ("ipv4.address", "10.1.2.0/24"),
            ("ipv4.nat", "perhaps"),
            ("bridge.mtu", "12"),
            ("ipv4.dhcp.ranges", "10.9.9.9-10.9.9.10"),
            ("dns.domain", "a b"),
        ] {
            let mut c = cfg(&[("ipv4.address", "10.1.2.1/24")]);
            c.insert(k.into(), v.into());
            assert_eq!(BridgeSpec::parse("br0", &c).unwrap_err().field.unwrap(), format!("config.{k}"));
        }
        assert!(
            BridgeSpec::parse("br0", &cfg(&[("ipv4.adress", "x")]))
                .unwrap_err()
                .message
                .contains("ipv4.address")
        );
    }
}
