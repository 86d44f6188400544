//! Memory of machines that run, written into files that the caller has opened: the state by a migration to a descriptor
//! (`migrate`), memory alone by `dump-guest-memory`. Source: QEMU's schema of these, as it is from 7.2 to 10.
//!
//! One is written at a time. What was begun, and whether the machine ran before, is written down and synced before QEMU is asked
//! (`memory.json`): QEMU goes on without the host's process, and whoever finds the file afterwards knows what to end and whether
//! the machine is to go on. A stop that keeps the memory is written down in the same way, without an id.
//!
//! A dump cannot be broken off, because QEMU has no command for that: its end is waited for.

use crate::{
    QemuDriver, backups, copies, launch,
    machine::{Ask, Inner, Machine},
    qmp::Qmp,
    saved,
};
use async_trait::async_trait;
use karst_guest::{MemoryFiles, MemoryJob, MemoryShape};
use karst_model::{
    Error, ErrorKind, InstanceId, MemoryJobId, Result,
    instance::RuntimeState,
    memory::{MemoryEnd, MemoryKind, MemoryPhase, MemoryState},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    fs::File,
    io::Write,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
    time::Duration,
};
use tokio::time::sleep;

const FILE: &str = "memory.json";
const GREETING: Duration = Duration::from_secs(10);
/// Between two looks at a dump that is waited for.
const LOOK: Duration = Duration::from_millis(200);
/// QEMU's name of the descriptor.
const FD: &str = "memory";

/// What is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Written {
    /// `None`: for a stop.
    id: Option<MemoryJobId>,
    kind: MemoryKind,
    /// The machine is to go on when this is broken off.
    ran: bool,
    /// QEMU has been asked.
    begun: bool,
}

fn read(dir: &Path) -> Result<Option<Written>> {
    karst_guest::record::read(dir, FILE)
}

fn write(dir: &Path, now: &Written) -> Result<()> {
    let new = dir.join("memory.json.new");
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(&serde_json::to_vec(now)?)?;
    file.sync_all()?;
    std::fs::rename(&new, dir.join(FILE))?;
    Ok(File::open(dir)?.sync_all()?)
}

/// It is on disk when this answers.
async fn note(dir: &Path, now: &Written) -> Result<()> {
    let (dir, now) = (dir.to_owned(), now.clone());
    tokio::task::spawn_blocking(move || write(&dir, &now))
        .await
        .map_err(|e| Error::internal("that memory is written could not be written down", e))?
}

/// Nothing is written any more.
pub(crate) fn clear(dir: &Path) -> Result<()> {
    match std::fs::remove_file(dir.join(FILE)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

async fn connect(machine: &Inner) -> Result<Qmp> {
    Ok(Qmp::connect(&machine.dir, launch::QMP, GREETING).await?.0)
}

/// A dump as QEMU tells of it (`query-dump`).
fn dump_state(said: &Value) -> MemoryState {
    let number = |key: &str| said.get(key).and_then(Value::as_u64).unwrap_or(0);
    let phase = match said.get("status").and_then(Value::as_str) {
        Some("active") => MemoryPhase::Running,
        Some("completed") => MemoryPhase::Done,
        Some("failed") => {
            let reason =
                "QEMU could not write the memory, or not in this form; look whether there is room".into();
            MemoryPhase::Failed { reason }
        }
        _ => MemoryPhase::Gone,
    };
    MemoryState { phase, done: number("completed"), total: number("total") }
}

async fn state(machine: &Machine, id: Option<MemoryJobId>) -> Result<MemoryState> {
    let Some(now) = read(&machine.dir)?.filter(|now| now.id == id) else { return Ok(MemoryState::default()) };
    let qmp = connect(machine).await?;
    if now.kind == MemoryKind::Dump {
        let state = dump_state(&qmp.execute("query-dump", json!({})).await?);
        return Ok(if now.begun { state } else { MemoryState::default() });
    }
    let migration = saved::migration(&qmp).await?;
    let phase = match migration.failure() {
        // Whoever was to ask QEMU was broken off, and asks no more.
        _ if !now.begun => {
            let reason = "it was broken off before it began; try again".into();
            MemoryPhase::Failed { reason }
        }
        _ if migration.status == "completed" => MemoryPhase::Done,
        Some(e) => MemoryPhase::Failed { reason: e.message },
        None => MemoryPhase::Running,
    };
    let (total, remaining) = match (now.begun, &phase) {
        // What QEMU tells may be of what it wrote before.
        (false, _) => (0, 0),
        (true, MemoryPhase::Done) => (migration.total, 0),
        _ => (migration.total, migration.remaining),
    };
    Ok(MemoryState { phase, done: total.saturating_sub(remaining), total })
}

fn busy() -> Error {
    Error::conflict(
        "the memory of the guest is being written to a file; wait until that has ended, or cancel it",
    )
}

/// Refuses what needs the machine while its memory is written.
pub(crate) fn demand_none(machine: &Inner) -> Result<()> {
    read(&machine.dir)?.map_or(Ok(()), |_| Err(busy()))
}

/// The caller holds the machine's lock of changes.
async fn begin(machine: &Machine, id: MemoryJobId, job: MemoryJob, file: OwnedFd) -> Result<()> {
    if let Some(old) = read(&machine.dir)? {
        if old.id == Some(id) && old.begun {
            return Ok(());
        }
        if old.id != Some(id) {
            return Err(busy());
        }
        // Of a call that was broken off.
        cancel(machine, &old).await?;
    }
    let ran = match machine.now().state {
        RuntimeState::Running => true,
        RuntimeState::Paused => false,
        RuntimeState::Error => {
            return Err(Error::conflict("the guest is halted by an error; resume it or force it to stop"));
        }
        _ => return Err(Error::conflict("the guest starts or ends; try again")),
    };
    if matches!(job, MemoryJob::Save) {
        saved::demand_alone(machine)?;
    }
    copies::demand_none(machine).await?;
    backups::demand_none(machine).await?;
    let kind = match job {
        MemoryJob::Save => MemoryKind::Save,
        MemoryJob::Dump(_) => MemoryKind::Dump,
    };
    let mut now = Written { id: Some(id), kind, ran, begun: false };
    note(&machine.dir, &now).await?;
    let asked = async {
        match job {
            MemoryJob::Save => {
                machine.ask(Ask::Pause).await?;
                saved::begin(&connect(machine).await?, &file).await?;
            }
            MemoryJob::Dump(format) => {
                let qmp = connect(machine).await?;
                qmp.execute_with_fd("getfd", json!({"fdname": FD}), file.as_fd()).await?;
                let arguments = json!({
                    "paging": false, "protocol": format!("fd:{FD}"), "detach": true, "format": format.as_str(),
                });
                qmp.execute("dump-guest-memory", arguments).await.map_err(|e| refused(e, format.as_str()))?;
            }
        }
        now.begun = true;
        note(&machine.dir, &now).await
    };
    let asked = asked.await;
    if asked.is_err()
        && let Err(e) = cancel(machine, &now).await
    {
        tracing::warn!(%id, error = %e, context = e.context, "what was begun of a guest's memory could not be ended; cancel it");
    }
    asked
}

/// QEMU's reason in words.
fn refused(e: Error, format: &str) -> Error {
    let said = e.context.clone().unwrap_or_default();
    let known =
        ["unsupported", "not supported", "not available", "is disabled", "vmcoreinfo", "win-dump", "paging"];
    if said.contains("migration") || !known.iter().any(|text| said.contains(text)) {
        return e;
    }
    Error::unsupported(format!("QEMU of this host cannot write the memory of this guest as {format}"))
        .at("format")
        .with_context(said)
}

/// Breaks it off, and lets the machine go on if it is to.
async fn cancel(machine: &Machine, now: &Written) -> Result<()> {
    match now.kind {
        MemoryKind::Save => saved::break_off(&connect(machine).await?).await?,
        MemoryKind::Dump => loop {
            let said = connect(machine).await?.execute("query-dump", json!({})).await?;
            if dump_state(&said).phase != MemoryPhase::Running {
                break;
            }
            sleep(LOOK).await;
        },
    }
    // Asked also when it seems to run: a pause that nobody waits for any more may still be before this one.
    if now.ran && now.kind == MemoryKind::Save && machine.now().state != RuntimeState::Error {
        machine.ask(Ask::Resume).await?;
    }
    clear(&machine.dir)
}

async fn end(machine: &Machine, id: Option<MemoryJobId>, end: MemoryEnd) -> Result<()> {
    let Some(now) = read(&machine.dir)?.filter(|now| now.id == id) else {
        return match end {
            MemoryEnd::Cancel => Ok(()),
            MemoryEnd::Keep => {
                Err(Error::conflict("the memory of the guest is not being written, or not any more"))
            }
        };
    };
    match end {
        MemoryEnd::Cancel => cancel(machine, &now).await,
        MemoryEnd::Keep => match state(machine, id).await?.phase {
            // What was saved may still be cancelled, until the machine has ended.
            MemoryPhase::Done if now.kind == MemoryKind::Save => Ok(()),
            MemoryPhase::Done => clear(&machine.dir),
            _ => Err(Error::conflict("the memory of the guest is not written yet; wait until it is")),
        },
    }
}

/// A stop that keeps the memory is about to write it; answers whether the machine is to go on when that is broken off. The caller
/// holds the machine's lock of changes.
pub(crate) async fn begin_stop(machine: &Machine) -> Result<Stopping> {
    let ran = match read(&machine.dir)? {
        Some(old) if old.id.is_none() => {
            // Of a call that was broken off: its machine stands still.
            saved::break_off(&connect(machine).await?).await?;
            old.ran
        }
        Some(_) => return Err(busy()),
        None => machine.now().state != RuntimeState::Paused,
    };
    note(&machine.dir, &Written { id: None, kind: MemoryKind::Save, ran, begun: false }).await?;
    Ok(Stopping { ran })
}

/// A stop that keeps the memory.
pub(crate) struct Stopping {
    ran: bool,
}

impl Stopping {
    /// QEMU is being asked: from now on what it tells is of this.
    pub(crate) async fn asked(&self, machine: &Machine) -> Result<()> {
        note(&machine.dir, &Written { id: None, kind: MemoryKind::Save, ran: self.ran, begun: true }).await
    }

    /// It is not to be: the machine goes on, if it ran.
    pub(crate) async fn broken_off(&self, machine: &Machine) -> Result<()> {
        let now = Written { id: None, kind: MemoryKind::Save, ran: self.ran, begun: true };
        cancel(machine, &now).await
    }
}

#[async_trait]
impl MemoryFiles for QemuDriver {
    async fn shape(&self, instance: InstanceId) -> Result<MemoryShape> {
        saved::shape(&*self.shared.machine(instance).await?)
    }

    async fn begin(
        &self,
        instance: InstanceId,
        id: MemoryJobId,
        job: MemoryJob,
        file: OwnedFd,
    ) -> Result<()> {
        let machine = self.shared.machine(instance).await?;
        let slot = self.shared.slot(instance);
        let _changing = slot.changing.lock().await;
        begin(&machine, id, job, file).await
    }

    async fn state(&self, instance: InstanceId, id: Option<MemoryJobId>) -> Result<MemoryState> {
        match self.shared.machine(instance).await {
            Err(e) if e.is(ErrorKind::NotFound) => Ok(MemoryState::default()),
            Err(e) => Err(e),
            Ok(machine) => state(&machine, id).await,
        }
    }

    async fn end(&self, instance: InstanceId, id: Option<MemoryJobId>, how: MemoryEnd) -> Result<()> {
        let machine = match self.shared.machine(instance).await {
            Err(e) if e.is(ErrorKind::NotFound) && how == MemoryEnd::Cancel => {
                let dir = self.shared.dir(instance);
                return if dir.is_dir() { clear(&dir) } else { Ok(()) };
            }
            other => other?,
        };
        let slot = self.shared.slot(instance);
        let _changing = slot.changing.lock().await;
        end(&machine, id, how).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_qemu_tells_of_a_dump() {
        let of = |status: &str| dump_state(&json!({"status": status, "completed": 3, "total": 9}));
        assert_eq!(of("active"), MemoryState { phase: MemoryPhase::Running, done: 3, total: 9 });
        assert_eq!((of("completed").phase, of("none").phase), (MemoryPhase::Done, MemoryPhase::Gone));
        assert!(matches!(of("failed").phase, MemoryPhase::Failed { .. }));
        assert_eq!(dump_state(&json!([])), MemoryState::default());
    }

    #[tokio::test]
    async fn what_is_written_is_known_after_a_crash() {
        let dir = tempfile::tempdir().unwrap();
        let (machine, _) = crate::machine::without_owner(dir.path().to_owned());
        demand_none(&machine).unwrap();
        let id = MemoryJobId(uuid::Uuid::from_u128(5));
        let now = Written { id: Some(id), kind: MemoryKind::Save, ran: true, begun: false };
        note(dir.path(), &now).await.unwrap();
        assert_eq!(read(dir.path()).unwrap(), Some(now));
        assert!(demand_none(&machine).unwrap_err().is(ErrorKind::Conflict));
        // Another, and a stop, are refused; what is none's is none.
        let other = MemoryJobId(uuid::Uuid::from_u128(6));
        assert_eq!(state(&machine, Some(other)).await.unwrap(), MemoryState::default());
        assert!(begin_stop(&machine).await.is_err_and(|e| e.is(ErrorKind::Conflict)));
        let file = File::open("/dev/null").unwrap();
        let refused = begin(&machine, other, MemoryJob::Save, file.into()).await;
        assert!(refused.unwrap_err().is(ErrorKind::Conflict));
        end(&machine, Some(other), MemoryEnd::Cancel).await.unwrap();
        assert!(end(&machine, None, MemoryEnd::Keep).await.unwrap_err().is(ErrorKind::Conflict));
        clear(dir.path()).unwrap();
        clear(dir.path()).unwrap();
        assert_eq!(read(dir.path()).unwrap(), None);
    }

    #[test]
    fn a_form_that_qemu_cannot_write_is_named() {
        let said = |text: &str| refused(Error::internal("QEMU refused", text), "kdump-lzo");
        let e = said("GenericError: kdump-lzo is not available now");
        assert!(e.is(ErrorKind::Unsupported) && e.message.contains("kdump-lzo"), "{e}");
        assert_eq!(e.field.as_deref(), Some("format"));
        assert!(said("GenericError: there is a dump in progress").is(ErrorKind::Internal));
    }
}
