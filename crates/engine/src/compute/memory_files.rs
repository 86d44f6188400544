//! Memory of virtual machines in files of their host, for who administers hosts: a machine that runs is saved into one and ends,
//! one that does not run goes on from there, and the memory of one that runs is dumped to look into. The path is the
//! administrator's; the host's own policy grants it, and nothing else of the host is named.
//!
//! A save and a dump are one saga ([`MemoryWriting`]): the host begins, it is waited for, the file gets its name, and what is to
//! become of the machine becomes of it. Until the file has its name a cancel, or a failure, leaves the machine as it was, running
//! if it ran, and no file; from then on it is gone on with. A file stays where it is whatever is started from it.

use super::{lock, path, power::SAVING};
use crate::{
    Engine, EngineInner, Records, Row,
    context::Context,
    db::Tx,
    events::reason_context,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    volumes,
};
use async_trait::async_trait;
use karst_agent::{
    CallContext, GuestRef, GuestStop, MachineDump, MachineMemoryBegin, MachineMemoryEnd, MachineMemoryRef,
    MemoryFileChange, MemoryWish, check_memory_path,
};
use karst_env::EnvExt;
use karst_model::{
    Error, ErrorKind, InstanceId, MemoryJobId, NodeId, OperationId, Result,
    access::Permission,
    guest::{Observed, StopMode},
    instance::{DesiredPower, Instance, InstanceKind, Lifecycle, PowerAction, RuntimeState, Status},
    memory::{DOCUMENT, DumpFormat, MemoryEnd, MemoryPhase, MemoryState, SavedMemory},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, os::fd::OwnedFd, time::Duration};

const CALL: Duration = Duration::from_secs(60);
/// How long a dump may take that somebody waits for.
const DUMP: Duration = Duration::from_secs(1800);
/// Between two looks at how far it is.
const LOOK: Duration = Duration::from_millis(200);
/// How long a host may be silent before it is given up; one that is started anew is back before.
const SILENCE: Duration = Duration::from_secs(300);

/// Key of an operation's metadata under which it says that it writes memory: an object with `instance` (UUID), `kind` (`save`,
/// `dump`, or `stop` for a stop that keeps the memory), `done` and `total`.
pub const METADATA: &str = "memory_writing";

/// A machine to be saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaveMemory {
    /// The file.
    pub path: String,
    /// What describes the machine, for who starts it from there; no secret is in it.
    pub document: String,
    /// Is it to stand still when it goes on from there? `None`: as it does now.
    pub paused: Option<bool>,
}

/// What becomes of a machine whose memory was dumped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AfterDump {
    /// It goes on.
    GoesOn,
    /// It ends by force.
    Ends,
    /// It is reset.
    Reset,
}

/// Memory to be dumped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DumpMemory {
    /// The file; nothing is there.
    pub path: String,
    /// Its form.
    pub format: DumpFormat,
    /// What then.
    pub after: AfterDump,
}

/// Memory that is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryView {
    /// The operation that it is.
    pub operation: OperationId,
    /// `save`, `dump` or `stop`.
    pub kind: String,
    /// How far it is.
    pub state: MemoryState,
}

/// What an operation says of memory that it writes.
pub(crate) fn told(instance: InstanceId, kind: &str, state: &MemoryState) -> serde_json::Value {
    serde_json::json!({"instance": instance, "kind": kind, "done": state.done, "total": state.total})
}

/// The memory of an instance that is written: its operation, kind and name on the host.
fn going(records: &Records, instance: &Instance) -> Option<(OperationId, String, Option<MemoryJobId>)> {
    let held = records.lock(&lock(instance.id))?;
    let saga = records.sagas.get(&held.saga)?;
    if saga.name == MemoryWriting::NAME {
        let plan: WritingPlan = serde_json::from_value(saga.plan.clone()).ok()?;
        return Some((saga.operation, plan.kind().into(), Some(plan.id)));
    }
    let operation = records.operations.get(&saga.operation)?;
    let kind = operation.metadata.get(METADATA)?.get("kind")?.as_str()?;
    Some((operation.id, kind.to_owned(), None))
}

/// The operation of it, of a machine that is to be stopped.
pub(crate) fn operation_of(records: &Records, instance: &Instance) -> Option<OperationId> {
    going(records, instance).filter(|(_, _, id)| id.is_some()).map(|(operation, ..)| operation)
}

fn demand_document(document: &str) -> Result<()> {
    match document.len() > DOCUMENT {
        true => {
            Err(Error::too_large(format!("the description of the machine is larger than {DOCUMENT} bytes"))
                .at("document"))
        }
        false => Ok(()),
    }
}

impl Engine {
    /// Saves a running virtual machine into a file of its host, and ends it.
    ///
    /// # Errors
    /// Forbidden to all but administrators of the server; invalid, not found, conflict (not running, busy, not prepared for it),
    /// unsupported for containers. What the host refuses the operation says.
    pub async fn machine_save(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        request: SaveMemory,
    ) -> Result<LiveOperation> {
        context.demand_server(Permission::ServerEdit)?;
        demand_document(&request.document)?;
        let wish = |frozen| MemoryWish::Save {
            document: request.document.clone(),
            paused: request.paused.unwrap_or(frozen),
        };
        self.write_memory(context, project, name, &request.path, AfterDump::Ends, wish).await
    }

    /// Writes the memory of a running virtual machine into a file of its host, to look into.
    ///
    /// # Errors
    /// Those of [`Engine::machine_save`].
    pub async fn machine_dump(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        request: DumpMemory,
    ) -> Result<LiveOperation> {
        context.demand_server(Permission::ServerEdit)?;
        let wish = |_| MemoryWish::Dump { format: request.format };
        self.write_memory(context, project, name, &request.path, request.after, wish).await
    }

    /// Dumps the memory of a running virtual machine, which stands still meanwhile: its bytes, and a descriptor that reads them. On the
    /// host it has no name, and is gone with the descriptor.
    ///
    /// # Errors
    /// Forbidden to all but administrators of the server, and by the host's policy; not found, conflict (not running, written already),
    /// unsupported for containers and forms that QEMU or the guest does not have.
    pub async fn machine_memory(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        format: DumpFormat,
    ) -> Result<(u64, OwnedFd)> {
        context.demand_server(Permission::ServerEdit)?;
        let (guest, _, agent) = self.active(context, project, name)?;
        let answer =
            agent.machine_memory_dump(&CallContext::read(DUMP), MachineDump { guest, format }).await?;
        let fd = answer.fds.into_iter().next();
        Ok((answer.value, fd.ok_or_else(|| Error::internal("there is no dump", "no descriptor"))?))
    }

    async fn write_memory(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        file: &str,
        after: AfterDump,
        wish: impl Fn(bool) -> MemoryWish,
    ) -> Result<LiveOperation> {
        let project = self.project(context, project, Permission::InstanceUse)?;
        check_memory_path(file)?;
        let inner = self.inner();
        runner::start::<MemoryWriting>(inner, context, |tx| {
            let records = inner.inventory.read();
            let row = records.instance(&project, name)?;
            if row.kind != InstanceKind::VirtualMachine {
                let text = format!(
                    "instance {name:?} is a container; only the memory of virtual machines is written to a file"
                );
                return Err(Error::unsupported(text));
            }
            let runtime = records.runtimes.get(&row.id);
            let status = row.status(runtime.map(|r| &r.value));
            if status == Status::Error {
                return Err(Error::conflict(format!(
                    "instance {name:?} is halted by an error: resume it when the cause is gone, then write its memory"
                )));
            }
            if row.lifecycle != Lifecycle::Ready || !status.is_up() {
                return Err(Error::conflict(format!("instance {name:?} is not running; start it first")));
            }
            let wish = wish(status == Status::Frozen);
            if matches!(wish, MemoryWish::Save { .. }) {
                super::power::demand_stateful(row, &records.expanded(row).0)?;
                super::run::demand_defined(&records, row)?;
            }
            tx.expect(row);
            tx.expect(&project);
            let generation = runtime.map_or(row.generation, |r| r.generation);
            let plan = WritingPlan {
                id: MemoryJobId(inner.env.uuid()),
                guest: GuestRef { instance: row.id, generation },
                node: row.node,
                file: file.to_owned(),
                before: row.power,
                after,
                path: path(&project.name, name),
                wish,
            };
            let words = match plan.is_save() {
                true => "Saving instance to a file",
                false => "Dumping memory of instance",
            };
            let mut new =
                NewOperation::task(words, Some(project.id), "instances", plan.path.clone());
            new.may_cancel = true;
            new.metadata.insert(METADATA.into(), plan.told(&MemoryState::default()));
            Ok((plan, new))
        })
        .await
    }

    /// How far the memory of an instance is written, by a save, a dump, or a stop that keeps it; `None` when none is.
    ///
    /// # Errors
    /// Not found, unavailable, forbidden.
    pub async fn memory_writing(
        &self,
        context: &Context,
        project: &str,
        name: &str,
    ) -> Result<Option<MemoryView>> {
        let view = self.find(context, project, name, Permission::ProjectView)?;
        let found = going(&self.inner().inventory.read(), &view.instance);
        let Some((operation, kind, id)) = found else { return Ok(None) };
        let agent = self.inner().agents.get(view.instance.node)?;
        let at = MachineMemoryRef { instance: view.instance.id, id };
        let state = agent.machine_memory_state(&CallContext::read(CALL), at).await?;
        Ok(Some(MemoryView { operation, kind, state }))
    }

    /// Breaks off what writes the memory of an instance, and answers when it has ended: a machine that ran runs.
    ///
    /// # Errors
    /// Not found, conflict when none is written or it is past that, forbidden; and what its end failed of.
    pub async fn memory_writing_abort(&self, context: &Context, project: &str, name: &str) -> Result<()> {
        let view = self.find(context, project, name, Permission::InstanceUse)?;
        let inner = self.inner();
        let none = || Error::conflict("the memory of the instance is not being written");
        let found = going(&inner.inventory.read(), &view.instance);
        let (operation, ..) = found.ok_or_else(none)?;
        let live = inner.operations.live(operation).ok_or_else(none)?;
        super::disk_copy::cancel(inner, &live)?;
        match &live.ended().await.error {
            Some(e) if e.is(ErrorKind::Cancelled) => Ok(()),
            Some(e) => Err(e.clone()),
            None => Err(Error::conflict("all of the memory was written already")),
        }
    }

    /// What a file of this host with saved memory says of itself.
    ///
    /// # Errors
    /// Forbidden to all but administrators of the server, and by the host's policy; invalid for what is none, not found.
    pub async fn memory_file(&self, context: &Context, path: &str) -> Result<SavedMemory> {
        context.demand_server(Permission::ServerEdit)?;
        check_memory_path(path)?;
        let agent = self.inner().agents.get(self.inner().node)?;
        agent.memory_file_read(&CallContext::read(CALL), path.to_owned()).await
    }

    /// Has a file of this host with the memory of machine `uuid` say something else of itself, in one step.
    ///
    /// # Errors
    /// Those of [`Engine::memory_file`]; conflict when it is another machine's, too large.
    pub async fn memory_file_change(
        &self,
        context: &Context,
        path: &str,
        uuid: uuid::Uuid,
        document: String,
        paused: bool,
    ) -> Result<()> {
        context.demand_server(Permission::ServerEdit)?;
        check_memory_path(path)?;
        demand_document(&document)?;
        let inner = self.inner();
        let agent = inner.agents.get(inner.node)?;
        let request = MemoryFileChange { path: path.to_owned(), uuid, document, paused };
        agent.memory_file_change(&inner.reconcile_context(CALL), request).await
    }

    /// Starts a virtual machine from memory in a file of its host, which stays; to stand still if `paused`. Whether its disks are
    /// what they were then nobody can know but who asks for it.
    ///
    /// # Errors
    /// Those of a start; forbidden to all but administrators of the server, conflict for a machine that keeps memory over its stop.
    /// What the host refuses (the file, its policy, what differs of the machine) the operation says, and nothing has changed.
    pub async fn machine_restore(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        file: &str,
        paused: bool,
    ) -> Result<LiveOperation> {
        context.demand_server(Permission::ServerEdit)?;
        check_memory_path(file)?;
        let request = super::power::PowerRequest {
            action: PowerAction::Start,
            force: false,
            timeout: None,
            stateful: false,
        };
        let also = super::power::Also { paused, memory: Some(file.to_owned()), ..Default::default() };
        self.power(context, project, name, request, also).await
    }
}

/// Tells of the progress of a stop that keeps the memory, until it answers.
pub(crate) async fn watched<T: Send>(
    cx: &StepContext,
    (node, instance): (NodeId, InstanceId),
    stop: impl Future<Output = Result<T>> + Send,
) -> Result<T> {
    let mut stop = std::pin::pin!(stop);
    loop {
        if let Ok(answer) = cx.engine.env.timeout(Duration::from_secs(1), stop.as_mut()).await {
            return answer;
        }
        let at = MachineMemoryRef { instance, id: None };
        // What cannot be told is told a second later.
        if let Ok(agent) = cx.agent(node)
            && let Ok(state) = agent.machine_memory_state(&CallContext::read(LOOK), at).await
            && state.phase == MemoryPhase::Running
        {
            cx.engine.operations.progress(&cx.operation, |m| {
                m.insert(METADATA.into(), told(instance, "stop", &state));
            });
        }
    }
}

/// Plan of [`MemoryWriting`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WritingPlan {
    id: MemoryJobId,
    guest: GuestRef,
    node: NodeId,
    /// The file.
    file: String,
    wish: MemoryWish,
    before: DesiredPower,
    after: AfterDump,
    /// Of the instance.
    path: String,
}

impl WritingPlan {
    fn is_save(&self) -> bool {
        matches!(self.wish, MemoryWish::Save { .. })
    }

    fn kind(&self) -> &'static str {
        if self.is_save() { "save" } else { "dump" }
    }

    fn ends(&self) -> bool {
        self.after == AfterDump::Ends
    }

    fn at(&self) -> MachineMemoryRef {
        MachineMemoryRef { instance: self.guest.instance, id: Some(self.id) }
    }

    fn told(&self, state: &MemoryState) -> serde_json::Value {
        told(self.guest.instance, self.kind(), state)
    }

    async fn end(&self, cx: &StepContext, end: MemoryEnd) -> Result<()> {
        let request = MachineMemoryEnd { memory: self.at(), end };
        cx.agent(self.node)?.machine_memory_end(&cx.mutate(SAVING), request).await
    }

    /// Until all is written.
    async fn wait(&self, cx: &StepContext) -> Result<()> {
        let (mut heard, mut last) = (cx.engine.env.monotonic(), None);
        loop {
            let successor =
                cx.engine.inventory.read().sagas.get(&cx.saga).is_some_and(|s| s.epoch > cx.engine.epoch);
            if successor {
                return Err(Error::conflict("another daemon goes on with this"));
            }
            let asked = match cx.agent(self.node) {
                Ok(agent) => agent.machine_memory_state(&CallContext::read(CALL), self.at()).await,
                Err(e) => Err(e),
            };
            match asked {
                Err(e)
                    if matches!(e.kind, ErrorKind::Unavailable | ErrorKind::Timeout)
                        && cx.engine.env.monotonic().saturating_sub(heard) < SILENCE => {}
                Err(e) => return Err(e),
                Ok(state) => {
                    heard = cx.engine.env.monotonic();
                    self.tell(cx, &state, &mut last);
                    match state.phase {
                        MemoryPhase::Running => {}
                        MemoryPhase::Done => return Ok(()),
                        MemoryPhase::Failed { reason } => {
                            return Err(Error::conflict(format!(
                                "the memory could not be written: {reason}"
                            )));
                        }
                        MemoryPhase::Gone => {
                            return Err(Error::conflict(
                                "the virtual machine ended before its memory was written",
                            ));
                        }
                    }
                }
            }
            cx.engine.env.sleep(LOOK).await;
        }
    }

    /// Tells of the progress, at most once a second.
    fn tell(&self, cx: &StepContext, state: &MemoryState, last: &mut Option<Duration>) {
        let now = cx.engine.env.monotonic();
        let ended = state.phase != MemoryPhase::Running;
        if !ended && last.is_some_and(|last| now.saturating_sub(last) < Duration::from_secs(1)) {
            return;
        }
        *last = Some(now);
        cx.engine.operations.progress(&cx.operation, |m| {
            m.insert(METADATA.into(), self.told(state));
        });
    }
}

/// Outputs of [`MemoryWriting`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct WritingOutputs {
    observed: Option<Observed>,
}

/// Begins, waits, gives the file its name, and does with the machine what is to be done.
pub struct MemoryWriting;

#[async_trait]
impl Saga for MemoryWriting {
    const NAME: &'static str = "machine-memory-writing";
    const STEPS: &'static [&'static str] = &["begin", "wait", "keep", "after"];
    type Plan = WritingPlan;
    type Outputs = WritingOutputs;

    // A file with its name may have taken the place of another, and what has ended is in the file alone.
    fn retries(step: usize) -> u32 {
        if step >= 2 { 5 } else { 0 }
    }

    fn has(plan: &WritingPlan, step: usize) -> bool {
        step < 3 || plan.after != AfterDump::GoesOn
    }

    fn locks(plan: &WritingPlan) -> Vec<String> {
        vec![lock(plan.guest.instance)]
    }

    fn begin(plan: &WritingPlan, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        if plan.ends() {
            let row = engine.instance_row(plan.guest.instance)?;
            tx.replace(&row, &Instance { power: DesiredPower::Stopped, ..row.value.clone() });
        }
        Ok(())
    }

    async fn run(
        cx: &StepContext,
        plan: &WritingPlan,
        outputs: &mut WritingOutputs,
        step: usize,
    ) -> Result<()> {
        match step {
            0 => {
                let request = MachineMemoryBegin {
                    guest: plan.guest,
                    id: plan.id,
                    path: plan.file.clone(),
                    wish: plan.wish.clone(),
                };
                cx.agent(plan.node)?.machine_memory_begin(&cx.mutate(CALL), request).await
            }
            1 => plan.wait(cx).await,
            2 => plan.end(cx, MemoryEnd::Keep).await,
            _ if plan.ends() => {
                let stop = GuestStop { guest: plan.guest, mode: StopMode::Force };
                outputs.observed = Some(cx.agent(plan.node)?.guest_stop(&cx.mutate(CALL), stop).await?);
                Ok(())
            }
            _ => cx.agent(plan.node)?.guest_reset(&CallContext::read(CALL), plan.guest).await,
        }
    }

    async fn undo(cx: &StepContext, plan: &WritingPlan, _: &WritingOutputs, step: usize) -> Result<()> {
        match step {
            0 => plan.end(cx, MemoryEnd::Cancel).await,
            _ => Ok(()),
        }
    }

    fn commit(plan: &WritingPlan, outputs: &WritingOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        if let Some(observed) = outputs.observed.as_ref().filter(|_| plan.ends()) {
            let records = engine.inventory.read();
            let mut runtime = engine.runtime_of(&records, observed);
            runtime.since = records.runtimes.get(&observed.instance).and_then(|r| r.since);
            tx.put(&runtime);
        }
        Ok(())
    }

    fn abort(plan: &WritingPlan, _: &WritingOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let row = engine.instance_row(plan.guest.instance)?;
        let records = engine.inventory.read();
        // One that has ended all the same has ended as it was to.
        let ended = records.runtimes.get(&row.id).is_some_and(|r| r.state == RuntimeState::Stopped);
        if plan.ends() && !ended {
            tx.replace(&row, &Instance { power: plan.before, ..row.value.clone() });
        }
        Ok(())
    }

    fn announce(plan: &WritingPlan) -> Vec<(&'static str, String)> {
        if plan.ends() { vec![("instance-stopped", plan.path.clone())] } else { vec![] }
    }

    fn told(plan: &WritingPlan, outputs: &WritingOutputs) -> BTreeMap<String, serde_json::Value> {
        let exit = outputs.observed.as_ref().and_then(|o| o.exit.as_ref());
        if plan.ends() { reason_context(exit, plan.is_save()) } else { BTreeMap::new() }
    }
}

/// Refuses a start from a file of what is not to be started so.
pub(crate) fn demand_restorable(records: &Records, row: &Row<Instance>) -> Result<()> {
    let name = &*row.name;
    if row.kind != InstanceKind::VirtualMachine {
        return Err(Error::unsupported("virtual machines only go on from their memory").at("path"));
    }
    if volumes::runs(records, row) {
        return Err(Error::conflict(format!("instance {name:?} is running")));
    }
    if row.stateful {
        return Err(Error::conflict(format!(
            "instance {name:?} keeps memory over its stop, which would be of the past then; drop that first"
        )));
    }
    super::power::demand_stateful(row, &records.expanded(row).0)
}
