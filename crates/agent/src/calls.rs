//! The calls of the agent protocol, version 1. One macro invocation declares each call once; the trait, the wire
//! enumeration and the dispatcher all come from it.

use crate::{
    acl_logs::AclLogRead,
    asks::GuestAsk,
    backups::{BackupCreate, BackupFacts, VolumeFill, VolumeFilled, VolumeWrite},
    checkpoints::{
        MachineBackupBegin, MachineBackupRef, MachineCheckpointCreate, MachineCheckpointDelete,
        MachineCheckpoints,
    },
    copies::{MachineCopyBegin, MachineCopyEnd, MachineCopyRef, MachineCopySpeed},
    descriptions::{FoundPool, PoolDescribe, PoolSurvey, PoolSurveyed, PoolsFind},
    displays::{DisplayGuardSet, DisplayGuarded, SpiceChannel},
    keys::KeysHand,
    layers::{MachineLayersAdd, MachineMergeBegin, MachineMergeEnd},
    memory::{MachineDump, MachineMemoryBegin, MachineMemoryEnd, MachineMemoryRef, MemoryFileChange},
    neighbours::{MemoryPeriod, Neighbour, NeighboursFind},
    outputs::ExecOutput,
    publish::{ImagePublish, VolumeRebuild},
    thresholds::DiskThresholdSet,
};
use async_trait::async_trait;
use karst_model::{
    AclId, BackupId, ByteSize, ImageId, InstanceId, NetworkId, NodeId, PoolId, Result, SagaId, SessionId,
    SnapshotId, VolumeId,
    audit::{AuditEntry, AuditHead, AuditRange, AuditRecord, AuditVerdict},
    guest::{
        Applied, CheckpointMark, DirtyRateMode, DiskBackupState, DiskCopyState, ExecRequest, FileInfo,
        FileWrite, MachineFigures, Metrics, MonitorAnswer, Observed, StopMode, ThresholdReached,
    },
    history::Series,
    image::{DiskFormat, ImageFacts},
    instance::{Generation, InstanceKind},
    memory::{MemoryState, SavedMemory},
    network::Lease,
    news::MachineNews,
    node::HostFacts,
    pool_life::FoundSource,
    spec::{GuestSpec, NetworkSpec, PoolSpec, VolumeSpec},
    storage::{Abilities, PoolKind, Usage},
};
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use std::{os::fd::OwnedFd, time::Duration};
use tokio::sync::mpsc;

/// Protocol versions that this build speaks; both sides offer their range at connect and use the highest in common.
pub const VERSIONS: std::ops::RangeInclusive<u32> = 1..=1;

/// What accompanies every call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallContext {
    /// Time the call may take from its arrival; the agent cancels it then. Always bounded.
    pub deadline: Duration,
    /// Who orders a mutation. `None` is allowed for reads only.
    pub fence: Option<Fence>,
}

/// Who executes sagas: the engine that acts for a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Executor {
    /// The node.
    pub node: NodeId,
    /// Grows with each start of an engine over the same store.
    pub epoch: u64,
}

/// Orders mutations: the agent durably remembers the highest epoch of each executor and refuses lower ones of the same, so
/// that a paused executor can do nothing after its successor took over, and those of other nodes go on (ADR 18).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence {
    /// The saga, or the nil UUID for reconcilers.
    pub saga: SagaId,
    /// Node of the executor. A saga has one; who takes it over from a dead node takes a new epoch in this node's name.
    pub executor: NodeId,
    /// Epoch of the executor.
    pub epoch: u64,
    /// Step within the saga.
    pub step: u32,
}

impl CallContext {
    /// For a read.
    pub fn read(deadline: Duration) -> Self {
        Self { deadline, fence: None }
    }
    /// For a mutation.
    pub fn mutate(deadline: Duration, fence: Fence) -> Self {
        Self { deadline, fence: Some(fence) }
    }
}

/// An answer with descriptors.
#[derive(Debug)]
pub struct WithFds<T> {
    /// The answer.
    pub value: T,
    /// Descriptors that the host opened for the caller; at most 4.
    pub fds: Vec<OwnedFd>,
}

/// How a call's answer becomes a value and descriptors on the wire, and back.
pub trait Answer: Sized + Send {
    /// Takes it apart.
    fn split(self) -> Result<(Box<RawValue>, Vec<OwnedFd>)>;
    /// Puts it together.
    fn join(value: Box<RawValue>, fds: Vec<OwnedFd>) -> Result<Self>;
}

/// Marks plain answers (no descriptors).
pub trait Plain: Serialize + for<'de> Deserialize<'de> + Send {}

impl<T: Plain> Answer for T {
    fn split(self) -> Result<(Box<RawValue>, Vec<OwnedFd>)> {
        Ok((to_raw_value(&self)?, vec![]))
    }
    fn join(value: Box<RawValue>, _: Vec<OwnedFd>) -> Result<Self> {
        Ok(serde_json::from_str(value.get())?)
    }
}

impl<T: Serialize + for<'de> Deserialize<'de> + Send> Answer for WithFds<T> {
    fn split(self) -> Result<(Box<RawValue>, Vec<OwnedFd>)> {
        Ok((to_raw_value(&self.value)?, self.fds))
    }
    fn join(value: Box<RawValue>, fds: Vec<OwnedFd>) -> Result<Self> {
        Ok(Self { value: serde_json::from_str(value.get())?, fds })
    }
}

macro_rules! plain { ($($t:ty),+ $(,)?) => { $( impl Plain for $t {} )+ } }
plain!(
    (),
    Vec<ImageId>,
    i32,
    HostFacts,
    crate::resources::HostResources,
    Vec<crate::resources::CpuModel>,
    Usage,
    Option<Abilities>,
    Vec<Lease>,
    Vec<Neighbour>,
    NetworkState,
    NetworkChoice,
    ImageFacts,
    Observed,
    Vec<Observed>,
    Applied,
    BackupFacts,
    PoolSurveyed,
    Vec<FoundPool>,
    Vec<FoundSource>,
    VolumeFilled,
    Vec<(InstanceId, Metrics)>,
    Vec<(InstanceId, MachineFigures)>,
    Vec<(VolumeId, Usage)>,
    Vec<ExecOutput>,
    Vec<Series>,
    serde_json::Value,
    MonitorAnswer,
    DiskCopyState,
    DiskBackupState,
    MemoryState,
    SavedMemory,
    Vec<CheckpointMark>,
    Vec<u8>,
    bool,
    u32,
    Vec<VolumeSnapshot>,
    SelfCheck,
    AuditHead,
    Vec<AuditRecord>,
    AuditVerdict
);

/// `mutate` calls carry a fence and are idempotent; `read` calls change nothing that outlives a session.
macro_rules! agent_calls {
    ($( $(#[$doc:meta])* $access:ident fn $name:ident($variant:ident: $request:ty) -> $answer:ty; )+) => {
        /// What the engine asks of a host. Implemented by the wire client, by the real agent and by the simulation; all
        /// pass one contract suite. Every call is bounded by its context's deadline and may be dropped to cancel it.
        #[async_trait]
        pub trait HostAgent: Send + Sync {
            $( $(#[$doc])* async fn $name(&self, context: &CallContext, request: $request) -> Result<$answer>; )+

            /// What happens on the host by itself. A bounded queue: a receiver that falls behind gets
            /// [`AgentEvent::Lost`] and must ask again for the whole ([`HostAgent::guest_observe_all`]).
            async fn events(&self) -> Result<mpsc::Receiver<AgentEvent>>;
        }

        /// A call on the wire.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "call", content = "request", rename_all = "snake_case")]
        #[allow(missing_docs)]
        pub enum Call { $( $variant($request), )+ }

        impl Call {
            /// Its name, for logs.
            pub fn name(&self) -> &'static str { match self { $( Self::$variant(_) => stringify!($name), )+ } }
            /// Must it carry a fence?
            pub fn is_mutation(&self) -> bool { match self { $( Self::$variant(_) => agent_calls!(@ $access), )+ } }
            /// All names.
            pub const NAMES: &'static [&'static str] = &[ $( stringify!($name), )+ ];
        }

        /// Executes a call that came over the wire on `agent`.
        pub async fn dispatch(agent: &dyn HostAgent, context: &CallContext, call: Call) -> Result<(Box<RawValue>, Vec<OwnedFd>)> {
            match call { $( Call::$variant(request) => agent.$name(context, request).await?.split(), )+ }
        }

        /// Something that carries a call to an agent elsewhere and brings back its answer; gets the whole trait by
        /// [`agent_calls_over_transport!`].
        #[async_trait]
        pub trait Transport: Send + Sync {
            /// Carries one call.
            async fn carry(&self, context: &CallContext, call: Call) -> Result<(Box<RawValue>, Vec<OwnedFd>)>;
            /// Subscribes to events.
            async fn subscribe(&self) -> Result<mpsc::Receiver<AgentEvent>>;
        }

        /// The trait over any transport.
        pub struct Remote<T>(pub T);

        #[async_trait]
        impl<T: Transport> HostAgent for Remote<T> {
            $( async fn $name(&self, context: &CallContext, request: $request) -> Result<$answer> {
                let (value, fds) = self.0.carry(context, Call::$variant(request)).await?;
                <$answer as Answer>::join(value, fds)
            } )+
            async fn events(&self) -> Result<mpsc::Receiver<AgentEvent>> { self.0.subscribe().await }
        }
    };
    (@ read) => { false };
    (@ mutate) => { true };
}

agent_calls! {
    /// Adds entries to the host's audit log, in order; those that it has already, by their origin, are left out.
    mutate fn audit_append(AuditAppend: Vec<AuditEntry>) -> AuditHead;
    /// A part of the audit log.
    read fn audit_read(AuditRead: AuditRange) -> Vec<AuditRecord>;
    /// Checks the chain of the audit log as far as it is kept.
    read fn audit_verify(AuditVerify: ()) -> AuditVerdict;

    /// What the machine is.
    read fn host_facts(HostFacts: ()) -> HostFacts;
    /// What hardware it has.
    read fn host_resources(HostResources: ()) -> crate::resources::HostResources;
    /// What CPU models its QEMU has. The first call takes a second or two.
    read fn host_cpu_models(HostCpuModels: ()) -> Vec<crate::resources::CpuModel>;
    /// Does what the agent keeps agree with what it finds (leaks, missing things)? For tests and `admin check`.
    read fn self_check(SelfCheck: ()) -> SelfCheck;

    /// Makes the pool usable.
    mutate fn pool_ensure(PoolEnsure: PoolSpec) -> ();
    /// Makes a pool usable that was made before: what is missing is an error, because it is only hidden.
    mutate fn pool_open(PoolOpen: PoolSpec) -> ();
    /// Lets go of a pool: mounts and devices go, what is in it and what the host knows of it stay, and the host opens it again when
    /// it is told to, also after a start of its own. Refused while a guest runs from it, naming the guest, and while a call is
    /// at work in it. One that the host does not know is let go of already.
    mutate fn pool_close(PoolClose: PoolId) -> ();
    /// Grows a pool that lies in a file of its own, while it is in use. What has its size already stays; smaller is refused.
    mutate fn pool_grow(PoolGrow: PoolGrow) -> ();
    /// Forgets an empty pool and removes its directory.
    mutate fn pool_remove(PoolRemove: PoolId) -> ();
    /// Space of a pool.
    read fn pool_usage(PoolUsage: PoolId) -> Usage;
    /// What the file system of a pool of directories can, as it was tried when the pool was opened.
    read fn pool_abilities(PoolAbilities: PoolId) -> Option<Abilities>;
    /// Waits until what was made in a pool is on disk: snapshots of volumes that a guest uses, and volumes of images. All else
    /// is as soon as it is there.
    read fn pool_flush(PoolFlush: PoolId) -> ();
    /// Writes descriptions onto a pool, each in one step; those that say what is there already cost next to nothing.
    mutate fn pool_describe(PoolDescribe: PoolDescribe) -> ();
    /// What a pool has, by itself: volumes, their snapshots and descriptions. Changes none of them; a pool that the host does
    /// not have in use is opened for as long as that takes.
    read fn pool_survey(PoolSurvey: PoolSurvey) -> PoolSurveyed;
    /// Pools that the host knows, or that were made in a place of the host.
    read fn pools_find(PoolsFind: PoolsFind) -> Vec<FoundPool>;
    /// What of the host could become a pool of a kind, as far as its policy grants it: volume groups, zpools.
    read fn pool_sources(PoolSources: PoolKind) -> Vec<FoundSource>;

    /// Chooses a free bridge name and free subnets.
    read fn network_choose(NetworkChoose: NetworkChoose) -> NetworkChoice;
    /// Makes or reconciles a network, its firewall, DHCP and DNS, and its known guests.
    mutate fn network_ensure(NetworkEnsure: NetworkSpec) -> ();
    /// Removes a network.
    mutate fn network_remove(NetworkRemove: NetworkId) -> ();
    /// Removes a network though guests that run are on it: their interfaces stay, down and in no bridge, until it is made again.
    mutate fn network_stop(NetworkStop: NetworkId) -> ();
    /// DHCP leases and static assignments.
    read fn network_leases(NetworkLeases: NetworkId) -> Vec<Lease>;
    /// What the rules of a network ACL logged on this host, one entry of JSON a line; empty of one that logged nothing.
    read fn acl_log(AclLog: AclLogRead) -> Vec<u8>;
    /// Forgets what an ACL logged, which is gone.
    mutate fn acl_log_remove(AclLogRemove: AclId) -> ();
    /// Addresses of neighbours of the host, as its kernel has learned them (ARP, neighbour discovery).
    read fn neighbours(Neighbours: NeighboursFind) -> Vec<Neighbour>;
    /// State of the bridge.
    read fn network_state(NetworkState: NetworkId) -> NetworkState;
    /// State of an interface of the host, which its policy must grant.
    read fn link_state(LinkState: String) -> NetworkState;

    /// Makes a volume; complete or not at all.
    mutate fn volume_create(VolumeCreate: VolumeSpec) -> ();
    /// Deletes a volume with all its snapshots.
    mutate fn volume_delete(VolumeDelete: VolumeRef) -> ();
    /// Grows a volume; the limit of a tree may also shrink, to no less than what it holds.
    mutate fn volume_resize(VolumeResize: VolumeResize) -> ();
    /// Space of a volume.
    read fn volume_usage(VolumeUsage: VolumeRef) -> Usage;
    /// Space of several volumes, at most [`MAX_USAGES`]. Those that are not there are left out, and so are those whose space
    /// is not known within two seconds.
    read fn volume_usages(VolumeUsages: Vec<VolumeRef>) -> Vec<(VolumeId, Usage)>;

    /// Freezes a volume's content now under an id. What a running guest has not written yet is not in it (as after a power
    /// cut), so the caller pauses the guest around the calls for all its volumes: then they are of one instant, and its
    /// own caches are on disk if its agent froze the file systems before. A virtual machine that runs and is not paused is
    /// refused where the pool could not take a whole disk at one instant.
    mutate fn volume_snapshot_create(VolumeSnapshotCreate: VolumeSnapshotRef) -> ();
    /// Deletes a snapshot; an unknown one is gone already. Snapshots do not depend on each other.
    mutate fn volume_snapshot_delete(VolumeSnapshotDelete: VolumeSnapshotRef) -> ();
    /// Makes the volume what it was, its size included; other snapshots, also later ones, stay. Refused while a guest uses
    /// the volume.
    mutate fn volume_snapshot_restore(VolumeSnapshotRestore: VolumeSnapshotRef) -> ();
    /// Snapshots of a volume, by id.
    read fn volume_snapshots(VolumeSnapshots: VolumeRef) -> Vec<VolumeSnapshot>;
    /// Makes an existing volume what another of the same content is, of this or another pool, its size included; moves no
    /// more than what differs where both pools can. Its snapshots stay. Refused while a guest uses it.
    mutate fn volume_refresh(VolumeRefresh: VolumeRefresh) -> ();
    /// Makes an existing volume what an image is, or empty, with the size given. Its snapshots stay. Refused while a guest
    /// uses it.
    mutate fn volume_rebuild(VolumeRebuild: VolumeRebuild) -> ();
    /// Streams a volume's content: one descriptor to read, to its end. The stream is whole when `session_wait` answers 0.
    read fn volume_export(VolumeExport: VolumeExport) -> WithFds<SessionId>;
    /// Replaces the content of an existing volume by a stream: one descriptor to write and close. It is replaced, in one
    /// step, when `session_wait` answers 0; until then, and if that fails or the session is closed before, it stays as it
    /// was. Its snapshots stay. Refused while a guest uses the volume.
    mutate fn volume_import(VolumeImport: VolumeImport) -> WithFds<SessionId>;

    /// Opens a disk as it is now, by the rules of a snapshot: one descriptor that reads its bytes from any place, with holes
    /// where it has nothing. The volume does not change until the session is closed, which whoever asked for it must do.
    read fn volume_open(VolumeOpen: VolumeRef) -> WithFds<SessionId>;

    /// Packs a volume with snapshots into one file in Incus' backup format; complete or not at all.
    mutate fn backup_create(BackupCreate: BackupCreate) -> BackupFacts;
    /// Opens a staging file for a backup to be uploaded: one write-only descriptor. It is dropped an hour after it was last
    /// touched and at the agent's start.
    mutate fn backup_stage(BackupStage: BackupId) -> WithFds<()>;
    /// What a staged backup says of itself, read by a worker without privileges.
    read fn backup_inspect(BackupInspect: BackupId) -> BackupFacts;
    /// Opens a backup that was made here for reading: one descriptor.
    read fn backup_open(BackupOpen: BackupId) -> WithFds<BackupFacts>;
    /// Deletes a backup, made or staged; an unknown one is gone already.
    mutate fn backup_delete(BackupDelete: BackupId) -> ();
    /// Replaces the content of an existing volume by what a staged backup has of it, in one step; on failure it stays as it
    /// was. Its snapshots stay. Refused while a guest uses the volume.
    mutate fn volume_fill(VolumeFill: VolumeFill) -> VolumeFilled;
    /// Puts a staged file over a part of a disk, in one step; on failure it stays as it was. Holes of the file become holes.
    /// The disk keeps its size and its snapshots. Refused while a guest uses the volume.
    mutate fn volume_write(VolumeWrite: VolumeWrite) -> ();

    /// Opens a staging file for a part of an image to be uploaded: one write-only descriptor. Staged parts are bounded by
    /// the host's policy in number, size and age; one that goes beyond is dropped, and its import fails with the limit's
    /// name. All are dropped at the agent's start.
    mutate fn image_stage(ImageStage: ImageStage) -> WithFds<ImageStaged>;
    /// Images of which parts are staged: uploads that go on, or that nobody will finish.
    read fn image_staged(ImageStaged: ()) -> Vec<ImageId>;
    /// Checks and unpacks the staged parts in a worker without privileges.
    mutate fn image_import(ImageImport: ImageImport) -> ImageFacts;
    /// Builds an image of a recipe; progress comes as events with the image's id.
    mutate fn image_build(ImageBuild: ImageBuild) -> ImageFacts;
    /// Makes an image of a volume or of a snapshot of one; complete or not at all.
    mutate fn image_publish(ImagePublish: ImagePublish) -> ImageFacts;
    /// Deletes an image's content and staged parts.
    mutate fn image_delete(ImageDelete: ImageId) -> ();
    /// Opens the files of an image as uploaded, for reading: one descriptor each, in order.
    read fn image_export(ImageExport: ImageId) -> WithFds<Vec<ImageFile>>;

    /// Hands over passphrases of encrypted disks for a call that is to come: the making of a volume, a start or a change of a guest.
    /// They are in memory until that call has ended, or for ten minutes, and nowhere else.
    read fn keys_hand(KeysHand: KeysHand) -> ();
    /// Starts a guest; answers when its processes run.
    mutate fn guest_start(GuestStart: GuestSpec) -> Observed;
    /// Stops a guest.
    mutate fn guest_stop(GuestStop: GuestStop) -> Observed;
    /// Asks a running guest to shut down or to boot anew, and waits for neither; each call asks again. A guest that stands still
    /// finds its power button pressed when it goes on. Containers do not boot anew by themselves. By the agent alone: unavailable
    /// without one.
    read fn guest_ask(GuestAsk: GuestAsk) -> ();
    /// Freezes a guest.
    mutate fn guest_pause(GuestPause: GuestRef) -> Observed;
    /// Continues a guest.
    mutate fn guest_resume(GuestResume: GuestRef) -> Observed;
    /// Makes the file systems inside a running virtual machine still and answers how many, for as long as it runs `limit`
    /// at most. Unavailable or unsupported where no agent inside can; a container's are the host's own, and nothing is
    /// done. One that is still from an earlier call and paused stays so.
    mutate fn guest_quiesce(GuestQuiesce: GuestQuiesce) -> u32;
    /// Lets them go on and answers how many; fine when they were not still. Conflict when they had gone on before.
    mutate fn guest_thaw(GuestThaw: GuestRef) -> u32;
    /// Applies changed limits to a running guest.
    mutate fn guest_update(GuestUpdate: GuestSpec) -> Applied;
    /// Keeps what a virtual machine is beside its disks with a snapshot: firmware variables, TPM, and the memory of one that
    /// is paused if asked for. One that never ran has nothing.
    mutate fn machine_state_save(MachineStateSave: MachineStateSave) -> ();
    /// Makes a virtual machine that does not run what it was at a snapshot, its memory for the next start if asked for.
    mutate fn machine_state_restore(MachineStateRestore: MachineStateRestore) -> ();
    /// Makes what a virtual machine is beside its disks and memory, now or at a snapshot, that of another one, for its next
    /// start or at a snapshot of it. Where there is nothing there is nothing then. Conflict when that one runs and is to
    /// be changed.
    mutate fn machine_state_copy(MachineStateCopy: MachineStateCopy) -> ();
    /// Drops what is kept with a snapshot; fine when nothing is.
    mutate fn machine_state_delete(MachineStateDelete: MachineStateRef) -> ();
    /// Drops the memory that a virtual machine which does not run keeps over its stop; fine when there is none.
    mutate fn machine_memory_drop(MachineMemoryDrop: InstanceId) -> ();
    /// Begins to copy a disk of a running virtual machine into another volume, of exactly its size and of whose content nothing
    /// needs to be kept; a copy that goes on already is fine. Until its end both volumes are in use, and the disk is neither
    /// changed nor taken away.
    mutate fn machine_copy_begin(MachineCopyBegin: MachineCopyBegin) -> ();
    /// How far it is. That a machine goes on from a copy is known until its next start, also when it has ended meanwhile.
    read fn machine_copy_state(MachineCopyState: MachineCopyRef) -> DiskCopyState;
    /// Sets the bytes a second that it may copy. Conflict when there is none.
    mutate fn machine_copy_speed(MachineCopySpeed: MachineCopySpeed) -> ();
    /// Ends a copy. A machine that goes on from it stands still for a moment; conflict unless the copy is ready, or when the
    /// machine does not run any more and had not gone on from it. To cancel one that there is none of is fine; conflict when
    /// the machine goes on from it already.
    mutate fn machine_copy_end(MachineCopyEnd: MachineCopyEnd) -> ();
    /// Lets disks of a virtual machine go on in new layers, all at one moment or none; what is done already is fine. Of one that does
    /// not run the layers are there at its next start. Unsupported in pools whose volumes are no files.
    mutate fn machine_layers_add(MachineLayersAdd: MachineLayersAdd) -> ();
    /// Takes layers back that could not be put over all disks; answers whether the disks have them all the same, because their
    /// guest went on in them.
    mutate fn machine_layers_take_back(MachineLayersTakeBack: MachineLayersAdd) -> bool;
    /// Begins to make files of a disk of a running virtual machine one; a merge that goes on already is fine. How far it is
    /// and how fast it may be are those of a copy of the disk to its own volume.
    mutate fn machine_merge_begin(MachineMergeBegin: MachineMergeBegin) -> ();
    /// Ends a merge, as a copy: after a pivot the disk is what is left, and the other files are gone.
    mutate fn machine_merge_end(MachineMergeEnd: MachineMergeEnd) -> ();
    /// Makes a checkpoint of a running virtual machine: from one moment on, the same for all its disks, the host follows what
    /// changes. One that is there is fine. Unsupported for a disk whose format cannot keep it.
    mutate fn machine_checkpoint_create(MachineCheckpointCreate: MachineCheckpointCreate) -> ();
    /// Takes a checkpoint away; the one before it has then what it had. Fine when it is not there; of a machine that does not run
    /// nothing happens, and what is left goes with its next checkpoint or backup. Conflict then, and without one of its disks, for
    /// one between two others, which would miss in what changed since the one before.
    mutate fn machine_checkpoint_delete(MachineCheckpointDelete: MachineCheckpointDelete) -> ();
    /// What disks of a running virtual machine have of checkpoints.
    read fn machine_checkpoints(MachineCheckpoints: MachineCheckpoints) -> Vec<CheckpointMark>;
    /// Begins a backup of disks of a running virtual machine, all of one moment; one of this id that goes on already is fine. Until
    /// its end all volumes of it are in use, and the disks are neither changed nor taken away. On an error there is none, and no
    /// checkpoint.
    mutate fn machine_backup_begin(MachineBackupBegin: MachineBackupBegin) -> ();
    /// How far it is.
    read fn machine_backup_state(MachineBackupState: MachineBackupRef) -> DiskBackupState;
    /// Ends it, however far it is; nothing of it is in use then. Fine when there is none. A checkpoint of it stays.
    mutate fn machine_backup_end(MachineBackupEnd: MachineBackupRef) -> ();
    /// Begins to write the state or memory of a running virtual machine into a file that the host's policy grants; what is written
    /// under this id already is fine. The file gets its name at the end: until then, and on an error, what is there stays. What is
    /// saved stands still from now on. Conflict when something else is there than saved memory, or anything where memory is
    /// dumped; unsupported for a machine that QEMU cannot save.
    mutate fn machine_memory_begin(MachineMemoryBegin: MachineMemoryBegin) -> ();
    /// How far it is.
    read fn machine_memory_state(MachineMemoryState: MachineMemoryRef) -> MemoryState;
    /// Ends it. To keep it is a conflict unless it is done; it may be said again. To cancel one that there is none of is fine, and
    /// memory of a machine that has ended since it was kept stays. A cancel answers when the machine goes on.
    mutate fn machine_memory_end(MachineMemoryEnd: MachineMemoryEnd) -> ();
    /// Dumps the memory of a running virtual machine, which stands still for so long, into a file without a name, below what the host's
    /// policy grants: one descriptor that reads it, and its bytes. Conflict while memory of it is written already; unsupported for a
    /// container, and in a form that QEMU or the guest does not have.
    read fn machine_memory_dump(MachineMemoryDump: MachineDump) -> WithFds<u64>;
    /// What a file with saved memory, which the host's policy grants, says of itself. Invalid for what is none, or is not whole.
    read fn memory_file_read(MemoryFileRead: String) -> SavedMemory;
    /// Has it say something else, in one step.
    mutate fn memory_file_change(MemoryFileChange: MemoryFileChange) -> ();
    /// Removes all that a stopped guest has on the host but its volumes.
    mutate fn guest_destroy(GuestDestroy: InstanceId) -> ();
    /// Every guest that the host knows.
    read fn guest_observe_all(GuestObserveAll: ()) -> Vec<Observed>;
    /// Figures of these guests (all running ones when empty); one that does not run is left out.
    read fn guest_metrics(GuestMetrics: Vec<InstanceId>) -> Vec<(InstanceId, Metrics)>;
    /// The same with what monitoring alone reads, which costs more.
    read fn guest_details(GuestDetails: Vec<InstanceId>) -> Vec<(InstanceId, Metrics)>;
    /// What a guest used over time, one series for each resolution; without points of one that never ran here, or is gone.
    read fn guest_history(GuestHistory: InstanceId) -> Vec<Series>;
    /// What these virtual machines (all running ones when empty) have done; one that does not run is left out.
    read fn machine_figures(MachineFigures: Vec<InstanceId>) -> Vec<(InstanceId, MachineFigures)>;
    /// Runs a command of the QEMU guest agent's protocol in a virtual machine, and answers what it returns.
    read fn guest_agent(GuestAgent: AgentCommand) -> serde_json::Value;
    /// Interrupts a running virtual machine without regard to masks (NMI).
    read fn machine_interrupt(MachineInterrupt: GuestRef) -> ();
    /// Wakes a virtual machine that sleeps.
    read fn machine_wake(MachineWake: GuestRef) -> ();
    /// Runs a command of QEMU's monitor in a running virtual machine, as far as the host's policy grants it.
    read fn machine_monitor(MachineMonitor: MonitorCommand) -> MonitorAnswer;
    /// Follows the events of QEMU's monitor of all virtual machines, where the host's policy grants it: one descriptor that
    /// reads lines of JSON ([`MonitorEvent`](karst_model::guest::MonitorEvent)).
    read fn machine_events(MachineEvents: ()) -> WithFds<()>;
    /// Has it told as [`AgentEvent::DiskThreshold`], once, when a running virtual machine writes behind a byte of what a disk
    /// lies in. The machine keeps that until then, or until its end. Invalid without such a disk.
    read fn machine_threshold(MachineThreshold: DiskThresholdSet) -> ();
    /// How often a running virtual machine tells of its memory; its figures say it then. Until its end; else every ten seconds
    /// from the first time on that somebody asks. Unsupported without a balloon.
    read fn machine_memory_period(MachineMemoryPeriod: MemoryPeriod) -> ();
    /// Begins to measure how fast a running virtual machine writes memory; its figures say it then.
    read fn machine_dirty_rate(MachineDirtyRate: DirtyRateRequest) -> ();

    /// A process is about to enter the groups of a guest, which starts or is to run a program. A hint that lets the host
    /// prepare; nothing follows from it and it may be lost.
    read fn entry_expected(EntryExpected: ()) -> ();
    /// Runs a program in a guest. Descriptors: one terminal, or stdin, stdout, stderr.
    read fn exec_start(ExecStart: ExecStart) -> WithFds<SessionId>;
    /// New size of a session's terminal.
    read fn session_resize(SessionResize: SessionResize) -> ();
    /// Signal to a session's program.
    read fn session_signal(SessionSignal: SessionSignal) -> ();
    /// Waits for the end of a session: the exit code of an exec, 0 when a file was written whole.
    read fn session_wait(SessionWait: SessionId) -> i32;
    /// Ends a session.
    read fn session_close(SessionClose: SessionId) -> ();
    /// Keeps what a program prints, by the bounds of [`crate::outputs`], in place of what is kept under the same name: one
    /// write-only descriptor; it is whole when `session_wait` answers 0.
    read fn exec_output_keep(ExecOutputKeep: ExecOutput) -> WithFds<SessionId>;
    /// What is kept of a guest, the oldest first.
    read fn exec_outputs(ExecOutputs: InstanceId) -> Vec<ExecOutput>;
    /// Opens what is kept: one descriptor for reading.
    read fn exec_output_open(ExecOutputOpen: ExecOutput) -> WithFds<()>;
    /// Deletes what is kept.
    read fn exec_output_delete(ExecOutputDelete: ExecOutput) -> ();
    /// Attaches to the console: one descriptor, both ways.
    read fn console_attach(ConsoleAttach: ConsoleAttach) -> WithFds<SessionId>;
    /// Attaches to a port of a running virtual machine that leads to who attaches: one descriptor, both ways.
    read fn port_attach(PortAttach: PortAttach) -> WithFds<SessionId>;
    /// Presses the reset button of a running virtual machine.
    read fn guest_reset(GuestReset: GuestRef) -> ();
    /// Presses keys of a running virtual machine.
    read fn guest_keys(GuestKeys: KeyPresses) -> ();
    /// What a running virtual machine shows: one descriptor that reads a PNG file.
    read fn guest_screenshot(GuestScreenshot: InstanceId) -> WithFds<()>;
    /// Attaches to the display of a running virtual machine: one descriptor, both ways, that speaks RFB (VNC). Nothing is asked.
    read fn display_attach(DisplayAttach: InstanceId) -> WithFds<SessionId>;
    /// The same, where whoever is at the other end has to prove that he knows the password (RFB's "VNC authentication").
    read fn display_attach_guarded(DisplayAttachGuarded: DisplayGuarded) -> WithFds<SessionId>;
    /// Attaches a channel of a viewer to the display of a running virtual machine: one descriptor, both ways, that speaks SPICE.
    /// Unsupported where the machine was started without, saying whether it was not asked for or QEMU cannot.
    read fn display_attach_spice(DisplayAttachSpice: SpiceChannel) -> WithFds<SessionId>;
    /// Tells a running virtual machine the password of its display, for those who are being asked for it just now. The host keeps
    /// none: each attachment brings it along.
    read fn display_guard(DisplayGuard: DisplayGuardSet) -> ();
    /// The kept console log.
    read fn console_log(ConsoleLog: ConsoleLog) -> Vec<u8>;

    /// Opens a file in a guest for reading; a regular file comes with one descriptor.
    read fn file_open(FileOpen: FileRef) -> WithFds<FileOpened>;
    /// Writes a file: for a regular file answers a session and one write-only descriptor; the file is whole when
    /// `session_wait` answers 0. Other kinds are made at once and have no session.
    read fn file_write(FileWrite: FileWriteRequest) -> WithFds<Option<SessionId>>;
    /// Deletes a file or an empty directory.
    read fn file_delete(FileDelete: FileRef) -> ();
}

/// What the agent says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct SelfCheck {
    /// Volumes that it keeps.
    pub volumes: Vec<VolumeId>,
    /// Their snapshots.
    #[serde(default)]
    pub snapshots: Vec<(VolumeId, SnapshotId)>,
    /// Backups that it keeps.
    #[serde(default)]
    pub backups: Vec<BackupId>,
    /// Images that it keeps.
    pub images: Vec<ImageId>,
    /// Networks that it keeps.
    pub networks: Vec<NetworkId>,
    /// Guests that it knows, running or with state.
    pub guests: Vec<InstanceId>,
    /// What it keeps of virtual machines with snapshots.
    #[serde(default)]
    pub machine_states: Vec<(InstanceId, SnapshotId)>,
    /// Open sessions.
    pub sessions: u32,
    /// Things that should not be there, in words.
    pub leaks: Vec<String>,
}

/// What a bridge should be called if free.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkChoose {
    /// Wanted name; a number is appended or replaced while it is taken.
    pub name: String,
    /// Subnets that other networks of the platform have.
    pub taken: Vec<ipnet::Ipv4Net>,
}

/// A free name and subnet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkChoice {
    /// Interface name.
    pub name: String,
    /// Host address with prefix.
    pub ipv4: ipnet::Ipv4Net,
    /// A private /64, as its first host address; `None` where the host's kernel has no IPv6.
    #[serde(default)]
    pub ipv6: Option<ipnet::Ipv6Net>,
}

/// State of a bridge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct NetworkState {
    /// MAC address.
    pub mac: String,
    /// MTU.
    pub mtu: u32,
    /// Link is up.
    pub up: bool,
    /// Addresses: address, prefix, scope.
    pub addresses: Vec<(std::net::IpAddr, u8, String)>,
    /// Bytes received and sent, packets received and sent.
    pub counters: [u64; 4],
    /// Ports of the bridge.
    pub ports: Vec<String>,
}

/// Volumes of one call of `volume_usages`.
pub const MAX_USAGES: usize = 1024;

/// A volume in its pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRef {
    /// Pool.
    pub pool: PoolId,
    /// Volume.
    pub volume: VolumeId,
}

/// A larger pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolGrow {
    /// Which.
    pub pool: PoolId,
    /// How large its file is to be.
    pub size: ByteSize,
}

/// A new size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeResize {
    /// Which.
    pub volume: VolumeRef,
    /// How large. A disk does not shrink; a tree does as far as its pool lets it, and not below what it holds.
    pub size: ByteSize,
}

/// A snapshot of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSnapshotRef {
    /// Pool.
    pub pool: PoolId,
    /// Volume.
    pub volume: VolumeId,
    /// Snapshot; unique among the volume's.
    pub snapshot: SnapshotId,
}

/// What is known of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSnapshot {
    /// Which.
    pub snapshot: SnapshotId,
    /// Size of the disk or limit of the tree then.
    pub size: Option<ByteSize>,
}

/// A volume to be made what another is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRefresh {
    /// Which changes.
    pub volume: VolumeRef,
    /// What it becomes.
    pub from: VolumeRef,
    /// As that was then; `None`: now.
    pub snapshot: Option<SnapshotId>,
    /// As a full copy, which shares nothing with the other.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub full: bool,
}

/// How a volume's content travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StreamFormat {
    /// Trees: a tar stream (POSIX.1-2001 pax), paths relative to the root of the tree, numeric owners as the guest sees
    /// them, hard links, extended attributes as `SCHILY.xattr.*`. An import may be compressed by gzip, xz, zstd or bzip2.
    Tar,
    /// Disks: the bytes of the disk. An import whose length is no multiple of 512 is filled up with zeros.
    Raw,
    /// Disks: qcow2, self-contained.
    Qcow2,
    /// Disks, import only: VMware's, of one file.
    Vmdk,
}

/// A volume to be streamed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeExport {
    /// Which.
    pub volume: VolumeRef,
    /// As it was then; `None`: now, by the rules of a snapshot.
    pub snapshot: Option<SnapshotId>,
    /// How; [`StreamFormat::Tar`] for a tree and only for one.
    pub format: StreamFormat,
}

/// A volume to be filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeImport {
    /// Which. A disk grows to the size of what comes where that is larger.
    pub volume: VolumeRef,
    /// How the content comes: stated, never probed.
    pub format: StreamFormat,
}

/// Part of an image's upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImagePart {
    /// One tarball with everything.
    Unified,
    /// The metadata tarball of a split image.
    Metadata,
    /// The root file system (tarball, squashfs) of a split image.
    Rootfs,
    /// The disk (qcow2) of a split image.
    Disk,
}

/// A part to be uploaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStage {
    /// Image.
    pub image: ImageId,
    /// Part.
    pub part: ImagePart,
}

/// A part that may be uploaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStaged {
    /// Bytes that it may have.
    pub limit: u64,
}

/// Staged parts to be imported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageImport {
    /// Image.
    pub image: ImageId,
    /// Parts in the order of the fingerprint.
    pub parts: Vec<ImagePart>,
    /// The only part is a disk of this format.
    #[serde(default)]
    pub disk: Option<DiskFormat>,
}

/// A recipe to be built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageBuild {
    /// Image.
    pub image: ImageId,
    /// `debian/12`.
    pub recipe: String,
    /// For which kind.
    pub kind: InstanceKind,
}

/// A file of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFile {
    /// Part.
    pub part: ImagePart,
    /// Bytes.
    pub size: u64,
    /// File name for clients, such as `FINGERPRINT.tar.xz`.
    pub filename: String,
}

/// A guest at a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestRef {
    /// Which.
    pub instance: InstanceId,
    /// The start that is meant; conflict when the host runs a newer one.
    pub generation: Generation,
}

/// File systems to be made still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestQuiesce {
    /// Of which guest.
    pub guest: GuestRef,
    /// For how long at most; two minutes are the longest.
    pub limit: Duration,
}

/// A guest to be stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStop {
    /// Which.
    pub guest: GuestRef,
    /// How.
    pub mode: StopMode,
}

/// A program to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecStart {
    /// Where.
    pub instance: InstanceId,
    /// What.
    pub request: ExecRequest,
}

/// New size of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionResize {
    /// Session.
    pub session: SessionId,
    /// Columns.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

/// A signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionSignal {
    /// Session.
    pub session: SessionId,
    /// Linux' number.
    pub signal: i32,
}

/// Console to attach to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleAttach {
    /// Whose.
    pub instance: InstanceId,
    /// Ends the attachment that is there.
    pub force: bool,
}

/// Port to attach to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortAttach {
    /// Whose.
    pub instance: InstanceId,
    /// Name of its device.
    pub port: String,
    /// Ends the attachment that is there.
    pub force: bool,
}

/// What a virtual machine was beside its disks, at a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineStateRef {
    /// Whose.
    pub instance: InstanceId,
    /// When.
    pub snapshot: SnapshotId,
}

/// What is to be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineStateSave {
    /// Under which snapshot.
    pub at: MachineStateRef,
    /// The memory too.
    pub memory: bool,
}

/// What is to be brought back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineStateRestore {
    /// Of which snapshot.
    pub at: MachineStateRef,
    /// The memory too, for the next start.
    pub memory: bool,
}

/// What is to become another machine's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineStateCopy {
    /// Of which machine.
    pub from: InstanceId,
    /// As it was at a snapshot; `None`: now.
    pub at: Option<SnapshotId>,
    /// Whose it becomes; another machine.
    pub to: InstanceId,
    /// At this snapshot; `None`: for its next start.
    pub to_at: Option<SnapshotId>,
}

/// A command of the QEMU guest agent's protocol.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AgentCommand {
    /// Where.
    pub instance: InstanceId,
    /// Its name, such as `guest-ping`.
    pub command: String,
    /// Its arguments, an object.
    pub arguments: serde_json::Value,
    /// How long its answer is waited for.
    pub limit: Duration,
}

/// A command of QEMU's monitor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MonitorCommand {
    /// Where.
    pub instance: InstanceId,
    /// Its name, such as `query-status`.
    pub command: String,
    /// Its arguments, an object.
    pub arguments: serde_json::Value,
}

/// A measurement of how fast memory is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtyRateRequest {
    /// Where.
    pub instance: InstanceId,
    /// How long, 1 to 60 seconds.
    pub seconds: u32,
    /// How.
    #[serde(default)]
    pub mode: DirtyRateMode,
}

/// Keys to press, one chord after the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyPresses {
    /// Whose.
    pub instance: InstanceId,
    /// Chords of checked key names, such as `["ctrl", "alt", "delete"]`.
    pub chords: Vec<Vec<String>>,
}

/// Console log to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleLog {
    /// Whose.
    pub instance: InstanceId,
    /// At most so many bytes, the newest.
    pub max: u32,
    /// Empty it.
    pub clear: bool,
    /// What the program that runs the guest said, rather than the guest's console.
    #[serde(default)]
    pub runner: bool,
}

/// A file in a guest, or in a volume that is a tree by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRef {
    /// Whose; of a volume by itself the id of that, and a container's kind: it is reached as the root of one that does not run.
    pub instance: InstanceId,
    /// Kind of the guest.
    pub kind: InstanceKind,
    /// Root volume, where files of a stopped container lie.
    pub root: VolumeRef,
    /// Absolute path inside.
    pub path: String,
}

/// An opened file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileOpened {
    /// What it is.
    pub info: FileInfo,
    /// Entries of a directory.
    pub entries: Vec<String>,
    /// Target of a symbolic link.
    pub target: Option<String>,
}

/// A file to be written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileWriteRequest {
    /// Where; its `path` is the file's.
    pub file: FileRef,
    /// How.
    pub write: FileWrite,
}

/// What happens on a host by itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum AgentEvent {
    /// A guest changed its state.
    Guest {
        /// What was seen.
        observed: Box<Observed>,
    },
    /// A virtual machine has written behind the threshold of a disk.
    DiskThreshold {
        /// Which.
        reached: ThresholdReached,
    },
    /// Something happened in a virtual machine. Of these a receiver that falls behind misses some and is not told: there are as
    /// many as a guest likes.
    Machine {
        /// What.
        news: MachineNews,
    },
    /// Progress of a build or import.
    ImageProgress {
        /// Which.
        image: ImageId,
        /// Stage in words.
        stage: String,
        /// 0 to 100 where it is known.
        percent: Option<u8>,
    },
    /// The receiver was too slow and missed events.
    Lost,
}
