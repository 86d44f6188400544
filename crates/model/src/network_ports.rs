//! How fast ports of a network are: the network's own rate, and groups of ports, of which a NIC names one or has the network's
//! usual one. A rate is an average; beside it a burst may pass at once, and never faster than a peak.

use crate::{Config, Error, Result, device::bits, keys::parse_bool, size::ByteSize};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a rate may be beside its average.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct RateMore {
    /// Bits a second that are never exceeded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak: Option<u64>,
    /// Bytes that may pass at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst: Option<u64>,
}

impl RateMore {
    /// There is none.
    pub fn is_usual(&self) -> bool {
        *self == Self::default()
    }

    /// Of the keys beside that of an average, which is `base`; `field` names a key to its user.
    ///
    /// # Errors
    /// Invalid, naming the key.
    pub fn parse<'a>(
        base: &str,
        average: Option<u64>,
        get: &dyn Fn(&str) -> Option<&'a str>,
        field: &dyn Fn(&str) -> String,
    ) -> Result<Self> {
        let (peak_key, burst_key) = (format!("{base}.peak"), format!("{base}.burst"));
        let peak = get(&peak_key).map(|v| bits(&field(&peak_key), v)).transpose()?;
        let burst = get(&burst_key).map(|v| ByteSize::parse(&field(&burst_key), v)).transpose()?;
        let said = Self { peak, burst: burst.map(ByteSize::bytes) };
        let Some(average) = average.or(said.is_usual().then_some(0)) else {
            let key = if peak.is_some() { &peak_key } else { &burst_key };
            return Err(Error::invalid(field(key), format!("is said beside the average, {base}")));
        };
        if peak.is_some_and(|peak| peak < average) {
            return Err(Error::invalid(field(&peak_key), "is less than the average"));
        }
        // Smaller than a packet nothing would pass.
        if said.burst.is_some_and(|burst| !(10_000..=1 << 30).contains(&burst)) {
            return Err(Error::invalid(field(&burst_key), "is from 10kB to 1GiB"));
        }
        Ok(said)
    }
}

/// A rate in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// Bits a second.
    pub average: u64,
    /// The rest of it.
    #[serde(default, skip_serializing_if = "RateMore::is_usual")]
    pub more: RateMore,
}

/// Rates towards guests, and from them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Rates {
    /// Towards guests.
    pub ingress: Option<Rate>,
    /// From guests.
    pub egress: Option<Rate>,
}

/// A group of ports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct PortGroup {
    /// Its name.
    pub name: String,
    /// It is that of NICs that name none.
    pub usual: bool,
    /// Rates of each port.
    pub rates: Rates,
}

/// What a network says of its ports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct NetworkPorts {
    /// What passes between the bridge and all beyond it together.
    pub rates: Rates,
    /// Groups, by name.
    pub groups: Vec<PortGroup>,
}

/// Keys of a group begin so.
pub const GROUP: &str = "portgroup.";

/// What may follow a group's name in a key.
const OF_GROUP: [&str; 7] = [
    ".default",
    ".limits.egress",
    ".limits.egress.burst",
    ".limits.egress.peak",
    ".limits.ingress",
    ".limits.ingress.burst",
    ".limits.ingress.peak",
];

/// Is this the name of a group of ports?
pub fn is_group(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && !OF_GROUP.iter().any(|end| name.ends_with(end))
}

/// Name and rest of a key of a group.
fn of_group(key: &str) -> Option<(&str, &'static str)> {
    let rest = key.strip_prefix(GROUP)?;
    let found = OF_GROUP.iter().filter_map(|end| Some((rest.strip_suffix(*end)?, *end)));
    found.filter(|(name, _)| is_group(name)).max_by_key(|(_, end)| end.len())
}

/// The group that a key is of.
pub fn group_of(key: &str) -> Option<&str> {
    of_group(key).map(|(name, _)| name)
}

/// Is it a key of a group?
pub fn is_group_key(key: &str) -> bool {
    of_group(key).is_some()
}

/// Rates by their keys, which begin with `prefix`.
fn rates(config: &Config, prefix: &str) -> Result<Rates> {
    let get = |key: &str| config.get(key).map(String::as_str).filter(|v| !v.is_empty());
    let field = |key: &str| format!("config.{key}");
    let one = |direction: &str| -> Result<Option<Rate>> {
        let base = format!("{prefix}limits.{direction}");
        let average = get(&base).map(|v| bits(&field(&base), v)).transpose()?;
        let more = RateMore::parse(&base, average, &get, &field)?;
        Ok(average.map(|average| Rate { average, more }))
    };
    Ok(Rates { ingress: one("ingress")?, egress: one("egress")? })
}

impl NetworkPorts {
    /// Nothing that one would have to say.
    pub fn is_usual(&self) -> bool {
        *self == Self::default()
    }

    /// Of a network's configuration.
    ///
    /// # Errors
    /// Invalid, naming the key.
    pub fn parse(config: &Config) -> Result<Self> {
        let mut groups: BTreeMap<&str, PortGroup> = BTreeMap::new();
        for (key, value) in config.iter().filter(|(_, value)| !value.is_empty()) {
            let Some((name, end)) = of_group(key) else { continue };
            let group = groups.entry(name).or_default();
            if end == ".default" {
                group.usual = parse_bool(&format!("config.{key}"), value)?;
            }
        }
        let mut all = vec![];
        for (name, group) in groups {
            let rates = rates(config, &format!("{GROUP}{name}."))?;
            if group.usual && all.iter().any(|other: &PortGroup| other.usual) {
                let text = "another group is that of NICs that name none already";
                return Err(Error::invalid(format!("config.{GROUP}{name}.default"), text));
            }
            all.push(PortGroup { name: name.to_owned(), rates, ..group });
        }
        Ok(Self { rates: rates(config, "")?, groups: all })
    }

    /// The group of a NIC that names one, or none.
    pub fn group(&self, named: Option<&str>) -> Option<&PortGroup> {
        match named {
            Some(name) => self.groups.iter().find(|g| g.name == name),
            None => self.groups.iter().find(|g| g.usual),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<NetworkPorts> {
        NetworkPorts::parse(&pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect())
    }

    #[test]
    fn groups_and_rates() {
        let ports = parse(&[
            ("limits.ingress", "100Mbit"),
            ("limits.ingress.peak", "200Mbit"),
            ("limits.ingress.burst", "256KiB"),
            ("portgroup.slow.default", "true"),
            ("portgroup.slow.limits.egress", "1Mbit"),
            ("portgroup.a.b.default", "false"),
        ])
        .unwrap();
        let more = RateMore { peak: Some(200_000_000), burst: Some(256 << 10) };
        assert_eq!(ports.rates.ingress, Some(Rate { average: 100_000_000, more }));
        assert_eq!(ports.groups.len(), 2);
        assert_eq!(ports.group(None).map(|g| g.name.as_str()), Some("slow"));
        assert_eq!(ports.group(Some("a.b")).map(|g| g.usual), Some(false));
        assert!(ports.group(Some("other")).is_none() && parse(&[]).unwrap().is_usual());
        for most in ["8kbit", "100Gbit"] {
            assert!(parse(&[("limits.egress", most)]).is_ok(), "{most}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (pairs, field) in [
            (&[("limits.ingress", "x")][..], "limits.ingress"),
            (&[("limits.ingress", "7999")], "limits.ingress"),
            (&[("limits.ingress", "101Gbit")], "limits.ingress"),
            (&[("limits.egress", "2Mbit"), ("limits.egress.peak", "1Tbit")], "limits.egress.peak"),
            (&[("limits.egress.peak", "1Mbit")], "limits.egress.peak"),
            (&[("limits.egress", "2Mbit"), ("limits.egress.peak", "1Mbit")], "limits.egress.peak"),
            (&[("limits.egress", "2Mbit"), ("limits.egress.burst", "1kB")], "limits.egress.burst"),
            (&[("portgroup.a.default", "x")], "portgroup.a.default"),
            (&[("portgroup.a.default", "true"), ("portgroup.b.default", "true")], "portgroup.b.default"),
            (&[("portgroup.a.limits.ingress.burst", "64KiB")], "portgroup.a.limits.ingress.burst"),
        ] {
            assert_eq!(parse(pairs).unwrap_err().field, Some(format!("config.{field}")), "{pairs:?}");
        }
        for key in ["portgroup.a", "portgroup..default", "portgroup.a b.default", "portgroup.a.colour"] {
            assert!(!is_group_key(key), "{key}");
        }
    }
}
