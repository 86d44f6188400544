//! Kernel settings under `/proc/sys` (sysctl(8)) of this network namespace.

use karst_model::{Error, Result};
use std::path::PathBuf;

pub(crate) fn path(key: &[&str]) -> Result<PathBuf> {
    let mut path = PathBuf::from("/proc/sys");
    for part in key {
        // Interface names may contain dots, hence parts in place of a dotted key.
        if part.is_empty() || *part == "." || *part == ".." || part.contains(['/', '\0']) {
            return Err(Error::internal("a kernel setting has an impossible name", format!("{key:?}")));
        }
        path.push(part);
    }
    Ok(path)
}

/// The value of a setting, without the line end; `None` when this kernel or link has no such setting.
///
/// # Errors
/// Internal.
pub fn get(key: &[&str]) -> Result<Option<String>> {
    match std::fs::read_to_string(path(key)?) {
        Ok(text) => Ok(Some(text.trim_end().to_owned())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::internal("a kernel setting could not be read", e).with_context(key.join("."))),
    }
}

/// Gives a setting its value unless it has it. `false` when this kernel or link has no such setting.
///
/// # Errors
/// Internal.
pub fn set(key: &[&str], value: &str) -> Result<bool> {
    match get(key)? {
        None => Ok(false),
        Some(now) if now == value => Ok(true),
        Some(_) => match std::fs::write(path(key)?, value) {
            Ok(()) => Ok(true),
            Err(e) => {
                Err(Error::internal(format!("the kernel setting {} could not be changed", key.join(".")), e))
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_refuses() {
        assert_eq!(get(&["kernel", "ostype"]).unwrap().as_deref(), Some("Linux"));
        assert_eq!(get(&["kernel", "no_such_setting"]).unwrap(), None);
        assert!(!set(&["net", "no_such_setting"], "1").unwrap());
        assert!(set(&["kernel", "ostype"], "Linux").unwrap(), "writes nothing where nothing changes");
        for bad in [&["net", "..", "kernel"][..], &["a/b"], &[""]] {
            assert!(get(bad).is_err(), "{bad:?}");
        }
    }
}
