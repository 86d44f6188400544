//! Limits of the kernel that all daemons of the machine share: who needs more raises one, and what it was is noted before; the
//! last daemon that leaves gives it back.
//!
//! The notes lie in a directory that is gone with the next boot, as what was raised is. One file a limit: its first line is what
//! the limit was, each other one what it was raised to. Who reads or writes it has the directory locked, for moments: a daemon
//! that stands still with the lock keeps no other one waiting for long.

use crate::sysctl;
use karst_model::{Error, Result};
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use std::{
    fs::{self, File},
    io::ErrorKind,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::PathBuf,
    time::Duration,
};

/// How often it is tried to lock the notes, and the wait after each.
const TRIES: (u32, Duration) = (100, Duration::from_millis(10));

/// One limit.
#[derive(Debug, Clone)]
pub struct SharedLimit {
    name: String,
    setting: PathBuf,
    notes: PathBuf,
}

impl SharedLimit {
    /// The kernel setting `key`, with its note in the directory `notes`, which is made when it is needed.
    ///
    /// # Errors
    /// Internal, for a name that no setting has.
    pub fn new(notes: impl Into<PathBuf>, key: &[&str]) -> Result<Self> {
        Ok(Self { name: key.join("."), setting: sysctl::path(key)?, notes: notes.into() })
    }

    /// What it is; `None` when this kernel has no such limit.
    fn now(&self) -> Result<Option<u64>> {
        match fs::read_to_string(&self.setting) {
            Ok(text) => Ok(text.trim_end().parse().ok()),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::internal("a limit of the kernel could not be read", e)),
        }
    }

    fn set(&self, value: u64) -> Result<()> {
        let failed = |e| Error::internal(format!("the limit {} could not be changed", self.name), e);
        fs::write(&self.setting, value.to_string()).map_err(failed)
    }

    /// What it was, and what it was raised to since; nothing when it was not.
    fn noted(&self) -> Result<Vec<u64>> {
        match fs::read_to_string(self.notes.join(&self.name)) {
            Ok(text) => Ok(text.lines().filter_map(|l| l.parse().ok()).collect()),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(vec![]),
            Err(e) => Err(e.into()),
        }
    }

    /// The directory of the notes, locked; `None` when there is none and it is not to be made.
    fn locked(&self, make: bool) -> Result<Option<File>> {
        for _ in 0..TRIES.0 {
            if make {
                fs::DirBuilder::new().recursive(true).mode(0o755).create(&self.notes)?;
            }
            let directory = match File::open(&self.notes) {
                // Another daemon took it away meanwhile.
                Err(e) if e.kind() == ErrorKind::NotFound && make => continue,
                Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
                directory => directory?,
            };
            match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {
                    let ours = directory.metadata()?;
                    let is = |now: fs::Metadata| (now.dev(), now.ino()) == (ours.dev(), ours.ino());
                    if fs::metadata(&self.notes).is_ok_and(is) {
                        return Ok(Some(directory));
                    }
                }
                Err(Errno::WOULDBLOCK) => std::thread::sleep(TRIES.1),
                Err(e) => return Err(std::io::Error::from(e).into()),
            }
        }
        let text = format!(
            "the limit {} is being changed by another daemon of this machine, which does not get done",
            self.name
        );
        Err(Error::unavailable(text))
    }

    /// Brings it up to `least`, never down. Blocks for moments. `false` when it was there already, or this kernel has no such limit.
    ///
    /// # Errors
    /// Internal, or unavailable while another daemon does not get done with it; then it is as it was.
    pub fn raise(&self, least: u64) -> Result<bool> {
        // With a note of it, somebody may be about to give it back: what it is counts for who has the lock only.
        let noted = self.notes.join(&self.name).exists();
        if self.now()?.is_none_or(|now| now >= least && !noted) {
            return Ok(false);
        }
        let _locked = self.locked(true)?;
        // Another daemon may have been here meanwhile.
        let Some(now) = self.now()?.filter(|now| *now < least) else { return Ok(false) };
        let mut noted = self.noted()?;
        if !noted.contains(&now) {
            // Neither what it was nor ours: somebody wants it to be this.
            noted = vec![now];
        }
        noted.push(least);
        let text: String = noted.iter().map(|n| format!("{n}\n")).collect();
        let fresh = self.notes.join(format!("{}.new", self.name));
        fs::write(&fresh, text)?;
        fs::rename(&fresh, self.notes.join(&self.name))?;
        self.set(least)?;
        Ok(true)
    }

    /// Makes it what it was, unless it is something else by now than what it was raised to; and removes the notes. Nothing is done
    /// while another daemon of the machine needs it: `unneeded` is asked when none can raise it any more, so that who says that it
    /// needs it, and raises it then, finds it raised.
    ///
    /// # Errors
    /// As of [`Self::raise`]; it can be called again.
    pub fn give_back(&self, unneeded: impl FnOnce() -> bool) -> Result<()> {
        let Some(_locked) = self.locked(false)? else { return Ok(()) };
        if !unneeded() {
            return Ok(());
        }
        if let [before, raised @ ..] = self.noted()?.as_slice()
            && self.now()?.is_some_and(|now| raised.contains(&now))
        {
            self.set(*before)?;
        }
        for name in [self.name.clone(), format!("{}.new", self.name)] {
            match fs::remove_file(self.notes.join(name)) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(e.into()),
                _ => {}
            }
        }
        // Where notes of another limit are it stays.
        let _ = fs::remove_dir(&self.notes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_to_leave_gives_back_what_was_raised() {
        let dir = tempfile::tempdir().unwrap();
        let (setting, notes) = (dir.path().join("setting"), dir.path().join("karst/limits"));
        let limit =
            SharedLimit { name: "fs.some.limit".into(), setting: setting.clone(), notes: notes.clone() };
        let is = || fs::read_to_string(&setting).unwrap().trim_end().parse::<u64>().unwrap();
        let write = |text: &str| fs::write(&setting, text).unwrap();
        assert!(!limit.raise(10).unwrap(), "this kernel has none");
        limit.give_back(|| true).unwrap();
        write("no number\n");
        assert!(!limit.raise(10).unwrap());
        write("128\n");
        assert!(!limit.raise(128).unwrap() && !limit.raise(2).unwrap());
        assert_eq!((is(), notes.exists()), (128, false), "never lowered, and nothing noted");
        // Twice, by two daemons: it was what it was before the first.
        assert!(limit.raise(1024).unwrap() && limit.clone().raise(2048).unwrap());
        assert!(!limit.raise(1024).unwrap());
        assert_eq!(is(), 2048);
        limit.give_back(|| true).unwrap();
        assert_eq!((is(), notes.exists()), (128, false));
        limit.give_back(|| true).unwrap();
        // Died between two raises, after the note was written and before it was followed.
        limit.raise(1024).unwrap();
        fs::write(notes.join("fs.some.limit"), "128\n1024\n2048\n").unwrap();
        limit.give_back(|| true).unwrap();
        assert_eq!(is(), 128);
        // The administrator's own wish is kept, and is what it was when more is needed later.
        limit.raise(1024).unwrap();
        write("5000\n");
        limit.give_back(|| true).unwrap();
        assert_eq!(is(), 5000);
        write("128\n");
        limit.raise(1024).unwrap();
        write("512\n");
        limit.raise(1024).unwrap();
        limit.give_back(|| true).unwrap();
        assert_eq!((is(), notes.exists()), (512, false));
    }

    #[test]
    fn who_begins_while_the_last_leaves_has_it_raised() {
        let dir = tempfile::tempdir().unwrap();
        let (setting, notes) = (dir.path().join("setting"), dir.path().join("limits"));
        let limit =
            SharedLimit { name: "fs.some.limit".into(), setting: setting.clone(), notes: notes.clone() };
        fs::write(&setting, "128\n").unwrap();
        let is = || fs::read_to_string(&setting).unwrap();
        assert!(limit.raise(1024).unwrap());
        limit.give_back(|| false).unwrap();
        assert_eq!((is().as_str(), notes.exists()), ("1024", true), "another needs it");
        // It says so too late to be seen, and finds the limit high enough: it waits for what comes of it.
        std::thread::scope(|scope| {
            let mut other = None;
            let unneeded = || {
                other = Some(scope.spawn(|| {
                    loop {
                        match limit.raise(1024) {
                            // Who gives it back may stand still for longer than is waited for; it is called again then.
                            Err(e) if e.is(karst_model::ErrorKind::Unavailable) => {}
                            raised => return raised.unwrap(),
                        }
                    }
                }));
                std::thread::sleep(TRIES.1 * 3);
                true
            };
            limit.give_back(unneeded).unwrap();
            assert!(other.unwrap().join().unwrap(), "raised anew");
        });
        assert_eq!(is(), "1024");
        limit.give_back(|| true).unwrap();
        assert_eq!((is().as_str(), notes.exists()), ("128", false));
    }

    #[test]
    fn who_does_not_get_done_keeps_nobody_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let (setting, notes) = (dir.path().join("setting"), dir.path().join("limits"));
        let limit =
            SharedLimit { name: "fs.some.limit".into(), setting: setting.clone(), notes: notes.clone() };
        fs::write(&setting, "128\n").unwrap();
        fs::create_dir(&notes).unwrap();
        let other = File::open(&notes).unwrap();
        flock(&other, FlockOperation::LockExclusive).unwrap();
        for refused in [limit.raise(1024).map(drop), limit.give_back(|| true)] {
            let e = refused.unwrap_err();
            assert!(e.is(karst_model::ErrorKind::Unavailable) && e.message.contains("fs.some.limit"), "{e}");
        }
        assert_eq!(fs::read_to_string(&setting).unwrap(), "128\n");
        drop(other);
        assert!(limit.raise(1024).unwrap());
        limit.give_back(|| true).unwrap();
        assert_eq!((fs::read_to_string(&setting).unwrap().as_str(), notes.exists()), ("128", false));
    }

    #[test]
    fn a_setting_of_this_machine_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let limit = SharedLimit::new(dir.path(), &["kernel", "pid_max"]).unwrap();
        assert!(limit.now().unwrap().is_some_and(|now| now > 2));
        assert!(!limit.raise(2).unwrap());
        assert!(SharedLimit::new(dir.path(), &["fs", ".."]).is_err());
    }
}
