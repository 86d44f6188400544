//! Thresholds of disks of virtual machines: somebody is told, once, that a guest has written behind one.

use crate::GuestRef;
use karst_model::{Error, Result};
use serde::{Deserialize, Serialize};

/// A threshold to be set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskThresholdSet {
    /// Of which machine.
    pub guest: GuestRef,
    /// Bus slot of the disk, such as `scsi0`.
    pub slot: String,
    /// The byte of what the disk lies in: its file, or its block device; 0: there is none any more.
    pub bytes: u64,
}

impl DiskThresholdSet {
    /// The most that it can be.
    pub const MOST: u64 = i64::MAX as u64;

    /// Can it be meant?
    ///
    /// # Errors
    /// Invalid.
    pub fn check(&self) -> Result<()> {
        match self.bytes <= Self::MOST {
            true => Ok(()),
            false => Err(Error::invalid("threshold", "no disk has as many bytes as that")),
        }
    }
}
