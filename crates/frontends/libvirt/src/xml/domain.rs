//! Domains as XML: an instance's expanded configuration in libvirt's words.

use super::Element;
use crate::{
    calls::{
        connect::facts,
        domain::{METADATA, TITLE, is_running},
    },
    domain_id, domain_uuid,
    error::VirError,
    limits,
    session::{Call, Driver},
};
use karst_engine::{
    InstanceView,
    compute::expand::{ParsedDevices, parse_devices},
};
use karst_model::{
    device::{DiskBus, DiskOrigin, NicModel},
    instance::{DeviceIdentity, Firmware, Hardware},
    node::{AcceleratorKind, HostFacts},
};

/// A NIC with what the instance's record keeps of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// Name of the network.
    pub network: String,
    /// MAC address.
    pub mac: String,
    /// The host's interface.
    pub host_interface: String,
}

/// NICs of a guest.
///
/// # Errors
/// Invalid, when its devices are.
pub fn nics(view: &InstanceView) -> Result<Vec<Nic>, VirError> {
    let parsed = parse_devices(&view.expanded_devices)?;
    let with = |name: &str| view.instance.identities.get(name);
    Ok(parsed
        .nics
        .iter()
        .filter_map(|(name, nic)| {
            let identity = with(name)?;
            Some(Nic {
                network: nic.network.clone(),
                mac: identity.mac.clone()?,
                host_interface: identity.host_interface.clone().unwrap_or_default(),
            })
        })
        .collect())
}

/// The document of a domain; `inactive`: as it will be at the next start.
///
/// # Errors
/// Invalid, when its configuration is; those of the engine.
pub fn document(call: &Call, view: &InstanceView, inactive: bool) -> Result<String, VirError> {
    let driver = call.opened()?.driver;
    let live = is_running(view) && !inactive;
    let (facts, limits) = (facts(call)?, limits::of(view)?);
    let parsed = parse_devices(&view.expanded_devices)?;
    let instance = &view.instance;
    let config = &instance.config;
    let kind = match (driver, view.runtime.as_ref().and_then(|r| r.accelerator.as_deref())) {
        (Driver::Lxc, _) => "lxc",
        (Driver::Qemu, Some("kvm")) => "kvm",
        (Driver::Qemu, None) if facts.accelerator.kind == AcceleratorKind::Kvm => "kvm",
        (Driver::Qemu, _) => "qemu",
    };
    let mut e = Element::new("domain")
        .with("type", kind)
        .with_some("id", Some(domain_id(view)).filter(|_| live))
        .child(Element::text("name", &instance.name))
        .child(Element::text("uuid", domain_uuid(view)));
    if let Some(title) = config.get(TITLE) {
        e.push(Element::text("title", title));
    }
    if !instance.description.is_empty() {
        e.push(Element::text("description", &instance.description));
    }
    if config.keys().any(|k| k.starts_with(METADATA)) {
        // What applications keep there is shown by its own call; here that there is some.
        e.push(Element::new("metadata"));
    }
    let (memory, cpus) = (limits.memory_kib(call)?, limits.cpus(call)?);
    e.push(Element::text("memory", memory).with("unit", "KiB"));
    e.push(Element::text("currentMemory", memory).with("unit", "KiB"));
    e.push(
        Element::text("vcpu", cpus)
            .with("placement", "static")
            .with_some("cpuset", limits.pinned().map(ranges)),
    );
    match (driver, &instance.hardware) {
        (Driver::Qemu, Some(hardware)) => machine(&mut e, hardware, &facts, &parsed, view, live),
        _ => container(&mut e, &facts, &parsed, view, live),
    }
    Ok(e.document())
}

/// `0,1,2,5` as `0-2,5`.
fn ranges(cpus: &[u32]) -> String {
    let mut parts: Vec<(u32, u32)> = vec![];
    for cpu in cpus {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == *cpu => *last = *cpu,
            _ => parts.push((*cpu, *cpu)),
        }
    }
    let one = |(a, b): &(u32, u32)| if a == b { a.to_string() } else { format!("{a}-{b}") };
    parts.iter().map(one).collect::<Vec<_>>().join(",")
}

fn ends(e: &mut Element) {
    e.push(Element::new("clock").with("offset", "utc"));
    e.push(Element::text("on_poweroff", "destroy"));
    e.push(Element::text("on_reboot", "restart"));
    e.push(Element::text("on_crash", "destroy"));
}

fn machine(
    e: &mut Element,
    hardware: &Hardware,
    facts: &HostFacts,
    parsed: &ParsedDevices,
    view: &InstanceView,
    live: bool,
) {
    let kind = Element::text("type", "hvm")
        .with("arch", &view.instance.architecture)
        .with("machine", &hardware.machine);
    let mut os = Element::new("os");
    if hardware.firmware != Firmware::Bios {
        os = os.with("firmware", "efi");
    }
    os.push(kind);
    if hardware.firmware != Firmware::Bios {
        let secure = if hardware.firmware == Firmware::UefiSecure { "yes" } else { "no" };
        let feature = Element::new("feature").with("enabled", secure).with("name", "secure-boot");
        os.push(Element::new("firmware").child(feature));
    }
    os.push(Element::new("boot").with("dev", "hd"));
    e.push(os);
    e.push(Element::new("features").child(Element::new("acpi")).child(Element::new("apic")));
    e.push(match hardware.cpu_model.as_str() {
        "host" => Element::new("cpu")
            .with("mode", "host-passthrough")
            .with("check", "none")
            .with("migratable", "on"),
        "max" => Element::new("cpu").with("mode", "maximum").with("check", "none").with("migratable", "on"),
        model => Element::new("cpu")
            .with("mode", "custom")
            .with("match", "exact")
            .with("check", "none")
            .child(Element::text("model", model).with("fallback", "forbid")),
    });
    ends(e);
    let mut devices = Element::new("devices");
    devices.push(Element::text("emulator", format!("/usr/bin/qemu-system-{}", facts.architecture)));
    let of = |name: &str| view.instance.identities.get(name);
    let (root, device) = &parsed.root;
    if let Some(identity) = of(root) {
        let source = Some((device.pool.clone(), view.instance.name.to_string()));
        let bus = device.io.bus.unwrap_or(DiskBus::VirtioScsi);
        devices.push(disk(identity, source, bus, false, live));
    }
    for (name, device) in &parsed.disks {
        let (Some(identity), DiskOrigin::Volume { pool, volume }) = (of(name), &device.source) else {
            continue;
        };
        let source = Some((pool.clone(), volume.clone())).filter(|_| device.attached);
        let bus = device.io.bus.unwrap_or(DiskBus::VirtioScsi);
        devices.push(disk(identity, source, bus, device.readonly, live));
    }
    for (name, nic) in parsed.nics.iter().filter(|(_, nic)| nic.attached) {
        let Some(identity) = of(name) else { continue };
        let model = match nic.model {
            NicModel::Virtio => "virtio",
            NicModel::E1000e => "e1000e",
        };
        let mut i = interface(identity, &nic.network, live).child(Element::new("model").with("type", model));
        if !nic.connected {
            i.push(Element::new("link").with("state", "down"));
        }
        if let Some(mtu) = nic.mtu {
            i.push(Element::new("mtu").with("size", mtu));
        }
        devices.push(addressed(i, identity, live));
    }
    devices.push(
        Element::new("serial").with("type", "pty").child(
            Element::new("target")
                .with("type", "isa-serial")
                .with("port", 0)
                .child(Element::new("model").with("name", "isa-serial")),
        ),
    );
    devices.push(
        Element::new("console")
            .with("type", "pty")
            .child(Element::new("target").with("type", "serial").with("port", 0)),
    );
    devices.push(
        Element::new("channel")
            .with("type", "unix")
            .child(Element::new("target").with("type", "virtio").with("name", "org.qemu.guest_agent.0")),
    );
    devices.push(
        Element::new("rng")
            .with("model", "virtio")
            .child(Element::text("backend", "/dev/urandom").with("model", "random")),
    );
    e.push(devices);
}

fn container(e: &mut Element, facts: &HostFacts, parsed: &ParsedDevices, view: &InstanceView, live: bool) {
    let kind = Element::text("type", "exe").with("arch", &facts.architecture);
    e.push(Element::new("os").child(kind).child(Element::text("init", "/sbin/init")));
    ends(e);
    let mut devices = Element::new("devices");
    devices.push(Element::text("emulator", "/usr/bin/lxc-start"));
    let volume = |pool: &str, volume: &str, path: &str, readonly: bool| {
        let mut f = Element::new("filesystem")
            .with("type", "volume")
            .with("accessmode", "mapped")
            .child(Element::new("source").with("pool", pool).with("volume", volume))
            .child(Element::new("target").with("dir", path));
        if readonly {
            f.push(Element::new("readonly"));
        }
        f
    };
    devices.push(volume(&parsed.root.1.pool, &view.instance.name, "/", false));
    for (_, device) in parsed.disks.iter().filter(|(_, d)| d.attached) {
        if let (DiskOrigin::Volume { pool, volume: name }, Some(path)) = (&device.source, &device.path) {
            devices.push(volume(pool, name, path, device.readonly));
        }
    }
    for (name, nic) in parsed.nics.iter().filter(|(_, nic)| nic.attached) {
        let Some(identity) = view.instance.identities.get(name) else { continue };
        let guest = nic.name.as_ref().unwrap_or(name);
        let i = interface(identity, &nic.network, live).child(Element::new("guest").with("dev", guest));
        devices.push(i);
    }
    devices.push(
        Element::new("console")
            .with("type", "pty")
            .child(Element::new("target").with("type", "lxc").with("port", 0)),
    );
    e.push(devices);
}

/// Name of a disk in a guest's words, such as `sda`, by its slot.
fn target(slot: &str, bus: DiskBus) -> (String, &'static str) {
    let at = slot.find(|c: char| c.is_ascii_digit()).unwrap_or(slot.len());
    let n: u8 = slot[at..].parse().unwrap_or(0);
    let letter = |n: u8| {
        let tail = char::from(b'a' + n % 26);
        match n / 26 {
            0 => tail.to_string(),
            more => format!("{}{tail}", char::from(b'a' + (more - 1) % 26)),
        }
    };
    match bus {
        DiskBus::VirtioBlk => (format!("vd{}", letter(n)), "virtio"),
        DiskBus::Sata => (format!("sd{}", letter(n)), "sata"),
        DiskBus::Nvme => (format!("nvme{n}n1"), "nvme"),
        _ => (format!("sd{}", letter(n)), "scsi"),
    }
}

fn disk(
    identity: &DeviceIdentity,
    source: Option<(String, String)>,
    bus: DiskBus,
    readonly: bool,
    live: bool,
) -> Element {
    let (dev, bus) = target(&identity.slot, bus);
    let mut e = Element::new("disk").with("type", "volume").with("device", "disk");
    e.push(Element::new("driver").with("name", "qemu"));
    if let Some((pool, volume)) = source {
        e.push(Element::new("source").with("pool", pool).with("volume", volume));
    }
    e.push(Element::new("target").with("dev", dev).with("bus", bus));
    if readonly {
        e.push(Element::new("readonly"));
    }
    e.push(Element::text("serial", identity.id));
    addressed(e, identity, live)
}

fn interface(identity: &DeviceIdentity, network: &str, live: bool) -> Element {
    let mut e = Element::new("interface").with("type", "network");
    e.push(Element::new("mac").with("address", identity.mac.as_deref().unwrap_or_default()));
    e.push(
        Element::new("source").with("network", network).with_some("bridge", Some(network).filter(|_| live)),
    );
    if let Some(name) = identity.host_interface.as_deref().filter(|_| live) {
        e.push(Element::new("target").with("dev", name));
    }
    e
}

/// With alias and address.
fn addressed(mut e: Element, identity: &DeviceIdentity, live: bool) -> Element {
    if live {
        e.push(Element::new("alias").with("name", &identity.alias));
    }
    if let Some((bus, slot, function)) = identity.pci.as_deref().and_then(pci) {
        e.push(
            Element::new("address")
                .with("type", "pci")
                .with("domain", "0x0000")
                .with("bus", format!("0x{bus:02x}"))
                .with("slot", format!("0x{slot:02x}"))
                .with("function", format!("0x{function:x}")),
        );
    }
    e
}

/// `03:00.0` as numbers.
fn pci(address: &str) -> Option<(u8, u8, u8)> {
    let (bus, rest) = address.split_once(':')?;
    let (slot, function) = rest.split_once('.')?;
    let number = |s| u8::from_str_radix(s, 16).ok();
    Some((number(bus)?, number(slot)?, number(function)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_cpus() {
        assert_eq!(ranges(&[0, 1, 2, 5]), "0-2,5");
        assert_eq!(ranges(&[]), "");
    }

    #[test]
    fn names_of_disks() {
        assert_eq!(target("scsi0", DiskBus::VirtioScsi), ("sda".to_owned(), "scsi"));
        assert_eq!(target("virtio1", DiskBus::VirtioBlk), ("vdb".to_owned(), "virtio"));
        assert_eq!(target("scsi27", DiskBus::VirtioScsi), ("sdab".to_owned(), "scsi"));
        assert_eq!(pci("03:00.0"), Some((3, 0, 0)));
        assert_eq!(pci("x"), None);
    }
}
