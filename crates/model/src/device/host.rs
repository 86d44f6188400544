//! Devices of the host that a guest is given as they are: those on USB (`usb`), those that somebody types and points with, and the one by
//! which programs of the host and of a machine talk (`input`, `vsock`, virtual machines). All are granted by the host's policy only, and none is anybody else's while a machine has it.

use super::{Keys, disk::plain_path, other_keys::keys_of};
use crate::{Error, Result, options::Virtio};
use serde::{Deserialize, Serialize};

/// Which device on USB: all that is said must be so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct UsbMatch {
    /// Its vendor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vendor: Option<u16>,
    /// What it is of the vendor's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub product: Option<u16>,
    /// Number of the host's bus, and of the device there; the latter is another each time that it is plugged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<(u16, u16)>,
    /// Its serial number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
}

/// A device of the host's on USB.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsbHostDevice {
    /// Which.
    pub which: UsbMatch,
    /// One that is missing at the start is an error rather than left out.
    pub required: bool,
    /// Owner of its node in a container.
    pub uid: u32,
    /// Group of that.
    pub gid: u32,
    /// Permission bits of that.
    pub mode: u32,
    /// The bus of a virtual machine that it is on, of those of `hardware.usb` without companions, and its port there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<(u32, String)>,
    /// Boot order of a virtual machine, higher first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_priority: Option<u32>,
}

/// A device of the host's that somebody types or points with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputHostDevice {
    /// Its node on the host, absolute.
    pub path: String,
    /// What becomes of it.
    pub to: InputEnd,
}

/// What becomes of a device of input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "to", rename_all = "snake_case")]
pub enum InputEnd {
    /// The guest sees the device itself, on virtio.
    Device {
        /// What of that is not as usual.
        #[serde(default, skip_serializing_if = "Virtio::is_usual")]
        virtio: Virtio,
    },
    /// What is typed and pointed goes to the machine's own keyboard and pointer.
    Seat {
        /// All such devices go from host to guest and back together, by the toggle of this one.
        #[serde(default)]
        grab_all: bool,
        /// Keys that are held repeat.
        #[serde(default)]
        repeat: bool,
        /// The keys that toggle between host and guest; both control keys when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        toggle: Option<String>,
    },
}

/// Keys that toggle, as QEMU and libvirt call them.
pub const INPUT_TOGGLES: &[&str] =
    &["ctrl-ctrl", "alt-alt", "shift-shift", "meta-meta", "scrolllock", "ctrl-scrolllock"];

/// Four hexadecimal digits.
fn identifier(keys: &Keys<'_>, key: &str) -> Result<Option<u16>> {
    let parse = |text: &str| {
        let digits = text.strip_prefix("0x").unwrap_or(text);
        let good = (1..=4).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
        u16::from_str_radix(digits, 16).ok().filter(|_| good).ok_or_else(|| {
            let text =
                format!("{text:?} is no number of a vendor or product; write it as lsusb does, such as 046d");
            Error::invalid(keys.field(key), text)
        })
    };
    keys.get(key).map(parse).transpose()
}

/// `0:1.2`: a bus and a port, behind hubs with the ports of those before.
pub fn usb_port(text: &str) -> Option<(u32, String)> {
    let (bus, port) = text.split_once(':')?;
    let good = port.split('.').all(|p| p.parse::<u8>().is_ok_and(|n| n > 0)) && port.split('.').count() <= 5;
    Some((bus.parse().ok().filter(|_| good)?, port.to_owned()))
}

/// Rules by which devices on USB of others are taken: `CLASS:VENDOR:PRODUCT:VERSION:ALLOW` each, the first that fits counts, -1 is any.
/// Of the form that usbredir has for them.
///
/// # Errors
/// Invalid, naming `field`.
pub fn usb_filter(field: &str, text: &str) -> Result<String> {
    let number = |part: &str, most: u32| match part.strip_prefix("0x") {
        _ if part == "-1" => true,
        Some(hex) => {
            let digits = (1..=4).contains(&hex.len()) && hex.bytes().all(|b| b.is_ascii_hexdigit());
            digits && u32::from_str_radix(hex, 16).is_ok_and(|n| n <= most)
        }
        None => false,
    };
    let rule = |rule: &str| match rule.split(':').collect::<Vec<_>>().as_slice() {
        [class, vendor, product, version, allow] => {
            number(class, 0xff)
                && [vendor, product, version].iter().all(|part| number(part, 0xffff))
                && ["0", "1"].contains(allow)
        }
        _ => false,
    };
    match text.len() <= 4096 && text.split('|').all(rule) {
        true => Ok(text.to_owned()),
        false => Err(Error::invalid(
            field,
            format!("{text:?}: write rules such as 0x08:0x1234:0xbeef:0x0100:1|-1:-1:-1:-1:0"),
        )),
    }
}

impl UsbHostDevice {
    pub(super) fn parse(keys: &Keys<'_>) -> Result<Self> {
        keys.known(&keys_of("usb"))?;
        let number = |key: &str| keys.parsed::<u16>(key, "a number of a bus or device, as lsusb has it");
        let at = match (number("busnum")?, number("devnum")?) {
            (Some(bus), Some(device)) => Some((bus, device)),
            (None, None) => None,
            _ => return Err(Error::invalid(keys.field("devnum"), "busnum and devnum belong together")),
        };
        let which = UsbMatch {
            vendor: identifier(keys, "vendorid")?,
            product: identifier(keys, "productid")?,
            at,
            serial: keys.get("serial").map(str::to_owned),
        };
        if which.product.is_some() && which.vendor.is_none() {
            return Err(Error::invalid(keys.field("vendorid"), "a product is one of a vendor's; say which"));
        }
        if which == UsbMatch::default() {
            let text = "say which device: its vendorid with productid, its busnum and devnum, or its serial";
            return Err(Error::invalid(keys.field("vendorid"), text));
        }
        let port = keys.get("port").map(|text| {
            usb_port(text).ok_or_else(|| {
                let text = format!("{text:?}: write a bus of hardware.usb and a port, such as 0:1 or 0:1.2");
                Error::invalid(keys.field("port"), text)
            })
        });
        let mode = match keys.get("mode") {
            None => 0o660,
            Some(text) => u32::from_str_radix(text, 8).ok().filter(|m| *m <= 0o777).ok_or_else(|| {
                let text = format!("{text:?} are no permissions; write them as 0660");
                Error::invalid(keys.field("mode"), text)
            })?,
        };
        Ok(Self {
            which,
            // As Incus has it: one that is not plugged in is no hindrance.
            required: keys.boolean("required")?,
            uid: keys.number("uid")?.unwrap_or(0),
            gid: keys.number("gid")?.unwrap_or(0),
            mode,
            port: port.transpose()?,
            boot_priority: keys.number("boot.priority")?,
        })
    }
}

impl InputHostDevice {
    pub(super) fn parse(keys: &Keys<'_>) -> Result<Self> {
        keys.known(&keys_of("input"))?;
        let source = keys.demand("source", "say which device, such as /dev/input/event3")?;
        if !source.starts_with('/') {
            let text = format!("{source:?} is not an absolute path");
            return Err(Error::invalid(keys.field("source"), text));
        }
        let path = plain_path(&keys.field("source"), source)?;
        let seat = keys.one_of("to", &[("device", false), ("seat", true)])?.unwrap_or(false);
        let of_seat = ["grab", "repeat", "toggle"].into_iter().find(|key| keys.get(key).is_some());
        let to = if seat {
            if keys.get("io.options").is_some() {
                let text = "is said of a device that the guest sees itself (to=device)";
                return Err(Error::invalid(keys.field("io.options"), text));
            }
            let toggle = keys.get("toggle").map(str::to_owned);
            if let Some(bad) = toggle.as_ref().filter(|t| !INPUT_TOGGLES.contains(&t.as_str())) {
                let text = format!("{bad:?} is not known; known are {}", INPUT_TOGGLES.join(", "));
                return Err(Error::invalid(keys.field("toggle"), text));
            }
            let grab_all = keys.one_of("grab", &[("one", false), ("all", true)])?.unwrap_or(false);
            InputEnd::Seat { grab_all, repeat: keys.boolean("repeat")?, toggle }
        } else if let Some(key) = of_seat {
            return Err(Error::invalid(
                keys.field(key),
                "is said of a device of the machine's seat (to=seat)",
            ));
        } else {
            let mut virtio = Virtio::default();
            for word in keys.get("io.options").into_iter().flat_map(|list| list.split(',')) {
                if !virtio.take(word.trim()) {
                    let text = format!("{word:?}: iommu, ats, packed and page-per-queue are possible");
                    return Err(Error::invalid(keys.field("io.options"), text));
                }
            }
            InputEnd::Device { virtio }
        };
        Ok(Self { path, to })
    }
}

/// Sockets between the host and a virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockHostDevice {
    /// The number by which the host reaches it (CID), no other's on the host; one of its own for each start when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cid: Option<u32>,
}

/// Numbers of machines that have no fixed one begin here, and go on with what libvirt's clients know as a domain's id.
const FIRST_CID: u32 = 0x4b00_0000;

/// May this be the fixed number of a machine? The first are the hypervisor's and the host's; the last are those of machines that have
/// none of their own, and anybody's.
pub fn is_fixed_cid(cid: u32) -> bool {
    (3..FIRST_CID).contains(&cid)
}

/// What such a number is, for a user.
pub const FIXED_CIDS: &str = "from 3 to 1258291199";

/// The number of a machine that has no fixed one, in this run.
pub fn own_cid(domain_id: u32) -> u32 {
    FIRST_CID.saturating_add(domain_id)
}

impl VsockHostDevice {
    pub(super) fn parse(keys: &Keys<'_>) -> Result<Self> {
        keys.known(&keys_of("vsock"))?;
        let cid = keys.parsed::<u32>("cid", &format!("a number {FIXED_CIDS}"))?;
        match cid.filter(|n| !is_fixed_cid(*n)) {
            Some(n) => {
                let text = format!("{n} is nobody's to choose; numbers are {FIXED_CIDS}");
                Err(Error::invalid(keys.field("cid"), text))
            }
            None => Ok(Self { cid }),
        }
    }
}

/// A device of the host that a virtual machine is given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum HostDevice {
    /// On USB.
    Usb(UsbHostDevice),
    /// Of input.
    Input(InputHostDevice),
    /// Sockets between both.
    Vsock(VsockHostDevice),
}

impl HostDevice {
    /// Does the guest see it on PCI?
    pub fn is_on_pci(&self) -> bool {
        matches!(self, Self::Input(InputHostDevice { to: InputEnd::Device { .. }, .. }) | Self::Vsock(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use std::collections::BTreeMap;

    fn parse(kind: &str, pairs: &[(&str, &str)]) -> Result<Device> {
        let all = [("type", kind)].into_iter().chain(pairs.iter().copied());
        let keys: BTreeMap<String, String> = all.map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        Device::parse("d", &keys)
    }

    #[test]
    fn devices_on_usb_are_named_by_what_they_are_or_where() {
        let usb = |pairs: &[(&str, &str)]| match parse("usb", pairs) {
            Ok(Device::Usb(device)) => device,
            other => panic!("{other:?}"),
        };
        let found = usb(&[("vendorid", "046d"), ("productid", "0xC31c"), ("port", "1:2.1")]);
        assert_eq!((found.which.vendor, found.which.product), (Some(0x046d), Some(0xc31c)));
        assert_eq!((found.port, found.required, found.mode), (Some((1, "2.1".into())), false, 0o660));
        let found = usb(&[("busnum", "14"), ("devnum", "6"), ("required", "true"), ("boot.priority", "5")]);
        assert_eq!((found.which.at, found.required, found.boot_priority), (Some((14, 6)), true, Some(5)));
        assert_eq!(usb(&[("serial", "A1")]).which.serial.as_deref(), Some("A1"));
        for (pairs, field) in [
            (&[][..], "vendorid"),
            (&[("productid", "c31c")], "vendorid"),
            (&[("vendorid", "46d0d")], "vendorid"),
            (&[("vendorid", "+46d")], "vendorid"),
            (&[("busnum", "1")], "devnum"),
            (&[("busnum", "1"), ("devnum", "x")], "devnum"),
            (&[("serial", "a"), ("port", "1")], "port"),
            (&[("serial", "a"), ("port", "0:0")], "port"),
            (&[("serial", "a"), ("mode", "rw")], "mode"),
            (&[("serial", "a"), ("source", "/dev/x")], "source"),
        ] {
            let e = parse("usb", pairs).unwrap_err();
            assert_eq!(e.field, Some(format!("devices.d.{field}")), "{pairs:?}: {e}");
        }
    }

    #[test]
    fn sockets_have_a_number_that_is_a_machines() {
        for (pairs, cid) in [(&[][..], None), (&[("cid", "3")], Some(3)), (&[("cid", "")], None)] {
            let found = parse("vsock", pairs);
            assert!(matches!(&found, Ok(Device::Vsock(device)) if device.cid == cid), "{found:?}");
        }
        for bad in ["0", "2", "1258291200", "4294967295", "-1", "auto"] {
            let e = parse("vsock", &[("cid", bad)]).unwrap_err();
            assert_eq!(e.field.as_deref(), Some("devices.d.cid"), "{bad}");
        }
        assert!(own_cid(1) != own_cid(2) && own_cid(1) > 2);
        assert!(FIXED_CIDS.ends_with(&format!(" {}", FIRST_CID - 1)));
        assert!(is_fixed_cid(FIRST_CID - 1) && !is_fixed_cid(own_cid(0)) && !is_fixed_cid(own_cid(u32::MAX)));
    }

    #[test]
    fn filters_have_one_form() {
        for good in ["-1:-1:-1:-1:0", "0x08:0x15E1:0x2007:0x0110:1|-1:-1:-1:-1:0"] {
            assert_eq!(usb_filter("f", good).as_deref(), Ok(good));
        }
        for bad in [
            "",
            "1",
            "8:-1:-1:-1:1",
            "0x100:-1:-1:-1:1",
            "-1:-1:-1:-1:yes",
            "-1:-1:-1:-1:1,x=y",
            "-1:0x:-1:-1:1",
        ] {
            assert_eq!(usb_filter("f", bad).unwrap_err().field.as_deref(), Some("f"), "{bad}");
        }
    }

    #[test]
    fn devices_of_input_are_the_guests_or_its_seats() {
        let input = |pairs: &[(&str, &str)]| match parse("input", pairs) {
            Ok(Device::Input(device)) => device,
            other => panic!("{other:?}"),
        };
        let source = ("source", "/dev/input/event3");
        let found = input(&[source, ("io.options", "packed,iommu")]);
        assert_eq!(found.path, "/dev/input/event3");
        assert!(matches!(&found.to, InputEnd::Device { virtio } if virtio.packed && virtio.iommu));
        assert!(HostDevice::Input(found).is_on_pci());
        let found =
            input(&[source, ("to", "seat"), ("grab", "all"), ("repeat", "true"), ("toggle", "alt-alt")]);
        let seat = InputEnd::Seat { grab_all: true, repeat: true, toggle: Some("alt-alt".into()) };
        assert_eq!(found.to, seat);
        assert!(!HostDevice::Input(found).is_on_pci());
        for (pairs, field) in [
            (&[][..], "source"),
            (&[("source", "event3")], "source"),
            (&[("source", "/dev/../x")], "source"),
            (&[source, ("grab", "all")], "grab"),
            (&[source, ("to", "seat"), ("io.options", "packed")], "io.options"),
            (&[source, ("io.options", "fast")], "io.options"),
            (&[source, ("to", "seat"), ("toggle", "space")], "toggle"),
            (&[source, ("to", "screen")], "to"),
        ] {
            let e = parse("input", pairs).unwrap_err();
            assert_eq!(e.field, Some(format!("devices.d.{field}")), "{pairs:?}: {e}");
        }
    }
}
