//! Sampled figures of guests: at most 2 s old, asked for at most once at a time per node.

use crate::{Engine, context::Context};
use karst_agent::{CallContext, MAX_USAGES, VolumeRef};
use karst_env::EnvExt;
use karst_model::{
    InstanceId, NodeId, PoolId, Result, VolumeId, guest::Metrics, history::Series, storage::Usage,
};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

/// Oldest answer that is given.
const MAX_AGE: Duration = Duration::from_secs(2);
/// A host that takes longer is left out of the answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// Figures by instance, with their time.
pub type Sample = Arc<HashMap<InstanceId, Metrics>>;

/// The last sample of a node and when it was taken; locked while the node is asked.
type Slot = Arc<tokio::sync::Mutex<Option<(Duration, Sample)>>>;

/// Space of volumes and when it was looked at; nothing of those that were not told.
type Spaces = HashMap<VolumeId, (Duration, Option<Usage>)>;

/// The last sample of each node, and the last one with details.
#[derive(Default)]
pub struct Cache {
    nodes: Mutex<HashMap<(NodeId, bool), Slot>>,
    /// Locked while the host is asked.
    spaces: tokio::sync::Mutex<Spaces>,
}

impl Engine {
    /// Figures of one running instance; `None` when it does not run.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub async fn instance_metrics(
        &self,
        context: &Context,
        project: &str,
        name: &str,
    ) -> Result<Option<Metrics>> {
        let view = self.instance(context, project, name)?;
        if !view.status.is_up() {
            return Ok(None);
        }
        let agent = self.inner().agents.get(view.instance.node)?;
        let mut found = agent.guest_metrics(&CallContext::read(PATIENCE), vec![view.instance.id]).await?;
        Ok(found.pop().map(|(_, m)| m))
    }

    /// What an instance used over time, one series for each resolution; without points where it never ran.
    ///
    /// # Errors
    /// Not found, forbidden; unavailable when its host does not answer.
    pub async fn instance_history(
        &self,
        context: &Context,
        project: &str,
        name: &str,
    ) -> Result<Vec<Series>> {
        let view = self.instance(context, project, name)?;
        let agent = self.inner().agents.get(view.instance.node)?;
        agent.guest_history(&CallContext::read(PATIENCE), view.instance.id).await
    }

    /// Figures of all running instances, at most 2 s old. A host that does not answer is left out.
    pub async fn all_metrics(&self) -> Sample {
        self.sampled(false).await
    }

    /// The same with what monitoring alone reads.
    pub(crate) async fn all_details(&self) -> Sample {
        self.sampled(true).await
    }

    async fn sampled(&self, detailed: bool) -> Sample {
        let inner = self.inner();
        let samples = inner.agents.all().into_iter().map(|(node, agent)| async move {
            let slot = inner
                .metrics
                .nodes
                .lock()
                .unwrap_or_else(|e| e.into_inner())
                .entry((node, detailed))
                .or_default()
                .clone();
            let mut slot = slot.lock().await;
            if let Some((taken, sample)) = &*slot
                && inner.env.monotonic().saturating_sub(*taken) < MAX_AGE
            {
                return sample.clone();
            }
            let taken = inner.env.monotonic();
            let context = CallContext::read(PATIENCE);
            let asking = match detailed {
                true => agent.guest_details(&context, vec![]),
                false => agent.guest_metrics(&context, vec![]),
            };
            let asked = inner.env.timeout(PATIENCE, asking).await;
            let sample: Sample = match asked {
                Ok(Ok(list)) => Arc::new(list.into_iter().collect()),
                Ok(Err(e)) => {
                    tracing::warn!(%node, error = %e, "a host does not tell its figures");
                    Sample::default()
                }
                Err(_) => Sample::default(),
            };
            *slot = Some((taken, sample.clone()));
            sample
        });
        let mut all = futures::future::join_all(samples).await;
        match all.len() {
            1 => all.pop().unwrap_or_default(),
            _ => Arc::new(all.iter().flat_map(|s| s.iter().map(|(k, v)| (*k, v.clone()))).collect()),
        }
    }
    /// Space of volumes, as far as their host tells it in time.
    pub async fn volume_usages(&self, volumes: &[(PoolId, VolumeId)]) -> HashMap<VolumeId, Usage> {
        let inner = self.inner();
        let asked_at = inner.env.monotonic();
        let mut spaces = inner.metrics.spaces.lock().await;
        // Whoever waited takes what was found meanwhile, also that the host is silent.
        spaces.retain(|_, (taken, _)| asked_at.saturating_sub(*taken) < MAX_AGE);
        let wanted: Vec<VolumeRef> =
            volumes.iter().map(|(pool, volume)| VolumeRef { pool: *pool, volume: *volume }).collect();
        let unknown: Vec<VolumeRef> =
            wanted.iter().filter(|at| !spaces.contains_key(&at.volume)).copied().collect();
        let mut silent = false;
        for part in unknown.chunks(MAX_USAGES) {
            let mut told: HashMap<VolumeId, Usage> = HashMap::new();
            if !silent && let Ok(agent) = inner.agents.get(inner.node) {
                let context = CallContext::read(PATIENCE);
                let asking = agent.volume_usages(&context, part.to_vec());
                match inner.env.timeout(PATIENCE, asking).await {
                    Ok(Ok(found)) => told.extend(found),
                    Ok(Err(e)) => {
                        tracing::warn!(error = %e, "a host does not tell the space of volumes");
                        silent = true;
                    }
                    Err(_) => silent = true,
                }
            }
            let taken = inner.env.monotonic();
            spaces.extend(part.iter().map(|at| (at.volume, (taken, told.get(&at.volume).copied()))));
        }
        wanted.iter().filter_map(|at| Some((at.volume, spaces.get(&at.volume)?.1?))).collect()
    }
}
