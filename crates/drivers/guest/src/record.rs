//! What a driver writes down of a guest that runs, in the guest's state directory.
//!
//! It is replaced by rename and not synced: it is of no use without the guest, which ends with the power. So a kill of the
//! daemon never tears it, and what a power cut has torn tells of nothing that is there.

use crate::keeper;
use karst_model::{Error, Result};
use serde::de::DeserializeOwned;
use std::{
    collections::BTreeSet,
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::Mutex,
};

/// Reads the record `name` of the guest in `dir`; `None` when there is none, or only one that a power cut left empty or torn.
///
/// # Errors
/// When it cannot be read, and when it says nothing though the guest runs.
pub fn read<T: DeserializeOwned>(dir: &Path, name: &str) -> Result<Option<T>> {
    let path = dir.join(name);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    match serde_json::from_slice(&text) {
        Ok(record) => Ok(Some(record)),
        Err(e) if keeper::is_alive(dir) => {
            Err(Error::internal("the guest's record cannot be read", e).with_context(dir.display()))
        }
        Err(e) => {
            // Left where it is: the guest's next start, which may be writing it now, replaces it.
            if first(dir) {
                tracing::warn!(
                    dir = %dir.display(), error = %e,
                    "a guest's record was lost with the power, and with it only what ran then"
                );
            }
            Ok(None)
        }
    }
}

/// The first time that this is said of `dir`.
fn first(dir: &Path) -> bool {
    static SAID: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    SAID.lock().unwrap_or_else(|e| e.into_inner()).insert(dir.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_power_cut_tore_is_as_good_as_none() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("guest.json");
        assert_eq!(read::<u32>(dir.path(), "guest.json").unwrap(), None);
        for torn in ["", "{\"version\": 1, \"inst", "\0\0\0\0"] {
            std::fs::write(&file, torn).unwrap();
            assert_eq!(read::<u32>(dir.path(), "guest.json").unwrap(), None, "{torn:?}");
        }
        std::fs::write(&file, "7").unwrap();
        assert_eq!(read(dir.path(), "guest.json").unwrap(), Some(7));
    }
}
