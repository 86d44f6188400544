//! A transaction, built with tables and records.

use std::fmt::Display;

use bytes::Bytes;
use uuid::Uuid;

use crate::error::{Result, StoreError};
use crate::requests::request_key;
use crate::table::{Record, Stored, Table, index_key};
use crate::types::*;

/// Collects conditions and changes. An error on the way (a record that cannot be encoded) comes out at
/// [`TxnBuilder::build`].
#[derive(Debug, Clone, Default)]
pub struct TxnBuilder {
    txn: Txn,
    request: Option<Uuid>,
    error: Option<StoreError>,
}

impl TxnBuilder {
    /// Nothing yet.
    pub fn new() -> TxnBuilder {
        TxnBuilder::default()
    }

    /// Only if `key` does not exist.
    pub fn expect_absent(self, key: impl Into<String>) -> TxnBuilder {
        self.expect(Compare::absent(key))
    }

    /// Only if `key` exists.
    pub fn expect_present(self, key: impl Into<String>) -> TxnBuilder {
        self.expect(Compare::present(key))
    }

    /// Only if `key` was last changed at `revision` (0: does not exist).
    pub fn expect_mod(self, key: impl Into<String>, revision: Revision) -> TxnBuilder {
        self.expect(Compare::mod_revision(key, revision))
    }

    /// Only if this holds.
    pub fn expect(mut self, compare: Compare) -> TxnBuilder {
        self.txn.compares.push(compare);
        self
    }

    /// Puts a record, whether or not it exists.
    pub fn put<T: Record>(self, table: &Table<T>, record: &T) -> TxnBuilder {
        let encoded = table.encode(record);
        self.put_encoded(table.key_of(record), encoded)
    }

    /// Puts a record that must not exist yet.
    pub fn create<T: Record>(self, table: &Table<T>, record: &T) -> TxnBuilder {
        self.expect_absent(table.key_of(record)).put(table, record)
    }

    /// Puts a record that was read, on condition that nobody changed it since. Keeps what this version does not know.
    pub fn update<T: Record>(self, table: &Table<T>, stored: &Stored<T>) -> TxnBuilder {
        self.expect_mod(table.key_of(&stored.value), stored.mod_revision).put_stored(table, stored)
    }

    /// Like [`TxnBuilder::update`] without the condition, for whoever holds a lock on the record.
    pub fn put_stored<T: Record>(self, table: &Table<T>, stored: &Stored<T>) -> TxnBuilder {
        let encoded = table.encode_stored(stored);
        self.put_encoded(table.key_of(&stored.value), encoded)
    }

    fn put_encoded(mut self, key: String, encoded: Result<Bytes>) -> TxnBuilder {
        match encoded {
            Ok(value) => self.put_raw(key, value),
            Err(error) => {
                self.error.get_or_insert(error);
                self
            }
        }
    }

    /// Deletes a record.
    pub fn delete<T: Record>(self, table: &Table<T>, id: impl Display) -> TxnBuilder {
        self.delete_raw(table.key(id))
    }

    /// Takes `name` in `scope` of `table` for the record `id`; refused if it is taken.
    pub fn claim_name(self, table: &str, scope: impl Display, name: &str, id: impl Display) -> TxnBuilder {
        let key = index_key(table, scope, name);
        self.expect_absent(key.clone()).put_raw(key, id.to_string())
    }

    /// Gives the name up; refused unless the record `id` has it.
    pub fn release_name(self, table: &str, scope: impl Display, name: &str, id: impl Display) -> TxnBuilder {
        let key = index_key(table, scope, name);
        self.expect(Compare::value(key.clone(), id.to_string())).delete_raw(key)
    }

    /// Puts a key.
    pub fn put_raw(self, key: impl Into<String>, value: impl Into<Bytes>) -> TxnBuilder {
        self.op(Op::put(key, value))
    }

    /// Puts a key that ends with a lease.
    pub fn put_leased(self, key: impl Into<String>, value: impl Into<Bytes>, lease: LeaseId) -> TxnBuilder {
        self.op(Op::Put { key: key.into(), value: value.into(), lease: Some(lease) })
    }

    /// Deletes a key.
    pub fn delete_raw(self, key: impl Into<String>) -> TxnBuilder {
        self.op(Op::delete(key))
    }

    /// Adds any operation.
    pub fn op(mut self, op: Op) -> TxnBuilder {
        self.txn.success.push(op);
        self
    }

    /// When refused, read this key: its place in `responses` is that of the call.
    pub fn else_get(mut self, key: impl Into<String>) -> TxnBuilder {
        self.txn.failure.push(Op::get(key));
        self
    }

    /// Marks the transaction, so that [`crate::Requests::resolve_unknown`] can tell what became of it: `/requests/<id>`
    /// is created with it, on condition that it does not exist, and goes with `lease`. Counts as a compare and an
    /// operation. [`crate::Requests::txn`] does this by itself.
    pub fn request_id(mut self, id: Uuid, lease: LeaseId) -> TxnBuilder {
        if self.request.is_some() {
            self.error.get_or_insert(StoreError::Invalid("a transaction has one request id".into()));
            return self;
        }
        self.request = Some(id);
        let key = request_key(id);
        self.expect_absent(key.clone()).put_leased(key, crate::requests::APPLIED, lease)
    }

    /// Nothing to do yet?
    pub fn is_empty(&self) -> bool {
        self.txn.success.is_empty()
    }

    /// How many it has of what it has most of: compares or operations.
    pub fn operations(&self) -> usize {
        self.txn.compares.len().max(self.txn.success.len())
    }

    /// The transaction, checked against the limits.
    pub fn build(self) -> Result<Txn> {
        if let Some(error) = self.error {
            return Err(error);
        }
        self.txn.validate()?;
        Ok(self.txn)
    }
}
