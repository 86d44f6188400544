//! The contract suite over the simulation: directly, and behind client, wire and server.
#![allow(clippy::disallowed_methods)] // the real world's clock is what these tests are about

use karst_agent::{Client, ServerOptions, SimulatedAgent, SimulatedOptions, contract::Subject, serve};
use karst_env::{RealEnv, SharedEnv};
use std::sync::Arc;
use tokio::net::UnixListener;

fn simulated(env: SharedEnv) -> Arc<SimulatedAgent> {
    let options = SimulatedOptions { daemon_id: Some("5a5a5a".into()), ..SimulatedOptions::default() };
    SimulatedAgent::new(env, options)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn directly() {
    let env = RealEnv::shared();
    Subject::simulated(simulated(env.clone()), env).run().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_the_wire() {
    let env = RealEnv::shared();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("host.sock");
    let agent = simulated(env.clone());
    let listener = UnixListener::bind(&path).unwrap();
    let serving =
        tokio::spawn(serve(env.clone(), listener, agent.clone(), agent.guard(), ServerOptions::default()));
    let client = Client::connect(
        env.clone(),
        &path,
        Some(karst_agent::Executor { node: karst_model::NodeId(uuid::Uuid::nil()), epoch: 1 }),
    )
    .await
    .unwrap();
    Subject::simulated(Arc::new(client.agent()), env).run().await;
    serving.abort();
}
