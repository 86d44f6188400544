//! Managed networks: the use cases, and what hosts get of them.

pub mod life;
mod names;
pub(crate) mod own;
mod ports;

use self::own::Place;
use crate::{
    Engine, EngineInner, Records, Row,
    compute::{addresses, labels, nic_checks::confine},
    context::Context,
    db::Tx,
    events::Subject,
    firewall::{self, Rules},
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    storage::{UsedBy, users_in_words},
    tenancy::limits::{Planned, admit},
    visible::no_network,
};
use async_trait::async_trait;
use ipnet::IpNet;
use karst_agent::{CallContext, NetworkChoose, NetworkState};
use karst_model::{
    Config, Error, Name, NetworkId, NodeId, ProjectId, Result,
    access::Permission,
    device::{Device, NicKind, interface_name},
    firewall::Policy,
    instance::Instance,
    network::{BridgeSpec, Lease, Network},
    network_life::NetworkBeginning,
    spec::{NetworkHost, NetworkSpec},
    uplink::{NetworkForm, NetworkKind, UplinkSpec},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex},
    time::Duration,
};

/// Lock target of a network; also what `Tx::touch` takes.
pub fn lock(id: NetworkId) -> String {
    format!("networks/{id}")
}

const CALL: Duration = Duration::from_secs(60);

/// One mutex per network: what a host gets later was read later.
#[derive(Default)]
pub struct Locks {
    by_id: Mutex<HashMap<NetworkId, Arc<tokio::sync::Mutex<()>>>>,
}

/// What a user wants created.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CreateNetwork {
    /// Name, also of the bridge interface.
    pub name: String,
    /// User's text.
    pub description: String,
    /// What it is made of.
    pub kind: NetworkKind,
    /// Configuration as written; `auto` is replaced by a free value.
    pub config: Config,
    /// Another name will do when this one is taken on the host.
    pub any_name: bool,
    /// How it begins.
    pub beginning: NetworkBeginning,
    /// What its bridge is called on the host, where that is not to be its name.
    pub interface: Option<String>,
}

impl CreateNetwork {
    /// A NAT network with DHCP and DNS, on a free subnet.
    pub fn automatic(name: &str) -> Self {
        Self { name: name.into(), any_name: true, ..Default::default() }
    }
}

/// Replaces what a user may set of a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpdateNetwork {
    /// User's text.
    pub description: String,
    /// Configuration as written.
    pub config: Config,
    /// `spec_version` that was read (If-Match).
    pub if_version: Option<u64>,
}

impl EngineInner {
    /// What a host gets of a network: its configuration and the guests that are known on it. Cheap with thousands of
    /// instances: their NICs are parsed once for each change of an instance or profile.
    pub(crate) fn network_spec(&self, records: &Records, id: NetworkId) -> Result<NetworkSpec> {
        let network = records
            .networks
            .get(&id)
            .ok_or_else(|| Error::not_found("the network is gone").with_context(id))?;
        self.network_spec_of(records, network, self.hosts_on(records, network, &BTreeSet::new()))
    }

    /// Brings networks on a host up to date with instances as they are about to be. An error is for who sees the project
    /// `from`.
    pub(crate) async fn ensure_networks_for(
        &self,
        cx: &StepContext,
        node: NodeId,
        from: ProjectId,
        instances: &[Instance],
        ids: &[NetworkId],
    ) -> Result<()> {
        for id in ids {
            let _ordered = self.network_order(*id).await;
            let spec = {
                let records = self.inventory.read();
                let network =
                    records.networks.get(id).ok_or_else(|| Error::not_found("the network is gone"))?;
                // Who comes onto it was refused; who was on it when it was stopped is told to it when it starts.
                if !network.is_active() {
                    continue;
                }
                let hosts = self.demand_own_addresses(&records, network, from, instances)?;
                self.network_spec_of(&records, network, hosts)?
            };
            self.agents.get(node)?.network_ensure(&cx.mutate(CALL), spec).await?;
        }
        Ok(())
    }

    fn network_spec_of(
        &self,
        records: &Records,
        network: &Network,
        mut hosts: Vec<NetworkHost>,
    ) -> Result<NetworkSpec> {
        let spec = network.bridge()?;
        // What is left out is a warning; see `tenancy::warnings`.
        confine(&spec, &mut hosts);
        addresses::settle(&mut hosts);
        labels::settle(records, &mut hosts);
        names::reserve(&spec, &mut hosts);
        ports::settle(&spec, &mut hosts);
        for host in &mut hosts {
            host.view.take_if(|v| v.project == network.project);
        }
        let policies: Vec<&Policy> =
            hosts.iter().filter_map(|h| h.port.as_ref().and_then(|p| p.policy.as_ref())).collect();
        let Rules { acls, sets, forwards } = firewall::rules_of(records, network, &spec, &policies);
        Ok(NetworkSpec {
            id: network.id,
            bridge: network.interface().to_owned(),
            spec,
            hosts,
            acls,
            sets,
            forwards,
            owner: records.owner_of(network.project),
        })
    }

    /// Brings networks on a host up to date, in a saga's step. One that was stopped meanwhile stays so, and the host refuses who
    /// would start on it.
    pub(crate) async fn ensure_networks(
        &self,
        cx: &StepContext,
        node: NodeId,
        ids: &[NetworkId],
    ) -> Result<()> {
        for id in ids {
            self.ensure_network(node, *id, &cx.mutate(CALL)).await?;
        }
        Ok(())
    }

    /// Brings a network on a host up to date, where it is to be there.
    pub(crate) async fn ensure_network(
        &self,
        node: NodeId,
        id: NetworkId,
        context: &CallContext,
    ) -> Result<()> {
        let _ordered = self.network_order(id).await;
        let spec = {
            let records = self.inventory.read();
            if records.networks.get(&id).is_some_and(|n| !n.is_active()) {
                return Ok(());
            }
            self.network_spec(&records, id)?
        };
        self.agents.get(node)?.network_ensure(context, spec).await
    }

    /// As [`EngineInner::ensure_network`], but leaves a network alone that a saga changes or deletes, or that is gone: what
    /// the saga removed must not be made again by who read the records before.
    pub(crate) async fn reconcile_network(
        &self,
        node: NodeId,
        id: NetworkId,
        context: &CallContext,
    ) -> Result<()> {
        let _ordered = self.network_order(id).await;
        let spec = {
            let records = self.inventory.read();
            let there = records.networks.get(&id).filter(|n| n.kind == NetworkKind::Bridge);
            let Some(network) = there.filter(|_| records.lock(&lock(id)).is_none()) else { return Ok(()) };
            match network.is_active() {
                true => Some(self.network_spec(&records, id)?),
                false => None,
            }
        };
        let agent = self.agents.get(node)?;
        match spec {
            Some(spec) => agent.network_ensure(context, spec).await,
            None => agent.network_stop(context, id).await,
        }
    }

    /// The host has the interface and grants it.
    pub(crate) async fn demand_uplink(&self, uplink: &UplinkSpec) -> Result<()> {
        let agent = self.agents.get(self.node)?;
        let context = CallContext::read(Duration::from_secs(10));
        let state = agent.link_state(&context, uplink.link.parent.clone()).await;
        state.map(drop).map_err(|e| e.at("config.parent"))
    }

    /// Held by whoever changes a network on a host.
    async fn network_order(&self, id: NetworkId) -> tokio::sync::OwnedMutexGuard<()> {
        let mutex = {
            let mut all = self.network_locks.by_id.lock().unwrap_or_else(|e| e.into_inner());
            // Those of networks that are gone, unless somebody still waits there.
            if all.len() > 64 {
                let records = self.inventory.read();
                all.retain(|id, m| records.networks.contains_key(id) || Arc::strong_count(m) > 1);
            }
            all.entry(id).or_default().clone()
        };
        mutex.lock_owned().await
    }
}

impl Engine {
    /// All networks that a project may use, by name.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn networks(&self, context: &Context, project: &str) -> Result<Vec<Row<Network>>> {
        let project = self.project(context, project, Permission::ProjectView)?;
        let records = self.inner().inventory.read();
        let seen = records.networks.values().filter(|n| records.sees_network(&project, n));
        let mut all: Vec<_> = seen.cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// A network by name.
    ///
    /// # Errors
    /// Not found, also when the project may not use it; forbidden.
    pub fn network(&self, context: &Context, project: &str, name: &str) -> Result<Row<Network>> {
        let project = self.project(context, project, Permission::ProjectView)?;
        let records = self.inner().inventory.read();
        let row = records.network(project.id, name)?;
        match records.sees_network(&project, row) {
            true => Ok(row.clone()),
            false => Err(no_network(name)),
        }
    }

    /// What uses a network, as far as `context` may see it.
    pub fn network_used_by(&self, context: &Context, network: &Network) -> UsedBy {
        let records = self.inner().inventory.read();
        let users = records.network_users(network.project);
        let sees =
            |p: ProjectId| users.contains(&p) && context.principal().may(Permission::ProjectView, Some(p));
        let on = |kind: &NicKind| Place::of(kind).is_some_and(|place| place.is(network));
        let uses = |devices: &karst_model::device::Devices| {
            let mut all = devices.iter();
            all.any(|(n, keys)| matches!(Device::parse(n, keys), Ok(Device::Nic(nic)) if on(&nic.kind)))
        };
        let mut used: UsedBy = records
            .profiles
            .values()
            .filter(|p| sees(p.project) && uses(&p.devices))
            .map(|p| records.path_in("profiles", &p.name, p.project))
            .collect();
        for instance in
            records.instances.values().filter(|i| sees(i.project) && uses(&records.devices_in_use(i)))
        {
            let project =
                records.projects.get(&instance.project).map(|p| p.name.to_string()).unwrap_or_default();
            used.push(crate::compute::path(&project, &instance.name));
        }
        used
    }

    /// DHCP leases and static assignments of a network.
    ///
    /// # Errors
    /// Not found, forbidden, unavailable.
    pub async fn network_leases(&self, context: &Context, project: &str, name: &str) -> Result<Vec<Lease>> {
        let network = self.network(context, project, name)?;
        if network.kind != NetworkKind::Bridge || !network.is_active() {
            return Ok(vec![]);
        }
        let agent = self.inner().agents.get(self.inner().node)?;
        let mut leases =
            agent.network_leases(&CallContext::read(Duration::from_secs(10)), network.id).await?;
        // One network serves several projects: nobody learns of guests in those that he may not see.
        let records = self.inner().inventory.read();
        let users = records.network_users(network.project);
        let owners: HashMap<&str, ProjectId> = records
            .instances
            .values()
            .filter(|i| users.contains(&i.project))
            .flat_map(|i| i.identities.values().filter_map(|d| Some((d.mac.as_deref()?, i.project))))
            .collect();
        leases.retain(|l| {
            let owner = owners.get(l.mac.as_str()).copied().unwrap_or(network.project);
            context.principal().may(Permission::ProjectView, Some(owner))
        });
        Ok(leases)
    }

    /// State of a network's bridge, or of the host's interface that it is.
    ///
    /// # Errors
    /// Not found, forbidden, unavailable.
    pub async fn network_state(&self, context: &Context, project: &str, name: &str) -> Result<NetworkState> {
        let network = self.network(context, project, name)?;
        let agent = self.inner().agents.get(self.inner().node)?;
        if network.kind == NetworkKind::Bridge && !network.is_active() {
            return Ok(NetworkState::default());
        }
        if let NetworkForm::Uplink(uplink) = network.form()? {
            let name = uplink.link.parent;
            return agent.link_state(&CallContext::read(Duration::from_secs(10)), name).await;
        }
        agent.network_state(&CallContext::read(Duration::from_secs(10)), network.id).await
    }

    /// Creates a network; answers its name and the operation.
    ///
    /// # Errors
    /// Invalid by field, conflict (taken name or subnet), forbidden.
    pub async fn network_create(
        &self,
        context: &Context,
        project: &str,
        request: CreateNetwork,
    ) -> Result<(String, LiveOperation)> {
        let project = self.network_project(context, project)?;
        let whole = self.edits_the_hosts(context);
        own::demand_reach(whole, request.kind, &request.config, None)?;
        let inner = self.inner();
        let chosen = match &request.interface {
            Some(_) if !whole || request.kind != NetworkKind::Bridge => {
                let text = "what a bridge is called on the host is said with the permission \"resource_edit\" in the default \
                            project, and of networks of type bridge";
                return Err(Error::forbidden(text).at("interface"));
            }
            Some(chosen) => {
                interface_name("interface", chosen)?;
                Some(Name::parse("interface", chosen)?)
            }
            None => {
                interface_name("name", &request.name)?;
                None
            }
        };
        let mut name = Name::parse("name", &request.name)?;
        let mut config = request.config.clone();
        let auto = |key: &str| config.get(key).is_none_or(|a| a.is_empty() || a == "auto");
        let bridge = request.kind == NetworkKind::Bridge;
        let (automatic, automatic6) = (bridge && auto("ipv4.address"), bridge && auto("ipv6.address"));
        let own = bridge && chosen.is_none() && inner.inventory.read().owner_of(project.id).is_some();
        let id = NetworkId(inner.env.uuid());
        let mut interface = chosen.filter(|chosen| **chosen != *name);
        if automatic || automatic6 || request.any_name || own {
            let agent = inner.agents.get(inner.node)?;
            let taken: Vec<_> = {
                let records = inner.inventory.read();
                let parse = |n: &Row<Network>| n.bridge().ok()?.ipv4;
                records.networks.values().filter_map(parse).collect()
            };
            let ask = NetworkChoose { name: request.name.clone(), taken: taken.clone() };
            let choice = agent.network_choose(&CallContext::read(CALL), ask).await?;
            if automatic {
                config.insert("ipv4.address".into(), choice.ipv4.to_string());
                config.entry("ipv4.nat".into()).or_insert_with(|| "true".into());
            }
            if automatic6 {
                let chosen = choice.ipv6.map_or("none".to_owned(), |n| n.to_string());
                if choice.ipv6.is_some() {
                    config.entry("ipv6.nat".into()).or_insert_with(|| "true".into());
                }
                config.insert("ipv6.address".into(), chosen);
            }
            if own {
                // Names are the project's, interfaces the host's: where that has one of this name, another is derived. So is
                // it for who has no say over the host: what it is to be called there, other programs may go by.
                let free =
                    whole && choice.name == *name && inner.inventory.read().network_on(&name).is_none();
                if !free {
                    let derived = format!("karst{}", &id.uuid().simple().to_string()[..8]);
                    let ask = NetworkChoose { name: derived, taken };
                    let choice = agent.network_choose(&CallContext::read(CALL), ask).await?;
                    interface = Some(Name::parse("name", &choice.name)?);
                }
            } else if request.any_name {
                name = Name::parse("name", &choice.name)?;
            }
        }
        let spec = match NetworkForm::parse(request.kind, interface.as_deref().unwrap_or(&name), &config)? {
            NetworkForm::Bridge(spec) => *spec,
            NetworkForm::Uplink(uplink) => {
                inner.demand_uplink(&uplink).await?;
                BridgeSpec::default()
            }
        };
        let operation = runner::start::<NetworkCreate>(inner, context, |tx| {
            let records = inner.inventory.read();
            let network = Network {
                id,
                project: project.id,
                kind: request.kind,
                name: name.clone(),
                interface: interface.clone(),
                description: request.description.clone(),
                config: config.clone(),
                life: request.beginning.life(),
                spec_version: 1,
            };
            demand_free(&records, &network, &name)?;
            demand_free_subnet(&records, project.id, &spec, None)?;
            firewall::check_policy(&records, tx, project.id, spec.policy.as_ref(), "config.security.acls")?;
            tx.expect(&project);
            admit(&records, tx, project.id, &Planned { networks: 1, ..Default::default() })?;
            let path = records.path_in("networks", &name, project.id);
            let new = NewOperation::task("Creating network", Some(project.id), "networks", path.clone());
            Ok((NetworkPlan { network, node: inner.node, path }, new))
        })
        .await?;
        Ok((name.to_string(), operation))
    }

    /// Replaces a network's configuration, live.
    ///
    /// # Errors
    /// Invalid by field, not found, precondition failed, conflict, forbidden.
    pub async fn network_update(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        request: UpdateNetwork,
    ) -> Result<LiveOperation> {
        let project = self.network_project(context, project)?;
        let inner = self.inner();
        let (kind, before) = {
            let records = inner.inventory.read();
            let row = records.network(project.id, name)?;
            (row.kind, row.config.clone())
        };
        let whole = self.edits_the_hosts(context);
        own::demand_reach(whole, kind, &request.config, Some(&before))?;
        if kind != NetworkKind::Bridge
            && let NetworkForm::Uplink(uplink) = NetworkForm::parse(kind, name, &request.config)?
        {
            inner.demand_uplink(&uplink).await?;
        }
        runner::start::<NetworkUpdate>(inner, context, |tx| {
            let records = inner.inventory.read();
            let row = records.network(project.id, name)?;
            // It may be another one by now than what was looked at.
            own::demand_reach(whole, kind, &request.config, Some(&row.config))?;
            if request.if_version.is_some_and(|v| v != row.spec_version) {
                return Err(Error::precondition_failed(format!(
                    "network {name:?} has changed since it was read; read it again"
                )));
            }
            let mut network = row.value.clone();
            network.description = request.description.clone();
            network.reconfigure(life::said(&request.config));
            network.spec_version += 1;
            inner.demand_sound(&records, tx, context, row, &network)?;
            tx.expect(row);
            let path = records.path_in("networks", name, project.id);
            let new = NewOperation::task("Updating network", Some(project.id), "networks", path.clone());
            Ok((NetworkUpdatePlan::new(row, network, inner.node, path), new))
        })
        .await
    }

    /// Renames a network that nothing uses, and its bridge.
    ///
    /// # Errors
    /// Invalid name, not found, conflict (taken, used), forbidden.
    pub async fn network_rename(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        new: &str,
    ) -> Result<LiveOperation> {
        let project = self.network_project(context, project)?;
        let inner = self.inner();
        interface_name("name", new)?;
        let new = Name::parse("name", new)?;
        runner::start::<NetworkUpdate>(inner, context, |tx| {
            let (row, own, paths) = {
                let records = inner.inventory.read();
                let row = records.network(project.id, name)?.clone();
                demand_free(&records, &row, &new)?;
                tx.expect_untouched(&records, &lock(row.id));
                let path = |name: &str| records.path_in("networks", name, project.id);
                (row, records.owner_of(project.id).is_some(), (path(name), path(&new)))
            };
            let used = self.network_used_by(&Context::system(), &row);
            if !used.is_empty() {
                let who = users_in_words(&self.network_used_by(context, &row), &used);
                return Err(Error::conflict(format!(
                    "network {name:?} is used by {who}; only an unused one can be renamed"
                )));
            }
            let mut after =
                Network { name: new.clone(), spec_version: row.spec_version + 1, ..row.value.clone() };
            if own && after.kind == NetworkKind::Bridge {
                // The interface is the host's, where the new name may be another's.
                after.interface = Some(row.interface.clone().unwrap_or_else(|| row.name.clone()));
            }
            after.form()?;
            after.defined()?;
            tx.expect(&row);
            let new = NewOperation::task("Renaming network", Some(project.id), "networks", paths.0);
            Ok((NetworkUpdatePlan::new(&row, after, inner.node, paths.1), new))
        })
        .await
    }

    /// Deletes a network that nothing uses.
    ///
    /// # Errors
    /// Not found, conflict when it is used, forbidden.
    pub async fn network_delete(
        &self,
        context: &Context,
        project: &str,
        name: &str,
    ) -> Result<LiveOperation> {
        let project = self.network_project(context, project)?;
        let inner = self.inner();
        runner::start::<NetworkDelete>(inner, context, |tx| {
            let (row, path) = {
                let records = inner.inventory.read();
                let row = records.network(project.id, name)?.clone();
                tx.expect_untouched(&records, &lock(row.id));
                (row, records.path_in("networks", name, project.id))
            };
            let used = self.network_used_by(&Context::system(), &row);
            if !used.is_empty() {
                let who = users_in_words(&self.network_used_by(context, &row), &used);
                return Err(Error::conflict(format!("network {name:?} is used by {who}")));
            }
            tx.expect(&row);
            let new = NewOperation::task("Deleting network", Some(project.id), "networks", path.clone());
            Ok((NetworkPlan { network: row.value.clone(), node: inner.node, path }, new))
        })
        .await
    }
}

/// Static addresses and routes of guests stay inside of what is the network's.
fn demand_fitting(now: &NetworkSpec, spec: &BridgeSpec) -> Result<()> {
    for host in &now.hosts {
        let (v4, v6) = (host.ipv4, host.ipv6);
        if let Some(a) = v4.filter(|a| !spec.takes((*a).into())) {
            return Err(Error::conflict(format!(
                "guest {:?} has the static address {a}; change that first",
                host.hostname
            ))
            .at("config.ipv4.address"));
        }
        if let Some(a) = v6.filter(|a| !spec.takes((*a).into())) {
            return Err(Error::conflict(format!(
                "guest {:?} has the static address {a}; change that first",
                host.hostname
            ))
            .at("config.ipv6.address"));
        }
        if let Some(route) = host.routes.iter().find(|r| !spec.routed().any(|net| net.contains(*r))) {
            let family = if route.addr().is_ipv4() { "ipv4" } else { "ipv6" };
            return Err(Error::conflict(format!(
                "guest {:?} has the route {route}; change that first",
                host.hostname
            ))
            .at(format!("config.{family}.routes")));
        }
    }
    Ok(())
}

/// A free name for a network of its project, and for its interface where that is to be made.
fn demand_free(records: &Records, network: &Network, name: &Name) -> Result<()> {
    if records.network(network.project, name).is_ok() {
        return Err(Error::conflict(format!("a network {:?} exists already", &**name)).at("name"));
    }
    let own = records.owner_of(network.project).is_some() || network.interface.is_some();
    let interface = if own { network.interface() } else { &**name };
    if network.kind == NetworkKind::Bridge
        && records.network_on(interface).is_some_and(|other| other.id != network.id)
    {
        let text = format!("{interface:?} is the bridge of another project's network; choose another name");
        return Err(Error::conflict(text).at("name"));
    }
    // Names of networks that projects share are interfaces unless they say otherwise, and stay free for that.
    let named = |n: &Row<Network>| {
        n.id != network.id && *n.name == *interface && records.owner_of(n.project).is_none()
    };
    if network.kind == NetworkKind::Bridge && records.networks.values().any(named) {
        let text = format!("{interface:?} is the name of another network; choose another name");
        return Err(Error::conflict(text).at("name"));
    }
    Ok(())
}

fn demand_free_subnet(
    records: &Records,
    project: ProjectId,
    spec: &BridgeSpec,
    except: Option<NetworkId>,
) -> Result<()> {
    let overlap = |a: &IpNet, b: &IpNet| a.contains(&b.network()) || b.contains(&a.network());
    for ours in spec.own() {
        let first = [spec.ipv4.map(IpNet::V4), spec.ipv6.map(IpNet::V6)].contains(&Some(ours));
        let family = if ours.addr().is_ipv4() { "ipv4" } else { "ipv6" };
        let key = format!("config.{family}.{}", if first { "address" } else { "addresses" });
        for other in records.networks.values().filter(|n| Some(n.id) != except) {
            let of = |form: Result<NetworkForm>| match form {
                Ok(NetworkForm::Bridge(spec)) => spec.own().collect(),
                _ => vec![],
            };
            let mut theirs = of(other.form());
            if other.life.running.is_some() {
                theirs.extend(of(other.defined()));
            }
            if theirs.iter().any(|theirs| overlap(theirs, &ours)) {
                let which = match other.project == project {
                    true => format!("network {:?}", &*other.name),
                    false => "a network of another project".to_owned(),
                };
                let text = format!("the subnet {} overlaps with {which}", ours.trunc());
                return Err(Error::conflict(text).at(key));
            }
        }
    }
    Ok(())
}

/// Plan of [`NetworkCreate`] and [`NetworkDelete`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NetworkPlan {
    network: Network,
    node: NodeId,
    /// In the API.
    #[serde(default)]
    path: String,
}

fn bare_spec(engine: &EngineInner, network: &Network) -> Result<NetworkSpec> {
    let (spec, mut hosts) = (network.bridge()?, vec![]);
    names::reserve(&spec, &mut hosts);
    Ok(NetworkSpec {
        id: network.id,
        bridge: network.interface().to_owned(),
        spec,
        hosts,
        acls: vec![],
        sets: vec![],
        forwards: vec![],
        owner: engine.inventory.read().owner_of(network.project),
    })
}

/// Gives up all names of a network.
fn release_names(engine: &EngineInner, tx: &mut Tx, network: &Network) {
    for (scope, name) in engine.inventory.read().network_names(network) {
        tx.release_name("networks", &scope, &name, &network.id.to_string());
    }
}

/// Of a network that is an interface of the host nothing is made there; that it is there and granted is asked once more.
async fn granted(cx: &StepContext, network: &Network) -> Result<()> {
    match network.form()? {
        NetworkForm::Bridge(_) => Ok(()),
        NetworkForm::Uplink(uplink) => cx.engine.demand_uplink(&uplink).await,
    }
}

/// Makes the network on the host, then the record.
pub struct NetworkCreate;

#[async_trait]
impl Saga for NetworkCreate {
    const NAME: &'static str = "network-create";
    const STEPS: &'static [&'static str] = &["network"];
    type Plan = NetworkPlan;
    type Outputs = ();

    fn locks(plan: &NetworkPlan) -> Vec<String> {
        vec![lock(plan.network.id)]
    }
    fn begin(plan: &NetworkPlan, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        for (scope, name) in engine.inventory.read().network_names(&plan.network) {
            tx.take_name("networks", &scope, &name, &plan.network.id.to_string());
        }
        Ok(())
    }
    async fn run(cx: &StepContext, plan: &NetworkPlan, _: &mut (), _: usize) -> Result<()> {
        if plan.network.kind != NetworkKind::Bridge {
            return granted(cx, &plan.network).await;
        }
        if !plan.network.is_active() {
            return Ok(());
        }
        cx.agent(plan.node)?.network_ensure(&cx.mutate(CALL), bare_spec(&cx.engine, &plan.network)?).await
    }
    async fn undo(cx: &StepContext, plan: &NetworkPlan, _: &(), _: usize) -> Result<()> {
        if plan.network.kind != NetworkKind::Bridge {
            return Ok(());
        }
        cx.agent(plan.node)?.network_remove(&cx.mutate(CALL), plan.network.id).await
    }
    fn commit(plan: &NetworkPlan, _: &(), _: &EngineInner, tx: &mut Tx) -> Result<()> {
        tx.create(&plan.network);
        Ok(())
    }
    fn abort(plan: &NetworkPlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        release_names(engine, tx, &plan.network);
        Ok(())
    }
    fn announce(plan: &NetworkPlan) -> Vec<(&'static str, String)> {
        vec![("network-created", plan.path.clone())]
    }
    fn subject(plan: &NetworkPlan) -> Option<Subject> {
        Some(Subject::Network(Arc::new(plan.network.clone())))
    }
}

/// Removes an unused network from the host, then the record.
pub struct NetworkDelete;

#[async_trait]
impl Saga for NetworkDelete {
    const NAME: &'static str = "network-delete";
    const STEPS: &'static [&'static str] = &["network"];
    type Plan = NetworkPlan;
    type Outputs = ();

    fn locks(plan: &NetworkPlan) -> Vec<String> {
        vec![lock(plan.network.id)]
    }
    fn begin(_: &NetworkPlan, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    async fn run(cx: &StepContext, plan: &NetworkPlan, _: &mut (), _: usize) -> Result<()> {
        if plan.network.kind != NetworkKind::Bridge {
            return Ok(());
        }
        let _ordered = cx.engine.network_order(plan.network.id).await;
        cx.agent(plan.node)?.network_remove(&cx.mutate(CALL), plan.network.id).await
    }
    async fn undo(cx: &StepContext, plan: &NetworkPlan, _: &(), _: usize) -> Result<()> {
        if plan.network.kind != NetworkKind::Bridge || !plan.network.is_active() {
            return Ok(());
        }
        let _ordered = cx.engine.network_order(plan.network.id).await;
        cx.agent(plan.node)?.network_ensure(&cx.mutate(CALL), bare_spec(&cx.engine, &plan.network)?).await
    }
    fn commit(plan: &NetworkPlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        if let Some(row) = engine.inventory.read().networks.get(&plan.network.id) {
            tx.delete(row);
        }
        for forward in engine.inventory.read().forwards.values().filter(|f| f.network == plan.network.id) {
            let listen = forward.listen_address.to_string();
            tx.release_name("network-forwards", "", &listen, &plan.network.id.to_string());
            tx.delete(forward);
        }
        tx.delete_id::<crate::inventory::Uses>(&lock(plan.network.id));
        release_names(engine, tx, &plan.network);
        Ok(())
    }
    fn abort(_: &NetworkPlan, _: &(), _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    fn announce(plan: &NetworkPlan) -> Vec<(&'static str, String)> {
        vec![("network-deleted", plan.path.clone())]
    }
}

/// Plan of [`NetworkUpdate`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NetworkUpdatePlan {
    before: Network,
    after: Network,
    node: NodeId,
    /// In the API, as it is to be.
    #[serde(default)]
    path: String,
    /// Its definition was given anew.
    #[serde(default)]
    defined: bool,
}

impl NetworkUpdatePlan {
    fn new(before: &Network, after: Network, node: NodeId, path: String) -> Self {
        Self { before: before.clone(), after, node, path, defined: false }
    }
}

/// Reconfigures the network on the host, then writes the record.
pub struct NetworkUpdate;

#[async_trait]
impl Saga for NetworkUpdate {
    const NAME: &'static str = "network-update";
    const STEPS: &'static [&'static str] = &["network"];
    type Plan = NetworkUpdatePlan;
    type Outputs = ();

    fn locks(plan: &NetworkUpdatePlan) -> Vec<String> {
        vec![lock(plan.after.id)]
    }
    fn begin(plan: &NetworkUpdatePlan, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        if plan.before.name != plan.after.name {
            let scope = engine.inventory.read().network_scope(plan.after.project);
            tx.take_name("networks", &scope, &plan.after.name, &plan.after.id.to_string());
        }
        Ok(())
    }
    async fn run(cx: &StepContext, plan: &NetworkUpdatePlan, _: &mut (), _: usize) -> Result<()> {
        if plan.after.kind != NetworkKind::Bridge {
            return match plan.after.is_active() {
                true => granted(cx, &plan.after).await,
                false => Ok(()),
            };
        }
        life::put(cx, plan.node, &plan.after).await
    }
    async fn undo(cx: &StepContext, plan: &NetworkUpdatePlan, _: &(), _: usize) -> Result<()> {
        if plan.before.kind != NetworkKind::Bridge {
            return Ok(());
        }
        life::put(cx, plan.node, &plan.before).await
    }
    fn commit(plan: &NetworkUpdatePlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let records = engine.inventory.read();
        let row =
            records.networks.get(&plan.after.id).ok_or_else(|| Error::not_found("the network is gone"))?;
        tx.replace(row, &plan.after);
        if plan.before.name != plan.after.name {
            let scope = records.network_scope(plan.after.project);
            tx.release_name("networks", &scope, &plan.before.name, &plan.after.id.to_string());
        }
        Ok(())
    }
    fn abort(plan: &NetworkUpdatePlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        if plan.before.name != plan.after.name {
            let scope = engine.inventory.read().network_scope(plan.after.project);
            tx.release_name("networks", &scope, &plan.after.name, &plan.after.id.to_string());
        }
        Ok(())
    }
    fn announce(plan: &NetworkUpdatePlan) -> Vec<(&'static str, String)> {
        vec![(life::told(&plan.before, &plan.after, plan.defined), plan.path.clone())]
    }
}
