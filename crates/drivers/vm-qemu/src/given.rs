//! Devices of the host that a machine is given: how QEMU is told of them. It opens none: each is a set of a descriptor that the host
//! opened. They come and go at a start.

use crate::{
    argv::{fd, word},
    devices::{Layout, boot_index, virtio},
};
use karst_guest::ResolvedGuest;
use karst_model::{
    Error, Result,
    device::{HostDevice, InputEnd, UsbHostDevice},
    spec::GivenSpec,
};
use serde_json::{Value, json};
use std::{collections::BTreeSet, os::fd::OwnedFd};

/// The first set of descriptors.
const SETS: u32 = 3000;
/// Devices of one machine.
pub(crate) const MOST: usize = 32;

/// What QEMU is told.
#[derive(Debug, Default)]
pub struct Given {
    /// Sets of descriptors: number, descriptor, name.
    pub sets: Vec<(u32, i32, &'static str)>,
    /// Options, in order.
    pub options: Vec<(&'static str, String)>,
}

/// Is one of them on USB?
pub fn want_usb(all: &[GivenSpec]) -> bool {
    all.iter().any(|one| matches!(one.device, HostDevice::Usb(_)))
}

fn usb(
    one: &GivenSpec,
    device: &UsbHostDevice,
    (id, node): (&str, &str),
    n: usize,
    buses: u32,
) -> Result<Value> {
    let mut value = json!({"driver": "usb-host", "id": id, "hostdevice": node});
    if let Some((bus, port)) = &device.port {
        let field = format!("devices.{}.port", one.name);
        if *bus >= buses {
            let text = format!("there is no bus {bus}; hardware.usb has {buses}");
            return Err(Error::invalid(field, text));
        }
        value["bus"] = format!("usb{bus}.0").into();
        value["port"] = word(&field, port, "")?.into();
    }
    if let Some(priority) = device.boot_priority.filter(|n| *n > 0) {
        value["bootindex"] = boot_index(priority, 950 + n as u32).into();
    }
    Ok(value)
}

/// At its place.
fn on_pci(one: &GivenSpec, mut value: Value, layout: Layout) -> Result<Value> {
    let field = format!("devices.{}", one.name);
    let pci = one.pci.as_deref().ok_or_else(|| {
        let text = "the virtual machine has no free PCI slot for a device of the host; remove another device";
        Error::conflict(text).at(&field)
    })?;
    layout.put(&mut value, &field, pci)?;
    Ok(value)
}

/// What QEMU is told of these; `buses` are those of USB that ports are counted on, `own_cid` is the number of sockets without a fixed one.
///
/// # Errors
/// Invalid, naming the device, for what does not fit; conflict where no PCI address was left for it.
pub fn options(all: &[GivenSpec], layout: Layout, buses: u32, own_cid: u32) -> Result<Given> {
    let mut found = Given::default();
    if all.len() > MOST {
        let text = format!("a virtual machine is given {MOST} devices of the host at most");
        return Err(Error::invalid("devices", text));
    }
    for (n, one) in all.iter().enumerate() {
        let set = SETS + n as u32;
        let id = format!("given-{}", word(&format!("devices.{}", one.name), &one.name, "")?);
        let node = format!("/dev/fdset/{set}");
        if !matches!(one.device, HostDevice::Vsock(_)) {
            found.sets.push((set, fd::GIVEN + n as i32, "given"));
        }
        let (option, value) = match &one.device {
            HostDevice::Usb(device) => ("-device", usb(one, device, (&id, &node), n, buses)?),
            HostDevice::Input(device) => match &device.to {
                InputEnd::Device { virtio: options } => {
                    let mut value = json!({"driver": "virtio-input-host-pci", "id": id, "evdev": node});
                    virtio(&mut value, options);
                    ("-device", on_pci(one, value, layout)?)
                }
                InputEnd::Seat { grab_all, repeat, toggle } => {
                    let mut value = json!({
                        "qom-type": "input-linux", "id": id, "evdev": node, "grab_all": grab_all, "repeat": repeat,
                    });
                    if let Some(keys) = toggle {
                        value["grab-toggle"] =
                            word(&format!("devices.{}.toggle", one.name), keys, "")?.into();
                    }
                    ("-object", value)
                }
            },
            HostDevice::Vsock(device) => {
                let cid = device.cid.unwrap_or(own_cid);
                let number = (fd::GIVEN + n as i32).to_string();
                let value =
                    json!({"driver": "vhost-vsock-pci", "id": id, "guest-cid": cid, "vhostfd": number});
                ("-device", on_pci(one, value, layout)?)
            }
        };
        found.options.push((option, value.to_string()));
    }
    Ok(found)
}

/// Those that are there: one that is missing, and may be, was not opened.
pub(crate) fn retain(all: &mut Vec<GivenSpec>, guest: &ResolvedGuest) {
    all.retain(|one| guest.given.contains_key(&one.name));
}

/// The descriptors of those that are there, with their numbers.
///
/// # Errors
/// Internal, when the host did not open one.
pub(crate) fn descriptors(guest: &ResolvedGuest, all: &[GivenSpec]) -> Result<Vec<(i32, OwnedFd)>> {
    let one = |(n, one): (usize, &GivenSpec)| {
        let unopened = || Error::internal("a device of the guest was not opened", &one.name);
        let opened = guest.given.get(&one.name).ok_or_else(unopened)?;
        Ok((fd::GIVEN + n as i32, opened.0.try_clone()?))
    };
    all.iter().enumerate().map(one).collect()
}

/// Devices that differ: they come and go at a start.
pub(crate) fn pending(now: &[GivenSpec], new: &[GivenSpec]) -> BTreeSet<String> {
    let changed = now.iter().chain(new).filter(|one| !(now.contains(one) && new.contains(one)));
    changed.map(|one| format!("devices.{}", one.name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::device::{InputHostDevice, UsbMatch, VsockHostDevice};

    const Q35: Layout = Layout { pc: false, ports: 16 };

    fn stick(name: &str, port: Option<(u32, &str)>) -> GivenSpec {
        let device = UsbHostDevice {
            which: UsbMatch { vendor: Some(0x046d), ..UsbMatch::default() },
            required: false,
            uid: 0,
            gid: 0,
            mode: 0o660,
            port: port.map(|(bus, port)| (bus, port.to_owned())),
            boot_priority: None,
        };
        GivenSpec { name: name.into(), device: HostDevice::Usb(device), pci: None }
    }

    fn input(name: &str, to: InputEnd) -> GivenSpec {
        let device = HostDevice::Input(InputHostDevice { path: "/dev/input/event3".into(), to });
        let pci = device.is_on_pci().then(|| "03:00.0".to_owned());
        GivenSpec { name: name.into(), device, pci }
    }

    #[test]
    fn qemu_gets_descriptors_and_no_paths() {
        let seat = InputEnd::Seat { grab_all: true, repeat: true, toggle: Some("alt-alt".into()) };
        let all = [
            stick("stick", None),
            stick("key", Some((1, "2.1"))),
            input("keys", seat),
            input("mouse", InputEnd::Device { virtio: Default::default() }),
        ];
        let given = options(&all, Q35, 2, 7).unwrap();
        let text: Vec<_> = given.options.iter().map(|(option, value)| format!("{option} {value}")).collect();
        assert_eq!(
            text,
            [
                r#"-device {"driver":"usb-host","id":"given-stick","hostdevice":"/dev/fdset/3000"}"#,
                r#"-device {"driver":"usb-host","id":"given-key","hostdevice":"/dev/fdset/3001","bus":"usb1.0","port":"2.1"}"#,
                r#"-object {"qom-type":"input-linux","id":"given-keys","evdev":"/dev/fdset/3002","grab_all":true,"repeat":true,"grab-toggle":"alt-alt"}"#,
                r#"-device {"driver":"virtio-input-host-pci","id":"given-mouse","evdev":"/dev/fdset/3003","bus":"port3","addr":"0x0"}"#,
            ]
        );
        assert_eq!(given.sets[3], (3003, fd::GIVEN + 3, "given"));
        let e = options(&all, Q35, 1, 7).unwrap_err();
        assert_eq!(e.field.as_deref(), Some("devices.key.port"));
        let e = options(&[GivenSpec { pci: None, ..all[3].clone() }], Q35, 0, 7).unwrap_err();
        assert_eq!(e.field.as_deref(), Some("devices.mouse"));
        assert!(options(&[stick("a,b", None)], Q35, 0, 7).is_err(), "a name is a word");
        assert!(want_usb(&all) && !want_usb(&all[2..]));
        let mut first = stick("first", None);
        if let HostDevice::Usb(device) = &mut first.device {
            device.boot_priority = Some(999);
        }
        assert!(options(&[first], Q35, 0, 7).unwrap().options[0].1.contains("bootindex"));
    }

    #[test]
    fn sockets_have_a_descriptor_and_a_number() {
        let of = |cid: Option<u32>| {
            let device = HostDevice::Vsock(VsockHostDevice { cid });
            let one = GivenSpec { name: "talk".into(), device, pci: Some("03:00.0".into()) };
            let given = options(&[one], Q35, 0, 7).unwrap();
            assert!(given.sets.is_empty(), "it is handed on as it is");
            given.options[0].1.clone()
        };
        let wanted = r#"{"driver":"vhost-vsock-pci","id":"given-talk","guest-cid":4,"vhostfd":"400","bus":"port3","addr":"0x0"}"#;
        assert_eq!(of(Some(4)), wanted);
        assert!(of(None).contains(r#""guest-cid":7,"#));
    }

    #[test]
    fn a_change_waits_for_the_next_start() {
        let (one, two) = (stick("one", None), stick("two", None));
        let moved = stick("one", Some((0, "1")));
        let names = |now: &[GivenSpec], new: &[GivenSpec]| pending(now, new).into_iter().collect::<Vec<_>>();
        assert!(names(std::slice::from_ref(&one), std::slice::from_ref(&one)).is_empty());
        assert_eq!(names(std::slice::from_ref(&one), &[moved, two]), ["devices.one", "devices.two"]);
        assert_eq!(names(&[one], &[]), ["devices.one"]);
    }
}
