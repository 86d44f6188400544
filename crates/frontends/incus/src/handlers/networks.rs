//! `/1.0/networks`.

use super::list as respond_list;
use crate::{
    app::{Call, finished},
    fields::Fields,
    filter::Filter,
    respond::{Etag, Reply, created, empty, sync, sync_etag},
    wire::{
        self,
        misc::{AddressView, BridgeView, LeaseView, NetworkCounters, NetworkStateView, NetworkView},
    },
};
use karst_engine::network::{CreateNetwork, UpdateNetwork};
use karst_model::{Error, Result, network::Network, uplink::NetworkKind};
use serde_json::json;

const VIEW: &str = "network";
const READ_ONLY: &[&str] = &["name", "type", "used_by", "managed", "status", "locations", "project"];

fn project_of(call: &Call, network: &Network) -> String {
    call.engine().inner().project_name(Some(network.project))
}

/// `GET /1.0/networks`
///
/// # Errors
/// Those of the engine.
pub async fn list(call: Call) -> Result<Reply> {
    let recursion = call.query.recursion()?;
    let filter = Filter::parse(call.query.get("filter"))?;
    let all = call.engine().networks(&call.context, call.project())?;
    let projects: Vec<String> = all.iter().map(|n| project_of(&call, n)).collect();
    respond_list(
        recursion,
        &filter,
        all.iter().zip(&projects).map(|(n, project)| {
            (
                NetworkView::of(n, call.engine().network_used_by(&call.context, n), project),
                wire::path("networks", &n.name, project),
            )
        }),
    )
}

/// `GET /1.0/networks/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn get(call: Call) -> Result<Reply> {
    let network = call.engine().network(&call.context, call.project(), call.param(0))?;
    let project = project_of(&call, &network);
    let view = NetworkView::of(&network, call.engine().network_used_by(&call.context, &network), &project);
    sync_etag(&view, &Etag::of(VIEW, network.id.uuid(), network.spec_version))
}

/// `POST /1.0/networks`
///
/// # Errors
/// Those of the engine.
pub async fn create(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let name = f.need_text("name")?;
    let kind = NetworkKind::parse(&f.text("type")?.unwrap_or_default())?;
    let request = CreateNetwork {
        name,
        description: f.text("description")?.unwrap_or_default(),
        kind,
        config: f.config("config")?.unwrap_or_default(),
        any_name: false,
        beginning: Default::default(),
        interface: None,
    };
    f.finish(&[])?;
    let (name, operation) = call.engine().network_create(&call.context, call.project(), request).await?;
    finished(&operation).await?;
    created(&wire::path("networks", &name, call.project()))
}

/// `PUT` and `PATCH /1.0/networks/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn change(call: Call) -> Result<Reply> {
    let network = call.engine().network(&call.context, call.project(), call.param(0))?;
    let if_version = call.expected(VIEW, network.id.uuid(), network.spec_version)?;
    let patch = call.request.method() == hyper::Method::PATCH;
    let (call, mut f) = call.fields().await?;
    let mut request = UpdateNetwork {
        description: f
            .text("description")?
            .unwrap_or_else(|| if patch { network.description.clone() } else { String::new() }),
        config: if patch { network.config.clone() } else { Default::default() },
        if_version: if patch { if_version.or(Some(network.spec_version)) } else { if_version },
    };
    request.config.extend(f.config("config")?.unwrap_or_default());
    f.finish(READ_ONLY)?;
    let operation =
        call.engine().network_update(&call.context, call.project(), call.param(0), request).await?;
    finished(&operation).await?;
    Ok(empty())
}

/// `POST /1.0/networks/{name}`: rename.
///
/// # Errors
/// Those of the engine.
pub async fn rename(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let new = f.need_text("name")?;
    f.finish(&[])?;
    let operation = call.engine().network_rename(&call.context, call.project(), call.param(0), &new).await?;
    finished(&operation).await?;
    created(&wire::path("networks", &new, call.project()))
}

/// `DELETE /1.0/networks/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn delete(call: Call) -> Result<Reply> {
    let operation = call.engine().network_delete(&call.context, call.project(), call.param(0)).await?;
    finished(&operation).await?;
    Ok(empty())
}

/// `GET /1.0/karst/networks/{name}`: whether a network is there and begins with its host: `{"name", "project", "active",
/// "autostart", "persistent", "running"}`. `running` is the configuration that it runs by, where its definition says another, else
/// null. One that is not persistent goes when it is stopped.
///
/// # Errors
/// Those of the engine.
pub async fn life(call: Call) -> Result<Reply> {
    let network = call.engine().network(&call.context, call.project(), call.param(0))?;
    sync(&json!({
        "name": &*network.name,
        "project": project_of(&call, &network),
        "active": network.is_active(),
        "autostart": network.autostart(),
        "persistent": !network.life.transient,
        "running": network.life.running,
    }))
}

/// `PUT /1.0/karst/networks/{name}`: `{"active", "autostart"}`: starts or stops it, and says whether it begins with its host. What is
/// not said stays.
///
/// # Errors
/// Those of the engine.
pub async fn set_life(call: Call) -> Result<Reply> {
    let network = call.engine().network(&call.context, call.project(), call.param(0))?;
    let (call, mut f) = call.fields().await?;
    let said = |f: &mut Fields, name: &'static str| -> Result<Option<bool>> {
        let there = f.has(name);
        Ok(Some(f.flag(name)?).filter(|_| there))
    };
    let (active, autostart) = (said(&mut f, "active")?, said(&mut f, "autostart")?);
    f.finish(&[])?;
    if active.is_none() && autostart.is_none() {
        return Err(Error::invalid("active", "say active or autostart: true or false"));
    }
    let (engine, context, project, name) = (call.engine(), &call.context, call.project(), call.param(0));
    engine.network_demand_change(context, project)?;
    if let Some(autostart) = autostart.filter(|wanted| *wanted != network.autostart()) {
        finished(&engine.network_set_autostart(context, project, name, autostart).await?).await?;
    }
    match active.filter(|wanted| *wanted != network.is_active()) {
        Some(true) => finished(&engine.network_start(context, project, name).await?).await?,
        Some(false) => finished(&engine.network_stop(context, project, name).await?).await?,
        None => {}
    }
    Ok(empty())
}

/// `GET /1.0/networks/{name}/state`
///
/// # Errors
/// Those of the engine.
pub async fn state(call: Call) -> Result<Reply> {
    let state = call.engine().network_state(&call.context, call.project(), call.param(0)).await?;
    let network = call.engine().network(&call.context, call.project(), call.param(0))?;
    let bridge = (network.kind == NetworkKind::Bridge).then(|| network.bridge()).transpose()?;
    let [bytes_received, bytes_sent, packets_received, packets_sent] = state.counters;
    sync(&NetworkStateView {
        addresses: state.addresses.iter().map(AddressView::of).collect(),
        counters: NetworkCounters { bytes_received, bytes_sent, packets_received, packets_sent },
        bridge: bridge.map(|spec| BridgeView {
            id: format!("8000.{}", state.mac.replace(':', "")),
            stp: spec.stp == Some(true),
            // Hundredths of a second, as the kernel says it.
            forward_delay: spec.forward_delay.unwrap_or(0) * 100,
            vlan_default: 0,
            vlan_filtering: false,
            upper_devices: state.ports,
        }),
        hwaddr: state.mac,
        mtu: state.mtu,
        state: if state.up { "up" } else { "down" },
        kind: "broadcast",
        bond: (),
        vlan: (),
        ovn: (),
    })
}

/// `GET /1.0/networks/{name}/leases`
///
/// # Errors
/// Those of the engine.
pub async fn leases(call: Call) -> Result<Reply> {
    let network = call.engine().network(&call.context, call.project(), call.param(0))?;
    let project = project_of(&call, &network);
    let mut all = vec![];
    let own =
        ["ipv4.address", "ipv6.address"].into_iter().filter_map(|k| network.config.get(k)?.split_once('/'));
    for address in own {
        all.push(LeaseView {
            hostname: format!("{}.gw", &*network.name),
            hwaddr: String::new(),
            address: address.0.to_owned(),
            kind: "gateway",
            location: "",
            project: project.clone(),
        });
    }
    for lease in call.engine().network_leases(&call.context, call.project(), call.param(0)).await? {
        all.push(LeaseView {
            hostname: lease.hostname,
            hwaddr: lease.mac,
            address: lease.address.to_string(),
            kind: if lease.fixed { "static" } else { "dynamic" },
            location: wire::NOWHERE,
            project: project.clone(),
        });
    }
    sync(&all)
}
