//! What a virtual machine's board has beside processors, memory, disks and NICs, out of the keys `hardware.*`: controllers and
//! devices of USB, sound, screens, a watchdog, what tells of a panic, and how its processors and memory are laid out.
//!
//! Each key has one form in text, which [`Board::keys`] writes and [`Board::of`] reads. Where a device is follows from its place in
//! its list, so that a machine keeps its addresses for as long as its keys stay.

macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $table:ident { $($(#[$of:meta])* $variant:ident = $word:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$of])* #[serde(rename = $word)] $variant,)*
        }

        /// Names as users write them.
        pub const $table: &[(&str, $name)] = &[$(($word, $name::$variant)),*];

        impl $name {
            /// Its name as users write it.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }
    };
}

mod host;
mod memory;
mod nodes;
mod parts;
mod placement;
mod scsi;
mod smbios;
mod sound;
pub(crate) mod text;

use crate::{
    ByteSize, Config, Error, Result,
    device::usb_filter,
    keys::{optional_flag, set},
    options::Virtio,
};
pub use host::AUTO_RENDER;
pub use memory::Memory;
pub use nodes::{CellMemory, Distance, HostNodes, Module, NODE_POLICIES, NodePolicy, Slots};
pub use parts::{Features, Iommu, IommuModel, Rng};
pub use placement::Placement;
pub use scsi::{MOST_SCSI, SCSI_MODELS, ScsiController, ScsiModel, without_usual};
use serde::{Deserialize, Serialize};
pub use smbios::{SMBIOS_FIELDS, STRINGS as SMBIOS_STRINGS, SmbiosField};
pub use sound::{SOUND_CODECS, SoundCodec};
use std::collections::BTreeMap;

/// Sound cards of a machine at most, and so screens and input devices: functions of one PCI device.
pub const MOST: usize = 8;
/// Controllers of USB at most: functions of two, of which machines of type `pc` have one.
pub const MOST_USB: usize = 16;
/// Devices of USB of a machine at most.
const DEVICES: usize = 32;

/// What it has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Board {
    /// `hardware.cpu.topology`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topology: Option<Topology>,
    /// `hardware.numa`: nodes of memory; without any it has one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub numa: Vec<NumaCell>,
    /// `hardware.numa.memory`, by node.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub numa_memory: Vec<(u32, CellMemory)>,
    /// `hardware.numa.host`, by node.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub numa_host: Vec<(u32, HostNodes)>,
    /// `hardware.numa.placement`.
    #[serde(skip_serializing_if = "Placement::is_none")]
    pub placement: Placement,
    /// `hardware.numa.policy`: how memory without a place of its own keeps to the nodes that it has; it is bound to them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub numa_policy: Option<NodePolicy>,
    /// `hardware.numa.distances`: those that are not usual.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub numa_distances: Vec<Distance>,
    /// `hardware.memory.slots`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slots: Option<Slots>,
    /// `hardware.memory.modules`: they are of the machine's memory, as its nodes are.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub modules: Vec<Module>,
    /// `hardware.clock.start`: what its clock shows when it starts, seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clock_start: Option<u64>,
    /// `hardware.clock.zone`: the time zone of its clock, in place of the host's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clock_zone: Option<String>,
    /// `hardware.features`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub features: Option<Features>,
    /// `hardware.iommu`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iommu: Option<Iommu>,
    /// `hardware.rng`: without any it has one as usual.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rngs: Vec<Rng>,
    /// `hardware.virtio`: options of devices of virtio that each machine has, and of its input devices.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub virtio: BTreeMap<String, Virtio>,
    /// `hardware.scsi`: controllers of SCSI; without any it has one of virtio.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub scsi: Vec<ScsiController>,
    /// `hardware.memory`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    /// `hardware.usb`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub usb: Vec<UsbController>,
    /// `hardware.usb.devices`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub usb_devices: Vec<UsbDevice>,
    /// `hardware.usb.filter`: which devices on USB of others are taken, in usbredir's words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usb_filter: Option<String>,
    /// `hardware.input`: those of virtio.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<Pointer>,
    /// `hardware.smbios.*`, by key: what the firmware tells of it in place of what Karst says.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub smbios: BTreeMap<String, String>,
    /// `hardware.sound`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sound: Vec<Sound>,
    /// `hardware.sound.codecs`, by the place of the card: of those that have another than the usual one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sound_codecs: Vec<(u32, Vec<SoundCodec>)>,
    /// `hardware.main_thread.pool`: threads that QEMU's main one keeps for what blocks, and most of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub main_pool: Option<(Option<u32>, Option<u32>)>,
    /// `hardware.video`: without any it has the VGA card.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub video: Vec<Video>,
    /// `hardware.video.render`: the node of a graphics card of the host that screens are drawn with, or [`AUTO_RENDER`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub render: Option<String>,
    /// `hardware.watchdog`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<Watchdog>,
    /// `hardware.panic`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub panic: bool,
    /// `hardware.balloon.deflate`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub balloon_deflates: bool,
    /// `hardware.balloon.period`, seconds; 0: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon_period: Option<u32>,
    /// `hardware.hpet`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub hpet: bool,
    /// `hardware.sleep`: to memory.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub sleeps: bool,
    /// The same to its disk.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub hibernates: bool,
    /// `hardware.boot_menu.timeout`: milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub menu_timeout: Option<u32>,
    /// `hardware.boot.retry`: milliseconds until a firmware that found nothing to boot begins anew.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_retry: Option<u32>,
    /// `hardware.generation`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<uuid::Uuid>,
}

/// How processors are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Sockets.
    pub sockets: u32,
    /// Dies of each.
    pub dies: u32,
    /// Cores of each.
    pub cores: u32,
    /// Threads of each.
    pub threads: u32,
}

impl Topology {
    /// How many processors it has room for.
    pub fn processors(&self) -> u32 {
        [self.dies, self.cores, self.threads].iter().fold(self.sockets, |n, m| n.saturating_mul(*m))
    }
}

/// A node of a machine's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumaCell {
    /// Its processors, sorted ranges of first and last.
    pub cpus: Vec<(u32, u32)>,
    /// Its memory, whole MiB.
    pub memory: ByteSize,
}

words!(
    /// A controller of USB.
    UsbModel, USB_MODELS {
        /// UHCI of PIIX3: USB 1.
        Piix3Uhci = "piix3-uhci",
        /// UHCI of PIIX4.
        Piix4Uhci = "piix4-uhci",
        /// OHCI: USB 1.
        Ohci = "pci-ohci",
        /// EHCI: USB 2 alone.
        Ehci = "ehci",
        /// EHCI of ICH9, beside which UHCI of ICH9 has what is slower.
        Ich9Ehci1 = "ich9-ehci1",
        /// UHCI of ICH9.
        Ich9Uhci1 = "ich9-uhci1",
        /// Another.
        Ich9Uhci2 = "ich9-uhci2",
        /// Another.
        Ich9Uhci3 = "ich9-uhci3",
        /// xHCI of NEC: USB 3.
        NecXhci = "nec-xhci",
        /// xHCI of QEMU's own: USB 3.
        QemuXhci = "qemu-xhci",
    }
);
words!(
    /// A device of USB that is emulated.
    UsbKind, USB_KINDS {
        /// A hub.
        Hub = "hub",
        /// A keyboard.
        Keyboard = "keyboard",
        /// A mouse.
        Mouse = "mouse",
        /// A pointer with places rather than moves.
        Tablet = "tablet",
        /// A sound card.
        Audio = "audio",
    }
);
words!(
    /// An input device of virtio.
    Pointer, POINTERS {
        /// A keyboard.
        Keyboard = "keyboard",
        /// A mouse.
        Mouse = "mouse",
        /// A pointer with places.
        Tablet = "tablet",
    }
);
words!(
    /// A sound card.
    Sound, SOUNDS {
        /// Intel's AC97.
        Ac97 = "ac97",
        /// Ensoniq's.
        Es1370 = "es1370",
        /// High definition audio of ICH6.
        Ich6 = "ich6",
        /// The same of ICH9.
        Ich9 = "ich9",
        /// SoundBlaster 16.
        Sb16 = "sb16",
        /// The speaker that each machine has: it is heard.
        Pcspk = "pcspk",
    }
);
words!(
    /// What a screen is on.
    Video, VIDEOS {
        /// None at all.
        Absent = "none",
        /// The standard VGA card.
        Vga = "vga",
        /// Cirrus'.
        Cirrus = "cirrus",
        /// QXL, of SPICE.
        Qxl = "qxl",
        /// virtio, without acceleration.
        Virtio = "virtio",
        /// The same, drawn by a graphics card of the host.
        VirtioGl = "virtio-gl",
        /// VMware's.
        Vmvga = "vmvga",
        /// The standard card without VGA's registers.
        Bochs = "bochs",
        /// A screen in the machine's memory, which its firmware draws into.
        Ramfb = "ramfb",
    }
);
words!(
    /// A watchdog.
    WatchdogModel, WATCHDOGS {
        /// Intel's, on PCI.
        I6300esb = "i6300esb",
        /// iBASE's, on ISA.
        Ib700 = "ib700",
    }
);
words!(
    /// What becomes of a machine whose watchdog was not fed.
    WatchdogEnd, WATCHDOG_ENDS {
        /// It is reset.
        Reset = "reset",
        /// It is asked to shut down.
        Shutdown = "shutdown",
        /// It is switched off.
        Poweroff = "poweroff",
        /// It stands still.
        Pause = "pause",
        /// Nothing; it is told.
        None = "none",
        /// Its processors get an NMI.
        InjectNmi = "inject-nmi",
    }
);

/// A controller of USB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsbController {
    /// What it is.
    pub model: UsbModel,
    /// Ports of an xHCI controller; of an UHCI one of ICH9, the first port of its EHCI controller that it serves.
    pub ports: Option<u32>,
}

impl UsbController {
    /// Is it one that serves slower devices of another?
    pub fn is_companion(&self) -> bool {
        matches!(self.model, UsbModel::Ich9Uhci1 | UsbModel::Ich9Uhci2 | UsbModel::Ich9Uhci3)
    }
}

/// A device of USB.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsbDevice {
    /// What it is.
    pub kind: UsbKind,
    /// The bus that it is on, of those of `hardware.usb` without companions, and its port there such as `1` or `2.1`.
    pub at: Option<(u32, String)>,
}

/// A watchdog.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watchdog {
    /// What it is.
    pub model: WatchdogModel,
    /// What it does.
    pub end: WatchdogEnd,
}

const TOPOLOGY: &str = "hardware.cpu.topology";
const NUMA: &str = "hardware.numa";
const USB: &str = "hardware.usb";
const USB_DEVICES: &str = "hardware.usb.devices";
const USB_FILTER: &str = "hardware.usb.filter";
const INPUT: &str = "hardware.input";
const SOUND: &str = "hardware.sound";
const VIDEO: &str = "hardware.video";
const WATCHDOG: &str = "hardware.watchdog";
const PANIC: &str = "hardware.panic";
const DEFLATE: &str = "hardware.balloon.deflate";
/// How often a balloon tells.
pub const PERIOD: &str = "hardware.balloon.period";
const HPET: &str = "hardware.hpet";
const CLOCK_START: &str = "hardware.clock.start";
const CLOCK_ZONE: &str = "hardware.clock.zone";
const SLEEP: &str = "hardware.sleep";
const MENU_TIMEOUT: &str = "hardware.boot_menu.timeout";
const RETRY: &str = "hardware.boot.retry";
const GENERATION: &str = "hardware.generation";

fn wrong(key: &str, text: impl Into<String>) -> Error {
    Error::invalid(format!("config.{key}"), text)
}

fn word<T: Copy>(key: &str, text: &str, table: &[(&str, T)]) -> Result<T> {
    let found = table.iter().find(|(name, _)| *name == text).map(|(_, value)| *value);
    found.ok_or_else(|| {
        let names: Vec<&str> = table.iter().map(|(name, _)| *name).collect();
        wrong(key, format!("{text:?} is not there; {} are", names.join(", ")))
    })
}

fn number(key: &str, text: &str) -> Result<u32> {
    text.parse().map_err(|_| wrong(key, format!("{text:?} is not a whole number")))
}

fn list<T>(config: &Config, key: &str, most: usize, one: impl Fn(&str) -> Result<T>) -> Result<Vec<T>> {
    let Some(text) = set(config, key) else { return Ok(vec![]) };
    let all = text.split(',').map(|part| one(part.trim())).collect::<Result<Vec<_>>>()?;
    if all.len() > most {
        return Err(wrong(key, format!("a machine has {most} at most")));
    }
    Ok(all)
}

fn joined<T>(all: &[T], one: impl Fn(&T) -> String) -> Option<String> {
    (!all.is_empty()).then(|| all.iter().map(one).collect::<Vec<_>>().join(","))
}

fn topology(text: &str) -> Result<Topology> {
    let mut found = Topology { sockets: 1, dies: 1, cores: 1, threads: 1 };
    for part in text.split(',') {
        let (name, value) = part.trim().split_once('=').unwrap_or((part.trim(), ""));
        let of = match name {
            "sockets" => &mut found.sockets,
            "dies" => &mut found.dies,
            "cores" => &mut found.cores,
            "threads" => &mut found.threads,
            _ => {
                let text = format!("{part:?} is no part of it; write sockets=1,dies=1,cores=2,threads=2");
                return Err(wrong(TOPOLOGY, text));
            }
        };
        *of = number(TOPOLOGY, value)?;
    }
    match found.processors() {
        1..=1024 => Ok(found),
        n => Err(wrong(TOPOLOGY, format!("{n} processors are not possible; 1 to 1024 are"))),
    }
}

/// `0-3,8` as ranges; nothing of what is none.
pub fn parse_ranges(text: &str) -> Option<Vec<(u32, u32)>> {
    let mut all: Vec<(u32, u32)> = vec![];
    for part in text.split(',') {
        let (first, last) = part.trim().split_once('-').unwrap_or((part.trim(), part.trim()));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if last < first || last > 4096 {
            return None;
        }
        all.push((first, last));
    }
    all.sort_unstable();
    let apart = all.windows(2).all(|w| w[0].1 < w[1].0);
    apart.then_some(all)
}

/// Ranges as they are written.
pub fn ranges(all: &[(u32, u32)]) -> String {
    let one = |(first, last): &(u32, u32)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    all.iter().map(one).collect::<Vec<_>>().join(",")
}

/// `0-1:512MiB;2-3:512MiB`.
fn cells(text: &str) -> Result<Vec<NumaCell>> {
    let mut all = vec![];
    for part in text.split(';') {
        let odd = || wrong(NUMA, format!("{part:?} is no node; write its processors and memory, 0-1:512MiB"));
        let (cpus, memory) = part.trim().split_once(':').ok_or_else(odd)?;
        let cpus = if cpus.is_empty() { vec![] } else { parse_ranges(cpus).ok_or_else(odd)? };
        let memory = ByteSize::parse(&format!("config.{NUMA}"), memory)?;
        if memory.bytes() == 0 || !memory.bytes().is_multiple_of(1 << 20) {
            return Err(wrong(NUMA, "a node has a multiple of 1MiB"));
        }
        all.push(NumaCell { cpus, memory });
    }
    if all.len() > 128 {
        return Err(wrong(NUMA, "a machine has 128 at most"));
    }
    let mut seen: Vec<(u32, u32)> = all.iter().flat_map(|c| c.cpus.iter().copied()).collect();
    seen.sort_unstable();
    match seen.windows(2).all(|w| w[0].1 < w[1].0) {
        true => Ok(all),
        false => Err(wrong(NUMA, "a processor is of one node")),
    }
}

fn controller(text: &str) -> Result<UsbController> {
    let (model, ports) = text.split_once(':').map_or((text, None), |(m, p)| (m, Some(p)));
    let found = UsbController {
        model: word(USB, model, USB_MODELS)?,
        ports: ports.map(|p| number(USB, p)).transpose()?,
    };
    let good = match found.model {
        UsbModel::NecXhci | UsbModel::QemuXhci => found.ports.is_none_or(|p| (1..=15).contains(&p)),
        _ if found.is_companion() => found.ports.is_none_or(|p| p < 6),
        _ => found.ports.is_none(),
    };
    match good {
        true => Ok(found),
        false => {
            Err(wrong(USB, format!("{text:?}: xHCI controllers have 1 to 15 ports, and no others a number")))
        }
    }
}

fn usb_device(text: &str) -> Result<UsbDevice> {
    let (kind, at) = text.split_once('@').map_or((text, None), |(k, at)| (k, Some(at)));
    let at = match at {
        None => None,
        Some(at) => {
            let odd = || {
                wrong(
                    USB_DEVICES,
                    format!("{text:?}: a place is a bus and a port, such as hub@0:1 or mouse@0:1.2"),
                )
            };
            let (bus, port) = at.split_once(':').ok_or_else(odd)?;
            let good =
                port.split('.').all(|p| p.parse::<u8>().is_ok_and(|n| n > 0)) && port.split('.').count() <= 5;
            match good {
                true => Some((number(USB_DEVICES, bus)?, port.to_owned())),
                false => return Err(odd()),
            }
        }
    };
    Ok(UsbDevice { kind: word(USB_DEVICES, kind, USB_KINDS)?, at })
}

/// The clock of the hardware knows no year after 9999.
fn start(text: &str) -> Result<u64> {
    let good = text.parse().ok().filter(|n| *n < 253_402_300_800);
    good.ok_or_else(|| {
        wrong(CLOCK_START, format!("{text:?}: write seconds since 1970, before the year 10000"))
    })
}

/// The name of a time zone: of a file below those of the host, never a path of its own or a rule.
pub fn is_zone(text: &str) -> bool {
    let part = |p: &str| {
        p.starts_with(|c: char| c.is_ascii_alphabetic())
            && p.bytes().all(|b| b.is_ascii_alphanumeric() || b"_+-".contains(&b))
    };
    text.len() <= 64 && text.split('/').all(part)
}

fn zone(text: &str) -> Result<String> {
    match is_zone(text) {
        true => Ok(text.to_owned()),
        false => Err(wrong(CLOCK_ZONE, format!("{text:?} is no time zone; write one such as Europe/Paris"))),
    }
}

fn watchdog(text: &str) -> Result<Watchdog> {
    let (model, end) = text.split_once(':').unwrap_or((text, "reset"));
    Ok(Watchdog { model: word(WATCHDOG, model, WATCHDOGS)?, end: word(WATCHDOG, end, WATCHDOG_ENDS)? })
}

impl Board {
    /// Out of an expanded configuration.
    ///
    /// # Errors
    /// Invalid, naming the key.
    pub fn of(config: &Config) -> Result<Self> {
        let flag = |key: &str| optional_flag(config, key).unwrap_or(false);
        let sleep = set(config, SLEEP).unwrap_or_default();
        let (sleeps, hibernates) = match sleep {
            "" => (false, false),
            "memory" => (true, false),
            "disk" => (false, true),
            "both" => (true, true),
            other => return Err(wrong(SLEEP, format!("{other:?} is not there; memory, disk and both are"))),
        };
        let whole = |key: &str| set(config, key).map(|text| number(key, text)).transpose();
        let sound = list(config, SOUND, MOST, |text| word(SOUND, text, SOUNDS))?;
        let codecs = set(config, sound::CODECS).map(|text| sound::codecs(text, &sound)).transpose()?;
        let board = Self {
            topology: set(config, TOPOLOGY).map(topology).transpose()?,
            numa: set(config, NUMA).map(cells).transpose()?.unwrap_or_default(),
            numa_memory: set(config, nodes::CELLS).map(nodes::cells).transpose()?.unwrap_or_default(),
            numa_host: set(config, nodes::HOST).map(nodes::host).transpose()?.unwrap_or_default(),
            placement: set(config, placement::PLACEMENT)
                .map(Placement::parse)
                .transpose()?
                .unwrap_or_default(),
            numa_policy: set(config, placement::POLICY).map(placement::policy).transpose()?.flatten(),
            numa_distances: set(config, nodes::DISTANCES)
                .map(nodes::distances)
                .transpose()?
                .unwrap_or_default(),
            slots: set(config, nodes::SLOTS).map(nodes::slots).transpose()?,
            modules: set(config, nodes::MODULES).map(nodes::modules).transpose()?.unwrap_or_default(),
            clock_start: set(config, CLOCK_START).map(start).transpose()?,
            clock_zone: set(config, CLOCK_ZONE).map(zone).transpose()?,
            features: set(config, parts::FEATURES).map(Features::parse).transpose()?,
            iommu: set(config, parts::IOMMU).map(Iommu::parse).transpose()?,
            rngs: set(config, parts::RNG).map(parts::rngs).transpose()?.unwrap_or_default(),
            virtio: set(config, parts::VIRTIO).map(parts::virtio).transpose()?.unwrap_or_default(),
            scsi: set(config, scsi::SCSI).map(scsi::controllers).transpose()?.unwrap_or_default(),
            memory: set(config, memory::MEMORY).map(Memory::parse).transpose()?,
            usb: list(config, USB, MOST_USB, controller)?,
            usb_devices: list(config, USB_DEVICES, DEVICES, usb_device)?,
            usb_filter: set(config, USB_FILTER)
                .map(|text| usb_filter(&format!("config.{USB_FILTER}"), text))
                .transpose()?,
            inputs: list(config, INPUT, MOST, |text| word(INPUT, text, POINTERS))?,
            smbios: smbios::of(config)?,
            sound,
            sound_codecs: codecs.unwrap_or_default(),
            main_pool: set(config, host::MAIN_POOL).map(host::main_pool).transpose()?,
            video: list(config, VIDEO, MOST, |text| word(VIDEO, text, VIDEOS))?,
            render: set(config, host::RENDER).map(host::render).transpose()?,
            watchdog: set(config, WATCHDOG).map(watchdog).transpose()?,
            panic: flag(PANIC),
            balloon_deflates: flag(DEFLATE),
            balloon_period: whole(PERIOD)?,
            hpet: flag(HPET),
            sleeps,
            hibernates,
            menu_timeout: whole(MENU_TIMEOUT)?,
            boot_retry: whole(RETRY)?,
            generation: set(config, GENERATION)
                .map(|text| {
                    uuid::Uuid::parse_str(text).map_err(|_| wrong(GENERATION, format!("{text:?} is no UUID")))
                })
                .transpose()?,
        };
        board.demand_sense()?;
        placement::demand_sense(config, board.placement, board.numa_policy)?;
        Ok(board)
    }

    /// What does not fit together.
    fn demand_sense(&self) -> Result<()> {
        let first = self.usb.first();
        if first.is_some_and(UsbController::is_companion) {
            return Err(wrong(USB, "an UHCI controller of ICH9 follows the ich9-ehci1 that it belongs to"));
        }
        let mut master = None;
        for one in &self.usb {
            if !one.is_companion() {
                master = Some(one.model);
            } else if master != Some(UsbModel::Ich9Ehci1) {
                return Err(wrong(
                    USB,
                    "an UHCI controller of ICH9 follows the ich9-ehci1 that it belongs to",
                ));
            }
        }
        let buses = self.usb.iter().filter(|c| !c.is_companion()).count() as u32;
        if buses == 0 && !self.usb_devices.is_empty() {
            return Err(wrong(USB_DEVICES, "there is no controller that they could be at; set hardware.usb"));
        }
        let beyond = |d: &UsbDevice| d.at.as_ref().is_some_and(|(bus, _)| *bus >= buses);
        if let Some(device) = self.usb_devices.iter().find(|d| beyond(d)) {
            let text =
                format!("{:?} is at a bus that is not there; hardware.usb has {buses}", device.kind.as_str());
            return Err(wrong(USB_DEVICES, text));
        }
        if self.video.len() > 1 {
            if self.video.contains(&Video::Absent) {
                return Err(wrong(VIDEO, "none is alone"));
            }
            let further =
                |v: &Video| matches!(v, Video::Qxl | Video::Virtio | Video::VirtioGl | Video::Bochs);
            if !self.video[1..].iter().all(further) {
                return Err(wrong(VIDEO, "further screens are on qxl, virtio, virtio-gl or bochs"));
            }
        }
        if self.video.contains(&Video::VirtioGl) && self.render.is_none() {
            return Err(wrong(
                VIDEO,
                "virtio-gl is drawn by a graphics card of the host; set hardware.video.render",
            ));
        }
        if self.sound.iter().filter(|s| **s == Sound::Pcspk).count() > 1 {
            return Err(wrong(SOUND, "a machine has one speaker (pcspk)"));
        }
        if self.clock_start.is_some() && self.clock_zone.is_some() {
            return Err(wrong(CLOCK_ZONE, "hardware.clock.start says what the clock shows; unset one"));
        }
        nodes::demand_room(&self.modules, self.slots, &self.numa)?;
        let cells = self.numa.len() as u32;
        let named = [
            (nodes::CELLS, self.numa_memory.last().map(|(node, _)| *node)),
            (nodes::HOST, self.numa_host.last().map(|(node, _)| *node)),
            (nodes::DISTANCES, self.numa_distances.iter().map(|d| d.from.max(d.to)).max()),
        ];
        if let Some((key, _)) = named.iter().find(|(_, node)| node.is_some_and(|n| n >= cells)) {
            return Err(wrong(key, format!("there is no such node; hardware.numa has {cells}")));
        }
        let input = |name: &String| name.strip_prefix("input").and_then(|n| n.parse::<usize>().ok());
        if let Some(n) = self.virtio.keys().filter_map(input).find(|n| *n >= self.inputs.len()) {
            return Err(wrong(parts::VIRTIO, format!("there is no input{n}; set hardware.input")));
        }
        let remaps = self.iommu.is_some_and(|i| i.interrupts == Some(true) || i.extended == Some(true));
        if remaps && !self.features.is_some_and(|f| f.split_irqchip) {
            let text = "interrupts pass through it where hardware.features has split-irqchip";
            return Err(wrong(parts::IOMMU, text));
        }
        if let (Some(topology), false) = (&self.topology, self.numa.is_empty()) {
            let beyond = |c: &NumaCell| c.cpus.last().is_some_and(|(_, last)| *last >= topology.processors());
            if self.numa.iter().any(beyond) {
                return Err(wrong(NUMA, "a node has processors that hardware.cpu.topology has not"));
            }
        }
        Ok(())
    }

    /// Nothing of it is there, as with machines of earlier versions.
    pub fn is_usual(&self) -> bool {
        *self == Self::default()
    }

    /// The keys that say it, with the values of those that are set.
    pub fn keys(&self) -> Vec<(&'static str, Option<String>)> {
        let flag = |flag: bool| flag.then(|| "true".to_owned());
        let device = |d: &UsbDevice| match &d.at {
            Some((bus, port)) => format!("{}@{bus}:{port}", d.kind.as_str()),
            None => d.kind.as_str().to_owned(),
        };
        let controller = |c: &UsbController| match c.ports {
            Some(ports) => format!("{}:{ports}", c.model.as_str()),
            None => c.model.as_str().to_owned(),
        };
        let cell = |c: &NumaCell| format!("{}:{}MiB", ranges(&c.cpus), c.memory.bytes() >> 20);
        let mut all = vec![
            (RETRY, self.boot_retry.map(|n| n.to_string())),
            (MENU_TIMEOUT, self.menu_timeout.map(|n| n.to_string())),
            (DEFLATE, flag(self.balloon_deflates)),
            (PERIOD, self.balloon_period.map(|n| n.to_string())),
            (CLOCK_START, self.clock_start.map(|n| n.to_string())),
            (CLOCK_ZONE, self.clock_zone.clone()),
            (
                TOPOLOGY,
                self.topology.map(|t| {
                    format!("sockets={},dies={},cores={},threads={}", t.sockets, t.dies, t.cores, t.threads)
                }),
            ),
            (parts::FEATURES, self.features.and_then(Features::text)),
            (GENERATION, self.generation.map(|g| g.to_string())),
            (HPET, flag(self.hpet)),
            (INPUT, joined(&self.inputs, |i| i.as_str().to_owned())),
            (parts::IOMMU, self.iommu.map(Iommu::text)),
            (memory::MEMORY, self.memory.map(|m| m.text())),
            (nodes::MODULES, nodes::modules_text(&self.modules)),
            (nodes::SLOTS, self.slots.map(nodes::slots_text)),
            (NUMA, (!self.numa.is_empty()).then(|| self.numa.iter().map(cell).collect::<Vec<_>>().join(";"))),
            (nodes::DISTANCES, nodes::distances_text(&self.numa_distances)),
            (nodes::HOST, nodes::host_text(&self.numa_host)),
            (nodes::CELLS, nodes::cells_text(&self.numa_memory)),
            (placement::PLACEMENT, self.placement.text()),
            (placement::POLICY, self.numa_policy.map(|p| p.as_str().to_owned())),
            (PANIC, flag(self.panic)),
            (parts::RNG, parts::rngs_text(&self.rngs)),
            (scsi::SCSI, scsi::text(&self.scsi)),
            (
                SLEEP,
                match (self.sleeps, self.hibernates) {
                    (true, true) => Some("both".into()),
                    (true, false) => Some("memory".into()),
                    (false, true) => Some("disk".into()),
                    (false, false) => None,
                },
            ),
            (host::MAIN_POOL, self.main_pool.map(host::main_pool_text)),
            (SOUND, joined(&self.sound, |s| s.as_str().to_owned())),
            (sound::CODECS, sound::text(&self.sound_codecs)),
            (USB, joined(&self.usb, controller)),
            (USB_DEVICES, joined(&self.usb_devices, device)),
            (USB_FILTER, self.usb_filter.clone()),
            (VIDEO, joined(&self.video, |v| v.as_str().to_owned())),
            (host::RENDER, self.render.clone()),
            (parts::VIRTIO, parts::virtio_text(&self.virtio)),
            (WATCHDOG, self.watchdog.map(|w| format!("{}:{}", w.model.as_str(), w.end.as_str()))),
        ];
        all.extend(smbios::keys(&self.smbios));
        all
    }

    /// The keys by which two of them are not the same.
    pub fn differences(&self, other: &Self) -> Vec<&'static str> {
        let pairs = self.keys().into_iter().zip(other.keys());
        pairs.filter(|((_, one), (_, two))| one != two).map(|((key, _), _)| key).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{
        host::{MAIN_POOL, RENDER},
        memory::MEMORY,
        *,
    };

    fn of(pairs: &[(&str, &str)]) -> Result<Board> {
        Board::of(&pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect())
    }

    #[test]
    fn what_is_written_is_read_again() {
        assert!(of(&[]).unwrap().is_usual());
        let usual = of(&[(MEMORY, "hugepages")]).unwrap();
        let again: Board = serde_json::from_str(&serde_json::to_string(&usual).unwrap()).unwrap();
        assert_eq!(again, usual, "of no size in particular is not none");
        let all = [
            (RETRY, "5000"),
            (MENU_TIMEOUT, "3000"),
            (DEFLATE, "true"),
            (PERIOD, "5"),
            (CLOCK_START, "253402300799"),
            (TOPOLOGY, "sockets=2,dies=1,cores=4,threads=2"),
            (
                parts::FEATURES,
                "vmcoreinfo,hyperv-panic,split-irqchip,tpm-tis,rtc-realtime,dirty-ring=4096,tseg=48,tcg-cache=100",
            ),
            (GENERATION, "0b3c1f9e-7f2c-4d0a-9a53-3a3f6f0f0001"),
            (HPET, "true"),
            (INPUT, "tablet,mouse"),
            (parts::IOMMU, "intel,intremap=on,caching,eim=on,iotlb,width=48"),
            (MEMORY, "file,locked,shared,allocated,unmerged,hugepages=2MiB"),
            (nodes::MODULES, "512MiB@0+slot=3+private+hugepages=2MiB+bind:0-1,3;64MiB@1"),
            (nodes::SLOTS, "16:4096MiB"),
            (NUMA, "0-3,8:512MiB;4-7:1024MiB"),
            (nodes::DISTANCES, "0-1=21,1-0=31"),
            (nodes::HOST, "0=bind:0-1,3;1=preferred:2"),
            (nodes::CELLS, "0=shared;1=private+hugepages=2MiB"),
            (PANIC, "true"),
            (parts::RNG, "plain,rate=1024/1000+iommu+packed"),
            (scsi::SCSI, "virtio-scsi,lsilogic"),
            (SLEEP, "memory"),
            (MAIN_POOL, "8-16"),
            (SOUND, "ich6,ac97,pcspk"),
            (sound::CODECS, "0=micro+duplex"),
            (USB, "ich9-ehci1,ich9-uhci1:0,ich9-uhci2:2,qemu-xhci:15"),
            (USB_DEVICES, "hub@0:1,mouse@0:1.2,tablet"),
            (USB_FILTER, "0x08:-1:-1:-1:1|-1:-1:-1:-1:0"),
            (VIDEO, "qxl,qxl"),
            (RENDER, "/dev/dri/renderD128"),
            (parts::VIRTIO, "balloon=ats,input1=iommu+page-per-queue,scsi=packed"),
            (WATCHDOG, "i6300esb:poweroff"),
            ("hardware.smbios.system.serial", "1, 2"),
        ];
        let board = of(&all).unwrap();
        let keys = board.keys();
        let again: Vec<(&str, &str)> = keys.iter().filter_map(|(k, v)| Some((*k, v.as_deref()?))).collect();
        assert_eq!(again, all);
        assert_eq!(board.differences(&board), [] as [&str; 0]);
        let other = Board { watchdog: None, video: vec![], ..board.clone() };
        assert_eq!(board.differences(&other), [VIDEO, WATCHDOG]);
        assert_eq!(serde_json::from_str::<Board>(&serde_json::to_string(&board).unwrap()).unwrap(), board);
        let zone = of(&[(CLOCK_ZONE, "Europe/Paris")]).unwrap();
        assert!(zone.keys().contains(&(CLOCK_ZONE, Some("Europe/Paris".into()))));
        assert_eq!(of(&[(WATCHDOG, "ib700")]).unwrap().watchdog.unwrap().end, WatchdogEnd::Reset);
    }

    #[test]
    fn what_cannot_be_names_its_key() {
        for (pairs, key) in [
            (&[(TOPOLOGY, "cores=0")][..], TOPOLOGY),
            (&[(TOPOLOGY, "plants=2")], TOPOLOGY),
            (&[(NUMA, "0-1")], NUMA),
            (&[(NUMA, "0-1:1MiB;1-2:1MiB")], NUMA),
            (&[(NUMA, "0:1500KiB")], NUMA),
            (&[(NUMA, "0-3:1MiB"), (TOPOLOGY, "cores=2")], NUMA),
            (&[(USB, "uhci")], USB),
            (&[(USB, "piix3-uhci:4")], USB),
            (&[(USB, "qemu-xhci:16")], USB),
            (&[(USB, "ich9-uhci1:0")], USB),
            (&[(USB, "qemu-xhci,ich9-uhci1:0")], USB),
            (&[(USB_DEVICES, "hub")], USB_DEVICES),
            (&[(USB, "ehci"), (USB_DEVICES, "hub@1:1")], USB_DEVICES),
            (&[(USB, "ehci"), (USB_DEVICES, "hub@0:a")], USB_DEVICES),
            (&[(SOUND, "loud")], SOUND),
            (&[(MEMORY, "hugepages=3MiB")], MEMORY),
            (&[(MEMORY, "fast")], MEMORY),
            (&[(MEMORY, "file,disk")], MEMORY),
            (&[(MEMORY, "disk,hugepages")], MEMORY),
            (&[(VIDEO, "none,qxl")], VIDEO),
            (&[(VIDEO, "qxl,cirrus")], VIDEO),
            (&[(VIDEO, "virtio-gl")], VIDEO),
            (&[(RENDER, "/dev/sda")], RENDER),
            (&[(RENDER, "/dev/dri/../sda")], RENDER),
            (&[(WATCHDOG, "ib700:bark")], WATCHDOG),
            (&[(GENERATION, "x")], GENERATION),
            (&[(SLEEP, "often")], SLEEP),
            (&[(SOUND, "pcspk,pcspk")], SOUND),
            (&[(SOUND, "ac97"), (sound::CODECS, "0=micro")], sound::CODECS),
            (&[(MAIN_POOL, "8")], MAIN_POOL),
            (&[(MAIN_POOL, "-")], MAIN_POOL),
            (&[(MAIN_POOL, "16-8")], MAIN_POOL),
            (&[(MAIN_POOL, "80-")], MAIN_POOL),
            (&[(MAIN_POOL, "0-0")], MAIN_POOL),
            (&[(CLOCK_START, "253402300800")], CLOCK_START),
            (&[(CLOCK_START, "noon")], CLOCK_START),
            (&[(CLOCK_ZONE, "/etc/passwd")], CLOCK_ZONE),
            (&[(CLOCK_ZONE, "Europe/../..")], CLOCK_ZONE),
            (&[(CLOCK_ZONE, "Europe/Paris"), (CLOCK_START, "60")], CLOCK_ZONE),
            (&[(parts::FEATURES, "fast")], parts::FEATURES),
            (&[(parts::FEATURES, "vmcoreinfo=yes")], parts::FEATURES),
            (&[(parts::FEATURES, "dirty-ring=5000")], parts::FEATURES),
            (&[(parts::FEATURES, "tseg=0")], parts::FEATURES),
            (&[(parts::FEATURES, "tseg=4096")], parts::FEATURES),
            (&[(parts::IOMMU, "amd")], parts::IOMMU),
            (&[(parts::IOMMU, "virtio,caching")], parts::IOMMU),
            (&[(parts::IOMMU, "intel,intremap=on")], parts::IOMMU),
            (&[(parts::IOMMU, "intel,intremap=off,eim=on")], parts::IOMMU),
            (&[(parts::RNG, "rate=0/1000")], parts::RNG),
            (&[(parts::RNG, "rate=9223372036854775808/1000")], parts::RNG),
            (&[(parts::RNG, "plain+iommu")], parts::RNG),
            (&[(parts::VIRTIO, "disk=iommu")], parts::VIRTIO),
            (&[(parts::VIRTIO, "scsi=fast")], parts::VIRTIO),
            (&[(parts::VIRTIO, "input0=ats")], parts::VIRTIO),
            (&[(parts::VIRTIO, "scsi=ats,scsi=iommu")], parts::VIRTIO),
            (&[(nodes::HOST, "0=bind:0")], nodes::HOST),
            (&[(nodes::SLOTS, "0:1GiB")], nodes::SLOTS),
            (&[(nodes::SLOTS, "4:1000")], nodes::SLOTS),
            (&[(NUMA, "0:64MiB"), (nodes::MODULES, "64MiB@0")], nodes::MODULES),
            (&[(NUMA, "0:64MiB"), (nodes::SLOTS, "1:1GiB"), (nodes::MODULES, "64MiB@1")], nodes::MODULES),
            (&[(NUMA, "0:64MiB"), (nodes::SLOTS, "1:1GiB"), (nodes::MODULES, "1GiB@0")], nodes::MODULES),
            (
                &[(NUMA, "0:64MiB"), (nodes::SLOTS, "1:1GiB"), (nodes::MODULES, "1MiB@0;1MiB@0")],
                nodes::MODULES,
            ),
            (
                &[(NUMA, "0:64MiB"), (nodes::SLOTS, "2:1GiB"), (nodes::MODULES, "1MiB@0+slot=2")],
                nodes::MODULES,
            ),
            (&[(NUMA, "0:64MiB"), (nodes::SLOTS, "2:1GiB"), (nodes::MODULES, "1MiB@0+fast")], nodes::MODULES),
            (&[(NUMA, "0:64MiB"), (nodes::HOST, "0=strict:0")], nodes::HOST),
            (&[(NUMA, "0:64MiB"), (nodes::HOST, "0=bind:0;0=bind:1")], nodes::HOST),
            (&[(NUMA, "0:64MiB"), (nodes::HOST, "0=bind:128")], nodes::HOST),
            (&[(NUMA, "0:64MiB"), (nodes::CELLS, "1=shared")], nodes::CELLS),
            (&[(NUMA, "0:64MiB"), (nodes::CELLS, "0=hugepages=3MiB")], nodes::CELLS),
            (&[(NUMA, "0:64MiB"), (nodes::DISTANCES, "0-1=21")], nodes::DISTANCES),
            (&[(NUMA, "0:64MiB"), (nodes::DISTANCES, "0-0=9")], nodes::DISTANCES),
            (&[(NUMA, "0:64MiB"), (nodes::DISTANCES, "0-0=11")], nodes::DISTANCES),
        ] {
            assert_eq!(of(pairs).unwrap_err().field, Some(format!("config.{key}")), "{pairs:?}");
        }
    }
}
