//! Profiles: configuration and devices shared by instances.

use crate::{Config, Name, ProfileId, ProjectId, device::Devices, instance::InstanceKind};
use serde::{Deserialize, Serialize};

/// A profile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// Reference.
    pub id: ProfileId,
    /// Project that owns it.
    pub project: ProjectId,
    /// Unique in its project.
    pub name: Name,
    /// User's text.
    #[serde(default)]
    pub description: String,
    /// As written.
    #[serde(default)]
    pub config: Config,
    /// As written.
    #[serde(default)]
    pub devices: Devices,
    /// Grows with each change.
    pub spec_version: u64,
}

/// Expands configuration and devices: profiles in order, then the instance's own; a device `type=none` removes one. A virtual
/// machine's devices are what its preset makes of them.
pub fn expand<'a>(
    kind: InstanceKind,
    profiles: impl IntoIterator<Item = (&'a Config, &'a Devices)>,
    own: (&'a Config, &'a Devices),
) -> (Config, Devices) {
    let mut config = Config::new();
    let mut devices = Devices::new();
    for (c, d) in profiles.into_iter().chain([own]) {
        config.extend(c.iter().map(|(k, v)| (k.clone(), v.clone())));
        devices.extend(d.iter().map(|(k, v)| (k.clone(), v.clone())));
    }
    devices.retain(|_, keys| keys.get("type").map(String::as_str) != Some("none"));
    if kind == InstanceKind::VirtualMachine {
        crate::preset::fill(&config, &mut devices);
    }
    (config, devices)
}
