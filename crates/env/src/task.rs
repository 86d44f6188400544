//! The handle of a spawned task, the same for both environments.

use std::any::Any;
use std::panic::AssertUnwindSafe;

use futures::FutureExt;
use futures::channel::oneshot;
use futures::future::{AbortHandle, Abortable, BoxFuture};

/// Why a task gave no result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JoinError {
    /// It was aborted, or its environment went away.
    Aborted,
    /// It panicked, with this message.
    Panicked(String),
}

impl std::fmt::Display for JoinError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            JoinError::Aborted => write!(f, "the task was aborted"),
            JoinError::Panicked(message) => write!(f, "the task panicked: {message}"),
        }
    }
}

impl std::error::Error for JoinError {}

/// A spawned task. Dropping the handle lets the task run on.
#[derive(Debug)]
pub struct TaskHandle {
    name: String,
    abort: AbortHandle,
    done: oneshot::Receiver<Result<(), JoinError>>,
}

impl TaskHandle {
    /// The name given at spawn.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Asks the task to end: it is dropped where it waits. Nothing happens when it has ended already.
    pub fn abort(&self) {
        self.abort.abort();
    }

    /// Waits until the task has ended.
    pub async fn join(self) -> Result<(), JoinError> {
        self.done.await.unwrap_or(Err(JoinError::Aborted))
    }
}

/// The text of a panic's payload.
pub(crate) fn panic_text(payload: &(dyn Any + Send)) -> String {
    payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a text".to_owned())
}

/// Wraps `future` so that it can be aborted and its end observed; `on_panic` hears of a panic.
pub(crate) fn wrap(
    name: &str,
    future: BoxFuture<'static, ()>,
    on_panic: impl FnOnce(&str) + Send + 'static,
) -> (TaskHandle, BoxFuture<'static, ()>) {
    let (abort, registration) = AbortHandle::new_pair();
    let (sender, done) = oneshot::channel();
    let body = Abortable::new(AssertUnwindSafe(future).catch_unwind(), registration);
    let wrapped = async move {
        let result = match body.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(payload)) => {
                let text = panic_text(payload.as_ref());
                on_panic(&text);
                Err(JoinError::Panicked(text))
            }
            Err(futures::future::Aborted) => Err(JoinError::Aborted),
        };
        // Nobody waits when the handle was dropped, which is allowed.
        let _ = sender.send(result);
    };
    (TaskHandle { name: name.to_owned(), abort, done }, wrapped.boxed())
}
