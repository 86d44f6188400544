//! Every registered saga goes through the harness.
//!
//! That the tests of this crate can fail was seen by breaking the engine by hand, one thing at a time. What failed then:
//!
//! | broken | failed |
//! |---|---|
//! | `InstanceCreate::undo` without `volume_delete` | the harness here (`fail after AfterStep(0)`: the host has a volume that no record knows), three of `races.rs` |
//! | `runner::start` without the check of locks in memory | `races.rs`, who holds an instance is said no more; the transaction still refuses |
//! | and without its compare of the lock in the store | `a_crowd_on_few_instances` |
//! | `runner::current` without the epoch | nothing: the fence of every transaction (`Db::commit`) refuses the same |
//! | the fence without the epoch | `two_engines.rs`, an engine whose successor took over begins a saga |
//! | both | `two_engines.rs`, the log of the successor's saga is written by the old engine |

use karst_engine::saga::registry;
use karst_testkit::{harness, scenarios};

#[test]
fn every_saga_has_a_scenario() {
    let scenarios = scenarios::all();
    for saga in registry() {
        assert!(
            scenarios.iter().any(|s| s.saga == saga.name()),
            "saga {} has no scenario in the harness",
            saga.name()
        );
    }
}

#[test]
fn every_saga_survives_every_disturbance() {
    let mut tried = 0;
    let mut ran = std::collections::BTreeSet::new();
    for scenario in scenarios::all() {
        tried += harness::walk(11, &scenario, &mut ran);
    }
    for saga in registry() {
        for (n, step) in saga.steps().iter().enumerate() {
            assert!(ran.contains(&(saga.name(), n)), "no scenario of {} runs its step {step}", saga.name());
        }
    }
    assert!(tried > 100, "{tried}");
    println!("{tried} disturbances");
}
