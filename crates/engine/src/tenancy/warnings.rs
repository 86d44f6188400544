//! Warnings: a reconciler compares what is wrong now with what is recorded. What somebody acknowledged stays so while it
//! lasts; what is so no longer is resolved, and what comes again is new again.

use crate::{Engine, EngineInner, Records, Row, context::Context};
use karst_env::EnvExt;
use karst_model::{
    Error, ProjectId, Result,
    access::Permission,
    instance::{DesiredPower, ExitReason, Instance, InstanceKind, Lifecycle, Status},
    keys,
    operation::OperationState,
    warning::{Severity, Warning, WarningStatus},
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::Duration,
};
use uuid::Uuid;

/// How often everything is looked at, and how soon after a change.
const SWEEP: Duration = Duration::from_secs(30);
const SOON: Duration = Duration::from_secs(1);
/// What is resolved for so long is forgotten.
const KEPT: Duration = Duration::from_secs(7 * 86_400);
/// Warnings changed in one transaction.
const AT_ONCE: usize = 30;

/// Something that is wrong.
struct Condition {
    kind: &'static str,
    severity: Severity,
    message: String,
    project: Option<ProjectId>,
    entity: String,
    /// What makes it the same when its message changes.
    about: String,
}

fn conditions(inner: &EngineInner, records: &Records) -> BTreeMap<Uuid, Condition> {
    let mut all = vec![];
    for settled in inner.shared(records) {
        let Some(network) = records.networks.get(&settled.network) else { continue };
        // It names guests: where some are of other projects it is for who may see all.
        let on = |i: &Row<Instance>| {
            let view = inner.inventory.view(records, i.id);
            view.is_some_and(|v| v.nics.iter().any(|(on, _)| on.is(network)))
        };
        let users = records.network_users(network.project);
        let others = |i: &Row<Instance>| i.project != network.project && users.contains(&i.project);
        let mixed = records.instances.values().any(|i| others(i) && on(i));
        for (kind, said, advice) in [
            (
                "Guests have what is not their network's",
                &settled.outside,
                "it is left out; change their devices, or the network",
            ),
            ("Guests share an address", &settled.addresses, "give it another one"),
            ("Guests share a name", &settled.names, "rename one of them"),
        ] {
            if said.is_empty() {
                continue;
            }
            all.push(Condition {
                kind,
                severity: Severity::Moderate,
                message: format!("on network {:?} {}; {advice}", &*network.name, said.join(", and ")),
                project: (!mixed).then_some(network.project),
                entity: records.path_in("networks", &network.name, network.project),
                about: network.id.to_string(),
            });
        }
    }
    for node in records.nodes.values() {
        for message in node.facts.iter().flat_map(|f| &f.warnings) {
            // Hosts know things by their ids only.
            let pool = records.pools.values().find(|p| message.contains(&p.id.to_string()));
            let named = message.contains("instance ");
            let mut instances = records.instances.values().filter(|_| named);
            let instance = instances.find(|i| message.contains(&i.id.to_string()));
            let project = instance.and_then(|i| records.projects.get(&i.project));
            all.push(Condition {
                kind: "Host",
                severity: Severity::Moderate,
                message: match (pool, instance) {
                    (Some(pool), _) => message.replace(&pool.id.to_string(), &format!("{:?}", &*pool.name)),
                    (None, Some(i)) => message.replace(&i.id.to_string(), &format!("{:?}", &*i.name)),
                    (None, None) => message.clone(),
                },
                project: project.map(|p| p.id),
                entity: match (instance, project) {
                    (Some(i), Some(p)) => crate::compute::path(&p.name, &i.name),
                    _ => String::new(),
                },
                about: format!("{} {message}", node.id),
            });
        }
    }
    for o in records.operations.values().filter(|o| o.state == OperationState::NeedsAttention) {
        let error = o.error.as_ref().map(ToString::to_string).unwrap_or_default();
        all.push(Condition {
            kind: "Operation needs attention",
            severity: Severity::High,
            message: format!("{}: {error}", o.description),
            project: o.project,
            entity: format!("/1.0/operations/{}", o.id),
            about: o.id.to_string(),
        });
    }
    for instance in records.instances.values() {
        let Some(why) = records.why(instance) else { continue };
        let halted = records.runtimes.get(&instance.id).is_some_and(|r| !r.state.is_down());
        // Who stopped it since, or lost it with the host, knows; who is to start by itself is below.
        if !halted && !crashed_unseen(records, instance) {
            continue;
        }
        let project = records.projects.get(&instance.project).map(|p| p.name.to_string()).unwrap_or_default();
        let (kind, message) = match halted {
            true => ("Instance in error", format!("instance {:?} is halted: {why}", &*instance.name)),
            false => ("Instance crashed", format!("instance {:?} ended by itself: {why}", &*instance.name)),
        };
        all.push(Condition {
            kind,
            severity: Severity::High,
            message,
            project: Some(instance.project),
            entity: crate::compute::path(&project, &instance.name),
            about: instance.id.to_string(),
        });
    }
    for instance in records.instances.values().filter(|i| i.kind == InstanceKind::VirtualMachine) {
        // Keys that are live by their table, and were not in this machine as it runs.
        let waits = crate::compute::applied::pending(records, instance).into_iter();
        let waits = waits.filter(|p| keys::lookup(&p.key).is_some_and(|k| k.live));
        let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "unset".into());
        let keys: Vec<String> =
            waits.map(|p| format!("{}={} (now {})", p.key, text(&p.configured), text(&p.live))).collect();
        let Some(project) = records.projects.get(&instance.project).filter(|_| !keys.is_empty()) else {
            continue;
        };
        all.push(Condition {
            kind: "Change waits for a restart",
            severity: Severity::Low,
            message: format!(
                "instance {:?} could not change as it runs and has it from its next start on: {}",
                &*instance.name,
                keys.join(", ")
            ),
            project: Some(instance.project),
            entity: crate::compute::path(&project.name, &instance.name),
            about: instance.id.to_string(),
        });
    }
    let mut unstarted = inner.unstarted.lock().unwrap_or_else(|e| e.into_inner());
    unstarted.retain(|id, why| {
        let runtime = records.runtimes.get(id).map(|r| &r.value);
        let Some(instance) = records.instances.get(id) else { return false };
        if instance.status(runtime) != Status::Stopped {
            return false;
        }
        let project = records.projects.get(&instance.project).map(|p| p.name.to_string()).unwrap_or_default();
        all.push(Condition {
            kind: "Instance not started",
            severity: Severity::High,
            message: format!("instance {:?} {why}", &*instance.name),
            project: Some(instance.project),
            entity: crate::compute::path(&project, &instance.name),
            about: id.to_string(),
        });
        true
    });
    drop(unstarted);
    let id = |c: &Condition| Uuid::new_v5(&Uuid::NAMESPACE_OID, format!("{} {}", c.kind, c.about).as_bytes());
    all.into_iter().map(|c| (id(&c), c)).collect()
}

/// Did the instance, which is down, end by itself, and is nothing about to start it again?
fn crashed_unseen(records: &Records, instance: &Instance) -> bool {
    let Some(runtime) = records.runtimes.get(&instance.id) else { return false };
    let lost = |detail: &String| detail == crate::reconcile::HOST_RESTARTED;
    instance.lifecycle == Lifecycle::Ready
        && instance.power != DesiredPower::Stopped
        && runtime.generation == instance.generation
        && matches!(&runtime.exit, Some(ExitReason::Crashed { detail }) if !lost(detail))
        && keys::optional_flag(&records.expanded(instance).0, "boot.autorestart") != Some(true)
}

/// Keeps the records of warnings as things are, until the engine ends.
pub(crate) async fn reconciler(weak: Weak<EngineInner>) {
    let Some((env, mut changes)) = weak.upgrade().map(|i| (i.env.clone(), i.inventory.changes())) else {
        return;
    };
    loop {
        let Some(inner) = weak.upgrade() else { return };
        if let Err(e) = sync(&inner).await {
            tracing::debug!(error = %e, "warnings could not be recorded; trying again");
        }
        drop(inner);
        // At most once in a while, however much changes.
        env.sleep(SOON).await;
        if let Ok(Err(_)) = env.timeout(SWEEP, changes.changed()).await {
            return;
        }
    }
}

async fn sync(inner: &Arc<EngineInner>) -> Result<()> {
    let now = inner.env.now();
    inner
        .transact(|records, tx| {
            let found = conditions(inner, records);
            let mut left = AT_ONCE;
            for (id, c) in &found {
                let old = records.tenancy.warnings.get(id);
                let again = old.is_some_and(|w| w.status == WarningStatus::Resolved);
                if old.is_some_and(|w| !again && (&w.message, w.project) == (&c.message, c.project)) {
                    continue;
                }
                let Some(fewer) = left.checked_sub(1) else { break };
                left = fewer;
                let new = Warning {
                    id: *id,
                    kind: c.kind.into(),
                    severity: c.severity,
                    message: c.message.clone(),
                    project: c.project,
                    entity: c.entity.clone(),
                    status: old.filter(|_| !again).map_or(WarningStatus::New, |w| w.status),
                    count: old.map_or(0, |w| w.count) + u32::from(old.is_none() || again),
                    first_seen_at: old.map_or(now, |w| w.first_seen_at),
                    last_seen_at: now,
                };
                match old {
                    Some(row) => tx.replace(row, &new),
                    None => tx.create(&new),
                }
            }
            for (id, row) in records.tenancy.warnings.iter().filter(|(id, _)| !found.contains_key(id)) {
                let over = row.status == WarningStatus::Resolved;
                if over
                    && now.duration_since(row.last_seen_at)
                        < jiff::SignedDuration::try_from(KEPT).unwrap_or_default()
                {
                    continue;
                }
                let Some(fewer) = left.checked_sub(1) else { break };
                left = fewer;
                match over {
                    true => tx.delete_id::<Warning>(&id.to_string()),
                    false => tx.replace(
                        row,
                        &Warning { status: WarningStatus::Resolved, last_seen_at: now, ..row.value.clone() },
                    ),
                }
            }
            Ok(())
        })
        .await
}

impl Engine {
    /// Warnings of the server and of projects, as far as `context` may see them, the newest first.
    ///
    /// # Errors
    /// Unauthenticated.
    pub fn warnings(&self, context: &Context) -> Result<Vec<Row<Warning>>> {
        context.demand_known()?;
        let records = self.inner().inventory.read();
        let mut all: Vec<_> =
            records.tenancy.warnings.values().filter(|w| sees(context, w)).cloned().collect();
        all.sort_by_key(|w| (std::cmp::Reverse(w.last_seen_at), w.id));
        Ok(all)
    }

    /// A warning by id.
    ///
    /// # Errors
    /// Not found, also when it may not be seen.
    pub fn warning(&self, context: &Context, id: Uuid) -> Result<Row<Warning>> {
        context.demand_known()?;
        let found = self.inner().inventory.read().tenancy.warnings.get(&id).cloned();
        found.filter(|w| sees(context, w)).ok_or_else(|| missing(id))
    }

    /// Says that a warning was seen, or that it was not.
    ///
    /// # Errors
    /// Not found, conflict (resolved), forbidden.
    pub async fn warning_acknowledge(&self, context: &Context, id: Uuid, seen: bool) -> Result<()> {
        self.warning(context, id)?;
        context.demand_server(Permission::ServerEdit)?;
        self.inner()
            .transact(|records, tx| {
                let row = records.tenancy.warnings.get(&id).ok_or_else(|| missing(id))?;
                if row.status == WarningStatus::Resolved {
                    return Err(Error::conflict("the warning is resolved already; delete it"));
                }
                let status = if seen { WarningStatus::Acknowledged } else { WarningStatus::New };
                tx.replace(row, &Warning { status, ..row.value.clone() });
                Ok(())
            })
            .await?;
        let action = if seen { "warning-acknowledged" } else { "warning-reset" };
        self.inner().announce(context, None, action, format!("/1.0/warnings/{id}"));
        Ok(())
    }

    /// Deletes a warning; it comes again while its reason lasts.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub async fn warning_delete(&self, context: &Context, id: Uuid) -> Result<()> {
        self.warning(context, id)?;
        context.demand_server(Permission::ServerEdit)?;
        self.inner()
            .transact(|records, tx| {
                tx.delete(records.tenancy.warnings.get(&id).ok_or_else(|| missing(id))?);
                Ok(())
            })
            .await?;
        self.inner().announce(context, None, "warning-deleted", format!("/1.0/warnings/{id}"));
        Ok(())
    }
}

fn missing(id: Uuid) -> Error {
    Error::not_found(format!("warning {id} not found"))
}

fn sees(context: &Context, warning: &Warning) -> bool {
    match warning.project {
        Some(project) => context.principal().may(Permission::ProjectView, Some(project)),
        None => context.principal().may(Permission::ServerInspect, None),
    }
}
