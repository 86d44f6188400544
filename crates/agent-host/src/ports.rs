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
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use std::{
    collections::BTreeMap,
    fs::File,
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    sync::Arc,
    time::Duration,
};

/// Time that somebody who is connected to has to answer.
const CONNECT: Duration = Duration::from_secs(5);

impl RealAgent {
    /// What the ports of a machine lead to, opened.
    pub(crate) async fn ports(&self, guest: &ResolvedGuest) -> Result<BTreeMap<String, ResolvedPort>> {
        let lines: Vec<LineSpec> = guest.machine.iter().flat_map(|m| m.lines.clone()).collect();
        if lines.is_empty() {
            return Ok(BTreeMap::new());
        }
        let policy = self.options.policy.clone();
        let all = move || -> Result<BTreeMap<String, ResolvedPort>> {
            lines.iter().map(|line| Ok((line.name.clone(), resolve(&policy, line)?))).collect()
        };
        blocking(all).await
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

fn resolve(policy: &HostPolicy, line: &LineSpec) -> Result<ResolvedPort> {
    let field = |key: &str| format!("devices.{}.{key}", line.name);
    let end = match &line.device.to {
        PortEnd::Stream {} | PortEnd::Null {} | PortEnd::Screen {} => None,
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

    /// A file that what a guest says is written to: root's, and made when it is not there.
    fn port_file(&self, field: &str, wanted: &PortFile) -> Result<OwnedFd> {
        let (directory, name) = self.port_place(field, &wanted.path)?;
        let how = if wanted.append { OFlags::APPEND } else { OFlags::TRUNC };
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | how;
        let refused = |why: &str| Error::invalid(field, format!("{:?} {why}", wanted.path));
        let file =
            rustix::fs::openat(&directory, &name, flags, Mode::from_raw_mode(0o600)).map_err(
                |e| match e {
                    rustix::io::Errno::LOOP => refused("is a link"),
                    e => Error::from(std::io::Error::from(e)).at(field),
                },
            )?;
        match kind(&file)? {
            FileType::RegularFile => Ok(file),
            _ => Err(refused("is not a file")),
        }
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
        let name = format!("/proc/self/fd/{}", found.as_raw_fd());
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = rustix::fs::open(name, flags, Mode::empty());
        opened.map_err(|e| Error::from(std::io::Error::from(e)).at(field))
    }

    /// A socket with a name: one of root's own that listens, or who listens there already.
    fn port_socket(&self, field: &str, path: &str, listen: bool) -> Result<OwnedFd> {
        let (directory, name) = self.port_place(field, path)?;
        let at = format!("/proc/self/fd/{}/{name}", directory.as_raw_fd());
        if !listen {
            let connected = UnixStream::connect(at).map_err(|e| nobody(field, path, e))?;
            return Ok(connected.into());
        }
        match rustix::fs::statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW) {
            // What an earlier start left, or somebody else's that has ended.
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Socket => {
                if UnixStream::connect(&at).is_ok() {
                    return Err(Error::conflict(format!("somebody listens at {path:?}")).at(field));
                }
                rustix::fs::unlinkat(&directory, &name, AtFlags::empty()).map_err(std::io::Error::from)?;
            }
            Ok(_) => return Err(Error::conflict(format!("{path:?} is there, and is no socket")).at(field)),
            Err(rustix::io::Errno::NOENT) => {}
            Err(e) => return Err(Error::from(std::io::Error::from(e)).at(field)),
        }
        let listener = UnixListener::bind(&at).map_err(|e| Error::from(e).at(field))?;
        let mode = Mode::from_raw_mode(0o600);
        rustix::fs::chmodat(&directory, &name, mode, AtFlags::empty()).map_err(std::io::Error::from)?;
        Ok(listener.into())
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

fn kind(fd: &OwnedFd) -> Result<FileType> {
    let stat = rustix::fs::fstat(fd).map_err(std::io::Error::from)?;
    Ok(FileType::from_raw_mode(stat.st_mode))
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::ErrorKind;
    use std::io::{Read, Write};

    fn policy(granted: &Path) -> HostPolicy {
        HostPolicy { port_paths: vec![granted.to_owned()], ..HostPolicy::default() }
    }

    fn file(path: &Path, append: bool) -> PortFile {
        PortFile { path: path.to_str().unwrap().to_owned(), append }
    }

    #[test]
    fn files_are_made_and_written_below_what_is_granted_only() {
        let dir = tempfile::tempdir().unwrap();
        let (granted, other) = (dir.path().join("granted"), dir.path().join("other"));
        std::fs::create_dir(&granted).unwrap();
        std::fs::create_dir(&other).unwrap();
        std::os::unix::fs::symlink(&other, granted.join("link")).unwrap();
        std::os::unix::fs::symlink(other.join("x"), granted.join("file")).unwrap();
        let policy = policy(&granted);
        for (append, content) in [(false, "ab"), (true, "abab"), (false, "ab")] {
            let fd = policy.port_file("f", &file(&granted.join("a"), append)).unwrap();
            File::from(fd).write_all(b"ab").unwrap();
            assert_eq!(std::fs::read_to_string(granted.join("a")).unwrap(), content);
        }
        for (path, kind) in [
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
