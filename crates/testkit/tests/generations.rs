//! Generations: which of two orders to run a guest is the later one, also across a restore of the store from a backup.

use karst_engine::compute::{create::CreateInstance, power::PowerRequest};
use karst_env::SeededEnv;
use karst_model::instance::{Generation, PowerAction};
use karst_store::TxnBuilder;
use karst_testkit::{World, scenarios::container};

const KEY: &str = "/karst/v1/meta/incarnation";

#[test]
fn a_restored_store_orders_in_an_incarnation_of_its_own() {
    SeededEnv::run(1, |env| async move {
        let mut w = World::new(&env).await.unwrap();
        let kept = w.store.get(KEY).await.unwrap().kv.expect("the first start writes it");
        assert_eq!(&kept.value[..], b"1");
        let request = CreateInstance { start: true, ..container("c1") };
        let (_, operation) = w.engine.instance_create(&w.admin, "default", request).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        let generation =
            |w: &World| w.engine.instance(&w.admin, "default", "c1").unwrap().instance.generation;
        assert_eq!(generation(&w), Generation { incarnation: 1, n: 1 });
        // What a restore does.
        let _ = w.store.txn(TxnBuilder::default().put_raw(KEY, "2").build().unwrap()).await.unwrap();
        w.reopen().await.unwrap();
        let power =
            PowerRequest { action: PowerAction::Restart, force: true, timeout: None, stateful: false };
        let operation = w.engine.instance_power(&w.admin, "default", "c1", power).await.unwrap();
        assert_eq!(w.ended(operation).await.error, None);
        assert_eq!(generation(&w), Generation { incarnation: 2, n: 1 });
        assert_eq!(
            &w.store.get(KEY).await.unwrap().kv.unwrap().value[..],
            b"2",
            "a start does not take it back"
        );
        w.engine.close();
    });
}
