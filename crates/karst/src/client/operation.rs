//! Waiting for operations. The first wait is one round trip (`/wait`); the events, which are only needed to show
//! progress, are subscribed to when an operation takes longer than a person notices and a terminal is there to see.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Answer, Client, Operation, Url, types::Event, websocket};
use crate::{
    error::{Error, Result},
    output::progress::Progress,
};

/// How long a server that went away is waited for.
const RECONNECT: Duration = Duration::from_secs(15);
/// Between two attempts to reach it.
const RECONNECT_PAUSE: Duration = Duration::from_millis(200);
/// Operations that end sooner show nothing.
const NOTICEABLE: Duration = Duration::from_millis(150);

impl Client {
    /// Waits for the work of an answer, if there is any; hands back the finished operation.
    /// A failed operation is an error, a cancelled one [`Error::Interrupted`].
    pub async fn finish(&self, answer: Answer, progress: &Progress) -> Result<Option<Operation>> {
        let Some(operation) = answer.operation else {
            return Ok(None);
        };
        self.wait(operation, progress).await.map(Some)
    }

    /// Waits for an operation. On ctrl-C it is cancelled where the server allows that.
    pub async fn wait(&self, operation: Operation, progress: &Progress) -> Result<Operation> {
        let id = operation.id.clone();
        let ended =
            if operation.is_final() { Ok(operation) } else { self.wait_interruptible(&id, progress).await };
        progress.finish();
        outcome(ended?)
    }

    /// The operation at its end, whatever that is.
    pub async fn wait_final(&self, id: &str) -> Result<Operation> {
        let url = Url::new(&["operations", id, "wait"]).with("timeout", -1);
        loop {
            let operation: Operation = match self.get_as(&url).await {
                Ok(operation) => operation,
                // Incus answers with the error alone when the operation failed: how it ended (an exit code, whether
                // it was cancelled) stands in the operation, which is kept for some seconds.
                Err(refused @ Error::Api { .. }) => match self.get_as(&Url::new(&["operations", id])).await {
                    Ok(operation) => operation,
                    Err(_) => return Err(refused),
                },
                Err(error) => return Err(error),
            };
            // A server may bound the wait by itself.
            if operation.is_final() {
                return Ok(operation);
            }
        }
    }

    /// [`Self::wait_final`] that goes on when the server was restarted meanwhile: its operations outlive it.
    async fn wait_through_restarts(&self, id: &str) -> Result<Operation> {
        let mut lost_at: Option<Instant> = None;
        loop {
            let asked_at = Instant::now();
            match self.wait_final(id).await {
                Err(Error::Unreachable(text)) => {
                    // A wait that held for a while means that the server was there again.
                    let since = lost_at.filter(|_| asked_at.elapsed() < RECONNECT_PAUSE * 2);
                    let since = *lost_at.insert(since.unwrap_or_else(Instant::now));
                    if since.elapsed() > RECONNECT {
                        return Err(Error::Unreachable(text));
                    }
                    tokio::time::sleep(RECONNECT_PAUSE).await;
                }
                Err(error) if error.is_not_found() && lost_at.is_some() => {
                    let text =
                        format!("the server was restarted and knows nothing of operation {id} any more");
                    return Err(Error::Operation(text));
                }
                other => return other,
            }
        }
    }

    /// [`Self::wait_through_restarts`] with progress and ctrl-C.
    async fn wait_interruptible(&self, id: &str, progress: &Progress) -> Result<Operation> {
        let end = self.wait_through_restarts(id);
        let watch = self.watch(id, progress);
        tokio::pin!(end, watch);
        let mut asked_to_cancel = false;
        loop {
            tokio::select! {
                biased;
                ended = &mut end => return ended,
                signal = tokio::signal::ctrl_c() => {
                    signal?;
                    if asked_to_cancel {
                        return Err(left_running(id));
                    }
                    asked_to_cancel = true;
                    match self.delete(&Url::new(&["operations", id])).await {
                        Ok(_) => progress.message("cancelling"),
                        // It may have ended in this moment: then its result is what counts.
                        Err(Error::Api { status: 404, .. }) => {}
                        Err(_) => return Err(left_running(id)),
                    }
                }
                () = &mut watch => unreachable!("the watch never ends"),
            }
        }
    }

    /// Shows what the operation tells about its progress; never ends.
    async fn watch(&self, id: &str, progress: &Progress) {
        if !progress.is_visible() {
            return std::future::pending().await;
        }
        tokio::time::sleep(NOTICEABLE).await;
        progress.show();
        if let Ok(mut socket) = self.websocket(&Url::new(&["events"]).with("type", "operation")).await {
            // What happened before the subscription.
            if let Ok(now) = self.get_as::<Operation>(&Url::new(&["operations", id])).await {
                progress.update(&now.metadata);
            }
            while let Some(Ok(event)) = websocket::next_event(&mut socket).await {
                if let Some(metadata) = progress_of(&event, id) {
                    progress.update(metadata);
                }
            }
        }
        // Without events the wait goes on, only without figures.
        std::future::pending().await
    }
}

/// The metadata in an event, if it is about this operation.
fn progress_of<'a>(event: &'a Event, id: &str) -> Option<&'a Value> {
    let operation = &event.metadata;
    (event.kind == "operation" && operation.get("id")?.as_str()? == id).then(|| operation.get("metadata"))?
}

/// A final operation as a result.
pub fn outcome(operation: Operation) -> Result<Operation> {
    if operation.is_success() {
        return Ok(operation);
    }
    if operation.is_cancelled() {
        return Err(Error::Interrupted("cancelled".to_owned()));
    }
    Err(Error::Operation(match operation.err.as_str() {
        "" => format!("{} failed, and the server does not say why", operation.description.to_lowercase()),
        text => text.to_owned(),
    }))
}

/// Ctrl-C where the server does not let go.
fn left_running(id: &str) -> Error {
    Error::Interrupted(format!(
        "interrupted; operation {id} goes on in the server (karst operation show {id})"
    ))
}

/// Runs one piece of work per name at the same time, reports each failure with its name, and fails if any did.
pub async fn for_each<F, Fut>(names: &[String], work: F) -> Result<()>
where
    F: Fn(String) -> Fut,
    Fut: Future<Output = Result<()>>,
{
    use futures::StreamExt as _;
    /// Enough to keep a server busy, few enough not to flood it.
    const AT_ONCE: usize = 8;
    if let [only] = names {
        return work(only.clone()).await.map_err(|error| with_name(error, only));
    }
    let mut failed = 0;
    let mut interrupted = false;
    let mut results = futures::stream::iter(names)
        .map(|name| {
            let work = work(name.clone());
            async move { (name, work.await) }
        })
        .buffered(AT_ONCE);
    while let Some((name, result)) = results.next().await {
        match result {
            Ok(()) => {}
            Err(error @ (Error::ClosedPipe | Error::Unreachable(_))) => return Err(error),
            Err(error) => {
                let error = with_name(error, name);
                crate::error::report(&error);
                failed += 1;
                interrupted |= matches!(error, Error::Interrupted(_));
            }
        }
    }
    match (interrupted, failed) {
        (true, _) => Err(Error::Exit(130)),
        (false, 0) => Ok(()),
        (false, count) => Err(Error::Reported(count)),
    }
}

/// Puts the name of what it is about before an error that does not say it.
fn with_name(error: Error, name: &str) -> Error {
    let named = |message: String| {
        if message.contains(name) { message } else { format!("{name}: {message}") }
    };
    match error {
        Error::Api { status, message } => Error::Api { status, message: named(message) },
        Error::Operation(message) => Error::Operation(named(message)),
        Error::Interrupted(message) => Error::Interrupted(named(message)),
        Error::Local(message) => Error::Local(named(message)),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(status_code: u16, err: &str) -> Operation {
        Operation {
            status_code,
            err: err.to_owned(),
            description: "Creating instance".to_owned(),
            ..Operation::default()
        }
    }

    #[test]
    fn outcomes() {
        assert!(outcome(ended(200, "")).is_ok());
        assert_eq!(outcome(ended(400, "disk full")).unwrap_err().to_string(), "disk full");
        assert!(outcome(ended(400, "")).unwrap_err().to_string().starts_with("creating instance failed"));
        assert_eq!(outcome(ended(401, "")).unwrap_err().exit_code(), 130);
    }

    #[test]
    fn only_own_events_are_progress() {
        let event: Event = serde_json::from_str(
            r#"{"type":"operation","metadata":{"id":"a","metadata":{"progress":{"percent":"5"}}}}"#,
        )
        .unwrap();
        assert!(progress_of(&event, "a").is_some());
        assert!(progress_of(&event, "b").is_none());
    }
}
