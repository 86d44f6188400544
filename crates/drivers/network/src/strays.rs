//! What of this daemon's networks is on the host without a record that accounts for it: links, tables, chains, processes.
//!
//! It only looks. What it names was left by a crash that nobody cleaned up after, or made by a hand that used our names.

use crate::{NetworkDriver, blocking, bridge, dnsmasq, firewall, rules, ruleset::Table, views};
use karst_host::nft;
use karst_model::{Result, spec::NetworkSpec};
use serde_json::Value;
use std::collections::BTreeSet;

impl NetworkDriver {
    /// Names everything on the host that carries this daemon's mark and belongs to no recorded network, in words.
    ///
    /// # Errors
    /// Internal when the records, the links or the ruleset cannot be read.
    pub async fn strays(&self) -> Result<Vec<String>> {
        // Nothing is made or removed while it is looked at.
        let firewall = self.0.firewall.lock().await;
        let (paths, daemon) = (self.0.paths.clone(), self.0.daemon.clone());
        let (specs, mut found) = blocking(move || {
            let records = paths.records()?;
            let mut specs: Vec<NetworkSpec> = records.iter().map(|r| paths.read_spec(r)).collect();
            specs.iter_mut().try_for_each(|s| views::assign(&paths, s))?;
            let ids: BTreeSet<_> = records.iter().map(|r| r.id).collect();
            let mut found = vec![];
            for id in paths.ids()?.into_iter().filter(|id| !ids.contains(id)) {
                found.push(format!("state directory of network {id}, which is not recorded"));
            }
            found.extend(bridge::strays(&daemon, &records)?);
            found.extend(dnsmasq::strays(&paths, &ids)?);
            Ok((specs, found))
        })
        .await?;
        let wanted = rules::tables(firewall.logs(&self.0.daemon), &specs, true, &firewall.loose);
        found.extend(tables(&self.0.daemon, &wanted).await?);
        found.extend(firewall::stray_chains(&self.0.daemon, !specs.is_empty()).await?);
        drop(firewall);
        Ok(found)
    }
}

/// Tables of our name that no network wants, and chains, sets and maps in them that none does.
async fn tables(daemon: &str, wanted: &[Table]) -> Result<Vec<String>> {
    let name = rules::table_name(daemon);
    let mut found = vec![];
    let text = |v: &Value, key: &str| v[key].as_str().unwrap_or_default().to_owned();
    for object in nft::list_chains().await? {
        let table = &object["table"];
        if table["name"] != name.as_str() {
            continue;
        }
        let family = text(table, "family");
        let Some(wanted) = wanted.iter().find(|w| w.family == family && !w.is_empty()) else {
            found.push(format!("nft table {family} {name}"));
            continue;
        };
        for object in nft::list_table(&family, &name).await? {
            for (kind, known) in [
                ("chain", wanted.chains.keys().collect::<BTreeSet<_>>()),
                ("set", wanted.sets.keys().collect()),
                ("map", wanted.sets.keys().collect()),
            ] {
                let own = text(&object[kind], "name");
                if !own.is_empty() && !known.contains(&own) {
                    found.push(format!("nft {kind} {own} in the table {family} {name}"));
                }
            }
        }
    }
    Ok(found)
}
