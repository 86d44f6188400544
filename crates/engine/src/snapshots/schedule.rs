//! Snapshots that are taken and go by themselves: `snapshots.schedule` and the time at which each expires; backups expire
//! by the same clock. A reconciler
//! without inputs, by the clock of the environment; times are UTC. What was due while no daemon ran is not made up for.

use super::{Found, Origin, create::CreateSnapshot};
use crate::{
    Engine, EngineInner, Records,
    context::Context,
    tenancy::{restricted, rules::ProjectRules},
    volumes,
};
use jiff::Timestamp;
use karst_model::{
    Config, Error, ErrorKind, ProjectId, Result,
    instance::Lifecycle,
    keys::parse_bool,
    schedule::{Schedule, minute_before},
    storage::VolumeOwner,
};
use std::{sync::Weak, time::Duration};

/// How often the clock is looked at; a minute of the calendar is never missed.
const LOOK: Duration = Duration::from_secs(15);

/// Something with snapshots, by names that outlive the reading of the records.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Named {
    project: String,
    pool: Option<String>,
    name: String,
}

impl Named {
    fn origin(&self) -> Origin<'_> {
        match &self.pool {
            None => Origin::Instance { project: &self.project, name: &self.name },
            Some(pool) => Origin::Volume { project: &self.project, pool, name: &self.name },
        }
    }
}

/// Follows the clock until the engine ends.
pub(crate) async fn follow(weak: Weak<EngineInner>) {
    let Some(inner) = weak.upgrade() else { return };
    let env = inner.env.clone();
    let mut last = minute_before(env.now());
    drop(inner);
    loop {
        let Some(inner) = weak.upgrade() else { return };
        let now = env.now();
        let engine = Engine { inner };
        let (due, expired) = {
            let records = engine.inner().inventory.read();
            (due(&records, last, now), expired(&records, now))
        };
        last = last.max(now);
        let context = Context::system();
        for named in due {
            let request = CreateSnapshot { automatic: true, ..CreateSnapshot::default() };
            let taken = engine.snapshot_create(&context, named.origin(), request).await;
            report(&named, "a scheduled snapshot was not taken", ended(taken).await);
        }
        for (named, snapshot) in expired {
            let deleted = engine.snapshot_delete(&context, named.origin(), &snapshot).await;
            report(&named, "an expired snapshot was not deleted", ended(deleted).await);
        }
        engine.expire_backups(now).await;
        drop(engine);
        env.sleep(LOOK).await;
    }
}

async fn ended(operation: Result<crate::LiveOperation>) -> Result<()> {
    match &operation?.ended().await.error {
        Some(e) => Err(e.clone()),
        None => Ok(()),
    }
}

fn report(named: &Named, what: &str, done: Result<()>) {
    match done {
        Ok(()) => {}
        // Busy or gone meanwhile: the next look, or the next time, will do.
        Err(e) if matches!(e.kind, ErrorKind::Conflict | ErrorKind::NotFound) => {
            tracing::info!(name = %named.name, error = %e, "{what}");
        }
        Err(e) => tracing::warn!(name = %named.name, error = %e, "{what}"),
    }
}

fn project_name(records: &Records, id: ProjectId) -> Option<String> {
    records.projects.get(&id).map(|p| p.name.to_string())
}

fn schedule(config: &Config) -> Option<Schedule> {
    let text = config.get("snapshots.schedule").filter(|v| !v.is_empty())?;
    Schedule::parse("config.snapshots.schedule", text).ok()
}

/// May snapshots be taken in the project? Where not, a schedule waits until they may.
fn allowed(records: &Records, project: ProjectId) -> bool {
    let rules = records.projects.get(&project).and_then(|p| ProjectRules::parse(&p.config).ok());
    rules.is_some_and(|r| restricted::check_snapshot(&r).is_ok())
}

/// What a snapshot is due of, between two looks.
fn due(records: &Records, last: Timestamp, now: Timestamp) -> Vec<Named> {
    let mut found = vec![];
    for instance in records.instances.values().filter(|i| i.lifecycle == Lifecycle::Ready) {
        let chance = instance.config.contains_key("snapshots.schedule")
            || instance.profiles.iter().any(|p| {
                records.profiles.get(p).is_some_and(|p| p.config.contains_key("snapshots.schedule"))
            });
        if !chance {
            continue;
        }
        let config = records.expanded(instance).0;
        let Some(schedule) = schedule(&config) else { continue };
        let runs = volumes::runs(records, instance);
        let stopped_too = config
            .get("snapshots.schedule.stopped")
            .is_some_and(|v| parse_bool("config.snapshots.schedule.stopped", v).unwrap_or(false));
        let started = records.runtimes.get(&instance.id).and_then(|r| r.started_at);
        let began = schedule.at_startup && runs && started.is_some_and(|t| t > last && t <= now);
        let time = began || ((runs || stopped_too) && schedule.is_due(last, now));
        if time && allowed(records, instance.project) {
            let project = project_name(records, instance.project).unwrap_or_default();
            found.push(Named { project, pool: None, name: instance.name.to_string() });
        }
    }
    for volume in records.volumes.values().filter(|v| v.owner == VolumeOwner::Custom) {
        let time = schedule(&volume.config).is_some_and(|s| s.is_due(last, now));
        if time && allowed(records, volume.project) {
            let pool = records.pools.get(&volume.pool).map(|p| p.name.to_string());
            let project = project_name(records, volume.project).unwrap_or_default();
            found.push(Named { project, pool, name: volume.name.clone() });
        }
    }
    found
}

/// What has expired, and the name of the snapshot.
fn expired(records: &Records, now: Timestamp) -> Vec<(Named, String)> {
    let over = |t: Option<Timestamp>| t.is_some_and(|t| t <= now);
    let mut found = vec![];
    for snapshot in records.snapshots.values().filter(|s| over(s.expires_at)) {
        if let Some(instance) = records.instances.get(&snapshot.instance) {
            let project = project_name(records, instance.project).unwrap_or_default();
            let named = Named { project, pool: None, name: instance.name.to_string() };
            found.push((named, snapshot.name.to_string()));
        }
    }
    for snapshot in records.volume_snapshots.values().filter(|s| over(s.expires_at)) {
        if let Some(volume) = records.volumes.get(&snapshot.volume) {
            let pool = records.pools.get(&volume.pool).map(|p| p.name.to_string());
            let project = project_name(records, volume.project).unwrap_or_default();
            found.push((Named { project, pool, name: volume.name.clone() }, snapshot.name.to_string()));
        }
    }
    found
}

impl Found {
    /// Conflict when it is no longer there in its own right (being made or deleted).
    pub(crate) fn demand_ready(&self) -> Result<()> {
        match self {
            Self::Instance(row) if row.lifecycle != Lifecycle::Ready => {
                Err(Error::conflict(format!("{} is being made or deleted", self.words())))
            }
            _ => Ok(()),
        }
    }
}
