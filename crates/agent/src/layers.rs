//! What the calls carry that put layers over disks of virtual machines, and merge them ([`karst_model::layer`]).

use crate::{GuestRef, VolumeRef};
use karst_model::{InstanceId, guest::DiskCopyEnd, layer::Merge};
use serde::{Deserialize, Serialize};

/// Layers of one call.
pub const MOST_AT_ONCE: usize = 64;

/// A layer to be put over a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerOver {
    /// The volume.
    pub volume: VolumeRef,
    /// The layer's number, higher than all that the volume has had.
    pub number: u32,
}

/// Layers that disks of one machine are to go on in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineLayersAdd {
    /// Whose disks.
    pub instance: InstanceId,
    /// The start of the machine that is meant; `None`: it did not run, and nothing starts it meanwhile.
    pub guest: Option<GuestRef>,
    /// One of each disk.
    pub layers: Vec<LayerOver>,
}

/// Files of a disk of a running machine, to be made one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineMergeBegin {
    /// Of which machine.
    pub guest: GuestRef,
    /// The volume that is the disk; by it the merge is called from then on.
    pub volume: VolumeRef,
    /// Which files.
    pub merge: Merge,
    /// Bytes a second at most; 0: as fast as it goes.
    pub speed: u64,
}

/// A merge to be ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineMergeEnd {
    /// Whose disk.
    pub instance: InstanceId,
    /// The volume that is the disk.
    pub volume: VolumeRef,
    /// Which files.
    pub merge: Merge,
    /// A pivot leaves what is left of the chain; all else leaves the disk as it was.
    pub end: DiskCopyEnd,
}
