//! Snapshots.

use super::time;
use jiff::Timestamp;
use karst_engine::Records;
use karst_model::{
    Config,
    device::Devices,
    instance::InstanceKind,
    snapshot::{Snapshot, VolumeSnapshot},
};
use serde::Serialize;

/// A snapshot of an instance.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct SnapshotView<'a> {
    pub architecture: String,
    pub config: &'a Config,
    pub created_at: Timestamp,
    pub devices: &'a Devices,
    pub ephemeral: bool,
    pub expanded_config: Config,
    pub expanded_devices: Devices,
    #[serde(serialize_with = "time")]
    pub expires_at: Option<Timestamp>,
    #[serde(serialize_with = "time")]
    pub last_used_at: Option<Timestamp>,
    pub name: &'a str,
    pub profiles: Vec<String>,
    pub stateful: bool,
    /// Not measured: what is shared with other snapshots is nobody's alone.
    pub size: i64,
}

impl<'a> SnapshotView<'a> {
    /// Of a record, with the profiles as they are now.
    pub fn of(records: &Records, snapshot: &'a Snapshot) -> Self {
        let profiles = || snapshot.profiles.iter().filter_map(|p| records.profiles.get(p));
        let instance = records.instances.get(&snapshot.instance);
        let (expanded_config, expanded_devices) = karst_model::profile::expand(
            instance.map_or(InstanceKind::Container, |i| i.kind),
            profiles().map(|p| (&p.config, &p.devices)),
            (&snapshot.config, &snapshot.devices),
        );
        Self {
            architecture: instance.map(|i| i.architecture.clone()).unwrap_or_default(),
            config: &snapshot.config,
            created_at: snapshot.created_at,
            devices: &snapshot.devices,
            ephemeral: snapshot.ephemeral,
            expanded_config,
            expanded_devices,
            expires_at: snapshot.expires_at,
            last_used_at: None,
            name: &snapshot.name,
            profiles: profiles().map(|p| p.name.to_string()).collect(),
            stateful: snapshot.stateful,
            size: -1,
        }
    }
}

/// A snapshot of a custom volume.
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct VolumeSnapshotView<'a> {
    pub config: Config,
    pub description: &'a str,
    #[serde(serialize_with = "time")]
    pub expires_at: Option<Timestamp>,
    /// Its name; in lists `VOLUME/SNAPSHOT`.
    pub name: String,
    pub content_type: &'static str,
    pub created_at: Timestamp,
}

impl<'a> VolumeSnapshotView<'a> {
    /// Of a record; `volume` is the name of the volume where the view is to name it.
    pub fn of(records: &Records, snapshot: &'a VolumeSnapshot, volume: Option<&str>) -> Self {
        let mut config = snapshot.config.clone();
        if let Some(size) = snapshot.size {
            config.entry("size".into()).or_insert_with(|| size.to_string());
        }
        Self {
            config,
            description: &snapshot.description,
            expires_at: snapshot.expires_at,
            name: match volume {
                Some(volume) => format!("{volume}/{}", snapshot.name),
                None => snapshot.name.to_string(),
            },
            content_type: records.volumes.get(&snapshot.volume).map_or("filesystem", |v| v.content.as_str()),
            created_at: snapshot.created_at,
        }
    }
}
