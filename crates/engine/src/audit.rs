//! The audit log: every change and every refusal, kept by this engine's host as a chain ([`karst_model::audit`]).
//!
//! Front ends say what was asked for and how it was answered; lifecycle events and ends of operations come by themselves,
//! also those that nobody asked for. Entries queue here and are written in batches. While the host is away they wait; what
//! finds no place any more is counted, and the count is an entry of its own.
//!
//! No change gets lost with the daemon. Who asked for one that is one transaction stands in that transaction ([`AuditPending`]), which
//! costs no sync of its own, and is taken out of the store when it is in the log, many at once. Larger ones have an operation, which
//! is durable by itself. What of both is not at the end of the log is written by the next daemon, which says that the one before it
//! was killed: of refusals, and of requests that changed nothing, its last moments may be missing. So an entry may stand there twice,
//! but not be missing.

use crate::{
    Engine, EngineInner, Row,
    context::Context,
    db::Tx,
    events::{Event, EventKind},
};
use jiff::Timestamp;
use karst_agent::CallContext;
use karst_model::{
    Error, NodeId, Result,
    access::{Identity, Permission},
    audit::{AuditEntry, AuditRange, AuditRecord, AuditVerdict},
    operation::{Operation, OperationClass, OperationState},
};
use karst_store::Record;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::sync::{broadcast, mpsc};

/// Entries that wait for the host, beside those that the store has.
const QUEUE: u64 = 4096;
/// Entries that the store has at most; more queue like all others.
const STORED: u64 = 10_000;
/// What is in the log is taken out of the store when it is so many, or after so long: each time costs a sync.
const TAKEN: usize = 100;
const LINGER: Duration = Duration::from_secs(2);
/// Records at the end of the log among which it is looked for what a daemon before this one left. More than ever waited.
const TAIL: u64 = 6000;
/// Records of one answer.
const PAGE: u32 = 1000;
/// Entries of one call.
const BATCH: usize = 200;
/// Time between two batches: a single entry is written at once, of a stream so much together. Its changes are in the store meanwhile.
const GATHER: Duration = Duration::from_millis(20);
/// How long a reader waits for what was said before he asked.
const SETTLE: Duration = Duration::from_secs(2);
/// Time for a batch, and until it is tried again.
const CALL: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_secs(1);
/// Of those whom nobody knows one entry in this time, so that they cannot push out what others did.
const STRANGERS: Duration = Duration::from_secs(1);
/// Longest text of a field, in characters.
const LONGEST: usize = 512;

/// A request as a front end saw it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AuditRequest {
    /// What: `request POST`.
    pub what: String,
    /// Path of the API.
    pub object: String,
    /// Project, or empty.
    pub project: String,
    /// `done`, `accepted`, `refused`, `failed`.
    pub outcome: &'static str,
    /// The error, if there was one.
    pub detail: String,
}

/// Who asked for a change, in the transaction that made it, until the log has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditPending {
    /// Node and epoch of the daemon, and a number that grows within it.
    pub id: String,
    /// What the log gets when nobody comes who knows more.
    pub entry: AuditEntry,
}

impl Record for AuditPending {
    const TABLE: &'static str = "audit";
    fn record_id(&self) -> String {
        self.id.clone()
    }
}

tokio::task_local! {
    /// The request that this task answers.
    static ASKED: Arc<Asking>;
}

/// A request that is being answered, for the transactions that it makes.
#[derive(Debug)]
pub(crate) struct Asking {
    entry: AuditEntry,
    /// Of its record in the store, once one was tried.
    key: Mutex<Option<String>>,
    /// A transaction with the record is durable: the others need it no more.
    stored: AtomicBool,
}

impl Asking {
    /// The record is durable.
    pub(crate) fn mark_stored(&self) {
        self.stored.store(true, Ordering::Relaxed);
    }

    fn take_key(&self) -> Option<String> {
        self.key.lock().unwrap_or_else(|e| e.into_inner()).take()
    }
}

/// A request that may change something, from its beginning to its answer. One that is dropped before its answer, because nobody
/// waits for it any more, is taken down as far as it changed something.
#[must_use]
pub struct Asked {
    engine: Engine,
    context: Context,
    asking: Arc<Asking>,
}

impl Asked {
    /// Carries it out.
    pub async fn during<T>(&self, work: impl Future<Output = T>) -> T {
        ASKED.scope(self.asking.clone(), work).await
    }

    /// Takes down its answer. Never waits.
    pub fn ended(self, request: AuditRequest) {
        let key = self.asking.take_key();
        self.engine.take_down(&self.context, request, key, self.asking.entry.time);
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if let Some(key) = self.asking.take_key() {
            let detail = "nobody waited for the answer".to_owned();
            let entry = AuditEntry { detail, ..self.asking.entry.clone() };
            self.engine.inner().audit.push(Waiting { entry, key: Some(key) });
        }
    }
}

/// An entry that waits, with the key of its record in the store if it has one.
struct Waiting {
    entry: AuditEntry,
    key: Option<String>,
}

/// What waits to be written.
pub struct AuditQueue {
    /// Of those without a record in the store there are at most [`QUEUE`], of the others [`STORED`].
    sender: mpsc::UnboundedSender<Waiting>,
    receiver: Mutex<Option<mpsc::UnboundedReceiver<Waiting>>>,
    /// Those without a record that wait.
    waiting: AtomicU64,
    /// Records in the store, and the number of the last one.
    stored: [AtomicU64; 2],
    lost: AtomicU64,
    /// Queued and written: equal when nothing waits.
    counts: [AtomicU64; 2],
    /// When a stranger was last written of, and how many were not since.
    strangers: Mutex<(Option<Duration>, u64)>,
}

impl Default for AuditQueue {
    fn default() -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        Self {
            sender,
            receiver: Mutex::new(Some(receiver)),
            waiting: AtomicU64::new(0),
            stored: Default::default(),
            lost: AtomicU64::new(0),
            counts: Default::default(),
            strangers: Mutex::default(),
        }
    }
}

fn short(text: &str) -> String {
    text.chars().take(LONGEST).collect()
}

/// How the ids of a daemon's records begin.
fn prefix((node, epoch): (NodeId, u64)) -> String {
    format!("{node}.{epoch:020}.")
}

/// A request as an entry.
fn entry(context: &Context, request: AuditRequest, time: Timestamp) -> AuditEntry {
    let from = match &context.principal().identity {
        Identity::Certificate { address, .. } | Identity::Token { address, .. } => address.clone(),
        _ => String::new(),
    };
    AuditEntry {
        origin: (0, 0),
        time,
        who: short(&context.principal().identity.describe()),
        from,
        what: request.what,
        object: short(&request.object),
        project: short(&request.project),
        outcome: request.outcome.into(),
        detail: short(&request.detail),
    }
}

impl AuditQueue {
    fn push(&self, waiting: Waiting) {
        if waiting.key.is_none() && self.waiting.fetch_add(1, Ordering::Relaxed) >= QUEUE {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        match self.sender.send(waiting) {
            Ok(()) => drop(self.counts[0].fetch_add(1, Ordering::Relaxed)),
            // The engine has ended.
            Err(_) => drop(self.lost.fetch_add(1, Ordering::Relaxed)),
        }
    }

    /// One has come out of the queue.
    fn received(&self, waiting: &Waiting) {
        if waiting.key.is_none() {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Puts who asked for it into a transaction of the request that this task answers. `None`: it answers none, or that is in the
    /// store already, or there is no room: then it queues as all else does.
    pub(crate) fn note(&self, executor: (NodeId, u64), tx: &mut Tx) -> Option<Arc<Asking>> {
        let asking = ASKED.try_with(Arc::clone).ok()?;
        if asking.stored.load(Ordering::Relaxed) || !tx.fits_an_end() {
            return None;
        }
        let id = {
            let mut key = asking.key.lock().unwrap_or_else(|e| e.into_inner());
            match key.clone() {
                Some(known) => known,
                None => {
                    if self.stored[0].load(Ordering::Relaxed) >= STORED {
                        return None;
                    }
                    self.stored[0].fetch_add(1, Ordering::Relaxed);
                    let number = self.stored[1].fetch_add(1, Ordering::Relaxed);
                    key.insert(format!("{}{number:020}", prefix(executor))).clone()
                }
            }
        };
        tx.put(&AuditPending { id, entry: asking.entry.clone() });
        Some(asking)
    }
}

/// What the entry of an operation's end is called.
const OPERATION: &str = "operation";

fn object_of(operation: &Operation) -> String {
    format!("/1.0/operations/{}", operation.id)
}

/// The end of an operation, without its project.
fn of_operation(o: &Operation) -> AuditEntry {
    let outcome = match o.state {
        OperationState::Success => "done",
        OperationState::Cancelled => "cancelled",
        _ => "failed",
    };
    let detail = match &o.error {
        None => o.description.clone(),
        Some(e) => format!("{}: {e}", o.description),
    };
    AuditEntry {
        origin: (0, 0),
        time: o.updated_at,
        who: short(&o.requestor),
        from: String::new(),
        what: OPERATION.into(),
        object: object_of(o),
        project: String::new(),
        outcome: outcome.into(),
        detail: short(&detail),
    }
}

fn of_event(event: &Event) -> Option<AuditEntry> {
    let project = event.project.map(|_| event.project_name.clone()).unwrap_or_default();
    match &event.kind {
        EventKind::Lifecycle { action, source, requestor, .. } => Some(AuditEntry {
            origin: (0, 0),
            time: event.time,
            who: short(requestor),
            from: String::new(),
            what: (*action).into(),
            object: short(source),
            project,
            outcome: "done".into(),
            detail: String::new(),
        }),
        EventKind::Operation(o) if o.class == OperationClass::Task && o.state.is_final() => {
            Some(AuditEntry { time: event.time, project, ..of_operation(o) })
        }
        _ => None,
    }
}

/// The same, unless it is the end of one of these operations, which are written already.
fn news_of(event: &Event, written: &mut BTreeSet<String>) -> Option<AuditEntry> {
    of_event(event).filter(|e| e.what != OPERATION || !written.remove(&e.object))
}

/// Where it is written whether a daemon for this node may have entries that are in its memory alone.
fn open_key(node: NodeId) -> String {
    format!("/karst/v1/meta/audit/{node}")
}

/// What it says then, and after an orderly end.
const OPEN: &str = "open";
const CLOSED: &str = "closed";

impl EngineInner {
    /// Writes down whether entries are in memory alone; answers whether it said so before.
    async fn set_audit_open(&self, open: bool) -> Result<bool> {
        let key = open_key(self.node);
        let kept = self.db.store().get(&key).await?.kv;
        let was = kept.is_some_and(|kv| kv.value[..] == *OPEN.as_bytes());
        if was != open {
            let mut tx = Tx::default();
            tx.put_raw(&key, if open { OPEN } else { CLOSED }.to_owned());
            // Nothing is compared but who acts for the node.
            let _ = self.db.commit(tx).await?;
        }
        Ok(was)
    }

    /// The end of the log.
    async fn audit_tail(&self) -> Result<Vec<AuditRecord>> {
        let agent = self.agents.get(self.node)?;
        let head = agent.audit_append(&self.reconcile_context(CALL), vec![]).await?;
        let mut from = head.seq.saturating_sub(TAIL - 1).max(1);
        let mut tail = vec![];
        while from <= head.seq {
            let range = AuditRange { from, limit: PAGE };
            let page = agent.audit_read(&CallContext::read(CALL), range).await?;
            let Some(last) = page.last() else { break };
            from = last.seq + 1;
            tail.extend(page);
        }
        Ok(tail)
    }
}

/// What an earlier daemon has not written: entries, the keys of their records, and the operations among them.
#[derive(Debug, Default)]
struct Left {
    entries: Vec<AuditEntry>,
    keys: Vec<String>,
    operations: BTreeSet<String>,
}

/// Is it the same thing, wherever it stands?
fn same(a: &AuditEntry, b: &AuditEntry) -> bool {
    (a.time, &a.who, &a.what, &a.object) == (b.time, &b.who, &b.what, &b.object)
}

/// Looks what of the store is not at the end of the log. `since` is when this daemon began to listen.
fn left(inner: &EngineInner, tail: &[AuditRecord], killed: bool, since: Timestamp) -> Left {
    let mut left = Left::default();
    let records = inner.inventory.read();
    let (here, ours) = (format!("{}.", inner.node), prefix((inner.node, inner.epoch)));
    let earlier = |p: &&Row<AuditPending>| p.id.starts_with(&here) && !p.id.starts_with(&ours);
    for pending in records.audits.values().filter(earlier) {
        left.keys.push(pending.id.clone());
        if !tail.iter().any(|r| same(&r.entry, &pending.entry)) {
            let detail = "the daemon ended before it was answered".to_owned();
            left.entries.push(AuditEntry { detail, ..pending.entry.clone() });
        }
    }
    // Older ones are not among the records that were read.
    let from = tail.first().map(|r| r.entry.time);
    let written: BTreeSet<&str> =
        tail.iter().filter(|r| r.entry.what == OPERATION).map(|r| r.entry.object.as_str()).collect();
    for o in records.operations.values() {
        let here = o.class == OperationClass::Task && o.state.is_final() && o.node == Some(inner.node);
        let object = object_of(&o.value);
        // One that ends just now is not written again when its event comes.
        let asked = here && o.updated_at <= since && from.is_none_or(|from| o.updated_at >= from);
        if asked && !written.contains(object.as_str()) {
            let mut entry = of_operation(&o.value);
            entry.project = o
                .project
                .and_then(|p| records.projects.get(&p))
                .map(|p| p.name.to_string())
                .unwrap_or_default();
            left.entries.push(entry);
            left.operations.insert(object);
        }
    }
    left.entries.sort_by_key(|e| e.time);
    if killed {
        let text = format!(
            "the daemon was killed: {} changes that it had not written follow; up to {QUEUE} refusals, and requests that \
             changed nothing, may be missing",
            left.entries.len()
        );
        left.entries.insert(0, about_the_log(inner, text));
    }
    left
}

/// The same, as soon as host and store answer; `None` when the engine has ended.
async fn taken_over(weak: &Weak<EngineInner>, since: Timestamp) -> Option<Left> {
    let mut told = false;
    loop {
        let inner = weak.upgrade()?;
        let found = async {
            let tail = inner.audit_tail().await?;
            let killed = inner.set_audit_open(true).await?;
            Ok::<_, Error>(left(&inner, &tail, killed, since))
        };
        match found.await {
            Ok(left) => return Some(left),
            Err(e) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(error = %e, "the audit log cannot be written; trying again");
                }
                let env = inner.env.clone();
                drop(inner);
                env.sleep(AGAIN).await;
            }
        }
    }
}

fn about_the_log(inner: &EngineInner, detail: String) -> AuditEntry {
    AuditEntry {
        origin: (0, 0),
        time: inner.env.now(),
        who: "karst".into(),
        from: String::new(),
        what: "audit".into(),
        object: "/1.0/karst/audit".into(),
        project: String::new(),
        outcome: "failed".into(),
        detail,
    }
}

/// Writes entries, however long that takes; `None` when the engine has ended.
async fn append(weak: &Weak<EngineInner>, number: &mut u64, mut entries: Vec<AuditEntry>) -> Option<()> {
    {
        let inner = weak.upgrade()?;
        for entry in &mut entries {
            *number += 1;
            entry.origin = (inner.epoch, *number);
        }
    }
    let mut told = false;
    while !entries.is_empty() {
        let inner = weak.upgrade()?;
        let written = match inner.agents.get(inner.node) {
            Ok(agent) => agent.audit_append(&inner.reconcile_context(CALL), entries.clone()).await,
            Err(e) => Err(e),
        };
        let env = inner.env.clone();
        drop(inner);
        match written {
            Ok(_) => break,
            Err(e) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(error = %e, "the audit log cannot be written; trying again");
                }
                env.sleep(AGAIN).await;
            }
        }
    }
    Some(())
}

/// Takes what the log has out of the store. What cannot be taken out now stays for later; for good it is the next daemon's.
async fn take_out(weak: &Weak<EngineInner>, spent: &mut Vec<String>) {
    let Some(inner) = weak.upgrade() else { return };
    while !spent.is_empty() {
        let some = spent.len().min(TAKEN);
        let mut tx = Tx::default();
        for key in &spent[..some] {
            tx.delete_id::<AuditPending>(key);
        }
        match inner.db.commit(tx).await {
            Ok(_) => {
                spent.drain(..some);
                inner.audit.stored[0].fetch_sub(some as u64, Ordering::Relaxed);
            }
            Err(e) => return tracing::debug!(error = %e, "audited changes stay in the store for now"),
        }
    }
}

/// Writes what comes, until the engine ends.
pub(crate) async fn writer(weak: Weak<EngineInner>) {
    let Some((env, mut requests, mut events)) = weak.upgrade().and_then(|inner| {
        let requests = inner.audit.receiver.lock().unwrap_or_else(|e| e.into_inner()).take()?;
        Some((inner.env.clone(), requests, inner.events.subscribe()))
    }) else {
        return;
    };
    let mut number = 0;
    let Some(Left { entries, keys: mut spent, mut operations }) = taken_over(&weak, env.now()).await else {
        return;
    };
    if let Some(inner) = weak.upgrade() {
        inner.audit.stored[0].fetch_add(spent.len() as u64, Ordering::Relaxed);
    }
    let mut last = None;
    let mut entries = entries.into_iter().peekable();
    while entries.peek().is_some() {
        let some = entries.by_ref().take(BATCH).collect();
        if append(&weak, &mut number, some).await.is_none() {
            return;
        }
    }
    loop {
        // Something first; then all that is there.
        let mut batch: Vec<AuditEntry> = vec![];
        let mut received: Vec<Waiting> = vec![];
        let linger = async {
            match spent.is_empty() {
                true => std::future::pending().await,
                false => env.sleep(LINGER).await,
            }
        };
        tokio::select! {
            biased;
            request = requests.recv() => match request {
                Some(waiting) => received.push(waiting),
                None => return,
            },
            event = events.recv() => match event {
                Ok(event) => batch.extend(news_of(&event, &mut operations)),
                Err(broadcast::error::RecvError::Lagged(n)) => {
                    if let Some(inner) = weak.upgrade() {
                        inner.audit.lost.fetch_add(n, Ordering::Relaxed);
                    }
                }
                Err(broadcast::error::RecvError::Closed) => return,
            },
            () = linger => {
                take_out(&weak, &mut spent).await;
                continue;
            }
        }
        let early = last.map(|last: Duration| (last + GATHER).saturating_sub(env.monotonic()));
        if let Some(early) = early.filter(|early| !early.is_zero()) {
            env.sleep(early).await;
        }
        while received.len() < BATCH
            && let Ok(waiting) = requests.try_recv()
        {
            received.push(waiting);
        }
        while batch.len() < BATCH
            && let Ok(event) = events.try_recv()
        {
            batch.extend(news_of(&event, &mut operations));
        }
        let from_queue = received.len() as u64;
        let mut keys = vec![];
        {
            let Some(inner) = weak.upgrade() else { return };
            for waiting in received {
                inner.audit.received(&waiting);
                keys.extend(waiting.key);
                batch.push(waiting.entry);
            }
            let lost = inner.audit.lost.swap(0, Ordering::Relaxed);
            if lost > 0 {
                let text = format!("{lost} entries found no place and are lost");
                batch.push(about_the_log(&inner, text));
            }
        }
        if append(&weak, &mut number, batch).await.is_none() {
            return;
        }
        last = Some(env.monotonic());
        spent.append(&mut keys);
        if spent.len() >= TAKEN {
            take_out(&weak, &mut spent).await;
        }
        if let Some(inner) = weak.upgrade() {
            inner.audit.counts[1].fetch_add(from_queue, Ordering::Relaxed);
        }
    }
}

impl Engine {
    /// Takes down a request that changed nothing, and its answer. Never waits.
    pub fn audit(&self, context: &Context, request: AuditRequest) {
        self.take_down(context, request, None, self.inner().env.now());
    }

    /// A request that may change something begins: what it asks for is in the transactions that it makes.
    pub fn audit_asked(&self, context: &Context, what: &str, object: &str, project: &str) -> Asked {
        let request = AuditRequest {
            what: what.to_owned(),
            object: object.to_owned(),
            project: project.to_owned(),
            outcome: "done",
            detail: String::new(),
        };
        let entry = entry(context, request, self.inner().env.now());
        let asking = Asking { entry, key: Mutex::default(), stored: AtomicBool::new(false) };
        Asked { engine: self.clone(), context: context.clone(), asking: Arc::new(asking) }
    }

    fn take_down(&self, context: &Context, request: AuditRequest, key: Option<String>, time: Timestamp) {
        let inner = self.inner();
        let mut entry = entry(context, request, time);
        // Those whom nobody knows change nothing that the store would have.
        if key.is_none() && !context.principal().is_known() {
            let now = inner.env.monotonic();
            let mut strangers = inner.audit.strangers.lock().unwrap_or_else(|e| e.into_inner());
            if strangers.0.is_some_and(|last| now.saturating_sub(last) < STRANGERS) {
                strangers.1 += 1;
                return;
            }
            let more = std::mem::replace(&mut *strangers, (Some(now), 0)).1;
            if more > 0 {
                entry.detail.push_str(&format!(" (and {more} more of strangers before)"));
            }
        }
        inner.audit.push(Waiting { entry, key });
    }

    /// A part of the audit log of this engine's host, from record `from` on.
    ///
    /// # Errors
    /// Forbidden, unavailable.
    pub async fn audit_read(&self, context: &Context, from: u64, limit: u32) -> Result<Vec<AuditRecord>> {
        context.demand_server(Permission::ServerInspect)?;
        // Who changed something and asks finds it. A host that takes nothing is no reason to show nothing.
        let _ = self.audit_settle(SETTLE).await;
        let agent = self.inner().agents.get(self.inner().node)?;
        agent.audit_read(&CallContext::read(CALL), AuditRange { from, limit }).await
    }

    /// Checks the chain of the audit log of each host, as far as it is kept; by name of the node.
    ///
    /// # Errors
    /// Forbidden, unavailable.
    pub async fn audit_verify(&self, context: &Context) -> Result<Vec<(String, AuditVerdict)>> {
        context.demand_server(Permission::ServerInspect)?;
        let inner = self.inner();
        let mut verdicts = vec![];
        for (node, agent) in inner.agents.all() {
            let verdict = agent.audit_verify(&CallContext::read(Duration::from_secs(60)), ()).await?;
            let name = inner.inventory.read().nodes.get(&node).map(|n| n.name.to_string());
            verdicts.push((name.unwrap_or_default(), verdict));
        }
        Ok(verdicts)
    }

    /// Waits until what was said by then is written, for an orderly end.
    ///
    /// # Errors
    /// Timeout when the host does not take it.
    pub async fn audit_flush(&self, patience: Duration) -> Result<()> {
        self.audit_settle(patience).await?;
        // The next daemon has nothing to look for.
        self.inner().set_audit_open(false).await?;
        Ok(())
    }

    /// Waits until what was said by then is written.
    async fn audit_settle(&self, patience: Duration) -> Result<()> {
        let inner: &Arc<EngineInner> = self.inner();
        let [queued, written] = &inner.audit.counts;
        let wanted = queued.load(Ordering::Relaxed);
        let end = inner.env.monotonic() + patience;
        while written.load(Ordering::Relaxed) < wanted {
            if inner.env.monotonic() >= end {
                return Err(Error::timeout("the host does not take what is to be audited"));
            }
            inner.env.sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }
}
