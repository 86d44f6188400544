//! The trait.

use std::time::Duration;

use async_trait::async_trait;

use crate::error::Result;
use crate::types::*;

/// etcd's semantics and no more: a map from keys to values with one history, changed by transactions.
///
/// * Reads are linearizable: they see every transaction that was answered before they began.
/// * A transaction is atomic and durable when it is answered [`TxnOutcome::Committed`].
/// * Every implementation passes [`crate::contract`].
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Reads one key.
    async fn get(&self, key: &str) -> Result<GetResponse>;

    /// Reads many keys, in order, now or as of a revision that is not compacted.
    async fn range(&self, request: RangeRequest) -> Result<RangeResponse>;

    /// Runs a transaction. `Err` means that it was not applied and never will be.
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome>;

    /// Follows the changes under `prefix` at `from_revision` (1 or more; may lie in the future) and later.
    /// When `from_revision` is not later than the compacted revision, or history is compacted before a slow reader
    /// has seen it, the stream fails with [`crate::StoreError::Compacted`]; list again and watch from there.
    async fn watch(&self, prefix: &str, from_revision: Revision) -> Result<WatchStream>;

    /// Makes a lease that ends `ttl` after it was last kept alive ([`LEASE_TTL`]; rounded up to seconds, and an
    /// implementation may have a minimum of some seconds).
    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId>;

    /// Starts its time anew; answers the time to live.
    async fn lease_keepalive(&self, lease: LeaseId) -> Result<Duration>;

    /// Ends it and deletes its keys in one revision.
    async fn lease_revoke(&self, lease: LeaseId) -> Result<()>;

    /// Forgets history up to and including `revision`, except what is needed to read at `revision` itself.
    async fn compact(&self, revision: Revision) -> Result<()>;

    /// How it is.
    async fn status(&self) -> Result<Status>;

    /// What was done through this handle so far.
    fn counters(&self) -> Counters;

    /// Number of times that a commit waited for the disk. We promise at most 6 for creating an instance.
    fn sync_count(&self) -> u64 {
        self.counters().durable_commits
    }
}
