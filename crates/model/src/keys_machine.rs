//! What the keys of a virtual machine's hardware mean together (the rows are in [`crate::keys`]).

use crate::{
    Config, Error, Result,
    instance::Firmware,
    keys::{optional_flag, parse_bool, set},
};

/// The key that gives a machine's screen SPICE.
pub const SPICE: &str = "hardware.spice";

/// Is the screen of a machine of this expanded configuration to be there by SPICE too?
pub fn spice(config: &Config) -> bool {
    optional_flag(config, SPICE).unwrap_or(false)
}

/// What a configuration says of a virtual machine's hardware.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HardwareChoice {
    /// Machine type as written.
    pub machine: Option<String>,
    /// CPU model as written.
    pub cpu_model: Option<String>,
    /// Firmware.
    pub firmware: Firmware,
}

/// A virtual machine's hardware out of an expanded configuration.
///
/// UEFI with secure boot is the default, as with Incus; machines of type `pc` have SeaBIOS unless secure boot is set to
/// `false`.
///
/// # Errors
/// Invalid, naming the key, for a machine type or CPU model that cannot be, and for keys that contradict each other.
pub fn hardware(config: &Config) -> Result<HardwareChoice> {
    let boolean = |key: &str| set(config, key).map(|v| parse_bool(&format!("config.{key}"), v)).transpose();
    let word = |key: &str, extra: &[u8]| -> Result<Option<String>> {
        let Some(v) = set(config, key) else { return Ok(None) };
        let good = v.len() <= 500
            && v.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b) || extra.contains(&b));
        if good {
            Ok(Some(v.to_owned()))
        } else {
            Err(Error::invalid(format!("config.{key}"), format!("{v:?} is not possible here")))
        }
    };
    let machine = word("hardware.machine", b"")?;
    if let Some(m) = &machine
        && !matches!(m.as_str(), "q35" | "pc")
        && !m.starts_with("pc-q35-")
        && !m.starts_with("pc-i440fx-")
    {
        return Err(Error::invalid(
            "config.hardware.machine",
            format!("{m:?} is not a machine type; use q35, pc, or a version of them such as pc-q35-7.2"),
        ));
    }
    let i440fx = machine.as_deref().is_some_and(|m| m == "pc" || m.starts_with("pc-i440fx-"));
    let firmware = match (boolean("security.csm")?, boolean("security.secureboot")?) {
        (Some(true), Some(true)) => {
            return Err(Error::invalid(
                "config.security.secureboot",
                "SeaBIOS (security.csm) checks no signatures; unset one of the two",
            ));
        }
        (_, Some(true)) if i440fx => {
            return Err(Error::invalid(
                "config.security.secureboot",
                "secure boot needs the machine type q35",
            ));
        }
        (Some(true), _) => Firmware::Bios,
        (_, Some(false)) => Firmware::Uefi,
        (None, None) if i440fx => Firmware::Bios,
        (Some(false), None) if i440fx => Firmware::Uefi,
        _ => Firmware::UefiSecure,
    };
    // Flags follow the model, as QEMU writes them; a vendor may have a space in its name.
    Ok(HardwareChoice { machine, cpu_model: word("hardware.cpu.model", b",+= ")?, firmware })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spice_is_asked_for() {
        let with = |value: &str| spice(&[(SPICE.to_owned(), value.to_owned())].into());
        assert!(!spice(&Config::new()) && with("true") && !with("false") && !with(""));
    }

    #[test]
    fn firmware_and_machine() {
        let choice = |pairs: &[(&str, &str)]| {
            hardware(&pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect())
        };
        let firmware = |pairs: &[(&str, &str)]| choice(pairs).unwrap().firmware;
        assert_eq!(firmware(&[]), Firmware::UefiSecure);
        assert_eq!(firmware(&[("security.csm", "true"), ("security.secureboot", "false")]), Firmware::Bios);
        assert_eq!(firmware(&[("security.csm", "true")]), Firmware::Bios);
        assert_eq!(firmware(&[("security.secureboot", "false")]), Firmware::Uefi);
        assert_eq!(firmware(&[("security.secureboot", "true")]), Firmware::UefiSecure);
        assert_eq!(firmware(&[("hardware.machine", "pc")]), Firmware::Bios);
        assert_eq!(
            firmware(&[("hardware.machine", "pc-i440fx-7.2"), ("security.secureboot", "false")]),
            Firmware::Uefi
        );
        for (pairs, field) in [
            (&[("security.csm", "true"), ("security.secureboot", "true")][..], "security.secureboot"),
            (&[("hardware.machine", "pc"), ("security.secureboot", "true")], "security.secureboot"),
            (&[("hardware.machine", "virt")], "hardware.machine"),
            (&[("hardware.machine", "pc-q35-7.2,kernel=/x")], "hardware.machine"),
            (&[("hardware.cpu.model", "max;-S")], "hardware.cpu.model"),
        ] {
            assert_eq!(choice(pairs).unwrap_err().field.unwrap(), format!("config.{field}"), "{pairs:?}");
        }
    }
}
