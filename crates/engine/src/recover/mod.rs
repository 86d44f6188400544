//! Finding again what a pool has and the database does not: after the database is lost, or a pool comes from elsewhere.
//!
//! Beside each volume lies a description of the records that it belongs to ([`describe`]). A survey of the pool finds the
//! volumes that no record knows; what their descriptions say is checked as if a user had asked for it ([`plan`]), because
//! whoever had the pool before may have written them. A saga makes the records of one volume again ([`saga`]); what is on
//! the host is never changed, and stays as it is when that fails.

pub(crate) mod describe;
mod plan;
pub mod saga;

use crate::{
    Engine, EngineInner, Records,
    context::Context,
    operations::{LiveOperation, NewOperation},
    saga::runner,
};
use describe::{Description, PoolDescription, read_pool};
use karst_agent::{CallContext, FoundPool, FoundVolume, PoolSurvey, PoolsFind};
use karst_model::{
    Config, Error, Name, NetworkId, Result, VolumeId,
    access::Permission,
    guest::Observed,
    instance::InstanceKind,
    network::Network,
    pool_life::PoolLife,
    spec::{PoolSource, PoolSpec},
    storage::{Pool, PoolKind, VolumeOwner, pool_source},
    uplink::NetworkKind,
};
use plan::{Part, plan_instance, plan_volume};
use saga::{PoolRecover, VolumeRecover};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

const CALL: Duration = Duration::from_secs(120);
/// Most volumes of a pool that are looked at.
const MOST: usize = 100_000;

/// A pool to be looked through: one that there is, by its name, or one that the database does not know.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RecoverPool {
    /// Name; of an unknown pool the one that it is to have.
    pub name: String,
    /// Incus' driver name, of an unknown pool.
    pub driver: String,
    /// User's text, of an unknown pool; that of the pool itself without it.
    pub description: String,
    /// Configuration as written, of an unknown pool: above all its `source`.
    pub config: Config,
}

/// Something that is on a pool and not in the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// Pool.
    pub pool: String,
    /// Project that it belonged to.
    pub project: String,
    /// Kind of the instance; `None`: a custom volume.
    pub kind: Option<InstanceKind>,
    /// Name.
    pub name: String,
    /// Number of its snapshots.
    pub snapshots: usize,
}

/// What was found on pools.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Survey {
    /// What could be recovered.
    pub lost: Vec<Lost>,
    /// What must be made before, in words.
    pub missing: Vec<String>,
    /// Volumes that nothing (legible) is said of, each with why: they stay as they are.
    pub unclear: Vec<String>,
}

/// A pool that is looked through.
struct Looked {
    /// Its record, or what that is to be.
    pool: Pool,
    known: bool,
    found: Vec<(FoundVolume, Description)>,
    unclear: Vec<String>,
}

impl Looked {
    fn lost(&self) -> Vec<Lost> {
        let mut all = vec![];
        for (_, said) in &self.found {
            let lost = |kind, project: &str, name: &str, snapshots| Lost {
                pool: self.pool.name.to_string(),
                project: project.to_owned(),
                kind,
                name: name.to_owned(),
                snapshots,
            };
            let of = said.instance.as_ref();
            if said.volume.owner == VolumeOwner::Custom {
                all.push(lost(None, &said.project, &said.volume.name, said.snapshots.len()));
            }
            if let Some(i) = of {
                all.push(lost(Some(i.instance.kind), &i.project, &i.instance.name, i.snapshots.len()));
            }
        }
        all
    }
}

impl EngineInner {
    /// Volumes of a pool that no record knows, with what is said of them.
    async fn look_through(&self, pool: Pool, known: bool) -> Result<Looked> {
        let agent = self.agents.get(self.node)?;
        let mut looked = Looked { pool, known, found: vec![], unclear: vec![] };
        let spec = looked.pool.spec()?;
        let (mut after, mut seen) = (None, 0);
        loop {
            let page =
                agent.pool_survey(&CallContext::read(CALL), PoolSurvey { spec: spec.clone(), after }).await?;
            seen += page.volumes.len();
            after = page.volumes.last().map(|v| v.volume).or(after);
            let more = page.more && !page.volumes.is_empty();
            let known = |id: VolumeId| self.inventory.read().volumes.contains_key(&id);
            for found in page.volumes.into_iter().filter(|v| !known(v.volume)) {
                let said = match found.description.as_deref() {
                    None => Err(Error::not_found("nothing is said of it")),
                    Some(text) => Description::read(text).and_then(|said| plan::demand_of(&found, said)),
                };
                match said {
                    Ok(said) => looked.found.push((FoundVolume { description: None, ..found }, said)),
                    Err(e) => looked.unclear.push(format!(
                        "volume {} in pool {:?}: {}",
                        found.volume, &*looked.pool.name, e.message
                    )),
                }
            }
            if !more {
                return Ok(looked);
            }
            if seen > MOST {
                return Err(Error::too_large(format!("the pool has more than {MOST} volumes")).at("pools"));
            }
        }
    }

    /// The record of a pool that the database does not know, as it was made.
    async fn unknown_pool(&self, wanted: &RecoverPool) -> Result<Pool> {
        let name = Name::parse("name", &wanted.name)?;
        if wanted.driver.is_empty() {
            return Err(Error::not_found(format!("storage pool {:?} not found", wanted.name)));
        }
        let kind = PoolKind::parse("driver", &wanted.driver)?;
        let source = match pool_source(kind, &wanted.config)? {
            PoolSource::Own { .. } => None,
            PoolSource::Granted { source } => Some(source),
        };
        let agent = self.agents.get(self.node)?;
        agent.host_facts(&CallContext::read(CALL), ()).await?.demand_storage(kind)?;
        let mut all = agent
            .pools_find(&CallContext::read(CALL), PoolsFind { kind: Some(kind), source: source.clone() })
            .await?;
        {
            let records = self.inventory.read();
            all.retain(|found| !records.pools.contains_key(&found.spec.id));
        }
        let said: Vec<Option<PoolDescription>> = all.iter().map(described).collect();
        let named = said.iter().position(|p| p.as_ref().is_some_and(|p| p.pool.name == name));
        let place = source.as_deref().unwrap_or("this host");
        let chosen = match (named, all.len()) {
            (Some(n), _) => n,
            (None, 1) => 0,
            (None, 0) => {
                return Err(Error::not_found(format!(
                    "{place} has no pool of driver {} that the database does not know",
                    kind.as_str()
                ))
                .at("config.source"));
            }
            (None, _) => {
                let names: Vec<_> = said.iter().flatten().map(|p| p.pool.name.to_string()).collect();
                return Err(Error::invalid(
                    "name",
                    format!("{place} has several pools; name one of them: {}", names.join(", ")),
                ));
            }
        };
        let spec = &all[chosen].spec;
        let was = said.into_iter().nth(chosen).flatten().map(|p| p.pool);
        let mut config = was.as_ref().map(|p| p.config.clone()).unwrap_or_default();
        config.extend(wanted.config.clone());
        let description = match (&was, wanted.description.as_str()) {
            (Some(was), "") => was.description.clone(),
            (_, said) => said.to_owned(),
        };
        let life = PoolLife::default();
        let pool = Pool { id: spec.id, name, kind: spec.kind, description, config, life, spec_version: 1 };
        as_made(pool, spec)
    }

    async fn look(&self, wanted: &RecoverPool) -> Result<Looked> {
        let there = self.inventory.read().pool(&wanted.name).ok().map(|row| row.value.clone());
        match there {
            Some(pool) => self.look_through(pool, true).await,
            None => self.look_through(self.unknown_pool(wanted).await?, false).await,
        }
    }

    async fn observed(&self) -> Result<BTreeMap<karst_model::InstanceId, Observed>> {
        let agent = self.agents.get(self.node)?;
        let seen = agent.guest_observe_all(&CallContext::read(CALL), ()).await?;
        Ok(seen.into_iter().map(|o| (o.instance, o)).collect())
    }
}

/// A pool whose configuration says what its host knows; keys that say otherwise are dropped.
pub(crate) fn as_made(mut pool: Pool, spec: &PoolSpec) -> Result<Pool> {
    if pool.spec().is_ok_and(|said| said == *spec) {
        return Ok(pool);
    }
    let free = |key: &str| key.starts_with("user.") || karst_model::storage::default_of(key).is_some();
    pool.config.retain(|key, _| free(key));
    match &spec.source {
        PoolSource::Granted { source } => drop(pool.config.insert("source".into(), source.clone())),
        PoolSource::Own { size: Some(size) } => {
            pool.config.insert("size".into(), size.bytes().to_string());
        }
        PoolSource::Own { size: None } => {}
    }
    pool.config.extend(spec.options.config().map(|(key, value)| (key.to_owned(), value)));
    match pool.spec()? == *spec {
        true => Ok(pool),
        false => {
            Err(Error::invalid("config", "the pool was made in another way than its configuration says"))
        }
    }
}

pub(crate) fn described(found: &FoundPool) -> Option<PoolDescription> {
    // One that cannot be read is as good as none: the pool gets another name.
    found.description.as_deref().and_then(|text| read_pool(text).ok())
}

/// What must be there before anything of `all` can be made again.
fn missing(records: &Records, all: &[Looked]) -> Vec<String> {
    let mut missing = BTreeSet::new();
    let pools: BTreeSet<&str> =
        records.pools.values().map(|p| &*p.name).chain(all.iter().map(|l| &*l.pool.name)).collect();
    for (_, said) in all.iter().flat_map(|looked| &looked.found) {
        if records.project(&said.project).is_err() {
            missing.insert(format!("Project {:?}", said.project));
        }
        let Some(of) = &said.instance else { continue };
        let Ok(project) = records.project(&of.project) else {
            missing.insert(format!("Project {:?}", of.project));
            continue;
        };
        let home = records.home(project, "features.profiles");
        let taken = of.snapshots.iter().flat_map(|(_, profiles)| profiles);
        for profile in of.profiles.iter().chain(taken) {
            if records.profile(home, profile).is_err() {
                missing.insert(format!("Profile {profile:?} in project {:?}", of.project));
            }
        }
        let devices = plan::expanded_devices(records, project, of);
        for keys in devices.values() {
            let is = |key: &str, value: &str| keys.get(key).is_some_and(|v| v == value);
            if is("type", "nic")
                && let Some(network) = keys.get("network").filter(|n| !n.is_empty())
                && records.network(project.id, network).is_err()
            {
                missing.insert(format!("Network {network:?} in project {:?}", of.project));
            }
            // What the device names of pools: each with a volume there, or alone.
            let mut named: Vec<(&String, Option<&String>)> = vec![];
            if is("type", "disk") && !is("path", "/") {
                named.extend(keys.get("pool").map(|pool| (pool, keys.get("source"))));
            } else if is("type", "kernel") {
                let initrd = keys.get("initrd.pool").or(keys.get("pool")).zip(keys.get("initrd"));
                let both = keys.get("pool").zip(keys.get("source")).into_iter().chain(initrd);
                // A file of the host is in no pool.
                let volumes = both.filter(|(_, source)| !source.starts_with('/'));
                named.extend(volumes.map(|(pool, source)| (pool, Some(source))));
            }
            for (pool, source) in named {
                if !pools.contains(&**pool) {
                    missing.insert(format!("Storage pool {pool:?}"));
                    continue;
                }
                let Some(source) = source else { continue };
                let volume =
                    |v: &Description| v.volume.owner == VolumeOwner::Custom && v.volume.name == *source;
                let here = all.iter().filter(|l| *l.pool.name == **pool).flat_map(|l| &l.found);
                let found = here.map(|(_, v)| v).any(volume);
                if !found && records.custom_volume(project.id, pool, source).is_none() {
                    missing.insert(format!(
                        "Custom volume {source:?} in pool {pool:?} of project {:?}",
                        of.project
                    ));
                }
            }
        }
    }
    missing.into_iter().collect()
}

impl Engine {
    /// Looks through pools for what the database does not know. Changes nothing.
    ///
    /// # Errors
    /// Invalid by field, not found (an unknown pool of which nothing is there), forbidden, unavailable.
    pub async fn recover_validate(&self, context: &Context, pools: &[RecoverPool]) -> Result<Survey> {
        context.demand_server(Permission::ServerEdit)?;
        let mut all = vec![];
        for (n, pool) in pools.iter().enumerate() {
            all.push(self.inner().look(pool).await.map_err(|e| at(e, n))?);
        }
        let records = self.inner().inventory.read();
        Ok(Survey {
            lost: all.iter().flat_map(Looked::lost).collect(),
            missing: missing(&records, &all),
            unclear: all.iter().flat_map(|l| l.unclear.clone()).collect(),
        })
    }

    /// Makes the records of everything that [`Engine::recover_validate`] finds: pools, custom volumes, instances. Ends with
    /// the first that fails; what was recovered before it stays, and the next call goes on.
    ///
    /// # Errors
    /// As there; conflict when something is missing, or a name is taken; what a description says that cannot be.
    pub async fn recover_import(&self, context: &Context, pools: &[RecoverPool]) -> Result<Vec<Lost>> {
        context.demand_server(Permission::ServerEdit)?;
        let inner = self.inner();
        let mut all = vec![];
        for (n, pool) in pools.iter().enumerate() {
            all.push(inner.look(pool).await.map_err(|e| at(e, n))?);
        }
        let missing = missing(&inner.inventory.read(), &all);
        if !missing.is_empty() {
            let text = format!("these are missing, make them first: {}", missing.join(", "));
            return Err(Error::conflict(text).at("pools"));
        }
        for looked in all.iter().filter(|l| !l.known) {
            let operation = self.begin_pool(context, looked.pool.clone()).await?;
            succeeded(&operation).await.map_err(|e| of(e, "storage pool", &looked.pool.name))?;
        }
        // What instances refer to comes before them.
        for part in [Part::Volume, Part::Instance] {
            for looked in &all {
                for (found, said) in looked.found.iter().filter(|(_, said)| part.is_in(said)) {
                    let name = match &said.instance {
                        Some(i) if part == Part::Instance => &*i.instance.name,
                        _ => said.volume.name.as_str(),
                    };
                    let begun = self.begin_volume(context, &looked.pool, found, said, part).await;
                    let ended = match begun {
                        Ok(operation) => succeeded(&operation).await,
                        Err(e) => Err(e),
                    };
                    ended.map_err(|e| of(e, part.word(), name))?;
                }
            }
        }
        for text in all.iter().flat_map(|l| &l.unclear) {
            tracing::warn!("not recovered: {text}");
        }
        Ok(all.iter().flat_map(Looked::lost).collect())
    }

    /// Makes the record of a pool that the database does not know.
    ///
    /// # Errors
    /// Invalid by field, not found, conflict (taken name), forbidden.
    pub async fn recover_pool(&self, context: &Context, pool: &RecoverPool) -> Result<LiveOperation> {
        context.demand_server(Permission::ServerEdit)?;
        let pool = self.inner().unknown_pool(pool).await?;
        self.begin_pool(context, pool).await
    }

    /// Makes the records of one volume that the database does not know: a custom volume, or an instance with its root.
    ///
    /// # Errors
    /// Not found (pool, volume, profile, network), conflict (taken name), invalid when the description says what cannot be,
    /// forbidden.
    pub async fn recover_volume(
        &self,
        context: &Context,
        pool: &str,
        volume: VolumeId,
    ) -> Result<LiveOperation> {
        context.demand_server(Permission::ServerEdit)?;
        let inner = self.inner();
        let row = inner.inventory.read().pool(pool)?.value.clone();
        let looked = inner.look_through(row, true).await?;
        let (found, said) =
            looked.found.iter().find(|(found, _)| found.volume == volume).ok_or_else(|| {
                Error::not_found(format!(
                    "pool {pool:?} has no described volume {volume} that the database does not know"
                ))
            })?;
        let part = if Part::Volume.is_in(said) { Part::Volume } else { Part::Instance };
        self.begin_volume(context, &looked.pool, found, said, part).await
    }
}

impl Engine {
    /// Looks at what an active pool has: custom volumes that no record knows get their records again, as far as their names are free
    /// and their projects are there. Answers how many. Who may only look at the server has nothing changed.
    ///
    /// # Errors
    /// Not found, conflict when the pool is not active, forbidden, unavailable.
    pub async fn pool_refresh(&self, context: &Context, name: &str) -> Result<usize> {
        let pool = self.pool(context, name)?.value.clone();
        crate::storage::life::demand_active(&pool)?;
        if !context.principal().may(Permission::ServerEdit, None) {
            return Ok(0);
        }
        let looked = self.inner().look_through(pool, true).await?;
        let mut found_again = 0;
        for (found, said) in looked.found.iter().filter(|(_, said)| Part::Volume.is_in(said)) {
            let ended = match self.begin_volume(context, &looked.pool, found, said, Part::Volume).await {
                Ok(operation) => succeeded(&operation).await,
                Err(e) => Err(e),
            };
            match ended {
                Ok(()) => found_again += 1,
                Err(error) => {
                    let volume = &said.volume.name;
                    tracing::warn!(pool = name, volume, %error, "a volume that no record knows stays so");
                }
            }
        }
        Ok(found_again)
    }

    async fn begin_pool(&self, context: &Context, pool: Pool) -> Result<LiveOperation> {
        let inner = self.inner();
        runner::start::<PoolRecover>(inner, context, |_| {
            let records = inner.inventory.read();
            if records.pool(&pool.name).is_ok() {
                return Err(
                    Error::conflict(format!("a storage pool {:?} exists already", &*pool.name)).at("name")
                );
            }
            let path = format!("/1.0/storage-pools/{}", pool.name);
            let new = NewOperation::task("Recovering storage pool", None, "storage-pools", path);
            Ok((saga::PoolPlan { pool: pool.clone(), node: inner.node }, new))
        })
        .await
    }

    async fn begin_volume(
        &self,
        context: &Context,
        pool: &Pool,
        found: &FoundVolume,
        said: &Description,
        part: Part,
    ) -> Result<LiveOperation> {
        let inner = self.inner();
        let observed = inner.observed().await?;
        runner::start::<VolumeRecover>(inner, context, |tx| {
            let records = inner.inventory.read();
            let plan = match part {
                Part::Volume => plan_volume(inner, &records, tx, pool, found, said)?,
                Part::Instance => plan_instance(inner, &records, tx, pool, found, said, &observed)?,
            };
            let (project, kind) = match part {
                Part::Volume => (plan.volume.as_ref().map(|v| v.project), "storage_volumes"),
                Part::Instance => (plan.instance.as_ref().map(|i| i.project), "instances"),
            };
            let new = NewOperation::task(part.title(), project, kind, plan.path.clone());
            Ok((plan, new))
        })
        .await
    }

    /// On the first start over an empty database, of a host that has pools: it has lost its database. Pools come back by
    /// themselves, because nothing is decided by that, and with them the networks that the host still has, to which guests
    /// may be attached. What is on the pools waits for an administrator.
    pub(crate) async fn adopt_pools(&self, context: &Context) -> Result<()> {
        let inner = self.inner();
        let agent = inner.agents.get(inner.node)?;
        let read = CallContext::read(CALL);
        let all = agent.pools_find(&read, PoolsFind { kind: None, source: None }).await?;
        let there = |found: &FoundPool| inner.inventory.read().pools.contains_key(&found.spec.id);
        let lost: Vec<_> = all.into_iter().filter(|found| !there(found)).collect();
        if lost.is_empty() {
            return Ok(());
        }
        let mut networks: BTreeMap<NetworkId, Network> = BTreeMap::new();
        for found in lost {
            let said = described(&found);
            let id = found.spec.id.to_string();
            let fallback = Name::parse("name", &format!("recovered-{}", &id[..8]))?;
            let mut name = said.as_ref().map_or(fallback.clone(), |p| p.pool.name.clone());
            if inner.inventory.read().pool(&name).is_ok() {
                name = fallback;
            }
            let pool = Pool {
                id: found.spec.id,
                kind: found.spec.kind,
                description: said.as_ref().map(|p| p.pool.description.clone()).unwrap_or_default(),
                config: said.as_ref().map(|p| p.pool.config.clone()).unwrap_or_default(),
                life: PoolLife::default(),
                spec_version: 1,
                name,
            };
            networks.extend(said.into_iter().flat_map(|p| p.networks).map(|n| (n.id, n)));
            let pool = as_made(pool, &found.spec)?;
            let name = pool.name.to_string();
            let operation = self.begin_pool(context, pool).await?;
            match succeeded(&operation).await {
                Ok(()) => tracing::warn!(
                    name,
                    "the host has a storage pool that the database did not know: what is on it is found by \"admin recover\""
                ),
                // Its disk may be away; it is found when an administrator asks for it.
                Err(e) => tracing::error!(name, error = %e, "a storage pool of the host cannot be used"),
            }
        }
        let kept: BTreeSet<NetworkId> = agent.self_check(&read, ()).await?.networks.into_iter().collect();
        for network in networks.into_values().filter(|n| kept.contains(&n.id)) {
            adopt_network(inner, network).await?;
        }
        Ok(())
    }
}

/// The record of a bridge that the host still has. Not one with rules that are lost: without them it would let through more
/// than before.
async fn adopt_network(inner: &Arc<EngineInner>, network: Network) -> Result<()> {
    let ruled = network.config.keys().any(|key| key.starts_with("security.acls"));
    let readable = network.form().is_ok();
    if network.kind != NetworkKind::Bridge || ruled || !readable {
        return Ok(());
    }
    inner
        .transact(|records, tx| {
            let project = records.project(karst_model::project::DEFAULT_PROJECT)?.id;
            if records.networks.contains_key(&network.id) || records.network(project, &network.name).is_ok() {
                return Ok(());
            }
            let adopted = Network { project, spec_version: 1, ..network.clone() };
            for (scope, name) in records.network_names(&adopted) {
                tx.take_name("networks", &scope, &name, &network.id.to_string());
            }
            tx.create(&adopted);
            Ok(())
        })
        .await
}

fn at(e: Error, n: usize) -> Error {
    let field = e.field.clone().map_or_else(|| format!("pools[{n}]"), |f| format!("pools[{n}].{f}"));
    e.at(field)
}

fn of(e: Error, what: &str, name: &str) -> Error {
    Error { message: format!("{what} {name:?}: {}", e.message), ..e }
}

async fn succeeded(operation: &LiveOperation) -> Result<()> {
    match &operation.ended().await.error {
        None => Ok(()),
        Some(e) => Err(e.clone()),
    }
}
