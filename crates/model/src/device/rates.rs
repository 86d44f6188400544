//! All that can be said of the rates of a virtual machine's disk (`limits.rates`): of bytes and operations, together or of
//! reading and writing apart, with bursts. What says no more than one rate of each way is `limits.read` and `limits.write`.

use super::{DiskLimits, DiskRate};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// A rate; 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Rate {
    /// A second, for long.
    pub average: u64,
    /// A second, for a while.
    #[serde(default)]
    pub burst: u64,
    /// How many seconds that is; 1.
    #[serde(default)]
    pub seconds: u64,
}

/// What [`Rates::all`] has, in its order: a word of users, and what it is in QEMU's names.
pub const RATE_WORDS: [(&str, &str); 6] = [
    ("total-bytes", "bps-total"),
    ("read-bytes", "bps-read"),
    ("write-bytes", "bps-write"),
    ("total-operations", "iops-total"),
    ("read-operations", "iops-read"),
    ("write-operations", "iops-write"),
];

/// All rates of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Rates {
    /// In the order of [`RATE_WORDS`].
    pub all: [Rate; 6],
    /// Bytes that count as one operation; 0: each is one.
    #[serde(default)]
    pub operation_size: u64,
}

impl Rates {
    /// What `limits.read` and `limits.write` mean.
    pub fn of(limits: &DiskLimits) -> Self {
        let mut found = Self::default();
        for (way, limit) in [(1, limits.read), (2, limits.write)] {
            match limit {
                Some(DiskRate::Bytes { per_second }) => found.all[way].average = per_second,
                Some(DiskRate::Operations { per_second }) => found.all[way + 3].average = per_second,
                None => {}
            }
        }
        found
    }

    /// They as `limits.read` and `limits.write`, where those can say all of it.
    pub fn plain(&self) -> Option<DiskLimits> {
        let way = |way: usize| match (self.all[way].average, self.all[way + 3].average) {
            (0, 0) => None,
            (per_second, 0) => Some(DiskRate::Bytes { per_second }),
            (_, per_second) => Some(DiskRate::Operations { per_second }),
        };
        let limits = DiskLimits { read: way(1), write: way(2) };
        (Self::of(&limits) == *self).then_some(limits)
    }

    /// Refuses what QEMU would.
    ///
    /// # Errors
    /// Invalid, naming `field`.
    pub fn demand_sense(&self, field: &str) -> Result<()> {
        let no = |text: String| Err(Error::invalid(field, text));
        for kind in [0, 3] {
            let [both, read, write] = [self.all[kind], self.all[kind + 1], self.all[kind + 2]];
            if both != Rate::default() && (read, write) != (Rate::default(), Rate::default()) {
                let name = RATE_WORDS[kind].0;
                return no(format!("{name} is of reads and writes together; they are not limited apart too"));
            }
        }
        for ((name, _), rate) in RATE_WORDS.iter().zip(&self.all) {
            if rate.burst > 0 && (rate.average == 0 || rate.burst < rate.average) {
                return no(format!("{name}: a burst is of a rate, and not below it"));
            }
            if rate.seconds > 1 && rate.burst == 0 {
                return no(format!("{name}: seconds are those of a burst"));
            }
            if rate.average.max(rate.burst) > 1_000_000_000_000_000 || rate.seconds > 1_000_000_000 {
                return no(format!("{name} is too large"));
            }
            if rate.burst > 0 && rate.seconds.max(1) > 1_000_000_000_000_000 / rate.burst {
                return no(format!("{name}: its burst is too long"));
            }
        }
        if self.operation_size > u64::from(u32::MAX) {
            return no("operation-size is too large".into());
        }
        match self.operation_size > 0 && self.all[3..].iter().all(|rate| rate.average == 0) {
            true => no("operation-size is that of a rate of operations".into()),
            false => Ok(()),
        }
    }

    /// Out of `total-bytes=5000/10000/3,read-operations=100,operation-size=2000`.
    ///
    /// # Errors
    /// Invalid, naming `field`.
    pub fn parse(field: &str, text: &str) -> Result<Self> {
        let mut found = Self::default();
        for word in text.split(',').map(str::trim) {
            let odd = || {
                let why = "write a rate a second, its burst and the seconds of that, as in total-bytes=5000/10000/3; there are \
                           total-, read- and write- of bytes and operations, and operation-size";
                Error::invalid(field, format!("{word:?}: {why}"))
            };
            let (name, value) = word.split_once('=').ok_or_else(odd)?;
            let numbers =
                value.split('/').map(|n| n.parse().ok().filter(|n| *n > 0)).collect::<Option<Vec<u64>>>();
            let numbers = numbers.ok_or_else(odd)?;
            match (RATE_WORDS.iter().position(|(known, _)| *known == name), &numbers[..]) {
                (Some(n), [average]) => found.all[n] = Rate { average: *average, burst: 0, seconds: 0 },
                (Some(n), [average, burst]) => {
                    found.all[n] = Rate { average: *average, burst: *burst, seconds: 0 };
                }
                (Some(n), [average, burst, seconds]) => {
                    found.all[n] = Rate { average: *average, burst: *burst, seconds: *seconds };
                }
                (None, [size]) if name == "operation-size" => found.operation_size = *size,
                _ => return Err(odd()),
            }
        }
        found.demand_sense(field)?;
        Ok(found)
    }

    /// As it is written; nothing without any.
    pub fn text(&self) -> Option<String> {
        let mut all = vec![];
        for ((name, _), rate) in RATE_WORDS.iter().zip(&self.all) {
            match (rate.average, rate.burst, rate.seconds) {
                (0, ..) => {}
                (average, 0, _) => all.push(format!("{name}={average}")),
                (average, burst, 0) => all.push(format!("{name}={average}/{burst}")),
                (average, burst, seconds) => all.push(format!("{name}={average}/{burst}/{seconds}")),
            }
        }
        if self.operation_size > 0 {
            all.push(format!("operation-size={}", self.operation_size));
        }
        (!all.is_empty()).then(|| all.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let text = "read-bytes=5000/6000/3,write-bytes=5500,total-operations=100/200,operation-size=2000";
        let found = Rates::parse("f", text).unwrap();
        assert_eq!(found.all[1], Rate { average: 5000, burst: 6000, seconds: 3 });
        assert_eq!((found.text().as_deref(), found.plain()), (Some(text), None));
        let stored = serde_json::to_string(&found).unwrap();
        assert_eq!(serde_json::from_str::<Rates>(&stored).unwrap(), found);
        let read = Some(DiskRate::Bytes { per_second: 7 });
        let limits = DiskLimits { read, write: Some(DiskRate::Operations { per_second: 9 }) };
        assert_eq!(Rates::of(&limits).text().as_deref(), Some("read-bytes=7,write-operations=9"));
        assert_eq!(Rates::of(&limits).plain(), Some(limits));
        assert_eq!(Rates::default().plain(), Some(DiskLimits::default()));
        // Both of one way are more than one limit says.
        assert_eq!(Rates::parse("f", "read-bytes=5,read-operations=5").unwrap().plain(), None);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for text in [
            "",
            "fast",
            "total-bytes=0",
            "total-bytes=x",
            "total-bytes=1/2/3/4",
            "total-bytes=5,read-bytes=5",
            "total-bytes=5/4",
            "total-bytes=5/1000000000000/2000",
            "operation-size=5",
            "total-operations=5,operation-size=4294967296",
            "operation-size=5/6,read-operations=1",
            "read-bytes=1000000000000001",
        ] {
            assert_eq!(Rates::parse("f", text).unwrap_err().field.as_deref(), Some("f"), "{text}");
        }
    }
}
