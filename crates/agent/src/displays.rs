//! Viewers of the displays of virtual machines, and the passwords that they are asked for.

use karst_model::{InstanceId, display::DisplayGuard};
use serde::{Deserialize, Serialize};

/// What viewers of a running machine's display have to know from now on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DisplayGuardSet {
    /// Whose.
    pub instance: InstanceId,
    /// `None`: there is no password any more. Who is just being asked for one does not get in then.
    pub guard: Option<DisplayGuard>,
}

/// A channel of a viewer that speaks SPICE.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpiceChannel {
    /// Whose display.
    pub instance: InstanceId,
    /// What it has to know; `None`: nothing is asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guard: Option<DisplayGuard>,
}

/// A viewer that has to know the password.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DisplayGuarded {
    /// Whose display.
    pub instance: InstanceId,
    /// What it has to know.
    pub guard: DisplayGuard,
}
