//! Whether a network is made on its host, whether it begins with it, and what it runs by where it is defined otherwise. A network
//! of which nobody said anything of this is there, begins with its host, and runs by its definition.

use crate::{Config, Result, network::Network, uplink::NetworkForm};
use serde::{Deserialize, Serialize};

/// What of a network's life is not the usual.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct NetworkLife {
    /// It is not made on its host, and no guest can start on it.
    #[serde(skip_serializing_if = "is_false")]
    pub stopped: bool,
    /// It does not begin with its host.
    #[serde(skip_serializing_if = "is_false")]
    pub manual: bool,
    /// It goes when it is stopped, or when its host starts anew, as soon as nothing uses it.
    #[serde(skip_serializing_if = "is_false")]
    pub transient: bool,
    /// The configuration that it runs by, where its definition says another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub running: Option<Config>,
}

fn is_false(flag: &bool) -> bool {
    !flag
}

impl NetworkLife {
    /// There, and so again after a restart of its host.
    pub fn is_usual(&self) -> bool {
        *self == Self::default()
    }
}

/// How a network begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NetworkBeginning {
    /// Made, and again with each start of its host.
    #[default]
    Usual,
    /// Written down: somebody starts it, or says that it begins with its host.
    Defined,
    /// Made, and gone when it is stopped.
    Transient,
}

impl NetworkBeginning {
    /// What of a new network's life that is.
    pub fn life(self) -> NetworkLife {
        match self {
            Self::Usual => NetworkLife::default(),
            Self::Defined => NetworkLife { stopped: true, manual: true, ..Default::default() },
            Self::Transient => NetworkLife { manual: true, transient: true, ..Default::default() },
        }
    }
}

impl Network {
    /// It is made on its host.
    pub fn is_active(&self) -> bool {
        !self.life.stopped
    }

    /// It begins with its host.
    pub fn autostart(&self) -> bool {
        !self.life.manual && !self.life.transient
    }

    /// The configuration that it runs by, or would if it were started.
    pub fn running_config(&self) -> &Config {
        self.life.running.as_ref().filter(|_| self.is_active()).unwrap_or(&self.config)
    }

    /// Its definition, parsed; [`Network::form`] is what it runs by.
    ///
    /// # Errors
    /// Those of [`NetworkForm::parse`].
    pub fn defined(&self) -> Result<NetworkForm> {
        NetworkForm::parse(self.kind, self.interface(), &self.config)
    }

    /// Changes definition and run alike: where these differ, in what the new definition says otherwise than the old one.
    pub fn reconfigure(&mut self, config: Config) {
        if let Some(running) = &mut self.life.running {
            running.retain(|key, _| config.contains_key(key) || !self.config.contains_key(key));
            for (key, value) in &config {
                if self.config.get(key) != Some(value) {
                    running.insert(key.clone(), value.clone());
                }
            }
        }
        self.config = config;
        self.settle();
    }

    /// Changes the definition alone: what runs goes on by what it ran by.
    pub fn redefine(&mut self, config: Config) {
        let before = std::mem::replace(&mut self.config, config);
        if self.is_active() {
            self.life.running.get_or_insert(before);
        }
        self.settle();
    }

    /// Changes the run alone, of one that runs.
    pub fn rerun(&mut self, config: Config) {
        self.life.running = Some(config);
        self.settle();
    }

    /// Makes it, by its definition.
    pub fn start(&mut self) {
        self.life.stopped = false;
        self.life.running = None;
    }

    /// It is no longer made.
    pub fn stop(&mut self) {
        self.life.stopped = true;
        self.life.running = None;
    }

    /// What it is once its host has started anew; nothing when that changes nothing.
    pub fn after_a_host_start(&self) -> Option<Self> {
        let mut after = self.clone();
        match self.autostart() {
            true => after.start(),
            false => after.stop(),
        }
        (after.life != self.life).then_some(after)
    }

    /// What is the same on both sides is said once.
    fn settle(&mut self) {
        let same = self.life.running.as_ref() == Some(&self.config);
        if same || self.life.stopped {
            self.life.running = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Name, NetworkId, ProjectId};
    use uuid::Uuid;

    fn cfg(pairs: &[(&str, &str)]) -> Config {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    fn network(life: NetworkLife, config: Config) -> Network {
        Network {
            id: NetworkId(Uuid::from_u128(1)),
            project: ProjectId(Uuid::from_u128(2)),
            kind: Default::default(),
            name: Name::parse("name", "n1").unwrap(),
            interface: None,
            description: String::new(),
            config,
            life,
            spec_version: 1,
        }
    }

    #[test]
    fn what_is_usual_is_not_written_and_read_where_nothing_is() {
        let usual = network(NetworkLife::default(), Config::new());
        let text = serde_json::to_string(&usual).unwrap();
        assert!(!text.contains("life"), "{text}");
        let read: Network = serde_json::from_str(&text).unwrap();
        assert!(read.is_active() && read.autostart() && read == usual);
        let life = NetworkLife { running: Some(cfg(&[("a", "b")])), manual: true, ..Default::default() };
        let other = network(life, Config::new());
        let text = serde_json::to_string(&other).unwrap();
        assert_eq!(serde_json::from_str::<Network>(&text).unwrap(), other);
        assert!(!text.contains("stopped") && !text.contains("transient"), "{text}");
    }

    #[test]
    fn a_run_keeps_what_it_runs_by() {
        let mut n = network(NetworkLife::default(), cfg(&[("dns.domain", "a"), ("ipv4.nat", "true")]));
        n.redefine(cfg(&[("dns.domain", "b"), ("ipv4.nat", "true")]));
        assert_eq!((n.config["dns.domain"].as_str(), n.running_config()["dns.domain"].as_str()), ("b", "a"));
        // A change of both sides changes of each what it says, and leaves what differs.
        n.reconfigure(cfg(&[("dns.domain", "b"), ("bridge.mtu", "1400")]));
        let running = n.running_config();
        assert_eq!(running.get("dns.domain").map(String::as_str), Some("a"));
        assert_eq!(running.get("bridge.mtu").map(String::as_str), Some("1400"));
        assert!(!running.contains_key("ipv4.nat"));
        // The same again is one configuration.
        let same = running.clone();
        n.redefine(same);
        assert_eq!(n.life, NetworkLife::default());
        n.rerun(cfg(&[("dns.domain", "c")]));
        assert_eq!(n.running_config()["dns.domain"], "c");
        n.stop();
        assert!(n.life.running.is_none() && n.running_config()["dns.domain"] == "a");
        // One that is stopped has no run to keep.
        n.redefine(cfg(&[("dns.domain", "d")]));
        assert!(n.life.running.is_none());
        n.start();
        assert_eq!(n.running_config()["dns.domain"], "d");
    }

    #[test]
    fn a_start_of_the_host() {
        let begins = |beginning: NetworkBeginning| network(beginning.life(), Config::new());
        assert!(begins(NetworkBeginning::Usual).after_a_host_start().is_none());
        assert!(begins(NetworkBeginning::Defined).after_a_host_start().is_none(), "it stays as it is");
        assert!(!begins(NetworkBeginning::Transient).after_a_host_start().unwrap().is_active());
        let mut stopped = begins(NetworkBeginning::Usual);
        stopped.stop();
        assert!(stopped.after_a_host_start().unwrap().is_active(), "it begins with its host");
        let mut manual = begins(NetworkBeginning::Defined);
        manual.start();
        assert!(!manual.after_a_host_start().unwrap().is_active());
        let mut held = begins(NetworkBeginning::Usual);
        held.redefine(cfg(&[("dns.domain", "b")]));
        assert!(held.after_a_host_start().unwrap().life.running.is_none(), "by its definition");
    }
}
