//! Volumes: snapshots, copies, streams.

use super::*;
use karst_model::{
    SessionId, SnapshotId,
    guest::{FileKind, FileWrite},
};

impl Subject {
    pub(super) fn mark_of(&self, root: VolumeRef) -> FileRef {
        // Of no guest that was ever started: the file lies in the volume.
        let instance = InstanceId(self.env.uuid());
        FileRef { instance, kind: InstanceKind::Container, root, path: "/mark".into() }
    }

    pub(super) async fn mark(&self, root: VolumeRef, text: &str) {
        let file = self.mark_of(root);
        let write = FileWrite {
            path: file.path.clone(),
            uid: Some(0),
            gid: Some(0),
            mode: Some(0o600),
            append: false,
            kind: FileKind::File,
            target: None,
        };
        let request = FileWriteRequest { file, write };
        let writing = self.agent.file_write(&self.read(), request).await.unwrap();
        write_all(one(writing.fds), text.as_bytes().to_vec()).await;
        assert_eq!(self.ended(writing.value.unwrap()).await.unwrap(), 0);
    }

    pub(super) async fn marked(&self, root: VolumeRef) -> String {
        let opened = self.agent.file_open(&self.read(), self.mark_of(root)).await.unwrap();
        String::from_utf8(read_all(one(opened.fds)).await).unwrap()
    }

    async fn ended(&self, session: SessionId) -> Result<i32> {
        let code = self.agent.session_wait(&self.read(), session).await;
        self.agent.session_close(&self.read(), session).await.unwrap();
        code
    }

    async fn exported(
        &self,
        volume: VolumeRef,
        snapshot: Option<SnapshotId>,
        format: StreamFormat,
    ) -> Vec<u8> {
        let request = VolumeExport { volume, snapshot, format };
        let export = self.agent.volume_export(&self.read(), request).await.unwrap();
        let data = read_all(one(export.fds)).await;
        assert_eq!(self.ended(export.value).await.unwrap(), 0);
        data
    }

    async fn imported(&self, volume: VolumeRef, format: StreamFormat, data: &[u8]) -> Result<i32> {
        let import = self.agent.volume_import(&self.change(), VolumeImport { volume, format }).await.unwrap();
        write_all(one(import.fds), data.to_vec()).await;
        self.ended(import.value).await
    }

    async fn copy(&self, of: &VolumeSpec, pool: PoolId, snapshot: Option<SnapshotId>) -> VolumeRef {
        self.copy_as(of, pool, snapshot, false).await
    }

    async fn copy_as(
        &self,
        of: &VolumeSpec,
        pool: PoolId,
        snapshot: Option<SnapshotId>,
        full: bool,
    ) -> VolumeRef {
        let source = VolumeSource::Copy { pool: of.pool, volume: of.id, snapshot, full };
        let spec = VolumeSpec { id: VolumeId(self.env.uuid()), pool, source, ..of.clone() };
        self.agent.volume_create(&self.change(), spec.clone()).await.unwrap();
        self.agent.volume_create(&self.change(), spec.clone()).await.expect("twice is once");
        VolumeRef { pool, volume: spec.id }
    }

    pub(super) fn snapshot(&self, of: VolumeRef) -> VolumeSnapshotRef {
        VolumeSnapshotRef { pool: of.pool, volume: of.volume, snapshot: SnapshotId(self.env.uuid()) }
    }
}

pub(super) async fn trees(s: &Subject) {
    let (agent, pool, other) = (&s.agent, s.pool().await, s.pool().await);
    let spec = s.volume(pool, InstanceKind::Container, None);
    let at = VolumeRef { pool, volume: spec.id };
    agent.volume_create(&s.change(), spec.clone()).await.unwrap();
    s.mark(at, "one").await;
    let (first, second) = (s.snapshot(at), s.snapshot(at));
    agent.volume_snapshot_create(&s.change(), first).await.unwrap();
    s.mark(at, "two").await;
    agent.volume_snapshot_create(&s.change(), first).await.expect("twice is once");
    agent.volume_snapshot_create(&s.change(), second).await.unwrap();
    let listed = agent.volume_snapshots(&s.read(), at).await.unwrap();
    let mut ids = [first.snapshot, second.snapshot];
    ids.sort();
    assert_eq!(listed.iter().map(|l| l.snapshot).collect::<Vec<_>>(), ids);
    let check = agent.self_check(&s.read(), ()).await.unwrap();
    assert!(check.snapshots.contains(&(at.volume, first.snapshot)) && check.leaks.is_empty(), "{check:?}");

    let (copy, old) = (s.copy(&spec, pool, None).await, s.copy(&spec, pool, Some(first.snapshot)).await);
    assert_eq!((s.marked(copy).await, s.marked(old).await), ("two".into(), "one".into()));
    s.mark(copy, "three").await;
    assert_eq!((s.marked(at).await, s.marked(copy).await), ("two".into(), "three".into()));
    agent.volume_snapshot_restore(&s.change(), first).await.unwrap();
    agent.volume_snapshot_restore(&s.change(), first).await.expect("twice is once");
    assert_eq!(s.marked(at).await, "one");
    agent.volume_snapshot_restore(&s.change(), second).await.expect("later ones stayed");
    assert_eq!(s.marked(at).await, "two");
    s.mark(at, "four").await;
    agent.volume_snapshot_restore(&s.change(), second).await.expect("a snapshot does not change");
    assert_eq!(s.marked(at).await, "two");

    // To another pool, and again what differs.
    let far = s.copy(&spec, other, Some(first.snapshot)).await;
    assert_eq!(s.marked(far).await, "one");
    let kept = s.snapshot(far);
    agent.volume_snapshot_create(&s.change(), kept).await.unwrap();
    let refresh = VolumeRefresh { volume: far, from: at, snapshot: None, full: false };
    agent.volume_refresh(&s.change(), refresh).await.unwrap();
    agent.volume_refresh(&s.change(), refresh).await.expect("twice is once");
    assert_eq!(s.marked(far).await, "two");
    agent.volume_snapshot_restore(&s.change(), kept).await.expect("its snapshots stayed");
    assert_eq!(s.marked(far).await, "one");

    // Full copies, in the same pool and in another, are the same to look at.
    for pool in [pool, other] {
        let full = s.copy_as(&spec, pool, Some(first.snapshot), true).await;
        assert_eq!(s.marked(full).await, "one");
        let refresh = VolumeRefresh { volume: full, from: at, snapshot: None, full: true };
        agent.volume_refresh(&s.change(), refresh).await.unwrap();
        agent.volume_refresh(&s.change(), refresh).await.expect("twice is once");
        assert_eq!(s.marked(full).await, "two");
        s.mark(full, "full").await;
        assert_eq!(s.marked(at).await, "two");
        agent.volume_delete(&s.change(), full).await.unwrap();
    }

    // Out and in again.
    let stream = s.exported(at, Some(first.snapshot), StreamFormat::Tar).await;
    assert_eq!(s.imported(copy, StreamFormat::Tar, &stream).await.unwrap(), 0);
    assert_eq!(s.marked(copy).await, "one");
    let request = VolumeImport { volume: copy, format: StreamFormat::Tar };
    s.mark(copy, "five").await;
    let import = agent.volume_import(&s.change(), request).await.unwrap();
    agent.session_close(&s.read(), import.value).await.unwrap();
    drop(import.fds);
    assert_eq!(s.marked(copy).await, "five", "an import that was broken off changed nothing");
    let export = VolumeExport { volume: at, snapshot: None, format: StreamFormat::Tar };
    let unread = agent.volume_export(&s.read(), export).await.unwrap();
    agent.session_close(&s.read(), unread.value).await.unwrap();

    // What cannot be.
    let wrong = VolumeExport { format: StreamFormat::Raw, ..export };
    refused(agent.volume_export(&s.read(), wrong).await, ErrorKind::Invalid);
    let wrong = VolumeImport { format: StreamFormat::Vmdk, ..request };
    refused(agent.volume_import(&s.change(), wrong).await, ErrorKind::Invalid);
    let unknown = s.snapshot(at);
    refused(agent.volume_snapshot_restore(&s.change(), unknown).await, ErrorKind::NotFound);
    let lost = VolumeExport { snapshot: Some(unknown.snapshot), ..export };
    refused(agent.volume_export(&s.read(), lost).await, ErrorKind::NotFound);
    agent.volume_snapshot_delete(&s.change(), unknown).await.expect("it is gone already");
    let nowhere = VolumeSnapshotRef { volume: VolumeId(s.env.uuid()), ..unknown };
    refused(agent.volume_snapshot_create(&s.change(), nowhere).await, ErrorKind::NotFound);
    agent.volume_snapshot_delete(&s.change(), nowhere).await.expect("it is gone already");

    agent.volume_snapshot_delete(&s.change(), second).await.unwrap();
    agent.volume_snapshot_delete(&s.change(), second).await.expect("twice is once");
    assert_eq!(s.marked(at).await, "two", "the volume does not need it");
    for volume in [at, copy, old, far] {
        agent.volume_delete(&s.change(), volume).await.unwrap();
        refused(agent.volume_snapshots(&s.read(), volume).await, ErrorKind::NotFound);
    }
    let check = agent.self_check(&s.read(), ()).await.unwrap();
    assert!(check.snapshots.is_empty() && check.leaks.is_empty(), "they went with their volumes: {check:?}");
    for pool in [pool, other] {
        agent.pool_remove(&s.change(), pool).await.unwrap();
    }
}

pub(super) async fn disks(s: &Subject) {
    let (agent, pool, other) = (&s.agent, s.pool().await, s.pool().await);
    let spec =
        VolumeSpec { size: Some(ByteSize::mib(1)), ..s.volume(pool, InstanceKind::VirtualMachine, None) };
    let at = VolumeRef { pool, volume: spec.id };
    agent.volume_create(&s.change(), spec.clone()).await.unwrap();
    let content = |n: u8| (0..1u32 << 20).map(|i| (i >> 12) as u8 ^ n).collect::<Vec<u8>>();
    assert_eq!(s.imported(at, StreamFormat::Raw, &content(1)).await.unwrap(), 0);
    let first = s.snapshot(at);
    agent.volume_snapshot_create(&s.change(), first).await.unwrap();
    assert_eq!(s.imported(at, StreamFormat::Raw, &content(2)).await.unwrap(), 0);
    let now = s.exported(at, None, StreamFormat::Raw).await;
    assert!(now == content(2), "what was put in comes out");
    let copy = s.copy(&spec, pool, None).await;
    let far = s.copy(&spec, other, Some(first.snapshot)).await;
    agent.volume_resize(&s.change(), VolumeResize { volume: at, size: ByteSize::mib(2) }).await.unwrap();
    agent.volume_snapshot_restore(&s.change(), first).await.unwrap();
    assert!(s.exported(at, None, StreamFormat::Raw).await == content(1), "restored, its size too");
    assert!(s.exported(copy, None, StreamFormat::Raw).await == content(2));
    assert!(s.exported(far, None, StreamFormat::Raw).await == content(1));
    let packed = s.exported(copy, None, StreamFormat::Qcow2).await;
    assert_eq!(s.imported(far, StreamFormat::Qcow2, &packed).await.unwrap(), 0);
    assert!(s.exported(far, None, StreamFormat::Raw).await == content(2));
    agent
        .volume_refresh(&s.change(), VolumeRefresh { volume: far, from: at, snapshot: None, full: false })
        .await
        .unwrap();
    assert!(s.exported(far, None, StreamFormat::Raw).await == content(1));

    let disc = VolumeSpec {
        id: VolumeId(s.env.uuid()),
        content: VolumeContent::Iso,
        size: Some(ByteSize(512)),
        ..spec.clone()
    };
    let disc_at = VolumeRef { pool, volume: disc.id };
    agent.volume_create(&s.change(), disc).await.unwrap();
    assert_eq!(s.imported(disc_at, StreamFormat::Raw, &content(3)).await.unwrap(), 0);
    assert_eq!(agent.volume_usage(&s.read(), disc_at).await.unwrap().total, 1 << 20, "as large as what came");
    let tar = VolumeExport { volume: at, snapshot: None, format: StreamFormat::Tar };
    refused(agent.volume_export(&s.read(), tar).await, ErrorKind::Invalid);
    let tree = s.volume(pool, InstanceKind::Container, None);
    let source = VolumeSource::Copy { pool, volume: at.volume, snapshot: None, full: false };
    refused(agent.volume_create(&s.change(), VolumeSpec { source, ..tree }).await, ErrorKind::Invalid);
    for volume in [at, copy, far, disc_at] {
        agent.volume_delete(&s.change(), volume).await.unwrap();
    }
    for pool in [pool, other] {
        agent.pool_remove(&s.change(), pool).await.unwrap();
    }
}

/// Disks by place: read from anywhere, written in part, in one step.
pub(super) async fn bytes(s: &Subject) {
    use std::os::unix::fs::FileExt;
    let (agent, pool) = (&s.agent, s.pool().await);
    let spec =
        VolumeSpec { size: Some(ByteSize::mib(4)), ..s.volume(pool, InstanceKind::VirtualMachine, None) };
    let at = VolumeRef { pool, volume: spec.id };
    agent.volume_create(&s.change(), spec.clone()).await.unwrap();
    let read = async |offset: u64, length: usize| {
        let opened = agent.volume_open(&s.read(), at).await.unwrap();
        let disk = File::from(one(opened.fds));
        assert_eq!(disk.metadata().unwrap().len(), 4 << 20);
        let mut data = vec![7; length];
        disk.read_exact_at(&mut data, offset).unwrap();
        agent.session_close(&s.read(), opened.value).await.unwrap();
        data
    };
    assert_eq!(read((4 << 20) - 10, 10).await, vec![0; 10]);
    let write = async |offset: u64, data: &[u8]| {
        let staged = s.stage(data).await;
        let request = VolumeWrite { volume: at, staged, offset, image: false };
        let outcome = agent.volume_write(&s.change(), request).await;
        if outcome.is_ok() {
            agent.volume_write(&s.change(), request).await.expect("twice is once");
        }
        agent.backup_delete(&s.change(), staged).await.unwrap();
        outcome.map(|()| request)
    };
    write(0, &vec![1; 4 << 20]).await.expect("all of it");
    let first = s.snapshot(at);
    agent.volume_snapshot_create(&s.change(), first).await.unwrap();
    write(1 << 20, &[2; 10_000]).await.expect("a part");
    assert_eq!(read((1 << 20) - 1, 2).await, [1, 2]);
    assert_eq!(read((1 << 20) + 9_999, 2).await, [2, 1]);
    assert_eq!(read((4 << 20) - 1, 1).await, [1]);
    refused(write((4 << 20) - 1, &[3; 2]).await, ErrorKind::Invalid);
    refused(write(u64::MAX, &[3; 2]).await, ErrorKind::Invalid);
    assert_eq!(read((4 << 20) - 1, 1).await, [1], "what does not fit changes nothing");
    agent.volume_snapshot_restore(&s.change(), first).await.expect("its snapshots stayed");
    assert_eq!(read(1 << 20, 1).await, [1]);

    // An image of a disk instead of its bytes: what is none changes nothing, and one that is stated is not probed for.
    let staged = s.stage(b"no image at all").await;
    let image = VolumeWrite { volume: at, staged, offset: 0, image: true };
    refused(agent.volume_write(&s.change(), image).await, ErrorKind::Invalid);
    let shifted = VolumeWrite { offset: 512, ..image };
    refused(agent.volume_write(&s.change(), shifted).await, ErrorKind::Invalid);
    agent.backup_delete(&s.change(), staged).await.unwrap();
    assert_eq!(read(0, 2).await, [1, 1]);

    let gone =
        VolumeWrite { volume: at, staged: karst_model::BackupId(s.env.uuid()), offset: 0, image: false };
    refused(agent.volume_write(&s.change(), gone).await, ErrorKind::NotFound);
    let tree = s.volume(pool, InstanceKind::Container, None);
    let tree_at = VolumeRef { pool, volume: tree.id };
    agent.volume_create(&s.change(), tree).await.unwrap();
    refused(agent.volume_open(&s.read(), tree_at).await, ErrorKind::Invalid);
    for volume in [at, tree_at] {
        agent.volume_delete(&s.change(), volume).await.unwrap();
    }
    refused(agent.volume_open(&s.read(), at).await, ErrorKind::NotFound);
    agent.pool_remove(&s.change(), pool).await.unwrap();
}
