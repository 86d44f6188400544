//! Does what is recorded agree with what hosts have? For administrators, and for tests that kill daemons.

use crate::{Engine, context::Context, saga::Phase};
use karst_agent::CallContext;
pub use karst_agent::resources;
use karst_model::{
    Result, access::Permission, network::Network, node::HostFacts, storage::Volume, uplink::NetworkKind,
};
use serde::Serialize;
use std::{collections::BTreeSet, fmt::Display, time::Duration};

/// What is not as it should be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Health {
    /// Things on a host that no record knows, and recorded things that are missing.
    pub leaks: Vec<String>,
    /// Sagas that have not ended, each with its phase. Running ones are no fault; those that need attention are.
    pub sagas: Vec<String>,
}

impl Engine {
    /// Compares records and hosts.
    ///
    /// # Errors
    /// Forbidden; unavailable when a host does not answer.
    pub async fn health(&self, context: &Context) -> Result<Health> {
        // It names things of all projects.
        context.demand_server(Permission::ServerEdit)?;
        let inner = self.inner();
        let mut health = Health::default();
        let mut on_hosts = karst_agent::SelfCheck::default();
        for (_, agent) in inner.agents.all() {
            let check = agent.self_check(&CallContext::read(Duration::from_secs(20)), ()).await?;
            health.leaks.extend(check.leaks);
            let stale = crate::uploads::stale(inner, &*agent).await?;
            health
                .leaks
                .extend(stale.iter().map(|id| format!("staged parts of image {id}, which nobody uploads")));
            on_hosts.volumes.extend(check.volumes);
            on_hosts.images.extend(check.images);
            on_hosts.networks.extend(check.networks);
            on_hosts.guests.extend(check.guests);
        }
        let records = inner.inventory.read();
        for saga in records.sagas.values() {
            let phase = match &saga.phase {
                Phase::Forward { next } => format!("before step {next}"),
                Phase::Undoing { next, error } => format!("undoing step {next} because of: {error}"),
                Phase::NeedsAttention { step, undo_error, .. } => {
                    format!("needs attention: the undo of step {step} failed: {undo_error}")
                }
            };
            health.sagas.push(format!("{} {} (operation {}): {phase}", saga.name, saga.id, saga.operation));
        }
        // What a saga works on is in between, which is no fault.
        if health.sagas.is_empty() {
            // Nobody sees what is in a pool that is not active.
            let stopped = |v: &Volume| records.pools.get(&v.pool).is_some_and(|p| p.life.stopped);
            let volumes = records.volumes.iter().filter(|(_, v)| !stopped(v)).map(|(id, _)| id);
            compare("volume", &on_hosts.volumes, volumes, &mut health.leaks);
            compare("image", &on_hosts.images, records.images.keys(), &mut health.leaks);
            let made = |n: &Network| n.kind == NetworkKind::Bridge && n.is_active();
            let networks = records.networks.iter().filter(|(_, n)| made(n)).map(|(id, _)| id);
            compare("network", &on_hosts.networks, networks, &mut health.leaks);
            for guest in on_hosts.guests.iter().filter(|g| !records.instances.contains_key(g)) {
                health.leaks.push(format!("guest {guest} is on a host and not recorded"));
            }
        }
        Ok(health)
    }

    /// Asks this engine's own host what it is, now.
    ///
    /// # Errors
    /// Forbidden; unavailable when it does not answer within 5 s.
    pub async fn probe_host(&self, context: &Context) -> Result<HostFacts> {
        context.demand_server(Permission::ServerInspect)?;
        let agent = self.inner().agents.get(self.inner().node)?;
        agent.host_facts(&CallContext::read(Duration::from_secs(5)), ()).await
    }

    /// What hardware this host has, asked for now.
    ///
    /// # Errors
    /// Forbidden, unavailable.
    pub async fn host_resources(&self, context: &Context) -> Result<karst_agent::resources::HostResources> {
        context.demand_server(Permission::ServerView)?;
        let agent = self.inner().agents.get(self.inner().node)?;
        agent.host_resources(&CallContext::read(Duration::from_secs(5)), ()).await
    }

    /// CPU models of this host's QEMU, asked for now.
    ///
    /// # Errors
    /// Forbidden; unsupported without QEMU; unavailable.
    pub async fn host_cpu_models(&self, context: &Context) -> Result<Vec<resources::CpuModel>> {
        context.demand_server(Permission::ServerView)?;
        let agent = self.inner().agents.get(self.inner().node)?;
        agent.host_cpu_models(&CallContext::read(Duration::from_secs(60)), ()).await
    }

    /// What the hosts said of themselves last, by node name. What is wrong with them is for who inspects the server.
    ///
    /// # Errors
    /// Forbidden.
    pub fn host_facts(&self, context: &Context) -> Result<Vec<(String, HostFacts)>> {
        context.demand_server(Permission::ServerView)?;
        let inspects = context.principal().may(Permission::ServerInspect, None);
        let records = self.inner().inventory.read();
        let known = records.nodes.values().filter_map(|n| Some((n.name.to_string(), n.facts.clone()?)));
        let shown = known.map(|(name, facts)| match inspects {
            true => (name, facts),
            false => (name, HostFacts { warnings: vec![], ..facts }),
        });
        Ok(shown.collect())
    }
}

fn compare<'a, T: Ord + Copy + Display + 'a>(
    what: &str,
    host: &[T],
    recorded: impl Iterator<Item = &'a T>,
    leaks: &mut Vec<String>,
) {
    let host: BTreeSet<T> = host.iter().copied().collect();
    let recorded: BTreeSet<T> = recorded.copied().collect();
    leaks.extend(host.difference(&recorded).map(|x| format!("{what} {x} is on a host and not recorded")));
    leaks.extend(recorded.difference(&host).map(|x| format!("{what} {x} is recorded and on no host")));
}
