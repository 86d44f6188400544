//! Storage pools and volumes.

use crate::{
    ByteSize, Config, Error, ImageId, InstanceId, Name, PoolId, ProjectId, Result, VolumeId, error::nearest,
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
    /// Size limit; `None` is the pool's.
    #[serde(default)]
    pub size: Option<ByteSize>,
    /// As written.
    #[serde(default)]
    pub config: Config,
    /// When it was made.
    pub created_at: Timestamp,
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
