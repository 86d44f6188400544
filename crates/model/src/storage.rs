//! Storage pools and volumes.

use crate::{
    ByteSize, Config, Error, ImageId, InstanceId, Name, PoolId, ProjectId, Result, VolumeId,
    encryption::{self, Encryption},
    error::nearest,
    keys,
    layer::Layers,
    pool_life::PoolLife,
    spec::{PoolOptions, PoolSource, PoolSpec},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Kind of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PoolKind {
    /// A directory of the host.
    Dir,
    /// A btrfs file system: each volume a subvolume.
    Btrfs,
    /// ZFS: each volume a data set or zvol.
    Zfs,
    /// Thin volumes of LVM.
    Lvm,
}

impl PoolKind {
    /// All of them.
    pub const ALL: &[PoolKind] = &[PoolKind::Dir, PoolKind::Btrfs, PoolKind::Zfs, PoolKind::Lvm];

    /// Incus' driver name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dir => "dir",
            Self::Btrfs => "btrfs",
            Self::Zfs => "zfs",
            Self::Lvm => "lvm",
        }
    }

    /// Can it be made of something that has a name on its host, a data set or volume group?
    pub fn has_names(self) -> bool {
        matches!(self, Self::Zfs | Self::Lvm)
    }

    /// Parses Incus' driver name. Whether a host can have such pools it says itself.
    pub fn parse(field: &str, s: &str) -> Result<Self> {
        Self::ALL.iter().copied().find(|k| k.as_str() == s).ok_or_else(|| {
            let hint = nearest(s, Self::ALL.iter().map(|k| k.as_str())).unwrap_or("dir");
            Error::invalid(field, format!("{s:?} is not a storage driver of this server; {hint:?} is"))
        })
    }
}

/// A storage pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    /// Reference.
    pub id: PoolId,
    /// Unique name.
    pub name: Name,
    /// Kind.
    pub kind: PoolKind,
    /// User's text.
    #[serde(default)]
    pub description: String,
    /// As written.
    #[serde(default)]
    pub config: Config,
    /// How it is used, where that is not as usual.
    #[serde(default, skip_serializing_if = "PoolLife::is_usual")]
    pub life: PoolLife,
    /// Grows with each change.
    pub spec_version: u64,
}

impl Pool {
    /// For a host.
    ///
    /// # Errors
    /// Invalid, naming the key, when the configuration is not one of this kind.
    pub fn spec(&self) -> Result<PoolSpec> {
        let (source, options) = (pool_source(self.kind, &self.config)?, pool_options(&self.config)?);
        Ok(PoolSpec { id: self.id, kind: self.kind, source, options })
    }
}

/// A key of a pool's configuration.
#[derive(Debug, Clone, Copy)]
pub struct PoolKey {
    /// Name.
    pub name: &'static str,
    /// Kinds that have it.
    pub kinds: &'static [PoolKind],
    /// What holds without it.
    pub default: &'static str,
    /// What it does.
    pub text: &'static str,
}

/// Keys of a pool's configuration beside `user.*`.
pub const POOL_KEYS: &[PoolKey] = &[
    PoolKey {
        name: "source",
        kinds: PoolKind::ALL,
        default: "the host's own directory, or a sparse file in it",
        text: "What of the host it is made of: something that `pool_sources` of the host's policy grants.",
    },
    PoolKey {
        name: "size",
        kinds: &[PoolKind::Btrfs, PoolKind::Zfs, PoolKind::Lvm],
        default: "20% of the free space, 5GiB to 30GiB",
        text: "Size of the pool's own file, which may grow later; not with `source`.",
    },
    PoolKey {
        name: "lvm.vg_name",
        kinds: &[PoolKind::Lvm],
        default: "",
        text: "As `source`: a volume group that is there.",
    },
    PoolKey {
        name: "lvm.thinpool_name",
        kinds: &[PoolKind::Lvm],
        default: "one of the pool's own",
        text: "Thin pool of the group; made of the group's free space when it is not there. One that is there is shared with \
               what else is in it.",
    },
    PoolKey {
        name: "lvm.use_thinpool",
        kinds: &[PoolKind::Lvm],
        default: "true",
        text: "Volumes are thin always: Incus' other value is refused.",
    },
    PoolKey {
        name: "zfs.clone_copy",
        kinds: &[PoolKind::Zfs],
        default: "true",
        text: "Copies are clones always, which keep nothing that was deleted: Incus' other values are refused.",
    },
    PoolKey {
        name: "zfs.pool_name",
        kinds: &[PoolKind::Zfs],
        default: "",
        text: "As `source`: a zpool or data set that is there.",
    },
    PoolKey {
        name: "volume.block.filesystem",
        kinds: &[PoolKind::Lvm, PoolKind::Zfs],
        default: "ext4",
        text: "File system of containers' volumes on devices: `ext4` or `xfs`.",
    },
    PoolKey {
        name: "volume.full_copy",
        kinds: PoolKind::ALL,
        default: "false",
        text: "What is made of an image or is a copy (roots of instances, copies and moves of instances and volumes, refreshed ones) has \
               all data for itself from the beginning, which takes time and space, rather than sharing it with what it was made of.",
    },
    PoolKey {
        name: "volume.security.shared",
        kinds: PoolKind::ALL,
        default: "false",
        text: "New block volumes may be attached to several instances at once, as their own key says.",
    },
    PoolKey {
        name: "volume.security.shifted",
        kinds: PoolKind::ALL,
        default: "false",
        text: "The same of file systems and `security.shifted`.",
    },
    PoolKey {
        name: "volume.size",
        kinds: PoolKind::ALL,
        default: "10GiB for disks of machines and block volumes",
        text: "Size of new volumes and root disks that say none themselves. Not of files in a `dir` pool, which cannot bound them.",
    },
    PoolKey {
        name: "volume.snapshots.expiry",
        kinds: PoolKind::ALL,
        default: "",
        text: "When snapshots of new volumes expire, where the volume does not say.",
    },
    PoolKey {
        name: "volume.snapshots.expiry.manual",
        kinds: PoolKind::ALL,
        default: "",
        text: "The same of snapshots that were asked for.",
    },
    PoolKey {
        name: "volume.snapshots.keep",
        kinds: PoolKind::ALL,
        default: "all",
        text: "How many snapshots of the schedule of new volumes are kept, where the volume does not say.",
    },
    PoolKey {
        name: "volume.snapshots.pattern",
        kinds: PoolKind::ALL,
        default: "`snap%d`",
        text: "How snapshots of new volumes are called, where the volume does not say.",
    },
    PoolKey {
        name: "volume.snapshots.schedule",
        kinds: PoolKind::ALL,
        default: "",
        text: "When snapshots of new volumes are taken, where the volume does not say.",
    },
    PoolKey {
        name: "volume.zfs.block_mode",
        kinds: &[PoolKind::Zfs],
        default: "true before OpenZFS 2.2, which cannot map the ids of mounts",
        text: "Containers' volumes are file systems on zvols rather than data sets.",
    },
    PoolKey {
        name: "volume.zfs.blocksize",
        kinds: &[PoolKind::Zfs],
        default: "OpenZFS' own",
        text: "Block size of zvols: a power of two, 4KiB to 128KiB.",
    },
    PoolKey {
        name: "volume.zfs.use_refquota",
        kinds: &[PoolKind::Zfs],
        default: "true",
        text: "Limits count what a volume holds, not its snapshots, as on all pools: Incus' other value is refused.",
    },
];

/// The key of volumes that this key of a pool is the default of, such as `size` of `volume.size`.
pub fn default_of(key: &str) -> Option<&str> {
    key.strip_prefix("volume.").filter(|k| VOLUME_KEYS.contains(k) && *k != "user.*")
}

/// Keys that only some volumes have.
fn fits(key: &str, content: VolumeContent) -> bool {
    match key {
        "security.shared" => content == VolumeContent::Block,
        _ if key.starts_with("encryption.") => content == VolumeContent::Block,
        "security.shifted" => content == VolumeContent::Filesystem,
        "size" => content != VolumeContent::Iso,
        _ => true,
    }
}

fn check_volume_defaults(config: &Config) -> Result<()> {
    for (key, value) in config {
        let Some(of) = default_of(key) else { continue };
        let content =
            if fits(of, VolumeContent::Block) { VolumeContent::Block } else { VolumeContent::Filesystem };
        let one = Config::from([(of.to_owned(), value.clone())]);
        check_volume_config(&one, content).map_err(|e| e.at(format!("config.{key}")))?;
    }
    Ok(())
}

impl Pool {
    /// What a new custom volume of this pool is to have: what was asked for, and the pool's defaults for what was not.
    pub fn volume_config(&self, asked: &Config, content: VolumeContent) -> Config {
        let mut all: Config =
            asked.iter().filter(|(_, v)| !v.is_empty()).map(|(k, v)| (k.clone(), v.clone())).collect();
        for (key, value) in self.config.iter().filter(|(_, v)| !v.is_empty()) {
            let Some(of) = default_of(key).filter(|of| fits(of, content)) else { continue };
            // Asked for as empty is asked for as none.
            if asked.contains_key(of) || (of == "size" && !self.bounds(content)) {
                continue;
            }
            all.insert(of.to_owned(), value.clone());
        }
        all
    }

    /// Is what is made in it of an image or another volume a full copy? A custom volume may say it itself, in `own`.
    pub fn full_copy(&self, own: &Config) -> bool {
        let own = own.get("full_copy").filter(|v| !v.is_empty());
        let value = own.or_else(|| self.config.get("volume.full_copy"));
        value.is_some_and(|v| keys::parse_bool("config.volume.full_copy", v).unwrap_or(false))
    }

    /// The size of a new root disk that says none itself.
    pub fn root_size(&self, content: VolumeContent) -> Option<ByteSize> {
        let size = self.config.get("volume.size").filter(|s| !s.is_empty() && self.bounds(content))?;
        ByteSize::parse("config.volume.size", size).ok()
    }

    /// Can it bound what such a volume takes?
    fn bounds(&self, content: VolumeContent) -> bool {
        content != VolumeContent::Filesystem || self.kind != PoolKind::Dir
    }
}

/// Is this the name of a data set or volume group?
///
/// # Errors
/// Invalid, naming the field.
pub fn check_source_name(kind: PoolKind, field: &str, name: &str) -> Result<()> {
    // What is made in it has a name of up to 150 letters after a data set's, of up to 84 after a group's: the kernel takes 255,
    // and 127 where a dash counts twice.
    let (letters, parts, longest) = match kind {
        PoolKind::Zfs => ("_-.: ", 16, 100),
        _ => ("_-.+", 1, 40),
    };
    let length = name.len() + if kind == PoolKind::Zfs { 0 } else { name.matches('-').count() };
    if length > longest {
        let text = format!(
            "{name:?} is too long: what is made in it must have a name too, so it has {longest} letters at most"
        );
        return Err(Error::invalid(field, text));
    }
    let part = |p: &str| {
        let begins = p.chars().next().is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
        begins && p.chars().all(|c| c.is_ascii_alphanumeric() || (c != ' ' && letters.contains(c)))
    };
    if name.split('/').count() <= parts && name.split('/').all(part) {
        return Ok(());
    }
    let what = if kind == PoolKind::Zfs { "a data set of ZFS" } else { "a volume group" };
    Err(Error::invalid(field, format!("{name:?} is neither an absolute path nor the name of {what}")))
}

/// Keys of Incus that have one value here, and why.
const ALWAYS: &[(&str, &str)] = &[
    ("lvm.use_thinpool", "volumes of LVM are thin here; leave it out"),
    (
        "zfs.clone_copy",
        "copies are clones here, which keep nothing that was deleted; leave it out, or set volume.full_copy=true for copies that \
         share nothing",
    ),
    ("volume.zfs.use_refquota", "limits count what a volume holds, without its snapshots; leave it out"),
];

/// What only some kinds have. The keys are checked by [`pool_source`].
///
/// # Errors
/// Invalid, naming the key.
pub fn pool_options(config: &Config) -> Result<PoolOptions> {
    let value = |key: &str| config.get(key).filter(|v| !v.is_empty());
    // What is always so may be said.
    for (key, what) in ALWAYS {
        let field = format!("config.{key}");
        match value(key) {
            Some(text) if !keys::parse_bool(&field, text)? => return Err(Error::invalid(field, *what)),
            _ => {}
        }
    }
    let mut options = PoolOptions::default();
    if let Some(name) = value("lvm.thinpool_name") {
        check_source_name(PoolKind::Lvm, "config.lvm.thinpool_name", name)?;
        options.thin_pool = Some(name.clone());
    }
    if let Some(text) = value("volume.zfs.block_mode") {
        options.block_mode = Some(keys::parse_bool("config.volume.zfs.block_mode", text)?);
    }
    if let Some(text) = value("volume.zfs.blocksize") {
        let field = "config.volume.zfs.blocksize";
        let size = ByteSize::parse(field, text)?;
        if !size.0.is_power_of_two() || !(4 << 10..=128 << 10).contains(&size.0) {
            return Err(Error::invalid(field, "blocks have a power of two of bytes, 4KiB to 128KiB"));
        }
        options.block_size = Some(size);
    }
    if let Some(name) = value("volume.block.filesystem") {
        if !["ext4", "xfs"].contains(&name.as_str()) {
            let text = format!("{name:?} is not a file system of this server's volumes; ext4 and xfs are");
            return Err(Error::invalid("config.volume.block.filesystem", text));
        }
        options.file_system = Some(name.clone());
    }
    Ok(options)
}

/// What a pool is made of, by its configuration.
///
/// # Errors
/// Invalid, naming the key: unknown (with the nearest one that there is), of another kind, or with a value that it cannot
/// have.
pub fn pool_source(kind: PoolKind, config: &Config) -> Result<PoolSource> {
    for (key, value) in config {
        let field = format!("config.{key}");
        crate::keys::check_free(key, value)?;
        if key.starts_with("user.") {
            continue;
        }
        match POOL_KEYS.iter().find(|k| k.name == key) {
            Some(k) if k.kinds.contains(&kind) => {}
            Some(_) => {
                let text = format!("a {} pool has no {key:?}", kind.as_str());
                return Err(Error::invalid(field, text));
            }
            None => {
                let known = POOL_KEYS.iter().filter(|k| k.kinds.contains(&kind)).map(|k| k.name);
                let hint = nearest(key, known).map(|k| format!("; did you mean {k:?}?")).unwrap_or_default();
                return Err(Error::invalid(
                    field,
                    format!("unknown key {key:?} of a {} pool{hint}", kind.as_str()),
                ));
            }
        }
    }
    let size = config.get("size").filter(|s| !s.is_empty());
    let size = size.map(|s| ByteSize::parse("config.size", s)).transpose()?;
    pool_options(config)?;
    check_volume_defaults(config)?;
    let value = |key: &str| config.get(key).filter(|s| !s.is_empty());
    let named = value("zfs.pool_name").or(value("lvm.vg_name"));
    if let (Some(source), Some(named)) = (value("source"), named)
        && source != named
    {
        let key = if kind == PoolKind::Zfs { "config.zfs.pool_name" } else { "config.lvm.vg_name" };
        return Err(Error::invalid(key, "differs from \"source\"; leave one of the two out"));
    }
    if kind == PoolKind::Lvm
        && value("lvm.thinpool_name").is_some()
        && value("source").or(named).is_none_or(|s| s.starts_with('/'))
    {
        return Err(Error::invalid(
            "config.lvm.thinpool_name",
            "is for a volume group that is there (\"source\")",
        ));
    }
    match value("source").or(named) {
        None => Ok(PoolSource::Own { size }),
        Some(_) if size.is_some() => Err(Error::invalid(
            "config.size",
            "a pool on a source has the source's size; leave one of the two out",
        )),
        Some(source) if kind.has_names() && !source.starts_with('/') => {
            check_source_name(kind, "config.source", source)?;
            Ok(PoolSource::Granted { source: source.clone() })
        }
        Some(source)
            if !source.starts_with('/') || source.contains('\0') || source.split('/').any(|p| p == "..") =>
        {
            Err(Error::invalid("config.source", format!("{source:?} is not an absolute path without \"..\"")))
        }
        Some(source) => Ok(PoolSource::Granted { source: source.clone() }),
    }
}

/// What a volume holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumeContent {
    /// A tree of files.
    Filesystem,
    /// A block device or disk image.
    Block,
    /// A disc image: as [`VolumeContent::Block`], but never written again once it was filled.
    Iso,
}

impl VolumeContent {
    /// Incus' word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Filesystem => "filesystem",
            Self::Block => "block",
            Self::Iso => "iso",
        }
    }

    /// A disk or disc, as opposed to a tree.
    pub fn is_disk(self) -> bool {
        self != Self::Filesystem
    }
}

/// Whom a volume belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum VolumeOwner {
    /// A disk of an instance.
    Instance {
        /// Which.
        instance: InstanceId,
    },
    /// Made by a user; attachable.
    Custom,
    /// Cached content of an image.
    Image {
        /// Which.
        image: ImageId,
    },
}

/// A volume. Its place on disk derives from its UUID only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Reference.
    pub id: VolumeId,
    /// Pool it is in.
    pub pool: PoolId,
    /// Project it counts for.
    pub project: ProjectId,
    /// Name within (pool, project, owner kind); for instances the instance's name at creation.
    pub name: String,
    /// What it holds.
    pub content: VolumeContent,
    /// Whose it is.
    pub owner: VolumeOwner,
    /// User's text.
    #[serde(default)]
    pub description: String,
    /// Size limit; `None` is the pool's.
    #[serde(default)]
    pub size: Option<ByteSize>,
    /// As written.
    #[serde(default)]
    pub config: Config,
    /// Grows with each change; base of the ETag.
    #[serde(default)]
    pub spec_version: u64,
    /// When it was made.
    pub created_at: Timestamp,
    /// What of a disk lies over the file that it was made with.
    #[serde(default, skip_serializing_if = "Layers::is_new")]
    pub layers: Layers,
}

impl Volume {
    /// May several instances have it at once? File systems may, and discs, which nobody writes; of a block volume its owner
    /// must say so, because what is in it must be made for that.
    pub fn is_shared(&self) -> bool {
        self.content != VolumeContent::Block
            || self.config.get("security.shared").is_some_and(|v| keys::parse_bool("", v).unwrap_or(false))
    }

    /// How it is encrypted, and the secret that opens it; only what users make is. Its keys were checked when they were written.
    pub fn encryption(&self) -> Option<(uuid::Uuid, Encryption)> {
        Encryption::of(&self.config).ok().flatten().filter(|_| self.owner == VolumeOwner::Custom)
    }

    /// Bytes that stand before its content in the pool: what encryption puts there.
    pub fn header(&self) -> u64 {
        self.encryption().map_or(0, |(_, made)| made.header())
    }

    /// What a size of its content is in the pool.
    pub fn stored(&self, size: ByteSize) -> ByteSize {
        ByteSize(size.bytes().saturating_add(self.header()))
    }

    /// What a size in the pool is of its content.
    pub fn shown(&self, stored: ByteSize) -> ByteSize {
        ByteSize(stored.bytes().saturating_sub(self.header()))
    }

    /// Its size in the pool.
    pub fn stored_size(&self) -> Option<ByteSize> {
        self.size.map(|size| self.stored(size))
    }
}

/// Size of a custom block volume without one.
pub const DEFAULT_BLOCK_SIZE: ByteSize = ByteSize::gib(10);

/// Keys of custom volumes.
pub const VOLUME_KEYS: &[&str] = &[
    encryption::CIPHER,
    encryption::HASH,
    encryption::IV,
    encryption::SECRET,
    "full_copy",
    "security.shared",
    "security.shifted",
    "size",
    "snapshots.expiry",
    "snapshots.expiry.manual",
    "snapshots.keep",
    "snapshots.pattern",
    "snapshots.schedule",
    "user.*",
];

/// Checks the configuration of a custom volume and answers its size; empty values mean "not set".
///
/// # Errors
/// Invalid, naming the key.
pub fn check_volume_config(config: &Config, content: VolumeContent) -> Result<Option<ByteSize>> {
    let mut size = None;
    for (key, value) in config {
        keys::check_free(key, value)?;
        let field = format!("config.{key}");
        match key.as_str() {
            _ if key.starts_with("user.") && key.len() > 5 => {}
            _ if !VOLUME_KEYS.contains(&key.as_str()) => {
                let hint = match nearest(key, VOLUME_KEYS.iter().copied()) {
                    Some(n) => format!("; did you mean {n:?}?"),
                    None => format!("; known are {}", VOLUME_KEYS.join(", ")),
                };
                return Err(Error::invalid(field, format!("unknown key {key:?} of a volume{hint}")));
            }
            _ if value.is_empty() => {}
            "size" => {
                let bytes = ByteSize::parse(&field, value)?;
                if bytes.bytes() < 1 << 20 {
                    return Err(Error::invalid(
                        field,
                        format!("{bytes} is too small; a volume has at least 1MiB"),
                    ));
                }
                size = Some(bytes);
            }
            _ if key.starts_with("encryption.") && content != VolumeContent::Block => {
                return Err(Error::invalid(
                    field,
                    "is for block volumes, of which the disks of virtual machines are; file systems and discs are not encrypted",
                ));
            }
            "security.shared" if content == VolumeContent::Filesystem => {
                return Err(Error::invalid(
                    field,
                    "is for block volumes; file systems are shared without it",
                ));
            }
            "security.shifted" if content != VolumeContent::Filesystem => {
                return Err(Error::invalid(field, "is for file systems only"));
            }
            "full_copy" | "security.shared" | "security.shifted" => drop(keys::parse_bool(&field, value)?),
            "snapshots.expiry" | "snapshots.expiry.manual" => {
                drop(crate::schedule::Span::parse(&field, value)?)
            }
            "snapshots.keep" => drop(crate::schedule::parse_keep(&field, value)?),
            "snapshots.schedule" => drop(crate::schedule::Schedule::parse(&field, value)?),
            "snapshots.pattern" => crate::schedule::check_pattern(&field, value)?,
            _ => {}
        }
    }
    Encryption::of(config)?;
    Ok(size)
}

/// What the file system of a pool of directories can, as its host has tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Abilities {
    /// Files keep the owners that they are given: without that it holds disks of machines only.
    pub owners: bool,
    /// It can be mounted with other owners; else those of containers' files are changed on disk.
    pub mapped: bool,
    /// Overlays: roots of containers lie over their image; else they are copies.
    pub layers: bool,
    /// Sizes of trees are held.
    pub limits: bool,
    /// Copies share blocks with what they are of.
    pub clones: bool,
    /// Files have second names; else each disk has a copy of its image.
    pub links: bool,
    /// What was never written takes no space.
    pub holes: bool,
    /// Input and output past the host's page cache.
    pub direct: bool,
    /// Extended attributes of users.
    pub attributes: bool,
}

/// Space of a pool or volume in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Usage {
    /// Used bytes.
    pub used: u64,
    /// Total bytes; 0 when not limited.
    pub total: u64,
    /// Used inodes.
    #[serde(default)]
    pub inodes_used: u64,
    /// Total inodes.
    #[serde(default)]
    pub inodes_total: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_incus_names() {
        for kind in PoolKind::ALL {
            assert_eq!(PoolKind::parse("driver", kind.as_str()).unwrap(), *kind);
        }
        let e = PoolKind::parse("driver", "btrsf").unwrap_err();
        assert!(e.field.as_deref() == Some("driver") && e.message.contains("\"btrfs\" is"), "{e}");
    }

    #[test]
    fn the_configuration_of_a_pool_is_read_once() {
        let read = |kind, pairs: &[(&str, &str)]| {
            let config = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            pool_source(kind, &config).map_err(|e| (e.field.unwrap_or_default(), e.message))
        };
        assert_eq!(read(PoolKind::Dir, &[("user.x", "y")]), Ok(PoolSource::Own { size: None }));
        let size = Some(ByteSize::gib(10));
        assert_eq!(read(PoolKind::Btrfs, &[("size", "10GiB")]), Ok(PoolSource::Own { size }));
        let source = "/dev/sdb".to_owned();
        assert_eq!(read(PoolKind::Btrfs, &[("source", "/dev/sdb")]), Ok(PoolSource::Granted { source }));
        let source = "tank/guests".to_owned();
        let named = [("zfs.pool_name", "tank/guests"), ("volume.zfs.blocksize", "16KiB")];
        assert_eq!(read(PoolKind::Zfs, &named), Ok(PoolSource::Granted { source }));
        let source = "vg0".to_owned();
        let group = [
            ("source", "vg0"),
            ("lvm.thinpool_name", "thin"),
            ("lvm.use_thinpool", "true"),
            ("volume.block.filesystem", "xfs"),
        ];
        assert_eq!(read(PoolKind::Lvm, &group), Ok(PoolSource::Granted { source }));
        for (kind, config, field, word) in [
            (PoolKind::Dir, &[("size", "10GiB")][..], "config.size", "dir pool"),
            (PoolKind::Btrfs, &[("siez", "10GiB")], "config.siez", "\"size\""),
            (PoolKind::Btrfs, &[("size", "much")], "config.size", ""),
            (PoolKind::Dir, &[("source", "srv")], "config.source", "absolute"),
            (PoolKind::Dir, &[("source", "/srv/../etc")], "config.source", "absolute"),
            (PoolKind::Btrfs, &[("source", "/dev/sdb"), ("size", "10GiB")], "config.size", "leave one"),
            (PoolKind::Btrfs, &[("source", "tank")], "config.source", "absolute"),
            (PoolKind::Btrfs, &[("zfs.pool_name", "tank")], "config.zfs.pool_name", "btrfs pool"),
            (PoolKind::Zfs, &[("source", "tank/../x")], "config.source", "data set"),
            (PoolKind::Zfs, &[("source", "-f")], "config.source", "data set"),
            (PoolKind::Zfs, &[("source", "tank"), ("size", "10GiB")], "config.size", "leave one"),
            (PoolKind::Zfs, &[("source", "tank"), ("zfs.pool_name", "t")], "config.zfs.pool_name", "differs"),
            (PoolKind::Zfs, &[("volume.zfs.blocksize", "5KiB")], "config.volume.zfs.blocksize", "power"),
            (PoolKind::Zfs, &[("volume.zfs.block_mode", "some")], "config.volume.zfs.block_mode", ""),
            (PoolKind::Lvm, &[("source", "vg0/lv")], "config.source", "volume group"),
            (
                PoolKind::Lvm,
                &[("source", "a-volume-group-with-a-name-that-is-too-long")],
                "config.source",
                "at most",
            ),
            (PoolKind::Lvm, &[("lvm.use_thinpool", "false")], "config.lvm.use_thinpool", "thin here"),
            (PoolKind::Zfs, &[("zfs.clone_copy", "rebase")], "config.zfs.clone_copy", ""),
            (PoolKind::Zfs, &[("lvm.use_thinpool", "true")], "config.lvm.use_thinpool", "zfs pool"),
            (PoolKind::Dir, &[("volume.size", "1KiB")], "config.volume.size", "too small"),
            (PoolKind::Dir, &[("volume.security.shared", "perhaps")], "config.volume.security.shared", ""),
            (PoolKind::Lvm, &[("volume.full_copy", "some")], "config.volume.full_copy", "boolean"),
            (PoolKind::Zfs, &[("zfs.clone_copy", "false")], "config.zfs.clone_copy", "volume.full_copy"),
            (
                PoolKind::Btrfs,
                &[("volume.snapshots.schedule", "* *")],
                "config.volume.snapshots.schedule",
                "",
            ),
            (PoolKind::Lvm, &[("volume.snapshots.keep", "0")], "config.volume.snapshots.keep", "from 1"),
            (PoolKind::Btrfs, &[("volume.sise", "1GiB")], "config.volume.sise", "volume.size"),
            (PoolKind::Dir, &[("volume.user.x", "y")], "config.volume.user.x", "unknown"),
            (PoolKind::Lvm, &[("lvm.thinpool_name", "thin")], "config.lvm.thinpool_name", "source"),
            (
                PoolKind::Lvm,
                &[("volume.block.filesystem", "btrfs")],
                "config.volume.block.filesystem",
                "ext4",
            ),
        ] {
            let (at, message) = read(kind, config).unwrap_err();
            assert!(at == field && message.contains(word), "{at}: {message}");
        }
    }

    #[test]
    fn volumes_get_what_their_pool_says() {
        use VolumeContent::{Block, Filesystem, Iso};
        let map = |pairs: &[(&str, &str)]| -> Config {
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
        };
        let pool = |kind| Pool {
            id: PoolId(uuid::Uuid::nil()),
            name: Name::parse("name", "p").unwrap(),
            kind,
            description: String::new(),
            config: map(&[
                ("volume.size", "20GiB"),
                ("volume.security.shared", "true"),
                ("volume.snapshots.expiry", "1w"),
                ("volume.snapshots.keep", "7"),
                ("volume.zfs.blocksize", "16KiB"),
            ]),
            life: PoolLife::default(),
            spec_version: 1,
        };
        let btrfs = pool(PoolKind::Btrfs);
        let shown = |asked: &[(&str, &str)], content| btrfs.volume_config(&map(asked), content);
        assert_eq!(
            shown(&[], Block),
            map(&[
                ("security.shared", "true"),
                ("size", "20GiB"),
                ("snapshots.expiry", "1w"),
                ("snapshots.keep", "7")
            ])
        );
        assert_eq!(
            shown(&[("size", "1GiB"), ("snapshots.expiry", ""), ("snapshots.keep", "2")], Filesystem),
            map(&[("size", "1GiB"), ("snapshots.keep", "2")])
        );
        assert_eq!(shown(&[], Iso), map(&[("snapshots.expiry", "1w"), ("snapshots.keep", "7")]));
        assert_eq!(btrfs.root_size(Filesystem), Some(ByteSize::gib(20)));
        let dir = pool(PoolKind::Dir);
        assert_eq!((dir.root_size(Filesystem), dir.root_size(Block)), (None, Some(ByteSize::gib(20))));
        assert!(!dir.volume_config(&Config::new(), Filesystem).contains_key("size"));
        assert!(!btrfs.full_copy(&Config::new()) && btrfs.full_copy(&map(&[("full_copy", "true")])));
        let mut full = pool(PoolKind::Lvm);
        full.config.insert("volume.full_copy".into(), "true".into());
        assert!(full.full_copy(&Config::new()) && full.full_copy(&map(&[("full_copy", "")])));
        assert!(!full.full_copy(&map(&[("full_copy", "false")])), "a volume says it for itself");
        assert_eq!(full.volume_config(&Config::new(), Iso)["full_copy"], "true");
    }

    #[test]
    fn keys_of_volumes_are_checked_by_content() {
        let check = |key: &str, value: &str, content| {
            check_volume_config(&Config::from([(key.to_owned(), value.to_owned())]), content)
        };
        use VolumeContent::{Block, Filesystem};
        assert_eq!(check("size", "2GiB", Block).unwrap(), Some(ByteSize::gib(2)));
        assert_eq!(check("size", "", Block).unwrap(), None);
        assert!(check("security.shared", "true", Block).is_ok() && check("user.x", "y", Block).is_ok());
        for (key, value, content) in [
            ("size", "1KiB", Block),
            ("size", "much", Block),
            ("sise", "1GiB", Block),
            ("user.", "x", Block),
            ("security.shared", "true", Filesystem),
            ("security.shared", "perhaps", Block),
            ("security.shifted", "true", Block),
            ("snapshots.expiry", "soon", Block),
            ("full_copy", "perhaps", Filesystem),
            ("snapshots.keep", "0", Block),
            ("snapshots.keep", "-1", Filesystem),
            ("snapshots.keep", "all", Filesystem),
            ("snapshots.schedule", "* *", Block),
            ("snapshots.pattern", "a/b", Block),
        ] {
            let e = check(key, value, content).unwrap_err();
            assert_eq!(e.field, Some(format!("config.{key}")), "{key}={value}: {e}");
        }
        assert!(check("sise", "1GiB", Block).unwrap_err().message.contains("did you mean \"size\""));
    }
}
