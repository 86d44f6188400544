//! Projects and profiles: the use cases. Who is trusted, and the server's own configuration, are in the modules below.

pub mod records;
pub mod server;
pub mod tokens;
pub mod trust;

use crate::{Engine, Row, context::Context, inventory::Uses, storage::UsedBy};
use karst_model::{
    Config, Error, Name, ProfileId, ProjectId, Result,
    access::Permission,
    device::{Device, Devices},
    error::nearest,
    instance::Instance,
    keys,
    profile::Profile,
    project::{DEFAULT_PROJECT, Project},
    storage::VolumeOwner,
};

/// Keys of a project.
pub const PROJECT_KEYS: &[&str] =
    &["features.images", "features.networks", "features.profiles", "features.storage.volumes"];

/// What [`crate::db::Tx::touch`] takes for a profile.
pub(crate) fn profile_uses(id: ProfileId) -> String {
    format!("profiles/{id}")
}

/// What [`crate::db::Tx::touch`] takes for a project.
pub(crate) fn project_uses(id: ProjectId) -> String {
    format!("projects/{id}")
}

/// Replaces what a user may set of a profile.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UpdateProfile {
    /// User's text.
    pub description: String,
    /// Configuration as written.
    pub config: Config,
    /// Devices as written.
    pub devices: Devices,
    /// `spec_version` that was read (If-Match).
    pub if_version: Option<u64>,
}

fn check_profile(config: &Config, devices: &Devices) -> Result<()> {
    if let Some(key) = config.keys().find(|k| k.starts_with("volatile.") || k.starts_with("image.")) {
        return Err(Error::invalid(
            format!("config.{key}"),
            format!("{key:?} belongs to instances, not to profiles"),
        ));
    }
    keys::check(config, None)?;
    for (name, keys) in devices {
        Device::parse(name, keys)?;
    }
    Ok(())
}

fn check_project(config: &Config) -> Result<()> {
    for (key, value) in config {
        keys::check_free(key, value)?;
        if key.starts_with("user.") {
            continue;
        }
        if !PROJECT_KEYS.contains(&key.as_str()) {
            let hint = match nearest(key, PROJECT_KEYS.iter().copied()) {
                Some(n) => format!("; did you mean {n:?}?"),
                None => format!("; known are {}, user.*", PROJECT_KEYS.join(", ")),
            };
            return Err(Error::invalid(
                format!("config.{key}"),
                format!("unknown project key {key:?}{hint}"),
            ));
        }
        keys::parse_bool(&format!("config.{key}"), value)?;
        if key == "features.networks" {
            continue;
        }
        if !keys::parse_bool(key, value)? {
            return Err(Error::unsupported(format!(
                "{key}=false is not there yet: every project has its own"
            ))
            .at(format!("config.{key}")));
        }
    }
    Ok(())
}

impl Engine {
    /// All projects that `context` may see, by name.
    pub fn projects(&self, context: &Context) -> Vec<Row<Project>> {
        let records = self.inner().inventory.read();
        let mut all: Vec<_> = records
            .projects
            .values()
            .filter(|p| context.principal().may(Permission::ProjectView, Some(p.id)))
            .cloned()
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// What is in a project.
    pub fn project_used_by(&self, project: &Project) -> UsedBy {
        let records = self.inner().inventory.read();
        let name = &*project.name;
        let suffix = if name == DEFAULT_PROJECT { String::new() } else { format!("?project={name}") };
        let mut used: UsedBy = vec![];
        let of = |p: ProjectId| p == project.id;
        used.extend(
            records
                .instances
                .values()
                .filter(|i| of(i.project))
                .map(|i| format!("/1.0/instances/{}{suffix}", i.name)),
        );
        used.extend(
            records
                .images
                .values()
                .filter(|i| of(i.project))
                .map(|i| format!("/1.0/images/{}{suffix}", i.fingerprint)),
        );
        used.extend(
            records
                .networks
                .values()
                .filter(|n| of(n.project))
                .map(|n| format!("/1.0/networks/{}{suffix}", n.name)),
        );
        let custom = records.volumes.values().filter(|v| of(v.project) && v.owner == VolumeOwner::Custom);
        used.extend(custom.map(|v| crate::volumes::path(&records, v)));
        used.extend(
            records
                .profiles
                .values()
                .filter(|p| of(p.project))
                .map(|p| format!("/1.0/profiles/{}{suffix}", p.name)),
        );
        used
    }

    /// Creates a project with its `default` profile.
    ///
    /// # Errors
    /// Invalid by field, conflict (taken name), forbidden.
    pub async fn project_create(
        &self,
        context: &Context,
        name: &str,
        description: &str,
        config: Config,
    ) -> Result<()> {
        context.demand_server(Permission::ProjectEdit)?;
        let name = Name::parse("name", name)?;
        check_project(&config)?;
        let inner = self.inner();
        let mut full: Config = PROJECT_KEYS.iter().map(|k| ((*k).to_owned(), "true".to_owned())).collect();
        full.insert("features.networks".into(), "false".into());
        full.extend(config);
        let id = inner
            .transact(|records, tx| {
                if records.project(&name).is_ok() {
                    return Err(Error::conflict(format!("a project {:?} exists already", &*name)).at("name"));
                }
                let project = ProjectId(inner.env.uuid());
                let profile = ProfileId(inner.env.uuid());
                tx.take_name("projects", "", &name, &project.to_string());
                tx.create(&Project {
                    id: project,
                    name: name.clone(),
                    description: description.into(),
                    config: full.clone(),
                    spec_version: 1,
                });
                tx.take_name("profiles", &project.to_string(), "default", &profile.to_string());
                tx.create(&Profile {
                    id: profile,
                    project,
                    name: Name::parse("name", "default")?,
                    description: format!("Default Karst profile for project {name}"),
                    config: Config::new(),
                    devices: Devices::new(),
                    spec_version: 1,
                });
                Ok(project)
            })
            .await?;
        inner.announce(context, Some(id), "project-created", format!("/1.0/projects/{name}"));
        Ok(())
    }

    /// Replaces a project's text and configuration.
    ///
    /// # Errors
    /// Invalid by field, not found, precondition failed, forbidden.
    pub async fn project_update(
        &self,
        context: &Context,
        name: &str,
        description: &str,
        config: Config,
        if_version: Option<u64>,
    ) -> Result<()> {
        context.demand_server(Permission::ProjectEdit)?;
        check_project(&config)?;
        let inner = self.inner();
        let id = inner
            .transact(|records, tx| {
                let row = records.project(name)?;
                if if_version.is_some_and(|v| v != row.spec_version) {
                    return Err(Error::precondition_failed(format!(
                        "project {name:?} has changed since it was read; read it again"
                    )));
                }
                let mut project = row.value.clone();
                project.description = description.into();
                project.config = config.clone();
                project.spec_version += 1;
                tx.replace(row, &project);
                Ok(project.id)
            })
            .await?;
        inner.announce(context, Some(id), "project-updated", format!("/1.0/projects/{name}"));
        Ok(())
    }

    /// Renames a project.
    ///
    /// # Errors
    /// Invalid name, not found, conflict (taken, the default project), forbidden.
    pub async fn project_rename(&self, context: &Context, name: &str, new: &str) -> Result<()> {
        context.demand_server(Permission::ProjectEdit)?;
        let new = Name::parse("name", new)?;
        if name == DEFAULT_PROJECT {
            return Err(Error::conflict("the default project cannot be renamed"));
        }
        let inner = self.inner();
        let id = inner
            .transact(|records, tx| {
                let row = records.project(name)?;
                if records.project(&new).is_ok() {
                    return Err(Error::conflict(format!("a project {:?} exists already", &*new)).at("name"));
                }
                let mut project = row.value.clone();
                project.name = new.clone();
                project.spec_version += 1;
                tx.release_name("projects", "", name, &row.id.to_string());
                tx.take_name("projects", "", &new, &row.id.to_string());
                tx.replace(row, &project);
                Ok(project.id)
            })
            .await?;
        inner.announce(context, Some(id), "project-renamed", format!("/1.0/projects/{new}"));
        Ok(())
    }

    /// Deletes an empty project (its `default` profile goes with it).
    ///
    /// # Errors
    /// Not found, conflict when something is in it or it is the default project, forbidden.
    pub async fn project_delete(&self, context: &Context, name: &str) -> Result<()> {
        context.demand_server(Permission::ProjectEdit)?;
        if name == DEFAULT_PROJECT {
            return Err(Error::conflict("the default project cannot be deleted"));
        }
        let inner = self.inner();
        inner
            .transact(|records, tx| {
                let row = records.project(name)?;
                let id = row.id;
                let left = records.instances.values().filter(|i| i.project == id).count()
                    + records.images.values().filter(|i| i.project == id).count()
                    + records.networks.values().filter(|n| n.project == id).count()
                    + records.volumes.values().filter(|v| v.project == id).count()
                    + records.profiles.values().filter(|p| p.project == id && &*p.name != "default").count();
                if left > 0 {
                    return Err(Error::conflict(format!(
                        "project {name:?} is not empty: {left} objects are in it"
                    )));
                }
                tx.expect_untouched(records, &project_uses(id));
                tx.delete_id::<Uses>(&project_uses(id));
                tx.delete(row);
                tx.release_name("projects", "", name, &row.id.to_string());
                for profile in records.profiles.values().filter(|p| p.project == id) {
                    tx.delete_id::<Uses>(&profile_uses(profile.id));
                    tx.delete(profile);
                    tx.release_name("profiles", &id.to_string(), &profile.name, &profile.id.to_string());
                }
                Ok(())
            })
            .await?;
        inner.announce(context, None, "project-deleted", format!("/1.0/projects/{name}"));
        Ok(())
    }

    /// All profiles of a project, by name.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn profiles(&self, context: &Context, project: &str) -> Result<Vec<Row<Profile>>> {
        let project = self.project(context, project, Permission::ProjectView)?;
        let records = self.inner().inventory.read();
        let mut all: Vec<_> =
            records.profiles.values().filter(|p| p.project == project.id).cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// A profile by name.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn profile(&self, context: &Context, project: &str, name: &str) -> Result<Row<Profile>> {
        let project = self.project(context, project, Permission::ProjectView)?;
        self.inner().inventory.read().profile(project.id, name).cloned()
    }

    /// Instances that have a profile, as paths.
    pub fn profile_used_by(&self, profile: &Profile) -> UsedBy {
        let records = self.inner().inventory.read();
        let project = records.projects.get(&profile.project).map(|p| p.name.to_string()).unwrap_or_default();
        let uses = |i: &Instance| i.profiles.contains(&profile.id);
        records
            .instances
            .values()
            .filter(|i| uses(i))
            .map(|i| crate::compute::path(&project, &i.name))
            .collect()
    }

    /// Creates a profile.
    ///
    /// # Errors
    /// Invalid by field, conflict (taken name), forbidden.
    pub async fn profile_create(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        request: UpdateProfile,
    ) -> Result<()> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        let name = Name::parse("name", name)?;
        check_profile(&request.config, &request.devices)?;
        let inner = self.inner();
        inner
            .transact(|records, tx| {
                if records.profile(project.id, &name).is_ok() {
                    return Err(Error::conflict(format!("a profile {:?} exists already", &*name)).at("name"));
                }
                tx.expect(&project);
                tx.touch(&project_uses(project.id));
                let id = ProfileId(inner.env.uuid());
                tx.take_name("profiles", &project.id.to_string(), &name, &id.to_string());
                tx.create(&Profile {
                    id,
                    project: project.id,
                    name: name.clone(),
                    description: request.description.clone(),
                    config: request.config.clone(),
                    devices: request.devices.clone(),
                    spec_version: 1,
                });
                Ok(())
            })
            .await?;
        inner.announce(context, Some(project.id), "profile-created", format!("/1.0/profiles/{name}"));
        Ok(())
    }

    /// Replaces a profile's content. Instances that have it must stay valid with it, else nothing changes; running guests
    /// get it at their next start.
    ///
    /// # Errors
    /// Invalid by field, not found, precondition failed, forbidden.
    pub async fn profile_update(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        request: UpdateProfile,
    ) -> Result<()> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        check_profile(&request.config, &request.devices)?;
        let inner = self.inner();
        inner
            .transact(|records, tx| {
                let row = records.profile(project.id, name)?;
                if request.if_version.is_some_and(|v| v != row.spec_version) {
                    return Err(Error::precondition_failed(format!(
                        "profile {name:?} has changed since it was read; read it again"
                    )));
                }
                let mut profile = row.value.clone();
                profile.description = request.description.clone();
                profile.config = request.config.clone();
                profile.devices = request.devices.clone();
                profile.spec_version += 1;
                for instance in records.instances.values().filter(|i| i.profiles.contains(&profile.id)) {
                    demand_valid(records, tx, instance, &profile)?;
                }
                tx.expect_untouched(records, &profile_uses(profile.id));
                tx.replace(row, &profile);
                Ok(())
            })
            .await?;
        inner.announce(context, Some(project.id), "profile-updated", format!("/1.0/profiles/{name}"));
        Ok(())
    }

    /// Renames a profile.
    ///
    /// # Errors
    /// Invalid name, not found, conflict (taken, `default`), forbidden.
    pub async fn profile_rename(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        new: &str,
    ) -> Result<()> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        let new = Name::parse("name", new)?;
        if name == "default" {
            return Err(Error::conflict("the default profile cannot be renamed"));
        }
        let inner = self.inner();
        inner
            .transact(|records, tx| {
                let row = records.profile(project.id, name)?;
                if records.profile(project.id, &new).is_ok() {
                    return Err(Error::conflict(format!("a profile {:?} exists already", &*new)).at("name"));
                }
                let mut profile = row.value.clone();
                profile.name = new.clone();
                profile.spec_version += 1;
                tx.release_name("profiles", &project.id.to_string(), name, &row.id.to_string());
                tx.take_name("profiles", &project.id.to_string(), &new, &row.id.to_string());
                tx.replace(row, &profile);
                Ok(())
            })
            .await?;
        inner.announce(context, Some(project.id), "profile-renamed", format!("/1.0/profiles/{new}"));
        Ok(())
    }

    /// Deletes a profile that no instance has.
    ///
    /// # Errors
    /// Not found, conflict when it is used or `default`, forbidden.
    pub async fn profile_delete(&self, context: &Context, project: &str, name: &str) -> Result<()> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        if name == "default" {
            return Err(Error::conflict("the default profile cannot be deleted"));
        }
        let inner = self.inner();
        inner
            .transact(|records, tx| {
                let row = records.profile(project.id, name)?;
                if let Some(user) = records.instances.values().find(|i| i.profiles.contains(&row.id)) {
                    return Err(Error::conflict(format!(
                        "profile {name:?} is used by instance {:?}",
                        &*user.name
                    )));
                }
                tx.expect_untouched(records, &profile_uses(row.id));
                tx.delete_id::<Uses>(&profile_uses(row.id));
                tx.delete(row);
                tx.release_name("profiles", &project.id.to_string(), name, &row.id.to_string());
                Ok(())
            })
            .await?;
        inner.announce(context, Some(project.id), "profile-deleted", format!("/1.0/profiles/{name}"));
        Ok(())
    }
}

fn demand_valid(
    records: &crate::Records,
    tx: &mut crate::db::Tx,
    instance: &Instance,
    changed: &Profile,
) -> Result<()> {
    let profiles = instance.profiles.iter().filter_map(|id| {
        if *id == changed.id {
            return Some((&changed.config, &changed.devices));
        }
        records.profiles.get(id).map(|p| (&p.config, &p.devices))
    });
    let (config, devices) = karst_model::profile::expand(profiles, (&instance.config, &instance.devices));
    let because = |e: Error| Error {
        message: format!("instance {:?} would be invalid: {}", &*instance.name, e.message),
        ..e
    };
    keys::limits(&config).map_err(because)?;
    let parsed = crate::compute::expand::parse_devices(&devices).map_err(because)?;
    let (name, root) = &parsed.root;
    crate::compute::disks::check_disks(records, tx, instance, &parsed).map_err(because)?;
    if records.pool(&root.pool).map_err(because)?.id != instance.pool {
        return Err(Error::conflict(format!(
            "instance {:?} would change its pool by device {name:?}",
            &*instance.name
        )));
    }
    for (device, nic) in &parsed.nics {
        records.network(&nic.network).map_err(|e| because(e.at(format!("devices.{device}.network"))))?;
    }
    Ok(())
}
