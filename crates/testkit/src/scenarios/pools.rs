//! Scenarios of pools that are there, and of what they limit.

use super::{Scenario, container, done};
use crate::World;
use karst_engine::{
    compute::{create::CreateInstance, update::UpdateInstance},
    storage::{CreatePool, UpdatePool},
};
use karst_model::{Config, Result, device::Devices, pool_life::PoolChange};

fn size(text: &str) -> Config {
    Config::from([("size".to_owned(), text.to_owned())])
}

/// A root of this size in the pool `limited`.
fn limited(size: &str) -> Devices {
    let root = [("type", "disk"), ("path", "/"), ("pool", "limited"), ("size", size)];
    Devices::from([("root".to_owned(), root.map(|(k, v)| (k.to_owned(), v.to_owned())).into())])
}

/// A pool that is neither built nor started.
async fn define(w: &World) -> Result<()> {
    let request = CreatePool { name: "third".into(), driver: "btrfs".into(), ..Default::default() };
    w.engine.pool_define(&w.admin, request).await
}

/// The same, built.
async fn built(w: &World) -> Result<()> {
    define(w).await?;
    done(w, w.engine.pool_change(&w.admin, "third", PoolChange::Build).await).await
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
                config: size("1GiB"),
                ..Default::default()
            };
            done(w, w.engine.pool_create(&w.admin, request).await).await
        },
        |w| {
            let update = UpdatePool { description: "larger".into(), config: size("2GiB"), if_version: None };
            let operation = w.engine.pool_update(&w.admin, "second", update).await?;
            Ok(operation.expect("it grows"))
        }
    );
    vec![
        grow,
        limit,
        scenario!("pool-change", "start that builds", |w| define(w).await, |w| {
            w.engine.pool_change(&w.admin, "third", PoolChange::Start).await
        }),
        scenario!("pool-change", "build", |w| define(w).await, |w| {
            w.engine.pool_change(&w.admin, "third", PoolChange::Build).await
        }),
        scenario!("pool-change", "start of one that is built", |w| built(w).await, |w| {
            w.engine.pool_change(&w.admin, "third", PoolChange::Start).await
        }),
        scenario!(
            "pool-change",
            "stop",
            |w| {
                define(w).await?;
                done(w, w.engine.pool_change(&w.admin, "third", PoolChange::Start).await).await
            },
            |w| w.engine.pool_change(&w.admin, "third", PoolChange::Stop).await
        ),
        scenario!("pool-change", "clear", |w| built(w).await, |w| {
            w.engine.pool_change(&w.admin, "third", PoolChange::Clear).await
        }),
        scenario!("pool-delete", "one that is not active", |w| built(w).await, |w| {
            w.engine.pool_delete(&w.admin, "third").await
        }),
    ]
}
