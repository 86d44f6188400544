//! Scenarios of pools that are there.

use super::{Scenario, done};
use karst_engine::storage::{CreatePool, UpdatePool};
use karst_model::Config;

fn size(text: &str) -> Config {
    Config::from([("size".to_owned(), text.to_owned())])
}

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![scenario!(
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
    )]
}
