//! Leases: which there are and when they end. The table holds their time to live, memory their deadlines.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use karst_env::SharedEnv;
use tokio::sync::Notify;

use crate::types::LeaseId;

struct Lease {
    ttl: Duration,
    deadline: Duration,
}

pub(super) struct Leases {
    env: SharedEnv,
    leases: Mutex<BTreeMap<LeaseId, Lease>>,
    /// A deadline came that may be earlier than what the sweeper waits for, or the store was closed.
    changed: Notify,
    closed: AtomicBool,
}

impl Leases {
    pub fn new(env: SharedEnv) -> Leases {
        Leases { env, leases: Mutex::default(), changed: Notify::new(), closed: AtomicBool::new(false) }
    }

    pub fn granted(&self, lease: LeaseId, ttl: Duration) {
        let deadline = self.env.monotonic() + ttl;
        self.leases.lock().unwrap().insert(lease, Lease { ttl, deadline });
        self.changed.notify_one();
    }

    /// These there are, each with all of its time, and no others.
    pub fn replace(&self, leases: Vec<(LeaseId, Duration)>) {
        let now = self.env.monotonic();
        let leases = leases.into_iter().map(|(id, ttl)| (id, Lease { ttl, deadline: now + ttl }));
        *self.leases.lock().unwrap() = leases.collect();
        self.changed.notify_one();
    }

    pub fn gone(&self, lease: LeaseId) {
        self.leases.lock().unwrap().remove(&lease);
    }

    /// Starts the time anew. `None`: there is no such lease, or its time is up and its keys are about to go.
    pub fn keepalive(&self, lease: LeaseId) -> Option<Duration> {
        let now = self.env.monotonic();
        let mut leases = self.leases.lock().unwrap();
        let found = leases.get_mut(&lease).filter(|found| found.deadline > now)?;
        found.deadline = now + found.ttl;
        Some(found.ttl)
    }

    pub fn is_expired(&self, lease: LeaseId) -> bool {
        let now = self.env.monotonic();
        self.leases.lock().unwrap().get(&lease).is_some_and(|found| found.deadline <= now)
    }

    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.changed.notify_one();
    }

    /// Waits until leases have ended and names them. `None`: the store is closed.
    pub async fn expired(&self) -> Option<Vec<LeaseId>> {
        loop {
            if self.closed.load(Ordering::Acquire) {
                return None;
            }
            let now = self.env.monotonic();
            let (expired, next) = {
                let leases = self.leases.lock().unwrap();
                let expired: Vec<LeaseId> =
                    leases.iter().filter(|(_, lease)| lease.deadline <= now).map(|(id, _)| *id).collect();
                (expired, leases.values().map(|lease| lease.deadline).min())
            };
            if !expired.is_empty() {
                return Some(expired);
            }
            match next {
                None => self.changed.notified().await,
                Some(deadline) => {
                    let sleep = self.env.sleep(deadline - now);
                    futures::future::select(std::pin::pin!(self.changed.notified()), sleep).await;
                }
            }
        }
    }
}
