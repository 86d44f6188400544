//! What starts with its host: tried again while the host cannot do it yet, a few at a time, given up with a warning.

use karst_agent::{
    CallContext,
    simulated::{Fault, SimulatedOptions},
};
use karst_engine::compute::{create::CreateInstance, power::PowerRequest};
use karst_env::{Env, SeededEnv};
use karst_model::{
    Config, Error,
    instance::{PowerAction, Status},
    warning::WarningStatus,
};
use karst_testkit::{World, scenarios::container};
use std::time::Duration;

fn run<F: Future<Output = ()> + Send + 'static>(seed: u64, body: impl FnOnce(World) -> F + Send + 'static) {
    SeededEnv::run(seed, move |env| async move {
        let latency = (Duration::from_millis(1), Duration::from_millis(40));
        let options = SimulatedOptions { cpus: 2, latency, ..Default::default() };
        body(World::with(&env, options).await.unwrap()).await
    });
}

/// Instances that run, and then the host loses its power: the engine is to be opened again.
async fn ran_until_a_power_cut(w: &World, names: &[String]) {
    for name in names {
        let request = CreateInstance { start: true, ..container(name) };
        let (_, operation) = w.engine.instance_create(&w.admin, "default", request).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
    }
    w.engine.close();
    w.agent.power_cut();
}

fn status(w: &World, name: &str) -> Status {
    w.engine.instance(&w.admin, "default", name).unwrap().status
}

fn all_run(w: &World, names: &[String]) -> bool {
    names.iter().all(|name| status(w, name) == Status::Running)
}

/// Waits for a condition, at most `seconds` of virtual time.
async fn until(w: &World, seconds: u64, what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..seconds * 20 {
        if holds() {
            return;
        }
        w.env.sleep(Duration::from_millis(50)).await;
    }
    panic!("never: {what}\n{}", w.fingerprint());
}

/// What is said of instances that do not start with their host.
fn warned(w: &World) -> Option<WarningStatus> {
    let warnings = w.engine.warnings(&w.admin).unwrap();
    warnings.iter().find(|row| row.kind == "Instance not started").map(|row| row.status)
}

/// Is the restart of the host done with?
async fn is_recorded(w: &World) -> bool {
    let context = CallContext::read(Duration::from_secs(5));
    let boot_id = w.host().host_facts(&context, ()).await.unwrap().boot_id;
    let records = w.engine.inner().inventory.read();
    records.nodes.values().any(|node| node.facts.as_ref().is_some_and(|facts| facts.boot_id == boot_id))
}

#[test]
fn what_a_host_cannot_start_yet_is_tried_again() {
    for seed in 0..10 {
        run(seed, |mut w| async move {
            let names = ["a", "b", "c"].map(String::from);
            ran_until_a_power_cut(&w, &names).await;
            // A disk that comes late; guests that come up too late, and are ended again.
            for _ in 0..2 {
                for fault in [
                    Fault::FailBefore(Error::unavailable("injected")),
                    Fault::FailAfter(Error::timeout("injected")),
                    Fault::FailBefore(Error::timeout("injected")),
                ] {
                    w.agent.inject("guest_start", fault);
                }
            }
            w.reopen().await.unwrap();
            // Until the host was asked the records are those from before.
            until(&w, 120, "all run in the end", || w.agent.faults_left() == 0 && all_run(&w, &names)).await;
            w.settle().await;
            w.env.sleep(Duration::from_secs(32)).await;
            assert!(all_run(&w, &names) && is_recorded(&w).await);
            assert_eq!(warned(&w), None);
            assert_eq!(w.faults().await, Vec::<String>::new());
        });
    }
}

#[test]
fn few_start_at_once() {
    for seed in 0..3 {
        run(seed, |mut w| async move {
            let names: Vec<String> = (0..20).map(|n| format!("g{n}")).collect();
            ran_until_a_power_cut(&w, &names).await;
            for _ in &names {
                w.agent.inject("guest_start", Fault::Delay(Duration::from_secs(3)));
            }
            w.reopen().await.unwrap();
            let mut most = 0;
            until(&w, 120, "all run in the end", || {
                most = most.max(w.engine.inner().inventory.read().sagas.len());
                w.agent.faults_left() == 0 && all_run(&w, &names)
            })
            .await;
            assert!((2..=4).contains(&most), "two for each processor at most: {most}");
            w.settle().await;
            assert!(is_recorded(&w).await);
        });
    }
}

#[test]
fn what_does_not_start_is_given_up_with_a_warning() {
    for (error, times) in [(Error::conflict("injected"), 1), (Error::unavailable("injected"), 100)] {
        run(1, move |mut w| async move {
            let names = ["a".to_owned()];
            ran_until_a_power_cut(&w, &names).await;
            let begun = w.agent.count("guest_start");
            for _ in 0..times {
                w.agent.inject("guest_start", Fault::FailBefore(error.clone()));
            }
            w.reopen().await.unwrap();
            until(&w, 900, "it is given up", || warned(&w) == Some(WarningStatus::New)).await;
            assert_eq!(status(&w, "a"), Status::Stopped);
            w.env.sleep(Duration::from_secs(32)).await;
            assert!(is_recorded(&w).await, "whoever takes over does not begin anew");
            let tried = w.agent.count("guest_start") - begun;
            w.env.sleep(Duration::from_secs(300)).await;
            assert_eq!(w.agent.count("guest_start") - begun, tried, "it stays so");
            if times > 1 {
                return assert!((10..20).contains(&tried), "{tried}");
            }
            assert_eq!(tried, 1, "what time does not mend is not tried again");
            let start =
                PowerRequest { action: PowerAction::Start, force: false, timeout: None, stateful: false };
            let operation = w.engine.instance_power(&w.admin, "default", "a", start).await.unwrap();
            assert_eq!(w.ended(operation).await.error, None);
            until(&w, 60, "the warning ends", || warned(&w) == Some(WarningStatus::Resolved)).await;
        });
    }
}

fn with(name: &str, config: &[(&str, &str)], start: bool) -> CreateInstance {
    let config: Config = config.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    CreateInstance { config, start, ..container(name) }
}

/// How often an instance was ordered to start.
fn ordered(w: &World, name: &str) -> u64 {
    w.engine.instance(&w.admin, "default", name).unwrap().instance.generation.n
}

#[test]
fn who_is_made_or_stopped_while_another_is_tried_is_left_to_its_user() {
    run(1, |mut w| async move {
        // `c` comes up alone, and `a` does not for minutes.
        let first =
            [("boot.autostart", "true"), ("boot.autostart.priority", "1"), ("boot.autostart.delay", "5")];
        for request in [with("a", &[], true), with("c", &first, true)] {
            let (_, operation) = w.engine.instance_create(&w.admin, "default", request).await.unwrap();
            assert_eq!(w.ended(operation).await.error, None);
        }
        w.engine.close();
        w.agent.power_cut();
        w.agent.inject("guest_start", Fault::Delay(Duration::from_millis(1)));
        for _ in 0..200 {
            w.agent.inject("guest_start", Fault::FailBefore(Error::unavailable("injected")));
        }
        w.reopen().await.unwrap();
        until(&w, 60, "c runs, and a fails", || w.agent.faults_left() < 200).await;
        assert_eq!(status(&w, "c"), Status::Running);
        let request = with("b", &[("boot.autostart", "true")], false);
        let (_, operation) = w.engine.instance_create(&w.admin, "default", request).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        let stop = PowerRequest { action: PowerAction::Stop, force: true, timeout: None, stateful: false };
        let operation = w.engine.instance_power(&w.admin, "default", "c", stop).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        let before = (ordered(&w, "b"), ordered(&w, "c"));
        w.env.sleep(Duration::from_secs(70)).await;
        assert_eq!((ordered(&w, "b"), ordered(&w, "c")), before);
        // Nor does a daemon that takes over.
        w.reopen().await.unwrap();
        let tried = w.agent.count("guest_start");
        w.env.sleep(Duration::from_secs(70)).await;
        assert!(w.agent.count("guest_start") > tried && !is_recorded(&w).await, "a is still tried");
        assert_eq!((ordered(&w, "b"), ordered(&w, "c")), before);
        until(&w, 900, "it is given up", || warned(&w) == Some(WarningStatus::New)).await;
        w.env.sleep(Duration::from_secs(32)).await;
        assert!(is_recorded(&w).await);
        assert_eq!((ordered(&w, "b"), ordered(&w, "c")), before);
        assert!(w.engine.inner().inventory.read().nodes.values().all(|node| node.starting.is_none()));
        // The next boot is another one.
        w.engine.close();
        w.agent.power_cut();
        w.reopen().await.unwrap();
        until(&w, 60, "all are tried", || ordered(&w, "b") > before.0 && ordered(&w, "c") > before.1).await;
    });
}
