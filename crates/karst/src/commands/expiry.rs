//! When something goes by itself, as people say it: a time, a span from now, or never.

use jiff::Timestamp;

/// How the API says never.
const NEVER: &str = "0001-01-01T00:00:00Z";

/// What is said as the API wants it.
///
/// # Errors
/// What can be said.
pub fn parse(text: &str) -> Result<String, String> {
    if text == "never" {
        return Ok(NEVER.to_owned());
    }
    if text.parse::<Timestamp>().is_ok() {
        return Ok(text.to_owned());
    }
    span(text)
        .and_then(|seconds| Timestamp::from_second(Timestamp::now().as_second().checked_add(seconds)?).ok())
        .map(|time| time.to_string())
        .ok_or_else(|| {
            "write a time such as 2027-01-31T12:00:00Z, a span such as 12h, 7d or 4w, or never".to_owned()
        })
}

/// The seconds of `30m`, `12h`, `7d`, `4w`.
fn span(text: &str) -> Option<i64> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let seconds = match unit {
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        "w" => 7 * 24 * 3600,
        _ => return None,
    };
    Some(i64::from(number.parse::<u32>().ok()?) * seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_spans_and_never() {
        assert_eq!(parse("never").unwrap(), NEVER);
        assert_eq!(parse("2027-01-31T12:00:00Z").unwrap(), "2027-01-31T12:00:00Z");
        assert_eq!(span("30m"), Some(1800));
        assert_eq!(span("2w"), Some(14 * 24 * 3600));
        let hour: Timestamp = parse("1h").unwrap().parse().unwrap();
        let away = hour.as_second() - Timestamp::now().as_second();
        assert!((3590..=3600).contains(&away), "{away}");
        for wrong in ["", "d", "7", "7y", "-1d", "7d ", "soon", "7é", "2027-01-31"] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
