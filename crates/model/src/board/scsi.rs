//! The controllers of SCSI that a machine has.

use super::{joined, number, wrong};
use crate::{Result, options::Virtio};
use serde::{Deserialize, Serialize};

pub(super) const SCSI: &str = "hardware.scsi";
/// Controllers of a machine at most.
pub const MOST_SCSI: usize = 12;

words!(
    /// What a controller of SCSI is.
    ScsiModel, SCSI_MODELS {
        /// virtio.
        Virtio = "virtio-scsi",
        /// LSI's 53C895A.
        LsiLogic = "lsilogic",
        /// LSI's SAS 1068.
        LsiSas1068 = "lsisas1068",
        /// LSI's SAS 1078.
        LsiSas1078 = "lsisas1078",
        /// VMware's.
        Vmpvscsi = "vmpvscsi",
    }
);

impl ScsiModel {
    /// The number up to which disks can be at it.
    pub fn most_targets(self) -> u32 {
        match self {
            Self::Virtio => 64,
            Self::LsiLogic => 7,
            Self::LsiSas1068 => 8,
            Self::LsiSas1078 | Self::Vmpvscsi => 64,
        }
    }
}

/// A controller of SCSI. All but the model is of those of virtio.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScsiController {
    /// What it is.
    pub model: ScsiModel,
    /// Queues of commands; one for each processor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u32>,
    /// Commands of a disk at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_disk: Option<u32>,
    /// Sectors of a command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sectors: Option<u32>,
    /// QEMU's main loop is told by leaving the guest.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_ioeventfd: bool,
    /// Of those beside the first, of which `hardware.virtio` says it.
    #[serde(default)]
    pub virtio: Virtio,
}

impl ScsiController {
    /// Without anything that is not as usual.
    pub fn of(model: ScsiModel) -> Self {
        let virtio = Virtio::default();
        Self { model, queues: None, per_disk: None, sectors: None, no_ioeventfd: false, virtio }
    }

    /// Does it say nothing of virtio?
    fn is_plain(&self) -> bool {
        *self == Self::of(self.model)
    }

    fn parse(text: &str) -> Result<Self> {
        let mut words = text.split('+');
        let model = super::word(SCSI, words.next().unwrap_or_default(), SCSI_MODELS)?;
        let mut found = Self::of(model);
        for word in words {
            if found.virtio.take(word) {
                continue;
            }
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let (of, most) = match name {
                "queues" => (&mut found.queues, 1024),
                "per-disk" => (&mut found.per_disk, 65_535),
                "sectors" => (&mut found.sectors, 65_535),
                "ioeventfd" if value == "off" => {
                    found.no_ioeventfd = true;
                    continue;
                }
                _ => {
                    let why = "write with + queues=, per-disk=, sectors=, ioeventfd=off, iommu, ats, packed, page-per-queue";
                    return Err(wrong(SCSI, format!("{word:?}: {why}")));
                }
            };
            let n = number(SCSI, value)?;
            if !(1..=most).contains(&n) {
                return Err(wrong(SCSI, format!("{word:?}: a number from 1 to {most} is possible")));
            }
            *of = Some(n);
        }
        match found.model == ScsiModel::Virtio || found.is_plain() {
            true => Ok(found),
            false => Err(wrong(SCSI, format!("{text:?}: options are those of controllers of virtio"))),
        }
    }

    fn text(&self) -> String {
        let mut words = vec![self.model.as_str().to_owned()];
        words.extend(self.queues.map(|n| format!("queues={n}")));
        words.extend(self.per_disk.map(|n| format!("per-disk={n}")));
        words.extend(self.sectors.map(|n| format!("sectors={n}")));
        words.extend(self.no_ioeventfd.then(|| "ioeventfd=off".to_owned()));
        words.extend(self.virtio.words().into_iter().map(str::to_owned));
        words.join("+")
    }
}

/// Of one that is as usual, which each machine has anyway, nothing is said.
pub fn without_usual(all: Vec<ScsiController>) -> Vec<ScsiController> {
    if all == [ScsiController::of(ScsiModel::Virtio)] { vec![] } else { all }
}

/// `virtio-scsi,virtio-scsi+queues=8,lsilogic`.
pub(super) fn controllers(text: &str) -> Result<Vec<ScsiController>> {
    let all = text.split(',').map(|one| ScsiController::parse(one.trim())).collect::<Result<Vec<_>>>()?;
    if all.len() > MOST_SCSI {
        return Err(wrong(SCSI, format!("a machine has {MOST_SCSI} at most")));
    }
    match all.first() {
        Some(first) if first.model == ScsiModel::Virtio && first.virtio.is_usual() => Ok(without_usual(all)),
        _ => Err(wrong(
            SCSI,
            "the first is virtio-scsi; iommu, ats, packed and page-per-queue of it are said by hardware.virtio",
        )),
    }
}

pub(super) fn text(all: &[ScsiController]) -> Option<String> {
    joined(all, ScsiController::text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_are_written_as_they_are_read() {
        let all =
            "virtio-scsi+queues=4,virtio-scsi+per-disk=50+sectors=512+ioeventfd=off+ats,lsilogic,lsisas1078";
        let found = controllers(all).unwrap();
        assert_eq!(text(&found).as_deref(), Some(all));
        assert_eq!(
            serde_json::from_str::<Vec<ScsiController>>(&serde_json::to_string(&found).unwrap()).unwrap(),
            found
        );
        assert_eq!(controllers("virtio-scsi").unwrap(), []);
        for bad in [
            "lsilogic",
            "virtio-scsi,",
            "virtio-scsi+queues=0",
            "virtio-scsi+queues=2000",
            "virtio-scsi+fast",
            "virtio-scsi+ats,lsilogic",
            "virtio-scsi,lsilogic+queues=2",
            &["virtio-scsi"; 17].join(","),
        ] {
            assert_eq!(controllers(bad).unwrap_err().field.as_deref(), Some("config.hardware.scsi"), "{bad}");
        }
    }
}
