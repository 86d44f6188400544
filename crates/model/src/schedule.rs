//! When snapshots are taken, how long and how many of them are kept, and what they are called: Incus' notations of
//! `snapshots.schedule`, `snapshots.expiry` and `snapshots.pattern`, and `snapshots.keep`. Pure; all times are UTC.

use crate::{Error, Result};
use jiff::{Timestamp, ToSpan, civil, tz::TimeZone};

/// A time until something goes, such as `1w 2d`: minutes `M`, hours `H`, days `d`, weeks `w`, months `m`, years `y`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span(Vec<(i32, char)>);

impl Span {
    /// Parses it; `field` is named in the error.
    ///
    /// # Errors
    /// Invalid.
    pub fn parse(field: &str, text: &str) -> Result<Self> {
        let wrong = || {
            Error::invalid(
                field,
                format!(
                    "{text:?} is not a time; write it as 2w 3d: M minutes, H hours, d days, w weeks, m months, y years"
                ),
            )
        };
        let mut parts: Vec<(i32, char)> = vec![];
        for part in text.split_whitespace() {
            let unit = part.chars().last().filter(|c| "MHdwmy".contains(*c)).ok_or_else(wrong)?;
            let n = part[..part.len() - 1].parse::<i32>().ok().filter(|n| (0..=9999).contains(n));
            if parts.iter().any(|(_, u)| *u == unit) {
                return Err(wrong());
            }
            parts.push((n.ok_or_else(wrong)?, unit));
        }
        if parts.is_empty() { Err(wrong()) } else { Ok(Self(parts)) }
    }

    /// The end of the time that begins at `from`; `None` beyond the calendar's end, or when it is nothing at all.
    pub fn after(&self, from: Timestamp) -> Option<Timestamp> {
        if self.0.iter().all(|(n, _)| *n == 0) {
            return None;
        }
        let mut span = jiff::Span::new();
        for (n, unit) in &self.0 {
            span = match unit {
                'M' => span.minutes(*n),
                'H' => span.hours(*n),
                'd' => span.days(*n),
                'w' => span.weeks(*n),
                'm' => span.months(*n),
                _ => span.years(*n),
            };
        }
        from.to_zoned(TimeZone::UTC).checked_add(span).ok().map(|z| z.timestamp())
    }
}

/// Most snapshots of a schedule that [`parse_keep`] lets be kept.
pub const MOST_KEPT: usize = 100_000;

/// Parses `snapshots.keep`, how many snapshots of the schedule are kept; `field` is named in the error.
///
/// # Errors
/// Invalid.
pub fn parse_keep(field: &str, text: &str) -> Result<usize> {
    let number = text.parse::<usize>().ok().filter(|n| (1..=MOST_KEPT).contains(n));
    number.ok_or_else(|| {
        let text = format!(
            "{text:?} is not a whole number from 1 to {MOST_KEPT}; leave it out and none goes for its number"
        );
        Error::invalid(field, text)
    })
}

/// Minutes of the calendar: five fields of cron each, or nothing, or each start.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Schedule {
    lines: Vec<Line>,
    /// At each start of the instance.
    pub at_startup: bool,
}

/// One line of cron: bit sets of minutes, hours, days, months and weekdays.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    fields: [u64; 5],
    any_day: bool,
    any_weekday: bool,
}

const BOUNDS: [(&str, u32, u32); 5] =
    [("minutes", 0, 59), ("hours", 0, 23), ("days", 1, 31), ("months", 1, 12), ("weekdays", 0, 7)];
const MONTHS: [&str; 12] =
    ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const WEEKDAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

impl Schedule {
    /// Parses a line of cron (`0 6 * * *`), or a comma-separated list of `@hourly`, `@daily`, `@midnight`, `@weekly`,
    /// `@monthly`, `@annually`, `@yearly`, `@startup`, `@never`; `field` is named in the error.
    ///
    /// # Errors
    /// Invalid.
    pub fn parse(field: &str, text: &str) -> Result<Self> {
        let mut this = Self::default();
        let text = text.trim();
        if !text.starts_with('@') {
            this.lines.push(Line::parse(field, text)?);
            return Ok(this);
        }
        for alias in text.split(',').map(str::trim) {
            let line = match alias {
                "@hourly" => "0 * * * *",
                "@daily" | "@midnight" => "0 0 * * *",
                "@weekly" => "0 0 * * 0",
                "@monthly" => "0 0 1 * *",
                "@annually" | "@yearly" => "0 0 1 1 *",
                "@startup" => {
                    this.at_startup = true;
                    continue;
                }
                "@never" => continue,
                _ => {
                    return Err(Error::invalid(
                        field,
                        format!(
                            "{alias:?} is not known; use @hourly, @daily, @midnight, @weekly, @monthly, @annually, @yearly, @startup or @never"
                        ),
                    ));
                }
            };
            this.lines.push(Line::parse(field, line)?);
        }
        Ok(this)
    }

    /// Is a minute of it after `from` and not after `to`? Of a longer time only the last day is looked at: what was missed
    /// is not made up for.
    pub fn is_due(&self, from: Timestamp, to: Timestamp) -> bool {
        if self.lines.is_empty() || to <= from {
            return false;
        }
        let minute = |t: Timestamp| t.as_second().div_euclid(60);
        let first = (minute(from) + 1).max(minute(to) - 24 * 60);
        (first..=minute(to)).any(|m| {
            Timestamp::from_second(m * 60)
                .is_ok_and(|t| self.lines.iter().any(|l| l.matches(t.to_zoned(TimeZone::UTC).datetime())))
        })
    }
}

impl Line {
    fn parse(field: &str, text: &str) -> Result<Self> {
        let parts: Vec<&str> = text.split_whitespace().collect();
        let Ok(parts) = <[&str; 5]>::try_from(parts) else {
            return Err(Error::invalid(
                field,
                format!("{text:?} is not a schedule; write five fields as cron does (0 6 * * *), or @daily"),
            ));
        };
        let mut fields = [0; 5];
        for (n, part) in parts.iter().enumerate() {
            fields[n] = set(part, n).ok_or_else(|| {
                let (what, low, high) = BOUNDS[n];
                Error::invalid(field, format!("{part:?} is not a set of {what} from {low} to {high}"))
            })?;
        }
        // Sunday is 0 and 7.
        fields[4] |= fields[4] >> 7 & 1;
        Ok(Self { fields, any_day: parts[2].starts_with('*'), any_weekday: parts[4].starts_with('*') })
    }

    fn matches(&self, t: civil::DateTime) -> bool {
        let has = |n: usize, value: i8| self.fields[n] >> value & 1 == 1;
        let day = has(2, t.day());
        let weekday = has(4, t.weekday().to_sunday_zero_offset());
        // As cron has it: when both are restricted, either will do.
        let date = if self.any_day || self.any_weekday { day && weekday } else { day || weekday };
        has(0, t.minute()) && has(1, t.hour()) && has(3, t.month()) && date
    }
}

fn set(part: &str, n: usize) -> Option<u64> {
    let (_, low, high) = BOUNDS[n];
    let number = |text: &str| {
        let names: &[&str] = match n {
            3 => &MONTHS,
            4 => &WEEKDAYS,
            _ => &[],
        };
        let lower = text.to_ascii_lowercase();
        match names.iter().position(|name| *name == lower) {
            Some(at) => Some(at as u32 + low),
            None => text.parse::<u32>().ok().filter(|v| (low..=high).contains(v)),
        }
    };
    let mut bits = 0u64;
    for item in part.split(',') {
        let (range, step) = match item.split_once('/') {
            Some((range, step)) => (range, step.parse::<u32>().ok().filter(|s| *s > 0)?),
            None => (item, 1),
        };
        let (from, to) = match range.split_once('-') {
            Some((a, b)) => (number(a)?, number(b)?),
            None if range == "*" => (low, high),
            None if item.contains('/') => (number(range)?, high),
            None => (number(range)?, number(range)?),
        };
        if from > to {
            return None;
        }
        (from..=to).step_by(step as usize).for_each(|v| bits |= 1 << v);
    }
    Some(bits)
}

/// Checks a pattern of names of snapshots; see [`name`].
///
/// # Errors
/// Invalid.
pub fn check_pattern(field: &str, pattern: &str) -> Result<()> {
    let example = name(field, pattern, Timestamp::UNIX_EPOCH, &[])?;
    crate::Name::parse(field, &example).map(drop)
}

/// The name of a new snapshot: `%d` becomes the number after the highest of `taken`, `{{ creation_date }}` the time, also as
/// `{{ creation_date|date:'2006-01-02_15-04-05' }}` in Go's notation. A name that is taken gets a number after it.
///
/// # Errors
/// Invalid, when the pattern is malformed.
pub fn name(field: &str, pattern: &str, now: Timestamp, taken: &[&str]) -> Result<String> {
    let mut text = String::new();
    let mut rest = pattern;
    while let Some((before, after)) = rest.split_once("{{") {
        let wrong = || {
            Error::invalid(
                field,
                format!(
                    "{pattern:?} is not a pattern; it may have %d, {{{{ creation_date }}}} and {{{{ creation_date|date:'2006-01-02' }}}}"
                ),
            )
        };
        let (inside, after) = after.split_once("}}").ok_or_else(wrong)?;
        text.push_str(before);
        let inside = inside.trim();
        let layout = match inside.strip_prefix("creation_date").map(str::trim) {
            Some("") => "2006-01-02_15-04-05",
            Some(filter) => {
                let filter = filter.strip_prefix('|').map(str::trim).ok_or_else(wrong)?;
                let layout = filter.strip_prefix("date:").map(str::trim).ok_or_else(wrong)?;
                let quote = layout.chars().next().filter(|c| "'\"".contains(*c)).ok_or_else(wrong)?;
                layout.strip_prefix(quote).and_then(|l| l.strip_suffix(quote)).ok_or_else(wrong)?
            }
            None => return Err(wrong()),
        };
        text.push_str(&date(layout, now));
        rest = after;
    }
    text.push_str(rest);
    if let Some((before, after)) = text.split_once("%d") {
        let number = |name: &&str| name.strip_prefix(before)?.strip_suffix(after)?.parse::<u32>().ok();
        let next = taken.iter().filter_map(number).max().map_or(0, |n| n.saturating_add(1));
        return Ok(format!("{before}{next}{after}"));
    }
    if taken.contains(&&*text) {
        let numbered = (0..).map(|n: u32| format!("{text}-{n}")).find(|name| !taken.contains(&&**name));
        return Ok(numbered.unwrap_or(text));
    }
    Ok(text)
}

/// A time in Go's notation of layouts, as far as names can have it.
fn date(layout: &str, now: Timestamp) -> String {
    let t = now.to_zoned(TimeZone::UTC);
    let mut out = String::new();
    let mut rest = layout;
    let parts = [
        ("2006", "%Y"),
        ("January", "%B"),
        ("Monday", "%A"),
        ("Jan", "%b"),
        ("Mon", "%a"),
        ("MST", "UTC"),
        ("01", "%m"),
        ("02", "%d"),
        ("03", "%I"),
        ("04", "%M"),
        ("05", "%S"),
        ("06", "%y"),
        ("15", "%H"),
        ("PM", "%p"),
    ];
    while let Some(c) = rest.chars().next() {
        match parts.iter().find(|(go, _)| rest.starts_with(go)) {
            Some((go, ours)) => {
                out.push_str(&t.strftime(ours).to_string());
                rest = &rest[go.len()..];
            }
            None => {
                out.push(c);
                rest = &rest[c.len_utf8()..];
            }
        }
    }
    out
}

/// A minute before `t`, for whoever begins to look at schedules.
pub fn minute_before(t: Timestamp) -> Timestamp {
    t.checked_sub(1.minute()).unwrap_or(Timestamp::MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn spans() {
        let from = at("2026-01-31T12:00:00Z");
        assert_eq!(Span::parse("x", "1d 2H").unwrap().after(from), Some(at("2026-02-01T14:00:00Z")));
        assert_eq!(Span::parse("x", "1m").unwrap().after(from), Some(at("2026-02-28T12:00:00Z")));
        assert_eq!(Span::parse("x", "0d").unwrap().after(from), None);
        for bad in ["", "5", "d", "1x", "1d 2d", "-1d", "soon"] {
            assert!(Span::parse("x", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn numbers_that_are_kept() {
        assert_eq!((parse_keep("x", "1").unwrap(), parse_keep("x", "100000").unwrap()), (1, MOST_KEPT));
        for bad in ["", "0", "-1", "all", "7d", "100001", "99999999999999999999"] {
            let e = parse_keep("config.snapshots.keep", bad).unwrap_err();
            assert!(
                e.field.as_deref() == Some("config.snapshots.keep") && e.message.contains("from 1"),
                "{e}"
            );
        }
    }

    #[test]
    fn schedules() {
        let due = |s: &str, from: &str, to: &str| Schedule::parse("x", s).unwrap().is_due(at(from), at(to));
        // 2026-11-21 is a Saturday.
        assert!(due("@daily", "2026-11-20T23:59:30Z", "2026-11-21T00:00:10Z"));
        assert!(!due("@daily", "2026-11-21T00:00:10Z", "2026-11-21T00:00:40Z"));
        assert!(due("*/15 6-8 * * sat", "2026-11-21T06:44:00Z", "2026-11-21T06:45:00Z"));
        assert!(!due("*/15 6-8 * * 1-5", "2026-11-21T06:44:00Z", "2026-11-21T06:45:00Z"));
        assert!(due("0 0 1 * 6", "2026-11-20T23:59:00Z", "2026-11-21T00:00:00Z"), "either day will do");
        assert!(due("0 0 * * 7", "2026-11-21T23:59:00Z", "2026-11-22T00:00:00Z"), "7 is Sunday");
        assert!(!due("@never", "2026-01-01T00:00:00Z", "2027-01-01T00:00:00Z"));
        assert!(Schedule::parse("x", "@startup, @hourly").unwrap().at_startup);
        for bad in
            ["", "* * * *", "60 * * * *", "* * 0 * *", "5-1 * * * *", "*/0 * * * *", "@often", "a * * * *"]
        {
            assert!(Schedule::parse("x", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names() {
        let now = at("2026-11-21T14:05:06Z");
        let name = |pattern: &str, taken: &[&str]| name("x", pattern, now, taken).unwrap();
        assert_eq!(name("snap%d", &["snap0", "snap2", "mine", "snapshot"]), "snap3");
        assert_eq!(name("snap%d", &[]), "snap0");
        assert_eq!(name("{{ creation_date|date:'2006-01-02_15-04-05' }}", &[]), "2026-11-21_14-05-06");
        assert_eq!(name("auto-{{creation_date|date:'20060102'}}-%d", &[]), "auto-20261121-0");
        assert_eq!(name("same", &["same"]), "same-0");
        for bad in ["{{ x }}", "{{ creation_date", "a b", "{{ creation_date|date:x }}", "a/b"] {
            assert!(check_pattern("x", bad).is_err(), "{bad}");
        }
    }
}
