//! Projects: the use cases.

use super::{
    limits, profile_uses, project_uses,
    rules::{FEATURES, ProjectRules},
};
use crate::{Engine, Records, Row, context::Context, inventory::Uses, storage::UsedBy};
use karst_model::{
    Config, Error, Name, ProfileId, ProjectId, Result,
    access::Permission,
    device::Devices,
    profile::Profile,
    project::{DEFAULT_PROJECT, Project, new_features},
    storage::VolumeOwner,
};

/// Features that a project cannot switch: what is refused, rather than taken and not kept.
fn demand_supported(config: &Config) -> Result<()> {
    for (key, wanted, why) in [
        ("features.networks.zones", false, "DNS zones are not there"),
        ("features.storage.buckets", true, "every project has its own"),
    ] {
        if config.contains_key(key) && ProjectRules::has(config, key) != wanted {
            let text = format!("{key} can only be {wanted}: {why}");
            return Err(Error::unsupported(text).at(format!("config.{key}")));
        }
    }
    Ok(())
}

/// How many things are in a project, beside its `default` profile.
fn content(records: &Records, id: ProjectId) -> usize {
    records.instances.values().filter(|i| i.project == id).count()
        + records.images.values().filter(|i| i.project == id).count()
        + records.networks.values().filter(|n| n.project == id).count()
        + records.acls.values().filter(|a| a.project == id).count()
        + records.address_sets.values().filter(|s| s.project == id).count()
        + records.volumes.values().filter(|v| v.project == id).count()
        + records.profiles.values().filter(|p| p.project == id && &*p.name != "default").count()
        + crate::secrets::written(records, id)
        + crate::images::registries::logins(records, id)
}

/// What is shared and what is not stays so while anything is there: it would be lost from sight.
fn demand_same_features(records: &Records, project: &Project, config: &Config) -> Result<()> {
    for (feature, _) in FEATURES {
        if ProjectRules::has(&project.config, feature) == ProjectRules::has(config, feature) {
            continue;
        }
        let why = if *project.name == *DEFAULT_PROJECT {
            "the features of the default project cannot be changed".to_owned()
        } else if content(records, project.id) > 0 {
            format!("project {:?} is not empty; its features can be changed when it is", &*project.name)
        } else {
            continue;
        };
        return Err(Error::conflict(why).at(format!("config.{feature}")));
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
                .map(|n| records.path_in("networks", &n.name, n.project)),
        );
        let acls = records.acls.values().filter(|a| of(a.project));
        used.extend(acls.map(|a| records.path_in("network-acls", &a.name, a.project)));
        let sets = records.address_sets.values().filter(|s| of(s.project));
        used.extend(sets.map(|s| records.path_in("network-address-sets", &s.name, s.project)));
        used.extend(
            records
                .profiles
                .values()
                .filter(|p| of(p.project) && ProjectRules::has(&project.config, "features.profiles"))
                .map(|p| format!("/1.0/profiles/{}{suffix}", p.name)),
        );
        let secrets = records.secrets.values().filter(|s| of(s.project));
        used.extend(secrets.map(|s| crate::secrets::path(name, s.uuid)));
        let logins = records.registry_logins.values().filter(|l| of(l.project));
        used.extend(logins.map(|l| crate::images::registries::path(name, &l.host)));
        let custom = records.volumes.values().filter(|v| of(v.project) && v.owner == VolumeOwner::Custom);
        used.extend(custom.map(|v| crate::volumes::path(&records, v)));
        used
    }

    /// What a project uses beside its limits: name of the limit without `limits.`, limit, use. Sizes are in bytes.
    ///
    /// # Errors
    /// Not found, also when it may not be seen.
    pub fn project_state(&self, context: &Context, name: &str) -> Result<Vec<(String, Option<u64>, u64)>> {
        let project = self.project(context, name, Permission::ProjectView)?;
        Ok(limits::state(&self.inner().inventory.read(), &project))
    }

    /// Settings that only a host can tell right from wrong.
    fn demand_settings(&self, context: &Context, rules: &ProjectRules) -> Result<()> {
        match &rules.settings.architecture {
            Some(named) => self
                .demand_architecture(context, None, named)
                .map_err(|e| e.at("config.images.default_architecture")),
            None => Ok(()),
        }
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
        self.demand_settings(context, &ProjectRules::parse(&config)?)?;
        let inner = self.inner();
        let mut full: Config = new_features().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
        full.extend(config);
        demand_supported(&full)?;
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
        let rules = ProjectRules::parse(&config)?;
        self.demand_settings(context, &rules)?;
        if name != DEFAULT_PROJECT {
            demand_supported(&config)?;
        }
        let inner = self.inner();
        let id = inner
            .transact(|records, tx| {
                let row = records.project(name)?;
                if if_version.is_some_and(|v| v != row.spec_version) {
                    return Err(Error::precondition_failed(format!(
                        "project {name:?} has changed since it was read; read it again"
                    )));
                }
                demand_same_features(records, row, &config)?;
                limits::demand_conforming(records, tx, row, &rules)?;
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
        let held = inner.inventory.read().project(name)?.id;
        let held = inner.vault.count(held);
        inner
            .transact(|records, tx| {
                let row = records.project(name)?;
                let id = row.id;
                let left = content(records, id) + held;
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
}
