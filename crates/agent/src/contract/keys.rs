//! Encrypted volumes, and the passphrases with which they are made.

use super::*;
use karst_model::encryption::{Encryption, Passphrase, Passphrases};
use std::os::unix::fs::FileExt;

fn keys(of: KeyOwner, text: &str) -> KeysHand {
    let keys = Passphrases::from([(uuid::Uuid::from_u128(7), Passphrase::of(text.as_bytes()).unwrap())]);
    KeysHand { of, keys }
}

/// An encrypted volume is made with a passphrase that was handed over before, and is a container of LUKS then; copies are the same
/// container.
pub(super) async fn encrypted_volumes(s: &Subject) {
    let (agent, pool) = (&s.agent, s.pool().await);
    let encryption = Encryption::default();
    let spec = VolumeSpec {
        size: Some(ByteSize((4 << 20) + encryption.header())),
        source: VolumeSource::Encrypted { encryption },
        ..s.volume(pool, InstanceKind::VirtualMachine, None)
    };
    let at = VolumeRef { pool, volume: spec.id };
    refused(agent.volume_create(&s.change(), spec.clone()).await, ErrorKind::Conflict);
    refused(agent.volume_open(&s.read(), at).await, ErrorKind::NotFound);
    // Those of another volume are of no use.
    let other = KeyOwner::Volume(VolumeId(s.env.uuid()));
    agent.keys_hand(&s.read(), keys(other, "other")).await.unwrap();
    refused(agent.volume_create(&s.change(), spec.clone()).await, ErrorKind::Conflict);

    agent.keys_hand(&s.read(), keys(KeyOwner::Volume(spec.id), "first")).await.unwrap();
    agent.keys_hand(&s.read(), keys(KeyOwner::Volume(spec.id), "open sesame")).await.expect("again is fine");
    agent.volume_create(&s.change(), spec.clone()).await.unwrap();
    agent.volume_create(&s.change(), spec.clone()).await.expect("twice is once, without it too");
    let begins = async |at: VolumeRef| {
        let opened = agent.volume_open(&s.read(), at).await.unwrap();
        let disk = File::from(one(opened.fds));
        let length = disk.metadata().unwrap().len();
        let mut head = vec![0; 1024];
        disk.read_exact_at(&mut head, 0).unwrap();
        agent.session_close(&s.read(), opened.value).await.unwrap();
        (length, head)
    };
    let (length, head) = begins(at).await;
    assert_eq!(length, (4 << 20) + encryption.header(), "what is stored has a header more");
    assert!(head.starts_with(b"LUKS\xba\xbe\x00\x01"), "{:?}", &head[..8]);
    assert!(!head.windows(11).any(|w| w == b"open sesame"));

    let source = VolumeSource::Copy { pool, volume: at.volume, snapshot: None, full: false };
    let copied = VolumeSpec { id: VolumeId(s.env.uuid()), source, ..spec.clone() };
    let copy = VolumeRef { pool, volume: copied.id };
    agent.volume_create(&s.change(), copied).await.expect("a copy takes no passphrase");
    assert!(begins(copy).await == (length, head), "it is the same container");
    let larger = VolumeResize { volume: copy, size: ByteSize((6 << 20) + encryption.header()) };
    agent.volume_resize(&s.change(), larger).await.expect("nor does growing");

    let tree = VolumeSpec {
        id: VolumeId(s.env.uuid()),
        content: VolumeContent::Filesystem,
        size: None,
        ..spec.clone()
    };
    agent.keys_hand(&s.read(), keys(KeyOwner::Volume(tree.id), "one")).await.unwrap();
    refused(agent.volume_create(&s.change(), tree).await, ErrorKind::Invalid);
    for volume in [at, copy] {
        agent.volume_delete(&s.change(), volume).await.unwrap();
    }
    agent.pool_remove(&s.change(), pool).await.unwrap();
}
