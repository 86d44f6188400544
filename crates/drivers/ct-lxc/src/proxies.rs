//! Proxies: for each a process that passes connections on (`karst-keeper --forward`), below a keeper of its own, so that it
//! survives the daemons and is found again. It is the guest's user without any right. Its state lies in STATE/proxies/NAME.
//!
//! A proxy belongs to one life of the container: the network namespace is another after a reboot from inside.

use crate::proc::Init;
use karst_guest::keeper::{self, Console, Spec};
use karst_host::{Program, cgroup::Cgroups, netns};
use karst_model::{
    Error, ErrorKind, InstanceId, Result,
    device::{ProxyDevice, ProxyProtocol},
    spec::ProxySpec,
};
use std::path::{Path, PathBuf};

fn root(state_dir: &Path) -> PathBuf {
    state_dir.join("proxies")
}

/// What a proxy is made of.
pub(crate) struct Place<'a> {
    pub(crate) state_dir: &'a Path,
    pub(crate) daemon_id: &'a str,
    pub(crate) instance: InstanceId,
    /// The host's id of the guest's root.
    pub(crate) user: u32,
    pub(crate) cgroups: &'a Cgroups,
    /// Where the processes are.
    pub(crate) group: &'a str,
}

/// Starts a proxy; fine when it runs.
pub(crate) async fn start(place: &Place<'_>, init: &Init, proxy: &ProxySpec) -> Result<()> {
    crate::disks::check_name(&proxy.name)?;
    let dir = root(place.state_dir).join(&proxy.name);
    if keeper::is_alive(&dir) {
        return Ok(());
    }
    std::fs::create_dir_all(&dir)?;
    let ProxyDevice { protocol, in_guest, pairs } = &proxy.device;
    let udp = *protocol == ProxyProtocol::Udp;
    let mut fds = vec![];
    if !in_guest {
        fds.push(netns::namespace_of(init.pid)?);
    }
    for (listen, _) in pairs {
        let inside = in_guest.then_some(init.pid);
        let bound = netns::listen(inside, udp, *listen);
        fds.push(bound.map_err(|e| e.at(format!("devices.{}.listen", proxy.name)))?);
    }
    let mut argv: Vec<std::ffi::OsString> = vec!["karst-keeper".into(), "--forward".into()];
    argv.push(if udp { "udp" } else { "tcp" }.into());
    argv.extend(pairs.iter().map(|(_, connect)| connect.to_string().into()));
    let spec = Spec {
        daemon: place.daemon_id.to_owned(),
        instance: place.instance.to_string(),
        program: Program::Keeper.path()?,
        argv,
        user: Some((place.user, place.user, vec![])),
        no_new_privs: true,
        clear_capabilities: true,
        keeper_cgroups: place.cgroups.create_tracking(place.group)?,
        rlimits: vec![(libc::RLIMIT_NOFILE, 4096, 4096)],
        fds: (3..).take(pairs.len()).collect(),
        network_namespace: !in_guest,
        console: Console::None,
        ..Spec::default()
    };
    keeper::launch(&dir, &spec, fds).await.map(drop)
}

/// Ends a proxy and forgets it; fine when there is none.
pub(crate) async fn stop(state_dir: &Path, name: &str) -> Result<()> {
    end(&root(state_dir).join(name)).await
}

/// Ends what a keeper in `dir` watches, and removes the directory.
pub(crate) async fn end(dir: &Path) -> Result<()> {
    match keeper::connect(dir).await {
        Ok((keeper, _)) => {
            keeper.kill().await?;
            keeper.wait_exit().await?;
        }
        Err(e) if e.is(ErrorKind::NotFound) => {}
        Err(e) => return Err(e),
    }
    if dir.exists() {
        keeper::wait_gone(dir).await?;
        std::fs::remove_dir_all(dir).map_err(Error::from)?;
    }
    Ok(())
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
