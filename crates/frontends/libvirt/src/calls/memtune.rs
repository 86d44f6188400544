//! `memtune` of containers: they have one limit of memory, hard or soft, and a part that may be swapped out beside it.

use super::tuning::Keys;
use crate::{
    error::VirError,
    xml::machine::{
        refuse,
        tuning::{SWAP, swap, swap_of},
    },
};
use karst_model::{Config, keys, spec::SwapLimit};

const MEMORY: &str = "limits.memory";
const ENFORCE: &str = "limits.memory.enforce";

/// What limits a container, KiB; nothing where it is not limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Limits {
    /// Holds always.
    pub hard: Option<u64>,
    /// Holds when the host is short of memory.
    pub soft: Option<u64>,
    /// Of memory and swap together.
    pub both: Option<u64>,
}

impl Limits {
    /// Those of a configuration on a host with so many bytes.
    ///
    /// # Errors
    /// Invalid, when it is.
    pub fn of(config: &Config, host: u64) -> Result<Self, VirError> {
        let limits = keys::limits(config)?;
        let size = limits.memory_on(host).map(|size| size.bytes() / 1024);
        let swap = match limits.swap {
            Some(SwapLimit::Forbidden) => Some(0),
            Some(SwapLimit::Bytes { bytes }) => Some(bytes / 1024),
            Some(SwapLimit::Allowed) | None => None,
        };
        Ok(Self {
            hard: size.filter(|_| !limits.memory_soft),
            soft: size.filter(|_| limits.memory_soft),
            both: size.zip(swap).map(|(size, swap)| size.saturating_add(swap)),
        })
    }

    /// The keys that change when these fields are to be so.
    ///
    /// # Errors
    /// Invalid for a field that there is not; CONFIG_UNSUPPORTED for two limits at a time, and for swap that fits none.
    pub fn changed(mut self, fields: &[(String, Option<u64>)]) -> Result<Keys, VirError> {
        let (mut sized, mut swaps) = (false, false);
        for (field, size) in fields {
            match field.as_str() {
                "hard_limit" => (self.hard, sized) = (*size, true),
                "soft_limit" => (self.soft, sized) = (*size, true),
                "swap_hard_limit" => (self.both, swaps) = (*size, true),
                other => return Err(VirError::argument(format!("parameter '{other}' not supported"))),
            }
        }
        let mut keys = vec![];
        if sized {
            if self.hard.is_some() && self.soft.is_some() {
                let why =
                    "a container has one limit, hard or soft; take the other away (-1) in the same call";
                return Err(refuse("soft_limit", why));
            }
            keys.push((MEMORY.to_owned(), self.hard.or(self.soft).map(|kib| format!("{kib}KiB"))));
            keys.push((ENFORCE.to_owned(), self.soft.map(|_| "soft".to_owned())));
        }
        if swaps {
            keys.push((SWAP.to_owned(), swap_of(self.hard.or(self.soft), self.both)?.map(swap)));
        }
        Ok(keys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(pairs: &[(&str, &str)]) -> Config {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    fn changed(now: &Config, fields: &[(&str, Option<u64>)]) -> Result<Config, VirError> {
        let fields: Vec<_> = fields.iter().map(|(name, size)| ((*name).to_owned(), *size)).collect();
        let mut config = now.clone();
        for (key, value) in Limits::of(now, 1 << 30)?.changed(&fields)? {
            match value {
                Some(value) => drop(config.insert(key, value)),
                None => drop(config.remove(&key)),
            }
        }
        Ok(config)
    }

    #[test]
    fn a_container_has_one_limit_and_swap_beside_it() {
        let none = Config::new();
        assert_eq!(Limits::of(&none, 1 << 30).unwrap(), Limits::default());
        let hard = changed(&none, &[("hard_limit", Some(65_536))]).unwrap();
        assert_eq!(hard, config(&[(MEMORY, "65536KiB")]));
        let e = changed(&hard, &[("soft_limit", Some(32_768))]).unwrap_err();
        assert!(e.text.starts_with("soft_limit: "), "{e:?}");
        let soft = changed(&hard, &[("hard_limit", None), ("soft_limit", Some(32_768))]).unwrap();
        assert_eq!(soft, config(&[(MEMORY, "32768KiB"), (ENFORCE, "soft")]));
        let found = Limits::of(&soft, 1 << 30).unwrap();
        assert_eq!(found, Limits { hard: None, soft: Some(32_768), both: None });
        let both = changed(&hard, &[("swap_hard_limit", Some(98_304))]).unwrap();
        assert_eq!(both, config(&[(MEMORY, "65536KiB"), (SWAP, "32768KiB")]));
        assert_eq!(Limits::of(&both, 1 << 30).unwrap().both, Some(98_304));
        let without = changed(&both, &[("swap_hard_limit", Some(65_536))]).unwrap();
        assert_eq!(without[SWAP], "false");
        assert!(changed(&hard, &[("swap_hard_limit", Some(1024))]).is_err());
        assert!(changed(&none, &[("swap_hard_limit", Some(1024))]).is_err());
        assert!(changed(&none, &[("min_guarantee", Some(1))]).is_err());
        assert_eq!(changed(&both, &[("swap_hard_limit", None)]).unwrap(), hard);
        // A share of the host's is what it is there.
        let share = config(&[(MEMORY, "50%")]);
        assert_eq!(Limits::of(&share, 1 << 30).unwrap().hard, Some(1 << 19));
    }
}
