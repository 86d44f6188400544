//! What the engine itself costs: instances created one after the other over SQLite in a file, on a simulated host.
//! Figures of simulation: no guest really runs.
//!
//! `cargo run --release -p karst-testkit --example engine_bench [COUNT] [started]`
#![allow(clippy::disallowed_methods)] // a program that measures

use karst_agent::simulated::{SimulatedAgent, SimulatedOptions};
use karst_engine::{Agents, Context, Engine, EngineConfig, compute::create::CreateInstance};
use karst_env::RealEnv;
use karst_model::{NodeId, access::Principal};
use karst_store::{SqliteOptions, SqliteStore, Store};
use karst_testkit::scenarios::container;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[tokio::main]
async fn main() -> Outcome {
    let mut arguments = std::env::args().skip(1);
    let count: u32 = arguments.next().map_or(Ok(500), |n| n.parse())?;
    let start = arguments.next().is_some_and(|a| a == "started");
    let directory = std::env::temp_dir().join(format!("karst-engine-bench-{}", std::process::id()));
    std::fs::create_dir(&directory)?;
    let outcome = measure(&directory, count, start).await;
    std::fs::remove_dir_all(&directory)?;
    outcome
}

async fn measure(directory: &std::path::Path, count: u32, start: bool) -> Outcome {
    let env = RealEnv::shared();
    let store = SqliteStore::open(directory.join("state"), env.clone(), SqliteOptions::default()).await?;
    let store: Arc<dyn Store> = Arc::new(store);
    let node = NodeId(uuid::Uuid::from_u128(7));
    let agents = Agents::default();
    agents.insert(node, SimulatedAgent::new(env.clone(), SimulatedOptions::default()));
    let engine = Engine::open(EngineConfig {
        env: env.clone(),
        store: store.clone(),
        agents,
        nodes: vec![(node, "node1".into())],
        daemon_id: "be9c40".into(),
    })
    .await?;
    engine.bootstrap().await?;
    let admin = Context::new(Principal::unix_admin(0, 0, 1));

    let (syncs, began) = (store.sync_count(), Instant::now());
    let mut half = Duration::ZERO;
    for n in 0..count {
        let request = CreateInstance { start, ..container(&format!("c{n}")) };
        let (_, operation) = engine.instance_create(&admin, "default", request).await?;
        if let Some(e) = &operation.ended().await.error {
            return Err(Box::new(e.clone()));
        }
        if n + 1 == count / 2 {
            half = began.elapsed();
        }
    }
    let took = began.elapsed();
    let rate = f64::from(count) / took.as_secs_f64();
    println!("{count} instances created in {took:.2?}: {rate:.0} a second (started: {start})");
    println!("the second half took {:.2} times the first", (took - half).as_secs_f64() / half.as_secs_f64());
    println!("syncs for each: {:.2}", (store.sync_count() - syncs) as f64 / f64::from(count));

    let list = |_| {
        let began = Instant::now();
        let all = engine.instances(&admin, "default").map_or(0, |l| l.len());
        assert_eq!(all, count as usize);
        began.elapsed()
    };
    println!("instances(): first {:?}, median of 50 {:?}", list(0), median((0..50).map(list).collect()));
    let one = |n: u32| {
        let began = Instant::now();
        assert!(engine.instance(&admin, "default", &format!("c{}", n % count)).is_ok());
        began.elapsed()
    };
    println!("instance(): median of 1000 {:?}", median((0..1000).map(one).collect()));

    let syncs = store.sync_count();
    tokio::time::sleep(Duration::from_secs(3)).await;
    println!("idle for 3 s: {} syncs", store.sync_count() - syncs);
    engine.close();
    Ok(())
}
