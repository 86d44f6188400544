//! The host goes down, or the platform with all of its guests: they stop in order, and start again with the host or the
//! platform, for nobody wanted them to stop.
//!
//! `boot.stop.priority` says who stops first, `boot.host_shutdown_action` how, `boot.host_shutdown_timeout` how long a graceful
//! stop may take before it is forced.

use super::power::{Also, PowerRequest};
use crate::{Engine, EngineInner, Records, context::Context, reconcile::at_work};
use futures::future::join_all;
use karst_env::EnvExt;
use karst_model::{
    Config, Error, InstanceId, Result,
    access::Permission,
    instance::{DesiredPower, ExitReason, Instance, Lifecycle, PowerAction, Runtime, RuntimeState},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

/// How long a graceful stop may take when its instance does not say.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long it is waited for what is at work on an instance.
const BUSY: Duration = Duration::from_secs(30);
/// How often it is looked for that.
const LOOK: Duration = Duration::from_millis(100);

/// How an instance stops with its host (`boot.host_shutdown_action`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Graceful,
    Force,
    Save,
}

/// A guest that is to stop.
#[derive(Debug, Clone)]
struct Guest {
    id: InstanceId,
    project: String,
    name: String,
    way: Way,
    patience: Duration,
}

/// What stops at the same time, in order, but for those that were tried already.
fn order(records: &Records, tried: &BTreeSet<InstanceId>) -> Vec<Vec<Guest>> {
    let mut groups: BTreeMap<std::cmp::Reverse<u64>, Vec<Guest>> = BTreeMap::new();
    let ready = |i: &&crate::Row<Instance>| i.lifecycle == Lifecycle::Ready && !tried.contains(&i.id);
    for instance in records.instances.values().filter(ready) {
        let runs = records.runtimes.get(&instance.id).is_some_and(|r| !r.state.is_down());
        let Some(project) = records.projects.get(&instance.project).filter(|_| runs) else { continue };
        let (config, _) = records.expanded(instance);
        let guest = guest(instance, project.name.to_string(), &config);
        groups
            .entry(std::cmp::Reverse(number(&config, "boot.stop.priority").unwrap_or(0)))
            .or_default()
            .push(guest);
    }
    groups.into_values().collect()
}

fn number(config: &Config, key: &str) -> Option<u64> {
    config.get(key)?.parse().ok()
}

fn guest(instance: &Instance, project: String, config: &Config) -> Guest {
    Guest {
        id: instance.id,
        project,
        name: instance.name.to_string(),
        way: match config.get("boot.host_shutdown_action").map(String::as_str) {
            Some("force-stop") => Way::Force,
            Some("stateful-stop") => Way::Save,
            _ => Way::Graceful,
        },
        patience: number(config, "boot.host_shutdown_timeout").map_or(PATIENCE, Duration::from_secs),
    }
}

/// Was the instance stopped with its host? Whoever stops one otherwise, or it itself, wants it to be off. A start that
/// was ordered since and failed changes nothing about that.
pub(crate) fn stopped_with_host(instance: &Instance, runtime: &Runtime) -> bool {
    runtime.state == RuntimeState::Stopped
        && runtime.generation <= instance.generation
        && instance.power != DesiredPower::Stopped
        && !matches!(runtime.exit, Some(ExitReason::Crashed { .. }))
}

impl EngineInner {
    /// Demands that guests may start: not while all are stopped.
    pub(crate) fn demand_staying(&self) -> Result<()> {
        match self.leaving.load(Ordering::SeqCst) {
            false => Ok(()),
            true => Err(Error::unavailable("the platform stops all guests and ends; start it again first")),
        }
    }
}

impl Engine {
    /// Stops all guests, because the host goes down or the platform with them; none starts from then on. Answers those
    /// that could not be stopped, in words, when no other runs. It goes on when nobody waits for it.
    ///
    /// # Errors
    /// Forbidden; internal when it was broken off.
    pub async fn host_stop(&self, context: &Context) -> Result<Vec<String>> {
        context.demand_server(Permission::ServerEdit)?;
        self.inner().leaving.store(true, Ordering::SeqCst);
        let (engine, left) = (self.clone(), Arc::new(std::sync::Mutex::new(vec![])));
        let all = left.clone();
        let work = async move {
            let (mut tried, mut settled) = (BTreeSet::new(), false);
            loop {
                // The next group anew: a guest may have come up meanwhile that was starting before none might.
                let Some(group) = order(&engine.inner().inventory.read(), &tried).into_iter().next() else {
                    if settled {
                        break;
                    }
                    engine.until_settled().await;
                    settled = true;
                    continue;
                };
                tried.extend(group.iter().map(|g| g.id));
                let names: Vec<&str> = group.iter().map(|g| g.name.as_str()).collect();
                tracing::info!(guests = names.join(", "), "stopping guests");
                let ends = join_all(group.iter().map(|guest| engine.stop_with_host(guest))).await;
                for (guest, end) in group.iter().zip(ends) {
                    if let Err(e) = end {
                        tracing::warn!(instance = guest.name, error = %e, "does not stop");
                        all.lock()
                            .unwrap_or_else(|e| e.into_inner())
                            .push(format!("{}: {}", guest.name, e.message));
                    }
                }
            }
        };
        let task = self.inner().env.spawn_task("shutdown", work);
        task.join().await.map_err(|e| Error::internal("stopping the guests was broken off", e))?;
        let left = left.lock().unwrap_or_else(|e| e.into_inner()).clone();
        Ok(left)
    }

    async fn stop_with_host(&self, guest: &Guest) -> Result<()> {
        let ways: &[Way] = match guest.way {
            Way::Graceful => &[Way::Graceful, Way::Force],
            Way::Force => &[Way::Force],
            Way::Save => &[Way::Save, Way::Graceful, Way::Force],
        };
        // It would be waited for in vain: a copy may wait for a word for days, and outlives no stop.
        if let Err(e) = self.break_off_copy_of(guest).await {
            tracing::warn!(instance = guest.name, error = %e, "the copy of its disk is not broken off");
        }
        let mut end = Ok(());
        for way in ways {
            self.until_idle(guest).await;
            if !self.runs(guest.id) {
                return Ok(());
            }
            end = self.stop_by(guest, *way).await;
            match &end {
                Ok(()) => return Ok(()),
                Err(e) => tracing::warn!(instance = guest.name, ?way, error = %e, "does not stop that way"),
            }
        }
        if self.runs(guest.id) { end } else { Ok(()) }
    }

    async fn break_off_copy_of(&self, guest: &Guest) -> Result<()> {
        let project = self.project(&Context::system(), &guest.project, Permission::InstanceUse)?;
        self.break_off_copy(&project, &guest.name).await
    }

    async fn stop_by(&self, guest: &Guest, way: Way) -> Result<()> {
        let request = PowerRequest {
            action: PowerAction::Stop,
            force: way == Way::Force,
            timeout: Some(guest.patience),
            stateful: way == Way::Save,
        };
        let keep = Also { keep: true, ..Also::default() };
        let operation = self.power(&Context::system(), &guest.project, &guest.name, request, keep).await?;
        operation.ended().await.error.clone().map_or(Ok(()), Err)
    }

    fn runs(&self, id: InstanceId) -> bool {
        let records = self.inner().inventory.read();
        records.runtimes.get(&id).is_some_and(|r| !r.state.is_down())
    }

    /// Waits for what is at work on the instance, for a time.
    async fn until_idle(&self, guest: &Guest) {
        let inner = self.inner();
        let until = inner.env.monotonic() + BUSY.max(guest.patience);
        while at_work(inner, guest.id) && inner.env.monotonic() < until {
            inner.env.sleep(LOOK).await;
        }
    }

    /// Waits for what is at work on any instance, for a time.
    async fn until_settled(&self) {
        let inner = self.inner();
        let until = inner.env.monotonic() + BUSY;
        loop {
            // What was written just now is seen after this.
            inner.env.sleep(LOOK).await;
            let all: Vec<InstanceId> = inner.inventory.read().instances.keys().copied().collect();
            if inner.env.monotonic() >= until || !all.into_iter().any(|id| at_work(inner, id)) {
                return;
            }
        }
    }
}
