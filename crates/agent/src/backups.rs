//! What the calls about backups carry. A backup is one tar file in Incus' format: `backup/index.yaml` first, then the
//! snapshots, oldest first, then the volume itself.
//!
//! ```text
//! backup/index.yaml
//! backup/container/{backup.yaml,rootfs/}     backup/snapshots/NAME/rootfs/
//! backup/virtual-machine/backup.yaml         backup/virtual-machine.img   backup/virtual-machine-snapshots/NAME.img
//! backup/virtual-machine/{qemu.nvram -> OVMF_VARS_4M.ms.fd,tpm.DEVICE/tpm2-00.permall}, and so of each snapshot
//! backup/volume/ or backup/volume.img        backup/volume-snapshots/NAME/ or NAME.img
//! ```

use crate::VolumeRef;
use karst_model::{
    BackupId, ByteSize, InstanceId, Name, SnapshotId, backup::Compression, instance::Firmware,
    template::Templates,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a backup holds; says where in the file its parts lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackupKind {
    /// A container: a tree.
    Container,
    /// A virtual machine: a disk.
    VirtualMachine,
    /// A custom volume with a file system.
    Filesystem,
    /// A custom volume that is a disk.
    Block,
    /// No backup: the staged file is the content of a disk or disc itself. Cannot be made, only taken in.
    Raw,
}

impl BackupKind {
    /// Does it hold disks?
    pub fn is_disk(self) -> bool {
        matches!(self, Self::VirtualMachine | Self::Block | Self::Raw)
    }

    /// Where the content lies in the file, or that of a snapshot.
    pub fn place(self, snapshot: Option<&str>) -> String {
        match (self, snapshot) {
            (Self::Container, None) => "backup/container/rootfs".into(),
            (Self::Container, Some(name)) => format!("backup/snapshots/{name}/rootfs"),
            (Self::VirtualMachine, None) => "backup/virtual-machine.img".into(),
            (Self::VirtualMachine, Some(name)) => format!("backup/virtual-machine-snapshots/{name}.img"),
            (Self::Raw, _) => String::new(),
            (Self::Filesystem, None) => "backup/volume".into(),
            (Self::Filesystem, Some(name)) => format!("backup/volume-snapshots/{name}"),
            (Self::Block, None) => "backup/volume.img".into(),
            (Self::Block, Some(name)) => format!("backup/volume-snapshots/{name}.img"),
        }
    }

    /// The directory of an instance's own files.
    pub fn directory(self, snapshot: Option<&str>) -> Option<String> {
        match (self, snapshot) {
            (Self::Container, None) => Some("backup/container".into()),
            (Self::Container, Some(name)) => Some(format!("backup/snapshots/{name}")),
            (Self::VirtualMachine, None) => Some("backup/virtual-machine".into()),
            (Self::VirtualMachine, Some(name)) => Some(format!("backup/virtual-machine-snapshots/{name}")),
            (Self::Filesystem | Self::Block | Self::Raw, _) => None,
        }
    }
}

/// A backup to be made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackupCreate {
    /// Its id.
    pub id: BackupId,
    /// What it holds.
    pub kind: BackupKind,
    /// The volume.
    pub volume: VolumeRef,
    /// As it was then; `None`: now, by the rules of a snapshot.
    pub at: Option<SnapshotId>,
    /// Snapshots that it holds too, oldest first.
    pub snapshots: Vec<(Name, SnapshotId)>,
    /// Content of `index.yaml`; its `config` is the instance's `backup.yaml` too.
    pub index: serde_json::Value,
    /// Content of the instance's `metadata.yaml`.
    #[serde(default)]
    pub metadata: Option<serde_json::Value>,
    /// Its templates, by name.
    #[serde(default)]
    pub templates: BTreeMap<String, String>,
    /// How the file is compressed.
    pub compression: Compression,
    /// What the virtual machine is beside its disk, which it holds too.
    #[serde(default)]
    pub machine: Option<MachineBackup>,
}

/// What a virtual machine is beside its disk, for a backup: as it was at [`BackupCreate::at`], or is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineBackup {
    /// Whose.
    pub instance: InstanceId,
    /// Which firmware's variables are in use.
    pub firmware: Firmware,
    /// Name of the device that is its TPM.
    pub tpm: Option<String>,
    /// For each of [`BackupCreate::snapshots`] the snapshot of the instance, and the name of its TPM then.
    pub snapshots: Vec<(SnapshotId, Option<String>)>,
}

/// What is known of a backup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackupFacts {
    /// Bytes of the file.
    pub size: u64,
    /// Content of `index.yaml`, without what is expanded there; null when it was not asked for.
    #[serde(default)]
    pub index: serde_json::Value,
}

/// A volume to be filled from a staged backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeFill {
    /// Which.
    pub volume: VolumeRef,
    /// From what.
    pub backup: BackupId,
    /// What the backup holds.
    pub kind: BackupKind,
    /// The content of this snapshot; `None`: that of the volume itself.
    pub snapshot: Option<Name>,
    /// The virtual machine that becomes what the backup says beside the disk.
    #[serde(default)]
    pub machine: Option<MachineFill>,
}

/// A virtual machine whose variables and TPM come from a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineFill {
    /// Which.
    pub instance: InstanceId,
    /// Its state at this snapshot; `None`: for its first start.
    pub at: Option<SnapshotId>,
    /// Which firmware's variables are those in use.
    pub firmware: Firmware,
    /// Name of the device that is its TPM.
    pub tpm: Option<String>,
}

/// A part of a disk to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeWrite {
    /// Which.
    pub volume: VolumeRef,
    /// What is written: a staged file, all of it.
    pub staged: BackupId,
    /// Byte of the disk that its first goes to.
    pub offset: u64,
    /// It is an image in the format qcow2, self-contained, of a disk that is not larger: the volume becomes that disk, with zeros
    /// behind its end. `offset` is 0 then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub image: bool,
}

/// What became of a volume that was filled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeFilled {
    /// Its size now: a disk grows to what came.
    pub size: Option<ByteSize>,
    /// Templates that the backup of an instance has.
    #[serde(default)]
    pub templates: Templates,
}
