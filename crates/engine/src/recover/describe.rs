//! What is written beside each volume, and the reconciler that keeps it so.
//!
//! A description holds the records that a volume belongs to as they are, with names in place of the ids of what may be made
//! anew under another id (project, profiles). What changes with each start (power, generation) is not in it, so that
//! starts and stops write nothing. Changes are gathered for some seconds and written together; who makes them does not
//! wait. What was written is remembered in memory only: a new daemon offers everything once, and the host leaves alone what
//! says the same.

use crate::{EngineInner, Records, Row};
use karst_agent::{MAX_DESCRIBED, MAX_DESCRIPTION, PoolDescribe};
use karst_env::EnvExt;
use karst_model::{
    Error, ErrorKind, InstanceId, NodeId, PoolId, ProfileId, Result, VolumeId,
    instance::{DesiredPower, Generation, Instance, Lifecycle},
    network::Network,
    snapshot::{Snapshot, VolumeSnapshot},
    storage::{Pool, Volume, VolumeOwner},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Weak},
    time::Duration,
};

/// Version of the texts.
const VERSION: u32 = 1;
/// What changes within this time is written together.
const GATHER: Duration = Duration::from_secs(3);
/// When to try again what could not be written.
const SWEEP: Duration = Duration::from_secs(30);
/// How often it is looked although nothing was announced.
const SELDOM: Duration = Duration::from_secs(3600);

/// What is said of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Description {
    version: u32,
    /// Name of the project that the volume counts for.
    pub project: String,
    pub volume: Volume,
    /// Of a custom volume.
    #[serde(default)]
    pub snapshots: Vec<VolumeSnapshot>,
    /// Whose root it is.
    #[serde(default)]
    pub instance: Option<DescribedInstance>,
}

/// An instance, at its root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DescribedInstance {
    /// Names of its project and profiles.
    pub project: String,
    pub profiles: Vec<String>,
    pub instance: Instance,
    /// Each with the names of its profiles.
    #[serde(default)]
    pub snapshots: Vec<(Snapshot, Vec<String>)>,
}

/// What is said of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PoolDescription {
    version: u32,
    pub pool: Pool,
    /// Networks of the hosts that have it: their guests may still run on them.
    #[serde(default)]
    pub networks: Vec<Network>,
}

/// Reads what a pool says of itself.
///
/// # Errors
/// Invalid, when it is no description of this version.
pub(crate) fn read_pool(text: &str) -> Result<PoolDescription> {
    let read: PoolDescription = serde_json::from_str(text).map_err(|e| {
        Error::invalid("description", "what the pool says of itself cannot be read").with_context(e)
    })?;
    demand_version(read.version)?;
    Ok(read)
}

fn demand_version(version: u32) -> Result<()> {
    if version == VERSION {
        return Ok(());
    }
    Err(Error::unsupported(format!(
        "the description is of version {version}; this version reads {VERSION}, a newer one may read it"
    )))
}

impl Description {
    /// Reads one that lay beside a volume.
    ///
    /// # Errors
    /// Invalid, when it is no description of this version.
    pub fn read(text: &str) -> Result<Self> {
        let read: Self = serde_json::from_str(text)
            .map_err(|e| Error::invalid("description", "the description cannot be read").with_context(e))?;
        demand_version(read.version)?;
        Ok(read)
    }

    /// Of a volume as the records have it; nothing of one that is not whole, or of no interest without its owner.
    /// `roots` are instances by their root volumes.
    pub fn of(records: &Records, volume: &Volume, roots: &BTreeMap<VolumeId, InstanceId>) -> Option<Self> {
        let instance = roots.get(&volume.id).and_then(|id| records.instances.get(id));
        let instance = instance.filter(|i| i.lifecycle == Lifecycle::Ready);
        match volume.owner {
            VolumeOwner::Custom => {}
            VolumeOwner::Instance { instance: owner } if instance.is_some_and(|i| i.id == owner) => {}
            VolumeOwner::Instance { .. } | VolumeOwner::Image { .. } => return None,
        }
        let project = |id| records.projects.get(&id).map(|p| p.name.to_string());
        let profiles = |ids: &[ProfileId]| {
            ids.iter()
                .filter_map(|id| records.profiles.get(id))
                .map(|p| p.name.to_string())
                .collect::<Vec<_>>()
        };
        let described = match instance {
            None => None,
            Some(i) => Some(DescribedInstance {
                project: project(i.project)?,
                profiles: profiles(&i.profiles),
                instance: Instance {
                    generation: Generation::default(),
                    power: DesiredPower::Stopped,
                    last_used_at: None,
                    ..i.value.clone()
                },
                snapshots: records
                    .snapshots_of(i.id)
                    .into_iter()
                    .map(|s| (s.value.clone(), profiles(&s.profiles)))
                    .collect(),
            }),
        };
        Some(Self {
            version: VERSION,
            project: project(volume.project)?,
            volume: volume.clone(),
            snapshots: records.volume_snapshots_of(volume.id).into_iter().map(|s| s.value.clone()).collect(),
            instance: described,
        })
    }
}

fn hash(of: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// Instances by their roots.
pub(crate) fn roots(records: &Records) -> BTreeMap<VolumeId, InstanceId> {
    records.instances.values().map(|i| (i.root, i.id)).collect()
}

/// What was written.
#[derive(Default)]
struct Written {
    /// The revisions that a text was made of, and a hash of the text.
    volumes: BTreeMap<VolumeId, (u64, u64)>,
    pools: BTreeMap<(NodeId, PoolId), u64>,
}

/// What is to be written on one pool of one host.
#[derive(Default)]
struct Batch {
    own: Option<(u64, String)>,
    volumes: Vec<(VolumeId, (u64, u64), String)>,
}

impl Written {
    /// What has changed, as much as goes into one call for each pool. Nothing for those that `failed`.
    fn next(
        &mut self,
        inner: &EngineInner,
        failed: &BTreeSet<(NodeId, PoolId)>,
    ) -> BTreeMap<(NodeId, PoolId), Batch> {
        let records = inner.inventory.read();
        self.volumes.retain(|id, _| records.volumes.contains_key(id));
        self.pools.retain(|(_, pool), _| records.pools.contains_key(pool));
        let mut all: BTreeMap<(NodeId, PoolId), Batch> = BTreeMap::new();
        let mut bytes = 0;
        let networks = hash(records.networks.values().map(|n| n.mod_revision).collect::<Vec<_>>());
        // Nothing can be written onto one that its hosts have let go of: it is said when they open it again.
        for pool in records.pools.values().filter(|p| !p.life.stopped) {
            let at = hash((pool.mod_revision, networks));
            for node in inner.agents.nodes() {
                let place = (node, pool.id);
                if failed.contains(&place)
                    || self.pools.get(&place) == Some(&at)
                    || bytes > MAX_DESCRIPTION / 2
                {
                    continue;
                }
                // Those of a project alone are walled in by what the database says of it: without that they are not taken over.
                let shared = records.networks.values().filter(|n| records.owner_of(n.project).is_none());
                let networks = shared.map(|n| n.value.clone()).collect();
                let said = PoolDescription { version: VERSION, pool: pool.value.clone(), networks };
                if let Some(text) = text_of(&said, &pool.name) {
                    bytes += text.len();
                    all.entry(place).or_default().own = Some((at, text));
                } else {
                    self.pools.insert(place, at);
                }
            }
        }
        let roots = roots(&records);
        let profiles = hash(records.profiles.values().map(|p| (p.id, &p.name)).collect::<Vec<_>>());
        let projects = hash(records.projects.values().map(|p| (p.id, &p.name)).collect::<Vec<_>>());
        let mut taken: BTreeMap<uuid::Uuid, u64> = BTreeMap::new();
        let mut count = |of: uuid::Uuid, revision: u64| {
            let sum = taken.entry(of).or_default();
            *sum = sum.wrapping_mul(31).wrapping_add(revision);
        };
        records.snapshots.values().for_each(|s| count(s.instance.uuid(), revision(s)));
        records.volume_snapshots.values().for_each(|s| count(s.volume.uuid(), revision(s)));
        for volume in records.volumes.values() {
            let instance = roots.get(&volume.id).and_then(|id| records.instances.get(id));
            let node = instance.map_or(inner.node, |i| i.node);
            let place = (node, volume.pool);
            let stopped = records.pools.get(&volume.pool).is_some_and(|p| p.life.stopped);
            if stopped || failed.contains(&place) {
                continue;
            }
            let at = hash((
                revision(volume),
                instance.map(|i| (revision(i), taken.get(&i.id.uuid()).copied())),
                taken.get(&volume.id.uuid()),
                (profiles, projects),
            ));
            let old = self.volumes.get(&volume.id).copied();
            if old.is_some_and(|(made_of, _)| made_of == at) {
                continue;
            }
            let said = Description::of(&records, volume, &roots);
            // Of one that is being made it is looked again when that has changed its record.
            let Some(text) = said.and_then(|said| text_of(&said, &volume.name)) else {
                self.volumes.insert(volume.id, (at, 0));
                continue;
            };
            let says = hash(&text);
            if old.is_some_and(|(_, said)| said == says) {
                self.volumes.insert(volume.id, (at, says));
                continue;
            }
            let batch = all.entry(place).or_default();
            if batch.volumes.len() == MAX_DESCRIBED || bytes > 0 && bytes + text.len() > MAX_DESCRIPTION {
                break;
            }
            bytes += text.len();
            batch.volumes.push((volume.id, (at, says), text));
        }
        all.retain(|_, batch| batch.own.is_some() || !batch.volumes.is_empty());
        all
    }
}

fn revision<T>(row: &Row<T>) -> u64 {
    row.stored().mod_revision
}

/// As it is written; nothing when it is longer than what can be read back.
fn text_of(said: &impl Serialize, name: &str) -> Option<String> {
    match serde_json::to_string(said) {
        Ok(text) if text.len() <= MAX_DESCRIPTION => Some(text),
        Ok(text) => {
            let bytes = text.len();
            tracing::warn!(
                name,
                bytes,
                "too much is known of it to be kept on its pool: it could not be recovered"
            );
            None
        }
        Err(e) => {
            tracing::error!(name, error = %e, "a description could not be written");
            None
        }
    }
}

/// Writes what has changed. Answers whether something is left.
async fn round(
    inner: &Arc<EngineInner>,
    written: &mut Written,
    known: &mut BTreeSet<(NodeId, PoolId)>,
) -> bool {
    let mut failed = BTreeSet::new();
    loop {
        let batches = written.next(inner, &failed);
        if batches.is_empty() {
            known.retain(|place| failed.contains(place));
            return !failed.is_empty();
        }
        for ((node, pool), batch) in batches {
            let request = PoolDescribe {
                pool,
                own: batch.own.as_ref().map(|(_, text)| text.clone()),
                volumes: batch.volumes.iter().map(|(id, _, text)| (*id, text.clone())).collect(),
            };
            let context = inner.reconcile_context(Duration::from_secs(60));
            let done = match inner.agents.get(node) {
                Ok(agent) => agent.pool_describe(&context, request).await,
                Err(e) => Err(e),
            };
            match done {
                Ok(()) => {
                    if let Some((at, _)) = batch.own {
                        written.pools.insert((node, pool), at);
                    }
                    written.volumes.extend(batch.volumes.into_iter().map(|(id, at, _)| (id, at)));
                }
                Err(e) => {
                    failed.insert((node, pool));
                    // A host that restarts, a pool that comes or goes: told by others, and tried again.
                    let passing = matches!(
                        e.kind,
                        ErrorKind::Unavailable
                            | ErrorKind::NotFound
                            | ErrorKind::Conflict
                            | ErrorKind::Timeout
                    );
                    if known.insert((node, pool)) && !passing {
                        let context = e.context.as_deref().unwrap_or_default();
                        tracing::warn!(%node, %pool, error = %e, context, "descriptions on a pool are behind; trying again");
                    } else {
                        tracing::debug!(%node, %pool, error = %e, "descriptions on a pool are behind");
                    }
                }
            }
        }
    }
}

/// Writes what is said of a pool and of what is in it, now: nobody can once its hosts have let go of it.
pub(crate) async fn describe_now(inner: &EngineInner, pool: PoolId) -> Result<()> {
    let others: BTreeSet<(NodeId, PoolId)> = {
        let records = inner.inventory.read();
        let others = records.pools.keys().filter(|id| **id != pool);
        others.flat_map(|id| inner.agents.nodes().into_iter().map(move |node| (node, *id))).collect()
    };
    let mut written = Written::default();
    loop {
        let batches = written.next(inner, &others);
        if batches.is_empty() {
            return Ok(());
        }
        for ((node, pool), batch) in batches {
            let request = PoolDescribe {
                pool,
                own: batch.own.as_ref().map(|(_, text)| text.clone()),
                volumes: batch.volumes.iter().map(|(id, _, text)| (*id, text.clone())).collect(),
            };
            let context = inner.reconcile_context(Duration::from_secs(60));
            inner.agents.get(node)?.pool_describe(&context, request).await?;
            written.pools.extend(batch.own.map(|(at, _)| ((node, pool), at)));
            written.volumes.extend(batch.volumes.into_iter().map(|(id, at, _)| (id, at)));
        }
    }
}

/// Runs as long as the engine.
pub(crate) async fn follow(weak: Weak<EngineInner>) {
    let (mut written, mut known) = (Written::default(), BTreeSet::new());
    let Some(mut changes) = weak.upgrade().map(|i| i.inventory.changes()) else { return };
    loop {
        let Some(inner) = weak.upgrade() else { return };
        let env = inner.env.clone();
        drop(inner);
        env.sleep(GATHER).await;
        let Some(inner) = weak.upgrade() else { return };
        changes.borrow_and_update();
        let behind = round(&inner, &mut written, &mut known).await;
        drop(inner);
        if let Ok(Err(_)) = env.timeout(if behind { SWEEP } else { SELDOM }, changes.changed()).await {
            return;
        }
    }
}
