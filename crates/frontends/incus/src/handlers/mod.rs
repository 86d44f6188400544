//! Handlers of the API's paths: each reads its request, calls one use case of the engine and writes its answer.

pub mod access;
pub mod allocations;
pub mod audit;
pub mod backups;
pub mod certificates;
pub mod debug;
pub mod displays;
pub mod events;
pub mod exec;
pub mod files;
pub mod firewall;
pub mod images;
pub mod instances;
pub mod karst;
pub mod layers;
pub mod libvirt;
pub mod logs;
pub mod metadata;
pub mod metrics;
pub mod networks;
pub mod operations;
pub mod profiles;
pub mod projects;
pub mod publish;
pub mod recover;
pub mod registries;
pub mod resources;
pub mod secrets;
pub mod server;
pub mod snapshots;
mod spice;
pub mod storage;
pub mod tokens;
pub mod volumes;
pub mod warnings;

use crate::{
    filter::Filter,
    respond::{Reply, sync, sync_raw},
};
use karst_model::Result;
use serde::Serialize;

/// A list: paths without recursion, whole objects with it; `filter` looks at the whole objects either way.
///
/// # Errors
/// Internal, when a value cannot be encoded.
pub(crate) fn list<T: Serialize>(
    recursion: u8,
    filter: &Filter,
    items: impl Iterator<Item = (T, String)>,
) -> Result<Reply> {
    if recursion == 0 && filter.accepts_all() {
        return sync(&items.map(|(_, path)| path).collect::<Vec<_>>());
    }
    if filter.accepts_all() {
        return sync(&items.map(|(view, _)| view).collect::<Vec<_>>());
    }
    let mut found = vec![];
    for (view, path) in items {
        let value = serde_json::to_value(&view)?;
        if filter.accepts(&value) {
            found.push(if recursion == 0 { path.into() } else { value });
        }
    }
    sync(&found)
}

/// An array of values that are JSON already.
pub(crate) fn array(items: &[impl AsRef<[u8]>]) -> Reply {
    let mut body = Vec::with_capacity(items.iter().map(|i| i.as_ref().len() + 1).sum::<usize>() + 2);
    body.push(b'[');
    for (n, item) in items.iter().enumerate() {
        if n > 0 {
            body.push(b',');
        }
        body.extend_from_slice(item.as_ref());
    }
    body.push(b']');
    sync_raw(&body)
}
