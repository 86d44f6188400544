//! Ports of a virtual machine beside its console: serial and parallel ones, consoles and channels of virtio (`port`).

use super::{Keys, disk::plain_path};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// Most serial ports of the kind that machines have had always.
pub const SERIAL_PORTS: u32 = 4;
/// The same of parallel ones.
pub const PARALLEL_PORTS: u32 = 3;
/// The same of serial ones on PCI.
pub const PCI_PORTS: u32 = 3;
/// Consoles and channels of virtio beside those that each machine has.
pub const VIRTIO_PORTS: usize = 10;

/// A port, and what is behind it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortDevice {
    /// What the guest sees.
    pub place: PortPlace,
    /// What is at the other end.
    pub to: PortEnd,
    /// A file of the host that gets what the guest says, whatever is at the other end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<PortFile>,
}

/// What a guest sees of a port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum PortPlace {
    /// A serial port, from 0. The first is the machine's console unless a device says otherwise.
    Serial {
        /// Its number.
        number: u32,
    },
    /// A parallel port, from 0.
    Parallel {
        /// Its number.
        number: u32,
    },
    /// A serial port on PCI, from 0: the guest counts it after those that are always there.
    Pci {
        /// Its number.
        number: u32,
    },
    /// A console of virtio (`hvc0`), in the order of their numbers.
    Console {
        /// Its number.
        number: u32,
    },
    /// Where firmware writes what it does: bytes at the port 0x402, of which it reads nothing.
    Debug {},
    /// A channel of virtio.
    Channel {
        /// Its name in the guest, below `/dev/virtio-ports`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
    },
    /// A device on USB of who is at the other end, who speaks usbredir.
    Redirect {},
    /// A reader of smart cards, with the card of who is at the other end.
    Smartcard {},
    /// Random numbers of who is at the other end, who speaks EGD.
    Random {},
}

impl PortPlace {
    /// The word of the key `port`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Serial { .. } => "serial",
            Self::Parallel { .. } => "parallel",
            Self::Pci { .. } => "pci-serial",
            Self::Console { .. } => "console",
            Self::Debug {} => "debug",
            Self::Channel { .. } => "channel",
            Self::Redirect {} => "redirect",
            Self::Smartcard {} => "smartcard",
            Self::Random {} => "random",
        }
    }

    /// May several of a machine's be the same to its guest?
    pub fn may_repeat(&self) -> bool {
        matches!(self, Self::Channel { name: None } | Self::Redirect {} | Self::Random {})
    }

    /// Is it a device whose other end speaks of it, and no port that bytes go through?
    pub fn is_device(&self) -> bool {
        matches!(self, Self::Redirect {} | Self::Smartcard {} | Self::Random {})
    }

    /// The number, of those that have one.
    pub fn number(&self) -> Option<u32> {
        match self {
            Self::Debug {}
            | Self::Channel { .. }
            | Self::Redirect {}
            | Self::Smartcard {}
            | Self::Random {} => None,
            Self::Serial { number }
            | Self::Parallel { number }
            | Self::Pci { number }
            | Self::Console { number } => Some(*number),
        }
    }

    /// On virtio.
    pub fn is_virtio(&self) -> bool {
        matches!(self, Self::Console { .. } | Self::Channel { .. })
    }
}

/// A file of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortFile {
    /// Absolute; the host's policy grants it.
    pub path: String,
    /// What is there stays, and more is written behind it.
    pub append: bool,
}

/// What is at the other end of a port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "to", rename_all = "snake_case")]
pub enum PortEnd {
    /// Whoever attaches to it by the API; what the guest says while nobody is attached is lost.
    Stream {},
    /// Nobody.
    Null {},
    /// The machine's screen, as one of its text consoles.
    Screen {},
    /// QEMU's own side of the agent of SPICE's guests, for who is at the screen by VNC: of the channel `com.redhat.spice.0`.
    Agent {
        /// Viewers and the guest have one clipboard.
        clipboard: bool,
        /// The agent is told where the pointer is.
        mouse: bool,
    },
    /// Whoever looks at the screen by SPICE (smart cards).
    Spice {},
    /// A file of the host.
    File(PortFile),
    /// A device of the host, such as a serial port of its own.
    Device {
        /// Absolute; the host's policy grants it.
        path: String,
    },
    /// A socket of the host with a name.
    Unix {
        /// Absolute; the host's policy grants it.
        path: String,
        /// It is made and listened at; else it is there, and connected to at the start.
        listen: bool,
    },
    /// TCP.
    Tcp {
        /// Address and port; the host's policy grants it.
        address: SocketAddr,
        /// It is listened at; else it is connected to at the start.
        listen: bool,
        /// Telnet is spoken, not bare bytes.
        telnet: bool,
    },
}

impl PortEnd {
    /// The word of the key `to`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Stream {} => "stream",
            Self::Null {} => "null",
            Self::Screen {} => "screen",
            Self::Agent { .. } => "agent",
            Self::Spice {} => "spice",
            Self::File(_) => "file",
            Self::Device { .. } => "device",
            Self::Unix { .. } => "unix",
            Self::Tcp { .. } => "tcp",
        }
    }
}

/// Keys of ports, with their texts; by name.
pub const PORT_KEYS: &[(&str, &str)] = &[
    (
        "address",
        "`tcp`: address and port of the host, such as `127.0.0.1:4555`. Granted by its policy (`port_addresses`).",
    ),
    ("append", "`file`: what is there stays (false)."),
    ("clipboard", "`agent`: viewers by VNC and the guest have one clipboard (false)."),
    ("log", "A file of the host that gets what the guest says. Granted by its policy (`port_paths`)."),
    ("log.append", "What is in the log stays (false)."),
    ("mode", "`unix`, `tcp`: `listen` (the default), or `connect` at the start."),
    ("mouse", "`agent`: SPICE's agent in the guest is told where the pointer is (true)."),
    ("name", "`channel`: its name in the guest, below `/dev/virtio-ports`."),
    (
        "number",
        "`serial` (0 to 3), `pci-serial` and `parallel` (0 to 2), `console`. The serial port 0 is the machine's console unless a device has it.",
    ),
    ("path", "`file`, `device`, `unix`: a path of the host. Granted by its policy (`port_paths`)."),
    (
        "port",
        "What the guest sees: `serial`, `pci-serial`, `parallel`, `console` (of virtio), `channel` (of virtio), `debug` (what firmware writes to 0x402); or a device of who is at the other end: `redirect` (on USB, by usbredir), `smartcard`, `random` (numbers, by EGD).",
    ),
    ("protocol", "`tcp`: `raw` (the default) or `telnet`."),
    (
        "to",
        "What is at the other end: `stream` (who attaches by the API; the default), `null`, `screen`, `agent` (of the channel `com.redhat.spice.0`), `file`, `device`, `unix`, `tcp`; `spice` (who looks at the screen by it) of a `smartcard`.",
    ),
];

/// The channel of the agent of SPICE's guests.
const AGENT: &str = "com.redhat.spice.0";
const ENDS: &[&str] = &["stream", "null", "screen", "agent", "spice", "file", "device", "unix", "tcp"];

impl PortDevice {
    pub(super) fn parse(keys: &Keys<'_>) -> Result<Self> {
        let known: Vec<&str> = PORT_KEYS.iter().map(|(k, _)| *k).chain(["type"]).collect();
        keys.known(&known)?;
        let kinds = [
            ("serial", 0),
            ("parallel", 1),
            ("console", 2),
            ("channel", 3),
            ("redirect", 4),
            ("smartcard", 5),
            ("random", 6),
            ("debug", 7),
            ("pci-serial", 8),
        ];
        let kind = keys.one_of("port", &kinds)?;
        let kind = kind.ok_or_else(|| {
            Error::invalid(
                keys.field("port"),
                "say what the guest sees: serial, pci-serial, parallel, console, channel, debug, redirect, smartcard or random",
            )
        })?;
        let number = |most: u32| {
            let number = keys.number("number")?.unwrap_or(0);
            match number < most {
                true => Ok(number),
                false => Err(Error::invalid(keys.field("number"), format!("it is 0 to {}", most - 1))),
            }
        };
        let place = match kind {
            0 => PortPlace::Serial { number: number(SERIAL_PORTS)? },
            1 => PortPlace::Parallel { number: number(PARALLEL_PORTS)? },
            2 => PortPlace::Console { number: number(32)? },
            3 => PortPlace::Channel { name: channel(keys)? },
            4 => PortPlace::Redirect {},
            5 => PortPlace::Smartcard {},
            6 => PortPlace::Random {},
            7 => PortPlace::Debug {},
            _ => PortPlace::Pci { number: number(PCI_PORTS)? },
        };
        if place.number().is_none() && keys.get("number").is_some() {
            return Err(Error::invalid(
                keys.field("number"),
                "only serial and parallel ports and consoles have one",
            ));
        }
        if !matches!(place, PortPlace::Channel { .. }) && keys.get("name").is_some() {
            return Err(Error::invalid(keys.field("name"), "channels alone have a name"));
        }
        let to = end(keys)?;
        if matches!(to, PortEnd::Agent { .. })
            && place != (PortPlace::Channel { name: Some(AGENT.to_owned()) })
        {
            let text = format!("agent is at the other end of port=channel of the name {AGENT}");
            return Err(Error::invalid(keys.field("to"), text));
        }
        if matches!(place, PortPlace::Parallel { .. }) && matches!(to, PortEnd::Device { .. }) {
            let text = "parallel ports of the host are not given to guests; use a file, a socket or a stream";
            return Err(Error::unsupported(text).at(keys.field("to")));
        }
        let spoken =
            matches!(to, PortEnd::Stream {} | PortEnd::Unix { .. } | PortEnd::Tcp { telnet: false, .. });
        let viewer = to == (PortEnd::Spice {});
        if place.is_device() && !spoken && !(viewer && place == (PortPlace::Smartcard {})) {
            let text =
                "who is at the other end speaks: stream, unix and tcp are possible, and spice of a smartcard";
            return Err(Error::invalid(keys.field("to"), text));
        }
        if viewer && !place.is_device() {
            let text = "who looks at the screen by SPICE is at the other end of a smartcard; use stream";
            return Err(Error::invalid(keys.field("to"), text));
        }
        if place.is_device() && keys.get("log").is_some() {
            return Err(Error::invalid(keys.field("log"), "what is said of a device is not written down"));
        }
        let log = match keys.get("log") {
            None if keys.get("log.append").is_some() => {
                return Err(Error::invalid(keys.field("log.append"), "there is no log"));
            }
            None => None,
            Some(_) => Some(PortFile { path: path(keys, "log")?, append: keys.boolean("log.append")? }),
        };
        Ok(Self { place, to, log })
    }

    /// The keys that say it, beside its type.
    pub fn keys(&self) -> Vec<(&'static str, String)> {
        let mut all = vec![("port", self.place.kind().to_owned()), ("to", self.to.kind().to_owned())];
        all.extend(self.place.number().map(|n| ("number", n.to_string())));
        if let PortPlace::Channel { name: Some(name) } = &self.place {
            all.push(("name", name.clone()));
        }
        let mode = |listen: bool| ("mode", if listen { "listen" } else { "connect" }.to_owned());
        match &self.to {
            PortEnd::Stream {} | PortEnd::Null {} | PortEnd::Screen {} | PortEnd::Spice {} => {}
            PortEnd::Agent { clipboard, mouse } => {
                all.extend(clipboard.then(|| ("clipboard", "true".to_owned())));
                all.extend((!mouse).then(|| ("mouse", "false".to_owned())));
            }
            PortEnd::File(file) => {
                all.push(("path", file.path.clone()));
                all.extend(file.append.then(|| ("append", "true".to_owned())));
            }
            PortEnd::Device { path } => all.push(("path", path.clone())),
            PortEnd::Unix { path, listen } => all.extend([("path", path.clone()), mode(*listen)]),
            PortEnd::Tcp { address, listen, telnet } => {
                all.extend([("address", address.to_string()), mode(*listen)]);
                all.extend(telnet.then(|| ("protocol", "telnet".to_owned())));
            }
        }
        if let Some(log) = &self.log {
            all.push(("log", log.path.clone()));
            all.extend(log.append.then(|| ("log.append", "true".to_owned())));
        }
        all
    }
}

fn path(keys: &Keys<'_>, key: &str) -> Result<String> {
    let path = keys.demand(key, "a path of the host is needed here")?;
    if !path.starts_with('/') {
        return Err(Error::invalid(keys.field(key), format!("{path:?} is not an absolute path")));
    }
    plain_path(&keys.field(key), path)
}

fn channel(keys: &Keys<'_>) -> Result<Option<String>> {
    let Some(name) = keys.get("name") else { return Ok(None) };
    let good = name.len() <= 128 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if !good {
        return Err(Error::invalid(
            keys.field("name"),
            format!("{name:?} is no name of a channel: letters, digits, . _ -"),
        ));
    }
    // Those that each machine has, and what stands behind them.
    let own = ["org.qemu.guest_agent.0", AGENT];
    if name == AGENT && keys.get("to") == Some("agent") {
        return Ok(Some(name.to_owned()));
    }
    if own.contains(&name) || name.starts_with("org.linuxcontainers.") || name.starts_with("org.karst.") {
        return Err(Error::invalid(
            keys.field("name"),
            format!("the channel {name:?} is there already, for an agent"),
        ));
    }
    Ok(Some(name.to_owned()))
}

fn end(keys: &Keys<'_>) -> Result<PortEnd> {
    let kind = keys.get("to").unwrap_or("stream");
    let used: &[&str] = match kind {
        "file" => &["path", "append"],
        "device" => &["path"],
        "unix" => &["path", "mode"],
        "tcp" => &["address", "mode", "protocol"],
        "agent" => &["clipboard", "mouse"],
        _ => &[],
    };
    let of_others = ["path", "append", "mode", "address", "protocol", "clipboard", "mouse"];
    if let Some(key) = of_others.iter().find(|k| !used.contains(*k) && keys.get(k).is_some()) {
        return Err(Error::invalid(keys.field(key), format!("a port to {kind:?} has none")));
    }
    let listen =
        || Ok::<_, Error>(keys.one_of("mode", &[("listen", true), ("connect", false)])?.unwrap_or(true));
    Ok(match kind {
        "stream" => PortEnd::Stream {},
        "null" => PortEnd::Null {},
        "screen" => PortEnd::Screen {},
        "agent" => PortEnd::Agent {
            clipboard: keys.boolean("clipboard")?,
            mouse: keys.get("mouse").is_none() || keys.boolean("mouse")?,
        },
        "spice" => PortEnd::Spice {},
        "file" => PortEnd::File(PortFile { path: path(keys, "path")?, append: keys.boolean("append")? }),
        "device" => PortEnd::Device { path: path(keys, "path")? },
        "unix" => PortEnd::Unix { path: path(keys, "path")?, listen: listen()? },
        "tcp" => {
            let address: Option<SocketAddr> =
                keys.parsed("address", "an address and a port such as 127.0.0.1:4555 or [::1]:4555")?;
            let address = address.filter(|a| a.port() > 0).ok_or_else(|| {
                Error::invalid(
                    keys.field("address"),
                    "an address and a port such as 127.0.0.1:4555 are needed",
                )
            })?;
            let telnet = keys.one_of("protocol", &[("raw", false), ("telnet", true)])?.unwrap_or(false);
            PortEnd::Tcp { address, listen: listen()?, telnet }
        }
        other => {
            let text = format!("{other:?} is not known; known are {}", ENDS.join(", "));
            return Err(Error::invalid(keys.field("to"), text));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::Device;
    use super::*;
    use std::collections::BTreeMap;

    fn parse(pairs: &[(&str, &str)]) -> Result<PortDevice> {
        let mut keys: BTreeMap<_, _> = pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        keys.insert("type".into(), "port".into());
        match Device::parse("p", &keys)? {
            Device::Port(port) => Ok(port),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        assert!(PORT_KEYS.windows(2).all(|w| w[0].0 < w[1].0));
        for pairs in [
            &[("port", "serial"), ("number", "1")][..],
            &[("port", "debug"), ("to", "stream")],
            &[("port", "pci-serial"), ("number", "2"), ("to", "null")],
            &[
                ("port", "channel"),
                ("to", "agent"),
                ("name", "com.redhat.spice.0"),
                ("clipboard", "true"),
                ("mouse", "false"),
            ],
            &[("port", "parallel"), ("to", "file"), ("path", "/var/p"), ("append", "true")],
            &[("port", "redirect"), ("to", "unix"), ("path", "/run/x"), ("mode", "connect")],
            &[("port", "smartcard"), ("to", "spice")],
            &[("port", "random"), ("to", "tcp"), ("address", "127.0.0.1:708"), ("mode", "connect")],
            &[("port", "console"), ("number", "2"), ("to", "null"), ("log", "/var/l"), ("log.append", "yes")],
            &[
                ("port", "channel"),
                ("name", "org.x.0"),
                ("to", "unix"),
                ("path", "/run/x"),
                ("mode", "connect"),
            ],
            &[("port", "serial"), ("to", "tcp"), ("address", "[::1]:4555"), ("protocol", "telnet")],
            &[("port", "serial"), ("number", "3"), ("to", "device"), ("path", "/dev/ttyS0")],
            &[("port", "serial"), ("to", "screen")],
        ] {
            let port = parse(pairs).unwrap();
            let keys = port.keys();
            let again: Vec<_> = keys.iter().map(|(k, v)| (*k, v.as_str())).collect();
            assert_eq!(parse(&again).unwrap(), port, "{pairs:?}");
            assert_eq!(
                serde_json::from_str::<PortDevice>(&serde_json::to_string(&port).unwrap()).unwrap(),
                port
            );
        }
        let port = parse(&[("port", "serial"), ("to", "tcp"), ("address", "127.0.0.1:1")]).unwrap();
        assert!(matches!(port.to, PortEnd::Tcp { listen: true, telnet: false, .. }));
    }

    #[test]
    fn what_cannot_be_names_its_key() {
        for (pairs, key) in [
            (&[][..], "port"),
            (&[("port", "usb")], "port"),
            (&[("port", "serial"), ("number", "4")], "number"),
            (&[("port", "parallel"), ("number", "3")], "number"),
            (&[("port", "channel"), ("number", "1")], "number"),
            (&[("port", "serial"), ("name", "x")], "name"),
            (&[("port", "channel"), ("name", "a,b")], "name"),
            (&[("port", "channel"), ("name", "org.qemu.guest_agent.0")], "name"),
            (&[("port", "serial"), ("to", "pipe")], "to"),
            (&[("port", "serial"), ("to", "file")], "path"),
            (&[("port", "serial"), ("to", "file"), ("path", "x")], "path"),
            (&[("port", "serial"), ("to", "file"), ("path", "/a/../b")], "path"),
            (&[("port", "serial"), ("path", "/a")], "path"),
            (&[("port", "serial"), ("to", "unix"), ("path", "/a"), ("mode", "both")], "mode"),
            (&[("port", "serial"), ("to", "tcp")], "address"),
            (&[("port", "serial"), ("to", "tcp"), ("address", "localhost:1")], "address"),
            (&[("port", "serial"), ("to", "tcp"), ("address", "127.0.0.1:0")], "address"),
            (
                &[("port", "serial"), ("to", "tcp"), ("address", "127.0.0.1:1"), ("protocol", "tls")],
                "protocol",
            ),
            (&[("port", "parallel"), ("to", "device"), ("path", "/dev/parport0")], "to"),
            (&[("port", "serial"), ("log.append", "true")], "log.append"),
            (&[("port", "serial"), ("speed", "9600")], "speed"),
        ] {
            assert_eq!(parse(pairs).unwrap_err().field, Some(format!("devices.p.{key}")), "{pairs:?}");
        }
    }
}
