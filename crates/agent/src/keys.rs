//! Passphrases of encrypted disks on their way to a host, which keeps them in memory only, and only until the call that they are for
//! has ended: nothing that is written down has them.

use karst_model::{InstanceId, VolumeId, encryption::Passphrases};
use serde::{Deserialize, Serialize};

/// What passphrases are handed over for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyOwner {
    /// The next start or change of a guest.
    Guest(InstanceId),
    /// The making of a volume.
    Volume(VolumeId),
}

/// Passphrases, in the place of those that were handed over for the same before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeysHand {
    /// What they are for.
    pub of: KeyOwner,
    /// By the secrets that they are the values of.
    pub keys: Passphrases,
}
