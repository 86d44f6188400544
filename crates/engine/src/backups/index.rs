//! `index.yaml`: what a backup says of itself, in Incus' words; written and read.

use crate::{
    Records,
    compute::templates,
    snapshots::{Found, Row2},
};
use jiff::Timestamp;
use karst_model::{
    Config, Error, Result,
    device::Devices,
    instance::{Instance, InstanceKind},
    storage::Volume,
    template::write_rules,
};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Snapshots that are read; more is no backup that anybody made.
const MAX_SNAPSHOTS: usize = 1000;
/// How Incus writes "never".
const NEVER: &str = "0001-01-01T00:00:00Z";

fn time(t: Option<Timestamp>) -> String {
    t.map_or_else(|| NEVER.to_owned(), |t| t.to_string())
}

/// `metadata.yaml` of an instance, and its templates.
pub(crate) fn metadata(records: &Records, instance: &Instance) -> (Value, BTreeMap<String, String>) {
    let kept = templates::metadata(records, instance);
    let written = json!({
        "architecture": kept.architecture,
        "creation_date": instance.created_at.as_second(),
        "expiry_date": 0,
        "properties": kept.properties,
        "templates": write_rules(&kept.templates.rules),
    });
    (written, kept.templates.files)
}

/// With what the platform knows under it, as Incus keeps it there.
fn with_volatile(instance: &Instance, config: &Config, devices: &Devices) -> Config {
    let mut all = Config::new();
    // What only the run has is none of the backup's.
    for (name, identity) in instance.identities.iter().filter(|(name, _)| devices.contains_key(*name)) {
        if let Some(mac) = &identity.mac {
            all.insert(format!("volatile.{name}.hwaddr"), mac.clone());
        }
    }
    if instance.kind == InstanceKind::Container {
        // Owners are written as the guest sees them.
        all.insert("volatile.last_state.idmap".into(), "[]".into());
    }
    all.insert("volatile.last_state.power".into(), "STOPPED".into());
    for source in [&instance.image_properties, &instance.volatile, config] {
        all.extend(source.iter().map(|(k, v)| (k.clone(), v.clone())));
    }
    all
}

fn content(volume: &Volume) -> &'static str {
    volume.content.as_str()
}

fn volume_config(volume: &Volume, size: Option<karst_model::ByteSize>) -> Config {
    let mut config = volume.config.clone();
    if let Some(size) = size {
        config.entry("size".into()).or_insert_with(|| size.bytes().to_string());
    }
    config
}

/// The index of a backup with these snapshots.
pub(super) fn write(records: &Records, found: &Found, snapshots: &[Row2]) -> Value {
    let (volume, kind, name) = match found {
        Found::Instance(i) => (records.volumes.get(&i.root), i.kind.as_str(), i.name.to_string()),
        Found::Volume(v) => (records.volumes.get(&v.id), "custom", v.name.clone()),
    };
    let pool = volume.and_then(|v| records.pools.get(&v.pool));
    let pool_name = pool.map(|p| p.name.to_string()).unwrap_or_default();
    let driver = pool.map(|p| p.kind.as_str()).unwrap_or_default();
    let project = |id| records.projects.get(&id).map(|p| p.name.to_string()).unwrap_or_default();
    let mut config = serde_json::Map::new();
    if let Some(volume) = volume {
        config.insert(
            "volume".into(),
            json!({
                "config": volume_config(volume, volume.size),
                "description": volume.description,
                "name": name,
                "type": kind,
                "used_by": [],
                "location": "none",
                "content_type": content(volume),
                "project": project(volume.project),
                "created_at": volume.created_at.to_string(),
            }),
        );
        let all: Vec<Value> = snapshots
            .iter()
            .map(|s| {
                let (description, size, created_at) = match s {
                    Row2::Instance(s) => (String::new(), None, s.created_at),
                    Row2::Volume(s) => (s.description.clone(), s.size, s.created_at),
                };
                json!({
                    "name": s.name(),
                    "description": description,
                    "expires_at": time(s.expires_at()),
                    "config": volume_config(volume, size),
                    "content_type": content(volume),
                    "created_at": created_at.to_string(),
                })
            })
            .collect();
        config.insert("volume_snapshots".into(), all.into());
    }
    if let Found::Instance(i) = found {
        let profiles = |ids: &[karst_model::ProfileId]| -> Vec<String> {
            ids.iter().filter_map(|id| records.profiles.get(id)).map(|p| p.name.to_string()).collect()
        };
        let (expanded_config, expanded_devices) = records.expanded(i);
        config.insert(
            "container".into(),
            json!({
                "name": name,
                "type": kind,
                "architecture": i.architecture,
                "config": with_volatile(i, &i.config, &expanded_devices),
                "devices": i.devices,
                "ephemeral": i.ephemeral,
                "profiles": profiles(&i.profiles),
                "stateful": false,
                "description": i.description,
                "created_at": i.created_at.to_string(),
                "last_used_at": time(i.last_used_at),
                "expanded_config": with_volatile(i, &expanded_config, &expanded_devices),
                "expanded_devices": expanded_devices,
                "status": "Stopped",
                "status_code": 102,
                "location": "none",
                "project": project(i.project),
            }),
        );
        let all: Vec<Value> = snapshots
            .iter()
            .filter_map(|s| match s {
                Row2::Instance(s) => Some(json!({
                    "name": &*s.name,
                    "architecture": i.architecture,
                    "config": with_volatile(i, &s.config, &expanded_devices),
                    "devices": s.devices,
                    "ephemeral": s.ephemeral,
                    "profiles": profiles(&s.profiles),
                    "stateful": false,
                    "created_at": s.created_at.to_string(),
                    "expires_at": time(s.expires_at),
                    "last_used_at": NEVER,
                    "size": -1,
                })),
                Row2::Volume(_) => None,
            })
            .collect();
        config.insert("snapshots".into(), all.into());
        config.insert(
            "pool".into(),
            json!({
                "name": pool_name,
                "driver": driver,
                "config": {},
                "description": "",
                "used_by": [],
                "status": "Created",
                "locations": ["none"],
            }),
        );
        let all: Vec<Value> = i
            .profiles
            .iter()
            .filter_map(|id| records.profiles.get(id))
            .map(|p| {
                json!({
                    "name": &*p.name,
                    "description": p.description,
                    "config": p.config,
                    "devices": p.devices,
                    "used_by": [],
                    "project": project(p.project),
                })
            })
            .collect();
        config.insert("profiles".into(), all.into());
    }
    json!({
        "name": name,
        "backend": driver,
        "pool": pool_name,
        "snapshots": snapshots.iter().map(Row2::name).collect::<Vec<_>>(),
        "optimized": false,
        "optimized_header": false,
        "type": kind,
        "config": config,
    })
}

/// What a foreign index says.
#[derive(Debug, Deserialize)]
pub(super) struct Index {
    #[serde(default)]
    pub name: String,
    #[serde(default)]
    pub snapshots: Option<Vec<String>>,
    #[serde(default)]
    pub optimized: Option<bool>,
    #[serde(default, rename = "type")]
    pub kind: String,
    #[serde(default)]
    pub config: Option<Details>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Details {
    #[serde(default, alias = "instance")]
    pub container: Option<Described>,
    #[serde(default)]
    pub snapshots: Option<Vec<Described>>,
    #[serde(default)]
    pub volume: Option<Described>,
    #[serde(default)]
    pub volume_snapshots: Option<Vec<Described>>,
}

/// An instance, a volume or a snapshot of one.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Described {
    #[serde(default)]
    pub name: String,
    #[serde(default)]
    pub architecture: String,
    #[serde(default)]
    pub description: String,
    #[serde(default)]
    config: Option<BTreeMap<String, Value>>,
    #[serde(default)]
    devices: Option<BTreeMap<String, BTreeMap<String, Value>>>,
    #[serde(default)]
    pub profiles: Option<Vec<String>>,
    #[serde(default)]
    pub ephemeral: bool,
    #[serde(default)]
    pub content_type: String,
    #[serde(default)]
    created_at: Option<String>,
    #[serde(default)]
    expires_at: Option<String>,
}

fn text(field: &str, value: Value) -> Result<String> {
    match value {
        Value::String(s) => Ok(s),
        Value::Bool(b) => Ok(b.to_string()),
        Value::Number(n) => Ok(n.to_string()),
        Value::Null => Ok(String::new()),
        _ => Err(Error::invalid(field, "is not a text in the backup")),
    }
}

fn texts(field: &str, map: BTreeMap<String, Value>) -> Result<Config> {
    map.into_iter().map(|(k, v)| Ok((k.clone(), text(&format!("{field}.{k}"), v)?))).collect()
}

fn parse_time(text: Option<&str>) -> Option<Timestamp> {
    // Go's zero time means "never", and is before every time that means something.
    text.and_then(|t| t.parse::<Timestamp>().ok()).filter(|t| t.as_second() > 0)
}

impl Described {
    /// The configuration as written, and the `volatile.*` and `image.*` keys apart from it.
    pub(super) fn config(&self) -> Result<(Config, Config)> {
        let all = texts("config", self.config.clone().unwrap_or_default())?;
        Ok(all.into_iter().partition(|(k, _)| !k.starts_with("volatile.") && !k.starts_with("image.")))
    }

    pub(super) fn devices(&self) -> Result<Devices> {
        let all = self.devices.clone().unwrap_or_default();
        all.into_iter().map(|(k, v)| Ok((k.clone(), texts(&format!("devices.{k}"), v)?))).collect()
    }

    pub(super) fn created_at(&self) -> Option<Timestamp> {
        parse_time(self.created_at.as_deref())
    }

    pub(super) fn expires_at(&self) -> Option<Timestamp> {
        parse_time(self.expires_at.as_deref())
    }
}

/// Reads an index.
///
/// # Errors
/// Invalid or unsupported, saying what about the backup.
pub(super) fn read(value: Value) -> Result<Index> {
    let index: Index = serde_json::from_value(value).map_err(|e| {
        Error::invalid("backup", format!("index.yaml of the backup is not as Incus writes it: {e}"))
    })?;
    if index.optimized == Some(true) {
        return Err(Error::unsupported(
            "the backup holds a stream of a storage driver; export it again without --optimized-storage",
        )
        .at("backup"));
    }
    if index.config.is_none() {
        return Err(Error::invalid("backup", "index.yaml of the backup has no configuration"));
    }
    if index.snapshots.as_ref().is_some_and(|s| s.len() > MAX_SNAPSHOTS) {
        return Err(Error::invalid("backup", format!("the backup has more than {MAX_SNAPSHOTS} snapshots")));
    }
    Ok(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_incus_writes_is_read_and_the_rest_refused() {
        let index = json!({
            "name": "i1", "type": "container", "snapshots": ["s0"], "optimized": false,
            "config": {
                "container": {
                    "name": "i1",
                    "config": {"user.x": "y", "limits.cpu": 2, "volatile.eth0.hwaddr": "00:16:3e:00:00:01", "image.os": "x"},
                    "devices": {"root": {"type": "disk", "path": "/", "pool": "p"}},
                },
                "snapshots": [{"name": "s0", "created_at": "2026-11-21T17:18:41.304361404Z", "expires_at": NEVER}],
            },
        });
        let read_index = read(index.clone()).unwrap();
        let details = read_index.config.unwrap();
        let (config, own) = details.container.unwrap().config().unwrap();
        assert_eq!(config, Config::from([("limits.cpu".into(), "2".into()), ("user.x".into(), "y".into())]));
        assert!(own.contains_key("volatile.eth0.hwaddr") && own.contains_key("image.os"));
        let snapshot = &details.snapshots.unwrap()[0];
        assert!(snapshot.created_at().is_some() && snapshot.expires_at().is_none());
        for (change, word) in [
            (json!({"optimized": true}), "--optimized-storage"),
            (json!({"config": null}), "no configuration"),
            (json!({"config": {"container": {"config": "x"}}}), "not as Incus writes it"),
            (json!({"snapshots": vec!["x"; 1001]}), "more than 1000"),
        ] {
            let mut wrong = index.clone();
            wrong.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            let e = read(wrong).unwrap_err();
            assert!(e.message.contains(word) && e.field.as_deref() == Some("backup"), "{e}");
        }
    }
}
