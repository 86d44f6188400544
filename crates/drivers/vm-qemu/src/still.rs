//! Who sees to it that file systems inside a guest, once made still, go on again, whatever becomes of who asked for it.
//!
//! A mark in the guest's directory (`still`) is there before they are made still, and says afterwards whether they went
//! on too early. Karst's own agent lets them go on after its limit; QEMU's has none. So a task here does it for both: when
//! the machine has run with the mark for longer than the limit, also after the host's process was started anew.

use crate::machine::Machine;
use karst_model::{Error, ErrorKind, Result, instance::RuntimeState};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::{Duration, SystemTime},
};

const FILE: &str = "still";
/// What the mark says: still, and since when; or that they went on too early.
const STILL: &str = "still ";
const OVER: &str = "over";
/// Between two looks at a machine that is marked.
const LOOK: Duration = Duration::from_secs(5);
const SELDOM: Duration = Duration::from_secs(60);
/// The limit of one that was marked by an earlier process.
const LIMIT: Duration = Duration::from_secs(60);

fn place(dir: &Path) -> PathBuf {
    dir.join(FILE)
}

/// The mark of one that is still, as far as is known here.
pub(crate) fn marked(dir: &Path) -> Option<String> {
    std::fs::read_to_string(place(dir)).ok().filter(|text| text.starts_with(STILL))
}

fn mark(dir: &Path) -> Result<String> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let text = format!("{STILL}{}", now.as_nanos());
    std::fs::write(place(dir), &text)?;
    Ok(text)
}

/// Nothing of an earlier run counts.
pub(crate) fn clear(dir: &Path) -> Result<()> {
    match std::fs::remove_file(place(dir)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

fn over() -> Error {
    Error::conflict(
        "the file systems of the guest went on before the snapshot was done, because it took too long; try again",
    )
}

/// Makes the file systems of a machine still.
pub(crate) async fn freeze(machine: &Arc<Machine>, limit: Duration) -> Result<u32> {
    let dir = &machine.dir;
    let _turn = machine.still.lock().await;
    match machine.now().state {
        // By an earlier call, which was broken off.
        RuntimeState::Paused if marked(dir).is_some() => return Ok(0),
        RuntimeState::Running | RuntimeState::Stopping => {}
        RuntimeState::Paused => return Err(Error::conflict("the guest is frozen; resume it first")),
        RuntimeState::Error => {
            return Err(Error::conflict(
                "the guest is halted by an error, and nobody inside can make them so",
            ));
        }
        _ => return Err(Error::conflict("the guest does not run")),
    }
    if marked(dir).is_some() {
        in_turn(machine).await.or_else(|e| if e.is(ErrorKind::Conflict) { Ok(0) } else { Err(e) })?;
    }
    // What an earlier one came to is nobody's answer any more.
    clear(dir)?;
    machine.inside.there().await?;
    watch(machine, mark(dir)?, limit);
    match machine.inside.freeze(limit).await {
        // It may still come to it.
        Err(e) if matches!(e.kind, ErrorKind::Unavailable | ErrorKind::Timeout) => Err(e),
        Err(e) => {
            clear(dir)?;
            Err(e)
        }
        Ok(count) => Ok(count),
    }
}

/// Lets them go on.
pub(crate) async fn thaw(machine: &Machine) -> Result<u32> {
    let _turn = machine.still.lock().await;
    in_turn(machine).await
}

async fn in_turn(machine: &Machine) -> Result<u32> {
    let dir = &machine.dir;
    match std::fs::read_to_string(place(dir)) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Ok(text) if text == OVER => return Err(over()),
        _ => {}
    }
    match machine.inside.thaw().await {
        Ok(count) => {
            clear(dir)?;
            Ok(count)
        }
        Err(e) if e.is(ErrorKind::Conflict) => {
            // A call that is repeated hears the same.
            std::fs::write(place(dir), OVER)?;
            Err(over())
        }
        Err(e) => Err(e),
    }
}

/// Sees to a machine that is marked; nothing to do for one that is not.
pub(crate) fn adopted(machine: &Arc<Machine>) {
    if let Some(mark) = marked(&machine.dir) {
        watch(machine, mark, LIMIT);
    }
}

fn watch(machine: &Arc<Machine>, mark: String, limit: Duration) {
    let (machine, instance) = (Arc::downgrade(machine), machine.record().instance);
    tokio::spawn(async move {
        if let Err(e) = go_on(&machine, &mark, limit).await {
            tracing::warn!(%instance, error = %e, "the file systems of a guest may stay frozen");
        }
    });
}

async fn go_on(machine: &Weak<Machine>, mark: &str, limit: Duration) -> Result<()> {
    let (mut ran, mut wait) = (Duration::ZERO, LOOK);
    loop {
        tokio::time::sleep(wait).await;
        let Some(machine) = machine.upgrade() else { return Ok(()) };
        let _turn = machine.still.lock().await;
        if marked(&machine.dir).as_deref() != Some(mark) {
            return Ok(());
        }
        match machine.now().state {
            RuntimeState::Stopped => return Ok(()),
            // Told to shut down it cannot: its file systems are still.
            RuntimeState::Running | RuntimeState::Stopping => ran += wait,
            _ => {}
        }
        if ran <= limit {
            continue;
        }
        match machine.inside.thaw().await {
            // While nobody answers it is asked again: that is all that is left.
            Err(e) if !e.is(ErrorKind::Conflict) => wait = (wait * 2).min(SELDOM),
            _ => {
                std::fs::write(place(&machine.dir), OVER)?;
                let instance = machine.record().instance;
                tracing::warn!(%instance, "nobody let the file systems of a guest go on: the host did");
                return Ok(());
            }
        }
    }
}
