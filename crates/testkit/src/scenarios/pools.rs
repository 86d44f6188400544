//! Scenarios of pools that are there, and of what they limit.

use super::{Scenario, container, done};
use karst_engine::{
    compute::{create::CreateInstance, update::UpdateInstance},
    storage::{CreatePool, UpdatePool},
};
use karst_model::{Config, device::Devices};

fn size(text: &str) -> Config {
    Config::from([("size".to_owned(), text.to_owned())])
}

/// A root of this size in the pool `limited`.
fn limited(size: &str) -> Devices {
    let root = [("type", "disk"), ("path", "/"), ("pool", "limited"), ("size", size)];
    Devices::from([("root".to_owned(), root.map(|(k, v)| (k.to_owned(), v.to_owned())).into())])
}

pub(super) fn scenarios() -> Vec<Scenario> {
    let limit = scenario!(
        "instance-update",
        "another limit of a tree",
        |w| {
            let request = CreatePool { name: "limited".into(), driver: "btrfs".into(), ..Default::default() };
            done(w, w.engine.pool_create(&w.admin, request).await).await?;
            let request = CreateInstance { devices: limited("1GiB"), ..container("c1") };
            done(w, Ok(w.engine.instance_create(&w.admin, "default", request).await?.1)).await
        },
        |w| {
            let update = UpdateInstance {
                description: String::new(),
                ephemeral: false,
                config: Config::new(),
                devices: limited("3GiB"),
                profiles: vec!["default".into()],
                if_version: None,
            };
            w.engine.instance_update(&w.admin, "default", "c1", update).await
        }
    );
    let grow = scenario!(
        "pool-grow",
        "in a file of its own",
        |w| {
            let request = CreatePool {
                name: "second".into(),
                driver: "btrfs".into(),
                description: String::new(),
                config: size("1GiB"),
            };
            done(w, w.engine.pool_create(&w.admin, request).await).await
        },
        |w| {
            let update = UpdatePool { description: "larger".into(), config: size("2GiB"), if_version: None };
            let operation = w.engine.pool_update(&w.admin, "second", update).await?;
            Ok(operation.expect("it grows"))
        }
    );
    vec![grow, limit]
}
