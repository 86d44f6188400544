//! Live against configured: what a running guest has, in the user's words, and how that differs from what its record says.
//!
//! The applied specification is kept in the runtime record. A start takes all of the record; a change of a running guest
//! takes what the host said it did and what takes effect at all while a guest runs. The rest is pending until the next
//! start, and changing it back makes it no longer so.
//!
//! What somebody wanted to differ is *held*: changed in the record only, or in the running guest only. It stays so through
//! changes of other things and ends with the run. What is pending without being held is given to the guest by the next change
//! for which that is possible.

use crate::{Config, device::Devices, instance::DeviceIdentity, keys, maximum};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// What a running guest was given: expanded configuration and devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct AppliedSpec {
    /// Keys and values, without what the platform writes itself.
    pub config: Config,
    /// Devices.
    pub devices: Devices,
    /// Keys, and `devices.NAME`, that are kept apart from the record.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub held: BTreeSet<String>,
    /// What held devices are known by, where the record's device of that name is known by something else.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub identities: BTreeMap<String, DeviceIdentity>,
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

/// Before the name of a device, where it stands among keys.
const DEVICES: &str = "devices.";

fn platform(key: &str) -> bool {
    key.starts_with("volatile.") || key.starts_with("image.")
}

/// Takes effect while a guest runs, or has none on it at all. A key that the table does not know is taken as such: it was
/// kept from a newer version, which is not at work here.
fn live(key: &str) -> bool {
    // Whether a machine was started with as much its host knows, and says where it was not.
    [maximum::MEMORY, maximum::CPUS].contains(&key) || keys::lookup(key).is_none_or(|k| k.live)
}

impl AppliedSpec {
    /// What a start applies.
    pub fn of_start(config: &Config, devices: &Devices) -> Self {
        let config = config.iter().filter(|(k, _)| !platform(k));
        Self {
            config: config.map(|(k, v)| (k.clone(), v.clone())).collect(),
            devices: devices.clone(),
            held: BTreeSet::new(),
            identities: BTreeMap::new(),
        }
    }

    /// What the guest is to have when the record says this: that, but for what is held.
    pub fn over(&self, config: &Config, devices: &Devices) -> (Config, Devices) {
        let (mut config, mut devices) = (config.clone(), devices.clone());
        for key in &self.held {
            match key.strip_prefix(DEVICES) {
                Some(name) => keep(&mut devices, &self.devices, name.to_owned()),
                None => keep(&mut config, &self.config, key.clone()),
            }
        }
        (config, devices)
    }

    /// Keys that a guest is to have, with what the platform writes itself as the record has it.
    pub fn with_platform(run: &Config, record: &Config) -> Config {
        let own = run.iter().filter(|(key, _)| !platform(key));
        let its = record.iter().filter(|(key, _)| platform(key));
        own.chain(its).map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    /// Devices of the record with those that only this run has, and as it has them: what is in use.
    pub fn in_use(&self, devices: &Devices) -> Devices {
        let mut all = devices.clone();
        for (name, keys) in self.held_devices().filter_map(|name| self.devices.get_key_value(name)) {
            all.insert(name.clone(), keys.clone());
        }
        all
    }

    /// The same, holding no more than what differs from the record, whose devices are known by `identities`.
    pub fn settled(
        mut self,
        config: &Config,
        devices: &Devices,
        identities: &BTreeMap<String, DeviceIdentity>,
    ) -> Self {
        let apart = changed((&self.config, &self.devices), (config, devices));
        self.held.retain(|key| apart.contains(key));
        let (held, there) = (&self.held, &self.devices);
        self.identities.retain(|name, known| {
            held.contains(&format!("{DEVICES}{name}"))
                && there.contains_key(name)
                && identities.get(name) != Some(known)
        });
        self
    }

    /// Devices that only this run has, or has otherwise than the record, and those that it alone is without, by name.
    pub fn held_devices(&self) -> impl Iterator<Item = &str> {
        self.held.iter().filter_map(|key| key.strip_prefix(DEVICES))
    }

    /// What the devices of the run are known by; `identities` are those of the record, with those of devices that it no longer
    /// has and the run still does.
    pub fn known_by(
        &self,
        identities: &BTreeMap<String, DeviceIdentity>,
    ) -> BTreeMap<String, DeviceIdentity> {
        let mut all = identities.clone();
        all.extend(self.identities.iter().map(|(name, known)| (name.clone(), known.clone())));
        all
    }

    /// What a change of a running guest leaves applied, when the host left `pending` for the next start: keys,
    /// `devices.NAME`, or `devices` for all of them.
    pub fn after(&self, config: &Config, devices: &Devices, pending: &[String]) -> Self {
        let mut new = Self {
            held: self.held.clone(),
            identities: self.identities.clone(),
            ..Self::of_start(config, devices)
        };
        let waits = |key: &str| pending.iter().any(|p| p == key) || !live(key);
        let keys: Vec<String> = self.config.keys().chain(new.config.keys()).cloned().collect();
        for key in keys.into_iter().filter(|k| waits(k)) {
            keep(&mut new.config, &self.config, key);
        }
        if pending.iter().any(|p| p == "devices") {
            new.devices = self.devices.clone();
        }
        for name in pending.iter().filter_map(|p| p.strip_prefix(DEVICES)) {
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

/// Keys, and `devices.NAME`, whose values are not the same in both; what the platform writes itself is left out.
pub fn changed(before: (&Config, &Devices), after: (&Config, &Devices)) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    differ(before.0, after.0, |key, _, _| {
        if !platform(key) {
            found.insert(key.to_owned());
        }
    });
    differ(before.1, after.1, |name, _, _| {
        found.insert(format!("{DEVICES}{name}"));
    });
    found
}

/// `key` as it was.
fn keep<T: Clone>(new: &mut BTreeMap<String, T>, old: &BTreeMap<String, T>, key: String) {
    match old.get(&key) {
        Some(value) => drop(new.insert(key, value.clone())),
        None => drop(new.remove(&key)),
    }
}

/// Calls `each` with every key whose value is not the same in both.
fn differ<T: PartialEq>(
    a: &BTreeMap<String, T>,
    b: &BTreeMap<String, T>,
    mut each: impl FnMut(&str, Option<&T>, Option<&T>),
) {
    let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
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
    #[test]
    fn what_is_held_stays_through_changes_of_other_things() {
        let disk = |volume: &str| map([("type", "disk"), ("source", volume)]);
        let config = map([("limits.cpu", "1"), ("limits.memory", "1GiB")]);
        let record = devices([("root", map([("type", "disk")])), ("a", disk("a"))]);
        // b came live only, a went live only, and the number of processors was changed in the record only.
        let mut run =
            AppliedSpec::of_start(&config, &devices([("root", record["root"].clone()), ("b", disk("b"))]));
        let more = map([("limits.cpu", "4"), ("limits.memory", "2GiB")]);
        run.held =
            ["devices.a", "devices.b", "limits.cpu", "limits.memory.enforce"].map(str::to_owned).into();
        let run = run.settled(&more, &record, &BTreeMap::new());
        assert_eq!(
            run.held.iter().map(String::as_str).collect::<Vec<_>>(),
            ["devices.a", "devices.b", "limits.cpu"],
            "what is the same is not held"
        );
        assert_eq!(run.held_devices().collect::<Vec<_>>(), ["a", "b"]);
        let (over, given) = run.over(&more, &record);
        assert_eq!(over, map([("limits.cpu", "1"), ("limits.memory", "2GiB")]));
        assert_eq!(given.keys().collect::<Vec<_>>(), ["b", "root"]);
        let after = run.after(&over, &given, &[]);
        assert_eq!(after.held, run.held);
        assert_eq!(after.config, over);
        // Once the record says it too, nothing is held of it any more.
        let mut both = record.clone();
        both.insert("b".into(), disk("b"));
        assert!(!after.clone().settled(&more, &both, &BTreeMap::new()).held.contains("devices.b"));
        let started = AppliedSpec::of_start(&more, &record);
        assert_eq!((started.held, started.devices), (BTreeSet::new(), record));
    }

    #[test]
    fn identities_are_kept_of_devices_that_differ() {
        let known = |slot: &str| DeviceIdentity {
            id: crate::DeviceId(uuid::Uuid::nil()),
            slot: slot.into(),
            alias: slot.into(),
            pci: None,
            mac: None,
            host_interface: None,
            volume: None,
        };
        let identities: BTreeMap<_, _> =
            [("a".to_owned(), known("sata1")), ("b".to_owned(), known("scsi2"))].into();
        let disk = |bus: &str| map([("type", "disk"), ("io.bus", bus)]);
        let mut run =
            AppliedSpec::of_start(&Config::new(), &devices([("a", disk("scsi")), ("b", disk("scsi"))]));
        run.held = ["devices.a".to_owned(), "devices.b".to_owned()].into();
        run.identities = [("a".to_owned(), known("scsi1")), ("b".to_owned(), known("scsi2"))].into();
        let record = devices([("a", disk("sata")), ("b", disk("nvme"))]);
        let run = run.settled(&Config::new(), &record, &identities);
        assert_eq!(run.identities.keys().collect::<Vec<_>>(), ["a"]);
        assert_eq!(run.known_by(&identities)["a"].slot, "scsi1");
        assert_eq!(run.known_by(&identities)["b"].slot, "scsi2");
    }
}
