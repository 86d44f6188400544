//! What liblxc leaves behind: for each container that it ever touched a directory `/run/lxc/lock/PATH`, in which its lock
//! lies or lay. PATH is what `-P` gave it, here the guest's state directory.
//!
//! A guest's own directory there is made before `lxc-start` makes it and goes when the guest does. Those above it, which lead
//! to it and may be another's too, go with the daemon, as far as nothing is in them.

use karst_model::{Error, Result};
use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

const PLACE: &str = "/run/lxc/lock";

/// Where liblxc keeps the lock of what lies in `dir`.
fn place_of(top: &Path, dir: &Path) -> PathBuf {
    // It appends the text as it is.
    let inner = dir.components().filter(|c| matches!(c, Component::Normal(_) | Component::ParentDir));
    top.join(inner.collect::<PathBuf>())
}

fn may_be_missing(outcome: io::Result<()>, at: &Path) -> Result<()> {
    match outcome {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::from(e).with_context(at.display())),
        _ => Ok(()),
    }
}

/// Makes the directory of the guest in `dir`, so that nobody who clears up above it takes away what leads there while
/// `lxc-start` makes it step by step.
pub(crate) fn prepare(dir: &Path) -> Result<()> {
    prepare_in(Path::new(PLACE), dir)
}

fn prepare_in(top: &Path, dir: &Path) -> Result<()> {
    let place = place_of(top, dir);
    let mut made = fs::create_dir_all(&place);
    for _ in 0..100 {
        match &made {
            Err(e) if e.kind() == io::ErrorKind::NotFound => made = fs::create_dir_all(&place),
            _ => break,
        }
    }
    made.map_err(|e| Error::from(e).with_context(place.display()))
}

/// Removes that of the guest in `dir`, which no longer runs.
pub(crate) fn remove(dir: &Path) -> Result<()> {
    let place = place_of(Path::new(PLACE), dir);
    may_be_missing(fs::remove_dir_all(&place), &place)
}

/// Removes those of all guests whose state directories lie in `guests_dir`, and what led there as far as nothing else is in
/// it. No container of them runs any more.
///
/// # Errors
/// When something will not go.
pub fn leave(guests_dir: &Path) -> Result<()> {
    leave_in(Path::new(PLACE), guests_dir)
}

fn leave_in(top: &Path, guests_dir: &Path) -> Result<()> {
    let place = place_of(top, guests_dir);
    may_be_missing(fs::remove_dir_all(&place), &place)?;
    // liblxc's own two directories as well: it makes them when it needs them.
    let last = top.parent().unwrap_or(top);
    for above in place.ancestors().skip(1).take_while(|p| p.starts_with(last)) {
        match fs::remove_dir(above) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => break,
            Err(e) => return Err(Error::from(e).with_context(above.display())),
        }
    }
    Ok(())
}

/// Names of those in `guests_dir` for which liblxc keeps something.
pub fn kept(guests_dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(place_of(Path::new(PLACE), guests_dir)).into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().into_string().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_liblxc_left_goes_and_what_is_anothers_stays() {
        let base = tempfile::tempdir().unwrap();
        let top = base.path().join("lxc/lock");
        let (mine, others) = (Path::new("/srv/one/host/guests"), Path::new("/srv/two/host/guests"));
        for dir in [mine.join("a"), mine.join("b"), others.join("c")] {
            prepare_in(&top, &dir).unwrap();
            fs::write(place_of(&top, &dir).join(".lock"), "").unwrap();
        }
        assert!(top.join("srv/one/host/guests/a/.lock").exists());
        leave_in(&top, mine).unwrap();
        leave_in(&top, mine).unwrap();
        assert!(!top.join("srv/one").exists() && top.join("srv/two/host/guests/c/.lock").exists());
        fs::write(base.path().join("lxc/network_up"), "").unwrap();
        leave_in(&top, others).unwrap();
        assert!(!top.exists() && base.path().join("lxc/network_up").exists());
        fs::remove_file(base.path().join("lxc/network_up")).unwrap();
        prepare_in(&top, others).unwrap();
        leave_in(&top, others).unwrap();
        assert!(!base.path().join("lxc").exists() && base.path().exists());
    }
}
