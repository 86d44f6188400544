//! Power: start, stop, restart, freeze, unfreeze.

use super::{
    create::{StartPlan, networks_of},
    expand, lock, path, templates,
};
use crate::{
    Engine, EngineInner, Records, Row,
    context::Context,
    db::Tx,
    events::{RESUMED, reason_context},
    network::life::demand_active,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
};
use async_trait::async_trait;
use karst_agent::{GuestRef, GuestStop, MachineMemoryEnd, MachineMemoryRef};
use karst_env::EnvExt;
use karst_model::{
    Config, Error, ErrorKind, InstanceId, NodeId, Result,
    access::Permission,
    guest::{Observed, StopMode},
    instance::{DesiredPower, Generation, Instance, InstanceKind, PowerAction, RuntimeState, Since, Status},
    keys,
    memory::MemoryEnd,
    project::Project,
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, time::Duration};

/// How power is to change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PowerRequest {
    /// What.
    pub action: PowerAction,
    /// Stop by force.
    pub force: bool,
    /// How long a graceful stop may take.
    pub timeout: Option<Duration>,
    /// Of a stop: keep the memory. Of a start: go on from memory that was kept, if there is any; else it is dropped.
    pub stateful: bool,
}

/// Time for writing or reading a machine's memory.
pub(crate) const SAVING: Duration = Duration::from_secs(1800);
/// How long whoever stops by force waits for the end of a stop that waits for its guest.
const BREAK: Duration = Duration::from_secs(10);
/// How a stop ends that one by force has overtaken.
const OVERTAKEN: &str = "cancelled: the instance is stopped by force instead";
/// Time for a graceful stop when none is given.
pub const DEFAULT_STOP_TIMEOUT: Duration = Duration::from_secs(600);

/// What else is to be so.
#[derive(Debug, Clone, Default)]
pub(crate) struct Also {
    /// An instance that stops is still one that is to run.
    pub(crate) keep: bool,
    /// A virtual machine that starts stands still before its first instruction.
    pub(crate) paused: bool,
    /// A virtual machine that starts has forgotten what its firmware kept.
    pub(crate) fresh_firmware: bool,
    /// A virtual machine that starts goes on from memory in this file of its host.
    pub(crate) memory: Option<String>,
}

impl Engine {
    /// Changes an instance's power.
    ///
    /// # Errors
    /// Not found, conflict when the state forbids it or the instance is busy, forbidden.
    pub async fn instance_power(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        request: PowerRequest,
    ) -> Result<LiveOperation> {
        self.power(context, project, name, request, Also::default()).await
    }

    /// Starts a virtual machine that stands still until it is unfrozen: not one instruction is executed before. From where its
    /// memory was kept with `stateful`, if it was.
    ///
    /// # Errors
    /// Those of [`Engine::instance_power`], and unsupported for a container.
    pub async fn machine_start_paused(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        stateful: bool,
    ) -> Result<LiveOperation> {
        let request = PowerRequest { action: PowerAction::Start, force: false, timeout: None, stateful };
        self.power(context, project, name, request, Also { paused: true, ..Also::default() }).await
    }

    /// Starts a virtual machine with the variables of its firmware as they come with it, without memory that was kept; to stand still
    /// before its first instruction where `paused`.
    ///
    /// # Errors
    /// Those of [`Engine::instance_power`], and unsupported for a container.
    pub async fn machine_start_fresh(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        paused: bool,
    ) -> Result<LiveOperation> {
        let request =
            PowerRequest { action: PowerAction::Start, force: false, timeout: None, stateful: false };
        let also = Also { paused, fresh_firmware: true, ..Also::default() };
        self.power(context, project, name, request, also).await
    }

    /// As [`Engine::instance_power`].
    pub(crate) async fn power(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        request: PowerRequest,
        also: Also,
    ) -> Result<LiveOperation> {
        let project = self.project(context, project, Permission::InstanceUse)?;
        if request.timeout.is_some_and(|timeout| timeout > StopMode::LONGEST) {
            let most = StopMode::LONGEST.as_secs();
            let text =
                format!("a stop waits for {most} seconds at most; give fewer, or none for the default");
            return Err(Error::invalid("timeout", text));
        }
        let inner = self.inner();
        let save = request.stateful && request.action == PowerAction::Stop;
        let mode = if save {
            StopMode::Save
        } else if request.force {
            StopMode::Force
        } else {
            StopMode::Graceful { timeout: request.timeout.unwrap_or(DEFAULT_STOP_TIMEOUT) }
        };
        if matches!(request.action, PowerAction::Start | PowerAction::Restart) {
            let node = inner.inventory.read().instance(&project, name).ok().map(|row| row.node);
            node.into_iter().for_each(|node| inner.expect_entry(node));
        }
        if save {
            // What is refused ends no copy.
            let records = inner.inventory.read();
            let row = records.instance(&project, name)?;
            demand_savable(row, &records.expanded(row).0)?;
            super::run::demand_defined(&records, row)?;
        }
        if matches!(request.action, PowerAction::Stop | PowerAction::Restart) {
            if request.force {
                self.break_off_stop(&project, name).await;
            }
            self.break_off_copy(&project, name).await?;
        }
        runner::start::<InstancePower>(inner, context, |tx| {
            let records = inner.inventory.read();
            let row = records.instance(&project, name)?;
            let runtime = records.runtimes.get(&row.id);
            let status = row.status(runtime.map(|r| &r.value));
            request.action.check(name, status).map_err(|e| match records.why_halted(row) {
                Some(why) => Error { message: format!("{} ({why})", e.message), ..e },
                None => e,
            })?;
            if save {
                demand_savable(row, &records.expanded(row).0)?;
                super::run::demand_defined(&records, row)?;
            }
            tx.expect(row);
            let path = path(&project.name, name);
            let words = match request.action {
                PowerAction::Start => "Starting instance",
                PowerAction::Stop => "Stopping instance",
                PowerAction::Restart => "Restarting instance",
                PowerAction::Freeze => "Freezing instance",
                PowerAction::Unfreeze => "Unfreezing instance",
            };
            let mut new = NewOperation::task(words, Some(project.id), "instances", path.clone());
            new.may_cancel =
                matches!(request.action, PowerAction::Stop | PowerAction::Restart) && !request.force;
            let mut plan = plan(inner, &records, row, request, status, mode, path)?;
            if also.keep && request.action == PowerAction::Stop {
                (plan.keep, plan.instance.power) = (true, row.power);
            }
            if also.memory.is_some() {
                super::memory_files::demand_restorable(&records, row)?;
            }
            if save {
                let told = super::memory_files::told(row.id, "stop", &Default::default());
                new.metadata.insert(super::memory_files::METADATA.into(), told);
            }
            if also.paused && row.kind != InstanceKind::VirtualMachine {
                let text = "virtual machines only stand still before their first instruction; start it, then freeze it";
                return Err(Error::unsupported(text).at("paused"));
            }
            if also.fresh_firmware && row.kind != InstanceKind::VirtualMachine {
                return Err(Error::unsupported("virtual machines only have a firmware").at("firmware"));
            }
            if let (true, Some(start)) = (also.fresh_firmware, &mut plan.start) {
                start.forget_firmware();
            }
            if let (true, Some(start)) = (also.paused, &mut plan.start) {
                start.pause();
                (plan.paused, plan.instance.power) = (true, DesiredPower::Paused);
            }
            if let (Some(file), Some(start)) = (&also.memory, &mut plan.start) {
                start.go_on_from(file);
                (plan.resume, plan.from_file) = (true, true);
            }
            if let Some(start) = &plan.start {
                super::disks::demand_idle(&records, tx, &start.spec)?;
            }
            Ok((plan, new))
        })
        .await
    }
}

impl Engine {
    /// A stop that waits for its guest, or for its memory to be kept, does not keep the instance from being stopped by force: it
    /// is cancelled. One that does not end in time, or is no such stop, holds the instance, which whoever stops it is told then.
    async fn break_off_stop(&self, project: &Project, name: &str) {
        let inner = self.inner();
        let waiting = {
            let records = inner.inventory.read();
            let held = records.instance(project, name).ok().and_then(|row| records.lock(&lock(row.id)));
            held.filter(|held| records.sagas.get(&held.saga).is_some_and(|s| s.name == InstancePower::NAME))
                .map(|held| held.operation)
        };
        let Some(live) = waiting.and_then(|id| inner.operations.live(id)) else { return };
        // Refused: it has ended, may not be cancelled, or somebody has cancelled it already.
        if inner.operations.cancel_because(&live, OVERTAKEN).is_ok() || live.is_cancelled() {
            let _ = inner.env.timeout(BREAK, live.ended()).await;
        }
    }
}

/// Can the memory of this instance be kept?
///
/// # Errors
/// Unsupported for a container, conflict for a machine that was not prepared for it.
pub(crate) fn demand_stateful(instance: &Instance, config: &Config) -> Result<()> {
    if instance.kind != InstanceKind::VirtualMachine {
        return Err(Error::unsupported("the memory of virtual machines only can be kept").at("stateful"));
    }
    if keys::optional_flag(config, "migration.stateful") != Some(true) {
        return Err(Error::conflict(format!(
            "the memory of instance {:?} cannot be kept; stop it, set migration.stateful=true and start it anew",
            &*instance.name
        ))
        .at("stateful"));
    }
    Ok(())
}

/// Can the memory of this instance be kept over a stop?
///
/// # Errors
/// Those of [`demand_stateful`], and conflict for one that goes with its stop.
fn demand_savable(instance: &Instance, config: &Config) -> Result<()> {
    demand_stateful(instance, config)?;
    if instance.ephemeral {
        let name = &*instance.name;
        return Err(Error::conflict(format!(
            "instance {name:?} is ephemeral: it is deleted when it stops, its memory with it"
        ))
        .at("stateful"));
    }
    Ok(())
}

/// Demands that nothing protects an instance from being started.
///
/// # Errors
/// Conflict, naming the key.
pub(crate) fn demand_startable(instance: &Instance, config: &Config) -> Result<()> {
    if !keys::flag(config, "security.protection.start")? {
        return Ok(());
    }
    Err(Error::conflict(format!(
        "instance {:?} is protected from being started; unset security.protection.start first",
        &*instance.name
    )))
}

fn plan(
    inner: &EngineInner,
    records: &Records,
    row: &Row<Instance>,
    request: PowerRequest,
    status: Status,
    mode: StopMode,
    path: String,
) -> Result<PowerPlan> {
    let action = request.action;
    let resume = action == PowerAction::Start && row.stateful && request.stateful;
    let mut instance = row.value.clone();
    let generation = records.runtimes.get(&row.id).map_or(row.generation, |r| r.generation);
    let running = GuestRef { instance: row.id, generation };
    let mut start = None;
    match action {
        PowerAction::Start | PowerAction::Restart => {
            let (config, devices) = records.expanded(&instance);
            inner.demand_staying()?;
            demand_startable(&instance, &config)?;
            let parsed = expand::parse_devices(&devices)?;
            instance.identities = inner.assign_identities(
                records,
                &instance.identities,
                &parsed,
                instance.hardware.as_ref(),
                instance.root,
            );
            inner.check_addresses(records, None, &instance, &parsed, None)?;
            demand_active(records, instance.project, &parsed)?;
            instance.generation = instance.generation.next_in(records.incarnation);
            instance.power = DesiredPower::Running;
            instance.last_used_at = Some(inner.env.now());
            instance.stateful = false;
            let mut spec = inner.start_spec(records, &instance, inner.take_domain_id())?;
            if let Some(machine) = &mut spec.machine {
                machine.resume = resume;
            }
            start = Some(StartPlan { networks: networks_of(&spec), spec });
        }
        PowerAction::Stop => instance.power = DesiredPower::Stopped,
        PowerAction::Freeze => instance.power = DesiredPower::Paused,
        PowerAction::Unfreeze => instance.power = DesiredPower::Running,
    }
    Ok(PowerPlan {
        action,
        path,
        before: row.power,
        ordered: Some(row.generation),
        resume,
        from_file: false,
        save: mode == StopMode::Save,
        keep: false,
        paused: false,
        stop: matches!(action, PowerAction::Stop | PowerAction::Restart)
            .then_some(GuestStop { guest: running, mode }),
        running,
        was_frozen: status == Status::Frozen,
        was_halted: status == Status::Error,
        start,
        instance,
    })
}

/// Plan of [`InstancePower`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PowerPlan {
    action: PowerAction,
    path: String,
    /// The record as it will be.
    instance: Instance,
    before: DesiredPower,
    /// The start that was ordered last before this.
    #[serde(default)]
    ordered: Option<Generation>,
    /// The start goes on from memory that was kept.
    #[serde(default)]
    resume: bool,
    /// That memory is in a file of the host, which stays.
    #[serde(default)]
    from_file: bool,
    /// The stop keeps the memory.
    #[serde(default)]
    save: bool,
    /// It stops with its host and is to run again.
    #[serde(default)]
    keep: bool,
    /// It stands still from the start on.
    #[serde(default)]
    paused: bool,
    running: GuestRef,
    was_frozen: bool,
    /// An error had halted it.
    #[serde(default)]
    was_halted: bool,
    stop: Option<GuestStop>,
    start: Option<StartPlan>,
}

/// Outputs of [`InstancePower`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct PowerOutputs {
    stopped: Option<Observed>,
    observed: Option<Observed>,
}

/// One saga for all changes of power: stop what runs, then start anew, or freeze or unfreeze.
pub struct InstancePower;

#[async_trait]
impl Saga for InstancePower {
    const NAME: &'static str = "instance-power";
    const STEPS: &'static [&'static str] = &["stop", "change"];
    type Plan = PowerPlan;
    type Outputs = PowerOutputs;

    /// A start stops nothing, and a stop ends with the guest: neither waits for the log write between the two.
    fn has(plan: &PowerPlan, step: usize) -> bool {
        if step == 0 { plan.stop.is_some() } else { plan.action != PowerAction::Stop }
    }

    fn locks(plan: &PowerPlan) -> Vec<String> {
        vec![lock(plan.instance.id)]
    }

    fn begin(plan: &PowerPlan, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let row = engine.instance_row(plan.instance.id)?;
        tx.replace(&row, &plan.instance);
        Ok(())
    }

    async fn run(cx: &StepContext, plan: &PowerPlan, outputs: &mut PowerOutputs, step: usize) -> Result<()> {
        let node = plan.instance.node;
        let agent = cx.agent(node)?;
        if step == 0 {
            if let Some(stop) = &plan.stop {
                if plan.was_frozen && matches!(stop.mode, StopMode::Graceful { .. }) {
                    // A frozen guest cannot follow a request.
                    agent.guest_resume(&cx.mutate(Duration::from_secs(30)), plan.running).await?;
                }
                let patience = match stop.mode {
                    StopMode::Graceful { timeout } => timeout + Duration::from_secs(30),
                    StopMode::Force => Duration::from_secs(60),
                    StopMode::Save => SAVING,
                };
                let order = cx.mutate(patience);
                let stopping = agent.guest_stop(&order, stop.clone());
                let stopped = match plan.save {
                    true => super::memory_files::watched(cx, (node, plan.instance.id), stopping).await?,
                    false => stopping.await?,
                };
                outputs.stopped = Some(stopped);
            }
            if plan.action == PowerAction::Stop {
                outputs.observed = outputs.stopped.clone();
            }
            return Ok(());
        }
        outputs.observed = match plan.action {
            PowerAction::Stop => outputs.stopped.clone(),
            PowerAction::Freeze => {
                Some(agent.guest_pause(&cx.mutate(Duration::from_secs(30)), plan.running).await?)
            }
            PowerAction::Unfreeze => {
                Some(agent.guest_resume(&cx.mutate(Duration::from_secs(30)), plan.running).await?)
            }
            PowerAction::Start | PowerAction::Restart => match &plan.start {
                None => return Err(Error::internal("a start has no plan", plan.instance.id)),
                Some(start) => {
                    cx.engine.ensure_networks(cx, node, &start.networks).await?;
                    let patience = if plan.resume { SAVING } else { Duration::from_secs(120) };
                    crate::keys::hand_for_start(cx, &*agent, plan.instance.project, &start.spec).await?;
                    Some(agent.guest_start(&cx.mutate(patience), start.spec.clone()).await?)
                }
            },
        };
        Ok(())
    }

    async fn undo(cx: &StepContext, plan: &PowerPlan, _: &PowerOutputs, step: usize) -> Result<()> {
        let agent = cx.agent(plan.instance.node)?;
        match (step, plan.action) {
            // What keeps its memory stands still meanwhile; one that has ended is not minded.
            (0, PowerAction::Stop) if plan.save => {
                let memory = MachineMemoryRef { instance: plan.instance.id, id: None };
                let request = MachineMemoryEnd { memory, end: MemoryEnd::Cancel };
                agent.machine_memory_end(&cx.mutate(SAVING), request).await
            }
            // What stopped cannot be brought back to where it was: the record will say that it is stopped.
            (0, _) | (_, PowerAction::Stop) => Ok(()),
            (_, PowerAction::Freeze) => {
                still_there(agent.guest_resume(&cx.mutate(Duration::from_secs(30)), plan.running).await)
            }
            // It stands still by itself again where the error has stayed.
            (_, PowerAction::Unfreeze) if plan.was_halted => Ok(()),
            (_, PowerAction::Unfreeze) => {
                still_there(agent.guest_pause(&cx.mutate(Duration::from_secs(30)), plan.running).await)
            }
            (_, PowerAction::Start | PowerAction::Restart) => {
                force_stop(cx, plan.instance.node, plan.instance.id, plan.instance.generation).await
            }
        }
    }

    fn commit(plan: &PowerPlan, outputs: &PowerOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        if plan.save {
            let row = engine.instance_row(plan.instance.id)?;
            tx.replace(&row, &Instance { stateful: true, ..row.value.clone() });
        } else if plan.start.is_some() {
            let row = engine.instance_row(plan.instance.id)?;
            if let Some(after) = templates::started(&row) {
                tx.replace(&row, &after);
            }
        }
        if let Some(observed) = &outputs.observed {
            let records = engine.inventory.read();
            let mut runtime = engine.runtime_of(&records, observed);
            runtime.since = match plan.action {
                PowerAction::Start if plan.resume => Some(Since::Memory),
                PowerAction::Start | PowerAction::Restart => Some(Since::Start),
                PowerAction::Unfreeze => Some(Since::Pause),
                PowerAction::Stop | PowerAction::Freeze => runtime.since,
            };
            // The guest may have ended since, and the host said so: that report is newer than the step's answer.
            let ended = records
                .runtimes
                .get(&plan.instance.id)
                .is_some_and(|r| r.generation == runtime.generation && r.state == RuntimeState::Stopped);
            if !ended {
                tx.put(&runtime);
            }
        }
        Ok(())
    }

    fn abort(plan: &PowerPlan, outputs: &PowerOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let row = engine.instance_row(plan.instance.id)?;
        let mut instance = row.value.clone();
        let stopped = outputs.stopped.is_some() && plan.stop.is_some();
        if stopped && !plan.keep {
            instance.power = DesiredPower::Stopped;
        } else {
            instance.power = plan.before;
        }
        // A restart that stopped nothing ordered nothing either: the record means what runs, or its end would be nobody's.
        if let (PowerAction::Restart, false, Some(ordered)) = (plan.action, stopped, plan.ordered) {
            instance.generation = ordered;
        }
        // A start that failed leaves the memory where it was.
        instance.stateful = (plan.resume && !plan.from_file) || (plan.save && stopped);
        tx.replace(&row, &instance);
        if let Some(observed) = &outputs.stopped {
            let records = engine.inventory.read();
            tx.put(&engine.runtime_of(&records, observed));
        }
        Ok(())
    }

    fn told(plan: &PowerPlan, outputs: &PowerOutputs) -> BTreeMap<String, serde_json::Value> {
        let exit = outputs.stopped.as_ref().and_then(|o| o.exit.as_ref());
        let mut told = match outputs.stopped.is_some() {
            true => reason_context(exit, plan.save),
            false => BTreeMap::new(),
        };
        if plan.action == PowerAction::Start && plan.resume {
            told.insert(RESUMED.into(), true.into());
        }
        told
    }

    fn announce(plan: &PowerPlan) -> Vec<(&'static str, String)> {
        let action = match plan.action {
            PowerAction::Start => "instance-started",
            PowerAction::Stop => "instance-stopped",
            PowerAction::Restart => "instance-restarted",
            PowerAction::Freeze => "instance-paused",
            PowerAction::Unfreeze => "instance-resumed",
        };
        let mut all = vec![(action, plan.path.clone())];
        if plan.paused {
            all.push(("instance-paused", plan.path.clone()));
        }
        all
    }
}

/// A guest that ended meanwhile has nothing to be undone.
fn still_there(undone: Result<Observed>) -> Result<()> {
    match undone {
        Err(e) if matches!(e.kind, ErrorKind::NotFound | ErrorKind::Conflict) => Ok(()),
        other => other.map(drop),
    }
}

/// Ends a guest of a start that failed half-way; fine when there is none.
pub(crate) async fn force_stop(
    cx: &StepContext,
    node: NodeId,
    id: InstanceId,
    generation: Generation,
) -> Result<()> {
    let stop = GuestStop { guest: GuestRef { instance: id, generation }, mode: StopMode::Force };
    match cx.agent(node)?.guest_stop(&cx.mutate(Duration::from_secs(60)), stop).await {
        Ok(_) => Ok(()),
        Err(e) if e.is(karst_model::ErrorKind::NotFound) => Ok(()),
        Err(e) => Err(e),
    }
}
