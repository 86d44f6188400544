//! Virtual machines as libvirt's domain XML: read into a typed form ([`read`]), brought into the engine's words ([`spec`]),
//! and written out of an instance ([`write`]). Without side effects: nothing here asks the engine or the host.
//!
//! What Karst has no field for is kept as it was written ([`Opaque`]) and shown again; it never reaches QEMU. What would
//! change what a guest is or what protects it, and that Karst does not do, is refused by the name of its element ([`kept`]).

pub mod aliases;
pub mod board;
pub mod clock;
pub mod hostdevs;
pub mod iotune;
pub mod kept;
pub mod layers;
pub mod nodes;
pub mod options;
pub mod parts;
pub mod places;
pub mod plugs;
pub mod ports;
pub mod processor;
pub mod read;
pub mod scsi;
pub mod shares;
pub mod sizes;
pub mod spec;
pub mod sysinfo;
pub mod tuning;
pub mod write;

use super::{Element, encryption::SecretName, network::ports::Direction};
use crate::error::{Code, Part, VirError};
use karst_model::{
    board::Board,
    device::{DiskBus, DiskCache, DriveFormat, HostDevice, NicModel, Rates},
    display::{DisplayGuard, DisplayPassword, DisplayProtocol},
    instance::{DeviceIdentity, Firmware},
    options::{DiskOptions, NicOptions},
};
use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};
use uuid::Uuid;

/// A domain that is a virtual machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// It demands KVM.
    pub kvm: bool,
    /// Name.
    pub name: String,
    /// UUID, when it says one.
    pub uuid: Option<Uuid>,
    /// Title.
    pub title: Option<String>,
    /// Description.
    pub description: String,
    /// What applications keep there, by the URI of their namespace: the prefix and the element without it.
    pub metadata: BTreeMap<String, (String, Element)>,
    /// Memory in KiB, which is set aside for it.
    pub memory: u64,
    /// What its balloon leaves it of that at the start, KiB.
    pub current: u64,
    /// CPUs at the start.
    pub cpus: u32,
    /// CPUs that it can have.
    pub most_cpus: u32,
    /// CPUs of the host that its threads run on, those that are not pinned apart.
    pub pinned: Option<String>,
    /// Threads, pins and limits.
    pub tuning: tuning::Tuning,
    /// Machine type, such as `q35` or `pc-q35-7.2`.
    pub machine: Option<String>,
    /// Firmware.
    pub firmware: Firmware,
    /// The firmware offers its menu.
    pub boot_menu: bool,
    /// CPU model in QEMU's words with its flags; `None`: as the host has it.
    pub cpu_model: Option<String>,
    /// Its processors are of 32 bits (`i686`).
    pub old: bool,
    /// What its board has beside.
    pub board: Board,
    /// It has a balloon.
    pub balloon: bool,
    /// The clock of its hardware is in local time.
    pub local_time: bool,
    /// It is told what Hyper-V tells its guests.
    pub hyper_v: bool,
    /// It starts again after a crash.
    pub restarts: bool,
    /// It halts after a crash, to be looked at.
    pub preserved: bool,
    /// It ends when the system in it restarts.
    pub ends_on_reboot: bool,
    /// What it is started with in place of what its disks would boot.
    pub kernel: Option<Kernel>,
    /// It has a TPM 2.0.
    pub tpm: bool,
    /// The secret that the state of that is encrypted with.
    pub tpm_secret: Option<Uuid>,
    /// Disks.
    pub disks: Vec<Disk>,
    /// NICs.
    pub nics: Vec<Nic>,
    /// Ports that each machine has not anyway.
    pub ports: Vec<ports::Port>,
    /// Directories that it shares with its host.
    pub filesystems: Vec<shares::Filesystem>,
    /// Devices of the host that it is given.
    pub given: Vec<HostDevice>,
    /// Its screen is there by SPICE too.
    pub spice: bool,
    /// Where its screens listen, and how they are served.
    pub places: places::Places,
    /// The password of its screen.
    pub screen: Screen,
    /// The rest.
    pub opaque: Opaque,
}

/// What a document says of the password of a machine's screen. It is never kept as it was written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Screen {
    /// There is no screen of VNC or SPICE in it, so nothing is said.
    #[default]
    Unsaid,
    /// There is none.
    Open,
    /// This one.
    Guarded(DisplayGuard),
}

/// What the screen of a machine speaks, in the order in which a live document and calls have it.
pub fn screens(spice: bool) -> &'static [DisplayProtocol] {
    const BOTH: [DisplayProtocol; 2] = [DisplayProtocol::Spice, DisplayProtocol::Vnc];
    if spice { &BOTH } else { &BOTH[1..] }
}

/// What is shown of the password of a machine's screen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShownGuard {
    /// The password, to who may have it.
    pub password: Option<DisplayPassword>,
    /// Until when it lets anybody in.
    pub valid_to: Option<jiff::Timestamp>,
}

/// A kernel that a machine is started with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// The kernel.
    pub kernel: Source,
    /// Its initial file system.
    pub initrd: Option<Source>,
    /// Command line.
    pub cmdline: Option<String>,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Name in libvirt's words, such as `vda`.
    pub target: String,
    /// Slot on its bus, such as `virtio0`.
    pub slot: String,
    /// Bus.
    pub bus: DiskBus,
    /// A drive of discs.
    pub cdrom: bool,
    /// What it shows; nothing in an empty drive of discs.
    pub source: Option<Source>,
    /// The guest cannot write.
    pub readonly: bool,
    /// The machine starts without it where it is missing.
    pub optional: bool,
    /// Cache mode.
    pub cache: Option<DiskCache>,
    /// How what is at a path of the host is written down.
    pub format: DriveFormat,
    /// Number of the thread that serves it.
    pub thread: Option<u32>,
    /// What of it is not as usual.
    pub options: DiskOptions,
    /// Limits of rates.
    pub rates: Rates,
    /// Boot order, higher first.
    pub boot: Option<u32>,
    /// Alias that the user gave.
    pub alias: Option<String>,
    /// PCI address.
    pub pci: Option<String>,
    /// What opens it, where it is encrypted.
    pub secret: Option<SecretName>,
}

/// What a disk shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A volume by the names of its pool and its own.
    Volume {
        /// Pool.
        pool: String,
        /// Volume.
        volume: String,
    },
    /// A path of the host, for its administrators only.
    Path(String),
}

impl Source {
    /// As the path that documents have of it.
    pub fn path(&self) -> String {
        match self {
            Self::Volume { pool, volume } => format!("{}{pool}/{volume}", read::VOLUMES),
            Self::Path(path) => path.clone(),
        }
    }
}

/// A NIC on a network of Karst.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// Network; `None`: it goes out as the host itself.
    pub network: Option<String>,
    /// MAC address.
    pub mac: Option<String>,
    /// What the guest sees.
    pub model: NicModel,
    /// What of it is not as usual.
    pub options: NicOptions,
    /// The cable is plugged.
    pub connected: bool,
    /// MTU.
    pub mtu: Option<u32>,
    /// Boot order, higher first.
    pub boot: Option<u32>,
    /// Only its own MAC address as sender.
    pub mac_filter: bool,
    /// Only its own addresses as sender.
    pub ip_filter: bool,
    /// The addresses that its network gives it, where the document says.
    pub addresses: (Option<Ipv4Addr>, Option<Ipv6Addr>),
    /// No traffic with other isolated ports.
    pub isolated: bool,
    /// To the guest and from it.
    pub limits: [Direction; 2],
    /// The network's group of ports that it names.
    pub group: Option<String>,
    /// Alias that the user gave.
    pub alias: Option<String>,
    /// PCI address.
    pub pci: Option<String>,
}

/// XML without a field of the model.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Opaque {
    /// Elements of the domain.
    pub domain: Vec<Element>,
    /// Devices.
    pub devices: Vec<Element>,
    /// Disks as they were written, by target.
    pub disks: BTreeMap<String, Element>,
    /// NICs as they were written, by MAC address once there is one; by their order (`0`, `1`) before.
    pub nics: BTreeMap<String, Element>,
}

impl Opaque {
    /// As the value of a key.
    pub fn document(&self) -> String {
        let of = |name: &'static str, all: &BTreeMap<String, Element>| {
            let one = |(at, e): (&String, &Element)| Element::new("of").with("at", at).child(e.clone());
            Element::new(name).children(all.iter().map(one))
        };
        Element::new("opaque")
            .child(Element::new("domain").children(self.domain.iter().cloned()))
            .child(Element::new("devices").children(self.devices.iter().cloned()))
            .child(of("disks", &self.disks))
            .child(of("nics", &self.nics))
            .document()
    }

    /// Out of the value of a key; what somebody else wrote there counts as nothing, and so does what was kept once and is
    /// refused now.
    pub fn parse(text: &str) -> Self {
        let Ok(root) = super::read::document(text) else { return Self::default() };
        let list = |name: &str| root.find(name).map(|e| e.elements().to_vec()).unwrap_or_default();
        let map = |name: &str| {
            let one = |e: &Element| Some((e.attribute("at")?.to_owned(), e.elements().first()?.clone()));
            list(name).iter().filter_map(one).collect()
        };
        let mut all =
            Self { domain: list("domain"), devices: list("devices"), disks: map("disks"), nics: map("nics") };
        all.domain.retain(|e| kept::part(e).is_ok());
        all.devices.retain(|e| kept::device(e).is_ok());
        all.disks.values_mut().for_each(kept::without_refused);
        all.nics.values_mut().for_each(kept::without_refused);
        all
    }
}

/// A definition that Karst does not do; names its element.
pub fn refuse(element: &str, why: impl std::fmt::Display) -> VirError {
    VirError::new(Code::ConfigUnsupported, Part::Qemu, format!("{element}: {why}"))
}

/// A definition that says nothing sensible.
pub(super) fn wrong(text: impl Into<String>) -> VirError {
    VirError::new(Code::XmlError, Part::Domain, text)
}

/// The name of a volume that an instance owns: beside those that users make, which have no slash in theirs.
pub fn owned(instance: &str) -> String {
    format!("instances/{instance}")
}

/// Boot order, higher first, of what is the `n`th.
pub fn priority(n: u32) -> u32 {
    1000u32.saturating_sub(n).max(1)
}

/// Name of a disk in a guest's words, such as `sda`, by its slot.
pub fn target(slot: &str, bus: DiskBus) -> (String, &'static str) {
    let at = slot.find(|c: char| c.is_ascii_digit()).unwrap_or(slot.len());
    let n: u32 = slot[at..].parse().unwrap_or(0);
    let letters = |n: u32| {
        let letter = |n: u32| char::from(b'a' + (n % 26) as u8);
        match n / 26 {
            0 => letter(n).to_string(),
            more => format!("{}{}", letter(more - 1), letter(n)),
        }
    };
    match bus {
        DiskBus::VirtioBlk => (format!("vd{}", letters(n)), "virtio"),
        DiskBus::Sata => (format!("sd{}", letters(n)), "sata"),
        DiskBus::Ide => (format!("hd{}", letters(n)), "ide"),
        DiskBus::Floppy => (format!("fd{}", letters(n)), "fdc"),
        DiskBus::Usb => (format!("sd{}", letters(n)), "usb"),
        DiskBus::Nvme => (format!("nvme{n}n1"), "nvme"),
        _ => (format!("sd{}", letters(n)), "scsi"),
    }
}

/// Is it no drive of the machine's: a directory that it shares with its host, or a root that its guest does not see?
pub fn is_no_drive(identity: &DeviceIdentity) -> bool {
    identity.slot.starts_with("fs") || identity.slot.starts_with(karst_engine::compute::slots::HIDDEN)
}

/// The number of a disk by its name: 1 of `vdb`, 2 of `nvme2n1`.
pub fn number(target: &str) -> Option<u32> {
    if let Some(digits) = target.strip_prefix("nvme").and_then(|t| t.strip_suffix("n1")) {
        let n = digits.parse().ok()?;
        return (format!("{n}") == digits && n < 702).then_some(n);
    }
    let letters = target.strip_prefix("vd").or_else(|| target.strip_prefix("sd"));
    let letters = letters.or_else(|| target.strip_prefix("hd")).or_else(|| target.strip_prefix("fd"));
    let letters = letters.or_else(|| target.strip_prefix("xvd"))?;
    if letters.is_empty() || letters.len() > 2 || !letters.bytes().all(|b| b.is_ascii_lowercase()) {
        return None;
    }
    Some(letters.bytes().fold(0, |n, b| n * 26 + u32::from(b - b'a') + 1) - 1)
}

/// `03:00.0` out of libvirt's attributes.
pub fn pci_of(address: &Element) -> Option<String> {
    if address.attribute("type") != Some("pci") {
        return None;
    }
    let number = |name: &str| {
        let text = address.attribute(name).unwrap_or("0");
        match text.strip_prefix("0x") {
            Some(hex) => u32::from_str_radix(hex, 16).ok(),
            None => text.parse().ok(),
        }
    };
    let (domain, bus, slot, function) =
        (number("domain")?, number("bus")?, number("slot")?, number("function")?);
    (domain == 0 && bus < 256 && slot < 32 && function < 8)
        .then(|| format!("{bus:02x}:{slot:02x}.{function}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_disks() {
        assert_eq!(target("scsi0", DiskBus::VirtioScsi), ("sda".to_owned(), "scsi"));
        assert_eq!(target("virtio1", DiskBus::VirtioBlk), ("vdb".to_owned(), "virtio"));
        assert_eq!(target("scsi27", DiskBus::VirtioScsi), ("sdab".to_owned(), "scsi"));
        for n in 0..64 {
            let (name, _) = target(&format!("virtio{n}"), DiskBus::VirtioBlk);
            assert_eq!(number(&name), Some(n), "{name}");
            let (name, bus) = target(&format!("nvme{n}"), DiskBus::Nvme);
            assert_eq!((number(&name), bus), (Some(n), "nvme"), "{name}");
        }
        for none in ["vd", "vdA", "nvme", "nvme0", "nvme0n2", "nvme00n1", "nvme-1n1", "nvme9999n1"] {
            assert_eq!(number(none), None, "{none}");
        }
    }

    #[test]
    fn opaque_parts_survive_being_kept() {
        let mut opaque = Opaque::default();
        opaque.domain.push(Element::new("pm").child(Element::new("suspend-to-mem").with("enabled", "no")));
        opaque
            .disks
            .insert("vda".into(), Element::new("disk").child(Element::new("driver").with("io", "a'b")));
        assert_eq!(Opaque::parse(&opaque.document()), opaque);
        // Of what was kept once and has no effect nothing is shown any more.
        let mut old = opaque.clone();
        old.domain.push(Element::new("cputune").child(Element::text("quota", 2048)));
        old.disks.values_mut().for_each(|disk| disk.push(Element::new("transient")));
        old.devices.push(Element::new("shmem").with("name", "shmem0"));
        old.disks.values_mut().for_each(|disk| disk.set("rawio", "yes"));
        assert_eq!(Opaque::parse(&old.document()), opaque);
        assert_eq!(Opaque::parse("<x"), Opaque::default());
    }

    #[test]
    fn addresses() {
        let address = |bus: &str, slot: &str| {
            Element::new("address")
                .with("type", "pci")
                .with("domain", "0x0000")
                .with("bus", bus)
                .with("slot", slot)
        };
        assert_eq!(pci_of(&address("0x03", "0x00")).as_deref(), Some("03:00.0"));
        assert_eq!(pci_of(&address("16", "0x1f")).as_deref(), Some("10:1f.0"));
        assert_eq!(pci_of(&address("x", "0")), None);
        assert_eq!(pci_of(&Element::new("address").with("type", "drive")), None);
    }
}
