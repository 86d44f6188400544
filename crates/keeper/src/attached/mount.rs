//! Mounts in a running container.
//!
//! What is mounted stands ready in the mount namespace of `lxc-start`, which is the host's. A mount that was only moved from
//! there into the container would be the container's own: its root could make a read-only one writable again. So a copy of
//! the namespace is made that belongs to the container's user namespace, for which the kernel locks all flags, and the
//! mount is taken from the copy. A privileged container has the host's user namespace, and nothing locks. The place is found and made with the container's own root rights.

use super::{At, Failure, Outcome, Root, alive, become_user, bound, enter, init_bounding, user_namespace};
use crate::sys;
use karst_keeper::{attach::Request, protocol as p};
use rustix::{
    fs::{FileType, Mode, OFlags, fstat, mkdirat},
    io::Errno,
    mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree},
};
use std::{
    ffi::OsStr,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
};

/// Mounts `target`, of the namespace that is passed, at `path` inside; makes the place where it is missing.
pub(super) fn mount(r: &Request, init: OwnedFd, rest: Vec<OwnedFd>, launch: BorrowedFd) -> Outcome<()> {
    let Some(from) = rest.into_iter().next().filter(|_| r.pid != 0) else {
        return Err(Failure::new("mounting: no namespace was passed", libc::EINVAL));
    };
    let bounding = init_bounding(r.pid)?;
    let user = user_namespace(r.pid)?;
    alive(&init)?;
    // SAFETY: plain call; this process has one thread.
    sys::check(unsafe { libc::setns(from.as_raw_fd(), libc::CLONE_NEWNS) })
        .at("entering the mount namespace")?;
    if user != 0 {
        enter(&init, user)?;
    }
    // SAFETY: as above.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } < 0 {
        return Err(io::Error::last_os_error()).at("locking the mount");
    }
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(rustix::fs::CWD, r.target.as_os_str(), flags).at("taking the mount")?;
    enter(&init, libc::CLONE_NEWNS)?;
    bound(bounding)?;
    become_user(0, 0)?;
    // SAFETY: plain call. What is made on the way has the usual mode.
    unsafe { libc::umask(0o022) };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open("/", flags, Mode::empty()).at("opening the root")?;
    let root = Root { dir, descriptors: None, inside: true };
    let directory =
        FileType::from_raw_mode(fstat(&tree).at("taking the mount")?.st_mode) == FileType::Directory;
    let place = place(&root, &r.path, directory)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(&tree, "", &place, "", flags).at("mounting")?;
    sys::send(launch, &[p::VERSION, p::code::OK], &[], None);
    Ok(())
}

/// Opens the place of a mount and makes what is missing of it.
fn place(root: &Root, path: &OsStr, directory: bool) -> Outcome<OwnedFd> {
    let bytes = path.as_bytes();
    let ends = (1..bytes.len()).filter(|i| bytes[*i] == b'/').chain([bytes.len()]);
    for end in ends.filter(|end| bytes[end - 1] != b'/') {
        let part = OsStr::from_bytes(&bytes[..end]);
        match root.open(part, OFlags::PATH, 0) {
            Ok(_) => {}
            Err(Errno::NOENT) if end < bytes.len() || directory => {
                let (parent, name) = root.parent(part)?;
                match mkdirat(&parent, name.as_os_str(), Mode::from_raw_mode(0o755)) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(e) => return Err(e).at("making the directory to mount at"),
                }
            }
            Err(Errno::NOENT) => {
                let create = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NOCTTY;
                root.open(part, create, 0o644).at("making the file to mount at")?;
            }
            Err(e) => return Err(e).at("opening the place to mount at"),
        }
    }
    root.open(path, OFlags::PATH, 0).at("opening the place to mount at")
}

/// Takes away the topmost mount at `path`; fine when none is there. An empty file that is below, made for the mount, goes
/// too if `append` is set.
pub(super) fn unmount(r: &Request, root: &Root) -> Outcome<()> {
    if !root.inside {
        return Err(Failure::new("unmounting: the container does not run", libc::ESRCH));
    }
    let (parent, name) = root.parent(&r.path)?;
    rustix::process::fchdir(&parent).at("unmounting")?;
    match rustix::mount::unmount(name.as_os_str(), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
        Err(e) => return Err(e).at("unmounting"),
    }
    let below = rustix::fs::statat(&parent, name.as_os_str(), rustix::fs::AtFlags::SYMLINK_NOFOLLOW);
    if r.append
        && below.is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::RegularFile && s.st_size == 0)
    {
        rustix::fs::unlinkat(&parent, name.as_os_str(), rustix::fs::AtFlags::empty()).at("unmounting")?;
    }
    Ok(())
}
