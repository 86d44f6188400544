//! Recovery of what the database has lost: how to lose it, and its scenarios.

use super::{OF_V1, Scenario, done, make, second_pool, snapshot, tree, volume};
use crate::World;
use karst_engine::{LiveOperation, recover::RecoverPool};
use karst_model::{Result, storage::VolumeContent};

/// Loses whatever the database has of a thing: each record with its id, and each name that leads to it. A volume goes with
/// the instance whose root it is, and both with their snapshots. What is on the host stays.
///
/// # Errors
/// Those of the store.
pub async fn lose(w: &World, volume_or_pool: uuid::Uuid) -> Result<()> {
    // Descriptions are written some seconds after the records.
    karst_env::Env::sleep(&w.env, std::time::Duration::from_secs(8)).await;
    let mut ids = vec![volume_or_pool];
    {
        let records = w.engine.inner().inventory.read();
        let of_root: Vec<_> =
            records.instances.values().filter(|i| i.root.uuid() == volume_or_pool).collect();
        ids.extend(of_root.iter().map(|i| i.id.uuid()));
        let snapshots = of_root.iter().flat_map(|i| records.snapshots_of(i.id));
        ids.extend(snapshots.map(|s| s.id.uuid()));
        let of_volume = records.volume_snapshots.values().filter(|s| s.volume.uuid() == volume_or_pool);
        ids.extend(of_volume.map(|s| s.id.uuid()));
    }
    let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
    let (all, _) = karst_store::list_prefix(&*w.store, karst_store::ROOT).await?;
    let lost = all.into_iter().filter(|kv| {
        let last = kv.key.rsplit('/').next().unwrap_or_default();
        ids.iter().any(|id| id == last || kv.value == id.as_bytes())
    });
    let success = lost.map(|kv| karst_store::Op::delete(kv.key)).collect();
    let txn = karst_store::Txn { success, ..Default::default() };
    let revision = w.store.txn(txn).await?.committed().unwrap_or_default();
    w.engine.inner().inventory.wait_for(revision).await
}

/// The root of `c1`, or the volume `v1`, lost.
async fn lost(w: &World, name: &str) -> Result<()> {
    let volume = {
        let records = w.engine.inner().inventory.read();
        records.volumes.values().find(|v| v.name == name).map(|v| v.id)
    };
    lose(w, volume.expect("the scenario made it").uuid()).await
}

/// The one volume that the host has and no record knows.
async fn recover(w: &World) -> Result<LiveOperation> {
    let check =
        w.host().self_check(&karst_agent::CallContext::read(std::time::Duration::from_secs(10)), ()).await?;
    let unknown = {
        let records = w.engine.inner().inventory.read();
        check.volumes.into_iter().find(|id| !records.volumes.contains_key(id))
    };
    w.engine.recover_volume(&w.admin, "default", unknown.expect("the scenario lost it")).await
}

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!(
            "volume-recover",
            "an instance with its snapshots",
            |w| {
                tree(w).await?;
                lost(w, "c1").await
            },
            |w| recover(w).await
        ),
        scenario!(
            "volume-recover",
            "an instance that runs",
            |w| {
                make(w, "c1", true).await?;
                lost(w, "c1").await
            },
            |w| recover(w).await
        ),
        scenario!(
            "volume-recover",
            "a custom volume",
            |w| {
                done(w, volume(w, "v1", VolumeContent::Block).await).await?;
                done(w, snapshot(w, OF_V1, "s1").await).await?;
                lost(w, "v1").await
            },
            |w| recover(w).await
        ),
        scenario!(
            "pool-recover",
            "one that the host still has",
            |w| {
                second_pool(w).await?;
                let pool = w.engine.pool(&w.admin, "second")?.id;
                lose(w, pool.uuid()).await
            },
            |w| {
                let pool = RecoverPool { name: "second".into(), driver: "dir".into(), ..Default::default() };
                w.engine.recover_pool(&w.admin, &pool).await
            }
        ),
    ]
}
