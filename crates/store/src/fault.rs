//! A store that misbehaves on demand: by script, by chance out of the environment's seed, or because its link is cut.

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use karst_env::SharedEnv;
use tokio::sync::watch;

use crate::error::{Result, StoreError};
use crate::store::Store;
use crate::types::*;

/// What goes wrong with one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It is refused before anything happens: an error.
    FailBefore,
    /// It never arrives. A transaction is [`TxnOutcome::Unknown`] and not applied, anything else an error.
    LoseRequest,
    /// It is done and the answer never arrives. A transaction is [`TxnOutcome::Unknown`] **and applied**, anything
    /// else an error.
    LoseAnswer,
    /// It arrives later.
    Delay(Duration),
}

/// Which calls a scripted fault is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Calls {
    /// Transactions.
    Txn,
    /// Reads, also status.
    Read,
    /// Opening a watch.
    Watch,
    /// Leases and compaction.
    Other,
    /// Each call.
    Any,
}

/// Chances of each fault for each call, between 0 and 1.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct FaultRates {
    /// [`Fault::FailBefore`].
    pub fail_before: f64,
    /// [`Fault::LoseRequest`].
    pub lose_request: f64,
    /// [`Fault::LoseAnswer`].
    pub lose_answer: f64,
    /// [`Fault::Delay`], of at most `longest_delay`.
    pub delay: f64,
    /// See `delay`.
    pub longest_delay: Duration,
    /// A watch breaks instead of delivering its next item.
    pub drop_watch: f64,
}

struct Planned {
    calls: Calls,
    /// Matching calls to let pass first.
    skip: usize,
    fault: Fault,
}

#[derive(Default)]
struct State {
    planned: Vec<Planned>,
    rates: FaultRates,
    cut: bool,
}

/// Wraps a store. Without faults it behaves exactly like the store beneath.
pub struct FaultStore {
    inner: Arc<dyn Store>,
    env: SharedEnv,
    link: Option<(String, String)>,
    state: Arc<Mutex<State>>,
    /// Changes when all running watches are to break.
    breaks: watch::Sender<u64>,
    injected: Arc<AtomicU64>,
}

impl FaultStore {
    /// A wrapper without faults yet.
    pub fn new(inner: Arc<dyn Store>, env: SharedEnv) -> FaultStore {
        FaultStore {
            inner,
            env,
            link: None,
            state: Arc::default(),
            breaks: watch::channel(0).0,
            injected: Arc::default(),
        }
    }

    /// The same, used from the endpoint `from` over the environment's link to the endpoint `to`: when that is cut on
    /// the way there the request is lost, when it is cut on the way back the answer is.
    pub fn over_link(inner: Arc<dyn Store>, env: SharedEnv, from: &str, to: &str) -> FaultStore {
        let link = Some((from.to_owned(), to.to_owned()));
        FaultStore { link, ..FaultStore::new(inner, env) }
    }

    /// Lets `skip` of `calls` pass, then injects `fault` once. Several may be planned; each call counts for all.
    pub fn plan(&self, calls: Calls, skip: usize, fault: Fault) {
        self.state.lock().unwrap().planned.push(Planned { calls, skip, fault });
    }

    /// Faults by chance from now on, on top of what is planned.
    pub fn set_rates(&self, rates: FaultRates) {
        self.state.lock().unwrap().rates = rates;
    }

    /// Cuts the store off, and back on. While it is cut off, running watches break, reads fail, and transactions are
    /// lost on the way there or on the way back, by chance.
    pub fn set_cut(&self, cut: bool) {
        self.state.lock().unwrap().cut = cut;
        if cut {
            self.drop_watches();
        }
    }

    /// Breaks all running watches: they end with [`StoreError::Unavailable`].
    pub fn drop_watches(&self) {
        self.breaks.send_modify(|generation| *generation += 1);
    }

    /// Faults injected so far: a test shows with it that its faults landed.
    pub fn injected(&self) -> u64 {
        self.injected.load(Ordering::Relaxed)
    }

    /// Planned faults that have not happened yet.
    pub fn still_planned(&self) -> usize {
        self.state.lock().unwrap().planned.len()
    }

    fn chance(&self) -> f64 {
        (self.env.random_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn choose(&self, calls: Calls) -> Option<Fault> {
        let (planned, rates, cut) = {
            let mut state = self.state.lock().unwrap();
            let mut due = None;
            let mut place = 0;
            while place < state.planned.len() {
                let plan = &mut state.planned[place];
                if plan.calls == calls || plan.calls == Calls::Any {
                    if plan.skip == 0 && due.is_none() {
                        due = Some(state.planned.remove(place).fault);
                        continue;
                    }
                    plan.skip = plan.skip.saturating_sub(1);
                }
                place += 1;
            }
            (due, state.rates, state.cut)
        };
        if planned.is_some() {
            return planned;
        }
        if cut {
            return Some(if self.chance() < 0.5 { Fault::LoseRequest } else { Fault::LoseAnswer });
        }
        if rates == FaultRates::default() {
            return None; // draws nothing, so that a wrapper without faults does not change a seeded run
        }
        let longest = rates.longest_delay.as_secs_f64();
        let delay = Fault::Delay(Duration::from_secs_f64(longest * self.chance()));
        let mut draw = self.chance();
        let table = [
            (rates.fail_before, Fault::FailBefore),
            (rates.lose_request, Fault::LoseRequest),
            (rates.lose_answer, Fault::LoseAnswer),
            (rates.delay, delay),
        ];
        for (rate, fault) in table {
            if draw < rate {
                return Some(fault);
            }
            draw -= rate;
        }
        None
    }

    /// The message's way to the store (`back`: from it).
    async fn travel(&self, back: bool) -> bool {
        let Some((here, there)) = &self.link else {
            return true;
        };
        let (from, to) = if back { (there, here) } else { (here, there) };
        let passed = self.env.link(from, to).await.is_ok();
        if !passed {
            self.injected.fetch_add(1, Ordering::Relaxed);
        }
        passed
    }

    async fn fault(&self, calls: Calls) -> Option<Fault> {
        let fault = self.choose(calls)?;
        self.injected.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(?calls, ?fault, "injected a fault");
        if let Fault::Delay(delay) = fault {
            self.env.sleep(delay).await;
            return None;
        }
        Some(fault)
    }

    /// A call that is not a transaction.
    async fn call<T: Send>(&self, calls: Calls, body: impl Future<Output = Result<T>> + Send) -> Result<T> {
        let fault = self.fault(calls).await;
        if matches!(fault, Some(Fault::FailBefore | Fault::LoseRequest)) || !self.travel(false).await {
            return Err(lost());
        }
        let result = body.await;
        if fault == Some(Fault::LoseAnswer) || !self.travel(true).await {
            return Err(lost());
        }
        result
    }
}

fn lost() -> StoreError {
    StoreError::Unavailable("injected fault".into())
}

#[async_trait]
impl Store for FaultStore {
    async fn get(&self, key: &str) -> Result<GetResponse> {
        self.call(Calls::Read, self.inner.get(key)).await
    }

    async fn range(&self, request: RangeRequest) -> Result<RangeResponse> {
        self.call(Calls::Read, self.inner.range(request)).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        let fault = self.fault(Calls::Txn).await;
        if fault == Some(Fault::FailBefore) {
            return Err(lost());
        }
        if fault == Some(Fault::LoseRequest) || !self.travel(false).await {
            return Ok(TxnOutcome::Unknown);
        }
        let outcome = self.inner.txn(txn).await;
        if fault == Some(Fault::LoseAnswer) || !self.travel(true).await {
            return Ok(TxnOutcome::Unknown);
        }
        outcome
    }

    async fn watch(&self, prefix: &str, from_revision: Revision) -> Result<WatchStream> {
        let stream = self.call(Calls::Watch, self.inner.watch(prefix, from_revision)).await?;
        let mut breaks = self.breaks.subscribe();
        let (state, env, injected) = (self.state.clone(), self.env.clone(), self.injected.clone());
        let link = self.link.clone();
        let broken = async move {
            // The wrapper itself may be dropped before its watches: then nothing breaks them any more.
            if breaks.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let broken = Box::pin(broken);
        let following = futures::stream::unfold(Some((stream, broken)), move |following| {
            let (state, env, injected, link) = (state.clone(), env.clone(), injected.clone(), link.clone());
            async move {
                let (mut stream, mut broken) = following?;
                let next = futures::future::select(stream.next(), &mut broken).await;
                let item = match next {
                    futures::future::Either::Left((item, _)) => item,
                    futures::future::Either::Right(_) => {
                        injected.fetch_add(1, Ordering::Relaxed);
                        return Some((Err(lost()), None));
                    }
                };
                let item = item?;
                let rate = state.lock().unwrap().rates.drop_watch;
                let unlucky = rate > 0.0 && (env.random_u64() >> 11) as f64 / (1u64 << 53) as f64 <= rate;
                let arrived = match &link {
                    Some((here, there)) => env.link(there, here).await.is_ok(),
                    None => true,
                };
                if unlucky || !arrived {
                    injected.fetch_add(1, Ordering::Relaxed);
                    return Some((Err(lost()), None));
                }
                let going_on = item.is_ok().then_some((stream, broken));
                Some((item, going_on))
            }
        });
        Ok(following.boxed())
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId> {
        self.call(Calls::Other, self.inner.lease_grant(ttl)).await
    }

    async fn lease_keepalive(&self, lease: LeaseId) -> Result<Duration> {
        self.call(Calls::Other, self.inner.lease_keepalive(lease)).await
    }

    async fn lease_revoke(&self, lease: LeaseId) -> Result<()> {
        self.call(Calls::Other, self.inner.lease_revoke(lease)).await
    }

    async fn compact(&self, revision: Revision) -> Result<()> {
        self.call(Calls::Other, self.inner.compact(revision)).await
    }

    async fn status(&self) -> Result<Status> {
        self.call(Calls::Read, self.inner.status()).await
    }

    fn counters(&self) -> Counters {
        self.inner.counters()
    }
}
