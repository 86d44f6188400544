//! `/1.0/network-allocations`: which addresses of managed networks are given to what.

use crate::{
    app::Call,
    respond::{Reply, sync},
    wire,
};
use karst_model::Result;
use serde::Serialize;

/// An address and its user.
#[derive(Serialize)]
struct Allocation {
    /// With its prefix.
    addresses: String,
    used_by: String,
    #[serde(rename = "type")]
    kind: &'static str,
    hwaddr: String,
    nat: bool,
    network: String,
}

/// `GET /1.0/network-allocations`: what networks have themselves, forwards listen at, and guests were given.
///
/// # Errors
/// Those of the engine.
pub async fn list(call: Call) -> Result<Reply> {
    let engine = call.engine();
    let all_projects = call.query.flag("all-projects");
    let asked =
        engine.project(&call.context, call.project(), karst_model::access::Permission::ProjectView)?;
    let mut all = vec![];
    for network in engine.networks(&call.context, call.project())? {
        let project = engine.inner().project_name(Some(network.project));
        let name = network.name.to_string();
        let path = wire::path("networks", &name, &project);
        let nat = |v4: bool| {
            let key = if v4 { "ipv4.nat" } else { "ipv6.nat" };
            network.config.get(key).is_some_and(|v| karst_model::keys::parse_bool(key, v).unwrap_or(false))
        };
        for (key, v4) in [("ipv4.address", true), ("ipv6.address", false)] {
            let Some(address) = network.config.get(key).filter(|a| a.contains('/')) else { continue };
            all.push(Allocation {
                addresses: address.clone(),
                used_by: path.clone(),
                kind: "network",
                hwaddr: String::new(),
                nat: nat(v4),
                network: name.clone(),
            });
        }
        for forward in engine.forwards(&call.context, call.project(), &name).await? {
            let v4 = forward.listen_address.is_ipv4();
            all.push(Allocation {
                addresses: format!("{}/{}", forward.listen_address, if v4 { 32 } else { 128 }),
                used_by: format!("{path}/forwards/{}", forward.listen_address),
                kind: "network-forward",
                hwaddr: String::new(),
                nat: false,
                network: name.clone(),
            });
        }
        let owners: std::collections::HashMap<String, (String, bool)> = {
            let records = engine.inner().inventory.read();
            let instances = records.instances.values();
            let macs =
                instances.flat_map(|i| i.identities.values().filter_map(move |d| Some((d.mac.clone()?, i))));
            macs.map(|(mac, i)| {
                let project = records.projects.get(&i.project).map_or("", |p| &*p.name);
                (mac, (wire::path("instances", &i.name, project), i.project == asked.id))
            })
            .collect()
        };
        for lease in engine.network_leases(&call.context, call.project(), &name).await? {
            let Some((used_by, here)) = owners.get(&lease.mac) else { continue };
            if !here && !all_projects {
                continue;
            }
            let v4 = lease.address.is_ipv4();
            all.push(Allocation {
                addresses: format!("{}/{}", lease.address, if v4 { 32 } else { 128 }),
                used_by: used_by.clone(),
                kind: "instance",
                hwaddr: lease.mac,
                nat: nat(v4),
                network: name.clone(),
            });
        }
    }
    sync(&all)
}
