//! The contract suite over every implementation.
#![allow(clippy::disallowed_methods)] // tests live in the real world

mod common;

use std::sync::Arc;

use common::block_on;
use common::etcd_server::EtcdServer;
use karst_env::{RealEnv, SeededEnv};
use karst_store::{EtcdOptions, EtcdStore, SqliteOptions, SqliteStore, Store, StoreError, contract};

#[test]
fn sqlite_on_a_file() {
    block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let env = RealEnv::shared();
        let path = directory.path().join("state.db");
        let store = SqliteStore::open(path, env.clone(), SqliteOptions::default()).await.unwrap();
        contract::run(Arc::new(store), env).await;
    });
}

#[test]
fn sqlite_in_memory() {
    block_on(async {
        let env = RealEnv::shared();
        contract::run(Arc::new(SqliteStore::memory(env.clone()).unwrap()), env).await;
    });
}

#[test]
fn sqlite_in_memory_under_a_seed() {
    SeededEnv::run(11, |env| async move {
        let store = SqliteStore::memory(env.shared()).unwrap();
        contract::run(Arc::new(store), env.shared()).await;
    });
}

#[test]
fn etcd_over_tls_with_certificates_and_a_password() {
    let Some(server) = EtcdServer::start_with_tls(true) else { return };
    block_on(async {
        let env = RealEnv::shared();
        let known = server.options();
        let store = EtcdStore::connect_with(&server.endpoints(), &known, env.clone()).await.unwrap();
        contract::run(Arc::new(store), env.clone()).await;
        // Without one's certificate, with a foreign authority, with the wrong password: nothing.
        let stranger = EtcdOptions { identity: None, ..known.clone() };
        let fooled = EtcdOptions { ca: Some(server.foreign_authority()), ..known.clone() };
        let forgetful = EtcdOptions { user: Some(("root".into(), "wrong".into())), ..known.clone() };
        for wrong in [stranger, fooled, forgetful] {
            let refused = EtcdStore::connect_with(&server.endpoints(), &wrong, env.clone()).await.map(drop);
            assert!(matches!(refused, Err(StoreError::Unavailable(_))), "{wrong:?}: {refused:?}");
        }
        let shown = format!("{known:?}");
        assert!(!shown.contains("sesame") && !shown.contains("BEGIN"), "{shown}");
    });
}

#[test]
fn an_endpoint_that_is_down_is_passed_over() {
    let (Some(first), Some(second)) = (EtcdServer::start(), EtcdServer::start()) else { return };
    block_on(async {
        let env = RealEnv::shared();
        // Two clusters stand for two servers: what matters is who answers.
        let both = [first.endpoints(), second.endpoints()].concat();
        let dead = first.endpoints();
        let early = EtcdStore::connect(&both, env.clone()).await.unwrap();
        early.get("/k").await.unwrap();
        drop(first);
        let store = EtcdStore::connect(&both, env.clone()).await.unwrap();
        let mut failed = 0;
        for _ in 0..20 {
            store.get("/k").await.unwrap();
            failed += u32::from(early.get("/k").await.is_err());
        }
        assert!(failed <= 2, "requests on their way when it went away: {failed}");
        let none = EtcdStore::connect(&dead, env).await.map(drop);
        assert!(matches!(none, Err(StoreError::Unavailable(_))), "{none:?}");
    });
}

#[test]
fn etcd() {
    let Some(server) = EtcdServer::start() else { return };
    block_on(async {
        let env = RealEnv::shared();
        let store = EtcdStore::connect(&server.endpoints(), env.clone()).await.unwrap();
        contract::run(Arc::new(store), env).await;
    });
}
