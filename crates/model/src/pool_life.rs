//! How a pool is used, beside what it is made of: whether its hosts have it open now, whether they open it when they start, and
//! whether it ends when it is stopped. The usual pool, which Incus' clients make, is open from the moment that it is made and on
//! each start of its host: nothing of this is written for it.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// What differs from the usual pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct PoolLife {
    /// Its hosts have let go of it: what is in it is where it was, and nobody can use it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub stopped: bool,
    /// It does not begin with its host.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub manual: bool,
    /// Its record ends when it is stopped; what is in it stays on the host.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub transient: bool,
    /// Nothing of it is on its hosts, not yet or no longer.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub unbuilt: bool,
}

impl PoolLife {
    /// Of one that is defined, and neither built nor started.
    pub fn defined(transient: bool) -> Self {
        Self { stopped: true, manual: true, transient, unbuilt: true }
    }

    /// Is it as pools usually are?
    pub fn is_usual(&self) -> bool {
        *self == Self::default()
    }

    /// After a change.
    ///
    /// # Errors
    /// Conflict, when a pool of this name is not in a state for it.
    pub fn after(self, name: &str, change: PoolChange) -> Result<Self> {
        let refuse = |text: &str| Err(Error::conflict(format!("storage pool {name:?} {text}")));
        match (change, self) {
            (PoolChange::Start, Self { stopped: false, .. }) => refuse("is active already"),
            (PoolChange::Start, life) => Ok(Self { stopped: false, unbuilt: false, ..life }),
            (PoolChange::Build, Self { stopped: false, .. }) => refuse("is active, and so it is built"),
            (PoolChange::Build, Self { unbuilt: false, .. }) => refuse("is built already"),
            (PoolChange::Build, life) => Ok(Self { unbuilt: false, ..life }),
            (PoolChange::Stop, Self { stopped: true, .. }) => refuse("is not active"),
            (PoolChange::Stop, life) => Ok(Self { stopped: true, ..life }),
            (PoolChange::Clear, Self { stopped: false, .. }) => refuse("is still active; stop it first"),
            (PoolChange::Clear, Self { unbuilt: true, .. }) => {
                refuse("has nothing on its host: it is not built")
            }
            (PoolChange::Clear, life) => Ok(Self { unbuilt: true, ..life }),
        }
    }
}

/// What may happen to a pool on its hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PoolChange {
    /// Its hosts open it; one that is not built is built before.
    Start,
    /// Its hosts make what it lies in, and do not open it.
    Build,
    /// Its hosts let go of it.
    Stop,
    /// Its hosts remove all that is in it, and what it lies in as far as they made it.
    Clear,
}

/// What could become a pool, on a host that lets it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundSource {
    /// Name of the volume group or zpool.
    pub name: String,
    /// Block devices that it is on.
    pub devices: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_goes_from_one_state_to_the_next() {
        use PoolChange::{Build, Clear, Start, Stop};
        let defined = PoolLife::defined(false);
        let built = defined.after("p", Build).unwrap();
        assert!(!built.unbuilt && built.stopped && built.manual);
        let started = built.after("p", Start).unwrap();
        assert_eq!(started, defined.after("p", Start).unwrap(), "a start builds");
        assert!(!started.stopped && started.manual);
        assert_eq!(started.after("p", Stop).unwrap(), built);
        assert_eq!(built.after("p", Clear).unwrap(), defined);
        for (life, change, word) in [
            (started, Start, "active already"),
            (started, Build, "active"),
            (started, Clear, "still active"),
            (built, Build, "built already"),
            (built, Stop, "not active"),
            (defined, Stop, "not active"),
            (defined, Clear, "not built"),
            (PoolLife::default(), Start, "active already"),
        ] {
            let e = life.after("p", change).unwrap_err();
            assert!(e.message.contains("\"p\"") && e.message.contains(word), "{change:?}: {e}");
        }
    }

    #[test]
    fn the_usual_pool_writes_nothing() {
        assert_eq!(serde_json::to_string(&PoolLife::default()).unwrap(), "{}");
        let life = PoolLife { stopped: true, ..PoolLife::default() };
        assert_eq!(serde_json::to_string(&life).unwrap(), r#"{"stopped":true}"#);
        assert_eq!(serde_json::from_str::<PoolLife>("{}").unwrap(), PoolLife::default());
        assert!(PoolLife::default().is_usual() && !life.is_usual());
    }
}
