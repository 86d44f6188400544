//! Keys of a virtual machine's keyboard, by QEMU's names and by those that people use.

use crate::{Error, Result, error::nearest};

/// Chords of one request.
const MOST: usize = 256;
/// Keys that are held together.
const HELD: usize = 8;

/// QEMU's names of keys beside letters and digits.
const NAMES: &[&str] = &[
    "alt",
    "alt_r",
    "apostrophe",
    "asterisk",
    "backslash",
    "backspace",
    "bracket_left",
    "bracket_right",
    "caps_lock",
    "comma",
    "ctrl",
    "ctrl_r",
    "delete",
    "dot",
    "down",
    "end",
    "equal",
    "esc",
    "f1",
    "f10",
    "f11",
    "f12",
    "f2",
    "f3",
    "f4",
    "f5",
    "f6",
    "f7",
    "f8",
    "f9",
    "grave_accent",
    "home",
    "insert",
    "kp_0",
    "kp_1",
    "kp_2",
    "kp_3",
    "kp_4",
    "kp_5",
    "kp_6",
    "kp_7",
    "kp_8",
    "kp_9",
    "kp_add",
    "kp_decimal",
    "kp_divide",
    "kp_enter",
    "kp_multiply",
    "kp_subtract",
    "left",
    "less",
    "menu",
    "meta_l",
    "meta_r",
    "minus",
    "num_lock",
    "pause",
    "pgdn",
    "pgup",
    "print",
    "ret",
    "right",
    "scroll_lock",
    "semicolon",
    "shift",
    "shift_r",
    "slash",
    "spc",
    "sysrq",
    "tab",
    "up",
];

/// What people write for them.
const OTHERS: &[(&str, &str)] = &[
    ("control", "ctrl"),
    ("del", "delete"),
    ("enter", "ret"),
    ("escape", "esc"),
    ("ins", "insert"),
    ("meta", "meta_l"),
    ("pagedown", "pgdn"),
    ("pageup", "pgup"),
    ("return", "ret"),
    ("space", "spc"),
    ("super", "meta_l"),
    ("win", "meta_l"),
];

/// Parses chords such as `ctrl-alt-delete`, `f2` or `a`.
///
/// # Errors
/// Invalid, naming `keys[N]` and the nearest key; also for none or too many.
pub fn chords(texts: &[String]) -> Result<Vec<Vec<String>>> {
    if texts.is_empty() || texts.len() > MOST {
        return Err(Error::invalid("keys", format!("give 1 to {MOST} keys, such as [\"ctrl-alt-delete\"]")));
    }
    texts.iter().enumerate().map(|(n, text)| chord(&format!("keys[{n}]"), text)).collect()
}

fn chord(field: &str, text: &str) -> Result<Vec<String>> {
    let keys = text.split(['-', '+']).map(|k| key(field, k)).collect::<Result<Vec<_>>>()?;
    if keys.len() > HELD {
        return Err(Error::invalid(field, format!("{HELD} keys at most are held together")));
    }
    Ok(keys)
}

fn key(field: &str, text: &str) -> Result<String> {
    let lower = text.to_ascii_lowercase();
    let one = lower.len() == 1 && lower.bytes().all(|b| b.is_ascii_alphanumeric());
    if one || NAMES.contains(&lower.as_str()) {
        return Ok(lower);
    }
    if let Some((_, name)) = OTHERS.iter().find(|(other, _)| *other == lower) {
        return Ok((*name).to_owned());
    }
    let all = NAMES.iter().copied().chain(OTHERS.iter().map(|(o, _)| *o));
    let hint = nearest(&lower, all).map(|n| format!("; did you mean {n:?}?")).unwrap_or_default();
    Err(Error::invalid(field, format!("{text:?} is not a key{hint}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chords_of_keys() {
        let parse = |texts: &[&str]| chords(&texts.iter().map(|t| t.to_string()).collect::<Vec<_>>());
        assert_eq!(
            parse(&["Ctrl-Alt-Del", "a", "Enter"]).unwrap(),
            [&["ctrl", "alt", "delete"][..], &["a"], &["ret"]]
        );
        let e = parse(&["a", "ctrl-delte"]).unwrap_err();
        assert_eq!(e.field.as_deref(), Some("keys[1]"));
        assert!(e.message.contains("\"delete\""), "{e}");
        for wrong in [&[][..], &[""], &["ctrl-"], &["a-b-c-d-e-f-g-h-i"], &["x,y"]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
