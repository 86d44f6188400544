//! The TPM 2.0 of a machine: a process `swtpm` beside QEMU, as the same user without any right of its own, under a keeper of
//! its own. It ends with QEMU's end of its control socket. What it keeps lies in `tpm/state` of the guest's directory,
//! which it reaches by a descriptor; so it does what that is encrypted with, where a secret says so.

use crate::{keys, launch::Groups};
use karst_guest::{
    ResolvedGuest,
    keeper::{self, Spec},
};
use karst_host::{Program, cgroup::Cgroups};
use karst_model::{Error, Result};
use rustix::{
    fs::{Gid, Mode, OFlags, Uid},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
};
use std::{
    io::ErrorKind,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    time::Duration,
};

/// The keeper's directory.
const DIR: &str = "tpm";
/// What the TPM keeps, in it.
const STATE: &str = "state";
/// Descriptors in its process.
const CONTROL: i32 = 10;
const PLACE: i32 = 11;
const KEY: i32 = 12;
/// How long it may take to see that QEMU is gone.
const LAST: Duration = Duration::from_secs(3);

/// Where its state is, of the guest in `dir`.
pub(crate) fn state(dir: &Path) -> PathBuf {
    dir.join(DIR).join(STATE)
}

/// Starts it; answers the socket that QEMU gets. The guest's control groups are there.
///
/// # Errors
/// Unsupported when swtpm is not installed.
pub(crate) async fn start(guest: &ResolvedGuest, groups: &Groups, cgroups: &Cgroups) -> Result<OwnedFd> {
    let program = Program::Swtpm.path().map_err(|e| Error { field: Some("devices".into()), ..e })?;
    let key = keys::of_tpm(guest)?;
    let dir = guest.state_dir.join(DIR);
    // Of a QEMU that is gone.
    end(&guest.state_dir).await?;
    for place in [dir.clone(), state(&guest.state_dir)] {
        match std::fs::DirBuilder::new().mode(0o700).create(&place) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e.into()),
            _ => {}
        }
    }
    give(&state(&guest.state_dir), guest.ids.base)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let place =
        rustix::fs::open(state(&guest.state_dir), flags, Mode::empty()).map_err(std::io::Error::from)?;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(std::io::Error::from)?;
    let mut argv = vec![
        "swtpm".to_owned(),
        "socket".into(),
        "--tpm2".into(),
        "--tpmstate".into(),
        format!("dir=/proc/self/fd/{PLACE},mode=0600"),
        "--ctrl".into(),
        format!("type=unixio,clientfd={CONTROL}"),
        // Also when QEMU is killed and says no more.
        "--terminate".into(),
    ];
    let (mut numbers, mut fds) = (vec![CONTROL, PLACE], vec![theirs, place]);
    if let Some(key) = key {
        argv.extend(["--key".into(), format!("pwdfd={KEY},mode=aes-256-cbc,kdf=pbkdf2")]);
        numbers.push(KEY);
        fds.push(key);
    }
    let spec = Spec {
        daemon: guest.daemon_id.clone(),
        instance: guest.instance.to_string(),
        generation: (guest.generation.incarnation, guest.generation.n),
        program,
        argv: argv.into_iter().map(Into::into).collect(),
        env: vec![("PATH".into(), "/usr/bin:/bin".into()), ("LC_ALL".into(), "C.UTF-8".into())],
        user: Some((guest.ids.base, guest.ids.base, vec![])),
        no_new_privs: true,
        clear_capabilities: true,
        keeper_cgroups: cgroups.dirs(&groups.keeper),
        cgroups: cgroups.dirs(&groups.keeper),
        rlimits: vec![(libc::RLIMIT_CORE, 0, 0), (libc::RLIMIT_NOFILE, 256, 256)],
        fds: numbers,
        ..Spec::default()
    };
    keeper::launch(&dir, &spec, fds).await?;
    Ok(ours)
}

/// What a TPM that the guest no longer has kept goes with it, when the guest starts without one: who takes it away wants its keys
/// gone, and who adds one later gets a new one. Snapshots keep theirs.
///
/// # Errors
/// When it cannot be removed.
pub(crate) async fn forget(guest_dir: &Path) -> Result<()> {
    end(guest_dir).await?;
    match std::fs::remove_dir_all(guest_dir.join(DIR)) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

/// The state belongs to the guest's user, also one that came by a copy.
fn give(place: &Path, id: u32) -> Result<()> {
    let own = |path: &Path| {
        rustix::fs::chownat(
            rustix::fs::CWD,
            path,
            Some(Uid::from_raw(id)),
            Some(Gid::from_raw(id)),
            rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(std::io::Error::from)
    };
    for entry in std::fs::read_dir(place)? {
        own(&entry?.path())?;
    }
    own(place)?;
    std::fs::set_permissions(place, std::fs::Permissions::from_mode(0o700))?;
    Ok(())
}

/// Waits for the end of one whose QEMU is gone, and ends it when it stays.
///
/// # Errors
/// When it cannot be ended.
pub(crate) async fn end(guest_dir: &Path) -> Result<()> {
    let dir = guest_dir.join(DIR);
    if keeper::read_status(&dir).is_none() {
        return Ok(());
    }
    if !matches!(tokio::time::timeout(LAST, keeper::wait_gone(&dir)).await, Ok(Ok(()))) {
        keeper::end_keeper(&dir)?;
        keeper::wait_gone(&dir).await?;
    }
    Ok(())
}
