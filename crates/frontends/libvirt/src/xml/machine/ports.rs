//! Serial and parallel ports, consoles and channels, both ways: devices of the type `port`, beside those that each machine has (its
//! console, which is the serial port 0 unless a document leads that elsewhere, and the channels of its agents).

use super::{plugs, refuse, wrong};
use crate::{error::VirError, xml::Element};
use karst_model::device::{
    PARALLEL_PORTS, PCI_PORTS, PortDevice, PortEnd, PortFile, PortPlace, SERIAL_PORTS,
};
use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

/// Names of the elements.
pub const ELEMENTS: &[&str] = &["serial", "parallel", "console", "channel"];
/// The channel of the guest agent, which every machine has.
const AGENT: &str = "org.qemu.guest_agent.0";
/// That of SPICE's agent, which goes with the screen.
const SPICE: &str = "com.redhat.spice.0";
/// The type of a channel that QEMU is at the other end of itself, for viewers by VNC.
const AGENT_OF_QEMU: &str = "qemu-vdagent";
/// Where firmware writes what it does.
const DEBUG: u32 = 0x402;
/// Addresses and interrupts of serial ports, which have always been there.
const ISA: [(u32, u32); SERIAL_PORTS as usize] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];

/// Is it an element of a port, or of a device behind one?
pub fn is(e: &Element) -> bool {
    ELEMENTS.contains(&e.name()) || plugs::is(e)
}

/// A port, with the name that its device gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Name.
    pub name: String,
    /// What it is.
    pub device: PortDevice,
}

impl Port {
    /// The keys of its device.
    pub fn keys(&self) -> BTreeMap<String, String> {
        let own = [("type".to_owned(), "port".to_owned())];
        own.into_iter().chain(self.device.keys().into_iter().map(|(k, v)| (k.to_owned(), v))).collect()
    }
}

fn hexadecimal(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn flag(e: &Element, attribute: &str) -> Result<bool, VirError> {
    match e.attribute(attribute) {
        None | Some("off" | "no") => Ok(false),
        Some("on" | "yes") => Ok(true),
        Some(other) => Err(wrong(format!("invalid value '{other}' of {attribute} in <{}>", e.name()))),
    }
}

/// QEMU's own side of SPICE's agent.
fn agent(e: &Element) -> Result<PortEnd, VirError> {
    let (mut clipboard, mut mouse) = (false, true);
    for inner in e.find("source").map(Element::elements).unwrap_or_default() {
        let word = |name: &str| inner.attribute(name).unwrap_or_default().to_owned();
        match (inner.name(), word("copypaste").as_str(), word("mode").as_str()) {
            ("clipboard", "yes", "") => clipboard = true,
            ("clipboard", "no", "") => clipboard = false,
            ("mouse", "", "client") => mouse = true,
            ("mouse", "", "server") => mouse = false,
            (other, ..) => {
                let text = "copypaste of a clipboard is yes or no, the mode of a mouse client or server";
                return Err(refuse(&format!("channel source {other}"), text));
            }
        }
    }
    match e.find("log") {
        Some(_) => Err(refuse("channel log", "is not there for an agent's channel")),
        None => Ok(PortEnd::Agent { clipboard, mouse }),
    }
}

/// What is at the other end of one.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub(super) fn end(e: &Element) -> Result<(PortEnd, Option<PortFile>), VirError> {
    let name = e.name();
    let source = e.find("source");
    if e.attribute("type") == Some(AGENT_OF_QEMU) {
        return Ok((agent(e)?, None));
    }
    if e.all("source").count() > 1 {
        return Err(refuse(&format!("{name} source"), "there is one"));
    }
    if e.find("auth").is_some() {
        return Err(refuse(&format!("{name} auth"), "is not there"));
    }
    for inner in source.map(Element::elements).unwrap_or_default() {
        if inner.name() != "reconnect" || flag(inner, "enabled")? {
            let text = "who is connected to is connected to at the start, and once";
            return Err(refuse(&format!("{name} {}", inner.name()), text));
        }
    }
    let of = |attribute: &str| source.and_then(|s| s.attribute(attribute)).filter(|v| !v.is_empty());
    let path = || {
        let path = of("path")
            .ok_or_else(|| wrong(format!("Missing source path attribute for char device of <{name}>")))?;
        match path.starts_with('/') {
            true => Ok(path.to_owned()),
            false => Err(wrong(format!("'{path}' is no absolute path"))),
        }
    };
    let listen = || match of("mode") {
        Some("bind") => Ok(true),
        None | Some("connect") => Ok(false),
        Some(other) => Err(wrong(format!("invalid value '{other}' of mode in the source of <{name}>"))),
    };
    let telnet = match e.find("protocol").and_then(|p| p.attribute("type")) {
        None | Some("raw") => false,
        Some("telnet") => true,
        Some(other) => {
            return Err(refuse(
                &format!("{name} protocol"),
                format!("'{other}' is not there; raw and telnet are"),
            ));
        }
    };
    let to = match e.attribute("type").unwrap_or_default() {
        "pty" => PortEnd::Stream {},
        "null" => PortEnd::Null {},
        "vc" => PortEnd::Screen {},
        "file" => PortEnd::File(PortFile {
            path: path()?,
            append: source.map_or(Ok(false), |s| flag(s, "append"))?,
        }),
        "dev" => PortEnd::Device { path: path()? },
        // libvirt finds a place for it, of which nothing is said: who attaches by the API is who reaches it here.
        "unix" if name == "channel" && of("path").is_none() => PortEnd::Stream {},
        "unix" => PortEnd::Unix { path: path()?, listen: listen()? },
        "tcp" => {
            if of("tls") == Some("yes") {
                return Err(refuse(&format!("{name} source tls"), "bytes go as they are"));
            }
            let host = of("host")
                .ok_or_else(|| wrong(format!("Missing source host attribute for char device of <{name}>")))?;
            let host: IpAddr = host.parse().map_err(|_| {
                let text = format!("'{host}' is no address of IPv4 or IPv6; names are not looked up");
                refuse(&format!("{name} source host"), text)
            })?;
            let service = of("service").and_then(|s| s.parse().ok()).filter(|port: &u16| *port > 0);
            let service = service
                .ok_or_else(|| wrong(format!("the source of <{name}> has no service that is a port")))?;
            PortEnd::Tcp { address: SocketAddr::new(host, service), listen: listen()?, telnet }
        }
        other => {
            let text = format!("'{other}' is not there; pty, null, vc, file, dev, unix and tcp are");
            return Err(refuse(&format!("{name} type"), text));
        }
    };
    if name == "parallel" && matches!(to, PortEnd::Device { .. }) {
        return Err(refuse("parallel type", "parallel ports of the host are not given to guests"));
    }
    let log = match e.find("log") {
        None => None,
        Some(log) => {
            let file = log.attribute("file").filter(|f| f.starts_with('/'));
            let file =
                file.ok_or_else(|| wrong(format!("the log of <{name}> has no file with an absolute path")))?;
            Some(PortFile { path: file.to_owned(), append: flag(log, "append")? })
        }
    };
    Ok((to, log))
}

/// The number that a target names.
fn number(e: &Element) -> Result<Option<u32>, VirError> {
    let parse = |text: &str| {
        text.parse()
            .map_err(|_| wrong(format!("invalid value '{text}' of port in the target of <{}>", e.name())))
    };
    e.find("target").and_then(|t| t.attribute("port")).map(parse).transpose()
}

fn target(e: &Element) -> Option<&str> {
    e.find("target").and_then(|t| t.attribute("type"))
}

fn is_on_pci(e: &Element) -> bool {
    e.name() == "serial" && target(e) == Some("pci-serial")
}

fn is_debug(e: &Element) -> bool {
    e.name() == "serial" && target(e) == Some("isa-debug")
}

/// Where a serial port is says nothing else than its number.
fn demand_isa(e: &Element, number: u32) -> Result<(), VirError> {
    let Some(address) = e.find("address").filter(|_| e.name() == "serial") else { return Ok(()) };
    if is_on_pci(e) {
        // Which function it is follows from its number.
        return match address.attribute("type") {
            Some("pci") => Ok(()),
            _ => Err(refuse("serial address", "one of the target pci-serial is on PCI")),
        };
    }
    if is_debug(e) {
        let at = address.attribute("iobase").map(hexadecimal);
        return match address.attribute("type") == Some("isa") && at.is_none_or(|at| at == Some(DEBUG)) {
            true => Ok(()),
            false => Err(refuse("serial address", "that of isa-debug is 0x402, where firmware writes")),
        };
    }
    let of = |name: &str| address.attribute(name).map(hexadecimal);
    let usual = |(base, interrupt): (u32, u32)| {
        of("iobase").is_none_or(|n| n == Some(base)) && of("irq").is_none_or(|n| n == Some(interrupt))
    };
    match (address.attribute("type"), ISA.get(number as usize)) {
        (Some("isa"), Some(place)) if usual(*place) => Ok(()),
        _ => Err(refuse("serial address", format!("the serial port {number} is where it has always been"))),
    }
}

/// Is it a channel that every machine has, or that goes with its screen?
pub fn is_own(channel: &Element) -> bool {
    let name = channel.find("target").and_then(|t| t.attribute("name"));
    match channel.attribute("type") {
        Some("unix") => name == Some(AGENT),
        // What tools write beside a screen of SPICE.
        Some("spicevmc") => name.is_none_or(|n| n == SPICE),
        _ => false,
    }
}

/// One element that stands alone.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub fn check(e: &Element) -> Result<(), VirError> {
    if plugs::is(e) {
        return plugs::read(e).map(drop);
    }
    let known: &[&str] = match e.name() {
        "serial" => &["isa-serial", "isa-debug", "pci-serial"],
        "parallel" => &[],
        "console" => &["serial", "virtio"],
        _ => &["virtio"],
    };
    if let Some(other) = target(e).filter(|t| !known.contains(t)) {
        let text = match known {
            [] => format!("'{other}' is not there"),
            _ => format!("'{other}' is not there; {} is", known.join(" and ")),
        };
        return Err(refuse(&format!("{} target", e.name()), text));
    }
    if e.name() == "channel" {
        if is_own(e) {
            return Ok(());
        }
        let name = e.find("target").and_then(|t| t.attribute("name"));
        let of_qemu = e.attribute("type") == Some(AGENT_OF_QEMU);
        if of_qemu && name != Some(SPICE) {
            return Err(refuse("channel target", format!("{AGENT_OF_QEMU} is of the name {SPICE}")));
        }
        if let Some(name) = name.filter(|n| !of_qemu && [AGENT, SPICE].contains(n)) {
            let text = format!(
                "'{name}' is there for an agent, of type {}",
                if name == AGENT { "unix" } else { "spicevmc or qemu-vdagent" }
            );
            return Err(refuse("channel", text));
        }
    }
    let most = match e.name() {
        "serial" if is_on_pci(e) => Some(PCI_PORTS),
        "serial" => Some(SERIAL_PORTS),
        "parallel" => Some(PARALLEL_PORTS),
        _ => None,
    };
    let said = number(e)?;
    if let (Some(n), Some(most)) = (said, most)
        && n >= most
    {
        return Err(refuse(e.name(), format!("there is no port {n}; a machine has {most}")));
    }
    end(e).map(drop)
}

/// Those of a document that each machine has not anyway.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub fn read(devices: &[Element]) -> Result<Vec<Port>, VirError> {
    let all = |name: &'static str| devices.iter().filter(move |e| e.name() == name);
    let mut ports: Vec<Port> = vec![];
    let mut add = |place: PortPlace, e: &Element| {
        let (to, log) = end(e)?;
        let own = place == PortPlace::Serial { number: 0 } && to == (PortEnd::Stream {}) && log.is_none();
        if !own {
            let name = match place.number() {
                Some(number) => format!("{}{number}", place.kind()),
                None if place == (PortPlace::Debug {}) => "debug0".to_owned(),
                None => {
                    let channel = |p: &&Port| matches!(p.device.place, PortPlace::Channel { .. });
                    format!("channel{}", ports.iter().filter(channel).count())
                }
            };
            ports.push(Port { name, device: PortDevice { place, to, log } });
        }
        Ok::<(), VirError>(())
    };
    let mut taken = std::collections::BTreeSet::new();
    let mut once = |e: &Element, place: &PortPlace| match taken.insert(place.clone()) {
        true => Ok(()),
        false => Err(wrong(format!("two elements <{}> are the same port", e.name()))),
    };
    for name in ["serial", "parallel"] {
        let mut next = 0;
        for e in all(name) {
            if is_debug(e) {
                demand_isa(e, 0)?;
                once(e, &PortPlace::Debug {})?;
                add(PortPlace::Debug {}, e)?;
                continue;
            }
            let number = number(e)?.unwrap_or(next);
            next = number.saturating_add(1);
            let most = match name {
                "serial" if is_on_pci(e) => PCI_PORTS,
                "serial" => SERIAL_PORTS,
                _ => PARALLEL_PORTS,
            };
            if number >= most {
                return Err(refuse(name, format!("there is no port {number}; a machine has {most}")));
            }
            let place = match name {
                "serial" if is_on_pci(e) => PortPlace::Pci { number },
                "serial" => PortPlace::Serial { number },
                _ => PortPlace::Parallel { number },
            };
            demand_isa(e, number)?;
            once(e, &place)?;
            add(place, e)?;
        }
    }
    let serial = all("serial").any(|e| !is_debug(e));
    for (n, e) in (0u32..).zip(all("console")) {
        if target(e) == Some("virtio") {
            let place = PortPlace::Console { number: number(e)?.unwrap_or(n) };
            once(e, &place)?;
            add(place, e)?;
        } else if n > 0 {
            return Err(refuse("console", "the first console alone can be a serial port"));
        } else if !serial {
            // It is the same as the serial port else, as libvirt has it.
            add(PortPlace::Serial { number: 0 }, e)?;
        }
    }
    for e in all("channel").filter(|e| !is_own(e)) {
        let name = e.find("target").and_then(|t| t.attribute("name")).map(str::to_owned);
        let place = PortPlace::Channel { name };
        if place != (PortPlace::Channel { name: None }) {
            once(e, &place)?;
        }
        add(place, e)?;
    }
    ports.extend(plugs::all(devices)?.into_iter().map(|(name, device)| Port { name, device }));
    Ok(ports)
}

/// Are these devices those of the machine now? What they are called does not count.
pub fn holds(devices: &[Element], now: &[(String, PortDevice)]) -> bool {
    let sorted = |mut all: Vec<PortDevice>| {
        all.sort_by(|a, b| a.place.cmp(&b.place));
        all
    };
    let now = now.iter().map(|(_, device)| device.clone()).collect();
    read(devices).is_ok_and(|said| sorted(said.into_iter().map(|p| p.device).collect()) == sorted(now))
}

/// A port that no document is kept of.
pub fn shown(port: &PortDevice) -> Element {
    if port.place.is_device() {
        return plugs::shown(port);
    }
    let kind = match &port.to {
        PortEnd::Stream {} => "pty",
        PortEnd::Null {} => "null",
        PortEnd::Screen {} => "vc",
        PortEnd::Agent { .. } => AGENT_OF_QEMU,
        PortEnd::Spice {} => "spicevmc",
        PortEnd::File(_) => "file",
        PortEnd::Device { .. } => "dev",
        PortEnd::Unix { .. } => "unix",
        PortEnd::Tcp { .. } => "tcp",
    };
    let on = |flag: bool| if flag { "on" } else { "off" };
    let mode = |listen: bool| if listen { "bind" } else { "connect" };
    // Of the names that documents have it is a serial port.
    let name = match &port.place {
        PortPlace::Debug {} | PortPlace::Pci { .. } => "serial",
        place => place.kind(),
    };
    let mut e = Element::new(name).with("type", kind);
    let source = || Element::new("source");
    match &port.to {
        PortEnd::Stream {} | PortEnd::Null {} | PortEnd::Screen {} | PortEnd::Spice {} => {}
        PortEnd::Agent { clipboard, mouse } => {
            let clipboard =
                Element::new("clipboard").with("copypaste", if *clipboard { "yes" } else { "no" });
            let mouse = Element::new("mouse").with("mode", if *mouse { "client" } else { "server" });
            e.push(source().child(clipboard).child(mouse));
        }
        PortEnd::File(file) => e.push(source().with("path", &file.path).with("append", on(file.append))),
        PortEnd::Device { path } => e.push(source().with("path", path)),
        PortEnd::Unix { path, listen } => e.push(source().with("mode", mode(*listen)).with("path", path)),
        PortEnd::Tcp { address, listen, telnet } => {
            let source = source().with("mode", mode(*listen)).with("host", address.ip());
            e.push(source.with("service", address.port()));
            e.push(Element::new("protocol").with("type", if *telnet { "telnet" } else { "raw" }));
        }
    }
    if let Some(log) = &port.log {
        e.push(Element::new("log").with("file", &log.path).with("append", on(log.append)));
    }
    let target = Element::new("target");
    e.push(match &port.place {
        PortPlace::Serial { number } => target.with("type", "isa-serial").with("port", number),
        PortPlace::Pci { number } => target.with("type", "pci-serial").with("port", number),
        PortPlace::Debug {} => target.with("type", "isa-debug"),
        PortPlace::Parallel { number } => target.with("port", number),
        PortPlace::Console { number } => target.with("type", "virtio").with("port", number),
        PortPlace::Channel { name } => target.with("type", "virtio").with_some("name", name.as_ref()),
        // Shown above.
        PortPlace::Redirect {} | PortPlace::Smartcard {} | PortPlace::Random {} => target,
    });
    e
}

/// The device of a port that a client names; nothing for the console of the machine.
///
/// # Errors
/// Nothing of that name.
pub fn named(ports: &[(String, PortDevice)], name: Option<&str>) -> Result<Option<String>, String> {
    let at = |place: PortPlace| ports.iter().find(|(_, p)| p.place == place).map(|(name, _)| name.clone());
    let console = at(PortPlace::Console { number: 0 });
    let serial = at(PortPlace::Serial { number: 0 }).or_else(|| at(PortPlace::Pci { number: 0 }));
    let name = match name {
        None | Some("") => return Ok(console.or(serial)),
        Some("console0") => return Ok(console.or(serial)),
        Some("serial0") => return Ok(serial),
        Some(name) => name,
    };
    let numbered = |kind: &str| name.strip_prefix(kind).and_then(|n| n.parse::<u32>().ok());
    let place = numbered("serial")
        .map(|number| PortPlace::Serial { number })
        .or_else(|| numbered("parallel").map(|number| PortPlace::Parallel { number }))
        .or_else(|| numbered("console").map(|number| PortPlace::Console { number }));
    let place = place.or_else(|| (name == "debug0").then_some(PortPlace::Debug {}));
    let channel = || at(PortPlace::Channel { name: Some(name.to_owned()) });
    let device = || ports.iter().find(|(device, _)| device == name).map(|(name, _)| name.clone());
    match place.and_then(at).or_else(channel).or_else(device) {
        Some(device) => Ok(Some(device)),
        None => Err(format!("cannot find character device {name}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml::read::document;

    fn devices(text: &str) -> Vec<Element> {
        document(&format!("<devices>{text}</devices>")).unwrap().elements().to_vec()
    }

    /// Names and keys, as one line each.
    fn of(text: &str) -> Vec<String> {
        devices(text).iter().try_for_each(check).unwrap();
        let line = |p: &Port| {
            let keys = p.device.keys().into_iter().map(|(k, v)| format!("{k}={v}"));
            format!("{}: {}", p.name, keys.collect::<Vec<_>>().join(" "))
        };
        read(&devices(text)).unwrap().iter().map(line).collect()
    }

    /// Those of libvirt's own documents that are taken.
    const TAKEN: &[(&str, &[&str])] = &[
        ("<serial type='pty'/><console type='pty'><target type='serial' port='0'/></console>", &[]),
        ("<console type='pty'/>", &[]),
        (
            "<serial type='pty'><target port='0'/></serial><serial type='file'><source path='/tmp/serial.log'/><target port='1'/></serial>",
            &["serial1: port=serial to=file number=1 path=/tmp/serial.log"],
        ),
        (
            "<serial type='file'><source path='/tmp/serial.log' append='on'/><target port='0'/></serial>\
             <console type='file'><source path='/tmp/serial.log'/><target port='0'/></console>",
            &["serial0: port=serial to=file number=0 path=/tmp/serial.log append=true"],
        ),
        (
            "<serial type='file'><source path='/tmp/s'/><log file='/var/l' append='off'/></serial>",
            &["serial0: port=serial to=file number=0 path=/tmp/s log=/var/l"],
        ),
        (
            "<serial type='dev'><source path='/dev/ttyS2'/><target port='0'/><address type='isa' iobase='0x3f8' irq='0x4'/></serial>",
            &["serial0: port=serial to=device number=0 path=/dev/ttyS2"],
        ),
        (
            "<serial type='unix'><source mode='connect' path='/tmp/a'/><target port='0'/></serial>\
             <serial type='unix'><source mode='bind' path='/tmp/b'/><target port='1'/></serial>",
            &[
                "serial0: port=serial to=unix number=0 path=/tmp/a mode=connect",
                "serial1: port=serial to=unix number=1 path=/tmp/b mode=listen",
            ],
        ),
        (
            "<serial type='tcp'><source mode='bind' host='127.0.0.1' service='9999'/><protocol type='telnet'/></serial>",
            &["serial0: port=serial to=tcp number=0 address=127.0.0.1:9999 mode=listen protocol=telnet"],
        ),
        (
            "<serial type='tcp'><source mode='connect' host='127.0.0.1' service='9999' tls='no'/><protocol type='raw'/></serial>",
            &["serial0: port=serial to=tcp number=0 address=127.0.0.1:9999 mode=connect"],
        ),
        ("<serial type='vc'/><console type='vc'/>", &["serial0: port=serial to=screen number=0"]),
        (
            "<parallel type='tcp'><source mode='bind' host='127.0.0.1' service='9999'/><target port='0'/></parallel>",
            &["parallel0: port=parallel to=tcp number=0 address=127.0.0.1:9999 mode=listen"],
        ),
        (
            "<console type='pty'><target type='serial' port='0'/></console><console type='pty'><target type='virtio' port='1'/></console>",
            &["console1: port=console to=stream number=1"],
        ),
        (
            "<console type='unix'><source mode='bind' path='/tmp/l'/><target type='virtio'/></console>\
             <console type='unix'><source mode='connect' path='/tmp/c'/><target type='virtio'/></console>",
            &[
                "console0: port=console to=unix number=0 path=/tmp/l mode=listen",
                "console1: port=console to=unix number=1 path=/tmp/c mode=connect",
            ],
        ),
        (
            "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel><channel type='unix'><target type='virtio'/></channel>\
             <channel type='unix'><target type='virtio' name='ble'/></channel>\
             <channel type='unix'><source path='/tmp/x'/><target type='virtio' name='fdsa'/></channel>",
            &[
                "channel0: port=channel to=stream",
                "channel1: port=channel to=stream name=ble",
                "channel2: port=channel to=unix name=fdsa path=/tmp/x mode=connect",
            ],
        ),
        (
            "<channel type='pty'><target type='virtio'/></channel><channel type='spicevmc'><target type='virtio'/></channel>",
            &["channel0: port=channel to=stream"],
        ),
        (
            "<serial type='pty'><target type='isa-debug'/><address type='isa' iobase='0x402'/></serial><serial type='pty'/>",
            &["debug0: port=debug to=stream"],
        ),
        (
            "<serial type='null'><target type='pci-serial' port='0'/><address type='pci' slot='0x04'/></serial>\
             <console type='null'><target type='serial' port='0'/></console>",
            &["pci-serial0: port=pci-serial to=null number=0"],
        ),
        (
            "<channel type='qemu-vdagent'><source><clipboard copypaste='yes'/><mouse mode='server'/></source>\
             <target type='virtio' name='com.redhat.spice.0'/></channel>",
            &["channel0: port=channel to=agent name=com.redhat.spice.0 clipboard=true mouse=false"],
        ),
    ];

    #[test]
    fn documents_are_read_and_what_is_shown_says_the_same() {
        for (text, wanted) in TAKEN {
            assert_eq!(of(text), *wanted, "{text}");
            let ports = read(&devices(text)).unwrap();
            let now: Vec<_> = ports.iter().map(|p| (p.name.clone(), p.device.clone())).collect();
            assert!(holds(&devices(text), &now), "{text}");
            let again: Vec<_> = ports.iter().map(|p| shown(&p.device)).collect();
            again.iter().try_for_each(check).unwrap();
            assert_eq!(read(&again).unwrap(), ports, "{text}");
            assert!(now.is_empty() || !holds(&[], &now), "{text}");
        }
    }

    #[test]
    fn what_is_not_there_is_named() {
        for (text, word) in [
            (
                "<serial type='udp'><source mode='connect' host='127.0.0.1' service='1'/></serial>",
                "serial type",
            ),
            ("<serial type='spiceport'><source channel='x'/></serial>", "serial type"),
            ("<serial type='stdio'/>", "serial type"),
            ("<serial type='pty'><target type='usb-serial'/></serial>", "serial target"),
            ("<serial type='pty'><target type='pci-serial' port='3'/></serial>", "no port 3"),
            ("<serial type='pty'><target port='4'/></serial>", "no port 4"),
            ("<serial type='pty'><address type='isa' iobase='0x300'/></serial>", "serial address"),
            ("<serial type='tcp'><source host='localhost' service='1'/></serial>", "serial source host"),
            ("<serial type='tcp'><source host='::1'/></serial>", "service"),
            ("<serial type='tcp'><source host='::1' service='1' tls='yes'/></serial>", "serial source tls"),
            (
                "<serial type='tcp'><source host='::1' service='1'/><protocol type='tls'/></serial>",
                "serial protocol",
            ),
            ("<serial type='file'/>", "source path"),
            ("<serial type='pty'/><serial type='pty'><target port='0'/></serial>", "same port"),
            ("<parallel type='dev'><source path='/dev/parport0'/></parallel>", "parallel type"),
            ("<console type='pty'/><console type='pty'/>", "the first console"),
            ("<console type='pty'><target type='xen'/></console>", "console target"),
            ("<channel type='pipe'><source path='/x'/><target type='guestfwd'/></channel>", "channel target"),
            (
                "<channel type='pty'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>",
                "for an agent",
            ),
            (
                "<channel type='unix'><target type='virtio' name='com.redhat.spice.0'/></channel>",
                "for an agent",
            ),
            ("<channel type='qemu-vdagent'><target type='virtio' name='x'/></channel>", "channel target"),
            (
                "<channel type='qemu-vdagent'><source><mouse mode='near'/></source>\
                 <target type='virtio' name='com.redhat.spice.0'/></channel>",
                "channel source mouse",
            ),
            (
                "<serial type='pty'><target type='isa-debug'/><address type='isa' iobase='0xe9'/></serial>",
                "serial address",
            ),
            (
                "<channel type='unix'><source mode='connect' path='/x'><reconnect enabled='yes'/></source><target type='virtio'/></channel>",
                "channel reconnect",
            ),
        ] {
            let all = devices(text);
            let e = all.iter().try_for_each(check).and_then(|()| read(&all).map(drop)).unwrap_err();
            assert!(e.text.contains(word), "{text}: {}", e.text);
        }
    }

    #[test]
    fn clients_name_them_as_libvirt_does() {
        let text = "<serial type='pty'/><serial type='pty'/><console type='pty'/><console type='pty'><target type='virtio' port='1'/></console>\
            <channel type='pty'><target type='virtio' name='org.x.0'/></channel>";
        let ports: Vec<_> = read(&devices(text)).unwrap().into_iter().map(|p| (p.name, p.device)).collect();
        for (name, wanted) in [
            (None, Ok(None)),
            (Some("serial0"), Ok(None)),
            (Some("console0"), Ok(None)),
            (Some("serial1"), Ok(Some("serial1"))),
            (Some("console1"), Ok(Some("console1"))),
            (Some("org.x.0"), Ok(Some("channel0"))),
            (Some("channel0"), Ok(Some("channel0"))),
            (Some("serial2"), Err(())),
        ] {
            let found = named(&ports, name);
            assert_eq!(found.as_ref().map(|f| f.as_deref()).map_err(drop), wanted, "{name:?}");
        }
        let virtio = read(&devices("<console type='pty'><target type='virtio'/></console>")).unwrap();
        let virtio: Vec<_> = virtio.into_iter().map(|p| (p.name, p.device)).collect();
        assert_eq!(named(&virtio, None), Ok(Some("console0".into())));
        assert_eq!(named(&virtio, Some("serial0")), Ok(None));
    }
}
