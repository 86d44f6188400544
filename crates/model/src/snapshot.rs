//! Snapshots: nodes of a tree per instance, and of custom volumes.

use crate::{
    ByteSize, Config, Error, InstanceId, Name, ProfileId, Result, SnapshotId, VolumeId, device::Devices,
    instance::Hardware,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// The key of instances that says [`Quiesce`].
pub const QUIESCE: &str = "snapshots.quiesce";

/// Are file systems inside a running virtual machine made still before a snapshot is taken of it, by the agent inside?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quiesce {
    /// No: the snapshot is what a power cut would leave.
    #[default]
    No,
    /// Where the agent can; a warning where it cannot.
    Try,
    /// There is no snapshot without.
    Require,
}

impl Quiesce {
    /// Its words.
    pub const WORDS: &[&str] = &["no", "try", "require"];

    /// Parses one.
    ///
    /// # Errors
    /// Invalid at `field`.
    pub fn parse(field: &str, text: &str) -> Result<Self> {
        match text {
            "no" => Ok(Self::No),
            "try" => Ok(Self::Try),
            "require" => Ok(Self::Require),
            _ => Err(Error::invalid(field, format!("{text:?} is none of: {}", Self::WORDS.join(", ")))),
        }
    }
}

/// A node of an instance's snapshot tree: its parent, the configuration of that moment, one volume snapshot per owned
/// disk and, optionally, RAM with TPM and NVRAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Reference.
    pub id: SnapshotId,
    /// Instance it belongs to.
    pub instance: InstanceId,
    /// Unique among the instance's snapshots.
    pub name: Name,
    /// The snapshot it descends from.
    #[serde(default)]
    pub parent: Option<SnapshotId>,
    /// User's text of the instance then.
    #[serde(default)]
    pub description: String,
    /// User's text of the snapshot itself.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
    /// Was it removed when it stops?
    #[serde(default)]
    pub ephemeral: bool,
    /// Profiles then, in the order of application.
    #[serde(default)]
    pub profiles: Vec<ProfileId>,
    /// Configuration then.
    #[serde(default)]
    pub config: Config,
    /// Devices then.
    #[serde(default)]
    pub devices: Devices,
    /// Virtual hardware then, virtual machines only. None of snapshots that are older than this field, or came from elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hardware: Option<Hardware>,
    /// One per owned disk: the volume and the id of its snapshot.
    #[serde(default)]
    pub volumes: Vec<(VolumeId, SnapshotId)>,
    /// RAM, TPM and NVRAM were saved too.
    #[serde(default)]
    pub stateful: bool,
    /// When it was taken.
    pub created_at: Timestamp,
    /// When it may go.
    #[serde(default)]
    pub expires_at: Option<Timestamp>,
    /// The schedule took it, and no user has made it his own since by a name or an end that he gave it: only such ones are
    /// counted by `snapshots.keep`, and go by it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub scheduled: bool,
    /// Grows with each change; base of the ETag.
    #[serde(default)]
    pub spec_version: u64,
    /// It holds nothing itself: its disks went on in new layers then, and what they were lies below those.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<External>,
}

/// A snapshot that is the moment in which disks went on in new layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct External {
    /// The disks that did.
    pub disks: Vec<ExternalDisk>,
    /// The machine ran.
    #[serde(default)]
    pub running: bool,
}

/// A disk of an [`External`] snapshot, as it was called then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExternalDisk {
    /// Its device.
    pub device: String,
    /// Its pool.
    pub pool: String,
    /// The layer that it went on in.
    pub layer: String,
}

/// A snapshot of a custom volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSnapshot {
    /// Reference; the host's id of it too.
    pub id: SnapshotId,
    /// Volume it belongs to.
    pub volume: VolumeId,
    /// Unique among the volume's snapshots.
    pub name: Name,
    /// User's text.
    #[serde(default)]
    pub description: String,
    /// Size of the volume then.
    #[serde(default)]
    pub size: Option<ByteSize>,
    /// Configuration of the volume then.
    #[serde(default)]
    pub config: Config,
    /// When it was taken.
    pub created_at: Timestamp,
    /// When it may go.
    #[serde(default)]
    pub expires_at: Option<Timestamp>,
    /// The schedule took it, and no user has made it his own since by a name or an end that he gave it: only such ones are
    /// counted by `snapshots.keep`, and go by it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub scheduled: bool,
    /// Grows with each change; base of the ETag.
    #[serde(default)]
    pub spec_version: u64,
}
