//! Snapshots: nodes of a tree per instance.

use crate::{Config, InstanceId, Name, SnapshotId, VolumeId, device::Devices};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

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
    /// Configuration then.
    #[serde(default)]
    pub config: Config,
    /// Devices then.
    #[serde(default)]
    pub devices: Devices,
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
}
