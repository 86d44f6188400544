//! Executes sagas: begin, forward, undo, and recovery after a crash.

use super::{AnySaga, MAX_LOCKS, MAX_PLAN, Phase, Saga, SagaRecord, StepContext, registry};
use crate::{
    EngineInner, Row,
    context::Context,
    db::{Commit, Tx},
    events::{Event, EventKind, Subject},
    inventory::Lock,
    operations::{LiveOperation, NewOperation},
};
use futures::FutureExt;
use karst_env::EnvExt;
use karst_model::{
    Error, ErrorKind, Result, SagaId,
    operation::{Operation, OperationState},
};
use karst_store::Revision;
use std::{collections::BTreeMap, panic::AssertUnwindSafe, sync::Arc, time::Duration};

/// Tries of an undo before it needs attention.
const UNDO_TRIES: u32 = 5;
/// Tries of a transaction whose compares keep failing.
const TXN_TRIES: u32 = 16;

/// A moment at which a test may interfere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// The plan is written.
    Begun,
    /// Before a step runs.
    BeforeStep(usize),
    /// After a step ran, before its log write.
    AfterStep(usize),
    /// After a step's log write.
    Logged(usize),
    /// Before an undo.
    BeforeUndo(usize),
    /// After an undo, before its log write.
    AfterUndo(usize),
}

/// What a test wants to happen then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Interference {
    /// Nothing.
    None,
    /// The step (or undo) fails.
    Fail(Error),
    /// The executor dies: the runner stops at once, as if killed.
    Crash,
    /// The step (or undo) runs twice.
    Repeat,
}

/// Interferes with sagas, for the harness.
pub type Hook = Arc<dyn Fn(&str, Moment) -> Interference + Send + Sync>;

/// Stop without a trace.
enum Stopped {
    /// The executor died, in a test.
    Killed,
    /// Another executor has taken over.
    Superseded,
}

/// Begins a saga: checks, locks and writes the plan in one transaction, then runs it as a task. The answer comes when the
/// plan is durable; the operation tells the rest.
///
/// `prepare` makes the plan of what it reads and is called again when the transaction is refused because something
/// changed meanwhile.
///
/// # Errors
/// Those of `prepare`; conflict when a lock is held, naming who holds it.
pub async fn start<S: Saga>(
    engine: &Arc<EngineInner>,
    context: &Context,
    mut prepare: impl FnMut(&mut Tx) -> Result<(S::Plan, NewOperation)>,
) -> Result<LiveOperation> {
    let saga: Arc<dyn AnySaga> = Arc::new(super::Erased::<S>::new());
    for _ in 0..TXN_TRIES {
        let mut tx = Tx::default();
        let (mut plan, new) = prepare(&mut tx)?;
        let locks = S::locks(&plan);
        if locks.len() > MAX_LOCKS {
            return Err(Error::too_large(format!("one request may touch at most {MAX_LOCKS} objects")));
        }
        check_locks(engine, &locks)?;
        expect_idle_profiles(engine, &mut tx, &locks)?;
        let mut operation = engine.operations.record(context, new);
        if S::at_once(&mut plan, &mut tx)? {
            operation.state = OperationState::Success;
            operation.may_cancel = false;
            let told = S::told(&plan, &S::Outputs::default());
            operation.metadata.extend(S::result(&plan, &S::Outputs::default(), engine));
            tx.put(&operation);
            match at_once(engine, operation, (S::announce(&plan), told), tx).await? {
                Ok(live) => return Ok(live),
                Err(revision) => engine.catch_up(revision).await,
            }
            continue;
        }
        let id = SagaId(engine.env.uuid());
        operation.saga = Some(id);
        operation.state = OperationState::Running;
        let plan_value = serde_json::to_value(&plan)?;
        if serde_json::to_vec(&plan_value)?.len() > MAX_PLAN {
            return Err(Error::too_large("the request is too large to be carried out at once"));
        }
        let record = SagaRecord {
            id,
            name: S::NAME.into(),
            plan: plan_value,
            outputs: serde_json::Value::Null,
            phase: Phase::Forward { next: 0 },
            executor: engine.node,
            epoch: engine.epoch,
            locks: locks.clone(),
            operation: operation.id,
            project: operation.project,
        };
        for target in &locks {
            tx.create(&Lock {
                target: target.clone(),
                saga: id,
                operation: operation.id,
                description: operation.description.clone(),
            });
        }
        S::begin(&plan, engine, &mut tx)?;
        tx.create(&record);
        tx.put(&operation);
        match begin(engine, saga.clone(), record, operation, tx).await? {
            Ok(live) => return Ok(live),
            // Something that was read has changed. See it, then decide anew.
            Err(revision) => engine.catch_up(revision).await,
        }
    }
    Err(Error::conflict("the objects of this request keep changing; try again"))
}

/// Commits the beginning and starts the execution, in a task of its own: a caller who goes away in the middle (a client
/// that disconnects) must not leave a plan with locks that nobody executes. `Err` inside is the revision of a refusal.
async fn begin(
    engine: &Arc<EngineInner>,
    saga: Arc<dyn AnySaga>,
    record: SagaRecord,
    operation: Operation,
    tx: Tx,
) -> Result<std::result::Result<LiveOperation, Revision>> {
    let (sender, answer) = tokio::sync::oneshot::channel();
    let inner = engine.clone();
    let begun = async move {
        // Before it can be seen, or housekeeping would take it up as well.
        let mark = Executing::mark(&inner, record.id);
        // Who gets an error does not know whether it was applied. If it was, housekeeping finds it.
        let revision = match inner.db.commit(tx).await? {
            Commit::Applied(revision) => revision,
            Commit::Refused(revision) => return Ok(Err(revision)),
        };
        // A watch that is behind delays the work; only when it is dead does the work begin before it can be seen.
        let seen = inner.inventory.wait_for(revision).await;
        let live = inner.operations.publish(operation);
        spawn(&inner, saga, record, live.clone(), mark, Some(Moment::Begun));
        seen.map(|()| Ok(live))
    };
    engine.env.spawn_task("saga-begin", async move {
        // Nobody listens when the caller has gone: the operation tells the rest.
        let _ = sender.send(begun.await);
    });
    answer.await.unwrap_or_else(|_| Err(Error::unavailable("the daemon is stopping")))
}

/// Lifecycle actions with the paths of their objects, and what is told along with them.
type Told = (Vec<(&'static str, String)>, BTreeMap<String, serde_json::Value>);

/// Commits what is done with this one transaction, in a task of its own for the reason of [`begin`].
async fn at_once(
    engine: &Arc<EngineInner>,
    operation: Operation,
    (actions, told): Told,
    tx: Tx,
) -> Result<std::result::Result<LiveOperation, Revision>> {
    let (sender, answer) = tokio::sync::oneshot::channel();
    let inner = engine.clone();
    let done = async move {
        let revision = match inner.db.commit(tx).await? {
            Commit::Applied(revision) => revision,
            Commit::Refused(revision) => return Ok(Err(revision)),
        };
        let seen = inner.inventory.wait_for(revision).await;
        for (action, source) in actions {
            let subject = Subject::of(&inner.inventory.read(), operation.project, &source);
            send(&inner, &operation, (action, source), subject, told.clone());
        }
        let live = inner.operations.publish(operation);
        seen.map(|()| Ok(live))
    };
    engine.env.spawn_task("saga-at-once", async move {
        let _ = sender.send(done.await);
    });
    answer.await.unwrap_or_else(|_| Err(Error::unavailable("the daemon is stopping")))
}

/// Fails when one of `locks` is held, saying by what.
pub fn check_locks(engine: &EngineInner, locks: &[String]) -> Result<()> {
    demand_unlocked(&engine.inventory.read(), locks)
}

/// While a profile changes nobody begins to work on its users: what they are would be of two minds.
fn expect_idle_profiles(engine: &EngineInner, tx: &mut Tx, locks: &[String]) -> Result<()> {
    let records = engine.inventory.read();
    let targets = locks.iter().filter_map(|l| l.strip_prefix("instances/")?.parse().ok());
    let instances = targets.filter_map(|id| records.instances.get(&id));
    let profiles: std::collections::BTreeSet<_> = instances.flat_map(|i| i.profiles.clone()).collect();
    for id in profiles {
        crate::tenancy::profiles::demand_idle(&records, tx, id)?;
    }
    Ok(())
}

/// [`check_locks`] for who reads the records already: a second guard on the same thread can deadlock with a writer.
pub(crate) fn demand_unlocked(records: &crate::Records, locks: &[String]) -> Result<()> {
    for target in locks {
        if let Some(lock) = records.lock(target) {
            return Err(Error::conflict(format!(
                "busy: {} (operation {})",
                lock.description.to_lowercase(),
                lock.operation
            )));
        }
    }
    Ok(())
}

/// Takes up every saga of this executor that nobody executes, where its log says it was: after a start of the engine, and
/// when it became known late that a beginning was applied.
///
/// # Errors
/// Unavailable when the store does not answer.
pub async fn recover(engine: &Arc<EngineInner>) -> Result<usize> {
    let found: Vec<SagaId> = engine.inventory.read().sagas.keys().copied().collect();
    let mut taken = 0;
    for id in found {
        let Some(mark) = Executing::claim(engine, id) else {
            continue;
        };
        // Read after the claim: whoever executed it until now has seen its last write here before.
        let row = engine.inventory.read().sagas.get(&id).cloned();
        let ours = row.filter(|s| s.executor == engine.node && s.epoch <= engine.epoch);
        let Some(mut record) = ours.map(|r| r.value.clone()) else {
            continue;
        };
        let Some(saga) = registry().iter().find(|s| s.name() == record.name) else {
            if engine.operations.live(record.operation).is_none() {
                tracing::error!(saga = %record.id, name = %record.name, "a saga of an unknown kind waits; is this an older version?");
            }
            continue;
        };
        let operation = engine.inventory.read().operations.get(&record.operation).map(|o| o.value.clone());
        let Some(operation) = operation else {
            tracing::error!(saga = %record.id, "a saga's operation is missing");
            continue;
        };
        if matches!(record.phase, Phase::NeedsAttention { .. }) {
            if engine.operations.live(record.operation).is_none() {
                engine.operations.publish(operation);
            }
            continue;
        }
        let live = engine.operations.publish(operation);
        // Writing our epoch first makes a paused predecessor's next log write fail.
        if write_log(engine, &mut record, None).await.is_err() {
            continue;
        }
        tracing::info!(saga = %record.id, name = %record.name, phase = ?record.phase, "takes up a saga");
        spawn(engine, saga.clone(), record, live, mark, None);
        taken += 1;
    }
    Ok(taken)
}

/// Says that this engine executes a saga, until dropped.
struct Executing {
    engine: Arc<EngineInner>,
    id: SagaId,
}

impl Executing {
    fn mark(engine: &Arc<EngineInner>, id: SagaId) -> Self {
        engine.executing.lock().unwrap_or_else(|e| e.into_inner()).insert(id);
        Self { engine: engine.clone(), id }
    }

    /// `None` when somebody does already.
    fn claim(engine: &Arc<EngineInner>, id: SagaId) -> Option<Self> {
        let new = engine.executing.lock().unwrap_or_else(|e| e.into_inner()).insert(id);
        new.then(|| Self { engine: engine.clone(), id })
    }
}

impl Drop for Executing {
    fn drop(&mut self) {
        self.engine.executing.lock().unwrap_or_else(|e| e.into_inner()).remove(&self.id);
    }
}

/// Tries the undo of a saga that needs attention again, or abandons it (`abandon`: locks are released, what is left stays).
///
/// # Errors
/// Not found when there is no such saga, conflict when it does not need attention.
pub async fn attend(engine: &Arc<EngineInner>, id: SagaId, abandon: bool) -> Result<()> {
    for _ in 0..TXN_TRIES {
        let (row, operation) = {
            let records = engine.inventory.read();
            let row = records.sagas.get(&id).cloned();
            let row = row.ok_or_else(|| Error::not_found(format!("no saga {id} waits")))?;
            let operation = records.operations.get(&row.operation).map(|o| o.value.clone());
            (row, operation)
        };
        if row.executor != engine.node {
            return Err(Error::unavailable("another node executes this saga; ask there"));
        }
        let Phase::NeedsAttention { step, error, .. } = row.phase.clone() else {
            return Err(Error::conflict(format!("the saga {id} is still running")));
        };
        let saga = registry()
            .iter()
            .find(|s| s.name() == row.name)
            .ok_or_else(|| Error::unsupported(format!("sagas {:?} are not known to this version", row.name)))?
            .clone();
        let mut operation = operation.ok_or_else(|| Error::not_found("the saga's operation is gone"))?;
        let mut record = row.value.clone();
        record.phase = Phase::Undoing { next: step, error };
        record.epoch = engine.epoch;
        operation.state = super::operation_state(&record.phase);
        operation.updated_at = engine.env.now();
        // One transaction claims it, so that of two who attend to it at once only one goes on.
        let mut tx = Tx::default();
        tx.replace(&row, &record);
        tx.put(&operation);
        let Some(mark) = Executing::claim(engine, id) else {
            // Its executor is on its way out, or somebody else attends to it: the next look tells.
            engine.env.sleep(Duration::from_millis(50)).await;
            continue;
        };
        match engine.db.commit(tx).await? {
            Commit::Applied(revision) => {
                // It is claimed: whatever the watch does, the work goes on.
                let _ = engine.inventory.wait_for(revision).await;
                let live = engine.operations.publish(operation);
                if !abandon {
                    spawn(engine, saga, record, live, mark, None);
                    return Ok(());
                }
                return match finish(engine, &*saga, &record, &live, End::Abandoned).await {
                    Ok(()) | Err(Failure::Stopped(_)) => Ok(()),
                    Err(Failure::Error(e)) => Err(e),
                };
            }
            Commit::Refused(revision) => engine.catch_up(revision).await,
        }
    }
    Err(Error::conflict("the saga keeps changing; try again"))
}

fn spawn(
    engine: &Arc<EngineInner>,
    saga: Arc<dyn AnySaga>,
    record: SagaRecord,
    live: LiveOperation,
    mark: Executing,
    begun: Option<Moment>,
) {
    let engine = engine.clone();
    engine.env.clone().spawn_task(saga.name(), async move {
        let mut record = record;
        if let Some(moment) = begun
            && engine.interfere(saga.name(), moment) == Interference::Crash
        {
            // Killed: nobody in this process takes it up again.
            std::mem::forget(mark);
            return;
        }
        match execute(&engine, &*saga, &mut record, &live).await {
            Err(Stopped::Killed) => std::mem::forget(mark),
            // Whoever took over goes on.
            Ok(()) | Err(Stopped::Superseded) => drop(mark),
        }
    });
}

async fn execute(
    engine: &Arc<EngineInner>,
    saga: &dyn AnySaga,
    record: &mut SagaRecord,
    live: &LiveOperation,
) -> Result<(), Stopped> {
    // A pure function of the plan, which never changes.
    let has: Vec<bool> = (0..saga.steps().len()).map(|step| saga.has(&record.plan, step)).collect();
    let after = |next: usize| (next..has.len()).find(|step| has[*step]).unwrap_or(has.len());
    let before = |next: usize| (0..next.min(has.len())).rev().find(|step| has[*step]);
    loop {
        match record.phase.clone() {
            Phase::Forward { next } if after(next) != next => {
                record.phase = Phase::Forward { next: after(next) }
            }
            Phase::Forward { next } if next >= saga.steps().len() => {
                match finish(engine, saga, record, live, End::Done).await {
                    Ok(()) => return Ok(()),
                    Err(Failure::Stopped(s)) => return Err(s),
                    Err(Failure::Error(error)) => {
                        record.phase = Phase::Undoing { next: before(next).unwrap_or(0), error };
                        write_log(engine, record, Some(live)).await?;
                    }
                }
            }
            Phase::Forward { next } => match step(engine, saga, record, live, next).await {
                Ok(outputs) => {
                    record.outputs = outputs;
                    record.phase = Phase::Forward { next: next + 1 };
                    // The last step's log write is the commit.
                    if after(next + 1) < saga.steps().len() {
                        write_log(engine, record, None).await?;
                        if engine.interfere(saga.name(), Moment::Logged(next)) == Interference::Crash {
                            return Err(Stopped::Killed);
                        }
                    }
                }
                Err(Failure::Stopped(s)) => return Err(s),
                Err(Failure::Error(error)) => {
                    tracing::warn!(saga = %record.id, name = saga.name(), step = saga.steps()[next], error = %error,
                        context = error.context.as_deref().unwrap_or_default(), "a step failed; undoing");
                    record.phase = Phase::Undoing { next, error };
                    write_log(engine, record, Some(live)).await?;
                }
            },
            Phase::Undoing { next, error } => match undo(engine, saga, record, live, next).await {
                Ok(()) if before(next).is_none() => {
                    return match finish(engine, saga, record, live, End::Undone).await {
                        Ok(()) => Ok(()),
                        Err(Failure::Stopped(s)) => Err(s),
                        Err(Failure::Error(undo_error)) => {
                            record.phase = Phase::NeedsAttention { step: 0, error, undo_error };
                            write_log(engine, record, Some(live)).await
                        }
                    };
                }
                Ok(()) => {
                    record.phase = Phase::Undoing { next: before(next).unwrap_or(0), error };
                    write_log(engine, record, None).await?;
                }
                Err(Failure::Stopped(s)) => return Err(s),
                Err(Failure::Error(undo_error)) => {
                    tracing::error!(saga = %record.id, name = saga.name(), step = saga.steps()[next], error = %undo_error,
                        context = undo_error.context.as_deref().unwrap_or_default(), "an undo failed; the saga needs attention");
                    record.phase = Phase::NeedsAttention { step: next, error, undo_error };
                    return write_log(engine, record, Some(live)).await;
                }
            },
            Phase::NeedsAttention { .. } => return Ok(()),
        }
    }
}

enum Failure {
    Error(Error),
    Stopped(Stopped),
}

impl From<Stopped> for Failure {
    fn from(stopped: Stopped) -> Self {
        Failure::Stopped(stopped)
    }
}

fn step_context(
    engine: &Arc<EngineInner>,
    record: &SagaRecord,
    live: &LiveOperation,
    step: usize,
) -> StepContext {
    StepContext { engine: engine.clone(), saga: record.id, step, operation: live.clone() }
}

async fn step(
    engine: &Arc<EngineInner>,
    saga: &dyn AnySaga,
    record: &SagaRecord,
    live: &LiveOperation,
    next: usize,
) -> Result<serde_json::Value, Failure> {
    let retries = saga.retries(next);
    let mut wait = Duration::from_millis(100);
    for attempt in 0.. {
        match try_step(engine, saga, record, live, next, retries > 0).await {
            // What is wrong with what is asked for is wrong the next time too.
            Err(Failure::Error(e)) if attempt < retries && !e.is(ErrorKind::Invalid) => {
                tracing::warn!(saga = %record.id, step = saga.steps()[next], error = %e, attempt, "a step failed; trying again");
                engine.env.sleep(wait).await;
                wait *= 2;
            }
            other => return other,
        }
    }
    unreachable!("the last attempt returns")
}

async fn try_step(
    engine: &Arc<EngineInner>,
    saga: &dyn AnySaga,
    record: &SagaRecord,
    live: &LiveOperation,
    next: usize,
    no_return: bool,
) -> Result<serde_json::Value, Failure> {
    if live.is_cancelled() && !no_return {
        return Err(Failure::Error(live.cancel_error()));
    }
    let mut times = 1;
    match engine.interfere(saga.name(), Moment::BeforeStep(next)) {
        Interference::None => {}
        Interference::Fail(e) => return Err(Failure::Error(e)),
        Interference::Crash => return Err(Failure::Stopped(Stopped::Killed)),
        Interference::Repeat => times = 2,
    }
    let cx = step_context(engine, record, live, next);
    let mut outputs = record.outputs.clone();
    for _ in 0..times {
        let work = AssertUnwindSafe(saga.run(&cx, &record.plan, outputs)).catch_unwind();
        let cancel = async {
            match no_return {
                true => std::future::pending().await,
                false => live.cancelled().await,
            }
        };
        // Dropping the step's future cancels its calls to agents.
        outputs = tokio::select! {
            biased;
            done = work => match done {
                Ok(Ok(outputs)) => outputs,
                Ok(Err(e)) => return Err(Failure::Error(e)),
                Err(_) => return Err(Failure::Error(Error::internal("a step panicked", saga.steps()[next]))),
            },
            () = cancel => return Err(Failure::Error(live.cancel_error())),
        };
    }
    match engine.interfere(saga.name(), Moment::AfterStep(next)) {
        Interference::Fail(e) => Err(Failure::Error(e)),
        Interference::Crash => Err(Failure::Stopped(Stopped::Killed)),
        _ => Ok(outputs),
    }
}

async fn undo(
    engine: &Arc<EngineInner>,
    saga: &dyn AnySaga,
    record: &SagaRecord,
    live: &LiveOperation,
    next: usize,
) -> Result<(), Failure> {
    let cx = step_context(engine, record, live, next);
    let mut wait = Duration::from_millis(100);
    let mut times = 1;
    for attempt in 1.. {
        let mut failed = None;
        match engine.interfere(saga.name(), Moment::BeforeUndo(next)) {
            Interference::None => {}
            Interference::Fail(e) => failed = Some(e),
            Interference::Crash => return Err(Failure::Stopped(Stopped::Killed)),
            Interference::Repeat => times = 2,
        }
        if failed.is_none() {
            for _ in 0..times {
                failed = match AssertUnwindSafe(saga.undo(&cx, &record.plan, &record.outputs))
                    .catch_unwind()
                    .await
                {
                    Ok(Ok(())) => None,
                    Ok(Err(e)) => Some(e),
                    Err(_) => Some(Error::internal("an undo panicked", saga.steps()[next])),
                };
            }
        }
        match failed {
            None => break,
            Some(e) if attempt >= UNDO_TRIES => return Err(Failure::Error(e)),
            Some(e) => {
                tracing::warn!(saga = %record.id, step = saga.steps()[next], error = %e, attempt, "an undo failed; trying again");
                engine.env.sleep(wait).await;
                wait *= 2;
            }
        }
    }
    match engine.interfere(saga.name(), Moment::AfterUndo(next)) {
        Interference::Crash => Err(Failure::Stopped(Stopped::Killed)),
        _ => Ok(()),
    }
}

/// Writes the log; with `live` also the operation's state as it follows from the phase.
async fn write_log(
    engine: &Arc<EngineInner>,
    record: &mut SagaRecord,
    live: Option<&LiveOperation>,
) -> Result<(), Stopped> {
    let mut wait = Duration::from_millis(50);
    loop {
        let Some(row) = current(engine, record) else {
            return Err(Stopped::Superseded);
        };
        record.epoch = engine.epoch;
        let mut tx = Tx::default();
        tx.replace(&row, record);
        let operation = live.map(|live| {
            let mut operation = (*live.snapshot()).clone();
            operation.state = super::operation_state(&record.phase);
            operation.may_cancel = false;
            operation.updated_at = engine.env.now();
            if let Phase::NeedsAttention { error, undo_error, .. } = &record.phase {
                operation.error =
                    Some(error.clone().with_context(format!("and the undo failed: {undo_error}")));
            }
            tx.put(&operation);
            operation
        });
        match engine.db.commit(tx).await {
            Ok(Commit::Applied(revision)) => {
                // An inventory that is behind changes nothing about the log.
                let _ = engine.inventory.wait_for(revision).await;
                if let Some(operation) = operation {
                    engine.operations.publish(operation);
                }
                return Ok(());
            }
            // Somebody has written since. When that was another executor, `current` says so in the next round; else it was
            // a write of ours whose answer was lost, and writing the same again does no harm.
            Ok(Commit::Refused(revision)) => engine.catch_up(revision).await,
            Err(e) if e.is(ErrorKind::Conflict) => return Err(Stopped::Superseded),
            Err(e) => {
                tracing::warn!(saga = %record.id, error = %e, "the saga's log cannot be written; waiting for the store");
                engine.env.sleep(wait).await;
                wait = (wait * 2).min(Duration::from_secs(5));
            }
        }
    }
}

/// The saga's record while it is still ours.
fn current(engine: &EngineInner, record: &SagaRecord) -> Option<Row<SagaRecord>> {
    let records = engine.inventory.read();
    let row = records.sagas.get(&record.id)?;
    (row.executor == engine.node && row.epoch <= engine.epoch).then(|| row.clone())
}

/// How a saga ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Done,
    Undone,
    Abandoned,
}

/// The operation of a saga whose log is gone, when it has ended.
fn ended(engine: &EngineInner, record: &SagaRecord) -> Option<Operation> {
    let records = engine.inventory.read();
    let gone = !records.sagas.contains_key(&record.id);
    let operation = records.operations.get(&record.operation)?;
    (gone && operation.state.is_final()).then(|| operation.value.clone())
}

/// The objects that a saga is about to announce, as they are while it holds their locks.
fn subjects(engine: &EngineInner, saga: &dyn AnySaga, record: &SagaRecord) -> Vec<Option<Subject>> {
    let records = engine.inventory.read();
    let of = |source: &str| Subject::of(&records, record.project, source);
    let own = saga.subject(&record.plan);
    saga.announce(&record.plan).iter().map(|(_, source)| own.clone().or_else(|| of(source))).collect()
}

fn told(
    engine: &EngineInner,
    saga: &dyn AnySaga,
    record: &SagaRecord,
    end: End,
    operation: Operation,
    before: Vec<Option<Subject>>,
) {
    if end == End::Done && operation.state == OperationState::Success {
        announce(engine, saga, record, &operation, before);
    }
    engine.operations.publish(operation);
}

/// The last write: commit or abort, the operation's end, the release of the locks, the end of the log.
async fn finish(
    engine: &Arc<EngineInner>,
    saga: &dyn AnySaga,
    record: &SagaRecord,
    live: &LiveOperation,
    end: End,
) -> Result<(), Failure> {
    let mut wait = Duration::from_millis(50);
    let mut refused = 0;
    let mut before = vec![];
    loop {
        let Some(row) = current(engine, record) else {
            return match ended(engine, record) {
                // Our own last write, whose answer was lost.
                Some(operation) => {
                    told(engine, saga, record, end, operation, before);
                    Ok(())
                }
                None => Err(Failure::Stopped(Stopped::Superseded)),
            };
        };
        before = subjects(engine, saga, record);
        let mut tx = Tx::default();
        let mut operation: Operation = (*live.snapshot()).clone();
        operation.may_cancel = false;
        operation.updated_at = engine.env.now();
        if end != End::Done {
            match saga.abort(&record.plan, &record.outputs, engine, &mut tx) {
                Ok(()) => {}
                // Who abandons wants the locks released, also when the plan cannot be read any more.
                Err(e) if end == End::Abandoned => {
                    tracing::error!(saga = %record.id, error = %e, "an abandoned saga leaves its records as they are");
                    tx = Tx::default();
                }
                Err(e) => return Err(Failure::Error(e)),
            }
            let error = match &record.phase {
                Phase::Undoing { error, .. } | Phase::NeedsAttention { error, .. } => error.clone(),
                Phase::Forward { .. } => Error::internal("the operation was undone", "no error is known"),
            };
            operation.state = if error.is(ErrorKind::Cancelled) {
                OperationState::Cancelled
            } else {
                OperationState::Failure
            };
            operation.error = Some(error);
        } else {
            saga.commit(&record.plan, &record.outputs, engine, &mut tx).map_err(Failure::Error)?;
            operation.metadata.extend(saga.result(&record.plan, &record.outputs, engine));
            operation.state = OperationState::Success;
        }
        tx.delete(&row);
        for target in &record.locks {
            tx.delete_id::<Lock>(target);
        }
        tx.put(&operation);
        match engine.db.commit(tx).await {
            Ok(Commit::Applied(revision)) => {
                // An inventory that is behind changes nothing about the end.
                let _ = engine.inventory.wait_for(revision).await;
                told(engine, saga, record, end, operation, before);
                return Ok(());
            }
            Ok(Commit::Refused(revision)) => {
                refused += 1;
                if refused > TXN_TRIES {
                    return Err(Failure::Error(Error::conflict(
                        "the objects of this request keep changing; try again",
                    )));
                }
                engine.catch_up(revision).await;
            }
            Err(e) if e.is(ErrorKind::Conflict) => return Err(Failure::Stopped(Stopped::Superseded)),
            // That stays so, however long one waits.
            Err(e) if e.is(ErrorKind::TooLarge) => return Err(Failure::Error(e)),
            Err(e) => {
                tracing::warn!(saga = %record.id, error = %e, "a saga's end cannot be written; waiting for the store");
                engine.env.sleep(wait).await;
                wait = (wait * 2).min(Duration::from_secs(5));
            }
        }
    }
}

fn announce(
    engine: &EngineInner,
    saga: &dyn AnySaga,
    record: &SagaRecord,
    operation: &Operation,
    before: Vec<Option<Subject>>,
) {
    let before = before.into_iter().chain(std::iter::repeat(None));
    let told = saga.told(&record.plan, &record.outputs);
    for ((action, source), before) in saga.announce(&record.plan).into_iter().zip(before) {
        let after = Subject::of(&engine.inventory.read(), record.project, &source);
        send(engine, operation, (action, source), Subject::changed(before, after), told.clone());
    }
}

fn send(
    engine: &EngineInner,
    operation: &Operation,
    (action, source): (&'static str, String),
    subject: Option<Subject>,
    context: BTreeMap<String, serde_json::Value>,
) {
    engine.events.send(Event {
        time: engine.env.now(),
        project: operation.project,
        subject,
        project_name: engine.project_name(operation.project),
        kind: EventKind::Lifecycle { action, source, context, requestor: operation.requestor.clone() },
    });
}
