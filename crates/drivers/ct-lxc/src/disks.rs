//! Disks beside the root: file systems of volumes and paths of the host, mounted at the start and while the container runs.
//!
//! `lxc-start` lives in a mount namespace of its own, made before each start. There STATE/mounts is covered by a file system
//! in memory that holds an `fstab` and, below `disks`, a mount for each disk, ready-made: read-only and with its owners
//! mapped. The container's set-up binds them to their places; again when the container reboots by itself. Since a container
//! has a user namespace of its own, it cannot take back what is locked there (read-only; but for a privileged one, which has
//! none), and when `lxc-start` ends, all is gone by itself.
//!
//! Device nodes stand ready likewise, below `nodes`, owned by the container's ids.
//!
//! A disk that comes or goes while the container runs is first in the record, then in that namespace, then inside. Each step
//! can run again: what is mounted is asked of the kernel.

use crate::{
    attach::Helper,
    driver::Running,
    proc::Init,
    record::{Disk, Node, Record},
};
use karst_guest::{DiskFormat, IdRange, ResolvedDisk, ResolvedGuest, ResolvedNode};
use karst_host::{
    mountns::{self as mount, MountKey, MountOptions},
    overlay::{self, Held, Mapped},
};
use karst_keeper::attach::{Operation, Request};
use karst_model::{Error, Result};
use std::{
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

/// Most layers of mounts over each other that unplugging takes away.
const LAYERS: usize = 64;

/// Where disks stand ready.
pub(crate) fn stage(state_dir: &Path) -> PathBuf {
    state_dir.join("mounts")
}

/// Where the root is for `lxc-start`: mounted ready-made in its namespace, below directories that the container's root can pass,
/// which liblxc needs when the container reboots by itself. Nobody else sees it there.
pub(crate) fn root(guest: &ResolvedGuest) -> PathBuf {
    stage(&guest.state_dir).join("root")
}

/// The file that says what goes where.
pub(crate) fn fstab(state_dir: &Path) -> PathBuf {
    stage(state_dir).join("fstab")
}

fn staged(state_dir: &Path, disk: &Disk) -> PathBuf {
    let kind = if disk.node.is_some() { "nodes" } else { "disks" };
    stage(state_dir).join(kind).join(&disk.name)
}

pub(crate) fn check_name(name: &str) -> Result<()> {
    let plain = !matches!(name, "" | "." | "..")
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if plain { Ok(()) } else { Err(Error::invalid("devices", format!("{name:?} is no name of a device"))) }
}

fn check_place(name: &str, at: &str) -> Result<String> {
    let plain = !at.contains(['\n', '\0']) && at.split('/').all(|p| p != ".." && p != ".");
    if !plain || !at.starts_with('/') || matches!(at.trim_end_matches('/'), "" | "/proc" | "/sys" | "/dev") {
        return Err(Error::invalid(
            format!("devices.{name}.path"),
            format!("nothing can be mounted at {at:?}"),
        ));
    }
    Ok(at.trim_end_matches('/').to_owned())
}

/// What of a disk the record keeps, after checking that it can be mounted.
fn checked(disk: &ResolvedDisk) -> Result<Disk> {
    let field = |key: &str| format!("devices.{}.{key}", disk.name);
    check_name(&disk.name)?;
    let Some(at) = &disk.mount_point else {
        return Err(Error::invalid(field("path"), "a disk of a container needs the path to mount it at"));
    };
    let at = check_place(&disk.name, at)?;
    let file = match disk.format {
        DiskFormat::Directory | DiskFormat::Memory(_) => false,
        // A file of the host, bound over a file.
        DiskFormat::Raw if disk.foreign && !is_block(disk)? => true,
        _ if disk.foreign => {
            return Err(Error::unsupported(
                "a block device of the host is given to a container as a device of type unix-block",
            )
            .at(field("source")));
        }
        _ => {
            return Err(Error::invalid(
                field("source"),
                "a block volume cannot be mounted in a container; use one with a file system",
            ));
        }
    };
    Ok(Disk {
        name: disk.name.clone(),
        at,
        source: disk.path.clone(),
        readonly: disk.readonly,
        mapped: !disk.foreign || disk.shift,
        recursive: disk.recursive && disk.foreign,
        follow: disk.follow && disk.foreign,
        file,
        memory: match disk.format {
            DiskFormat::Memory(size) => Some(size.unwrap_or(0)),
            _ => None,
        },
        node: None,
        key: None,
    })
}

fn checked_node(node: &ResolvedNode, ids: IdRange) -> Result<Disk> {
    check_name(&node.name)?;
    if node.uid >= ids.count || node.gid >= ids.count {
        let text = format!("the guest has users and groups below {} only", ids.count);
        return Err(Error::invalid(format!("devices.{}.uid", node.name), text));
    }
    Ok(Disk {
        name: node.name.clone(),
        at: check_place(&node.name, &node.path)?,
        source: PathBuf::new(),
        readonly: false,
        mapped: true,
        recursive: false,
        follow: false,
        file: true,
        memory: None,
        node: Some(Node { device: node.device, uid: node.uid, gid: node.gid, mode: node.mode }),
        key: None,
    })
}

fn is_block(disk: &ResolvedDisk) -> Result<bool> {
    let mode = match &disk.opened {
        Some(opened) => rustix::fs::fstat(&*opened.0),
        None => rustix::fs::stat(&disk.path),
    }
    .map_err(std::io::Error::from)?
    .st_mode;
    Ok(rustix::fs::FileType::from_raw_mode(mode) == rustix::fs::FileType::BlockDevice)
}

/// A guest's disks, checked; parents before what is mounted in them.
pub(crate) fn wanted(guest: &ResolvedGuest) -> Result<Vec<Disk>> {
    let mut disks = guest.disks.iter().filter(|d| !d.ejected).map(checked).collect::<Result<Vec<_>>>()?;
    for node in &guest.nodes {
        disks.push(checked_node(node, guest.inside())?);
    }
    disks.sort_by(|a, b| a.at.cmp(&b.at));
    Ok(disks)
}

/// The mount of a disk, not yet anywhere; none of a device node. Blocks.
fn detached(guest: &ResolvedGuest, disk: &Disk, ids: Option<&OwnedFd>) -> Result<Option<OwnedFd>> {
    if disk.node.is_some() {
        return Ok(None);
    }
    if let Some(size) = disk.memory {
        let owner = (guest.inside().base, guest.inside().base);
        return mount::in_memory(Some(size).filter(|s| *s > 0), owner, disk.readonly).map(Some);
    }
    let field = || format!("devices.{}.source", disk.name);
    let Some(resolved) = guest.disks.iter().find(|d| d.name == disk.name) else {
        return Err(Error::internal("a disk could not be mounted", "it is not in the specification"));
    };
    let source = match &resolved.opened {
        Some(opened) => opened.0.try_clone()?,
        None => mount::open_path(&disk.source)?,
    };
    let options = MountOptions { readonly: disk.readonly, recursive: disk.recursive, follow: disk.follow };
    let ids = ids.filter(|_| disk.mapped).map(OwnedFd::as_fd);
    mapped(&source, options, ids, guest.inside()).map(Some).map_err(|e| e.at(field()))
}

/// What id 0 of the guest is on disk in the tree of its root: another than 0 where its pool cannot map owners.
pub(crate) fn owner(root: &Path, guest: &ResolvedGuest) -> Result<u32> {
    let found = rustix::fs::stat(root).map_err(std::io::Error::from)?.st_uid;
    let inside = guest.inside();
    Ok(if found >= inside.base && found - inside.base < inside.count { inside.base } else { 0 })
}

/// A mount with the guest's owners: mapped, or as it is on a file system that maps none and where they are the guest's on disk.
fn mapped(
    source: &OwnedFd,
    options: MountOptions,
    ids: Option<std::os::fd::BorrowedFd<'_>>,
    inside: IdRange,
) -> Result<OwnedFd> {
    match mount::detached(source.as_fd(), options, ids) {
        Err(e) if ids.is_some() && e.is(karst_model::ErrorKind::Unsupported) => {
            let owner = rustix::fs::fstat(source).map_err(std::io::Error::from)?.st_uid;
            match owner.checked_sub(inside.base) {
                Some(id) if id < inside.count => mount::detached(source.as_fd(), options, None),
                _ => Err(e),
            }
        }
        other => other,
    }
}

/// Puts a mount or node where the container's set-up finds it and learns what the kernel calls it; in the namespace of
/// `lxc-start`.
fn put(state_dir: &Path, disk: &mut Disk, ids: IdRange, mount: Option<&OwnedFd>) -> Result<()> {
    let place = staged(state_dir, disk);
    if let Some(node) = &disk.node {
        let owner = (ids.base.saturating_add(node.uid), ids.base.saturating_add(node.gid));
        mount::make_node(&place, node.device, owner, node.mode)?;
    } else if disk.file {
        std::fs::File::options().create(true).append(true).open(&place)?;
    } else if !place.is_dir() {
        std::fs::create_dir(&place)?;
    }
    if let Some(mount) = mount {
        mount::attach(mount, &place)?;
    }
    disk.key = key(state_dir, disk)?;
    Ok(())
}

fn key(state_dir: &Path, disk: &Disk) -> Result<Option<MountKey>> {
    let place = staged(state_dir, disk);
    let mounts = mount::entries(None)?;
    let at = |place: &Path| mounts.iter().rev().find(|e| e.at == place).map(|e| e.key.clone());
    if disk.node.is_none() {
        return Ok(at(&place));
    }
    // A node is a file of the file system that it stands in.
    let system = place.parent().and_then(at);
    Ok(system.filter(|_| place.exists()).map(|k| MountKey { root: format!("/{}", disk.name), ..k }))
}

fn take(state_dir: &Path, disk: &Disk) -> Result<()> {
    let place = staged(state_dir, disk);
    if disk.node.is_none() {
        mount::detach(&place)?;
    }
    let gone = match std::fs::symlink_metadata(&place) {
        Ok(m) if m.is_dir() => std::fs::remove_dir(&place),
        Ok(_) => std::fs::remove_file(&place),
        Err(e) => Err(e),
    };
    match gone {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

/// Writes the `fstab`; in the namespace of `lxc-start`.
fn write_fstab(state_dir: &Path, disks: &[Disk]) -> Result<()> {
    let fresh = stage(state_dir).join("fstab.new");
    std::fs::write(&fresh, render(state_dir, disks))?;
    // The container's set-up reads it as the container's root; nobody else sees this file system.
    std::fs::set_permissions(&fresh, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    std::fs::rename(fresh, fstab(state_dir))?;
    Ok(())
}

fn render(state_dir: &Path, disks: &[Disk]) -> String {
    let line = |disk: &Disk| {
        let source = staged(state_dir, disk);
        let source = mount::escape(&source.to_string_lossy());
        let at = mount::escape(disk.at.trim_start_matches('/'));
        let bind = if disk.recursive { "rbind" } else { "bind" };
        let create = if disk.file { "file" } else { "dir" };
        format!("{source} {at} none {bind},create={create} 0 0\n")
    };
    disks.iter().map(line).collect()
}

/// What maps the owners on these disks; making it copies this process, so that it is made for disks that need it only. A
/// privileged container sees them as they are.
fn mapping(guest: &ResolvedGuest, disks: &[Disk]) -> Result<Option<OwnedFd>> {
    let needed = !guest.security.privileged && disks.iter().any(|d| d.mapped && d.node.is_none());
    needed.then(|| mount::user_namespace(guest.ids.base, guest.ids.count)).transpose()
}

/// Makes the mount namespace for a start; fills in what the kernel calls each disk. The mount that `hide` lies on is not in
/// it. Blocks.
pub(crate) fn namespace(
    guest: &ResolvedGuest,
    disks: &mut [Disk],
    hide: Option<&Path>,
) -> Result<(OwnedFd, Option<Held>)> {
    let state_dir = guest.state_dir.as_path();
    let stage = stage(state_dir);
    match std::fs::create_dir(&stage) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(e.into()),
        _ => {}
    }
    let map = (!guest.security.privileged).then_some(Mapped { base: guest.ids.base, count: guest.ids.count });
    let ids = map.map(|m| mount::user_namespace(m.base, m.count)).transpose()?;
    let ready = disks.iter().map(|d| detached(guest, d, ids.as_ref())).collect::<Result<Vec<_>>>()?;
    let whole = match &guest.root_layers {
        Some(layers) => overlay::mount(layers, true, map)?,
        None => {
            let source = mount::open_path(&guest.root.path)?;
            mapped(&source, MountOptions::default(), ids.as_ref().map(AsFd::as_fd), guest.inside())?
        }
    };
    // What is mounted for other guests must not stay in use by this one.
    let ours = state_dir.ancestors().nth(2).unwrap_or(state_dir);
    let root = guest.root.path.as_path();
    let namespace = mount::new_namespace(|| {
        let mounts = mount::entries(None)?;
        let holds = |at: &Path| hide.is_some_and(|hide| hide.starts_with(at));
        let hidden = mounts
            .iter()
            .map(|m| m.at.clone())
            .filter(|at| holds(at))
            .max_by_key(|at| at.components().count());
        for other in mounts.into_iter().rev() {
            let needed = root.starts_with(&other.at) || other.at.starts_with(root);
            if other.at.starts_with(ours) && !needed || Some(&other.at) == hidden.as_ref() {
                mount::detach(&other.at)?;
            }
        }
        mount::cover(&stage, false)?;
        for kind in ["disks", "nodes"] {
            let place = stage.join(kind);
            std::fs::create_dir(&place)?;
            std::fs::set_permissions(&place, std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
        }
        mount::cover(&stage.join("nodes"), true)?;
        let place = self::root(guest);
        std::fs::create_dir(&place)?;
        mount::attach(&whole, &place)?;
        for (disk, mount) in disks.iter_mut().zip(&ready) {
            put(state_dir, disk, guest.inside(), mount.as_ref())?;
        }
        write_fstab(state_dir, disks)
    })?;
    Ok((namespace, guest.root_layers.is_some().then(|| Held::new(whole))))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let outcome = tokio::task::spawn_blocking(work).await;
    outcome.map_err(|e| Error::internal("mounting was broken off", e))?
}

/// Brings the disks of a running container to what is wanted; writes the record as it goes.
pub(crate) async fn update(
    running: &Running,
    init: impl Fn() -> Result<Init>,
    guest: &ResolvedGuest,
    record: &mut Record,
) -> Result<()> {
    let wanted = wanted(guest)?;
    let stays = |d: &Disk| d.key.is_some() && wanted.iter().any(|w| w.same(d));
    let gone: Vec<Disk> = record.disks.iter().filter(|d| !stays(d)).cloned().collect();
    // What is mounted in others first.
    for disk in gone.iter().rev() {
        unplug(running, &init, guest, record, disk).await?;
    }
    for disk in wanted {
        if !record.disks.iter().any(|d| d.same(&disk)) {
            plug(running, &init, guest, record, disk).await?;
        }
    }
    Ok(())
}

async fn plug(
    running: &Running,
    init: &impl Fn() -> Result<Init>,
    guest: &ResolvedGuest,
    record: &mut Record,
    disk: Disk,
) -> Result<()> {
    let init = init()?;
    let monitor = running.monitor()?;
    let name = disk.name.clone();
    record.disks.push(disk.clone());
    record.disks.sort_by(|a, b| a.at.cmp(&b.at));
    record.write(&guest.state_dir)?;
    let (resolved, all) = (guest.clone(), record.disks.clone());
    let mut new = disk.clone();
    let plugged = async {
        let new = blocking(move || {
            let state_dir = resolved.state_dir.clone();
            let ids = mapping(&resolved, std::slice::from_ref(&new))?;
            let mount = detached(&resolved, &new, ids.as_ref())?;
            mount::in_namespace_of(monitor, || {
                put(&state_dir, &mut new, resolved.inside(), mount.as_ref())?;
                write_fstab(&state_dir, &all)
            })?;
            Ok(new)
        })
        .await?;
        let request = Request {
            operation: Operation::Mount,
            pid: init.pid,
            path: new.at.clone().into(),
            target: staged(&guest.state_dir, &new).into(),
            ..Request::default()
        };
        let from = mount::namespace_of(monitor)?;
        if let Some(node) = &new.node {
            running.permit_device(&node.rule(), true).await?;
        }
        inside(record, &request, init, vec![from])
            .await
            .map_err(|e| e.at(format!("devices.{}.path", new.name)))?;
        Ok::<_, Error>(new)
    };
    match plugged.await {
        Ok(new) => {
            if let Some(kept) = record.disks.iter_mut().find(|d| d.name == name) {
                *kept = new;
            }
            record.write(&guest.state_dir)
        }
        Err(e) => {
            // Nothing is left of it; if that fails too, the record still names it and the next update takes it away.
            remove(running, None, guest, record, &disk).await?;
            Err(e)
        }
    }
}

async fn unplug(
    running: &Running,
    init: &impl Fn() -> Result<Init>,
    guest: &ResolvedGuest,
    record: &mut Record,
    disk: &Disk,
) -> Result<()> {
    remove(running, Some(init()?), guest, record, disk).await
}

/// Takes a disk away: from what a reboot mounts, then inside, then from the record.
async fn remove(
    running: &Running,
    init: Option<Init>,
    guest: &ResolvedGuest,
    record: &mut Record,
    disk: &Disk,
) -> Result<()> {
    let monitor = running.monitor()?;
    let rest: Vec<Disk> = record.disks.iter().filter(|d| d.name != disk.name).cloned().collect();
    let (state_dir, gone, kept) = (guest.state_dir.clone(), disk.clone(), rest.clone());
    let found = blocking(move || {
        mount::in_namespace_of(monitor, || {
            write_fstab(&state_dir, &kept)?;
            key(&state_dir, &gone)
        })
    })
    .await?;
    if let (Some(init), Some(key)) = (init, disk.key.clone().or(found)) {
        // Wherever the guest has moved it to; unless another disk shows the same.
        let shared = rest.iter().any(|d| d.key.as_ref() == Some(&key));
        for _ in 0..LAYERS {
            let mounts = mount::entries(Some(init.pid))?;
            let Some(at) = mounts
                .into_iter()
                .rev()
                .find(|e| e.key == key && (!shared || e.at == Path::new(&disk.at)))
                .map(|e| e.at)
            else {
                break;
            };
            let request = Request {
                operation: Operation::Unmount,
                append: disk.node.is_some(),
                pid: init.pid,
                path: at.into(),
                ..Request::default()
            };
            inside(record, &request, Init { pid: init.pid, pidfd: init.pidfd.try_clone()? }, vec![]).await?;
        }
    }
    if let Some(node) = &disk.node {
        let rule = node.rule();
        let elsewhere = rest.iter().filter_map(|d| d.node.as_ref()).any(|n| n.rule() == rule);
        if !elsewhere && !crate::config::always_permitted(&rule) {
            running.permit_device(&rule, false).await?;
        }
    }
    let (state_dir, gone) = (guest.state_dir.clone(), disk.clone());
    blocking(move || mount::in_namespace_of(monitor, || take(&state_dir, &gone))).await?;
    record.disks = rest;
    record.write(&guest.state_dir)
}

async fn inside(record: &Record, request: &Request, init: Init, rest: Vec<OwnedFd>) -> Result<()> {
    let instance = record.instance.to_string();
    let mut helper = Helper::start(&record.daemon_id, &instance, request, init.pidfd, rest).await?;
    helper.reply().await?;
    helper.release();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_what_goes_where() {
        let disk = |name: &str, at: &str| Disk {
            name: name.into(),
            at: at.into(),
            source: "/x".into(),
            readonly: false,
            mapped: true,
            recursive: name == "b",
            follow: false,
            file: name == "c",
            memory: None,
            node: None,
            key: None,
        };
        let disks = [disk("a", "/srv/my data"), disk("b", "/srv/b"), disk("c", "/etc/file")];
        assert_eq!(
            render(Path::new("/g"), &disks),
            "/g/mounts/disks/a srv/my\\040data none bind,create=dir 0 0\n\
             /g/mounts/disks/b srv/b none rbind,create=dir 0 0\n\
             /g/mounts/disks/c etc/file none bind,create=file 0 0\n"
        );
    }
}
