//! What each process may, and how it gives up the rest: in the child, between fork and exec, so that none of its own code
//! ever runs with more.

use karst_model::{Error, Result};
use std::{
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::Command,
};

/// Capabilities that the host process keeps, and what for. Guests of it inherit the bound where they have no user
/// namespace of their own; containers have one, and begin there with a full set over their own things.
pub const HOST_CAPABILITIES: &[(u32, &str, &str)] = &[
    (0, "CHOWN", "owners of volumes, images and sockets"),
    (1, "DAC_OVERRIDE", "files of guests, whoever owns them"),
    (2, "DAC_READ_SEARCH", "the same for directories"),
    (3, "FOWNER", "modes of files of guests"),
    (4, "FSETID", "setuid bits of files of guests"),
    (5, "KILL", "processes of guests, which run as their own users"),
    (6, "SETGID", "QEMU and the image worker as their own groups; id maps"),
    (7, "SETUID", "QEMU and the image worker as their own users; id maps"),
    (8, "SETPCAP", "programs that bound their own children: liblxc, dnsmasq, this list"),
    (10, "NET_BIND_SERVICE", "dnsmasq: DHCP and DNS ports of managed networks"),
    (12, "NET_ADMIN", "bridges, taps, addresses, nftables"),
    (13, "NET_RAW", "dnsmasq: probing an address before it is given away"),
    (18, "SYS_CHROOT", "liblxc, mmdebstrap, the image worker"),
    (19, "SYS_PTRACE", "namespaces of guests' processes: attach, files of a running container"),
    (21, "SYS_ADMIN", "mounts, namespaces, cgroups"),
    (23, "SYS_NICE", "CPU pinning and priorities of guests"),
    (24, "SYS_RESOURCE", "limits and OOM scores of guests' processes"),
    (27, "MKNOD", "device nodes of root file systems that mmdebstrap builds"),
    (31, "SETFCAP", "file capabilities of programs in root file systems; id maps"),
    (33, "MAC_ADMIN", "the AppArmor profile of containers"),
];

/// What no guest has, whatever the host grants: setting the clock, modules, raw access to hardware, and going around access
/// control. The host process has none of it either.
const NEVER: &[u32] = &[16, 17, 25, 32];

/// What the launcher hands to a daemon.
#[derive(Debug, Clone, clap::Args)]
pub struct Inherited {
    /// Number of the first listening socket; the others follow it.
    #[arg(long)]
    pub listen_fd: RawFd,
    /// How many there are.
    #[arg(long)]
    pub sockets: usize,
    /// Short id of this instance.
    #[arg(long)]
    pub daemon_id: String,
    /// The launcher.
    #[arg(long)]
    pub parent: u32,
    /// User of the control process.
    #[arg(long)]
    pub control_uid: u32,
}

/// A user of the system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
}

/// Looks a user up.
///
/// # Errors
/// Not found, naming the fix.
pub fn user(name: &str) -> Result<User> {
    let missing = || {
        Error::not_found(format!(
            "there is no user {name:?} for the control process; make one with \
             `useradd --system --no-create-home --shell /usr/sbin/nologin {name}` (`make install` does), or give --user"
        ))
    };
    let c = std::ffi::CString::new(name).map_err(|_| missing())?;
    // SAFETY: one thread, a terminated string; the answer is copied before the next call.
    let entry = unsafe { libc::getpwnam(c.as_ptr()).as_ref() }.ok_or_else(missing)?;
    if entry.pw_uid == 0 {
        return Err(Error::invalid("user", "the control process must not run as root"));
    }
    Ok(User { uid: entry.pw_uid, gid: entry.pw_gid })
}

/// Looks a group up.
pub fn group(name: &str) -> Option<u32> {
    let c = std::ffi::CString::new(name).ok()?;
    // SAFETY: as in `user`.
    unsafe { libc::getgrnam(c.as_ptr()).as_ref() }.map(|g| g.gr_gid)
}

const FIRST_FD: RawFd = 3;
/// Most sockets of one daemon.
pub const MOST_SOCKETS: usize = 8;

/// Gives `sockets` to the child of `command` as descriptors 3 and following and leaves it the rights of `role` only.
pub fn prepare<'a>(command: &mut Command, sockets: impl IntoIterator<Item = BorrowedFd<'a>>, role: Confined) {
    let mut from = [-1; MOST_SOCKETS];
    let mut count = 0;
    for (place, socket) in from.iter_mut().zip(sockets) {
        *place = socket.as_raw_fd();
        count += 1;
    }
    // SAFETY: between fork and exec the closure makes system calls only; no allocation, no lock.
    unsafe {
        command.pre_exec(move || {
            let empty: libc::sigset_t = std::mem::zeroed();
            check(libc::sigprocmask(libc::SIG_SETMASK, &empty, std::ptr::null_mut()))?;
            // First out of the way of the places that they are to have.
            let mut from = from;
            let free = FIRST_FD + MOST_SOCKETS as RawFd;
            for socket in &mut from[..count] {
                *socket = libc::fcntl(*socket, libc::F_DUPFD, free);
                check(*socket)?;
            }
            for (n, socket) in from[..count].iter().enumerate() {
                check(libc::dup2(*socket, FIRST_FD + n as RawFd))?;
            }
            let next = FIRST_FD as u32 + count as u32;
            check(libc::close_range(next, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32))?;
            confine(role)?;
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            libc::umask(0o077);
            Ok(())
        });
    }
}

/// Number of the first descriptor that [`prepare`] gives.
pub const fn inherited_fd() -> RawFd {
    FIRST_FD
}

/// What a child is left with.
#[derive(Debug, Clone, Copy)]
pub enum Confined {
    /// Root with [`HOST_CAPABILITIES`].
    Host {
        /// Where the policy grants privileged containers: also with what these have as other containers do, for they inherit
        /// the bound (a program in one that writes to the audit log, or restarts it, would fail).
        privileged: bool,
    },
    /// A user without any capability, and no way to get one.
    Control {
        /// User id.
        uid: u32,
        /// Group id.
        gid: u32,
    },
}

fn check(outcome: libc::c_int) -> io::Result<()> {
    if outcome == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Only system calls: it runs between fork and exec.
fn confine(role: Confined) -> io::Result<()> {
    let mut keep: u64 = 0;
    if let Confined::Host { privileged } = role {
        for (number, _, _) in HOST_CAPABILITIES {
            keep |= 1 << number;
        }
        if privileged {
            keep |= !NEVER.iter().fold(0, |all, number| all | 1 << number);
        }
    }
    // SAFETY: plain system calls on this process alone.
    unsafe {
        check(libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))?;
        for number in 0..64u32 {
            if keep & (1 << number) == 0 && libc::prctl(libc::PR_CAPBSET_READ, number) == 1 {
                check(libc::prctl(libc::PR_CAPBSET_DROP, number))?;
            }
        }
        if let Confined::Control { uid, gid } = role {
            check(libc::setgroups(0, std::ptr::null()))?;
            check(libc::setresgid(gid, gid, gid))?;
            check(libc::setresuid(uid, uid, uid))?;
            check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        }
        let header = CapHeader {
            version: 0x2008_0522, // _LINUX_CAPABILITY_VERSION_3
            pid: 0,
        };
        // What we do not have we cannot keep: a launcher in a container has less.
        let mut data = [CapData::default(); 2];
        check(libc::syscall(libc::SYS_capget, &header, data.as_mut_ptr()) as libc::c_int)?;
        for (n, data) in data.iter_mut().enumerate() {
            let mask = (keep >> (32 * n)) as u32;
            data.permitted &= mask;
            data.effective = data.permitted;
            data.inheritable = 0;
        }
        check(libc::syscall(libc::SYS_capset, &header, data.as_ptr()) as libc::c_int)
    }
}

/// What every daemon does first: checks that it is what it should be, and that its launcher still lives.
///
/// # Errors
/// When it has more rights than its role, or was started by hand.
pub fn enter<const N: usize>(inherited: &Inherited, control: bool) -> Result<[OwnedFd; N]> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line =
        |key: &str| status.lines().find_map(|l| l.strip_prefix(key)).unwrap_or_default().trim().to_owned();
    let uid = rustix::process::geteuid().as_raw();
    if control {
        let capabilities = ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"].map(line);
        let none = capabilities.iter().all(|c| u64::from_str_radix(c, 16) == Ok(0));
        if uid == 0 || !none || line("NoNewPrivs:") != "1" {
            return Err(Error::forbidden(
                "the control process has more rights than it may; it is started by the launcher only",
            ));
        }
    } else if uid != 0 {
        return Err(Error::forbidden("the host process must be root; it is started by the launcher only"));
    }
    // The launcher may have ended before its death could reach us.
    if rustix::process::getppid().map(|p| p.as_raw_nonzero().get() as u32) != Some(inherited.parent) {
        return Err(Error::unavailable("the launcher is gone"));
    }
    if inherited.listen_fd != FIRST_FD || inherited.sockets != N {
        let text = format!("the launcher passes {N} sockets as descriptors from 3");
        return Err(Error::invalid("listen_fd", text));
    }
    // SAFETY: the launcher gave us these descriptors, and nothing else here has touched them.
    let sockets = std::array::from_fn(|n| unsafe { OwnedFd::from_raw_fd(FIRST_FD + n as RawFd) });
    for fd in &sockets {
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC).map_err(io::Error::from)?;
    }
    Ok(sockets)
}

/// A small allocator for small daemons: few arenas, and memory goes back when it is free.
pub fn small_heap() {
    // SAFETY: sets parameters of the allocator before threads are made.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 128 << 10);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
    }
}
