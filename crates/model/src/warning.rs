//! Warnings: what is wrong on the platform and stays so until somebody or something puts it right.

use crate::ProjectId;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Something works less well.
    Low,
    /// Something does not work as it should.
    Moderate,
    /// Somebody has to act.
    High,
}

impl Severity {
    /// Incus' word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Moderate => "moderate",
            Self::High => "high",
        }
    }
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WarningStatus {
    /// Nobody has said that he saw it.
    New,
    /// Somebody has.
    Acknowledged,
    /// It is so no longer.
    Resolved,
}

impl WarningStatus {
    /// Incus' word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Acknowledged => "acknowledged",
            Self::Resolved => "resolved",
        }
    }
}

/// A warning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Warning {
    /// Follows from what it is about: the same condition has the same warning.
    pub id: Uuid,
    /// What kind of thing, for people.
    pub kind: String,
    /// How bad.
    pub severity: Severity,
    /// What, in words.
    pub message: String,
    /// In which project; none concerns the server.
    pub project: Option<ProjectId>,
    /// Path of what it is about, or empty.
    pub entity: String,
    /// What became of it.
    pub status: WarningStatus,
    /// How often it came.
    pub count: u32,
    /// When it came first.
    pub first_seen_at: Timestamp,
    /// When it came last, or when it changed.
    pub last_seen_at: Timestamp,
}
