//! What a domain says of its machine's board ([`karst_model::board`]), both ways: controllers and devices of USB, sound,
//! screens, a watchdog, what tells of a panic, the layout of processors and memory. What it says in a way that QEMU is not told
//! is refused by name.

pub use super::clock::{Clock, clock, hpet, show_clock};
use super::{hostdevs, nodes, parts, plugs, refuse, sysinfo, tuning, wrong};
use crate::{error::VirError, xml::Element};
use karst_model::{
    ByteSize,
    board::{
        AUTO_RENDER, Board, Features, Memory, NumaCell, POINTERS, Pointer, Rng, SOUND_CODECS, SOUNDS, Sound,
        SoundCodec, Topology, USB_KINDS, USB_MODELS, UsbController, UsbDevice, UsbKind, UsbModel, VIDEOS,
        Video, WATCHDOG_ENDS, WATCHDOGS, Watchdog, WatchdogEnd, WatchdogModel, parse_ranges, ranges,
    },
};
use uuid::Uuid;

fn of<T: Copy>(table: &[(&str, T)], name: &str) -> Option<T> {
    table.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
}

fn number(e: &Element, name: &str) -> Result<Option<u32>, VirError> {
    let parse = |text: &str| {
        text.parse().map_err(|_| wrong(format!("'{name}' of <{}> is no number: '{text}'", e.name())))
    };
    e.attribute(name).map(parse).transpose()
}

/// Sets what a `<domain>` says of it. `cpus` are its processors at the start.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub fn read(root: &Element, cpus: u32) -> Result<Board, VirError> {
    let none = Element::new("devices");
    let mut board = devices(root.find("devices").unwrap_or(&none).elements())?;
    let mut cells = nodes::Cells::default();
    if let Some(cpu) = root.find("cpu") {
        (board.topology, board.numa) = layout(cpu, cpus)?;
        cells = nodes::cells(cpu)?;
    }
    let backed = root.find("memoryBacking");
    board.numa_memory = nodes::memory(&backed.map(nodes::pages).unwrap_or_default(), &cells.shared);
    board.numa_distances = cells.distances;
    board.slots = root.find("maxMemory").map(nodes::slots).transpose()?;
    let numatune = root.find("numatune");
    board.numa_host = numatune.map(nodes::host).transpose()?.unwrap_or_default();
    board.placement = nodes::placement(root.find("vcpu"), numatune)?;
    board.numa_policy = numatune.map(nodes::policy).transpose()?.flatten();
    let said = root.find("features").map(parts::features).transpose()?.unwrap_or_default();
    let others = board.features.unwrap_or_default();
    let features = Features { hyper_v_panic: others.hyper_v_panic, tpm_tis: others.tpm_tis, ..said };
    board.features = (features != Features::default()).then_some(features);
    if let Some(os) = root.find("os") {
        (board.menu_timeout, board.boot_retry) = boot(os)?;
    }
    if let Some(e) = root.find("clock") {
        board.hpet = hpet(e);
        let said = clock(e)?;
        (board.clock_start, board.clock_zone) = (said.start, said.zone);
        if said.real {
            board.features.get_or_insert_default().real_time_clock = true;
        }
    }
    board.main_pool = root.find("defaultiothread").map(nodes::main_pool).transpose()?.flatten();
    board.smbios = sysinfo::of(root)?;
    if let Some(pm) = root.find("pm") {
        (board.sleeps, board.hibernates) = sleep(pm);
    }
    board.memory = backed.and_then(backing);
    board.generation = root.find("genid").map(generation).transpose()?;
    demand_sense(&board)?;
    Ok(board)
}

/// What a `<genid>` says.
pub fn generation(e: &Element) -> Result<Uuid, VirError> {
    let text = e.body().trim();
    if text.is_empty() {
        return Err(refuse("genid", "is not made up; say the UUID"));
    }
    Uuid::parse_str(text).map_err(|_| wrong(format!("malformed genid element '{text}'")))
}

/// What does not fit together is told in the words of the keys otherwise.
fn demand_sense(board: &Board) -> Result<(), VirError> {
    // The nodes that its memory is spread over are said by a limit.
    let spread = board.numa_policy.is_some() && !board.placement.memory;
    let nodes = spread.then(|| (tuning::NODES.to_owned(), "0".to_owned()));
    let config = board.keys().into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)));
    Board::of(&config.chain(nodes).collect()).map(drop).map_err(|e| {
        let of = e.field.as_deref().unwrap_or_default();
        let element = [
            ("numa.host", "numatune memnode"),
            ("numa.memory", "memoryBacking"),
            ("memory.modules", "memory"),
            ("memory.slots", "maxMemory"),
            ("numa", "numa"),
            ("iommu", "iommu"),
            ("smbios", "sysinfo"),
            ("video.render", "graphics gl"),
            ("video", "video"),
            ("usb.filter", "redirfilter"),
            ("usb", "controller"),
            ("sound", "sound"),
            ("input", "input"),
            ("virtio", "controller"),
            ("scsi", "controller"),
            ("rng", "rng"),
            ("features", "features"),
        ];
        let element = element.iter().find(|(key, _)| of.contains(key)).map_or("devices", |(_, e)| e);
        refuse(element, e.message)
    })
}

/// How a `<memoryBacking>` wants the memory of a machine.
pub fn backing(e: &Element) -> Option<Memory> {
    let is = |name: &str, attribute: &str, value: &str| {
        e.find(name).is_some_and(|inner| inner.attribute(attribute) == Some(value))
    };
    let memory = Memory {
        file: is("source", "type", "memfd"),
        // Huge pages are of a file system that is in memory, whatever else is said.
        disk: is("source", "type", "file") && e.find("hugepages").and_then(of_all).is_none(),
        locked: e.find("locked").is_some(),
        shared: is("access", "mode", "shared"),
        allocated: is("allocation", "mode", "immediate"),
        unmerged: e.find("nosharepages").is_some(),
        pages: e.find("hugepages").and_then(of_all),
    };
    (memory != Memory::default()).then_some(memory)
}

/// The size of the pages of all of it, or those that the host has by default; nothing where only single nodes have any.
fn of_all(hugepages: &Element) -> Option<Option<ByteSize>> {
    let all = hugepages.elements().iter().find(|p| p.attribute("nodeset").is_none());
    match (hugepages.elements().is_empty(), all) {
        (true, _) => Some(None),
        (false, all) => all.and_then(nodes::page).map(Some),
    }
}

/// Does a `<memoryBacking>` say nothing else?
pub fn is_backing(e: &Element) -> bool {
    let only = |inner: &Element, known: &[(&str, &[&str])]| {
        inner.elements().is_empty()
            && inner.attributes().all(|(name, value)| {
                known.iter().any(|(k, values)| *k == name && (values.is_empty() || values.contains(&value)))
            })
    };
    e.elements().iter().all(|inner| match inner.name() {
        "source" => only(inner, &[("type", &["memfd", "anonymous", "file"])]),
        "locked" => only(inner, &[]),
        "access" => only(inner, &[("mode", &["shared", "private"])]),
        "allocation" => only(inner, &[("mode", &["immediate", "ondemand"])]),
        "nosharepages" => only(inner, &[]),
        "hugepages" => inner.attributes().next().is_none() && nodes::is_possible(inner),
        // No memory of a machine is a file with a name, of which anything would be written back when it ends.
        "discard" => only(inner, &[]),
        _ => false,
    })
}

/// The states of sleep that a `<pm>` offers: to memory, to the disk.
pub fn sleep(pm: &Element) -> (bool, bool) {
    let on = |name: &str| pm.find(name).is_some_and(|e| e.attribute("enabled") == Some("yes"));
    (on("suspend-to-mem"), on("suspend-to-disk"))
}

/// How long the menu of an `<os>` waits, where that is not as usual, and when a firmware that found nothing begins anew.
pub fn boot(os: &Element) -> Result<(Option<u32>, Option<u32>), VirError> {
    let short = |e: &Element, name: &str, n: u32| match n {
        0..=65535 => Ok(n),
        _ => Err(wrong(format!("'{name}' of <{}> is 0 to 65535", e.name()))),
    };
    let timeout = match os.find("bootmenu").filter(|e| e.attribute("enable") == Some("yes")) {
        Some(e) => {
            number(e, "timeout")?.filter(|n| *n != 5000).map(|n| short(e, "timeout", n)).transpose()?
        }
        None => None,
    };
    let retry = match os.find("bios").filter(|e| e.attribute("rebootTimeout") != Some("-1")) {
        Some(e) => number(e, "rebootTimeout")?.map(|n| short(e, "rebootTimeout", n)).transpose()?,
        None => None,
    };
    Ok((timeout, retry))
}

/// Attributes of a cell; the last are looked at by [`nodes`].
const CELL: &[&str] = &["id", "cpus", "memory", "unit", "memAccess", "discard"];

/// How a `<cpu>` lays out processors and memory. One socket with a core for each processor is how machines are anyway.
pub fn layout(cpu: &Element, cpus: u32) -> Result<(Option<Topology>, Vec<NumaCell>), VirError> {
    let topology = match cpu.find("topology") {
        None => None,
        Some(e) => {
            let of = |name: &str| Ok::<u32, VirError>(number(e, name)?.unwrap_or(1));
            let found = Topology {
                sockets: of("sockets")?,
                dies: of("dies")?,
                cores: of("cores")?,
                threads: of("threads")?,
            };
            if of("clusters")? != 1 {
                return Err(refuse("cpu topology", "there are no clusters"));
            }
            if !(1..=1024).contains(&found.processors()) {
                return Err(wrong("the topology of the CPU has no processor, or too many"));
            }
            if found.processors() < cpus {
                return Err(refuse("cpu topology", format!("{cpus} processors do not fit")));
            }
            let usual = found == Topology { sockets: 1, dies: 1, cores: cpus, threads: 1 };
            (!usual).then_some(found)
        }
    };
    let Some(numa) = cpu.find("numa") else { return Ok((topology, vec![])) };
    if let Some(other) = numa.elements().iter().find(|e| e.name() != "cell") {
        return Err(refuse("numa", format!("<{}> is not there", other.name())));
    }
    let mut cells = vec![];
    for (n, e) in (0u32..).zip(numa.elements()) {
        if let Some((name, _)) = e.attributes().find(|(name, _)| !CELL.contains(name)) {
            return Err(refuse("numa cell", format!("'{name}' is not there")));
        }
        if let Some(inner) = e.elements().iter().find(|inner| inner.name() != "distances") {
            return Err(refuse("numa cell", format!("<{}> is not there", inner.name())));
        }
        let id = number(e, "id")?.unwrap_or(n);
        let cpus = match e.attribute("cpus").filter(|c| !c.trim().is_empty()) {
            None => vec![],
            Some(text) => parse_ranges(text).ok_or_else(|| {
                refuse("numa cell cpus", format!("'{text}': say ranges apart from each other, such as 0-3,8"))
            })?,
        };
        let memory = e.attribute("memory").ok_or_else(|| wrong("a cell of <numa> has no memory"))?;
        let size = Element::text("memory", memory).with("unit", e.attribute("unit").unwrap_or("KiB"));
        let memory = ByteSize::mib(super::read::kib(&size)?.div_ceil(1024));
        cells.push((id, NumaCell { cpus, memory }));
    }
    cells.sort_by_key(|(id, _)| *id);
    if (0u32..).zip(&cells).any(|(n, (id, _))| n != *id) {
        return Err(wrong("cells of <numa> are numbered from 0"));
    }
    let mut all: Vec<_> = cells.iter().flat_map(|(_, c)| c.cpus.iter().copied()).collect();
    all.sort_unstable();
    if all.windows(2).any(|w| w[0].1 >= w[1].0) {
        return Err(wrong("NUMA cells have processors in common"));
    }
    let room = topology.map_or(cpus, |t| t.processors());
    if all.last().is_some_and(|(_, last)| *last >= room) {
        return Err(refuse("numa cell cpus", format!("the machine has {room} processors")));
    }
    Ok((topology, cells.into_iter().map(|(_, cell)| cell).collect()))
}

/// Where a device of USB is.
pub(super) fn place(e: &Element) -> Result<Option<(u32, String)>, VirError> {
    let Some(address) = e.find("address").filter(|a| a.attribute("type") == Some("usb")) else {
        return Ok(None);
    };
    let Some(port) = address.attribute("port") else { return Ok(None) };
    Ok(Some((number(address, "bus")?.unwrap_or(0), port.to_owned())))
}

/// What its devices are of it.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub fn devices(all: &[Element]) -> Result<Board, VirError> {
    let mut board = Board::default();
    let mut controllers: Vec<(u32, bool, UsbController)> = vec![];
    let mut video: Vec<(bool, Video)> = vec![];
    let mut screens = 0;
    for e in all {
        let model = e.attribute("model");
        match e.name() {
            "controller" if e.attribute("type") == Some("usb") => {
                let Some(one) = controller(e)? else { continue };
                let next = controllers.iter().filter(|(.., c)| !c.is_companion()).count() as u32;
                let at = if one.is_companion() { next.saturating_sub(1) } else { next };
                controllers.push((number(e, "index")?.unwrap_or(at), one.is_companion(), one));
            }
            "hub" => board.usb_devices.push(UsbDevice { kind: UsbKind::Hub, at: place(e)? }),
            "input" => {
                let kind = e.attribute("type").unwrap_or_default();
                let bus = e.attribute("bus").unwrap_or(if kind == "tablet" { "usb" } else { "ps2" });
                match (bus, of(USB_KINDS, kind), of(POINTERS, kind)) {
                    ("usb", Some(kind), _) => board.usb_devices.push(UsbDevice { kind, at: place(e)? }),
                    ("virtio", _, Some(kind)) => board.inputs.push(kind),
                    _ => {}
                }
            }
            "sound" => match (model, model.and_then(|m| of(SOUNDS, m))) {
                (_, Some(sound)) => {
                    let codecs = codecs(e, sound)?;
                    if !codecs.is_empty() {
                        board.sound_codecs.push((board.sound.len() as u32, codecs));
                    }
                    board.sound.push(sound);
                }
                (Some("usb"), _) => board.usb_devices.push(UsbDevice { kind: UsbKind::Audio, at: place(e)? }),
                _ => {
                    let text = format!(
                        "'{}' is not there; ac97, es1370, ich6, ich9, sb16, pcspk and usb are",
                        model.unwrap_or_default()
                    );
                    return Err(refuse("sound model", text));
                }
            },
            "video" => {
                screens += 1;
                let model = e.find("model");
                let name = model.and_then(|m| m.attribute("type")).unwrap_or("vga");
                let drawn = model.and_then(|m| m.find("acceleration")).and_then(|a| a.attribute("accel3d"));
                // Of those that a card draws the name is the same.
                let name = match (name, drawn) {
                    ("virtio", Some("yes")) => "virtio-gl",
                    ("virtio-gl", _) => "",
                    (name, _) => name,
                };
                let found = of(VIDEOS, name).ok_or_else(|| {
                    refuse(
                        "video model",
                        format!("'{name}' is not there; vga, cirrus, qxl, virtio, vmvga, bochs, ramfb and none are"),
                    )
                })?;
                video.push((model.and_then(|m| m.attribute("primary")) == Some("yes"), found));
            }
            "graphics" if e.attribute("type") == Some("egl-headless") => {
                let node = e.find("gl").and_then(|gl| gl.attribute("rendernode"));
                if board.render.replace(node.unwrap_or(AUTO_RENDER).to_owned()).is_some() {
                    return Err(refuse("graphics", "a machine has one of type egl-headless"));
                }
            }
            "watchdog" => {
                if board.watchdog.is_some() {
                    return Err(refuse("watchdog", "a machine has one"));
                }
                let model = of(WATCHDOGS, model.unwrap_or_default())
                    .ok_or_else(|| refuse("watchdog model", "i6300esb and ib700 are there"))?;
                let action = e.attribute("action").unwrap_or("reset");
                let end = of(WATCHDOG_ENDS, action)
                    .ok_or_else(|| refuse("watchdog action", format!("'{action}' is not there")))?;
                board.watchdog = Some(Watchdog { model, end });
            }
            "panic" => {
                let features = board.features.get_or_insert_default();
                let there =
                    if model == Some("hyperv") { &mut features.hyper_v_panic } else { &mut board.panic };
                if std::mem::replace(there, true) {
                    return Err(refuse("panic", "a machine has one of a model"));
                }
            }
            "tpm" if model == Some("tpm-tis") => board.features.get_or_insert_default().tpm_tis = true,
            "iommu" => {
                let iommu = parts::iommu(e)?;
                if board.iommu.replace(iommu).is_some() {
                    return Err(refuse("iommu", "a machine has one"));
                }
            }
            "rng" if plugs::is(e) => {}
            "rng" => board.rngs.push(parts::rng(e)?),
            "redirfilter" if board.usb_filter.is_some() => {
                return Err(refuse("redirfilter", "a machine has one"));
            }
            "redirfilter" => board.usb_filter = Some(plugs::filter(e)?),
            "memory" => board.modules.push(nodes::module(e)?),
            "memballoon" => {
                board.balloon_deflates = e.attribute("autodeflate") == Some("on");
                board.balloon_period =
                    e.find("stats").map(|stats| number(stats, "period")).transpose()?.flatten();
            }
            _ => {}
        }
    }
    // In the order in which they are shown, and a hub before what may be at it.
    board.usb_devices.sort_by_key(|d| match d.kind {
        UsbKind::Hub => 0,
        UsbKind::Keyboard | UsbKind::Mouse | UsbKind::Tablet => 1,
        UsbKind::Audio => 2,
    });
    // What has no master of its own number belongs to the one before it; masters come before their companions.
    controllers.sort_by_key(|(index, companion, _)| (*index, *companion));
    board.usb = controllers.into_iter().map(|(.., one)| one).collect();
    let on_usb = |e: &Element| hostdevs::is_usb(e) || plugs::is(e) && e.name() != "rng";
    if board.usb.is_empty() && (!board.usb_devices.is_empty() || all.iter().any(on_usb)) {
        // As QEMU's machines have it.
        board.usb.push(UsbController { model: UsbModel::Piix3Uhci, ports: None });
    }
    video.sort_by_key(|(primary, _)| !*primary);
    if screens > 0 && !(screens == 1 && video[0].1 == Video::Vga) {
        board.video = video.into_iter().map(|(_, one)| one).collect();
    }
    if board.rngs == [Rng::default()] {
        board.rngs.clear();
    }
    board.virtio = parts::virtio(all)?;
    board.features = board.features.filter(|f| *f != Features::default());
    // Controllers of SCSI that only disks are at are known when those are: they are read by [`super::read`].
    // Whether an IOMMU and modules fit is told by what else the domain says.
    demand_sense(&Board { iommu: None, modules: vec![], ..board.clone() })?;
    Ok(board)
}

/// The codecs of a `<sound>`, where they are not as usual.
fn codecs(e: &Element, card: Sound) -> Result<Vec<SoundCodec>, VirError> {
    let one = |codec: &Element| {
        let name = codec.attribute("type").unwrap_or_default();
        let text = format!("'{name}' is not there; duplex, micro and output are");
        of(SOUND_CODECS, name).ok_or_else(|| refuse("sound codec", text))
    };
    let all = e.all("codec").map(one).collect::<Result<Vec<_>, _>>()?;
    let has = matches!(card, Sound::Ich6 | Sound::Ich9);
    match all[..] == [SoundCodec::Duplex] {
        true => Ok(vec![]),
        false if has || all.is_empty() => Ok(all),
        false => Err(refuse("sound codec", "cards of the models ich6 and ich9 have them")),
    }
}

/// A controller of USB; nothing for the word that there is none.
fn controller(e: &Element) -> Result<Option<UsbController>, VirError> {
    let name = match e.attribute("model") {
        Some("none") => return Ok(None),
        None | Some("default") => "piix3-uhci",
        Some("pci-ohci") => "pci-ohci",
        Some(name) => name,
    };
    let model = of(USB_MODELS, name).ok_or_else(|| {
        refuse(
            "controller model",
            format!(
                "'{name}' is not there for usb; piix3-uhci, ehci, ich9-ehci1, qemu-xhci and their like are"
            ),
        )
    })?;
    let mut one = UsbController { model, ports: None };
    if one.is_companion() {
        one.ports = e.find("master").map(|m| number(m, "startport")).transpose()?.flatten();
    } else if matches!(model, UsbModel::NecXhci | UsbModel::QemuXhci) {
        one.ports = number(e, "ports")?;
    } else if e.attribute("ports").is_some() {
        return Err(refuse("controller ports", "xHCI controllers have a number of them"));
    }
    Ok(Some(one))
}

/// The classes of devices that are the board's.
const CLASSES: &[&str] = &[
    "controller",
    "hub",
    "input",
    "sound",
    "video",
    "watchdog",
    "panic",
    "iommu",
    "rng",
    "memory",
    "redirfilter",
];

/// Is a device of a document held by the board?
pub fn holds(e: &Element) -> bool {
    match e.name() {
        "controller" => e.attribute("type") == Some("usb"),
        "input" => {
            let kind = e.attribute("type").unwrap_or_default();
            e.attribute("bus").unwrap_or(if kind == "tablet" { "usb" } else { "ps2" }) != "ps2"
        }
        name => CLASSES.contains(&name),
    }
}

/// Classes of which what was kept says something else than what the machine has.
pub fn stale(kept: &[Element], now: &Board) -> Vec<&'static str> {
    let was = devices(kept).unwrap_or_default();
    let mut stale = vec![];
    if (&was.usb, &was.usb_devices, &was.inputs, &was.sound, &was.sound_codecs)
        != (&now.usb, &now.usb_devices, &now.inputs, &now.sound, &now.sound_codecs)
    {
        stale.extend(["controller", "hub", "input", "sound"]);
    }
    if was.video != now.video {
        stale.push("video");
    }
    if was.render != now.render {
        stale.push("graphics");
    }
    if was.watchdog != now.watchdog {
        stale.push("watchdog");
    }
    let says = |board: &Board| board.features.is_some_and(|f| f.hyper_v_panic);
    if (was.panic, says(&was)) != (now.panic, says(now)) {
        stale.push("panic");
    }
    if was.iommu != now.iommu {
        stale.push("iommu");
    }
    if was.rngs != now.rngs {
        stale.push("rng");
    }
    if was.modules != now.modules {
        stale.push("memory");
    }
    if was.usb_filter != now.usb_filter {
        stale.push("redirfilter");
    }
    stale
}

/// The devices of these classes.
pub fn shown(board: &Board, classes: &[&str]) -> Vec<Element> {
    let mut all = vec![];
    let wanted = |class: &str| classes.contains(&class);
    let at = |e: Element, device: &UsbDevice| match &device.at {
        None => e,
        Some((bus, port)) => {
            e.child(Element::new("address").with("type", "usb").with("bus", bus).with("port", port))
        }
    };
    if wanted("controller") {
        let mut index = 0;
        for (n, one) in board.usb.iter().enumerate() {
            index += u32::from(n > 0 && !one.is_companion());
            let mut e = Element::new("controller")
                .with("type", "usb")
                .with("index", index)
                .with("model", one.model.as_str());
            match (one.is_companion(), one.ports) {
                (true, Some(port)) => e.push(Element::new("master").with("startport", port)),
                (false, Some(ports)) => e.set("ports", ports),
                _ => {}
            }
            all.push(e);
        }
        for device in &board.usb_devices {
            all.push(match device.kind {
                UsbKind::Hub => at(Element::new("hub").with("type", "usb"), device),
                UsbKind::Audio => at(Element::new("sound").with("model", "usb"), device),
                kind => at(Element::new("input").with("type", kind.as_str()).with("bus", "usb"), device),
            });
        }
        let input = |one: &Pointer| Element::new("input").with("type", one.as_str()).with("bus", "virtio");
        all.extend(board.inputs.iter().map(input));
        for (n, one) in (0u32..).zip(&board.sound) {
            let codecs =
                board.sound_codecs.iter().filter(|(card, _)| *card == n).flat_map(|(_, codecs)| codecs);
            let codec = |codec: &SoundCodec| Element::new("codec").with("type", codec.as_str());
            all.push(Element::new("sound").with("model", one.as_str()).children(codecs.map(codec)));
        }
    }
    if wanted("video") {
        let model = |one: &Video| match one {
            Video::VirtioGl => {
                let drawn = Element::new("acceleration").with("accel3d", "yes");
                Element::new("model").with("type", "virtio").child(drawn)
            }
            one => Element::new("model").with("type", one.as_str()),
        };
        all.extend(board.video.iter().map(|one| Element::new("video").child(model(one))));
    }
    if let Some(node) = board.render.as_deref().filter(|_| wanted("graphics")) {
        let gl = Some(node)
            .filter(|node| *node != AUTO_RENDER)
            .map(|node| Element::new("gl").with("rendernode", node));
        let mut e = Element::new("graphics").with("type", "egl-headless");
        e.push_some(gl);
        all.push(e);
    }
    if let Some(Watchdog { model, end }) = board.watchdog.filter(|_| wanted("watchdog")) {
        all.push(Element::new("watchdog").with("model", model.as_str()).with("action", end.as_str()));
    }
    if board.panic && wanted("panic") {
        all.push(Element::new("panic").with("model", "isa"));
    }
    if board.features.is_some_and(|f| f.hyper_v_panic) && wanted("panic") {
        all.push(Element::new("panic").with("model", "hyperv"));
    }
    all.extend(board.iommu.iter().filter(|_| wanted("iommu")).map(parts::shown_iommu));
    let usual = [Rng::default()];
    let rngs = if board.rngs.is_empty() { &usual[..] } else { &board.rngs };
    all.extend(rngs.iter().filter(|_| wanted("rng")).map(parts::shown_rng));
    all.extend(board.modules.iter().filter(|_| wanted("memory")).map(nodes::shown_module));
    all.extend(
        board.usb_filter.iter().filter(|_| wanted("redirfilter")).map(|text| plugs::shown_filter(text)),
    );
    all
}

/// Adds the layout of processors and memory to a `<cpu>`.
pub fn show_layout(cpu: &mut Element, board: &Board) {
    if let Some(t) = board.topology {
        let e = Element::new("topology").with("sockets", t.sockets).with("dies", t.dies);
        cpu.push(e.with("cores", t.cores).with("threads", t.threads));
    }
    if board.numa.is_empty() {
        return;
    }
    let cell = |(n, cell): (usize, &NumaCell)| {
        let cpus = Some(ranges(&cell.cpus)).filter(|c| !c.is_empty());
        let e = Element::new("cell").with("id", n).with_some("cpus", cpus);
        let mut e = e.with("memory", cell.memory.bytes() / 1024).with("unit", "KiB");
        nodes::show_cell(&mut e, n as u32, board);
        e
    };
    cpu.push(Element::new("numa").children(board.numa.iter().enumerate().map(cell)));
}

/// What else of a domain says what is on the board: elements of it, in the place of those of their names.
pub fn show_domain(root: &mut Element, board: &Board) {
    if let Some(generation) = board.generation {
        root.elements_mut().retain(|e| e.name() != "genid");
        root.push(Element::text("genid", generation));
    }
    if let Some(pool) = board.main_pool {
        root.elements_mut().retain(|e| e.name() != "defaultiothread");
        root.push(nodes::shown_main_pool(pool));
    }
    if !board.smbios.is_empty() {
        root.elements_mut().retain(|e| e.name() != "sysinfo");
        root.push(sysinfo::shown(&board.smbios));
    }
    if let Some(room) = board.slots {
        root.elements_mut().retain(|e| e.name() != "maxMemory");
        root.push(nodes::shown_slots(room));
    }
    let of_nodes = nodes::pages_of(board);
    if board.memory.is_some() || !of_nodes.is_empty() {
        let memory = board.memory.unwrap_or_default();
        root.elements_mut().retain(|e| e.name() != "memoryBacking");
        let mut all = Element::new("memoryBacking");
        if memory.pages.is_some() || !of_nodes.is_empty() {
            let page = |s: ByteSize| Element::new("page").with("size", s.bytes() / 1024).with("unit", "KiB");
            let whole = memory.pages.flatten().map(page);
            all.push(
                Element::new("hugepages").children(whole.into_iter().chain(nodes::shown_pages(&of_nodes))),
            );
        }
        for (on, name, attribute, value) in [
            (memory.unmerged, "nosharepages", "", ""),
            (memory.file, "source", "type", "memfd"),
            (memory.disk, "source", "type", "file"),
            (memory.locked, "locked", "", ""),
            (memory.shared, "access", "mode", "shared"),
            (memory.allocated, "allocation", "mode", "immediate"),
        ] {
            if on {
                all.push(Element::new(name).with_some(attribute, Some(value).filter(|v| !v.is_empty())));
            }
        }
        root.push(all);
    }
    if board.sleeps || board.hibernates {
        root.elements_mut().retain(|e| e.name() != "pm");
        let state =
            |name: &'static str, on: bool| Element::new(name).with("enabled", if on { "yes" } else { "no" });
        let all = [state("suspend-to-mem", board.sleeps), state("suspend-to-disk", board.hibernates)];
        root.push(Element::new("pm").children(all));
    }
    if board.hpet
        && let Some(clock) = root.elements_mut().iter_mut().find(|e| e.name() == "clock")
        && !hpet(clock)
    {
        clock.push(Element::new("timer").with("name", "hpet").with("present", "yes"));
    }
}

/// What there is of a watchdog in a document that stands alone, for the tables of what is kept.
pub fn is_watchdog(e: &Element) -> bool {
    let model = e.attribute("model").and_then(|m| of(WATCHDOGS, m));
    let end: Option<WatchdogEnd> = of(WATCHDOG_ENDS, e.attribute("action").unwrap_or("reset"));
    matches!(model, Some(WatchdogModel::I6300esb | WatchdogModel::Ib700)) && end.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml::read::document;

    fn devices_of(text: &str) -> Result<Board, VirError> {
        devices(document(&format!("<devices>{text}</devices>")).unwrap().elements())
    }

    #[test]
    fn devices_are_read_and_shown_the_same() {
        let text = "<controller type='usb' index='0' model='ich9-ehci1'/>\
            <controller type='usb' index='0' model='ich9-uhci1'><master startport='0'/></controller>\
            <controller type='usb' index='0' model='ich9-uhci2'><master startport='2'/></controller>\
            <controller type='usb' index='1' model='nec-xhci' ports='8'/>\
            <input type='tablet' bus='usb'><address type='usb' bus='0' port='1.2'/></input>\
            <hub type='usb'><address type='usb' bus='0' port='1'/></hub>\
            <input type='mouse' bus='ps2'/><input type='keyboard' bus='virtio'/>\
            <sound model='ich6'><codec type='duplex'/></sound><sound model='usb'/>\
            <video><model type='qxl'/></video><video><model type='qxl' primary='yes'/></video>\
            <watchdog model='i6300esb' action='poweroff'/><panic model='isa'/><panic model='hyperv'/>\
            <iommu model='virtio'/><rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>\
            <rng model='virtio'><rate bytes='5' period='1000'/><backend model='random'>/dev/urandom</backend></rng>";
        let board = devices_of(text).unwrap();
        let keys: Vec<_> = board.keys().into_iter().filter_map(|(k, v)| Some((k, v?))).collect();
        assert_eq!(
            keys,
            [
                ("hardware.features", "hyperv-panic".to_owned()),
                ("hardware.input", "keyboard".into()),
                ("hardware.iommu", "virtio".into()),
                ("hardware.panic", "true".into()),
                ("hardware.rng", "plain,rate=5/1000".into()),
                ("hardware.sound", "ich6".into()),
                ("hardware.usb", "ich9-ehci1,ich9-uhci1:0,ich9-uhci2:2,nec-xhci:8".into()),
                ("hardware.usb.devices", "hub@0:1,tablet@0:1.2,audio".into()),
                ("hardware.video", "qxl,qxl".into()),
                ("hardware.watchdog", "i6300esb:poweroff".into()),
            ]
        );
        let again = shown(&board, CLASSES);
        assert_eq!(devices(&again).unwrap(), board);
        assert_eq!(stale(&again, &board), [] as [&str; 0]);
        let without = Board { sound: vec![], video: vec![], ..board };
        assert_eq!(stale(&again, &without), ["controller", "hub", "input", "sound", "video"]);
    }

    #[test]
    fn a_device_of_usb_has_a_controller_and_a_vga_card_is_usual() {
        let board =
            devices_of("<input type='tablet'/><video><model type='vga' vram='16384'/></video>").unwrap();
        assert_eq!(board.usb[0].model, UsbModel::Piix3Uhci);
        assert!(board.video.is_empty());
        assert!(devices_of("<controller type='usb' model='none'/><video/>").unwrap().is_usual());
        for (text, element) in [
            ("<sound model='gus'/>", "sound model: "),
            ("<sound model='ich6'><codec type='loud'/></sound>", "sound codec: "),
            ("<video><model type='parallels'/></video>", "video model: "),
            ("<video><model type='none'/></video><video><model type='vga'/></video>", "video: "),
            ("<watchdog model='itco'/>", "watchdog model: "),
            ("<watchdog model='ib700' action='dump'/>", "watchdog action: "),
            ("<panic/><panic/>", "panic: "),
            ("<panic model='hyperv'/><panic model='hyperv'/>", "panic: "),
            ("<iommu model='virtio'/><iommu model='intel'/>", "iommu: "),
            ("<iommu model='smmuv3'/>", "iommu model: "),
            ("<controller type='usb' model='vt82c686b-uhci'/>", "controller model: "),
            ("<controller type='usb' model='ich9-uhci1'/>", "controller: "),
            ("<controller type='usb' model='ehci' ports='4'/>", "controller ports: "),
        ] {
            let e = devices_of(text).unwrap_err();
            assert!(e.text.starts_with(element), "{text}: {}", e.text);
        }
    }

    #[test]
    fn layouts_are_read_and_shown_the_same() {
        let cpu = |text: &str| document(&format!("<cpu>{text}</cpu>")).unwrap();
        let given =
            cpu("<topology sockets='2' cores='2' threads='1'/><numa><cell id='1' cpus='2-3' memory='1000'/>\
             <cell id='0' cpus='0-1' memory='2' unit='MiB'/></numa>");
        let (topology, numa) = layout(&given, 4).unwrap();
        assert_eq!(numa[0], NumaCell { cpus: vec![(0, 1)], memory: ByteSize::mib(2) });
        assert_eq!(numa[1].memory, ByteSize::mib(1), "in whole MiB");
        let board = Board { topology, numa, ..Board::default() };
        let mut shown = Element::new("cpu");
        show_layout(&mut shown, &board);
        assert_eq!(layout(&shown, 4).unwrap(), (board.topology, board.numa.clone()));
        assert_eq!(layout(&cpu("<topology sockets='1' cores='4' threads='1'/>"), 4).unwrap(), (None, vec![]));
        for (text, element) in [
            ("<topology sockets='1' cores='2' threads='1'/>", "cpu topology: "),
            ("<topology sockets='4' clusters='2' cores='1' threads='1'/>", "cpu topology: "),
            ("<numa><cell id='0' cpus='0-3' memory='1024' speed='high'/></numa>", "numa cell: "),
            ("<numa><cell id='0' cpus='0-3' memory='1024'><cache/></cell></numa>", "numa cell: "),
            ("<numa><cell id='0' cpus='0-4' memory='1024'/></numa>", "numa cell cpus: "),
            ("<numa><interconnects/></numa>", "numa: "),
        ] {
            let e = layout(&cpu(text), 4).unwrap_err();
            assert!(e.text.starts_with(element), "{text}: {}", e.text);
        }
    }

    #[test]
    fn the_rest_of_a_domain() {
        let root = document(
            "<domain><genid>0b3c1f9e-7f2c-4d0a-9a53-3a3f6f0f0001</genid><os><bootmenu enable='yes' timeout='3000'/>\
             <bios rebootTimeout='128'/></os><clock offset='absolute' start='60'><timer name='hpet' present='yes'/><timer name='rtc' track='realtime'/></clock>\
             <memoryBacking><hugepages><page size='2' unit='MiB'/></hugepages><nosharepages/>\
             <access mode='shared'/></memoryBacking>\
             <pm><suspend-to-mem enabled='yes'/><suspend-to-disk enabled='no'/></pm></domain>",
        )
        .unwrap();
        let board = read(&root, 1).unwrap();
        assert_eq!((board.menu_timeout, board.boot_retry, board.hpet), (Some(3000), Some(128), true));
        assert_eq!((board.sleeps, board.hibernates), (true, false));
        let memory =
            Memory { shared: true, unmerged: true, pages: Some(Some(ByteSize::mib(2))), ..Memory::default() };
        assert_eq!(board.memory, Some(memory));
        let backing =
            |text: &str| is_backing(&document(&format!("<memoryBacking>{text}</memoryBacking>")).unwrap());
        for text in [
            "",
            "<hugepages/>",
            "<hugepages><page size='1' unit='G'/></hugepages>",
            "<allocation mode='immediate'/>",
            "<hugepages><page size='2' unit='MiB' nodeset='0'/></hugepages>",
            "<discard/>",
            "<locked/><source type='file'/>",
        ] {
            assert!(backing(text), "{text}");
        }
        for text in [
            "<locked unit='KiB'/>",
            "<source type='tape'/>",
            "<allocation mode='immediate' threads='8'/>",
            "<hugepages><page size='3' unit='MiB'/></hugepages>",
            "<hugepages><page size='2' unit='MiB' nodeset='x'/></hugepages>",
            "<hugepages><page size='2' unit='MiB'/><page size='1' unit='G'/></hugepages>",
        ] {
            assert!(!backing(text), "{text}");
        }
        let mut clock = Element::new("clock").with("offset", "utc");
        show_clock(&mut clock, &Clock::of(&board));
        let zone = document("<clock offset='timezone' timezone='Europe/Paris'/>").unwrap();
        assert_eq!(super::clock(&zone).unwrap().zone.as_deref(), Some("Europe/Paris"));
        let mut shown = Element::new("clock");
        show_clock(&mut shown, &super::clock(&zone).unwrap());
        assert_eq!(shown, zone);
        let none = document("<clock offset='timezone' timezone='../x'/>").unwrap();
        assert!(super::clock(&none).is_err());
        let mut shown = Element::new("domain").child(clock);
        show_domain(&mut shown, &board);
        let again = read(&shown, 1).unwrap();
        assert_eq!(Board { menu_timeout: Some(3000), boot_retry: Some(128), ..again }, board);
        assert!(
            read(&document("<domain><genid/></domain>").unwrap(), 1).unwrap_err().text.starts_with("genid: ")
        );
    }
}
