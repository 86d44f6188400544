//! Devices of the host that guests are given as they are: which of those on USB are meant, and what of them and of those of input the
//! policy grants. For a virtual machine each is opened here, at the start, and handed on: QEMU's user could not, and opens nothing.

use crate::{HostPolicy, RealAgent, agent::blocking, nodes::demand};
use karst_guest::{Opened, ResolvedGuest};
use karst_model::{
    Error, ErrorKind, Result,
    device::{HostDevice, UsbMatch},
    spec::GivenSpec,
};
use rustix::fs::{FileType, Mode, OFlags};
use std::{
    collections::BTreeMap,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::Arc,
};

/// What the kernel says of devices on USB, and where their nodes are.
const SYS: &str = "/sys/bus/usb/devices";
const DEV: &str = "/dev/bus/usb";
/// Major numbers of devices of input, and of those on USB.
const INPUT: u32 = 13;
const USB: u32 = 189;
/// The device of sockets, and the major number of those that have a driver each.
const VSOCK: &str = "/dev/vhost-vsock";
const MISC: u32 = 10;

/// A device on USB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Usb {
    /// Its vendor and what it is of the vendor's, four hexadecimal digits each.
    pub(crate) id: String,
    /// Numbers of its bus and of itself there.
    pub(crate) at: (u16, u16),
}

impl Usb {
    /// Where its node is below that of all.
    pub(crate) fn node(&self, dev: &Path) -> PathBuf {
        dev.join(format!("{:03}", self.at.0)).join(format!("{:03}", self.at.1))
    }
}

/// Those that are meant, in the order of their buses, as far as the policy grants them.
///
/// # Errors
/// Not found, when there is none; forbidden.
pub(crate) fn usb(policy: &HostPolicy, which: &UsbMatch) -> Result<Vec<Usb>> {
    let found = matching(Path::new(SYS), which)?;
    if found.is_empty() {
        return Err(Error::not_found(
            "this host has no such device on USB; lsusb shows those that there are",
        ));
    }
    found.iter().try_for_each(|one| demand(policy, "usb", Some(&one.id)))?;
    Ok(found)
}

/// The nodes of those that are meant.
pub(crate) fn usb_nodes(policy: &HostPolicy, which: &UsbMatch) -> Result<Vec<(String, PathBuf)>> {
    let found = usb(policy, which)?;
    Ok(found
        .iter()
        .map(|one| (format!("{:03}-{:03}", one.at.0, one.at.1), one.node(Path::new(DEV))))
        .collect())
}

fn matching(sys: &Path, which: &UsbMatch) -> Result<Vec<Usb>> {
    let entries = match std::fs::read_dir(sys) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => return Err(e.into()),
    };
    let mut all = vec![];
    for entry in entries.flatten() {
        let at = entry.path();
        let text = |file: &str| std::fs::read_to_string(at.join(file)).ok().map(|t| t.trim().to_owned());
        // Interfaces have no ids, and hubs are part of the machine.
        let (Some(vendor), Some(product)) = (text("idVendor"), text("idProduct")) else { continue };
        if text("bDeviceClass").as_deref() == Some("09") {
            continue;
        }
        let number = |file: &str| text(file).and_then(|t| t.parse::<u16>().ok());
        let Some(place) = number("busnum").zip(number("devnum")) else { continue };
        let is = |wanted: Option<u16>, said: &str| {
            wanted.is_none_or(|wanted| u16::from_str_radix(said, 16) == Ok(wanted))
        };
        let meant = is(which.vendor, &vendor)
            && is(which.product, &product)
            && which.at.is_none_or(|at| at == place)
            && which.serial.as_ref().is_none_or(|serial| text("serial").as_ref() == Some(serial));
        if meant {
            all.push(Usb { id: format!("{vendor}:{product}"), at: place });
        }
    }
    all.sort_by_key(|one| one.at);
    Ok(all)
}

/// A character device of this class, open to be read and written. What its path is was opened before it is looked at.
fn open(path: &Path, major: u32, what: &str) -> Result<Opened> {
    let found = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let found = found.map_err(|e| match std::io::Error::from(e) {
        e if e.kind() == std::io::ErrorKind::NotFound => {
            Error::not_found(format!("this host has no {path:?}"))
        }
        e => e.into(),
    })?;
    let stat = rustix::fs::fstat(&found).map_err(std::io::Error::from)?;
    let is = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && rustix::fs::major(stat.st_rdev) == major;
    if !is {
        return Err(Error::invalid("source", format!("{path:?} is no device {what}")));
    }
    let itself = format!("/proc/self/fd/{}", found.as_raw_fd());
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = rustix::fs::open(itself, flags, Mode::empty()).map_err(std::io::Error::from)?;
    Ok(Opened(Arc::new(opened)))
}

/// One that a virtual machine is given; nothing, when it is missing and may be.
fn resolve(policy: &HostPolicy, given: &GivenSpec) -> Result<Option<Opened>> {
    let field = |key: &str| format!("devices.{}.{key}", given.name);
    match &given.device {
        HostDevice::Usb(device) => {
            let of = if device.which.at.is_some() { "busnum" } else { "vendorid" };
            let found = match usb(policy, &device.which) {
                Err(e) if e.is(ErrorKind::NotFound) && !device.required => return Ok(None),
                found => found.map_err(|e| e.at(field(of)))?,
            };
            match found.as_slice() {
                [one] => {
                    open(&one.node(Path::new(DEV)), USB, "on USB").map(Some).map_err(|e| e.at(field(of)))
                }
                several => {
                    let places: Vec<_> = several.iter().map(|u| format!("{}/{}", u.at.0, u.at.1)).collect();
                    let text = format!(
                        "several devices on USB are meant (busnum/devnum {}); say which by busnum and devnum, or by its serial",
                        places.join(", ")
                    );
                    Err(Error::conflict(text).at(field(of)))
                }
            }
        }
        HostDevice::Input(device) => {
            let opened = demand(policy, "input", Some(&device.path))
                .and_then(|()| open(Path::new(&device.path), INPUT, "of input"));
            opened.map(Some).map_err(|e| e.at(field("source")))
        }
        HostDevice::Vsock(_) => {
            let opened =
                demand(policy, "vsock", None).and_then(|()| open(Path::new(VSOCK), MISC, "of sockets"));
            opened.map(Some).map_err(|e| match e.is(ErrorKind::NotFound) {
                true => {
                    let text =
                        "the host's kernel has no vhost_vsock; its administrator can: modprobe vhost_vsock";
                    Error::conflict(text).at(field("type"))
                }
                false => e.at(field("type")),
            })
        }
    }
}

impl RealAgent {
    /// Devices of the host that a machine is given, opened.
    pub(crate) async fn given_devices(&self, guest: &ResolvedGuest) -> Result<BTreeMap<String, Opened>> {
        let all: Vec<GivenSpec> = guest.machine.iter().flat_map(|m| m.given.clone()).collect();
        if all.is_empty() {
            return Ok(BTreeMap::new());
        }
        let policy = self.options.policy.clone();
        blocking(move || {
            let mut opened = BTreeMap::new();
            for given in &all {
                if let Some(device) = resolve(&policy, given)? {
                    opened.insert(given.name.clone(), device);
                }
            }
            Ok(opened)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::device::{InputEnd, InputHostDevice, UsbHostDevice, VsockHostDevice};

    fn grants(classes: &[&str]) -> HostPolicy {
        HostPolicy {
            device_classes: classes.iter().map(|c| (*c).to_owned()).collect(),
            ..HostPolicy::default()
        }
    }

    #[test]
    fn devices_on_usb_are_found_by_all_that_is_said() {
        let dir = tempfile::tempdir().unwrap();
        for (name, all) in [
            (
                "usb1",
                [
                    ("idVendor", "1d6b"),
                    ("idProduct", "0002"),
                    ("bDeviceClass", "09"),
                    ("busnum", "1"),
                    ("devnum", "1"),
                    ("serial", "x"),
                ],
            ),
            (
                "1-2",
                [
                    ("idVendor", "046d"),
                    ("idProduct", "c31c"),
                    ("bDeviceClass", "00"),
                    ("busnum", "1"),
                    ("devnum", "12"),
                    ("serial", "A"),
                ],
            ),
            (
                "1-3",
                [
                    ("idVendor", "046d"),
                    ("idProduct", "c31c"),
                    ("bDeviceClass", "00"),
                    ("busnum", "1"),
                    ("devnum", "3"),
                    ("serial", "B"),
                ],
            ),
        ] {
            let at = dir.path().join(name);
            std::fs::create_dir_all(&at).unwrap();
            all.iter().for_each(|(file, text)| std::fs::write(at.join(file), format!("{text}\n")).unwrap());
        }
        std::fs::create_dir_all(dir.path().join("1-2:1.0")).unwrap();
        let found = |which: UsbMatch| {
            let all = matching(dir.path(), &which).unwrap();
            all.into_iter().map(|one| one.at.1).collect::<Vec<_>>()
        };
        let by = UsbMatch { vendor: Some(0x046d), product: Some(0xc31c), ..UsbMatch::default() };
        assert_eq!(found(by.clone()), [3, 12]);
        assert_eq!(found(UsbMatch { serial: Some("A".into()), ..by.clone() }), [12]);
        assert_eq!(found(UsbMatch { at: Some((1, 3)), ..UsbMatch::default() }), [3]);
        assert_eq!(found(UsbMatch { at: Some((1, 1)), ..UsbMatch::default() }), [0u16; 0], "a hub");
        assert_eq!(found(UsbMatch { product: Some(1), ..by }), [0u16; 0]);
        let one = Usb { id: String::new(), at: (1, 12) };
        assert_eq!(one.node(Path::new(DEV)), Path::new("/dev/bus/usb/001/012"));
        assert_eq!(matching(Path::new("/nonexistent"), &UsbMatch::default()), Ok(vec![]));
    }

    #[test]
    fn what_is_missing_is_left_out_where_it_may_be() {
        let usb = |required: bool| GivenSpec {
            name: "stick".into(),
            device: HostDevice::Usb(UsbHostDevice {
                which: UsbMatch { at: Some((999, 999)), ..UsbMatch::default() },
                required,
                uid: 0,
                gid: 0,
                mode: 0o660,
                port: None,
                boot_priority: None,
            }),
            pci: None,
        };
        assert!(resolve(&grants(&["usb"]), &usb(false)).unwrap().is_none());
        let e = resolve(&grants(&["usb"]), &usb(true)).unwrap_err();
        assert!(e.is(ErrorKind::NotFound), "{e}");
        assert_eq!(e.field.as_deref(), Some("devices.stick.busnum"));
    }

    #[test]
    fn devices_of_input_are_the_policys_to_grant_and_nothing_else() {
        let input = |path: &str| GivenSpec {
            name: "keys".into(),
            device: HostDevice::Input(InputHostDevice {
                path: path.into(),
                to: InputEnd::Seat { grab_all: false, repeat: false, toggle: None },
            }),
            pci: None,
        };
        let e = resolve(&grants(&["usb"]), &input("/dev/input/event0")).unwrap_err();
        assert!(e.is(ErrorKind::Forbidden) && e.message.contains("input:/dev/input/event0"), "{e}");
        assert_eq!(e.field.as_deref(), Some("devices.keys.source"));
        let e = resolve(&grants(&["input"]), &input("/dev/null")).unwrap_err();
        assert!(e.is(ErrorKind::Invalid) && e.message.contains("no device of input"), "{e}");
        let e = resolve(&grants(&["input:/dev/input/none"]), &input("/dev/input/none")).unwrap_err();
        assert!(e.is(ErrorKind::NotFound), "{e}");
        let sockets = GivenSpec {
            name: "talk".into(),
            device: HostDevice::Vsock(VsockHostDevice { cid: None }),
            pci: None,
        };
        let e = resolve(&grants(&["input"]), &sockets).unwrap_err();
        assert!(e.is(ErrorKind::Forbidden) && e.message.contains("vsock"), "{e}");
    }
}
