//! The environment of a running daemon: the system's clocks and random numbers, tasks on tokio.

use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::BoxFuture;
use rand::TryRngCore;
use rand::rngs::OsRng;

use crate::partition::LinkDown;
use crate::task::{self, TaskHandle};
use crate::{Env, SharedEnv};

/// The real thing. [`Env::spawn`] and [`Env::sleep`] need a tokio runtime around them.
#[derive(Debug)]
pub struct RealEnv {
    started: Instant,
}

impl RealEnv {
    /// An environment whose monotonic clock starts now.
    pub fn new() -> RealEnv {
        RealEnv { started: Instant::now() }
    }

    /// The same, shared.
    pub fn shared() -> SharedEnv {
        std::sync::Arc::new(RealEnv::new())
    }
}

impl Default for RealEnv {
    fn default() -> RealEnv {
        RealEnv::new()
    }
}

impl Env for RealEnv {
    fn now(&self) -> jiff::Timestamp {
        jiff::Timestamp::now()
    }

    fn monotonic(&self) -> Duration {
        self.started.elapsed()
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        tokio::time::sleep(duration).boxed()
    }

    fn fill_random(&self, buffer: &mut [u8]) {
        // getrandom(2) fails only on kernels older than 3.17 or under a filter that forbids it: there is no
        // sensible way to go on without random numbers.
        OsRng.try_fill_bytes(buffer).expect("the kernel gives random bytes");
    }

    fn spawn(&self, name: &str, future: BoxFuture<'static, ()>) -> TaskHandle {
        let task_name = name.to_owned();
        let (handle, wrapped) = task::wrap(name, future, move |text| {
            tracing::error!(task = task_name, panic = text, "a task panicked");
        });
        tokio::spawn(wrapped);
        handle
    }

    fn link(&self, _from: &str, _to: &str) -> BoxFuture<'static, Result<(), LinkDown>> {
        futures::future::ready(Ok(())).boxed()
    }
}
