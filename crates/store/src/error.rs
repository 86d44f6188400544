//! What can go wrong with the store. An error always means: nothing of the request was applied.

use crate::types::Revision;

/// Result of the store.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// A request failed **without being applied**. A transaction that may have been applied is not an error but
/// [`crate::TxnOutcome::Unknown`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The revision asked for has been compacted. Readers list again; watchers list and watch from there.
    #[error("revision has been compacted; the oldest that can be read is {compact_revision}")]
    Compacted {
        /// Up to here history is gone.
        compact_revision: Revision,
    },
    /// The revision asked for does not exist yet.
    #[error("revision {asked} is in the future, the store is at {current}")]
    FutureRevision {
        /// What was asked for.
        asked: Revision,
        /// Where the store is (0 when the server did not say).
        current: Revision,
    },
    /// More than [`crate::MAX_TXN_OPS`] compares, or operations in one branch.
    #[error("{count} operations in one transaction, at most {} are allowed", crate::MAX_TXN_OPS)]
    TooManyOps {
        /// The longest of the three lists.
        count: usize,
    },
    /// More than [`crate::MAX_TXN_BYTES`].
    #[error("{bytes} bytes in one transaction, at most {} are allowed", crate::MAX_TXN_BYTES)]
    TooLarge {
        /// Size as estimated before sending.
        bytes: usize,
    },
    /// One branch of a transaction puts a key twice, or puts and deletes it.
    #[error("a transaction writes the key {key} twice")]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// A key is empty.
    #[error("a key may not be empty")]
    EmptyKey,
    /// The lease does not exist: it was revoked, has expired, or never was.
    #[error("the lease does not exist")]
    LeaseNotFound,
    /// The request itself makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// A record cannot be encoded or decoded.
    #[error("record {key}: {reason}")]
    Record {
        /// Key of the record.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No room for more. Nothing was applied; reads go on working.
    #[error("the store is full: {0}")]
    Full(String),
    /// The store cannot be reached, is closed, or its disk failed.
    #[error("the store does not answer: {0}")]
    Unavailable(String),
}

impl From<StoreError> for karst_model::Error {
    fn from(error: StoreError) -> karst_model::Error {
        use karst_model::Error;
        let context = error.to_string();
        match error {
            StoreError::Full(_) => Error::quota("the state database has no space left").with_context(context),
            StoreError::Unavailable(_) => {
                Error::unavailable("the state database does not answer").with_context(context)
            }
            StoreError::TooManyOps { .. } | StoreError::TooLarge { .. } => {
                Error::too_large("the change is too large to be made at once").with_context(context)
            }
            _ => Error::internal("the state database refused a request", context),
        }
    }
}
