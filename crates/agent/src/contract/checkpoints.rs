//! Checkpoints of a virtual machine's disk, and backups of it while it runs.

use super::*;
use crate::checkpoints::*;
use karst_model::{
    CheckpointId, DiskBackupId,
    guest::{DiskBackupPhase, DiskBackupState, StopMode, scratch_size},
};
use std::net::SocketAddr;

/// A machine that runs, and the volume that is its root.
struct Machine<'a> {
    s: &'a Subject,
    guest: GuestRef,
    root: VolumeRef,
}

impl Machine<'_> {
    fn id(&self) -> CheckpointId {
        CheckpointId(self.s.env.uuid())
    }

    async fn volume(&self, bytes: u64) -> VolumeRef {
        let pool = self.root.pool;
        let spec = self.s.volume(pool, InstanceKind::VirtualMachine, None);
        let spec = VolumeSpec { size: Some(ByteSize(bytes)), ..spec };
        let at = VolumeRef { pool, volume: spec.id };
        self.s.agent.volume_create(&self.s.change(), spec).await.unwrap();
        at
    }

    fn mark(&self, id: CheckpointId, before: Option<CheckpointId>) -> NewMark {
        NewMark { id, disks: vec![MarkedVolume { volume: self.root, before }] }
    }

    async fn create(&self, mark: NewMark, known: &[CheckpointId]) -> Result<()> {
        let request = MachineCheckpointCreate { guest: self.guest, mark, known: known.to_vec() };
        self.s.agent.machine_checkpoint_create(&self.s.change(), request).await
    }

    async fn delete(&self, id: CheckpointId, parent: Option<CheckpointId>, last: bool) -> Result<()> {
        let disks = vec![UnmarkedVolume { volume: self.root, parent, last }];
        let request = MachineCheckpointDelete { instance: self.guest.instance, id, disks };
        self.s.agent.machine_checkpoint_delete(&self.s.change(), request).await
    }

    async fn there(&self) -> Vec<CheckpointId> {
        let request = MachineCheckpoints { guest: self.guest, volumes: vec![self.root] };
        let mut all = self.s.agent.machine_checkpoints(&self.s.read(), request).await.unwrap();
        assert!(all.iter().all(|m| m.whole && m.volume == self.root.volume), "{all:?}");
        all.sort_by_key(|m| m.checkpoint);
        all.into_iter().map(|m| m.checkpoint).collect()
    }

    fn backup(&self, to: VolumeRef, since: Vec<CheckpointId>) -> MachineBackupBegin {
        MachineBackupBegin {
            guest: self.guest,
            id: DiskBackupId(self.s.env.uuid()),
            disks: vec![BackedUpVolume {
                from: self.root,
                since,
                to,
                export: "vda".into(),
                bitmap: "backup-vda".into(),
            }],
            mark: None,
            known: vec![],
            listen: None,
        }
    }

    async fn begin(&self, request: &MachineBackupBegin) -> Result<()> {
        self.s.agent.machine_backup_begin(&self.s.change(), request.clone()).await
    }

    fn at(&self, id: DiskBackupId) -> MachineBackupRef {
        MachineBackupRef { instance: self.guest.instance, id }
    }

    async fn state(&self, id: DiskBackupId) -> DiskBackupState {
        self.s.agent.machine_backup_state(&self.s.read(), self.at(id)).await.unwrap()
    }

    async fn end(&self, id: DiskBackupId) {
        self.s.agent.machine_backup_end(&self.s.change(), self.at(id)).await.unwrap();
    }

    async fn until_done(&self, id: DiskBackupId) {
        let limit = self.s.boot.max(Duration::from_secs(300));
        let is_done = async || (self.state(id).await.phase == DiskBackupPhase::Done).then_some(());
        self.s.until("the backup", limit, is_done).await;
    }

    async fn drop_volume(&self, at: VolumeRef) {
        self.s.agent.volume_delete(&self.s.change(), at).await.unwrap();
    }
}

/// Backups of the root of a machine that runs, and its checkpoints where the pool's disks can have them.
pub(super) async fn of_a_root(s: &Subject, spec: &GuestSpec, root: VolumeRef) {
    let guest = GuestRef { instance: spec.instance, generation: spec.generation };
    let m = Machine { s, guest, root };
    let size = ByteSize::gib(10).bytes();
    let (whole, scratch) = (m.volume(size).await, m.volume(scratch_size(size)).await);

    // What cannot be leaves nothing.
    let nowhere = VolumeRef { pool: root.pool, volume: VolumeId(s.env.uuid()) };
    refused(m.begin(&m.backup(nowhere, vec![])).await, ErrorKind::NotFound);
    refused(m.begin(&m.backup(scratch, vec![])).await, ErrorKind::Invalid);
    refused(
        m.begin(&MachineBackupBegin { disks: vec![], ..m.backup(whole, vec![]) }).await,
        ErrorKind::Invalid,
    );
    let mut named = m.backup(whole, vec![]);
    named.disks[0].export = "../x".into();
    refused(m.begin(&named).await, ErrorKind::Invalid);
    let mut other = m.backup(whole, vec![]);
    other.disks[0].from = whole;
    refused(m.begin(&other).await, ErrorKind::NotFound);
    refused(m.begin(&m.backup(whole, vec![m.id()])).await, ErrorKind::Conflict);
    let read_from_afar: SocketAddr = "0.0.0.0:10809".parse().unwrap();
    let listen = Some(BackupListen::Tcp { address: read_from_afar });
    refused(m.begin(&MachineBackupBegin { listen, ..m.backup(scratch, vec![]) }).await, ErrorKind::Forbidden);
    let none = DiskBackupId(s.env.uuid());
    assert_eq!(m.state(none).await, DiskBackupState::default());
    m.end(none).await;

    // Checkpoints, one after the other.
    let (first, second) = (m.id(), m.id());
    let can = match m.create(m.mark(first, None), &[]).await {
        Ok(()) => true,
        Err(e) => {
            assert!(e.is(ErrorKind::Unsupported) && e.message.contains("is raw"), "{e:?}");
            eprintln!("contract: disks of this pool cannot have checkpoints: {e}");
            false
        }
    };
    if can {
        m.create(m.mark(first, None), &[]).await.expect("twice is once");
        assert_eq!(m.there().await, [first]);
    }

    // One that is written, with a second checkpoint; meanwhile nothing else happens to the disk.
    let backup = MachineBackupBegin {
        mark: can.then(|| m.mark(second, Some(first))),
        known: vec![first],
        ..m.backup(whole, vec![])
    };
    m.begin(&backup).await.unwrap();
    m.begin(&backup).await.expect("twice is once");
    let delete = s.agent.volume_delete(&s.change(), whole).await;
    refused(delete, ErrorKind::Conflict);
    m.until_done(backup.id).await;
    m.end(backup.id).await;
    m.end(backup.id).await;
    assert_eq!(m.state(backup.id).await.phase, DiskBackupPhase::Gone);

    // What changed since the first, over what is there.
    if can {
        let mut both = vec![first, second];
        let again = MachineBackupBegin { known: both.clone(), ..m.backup(whole, both.clone()) };
        m.begin(&again).await.unwrap();
        m.until_done(again.id).await;
        m.end(again.id).await;
        both.sort();
        assert_eq!(m.there().await, both);
    }

    // One that others read is there until its end.
    let since = if can { vec![second] } else { vec![] };
    let known = if can { vec![first, second] } else { vec![] };
    let read = MachineBackupBegin { listen: Some(BackupListen::Unix), known, ..m.backup(scratch, since) };
    m.begin(&read).await.unwrap();
    let state = m.state(read.id).await;
    assert!(state.phase == DiskBackupPhase::Running && state.socket.is_some(), "{state:?}");
    refused(m.begin(&m.backup(whole, vec![])).await, ErrorKind::Conflict);
    m.end(read.id).await;
    assert_eq!(m.state(read.id).await.phase, DiskBackupPhase::Gone);

    if can {
        m.delete(second, Some(first), true).await.unwrap();
        m.delete(second, Some(first), true).await.expect("twice is once");
        assert_eq!(m.there().await, [first]);
        m.delete(first, None, true).await.unwrap();
        assert!(m.there().await.is_empty());
    }
    m.drop_volume(scratch).await;
    m.drop_volume(whole).await;
}

/// A machine that ends while its disk is backed up leaves nothing in use.
pub(super) async fn broken_off(s: &Subject, spec: &GuestSpec, root: VolumeRef) {
    let guest = GuestRef { instance: spec.instance, generation: spec.generation };
    let m = Machine { s, guest, root };
    let scratch = m.volume(scratch_size(ByteSize::gib(10).bytes())).await;
    let read = MachineBackupBegin { listen: Some(BackupListen::Unix), ..m.backup(scratch, vec![]) };
    m.begin(&read).await.unwrap();
    s.agent.guest_stop(&s.change(), GuestStop { guest, mode: StopMode::Force }).await.unwrap();
    assert_eq!(m.state(read.id).await.phase, DiskBackupPhase::Gone);
    m.end(read.id).await;
    m.delete(m.id(), None, true).await.expect("what does not run has nothing to be taken away");
    refused(m.delete(m.id(), Some(m.id()), false).await, ErrorKind::Conflict);
    m.drop_volume(scratch).await;
}
