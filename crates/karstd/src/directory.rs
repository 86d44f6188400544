//! DIR: what is in it, whose it is, and the lock that makes it one instance's.
//!
//! ```text
//! DIR/            0711 root           lock, id; karstd.log and karstd.log.1 (of a daemon that make run started)
//! DIR/unix.socket 0660 root:karst-admin  the API
//! DIR/libvirt-sock, 0660 root:karst-admin, libvirt-sock-ro, 0666: libvirt's protocol
//! DIR/run/        0750 root:karst     host.sock, daemons.json
//! DIR/state/      0700 karst          the store
//! DIR/host/       0711 root           registry, volumes, images, guests
//! ```

use crate::privilege::User;
use karst_model::{Error, Result};
use rustix::{
    fs::{FlockOperation, Gid, Mode, Uid, chown, flock},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
};
use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

const BACKLOG: i32 = 1024;

/// DIR, locked.
#[derive(Debug)]
pub struct Directory {
    /// Absolute.
    pub path: PathBuf,
    /// Short id of the instance: six hexadecimal digits, made once.
    pub daemon_id: String,
    _lock: File,
}

impl Directory {
    /// Makes what is missing of DIR, locks it, and gives or reads its id. `control` is the user of the control process;
    /// `None` in a simulation, where everything belongs to the caller.
    ///
    /// # Errors
    /// Conflict when another launcher has it; forbidden when something in it belongs to somebody else, or `control` cannot get
    /// there.
    pub fn open(path: &Path, control: Option<&User>) -> Result<Self> {
        let path = std::path::absolute(path)?;
        demand_passage(&path, control)?;
        let me = User { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() };
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|e| Error::from(e).with_context(parent.display()))?;
            // What was just made has the mode that the umask leaves.
            demand_passage(&path, control)?;
        }
        directory(&path, 0o711, &me, me.gid)?;
        let lock = lock(&path)?;
        let control = control.unwrap_or(&me);
        directory(&path.join("run"), 0o750, &me, control.gid)?;
        directory(&path.join("state"), 0o700, control, control.gid)?;
        directory(&path.join("host"), 0o711, &me, me.gid)?;
        let daemon_id = identity(&path.join("id"))?;
        Ok(Self { path, daemon_id, _lock: lock })
    }

    /// Takes over what an instance left, to remove it; makes nothing.
    ///
    /// # Errors
    /// Not found when nothing of an instance is there; conflict while a launcher serves it, with its process.
    pub fn take(path: &Path) -> Result<Self> {
        let path = std::path::absolute(path)?;
        if !path.join("id").is_file() {
            return Err(Error::not_found(format!("{} is not the directory of a karstd", path.display())));
        }
        let lock = lock(&path)?;
        Ok(Self { daemon_id: identity(&path.join("id"))?, path, _lock: lock })
    }

    /// Does no launcher hold the lock of this directory?
    pub fn is_free(path: &Path) -> bool {
        let lock = File::open(path.join("lock"));
        !lock.is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockShared).is_err())
    }

    /// A listening socket, in place of one that an instance before left behind.
    ///
    /// # Errors
    /// When the path is too long for a socket.
    pub fn socket(&self, name: &str, mode: u32, group: Option<u32>) -> Result<OwnedFd> {
        let path = self.path.join(name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        let address = SocketAddrUnix::new(&path).map_err(|_| {
            Error::invalid(
                "dir",
                format!("{} is too long for a socket; give a shorter --dir", path.display()),
            )
        })?;
        let io = std::io::Error::from;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(io)?;
        // Nobody gets in before its mode and group are set.
        let umask = rustix::process::umask(Mode::from_raw_mode(0o177));
        let bound = bind(&socket, &address);
        rustix::process::umask(umask);
        bound.map_err(io)?;
        if let Some(group) = group {
            chown(&path, None, Some(Gid::from_raw(group))).map_err(io)?;
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        listen(&socket, BACKLOG).map_err(io)?;
        Ok(socket)
    }

    /// Removes a socket at the end.
    pub fn remove_socket(&self, name: &str) {
        let _ = fs::remove_file(self.path.join(name));
    }
}

/// Fails when `control` cannot pass through a directory that `path` lies below, as far as they are there: homes are closed to
/// others on many systems, and a control process that cannot reach its own files says nothing that would tell why.
fn demand_passage(path: &Path, control: Option<&User>) -> Result<()> {
    let Some(user) = control else { return Ok(()) };
    let Some(closed) = closed_above(path, user)? else { return Ok(()) };
    let (path, closed, uid) = (path.display(), closed.display(), user.uid);
    Err(Error::forbidden(format!(
        "{path} lies below {closed}, which the user of the control process (number {uid}) cannot enter; let others pass through \
         (chmod o+x {closed}), or choose another --dir (KARST_DIR)"
    )))
}

/// The first of the directories above `path` that `user`, who has no other group, cannot pass through.
fn closed_above(path: &Path, user: &User) -> Result<Option<PathBuf>> {
    let Some(parent) = path.parent() else { return Ok(None) };
    // As it is spelled, and where links on the way lead.
    let real = parent.ancestors().find_map(|p| fs::canonicalize(p).ok());
    let mut above: Vec<&Path> =
        parent.ancestors().chain(real.iter().flat_map(|real| real.ancestors())).collect();
    above.reverse();
    for directory in above {
        let found = match fs::metadata(directory) {
            Ok(found) => found,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(Error::from(e).with_context(directory.display())),
        };
        let needed = if found.uid() == user.uid {
            0o100
        } else if found.gid() == user.gid {
            0o010
        } else {
            0o001
        };
        if found.mode() & needed == 0 && !has_acl(directory) {
            return Ok(Some(directory.to_owned()));
        }
    }
    Ok(None)
}

/// Does more than its mode say who may enter it? Then that is for the kernel to decide.
fn has_acl(directory: &Path) -> bool {
    let mut value = [0u8; 4096];
    rustix::fs::getxattr(directory, "system.posix_acl_access", &mut value).is_ok()
}

/// Takes DIR's lock and says who has it.
fn lock(path: &Path) -> Result<File> {
    let lock = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path.join("lock"))?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut pid = String::new();
        let _ = (&lock).take(32).read_to_string(&mut pid);
        return Err(Error::conflict(format!(
            "another karstd (process {}) already serves {}; stop it first or give another --dir",
            pid.trim(),
            path.display()
        )));
    }
    lock.set_len(0)?;
    writeln!(&lock, "{}", std::process::id())?;
    Ok(lock)
}

fn directory(path: &Path, mode: u32, owner: &User, group: u32) -> Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {
            let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(group));
            chown(path, Some(uid), Some(gid)).map_err(std::io::Error::from)?;
            fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
            return Ok(());
        }
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(Error::from(e).with_context(path.display())),
    }
    let found = fs::symlink_metadata(path)?;
    if !found.is_dir() {
        return Err(Error::conflict(format!("{} is not a directory", path.display())));
    }
    if found.uid() != owner.uid && is_half_made(path, &found)? {
        chown(path, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(group)))
            .map_err(std::io::Error::from)?;
    } else if found.uid() != owner.uid {
        return Err(Error::forbidden(format!(
            "{} belongs to user {}, not to user {}; give it to that user or choose another --dir or --user",
            path.display(),
            found.uid(),
            owner.uid
        )));
    }
    if found.mode() & 0o022 != 0 {
        return Err(Error::forbidden(format!(
            "{} may be written by others than its owner; take that away (chmod go-w)",
            path.display()
        )));
    }
    // An older release, or somebody's hand, may have left it narrower or with another group.
    if found.gid() != group {
        chown(path, None, Some(Gid::from_raw(group))).map_err(std::io::Error::from)?;
    }
    if found.mode() & 0o7777 != mode {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// Did a launcher end between making the directory and giving it to its owner? Then it is ours, and nothing is in it. What
/// lies in DIR only we could have put there.
fn is_half_made(path: &Path, found: &fs::Metadata) -> Result<bool> {
    let ours = found.uid() == rustix::process::geteuid().as_raw() && found.mode() & 0o022 == 0;
    Ok(ours && fs::read_dir(path)?.next().is_none())
}

/// Made before anything that carries it: whole or not there.
fn identity(file: &Path) -> Result<String> {
    match fs::read_to_string(file) {
        Ok(text) => {
            let id = text.trim().to_owned();
            return if karst_agent::names::is_daemon_id(&id) {
                Ok(id)
            } else {
                let text = format!("{} does not hold an id of six hexadecimal digits", file.display());
                Err(Error::internal(text, "damaged"))
            };
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e.into()),
    }
    let mut bytes = [0; 3];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let id: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    let fresh = file.with_extension("new");
    let mut f = OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&fresh)?;
    writeln!(f, "{id}")?;
    f.sync_all()?;
    fs::rename(&fresh, file)?;
    if let Some(parent) = file.parent() {
        File::open(parent)?.sync_all()?;
    }
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_one_instances() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("a");
        let first = Directory::open(&dir, None).unwrap();
        let e = Directory::open(&dir, None).unwrap_err();
        assert!(e.message.contains(&std::process::id().to_string()) && e.message.contains("--dir"), "{e}");
        let id = first.daemon_id.clone();
        drop(first);
        // A process that another test is just starting has the lock still, until it executes its program.
        let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
        let again = loop {
            match Directory::open(&dir, None) {
                Err(e) if e.is(karst_model::ErrorKind::Conflict) && std::time::Instant::now() < end => {
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
                again => break again.unwrap(),
            }
        };
        assert_eq!(again.daemon_id, id, "its id stays");
        let mode = |p: &str| fs::metadata(dir.join(p)).unwrap().mode() & 0o777;
        assert_eq!((mode(""), mode("run"), mode("state"), mode("host")), (0o711, 0o750, 0o700, 0o711));
    }

    #[test]
    fn a_directory_that_control_cannot_reach_is_refused_and_nothing_is_made() {
        // Everybody may pass through what lies above.
        let base = tempfile::tempdir_in("/var/tmp").unwrap();
        fs::set_permissions(base.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let home = fs::canonicalize(base.path()).unwrap().join("home");
        fs::create_dir_all(home.join("deep")).unwrap();
        let closed = |path: &Path, mode: u32, user: &User| {
            fs::set_permissions(&home, fs::Permissions::from_mode(mode)).unwrap();
            closed_above(path, user).unwrap()
        };
        let me = User { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() };
        let stranger = User { uid: 64_999, gid: 64_999 };
        let member = User { gid: me.gid, ..stranger.clone() };
        let below = home.join("deep/not/yet/k");
        for (user, mode, passes) in [
            (&me, 0o700, true),
            (&me, 0o077, false),
            (&member, 0o710, true),
            (&member, 0o701, false),
            (&stranger, 0o711, true),
            (&stranger, 0o700, false),
            (&stranger, 0o770, false),
        ] {
            let found = closed(&below, mode, user);
            assert_eq!(found, (!passes).then(|| home.clone()), "{user:?} {mode:o}");
        }
        // Through a link that lies elsewhere.
        let link = base.path().join("link");
        std::os::unix::fs::symlink(home.join("deep"), &link).unwrap();
        assert_eq!(closed(&link.join("k"), 0o700, &stranger), Some(home.clone()));
        assert_eq!(closed(&link.join("k"), 0o711, &stranger), None);

        fs::set_permissions(&home, fs::Permissions::from_mode(0o700)).unwrap();
        let e = Directory::open(&home.join("new/k"), Some(&stranger)).unwrap_err();
        let fix = format!("chmod o+x {}", home.display());
        assert!(e.message.contains(&fix) && e.message.contains("KARST_DIR"), "{e}");
        assert!(!home.join("new").exists());
    }

    #[test]
    fn what_others_may_write_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("a");
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(Directory::open(&dir, None).unwrap_err().message.contains("chmod"));
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::symlink("/etc", dir.join("host")).unwrap();
        assert!(Directory::open(&dir, None).unwrap_err().message.contains("not a directory"));
        fs::remove_file(dir.join("host")).unwrap();
        fs::write(dir.join("id"), "../../x\n").unwrap();
        assert!(Directory::open(&dir, None).is_err());
    }
}
