//! Networks that were stopped while guests were on them. The bridge goes, the guests' interfaces stay as a cable does that was
//! pulled out: down, in no bridge, so that nothing of the host is reached over them. What was pulled is written down before, and
//! goes back when the network is made again, unless its guest has ended meanwhile: an interface is known by name and index, which
//! no other has after it.

use crate::{NetworkDriver, Paths, blocking, bridge::ignore_missing, record};
use karst_host::link;
use karst_model::{NetworkId, Result, network::ExternalInterface};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

const FILE: &str = "detached.json";

/// What a stopped network had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Detached {
    bridge: String,
    /// Names and indices of interfaces of guests.
    ports: BTreeMap<String, u32>,
}

type All = BTreeMap<NetworkId, Detached>;

fn read(paths: &Paths) -> Result<All> {
    Ok(record::read_json(&paths.0.join(FILE))?.unwrap_or_default())
}

fn write(paths: &Paths, all: &All) -> Result<()> {
    record::write_file(&paths.0.join(FILE), &serde_json::to_vec(all)?, 0o600, None, true)
}

/// Writes down the ports of guests on a network that is to be stopped, and takes them out.
fn detach(paths: &Paths, id: NetworkId) -> Result<()> {
    let Some(record) = paths.read(id)?.filter(|r| !r.removing) else { return Ok(()) };
    let Some(bridge) = link::get(&record.bridge)? else { return Ok(()) };
    let parsed: Vec<ExternalInterface<'_>> = record
        .spec
        .external_interfaces
        .iter()
        .map(|text| ExternalInterface::parse(text))
        .collect::<Result<_>>()?;
    let of_guests = |name: &str| !parsed.iter().any(|e| e.name == name);
    let all = link::list()?;
    let ports: Vec<_> = all.iter().filter(|l| l.master == Some(bridge.index) && of_guests(&l.name)).collect();
    if ports.is_empty() {
        return Ok(());
    }
    let mut noted = read(paths)?;
    let of =
        noted.entry(id).or_insert_with(|| Detached { bridge: record.bridge.clone(), ports: BTreeMap::new() });
    of.bridge.clone_from(&record.bridge);
    of.ports.extend(ports.iter().map(|l| (l.name.clone(), l.index)));
    write(paths, &noted)?;
    for port in ports {
        ignore_missing(link::set_up(&port.name, false))?;
        ignore_missing(link::set_master(&port.name, None))?;
    }
    Ok(())
}

/// Puts the ports of guests back that were taken out when the network was stopped.
pub(crate) fn attach(paths: &Paths, id: NetworkId, bridge: &str) -> Result<()> {
    let mut all = read(paths)?;
    let Some(kept) = all.remove(&id) else { return Ok(()) };
    for (name, index) in &kept.ports {
        if link::get(name)?.is_some_and(|l| l.index == *index && l.master.is_none()) {
            ignore_missing(link::set_master(name, Some(bridge)))?;
            ignore_missing(link::set_up(name, true))?;
        }
    }
    write(paths, &all)
}

/// Of a network that is gone nothing goes back.
pub(crate) fn forget(paths: &Paths, id: NetworkId) -> Result<()> {
    let mut all = read(paths)?;
    match all.remove(&id) {
        None => Ok(()),
        Some(_) => write(paths, &all),
    }
}

impl NetworkDriver {
    /// Takes a network from the host for a while: the interfaces of guests that run are put back when it is made again.
    /// Idempotent.
    ///
    /// # Errors
    /// Internal.
    pub async fn stop(&self, id: NetworkId) -> Result<()> {
        let paths = self.0.paths.clone();
        blocking(move || detach(&paths, id)).await?;
        self.take_down(id).await
    }

    /// Networks that were stopped while guests were on them, with what their bridges were called.
    ///
    /// # Errors
    /// Internal.
    pub async fn detached(&self) -> Result<BTreeMap<NetworkId, String>> {
        let paths = self.0.paths.clone();
        blocking(move || Ok(read(&paths)?.into_iter().map(|(id, of)| (id, of.bridge)).collect())).await
    }
}
