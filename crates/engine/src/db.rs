//! The transaction that use cases build, and its commit.

use crate::inventory::{Lock, Records, Row, Uses};
use karst_env::Env;
use karst_model::{Error, Result};
use karst_store::{
    Compare, MAX_TXN_OPS, Record, Requests, Resolved, Revision, Store, Stored, Table, TxnBuilder,
};
use std::{collections::BTreeSet, sync::Arc, time::Duration};

/// Operations of a saga's end beside those of its use case: its records, one lock, the fence.
const OF_AN_END: usize = 16;

/// A transaction in the making; a mutable face of [`TxnBuilder`] with the words of use cases.
#[derive(Debug, Default)]
pub struct Tx {
    builder: TxnBuilder,
    touched: BTreeSet<String>,
    /// What is expected already: a transaction has room for 128 compares, and who asks of many things asks of some often.
    expected: BTreeSet<(String, Option<Revision>)>,
}

impl Tx {
    fn with(&mut self, change: impl FnOnce(TxnBuilder) -> TxnBuilder) {
        self.builder = change(std::mem::take(&mut self.builder));
    }

    /// Writes a new record; refused when it exists.
    pub fn create<T: Record>(&mut self, record: &T) {
        self.with(|b| b.create(&Table::new(), record));
    }

    /// Writes a record whatever was there.
    pub fn put<T: Record>(&mut self, record: &T) {
        self.with(|b| b.put(&Table::new(), record));
    }

    /// Replaces the record of `row` by `new`, keeping fields that this version does not know; refused when it has changed
    /// since.
    pub fn replace<T: Record + Clone>(&mut self, row: &Row<T>, new: &T) {
        let stored: Stored<T> = row.stored().with(new.clone());
        self.with(|b| b.update(&Table::new(), &stored));
    }

    /// Refused unless the record of `row` is still as it was.
    pub fn expect<T: Record>(&mut self, row: &Row<T>) {
        let key = Table::<T>::new().key_of(row);
        if self.expected.insert((key.clone(), Some(row.mod_revision))) {
            self.with(|b| b.expect_mod(key, row.mod_revision));
        }
    }

    /// Refused unless `target` is not locked.
    pub fn expect_unlocked(&mut self, target: &str) {
        self.expect_none(Table::<Lock>::new().key(target));
    }

    fn expect_none(&mut self, key: String) {
        if self.expected.insert((key.clone(), None)) {
            self.with(|b| b.expect(Compare::absent(key)));
        }
    }

    /// Says that something begins to use `target`; see [`Uses`].
    pub fn touch(&mut self, target: &str) {
        // A transaction writes a key once.
        if self.touched.insert(target.to_owned()) {
            self.put(&Uses { target: target.to_owned() });
        }
    }

    /// Refused when something has begun to use `target` since it was read.
    pub fn expect_untouched(&mut self, records: &Records, target: &str) {
        match records.uses(target) {
            Some(row) => self.expect(row),
            None => self.expect_none(Table::<Uses>::new().key(target)),
        }
    }

    /// Refused when the plain value at `key` is not of this revision; `None`: when it is there.
    pub fn expect_raw(&mut self, key: &str, revision: Option<Revision>) {
        self.with(|b| match revision {
            Some(revision) => b.expect_mod(key, revision),
            None => b.expect_absent(key),
        });
    }

    /// Deletes the record of `row`; refused when it has changed since.
    pub fn delete<T: Record>(&mut self, row: &Row<T>) {
        self.expect(row);
        self.with(|b| b.delete(&Table::<T>::new(), row.record_id()));
    }

    /// Deletes a record by id, whether it exists or not.
    pub fn delete_id<T: Record>(&mut self, id: &str) {
        self.with(|b| b.delete(&Table::<T>::new(), id));
    }

    /// Takes a unique name; refused when it is taken.
    pub fn take_name(&mut self, kind: &str, scope: &str, name: &str, id: &str) {
        self.with(|b| b.claim_name(kind, scope, name, id));
    }

    /// Gives a unique name back; refused unless `id` has it.
    pub fn release_name(&mut self, kind: &str, scope: &str, name: &str, id: &str) {
        self.with(|b| b.release_name(kind, scope, name, id));
    }

    /// Writes a plain value (counters of the platform).
    pub fn put_raw(&mut self, key: &str, value: String) {
        self.with(|b| b.put_raw(key, value));
    }

    /// Has the end of a saga room for it? Where not, it is better said before anything is done.
    pub fn fits_an_end(&self) -> bool {
        self.builder.operations() + OF_AN_END <= MAX_TXN_OPS
    }

    /// Changes nothing?
    pub fn is_empty(&self) -> bool {
        self.builder.is_empty()
    }
}

/// What became of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Commit {
    /// It is durable, at this revision.
    Applied(Revision),
    /// A compare did not hold; the store was at this revision then.
    Refused(Revision),
}

/// How long the fate of a transaction may stay unknown before its caller is told so.
const PATIENCE: Duration = Duration::from_secs(30);

/// Commits transactions; one whose fate is unknown is resolved.
pub struct Db {
    requests: Requests,
    executor: (String, String),
}

impl Db {
    /// Over `store`, for the engine with `epoch`, as long as `key` says so.
    pub fn new(env: Arc<dyn Env>, store: Arc<dyn Store>, key: String, epoch: u64) -> Self {
        Self { requests: Requests::new(store, env), executor: (key, epoch.to_string()) }
    }

    /// The store beneath.
    pub fn store(&self) -> &dyn Store {
        &**self.requests.store()
    }

    /// Commits: applied, or refused because a compare failed, and then nothing changed. An engine whose successor has
    /// taken over changes nothing any more, whatever it last read.
    ///
    /// # Errors
    /// Unavailable when the store does not answer (then it is unknown whether it was applied, after 30 s), conflict when
    /// another engine acts for this node now, and as the store says: too large, quota, internal.
    pub async fn commit(&self, tx: Tx) -> Result<Commit> {
        let (key, epoch) = &self.executor;
        let fenced = tx.builder.expect(Compare::value(key.clone(), epoch.clone()));
        match self.requests.txn(fenced, PATIENCE).await? {
            Resolved::Committed { revision, .. } => Ok(Commit::Applied(revision)),
            Resolved::Refused { revision, .. } => {
                let now = self.store().get(key).await?.kv;
                if now.is_none_or(|kv| kv.value != epoch.as_bytes()) {
                    return Err(Error::conflict(
                        "another daemon has taken over this node; this one changes nothing any more",
                    ));
                }
                Ok(Commit::Refused(revision))
            }
        }
    }
}
