//! What a guest used over time: averages over minutes, ten minutes and hours, of each a bounded number. Pure: who samples, and
//! where it is kept, is the host's business.

use crate::guest::Metrics;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// A resolution, and for how many of its periods averages are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Period {
    /// Length in seconds; periods begin at whole multiples of it since 1970.
    pub seconds: u32,
    /// How many are kept.
    pub kept: u32,
}

/// Minutes for an hour, ten minutes for a day, hours for a month: what somebody asks who looks at a guest now, who was called
/// because of last night, and who plans. Coarser ones are made of the same samples, so that none waits for another.
pub const PERIODS: [Period; 3] = [
    Period { seconds: 60, kept: 60 },
    Period { seconds: 600, kept: 144 },
    Period { seconds: 3600, kept: 744 },
];

impl Period {
    /// When the period began that `time` (seconds since 1970) lies in.
    pub fn of(self, time: i64) -> i64 {
        time - time.rem_euclid(i64::from(self.seconds))
    }

    /// Is one that began at `start` still kept at `now`? One of the future, which a clock that was wrong has left, is not.
    pub fn keeps(self, start: i64, now: i64) -> bool {
        let last = self.of(now);
        let first = last - i64::from(self.seconds) * (i64::from(self.kept) - 1);
        (first..=last).contains(&start)
    }
}

/// Averages of one period; what was not known in it is absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Point {
    /// When it began, seconds since 1970.
    pub time: i64,
    /// How much of it was measured, milliseconds.
    pub measured_ms: u32,
    /// CPU, in thousandths of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<u64>,
    /// Memory, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// Read from disks, bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_read: Option<u64>,
    /// Written to disks, bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_written: Option<u64>,
    /// Received from networks, bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub received: Option<u64>,
    /// Sent to networks, bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent: Option<u64>,
}

impl Point {
    /// The figures, in a fixed order.
    pub fn figures(&self) -> [Option<u64>; 6] {
        [self.cpu, self.memory, self.disk_read, self.disk_written, self.received, self.sent]
    }

    /// The same point with other figures.
    #[must_use]
    pub fn with_figures(self, figures: [Option<u64>; 6]) -> Self {
        let [cpu, memory, disk_read, disk_written, received, sent] = figures;
        Self { cpu, memory, disk_read, disk_written, received, sent, ..self }
    }

    /// What was measured of the same period at another time is averaged in by how long each was measured.
    #[must_use]
    pub fn and(self, other: &Self) -> Self {
        let (a, b) = (u128::from(self.measured_ms), u128::from(other.measured_ms));
        let mut figures = self.figures();
        for (mine, theirs) in figures.iter_mut().zip(other.figures()) {
            *mine = match (*mine, theirs) {
                (Some(x), Some(y)) => {
                    let sum = u128::from(x) * a + u128::from(y) * b;
                    u64::try_from((sum + (a + b) / 2) / (a + b).max(1)).ok()
                }
                (one, two) => one.or(two),
            };
        }
        let measured_ms = self.measured_ms.saturating_add(other.measured_ms);
        Self { measured_ms, ..self.with_figures(figures) }
    }
}

/// The averages of one resolution, oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Series {
    /// Length of a period in seconds.
    pub seconds: u32,
    /// How many periods are kept.
    pub kept: u32,
    /// Those in which something was measured.
    pub points: Vec<Point>,
}

/// Series without points, one of each resolution.
pub fn empty() -> Vec<Series> {
    PERIODS.iter().map(|p| Series { seconds: p.seconds, kept: p.kept, points: vec![] }).collect()
}

/// Puts a minute's averages into all series, and drops what is too old at `now`.
pub fn note(all: &mut [Series], minute: &Point, now: i64) {
    for series in all {
        let period = Period { seconds: series.seconds, kept: series.kept };
        let point = Point { time: period.of(minute.time), ..*minute };
        match series.points.binary_search_by_key(&point.time, |p| p.time) {
            Ok(at) => series.points[at] = series.points[at].and(&point),
            Err(at) => series.points.insert(at, point),
        }
        series.points.retain(|p| period.keeps(p.time, now));
    }
}

/// Counters of a sample: they only grow while a guest runs.
type Counters = [Option<u64>; 5];

/// Makes averages of minutes out of samples, however often they come.
#[derive(Debug, Clone, Default)]
pub struct Meter {
    /// When the last sample was taken, on the monotonic clock, and what it counted.
    last: Option<(Duration, Counters)>,
    open: Option<Point>,
}

/// Two samples closer than this are as one: their difference says nothing.
const CLOSEST: Duration = Duration::from_millis(200);
/// What lies between two samples further apart is not known.
const FURTHEST: Duration = Duration::from_secs(150);

impl Meter {
    /// Takes a sample of `now` (monotonic) and `time` (seconds since 1970); answers the minute that is over with it.
    pub fn take(&mut self, now: Duration, time: i64, sample: &Metrics) -> Option<Point> {
        let interfaces = || sample.interfaces.values().filter(|i| !i.loopback);
        let has_any = interfaces().next().is_some();
        let traffic = |n: usize| has_any.then(|| interfaces().map(|i| i.counters[n]).sum());
        let counters = [sample.cpu_ns, sample.disk_read, sample.disk_written, traffic(0), traffic(1)];
        if self.last.is_some_and(|(before, _)| now.saturating_sub(before) < CLOSEST) {
            return None;
        }
        let (before, old) = self.last.replace((now, counters))?;
        let span = now.saturating_sub(before);
        let fell = old.iter().zip(&counters).any(|(a, b)| matches!((a, b), (Some(a), Some(b)) if b < a));
        if span > FURTHEST || fell {
            return None;
        }
        let rate = |n: usize, unit: u128| {
            let grown = u128::from(counters[n]?.checked_sub(old[n]?)?);
            u64::try_from(grown * unit / span.as_nanos()).ok()
        };
        const SECOND: u128 = 1_000_000_000;
        // It is about the time before it.
        let middle = time - i64::try_from(span.as_secs() / 2).unwrap_or(0);
        let point = Point {
            time: PERIODS[0].of(middle),
            measured_ms: u32::try_from(span.as_millis()).unwrap_or(u32::MAX),
            cpu: rate(0, 1000),
            memory: sample.memory,
            disk_read: rate(1, SECOND),
            disk_written: rate(2, SECOND),
            received: rate(3, SECOND),
            sent: rate(4, SECOND),
        };
        match &mut self.open {
            Some(open) if open.time == point.time => {
                *open = open.and(&point);
                None
            }
            open => open.replace(point),
        }
    }

    /// The minute that is not over yet.
    pub fn open(&self) -> Option<&Point> {
        self.open.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Interface;

    fn sample(cpu_ns: u64, memory: u64, received: u64) -> Metrics {
        let eth0 = Interface { counters: [received, 0, 0, 0], ..Interface::default() };
        let lo = Interface { loopback: true, counters: [u64::MAX / 4; 4], ..Interface::default() };
        Metrics {
            cpu_ns: Some(cpu_ns),
            memory: Some(memory),
            interfaces: [("eth0".into(), eth0), ("lo".into(), lo)].into(),
            ..Metrics::default()
        }
    }

    #[test]
    fn minutes_are_made_of_samples() {
        let mut meter = Meter::default();
        let at = Duration::from_secs;
        assert_eq!(meter.take(at(100), 600_000, &sample(0, 10, 0)), None);
        assert_eq!(meter.open(), None, "one sample says nothing of a rate");
        // Half a CPU for 20 s, then all of one for 10 s.
        meter.take(at(120), 600_020, &sample(10_000_000_000, 10, 2000));
        assert_eq!(meter.take(Duration::from_millis(120_010), 600_020, &sample(1 << 60, 10, 2000)), None);
        meter.take(at(130), 600_030, &sample(20_000_000_000, 40, 2000));
        let open = *meter.open().unwrap();
        let shown = (open.time, open.measured_ms, open.cpu, open.memory, open.received, open.disk_read);
        assert_eq!(shown, (600_000, 30_000, Some(667), Some(20), Some(67), None));
        // The next minute closes it.
        assert_eq!(meter.take(at(190), 600_090, &sample(20_000_000_000, 40, 2000)), Some(open));
        // A new life counts from nothing, and a gap is one.
        assert_eq!(meter.take(at(200), 600_100, &sample(5, 40, 0)), None);
        assert_eq!(meter.take(at(2000), 601_900, &sample(500_000, 40, 0)), None);
        assert_eq!(meter.open().unwrap().time, 600_060);
        assert_eq!(meter.take(at(2010), 601_910, &sample(500_000, 40, 0)).unwrap().time, 600_060);
    }

    #[test]
    fn series_are_bounded_and_average() {
        let mut all = empty();
        let start = 1_700_000_400 - 1_700_000_400 % 3600;
        for n in 0..3000i64 {
            let minute = Point {
                time: start + 60 * n,
                measured_ms: 60_000,
                cpu: Some(n as u64 % 10 * 1000),
                ..Point::default()
            };
            note(&mut all, &minute, minute.time + 30);
        }
        let sizes: Vec<_> = all.iter().map(|s| s.points.len()).collect();
        assert_eq!(sizes, [60, 144, 50]);
        assert_eq!(all[0].points[59].time, start + 2999 * 60);
        let ten = &all[1].points[143];
        assert_eq!((ten.time, ten.measured_ms, ten.cpu), (start + 2990 * 60, 600_000, Some(4500)));
        // A clock that was put back does not keep what was to come.
        let earlier = Point { time: start, measured_ms: 1, ..Point::default() };
        note(&mut all, &earlier, start + 30);
        assert!(all.iter().all(|s| s.points.len() == 1));
    }
}
