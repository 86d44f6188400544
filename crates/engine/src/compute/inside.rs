//! What is asked of a running virtual machine beside its console and screen: its figures, commands of its agent, interrupts.

use crate::{Engine, context::Context};
use karst_agent::{
    AgentCommand, CallContext, DiskThresholdSet, GuestRef, MemoryPeriod, Neighbour, NeighboursFind,
};
use karst_model::{Error, InstanceId, Result, guest::MachineFigures};
use std::{collections::HashMap, time::Duration};

/// A host that takes longer is left out of the answer.
const PATIENCE: Duration = Duration::from_secs(3);
const CALL: Duration = Duration::from_secs(60);
/// Longest that a command of the agent may take; the call has a little more.
pub const AGENT_MAX: Duration = Duration::from_secs(600);

impl Engine {
    /// What a running virtual machine has done; `None` when it does not run, or is none.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub async fn machine_figures(
        &self,
        context: &Context,
        project: &str,
        name: &str,
    ) -> Result<Option<MachineFigures>> {
        let view = self.instance(context, project, name)?;
        if view.status.is_down() {
            return Ok(None);
        }
        let agent = self.inner().agents.get(view.instance.node)?;
        let mut found = agent.machine_figures(&CallContext::read(CALL), vec![view.instance.id]).await?;
        Ok(found.pop().map(|(_, figures)| figures))
    }

    /// The same of all running virtual machines. A host that does not answer is left out.
    pub async fn all_machine_figures(&self) -> HashMap<InstanceId, MachineFigures> {
        let mut all = HashMap::new();
        for (node, agent) in self.inner().agents.all() {
            match agent.machine_figures(&CallContext::read(PATIENCE), vec![]).await {
                Ok(found) => all.extend(found),
                Err(e) => tracing::warn!(%node, error = %e, "a host does not tell what its machines did"),
            }
        }
        all
    }

    /// Runs a command of the QEMU guest agent's protocol in a running virtual machine, and answers what it returns.
    ///
    /// # Errors
    /// Not found, conflict when it does not run, unsupported (a container, a command that the agent does not have),
    /// unavailable without an agent, forbidden.
    pub async fn guest_agent(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        (command, arguments): (&str, serde_json::Value),
        limit: Duration,
    ) -> Result<serde_json::Value> {
        let (view, agent) = self.virtual_machine(context, project, name)?;
        if !arguments.is_object() {
            return Err(Error::invalid("arguments", "the arguments of a command are an object"));
        }
        let limit = limit.min(AGENT_MAX);
        let request = AgentCommand { instance: view.instance.id, command: command.into(), arguments, limit };
        agent.guest_agent(&CallContext::read(limit + CALL), request).await
    }

    /// Interrupts a running virtual machine without regard to masks (NMI).
    ///
    /// # Errors
    /// Those of [`Engine::machine_reset`].
    pub async fn machine_interrupt(&self, context: &Context, project: &str, name: &str) -> Result<()> {
        let (view, agent) = self.virtual_machine(context, project, name)?;
        let generation = view.runtime.as_ref().map_or(view.instance.generation, |r| r.generation);
        let guest = GuestRef { instance: view.instance.id, generation };
        agent.machine_interrupt(&CallContext::read(CALL), guest).await
    }

    /// Has listeners told, once, by [`DISK_THRESHOLD`](crate::events::DISK_THRESHOLD), when a running virtual machine writes behind
    /// a byte of the file or block device that the disk in a slot lies in; 0: not any more.
    ///
    /// # Errors
    /// Those of [`Engine::machine_reset`]; invalid without such a disk or behind any, unsupported for one that is only read.
    pub async fn machine_threshold(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        slot: &str,
        bytes: u64,
    ) -> Result<()> {
        let (view, agent) = self.virtual_machine(context, project, name)?;
        let generation = view.runtime.as_ref().map_or(view.instance.generation, |r| r.generation);
        let guest = GuestRef { instance: view.instance.id, generation };
        let request = DiskThresholdSet { guest, slot: slot.into(), bytes };
        agent.machine_threshold(&CallContext::read(CALL), request).await
    }

    /// How often a running virtual machine tells of its memory, seconds; 0: not at all. Until its end.
    ///
    /// # Errors
    /// Those of [`Engine::machine_reset`], and unsupported without a balloon.
    pub async fn machine_memory_period(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        seconds: u32,
    ) -> Result<()> {
        let (view, agent) = self.virtual_machine(context, project, name)?;
        let generation = view.runtime.as_ref().map_or(view.instance.generation, |r| r.generation);
        let guest = GuestRef { instance: view.instance.id, generation };
        agent.machine_memory_period(&CallContext::read(CALL), MemoryPeriod { guest, seconds }).await
    }

    /// Addresses that the host of an instance knows behind the MAC addresses of its NICs, whoever gave them.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub async fn instance_neighbours(
        &self,
        context: &Context,
        project: &str,
        name: &str,
    ) -> Result<Vec<Neighbour>> {
        let view = self.instance(context, project, name)?;
        let macs = view.instance.identities.values().filter_map(|i| i.mac.clone());
        let find = NeighboursFind { macs: macs.take(NeighboursFind::MOST).collect() };
        let agent = self.inner().agents.get(view.instance.node)?;
        agent.neighbours(&CallContext::read(CALL), find).await
    }

    /// Wakes a virtual machine that sleeps.
    ///
    /// # Errors
    /// Those of [`Engine::machine_reset`].
    pub async fn machine_wake(&self, context: &Context, project: &str, name: &str) -> Result<()> {
        let (view, agent) = self.virtual_machine(context, project, name)?;
        let generation = view.runtime.as_ref().map_or(view.instance.generation, |r| r.generation);
        let guest = GuestRef { instance: view.instance.id, generation };
        agent.machine_wake(&CallContext::read(CALL), guest).await
    }
}
