//! What a machine is beside its disks, with each of its snapshots: the variables of its firmware, what its TPM keeps, and
//! its memory where that was asked for. A directory `states/SNAPSHOT` of the guest's, renamed into its place when whole.
//!
//! A machine that never ran has none of it; a snapshot that has no directory is of such a time. Memory is the same file by
//! another link: it is never written again.

use crate::{saved, tpm};
use karst_model::{Error, Result, SnapshotId};
use std::{
    fs::File,
    io::ErrorKind,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

const STATES: &str = "states";
/// Variables of the firmware, of both kinds.
pub(crate) const VARIABLES: [&str; 2] = ["nvram.fd", "nvram.secure.fd"];
const TPM: &str = "tpm";

/// Where memory is kept with a snapshot that is being made.
pub(crate) fn unfinished(dir: &Path, snapshot: SnapshotId) -> PathBuf {
    dir.join(STATES).join(format!("{snapshot}.new"))
}

fn finished(dir: &Path, snapshot: SnapshotId) -> PathBuf {
    dir.join(STATES).join(snapshot.to_string())
}

/// Is it there?
pub(crate) fn there(dir: &Path, snapshot: SnapshotId) -> bool {
    finished(dir, snapshot).is_dir()
}

fn make(place: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new().mode(0o700).recursive(true).create(place)
}

fn remove(place: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(place) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn copy_file(from: &Path, to: &Path) -> std::io::Result<bool> {
    match std::fs::copy(from, to) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
        Ok(_) => File::open(to)?.sync_all().map(|()| true),
    }
}

/// The plain files of a directory; `false` when there is none.
fn copy_files(from: &Path, to: &Path) -> std::io::Result<bool> {
    let entries = match std::fs::read_dir(from) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
        other => other?,
    };
    make(to)?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            copy_file(&entry.path(), &to.join(entry.file_name()))?;
        }
    }
    File::open(to)?.sync_all()?;
    Ok(true)
}

/// Begins a state afresh.
pub(crate) fn begin(dir: &Path, snapshot: SnapshotId) -> Result<PathBuf> {
    let place = unfinished(dir, snapshot);
    remove(&place)?;
    make(&place)?;
    Ok(place)
}

/// Completes what [`begin`] began; memory that is kept over a stop goes along when nothing runs.
pub(crate) fn complete(dir: &Path, snapshot: SnapshotId) -> Result<()> {
    let place = unfinished(dir, snapshot);
    for name in VARIABLES {
        copy_file(&dir.join(name), &place.join(name))?;
    }
    copy_files(&tpm::state(dir), &place.join(TPM))?;
    link_memory(&saved::place(dir), &place)?;
    File::open(&place)?.sync_all()?;
    let finished = finished(dir, snapshot);
    remove(&finished)?;
    std::fs::rename(&place, &finished)?;
    File::open(dir.join(STATES))?.sync_all()?;
    Ok(())
}

/// The files of saved memory under another directory as well; nothing when there is none, or when it is there.
fn link_memory(from: &Path, to: &Path) -> Result<()> {
    if !saved::there(from) || saved::there(to) {
        return Ok(());
    }
    make(to)?;
    // The one that says that it is whole comes last.
    for name in saved::FILES {
        match std::fs::hard_link(from.join(name), to.join(name)) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            other => other?,
        }
    }
    Ok(())
}

/// Makes a machine that does not run what it was, its memory included if `memory`.
pub(crate) fn restore(dir: &Path, snapshot: SnapshotId, memory: bool) -> Result<()> {
    let from = finished(dir, snapshot);
    if memory && !saved::there(&from) {
        return Err(Error::not_found("the snapshot has no memory of the virtual machine"));
    }
    if !dir.is_dir() {
        return Ok(());
    }
    saved::discard(dir)?;
    for name in VARIABLES {
        let new = dir.join("nvram.new");
        if copy_file(&from.join(name), &new)? {
            std::fs::rename(&new, dir.join(name))?;
        } else {
            match std::fs::remove_file(dir.join(name)) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(e.into()),
                _ => {}
            }
        }
    }
    let state = tpm::state(dir);
    remove(&state)?;
    if copy_files(&from.join(TPM), &state)?
        && let Some(above) = state.parent()
    {
        File::open(above)?.sync_all()?;
    }
    if memory {
        link_memory(&from, &saved::place(dir))?;
    }
    File::open(dir)?.sync_all()?;
    Ok(())
}

/// Deletes it; fine when there is none.
pub(crate) fn delete(dir: &Path, snapshot: SnapshotId) -> Result<()> {
    remove(&unfinished(dir, snapshot))?;
    remove(&finished(dir, snapshot))?;
    Ok(())
}
