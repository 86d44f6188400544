//! The harness: every registered saga, in every scenario, is disturbed at every moment. Each step is repeated and failed,
//! each undo repeated, and the executor killed at each moment and recovered; then the slate must be clean and the outcome
//! must be one of two: as after success, or as before.

use crate::{World, scenarios::Scenario};
use karst_engine::saga::{
    registry,
    runner::{Interference, Moment},
};
use karst_env::SeededEnv;
use karst_model::{Error, operation::OperationState};
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};

/// What a disturbance did.
#[derive(Debug, Clone, Default)]
struct Log {
    seen: Vec<Moment>,
    hit: usize,
}

/// A disturbance: at which moment, what.
#[derive(Debug, Clone)]
struct Plan {
    name: String,
    /// Fails this moment first, so that undos happen.
    fail: Option<Moment>,
    at: Option<Moment>,
    what: Interference,
}

fn injected() -> Error {
    Error::unavailable("injected by the harness")
}

/// Runs one scenario under one plan; answers what was seen and the outcome.
fn run(seed: u64, scenario: &Scenario, plan: &Plan) -> (Log, String, String, Vec<String>, OperationState) {
    let env = SeededEnv::new(seed);
    env.block_on({
        let env = env.clone();
        let (setup, trigger, saga, plan) = (scenario.setup, scenario.trigger, scenario.saga, plan.clone());
        async move {
            let mut world = World::new(&env).await.expect("a fresh platform");
            setup(&world).await.expect("the scenario's setup");
            world.settle().await;
            let before = world.fingerprint();
            let log = Arc::new(Mutex::new(Log::default()));
            let shared = log.clone();
            let fired = Mutex::new((false, false));
            world.engine.set_hook(Some(Arc::new(move |name: &str, moment: Moment| {
                if name != saga {
                    return Interference::None;
                }
                let mut log = shared.lock().expect("log");
                log.seen.push(moment);
                let mut fired = fired.lock().expect("fired");
                if plan.fail == Some(moment) && !fired.0 {
                    fired.0 = true;
                    return Interference::Fail(injected());
                }
                if plan.at == Some(moment) && !fired.1 {
                    fired.1 = true;
                    log.hit += 1;
                    return plan.what.clone();
                }
                Interference::None
            })));
            let operation = trigger(&world).await.expect("the scenario's trigger");
            let id = operation.id();
            let crashed = {
                // A crashed saga never ends by itself: wait until it ended or stands still.
                let mut still = 0;
                let mut last = 0;
                loop {
                    if operation.snapshot().state.is_final() {
                        break false;
                    }
                    karst_env::Env::sleep(&env, std::time::Duration::from_millis(500)).await;
                    let now = log.lock().expect("log").seen.len();
                    still = if now == last { still + 1 } else { 0 };
                    last = now;
                    if still > 40 {
                        break true;
                    }
                }
            };
            if crashed {
                world.reopen().await.expect("a new engine over what is left");
            }
            world.settle().await;
            let state =
                world.engine.operation(&world.admin, id).map(|o| o.state).unwrap_or(OperationState::Pending);
            let mut faults = world.faults().await;
            if saga == "volume-recover" && state == OperationState::Failure {
                // What was lost before is as lost when its recovery was undone.
                let lost = ["the host has volume", "the host has guest", "snapshot "];
                faults.retain(|f| !lost.iter().any(|l| f.starts_with(l)));
            }
            let after = world.fingerprint();
            world.engine.close();
            let log = log.lock().expect("log").clone();
            (log, before, after, faults, state)
        }
    })
}

/// Walks over a scenario. Answers how many disturbances were tried; `ran` gets the steps that its plan has.
///
/// # Panics
/// With the disturbance and what was wrong after it.
pub fn walk(seed: u64, scenario: &Scenario, ran: &mut BTreeSet<(&'static str, usize)>) -> usize {
    let saga = registry().iter().find(|s| s.name() == scenario.saga).expect("a registered saga");
    let nothing = Plan { name: "undisturbed".into(), fail: None, at: None, what: Interference::None };
    let (log, before, success, faults, state) = run(seed, scenario, &nothing);
    let title = format!("{} ({})", scenario.saga, scenario.name);
    assert_eq!(state, OperationState::Success, "{title}: undisturbed");
    assert!(faults.is_empty(), "{title}: undisturbed: {faults:#?}");
    // Those that this plan has; `tests/sagas.rs` demands that each runs in some scenario.
    let steps: Vec<usize> =
        (0..saga.steps().len()).filter(|n| log.seen.contains(&Moment::AfterStep(*n))).collect();
    assert!(!steps.is_empty(), "{title}: a step runs");
    ran.extend(steps.iter().map(|n| (scenario.saga, *n)));

    let mut plans = vec![];
    let mut plan = |name: &str, fail: Option<Moment>, at: Option<Moment>, what: Interference| {
        plans.push(Plan { name: format!("{name} {fail:?} {at:?}"), fail, at, what });
    };
    plan("crash", None, Some(Moment::Begun), Interference::Crash);
    for &n in &steps {
        plan("repeat", None, Some(Moment::BeforeStep(n)), Interference::Repeat);
        plan("fail before", None, Some(Moment::BeforeStep(n)), Interference::Fail(injected()));
        plan("fail after", None, Some(Moment::AfterStep(n)), Interference::Fail(injected()));
        plan("crash before", None, Some(Moment::BeforeStep(n)), Interference::Crash);
        plan("crash after", None, Some(Moment::AfterStep(n)), Interference::Crash);
        if steps.last() != Some(&n) {
            plan("crash logged", None, Some(Moment::Logged(n)), Interference::Crash);
        }
    }
    // A step that is tried again does not lead to undos by failing once: fail the one before it.
    let reachable: Vec<usize> = steps.iter().copied().take_while(|n| saga.retries(*n) == 0).collect();
    let last = reachable.last().copied().map(Moment::AfterStep);
    for &n in &reachable {
        plan("repeat undo", last, Some(Moment::BeforeUndo(n)), Interference::Repeat);
        plan("retry undo", last, Some(Moment::BeforeUndo(n)), Interference::Fail(injected()));
        plan("crash before undo", last, Some(Moment::BeforeUndo(n)), Interference::Crash);
        plan("crash after undo", last, Some(Moment::AfterUndo(n)), Interference::Crash);
    }
    for plan in &plans {
        let (log, start, after, faults, state) = run(seed, scenario, plan);
        let title = format!("{title}: {}", plan.name);
        assert_eq!(start, before, "{title}: the same beginning");
        assert_eq!(log.hit, usize::from(plan.at.is_some()), "{title}: the disturbance must land");
        assert!(faults.is_empty(), "{title}: {faults:#?}");
        match state {
            OperationState::Success => assert_eq!(after, success, "{title}: success"),
            OperationState::Failure => demand_undone(&title, scenario, &before, &after),
            other => panic!("{title}: ended as {other:?}"),
        }
    }
    plans.len()
}

/// After a failure everything is as before, but for what cannot be brought back: a guest that was stopped stays so.
fn demand_undone(title: &str, scenario: &Scenario, before: &str, after: &str) {
    if matches!(
        (scenario.saga, scenario.name),
        ("instance-power", "stop" | "restart" | "stop that keeps the memory")
    ) {
        let stopped = before.replace("Running Running", "Stopped Stopped");
        assert!(after == before || after == stopped, "{title}: undone\n{before}\n{after}");
        return;
    }
    assert_eq!(after, before, "{title}: undone");
}
