//! `karst-keeper --attach`: does one thing inside a container and ends.
//!
//! Why not `lxc-attach`: it takes environment variables only in argv, which every user of the host can read, or out of its
//! own environment, where the caller's `LD_PRELOAD` would act on it as root; it has no working directory; its exit is
//! silent about whether a signal came; and it relays terminals through itself.
//!
//! What keeps the host safe from the container: the helper is not dumpable before it can be seen inside, so nothing there
//! opens its executable or descriptors through `/proc`; every descriptor but the passed ones is closed first; the program is
//! found and the working directory entered after the root is the container's; capabilities are bounded to those of the
//! container's init and a seccomp filter equal to the container's is in place before the program runs. Files are touched
//! with the container's own root rights, so its `/proc`, `/sys` and FUSE mounts give no more than they give inside.

mod exec;
mod file;
mod mount;
mod replace;
mod seccomp;

use crate::sys;
use karst_keeper::{
    attach::{Operation, Request},
    protocol as p,
};
use std::{
    borrow::Cow,
    io::{self, Read},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::fs::FileExt,
    },
};

/// A failure: what failed, and the system's error.
pub(crate) struct Failure {
    what: Cow<'static, str>,
    error: io::Error,
}

pub(crate) type Outcome<T> = Result<T, Failure>;

/// Names the step that failed.
pub(crate) trait At<T> {
    fn at(self, what: &'static str) -> Outcome<T>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, what: &'static str) -> Outcome<T> {
        self.map_err(|e| Failure { what: what.into(), error: e.into() })
    }
}

impl Failure {
    fn new(what: impl Into<Cow<'static, str>>, number: i32) -> Self {
        Failure { what: what.into(), error: io::Error::from_raw_os_error(number) }
    }

    fn body(&self) -> Vec<u8> {
        let number = self.error.raw_os_error().unwrap_or(libc::EIO);
        let mut body = number.to_le_bytes().to_vec();
        body.extend_from_slice(format!("{}: {}", self.what, self.error).as_bytes());
        body
    }
}

/// Reports a failure and ends.
fn fail(launch: BorrowedFd, failure: &Failure) -> ! {
    sys::send(launch, &[p::VERSION, p::code::FAILED], &failure.body(), None);
    std::process::exit(1)
}

/// The whole life of the helper.
pub(crate) fn main() -> ! {
    sys::close_from(3);
    let launch = sys::take_stdin();
    // SAFETY: plain prctl call. First of all, so that it holds for everything forked later.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
    let result = receive(launch.as_fd()).and_then(|(request, subject, rest)| match request.operation {
        Operation::Exec => exec::run(&request, subject, rest, launch.as_fd()),
        Operation::Mount => mount::mount(&request, subject, rest, launch.as_fd()),
        _ => {
            let root = enter_for_files(&request, subject)?;
            file::run(&request, root, rest.into_iter().next(), launch.as_fd())
        }
    });
    if let Err(e) = &result {
        fail(launch.as_fd(), e);
    }
    std::process::exit(0)
}

fn receive(launch: BorrowedFd) -> Outcome<(Request, OwnedFd, Vec<OwnedFd>)> {
    let mut fds = sys::receive_launch(launch).at("receiving the request")?.into_iter();
    let (Some(request), Some(subject)) = (fds.next(), fds.next()) else {
        return Err(Failure::new("receiving the request", libc::EINVAL));
    };
    let file = std::fs::File::from(request);
    let length = file.metadata().at("reading the request")?.len().min(8 << 20);
    let mut content = vec![0; length as usize];
    file.read_exact_at(&mut content, 0).at("reading the request")?;
    let request = Request::parse(&content).map_err(|_| Failure::new("reading the request", libc::EBADMSG))?;
    Ok((request, subject, fds.collect()))
}

/// Becomes the container's root in its user and mount namespaces, or takes the directory of a stopped one.
fn enter_for_files(request: &Request, subject: OwnedFd) -> Outcome<Root> {
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    let descriptors =
        Some(rustix::fs::open("/proc/self/fd", flags, rustix::fs::Mode::empty()).at("opening /proc")?);
    if request.pid == 0 {
        // As whose files they are: within the limits of the file system.
        bound(!(1u64 << SYS_RESOURCE))?;
        return Ok(Root { dir: subject, descriptors, inside: false });
    }
    let bounding = init_bounding(request.pid)?;
    let user = user_namespace(request.pid)?;
    alive(&subject)?;
    enter(&subject, user | libc::CLONE_NEWNS)?;
    bound(bounding)?;
    become_user(0, 0)?;
    let dir = rustix::fs::open("/", flags, rustix::fs::Mode::empty()).at("opening the root")?;
    Ok(Root { dir, descriptors, inside: true })
}

/// The root that paths are resolved in.
struct Root {
    dir: OwnedFd,
    /// Links to this process' own descriptors, of the host's `/proc`; of use to who writes files.
    descriptors: Option<OwnedFd>,
    /// In the container's namespaces; else a plain directory of the host.
    inside: bool,
}

fn enter(pidfd: &OwnedFd, namespaces: i32) -> Outcome<()> {
    // SAFETY: plain call; this process has one thread.
    sys::check(unsafe { libc::setns(pidfd.as_raw_fd(), namespaces) }).map(drop).at("entering the container")
}

/// The flag by which the container's user namespace is entered; none of a privileged container, which has the host's, and
/// one's own cannot be entered. Asked, as all of its `/proc`, before [`alive`].
fn user_namespace(pid: u32) -> Outcome<i32> {
    let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/user"));
    let (own, its) = of("self")
        .and_then(|own| Ok((own, of(&pid.to_string())?)))
        .at("reading the container's user namespace")?;
    Ok(if own == its { 0 } else { libc::CLONE_NEWUSER })
}

/// Is the process of this pidfd alive? Asked after its `/proc` was read: then what was read was its own.
fn alive(pidfd: &OwnedFd) -> Outcome<()> {
    let mut entry = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one initialised entry, no waiting.
    if unsafe { libc::poll(&mut entry, 1, 0) } == 0 {
        return Ok(());
    }
    Err(Failure::new("the container has ended", libc::ESRCH))
}

/// The capability bounding set of the container's init.
fn init_bounding(pid: u32) -> Outcome<u64> {
    let mut status = String::new();
    std::fs::File::open(format!("/proc/{pid}/status"))
        .and_then(|mut f| f.read_to_string(&mut status))
        .at("reading the container's capabilities")?;
    status
        .lines()
        .find_map(|l| u64::from_str_radix(l.strip_prefix("CapBnd:")?.trim(), 16).ok())
        .ok_or(Failure::new("reading the container's capabilities", libc::EINVAL))
}

/// The right to pass over limits of file systems, among others (`linux/capability.h`).
const SYS_RESOURCE: u32 = 24;

/// Gives up every capability outside `keep`, for good.
fn bound(keep: u64) -> Outcome<()> {
    // Version 3 of capset: header with version and pid, then effective, permitted, inheritable in two halves.
    let header: [u32; 2] = [0x2008_0522, 0];
    let (low, high) = (keep as u32, (keep >> 32) as u32);
    // SAFETY: plain calls with initialised arguments.
    unsafe {
        for capability in (0..64).filter(|c| keep & (1 << c) == 0) {
            // Beyond the kernel's last one it is EINVAL, which is as good as dropped.
            if libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) < 0
                && io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL)
            {
                return Err(Failure {
                    what: "giving up capabilities".into(),
                    error: io::Error::last_os_error(),
                });
            }
        }
        let mut now = [0u32; 6];
        sys::check(libc::syscall(libc::SYS_capget, header.as_ptr(), now.as_mut_ptr()) as i32)
            .at("giving up capabilities")?;
        let sets = [now[0] & low, now[1] & low, 0, now[3] & high, now[4] & high, 0];
        sys::check(libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) as i32)
            .at("giving up capabilities")?;
    }
    Ok(())
}

/// Becomes a user and group of the container, without supplementary groups.
fn become_user(uid: u32, gid: u32) -> Outcome<()> {
    // SAFETY: plain calls.
    unsafe {
        sys::check(libc::setgroups(0, std::ptr::null())).at("becoming the user")?;
        sys::check(libc::setresgid(gid, gid, gid)).at("becoming the user")?;
        sys::check(libc::setresuid(uid, uid, uid)).at("becoming the user")?;
    }
    Ok(())
}

/// A pair of connected packet sockets.
fn packet_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = MaybeUninit::<[i32; 2]>::uninit();
    // SAFETY: socketpair fills both numbers, which are ours then.
    unsafe {
        sys::check(libc::socketpair(
            libc::AF_UNIX,
            libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC,
            0,
            ends.as_mut_ptr().cast(),
        ))?;
        let [a, b] = ends.assume_init();
        Ok((OwnedFd::from_raw_fd(a), OwnedFd::from_raw_fd(b)))
    }
}
