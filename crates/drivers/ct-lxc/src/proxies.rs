//! Proxies: for each a process that passes connections on (`karst-keeper --forward`), below a keeper of its own, so that it
//! survives the daemons and is found again. It is the guest's user without any right. Its state lies in STATE/proxies/NAME.
//!
//! Paths of the host in a proxy are those that the agent has resolved: granted, and without links. What listens in the guest by
//! a path is made there with the rights of the guest's root.
//!
//! A proxy belongs to one life of the container: the network namespace is another after a reboot from inside.

use crate::proc::Init;
use karst_guest::{
    IdRange,
    keeper::{self, Console, Spec, write_private},
};
use karst_host::{
    Program,
    cgroup::Cgroups,
    netns,
    sockets::{self, Owner},
};
use karst_model::{
    Error, ErrorKind, InstanceId, Result,
    device::{ProxyAddress, ProxyDevice, ProxyProtocol, SocketMode},
    spec::ProxySpec,
};
use std::{
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

fn root(state_dir: &Path) -> PathBuf {
    state_dir.join("proxies")
}

impl Place<'_> {
    /// The host's id of one of the guest's.
    fn inside(&self, id: u32) -> Result<u32> {
        match id < self.users.count {
            true => Ok(self.users.base + id),
            false => {
                let text = format!("the guest has users and groups below {} only", self.users.count);
                Err(Error::invalid("uid", text))
            }
        }
    }
}

/// What a proxy is made of.
pub(crate) struct Place<'a> {
    pub(crate) state_dir: &'a Path,
    pub(crate) daemon_id: &'a str,
    pub(crate) instance: InstanceId,
    /// The guest's own ids of the host, which its helpers run as.
    pub(crate) ids: IdRange,
    /// What the guest's users are on the host: those ids, or the host's.
    pub(crate) users: IdRange,
    pub(crate) cgroups: &'a Cgroups,
    /// Where the processes are.
    pub(crate) group: &'a str,
}

/// What of a proxy's socket on the host is kept, to remove it by.
const SOCKET: &str = "socket";

/// Starts a proxy; fine when it runs.
pub(crate) async fn start(place: &Place<'_>, init: &Init, proxy: &ProxySpec) -> Result<()> {
    crate::disks::check_name(&proxy.name)?;
    let dir = root(place.state_dir).join(&proxy.name);
    if keeper::is_alive(&dir) {
        return Ok(());
    }
    std::fs::create_dir_all(&dir)?;
    let device = &proxy.device;
    let named = |key: &str| format!("devices.{}.{key}", proxy.name);
    let mut fds = vec![];
    if !device.in_guest {
        fds.push(netns::namespace_of(init.pid)?);
    }
    for (at, _) in &device.pairs {
        fds.push(listen(place, init, device, at, &dir).map_err(|e| e.at(named("listen")))?);
    }
    let connect = device.pairs.first().map(|(_, to)| to);
    let from = match connect {
        Some(ProxyAddress::Path(path)) if device.in_guest => Some((split(path)?.0, None)),
        Some(ProxyAddress::Path(_)) => Some((Path::new("/"), Some(sockets::root_of(init.pid)?))),
        _ => None,
    };
    let mut argv: Vec<std::ffi::OsString> = vec!["karst-keeper".into(), "--forward".into()];
    let unix = device.pairs.first().is_some_and(|(at, _)| at.is_unix());
    argv.push(match device.protocol {
        ProxyProtocol::Udp => "udp".into(),
        ProxyProtocol::Tcp if unix => "unix".into(),
        ProxyProtocol::Tcp => "tcp".into(),
    });
    if device.announce {
        argv.push("--announce".into());
    }
    for (_, to) in &device.pairs {
        argv.push(match to {
            // Relative to the directory that goes along.
            ProxyAddress::Path(path) if device.in_guest => format!("unix:/{}", split(path)?.1).into(),
            other => other.to_string().into(),
        });
    }
    let mut count = device.pairs.len();
    if let Some((directory, open)) = from {
        let open = match open {
            Some(open) => open,
            None => sockets::directory(directory).map_err(|e| e.at(named("connect")))?,
        };
        fds.push(open);
        count += 1;
    }
    let user = match device.user {
        // On the host as the host knows them: its policy grants the path that they connect to.
        Some((uid, gid)) if device.in_guest => (uid, gid),
        Some((uid, gid)) => (place.inside(uid).map_err(|e| e.at(named("security.uid")))?, place.inside(gid)?),
        // Sockets in the guest are its root's to connect to.
        None if !device.in_guest && matches!(connect, Some(ProxyAddress::Path(_))) => {
            (place.users.base, place.users.base)
        }
        None => (place.ids.base, place.ids.base),
    };
    let spec = Spec {
        daemon: place.daemon_id.to_owned(),
        instance: place.instance.to_string(),
        program: Program::Keeper.path()?,
        argv,
        user: Some((user.0, user.1, vec![])),
        no_new_privs: true,
        clear_capabilities: true,
        keeper_cgroups: place.cgroups.create_tracking(place.group)?,
        rlimits: vec![(libc::RLIMIT_NOFILE, 4096, 4096)],
        fds: (3..).take(count).collect(),
        network_namespace: !device.in_guest,
        console: Console::None,
        ..Spec::default()
    };
    keeper::launch(&dir, &spec, fds).await.map(drop)
}

/// Directory and name of a socket.
fn split(path: &str) -> Result<(&Path, &str)> {
    match path.rsplit_once('/') {
        Some((directory, name)) if !name.is_empty() => {
            Ok((Path::new(if directory.is_empty() { "/" } else { directory }), name))
        }
        _ => Err(Error::invalid("listen", format!("{path:?} is no path of a socket"))),
    }
}

/// A socket that a proxy listens at.
fn listen(
    place: &Place<'_>,
    init: &Init,
    device: &ProxyDevice,
    at: &ProxyAddress,
    dir: &Path,
) -> Result<OwnedFd> {
    let inside = device.in_guest.then_some(init.pid);
    match at {
        ProxyAddress::Net(address) => netns::listen(inside, device.protocol == ProxyProtocol::Udp, *address),
        ProxyAddress::Abstract(name) => {
            let namespace = match inside {
                Some(pid) => netns::namespace_of(pid)?,
                None => netns::own()?,
            };
            sockets::listen_abstract(namespace, name)
        }
        ProxyAddress::Path(path) => {
            let (directory, name) = split(path)?;
            let wanted = device.socket.unwrap_or(SocketMode { uid: 0, gid: 0, mode: 0o644 });
            if let Some(pid) = inside {
                let open = sockets::directory_in(sockets::root_of(pid)?.as_fd(), directory)?;
                let maker = Owner { uid: place.users.base, gid: place.users.base };
                let owner = Owner { uid: place.inside(wanted.uid)?, gid: place.inside(wanted.gid)? };
                return sockets::listen_in(open.as_fd(), name, maker, owner, wanted.mode);
            }
            let open = sockets::directory(directory)?;
            // Recorded before it is made.
            write_private(&dir.join(SOCKET), path.as_bytes())?;
            let owner = Owner { uid: wanted.uid, gid: wanted.gid };
            sockets::listen_in(open.as_fd(), name, Owner { uid: 0, gid: 0 }, owner, wanted.mode)
        }
    }
}

/// Does it listen in the guest by a path?
pub(crate) fn listens_inside(proxy: &ProxySpec) -> bool {
    let by_path = |(at, _): &(ProxyAddress, ProxyAddress)| matches!(at, ProxyAddress::Path(_));
    proxy.device.in_guest && proxy.device.pairs.iter().any(by_path)
}

/// Is every place in the guest at which a proxy listens still there?
pub(crate) fn is_there(init: &Init, proxy: &ProxySpec) -> bool {
    let there = |path: &str| {
        let (directory, name) = split(path)?;
        let open = sockets::directory_in(sockets::root_of(init.pid)?.as_fd(), directory)?;
        Ok::<_, Error>(rustix::fs::statat(&open, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).is_ok())
    };
    !listens_inside(proxy)
        || proxy.device.pairs.iter().all(|(at, _)| match at {
            ProxyAddress::Path(path) => there(path).unwrap_or(false),
            _ => true,
        })
}

/// Ends a proxy and forgets it; fine when there is none. Its socket in the guest, whose `init` still runs, goes too.
pub(crate) async fn stop(state_dir: &Path, init: Option<&Init>, proxy: &ProxySpec) -> Result<()> {
    end(&root(state_dir).join(&proxy.name)).await?;
    let Some(init) = init.filter(|_| proxy.device.in_guest) else { return Ok(()) };
    for (at, _) in &proxy.device.pairs {
        if let ProxyAddress::Path(path) = at {
            let (directory, name) = split(path)?;
            let gone = sockets::root_of(init.pid)
                .and_then(|root| sockets::directory_in(root.as_fd(), directory))
                .and_then(|open| sockets::remove_stale(open.as_fd(), name));
            // The guest may have put anything in its place, which is its own.
            if let Err(e) = gone {
                tracing::debug!(path, error = %e, "a socket in a guest stays");
            }
        }
    }
    Ok(())
}

/// Ends what a keeper in `dir` watches, and removes the directory.
pub(crate) async fn end(dir: &Path) -> Result<()> {
    let asked = match keeper::connect(dir).await {
        Err(e) if e.is(ErrorKind::Timeout) => {
            tracing::warn!(dir = %dir.display(), "a helper's keeper does not answer; ending it");
            keeper::end_keeper(dir)?;
            keeper::wait_gone(dir).await?;
            keeper::connect(dir).await
        }
        asked => asked,
    };
    match asked {
        Ok((keeper, _)) => {
            // It may end by itself at this moment, or by another who clears up after the same guest.
            let ended = match keeper.kill().await {
                Ok(()) => keeper.wait_exit().await.map(drop),
                Err(e) => Err(e),
            };
            ended.or_else(|e| if e.is(ErrorKind::NotFound) { Ok(()) } else { Err(e) })?;
        }
        Err(e) if e.is(ErrorKind::NotFound) => {}
        Err(e) => return Err(e),
    }
    if dir.exists() {
        keeper::wait_gone(dir).await?;
        remove_socket(dir);
        remove_tree(dir)?;
    }
    Ok(())
}

/// Removes a directory that another may be removing, too.
pub(crate) fn remove_tree(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

/// Takes away the socket on the host at which the proxy of this directory listened.
fn remove_socket(dir: &Path) {
    let Ok(path) = std::fs::read_to_string(dir.join(SOCKET)) else { return };
    let gone = split(&path).and_then(|(directory, name)| {
        let open = sockets::directory(directory)?;
        sockets::remove_stale(open.as_fd(), name)
    });
    match gone {
        Err(e) if !e.is(ErrorKind::NotFound) => tracing::warn!(path, error = %e, "a proxy's socket stays"),
        _ => {}
    }
}

/// Ends all proxies of a guest.
pub(crate) async fn stop_all(state_dir: &Path) -> Result<()> {
    let entries = match std::fs::read_dir(root(state_dir)) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e.into()),
    };
    for entry in entries.flatten() {
        end(&entry.path()).await?;
    }
    Ok(())
}
