//! Networks: of the default project, interfaces of the host, and those of a project that has its own.

use super::{Scenario, done};
use crate::World;
use karst_engine::{
    LiveOperation,
    network::{CreateNetwork, UpdateNetwork},
};
use karst_model::{Config, Result, network_life::NetworkBeginning, uplink::NetworkKind};

async fn network(w: &World, project: &str, name: &str) -> Result<LiveOperation> {
    Ok(w.engine.network_create(&w.admin, project, CreateNetwork::automatic(name)).await?.1)
}

/// A network that is the simulated host's one granted interface.
async fn uplink(w: &World) -> Result<LiveOperation> {
    let request = CreateNetwork {
        name: "lan".into(),
        kind: NetworkKind::Macvlan,
        config: Config::from([("parent".into(), "granted0".into())]),
        ..Default::default()
    };
    Ok(w.engine.network_create(&w.admin, "default", request).await?.1)
}

/// A project with networks of its own, and one of a name that the host has an interface of already.
async fn own(w: &World) -> Result<()> {
    let config = Config::from([("features.networks".into(), "true".into())]);
    w.engine.project_create(&w.admin, "team", "", config).await
}

async fn stopped(w: &World) -> Result<()> {
    done(w, network(w, "default", "net1").await).await?;
    done(w, w.engine.network_stop(&w.admin, "default", "net1").await).await
}

async fn defined(w: &World) -> Result<LiveOperation> {
    let request = CreateNetwork { beginning: NetworkBeginning::Defined, ..CreateNetwork::automatic("net1") };
    Ok(w.engine.network_create(&w.admin, "default", request).await?.1)
}

async fn update(w: &World, project: &str, name: &str, keys: &[(&str, &str)]) -> Result<LiveOperation> {
    let mut config = w.engine.network(&w.admin, project, name)?.config.clone();
    config.extend(keys.iter().map(|(k, v)| (k.to_string(), v.to_string())));
    let update = UpdateNetwork { description: String::new(), config, if_version: None };
    w.engine.network_update(&w.admin, project, name, update).await
}

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!("network-create", "automatic", |_w| Ok(()), |w| network(w, "default", "net1").await),
        scenario!("network-delete", "unused", |w| done(w, network(w, "default", "net1").await).await, |w| w
            .engine
            .network_delete(&w.admin, "default", "net1")
            .await),
        scenario!(
            "network-update",
            "another domain",
            |w| done(w, network(w, "default", "net1").await).await,
            |w| update(w, "default", "net1", &[("dns.domain", "example")]).await
        ),
        scenario!("network-update", "stopped", |w| done(w, network(w, "default", "net1").await).await, |w| w
            .engine
            .network_stop(&w.admin, "default", "net1")
            .await),
        scenario!("network-update", "started", |w| stopped(w).await, |w| w
            .engine
            .network_start(&w.admin, "default", "net1")
            .await),
        scenario!("network-create", "defined, not started", |_w| Ok(()), |w| defined(w).await),
        scenario!("network-delete", "of one that is stopped", |w| stopped(w).await, |w| w
            .engine
            .network_delete(&w.admin, "default", "net1")
            .await),
        scenario!("network-create", "interface of the host", |_w| Ok(()), |w| uplink(w).await),
        scenario!("network-delete", "interface of the host", |w| done(w, uplink(w).await).await, |w| w
            .engine
            .network_delete(&w.admin, "default", "lan")
            .await),
        scenario!("network-update", "MTU of an interface", |w| done(w, uplink(w).await).await, |w| update(
            w,
            "default",
            "lan",
            &[("mtu", "1400")]
        )
        .await),
        scenario!("network-create", "of a project, under a derived interface", |w| own(w).await, |w| {
            network(w, "team", "karstbr0").await
        }),
        scenario!(
            "network-delete",
            "of a project, under a derived interface",
            |w| {
                own(w).await?;
                done(w, network(w, "team", "karstbr0").await).await
            },
            |w| w.engine.network_delete(&w.admin, "team", "karstbr0").await
        ),
        scenario!(
            "network-update",
            "another name in a project",
            |w| {
                own(w).await?;
                done(w, network(w, "team", "net1").await).await
            },
            |w| w.engine.network_rename(&w.admin, "team", "net1", "net2").await
        ),
    ]
}
