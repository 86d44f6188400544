//! The store: where everything is kept that must survive.
//!
//! # The model
//! One map from text keys to byte values with **one history**. Each transaction that changes something makes the next
//! *revision* of the whole store. [`Store`] offers what etcd offers and no more, so that the same engine runs on
//! [`SqliteStore`] (one host) and on [`EtcdStore`] (several).
//!
//! * **Write** with [`Store::txn`]: conditions ([`Compare`]) on single keys, then puts and deletes, all or nothing. The
//!   answer is [`TxnOutcome::Committed`], [`TxnOutcome::Refused`] (a condition did not hold) or
//!   [`TxnOutcome::Unknown`] (the connection broke). `Err` always means *not applied*. Who must know in the end uses
//!   [`Requests::txn`], which marks the transaction and resolves the unknown.
//! * **Decide** only from conditions in the transaction (uniqueness, ownership, quota), never from what was read before.
//! * **Follow** with [`list_prefix`] at one revision and [`Store::watch`] from the next. One [`WatchBatch`] is one
//!   revision: apply it whole. On [`StoreError::Compacted`] list again. Whoever wrote something at revision R sees it in
//!   the inventory as soon as a batch or progress marker has reached R. Marks under `/requests/` are outside
//!   [`ROOT`]; a transaction that should be waited for must change something under it.
//! * **Limits**, everywhere: 128 operations and 1.5 MiB in a transaction, a key written once in it.
//!
//! [`FaultStore`] wraps a store and misbehaves on demand. [`Table`] keeps records as JSON with a version, [`TxnBuilder`] puts them into transactions, [`mod@migrations`] brings old
//! forms up to date, and fields that this version does not know survive it.
//!
//! ```
//! use karst_env::RealEnv;
//! use karst_store::*;
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Serialize, Deserialize)]
//! struct Pet { id: u32, name: String }
//! impl Record for Pet {
//!     const TABLE: &'static str = "pets";
//!     fn record_id(&self) -> String { self.id.to_string() }
//! }
//! const PETS: Table<Pet> = Table::new();
//!
//! # tokio::runtime::Runtime::new().unwrap().block_on(async {
//! let store = SqliteStore::memory(RealEnv::shared())?;
//! let pet = Pet { id: 1, name: "Rex".into() };
//! // The name is taken and the record made, or neither.
//! let txn = TxnBuilder::new().claim_name("pets", "default", &pet.name, pet.id).create(&PETS, &pet).build()?;
//! let revision = store.txn(txn).await?.committed().expect("nobody had the name");
//!
//! // Read, change, write: refused if somebody else was quicker.
//! let (stored, _) = PETS.get(&store, 1).await?;
//! let mut stored = stored.expect("it was created");
//! stored.value.name = "Max".into();
//! let rename = TxnBuilder::new()
//!     .release_name("pets", "default", "Rex", 1)
//!     .claim_name("pets", "default", "Max", 1)
//!     .update(&PETS, &stored);
//! assert!(store.txn(rename.clone().build()?).await?.committed().is_some());
//! assert!(matches!(store.txn(rename.build()?).await?, TxnOutcome::Refused { .. }));
//!
//! // Follow from the first change on.
//! use futures::StreamExt;
//! let mut watch = store.watch(ROOT, revision).await?;
//! let Some(Ok(WatchItem::Batch(batch))) = watch.next().await else { panic!() };
//! assert_eq!((batch.revision, batch.events.len()), (revision, 2));
//! # Ok::<(), StoreError>(()) }).unwrap();
//! ```

mod builder;
pub mod contract;
mod error;
mod etcd;
mod fault;
pub mod migrations;
pub mod records;
mod requests;
mod sqlite;
mod store;
mod table;
mod types;
mod unknown;

pub use builder::TxnBuilder;
pub use error::{Result, StoreError};
pub use etcd::{EtcdOptions, EtcdStore};
pub use fault::{Calls, Fault, FaultRates, FaultStore};
pub use requests::{REQUEST_KEPT, Requests, Resolution, Resolved, request_key};
pub use sqlite::{SqliteOptions, SqliteStore};
pub use store::Store;
pub use table::{ROOT, Record, Stored, Table, index_key, index_prefix, key_part, list_prefix};
pub use types::*;
