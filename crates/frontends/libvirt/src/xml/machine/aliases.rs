//! Aliases of the devices of a machine that runs, by which clients name them (cockpit opens consoles by nothing else). Disks and
//! interfaces have theirs in the record; these follow from the order of the document, as with libvirt. What a document said stands.
//!
//! What is redirected by SPICE has an address as well: cockpit reads it without asking whether it is there.
//!
//! Not of controllers: which there are, and their numbers, is QEMU's layout and not what the document shows.

use super::{Element, ports};
use std::collections::HashMap;

/// Elements, with what their aliases begin with.
const BEGINNINGS: &[(&str, &str)] = &[
    ("smartcard", "smartcard"),
    ("serial", "serial"),
    ("parallel", "parallel"),
    ("console", "console"),
    ("channel", "channel"),
    ("input", "input"),
    ("tpm", "tpm"),
    ("sound", "sound"),
    ("video", "video"),
    ("redirdev", "redir"),
    ("hub", "hub"),
    ("watchdog", "watchdog"),
    ("memballoon", "balloon"),
    ("rng", "rng"),
    ("panic", "panic"),
    ("iommu", "iommu"),
    ("vsock", "vsock"),
];

/// The port of the machine's USB that the first redirected device has; those after it follow.
const REDIRECTED: usize = 2;

fn alias(e: &Element) -> Option<&str> {
    e.find("alias").and_then(|a| a.attribute("name"))
}

/// Gives one to each that has none.
pub fn give(devices: &mut Element) {
    let mut next: HashMap<&str, u32> = HashMap::new();
    // The console is the serial port, where it says nothing else.
    let serial = devices.find("serial").map(|first| alias(first).unwrap_or("serial0").to_owned());
    // Channels are numbered as clients name them, and those that every machine has come after them.
    let others = devices.all("channel").filter(|e| !ports::is_own(e)).count() as u32;
    let mut own = others;
    for e in devices.elements_mut() {
        let Some((_, beginning)) = BEGINNINGS.iter().find(|(name, _)| *name == e.name()) else { continue };
        let next = match e.name() == "channel" && ports::is_own(e) {
            true => &mut own,
            false => next.entry(*beginning).or_default(),
        };
        // Ports say which they are.
        let target = e.find("target");
        let said: Option<u32> = target.and_then(|t| t.attribute("port")).and_then(|port| port.parse().ok());
        let is_serial = e.name() == "console" && target.and_then(|t| t.attribute("type")) != Some("virtio");
        let number = match e.name() {
            "serial" | "parallel" | "console" => said.unwrap_or(*next),
            _ => *next,
        };
        *next = number.saturating_add(1);
        if alias(e).is_some() {
            continue;
        }
        let name = match &serial {
            Some(serial) if is_serial => serial.clone(),
            _ if is_serial => "serial0".to_owned(),
            _ => format!("{beginning}{number}"),
        };
        let at = e.elements().iter().position(|c| c.name() == "address").unwrap_or(e.elements().len());
        e.elements_mut().insert(at, Element::new("alias").with("name", name));
    }
}

/// Says where redirected devices are, of those whose document does not.
pub fn place_redirected(devices: &mut Element) {
    let redirected = devices.elements_mut().iter_mut().filter(|e| e.name() == "redirdev");
    for (n, e) in redirected.enumerate().filter(|(_, e)| e.find("address").is_none()) {
        let address = Element::new("address").with("type", "usb").with("bus", 0).with("port", n + REDIRECTED);
        e.push(address);
    }
}

/// Takes away what is no user's: the document of one that runs says it, and it is given anew.
pub fn forget(e: &mut Element) {
    if alias(e).is_some_and(|name| !name.starts_with("ua-")) {
        e.elements_mut().retain(|c| c.name() != "alias");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml::read::document;

    fn given(text: &str) -> Vec<String> {
        let mut devices = document(&format!("<devices>{text}</devices>")).unwrap();
        give(&mut devices);
        devices.elements().iter().map(|e| alias(e).unwrap_or("none").to_owned()).collect()
    }

    #[test]
    fn each_is_called_as_clients_name_it() {
        let text = "<emulator>/usr/bin/qemu</emulator><controller type='usb'/>\
            <serial type='pty'><target type='isa-serial' port='0'/></serial><serial type='null'><target port='2'/></serial>\
            <parallel type='null'/><console type='pty'><target type='serial' port='0'/></console>\
            <console type='pty'><target type='virtio' port='1'/></console>\
            <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
            <channel type='pty'><target type='virtio' name='org.example.1'/></channel>\
            <graphics type='vnc'/><video><model type='vga'/></video><redirdev bus='usb'/><redirdev bus='usb'/>\
            <memballoon model='virtio'/><rng model='virtio'/>";
        let expected = "none none serial0 serial2 parallel0 serial0 console1 channel1 channel0 none video0 redir0 redir1 balloon0 rng0";
        assert_eq!(given(text).join(" "), expected);
        // One console alone is the serial port that libvirt adds for it.
        assert_eq!(given("<console type='pty'/>"), ["serial0"]);
    }

    #[test]
    fn what_is_redirected_has_an_address() {
        let text = "<devices><redirdev bus='usb'/><redirdev bus='usb'><address type='usb' bus='0' port='9'/></redirdev>\
            <input type='tablet'/><redirdev bus='usb'/></devices>";
        let mut devices = document(text).unwrap();
        place_redirected(&mut devices);
        let port = |e: &Element| e.find("address").and_then(|a| a.attribute("port")).map(str::to_owned);
        let ports: Vec<_> = devices.elements().iter().filter_map(port).collect();
        assert_eq!(ports, ["2", "9", "4"]);
    }

    #[test]
    fn what_the_document_said_stands() {
        let said = "<serial type='pty'><alias name='ua-mine'/></serial><console type='pty'/><input type='tablet'/>\
            <input type='mouse'><alias name='ua-mouse'/></input><input type='keyboard'/>";
        assert_eq!(given(said), ["ua-mine", "ua-mine", "input0", "ua-mouse", "input2"]);
        // Before the address, as libvirt has it.
        let mut devices =
            document("<devices><video><model type='vga'/><address type='pci'/></video></devices>").unwrap();
        give(&mut devices);
        let names = |e: &Element| e.elements().iter().map(|c| c.name().to_owned()).collect::<Vec<_>>();
        assert_eq!(names(&devices.elements()[0]), ["model", "alias", "address"]);
        devices.elements_mut().iter_mut().for_each(forget);
        assert_eq!(names(&devices.elements()[0]), ["model", "address"]);
        let mut mine = document("<input type='mouse'><alias name='ua-mouse'/></input>").unwrap();
        forget(&mut mine);
        assert_eq!(alias(&mine), Some("ua-mouse"));
    }
}
