//! What the calls about descriptions carry. A description says in one text what the records know of a volume, and lies on
//! the volume's pool, so that the records can be made again from the pool alone. The host keeps and hands back texts; what
//! they mean is control's affair, which trusts none that it reads.

use karst_model::{
    ByteSize, Error, PoolId, Result, VolumeId,
    spec::PoolSpec,
    storage::{PoolKind, VolumeContent},
};
use serde::{Deserialize, Serialize};

use crate::VolumeSnapshot;

/// Most bytes of one description, and of all of a call or an answer that has several: twice as much, which is what quoting
/// makes of the worst of them, fits a frame of the protocol.
pub const MAX_DESCRIPTION: usize = 1 << 20;
/// Most volumes of a call or an answer.
pub const MAX_DESCRIBED: usize = 500;

/// Descriptions to be written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolDescribe {
    /// Where.
    pub pool: PoolId,
    /// That of the pool itself, if it is to be written.
    #[serde(default)]
    pub own: Option<String>,
    /// Those of volumes; one that the pool does not have is left out.
    pub volumes: Vec<(VolumeId, String)>,
}

impl PoolDescribe {
    /// Refuses what does not fit, or is no text that could be read back.
    ///
    /// # Errors
    /// Too large, invalid.
    pub fn check(&self) -> Result<()> {
        let texts = || self.own.iter().chain(self.volumes.iter().map(|(_, text)| text));
        let bytes: usize = texts().map(String::len).sum();
        if bytes > MAX_DESCRIPTION || self.volumes.len() > MAX_DESCRIBED {
            return Err(Error::too_large(format!(
                "{} descriptions of {bytes} bytes are more than a call may have",
                self.volumes.len()
            )));
        }
        match texts().all(|text| is_plain(text)) {
            true => Ok(()),
            false => Err(Error::invalid("description", "a description has no control characters")),
        }
    }
}

/// A text as it is written: one that came from elsewhere and is not counts as none.
pub fn is_plain(text: &str) -> bool {
    !text.chars().any(|c| c.is_control() && c != '\n')
}

/// A pool to be looked through. The host need not know it: it is looked at where the specification says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolSurvey {
    /// Which.
    pub spec: PoolSpec,
    /// Volumes behind this one, in the order of their ids.
    #[serde(default)]
    pub after: Option<VolumeId>,
}

/// A part of what a pool has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct PoolSurveyed {
    /// Volumes, in the order of their ids.
    pub volumes: Vec<FoundVolume>,
    /// There are more behind the last of them.
    pub more: bool,
}

/// A volume of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundVolume {
    /// Which.
    pub volume: VolumeId,
    /// What it holds.
    pub content: VolumeContent,
    /// Size of a disk, limit of a tree.
    pub size: Option<ByteSize>,
    /// Its snapshots.
    pub snapshots: Vec<VolumeSnapshot>,
    /// What is said of it: whatever stands in the file, at most [`MAX_DESCRIPTION`] bytes.
    pub description: Option<String>,
}

/// Where pools are looked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolsFind {
    /// Kind of the pools.
    pub kind: Option<PoolKind>,
    /// Path of the host, which its policy must grant; `None`: pools that the host knows already.
    pub source: Option<String>,
}

/// A pool of which something is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundPool {
    /// What it is, with the id that it was made with.
    pub spec: PoolSpec,
    /// What is said of it, as of a volume; `None` also where that cannot be read without mounting it.
    pub description: Option<String>,
}
