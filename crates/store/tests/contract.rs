//! The contract suite over every implementation.
#![allow(clippy::disallowed_methods)] // tests live in the real world

mod common;

use std::sync::Arc;

use common::block_on;
use common::etcd_server::EtcdServer;
use karst_env::{RealEnv, SeededEnv};
use karst_store::{EtcdStore, SqliteOptions, SqliteStore, contract};

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
fn etcd() {
    let Some(server) = EtcdServer::start() else { return };
    block_on(async {
        let env = RealEnv::shared();
        let store = EtcdStore::connect(&server.endpoints(), env.clone()).await.unwrap();
        contract::run(Arc::new(store), env).await;
    });
}
