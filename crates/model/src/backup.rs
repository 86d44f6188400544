//! Backups: files that hold an instance or a custom volume with what belongs to it, in Incus' backup format.

use crate::{BackupId, Error, InstanceId, Name, NodeId, Result, VolumeId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// What a backup is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "of", rename_all = "snake_case")]
pub enum BackupOwner {
    /// An instance.
    Instance {
        /// Which.
        instance: InstanceId,
    },
    /// A custom volume.
    Volume {
        /// Which.
        volume: VolumeId,
    },
}

impl BackupOwner {
    /// Scope of the names of its backups.
    pub fn scope(&self) -> String {
        match self {
            Self::Instance { instance } => instance.to_string(),
            Self::Volume { volume } => volume.to_string(),
        }
    }
}

/// A backup that its node keeps until it is deleted or expires.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backup {
    /// Reference; the host's id of it too.
    pub id: BackupId,
    /// What it is of.
    pub owner: BackupOwner,
    /// Where it lies.
    pub node: NodeId,
    /// Unique among the owner's backups.
    pub name: Name,
    /// Without the snapshots.
    pub instance_only: bool,
    /// Bytes of the file.
    pub size: u64,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it goes.
    #[serde(default)]
    pub expires_at: Option<Timestamp>,
    /// Grows with each change; base of the ETag.
    pub spec_version: u64,
}

/// How the file of a backup or an image is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip, what every client and server reads.
    #[default]
    Gzip,
    /// Zstandard.
    Zstd,
    /// xz.
    Xz,
    /// bzip2.
    Bzip2,
}

impl Compression {
    /// Parses Incus' names; empty is the default.
    ///
    /// # Errors
    /// Invalid at `field`.
    pub fn parse(field: &str, text: &str) -> Result<Self> {
        Ok(match text {
            "" | "gzip" | "pigz" => Self::Gzip,
            "none" => Self::None,
            "zstd" => Self::Zstd,
            "xz" | "lzma" => Self::Xz,
            "bzip2" => Self::Bzip2,
            other => {
                return Err(Error::invalid(
                    field,
                    format!("{other:?} is not a compression; none, gzip, zstd, xz and bzip2 are"),
                ));
            }
        })
    }
}
