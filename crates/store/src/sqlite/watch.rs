//! Watches: first from the log, then from what the writer publishes, and back to the log when too far behind.

use std::collections::VecDeque;
use std::sync::Arc;

use futures::StreamExt;
use tokio::sync::broadcast::{self, error::RecvError};

use super::Reads;
use super::core::Published;
use super::read;
use crate::error::{Result, StoreError};
use crate::types::*;

struct Watching {
    reads: Reads,
    prefix: Arc<str>,
    receiver: broadcast::Receiver<Arc<Published>>,
    queue: VecDeque<WatchItem>,
    /// The next revision to look at.
    next: Revision,
    /// Read the log before listening.
    behind: bool,
    ended: bool,
}

/// The receiver must have subscribed before this is polled first, so that nothing falls between log and channel.
pub(super) fn stream(
    reads: Reads,
    prefix: &str,
    from: Revision,
    receiver: broadcast::Receiver<Arc<Published>>,
) -> WatchStream {
    let queue = VecDeque::new();
    let watching =
        Watching { reads, prefix: prefix.into(), receiver, queue, next: from, behind: true, ended: false };
    futures::stream::unfold(watching, |mut watching| async move {
        if watching.ended {
            return None;
        }
        let item = watching.next_item().await;
        watching.ended = item.is_err();
        Some((item, watching))
    })
    .boxed()
}

impl Watching {
    async fn next_item(&mut self) -> Result<WatchItem> {
        loop {
            if let Some(item) = self.queue.pop_front() {
                return Ok(item);
            }
            if self.behind {
                self.catch_up().await?;
                continue;
            }
            match self.receiver.recv().await {
                Ok(published) if published.revision < self.next => {}
                Ok(published) => match &published.events {
                    None => self.behind = true,
                    Some(events) => {
                        let under = |event: &&Event| event.key().starts_with(&*self.prefix);
                        let events: Vec<Event> = events.iter().filter(under).cloned().collect();
                        let revision = published.revision;
                        self.next = revision + 1;
                        if !events.is_empty() {
                            return Ok(WatchItem::Batch(WatchBatch { revision, events }));
                        }
                        if self.receiver.is_empty() {
                            return Ok(WatchItem::Progress(revision));
                        }
                    }
                },
                Err(RecvError::Lagged(_)) => self.behind = true,
                Err(RecvError::Closed) => return Err(StoreError::Unavailable("the store was closed".into())),
            }
        }
    }

    async fn catch_up(&mut self) -> Result<()> {
        let (prefix, next) = (self.prefix.clone(), self.next);
        let chunk = self.reads.run(move |conn| read::history(conn, &prefix, next)).await?;
        self.queue.extend(chunk.batches.into_iter().map(WatchItem::Batch));
        if chunk.complete {
            self.behind = false;
            if chunk.through >= self.next {
                self.queue.push_back(WatchItem::Progress(chunk.through));
            }
        }
        self.next = self.next.max(chunk.through + 1);
        Ok(())
    }
}
