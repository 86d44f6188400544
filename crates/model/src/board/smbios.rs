//! What the firmware of a machine tells of it (SMBIOS), in place of what Karst says: keys `hardware.smbios.*`, each a line of text.

use super::wrong;
use crate::{Config, Result};
use std::{collections::BTreeMap, ops::Bound};

pub(super) const PREFIX: &str = "hardware.smbios.";
/// The strings of the machine's maker (type 11), one a line.
pub const STRINGS: &str = "hardware.smbios.strings";
/// Bytes of a text, and strings.
const LONGEST: usize = 255;
const MOST: usize = 16;

/// A text: its key, the type of the structure that it is of, and QEMU's property.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SmbiosField {
    /// Key.
    pub key: &'static str,
    /// Type: 0 firmware, 1 machine, 2 board, 3 chassis.
    pub kind: u8,
    /// Property.
    pub property: &'static str,
}

macro_rules! fields {
    ($($key:literal $kind:literal $property:literal),* $(,)?) => {
        /// All of them.
        pub const SMBIOS_FIELDS: &[SmbiosField] =
            &[$(SmbiosField { key: concat!("hardware.smbios.", $key), kind: $kind, property: $property }),*];
    };
}

fields! {
    "bios.date" 0 "date", "bios.release" 0 "release", "bios.vendor" 0 "vendor", "bios.version" 0 "version",
    "board.asset" 2 "asset", "board.location" 2 "location", "board.manufacturer" 2 "manufacturer",
    "board.product" 2 "product", "board.serial" 2 "serial", "board.version" 2 "version",
    "chassis.asset" 3 "asset", "chassis.manufacturer" 3 "manufacturer", "chassis.serial" 3 "serial",
    "chassis.sku" 3 "sku", "chassis.version" 3 "version",
    "system.family" 1 "family", "system.manufacturer" 1 "manufacturer", "system.product" 1 "product",
    "system.serial" 1 "serial", "system.sku" 1 "sku", "system.version" 1 "version",
}

fn line(key: &str, text: &str) -> Result<()> {
    match text.len() > LONGEST || text.chars().any(char::is_control) {
        true => Err(wrong(key, format!("has {LONGEST} bytes at most, and no characters that are none"))),
        false => Ok(()),
    }
}

/// What a configuration says, by key.
///
/// # Errors
/// Invalid, naming the key.
pub(super) fn of(config: &Config) -> Result<BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    let ours = config
        .range::<str, _>((Bound::Included(PREFIX), Bound::Unbounded))
        .take_while(|(key, _)| key.starts_with(PREFIX));
    for (key, value) in ours.filter(|(_, value)| !value.is_empty()) {
        if key == STRINGS {
            let strings: Vec<&str> = value.lines().collect();
            if strings.len() > MOST || strings.contains(&"") {
                return Err(wrong(key, format!("a machine has {MOST} strings at most, one a line")));
            }
            strings.iter().try_for_each(|one| line(key, one))?;
        } else if SMBIOS_FIELDS.iter().any(|field| field.key == key) {
            line(key, value)?;
        } else {
            let known: Vec<&str> = SMBIOS_FIELDS.iter().map(|f| &f.key[PREFIX.len()..]).collect();
            return Err(wrong(key, format!("is not known; strings, {} are", known.join(", "))));
        }
        all.insert(key.clone(), value.clone());
    }
    Ok(all)
}

/// The keys with what is said.
pub(super) fn keys(
    all: &BTreeMap<String, String>,
) -> impl Iterator<Item = (&'static str, Option<String>)> + '_ {
    let names = SMBIOS_FIELDS.iter().map(|field| field.key).chain([STRINGS]);
    names.map(move |key| (key, all.get(key).cloned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_of_fields_that_there_are() {
        let of =
            |pairs: &[(&str, &str)]| of(&pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect());
        let all = [("hardware.smbios.strings", "Hello\na, b=c"), ("hardware.smbios.system.serial", "1 2,3")];
        let found =
            of(&[&all[..], &[("hardware.sound", "ac97"), ("hardware.smbios.bios.date", "")]].concat())
                .unwrap();
        let again: Vec<_> = keys(&found).filter_map(|(key, value)| Some((key, value?))).collect();
        assert_eq!(again, [(all[1].0, all[1].1.to_owned()), (all[0].0, all[0].1.to_owned())]);
        let (long, many) = ("x".repeat(256), "x\n".repeat(17));
        for (key, value) in [
            ("hardware.smbios.system.owner", "x"),
            ("hardware.smbios.system.serial", long.as_str()),
            ("hardware.smbios.system.serial", "two\nlines"),
            ("hardware.smbios.strings", many.as_str()),
            ("hardware.smbios.strings", "a\n\nb"),
        ] {
            assert_eq!(of(&[(key, value)]).unwrap_err().field, Some(format!("config.{key}")), "{key}");
        }
    }
}
