//! The store of several hosts: etcd, version 3.4 or later.
//!
//! What differs from etcd's own client: sizes are checked before sending, so that the limits are the same as with
//! SQLite; an error says for certain that nothing was applied, and everything else is [`TxnOutcome::Unknown`].

use std::collections::VecDeque;
use std::future::Future;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use etcd_client as etcd;
use futures::StreamExt;
use karst_env::{EnvExt, SharedEnv};

use crate::error::{Result, StoreError};
use crate::store::Store;
use crate::types::*;

/// A watcher that starts far back gets up to 1000 revisions in one message.
const MESSAGE_BYTES: usize = i32::MAX as usize;

/// Time for one request. A transaction that takes longer is of unknown outcome.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection to a server of an etcd cluster. Reconnects by itself, and to another server when that one does not answer.
pub struct EtcdStore {
    endpoints: Vec<String>,
    connect: etcd::ConnectOptions,
    /// Who is asked.
    client: Mutex<etcd::Client>,
    /// The last request had no answer: look whether another server gives one.
    suspect: AtomicBool,
    env: SharedEnv,
    /// The last compaction that we know of; etcd does not tell otherwise.
    compact_revision: AtomicU64,
    commits: AtomicU64,
    transactions: AtomicU64,
}

impl std::fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdStore").finish_non_exhaustive()
    }
}

/// gRPC's codes with which etcd says no, as opposed to "I do not know". By number, which is part of the protocol.
const REFUSALS: &[i32] = &[
    3,  // invalid argument
    5,  // not found
    6,  // already exists
    7,  // permission denied
    8,  // resource exhausted
    9,  // failed precondition
    11, // out of range
    12, // unimplemented
    16, // unauthenticated
];

/// What an error of the client means.
enum Failure {
    /// The server said no.
    Refused(StoreError),
    /// Anything may have happened.
    Unknown(String),
}

impl From<etcd::Error> for Failure {
    fn from(error: etcd::Error) -> Failure {
        let etcd::Error::GRpcStatus(status) = &error else {
            return Failure::Unknown(error.to_string());
        };
        let text = status.message();
        // Only the server's own words are a refusal: the same codes also come from our side of the connection, for
        // instance when an answer cannot be decoded.
        let ours = text.starts_with("etcdserver: ") || text.starts_with("auth: ");
        if !ours || !REFUSALS.contains(&(status.code() as i32)) {
            return Failure::Unknown(format!("{}: {text}", status.code()));
        }
        Failure::Refused(if text.contains("has been compacted") {
            StoreError::Compacted { compact_revision: 0 }
        } else if text.contains("future revision") {
            StoreError::FutureRevision { asked: 0, current: 0 }
        } else if text.contains("lease not found") {
            StoreError::LeaseNotFound
        } else if text.contains("duplicate key") {
            StoreError::DuplicateKey { key: "(unnamed by etcd)".into() }
        } else if text.contains("too many operations") {
            StoreError::TooManyOps { count: 0 }
        } else if text.contains("too large") {
            StoreError::TooLarge { bytes: 0 }
        } else if text.contains("space exceeded") {
            StoreError::Full(text.to_owned())
        } else {
            StoreError::Unavailable(text.to_owned())
        })
    }
}

/// For requests that change nothing, or that may be repeated.
fn failed(error: etcd::Error) -> StoreError {
    match Failure::from(error) {
        Failure::Refused(error) => error,
        Failure::Unknown(text) => StoreError::Unavailable(text),
    }
}

fn revision_of(header: Option<&etcd::ResponseHeader>) -> Revision {
    header.map_or(0, |header| header.revision() as u64)
}

fn key_value(kv: &etcd::KeyValue) -> KeyValue {
    KeyValue {
        key: String::from_utf8_lossy(kv.key()).into_owned(),
        value: Bytes::copy_from_slice(kv.value()),
        create_revision: kv.create_revision() as u64,
        mod_revision: kv.mod_revision() as u64,
        version: kv.version() as u64,
        lease: (kv.lease() != 0).then(|| LeaseId(kv.lease())),
    }
}

/// First key and range end as etcd wants them: "\0" is the least key, and as an end it means "no end".
fn wire_range(range: &KeyRange) -> (Vec<u8>, Vec<u8>) {
    let (start, end) = range.bounds();
    let start = if start.is_empty() { vec![0] } else { start };
    (start, end.unwrap_or_else(|| vec![0]))
}

fn wire_compare(compare: Compare) -> etcd::Compare {
    let op = match compare.cmp {
        Cmp::Equal => etcd::CompareOp::Equal,
        Cmp::NotEqual => etcd::CompareOp::NotEqual,
        Cmp::Less => etcd::CompareOp::Less,
        Cmp::Greater => etcd::CompareOp::Greater,
    };
    match compare.target {
        Target::Value(value) => etcd::Compare::value(compare.key, op, value.to_vec()),
        Target::Version(n) => etcd::Compare::version(compare.key, op, n as i64),
        Target::CreateRevision(n) => etcd::Compare::create_revision(compare.key, op, n as i64),
        Target::ModRevision(n) => etcd::Compare::mod_revision(compare.key, op, n as i64),
    }
}

fn wire_op(op: Op) -> etcd::TxnOp {
    match op {
        Op::Put { key, value, lease } => {
            let options = lease.map(|lease| etcd::PutOptions::new().with_lease(lease.0));
            etcd::TxnOp::put(key, value.to_vec(), options)
        }
        Op::Delete { key } => etcd::TxnOp::delete(key, None),
        Op::DeleteRange { range } => {
            let (start, end) = wire_range(&range);
            etcd::TxnOp::delete(start, Some(etcd::DeleteOptions::new().with_range(end)))
        }
        Op::Get { key } => etcd::TxnOp::get(key, None),
    }
}

/// Connects to the first of `endpoints` that answers and knows us.
async fn pick(endpoints: &[String], options: &etcd::ConnectOptions, env: &SharedEnv) -> Result<etcd::Client> {
    let mut why = StoreError::Unavailable("no endpoint of etcd is named".into());
    for endpoint in endpoints {
        let attempt = async {
            let client = etcd::Client::connect([endpoint], Some(options.clone())).await?;
            client.maintenance_client().status().await?;
            Ok::<_, etcd::Error>(client)
        };
        why = match env.timeout(CONNECT_TIMEOUT, attempt).await {
            Ok(Ok(client)) => return Ok(client),
            Ok(Err(error)) => match failed(error) {
                StoreError::Unavailable(text) => StoreError::Unavailable(format!("{endpoint}: {text}")),
                other => other,
            },
            Err(elapsed) => StoreError::Unavailable(format!("{endpoint} does not answer: {elapsed}")),
        };
    }
    Err(why)
}

/// How servers are reached and who we are to them. Shown without what is secret.
#[derive(Clone, Default)]
pub struct EtcdOptions {
    /// Certificates, in PEM, of the authorities that sign the servers'. With it, connections are TLS.
    pub ca: Option<Vec<u8>>,
    /// Our certificate and its key, in PEM, where servers ask for one.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
    /// User and password, where etcd's authentication is on. Use it with TLS.
    pub user: Option<(String, String)>,
}

impl std::fmt::Debug for EtcdOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdOptions")
            .field("tls", &self.ca.is_some())
            .field("certificate", &self.identity.is_some())
            .field("user", &self.user.as_ref().map(|(name, _)| name))
            .finish_non_exhaustive()
    }
}

impl EtcdStore {
    /// Connects to `endpoints` (`http://127.0.0.1:2379`) without TLS or authentication.
    ///
    /// # Errors
    /// As [`EtcdStore::connect_with`].
    pub async fn connect(endpoints: &[String], env: SharedEnv) -> Result<EtcdStore> {
        Self::connect_with(endpoints, &EtcdOptions::default(), env).await
    }

    /// Connects to `endpoints`, all of one cluster; whichever answers is used, and others when it goes away.
    ///
    /// # Errors
    /// Unavailable when none answers, each within 5 s, or none that is who it should be, or it does not know us.
    pub async fn connect_with(
        endpoints: &[String],
        options: &EtcdOptions,
        env: SharedEnv,
    ) -> Result<EtcdStore> {
        let mut connect = etcd::ConnectOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_keep_alive(Duration::from_secs(10), Duration::from_secs(5))
            .with_keep_alive_while_idle(true);
        if let Some(ca) = &options.ca {
            let mut tls = etcd::TlsOptions::new().ca_certificate(etcd::Certificate::from_pem(ca));
            if let Some((certificate, key)) = &options.identity {
                tls = tls.identity(etcd::Identity::from_pem(certificate, key));
            }
            connect = connect.with_tls(tls);
        }
        if let Some((name, password)) = &options.user {
            // The server forgets tokens after a while.
            connect = connect.with_user(name, password).with_auto_token_refresh(true);
        }
        let client = pick(endpoints, &connect, &env).await?;
        Ok(EtcdStore {
            endpoints: endpoints.to_vec(),
            connect,
            client: Mutex::new(client),
            suspect: AtomicBool::new(false),
            env,
            compact_revision: AtomicU64::new(0),
            commits: AtomicU64::new(0),
            transactions: AtomicU64::new(0),
        })
    }

    /// Who is to be asked now.
    async fn client(&self) -> etcd::Client {
        let now = || self.client.lock().unwrap_or_else(|e| e.into_inner()).clone();
        // One request looks, others go on with what there is.
        if self.suspect.swap(false, Ordering::Relaxed) {
            match pick(&self.endpoints, &self.connect, &self.env).await {
                Ok(found) => *self.client.lock().unwrap_or_else(|e| e.into_inner()) = found,
                Err(_) => self.suspect.store(true, Ordering::Relaxed),
            }
        }
        now()
    }

    /// A request had no answer.
    fn doubt(&self) {
        // A single server is connected to again by the client itself.
        if self.endpoints.len() > 1 {
            self.suspect.store(true, Ordering::Relaxed);
        }
    }

    /// Waits for a request that changes nothing or may be repeated.
    async fn within<T: Send>(
        &self,
        request: impl Future<Output = Result<T, etcd::Error>> + Send,
    ) -> Result<T> {
        let answer = match self.env.timeout(REQUEST_TIMEOUT, request).await {
            Ok(answer) => answer.map_err(failed),
            Err(elapsed) => Err(StoreError::Unavailable(elapsed.to_string())),
        };
        if matches!(answer, Err(StoreError::Unavailable(_))) {
            self.doubt();
        }
        answer
    }

    async fn kv(&self) -> etcd::KvClient {
        self.client().await.kv_client().max_decoding_message_size(MESSAGE_BYTES)
    }

    /// The error of a read, with what we know about compaction and revisions filled in.
    fn explain(&self, error: StoreError, asked: Option<Revision>) -> StoreError {
        match error {
            StoreError::Compacted { .. } => {
                let compact_revision = self.compact_revision.load(Ordering::Relaxed);
                StoreError::Compacted { compact_revision }
            }
            StoreError::FutureRevision { current, .. } => {
                StoreError::FutureRevision { asked: asked.unwrap_or(0), current }
            }
            other => other,
        }
    }
}

#[async_trait]
impl Store for EtcdStore {
    async fn get(&self, key: &str) -> Result<GetResponse> {
        if key.is_empty() {
            return Err(StoreError::EmptyKey);
        }
        let answer = self.within(self.kv().await.get(key, None)).await?;
        Ok(GetResponse { kv: answer.kvs().first().map(key_value), revision: revision_of(answer.header()) })
    }

    async fn range(&self, request: RangeRequest) -> Result<RangeResponse> {
        let (start, end) = wire_range(&request.range);
        let mut options = etcd::GetOptions::new().with_range(end).with_limit(request.limit as i64);
        if let Some(revision) = request.at_revision {
            options = options.with_revision(revision as i64);
        }
        if request.keys_only {
            options = options.with_keys_only();
        }
        let answer = self.within(self.kv().await.get(start, Some(options))).await;
        let answer = answer.map_err(|error| self.explain(error, request.at_revision))?;
        Ok(RangeResponse {
            kvs: answer.kvs().iter().map(key_value).collect(),
            revision: revision_of(answer.header()),
            more: answer.more(),
        })
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        txn.validate()?;
        let writes = [txn.success.iter().any(Op::writes), txn.failure.iter().any(Op::writes)];
        let request = etcd::Txn::new()
            .when(txn.compares.into_iter().map(wire_compare).collect::<Vec<_>>())
            .and_then(txn.success.into_iter().map(wire_op).collect::<Vec<_>>())
            .or_else(txn.failure.into_iter().map(wire_op).collect::<Vec<_>>());
        let mut kv = self.kv().await;
        let answer = match self.env.timeout(REQUEST_TIMEOUT, kv.txn(request)).await {
            Ok(Ok(answer)) => answer,
            Err(elapsed) => {
                self.doubt();
                tracing::warn!(%elapsed, "a transaction ended unknown");
                return Ok(TxnOutcome::Unknown);
            }
            Ok(Err(error)) => match Failure::from(error) {
                Failure::Refused(error) => return Err(error),
                Failure::Unknown(reason) => {
                    self.doubt();
                    tracing::warn!(reason, "a transaction ended unknown");
                    return Ok(TxnOutcome::Unknown);
                }
            },
        };
        let revision = revision_of(answer.header());
        let responses = answer
            .op_responses()
            .into_iter()
            .map(|response| match response {
                etcd::TxnOpResponse::Put(_) => OpResponse::Put,
                etcd::TxnOpResponse::Delete(deleted) => OpResponse::Deleted(deleted.deleted() as u64),
                etcd::TxnOpResponse::Get(got) => OpResponse::Got(got.kvs().first().map(key_value)),
                etcd::TxnOpResponse::Txn(_) => unreachable!("we never nest transactions"),
            })
            .collect();
        if writes[usize::from(!answer.succeeded())] {
            self.commits.fetch_add(1, Ordering::Relaxed);
            self.transactions.fetch_add(1, Ordering::Relaxed);
        }
        Ok(match answer.succeeded() {
            true => TxnOutcome::Committed { revision, responses },
            false => TxnOutcome::Refused { revision, responses },
        })
    }

    async fn watch(&self, prefix: &str, from_revision: Revision) -> Result<WatchStream> {
        if from_revision == 0 {
            return Err(StoreError::Invalid("a watch starts at revision 1 or later".into()));
        }
        let (start, end) = wire_range(&KeyRange::Prefix(prefix.to_owned()));
        // etcd accepts a watch from the compacted revision itself although deletions of that revision are gone (3.4).
        // Watching from one earlier, and leaving that one out, makes it refuse. To etcd 0 means "from now"; nothing
        // ever happens at revision 1.
        let start_revision = from_revision.saturating_sub(1).max(1);
        let options = etcd::WatchOptions::new()
            .with_range(end)
            .with_start_revision(start_revision as i64)
            .with_prev_key()
            .with_progress_notify();
        let mut client = self.client().await.watch_client().max_decoding_message_size(MESSAGE_BYTES);
        let stream = self.within(client.watch(start, Some(options))).await?;
        let watching = Watching { stream, from: from_revision, queue: VecDeque::new(), ended: false };
        let items = futures::stream::unfold(watching, |mut watching| async move {
            if watching.ended {
                return None;
            }
            let item = watching.next_item().await;
            watching.ended = item.is_err();
            Some((item, watching))
        });
        Ok(items.boxed())
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId> {
        let seconds = lease_seconds(ttl)?;
        let answer = self.within(self.client().await.lease_client().grant(seconds, None)).await?;
        self.commits.fetch_add(1, Ordering::Relaxed);
        Ok(LeaseId(answer.id()))
    }

    async fn lease_keepalive(&self, lease: LeaseId) -> Result<Duration> {
        let client = self.client().await;
        let ttl = self.within(async {
            // The client makes a first round trip itself, and reports a lease that is gone in its own way.
            let (mut keeper, mut answers) = match client.lease_client().keep_alive(lease.0).await {
                Err(etcd::Error::LeaseKeepAliveError(_)) => return Ok(Some(0)),
                other => other?,
            };
            keeper.keep_alive().await?;
            Ok(answers.message().await?.map(|answer| answer.ttl()))
        });
        match ttl.await? {
            Some(ttl) if ttl > 0 => Ok(Duration::from_secs(ttl as u64)),
            Some(_) => Err(StoreError::LeaseNotFound),
            None => Err(StoreError::Unavailable("the server ended the stream".into())),
        }
    }

    async fn lease_revoke(&self, lease: LeaseId) -> Result<()> {
        self.within(self.client().await.lease_client().revoke(lease.0)).await?;
        self.commits.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn compact(&self, revision: Revision) -> Result<()> {
        let answer = self.within(self.kv().await.compact(revision as i64, None)).await;
        answer.map_err(|error| self.explain(error, Some(revision)))?;
        self.compact_revision.fetch_max(revision, Ordering::Relaxed);
        Ok(())
    }

    async fn status(&self) -> Result<Status> {
        let answer = self.within(self.client().await.maintenance_client().status()).await?;
        Ok(Status {
            backend: "etcd",
            version: answer.version().to_owned(),
            revision: revision_of(answer.header()),
            compact_revision: self.compact_revision.load(Ordering::Relaxed),
            size_bytes: answer.db_size() as u64,
        })
    }

    fn counters(&self) -> Counters {
        Counters {
            durable_commits: self.commits.load(Ordering::Relaxed),
            transactions: self.transactions.load(Ordering::Relaxed),
        }
    }
}

struct Watching {
    stream: etcd::WatchStream,
    from: Revision,
    queue: VecDeque<WatchItem>,
    ended: bool,
}

impl Watching {
    async fn next_item(&mut self) -> Result<WatchItem> {
        loop {
            if let Some(item) = self.queue.pop_front() {
                return Ok(item);
            }
            let message = self.stream.message().await.map_err(failed)?;
            let message =
                message.ok_or_else(|| StoreError::Unavailable("the server ended the watch".into()))?;
            if message.compact_revision() > 0 {
                return Err(StoreError::Compacted { compact_revision: message.compact_revision() as u64 });
            }
            if message.canceled() {
                return Err(StoreError::Unavailable(message.cancel_reason().to_owned()));
            }
            if message.created() {
                continue;
            }
            let revision = revision_of(message.header());
            if message.events().is_empty() && revision >= self.from {
                return Ok(WatchItem::Progress(revision));
            }
            self.take(message.events());
        }
    }

    /// One message may hold several revisions, but never a part of one: we do not ask for fragments.
    fn take(&mut self, events: &[etcd::Event]) {
        for event in events {
            let Some(kv) = event.kv() else { continue };
            let revision = kv.mod_revision() as u64;
            if revision < self.from {
                continue;
            }
            let change = match event.event_type() {
                etcd::EventType::Put => Change::Put(key_value(kv)),
                etcd::EventType::Delete => {
                    Change::Delete { key: String::from_utf8_lossy(kv.key()).into_owned() }
                }
            };
            let prev_mod_revision = event.prev_kv().map(|prev| prev.mod_revision() as u64);
            let event = Event { prev_mod_revision, change };
            match self.queue.back_mut() {
                Some(WatchItem::Batch(batch)) if batch.revision == revision => batch.events.push(event),
                _ => self.queue.push_back(WatchItem::Batch(WatchBatch { revision, events: vec![event] })),
            }
        }
    }
}
