//! Live against configured: what a running guest has, in the user's words, and how that differs from what its record says.
//!
//! The applied specification is kept in the runtime record. A start takes all of the record; a change of a running guest
//! takes what the host said it did and what takes effect at all while a guest runs. The rest is pending until the next
//! start, and changing it back makes it no longer so.

use crate::{Config, device::Devices, keys};
use serde::{Deserialize, Serialize};

/// What a running guest was given: expanded configuration and devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct AppliedSpec {
    /// Keys and values, without what the platform writes itself.
    pub config: Config,
    /// Devices.
    pub devices: Devices,
}

/// A change that waits for the next start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// `limits.memory`, `devices.eth1`, `devices.root.size`.
    pub key: String,
    /// Its value in the running guest; `None`: it is not there.
    pub live: Option<String>,
    /// Its value from the next start on; `None`: it will not be there.
    pub configured: Option<String>,
}

fn platform(key: &str) -> bool {
    key.starts_with("volatile.") || key.starts_with("image.")
}

/// Takes effect while a guest runs, or has none on it at all. A key that the table does not know is taken as such: it was
/// kept from a newer version, which is not at work here.
fn live(key: &str) -> bool {
    keys::lookup(key).is_none_or(|k| k.live)
}

impl AppliedSpec {
    /// What a start applies.
    pub fn of_start(config: &Config, devices: &Devices) -> Self {
        let config = config.iter().filter(|(k, _)| !platform(k));
        Self { config: config.map(|(k, v)| (k.clone(), v.clone())).collect(), devices: devices.clone() }
    }

    /// What a change of a running guest leaves applied, when the host left `pending` for the next start: keys,
    /// `devices.NAME`, or `devices` for all of them.
    pub fn after(&self, config: &Config, devices: &Devices, pending: &[String]) -> Self {
        let mut new = Self::of_start(config, devices);
        let waits = |key: &str| pending.iter().any(|p| p == key) || !live(key);
        let keys: Vec<String> = self.config.keys().chain(new.config.keys()).cloned().collect();
        for key in keys.into_iter().filter(|k| waits(k)) {
            keep(&mut new.config, &self.config, key);
        }
        if pending.iter().any(|p| p == "devices") {
            new.devices = self.devices.clone();
        }
        for name in pending.iter().filter_map(|p| p.strip_prefix("devices.")) {
            keep(&mut new.devices, &self.devices, name.to_owned());
        }
        new
    }

    /// The difference to what the record says now.
    pub fn pending(&self, config: &Config, devices: &Devices) -> Vec<Pending> {
        let now = Self::of_start(config, devices);
        let mut found = vec![];
        differ(&self.config, &now.config, |key, live, configured| {
            found.push(Pending { key: key.into(), live: live.cloned(), configured: configured.cloned() });
        });
        differ(&self.devices, &now.devices, |name, live, configured| match (live, configured) {
            (Some(live), Some(configured)) => differ(live, configured, |field, live, configured| {
                found.push(Pending {
                    key: format!("devices.{name}.{field}"),
                    live: live.cloned(),
                    configured: configured.cloned(),
                });
            }),
            (live, configured) => {
                let text = |device: &Config| {
                    let fields: Vec<String> = device.iter().map(|(k, v)| format!("{k}={v}")).collect();
                    fields.join(" ")
                };
                found.push(Pending {
                    key: format!("devices.{name}"),
                    live: live.map(text),
                    configured: configured.map(text),
                });
            }
        });
        found
    }
}

/// `key` as it was.
fn keep<T: Clone>(
    new: &mut std::collections::BTreeMap<String, T>,
    old: &std::collections::BTreeMap<String, T>,
    key: String,
) {
    match old.get(&key) {
        Some(value) => drop(new.insert(key, value.clone())),
        None => drop(new.remove(&key)),
    }
}

/// Calls `each` with every key whose value is not the same in both.
fn differ<T: PartialEq>(
    a: &std::collections::BTreeMap<String, T>,
    b: &std::collections::BTreeMap<String, T>,
    mut each: impl FnMut(&str, Option<&T>, Option<&T>),
) {
    let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    for key in keys {
        let (one, two) = (a.get(key), b.get(key));
        if one != two {
            each(key, one, two);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map<const N: usize>(pairs: [(&str, &str); N]) -> Config {
        pairs.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
    }

    fn devices<const N: usize>(all: [(&str, Config); N]) -> Devices {
        all.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
    }

    #[test]
    fn what_the_host_left_and_what_never_is_live_waits() {
        let root = || map([("type", "disk"), ("size", "10GiB")]);
        let first = map([("limits.memory", "1GiB"), ("volatile.uuid", "x"), ("user.a", "1")]);
        let applied = AppliedSpec::of_start(&first, &devices([("root", root())]));
        assert_eq!(applied.pending(&first, &devices([("root", root())])), []);

        let config = map([
            ("limits.memory", "2GiB"),
            ("limits.cpu", "2"),
            ("user.b", "2"),
            ("cloud-init.user-data", "#cloud-config"),
        ]);
        let grown = map([("type", "disk"), ("size", "20GiB")]);
        let disk = map([("type", "disk"), ("source", "data")]);
        let all = devices([("root", grown), ("data", disk), ("eth1", map([("type", "nic")]))]);
        let left = ["limits.memory".to_owned(), "devices.root".into(), "devices.eth1".into()];
        let after = applied.after(&config, &all, &left);
        let pending = after.pending(&config, &all);
        let short: Vec<_> =
            pending.iter().map(|p| (&*p.key, p.live.as_deref(), p.configured.as_deref())).collect();
        assert_eq!(
            short,
            [
                ("cloud-init.user-data", None, Some("#cloud-config")),
                ("limits.memory", Some("1GiB"), Some("2GiB")),
                ("devices.eth1", None, Some("type=nic")),
                ("devices.root.size", Some("10GiB"), Some("20GiB")),
            ]
        );
        // Back to what it was: the host has nothing left, and nothing waits.
        let back = after.after(&first, &devices([("root", root())]), &[]);
        assert_eq!(back.pending(&first, &devices([("root", root())])), []);
        assert_eq!(after.after(&config, &all, &["devices".into()]).devices, after.devices);
    }
}
