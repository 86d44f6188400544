//! Generations: which of two orders to run a guest is the later one, also across a restore of the store from a backup.

use karst_agent::simulated::Fault;
use karst_engine::compute::{create::CreateInstance, power::PowerRequest};
use karst_env::{Env, SeededEnv};
use karst_model::{
    Config, Error, ErrorKind, InstanceId,
    instance::{DesiredPower, Generation, PowerAction, Status},
    operation::OperationState,
    warning::WarningStatus,
};
use karst_store::TxnBuilder;
use karst_testkit::{World, scenarios::container};
use std::time::Duration;

const KEY: &str = "/karst/v1/meta/incarnation";

#[test]
fn a_restored_store_orders_in_an_incarnation_of_its_own() {
    SeededEnv::run(1, |env| async move {
        let mut w = World::new(&env).await.unwrap();
        let kept = w.store.get(KEY).await.unwrap().kv.expect("the first start writes it");
        assert_eq!(&kept.value[..], b"1");
        let request = CreateInstance { start: true, ..container("c1") };
        let (_, operation) = w.engine.instance_create(&w.admin, "default", request).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        let generation =
            |w: &World| w.engine.instance(&w.admin, "default", "c1").unwrap().instance.generation;
        assert_eq!(generation(&w), Generation { incarnation: 1, n: 1 });
        // What a restore does.
        let _ = w.store.txn(TxnBuilder::default().put_raw(KEY, "2").build().unwrap()).await.unwrap();
        w.reopen().await.unwrap();
        let power =
            PowerRequest { action: PowerAction::Restart, force: true, timeout: None, stateful: false };
        let operation = w.engine.instance_power(&w.admin, "default", "c1", power).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        assert_eq!(generation(&w), Generation { incarnation: 2, n: 1 });
        assert_eq!(
            &w.store.get(KEY).await.unwrap().kv.unwrap().value[..],
            b"2",
            "a start does not take it back"
        );
        w.engine.close();
    });
}

fn restart(timeout: u64) -> PowerRequest {
    let timeout = Some(Duration::from_secs(timeout));
    PowerRequest { action: PowerAction::Restart, force: false, timeout, stateful: false }
}

async fn stubborn(w: &World, request: CreateInstance) -> InstanceId {
    let name = request.name.clone().expect("a name");
    let request = CreateInstance { start: true, ..request };
    let (_, operation) = w.engine.instance_create(&w.admin, "default", request).await.unwrap();
    assert_eq!(w.ended(operation).await.error, None);
    let id = w.engine.instance(&w.admin, "default", &name).unwrap().instance.id;
    w.agent.set_ignores_shutdown(id, true);
    id
}

/// Waits for a condition, at most two virtual minutes.
async fn until(w: &World, what: &str, condition: impl Fn() -> bool) {
    for _ in 0..1200 {
        if condition() {
            return;
        }
        w.env.sleep(Duration::from_millis(100)).await;
    }
    panic!("{what}");
}

/// What runs after a restart that could not stop it, or was cancelled, is what the record means: its end is seen as the
/// end of the instance by all who ask for that.
#[test]
fn a_restart_that_stops_nothing_orders_nothing() {
    SeededEnv::run(2, |env| async move {
        let mut w = World::new(&env).await.unwrap();
        let again = Config::from([("boot.autorestart".into(), "true".into())]);
        let short = Config::from([("boot.host_shutdown_timeout".into(), "5".into())]);
        stubborn(&w, CreateInstance { ephemeral: true, ..container("passing") }).await;
        let crashing = stubborn(&w, CreateInstance { config: again, ..container("crashing") }).await;
        stubborn(&w, CreateInstance { config: short, ..container("staying") }).await;
        let first = Generation { incarnation: 1, n: 1 };
        for name in ["passing", "crashing", "staying"] {
            let operation = w.engine.instance_power(&w.admin, "default", name, restart(3)).await.unwrap();
            let end = w.ended(operation).await;
            assert_eq!(end.error.as_ref().map(|e| e.kind), Some(ErrorKind::Timeout), "{name}");
            let operation = w.engine.instance_power(&w.admin, "default", name, restart(600)).await.unwrap();
            w.env.sleep(Duration::from_secs(1)).await;
            w.engine.operation_cancel(&w.admin, operation.id()).await.unwrap();
            assert_eq!(w.ended(operation).await.state, OperationState::Cancelled, "{name}");
            let view = w.engine.instance(&w.admin, "default", name).unwrap();
            assert_eq!(
                (view.instance.generation, view.instance.power),
                (first, DesiredPower::Running),
                "{name}"
            );
            assert_eq!(view.status, Status::Running, "{name}");
        }
        w.settle().await;
        assert_eq!(w.faults().await, Vec::<String>::new());

        // One that is ephemeral goes when it stops.
        let force = PowerRequest { action: PowerAction::Stop, force: true, timeout: None, stateful: false };
        let operation = w.engine.instance_power(&w.admin, "default", "passing", force).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        until(&w, "it is deleted", || w.engine.instance(&w.admin, "default", "passing").is_err()).await;

        // A crash is followed by a start, the second of the instance.
        assert!(w.agent.crash_guest(crashing));
        until(&w, "it runs again", || {
            let view = w.engine.instance(&w.admin, "default", "crashing").unwrap();
            view.status == Status::Running && view.instance.generation == first.next()
        })
        .await;

        // What stops with the platform starts with it.
        assert_eq!(w.engine.host_stop(&w.admin).await.unwrap(), Vec::<String>::new());
        assert_eq!(w.engine.instance(&w.admin, "default", "staying").unwrap().status, Status::Stopped);
        w.reopen().await.unwrap();
        until(&w, "it runs again", || {
            w.engine.instance(&w.admin, "default", "staying").unwrap().status == Status::Running
        })
        .await;
        w.settle().await;
        assert_eq!(w.faults().await, Vec::<String>::new());
        w.engine.close();
    });
}

/// Each start after a crash may fail as what caused the crash still does: it is tried again, later each time, and told.
#[test]
fn a_start_after_a_crash_that_fails_is_tried_again_and_told() {
    SeededEnv::run(4, |env| async move {
        let w = World::new(&env).await.unwrap();
        let again = Config::from([("boot.autorestart".into(), "true".into())]);
        let id = stubborn(&w, CreateInstance { config: again, ..container("c1") }).await;
        let view = || w.engine.instance(&w.admin, "default", "c1").unwrap();
        let told = || {
            let all = w.engine.warnings(&w.admin).unwrap();
            all.into_iter().find(|row| row.kind == "Instance not started" && row.status == WarningStatus::New)
        };
        // Without effect, and with one that is undone by force: that is nobody's wish either.
        w.agent.inject("guest_start", Fault::FailBefore(Error::unavailable("the pool is away")));
        w.agent.inject("guest_start", Fault::FailAfter(Error::timeout("it took too long")));
        w.agent.inject("guest_start", Fault::FailBefore(Error::internal("no memory", "")));
        assert!(w.agent.crash_guest(id));
        until(&w, "it is told", || told().is_some()).await;
        assert_eq!((view().status, view().instance.power), (Status::Stopped, DesiredPower::Running));
        let message = told().unwrap().message.clone();
        assert!(
            message.contains("crashed (killed by signal 9)") && message.contains("tried again"),
            "{message}"
        );
        until(&w, "it runs again", || view().status == Status::Running).await;
        // One start that the user ordered, three that failed, one that did not.
        assert_eq!(view().instance.generation.n, 5);
        until(&w, "that is over", || told().is_none()).await;
        w.settle().await;
        assert_eq!(w.faults().await, Vec::<String>::new());
        w.engine.close();
    });
}

/// A start that failed after the crash does not end the wait for the next one: it began before, and the crash stays.
#[test]
fn a_failed_start_does_not_make_up_for_a_crash() {
    SeededEnv::run(3, |env| async move {
        let w = World::new(&env).await.unwrap();
        let again = Config::from([("boot.autorestart".into(), "true".into())]);
        let id = stubborn(&w, CreateInstance { config: again, ..container("c1") }).await;
        // One that is to wait longer than what follows takes.
        for n in 2..=5 {
            assert!(w.agent.crash_guest(id));
            until(&w, "it runs again", || {
                let view = w.engine.instance(&w.admin, "default", "c1").unwrap();
                view.status == Status::Running && view.instance.generation.n == n
            })
            .await;
        }
        assert!(w.agent.crash_guest(id));
        until(&w, "it is down", || {
            w.engine.instance(&w.admin, "default", "c1").unwrap().status == Status::Stopped
        })
        .await;
        w.agent.inject("guest_start", Fault::FailBefore(Error::unavailable("not now")));
        let start = PowerRequest { action: PowerAction::Start, force: false, timeout: None, stateful: false };
        let operation = w.engine.instance_power(&w.admin, "default", "c1", start).await.unwrap();
        assert!(w.ended(operation).await.error.is_some());
        until(&w, "it runs again", || {
            w.engine.instance(&w.admin, "default", "c1").unwrap().status == Status::Running
        })
        .await;
        w.engine.close();
    });
}
