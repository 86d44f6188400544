//! What was copied into a state is on disk some time after the state was made: to wait for it would cost the copy's time again.
//! Until then the state carries a mark with the id of the host's boot. A mark of another boot says that the power went in between,
//! and that files may be missing or empty: such a state is neither started nor copied nor read.
//!
//! The mark is made before the state gets its name, and goes, durably, after its file system was synced. Who ends the daemon
//! in the ordinary way waits for that, so that only a power cut (or kill -9 with a restart of the machine at once) leaves one.
//!
//! That is for what can be made again: of an image. What was copied from elsewhere, whose source may be deleted next, is on disk
//! before it gets its name, and so is what takes an old content's place. A snapshot's taker, who may keep a guest waiting
//! meanwhile, asks for a flush after it ([`crate::PoolDriver::flush`]).

use karst_model::{Error, Result};
use std::{
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};
use tokio::sync::{mpsc, oneshot};

/// Name of the mark in a state.
const MARK: &str = "unflushed";
/// What is made within this time is synced together.
const GATHER: Duration = Duration::from_secs(2);

fn boot() -> io::Result<&'static str> {
    static BOOT: OnceLock<String> = OnceLock::new();
    if let Some(boot) = BOOT.get() {
        return Ok(boot);
    }
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(BOOT.get_or_init(|| text.trim().to_owned()))
}

fn none<T>(outcome: io::Result<T>) -> io::Result<Option<T>> {
    match outcome {
        Ok(found) => Ok(Some(found)),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Marks a state in the making.
pub(crate) fn mark(state: &Path) -> Result<()> {
    Ok(std::fs::write(state.join(MARK), boot()?)?)
}

/// Refuses a state that a power cut may have left incomplete.
///
/// # Errors
/// Conflict.
pub(crate) fn check(state: &Path) -> Result<()> {
    // An empty mark is another boot's too: the file was there before its content.
    match none(std::fs::read(state.join(MARK)))? {
        Some(text) if text != boot()?.as_bytes() => Err(Error::conflict(
            "its files were written in the last seconds before this host lost its power, and may be incomplete; \
             restore a snapshot of it, or delete it and make it again",
        )
        .with_context(state.display())),
        _ => Ok(()),
    }
}

/// Puts a state in the making on disk, its mark away: before it gets its name. One that was `filled` although it has no mark
/// (native clones need none) as well.
pub(crate) fn finish(state: &Path, filled: bool) -> Result<()> {
    let marked = none(std::fs::metadata(state.join(MARK)))?.is_some();
    if !marked && !filled {
        return Ok(());
    }
    let directory = File::open(state)?;
    rustix::fs::syncfs(&directory).map_err(io::Error::from)?;
    if marked {
        std::fs::remove_file(state.join(MARK))?;
        directory.sync_all()?;
    }
    Ok(())
}

/// Who waits for a flush; none: it is to be done some time.
pub(crate) type Waiter = Option<oneshot::Sender<Result<()>>>;

/// Syncs the pool at `root` when asked, and takes the marks away of what was there before. Ends with the pool.
pub(crate) async fn flusher(root: Arc<PathBuf>, mut wanted: mpsc::Receiver<Waiter>) {
    while let Some(first) = wanted.recv().await {
        let mut answer = first;
        if answer.is_none() {
            let waiting = async {
                while let Some(next) = wanted.recv().await {
                    if next.is_some() {
                        return next;
                    }
                }
                None
            };
            // The time is up, or somebody waits, or the pool has ended: it is synced in each case.
            answer = tokio::time::timeout(GATHER, waiting).await.ok().flatten();
        }
        let at = root.clone();
        let flushed = match tokio::task::spawn_blocking(move || flush(&at)).await {
            Ok(outcome) => outcome.map_err(Error::from),
            // The process ends, and it had not begun: the marks stay, and the next one sees them.
            Err(e) if e.is_cancelled() => return,
            Err(e) => Err(Error::internal("a task ended unexpectedly", e)),
        };
        if let Err(e) = &flushed {
            tracing::warn!(error = %e, "new volumes are not known to be on disk");
        }
        if let Some(answer) = answer {
            let _ = answer.send(flushed); // nobody waits any more
        }
    }
}

/// Marks of this boot below `volumes` and `snapshots`, each with its inode: a state that takes another's place has another.
fn marks(root: &Path) -> io::Result<Vec<(PathBuf, u64)>> {
    let entries =
        |dir: PathBuf| io::Result::Ok(none(std::fs::read_dir(dir))?.into_iter().flatten().flatten());
    let mut states: Vec<_> = entries(root.join("volumes"))?.map(|e| e.path()).collect();
    for volume in entries(root.join("snapshots"))? {
        states.extend(entries(volume.path())?.map(|e| e.path()));
    }
    let mut found = vec![];
    for state in states {
        if let Some(text) = none(std::fs::read(state.join(MARK)))?
            && text == boot()?.as_bytes()
            && let Some(mark) = none(std::fs::metadata(state.join(MARK)))?
        {
            found.push((state, mark.ino()));
        }
    }
    Ok(found)
}

fn flush(root: &Path) -> io::Result<()> {
    let marks = marks(root)?;
    if marks.is_empty() {
        return Ok(());
    }
    rustix::fs::syncfs(File::open(root)?)?;
    for (state, inode) in marks {
        let mark = state.join(MARK);
        if none(std::fs::metadata(&mark))?.is_some_and(|m| m.ino() == inode) {
            none(std::fs::remove_file(&mark))?;
            if let Some(state) = none(File::open(&state))? {
                state.sync_all()?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_of_another_boot_refuses() {
        let d = tempfile::tempdir().unwrap();
        let state = d.path().join("volumes/v");
        std::fs::create_dir_all(&state).unwrap();
        check(&state).unwrap();
        mark(&state).unwrap();
        check(&state).unwrap();
        flush(d.path()).unwrap();
        assert!(!state.join(MARK).exists());
        for other in ["", "8b5e2a0e-0000-4000-8000-000000000000"] {
            std::fs::write(state.join(MARK), other).unwrap();
            flush(d.path()).unwrap();
            let e = check(&state).unwrap_err();
            assert!(e.is(karst_model::ErrorKind::Conflict) && e.message.contains("lost its power"), "{e}");
        }
    }
}
