//! From domain XML to the typed form.

use super::{
    Disk, Kernel, Machine, Nic, Opaque, Screen, Source, aliases, board, hostdevs, iotune, kept, layers,
    number, options, pci_of, places, ports, priority, processor, refuse, scsi, shares,
    sizes::{self, Cpus},
    tuning, wrong,
};
use crate::{
    error::VirError,
    xml::{Element, encryption, is_name, is_prefix, network::ports::direction, nwfilter},
};
use karst_model::{
    board::{MOST, UsbController, UsbModel, without_usual},
    device::{DRIVE_FORMATS, DiskBus, DiskCache, DriveFormat, NIC_MODELS, NicModel, PortEnd, parse_mac},
    display::{DisplayGuard, DisplayPassword, DisplayProtocol},
    instance::Firmware,
};
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

/// Where paths of volumes begin.
pub const VOLUMES: &str = "/karst/";
/// Elements of the domain that the typed form holds whole.
const TYPED: &[&str] =
    &["name", "uuid", "title", "description", "metadata", "memory", "currentMemory", "devices"];

/// Reads a domain.
///
/// # Errors
/// XML error when it says nothing sensible; CONFIG_UNSUPPORTED, naming the element, for what Karst does not do.
pub fn machine(text: &str) -> Result<Machine, VirError> {
    let mut root = crate::xml::read::document(text)?;
    layers::without_all(&mut root);
    if root.name() != "domain" {
        return Err(wrong(format!("unexpected root element <{}>, expecting <domain>", root.name())));
    }
    let kvm = match root.attribute("type") {
        Some("kvm") => true,
        Some("qemu") => false,
        Some("lxc") => {
            return Err(refuse("domain type", "containers are made of images, not defined by XML"));
        }
        Some(other) => {
            return Err(refuse("domain type", format!("'{other}' is not a kind of guest of this host")));
        }
        None => return Err(wrong("missing domain type attribute")),
    };
    kept::domain(&root)?;
    let body = |name: &str| root.find(name).map(|e| e.body().trim()).filter(|t| !t.is_empty());
    let name = body("name").ok_or_else(|| wrong("missing name information"))?.to_owned();
    let uuid =
        body("uuid").map(|u| Uuid::parse_str(u).map_err(|_| wrong(format!("malformed uuid element '{u}'"))));
    let title = body("title").map(str::to_owned);
    if title.as_ref().is_some_and(|t| t.contains('\n')) {
        return Err(wrong("Domain title can't contain newlines"));
    }
    let (Cpus { current: cpus, most: most_cpus }, pinned) = sizes::cpus(&root)?;
    let on_board = board::read(&root, most_cpus)?;
    let sizes = on_board.numa.iter().map(|cell| cell.memory).chain(on_board.modules.iter().map(|m| m.size));
    let memory = match sizes.fold(0u64, |all, size| all.saturating_add(size.bytes() / 1024)) {
        // Nodes and modules of memory are all of it.
        // QEMU has whole MiB, up to which libvirt rounds too.
        0 => kib(root.find("memory").ok_or_else(|| wrong("missing memory element"))?)?.next_multiple_of(1024),
        nodes => nodes,
    };
    let os = root.find("os").ok_or_else(|| wrong("an os <type> must be specified"))?;
    let (machine, firmware) = system(os)?;
    let old = is_old(os);
    let none = Element::new("devices");
    let devices = root.find("devices").unwrap_or(&none);
    // Of two modes of NUMA that mean the same it is shown which.
    let typed =
        |name: &str| TYPED.contains(&name) || (tuning::ELEMENTS.contains(&name) && name != "numatune");
    let kept = root.elements().iter().filter(|e| !typed(e.name())).cloned();
    let opaque = Opaque { domain: kept.collect(), ..Opaque::default() };
    let order = Order::of(os);
    let filesystems = shares::all(devices.elements(), &on_board)?;
    let mut all = Machine {
        kvm,
        name,
        uuid: uuid.transpose()?,
        title,
        description: body("description").unwrap_or_default().to_owned(),
        metadata: metadata(&root)?,
        memory,
        current: sizes::memory(&root, memory, has_balloon(devices.elements()))?,
        cpus,
        most_cpus,
        pinned,
        tuning: tuning::of(&root)?,
        machine,
        firmware,
        boot_menu: os.find("bootmenu").is_some_and(|e| e.attribute("enable") == Some("yes")),
        cpu_model: processor::read(root.find("cpu"), root.find("features"), root.find("clock"), old)?,
        old,
        board: on_board,
        balloon: has_balloon(devices.elements()),
        local_time: root.find("clock").and_then(|c| c.attribute("offset")) == Some("localtime"),
        hyper_v: root.find("features").is_some_and(kept::asks_for_hyper_v),
        restarts: body("on_crash") == Some("restart"),
        preserved: body("on_crash") == Some("preserve"),
        ends_on_reboot: body("on_reboot") == Some("destroy"),
        kernel: kernel(os)?,
        tpm: false,
        tpm_secret: None,
        disks: vec![],
        nics: vec![],
        ports: ports::read(devices.elements())?,
        filesystems,
        given: hostdevs::all(devices.elements())?,
        spice: false,
        places: Default::default(),
        screen: Screen::Unsaid,
        opaque,
    };
    let of_qemu = |p: &ports::Port| matches!(p.device.to, PortEnd::Agent { .. });
    let spice = devices.all("graphics").any(|g| protocol(g) == Some(DisplayProtocol::Spice));
    if spice && all.ports.iter().any(of_qemu) {
        return Err(refuse(
            "channel",
            "qemu-vdagent is for a machine without a screen of spice, whose agent it would be",
        ));
    }
    let q35 = all.machine.as_deref().is_some_and(|m| m == "q35" || m.starts_with("pc-q35-"));
    // Nothing is in such a drive, so no guest misses it before somebody puts something in.
    let of_pc = |disk: &Disk| disk.bus == DiskBus::Ide;
    let missed = |disk: &Disk| !(q35 && of_pc(disk) && disk.source.is_none());
    let (mut targets, mut macs, mut screens) = (BTreeSet::new(), BTreeSet::new(), vec![]);
    for e in devices.elements() {
        match e.name() {
            "emulator" => {}
            "disk" => match disk(e, &order)?.filter(missed) {
                Some(disk) => {
                    if !targets.insert(disk.target.clone()) {
                        return Err(wrong(format!("target '{}' duplicated for disk sources", disk.target)));
                    }
                    all.opaque.disks.insert(disk.target.clone(), e.clone());
                    all.disks.push(disk);
                }
                None => {
                    let dev = e.find("target").and_then(|t| t.attribute("dev")).unwrap_or_default();
                    if !targets.insert(dev.to_owned()) {
                        return Err(wrong(format!("target '{dev}' duplicated for disk sources")));
                    }
                    all.opaque.devices.push(e.clone());
                }
            },
            "interface" => {
                let nic = nic(e, &order)?;
                if nic.mac.as_ref().is_some_and(|m| !macs.insert(m.clone())) {
                    return Err(wrong(format!("MAC address {} is given twice", nic.mac.unwrap_or_default())));
                }
                let at = nic.mac.clone().unwrap_or_else(|| all.nics.len().to_string());
                all.opaque.nics.insert(at, e.clone());
                all.nics.push(nic);
            }
            "tpm" => {
                let backend = e.find("backend");
                let of = |name: &str| backend.and_then(|b| b.attribute(name));
                if of("type") != Some("emulator") || of("version").is_some_and(|v| v != "2.0") {
                    return Err(refuse("tpm", "there are emulated ones of version 2.0 only"));
                }
                if all.tpm {
                    return Err(refuse("tpm", "a machine has one"));
                }
                all.tpm = true;
                all.tpm_secret = encryption::of_tpm(e)?;
                all.opaque.devices.push(e.clone());
            }
            "graphics" => {
                let (bare, said) = screen(e)?;
                if let Some(protocol) = protocol(e) {
                    if screens.contains(&protocol) {
                        let text = format!("a machine has one screen of type {}", protocol.as_str());
                        return Err(refuse("graphics", text));
                    }
                    screens.push(protocol);
                    all.spice |= protocol == DisplayProtocol::Spice;
                    places::read(e, &mut all.places)?;
                }
                match (&all.screen, said) {
                    (_, Screen::Unsaid) => {}
                    (Screen::Unsaid, said) => all.screen = said,
                    (before, said) if *before == said => {}
                    _ => {
                        let text = "a machine has one, for vnc and spice; give both of them the same";
                        return Err(refuse("graphics passwd", text));
                    }
                }
                all.opaque.devices.push(bare);
            }
            _ => all.opaque.devices.push(e.clone()),
        }
    }
    all.opaque.devices.iter_mut().for_each(aliases::forget);
    let mut controllers = scsi::read(devices.elements())?;
    scsi::complete(&mut controllers, &all.disks);
    all.board.scsi = without_usual(controllers);
    for disk in &all.disks {
        let model = disk.options.controller.and_then(|n| all.board.scsi.get(usize::from(n))).map(|c| c.model);
        let most = model.map_or(u32::MAX, |m| m.most_targets());
        if number(&disk.target).is_some_and(|n| n >= most) {
            let text = format!(
                "{}: the model of its controller has {most} at most, sda being the first",
                disk.target
            );
            return Err(refuse("disk target", text));
        }
    }
    if !q35 && all.board.usb.len() > MOST {
        return Err(refuse("controller", format!("a machine of type pc has {MOST} of usb at most")));
    }
    if !q35 && all.board.iommu.is_some() {
        return Err(refuse("iommu", "machines of type q35 have one"));
    }
    if !q35 && all.board.features.is_some_and(|f| f.tseg.is_some()) {
        return Err(refuse("features smm", "machines of type q35 have a tseg"));
    }
    if q35 && all.disks.iter().any(of_pc) {
        return Err(refuse("disk bus", "'ide' is of machines of type pc; q35 has sata"));
    }
    if all.board.usb.is_empty() && all.disks.iter().any(|d| d.bus == DiskBus::Usb) {
        let without =
            |e: &Element| e.attribute("type") == Some("usb") && e.attribute("model") == Some("none");
        if devices.all("controller").any(without) {
            return Err(refuse("disk bus", "there is no controller for 'usb'"));
        }
        // As QEMU's machines have it.
        all.board.usb.push(UsbController { model: UsbModel::Piix3Uhci, ports: None });
    }
    let viewer = |port: &ports::Port| port.device.to == (PortEnd::Spice {});
    if !all.spice && all.ports.iter().any(viewer) {
        return Err(refuse(
            "smartcard",
            "there is no screen of type spice, whose viewer would have the card",
        ));
    }
    let there = |id: u32| all.tuning.iothreads.iter().any(|t| t.id == id);
    if let Some(id) = all.disks.iter().filter_map(|d| d.thread).find(|id| !there(*id)) {
        return Err(wrong(format!("Disk iothread '{id}' not defined in iothreadid")));
    }
    Ok(all)
}

/// Is an `<os>` one of 32 bits?
pub fn is_old(os: &Element) -> bool {
    os.find("type").and_then(|t| t.attribute("arch")) == Some("i686")
}

/// Has a machine with these devices a balloon? Without a word of it it has.
pub fn has_balloon(devices: &[Element]) -> bool {
    !devices.iter().any(|e| e.name() == "memballoon" && e.attribute("model") == Some("none"))
}

/// How `passwdValidTo` is written: UTC.
pub const VALID_TO: &str = "%Y-%m-%dT%H:%M:%S";
/// Attributes of a screen that are about its password.
const SECRET: [&str; 3] = ["passwd", "passwdValidTo", "connected"];

/// What a `<graphics>` speaks; nothing for what machines do not have.
pub fn protocol(e: &Element) -> Option<DisplayProtocol> {
    match e.attribute("type")? {
        "vnc" => Some(DisplayProtocol::Vnc),
        "spice" => Some(DisplayProtocol::Spice),
        _ => None,
    }
}

/// Refuses what would protect, or show, more of a screen by SPICE than is done.
fn demand_usual(e: &Element) -> Result<(), VirError> {
    for (element, attribute, value, why) in [
        ("clipboard", "copypaste", "no", "the viewer and the agent of the guest share it"),
        ("filetransfer", "enable", "no", "viewers may give files to the agent of the guest"),
        ("gl", "enable", "yes", "screens have no OpenGL"),
    ] {
        if e.find(element).and_then(|c| c.attribute(attribute)) == Some(value) {
            return Err(refuse(&format!("graphics {element}"), why));
        }
    }
    let secure = e.attribute("defaultMode") == Some("secure")
        || e.all("channel").any(|c| c.attribute("mode") == Some("secure"));
    match secure {
        true => Err(refuse("graphics channel", "channels have no TLS; viewers get them by a descriptor")),
        false => Ok(()),
    }
}

/// A `<graphics>` without its password, and what it says of that.
///
/// # Errors
/// CONFIG_UNSUPPORTED, naming the attribute.
pub fn screen(e: &Element) -> Result<(Element, Screen), VirError> {
    let mut bare = e.clone();
    SECRET.iter().for_each(|name| bare.unset(name));
    let protocol = protocol(e);
    if protocol == Some(DisplayProtocol::Spice) {
        demand_usual(e)?;
    }
    let Some(text) = e.attribute("passwd") else {
        return Ok((bare, if protocol.is_some() { Screen::Open } else { Screen::Unsaid }));
    };
    if protocol.is_none() {
        let text = "machines have a screen of type vnc or spice; give that the password";
        return Err(refuse("graphics passwd", text));
    }
    if let Some(other) = e.attribute("connected").filter(|c| *c != "keep") {
        return Err(refuse(
            "graphics connected",
            format!("'{other}' is not there; viewers keep their connections"),
        ));
    }
    let password = DisplayPassword::parse("passwd", text.to_owned());
    let password = password.map_err(|e| refuse("graphics passwd", e.message))?;
    let valid_to = e.attribute("passwdValidTo").map(|t| {
        let time = format!("{}Z", t.trim_end_matches('Z')).parse::<jiff::Timestamp>();
        time.map_err(|_| {
            wrong(format!("cannot parse password validity time '{t}', expect 2030-01-31T12:00:00"))
        })
    });
    Ok((bare, Screen::Guarded(DisplayGuard { password, valid_to: valid_to.transpose()? })))
}

/// A size in KiB, whatever its unit.
pub(super) fn kib(e: &Element) -> Result<u64, VirError> {
    let number: u64 =
        e.body().trim().parse().map_err(|_| wrong(format!("<{}> is no number: '{}'", e.name(), e.body())))?;
    let unit = e.attribute("unit").unwrap_or("KiB");
    let factor: u64 = match unit {
        "b" | "byte" | "bytes" => 1,
        "KB" => 1000,
        "k" | "K" | "KiB" => 1 << 10,
        "MB" => 1_000_000,
        "M" | "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "G" | "GiB" => 1 << 30,
        "TB" => 1_000_000_000_000,
        "T" | "TiB" => 1 << 40,
        _ => return Err(wrong(format!("<{}> has the unknown unit '{unit}'", e.name()))),
    };
    let bytes = number.checked_mul(factor).ok_or_else(|| wrong(format!("<{}> is too large", e.name())))?;
    if bytes == 0 {
        return Err(wrong(format!("<{}> is zero", e.name())));
    }
    Ok(bytes.div_ceil(1024))
}

/// Machine type and firmware.
fn system(os: &Element) -> Result<(Option<String>, Firmware), VirError> {
    let kind = os.find("type").ok_or_else(|| wrong("an os <type> must be specified"))?;
    if kind.body().trim() != "hvm" {
        return Err(refuse(
            "os type",
            format!("'{}' is not a kind of machine of this host", kind.body().trim()),
        ));
    }
    if let Some(arch) = kind.attribute("arch").filter(|a| !matches!(*a, "x86_64" | "i686")) {
        return Err(refuse("os arch", format!("'{arch}' is not the architecture of this host")));
    }
    let machine = kind.attribute("machine").map(str::to_owned);
    if let Some(m) = &machine
        && !matches!(m.as_str(), "q35" | "pc")
        && !m.starts_with("pc-q35-")
        && !m.starts_with("pc-i440fx-")
    {
        return Err(refuse("os machine", format!("'{m}' is not there; q35, pc and their versions are")));
    }
    Ok((machine, firmware(os)?))
}

/// What a machine is started with in place of what its disks would boot.
fn kernel(os: &Element) -> Result<Option<Kernel>, VirError> {
    let body = |name: &str| os.find(name).map(|e| e.body().trim()).filter(|t| !t.is_empty());
    let Some(kernel) = body("kernel") else {
        return match ["initrd", "cmdline"].into_iter().find(|n| body(n).is_some()) {
            Some(name) => Err(refuse(name, "there is no <kernel> that it belongs to")),
            None => Ok(None),
        };
    };
    Ok(Some(Kernel {
        kernel: place(kernel)?,
        initrd: body("initrd").map(place).transpose()?,
        cmdline: body("cmdline").map(str::to_owned),
    }))
}

/// The firmware that an `<os>` means.
pub fn firmware(os: &Element) -> Result<Firmware, VirError> {
    let secure = os
        .find("firmware")
        .into_iter()
        .flat_map(|f| f.all("feature"))
        .any(|f| f.attribute("name") == Some("secure-boot") && f.attribute("enabled") == Some("yes"));
    let uefi = |secure| if secure { Firmware::UefiSecure } else { Firmware::Uefi };
    match (os.attribute("firmware"), os.find("loader")) {
        (Some("efi"), loader) => {
            Ok(uefi(secure || loader.is_some_and(|l| l.attribute("secure") == Some("yes"))))
        }
        (Some("bios"), _) | (None, None) => Ok(Firmware::Bios),
        (Some(other), _) => Err(refuse("os firmware", format!("'{other}' is not there; bios and efi are"))),
        (None, Some(loader)) => {
            let path = loader.body().to_ascii_uppercase();
            if loader.attribute("type") == Some("pflash") || path.contains("OVMF") {
                return Ok(uefi(loader.attribute("secure") == Some("yes")));
            }
            if path.contains("BIOS") {
                return Ok(Firmware::Bios);
            }
            Err(refuse("loader", "a file of the host is no firmware; use firmware='efi'"))
        }
    }
}

fn metadata(root: &Element) -> Result<BTreeMap<String, (String, Element)>, VirError> {
    let mut all = BTreeMap::new();
    for e in root.find("metadata").map(Element::elements).unwrap_or_default() {
        let (prefix, _) = e.name().split_once(':').unwrap_or(("", e.name()));
        let local = e.name().strip_prefix(prefix).unwrap_or_default().trim_start_matches(':');
        if !(prefix.is_empty() || is_prefix(prefix) && is_name(local)) {
            return Err(wrong(format!("<{}> in <metadata> has no name with a prefix", e.name())));
        }
        let key = if prefix.is_empty() { "xmlns".to_owned() } else { format!("xmlns:{prefix}") };
        let uri = e.attribute(&key).or_else(|| root.attribute(&key));
        let uri = uri.ok_or_else(|| wrong(format!("<{}> in <metadata> has no namespace", e.name())))?;
        let (uri, prefix) = (uri.to_owned(), prefix.to_owned());
        let mut bare = without_prefix(e.clone(), &prefix);
        bare.unset(&key);
        if all.insert(uri.clone(), (prefix, bare)).is_some() {
            return Err(wrong(format!("<metadata> has two elements of the namespace {uri}")));
        }
    }
    Ok(all)
}

fn without_prefix(mut e: Element, prefix: &str) -> Element {
    if prefix.is_empty() {
        return e;
    }
    if let Some(bare) = e.name().strip_prefix(prefix).and_then(|n| n.strip_prefix(':')).map(str::to_owned) {
        e = e.renamed(bare);
    }
    if !e.elements().is_empty() {
        let inner = std::mem::take(e.elements_mut());
        *e.elements_mut() = inner.into_iter().map(|i| without_prefix(i, prefix)).collect();
    }
    e
}

/// What `<boot dev=…/>` of an `<os>` says of kinds of devices.
#[derive(Default)]
struct Order {
    disk: Option<u32>,
    floppy: Option<u32>,
    cdrom: Option<u32>,
    network: Option<u32>,
}

impl Order {
    fn of(os: &Element) -> Self {
        let mut order = Self::default();
        for (n, boot) in (0u32..).zip(os.all("boot")) {
            let of = match boot.attribute("dev") {
                Some("hd") => &mut order.disk,
                Some("fd") => &mut order.floppy,
                Some("cdrom") => &mut order.cdrom,
                Some("network") => &mut order.network,
                _ => continue,
            };
            of.get_or_insert(priority(n));
        }
        order
    }
}

pub(super) fn own_order(e: &Element) -> Result<Option<u32>, VirError> {
    let Some(order) = e.find("boot").and_then(|b| b.attribute("order")) else { return Ok(None) };
    let n = order.parse().ok().filter(|n| *n > 0);
    n.map(|n| Some(priority(n))).ok_or_else(|| wrong(format!("incorrect boot order '{order}'")))
}

pub(super) fn alias(e: &Element) -> Result<Option<String>, VirError> {
    let name = e.find("alias").and_then(|a| a.attribute("name")).filter(|n| n.starts_with("ua-"));
    match name {
        Some(n) if n.len() > 128 || !n.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b)) => {
            Err(wrong(format!("invalid alias name '{n}'")))
        }
        other => Ok(other.map(str::to_owned)),
    }
}

/// What the source of a disk names; nothing when it is empty.
///
/// # Errors
/// CONFIG_UNSUPPORTED for what is no volume and no path.
pub fn source(disk: &Element) -> Result<Option<Source>, VirError> {
    let kind = disk.attribute("type").unwrap_or("file");
    let Some(source) = disk.find("source") else { return Ok(None) };
    for element in ["reservations", "slices", "ssl", "cookies"] {
        if source.find(element).is_some() || disk.find(element).is_some() {
            return Err(refuse(element, "is not there for disks"));
        }
    }
    let of = |name: &str| source.attribute(name).filter(|v| !v.is_empty());
    let path = match kind {
        "volume" => {
            return match (of("pool"), of("volume")) {
                (Some(pool), Some(volume)) => {
                    Ok(Some(Source::Volume { pool: pool.to_owned(), volume: volume.to_owned() }))
                }
                _ => Err(wrong("'pool' and 'volume' are needed in the source of a disk of type volume")),
            };
        }
        "file" => of("file"),
        "block" => of("dev"),
        other => {
            return Err(refuse("disk type", format!("'{other}' is not there; volume, file and block are")));
        }
    };
    path.map(place).transpose()
}

/// What a path names: a volume, or what the host has there.
pub(super) fn place(path: &str) -> Result<Source, VirError> {
    if let Some((pool, volume)) = path.strip_prefix(VOLUMES).and_then(|p| p.split_once('/')) {
        return Ok(Source::Volume { pool: pool.to_owned(), volume: volume.to_owned() });
    }
    if !path.starts_with('/') {
        return Err(wrong(format!("'{path}' is no absolute path")));
    }
    Ok(Source::Path(path.to_owned()))
}

/// A disk that stands alone.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub fn disk_alone(e: &Element) -> Result<Disk, VirError> {
    let mut e = e.clone();
    layers::without(&mut e);
    let e = &e;
    kept::disk(e)?;
    let disk = disk(e, &Order::default())?;
    disk.ok_or_else(|| refuse("disk bus", "drives of discs are on sata, scsi or ide"))
}

/// An interface that stands alone.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub fn nic_alone(e: &Element) -> Result<Nic, VirError> {
    kept::interface(e)?;
    nic(e, &Order::default())
}

/// A disk; nothing for an empty drive on a bus that is not there.
fn disk(e: &Element, order: &Order) -> Result<Option<Disk>, VirError> {
    let (cdrom, floppy) = match e.attribute("device").unwrap_or("disk") {
        "disk" => (false, false),
        "cdrom" => (true, false),
        "floppy" => (false, true),
        other => {
            return Err(refuse("disk device", format!("'{other}' is not there; disk, cdrom and floppy are")));
        }
    };
    let target = e.find("target").ok_or_else(|| wrong("missing target information for disk"))?;
    let dev = target.attribute("dev").ok_or_else(|| wrong("missing target information for disk"))?;
    let bus = target.attribute("bus").unwrap_or(match dev.get(..2) {
        Some("vd") => "virtio",
        Some("sd") => "scsi",
        Some("hd") => "ide",
        Some("fd") => "fdc",
        Some("nv") => "nvme",
        _ => "",
    });
    let n = number(dev)
        .ok_or_else(|| wrong(format!("Invalid harddisk device name: {dev}, the target of a disk")))?;
    let source = source(e)?;
    if (bus == "nvme") != dev.starts_with("nvme") {
        return Err(wrong(format!("disk {dev} is not named as one on bus '{bus}' is")));
    }
    let (bus, slot) = match bus {
        "virtio" => (DiskBus::VirtioBlk, format!("virtio{n}")),
        "scsi" => (DiskBus::VirtioScsi, format!("scsi{n}")),
        "sata" => (DiskBus::Sata, format!("sata{n}")),
        "ide" => (DiskBus::Ide, format!("ide{n}")),
        "fdc" if floppy => (DiskBus::Floppy, format!("floppy{n}")),
        "usb" if !floppy && !cdrom => (DiskBus::Usb, format!("usb{n}")),
        // By its name: one of another bus has another.
        "nvme" if dev.starts_with("nvme") => (DiskBus::Nvme, format!("nvme{n}")),
        // Nothing is in it, so no guest misses it before somebody puts something in.
        _ if (cdrom || floppy) && source.is_none() => return Ok(None),
        other => {
            return Err(refuse(
                "disk bus",
                format!(
                    "'{other}' of {dev} is not there; virtio, scsi, sata, ide, usb, and nvme of nvme0n1 and its like, are"
                ),
            ));
        }
    };
    if bus == DiskBus::Sata && n > 5 {
        return Err(refuse("disk target", format!("{dev}: the SATA controller has 6 ports")));
    }
    if bus == DiskBus::Ide {
        demand_ide(e, dev, n)?;
    }
    if floppy != (bus == DiskBus::Floppy) {
        return Err(refuse("disk bus", format!("{dev}: floppy disks, and no others, are on 'fdc'")));
    }
    let pci = e.find("address").and_then(pci_of);
    if pci.is_some() && !matches!(bus, DiskBus::VirtioBlk | DiskBus::Nvme) {
        return Err(refuse("disk address", format!("{dev} is behind a controller and has none on PCI")));
    }
    if floppy && n > 1 {
        return Err(refuse("disk target", format!("{dev}: a machine has fda and fdb")));
    }
    if floppy && source.is_none() {
        return Ok(None);
    }
    if source.is_none() && !cdrom {
        return Err(wrong(format!("disk {dev} has no source")));
    }
    if cdrom && matches!(bus, DiskBus::VirtioBlk | DiskBus::Nvme) {
        let bus = if bus == DiskBus::Nvme { "nvme" } else { "virtio" };
        return Err(wrong(format!("disk type of 'cdrom' does not support bus '{bus}'")));
    }
    if dev.starts_with("nvme") != (bus == DiskBus::Nvme) {
        return Err(refuse("disk target", format!("{dev}: a disk of this bus has another name")));
    }
    let driver = e.find("driver");
    let of = |name: &str| driver.and_then(|d| d.attribute(name));
    let cache = match of("cache") {
        None | Some("default") => None,
        Some("none") => Some(DiskCache::None),
        Some("writeback") => Some(DiskCache::Writeback),
        Some("unsafe") => Some(DiskCache::Unsafe),
        Some(name @ ("writethrough" | "directsync")) => {
            if matches!(bus, DiskBus::Nvme | DiskBus::Floppy) {
                return Err(refuse("driver cache", format!("'{name}' is not there for a disk on this bus")));
            }
            Some(if name == "directsync" { DiskCache::Directsync } else { DiskCache::Writethrough })
        }
        Some(other) => {
            return Err(refuse(
                "driver cache",
                format!("'{other}' is not there; none, writeback, writethrough, directsync and unsafe are"),
            ));
        }
    };
    let format = match (&source, of("type")) {
        // Without a word it is raw, as libvirt has it: nothing is found out.
        (Some(Source::Path(path)), Some(kind)) => {
            let found = DRIVE_FORMATS.iter().find(|(name, _)| *name == kind).map(|(_, format)| *format);
            found.ok_or_else(|| {
                refuse(
                    "driver type",
                    format!("'{kind}' of {path} is not there; of paths of the host raw and qcow2 are"),
                )
            })?
        }
        _ => DriveFormat::Raw,
    };
    let secret = encryption::of_disk(e)?.filter(|_| source.is_some());
    if secret.is_some() && format != DriveFormat::Raw {
        let text =
            "an encrypted disk is a container of LUKS, whose type is raw; LUKS within qcow2 is not there";
        return Err(refuse("driver type", text));
    }
    let thread = driver.map(|d| tuning::thread_of(d, "driver iothread")).transpose()?.flatten();
    if thread.is_some() && bus != DiskBus::VirtioBlk {
        let text =
            format!("{dev}: disks on virtio have one of their own; those on scsi have their controller's");
        return Err(refuse("driver iothread", text));
    }
    let options = options::of_disk(e, bus, cdrom, source.as_ref())?;
    Ok(Some(Disk {
        target: dev.to_owned(),
        slot,
        bus,
        cdrom,
        source,
        optional: e.find("source").and_then(|s| s.attribute("startupPolicy")) == Some("optional"),
        readonly: cdrom || e.find("readonly").is_some(),
        cache,
        format,
        thread,
        options,
        rates: e.find("iotune").map(iotune::read).transpose()?.unwrap_or_default(),
        boot: own_order(e)?.or(match (cdrom, floppy) {
            (true, _) => order.cdrom,
            (_, true) => order.floppy,
            _ => order.disk,
        }),
        alias: alias(e)?,
        pci,
        secret,
    }))
}

/// A drive of the IDE controller is where its name says.
fn demand_ide(e: &Element, dev: &str, n: u32) -> Result<(), VirError> {
    if n > 3 {
        return Err(refuse("disk target", format!("{dev}: the IDE controller has 4 drives, hda to hdd")));
    }
    let Some(address) = e.find("address").filter(|a| a.attribute("type") == Some("drive")) else {
        return Ok(());
    };
    let of = |name: &str| address.attribute(name).unwrap_or("0").parse::<u32>().ok();
    match (of("controller"), of("bus"), of("unit")) {
        (Some(0), Some(bus), Some(unit)) if bus == n / 2 && unit == n % 2 => Ok(()),
        _ => Err(refuse("disk address", format!("{dev} is unit {} of bus {} of controller 0", n % 2, n / 2))),
    }
}

fn nic(e: &Element, order: &Order) -> Result<Nic, VirError> {
    let source = e.find("source");
    let of = |name: &str| source.and_then(|s| s.attribute(name));
    let network = match e.attribute("type") {
        Some("network") => of("network"),
        // The bridge of a network has the network's name.
        Some("bridge") => of("bridge"),
        Some("user") => None,
        Some(other) => {
            return Err(refuse(
                "interface type",
                format!("'{other}' is not there; network, bridge and user are"),
            ));
        }
        None => return Err(wrong("missing type of interface")),
    };
    let user = e.attribute("type") == Some("user");
    let network = match network {
        None if !user => return Err(wrong("missing source of interface")),
        network => network.map(str::to_owned),
    };
    if user
        && let Some(name) = ["filterref", "bandwidth", "port"].into_iter().find(|name| e.find(name).is_some())
    {
        return Err(refuse(
            &format!("interface {name}"),
            "an interface of type user has no port of a network",
        ));
    }
    let mac = match e.find("mac").and_then(|m| m.attribute("address")) {
        None => None,
        Some(m) => Some(parse_mac("mac address", m).map_err(|e| wrong(e.to_string()))?),
    };
    let model = match e.find("model").and_then(|m| m.attribute("type")) {
        None | Some("virtio" | "virtio-net" | "virtio-non-transitional") => NicModel::Virtio,
        Some(name) => match NIC_MODELS.iter().find(|(known, _)| *known == name) {
            Some((_, model)) => *model,
            None => {
                let text =
                    format!("'{name}' is not there; virtio, e1000e, e1000, rtl8139, pcnet and ne2k_pci are");
                return Err(refuse("interface model", text));
            }
        },
    };
    let mtu = match e.find("mtu").and_then(|m| m.attribute("size")) {
        None => None,
        Some(n) => Some(n.parse().map_err(|_| wrong(format!("MTU '{n}' is no number")))?),
    };
    let bound = e.find("filterref").map(nwfilter::reference).transpose()?;
    Ok(Nic {
        network,
        mac,
        model,
        options: options::of_nic(e, model == NicModel::Virtio)?,
        connected: e.find("link").and_then(|l| l.attribute("state")) != Some("down"),
        mtu,
        boot: own_order(e)?.or(order.network),
        mac_filter: bound.is_some_and(|b| b.filter.mac),
        ip_filter: bound.is_some_and(|b| b.filter.ip),
        addresses: bound.map_or((None, None), |b| (b.ipv4, b.ipv6)),
        isolated: e.find("port").is_some_and(|p| p.attribute("isolated") == Some("yes")),
        limits: [direction(e, "inbound")?, direction(e, "outbound")?],
        group: source.and_then(|s| s.attribute("portgroup")).map(str::to_owned),
        alias: alias(e)?,
        pci: e.find("address").and_then(pci_of),
    })
}
