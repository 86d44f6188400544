//! What is in the making, and what goes: one background task frees it.

use super::{Inner, Object, ObjectPool, blocking, clear_place};
use karst_model::{ErrorKind, Result};
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

/// When what was still in use is tried to be freed again.
const AGAIN: Duration = Duration::from_secs(20);
/// How often it is tried before, and how long apart: udev looks into devices that have just changed.
const TRIES: u32 = 10;
const PAUSE: Duration = Duration::from_millis(200);

/// An object in the making: the sweeper's unless it was renamed, whatever ended the work (error, cancellation).
pub(super) struct Work {
    pool: ObjectPool,
    id: Uuid,
}

impl Work {
    pub(super) fn object(&self) -> Object {
        Object::Work(self.id)
    }

    /// Where it is mounted while it is made.
    pub(super) fn place(&self) -> PathBuf {
        self.pool.inner.root.join("work").join(self.id.to_string())
    }
}

impl ObjectPool {
    /// A place to make something in, swept unless it is renamed away.
    pub(super) fn work(&self) -> Work {
        let id = Uuid::new_v4();
        self.inner.active.lock().unwrap_or_else(|e| e.into_inner()).insert(id);
        Work { pool: self.clone(), id }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.pool.inner.active.lock().unwrap_or_else(|e| e.into_inner()).remove(&self.id);
        self.pool.wake_sweeper();
    }
}

/// Frees what is in the trash and what was given up, one after the other. Ends with the pool.
pub(super) async fn sweeper(pool: Arc<Inner>, mut wanted: mpsc::Receiver<Option<oneshot::Sender<()>>>) {
    let mut left = false;
    loop {
        let (next, tries) = match left {
            // What may be in use for days is looked at once then.
            true => match tokio::time::timeout(AGAIN, wanted.recv()).await {
                Ok(next) => (next, TRIES),
                Err(_) => (Some(None), 0),
            },
            false => (wanted.recv().await, TRIES),
        };
        let Some(answer) = next else { return };
        left = match sweep(&pool, tries).await {
            Ok(left) => left,
            Err(e) => {
                tracing::warn!(error = %e, context = e.context, "deleted volumes could not be freed");
                false
            }
        };
        if let Some(answer) = answer {
            let _ = answer.send(()); // nobody waits any more
        }
    }
}

/// Answers whether something is in use for a moment longer, after so many tries more than one.
async fn sweep(pool: &Inner, mut tries: u32) -> Result<bool> {
    let mut left = false;
    // What goes may set others free that it was made of.
    for _ in 0..64 {
        let mut gone = 0;
        left = false;
        for (object, _) in pool.backend.list().await? {
            match object {
                Object::Trash(_) => {}
                Object::Work(id) => {
                    if pool.active.lock().unwrap_or_else(|e| e.into_inner()).contains(&id) {
                        continue;
                    }
                    let _one = pool.mounting.lock().await;
                    let at = pool.root.join("work").join(id.to_string());
                    blocking(move || clear_place(&at)).await?;
                }
                _ => continue,
            }
            match pool.backend.remove(object).await {
                Ok(true) => gone += 1,
                Ok(false) => left = true,
                Err(e) if e.is(ErrorKind::Conflict) => left = true,
                Err(e) => {
                    tracing::warn!(error = %e, context = e.context, "a deleted volume could not be freed");
                }
            }
        }
        if gone > 0 {
            continue;
        }
        if !left || tries == 0 {
            break;
        }
        tries -= 1;
        tokio::time::sleep(PAUSE).await;
    }
    Ok(left)
}
