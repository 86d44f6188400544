//! Forwards: a listen address of the host whose ports, or all of it, lead to guests of a network.

use super::ports;
use crate::{Config, Error, NetworkId, Result, network::BridgeSpec};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// Ports of a forward as users write them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct ForwardPort {
    /// User's text.
    pub description: String,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Comma-separated ports and ranges.
    pub listen_port: String,
    /// As many ports as listen ports, one for all of them, or nothing: the same.
    pub target_port: String,
    /// Where they lead.
    pub target_address: String,
    /// The guest sees the host's address as the sender's.
    pub snat: bool,
}

/// A forward.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkForward {
    /// Network whose guests are the targets.
    pub network: NetworkId,
    /// Address that is listened on.
    pub listen_address: IpAddr,
    /// User's text.
    #[serde(default)]
    pub description: String,
    /// `target_address` for all that no port says, and `user.*`.
    #[serde(default)]
    pub config: Config,
    /// Ports.
    #[serde(default)]
    pub ports: Vec<ForwardPort>,
    /// Grows with each change.
    pub spec_version: u64,
}

/// Where ports lead.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ForwardTarget {
    /// TCP, otherwise UDP.
    pub tcp: bool,
    /// Ports, inclusive range.
    pub listen: (u16, u16),
    /// Where.
    pub address: IpAddr,
    /// First of as many ports; `None` with [`ForwardTarget::single`] unset: the same ports.
    pub port: Option<u16>,
    /// All listen ports lead to the one port.
    pub single: bool,
    /// The guest sees the host's address as the sender's.
    #[serde(default)]
    pub snat: bool,
}

impl ForwardTarget {
    /// The port at the target for a listen port.
    pub fn target_port(&self, listen: u16) -> u16 {
        match self.port {
            None => listen,
            Some(port) if self.single => port,
            Some(port) => port + (listen - self.listen.0),
        }
    }
}

/// A forward for a host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ForwardSpec {
    /// Address that is listened on.
    pub listen: IpAddr,
    /// For what no port says.
    pub default_target: Option<IpAddr>,
    /// Ports.
    pub targets: Vec<ForwardTarget>,
}

impl NetworkForward {
    /// The typed form, checked against its network.
    ///
    /// # Errors
    /// Invalid, naming the field.
    pub fn parse(&self, network: &BridgeSpec) -> Result<ForwardSpec> {
        let listen = self.listen_address;
        if listen.is_unspecified() || listen.is_multicast() || listen.is_loopback() {
            return Err(Error::invalid("listen_address", format!("{listen} cannot be listened on")));
        }
        let own = match listen {
            IpAddr::V4(a) => network.ipv4.is_some_and(|n| n.contains(&a)),
            IpAddr::V6(a) => network.ipv6.is_some_and(|n| n.contains(&a)),
        };
        if own {
            return Err(Error::invalid(
                "listen_address",
                format!("{listen} lies in the network itself; choose an address outside of it"),
            ));
        }
        let target = |field: &str, text: &str| -> Result<IpAddr> {
            let address: IpAddr =
                text.parse().map_err(|_| Error::invalid(field, format!("{text:?} is not an IP address")))?;
            if address.is_ipv4() != listen.is_ipv4() {
                return Err(Error::invalid(
                    field,
                    format!("{address} is not of the listen address' IP version ({listen})"),
                ));
            }
            let (inside, reserved) = match address {
                IpAddr::V4(a) => (
                    network.ipv4.is_some_and(|n| n.contains(&a)),
                    network.ipv4.is_some_and(|n| [n.network(), n.broadcast(), n.addr()].contains(&a)),
                ),
                IpAddr::V6(a) => (
                    network.ipv6.is_some_and(|n| n.contains(&a)),
                    network.ipv6.is_some_and(|n| [n.network(), n.addr()].contains(&a)),
                ),
            };
            if !inside || reserved {
                return Err(Error::invalid(
                    field,
                    format!("{address} is not an address for a guest of this network"),
                ));
            }
            Ok(address)
        };
        for key in self.config.keys() {
            crate::keys::check_free(key, &self.config[key])?;
            if key != "target_address" && !key.starts_with("user.") {
                return Err(Error::invalid(
                    format!("config.{key}"),
                    format!("unknown key {key:?} of a forward; known are target_address, user.*"),
                ));
            }
        }
        let default_target = self
            .config
            .get("target_address")
            .filter(|t| !t.is_empty())
            .map(|t| target("config.target_address", t))
            .transpose()?;
        let mut targets: Vec<ForwardTarget> = vec![];
        for (n, port) in self.ports.iter().enumerate() {
            let field = |f: &str| format!("ports[{n}].{f}");
            let tcp = match port.protocol.as_str() {
                "tcp" => true,
                "udp" => false,
                v => {
                    return Err(Error::invalid(
                        field("protocol"),
                        format!("{v:?} is neither \"tcp\" nor \"udp\""),
                    ));
                }
            };
            let address = target(&field("target_address"), &port.target_address)?;
            let listens = ports(&field("listen_port"), &port.listen_port)?;
            if listens.is_empty() {
                return Err(Error::invalid(field("listen_port"), "no port to listen on"));
            }
            let to = ports(&field("target_port"), &port.target_port)?;
            let count = |r: &[(u16, u16)]| r.iter().map(|(a, b)| u32::from(b - a) + 1).sum::<u32>();
            let single = count(&to) == 1;
            if !to.is_empty() && !single && count(&to) != count(&listens) {
                return Err(Error::invalid(
                    field("target_port"),
                    format!(
                        "{} target ports for {} listen ports; give one, as many, or none",
                        count(&to),
                        count(&listens)
                    ),
                ));
            }
            for piece in pair(&listens, &to, single) {
                let (listen, port_to) = piece;
                if let Some(other) =
                    targets.iter().find(|t| t.tcp == tcp && listen.0 <= t.listen.1 && t.listen.0 <= listen.1)
                {
                    return Err(Error::invalid(
                        field("listen_port"),
                        format!("port {} leads to {} already", listen.0.max(other.listen.0), other.address),
                    ));
                }
                targets.push(ForwardTarget { tcp, listen, address, port: port_to, single, snat: port.snat });
            }
        }
        targets.sort();
        Ok(ForwardSpec { listen, default_target, targets })
    }
}

/// Pieces of the listen ranges that map to one piece of the target ranges each.
fn pair(listens: &[(u16, u16)], to: &[(u16, u16)], single: bool) -> Vec<((u16, u16), Option<u16>)> {
    if to.is_empty() || single {
        return listens.iter().map(|l| (*l, to.first().map(|t| t.0))).collect();
    }
    let mut pieces = vec![];
    let (mut l, mut t) = (listens.to_vec(), to.to_vec());
    while let (Some(a), Some(b)) = (l.first_mut(), t.first_mut()) {
        let step = (a.1 - a.0).min(b.1 - b.0);
        pieces.push(((a.0, a.0 + step), Some(b.0)));
        for (range, list_is_listen) in [(*a, true), (*b, false)] {
            let list = if list_is_listen { &mut l } else { &mut t };
            if range.1 - range.0 == step {
                list.remove(0);
            } else {
                list[0].0 += step + 1;
            }
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forward(ports: &[(&str, &str, &str, &str)]) -> NetworkForward {
        NetworkForward {
            network: NetworkId(uuid::Uuid::nil()),
            listen_address: "192.0.2.1".parse().unwrap(),
            description: String::new(),
            config: Config::new(),
            ports: ports
                .iter()
                .map(|(protocol, listen, to, address)| ForwardPort {
                    protocol: (*protocol).into(),
                    listen_port: (*listen).into(),
                    target_port: (*to).into(),
                    target_address: (*address).into(),
                    ..Default::default()
                })
                .collect(),
            spec_version: 1,
        }
    }

    #[test]
    fn ports_are_paired() {
        let network = BridgeSpec { ipv4: Some("10.1.2.1/24".parse().unwrap()), ..Default::default() };
        let spec = forward(&[
            ("tcp", "80,90-92", "", "10.1.2.5"),
            ("udp", "1000-1003,1010", "2000-2001,3000-3002", "10.1.2.6"),
            ("tcp", "443,444", "8443", "10.1.2.7"),
        ])
        .parse(&network)
        .unwrap();
        let to = |tcp: bool, port: u16| {
            let t = spec
                .targets
                .iter()
                .find(|t| t.tcp == tcp && (t.listen.0..=t.listen.1).contains(&port))
                .unwrap();
            format!("{}:{}", t.address, t.target_port(port))
        };
        assert_eq!(to(true, 91), "10.1.2.5:91");
        assert_eq!((to(false, 1001), to(false, 1002)), ("10.1.2.6:2001".into(), "10.1.2.6:3000".into()));
        assert_eq!((to(false, 1003), to(false, 1010)), ("10.1.2.6:3001".into(), "10.1.2.6:3002".into()));
        assert_eq!(to(true, 444), "10.1.2.7:8443");
        for (ports, field) in [
            (("sctp", "80", "", "10.1.2.5"), "ports[0].protocol"),
            (("tcp", "", "", "10.1.2.5"), "ports[0].listen_port"),
            (("tcp", "80,80", "", "10.1.2.5"), "ports[0].listen_port"),
            (("tcp", "80-82", "1-2", "10.1.2.5"), "ports[0].target_port"),
            (("tcp", "80", "", "10.1.3.5"), "ports[0].target_address"),
            (("tcp", "80", "", "10.1.2.1"), "ports[0].target_address"),
            (("tcp", "80", "", "fd42::5"), "ports[0].target_address"),
        ] {
            assert_eq!(forward(&[ports]).parse(&network).unwrap_err().field.as_deref(), Some(field));
        }
        let mut own = forward(&[]);
        own.listen_address = "10.1.2.77".parse().unwrap();
        assert_eq!(own.parse(&network).unwrap_err().field.as_deref(), Some("listen_address"));
    }
}
