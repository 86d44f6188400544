//! The way to the host: a virtio-serial port, or a unix socket that stands for one in tests.
//!
//! A port has no connections: while the host's side is closed reading gives nothing at once and polling says hang-up. So
//! waiting is edge-triggered. A host that closes and opens quickly may not be noticed at all; the handshake covers that.

use rustix::{
    event::epoll,
    fs::{Mode, OFlags},
};
use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::{Path, PathBuf},
};

/// Where the host is.
#[derive(Debug)]
pub enum Port {
    /// A virtio-serial port of this name.
    Named(&'static str),
    /// One connection after another.
    Socket(UnixListener),
}

/// Listens where the host's side expects a virtual machine's socket.
///
/// # Errors
/// The system's.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    UnixListener::bind(path)
}

/// The device of a port: udev's link, or the kernel's own list where no udev runs.
fn find(name: &str) -> io::Result<PathBuf> {
    let link = Path::new("/dev/virtio-ports").join(name);
    if link.exists() {
        return Ok(link);
    }
    for entry in std::fs::read_dir("/sys/class/virtio-ports")?.flatten() {
        if std::fs::read_to_string(entry.path().join("name")).is_ok_and(|n| n.trim_end() == name) {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("no virtio-serial port is named {name}")))
}

impl Port {
    /// Opens it; for a socket waits for the host.
    pub(super) fn open(&mut self) -> io::Result<OwnedFd> {
        let fd: OwnedFd = match self {
            Self::Named(name) => {
                let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
                rustix::fs::open(find(name)?, flags, Mode::empty())?
            }
            Self::Socket(listener) => listener.accept()?.0.into(),
        };
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(fd)
    }

    /// The end of what can be read ends the connection for good, rather than until the host opens its side again.
    pub(super) fn ends(&self) -> bool {
        matches!(self, Self::Socket(_))
    }
}

/// Waits for something to happen on a descriptor.
pub(super) struct Waiter(OwnedFd);

impl Waiter {
    pub(super) fn new(fd: &OwnedFd) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::HUP | epoll::EventFlags::ET;
        epoll::add(&epoll, fd, epoll::EventData::new_u64(0), flags)?;
        Ok(Self(epoll))
    }

    /// At most two seconds, should an edge be missed.
    pub(super) fn wait(&self) {
        let limit = rustix::fs::Timespec { tv_sec: 2, tv_nsec: 0 };
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
        // An interruption is an early end.
        let _ = epoll::wait(&self.0, &mut events, Some(&limit));
    }
}
