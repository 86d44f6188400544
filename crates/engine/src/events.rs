//! What happened, for whoever listens: lifecycle of objects and changes of operations.

use jiff::Timestamp;
use karst_model::{ProjectId, operation::Operation};
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

    /// Listens from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<Event>> {
        self.sender.subscribe()
    }
}
