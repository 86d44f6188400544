//! What the calls carry that copy disks of virtual machines while they run.

use crate::{GuestRef, VolumeRef};
use karst_model::{InstanceId, VolumeId, guest::DiskCopyEnd};
use serde::{Deserialize, Serialize};

/// A disk to be copied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineCopyBegin {
    /// Of which machine.
    pub guest: GuestRef,
    /// The volume that is the disk.
    pub from: VolumeRef,
    /// The volume that is to be what the disk is.
    pub to: VolumeRef,
    /// Bytes a second at most; 0: as fast as it goes.
    pub speed: u64,
    /// What the guest writes is in both before it is told so: the copy then keeps up with any guest.
    pub synchronous: bool,
}

/// A copy, by what it is made into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineCopyRef {
    /// Whose disk.
    pub instance: InstanceId,
    /// The volume that it is copied to.
    pub to: VolumeId,
}

/// How fast a copy may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineCopySpeed {
    /// Which.
    pub copy: MachineCopyRef,
    /// Bytes a second at most; 0: as fast as it goes.
    pub speed: u64,
}

/// A copy to be ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineCopyEnd {
    /// Whose disk.
    pub instance: InstanceId,
    /// The volume that the disk was.
    pub from: VolumeRef,
    /// The volume that it is copied to.
    pub to: VolumeRef,
    /// How.
    pub end: DiskCopyEnd,
}

impl MachineCopyEnd {
    /// The copy.
    pub fn copy(&self) -> MachineCopyRef {
        MachineCopyRef { instance: self.instance, to: self.to.volume }
    }
}

/// The most that a speed can be.
pub const FASTEST: u64 = i64::MAX as u64;
