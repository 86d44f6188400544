//! The guest's own API (`/dev/incus/sock`, `/dev/lxd/sock`): one server for each container (`karst-keeper --guest-api`),
//! below a keeper of its own, so that it survives the daemons. It is the guest's user without any right and knows nothing
//! but the file that is written here.
//!
//! STATE/guestapi holds `socket` (what is mounted in the container, the socket in it), `data` (what the server reads, and
//! what the guest said of itself) and `keeper`.

use crate::proxies::{self, Place};
use karst_guest::{
    ResolvedGuest,
    keeper::{self, Console, Spec},
};
use karst_host::{Program, mountns};
use karst_keeper::guest_data::{self, GuestData};
use karst_model::{Error, Result, spec::GuestApi};
use std::{
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            fs::{PermissionsExt, chown},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
};

fn root(state_dir: &Path) -> PathBuf {
    state_dir.join("guestapi")
}

fn data_dir(state_dir: &Path) -> PathBuf {
    root(state_dir).join("data")
}

/// Lines of the configuration that show the socket inside.
pub(crate) fn mounts(state_dir: &Path) -> [String; 2] {
    let socket = mountns::escape(&root(state_dir).join("socket").to_string_lossy());
    ["dev/incus", "dev/lxd"].map(|at| format!("{socket} {at} none bind,ro,create=dir 0 0"))
}

/// What the guest sees.
fn shown(guest: &ResolvedGuest, api: &GuestApi) -> Result<GuestData> {
    let cloud = &guest.cloud_init;
    let mut config = api.config.clone();
    let large = [
        ("cloud-init.network-config", &cloud.network_config),
        ("cloud-init.user-data", &cloud.user_data),
        ("cloud-init.vendor-data", &cloud.vendor_data),
    ];
    for (key, value) in large {
        // One under its older name is shown by that.
        if let (Some(value), false) = (value, config.contains_key(&key.replace("cloud-init.", "user."))) {
            config.insert(key.to_owned(), value.clone());
        }
    }
    let own = api.config.get("user.meta-data").map(String::as_str).unwrap_or_default();
    let meta_data = format!(
        "#cloud-config\ninstance-id: {}\nlocal-hostname: {}\n{own}",
        cloud.instance_id, guest.hostname
    );
    let devices = api.devices.iter().map(|(name, keys)| Ok((name.clone(), serde_json::to_string(keys)?)));
    Ok(GuestData {
        instance_type: guest.kind.as_str().to_owned(),
        location: api.location.clone(),
        meta_data,
        config,
        devices: devices.collect::<Result<_>>()?,
    })
}

/// Writes what the guest sees from now on; the server tells who listens.
pub(crate) fn write(guest: &ResolvedGuest, api: &GuestApi) -> Result<()> {
    let dir = data_dir(&guest.state_dir);
    let fresh = dir.join("data.new");
    std::fs::write(&fresh, shown(guest, api)?.render())?;
    owned(&fresh, guest.ids.base, 0o640)?;
    std::fs::rename(fresh, dir.join(guest_data::FILE))?;
    Ok(())
}

/// Root's, and for the group of the guest's root as the mode says.
fn owned(path: &Path, group: u32, mode: u32) -> Result<()> {
    chown(path, Some(0), Some(group))?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(mode))?;
    Ok(())
}

fn directory(path: &Path, group: u32, mode: u32) -> Result<()> {
    std::fs::create_dir(path)?;
    owned(path, group, mode)
}

/// The guest has started anew and not yet said that it is ready.
pub(crate) fn forget_state(state_dir: &Path) -> Result<()> {
    match std::fs::File::options()
        .write(true)
        .truncate(true)
        .open(data_dir(state_dir).join(guest_data::STATE))
    {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

/// Makes the directories, the data and the socket, which is what the container's set-up mounts; nobody serves it yet.
pub(crate) fn prepare(guest: &ResolvedGuest, api: &GuestApi) -> Result<UnixListener> {
    let (root, base) = (root(&guest.state_dir), guest.ids.base);
    match std::fs::remove_dir_all(&root) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
        _ => {}
    }
    directory(&root, 0, 0o711)?;
    directory(&root.join("keeper"), 0, 0o700)?;
    directory(&data_dir(&guest.state_dir), base, 0o750)?;
    write(guest, api)?;
    let state = data_dir(&guest.state_dir).join(guest_data::STATE);
    std::fs::write(&state, "")?;
    owned(&state, base, 0o660)?;
    let socket = root.join("socket");
    directory(&socket, 0, 0o755)?;
    // By descriptor: the path may be longer than an address of a socket.
    let dir = std::fs::File::open(&socket)?;
    let listener = UnixListener::bind(format!("/proc/self/fd/{}/sock", dir.as_raw_fd()))?;
    // The guest's root alone may connect.
    let owner = guest.inside().base;
    chown(socket.join("sock"), Some(owner), Some(owner))?;
    std::fs::set_permissions(socket.join("sock"), PermissionsExt::from_mode(0o600))?;
    Ok(listener)
}

/// Starts the server.
pub(crate) async fn start(place: &Place<'_>, listener: UnixListener) -> Result<()> {
    let data: OwnedFd = std::fs::File::open(data_dir(place.state_dir))?.into();
    let spec = Spec {
        daemon: place.daemon_id.to_owned(),
        instance: place.instance.to_string(),
        program: Program::Keeper.path()?,
        argv: vec!["karst-keeper".into(), "--guest-api".into()],
        user: Some((place.ids.base, place.ids.base, vec![])),
        no_new_privs: true,
        clear_capabilities: true,
        keeper_cgroups: place.cgroups.create_tracking(place.group)?,
        rlimits: vec![(libc::RLIMIT_NOFILE, 128, 128), (libc::RLIMIT_FSIZE, 4096, 4096)],
        fds: vec![3, 4],
        console: Console::None,
        ..Spec::default()
    };
    let keeper = root(place.state_dir).join("keeper");
    let started = keeper::launch(&keeper, &spec, vec![listener.into(), data]).await;
    started.map(drop).map_err(|e: Error| e.at("config.security.guestapi"))
}

/// Ends the server and forgets everything of it; fine when there is none.
pub(crate) async fn stop(state_dir: &Path) -> Result<()> {
    let root = root(state_dir);
    if root.exists() {
        proxies::end(&root.join("keeper")).await?;
        proxies::remove_tree(&root)?;
    }
    Ok(())
}
