//! Devices of the host that guests are given (`usb`, `input`, `vsock`): what a virtual machine has of them, and a container. Pure.

use karst_model::{
    Error, Result,
    device::{HostDevice, NodeDevice, NodeOrigin, UsbHostDevice},
    instance::DeviceIdentity,
    spec::{GivenSpec, NodeSpec},
};

/// Devices of the host that a virtual machine is given.
pub(super) fn specs<'a>(
    all: &[(String, HostDevice)],
    stateful: bool,
    identity: &dyn Fn(&str) -> Result<&'a DeviceIdentity>,
) -> Result<Vec<GivenSpec>> {
    let one = |(name, device): &(String, HostDevice)| {
        if stateful {
            let text = "the memory of a virtual machine that has a device of the host cannot be kept; unset migration.stateful";
            return Err(Error::unsupported(text).at(format!("devices.{name}.type")));
        }
        let pci = if device.is_on_pci() { identity(name)?.pci.clone() } else { None };
        Ok(GivenSpec { name: name.clone(), device: device.clone(), pci })
    };
    all.iter().map(one).collect()
}

/// Those that a container is given, as nodes.
pub(super) fn nodes(all: &[(String, HostDevice)]) -> Result<Vec<NodeSpec>> {
    let one = |(name, device): &(String, HostDevice)| match device {
        HostDevice::Usb(usb) => {
            let key = match (&usb.port, usb.boot_priority) {
                (Some(_), _) => Some("port"),
                (None, Some(_)) => Some("boot.priority"),
                (None, None) => None,
            };
            if let Some(key) = key {
                let text = "is said of a device of a virtual machine; a container has its node where the host has it";
                return Err(Error::invalid(format!("devices.{name}.{key}"), text));
            }
            let UsbHostDevice { which, required, uid, gid, mode, .. } = usb.clone();
            let device = NodeDevice { source: NodeOrigin::Usb(which), path: None, uid, gid, mode, required };
            Ok(NodeSpec { name: name.clone(), device })
        }
        HostDevice::Input(_) | HostDevice::Vsock(_) => {
            let text = "devices of input and sockets of the host are given to virtual machines only; a container has unix-char devices";
            Err(Error::unsupported(text).at(format!("devices.{name}.type")))
        }
    };
    all.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::expand::*, *};
    use karst_model::{VolumeId, device::Devices, instance::Hardware};
    use std::collections::BTreeMap;

    type Keys<'a> = &'a [(&'a str, &'a str)];

    const ROOT: (&str, Keys<'static>) = ("root", &[("type", "disk"), ("path", "/"), ("pool", "default")]);
    const STICK: Keys<'static> = &[("type", "usb"), ("vendorid", "046d"), ("uid", "5")];
    const MOUSE: Keys<'static> = &[("type", "input"), ("source", "/dev/input/event3")];

    fn parsed(list: &[(&str, Keys<'_>)]) -> ParsedDevices {
        let keys = |all: Keys<'_>| all.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let devices: Devices = list.iter().map(|&(name, all)| (name.to_owned(), keys(all))).collect();
        parse_devices(&devices).unwrap()
    }

    #[test]
    fn a_machine_sees_some_on_pci_and_keeps_no_memory_with_them() {
        let machine = Hardware {
            machine: "pc-q35-7.2".into(),
            cpu_model: "max".into(),
            firmware: karst_model::instance::Firmware::Bios,
            ports: 16,
            display: false,
            balloon: false,
            uuid: uuid::Uuid::nil(),
            cloud_init_id: uuid::Uuid::nil(),
        };
        let parsed = parsed(&[ROOT, ("mouse", MOUSE), ("stick", STICK), ("talk", &[("type", "vsock")])]);
        let assign = |old: &BTreeMap<String, DeviceIdentity>| {
            let mut random = |bytes: &mut [u8]| bytes.fill(7);
            let volume = VolumeId(uuid::Uuid::from_u128(1));
            assign_identities(old, &parsed, Some(&machine), volume, "abc123", &mut random)
        };
        let first = assign(&BTreeMap::new());
        let place = |name: &str| (first[name].slot.as_str(), first[name].pci.as_deref());
        assert_eq!(place("mouse"), ("given0", Some("01:00.0")));
        assert_eq!(place("talk"), ("given1", Some("02:00.0")));
        assert_eq!(first.get("stick"), None, "its place is on USB");
        assert_eq!(assign(&first), first);
        let identity = |name: &str| Ok(&first[name]);
        let all = specs(&parsed.given, false, &identity).unwrap();
        let places: Vec<_> = all.iter().map(|one| one.pci.as_deref()).collect();
        assert_eq!(places, [Some("01:00.0"), None, Some("02:00.0")]);
        let e = specs(&parsed.given, true, &identity).unwrap_err();
        assert_eq!(e.field.as_deref(), Some("devices.mouse.type"));
    }

    #[test]
    fn a_container_has_nodes_of_those_on_usb() {
        let of = |keys: Keys<'_>| nodes(&parsed(&[ROOT, ("stick", keys)]).given);
        let found = of(STICK).unwrap();
        assert!(matches!(&found[0].device.source, NodeOrigin::Usb(which) if which.vendor == Some(0x046d)));
        assert_eq!((found[0].device.uid, found[0].device.path.as_deref()), (5, None));
        let with = [STICK, &[("port", "0:1")]].concat();
        assert_eq!(of(&with).unwrap_err().field.as_deref(), Some("devices.stick.port"));
        for other in [MOUSE, &[("type", "vsock")]] {
            assert_eq!(of(other).unwrap_err().field.as_deref(), Some("devices.stick.type"));
        }
    }
}
