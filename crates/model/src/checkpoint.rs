//! Checkpoints: moments of a virtual machine's disks since which the host follows what changes. Whoever has a backup of one
//! needs of the next only that.
//!
//! The checkpoints of an instance are a line: each descends from the one before it. On the host each is a bitmap in the file
//! of each of its disks; only the newest of a disk follows what is written, and what changed since an older one is what is in its
//! bitmap and in those of all later ones.

use crate::{CheckpointId, Config, InstanceId, Name, ProfileId, VolumeId, device::Devices};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// A disk of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointDisk {
    /// Its device then.
    pub device: String,
    /// The volume that it is.
    pub volume: VolumeId,
}

/// A checkpoint, with the configuration of that moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Reference; the host's name of its bitmaps follows from it.
    pub id: CheckpointId,
    /// Instance it belongs to.
    pub instance: InstanceId,
    /// Unique among the instance's checkpoints.
    pub name: Name,
    /// The checkpoint it descends from.
    #[serde(default)]
    pub parent: Option<CheckpointId>,
    /// User's text.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
    /// Profiles then, in the order of application.
    #[serde(default)]
    pub profiles: Vec<ProfileId>,
    /// Configuration then.
    #[serde(default)]
    pub config: Config,
    /// Devices then.
    #[serde(default)]
    pub devices: Devices,
    /// The disks that are followed.
    pub disks: Vec<CheckpointDisk>,
    /// When it was made.
    pub created_at: Timestamp,
    /// Grows with each change.
    #[serde(default)]
    pub spec_version: u64,
}

impl Checkpoint {
    /// Has it the disk that is this volume?
    pub fn has(&self, volume: VolumeId) -> bool {
        self.disks.iter().any(|d| d.volume == volume)
    }
}

/// Checkpoints of one instance in the order in which they descend from each other, the oldest first. Of what hangs together with
/// no root, which nothing makes, the rest follows in its own order.
pub fn in_line<'a>(all: impl IntoIterator<Item = &'a Checkpoint>) -> Vec<&'a Checkpoint> {
    let mut left: Vec<&Checkpoint> = all.into_iter().collect();
    left.sort_by_key(|c| (c.created_at, c.id));
    let mut line: Vec<&Checkpoint> = vec![];
    let mut last = None;
    while let Some(at) = left.iter().position(|c| c.parent == last) {
        let next = left.remove(at);
        last = Some(next.id);
        line.push(next);
    }
    line.extend(left);
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(id: u128, parent: Option<u128>, second: i64) -> Checkpoint {
        let reference = |n| CheckpointId(uuid::Uuid::from_u128(n));
        Checkpoint {
            id: reference(id),
            instance: InstanceId(uuid::Uuid::nil()),
            name: Name::parse("name", &format!("c{id}")).unwrap(),
            parent: parent.map(reference),
            note: String::new(),
            profiles: vec![],
            config: Config::new(),
            devices: Devices::new(),
            disks: vec![],
            created_at: Timestamp::from_second(second).unwrap(),
            spec_version: 1,
        }
    }

    #[test]
    fn they_are_a_line_whatever_the_clock_says() {
        let all = [checkpoint(3, Some(2), 1), checkpoint(1, None, 5), checkpoint(2, Some(1), 2)];
        let names: Vec<_> = in_line(&all).iter().map(|c| c.name.to_string()).collect();
        assert_eq!(names, ["c1", "c2", "c3"]);
        // Nothing is lost of what hangs on nothing.
        assert_eq!(in_line(&all[..1]).len(), 1);
        assert!(in_line(&[]).is_empty());
    }
}
