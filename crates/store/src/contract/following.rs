//! The cases about what goes on in time: watches, compaction, leases, concurrency, marked transactions.

use std::time::Duration;

use futures::StreamExt;
use karst_env::EnvExt;

use super::{Context, PATIENCE, brief};
use crate::error::StoreError;
use crate::types::*;
use crate::{Requests, Resolution, Resolved, TxnBuilder, request_key};

pub(super) async fn watches_deliver_each_revision_once(context: Context) {
    let one = context.put("a", "1").await;
    let two = context
        .commit(vec![
            Op::put(context.key("b"), "1"),
            Op::put(context.key("a"), "2"),
            Op::get(context.key("a")),
        ])
        .await;
    context.commit(vec![Op::put("/contract-elsewhere", "x")]).await;
    let three = context.commit(vec![Op::delete_prefix(context.prefix.clone())]).await;

    let text = |batch: &WatchBatch| brief(batch, &context.prefix);
    let mut watch = context.watch(one).await;
    let batch = watch.batch().await;
    assert_eq!((batch.revision, text(&batch)), (one, vec![("+a=1".into(), None)]));
    let batch = watch.batch().await;
    assert_eq!(
        (batch.revision, text(&batch)),
        (two, vec![("+b=1".into(), None), ("+a=2".into(), Some(one))])
    );
    let batch = watch.batch().await;
    assert_eq!(
        (batch.revision, text(&batch)),
        (three, vec![("-a".into(), Some(two)), ("-b".into(), Some(two))])
    );

    // From here on live, with a second watcher that starts in the middle.
    let mut later = context.watch(two + 1).await;
    assert_eq!(later.batch().await.revision, three);
    let four = context.put("c", "1").await;
    context.commit(vec![Op::delete("/contract-elsewhere")]).await;
    let five = context.commit(vec![Op::delete(context.key("c"))]).await;
    for watch in [&mut watch, &mut later] {
        let batch = watch.batch().await;
        assert_eq!((batch.revision, text(&batch)), (four, vec![("+c=1".into(), None)]));
        let batch = watch.batch().await;
        assert_eq!((batch.revision, text(&batch)), (five, vec![("-c".into(), Some(four))]));
    }
    let zero = context.store.watch(&context.prefix, 0).await;
    assert!(matches!(zero.err(), Some(StoreError::Invalid(_))));
}

pub(super) async fn watches_start_in_the_future_too(context: Context) {
    let now = context.revision().await;
    let mut watch = context.watch(now + 3).await;
    context.put("a", "1").await;
    context.put("b", "1").await;
    let third = context.put("c", "1").await;
    assert_eq!(third, now + 3);
    assert_eq!(brief(&watch.batch().await, &context.prefix), [("+c=1".into(), None)]);
}

pub(super) async fn slow_watchers_miss_nothing(context: Context) {
    let start = context.put("k", "x").await;
    let mut watch = context.watch(start).await;
    assert_eq!(watch.batch().await.revision, start);
    // More than any implementation buffers.
    for _ in 0..400 {
        context.put("k", "x").await;
    }
    for number in 1..=400 {
        assert_eq!(watch.batch().await.revision, start + number);
    }
}

pub(super) async fn large_changes_reach_watchers(context: Context) {
    let mut watch = context.watch(context.revision().await + 1).await;
    for number in 0..3 {
        let value = vec![b'a' + number; 1 << 20];
        context.commit(vec![Op::put(context.key("big"), value)]).await;
    }
    for number in 0..3 {
        let batch = watch.batch().await;
        let Change::Put(kv) = &batch.events[0].change else { panic!() };
        assert_eq!((kv.value.len(), kv.value[7]), (1 << 20, b'a' + number));
    }
}

pub(super) async fn compacted_history_is_refused(context: Context) {
    let one = context.put("k", "1").await;
    let two = context.put("k", "2").await;
    let three = context.commit(vec![Op::delete(context.key("k"))]).await;
    let four = context.put("k", "4").await;
    let mut early = context.watch(one).await;
    context.store.compact(three).await.unwrap();
    for from in [one, two, three] {
        let mut watch = context.watch(from).await;
        let error = watch.item().await.unwrap_err();
        assert_eq!(error, StoreError::Compacted { compact_revision: three }, "from {from}");
        assert!(watch.stream.next().await.is_none(), "a watch ends after its error");
    }
    let mut watch = context.watch(three + 1).await;
    assert_eq!(watch.batch().await.revision, four);
    // A watch from before the compaction either got everything or hears that it did not.
    let mut expected = one;
    loop {
        match early.item().await {
            Ok(WatchItem::Progress(_)) => {}
            Ok(WatchItem::Batch(batch)) => {
                assert_eq!(batch.revision, expected);
                expected += 1;
                if batch.revision == four {
                    break;
                }
            }
            Err(error) => {
                assert_eq!(error, StoreError::Compacted { compact_revision: three });
                break;
            }
        }
    }
}

pub(super) async fn revoked_leases_take_their_keys(context: Context) {
    let lease = context.store.lease_grant(Duration::from_secs(600)).await.unwrap();
    let leased = |name: &str| Op::Put { key: context.key(name), value: "x".into(), lease: Some(lease) };
    let put =
        context.commit(vec![leased("a"), leased("b"), leased("c"), Op::put(context.key("d"), "x")]).await;
    assert_eq!(context.get("a").await.unwrap().lease, Some(lease));
    // A put without the lease frees the key.
    context.put("b", "free").await;
    assert!(context.store.lease_keepalive(lease).await.unwrap() >= Duration::from_secs(600));
    let before = context.revision().await;
    context.store.lease_revoke(lease).await.unwrap();
    let mut watch = context.watch(before + 1).await;
    let batch = watch.batch().await;
    assert_eq!(brief(&batch, &context.prefix), [("-a".into(), Some(put)), ("-c".into(), Some(put))]);
    assert_eq!(batch.revision, before + 1, "all of them in one revision");
    let names = ["a", "b", "c", "d"];
    let mut left = Vec::new();
    for name in names {
        left.extend(context.get(name).await.map(|_| name));
    }
    assert_eq!(left, ["b", "d"]);

    let txn = Txn { success: vec![leased("e")], ..Txn::default() };
    assert_eq!(context.store.txn(txn).await, Err(StoreError::LeaseNotFound));
    assert_eq!(context.store.lease_keepalive(lease).await, Err(StoreError::LeaseNotFound));
    assert_eq!(context.store.lease_revoke(lease).await, Err(StoreError::LeaseNotFound));
    assert_eq!(context.get("e").await, None);
    assert!(matches!(context.store.lease_grant(Duration::ZERO).await, Err(StoreError::Invalid(_))));
}

pub(super) async fn leases_end_by_themselves(context: Context) {
    // Long enough for the commit, however slow the disk is.
    let lease = context.store.lease_grant(Duration::from_secs(5)).await.unwrap();
    let op = Op::Put { key: context.key("a"), value: "x".into(), lease: Some(lease) };
    let put = context.commit(vec![op]).await;
    let mut watch = context.watch(put + 1).await;
    let batch = watch.batch().await;
    assert_eq!(brief(&batch, &context.prefix), [("-a".into(), Some(put))]);
    assert_eq!(context.get("a").await, None);
    assert_eq!(context.store.lease_keepalive(lease).await, Err(StoreError::LeaseNotFound));
}

pub(super) async fn concurrent_increments_lose_nothing(context: Context) {
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let mine = context.clone();
            context.env.spawn_task("increments", async move {
                let mut done = 0;
                while done < 10 {
                    let kv = mine.get("count").await;
                    let value =
                        kv.as_ref().map_or(0, |kv| String::from_utf8_lossy(&kv.value).parse().unwrap());
                    let old = kv.as_ref().map_or(0, |kv| kv.mod_revision);
                    let next: u64 = value + 1;
                    let txn = TxnBuilder::new()
                        .expect_mod(mine.key("count"), old)
                        .put_raw(mine.key("count"), next.to_string());
                    match mine.store.txn(txn.build().unwrap()).await.unwrap() {
                        TxnOutcome::Committed { .. } => done += 1,
                        TxnOutcome::Refused { revision, .. } => assert!(revision > old),
                        TxnOutcome::Unknown => panic!("nothing is broken here"),
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        context.within("eight tasks", task.join()).await.unwrap();
    }
    let count = context.get("count").await.unwrap();
    assert_eq!((count.value.as_ref(), count.version), (b"80".as_ref(), 80));
}

pub(super) async fn marked_transactions_are_resolved(context: Context) {
    let requests = Requests::new(context.store.clone(), context.env.clone());
    let builder = TxnBuilder::new()
        .expect_absent(context.key("k"))
        .put_raw(context.key("k"), "1")
        .else_get(context.key("k"));
    let Resolved::Committed { revision, responses } = requests.txn(builder.clone(), PATIENCE).await.unwrap()
    else {
        panic!("the key was free");
    };
    assert_eq!(responses, Some(vec![OpResponse::Put]));
    assert_eq!(context.get("k").await.unwrap().mod_revision, revision);
    let Resolved::Refused { responses, .. } = requests.txn(builder, PATIENCE).await.unwrap() else {
        panic!("the key was taken");
    };
    assert!(matches!(&responses[..], [OpResponse::Got(Some(kv))] if kv.value == "1"));

    // A transaction that was applied, asked for later; and one that was not, and then cannot be any more.
    let lease = context.store.lease_grant(Duration::from_secs(60)).await.unwrap();
    let marked = |id, name: &str| {
        TxnBuilder::new().put_raw(context.key(name), "x").request_id(id, lease).build().unwrap()
    };
    let (applied, lost) = (context.env.uuid(), context.env.uuid());
    let revision = context.store.txn(marked(applied, "applied")).await.unwrap().committed().unwrap();
    assert_eq!(requests.resolve_unknown(applied).await, Ok(Resolution::Applied(revision)));
    assert_eq!(requests.resolve_unknown(lost).await, Ok(Resolution::NotApplied));
    assert_eq!(requests.resolve_unknown(lost).await, Ok(Resolution::NotApplied));
    let late = context.store.txn(marked(lost, "late")).await.unwrap();
    assert!(matches!(late, TxnOutcome::Refused { .. }), "it came after it was declared void");
    assert_eq!(context.get("late").await, None);
    assert!(context.store.get(&request_key(lost)).await.unwrap().kv.unwrap().lease.is_some());
    context.store.lease_revoke(lease).await.unwrap();
    assert_eq!(context.store.get(&request_key(applied)).await.unwrap().kv, None, "marks go with their lease");
}

pub(super) async fn status_tells_the_revision(context: Context) {
    let before = context.store.counters();
    let revision = context.put("k", "1").await;
    let status = context.store.status().await.unwrap();
    assert_eq!(status.revision, revision);
    assert!(status.compact_revision < revision && status.size_bytes > 0, "{status:?}");
    assert!(!status.version.is_empty());
    let after = context.store.counters();
    assert_eq!(after.transactions, before.transactions + 1);
    assert_eq!(context.store.sync_count(), before.durable_commits + 1);
}
