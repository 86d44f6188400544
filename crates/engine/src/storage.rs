//! Storage pools and volumes: the use cases.

pub(crate) mod life;

use crate::{
    Engine, EngineInner, Records, Row,
    context::Context,
    db::Tx,
    events::Subject,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
};
use async_trait::async_trait;
use karst_agent::{CallContext, PoolGrow, VolumeRef};
use karst_model::{
    ByteSize, Config, Error, Name, NodeId, PoolId, ProjectId, Result,
    access::Permission,
    pool_life::PoolLife,
    spec::PoolSource,
    storage::{Abilities, Pool, PoolKind, Usage, Volume, VolumeOwner},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, sync::Arc, time::Duration};

/// Lock target of a pool.
pub fn pool_lock(id: PoolId) -> String {
    format!("pools/{id}")
}

/// Of a transaction that begins to use a pool: the pool is as it was read, nobody is changing it, and who would remove it
/// learns of the use.
pub(crate) fn use_pool(tx: &mut Tx, pool: &Row<Pool>) -> Result<()> {
    life::demand_active(pool)?;
    let target = pool_lock(pool.id);
    tx.expect(pool);
    tx.expect_unlocked(&target);
    tx.touch(&target);
    Ok(())
}

/// The same of several, those of volumes that are changed, say.
pub(crate) fn use_pools(
    records: &Records,
    tx: &mut Tx,
    pools: impl IntoIterator<Item = PoolId>,
) -> Result<()> {
    let pools: BTreeSet<PoolId> = pools.into_iter().collect();
    for id in pools {
        let pool = records.pools.get(&id).ok_or_else(|| Error::not_found("the storage pool is gone"))?;
        use_pool(tx, pool)?;
    }
    Ok(())
}

/// What a user wants created.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CreatePool {
    /// Name.
    pub name: String,
    /// Incus' driver name.
    pub driver: String,
    /// User's text.
    pub description: String,
    /// Configuration as written.
    pub config: Config,
    /// Which reference it is to have; `None`: one that nothing else has.
    pub id: Option<PoolId>,
    /// Its record is to end when it is stopped.
    pub transient: bool,
}

/// Replaces what a user may set of a pool.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UpdatePool {
    /// User's text.
    pub description: String,
    /// Configuration as written.
    pub config: Config,
    /// `spec_version` that was read (If-Match).
    pub if_version: Option<u64>,
}

/// Who uses a pool or network, as paths of the API.
pub type UsedBy = Vec<String>;

/// Who uses something, for whoever is refused because of it: named is one that he sees, the others are counted.
pub(crate) fn users_in_words(seen: &UsedBy, all: &UsedBy) -> String {
    match (seen.iter().min(), all.len()) {
        (Some(first), 1) => first.clone(),
        (Some(first), n) => format!("{first} and {} more", n.saturating_sub(1)),
        (None, 1) => "one object of another project".into(),
        (None, n) => format!("{n} objects of other projects"),
    }
}

impl Engine {
    /// All pools that the projects of `context` may use, by name.
    ///
    /// # Errors
    /// Forbidden.
    pub fn pools(&self, context: &Context) -> Result<Vec<Row<Pool>>> {
        context.demand_server(Permission::ServerView)?;
        let records = self.inner().inventory.read();
        let seen = records.pools.values().filter(|p| records.sees_pool(context, p));
        let mut all: Vec<_> = seen.cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// A pool by name.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn pool(&self, context: &Context, name: &str) -> Result<Row<Pool>> {
        context.demand_server(Permission::ServerView)?;
        let records = self.inner().inventory.read();
        let row = records.pool(name)?;
        match records.sees_pool(context, row) {
            true => Ok(row.clone()),
            false => Err(Error::not_found(format!("storage pool {name:?} not found"))),
        }
    }

    /// What uses a pool, as far as `context` may see it.
    pub fn pool_used_by(&self, context: &Context, pool: &Pool) -> UsedBy {
        let sees = |p: ProjectId| context.principal().may(Permission::ProjectView, Some(p));
        let records = self.inner().inventory.read();
        let mut used: UsedBy = vec![];
        for profile in records.profiles.values().filter(|p| sees(p.project)) {
            if profile.devices.values().any(|d| d.get("pool").is_some_and(|p| **p == *pool.name)) {
                let project = records.projects.get(&profile.project).map_or("", |p| &p.name);
                used.push(match project {
                    karst_model::project::DEFAULT_PROJECT => format!("/1.0/profiles/{}", profile.name),
                    other => format!("/1.0/profiles/{}?project={other}", profile.name),
                });
            }
        }
        let instances = records.instances.values();
        for instance in instances.filter(|i| i.pool == pool.id && sees(i.project)) {
            let project =
                records.projects.get(&instance.project).map(|p| p.name.to_string()).unwrap_or_default();
            used.push(crate::compute::path(&project, &instance.name));
        }
        let custom = records.volumes.values().filter(|v| v.pool == pool.id && v.owner == VolumeOwner::Custom);
        used.extend(custom.filter(|v| sees(v.project)).map(|v| crate::volumes::path(&records, v)));
        used
    }

    /// Space of a pool.
    ///
    /// # Errors
    /// Not found, forbidden, unavailable.
    pub async fn pool_usage(&self, context: &Context, name: &str) -> Result<Usage> {
        let pool = self.pool(context, name)?;
        life::demand_active(&pool)?;
        let agent = self.inner().agents.get(self.inner().node)?;
        agent.pool_usage(&CallContext::read(Duration::from_secs(10)), pool.id).await
    }

    /// What the file system of a pool can, where it lies in a directory.
    ///
    /// # Errors
    /// Not found, forbidden, unavailable.
    pub async fn pool_abilities(&self, context: &Context, name: &str) -> Result<Option<Abilities>> {
        let pool = self.pool(context, name)?;
        life::demand_active(&pool)?;
        let agent = self.inner().agents.get(self.inner().node)?;
        agent.pool_abilities(&CallContext::read(Duration::from_secs(10)), pool.id).await
    }

    /// Volumes of a pool that `context` may see, of a project or of all. A project has the custom volumes that it shares.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn volumes(&self, context: &Context, pool: &str, project: Option<&str>) -> Result<Vec<Row<Volume>>> {
        let pool = self.pool(context, pool)?;
        let project = project.map(|p| self.project(context, p, Permission::ProjectView)).transpose()?;
        let records = self.inner().inventory.read();
        let seen = |v: &&Row<Volume>| match &project {
            None => context.principal().may(Permission::ProjectView, Some(v.project)),
            // Whoever sees the project sees what it shares.
            Some(p) if v.owner == VolumeOwner::Custom => v.project == records.volume_project(p.id),
            Some(p) => v.project == p.id,
        };
        Ok(records.volumes.values().filter(|v| v.pool == pool.id).filter(seen).cloned().collect())
    }

    /// Space of a volume.
    ///
    /// # Errors
    /// Not found, unavailable.
    pub async fn volume_usage(&self, volume: &Volume) -> Result<Usage> {
        let agent = self.inner().agents.get(self.inner().node)?;
        let which = VolumeRef { pool: volume.pool, volume: volume.id };
        agent.volume_usage(&CallContext::read(Duration::from_secs(10)), which).await
    }

    /// Creates a pool.
    ///
    /// # Errors
    /// Invalid by field, conflict (taken name), forbidden.
    pub async fn pool_create(&self, context: &Context, request: CreatePool) -> Result<LiveOperation> {
        context.demand_server(Permission::ServerEdit)?;
        let inner = self.inner();
        let name = Name::parse("name", &request.name)?;
        let kind = PoolKind::parse("driver", &request.driver)?;
        karst_model::storage::pool_source(kind, &request.config)?;
        self.demand_kind(kind).await?;
        runner::start::<PoolCreate>(inner, context, |_| {
            let records = inner.inventory.read();
            if records.pool(&name).is_ok() {
                return Err(Error::conflict(format!("a storage pool {:?} exists already", &*name)).at("name"));
            }
            if let Some(other) = request.id.and_then(|id| records.pools.get(&id)) {
                return Err(Error::conflict(format!("storage pool {:?} has that id", &*other.name)).at("id"));
            }
            let pool = Pool {
                id: request.id.unwrap_or_else(|| PoolId(inner.env.uuid())),
                name: name.clone(),
                kind,
                description: request.description.clone(),
                config: request.config.clone(),
                life: PoolLife { transient: request.transient, ..PoolLife::default() },
                spec_version: 1,
            };
            let new = NewOperation::task(
                "Creating storage pool",
                None,
                "storage-pools",
                format!("/1.0/storage-pools/{name}"),
            );
            Ok((PoolPlan { pool, nodes: inner.agents.nodes() }, new))
        })
        .await
    }

    /// Every host must be able to have such a pool. It is asked for now: a package or a module may have come a moment ago.
    async fn demand_kind(&self, kind: PoolKind) -> Result<()> {
        let inner = self.inner();
        // Nothing is missing for those.
        for node in inner.agents.nodes().into_iter().filter(|_| kind != PoolKind::Dir) {
            let facts = inner.agents.get(node)?.host_facts(&CallContext::read(ASKING), ()).await?;
            facts.demand_storage(kind)?;
        }
        Ok(())
    }

    /// Replaces a pool's description, notes (`user.*`) and defaults of volumes (`volume.*`), and lets one in a file of its own
    /// grow (`size`), which is the operation that is answered. What else the pool is made of stays as it was made.
    ///
    /// # Errors
    /// Invalid by field, not found, conflict (deleted meanwhile), precondition failed, forbidden; what fails on a host comes
    /// with the operation.
    pub async fn pool_update(
        &self,
        context: &Context,
        name: &str,
        request: UpdatePool,
    ) -> Result<Option<LiveOperation>> {
        context.demand_server(Permission::ServerEdit)?;
        let inner = self.inner();
        let config: Config = request.config.into_iter().filter(|(_, v)| !v.is_empty()).collect();
        let request = UpdatePool { config, ..request };
        let grows = changed(inner.inventory.read().pool(name)?, name, &request)?.is_some();
        if grows {
            return self.pool_grow(context, name, &request).await.map(Some);
        }
        let config = &request.config;
        inner
            .transact(|records, tx| {
                let row = records.pool(name)?;
                if changed(row, name, &request)?.is_some() {
                    return Err(Error::conflict(format!(
                        "storage pool {name:?} changes just now; try again"
                    )));
                }
                tx.expect_unlocked(&pool_lock(row.id));
                let mut pool = row.value.clone();
                pool.description = request.description.clone();
                pool.config = config.clone();
                pool.spec_version += 1;
                tx.replace(row, &pool);
                Ok(())
            })
            .await?;
        inner.announce(context, None, "storage-pool-updated", format!("/1.0/storage-pools/{name}"));
        Ok(None)
    }

    async fn pool_grow(&self, context: &Context, name: &str, request: &UpdatePool) -> Result<LiveOperation> {
        let inner = self.inner();
        runner::start::<PoolGrowth>(inner, context, |tx| {
            let records = inner.inventory.read();
            let row = records.pool(name)?;
            life::demand_active(row)?;
            let size = changed(row, name, request)?;
            let size = size.ok_or_else(|| {
                Error::conflict(format!("storage pool {name:?} changes just now; try again"))
            })?;
            tx.expect(row);
            let pool = Pool {
                description: request.description.clone(),
                config: request.config.clone(),
                spec_version: row.spec_version + 1,
                ..row.value.clone()
            };
            let path = format!("/1.0/storage-pools/{name}");
            let new = NewOperation::task("Growing storage pool", None, "storage-pools", path);
            Ok((GrowthPlan { pool, size, nodes: inner.agents.nodes() }, new))
        })
        .await
    }

    /// Deletes a pool that nothing uses.
    ///
    /// # Errors
    /// Not found, conflict when it is used, forbidden.
    pub async fn pool_delete(&self, context: &Context, name: &str) -> Result<LiveOperation> {
        context.demand_server(Permission::ServerEdit)?;
        let inner = self.inner();
        runner::start::<PoolDelete>(inner, context, |tx| {
            let row = {
                let records = inner.inventory.read();
                let row = records.pool(name)?.clone();
                tx.expect_untouched(&records, &pool_lock(row.id));
                row
            };
            let used = self.pool_used_by(&Context::system(), &row);
            if let Some(first) = used.iter().min() {
                return Err(Error::conflict(format!(
                    "storage pool {name:?} is used by {first}{}",
                    if used.len() > 1 { format!(" and {} more", used.len() - 1) } else { String::new() }
                )));
            }
            tx.expect(&row);
            let new = NewOperation::task(
                "Deleting storage pool",
                None,
                "storage-pools",
                format!("/1.0/storage-pools/{name}"),
            );
            Ok((PoolPlan { pool: row.value.clone(), nodes: inner.agents.nodes() }, new))
        })
        .await
    }
}

/// What a change asks of the hosts of a pool: to let it grow to a size. All else that it is made of stays.
fn changed(row: &Row<Pool>, name: &str, request: &UpdatePool) -> Result<Option<ByteSize>> {
    if request.if_version.is_some_and(|v| v != row.spec_version) {
        return Err(Error::precondition_failed(format!(
            "storage pool {name:?} has changed since it was read; read it again"
        )));
    }
    let config = &request.config;
    let source = karst_model::storage::pool_source(row.kind, config)?;
    let made = |c: &Config, key: &str| c.get(key).cloned().unwrap_or_default();
    let mut grows = None;
    for key in config.keys().chain(row.config.keys()).filter(|k| !k.starts_with("user.")) {
        let before = made(&row.config, key);
        if made(config, key) == before {
            continue;
        }
        let field = format!("config.{key}");
        match (key.as_str(), &source) {
            // Of volumes that are made from now on.
            _ if karst_model::storage::default_of(key).is_some() => {}
            ("size", PoolSource::Own { size: Some(size) }) => {
                let now = Some(&before).filter(|s| !s.is_empty()).map(|s| ByteSize::parse(&field, s));
                if now.transpose()?.is_some_and(|now| now > *size) {
                    return Err(Error::invalid(field, format!("a pool only grows; its size is {before}")));
                }
                grows = Some(*size);
            }
            _ => {
                let text = format!("{key} of a pool is decided when it is created; it is {before:?}");
                return Err(Error::invalid(field, text));
            }
        }
    }
    Ok(grows)
}

/// Time that a host has to say what it is.
const ASKING: Duration = Duration::from_secs(20);
/// Time that a host has to make a file system.
const MAKING: Duration = Duration::from_secs(180);

/// Plan of [`PoolCreate`] and [`PoolDelete`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PoolPlan {
    pool: Pool,
    nodes: Vec<NodeId>,
}

/// Makes the pool on every host, then the record.
pub struct PoolCreate;

#[async_trait]
impl Saga for PoolCreate {
    const NAME: &'static str = "pool-create";
    const STEPS: &'static [&'static str] = &["pool"];
    type Plan = PoolPlan;
    type Outputs = ();

    fn locks(plan: &PoolPlan) -> Vec<String> {
        vec![pool_lock(plan.pool.id)]
    }
    fn begin(plan: &PoolPlan, _: &EngineInner, tx: &mut Tx) -> Result<()> {
        tx.take_name("pools", "", &plan.pool.name, &plan.pool.id.to_string());
        Ok(())
    }
    async fn run(cx: &StepContext, plan: &PoolPlan, _: &mut (), _: usize) -> Result<()> {
        let spec = plan.pool.spec()?;
        for node in &plan.nodes {
            cx.agent(*node)?.pool_ensure(&cx.mutate(MAKING), spec.clone()).await?;
        }
        Ok(())
    }
    async fn undo(cx: &StepContext, plan: &PoolPlan, _: &(), _: usize) -> Result<()> {
        for node in &plan.nodes {
            cx.agent(*node)?.pool_remove(&cx.mutate(Duration::from_secs(60)), plan.pool.id).await?;
        }
        Ok(())
    }
    fn commit(plan: &PoolPlan, _: &(), _: &EngineInner, tx: &mut Tx) -> Result<()> {
        tx.create(&plan.pool);
        Ok(())
    }
    fn abort(plan: &PoolPlan, _: &(), _: &EngineInner, tx: &mut Tx) -> Result<()> {
        tx.release_name("pools", "", &plan.pool.name, &plan.pool.id.to_string());
        Ok(())
    }
    fn announce(plan: &PoolPlan) -> Vec<(&'static str, String)> {
        vec![("storage-pool-created", format!("/1.0/storage-pools/{}", plan.pool.name))]
    }
    fn subject(plan: &PoolPlan) -> Option<Subject> {
        Some(Subject::Pool(Arc::new(plan.pool.clone())))
    }
}

/// Removes an empty pool from every host, then the record.
pub struct PoolDelete;

#[async_trait]
impl Saga for PoolDelete {
    const NAME: &'static str = "pool-delete";
    const STEPS: &'static [&'static str] = &["pool"];
    type Plan = PoolPlan;
    type Outputs = ();

    fn locks(plan: &PoolPlan) -> Vec<String> {
        vec![pool_lock(plan.pool.id)]
    }
    fn begin(_: &PoolPlan, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    async fn run(cx: &StepContext, plan: &PoolPlan, _: &mut (), _: usize) -> Result<()> {
        for node in &plan.nodes {
            cx.agent(*node)?.pool_remove(&cx.mutate(Duration::from_secs(60)), plan.pool.id).await?;
        }
        Ok(())
    }
    async fn undo(cx: &StepContext, plan: &PoolPlan, _: &(), _: usize) -> Result<()> {
        if plan.pool.life.unbuilt {
            return Ok(());
        }
        let spec = plan.pool.spec()?;
        for node in &plan.nodes {
            let agent = cx.agent(*node)?;
            agent.pool_ensure(&cx.mutate(MAKING), spec.clone()).await?;
            if plan.pool.life.stopped {
                agent.pool_close(&cx.mutate(MAKING), plan.pool.id).await?;
            }
        }
        Ok(())
    }
    fn commit(plan: &PoolPlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        if let Some(row) = engine.inventory.read().pools.get(&plan.pool.id) {
            tx.delete(row);
        }
        tx.delete_id::<crate::inventory::Uses>(&pool_lock(plan.pool.id));
        tx.release_name("pools", "", &plan.pool.name, &plan.pool.id.to_string());
        Ok(())
    }
    fn abort(_: &PoolPlan, _: &(), _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    fn announce(plan: &PoolPlan) -> Vec<(&'static str, String)> {
        vec![("storage-pool-deleted", format!("/1.0/storage-pools/{}", plan.pool.name))]
    }
}

/// Plan of [`PoolGrowth`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GrowthPlan {
    /// The pool as it will be.
    pool: Pool,
    size: ByteSize,
    nodes: Vec<NodeId>,
}

/// Grows a pool on every host, then the record. What has grown does not shrink: where a host refuses, others stay as large as they
/// are, the record says what it said, and the same change can be asked for again.
pub struct PoolGrowth;

#[async_trait]
impl Saga for PoolGrowth {
    const NAME: &'static str = "pool-grow";
    const STEPS: &'static [&'static str] = &["grow"];
    type Plan = GrowthPlan;
    type Outputs = ();

    fn locks(plan: &GrowthPlan) -> Vec<String> {
        vec![pool_lock(plan.pool.id)]
    }
    fn begin(_: &GrowthPlan, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    async fn run(cx: &StepContext, plan: &GrowthPlan, _: &mut (), _: usize) -> Result<()> {
        let request = PoolGrow { pool: plan.pool.id, size: plan.size };
        for node in &plan.nodes {
            cx.agent(*node)?.pool_grow(&cx.mutate(MAKING), request).await?;
        }
        Ok(())
    }
    async fn undo(_: &StepContext, _: &GrowthPlan, _: &(), _: usize) -> Result<()> {
        Ok(())
    }
    fn commit(plan: &GrowthPlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let records = engine.inventory.read();
        let row = records.pools.get(&plan.pool.id).ok_or_else(|| Error::not_found("the pool is gone"))?;
        tx.replace(row, &plan.pool);
        Ok(())
    }
    fn abort(_: &GrowthPlan, _: &(), _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    fn announce(plan: &GrowthPlan) -> Vec<(&'static str, String)> {
        vec![("storage-pool-updated", format!("/1.0/storage-pools/{}", plan.pool.name))]
    }
}
