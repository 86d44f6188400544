//! Snapshots by the clock of the environment.

use karst_engine::{
    compute::create::CreateInstance,
    snapshots::{Origin, Taken},
};
use karst_env::{Env, SeededEnv};
use karst_model::{Config, instance::InstanceKind};
use karst_testkit::{World, scenarios::container};
use std::time::Duration;

const HOUR: Duration = Duration::from_secs(3600);

fn names(w: &World, name: &str) -> Vec<String> {
    let all = w.engine.snapshots(&w.admin, Origin::Instance { project: "default", name }).unwrap();
    all.iter()
        .map(|s| match s {
            Taken::Instance { snapshot } => snapshot.name.to_string(),
            Taken::Volume { .. } => unreachable!("an instance has none of a volume"),
        })
        .collect()
}

#[test]
fn scheduled_snapshots_come_and_go() {
    let env = SeededEnv::new(5);
    env.clone().block_on(async move {
        let w = World::new(&env).await.unwrap();
        let config = |stopped: &str| {
            let keys = [
                ("snapshots.schedule", "0 * * * *"),
                ("snapshots.expiry", "2H 30M"),
                ("snapshots.pattern", "auto%d"),
                ("snapshots.schedule.stopped", stopped),
            ];
            Config::from(keys.map(|(k, v)| (k.to_owned(), v.to_owned())))
        };
        for (name, stopped, start) in
            [("runs", "false", true), ("rests", "false", false), ("kept", "true", false)]
        {
            let request = CreateInstance { config: config(stopped), start, ..container(name) };
            assert_eq!(request.kind, InstanceKind::Container);
            let (_, operation) = w.engine.instance_create(&w.admin, "default", request).await.unwrap();
            assert_eq!(w.ended(operation).await.error, None);
        }
        env.sleep(HOUR).await;
        assert_eq!(names(&w, "runs"), ["auto0"]);
        assert_eq!(names(&w, "rests"), [""; 0], "it is stopped");
        assert_eq!(names(&w, "kept"), ["auto0"], "its schedule says that this does not matter");
        env.sleep(HOUR * 4).await;
        // Five were taken; after two and a half hours each went.
        let left = names(&w, "runs");
        assert!(left.len() == 2 || left.len() == 3, "{left:?}");
        assert_eq!(left.last().map(String::as_str), Some("auto4"));
        assert_eq!(w.faults().await, [""; 0]);
        w.engine.close();
    });
}
