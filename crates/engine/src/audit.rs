//! The audit log: every change and every refusal, kept by this engine's host as a chain ([`karst_model::audit`]).
//!
//! Front ends say what was asked for and how it was answered; lifecycle events and ends of operations come by themselves,
//! also those that nobody asked for. Entries queue here and are written in batches. While the host is away they wait; what
//! finds no place any more is counted, and the count is an entry of its own.

use crate::{
    Engine, EngineInner,
    context::Context,
    events::{Event, EventKind},
};
use karst_agent::CallContext;
use karst_model::{
    Error, Result,
    access::{Identity, Permission},
    audit::{AuditEntry, AuditRange, AuditRecord, AuditVerdict},
    operation::{OperationClass, OperationState},
};
use std::{
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::sync::{broadcast, mpsc};

/// Entries that wait for the host.
const QUEUE: usize = 4096;
/// Entries of one call.
const BATCH: usize = 200;
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

/// What waits to be written.
pub struct AuditQueue {
    sender: mpsc::Sender<AuditEntry>,
    receiver: Mutex<Option<mpsc::Receiver<AuditEntry>>>,
    lost: AtomicU64,
    /// Queued and written: equal when nothing waits.
    counts: [AtomicU64; 2],
    /// When a stranger was last written of, and how many were not since.
    strangers: Mutex<(Option<Duration>, u64)>,
}

impl Default for AuditQueue {
    fn default() -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        Self {
            sender,
            receiver: Mutex::new(Some(receiver)),
            lost: AtomicU64::new(0),
            counts: Default::default(),
            strangers: Mutex::default(),
        }
    }
}

fn short(text: &str) -> String {
    text.chars().take(LONGEST).collect()
}

impl AuditQueue {
    fn push(&self, entry: AuditEntry) {
        match self.sender.try_send(entry) {
            Ok(()) => drop(self.counts[0].fetch_add(1, Ordering::Relaxed)),
            Err(_) => drop(self.lost.fetch_add(1, Ordering::Relaxed)),
        }
    }
}

fn of_event(event: &Event) -> Option<AuditEntry> {
    let entry = |who: &str, what: String, object: String, outcome: &str, detail: String| AuditEntry {
        origin: (0, 0),
        time: event.time,
        who: short(who),
        from: String::new(),
        what,
        object: short(&object),
        project: event.project.map(|_| event.project_name.clone()).unwrap_or_default(),
        outcome: outcome.into(),
        detail: short(&detail),
    };
    match &event.kind {
        EventKind::Lifecycle { action, source, requestor, .. } => {
            Some(entry(requestor, (*action).into(), source.clone(), "done", String::new()))
        }
        EventKind::Operation(o) if o.class == OperationClass::Task && o.state.is_final() => {
            let outcome = match o.state {
                OperationState::Success => "done",
                OperationState::Cancelled => "cancelled",
                _ => "failed",
            };
            let detail = o.error.as_ref().map(ToString::to_string).unwrap_or_default();
            let detail = if detail.is_empty() {
                o.description.clone()
            } else {
                format!("{}: {detail}", o.description)
            };
            Some(entry(
                &o.requestor,
                "operation".into(),
                format!("/1.0/operations/{}", o.id),
                outcome,
                detail,
            ))
        }
        _ => None,
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
    loop {
        // Something first; then all that is there.
        let mut batch = vec![];
        let mut from_queue = 0;
        tokio::select! {
            biased;
            request = requests.recv() => match request {
                Some(entry) => { batch.push(entry); from_queue += 1; }
                None => return,
            },
            event = events.recv() => match event {
                Ok(event) => batch.extend(of_event(&event)),
                Err(broadcast::error::RecvError::Lagged(n)) => {
                    if let Some(inner) = weak.upgrade() {
                        inner.audit.lost.fetch_add(n, Ordering::Relaxed);
                    }
                }
                Err(broadcast::error::RecvError::Closed) => return,
            },
        }
        while batch.len() < BATCH
            && let Ok(entry) = requests.try_recv()
        {
            batch.push(entry);
            from_queue += 1;
        }
        while batch.len() < BATCH
            && let Ok(event) = events.try_recv()
        {
            batch.extend(of_event(&event));
        }
        let Some(inner) = weak.upgrade() else { return };
        let lost = inner.audit.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            batch.push(AuditEntry {
                origin: (0, 0),
                time: inner.env.now(),
                who: "karst".into(),
                from: String::new(),
                what: "audit".into(),
                object: "/1.0/karst/audit".into(),
                project: String::new(),
                outcome: "failed".into(),
                detail: format!("{lost} entries found no place and are lost"),
            });
        }
        for entry in &mut batch {
            number += 1;
            entry.origin = (inner.epoch, number);
        }
        drop(inner);
        let mut told = false;
        while !batch.is_empty() {
            let Some(inner) = weak.upgrade() else { return };
            let written = match inner.agents.get(inner.node) {
                Ok(agent) => agent.audit_append(&inner.reconcile_context(CALL), batch.clone()).await,
                Err(e) => Err(e),
            };
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
        if let Some(inner) = weak.upgrade() {
            inner.audit.counts[1].fetch_add(from_queue, Ordering::Relaxed);
        }
    }
}

impl Engine {
    /// Takes down a request and its answer. Never waits.
    pub fn audit(&self, context: &Context, request: AuditRequest) {
        let inner = self.inner();
        let mut detail = short(&request.detail);
        if !context.principal().is_known() {
            let now = inner.env.monotonic();
            let mut strangers = inner.audit.strangers.lock().unwrap_or_else(|e| e.into_inner());
            if strangers.0.is_some_and(|last| now.saturating_sub(last) < STRANGERS) {
                strangers.1 += 1;
                return;
            }
            let more = std::mem::replace(&mut *strangers, (Some(now), 0)).1;
            if more > 0 {
                detail.push_str(&format!(" (and {more} more of strangers before)"));
            }
        }
        let from = match &context.principal().identity {
            Identity::Certificate { address, .. } | Identity::Token { address, .. } => address.clone(),
            _ => String::new(),
        };
        inner.audit.push(AuditEntry {
            origin: (0, 0),
            time: inner.env.now(),
            who: short(&context.principal().identity.describe()),
            from,
            what: request.what,
            object: short(&request.object),
            project: short(&request.project),
            outcome: request.outcome.into(),
            detail,
        });
    }

    /// A part of the audit log of this engine's host, from record `from` on.
    ///
    /// # Errors
    /// Forbidden, unavailable.
    pub async fn audit_read(&self, context: &Context, from: u64, limit: u32) -> Result<Vec<AuditRecord>> {
        context.demand_server(Permission::ServerInspect)?;
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
