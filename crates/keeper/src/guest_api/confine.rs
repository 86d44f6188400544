//! How the server of a guest's API confines itself: no file but its data (Landlock, where the kernel has it), and none but
//! the system calls that serving needs. There is no way back, for its threads neither.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

/// The calls. No socket is made or connected, nothing executed, nobody else's process named. Threads are made by `clone`,
/// to which seccomp cannot look deep enough; another process of this kind would be confined the same.
const CALLS: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_openat,
    libc::SYS_ppoll,
    libc::SYS_prctl,
    libc::SYS_pread64,
    libc::SYS_read,
    libc::SYS_recvfrom,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_statx,
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];

fn check(outcome: libc::c_long) -> std::io::Result<libc::c_long> {
    if outcome < 0 { Err(std::io::Error::last_os_error()) } else { Ok(outcome) }
}

/// Confines the process, which must have one thread.
pub(super) fn confine(data: &OwnedFd) -> std::io::Result<()> {
    // SAFETY: plain call.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
    files(data)?;
    calls()
}

/// Landlock, version 1: include/uapi/linux/landlock.h.
fn files(data: &OwnedFd) -> std::io::Result<()> {
    const EXECUTE_TO_SYMLINK: u64 = (1 << 13) - 1;
    const WRITE_FILE: u64 = 1 << 1;
    const READ_FILE: u64 = 1 << 2;
    const PATH_BENEATH: libc::c_long = 1;
    #[repr(C, packed)]
    struct Beneath {
        allowed: u64,
        parent: i32,
    }
    let handled = EXECUTE_TO_SYMLINK;
    // SAFETY: the kernel reads the structures, which outlive the calls.
    unsafe {
        let made = libc::syscall(libc::SYS_landlock_create_ruleset, &raw const handled, size_of::<u64>(), 0);
        let rules = match check(made) {
            Ok(fd) => OwnedFd::from_raw_fd(fd as i32),
            // Kernels before 5.13, or where it is switched off.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EOPNOTSUPP)) => return Ok(()),
            Err(e) => return Err(e),
        };
        let beneath = Beneath { allowed: READ_FILE | WRITE_FILE, parent: data.as_fd().as_raw_fd() };
        let rule = (&raw const beneath).cast::<libc::c_void>();
        check(libc::syscall(libc::SYS_landlock_add_rule, rules.as_raw_fd(), PATH_BENEATH, rule, 0))?;
        check(libc::syscall(libc::SYS_landlock_restrict_self, rules.as_raw_fd(), 0))?;
    }
    Ok(())
}

fn calls() -> std::io::Result<()> {
    let step = |code: u16, k: u32, jt: u8, jf: u8| libc::sock_filter { code, jt, jf, k };
    let mut filter = vec![
        step(LOAD, 4, 0, 0),
        step(EQUAL, ARCHITECTURE, 1, 0),
        step(RETURN, ERRNO | libc::ENOSYS as u32, 0, 0),
        step(LOAD, 0, 0, 0),
    ];
    for call in CALLS {
        filter.push(step(EQUAL, *call as u32, 0, 1));
        filter.push(step(RETURN, ALLOW, 0, 0));
    }
    filter.push(step(RETURN, ERRNO | libc::EPERM as u32, 0, 0));
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the kernel copies the program; mode 1 is SECCOMP_SET_MODE_FILTER.
    check(unsafe { libc::syscall(libc::SYS_seccomp, 1, 0, &raw const program) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a child of its own: what is confined stays so.
    #[test]
    fn nothing_but_its_data() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("data"), "x").unwrap();
        let data = OwnedFd::from(std::fs::File::open(dir.path()).unwrap());
        // SAFETY: the child only makes system calls and leaves by `_exit`.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let fails = |outcome: libc::c_long| u8::from(outcome >= 0);
            let mut wrong = u8::from(confine(&data).is_err());
            // SAFETY: plain calls.
            unsafe {
                wrong |= fails(libc::open(c"/etc/passwd".as_ptr(), libc::O_RDONLY).into()) << 1;
                wrong |= fails(libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0).into()) << 2;
                wrong |= fails(libc::kill(libc::getppid(), 0).into()) << 3;
                let own = libc::openat(data.as_raw_fd(), c"data".as_ptr(), libc::O_RDONLY);
                wrong |= u8::from(own < 0) << 4;
                libc::_exit(wrong.into());
            }
        }
        let mut status = 0;
        // SAFETY: plain call.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        let landlock = std::fs::read_to_string("/sys/kernel/security/lsm");
        let without = landlock.is_ok_and(|l| !l.contains("landlock"));
        let allowed = if without { [0, 2] } else { [0, 0] };
        assert!(allowed.contains(&libc::WEXITSTATUS(status)), "{}", libc::WEXITSTATUS(status));
    }
}
