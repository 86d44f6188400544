//! Backups: made, streamed out, staged and put into other volumes.

use super::*;
use karst_model::{BackupId, Name, backup::Compression};

impl Subject {
    async fn back_up(
        &self,
        kind: BackupKind,
        volume: VolumeRef,
        snapshots: Vec<(Name, karst_model::SnapshotId)>,
    ) -> Vec<u8> {
        let id = BackupId(self.env.uuid());
        let request = BackupCreate {
            id,
            kind,
            volume,
            at: None,
            snapshots,
            index: serde_json::json!({"name": "c1", "config": {"container": {"name": "c1"}}}),
            metadata: (kind == BackupKind::Container).then(|| {
                serde_json::json!({
                    "architecture": "x86_64",
                    "templates": {"/etc/motd": {"when": ["start"], "template": "motd.tpl"}},
                })
            }),
            templates: match kind {
                BackupKind::Container => [("motd.tpl".to_owned(), "hello".to_owned())].into(),
                _ => Default::default(),
            },
            compression: Compression::Zstd,
            machine: None,
        };
        let made = self.agent.backup_create(&self.change(), request.clone()).await.unwrap();
        let again = self.agent.backup_create(&self.change(), request).await.expect("twice is once");
        assert_eq!(made, again);
        let check = self.agent.self_check(&self.read(), ()).await.unwrap();
        assert!(check.backups.contains(&id) && check.leaks.is_empty(), "{check:?}");
        let opened = self.agent.backup_open(&self.read(), id).await.unwrap();
        let data = read_all(one(opened.fds)).await;
        assert_eq!((opened.value.size, made.size), (data.len() as u64, data.len() as u64));
        self.agent.backup_delete(&self.change(), id).await.unwrap();
        self.agent.backup_delete(&self.change(), id).await.expect("twice is once");
        let gone = self.agent.backup_open(&self.read(), id).await.unwrap_err();
        assert!(gone.is(ErrorKind::NotFound), "{gone}");
        data
    }

    pub(super) async fn stage(&self, data: &[u8]) -> BackupId {
        let id = BackupId(self.env.uuid());
        let staged = self.agent.backup_stage(&self.change(), id).await.unwrap();
        write_all(one(staged.fds), data.to_vec()).await;
        id
    }

    async fn fill(
        &self,
        volume: VolumeRef,
        backup: BackupId,
        kind: BackupKind,
        snapshot: Option<&str>,
    ) -> Result<VolumeFilled> {
        let snapshot = snapshot.map(|n| Name::parse("name", n).unwrap());
        self.agent
            .volume_fill(&self.change(), VolumeFill { volume, backup, kind, snapshot, machine: None })
            .await
    }
}

pub(super) async fn trees(s: &Subject) {
    let (agent, pool) = (&s.agent, s.pool().await);
    let spec = s.volume(pool, InstanceKind::Container, None);
    let at = VolumeRef { pool, volume: spec.id };
    agent.volume_create(&s.change(), spec.clone()).await.unwrap();
    s.mark(at, "one").await;
    let first = s.snapshot(at);
    agent.volume_snapshot_create(&s.change(), first).await.unwrap();
    s.mark(at, "two").await;
    let name = Name::parse("name", "first").unwrap();
    let data = s.back_up(BackupKind::Container, at, vec![(name, first.snapshot)]).await;

    let staged = s.stage(&data).await;
    let facts = agent.backup_inspect(&s.read(), staged).await.unwrap();
    assert_eq!((facts.size, &facts.index["name"]), (data.len() as u64, &serde_json::json!("c1")));
    let other = s.volume(pool, InstanceKind::Container, None);
    let new = VolumeRef { pool, volume: other.id };
    agent.volume_create(&s.change(), other).await.unwrap();
    let filled = s.fill(new, staged, BackupKind::Container, Some("first")).await.unwrap();
    assert!(filled.templates.is_empty());
    assert_eq!(s.marked(new).await, "one");
    let filled = s.fill(new, staged, BackupKind::Container, None).await.unwrap();
    assert_eq!(
        (filled.templates.files["motd.tpl"].as_str(), filled.templates.rules["/etc/motd"].template.as_str()),
        ("hello", "motd.tpl")
    );
    s.fill(new, staged, BackupKind::Container, None).await.expect("twice is once");
    assert_eq!(s.marked(new).await, "two");

    // What is not in it, and what is none, changes nothing.
    for (kind, snapshot) in [(BackupKind::Container, Some("second")), (BackupKind::Filesystem, None)] {
        let e = s.fill(new, staged, kind, snapshot).await.unwrap_err();
        assert!(e.is(ErrorKind::Invalid) && e.message.contains(&kind.place(snapshot)), "{e}");
    }
    let e = s.fill(new, staged, BackupKind::Block, None).await.unwrap_err();
    assert!(e.is(ErrorKind::Invalid), "{e}");
    for wrong in [&data[..data.len() / 2], b"no backup"] {
        let wrong = s.stage(wrong).await;
        let e = s.fill(new, wrong, BackupKind::Container, None).await.unwrap_err();
        assert!(e.is(ErrorKind::Invalid), "{e}");
        agent.backup_delete(&s.change(), wrong).await.unwrap();
    }
    assert_eq!(s.marked(new).await, "two");
    let none = s.stage(b"no backup").await;
    let e = agent.backup_inspect(&s.read(), none).await.unwrap_err();
    assert!(e.is(ErrorKind::Invalid), "{e}");
    for id in [none, staged] {
        agent.backup_delete(&s.change(), id).await.unwrap();
    }
    let e = s.fill(new, staged, BackupKind::Container, None).await.unwrap_err();
    assert!(e.is(ErrorKind::NotFound), "{e}");
    for volume in [at, new] {
        agent.volume_delete(&s.change(), volume).await.unwrap();
    }
    agent.pool_remove(&s.change(), pool).await.unwrap();
}

pub(super) async fn disks(s: &Subject) {
    let (agent, pool) = (&s.agent, s.pool().await);
    let size = |mib: u64| Some(ByteSize::mib(mib));
    let spec = VolumeSpec { size: size(8), ..s.volume(pool, InstanceKind::VirtualMachine, None) };
    let at = VolumeRef { pool, volume: spec.id };
    agent.volume_create(&s.change(), spec.clone()).await.unwrap();
    let data = s.back_up(BackupKind::Block, at, vec![]).await;
    let small = VolumeSpec { size: size(2), ..s.volume(pool, InstanceKind::VirtualMachine, None) };
    let new = VolumeRef { pool, volume: small.id };
    agent.volume_create(&s.change(), small).await.unwrap();
    let staged = s.stage(&data).await;
    let filled = s.fill(new, staged, BackupKind::Block, None).await.unwrap();
    assert_eq!(filled.size, size(8), "a disk grows to what comes");
    agent.backup_delete(&s.change(), staged).await.unwrap();
    let raw = s.stage(&vec![1; 9 << 20]).await;
    assert_eq!(s.fill(new, raw, BackupKind::Raw, None).await.unwrap().size, size(9));
    agent.backup_delete(&s.change(), raw).await.unwrap();
    for volume in [at, new] {
        agent.volume_delete(&s.change(), volume).await.unwrap();
    }
    agent.pool_remove(&s.change(), pool).await.unwrap();
}
