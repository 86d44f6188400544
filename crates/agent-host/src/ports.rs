//! What the ports of a virtual machine lead to on this host: files, devices, sockets. All of it is opened here, at the start, as far
//! as the policy grants it, and handed on as descriptors: QEMU opens nothing, and its user could not.
//!
//! A socket with a name that is listened at stays where it is when its machine ends, and nobody answers there; the next start
//! replaces it.

use crate::{
    RealAgent,
    agent::{as_state, blocking},
    policy::{FILE, HostPolicy},
};
use karst_agent::{PortAttach, WithFds};
use karst_guest::{Opened, ResolvedGuest, ResolvedPort};
use karst_host::fs::open_beneath;
use karst_model::{
    Error, Result, SessionId,
    device::{PortEnd, PortFile},
    spec::LineSpec,
};
use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};
use std::{
    collections::BTreeMap,
    fs::File,
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::Arc,
    time::Duration,
};

/// Time that somebody who is connected to has to answer.
const CONNECT: Duration = Duration::from_secs(5);

/// Those that may wait at a socket with a name.
const BACKLOG: i32 = 128;

impl RealAgent {
    /// What the ports of a machine lead to, opened.
    pub(crate) async fn ports(&self, guest: &ResolvedGuest) -> Result<BTreeMap<String, ResolvedPort>> {
        let lines: Vec<LineSpec> = guest.machine.iter().flat_map(|m| m.lines.clone()).collect();
        if lines.is_empty() {
            return Ok(BTreeMap::new());
        }
        let policy = self.options.policy.clone();
        blocking(move || resolve_all(&policy, &lines)).await
    }

    /// Attaches to a port that leads to who attaches.
    pub(crate) async fn port(&self, request: PortAttach) -> Result<WithFds<SessionId>> {
        self.sessions.room()?;
        let PortAttach { instance, port, force } = request;
        let machine = self.machine(instance)?;
        if !self.sessions.leave_port(instance, &port, force) {
            return Err(Error::conflict("somebody is attached to this port; force ends that"));
        }
        let stream = machine.port(instance, &port).await;
        let stream = stream.map_err(|e| match e.field.as_deref() {
            Some("port") => e,
            _ => as_state(instance)(e),
        })?;
        let (value, fd) = self.sessions.port(instance, port, stream)?;
        Ok(WithFds { value, fds: vec![fd] })
    }
}

/// What all of them lead to. Files that begin anew are emptied when all else is there: a start that fails loses nothing.
fn resolve_all(policy: &HostPolicy, lines: &[LineSpec]) -> Result<BTreeMap<String, ResolvedPort>> {
    let mut all = BTreeMap::new();
    for line in lines {
        all.insert(line.name.clone(), resolve(policy, line)?);
    }
    for line in lines {
        let Some(port) = all.get(&line.name) else { continue };
        let end = match &line.device.to {
            PortEnd::File(file) => Some(file),
            _ => None,
        };
        for (wanted, opened) in [(end, &port.end), (line.device.log.as_ref(), &port.log)] {
            if let (Some(PortFile { append: false, .. }), Some(Opened(file))) = (wanted, opened) {
                rustix::fs::ftruncate(file, 0).map_err(std::io::Error::from)?;
            }
        }
    }
    Ok(all)
}

fn resolve(policy: &HostPolicy, line: &LineSpec) -> Result<ResolvedPort> {
    let field = |key: &str| format!("devices.{}.{key}", line.name);
    let end = match &line.device.to {
        PortEnd::Stream {}
        | PortEnd::Null {}
        | PortEnd::Screen {}
        | PortEnd::Agent { .. }
        | PortEnd::Spice {} => None,
        PortEnd::File(wanted) => Some(policy.port_file(&field("path"), wanted)?),
        PortEnd::Device { path } => Some(policy.port_device(&field("path"), path)?),
        PortEnd::Unix { path, listen } => Some(policy.port_socket(&field("path"), path, *listen)?),
        PortEnd::Tcp { address, listen, .. } => {
            Some(policy.port_address(&field("address"), *address, *listen)?)
        }
    };
    let log = line.device.log.as_ref().map(|log| policy.port_file(&field("log"), log)).transpose()?;
    let opened = |fd| Opened(Arc::new(fd));
    Ok(ResolvedPort { end: end.map(opened), log: log.map(opened) })
}

impl HostPolicy {
    /// What cannot stand in it.
    ///
    /// # Errors
    /// Invalid, naming the list.
    pub(crate) fn check_ports(&self) -> Result<()> {
        let good = |text: &String| {
            text == "*" || text.parse::<std::net::IpAddr>().is_ok() || text.parse::<SocketAddr>().is_ok()
        };
        match self.port_addresses.iter().find(|a| !good(a)) {
            Some(bad) => {
                let text =
                    format!("{bad:?} is no address; write one such as 127.0.0.1 or 127.0.0.1:4555, or *");
                Err(Error::invalid("port_addresses", text))
            }
            None => Ok(()),
        }
    }

    /// The directory of what a port leads to, reached without links below what is granted, and its name there.
    fn port_place(&self, field: &str, path: &str) -> Result<(OwnedFd, String)> {
        let whole = Path::new(path);
        let below = |granted: &&std::path::PathBuf| whole.starts_with(granted);
        let granted = self.port_paths.iter().filter(below).max_by_key(|p| p.components().count());
        let granted = granted.ok_or_else(|| {
            Error::forbidden(format!(
                "this host leads no port of a machine to {path:?}; its administrator can, with port_paths in {FILE}"
            ))
            .at(field)
        })?;
        let parts = whole.parent().zip(whole.file_name().and_then(|n| n.to_str()));
        let (parent, name) =
            parts.ok_or_else(|| Error::invalid(field, format!("{path:?} names nothing in a directory")))?;
        // What root named is taken as it stands there; below it nothing is a link.
        let (top, rest) = match granted == whole {
            true => (parent, Path::new("")),
            false => (granted.as_path(), parent.strip_prefix(granted).unwrap_or(Path::new(""))),
        };
        let rest = match rest.to_str() {
            Some("") | None => ".",
            Some(rest) => rest,
        };
        let opened =
            File::open(top).and_then(|top| open_beneath(top, rest, OFlags::RDONLY | OFlags::DIRECTORY));
        let directory = opened.map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => {
                Error::not_found(format!("{:?} is no directory of the host", parent.display())).at(field)
            }
            _ => Error::forbidden(format!("{path:?} leads through a link, or out of what this host grants"))
                .at(field)
                .with_context(e),
        })?;
        Ok((directory, name.to_owned()))
    }

    /// A file that what a guest says is written to: root's, and made when it is not there. What is in it stays.
    fn port_file(&self, field: &str, wanted: &PortFile) -> Result<OwnedFd> {
        let (directory, name) = self.port_place(field, &wanted.path)?;
        let refused = |why: &str| Error::invalid(field, format!("{:?} {why}", wanted.path));
        let failed = |e: std::io::Error| Error::from(e).at(field);
        let mut flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        if wanted.append {
            flags |= OFlags::APPEND;
        }
        let new = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        match rustix::fs::openat(&directory, &name, new, Mode::from_raw_mode(0o600)) {
            Err(rustix::io::Errno::EXIST) => {}
            made => return made.map_err(|e| failed(e.into())),
        }
        // Nothing is done to what it is before that is known.
        let found = open_beneath(&directory, &name, OFlags::PATH | OFlags::NOFOLLOW).map_err(failed)?;
        match kind(&found)? {
            FileType::RegularFile => {}
            FileType::Symlink => return Err(refused("is a link")),
            _ => return Err(refused("is not a file")),
        }
        rustix::fs::open(itself(&found), flags, Mode::empty()).map_err(|e| failed(e.into()))
    }

    /// A device that bytes go to and come from.
    fn port_device(&self, field: &str, path: &str) -> Result<OwnedFd> {
        let (directory, name) = self.port_place(field, path)?;
        let found = open_beneath(&directory, &name, OFlags::PATH | OFlags::NOFOLLOW);
        let found = found.map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Error::not_found(format!("this host has no {path:?}")).at(field),
            _ => Error::invalid(field, format!("{path:?} is no device")).with_context(e),
        })?;
        if kind(&found)? != FileType::CharacterDevice {
            return Err(Error::invalid(field, format!("{path:?} is no device that bytes go to")));
        }
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = rustix::fs::open(itself(&found), flags, Mode::empty());
        opened.map_err(|e| Error::from(std::io::Error::from(e)).at(field))
    }

    /// A socket with a name: one of root's own that listens, or who listens there already.
    fn port_socket(&self, field: &str, path: &str, listen: bool) -> Result<OwnedFd> {
        let (directory, name) = self.port_place(field, path)?;
        let found = match open_beneath(&directory, &name, OFlags::PATH | OFlags::NOFOLLOW) {
            Ok(found) if kind(&found)? == FileType::Socket => Ok(found),
            Ok(_) => return Err(Error::conflict(format!("{path:?} is there, and is no socket")).at(field)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(e),
            Err(e) => return Err(Error::from(e).at(field)),
        };
        if !listen {
            return found.and_then(|found| connect(&found)).map_err(|e| nobody(field, path, e));
        }
        if let Ok(found) = found {
            match connect(&found) {
                // What an earlier start left, or somebody else's that has ended.
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {}
                // Also who has more to answer than he takes.
                _ => return Err(Error::conflict(format!("somebody listens at {path:?}")).at(field)),
            }
            rustix::fs::unlinkat(&directory, &name, AtFlags::empty()).map_err(std::io::Error::from)?;
        }
        let at = format!("/proc/self/fd/{}/{name}", directory.as_raw_fd());
        bind(&at).map_err(|e| Error::from(e).at(field))
    }

    /// A port of TCP, one that listens or who listens there already.
    fn port_address(&self, field: &str, address: SocketAddr, listen: bool) -> Result<OwnedFd> {
        let granted = |text: &String| {
            text == "*"
                || text.parse::<std::net::IpAddr>() == Ok(address.ip())
                || text.parse::<SocketAddr>() == Ok(address)
        };
        if !self.port_addresses.iter().any(granted) {
            return Err(Error::forbidden(format!(
                "this host leads no port of a machine to {address}; its administrator can, with port_addresses = [\"{address}\"] \
                 in {FILE}"
            ))
            .at(field));
        }
        match listen {
            true => {
                let taken = |e: std::io::Error| {
                    Error::conflict(format!("{address} cannot be listened at: {e}")).at(field)
                };
                Ok(TcpListener::bind(address).map_err(taken)?.into())
            }
            false => {
                let connected = TcpStream::connect_timeout(&address, CONNECT);
                Ok(connected.map_err(|e| nobody(field, &address.to_string(), e))?.into())
            }
        }
    }
}

fn nobody(field: &str, at: &str, e: std::io::Error) -> Error {
    Error::conflict(format!("nobody answers at {at:?}; start who listens there first"))
        .at(field)
        .with_context(e)
}

/// A path that is what the descriptor holds, whatever lies at its name by now.
fn itself(found: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", found.as_raw_fd())
}

fn stream(flags: SocketFlags) -> std::io::Result<OwnedFd> {
    let flags = flags | SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

/// Connects to this socket. Who listens and takes nobody is not waited for.
fn connect(found: &OwnedFd) -> std::io::Result<OwnedFd> {
    let socket = stream(SocketFlags::NONBLOCK)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(itself(found))?)?;
    let connected = UnixStream::from(socket);
    connected.set_nonblocking(false)?;
    Ok(connected.into())
}

/// Listens at a path where nothing is, for root alone.
fn bind(at: &str) -> std::io::Result<OwnedFd> {
    let socket = stream(SocketFlags::empty())?;
    // The kernel gives the name the mode that the socket has: what lies at the name later is not touched.
    rustix::fs::fchmod(&socket, Mode::from_raw_mode(0o600))?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(at)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

fn kind(fd: &OwnedFd) -> Result<FileType> {
    let stat = rustix::fs::fstat(fd).map_err(std::io::Error::from)?;
    Ok(FileType::from_raw_mode(stat.st_mode))
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::ErrorKind;
    use karst_model::device::{PortDevice, PortPlace};
    use std::{
        io::{Read, Write},
        os::unix::{
            fs::{PermissionsExt, symlink},
            net::UnixListener,
        },
    };

    fn policy(granted: &Path) -> HostPolicy {
        HostPolicy { port_paths: vec![granted.to_owned()], ..HostPolicy::default() }
    }

    fn file(path: &Path, append: bool) -> PortFile {
        PortFile { path: path.to_str().unwrap().to_owned(), append }
    }

    fn line(name: &str, path: &Path, append: bool) -> LineSpec {
        let (place, to) = (PortPlace::Serial { number: 1 }, PortEnd::File(file(path, append)));
        LineSpec { name: name.into(), device: PortDevice { place, to, log: None } }
    }

    #[test]
    fn files_are_made_and_written_below_what_is_granted_only() {
        let dir = tempfile::tempdir().unwrap();
        let (granted, other) = (dir.path().join("granted"), dir.path().join("other"));
        std::fs::create_dir(&granted).unwrap();
        std::fs::create_dir(&other).unwrap();
        symlink(&other, granted.join("link")).unwrap();
        symlink(other.join("x"), granted.join("file")).unwrap();
        let policy = policy(&granted);
        for (append, content) in [(false, "ab"), (true, "abab"), (false, "ab")] {
            let all = resolve_all(&policy, &[line("p", &granted.join("a"), append)]).unwrap();
            let fd = all["p"].end.as_ref().unwrap().0.try_clone().unwrap();
            File::from(fd).write_all(b"ab").unwrap();
            assert_eq!(std::fs::read_to_string(granted.join("a")).unwrap(), content);
        }
        // What is not started empties nothing.
        let lines = [line("p", &granted.join("a"), false), line("q", &other.join("a"), false)];
        assert!(resolve_all(&policy, &lines).unwrap_err().is(ErrorKind::Forbidden));
        assert_eq!(std::fs::read_to_string(granted.join("a")).unwrap(), "ab");
        std::fs::create_dir(granted.join("directory")).unwrap();
        for (path, kind) in [
            (granted.join("directory"), ErrorKind::Invalid),
            (other.join("a"), ErrorKind::Forbidden),
            (granted.join("link/a"), ErrorKind::Forbidden),
            (granted.join("file"), ErrorKind::Invalid),
            (granted.join("none/a"), ErrorKind::NotFound),
        ] {
            let e = policy.port_file("f", &file(&path, false)).unwrap_err();
            assert_eq!((e.kind, e.field.as_deref()), (kind, Some("f")), "{path:?}: {e}");
        }
        assert!(!other.join("x").exists() && !other.join("a").exists());
        let e = HostPolicy::default().port_file("f", &file(&granted.join("a"), true)).unwrap_err();
        assert!(e.message.contains("port_paths in host-policy.toml"), "{e}");
        // One thing that is granted is that alone.
        let one = HostPolicy { port_paths: vec![granted.join("a")], ..HostPolicy::default() };
        one.port_file("f", &file(&granted.join("a"), true)).unwrap();
        assert!(one.port_file("f", &file(&granted.join("ab"), true)).is_err());
    }

    #[test]
    fn sockets_listen_connect_and_are_replaced_when_nobody_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let policy = policy(dir.path());
        let path = dir.path().join("s");
        let at = path.to_str().unwrap();
        let e = policy.port_socket("f", at, false).unwrap_err();
        assert!(e.is(ErrorKind::Conflict), "{e}");
        let listener = UnixListener::from(policy.port_socket("f", at, true).unwrap());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let mut one = UnixStream::from(policy.port_socket("f", at, false).unwrap());
        one.write_all(b"hello").unwrap();
        drop(one);
        let mut text = String::new();
        listener.accept().unwrap().0.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        assert!(policy.port_socket("f", at, true).unwrap_err().is(ErrorKind::Conflict), "it is in use");
        drop(listener);
        policy.port_socket("f", at, true).unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let e = policy.port_socket("f", dir.path().join("file").to_str().unwrap(), true).unwrap_err();
        assert!(e.message.contains("no socket"), "{e}");
        // A link to one is none, and who takes nobody keeps nobody waiting.
        let busy = dir.path().join("busy");
        let full = stream(SocketFlags::empty()).unwrap();
        rustix::net::bind(&full, &SocketAddrUnix::new(&busy).unwrap()).unwrap();
        rustix::net::listen(&full, 0).unwrap();
        symlink(&busy, dir.path().join("link")).unwrap();
        for listen in [false, true] {
            let e = policy.port_socket("f", dir.path().join("link").to_str().unwrap(), listen).unwrap_err();
            assert!(e.is(ErrorKind::Conflict) && e.message.contains("no socket"), "{e}");
        }
        let _waiting = UnixStream::connect(&busy).unwrap();
        for (listen, text) in [(false, "nobody answers"), (true, "somebody listens")] {
            let e = policy.port_socket("f", busy.to_str().unwrap(), listen).unwrap_err();
            assert!(e.is(ErrorKind::Conflict) && e.message.contains(text), "{e}");
        }
        let null = HostPolicy { port_paths: vec!["/dev/null".into()], ..HostPolicy::default() };
        null.port_device("f", "/dev/null").unwrap();
        assert!(null.port_device("f", "/dev/zero").unwrap_err().is(ErrorKind::Forbidden));
        let e = policy.port_device("f", dir.path().join("file").to_str().unwrap()).unwrap_err();
        assert!(e.message.contains("no device"), "{e}");
    }

    #[test]
    fn addresses_are_those_that_are_granted() {
        let policy = |list: &[&str]| HostPolicy {
            port_addresses: list.iter().map(|a| (*a).to_owned()).collect(),
            ..HostPolicy::default()
        };
        let free = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = free.local_addr().unwrap();
        let e = policy(&["127.0.0.1:1", "::1"]).port_address("f", address, false).unwrap_err();
        assert!(e.is(ErrorKind::Forbidden) && e.message.contains("port_addresses"), "{e}");
        let own = address.to_string();
        for list in [&["127.0.0.1"][..], &["*"], &[own.as_str()]] {
            policy(list).check_ports().unwrap();
            policy(list).port_address("f", address, false).unwrap();
        }
        let e = policy(&["*"]).port_address("f", address, true).unwrap_err();
        assert!(e.is(ErrorKind::Conflict), "{e}");
        drop(free);
        policy(&["*"]).port_address("f", address, true).unwrap();
        assert_eq!(policy(&["lo"]).check_ports().unwrap_err().field.as_deref(), Some("port_addresses"));
    }
}
