//! The engine: typed use cases, operations, sagas, reconcilers, authorization.
//!
//! The methods of [`Engine`] are Karst's true API; front ends translate to and from them. Each use case takes a
//! [`Context`], which cannot be built without a principal, and authorizes first. Data flows one way: front end, engine,
//! agent, driver, host.
//!
//! * [`inventory`]: every record in memory, fed by one watch. Reads come from here.
//! * [`db`]: records in the store, and the transaction that use cases build.
//! * [`saga`]: work over several resources that is all or nothing across a crash.
//! * [`operations`], [`events`]: what users see of it.
//! * [`compute`], [`storage`], [`volumes`], [`snapshots`], [`layers`], [`checkpoints`], [`backups`], [`recover`], [`network`],
//!   [`images`], [`secrets`], [`tenancy`]: the use cases.
//! * [`reconcile`]: what follows the records without being asked.

pub mod audit;
mod autostart;
pub mod backups;
pub mod bootstrap;
pub mod checkpoints;
pub mod compute;
pub mod context;
pub mod db;
pub mod events;
mod explain;
pub mod firewall;
pub mod health;
pub mod images;
pub mod inventory;
mod keys;
pub mod layers;
pub mod network;
pub mod operations;
pub mod reconcile;
pub mod recover;
mod restarts;
pub mod saga;
pub mod screens;
pub mod secrets;
pub mod snapshots;
pub mod storage;
pub mod stream;
pub mod tenancy;
pub mod uploads;
mod visible;
pub mod volumes;

pub use context::Context;
pub use inventory::{InstanceView, Inventory, Records, Row};
pub use operations::{LiveOperation, NewOperation, Operations};

use db::{Commit, Db};
use events::{Event, EventKind, Events};
use karst_agent::{CallContext, Fence, HostAgent};
use karst_env::{Env, EnvExt};
use karst_model::{
    Error, NodeId, ProjectId, Result, SagaId,
    access::Permission,
    operation::{Operation, OperationState},
    project::Project,
};
use karst_store::{Op, Revision, Store, Txn, TxnOutcome};
use saga::runner::{Hook, Interference, Moment};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, RwLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

/// Agents by node.
#[derive(Clone, Default)]
pub struct Agents {
    by_node: Arc<RwLock<BTreeMap<NodeId, Arc<dyn HostAgent>>>>,
}

impl Agents {
    /// Adds or replaces the agent of a node.
    pub fn insert(&self, node: NodeId, agent: Arc<dyn HostAgent>) {
        self.by_node.write().unwrap_or_else(|e| e.into_inner()).insert(node, agent);
    }

    /// The agent of a node.
    ///
    /// # Errors
    /// Unavailable when there is none.
    pub fn get(&self, node: NodeId) -> Result<Arc<dyn HostAgent>> {
        self.by_node
            .read()
            .unwrap_or_else(|e| e.into_inner())
            .get(&node)
            .cloned()
            .ok_or_else(|| Error::unavailable("the host of this object is not connected").with_context(node))
    }

    /// All nodes that have one.
    pub fn nodes(&self) -> Vec<NodeId> {
        let mut nodes: Vec<_> =
            self.by_node.read().unwrap_or_else(|e| e.into_inner()).keys().copied().collect();
        nodes.sort();
        nodes
    }

    /// All of them.
    pub fn all(&self) -> Vec<(NodeId, Arc<dyn HostAgent>)> {
        self.by_node.read().unwrap_or_else(|e| e.into_inner()).iter().map(|(n, a)| (*n, a.clone())).collect()
    }
}

/// What an engine is made of.
pub struct EngineConfig {
    /// Time, randomness, spawning.
    pub env: Arc<dyn Env>,
    /// State.
    pub store: Arc<dyn Store>,
    /// Hosts.
    pub agents: Agents,
    /// The nodes that this engine serves, with their names. The first is its own: executor of its sagas, and where
    /// instances go unless another target is asked for.
    pub nodes: Vec<(NodeId, String)>,
    /// Short id of the daemon's instance, part of every name outside its directory: 6 hex digits.
    pub daemon_id: String,
}

/// The engine. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<EngineInner>,
}

/// What use cases and sagas share.
pub struct EngineInner {
    /// Time, randomness, spawning.
    pub env: Arc<dyn Env>,
    /// State.
    pub db: Db,
    /// State in memory.
    pub inventory: Arc<Inventory>,
    /// Hosts.
    pub agents: Agents,
    /// Live operations.
    pub operations: Operations,
    /// What happened.
    pub events: Events,
    /// What is to be audited.
    pub(crate) audit: audit::AuditQueue,
    /// This engine's node.
    pub node: NodeId,
    /// Grows with each start of an engine over this store.
    pub epoch: u64,
    /// When it was opened, on the monotonic clock.
    pub opened: Duration,
    /// Short id of the daemon's instance.
    pub daemon_id: String,
    /// All guests are being stopped: none starts any more.
    pub(crate) leaving: AtomicBool,
    /// Who was to start by itself and did not, and what is said of it: a warning for as long as it is down.
    pub(crate) unstarted: Mutex<BTreeMap<karst_model::InstanceId, String>>,
    pub(crate) next_vmid: AtomicU32,
    pub(crate) next_domain_id: AtomicU32,
    pub(crate) metrics: compute::metrics::Cache,
    pub(crate) uploads: uploads::Open,
    pub(crate) volume_uploads: volumes::content::Open,
    /// Volumes that are being read.
    pub(crate) volume_reads: volumes::content::Reads,
    pub(crate) image_servers: RwLock<Option<Arc<dyn images::remote::ImageServers>>>,
    pub(crate) scram: tenancy::scram::Unknown,
    pub(crate) network_listener: RwLock<Option<Arc<dyn tenancy::server::NetworkListener>>>,
    pub(crate) fetching: images::remote::Turns,
    pub(crate) image_secrets: images::shared::Secrets,
    pub(crate) image_pushes: images::push::Pushes,
    pub(crate) screens: screens::Listeners,
    pub(crate) vault: secrets::Vault,
    pub(crate) copy_words: compute::disk_copy::Words,
    /// Sagas that this engine executes now.
    pub(crate) executing: Mutex<BTreeSet<SagaId>>,
    pub(crate) network_locks: network::Locks,
    hook: RwLock<Option<Hook>>,
    tasks: Mutex<Vec<karst_env::TaskHandle>>,
}

const EPOCH_KEY: &str = "/karst/v1/meta/epoch";

/// Where the epoch of the engine that acts for `node` is: each of its transactions compares it.
fn executor_key(node: NodeId) -> String {
    format!("/karst/v1/executors/{node}")
}

impl Engine {
    /// Opens an engine: reads the inventory, takes a new epoch, takes up what an earlier one left, and starts the
    /// reconcilers.
    ///
    /// # Errors
    /// Unavailable when the store does not answer.
    pub async fn open(config: EngineConfig) -> Result<Self> {
        let EngineConfig { env, store, agents, nodes, daemon_id } = config;
        let Some((node, _)) = nodes.first().cloned() else {
            return Err(Error::internal("an engine needs a node", "EngineConfig::nodes is empty"));
        };
        let epoch = take_epoch(&*store, node, env.now()).await?;
        let inventory = Inventory::open(env.clone(), store.clone()).await?;
        let events = Events::default();
        let names = inventory.clone();
        let operations =
            Operations::new(env.clone(), events.clone(), node, move |project| name_of(&names, project));
        let domain = {
            let records = inventory.read();
            let ids = records.runtimes.values().filter_map(|r| r.domain_id);
            ids.max().map_or(1, |d| d + 1)
        };
        let inner = Arc::new(EngineInner {
            db: Db::new(env.clone(), store, executor_key(node), epoch),
            opened: env.monotonic(),
            env,
            inventory,
            agents,
            operations,
            events,
            audit: Default::default(),
            node,
            epoch,
            daemon_id,
            leaving: AtomicBool::new(false),
            unstarted: Mutex::default(),
            next_vmid: AtomicU32::new(100),
            next_domain_id: AtomicU32::new(domain),
            metrics: Default::default(),
            uploads: Default::default(),
            volume_uploads: Default::default(),
            volume_reads: Default::default(),
            image_servers: RwLock::new(None),
            scram: Default::default(),
            network_listener: RwLock::new(None),
            fetching: Default::default(),
            image_secrets: Default::default(),
            image_pushes: Default::default(),
            screens: Default::default(),
            vault: Default::default(),
            copy_words: Default::default(),
            executing: Mutex::default(),
            network_locks: Default::default(),
            hook: RwLock::new(None),
            tasks: Mutex::default(),
        });
        bootstrap::ensure_base(&inner, &nodes).await?;
        close_orphans(&inner).await?;
        let taken = saga::runner::recover(&inner).await?;
        tracing::info!(epoch, taken, "the engine is open");
        let tasks = reconcile::spawn_all(&inner);
        inner.tasks.lock().unwrap_or_else(|e| e.into_inner()).extend(tasks);
        Ok(Self { inner })
    }

    /// Stops the reconcilers. Running sagas stay in the store and are taken up by the next engine.
    pub fn close(&self) {
        for task in self.inner.tasks.lock().unwrap_or_else(|e| e.into_inner()).drain(..) {
            task.abort();
        }
        self.inner.screens.close();
    }

    /// Lets a test interfere with sagas.
    pub fn set_hook(&self, hook: Option<Hook>) {
        *self.inner.hook.write().unwrap_or_else(|e| e.into_inner()) = hook;
    }

    /// What use cases and sagas share; for the harness.
    pub fn inner(&self) -> &Arc<EngineInner> {
        &self.inner
    }

    /// Events from now on, as far as `context` may see them when they happen.
    ///
    /// # Errors
    /// Unauthenticated.
    pub fn subscribe(&self, context: &Context) -> Result<events::Subscription> {
        context.demand_known()?;
        let (engine, context) = (self.clone(), context.clone());
        let now = Box::new(move || engine.principal_now(context.principal()));
        Ok(events::Subscription::new(&self.inner.events, now))
    }

    /// The project by name, when `context` may `permission` there.
    ///
    /// # Errors
    /// Not found (also when it may not be seen), forbidden.
    pub fn project(&self, context: &Context, name: &str, permission: Permission) -> Result<Row<Project>> {
        context.demand_known()?;
        let project = self.inner.inventory.read().project(name)?.clone();
        context.demand(permission, &project)?;
        Ok(project)
    }

    /// Operations that `context` may see: of `project`, or of all when `None`.
    ///
    /// # Errors
    /// Forbidden.
    pub fn operations(&self, context: &Context, project: Option<&str>) -> Result<Vec<Arc<Operation>>> {
        let filter = match project {
            Some(name) => Some(self.project(context, name, Permission::ProjectView)?.id),
            None => {
                context.demand_known()?;
                None
            }
        };
        let mut all = self.inner.operations.running();
        all.retain(|o| (filter.is_none() || o.project.is_none() || o.project == filter) && sees(context, o));
        all.extend(self.trust_token_operations(context));
        Ok(all)
    }

    /// An operation by id, running or ended.
    ///
    /// # Errors
    /// Not found, also when it may not be seen.
    pub fn operation(&self, context: &Context, id: karst_model::OperationId) -> Result<Arc<Operation>> {
        context.demand_known()?;
        let found =
            self.inner.operations.live(id).map(|l| l.snapshot()).or_else(|| {
                self.inner.inventory.read().operations.get(&id).map(|o| Arc::new(o.value.clone()))
            });
        found
            .filter(|o| sees(context, o))
            .or_else(|| self.trust_token_operations(context).into_iter().find(|o| o.id == id))
            .ok_or_else(|| Error::not_found(format!("operation {id} not found")))
    }

    /// The live handle of an operation, for waiting and websockets.
    ///
    /// # Errors
    /// Not found when it is unknown or ended long ago.
    pub fn live_operation(&self, context: &Context, id: karst_model::OperationId) -> Result<LiveOperation> {
        self.operation(context, id)?;
        self.inner.operations.live(id).ok_or_else(|| Error::not_found(format!("operation {id} has ended")))
    }

    /// Waits for the end of an operation, at most `timeout`.
    ///
    /// # Errors
    /// Not found.
    pub async fn operation_wait(
        &self,
        context: &Context,
        id: karst_model::OperationId,
        timeout: Option<Duration>,
    ) -> Result<Arc<Operation>> {
        let record = self.operation(context, id)?;
        match self.inner.operations.live(id) {
            Some(live) => Ok(self.inner.operations.wait(&live, timeout).await),
            None => Ok(record),
        }
    }

    /// Cancels an operation, or revokes the trust token that it stands for.
    ///
    /// # Errors
    /// Not found, conflict when it has ended, invalid when it cannot be cancelled.
    pub async fn operation_cancel(&self, context: &Context, id: karst_model::OperationId) -> Result<()> {
        let record = self.operation(context, id)?;
        if self.trust_token_revoke(context, id).await? {
            return Ok(());
        }
        if record.principal != context.principal().id
            && !context.principal().may(Permission::ResourceEdit, record.project)
        {
            return Err(Error::forbidden("only who began an operation, or an operator, may cancel it"));
        }
        let live = self.live_operation(context, id)?;
        self.inner.operations.cancel(&live)
    }

    /// Retries or abandons a saga that needs attention, by its operation.
    ///
    /// # Errors
    /// Not found, conflict, forbidden.
    pub async fn operation_attend(
        &self,
        context: &Context,
        id: karst_model::OperationId,
        abandon: bool,
    ) -> Result<()> {
        context.demand_server(Permission::ServerEdit)?;
        let record = self.operation(context, id)?;
        let saga =
            record.saga.ok_or_else(|| Error::conflict("nothing of this operation is left to be undone"))?;
        saga::runner::attend(&self.inner, saga, abandon).await
    }
}

impl EngineInner {
    pub(crate) fn interfere(&self, saga: &str, moment: Moment) -> Interference {
        let hook = self.hook.read().unwrap_or_else(|e| e.into_inner()).clone();
        hook.map_or(Interference::None, |h| h(saga, moment))
    }

    /// After a transaction that was refused at `revision`: lets the inventory see what changed. Bounded, because the last
    /// change before `revision` may lie outside of what is watched, and is told as progress when the store sees fit.
    pub(crate) async fn catch_up(&self, revision: Revision) {
        let seen = self.inventory.reaches(revision);
        // Whether it came or not: the next attempt reads what there is.
        let _ = self.env.timeout(Duration::from_millis(250), seen).await;
    }

    /// Name of a project, for events.
    pub fn project_name(&self, project: Option<ProjectId>) -> String {
        name_of(&self.inventory, project)
    }

    /// A call context for mutations outside sagas (reconcilers).
    pub(crate) fn reconcile_context(&self, deadline: Duration) -> CallContext {
        let fence =
            Fence { saga: SagaId(uuid::Uuid::nil()), executor: self.node, epoch: self.epoch, step: 0 };
        CallContext::mutate(deadline, fence)
    }

    /// Commits a transaction of a synchronous use case that `build` makes of what it reads, again when it is refused, and
    /// waits until the inventory shows it.
    pub(crate) async fn transact<T>(
        &self,
        mut build: impl FnMut(&Records, &mut db::Tx) -> Result<T>,
    ) -> Result<T> {
        for _ in 0..16 {
            let mut tx = db::Tx::default();
            let value = {
                let records = self.inventory.read();
                build(&records, &mut tx)?
            };
            if tx.is_empty() {
                return Ok(value);
            }
            let asked = self.audit.note((self.node, self.epoch), &mut tx);
            match self.db.commit(tx).await? {
                Commit::Applied(revision) => {
                    asked.iter().for_each(|asking| asking.mark_stored());
                    self.inventory.wait_for(revision).await?;
                    return Ok(value);
                }
                Commit::Refused(revision) => self.catch_up(revision).await,
            }
        }
        Err(Error::conflict("the object keeps changing; try again"))
    }

    /// Announces a lifecycle event.
    pub(crate) fn announce(
        &self,
        context: &Context,
        project: Option<ProjectId>,
        action: &'static str,
        source: String,
    ) {
        let subject = events::Subject::of(&self.inventory.read(), project, &source);
        self.announce_of(context, project, action, source, subject);
    }

    /// The same with something that is told along with it.
    pub(crate) fn announce_with(
        &self,
        context: &Context,
        project: Option<ProjectId>,
        action: &'static str,
        source: String,
        told: BTreeMap<String, serde_json::Value>,
    ) {
        let subject = events::Subject::of(&self.inventory.read(), project, &source);
        self.send_event(context, project, action, source, (subject, told));
    }

    /// The same of an object that the inventory does not have, or not any more.
    pub(crate) fn announce_of(
        &self,
        context: &Context,
        project: Option<ProjectId>,
        action: &'static str,
        source: String,
        subject: Option<events::Subject>,
    ) {
        self.send_event(context, project, action, source, (subject, BTreeMap::new()));
    }

    fn send_event(
        &self,
        context: &Context,
        project: Option<ProjectId>,
        action: &'static str,
        source: String,
        (subject, told): (Option<events::Subject>, BTreeMap<String, serde_json::Value>),
    ) {
        self.events.send(Event {
            time: self.env.now(),
            project,
            subject,
            project_name: self.project_name(project),
            kind: EventKind::Lifecycle {
                action,
                source,
                context: told,
                requestor: context.principal().identity.describe(),
            },
        });
    }

    pub(crate) fn take_domain_id(&self) -> u32 {
        self.next_domain_id.fetch_add(1, Ordering::Relaxed)
    }
}

/// May it be seen? Who began it follows it wherever it belongs.
fn sees(context: &Context, operation: &Operation) -> bool {
    let principal = context.principal();
    let own = principal.is_known() && operation.principal == principal.id;
    own || match operation.project {
        Some(project) => principal.may(Permission::ProjectView, Some(project)),
        None => principal.may(Permission::ServerInspect, None),
    }
}

fn name_of(inventory: &Inventory, project: Option<ProjectId>) -> String {
    project
        .and_then(|id| inventory.read().projects.get(&id).map(|p| p.name.to_string()))
        .unwrap_or_else(|| karst_model::project::DEFAULT_PROJECT.into())
}

/// Takes the next epoch: more than any engine over this store ever had. Hosts refuse lower ones than they have seen, and
/// remember longer than a store that is lost, or restored from a backup: an epoch is never lower than the time in seconds,
/// which no engine before can have passed by starting once a second.
async fn take_epoch(store: &dyn Store, node: NodeId, now: jiff::Timestamp) -> Result<u64> {
    let least = u64::try_from(now.as_second()).unwrap_or(0);
    for _ in 0..64 {
        let now = store.get(EPOCH_KEY).await?;
        let (old, compare) = match &now.kv {
            Some(kv) => (
                std::str::from_utf8(&kv.value).ok().and_then(|s| s.parse::<u64>().ok()).ok_or_else(|| {
                    Error::internal("the epoch in the state database is malformed", format!("{:?}", kv.value))
                })?,
                karst_store::Compare::mod_revision(EPOCH_KEY, kv.mod_revision),
            ),
            None => (0, karst_store::Compare::absent(EPOCH_KEY)),
        };
        let next = (old + 1).max(least);
        let txn = Txn {
            compares: vec![compare],
            success: vec![
                Op::put(EPOCH_KEY, next.to_string()),
                Op::put(executor_key(node), next.to_string()),
            ],
            failure: vec![],
        };
        // Unknown is as good as refused: the next round reads what is there and takes a higher one.
        if let TxnOutcome::Committed { .. } = store.txn(txn).await? {
            return Ok(next);
        }
    }
    Err(Error::unavailable("the state database does not let this daemon take its epoch"))
}

/// Operations that an earlier engine left without a saga behind them can never end: end them.
async fn close_orphans(inner: &Arc<EngineInner>) -> Result<()> {
    let orphans: Vec<Row<Operation>> = {
        let records = inner.inventory.read();
        records
            .operations
            .values()
            .filter(|o| !o.state.is_final() && o.node == Some(inner.node))
            .filter(|o| o.saga.is_none_or(|s| !records.sagas.contains_key(&s)))
            .cloned()
            .collect()
    };
    for row in orphans {
        let mut operation = row.value.clone();
        operation.state = OperationState::Failure;
        operation.error = Some(Error::unavailable("the daemon was restarted while this ran"));
        operation.may_cancel = false;
        operation.updated_at = inner.env.now();
        let mut tx = db::Tx::default();
        tx.replace(&row, &operation);
        // Refused: somebody else has ended it meanwhile.
        let _ = inner.db.commit(tx).await?;
    }
    Ok(())
}
