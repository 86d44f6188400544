//! Profiles: the use cases. A change reaches all users of a profile or none.

use super::{
    limits::{Planned, admit},
    profile_update::{ProfilePlan, ProfileUpdate, demand_valid},
    profile_uses,
};
use crate::{
    Engine, Records, Row,
    compute::called,
    context::Context,
    db::Tx,
    inventory::Uses,
    operations::{LiveOperation, NewOperation},
    saga::runner,
    storage::UsedBy,
};
use karst_model::{
    Config, Error, Name, ProfileId, ProjectId, Result,
    access::Permission,
    device::{Device, Devices},
    keys,
    profile::Profile,
};

/// What makes a project have profiles of its own.
const FEATURE: &str = "features.profiles";

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

/// Networks and pools that a profile names have to be there.
fn demand_named(records: &Records, project: ProjectId, devices: &Devices) -> Result<()> {
    for (name, keys) in devices {
        let kind = keys.get("type").map_or("", String::as_str);
        let named = |key: &str| keys.get(key).filter(|v| !v.is_empty());
        if let (Some(network), "nic") = (named("network"), kind) {
            records.network(project, network).map_err(|e| e.at(format!("devices.{name}.network")))?;
        }
        let pools: &[&str] = match kind {
            "disk" => &["pool"],
            "kernel" => &["pool", "initrd.pool"],
            _ => &[],
        };
        for key in pools {
            if let Some(pool) = named(key) {
                records.pool(pool).map_err(|e| e.at(format!("devices.{name}.{key}")))?;
            }
        }
    }
    Ok(())
}

impl Engine {
    /// All profiles of a project, by name.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn profiles(&self, context: &Context, project: &str) -> Result<Vec<Row<Profile>>> {
        let project = self.project_of(context, project, FEATURE, Permission::ProjectView)?;
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
        let project = self.project_of(context, project, FEATURE, Permission::ProjectView)?;
        self.inner().inventory.read().profile(project.id, name).cloned()
    }

    /// Instances that have a profile, as paths, as far as `context` may see them.
    pub fn profile_used_by(&self, context: &Context, profile: &Profile) -> UsedBy {
        let records = self.inner().inventory.read();
        let users = records.instances.values().filter(|i| i.profiles.contains(&profile.id));
        users
            .filter(|i| context.principal().may(Permission::ProjectView, Some(i.project)))
            .map(|i| {
                let project = records.projects.get(&i.project).map(|p| p.name.to_string());
                crate::compute::path(&project.unwrap_or_default(), &i.name)
            })
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
        let project = self.project_of(context, project, FEATURE, Permission::ResourceEdit)?;
        let name = Name::parse("name", name)?;
        check_profile(&request.config, &request.devices)?;
        let inner = self.inner();
        inner
            .transact(|records, tx| {
                if records.profile(project.id, &name).is_ok() {
                    return Err(Error::conflict(format!("a profile {:?} exists already", &*name)).at("name"));
                }
                demand_named(records, project.id, &request.devices)?;
                records.demand_seen_acls(context, &project, &request.devices)?;
                let id = ProfileId(inner.env.uuid());
                let profile = Profile {
                    id,
                    project: project.id,
                    name: name.clone(),
                    description: request.description.clone(),
                    config: request.config.clone(),
                    devices: request.devices.clone(),
                    spec_version: 1,
                };
                admit(records, tx, project.id, &Planned { profile: Some(&profile), ..Default::default() })?;
                tx.take_name("profiles", &project.id.to_string(), &name, &id.to_string());
                tx.create(&profile);
                Ok(())
            })
            .await?;
        inner.announce(context, Some(project.id), "profile-created", format!("/1.0/profiles/{name}"));
        Ok(())
    }

    /// Replaces a profile's content, for all of its users or none: they must stay valid with it and within the limits of
    /// their projects, and running guests get its devices at once, and of its configuration what can change live.
    ///
    /// # Errors
    /// Invalid by field, not found, precondition failed, forbidden; what refuses it is named. Conflict when a user is busy
    /// and stays so, or cannot take a device while it runs.
    pub async fn profile_update(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        request: UpdateProfile,
    ) -> Result<()> {
        let operation = self.profile_update_begin(context, project, name, request).await?;
        match &operation.ended().await.error {
            None => Ok(()),
            Some(e) => Err(e.clone()),
        }
    }

    /// As [`Engine::profile_update`]; answers the operation, which may be running.
    ///
    /// # Errors
    /// What can be said before anything is touched.
    pub async fn profile_update_begin(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        request: UpdateProfile,
    ) -> Result<LiveOperation> {
        let project = self.project_of(context, project, FEATURE, Permission::ResourceEdit)?;
        check_profile(&request.config, &request.devices)?;
        let inner = self.inner();
        runner::start::<ProfileUpdate>(inner, context, |tx| {
            let records = inner.inventory.read();
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
            tx.expect(row);
            // Decided when it is written; said now, before anything is touched.
            demand_named(&records, project.id, &profile.devices)?;
            records.demand_seen_acls(context, &project, &profile.devices)?;
            let mut asked = Tx::default();
            demand_valid(inner, &records, &mut asked, &profile)?;
            if !asked.fits_an_end() {
                return Err(Error::too_large(format!(
                    "profile {name:?} has users in so many projects, or with so many different devices, that they cannot all be                      asked at once; give some of them another profile"
                )));
            }
            let path = match &*project.name {
                karst_model::project::DEFAULT_PROJECT => format!("/1.0/profiles/{name}"),
                other => format!("/1.0/profiles/{name}?project={other}"),
            };
            let new = NewOperation::task("Updating profile", Some(project.id), "profiles", path.clone());
            Ok((ProfilePlan { profile, path }, new))
        })
        .await
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
        let project = self.project_of(context, project, FEATURE, Permission::ResourceEdit)?;
        let new = Name::parse("name", new)?;
        if name == "default" {
            return Err(Error::conflict("the default profile cannot be renamed"));
        }
        let inner = self.inner();
        inner
            .transact(|records, tx| {
                let row = records.profile(project.id, name)?;
                demand_idle(records, tx, row.id)?;
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
        let project = self.project_of(context, project, FEATURE, Permission::ResourceEdit)?;
        if name == "default" {
            return Err(Error::conflict("the default profile cannot be deleted"));
        }
        let inner = self.inner();
        inner
            .transact(|records, tx| {
                let row = records.profile(project.id, name)?;
                demand_idle(records, tx, row.id)?;
                let users = records.instances.values().filter(|i| i.profiles.contains(&row.id));
                if let Some(user) = users.min_by(|a, b| a.name.cmp(&b.name)) {
                    return Err(Error::conflict(format!(
                        "profile {name:?} is used by {}",
                        called(row.project, user)
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

/// Nobody changes the profile now, nor until the transaction.
pub(crate) fn demand_idle(records: &Records, tx: &mut Tx, id: ProfileId) -> Result<()> {
    runner::demand_unlocked(records, &[profile_uses(id)])?;
    tx.expect_unlocked(&profile_uses(id));
    Ok(())
}
