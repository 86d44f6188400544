//! From an instance's record and its profiles to the typed specification that a host gets. Pure.

use super::slots;
use karst_model::{
    Config, DeviceId, Error, InstanceId, Missing, Result, VolumeId, application,
    board::Board,
    device::{
        Device, Devices, DiskBus, DiskDevice, DiskOrigin, HostDevice, KernelDevice, NicDevice, NodeDevice,
        PortDevice, PortEnd, PortPlace, ProxyDevice, RootDevice, VIRTIO_PORTS,
    },
    instance::{DeviceIdentity, Hardware, Instance, InstanceKind},
    keys, keys_machine,
    network::Network,
    preset,
    screens::{ScreenOptions, Screens},
    signal,
    spec::{
        DiskSource, DiskSpec, GuestApi, GuestSpec, KernelSpec, LineSpec, MachineSpec, NicLink, NicSpec,
        NodeSpec, ProxySpec, RootSpec,
    },
    storage::{Volume, VolumeContent},
    threads::{self, IoThread},
};
use std::collections::BTreeMap;

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
    /// Name of the TPM.
    pub tpm: Option<String>,
    /// The secret that its state is encrypted with.
    pub tpm_secret: Option<uuid::Uuid>,
    /// Name and kernel that it is started with.
    pub kernel: Option<(String, KernelDevice)>,
    /// Names and ports, in name order.
    pub ports: Vec<(String, PortDevice)>,
    /// Names and devices of the host on USB and of input, in name order.
    pub given: Vec<(String, HostDevice)>,
}

/// Parses expanded devices and checks what they need of each other: exactly one root disk, distinct names and addresses
/// of interfaces.
///
/// # Errors
/// Invalid, naming the device and key.
pub fn parse_devices(devices: &Devices) -> Result<ParsedDevices> {
    let (mut root, mut tpm, mut kernel) = (None, None::<String>, None::<(String, KernelDevice)>);
    let (mut disks, mut nodes, mut proxies, mut nics) = (vec![], vec![], vec![], vec![]);
    let (mut ports, mut given, mut tpm_secret) = (vec![], vec![], None);
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
            Device::Port(d) => ports.push((name.clone(), d)),
            Device::Usb(d) => given.push((name.clone(), HostDevice::Usb(d))),
            Device::Input(d) => given.push((name.clone(), HostDevice::Input(d))),
            Device::Vsock(d) => {
                if given.iter().any(|(_, other)| matches!(other, HostDevice::Vsock(_))) {
                    let text = "a virtual machine has one number of sockets of the host";
                    return Err(Error::invalid(format!("devices.{name}.type"), text));
                }
                given.push((name.clone(), HostDevice::Vsock(d)));
            }
            Device::Tpm(d) => {
                tpm_secret = d.secret;
                if let Some(other) = tpm.replace(name.clone()) {
                    return Err(Error::invalid(
                        format!("devices.{name}.type"),
                        format!("both {other:?} and {name:?} are TPMs; an instance has one"),
                    ));
                }
            }
            Device::Kernel(d) => {
                if let Some((other, _)) = kernel.replace((name.clone(), d)) {
                    return Err(Error::invalid(
                        format!("devices.{name}.type"),
                        format!("both {other:?} and {name:?} are kernels; an instance is started with one"),
                    ));
                }
            }
            Device::None => {}
        }
    }
    demand_places(&ports)?;
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
    demand_tags(&disks)?;
    let root = root.ok_or_else(|| {
        Error::invalid(
            "devices",
            "the instance has no root disk; add a disk with path=/ and a pool, or a profile that has one",
        )
    })?;
    Ok(ParsedDevices { root, disks, nodes, proxies, nics, tpm, tpm_secret, kernel, ports, given })
}

/// A guest tells directories by their tags, so each has one of its own. Those without a word get their device's name.
fn demand_tags(disks: &[(String, DiskDevice)]) -> Result<()> {
    let mut tags: BTreeMap<&str, &String> = BTreeMap::new();
    for (name, disk) in disks.iter().filter(|(_, disk)| disk.is_directory()) {
        let tag = disk.share.tag.as_deref().unwrap_or(name);
        if let Some(other) = tags.insert(tag, name) {
            let of = if disk.share.tag.is_some() { name } else { other };
            let text = format!("the directories {other:?} and {name:?} have the same tag {tag:?}");
            return Err(Error::invalid(format!("devices.{of}.tag"), text));
        }
    }
    Ok(())
}

/// Each port is at a place of its own, and there are not more than QEMU has room for.
fn demand_places(ports: &[(String, PortDevice)]) -> Result<()> {
    let mut places: BTreeMap<&PortPlace, &String> = BTreeMap::new();
    for (name, port) in ports {
        if let Some(other) = places.insert(&port.place, name).filter(|_| !port.place.may_repeat()) {
            let key = match &port.place {
                PortPlace::Channel { .. } => "name",
                place if place.number().is_some() => "number",
                _ => "port",
            };
            let text = format!("the ports {other:?} and {name:?} are the same to the guest");
            return Err(Error::invalid(format!("devices.{name}.{key}"), text));
        }
    }
    let virtio: Vec<_> = ports.iter().filter(|(_, port)| port.place.is_virtio()).collect();
    match virtio.get(VIRTIO_PORTS) {
        Some((name, _)) => {
            let text = format!("a machine has {VIRTIO_PORTS} consoles and channels of virtio at most");
            Err(Error::invalid(format!("devices.{name}.port"), text))
        }
        None => Ok(()),
    }
}

/// Makes the root disk one that the instance owns: that of a copy is never the original's volume.
pub(crate) fn own_root(devices: &mut Devices) {
    for keys in devices.values_mut() {
        let is = |key: &str, value: &str| keys.get(key).is_some_and(|v| v == value);
        if is("type", "disk") && is("path", "/") {
            keys.remove("source");
        }
    }
}

fn nic_guest_name(device: &str, nic: &NicDevice) -> String {
    nic.name.clone().unwrap_or_else(|| device.to_owned())
}

/// Ids and addresses for devices that have none yet; those of devices that went away are dropped, those of devices that
/// stay are kept, also through edits of their keys. `hardware` is that of a virtual machine.
pub fn assign_identities(
    old: &BTreeMap<String, DeviceIdentity>,
    parsed: &ParsedDevices,
    hardware: Option<&Hardware>,
    root_volume: VolumeId,
    daemon_id: &str,
    random: &mut dyn FnMut(&mut [u8]),
) -> BTreeMap<String, DeviceIdentity> {
    assign_beside(old, &BTreeMap::new(), parsed, hardware, (root_volume, daemon_id), random)
}

/// The same, where places of `beside` are taken: what these devices do not have and the running guest still does.
pub(crate) fn assign_beside(
    old: &BTreeMap<String, DeviceIdentity>,
    beside: &BTreeMap<String, DeviceIdentity>,
    parsed: &ParsedDevices,
    hardware: Option<&Hardware>,
    (root_volume, daemon_id): (VolumeId, &str),
    random: &mut dyn FnMut(&mut [u8]),
) -> BTreeMap<String, DeviceIdentity> {
    let mut new = BTreeMap::new();
    let uuid = |random: &mut dyn FnMut(&mut [u8])| {
        let mut b = [0u8; 16];
        random(&mut b);
        uuid::Builder::from_random_bytes(b).into_uuid()
    };
    let (root_name, root) = &parsed.root;
    let fresh = |slot: String, pci: Option<String>, random: &mut dyn FnMut(&mut [u8])| DeviceIdentity {
        id: DeviceId(uuid(random)),
        alias: slot.clone(),
        slot,
        pci,
        mac: None,
        host_interface: None,
        volume: None,
    };
    // Devices that stay keep what they have; only what they leave free is given to others.
    let stays = |name: &str| match hardware {
        None => true,
        Some(_) => {
            let bus =
                |slot: &str, io: Option<DiskBus>| io.is_none_or(|b| slots::prefix(b) == slots::kind_of(slot));
            let slot = old.get(name).map(|i| i.slot.as_str()).unwrap_or_default();
            let shared = slots::kind_of(slot) == slots::prefix(DiskBus::Plan9);
            match parsed.disks.iter().find(|(n, _)| n == name) {
                // On another bus it is another device, and a directory is no drive.
                Some((_, disk)) => bus(slot, disk.io.bus) && shared == disk.is_directory(),
                None if name == root_name => {
                    let hidden = slots::kind_of(slot) == slots::HIDDEN;
                    if root.attached { !hidden && bus(slot, root.io.bus) } else { hidden }
                }
                None => true,
            }
        }
    };
    let named = |name: &String| {
        name == root_name
            || parsed.disks.iter().any(|(n, _)| n == name)
            || parsed.nics.iter().any(|(n, _)| n == name)
            || parsed.given.iter().any(|(n, d)| n == name && d.is_on_pci())
    };
    let kept: BTreeMap<String, DeviceIdentity> = old
        .iter()
        .filter(|(name, _)| named(name) && stays(name))
        .map(|(n, i)| (n.clone(), i.clone()))
        .collect();
    let others = beside.iter().filter(|(name, _)| !named(name)).map(|(_, identity)| identity);
    let mut free = slots::Free::of(hardware, kept.values().chain(others));
    let root_identity = kept.get(root_name).cloned().unwrap_or_else(|| {
        let (slot, pci) = match hardware {
            None => ("rootfs".into(), None),
            Some(_) if !root.attached => (free.slot(slots::HIDDEN), None),
            Some(_) => free.disk(root.io.bus.unwrap_or(DiskBus::VirtioScsi)),
        };
        DeviceIdentity { volume: Some(root_volume), ..fresh(slot, pci, random) }
    });
    new.insert(root_name.clone(), root_identity);
    for (name, disk) in &parsed.disks {
        let identity = kept.get(name).cloned().unwrap_or_else(|| {
            let (slot, pci) = match hardware {
                None => (free.slot("disk"), None),
                Some(_) if disk.is_directory() => free.share(),
                Some(_) => free.disk(disk.io.bus.unwrap_or(DiskBus::VirtioScsi)),
            };
            fresh(slot, pci, random)
        });
        new.insert(name.clone(), identity);
    }
    for (name, nic) in &parsed.nics {
        let mut identity = kept.get(name).cloned().unwrap_or_else(|| {
            let slot = free.slot("net");
            let pci = free.pci();
            let mut suffix = [0u8; 4];
            random(&mut suffix);
            let host_interface = Some(host_interface(daemon_id, suffix));
            DeviceIdentity { host_interface, ..fresh(slot, pci, random) }
        });
        identity.mac = Some(match (&nic.mac, identity.mac.take()) {
            (Some(wanted), _) => wanted.clone(),
            (None, Some(kept)) => kept,
            (None, None) => draw_mac(random),
        });
        new.insert(name.clone(), identity);
    }
    if hardware.is_some() {
        for (name, _) in parsed.given.iter().filter(|(_, d)| d.is_on_pci()) {
            let identity = kept.get(name).filter(|i| slots::kind_of(&i.slot) == GIVEN).cloned();
            let identity = identity.unwrap_or_else(|| {
                let (slot, pci) = (free.slot(GIVEN), free.pci());
                fresh(slot, pci, random)
            });
            new.insert(name.clone(), identity);
        }
    }
    new
}

/// Slots of devices of the host that a machine sees on PCI.
const GIVEN: &str = "given";

/// A MAC with the prefix that Incus registered for guests' interfaces.
pub(crate) fn draw_mac(random: &mut dyn FnMut(&mut [u8])) -> String {
    let mut b = [0u8; 3];
    random(&mut b);
    format!("10:66:6a:{:02x}:{:02x}:{:02x}", b[0], b[1], b[2])
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
    /// Managed network by its bridge's interface; none for a bridge of the host.
    pub bridge: &'a dyn Fn(&str) -> Result<Option<crate::Row<Network>>>,
    /// Custom volume by the names of its pool and its own, in the instance's project.
    pub volume: &'a dyn Fn(&str, &str) -> Option<crate::Row<Volume>>,
    /// Name of the instance's host.
    pub location: &'a str,
    /// Filters that NICs have in the instance's project whatever they say, by their keys.
    pub filters: &'a [&'a str],
}

/// What a key of a device names, by ids.
fn source(lookups: &Lookups<'_>, name: &str, key: &str, origin: &DiskOrigin) -> Result<DiskSource> {
    Ok(match origin {
        DiskOrigin::Host { path } => DiskSource::Host { path: path.clone() },
        DiskOrigin::Memory { size } => DiskSource::Memory { size: *size },
        DiskOrigin::Volume { pool, volume } => {
            let found = (lookups.volume)(pool, volume).ok_or_else(|| {
                let text = format!("volume {volume:?} of device {name:?} not found in pool {pool:?}");
                Error::missing(Missing::Volume, text).at(format!("devices.{name}.{key}"))
            })?;
            DiskSource::Volume { pool: found.pool, volume: found.id }
        }
    })
}

/// Is it a block volume that other machines may write at the same time?
fn is_shared(lookups: &Lookups<'_>, pool: &str, volume: &str) -> bool {
    (lookups.volume)(pool, volume).is_some_and(|v| v.content == VolumeContent::Block && v.is_shared())
}

fn kernel(lookups: &Lookups<'_>, name: &str, device: &KernelDevice) -> Result<KernelSpec> {
    let initrd = device.initrd.as_ref().map(|i| source(lookups, name, "initrd", i));
    Ok(KernelSpec {
        name: name.to_owned(),
        kernel: source(lookups, name, "source", &device.kernel)?,
        initrd: initrd.transpose()?,
        cmdline: device.cmdline.clone(),
    })
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
        shared: root_device
            .source
            .as_ref()
            .is_some_and(|volume| is_shared(lookups, &root_device.pool, volume)),
        io: {
            let of = root_device.source.as_ref().and_then(|v| (lookups.volume)(&root_device.pool, v));
            crate::keys::driven(root_device.io, of.as_ref().map(|row| &row.value))
        },
        pci: root_identity.pci.clone(),
        boot_priority: root_device.boot_priority.unwrap_or(1),
        detached: !root_device.attached,
    };
    if root.detached && instance.kind == InstanceKind::Container {
        return Err(Error::invalid(
            format!("devices.{root_name}.attached"),
            "a container lives in its root; virtual machines can be without it",
        ));
    }
    let stateful = keys::optional_flag(config, "migration.stateful").unwrap_or(false);
    let pc = instance.hardware.as_ref().is_some_and(|h| h.machine.starts_with("pc-i440fx-"));
    demand_bus(root_name, root_device.io.bus, pc)?;
    let mut disks = vec![];
    for (name, disk) in &parsed.disks {
        let id = identity(name)?;
        demand_bus(name, disk.io.bus, pc)?;
        match instance.kind {
            InstanceKind::VirtualMachine => super::disks::check_directory(name, disk, stateful)?,
            InstanceKind::Container => super::disks::demand_no_share(name, disk)?,
        }
        // A drive of discs stays without one; what is mounted does not.
        if !disk.attached && (instance.kind == InstanceKind::Container || disk.is_directory()) {
            continue;
        }
        let source = match &disk.source {
            DiskOrigin::Memory { .. } if instance.kind == InstanceKind::VirtualMachine => {
                let text =
                    "a virtual machine mounts file systems in memory itself; containers have such disks";
                return Err(Error::unsupported(text).at(format!("devices.{name}.source")));
            }
            other => source(lookups, name, "source", other)?,
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
            io: match &disk.source {
                DiskOrigin::Volume { pool, volume } => {
                    let of = (lookups.volume)(pool, volume);
                    crate::keys::driven(disk.io, of.as_ref().map(|row| &row.value))
                }
                DiskOrigin::Host { .. } | DiskOrigin::Memory { .. } => disk.io,
            },
            ejected: !disk.attached,
            shared: match &disk.source {
                DiskOrigin::Volume { pool, volume } => is_shared(lookups, pool, volume),
                DiskOrigin::Host { .. } | DiskOrigin::Memory { .. } => false,
            },
            optional: !disk.required,
            pci: id.pci.clone(),
            boot_priority: disk.boot_priority.unwrap_or(0),
            format: disk.format,
            media: disk.media,
            share: disk.share.clone(),
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
    let nodes = parsed.nodes.iter().map(|(name, d)| NodeSpec { name: name.clone(), device: d.clone() });
    let nodes = match instance.kind {
        InstanceKind::VirtualMachine => vec![],
        InstanceKind::Container => nodes.chain(super::given::nodes(&parsed.given)?).collect(),
    };
    let mut nics = vec![];
    for (name, nic) in parsed.nics.iter().filter(|(_, nic)| nic.attached) {
        let id = identity(name)?;
        let (link, mtu) = super::nics::link(name, nic, instance.kind, lookups)?;
        nics.push(NicSpec {
            device: id.id,
            name: name.clone(),
            slot: id.slot.clone(),
            guest_name: nic_guest_name(name, nic),
            mac: match &link {
                // It keeps its own unless it is told another.
                NicLink::Physical(_) => nic.mac.clone().unwrap_or_default(),
                _ => id.mac.clone().unwrap_or_default(),
            },
            port: {
                let interface = id.host_interface.as_deref().unwrap_or_default();
                super::nics::loose_port(&link, nic, interface, lookups.filters)
            },
            link,
            host_interface: id.host_interface.clone().unwrap_or_default(),
            ipv4: nic.ipv4,
            ipv6: nic.ipv6,
            mtu: nic.mtu.or(mtu),
            host_name: nic.host_name.clone(),
            queue_length: nic.queue_length,
            vlans: nic.vlans.clone(),
            model: nic.model,
            options: nic.options,
            disconnected: !nic.connected,
            pci: id.pci.clone(),
            boot_priority: nic.boot_priority.unwrap_or(0),
        });
    }
    nics.sort_by_key(|n| slot_number(&n.slot));
    let iothreads = threads::iothreads(config)?;
    demand_threads(instance.kind, &parsed, &iothreads)?;
    if instance.kind == InstanceKind::VirtualMachine {
        Screens::of(config)?.demand_served(config)?;
        let viewer = parsed.ports.iter().find(|(_, port)| port.to == (PortEnd::Spice {}));
        if let Some((name, _)) = viewer.filter(|_| !keys_machine::spice(config)) {
            let text = "nobody looks at the screen by SPICE; set hardware.spice=true";
            return Err(Error::invalid(format!("devices.{name}.to"), text));
        }
    }
    let machine = match (&instance.hardware, instance.kind) {
        (Some(h), InstanceKind::VirtualMachine) => Some(MachineSpec {
            machine: h.machine.clone(),
            cpu_model: h.cpu_model.clone(),
            firmware: h.firmware,
            uuid: h.uuid,
            ports: h.ports,
            display: h.display,
            spice: keys_machine::spice(config),
            screen: ScreenOptions::of(config),
            balloon: h.balloon && keys::optional_flag(config, "hardware.balloon").unwrap_or(true),
            board: Board::of(config)?,
            tpm: parsed.tpm.is_some(),
            tpm_secret: parsed.tpm_secret,
            stateful,
            boot_menu: keys::optional_flag(config, "hardware.boot_menu").unwrap_or(false),
            windows: told_of_hyper_v(config, instance),
            local_time: in_local_time(config, instance),
            ends_on_reboot: config.get("boot.reboot_action").is_some_and(|a| a == "stop"),
            halts_on_crash: config.get(keys::CRASH_ACTION).is_some_and(|a| a == "halt"),
            scsi_iothread: threads::scsi_iothread(config, &iothreads)?,
            iothreads,
            kernel: parsed.kernel.as_ref().map(|(name, k)| kernel(lookups, name, k)).transpose()?,
            strings: keys_machine::strings(config)?,
            lines: {
                let lines = parsed.ports.iter();
                lines.map(|(name, d)| LineSpec { name: name.clone(), device: d.clone() }).collect()
            },
            given: super::given::specs(&parsed.given, stateful, &identity)?,
            resume: false,
            paused: false,
            fresh_firmware: false,
            accelerator: None,
        }),
        (None, InstanceKind::VirtualMachine) => {
            return Err(Error::internal("a virtual machine has no hardware record", instance.id));
        }
        _ => None,
    };
    if let (Some((name, _)), InstanceKind::Container) = (&parsed.kernel, instance.kind) {
        let text = "containers run on the kernel of their host; virtual machines are started with others";
        return Err(Error::unsupported(text).at(format!("devices.{name}.type")));
    }
    if let (Some((name, _)), InstanceKind::Container) = (parsed.ports.first(), instance.kind) {
        let text = "ports are of virtual machines; a container has its console";
        return Err(Error::unsupported(text).at(format!("devices.{name}.type")));
    }
    if let (Some(name), InstanceKind::Container) = (&parsed.tpm, instance.kind) {
        return Err(
            Error::unsupported("TPMs are given to virtual machines only").at(format!("devices.{name}.type"))
        );
    }
    let mut security = keys::security(config)?;
    if let (Some(config), InstanceKind::Container) = (keys::guest_api(config)?, instance.kind) {
        security.guest_api = Some(GuestApi {
            name: instance.name.to_string(),
            location: lookups.location.to_owned(),
            config,
            devices: shown_devices(instance, devices),
        });
    }
    let application = match (instance.kind, instance.is_application()) {
        (InstanceKind::Container, true) => {
            let mut program = application::parse(config)?;
            let of_image = || signal::parse(instance.image_properties.get(application::STOP_SIGNAL)?);
            program.stop_signal = program.stop_signal.or_else(of_image);
            Some(program)
        }
        _ => {
            application::demand_none(config)?;
            None
        }
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
        security,
        root,
        disks,
        nodes,
        proxies,
        nics,
        cloud_init: keys::cloud_init(config, cloud_init_id.to_string()),
        files: vec![],
        environment: keys::environment(config),
        application,
        memory: None,
    })
}

/// Controllers of IDE are where there have always been such.
fn demand_bus(device: &str, bus: Option<DiskBus>, pc: bool) -> Result<()> {
    match bus {
        Some(DiskBus::Ide) if !pc => Err(Error::invalid(
            format!("devices.{device}.io.bus"),
            "machines of type pc have controllers of IDE; use sata",
        )),
        _ => Ok(()),
    }
}

/// The threads that disks name are there; those of containers are the host's own, as their drives are, which have nothing of
/// QEMU.
fn demand_threads(kind: InstanceKind, parsed: &ParsedDevices, there: &[IoThread]) -> Result<()> {
    let root = std::iter::once((&parsed.root.0, parsed.root.1.io));
    for (name, io) in root.chain(parsed.disks.iter().map(|(name, disk)| (name, disk.io))) {
        if kind == InstanceKind::Container && io.rates.is_some() {
            let text = "rates are of disks of virtual machines; a container has limits.read and limits.write";
            return Err(Error::unsupported(text).at(format!("devices.{name}.limits.rates")));
        }
        if kind == InstanceKind::Container && io.options != Default::default() {
            let text = "options are of disks of virtual machines";
            return Err(Error::unsupported(text).at(format!("devices.{name}.io.options")));
        }
        let Some(id) = io.thread else { continue };
        let field = format!("devices.{name}.io.thread");
        if kind == InstanceKind::Container {
            return Err(Error::unsupported("disks of virtual machines only have threads").at(field));
        }
        threads::demand(&field, there, id)?;
    }
    Ok(())
}

fn is_windows(config: &Config, instance: &Instance) -> bool {
    let os = config.get("image.os").or_else(|| instance.image_properties.get("image.os"));
    preset::is_windows(config, os.map(String::as_str))
}

/// Is the clock of a machine's hardware in local time, as Windows expects it and nobody else?
pub fn in_local_time(config: &Config, instance: &Instance) -> bool {
    match config.get("hardware.clock").map(String::as_str) {
        Some("localtime") => true,
        Some("utc") => false,
        _ => is_windows(config, instance),
    }
}

/// Is a machine told what Hyper-V tells its guests?
pub fn told_of_hyper_v(config: &Config, instance: &Instance) -> bool {
    keys::optional_flag(config, "hardware.hyperv").unwrap_or_else(|| is_windows(config, instance))
}

/// Devices as their guest sees them: with the addresses they got, without the paths of the host.
fn shown_devices(instance: &Instance, devices: &Devices) -> Devices {
    let mut shown = devices.clone();
    for (name, keys) in &mut shown {
        if keys.get("source").is_some_and(|s| s.starts_with('/')) {
            keys.remove("source");
        }
        if let Some(mac) = instance.identities.get(name).and_then(|i| i.mac.clone()) {
            keys.entry("hwaddr".into()).or_insert(mac);
        }
    }
    shown
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
        let machine = hardware("pc-q35-7.2", 16);
        let first = assign_identities(&BTreeMap::new(), &both, Some(&machine), volume, "abc123", &mut random);
        assert_eq!(first["eth1"].slot, "net1");
        assert!(
            first["eth0"].host_interface.as_ref().is_some_and(|h| h.len() <= 15 && h.starts_with("kabc123"))
        );
        let one = parse_devices(&devices(&[ROOT, ("eth1", NIC.1)])).unwrap();
        let second = assign_identities(&first, &one, Some(&machine), volume, "abc123", &mut random);
        assert_eq!(
            second["eth1"], first["eth1"],
            "a device keeps id, slot, MAC and PCI address when another goes"
        );
        let third = assign_identities(&second, &both, Some(&machine), volume, "abc123", &mut random);
        assert_eq!(third["eth0"].slot, "net0");
        assert_ne!(third["eth0"].mac, first["eth0"].mac);
    }

    fn hardware(machine: &str, ports: u8) -> Hardware {
        Hardware {
            machine: machine.into(),
            cpu_model: "max".into(),
            firmware: karst_model::instance::Firmware::Bios,
            ports,
            display: false,
            balloon: false,
            uuid: uuid::Uuid::nil(),
            cloud_init_id: uuid::Uuid::nil(),
        }
    }

    #[test]
    fn ports_have_places_of_their_own() {
        let port =
            |kind: &'static str, number: &'static str| [("type", "port"), ("port", kind), ("number", number)];
        let (one, two) = (port("serial", "1"), port("serial", "2"));
        let good = devices(&[ROOT, ("a", &one), ("b", &two), ("c", &port("parallel", "1"))]);
        assert_eq!(parse_devices(&good).unwrap().ports.len(), 3);
        let e = parse_devices(&devices(&[ROOT, ("a", &one), ("b", &one)])).unwrap_err();
        assert_eq!(e.field.as_deref(), Some("devices.b.number"));
        // Channels without a name are told apart by their order alone.
        let unnamed = [("type", "port"), ("port", "channel")];
        let names: Vec<String> = (0..=VIRTIO_PORTS).map(|n| format!("c{n:02}")).collect();
        let mut all = vec![ROOT];
        all.extend(names.iter().map(|name| (name.as_str(), &unnamed[..])));
        let e = parse_devices(&devices(&all)).unwrap_err();
        assert_eq!(e.field.as_deref(), Some("devices.c10.port"));
        all.pop();
        assert_eq!(parse_devices(&devices(&all)).unwrap().ports.len(), VIRTIO_PORTS);
    }

    #[test]
    fn a_directory_is_no_drive() {
        let (machine, volume) = (hardware("pc-q35-7.2", 16), VolumeId(uuid::Uuid::from_u128(1)));
        let with = |path: Option<(&'static str, &'static str)>| {
            let keys = [("type", "disk"), ("pool", "p"), ("source", "v")].into_iter().chain(path);
            devices(&[ROOT, NIC, ("data", &keys.collect::<Vec<_>>())])
        };
        let assign = |old: &BTreeMap<String, DeviceIdentity>, devices: &Devices| {
            let parsed = parse_devices(devices).unwrap();
            assign_identities(old, &parsed, Some(&machine), volume, "abc123", &mut counter())
        };
        let drive = assign(&BTreeMap::new(), &with(None));
        assert_eq!((drive["data"].slot.as_str(), drive["data"].pci.as_deref()), ("scsi1", None));
        let shared = assign(&drive, &with(Some(("path", "/mnt"))));
        assert_eq!((shared["data"].slot.as_str(), shared["data"].pci.as_deref()), ("fs0", Some("02:00.0")));
        assert_eq!(shared["eth0"], drive["eth0"]);
        let tagged = assign(&shared, &with(Some(("tag", "data"))));
        assert_eq!(tagged["data"], shared["data"], "and one that the guest mounts itself is no drive either");
        let moved = assign(&shared, &with(Some(("path", "/srv"))));
        assert_eq!(moved["data"], shared["data"], "it is the same at another place inside");
        assert_eq!(assign(&moved, &with(None))["data"].slot, "scsi1");
    }

    #[test]
    fn two_directories_have_two_tags() {
        let share = |tag: &'static str| [("type", "disk"), ("source", "/srv/a"), ("tag", tag)];
        let (one, two, named) = (share("one"), share("two"), share("c"));
        parse_devices(&devices(&[ROOT, ("a", &one), ("b", &two)])).unwrap();
        let e = parse_devices(&devices(&[ROOT, ("a", &one), ("b", &one)])).unwrap_err();
        assert_eq!(e.field.as_deref(), Some("devices.b.tag"));
        // One without a word has its device's name.
        let place = [("type", "disk"), ("source", "/srv/c"), ("path", "/c")];
        let e = parse_devices(&devices(&[ROOT, ("b", &named), ("c", &place)])).unwrap_err();
        assert_eq!(e.field.as_deref(), Some("devices.b.tag"));
    }

    #[test]
    fn what_qemu_does_for_a_disk_is_not_said_of_a_containers() {
        for (key, value) in [("limits.rates", "read-bytes=5"), ("io.options", "rotation=1")] {
            let drive = [("type", "disk"), ("pool", "p"), ("source", "v"), (key, value)];
            let parsed = parse_devices(&devices(&[ROOT, NIC, ("data", &drive)])).unwrap();
            demand_threads(InstanceKind::VirtualMachine, &parsed, &[]).unwrap();
            let e = demand_threads(InstanceKind::Container, &parsed, &[]).unwrap_err();
            assert_eq!(e.field, Some(format!("devices.data.{key}")));
        }
    }

    #[test]
    fn a_disk_on_another_bus_is_another_device_and_the_rest_stays() {
        let machine = hardware("pc-q35-7.2", 16);
        let volume = VolumeId(uuid::Uuid::from_u128(1));
        let disk = |bus: &str| {
            devices(&[
                ROOT,
                NIC,
                ("data", &[("type", "disk"), ("pool", "p"), ("source", "v"), ("io.bus", bus)]),
            ])
        };
        let assign = |old: &BTreeMap<String, DeviceIdentity>, devices: &Devices| {
            let parsed = parse_devices(devices).unwrap();
            assign_identities(old, &parsed, Some(&machine), volume, "abc123", &mut counter())
        };
        let first = assign(&BTreeMap::new(), &disk("virtio-scsi"));
        assert_eq!((first["root"].slot.as_str(), first["data"].slot.as_str()), ("scsi0", "scsi1"));
        assert_eq!(first["eth0"].pci.as_deref(), Some("01:00.0"));
        let second = assign(&first, &disk("nvme"));
        assert_eq!((second["data"].slot.as_str(), second["data"].pci.as_deref()), ("nvme0", Some("02:00.0")));
        assert_eq!((&second["root"], &second["eth0"]), (&first["root"], &first["eth0"]));
        // An earlier machine's root without a key stays on its bus.
        let mut old = first.clone();
        old.get_mut("root").unwrap().slot = "virtio0".into();
        assert_eq!(assign(&old, &disk("nvme"))["root"].slot, "virtio0");
    }
}
