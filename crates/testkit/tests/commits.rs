//! How often a request waits for the disk: each commit costs a sync, so its number is part of what a use case promises.

use karst_engine::compute::{create::CreateInstance, power::PowerRequest};
use karst_env::SeededEnv;
use karst_model::instance::PowerAction;
use karst_testkit::{World, scenarios::container};

async fn power(w: &World, action: PowerAction) -> u64 {
    w.settle().await;
    let before = w.store.sync_count();
    let request = PowerRequest { action, force: true, timeout: None, stateful: false };
    let operation = w.engine.instance_power(&w.admin, "default", "c1", request).await.unwrap();
    assert_eq!(w.ended(operation).await.error, None);
    // What follows in the background is nobody's waiting.
    w.store.sync_count() - before
}

#[test]
fn changes_of_power_commit_when_they_begin_and_when_they_end() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        let before = w.store.sync_count();
        let request = CreateInstance { start: false, ..container("c1") };
        let (_, operation) = w.engine.instance_create(&w.admin, "default", request).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        assert_eq!(w.store.sync_count() - before, 2, "create");
        assert_eq!(power(&w, PowerAction::Start).await, 2, "start");
        assert_eq!(power(&w, PowerAction::Freeze).await, 2, "freeze");
        assert_eq!(power(&w, PowerAction::Unfreeze).await, 2, "unfreeze");
        assert_eq!(power(&w, PowerAction::Stop).await, 2, "stop");
        // A restart has both: that the guest was stopped must be known before another is started.
        assert_eq!(power(&w, PowerAction::Start).await, 2, "start again");
        assert_eq!(power(&w, PowerAction::Restart).await, 3, "restart");
    });
}
