//! What the keys of a virtual machine's hardware mean together (the rows are in [`crate::keys`]).

use crate::{
    Config, Error, Result,
    instance::Firmware,
    keys::{optional_flag, parse_bool, set},
};

pub(crate) const SMBIOS: &str = "A string of the machine's SMBIOS (type 11) by this name: NAME=VALUE. Programs inside find it without a network.";
pub(crate) const CREDENTIAL: &str = "A credential of systemd's inside, by its name. It is told by the machine's SMBIOS, so root inside reads it.";
pub(crate) const CREDENTIAL_BINARY: &str = "The same, its value written as Base64.";

/// Strings of a machine's SMBIOS at most, and bytes of one and of all.
pub const MOST_STRINGS: usize = 16;
const LONGEST_STRING: usize = 4096;
const ALL_STRINGS: usize = 16 << 10;

/// The strings of a machine's SMBIOS (type 11), out of an expanded configuration: `smbios11.*`, and credentials of systemd's as it
/// looks for them there.
///
/// # Errors
/// Invalid, naming the key.
pub fn strings(config: &Config) -> Result<Vec<String>> {
    let mut all = vec![];
    let mut bytes = 0;
    for (key, value) in config.iter().filter(|(_, v)| !v.is_empty()) {
        let (of, name) = if let Some(name) = key.strip_prefix("smbios11.") {
            ("", name)
        } else if let Some(name) = key.strip_prefix("systemd.credential-binary.") {
            ("io.systemd.credential.binary:", name)
        } else if let Some(name) = key.strip_prefix("systemd.credential.") {
            ("io.systemd.credential:", name)
        } else {
            continue;
        };
        let wrong = |text: String| Err(Error::invalid(format!("config.{key}"), text));
        if name.contains(['=', ' ']) || name.chars().any(char::is_control) {
            return wrong(format!("{name:?} is not a name: it has no blanks and no \"=\""));
        }
        if value.chars().any(char::is_control) {
            return wrong(
                "the value is one line; systemd.credential-binary.* takes others as Base64".to_owned(),
            );
        }
        if of.ends_with("binary:") && !value.bytes().all(|b| b.is_ascii_alphanumeric() || b"+/=".contains(&b))
        {
            return wrong("the value is written as Base64".to_owned());
        }
        let string = format!("{of}{name}={value}");
        bytes += string.len();
        if string.len() > LONGEST_STRING || bytes > ALL_STRINGS || all.len() == MOST_STRINGS {
            return wrong(format!(
                "a machine has at most {MOST_STRINGS} such strings (smbios11.*, systemd.credential*), of {LONGEST_STRING} bytes each and \
                 {ALL_STRINGS} in all"
            ));
        }
        all.push(string);
    }
    Ok(all)
}

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
    fn strings_of_the_firmware() {
        let of = |pairs: &[(&str, &str)]| {
            strings(&pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect())
        };
        let found = of(&[
            ("smbios11.vendor:role", "web server"),
            ("smbios11.empty", ""),
            ("systemd.credential.a", "b=c,d"),
            ("systemd.credential-binary.key", "AAE="),
            ("user.a", "b"),
        ]);
        let wanted = [
            "vendor:role=web server",
            "io.systemd.credential.binary:key=AAE=",
            "io.systemd.credential:a=b=c,d",
        ];
        assert_eq!(found.unwrap(), wanted);
        let long = "x".repeat(5000);
        for (key, value) in [
            ("smbios11.a=b", "c"),
            ("smbios11.a b", "c"),
            ("smbios11.a", "two\nlines"),
            ("systemd.credential-binary.a", "not base64!"),
            ("smbios11.a", long.as_str()),
        ] {
            let e = of(&[(key, value)]).unwrap_err();
            assert_eq!(e.field.as_deref(), Some(&*format!("config.{key}")), "{e}");
        }
        let many: Config = (0..17).map(|n| (format!("smbios11.k{n}"), "v".to_owned())).collect();
        assert!(strings(&many).unwrap_err().message.contains("at most 16"));
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
