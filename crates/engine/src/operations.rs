//! Operations: the live side (progress, cancel, waiting) of the persisted records.
//!
//! Operations of class task are persisted with the work they belong to. Those of class websocket (exec, console) live
//! only as long as the connection they serve and are kept in memory: after a crash there is nothing to take up.

use crate::{
    context::Context,
    events::{Event, EventKind, Events},
};
use karst_env::{Env, EnvExt};
use karst_model::{
    Error, NodeId, OperationId, ProjectId, Result,
    operation::{Operation, OperationClass, OperationState},
};
use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, OnceLock, RwLock},
    time::Duration,
};
use tokio::sync::watch;

/// Ended operations that stay readable in memory.
const KEPT: usize = 512;

/// What a use case says of a new operation.
#[derive(Debug, Clone)]
pub struct NewOperation {
    /// For people: `Starting instance`.
    pub description: String,
    /// Class.
    pub class: OperationClass,
    /// Project.
    pub project: Option<ProjectId>,
    /// Affected objects: kind (`instances`) and paths.
    pub resources: BTreeMap<String, Vec<String>>,
    /// May it be cancelled?
    pub may_cancel: bool,
    /// First metadata.
    pub metadata: serde_json::Map<String, serde_json::Value>,
}

impl NewOperation {
    /// A task over one object.
    pub fn task(description: &str, project: Option<ProjectId>, kind: &str, path: String) -> Self {
        Self {
            description: description.into(),
            class: OperationClass::Task,
            project,
            resources: BTreeMap::from([(kind.to_owned(), vec![path])]),
            may_cancel: false,
            metadata: Default::default(),
        }
    }
}

/// A handle on an operation that has not ended, or ended lately.
#[derive(Debug, Clone)]
pub struct LiveOperation {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    record: RwLock<Arc<Operation>>,
    version: watch::Sender<u64>,
    cancel: watch::Sender<bool>,
    /// Why it was cancelled, where that is said.
    why: OnceLock<String>,
}

impl LiveOperation {
    /// The record as it is now.
    pub fn snapshot(&self) -> Arc<Operation> {
        self.shared.record.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Its id.
    pub fn id(&self) -> OperationId {
        self.snapshot().id
    }

    /// Was a cancel asked for?
    pub fn is_cancelled(&self) -> bool {
        *self.shared.cancel.borrow()
    }

    /// What one ends with that was cancelled.
    pub(crate) fn cancel_error(&self) -> Error {
        Error::cancelled(self.shared.why.get().map_or("cancelled", String::as_str))
    }

    /// Completes when a cancel is asked for.
    pub async fn cancelled(&self) {
        let mut receiver = self.shared.cancel.subscribe();
        if receiver.wait_for(|c| *c).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Waits until it has ended.
    pub async fn ended(&self) -> Arc<Operation> {
        let mut receiver = self.shared.version.subscribe();
        loop {
            let record = self.snapshot();
            if record.state.is_final() || receiver.changed().await.is_err() {
                return record;
            }
        }
    }
}

/// All live operations.
pub struct Operations {
    env: Arc<dyn Env>,
    events: Events,
    node: NodeId,
    names: Box<dyn Fn(Option<ProjectId>) -> String + Send + Sync>,
    live: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    by_id: HashMap<OperationId, LiveOperation>,
    ended: VecDeque<OperationId>,
}

impl Operations {
    /// Empty. `names` tells the name of a project, for events.
    pub fn new(
        env: Arc<dyn Env>,
        events: Events,
        node: NodeId,
        names: impl Fn(Option<ProjectId>) -> String + Send + Sync + 'static,
    ) -> Self {
        Self { env, events, node, names: Box::new(names), live: Mutex::default() }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.live.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A record for `new`, asked for by `context`; not yet visible.
    pub fn record(&self, context: &Context, new: NewOperation) -> Operation {
        let now = self.env.now();
        Operation {
            id: OperationId(self.env.uuid()),
            description: new.description,
            class: new.class,
            project: new.project,
            principal: context.principal().id,
            requestor: context.principal().identity.describe(),
            node: Some(self.node),
            saga: None,
            state: OperationState::Pending,
            resources: new.resources,
            metadata: new.metadata,
            may_cancel: new.may_cancel,
            error: None,
            created_at: now,
            updated_at: now,
        }
    }

    /// Makes a record visible, or replaces it, and tells listeners.
    pub fn publish(&self, operation: Operation) -> LiveOperation {
        let record = Arc::new(operation);
        let live = {
            let mut table = self.table();
            let live = table.by_id.entry(record.id).or_insert_with(|| LiveOperation {
                shared: Arc::new(Shared {
                    record: RwLock::new(record.clone()),
                    version: watch::channel(0).0,
                    cancel: watch::channel(false).0,
                    why: OnceLock::new(),
                }),
            });
            let live = live.clone();
            // What needs attention waits for an administrator, however long.
            let over = record.state.is_final() && record.state != OperationState::NeedsAttention;
            if over && !table.ended.contains(&record.id) {
                table.ended.push_back(record.id);
                if table.ended.len() > KEPT
                    && let Some(old) = table.ended.pop_front()
                {
                    table.by_id.remove(&old);
                }
            }
            live
        };
        {
            let mut now = live.shared.record.write().unwrap_or_else(|e| e.into_inner());
            // Progress and cancel work on a copy: what ended meanwhile stays ended.
            if now.state.is_final() && now.state != OperationState::NeedsAttention && !record.state.is_final()
            {
                drop(now);
                return live;
            }
            *now = record.clone();
        }
        live.shared.version.send_modify(|v| *v += 1);
        self.events.send(Event {
            subject: None,
            time: self.env.now(),
            project: record.project,
            project_name: (self.names)(record.project),
            kind: EventKind::Operation(record),
        });
        live
    }

    /// Begins an operation that lives in memory only (websockets).
    pub fn begin(&self, context: &Context, new: NewOperation) -> LiveOperation {
        let mut record = self.record(context, new);
        record.state = OperationState::Running;
        self.publish(record)
    }

    /// Changes a running operation's metadata (progress).
    pub fn progress(
        &self,
        live: &LiveOperation,
        change: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>),
    ) {
        let mut record = (*live.snapshot()).clone();
        if record.state.is_final() {
            return;
        }
        change(&mut record.metadata);
        record.updated_at = self.env.now();
        self.publish(record);
    }

    /// Ends an operation that lives in memory only and failed, but has a result all the same: a program's exit code.
    pub fn end_failed(
        &self,
        live: &LiveOperation,
        error: karst_model::Error,
        metadata: serde_json::Map<String, serde_json::Value>,
    ) {
        let mut record = (*live.snapshot()).clone();
        if record.state.is_final() {
            return;
        }
        record.may_cancel = false;
        record.updated_at = self.env.now();
        record.metadata.extend(metadata);
        record.state = OperationState::Failure;
        record.error = Some(error);
        self.publish(record);
    }

    /// Ends an operation that lives in memory only.
    pub fn end(&self, live: &LiveOperation, result: Result<serde_json::Map<String, serde_json::Value>>) {
        let mut record = (*live.snapshot()).clone();
        if record.state.is_final() {
            return;
        }
        record.may_cancel = false;
        record.updated_at = self.env.now();
        match result {
            Ok(metadata) => {
                record.metadata.extend(metadata);
                record.state = OperationState::Success;
            }
            Err(e) => {
                record.state = if e.is(karst_model::ErrorKind::Cancelled) {
                    OperationState::Cancelled
                } else {
                    OperationState::Failure
                };
                record.error = Some(e);
            }
        }
        self.publish(record);
    }

    /// The live handle of an operation.
    pub fn live(&self, id: OperationId) -> Option<LiveOperation> {
        self.table().by_id.get(&id).cloned()
    }

    /// All that have not ended, or need attention.
    pub fn running(&self) -> Vec<Arc<Operation>> {
        let mut all: Vec<_> = self
            .table()
            .by_id
            .values()
            .map(LiveOperation::snapshot)
            .filter(|o| !o.state.is_final() || o.state == OperationState::NeedsAttention)
            .collect();
        all.sort_by_key(|o| (o.created_at, o.id));
        all
    }

    /// Asks an operation to cancel.
    ///
    /// # Errors
    /// Invalid when it has ended or may not be cancelled.
    pub fn cancel(&self, live: &LiveOperation) -> Result<()> {
        let record = live.snapshot();
        if record.state.is_final() {
            return Err(Error::conflict("the operation has ended already"));
        }
        if !record.may_cancel {
            return Err(Error::invalid("operation", "this operation cannot be cancelled"));
        }
        live.shared.cancel.send_replace(true);
        let mut record = (*record).clone();
        record.state = OperationState::Cancelling;
        record.may_cancel = false;
        self.publish(record);
        Ok(())
    }

    /// As [`Self::cancel`], for a reason that the operation then ends with.
    ///
    /// # Errors
    /// Those of [`Self::cancel`].
    pub fn cancel_because(&self, live: &LiveOperation, why: &str) -> Result<()> {
        if live.snapshot().may_cancel {
            // The first reason stays.
            let _ = live.shared.why.set(why.to_owned());
        }
        self.cancel(live)
    }

    /// Waits for the end, at most `timeout` (`None`: without limit); answers the record as it then is.
    pub async fn wait(&self, live: &LiveOperation, timeout: Option<Duration>) -> Arc<Operation> {
        match timeout {
            None => live.ended().await,
            Some(t) => match self.env.timeout(t, live.ended()).await {
                Ok(record) => record,
                Err(_) => live.snapshot(),
            },
        }
    }
}
