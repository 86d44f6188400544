//! A host that is called otherwise than before stays the node that it was: what is on it, and what was going on there.

use karst_agent::simulated::{SimulatedAgent, SimulatedOptions};
use karst_engine::{
    Agents, Engine, EngineConfig,
    compute::{create::CreateInstance, power::PowerRequest},
    saga::runner::{Interference, Moment},
};
use karst_env::{Env, SeededEnv};
use karst_model::{
    NodeId,
    instance::{PowerAction, Status},
};
use karst_store::{SqliteStore, Store};
use karst_testkit::{World, scenarios::container, world::DAEMON_ID};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

#[test]
fn a_host_with_another_name_keeps_its_guests_and_goes_on_with_what_it_did() {
    SeededEnv::run(1, |env| async move {
        let mut w = World::new(&env).await.unwrap();
        let request = CreateInstance { start: true, ..container("c1") };
        let (_, operation) = w.engine.instance_create(&w.admin, "default", request).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        let shown = |w: &World, name: &str| {
            let view = w.engine.instance(&w.admin, "default", name).unwrap();
            (view.location.clone(), view.status)
        };
        assert_eq!(shown(&w, "c1"), ("node1".to_owned(), Status::Running));

        // It dies in the middle of a creation.
        let died = Arc::new(AtomicBool::new(false));
        let hit = died.clone();
        w.engine.set_hook(Some(Arc::new(move |saga: &str, moment: Moment| {
            match saga == "instance-create" && moment == Moment::AfterStep(0) {
                true => {
                    hit.store(true, Ordering::Relaxed);
                    Interference::Crash
                }
                false => Interference::None,
            }
        })));
        let request = CreateInstance { start: true, ..container("c2") };
        let (_, _never_ends) = w.engine.instance_create(&w.admin, "default", request).await.unwrap();
        for _ in 0..6000 {
            if died.load(Ordering::Relaxed) {
                break;
            }
            env.sleep(Duration::from_millis(10)).await;
        }
        assert!(died.load(Ordering::Relaxed), "the crash must land");
        assert_eq!(w.engine.inner().inventory.read().sagas.len(), 1);

        w.reopen_named("web1").await.unwrap();
        w.settle().await;
        assert_eq!(w.faults().await, Vec::<String>::new());
        {
            let records = w.engine.inner().inventory.read();
            let nodes: Vec<_> = records.nodes.values().map(|n| (n.id, n.name.to_string())).collect();
            assert_eq!(
                nodes,
                [(w.engine.inner().node, "web1".to_owned())],
                "one node, which has the new name"
            );
            assert!(nodes.iter().all(|(id, _)| records.nodes[id].facts.is_some()), "what it said of itself");
        }
        assert_eq!(shown(&w, "c1"), ("web1".to_owned(), Status::Running));
        assert_eq!(
            shown(&w, "c2"),
            ("web1".to_owned(), Status::Running),
            "what was begun is brought to its end"
        );
        let stop = PowerRequest { action: PowerAction::Stop, force: true, timeout: None, stateful: false };
        let operation = w.engine.instance_power(&w.admin, "default", "c1", stop).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        let operation = w.engine.instance_delete(&w.admin, "default", "c1").await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        assert_eq!(w.faults().await, Vec::<String>::new());
        w.engine.close();
    });
}

#[test]
fn a_name_that_another_host_has_stays_with_that_one() {
    SeededEnv::run(2, |env| async move {
        let store: Arc<dyn Store> = Arc::new(SqliteStore::memory(env.shared()).unwrap());
        let [a, b] = [7, 8].map(|n| NodeId(uuid::Uuid::from_u128(n)));
        let agents = Agents::default();
        for node in [a, b] {
            let options = SimulatedOptions { daemon_id: Some(DAEMON_ID.into()), ..Default::default() };
            agents.insert(node, SimulatedAgent::new(env.shared(), options));
        }
        for (first, second, expected) in [
            ("one", "two", ["one", "two"]),
            // Both are called the same: who had it has it.
            ("two", "two", ["one", "two"]),
            ("three", "two", ["three", "two"]),
        ] {
            let engine = Engine::open(EngineConfig {
                env: env.shared(),
                store: store.clone(),
                agents: agents.clone(),
                nodes: vec![(a, first.to_owned()), (b, second.to_owned())],
                daemon_id: DAEMON_ID.into(),
            })
            .await
            .unwrap();
            let names: Vec<String> =
                engine.inner().inventory.read().nodes.values().map(|n| n.name.to_string()).collect();
            assert_eq!(names, expected);
            engine.close();
        }
    });
}
