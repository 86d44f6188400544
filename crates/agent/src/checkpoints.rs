//! What the calls carry that follow what changes of disks of virtual machines, and back them up while they run.

use crate::{GuestRef, VolumeRef};
use karst_model::{CheckpointId, DiskBackupId, Error, InstanceId, Result};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// A disk of a new checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarkedVolume {
    /// The volume that is the disk.
    pub volume: VolumeRef,
    /// Its checkpoint that followed it until now.
    pub before: Option<CheckpointId>,
}

/// A new checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewMark {
    /// What it is called.
    pub id: CheckpointId,
    /// Its disks.
    pub disks: Vec<MarkedVolume>,
}

/// A checkpoint to be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineCheckpointCreate {
    /// Of which machine.
    pub guest: GuestRef,
    /// The checkpoint.
    pub mark: NewMark,
    /// The machine's checkpoints that there are: what its disks have of others is dropped.
    pub known: Vec<CheckpointId>,
}

/// A disk of a checkpoint that goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnmarkedVolume {
    /// The volume that is the disk.
    pub volume: VolumeRef,
    /// The checkpoint before it, which has what this one has from then on.
    pub parent: Option<CheckpointId>,
    /// It is the newest of the disk.
    pub last: bool,
}

/// A checkpoint to be taken away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineCheckpointDelete {
    /// Of which machine.
    pub instance: InstanceId,
    /// Which.
    pub id: CheckpointId,
    /// Its disks.
    pub disks: Vec<UnmarkedVolume>,
}

/// What disks have of checkpoints is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineCheckpoints {
    /// Of which machine.
    pub guest: GuestRef,
    /// The volumes that are its disks.
    pub volumes: Vec<VolumeRef>,
}

/// A disk to be backed up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackedUpVolume {
    /// The volume that is the disk.
    pub from: VolumeRef,
    /// What changed since the first of these, which follow each other; without any, all of it.
    pub since: Vec<CheckpointId>,
    /// The volume that it is written to, of exactly its size; of a backup that others read, the one that keeps what the guest
    /// overwrites meanwhile, empty and larger than the disk by what an image of it has of its own.
    pub to: VolumeRef,
    /// What it is called where it is read.
    pub export: String,
    /// What the bitmap of its changes is called there.
    pub bitmap: String,
}

/// Where a backup is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "transport", rename_all = "snake_case")]
pub enum BackupListen {
    /// At a socket of the host's own choice, which root alone can use.
    Unix,
    /// At an address of the host's loopback.
    Tcp {
        /// Which, with the port.
        address: SocketAddr,
    },
}

impl BackupListen {
    /// May a backup be read there? Of a machine that is on this host: at its loopback alone, and not at a port that belongs to root,
    /// as whom QEMU's listener is made.
    ///
    /// # Errors
    /// Forbidden, invalid for no port.
    pub fn check(self) -> Result<()> {
        let Self::Tcp { address } = self else { return Ok(()) };
        match address.port() {
            _ if !address.ip().is_loopback() => Err(Error::forbidden(format!(
                "whoever can reach {} would read the disks: a backup is read on its host, at an address of the loopback or at its \
                 socket",
                address.ip()
            ))
            .at("server.name")),
            0 => Err(Error::invalid("server.port", "the port at which a backup is read is 1024 to 65535")),
            1..=1023 => Err(Error::forbidden(
                "ports below 1024 belong to the services of the host; a backup is read at port 1024 to 65535",
            )
            .at("server.port")),
            _ => Ok(()),
        }
    }
}

/// A backup to be begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineBackupBegin {
    /// Of which machine.
    pub guest: GuestRef,
    /// What it is called.
    pub id: DiskBackupId,
    /// Its disks.
    pub disks: Vec<BackedUpVolume>,
    /// A checkpoint of the same moment.
    pub mark: Option<NewMark>,
    /// The machine's checkpoints that there are: what its disks have of others is dropped.
    pub known: Vec<CheckpointId>,
    /// Others read it there; else it is written.
    pub listen: Option<BackupListen>,
}

/// A backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineBackupRef {
    /// Of which machine.
    pub instance: InstanceId,
    /// Which.
    pub id: DiskBackupId,
}

/// Longest name of an export or of a bitmap.
const NAME: usize = 200;

/// Can something of a backup be called so where it is read? Letters, digits and `._-`.
pub fn is_export_name(name: &str) -> bool {
    (1..=NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && !name.starts_with("karst-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::ErrorKind;

    #[test]
    fn others_read_on_the_host_only_and_at_no_port_of_roots() {
        let tcp = |text: &str| BackupListen::Tcp { address: text.parse().unwrap() }.check();
        BackupListen::Unix.check().unwrap();
        for good in ["127.0.0.1:10809", "[::1]:1024", "127.9.9.9:65535"] {
            tcp(good).unwrap();
        }
        for bad in ["0.0.0.0:10809", "192.0.2.1:10809", "[::]:10809", "[::ffff:127.0.0.1]:10809"] {
            let e = tcp(bad).unwrap_err();
            assert!(e.is(ErrorKind::Forbidden) && e.field.as_deref() == Some("server.name"), "{bad}: {e:?}");
        }
        for (bad, kind) in [("127.0.0.1:0", ErrorKind::Invalid), ("[::1]:1023", ErrorKind::Forbidden)] {
            let e = tcp(bad).unwrap_err();
            assert!(e.is(kind) && e.field.as_deref() == Some("server.port"), "{bad}: {e:?}");
        }
    }

    #[test]
    fn names_of_exports() {
        for good in ["vda", "backup-vda", "a.b_c", "0"] {
            assert!(is_export_name(good), "{good}");
        }
        let long = "x".repeat(NAME + 1);
        for bad in ["", "a b", "a/b", "karst-x", "\u{e9}", &long] {
            assert!(!is_export_name(bad), "{bad}");
        }
    }
}
