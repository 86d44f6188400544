//! Guests whose keepers live and do not answer (stopped, or stuck in the kernel).
//!
//! Such a guest runs on, and one of them must never hold up the others: nobody waits for its keeper but the first who
//! notices and one task that goes on asking. Meanwhile what the keeper wrote down at the start is what is known of it, which
//! is enough to observe the guest, to reach into it and to end it.

use crate::keeper::{self, Keeper, Status};
use karst_model::{Error, ErrorKind, InstanceId, Result};
use std::{
    collections::BTreeSet,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

/// Waits between two questions: doubled from the first up to the second.
pub const BACK_OFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// Between two looks at whether a keeper answers again.
const LOOK: Duration = Duration::from_millis(200);

/// Whose keepers are silent, of one driver.
#[derive(Debug, Default)]
pub struct Silence(Mutex<BTreeSet<InstanceId>>);

impl Silence {
    fn all(&self) -> MutexGuard<'_, BTreeSet<InstanceId>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// As [`keeper::connect`] of the guest in `dir`. Where its keeper lives and does not answer: what that wrote down last.
    /// Only the first to notice waits for that.
    ///
    /// # Errors
    /// Not found when none lives there; timeout when it does not answer and has written nothing down.
    pub async fn connect(self: &Arc<Self>, instance: InstanceId, dir: &Path) -> Result<(Keeper, Status)> {
        let refused = if self.contains(instance) {
            Error::timeout("the guest's keeper does not answer; it is asked again until it does")
        } else {
            match keeper::connect(dir).await {
                Err(e) if e.is(ErrorKind::Timeout) => e,
                other => return other,
            }
        };
        if !keeper::is_alive(dir) {
            self.forget(instance);
            return keeper::connect(dir).await;
        }
        self.note(instance, dir);
        let status = keeper::read_status(dir).ok_or(refused)?;
        Ok((Keeper::unasked(dir), status))
    }

    /// Its keeper did not answer; from now on it is asked until it does, or is gone.
    pub fn note(self: &Arc<Self>, instance: InstanceId, dir: &Path) {
        if !self.all().insert(instance) {
            return;
        }
        tracing::warn!(%instance, "a guest's keeper does not answer; the guest runs on, and its keeper is asked until it answers");
        let (weak, dir) = (Arc::downgrade(self), dir.to_owned());
        tokio::spawn(async move {
            let mut wait = BACK_OFF.0;
            loop {
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(BACK_OFF.1);
                if !weak.upgrade().is_some_and(|silence| silence.contains(instance)) {
                    return;
                }
                let answer = keeper::connect(&dir).await;
                let Some(silence) = weak.upgrade() else { return };
                match answer {
                    Err(e) if e.is(ErrorKind::Timeout) && keeper::is_alive(&dir) => continue,
                    Ok(_) => tracing::info!(%instance, "a guest's keeper answers again"),
                    Err(e) => tracing::info!(%instance, error = %e, "a guest's silent keeper is gone"),
                }
                return silence.forget(instance);
            }
        });
    }

    /// Nobody is silent under this id any more.
    pub fn forget(&self, instance: InstanceId) {
        self.all().remove(&instance);
    }

    /// Is its keeper silent?
    pub fn contains(&self, instance: InstanceId) -> bool {
        self.all().contains(&instance)
    }

    /// Waits until it is not.
    pub async fn over(&self, instance: InstanceId) {
        while self.contains(instance) {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// For people.
    pub fn warnings(&self) -> Vec<String> {
        let text = |id: &InstanceId| {
            format!(
                "the keeper of instance {id} does not answer and is asked again; the instance runs on, and can be stopped by \
                 force"
            )
        };
        self.all().iter().map(text).collect()
    }
}
