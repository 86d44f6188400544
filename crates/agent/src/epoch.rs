//! The guard of epochs: after the first mutation of an executor, nothing of an executor of the same node before it happens
//! any more. Executors of different nodes do not end each other: that what they do does not collide is the locks' part.

use crate::calls::{CallContext, Executor, Fence};
use karst_env::Mutex;
use karst_model::{Error, NodeId, Result};
use std::{
    collections::BTreeMap,
    future::Future,
    io::Write,
    path::{Path, PathBuf},
    pin::pin,
};
use tokio::sync::watch;

/// Executors that a host remembers. A store with more nodes has outgrown the platform; a process that makes them up is
/// refused.
const EXECUTORS: usize = 4096;

/// Remembers the highest epoch seen of each executor, in a file where the agent is durable, and lets mutations pass.
///
/// A mutation of a higher epoch first records its epoch, then ends what still runs of lower ones (their futures are
/// dropped) and waits until that is gone; only then does it begin. So two executors of a node never act at the same time,
/// in whatever order their calls arrive.
#[derive(Debug)]
pub struct EpochGuard {
    file: Option<PathBuf>,
    state: Mutex<State>,
    seen: watch::Sender<Seen>,
    ended: watch::Sender<u64>,
}

/// What was seen of executors.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Seen {
    /// Nothing below is heard of anybody: of the time when a host remembered one number.
    floor: u64,
    highest: BTreeMap<NodeId, u64>,
}

impl Seen {
    /// One line an executor, `NODE EPOCH`; a lone number is the floor.
    fn parse(text: &str) -> Option<Self> {
        let mut seen = Self::default();
        for line in text.lines() {
            match line.split_once(' ') {
                None => seen.floor = line.parse().ok()?,
                Some((node, epoch)) => drop(seen.highest.insert(node.parse().ok()?, epoch.parse().ok()?)),
            }
        }
        (!text.trim().is_empty()).then_some(seen)
    }

    fn of(&self, node: NodeId) -> u64 {
        self.highest.get(&node).copied().unwrap_or(0).max(self.floor)
    }
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.floor > 0 {
            writeln!(f, "{}", self.floor)?;
        }
        self.highest.iter().try_for_each(|(node, epoch)| writeln!(f, "{node} {epoch}"))
    }
}

#[derive(Debug, Default)]
struct State {
    seen: Seen,
    /// Mutations that run, by executor and epoch.
    running: BTreeMap<(NodeId, u64), usize>,
}

impl EpochGuard {
    /// A guard that lasts as long as the process: for simulations.
    pub fn in_memory() -> Self {
        Self::with(None, Seen::default())
    }

    /// A guard that is kept in `file` (a line `NODE EPOCH` for each executor). A missing file is epoch 0 for all.
    ///
    /// # Errors
    /// A file that cannot be read or holds anything else: guessing would let a stale executor act.
    pub fn open(file: impl Into<PathBuf>) -> Result<Self> {
        let file = file.into();
        let seen = match std::fs::read_to_string(&file) {
            Ok(text) => Seen::parse(&text).ok_or_else(|| {
                Error::internal("the agent's record of the executors' epochs is damaged", file.display())
            })?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Seen::default(),
            Err(e) => return Err(Error::from(e).with_context(file.display())),
        };
        Ok(Self::with(Some(file), seen))
    }

    fn with(file: Option<PathBuf>, seen: Seen) -> Self {
        Self {
            file,
            seen: watch::Sender::new(seen.clone()),
            state: Mutex::new(State { seen, running: BTreeMap::new() }),
            ended: watch::Sender::new(0),
        }
    }

    /// The highest epoch seen of an executor.
    pub fn highest(&self, node: NodeId) -> u64 {
        self.state.lock().seen.of(node)
    }

    /// An executor introduces itself: records its epoch when it is higher than all before.
    ///
    /// # Errors
    /// Conflict when it is lower.
    pub fn introduce(&self, executor: Executor) -> Result<()> {
        self.raise(&mut self.state.lock(), executor)
    }

    fn raise(&self, state: &mut State, Executor { node, epoch }: Executor) -> Result<()> {
        let highest = state.seen.of(node);
        if epoch < highest {
            return Err(superseded(epoch, highest));
        }
        if epoch > state.seen.highest.get(&node).copied().unwrap_or(0) {
            let mut seen = state.seen.clone();
            seen.highest.insert(node, epoch);
            if seen.highest.len() > EXECUTORS {
                return Err(Error::quota(format!("this host follows no more than {EXECUTORS} executors")));
            }
            if let Some(file) = &self.file {
                // Once per start of an engine, a few bytes: short enough to be done here, under the lock that makes it
                // one step with the check.
                store(file, &seen).map_err(|e| {
                    Error::internal("the executor's epoch could not be recorded", e)
                        .with_context(file.display())
                })?;
            }
            state.seen = seen.clone();
            self.seen.send_replace(seen);
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
        let Some(Fence { executor: node, epoch, .. }) = context.fence else {
            return Err(Error::conflict(
                "a change was asked of the host without saying for which executor (no fence); only reads may do so",
            ));
        };
        let mut ended = self.ended.subscribe();
        loop {
            ended.borrow_and_update();
            {
                let mut state = self.state.lock();
                self.raise(&mut state, Executor { node, epoch })?;
                if state.running.keys().all(|(n, e)| *n != node || *e >= epoch) {
                    *state.running.entry((node, epoch)).or_default() += 1;
                    break;
                }
            }
            // Ends only with the guard, which we borrow.
            let _ = ended.changed().await;
        }
        let _running = Running { guard: self, of: (node, epoch) };
        let mut seen = self.seen.subscribe();
        let newer = async {
            // The sender lives in the guard, which we borrow: this never fails.
            let newer = seen.wait_for(|s| s.of(node) > epoch).await.map(|s| s.of(node));
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
    of: (NodeId, u64),
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut state = self.guard.state.lock();
        if let Some(n) = state.running.get_mut(&self.of) {
            *n -= 1;
            if *n == 0 {
                state.running.remove(&self.of);
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
fn store(file: &Path, seen: &Seen) -> std::io::Result<()> {
    let directory = file.parent().unwrap_or(Path::new("."));
    let fresh = file.with_extension("new");
    let mut f = std::fs::File::create(&fresh)?;
    write!(f, "{seen}")?;
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

    fn node(n: u128) -> NodeId {
        NodeId(uuid::Uuid::from_u128(n))
    }

    fn of(n: u128, epoch: u64) -> CallContext {
        let fence = Fence { saga: SagaId(uuid::Uuid::nil()), executor: node(n), epoch, step: 0 };
        CallContext::mutate(Duration::from_secs(5), fence)
    }

    fn at(epoch: u64) -> CallContext {
        of(1, epoch)
    }

    #[tokio::test]
    async fn executors_of_different_nodes_do_not_end_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("epoch");
        // What a host wrote that knew one executor.
        std::fs::write(&file, "4\n").unwrap();
        let guard = EpochGuard::open(&file).unwrap();
        assert!(guard.run(&of(9, 3), async { Ok(()) }).await.is_err(), "older than all that was seen then");
        guard.run(&of(1, 6), async { Ok(()) }).await.unwrap();
        guard.run(&of(2, 5), async { Ok(()) }).await.expect("another node, begun earlier");
        // While one works the other begins, and neither is dropped.
        let other = of(2, 7);
        let inner = guard.run(&other, async { Ok(2) });
        assert_eq!(guard.run(&of(1, 6), inner).await.unwrap(), 2);
        drop(guard);
        let guard = EpochGuard::open(&file).unwrap();
        assert_eq!([1, 2, 3].map(|n| guard.highest(node(n))), [6, 7, 4]);
        assert!(guard.run(&of(2, 6), async { Ok(()) }).await.unwrap_err().is(ErrorKind::Conflict));
        guard.run(&of(1, 6), async { Ok(()) }).await.unwrap();
    }

    #[test]
    fn made_up_executors_are_bounded() {
        let guard = EpochGuard::in_memory();
        for n in 0..EXECUTORS as u128 {
            guard.introduce(Executor { node: node(n), epoch: 1 }).unwrap();
        }
        assert!(
            guard.introduce(Executor { node: node(1 << 40), epoch: 1 }).unwrap_err().is(ErrorKind::Quota)
        );
        guard.introduce(Executor { node: node(5), epoch: 2 }).unwrap();
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
        let me = |epoch| Executor { node: node(1), epoch };
        assert!(guard.introduce(me(3)).is_err() && guard.introduce(me(9)).is_ok());
        assert_eq!(EpochGuard::open(&file).unwrap().highest(node(1)), 9);
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
                self.0.lock().push("old gone");
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
            log.lock().push("new begins");
            Ok(())
        };
        guard.run(&at(2), new).await.unwrap();
        assert!(old.await.unwrap().unwrap_err().is(ErrorKind::Conflict));
        assert_eq!(*log.lock(), ["old gone", "new begins"]);
    }
}
