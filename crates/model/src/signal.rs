//! Signals by name, as images of the OCI and shells write them.

/// Names without `SIG`, as Linux numbers them on the machines that Karst runs on.
const NAMES: &[(&str, i32)] = &[
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("PWR", 30),
    ("SYS", 31),
];
/// The first and last real-time signal of C libraries.
const REAL_TIME: (i32, i32) = (34, 64);

/// Can a signal have this number?
pub fn is_signal(number: i32) -> bool {
    (1..=REAL_TIME.1).contains(&number)
}

/// Number of a signal: `SIGQUIT`, `quit`, `SIGRTMIN+3`, `3`; `None` for what is none.
pub fn parse(text: &str) -> Option<i32> {
    let upper = text.trim().to_ascii_uppercase();
    if let Ok(number) = upper.parse::<i32>() {
        return is_signal(number).then_some(number);
    }
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let real_time = |rest: &str, from: i32, sign: i32| {
        let offset = match rest {
            "" => 0,
            rest => rest.get(1..)?.parse::<i32>().ok().filter(|n| *n >= 0)?,
        };
        Some(from + sign * offset).filter(|n| (REAL_TIME.0..=REAL_TIME.1).contains(n))
    };
    match name {
        _ if name.starts_with("RTMIN") => {
            let rest = &name["RTMIN".len()..];
            (rest.is_empty() || rest.starts_with('+')).then(|| real_time(rest, REAL_TIME.0, 1))?
        }
        _ if name.starts_with("RTMAX") => {
            let rest = &name["RTMAX".len()..];
            (rest.is_empty() || rest.starts_with('-')).then(|| real_time(rest, REAL_TIME.1, -1))?
        }
        _ => NAMES.iter().find(|(n, _)| *n == name).map(|(_, number)| *number),
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [
            ("SIGQUIT", 3),
            ("quit", 3),
            (" 15 ", 15),
            ("SIGWINCH", 28),
            ("SIGRTMIN+3", 37),
            ("RTMIN", 34),
            ("RTMAX-1", 63),
        ] {
            assert_eq!(parse(text), Some(number), "{text}");
        }
        for wrong in
            ["", "SIG", "0", "65", "-1", "SIGNOPE", "RTMIN-1", "RTMAX+1", "RTMIN+31", "RTMIN+-1", "RTMIN3"]
        {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
