//! From an instance to domain XML, with what was kept of the document that it was defined by.

use super::{
    Kernel, Opaque, ShownGuard, Source, aliases, board, hostdevs, iotune, kept, layers, nodes, options,
    owned, parts, pci_of, places,
    places::Places,
    ports, priority, processor, read, screens, scsi, shares,
    sizes::{self, Cpus},
    sysinfo, target, tuning,
};
use crate::{
    calls::domain::{METADATA, OPAQUE, TITLE},
    error::VirError,
    xml::{Element, encryption, is_prefix, nwfilter},
};
use karst_engine::{
    InstanceView,
    compute::expand::{in_local_time, parse_devices, told_of_hyper_v},
    screens::ScreenListener,
};
use karst_model::{
    Config,
    board::{Board, Rng},
    device::{
        DISK_CACHES, DRIVE_FORMATS, Devices, DiskBus, DiskDevice, DiskIo, DiskOrigin, DriveFormat,
        HostDevice, NIC_MODELS, NicDevice, NicKind, NicModel, PortPlace, Rates,
    },
    display::DisplayProtocol,
    instance::{DeviceIdentity, Firmware, Hardware},
    keys::optional_flag,
    network_ports::RateMore,
};

/// A machine that is shown.
pub struct Shown<'a> {
    /// The instance.
    pub view: &'a InstanceView,
    /// Its hardware.
    pub hardware: &'a Hardware,
    /// Keys and devices: those that it runs with, or those of its next start.
    pub config: &'a Config,
    /// Its devices.
    pub devices: &'a Devices,
    /// `kvm` or `qemu`.
    pub kind: &'static str,
    /// Its number, when it runs.
    pub id: Option<i32>,
    /// Memory in KiB, which is set aside for it.
    pub memory: u64,
    /// What its balloon leaves it of that, KiB.
    pub current: u64,
    /// CPUs.
    pub cpus: Cpus,
    /// CPUs of the host that it is pinned to.
    pub pinned: Option<String>,
    /// Its screen is there by SPICE too.
    pub spice: bool,
    /// Where its screens are to listen, and how they are served.
    pub places: Places,
    /// What listens of one that runs.
    pub listeners: Option<&'a [ScreenListener]>,
    /// The password of its screen, if it has one.
    pub guard: Option<ShownGuard>,
    /// The layers of the volume of this pool and name, lowest first.
    pub layers: &'a dyn Fn(&str, &str) -> Vec<String>,
    /// Is the volume of this pool and name a disc?
    pub disc: &'a dyn Fn(&str, &str) -> bool,
    /// The bridge of the network of this name.
    pub bridge: &'a dyn Fn(&str) -> String,
}

/// The order in which libvirt writes what is in a domain.
const DOMAIN: &[&str] = &[
    "name",
    "uuid",
    "genid",
    "title",
    "description",
    "metadata",
    "maxMemory",
    "memory",
    "currentMemory",
    "blkiotune",
    "memtune",
    "memoryBacking",
    "vcpu",
    "vcpus",
    "iothreads",
    "iothreadids",
    "defaultiothread",
    "cputune",
    "numatune",
    "resource",
    "sysinfo",
    "os",
    "idmap",
    "features",
    "cpu",
    "clock",
    "on_poweroff",
    "on_reboot",
    "on_crash",
    "on_lockfailure",
    "pm",
    "perf",
    "devices",
    "seclabel",
];
/// The same of devices.
const DEVICES: &[&str] = &[
    "emulator",
    "disk",
    "controller",
    "filesystem",
    "interface",
    "smartcard",
    "serial",
    "parallel",
    "console",
    "channel",
    "input",
    "tpm",
    "graphics",
    "audio",
    "sound",
    "video",
    "hostdev",
    "redirdev",
    "redirfilter",
    "hub",
    "watchdog",
    "memballoon",
    "rng",
    "panic",
    "iommu",
    "vsock",
    "memory",
];
/// The same of what is in a disk.
const DISK: &[&str] = &[
    "driver",
    "auth",
    "source",
    "backingStore",
    "mirror",
    "geometry",
    "blockio",
    "target",
    "iotune",
    "readonly",
    "shareable",
    "transient",
    "serial",
    "wwn",
    "vendor",
    "product",
    "encryption",
    "boot",
    "alias",
    "address",
];
/// The same of what is in an interface.
const INTERFACE: &[&str] = &[
    "mac",
    "source",
    "ip",
    "bandwidth",
    "target",
    "port",
    "guest",
    "model",
    "driver",
    "backend",
    "filterref",
    "boot",
    "coalesce",
    "link",
    "mtu",
    "alias",
    "rom",
    "address",
];

pub(super) fn sort(e: &mut Element, order: &[&str]) {
    let place = |name: &str| order.iter().position(|o| *o == name).unwrap_or(order.len());
    e.elements_mut().sort_by_key(|c| place(c.name()));
}

/// The document.
///
/// # Errors
/// Invalid, when its configuration is.
pub fn document(shown: &Shown<'_>) -> Result<String, VirError> {
    let instance = &shown.view.instance;
    let opaque = shown.config.get(OPAQUE).map(|t| Opaque::parse(t)).unwrap_or_default();
    let mut e = Element::new("domain")
        .with("type", shown.kind)
        .with_some("id", shown.id)
        .child(Element::text("name", &instance.name))
        .child(Element::text("uuid", shown.hardware.uuid));
    if let Some(title) = shown.config.get(TITLE) {
        e.push(Element::text("title", title));
    }
    if !instance.description.is_empty() {
        e.push(Element::text("description", &instance.description));
    }
    e.push_some(metadata(shown.config));
    let on_board = Board::of(shown.config)?;
    let told = on_board.features.unwrap_or_default();
    e.push(Element::text("memory", shown.memory).with("unit", "KiB"));
    e.push(Element::text("currentMemory", shown.current).with("unit", "KiB"));
    e.push(sizes::shown(shown.cpus, shown.pinned.as_ref(), on_board.placement.cpu));
    tuning::show(&mut e, shown.config, &on_board, &opaque.domain)?;
    let mut os = system(shown, &opaque);
    menu(&mut os, shown.config, &on_board)?;
    // Of one who has nothing told it is shown as it was written.
    let uuid = shown.hardware.uuid.to_string();
    let said = opaque.domain.iter().find(|e| e.name() == "sysinfo");
    let silent = said.is_none_or(|e| sysinfo::read(e, Some(&uuid)).is_ok_and(|all| all.is_empty()));
    if !(silent && on_board.smbios.is_empty()) {
        sysinfo::show_told(&mut os, !on_board.smbios.is_empty());
    }
    start_with(&mut os, kernel(shown)?);
    e.push(os);
    let hyper_v = told_of_hyper_v(shown.config, instance);
    let mut features = Element::new("features").child(Element::new("acpi")).child(Element::new("apic"));
    if hyper_v {
        let on = |name: &&'static str| Element::new(*name).with("state", "on");
        features.push(Element::new("hyperv").with("mode", "custom").children(kept::HYPER_V.iter().map(on)));
    }
    parts::show_features(&mut features, &told);
    e.push(features);
    let mut cpu = processor::shown(&shown.hardware.cpu_model);
    board::show_layout(&mut cpu, &on_board);
    e.push(cpu);
    crate::xml::domain::ends(&mut e, shown.config);
    let local_time = in_local_time(shown.config, instance);
    if local_time && let Some(clock) = e.elements_mut().iter_mut().find(|c| c.name() == "clock") {
        clock.set("offset", "localtime");
    }
    if let Some(clock) = e.elements_mut().iter_mut().find(|c| c.name() == "clock") {
        board::show_clock(clock, &board::Clock::of(&on_board));
    }
    let of = |name: &str| opaque.domain.iter().find(|e| e.name() == name);
    let model = shown.config.get("hardware.cpu.model").filter(|m| !m.is_empty());
    let old = of("os").is_some_and(read::is_old);
    // What says something of the processor is shown as it was where all of it together still holds.
    let same_model =
        processor::read(of("cpu"), of("features"), of("clock"), old).is_ok_and(|m| m.as_ref() == model);
    for kept in &opaque.domain {
        let still = match kept.name() {
            "os" => continue,
            "vcpu" | "currentMemory" => false,
            "vcpus" => sizes::still(kept, shown.cpus),
            // Shown already, as the keys say.
            name if tuning::ELEMENTS.contains(&name) => false,
            "features" => {
                let same = parts::features(kept).is_ok_and(|f| f == parts::said_by_features(&told));
                same_model && same && kept::asks_for_hyper_v(kept) == hyper_v
            }
            "clock" => {
                let same = (kept.attribute("offset") == Some("localtime")) == local_time;
                let clock = board::clock(kept).is_ok_and(|c| c == board::Clock::of(&on_board));
                same_model && same && clock && board::hpet(kept) == on_board.hpet
            }
            "cpu" => {
                let now = (on_board.topology, on_board.numa.clone());
                let cells = nodes::cells(kept).is_ok_and(|cells| cells == nodes::cells_of(&on_board));
                same_model && cells && board::layout(kept, shown.cpus.most).is_ok_and(|layout| layout == now)
            }
            "maxMemory" => nodes::slots(kept).is_ok_and(|room| Some(room) == on_board.slots),
            "defaultiothread" => nodes::main_pool(kept).is_ok_and(|pool| pool == on_board.main_pool),
            // One that is not told says what it likes.
            "sysinfo" => {
                let told = sysinfo::is_told(of("os"));
                let said = sysinfo::read(kept, Some(&uuid)).unwrap_or_default();
                if told { said == on_board.smbios } else { on_board.smbios.is_empty() }
            }
            "genid" => board::generation(kept).is_ok_and(|g| Some(g) == on_board.generation),
            "memoryBacking" => {
                board::backing(kept) == on_board.memory && nodes::pages(kept) == nodes::pages_of(&on_board)
            }
            "pm" => board::sleep(kept) == (on_board.sleeps, on_board.hibernates),
            // Which of the others it says makes no difference to what happens.
            "on_reboot" => {
                (kept.body().trim() == "destroy") == crate::xml::domain::ends_on_reboot(shown.config)
            }
            "on_crash" => kept.body().trim() == crate::xml::domain::on_crash(shown.config),
            _ => true,
        };
        if still {
            e.elements_mut().retain(|g| g.name() != kept.name());
            e.push(kept.clone());
        }
    }
    let said = |name: &str| e.find(name).is_some();
    let (genid, pm, backing, room) = (said("genid"), said("pm"), said("memoryBacking"), said("maxMemory"));
    let (pool, told) = (said("defaultiothread"), said("sysinfo"));
    board::show_domain(
        &mut e,
        &Board {
            generation: on_board.generation.filter(|_| !genid),
            sleeps: on_board.sleeps && !pm,
            hibernates: on_board.hibernates && !pm,
            memory: on_board.memory.filter(|_| !backing),
            slots: on_board.slots.filter(|_| !room),
            main_pool: on_board.main_pool.filter(|_| !pool),
            smbios: if told { Default::default() } else { on_board.smbios.clone() },
            numa_memory: if backing { vec![] } else { on_board.numa_memory.clone() },
            ..on_board.clone()
        },
    );
    e.push(devices(shown, &opaque, &on_board)?);
    if shares::want_shared_memory(&parse_devices(shown.devices)?) && !shares::memory_is_shared(&on_board) {
        shares::show_shared_memory(&mut e);
    }
    sort(&mut e, DOMAIN);
    Ok(e.document())
}

/// What applications keep in it.
pub fn metadata(config: &Config) -> Option<Element> {
    let mut all = Element::new("metadata");
    for (key, value) in config {
        let Some(uri) = key.strip_prefix(METADATA) else { continue };
        let (prefix, text) = value.split_once('\n').unwrap_or(("", value));
        // What is not XML was not written by libvirt's clients.
        let Ok(e) = crate::xml::read::document(text) else { continue };
        all.push(match prefix {
            // Nor was this: it would not be one in the document.
            prefix if !prefix.is_empty() && !is_prefix(prefix) => continue,
            "" => e.with("xmlns", uri),
            prefix => with_prefix(e, prefix).with(format!("xmlns:{prefix}"), uri),
        });
    }
    (!all.elements().is_empty()).then_some(all)
}

fn with_prefix(mut e: Element, prefix: &str) -> Element {
    let name = format!("{prefix}:{}", e.name());
    if !e.elements().is_empty() {
        let inner = std::mem::take(e.elements_mut());
        *e.elements_mut() = inner.into_iter().map(|i| with_prefix(i, prefix)).collect();
    }
    e.renamed(name)
}

fn system(shown: &Shown<'_>, opaque: &Opaque) -> Element {
    let kept = opaque.domain.iter().find(|e| e.name() == "os");
    let old = kept.is_some_and(read::is_old) && processor::is_of_32_bits(&shown.hardware.cpu_model);
    let kind = Element::text("type", "hvm")
        .with("arch", if old { "i686" } else { &shown.view.instance.architecture })
        .with("machine", &shown.hardware.machine);
    if let Some(kept) = kept.filter(|k| read::firmware(k).is_ok_and(|f| f == shown.hardware.firmware)) {
        let mut os = kept.clone();
        os.elements_mut().retain(|e| e.name() != "type");
        os.elements_mut().insert(0, kind);
        return os;
    }
    let mut os = Element::new("os");
    if shown.hardware.firmware != Firmware::Bios {
        os.set("firmware", "efi");
    }
    os.push(kind);
    if shown.hardware.firmware != Firmware::Bios {
        let secure = if shown.hardware.firmware == Firmware::UefiSecure { "yes" } else { "no" };
        let feature = Element::new("feature").with("enabled", secure).with("name", "secure-boot");
        os.push(Element::new("firmware").child(feature));
    }
    // Kinds of devices, or numbers at the devices: never both.
    let numbered = shown.devices.values().any(|d| d.contains_key("boot.priority"));
    if kept.is_none() && !numbered {
        os.push(Element::new("boot").with("dev", "hd"));
    }
    os
}

/// What it is started with in place of what its disks would boot.
fn kernel(shown: &Shown<'_>) -> Result<Option<Kernel>, VirError> {
    let source = |origin: &DiskOrigin| match origin {
        DiskOrigin::Volume { pool, volume } => {
            Some(Source::Volume { pool: pool.clone(), volume: volume.clone() })
        }
        DiskOrigin::Host { path } => Some(Source::Path(path.clone())),
        DiskOrigin::Memory { .. } => None,
    };
    Ok(parse_devices(shown.devices)?.kernel.and_then(|(_, device)| {
        let initrd = device.initrd.as_ref().and_then(source);
        Some(Kernel { kernel: source(&device.kernel)?, initrd, cmdline: device.cmdline.clone() })
    }))
}

/// Puts it where libvirt writes it.
fn start_with(os: &mut Element, kernel: Option<Kernel>) {
    os.elements_mut().retain(|e| !matches!(e.name(), "kernel" | "initrd" | "cmdline"));
    let Some(kernel) = kernel else { return };
    let before = ["type", "firmware", "loader", "nvram"];
    let at = os.elements().iter().rposition(|e| before.contains(&e.name())).map_or(0, |n| n + 1);
    let parts = [
        Some(Element::text("kernel", kernel.kernel.path())),
        kernel.initrd.map(|i| Element::text("initrd", i.path())),
        kernel.cmdline.map(|c| Element::text("cmdline", c)),
    ];
    os.elements_mut().splice(at..at, parts.into_iter().flatten());
}

/// Corrects what was kept of the menu of a firmware, and of what it does when it finds nothing.
fn menu(os: &mut Element, config: &Config, on_board: &Board) -> Result<(), VirError> {
    let wanted = optional_flag(config, "hardware.boot_menu").unwrap_or(false);
    let says = os.find("bootmenu").is_some_and(|e| e.attribute("enable") == Some("yes"));
    let now = board::boot(os)?;
    if (says, now.0.filter(|_| says)) != (wanted, on_board.menu_timeout.filter(|_| wanted)) {
        os.elements_mut().retain(|e| e.name() != "bootmenu");
        if wanted {
            let timeout = on_board.menu_timeout;
            os.push(Element::new("bootmenu").with("enable", "yes").with_some("timeout", timeout));
        }
    }
    if now.1 != on_board.boot_retry {
        os.elements_mut().retain(|e| e.name() != "bios");
        os.push_some(on_board.boot_retry.map(|n| Element::new("bios").with("rebootTimeout", n)));
    }
    Ok(())
}

fn devices(shown: &Shown<'_>, opaque: &Opaque, on_board: &Board) -> Result<Element, VirError> {
    let live = shown.id.is_some();
    let instance = &shown.view.instance;
    let parsed = parse_devices(shown.devices)?;
    let of = |name: &str| shown.view.identity(name, shown.devices);
    let mut devices = Element::new("devices");
    devices.push(Element::text("emulator", format!("/usr/bin/qemu-system-{}", instance.architecture)));
    let orders = Orders::of(shown, opaque);
    let (root, device) = &parsed.root;
    if let Some(identity) = of(root).filter(|_| device.attached) {
        let volume = device.source.clone().unwrap_or_else(|| owned(&instance.name));
        let source = Some(Source::Volume { pool: device.pool.clone(), volume });
        let boot = orders.order(device.boot_priority);
        let is = (false, false, DriveFormat::Raw);
        let mut shown_disk = disk(identity, &source, &device.io, is, boot, live, opaque);
        layered(shown, &mut shown_disk, source.as_ref(), live);
        devices.push(shown_disk);
    }
    for (name, device) in parsed.disks.iter().filter(|(_, d)| !d.is_directory()) {
        let Some(identity) = of(name) else { continue };
        let DiskDevice { readonly, attached, io, .. } = device;
        let source = match &device.source {
            DiskOrigin::Volume { pool, volume } => {
                Source::Volume { pool: pool.clone(), volume: volume.clone() }
            }
            DiskOrigin::Host { path } => Source::Path(path.clone()),
            // Containers' alone.
            DiskOrigin::Memory { .. } => continue,
        };
        let cdrom = match &source {
            _ if !attached => true,
            Source::Volume { pool, volume } => (shown.disc)(pool, volume),
            Source::Path(_) => device.is_disc(),
        };
        let source = Some(source).filter(|_| *attached);
        let boot = orders.order(device.boot_priority);
        let is = (cdrom, *readonly || cdrom, device.format);
        let mut shown_disk = disk(identity, &source, io, is, boot, live, opaque);
        layered(shown, &mut shown_disk, source.as_ref(), live);
        devices.push(shown_disk);
    }
    let targets: Vec<&str> =
        devices.elements().iter().filter_map(|e| e.find("target")?.attribute("dev")).collect();
    let empty = |(at, e): (&String, &Element)| {
        let is = !targets.contains(&at.as_str()) && read::source(e).is_ok_and(|s| s.is_none());
        is.then(|| e.clone())
    };
    let empty: Vec<_> = opaque.disks.iter().filter_map(empty).collect();
    devices.elements_mut().extend(empty);
    let mut nics: Vec<_> = parsed.nics.iter().filter(|(_, nic)| nic.attached).collect();
    nics.sort_by_key(|(name, _)| of(name).map(|i| (i.slot.len(), i.slot.clone())));
    for (n, (name, nic)) in nics.into_iter().enumerate() {
        let Some(identity) = of(name) else { continue };
        let mac = identity.mac.clone().unwrap_or_default();
        let kept = opaque.nics.get(&mac).or_else(|| opaque.nics.get(&n.to_string()));
        let bridge = live.then(|| (shown.bridge)(nic.network().unwrap_or_default()));
        devices.push(interface(identity, nic, orders.order(nic.boot_priority), bridge.as_deref(), kept));
    }
    let mut directories: Vec<_> = parsed
        .disks
        .iter()
        .filter_map(|(name, device)| of(name).and_then(|i| Some((i, shares::now(name, device, i)?))))
        .collect();
    directories.sort_by_key(|(identity, _)| (identity.slot.len(), identity.slot.clone()));
    for (identity, now) in directories {
        devices.push(shares::element(identity, &now, orders.order(now.boot), live, opaque));
    }
    for (name, device) in &parsed.given {
        let Some(now) = hostdevs::now(device) else { continue };
        let boot = match &now {
            HostDevice::Usb(usb) => orders.order(usb.boot_priority),
            HostDevice::Input(_) | HostDevice::Vsock(_) => None,
        };
        devices.push(hostdevs::element((name.as_str(), of(name)), &now, boot, shown.id, opaque));
    }
    let given = |name: &str| opaque.devices.iter().any(|e| e.name() == name);
    let port = |name: &'static str, target: &'static str| {
        Element::new(name)
            .with("type", "pty")
            .child(Element::new("target").with("type", target).with("port", 0))
    };
    // What a document said of ports stands for as long as it says what there is.
    let same_ports = ports::holds(&opaque.devices, &parsed.ports);
    let said_of = |name: &str| same_ports && given(name);
    let own = !parsed.ports.iter().any(|(_, p)| p.place == PortPlace::Serial { number: 0 });
    if !said_of("serial") && !said_of("console") && own {
        let mut serial = port("serial", "isa-serial");
        serial.elements_mut()[0].push(Element::new("model").with("name", "isa-serial"));
        devices.push(serial);
        devices.push(port("console", "serial"));
    }
    if !said_of("channel") {
        let target = Element::new("target").with("type", "virtio").with("name", "org.qemu.guest_agent.0");
        devices.push(Element::new("channel").with("type", "unix").child(target));
    }
    if !same_ports {
        devices.elements_mut().extend(parsed.ports.iter().map(|(_, port)| ports::shown(port)));
    }
    if !given("rng") && on_board.rngs.is_empty() {
        devices.push(parts::shown_rng(&Rng::default()));
    }
    let tis = on_board.features.is_some_and(|f| f.tpm_tis);
    let same_tpm = |e: &Element| e.name() == "tpm" && (e.attribute("model") == Some("tpm-tis")) == tis;
    let same_tpm = opaque.devices.iter().any(same_tpm);
    if parsed.tpm.is_some() && !same_tpm {
        let backend = Element::new("backend").with("type", "emulator").with("version", "2.0");
        let model = if tis { "tpm-tis" } else { "tpm-crb" };
        let mut tpm = Element::new("tpm").with("model", model).child(backend);
        encryption::show_tpm(&mut tpm, parsed.tpm_secret);
        devices.push(tpm);
    }
    // Whatever a document asked for, a machine has one screen. A document that asked for none is shown none, unless the screen has a
    // password since, a place where it listens, or SPICE. What it said of SPICE stands as long as the key says so.
    let listens = shown.places.screens.vnc.is_some();
    let own_word = !shown.config.contains_key(OPAQUE);
    let asked_of = |e: &Element| e.name() == "graphics" && read::protocol(e).is_some();
    let asked = opaque.devices.iter().any(asked_of) || shown.guard.is_some() || listens || own_word;
    let screen = shown.hardware.display && (asked || shown.spice);
    let said = |e: &Element| {
        let protocol = read::protocol(e).filter(|_| e.name() == "graphics");
        protocol
            .filter(|p| shown.spice || *p != DisplayProtocol::Spice)
            .filter(|_| places::holds(e, &shown.places))
    };
    let kept_screens: Vec<_> = opaque.devices.iter().filter_map(said).collect();
    let own_screen = screen && (live || kept_screens.is_empty());
    for protocol in screens(shown.spice) {
        let wanted = *protocol == DisplayProtocol::Spice || shown.places.screens.vnc.is_some();
        if own_screen || (screen && wanted && !kept_screens.contains(protocol)) {
            let mut graphics = places::shown(*protocol, &shown.places, shown.listeners);
            secure(&mut graphics, shown.guard.as_ref());
            devices.push(graphics);
        }
    }
    if screen && shown.spice {
        let vdagent =
            |e: &Element| same_ports && e.name() == "channel" && e.attribute("type") == Some("spicevmc");
        if !opaque.devices.iter().any(vdagent) {
            let target = Element::new("target").with("type", "virtio").with("name", "com.redhat.spice.0");
            devices.push(Element::new("channel").with("type", "spicevmc").child(target));
        }
        if !given("redirdev") {
            let one = || Element::new("redirdev").with("bus", "usb").with("type", "spicevmc");
            devices.elements_mut().extend([one(), one(), one()]);
        }
    }
    let mut stale = board::stale(&opaque.devices, on_board);
    let balloon = optional_flag(shown.config, "hardware.balloon").unwrap_or(true);
    let same_balloon = read::has_balloon(&opaque.devices) == balloon
        && board::devices(&opaque.devices).is_ok_and(|b| {
            (b.balloon_deflates, b.balloon_period) == (on_board.balloon_deflates, on_board.balloon_period)
        });
    if !same_balloon {
        stale.push("memballoon");
        let model = Element::new("memballoon").with("model", if balloon { "virtio" } else { "none" });
        let mut model = model.with_some("autodeflate", on_board.balloon_deflates.then_some("on"));
        let period = on_board.balloon_period.filter(|_| balloon);
        model.push_some(period.map(|seconds| Element::new("stats").with("period", seconds)));
        devices.push(model);
    }
    devices.elements_mut().extend(board::shown(on_board, &stale));
    if screen && on_board.video.is_empty() && (!given("video") || stale.contains(&"video")) {
        let model = Element::new("model").with("type", "vga").with("vram", 16384).with("heads", 1);
        devices.push(Element::new("video").child(model.with("primary", "yes")));
    }
    let (same_scsi, more_scsi) = scsi::beside(&opaque.devices, &on_board.scsi);
    devices.elements_mut().extend(more_scsi);
    let there = |e: &&Element| match e.name() {
        "controller" if e.attribute("type") == Some("scsi") => same_scsi,
        "tpm" => parsed.tpm.is_some() && same_tpm,
        // What draws it is the board's.
        "graphics" if read::protocol(e).is_none() => !stale.contains(&"graphics"),
        "graphics" => !own_screen && said(e).is_some(),
        "memballoon" => same_balloon,
        // Shown already, as they are.
        shares::ELEMENT => false,
        _ if hostdevs::is(e) => false,
        _ if ports::is(e) => same_ports,
        name if board::holds(e) => !stale.contains(&name),
        _ => true,
    };
    let mut kept: Vec<Element> = opaque.devices.iter().filter(there).cloned().collect();
    let ours = |e: &&mut Element| e.name() == "graphics" && read::protocol(e).is_some();
    for graphics in kept.iter_mut().filter(ours) {
        secure(graphics, shown.guard.as_ref());
    }
    for tpm in kept.iter_mut().filter(|e| e.name() == "tpm") {
        encryption::show_tpm(tpm, parsed.tpm_secret);
    }
    devices.elements_mut().extend(kept);
    tuning::show_controller(&mut devices, shown.config)?;
    parts::show_virtio(&mut devices, on_board);
    sort(&mut devices, DEVICES);
    aliases::place_redirected(&mut devices);
    if live {
        aliases::give(&mut devices);
    }
    Ok(devices)
}

/// Says what there is to be said of the password of a screen.
fn secure(graphics: &mut Element, guard: Option<&ShownGuard>) {
    let Some(guard) = guard else { return };
    if let Some(password) = &guard.password {
        graphics.set("passwd", password.text());
    }
    if let Some(end) = guard.valid_to {
        graphics.set("passwdValidTo", end.strftime(read::VALID_TO));
    }
}

/// How the boot order is shown: by kinds of devices where the document did so, else by numbers.
struct Orders {
    by_kind: bool,
    /// Priorities that devices have, the highest first.
    all: Vec<u32>,
}

impl Orders {
    fn of(shown: &Shown<'_>, opaque: &Opaque) -> Self {
        let kept = opaque.domain.iter().find(|e| e.name() == "os");
        let by_kind = kept.is_some_and(|os| os.find("boot").is_some());
        let number = |d: &std::collections::BTreeMap<String, String>| d.get("boot.priority")?.parse().ok();
        let mut all: Vec<u32> = shown.devices.values().filter_map(number).collect();
        all.sort_unstable_by(|a, b| b.cmp(a));
        all.dedup();
        Self { by_kind, all }
    }

    /// The number that is shown of a priority.
    fn order(&self, at: Option<u32>) -> Option<u32> {
        let at = at.filter(|_| !self.by_kind)?;
        // Those that came as numbers are shown as they were.
        match (1..100).find(|n| priority(*n) == at) {
            Some(n) if self.all.iter().all(|p| *p > priority(100)) => Some(n),
            _ => self.all.iter().position(|p| *p == at).map(|n| n as u32 + 1),
        }
    }
}

/// Adds what was kept of an element to what is shown of it: attributes that it does not have, and elements of other names.
fn merge(shown: &mut Element, kept: &Element, typed: &[&str], order: &[&str]) {
    for (name, value) in kept.attributes() {
        if shown.attribute(name).is_none() {
            shown.set(name.to_owned(), value);
        }
    }
    for e in kept.elements().iter().filter(|e| !typed.contains(&e.name())) {
        match shown.elements_mut().iter_mut().find(|s| s.name() == e.name()) {
            Some(same) => {
                for (name, value) in e.attributes().filter(|(n, _)| !matches!(*n, "cache" | "iothread")) {
                    if same.attribute(name).is_none() {
                        same.set(name.to_owned(), value);
                    }
                }
            }
            None => shown.push(e.clone()),
        }
    }
    sort(shown, order);
}

/// Lets a disk show its layers, if it has any.
fn layered(shown: &Shown<'_>, disk: &mut Element, source: Option<&Source>, live: bool) {
    if let Some(Source::Volume { pool, volume }) = source {
        layers::show(disk, source, &(shown.layers)(pool, volume), live);
    }
}

fn disk(
    identity: &DeviceIdentity,
    source: &Option<Source>,
    io: &DiskIo,
    (cdrom, readonly, format): (bool, bool, DriveFormat),
    boot: Option<u32>,
    live: bool,
    opaque: &Opaque,
) -> Element {
    let bus = io.bus.unwrap_or(DiskBus::VirtioScsi);
    let (dev, bus_name) = target(&identity.slot, bus);
    let kept = opaque.disks.get(&dev);
    let (kind, attributes): (_, Vec<(&str, &str)>) = match source {
        Some(Source::Path(path)) if path.starts_with("/dev/") => ("block", vec![("dev", path.as_str())]),
        Some(Source::Path(path)) => ("file", vec![("file", path.as_str())]),
        Some(Source::Volume { pool, volume }) => ("volume", vec![("pool", pool), ("volume", volume)]),
        // As libvirt shows an empty drive: tools put a path into it.
        None => ("file", vec![]),
    };
    let device = match (cdrom, bus) {
        (true, _) => "cdrom",
        (_, DiskBus::Floppy) => "floppy",
        _ => "disk",
    };
    let mut e = Element::new("disk").with("type", kind).with("device", device);
    let mut driver = Element::new("driver").with("name", "qemu");
    if matches!(source, Some(Source::Path(_))) {
        driver.set("type", DRIVE_FORMATS.iter().find(|(_, f)| *f == format).map_or("raw", |(name, _)| name));
    }
    if let Some((word, _)) = DISK_CACHES.iter().find(|(_, c)| Some(*c) == io.cache) {
        driver.set("cache", word);
    }
    if let Some(id) = io.thread {
        driver.set("iothread", id);
    }
    e.push(driver);
    // The same source as it was written.
    let as_written = kept.filter(|k| source.is_some() && read::source(k).is_ok_and(|s| s == *source));
    match as_written {
        Some(kept) => {
            e.set("type", kept.attribute("type").unwrap_or("file"));
            e.push_some(kept.find("source").cloned());
            if let Some(source) = e.elements_mut().iter_mut().find(|inner| inner.name() == "source") {
                // Shown as it is now.
                source.elements_mut().retain(|inner| inner.name() != encryption::NAME);
            }
        }
        None if source.is_some() => {
            let with = |e: Element, (n, v): &(&str, &str)| e.with((*n).to_owned(), v);
            e.push(attributes.iter().fold(Element::new("source"), with));
        }
        None => {}
    }
    if let Some(secret) = io.secret.filter(|_| source.is_some()) {
        encryption::show(&mut e, kept, secret);
    }
    e.push(Element::new("target").with("dev", dev).with("bus", bus_name));
    if readonly {
        e.push(Element::new("readonly"));
    }
    if let Some(order) = boot {
        e.push(Element::new("boot").with("order", order));
    }
    named(&mut e, identity, live);
    let unit = identity.slot.trim_start_matches(|c: char| !c.is_ascii_digit());
    // Two drives are at each channel of IDE.
    let (channel, unit) = match (bus, unit.parse::<u32>()) {
        (DiskBus::Ide, Ok(n)) => (n / 2, (n % 2).to_string()),
        _ => (0, unit.to_owned()),
    };
    match placed(identity) {
        Some(address) => e.push(address),
        None => e.push(
            Element::new("address")
                .with("type", "drive")
                .with("controller", io.options.controller.unwrap_or(0))
                .with("bus", channel)
                .with("target", 0)
                .with("unit", unit),
        ),
    }
    if let Some(target) = e.elements_mut().iter_mut().find(|c| c.name() == "target") {
        if let Some(rate) = io.options.rotation {
            target.set("rotation_rate", rate);
        }
        // What the document says is only kept where it is no option of the disk: of one that is not on USB.
        let said = kept.and_then(|k| k.find("target")?.attribute("removable")).filter(|r| *r == "off");
        let removable = io.options.removable.then_some("on").or(said);
        if let Some(word) = removable {
            target.set("removable", word);
        }
    }
    e.push_some(iotune::shown(&io.rates.unwrap_or_else(|| Rates::of(&io.limits))));
    let kept = options::disk_now(kept, &io.options, bus, cdrom);
    let typed = ["source", "target", "iotune", "readonly", encryption::NAME, "boot", "alias", "address"];
    merge(&mut e, &kept, &typed, DISK);
    e
}

/// An interface of a machine.
fn interface(
    identity: &DeviceIdentity,
    nic: &NicDevice,
    boot: Option<u32>,
    bridge: Option<&str>,
    kept: Option<&Element>,
) -> Element {
    let live = bridge.is_some();
    let mut e = super::super::domain::interface(identity, nic.network().unwrap_or_default(), bridge);
    if nic.kind == NicKind::User {
        e.set("type", "user");
        e.elements_mut().retain(|inner| inner.name() == "mac");
    }
    let source = e.elements_mut().iter_mut().find(|inner| inner.name() == "source");
    if let (Some(source), Some(group)) = (source, &nic.port.group) {
        source.set("portgroup", group);
    }
    let model = NIC_MODELS.iter().find(|(_, m)| *m == nic.model).map_or("virtio", |(name, _)| name);
    e.push(Element::new("model").with("type", model));
    let limits = (nic.port.ingress_limit, nic.port.egress_limit);
    if limits != (None, None) {
        let one = |name: &'static str, bits: u64, more: RateMore| {
            let e = Element::new(name).with("average", bits / 8192);
            let e = e.with_some("peak", more.peak.map(|b| b / 8192));
            e.with_some("burst", more.burst.map(|b| b / 1024))
        };
        let mut all = Element::new("bandwidth");
        all.push_some(limits.0.map(|b| one("inbound", b, nic.port.ingress)));
        all.push_some(limits.1.map(|b| one("outbound", b, nic.port.egress)));
        e.push(all);
    }
    if nic.port.isolated {
        e.push(Element::new("port").with("isolated", "yes"));
    }
    let flags = (nic.port.mac_filter, nic.port.ipv4_filter || nic.port.ipv6_filter);
    let referred = kept.and_then(|k| k.find("filterref"));
    e.push_some(nwfilter::shown(flags, (nic.ipv4, nic.ipv6), referred));
    if let Some(order) = boot {
        e.push(Element::new("boot").with("order", order));
    }
    if !nic.connected {
        e.push(Element::new("link").with("state", "down"));
    }
    if let Some(mtu) = nic.mtu {
        e.push(Element::new("mtu").with("size", mtu));
    }
    named(&mut e, identity, live);
    e.push_some(placed(identity));
    let typed = [
        "mac",
        "source",
        "ip",
        "target",
        "bandwidth",
        "port",
        "model",
        "filterref",
        "boot",
        "link",
        "mtu",
        "alias",
        "address",
    ];
    let kept = options::nic_now(kept, &nic.options, nic.model == NicModel::Virtio);
    // There may be one of each family.
    e.elements_mut().extend(kept.all("ip").cloned());
    merge(&mut e, &kept, &typed, INTERFACE);
    e
}

/// With its alias; one that the user gave also when it does not run.
pub(super) fn named(e: &mut Element, identity: &DeviceIdentity, live: bool) {
    if live || identity.alias.starts_with("ua-") {
        e.push(Element::new("alias").with("name", &identity.alias));
    }
}

pub(super) fn placed(identity: &DeviceIdentity) -> Option<Element> {
    let (bus, rest) = identity.pci.as_deref()?.split_once(':')?;
    let (slot, function) = rest.split_once('.')?;
    let address = Element::new("address")
        .with("type", "pci")
        .with("domain", "0x0000")
        .with("bus", format!("0x{bus}"))
        .with("slot", format!("0x{slot}"))
        .with("function", format!("0x{function}"));
    // What is no address is not shown as one.
    pci_of(&address).map(|_| address)
}
