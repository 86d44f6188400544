//! Descriptions: written, replaced, found again with what they describe, gone with it.

use super::*;
use crate::descriptions::*;

impl Subject {
    /// All that a pool has, page by page.
    async fn surveyed(&self, spec: &PoolSpec) -> Vec<FoundVolume> {
        let mut all: Vec<FoundVolume> = vec![];
        loop {
            let after = all.last().map(|v| v.volume);
            let request = PoolSurvey { spec: spec.clone(), after };
            let page = self.agent.pool_survey(&self.read(), request).await.unwrap();
            assert!(page.volumes.iter().all(|v| after.is_none_or(|a| v.volume > a)), "in the order of ids");
            let empty = page.volumes.is_empty();
            all.extend(page.volumes);
            match page.more {
                true => assert!(!empty, "a page that is not the last has something"),
                false => return all,
            }
        }
    }
}

pub(super) async fn of_pools_and_volumes(s: &Subject) {
    let (agent, pool) = (&s.agent, s.pool().await);
    let spec = PoolSpec::own(pool, PoolKind::Dir);
    assert_eq!(s.surveyed(&spec).await, []);
    let mut volumes: Vec<VolumeSpec> =
        (0..5).map(|_| s.volume(pool, InstanceKind::Container, None)).collect();
    volumes.sort_by_key(|v| v.id);
    for volume in &volumes {
        agent.volume_create(&s.change(), volume.clone()).await.unwrap();
    }
    let at = VolumeRef { pool, volume: volumes[0].id };
    let taken = s.snapshot(at);
    agent.volume_snapshot_create(&s.change(), taken).await.unwrap();

    let text = |n: usize| format!("{{\"volume\": \"{n} \\\\ ü\"}}\n");
    let stranger = VolumeId(s.env.uuid());
    let request = PoolDescribe {
        pool,
        own: Some("{\"pool\": true}".into()),
        volumes: vec![(volumes[0].id, text(0)), (stranger, text(9)), (volumes[3].id, text(3))],
    };
    refused(agent.pool_describe(&s.read(), request.clone()).await, ErrorKind::Conflict);
    agent.pool_describe(&s.change(), request.clone()).await.unwrap();
    agent.pool_describe(&s.change(), request).await.expect("twice is once");
    let found = s.surveyed(&spec).await;
    assert_eq!(
        found.iter().map(|v| v.volume).collect::<Vec<_>>(),
        volumes.iter().map(|v| v.id).collect::<Vec<_>>()
    );
    let said: Vec<_> = found.iter().map(|v| v.description.clone()).collect();
    assert_eq!(said, [Some(text(0)), None, None, Some(text(3)), None]);
    assert_eq!(found[0].content, VolumeContent::Filesystem);
    assert_eq!(found[0].snapshots.iter().map(|s| s.snapshot).collect::<Vec<_>>(), [taken.snapshot]);
    let pools = agent.pools_find(&s.read(), PoolsFind { kind: None, source: None }).await.unwrap();
    let own = pools.iter().find(|p| p.spec == spec).expect("the host knows its pools");
    assert_eq!(own.description.as_deref(), Some("{\"pool\": true}"));
    let others = PoolsFind { kind: Some(PoolKind::Btrfs), source: None };
    assert!(!agent.pools_find(&s.read(), others).await.unwrap().iter().any(|p| p.spec == spec));

    // It is replaced, follows the volume through a restore, and goes with it.
    let again = PoolDescribe { pool, own: None, volumes: vec![(volumes[0].id, text(7))] };
    agent.pool_describe(&s.change(), again).await.unwrap();
    agent.volume_snapshot_restore(&s.change(), taken).await.unwrap();
    assert_eq!(s.surveyed(&spec).await[0].description, Some(text(7)));
    agent.volume_delete(&s.change(), at).await.unwrap();
    agent.volume_create(&s.change(), volumes[0].clone()).await.unwrap();
    assert_eq!(s.surveyed(&spec).await[0].description, None, "a new volume is not what an old one was");

    // Nothing without bounds, nothing that could not be read back.
    let large =
        PoolDescribe { pool, own: None, volumes: vec![(volumes[1].id, "x".repeat(MAX_DESCRIPTION + 1))] };
    refused(agent.pool_describe(&s.change(), large).await, ErrorKind::TooLarge);
    let odd = PoolDescribe { pool, own: None, volumes: vec![(volumes[1].id, "a\u{0}b".into())] };
    refused(agent.pool_describe(&s.change(), odd).await, ErrorKind::Invalid);
    let full = PoolDescribe { pool, own: None, volumes: vec![(volumes[1].id, "\"".repeat(MAX_DESCRIPTION))] };
    agent.pool_describe(&s.change(), full).await.expect("the largest, and the worst to be quoted");
    assert_eq!(s.surveyed(&spec).await[1].description.as_ref().map(String::len), Some(MAX_DESCRIPTION));
    let missing = PoolSpec::own(PoolId(s.env.uuid()), PoolKind::Dir);
    let request = PoolDescribe { pool: missing.id, own: None, volumes: vec![] };
    refused(agent.pool_describe(&s.change(), request).await, ErrorKind::NotFound);
    refused(
        agent.pool_survey(&s.read(), PoolSurvey { spec: missing, after: None }).await,
        ErrorKind::Unavailable,
    );

    for volume in &volumes {
        let at = VolumeRef { pool, volume: volume.id };
        agent.volume_delete(&s.change(), at).await.unwrap();
    }
    agent.pool_remove(&s.change(), pool).await.unwrap();
}
