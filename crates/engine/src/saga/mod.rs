//! Sagas: work over several resources or hosts that is all or nothing across a crash.
//!
//! A saga is a list of steps, each with `run` and `undo`, both idempotent; outputs travel in a typed struct. One
//! transaction checks versions, locks the aggregate roots and writes the plan ([`Saga::begin`] folds pure database work
//! into it). One log write follows each completed step, and the last one is the commit: [`Saga::commit`], the
//! operation's end and the release of the locks happen in it together. A failure undoes what was done, from the failed
//! step backwards. A failed undo is [`OperationState::NeedsAttention`].
//!
//! The runner lives in [`runner`]; every saga is a row of [`registry`], which the harness of `karst-testkit` walks: a
//! saga without a scenario there fails the build.

mod registry;
pub mod runner;

pub use registry::registry;

use crate::{EngineInner, db::Tx, events::Subject, inventory::Lock, operations::LiveOperation};
use async_trait::async_trait;
use karst_agent::{CallContext, Fence, HostAgent};
use karst_model::{Error, NodeId, OperationId, Result, SagaId, operation::OperationState};
use karst_store::Record;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// Most bytes of a plan.
pub const MAX_PLAN: usize = 256 << 10;
/// Most locks of a saga.
pub const MAX_LOCKS: usize = 32;

/// A kind of saga.
#[async_trait]
pub trait Saga: Send + Sync + Sized + 'static {
    /// Name in the log; never changed once released.
    const NAME: &'static str;
    /// Names of the steps; their order is the order of execution and never changes once released.
    const STEPS: &'static [&'static str];
    /// What is to be done, fixed at the start.
    type Plan: Serialize + DeserializeOwned + Send + Sync + 'static;
    /// What the steps found out.
    type Outputs: Serialize + DeserializeOwned + Default + Send + Sync + 'static;

    /// How often a failed step is tried again before the saga is undone. For steps that destroy what no undo can bring
    /// back: once such a step has begun, going on is right as long as there is hope. A cancel is not heeded there.
    fn retries(_step: usize) -> u32 {
        0
    }

    /// Does this plan have the step at all? One that it has not is neither run, nor undone, nor logged. Of a plan the
    /// answer is always the same.
    fn has(_plan: &Self::Plan, _step: usize) -> bool {
        true
    }

    /// Aggregate roots to lock, such as `instances/UUID`.
    fn locks(plan: &Self::Plan) -> Vec<String>;

    /// Of a plan that has none of the steps: writes what the saga leaves, and it is done with the transaction that would have
    /// begun it, without a log or locks. `false`, with nothing written: it begins and ends like any other.
    ///
    /// # Errors
    /// Those of [`Saga::begin`].
    fn at_once(_plan: &mut Self::Plan, _tx: &mut Tx) -> Result<bool> {
        Ok(false)
    }

    /// Pure database work of the beginning, in the transaction that writes the plan.
    fn begin(plan: &Self::Plan, engine: &EngineInner, tx: &mut Tx) -> Result<()>;

    /// Does a step. May be called again after a crash.
    async fn run(cx: &StepContext, plan: &Self::Plan, outputs: &mut Self::Outputs, step: usize)
    -> Result<()>;

    /// Undoes a step that ran, ran half, or did not run at all. May be called again.
    async fn undo(cx: &StepContext, plan: &Self::Plan, outputs: &Self::Outputs, step: usize) -> Result<()>;

    /// Pure database work of the end, in the transaction of the last log write. Called again when that is refused.
    fn commit(plan: &Self::Plan, outputs: &Self::Outputs, engine: &EngineInner, tx: &mut Tx) -> Result<()>;

    /// Pure database work after everything was undone.
    fn abort(plan: &Self::Plan, outputs: &Self::Outputs, engine: &EngineInner, tx: &mut Tx) -> Result<()>;

    /// What the operation's metadata gets at the end.
    fn result(
        _plan: &Self::Plan,
        _outputs: &Self::Outputs,
        _engine: &EngineInner,
    ) -> serde_json::Map<String, serde_json::Value> {
        Default::default()
    }

    /// Announced after the commit: Incus' lifecycle action and the path of the object.
    fn announce(_plan: &Self::Plan) -> Vec<(&'static str, String)> {
        vec![]
    }

    /// What listeners are told along with that.
    fn told(_plan: &Self::Plan, _outputs: &Self::Outputs) -> BTreeMap<String, serde_json::Value> {
        BTreeMap::new()
    }

    /// The object that is announced, where its record is not there before the commit.
    fn subject(_plan: &Self::Plan) -> Option<Subject> {
        None
    }
}

/// How far a saga is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "snake_case")]
pub enum Phase {
    /// Steps before `next` are done.
    Forward {
        /// The step to run.
        next: usize,
    },
    /// Steps after `next` are undone, because of `error`.
    Undoing {
        /// The step to undo.
        next: usize,
        /// Why.
        error: Error,
    },
    /// Undoing `step` failed; an administrator retries or abandons it.
    NeedsAttention {
        /// The step whose undo failed.
        step: usize,
        /// Why the saga failed.
        error: Error,
        /// Why the undo failed.
        undo_error: Error,
    },
}

/// The log of a saga: one record, rewritten after each step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SagaRecord {
    /// Reference.
    pub id: SagaId,
    /// [`Saga::NAME`].
    pub name: String,
    /// The plan.
    pub plan: serde_json::Value,
    /// Outputs so far.
    pub outputs: serde_json::Value,
    /// How far it is.
    pub phase: Phase,
    /// The engine that executes it.
    pub executor: NodeId,
    /// Its epoch at the last write.
    pub epoch: u64,
    /// Locks it holds.
    pub locks: Vec<String>,
    /// The operation that users see.
    pub operation: OperationId,
    /// Project name and id for events.
    pub project: Option<karst_model::ProjectId>,
}

impl Record for SagaRecord {
    const TABLE: &'static str = "sagas";
    fn record_id(&self) -> String {
        self.id.to_string()
    }
}

impl Record for Lock {
    const TABLE: &'static str = "locks";
    fn record_id(&self) -> String {
        self.target.clone()
    }
}

/// What a step may use.
pub struct StepContext {
    /// The engine.
    pub engine: Arc<EngineInner>,
    /// Who calls.
    pub saga: SagaId,
    /// The step.
    pub step: usize,
    /// The operation, for progress.
    pub operation: LiveOperation,
}

impl StepContext {
    /// A call context for a mutation that may take `deadline`.
    pub fn mutate(&self, deadline: Duration) -> CallContext {
        let fence = Fence {
            saga: self.saga,
            executor: self.engine.node,
            epoch: self.engine.epoch,
            step: self.step as u32,
        };
        CallContext::mutate(deadline, fence)
    }

    /// The agent of a node.
    ///
    /// # Errors
    /// Unavailable when the node is not known or not connected.
    pub fn agent(&self, node: NodeId) -> Result<Arc<dyn HostAgent>> {
        self.engine.agents.get(node)
    }
}

/// A saga without its types, as the runner and the registry see it.
#[async_trait]
pub trait AnySaga: Send + Sync {
    /// [`Saga::NAME`].
    fn name(&self) -> &'static str;
    /// [`Saga::STEPS`].
    fn steps(&self) -> &'static [&'static str];
    /// [`Saga::retries`].
    fn retries(&self, step: usize) -> u32;
    /// [`Saga::has`]; true for a plan that cannot be read, which the step then says.
    fn has(&self, plan: &serde_json::Value, step: usize) -> bool;
    /// [`Saga::locks`].
    fn locks(&self, plan: &serde_json::Value) -> Result<Vec<String>>;
    /// [`Saga::begin`].
    fn begin(&self, plan: &serde_json::Value, engine: &EngineInner, tx: &mut Tx) -> Result<()>;
    /// [`Saga::run`]; answers the new outputs.
    async fn run(
        &self,
        cx: &StepContext,
        plan: &serde_json::Value,
        outputs: serde_json::Value,
    ) -> Result<serde_json::Value>;
    /// [`Saga::undo`].
    async fn undo(
        &self,
        cx: &StepContext,
        plan: &serde_json::Value,
        outputs: &serde_json::Value,
    ) -> Result<()>;
    /// [`Saga::commit`].
    fn commit(
        &self,
        plan: &serde_json::Value,
        outputs: &serde_json::Value,
        engine: &EngineInner,
        tx: &mut Tx,
    ) -> Result<()>;
    /// [`Saga::abort`].
    fn abort(
        &self,
        plan: &serde_json::Value,
        outputs: &serde_json::Value,
        engine: &EngineInner,
        tx: &mut Tx,
    ) -> Result<()>;
    /// [`Saga::result`].
    fn result(
        &self,
        plan: &serde_json::Value,
        outputs: &serde_json::Value,
        engine: &EngineInner,
    ) -> serde_json::Map<String, serde_json::Value>;
    /// [`Saga::announce`].
    fn announce(&self, plan: &serde_json::Value) -> Vec<(&'static str, String)>;
    /// [`Saga::told`].
    fn told(
        &self,
        plan: &serde_json::Value,
        outputs: &serde_json::Value,
    ) -> BTreeMap<String, serde_json::Value>;
    /// See [`Saga::subject`].
    fn subject(&self, plan: &serde_json::Value) -> Option<Subject>;
}

/// Erases a saga's types.
pub struct Erased<S>(std::marker::PhantomData<fn() -> S>);

impl<S> Erased<S> {
    /// The eraser.
    pub const fn new() -> Self {
        Self(std::marker::PhantomData)
    }
}

impl<S> Default for Erased<S> {
    fn default() -> Self {
        Self::new()
    }
}

fn plan_of<S: Saga>(value: &serde_json::Value) -> Result<S::Plan> {
    S::Plan::deserialize(value)
        .map_err(|e| Error::internal("a saga's plan cannot be read", format!("{}: {e}", S::NAME)))
}

fn outputs_of<S: Saga>(value: &serde_json::Value) -> Result<S::Outputs> {
    if value.is_null() {
        return Ok(S::Outputs::default());
    }
    S::Outputs::deserialize(value)
        .map_err(|e| Error::internal("a saga's outputs cannot be read", format!("{}: {e}", S::NAME)))
}

#[async_trait]
impl<S: Saga> AnySaga for Erased<S> {
    fn name(&self) -> &'static str {
        S::NAME
    }
    fn steps(&self) -> &'static [&'static str] {
        S::STEPS
    }
    fn retries(&self, step: usize) -> u32 {
        S::retries(step)
    }
    fn has(&self, plan: &serde_json::Value, step: usize) -> bool {
        plan_of::<S>(plan).map_or(true, |p| S::has(&p, step))
    }
    fn locks(&self, plan: &serde_json::Value) -> Result<Vec<String>> {
        Ok(S::locks(&plan_of::<S>(plan)?))
    }
    fn begin(&self, plan: &serde_json::Value, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        S::begin(&plan_of::<S>(plan)?, engine, tx)
    }
    async fn run(
        &self,
        cx: &StepContext,
        plan: &serde_json::Value,
        outputs: serde_json::Value,
    ) -> Result<serde_json::Value> {
        let plan = plan_of::<S>(plan)?;
        let mut typed = outputs_of::<S>(&outputs)?;
        S::run(cx, &plan, &mut typed, cx.step).await?;
        Ok(serde_json::to_value(typed)?)
    }
    async fn undo(
        &self,
        cx: &StepContext,
        plan: &serde_json::Value,
        outputs: &serde_json::Value,
    ) -> Result<()> {
        S::undo(cx, &plan_of::<S>(plan)?, &outputs_of::<S>(outputs)?, cx.step).await
    }
    fn commit(
        &self,
        plan: &serde_json::Value,
        outputs: &serde_json::Value,
        engine: &EngineInner,
        tx: &mut Tx,
    ) -> Result<()> {
        S::commit(&plan_of::<S>(plan)?, &outputs_of::<S>(outputs)?, engine, tx)
    }
    fn abort(
        &self,
        plan: &serde_json::Value,
        outputs: &serde_json::Value,
        engine: &EngineInner,
        tx: &mut Tx,
    ) -> Result<()> {
        S::abort(&plan_of::<S>(plan)?, &outputs_of::<S>(outputs)?, engine, tx)
    }
    fn result(
        &self,
        plan: &serde_json::Value,
        outputs: &serde_json::Value,
        engine: &EngineInner,
    ) -> serde_json::Map<String, serde_json::Value> {
        match (plan_of::<S>(plan), outputs_of::<S>(outputs)) {
            (Ok(p), Ok(o)) => S::result(&p, &o, engine),
            _ => Default::default(),
        }
    }
    fn announce(&self, plan: &serde_json::Value) -> Vec<(&'static str, String)> {
        plan_of::<S>(plan).map(|p| S::announce(&p)).unwrap_or_default()
    }

    fn told(
        &self,
        plan: &serde_json::Value,
        outputs: &serde_json::Value,
    ) -> BTreeMap<String, serde_json::Value> {
        match (plan_of::<S>(plan), outputs_of::<S>(outputs)) {
            (Ok(p), Ok(o)) => S::told(&p, &o),
            _ => BTreeMap::new(),
        }
    }

    fn subject(&self, plan: &serde_json::Value) -> Option<Subject> {
        plan_of::<S>(plan).ok().and_then(|p| S::subject(&p))
    }
}

/// State of the operation of a saga in `phase`.
pub fn operation_state(phase: &Phase) -> OperationState {
    match phase {
        Phase::Forward { .. } => OperationState::Running,
        Phase::Undoing { error, .. } if error.is(karst_model::ErrorKind::Cancelled) => {
            OperationState::Cancelling
        }
        Phase::Undoing { .. } => OperationState::Running,
        Phase::NeedsAttention { .. } => OperationState::NeedsAttention,
    }
}
