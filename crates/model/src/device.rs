//! Devices as users write them, and their typed form.

use crate::{ByteSize, Error, Result, error::nearest};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::Ipv4Addr};

/// Devices by name; each a map of keys, as written.
pub type Devices = BTreeMap<String, BTreeMap<String, String>>;

/// A device, parsed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Device {
    /// Root disk: `path=/` and a pool.
    Root {
        /// Pool name as written.
        pool: String,
        /// Size limit.
        size: Option<ByteSize>,
        /// Boot order: higher first.
        boot_priority: Option<u32>,
    },
    /// NIC on a managed network.
    Nic {
        /// Network name as written.
        network: String,
        /// Interface name in the guest (containers).
        name: Option<String>,
        /// MAC address as written, lower case.
        mac: Option<String>,
        /// Static IPv4 address.
        ipv4: Option<Ipv4Addr>,
        /// MTU.
        mtu: Option<u32>,
        /// Boot order: higher first.
        boot_priority: Option<u32>,
    },
    /// Removes a device of a profile.
    None,
}

const ROOT_KEYS: &[&str] = &["type", "path", "pool", "size", "boot.priority"];
const NIC_KEYS: &[&str] =
    &["type", "network", "nictype", "parent", "name", "hwaddr", "ipv4.address", "mtu", "boot.priority"];
const TYPES: &[&str] = &["disk", "nic", "none"];

impl Device {
    /// Parses one device; errors name `devices.NAME.KEY`.
    pub fn parse(name: &str, keys: &BTreeMap<String, String>) -> Result<Self> {
        let field = |k: &str| format!("devices.{name}.{k}");
        crate::Name::parse(&format!("devices.{name}"), name)?;
        let kind = keys.get("type").map(String::as_str).unwrap_or_default();
        let get = |k: &str| keys.get(k).filter(|v| !v.is_empty());
        let number = |k: &str| -> Result<Option<u32>> {
            get(k)
                .map(|v| {
                    v.parse().map_err(|_| Error::invalid(field(k), format!("{v:?} is not a whole number")))
                })
                .transpose()
        };
        let known = |allowed: &[&str]| -> Result<()> {
            for key in keys.keys() {
                if !allowed.contains(&key.as_str()) {
                    let hint = match nearest(key, allowed.iter().copied()) {
                        Some(n) => format!("; did you mean {n:?}?"),
                        None => format!("; known are {}", allowed.join(", ")),
                    };
                    return Err(Error::invalid(
                        field(key),
                        format!("unknown key {key:?} of device {name:?}{hint}"),
                    ));
                }
            }
            Ok(())
        };
        match kind {
            "disk" => {
                known(ROOT_KEYS)?;
                match get("path").map(String::as_str) {
                    Some("/") => {}
                    _ => {
                        return Err(Error::new(
                            crate::ErrorKind::Unsupported,
                            format!("device {name:?}: only the root disk (path=/) can be attached so far"),
                        )
                        .at(field("path")));
                    }
                }
                let pool = get("pool")
                    .ok_or_else(|| Error::invalid(field("pool"), "the root disk needs a pool"))?
                    .clone();
                let size = get("size").map(|s| ByteSize::parse(&field("size"), s)).transpose()?;
                Ok(Self::Root { pool, size, boot_priority: number("boot.priority")? })
            }
            "nic" => {
                known(NIC_KEYS)?;
                let network = match (get("network"), get("nictype").map(String::as_str), get("parent")) {
                    (Some(n), None, _) => n.clone(),
                    // The older notation of the same thing.
                    (None, Some("bridged"), Some(parent)) => parent.clone(),
                    (Some(_), Some(_), _) => {
                        return Err(Error::invalid(
                            field("nictype"),
                            "give either network or nictype, not both",
                        ));
                    }
                    (None, Some(t), _) if t != "bridged" => {
                        return Err(Error::unsupported(format!("NICs of nictype {t:?} are not there yet"))
                            .at(field("nictype")));
                    }
                    _ => {
                        return Err(Error::invalid(field("network"), "a NIC needs the name of a network"));
                    }
                };
                let mac = get("hwaddr").map(|m| parse_mac(&field("hwaddr"), m)).transpose()?;
                let ipv4 = get("ipv4.address")
                    .map(|a| {
                        a.parse().map_err(|_| {
                            Error::invalid(field("ipv4.address"), format!("{a:?} is not an IPv4 address"))
                        })
                    })
                    .transpose()?;
                if let Some(n) = get("name") {
                    interface_name(&field("name"), n)?;
                }
                Ok(Self::Nic {
                    network,
                    name: get("name").cloned(),
                    mac,
                    ipv4,
                    mtu: number("mtu")?,
                    boot_priority: number("boot.priority")?,
                })
            }
            "none" => Ok(Self::None),
            "" => Err(Error::invalid(
                field("type"),
                format!("device {name:?} has no type; known are {}", TYPES.join(", ")),
            )),
            other => {
                let hint = nearest(other, TYPES.iter().copied())
                    .map(|n| format!("; did you mean {n:?}?"))
                    .unwrap_or_default();
                Err(Error::invalid(field("type"), format!("devices of type {other:?} are not known{hint}")))
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn dev(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    #[test]
    fn root_and_nic() {
        assert_eq!(
            Device::parse(
                "root",
                &dev(&[("type", "disk"), ("path", "/"), ("pool", "default"), ("size", "5GiB")])
            )
            .unwrap(),
            Device::Root { pool: "default".into(), size: Some(ByteSize::gib(5)), boot_priority: None }
        );
        let nic = Device::parse("eth0", &dev(&[("type", "nic"), ("nictype", "bridged"), ("parent", "br0")]))
            .unwrap();
        assert!(matches!(nic, Device::Nic { network, .. } if network == "br0"));
    }

    #[test]
    fn errors_name_the_field_and_the_fix() {
        let e = Device::parse("eth0", &dev(&[("type", "nic"), ("netwrk", "x")])).unwrap_err();
        assert_eq!(e.field.as_deref(), Some("devices.eth0.netwrk"));
        assert!(e.message.contains("did you mean \"network\""), "{e}");
        let e = Device::parse("x", &dev(&[("type", "dsk")])).unwrap_err();
        assert!(e.message.contains("\"disk\""), "{e}");
        let e = Device::parse(
            "eth0",
            &dev(&[("type", "nic"), ("network", "a"), ("hwaddr", "01:00:00:00:00:00")]),
        )
        .unwrap_err();
        assert!(e.message.contains("multicast"), "{e}");
    }
}
