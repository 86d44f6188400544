//! Disks.

use super::{Keys, Rates, Share};
use crate::{ByteSize, Error, Result, encryption, options::DiskOptions};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use uuid::Uuid;

/// The root disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootDevice {
    /// Pool name as written.
    pub pool: String,
    /// Name of the custom block volume that it is; `None`: a volume that the instance owns.
    #[serde(default)]
    pub source: Option<String>,
    /// Size limit.
    pub size: Option<ByteSize>,
    /// Boot order: higher first.
    pub boot_priority: Option<u32>,
    /// How it is driven.
    #[serde(default)]
    pub io: DiskIo,
    /// A virtual machine sees it; else it is what the instance is kept by (snapshots, copies, its pool), and its guest has no such
    /// disk.
    #[serde(default = "yes")]
    pub attached: bool,
    /// `initial.full_copy`: what the volume's `full_copy` is when it is made; without effect on one that is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_copy: Option<bool>,
}

/// What the volume of a root disk has from its beginning, besides its size.
const INITIAL: &str = "initial.full_copy";

/// A disk that is not the root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskDevice {
    /// What is attached.
    pub source: DiskOrigin,
    /// Where a file system is mounted in the guest: absolute. A block volume of a virtual machine has none.
    pub path: Option<String>,
    /// The guest cannot write.
    pub readonly: bool,
    /// What is mounted below a path of the host is seen as well.
    #[serde(default)]
    pub recursive: bool,
    /// So is what the host mounts there later.
    #[serde(default)]
    pub follow: bool,
    /// Owners are shifted into the container's id range also where the source has them unshifted by nature (a path of
    /// the host).
    pub shift: bool,
    /// A source that is missing at the start is left out rather than an error.
    pub required: bool,
    /// Boot order: higher first.
    pub boot_priority: Option<u32>,
    /// How it is driven.
    pub io: DiskIo,
    /// The disk is there; a drive of discs without it is empty.
    #[serde(default = "yes")]
    pub attached: bool,
    /// How what is at a path of the host is written down.
    #[serde(default)]
    pub format: DriveFormat,
    /// What a path of the host is shown as, where its name is not to say it.
    #[serde(default)]
    pub media: Option<DriveMedia>,
    /// Of a directory that a virtual machine shares: its tag, and how it is shared.
    #[serde(default, skip_serializing_if = "Share::is_usual")]
    pub share: Share,
}

/// How a drive of a virtual machine that is a path of the host is written down: stated, never found out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum DriveFormat {
    /// As it is.
    #[default]
    Raw,
    /// QEMU's own, without a file below it.
    Qcow2,
}

/// Names of the formats as users write them.
pub const DRIVE_FORMATS: &[(&str, DriveFormat)] = &[("raw", DriveFormat::Raw), ("qcow2", DriveFormat::Qcow2)];

/// What a drive of a virtual machine that is a path of the host shows itself as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DriveMedia {
    /// A disk.
    Disk,
    /// A disc in its drive.
    Cdrom,
}

/// Names of what drives show themselves as.
pub const DRIVE_MEDIA: &[(&str, DriveMedia)] = &[("disk", DriveMedia::Disk), ("cdrom", DriveMedia::Cdrom)];

fn yes() -> bool {
    true
}

/// What a disk shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum DiskOrigin {
    /// A custom volume by the names of its pool and its own.
    Volume {
        /// Pool.
        pool: String,
        /// Volume.
        volume: String,
    },
    /// A directory, image file or block device of the host, absolute; granted by the host's policy only.
    Host {
        /// Path.
        path: String,
    },
    /// An empty file system in memory, which goes when the container stops.
    Memory {
        /// At most so much; half of the host's memory when absent. It counts as the container's memory.
        size: Option<ByteSize>,
    },
}

/// Does a path of the host name a disc? Nothing but that and the key `media` says what a file is, which is never looked into.
pub fn is_disc_name(path: &str) -> bool {
    path.to_ascii_lowercase().ends_with(".iso")
}

/// Is a path of the host a disc to a virtual machine?
pub fn is_disc(path: &str, media: Option<DriveMedia>) -> bool {
    media.map_or_else(|| is_disc_name(path), |media| media == DriveMedia::Cdrom)
}

/// The path of the host that a disk of a virtual machine is a drive of, by its keys; nothing of a volume, or of a directory, which has
/// a path in the machine too, or a tag.
pub fn host_drive(keys: &BTreeMap<String, String>) -> Option<&str> {
    let key = |name: &str| keys.get(name).map(String::as_str).filter(|v| !v.is_empty());
    let drive = key("type") == Some("disk") && ["pool", "path", "tag"].iter().all(|k| key(k).is_none());
    key("source").filter(|source| drive && source.starts_with('/'))
}

/// Source of a disk in memory.
const MEMORY: &str = "tmpfs:";

/// How a disk is driven. Buses, caches and asynchronous input and output are virtual machines' alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct DiskIo {
    /// Bus; `None` is the default for the kind of disk.
    pub bus: Option<DiskBus>,
    /// Cache mode.
    pub cache: Option<DiskCache>,
    /// Limits of rates.
    #[serde(default)]
    pub limits: DiskLimits,
    /// Limits of rates of a virtual machine's disk that say more than [`Self::limits`] can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rates: Option<Rates>,
    /// Number of the thread that serves it (virtio-blk); the main one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thread: Option<u32>,
    /// What of it is not as usual.
    #[serde(default, skip_serializing_if = "usual")]
    pub options: DiskOptions,
    /// The secret whose value opens it: it is a container of LUKS. In what a host is told also where the volume says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<Uuid>,
}

fn usual(options: &DiskOptions) -> bool {
    *options == DiskOptions::default()
}

/// Bus of a virtual machine's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskBus {
    /// virtio-scsi.
    VirtioScsi,
    /// virtio-blk.
    VirtioBlk,
    /// NVMe.
    Nvme,
    /// SATA (AHCI).
    Sata,
    /// IDE, of machines of type `pc`.
    Ide,
    /// A drive of floppy disks.
    Floppy,
    /// USB, at a controller of `hardware.usb`.
    Usb,
    /// A shared directory by virtiofs.
    Virtiofs,
    /// A shared directory by 9p.
    #[serde(rename = "9p")]
    Plan9,
}

/// Names of the buses as users write them.
pub const DISK_BUSES: &[(&str, DiskBus)] = &[
    ("virtio-scsi", DiskBus::VirtioScsi),
    ("virtio-blk", DiskBus::VirtioBlk),
    ("nvme", DiskBus::Nvme),
    ("sata", DiskBus::Sata),
    ("ide", DiskBus::Ide),
    ("floppy", DiskBus::Floppy),
    ("usb", DiskBus::Usb),
    ("virtiofs", DiskBus::Virtiofs),
    ("9p", DiskBus::Plan9),
];

/// A directory is shared with a virtual machine in the best way that both have: as if `io.bus` said nothing.
pub const AUTO_BUS: &str = "auto";

/// Cache mode of a virtual machine's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskCache {
    /// Direct input and output.
    None,
    /// The host's page cache, with the guest's flushes.
    Writeback,
    /// The host's page cache, and what the guest was told is written is on the disk.
    Writethrough,
    /// The same by direct input and output.
    Directsync,
    /// The host's page cache, flushes ignored: loses data when the host goes.
    Unsafe,
}

/// Names of the cache modes as users write them.
pub const DISK_CACHES: &[(&str, DiskCache)] = &[
    ("none", DiskCache::None),
    ("writeback", DiskCache::Writeback),
    ("writethrough", DiskCache::Writethrough),
    ("directsync", DiskCache::Directsync),
    ("unsafe", DiskCache::Unsafe),
];

/// Limits of rates, live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct DiskLimits {
    /// Reads.
    pub read: Option<DiskRate>,
    /// Writes.
    pub write: Option<DiskRate>,
}

/// A rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "unit", rename_all = "snake_case")]
pub enum DiskRate {
    /// Bytes.
    Bytes {
        /// Per second, not 0.
        per_second: u64,
    },
    /// Operations.
    Operations {
        /// Per second, not 0.
        per_second: u64,
    },
}

/// Keys of the root disk, and those of others; beside [`IO_KEYS`].
pub(super) const ROOT_KEYS: &[&str] =
    &["type", "path", "pool", "source", "size", "boot.priority", "attached", INITIAL];
pub(super) const OTHER_KEYS: &[&str] = &[
    "type",
    "path",
    "pool",
    "source",
    "readonly",
    "recursive",
    "propagation",
    "shift",
    "required",
    "boot.priority",
    "attached",
    "size",
    "format",
    "media",
    "tag",
    "share.options",
];
pub(super) const IO_KEYS: [&str; 9] = [
    encryption::SECRET,
    "io.bus",
    "io.cache",
    "io.options",
    "io.thread",
    "limits.read",
    "limits.write",
    "limits.max",
    "limits.rates",
];

impl DiskIo {
    /// Parses the keys that all disks have.
    pub fn parse(keys: &Keys<'_>) -> Result<Self> {
        let (read, write, both) =
            (rate(keys, "limits.read")?, rate(keys, "limits.write")?, rate(keys, "limits.max")?);
        if both.is_some() && (read.is_some() || write.is_some()) {
            return Err(Error::invalid(
                keys.field("limits.max"),
                "give either limits.max, or limits.read and limits.write",
            ));
        }
        let rates = keys.get("limits.rates").map(|text| Rates::parse(&keys.field("limits.rates"), text));
        let rates = rates.transpose()?;
        if rates.is_some() && both.or(read).or(write).is_some() {
            let text = "says all of it; unset limits.read, limits.write and limits.max";
            return Err(Error::invalid(keys.field("limits.rates"), text));
        }
        let bus = match keys.get("io.bus") {
            Some(AUTO_BUS) => None,
            _ => keys.one_of("io.bus", DISK_BUSES)?,
        };
        let thread = keys.number("io.thread")?;
        if thread == Some(0) {
            return Err(Error::invalid(keys.field("io.thread"), "threads are numbered from 1"));
        }
        if thread.is_some() && bus != Some(DiskBus::VirtioBlk) {
            return Err(Error::invalid(
                keys.field("io.thread"),
                "a disk with a thread of its own is on io.bus=virtio-blk; those on virtio-scsi have hardware.scsi.iothread",
            ));
        }
        let cache = keys.one_of("io.cache", DISK_CACHES)?;
        if matches!(cache, Some(DiskCache::Writethrough | DiskCache::Directsync))
            && matches!(bus, Some(DiskBus::Nvme | DiskBus::Floppy))
        {
            let text =
                "a disk on nvme or floppy has a cache of its own; none, writeback and unsafe are there";
            return Err(Error::invalid(keys.field("io.cache"), text));
        }
        Ok(Self {
            bus,
            cache,
            limits: DiskLimits { read: both.or(read), write: both.or(write) },
            rates,
            thread,
            options: match keys.get("io.options") {
                Some(text) => DiskOptions::parse(&keys.field("io.options"), text, bus)?,
                None => DiskOptions::default(),
            },
            secret: match keys.get(encryption::SECRET) {
                Some(text) => Some(encryption::parse_secret(&keys.field(encryption::SECRET), text)?),
                None => None,
            },
        })
    }
}

/// Refuses what is said of directories alone.
fn demand_drive(keys: &Keys<'_>) -> Result<()> {
    match keys.get("io.bus") {
        Some(AUTO_BUS) => Err(Error::invalid(
            keys.field("io.bus"),
            "auto is how directories are shared, which have a path or a tag; leave io.bus out for a drive's default",
        )),
        _ => Ok(()),
    }
}

/// `10MiB` (bytes a second) or `100iops`.
fn rate(keys: &Keys<'_>, key: &str) -> Result<Option<DiskRate>> {
    let Some(text) = keys.get(key) else { return Ok(None) };
    let rate = match text.strip_suffix("iops") {
        Some(n) => n.trim().parse().ok().map(|per_second| DiskRate::Operations { per_second }),
        None => Some(DiskRate::Bytes { per_second: ByteSize::parse(&keys.field(key), text)?.bytes() }),
    };
    match rate {
        Some(DiskRate::Bytes { per_second: 1.. } | DiskRate::Operations { per_second: 1.. }) => Ok(rate),
        _ => Err(Error::invalid(
            keys.field(key),
            format!("{text:?} is not a rate; write bytes a second as 10MiB, or operations as 100iops"),
        )),
    }
}

/// Keys of Incus for what volumes are made with, of which those of Karst have one.
fn demand_no_initial(keys: &Keys<'_>, root: bool) -> Result<()> {
    let Some(key) = keys.keys.keys().find(|k| k.starts_with("initial.") && !(root && *k == INITIAL)) else {
        return Ok(());
    };
    let what = key.trim_start_matches("initial.");
    let why = match root {
        true => format!(
            "root volumes are made without {what:?}; {INITIAL} can be said of them, their size is the key size, and what others of a \
             pool are to have are the pool's keys volume.*"
        ),
        false => "it is said of root disks; a custom volume is given its keys when it is created".to_owned(),
    };
    Err(Error::unsupported(format!("{key:?} is not there; {why}")).at(keys.field(key)))
}

impl RootDevice {
    pub(super) fn parse(keys: &Keys<'_>) -> Result<Self> {
        demand_no_initial(keys, true)?;
        keys.known(&[ROOT_KEYS, &IO_KEYS].concat())?;
        demand_drive(keys)?;
        let (source, size) = (keys.get("source").map(str::to_owned), keys.size("size")?);
        if source.is_some() && size.is_some() {
            return Err(Error::invalid(
                keys.field("size"),
                "a root disk that is a custom volume has the size of that volume",
            ));
        }
        if source.is_none() && keys.get(encryption::SECRET).is_some() {
            return Err(Error::invalid(
                keys.field(encryption::SECRET),
                "a root disk of its own is not encrypted; make an encrypted volume, and name it as source",
            ));
        }
        if source.is_some() && keys.get(INITIAL).is_some() {
            return Err(Error::invalid(
                keys.field(INITIAL),
                "a root disk that is a custom volume was made before; it says full_copy itself",
            ));
        }
        Ok(Self {
            pool: keys.demand("pool", "the root disk needs a pool")?.to_owned(),
            source,
            size,
            boot_priority: keys.number("boot.priority")?,
            io: DiskIo::parse(keys)?,
            attached: keys.get("attached").is_none() || keys.boolean("attached")?,
            full_copy: keys.get(INITIAL).map(|_| keys.boolean(INITIAL)).transpose()?,
        })
    }
}

impl DiskDevice {
    pub(super) fn parse(keys: &Keys<'_>) -> Result<Self> {
        demand_no_initial(keys, false)?;
        keys.known(&[OTHER_KEYS, &IO_KEYS].concat())?;
        let source = keys.demand("source", "a disk needs a source: a custom volume of a pool, or a path")?;
        let source = match keys.get("pool") {
            Some(_) if source == MEMORY => {
                return Err(Error::invalid(keys.field("pool"), "what is in memory is in no pool"));
            }
            None if source == MEMORY => {
                keys.demand("path", "a file system in memory needs the path to mount it at")?;
                DiskOrigin::Memory { size: keys.size("size")? }
            }
            Some(pool) => DiskOrigin::Volume { pool: pool.to_owned(), volume: source.to_owned() },
            None if source.starts_with('/') => {
                DiskOrigin::Host { path: plain_path(&keys.field("source"), source)? }
            }
            None => {
                return Err(Error::invalid(keys.field("pool"), "a custom volume needs the name of its pool"));
            }
        };
        if let (Some(_), false) = (keys.get("size"), matches!(source, DiskOrigin::Memory { .. })) {
            return Err(Error::invalid(
                keys.field("size"),
                "the size of a volume is a key of the volume; only source=tmpfs: has one here",
            ));
        }
        let path = keys.get("path").map(|p| {
            // Incus takes it relative to the guest's root as well.
            plain_path(&keys.field("path"), &format!("/{}", p.trim_start_matches('/')))
        });
        let path = path.transpose()?;
        let io = DiskIo::parse(keys)?;
        let share = Share::parse(keys, io.bus)?;
        let directory = path.is_some() || share.tag.is_some();
        if !directory {
            demand_drive(keys)?;
        }
        if directory && io.rates.is_some() {
            let text = "is of a drive of a virtual machine; a directory has limits.read and limits.write";
            return Err(Error::invalid(keys.field("limits.rates"), text));
        }
        if io.secret.is_some() && (path.is_some() || matches!(source, DiskOrigin::Memory { .. })) {
            let text = "is said of a drive of a virtual machine; file systems are not encrypted here";
            return Err(Error::invalid(keys.field(encryption::SECRET), text));
        }
        if io.secret.is_some() && keys.get("format").is_some_and(|format| format != "raw") {
            let text = "an encrypted disk is a container of LUKS, which is raw; leave the format out";
            return Err(Error::invalid(keys.field("format"), text));
        }
        for key in ["format", "media"] {
            if keys.get(key).is_some() && (directory || !matches!(source, DiskOrigin::Host { .. })) {
                let text = "is said of a path of the host that a virtual machine has as a drive, and of nothing else";
                return Err(Error::invalid(keys.field(key), text));
            }
        }
        Ok(Self {
            source,
            path,
            readonly: keys.boolean("readonly")?,
            recursive: keys.boolean("recursive")?,
            follow: follow(keys)?,
            shift: keys.boolean("shift")?,
            required: keys.get("required").is_none() || keys.boolean("required")?,
            boot_priority: keys.number("boot.priority")?,
            io,
            attached: keys.get("attached").is_none() || keys.boolean("attached")?,
            format: keys.one_of("format", DRIVE_FORMATS)?.unwrap_or_default(),
            media: keys.one_of("media", DRIVE_MEDIA)?,
            share,
        })
    }

    /// Is it a directory that is mounted in the guest, or shared with it, and no drive?
    pub fn is_directory(&self) -> bool {
        self.path.is_some() || self.share.tag.is_some()
    }

    /// Is it a path of the host that is a disc to a virtual machine?
    pub fn is_disc(&self) -> bool {
        matches!(&self.source, DiskOrigin::Host { path } if is_disc(path, self.media))
    }
}

/// `propagation`: a guest can follow the host's mounts, but not the host a guest's.
fn follow(keys: &Keys<'_>) -> Result<bool> {
    match keys.get("propagation") {
        Some("shared" | "rshared") => Err(Error::unsupported(
            "mounts of a guest cannot be seen by the host; use slave or rslave, by which the guest sees the host's",
        )
        .at(keys.field("propagation"))),
        _ => keys
            .one_of(
                "propagation",
                &[
                    ("private", false),
                    ("rprivate", false),
                    ("unbindable", false),
                    ("runbindable", false),
                    ("slave", true),
                    ("rslave", true),
                ],
            )
            .map(Option::unwrap_or_default),
    }
}

/// An absolute path without `.` and `..`, with single slashes and none at the end.
pub(super) fn plain_path(field: &str, path: &str) -> Result<String> {
    let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
    let clean = !path.contains('\0') && path.len() < 4096 && parts.iter().all(|p| *p != "." && *p != "..");
    if !clean || parts.is_empty() {
        let text = format!("{path:?} is not an absolute path below the root without \".\" and \"..\"");
        return Err(Error::invalid(field, text));
    }
    Ok(format!("/{}", parts.join("/")))
}
