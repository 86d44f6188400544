//! Guests that run already when the driver begins, and those whose keepers do not answer for a while.

use super::Shared;
use karst_guest::{
    Observed,
    keeper::{self, End, Keeper},
    silence,
};
use karst_model::{ErrorKind, InstanceId, Result};
use std::sync::{Arc, Weak};

impl Shared {
    /// Watches a guest again if its keeper lives, else clears up after it; answers what it does if it runs.
    pub(super) async fn adopt_one(self: &Arc<Self>, instance: InstanceId) -> Result<Option<Observed>> {
        if keeper::is_alive(&self.dir(instance)) {
            match self.running(instance).await {
                Ok(running) => {
                    self.watch(instance, running.keeper.clone(), running.status.keeper_pid);
                    return Ok(Some(self.observed(&running)));
                }
                Err(e) if e.is(ErrorKind::NotFound) => {} // ended at this moment
                Err(e) => return Err(e),
            }
        }
        // It ended while nobody watched.
        self.after_end(instance, &self.guest(instance)).await.map(|_| None)
    }

    /// As [`Self::adopt_one`], until it is done.
    pub(super) async fn adopt_later(weak: Weak<Self>, instance: InstanceId) {
        let mut wait = silence::BACK_OFF.0;
        loop {
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(silence::BACK_OFF.1);
            let Some(shared) = weak.upgrade() else { return };
            match shared.adopt_one(instance).await {
                Ok(now) => {
                    tracing::info!(%instance, runs = now.is_some(), "a guest is adopted after all");
                    return now.into_iter().for_each(|now| shared.tell(now));
                }
                Err(e) => tracing::debug!(%instance, error = %e, "a guest still cannot be adopted"),
            }
        }
    }

    /// The guest's end, also of one whose keeper does not answer for a while.
    pub(super) async fn end_of(weak: &Weak<Self>, instance: InstanceId, keeper: &Keeper) -> Result<End> {
        loop {
            match keeper.wait_exit().await {
                Err(e) if e.is(ErrorKind::Timeout) => {}
                other => return other,
            }
            let Some(silence) = weak.upgrade().map(|shared| shared.silence.clone()) else {
                return std::future::pending().await;
            };
            silence.note(instance, keeper.dir());
            silence.over(instance).await;
        }
    }
}
