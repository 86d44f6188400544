//! What of a virtual machine's devices is not as usual, as words of one list (`io.options` of disks and NICs, and the lists of
//! [`crate::board`]): each option has one form in text, which is written as it is read.

use crate::{
    Error, Result,
    device::DiskBus,
    label::{LONGEST, Label},
};
use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

fn is_false(flag: &bool) -> bool {
    !flag
}

/// What any device of virtio can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Virtio {
    /// Its addresses are those of the machine's IOMMU.
    #[serde(skip_serializing_if = "is_false")]
    pub iommu: bool,
    /// It asks for translations of addresses.
    #[serde(skip_serializing_if = "is_false")]
    pub ats: bool,
    /// Its queues are packed.
    #[serde(skip_serializing_if = "is_false")]
    pub packed: bool,
    /// Each queue is told of on a page of its own.
    #[serde(skip_serializing_if = "is_false")]
    pub page_per_queue: bool,
}

/// Words of [`Virtio`].
pub const VIRTIO_WORDS: [&str; 4] = ["iommu", "ats", "packed", "page-per-queue"];

impl Virtio {
    /// Is it as devices are without a word?
    pub fn is_usual(&self) -> bool {
        *self == Self::default()
    }

    fn flags(&mut self) -> [&mut bool; 4] {
        [&mut self.iommu, &mut self.ats, &mut self.packed, &mut self.page_per_queue]
    }

    /// Takes one of its words; `false` of another.
    pub fn take(&mut self, word: &str) -> bool {
        match VIRTIO_WORDS.iter().position(|known| *known == word) {
            Some(n) => {
                *self.flags()[n] = true;
                true
            }
            None => false,
        }
    }

    /// Its words.
    pub fn words(mut self) -> Vec<&'static str> {
        let flags = self.flags().map(|flag| *flag);
        VIRTIO_WORDS.into_iter().zip(flags).filter(|(_, on)| *on).map(|(word, _)| word).collect()
    }
}

/// What becomes of an error of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnError {
    /// The machine stands still.
    Stop,
    /// The guest is told.
    Report,
    /// Nobody is.
    Ignore,
    /// The machine stands still where there is no more space, else the guest is told.
    Enospace,
}

const ERRORS: &[(&str, OnError)] = &[
    ("stop", OnError::Stop),
    ("report", OnError::Report),
    ("ignore", OnError::Ignore),
    ("enospace", OnError::Enospace),
];

impl OnError {
    /// Of its name.
    pub fn named(name: &str) -> Option<Self> {
        ERRORS.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
    }

    /// Its name.
    pub fn as_str(self) -> &'static str {
        ERRORS.iter().find(|(_, value)| *value == self).map_or("report", |(name, _)| name)
    }
}

/// Cylinders, heads and sectors, as old systems count what is on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u32,
    /// Heads.
    pub heads: u32,
    /// Sectors of a track.
    pub sectors: u32,
    /// How the firmware counts what is more than that (IDE); as it finds best.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub translation: Option<Translation>,
}

/// How a firmware counts what is on a large disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Translation {
    /// Not at all.
    None,
    /// By the number of the sector.
    Lba,
    /// As it finds best.
    Auto,
}

/// Names of the translations.
pub const TRANSLATIONS: &[(&str, Translation)] =
    &[("none", Translation::None), ("lba", Translation::Lba), ("auto", Translation::Auto)];

impl Translation {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        TRANSLATIONS.iter().find(|(_, value)| *value == self).map_or("auto", |(name, _)| name)
    }
}

/// What of a disk is not as usual.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct DiskOptions {
    /// Of a disk on virtio-blk.
    #[serde(flatten)]
    pub virtio: Virtio,
    /// The two sides tell each other of everything (virtio-blk).
    #[serde(skip_serializing_if = "is_false")]
    pub no_event_index: bool,
    /// QEMU's main loop is told by leaving the guest (virtio-blk).
    #[serde(skip_serializing_if = "is_false")]
    pub no_ioeventfd: bool,
    /// Queues (virtio-blk); one for each processor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Entries of each queue (virtio-blk).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_size: Option<u16>,
    /// What becomes of an error of writing; enospace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_errors: Option<OnError>,
    /// What becomes of an error of reading; report.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_errors: Option<OnError>,
    /// Turns a minute that it says it makes; 1 is one that does not turn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rotation: Option<u16>,
    /// It says that it can be taken out (USB).
    #[serde(skip_serializing_if = "is_false")]
    pub removable: bool,
    /// How old systems count what is on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub geometry: Option<Geometry>,
    /// Bytes of its sectors, as it says, and of those that it really has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocks: Option<(u32, u32)>,
    /// The controller of `hardware.scsi` that it is at, of those beside the first (virtio-scsi).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub controller: Option<u8>,
    /// The serial number that it shows; made of its name. QEMU shows 20 characters of it where the bus has no more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<Label>,
    /// Its name in the world (SCSI, SATA, IDE).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wwn: Option<u64>,
    /// Who made it, as it says (SCSI); QEMU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vendor: Option<Label>,
    /// What it says it is (SCSI).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub product: Option<Label>,
}

fn wrong(field: &str, word: &str, why: &str) -> Error {
    Error::invalid(field, format!("{word:?}: {why}"))
}

fn within<T: std::str::FromStr + PartialOrd + std::fmt::Display>(
    field: &str,
    word: &str,
    text: &str,
    (least, most): (T, T),
) -> Result<T> {
    let found = text.parse().ok().filter(|n| *n >= least && *n <= most);
    found.ok_or_else(|| wrong(field, word, &format!("a number from {least} to {most} is possible")))
}

fn geometry(field: &str, word: &str, text: &str) -> Result<Geometry> {
    let why = "write cylinders, heads and sectors, and how the firmware counts, as in 16383/16/63 or 16383/16/63/lba";
    let mut parts = text.split('/');
    let mut next = |most: u32| {
        let n = parts.next().and_then(|n| n.parse().ok()).filter(|n| (1..=most).contains(n));
        n.ok_or_else(|| wrong(field, word, why))
    };
    let (cylinders, heads, sectors) = (next(65_535)?, next(255)?, next(255)?);
    let translation = match (parts.next(), parts.next()) {
        (None, _) => None,
        (Some(name), None) => {
            let known = TRANSLATIONS.iter().find(|(known, _)| *known == name).map(|(_, value)| *value);
            Some(known.ok_or_else(|| wrong(field, word, why))?)
        }
        _ => return Err(wrong(field, word, why)),
    };
    Ok(Geometry { cylinders, heads, sectors, translation })
}

fn block(n: u32) -> bool {
    (512..=32_768).contains(&n) && n.is_power_of_two()
}

fn label(field: &str, word: &str, text: &str, most: usize) -> Result<Label> {
    let why = format!("has 1 to {most} printable characters of ASCII, no comma, and no blank at its end");
    Label::parse(text, most).ok_or_else(|| wrong(field, word, &why))
}

impl DiskOptions {
    /// Is all that is not as usual of it possible for a drive of discs?
    pub fn fits_discs(&self) -> bool {
        let named = Self { controller: None, serial: None, wwn: None, vendor: None, product: None, ..*self };
        named == Self::default()
    }

    /// Out of a list; `bus` is what the disk is on.
    ///
    /// # Errors
    /// Invalid, naming `field`, for what is no option, or none of a disk on this bus.
    pub fn parse(field: &str, text: &str, bus: Option<DiskBus>) -> Result<Self> {
        let mut found = Self::default();
        for word in text.split(',').map(str::trim) {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            match (name, value) {
                (word, "") if found.virtio.take(word) => {}
                ("event-index", "off") => found.no_event_index = true,
                ("ioeventfd", "off") => found.no_ioeventfd = true,
                ("removable", "") => found.removable = true,
                ("queues", n) => found.queues = Some(within(field, word, n, (1, 1024))?),
                ("queue-size", n) => {
                    let size: u16 = within(field, word, n, (4, 1024))?;
                    if !size.is_power_of_two() {
                        return Err(wrong(field, word, "it is a power of two"));
                    }
                    found.queue_size = Some(size);
                }
                ("write-errors" | "read-errors", policy) => {
                    let known =
                        OnError::named(policy).filter(|p| name == "write-errors" || *p != OnError::Enospace);
                    let why = "errors are stop, report or ignore, and those of writing enospace";
                    let policy = known.ok_or_else(|| wrong(field, word, why))?;
                    let of =
                        if name == "write-errors" { &mut found.write_errors } else { &mut found.read_errors };
                    *of = Some(policy);
                }
                ("rotation", n) => found.rotation = Some(within(field, word, n, (1, 65_534))?),
                ("geometry", text) => found.geometry = Some(geometry(field, word, text)?),
                ("blocks", text) => {
                    let (logical, physical) = text.split_once('/').unwrap_or((text, text));
                    let blocks = logical.parse().ok().zip(physical.parse().ok());
                    let why =
                        "write the bytes of its sectors and of those below, powers of two, as in 512/4096";
                    let good = |(l, p): &(u32, u32)| block(*l) && block(*p) && l <= p;
                    found.blocks = Some(blocks.filter(good).ok_or_else(|| wrong(field, word, why))?);
                }
                ("controller", n) => found.controller = Some(within(field, word, n, (1, 11))?),
                ("serial", text) => {
                    let most = if bus == Some(DiskBus::VirtioBlk) { 20 } else { LONGEST };
                    found.serial = Some(label(field, word, text, most)?);
                }
                ("wwn", text) => {
                    let good = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
                    let wwn = u64::from_str_radix(text, 16).ok().filter(|_| good);
                    found.wwn = Some(wwn.ok_or_else(|| wrong(field, word, "write 16 hexadecimal digits"))?);
                }
                ("vendor", text) => found.vendor = Some(label(field, word, text, 8)?),
                ("product", text) => found.product = Some(label(field, word, text, 16)?),
                _ => {
                    let why = "is no option; iommu, ats, packed, page-per-queue, event-index=off, ioeventfd=off, queues=, \
                               queue-size=, write-errors=, read-errors=, rotation=, removable, geometry=, blocks=, controller=, \
                               serial=, wwn=, vendor= and product= are";
                    return Err(wrong(field, word, why));
                }
            }
        }
        found.demand_bus(field, bus)?;
        Ok(found)
    }

    fn demand_bus(&self, field: &str, bus: Option<DiskBus>) -> Result<()> {
        let (virtio, bus) = (bus == Some(DiskBus::VirtioBlk), bus.unwrap_or(DiskBus::VirtioScsi));
        let plain = Self {
            virtio: Virtio::default(),
            no_event_index: false,
            no_ioeventfd: false,
            queues: None,
            queue_size: None,
            ..*self
        };
        let no = |text: &str| Err(Error::invalid(field, text));
        if plain != *self && !virtio {
            return no("queues and options of virtio are those of a disk on io.bus=virtio-blk");
        }
        if self.removable && bus != DiskBus::Usb {
            return no("removable is said of a disk on usb");
        }
        let turns = matches!(bus, DiskBus::VirtioScsi | DiskBus::Sata | DiskBus::Ide);
        if self.rotation.is_some() && !turns {
            return no("a rotation is that of a disk on virtio-scsi, sata or ide");
        }
        if self.geometry.is_some() && !(turns || virtio) {
            return no("a geometry is that of a disk on virtio-scsi, virtio-blk, sata or ide");
        }
        if self.geometry.is_some_and(|g| g.translation.is_some()) && bus != DiskBus::Ide {
            return no("how the firmware counts is said of a disk on ide");
        }
        let old = matches!(bus, DiskBus::Sata | DiskBus::Ide);
        if old && (self.geometry.is_some_and(|g| g.heads > 16) || self.blocks.is_some_and(|(l, _)| l != 512))
        {
            return no("a disk on sata or ide has 16 heads at most, and sectors of 512 bytes");
        }
        if (self.write_errors.is_some() || self.read_errors.is_some()) && !(turns || virtio) {
            return no("what becomes of errors is said of a disk on virtio-scsi, virtio-blk, sata or ide");
        }
        let scsi = bus == DiskBus::VirtioScsi;
        if self.controller.is_some() && !scsi {
            return no("the controller is that of a disk on virtio-scsi");
        }
        if (self.vendor.is_some() || self.product.is_some()) && !scsi {
            return no("vendor and product are said by a disk on virtio-scsi");
        }
        if self.wwn.is_some() && !(scsi || old) {
            return no("a wwn is that of a disk on virtio-scsi, sata or ide");
        }
        let unnamed = matches!(bus, DiskBus::Floppy | DiskBus::Virtiofs | DiskBus::Plan9);
        if self.serial.is_some() && unnamed {
            return no("a floppy disk, or a directory, has no serial number");
        }
        // QEMU's disk on USB does not hand them on to the one within it.
        let none = matches!(bus, DiskBus::Usb | DiskBus::Floppy | DiskBus::Virtiofs | DiskBus::Plan9);
        match self.blocks.is_some() && none {
            true => no("a disk on usb, a floppy disk, or a directory, has no blocks of its own"),
            false => Ok(()),
        }
    }

    /// As it is written; nothing of a usual disk.
    pub fn text(&self) -> Option<String> {
        let mut all: Vec<String> = self.virtio.words().into_iter().map(str::to_owned).collect();
        all.extend(self.removable.then(|| "removable".to_owned()));
        let mut say = |name: &str, value: Option<String>| all.extend(value.map(|v| format!("{name}={v}")));
        let off = |off: bool| off.then(|| "off".to_owned());
        say("event-index", off(self.no_event_index));
        say("ioeventfd", off(self.no_ioeventfd));
        say("queues", self.queues.map(|n| n.to_string()));
        say("queue-size", self.queue_size.map(|n| n.to_string()));
        say("write-errors", self.write_errors.map(|e| e.as_str().to_owned()));
        say("read-errors", self.read_errors.map(|e| e.as_str().to_owned()));
        say("rotation", self.rotation.map(|n| n.to_string()));
        let translation = |g: Geometry| g.translation.map(|t| format!("/{}", t.as_str())).unwrap_or_default();
        let geometry = |g: Geometry| format!("{}/{}/{}{}", g.cylinders, g.heads, g.sectors, translation(g));
        say("geometry", self.geometry.map(geometry));
        say("blocks", self.blocks.map(|(logical, physical)| format!("{logical}/{physical}")));
        say("controller", self.controller.map(|n| n.to_string()));
        let text = |label: &Option<Label>| label.as_ref().map(|l| l.as_str().to_owned());
        say("serial", text(&self.serial));
        say("wwn", self.wwn.map(|n| format!("{n:016x}")));
        say("vendor", text(&self.vendor));
        say("product", text(&self.product));
        (!all.is_empty()).then(|| all.join(","))
    }
}

/// When a NIC of virtio sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NicSender {
    /// As soon as QEMU's main loop comes to it.
    Loop,
    /// When a timer ends, so that more is sent at once.
    Timer,
}

/// Work that a NIC of virtio and the host can do for the guest: the word, and QEMU's property.
pub const OFFLOADS: [(&str, &str); 12] = [
    ("csum", "csum"),
    ("gso", "gso"),
    ("tso4", "host_tso4"),
    ("tso6", "host_tso6"),
    ("ecn", "host_ecn"),
    ("ufo", "host_ufo"),
    ("mrg-rxbuf", "mrg_rxbuf"),
    ("guest-csum", "guest_csum"),
    ("guest-tso4", "guest_tso4"),
    ("guest-tso6", "guest_tso6"),
    ("guest-ecn", "guest_ecn"),
    ("guest-ufo", "guest_ufo"),
];

/// What of a NIC is not as usual.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct NicOptions {
    /// Of a NIC of virtio.
    #[serde(flatten)]
    pub virtio: Virtio,
    /// The two sides tell each other of everything (virtio).
    #[serde(skip_serializing_if = "is_false")]
    pub no_event_index: bool,
    /// QEMU's main loop is told by leaving the guest (virtio).
    #[serde(skip_serializing_if = "is_false")]
    pub no_ioeventfd: bool,
    /// When it sends (virtio); by the main loop.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sender: Option<NicSender>,
    /// Entries of the queue of what comes in (virtio).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub receive_queue: Option<u16>,
    /// What comes in is spread over its queues by hashes (virtio).
    #[serde(skip_serializing_if = "is_false")]
    pub rss: bool,
    /// The guest is told the hash of what came in (virtio).
    #[serde(skip_serializing_if = "is_false")]
    pub hash: bool,
    /// It has no ROM to boot from.
    #[serde(skip_serializing_if = "is_false")]
    pub no_rom: bool,
    /// The network that QEMU makes of it (nictype user); 10.0.2.0/24.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<Ipv4Net>,
    /// The same of IPv6; fec0::/64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Ipv6Net>,
    /// What of [`OFFLOADS`] is not done (virtio): the bit of each by its place there.
    #[serde(skip_serializing_if = "nothing")]
    pub offloads_off: u16,
}

fn nothing(bits: &u16) -> bool {
    *bits == 0
}

impl NicOptions {
    /// Out of a list; `virtio`: the NIC is one of virtio.
    ///
    /// # Errors
    /// Invalid, naming `field`, for what is no option, or none of such a NIC.
    pub fn parse(field: &str, text: &str, virtio: bool) -> Result<Self> {
        let mut found = Self::default();
        for word in text.split(',').map(str::trim) {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let offload = OFFLOADS.iter().position(|(known, _)| *known == name);
            match (name, value, offload) {
                (word, "", _) if found.virtio.take(word) => {}
                ("event-index", "off", _) => found.no_event_index = true,
                ("ioeventfd", "off", _) => found.no_ioeventfd = true,
                ("rom", "off", _) => found.no_rom = true,
                ("rss", "", _) => found.rss = true,
                ("hash", "", _) => found.hash = true,
                ("tx", "loop", _) => found.sender = Some(NicSender::Loop),
                ("tx", "timer", _) => found.sender = Some(NicSender::Timer),
                ("ipv4", text, _) => {
                    let net = text.parse::<Ipv4Net>().ok().filter(|n| (4..=28).contains(&n.prefix_len()));
                    let net = net.ok_or_else(|| wrong(field, word, "write a network such as 10.1.2.0/24"))?;
                    found.ipv4 = Some(net.trunc());
                }
                ("ipv6", text, _) => {
                    let net = text.parse::<Ipv6Net>().ok().filter(|n| n.prefix_len() <= 126);
                    let net = net.ok_or_else(|| wrong(field, word, "write a network such as fd01::/64"))?;
                    found.ipv6 = Some(net.trunc());
                }
                ("rx-queue-size", n, _) => {
                    let size: u16 = within(field, word, n, (256, 1024))?;
                    if !size.is_power_of_two() {
                        return Err(wrong(field, word, "it is a power of two"));
                    }
                    found.receive_queue = Some(size);
                }
                (_, "off", Some(n)) => found.offloads_off |= 1 << n,
                _ => {
                    let why = "is no option; iommu, ats, packed, page-per-queue, event-index=off, ioeventfd=off, rom=off, rss, \
                               hash, tx=loop, tx=timer, rx-queue-size= and offloads such as csum=off are";
                    return Err(wrong(field, word, why));
                }
            }
        }
        let plain = Self { no_rom: found.no_rom, ipv4: found.ipv4, ipv6: found.ipv6, ..Self::default() };
        match virtio || found == plain {
            true => Ok(found),
            false => Err(Error::invalid(
                field,
                "of a NIC that is not of virtio rom=off, ipv4= and ipv6= are options alone",
            )),
        }
    }

    /// Names of the offloads that are off, and QEMU's properties of them.
    pub fn without(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let bits = self.offloads_off;
        OFFLOADS.into_iter().enumerate().filter(move |(n, _)| bits & (1 << n) != 0).map(|(_, names)| names)
    }

    /// As it is written; nothing of a usual NIC.
    pub fn text(&self) -> Option<String> {
        let mut all: Vec<String> = self.virtio.words().into_iter().map(str::to_owned).collect();
        for (on, word) in [
            (self.no_event_index, "event-index=off"),
            (self.no_ioeventfd, "ioeventfd=off"),
            (self.no_rom, "rom=off"),
            (self.rss, "rss"),
            (self.hash, "hash"),
            (self.sender == Some(NicSender::Loop), "tx=loop"),
            (self.sender == Some(NicSender::Timer), "tx=timer"),
        ] {
            all.extend(on.then(|| word.to_owned()));
        }
        all.extend(self.ipv4.map(|net| format!("ipv4={net}")));
        all.extend(self.ipv6.map(|net| format!("ipv6={net}")));
        all.extend(self.receive_queue.map(|n| format!("rx-queue-size={n}")));
        all.extend(self.without().map(|(word, _)| format!("{word}=off")));
        (!all.is_empty()).then(|| all.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLK: Option<DiskBus> = Some(DiskBus::VirtioBlk);

    #[test]
    fn disks_are_written_as_they_are_read() {
        let all = "iommu,ats,packed,page-per-queue,event-index=off,ioeventfd=off,queues=4,queue-size=256,write-errors=enospace,\
                   read-errors=ignore,geometry=16383/16/63,blocks=512/4096";
        let found = DiskOptions::parse("f", all, BLK).unwrap();
        assert_eq!(found.text().as_deref(), Some(all));
        let stored = serde_json::to_string(&found).unwrap();
        assert_eq!(serde_json::from_str::<DiskOptions>(&stored).unwrap(), found);
        assert_eq!(serde_json::to_string(&DiskOptions::default()).unwrap(), "{}");
        assert_eq!(DiskOptions::default().text(), None);
        assert_eq!(DiskOptions::parse("f", "rotation=7200", None).unwrap().rotation, Some(7200));
        assert!(DiskOptions::parse("f", "removable", Some(DiskBus::Usb)).unwrap().removable);
        let old = DiskOptions::parse("f", "geometry=16383/16/63/lba", Some(DiskBus::Ide)).unwrap();
        assert_eq!(old.text().as_deref(), Some("geometry=16383/16/63/lba"));
        assert_eq!(DiskOptions::parse("f", "blocks=4096", BLK).unwrap().blocks, Some((4096, 4096)));
        let named = "controller=2,serial=  WD 1=2,wwn=5000c50015ea71ac,vendor=SEA GATE,product=ST67 807GD";
        let found = DiskOptions::parse("f", named, None).unwrap();
        assert_eq!(found.text().as_deref(), Some(named));
        assert!(found.fits_discs() && !DiskOptions { rotation: Some(1), ..found }.fits_discs());
        let stored = serde_json::to_string(&found).unwrap();
        assert_eq!(serde_json::from_str::<DiskOptions>(&stored).unwrap(), found);
        for (text, bus) in [
            ("", BLK),
            ("fast", BLK),
            ("iommu=on", BLK),
            ("event-index=on", BLK),
            ("queues=0", BLK),
            ("queue-size=100", BLK),
            ("queue-size=2", BLK),
            ("geometry=100/17/63", Some(DiskBus::Ide)),
            ("blocks=4096", Some(DiskBus::Sata)),
            ("blocks=512/4096", Some(DiskBus::Usb)),
            ("read-errors=enospace", BLK),
            ("write-errors=panic", BLK),
            ("rotation=7200", BLK),
            ("geometry=1/2", BLK),
            ("geometry=0/2/3", BLK),
            ("geometry=1/2/3/lba", BLK),
            ("geometry=1/2/3/large", Some(DiskBus::Ide)),
            ("blocks=4096/512", BLK),
            ("blocks=1000", BLK),
            ("iommu", None),
            ("queues=2", Some(DiskBus::Sata)),
            ("write-errors=stop", Some(DiskBus::Nvme)),
            ("geometry=1/2/3", Some(DiskBus::Floppy)),
            ("blocks=512", Some(DiskBus::Floppy)),
            ("removable", Some(DiskBus::Ide)),
            ("controller=0", None),
            ("controller=1", BLK),
            ("serial=", BLK),
            ("serial=123456789012345678901", BLK),
            ("serial=1", Some(DiskBus::Floppy)),
            ("wwn=5000c50015ea71a", None),
            ("wwn=5000c50015ea71ac", BLK),
            ("vendor=SEAGATES2", None),
            ("product=a", Some(DiskBus::Sata)),
        ] {
            assert_eq!(DiskOptions::parse("f", text, bus).unwrap_err().field.as_deref(), Some("f"), "{text}");
        }
    }

    #[test]
    fn nics_are_written_as_they_are_read() {
        let all = "packed,event-index=off,ioeventfd=off,rom=off,rss,hash,tx=timer,ipv4=10.1.2.0/24,ipv6=fd01::/64,\
                   rx-queue-size=512,csum=off,guest-ufo=off";
        let found = NicOptions::parse("f", all, true).unwrap();
        assert_eq!(found.text().as_deref(), Some(all));
        assert_eq!(found.without().map(|(_, p)| p).collect::<Vec<_>>(), ["csum", "guest_ufo"]);
        let stored = serde_json::to_string(&found).unwrap();
        assert_eq!(serde_json::from_str::<NicOptions>(&stored).unwrap(), found);
        assert_eq!(serde_json::to_string(&NicOptions::default()).unwrap(), "{}");
        assert!(NicOptions::parse("f", "rom=off", false).unwrap().no_rom);
        for (text, virtio) in [
            ("", true),
            ("ipv4=10.1.2.3", true),
            ("ipv4=8.0.0.0/3", true),
            ("ipv6=::1/128", true),
            ("tx=never", true),
            ("rx-queue-size=300", true),
            ("csum=on", true),
            ("ats", false),
            ("rss", false),
            ("hash=on", true),
        ] {
            assert_eq!(
                NicOptions::parse("f", text, virtio).unwrap_err().field.as_deref(),
                Some("f"),
                "{text}"
            );
        }
    }
}
