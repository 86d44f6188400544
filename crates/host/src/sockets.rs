//! Unix sockets at places of the host and of guests: made by the rights of whoever they are to belong to, found below a
//! directory that is held open, so that no link leads elsewhere.
//!
//! The kernel takes a path of at most 108 bytes for a socket; one below `/proc/self/fd` is short, and follows nothing but
//! the open directory.

use crate::netns::within;
use karst_model::{Error, Result};
use rustix::{
    fs::{AtFlags, Mode, OFlags, ResolveFlags, openat2, statat, unlinkat},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with},
};
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

const BACKLOG: i32 = 128;

fn failed(what: &str, e: impl Into<io::Error>) -> Error {
    Error::internal(format!("{what} failed"), e.into())
}

/// The root directory of a process, with everything that it sees mounted there.
///
/// # Errors
/// Not found when the process is gone.
pub fn root_of(pid: u32) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(format!("/proc/{pid}/root"), flags, Mode::empty())
        .map_err(|e| Error::not_found("the guest is not running").with_context(io::Error::from(e)))
}

/// Opens a directory below `root`, which no link leaves: an absolute one begins at `root`.
///
/// # Errors
/// Not found.
pub fn directory_in(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd> {
    let path = path.strip_prefix("/").unwrap_or(path);
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    for _ in 0..64 {
        return match openat2(
            root,
            path,
            flags,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        ) {
            // Something was renamed meanwhile.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => continue,
            Err(e) => {
                Err(Error::not_found(format!("there is no directory {path:?}"))
                    .with_context(io::Error::from(e)))
            }
            Ok(fd) => Ok(fd),
        };
    }
    Err(Error::unavailable(format!("{path:?} is being renamed; try again")))
}

/// Opens a directory of the host by a path in which nothing is a link.
///
/// # Errors
/// Not found; forbidden when something of it has become a link.
pub fn directory(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat2(rustix::fs::CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS).map_err(|e| match e {
        rustix::io::Errno::LOOP => Error::forbidden(format!("{path:?} leads through a link")),
        _ => Error::not_found(format!("there is no directory {path:?}")).with_context(io::Error::from(e)),
    })
}

/// The path of an open directory, as it is now.
///
/// # Errors
/// Internal.
pub fn path_of(directory: BorrowedFd<'_>) -> Result<PathBuf> {
    Ok(std::fs::read_link(format!("/proc/self/fd/{}", directory.as_raw_fd()))?)
}

fn address(directory: BorrowedFd<'_>, name: &str) -> Result<SocketAddrUnix> {
    SocketAddrUnix::new(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()))
        .map_err(|_| Error::invalid("listen", format!("the name {name:?} is too long for a socket")))
}

fn stream() -> Result<OwnedFd> {
    socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(|e| failed("making a socket", e))
}

/// Takes away a socket that nobody listens at any more; fine when there is none.
///
/// # Errors
/// Conflict when somebody listens, or when it is no socket.
pub fn remove_stale(directory: BorrowedFd<'_>, name: &str) -> Result<()> {
    if is_stale(directory, name)? { remove(directory, name) } else { Ok(()) }
}

/// Is there a socket at which nobody listens any more? Asked by this process' own rights: who may not write to a socket
/// cannot tell a dead one from another that is not its own.
fn is_stale(directory: BorrowedFd<'_>, name: &str) -> Result<bool> {
    use rustix::io::Errno;
    let found = match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(false),
        found => found.map_err(|e| failed("looking at a socket", e))?,
    };
    if rustix::fs::FileType::from_raw_mode(found.st_mode) != rustix::fs::FileType::Socket {
        return Err(Error::conflict(format!("{name:?} is there already and is no socket")));
    }
    let probe = stream()?;
    rustix::io::ioctl_fionbio(&probe, true).map_err(|e| failed("looking at a socket", e))?;
    match connect(&probe, &address(directory, name)?) {
        Err(Errno::CONNREFUSED) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        _ => Err(Error::conflict(format!("{name:?} is taken by another program"))),
    }
}

fn remove(directory: BorrowedFd<'_>, name: &str) -> Result<()> {
    use rustix::io::Errno;
    match unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ACCESS | Errno::PERM) => {
            Err(Error::forbidden(format!("a dead socket {name:?} cannot be taken away")))
        }
        Err(e) => Err(failed("removing a socket", e)),
    }
}

/// Owner of a file, as the host's ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A socket that listens at a name in a directory, in place of one that nobody listens at any more. It is made by the rights
/// of `maker`, and given to `owner` then.
///
/// # Errors
/// Conflict when the name is taken; forbidden when `maker` may not write there; internal else.
pub fn listen_in(
    directory: BorrowedFd<'_>,
    name: &str,
    maker: Owner,
    owner: Owner,
    mode: u32,
) -> Result<OwnedFd> {
    let socket = stream()?;
    let at = address(directory, name)?;
    let stale = is_stale(directory, name)?;
    let made = std::thread::scope(|s| {
        // Mask and ids of one thread, which ends right away. The kernel follows `/proc/self/fd` for every thread of the
        // process, whoever it is.
        let work = || -> Result<()> {
            // SAFETY: plain calls; the raw ones change this thread alone.
            let changed = unsafe {
                let unshared = libc::unshare(libc::CLONE_FS) == 0;
                libc::umask(!mode & 0o777);
                libc::syscall(libc::SYS_setfsgid, maker.gid);
                libc::syscall(libc::SYS_setfsuid, maker.uid);
                // They answer what was before: asked again, what is now.
                unshared
                    && libc::syscall(libc::SYS_setfsgid, -1) == i64::from(maker.gid)
                    && libc::syscall(libc::SYS_setfsuid, -1) == i64::from(maker.uid)
            };
            if !changed {
                return Err(Error::internal("making a socket failed", "another user could not be taken on"));
            }
            if stale {
                remove(directory, name)?;
            }
            bind(&socket, &at).map_err(|e| match e {
                rustix::io::Errno::ADDRINUSE => {
                    Error::conflict(format!("{name:?} is taken by another program"))
                }
                rustix::io::Errno::ACCESS | rustix::io::Errno::PERM | rustix::io::Errno::ROFS => {
                    Error::forbidden(format!("no socket {name:?} can be made there"))
                        .with_context(io::Error::from(e))
                }
                _ => failed("making a socket", e),
            })
        };
        s.spawn(work).join()
    });
    made.map_err(|_| Error::internal("making a socket failed", "a thread panicked"))??;
    if owner != maker {
        let (uid, gid) = (rustix::fs::Uid::from_raw(owner.uid), rustix::fs::Gid::from_raw(owner.gid));
        rustix::fs::chownat(directory, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| failed("giving a socket to its owner", e))?;
    }
    listen(&socket, BACKLOG).map_err(|e| failed("listening", e))?;
    Ok(socket)
}

/// A socket that listens at an abstract name of a network namespace.
///
/// # Errors
/// Conflict when the name is taken.
pub fn listen_abstract(namespace: impl AsFd + Send, name: &str) -> Result<OwnedFd> {
    let at = SocketAddrUnix::new_abstract_name(name.as_bytes())
        .map_err(|_| Error::invalid("listen", format!("the name {name:?} is too long for a socket")))?;
    within(namespace, || {
        let socket = stream()?;
        bind(&socket, &at).map_err(|e| match e {
            rustix::io::Errno::ADDRINUSE => Error::conflict(format!("@{name} is taken by another program")),
            _ => failed("listening", e),
        })?;
        listen(&socket, BACKLOG).map_err(|e| failed("listening", e))?;
        Ok(socket)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::ErrorKind;
    use std::os::unix::{fs::MetadataExt, net::UnixStream};

    #[test]
    fn a_socket_is_its_owners_and_takes_the_place_of_a_dead_one() {
        if !crate::backends::root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(dir.path(), Some(4_000_000), Some(4_000_000)).unwrap();
        let open = directory(dir.path()).unwrap();
        assert_eq!(path_of(open.as_fd()).unwrap(), dir.path());
        let (maker, owner) =
            (Owner { uid: 4_000_000, gid: 4_000_000 }, Owner { uid: 4_001_000, gid: 4_000_000 });
        let socket = listen_in(open.as_fd(), "s", maker, owner, 0o640).unwrap();
        let found = std::fs::metadata(dir.path().join("s")).unwrap();
        assert_eq!((found.uid(), found.gid(), found.mode() & 0o777), (4_001_000, 4_000_000, 0o640));
        UnixStream::connect(dir.path().join("s")).unwrap();
        let e = listen_in(open.as_fd(), "s", maker, owner, 0o640).unwrap_err();
        assert_eq!(e.kind, ErrorKind::Conflict);
        assert!(remove_stale(open.as_fd(), "s").is_err(), "somebody listens");
        drop(socket);
        // A process that another test is just starting has it still, until it executes its program.
        let soon = |work: &dyn Fn() -> Result<()>| {
            for _ in 0..500 {
                match work() {
                    Err(e) if e.kind == ErrorKind::Conflict => {
                        std::thread::sleep(std::time::Duration::from_millis(10))
                    }
                    done => return done.unwrap(),
                }
            }
            panic!("nobody listens any more, and it is taken");
        };
        soon(&|| listen_in(open.as_fd(), "s", maker, maker, 0o600).map(drop));
        soon(&|| remove_stale(open.as_fd(), "s"));
        soon(&|| remove_stale(open.as_fd(), "s"));
        assert!(!dir.path().join("s").exists());
        // Where the maker may not write, and what is no socket.
        std::fs::write(dir.path().join("file"), "x").unwrap();
        assert!(remove_stale(open.as_fd(), "file").unwrap_err().is(ErrorKind::Conflict));
        let nobody = Owner { uid: 4_100_000, gid: 4_100_000 };
        assert!(listen_in(open.as_fd(), "n", nobody, nobody, 0o600).unwrap_err().is(ErrorKind::Forbidden));
        // Links lead nowhere else.
        std::os::unix::fs::symlink("/etc", dir.path().join("link")).unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        let inner = directory_in(open.as_fd(), Path::new("/link")).unwrap();
        assert_eq!(path_of(inner.as_fd()).unwrap(), dir.path().join("etc"));
        assert!(directory(&dir.path().join("link")).unwrap_err().is(ErrorKind::Forbidden));
    }
}
