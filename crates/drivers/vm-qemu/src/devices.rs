//! Disks and NICs as QEMU takes them: JSON that is the same at the start (arguments) and later (commands). Pure.
//!
//! Everything of a device is named after its bus slot, which is its own for as long as the device lives: the device
//! `disk-SLOT`, its nodes `f-SLOT` (file), `i-SLOT` (format), `d-SLOT` (limits of rates, the top), `b-SLOT` (below a
//! clone), the group of its limits `t-SLOT`, and its descriptor sets. So what belongs to a slot can be found and removed
//! without knowing how far a plugging went.
//!
//! A disk in layers has a file node and a format node of each of its files, which have the file's number behind the slot
//! ([`Side::of_layer`]); the highest is below the limits.
//!
//! All but the device there is twice ([`Side`]): a disk that is copied while the machine runs has its copy on the other side,
//! and a machine that goes on from the copy drives that one from then on. Which of the two it is, QEMU says.

use crate::{board, threads};
use karst_guest::{DiskFormat, ResolvedDisk, ResolvedLink, ResolvedNic};
use karst_model::{
    Error, Result,
    device::{DiskCache, DiskIo, NicModel, RATE_WORDS, Rates},
    layer::{MOST_BELOW, MOST_MADE},
    options::{DiskOptions, NicOptions, NicSender, OnError, Virtio},
};
use serde_json::{Value, json};

/// Disks of one machine.
pub const MAX_DISKS: usize = 64;
/// Files below others, of all disks of one machine.
pub const MAX_LOWER: usize = MOST_BELOW;
/// NICs of one machine.
pub const MAX_NICS: usize = 16;
/// Ports of the SATA controller.
pub const SATA_PORTS: u32 = 6;
/// Drives of the IDE controller of i440FX: two at each of its two channels.
pub const IDE_DRIVES: u32 = 4;
/// PCIe root ports that a machine can have: the functions of two slots.
pub const MAX_PORTS: u8 = 16;

/// What decides where devices can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// i440FX rather than q35.
    pub pc: bool,
    /// PCIe root ports, at which devices come and go while the machine runs.
    pub ports: u8,
}

impl Layout {
    /// Of a machine type.
    ///
    /// # Errors
    /// Invalid when it is none of ours or not versioned.
    pub fn of(machine: &str, ports: u8) -> Result<Self> {
        let pc = machine.starts_with("pc-i440fx-");
        if !pc && !machine.starts_with("pc-q35-") {
            return Err(Error::invalid(
                "hardware.machine",
                format!("{machine:?} is not a versioned machine type, such as pc-q35-7.2 or pc-i440fx-7.2"),
            ));
        }
        Ok(Self { pc, ports: if pc { 0 } else { ports.min(MAX_PORTS) } })
    }

    /// The root bus.
    pub fn root_bus(self) -> &'static str {
        if self.pc { "pci.0" } else { "pcie.0" }
    }

    /// Can PCI devices come and go while the machine runs?
    pub fn hotplug(self) -> bool {
        self.pc || self.ports > 0
    }

    /// Bus and address of `00:04.0` (on the root bus) or `03:00.0` (behind root port 3).
    ///
    /// # Errors
    /// Invalid, naming `field`, for anything else.
    pub fn place(self, field: &str, pci: &str) -> Result<(String, String)> {
        let wrong = || {
            Error::invalid(field, format!("{pci:?} is not a PCI address of this machine, such as 00:04.0"))
        };
        let (bus, rest) = pci.split_once(':').ok_or_else(wrong)?;
        let (slot, function) = rest.split_once('.').ok_or_else(wrong)?;
        let hex = |s: &str| if s.len() <= 2 { u8::from_str_radix(s, 16).ok() } else { None };
        let (bus, slot) = (hex(bus).ok_or_else(wrong)?, hex(slot).ok_or_else(wrong)?);
        let function = function.parse::<u8>().ok().filter(|f| *f < 8).ok_or_else(wrong)?;
        match bus {
            0 if (1..0x1f).contains(&slot) => {
                Ok((self.root_bus().to_owned(), format!("0x{slot:x}.0x{function:x}")))
            }
            n if (1..=self.ports).contains(&n) && slot == 0 && function == 0 => {
                Ok((format!("port{n}"), "0x0".to_owned()))
            }
            _ => Err(wrong()),
        }
    }

    /// Adds the place to a device's properties.
    pub(crate) fn put(self, device: &mut Value, field: &str, pci: &str) -> Result<()> {
        let (bus, address) = self.place(field, pci)?;
        device["bus"] = bus.into();
        device["addr"] = address.into();
        Ok(())
    }

    /// The root ports.
    pub fn root_ports(self) -> Vec<Value> {
        (1..=self.ports)
            .map(|n| {
                let (slot, function) = (0x10 + (n - 1) / 8, (n - 1) % 8);
                let mut port = json!({
                    "driver": "pcie-root-port", "id": format!("port{n}"), "bus": "pcie.0", "chassis": n,
                    "addr": format!("0x{slot:x}.0x{function:x}"),
                });
                if function == 0 {
                    port["multifunction"] = true.into();
                }
                port
            })
            .collect()
    }
}

/// The bus of a disk, by its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bus {
    /// A target of the virtio-scsi controller.
    Scsi(u32),
    /// virtio-blk, a PCI device.
    Virtio(u32),
    /// NVMe, a PCI device.
    Nvme(u32),
    /// A port of the SATA controller.
    Sata(u32),
    /// A drive of the IDE controller that i440FX has.
    Ide(u32),
    /// A drive of the controller of floppy disks.
    Floppy(u32),
    /// At the first controller of USB.
    Usb(u32),
}

impl Bus {
    /// Of `scsi0`, `virtio1`, `nvme2`, `sata3`.
    ///
    /// # Errors
    /// Invalid for another slot.
    pub fn of(field: &str, slot: &str) -> Result<Self> {
        let digits = slot.find(|c: char| c.is_ascii_digit()).unwrap_or(slot.len());
        let (kind, number) = slot.split_at(digits);
        let number = number.parse::<u32>().ok().filter(|n| *n < MAX_DISKS as u32);
        match (kind, number) {
            ("scsi", Some(n)) => Ok(Self::Scsi(n)),
            ("virtio", Some(n)) => Ok(Self::Virtio(n)),
            ("nvme", Some(n)) => Ok(Self::Nvme(n)),
            ("sata", Some(n)) if n < SATA_PORTS => Ok(Self::Sata(n)),
            ("sata", Some(_)) => Err(Error::invalid(
                field,
                format!("the SATA controller has {SATA_PORTS} ports; use another io.bus"),
            )),
            ("floppy", Some(n)) if n < 2 => Ok(Self::Floppy(n)),
            ("floppy", Some(_)) => Err(Error::invalid(field, "a machine has two drives of floppy disks")),
            ("usb", Some(n)) => Ok(Self::Usb(n)),
            ("ide", Some(n)) if n < IDE_DRIVES => Ok(Self::Ide(n)),
            ("ide", Some(_)) => Err(Error::invalid(
                field,
                format!("the IDE controller has {IDE_DRIVES} drives; use another io.bus"),
            )),
            _ => Err(Error::invalid(field, format!("{slot:?} is not a slot of a disk of a virtual machine"))),
        }
    }

    /// Some number of its own, below 1000: descriptor sets and order of boot follow from it.
    fn number(self) -> u32 {
        let most = MAX_DISKS as u32;
        match self {
            Self::Scsi(n) => n,
            Self::Virtio(n) => most + n,
            Self::Nvme(n) => 2 * most + n,
            Self::Sata(n) => 3 * most + n,
            Self::Ide(n) => 4 * most + n,
            Self::Floppy(n) => 5 * most + n,
            Self::Usb(n) => 6 * most + n,
        }
    }
}

/// QEMU's id of a slot's device.
pub fn device_id(slot: &str) -> String {
    format!("disk-{slot}")
}

/// Which of a slot's two sets of names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// That with which a disk is plugged.
    #[default]
    First,
    /// That of a first copy; of a copy of it, the first again.
    Second,
}

impl Side {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::First, Self::Second];

    /// The one that this is not.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }

    /// The name of what belongs to a slot, by the letter of its kind.
    pub fn name(self, kind: char, slot: &str) -> String {
        match self {
            Self::First => format!("{kind}-{slot}"),
            Self::Second => format!("{kind}-{slot}.2"),
        }
    }

    /// The same of a file of a disk in layers, by its number.
    pub fn of_layer(self, kind: char, slot: &str, number: u32) -> String {
        match number {
            0 => self.name(kind, slot),
            n => format!("{}.l{n}", self.name(kind, slot)),
        }
    }

    /// The filter that QEMU puts above a disk of this side while it is copied.
    pub fn filter(self, slot: &str) -> String {
        self.name('m', slot)
    }

    /// The side that a slot's device drives, by what QEMU says of its block devices (`query-block`); `None` where it drives
    /// none.
    pub fn of(blocks: &Value, slot: &str) -> Option<Self> {
        let driven = |node: &str| {
            let nodes = blocks.as_array().into_iter().flatten();
            nodes.filter_map(|b| b.pointer("/inserted/node-name")?.as_str()).any(|n| n == node)
        };
        Self::BOTH.into_iter().find(|side| driven(&side.name('d', slot)) || driven(&side.filter(slot)))
    }
}

/// The descriptor sets of a slot's disk and of the file below a clone.
///
/// # Errors
/// Invalid for an unknown slot.
pub fn fd_sets(field: &str, slot: &str, side: Side) -> Result<(u32, u32)> {
    let first = match side {
        Side::First => 100,
        Side::Second => 1100,
    };
    let n = first + 2 * Bus::of(field, slot)?.number();
    Ok((n, n + 1))
}

/// The descriptor set of a file of a disk in layers. `first` is that of the file with which the disk was made.
pub fn layer_set(first: u32, number: u32) -> u32 {
    first + LAYER_SETS * number.min(MOST_MADE)
}

/// The number of the file whose set `set` is, if it is one of that disk's.
pub fn layer_of_set(first: u32, set: u32) -> u32 {
    set.saturating_sub(first) / LAYER_SETS
}

/// More than there are sets of anything else.
const LAYER_SETS: u32 = 8192;

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Device name, for messages and as the serial number that the guest sees.
    pub name: String,
    /// Bus slot, such as `scsi0`.
    pub slot: String,
    /// Which of the slot's names it has.
    pub side: Side,
    /// Format, stated.
    pub format: DiskFormat,
    /// It is a block device.
    pub block_device: bool,
    /// It is a clone: the qcow2 file below it has a descriptor set of its own.
    pub cloned: bool,
    /// The guest cannot write.
    pub readonly: bool,
    /// A drive with a disc.
    pub cdrom: bool,
    /// The drive is empty.
    pub ejected: bool,
    /// Other machines may write it at the same time.
    pub shared: bool,
    /// Cache mode; `None` is what fits the kind of source.
    pub cache: Option<DiskCache>,
    /// Limits of rates.
    pub limits: Rates,
    /// Number of the thread that serves it.
    pub thread: Option<u32>,
    /// What of it is not as usual.
    pub options: DiskOptions,
    /// PCI address; disks behind a controller have none.
    pub pci: Option<String>,
    /// Boot order, higher first.
    pub boot_priority: u32,
    /// The guest sees a serial number.
    pub serial: bool,
    /// It is a container of LUKS.
    pub encrypted: bool,
    /// The number of its file among those of a disk in layers.
    pub layer: u32,
    /// Numbers and formats of the files below it, the next one first.
    pub below: Vec<(u32, DiskFormat)>,
}

/// Higher priorities boot first; of the same, disks before NICs and lower slots first. QEMU counts from 1 upwards, and
/// no two devices may have the same number, also not one that is plugged later.
pub(crate) fn boot_index(priority: u32, number: u32) -> u32 {
    1 + (10_000 - priority.min(10_000)) * 1000 + number
}

impl Disk {
    /// Of what was resolved; `block_device` as its file was found to be.
    pub fn new(disk: &ResolvedDisk, block_device: bool, serial: bool) -> Self {
        Self {
            name: disk.name.clone(),
            slot: disk.slot.clone(),
            side: Side::First,
            format: disk.format,
            block_device,
            cloned: disk.backing.is_some(),
            readonly: disk.readonly || disk.cdrom,
            cdrom: disk.cdrom,
            ejected: disk.cdrom && disk.ejected,
            shared: disk.shared,
            cache: disk.io.cache,
            limits: rates(&disk.io),
            thread: disk.io.thread,
            options: disk.io.options,
            pci: disk.pci.clone(),
            boot_priority: disk.boot_priority,
            serial,
            encrypted: disk.io.secret.is_some(),
            layer: disk.chain.number,
            below: disk.chain.below.iter().map(|f| (f.number, f.format)).collect(),
        }
    }

    fn field(&self) -> String {
        format!("devices.{}", self.name)
    }

    /// Its bus.
    ///
    /// # Errors
    /// Invalid for an unknown slot.
    pub fn bus(&self) -> Result<Bus> {
        Bus::of(&self.field(), &self.slot)
    }

    /// The descriptor sets of its file and of the file below a clone.
    ///
    /// # Errors
    /// Invalid for an unknown slot.
    pub fn fd_sets(&self) -> Result<(u32, u32)> {
        fd_sets(&self.field(), &self.slot, self.side)
    }

    /// Can it come and go while the machine runs?
    ///
    /// # Errors
    /// Invalid for an unknown slot.
    pub fn hotplug(&self, layout: Layout) -> Result<bool> {
        Ok(match self.bus()? {
            // Those beside the first may be of models that take none.
            Bus::Scsi(_) => self.options.controller.is_none(),
            Bus::Virtio(_) | Bus::Nvme(_) => {
                layout.hotplug() && self.pci.as_deref().is_none_or(|p| layout.pc || !p.starts_with("00:"))
            }
            Bus::Sata(_) | Bus::Ide(_) | Bus::Floppy(_) | Bus::Usb(_) => false,
        })
    }

    /// The object that holds its limits.
    pub fn group(&self) -> Value {
        let mut limits = self.throttle();
        // Of what a group has when it is made, the usual is not said.
        let plain = ["bps-read", "bps-write", "iops-read", "iops-write"];
        if let Some(all) = limits.as_object_mut() {
            let usual = |name: &String, n: &Value| *n == json!(if name.ends_with("-length") { 1 } else { 0 });
            all.retain(|name, n| plain.contains(&name.as_str()) || !usual(name, n));
        }
        json!({"qom-type": "throttle-group", "id": self.side.name('t', &self.slot), "limits": limits})
    }

    /// The object that opens it, of what is to be read from a descriptor: so it is in no argument, no command and no property.
    pub fn key(&self, descriptor: i32) -> Value {
        json!({"qom-type": "secret", "id": self.key_name(), "file": format!("/dev/fd/{descriptor}")})
    }

    /// Name of that object.
    pub fn key_name(&self) -> String {
        self.side.name('k', &self.slot)
    }

    /// Its limits in QEMU's words, all of them; 0 is none.
    pub fn throttle(&self) -> Value {
        let mut limits = json!({"iops-size": self.limits.operation_size});
        for ((_, name), rate) in RATE_WORDS.iter().zip(&self.limits.all) {
            limits[*name] = rate.average.into();
            limits[format!("{name}-max")] = rate.burst.into();
            limits[format!("{name}-max-length")] = rate.seconds.max(1).into();
        }
        limits
    }

    /// Name of the node that the device drives.
    pub fn top(&self) -> String {
        self.side.name('d', &self.slot)
    }

    /// Its block nodes, the lowest first.
    ///
    /// # Errors
    /// Invalid for a directory.
    pub fn nodes(&self) -> Result<Vec<Value>> {
        let name = |kind| self.side.name(kind, &self.slot);
        let (_, base_set) = self.fd_sets()?;
        let mut nodes = vec![];
        if self.cloned {
            nodes.push(json!({
                "driver": "file", "node-name": name('c'), "filename": format!("/dev/fdset/{base_set}"),
                "read-only": true,
            }));
            nodes.push(json!({
                "driver": "qcow2", "node-name": name('b'), "file": name('c'),
                "read-only": true, "backing": null,
            }));
        }
        let mut below = self.cloned.then(|| name('b'));
        for (number, format) in self.below.iter().rev() {
            nodes.extend(self.file_nodes(*number, *format, below.take(), true)?);
            below = Some(self.side.of_layer('i', &self.slot, *number));
        }
        nodes.extend(self.file_nodes(self.layer, self.format, below, self.readonly)?);
        nodes.push(json!({
            "driver": "throttle", "node-name": self.top(), "throttle-group": name('t'),
            "file": self.image(), "read-only": self.readonly,
            // Without this no discard of a guest gets past it, and no hole into a copy.
            "discard": "unmap",
        }));
        Ok(nodes)
    }

    /// Name of the node of its format: of the file that is written.
    pub fn image(&self) -> String {
        self.side.of_layer('i', &self.slot, self.layer)
    }

    /// The nodes of one of its files, over the node `below`. What is not written is opened to be written all the same: a merge
    /// writes to it later.
    ///
    /// # Errors
    /// Invalid for a directory.
    pub fn file_nodes(
        &self,
        number: u32,
        format: DiskFormat,
        below: Option<String>,
        readonly: bool,
    ) -> Result<[Value; 2]> {
        let file = self.side.of_layer('f', &self.slot, number);
        let set = layer_set(self.fd_sets()?.0, number);
        // Files keep the host's page cache and honour the guest's flushes; a block device has its cache in the guest.
        let mode =
            self.cache.unwrap_or(if self.block_device { DiskCache::None } else { DiskCache::Writeback });
        let direct = matches!(mode, DiskCache::None | DiskCache::Directsync);
        let cache = json!({"direct": direct, "no-flush": mode == DiskCache::Unsafe});
        let mut image = json!({
            "driver": "raw", "node-name": self.side.of_layer('i', &self.slot, number), "file": file, "cache": cache,
            "discard": "unmap", "read-only": readonly,
        });
        if !readonly && !self.encrypted {
            image["detect-zeroes"] = "unmap".into();
        }
        let file = json!({
            "driver": if self.block_device { "host_device" } else { "file" },
            "node-name": file, "filename": format!("/dev/fdset/{set}"),
            "aio": if direct { "native" } else { "threads" }, "cache": cache, "discard": "unmap",
            "read-only": self.readonly,
        });
        match format {
            DiskFormat::Raw if self.encrypted => {
                image["driver"] = "luks".into();
                image["key-secret"] = self.key_name().into();
            }
            DiskFormat::Raw => {}
            DiskFormat::Qcow2 if self.encrypted => {
                let text = "an encrypted disk is a container of LUKS, which is raw; this one is qcow2";
                return Err(Error::invalid(format!("{}.encryption.secret", self.field()), text));
            }
            DiskFormat::Qcow2 => {
                image["driver"] = "qcow2".into();
                // A backing file that an image names is not opened; the one below a clone is the agent's word.
                image["backing"] = below.map_or(Value::Null, Value::from);
            }
            DiskFormat::Directory | DiskFormat::Memory(_) => {
                return Err(Error::invalid(
                    self.field(),
                    "a disk of a virtual machine is a disk image, not a directory",
                ));
            }
        }
        Ok([file, image])
    }

    /// The names of nodes of layers among `nodes`, the highest first.
    pub fn layer_names<'a>(
        slot: &str,
        side: Side,
        nodes: impl IntoIterator<Item = &'a String>,
    ) -> Vec<String> {
        let begins = ['i', 'f'].map(|kind| format!("{}.l", side.name(kind, slot)));
        let number = |node: &String| {
            let rest = begins.iter().find_map(|b| node.strip_prefix(b.as_str()))?;
            rest.parse::<u32>().ok()
        };
        let mut numbers: Vec<u32> = nodes.into_iter().filter_map(number).collect();
        numbers.sort_unstable_by(|a, b| b.cmp(a));
        numbers.dedup();
        let both = |n: u32| ['i', 'f'].map(|kind| side.of_layer(kind, slot, n));
        numbers.into_iter().flat_map(both).collect()
    }

    /// The names of its other nodes, the highest first: the order in which they can be removed. Those of layers
    /// ([`Self::layer_names`]) go after the first.
    pub fn node_names(slot: &str, side: Side) -> [String; 5] {
        ['d', 'i', 'f', 'b', 'c'].map(|kind| side.name(kind, slot))
    }

    /// The property of a controller that says when a floppy disk is booted from; nothing for other disks.
    ///
    /// # Errors
    /// Invalid for an unknown slot.
    pub fn boots_by_controller(&self) -> Result<Option<String>> {
        let bus = self.bus()?;
        Ok(match bus {
            Bus::Floppy(n) => {
                let drive = if n == 0 { 'A' } else { 'B' };
                let order = boot_index(self.boot_priority, bus.number());
                Some(format!("isa-fdc.bootindex{drive}={order}"))
            }
            _ => None,
        })
    }

    /// The device.
    ///
    /// # Errors
    /// Invalid, naming the device, for what does not fit together.
    pub fn device(&self, layout: Layout) -> Result<Value> {
        let field = self.field();
        let bus = self.bus()?;
        let mut device = json!({
            "id": device_id(&self.slot), "bootindex": boot_index(self.boot_priority, bus.number()),
        });
        let serial = format!("incus_{}", self.name);
        if !self.ejected {
            device["drive"] = self.top().into();
        }
        if self.readonly && !self.cdrom && matches!(bus, Bus::Sata(_) | Bus::Ide(_)) {
            return Err(Error::invalid(
                format!("{field}.io.bus"),
                "a disk on SATA or IDE cannot be read-only; use virtio-scsi",
            ));
        }
        if self.cdrom && !matches!(bus, Bus::Scsi(_) | Bus::Sata(_) | Bus::Ide(_)) {
            return Err(Error::invalid(
                format!("{field}.io.bus"),
                "a disc is in a drive of virtio-scsi, sata or ide",
            ));
        }
        if self.ejected && matches!(bus, Bus::Usb(_)) {
            return Err(Error::invalid(format!("{field}.io.bus"), "a disk on usb is there"));
        }
        if self.cdrom && !self.options.fits_discs() {
            let text = "a drive of discs has a controller, serial, wwn, vendor and product alone";
            return Err(Error::invalid(format!("{field}.io.options"), text));
        }
        if matches!(bus, Bus::Ide(_)) && !layout.pc {
            return Err(Error::invalid(
                format!("{field}.io.bus"),
                "machines of type pc have controllers of IDE; use sata",
            ));
        }
        match (self.thread, bus) {
            (None, _) => {}
            (Some(number), Bus::Virtio(_)) => device["iothread"] = threads::id(number).into(),
            (Some(_), _) => {
                let text = "a disk with a thread of its own is on io.bus=virtio-blk";
                return Err(Error::invalid(format!("{field}.io.thread"), text));
            }
        }
        if !self.cdrom {
            // Without one the guest is told only what is on the disk.
            let through = matches!(self.cache, Some(DiskCache::Writethrough | DiskCache::Directsync));
            if through && matches!(bus, Bus::Nvme(_) | Bus::Floppy(_)) {
                let text = "a disk on nvme or floppy has a cache of its own; use another io.cache";
                return Err(Error::invalid(format!("{field}.io.cache"), text));
            }
            device["write-cache"] = if through { "off" } else { "on" }.into();
            device["werror"] = on_error(self.options.write_errors.unwrap_or(OnError::Enospace)).into();
            device["rerror"] = on_error(self.options.read_errors.unwrap_or(OnError::Report)).into();
        }
        self.say_options(&mut device);
        if self.shared {
            // QEMU locks the image as ever, and demands everything but that nobody else writes. One that only reads must
            // allow it too.
            device["share-rw"] = true.into();
        }
        let at = |device: &mut Value| {
            let pci = self.pci.as_deref().ok_or_else(|| no_slot(&field))?;
            layout.put(device, &field, pci)
        };
        match bus {
            Bus::Scsi(n) => {
                device["driver"] = if self.cdrom { "scsi-cd" } else { "scsi-hd" }.into();
                let controller = self.options.controller.map(|n| n.to_string()).unwrap_or_default();
                device["bus"] = format!("scsi{controller}.0").into();
                device["channel"] = 0.into();
                device["scsi-id"] = n.into();
                device["lun"] = 0.into();
                if self.serial {
                    device["device_id"] = serial.chars().take(36).collect::<String>().into();
                }
            }
            Bus::Virtio(_) => {
                device["driver"] = "virtio-blk-pci".into();
                device["disable-legacy"] = "on".into();
                if self.serial {
                    device["serial"] = serial.chars().take(20).collect::<String>().into();
                }
                at(&mut device)?;
            }
            Bus::Nvme(_) => {
                device["driver"] = "nvme".into();
                device["serial"] = serial.chars().take(20).collect::<String>().into();
                // It has no such properties: the guest sees its errors.
                without(&mut device, &["werror", "rerror", "write-cache"]);
                at(&mut device)?;
            }
            Bus::Floppy(n) => {
                device["driver"] = "floppy".into();
                device["unit"] = n.into();
                // Its place in the order of boot is the controller's to know ([`Disk::boots_by_controller`]).
                without(&mut device, &["werror", "rerror", "write-cache", "bootindex"]);
            }
            Bus::Usb(_) => {
                device["driver"] = "usb-storage".into();
                device["bus"] = "usb0.0".into();
                device["removable"] = self.options.removable.into();
                if self.serial {
                    device["serial"] = serial.chars().take(20).collect::<String>().into();
                }
            }
            Bus::Ide(n) => {
                device["driver"] = if self.cdrom { "ide-cd" } else { "ide-hd" }.into();
                device["bus"] = format!("ide.{}", n / 2).into();
                device["unit"] = (n % 2).into();
                if self.serial {
                    device["serial"] = serial.chars().take(20).collect::<String>().into();
                }
            }
            Bus::Sata(n) => {
                device["driver"] = if self.cdrom { "ide-cd" } else { "ide-hd" }.into();
                device["bus"] = format!("{}.{n}", if layout.pc { "sata" } else { "ide" }).into();
                if self.serial {
                    device["serial"] = serial.chars().take(20).collect::<String>().into();
                }
            }
        }
        board::show_identity(&mut device, &self.options, matches!(bus, Bus::Scsi(_)));
        Ok(device)
    }

    /// What of it is not as usual; that it is of a disk on this bus was demanded where it was written.
    fn say_options(&self, device: &mut Value) {
        let all = &self.options;
        virtio(device, &all.virtio);
        let numbers = [
            ("num-queues", all.queues.map(u32::from)),
            ("queue-size", all.queue_size.map(u32::from)),
            ("rotation_rate", all.rotation.map(u32::from)),
            ("cyls", all.geometry.map(|g| g.cylinders)),
            ("heads", all.geometry.map(|g| g.heads)),
            ("secs", all.geometry.map(|g| g.sectors)),
            ("logical_block_size", all.blocks.map(|(logical, _)| logical)),
            ("physical_block_size", all.blocks.map(|(_, physical)| physical)),
        ];
        for (property, value) in numbers {
            if let Some(value) = value {
                device[property] = value.into();
            }
        }
        if let Some(translation) = all.geometry.and_then(|g| g.translation) {
            device["bios-chs-trans"] = translation.as_str().into();
        }
        for (off, property) in [(all.no_event_index, "event_idx"), (all.no_ioeventfd, "ioeventfd")] {
            if off {
                device[property] = false.into();
            }
        }
    }
}

/// All rates of a disk.
pub(crate) fn rates(io: &DiskIo) -> Rates {
    io.rates.unwrap_or_else(|| Rates::of(&io.limits))
}

/// In QEMU's words.
fn on_error(policy: OnError) -> &'static str {
    match policy {
        OnError::Enospace => "enospc",
        other => other.as_str(),
    }
}

/// Adds the options of a device of virtio.
pub(crate) fn virtio(device: &mut Value, options: &Virtio) {
    for (on, property) in [
        (options.iommu, "iommu_platform"),
        (options.ats, "ats"),
        (options.packed, "packed"),
        (options.page_per_queue, "page-per-vq"),
    ] {
        if on {
            device[property] = true.into();
        }
    }
}

/// Takes properties away that a device has not.
fn without(device: &mut Value, properties: &[&str]) {
    if let Some(all) = device.as_object_mut() {
        all.retain(|name, _| !properties.contains(&name.as_str()));
    }
}

fn no_slot(field: &str) -> Error {
    Error::conflict(
        "the virtual machine has no free PCI slot for it; remove another device, or use io.bus=virtio-scsi",
    )
    .at(field)
}

/// A NIC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// Device name, for messages.
    pub name: String,
    /// Bus slot; QEMU's id of the device.
    pub slot: String,
    /// What the guest sees.
    pub model: NicModel,
    /// MAC address.
    pub mac: String,
    /// PCI address.
    pub pci: Option<String>,
    /// MTU to tell the guest.
    pub mtu: Option<u32>,
    /// Boot order, higher first.
    pub boot_priority: u32,
    /// QEMU itself is its network: there is no tap.
    pub user: bool,
    /// What of it is not as usual.
    pub options: NicOptions,
}

impl Nic {
    /// Of what was resolved.
    pub fn new(nic: &ResolvedNic) -> Self {
        Self {
            name: nic.name.clone(),
            slot: nic.slot.clone(),
            model: nic.model,
            mac: nic.mac.clone(),
            pci: nic.pci.clone(),
            mtu: nic.mtu,
            boot_priority: nic.boot_priority,
            user: nic.link == ResolvedLink::User {},
            options: nic.options,
        }
    }

    fn field(&self) -> String {
        format!("devices.{}", self.name)
    }

    /// QEMU's id of its host side.
    pub fn netdev(slot: &str) -> String {
        format!("host-{slot}")
    }

    /// Can it come and go while the machine runs?
    pub fn hotplug(&self, layout: Layout) -> bool {
        layout.pc || self.pci.as_deref().is_some_and(|p| layout.ports > 0 && !p.starts_with("00:"))
    }

    /// Its host side: a tap, by the number or the name of its descriptor, or QEMU itself.
    pub fn host(&self, fd: &str) -> Value {
        if self.user {
            let mut host = json!({"type": "user", "id": Self::netdev(&self.slot)});
            if let Some(net) = self.options.ipv4 {
                host["net"] = net.to_string().into();
            }
            if let Some(net) = self.options.ipv6 {
                host["ipv6-prefix"] = net.network().to_string().into();
                host["ipv6-prefixlen"] = net.prefix_len().into();
            }
            return host;
        }
        json!({"type": "tap", "id": Self::netdev(&self.slot), "fd": fd, "vhost": false})
    }

    /// The device.
    ///
    /// # Errors
    /// Invalid, naming the device, for what does not fit together.
    pub fn device(&self, layout: Layout) -> Result<Value> {
        let field = self.field();
        let number = self.slot.strip_prefix("net").and_then(|n| n.parse::<u32>().ok()).filter(|n| *n < 128);
        let number = number.ok_or_else(|| {
            Error::invalid(&field, format!("{:?} is not a slot of a NIC of a virtual machine", self.slot))
        })?;
        let mac = karst_model::device::parse_mac(&format!("{field}.hwaddr"), &self.mac)?;
        let mut device = json!({
            "id": self.slot, "netdev": Self::netdev(&self.slot), "mac": mac,
            "bootindex": boot_index(self.boot_priority, 800 + number),
        });
        match self.model {
            NicModel::Virtio => {
                device["driver"] = "virtio-net-pci".into();
                device["disable-legacy"] = "on".into();
                if let Some(mtu) = self.mtu {
                    device["host_mtu"] = mtu.into();
                }
            }
            NicModel::E1000e => device["driver"] = "e1000e".into(),
            NicModel::E1000 => device["driver"] = "e1000".into(),
            NicModel::Rtl8139 => device["driver"] = "rtl8139".into(),
            NicModel::Pcnet => device["driver"] = "pcnet".into(),
            NicModel::Ne2k => device["driver"] = "ne2k_pci".into(),
        }
        self.say_options(&mut device);
        layout.put(&mut device, &field, self.pci.as_deref().ok_or_else(|| no_slot(&field))?)?;
        Ok(device)
    }

    /// What of it is not as usual; that it is of such a NIC was demanded where it was written.
    fn say_options(&self, device: &mut Value) {
        let all = &self.options;
        virtio(device, &all.virtio);
        if all.no_rom {
            device["romfile"] = "".into();
        }
        match all.sender {
            Some(NicSender::Loop) => device["tx"] = "bh".into(),
            Some(NicSender::Timer) => device["tx"] = "timer".into(),
            None => {}
        }
        if let Some(size) = all.receive_queue {
            device["rx_queue_size"] = size.into();
        }
        for (on, property) in [(all.rss, "rss"), (all.hash, "hash")] {
            if on {
                device[property] = true.into();
            }
        }
        let off = [(all.no_event_index, "event_idx"), (all.no_ioeventfd, "ioeventfd")];
        let off = off.into_iter().filter(|(off, _)| *off).map(|(_, property)| property);
        for property in off.chain(all.without().map(|(_, property)| property)) {
            device[property] = false.into();
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
