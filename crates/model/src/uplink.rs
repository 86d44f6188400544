//! Networks that are something of the host rather than a bridge of ours: types `macvlan`, `physical` and `host-bridge`.

use crate::{
    Config, Error, Result,
    device::{MacvlanMode, ParentLink, interface_name, vlan_id},
    error::nearest,
    network::{BridgeSpec, Network},
};
use serde::{Deserialize, Serialize};

/// What a network is made of (Incus' `type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum NetworkKind {
    /// A bridge of ours.
    #[default]
    Bridge,
    /// Guests get addresses of their own on an interface of the host.
    Macvlan,
    /// A guest gets an interface of the host itself.
    Physical,
    /// Guests are ports of a bridge that the host has.
    HostBridge,
}

impl NetworkKind {
    /// As users write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Macvlan => "macvlan",
            Self::Physical => "physical",
            Self::HostBridge => "host-bridge",
        }
    }

    /// Parses it; none is a bridge.
    ///
    /// # Errors
    /// Unsupported for what Incus has and Karst not, else invalid; the field is `type`.
    pub fn parse(text: &str) -> Result<Self> {
        match text {
            "" | "bridge" => Ok(Self::Bridge),
            "macvlan" => Ok(Self::Macvlan),
            "physical" => Ok(Self::Physical),
            "host-bridge" => Ok(Self::HostBridge),
            "sriov" | "ovn" => {
                Err(Error::unsupported(format!("networks of type {text:?} are not there yet")).at("type"))
            }
            _ => {
                let text = format!(
                    "{text:?} is no type of a network; known are bridge, macvlan, physical, host-bridge"
                );
                Err(Error::invalid("type", text))
            }
        }
    }
}

/// An interface of the host as a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UplinkSpec {
    /// Macvlan, physical, or a bridge of the host.
    pub kind: NetworkKind,
    /// The interface.
    pub link: ParentLink,
    /// MTU of the guests' ends.
    pub mtu: Option<u32>,
}

/// Keys of networks that are an interface of the host, with what they mean, in order.
pub const UPLINK_KEYS: &[(&str, &str)] = &[
    (
        "mode",
        "of macvlan, how guests share the interface: bridge (they reach each other), private (they do not), vepa (over a switch \
         that sends back) or passthrough (one has it alone)",
    ),
    ("mtu", "MTU of the guests' ends, 68 to 65535"),
    (
        "parent",
        "interface of the host, which `network_interfaces` of host-policy.toml grants; a bond is one too",
    ),
    ("vlan", "VLAN of the parent, 1 to 4094, which is an interface of the host (`eth1.5`)"),
];

impl UplinkSpec {
    fn parse(kind: NetworkKind, config: &Config) -> Result<Self> {
        for (key, value) in config {
            crate::keys::check_free(key, value)?;
            let known = || UPLINK_KEYS.iter().map(|(k, _)| *k);
            if !key.starts_with("user.") && !known().any(|k| k == key) {
                let hint = match nearest(key, known()) {
                    Some(n) => format!("; did you mean {n:?}?"),
                    None => {
                        let all: Vec<_> = known().collect();
                        format!("; a network of type {} has {}", kind.as_str(), all.join(", "))
                    }
                };
                return Err(Error::invalid(
                    format!("config.{key}"),
                    format!("unknown network key {key:?}{hint}"),
                ));
            }
        }
        let get = |key: &str| config.get(key).map(String::as_str).filter(|v| !v.is_empty());
        let parent = get("parent").ok_or_else(|| {
            let text = format!("a network of type {} needs an interface of the host", kind.as_str());
            Error::invalid("config.parent", text)
        })?;
        interface_name("config.parent", parent)?;
        let mtu = get("mtu")
            .map(|m| {
                let wrong = || Error::invalid("config.mtu", format!("{m:?} is not an MTU from 68 to 65535"));
                m.parse().ok().filter(|m| (68..=65535).contains(m)).ok_or_else(wrong)
            })
            .transpose()?;
        let vlan = get("vlan").map(|v| vlan_id("config.vlan", v)).transpose()?;
        let mode = get("mode").map(|said| {
            let found = MacvlanMode::ALL.into_iter().find(|(name, _)| *name == said);
            let names = MacvlanMode::ALL.map(|(name, _)| name).join(", ");
            let wrong = || Error::invalid("config.mode", format!("{said:?} is none of {names}"));
            found.map(|(_, mode)| mode).ok_or_else(wrong)
        });
        if mode.is_some() && kind != NetworkKind::Macvlan {
            let text = format!("a network of type {} is not shared so; macvlan is", kind.as_str());
            return Err(Error::invalid("config.mode", text));
        }
        if vlan.is_some() && kind == NetworkKind::HostBridge {
            let text = "which VLAN of a bridge's a guest is in, its NIC says (vlan)";
            return Err(Error::invalid("config.vlan", text));
        }
        let mode = mode.transpose()?.unwrap_or_default();
        Ok(Self { kind, link: ParentLink { parent: parent.to_owned(), vlan, mode }, mtu })
    }
}

/// A network's configuration, parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkForm {
    /// A bridge.
    Bridge(Box<BridgeSpec>),
    /// An interface of the host.
    Uplink(UplinkSpec),
}

impl NetworkForm {
    /// Parses a configuration; `auto` must have been replaced before.
    ///
    /// # Errors
    /// Invalid, forbidden or unsupported, naming the key.
    pub fn parse(kind: NetworkKind, name: &str, config: &Config) -> Result<Self> {
        match kind {
            NetworkKind::Bridge => BridgeSpec::parse(name, config).map(Box::new).map(Self::Bridge),
            _ => UplinkSpec::parse(kind, config).map(Self::Uplink),
        }
    }
}

impl Network {
    /// The configuration that it runs by, parsed.
    ///
    /// # Errors
    /// Those of [`NetworkForm::parse`].
    pub fn form(&self) -> Result<NetworkForm> {
        NetworkForm::parse(self.kind, self.interface(), self.running_config())
    }

    /// The interface that a bridge is on the host.
    pub fn interface(&self) -> &str {
        self.interface.as_ref().unwrap_or(&self.name)
    }

    /// The bridge that it is.
    ///
    /// # Errors
    /// Unsupported for one that is none, and those of [`BridgeSpec::parse`].
    pub fn bridge(&self) -> Result<BridgeSpec> {
        match self.form()? {
            NetworkForm::Bridge(spec) => Ok(*spec),
            NetworkForm::Uplink(spec) => Err(Error::unsupported(format!(
                "network {:?} is of type {}: addresses, ACLs and forwards belong to bridges",
                &*self.name,
                spec.kind.as_str()
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uplinks() {
        let parse = |pairs: &[(&str, &str)]| {
            let config = pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            NetworkForm::parse(NetworkKind::Macvlan, "lan", &config)
        };
        let Ok(NetworkForm::Uplink(lan)) = parse(&[("parent", "eth1"), ("vlan", "7"), ("user.x", "y")])
        else {
            panic!("an uplink")
        };
        let mode = MacvlanMode::Bridge;
        assert_eq!(lan.link, ParentLink { parent: "eth1".into(), vlan: Some(7), mode });
        let Ok(NetworkForm::Uplink(lan)) = parse(&[("parent", "eth1"), ("mode", "vepa")]) else {
            panic!("an uplink")
        };
        assert_eq!(lan.link.mode, MacvlanMode::Vepa);
        let of = |kind: NetworkKind, key: &str, value: &str| {
            let config =
                [("parent", "br0"), (key, value)].map(|(k, v)| (k.to_string(), v.to_string())).into();
            NetworkForm::parse(kind, "lan", &config).err().and_then(|e| e.field)
        };
        assert_eq!(of(NetworkKind::HostBridge, "mtu", "1400"), None);
        assert_eq!(of(NetworkKind::HostBridge, "vlan", "7").as_deref(), Some("config.vlan"));
        assert_eq!(of(NetworkKind::Physical, "mode", "vepa").as_deref(), Some("config.mode"));
        for (pairs, field) in [
            (&[][..], "parent"),
            (&[("parent", "a b")], "parent"),
            (&[("parent", "eth1"), ("vlan", "0")], "vlan"),
            (&[("parent", "eth1"), ("mtu", "9")], "mtu"),
            (&[("parent", "eth1"), ("mode", "alone")], "mode"),
            (&[("parent", "eth1"), ("ipv4.address", "10.0.0.1/24")], "ipv4.address"),
        ] {
            assert_eq!(parse(pairs).unwrap_err().field, Some(format!("config.{field}")), "{pairs:?}");
        }
        assert_eq!(NetworkKind::parse("physical").unwrap(), NetworkKind::Physical);
        assert_eq!(NetworkKind::parse("ovn").unwrap_err().field.as_deref(), Some("type"));
    }
}
