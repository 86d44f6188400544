//! Images of volumes, and volumes of images again.

use super::*;
use karst_model::{SnapshotId, backup::Compression};

impl Subject {
    async fn published(&self, kind: InstanceKind, volume: VolumeRef, at: Option<SnapshotId>) -> ImagePublish {
        let request = ImagePublish {
            image: ImageId(self.env.uuid()),
            kind,
            volume,
            at,
            metadata: serde_json::json!({
                "architecture": "x86_64", "creation_date": 1_700_000_000, "expiry_date": 0,
                "properties": {"os": "mine"},
                "templates": {"/etc/motd": {"when": ["create"], "template": "motd.tpl"}},
            }),
            templates: [("motd.tpl".to_owned(), "of {{ container.name }}".to_owned())].into(),
            compression: Compression::Zstd,
        };
        let facts = self.agent.image_publish(&self.change(), request.clone()).await.unwrap();
        assert_eq!((facts.kind, facts.properties["os"].as_str()), (kind, "mine"));
        assert_eq!(facts.templates.files, request.templates);
        assert_eq!(facts.templates.rules["/etc/motd"].template, "motd.tpl");
        let again = self.agent.image_publish(&self.change(), request.clone()).await.expect("twice is once");
        assert_eq!(facts, again);
        let check = self.agent.self_check(&self.read(), ()).await.unwrap();
        assert!(check.images.contains(&request.image) && check.leaks.is_empty(), "{check:?}");
        request
    }
}

pub(super) async fn images_of_trees(s: &Subject) {
    let (agent, pool) = (&s.agent, s.pool().await);
    let spec = s.volume(pool, InstanceKind::Container, None);
    let at = VolumeRef { pool, volume: spec.id };
    agent.volume_create(&s.change(), spec).await.unwrap();
    s.mark(at, "one").await;
    let first = s.snapshot(at);
    agent.volume_snapshot_create(&s.change(), first).await.unwrap();
    s.mark(at, "two").await;
    let then = s.published(InstanceKind::Container, at, Some(first.snapshot)).await;
    let now = s.published(InstanceKind::Container, at, None).await;
    let made = s.volume(pool, InstanceKind::Container, Some(then.image));
    let new = VolumeRef { pool, volume: made.id };
    agent.volume_create(&s.change(), made).await.unwrap();
    assert_eq!(s.marked(new).await, "one");

    let rebuild = |source| VolumeRebuild { volume: new, source, size: None };
    for full in [true, false] {
        let of_now = rebuild(VolumeSource::Image { image: now.image, full });
        agent.volume_rebuild(&s.change(), of_now).await.unwrap();
    }
    let of_now = rebuild(VolumeSource::Image { image: now.image, full: false });
    agent.volume_rebuild(&s.change(), of_now).await.expect("twice is once");
    assert_eq!(s.marked(new).await, "two");
    let lost = VolumeSource::Image { image: ImageId(s.env.uuid()), full: false };
    refused(agent.volume_rebuild(&s.change(), rebuild(lost)).await, ErrorKind::NotFound);
    let copy = VolumeSource::Copy { pool, volume: at.volume, snapshot: None, full: false };
    refused(agent.volume_rebuild(&s.change(), rebuild(copy)).await, ErrorKind::Invalid);
    assert_eq!(s.marked(new).await, "two");
    agent.volume_rebuild(&s.change(), rebuild(VolumeSource::Empty)).await.unwrap();
    let gone = agent.file_open(&s.read(), s.mark_of(new)).await;
    refused(gone.map(drop), ErrorKind::NotFound);

    let wrong =
        ImagePublish { image: ImageId(s.env.uuid()), kind: InstanceKind::VirtualMachine, ..now.clone() };
    refused(agent.image_publish(&s.change(), wrong).await, ErrorKind::Invalid);
    for image in [then.image, now.image] {
        agent.image_delete(&s.change(), image).await.unwrap();
    }
    for volume in [at, new] {
        agent.volume_delete(&s.change(), volume).await.unwrap();
    }
    agent.pool_remove(&s.change(), pool).await.unwrap();
}

pub(super) async fn images_of_disks(s: &Subject) {
    let (agent, pool) = (&s.agent, s.pool().await);
    let size = |mib: u64| Some(ByteSize::mib(mib));
    let spec = VolumeSpec { size: size(8), ..s.volume(pool, InstanceKind::VirtualMachine, None) };
    let at = VolumeRef { pool, volume: spec.id };
    agent.volume_create(&s.change(), spec).await.unwrap();
    let image = s.published(InstanceKind::VirtualMachine, at, None).await.image;
    let grown = VolumeSpec { size: size(9), ..s.volume(pool, InstanceKind::VirtualMachine, Some(image)) };
    let new = VolumeRef { pool, volume: grown.id };
    agent.volume_create(&s.change(), grown).await.unwrap();
    for (source, wanted) in [
        (VolumeSource::Empty, size(9)),
        (VolumeSource::Image { image, full: false }, size(9)),
        (VolumeSource::Image { image, full: true }, size(9)),
        (VolumeSource::Image { image, full: false }, size(8)),
    ] {
        let request = VolumeRebuild { volume: new, source, size: wanted };
        agent.volume_rebuild(&s.change(), request).await.unwrap();
        assert_eq!(agent.volume_usage(&s.read(), new).await.unwrap().total, wanted.unwrap().bytes());
    }
    let small =
        VolumeRebuild { volume: new, source: VolumeSource::Image { image, full: false }, size: size(1) };
    refused(agent.volume_rebuild(&s.change(), small).await, ErrorKind::Invalid);
    agent.image_delete(&s.change(), image).await.unwrap();
    for volume in [at, new] {
        agent.volume_delete(&s.change(), volume).await.unwrap();
    }
    agent.pool_remove(&s.change(), pool).await.unwrap();
}
