//! What a machine is beside its disks, with each of its snapshots: the variables of its firmware, what its TPM keeps, and
//! its memory where that was asked for. A directory `states/SNAPSHOT` of the guest's, renamed into its place when whole.
//!
//! A machine that never ran has none of it; a snapshot that has no directory is of such a time. Memory is the same file by
//! another link: it is never written again.

use crate::{saved, tpm};
use karst_guest::MachineFiles;
use karst_model::{Error, Result, SnapshotId};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{ErrorKind, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
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
fn copy_files(from: &Path, to: &Path) -> Result<bool> {
    let entries = match std::fs::read_dir(from) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
        other => other?,
    };
    make(to)?;
    for entry in entries {
        let entry = entry?;
        // The directory is its user's, who may put something else there at any time.
        if entry.file_type()?.is_file()
            && let Some(content) = read_file(&entry.path())?
        {
            write_file(&to.join(entry.file_name()), &content)?;
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
    settle(dir, snapshot)
}

/// Gives what [`begin`] began its name, in place of what may have it.
fn settle(dir: &Path, snapshot: SnapshotId) -> Result<()> {
    let place = unfinished(dir, snapshot);
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

/// Bytes of a file of a state at most: variables have half a MiB, the files of a TPM some KiB.
const LARGEST: u64 = 4 << 20;
/// What swtpm's files are called that are worth keeping; others are locks and what is being written.
const OF_TPM: &str = "tpm2-";
/// Most files of a TPM: permanent, volatile and saved state, and what else it may come to have.
const MOST_OF_TPM: usize = 8;

fn read_file(path: &Path) -> Result<Option<Vec<u8>>> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = match File::options().read(true).custom_flags(flags).open(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    if !file.metadata()?.is_file() {
        return Err(Error::internal("the state of a virtual machine is not a file", path.display()));
    }
    let mut content = vec![];
    file.take(LARGEST + 1).read_to_end(&mut content)?;
    if content.len() as u64 > LARGEST {
        return Err(Error::internal("the state of a virtual machine is too large", path.display()));
    }
    Ok(Some(content))
}

fn write_file(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

/// What the machine in `dir` is beside its disks and memory, now or at a snapshot.
pub(crate) fn read(dir: &Path, at: Option<SnapshotId>) -> Result<MachineFiles> {
    let (place, tpm) = match at {
        None => (dir.to_owned(), tpm::state(dir)),
        Some(snapshot) => (finished(dir, snapshot), finished(dir, snapshot).join(TPM)),
    };
    let [variables, secure_variables] = VARIABLES.map(|name| read_file(&place.join(name)));
    let mut files = BTreeMap::new();
    let entries = match std::fs::read_dir(tpm) {
        Err(e) if e.kind() == ErrorKind::NotFound => None,
        other => Some(other?),
    };
    for entry in entries.into_iter().flatten() {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(OF_TPM)
            && entry.file_type()?.is_file()
            && let Some(content) = read_file(&entry.path())?
        {
            files.insert(name, content);
            if files.len() > MOST_OF_TPM {
                return Err(Error::invalid("tpm", format!("the TPM has more than {MOST_OF_TPM} files")));
            }
        }
    }
    Ok(MachineFiles { variables: variables?, secure_variables: secure_variables?, tpm: files })
}

/// Makes `state` what the machine in `dir` is, for its next start or at a snapshot. May be done again after a crash.
pub(crate) fn write(dir: &Path, at: Option<SnapshotId>, state: &MachineFiles) -> Result<()> {
    for name in state.tpm.keys() {
        if !name.starts_with(OF_TPM) || name.contains('/') {
            return Err(Error::invalid("tpm", format!("{name:?} is no file of a TPM")));
        }
    }
    let variables = || VARIABLES.into_iter().zip([&state.variables, &state.secure_variables]);
    if let Some(snapshot) = at {
        if state.is_empty() {
            return delete(dir, snapshot);
        }
        let place = begin(dir, snapshot)?;
        for (name, content) in variables() {
            if let Some(content) = content {
                write_file(&place.join(name), content)?;
            }
        }
        write_tpm(&place.join(TPM), state)?;
        return settle(dir, snapshot);
    }
    // Memory that was kept is not that of the machine which it becomes.
    saved::discard(dir)?;
    for (name, content) in variables() {
        let path = dir.join(name);
        match content {
            Some(content) => {
                let new = dir.join("nvram.new");
                write_file(&new, content)?;
                std::fs::rename(&new, &path)?;
            }
            None => match std::fs::remove_file(&path) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(e.into()),
                _ => {}
            },
        }
    }
    let place = tpm::state(dir);
    remove(&place)?;
    write_tpm(&place, state)?;
    if let Some(above) = place.parent().filter(|p| p.is_dir()) {
        File::open(above)?.sync_all()?;
    }
    Ok(File::open(dir)?.sync_all()?)
}

fn write_tpm(place: &Path, state: &MachineFiles) -> Result<()> {
    if state.tpm.is_empty() {
        return Ok(());
    }
    make(place)?;
    for (name, content) in &state.tpm {
        write_file(&place.join(name), content)?;
    }
    Ok(File::open(place)?.sync_all()?)
}

/// Deletes it; fine when there is none.
pub(crate) fn delete(dir: &Path, snapshot: SnapshotId) -> Result<()> {
    remove(&unfinished(dir, snapshot))?;
    remove(&finished(dir, snapshot))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_machine_is_becomes_anothers() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let at = SnapshotId(uuid::Uuid::from_u128(1));
        assert!(read(a.path(), None).unwrap().is_empty() && read(a.path(), Some(at)).unwrap().is_empty());
        std::fs::create_dir_all(tpm::state(a.path())).unwrap();
        for (name, text) in [("nvram.secure.fd", "keys"), ("tpm/state/tpm2-00.permall", "seed")] {
            std::fs::write(a.path().join(name), text).unwrap();
        }
        std::fs::write(a.path().join("tpm/state/.lock"), "").unwrap();
        let now = read(a.path(), None).unwrap();
        assert_eq!((now.variables.as_deref(), now.secure_variables.as_deref()), (None, Some(&b"keys"[..])));
        assert_eq!(now.tpm, BTreeMap::from([("tpm2-00.permall".to_owned(), b"seed".to_vec())]));
        assert!(!format!("{now:?}").contains("115"), "no bytes in a log: {now:?}");

        // As it was at a snapshot, and on to a snapshot of another.
        begin(a.path(), at).unwrap();
        complete(a.path(), at).unwrap();
        assert_eq!(read(a.path(), Some(at)).unwrap(), now);
        for _ in 0..2 {
            write(b.path(), Some(at), &now).unwrap();
            assert_eq!(read(b.path(), Some(at)).unwrap(), now);
        }
        assert!(read(b.path(), None).unwrap().is_empty());
        // What it was goes, its memory too.
        std::fs::create_dir(b.path().join("saved")).unwrap();
        std::fs::write(b.path().join("nvram.fd"), "old").unwrap();
        std::fs::write(b.path().join("saved/ram"), "old").unwrap();
        for _ in 0..2 {
            write(b.path(), None, &now).unwrap();
            assert_eq!(read(b.path(), None).unwrap(), now);
        }
        assert!(!b.path().join("saved").exists() && !b.path().join("nvram.fd").exists());
        restore(b.path(), at, false).unwrap();
        assert_eq!(read(b.path(), None).unwrap(), now);
        write(b.path(), Some(at), &MachineFiles::default()).unwrap();
        assert!(!there(b.path(), at));
        write(b.path(), None, &MachineFiles::default()).unwrap();
        assert!(read(b.path(), None).unwrap().is_empty());
        let wrong = MachineFiles { tpm: [("../x".to_owned(), vec![])].into(), ..MachineFiles::default() };
        assert!(write(b.path(), None, &wrong).is_err());
    }
}
