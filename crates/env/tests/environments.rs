//! Both environments: what they promise alike, and that a seeded run is reproducible.
#![allow(clippy::disallowed_methods)] // tests measure against the real clock

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use karst_env::{Cut, Elapsed, Env, EnvExt, JoinError, RealEnv, SeededEnv, SharedEnv};

const SECOND: Duration = Duration::from_secs(1);

/// What either environment must do.
async fn contract(env: SharedEnv) {
    let before = env.monotonic();
    env.sleep(Duration::from_millis(5)).await;
    assert!(env.monotonic() - before >= Duration::from_millis(5));

    assert_eq!(env.timeout(SECOND, async { 7 }).await, Ok(7));
    let short = Duration::from_millis(5);
    assert_eq!(env.timeout(short, std::future::pending::<()>()).await, Err(Elapsed(short)));

    let (sender, receiver) = tokio::sync::oneshot::channel();
    let task = env.spawn_task("sends", async move { sender.send(3).unwrap() });
    assert_eq!(task.name(), "sends");
    assert_eq!(receiver.await, Ok(3));
    assert_eq!(task.join().await, Ok(()));

    let stuck = env.spawn_task("stuck", std::future::pending());
    stuck.abort();
    assert_eq!(stuck.join().await, Err(JoinError::Aborted));

    let panicking = env.spawn_task("panics", async { panic!("on purpose") });
    assert_eq!(panicking.join().await, Err(JoinError::Panicked("on purpose".into())));

    assert_ne!(env.uuid(), env.uuid());
    assert_eq!(env.uuid().get_version_num(), 4);
    assert_eq!(env.random_bytes(5).len(), 5);
    assert_eq!(env.link("a", "b").await, Ok(()));
}

#[tokio::test]
async fn the_real_environment_keeps_the_contract() {
    contract(RealEnv::shared()).await;
}

#[test]
fn the_seeded_environment_keeps_the_contract() {
    SeededEnv::run(1, |env| async move {
        env.allow_panics();
        contract(env.shared()).await;
    });
}

#[test]
fn virtual_time_costs_no_real_time_and_moves_the_wall_clock() {
    let started = std::time::Instant::now();
    SeededEnv::run(1, |env| async move {
        let wall = env.now();
        env.sleep(Duration::from_secs(86_400)).await;
        assert_eq!(env.now().duration_since(wall).as_secs(), 86_400);
    });
    assert!(started.elapsed() < Duration::from_secs(5));
}

/// Five workers with random pauses and a shared log; a link that is cut for a while.
fn busy_run(seed: u64) -> (Vec<String>, u64) {
    let env = SeededEnv::new(seed);
    let log = Arc::new(Mutex::new(Vec::new()));
    let (inner, inner_log) = (env.clone(), log.clone());
    env.block_on(async move {
        inner.partition().set_latency(Duration::ZERO, Duration::from_millis(3));
        let workers: Vec<_> = (0..5)
            .map(|number| {
                let (env, log) = (inner.clone(), inner_log.clone());
                inner.spawn_task(&format!("worker{number}"), async move {
                    for round in 0..20 {
                        env.sleep(Duration::from_micros(env.below(2_000))).await;
                        let reached = env.link(&format!("worker{number}"), "hub").await.is_ok();
                        log.lock().unwrap().push(format!("{number}.{round}.{reached} {}", env.uuid()));
                    }
                })
            })
            .collect();
        inner.partition().cut("worker2", "hub", Cut::Refuse);
        inner.sleep(Duration::from_millis(20)).await;
        inner.partition().heal_all();
        for worker in workers {
            worker.join().await.unwrap();
        }
    });
    let log = log.lock().unwrap().clone();
    (log, env.trace_digest())
}

#[test]
fn the_same_seed_gives_the_same_run_and_another_seed_another() {
    let (log, digest) = busy_run(42);
    for _ in 0..3 {
        assert_eq!(busy_run(42), (log.clone(), digest));
    }
    assert_eq!(log.len(), 100);
    assert!(log.iter().any(|line| line.contains(".false")), "the cut was seen");
    assert!(log.iter().any(|line| line.starts_with("2.") && line.contains(".true")), "and healed");
    let (other_log, other_digest) = busy_run(43);
    assert_ne!(other_log, log);
    assert_ne!(other_digest, digest);
}

#[test]
fn a_cut_link_refuses_hangs_or_heals() {
    SeededEnv::run(5, |env| async move {
        env.partition().cut_one_way("a", "b", Cut::Refuse);
        assert_eq!(env.link("a", "b").await.unwrap_err().to_string(), "a does not reach b");
        assert!(env.link("b", "a").await.is_ok(), "the way back is whole");
        env.partition().heal("a", "b");
        assert!(env.link("a", "b").await.is_ok());

        env.partition().isolate("a", Cut::Hang(SECOND * 10));
        let before = env.monotonic();
        assert!(env.link("b", "a").await.is_err());
        assert_eq!(env.monotonic() - before, SECOND * 10);

        let healer = env.clone();
        env.spawn_task("healer", async move {
            healer.sleep(SECOND).await;
            healer.partition().rejoin("a");
        });
        let before = env.monotonic();
        assert!(env.link("a", "c").await.is_ok());
        assert_eq!(env.monotonic() - before, SECOND);
    });
}

#[test]
fn a_crashed_node_stops_where_it_waits_and_others_go_on() {
    SeededEnv::run(9, |env| async move {
        let counts = [Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0))];
        for (name, count) in ["one", "two"].iter().zip(&counts) {
            let (node, count) = (env.node(name), count.clone());
            let inner = node.clone();
            node.spawn_task("ticker", async move {
                loop {
                    inner.sleep(SECOND).await;
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        env.sleep(SECOND * 10 + SECOND / 2).await;
        assert_eq!(env.crash_node("one"), 1);
        env.sleep(SECOND * 10).await;
        assert_eq!(counts[0].load(Ordering::Relaxed), 10);
        assert_eq!(counts[1].load(Ordering::Relaxed), 20);
    });
}

#[test]
fn an_unseen_panic_fails_the_run() {
    let result = std::panic::catch_unwind(|| {
        SeededEnv::run(1, |env| async move {
            env.spawn_task("bad", async { panic!("unseen") });
            env.sleep(SECOND).await;
        });
    });
    let text = result.unwrap_err();
    assert!(text.downcast_ref::<String>().unwrap().contains("bad: unseen"));
}

#[test]
fn a_deadlock_is_named() {
    let result = std::panic::catch_unwind(|| SeededEnv::run(1, |_env| std::future::pending::<()>()));
    let text = result.unwrap_err();
    assert!(text.downcast_ref::<String>().unwrap().contains("deadlock"));
}
