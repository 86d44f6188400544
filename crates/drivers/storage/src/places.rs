//! How a state gets its name, where the file system knows more of renames than to replace (`RENAME_NOREPLACE`, `RENAME_EXCHANGE`), and
//! where it does not (NFS, 9p, most of FUSE).
//!
//! Without an exchange what is to come stands beside what is there, as `<volume>.next`, which is no volume's name: it is whole before the
//! old one goes, and takes its name after. Whoever is killed in between is followed by [`recover`]: with the old one there nothing has
//! happened, without it the new one is the volume.

use crate::files::fresh;
use rustix::{
    fs::{CWD, RenameFlags, renameat_with},
    io::Errno,
};
use std::{io, path::Path};

/// What a name has that is about to be a volume's.
const NEXT: &str = "next";

/// Is that the answer of a file system that does not know the flag?
fn unknown(e: Errno) -> bool {
    matches!(e, Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP)
}

/// Gives a state its name, unless another has it: then false, and nothing has changed.
pub(crate) fn give_name(from: &Path, to: &Path) -> io::Result<bool> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) => Ok(false),
        // A state has its record in it: no directory that holds something is replaced by another.
        Err(e) if unknown(e) => match rustix::fs::rename(from, to) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST | Errno::NOTEMPTY) => Ok(false),
            Err(e) => Err(e.into()),
        },
        Err(e) => Err(e.into()),
    }
}

/// Puts the state `new` in the place of the volume's state `now`; what was there is at `new` afterwards.
pub(crate) fn exchange(new: &Path, now: &Path) -> io::Result<()> {
    match renameat_with(CWD, new, CWD, now, RenameFlags::EXCHANGE) {
        // An overlay below exchanges no directories that are a lower layer's.
        Err(e) if unknown(e) || e == Errno::XDEV => {}
        other => return Ok(other?),
    }
    let next = now.with_extension(NEXT);
    rustix::fs::rename(new, &next)?;
    if let Err(e) = rustix::fs::rename(now, new) {
        // It is as it was, but for what was to come.
        rustix::fs::rename(&next, new)?;
        return Err(e.into());
    }
    Ok(rustix::fs::rename(&next, now)?)
}

/// Ends exchanges that were interrupted, in a pool that nobody works on.
pub(crate) fn recover(root: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(root.join("volumes"))?.flatten() {
        let next = entry.path();
        let volume = next.file_stem().and_then(|n| n.to_str()).filter(|n| n.parse::<uuid::Uuid>().is_ok());
        let (Some(volume), true) = (volume, next.extension().is_some_and(|e| e == NEXT)) else { continue };
        let now = root.join("volumes").join(volume);
        let to = if now.exists() { fresh(&root.join("trash")) } else { now };
        std::fs::rename(&next, to)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(at: &Path, text: &str) {
        std::fs::create_dir(at).unwrap();
        std::fs::write(at.join("volume.json"), text).unwrap();
    }

    #[test]
    fn a_name_is_given_once_and_exchanged_whole() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        state(&at("a"), "a");
        state(&at("b"), "b");
        assert!(!give_name(&at("a"), &at("b")).unwrap());
        exchange(&at("a"), &at("b")).unwrap();
        let read = |name: &str| std::fs::read_to_string(at(name).join("volume.json")).unwrap();
        assert_eq!((read("a").as_str(), read("b").as_str()), ("b", "a"));
        assert!(give_name(&at("a"), &at("c")).unwrap() && !at("a").exists());
        // What is done where no flag is known: the same directory is not replaced.
        assert!(matches!(rustix::fs::rename(at("c"), at("b")), Err(Errno::EXIST | Errno::NOTEMPTY)));
        assert!(unknown(Errno::INVAL) && !unknown(Errno::EXIST));
    }

    #[test]
    fn an_interrupted_exchange_has_either_happened_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        for name in ["volumes", "trash"] {
            std::fs::create_dir(root.join(name)).unwrap();
        }
        let (before, after) = (uuid::Uuid::from_u128(1).to_string(), uuid::Uuid::from_u128(2).to_string());
        let at = |name: &str| root.join("volumes").join(name);
        state(&at(&before), "old");
        state(&at(&format!("{before}.next")), "new");
        state(&at(&format!("{after}.next")), "new");
        state(&at("foreign.next"), "left alone");
        recover(root).unwrap();
        let read = |name: &str| std::fs::read_to_string(at(name).join("volume.json")).unwrap();
        assert_eq!((read(&before).as_str(), read(&after).as_str()), ("old", "new"));
        let mut left: Vec<_> =
            std::fs::read_dir(root.join("volumes")).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, [before.as_str(), after.as_str(), "foreign.next"]);
        assert_eq!(std::fs::read_dir(root.join("trash")).unwrap().count(), 1);
    }
}
