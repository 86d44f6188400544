//! Secrets: what is written is sealed, what is ephemeral is written nowhere, and both are their project's alone.

use karst_engine::{
    Engine,
    secrets::{DefineSecret, SecretKey, SecretValue},
};
use karst_env::SeededEnv;
use karst_model::{Config, ErrorKind, secret::SecretUse};
use karst_store::{ROOT, list_prefix};
use karst_testkit::World;
use uuid::Uuid;

const VALUE: &[u8] = b"open sesame";

fn named(n: u128, usage: &str, ephemeral: bool) -> DefineSecret {
    DefineSecret {
        uuid: Some(Uuid::from_u128(n)),
        description: String::new(),
        kind: SecretUse::Ceph,
        usage: usage.into(),
        private: false,
        ephemeral,
    }
}

fn value() -> SecretValue {
    SecretValue::new(VALUE.to_vec()).unwrap()
}

fn key(engine: &Engine, n: u8) {
    engine.set_secret_key(SecretKey::new(&[n; 32]).unwrap());
}

#[test]
fn what_is_written_is_sealed_and_what_is_ephemeral_is_not_written() {
    SeededEnv::run(1, |env| async move {
        let w = World::new(&env).await.unwrap();
        let (e, c) = (&w.engine, &w.admin);
        key(e, 7);
        for (n, ephemeral) in [(1, false), (2, true)] {
            e.secret_define(c, "default", named(n, &format!("client.{n}"), ephemeral)).await.unwrap();
            e.secret_set_value(c, "default", Uuid::from_u128(n), value()).await.unwrap();
            let given = e.secret_value(c, "default", Uuid::from_u128(n)).unwrap();
            assert_eq!(given.bytes(), VALUE);
        }
        let (all, _) = list_prefix(e.inner().db.store(), ROOT).await.unwrap();
        let text: String =
            all.iter().map(|kv| format!("{} {}\n", kv.key, String::from_utf8_lossy(&kv.value))).collect();
        assert!(text.contains("client.1") && !text.contains("client.2"));
        assert!(!text.contains("sesame") && !text.contains("b3BlbiBzZXNhbWU"), "neither plain nor base64");
        // Another key opens nothing, and says what to do.
        key(e, 8);
        let lost = e.secret_value(c, "default", Uuid::from_u128(1)).unwrap_err();
        assert!(lost.kind == ErrorKind::Unavailable && lost.message.contains("set it again"), "{lost}");
        key(e, 7);
        assert_eq!(e.secret_value(c, "default", Uuid::from_u128(1)).unwrap().bytes(), VALUE);
    });
}

#[test]
fn projects_have_their_own_and_keep_them_until_they_are_removed() {
    SeededEnv::run(2, |env| async move {
        let w = World::new(&env).await.unwrap();
        let (e, c) = (&w.engine, &w.admin);
        key(e, 7);
        e.project_create(c, "other", "", Config::new()).await.unwrap();
        for project in ["default", "other"] {
            e.secret_define(c, project, named(1, "same", false)).await.unwrap();
        }
        e.secret_set_value(c, "default", Uuid::from_u128(1), value()).await.unwrap();
        let none = e.secret_value(c, "other", Uuid::from_u128(1)).unwrap_err();
        assert_eq!(none.kind, ErrorKind::NotFound);
        for ephemeral in [false, true] {
            e.secret_define(c, "other", named(1, "same", ephemeral)).await.unwrap();
            let full = e.project_delete(c, "other").await.unwrap_err();
            assert!(full.kind == ErrorKind::Conflict && full.message.contains("not empty"), "{full}");
        }
        e.secret_undefine(c, "other", Uuid::from_u128(1)).await.unwrap();
        e.project_delete(c, "other").await.unwrap();
        assert_eq!(e.secrets(c, "default").unwrap().len(), 1);
    });
}

#[test]
fn one_use_has_one_secret_also_when_several_come_at_once() {
    SeededEnv::run(3, |env| async move {
        let w = World::new(&env).await.unwrap();
        let (e, c) = (&w.engine, &w.admin);
        let (a, b) = futures::join!(
            e.secret_define(c, "default", named(1, "same", false)),
            e.secret_define(c, "default", named(2, "same", true))
        );
        assert!(a.is_ok() != b.is_ok(), "{a:?} {b:?}");
        let refused = a.and(b).unwrap_err();
        assert_eq!((refused.kind, refused.field.as_deref()), (ErrorKind::Conflict, Some("usage")));
        let bad = DefineSecret { usage: String::new(), ..named(5, "", false) };
        let bad = e.secret_define(c, "default", bad).await.unwrap_err();
        assert_eq!((bad.kind, bad.field.as_deref()), (ErrorKind::Invalid, Some("usage")));
        assert_eq!(e.secrets(c, "default").unwrap().len(), 1);
    });
}
