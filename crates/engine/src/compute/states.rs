//! What a virtual machine is beside its disks (variables of the firmware, TPM), on its way to copies and backups.

use super::expand;
use crate::Records;
use karst_agent::{CallContext, HostAgent, MachineBackup, MachineStateCopy, MachineStateRef};
use karst_model::{
    InstanceId, Result, SnapshotId,
    instance::{Hardware, Instance, InstanceKind},
    snapshot::Snapshot,
};
use serde::{Deserialize, Serialize};

/// Name of the device that is the TPM of a machine.
pub(crate) fn tpm(records: &Records, instance: &Instance) -> Option<String> {
    // What cannot be parsed any more starts no more, and has none.
    expand::parse_devices(&records.expanded(instance).1).ok()?.tpm
}

/// The same at a snapshot.
pub(crate) fn tpm_at(records: &Records, instance: &Instance, at: &Snapshot) -> Option<String> {
    let then = Instance { devices: at.devices.clone(), profiles: at.profiles.clone(), ..instance.clone() };
    tpm(records, &then)
}

/// What a backup of a machine with these snapshots holds beside its disks.
pub(crate) fn backup(
    records: &Records,
    instance: &Instance,
    snapshots: &[&Snapshot],
) -> Option<MachineBackup> {
    let Hardware { firmware, .. } = instance.hardware.as_ref()?;
    Some(MachineBackup {
        instance: instance.id,
        firmware: *firmware,
        tpm: tpm(records, instance),
        snapshots: snapshots.iter().map(|s| (s.id, tpm_at(records, instance, s))).collect(),
    })
}

/// A machine that becomes what another is beside its disks. Copies have the TPM of their original, as with Incus: what is
/// sealed by it on the disk would be lost to them without.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Twin {
    from: InstanceId,
    to: InstanceId,
    /// A snapshot of what the original is while it runs, gone in the end.
    frozen: Option<SnapshotId>,
    /// What it becomes: the original at this snapshot, or now.
    last: Option<SnapshotId>,
    /// Snapshots of the original and what those of the other are called.
    history: Vec<(SnapshotId, SnapshotId)>,
}

impl Twin {
    /// `None` for what is no machine.
    pub(crate) fn of(
        (from, to): (&Instance, InstanceId),
        frozen: Option<SnapshotId>,
        at: Option<SnapshotId>,
        history: Vec<(SnapshotId, SnapshotId)>,
    ) -> Option<Self> {
        let machine = from.kind == InstanceKind::VirtualMachine;
        machine.then(|| Self { from: from.id, to, frozen, last: frozen.or(at), history })
    }

    /// Where the original's state is kept for so long.
    pub(crate) fn frozen(&self) -> Option<MachineStateRef> {
        self.frozen.map(|snapshot| MachineStateRef { instance: self.from, snapshot })
    }

    /// The other's states that it makes.
    pub(crate) fn made(&self) -> impl Iterator<Item = MachineStateRef> {
        self.history.iter().map(|(_, new)| MachineStateRef { instance: self.to, snapshot: *new })
    }

    /// Makes it so; may be called again.
    pub(crate) async fn run(&self, agent: &dyn HostAgent, context: &CallContext) -> Result<()> {
        let history = self.history.iter().map(|(old, new)| (Some(*old), Some(*new)));
        for (at, to_at) in history.chain([(self.last, None)]) {
            let copy = MachineStateCopy { from: self.from, at, to: self.to, to_at };
            agent.machine_state_copy(context, copy).await?;
        }
        Ok(())
    }
}
