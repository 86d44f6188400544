//! Typed UUIDs: the only references between records.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};
use uuid::Uuid;

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// The UUID itself.
            pub fn uuid(self) -> Uuid { self.0 }
        }
        impl From<Uuid> for $name { fn from(u: Uuid) -> Self { Self(u) } }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { self.0.fmt(f) }
        }
        impl FromStr for $name {
            type Err = crate::Error;
            fn from_str(s: &str) -> Result<Self, Self::Err> {
                Uuid::parse_str(s).map(Self).map_err(|_| crate::Error::invalid("id", format!("{s:?} is not a UUID")))
            }
        }
    )+};
}

ids! {
    /// An instance: virtual machine or container.
    InstanceId,
    /// A device of an instance; survives renames of the device and its bus slot.
    DeviceId,
    /// A storage pool.
    PoolId,
    /// A storage volume.
    VolumeId,
    /// A node of a snapshot tree.
    SnapshotId,
    /// A checkpoint of a virtual machine's disks.
    CheckpointId,
    /// A backup of a virtual machine's disks while it is made.
    DiskBackupId,
    /// Memory of a running machine on its way into a file.
    MemoryJobId,
    /// A network.
    NetworkId,
    /// A network ACL.
    AclId,
    /// A set of addresses that ACLs name.
    AddressSetId,
    /// An image (one content; its fingerprint is a property).
    ImageId,
    /// A backup: a file that holds an instance or a custom volume.
    BackupId,
    /// A profile.
    ProfileId,
    /// A project.
    ProjectId,
    /// A host that runs guests.
    NodeId,
    /// An operation that a user can see.
    OperationId,
    /// A running or finished saga.
    SagaId,
    /// A principal: certificate, token, unix peer.
    PrincipalId,
    /// An interactive session on a guest (exec, console), known to the host that opened it.
    SessionId,
}

/// VMID: the integer that Proxmox' clients know an instance by; from 100, unique in the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Vmid(pub u32);

impl Vmid {
    /// Smallest and largest VMID, as Proxmox has them.
    pub const RANGE: std::ops::RangeInclusive<u32> = 100..=999_999_999;

    /// A number that a client chose.
    ///
    /// # Errors
    /// Invalid at `field`, when it is none of [`Self::RANGE`].
    pub fn chosen(field: &str, number: impl Into<i64>) -> crate::Result<Self> {
        let number = number.into();
        if let Some(number) = u32::try_from(number).ok().filter(|n| Self::RANGE.contains(n)) {
            return Ok(Self(number));
        }
        let (first, last) = (Self::RANGE.start(), Self::RANGE.end());
        let text = format!("{number} is not a VMID; they go from {first} to {last}");
        Err(crate::Error::invalid(field, text))
    }
}

impl fmt::Display for Vmid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
