//! Sizes in bytes, in the notations that Incus' users write.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

const UNITS: &[(&str, u64)] = &[
    ("EiB", 1 << 60),
    ("PiB", 1 << 50),
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("EB", 1_000_000_000_000_000_000),
    ("PB", 1_000_000_000_000_000),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("KB", 1_000),
    ("B", 1),
];

impl ByteSize {
    /// `n` MiB.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }
    /// `n` GiB.
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }

    /// Parses `10GiB`, `512MB`, `4096`; `field` is named in the error.
    pub fn parse(field: &str, s: &str) -> Result<Self> {
        let wrong = || {
            Error::invalid(
                field,
                format!("{s:?} is not a size; write a whole number with a unit, such as 512MiB or 10GB"),
            )
        };
        let s = s.trim();
        let split = s.find(|c: char| !c.is_ascii_digit()).unwrap_or(s.len());
        let (number, unit) = s.split_at(split);
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let unit = unit.trim();
        let factor = match unit {
            "" => 1,
            _ => UNITS.iter().find(|(u, _)| *u == unit).map(|(_, f)| *f).ok_or_else(wrong)?,
        };
        let bytes =
            number.checked_mul(factor).ok_or_else(|| Error::invalid(field, format!("{s:?} is too large")))?;
        Ok(Self(bytes))
    }

    /// Bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }

    /// Rounded up to a multiple of `step`.
    pub fn round_up(self, step: u64) -> Self {
        Self(self.0.div_ceil(step).saturating_mul(step))
    }
}

impl fmt::Display for ByteSize {
    /// The largest binary unit that divides it, else bytes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, factor) in &UNITS[..6] {
            if self.0 >= *factor && self.0.is_multiple_of(*factor) {
                return write!(f, "{}{unit}", self.0 / factor);
            }
        }
        write!(f, "{}B", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn parses_what_users_write() {
        assert_eq!(ByteSize::parse("x", "1GiB").unwrap(), ByteSize::gib(1));
        assert_eq!(ByteSize::parse("x", "500MB").unwrap().0, 500_000_000);
        assert_eq!(ByteSize::parse("x", "42").unwrap().0, 42);
        for bad in ["", "GiB", "1.5GiB", "-1", "10 apples", "99999999999EiB"] {
            assert_eq!(
                ByteSize::parse("config.size", bad).unwrap_err().field.as_deref(),
                Some("config.size"),
                "{bad}"
            );
        }
    }

    proptest! {
        #[test]
        fn display_parses_back(n in any::<u64>()) {
            prop_assert_eq!(ByteSize::parse("x", &ByteSize(n).to_string()).unwrap(), ByteSize(n));
        }
    }
}
