//! The trait of guest drivers.

use crate::{DiskFormat, ResolvedGuest};
use async_trait::async_trait;
use karst_model::{
    CheckpointId, DiskBackupId, Error, InstanceId, MemoryJobId, Result, SnapshotId, VolumeId,
    display::{DisplayGuard, DisplayProtocol},
    instance::InstanceKind,
    layer::Merge,
    memory::{DumpFormat, MemoryEnd, MemoryState},
    news::MachineNews,
};
use std::{collections::BTreeMap, fmt, net::SocketAddr, os::fd::OwnedFd, path::PathBuf};
use tokio::sync::{broadcast, mpsc};

pub use karst_model::guest::{
    Applied, AskedBy, Details, DirtyRate, DirtyRateMode, DiskBackupPhase, DiskBackupState, DiskCopyEnd,
    DiskCopyPhase, DiskCopyState, DiskCounters, ExecRequest, FileInfo, FileKind, FileWrite,
    FilesystemFigures, GuestWish, Interface, MachineFigures, Metrics, MonitorAnswer, MonitorEvent, Observed,
    ProcessorTimes, StopMode, ThresholdReached, scratch_size,
};

/// A kind of guest on this host. Implementations pass one contract suite.
///
/// Every mutation is idempotent: `start` of the generation that already runs answers its state, `stop` of a stopped
/// guest is fine, `destroy` of an unknown one too. A guest is a child of its keeper and never of the caller: dropping the
/// driver or killing the process leaves guests alone; [`GuestDriver::adopt`] finds them again.
#[async_trait]
pub trait GuestDriver: Send + Sync {
    /// Which kind it runs.
    fn kind(&self) -> InstanceKind;

    /// Starts the guest and answers when its processes run (not when its system has booted). On failure nothing is left.
    async fn start(&self, guest: &ResolvedGuest) -> Result<Observed>;

    /// Asks the guest to shut down (`Graceful`, answers when it has ended or the time is up) or ends it (`Force`).
    async fn stop(&self, instance: InstanceId, mode: StopMode) -> Result<Observed>;

    /// Asks the guest to shut down or to boot anew, and waits for nothing. Unsupported for what a kind cannot.
    async fn ask(&self, _instance: InstanceId, _wish: GuestWish, _by: AskedBy) -> Result<()> {
        Err(Error::unsupported("guests of this kind are stopped, not asked"))
    }

    /// Freezes it.
    async fn pause(&self, instance: InstanceId) -> Result<Observed>;

    /// Continues it.
    async fn resume(&self, instance: InstanceId) -> Result<Observed>;

    /// Applies what can change live (limits) and says what cannot until the next start.
    async fn update(&self, guest: &ResolvedGuest) -> Result<Applied>;

    /// What it does now.
    async fn observe(&self, instance: InstanceId) -> Result<Observed>;

    /// After a start of the host process: finds the guests that really run, by their keepers, and watches them again.
    async fn adopt(&self) -> Result<Vec<Observed>>;

    /// Removes everything that belongs to a stopped guest outside its volumes: keeper, cgroups, links, state directory.
    async fn destroy(&self, instance: InstanceId) -> Result<()>;

    /// Figures of a running guest; with what monitoring alone reads if `detailed`, which costs more.
    async fn sample(&self, instance: InstanceId, detailed: bool) -> Result<Metrics>;

    /// Figures of a running guest, without details.
    async fn metrics(&self, instance: InstanceId) -> Result<Metrics> {
        self.sample(instance, false).await
    }

    /// Runs a program inside.
    async fn exec(&self, instance: InstanceId, request: ExecRequest) -> Result<Exec>;

    /// Attaches to the console: a bidirectional stream descriptor (pty master side or socket). A new attachment ends
    /// the one before only when `force`; else conflict.
    async fn console(&self, instance: InstanceId, force: bool) -> Result<OwnedFd>;

    /// New size of the console's terminal, where it is one.
    async fn console_resize(&self, _instance: InstanceId, _columns: u16, _rows: u16) -> Result<()> {
        Err(Error::unsupported("a serial console has no size"))
    }

    /// The kept console log, newest at the end, at most `max` bytes; `clear` empties it.
    async fn console_log(&self, instance: InstanceId, max: usize, clear: bool) -> Result<Vec<u8>>;

    /// What the program that runs the guest said since the last start, newest at the end, at most `max` bytes; `clear` empties it.
    async fn runner_log(&self, _instance: InstanceId, _max: usize, _clear: bool) -> Result<Vec<u8>> {
        Ok(vec![])
    }

    /// Files inside; `None` where the kind has no way to reach them.
    fn files(&self) -> Option<&dyn GuestFiles>;

    /// What only virtual machines can; `None` for others.
    fn machine(&self) -> Option<&dyn GuestMachine> {
        None
    }

    /// Copies disks of guests that run; `None` where the kind cannot.
    fn disk_copies(&self) -> Option<&dyn DiskCopies> {
        None
    }

    /// Puts layers over disks of guests that run, and merges them; `None` where the kind cannot.
    fn disk_merges(&self) -> Option<&dyn DiskMerges> {
        None
    }

    /// Follows what changes of disks of guests that run, and backs them up; `None` where the kind cannot.
    fn disk_backups(&self) -> Option<&dyn DiskBackups> {
        None
    }

    /// Writes memory of guests that run into files; `None` where the kind cannot.
    fn memory_files(&self) -> Option<&dyn MemoryFiles> {
        None
    }

    /// Makes file systems inside consistent for a snapshot; `None` where the host's own file system does that.
    fn quiesce(&self) -> Option<&dyn Quiesce> {
        None
    }

    /// What of its guests is wrong and tried again, for people; guests by their ids.
    fn warnings(&self) -> Vec<String> {
        vec![]
    }

    /// Changes of state as they happen (a guest ended by itself). One receiver; later calls replace it.
    fn events(&self) -> mpsc::Receiver<Observed>;
}

/// What only a virtual machine can, while it runs.
#[async_trait]
pub trait GuestMachine: Send + Sync {
    /// Tells the guest that the disk at `path` has so many bytes, and grows the file below it when it is one; a block
    /// device has grown before. Conflict for a disk that cannot grow live, not found when no such disk is attached.
    async fn grow(&self, instance: InstanceId, path: &std::path::Path, size: u64) -> Result<()>;

    /// Attaches to the port of this device, which leads to who attaches. One at a time: who keeps the attachments sees to that.
    /// Not found without such a port, unsupported for one that leads elsewhere.
    async fn port(&self, instance: InstanceId, port: &str) -> Result<OwnedFd>;

    /// What it has done so far.
    async fn figures(&self, instance: InstanceId) -> Result<MachineFigures>;

    /// Interrupts it without regard to masks (NMI).
    async fn interrupt(&self, instance: InstanceId) -> Result<()>;

    /// Wakes it when it sleeps.
    async fn wake(&self, instance: InstanceId) -> Result<()>;

    /// Runs a command of QEMU's monitor. From then on its figures say that somebody did.
    async fn monitor(
        &self,
        instance: InstanceId,
        command: &str,
        arguments: serde_json::Value,
    ) -> Result<MonitorAnswer>;

    /// Events of QEMU's monitor, of all machines, from now on; who falls behind misses some.
    fn monitor_events(&self) -> broadcast::Receiver<MonitorEvent>;

    /// Has it said, once, when it writes behind a byte of what the disk in a slot lies in; 0: not any more. It is told by
    /// [`GuestMachine::thresholds`]. Invalid without such a disk, unsupported for one that is only read.
    async fn set_threshold(&self, instance: InstanceId, slot: &str, bytes: u64) -> Result<()>;

    /// Thresholds that are reached, of all machines, from now on; who falls behind misses some.
    fn thresholds(&self) -> broadcast::Receiver<ThresholdReached>;

    /// What happens in machines, of all of them, from now on; who falls behind misses some. What a guest can cause is told of a
    /// bounded number in a time.
    fn news(&self) -> broadcast::Receiver<MachineNews>;

    /// Has its figures say what it tells of its memory, every so many seconds; 0: not any more. Unsupported without a balloon.
    async fn set_memory_period(&self, instance: InstanceId, seconds: u32) -> Result<()>;

    /// Begins to measure how fast it writes memory; its figures say it then.
    async fn measure_dirty_rate(&self, instance: InstanceId, seconds: u32, mode: DirtyRateMode)
    -> Result<()>;

    /// Runs a command of the QEMU guest agent's protocol inside; as far as Karst's own agent can, where that is the one.
    async fn agent(
        &self,
        instance: InstanceId,
        command: &str,
        arguments: serde_json::Value,
        limit: std::time::Duration,
    ) -> Result<serde_json::Value>;

    /// Presses the reset button.
    async fn reset(&self, instance: InstanceId) -> Result<()>;

    /// Presses chords of keys, one after the other.
    async fn press(&self, instance: InstanceId, chords: &[Vec<String>]) -> Result<()>;

    /// Keeps what a machine is beside its disks with a snapshot: the variables of its firmware, its TPM, and, of one that
    /// is paused, its memory if `memory`. One that never ran has nothing; what is there already stays.
    async fn state_save(&self, instance: InstanceId, snapshot: SnapshotId, memory: bool) -> Result<()>;

    /// Makes a machine that does not run what it was at a snapshot; its next start may go on from the memory then if
    /// `memory`, else memory that was kept over a stop is dropped. Without anything kept it is as one that never ran.
    async fn state_restore(&self, instance: InstanceId, snapshot: SnapshotId, memory: bool) -> Result<()>;

    /// Drops what is kept with a snapshot; fine when nothing is.
    async fn state_delete(&self, instance: InstanceId, snapshot: SnapshotId) -> Result<()>;

    /// What a machine is beside its disks and memory, now or at a snapshot; empty of one that never ran.
    async fn state_read(&self, instance: InstanceId, at: Option<SnapshotId>) -> Result<MachineFiles>;

    /// Makes that what a machine is, whole: for its next start, which takes away memory that it kept over a stop, or at a
    /// snapshot, without memory. Its directory is there; conflict when it runs and is to be changed.
    async fn state_write(
        &self,
        instance: InstanceId,
        at: Option<SnapshotId>,
        files: MachineFiles,
    ) -> Result<()>;

    /// Drops memory that a machine which does not run keeps over its stop; fine when there is none.
    async fn memory_drop(&self, instance: InstanceId) -> Result<()>;

    /// What it shows: a descriptor that reads a PNG file. Unsupported for a machine without a display.
    async fn screenshot(&self, instance: InstanceId) -> Result<OwnedFd>;

    /// A connection to its display; any number at a time. With a guard, whoever is at the other end has to know its password,
    /// else nothing is asked. Unsupported for a machine without a display or one that does not speak this; conflict for one
    /// whose start was before displays could have a password, or before its host could do this.
    async fn display(
        &self,
        instance: InstanceId,
        protocol: DisplayProtocol,
        guard: Option<&DisplayGuard>,
    ) -> Result<OwnedFd>;

    /// The password for connections that are being asked for one, from now on; without one nobody who is asked gets in.
    async fn guard_display(&self, instance: InstanceId, guard: Option<&DisplayGuard>) -> Result<()>;
}

/// A disk of a guest that runs, to be copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskCopy {
    /// What the copy is called: the volume that it is made into.
    pub to: VolumeId,
    /// Where the disk is.
    pub from: PathBuf,
    /// Where the copy is to be: something of exactly the disk's size, of which nothing needs to be kept.
    pub path: PathBuf,
    /// Form of what is there.
    pub format: DiskFormat,
    /// The qcow2 file below it, if it is a clone.
    pub backing: Option<PathBuf>,
    /// Bytes a second at most; 0: as fast as it goes.
    pub speed: u64,
    /// What the guest writes is on both before it is told so: the copy then keeps up with any guest.
    pub synchronous: bool,
}

/// Copies disks of guests that run. One call at a time for each guest matters; all may be called again after a crash.
#[async_trait]
pub trait DiskCopies: Send + Sync {
    /// Begins a copy; one of this name that there is already goes on. Not found without such a disk, conflict while the disk
    /// is being copied elsewhere.
    async fn begin(&self, instance: InstanceId, copy: DiskCopy) -> Result<()>;

    /// How far it is. Also of a guest that does not run any more.
    async fn state(&self, instance: InstanceId, to: VolumeId) -> Result<DiskCopyState>;

    /// Ends it, and answers when it has ended.
    ///
    /// * `Pivot`: conflict unless it is ready. Once this has answered, the guest's disk is the copy, and that is known until its
    ///   next start, whatever happens to the machine: before a guest writes to a copy it is on disk that it may.
    /// * `Finish`: conflict unless it is ready.
    /// * `Cancel`: fine when there is none; conflict when the guest goes on from the copy already.
    async fn end(&self, instance: InstanceId, to: VolumeId, end: DiskCopyEnd) -> Result<()>;

    /// Sets the bytes a second that it may copy; 0: as fast as it goes. Conflict when there is none.
    async fn set_speed(&self, instance: InstanceId, to: VolumeId, speed: u64) -> Result<()>;
}

/// A layer that a guest is to go on in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewLayer {
    /// Where the disk is.
    pub disk: PathBuf,
    /// Where the layer is: an empty qcow2 file of the disk's size.
    pub path: PathBuf,
    /// Its number among the files of the disk; higher than all.
    pub number: u32,
}

/// Files of a disk of a guest that runs, to be made one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskMerge {
    /// What the merge is called: the volume that is the disk.
    pub volume: VolumeId,
    /// Where the disk is.
    pub path: PathBuf,
    /// Which files.
    pub merge: Merge,
    /// Bytes a second at most; 0: as fast as it goes.
    pub speed: u64,
}

/// What a merge has left of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MergedDisk {
    /// The volume that is the disk.
    pub volume: VolumeId,
    /// The numbers of its files before.
    pub before: Vec<u32>,
    /// Those that are not of it any more.
    pub gone: Vec<u32>,
}

/// Puts layers over disks of guests that run, and merges them. One call at a time for each guest matters; all may be called again
/// after a crash.
#[async_trait]
pub trait DiskMerges: Send + Sync {
    /// Lets the guest go on in new layers of its disks, all at one moment or none. What an earlier call has done stays.
    async fn add(&self, instance: InstanceId, layers: Vec<NewLayer>) -> Result<()>;

    /// Takes from the guest what an [`DiskMerges::add`] that failed has left; answers whether it goes on in the layers all the same.
    async fn take_back(&self, instance: InstanceId, layers: Vec<NewLayer>) -> Result<bool>;

    /// Begins a merge; one of this name that there is already goes on. How far it is [`DiskCopies::state`] tells, how fast it may
    /// be [`DiskCopies::set_speed`] says and [`DiskCopies::end`] ends it, by this name: the guest's disk is what is left after
    /// a pivot, and what it was after all else. One that does not take the active layer away is ready when it has ended.
    async fn merge(&self, instance: InstanceId, merge: DiskMerge) -> Result<()>;

    /// Merges that the guest went on from since its last start, also of one that has ended: what it is started from next is
    /// what they have left.
    async fn merged(&self, instance: InstanceId) -> Result<Vec<MergedDisk>>;
}

/// What of a guest's memory is to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryJob {
    /// All of its state, to go on from; it stands still from the beginning on.
    Save,
    /// Its memory, to look into.
    Dump(DumpFormat),
}

/// What a guest is whose memory is saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryShape {
    /// UUID that its firmware shows.
    pub uuid: uuid::Uuid,
    /// Machine type.
    pub machine: String,
    /// What else must be the same, in words of the driver.
    pub words: String,
}

/// Writes memory of guests that run into files that the caller has opened. One call at a time for each guest matters; all may be
/// called again after a crash.
#[async_trait]
pub trait MemoryFiles: Send + Sync {
    /// What must be there again for memory that is saved now to be of use.
    async fn shape(&self, instance: InstanceId) -> Result<MemoryShape>;

    /// Begins to write into `file`, from where it stands. One of this name that was begun whole goes on, and `file` is not used
    /// then. Conflict while another is written, or the guest is neither running nor paused; unsupported for a guest whose state
    /// cannot be saved.
    async fn begin(&self, instance: InstanceId, id: MemoryJobId, job: MemoryJob, file: OwnedFd)
    -> Result<()>;

    /// How far it is; without an id what a stop that keeps the memory writes. Of a guest that does not run: gone.
    async fn state(&self, instance: InstanceId, id: Option<MemoryJobId>) -> Result<MemoryState>;

    /// Ends it. Keep: conflict unless it is done; what was saved stands still. Cancel: it is broken off, and a guest that ran goes
    /// on; fine when there is none.
    async fn end(&self, instance: InstanceId, id: Option<MemoryJobId>, end: MemoryEnd) -> Result<()>;
}

/// A disk of a checkpoint that is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MarkedDisk {
    /// Where the disk is.
    pub path: PathBuf,
    /// Its checkpoint that followed it until now.
    pub before: Option<CheckpointId>,
}

/// A checkpoint to be made: from one moment on, the same for all its disks, what changes is followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewCheckpoint {
    /// What it is called.
    pub id: CheckpointId,
    /// Its disks.
    pub disks: Vec<MarkedDisk>,
}

/// A disk of a checkpoint that is to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnmarkedDisk {
    /// Where the disk is.
    pub path: PathBuf,
    /// The checkpoint before it, which what changed since is what this one has, too.
    pub parent: Option<CheckpointId>,
    /// It is the newest of the disk: the one before it follows from then on.
    pub last: bool,
}

/// A disk to be backed up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackedUpDisk {
    /// Where the disk is.
    pub path: PathBuf,
    /// What changed since the first of these, which follow each other; without any, all of it.
    pub since: Vec<CheckpointId>,
    /// Where it is written to: something raw of the disk's size; of a backup that is read by others, where what the guest
    /// overwrites is kept meanwhile: something raw and empty, larger than the disk by [`scratch_size`].
    pub to: PathBuf,
    /// What it is called where it is read.
    pub export: String,
    /// What the bitmap of its changes is called there.
    pub bitmap: String,
}

/// Where a backup is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupServer {
    /// At a socket in the guest's directory.
    Unix,
    /// At an address of this host.
    Tcp(SocketAddr),
}

/// A backup of disks, all as they were at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskBackup {
    /// What it is called.
    pub id: DiskBackupId,
    /// The disks.
    pub disks: Vec<BackedUpDisk>,
    /// A checkpoint of the same moment.
    pub checkpoint: Option<NewCheckpoint>,
    /// The checkpoints that there are: what disks have of others is dropped.
    pub known: Vec<CheckpointId>,
    /// Others read it there, until its end; else it is written.
    pub server: Option<BackupServer>,
}

/// What a disk has of a checkpoint: where the disk is, which one, the bytes that changed while it was the newest, and whether it
/// is whole.
pub type DiskMark = (PathBuf, CheckpointId, u64, bool);

/// Checkpoints and backups of disks of guests that run. All may be called again after a crash.
#[async_trait]
pub trait DiskBackups: Send + Sync {
    /// Makes a checkpoint; one that is there is fine. What disks have of others than `known` is dropped. Not found without such a
    /// disk, unsupported for one whose format cannot keep it, by its name.
    async fn mark(
        &self,
        instance: InstanceId,
        checkpoint: NewCheckpoint,
        known: Vec<CheckpointId>,
    ) -> Result<()>;

    /// Takes a checkpoint away; fine when it is not there. Of a guest that does not run nothing happens, and what is left goes with
    /// the next checkpoint or backup; conflict then, and without one of the disks, for one between two others.
    async fn unmark(&self, instance: InstanceId, id: CheckpointId, disks: Vec<UnmarkedDisk>) -> Result<()>;

    /// What the disks of a guest that runs have.
    async fn marks(&self, instance: InstanceId) -> Result<Vec<DiskMark>>;

    /// Begins a backup; one of this name that there is already goes on. Conflict while there is another, and when a disk does not
    /// have all of the checkpoints that it is to be backed up since. Without an answer or with an error there is none, and no
    /// checkpoint.
    async fn begin(&self, instance: InstanceId, backup: DiskBackup) -> Result<()>;

    /// How far it is. Also of a guest that does not run any more.
    async fn state(&self, instance: InstanceId, id: DiskBackupId) -> Result<DiskBackupState>;

    /// Ends it, however far it is, and answers when nothing of it is in use any more; fine when there is none. A checkpoint of it
    /// stays.
    async fn end(&self, instance: InstanceId, id: DiskBackupId) -> Result<()>;
}

/// What a virtual machine is beside its disks and memory.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct MachineFiles {
    /// Variables of UEFI without secure boot.
    pub variables: Option<Vec<u8>>,
    /// Variables of UEFI with secure boot.
    pub secure_variables: Option<Vec<u8>>,
    /// What its TPM keeps: files by their names.
    pub tpm: BTreeMap<String, Vec<u8>>,
}

impl MachineFiles {
    /// Bytes of the variables of the UEFI firmware that is used (the build of 4 MiB); others fit no machine here.
    pub const VARIABLES: usize = 540_672;

    /// There is nothing.
    pub fn is_empty(&self) -> bool {
        self.variables.is_none() && self.secure_variables.is_none() && self.tpm.is_empty()
    }
}

/// Sizes only: a TPM's keys are in no log.
impl fmt::Debug for MachineFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes: Vec<_> = self.tpm.iter().map(|(name, bytes)| (name, bytes.len())).collect();
        f.debug_struct("MachineFiles")
            .field("variables", &self.variables.as_ref().map(Vec::len))
            .field("secure_variables", &self.secure_variables.as_ref().map(Vec::len))
            .field("tpm", &sizes)
            .finish()
    }
}

/// A running exec.
pub struct Exec {
    /// Standard streams.
    pub streams: ExecStreams,
    /// Controls it and tells how it ended.
    pub control: Box<dyn ExecControl>,
}

/// The descriptors of an exec; the data never passes through root.
#[derive(Debug)]
pub enum ExecStreams {
    /// Master side of a terminal (or a socket that behaves like it).
    Terminal(OwnedFd),
    /// Write end of stdin, read ends of stdout and stderr.
    Pipes {
        /// Write end.
        stdin: OwnedFd,
        /// Read end.
        stdout: OwnedFd,
        /// Read end.
        stderr: OwnedFd,
    },
}

/// Control of a running exec. Dropping it ends the program.
#[async_trait]
pub trait ExecControl: Send + Sync {
    /// New size of the terminal.
    async fn resize(&self, columns: u16, rows: u16) -> Result<()>;
    /// Sends a signal to the program.
    async fn signal(&self, signal: i32) -> Result<()>;
    /// Waits for its end: exit code, 128 + n when signal n ended it.
    async fn wait(&self) -> Result<i32>;
}

/// A file that was opened for reading.
#[derive(Debug)]
pub struct OpenedFile {
    /// What it is.
    pub info: FileInfo,
    /// Content of a regular file: a readable descriptor (file or pipe).
    pub content: Option<OwnedFd>,
    /// Entries of a directory, sorted.
    pub entries: Vec<String>,
    /// Target of a symbolic link.
    pub target: Option<String>,
}

/// Files inside a guest. Paths are the guest's own, absolute; links are followed inside the guest's root only.
#[async_trait]
pub trait GuestFiles: Send + Sync {
    /// Opens for reading. `root` is where the guest's root lies when it does not run (containers).
    async fn open(
        &self,
        instance: InstanceId,
        root: Option<&std::path::Path>,
        path: &str,
    ) -> Result<OpenedFile>;
    /// Writes; `content` is read to its end for a regular file.
    async fn write(
        &self,
        instance: InstanceId,
        root: Option<&std::path::Path>,
        request: FileWrite,
        content: Option<OwnedFd>,
    ) -> Result<()>;
    /// Deletes a file or an empty directory.
    async fn delete(&self, instance: InstanceId, root: Option<&std::path::Path>, path: &str) -> Result<()>;
}

/// File systems inside a guest that stand still while a snapshot is made.
#[async_trait]
pub trait Quiesce: Send + Sync {
    /// Freezes them and answers how many. They thaw after `limit` at the latest (two minutes at most), whatever happens to
    /// the caller: by Karst's own agent where that runs, and by the driver, because QEMU's has no such limit. What
    /// is frozen from an earlier call and paused stays so; what is frozen and runs thaws, and freezes again.
    async fn freeze(&self, instance: InstanceId, limit: std::time::Duration) -> Result<u32>;
    /// Thaws them and answers how many; fine when they are not frozen. Conflict when they had thawed by themselves before:
    /// the snapshot is not consistent then.
    async fn thaw(&self, instance: InstanceId) -> Result<u32>;
}
