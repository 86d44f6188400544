//! Networks that are started and stopped, begin with their host or not, and are defined otherwise than they run. Every change is
//! one of [`NetworkUpdate`]: what the record says is what the host has, also after a crash anywhere in between.

use super::{
    NetworkUpdate, NetworkUpdatePlan, UpdateNetwork, demand_fitting, demand_free_subnet, lock,
    own::demand_reach,
};
use crate::{
    Engine, EngineInner, Records, Row,
    compute::{expand::ParsedDevices, nics::network_of},
    context::Context,
    db::Tx,
    explain::unname_guests,
    firewall,
    operations::{LiveOperation, NewOperation},
    saga::{StepContext, runner},
};
use karst_model::{
    Config, Error, NodeId, ProjectId, Result,
    network::{BridgeSpec, Network},
    project::Project,
    spec::GuestSpec,
    uplink::{NetworkForm, NetworkKind},
};
use std::collections::BTreeSet;

/// New configurations of a network's sides; `None` stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetworkSides {
    /// Its definition.
    pub defined: Option<Config>,
    /// What it runs by.
    pub running: Option<Config>,
    /// `spec_version` that was read.
    pub if_version: Option<u64>,
}

/// A configuration as it is kept: what is empty is not said.
pub(super) fn said(config: &Config) -> Config {
    config.iter().filter(|(_, v)| !v.is_empty()).map(|(k, v)| (k.clone(), v.clone())).collect()
}

/// Makes a bridge on its host what its record says: there, or not.
pub(super) async fn put(cx: &StepContext, node: NodeId, network: &Network) -> Result<()> {
    let _ordered = cx.engine.network_order(network.id).await;
    if !network.is_active() {
        return cx.agent(node)?.network_stop(&cx.mutate(super::CALL), network.id).await;
    }
    let spec = {
        let records = cx.engine.inventory.read();
        let hosts = cx.engine.hosts_on(&records, network, &BTreeSet::new());
        cx.engine.network_spec_of(&records, network, hosts)?
    };
    cx.agent(node)?.network_ensure(&cx.mutate(super::CALL), spec).await
}

/// What listeners are told of a change; `defined`: the definition was given anew.
pub(super) fn told(before: &Network, after: &Network, defined: bool) -> &'static str {
    match (before.is_active(), after.is_active()) {
        _ if before.name != after.name => "network-renamed",
        (false, true) => "network-started",
        (true, false) => "network-stopped",
        _ if defined => "network-defined",
        _ if after.life.transient && !before.life.transient => "network-undefined",
        _ => "network-updated",
    }
}

fn not_active(name: &str) -> Error {
    Error::conflict(format!("network {name:?} is not active; start it first: karst network start {name}"))
}

/// A NIC that comes while its guest runs comes onto a network that is there.
///
/// # Errors
/// Conflict, naming the network and the key.
pub(crate) fn demand_active_for(records: &Records, before: &GuestSpec, after: &GuestSpec) -> Result<()> {
    for nic in after.nics.iter().filter(|n| !before.nics.iter().any(|b| b.link == n.link)) {
        let network = nic.network().and_then(|id| records.networks.get(&id));
        if let Some(network) = network.filter(|n| !n.is_active()) {
            return Err(not_active(&network.name).at(format!("devices.{}.network", nic.name)));
        }
    }
    Ok(())
}

/// Every network that a guest is about to come onto is there.
///
/// # Errors
/// Conflict, naming the network and the key; those of the NICs.
pub(crate) fn demand_active(records: &Records, project: ProjectId, parsed: &ParsedDevices) -> Result<()> {
    for (device, nic) in &parsed.nics {
        if let Some((named, network)) = network_of(records, project, device, nic)?
            && !network.is_active()
        {
            let key = if named == &*network.name { "network" } else { "parent" };
            return Err(not_active(&network.name).at(format!("devices.{device}.{key}")));
        }
    }
    Ok(())
}

impl EngineInner {
    /// A network as it is to be fits what there is, on both sides where they differ: other networks, its guests, its forwards.
    pub(super) fn demand_sound(
        &self,
        records: &Records,
        tx: &mut Tx,
        context: &Context,
        row: &Row<Network>,
        after: &Network,
    ) -> Result<()> {
        let mut forms = vec![after.defined()?];
        if after.life.running.is_some() {
            forms.push(after.form()?);
        }
        for form in forms {
            let spec = match form {
                NetworkForm::Bridge(spec) => *spec,
                // NICs that run keep what they were started with.
                NetworkForm::Uplink(_) => BridgeSpec::default(),
            };
            demand_free_subnet(records, after.project, &spec, Some(row.id))?;
            firewall::check_policy(records, tx, after.project, spec.policy.as_ref(), "config.security.acls")?;
            if after.kind == NetworkKind::Bridge {
                // Guests alone: what the network keeps for others changes with it.
                let mut plain = row.value.clone();
                for config in [Some(&mut plain.config), plain.life.running.as_mut()].into_iter().flatten() {
                    config.remove("ipv4.dhcp.hosts");
                }
                let hosts = self.hosts_on(records, &plain, &BTreeSet::new());
                let mut now = self.network_spec_of(records, &plain, hosts)?;
                unname_guests(records, context, now.hosts.iter_mut());
                demand_fitting(&now, &spec)?;
            }
            for forward in records.forwards.values().filter(|f| f.network == row.id) {
                forward.parse(&spec).map_err(|e| {
                    Error::conflict(format!(
                        "the forward of {} would not fit: {}",
                        forward.listen_address, e.message
                    ))
                })?;
            }
        }
        Ok(())
    }
}

impl Engine {
    /// One change of a network's record, and of the host by it.
    async fn network_change(
        &self,
        context: &Context,
        project: &Row<Project>,
        name: &str,
        (words, defined): (&'static str, bool),
        mut change: impl FnMut(&Records, &mut Tx, &Row<Network>, &mut Network) -> Result<()>,
    ) -> Result<LiveOperation> {
        let inner = self.inner();
        runner::start::<NetworkUpdate>(inner, context, |tx| {
            let records = inner.inventory.read();
            let records: &Records = &records;
            let row = records.network(project.id, name)?;
            let mut after = row.value.clone();
            change(records, tx, row, &mut after)?;
            after.spec_version += 1;
            tx.expect(row);
            let path = records.path_in("networks", name, project.id);
            let new = NewOperation::task(words, Some(project.id), "networks", path.clone());
            let plan = NetworkUpdatePlan { defined, ..NetworkUpdatePlan::new(row, after, inner.node, path) };
            Ok((plan, new))
        })
        .await
    }

    /// Says whether somebody may change the networks of a project, before anything is found to be as it was wanted.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn network_demand_change(&self, context: &Context, project: &str) -> Result<()> {
        self.network_project(context, project).map(drop)
    }

    /// Makes a network on its host, by its definition.
    ///
    /// # Errors
    /// Not found, conflict when it is active or the host has its interface or addresses otherwise, forbidden.
    pub async fn network_start(&self, context: &Context, project: &str, name: &str) -> Result<LiveOperation> {
        let project = self.network_project(context, project)?;
        self.network_change(context, &project, name, ("Starting network", false), |_, _, row, after| {
            if row.is_active() {
                return Err(Error::conflict(format!("network {name:?} is active already")));
            }
            after.start();
            Ok(())
        })
        .await
    }

    /// Makes a network on its host by another configuration than its definition: until it is stopped.
    ///
    /// # Errors
    /// Those of [`Engine::network_start`]; invalid by field.
    pub async fn network_start_as(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        config: &Config,
    ) -> Result<LiveOperation> {
        let project = self.network_project(context, project)?;
        let whole = self.edits_the_hosts(context);
        let inner = self.inner();
        self.network_change(
            context,
            &project,
            name,
            ("Starting network", false),
            |records, tx, row, after| {
                if row.is_active() {
                    return Err(Error::conflict(format!("network {name:?} is active already")));
                }
                demand_reach(whole, row.kind, config, Some(&row.config))?;
                after.start();
                // Nobody knows a definition of what goes when it is stopped.
                match after.life.transient {
                    true => after.config = said(config),
                    false => after.rerun(said(config)),
                }
                inner.demand_sound(records, tx, context, row, after)
            },
        )
        .await
    }

    /// Takes a network from its host. The interfaces of guests that run stay, and reach nothing until it is started. A transient
    /// one goes, as soon as nothing uses it.
    ///
    /// # Errors
    /// Not found, conflict when it is not active, forbidden.
    pub async fn network_stop(&self, context: &Context, project: &str, name: &str) -> Result<LiveOperation> {
        let home = self.network_project(context, project)?;
        let row = self.network(context, project, name)?;
        if row.life.transient && row.is_active() && self.network_used_by(&Context::system(), &row).is_empty()
        {
            return self.network_delete(context, project, name).await;
        }
        self.network_change(context, &home, name, ("Stopping network", false), |_, _, row, after| {
            if !row.is_active() {
                return Err(Error::conflict(format!("network {name:?} is not active")));
            }
            after.stop();
            Ok(())
        })
        .await
    }

    /// Says whether a network begins with its host.
    ///
    /// # Errors
    /// Not found, conflict for a transient one, forbidden.
    pub async fn network_set_autostart(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        autostart: bool,
    ) -> Result<LiveOperation> {
        let project = self.network_project(context, project)?;
        self.network_change(context, &project, name, ("Updating network", false), |_, _, row, after| {
            if row.life.transient && autostart {
                let text = format!("network {name:?} is transient: it goes with its host; define it first");
                return Err(Error::conflict(text));
            }
            after.life.manual = !autostart;
            Ok(())
        })
        .await
    }

    /// Gives a network its definition anew, and leaves what runs alone; a transient one has a definition from then on.
    ///
    /// # Errors
    /// Those of [`Engine::network_update`].
    pub async fn network_define(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        request: UpdateNetwork,
    ) -> Result<LiveOperation> {
        let project = self.network_project(context, project)?;
        let whole = self.edits_the_hosts(context);
        let inner = self.inner();
        {
            let records = inner.inventory.read();
            let row = records.network(project.id, name)?;
            demand_reach(whole, row.kind, &request.config, Some(&row.config))?;
        }
        self.network_change(context, &project, name, ("Defining network", true), |records, tx, row, after| {
            // It may be another one by now than what was looked at.
            demand_reach(whole, row.kind, &request.config, Some(&row.config))?;
            demand_version(row, name, request.if_version)?;
            after.description.clone_from(&request.description);
            after.redefine(said(&request.config));
            after.life.transient = false;
            inner.demand_sound(records, tx, context, row, after)
        })
        .await
    }

    /// Changes the definition of a network, what it runs by, or each as it is said. A transient one has one configuration.
    ///
    /// # Errors
    /// Those of [`Engine::network_update`]; conflict for the run of one that is not active.
    pub async fn network_change_sides(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        sides: NetworkSides,
    ) -> Result<LiveOperation> {
        let project = self.network_project(context, project)?;
        let whole = self.edits_the_hosts(context);
        let inner = self.inner();
        self.network_change(
            context,
            &project,
            name,
            ("Updating network", false),
            |records, tx, row, after| {
                demand_version(row, name, sides.if_version)?;
                if let Some(config) = &sides.defined {
                    demand_reach(whole, row.kind, config, Some(&row.config))?;
                    after.redefine(said(config));
                }
                if let Some(config) = &sides.running {
                    if !row.is_active() {
                        return Err(not_active(name));
                    }
                    demand_reach(whole, row.kind, config, Some(row.running_config()))?;
                    match after.life.transient {
                        true => after.reconfigure(said(config)),
                        false => after.rerun(said(config)),
                    }
                }
                inner.demand_sound(records, tx, context, row, after)
            },
        )
        .await
    }

    /// Forgets a network's definition: one that is active becomes transient and goes on by what it runs by, another is deleted.
    ///
    /// # Errors
    /// Those of [`Engine::network_delete`]; conflict for a transient one; forbidden where what it runs by reaches further into the
    /// host than its definition, for whoever may not say that.
    pub async fn network_undefine(
        &self,
        context: &Context,
        project: &str,
        name: &str,
    ) -> Result<LiveOperation> {
        let home = self.network_project(context, project)?;
        let whole = self.edits_the_hosts(context);
        let row = self.network(context, project, name)?;
        if !row.is_active() {
            return self.network_delete(context, project, name).await;
        }
        self.network_change(context, &home, name, ("Undefining network", false), |_, _, row, after| {
            if row.life.transient {
                return Err(Error::conflict(format!("network {name:?} is transient: it has no definition")));
            }
            if !row.is_active() {
                return Err(Error::conflict(format!("network {name:?} was stopped meanwhile; try again")));
            }
            demand_reach(whole, row.kind, row.running_config(), Some(&row.config))?;
            after.config = row.running_config().clone();
            after.life.running = None;
            after.life.transient = true;
            after.life.manual = true;
            Ok(())
        })
        .await
    }

    /// Networks that are transient, stopped and used by nothing go.
    pub(crate) async fn forget_transient_networks(&self) {
        let gone: Vec<_> = {
            let records = self.inner().inventory.read();
            let over = records.networks.values().filter(|n| n.life.transient && !n.is_active());
            over.filter(|n| records.lock(&lock(n.id)).is_none()).cloned().collect()
        };
        for network in gone {
            if !self.network_used_by(&Context::system(), &network).is_empty() {
                continue;
            }
            let project = self.inner().project_name(Some(network.project));
            if let Err(e) = self.network_delete(&Context::system(), &project, &network.name).await {
                tracing::warn!(network = %network.name, error = %e, "a transient network could not be deleted");
            }
        }
    }
}

fn demand_version(row: &Row<Network>, name: &str, wanted: Option<u64>) -> Result<()> {
    match wanted.is_some_and(|v| v != row.spec_version) {
        false => Ok(()),
        true => Err(Error::precondition_failed(format!(
            "network {name:?} has changed since it was read; read it again"
        ))),
    }
}
