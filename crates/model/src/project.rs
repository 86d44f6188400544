//! Projects: the boundary between tenants.

use crate::{Config, Name, ProjectId};
use serde::{Deserialize, Serialize};

/// A project.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Project {
    /// Reference.
    pub id: ProjectId,
    /// Unique name.
    pub name: Name,
    /// User's text.
    #[serde(default)]
    pub description: String,
    /// As written.
    #[serde(default)]
    pub config: Config,
    /// Grows with each change.
    pub spec_version: u64,
}

/// The project that always exists.
pub const DEFAULT_PROJECT: &str = "default";
