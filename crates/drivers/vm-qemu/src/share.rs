//! The medium with Karst's guest agent: a directory of this host that every virtual machine sees read-only (share
//! `config`), and the same files for the seed. See `karst_guest_agent::delivery`.
//!
//! One directory for all guests. Its files are replaced by rename when the host has a newer agent, so that a guest gets
//! that one at its next boot, whenever it was started. It is the only directory that QEMU's users can read.

use karst_guest_agent::delivery;
use karst_model::{Error, Result};
use std::{
    fs::{File, Permissions},
    io::Write,
    os::{
        fd::OwnedFd,
        unix::fs::{OpenOptionsExt, PermissionsExt},
    },
    path::Path,
};

/// Beside the directory of the guests.
const NAME: &str = "guest-agent";
/// Of its files: QEMU's users read them, however strict the process' umask is.
const MODE: u32 = 0o755;

/// The directory, and its files by name.
pub(crate) struct Medium {
    pub(crate) directory: OwnedFd,
    pub(crate) files: Vec<(&'static str, Vec<u8>)>,
}

/// Makes the directory what it shall be; `state_dir` is that of any guest. Without an agent beside the daemon it is
/// empty, because a guest keeps its hardware.
pub(crate) fn read(state_dir: &Path) -> Result<Medium> {
    let guests = state_dir.parent().and_then(Path::parent);
    let dir =
        guests.ok_or_else(|| Error::internal("the guest could not be started", "no state directory"))?;
    let dir = dir.join(NAME);
    match std::fs::create_dir(&dir) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(e.into()),
        _ => {}
    }
    std::fs::set_permissions(&dir, Permissions::from_mode(0o755))?;
    let mut files = vec![];
    match karst_host::guest_agent() {
        Ok(program) => {
            files.push((delivery::PROGRAM, std::fs::read(program)?));
            for (name, text) in [delivery::SETUP, delivery::UNIT, delivery::RULES, delivery::INSTALL] {
                files.push((name, text.as_bytes().to_vec()));
            }
        }
        Err(e) => tracing::warn!(error = %e, "virtual machines get no guest agent of Karst"),
    }
    for (name, content) in &files {
        put(&dir, name, content)?;
        if *name == delivery::PROGRAM {
            link(&dir, name, delivery::PROGRAM_LXD)?;
        }
    }
    Ok(Medium { directory: File::open(&dir)?.into(), files })
}

fn put(dir: &Path, name: &str, content: &[u8]) -> Result<()> {
    let path = dir.join(name);
    if std::fs::read(&path).is_ok_and(|have| have == content) {
        // Versions before left it as their umask made it.
        return Ok(std::fs::set_permissions(&path, Permissions::from_mode(MODE))?);
    }
    // Two machines may start at once: each with a name of its own.
    let temporary = dir.join(format!(".{name}.{}", uuid::Uuid::new_v4()));
    let written = || -> std::io::Result<()> {
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(content)?;
        file.set_permissions(Permissions::from_mode(MODE))?;
        std::fs::rename(&temporary, &path)
    };
    written().inspect_err(|_| drop(std::fs::remove_file(&temporary))).map_err(Into::into)
}

fn link(dir: &Path, name: &str, other: &str) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let inode = |name: &str| std::fs::metadata(dir.join(name)).map(|m| m.ino()).ok();
    if inode(name) == inode(other) {
        return Ok(());
    }
    let temporary = dir.join(format!(".{other}.{}", uuid::Uuid::new_v4()));
    std::fs::hard_link(dir.join(name), &temporary)?;
    std::fs::rename(&temporary, dir.join(other)).inspect_err(|_| drop(std::fs::remove_file(&temporary)))?;
    // Renaming one link over another of the same file does nothing and leaves both.
    match std::fs::remove_file(&temporary) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_there_is_everybodys_to_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        put(dir.path(), "file", b"one").unwrap();
        assert_eq!(mode(), MODE);
        // As versions before left it, under the daemon's umask.
        std::fs::set_permissions(&path, Permissions::from_mode(0o700)).unwrap();
        put(dir.path(), "file", b"one").unwrap();
        assert_eq!(mode(), MODE);
        put(dir.path(), "file", b"two").unwrap();
        assert_eq!((mode(), std::fs::read(&path).unwrap()), (MODE, b"two".to_vec()));
    }
}
