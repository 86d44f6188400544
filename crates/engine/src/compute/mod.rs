//! Instances: the use cases.

pub(crate) mod addresses;
pub mod applied;
pub mod copy;
pub mod create;
pub mod define;
pub mod delete;
pub mod disk_copy;
pub mod disks;
pub mod display;
pub mod expand;
pub(crate) mod given;
pub mod guest;
pub mod inside;
pub(crate) mod labels;
pub mod memory;
pub mod memory_files;
pub mod metrics;
pub mod monitor;
pub(crate) mod nic_checks;
pub(crate) mod nics;
pub mod outputs;
pub mod power;
pub mod rebuild;
pub mod refresh;
pub mod relocate;
pub mod run;
pub mod shutdown;
pub mod slots;
pub(crate) mod states;
pub mod templates;
pub mod update;
pub(crate) mod vmids;

use crate::{Engine, EngineInner, InstanceView, Records, Row, context::Context, db::Tx};
use karst_model::{
    Error, InstanceId, ProjectId, Result,
    access::Permission,
    guest::Observed,
    instance::{ExitReason, Instance, Runtime, RuntimeState, Status},
    spec::GuestSpec,
};
use std::sync::Arc;

/// Path of an instance in the API, for operations and events.
pub fn path(project: &str, name: &str) -> String {
    if project == karst_model::project::DEFAULT_PROJECT {
        format!("/1.0/instances/{name}")
    } else {
        format!("/1.0/instances/{name}?project={project}")
    }
}

/// Lock target of an instance; covers its volumes and snapshots.
pub fn lock(id: InstanceId) -> String {
    format!("instances/{id}")
}

impl Engine {
    /// All instances of a project that `context` may see, by name.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn instances(&self, context: &Context, project: &str) -> Result<Vec<Arc<InstanceView>>> {
        let project = self.project(context, project, Permission::ProjectView)?;
        let inventory = &self.inner().inventory;
        let records = inventory.read();
        let range = (project.id, String::new())..;
        Ok(records
            .instance_names
            .range(range)
            .take_while(|((p, _), _)| *p == project.id)
            .filter_map(|(_, id)| inventory.view(&records, *id))
            .collect())
    }

    /// All instances of all projects that `context` may see.
    pub fn instances_all(&self, context: &Context) -> Vec<Arc<InstanceView>> {
        let inventory = &self.inner().inventory;
        let records = inventory.read();
        records
            .instance_names
            .iter()
            .filter(|((p, _), _)| context.principal().may(Permission::ProjectView, Some(*p)))
            .filter_map(|(_, id)| inventory.view(&records, *id))
            .collect()
    }

    /// An instance by name.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn instance(&self, context: &Context, project: &str, name: &str) -> Result<Arc<InstanceView>> {
        self.find(context, project, name, Permission::ProjectView)
    }

    /// An instance by name, when `context` may `permission` in its project.
    pub(crate) fn find(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        permission: Permission,
    ) -> Result<Arc<InstanceView>> {
        let project = self.project(context, project, permission)?;
        let inventory = &self.inner().inventory;
        let records = inventory.read();
        let id = records.instance(&project, name)?.id;
        inventory.view(&records, id).ok_or_else(|| Error::not_found(format!("instance {name:?} not found")))
    }
}

/// An instance that stands in the way of something of the project `from`, for an error: one of another project is not named,
/// because who may change what projects share need not see what is in them.
pub(crate) fn called(from: ProjectId, instance: &Instance) -> String {
    match instance.project == from {
        true => format!("instance {:?}", &*instance.name),
        false => "an instance of another project".into(),
    }
}

impl Records {
    /// Why the guest of an instance stands still though nobody asked for that, in words.
    pub(crate) fn why_halted(&self, instance: &Instance) -> Option<String> {
        let runtime = self.runtimes.get(&instance.id)?;
        let halted = instance.status(Some(&runtime.value)) == Status::Error;
        let halt = runtime.halt.as_ref().filter(|_| halted)?;
        Some(halt.words(|slot| self.disk_at(instance, slot)))
    }

    /// Why an instance is as it is, in words, where nobody asked for it: what halted it, or how it ended by itself.
    pub(crate) fn why(&self, instance: &Instance) -> Option<String> {
        let runtime = self.runtimes.get(&instance.id)?;
        match (instance.status(Some(&runtime.value)), &runtime.exit) {
            (Status::Error, _) => Some(
                self.why_halted(instance).unwrap_or_else(|| "an error halted it; look at its log".to_owned()),
            ),
            (Status::Stopped, Some(ExitReason::Crashed { detail })) => Some(detail.clone()),
            _ => None,
        }
    }

    /// The disk at a slot in the user's words.
    fn disk_at(&self, instance: &Instance, slot: &str) -> Option<String> {
        let applied = self.runtimes.get(&instance.id).and_then(|r| r.applied.as_ref());
        let identities =
            applied.map_or_else(|| instance.identities.clone(), |a| a.known_by(&instance.identities));
        let (name, _) = identities.iter().find(|(_, identity)| identity.slot == slot)?;
        let devices = applied.map_or_else(|| self.expanded(instance).1, |a| a.devices.clone());
        let pool = devices.get(name).and_then(|keys| keys.get("pool"));
        Some(match pool {
            Some(pool) => format!("disk {name:?} on pool {pool:?}"),
            None => format!("disk {name:?}"),
        })
    }
}

impl EngineInner {
    /// The current row of an instance that a saga works on.
    pub(crate) fn instance_row(&self, id: InstanceId) -> Result<Row<Instance>> {
        self.inventory
            .read()
            .instances
            .get(&id)
            .cloned()
            .ok_or_else(|| Error::not_found("the instance is gone").with_context(id))
    }

    /// The next runtime record out of what a host saw.
    pub(crate) fn runtime_of(&self, records: &Records, observed: &Observed) -> Runtime {
        let old = records.runtimes.get(&observed.instance);
        Runtime {
            instance: observed.instance,
            generation: observed.generation,
            seq: old.filter(|o| o.generation == observed.generation).map_or(1, |o| o.seq + 1),
            state: observed.state,
            pid: observed.pid,
            domain_id: observed.domain_id,
            started_at: observed.started_at.and_then(|s| jiff::Timestamp::from_second(s).ok()),
            exit: observed.exit.clone(),
            halt: observed.halt.clone(),
            applied_spec_version: observed.applied_spec_version,
            applied: self.applied_of(records, observed.instance, observed.generation, observed.state),
            accelerator: observed.accelerator.clone(),
            since: old.filter(|o| o.generation == observed.generation).and_then(|o| o.since),
            screens: old
                .filter(|o| o.generation == observed.generation)
                .map(|o| o.screens.clone())
                .unwrap_or_default(),
        }
    }

    /// Notes that guests run again which stood still for a step of a saga, unless that is known, or that they have ended since.
    pub(crate) fn note_resumed(&self, records: &Records, resumed: &[Observed], tx: &mut Tx) {
        for observed in resumed {
            let runtime = self.runtime_of(records, observed);
            let known = records.runtimes.get(&observed.instance).is_some_and(|r| {
                r.generation == runtime.generation
                    && (r.state == RuntimeState::Stopped || r.state == runtime.state)
            });
            if !known {
                tx.put(&runtime);
            }
        }
    }

    /// The specification of an instance as a host gets it.
    pub(crate) fn guest_spec(
        &self,
        records: &Records,
        instance: &Instance,
        domain_id: u32,
    ) -> Result<GuestSpec> {
        let (config, devices) = records.expanded(instance);
        let lookups = expand::Lookups {
            network: &|name| records.network(instance.project, name).ok().cloned(),
            bridge: &|name| Ok(records.network_by_bridge(instance.project, name)?.cloned()),
            volume: &|pool, name| records.custom_volume(instance.project, pool, name).cloned(),
            location: records.nodes.get(&instance.node).map_or("", |n| &*n.name),
            filters: records.filters_of(instance.project),
        };
        expand::guest_spec(instance, &config, &devices, domain_id, &lookups)
    }

    /// Conflict when an instance with `name` exists in the project.
    pub(crate) fn demand_free_name(&self, records: &Records, project: ProjectId, name: &str) -> Result<()> {
        if records.instance_names.contains_key(&(project, name.to_owned())) {
            return Err(Error::conflict(format!("an instance {name:?} exists already")).at("name"));
        }
        Ok(())
    }
}
