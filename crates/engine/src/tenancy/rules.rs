//! Keys of a project: what it has of its own, its limits, its restrictions; parsed once.

use super::server::whole;
use karst_model::{
    ByteSize, Config, Error, Result,
    backup::Compression,
    error::nearest,
    keys,
    project::{LIMITS, REFUSED, SETTINGS},
};
use std::{collections::BTreeMap, time::Duration};

pub use karst_model::project::FEATURES;
pub(crate) use karst_model::project::RESTRICTIONS;

const POOL_LIMIT: &str = "limits.disk.pool.";

/// May guests of a restricted project send under others' addresses on the networks that projects share? `ipv6`: under others of
/// IPv6 only, for systems that make theirs otherwise than from their MAC address. Incus has no such key.
pub(crate) const SPOOFING: &str = "restricted.networks.spoofing";

/// What must not be passed. `None` is without limit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProjectLimits {
    /// Instances of both kinds.
    pub instances: Option<u64>,
    /// Containers.
    pub containers: Option<u64>,
    /// Virtual machines.
    pub machines: Option<u64>,
    /// Sum of CPUs.
    pub cpu: Option<u64>,
    /// Sum of memory, bytes.
    pub memory: Option<u64>,
    /// Sum of processes.
    pub processes: Option<u64>,
    /// Sum of volumes' sizes, bytes.
    pub disk: Option<u64>,
    /// As `disk`, by pool.
    pub pools: BTreeMap<String, u64>,
    /// Networks.
    pub networks: Option<u64>,
}

/// What a project has otherwise than the server. `None`: as the server.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProjectSettings {
    /// Do images that were fetched for an instance follow their server?
    pub auto_update_cached: Option<bool>,
    /// How often newer images are looked for; the inner `None`: never.
    pub auto_update_interval: Option<Option<Duration>>,
    /// How published images are compressed.
    pub image_compression: Option<Compression>,
    /// How long an image that was fetched for an instance stays unused; the inner `None`: for ever.
    pub remote_cache_expiry: Option<Option<Duration>>,
    /// How backups are compressed.
    pub backup_compression: Option<Compression>,
    /// Architecture of images.
    pub architecture: Option<String>,
}

/// A project's keys in typed form.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProjectRules {
    /// Limits.
    pub limits: ProjectLimits,
    /// Settings.
    pub settings: ProjectSettings,
    /// Restrictions as written, when they hold.
    pub(crate) restricted: Option<Config>,
}

fn refuse_unknown(key: &str) -> Error {
    let known = || {
        let all = FEATURES
            .iter()
            .map(|(k, _)| *k)
            .chain(LIMITS.iter().map(|(k, _)| *k))
            .filter(|k| !k.ends_with('*'));
        let all = all.chain(["restricted"]).chain(RESTRICTIONS.iter().map(|(k, ..)| *k));
        all.chain(SETTINGS.iter().copied())
    };
    if let Some((_, why)) = REFUSED.iter().find(|(k, _)| *k == key) {
        return Error::unsupported(format!("{key} cannot be set: {why}")).at(format!("config.{key}"));
    }
    let hint = match nearest(key, known()) {
        Some(n) => format!("did you mean {n:?}?"),
        None => {
            "known are backups.*, features.*, images.*, limits.*, restricted, restricted.* and user.*".into()
        }
    };
    Error::invalid(format!("config.{key}"), format!("unknown project key {key:?}; {hint}"))
}

impl ProjectRules {
    /// Parses a project's configuration as written.
    ///
    /// # Errors
    /// Invalid, naming the key.
    pub fn parse(config: &Config) -> Result<Self> {
        let mut limits = ProjectLimits::default();
        let mut settings = ProjectSettings::default();
        let mut restricted = false;
        for (key, value) in config {
            let field = format!("config.{key}");
            keys::check_free(key, value)?;
            let number = || {
                value.trim().parse::<u64>().map_err(|_| {
                    Error::invalid(field.clone(), format!("{value:?} is not a whole number of at least 0"))
                })
            };
            match key.as_str() {
                k if k.starts_with("user.") => {}
                k if FEATURES.iter().any(|(f, _)| *f == k) => {
                    keys::parse_bool(&field, value)?;
                }
                // Empty is as the server has it.
                k if SETTINGS.contains(&k) && value.is_empty() => {}
                "backups.compression_algorithm" => {
                    settings.backup_compression = Some(Compression::parse(&field, value)?);
                }
                "images.auto_update_cached" => {
                    settings.auto_update_cached = Some(keys::parse_bool(&field, value)?);
                }
                "images.auto_update_interval" => settings.auto_update_interval = whole(&field, value, 3600)?,
                "images.compression_algorithm" => {
                    settings.image_compression = Some(Compression::parse(&field, value)?);
                }
                "images.default_architecture" => settings.architecture = Some(value.clone()),
                "images.remote_cache_expiry" => settings.remote_cache_expiry = whole(&field, value, 86_400)?,
                "restricted" => restricted = keys::parse_bool(&field, value)?,
                "limits.containers" => limits.containers = Some(number()?),
                "limits.cpu" => limits.cpu = Some(number()?),
                "limits.instances" => limits.instances = Some(number()?),
                "limits.networks" => limits.networks = Some(number()?),
                "limits.processes" => limits.processes = Some(number()?),
                "limits.virtual-machines" => limits.machines = Some(number()?),
                "limits.disk" => limits.disk = Some(ByteSize::parse(&field, value)?.0),
                "limits.memory" => limits.memory = Some(ByteSize::parse(&field, value)?.0),
                k if k.strip_prefix(POOL_LIMIT).is_some_and(|p| !p.is_empty()) => {
                    let pool = k[POOL_LIMIT.len()..].to_owned();
                    limits.pools.insert(pool, ByteSize::parse(&field, value)?.0);
                }
                k => {
                    let (_, values, _) =
                        RESTRICTIONS.iter().find(|(r, ..)| *r == k).ok_or_else(|| refuse_unknown(k))?;
                    if !values.is_empty() && !values.contains(&value.as_str()) {
                        let text = format!("{value:?} is not one of {}", values.join(", "));
                        return Err(Error::invalid(field, text));
                    }
                }
            }
        }
        Ok(Self { limits, settings, restricted: restricted.then(|| config.clone()) })
    }

    /// Has the project its own of what `feature` names? What is not written is not its own.
    pub fn has(config: &Config, feature: &str) -> bool {
        config.get(feature).is_some_and(|v| keys::parse_bool(feature, v).unwrap_or(false))
    }

    /// The value of a restriction, while the project is restricted.
    pub(crate) fn restriction(&self, key: &str) -> Option<&str> {
        let config = self.restricted.as_ref()?;
        let default = RESTRICTIONS.iter().find(|(r, ..)| *r == key).map_or("block", |(_, _, d)| d);
        Some(config.get(key).map_or(default, String::as_str))
    }

    /// The filters against forged senders that NICs on networks have here whatever they say themselves, by their keys.
    pub(crate) fn filters(&self) -> &'static [&'static str] {
        const ALL: &[&str] =
            &["security.mac_filtering", "security.ipv4_filtering", "security.ipv6_filtering"];
        match self.restriction(SPOOFING) {
            None | Some("allow") => &[],
            Some("ipv6") => &ALL[..2],
            Some(_) => ALL,
        }
    }

    /// As [`ProjectRules::lists`], of names that are the same in capitals.
    pub(crate) fn lists_ignoring_case(&self, key: &str, name: &str) -> bool {
        let list = self.restricted.as_ref().and_then(|c| c.get(key)).filter(|l| !l.trim().is_empty());
        list.is_none_or(|l| l.split(',').any(|one| one.trim().eq_ignore_ascii_case(name)))
    }

    /// Is `name` in the list of a restriction? Without a list everything is.
    pub(crate) fn lists(&self, key: &str, name: &str) -> bool {
        let list = self.restricted.as_ref().and_then(|c| c.get(key)).filter(|l| !l.trim().is_empty());
        list.is_none_or(|l| l.split(',').any(|one| one.trim() == name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<ProjectRules> {
        ProjectRules::parse(&pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect())
    }

    #[test]
    fn keys_are_typed_and_faults_named() {
        let rules = parse(&[
            ("limits.memory", "2GiB"),
            ("limits.cpu", "4"),
            ("limits.disk.pool.fast", "1GiB"),
            ("restricted", "true"),
            ("restricted.devices.gpu", "allow"),
            ("restricted.networks.access", "br0, br1"),
            ("images.auto_update_interval", "0"),
            ("images.compression_algorithm", ""),
            ("images.remote_cache_expiry", "2"),
            ("backups.compression_algorithm", "zstd"),
            ("user.note", "x"),
        ])
        .unwrap();
        let wanted = ProjectSettings {
            auto_update_interval: Some(None),
            remote_cache_expiry: Some(Some(Duration::from_secs(2 * 86_400))),
            backup_compression: Some(Compression::Zstd),
            ..Default::default()
        };
        assert_eq!(rules.settings, wanted);
        assert_eq!((rules.limits.memory, rules.limits.cpu), (Some(2 << 30), Some(4)));
        assert_eq!(rules.limits.pools["fast"], 1 << 30);
        assert_eq!(rules.restriction("restricted.devices.gpu"), Some("allow"));
        assert_eq!(rules.restriction("restricted.devices.usb"), Some("block"));
        assert!(rules.lists("restricted.networks.access", "br1"));
        assert!(!rules.lists("restricted.networks.access", "br2"));
        assert!(rules.lists("restricted.storage-pools.access", "any"));
        let free = parse(&[("restricted.devices.gpu", "block")]).unwrap();
        assert_eq!(free.restriction("restricted.devices.gpu"), None, "nothing holds until `restricted` does");
        for (value, filters) in [(None, 3), (Some("block"), 3), (Some("ipv6"), 2), (Some("allow"), 0)] {
            let mut config = Config::from([("restricted".to_owned(), "true".to_owned())]);
            config.extend(value.map(|v| (SPOOFING.to_owned(), v.to_owned())));
            assert_eq!(ProjectRules::parse(&config).unwrap().filters().len(), filters, "{value:?}");
            config.insert("restricted".into(), "false".into());
            assert_eq!(ProjectRules::parse(&config).unwrap().filters().len(), 0, "{value:?}");
        }
        for (key, value, says) in [
            ("limits.cpu", "-1", "whole number"),
            ("limits.memory", "lots", "not a size"),
            ("limits.memroy", "1GiB", "did you mean \"limits.memory\"?"),
            ("limits.disk.pool.", "1GiB", "unknown project key"),
            ("restricted", "maybe", "boolean"),
            ("restricted.devices.nic", "any", "not one of allow, block, managed"),
            ("features.images", "x", "boolean"),
            ("images.auto_update_cached", "maybe", "boolean"),
            ("images.remote_cache_expiry", "-1", "whole number"),
            ("backups.compression_algorithm", "rar", "zstd"),
            ("restricted.idmap.uid", "1000", "raw.idmap is not there"),
            ("restricted.networks.zones", "allow", "DNS zones are not there"),
        ] {
            let e = parse(&[(key, value)]).unwrap_err();
            assert_eq!(e.field, Some(format!("config.{key}")), "{e}");
            assert!(e.message.contains(says), "{e}");
        }
    }
}
