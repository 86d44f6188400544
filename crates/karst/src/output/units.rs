//! Sizes and times as people read them.

use jiff::{Timestamp, tz::TimeZone};

/// `1234567` is `1.18MiB`.
pub fn bytes(value: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if value < 1024 {
        return format!("{value}B");
    }
    let mut scaled = value as f64 / 1024.0;
    let mut unit = 0;
    while scaled >= 1024.0 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    format!("{scaled:.2}{}", UNITS[unit])
}

/// Sizes that come as signed numbers, -1 and 0 meaning unknown.
pub fn known_bytes(value: i64) -> String {
    u64::try_from(value).ok().filter(|value| *value > 0).map(bytes).unwrap_or_default()
}

/// An RFC 3339 time in the local zone, to the minute; empty where it is none or means "never".
pub fn time(text: &str) -> String {
    match text.parse::<Timestamp>() {
        // Go's zero time is in year 1, Incus' "never used" the epoch.
        Ok(time) if time.as_second() > 0 => {
            time.to_zoned(TimeZone::system()).strftime("%Y/%m/%d %H:%M %Z").to_string()
        }
        _ => String::new(),
    }
}

/// Processor seconds of a counter in nanoseconds.
pub fn cpu_seconds(nanoseconds: i64) -> String {
    if nanoseconds <= 0 {
        return String::new();
    }
    let seconds = nanoseconds as f64 / 1e9;
    if seconds < 10.0 { format!("{seconds:.2}s") } else { format!("{seconds:.0}s") }
}

/// The short form of a fingerprint.
pub fn short(fingerprint: &str) -> &str {
    fingerprint.get(..12).unwrap_or(fingerprint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(bytes(0), "0B");
        assert_eq!(bytes(1023), "1023B");
        assert_eq!(bytes(1024), "1.00KiB");
        assert_eq!(bytes(195 << 20), "195.00MiB");
        assert_eq!(bytes(u64::MAX), "16.00EiB");
        assert_eq!(known_bytes(-1), "");
    }

    #[test]
    fn never_is_empty() {
        assert_eq!(time("0001-01-01T00:00:00Z"), "");
        assert_eq!(time("1970-01-01T00:00:00Z"), "");
        assert_eq!(time("nonsense"), "");
        assert!(time("2026-11-21T08:00:00Z").starts_with("2026/11/"));
    }

    #[test]
    fn processor_time() {
        assert_eq!(cpu_seconds(0), "");
        assert_eq!(cpu_seconds(1_234_000_000), "1.23s");
        assert_eq!(cpu_seconds(61_000_000_000), "61s");
    }
}
