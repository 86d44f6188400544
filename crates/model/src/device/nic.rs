//! NICs.

use super::Keys;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;

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
            mtu: keys.number("mtu")?,
            boot_priority: keys.number("boot.priority")?,
            model: keys.one_of("io.bus", NIC_MODELS)?.unwrap_or_default(),
            connected: keys.get("connected").is_none() || keys.boolean("connected")?,
            attached: keys.get("attached").is_none() || keys.boolean("attached")?,
        })
    }
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
