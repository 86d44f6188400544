//! The memory of a running virtual machine as one file that nobody can name, for who reads it at once.
//!
//! QEMU writes into a file without a name, below what the host's policy grants for memory in files, as fast as the disk takes it;
//! the guest stands still for so long and no longer, however slow its reader is. The file is gone with its last descriptor, also
//! when a process is killed. That QEMU writes is noted by its driver under an id that follows from the machine's, so that whoever
//! finds it after a crash waits for its end and forgets it.

use crate::{
    RealAgent,
    agent::{as_state, blocking},
    memory::files,
};
use karst_agent::{MachineDump, WithFds};
use karst_env::{EnvExt, Mutex, SharedEnv};
use karst_guest::{GuestDriver, MemoryJob};
use karst_model::{
    Error, InstanceId, MemoryJobId, Result,
    memory::{DumpFormat, MemoryEnd, MemoryPhase},
};
use std::{
    collections::BTreeSet,
    fs::File,
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

/// Between two looks at how far QEMU is.
const LOOK: Duration = Duration::from_millis(200);
/// Of the ids of such dumps.
const NAMES: uuid::Uuid = uuid::Uuid::from_u128(0x3c1e_8f0a_6d52_4b7e_9a41_70c9_5e2d_b816);

/// Machines whose memory is dumped so by this process.
#[derive(Clone, Default)]
pub(crate) struct Dumping(Arc<Mutex<BTreeSet<InstanceId>>>);

/// One of them, until dropped.
struct Turn(Dumping, InstanceId);

impl Dumping {
    fn take(&self, instance: InstanceId) -> Result<Turn> {
        let mut all = self.0.lock();
        match all.insert(instance) {
            true => Ok(Turn(self.clone(), instance)),
            false => Err(Error::conflict(
                "the memory of the guest is being dumped already; wait until that has ended",
            )),
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.0.lock().remove(&self.1);
    }
}

fn job(instance: InstanceId) -> MemoryJobId {
    MemoryJobId(uuid::Uuid::new_v5(&NAMES, instance.0.as_bytes()))
}

/// Forgets what an earlier process had begun, when QEMU has ended it.
async fn forget(driver: &Arc<dyn GuestDriver>, instance: InstanceId) -> Result<()> {
    match driver.memory_files() {
        Some(files) => files.end(instance, Some(job(instance)), MemoryEnd::Cancel).await,
        None => Ok(()),
    }
}

async fn dump(
    env: &SharedEnv,
    driver: &Arc<dyn GuestDriver>,
    instance: InstanceId,
    format: DumpFormat,
    file: File,
) -> Result<WithFds<u64>> {
    let (id, writer) = (job(instance), files(driver)?);
    forget(driver, instance).await.map_err(as_state(instance))?;
    let begun = writer.begin(instance, id, MemoryJob::Dump(format), file.try_clone()?.into()).await;
    begun.map_err(as_state(instance))?;
    let whole = loop {
        match writer.state(instance, Some(id)).await.map(|s| s.phase) {
            Ok(MemoryPhase::Running) => env.sleep(LOOK).await,
            Ok(MemoryPhase::Done) => break Ok(()),
            Ok(MemoryPhase::Failed { reason }) => break Err(Error::unavailable(reason)),
            Ok(MemoryPhase::Gone) => {
                break Err(Error::conflict("the guest ended before its memory was dumped"));
            }
            Err(e) => break Err(e),
        }
    };
    let end = if whole.is_ok() { MemoryEnd::Keep } else { MemoryEnd::Cancel };
    let ended = writer.end(instance, Some(id), end).await;
    whole?;
    ended.map_err(as_state(instance))?;
    blocking(move || {
        let size = file.metadata()?.len();
        // Its reader gets it from the beginning, and cannot write.
        let read: OwnedFd = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?.into();
        Ok(WithFds { value: size, fds: vec![read] })
    })
    .await
}

impl RealAgent {
    pub(crate) async fn dump_memory(&self, request: MachineDump) -> Result<WithFds<u64>> {
        let MachineDump { guest, format } = request;
        let instance = guest.instance;
        let (_, driver) = self.meant(guest)?;
        files(driver)?;
        let driver = driver.clone();
        let policy = self.policy().clone();
        let file = blocking(move || policy.save_room()).await?;
        if !self.runs(instance).await? {
            return Err(Error::conflict(format!("instance {instance} is not running")));
        }
        let turn = self.dumping.take(instance)?;
        let (answer, answered) = tokio::sync::oneshot::channel();
        let env = self.env.clone();
        // By itself: what QEMU was asked is ended also when whoever asked has gone.
        drop(self.env.spawn_task("memory-dump", async move {
            let done = dump(&env, &driver, instance, format, file).await;
            drop(turn);
            // Nobody may be left to take it; then the file goes.
            let _ = answer.send(done);
        }));
        answered.await.map_err(|e| Error::internal("a dump was broken off", e))?
    }

    /// What an earlier process was dumping when it ended is waited for and forgotten, of each machine by itself.
    pub(crate) fn adopt_dumps(&self) {
        for (instance, record) in self.all_guests() {
            let Some(driver) = self.driver(record.kind).ok().filter(|d| d.memory_files().is_some()) else {
                continue;
            };
            let driver = driver.clone();
            let Ok(turn) = self.dumping.take(instance) else { continue };
            drop(self.env.spawn_task("memory-dump-adopt", async move {
                if let Err(e) = forget(&driver, instance).await {
                    tracing::warn!(%instance, error = %e, context = e.context, "a dump of an earlier process stays noted; the next one ends it");
                }
                drop(turn);
            }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_of_each_machine() {
        let (all, a, b) =
            (Dumping::default(), InstanceId(uuid::Uuid::from_u128(1)), InstanceId(uuid::Uuid::from_u128(2)));
        let first = all.take(a).unwrap();
        assert!(all.take(a).is_err_and(|e| e.is(karst_model::ErrorKind::Conflict)));
        let _other = all.take(b).unwrap();
        drop(first);
        all.take(a).unwrap();
        assert_ne!(job(a), job(b));
        assert_eq!(job(a), job(a));
    }
}
