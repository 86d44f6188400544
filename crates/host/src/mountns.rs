//! Mounts by the kernel's interface of file descriptors (`open_tree`, `mount_setattr`, `move_mount`; Linux 5.12 and
//! later), and mount namespaces.
//!
//! A source is named by a descriptor, so nothing that somebody renames meanwhile changes what is mounted. A namespace that
//! is made here takes its mounts along when its last process ends: nothing has to be cleared up after a crash.
//! Entering a namespace changes the thread that does it, so that work runs in threads of its own.

use karst_model::{Error, Result};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree};
use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

const MOUNT_ATTR_RDONLY: u64 = 0x1;
const MOUNT_ATTR_NODEV: u64 = 0x4;
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

/// How something is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MountOptions {
    /// Nobody writes through it.
    pub readonly: bool,
    /// With what is mounted below the source.
    pub recursive: bool,
    /// What the host mounts below later is seen as well.
    pub follow: bool,
}

/// `struct mount_attr` of linux/mount.h.
#[repr(C)]
struct Attributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

fn failed(what: &str, e: impl Into<io::Error>) -> Error {
    Error::internal(format!("{what} failed"), e.into())
}

/// A user namespace that maps ids 0 to `count` onto the host's from `base` on; it lives as long as the descriptor, and as the
/// processes that entered it. It says how a mount maps ids, and who a helper of a guest is.
///
/// # Errors
/// Internal when the kernel refuses.
pub fn user_namespace(base: u32, count: u32) -> Result<OwnedFd> {
    let map = format!("0 {base} {count}\n");
    // SAFETY: a raw clone without shared memory. The child calls the kernel only, allocates nothing and never returns. It
    // sends no signal at its end, so nobody's waiting for children is disturbed.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_NEWUSER as libc::c_ulong, 0, 0, 0, 0) };
    if pid < 0 {
        return Err(failed("making a user namespace", io::Error::last_os_error()));
    }
    if pid == 0 {
        loop {
            // SAFETY: plain calls.
            unsafe {
                libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
                libc::syscall(libc::SYS_ppoll, 0usize, 0usize, 0usize, 0usize, 0usize);
            }
        }
    }
    let made = (|| -> io::Result<OwnedFd> {
        for file in ["uid_map", "gid_map"] {
            std::fs::write(format!("/proc/{pid}/{file}"), &map)?;
        }
        Ok(std::fs::File::open(format!("/proc/{pid}/ns/user"))?.into())
    })();
    // SAFETY: ends and reaps the child that was made above, and nothing else.
    unsafe {
        libc::kill(pid as i32, libc::SIGKILL);
        libc::waitpid(pid as i32, std::ptr::null_mut(), libc::__WCLONE);
    }
    made.map_err(|e| failed("making a user namespace", e))
}

/// A mount of a directory or file that is nowhere yet; it goes with its descriptor unless it is attached. Device nodes in
/// it are none. With `ids`, a user namespace, the owners on disk are those inside of it.
///
/// # Errors
/// Unsupported when the file system cannot map ids; internal else.
pub fn detached(source: BorrowedFd, options: MountOptions, ids: Option<BorrowedFd>) -> Result<OwnedFd> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let mut at = libc::AT_EMPTY_PATH;
    if options.recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
        at |= libc::AT_RECURSIVE;
    }
    let tree = open_tree(source, "", flags).map_err(|e| failed("mounting", e))?;
    let mut set = MOUNT_ATTR_NODEV;
    if options.readonly {
        set |= MOUNT_ATTR_RDONLY;
    }
    if ids.is_some() {
        set |= MOUNT_ATTR_IDMAP;
    }
    let propagation = if options.follow { libc::MS_SLAVE } else { libc::MS_PRIVATE };
    let attributes =
        Attributes { set, clear: 0, propagation, user_namespace: ids.map_or(0, |fd| fd.as_raw_fd() as u64) };
    // SAFETY: the structure is what the kernel expects and lives over the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            at,
            &raw const attributes,
            size_of::<Attributes>(),
        )
    };
    if done == 0 {
        return Ok(tree);
    }
    let e = io::Error::last_os_error();
    Err(match e.raw_os_error() {
        Some(libc::EINVAL) if ids.is_some() => {
            Error::unsupported("the file system of the source cannot be mounted with other owners")
                .with_context(e)
        }
        _ => failed("mounting", e),
    })
}

/// A new file system in memory that is mounted nowhere yet: its root belongs to `owner` and is everybody's to write, as that
/// of `/tmp`. Device nodes in it are none.
///
/// # Errors
/// Internal when the kernel refuses.
pub fn in_memory(size: Option<u64>, owner: (u32, u32), readonly: bool) -> Result<OwnedFd> {
    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    };
    let refused = |e| failed("making a file system in memory", e);
    let context = fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(refused)?;
    let set =
        |key: &std::ffi::CStr, value: String| fsconfig_set_string(&context, key, value).map_err(refused);
    set(c"source", "karst".to_owned())?;
    set(c"mode", "1777".to_owned())?;
    set(c"uid", owner.0.to_string())?;
    set(c"gid", owner.1.to_string())?;
    if let Some(size) = size {
        set(c"size", size.to_string())?;
    }
    fsconfig_create(&context).map_err(refused)?;
    let mut attributes = MountAttrFlags::MOUNT_ATTR_NODEV;
    if readonly {
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(refused)
}

/// Attaches a mount at a place of this thread's namespace, which is of its kind (directory or not).
///
/// # Errors
/// Internal when the kernel refuses.
pub fn attach(mount: &OwnedFd, at: &Path) -> Result<()> {
    move_mount(mount, "", rustix::fs::CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|e| failed("mounting", e).with_context(format!("{}: {e}", at.display())))
}

/// Takes away what is mounted at a place of this thread's namespace; fine when nothing is, or the place is not there.
///
/// # Errors
/// Internal when the kernel refuses.
pub fn detach(at: &Path) -> Result<()> {
    match rustix::mount::unmount(at, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(()),
        Err(e) => Err(failed("unmounting", e).with_context(format!("{}: {e}", at.display()))),
    }
}

/// Puts an empty file system in memory over a directory of this thread's namespace; device nodes in it work if `devices`.
///
/// # Errors
/// Internal when the kernel refuses.
pub fn cover(directory: &Path, devices: bool) -> Result<()> {
    let path = CString::new(directory.as_os_str().as_bytes())
        .map_err(|_| Error::internal("mounting failed", "NUL in a path"))?;
    let flags = libc::MS_NOSUID | libc::MS_NOEXEC | if devices { 0 } else { libc::MS_NODEV };
    // SAFETY: all strings end in NUL and live over the call.
    let done = unsafe {
        libc::mount(
            c"karst".as_ptr(),
            path.as_ptr(),
            c"tmpfs".as_ptr(),
            flags,
            c"mode=0711,size=1m".as_ptr().cast(),
        )
    };
    if done < 0 { Err(failed("mounting", io::Error::last_os_error())) } else { Ok(()) }
}

/// A device of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DeviceNumber {
    /// A block device, not a character device.
    pub block: bool,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

/// The device that a path of the host is, links followed.
///
/// # Errors
/// Not found; invalid when it is no device.
pub fn device_number(path: &Path) -> Result<DeviceNumber> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let found = std::fs::metadata(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => Error::not_found(format!("{path:?} does not exist on the host")),
        _ => failed("looking at a device", e),
    })?;
    let (block, char) = (found.file_type().is_block_device(), found.file_type().is_char_device());
    if !block && !char {
        return Err(Error::invalid("source", format!("{path:?} is no device of the host")));
    }
    Ok(DeviceNumber { block, major: libc::major(found.rdev()), minor: libc::minor(found.rdev()) })
}

/// Makes a device node in place of whatever is there.
///
/// # Errors
/// Internal when the kernel refuses.
pub fn make_node(at: &Path, device: DeviceNumber, owner: (u32, u32), mode: u32) -> Result<()> {
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
    match std::fs::remove_file(at) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("making a device node", e)),
        _ => {}
    }
    let kind = if device.block { FileType::BlockDevice } else { FileType::CharacterDevice };
    mknodat(CWD, at, kind, Mode::empty(), makedev(device.major, device.minor))
        .map_err(|e| failed("making a device node", e))?;
    std::os::unix::fs::chown(at, Some(owner.0), Some(owner.1))
        .map_err(|e| failed("making a device node", e))?;
    std::fs::set_permissions(at, std::os::unix::fs::PermissionsExt::from_mode(mode & 0o777))
        .map_err(|e| failed("making a device node", e))
}

/// A line of `/proc/PID/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// What is mounted: the file system's number (`major:minor`) and the path within it.
    pub key: MountKey,
    /// Where, as the process sees it.
    pub at: PathBuf,
    /// The mount is read-only.
    pub readonly: bool,
    /// Source of the file system, such as a block device.
    pub source: String,
}

/// What a mount shows: two mounts of the same tree have the same.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct MountKey {
    /// `major:minor` of the file system.
    pub device: String,
    /// Path within it.
    pub root: String,
}

/// What a process sees mounted; `None` is the calling thread.
///
/// # Errors
/// When the process is gone.
pub fn entries(pid: Option<u32>) -> Result<Vec<MountEntry>> {
    let file = match pid {
        Some(pid) => format!("/proc/{pid}/mountinfo"),
        None => "/proc/thread-self/mountinfo".to_owned(),
    };
    Ok(parse(&std::fs::read(file)?))
}

fn parse(mountinfo: &[u8]) -> Vec<MountEntry> {
    let line = |line: &[u8]| {
        let mut words = line.split(|b| *b == b' ');
        let device = String::from_utf8_lossy(words.nth(2)?).into_owned();
        let root = String::from_utf8_lossy(&unescape(words.next()?)).into_owned();
        let at = PathBuf::from(std::ffi::OsStr::from_bytes(&unescape(words.next()?)));
        let readonly = words.next()?.split(|b| *b == b',').any(|o| o == b"ro");
        words.find(|w| *w == b"-")?;
        let source = String::from_utf8_lossy(&unescape(words.nth(1)?)).into_owned();
        Some(MountEntry { key: MountKey { device, root }, at, readonly, source })
    };
    mountinfo.split(|b| *b == b'\n').filter_map(line).collect()
}

/// `\040` and the like as the bytes they stand for.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, tail)) = rest.split_first() {
        if let (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..]) = (first, tail) {
            out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
            rest = tail;
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    out
}

/// A path as `fstab(5)` wants it.
pub fn escape(path: &str) -> String {
    path.bytes().fold(String::new(), |mut out, b| {
        match b {
            b' ' | b'\t' | b'\n' | b'\\' | b'#' => out.push_str(&format!("\\{b:03o}")),
            _ => out.push(b as char),
        }
        out
    })
}

pub(crate) fn in_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|s| s.spawn(work).join())
        .unwrap_or_else(|_| Err(Error::internal("mounting failed", "a thread panicked")))
}

/// Takes this thread into a new mount namespace, which goes on following the host's mounts.
pub(crate) fn leave() -> Result<()> {
    // SAFETY: plain calls with strings that end in NUL; only this thread is changed, which its caller ends.
    unsafe {
        if libc::unshare(libc::CLONE_NEWNS) < 0
            || libc::mount(
                c"none".as_ptr(),
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_SLAVE,
                std::ptr::null(),
            ) < 0
        {
            return Err(failed("making a mount namespace", io::Error::last_os_error()));
        }
    }
    Ok(())
}

/// A new mount namespace, a copy of the caller's that goes on following the host's mounts, made ready by `work`.
///
/// # Errors
/// Internal when the kernel refuses, or what `work` answers.
pub fn new_namespace(work: impl FnOnce() -> Result<()> + Send) -> Result<OwnedFd> {
    in_thread(|| {
        leave()?;
        work()?;
        let file = std::fs::File::open("/proc/thread-self/ns/mnt");
        file.map(OwnedFd::from).map_err(|e| failed("making a mount namespace", e))
    })
}

/// Runs `work` in the mount namespace of a process.
///
/// # Errors
/// Not found when the process is gone; what `work` answers.
pub fn in_namespace_of<T: Send>(pid: u32, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let namespace = std::fs::File::open(format!("/proc/{pid}/ns/mnt"))
        .map_err(|e| Error::not_found("the guest is not running").with_context(e))?;
    let namespace = namespace.as_fd();
    in_thread(move || {
        // SAFETY: plain calls; only this thread is changed, which ends when the work has.
        unsafe {
            if libc::unshare(libc::CLONE_FS) < 0 || libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNS) < 0
            {
                return Err(failed("entering a mount namespace", io::Error::last_os_error()));
            }
        }
        work()
    })
}

/// The mount namespace of a process.
///
/// # Errors
/// Not found when the process is gone.
pub fn namespace_of(pid: u32) -> Result<OwnedFd> {
    let file = std::fs::File::open(format!("/proc/{pid}/ns/mnt"));
    file.map(OwnedFd::from).map_err(|e| Error::not_found("the guest is not running").with_context(e))
}

/// Opens a directory or file without acting on it.
///
/// # Errors
/// Not found, or what the kernel says.
pub fn open_path(path: &Path) -> Result<OwnedFd> {
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open(path, flags, rustix::fs::Mode::empty())
        .map_err(|e| Error::from(io::Error::from(e)).with_context(path.display()))
}

/// Opens what lies at `path` beneath one of the granted `prefixes`, without acting on it and without leaving the prefix by
/// links or `..`. The prefix itself is root's word and may be reached by links.
///
/// # Errors
/// Forbidden when no prefix grants it or a link leads out; not found.
pub fn open_beneath(prefixes: &[PathBuf], path: &Path) -> Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
    let Some(prefix) = prefixes.iter().filter(|p| path.starts_with(p)).max_by_key(|p| p.components().count())
    else {
        return Err(Error::forbidden(format!(
            "this host grants no guest the path {path:?}; its administrator can, with path_prefixes in host-policy.toml"
        )));
    };
    let top = open_path(prefix)?;
    let rest = path.strip_prefix(prefix).unwrap_or(Path::new(""));
    if rest.as_os_str().is_empty() {
        // It may be a file or a device, in which nothing is.
        return Ok(top);
    }
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    for _ in 0..64 {
        return match openat2(&top, rest, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve) {
            // Something was renamed meanwhile, and the kernel cannot tell whether the path stayed beneath.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => continue,
            Err(rustix::io::Errno::XDEV | rustix::io::Errno::LOOP) => {
                Err(Error::forbidden(format!("{path:?} leads out of {prefix:?}, which this host grants")))
            }
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => {
                Err(Error::not_found(format!("{path:?} does not exist on the host")))
            }
            Err(e) => Err(failed("opening a path of the host", e)),
            Ok(fd) => Ok(fd),
        };
    }
    Err(Error::unavailable(format!("{path:?} is being renamed; try again")))
}

/// The block device that a file system lies on (`major:minor` of the whole disk, as control groups want it); `None` for one
/// without, such as one in memory.
pub fn block_device(path: &Path) -> Option<String> {
    use std::os::unix::fs::MetadataExt;
    let device = std::fs::metadata(path).ok()?.dev();
    let mut number = format!("{}:{}", libc::major(device), libc::minor(device));
    if libc::major(device) == 0 {
        // btrfs and the like have numbers of their own: the mount's source says.
        let found = entries(None).ok()?;
        let real = std::fs::canonicalize(path).ok()?;
        let mount = found
            .iter()
            .rev()
            .filter(|e| real.starts_with(&e.at))
            .max_by_key(|e| e.at.components().count())?;
        let source = std::fs::metadata(&mount.source).ok()?;
        let device = source.rdev();
        number = format!("{}:{}", libc::major(device), libc::minor(device));
    }
    let entry = std::fs::canonicalize(format!("/sys/dev/block/{number}")).ok()?;
    if entry.join("partition").exists() {
        return std::fs::read_to_string(entry.parent()?.join("dev")).ok().map(|s| s.trim().to_owned());
    }
    Some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> bool {
        crate::backends::root()
    }

    #[test]
    fn lines_are_understood() {
        let text =
            b"36 35 98:0 /mnt1 /mnt\\0402 ro,noatime master:1 - ext3 /dev/root rw,errors=continue\njunk\n";
        let entry = parse(text).remove(0);
        assert_eq!(entry.key, MountKey { device: "98:0".into(), root: "/mnt1".into() });
        assert_eq!(
            (entry.at.to_str(), entry.readonly, entry.source.as_str()),
            (Some("/mnt 2"), true, "/dev/root")
        );
        assert_eq!(escape("/a b\\#"), "/a\\040b\\134\\043");
        assert_eq!(unescape(escape("/a b\\#").as_bytes()), b"/a b\\#");
    }

    #[test]
    fn a_mount_maps_owners_in_a_namespace_that_goes_with_its_last_user() {
        use std::os::unix::fs::MetadataExt;
        if !root() {
            return;
        }
        let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let (source, at) = (dir.path().join("source"), dir.path().join("at"));
        for d in [&source, &at] {
            std::fs::create_dir(d).unwrap();
        }
        std::fs::write(source.join("file"), "x").unwrap();
        let ids = user_namespace(3_000_000, 65_536).unwrap();
        let options = MountOptions { readonly: true, ..MountOptions::default() };
        let mount = detached(open_path(&source).unwrap().as_fd(), options, Some(ids.as_fd())).unwrap();
        let namespace = new_namespace(|| {
            attach(&mount, &at)?;
            assert_eq!(std::fs::metadata(at.join("file")).unwrap().uid(), 3_000_000);
            assert_eq!(std::fs::write(at.join("new"), "").unwrap_err().raw_os_error(), Some(libc::EROFS));
            assert!(entries(None).unwrap().iter().any(|e| e.at == at && e.readonly));
            detach(&at)?;
            detach(&at)
        });
        namespace.unwrap();
        assert!(!at.join("file").exists(), "the host sees nothing of it");
        assert_eq!(std::fs::metadata(source.join("file")).unwrap().uid(), 0);
    }

    #[test]
    fn only_what_lies_beneath_a_granted_prefix_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let granted = dir.path().join("granted");
        std::fs::create_dir_all(granted.join("in/deep")).unwrap();
        std::fs::write(dir.path().join("secret"), "").unwrap();
        std::os::unix::fs::symlink("../secret", granted.join("out")).unwrap();
        std::os::unix::fs::symlink("/etc", granted.join("absolute")).unwrap();
        std::os::unix::fs::symlink("in", granted.join("inner")).unwrap();
        let open = |p: &str| open_beneath(std::slice::from_ref(&granted), &dir.path().join(p));
        for good in ["granted", "granted/in/deep", "granted/inner/deep"] {
            open(good).unwrap();
        }
        for bad in ["granted/out", "granted/absolute/passwd", "secret", "grantedx", "granted/../secret"] {
            let e = open(bad).unwrap_err();
            assert!(e.is(karst_model::ErrorKind::Forbidden), "{bad}: {e:?}");
        }
        assert!(open("granted/none").unwrap_err().is(karst_model::ErrorKind::NotFound));
        // A file that is granted by its name, also by a link of root's.
        std::os::unix::fs::symlink("secret", dir.path().join("by-id")).unwrap();
        for name in ["secret", "by-id"] {
            let path = dir.path().join(name);
            open_beneath(std::slice::from_ref(&path), &path).unwrap();
        }
    }
}
