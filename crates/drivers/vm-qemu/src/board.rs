//! What a machine's board has beside processors, memory, disks and NICs, as arguments ([`karst_model::board`]). Pure.
//!
//! Each class of PCI devices has one device number of the root bus, and the place in its list is the function: so addresses
//! follow from the machine's keys alone, and are no others' (disks and NICs have 08 to 17, or root ports).

mod scsi;
mod told;

use crate::{
    argv::fd,
    devices::{Layout, virtio},
};
pub use scsi::{SCSI_BESIDE, demand_scsi, more_scsi, scsi_options, show_identity};
pub use told::{display, main_thread, smbios};

use karst_model::{
    Error, Result,
    board::{
        Board, CellMemory, Features, HostNodes, Iommu, IommuModel, MOST, MOST_USB, Memory, Pointer, Sound,
        SoundCodec, Topology, UsbController, UsbDevice, UsbKind, UsbModel, Video, WatchdogEnd, WatchdogModel,
        ranges,
    },
};
use serde_json::{Value, json};

/// Controllers of USB.
const USB: &str = "00:18";
/// More of them, where machines of type pc have SATA.
const MORE_USB: &str = "00:1c";
/// Sound cards.
const SOUND: &str = "00:19";
/// The watchdog, and input devices after it.
const REST: &str = "00:1a";
/// Screens; the first is where machines without a choice have theirs.
const VIDEO: &str = "00:1b";
/// All of a machine's memory.
pub const MEMORY: &str = "memory";
/// Where sound goes.
pub const AUDIO: &str = "audio";
/// The IOMMU of virtio; machines of type pc, which have none, have random numbers from there.
const IOMMU: &str = "00:1d.0";

/// An option and its value.
type Argument = (&'static str, String);

/// Puts a device at a function; the others of its slot are told apart from it by the first.
fn at(layout: Layout, mut device: Value, slot: &str, function: usize, many: bool) -> Result<String> {
    layout.put(&mut device, "hardware", &format!("{slot}.{function}"))?;
    if function == 0 && many {
        device["multifunction"] = true.into();
    }
    Ok(device.to_string())
}

/// `-smp`'s value.
///
/// # Errors
/// Invalid when there are more processors than it has room for.
pub fn processors(topology: Option<&Topology>, cpus: u32, most: u32) -> Result<String> {
    let Some(t) = topology else {
        return Ok(format!("cpus={cpus},maxcpus={most},sockets=1,cores={most},threads=1"));
    };
    let room = t.processors();
    if cpus > room {
        let text = format!("{cpus} processors (limits.cpu) do not fit: there is room for {room}");
        return Err(Error::invalid("config.hardware.cpu.topology", text));
    }
    // Dies are said where there are several alone: other machines' processors do not have them.
    let dies = if t.dies > 1 { format!("dies={},", t.dies) } else { String::new() };
    Ok(format!(
        "cpus={cpus},maxcpus={room},sockets={},{dies}cores={},threads={}",
        t.sockets, t.cores, t.threads
    ))
}

/// `-rtc`'s value.
pub fn clock(board: &Board, local_time: bool) -> String {
    // QEMU is told the time zone by its environment.
    let base = match (board.clock_start, local_time || board.clock_zone.is_some()) {
        (Some(seconds), _) => date(seconds),
        (None, true) => "localtime".to_owned(),
        (None, false) => "utc".to_owned(),
    };
    let real = board.features.is_some_and(|f| f.real_time_clock);
    format!("base={base}{}", if real { ",clock=rt" } else { "" })
}

/// Seconds since 1970 as a date and time, up to the year 9999.
fn date(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Years begin in March here, so that the day that some have more is their last.
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = year + era * 400 + next;
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
}

/// `-accel`'s value with KVM.
pub fn kvm(features: &Features) -> String {
    let mut text = "kvm".to_owned();
    if features.split_irqchip {
        text.push_str(",kernel-irqchip=split");
    }
    if let Some(entries) = features.dirty_ring {
        text.push_str(&format!(",dirty-ring-size={entries}"));
    }
    text
}

/// `-accel`'s value without it.
pub fn tcg(features: &Features) -> String {
    let size = features.translations.map(|size| format!(",tb-size={size}")).unwrap_or_default();
    format!("tcg,thread=multi{size}")
}

/// The IOMMU.
///
/// # Errors
/// Invalid for a machine that is not of type q35.
pub fn iommu(one: &Iommu, layout: Layout) -> Result<Value> {
    if layout.pc {
        return Err(Error::invalid("config.hardware.iommu", "machines of type q35 have an IOMMU"));
    }
    if one.model == IommuModel::Virtio {
        let mut device = json!({"driver": "virtio-iommu-pci", "id": "iommu"});
        layout.put(&mut device, "hardware.iommu", IOMMU)?;
        return Ok(device);
    }
    let mut device = json!({"driver": "intel-iommu", "id": "iommu"});
    let switch = |on: bool| if on { "on" } else { "off" };
    for (property, state) in [("intremap", one.interrupts), ("eim", one.extended)] {
        if let Some(on) = state {
            device[property] = switch(on).into();
        }
    }
    for (property, on) in [("caching-mode", one.caching), ("device-iotlb", one.iotlb)] {
        if on {
            device[property] = true.into();
        }
    }
    if let Some(width) = one.width {
        device["aw-bits"] = width.into();
    }
    Ok(device)
}

/// How the memory of a node is had of the host.
fn of_cell(all: Option<&Memory>, cell: Option<&CellMemory>) -> Option<Memory> {
    let Some(cell) = cell else { return all.copied() };
    let mut memory = all.copied().unwrap_or_default();
    if let Some(shared) = cell.shared {
        memory.shared = shared;
    }
    if let Some(size) = cell.pages {
        memory.pages = Some(Some(size));
    }
    Some(memory)
}

/// Keeps a part of memory to nodes of the host.
fn keep_to(object: &mut Value, host: &HostNodes) {
    let nodes: Vec<u32> = host.nodes.iter().flat_map(|(first, last)| *first..=*last).collect();
    object["host-nodes"] = nodes.into();
    object["policy"] = host.policy.as_str().into();
}

/// The one of a node, or of a card.
fn of_node<T>(all: &[(u32, T)], node: usize) -> Option<&T> {
    all.iter().find(|(n, _)| *n as usize == node).map(|(_, value)| value)
}

/// What a part of a machine's memory is.
fn backend(memory: Option<&Memory>, id: &str, size: u64) -> Value {
    let Some(m) = memory else {
        return json!({"qom-type": "memory-backend-ram", "id": id, "size": size});
    };
    let file = m.file || m.shared || m.pages.is_some();
    let on_disk = m.disk && m.pages.is_none();
    let kind = match (on_disk, file) {
        (true, _) => "memory-backend-file",
        (false, true) => "memory-backend-memfd",
        (false, false) => "memory-backend-ram",
    };
    let mut object = json!({"qom-type": kind, "id": id, "size": size, "share": m.shared});
    if on_disk {
        // A directory: what QEMU makes there has no name a moment later.
        object["mem-path"] = format!("/proc/self/fd/{}", fd::MEMORY).into();
    }
    if m.allocated {
        object["prealloc"] = true.into();
    }
    if let Some(pages) = m.pages {
        object["hugetlb"] = true.into();
        if let Some(size) = pages {
            object["hugetlbsize"] = size.bytes().into();
        }
    }
    object
}

/// The same with memory that others can be handed: all of it, but for parts that are said to be the machine's alone.
pub fn shared(mut board: Board) -> Board {
    board.memory.get_or_insert_default().shared = true;
    board
}

/// The key by which some of its memory is the machine's alone.
pub fn private(board: &Board) -> Option<&'static str> {
    let alone = |memory: &CellMemory| memory.shared == Some(false);
    if board.numa_memory.iter().any(|(_, memory)| alone(memory)) {
        return Some("hardware.numa.memory");
    }
    board.modules.iter().any(|m| alone(&m.memory)).then_some("hardware.memory.modules")
}

/// Is all memory of a machine without nodes of its own had in a way of its own?
pub fn has_backend(board: &Board) -> bool {
    board.numa.is_empty() && (board.memory.is_some() || !board.numa_host.is_empty())
}

/// Nodes of memory, or all of it where the host is to have it in a way of its own.
///
/// # Errors
/// Invalid when they are not the machine's memory.
pub fn memory(board: &Board, memory: u64) -> Result<Vec<Argument>> {
    let cells = &board.numa;
    if cells.is_empty() && has_backend(board) {
        let mut object = backend(board.memory.as_ref(), MEMORY, memory);
        if let Some(host) = of_node(&board.numa_host, 0) {
            keep_to(&mut object, host);
        }
        return Ok(vec![("-object", object.to_string())]);
    }
    let all = cells.iter().fold(0u64, |all, c| all.saturating_add(c.memory.bytes()));
    if !cells.is_empty() && all != memory {
        let text =
            format!("its nodes have {} MiB, and the machine {} MiB (limits.memory)", all >> 20, memory >> 20);
        return Err(Error::invalid("config.hardware.numa", text));
    }
    let mut arguments = vec![];
    for (n, cell) in cells.iter().enumerate() {
        let memory = of_cell(board.memory.as_ref(), of_node(&board.numa_memory, n));
        let mut object = backend(memory.as_ref(), &format!("memory{n}"), cell.memory.bytes());
        if let Some(host) = of_node(&board.numa_host, n) {
            keep_to(&mut object, host);
        }
        arguments.push(("-object", object.to_string()));
        let cpus: String =
            ranges(&cell.cpus).split(',').filter(|r| !r.is_empty()).map(|r| format!(",cpus={r}")).collect();
        arguments.push(("-numa", format!("node,nodeid={n}{cpus},memdev=memory{n}")));
    }
    if !board.numa_distances.is_empty() {
        // QEMU wants all of them once it is told of any. What is said of one direction alone holds for both.
        let said = |from: u32, to: u32| {
            let one = board.numa_distances.iter().find(|d| (d.from, d.to) == (from, to));
            one.map(|d| u32::from(d.value))
        };
        let last = cells.len() as u32;
        for (from, to) in (0..last).flat_map(|from| (0..last).map(move |to| (from, to))) {
            let usual = if from == to { 10 } else { 20 };
            let value = said(from, to).or_else(|| said(to, from)).unwrap_or(usual);
            arguments.push(("-numa", format!("dist,src={from},dst={to},val={value}")));
        }
    }
    Ok(arguments)
}

/// `-m`'s value for so much memory, and how much of it is in no module.
///
/// # Errors
/// Invalid when modules are all of it, or more, and when all that there is room for is less.
pub fn size(board: &Board, memory: u64) -> Result<(String, u64)> {
    let modules = board.modules.iter().fold(0u64, |all, m| all.saturating_add(m.size.bytes()));
    let Some(base) = memory.checked_sub(modules).filter(|base| *base > 0) else {
        let text = format!("they have {} MiB, of {} MiB (limits.memory)", modules >> 20, memory >> 20);
        return Err(Error::invalid("config.hardware.memory.modules", text));
    };
    // Slots that nothing could be in are refused by QEMU too.
    if let Some(room) = board.slots.filter(|r| r.most.bytes() < memory || r.most.bytes() <= base) {
        let text = format!(
            "all memory at most is {} MiB, which is no room beside limits.memory ({} MiB)",
            room.most.bytes() >> 20,
            memory >> 20
        );
        return Err(Error::invalid("config.hardware.memory.slots", text));
    }
    let room = board.slots.map(|room| format!(",slots={},maxmem={}M", room.slots, room.most.bytes() >> 20));
    Ok((format!("size={}M{}", base >> 20, room.unwrap_or_default()), base))
}

/// Its modules of memory.
pub fn modules(board: &Board) -> Vec<Argument> {
    let mut arguments = vec![];
    // QEMU would put one without a slot where another is said to be.
    let said: Vec<u32> = board.modules.iter().filter_map(|m| m.slot).collect();
    let mut free = (0u32..).filter(|n| !said.contains(n));
    for (n, module) in board.modules.iter().enumerate() {
        let id = format!("module{n}");
        let memory = of_cell(board.memory.as_ref(), Some(&module.memory)).filter(|m| *m != Memory::default());
        let mut object = backend(memory.as_ref(), &id, module.size.bytes());
        if let Some(host) = &module.host {
            keep_to(&mut object, host);
        }
        arguments.push(("-object", object.to_string()));
        let mut device =
            json!({"driver": "pc-dimm", "id": format!("dimm{n}"), "memdev": id, "node": module.node});
        let slot = module.slot.or_else(|| if said.is_empty() { None } else { free.next() });
        if let Some(slot) = slot {
            device["slot"] = slot.into();
        }
        arguments.push(("-device", device.to_string()));
    }
    arguments
}

fn usb_controller(n: usize, bus: usize, one: &UsbController) -> Value {
    let driver = match one.model {
        UsbModel::Piix3Uhci => "piix3-usb-uhci",
        UsbModel::Piix4Uhci => "piix4-usb-uhci",
        UsbModel::Ohci => "pci-ohci",
        UsbModel::Ehci => "usb-ehci",
        UsbModel::Ich9Ehci1 => "ich9-usb-ehci1",
        UsbModel::Ich9Uhci1 => "ich9-usb-uhci1",
        UsbModel::Ich9Uhci2 => "ich9-usb-uhci2",
        UsbModel::Ich9Uhci3 => "ich9-usb-uhci3",
        UsbModel::NecXhci => "nec-usb-xhci",
        UsbModel::QemuXhci => "qemu-xhci",
    };
    if one.is_companion() {
        let first = one.ports.unwrap_or(0);
        return json!({
            "driver": driver, "id": format!("companion{n}"), "masterbus": format!("usb{bus}.0"), "firstport": first,
        });
    }
    let mut device = json!({"driver": driver, "id": format!("usb{bus}")});
    if let Some(ports) = one.ports {
        (device["p2"], device["p3"]) = (ports.into(), ports.into());
    }
    device
}

fn usb_device(n: usize, one: &UsbDevice) -> Value {
    let driver = match one.kind {
        UsbKind::Hub => "usb-hub",
        UsbKind::Keyboard => "usb-kbd",
        UsbKind::Mouse => "usb-mouse",
        UsbKind::Tablet => "usb-tablet",
        UsbKind::Audio => "usb-audio",
    };
    let bus = one.at.as_ref().map_or(0, |(bus, _)| *bus);
    let mut device = json!({"driver": driver, "id": format!("usb-device{n}"), "bus": format!("usb{bus}.0")});
    if let Some((_, port)) = &one.at {
        device["port"] = port.as_str().into();
    }
    if one.kind == UsbKind::Audio {
        device["audiodev"] = AUDIO.into();
    }
    device
}

fn sound(
    n: usize,
    one: Sound,
    codecs: Option<&Vec<SoundCodec>>,
    layout: Layout,
    many: bool,
) -> Result<Vec<String>> {
    let id = format!("sound{n}");
    let plain = |driver: &str| json!({"driver": driver, "id": id, "audiodev": AUDIO});
    let of_intel = |driver: &str| -> Result<Vec<String>> {
        let usual = [SoundCodec::Duplex];
        let mut all = vec![at(layout, json!({"driver": driver, "id": id}), SOUND, n, many)?];
        for (place, codec) in codecs.map_or(&usual[..], |all| &all[..]).iter().enumerate() {
            let driver = format!("hda-{}", codec.as_str());
            let codec = json!({
                "driver": driver, "id": format!("{id}-codec{place}"), "bus": format!("{id}.0"), "cad": place,
                "audiodev": AUDIO,
            });
            all.push(codec.to_string());
        }
        Ok(all)
    };
    match one {
        Sound::Ac97 => Ok(vec![at(layout, plain("AC97"), SOUND, n, many)?]),
        Sound::Es1370 => Ok(vec![at(layout, plain("ES1370"), SOUND, n, many)?]),
        Sound::Ich6 => of_intel("intel-hda"),
        Sound::Ich9 => of_intel("ich9-intel-hda"),
        Sound::Sb16 => Ok(vec![plain("sb16").to_string()]),
        // The machine has it, which is told where it is heard.
        Sound::Pcspk => Ok(vec![]),
    }
}

/// The screens of a machine that has any.
///
/// # Errors
/// Invalid for an address that is none.
pub fn screens(board: &Board, layout: Layout) -> Result<Vec<Argument>> {
    let usual = [Video::Vga];
    let all = if board.video.is_empty() { &usual[..] } else { &board.video };
    let mut arguments = vec![];
    for (n, one) in all.iter().enumerate() {
        let driver = match (one, n) {
            (Video::Absent, _) => continue,
            (Video::Vga, _) => "VGA",
            (Video::Cirrus, _) => "cirrus-vga",
            (Video::Qxl, 0) => "qxl-vga",
            (Video::Qxl, _) => "qxl",
            (Video::Virtio, 0) => "virtio-vga",
            (Video::Virtio, _) => "virtio-gpu-pci",
            (Video::VirtioGl, 0) => "virtio-vga-gl",
            (Video::VirtioGl, _) => "virtio-gpu-gl-pci",
            (Video::Vmvga, _) => "vmware-svga",
            (Video::Bochs, _) => "bochs-display",
            // It is on no bus.
            (Video::Ramfb, _) => {
                arguments.push(("-device", json!({"driver": "ramfb", "id": "video"}).to_string()));
                continue;
            }
        };
        let id = if n == 0 { "video".to_owned() } else { format!("video{n}") };
        let mut device = json!({"driver": driver, "id": id});
        if *one == Video::Vga {
            device["vgamem_mb"] = 16.into();
        }
        arguments.push(("-device", at(layout, device, VIDEO, n, all.len() > 1)?));
    }
    Ok(arguments)
}

/// The rest of its devices; `spice`: where sound is heard.
///
/// # Errors
/// Invalid for an address that is none.
pub fn devices(board: &Board, layout: Layout, spice: bool) -> Result<Vec<Argument>> {
    let mut arguments = vec![];
    let mut add = |device: String| arguments.push(("-device", device));
    if layout.pc && board.usb.len() > MOST {
        let text = format!("a machine of type pc has {MOST} at most; those of type q35 have {MOST_USB}");
        return Err(Error::invalid("config.hardware.usb", text));
    }
    let (mut bus, many) = (0, board.usb.len() > 1);
    for (n, one) in board.usb.iter().enumerate() {
        // Companions come after their master, and are of its bus.
        if n > 0 && !one.is_companion() {
            bus += 1;
        }
        let (slot, many) = if n < MOST { (USB, many) } else { (MORE_USB, board.usb.len() > MOST + 1) };
        add(at(layout, usb_controller(n, bus, one), slot, n % MOST, many)?);
    }
    let heard = !board.sound.is_empty() || board.usb_devices.iter().any(|d| d.kind == UsbKind::Audio);
    for (n, one) in board.usb_devices.iter().enumerate() {
        add(usb_device(n, one).to_string());
    }
    // The place of the first is taken also where that is on no PCI bus, for the others to be found.
    let on_pci = |one: &&Sound| !matches!(one, Sound::Sb16 | Sound::Pcspk);
    let cards = board.sound.iter().filter(on_pci).count();
    let mut place = 0;
    for (card, one) in board.sound.iter().enumerate() {
        let n = if on_pci(&one) { place } else { cards + place };
        let codecs = of_node(&board.sound_codecs, card);
        for device in sound(n, *one, codecs, layout, cards > 1)? {
            add(device);
        }
        place += usize::from(on_pci(&one));
    }
    let watches = board.watchdog.is_some_and(|w| w.model == WatchdogModel::I6300esb);
    let first = usize::from(watches);
    let rest = first + board.inputs.len();
    if let Some(watchdog) = &board.watchdog {
        let device = match watchdog.model {
            WatchdogModel::I6300esb => {
                at(layout, json!({"driver": "i6300esb", "id": "watchdog"}), REST, 0, rest > 1)?
            }
            WatchdogModel::Ib700 => json!({"driver": "ib700", "id": "watchdog"}).to_string(),
        };
        add(device);
    }
    for (n, one) in board.inputs.iter().enumerate() {
        let driver = match one {
            Pointer::Keyboard => "virtio-keyboard-pci",
            Pointer::Mouse => "virtio-mouse-pci",
            Pointer::Tablet => "virtio-tablet-pci",
        };
        let id = format!("input{n}");
        let mut device = json!({"driver": driver, "id": id});
        if let Some(options) = board.virtio.get(&id) {
            virtio(&mut device, options);
        }
        add(at(layout, device, REST, first + n, rest > 1)?);
    }
    if board.panic {
        add(json!({"driver": "pvpanic", "id": "panic", "ioport": 0x505}).to_string());
    }
    if let Some(generation) = board.generation {
        add(json!({"driver": "vmgenid", "id": "generation", "guid": generation.to_string()}).to_string());
    }
    if let Some(watchdog) = &board.watchdog {
        let action = match watchdog.end {
            WatchdogEnd::Reset => "reset",
            WatchdogEnd::Shutdown => "shutdown",
            WatchdogEnd::Poweroff => "poweroff",
            WatchdogEnd::Pause => "pause",
            WatchdogEnd::None => "none",
            WatchdogEnd::InjectNmi => "inject-nmi",
        };
        arguments.push(("-action", format!("watchdog={action}")));
    }
    if heard {
        // Before what refers to it.
        let way = if spice { "spice" } else { "none" };
        arguments.insert(0, ("-audiodev", json!({"driver": way, "id": AUDIO}).to_string()));
    }
    Ok(arguments)
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::ByteSize;

    const PC: Layout = Layout { pc: true, ports: 0 };

    fn board(pairs: &[(&str, &str)]) -> Board {
        Board::of(&pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()).unwrap()
    }

    pub(super) fn lines(arguments: Vec<Argument>) -> String {
        arguments
            .into_iter()
            .map(|(option, value)| format!("{option} {value}"))
            .collect::<Vec<_>>()
            .join("\n")
    }

    #[test]
    fn usb_has_its_controllers_first_and_devices_where_they_are_said_to_be() {
        let board = board(&[
            ("hardware.usb", "ich9-ehci1,ich9-uhci1:0,ich9-uhci2:2,qemu-xhci:8"),
            ("hardware.usb.devices", "hub@0:1,mouse@0:1.2,tablet@1:1,keyboard"),
        ]);
        insta::assert_snapshot!(lines(devices(&board, PC, false).unwrap()), @r#"
        -device {"driver":"ich9-usb-ehci1","id":"usb0","bus":"pci.0","addr":"0x18.0x0","multifunction":true}
        -device {"driver":"ich9-usb-uhci1","id":"companion1","masterbus":"usb0.0","firstport":0,"bus":"pci.0","addr":"0x18.0x1"}
        -device {"driver":"ich9-usb-uhci2","id":"companion2","masterbus":"usb0.0","firstport":2,"bus":"pci.0","addr":"0x18.0x2"}
        -device {"driver":"qemu-xhci","id":"usb1","p2":8,"p3":8,"bus":"pci.0","addr":"0x18.0x3"}
        -device {"driver":"usb-hub","id":"usb-device0","bus":"usb0.0","port":"1"}
        -device {"driver":"usb-mouse","id":"usb-device1","bus":"usb0.0","port":"1.2"}
        -device {"driver":"usb-tablet","id":"usb-device2","bus":"usb1.0","port":"1"}
        -device {"driver":"usb-kbd","id":"usb-device3","bus":"usb0.0"}
        "#);
    }

    #[test]
    fn sound_screens_and_what_watches() {
        let board = board(&[
            ("hardware.sound", "sb16,ich6,ac97"),
            ("hardware.watchdog", "i6300esb:poweroff"),
            ("hardware.input", "tablet"),
            ("hardware.panic", "true"),
            ("hardware.generation", "0b3c1f9e-7f2c-4d0a-9a53-3a3f6f0f0001"),
            ("hardware.video", "qxl,qxl,virtio"),
        ]);
        insta::assert_snapshot!(lines(devices(&board, PC, true).unwrap()), @r#"
        -audiodev {"driver":"spice","id":"audio"}
        -device {"driver":"sb16","id":"sound2","audiodev":"audio"}
        -device {"driver":"intel-hda","id":"sound0","bus":"pci.0","addr":"0x19.0x0","multifunction":true}
        -device {"driver":"hda-duplex","id":"sound0-codec0","bus":"sound0.0","cad":0,"audiodev":"audio"}
        -device {"driver":"AC97","id":"sound1","audiodev":"audio","bus":"pci.0","addr":"0x19.0x1"}
        -device {"driver":"i6300esb","id":"watchdog","bus":"pci.0","addr":"0x1a.0x0","multifunction":true}
        -device {"driver":"virtio-tablet-pci","id":"input0","bus":"pci.0","addr":"0x1a.0x1"}
        -device {"driver":"pvpanic","id":"panic","ioport":1285}
        -device {"driver":"vmgenid","id":"generation","guid":"0b3c1f9e-7f2c-4d0a-9a53-3a3f6f0f0001"}
        -action watchdog=poweroff
        "#);
        insta::assert_snapshot!(lines(screens(&board, PC).unwrap()), @r#"
        -device {"driver":"qxl-vga","id":"video","bus":"pci.0","addr":"0x1b.0x0","multifunction":true}
        -device {"driver":"qxl","id":"video1","bus":"pci.0","addr":"0x1b.0x1"}
        -device {"driver":"virtio-gpu-pci","id":"video2","bus":"pci.0","addr":"0x1b.0x2"}
        "#);
        assert!(screens(&Board { video: vec![Video::Absent], ..Board::default() }, PC).unwrap().is_empty());
        assert!(devices(&Board::default(), PC, true).unwrap().is_empty(), "nothing of it is there unasked");
    }

    #[test]
    fn processors_and_memory_are_laid_out_as_they_are_said() {
        assert_eq!(processors(None, 2, 4).unwrap(), "cpus=2,maxcpus=4,sockets=1,cores=4,threads=1");
        let topology = Topology { sockets: 2, dies: 1, cores: 2, threads: 2 };
        assert_eq!(
            processors(Some(&topology), 3, 64).unwrap(),
            "cpus=3,maxcpus=8,sockets=2,cores=2,threads=2"
        );
        let many = processors(Some(&topology), 9, 9).unwrap_err();
        assert_eq!(many.field.as_deref(), Some("config.hardware.cpu.topology"));
        let cells = board(&[("hardware.numa", "0-1,4:512MiB;2-3:512MiB")]);
        assert_eq!(
            lines(memory(&cells, 1 << 30).unwrap()),
            "-object {\"qom-type\":\"memory-backend-ram\",\"id\":\"memory0\",\"size\":536870912}\n\
             -numa node,nodeid=0,cpus=0-1,cpus=4,memdev=memory0\n\
             -object {\"qom-type\":\"memory-backend-ram\",\"id\":\"memory1\",\"size\":536870912}\n\
             -numa node,nodeid=1,cpus=2-3,memdev=memory1"
        );
        assert_eq!(memory(&cells, 2 << 30).unwrap_err().field.as_deref(), Some("config.hardware.numa"));
        let huge = board(&[("hardware.memory", "shared,allocated,hugepages=2MiB")]);
        assert_eq!(
            lines(memory(&huge, 1 << 30).unwrap()),
            "-object {\"qom-type\":\"memory-backend-memfd\",\"id\":\"memory\",\"size\":1073741824,\"share\":true,\
             \"prealloc\":true,\"hugetlb\":true,\"hugetlbsize\":2097152}"
        );
        assert_eq!(memory(&Board::default(), ByteSize::gib(1).bytes()).unwrap(), []);
    }

    #[test]
    fn memory_that_others_are_handed_is_all_of_it() {
        assert_eq!(
            lines(memory(&shared(Board::default()), 1 << 30).unwrap()),
            "-object {\"qom-type\":\"memory-backend-memfd\",\"id\":\"memory\",\"size\":1073741824,\"share\":true}"
        );
        let parts = [
            ("hardware.memory", "allocated,unmerged"),
            ("hardware.numa", "0-1:512MiB;2-3:256MiB"),
            ("hardware.memory.slots", "16:4GiB"),
            ("hardware.memory.modules", "256MiB@0"),
        ];
        let plain = board(&parts);
        let all = shared(plain.clone());
        let objects = [memory(&all, 768 << 20).unwrap(), modules(&all)].concat();
        let objects: Vec<_> = objects.iter().filter(|(option, _)| *option == "-object").collect();
        assert_eq!(objects.len(), 3);
        for (_, object) in objects {
            assert!(
                object.contains("memfd\"") && object.contains("\"share\":true,\"prealloc\":true"),
                "{object}"
            );
        }
        assert_eq!(private(&plain), None);
        let node = board(&[parts[1], ("hardware.numa.memory", "1=private")]);
        assert_eq!(private(&node), Some("hardware.numa.memory"));
        let module = board(&[parts[1], parts[2], ("hardware.memory.modules", "256MiB@0+private")]);
        assert_eq!(private(&module), Some("hardware.memory.modules"));
    }

    #[test]
    fn a_clock_begins_when_it_is_said_to() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00"),
            (951_782_399, "2000-02-28T23:59:59"),
            (951_782_400, "2000-02-29T00:00:00"),
            (4_107_542_400, "2100-03-01T00:00:00"),
            (253_402_300_799, "9999-12-31T23:59:59"),
        ] {
            assert_eq!(date(seconds), text);
        }
        assert_eq!(clock(&Board::default(), true), "base=localtime");
        let real = board(&[("hardware.features", "rtc-realtime")]);
        assert_eq!(clock(&real, false), "base=utc,clock=rt");
        let zone = board(&[("hardware.clock.zone", "Europe/Paris")]);
        assert_eq!(clock(&zone, false), "base=localtime");
        let start = board(&[("hardware.clock.start", "60")]);
        assert_eq!(clock(&start, true), "base=1970-01-01T00:01:00");
    }

    #[test]
    fn nodes_are_where_they_are_said_to_be() {
        let nodes = board(&[
            ("hardware.numa", "0-1:512MiB;2-3:512MiB"),
            ("hardware.memory", "allocated"),
            ("hardware.numa.memory", "1=shared+hugepages=2MiB"),
            ("hardware.numa.host", "0=bind:0-1,3"),
            ("hardware.numa.distances", "0-1=21"),
        ]);
        insta::assert_snapshot!(lines(memory(&nodes, 1 << 30).unwrap()), @r#"
        -object {"qom-type":"memory-backend-ram","id":"memory0","size":536870912,"share":false,"prealloc":true,"host-nodes":[0,1,3],"policy":"bind"}
        -numa node,nodeid=0,cpus=0-1,memdev=memory0
        -object {"qom-type":"memory-backend-memfd","id":"memory1","size":536870912,"share":true,"prealloc":true,"hugetlb":true,"hugetlbsize":2097152}
        -numa node,nodeid=1,cpus=2-3,memdev=memory1
        -numa dist,src=0,dst=0,val=10
        -numa dist,src=0,dst=1,val=21
        -numa dist,src=1,dst=0,val=21
        -numa dist,src=1,dst=1,val=10
        "#);
    }

    #[test]
    fn modules_are_beside_the_nodes() {
        let some = board(&[
            ("hardware.numa", "0-1:512MiB"),
            ("hardware.memory.slots", "16:4GiB"),
            ("hardware.memory.modules", "256MiB@0+slot=2+bind:1;256MiB@0"),
        ]);
        let (room, base) = size(&some, 1 << 30).unwrap();
        assert_eq!((room.as_str(), base), ("size=512M,slots=16,maxmem=4096M", 512 << 20));
        insta::assert_snapshot!(lines(modules(&some)), @r#"
        -object {"qom-type":"memory-backend-ram","id":"module0","size":268435456,"host-nodes":[1],"policy":"bind"}
        -device {"driver":"pc-dimm","id":"dimm0","memdev":"module0","node":0,"slot":2}
        -object {"qom-type":"memory-backend-ram","id":"module1","size":268435456}
        -device {"driver":"pc-dimm","id":"dimm1","memdev":"module1","node":0,"slot":0}
        "#);
        assert_eq!(size(&Board::default(), 1 << 30).unwrap(), ("size=1024M".to_owned(), 1 << 30));
        let none = size(&some, 512 << 20).unwrap_err();
        assert_eq!(none.field.as_deref(), Some("config.hardware.memory.modules"));
        let full = size(&some, 4 << 30).unwrap().0;
        assert_eq!(full, "size=3584M,slots=16,maxmem=4096M");
        let beyond = size(&some, 5 << 30).unwrap_err();
        assert_eq!(beyond.field.as_deref(), Some("config.hardware.memory.slots"));
    }

    #[test]
    fn features_and_an_iommu() {
        let all =
            board(&[("hardware.features", "split-irqchip,dirty-ring=4096,tcg-cache=100")]).features.unwrap();
        assert_eq!(kvm(&all), "kvm,kernel-irqchip=split,dirty-ring-size=4096");
        assert_eq!(tcg(&all), "tcg,thread=multi,tb-size=100");
        assert_eq!(
            (kvm(&Features::default()).as_str(), tcg(&Features::default()).as_str()),
            ("kvm", "tcg,thread=multi")
        );
        let keys = [
            ("hardware.iommu", "intel,intremap=on,caching,width=48"),
            ("hardware.features", "split-irqchip"),
        ];
        let one = board(&keys).iommu.unwrap();
        let q35 = Layout { pc: false, ports: 16 };
        let expected = json!({"driver": "intel-iommu", "id": "iommu", "intremap": "on", "caching-mode": true, "aw-bits": 48});
        assert_eq!(iommu(&one, q35).unwrap(), expected);
        assert_eq!(iommu(&one, PC).unwrap_err().field.as_deref(), Some("config.hardware.iommu"));
    }

    /// What QEMU itself says to arguments, in the few lines of a machine that stands still.
    pub(super) async fn accepted(machine: &str, arguments: &[Argument]) -> Result<()> {
        let usual =
            ["-S", "-no-user-config", "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "64", "-M"];
        let more = arguments.iter().flat_map(|(option, value)| [*option, value.as_str()]);
        let input = "{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"quit\"}\n";
        let run = karst_host::run(karst_host::Program::QemuSystemX86).args(usual).arg(machine).args(more);
        run.args(["-qmp", "stdio"]).stdin(input.to_owned()).ok().await.map(drop)
    }

    #[tokio::test]
    async fn qemu_itself_takes_all_of_it() {
        if karst_host::Program::QemuSystemX86.path().is_err() {
            return crate::backends::missing("QEMU is not installed");
        }
        let one = |key: &str, value: &str| (format!("{key}={value}"), board(&[(key, value)]));
        let mut all = vec![];
        for (key, words) in [
            ("hardware.usb", "piix3-uhci piix4-uhci pci-ohci ehci nec-xhci:4 qemu-xhci:15"),
            ("hardware.usb", "ich9-ehci1,ich9-uhci1:0,ich9-uhci2:2,ich9-uhci3:4 qemu-xhci,ehci"),
            ("hardware.sound", "ac97 es1370 ich6 ich9 sb16 ich6,ac97"),
            ("hardware.video", "vga cirrus qxl virtio vmvga bochs ramfb qxl,qxl virtio,bochs none"),
            ("hardware.input", "keyboard,mouse,tablet"),
            ("hardware.panic", "true"),
            ("hardware.generation", "0b3c1f9e-7f2c-4d0a-9a53-3a3f6f0f0001"),
            (
                "hardware.watchdog",
                "i6300esb:reset ib700:shutdown ib700:poweroff ib700:pause ib700:none i6300esb:inject-nmi",
            ),
        ] {
            all.extend(words.split(' ').map(|value| one(key, value)));
        }
        let usb = [
            ("hardware.usb", "piix3-uhci,qemu-xhci"),
            ("hardware.usb.devices", "hub@0:1,mouse@1:1,keyboard,tablet,audio@1:2"),
        ];
        all.push(("devices of USB".into(), board(&usb)));
        let many = ["qemu-xhci"; 10].join(",");
        let arguments = devices(&board(&[("hardware.usb", &many)]), Layout { pc: false, ports: 16 }, false);
        accepted("pc-q35-7.2", &arguments.unwrap()).await.unwrap();
        let too_many = devices(&board(&[("hardware.usb", &many)]), PC, false).unwrap_err();
        assert_eq!(too_many.field.as_deref(), Some("config.hardware.usb"));
        let input =
            [("hardware.input", "mouse"), ("hardware.virtio", "input0=iommu+ats+packed+page-per-queue")];
        all.push(("an input device with options".into(), board(&input)));
        for (machine, layout) in [("pc-i440fx-7.2", PC), ("pc-q35-7.2", Layout { pc: false, ports: 16 })] {
            for (what, board) in &all {
                let mut arguments = screens(board, layout).unwrap();
                arguments.extend(devices(board, layout, false).unwrap());
                let took = accepted(machine, &arguments).await;
                assert!(took.is_ok(), "{machine} {what}: {took:?} of {arguments:?}");
            }
        }
        let topology = Topology { sockets: 2, dies: 1, cores: 2, threads: 2 };
        let cells = board(&[("hardware.numa", "0-3:32MiB;4-7:32MiB"), ("hardware.memory", "shared")]);
        let mut arguments = vec![("-smp", processors(Some(&topology), 3, 3).unwrap())];
        arguments.extend(memory(&cells, 64 << 20).unwrap());
        accepted("pc-q35-7.2,hpet=on", &arguments).await.unwrap();
        let dies = Topology { sockets: 1, dies: 2, cores: 2, threads: 1 };
        accepted("pc-i440fx-7.2", &[("-smp", processors(Some(&dies), 1, 1).unwrap())]).await.unwrap();
        let all = board(&[("hardware.memory", "file,allocated")]);
        accepted("pc-q35-7.2,mem-merge=off,memory-backend=memory", &memory(&all, 64 << 20).unwrap())
            .await
            .unwrap();
        let q35 = Layout { pc: false, ports: 16 };
        // NICs and drives of older systems.
        for (_, model) in karst_model::device::NIC_MODELS {
            let nic = crate::devices::Nic {
                name: "eth0".into(),
                slot: "net0".into(),
                model: *model,
                mac: "10:66:6a:12:34:56".into(),
                pci: Some("00:08.0".into()),
                mtu: None,
                boot_priority: 0,
                user: true,
                options: Default::default(),
            };
            let network = ("-netdev", nic.host("").to_string());
            let device = nic.device(PC).unwrap().to_string();
            accepted("pc-i440fx-7.2", &[network, ("-device", device)]).await.unwrap();
        }
        let mut arguments = vec![];
        let usb = usb_controller(0, 0, &board(&[("hardware.usb", "qemu-xhci")]).usb[0]);
        arguments.push(("-device", usb.to_string()));
        for slot in ["ide0", "ide1", "ide2", "ide3", "floppy0", "floppy1", "usb0", "usb1"] {
            let disk = crate::devices::Disk { cdrom: slot == "ide3", ..crate::devices::tests::disk(slot) };
            arguments.push(("-blockdev", json!({"driver": "null-co", "node-name": disk.top()}).to_string()));
            let order = disk.boots_by_controller().unwrap();
            arguments.extend(order.map(|property| ("-global", property)));
            arguments.push(("-device", disk.device(PC).unwrap().to_string()));
        }
        accepted("pc-i440fx-7.2", &arguments).await.unwrap();
        let floppy = crate::devices::tests::disk("floppy0");
        let arguments = [
            ("-device", json!({"driver": "isa-fdc", "id": "fdc"}).to_string()),
            ("-blockdev", json!({"driver": "null-co", "node-name": floppy.top()}).to_string()),
            ("-global", floppy.boots_by_controller().unwrap().unwrap()),
            ("-device", floppy.device(q35).unwrap().to_string()),
            (
                "-rtc",
                clock(
                    &board(&[("hardware.clock.start", "60"), ("hardware.features", "rtc-realtime")]),
                    false,
                ),
            ),
        ];
        accepted("pc-q35-7.2", &arguments).await.unwrap();
        let (disk, nic) = crate::devices::tests::with_options();
        let arguments = [
            ("-blockdev", json!({"driver": "null-co", "node-name": disk.top()}).to_string()),
            ("-device", disk.device(PC).unwrap().to_string()),
            ("-netdev", nic.host("").to_string()),
            ("-device", nic.device(PC).unwrap().to_string()),
        ];
        accepted("pc-i440fx-7.2", &arguments).await.unwrap();
        for text in ["virtio", "intel", "intel,caching,iotlb,width=48", "intel,intremap=on,eim=on"] {
            let keys = [("hardware.iommu", text), ("hardware.features", "split-irqchip")];
            let device = iommu(board(&keys).iommu.as_ref().unwrap(), q35).unwrap();
            accepted("pc-q35-7.2", &[("-device", device.to_string())]).await.unwrap();
        }
        let modules = board(&[
            ("hardware.numa", "0-1:64MiB"),
            ("hardware.memory.slots", "4:1GiB"),
            ("hardware.memory.modules", "128MiB@0+slot=2+shared;64MiB@0+bind:0"),
        ]);
        let (room, base) = size(&modules, 256 << 20).unwrap();
        let mut arguments = vec![("-smp", "2".into()), ("-m", room)];
        arguments.extend(memory(&modules, base).unwrap());
        arguments.extend(super::modules(&modules));
        accepted("pc-q35-7.2", &arguments).await.unwrap();
        let speaker = board(&[("hardware.sound", "pcspk,ac97")]);
        let arguments = devices(&speaker, PC, false).unwrap();
        accepted("pc-i440fx-7.2,pcspk-audiodev=audio", &arguments).await.unwrap();
        // Each host has the node 0.
        let nodes = board(&[
            ("hardware.numa", "0-3:32MiB;4-7:32MiB"),
            ("hardware.numa.memory", "1=shared"),
            ("hardware.numa.host", "0=preferred:0;1=bind:0"),
            ("hardware.numa.distances", "0-1=21"),
        ]);
        let mut arguments = memory(&nodes, 64 << 20).unwrap();
        arguments.insert(0, ("-smp", "8".into()));
        accepted("pc-q35-7.2", &arguments).await.unwrap();
        // It is no test of anything where QEMU takes what it has not.
        let refused = accepted("pc-q35-7.2", &[("-device", "teleporter".into())]).await;
        assert!(refused.is_err());
    }
}
