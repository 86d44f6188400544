//! The moment of a snapshot: guests that run are paused around it and, where that is asked for, the file systems inside
//! virtual machines are made still before. So the snapshot is of one instant, and what it has of a frozen file system is
//! what an unmounted one has.
//!
//! Nobody is left frozen: whoever freezes thaws on every way out, the guest's own agent thaws after a minute, and so does
//! the host when control is gone.

use crate::{Records, saga::StepContext};
use karst_agent::{GuestQuiesce, GuestRef};
use karst_model::{
    Error, ErrorKind, NodeId, Result,
    guest::Observed,
    instance::{Instance, InstanceKind, Status},
    snapshot::{QUIESCE, Quiesce},
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

const CALL: Duration = Duration::from_secs(30);
/// How long file systems inside stay still at most, while the guest runs: until it is paused, and from its resumption on.
const STILL: Duration = Duration::from_secs(60);
/// How long a guest's agent may take to make them still, or to let them go on.
const AGENT: Duration = Duration::from_secs(45);

/// A guest that is paused for the moment of a snapshot.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct PausedGuest {
    pub(crate) at: GuestRef,
    pub(crate) node: NodeId,
    /// Are its file systems made still?
    #[serde(default)]
    pub(crate) quiesce: Quiesce,
}

/// What its configuration says of its file systems.
pub(crate) fn quiesce(records: &Records, instance: &Instance) -> Quiesce {
    let config = records.expanded(instance).0;
    let chosen = config.get(QUIESCE).and_then(|text| Quiesce::parse(QUIESCE, text).ok());
    chosen.filter(|_| instance.kind == InstanceKind::VirtualMachine).unwrap_or_default()
}

/// The guest of an instance that is to be paused while a snapshot is taken: one that runs and is not paused already. One that an
/// error halted could go on by itself in the middle of it: it is kept halted, and is halted as before when it is resumed.
pub(crate) fn guest(records: &Records, instance: &Instance) -> Option<PausedGuest> {
    let runtime = records.runtimes.get(&instance.id)?;
    let moves = match instance.status(Some(&runtime.value)) {
        Status::Running => true,
        // A container in an error has ended, and nobody has said so yet.
        Status::Error => instance.kind == InstanceKind::VirtualMachine,
        _ => false,
    };
    let at = GuestRef { instance: instance.id, generation: runtime.generation };
    moves.then(|| PausedGuest { at, node: instance.node, quiesce: quiesce(records, instance) })
}

/// What ended meanwhile needs neither pause nor resume.
fn unless_ended<T>(done: Result<T>) -> Result<Option<T>> {
    match done {
        Err(e) if matches!(e.kind, ErrorKind::NotFound | ErrorKind::Conflict) => Ok(None),
        other => other.map(Some),
    }
}

/// What is said of a guest whose file systems could not be made still, or not for long enough.
fn complaint(cx: &StepContext, guest: &PausedGuest, e: Error) -> Error {
    let name = cx.engine.instance_row(guest.at.instance).map(|row| row.name.to_string()).unwrap_or_default();
    let message = format!(
        "the file systems of instance {name:?} could not be made still: {}; {QUIESCE}=no does without",
        e.message
    );
    Error { message, field: None, ..e }
}

/// Makes file systems still where that is asked for, and pauses the guests. Answers what went without though it was tried.
pub(crate) async fn pause(cx: &StepContext, guests: &[PausedGuest]) -> Result<Vec<String>> {
    let mut warnings = vec![];
    for guest in guests.iter().filter(|g| g.quiesce != Quiesce::No) {
        let request = GuestQuiesce { guest: guest.at, limit: STILL };
        match cx.agent(guest.node)?.guest_quiesce(&cx.mutate(AGENT), request).await {
            Ok(_) => {}
            Err(e) if e.is(ErrorKind::NotFound) => {}
            Err(e) if guest.quiesce == Quiesce::Require => return Err(complaint(cx, guest, e)),
            Err(e) => warnings.push(complaint(cx, guest, e).message),
        }
    }
    for guest in guests {
        unless_ended(cx.agent(guest.node)?.guest_pause(&cx.mutate(CALL), guest.at).await)?;
    }
    for warning in &warnings {
        tracing::warn!("{warning}");
    }
    Ok(warnings)
}

/// Lets all of them go on, whatever becomes of one; then their file systems. The first failure is answered.
async fn go_on(
    cx: &StepContext,
    guests: &[PausedGuest],
    mut thawed: impl FnMut(&PausedGuest, Error) -> Result<()>,
) -> Result<Vec<Observed>> {
    let (mut seen, mut failure) = (vec![], None);
    for guest in guests {
        match unless_ended(cx.agent(guest.node)?.guest_resume(&cx.mutate(CALL), guest.at).await) {
            Ok(observed) => seen.extend(observed),
            Err(e) => drop(failure.get_or_insert(e)),
        }
    }
    for guest in guests.iter().filter(|g| g.quiesce != Quiesce::No) {
        if let Err(e) = cx.agent(guest.node)?.guest_thaw(&cx.mutate(AGENT), guest.at).await
            && !e.is(ErrorKind::NotFound)
            && let Err(e) = thawed(guest, e)
        {
            failure.get_or_insert(e);
        }
    }
    failure.map_or(Ok(seen), Err)
}

/// Lets guests go on after the snapshot. One that had to be still and was not for long enough fails it.
pub(crate) async fn resume(cx: &StepContext, guests: &[PausedGuest]) -> Result<Vec<Observed>> {
    go_on(cx, guests, |guest, e| {
        let e = complaint(cx, guest, e);
        if guest.quiesce == Quiesce::Require {
            return Err(e);
        }
        tracing::warn!("{e}");
        Ok(())
    })
    .await
}

/// The same when there is no snapshot to be had. A guest that does not thaw now is thawed by its own agent or its host.
pub(crate) async fn release(cx: &StepContext, guests: &[PausedGuest]) -> Result<()> {
    let done = go_on(cx, guests, |guest, e| {
        tracing::info!(instance = %guest.at.instance, error = %e, "a guest's file systems thaw by themselves");
        Ok(())
    });
    done.await.map(drop)
}
