//! What happened, for whoever listens: lifecycle of objects, changes of operations, the server's log. A listener hears
//! what its principal may see when the event happens.

use crate::Records;
use jiff::Timestamp;
use karst_model::{
    ProjectId,
    access::{Permission, Principal},
    instance::{ExitReason, Instance, Runtime},
    network::Network,
    news::Happened,
    operation::Operation,
    secret::Secret,
    storage::Pool,
};
use std::{collections::BTreeMap, sync::Arc};
use tokio::sync::broadcast;

/// Events kept for a slow listener; one that falls further behind is told how many it lost.
const BACKLOG: usize = 1024;

/// A virtual machine has written behind the threshold of a disk ([`Engine::machine_threshold`](crate::Engine::machine_threshold)):
/// the action of its event, whose context has the disk's `device` and `slot`, the `threshold` and the `excess`, bytes.
pub const DISK_THRESHOLD: &str = "instance-disk-threshold-reached";

/// In the context of an end: why it came, in one of [`reason`]'s words.
pub const REASON: &str = "reason";
/// Of a start: it went on from memory that was kept.
pub const RESUMED: &str = "resumed";
/// Of one that ended by itself: how, in words.
pub const DETAIL: &str = "detail";
/// Of a new name: the one before, as Incus has it.
pub const OLD_NAME: &str = "old_name";
/// Of one that was put back to a snapshot: it ran before.
pub const RAN: &str = "ran";
/// Of the same: it runs now.
pub const RUNS: &str = "runs";
/// Of the same: it stands still now.
pub const PAUSED: &str = "paused";

/// Why a guest ended, in a word: `saved` with its memory, `shutdown`, `forced`, `crashed`; nothing where that is not known.
pub fn reason(exit: Option<&ExitReason>, saved: bool) -> Option<&'static str> {
    match exit {
        _ if saved => Some("saved"),
        Some(ExitReason::Shutdown) => Some("shutdown"),
        Some(ExitReason::Forced) => Some("forced"),
        Some(ExitReason::Crashed { .. }) => Some("crashed"),
        None => None,
    }
}

/// The same as a context.
pub(crate) fn reason_context(exit: Option<&ExitReason>, saved: bool) -> BTreeMap<String, serde_json::Value> {
    let said = reason(exit, saved).map(|word| (REASON.to_owned(), serde_json::Value::from(word)));
    let detail = match exit {
        Some(crashed @ ExitReason::Crashed { .. }) if !saved => {
            Some((DETAIL.to_owned(), crashed.words().into()))
        }
        _ => None,
    };
    said.into_iter().chain(detail).collect()
}

/// The context of an event that tells what happened in a machine.
pub(crate) fn context_of(what: &Happened) -> BTreeMap<String, serde_json::Value> {
    match serde_json::to_value(what) {
        Ok(serde_json::Value::Object(fields)) => fields.into_iter().collect(),
        // It has no other form.
        _ => BTreeMap::new(),
    }
}

/// What happened in a machine, of an event that tells such a thing.
pub fn happened(action: &str, context: &BTreeMap<String, serde_json::Value>) -> Option<Happened> {
    let fields = context.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    let what: Happened = serde_json::from_value(serde_json::Value::Object(fields)).ok()?;
    (what.action() == action).then_some(what)
}

/// Something that happened.
#[derive(Debug, Clone)]
pub struct Event {
    /// When.
    pub time: Timestamp,
    /// Where; `None` concerns the server.
    pub project: Option<ProjectId>,
    /// The project's name at that time.
    pub project_name: String,
    /// What.
    pub kind: EventKind,
    /// To which object, where listeners need more of it than its path.
    pub subject: Option<Subject>,
}

/// The object of an event, as it was when it happened: by the time that somebody looks at the event it may be gone, and another
/// may have its name.
#[derive(Debug, Clone)]
pub enum Subject {
    /// An instance, and what was seen of its guest.
    Instance(Arc<Instance>, Option<Arc<Runtime>>),
    /// A network.
    Network(Arc<Network>),
    /// A pool.
    Pool(Arc<Pool>),
    /// A secret, without its value.
    Secret(Arc<Secret>),
}

impl Subject {
    /// The object of a path such as `/1.0/instances/NAME?project=P`, as it is now; nothing when it is not there, and of other
    /// kinds of objects.
    pub(crate) fn of(records: &Records, project: Option<ProjectId>, source: &str) -> Option<Self> {
        let path = source.split('?').next()?.strip_prefix("/1.0/")?;
        let (kind, name) = path.split_once('/')?;
        // What happens to a snapshot happens to its instance.
        let of_snapshot = name.split_once("/snapshots/").filter(|_| kind == "instances");
        let name = of_snapshot.map_or(name, |(instance, _)| instance);
        if name.contains('/') {
            return None;
        }
        match kind {
            "instances" => {
                let row = records.instance(records.projects.get(&project?)?, name).ok()?;
                let runtime = records.runtimes.get(&row.id).map(|r| Arc::new(r.value.clone()));
                Some(Self::Instance(Arc::new(row.value.clone()), runtime))
            }
            "networks" => {
                let default = records.project(karst_model::project::DEFAULT_PROJECT).ok().map(|p| p.id);
                let row = records.network(project.or(default)?, name).ok()?;
                Some(Self::Network(Arc::new(row.value.clone())))
            }
            "storage-pools" => Some(Self::Pool(Arc::new(records.pool(name).ok()?.value.clone()))),
            _ => None,
        }
    }

    /// A secret, as listeners are told of it.
    pub(crate) fn secret(secret: &Secret) -> Self {
        Self::Secret(Arc::new(Secret { sealed: None, ..secret.clone() }))
    }

    fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Instance(a, _), Self::Instance(b, _)) => a.id == b.id,
            (Self::Network(a), Self::Network(b)) => a.id == b.id,
            (Self::Pool(a), Self::Pool(b)) => a.id == b.id,
            (Self::Secret(a), Self::Secret(b)) => a.uuid == b.uuid,
            _ => false,
        }
    }

    /// What was changed, out of what was there before and after, each under the same path: the same object as it is now, or the
    /// one that is gone, never another that took its name.
    pub(crate) fn changed(before: Option<Self>, after: Option<Self>) -> Option<Self> {
        match (before, after) {
            (Some(before), Some(after)) if before.same(&after) => Some(after),
            (Some(before), _) => Some(before),
            (None, after) => after,
        }
    }
}

/// Kinds of events.
#[derive(Debug, Clone)]
pub enum EventKind {
    /// An object changed: `action` is Incus' word, such as `instance-started`; `source` its path such as
    /// `/1.0/instances/c1`.
    Lifecycle {
        /// What happened.
        action: &'static str,
        /// To what.
        source: String,
        /// Details.
        context: BTreeMap<String, serde_json::Value>,
        /// Who asked, in words.
        requestor: String,
    },
    /// An operation changed.
    Operation(Arc<Operation>),
    /// A line of the server's log.
    Log {
        /// `info`, `warning`, `error`.
        level: &'static str,
        /// What.
        message: String,
        /// Details.
        context: BTreeMap<String, serde_json::Value>,
    },
}

/// A listener.
pub struct Subscription {
    receiver: broadcast::Receiver<Arc<Event>>,
    principal: Box<dyn Fn() -> Principal + Send>,
}

impl Subscription {
    /// Listens for `principal`, which is asked anew for each event: who is trusted no longer hears nothing more.
    pub(crate) fn new(events: &Events, principal: Box<dyn Fn() -> Principal + Send>) -> Self {
        Self { receiver: events.subscribe(), principal }
    }

    /// The next event that the listener may see.
    ///
    /// # Errors
    /// How many events were lost because the listener was too slow; the end of the engine.
    pub async fn recv(&mut self) -> Result<Arc<Event>, broadcast::error::RecvError> {
        loop {
            let event = self.receiver.recv().await?;
            let principal = (self.principal)();
            let may = match event.project {
                Some(project) => principal.may(Permission::ProjectView, Some(project)),
                None => principal.may(Permission::ServerInspect, None),
            };
            // Who began an operation follows it wherever it belongs.
            let own = matches!(&event.kind, EventKind::Operation(o) if o.principal == principal.id);
            if principal.is_known() && (may || own) {
                return Ok(event);
            }
        }
    }
}

/// Distributes events to any number of listeners.
#[derive(Debug, Clone)]
pub struct Events {
    sender: broadcast::Sender<Arc<Event>>,
}

impl Default for Events {
    fn default() -> Self {
        Self { sender: broadcast::channel(BACKLOG).0 }
    }
}

impl Events {
    /// Sends; without listeners it is dropped.
    pub fn send(&self, event: Event) {
        // An error only says that nobody listens.
        let _ = self.sender.send(Arc::new(event));
    }

    /// Listens from now on, to everything.
    pub(crate) fn subscribe(&self) -> broadcast::Receiver<Arc<Event>> {
        self.sender.subscribe()
    }
}
