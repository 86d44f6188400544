//! Presets of virtual hardware (`hardware.preset`): what a kind of system wants of its devices where nobody says otherwise.
//! They fill in keys of the expanded devices, where users see them; what is written stays as it is, and wins.

use crate::{Config, device::Devices};

/// The key.
pub const KEY: &str = "hardware.preset";

/// What a preset says of devices: of Windows, what its installer has drivers for.
struct Wanted {
    disk_bus: &'static str,
    nic_model: &'static str,
    tpm: bool,
}

const WINDOWS: Wanted = Wanted { disk_bus: "sata", nic_model: "e1000e", tpm: true };

/// Is it prepared for Windows, by the preset or as what the image or the user says it is (`image.os`)?
pub fn is_windows(config: &Config, os: Option<&str>) -> bool {
    config.get(KEY).is_some_and(|p| p == "windows")
        || os.is_some_and(|os| os.to_ascii_lowercase().contains("windows"))
}

/// Fills in what the preset of a virtual machine says. `image.os` alone fills in nothing: images that are made for Incus have
/// virtio's drivers and were installed behind them.
pub(crate) fn fill(config: &Config, devices: &mut Devices) {
    let wanted = match config.get(KEY).map(String::as_str) {
        Some("windows") => WINDOWS,
        _ => return,
    };
    for keys in devices.values_mut() {
        // A directory is shared, and on no bus of drives.
        let drive = keys.get("path").is_none_or(|p| p.is_empty() || p == "/");
        let value = match keys.get("type").map(String::as_str) {
            Some("disk") if drive => wanted.disk_bus,
            Some("nic") => wanted.nic_model,
            _ => continue,
        };
        if keys.get("io.bus").is_none_or(String::is_empty) {
            keys.insert("io.bus".to_owned(), value.to_owned());
        }
    }
    let has_tpm = devices.values().any(|keys| keys.get("type").is_some_and(|t| t == "tpm"));
    if wanted.tpm && !has_tpm {
        let name = ["tpm", "vtpm", "preset-tpm"].into_iter().find(|n| !devices.contains_key(*n));
        if let Some(name) = name {
            devices.insert(name.to_owned(), [("type".to_owned(), "tpm".to_owned())].into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> Config {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    #[test]
    fn windows_gets_what_its_installer_knows() {
        let mut devices = Devices::from([
            ("root".into(), map(&[("type", "disk"), ("path", "/"), ("pool", "p")])),
            ("install".into(), map(&[("type", "disk"), ("pool", "p"), ("source", "win")])),
            ("fast".into(), map(&[("type", "disk"), ("pool", "p"), ("source", "d"), ("io.bus", "nvme")])),
            ("share".into(), map(&[("type", "disk"), ("source", "/srv"), ("path", "/mnt")])),
            ("eth0".into(), map(&[("type", "nic"), ("network", "n")])),
            ("eth1".into(), map(&[("type", "nic"), ("network", "n"), ("io.bus", "virtio")])),
        ]);
        let before = devices.clone();
        fill(&map(&[("image.os", "Windows")]), &mut devices);
        assert_eq!(devices, before, "an image has the drivers that it was installed with");
        fill(&map(&[(KEY, "windows")]), &mut devices);
        let bus = |name: &str| devices[name].get("io.bus").map(String::as_str);
        assert_eq!((bus("root"), bus("install"), bus("fast")), (Some("sata"), Some("sata"), Some("nvme")));
        assert_eq!((bus("share"), bus("eth0"), bus("eth1")), (None, Some("e1000e"), Some("virtio")));
        assert_eq!(devices["tpm"]["type"], "tpm");
        // One that there is stays the only one.
        let mut own = Devices::from([("chip".into(), map(&[("type", "tpm")]))]);
        fill(&map(&[(KEY, "windows")]), &mut own);
        assert_eq!(own.len(), 1);
    }

    #[test]
    fn what_is_windows() {
        assert!(is_windows(&Config::new(), Some("Microsoft Windows")));
        assert!(is_windows(&map(&[(KEY, "windows")]), None));
        assert!(!is_windows(&Config::new(), Some("Debian")) && !is_windows(&Config::new(), None));
    }
}
