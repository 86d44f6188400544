//! What happened, for whoever listens: lifecycle of objects, changes of operations, the server's log. A listener hears
//! what its principal may see when the event happens.

use jiff::Timestamp;
use karst_model::{
    ProjectId,
    access::{Permission, Principal},
    operation::Operation,
};
use std::{collections::BTreeMap, sync::Arc};
use tokio::sync::broadcast;

/// Events kept for a slow listener; one that falls further behind is told how many it lost.
const BACKLOG: usize = 1024;

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
