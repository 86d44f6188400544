//! Time, randomness, spawning and the links between parts, behind one trait: [`Env`]; and a lock for what tasks share
//! ([`Mutex`]).
//!
//! The engine, the store and the agent never ask the operating system for the time, for random bytes or for a
//! task: `clippy.toml` forbids them to. They ask an `Arc<dyn Env>`, which is either
//!
//! * [`RealEnv`]: the system's clocks and random numbers, tasks on tokio; or
//! * [`SeededEnv`]: everything derived from one seed. A virtual clock that jumps ahead when nothing can run, a
//!   single-threaded executor that picks the next runnable task by the seed, links that can be cut, nodes that
//!   can be killed. The same seed gives the same run, so a failure found once can be run again.
//!
//! What a run under [`SeededEnv`] must avoid to stay reproducible: `tokio::select!` without `biased;` (it picks
//! its first branch by an unseeded generator), the iteration order of `std::collections::HashMap`, threads,
//! and anything of `tokio::time`, `tokio::net` and `tokio::task` (there is no tokio runtime). Tokio's `sync` is
//! fine.
#![allow(clippy::disallowed_methods)] // this crate is where the forbidden calls are meant to stand

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Either, select};

mod mutex;
mod partition;
mod real;
mod seeded;
mod task;

pub use mutex::Mutex;
pub use partition::{Cut, LinkDown, Partition};
pub use real::RealEnv;
pub use seeded::SeededEnv;
pub use task::{JoinError, TaskHandle};

/// What a part of Karst may ask of its surroundings.
pub trait Env: Send + Sync + 'static {
    /// The wall clock. For people and for records; it may jump. Use [`Env::monotonic`] to measure.
    fn now(&self) -> jiff::Timestamp;

    /// Time since some fixed point of this process. Never goes back.
    fn monotonic(&self) -> Duration;

    /// Completes when `duration` has passed.
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()>;

    /// Fills `buffer` with random bytes, of cryptographic quality in [`RealEnv`].
    fn fill_random(&self, buffer: &mut [u8]);

    /// Runs `future` as a task of its own. `name` appears in traces and panics. Dropping the handle detaches.
    fn spawn(&self, name: &str, future: BoxFuture<'static, ()>) -> TaskHandle;

    /// Passes when one message may travel from `from` to `to`. Whoever simulates a connection between two named
    /// endpoints awaits this once for the request and once, the other way round, for the answer.
    ///
    /// In [`RealEnv`] it always passes at once, because the real network does its own delaying and failing.
    fn link(&self, from: &str, to: &str) -> BoxFuture<'static, Result<(), LinkDown>>;

    /// `count` random bytes.
    fn random_bytes(&self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.fill_random(&mut bytes);
        bytes
    }

    /// A random integer over the whole range.
    fn random_u64(&self) -> u64 {
        let mut bytes = [0; 8];
        self.fill_random(&mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// A random (version 4) UUID.
    fn uuid(&self) -> uuid::Uuid {
        let mut bytes = [0; 16];
        self.fill_random(&mut bytes);
        uuid::Builder::from_random_bytes(bytes).into_uuid()
    }
}

/// How an environment is handed around.
pub type SharedEnv = Arc<dyn Env>;

/// The time given to [`EnvExt::timeout`] has passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Elapsed(
    /// The time that was given.
    pub Duration,
);

impl std::fmt::Display for Elapsed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "nothing within {:?}", self.0)
    }
}

impl std::error::Error for Elapsed {}

/// Helpers over [`Env`] that need generics, which an object-safe trait cannot have.
pub trait EnvExt: Env {
    /// Waits for `future`, at most `duration`; then drops it. A future that is ready wins over the clock.
    fn timeout<F>(
        &self,
        duration: Duration,
        future: F,
    ) -> impl Future<Output = Result<F::Output, Elapsed>> + Send
    where
        F: Future + Send,
        F::Output: Send,
    {
        let sleep = self.sleep(duration);
        async move {
            match select(pin!(future), sleep).await {
                Either::Left((output, _)) => Ok(output),
                Either::Right(((), _)) => Err(Elapsed(duration)),
            }
        }
    }

    /// [`Env::spawn`] without writing the box.
    fn spawn_task<F>(&self, name: &str, future: F) -> TaskHandle
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.spawn(name, future.boxed())
    }
}

impl<E: Env + ?Sized> EnvExt for E {}
