//! Thresholds of disks: QEMU tells, once, that a guest has written behind a byte of what a disk lies in. It keeps them itself
//! for as long as the machine runs, whoever follows its events, and forgets one when it has told. Nothing of them is written
//! down. Source: `block-set-write-threshold` and `BLOCK_WRITE_THRESHOLD` of QEMU's schema.
//!
//! A threshold belongs to the node of the file or block device, not to that of its format: what a qcow2 file needs is where it
//! ends, not where the guest thinks that it writes. One of a disk that goes on from its copy does not go with it.

use crate::{
    devices::Side,
    launch,
    machine::Inner,
    plug,
    qmp::{Event, Qmp},
};
use karst_model::{Error, InstanceId, Result, guest::ThresholdReached};
use serde_json::{Value, json};
use std::time::Duration;

const GREETING: Duration = Duration::from_secs(5);

/// Sets the threshold of a disk; 0 takes it away.
///
/// # Errors
/// Invalid without such a disk, unsupported for one that is only read.
pub(crate) async fn set(machine: &Inner, slot: &str, bytes: u64) -> Result<()> {
    // Not while the machine changes over to a copy of the disk.
    let _turn = machine.copying.lock().await;
    let only_read = {
        let record = machine.record();
        let mut disks = record.devices.iter().flat_map(|d| &d.disks);
        disks.find(|d| d.slot == slot).map(|d| d.readonly || d.cdrom)
    };
    match only_read {
        None => return Err(Error::invalid("slot", "the guest has no such disk")),
        Some(true) => return Err(Error::unsupported("a disk that is only read is never written")),
        Some(false) => {}
    }
    let (qmp, _) = Qmp::connect(&machine.dir, launch::QMP, GREETING).await?;
    let blocks = qmp.execute("query-block", json!({})).await?;
    let side = Side::of(&blocks, slot);
    let side = side.ok_or_else(|| Error::internal("the guest's disk is not known to QEMU", slot))?;
    let threshold =
        json!({"node-name": side.of_layer('f', slot, plug::layer(machine, slot)), "write-threshold": bytes});
    qmp.execute("block-set-write-threshold", threshold).await.map(drop)
}

/// What an event of this kind says; nothing of a node that is no disk's.
pub(crate) fn reached(instance: InstanceId, event: &Event) -> Option<ThresholdReached> {
    let number = |key: &str| event.data.get(key).and_then(Value::as_u64);
    let node = event.data.get("node-name")?.as_str()?;
    // As [`Side::of_layer`] makes it.
    let slot = node.strip_prefix("f-")?;
    let slot = slot.split('.').next().unwrap_or(slot);
    Some(ThresholdReached {
        instance,
        slot: slot.to_owned(),
        threshold: number("write-threshold")?,
        excess: number("amount-exceeded")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_name_the_disk_of_either_side() {
        let instance = InstanceId(Default::default());
        let said = |node: &str| {
            let data = json!({"node-name": node, "amount-exceeded": 5, "write-threshold": 4096});
            let Value::Object(data) = data else { unreachable!("an object") };
            reached(instance, &Event { name: "BLOCK_WRITE_THRESHOLD".into(), data, at: (0, 0) })
        };
        for side in Side::BOTH {
            let reached = said(&side.name('f', "scsi10")).unwrap();
            assert_eq!((reached.slot.as_str(), reached.threshold, reached.excess), ("scsi10", 4096, 5));
        }
        assert_eq!(said(&Side::Second.of_layer('f', "scsi1", 3)).unwrap().slot, "scsi1");
        assert_eq!(said("d-scsi0"), None);
        assert_eq!(said("seed-file"), None);
    }
}
