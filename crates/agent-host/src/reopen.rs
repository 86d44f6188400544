//! Pools that could not be opened: tried again for as long as they are recorded, and told as a warning of the host, which
//! goes when they can.
//!
//! A disk that comes late, a file system that is mounted after the daemon, a device somebody else has for a while: none of
//! it needs a restart. Opening again never makes anything: what is not there is missing, not new.

use crate::{RealAgent, pools::Purpose};
use karst_env::Mutex;
use karst_model::{Error, PoolId, Result};
use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::Duration,
};

/// Waits between tries: doubled from the first up to the second.
const BACK_OFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// Pools that cannot be opened, and why.
#[derive(Debug, Default)]
pub(crate) struct Unopened(Mutex<BTreeMap<PoolId, Error>>);

impl Unopened {
    pub fn note(&self, id: PoolId, error: Error) {
        self.0.lock().insert(id, error);
    }

    pub fn forget(&self, id: PoolId) {
        self.0.lock().remove(&id);
    }

    fn all(&self) -> Vec<PoolId> {
        self.0.lock().keys().copied().collect()
    }

    /// Why a pool is not there.
    pub fn why(&self, id: PoolId) -> Option<Error> {
        let why = self.0.lock().get(&id).cloned()?;
        let text = format!("pool {id} cannot be opened now and is tried again: {}", why.message);
        Some(Error::unavailable(text).with_context(why.context.unwrap_or_default()))
    }

    /// For people.
    pub fn warnings(&self) -> Vec<String> {
        let all = self.0.lock();
        let text = |(id, why): (&PoolId, &Error)| {
            format!("storage pool {id} cannot be opened; it is tried again until it can: {}", why.message)
        };
        all.iter().map(text).collect()
    }
}

/// Tries for ever.
pub(crate) async fn watch(agent: Weak<RealAgent>) {
    let mut wait = BACK_OFF.0;
    loop {
        let Some(strong) = agent.upgrade() else { return };
        let env = strong.env.clone();
        let mut failed = false;
        for id in strong.unopened.all() {
            match strong.open_again(id).await {
                Ok(()) => tracing::info!(pool = %id, "a pool that could not be opened is open now"),
                Err(e) => {
                    failed = true;
                    tracing::debug!(pool = %id, error = %e, context = e.context, "a pool still cannot be opened");
                    strong.unopened.note(id, e);
                }
            }
        }
        drop(strong);
        wait = if failed { (wait * 2).min(BACK_OFF.1) } else { BACK_OFF.0 };
        env.sleep(wait).await;
    }
}

impl RealAgent {
    async fn open_again(self: &Arc<Self>, id: PoolId) -> Result<()> {
        let _lock = self.lock(id.0).await;
        match self.registry.pool(id)?.filter(|_| self.registry.closed(id).is_none()) {
            Some(spec) => self.open_pool(&spec, Purpose::Use).await,
            None => {
                self.unopened.forget(id);
                Ok(())
            }
        }
    }
}
