//! Instances: the desired record, the observed runtime, and the status that follows from both.

use crate::{
    Config, DeviceId, Error, ImageId, InstanceId, Name, NodeId, PoolId, ProfileId, ProjectId, Result,
    SnapshotId, Vmid, VolumeId, device::Devices, screens::ScreenKind, template::InstanceMetadata,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt};

/// What kind of guest an instance is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InstanceKind {
    /// An LXC system container.
    Container,
    /// A QEMU virtual machine.
    VirtualMachine,
}

impl InstanceKind {
    /// Incus' name: `container` or `virtual-machine`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Container => "container",
            Self::VirtualMachine => "virtual-machine",
        }
    }

    /// Parses Incus' name; `field` is named in the error.
    pub fn parse(field: &str, s: &str) -> Result<Self> {
        match s {
            "container" => Ok(Self::Container),
            "virtual-machine" => Ok(Self::VirtualMachine),
            _ => Err(Error::invalid(
                field,
                format!("{s:?} is not a type; use \"container\" or \"virtual-machine\""),
            )),
        }
    }
}

impl fmt::Display for InstanceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Who may run a guest is (owner, generation). A generation is ordered first by the cluster's incarnation (grows when the
/// store is restored from a backup), then by a counter that grows with each start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
pub struct Generation {
    /// Incarnation of the cluster.
    pub incarnation: u64,
    /// Counter within the incarnation.
    pub n: u64,
}

impl Generation {
    /// The next one of its incarnation.
    pub fn next(self) -> Self {
        Self { n: self.n + 1, ..self }
    }

    /// The next one now that the cluster is in this incarnation.
    pub fn next_in(self, incarnation: u64) -> Self {
        match incarnation > self.incarnation {
            true => Self { incarnation, n: 1 },
            false => self.next(),
        }
    }
}

/// What the user wants the guest's power to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DesiredPower {
    /// Not running.
    Stopped,
    /// Running.
    Running,
    /// Frozen in memory.
    Paused,
}

/// Identity of a virtual machine's virtual hardware, fixed at creation so that upgrades and migration keep it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hardware {
    /// Versioned machine type, such as `pc-q35-7.2`.
    pub machine: String,
    /// QEMU CPU model, such as `max` under TCG or `host` under KVM.
    pub cpu_model: String,
    /// Firmware and whether it checks signatures.
    pub firmware: Firmware,
    /// PCIe root ports: behind each one device can come and go while the machine runs.
    #[serde(default)]
    pub ports: u8,
    /// It has a screen.
    #[serde(default)]
    pub display: bool,
    /// It has a balloon.
    #[serde(default)]
    pub balloon: bool,
    /// SMBIOS/libvirt UUID the guest sees.
    pub uuid: uuid::Uuid,
    /// cloud-init instance id; changes when the guest is to run cloud-init afresh (a copy).
    pub cloud_init_id: uuid::Uuid,
}

/// Firmware of a virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Firmware {
    /// SeaBIOS.
    Bios,
    /// OVMF without secure boot.
    Uefi,
    /// OVMF with secure boot.
    UefiSecure,
}

/// Stable identity of one device of the expanded configuration: survives edits of the device's keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceIdentity {
    /// Stable id.
    pub id: DeviceId,
    /// Bus slot: `scsi0`, `virtio0`, `net0`, `eth0`.
    pub slot: String,
    /// libvirt's alias, such as `ua-…` or `net0`.
    pub alias: String,
    /// PCI address `bus:slot.function` in the guest, virtual machines only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci: Option<String>,
    /// MAC address of a NIC, lower case with colons.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// The host's interface of a NIC; recorded before it is made, at most 15 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_interface: Option<String>,
    /// The volume that this disk owns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<VolumeId>,
}

/// The desired record of an instance, written by the engine only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// Reference from all other records.
    pub id: InstanceId,
    /// Project it belongs to.
    pub project: ProjectId,
    /// Unique in its project; an index key, renamable.
    pub name: Name,
    /// Proxmox' number.
    pub vmid: Vmid,
    /// Was it chosen by the client? The others are drawn in order.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub vmid_chosen: bool,
    /// Container or virtual machine.
    pub kind: InstanceKind,
    /// Architecture in Incus' words: `x86_64`.
    pub architecture: String,
    /// User's text.
    #[serde(default)]
    pub description: String,
    /// Removed when it stops (libvirt: a transient domain).
    #[serde(default)]
    pub ephemeral: bool,
    /// Configuration as the user wrote it; neither expanded nor `volatile.*`.
    #[serde(default)]
    pub config: Config,
    /// Devices as the user wrote them.
    #[serde(default)]
    pub devices: Devices,
    /// Profiles in the order of application.
    #[serde(default)]
    pub profiles: Vec<ProfileId>,
    /// The image it was made of, for information.
    #[serde(default)]
    pub image: Option<ImageId>,
    /// Properties of the image at creation (`image.os`, …) and its fingerprint under `volatile.base_image`.
    #[serde(default)]
    pub image_properties: Config,
    /// `volatile.*` values that the platform itself keeps.
    #[serde(default)]
    pub volatile: Config,
    /// What is kept of its image's metadata, with the templates; `None`: nothing but what stands elsewhere in the record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Box<InstanceMetadata>>,
    /// Identities of devices, by device name of the expanded configuration.
    #[serde(default)]
    pub identities: BTreeMap<String, DeviceIdentity>,
    /// Virtual hardware, virtual machines only.
    #[serde(default)]
    pub hardware: Option<Hardware>,
    /// Pool of the root volume.
    pub pool: PoolId,
    /// Root volume.
    pub root: VolumeId,
    /// The node that owns it.
    pub node: NodeId,
    /// Generation of the last start that was ordered.
    pub generation: Generation,
    /// Power the user wants.
    pub power: DesiredPower,
    /// Snapshot that the present state descends from.
    #[serde(default)]
    pub current_snapshot: Option<SnapshotId>,
    /// Its memory was kept when it was stopped; a start goes on from there.
    #[serde(default)]
    pub stateful: bool,
    /// Grows with each change of desired state; base of ETag and Proxmox' digest.
    pub spec_version: u64,
    /// Not yet complete (being created) or no longer (being deleted): hidden from lists as a normal instance, locked.
    #[serde(default)]
    pub lifecycle: Lifecycle,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it was last started.
    #[serde(default)]
    pub last_used_at: Option<Timestamp>,
}

/// Whether the record is a whole instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Lifecycle {
    /// A saga is making it.
    Creating,
    /// Whole.
    #[default]
    Ready,
    /// A saga is deleting it.
    Deleting,
}

/// What the host saw of a guest. Ordered by (generation, seq): an older report never replaces a newer one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runtime {
    /// Which instance.
    pub instance: InstanceId,
    /// The generation of the start that made it.
    pub generation: Generation,
    /// Counter of reports within a generation.
    pub seq: u64,
    /// What it does.
    pub state: RuntimeState,
    /// Process id of init or QEMU on its host, when running.
    #[serde(default)]
    pub pid: Option<u32>,
    /// libvirt's domain id: a counter per host, new at each start.
    #[serde(default)]
    pub domain_id: Option<u32>,
    /// When it started.
    #[serde(default)]
    pub started_at: Option<Timestamp>,
    /// Why it ended, in words.
    #[serde(default)]
    pub exit: Option<ExitReason>,
    /// Why it stands still though nobody asked for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub halt: Option<HaltReason>,
    /// `spec_version` actually applied: live against configured.
    #[serde(default)]
    pub applied_spec_version: u64,
    /// The specification actually applied, of a running guest.
    #[serde(default)]
    pub applied: Option<crate::applied::AppliedSpec>,
    /// `kvm` or `tcg`, virtual machines only.
    #[serde(default)]
    pub accelerator: Option<String>,
    /// Since what it runs; not known of a start by an earlier version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Since>,
    /// The ports that were free when its screens began to listen: they have them until its end, whatever becomes of the daemons.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub screens: BTreeMap<ScreenKind, u16>,
}

/// Since what a guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Since {
    /// Its start.
    Start,
    /// Its start from memory that was kept when it was stopped.
    Memory,
    /// It was put back to a snapshot.
    Snapshot,
    /// The end of a pause.
    Pause,
}

/// State of a guest on its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RuntimeState {
    /// No process.
    Stopped,
    /// Processes are being made.
    Starting,
    /// Runs.
    Running,
    /// Frozen by request.
    Paused,
    /// Graceful stop was asked for.
    Stopping,
    /// An error halted it (a full disk, a fault of QEMU), or its host cannot say what it does. It has a process, as far as is
    /// known, with its disks open: it is not down.
    Error,
}

impl RuntimeState {
    /// Has it no process? Then nothing has its disks open: they may be changed, and it may be started. Anything else is not
    /// down, least of all one that an error has halted.
    pub fn is_down(self) -> bool {
        self == Self::Stopped
    }
}

/// Why a guest stands still though nobody asked for that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum HaltReason {
    /// A disk could not be read or written.
    Disk {
        /// Bus slot of the disk, such as `scsi0`, where that is known.
        #[serde(default)]
        slot: Option<String>,
        /// What it lies on has no space left.
        full: bool,
    },
    /// Its kernel panicked.
    Panicked,
    /// Its watchdog was not fed.
    Watchdog,
    /// QEMU met something that it cannot go on from.
    Internal,
    /// Its host cannot say what it does.
    Unknown {
        /// Why, in words.
        detail: String,
    },
}

impl HaltReason {
    /// In words: why, and what to do. `disk` says what is known of the disk at a slot, such as `disk "root" on pool "local"`.
    pub fn words(&self, disk: impl Fn(&str) -> Option<String>) -> String {
        let of = |slot: &Option<String>| {
            let known = slot.as_deref().and_then(|s| disk(s).or_else(|| Some(format!("the disk at {s}"))));
            known.unwrap_or_else(|| "a disk".into())
        };
        match self {
            Self::Disk { slot, full: true } => format!(
                "no space is left for {}; it goes on by itself when there is room again, or resume it then",
                of(slot)
            ),
            Self::Disk { slot, full: false } => {
                format!("{} cannot be read or written; resume it when that is mended", of(slot))
            }
            Self::Panicked => {
                "the kernel inside panicked; look at its console, then restart it by force".into()
            }
            Self::Watchdog => "its watchdog was not fed; resume it, or restart it by force".into(),
            Self::Internal => "QEMU met an error that it cannot go on from; restart it by force".into(),
            Self::Unknown { detail } => format!("its host cannot say what it does: {detail}"),
        }
    }
}

/// Why a guest ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum ExitReason {
    /// It shut itself down, or followed a request to.
    Shutdown,
    /// It was ended by force on request.
    Forced,
    /// It ended by itself in another way.
    Crashed {
        /// In words.
        detail: String,
    },
}

impl ExitReason {
    /// In words, after "it".
    pub fn words(&self) -> &str {
        match self {
            Self::Shutdown => "shut down",
            Self::Forced => "was stopped by force",
            Self::Crashed { detail } => detail,
        }
    }
}

/// The status that users see; a pure function of desired and observed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// No guest process.
    Stopped,
    /// On its way up.
    Starting,
    /// Up.
    Running,
    /// Frozen.
    Frozen,
    /// On its way down.
    Stopping,
    /// Halted by an error, with its process and its disks: not down.
    Error,
}

impl Status {
    /// As [`RuntimeState::is_down`].
    pub fn is_down(self) -> bool {
        self == Self::Stopped
    }

    /// Is there a whole guest, be it that it stands still? It can be changed as it runs, copied and looked at. One on its way up
    /// is neither this nor down.
    pub fn is_up(self) -> bool {
        matches!(self, Self::Running | Self::Frozen | Self::Error)
    }
}

impl Instance {
    /// Status out of the desired record and what the host last saw. Until the host reports of the start that was last
    /// ordered, what it reported of the one before still holds; a report of a start that was never ordered says nothing.
    pub fn status(&self, runtime: Option<&Runtime>) -> Status {
        match runtime {
            Some(r) if r.generation <= self.generation => match r.state {
                RuntimeState::Stopped => Status::Stopped,
                RuntimeState::Starting => Status::Starting,
                RuntimeState::Running => Status::Running,
                RuntimeState::Paused => Status::Frozen,
                RuntimeState::Stopping => Status::Running,
                RuntimeState::Error => Status::Error,
            },
            _ => Status::Stopped,
        }
    }
}

impl Runtime {
    /// May `self` replace `old`?
    pub fn supersedes(&self, old: &Runtime) -> bool {
        (self.generation, self.seq) > (old.generation, old.seq)
    }
}

/// A change of power that a user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PowerAction {
    /// Start it.
    Start,
    /// Stop it.
    Stop,
    /// Stop and start it.
    Restart,
    /// Pause it.
    Freeze,
    /// Continue it.
    Unfreeze,
}

impl PowerAction {
    /// Is the action legal in `status`? The error says what to do instead.
    pub fn check(self, name: &str, status: Status) -> Result<()> {
        use PowerAction as A;
        use Status as S;
        match (self, status) {
            (A::Start, S::Stopped) => Ok(()),
            // It has its disks open, and what it had not written yet.
            (A::Start, S::Error) => Err(Error::conflict(format!(
                "instance {name:?} is halted by an error and not stopped; resume it when the cause is gone, or stop it by force first"
            ))),
            (A::Start, S::Frozen) => {
                Err(Error::conflict(format!("instance {name:?} is frozen; resume it instead")))
            }
            (A::Start, _) => Err(Error::conflict(format!("instance {name:?} is already running"))),
            (A::Stop, S::Stopped) => Err(Error::conflict(format!("instance {name:?} is already stopped"))),
            (A::Stop, _) => Ok(()),
            (A::Restart, S::Stopped) => {
                Err(Error::conflict(format!("instance {name:?} is not running; start it instead")))
            }
            (A::Restart, _) => Ok(()),
            (A::Freeze, S::Running) => Ok(()),
            (A::Freeze, S::Frozen) => Err(Error::conflict(format!("instance {name:?} is already frozen"))),
            (A::Freeze, S::Error) => Err(Error::conflict(format!(
                "instance {name:?} is halted by an error and stands still already; resume it, or stop it by force"
            ))),
            (A::Freeze, _) => Err(Error::conflict(format!("instance {name:?} is not running"))),
            // After an error it tries again what failed.
            (A::Unfreeze, S::Frozen | S::Error) => Ok(()),
            (A::Unfreeze, _) => Err(Error::conflict(format!("instance {name:?} is not frozen"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_legal_power_changes() {
        assert!(PowerAction::Start.check("a", Status::Stopped).is_ok());
        assert!(
            PowerAction::Start.check("a", Status::Running).unwrap_err().message.contains("already running")
        );
        assert!(PowerAction::Unfreeze.check("a", Status::Running).is_err());
        assert!(PowerAction::Stop.check("a", Status::Frozen).is_ok());
    }

    #[test]
    fn what_an_error_halted_is_not_down() {
        use RuntimeState as S;
        for state in [S::Starting, S::Running, S::Paused, S::Stopping, S::Error] {
            assert!(!state.is_down(), "{state:?}");
        }
        assert!(S::Stopped.is_down() && Status::Stopped.is_down());
        assert!(!Status::Error.is_down() && Status::Error.is_up());
        let check = |action: PowerAction| action.check("a", Status::Error);
        assert!(check(PowerAction::Start).unwrap_err().message.contains("resume it"));
        assert!(check(PowerAction::Freeze).unwrap_err().message.contains("stands still already"));
        for action in [PowerAction::Unfreeze, PowerAction::Stop, PowerAction::Restart] {
            check(action).unwrap();
        }
    }

    #[test]
    fn why_it_stands_still_names_the_disk_and_the_cure() {
        let full = HaltReason::Disk { slot: Some("scsi0".into()), full: true };
        let named = full.words(|s| (s == "scsi0").then(|| "disk \"root\" on pool \"local\"".into()));
        assert!(named.contains("no space is left for disk \"root\" on pool \"local\""), "{named}");
        assert!(full.words(|_| None).contains("the disk at scsi0"));
        let kept = serde_json::to_value(&full).unwrap();
        assert_eq!(kept, serde_json::json!({"kind": "disk", "slot": "scsi0", "full": true}));
        assert_eq!(serde_json::from_value::<HaltReason>(kept).unwrap(), full);
    }

    #[test]
    fn generations_order_by_incarnation_first() {
        let old = Generation { incarnation: 1, n: 900 };
        let new = Generation { incarnation: 2, n: 1 };
        assert!(new > old && old.next() > old && old.next() < new);
        assert_eq!(old.next_in(1), old.next());
        assert_eq!(old.next_in(2), new, "after a restore nothing that was ordered before is ordered again");
    }
}
