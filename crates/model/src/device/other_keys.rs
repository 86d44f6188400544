//! What the keys of devices mean that are neither disks nor NICs. The parsers take their lists from here.

/// A type of devices: its name, which instances have it, and its keys with their texts.
pub type DeviceKeys = (&'static str, &'static str, &'static [(&'static str, &'static str)]);

/// Type, which instances have such devices, and the keys with their texts, by name. `type` is one of each.
pub const DEVICE_KEYS: &[DeviceKeys] = &[
    (
        "gpu",
        "Containers, where `device_classes` of host-policy.toml grants `gpu`, or `gpu:PCI-ADDRESS`: the nodes of graphics cards.",
        &[
            ("gid", "Group of the nodes in the guest (0)."),
            ("gputype", "Only `physical`."),
            ("id", "Number of the card, the 0 of `/dev/dri/card0`; without it and `pci` all cards."),
            ("mode", "Permissions of the nodes in the guest (0660)."),
            ("pci", "PCI address of the card."),
            ("uid", "Owner of the nodes in the guest (0)."),
        ],
    ),
    (
        "input",
        "Virtual machines, where `device_classes` of host-policy.toml grants `input`, or `input:/dev/input/eventN`: a device of the host that somebody types or points with.",
        &[
            (
                "grab",
                "`seat`: `all` such devices go from host to guest and back together, or this `one` (the default).",
            ),
            ("io.options", "`device`: a list of `iommu`, `ats`, `packed` and `page-per-queue`."),
            ("repeat", "`seat`: keys that are held repeat (false)."),
            ("source", "The device by its path on the host, such as `/dev/input/event3`."),
            (
                "to",
                "`device` (the default): the guest sees the device itself, on virtio; `seat`: it is a part of the machine's own keyboard and pointer.",
            ),
            (
                "toggle",
                "`seat`: the keys that toggle between host and guest: `ctrl-ctrl` (the default), `alt-alt`, `shift-shift`, `meta-meta`, `scrolllock`, `ctrl-scrolllock`.",
            ),
        ],
    ),
    (
        "kernel",
        "Virtual machines: what is started in place of what the disks would boot. Its files are read at each start.",
        &[
            ("cmdline", "Command line of the kernel, at most 2047 bytes."),
            ("initrd", "Its initial file system, as `source`."),
            ("initrd.pool", "Pool of the volume that `initrd` names (that of the kernel)."),
            ("pool", "Pool of the volume that `source` names."),
            (
                "source",
                "The kernel: a custom volume that has it from its first byte on, or a file of the host that `path_prefixes` of host-policy.toml grants.",
            ),
        ],
    ),
    (
        "proxy",
        "Containers: connections are taken on one side and made on the other. A socket by a path of the host needs `path_prefixes` of host-policy.toml, one by an abstract name `proxy:@NAME` among its `device_classes`.",
        &[
            ("bind", "Which side listens: `host` (the default) or `instance`; the other one connects."),
            (
                "connect",
                "What is connected to, written as `listen`: one port for all, or as many as there are to listen at.",
            ),
            ("gid", "Group of a socket that is listened at by a path (0)."),
            (
                "listen",
                "What is listened at: `tcp:127.0.0.1:80`, `udp:[::1]:53,5353`, `tcp:0.0.0.0:8000-8010`, `unix:/run/x.sock`, `unix:@name`; at most 48 ports. Streams (`tcp`, `unix`) are passed on to streams, `udp` to `udp`.",
            ),
            ("mode", "Permissions of a socket that is listened at by a path (0644)."),
            (
                "nat",
                "Only `false`: nothing is passed on by address translation; a forward of the network is.",
            ),
            (
                "proxy_protocol",
                "Whether a server of tcp is told who connected, by the first line of the PROXY protocol (false).",
            ),
            ("security.gid", "Group that connects to a socket by its path (0)."),
            ("security.uid", "User that connects to a socket by its path (0)."),
            ("uid", "Owner of a socket that is listened at by a path (0)."),
        ],
    ),
    (
        "tpm",
        "Virtual machines: a TPM 2.0, whose state is kept with the machine.",
        &[
            (
                "encryption.secret",
                "The state is encrypted with the value of this secret of the project (its UUID); from its first start on, or not at all.",
            ),
            ("path", "None: it is Incus' key of containers, which have no TPM here."),
            ("pathrm", "None, as `path`."),
        ],
    ),
    (
        "unix-block",
        "Containers, where `device_classes` of host-policy.toml grants `unix-block`, or `unix-block:/dev/NAME`: a block device of the host.",
        NODE_KEYS,
    ),
    (
        "unix-char",
        "Containers, where `device_classes` of host-policy.toml grants `unix-char`, or `unix-char:/dev/NAME`: a character device of the host.",
        NODE_KEYS,
    ),
    (
        "usb",
        "Where `device_classes` of host-policy.toml grants `usb`, or `usb:VENDOR:PRODUCT`: a device of the host on USB. A container has the nodes of all that are meant, a virtual machine the one.",
        &[
            ("boot.priority", "Virtual machines: the higher, the earlier it is booted from."),
            ("busnum", "Number of the host's bus that it is on, with `devnum`."),
            ("devnum", "Its number there, which is another each time that it is plugged."),
            ("gid", "Containers: group of its node (0)."),
            ("mode", "Containers: permissions of its node (0660)."),
            (
                "port",
                "Virtual machines: the bus of `hardware.usb` that it is on, and its port there, such as `0:1.2`.",
            ),
            ("productid", "What it is of the vendor's, such as `c31c`."),
            ("required", "Whether the guest does not start without the device (false)."),
            ("serial", "Its serial number."),
            ("uid", "Containers: owner of its node (0)."),
            ("vendorid", "Its vendor, such as `046d`."),
        ],
    ),
    (
        "vsock",
        "Virtual machines, where `device_classes` of host-policy.toml grants `vsock`: sockets of the family AF_VSOCK, by which programs of the host and of the machine talk without a network.",
        &[(
            "cid",
            "The number by which the host reaches the machine, from 3 to 1258291199 (one of its own for each start).",
        )],
    ),
];

const NODE_KEYS: &[(&str, &str)] = &[
    ("gid", "Group of the node in the guest (0)."),
    (
        "major",
        "Major number of the device, in place of `source`; `device_classes` grants it as `TYPE:MAJOR:MINOR`.",
    ),
    ("minor", "Minor number of the device."),
    ("mode", "Permissions of the node in the guest (0660)."),
    ("path", "Where the node is in the guest (`source`)."),
    ("required", "Whether the guest does not start without the device (true)."),
    ("source", "The device by its path on the host (`path`)."),
    ("uid", "Owner of the node in the guest (0)."),
];

/// The keys that devices of a type may have.
pub(super) fn keys_of(kind: &str) -> Vec<&'static str> {
    let keys = DEVICE_KEYS.iter().find(|(name, ..)| *name == kind).map_or(&[][..], |(.., keys)| *keys);
    std::iter::once("type").chain(keys.iter().map(|(name, _)| *name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    #[test]
    fn each_type_has_the_keys_that_are_described_and_no_other() {
        let sorted = |names: Vec<&str>| names.windows(2).all(|pair| pair[0] < pair[1]);
        assert!(sorted(DEVICE_KEYS.iter().map(|(kind, ..)| *kind).collect()));
        for (kind, what, keys) in DEVICE_KEYS {
            assert!(what.ends_with('.') && sorted(keys.iter().map(|(name, _)| *name).collect()), "{kind}");
            assert!(keys.iter().all(|(_, text)| text.ends_with('.')), "{kind}");
            let parse = |key: &str| {
                let keys = [("type", *kind), (key, "x")].map(|(k, v)| (k.to_owned(), v.to_owned()));
                Device::parse("d", &keys.into())
            };
            let e = parse("nothing").unwrap_err();
            assert_eq!(e.field.as_deref(), Some("devices.d.nothing"), "{kind}: {e}");
            for (key, _) in *keys {
                let unknown = parse(key).err().is_some_and(|e| e.message.contains("unknown key"));
                assert!(!unknown, "{kind}: {key}");
            }
        }
    }
}
