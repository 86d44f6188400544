//! Which calls share the places that there are for calls.

use crate::calls::{Call, GuestStop};
use karst_model::guest::StopMode;

/// How long a call may be at it, and so with which others it shares the places there are for calls. Each kind has places of
/// its own, so that what takes minutes holds up none of what must get through meanwhile: a forced stop gets past all who
/// wait for their guests to shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// Seconds.
    Short,
    /// The start of a guest: many are asked for at a time, and all of them want the host's processors.
    Start,
    /// As long as there are bytes to be moved, or until another has moved those of the same volume.
    Storage,
    /// As long as a guest takes to shut down. The host only waits.
    Stop,
    /// As long as somebody types. The host only waits.
    Session,
}

impl Lane {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 5] = [Self::Short, Self::Start, Self::Storage, Self::Stop, Self::Session];

    /// Does the host do nothing but wait? Then there may be as many as there are guests and users.
    pub fn waits(self) -> bool {
        matches!(self, Self::Stop | Self::Session)
    }
}

impl Call {
    /// With which others it shares the places for calls.
    pub fn lane(&self) -> Lane {
        match self {
            Self::SessionWait(_) => Lane::Session,
            Self::GuestStop(GuestStop { mode: StopMode::Force, .. }) => Lane::Short,
            Self::GuestStop(_) => Lane::Stop,
            Self::GuestStart(_) => Lane::Start,
            Self::PoolOpen(_)
            | Self::PoolClose(_)
            | Self::PoolFlush(_)
            | Self::VolumeCreate(_)
            | Self::VolumeDelete(_)
            | Self::VolumeResize(_)
            | Self::VolumeSnapshotCreate(_)
            | Self::VolumeSnapshotDelete(_)
            | Self::VolumeSnapshotRestore(_)
            | Self::VolumeRefresh(_)
            | Self::VolumeRebuild(_)
            | Self::VolumeExport(_)
            | Self::VolumeImport(_)
            | Self::VolumeOpen(_)
            | Self::VolumeFill(_)
            | Self::VolumeWrite(_)
            | Self::BackupCreate(_)
            | Self::BackupInspect(_)
            | Self::ImageImport(_)
            | Self::ImageBuild(_)
            | Self::ImagePublish(_)
            | Self::MachineStateSave(_)
            | Self::MachineStateRestore(_)
            | Self::MachineStateCopy(_)
            | Self::MachineMemoryDump(_)
            | Self::MachineMemoryEnd(_) => Lane::Storage,
            _ => Lane::Short,
        }
    }
}
