//! Transactions whose outcome is always known in the end.
//!
//! A transaction can end as [`TxnOutcome::Unknown`]: the connection broke after it was sent. Sending it again could
//! apply it twice. So it carries an id: together with its changes it creates `/requests/<id>`, on condition that this
//! key does not exist. Who wants to know what became of it tries to create the same key with the mark "void":
//!
//! * the key exists with "applied": it was applied, at the key's revision;
//! * the mark was made: it was not applied, and cannot be any more, however late it arrives.

use std::sync::Arc;
use std::time::Duration;

use karst_env::{EnvExt, SharedEnv};
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::builder::TxnBuilder;
use crate::error::{Result, StoreError};
use crate::store::Store;
use crate::types::*;

pub(crate) const APPLIED: &str = "applied";
const VOID: &str = "void";

/// How long a mark is kept at least. A request older than this must not be resolved any more.
pub const REQUEST_KEPT: Duration = Duration::from_secs(600);
/// Marks share leases: a new lease is made when the last is older than this.
const LEASE_SHARED: Duration = Duration::from_secs(300);
/// First and longest pause between two attempts to resolve.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));

/// The key that marks a request.
pub fn request_key(id: Uuid) -> String {
    format!("/karst/requests/{id}")
}

/// What became of a transaction of unknown outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    /// It was applied, at this revision.
    Applied(Revision),
    /// It was not, and never will be.
    NotApplied,
}

/// A transaction that was resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub enum Resolved {
    /// Applied and durable.
    Committed {
        /// Revision of its changes.
        revision: Revision,
        /// One answer for each operation given; `None` when the answers were lost with the connection.
        responses: Option<Vec<OpResponse>>,
    },
    /// A compare did not hold.
    Refused {
        /// Revision of the store at that moment.
        revision: Revision,
        /// One answer for each operation of `failure`.
        responses: Vec<OpResponse>,
    },
}

/// Runs transactions and resolves those that end unknown. One for each process is enough.
pub struct Requests {
    store: Arc<dyn Store>,
    env: SharedEnv,
    /// The lease that marks hang on now, and when it was granted.
    lease: Mutex<Option<(LeaseId, Duration)>>,
}

impl Requests {
    /// Over `store`.
    pub fn new(store: Arc<dyn Store>, env: SharedEnv) -> Requests {
        Requests { store, env, lease: Mutex::new(None) }
    }

    /// The store beneath.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    async fn lease(&self) -> Result<LeaseId> {
        let mut lease = self.lease.lock().await;
        let now = self.env.monotonic();
        if let Some((id, granted)) = *lease
            && now.saturating_sub(granted) < LEASE_SHARED
        {
            return Ok(id);
        }
        let id = self.store.lease_grant(REQUEST_KEPT + LEASE_SHARED).await?;
        *lease = Some((id, now));
        Ok(id)
    }

    /// Runs a transaction and finds out what became of it, for at most `patience` (less than [`REQUEST_KEPT`]).
    /// If it turns out not to have been applied it is tried again. `failure` may only read.
    ///
    /// An error means that it was not applied, except [`StoreError::Unavailable`] after `patience`, when nothing is
    /// known: the caller has to treat its objects as being in doubt.
    pub async fn txn(&self, builder: TxnBuilder, patience: Duration) -> Result<Resolved> {
        let give_up = self.env.monotonic() + patience.min(REQUEST_KEPT);
        loop {
            let id = self.env_uuid();
            let txn = builder.clone().request_id(id, self.lease().await?).build()?;
            if txn.failure.iter().any(Op::writes) {
                return Err(StoreError::Invalid(
                    "the failure branch of a marked transaction only reads".into(),
                ));
            }
            match self.store.txn(txn).await {
                Ok(TxnOutcome::Committed { revision, mut responses }) => {
                    responses.pop(); // that of the mark
                    return Ok(Resolved::Committed { revision, responses: Some(responses) });
                }
                Ok(TxnOutcome::Refused { revision, responses }) => {
                    return Ok(Resolved::Refused { revision, responses });
                }
                Err(StoreError::LeaseNotFound) => {
                    // The store was away for longer than the lease. A new one then; nothing was applied.
                    *self.lease.lock().await = None;
                }
                Err(error) => return Err(error),
                Ok(TxnOutcome::Unknown) => {
                    let left = give_up.saturating_sub(self.env.monotonic());
                    let resolving = self.env.timeout(left, self.resolve_unknown(id)).await;
                    match resolving.unwrap_or_else(|_| Err(unresolved(id)))? {
                        Resolution::Applied(revision) => {
                            return Ok(Resolved::Committed { revision, responses: None });
                        }
                        Resolution::NotApplied => {}
                    }
                }
            }
            if self.env.monotonic() >= give_up {
                return Err(StoreError::Unavailable("the transaction was not applied in time".into()));
            }
        }
    }

    fn env_uuid(&self) -> Uuid {
        self.env.uuid()
    }

    /// Finds out what became of the request `id`, and if it was not applied prevents that it ever is. Tries until the
    /// store answers: the caller sets the limit.
    pub async fn resolve_unknown(&self, id: Uuid) -> Result<Resolution> {
        let key = request_key(id);
        let mut pause = PAUSES.0;
        loop {
            match self.try_resolve(&key).await {
                Ok(Some(resolution)) => return Ok(resolution),
                Ok(None) => {}
                Err(StoreError::LeaseNotFound) => *self.lease.lock().await = None,
                Err(StoreError::Unavailable(reason)) => {
                    tracing::debug!(%id, reason, "a request is not resolved yet");
                }
                Err(error) => return Err(error),
            }
            self.env.sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    async fn try_resolve(&self, key: &str) -> Result<Option<Resolution>> {
        let lease = self.lease().await?;
        let txn = TxnBuilder::new().expect_absent(key).put_leased(key, VOID, lease).else_get(key).build()?;
        Ok(match self.store.txn(txn).await? {
            TxnOutcome::Unknown => None,
            TxnOutcome::Committed { .. } => Some(Resolution::NotApplied),
            TxnOutcome::Refused { responses, .. } => match responses.first() {
                // An earlier attempt to resolve may have made the mark without our hearing of it.
                Some(OpResponse::Got(Some(kv))) if kv.value == APPLIED => {
                    Some(Resolution::Applied(kv.mod_revision))
                }
                Some(OpResponse::Got(Some(_))) => Some(Resolution::NotApplied),
                _ => None,
            },
        })
    }
}

fn unresolved(id: Uuid) -> StoreError {
    StoreError::Unavailable(format!("it is not known whether request {id} was applied"))
}
