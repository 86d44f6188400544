//! The contract of [`Store`]: one suite that every implementation passes, in memory, on a file, over etcd, and through
//! wrappers. The cases run one after the other on one store, each under a prefix of its own; nobody else may write to
//! the store meanwhile.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use karst_env::{EnvExt, SharedEnv};

use crate::error::StoreError;
use crate::store::Store;
use crate::table::list_prefix;
use crate::types::*;

mod following;

use following::*;

/// Bound of each wait. Nothing here waits for a time, only for conditions.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a case works with.
#[derive(Clone)]
pub struct Context {
    /// The store.
    pub store: Arc<dyn Store>,
    /// The environment that it was made with.
    pub env: SharedEnv,
    /// Begins all keys of the case.
    pub prefix: String,
}

/// A case: its name, and what it does. It panics when the store breaks the contract.
pub type Case = (&'static str, fn(Context) -> BoxFuture<'static, ()>);

macro_rules! cases {
    ($($name:ident),+ $(,)?) => { &[$((stringify!($name), |context| $name(context).boxed())),+] };
}

/// All cases.
pub const CASES: &[Case] = cases![
    puts_count_versions_and_revisions,
    only_changes_make_revisions,
    compares_hold_as_in_etcd,
    a_refused_transaction_does_the_other_branch,
    operations_see_those_before_them,
    limits_are_etcds,
    ranges_are_ordered_and_cut,
    values_are_bytes_and_keys_are_text,
    old_revisions_can_be_read,
    pages_are_of_one_revision,
    watches_deliver_each_revision_once,
    watches_start_in_the_future_too,
    slow_watchers_miss_nothing,
    large_changes_reach_watchers,
    compacted_history_is_refused,
    revoked_leases_take_their_keys,
    leases_end_by_themselves,
    concurrent_increments_lose_nothing,
    marked_transactions_are_resolved,
    status_tells_the_revision,
];

/// Runs all cases.
pub async fn run(store: Arc<dyn Store>, env: SharedEnv) {
    for (name, case) in CASES {
        eprintln!("contract: {name}");
        let prefix = format!("/karst/v1/contract/{}/{name}/", env.uuid());
        case(Context { store: store.clone(), env: env.clone(), prefix }).await;
    }
}

impl Context {
    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    async fn within<T: Send>(&self, what: &str, future: impl Future<Output = T> + Send) -> T {
        match self.env.timeout(PATIENCE, future).await {
            Ok(result) => result,
            Err(_) => panic!("{what}: nothing within {PATIENCE:?}"),
        }
    }

    async fn commit(&self, ops: Vec<Op>) -> Revision {
        let txn = Txn { success: ops, ..Txn::default() };
        self.store.txn(txn).await.unwrap().committed().expect("no condition, so it commits")
    }

    async fn put(&self, name: &str, value: &'static str) -> Revision {
        self.commit(vec![Op::put(self.key(name), value)]).await
    }

    async fn get(&self, name: &str) -> Option<KeyValue> {
        self.store.get(&self.key(name)).await.unwrap().kv
    }

    async fn revision(&self) -> Revision {
        self.store.get("/contract-nothing").await.unwrap().revision
    }

    async fn watch(&self, from: Revision) -> Following {
        let stream = self.store.watch(&self.prefix, from).await.unwrap();
        Following { context: self.clone(), stream, seen: from - 1 }
    }
}

/// A watch whose promises are checked at each step.
struct Following {
    context: Context,
    stream: WatchStream,
    seen: Revision,
}

impl Following {
    async fn item(&mut self) -> Result<WatchItem, StoreError> {
        let next = self.stream.next();
        self.context.within("a watch", next).await.expect("a watch ends only with an error")
    }

    /// The next changes; skips progress, which may come at any time but never early.
    async fn batch(&mut self) -> WatchBatch {
        loop {
            match self.item().await.unwrap() {
                WatchItem::Progress(revision) => self.seen = self.seen.max(revision),
                WatchItem::Batch(batch) => {
                    assert!(batch.revision > self.seen, "{batch:?} after {}", self.seen);
                    assert!(!batch.events.is_empty());
                    for event in &batch.events {
                        assert!(event.key().starts_with(&self.context.prefix), "{event:?}");
                        if let Change::Put(kv) = &event.change {
                            assert_eq!(kv.mod_revision, batch.revision);
                        }
                    }
                    self.seen = batch.revision;
                    return batch;
                }
            }
        }
    }
}

/// `+name=value` or `-name`, with the previous revision.
fn brief(batch: &WatchBatch, prefix: &str) -> Vec<(String, Option<Revision>)> {
    let name = |key: &str| key.strip_prefix(prefix).unwrap().to_owned();
    batch
        .events
        .iter()
        .map(|event| {
            let text = match &event.change {
                Change::Put(kv) => format!("+{}={}", name(&kv.key), String::from_utf8_lossy(&kv.value)),
                Change::Delete { key } => format!("-{}", name(key)),
            };
            (text, event.prev_mod_revision)
        })
        .collect()
}

async fn puts_count_versions_and_revisions(context: Context) {
    assert_eq!(context.get("k").await, None);
    let first = context.put("k", "a").await;
    let expected = KeyValue {
        key: context.key("k"),
        value: "a".into(),
        create_revision: first,
        mod_revision: first,
        version: 1,
        lease: None,
    };
    assert_eq!(context.get("k").await, Some(expected.clone()));
    let second = context.put("k", "b").await;
    assert_eq!(second, first + 1);
    let changed = KeyValue { value: "b".into(), mod_revision: second, version: 2, ..expected.clone() };
    let read = context.store.get(&context.key("k")).await.unwrap();
    assert_eq!(read, GetResponse { kv: Some(changed), revision: second });

    let deleted = context.commit(vec![Op::delete(context.key("k"))]).await;
    assert_eq!((context.get("k").await, deleted), (None, second + 1));
    let again = context.put("k", "a").await;
    let reborn = KeyValue { create_revision: again, mod_revision: again, ..expected };
    assert_eq!(context.get("k").await, Some(reborn));
}

async fn only_changes_make_revisions(context: Context) {
    let start = context.put("k", "a").await;
    // Several keys are one revision.
    let both = context.commit(vec![Op::put(context.key("x"), "1"), Op::put(context.key("y"), "2")]).await;
    assert_eq!(both, start + 1);
    for name in ["x", "y"] {
        assert_eq!(context.get(name).await.unwrap().mod_revision, both);
    }
    let nothing = [
        vec![],
        vec![Op::get(context.key("k"))],
        vec![Op::delete(context.key("missing"))],
        vec![Op::delete_prefix(context.key("missing/"))],
    ];
    for ops in nothing {
        assert_eq!(context.commit(ops).await, both);
    }
    let refused = Txn {
        compares: vec![Compare::absent(context.key("k"))],
        success: vec![Op::put(context.key("k"), "no")],
        failure: vec![],
    };
    assert_eq!(
        context.store.txn(refused).await.unwrap(),
        TxnOutcome::Refused { revision: both, responses: vec![] }
    );
    assert_eq!(context.revision().await, both);
    // Putting the same value again is a change.
    assert_eq!(context.put("k", "a").await, both + 1);
}

async fn compares_hold_as_in_etcd(context: Context) {
    let created = context.put("k", "m").await;
    let changed = context.put("k", "m").await;
    // For each target: what is less than, equal to, and greater than the key's.
    let targets = |key: &str| -> Vec<(String, [Target; 3])> {
        let number = |n: u64, make: fn(u64) -> Target| [make(n - 1), make(n), make(n + 1)];
        vec![
            (
                key.to_owned(),
                [Target::Value("l".into()), Target::Value("m".into()), Target::Value("n".into())],
            ),
            (key.to_owned(), number(2, Target::Version)),
            (key.to_owned(), number(created, Target::CreateRevision)),
            (key.to_owned(), number(changed, Target::ModRevision)),
        ]
    };
    let holds = |cmp: Cmp, place: usize| match cmp {
        Cmp::Equal => place == 1,
        Cmp::NotEqual => place != 1,
        Cmp::Less => place == 2,
        Cmp::Greater => place == 0,
    };
    let check = |compare: Compare| {
        let context = context.clone();
        async move {
            let outcome = context.store.txn(Txn { compares: vec![compare], ..Txn::default() }).await.unwrap();
            matches!(outcome, TxnOutcome::Committed { .. })
        }
    };
    for (key, targets) in targets(&context.key("k")) {
        for (place, target) in targets.into_iter().enumerate() {
            for cmp in [Cmp::Equal, Cmp::NotEqual, Cmp::Less, Cmp::Greater] {
                let compare = Compare { key: key.clone(), cmp, target: target.clone() };
                assert_eq!(check(compare.clone()).await, holds(cmp, place), "{compare:?}");
            }
        }
    }
    // A key that does not exist: its numbers are 0, its value compares with nothing.
    let missing = context.key("missing");
    for cmp in [Cmp::Equal, Cmp::NotEqual, Cmp::Less, Cmp::Greater] {
        for make in [Target::Version, Target::CreateRevision, Target::ModRevision] {
            for number in [0, 1] {
                let compare = Compare { key: missing.clone(), cmp, target: make(number) };
                assert_eq!(check(compare.clone()).await, cmp.holds(&0, &number), "{compare:?}");
            }
        }
        let compare = Compare { key: missing.clone(), cmp, target: Target::Value(Bytes::new()) };
        assert!(!check(compare).await, "a missing key has no value");
    }
}

async fn a_refused_transaction_does_the_other_branch(context: Context) {
    context.put("k", "a").await;
    // All compares have to hold.
    let txn = Txn {
        compares: vec![Compare::present(context.key("k")), Compare::present(context.key("missing"))],
        success: vec![Op::put(context.key("k"), "yes")],
        failure: vec![Op::get(context.key("k")), Op::put(context.key("log"), "refused")],
    };
    let TxnOutcome::Refused { revision, responses } = context.store.txn(txn).await.unwrap() else {
        panic!("one of two does not hold");
    };
    let [OpResponse::Got(Some(kv)), OpResponse::Put] = responses.as_slice() else { panic!("{responses:?}") };
    assert_eq!(kv.value, "a");
    assert_eq!(context.get("log").await.unwrap().mod_revision, revision);
}

async fn operations_see_those_before_them(context: Context) {
    context.commit(vec![Op::put(context.key("d/1"), ""), Op::put(context.key("d/2"), "")]).await;
    let ops = vec![
        Op::get(context.key("new")),
        Op::put(context.key("new"), "n"),
        Op::get(context.key("new")),
        Op::delete(context.key("d/1")),
        Op::delete_prefix(context.key("d/")),
        Op::delete(context.key("d/2")),
        Op::get(context.key("d/2")),
    ];
    let outcome = context.store.txn(Txn { success: ops, ..Txn::default() }).await.unwrap();
    let TxnOutcome::Committed { revision, responses } = outcome else { panic!() };
    let new = context.get("new").await;
    assert_eq!(new.as_ref().unwrap().mod_revision, revision);
    let expected = vec![
        OpResponse::Got(None),
        OpResponse::Put,
        OpResponse::Got(new),
        OpResponse::Deleted(1),
        OpResponse::Deleted(1),
        OpResponse::Deleted(0),
        OpResponse::Got(None),
    ];
    assert_eq!(responses, expected);
}

async fn limits_are_etcds(context: Context) {
    let before = context.revision().await;
    let puts =
        |count: usize| (0..count).map(|n| Op::put(context.key(&format!("n{n}")), "")).collect::<Vec<_>>();
    let absent = |count: usize| vec![Compare::absent(context.key("missing")); count];
    let big = Bytes::from(vec![b'x'; MAX_TXN_BYTES]);
    let refused = [
        (Txn { success: puts(129), ..Txn::default() }, StoreError::TooManyOps { count: 129 }),
        (Txn { failure: puts(129), ..Txn::default() }, StoreError::TooManyOps { count: 129 }),
        (Txn { compares: absent(129), ..Txn::default() }, StoreError::TooManyOps { count: 129 }),
        (
            Txn {
                success: vec![Op::put(context.key("k"), "1"), Op::put(context.key("k"), "2")],
                ..Txn::default()
            },
            StoreError::DuplicateKey { key: context.key("k") },
        ),
        (
            Txn {
                success: vec![Op::put(context.key("k"), "1"), Op::delete_prefix(context.prefix.clone())],
                ..Txn::default()
            },
            StoreError::DuplicateKey { key: context.key("k") },
        ),
        (
            Txn {
                failure: vec![Op::delete(context.key("k")), Op::put(context.key("k"), "1")],
                ..Txn::default()
            },
            StoreError::DuplicateKey { key: context.key("k") },
        ),
        (Txn { success: vec![Op::put("", "1")], ..Txn::default() }, StoreError::EmptyKey),
    ];
    for (txn, error) in refused {
        assert_eq!(context.store.txn(txn).await, Err(error));
    }
    let too_large = Txn { success: vec![Op::put(context.key("k"), big)], ..Txn::default() };
    assert!(matches!(context.store.txn(too_large).await, Err(StoreError::TooLarge { .. })));
    assert_eq!(context.revision().await, before, "nothing was applied");

    // What is just within the limits works: so etcd's own limits are not reached before ours.
    let most = Txn { compares: absent(128), success: puts(128), failure: puts(128) };
    assert!(context.store.txn(most).await.unwrap().committed().is_some());
    let mut txn = Txn { success: vec![Op::put(context.key("k"), "")], ..Txn::default() };
    let room = MAX_TXN_BYTES - txn.estimated_bytes();
    txn.success = vec![Op::put(context.key("k"), vec![b'x'; room])];
    assert!(context.store.txn(txn).await.unwrap().committed().is_some());
    assert_eq!(context.get("k").await.unwrap().value.len(), room);
    context.commit(vec![Op::delete_prefix(context.prefix.clone())]).await;
}

async fn ranges_are_ordered_and_cut(context: Context) {
    let names = ["b", "a/2", "a/10", "a", "a/1", "a0", "a/ü"];
    context.commit(names.iter().map(|name| Op::put(context.key(name), *name)).collect()).await;
    let strip = |answer: &RangeResponse| -> Vec<String> {
        answer.kvs.iter().map(|kv| kv.key.strip_prefix(&context.prefix).unwrap().to_owned()).collect()
    };
    let all = context.store.range(RangeRequest::prefix(&context.prefix)).await.unwrap();
    assert_eq!(strip(&all), ["a", "a/1", "a/10", "a/2", "a/ü", "a0", "b"]);
    assert!(!all.more);
    assert_eq!(all.kvs[1].value, "a/1");

    let under = context.store.range(RangeRequest::prefix(context.key("a/")).limit(3)).await.unwrap();
    assert_eq!((strip(&under), under.more), (vec!["a/1".into(), "a/10".into(), "a/2".into()], true));
    let exact = context.store.range(RangeRequest::prefix(context.key("a/")).limit(4)).await.unwrap();
    assert_eq!((exact.kvs.len(), exact.more), (4, false));

    let between = RangeRequest::between(context.key("a/10"), context.key("a0")).keys_only();
    let between = context.store.range(between).await.unwrap();
    assert_eq!(strip(&between), ["a/10", "a/2", "a/ü"]);
    assert!(between.kvs.iter().all(|kv| kv.value.is_empty() && kv.mod_revision == all.revision));

    let none = context.store.range(RangeRequest::prefix(context.key("z"))).await.unwrap();
    assert_eq!((none.kvs.len(), none.more, none.revision), (0, false, all.revision));
    let everything = context.store.range(RangeRequest::prefix("").keys_only()).await.unwrap();
    assert!(everything.kvs.len() >= names.len());
}

async fn values_are_bytes_and_keys_are_text(context: Context) {
    let values: [&[u8]; 4] = [b"", b"\0", b"\xff\xfe\0x", "für".as_bytes()];
    for (number, value) in values.iter().enumerate() {
        let key = context.key(&format!("ключ {number} '\"%_\\"));
        context.commit(vec![Op::put(key.clone(), Bytes::copy_from_slice(value))]).await;
        assert_eq!(context.store.get(&key).await.unwrap().kv.unwrap().value, value);
    }
}

async fn old_revisions_can_be_read(context: Context) {
    let one = context.put("k", "1").await;
    let two = context.put("k", "2").await;
    let gone = context.commit(vec![Op::delete(context.key("k")), Op::put(context.key("other"), "o")]).await;
    let three = context.put("k", "3").await;
    let at = |revision| {
        let (context, request) = (context.clone(), RangeRequest::prefix(&context.prefix).at(revision));
        async move { context.store.range(request).await }
    };
    let values = |answer: RangeResponse| -> Vec<String> {
        answer.kvs.iter().map(|kv| String::from_utf8_lossy(&kv.value).into_owned()).collect()
    };
    let expected: [(Revision, &[&str]); 5] =
        [(one - 1, &[]), (one, &["1"]), (two, &["2"]), (gone, &["o"]), (three, &["3", "o"])];
    for (revision, expected) in expected {
        let answer = at(revision).await.unwrap();
        assert_eq!(answer.revision, three, "the revision is that of the store");
        assert_eq!(values(answer), expected);
    }
    assert_eq!(at(two).await.unwrap().kvs[0].version, 2);
    assert!(matches!(at(three + 1).await, Err(StoreError::FutureRevision { .. })));

    context.store.compact(gone).await.unwrap();
    let compacted = StoreError::Compacted { compact_revision: gone };
    match at(two).await {
        // etcd does not say up to where a read's history is gone.
        Err(StoreError::Compacted { .. }) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(values(at(gone).await.unwrap()), ["o"], "the compacted revision itself can be read");
    assert!(matches!(context.store.compact(gone).await, Err(StoreError::Compacted { .. })), "{compacted:?}");
    assert!(matches!(context.store.compact(three + 100).await, Err(StoreError::FutureRevision { .. })));
    assert_eq!(values(at(three).await.unwrap()), ["3", "o"]);
}

async fn pages_are_of_one_revision(context: Context) {
    for block in 0..11 {
        let ops = (0..100).map(|n| Op::put(context.key(&format!("{block:02}-{n:02}")), "x")).collect();
        context.commit(ops).await;
    }
    let (all, revision) = list_prefix(context.store.as_ref(), &context.prefix).await.unwrap();
    assert_eq!((all.len(), revision), (1100, context.revision().await));
    assert!(all.is_sorted_by(|a, b| a.key < b.key));

    // A page read later, after changes on both sides of it.
    let first = context.store.range(RangeRequest::prefix(&context.prefix).limit(600)).await.unwrap();
    context.commit(vec![Op::delete(context.key("10-99")), Op::put(context.key("zz"), "new")]).await;
    let last = format!("{}\0", first.kvs.last().unwrap().key);
    let rest = RangeRequest::between(last, context.key("~")).at(first.revision);
    let rest = context.store.range(rest).await.unwrap();
    assert_eq!(first.kvs.len() + rest.kvs.len(), 1100);
    assert_eq!(rest.kvs.last().unwrap().key, context.key("10-99"));
    let gone = context.commit(vec![Op::delete_prefix(context.prefix.clone())]).await;
    assert_eq!(gone, first.revision + 2);
}
