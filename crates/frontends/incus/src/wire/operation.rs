//! Operations and events.

use super::NOWHERE;
use jiff::Timestamp;
use karst_model::operation::{Operation, OperationClass, OperationState};
use serde::Serialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Incus' word and code for a state.
pub fn status(state: OperationState) -> (&'static str, u16) {
    match state {
        OperationState::Pending => ("Pending", 105),
        OperationState::Running => ("Running", 103),
        OperationState::Cancelling => ("Cancelling", 104),
        OperationState::Success => ("Success", 200),
        OperationState::Failure | OperationState::NeedsAttention => ("Failure", 400),
        OperationState::Cancelled => ("Cancelled", 401),
    }
}

/// Incus' word for a class.
pub fn class(class: OperationClass) -> &'static str {
    match class {
        OperationClass::Task => "task",
        OperationClass::Websocket => "websocket",
        OperationClass::Token => "token",
    }
}

/// An operation.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct OperationView<'a> {
    pub id: String,
    pub class: &'static str,
    pub description: &'a str,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    pub status: &'static str,
    pub status_code: u16,
    pub resources: &'a BTreeMap<String, Vec<String>>,
    pub metadata: Option<&'a Map<String, Value>>,
    pub may_cancel: bool,
    pub err: String,
    pub location: &'static str,
}

impl<'a> OperationView<'a> {
    /// Of a record.
    pub fn of(operation: &'a Operation) -> Self {
        let (status, status_code) = status(operation.state);
        Self {
            id: operation.id.to_string(),
            class: class(operation.class),
            description: &operation.description,
            created_at: operation.created_at,
            updated_at: operation.updated_at,
            status,
            status_code,
            resources: &operation.resources,
            metadata: Some(&operation.metadata).filter(|m| !m.is_empty()),
            may_cancel: operation.may_cancel,
            err: operation.error.as_ref().map(ToString::to_string).unwrap_or_default(),
            location: NOWHERE,
        }
    }

    /// With other metadata (secrets, which are in no record).
    pub fn with_metadata(mut self, metadata: &'a Map<String, Value>) -> Self {
        self.metadata = Some(metadata);
        self
    }

    /// With other metadata, if there is some.
    pub fn with_metadata_if(mut self, metadata: Option<&'a Map<String, Value>>) -> Self {
        self.metadata = metadata.or(self.metadata);
        self
    }
}

/// An event.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct EventView<'a, M: Serialize> {
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub timestamp: Timestamp,
    pub metadata: M,
    pub location: &'static str,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub project: &'a str,
}

/// What changed.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct LifecycleView<'a> {
    pub action: &'a str,
    pub source: &'a str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub context: &'a BTreeMap<String, Value>,
    pub requestor: Requestor<'a>,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub name: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub project: &'a str,
}

/// Who asked.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct Requestor<'a> {
    pub username: &'a str,
    pub protocol: &'static str,
    pub address: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::{Error, OperationId, PrincipalId};
    use uuid::Uuid;

    #[test]
    fn an_operation_as_incus_writes_it() {
        let at: Timestamp = "2026-11-21T07:58:47.575697837Z".parse().unwrap();
        let operation = Operation {
            id: OperationId(Uuid::from_u128(1)),
            description: "Creating instance".into(),
            class: OperationClass::Task,
            project: None,
            principal: PrincipalId(Uuid::from_u128(2)),
            requestor: "unix user 0".into(),
            node: None,
            saga: None,
            state: OperationState::Failure,
            resources: BTreeMap::from([("instances".into(), vec!["/1.0/instances/c1".into()])]),
            metadata: Map::new(),
            may_cancel: false,
            error: Some(Error::not_found("image \"x\" not found").with_context("private")),
            created_at: at,
            updated_at: at,
        };
        insta::assert_snapshot!(serde_json::to_string(&OperationView::of(&operation)).unwrap(), @r#"{"id":"00000000-0000-0000-0000-000000000001","class":"task","description":"Creating instance","created_at":"2026-11-21T07:58:47.575697837Z","updated_at":"2026-11-21T07:58:47.575697837Z","status":"Failure","status_code":400,"resources":{"instances":["/1.0/instances/c1"]},"metadata":null,"may_cancel":false,"err":"image \"x\" not found","location":"none"}"#);
    }
}
