//! Profiles: the use cases. A change reaches all users of a profile or none.

use super::{
    limits::{Planned, admit},
    profile_uses,
};
use crate::{
    Engine, EngineInner, Records, Row,
    compute::{called, expand},
    context::Context,
    db::Tx,
    inventory::Uses,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    storage::UsedBy,
};
use async_trait::async_trait;
use karst_model::{
    Config, Error, ErrorKind, Name, NodeId, ProfileId, Result,
    access::Permission,
    device::{Device, Devices},
    instance::{Instance, Status},
    keys,
    profile::Profile,
    spec::GuestSpec,
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, time::Duration};

/// What makes a project have profiles of its own.
const FEATURE: &str = "features.profiles";
/// Time for a change of one running guest.
const APPLY: Duration = Duration::from_secs(30);

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
fn demand_named(records: &Records, devices: &Devices) -> Result<()> {
    for (name, keys) in devices {
        let kind = keys.get("type").map_or("", String::as_str);
        let named = |key: &str| keys.get(key).filter(|v| !v.is_empty());
        if let (Some(network), "nic") = (named("network"), kind) {
            records.network(network).map_err(|e| e.at(format!("devices.{name}.network")))?;
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
                demand_named(records, &request.devices)?;
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
    /// their projects, and running guests get at once what can change live. NICs come with a guest's next start.
    ///
    /// # Errors
    /// Invalid by field, not found, precondition failed, forbidden; what refuses it is named. Conflict when a user is busy
    /// and stays so.
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
            demand_named(&records, &profile.devices)?;
            demand_valid(inner, &records, &mut Tx::default(), &profile)?;
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
                if let Some(user) = records.instances.values().find(|i| i.profiles.contains(&row.id)) {
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

/// Every user stays valid with the profile as it is to be, and every project of theirs within its limits; `tx` holds as
/// long as that is so.
fn demand_valid(engine: &EngineInner, records: &Records, tx: &mut Tx, profile: &Profile) -> Result<()> {
    let mut projects = BTreeSet::from([profile.project]);
    for instance in records.instances.values().filter(|i| i.profiles.contains(&profile.id)) {
        demand_valid_user(engine, records, tx, instance, profile)?;
        projects.insert(instance.project);
    }
    for project in projects {
        admit(records, tx, project, &Planned { profile: Some(profile), ..Default::default() })?;
    }
    tx.expect_untouched(records, &profile_uses(profile.id));
    Ok(())
}

fn demand_valid_user(
    engine: &EngineInner,
    records: &Records,
    tx: &mut Tx,
    instance: &Instance,
    changed: &Profile,
) -> Result<()> {
    let (config, devices) = super::limits::expanded(records, instance, Some(changed));
    let because = |e: Error| Error {
        message: format!("{} would be invalid: {}", called(changed.project, instance), e.message),
        ..e
    };
    keys::limits(&config).map_err(because)?;
    let parsed = crate::compute::expand::parse_devices(&devices).map_err(because)?;
    // What does not change was asked when it came.
    if records.expanded(instance).1 == devices {
        return Ok(());
    }
    let (name, root) = &parsed.root;
    crate::compute::disks::check_disks(records, tx, instance, &parsed).map_err(because)?;
    if records.pool(&root.pool).map_err(because)?.id != instance.pool {
        return Err(Error::conflict(format!(
            "{} would change its pool by device {name:?}",
            called(changed.project, instance)
        )));
    }
    let mut now = instance.clone();
    now.identities = engine.assign_identities(
        records,
        &instance.identities,
        &parsed,
        instance.hardware.as_ref(),
        instance.root,
    );
    engine.check_nics_besides(records, tx, &now, &parsed, Some(changed.id)).map_err(because)
}

/// Plan of [`ProfileUpdate`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProfilePlan {
    /// As it is to be.
    profile: Profile,
    path: String,
}

/// Changes a profile and what its running users have of it. The profile's lock keeps users from changing and from coming;
/// the first step waits for those who were at it before. So what each had and is to have can be computed from the
/// records at any time, and the plan stays small however many there are.
pub struct ProfileUpdate;

/// How long a user of the profile may stay busy.
const SETTLE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(50);

/// A running user: where, what it has, what it is to have.
struct User {
    /// For errors.
    name: String,
    node: NodeId,
    before: GuestSpec,
    after: GuestSpec,
    /// Expanded configuration that it has, and that it is to have.
    config: [Config; 2],
}

fn running_users(engine: &EngineInner, profile: &Profile) -> Result<Vec<User>> {
    let records = engine.inventory.read();
    let mut users = vec![];
    for instance in records.instances.values().filter(|i| i.profiles.contains(&profile.id)) {
        let runtime = records.runtimes.get(&instance.id);
        let status = instance.status(runtime.map(|r| &r.value));
        let (Status::Running | Status::Frozen, Some(runtime)) = (status, runtime) else { continue };
        let name = called(profile.project, instance);
        let named = |e: Error| Error { message: format!("{name}: {}", e.message), ..e };
        let domain = runtime.domain_id.unwrap_or(0);
        // A profile may have got devices since the start: they come with the next one.
        let devices = records.expanded(instance).1;
        let mut now = instance.value.clone();
        now.identities = engine.assign_identities(
            &records,
            &instance.identities,
            &expand::parse_devices(&devices).map_err(named)?,
            instance.hardware.as_ref(),
            instance.root,
        );
        let generation = runtime.generation;
        let before = GuestSpec { generation, ..engine.guest_spec(&records, &now, domain).map_err(named)? };
        let was = records.expanded(instance).0;
        let (config, _) = super::limits::expanded(&records, instance, Some(profile));
        let after = GuestSpec {
            limits: keys::limits(&config).map_err(named)?,
            security: keys::security(&config).map_err(named)?,
            environment: keys::environment(&config),
            ..before.clone()
        };
        let config = [was, config];
        users.push(User { name, node: instance.node, before, after, config });
    }
    Ok(users)
}

#[async_trait]
impl Saga for ProfileUpdate {
    const NAME: &'static str = "profile-update";
    const STEPS: &'static [&'static str] = &["settle", "apply"];
    type Plan = ProfilePlan;
    type Outputs = ();

    fn locks(plan: &ProfilePlan) -> Vec<String> {
        vec![profile_uses(plan.profile.id)]
    }

    fn begin(_: &ProfilePlan, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }

    async fn run(cx: &StepContext, plan: &ProfilePlan, _: &mut (), step: usize) -> Result<()> {
        let engine = &cx.engine;
        if step == 0 {
            let mut left = SETTLE;
            loop {
                let busy = {
                    let records = engine.inventory.read();
                    let mut users =
                        records.instances.values().filter(|i| i.profiles.contains(&plan.profile.id));
                    users.find_map(|i| {
                        let lock = records.lock(&crate::compute::lock(i.id))?;
                        Some((called(plan.profile.project, i), lock.description.to_lowercase()))
                    })
                };
                let Some((name, what)) = busy else { return Ok(()) };
                left = left.saturating_sub(LOOK);
                if left.is_zero() {
                    return Err(Error::conflict(format!(
                        "{name}, which has this profile, is busy ({what}); try again when it is not"
                    )));
                }
                engine.env.sleep(LOOK).await;
            }
        }
        // Who was busy may have changed what counts.
        demand_valid(engine, &engine.inventory.read(), &mut Tx::default(), &plan.profile)?;
        for user in running_users(engine, &plan.profile)?.into_iter().filter(|u| u.before != u.after) {
            let applied = cx.agent(user.node)?.guest_update(&cx.mutate(APPLY), user.after).await;
            match applied {
                Ok(applied) => {
                    let (id, generation) = (user.before.instance, user.before.generation);
                    engine.note_applied_profile(id, generation, &user.config[1], &applied).await?;
                }
                // It ended meanwhile; the next start is with the profile as it is then.
                Err(e) if e.is(ErrorKind::NotFound) => {}
                Err(e) => {
                    let message = format!("{} refuses it: {}", user.name, e.message);
                    return Err(Error { message, ..e });
                }
            }
        }
        Ok(())
    }

    async fn undo(cx: &StepContext, plan: &ProfilePlan, _: &(), step: usize) -> Result<()> {
        if step == 0 {
            return Ok(());
        }
        for user in running_users(&cx.engine, &plan.profile)?.into_iter().filter(|u| u.before != u.after) {
            let (id, generation) = (user.before.instance, user.before.generation);
            match cx.agent(user.node)?.guest_update(&cx.mutate(APPLY), user.before).await {
                Err(e) if matches!(e.kind, ErrorKind::NotFound | ErrorKind::Conflict) => {}
                other => {
                    let engine = &cx.engine;
                    engine.note_applied_profile(id, generation, &user.config[0], &other?).await?;
                }
            }
        }
        Ok(())
    }

    fn commit(plan: &ProfilePlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let records = engine.inventory.read();
        let gone = || Error::not_found("the profile is gone");
        let row = records.profiles.get(&plan.profile.id).ok_or_else(gone)?;
        demand_valid(engine, &records, tx, &plan.profile)?;
        tx.replace(row, &plan.profile);
        Ok(())
    }

    fn abort(_: &ProfilePlan, _: &(), _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }

    fn announce(plan: &ProfilePlan) -> Vec<(&'static str, String)> {
        vec![("profile-updated", plan.path.clone())]
    }
}
