//! Requests and answers of the store: etcd's, with its limits.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;

use crate::error::{Result, StoreError};

/// A point in the history of the whole store. An empty store is at 1; each transaction that changes something adds 1.
pub type Revision = u64;

/// Most compares, and most operations in either branch, of one transaction (etcd's `--max-txn-ops`).
pub const MAX_TXN_OPS: usize = 128;
/// Most bytes of one transaction: 1.5 MiB (etcd's `--max-request-bytes`).
pub const MAX_TXN_BYTES: usize = 1536 * 1024;

/// What etcd's encoding may add to the key and value of an operation; an upper bound.
const OP_OVERHEAD: usize = 64;

/// A lease: keys put with it disappear, in one revision, when it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(
    /// Positive.
    pub i64,
);

/// A key as it is in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// The key.
    pub key: String,
    /// Empty for [`RangeRequest::keys_only`].
    pub value: Bytes,
    /// Revision at which the key came into being.
    pub create_revision: Revision,
    /// Revision of the last put.
    pub mod_revision: Revision,
    /// Number of puts since it came into being; the first is 1.
    pub version: u64,
    /// The lease that it hangs on.
    pub lease: Option<LeaseId>,
}

/// Which keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyRange {
    /// Keys that begin with this; the empty prefix means all.
    Prefix(String),
    /// From the first, which is included, to the second, which is not.
    Between(String, String),
}

impl KeyRange {
    /// First key, and first key no longer in the range (`None`: to the end), as bytes in the store's order.
    pub fn bounds(&self) -> (Vec<u8>, Option<Vec<u8>>) {
        match self {
            KeyRange::Between(start, end) => (start.clone().into_bytes(), Some(end.clone().into_bytes())),
            KeyRange::Prefix(prefix) => {
                let mut end = prefix.clone().into_bytes();
                while let Some(last) = end.pop() {
                    if last < u8::MAX {
                        end.push(last + 1);
                        return (prefix.clone().into_bytes(), Some(end));
                    }
                }
                (prefix.clone().into_bytes(), None)
            }
        }
    }

    /// Is `key` in the range?
    pub fn contains(&self, key: &str) -> bool {
        match self {
            KeyRange::Prefix(prefix) => key.starts_with(prefix),
            KeyRange::Between(start, end) => start.as_str() <= key && key < end.as_str(),
        }
    }
}

/// A read of many keys, in the order of their bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeRequest {
    /// Which keys.
    pub range: KeyRange,
    /// At most so many; 0 for no limit.
    pub limit: usize,
    /// As of this revision instead of now.
    pub at_revision: Option<Revision>,
    /// Without values.
    pub keys_only: bool,
}

impl RangeRequest {
    /// All keys that begin with `prefix`.
    pub fn prefix(prefix: impl Into<String>) -> RangeRequest {
        RangeRequest::of(KeyRange::Prefix(prefix.into()))
    }

    /// All keys from `start` to before `end`.
    pub fn between(start: impl Into<String>, end: impl Into<String>) -> RangeRequest {
        RangeRequest::of(KeyRange::Between(start.into(), end.into()))
    }

    fn of(range: KeyRange) -> RangeRequest {
        RangeRequest { range, limit: 0, at_revision: None, keys_only: false }
    }

    /// At most `limit` keys.
    pub fn limit(mut self, limit: usize) -> RangeRequest {
        self.limit = limit;
        self
    }

    /// As of `revision`.
    pub fn at(mut self, revision: Revision) -> RangeRequest {
        self.at_revision = Some(revision);
        self
    }

    /// Without values.
    pub fn keys_only(mut self) -> RangeRequest {
        self.keys_only = true;
        self
    }
}

/// Answer to [`crate::Store::get`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GetResponse {
    /// The key, if it exists.
    pub kv: Option<KeyValue>,
    /// Revision of the store at the read.
    pub revision: Revision,
}

/// Answer to [`crate::Store::range`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeResponse {
    /// The keys in order.
    pub kvs: Vec<KeyValue>,
    /// Revision of the store at the read: to watch on from here, watch from this plus 1. When reading pages,
    /// the later ones are read `at` the revision of the first.
    pub revision: Revision,
    /// The limit cut the answer short.
    pub more: bool,
}

/// How a compare compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cmp {
    /// Equal.
    Equal,
    /// Not equal.
    NotEqual,
    /// The key's is less than the given one.
    Less,
    /// The key's is greater than the given one.
    Greater,
}

impl Cmp {
    /// Does `left` stand so to `right`?
    pub fn holds<T: Ord + ?Sized>(self, left: &T, right: &T) -> bool {
        match self {
            Cmp::Equal => left == right,
            Cmp::NotEqual => left != right,
            Cmp::Less => left < right,
            Cmp::Greater => left > right,
        }
    }
}

/// What a compare looks at. For a key that does not exist the numbers are 0, and a compare of the value never holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// The value, as bytes.
    Value(Bytes),
    /// Number of puts.
    Version(u64),
    /// Revision at which it came into being; 0 means that it does not exist.
    CreateRevision(Revision),
    /// Revision of the last put.
    ModRevision(Revision),
}

/// A condition of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compare {
    /// Which key.
    pub key: String,
    /// How.
    pub cmp: Cmp,
    /// With what.
    pub target: Target,
}

impl Compare {
    /// The key does not exist.
    pub fn absent(key: impl Into<String>) -> Compare {
        Compare { key: key.into(), cmp: Cmp::Equal, target: Target::CreateRevision(0) }
    }

    /// The key exists.
    pub fn present(key: impl Into<String>) -> Compare {
        Compare { key: key.into(), cmp: Cmp::Greater, target: Target::CreateRevision(0) }
    }

    /// The key was last put at `revision`.
    pub fn mod_revision(key: impl Into<String>, revision: Revision) -> Compare {
        Compare { key: key.into(), cmp: Cmp::Equal, target: Target::ModRevision(revision) }
    }

    /// The key has this value.
    pub fn value(key: impl Into<String>, value: impl Into<Bytes>) -> Compare {
        Compare { key: key.into(), cmp: Cmp::Equal, target: Target::Value(value.into()) }
    }

    /// Does it hold for what the store has?
    pub(crate) fn holds(&self, kv: Option<&KeyValue>) -> bool {
        match (&self.target, kv) {
            (Target::Value(_), None) => false,
            (Target::Value(value), Some(kv)) => self.cmp.holds(kv.value.as_ref(), value.as_ref()),
            (Target::Version(n), kv) => self.cmp.holds(&kv.map_or(0, |kv| kv.version), n),
            (Target::CreateRevision(n), kv) => self.cmp.holds(&kv.map_or(0, |kv| kv.create_revision), n),
            (Target::ModRevision(n), kv) => self.cmp.holds(&kv.map_or(0, |kv| kv.mod_revision), n),
        }
    }
}

/// One operation of a transaction. They run in order and see what those before them did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Creates the key or overwrites it; the lease is replaced too.
    Put {
        /// The key.
        key: String,
        /// The value.
        value: Bytes,
        /// The lease to hang it on.
        lease: Option<LeaseId>,
    },
    /// Deletes the key if it exists.
    Delete {
        /// The key.
        key: String,
    },
    /// Deletes all keys of a range.
    DeleteRange {
        /// Which.
        range: KeyRange,
    },
    /// Reads the key.
    Get {
        /// The key.
        key: String,
    },
}

impl Op {
    /// A put without a lease.
    pub fn put(key: impl Into<String>, value: impl Into<Bytes>) -> Op {
        Op::Put { key: key.into(), value: value.into(), lease: None }
    }

    /// A delete of one key.
    pub fn delete(key: impl Into<String>) -> Op {
        Op::Delete { key: key.into() }
    }

    /// A delete of all keys that begin with `prefix`.
    pub fn delete_prefix(prefix: impl Into<String>) -> Op {
        Op::DeleteRange { range: KeyRange::Prefix(prefix.into()) }
    }

    /// A read of one key.
    pub fn get(key: impl Into<String>) -> Op {
        Op::Get { key: key.into() }
    }

    /// Can it change anything?
    pub fn writes(&self) -> bool {
        !matches!(self, Op::Get { .. })
    }
}

/// The answer to one operation, at the same place in the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OpResponse {
    /// Put.
    Put,
    /// Deleted so many keys.
    Deleted(u64),
    /// Read.
    Got(Option<KeyValue>),
}

/// A transaction: if all compares hold, the operations of `success`, otherwise those of `failure`; atomically.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Txn {
    /// All must hold. None: always.
    pub compares: Vec<Compare>,
    /// Done when they hold.
    pub success: Vec<Op>,
    /// Done when they do not.
    pub failure: Vec<Op>,
}

impl Txn {
    /// Size as etcd counts it, or a little more.
    pub fn estimated_bytes(&self) -> usize {
        let compares = self.compares.iter().map(|compare| {
            let value = if let Target::Value(value) = &compare.target { value.len() } else { 0 };
            OP_OVERHEAD + compare.key.len() + value
        });
        let ops = self.success.iter().chain(&self.failure).map(|op| {
            OP_OVERHEAD
                + match op {
                    Op::Put { key, value, .. } => key.len() + value.len(),
                    Op::Delete { key } | Op::Get { key } => key.len(),
                    Op::DeleteRange { range: KeyRange::Prefix(prefix) } => 2 * prefix.len(),
                    Op::DeleteRange { range: KeyRange::Between(start, end) } => start.len() + end.len(),
                }
        });
        compares.chain(ops).sum::<usize>() + OP_OVERHEAD
    }

    /// Refuses what etcd would refuse. Each implementation calls this first, so that all have the same limits.
    pub fn validate(&self) -> Result<()> {
        let count = self.compares.len().max(self.success.len()).max(self.failure.len());
        if count > MAX_TXN_OPS {
            return Err(StoreError::TooManyOps { count });
        }
        let bytes = self.estimated_bytes();
        if bytes > MAX_TXN_BYTES {
            return Err(StoreError::TooLarge { bytes });
        }
        if self.compares.iter().any(|compare| compare.key.is_empty()) {
            return Err(StoreError::EmptyKey);
        }
        validate_branch(&self.success)?;
        validate_branch(&self.failure)
    }
}

fn validate_branch(ops: &[Op]) -> Result<()> {
    let mut puts = BTreeSet::new();
    for op in ops {
        match op {
            Op::Put { key, .. } | Op::Delete { key } | Op::Get { key } if key.is_empty() => {
                return Err(StoreError::EmptyKey);
            }
            Op::Put { key, .. } if !puts.insert(key.as_str()) => {
                return Err(StoreError::DuplicateKey { key: key.clone() });
            }
            _ => {}
        }
    }
    for op in ops {
        let clash = match op {
            Op::Delete { key } => puts.get(key.as_str()).copied(),
            Op::DeleteRange { range } => puts.iter().find(|key| range.contains(key)).copied(),
            _ => None,
        };
        if let Some(key) = clash {
            return Err(StoreError::DuplicateKey { key: key.to_owned() });
        }
    }
    Ok(())
}

/// What became of a transaction. `Err` beside it means that it was not applied.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub enum TxnOutcome {
    /// The compares held and `success` is applied and durable.
    Committed {
        /// Revision of the store after it: that of the changes, if it made any.
        revision: Revision,
        /// One answer for each operation of `success`.
        responses: Vec<OpResponse>,
    },
    /// A compare did not hold; `failure` was done instead.
    Refused {
        /// Revision of the store at that moment.
        revision: Revision,
        /// One answer for each operation of `failure`.
        responses: Vec<OpResponse>,
    },
    /// It may have been applied, may still be applied, or never. Only a read can tell, see [`crate::Requests`].
    Unknown,
}

impl TxnOutcome {
    /// The revision if it committed.
    pub fn committed(&self) -> Option<Revision> {
        match self {
            TxnOutcome::Committed { revision, .. } => Some(*revision),
            _ => None,
        }
    }
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Revision of the last put before this change. `None` if the key did not exist, or if that put has been compacted.
    pub prev_mod_revision: Option<Revision>,
    /// What changed.
    pub change: Change,
}

impl Event {
    /// The key.
    pub fn key(&self) -> &str {
        match &self.change {
            Change::Put(kv) => &kv.key,
            Change::Delete { key } => key,
        }
    }
}

/// A put or a delete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The key as it is since then.
    Put(KeyValue),
    /// The key is gone.
    Delete {
        /// Which.
        key: String,
    },
}

/// All changes under the watched prefix of one revision, in the order of the transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchBatch {
    /// The revision.
    pub revision: Revision,
    /// Never empty.
    pub events: Vec<Event>,
}

/// What a watch delivers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchItem {
    /// The next revision that changed something under the prefix.
    Batch(WatchBatch),
    /// All changes up to this revision have been delivered. A watch sends this when it has caught up and then as it
    /// sees fit (etcd: every ten minutes); nothing may depend on it coming soon.
    Progress(Revision),
}

impl WatchItem {
    /// The revision up to which the watcher now knows everything.
    pub fn revision(&self) -> Revision {
        match self {
            WatchItem::Batch(batch) => batch.revision,
            WatchItem::Progress(revision) => *revision,
        }
    }
}

/// A running watch. It ends after its first error; dropping it ends it.
pub type WatchStream = BoxStream<'static, Result<WatchItem>>;

/// Answer to [`crate::Store::status`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// `sqlite`, `sqlite-memory`, `etcd`.
    pub backend: &'static str,
    /// Its version.
    pub version: String,
    /// Where the store is.
    pub revision: Revision,
    /// History up to and including here is gone, as far as this process knows.
    pub compact_revision: Revision,
    /// Bytes on disk (or in memory).
    pub size_bytes: u64,
}

/// What this process has asked of the store since it opened it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Durable commits: each waited for the disk once. Adjacent transactions share one.
    pub durable_commits: u64,
    /// Transactions that committed and changed something.
    pub transactions: u64,
}

/// Shortest and longest time to live of a lease.
pub const LEASE_TTL: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_secs(9_000_000);

/// Refuses a time to live that not all implementations can keep; etcd counts in seconds.
pub(crate) fn lease_seconds(ttl: Duration) -> Result<i64> {
    if !LEASE_TTL.contains(&ttl) {
        return Err(StoreError::Invalid(format!("a lease of {ttl:?} is not between {LEASE_TTL:?}")));
    }
    Ok(ttl.as_secs() as i64 + i64::from(ttl.subsec_nanos() > 0))
}
