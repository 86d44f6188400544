//! Operations: what a user sees of work that takes time. An Incus operation, a Proxmox task, a libvirt job.

use crate::{Error, NodeId, OperationId, PrincipalId, ProjectId, SagaId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// A persisted record of work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// Reference.
    pub id: OperationId,
    /// What it does, for people: `Starting instance`.
    pub description: String,
    /// Class, which decides what clients can do with it.
    pub class: OperationClass,
    /// Project.
    pub project: Option<ProjectId>,
    /// Who asked.
    pub principal: PrincipalId,
    /// Who asked, in words (`unix user root`).
    pub requestor: String,
    /// The engine that executes it.
    pub node: Option<NodeId>,
    /// Saga behind it, if any.
    #[serde(default)]
    pub saga: Option<SagaId>,
    /// State.
    pub state: OperationState,
    /// Affected objects, as paths of the API below `/1.0` (`/1.0/instances/c1`), by kind (`instances`).
    #[serde(default)]
    pub resources: std::collections::BTreeMap<String, Vec<String>>,
    /// Progress and results for clients.
    #[serde(default)]
    pub metadata: serde_json::Map<String, serde_json::Value>,
    /// May it be cancelled now?
    #[serde(default)]
    pub may_cancel: bool,
    /// The failure, when `state` is failed.
    #[serde(default)]
    pub error: Option<Error>,
    /// When it began.
    pub created_at: Timestamp,
    /// Last change.
    pub updated_at: Timestamp,
}

/// Class of an operation (Incus' words).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationClass {
    /// Runs by itself.
    Task,
    /// Waits for websockets of the client.
    Websocket,
    /// A token that waits for its use.
    Token,
}

/// State of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// Not begun.
    Pending,
    /// Runs.
    Running,
    /// Is being cancelled.
    Cancelling,
    /// Ended well.
    Success,
    /// Failed; everything was undone.
    Failure,
    /// Was cancelled; everything was undone.
    Cancelled,
    /// An undo failed; an administrator must retry or abandon it.
    NeedsAttention,
}

impl OperationState {
    /// Has it ended?
    pub fn is_final(self) -> bool {
        matches!(self, Self::Success | Self::Failure | Self::Cancelled | Self::NeedsAttention)
    }
}
