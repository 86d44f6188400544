//! What a host sees of its guests and what can be asked of a running one; shared by drivers, agent and engine.

use crate::{
    CheckpointId, InstanceId, VolumeId,
    instance::{ExitReason, Generation, HaltReason, RuntimeState},
    threads::IoThread,
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::IpAddr, time::Duration};

/// How to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum StopMode {
    /// Ask, and wait this long; a timeout is an error and leaves the guest running.
    Graceful {
        /// How long.
        timeout: Duration,
    },
    /// End it now.
    Force,
    /// Keep its memory on the host and end it; a start may go on from there. Virtual machines only.
    Save,
}

impl StopMode {
    /// The longest that a graceful stop may be given: a day.
    pub const LONGEST: Duration = Duration::from_secs(86_400);
}

/// What a guest is asked to do, which it does by itself or not at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestWish {
    /// To shut down.
    Shutdown,
    /// To shut down and boot anew, on the same virtual hardware.
    Reboot,
}

/// How a guest is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AskedBy {
    /// In every way that it may listen to.
    Any,
    /// By its power button alone.
    Button,
    /// By the agent inside alone.
    Agent,
}

/// What a host saw of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observed {
    /// Which.
    pub instance: InstanceId,
    /// Of which start.
    pub generation: Generation,
    /// What it does.
    pub state: RuntimeState,
    /// Init's or QEMU's process id on the host.
    pub pid: Option<u32>,
    /// libvirt's domain id.
    pub domain_id: Option<u32>,
    /// Seconds since the epoch.
    pub started_at: Option<i64>,
    /// Why it ended.
    pub exit: Option<ExitReason>,
    /// Why it stands still though nobody asked for that.
    #[serde(default)]
    pub halt: Option<HaltReason>,
    /// `spec_version` that is applied.
    pub applied_spec_version: u64,
    /// `kvm` or `tcg`.
    pub accelerator: Option<String>,
}

impl Observed {
    /// Of a start of which the host has nothing: nobody made it there.
    pub fn never_ran(instance: InstanceId, generation: Generation) -> Self {
        Self {
            instance,
            generation,
            state: RuntimeState::Stopped,
            pid: None,
            domain_id: None,
            started_at: None,
            exit: None,
            halt: None,
            applied_spec_version: 0,
            accelerator: None,
        }
    }
}

/// Result of a live update.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Applied {
    /// Keys that take effect at the next start only.
    pub pending: Vec<String>,
}

/// Figures of a running guest; a missing one is `None`, never 0.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
pub struct Metrics {
    /// CPU time used in nanoseconds.
    pub cpu_ns: Option<u64>,
    /// Memory in use, bytes.
    pub memory: Option<u64>,
    /// Largest memory use, bytes.
    pub memory_peak: Option<u64>,
    /// Swap in use, bytes.
    pub swap: Option<u64>,
    /// Memory limit or size, bytes.
    pub memory_total: Option<u64>,
    /// Processes.
    pub processes: Option<u64>,
    /// Read from disks since its start, bytes, as far as the host's kernel counts it.
    #[serde(default)]
    pub disk_read: Option<u64>,
    /// Written to disks since its start, bytes.
    #[serde(default)]
    pub disk_written: Option<u64>,
    /// Interfaces by name as the guest knows them.
    pub interfaces: BTreeMap<String, Interface>,
    /// The system inside, where an agent in it tells.
    #[serde(default)]
    pub system: Option<GuestSystem>,
    /// When the host took the sample, milliseconds since 1970.
    #[serde(default)]
    pub sampled_at: Option<i64>,
    /// What monitoring alone reads; only where it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<Box<Details>>,
}

/// What monitoring reads of a running guest beside [`Metrics`]. What is not known is absent, never 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Details {
    /// Time of its processors, by number.
    pub processors: Vec<ProcessorTimes>,
    /// Parts of its memory in bytes, by the names that Incus' families have (`Active_anon`, `Cached`, `MemFree`, …).
    pub memory: BTreeMap<String, u64>,
    /// Processes that were killed for want of memory.
    pub oom_kills: Option<u64>,
    /// Disks by the name that the kernel beneath has for them: the host's for a container, the guest's for a machine.
    pub disks: BTreeMap<String, DiskCounters>,
    /// File systems.
    pub filesystems: Vec<FilesystemFigures>,
    /// NICs by device, as the host counts them; of machines without Karst's agent.
    pub nics: BTreeMap<String, NicFigures>,
}

/// Time of a processor in nanoseconds, by what it was for (`user`, `system`, `idle`, …).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct ProcessorTimes {
    /// Number.
    pub number: u32,
    /// By mode.
    pub modes: BTreeMap<String, u64>,
}

/// What a disk has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[allow(missing_docs)]
pub struct DiskCounters {
    pub read_bytes: u64,
    pub reads: Option<u64>,
    pub written_bytes: u64,
    pub writes: Option<u64>,
}

/// A file system of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct FilesystemFigures {
    /// What is mounted.
    pub device: String,
    /// Its kind, such as `ext4`.
    pub kind: String,
    /// Where the guest has it.
    pub mount_point: String,
    /// Bytes.
    pub size: u64,
    /// Bytes that are free.
    pub free: u64,
    /// Bytes that are free for everybody.
    pub available: u64,
}

/// What a running virtual machine has done since its start, beside [`Metrics`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct MachineFigures {
    /// Disks by slot, such as `scsi0`.
    pub disks: BTreeMap<String, DiskFigures>,
    /// Interfaces by the host's name.
    pub nics: BTreeMap<String, NicFigures>,
    /// Processors by index.
    pub vcpus: Vec<VcpuFigures>,
    /// Threads that serve disks beside the main one, by number, as they are at work.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub iothreads: Vec<IoThread>,
    /// Balloon, where it has one.
    pub balloon: Option<BalloonFigures>,
    /// CPU time of its process in user mode, nanoseconds.
    pub user_ns: Option<u64>,
    /// CPU time of its process in the kernel, nanoseconds.
    pub system_ns: Option<u64>,
    /// Commands of QEMU's monitor were run in it on request: what is recorded of it may no longer hold.
    #[serde(default)]
    pub monitored: bool,
    /// How fast it writes memory, once that was asked for.
    #[serde(default)]
    pub dirty_rate: Option<DirtyRate>,
}

/// How fast a machine writes memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtyRate {
    /// Is it done?
    pub measured: bool,
    /// When it began, on the host's monotonic clock, seconds.
    pub started: i64,
    /// How long it takes, seconds.
    pub seconds: i32,
    /// MiB a second, when it is done.
    pub rate: Option<i64>,
    /// How it is found out.
    #[serde(default)]
    pub mode: DirtyRateMode,
    /// The same of each processor by its number, where that is told.
    #[serde(default)]
    pub processors: Vec<(u32, i64)>,
}

/// How it is found out how fast a machine writes memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum DirtyRateMode {
    /// Some of it is looked at twice.
    #[default]
    PageSampling,
    /// What is written is noted for the time.
    DirtyBitmap,
    /// KVM notes it by processor, in the ring of `hardware.features` (dirty-ring).
    DirtyRing,
}

impl DirtyRateMode {
    /// As QEMU calls it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PageSampling => "page-sampling",
            Self::DirtyBitmap => "dirty-bitmap",
            Self::DirtyRing => "dirty-ring",
        }
    }

    /// By that name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::PageSampling, Self::DirtyBitmap, Self::DirtyRing].into_iter().find(|m| m.as_str() == name)
    }
}

/// What QEMU says to a command of its monitor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MonitorAnswer {
    /// What it returned.
    Returned(serde_json::Value),
    /// That it refused.
    Refused {
        /// Class of the error, such as `CommandNotFound`.
        class: String,
        /// Why.
        description: String,
    },
}

/// An event of QEMU's monitor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MonitorEvent {
    /// Whose.
    pub instance: crate::InstanceId,
    /// Its name, such as `STOP`.
    pub event: String,
    /// What belongs to it.
    pub data: serde_json::Map<String, serde_json::Value>,
    /// When, seconds since 1970.
    pub seconds: i64,
    /// And microseconds.
    pub micros: u32,
}

/// A virtual machine has written behind the threshold of a disk, which is none any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThresholdReached {
    /// Whose disk.
    pub instance: InstanceId,
    /// Bus slot of the disk, such as `scsi0`.
    pub slot: String,
    /// The byte of what the disk lies in.
    pub threshold: u64,
    /// How far behind it was written, bytes.
    pub excess: u64,
}

/// A disk: requests, bytes and nanoseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[allow(missing_docs)]
pub struct DiskFigures {
    pub read_requests: u64,
    pub read_bytes: u64,
    pub read_ns: u64,
    pub write_requests: u64,
    pub write_bytes: u64,
    pub write_ns: u64,
    pub flush_requests: u64,
    pub flush_ns: u64,
    /// Bytes that its file takes; nothing of a block device.
    pub allocation: Option<u64>,
    /// Bytes that its file has.
    pub physical: Option<u64>,
}

/// How far a backup of a running machine's disks is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct DiskBackupState {
    /// What it does.
    pub phase: DiskBackupPhase,
    /// Bytes that are done of `total`; of one that is read by others, what was kept for them because the guest wrote.
    pub done: u64,
    /// Bytes that there are to do.
    pub total: u64,
    /// The socket at which one is read, in words of its host: for people, and those who are on that host.
    #[serde(default)]
    pub socket: Option<String>,
}

/// What a backup of a running machine's disks does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum DiskBackupPhase {
    /// There is none, or not any more: the machine ended before it was done.
    #[default]
    Gone,
    /// It is written, or can be read.
    Running,
    /// All of it is written.
    Done,
    /// It failed; nothing of it is of use.
    Failed {
        /// Why, in words.
        reason: String,
    },
}

/// Bytes that what keeps the old content of a disk of so many bytes may need: the disk's, and what a qcow2 image has of its own
/// (tables of clusters of 64 KiB: 8 bytes each and 2 for their counts), rounded up generously.
pub fn scratch_size(disk: u64) -> u64 {
    let most = disk.saturating_add(disk / 1024).saturating_add(16 << 20);
    most.checked_next_multiple_of(1 << 20).unwrap_or(u64::MAX)
}

/// What a host has of a checkpoint in the file of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointMark {
    /// Which.
    pub checkpoint: CheckpointId,
    /// The volume that the disk is.
    pub volume: VolumeId,
    /// Bytes that changed while it was the newest.
    pub bytes: u64,
    /// It is whole: the machine was not killed while it followed.
    pub whole: bool,
}

/// How far a copy of a running machine's disk is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct DiskCopyState {
    /// What it does.
    pub phase: DiskCopyPhase,
    /// Bytes that are done of `total`. Both grow when the guest writes what was copied before.
    pub done: u64,
    /// Bytes that there are to do.
    pub total: u64,
    /// Bytes a second at most; 0: as fast as it goes.
    pub speed: u64,
}

/// What a copy of a running machine's disk does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum DiskCopyPhase {
    /// There is none, or not any more: the machine ended before it was done.
    #[default]
    Gone,
    /// It is on its way.
    Copying,
    /// The copy is what the disk is, and follows it.
    Ready,
    /// The machine goes on from the copy. This stays known until the machine's next start.
    Pivoted,
    /// It failed; the machine goes on from its disk as if there had been no copy.
    Failed {
        /// Why, in words.
        reason: String,
    },
}

/// How a copy of a running machine's disk ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskCopyEnd {
    /// The machine goes on from the copy.
    Pivot,
    /// The copy is what the disk was at this moment; the machine goes on from its disk.
    Finish,
    /// What the copy is by then is of no use.
    Cancel,
}

/// An interface as the host counts it, from the guest's side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[allow(missing_docs)]
pub struct NicFigures {
    pub received_bytes: u64,
    pub received_packets: u64,
    pub received_errors: u64,
    pub received_drops: u64,
    pub sent_bytes: u64,
    pub sent_packets: u64,
    pub sent_errors: u64,
    pub sent_drops: u64,
}

/// A processor of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct VcpuFigures {
    /// Index.
    pub index: u32,
    /// Time that it ran, nanoseconds.
    pub time_ns: u64,
    /// Time that it waited for something or for a processor, nanoseconds; 0 where the kernel keeps no account of it.
    #[serde(default)]
    pub wait_ns: u64,
    /// Time of that for which it could have run and was not let, nanoseconds.
    #[serde(default)]
    pub delay_ns: u64,
    /// Processor of the host that it last ran on; -1 where that is not known.
    pub processor: i32,
}

/// A balloon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct BalloonFigures {
    /// What the guest has, bytes.
    pub actual: u64,
    /// What the system inside tells of its memory, once it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inside: Option<MemoryInside>,
}

/// What a system tells of its memory by its balloon; what it does not know is missing. Bytes where it says nothing else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct MemoryInside {
    /// When, seconds since 1970.
    pub told_at: i64,
    /// What it has.
    pub total: Option<u64>,
    /// What nobody uses.
    pub free: Option<u64>,
    /// What programs can have without swapping.
    pub available: Option<u64>,
    /// What its caches of disks take.
    pub caches: Option<u64>,
    /// What was read from swap.
    pub swapped_in: Option<u64>,
    /// What was written to swap.
    pub swapped_out: Option<u64>,
    /// Faults that needed a disk, a number.
    pub major_faults: Option<u64>,
    /// Faults that needed none, a number.
    pub minor_faults: Option<u64>,
    /// Huge pages that were given, a number.
    pub huge_given: Option<u64>,
    /// Huge pages that could not be given, a number.
    pub huge_refused: Option<u64>,
}

/// Which agent answers inside a virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentKind {
    /// Karst's own.
    Karst,
    /// The QEMU guest agent.
    Qemu,
}

/// The system inside a guest, as its agent tells; all of it text of the guest, printable and short.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestSystem {
    /// Who tells.
    pub agent: AgentKind,
    /// Operating system, such as `Debian GNU/Linux`.
    pub os: String,
    /// Its version.
    pub os_version: String,
    /// Kernel release.
    pub kernel: String,
    /// Host name.
    pub hostname: String,
    /// Fully qualified name.
    pub fqdn: String,
}

/// A guest's interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Interface {
    /// MAC address.
    pub mac: String,
    /// The host's end.
    pub host_name: String,
    /// MTU.
    pub mtu: u32,
    /// `up` or `down`.
    pub up: bool,
    /// Loopback rather than Ethernet.
    pub loopback: bool,
    /// Addresses: address, prefix, scope (`global`, `link`, `local`).
    pub addresses: Vec<(IpAddr, u8, String)>,
    /// Bytes received and sent, packets received and sent, as the guest sees them.
    pub counters: [u64; 4],
    /// Packets that failed at receiving and sending, and that were dropped at receiving and sending.
    #[serde(default)]
    pub losses: [u64; 4],
}

/// A program to run inside a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Program and arguments; the guest's `PATH` applies.
    pub command: Vec<String>,
    /// Environment on top of the guest's own.
    pub environment: BTreeMap<String, String>,
    /// User id inside.
    pub uid: u32,
    /// Group id inside.
    pub gid: u32,
    /// Working directory inside; `/root` or `/` when absent.
    pub cwd: Option<String>,
    /// With a terminal of this size (columns, rows); else three pipes.
    pub terminal: Option<(u16, u16)>,
    /// `TERM` when with a terminal.
    pub term: Option<String>,
}

/// Kind of a file in a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
}

/// What is known of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// Kind.
    pub kind: FileKind,
    /// Owner inside the guest.
    pub uid: u32,
    /// Group inside the guest.
    pub gid: u32,
    /// Permission bits.
    pub mode: u32,
    /// Bytes.
    pub size: u64,
    /// Modified, seconds since the epoch.
    pub modified: i64,
}

/// How to write a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileWrite {
    /// Absolute path inside.
    pub path: String,
    /// What to make.
    pub kind: FileKind,
    /// Owner; unchanged (or 0 for a new one) when absent.
    pub uid: Option<u32>,
    /// Group; as above.
    pub gid: Option<u32>,
    /// Permission bits; 0644 or 0755 for a new one when absent.
    pub mode: Option<u32>,
    /// Append rather than overwrite.
    pub append: bool,
    /// Target of a symbolic link.
    pub target: Option<String>,
}
