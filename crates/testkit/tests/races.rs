//! Many things at once, under seeds: creations, deletions, changes of power, guests and hosts that fail by themselves,
//! cancels, and undos that fail. Afterwards the slate is clean.
//!
//! `KARST_SEEDS=1000` runs that many seeds instead of the usual few.

use karst_agent::simulated::{Fault, SimulatedOptions};
use karst_engine::{
    LiveOperation,
    compute::{create::CreateInstance, power::PowerRequest, update::UpdateInstance},
    images::ImageOptions,
    network::CreateNetwork,
    saga::runner::{Interference, Moment},
    tenancy::UpdateProfile,
};
use karst_env::{Env, EnvExt, SeededEnv};
use karst_model::{
    Config, Error, ErrorKind, InstanceId, Vmid,
    device::Devices,
    instance::{InstanceKind, PowerAction, RuntimeState, Status},
    operation::{Operation, OperationState},
};
use karst_testkit::{World, scenarios::container};
use std::{sync::Arc, time::Duration};

fn seeds(usual: u64) -> std::ops::Range<u64> {
    let n = std::env::var("KARST_SEEDS").ok().and_then(|s| s.parse().ok());
    0..n.unwrap_or(usual)
}

fn slow() -> SimulatedOptions {
    SimulatedOptions { latency: (Duration::from_millis(1), Duration::from_millis(40)), ..Default::default() }
}

fn run<F: Future<Output = ()> + Send + 'static>(seed: u64, body: impl FnOnce(World) -> F + Send + 'static) {
    SeededEnv::run(seed, move |env| async move { body(World::with(&env, slow()).await.unwrap()).await });
}

const fn power(action: PowerAction, force: bool) -> PowerRequest {
    PowerRequest { action, force, timeout: Some(Duration::from_secs(20)), stateful: false }
}

async fn done(w: &World, operation: LiveOperation) -> Arc<Operation> {
    w.ended(operation).await
}

async fn make(w: &World, request: CreateInstance) -> InstanceId {
    let name = request.name.clone().unwrap();
    let (_, operation) = w.engine.instance_create(&w.admin, "default", request).await.unwrap();
    assert_eq!(done(w, operation).await.error, None);
    w.engine.instance(&w.admin, "default", &name).unwrap().instance.id
}

async fn started(w: &World, name: &str) -> InstanceId {
    make(w, CreateInstance { start: true, ..container(name) }).await
}

fn status(w: &World, name: &str) -> Option<Status> {
    w.engine.instance(&w.admin, "default", name).ok().map(|v| v.status)
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

async fn demand_clean(w: &World, title: &str) {
    w.settle().await;
    // The next sweep has seen everything.
    w.env.sleep(Duration::from_secs(32)).await;
    w.settle().await;
    let faults = w.faults().await;
    assert!(faults.is_empty(), "{title}: {faults:#?}\n{}", w.fingerprint());
    let observed = w
        .host()
        .guest_observe_all(&karst_agent::CallContext::read(Duration::from_secs(5)), ())
        .await
        .unwrap();
    let records = w.engine.inner().inventory.read();
    for seen in observed {
        let recorded = records.runtimes.get(&seen.instance).map_or(RuntimeState::Stopped, |r| r.state);
        assert_eq!(recorded, seen.state, "{title}: what is recorded of {}", seen.instance);
    }
}

/// Refusals that a race may end with; anything else is a defect.
fn is_fair(e: &Error) -> bool {
    matches!(e.kind, ErrorKind::Conflict | ErrorKind::NotFound | ErrorKind::Cancelled)
}

#[test]
fn a_crowd_on_few_instances() {
    for seed in seeds(20) {
        run(seed, move |w| async move {
            let w = Arc::new(w);
            let mut tasks = vec![];
            for n in 0..20u64 {
                let w2 = w.clone();
                tasks.push(w.env.spawn_task("client", async move {
                    let w = w2;
                    for _ in 0..6 {
                        w.env.sleep(Duration::from_millis(w.env.below(300))).await;
                        let name = format!("x{}", w.env.below(5));
                        let (e, c) = (&w.engine, &w.admin);
                        let action = [
                            PowerAction::Start,
                            PowerAction::Stop,
                            PowerAction::Restart,
                            PowerAction::Freeze,
                            PowerAction::Unfreeze,
                        ];
                        let action = action[w.env.below(5) as usize];
                        let begun = match w.env.below(8) {
                            0..=2 => {
                                let (start, ephemeral) = (w.env.below(2) == 0, w.env.below(6) == 0);
                                let request = CreateInstance { start, ephemeral, ..container(&name) };
                                e.instance_create(c, "default", request).await.map(|x| x.1)
                            }
                            3 => e.instance_delete(c, "default", &name).await,
                            4 => {
                                if let Ok(v) = e.instance(c, "default", &name) {
                                    match w.env.below(3) {
                                        0 => w.agent.crash_guest(v.instance.id),
                                        1 => w.agent.shut_down_guest(v.instance.id),
                                        _ => {
                                            w.agent.crash();
                                            true
                                        }
                                    };
                                }
                                continue;
                            }
                            _ => {
                                e.instance_power(c, "default", &name, power(action, w.env.below(2) == 0))
                                    .await
                            }
                        };
                        match begun {
                            Err(e) => assert!(is_fair(&e), "{n}: {e:?}"),
                            Ok(operation) => {
                                if w.env.below(5) == 0 {
                                    w.env.sleep(Duration::from_millis(w.env.below(60))).await;
                                    // Too late, or not possible: both are answers.
                                    let _ = e.operation_cancel(c, operation.id()).await;
                                }
                                let end = done(&w, operation).await;
                                assert_ne!(end.state, OperationState::NeedsAttention, "{end:?}");
                                if let Some(e) = &end.error {
                                    assert!(
                                        is_fair(e)
                                            || e.is(ErrorKind::Unavailable)
                                            || e.is(ErrorKind::Timeout),
                                        "{end:?}"
                                    );
                                }
                            }
                        }
                    }
                }));
            }
            for task in tasks {
                task.join().await.unwrap();
            }
            demand_clean(&w, &format!("seed {seed}")).await;
        });
    }
}

#[test]
fn twenty_creations_at_once() {
    run(5, |w| async move {
        let requests =
            (0..20).map(|n| w.engine.instance_create(&w.admin, "default", container(&format!("c{n}"))));
        for begun in futures::future::join_all(requests).await {
            assert_eq!(done(&w, begun.unwrap().1).await.error, None);
        }
        let mut vmids: Vec<_> =
            w.engine.instances(&w.admin, "default").unwrap().iter().map(|v| v.instance.vmid.0).collect();
        vmids.sort_unstable();
        assert_eq!(vmids, (100..120).collect::<Vec<_>>());
        let deletions = (0..20).map(|n| {
            let (w, name) = (&w, format!("c{n}"));
            async move { w.engine.instance_delete(&w.admin, "default", &name).await }
        });
        for begun in futures::future::join_all(deletions).await {
            assert_eq!(done(&w, begun.unwrap()).await.error, None);
        }
        demand_clean(&w, "create and delete").await;
    });
}

#[test]
fn a_vmid_never_comes_back() {
    run(6, |mut w| async move {
        make(&w, container("a")).await;
        make(&w, container("b")).await;
        let operation = w.engine.instance_delete(&w.admin, "default", "b").await.unwrap();
        done(&w, operation).await;
        w.reopen().await.unwrap();
        make(&w, container("c")).await;
        assert_eq!(w.engine.instance(&w.admin, "default", "c").unwrap().instance.vmid.0, 102);
        // A refused request takes none.
        w.engine.instance_create(&w.admin, "default", container("c")).await.unwrap_err();
        make(&w, container("d")).await;
        assert_eq!(w.engine.instance(&w.admin, "default", "d").unwrap().instance.vmid.0, 103);
    });
}

#[test]
fn a_vmid_may_be_chosen_once() {
    run(6, |mut w| async move {
        let chosen = |name: &str, n: u32| CreateInstance { vmid: Some(Vmid(n)), ..container(name) };
        let number =
            |w: &World, name: &str| w.engine.instance(&w.admin, "default", name).unwrap().instance.vmid.0;
        make(&w, container("a")).await;
        make(&w, chosen("far", 5000)).await;
        make(&w, chosen("next", 102)).await;
        assert_eq!([number(&w, "far"), number(&w, "next")], [5000, 102]);
        // What is drawn goes on as before, around them.
        for (name, n) in [("b", 101), ("c", 103)] {
            make(&w, container(name)).await;
            assert_eq!(number(&w, name), n);
        }
        // Taken, or given out before: in this life of the engine and in the next.
        for name in ["far", "a"] {
            let operation = w.engine.instance_delete(&w.admin, "default", name).await.unwrap();
            done(&w, operation).await;
        }
        for again in [false, true] {
            if again {
                w.reopen().await.unwrap();
            }
            for (n, part) in [(102, "is taken"), (101, "is taken"), (5000, "before"), (100, "before")] {
                let request = chosen("x", n);
                let e = w.engine.instance_create(&w.admin, "default", request).await.unwrap_err();
                assert!(e.is(ErrorKind::Conflict) && e.field.as_deref() == Some("vmid"), "{n}: {e:?}");
                assert!(e.message.contains(part), "{n}: {e}");
            }
        }
        make(&w, chosen("last", 999_999_999)).await;
        make(&w, chosen("beside", 5001)).await;
        make(&w, container("d")).await;
        assert_eq!([number(&w, "last"), number(&w, "beside"), number(&w, "d")], [999_999_999, 5001, 104]);
        // Two who choose the same at once: one has it.
        let both = ["e", "f"].map(|name| w.engine.instance_create(&w.admin, "default", chosen(name, 7000)));
        let mut had = 0;
        for begun in futures::future::join_all(both).await {
            match begun {
                Ok((_, operation)) => {
                    assert_eq!(done(&w, operation).await.error, None);
                    had += 1;
                }
                Err(e) => assert!(e.is(ErrorKind::Conflict) && e.field.as_deref() == Some("vmid"), "{e:?}"),
            }
        }
        assert_eq!(had, 1);
        // What could not be made may be tried again under its number.
        w.agent.inject("volume_create", Fault::FailBefore(Error::conflict("not now")));
        let (_, operation) = w.engine.instance_create(&w.admin, "default", chosen("g", 8000)).await.unwrap();
        assert!(done(&w, operation).await.error.is_some());
        make(&w, chosen("g", 8000)).await;
        demand_clean(&w, "chosen VMIDs").await;
    });
}

#[test]
fn guests_that_end_by_themselves_are_noticed_also_during_a_saga() {
    for seed in seeds(20) {
        run(seed, |w| async move {
            let id = started(&w, "c1").await;
            let update = UpdateInstance {
                description: "x".into(),
                ephemeral: false,
                config: Config::from([("limits.memory".into(), "64MiB".into())]),
                devices: Devices::new(),
                profiles: vec!["default".into()],
                if_version: None,
            };
            w.agent.inject("guest_update", Fault::Delay(Duration::from_secs(3)));
            let operation = w.engine.instance_update(&w.admin, "default", "c1", update).await.unwrap();
            w.env.sleep(Duration::from_secs(1)).await;
            assert!(w.agent.crash_guest(id));
            done(&w, operation).await;
            // Soon after the saga, not at the next sweep.
            until(&w, 3, "the crash is noticed", || status(&w, "c1") == Some(Status::Stopped)).await;
            demand_clean(&w, "crash during an update").await;
        });
    }
}

#[test]
fn a_busy_host_is_looked_at_as_a_whole_all_the_same() {
    run(8, |w| async move {
        let (busy, quiet) = (started(&w, "busy").await, started(&w, "quiet").await);
        w.env.sleep(Duration::from_secs(1)).await;
        let before = w.agent.count("guest_observe_all");
        let _ = quiet;
        for n in 0..60 {
            // Something happens every second.
            let action = if n % 2 == 0 { PowerAction::Freeze } else { PowerAction::Unfreeze };
            let operation =
                w.engine.instance_power(&w.admin, "default", "busy", power(action, true)).await.unwrap();
            done(&w, operation).await;
            w.env.sleep(Duration::from_secs(1)).await;
        }
        let _ = busy;
        assert!(w.agent.count("guest_observe_all") > before, "no sweep in a minute");
    });
}

#[test]
fn what_starts_while_the_host_is_asked_is_not_taken_for_gone() {
    let mut raced = 0;
    for seed in seeds(30) {
        let count = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let shared = count.clone();
        let options = SimulatedOptions { caller: Some("control".into()), ..slow() };
        SeededEnv::run(seed, move |env| async move {
            let w = World::with(&env, options).await.unwrap();
            // Slow answers: what they say is old when it comes.
            env.partition().set_latency(Duration::from_millis(5), Duration::from_millis(400));
            let id = make(&w, container("c1")).await;
            for _ in 0..6 {
                w.agent.crash();
                env.sleep(Duration::from_millis(env.below(800))).await;
                let operation = w
                    .engine
                    .instance_power(&w.admin, "default", "c1", power(PowerAction::Start, true))
                    .await
                    .unwrap();
                if done(&w, operation).await.error.is_none() {
                    shared.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    env.sleep(Duration::from_secs(3)).await;
                    assert_eq!(status(&w, "c1"), Some(Status::Running), "it runs and was never stopped");
                    let runtime =
                        w.engine.instance(&w.admin, "default", "c1").unwrap().runtime.clone().unwrap();
                    assert_eq!(runtime.exit, None, "{id}");
                }
                if let Ok(operation) =
                    w.engine.instance_power(&w.admin, "default", "c1", power(PowerAction::Stop, true)).await
                {
                    done(&w, operation).await;
                }
                env.sleep(Duration::from_secs(3)).await;
            }
        });
        raced += count.load(std::sync::atomic::Ordering::Relaxed);
    }
    assert!(raced > 30, "the starts must happen: {raced}");
}

#[test]
fn a_host_goes_away_and_comes_back() {
    for seed in seeds(10) {
        run(seed, |w| async move {
            started(&w, "c1").await;
            let gone = w.env.below(100);
            let w = Arc::new(w);
            let w2 = w.clone();
            let cut = w.env.spawn_task("cut", async move {
                w2.env.sleep(Duration::from_millis(gone)).await;
                w2.agent.set_reachable(false);
                w2.env.sleep(Duration::from_secs(1)).await;
                w2.agent.set_reachable(true);
            });
            let begun = w
                .engine
                .instance_create(&w.admin, "default", CreateInstance { start: true, ..container("c2") })
                .await
                .unwrap();
            let end = done(&w, begun.1).await;
            cut.join().await.unwrap();
            assert_ne!(
                end.state,
                OperationState::NeedsAttention,
                "a second without the host is survived by trying again"
            );
            demand_clean(&w, "host away").await;
            assert_eq!(status(&w, "c1"), Some(Status::Running));
        });
    }
}

#[test]
fn after_a_power_cut_what_ran_starts_again() {
    for seed in seeds(10) {
        run(seed, |mut w| async move {
            started(&w, "ran").await;
            make(&w, container("still")).await;
            let config = Config::from([("boot.autostart".into(), "true".into())]);
            make(&w, CreateInstance { config, ..container("always") }).await;
            let config = Config::from([("boot.autostart".into(), "false".into())]);
            make(&w, CreateInstance { config, start: true, ..container("never") }).await;
            // What it knew of its guests may be lost with the power.
            let tears = w.env.below(2) == 0;
            let cut = |w: &World| if tears { w.agent.power_cut_that_tears() } else { w.agent.power_cut() };
            // The daemon may die with the host, or live elsewhere; and the first answers of the host may fail.
            if w.env.below(2) == 0 {
                w.engine.close();
                cut(&w);
                w.reopen().await.unwrap();
            } else {
                if w.env.below(2) == 0 {
                    w.agent.inject("guest_observe_all", Fault::FailBefore(Error::unavailable("injected")));
                }
                cut(&w);
            }
            until(&w, 20, "what ran starts again", || {
                status(&w, "ran") == Some(Status::Running) && status(&w, "always") == Some(Status::Running)
            })
            .await;
            w.env.sleep(Duration::from_secs(5)).await;
            assert_eq!(status(&w, "still"), Some(Status::Stopped));
            assert_eq!(status(&w, "never"), Some(Status::Stopped));
            demand_clean(&w, "power cut").await;
        });
    }
}

/// A power cut in the middle of a change: the saga of before holds the instance when what ran is to start again.
#[test]
fn after_a_power_cut_what_was_busy_starts_again_too() {
    for seed in seeds(10) {
        run(seed, |mut w| async move {
            let busy = started(&w, "busy").await;
            started(&w, "idle").await;
            // The change takes its time, before the cut and after it.
            for _ in 0..3 {
                w.agent.inject("guest_update", Fault::Delay(Duration::from_secs(5)));
            }
            let update = UpdateInstance {
                description: "x".into(),
                ephemeral: false,
                config: Config::from([("limits.memory".into(), "256MiB".into())]),
                devices: Devices::new(),
                profiles: vec!["default".into()],
                if_version: None,
            };
            w.engine.instance_update(&w.admin, "default", "busy", update).await.unwrap();
            w.env.sleep(Duration::from_millis(w.env.below(300))).await;
            w.engine.close();
            w.agent.power_cut();
            w.reopen().await.unwrap();
            let lock = format!("instances/{busy}");
            assert!(w.engine.inner().inventory.read().lock(&lock).is_some(), "the cut met the change");
            // What is recorded of before the cut is not what runs.
            w.env.sleep(Duration::from_secs(20)).await;
            until(&w, 60, "both run again", || {
                status(&w, "idle") == Some(Status::Running) && status(&w, "busy") == Some(Status::Running)
            })
            .await;
            demand_clean(&w, "power cut in a change").await;
        });
    }
}

/// The platform ends with its guests, in order; with the next daemon those run again that it stopped, and no others.
#[test]
fn all_stop_with_the_platform_and_start_with_it() {
    for seed in seeds(10) {
        run(seed, |mut w| async move {
            let with = |pairs: &[(&str, &str)]| {
                pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect::<Config>()
            };
            let stubborn = CreateInstance {
                config: with(&[("boot.host_shutdown_timeout", "5"), ("boot.stop.priority", "3")]),
                start: true,
                ..container("stubborn")
            };
            let stubborn = make(&w, stubborn).await;
            w.agent.set_ignores_shutdown(stubborn, true);
            let forced = with(&[("boot.host_shutdown_action", "force-stop")]);
            make(&w, CreateInstance { config: forced, start: true, ..container("forced") }).await;
            let saved =
                with(&[("boot.host_shutdown_action", "stateful-stop"), ("migration.stateful", "true")]);
            let machine =
                CreateInstance { config: saved, kind: InstanceKind::VirtualMachine, ..container("saved") };
            make(&w, CreateInstance { start: true, ..machine }).await;
            // A container has no memory to keep: it stops as others do.
            let cannot = with(&[("boot.host_shutdown_action", "stateful-stop")]);
            make(&w, CreateInstance { config: cannot, start: true, ..container("cannot") }).await;
            started(&w, "frozen").await;
            started(&w, "itself").await;
            make(&w, container("off")).await;
            let freeze =
                w.engine.instance_power(&w.admin, "default", "frozen", power(PowerAction::Freeze, false));
            done(&w, freeze.await.unwrap()).await;
            let stop =
                w.engine.instance_power(&w.admin, "default", "itself", power(PowerAction::Stop, false));
            done(&w, stop.await.unwrap()).await;
            // One is busy when it begins.
            let busy =
                w.engine.instance_power(&w.admin, "default", "forced", power(PowerAction::Restart, false));
            busy.await.unwrap();
            assert_eq!(w.engine.host_stop(&w.admin).await.unwrap(), Vec::<String>::new());
            let all = ["stubborn", "forced", "saved", "cannot", "frozen", "itself", "off"];
            for name in all {
                assert_eq!(status(&w, name), Some(Status::Stopped), "{name}");
            }
            assert!(w.engine.instance(&w.admin, "default", "saved").unwrap().instance.stateful);
            let start = w.engine.instance_power(&w.admin, "default", "off", power(PowerAction::Start, false));
            assert_eq!(start.await.unwrap_err().kind, ErrorKind::Unavailable);
            w.env.sleep(Duration::from_secs(40)).await;
            assert!(all.iter().all(|n| status(&w, n) == Some(Status::Stopped)), "nothing starts them again");
            // The host may go down in between.
            w.engine.close();
            if w.env.below(2) == 0 {
                w.agent.power_cut();
            }
            w.reopen().await.unwrap();
            until(&w, 60, "they run again", || {
                all[..5].iter().all(|n| status(&w, n) == Some(Status::Running))
            })
            .await;
            w.env.sleep(Duration::from_secs(5)).await;
            assert!(all[5..].iter().all(|n| status(&w, n) == Some(Status::Stopped)));
            assert!(!w.engine.instance(&w.admin, "default", "saved").unwrap().instance.stateful);
            demand_clean(&w, "end of the platform").await;
        });
    }
}

#[test]
fn ephemeral_instances_disappear() {
    run(11, |w| async move {
        for n in 0..5 {
            let request = CreateInstance { ephemeral: true, start: true, ..container(&format!("e{n}")) };
            let id = make(&w, request).await;
            match n {
                0 => drop(w.agent.crash_guest(id)),
                1 => drop(w.agent.shut_down_guest(id)),
                _ => {
                    let operation = w
                        .engine
                        .instance_power(
                            &w.admin,
                            "default",
                            &format!("e{n}"),
                            power(PowerAction::Stop, n == 2),
                        )
                        .await
                        .unwrap();
                    done(&w, operation).await;
                }
            }
        }
        until(&w, 40, "they disappear", || w.engine.instances(&w.admin, "default").unwrap().is_empty()).await;
        demand_clean(&w, "ephemeral").await;
    });
}

#[test]
fn a_graceful_stop_that_takes_too_long_or_is_cancelled_leaves_it_running() {
    run(12, |w| async move {
        let id = started(&w, "c1").await;
        w.agent.set_ignores_shutdown(id, true);
        let operation = w
            .engine
            .instance_power(&w.admin, "default", "c1", power(PowerAction::Stop, false))
            .await
            .unwrap();
        let end = done(&w, operation).await;
        assert_eq!(end.error.as_ref().map(|e| e.kind), Some(ErrorKind::Timeout), "{end:?}");
        assert_eq!(status(&w, "c1"), Some(Status::Running));
        let operation = w
            .engine
            .instance_power(&w.admin, "default", "c1", power(PowerAction::Stop, false))
            .await
            .unwrap();
        w.env.sleep(Duration::from_secs(1)).await;
        w.engine.operation_cancel(&w.admin, operation.id()).await.unwrap();
        assert_eq!(done(&w, operation).await.state, OperationState::Cancelled);
        assert_eq!(status(&w, "c1"), Some(Status::Running));
        demand_clean(&w, "graceful stop").await;
        let view = w.engine.instance(&w.admin, "default", "c1").unwrap();
        assert_eq!(view.instance.power, karst_model::instance::DesiredPower::Running);
    });
}

/// Whoever stops by force does not wait for who waits for the guest, and each hears what became of him.
#[test]
fn a_forced_stop_overtakes_one_that_waits() {
    run(17, |w| async move {
        let id = started(&w, "c1").await;
        w.agent.set_ignores_shutdown(id, true);
        for (waits, forced, then) in [
            (PowerAction::Stop, PowerAction::Restart, Status::Running),
            (PowerAction::Restart, PowerAction::Stop, Status::Stopped),
        ] {
            let long = PowerRequest { timeout: Some(Duration::from_secs(600)), ..power(waits, false) };
            let begin = |request| w.engine.instance_power(&w.admin, "default", "c1", request);
            let waiting = begin(long).await.unwrap();
            w.env.sleep(Duration::from_secs(1)).await;
            let refused = begin(long).await.map(|o| o.id()).expect_err("another that would wait as well");
            assert!(refused.message.contains("busy"), "{refused}");
            let began = w.env.monotonic();
            let operation = begin(power(forced, true)).await.unwrap();
            assert_eq!(done(&w, operation).await.error, None);
            assert!(w.env.monotonic() - began < Duration::from_secs(10), "it waits for nobody");
            let end = done(&w, waiting).await;
            assert_eq!(end.state, OperationState::Cancelled);
            let said = end.error.as_ref().map(|e| e.message.as_str());
            assert_eq!(said, Some("cancelled: the instance is stopped by force instead"));
            assert_eq!(status(&w, "c1"), Some(then));
        }
        demand_clean(&w, "forced").await;
    });
}

#[test]
fn a_cancelled_build_leaves_nothing() {
    let options = SimulatedOptions { build_time: Duration::from_secs(60), ..Default::default() };
    SeededEnv::run(13, |env| async move {
        let w = World::with(&env, options).await.unwrap();
        let before = w.fingerprint();
        for wait in [0, 10, 59_990] {
            let build = w
                .engine
                .image_build(
                    &w.admin,
                    "default",
                    "debian/12",
                    InstanceKind::Container,
                    ImageOptions::default(),
                )
                .await
                .unwrap();
            env.sleep(Duration::from_millis(wait)).await;
            w.engine.operation_cancel(&w.admin, build.id()).await.unwrap();
            assert_eq!(done(&w, build).await.state, OperationState::Cancelled);
            demand_clean(&w, "cancelled build").await;
            assert_eq!(w.fingerprint(), before);
        }
    });
}

/// A creation whose start fails, and whose undo fails as long as `broken`.
async fn stuck(w: &World, broken: Arc<std::sync::atomic::AtomicBool>) -> LiveOperation {
    w.engine.set_hook(Some(Arc::new(move |_: &str, moment: Moment| match moment {
        Moment::AfterStep(0) => Interference::Fail(Error::unavailable("the disk is slow")),
        Moment::BeforeUndo(0) if broken.load(std::sync::atomic::Ordering::Relaxed) => {
            Interference::Fail(Error::unavailable("the disk is gone"))
        }
        _ => Interference::None,
    })));
    let (_, operation) = w.engine.instance_create(&w.admin, "default", container("c1")).await.unwrap();
    done(w, operation.clone()).await;
    operation
}

#[test]
fn a_failed_undo_waits_for_an_administrator_who_retries() {
    run(14, |mut w| async move {
        let broken = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let before = w.fingerprint();
        started(&w, "other").await;
        let id = stuck(&w, broken.clone()).await.id();
        let state = |w: &World| w.engine.operation(&w.admin, id).unwrap().state;
        assert_eq!(state(&w), OperationState::NeedsAttention);
        assert!(w.engine.operations(&w.admin, None).unwrap().iter().any(|o| o.id == id), "it is listed");
        let health = w.engine.health(&w.admin).await.unwrap();
        assert!(health.sagas.iter().any(|s| s.contains("needs attention")), "{health:?}");
        // Everything else goes on, also reading what is stuck.
        assert!(status(&w, "c1").is_some() && status(&w, "other") == Some(Status::Running));
        let busy = w.engine.instance_delete(&w.admin, "default", "c1").await.unwrap_err();
        assert!(
            busy.is(ErrorKind::Conflict) && busy.message.contains("creating instance"),
            "it says who holds it: {busy:?}"
        );
        // Again in vain; two at once are one.
        let both = futures::future::join(
            w.engine.operation_attend(&w.admin, id, false),
            w.engine.operation_attend(&w.admin, id, false),
        );
        let (a, b) = both.await;
        assert!(a.is_ok() != b.is_ok(), "one of them: {a:?} {b:?}");
        until(&w, 60, "it needs attention again", || state(&w) == OperationState::NeedsAttention).await;
        // It survives a restart of the daemon, and the end of many other operations.
        w.reopen().await.unwrap();
        assert_eq!(state(&w), OperationState::NeedsAttention);
        w.engine.operation_attend(&w.admin, id, false).await.unwrap();
        until(&w, 60, "it ends", || state(&w) == OperationState::Failure).await;
        w.engine.operation_attend(&w.admin, id, false).await.expect_err("nothing is left to do");
        let operation = w
            .engine
            .instance_power(&w.admin, "default", "other", power(PowerAction::Stop, true))
            .await
            .unwrap();
        done(&w, operation).await;
        let operation = w.engine.instance_delete(&w.admin, "default", "other").await.unwrap();
        done(&w, operation).await;
        demand_clean(&w, "retried").await;
        assert_eq!(w.fingerprint(), before);
    });
}

#[test]
fn a_failed_undo_can_be_abandoned() {
    run(15, |w| async move {
        let broken = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let id = stuck(&w, broken).await.id();
        w.engine.operation_attend(&w.admin, id, true).await.unwrap();
        assert_eq!(w.engine.operation(&w.admin, id).unwrap().state, OperationState::Failure);
        w.settle().await;
        let faults = w.faults().await;
        assert_eq!(faults.len(), 1, "what could not be undone is left, and nothing else: {faults:?}");
        assert!(faults[0].contains("volume"), "{faults:?}");
        w.engine.set_hook(None);
        make(&w, container("c1")).await;
    });
}

#[test]
fn a_caller_who_goes_away_leaves_no_saga_behind() {
    for seed in seeds(30) {
        run(seed, |w| async move {
            for n in 0..10 {
                let patience = Duration::from_micros(w.env.below(3000) * u64::from(n % 3 > 0));
                let create = w.engine.instance_create(&w.admin, "default", container(&format!("c{n}")));
                // Dropped wherever it waits: the client has disconnected.
                let mut create = Box::pin(create);
                let polls = w.env.below(6);
                for _ in 0..polls {
                    if futures::poll!(&mut create).is_ready() {
                        break;
                    }
                    w.env.sleep(patience).await;
                }
                drop(create);
            }
            demand_clean(&w, "clients that disconnect").await;
        });
    }
}

#[test]
fn deleting_races_with_new_users() {
    let mut both = [0; 2];
    for seed in seeds(40) {
        let result = SeededEnv::run(seed, move |env| async move {
            let w = World::with(&env, slow()).await.unwrap();
            let (e, c) = (&w.engine, &w.admin);
            e.project_create(c, "p", "", Config::new()).await.unwrap();
            let devices = e.profile(c, "default", "default").unwrap().devices.clone();
            e.profile_create(c, "p", "extra", UpdateProfile { devices, ..Default::default() }).await.unwrap();
            let (_, operation) =
                e.network_create(c, "default", CreateNetwork::automatic("net1")).await.unwrap();
            done(&w, operation).await;
            let delay = |n| env.sleep(Duration::from_micros(n));
            let (a, b) = (env.below(3), env.below(3));
            let what = env.below(3);
            let create = async {
                delay(a).await;
                let mut request = CreateInstance { profiles: Some(vec!["extra".into()]), ..container("c1") };
                if what == 1 {
                    request.devices.insert(
                        "eth1".into(),
                        [("type", "nic"), ("network", "net1")]
                            .map(|(k, v)| (k.to_owned(), v.to_owned()))
                            .into(),
                    );
                }
                e.instance_create(c, "p", request).await
            };
            let delete = async {
                delay(b).await;
                match what {
                    0 => e.profile_delete(c, "p", "extra").await,
                    1 => {
                        let operation = e.network_delete(c, "default", "net1").await?;
                        w.ended(operation).await.error.clone().map_or(Ok(()), Err)
                    }
                    // The instance would be invalid without a root disk.
                    _ => e.profile_update(c, "p", "extra", UpdateProfile::default()).await,
                }
            };
            let (created, deleted) = futures::future::join(create, delete).await;
            let created = match created {
                Ok((_, operation)) => done(&w, operation).await.state == OperationState::Success,
                Err(_) => false,
            };
            assert!(!(created && deleted.is_ok()), "seed {seed}: both succeeded ({what}): {deleted:?}");
            demand_clean(&w, &format!("seed {seed}")).await;
            created
        });
        both[usize::from(result)] += 1;
    }
    assert!(both[0] > 0 && both[1] > 0, "both outcomes occur: {both:?}");
}

#[test]
fn a_profile_may_get_a_nic_while_its_users_run() {
    run(16, |w| async move {
        started(&w, "c1").await;
        let profile = w.engine.profile(&w.admin, "default", "default").unwrap();
        let mut devices = profile.devices.clone();
        let nic = devices["eth0"].clone();
        devices.insert("eth1".into(), {
            let mut n = nic;
            n.insert("name".into(), "eth1".into());
            n
        });
        let update =
            UpdateProfile { description: String::new(), config: Config::new(), devices, if_version: None };
        w.engine.profile_update(&w.admin, "default", "default", update).await.unwrap();
        let update = UpdateInstance {
            description: "x".into(),
            ephemeral: false,
            config: Config::from([("limits.memory".into(), "64MiB".into())]),
            devices: Devices::new(),
            profiles: vec!["default".into()],
            if_version: None,
        };
        let operation = w.engine.instance_update(&w.admin, "default", "c1", update).await.unwrap();
        assert_eq!(done(&w, operation).await.error, None);
        demand_clean(&w, "a NIC by profile").await;
    });
}
