//! The log in a file of its own, for who starts the daemon without a supervisor that keeps what it says: bounded, because the
//! daemon lives for years beside its data.
//!
//! The launcher makes the file its standard error, which all that it starts has too. All of them append to it and none but the
//! launcher could open it anew, so it is not renamed when it is long: what is in it is copied beside it (`FILE.1`, in place of
//! what was there), and it begins anew. A line that is written in between is lost. `logrotate` has to do the same
//! (`copytruncate`).

use std::{
    fs::{self, File, Metadata},
    io::{self, Read},
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

/// How often it is looked how long it is.
pub const LOOK: Duration = Duration::from_secs(5);

/// A log that is cut when it is longer than its bound.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: File,
    bound: u64,
}

impl LogFile {
    /// Opens the file `path` at its end, or makes it; it may become `bound` bytes long.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(path: &Path, bound: u64) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        let file = File::options().append(true).create(true).mode(0o644).open(&path)?;
        Ok(Self { path, file, bound })
    }

    /// Makes it the standard error of this process and of all that it starts.
    ///
    /// # Errors
    /// Those of the system call.
    pub fn take_standard_error(&self) -> io::Result<()> {
        Ok(rustix::stdio::dup2_stderr(&self.file)?)
    }

    /// Cuts it if it is too long. That works on a full disk too, where only what was in it cannot be kept.
    pub fn cut_when_long(&self) {
        let long = self.file.metadata().is_ok_and(|m| m.is_file() && m.len() > self.bound);
        if !long {
            return;
        }
        let kept = self.keep();
        if let Err(e) = self.file.set_len(0) {
            tracing::warn!(error = %e, "the log cannot be cut; it grows on");
        }
        match kept {
            Ok(()) => tracing::info!(before = %self.beside("1").display(), "the log goes on here"),
            Err(e) => tracing::warn!(error = %e, "the log was cut; what was in it could not be kept"),
        }
    }

    /// Copies what is in it beside it.
    fn keep(&self) -> io::Result<()> {
        let meta = self.file.metadata()?;
        let fresh = self.beside("new");
        // Of an earlier attempt. The directory may be somebody else's: nothing of his is written to.
        match fs::remove_file(&fresh) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let copied = self.copy_to(&fresh, &meta);
        if copied.is_err() {
            // Half of a copy is none, and its room is needed; where there is not even that, nothing is to be removed.
            let _ = fs::remove_file(&fresh);
        }
        copied.and_then(|()| fs::rename(&fresh, self.beside("1")))
    }

    fn copy_to(&self, fresh: &Path, meta: &Metadata) -> io::Result<()> {
        // By the descriptor: somebody may have renamed the file.
        let source = File::open(format!("/proc/self/fd/{}", self.file.as_raw_fd()))?;
        let mut copy = File::options().write(true).create_new(true).mode(0o600).open(fresh)?;
        io::copy(&mut source.take(meta.len()), &mut copy)?;
        copy.set_permissions(meta.permissions())
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(".");
        name.push(suffix);
        name.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs::Permissions,
        io::Write,
        os::unix::fs::{PermissionsExt, symlink},
    };

    #[test]
    fn it_is_cut_when_it_is_long_and_who_writes_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("karstd.log");
        fs::write(&path, "before\n").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let log = LogFile::open(&path, 20).unwrap();
        // As a daemon has it: the same descriptor.
        let mut daemon = log.file.try_clone().unwrap();
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).ok();
        daemon.write_all(b"short\n").unwrap();
        log.cut_when_long();
        assert_eq!((read("karstd.log").as_deref(), read("karstd.log.1")), (Some("before\nshort\n"), None));
        // What somebody laid there is not followed.
        fs::write(dir.path().join("his"), "his").unwrap();
        symlink(dir.path().join("his"), dir.path().join("karstd.log.new")).unwrap();
        symlink(dir.path().join("his"), dir.path().join("karstd.log.1")).unwrap();
        daemon.write_all(b"much longer\n").unwrap();
        log.cut_when_long();
        daemon.write_all(b"after\n").unwrap();
        assert_eq!(read("karstd.log").as_deref(), Some("after\n"));
        assert_eq!(read("karstd.log.1").as_deref(), Some("before\nshort\nmuch longer\n"));
        assert_eq!(read("his").as_deref(), Some("his"));
        let mode = fs::symlink_metadata(dir.path().join("karstd.log.1")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o640);
        // Renamed, and with no place for a copy: it is bounded all the same.
        fs::rename(&path, dir.path().join("moved")).unwrap();
        fs::create_dir(dir.path().join("karstd.log.new")).unwrap();
        daemon.write_all(b"twenty bytes and some more\n").unwrap();
        log.cut_when_long();
        assert_eq!(read("moved").as_deref(), Some(""));
        assert_eq!(read("karstd.log.1").as_deref(), Some("before\nshort\nmuch longer\n"));
    }
}
