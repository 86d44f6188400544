//! Putting an instance back to a snapshot and having it run afterwards: one that ran, or a virtual machine that goes on
//! from the memory in the snapshot. One saga, so that no crash leaves it stopped.
//!
//! A guest that runs is stopped by force, its volumes are saved and restored, and it is started with the specification of
//! the snapshot. Until the last step all can be undone; the undo of the stop is a start with the specification that the
//! guest had. Both starts have generations of their own, the plan's: a host that hears of the second does nothing for the
//! first any more.

use super::{
    Found, Origin,
    restore::{self, RestoreOutputs, RestorePlan, SnapshotRestore, Target},
};
use crate::{
    Engine, EngineInner,
    compute::{
        create::{StartPlan, networks_of},
        disks::demand_idle,
        expand::parse_devices,
        power::{SAVING, force_stop},
    },
    context::Context,
    db::Tx,
    events::{PAUSED, RAN, RUNS},
    network::life::demand_active,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
};
use async_trait::async_trait;
use karst_agent::{CallContext, GuestRef, GuestStop};
use karst_model::{
    Error, ErrorKind, Result,
    applied::AppliedSpec,
    guest::{Observed, StopMode},
    instance::{DesiredPower, Instance, Since, Status},
    spec::GuestSpec,
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, time::Duration};

const STOP: Duration = Duration::from_secs(60);
const START: Duration = Duration::from_secs(120);
const SHORT: Duration = Duration::from_secs(30);

impl Engine {
    pub(super) async fn restore_running(
        &self,
        context: &Context,
        origin: Origin<'_>,
        name: &str,
        memory: bool,
        paused: bool,
    ) -> Result<LiveOperation> {
        let project = origin.editor(self, context)?;
        let inner = self.inner();
        runner::start::<SnapshotRestoreRunning>(inner, context, |tx| {
            let records = inner.inventory.read();
            let found = origin.find(&records, project.id)?;
            let Found::Instance(row) = &found else {
                return Err(Error::invalid("stateful", "a volume has no memory"));
            };
            let runtime = records.runtimes.get(&row.id);
            let generation = runtime.map_or(row.generation, |r| r.generation);
            let status = row.status(runtime.map(|r| &r.value));
            let was = match status {
                // It stood still, and would begin anew either way.
                Status::Running | Status::Error => Was::Running,
                Status::Frozen => Was::Frozen,
                Status::Stopped if memory => Was::Stopped,
                Status::Stopped => {
                    return Err(Error::conflict(format!(
                        "instance {:?} has just stopped; try again",
                        &*row.name
                    )));
                }
                _ => {
                    return Err(Error::conflict(format!(
                        "instance {:?} is on its way up or down; try again, or stop it by force first",
                        &*row.name
                    )));
                }
            };
            let mut restore = restore::plan(inner, &records, tx, &found, name, memory)?;
            let Target::Instance { instance } = &mut restore.target else {
                return Err(Error::internal("an instance's snapshot is another's", name));
            };
            let first = row.generation.max(generation).next();
            instance.generation = first;
            instance.power = if paused { DesiredPower::Paused } else { DesiredPower::Running };
            // The start takes it.
            instance.stateful = false;
            // Before the guest is ended: it starts again, as it is to be or as it is.
            for it in [&*instance, &row.value] {
                let parsed = parse_devices(&records.expanded(it).1)?;
                demand_active(&records, it.project, &parsed)?;
            }
            let start = |instance: &Instance, resume: bool| -> Result<StartPlan> {
                let mut spec = inner.start_spec(&records, instance, inner.take_domain_id())?;
                if let Some(machine) = &mut spec.machine {
                    machine.resume = resume;
                }
                Ok(StartPlan { networks: networks_of(&spec), spec })
            };
            let mut again = start(instance, memory)?;
            if paused {
                again.pause();
            }
            let back = start(&Instance { generation: first.next(), ..row.value.clone() }, false)?;
            demand_idle(&records, tx, &again.spec)?;
            let path = restore.path.clone();
            let plan = RunningPlan {
                restore,
                running: GuestRef { instance: row.id, generation },
                before: row.power,
                was,
                memory,
                again,
                back,
            };
            Ok((plan, NewOperation::task("Restoring snapshot", Some(project.id), found.kind(), path)))
        })
        .await
    }
}

/// What the guest did until now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Was {
    Running,
    Frozen,
    Stopped,
}

/// Plan of [`SnapshotRestoreRunning`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunningPlan {
    restore: RestorePlan,
    running: GuestRef,
    before: DesiredPower,
    was: Was,
    /// The start goes on from the memory in the snapshot.
    memory: bool,
    /// As it was at the snapshot.
    again: StartPlan,
    /// As it was until now.
    back: StartPlan,
}

/// Outputs of [`SnapshotRestoreRunning`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct RunningOutputs {
    restore: RestoreOutputs,
    started: Option<Observed>,
}

/// Stops, saves, restores, starts, and drops what was saved.
pub struct SnapshotRestoreRunning;

async fn start(cx: &StepContext, plan: &RunningPlan, start: &StartPlan, time: Duration) -> Result<Observed> {
    let node = plan.restore.node;
    cx.engine.ensure_networks(cx, node, &start.networks).await?;
    let (agent, project) = (cx.agent(node)?, crate::keys::project_of(cx, start.spec.instance)?);
    crate::keys::hand_for_start(cx, &*agent, project, &start.spec).await?;
    agent.guest_start(&cx.mutate(time), start.spec.clone()).await
}

/// What the host sees of the guest now.
async fn seen(cx: &StepContext, plan: &RunningPlan) -> Result<Option<Observed>> {
    let all = cx.agent(plan.restore.node)?.guest_observe_all(&CallContext::read(SHORT), ()).await?;
    Ok(all.into_iter().find(|o| o.instance == plan.running.instance))
}

/// Starts the guest as it was, and says so at once: the end of the saga reads it. One that cannot start any more, because
/// what it needs is gone, is recorded as what it is: stopped.
async fn bring_back(cx: &StepContext, plan: &RunningPlan) -> Result<()> {
    let untouched =
        seen(cx, plan).await?.is_some_and(|o| o.generation == plan.running.generation && !o.state.is_down());
    if untouched {
        return Ok(());
    }
    let observed = match start(cx, plan, &plan.back, START).await {
        Ok(_) if plan.was == Was::Frozen => {
            let GuestSpec { instance, generation, .. } = plan.back.spec;
            let agent = cx.agent(plan.restore.node)?;
            Some(agent.guest_pause(&cx.mutate(SHORT), GuestRef { instance, generation }).await?)
        }
        Ok(observed) => Some(observed),
        // The host may be back in a moment, and it is tried again.
        Err(e) if matches!(e.kind, ErrorKind::Unavailable | ErrorKind::Timeout) => return Err(e),
        Err(e) => {
            tracing::error!(instance = %plan.running.instance, error = %e, context = e.context.as_deref().unwrap_or_default(),
                "an instance that was stopped for a restore does not start any more");
            seen(cx, plan).await?
        }
    };
    let Some(observed) = observed else { return Ok(()) };
    cx.engine
        .transact(|records, tx| {
            if records.instances.contains_key(&observed.instance) {
                tx.put(&cx.engine.runtime_of(records, &observed));
            }
            Ok(())
        })
        .await
}

#[async_trait]
impl Saga for SnapshotRestoreRunning {
    const NAME: &'static str = "snapshot-restore-running";
    const STEPS: &'static [&'static str] = &["stop", "save", "restore", "start", "clean"];
    type Plan = RunningPlan;
    type Outputs = RunningOutputs;

    fn retries(step: usize) -> u32 {
        if step == 4 { 5 } else { 0 }
    }

    fn has(plan: &RunningPlan, step: usize) -> bool {
        step != 0 || plan.was != Was::Stopped
    }

    fn locks(plan: &RunningPlan) -> Vec<String> {
        vec![plan.restore.lock.clone()]
    }

    fn begin(plan: &RunningPlan, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let row = engine.instance_row(plan.running.instance)?;
        // The last of the starts that may come: what the host reports of any of them counts.
        let generation = plan.back.spec.generation;
        tx.replace(&row, &Instance { generation, ..row.value.clone() });
        Ok(())
    }

    async fn run(
        cx: &StepContext,
        plan: &RunningPlan,
        outputs: &mut RunningOutputs,
        step: usize,
    ) -> Result<()> {
        match step {
            0 => {
                let stop = GuestStop { guest: plan.running, mode: StopMode::Force };
                cx.agent(plan.restore.node)?.guest_stop(&cx.mutate(STOP), stop).await.map(drop)
            }
            1 => SnapshotRestore::run(cx, &plan.restore, &mut outputs.restore, 0).await,
            2 => SnapshotRestore::run(cx, &plan.restore, &mut outputs.restore, 1).await,
            3 => {
                let time = if plan.memory { SAVING } else { START };
                outputs.started = Some(start(cx, plan, &plan.again, time).await?);
                Ok(())
            }
            _ => SnapshotRestore::run(cx, &plan.restore, &mut outputs.restore, 2).await,
        }
    }

    async fn undo(cx: &StepContext, plan: &RunningPlan, outputs: &RunningOutputs, step: usize) -> Result<()> {
        match step {
            0 => bring_back(cx, plan).await,
            1 => SnapshotRestore::undo(cx, &plan.restore, &outputs.restore, 0).await,
            2 => SnapshotRestore::undo(cx, &plan.restore, &outputs.restore, 1).await,
            3 => {
                let (id, generation) = (plan.running.instance, plan.again.spec.generation);
                force_stop(cx, plan.restore.node, id, generation).await
            }
            _ => Ok(()),
        }
    }

    fn commit(plan: &RunningPlan, outputs: &RunningOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let Target::Instance { instance } = &plan.restore.target else { return Ok(()) };
        let row = engine.instance_row(instance.id)?;
        let restored = Instance { last_used_at: Some(engine.env.now()), ..(**instance).clone() };
        let restored = crate::compute::templates::started(&restored).unwrap_or(restored);
        tx.replace(&row, &restored);
        let records = engine.inventory.read();
        restore::write_sizes(&records, tx, &outputs.restore);
        if let Some(observed) = &outputs.started {
            let (config, devices) = records.expanded(&restored);
            let mut runtime = engine.runtime_of(&records, observed);
            runtime.since = Some(Since::Snapshot);
            runtime.applied = Some(AppliedSpec::of_start(&config, &devices));
            tx.put(&runtime);
        }
        Ok(())
    }

    fn abort(plan: &RunningPlan, _: &RunningOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let row = engine.instance_row(plan.running.instance)?;
        let records = engine.inventory.read();
        let up = records.runtimes.get(&row.id).filter(|r| !r.state.is_down()).map(|r| r.generation);
        let mut instance = row.value.clone();
        match (up, plan.was) {
            // Whichever of the two the undo found or started.
            (Some(generation), _) => (instance.generation, instance.power) = (generation, plan.before),
            (None, Was::Stopped) => instance.power = plan.before,
            (None, _) => instance.power = DesiredPower::Stopped,
        }
        tx.replace(&row, &instance);
        Ok(())
    }

    fn announce(plan: &RunningPlan) -> Vec<(&'static str, String)> {
        SnapshotRestore::announce(&plan.restore)
    }

    fn told(plan: &RunningPlan, _: &RunningOutputs) -> BTreeMap<String, serde_json::Value> {
        let paused = plan.again.spec.machine.as_ref().is_some_and(|m| m.paused);
        let told = [(RAN, plan.was != Was::Stopped), (RUNS, true), (PAUSED, paused)];
        told.into_iter().map(|(key, value)| (key.to_owned(), serde_json::Value::from(value))).collect()
    }
}
