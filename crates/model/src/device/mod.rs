//! Devices as users write them, and their typed form: a module for each type.

mod disk;
mod disk_keys;
mod host;
mod kernel;
mod nic;
mod nic_keys;
mod nic_kind;
mod node;
mod other_keys;
mod port;
mod proxy;
mod rates;
mod share;
mod tpm;

pub use disk::*;
pub use disk_keys::DISK_KEYS;
pub use host::*;
pub use kernel::*;
pub use nic::*;
pub use nic_keys::NIC_KEYS;
pub(crate) use nic_kind::vlan_id;
pub use nic_kind::{MacvlanMode, NicKind, ParentLink, RoutedLink, nic_kinds};
pub use node::*;
pub use other_keys::DEVICE_KEYS;
pub use port::*;
pub use proxy::*;
pub use rates::{RATE_WORDS, Rate, Rates};
pub use share::*;
pub use tpm::*;

use crate::{ByteSize, Error, Result, error::nearest};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Devices by name; each a map of keys, as written.
pub type Devices = BTreeMap<String, BTreeMap<String, String>>;

/// A device, parsed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[allow(clippy::large_enum_variant)] // lives for as long as it takes to look at it
pub enum Device {
    /// Root disk: `path=/` and a pool.
    Root(RootDevice),
    /// Any other disk: a custom volume or a path of the host.
    Disk(DiskDevice),
    /// NIC.
    Nic(NicDevice),
    /// Device node of the host, or a GPU.
    Node(NodeDevice),
    /// Proxy.
    Proxy(ProxyDevice),
    /// TPM.
    Tpm(TpmDevice),
    /// Kernel that a virtual machine is started with.
    Kernel(KernelDevice),
    /// Port of a virtual machine.
    Port(PortDevice),
    /// Device of the host on USB.
    Usb(UsbHostDevice),
    /// Device of the host that somebody types or points with.
    Input(InputHostDevice),
    /// Sockets between the host and a virtual machine.
    Vsock(VsockHostDevice),
    /// Removes a device of a profile.
    None,
}

const TYPES: &[&str] = &[
    "disk",
    "gpu",
    "input",
    "kernel",
    "nic",
    "none",
    "port",
    "proxy",
    "tpm",
    "unix-block",
    "unix-char",
    "usb",
    "vsock",
];
/// What Incus has and Karst not.
const LATER: &[&str] = &["infiniband", "pci", "unix-hotplug"];

impl Device {
    /// Parses one device; errors name `devices.NAME.KEY`.
    pub fn parse(name: &str, keys: &BTreeMap<String, String>) -> Result<Self> {
        crate::Name::parse(&format!("devices.{name}"), name)?;
        let keys = Keys { name, keys };
        match keys.get("type").unwrap_or_default() {
            "disk" if keys.get("path") == Some("/") => RootDevice::parse(&keys).map(Self::Root),
            "disk" => DiskDevice::parse(&keys).map(Self::Disk),
            "nic" => NicDevice::parse(&keys).map(Self::Nic),
            "unix-char" => NodeDevice::parse_unix(&keys, false).map(Self::Node),
            "unix-block" => NodeDevice::parse_unix(&keys, true).map(Self::Node),
            "gpu" => NodeDevice::parse_gpu(&keys).map(Self::Node),
            "kernel" => KernelDevice::parse(&keys).map(Self::Kernel),
            "port" => PortDevice::parse(&keys).map(Self::Port),
            "tpm" => TpmDevice::parse(&keys).map(Self::Tpm),
            "usb" => UsbHostDevice::parse(&keys).map(Self::Usb),
            "input" => InputHostDevice::parse(&keys).map(Self::Input),
            "vsock" => VsockHostDevice::parse(&keys).map(Self::Vsock),
            "none" => Ok(Self::None),
            "proxy" => ProxyDevice::parse(&keys).map(Self::Proxy),
            later if LATER.contains(&later) => {
                let text = format!("devices of type {later:?} are not there yet");
                Err(Error::unsupported(text).at(keys.field("type")))
            }
            "" => Err(Error::invalid(
                keys.field("type"),
                format!("device {name:?} has no type; known are {}", TYPES.join(", ")),
            )),
            other => {
                let hint = nearest(other, TYPES.iter().copied())
                    .map(|n| format!("; did you mean {n:?}?"))
                    .unwrap_or_default();
                Err(Error::invalid(
                    keys.field("type"),
                    format!("devices of type {other:?} are not known{hint}"),
                ))
            }
        }
    }
}

/// The keys of one device as written, with errors that name `devices.NAME.KEY`. An empty value is as none.
#[derive(Debug, Clone, Copy)]
pub struct Keys<'a> {
    name: &'a str,
    keys: &'a BTreeMap<String, String>,
}

impl<'a> Keys<'a> {
    /// The name of a field for errors.
    pub fn field(&self, key: &str) -> String {
        format!("devices.{}.{key}", self.name)
    }

    /// A value, unless it is empty.
    pub fn get(&self, key: &str) -> Option<&'a str> {
        self.keys.get(key).map(String::as_str).filter(|v| !v.is_empty())
    }

    /// Names of the keys that have a value.
    pub fn names(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.keys.iter().filter(|(_, v)| !v.is_empty()).map(|(k, _)| k.as_str())
    }

    /// A value that is demanded; `why` completes the error.
    pub fn demand(&self, key: &str, why: &str) -> Result<&'a str> {
        self.get(key).ok_or_else(|| Error::invalid(self.field(key), why))
    }

    /// A whole number.
    pub fn number(&self, key: &str) -> Result<Option<u32>> {
        let parse = |v: &str| {
            v.parse().map_err(|_| Error::invalid(self.field(key), format!("{v:?} is not a whole number")))
        };
        self.get(key).map(parse).transpose()
    }

    /// A size.
    pub fn size(&self, key: &str) -> Result<Option<ByteSize>> {
        self.get(key).map(|v| ByteSize::parse(&self.field(key), v)).transpose()
    }

    /// A truth value; `false` when it is not there.
    pub fn boolean(&self, key: &str) -> Result<bool> {
        match self.get(key) {
            None => Ok(false),
            Some(v) => match v.to_ascii_lowercase().as_str() {
                "true" | "1" | "yes" | "on" => Ok(true),
                "false" | "0" | "no" | "off" => Ok(false),
                _ => Err(Error::invalid(self.field(key), format!("{v:?} is neither true nor false"))),
            },
        }
    }

    /// Anything that parses, with what it should have been.
    pub fn parsed<T: std::str::FromStr>(&self, key: &str, what: &str) -> Result<Option<T>> {
        let parse =
            |v: &str| v.parse().map_err(|_| Error::invalid(self.field(key), format!("{v:?} is not {what}")));
        self.get(key).map(parse).transpose()
    }

    /// One of these words.
    pub fn one_of<T: Copy>(&self, key: &str, words: &[(&str, T)]) -> Result<Option<T>> {
        let Some(v) = self.get(key) else { return Ok(None) };
        match words.iter().find(|(w, _)| *w == v) {
            Some((_, t)) => Ok(Some(*t)),
            None => {
                let known = words.iter().map(|(w, _)| *w).collect::<Vec<_>>().join(", ");
                Err(Error::invalid(self.field(key), format!("{v:?} is not known; known are {known}")))
            }
        }
    }

    /// Refuses keys that are not in `allowed`, with the nearest one that is.
    pub fn known(&self, allowed: &[&str]) -> Result<()> {
        for key in self.keys.keys() {
            if !allowed.contains(&key.as_str()) {
                let hint = match nearest(key, allowed.iter().copied()) {
                    Some(n) => format!("; did you mean {n:?}?"),
                    None => format!("; known are {}", allowed.join(", ")),
                };
                return Err(Error::invalid(
                    self.field(key),
                    format!("unknown key {key:?} of device {:?}{hint}", self.name),
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dev(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    #[test]
    fn root_and_nic() {
        assert_eq!(
            Device::parse(
                "root",
                &dev(&[("type", "disk"), ("path", "/"), ("pool", "default"), ("size", "5GiB")])
            )
            .unwrap(),
            Device::Root(RootDevice {
                pool: "default".into(),
                source: None,
                size: Some(ByteSize::gib(5)),
                boot_priority: None,
                io: DiskIo::default(),
                attached: true,
                full_copy: None,
            })
        );
        let initial = |key: &str, value: &str| {
            let keys = dev(&[("type", "disk"), ("path", "/"), ("pool", "default"), (key, value)]);
            Device::parse("root", &keys)
        };
        for (value, full) in [("true", Some(true)), ("no", Some(false)), ("", None)] {
            let root = initial("initial.full_copy", value).unwrap();
            assert!(matches!(root, Device::Root(root) if root.full_copy == full), "{value:?}");
        }
        assert!(initial("initial.full_copy", "perhaps").is_err());
        for key in ["initial.zfs.blocksize", "initial.size", "initial."] {
            let e = initial(key, "1").unwrap_err();
            assert_eq!(e.field, Some(format!("devices.root.{key}")));
            assert!(e.message.contains("initial.full_copy") && e.message.contains("volume.*"), "{e}");
        }
        let data =
            [("type", "disk"), ("path", "/data"), ("pool", "p"), ("source", "v"), ("initial.uid", "5")];
        let e = Device::parse("data", &dev(&data)).unwrap_err();
        assert!(e.message.contains("when it is created"), "{e}");
        let nic = Device::parse("eth0", &dev(&[("type", "nic"), ("nictype", "bridged"), ("parent", "br0")]))
            .unwrap();
        assert!(matches!(nic, Device::Nic(nic) if nic.network() == Some("br0")));
    }

    #[test]
    fn errors_name_the_field_and_the_fix() {
        let e = Device::parse("eth0", &dev(&[("type", "nic"), ("netwrk", "x")])).unwrap_err();
        assert_eq!(e.field.as_deref(), Some("devices.eth0.netwrk"));
        assert!(e.message.contains("did you mean \"network\""), "{e}");
        let e = Device::parse("x", &dev(&[("type", "dsk")])).unwrap_err();
        assert!(e.message.contains("\"disk\""), "{e}");
        let e = Device::parse(
            "eth0",
            &dev(&[("type", "nic"), ("network", "a"), ("hwaddr", "01:00:00:00:00:00")]),
        )
        .unwrap_err();
        assert!(e.message.contains("multicast"), "{e}");
    }

    #[test]
    fn disks_of_volumes_and_of_the_host() {
        let parse = |pairs: &[(&str, &str)]| {
            let mut keys = dev(pairs);
            keys.insert("type".into(), "disk".into());
            Device::parse("data", &keys)
        };
        let volume = parse(&[("pool", "default"), ("source", "v1"), ("path", "/data"), ("readonly", "true")]);
        let Ok(Device::Disk(disk)) = volume else { panic!("{volume:?}") };
        assert_eq!(disk.source, DiskOrigin::Volume { pool: "default".into(), volume: "v1".into() });
        assert_eq!((disk.path.as_deref(), disk.readonly), (Some("/data"), true));
        let memory = parse(&[("source", "tmpfs:"), ("path", "/x"), ("size", "1MiB")]).unwrap();
        let size = Some(ByteSize::mib(1));
        assert!(matches!(memory, Device::Disk(d) if d.source == DiskOrigin::Memory { size }));
        let host = parse(&[("source", "/srv/share"), ("path", "srv")]).unwrap();
        assert!(matches!(host, Device::Disk(d) if d.source == DiskOrigin::Host { path: "/srv/share".into() }
            && d.path.as_deref() == Some("/srv")));
        for (word, bus) in
            [("auto", None), ("virtiofs", Some(DiskBus::Virtiofs)), ("9p", Some(DiskBus::Plan9))]
        {
            let shared = parse(&[("source", "v"), ("pool", "p"), ("path", "/x"), ("io.bus", word)]).unwrap();
            assert!(matches!(shared, Device::Disk(d) if d.io.bus == bus), "{word}");
        }
        // What has a tag is a directory, and the guest's to mount.
        let tagged = parse(&[
            ("source", "/srv/share"),
            ("tag", "share"),
            ("io.bus", "9p"),
            ("share.options", "access=squash"),
        ]);
        let Ok(Device::Disk(disk)) = tagged else { panic!("{tagged:?}") };
        assert!(disk.is_directory() && disk.path.is_none() && disk.share.tag.as_deref() == Some("share"));
        assert_eq!(disk.share.options.access, Some(ShareAccess::Squash));
        let drive = |more: &[(&str, &str)]| {
            let mut keys = dev(&[("type", "disk"), ("source", "/srv/share")]);
            keys.extend(dev(more));
            host_drive(&keys).is_some()
        };
        assert!(
            drive(&[]) && drive(&[("tag", "")]) && !drive(&[("tag", "share")]) && !drive(&[("path", "/x")])
        );
        for (pairs, field) in [
            (&[("path", "/data")][..], "source"),
            (&[("source", "/srv"), ("share.options", "packed")], "share.options"),
            (&[("source", "/srv"), ("tag", "t"), ("share.options", "immediate")], "share.options"),
            (&[("source", "/srv"), ("tag", "config")], "tag"),
            (&[("source", "/srv"), ("tag", "t"), ("format", "raw")], "format"),
            (&[("source", "/srv"), ("tag", "t"), ("limits.rates", "read-bytes=5")], "limits.rates"),
            (&[("source", "relative"), ("path", "/x")], "pool"),
            (&[("source", "/a/../etc"), ("path", "/x")], "source"),
            (&[("source", "/srv"), ("path", "/a/../etc")], "path"),
            (&[("source", "v"), ("pool", "p"), ("path", "/x"), ("readonly", "maybe")], "readonly"),
            (&[("source", "v"), ("pool", "p"), ("limits.read", "fast")], "limits.read"),
            (&[("source", "/srv"), ("path", "/x"), ("propagation", "shared")], "propagation"),
            (&[("source", "/srv"), ("path", "/x"), ("propagation", "often")], "propagation"),
            (
                &[("source", "v"), ("pool", "p"), ("limits.max", "1MiB"), ("limits.read", "1MiB")],
                "limits.max",
            ),
            (&[("source", "v"), ("pool", "p"), ("io.bus", "scsi")], "io.bus"),
            (&[("source", "v"), ("pool", "p"), ("io.bus", "auto")], "io.bus"),
            (&[("source", "v"), ("pool", "p"), ("path", "/x"), ("io.bus", "virtio-fs")], "io.bus"),
            (&[("source", "v"), ("pool", "p"), ("format", "qcow2")], "format"),
            (&[("source", "/srv"), ("path", "/x"), ("media", "cdrom")], "media"),
            (&[("source", "/srv/a"), ("format", "vmdk")], "format"),
            (&[("source", "v"), ("pool", "p"), ("path", "/x"), ("size", "1GiB")], "size"),
            (&[("source", "tmpfs:")], "path"),
            (&[("source", "tmpfs:"), ("pool", "p"), ("path", "/x")], "pool"),
        ] {
            let e = parse(pairs).unwrap_err();
            assert_eq!(e.field, Some(format!("devices.data.{field}")), "{pairs:?}: {e}");
        }
    }

    #[test]
    fn nodes_of_the_host() {
        let parse = |pairs: &[(&str, &str)]| Device::parse("d", &dev(pairs));
        let fuse = parse(&[("type", "unix-char"), ("path", "/dev/fuse"), ("mode", "0600"), ("uid", "5")]);
        let Ok(Device::Node(fuse)) = fuse else { panic!("{fuse:?}") };
        assert_eq!(fuse.source, NodeOrigin::Path { block: false, path: "/dev/fuse".into() });
        assert_eq!((fuse.path.as_deref(), fuse.mode, fuse.uid, fuse.gid), (Some("/dev/fuse"), 0o600, 5, 0));
        let by_number = parse(&[("type", "unix-block"), ("path", "/dev/x"), ("major", "7"), ("minor", "0")]);
        assert!(
            matches!(by_number, Ok(Device::Node(n)) if n.source == NodeOrigin::Number { block: true, major: 7, minor: 0 })
        );
        let gpu = parse(&[("type", "gpu"), ("id", "1")]).unwrap();
        assert!(matches!(gpu, Device::Node(n) if n.source == NodeOrigin::Gpu { card: Some(1), pci: None }));
        for (pairs, field) in [
            (&[("type", "unix-char")][..], "source"),
            (&[("type", "unix-char"), ("source", "/dev/../etc/x")], "source"),
            (&[("type", "unix-char"), ("path", "/dev/x"), ("major", "7")], "minor"),
            (&[("type", "unix-char"), ("major", "7"), ("minor", "1")], "path"),
            (&[("type", "unix-char"), ("path", "/dev/x"), ("mode", "rw")], "mode"),
            (&[("type", "gpu"), ("gputype", "mig")], "gputype"),
            (&[("type", "pci")], "type"),
        ] {
            let e = parse(pairs).unwrap_err();
            assert_eq!(e.field, Some(format!("devices.d.{field}")), "{pairs:?}: {e}");
        }
    }

    #[test]
    fn rates_are_bytes_or_operations() {
        let limits = |read: &str| {
            let keys = dev(&[("limits.read", read)]);
            DiskIo::parse(&Keys { name: "d", keys: &keys }).map(|io| io.limits.read)
        };
        assert_eq!(limits("10MiB").unwrap(), Some(DiskRate::Bytes { per_second: 10 << 20 }));
        assert_eq!(limits("100iops").unwrap(), Some(DiskRate::Operations { per_second: 100 }));
        assert!(limits("0iops").is_err());
    }
}
