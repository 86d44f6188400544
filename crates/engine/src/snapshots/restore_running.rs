//! Putting a running instance back to a snapshot: one saga, so that no crash leaves it stopped.
//!
//! The guest is stopped by force, its volumes are saved and restored, and it is started with the specification of the
//! snapshot. Until the last step all can be undone; the undo of the stop is a start with the specification that the guest
//! had. Both starts have generations of their own, the plan's: a host that hears of the second does nothing for the first
//! any more.

use super::{
    Found, Origin,
    restore::{self, RestoreOutputs, RestorePlan, SnapshotRestore, Target},
};
use crate::{
    Engine, EngineInner,
    compute::{
        create::{StartPlan, networks_of},
        disks::demand_idle,
        power::force_stop,
    },
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
};
use async_trait::async_trait;
use karst_agent::{CallContext, GuestRef, GuestStop};
use karst_model::{
    Error, Result,
    applied::AppliedSpec,
    guest::{Observed, StopMode},
    instance::{DesiredPower, Instance, RuntimeState, Status},
    spec::GuestSpec,
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

const STOP: Duration = Duration::from_secs(60);
const START: Duration = Duration::from_secs(120);
const SHORT: Duration = Duration::from_secs(30);

impl Engine {
    pub(super) async fn restore_running(
        &self,
        context: &Context,
        origin: Origin<'_>,
        name: &str,
    ) -> Result<LiveOperation> {
        let project = origin.editor(self, context)?;
        let inner = self.inner();
        runner::start::<SnapshotRestoreRunning>(inner, context, |tx| {
            let records = inner.inventory.read();
            let found = origin.find(&records, project.id)?;
            let Found::Instance(row) = &found else {
                return Err(Error::internal("only instances run", name));
            };
            let runtime = records.runtimes.get(&row.id);
            let status = row.status(runtime.map(|r| &r.value));
            let (Some(runtime), Status::Running | Status::Frozen) = (runtime, status) else {
                return Err(Error::conflict(format!(
                    "instance {:?} is on its way up or down; try again",
                    &*row.name
                )));
            };
            let mut restore = restore::plan(inner, &records, tx, &found, name)?;
            let Target::Instance { instance } = &mut restore.target else {
                return Err(Error::internal("an instance's snapshot is another's", name));
            };
            let first = row.generation.max(runtime.generation).next();
            instance.generation = first;
            instance.power = DesiredPower::Running;
            let start = |instance: &Instance| -> Result<StartPlan> {
                let spec = inner.guest_spec(&records, instance, inner.take_domain_id())?;
                Ok(StartPlan { networks: networks_of(&spec), spec })
            };
            let again = start(instance)?;
            let back = start(&Instance { generation: first.next(), ..row.value.clone() })?;
            demand_idle(&records, tx, &again.spec)?;
            let path = restore.path.clone();
            let plan = RunningPlan {
                restore,
                running: GuestRef { instance: row.id, generation: runtime.generation },
                before: row.power,
                frozen: status == Status::Frozen,
                again,
                back,
            };
            Ok((plan, NewOperation::task("Restoring snapshot", Some(project.id), found.kind(), path)))
        })
        .await
    }
}

/// Plan of [`SnapshotRestoreRunning`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunningPlan {
    restore: RestorePlan,
    running: GuestRef,
    before: DesiredPower,
    frozen: bool,
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

async fn start(cx: &StepContext, plan: &RunningPlan, start: &StartPlan) -> Result<Observed> {
    let node = plan.restore.node;
    cx.engine.ensure_networks(cx, node, &start.networks).await?;
    cx.agent(node)?.guest_start(&cx.mutate(START), start.spec.clone()).await
}

/// Does the guest still run that was to be stopped?
async fn untouched(cx: &StepContext, plan: &RunningPlan) -> Result<bool> {
    let seen = cx.agent(plan.restore.node)?.guest_observe_all(&CallContext::read(SHORT), ()).await?;
    let mine = seen.iter().find(|o| o.instance == plan.running.instance);
    Ok(mine.is_some_and(|o| {
        o.generation == plan.running.generation
            && !matches!(o.state, RuntimeState::Stopped | RuntimeState::Error)
    }))
}

/// Starts the guest as it was, and says so at once: the end of the saga reads it.
async fn bring_back(cx: &StepContext, plan: &RunningPlan) -> Result<()> {
    if untouched(cx, plan).await? {
        return Ok(());
    }
    let mut observed = start(cx, plan, &plan.back).await?;
    if plan.frozen {
        let GuestSpec { instance, generation, .. } = plan.back.spec;
        let agent = cx.agent(plan.restore.node)?;
        observed = agent.guest_pause(&cx.mutate(SHORT), GuestRef { instance, generation }).await?;
    }
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
                outputs.started = Some(start(cx, plan, &plan.again).await?);
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
        tx.replace(&row, &restored);
        let records = engine.inventory.read();
        restore::write_sizes(&records, tx, &outputs.restore);
        if let Some(observed) = &outputs.started {
            let (config, devices) = records.expanded(&restored);
            let mut runtime = engine.runtime_of(&records, observed);
            runtime.applied = Some(AppliedSpec::of_start(&config, &devices));
            tx.put(&runtime);
        }
        Ok(())
    }

    fn abort(plan: &RunningPlan, _: &RunningOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let row = engine.instance_row(plan.running.instance)?;
        let runs = engine.inventory.read().runtimes.get(&row.id).map(|r| r.generation);
        // Whichever of the two the undo found or started.
        let generation = runs.unwrap_or(plan.back.spec.generation);
        tx.replace(&row, &Instance { generation, power: plan.before, ..row.value.clone() });
        Ok(())
    }

    fn announce(plan: &RunningPlan) -> Vec<(&'static str, String)> {
        SnapshotRestore::announce(&plan.restore)
    }
}
