//! What happens in a virtual machine while it runs, beside its coming and going ([`Observed`](crate::guest::Observed)). News are
//! told and not kept: whoever is not there, or too slow, misses them, and nothing is decided by them. What a guest can cause is
//! told of a bounded number in a time.

use crate::{InstanceId, display::DisplayProtocol};
use serde::{Deserialize, Serialize};

/// Something that happened in a virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineNews {
    /// In which.
    pub instance: InstanceId,
    /// What.
    pub what: Happened,
}

/// What happened. Devices are named by their bus slots, such as `scsi0`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Happened {
    /// It began anew on the same virtual hardware: its system by itself, or by the reset button.
    Reset,
    /// Its system has shut down; its end follows.
    ShutDown,
    /// Its system set the clock of the hardware.
    Clock {
        /// How far off from what it was started with, seconds.
        offset: i64,
    },
    /// Its watchdog was not fed.
    Watchdog {
        /// What comes of it.
        action: WatchdogAction,
    },
    /// A disk failed it.
    DiskError {
        /// Which.
        slot: String,
        /// What comes of it.
        action: DiskErrorAction,
        /// There was no room.
        full: bool,
    },
    /// It goes on after an error that had halted it.
    Recovered,
    /// It has another part of its memory now.
    Balloon {
        /// Bytes.
        actual: u64,
    },
    /// The tray of a drive moved.
    Tray {
        /// Which.
        slot: String,
        /// It is open now.
        open: bool,
    },
    /// A device was plugged.
    DeviceAdded {
        /// Which.
        slot: String,
    },
    /// A device is gone.
    DeviceRemoved {
        /// Which.
        slot: String,
    },
    /// Its system does not give a device back.
    DeviceKept {
        /// Which.
        slot: String,
    },
    /// The first agent inside came, or the last one went.
    Agent {
        /// There is one now.
        connected: bool,
    },
    /// Memory of the host that it uses is broken.
    MemoryFailure {
        /// It concerns the guest, rather than QEMU.
        guest: bool,
        /// What comes of it.
        action: MemoryFailureAction,
        /// Something had to be done at once.
        required: bool,
        /// It happened while another was dealt with.
        recursive: bool,
    },
    /// Its system sleeps.
    Asleep {
        /// With its memory on disk: its end follows.
        disk: bool,
    },
    /// It does not sleep any more.
    Awake,
    /// Somebody looks at its display, or does not any more.
    Display {
        /// He does.
        opened: bool,
        /// How it is spoken of. By SPICE each channel of his is told.
        protocol: DisplayProtocol,
        /// He had to know the password.
        guarded: bool,
        /// Who, in words.
        viewer: String,
    },
}

/// What comes of a watchdog that was not fed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum WatchdogAction {
    None,
    Pause,
    Reset,
    Poweroff,
    Shutdown,
    Debug,
    InjectNmi,
}

/// What comes of an error of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskErrorAction {
    /// Nothing.
    Ignored,
    /// The guest stands still.
    Halted,
    /// The guest is told.
    Reported,
}

/// What comes of broken memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryFailureAction {
    /// Nothing.
    Ignored,
    /// The guest is told.
    Injected,
    /// QEMU cannot go on.
    Fatal,
    /// The guest is reset.
    Reset,
}

impl Happened {
    /// The action of the lifecycle event that tells of it.
    pub fn action(&self) -> &'static str {
        match self {
            Self::Reset => "instance-reset",
            Self::ShutDown => "instance-shutting-down",
            Self::Clock { .. } => "instance-clock-changed",
            Self::Watchdog { .. } => "instance-watchdog-fired",
            Self::DiskError { .. } => "instance-disk-error",
            Self::Recovered => "instance-recovered",
            Self::Balloon { .. } => "instance-balloon-changed",
            Self::Tray { .. } => "instance-tray-moved",
            Self::DeviceAdded { .. } => "instance-device-added",
            Self::DeviceRemoved { .. } => "instance-device-removed",
            Self::DeviceKept { .. } => "instance-device-kept",
            Self::Agent { connected: true } => "instance-agent-connected",
            Self::Agent { connected: false } => "instance-agent-disconnected",
            Self::MemoryFailure { .. } => "instance-memory-failed",
            Self::Asleep { .. } => "instance-asleep",
            Self::Awake => "instance-awake",
            Self::Display { opened: true, .. } => "instance-display-opened",
            Self::Display { opened: false, .. } => "instance-display-closed",
        }
    }

    /// The bus slot of the device that it is about.
    pub fn slot(&self) -> Option<&str> {
        match self {
            Self::DiskError { slot, .. }
            | Self::Tray { slot, .. }
            | Self::DeviceAdded { slot }
            | Self::DeviceRemoved { slot }
            | Self::DeviceKept { slot } => Some(slot),
            _ => None,
        }
    }
}
