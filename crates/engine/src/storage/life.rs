//! Pools that are defined, built, started, stopped, cleared and forgotten, each by itself. Who makes a pool by the Incus API has
//! all of the first three at once; here they are apart, as libvirt's clients know them.
//!
//! A pool that is stopped is nobody's on its hosts: nothing is made, read, deleted or started in it. One that is forgotten has no
//! record any more, nor have its volumes, while all that is in it stays on its host: who defines it again gets it back, and its
//! volumes when it is started ([`Engine::pool_refresh`]).

use super::{ASKING, CreatePool, MAKING, pool_lock};
use crate::{
    Engine, EngineInner, Records, Row,
    context::Context,
    db::Tx,
    events::Subject,
    inventory::Uses,
    operations::{LiveOperation, NewOperation},
    recover::{as_made, describe::describe_now, described},
    saga::{Saga, StepContext, runner},
    snapshots::Row2,
    volumes,
};
use async_trait::async_trait;
use karst_agent::{CallContext, PoolsFind};
use karst_model::{
    Error, InstanceId, Name, NodeId, PoolId, Result,
    access::Permission,
    backup::BackupOwner,
    instance::Instance,
    pool_life::{FoundSource, PoolChange, PoolLife},
    spec::PoolSource,
    storage::{Pool, PoolKind, Volume, VolumeOwner, pool_source},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, sync::Arc, time::Duration};

/// Time that a host has to let go of a pool, with what ends in it meanwhile.
const CLOSING: Duration = Duration::from_secs(120);
/// Records of volumes and of their snapshots that go in one transaction.
const AT_ONCE: usize = 30;

/// The guests of a pool that is stopped are not started, and nothing is made in it.
pub(crate) fn demand_active(pool: &Pool) -> Result<()> {
    match pool.life.stopped {
        false => Ok(()),
        true => Err(Error::conflict(format!("storage pool {:?} is not active; start it first", &*pool.name))),
    }
}

/// Has the instance something in the pool, in its record or as it runs?
fn has(records: &Records, instance: &Instance, pool: &Pool) -> bool {
    let named = |keys: &std::collections::BTreeMap<String, String>| {
        let of = |key: &str| keys.get(key).is_some_and(|name| **name == *pool.name);
        // Where the root lies the record of the instance says itself.
        keys.get("path").is_none_or(|path| path != "/") && (of("pool") || of("initrd.pool"))
    };
    instance.pool == pool.id || records.devices_in_use(instance).values().any(named)
}

/// The first instance by name that has something in the pool, of those that `fits`.
fn user<'a>(
    records: &'a Records,
    pool: &Pool,
    fits: impl Fn(&Instance) -> bool,
) -> Option<&'a Row<Instance>> {
    let users = records.instances.values().filter(|i| fits(i) && has(records, i, pool));
    users.min_by(|a, b| a.name.cmp(&b.name))
}

/// A volume of the pool at which something is at work.
fn at_work<'a>(records: &'a Records, pool: &Pool) -> Option<&'a Row<Volume>> {
    let mut all = records.volumes.values().filter(|v| v.pool == pool.id);
    all.find(|v| {
        let lock = match v.owner {
            VolumeOwner::Instance { instance } => crate::compute::lock(instance),
            VolumeOwner::Custom | VolumeOwner::Image { .. } => volumes::lock(v.id),
        };
        records.lock(&lock).is_some()
    })
}

/// Nobody runs from a pool that is to be stopped, and nothing is at work in it; of one whose record ends with that nobody has
/// anything.
fn demand_idle(records: &Records, pool: &Pool) -> Result<()> {
    let refuse = |text: String| Err(Error::conflict(format!("storage pool {:?} {text}", &*pool.name)));
    if let Some(i) = user(records, pool, |i| volumes::runs(records, i)) {
        return refuse(format!("is in use by instance {:?}, which runs; stop it first", &*i.name));
    }
    if let Some(v) = at_work(records, pool) {
        return refuse(format!("is being worked in, on volume {:?}; try again when that has ended", v.name));
    }
    match pool.life.transient {
        true => demand_unused(records, pool),
        false => Ok(()),
    }
}

/// Nothing is left that would miss the records of a pool and of its volumes.
fn demand_unused(records: &Records, pool: &Pool) -> Result<()> {
    let refuse = |text: String| Err(Error::conflict(format!("storage pool {:?} {text}", &*pool.name)));
    if let Some(i) = user(records, pool, |_| true) {
        return refuse(format!("is used by instance {:?}; delete or move it first", &*i.name));
    }
    let mut profiles = records.profiles.values();
    let names = |keys: &std::collections::BTreeMap<String, String>| {
        keys.get("pool").is_some_and(|name| **name == *pool.name)
    };
    if let Some(p) = profiles.find(|p| p.devices.values().any(names)) {
        return refuse(format!("is used by profile {:?}; change that first", &*p.name));
    }
    for volume in records.volumes.values().filter(|v| v.pool == pool.id) {
        let kept = |b: &BackupOwner| *b == BackupOwner::Volume { volume: volume.id };
        if records.backups.values().any(|b| kept(&b.owner)) {
            return refuse(format!("has backups of its volume {:?}; delete them first", volume.name));
        }
    }
    match at_work(records, pool) {
        Some(v) => {
            refuse(format!("is being worked in, on volume {:?}; try again when that has ended", v.name))
        }
        None => Ok(()),
    }
}

/// A record that goes, with its snapshots and what else belongs to it, as far as there is `room` in the transaction. Answers what is
/// left of that; `None`: the record stays for the next one. Only where its snapshots alone are more than one has room for, some of them
/// go before.
fn forget_volume(records: &Records, tx: &mut Tx, row: &Row<Volume>, room: usize) -> Option<usize> {
    let snapshots = records.volume_snapshots_of(row.id);
    let left = room.checked_sub(snapshots.len() + 1);
    if left.is_none() && room < AT_ONCE {
        return None;
    }
    for snapshot in snapshots.into_iter().take(room) {
        tx.delete(snapshot);
        Row2::Volume(snapshot.clone()).taken().release_name(tx);
    }
    let left = left?;
    tx.delete(row);
    tx.release_name("volumes", &volumes::scope(row), &row.name, &row.id.to_string());
    tx.delete_id::<Uses>(&volumes::lock(row.id));
    Some(left)
}

async fn succeeded(operation: &LiveOperation) -> Result<()> {
    operation.ended().await.error.clone().map_or(Ok(()), Err)
}

fn path(name: &str) -> String {
    format!("/1.0/storage-pools/{name}")
}

impl Engine {
    /// Records a pool that is neither built nor started. Where one lies already that no record knows, of the same name (or the
    /// id that is asked for) and in the same place, it is that one, with all that is in it.
    ///
    /// # Errors
    /// Invalid by field, conflict (taken name or id), forbidden; what the host's policy does not grant.
    pub async fn pool_define(&self, context: &Context, request: CreatePool) -> Result<()> {
        context.demand_server(Permission::ServerEdit)?;
        let inner = self.inner();
        let name = Name::parse("name", &request.name)?;
        let kind = PoolKind::parse("driver", &request.driver)?;
        pool_source(kind, &request.config)?;
        let taken = |records: &Records, id: Option<PoolId>| {
            if records.pool(&name).is_ok() {
                return Err(Error::conflict(format!("a storage pool {:?} exists already", &*name)).at("name"));
            }
            match id.and_then(|id| records.pools.get(&id)) {
                Some(other) => {
                    Err(Error::conflict(format!("storage pool {:?} has that id", &*other.name)).at("id"))
                }
                None => Ok(()),
            }
        };
        taken(&inner.inventory.read(), request.id)?;
        self.demand_kind(kind).await?;
        let new = Pool {
            id: request.id.unwrap_or_else(|| PoolId(inner.env.uuid())),
            name: name.clone(),
            kind,
            description: request.description,
            config: request.config,
            life: PoolLife::defined(request.transient),
            spec_version: 1,
        };
        let pool = inner.left_over(new, request.id.is_some()).await?;
        inner
            .transact(|records, tx| {
                taken(records, Some(pool.id))?;
                tx.expect_unlocked(&pool_lock(pool.id));
                tx.take_name("pools", "", &pool.name, &pool.id.to_string());
                tx.create(&pool);
                Ok(())
            })
            .await?;
        inner.announce(context, None, "storage-pool-created", path(&name));
        Ok(())
    }

    /// Starts a pool and waits for it. Then what is in it and no record knows gets its records again, as far as that is possible.
    ///
    /// # Errors
    /// Those of [`Self::pool_change`] and of its operation.
    pub async fn pool_start(&self, context: &Context, name: &str) -> Result<()> {
        succeeded(&self.pool_change(context, name, PoolChange::Start).await?).await?;
        if let Err(error) = self.pool_refresh(context, name).await {
            tracing::warn!(name, %error, "a storage pool was started, and what is in it could not be looked at");
        }
        Ok(())
    }

    /// Stops a pool and waits for it. The record of a transient one ends with that.
    ///
    /// # Errors
    /// Those of [`Self::pool_change`] and of its operation.
    pub async fn pool_stop(&self, context: &Context, name: &str) -> Result<()> {
        context.demand_server(Permission::ServerEdit)?;
        let active = self.inner().inventory.read().pool(name).ok().filter(|p| !p.life.stopped).map(|p| p.id);
        if let Some(id) = active {
            describe_now(self.inner(), id).await?;
        }
        succeeded(&self.pool_change(context, name, PoolChange::Stop).await?).await?;
        let row = self.inner().inventory.read().pool(name).ok().map(|row| row.value.clone());
        match row.filter(|p| p.life.transient && p.life.stopped) {
            Some(pool) => self.inner().forget_pool(context, &pool).await,
            None => Ok(()),
        }
    }

    /// Has the hosts of a pool do this with it. [`Self::pool_start`] and [`Self::pool_stop`] do what belongs to it, too.
    ///
    /// # Errors
    /// Not found; conflict when it is not in a state for it, when a guest runs from one that is to be stopped or something is at
    /// work in it, and when one that is to be cleared has volumes; forbidden; what fails on a host comes with the operation.
    pub async fn pool_change(
        &self,
        context: &Context,
        name: &str,
        change: PoolChange,
    ) -> Result<LiveOperation> {
        context.demand_server(Permission::ServerEdit)?;
        let inner = self.inner();
        runner::start::<PoolChanging>(inner, context, |tx| {
            let records = inner.inventory.read();
            let row = records.pool(name)?;
            let after = row.life.after(name, change)?;
            let words = match change {
                PoolChange::Start => "Starting storage pool",
                PoolChange::Build => "Building storage pool",
                PoolChange::Stop => "Stopping storage pool",
                PoolChange::Clear => "Clearing storage pool",
            };
            match change {
                PoolChange::Stop => {
                    let mut volumes = records.volumes.values().filter(|v| v.pool == row.id);
                    volumes.try_for_each(|volume| inner.demand_unread(volume))?;
                    demand_idle(&records, row)?;
                    // Who has begun to use it since is seen, then decided anew.
                    tx.expect_untouched(&records, &pool_lock(row.id));
                }
                PoolChange::Clear => {
                    tx.expect_untouched(&records, &pool_lock(row.id));
                    let mut volumes = records.volumes.values();
                    if let Some(v) = volumes.find(|v| v.pool == row.id) {
                        let text = format!("storage pool {name:?} has volume {:?}; delete it first", v.name);
                        return Err(Error::conflict(text));
                    }
                }
                PoolChange::Start | PoolChange::Build => {}
            }
            tx.expect(row);
            let plan = ChangePlan { pool: row.value.clone(), change, after, nodes: inner.agents.nodes() };
            Ok((plan, NewOperation::task(words, None, "storage-pools", path(name))))
        })
        .await
    }

    /// Removes the records of a pool that is not active and of its volumes. All that is in it stays on its hosts.
    ///
    /// # Errors
    /// Not found, conflict when it is active or used by an instance or a profile, naming it, forbidden.
    pub async fn pool_forget(&self, context: &Context, name: &str) -> Result<()> {
        context.demand_server(Permission::ServerEdit)?;
        let pool = self.inner().inventory.read().pool(name)?.value.clone();
        self.inner().forget_pool(context, &pool).await
    }

    /// Says whether a pool begins with its hosts.
    ///
    /// # Errors
    /// Not found, conflict for a transient one, forbidden.
    pub async fn pool_set_autostart(&self, context: &Context, name: &str, begins: bool) -> Result<()> {
        context.demand_server(Permission::ServerEdit)?;
        let changed = self
            .inner()
            .transact(|records, tx| {
                let row = records.pool(name)?;
                if row.life.transient {
                    let text =
                        format!("storage pool {name:?} is transient: it does not outlive its host's end");
                    return Err(Error::conflict(text));
                }
                if row.life.manual != begins {
                    return Ok(false);
                }
                tx.expect_unlocked(&pool_lock(row.id));
                let life = PoolLife { manual: !begins, ..row.life };
                tx.replace(row, &Pool { life, spec_version: row.spec_version + 1, ..row.value.clone() });
                Ok(true)
            })
            .await?;
        if changed {
            self.inner().announce(context, None, "storage-pool-updated", path(name));
        }
        Ok(())
    }

    /// What of the host could become a pool of a kind, as far as its policy grants it.
    ///
    /// # Errors
    /// Forbidden; unsupported where the host has nothing of the kind; unavailable.
    pub async fn pool_sources(&self, context: &Context, kind: PoolKind) -> Result<Vec<FoundSource>> {
        context.demand_server(Permission::ServerInspect)?;
        let agent = self.inner().agents.get(self.inner().node)?;
        agent.pool_sources(&CallContext::read(ASKING), kind).await
    }
}

impl EngineInner {
    /// What of a pool its host has already and no record knows; `new` where there is nothing. Several may lie in one place: it
    /// is the one of the same id where that is `stated`, else of the same name.
    async fn left_over(&self, new: Pool, stated: bool) -> Result<Pool> {
        let source = match pool_source(new.kind, &new.config)? {
            PoolSource::Own { .. } => None,
            PoolSource::Granted { source } => Some(source),
        };
        let (agent, read) = (self.agents.get(self.node)?, CallContext::read(ASKING));
        let own = PoolsFind { kind: Some(new.kind), source: None };
        let mut all = agent.pools_find(&read, own).await?;
        if source.is_some() {
            all.extend(
                agent.pools_find(&read, PoolsFind { kind: Some(new.kind), source: source.clone() }).await?,
            );
        }
        let unknown = {
            let records = self.inventory.read();
            let known: BTreeSet<PoolId> = records.pools.keys().copied().collect();
            move |id: PoolId| !known.contains(&id)
        };
        let found = all.into_iter().filter(|found| unknown(found.spec.id)).find(|found| {
            let there = match &found.spec.source {
                PoolSource::Own { .. } => None,
                PoolSource::Granted { source } => Some(source),
            };
            match stated {
                true => found.spec.id == new.id && (source.is_none() || source.as_ref() == there),
                false => {
                    source.as_ref() == there && described(found).is_some_and(|p| p.pool.name == new.name)
                }
            }
        });
        let Some(found) = found else { return Ok(new) };
        let was = described(&found).map(|p| p.pool);
        let mut config = was.as_ref().map(|p| p.config.clone()).unwrap_or_default();
        config.extend(new.config.clone());
        let description = match was {
            Some(was) if new.description.is_empty() => was.description,
            _ => new.description.clone(),
        };
        let life = PoolLife { unbuilt: false, ..new.life };
        as_made(Pool { id: found.spec.id, description, config, life, ..new }, &found.spec)
    }

    /// Removes the records of a pool and of its volumes, which no instance has. Broken off in between, some of the volumes are
    /// forgotten: the next start of the pool finds them again.
    pub(crate) async fn forget_pool(&self, context: &Context, pool: &Pool) -> Result<()> {
        loop {
            let more = self
                .transact(|records, tx| {
                    let row = demand_forgettable(records, pool)?;
                    tx.expect_unlocked(&pool_lock(pool.id));
                    tx.expect_untouched(records, &pool_lock(pool.id));
                    let mut room = AT_ONCE;
                    for volume in records.volumes.values().filter(|v| v.pool == pool.id) {
                        match forget_volume(records, tx, volume, room) {
                            Some(left) => room = left,
                            None => {
                                tx.expect(row);
                                return Ok(true);
                            }
                        }
                    }
                    tx.delete(row);
                    tx.delete_id::<Uses>(&pool_lock(pool.id));
                    tx.release_name("pools", "", &row.name, &pool.id.to_string());
                    Ok(false)
                })
                .await?;
            if !more {
                break;
            }
        }
        let subject = Some(Subject::Pool(Arc::new(pool.clone())));
        self.announce_of(context, None, "storage-pool-forgotten", path(&pool.name), subject);
        Ok(())
    }
}

/// The row of a pool whose record may go.
fn demand_forgettable<'a>(records: &'a Records, pool: &Pool) -> Result<&'a Row<Pool>> {
    let gone = || Error::not_found(format!("storage pool {:?} is gone", &*pool.name));
    let row = records.pools.get(&pool.id).ok_or_else(gone)?;
    if !row.life.stopped {
        return Err(Error::conflict(format!("storage pool {:?} is still active; stop it first", &*row.name)));
    }
    demand_unused(records, row)?;
    Ok(row)
}

/// After its host has begun anew: pools that do not begin with it are stopped, but for those from which something starts with it
/// (`starting`); transient ones that nobody uses end. What an earlier daemon left of these ends in any case.
pub(crate) async fn after_boot(inner: &Arc<EngineInner>, rebooted: bool, starting: &BTreeSet<InstanceId>) {
    let engine = Engine { inner: inner.clone() };
    let context = Context::system();
    let (manual, ended): (Vec<Pool>, Vec<Pool>) = {
        let records = inner.inventory.read();
        let starts = |p: &Pool| user(&records, p, |i| starting.contains(&i.id)).is_some();
        let unwanted = |p: &Pool| rebooted && p.life.manual && !p.life.stopped && !starts(p);
        let all = || records.pools.values().map(|p| &p.value);
        let manual = all().filter(|p| unwanted(p)).cloned().collect();
        (manual, all().filter(|p| p.life.transient && p.life.stopped).cloned().collect())
    };
    for pool in manual {
        if let Err(error) = engine.pool_stop(&context, &pool.name).await {
            tracing::warn!(name = %pool.name, %error, "a storage pool that does not begin with its host is open");
        }
    }
    for pool in ended {
        if let Err(error) = inner.forget_pool(&context, &pool).await {
            tracing::warn!(name = %pool.name, %error, "the record of a transient storage pool is still there");
        }
    }
}

/// Plan of [`PoolChanging`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ChangePlan {
    /// As it was.
    pool: Pool,
    change: PoolChange,
    after: PoolLife,
    nodes: Vec<NodeId>,
}

/// Builds, opens, lets go of or clears a pool on every host, then says so in the record.
pub struct PoolChanging;

impl PoolChanging {
    async fn on(cx: &StepContext, plan: &ChangePlan, node: NodeId) -> Result<()> {
        let (agent, spec) = (cx.agent(node)?, plan.pool.spec()?);
        match plan.change {
            PoolChange::Start if plan.pool.life.unbuilt => agent.pool_ensure(&cx.mutate(MAKING), spec).await,
            PoolChange::Start => agent.pool_open(&cx.mutate(MAKING), spec).await,
            PoolChange::Build => {
                agent.pool_ensure(&cx.mutate(MAKING), spec).await?;
                agent.pool_close(&cx.mutate(CLOSING), plan.pool.id).await
            }
            PoolChange::Stop => agent.pool_close(&cx.mutate(CLOSING), plan.pool.id).await,
            PoolChange::Clear => agent.pool_remove(&cx.mutate(CLOSING), plan.pool.id).await,
        }
    }

    async fn back(cx: &StepContext, plan: &ChangePlan, node: NodeId) -> Result<()> {
        let (agent, spec) = (cx.agent(node)?, plan.pool.spec()?);
        match plan.change {
            PoolChange::Start | PoolChange::Build if plan.pool.life.unbuilt => {
                agent.pool_remove(&cx.mutate(CLOSING), plan.pool.id).await
            }
            PoolChange::Start | PoolChange::Build => {
                agent.pool_close(&cx.mutate(CLOSING), plan.pool.id).await
            }
            PoolChange::Stop => agent.pool_open(&cx.mutate(MAKING), spec).await,
            // It was empty: another is as good.
            PoolChange::Clear => {
                agent.pool_ensure(&cx.mutate(MAKING), spec).await?;
                agent.pool_close(&cx.mutate(CLOSING), plan.pool.id).await
            }
        }
    }
}

#[async_trait]
impl Saga for PoolChanging {
    const NAME: &'static str = "pool-change";
    const STEPS: &'static [&'static str] = &["pool"];
    type Plan = ChangePlan;
    type Outputs = ();

    fn locks(plan: &ChangePlan) -> Vec<String> {
        vec![pool_lock(plan.pool.id)]
    }
    fn begin(_: &ChangePlan, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    async fn run(cx: &StepContext, plan: &ChangePlan, _: &mut (), _: usize) -> Result<()> {
        for node in &plan.nodes {
            Self::on(cx, plan, *node).await?;
        }
        Ok(())
    }
    async fn undo(cx: &StepContext, plan: &ChangePlan, _: &(), _: usize) -> Result<()> {
        for node in &plan.nodes {
            Self::back(cx, plan, *node).await?;
        }
        Ok(())
    }
    fn commit(plan: &ChangePlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let records = engine.inventory.read();
        let row = records.pools.get(&plan.pool.id).ok_or_else(|| Error::not_found("the pool is gone"))?;
        tx.replace(row, &Pool { life: plan.after, spec_version: row.spec_version + 1, ..row.value.clone() });
        Ok(())
    }
    fn abort(_: &ChangePlan, _: &(), _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    fn announce(plan: &ChangePlan) -> Vec<(&'static str, String)> {
        let path = path(&plan.pool.name);
        match plan.change {
            PoolChange::Start => vec![("storage-pool-started", path)],
            PoolChange::Build => vec![("storage-pool-built", path)],
            PoolChange::Stop => vec![("storage-pool-stopped", path)],
            PoolChange::Clear => vec![("storage-pool-cleared", path)],
        }
    }
}
