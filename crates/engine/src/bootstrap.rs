//! What exists from the first start on: this node and the default project with its profile; and, once, the default pool
//! and network.

use crate::{
    Engine, EngineInner, context::Context, db::Tx, inventory::INCARNATION_KEY, network::CreateNetwork,
    storage::CreatePool, tenancy::UpdateProfile,
};
use karst_model::{
    Config, Error, Name, NodeId, ProfileId, ProjectId, Result,
    device::Devices,
    node::Node,
    profile::Profile,
    project::{DEFAULT_PROJECT, Project},
};
use std::{collections::BTreeMap, sync::Arc};

/// Marks a store in which [`Engine::bootstrap`] has run: what an administrator deletes later stays deleted.
const MARK: &str = "/karst/v1/meta/bootstrapped";

/// What is not recorded yet is; a host that is called otherwise now gets that name, unless another one has it.
async fn ensure_nodes(inner: &Arc<EngineInner>, nodes: &[(NodeId, String)]) -> Result<()> {
    inner
        .transact(|records, tx: &mut Tx| {
            for (id, name) in nodes {
                let Some(row) = records.nodes.get(id) else {
                    tx.create(&Node { id: *id, name: Name::parse("node", name)?, facts: None, starting: None });
                    continue;
                };
                if row.name.as_str() == name.as_str() {
                    continue;
                }
                if records.nodes.values().any(|n| n.name.as_str() == name.as_str()) {
                    tracing::warn!(node = %id, name, stays = %row.name, "another host has the name that this one has now");
                    continue;
                }
                tracing::info!(node = %id, name, before = %row.name, "this host has another name now");
                tx.replace(row, &Node { name: Name::parse("node", name)?, ..row.value.clone() });
            }
            Ok(())
        })
        .await
}

/// Nodes, default project, default profile; idempotent.
pub(crate) async fn ensure_base(inner: &Arc<EngineInner>, nodes: &[(NodeId, String)]) -> Result<()> {
    // A thousand simulated hosts are more than one transaction takes.
    for some in nodes.chunks(100) {
        ensure_nodes(inner, some).await?;
    }
    inner
        .transact(|records, tx: &mut Tx| {
            if records.incarnation == 0 {
                tx.put_raw(INCARNATION_KEY, "1".into());
            }
            if records.project(DEFAULT_PROJECT).is_err() {
                let project = ProjectId(inner.env.uuid());
                let config: Config = karst_model::project::new_features()
                    .map(|(key, _)| (key.to_owned(), "true".to_owned()))
                    .collect();
                tx.take_name("projects", "", DEFAULT_PROJECT, &project.to_string());
                tx.create(&Project {
                    id: project,
                    name: Name::parse("name", DEFAULT_PROJECT)?,
                    description: "Default Karst project".into(),
                    config,
                    spec_version: 1,
                });
                let profile = ProfileId(inner.env.uuid());
                tx.take_name("profiles", &project.to_string(), "default", &profile.to_string());
                tx.create(&Profile {
                    id: profile,
                    project,
                    name: Name::parse("name", "default")?,
                    description: "Default Karst profile".into(),
                    config: Config::new(),
                    devices: Devices::new(),
                    spec_version: 1,
                });
            }
            Ok(())
        })
        .await
}

impl Engine {
    /// On the first start: a `default` pool, a managed network (`karstbr0` unless taken, a free subnet found by itself)
    /// and both in the `default` profile. Later starts change nothing. A host that has pools already has lost its database:
    /// they are taken over as they are.
    ///
    /// # Errors
    /// Those of the host. What was made until then stays and the next start goes on.
    pub async fn bootstrap(&self) -> Result<()> {
        let inner = self.inner();
        if inner.db.store().get(MARK).await?.kv.is_some() {
            return Ok(());
        }
        let cx = Context::system();
        self.adopt_pools(&cx).await?;
        if inner.inventory.read().pool("default").is_err() {
            let operation = self
                .pool_create(
                    &cx,
                    CreatePool { name: "default".into(), driver: "dir".into(), ..Default::default() },
                )
                .await?;
            succeeded(&*operation.ended().await)?;
        }
        let network = {
            let records = inner.inventory.read();
            let mut shared = records.networks.values().filter(|n| records.owner_of(n.project).is_none());
            shared.next().map(|n| n.name.to_string())
        };
        let network = match network {
            Some(name) => name,
            None => {
                let (name, operation) =
                    self.network_create(&cx, DEFAULT_PROJECT, CreateNetwork::automatic("karstbr0")).await?;
                succeeded(&*operation.ended().await)?;
                name
            }
        };
        let profile = self.profile(&cx, DEFAULT_PROJECT, "default")?;
        if profile.devices.is_empty() {
            let device = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
                pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
            };
            let devices = Devices::from([
                ("root".to_owned(), device(&[("type", "disk"), ("path", "/"), ("pool", "default")])),
                ("eth0".to_owned(), device(&[("type", "nic"), ("network", &network), ("name", "eth0")])),
            ]);
            let update = UpdateProfile {
                description: profile.description.clone(),
                config: profile.config.clone(),
                devices,
                if_version: Some(profile.spec_version),
            };
            self.profile_update(&cx, DEFAULT_PROJECT, "default", update).await?;
        }
        let mut tx = Tx::default();
        tx.put_raw(MARK, "1".into());
        // A plain put without conditions cannot be refused.
        let _ = inner.db.commit(tx).await?;
        Ok(())
    }
}

fn succeeded(operation: &karst_model::operation::Operation) -> Result<()> {
    match &operation.error {
        None => Ok(()),
        Some(e) => Err(Error::clone(e)),
    }
}
