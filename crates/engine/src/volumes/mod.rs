//! Custom volumes: the use cases. A volume belongs to a project and a pool; instances attach it by a device that names
//! both. Volumes of instances and images follow their owners and are not changed here.

pub mod content;
pub mod copy;
pub mod create;
pub mod delete;
pub mod files;
pub mod relocate;
pub mod update;

use crate::{Engine, EngineInner, Records, Row, context::Context, db::Tx};
use karst_model::{
    Error, InstanceId, Missing, Name, ProjectId, Result, VolumeId,
    access::Permission,
    device::{Devices, kernel_names},
    instance::{DeviceIdentity, Instance},
    profile::Profile,
    project::{DEFAULT_PROJECT, Project},
    storage::{Pool, Volume},
};
use std::collections::{BTreeMap, BTreeSet};

/// Lock target of a custom volume.
pub fn lock(id: VolumeId) -> String {
    format!("volumes/{id}")
}

/// Scope of the names of custom volumes: unique within project and pool.
pub(crate) fn scope(volume: &Volume) -> String {
    format!("{}:{}", volume.project, volume.pool)
}

/// Path of a custom volume in the API.
pub(crate) fn path(records: &Records, volume: &Volume) -> String {
    let pool = records.pools.get(&volume.pool).map(|p| p.name.to_string()).unwrap_or_default();
    let project = records.projects.get(&volume.project).map(|p| p.name.to_string()).unwrap_or_default();
    let suffix = if project == DEFAULT_PROJECT { String::new() } else { format!("?project={project}") };
    format!("/1.0/storage-pools/{pool}/volumes/custom/{}{suffix}", volume.name)
}

/// Who names a volume in a device.
pub struct Users {
    /// Instances, by their own devices or those of profiles, also those that a running guest still has.
    pub instances: Vec<Row<Instance>>,
    /// Profiles.
    pub profiles: Vec<Row<Profile>>,
}

impl Users {
    /// Those that `context` may see.
    #[must_use]
    pub fn visible_to(mut self, context: &Context) -> Self {
        let sees = |p: ProjectId| context.principal().may(Permission::ProjectView, Some(p));
        self.instances.retain(|i| sees(i.project));
        self.profiles.retain(|p| sees(p.project));
        self
    }

    /// Nobody?
    pub fn is_empty(&self) -> bool {
        self.instances.is_empty() && self.profiles.is_empty()
    }

    /// As paths of the API.
    pub fn paths(&self, records: &Records) -> Vec<String> {
        let project =
            |id: ProjectId| records.projects.get(&id).map(|p| p.name.to_string()).unwrap_or_default();
        let instances = self.instances.iter().map(|i| crate::compute::path(&project(i.project), &i.name));
        let profiles = self.profiles.iter().map(|p| match project(p.project) {
            name if name == DEFAULT_PROJECT => format!("/1.0/profiles/{}", p.name),
            name => format!("/1.0/profiles/{}?project={name}", p.name),
        });
        let mut all: Vec<_> = instances.chain(profiles).collect();
        all.sort();
        all
    }
}

/// Who uses a custom volume.
pub fn users(records: &Records, volume: &Volume) -> Users {
    let Some(pool) = records.pools.get(&volume.pool) else {
        return Users { instances: vec![], profiles: vec![] };
    };
    let is_kernel = |keys: &BTreeMap<String, String>| {
        keys.get("type").is_some_and(|t| t == "kernel") && kernel_names(keys, &pool.name, &volume.name)
    };
    let says = |devices: &Devices| has_disk(devices, pool, volume) || devices.values().any(is_kernel);
    let names =
        |devices: &Devices, project| records.volume_project(project) == volume.project && says(devices);
    // Profiles and volumes may be another project's each: what a profile means by a name, who has it decides.
    let profiles: Vec<_> = records.profiles.values().filter(|p| says(&p.devices)).cloned().collect();
    // Those of which a device names it, theirs or their profile's, and those that run: of thousands, few.
    let own = records.instances_naming(&volume.name);
    let running = records.runtimes.values().filter(|r| r.applied.is_some()).map(|r| r.instance);
    let mut near: BTreeSet<InstanceId> = own.chain(running).collect();
    if !profiles.is_empty() {
        let has = |i: &&Row<Instance>| profiles.iter().any(|p| i.profiles.contains(&p.id));
        near.extend(records.instances.values().filter(has).map(|i| i.id));
    }
    let instances = near.iter().filter_map(|id| records.instances.get(id)).filter(|i| {
        // What the profiles say counts unless the instance masks it: look closer only where there is a chance.
        let chance = names(&i.devices, i.project) || profiles.iter().any(|p| i.profiles.contains(&p.id));
        // A running guest has what it was given until it gives it back, whatever its record says for the next start. A
        // kernel it was given when it started: there is nothing left to give back.
        chance && names(&records.expanded(i).1, i.project) || runs_with(records, pool, volume, i)
    });
    let instances = instances.cloned().collect();
    let own = |p: &Row<Profile>| records.volume_project(p.project) == volume.project;
    Users { instances, profiles: profiles.into_iter().filter(own).collect() }
}

/// Do these devices have the volume as a disk?
fn has_disk(devices: &Devices, pool: &Pool, volume: &Volume) -> bool {
    disks_of(devices, pool, volume).next().is_some()
}

/// The names of the disks among these devices that are the volume.
fn disks_of<'a>(
    devices: &'a Devices,
    pool: &'a Pool,
    volume: &'a Volume,
) -> impl Iterator<Item = &'a String> + 'a {
    fn is(keys: &BTreeMap<String, String>, key: &str, value: &str) -> bool {
        keys.get(key).is_some_and(|v| v == value)
    }
    let all = devices.iter().filter(move |(_, d)| {
        is(d, "type", "disk") && is(d, "pool", &pool.name) && is(d, "source", &volume.name)
    });
    all.map(|(name, _)| name)
}

/// The bus slots at which an instance has the volume, in its record or as it runs.
pub(crate) fn slots_of(records: &Records, volume: &Volume, instance: &Instance) -> Vec<String> {
    let Some(pool) = records.pools.get(&volume.pool) else { return vec![] };
    let expanded = records.expanded(instance).1;
    let applied = records.runtimes.get(&instance.id).and_then(|r| r.applied.as_ref());
    let slots = |devices: &Devices, identities: &BTreeMap<String, DeviceIdentity>| -> Vec<String> {
        let names = disks_of(devices, pool, volume);
        names.filter_map(|name| Some(identities.get(name)?.slot.clone())).collect()
    };
    let mut all = slots(&expanded, &instance.identities);
    // What runs may be known by another slot than its next start.
    all.extend(applied.into_iter().flat_map(|a| slots(&a.devices, &a.known_by(&instance.identities))));
    all
}

/// Has the guest of the instance, which runs, the volume as a disk?
fn runs_with(records: &Records, pool: &Pool, volume: &Volume, instance: &Instance) -> bool {
    let applied = records.runtimes.get(&instance.id).and_then(|r| r.applied.as_ref());
    records.volume_project(instance.project) == volume.project
        && applied.is_some_and(|a| has_disk(&a.devices, pool, volume))
}

/// Instances that have it as a disk, in their records or as they run: fewer than [`users`], of which some only start with a
/// kernel that is in it. That is read when they start, so it is neither shared with them then nor changed by them.
pub fn attached(records: &Records, volume: &Volume) -> Vec<Row<Instance>> {
    let Some(pool) = records.pools.get(&volume.pool) else { return vec![] };
    let users = users(records, volume).instances.into_iter();
    let has = |i: &Row<Instance>| {
        has_disk(&records.expanded(i).1, pool, volume) || runs_with(records, pool, volume, i)
    };
    users.filter(has).collect()
}

/// Has the guest of an instance a process, be it that it stands still or that an error halted it? Then its disks are open.
pub(crate) fn runs(records: &Records, instance: &Instance) -> bool {
    let status = instance.status(records.runtimes.get(&instance.id).map(|r| &r.value));
    !status.is_down()
}

impl crate::Engine {
    /// The project of a request that changes custom volumes. Where they are those of the default project, the caller must
    /// be allowed to change them there too: a project that shares them gives no power over them.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub(crate) fn volume_editor(&self, context: &Context, project: &str) -> Result<Row<Project>> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        self.demand_volume_editor(context, &project)?;
        Ok(project)
    }

    /// As [`Self::volume_editor`], but the project that has the volumes: whose limits and restrictions count.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub(crate) fn volume_home(&self, context: &Context, project: &str) -> Result<Row<Project>> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        self.demand_volume_editor(context, &project)?;
        let records = self.inner().inventory.read();
        let home = records.projects.get(&records.volume_project(project.id)).cloned();
        Ok(home.unwrap_or(project))
    }

    fn demand_volume_editor(&self, context: &Context, project: &Project) -> Result<()> {
        let records = self.inner().inventory.read();
        let owner = records.volume_project(project.id);
        if !context.principal().may(Permission::ResourceEdit, Some(owner)) {
            return Err(Error::forbidden(format!(
                "the custom volumes of project {:?} are those of project {DEFAULT_PROJECT:?}, which you may not change",
                &*project.name
            )));
        }
        Ok(())
    }
}

impl Records {
    /// The same as [`Records::custom_volume`], as an error for the user when there is none.
    pub(crate) fn demand_volume(&self, project: ProjectId, pool: &str, name: &str) -> Result<&Row<Volume>> {
        self.pool(pool)?;
        self.custom_volume(project, pool, name).ok_or_else(|| {
            let text = format!("custom volume {name:?} not found in pool {pool:?}");
            Error::missing(Missing::Volume, text)
        })
    }
}

impl Engine {
    /// A custom volume by name.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn custom_volume(
        &self,
        context: &Context,
        project: &str,
        pool: &str,
        name: &str,
    ) -> Result<Row<Volume>> {
        let project = self.project(context, project, Permission::ProjectView)?;
        self.inner().inventory.read().demand_volume(project.id, pool, name).cloned()
    }
}

impl EngineInner {
    /// The current row of a volume that a saga works on.
    pub(crate) fn volume_row(&self, id: VolumeId) -> Result<Row<Volume>> {
        let row = self.inventory.read().volumes.get(&id).cloned();
        row.ok_or_else(|| Error::not_found("the volume is gone").with_context(id))
    }
}

/// Of a transaction that makes a custom volume of a project in a pool: the name is free, both are as they were read, and whoever
/// counts or removes them learns of it. Answers the project that the volume belongs to.
pub(crate) fn begin_new(
    records: &Records,
    tx: &mut Tx,
    project: &Row<Project>,
    pool: &Row<Pool>,
    name: &Name,
) -> Result<ProjectId> {
    demand_free(records, project, pool, name)?;
    tx.expect(project);
    crate::storage::use_pool(tx, pool)?;
    let owner = records.volume_project(project.id);
    tx.touch(&crate::tenancy::project_uses(owner));
    Ok(owner)
}

/// A free name for a volume of a pool.
pub(crate) fn demand_free(records: &Records, project: &Project, pool: &Pool, name: &Name) -> Result<()> {
    match records.custom_volume(project.id, &pool.name, name) {
        None => Ok(()),
        Some(_) => Err(Error::conflict(format!(
            "a custom volume {:?} exists already in pool {:?}",
            &**name, &*pool.name
        ))
        .at("name")),
    }
}
