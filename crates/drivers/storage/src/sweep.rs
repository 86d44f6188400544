//! What is half-made and what is deleted: both leave by the trash, which one task empties.

use crate::{
    FilePool,
    files::{blocking, fresh},
    layers,
    states::States,
};
use std::{
    collections::HashSet,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
};
use tokio::sync::{mpsc, oneshot};

/// Places in `tmp` that are in the making. What lies there and is none of them was begun by a thread whose caller had been cancelled
/// before it came to it.
#[derive(Debug, Default)]
pub(crate) struct Live(Mutex<HashSet<PathBuf>>);

impl Live {
    fn all(&self) -> MutexGuard<'_, HashSet<PathBuf>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(crate) fn insert(&self, path: &Path) {
        self.all().insert(path.to_owned());
    }

    /// Moves what nobody answers for from `tmp` to the trash.
    fn clear(&self, root: &Path) -> io::Result<()> {
        let entries = match std::fs::read_dir(root.join("tmp")) {
            // The pool was removed.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        for entry in entries.flatten() {
            let path = entry.path();
            if !self.all().contains(&path) {
                match std::fs::rename(path, fresh(&root.join("trash"))) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// A place in `tmp`: to the trash unless it was kept, whatever ended the work (error, cancellation).
pub(crate) struct Work {
    pub(crate) pool: FilePool,
    pub(crate) path: Option<PathBuf>,
}

impl Work {
    pub(crate) fn path(&self) -> &Path {
        self.path.as_deref().unwrap_or(Path::new("/nonexistent"))
    }

    pub(crate) fn keep(mut self) {
        if let Some(path) = self.path.take() {
            self.pool.live.all().remove(&path);
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Some(work) = self.path.take() {
            self.pool.live.all().remove(&work);
            match std::fs::rename(&work, fresh(&self.pool.root.join("trash"))) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(error = %e, "a half-made volume was left; the next start removes it");
                }
                _ => self.pool.wake_sweeper(),
            }
        }
    }
}

/// Frees deleted states, one after the other. Ends with the pool.
pub(crate) async fn sweeper(
    root: PathBuf,
    states: Arc<dyn States>,
    taking: Arc<tokio::sync::Mutex<()>>,
    live: Arc<Live>,
    mut wanted: mpsc::Receiver<Option<oneshot::Sender<()>>>,
) {
    while let Some(answer) = wanted.recv().await {
        let (root, states, taking) = (root.clone(), states.clone(), taking.clone());
        let live = live.clone();
        let swept = blocking(move || {
            live.clear(&root)?;
            let entries = match std::fs::read_dir(root.join("trash")) {
                // The pool was removed since this was asked for.
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
                other => other?,
            };
            let gone = {
                let _one = taking.blocking_lock();
                // Space of what was deleted is freed whatever is wrong with some record.
                layers::reap(&root).unwrap_or_else(|e| {
                    let context = e.context.as_deref();
                    tracing::warn!(error = %e, context, "images that nobody needs any more could not be looked for");
                    vec![]
                })
            };
            for state in entries.flatten().map(|e| e.path()).chain(gone) {
                match states.remove(&state) {
                    // Its making was cancelled and is just noticing; the next sweep gets it.
                    Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {}
                    Err(e) if e.kind() != io::ErrorKind::NotFound => {
                        tracing::warn!(error = %e, volume = ?state.file_name(), "a deleted volume could not be freed");
                    }
                    _ => {}
                }
            }
            Ok(())
        })
        .await;
        if let Err(e) = swept {
            tracing::warn!(error = %e, context = e.context, "deleted volumes could not be freed");
        }
        if let Some(answer) = answer {
            let _ = answer.send(());
        }
    }
}
