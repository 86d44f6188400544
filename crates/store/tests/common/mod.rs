//! What the tests of the store share.
#![allow(dead_code)] // each test uses a part of it

#[path = "../../../testkit/src/backends.rs"]
pub mod backends;
pub mod etcd_server;
pub mod power_cut;

use std::future::Future;

/// Runs an async test body on a runtime with worker threads.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}
