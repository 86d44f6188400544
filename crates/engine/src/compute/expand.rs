//! From an instance's record and its profiles to the typed specification that a host gets. Pure.

use karst_model::{
    Config, DeviceId, Error, InstanceId, Result, VolumeId,
    device::{Device, Devices, DiskDevice, DiskOrigin, NicDevice, NodeDevice, ProxyDevice, RootDevice},
    instance::{DeviceIdentity, Instance, InstanceKind},
    keys,
    network::Network,
    spec::{DiskSource, DiskSpec, GuestSpec, MachineSpec, NicSpec, NodeSpec, ProxySpec, RootSpec},
    storage::Volume,
};
use std::collections::BTreeMap;

/// First slot of root disks and NICs on the PCI bus of new virtual machines; recorded in identities, so that a later
/// change of the scheme touches new machines only.
const PCI_ROOT: u32 = 0x04;
const PCI_NIC: u32 = 0x08;

/// A parsed set of expanded devices.
#[derive(Debug, Clone)]
pub struct ParsedDevices {
    /// Name and root disk.
    pub root: (String, RootDevice),
    /// Names and other disks, in name order.
    pub disks: Vec<(String, DiskDevice)>,
    /// Names and device nodes, in name order.
    pub nodes: Vec<(String, NodeDevice)>,
    /// Names and proxies, in name order.
    pub proxies: Vec<(String, ProxyDevice)>,
    /// Names and NICs, in name order.
    pub nics: Vec<(String, NicDevice)>,
}

/// Parses expanded devices and checks what they need of each other: exactly one root disk, distinct names and addresses
/// of interfaces.
///
/// # Errors
/// Invalid, naming the device and key.
pub fn parse_devices(devices: &Devices) -> Result<ParsedDevices> {
    let mut root = None;
    let (mut disks, mut nodes, mut proxies, mut nics) = (vec![], vec![], vec![], vec![]);
    for (name, keys) in devices {
        match Device::parse(name, keys)? {
            Device::Root(d) => {
                if let Some((other, _)) = &root {
                    return Err(Error::invalid(
                        format!("devices.{name}"),
                        format!("both {other:?} and {name:?} are root disks; an instance has one"),
                    ));
                }
                root = Some((name.clone(), d));
            }
            Device::Disk(d) => disks.push((name.clone(), d)),
            Device::Nic(d) => nics.push((name.clone(), d)),
            Device::Node(d) => nodes.push((name.clone(), d)),
            Device::Proxy(d) => proxies.push((name.clone(), d)),
            Device::None => {}
        }
    }
    let mut guest_names = BTreeMap::new();
    for (device, nic) in &nics {
        let guest = nic_guest_name(device, nic);
        if let Some(other) = guest_names.insert(guest.clone(), device) {
            return Err(Error::invalid(
                format!("devices.{device}.name"),
                format!("the NICs {other:?} and {device:?} have the same interface name {guest:?}"),
            ));
        }
    }
    let mut paths = BTreeMap::new();
    let of_disks = disks.iter().filter_map(|(n, d)| Some((n, d.path.as_ref()?)));
    let of_nodes = nodes.iter().filter_map(|(n, d): &(String, NodeDevice)| Some((n, d.path.as_ref()?)));
    for (device, path) in of_disks.chain(of_nodes) {
        if let Some(other) = paths.insert(path, device) {
            return Err(Error::invalid(
                format!("devices.{device}.path"),
                format!("the devices {other:?} and {device:?} are both at {path:?}"),
            ));
        }
    }
    let root = root.ok_or_else(|| {
        Error::invalid(
            "devices",
            "the instance has no root disk; add a disk with path=/ and a pool, or a profile that has one",
        )
    })?;
    Ok(ParsedDevices { root, disks, nodes, proxies, nics })
}

fn nic_guest_name(device: &str, nic: &NicDevice) -> String {
    nic.name.clone().unwrap_or_else(|| device.to_owned())
}

/// Ids and addresses for devices that have none yet; those of devices that went away are dropped, those of devices that
/// stay are kept, also through edits of their keys.
pub fn assign_identities(
    old: &BTreeMap<String, DeviceIdentity>,
    parsed: &ParsedDevices,
    kind: InstanceKind,
    root_volume: VolumeId,
    daemon_id: &str,
    random: &mut dyn FnMut(&mut [u8]),
) -> BTreeMap<String, DeviceIdentity> {
    let mut new = BTreeMap::new();
    let uuid = |random: &mut dyn FnMut(&mut [u8])| {
        let mut b = [0u8; 16];
        random(&mut b);
        uuid::Builder::from_random_bytes(b).into_uuid()
    };
    let vm = kind == InstanceKind::VirtualMachine;
    let (root_name, _) = &parsed.root;
    new.insert(
        root_name.clone(),
        old.get(root_name).cloned().unwrap_or_else(|| DeviceIdentity {
            id: DeviceId(uuid(random)),
            slot: if vm { "virtio0".into() } else { "rootfs".into() },
            alias: if vm { "virtio-disk0".into() } else { "rootfs".into() },
            pci: vm.then(|| format!("00:{PCI_ROOT:02x}.0")),
            mac: None,
            host_interface: None,
            volume: Some(root_volume),
        }),
    );
    let mut disks = Slots::of(old, "disk");
    for (name, _) in &parsed.disks {
        let identity = old.get(name).cloned().unwrap_or_else(|| {
            let slot = disks.next();
            DeviceIdentity {
                id: DeviceId(uuid(random)),
                alias: slot.clone(),
                slot,
                pci: None,
                mac: None,
                host_interface: None,
                volume: None,
            }
        });
        new.insert(name.clone(), identity);
    }
    let mut nics = Slots::of(old, "net");
    for (name, nic) in &parsed.nics {
        let mut identity = old.get(name).cloned().unwrap_or_else(|| {
            let (slot, n) = (nics.next(), nics.last);
            let mut suffix = [0u8; 4];
            random(&mut suffix);
            DeviceIdentity {
                id: DeviceId(uuid(random)),
                alias: slot.clone(),
                slot,
                pci: vm.then(|| format!("00:{:02x}.0", PCI_NIC + n)),
                mac: None,
                host_interface: Some(host_interface(daemon_id, suffix)),
                volume: None,
            }
        });
        identity.mac = Some(match (&nic.mac, identity.mac.take()) {
            (Some(wanted), _) => wanted.clone(),
            (None, Some(kept)) => kept,
            (None, None) => {
                let mut b = [0u8; 3];
                random(&mut b);
                // 10:66:6a is the prefix that Incus registered for guests' interfaces.
                format!("10:66:6a:{:02x}:{:02x}:{:02x}", b[0], b[1], b[2])
            }
        });
        new.insert(name.clone(), identity);
    }
    new
}

/// Free numbers of a kind of slot, the lowest first; those of devices that went away may be given again.
struct Slots {
    kind: &'static str,
    used: Vec<u32>,
    last: u32,
}

impl Slots {
    fn of(old: &BTreeMap<String, DeviceIdentity>, kind: &'static str) -> Self {
        let used = old.values().filter_map(|i| i.slot.strip_prefix(kind)?.parse().ok()).collect();
        Self { kind, used, last: 0 }
    }

    fn next(&mut self) -> String {
        self.last = (0..).find(|n| !self.used.contains(n)).unwrap_or_default();
        self.used.push(self.last);
        format!("{}{}", self.kind, self.last)
    }
}

/// Name of a NIC's host interface: `k`, the daemon's short id, and a random part; 14 bytes of at most 15.
pub fn host_interface(daemon_id: &str, random: [u8; 4]) -> String {
    let part: String = random.iter().map(|b| format!("{b:02x}")).collect();
    format!("k{}{}", &daemon_id[..daemon_id.len().min(6)], &part[..7])
}

/// What [`guest_spec`] looks up.
pub struct Lookups<'a> {
    /// Managed network by name, in the instance's project.
    pub network: &'a dyn Fn(&str) -> Option<crate::Row<Network>>,
    /// Custom volume by the names of its pool and its own, in the instance's project.
    pub volume: &'a dyn Fn(&str, &str) -> Option<crate::Row<Volume>>,
}

/// The number at the end of a slot's name.
fn slot_number(slot: &str) -> Option<u32> {
    slot.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().ok()
}

/// The specification for a host.
///
/// # Errors
/// Invalid or not found, naming the key at fault.
pub fn guest_spec(
    instance: &Instance,
    config: &Config,
    devices: &Devices,
    domain_id: u32,
    lookups: &Lookups<'_>,
) -> Result<GuestSpec> {
    let parsed = parse_devices(devices)?;
    let identity = |name: &str| {
        instance.identities.get(name).ok_or_else(|| {
            Error::internal("an instance's device has no identity", format!("{}: {name}", instance.id))
        })
    };
    let (root_name, root_device) = &parsed.root;
    let root_identity = identity(root_name)?;
    let root = RootSpec {
        device: root_identity.id,
        name: root_name.clone(),
        slot: root_identity.slot.clone(),
        pool: instance.pool,
        volume: instance.root,
        io: root_device.io,
        pci: root_identity.pci.clone(),
        boot_priority: root_device.boot_priority.unwrap_or(1),
    };
    let mut disks = vec![];
    for (name, disk) in &parsed.disks {
        let id = identity(name)?;
        let source = match &disk.source {
            DiskOrigin::Host { path } => DiskSource::Host { path: path.clone() },
            DiskOrigin::Volume { pool, volume } => {
                let found = (lookups.volume)(pool, volume).ok_or_else(|| {
                    Error::not_found(format!(
                        "volume {volume:?} of device {name:?} not found in pool {pool:?}"
                    ))
                    .at(format!("devices.{name}.source"))
                })?;
                DiskSource::Volume { pool: found.pool, volume: found.id }
            }
        };
        disks.push(DiskSpec {
            device: id.id,
            name: name.clone(),
            slot: id.slot.clone(),
            source,
            path: disk.path.clone(),
            readonly: disk.readonly,
            recursive: disk.recursive,
            follow: disk.follow,
            shift: disk.shift,
            io: disk.io,
            optional: !disk.required,
            pci: id.pci.clone(),
            boot_priority: disk.boot_priority.unwrap_or(0),
        });
    }
    disks.sort_by_key(|d| slot_number(&d.slot));
    if let (Some((name, _)), InstanceKind::VirtualMachine) = (parsed.nodes.first(), instance.kind) {
        return Err(Error::unsupported("device nodes are given to containers only")
            .at(format!("devices.{name}.type")));
    }
    if let (Some((name, _)), InstanceKind::VirtualMachine) = (parsed.proxies.first(), instance.kind) {
        return Err(Error::unsupported(
            "proxies are given to containers only; forward a port of the network",
        )
        .at(format!("devices.{name}.type")));
    }
    let proxies = parsed.proxies.iter();
    let proxies = proxies.map(|(name, d)| ProxySpec { name: name.clone(), device: d.clone() }).collect();
    let nodes = parsed.nodes.iter();
    let nodes = nodes.map(|(name, d)| NodeSpec { name: name.clone(), device: d.clone() }).collect();
    let mut nics = vec![];
    for (name, nic) in &parsed.nics {
        let id = identity(name)?;
        let found = (lookups.network)(&nic.network).ok_or_else(|| {
            Error::not_found(format!("network {:?} of device {name:?} not found", nic.network))
                .at(format!("devices.{name}.network"))
        })?;
        nics.push(NicSpec {
            device: id.id,
            name: name.clone(),
            slot: id.slot.clone(),
            guest_name: nic_guest_name(name, nic),
            mac: id.mac.clone().unwrap_or_default(),
            network: found.id,
            host_interface: id.host_interface.clone().unwrap_or_default(),
            ipv4: nic.ipv4,
            mtu: nic.mtu,
            pci: id.pci.clone(),
            boot_priority: nic.boot_priority.unwrap_or(0),
        });
    }
    nics.sort_by_key(|n| slot_number(&n.slot));
    let machine = match (&instance.hardware, instance.kind) {
        (Some(h), InstanceKind::VirtualMachine) => Some(MachineSpec {
            machine: h.machine.clone(),
            cpu_model: h.cpu_model.clone(),
            firmware: h.firmware,
            uuid: h.uuid,
            accelerator: None,
        }),
        (None, InstanceKind::VirtualMachine) => {
            return Err(Error::internal("a virtual machine has no hardware record", instance.id));
        }
        _ => None,
    };
    let cloud_init_id = instance.hardware.as_ref().map_or(instance.id.uuid(), |h| h.cloud_init_id);
    Ok(GuestSpec {
        instance: instance.id,
        kind: instance.kind,
        generation: instance.generation,
        spec_version: instance.spec_version,
        hostname: instance.name.dns_label(),
        domain_id,
        machine,
        limits: keys::limits(config)?,
        security: keys::security(config)?,
        root,
        disks,
        nodes,
        proxies,
        nics,
        cloud_init: keys::cloud_init(config, cloud_init_id.to_string()),
        environment: keys::environment(config),
    })
}

/// Names a temporary id for errors about instances that are not recorded yet.
pub fn nil_instance() -> InstanceId {
    InstanceId(uuid::Uuid::nil())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices(list: &[(&str, &[(&str, &str)])]) -> Devices {
        list.iter()
            .map(|(n, kv)| (n.to_string(), kv.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()))
            .collect()
    }

    const ROOT: (&str, &[(&str, &str)]) = ("root", &[("type", "disk"), ("path", "/"), ("pool", "default")]);
    const NIC: (&str, &[(&str, &str)]) = ("eth0", &[("type", "nic"), ("network", "br0")]);

    fn counter() -> impl FnMut(&mut [u8]) {
        let mut n = 0u8;
        move |b: &mut [u8]| {
            for x in b {
                n = n.wrapping_add(1);
                *x = n;
            }
        }
    }

    #[test]
    fn one_root_is_demanded() {
        assert!(parse_devices(&devices(&[NIC])).unwrap_err().message.contains("no root disk"));
        let second = ("data", ROOT.1);
        assert!(parse_devices(&devices(&[ROOT, second])).unwrap_err().message.contains("root disks"));
        let twin = ("eth1", &[("type", "nic"), ("network", "br0"), ("name", "eth0")][..]);
        assert!(
            parse_devices(&devices(&[ROOT, NIC, twin])).unwrap_err().message.contains("same interface name")
        );
    }

    #[test]
    fn identities_survive_edits_and_slots_are_not_reused_by_order() {
        let volume = VolumeId(uuid::Uuid::from_u128(1));
        let mut random = counter();
        let both = parse_devices(&devices(&[ROOT, NIC, ("eth1", NIC.1)])).unwrap();
        let first = assign_identities(
            &BTreeMap::new(),
            &both,
            InstanceKind::VirtualMachine,
            volume,
            "abc123",
            &mut random,
        );
        assert_eq!(first["eth1"].slot, "net1");
        assert!(
            first["eth0"].host_interface.as_ref().is_some_and(|h| h.len() <= 15 && h.starts_with("kabc123"))
        );
        let one = parse_devices(&devices(&[ROOT, ("eth1", NIC.1)])).unwrap();
        let second =
            assign_identities(&first, &one, InstanceKind::VirtualMachine, volume, "abc123", &mut random);
        assert_eq!(
            second["eth1"], first["eth1"],
            "a device keeps id, slot, MAC and PCI address when another goes"
        );
        let third =
            assign_identities(&second, &both, InstanceKind::VirtualMachine, volume, "abc123", &mut random);
        assert_eq!(third["eth0"].slot, "net0");
        assert_ne!(third["eth0"].mac, first["eth0"].mac);
    }
}
