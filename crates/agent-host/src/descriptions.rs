//! Descriptions of pools and volumes: written for control, and found again when control has lost its database.

use crate::{
    RealAgent,
    pools::{PoolPlace, Purpose},
};
use karst_agent::{
    FoundPool, FoundVolume, MAX_DESCRIBED, MAX_DESCRIPTION, PoolDescribe, PoolSurvey, PoolSurveyed,
    PoolsFind, VolumeSnapshot, is_plain,
};
use karst_model::{Error, Result, VolumeId, spec::PoolSpec, storage::PoolKind};
use karst_storage::PoolDriver;

/// What a pool says of itself or of a volume, if it is a text.
pub(crate) async fn said(pool: &dyn PoolDriver, of: Option<VolumeId>) -> Result<Option<String>> {
    let Some(texts) = pool.descriptions() else { return Ok(None) };
    Ok(texts.description(of, MAX_DESCRIPTION).await?.filter(|text| is_plain(text)))
}

async fn page(pool: &dyn PoolDriver, after: Option<VolumeId>) -> Result<PoolSurveyed> {
    let (mut found, mut bytes) = (PoolSurveyed::default(), 0);
    for volume in pool.list().await?.into_iter().filter(|v| after.is_none_or(|after| v.id > after)) {
        let description = said(pool, Some(volume.id)).await?;
        let mut snapshots = vec![];
        if let Some(driver) = pool.snapshots() {
            let all = driver.list(volume.id).await?.into_iter();
            snapshots.extend(all.map(|(snapshot, info)| VolumeSnapshot { snapshot, size: info.size }));
        }
        bytes += description.as_ref().map_or(0, String::len) + 128 * (1 + snapshots.len());
        if !found.volumes.is_empty() && (bytes > MAX_DESCRIPTION || found.volumes.len() >= MAX_DESCRIBED) {
            found.more = true;
            return Ok(found);
        }
        found.volumes.push(FoundVolume {
            volume: volume.id,
            content: volume.content,
            size: volume.size,
            snapshots,
            description,
        });
    }
    Ok(found)
}

impl RealAgent {
    pub(crate) async fn describe_pool(&self, request: PoolDescribe) -> Result<()> {
        request.check()?;
        let pool = self.pool(request.pool)?;
        match pool.descriptions() {
            Some(texts) => texts.describe(request.own, request.volumes).await,
            None => Ok(()),
        }
    }

    pub(crate) async fn survey_pool(&self, request: PoolSurvey) -> Result<PoolSurveyed> {
        let PoolSurvey { spec, after } = request;
        let _lock = self.lock(spec.id.0).await;
        let known = self.registry.pool(spec.id)?;
        if known.as_ref().is_some_and(|known| *known != spec) {
            return Err(Error::conflict(format!("pool {} is there already, and different", spec.id)));
        }
        if let Ok(pool) = self.pool(spec.id) {
            return page(&*pool, after).await;
        }
        let place = self.pool_place(spec.id);
        let found = match place.open(&spec, &self.options.policy, Purpose::Look).await {
            Ok(pool) => page(&*pool, after).await,
            Err(e) => Err(e),
        };
        if let Err(e) = place.close(&spec).await {
            // What a guest still uses of it stays; what was found is as good.
            tracing::warn!(pool = %spec.id, error = %e, context = e.context, "a pool that was looked at stays open");
        }
        found
    }

    pub(crate) async fn find_pools(&self, wanted: PoolsFind) -> Result<Vec<FoundPool>> {
        let fits = |spec: &PoolSpec| wanted.kind.is_none_or(|kind| kind == spec.kind);
        let mut found = vec![];
        let Some(source) = wanted.source.clone() else {
            for spec in self.registry.pools()?.into_iter().filter(fits) {
                let description = match self.pool(spec.id) {
                    Ok(pool) => said(&*pool, None).await?,
                    // What was let go of keeps what it said.
                    Err(_) => self.registry.closed(spec.id).flatten(),
                };
                found.push(FoundPool { spec, description });
            }
            return Ok(found);
        };
        let kind = wanted.kind.unwrap_or(PoolKind::Dir);
        self.options.policy.check_pool_source(kind, &source)?;
        for (spec, description) in PoolPlace::at(source, kind).await? {
            found.push(FoundPool { spec, description: description.filter(|text| is_plain(text)) });
        }
        Ok(found)
    }
}
