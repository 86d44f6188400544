//! Ports of a machine beside its console: how QEMU is told of them, and how one attaches to those that lead to who attaches.
//!
//! Each is a character device and what the guest sees of it. QEMU opens nothing: files and devices are sets of descriptors, sockets
//! are descriptors, and a port that leads to who attaches is a socket in the guest's state directory, which is root's, so
//! that it outlives every daemon.

use crate::{
    argv::{fd, word},
    launch,
    machine::Inner,
};
use karst_guest::ResolvedGuest;
use karst_model::{
    Error, Result,
    device::{PortEnd, PortPlace},
    spec::LineSpec,
};
use serde_json::{Value, json};
use std::{collections::BTreeSet, os::fd::OwnedFd, path::Path};

/// Of the first set of descriptors; each port has this and the next, which is of its log.
const SETS: u32 = 5000;
/// The first place on the controller of virtio that no port of each machine has.
const FIRST: usize = 6;
/// Places that it has.
const PLACES: usize = 16;
/// Most of a machine: the numbers of their descriptors end where those of devices of the host begin.
pub(crate) const MOST: usize = 50;
/// Names of the sockets in a guest's state directory begin and end so.
const SOCKET: (&str, &str) = ("port-", ".sock");

/// What QEMU is told.
#[derive(Debug, Default)]
pub struct Ports {
    /// Sets of descriptors: number, descriptor, name.
    pub sets: Vec<(u32, i32, &'static str)>,
    /// Options, in order.
    pub options: Vec<(&'static str, String)>,
    /// The serial port 0 is one of them, and not the console.
    pub first_serial: bool,
    /// One of them is on USB.
    pub on_usb: bool,
    /// Devices of random numbers, which want a place on PCI.
    pub random: Vec<Value>,
}

fn socket(name: &str) -> String {
    format!("{}{name}{}", SOCKET.0, SOCKET.1)
}

/// The name of a port, which becomes part of options and of a file's name, whatever the engine asked of it.
fn checked(line: &LineSpec) -> Result<&str> {
    word(&format!("devices.{}", line.name), &line.name, "")
}

/// What QEMU is told of these, where the screen is there by SPICE, and where devices on USB of others are taken by a filter.
///
/// # Errors
/// Invalid, naming the device, where there is no room for it, or the devices, where they are too many.
pub fn options(lines: &[LineSpec], spice: bool, filter: Option<&str>) -> Result<Ports> {
    if lines.len() > MOST {
        return Err(Error::invalid("devices", format!("a virtual machine has {MOST} ports at most")));
    }
    let mut all = Ports::default();
    let mut virtio = FIRST;
    for (i, line) in lines.iter().enumerate() {
        let (number, set) = (fd::PORT + 2 * i as i32, SETS + 2 * i as u32);
        let id = format!("port-{}", checked(line)?);
        let mut backend = match &line.device.to {
            PortEnd::Stream {} => format!("socket,id={id},fd={number},server=on,wait=off"),
            PortEnd::Null {} => format!("null,id={id}"),
            PortEnd::Screen {} => format!("vc,id={id}"),
            PortEnd::Agent { clipboard, mouse } => {
                let on = |on: bool| if on { "on" } else { "off" };
                format!("qemu-vdagent,id={id},name=vdagent,clipboard={},mouse={}", on(*clipboard), on(*mouse))
            }
            // Without SPICE nobody is there.
            PortEnd::Spice {} if spice => format!("spicevmc,id={id},name=smartcard"),
            PortEnd::Spice {} => format!("null,id={id}"),
            PortEnd::File(file) => {
                all.sets.push((set, number, "port"));
                let append = if file.append { "on" } else { "off" };
                format!("file,id={id},path=/dev/fdset/{set},append={append}")
            }
            PortEnd::Device { .. } => {
                all.sets.push((set, number, "port"));
                format!("serial,id={id},path=/dev/fdset/{set}")
            }
            PortEnd::Unix { listen: false, .. } | PortEnd::Tcp { listen: false, telnet: false, .. } => {
                format!("socket,id={id},fd={number}")
            }
            PortEnd::Tcp { listen: false, .. } => format!("socket,id={id},fd={number},telnet=on"),
            PortEnd::Unix { .. } | PortEnd::Tcp { telnet: false, .. } => {
                format!("socket,id={id},fd={number},server=on,wait=off")
            }
            PortEnd::Tcp { .. } => format!("socket,id={id},fd={number},server=on,wait=off,telnet=on"),
        };
        if let Some(log) = &line.device.log {
            all.sets.push((set + 1, number + 1, "port-log"));
            let append = if log.append { "on" } else { "off" };
            backend.push_str(&format!(",logfile=/dev/fdset/{},logappend={append}", set + 1));
        }
        all.options.push(("-chardev", backend));
        let device = format!("{id}-device");
        let mut next = || {
            virtio += 1;
            match virtio <= PLACES {
                true => Ok(virtio - 1),
                false => {
                    let text = format!("there is room for {} on virtio", PLACES - FIRST);
                    Err(Error::invalid(format!("devices.{}.port", line.name), text))
                }
            }
        };
        let device = match &line.device.place {
            PortPlace::Serial { number } => {
                all.first_serial |= *number == 0;
                json!({"driver": "isa-serial", "id": device, "chardev": id, "index": number})
            }
            // Functions of the controller of ports of virtio, the last first: controllers of SCSI have the first of them.
            PortPlace::Pci { number } => {
                let function = 7u32.saturating_sub(*number);
                json!({"driver": "pci-serial", "id": device, "chardev": id, "addr": format!("0x2.0x{function}")})
            }
            PortPlace::Parallel { number } => {
                json!({"driver": "isa-parallel", "id": device, "chardev": id, "index": number})
            }
            PortPlace::Debug {} => {
                json!({"driver": "isa-debugcon", "id": device, "chardev": id, "iobase": 0x402})
            }
            PortPlace::Console { .. } => {
                json!({"driver": "virtconsole", "bus": "serial0.0", "nr": next()?, "id": device, "chardev": id})
            }
            PortPlace::Channel { name } => {
                let mut channel = json!({
                    "driver": "virtserialport", "bus": "serial0.0", "nr": next()?, "id": device, "chardev": id
                });
                if let Some(name) = name {
                    channel["name"] = word(&format!("devices.{}.name", line.name), name, "")?.into();
                }
                channel
            }
            PortPlace::Redirect {} => {
                let mut redirect = json!({"driver": "usb-redir", "id": device, "chardev": id});
                if let Some(filter) = filter {
                    redirect["filter"] = filter.into();
                }
                all.on_usb = true;
                redirect
            }
            PortPlace::Smartcard {} => {
                all.on_usb = true;
                all.options.push(("-device", json!({"driver": "usb-ccid", "id": "ccid"}).to_string()));
                json!({"driver": "ccid-card-passthru", "id": device, "chardev": id, "bus": "ccid.0"})
            }
            PortPlace::Random {} => {
                let numbers = json!({"qom-type": "rng-egd", "id": format!("{id}-numbers"), "chardev": id});
                all.options.push(("-object", numbers.to_string()));
                all.random
                    .push(json!({"driver": "virtio-rng-pci", "id": device, "rng": format!("{id}-numbers")}));
                continue;
            }
        };
        all.options.push(("-device", device.to_string()));
    }
    Ok(all)
}

/// The descriptors of a machine's ports, with their numbers.
///
/// # Errors
/// Internal, when the host did not open one.
pub(crate) fn descriptors(guest: &ResolvedGuest, lines: &[LineSpec]) -> Result<Vec<(i32, OwnedFd)>> {
    let mut all = vec![];
    for (i, line) in lines.iter().enumerate() {
        let number = fd::PORT + 2 * i as i32;
        let unopened = || Error::internal("a port of the guest was not opened", &line.name);
        let opened = guest.ports.get(&line.name);
        match &line.device.to {
            PortEnd::Null {} | PortEnd::Screen {} | PortEnd::Agent { .. } | PortEnd::Spice {} => {}
            PortEnd::Stream {} => {
                all.push((number, launch::listen(&guest.state_dir, &socket(checked(line)?))?))
            }
            _ => {
                let end = opened.and_then(|o| o.end.as_ref()).ok_or_else(unopened)?;
                all.push((number, end.0.try_clone()?));
            }
        }
        if line.device.log.is_some() {
            let log = opened.and_then(|o| o.log.as_ref()).ok_or_else(unopened)?;
            all.push((number + 1, log.0.try_clone()?));
        }
    }
    Ok(all)
}

/// Removes the sockets of a guest that has ended.
pub(crate) fn remove_sockets(dir: &Path) {
    let ours = |name: &str| name.starts_with(SOCKET.0) && name.ends_with(SOCKET.1);
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(ours) {
            // The next start replaces what stays.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Devices of ports that differ: they come and go at a start.
pub(crate) fn pending(now: &[LineSpec], new: &[LineSpec]) -> BTreeSet<String> {
    let changed = now.iter().chain(new).filter(|l| !(now.contains(l) && new.contains(l)));
    changed.map(|l| format!("devices.{}", l.name)).collect()
}

/// Attaches to a port that leads to who attaches.
pub(crate) async fn attach(machine: &Inner, name: &str) -> Result<OwnedFd> {
    // The record is not held while the port is reached.
    {
        let record = machine.record();
        let lines = record.hardware.as_ref().map(|h| h.lines.as_slice()).unwrap_or_default();
        let line = lines.iter().find(|l| l.name == name);
        let line = line.ok_or_else(|| {
            Error::not_found(format!("the virtual machine has no port {name:?} since its start")).at("port")
        })?;
        if line.device.to != (PortEnd::Stream {}) {
            let text = format!("the port {name:?} leads to {:?}, not to who attaches", line.device.to.kind());
            return Err(Error::unsupported(text));
        }
    }
    let stream = launch::connect(&machine.dir, &socket(name)).await?;
    Ok(stream.into_std()?.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::device::{PortDevice, PortFile};

    fn line(name: &str, place: PortPlace, to: PortEnd) -> LineSpec {
        LineSpec { name: name.into(), device: PortDevice { place, to, log: None } }
    }

    fn text(lines: &[LineSpec]) -> String {
        let ports = options(lines, false, None).unwrap();
        let sets = ports.sets.iter().map(|(set, fd, name)| format!("{set}={fd} {name}\n"));
        let options = ports.options.iter().map(|(option, value)| format!("{option} {value}\n"));
        sets.chain(options).collect()
    }

    #[test]
    fn each_is_a_character_device_and_what_the_guest_sees() {
        let mut logged = line("b", PortPlace::Parallel { number: 0 }, PortEnd::Null {});
        logged.device.log = Some(PortFile { path: "/x".into(), append: true });
        let channel = PortPlace::Channel { name: Some("org.x".into()) };
        let tcp = PortEnd::Tcp { address: "127.0.0.1:1".parse().unwrap(), listen: true, telnet: true };
        let lines = [
            line("a", PortPlace::Serial { number: 1 }, PortEnd::Stream {}),
            logged,
            line("c", PortPlace::Console { number: 0 }, PortEnd::Unix { path: "/y".into(), listen: false }),
            line("d", channel, PortEnd::File(PortFile { path: "/z".into(), append: false })),
            line("e", PortPlace::Channel { name: None }, tcp),
            line("f", PortPlace::Serial { number: 2 }, PortEnd::Device { path: "/dev/x".into() }),
            line("g", PortPlace::Debug {}, PortEnd::Stream {}),
            line(
                "h",
                PortPlace::Channel { name: Some("com.redhat.spice.0".into()) },
                PortEnd::Agent { clipboard: true, mouse: false },
            ),
            line("i", PortPlace::Pci { number: 1 }, PortEnd::Null {}),
        ];
        let wanted = r#"5003=303 port-log
5006=306 port
5010=310 port
-chardev socket,id=port-a,fd=300,server=on,wait=off
-device {"driver":"isa-serial","id":"port-a-device","chardev":"port-a","index":1}
-chardev null,id=port-b,logfile=/dev/fdset/5003,logappend=on
-device {"driver":"isa-parallel","id":"port-b-device","chardev":"port-b","index":0}
-chardev socket,id=port-c,fd=304
-device {"driver":"virtconsole","bus":"serial0.0","nr":6,"id":"port-c-device","chardev":"port-c"}
-chardev file,id=port-d,path=/dev/fdset/5006,append=off
-device {"driver":"virtserialport","bus":"serial0.0","nr":7,"id":"port-d-device","chardev":"port-d","name":"org.x"}
-chardev socket,id=port-e,fd=308,server=on,wait=off,telnet=on
-device {"driver":"virtserialport","bus":"serial0.0","nr":8,"id":"port-e-device","chardev":"port-e"}
-chardev serial,id=port-f,path=/dev/fdset/5010
-device {"driver":"isa-serial","id":"port-f-device","chardev":"port-f","index":2}
-chardev socket,id=port-g,fd=312,server=on,wait=off
-device {"driver":"isa-debugcon","id":"port-g-device","chardev":"port-g","iobase":1026}
-chardev qemu-vdagent,id=port-h,name=vdagent,clipboard=on,mouse=off
-device {"driver":"virtserialport","bus":"serial0.0","nr":9,"id":"port-h-device","chardev":"port-h","name":"com.redhat.spice.0"}
-chardev null,id=port-i
-device {"driver":"pci-serial","id":"port-i-device","chardev":"port-i","addr":"0x2.0x6"}
"#;
        assert_eq!(text(&lines), wanted);
        assert!(!options(&lines, false, None).unwrap().first_serial);
        let first = line("s", PortPlace::Serial { number: 0 }, PortEnd::Null {});
        assert!(options(&[first], false, None).unwrap().first_serial);
        let many: Vec<_> = (0..11)
            .map(|n| line(&format!("c{n}"), PortPlace::Console { number: n }, PortEnd::Null {}))
            .collect();
        assert_eq!(options(&many, false, None).unwrap_err().field.as_deref(), Some("devices.c10.port"));
        options(&many[..10], false, None).unwrap();
    }

    #[test]
    fn there_are_so_many_at_most() {
        // Devices that any number of may be there.
        let many: Vec<_> =
            (0..=MOST).map(|n| line(&format!("r{n}"), PortPlace::Redirect {}, PortEnd::Stream {})).collect();
        options(&many[..MOST], false, None).unwrap();
        let e = options(&many, false, None).unwrap_err();
        assert!(e.field.as_deref() == Some("devices") && e.message.contains("50"), "{e}");
    }

    #[test]
    fn devices_of_others_are_behind_their_ends() {
        let unix = || PortEnd::Unix { path: "/y".into(), listen: false };
        let lines = [
            line("r", PortPlace::Redirect {}, unix()),
            line("s", PortPlace::Smartcard {}, PortEnd::Spice {}),
            line("n", PortPlace::Random {}, unix()),
        ];
        let of = |spice: bool, filter: Option<&str>| options(&lines, spice, filter).unwrap();
        let ports = of(true, Some("-1:-1:-1:-1:0"));
        let text: Vec<_> = ports.options.iter().map(|(option, value)| format!("{option} {value}")).collect();
        assert_eq!(
            text,
            [
                "-chardev socket,id=port-r,fd=300",
                r#"-device {"driver":"usb-redir","id":"port-r-device","chardev":"port-r","filter":"-1:-1:-1:-1:0"}"#,
                "-chardev spicevmc,id=port-s,name=smartcard",
                r#"-device {"driver":"usb-ccid","id":"ccid"}"#,
                r#"-device {"driver":"ccid-card-passthru","id":"port-s-device","chardev":"port-s","bus":"ccid.0"}"#,
                "-chardev socket,id=port-n,fd=304",
                r#"-object {"qom-type":"rng-egd","id":"port-n-numbers","chardev":"port-n"}"#,
            ]
        );
        assert_eq!(ports.random[0]["rng"], "port-n-numbers");
        assert!(ports.on_usb && !options(&lines[2..], false, None).unwrap().on_usb);
        let without = of(false, None);
        assert!(without.options.iter().any(|(_, value)| value == "null,id=port-s"));
        assert!(!without.options.iter().any(|(_, value)| value.contains("filter")));
    }

    #[test]
    fn what_differs_waits_for_the_next_start() {
        let one = |to| line("a", PortPlace::Serial { number: 1 }, to);
        let (now, new) = ([one(PortEnd::Stream {})], [one(PortEnd::Null {})]);
        assert_eq!(pending(&now, &now), BTreeSet::new());
        assert_eq!(pending(&now, &new), BTreeSet::from(["devices.a".to_owned()]));
        assert_eq!(pending(&now, &[]), BTreeSet::from(["devices.a".to_owned()]));
    }

    #[test]
    fn nothing_slips_a_property_in() {
        for bad in ["", "a,path=/etc/shadow", "../a", "a/b", "a b", "a=b"] {
            let lines = [line(bad, PortPlace::Serial { number: 1 }, PortEnd::Stream {})];
            assert_eq!(
                options(&lines, false, None).unwrap_err().field,
                Some(format!("devices.{bad}")),
                "{bad:?}"
            );
            let channel = PortPlace::Channel { name: Some(bad.into()) };
            let e = options(&[line("a", channel, PortEnd::Null {})], false, None).unwrap_err();
            assert_eq!(e.field.as_deref(), Some("devices.a.name"), "{bad:?}");
        }
    }
}
