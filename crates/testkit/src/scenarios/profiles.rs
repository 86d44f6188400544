//! Changes of profiles, which are changes of all who have them.

use crate::World;
use karst_engine::{LiveOperation, tenancy::UpdateProfile};
use karst_model::{Config, Result};

/// The use case waits for its end; whoever walks over the saga wants its operation.
pub(super) async fn profile_update(w: &World) -> Result<LiveOperation> {
    let profile = w.engine.profile(&w.admin, "default", "default")?;
    let update = UpdateProfile {
        description: "changed".into(),
        config: Config::from([("limits.memory".into(), "64MiB".into())]),
        devices: profile.devices.clone(),
        if_version: None,
    };
    w.engine.profile_update_begin(&w.admin, "default", "default", update).await
}

/// The same with one more NIC for all.
pub(super) async fn profile_nic(w: &World) -> Result<LiveOperation> {
    let mut devices = w.engine.profile(&w.admin, "default", "default")?.devices.clone();
    devices.insert("eth1".into(), devices["eth0"].clone());
    if let Some(keys) = devices.get_mut("eth1") {
        keys.insert("name".into(), "eth1".into());
    }
    let update = UpdateProfile { devices, ..Default::default() };
    w.engine.profile_update_begin(&w.admin, "default", "default", update).await
}
