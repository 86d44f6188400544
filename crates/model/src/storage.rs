//! Storage pools and volumes.

use crate::{
    ByteSize, Config, Error, ImageId, InstanceId, Name, PoolId, ProjectId, Result, VolumeId,
    error::nearest,
    keys,
    spec::{PoolSource, PoolSpec},
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
}

impl PoolKind {
    /// All of them.
    pub const ALL: &[PoolKind] = &[PoolKind::Dir, PoolKind::Btrfs];

    /// Incus' driver name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dir => "dir",
            Self::Btrfs => "btrfs",
        }
    }

    /// Parses Incus' driver name.
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
    /// Grows with each change.
    pub spec_version: u64,
}

impl Pool {
    /// For a host.
    ///
    /// # Errors
    /// Invalid, naming the key, when the configuration is not one of this kind.
    pub fn spec(&self) -> Result<PoolSpec> {
        Ok(PoolSpec { id: self.id, kind: self.kind, source: pool_source(self.kind, &self.config)? })
    }
}

/// Keys of a pool's configuration beside `user.*`: key, kinds that have it.
const POOL_KEYS: &[(&str, &[PoolKind])] =
    &[("size", &[PoolKind::Btrfs]), ("source", &[PoolKind::Dir, PoolKind::Btrfs])];

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
        match POOL_KEYS.iter().find(|(k, _)| k == key) {
            Some((_, kinds)) if kinds.contains(&kind) => {}
            Some(_) => {
                let text = format!("a {} pool has no {key:?}", kind.as_str());
                return Err(Error::invalid(field, text));
            }
            None => {
                let known = POOL_KEYS.iter().filter(|(_, kinds)| kinds.contains(&kind)).map(|(k, _)| *k);
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
    match config.get("source").filter(|s| !s.is_empty()) {
        None => Ok(PoolSource::Own { size }),
        Some(_) if size.is_some() => Err(Error::invalid(
            "config.size",
            "a pool on a source has the source's size; leave one of the two out",
        )),
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
}

impl Volume {
    /// May several instances have it at once? File systems may, and discs, which nobody writes; of a block volume its owner
    /// must say so, because what is in it must be made for that.
    pub fn is_shared(&self) -> bool {
        self.content != VolumeContent::Block
            || self.config.get("security.shared").is_some_and(|v| keys::parse_bool("", v).unwrap_or(false))
    }
}

/// Size of a custom block volume without one.
pub const DEFAULT_BLOCK_SIZE: ByteSize = ByteSize::gib(10);

/// Keys of custom volumes.
pub const VOLUME_KEYS: &[&str] = &[
    "security.shared",
    "security.shifted",
    "size",
    "snapshots.expiry",
    "snapshots.expiry.manual",
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
            "security.shared" if content == VolumeContent::Filesystem => {
                return Err(Error::invalid(
                    field,
                    "is for block volumes; file systems are shared without it",
                ));
            }
            "security.shifted" if content != VolumeContent::Filesystem => {
                return Err(Error::invalid(field, "is for file systems only"));
            }
            "security.shared" | "security.shifted" => drop(keys::parse_bool(&field, value)?),
            "snapshots.expiry" | "snapshots.expiry.manual" => {
                drop(crate::schedule::Span::parse(&field, value)?)
            }
            "snapshots.schedule" => drop(crate::schedule::Schedule::parse(&field, value)?),
            "snapshots.pattern" => crate::schedule::check_pattern(&field, value)?,
            _ => {}
        }
    }
    Ok(size)
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
        for (kind, config, field, word) in [
            (PoolKind::Dir, &[("size", "10GiB")][..], "config.size", "dir pool"),
            (PoolKind::Btrfs, &[("siez", "10GiB")], "config.siez", "\"size\""),
            (PoolKind::Btrfs, &[("size", "much")], "config.size", ""),
            (PoolKind::Dir, &[("source", "srv")], "config.source", "absolute"),
            (PoolKind::Dir, &[("source", "/srv/../etc")], "config.source", "absolute"),
            (PoolKind::Btrfs, &[("source", "/dev/sdb"), ("size", "10GiB")], "config.size", "leave one"),
        ] {
            let (at, message) = read(kind, config).unwrap_err();
            assert!(at == field && message.contains(word), "{at}: {message}");
        }
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
            ("snapshots.schedule", "* *", Block),
            ("snapshots.pattern", "a/b", Block),
        ] {
            let e = check(key, value, content).unwrap_err();
            assert_eq!(e.field, Some(format!("config.{key}")), "{key}={value}: {e}");
        }
        assert!(check("sise", "1GiB", Block).unwrap_err().message.contains("did you mean \"size\""));
    }
}
