//! The guard of epochs: after the first mutation of an executor, nothing of an executor before it happens any more.

use crate::calls::{CallContext, Fence};
use karst_model::{Error, Result};
use std::{
    collections::BTreeMap,
    future::Future,
    io::Write,
    path::{Path, PathBuf},
    pin::pin,
    sync::Mutex,
};
use tokio::sync::watch;

/// Remembers the highest epoch seen, in a file where the agent is durable, and lets mutations pass.
///
/// A mutation of a higher epoch first records its epoch, then ends what still runs of lower ones (their futures are
/// dropped) and waits until that is gone; only then does it begin. So two executors never act at the same time, in
/// whatever order their calls arrive.
#[derive(Debug)]
pub struct EpochGuard {
    file: Option<PathBuf>,
    state: Mutex<State>,
    highest: watch::Sender<u64>,
    ended: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    highest: u64,
    /// Mutations that run, by epoch.
    running: BTreeMap<u64, usize>,
}

impl EpochGuard {
    /// A guard that lasts as long as the process: for simulations.
    pub fn in_memory() -> Self {
        Self::with(None, 0)
    }

    /// A guard that is kept in `file` (a decimal number and a newline). A missing file is epoch 0.
    ///
    /// # Errors
    /// A file that cannot be read or holds anything else: guessing would let a stale executor act.
    pub fn open(file: impl Into<PathBuf>) -> Result<Self> {
        let file = file.into();
        let highest = match std::fs::read_to_string(&file) {
            Ok(text) => text.trim().parse().map_err(|_| {
                Error::internal("the agent's record of the executor's epoch is damaged", file.display())
            })?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => 0,
            Err(e) => return Err(Error::from(e).with_context(file.display())),
        };
        Ok(Self::with(Some(file), highest))
    }

    fn with(file: Option<PathBuf>, highest: u64) -> Self {
        Self {
            file,
            state: Mutex::new(State { highest, running: BTreeMap::new() }),
            highest: watch::Sender::new(highest),
            ended: watch::Sender::new(0),
        }
    }

    /// The highest epoch seen.
    pub fn highest(&self) -> u64 {
        self.state.lock().unwrap().highest
    }

    /// An executor introduces itself: records its epoch when it is higher than all before.
    ///
    /// # Errors
    /// Conflict when it is lower.
    pub fn introduce(&self, epoch: u64) -> Result<()> {
        self.raise(&mut self.state.lock().unwrap(), epoch)
    }

    fn raise(&self, state: &mut State, epoch: u64) -> Result<()> {
        if epoch < state.highest {
            return Err(superseded(epoch, state.highest));
        }
        if epoch > state.highest {
            if let Some(file) = &self.file {
                // Once per start of an engine, a few bytes: short enough to be done here, under the lock that makes it
                // one step with the check.
                store(file, epoch).map_err(|e| {
                    Error::internal("the executor's epoch could not be recorded", e)
                        .with_context(file.display())
                })?;
            }
            state.highest = epoch;
            self.highest.send_replace(epoch);
        }
        Ok(())
    }

    /// Runs a mutation.
    ///
    /// # Errors
    /// Conflict when the context carries no fence or a lower epoch than one seen before, also when the higher one comes
    /// while the mutation runs: it is dropped then.
    pub async fn run<T>(
        &self,
        context: &CallContext,
        mutation: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let Some(Fence { epoch, .. }) = context.fence else {
            return Err(Error::conflict(
                "a change was asked of the host without saying for which executor (no fence); only reads may do so",
            ));
        };
        let mut ended = self.ended.subscribe();
        loop {
            ended.borrow_and_update();
            {
                let mut state = self.state.lock().unwrap();
                self.raise(&mut state, epoch)?;
                if state.running.keys().all(|e| *e >= epoch) {
                    *state.running.entry(epoch).or_default() += 1;
                    break;
                }
            }
            // Ends only with the guard, which we borrow.
            let _ = ended.changed().await;
        }
        let _running = Running { guard: self, epoch };
        let mut highest = self.highest.subscribe();
        let newer = async {
            // The sender lives in the guard, which we borrow: this never fails.
            let newer = highest.wait_for(|h| *h > epoch).await.map(|h| *h);
            superseded(epoch, newer.unwrap_or(u64::MAX))
        };
        // `mutation` lives in this block, so it is gone before `_running` says that it is.
        {
            let mutation = pin!(mutation);
            match futures::future::select(pin!(newer), mutation).await {
                futures::future::Either::Left((error, _)) => Err(error),
                futures::future::Either::Right((outcome, _)) => outcome,
            }
        }
    }
}

struct Running<'a> {
    guard: &'a EpochGuard,
    epoch: u64,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut state = self.guard.state.lock().unwrap();
        if let Some(n) = state.running.get_mut(&self.epoch) {
            *n -= 1;
            if *n == 0 {
                state.running.remove(&self.epoch);
                self.guard.ended.send_modify(|n| *n += 1);
            }
        }
    }
}

fn superseded(epoch: u64, highest: u64) -> Error {
    Error::conflict(format!(
        "executor epoch {epoch} is over: this host already follows epoch {highest}, so nothing was done"
    ))
}

/// Durable: the content first, then the name, then the directory.
fn store(file: &Path, epoch: u64) -> std::io::Result<()> {
    let directory = file.parent().unwrap_or(Path::new("."));
    let fresh = file.with_extension("new");
    let mut f = std::fs::File::create(&fresh)?;
    writeln!(f, "{epoch}")?;
    f.sync_all()?;
    std::fs::rename(&fresh, file)?;
    std::fs::File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_env::EnvExt;
    use karst_model::{ErrorKind, SagaId};
    use std::{sync::Arc, time::Duration};

    fn at(epoch: u64) -> CallContext {
        let fence = Fence { saga: SagaId(uuid::Uuid::nil()), epoch, step: 0 };
        CallContext::mutate(Duration::from_secs(5), fence)
    }

    #[tokio::test]
    async fn a_lower_epoch_is_refused_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("epoch");
        let guard = EpochGuard::open(&file).unwrap();
        guard.run(&at(7), async { Ok(()) }).await.unwrap();
        drop(guard);
        let guard = EpochGuard::open(&file).unwrap();
        let e = guard.run(&at(6), async { Ok(()) }).await.unwrap_err();
        assert!(e.is(ErrorKind::Conflict) && e.message.contains("epoch 6"), "{e:?}");
        guard.run(&at(7), async { Ok(()) }).await.unwrap();
        let none = CallContext::read(Duration::from_secs(1));
        assert!(guard.run(&none, async { Ok(()) }).await.unwrap_err().is(ErrorKind::Conflict));
        assert!(guard.introduce(3).is_err() && guard.introduce(9).is_ok());
        assert_eq!(EpochGuard::open(&file).unwrap().highest(), 9);
        std::fs::write(&file, "garbage").unwrap();
        assert!(EpochGuard::open(&file).is_err());
    }

    #[tokio::test]
    async fn a_higher_epoch_ends_what_runs_before_it_begins() {
        let guard = Arc::new(EpochGuard::in_memory());
        let log = Arc::new(Mutex::new(vec![]));
        struct Note(Arc<Mutex<Vec<&'static str>>>);
        impl Drop for Note {
            fn drop(&mut self) {
                self.0.lock().unwrap().push("old gone");
            }
        }
        let (started, wait) = tokio::sync::oneshot::channel();
        let env = karst_env::RealEnv::shared();
        let (sender, old) = tokio::sync::oneshot::channel();
        env.spawn_task("old", {
            let (guard, note) = (guard.clone(), Note(log.clone()));
            async move {
                let work = async move {
                    let _note = note;
                    let _ = started.send(());
                    std::future::pending::<Result<()>>().await
                };
                let _ = sender.send(guard.run(&at(1), work).await);
            }
        });
        wait.await.unwrap();
        let new = async {
            log.lock().unwrap().push("new begins");
            Ok(())
        };
        guard.run(&at(2), new).await.unwrap();
        assert!(old.await.unwrap().unwrap_err().is(ErrorKind::Conflict));
        assert_eq!(*log.lock().unwrap(), ["old gone", "new begins"]);
    }
}
