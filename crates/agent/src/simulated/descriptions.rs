//! Descriptions on the pools of a simulated host.

use super::SimulatedAgent;
use crate::{calls::*, descriptions::*};
use karst_model::{
    Error, PoolId, Result, VolumeId,
    spec::{PoolSource, PoolSpec},
};
use std::collections::BTreeMap;

/// What is said of pools and volumes.
#[derive(Default)]
pub(super) struct Described {
    pub pools: BTreeMap<PoolId, String>,
    pub volumes: BTreeMap<VolumeId, String>,
}

impl SimulatedAgent {
    pub(super) fn describe_pool(&self, request: PoolDescribe) -> Result<()> {
        request.check()?;
        let mut state = self.lock();
        state.demand_open(request.pool)?;
        if let Some(own) = request.own {
            state.described.pools.insert(request.pool, own);
        }
        for (volume, text) in request.volumes {
            if state.volumes.get(&volume).is_some_and(|v| v.spec.pool == request.pool) {
                state.described.volumes.insert(volume, text);
            }
        }
        Ok(())
    }

    pub(super) fn survey_pool(&self, request: &PoolSurvey) -> Result<PoolSurveyed> {
        let state = self.lock();
        if state.pools.get(&request.spec.id) != Some(&request.spec) {
            return Err(Error::unavailable("what it is made of is not there"));
        }
        let mut found = PoolSurveyed::default();
        let of_pool = state.volumes.iter().filter(|(_, v)| v.spec.pool == request.spec.id);
        for (id, volume) in of_pool.filter(|(id, _)| request.after.is_none_or(|after| **id > after)) {
            // As small as can be, so that whoever asks has to ask again.
            if found.volumes.len() == 2 {
                found.more = true;
                break;
            }
            let snapshots = volume.snapshots.iter();
            found.volumes.push(FoundVolume {
                volume: *id,
                content: volume.spec.content,
                size: volume.size,
                snapshots: snapshots.map(|(id, s)| VolumeSnapshot { snapshot: *id, size: s.size }).collect(),
                description: state.described.volumes.get(id).cloned(),
            });
        }
        Ok(found)
    }

    pub(super) fn find_pools(&self, wanted: &PoolsFind) -> Result<Vec<FoundPool>> {
        let state = self.lock();
        let at = |spec: &PoolSpec| match (&wanted.source, &spec.source) {
            (None, _) => true,
            (Some(wanted), PoolSource::Granted { source }) => wanted == source,
            (Some(_), PoolSource::Own { .. }) => false,
        };
        let pools = state.pools.values().filter(|spec| at(spec));
        let pools = pools.filter(|spec| wanted.kind.is_none_or(|kind| kind == spec.kind));
        let found = pools.map(|spec| FoundPool {
            spec: spec.clone(),
            description: state.described.pools.get(&spec.id).cloned(),
        });
        Ok(found.collect())
    }

    /// Puts a text onto a pool that nobody would write: for tests of what is read.
    pub fn tamper_description(&self, volume: VolumeId, text: Option<String>) {
        let described = &mut self.lock().described.volumes;
        match text {
            Some(text) => drop(described.insert(volume, text)),
            None => drop(described.remove(&volume)),
        }
    }
}
