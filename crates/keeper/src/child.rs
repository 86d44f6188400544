//! The main process: made ready between fork and exec, so that its program starts with nothing but what was specified.

use crate::{console::ChildEnd, sys};
use karst_keeper::Spec;
use std::{
    ffi::{CString, OsStr},
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
};

/// A running main process.
pub(crate) struct Main {
    /// Process id.
    pub(crate) pid: u32,
    /// Becomes readable when it ended.
    pub(crate) pidfd: OwnedFd,
    /// Its standard output and error.
    pub(crate) output: OwnedFd,
}

/// What failed between fork and exec; sent as one byte with the error's number.
const STEPS: &[&str] = &[
    "becoming its own session",
    "setting its console",
    "entering its cgroup",
    "setting a resource limit",
    "emptying the capability bounding set",
    "becoming its user",
    "clearing its capabilities",
    "setting no_new_privs",
    "outliving its keeper is not allowed",
    "placing its descriptors",
    "changing into its working directory",
    "executing the program",
    "entering its mount namespace",
    "entering its network namespace",
    "entering its user namespace",
];

fn c(s: &OsStr) -> Result<CString, String> {
    CString::new(s.as_bytes()).map_err(|_| "an argument holds a NUL byte".to_owned())
}

/// Starts it; answers when its program was executed.
pub(crate) fn spawn(spec: &Spec, passed: Vec<OwnedFd>, console: ChildEnd) -> Result<Main, String> {
    let program = c(spec.program.as_os_str())?;
    let argv = spec.argv.iter().map(|a| c(a)).collect::<Result<Vec<_>, _>>()?;
    let mut env = Vec::with_capacity(spec.env.len());
    for (k, v) in &spec.env {
        let mut line = k.clone();
        line.push("=");
        line.push(v);
        env.push(c(&line)?);
    }
    let cwd = c(spec.cwd.as_os_str())?;
    let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
        list.iter().map(|s| s.as_ptr()).chain(std::iter::once(std::ptr::null())).collect()
    };
    let (argv_p, env_p) = (pointers(&argv), pointers(&env));

    let fail = |e: io::Error| format!("starting the main process: {e}");
    let above = spec.fds.iter().copied().max().unwrap_or(2).max(512) + 1;
    let pipe = || -> io::Result<(OwnedFd, OwnedFd)> {
        let mut ends: [RawFd; 2] = [0; 2];
        // SAFETY: pipe2 fills two descriptors that are ours.
        unsafe {
            sys::check(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC))?;
            Ok((OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])))
        }
    };
    let (error_read, error_write) = pipe().map_err(fail)?;
    let (output_read, output_write) = pipe().map_err(fail)?;

    let keeper = Some(rustix::process::getpid());
    // SAFETY: the process has one thread, so the child may use everything.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(fail(io::Error::last_os_error()));
    }
    if pid == 0 {
        let mut step = 0u8;
        let work = || -> io::Result<()> {
            let error_write = sys::move_above(error_write, above)?;
            let error = match prepare(spec, passed, &console, &output_write, above, keeper, &mut step) {
                Err(e) => e,
                // SAFETY: all strings live on; execve only returns on failure.
                Ok(()) => unsafe {
                    step = 10;
                    if libc::chdir(cwd.as_ptr()) == 0 {
                        step = 11;
                        libc::execve(program.as_ptr(), argv_p.as_ptr(), env_p.as_ptr());
                    }
                    io::Error::last_os_error()
                },
            };
            let number = error.raw_os_error().unwrap_or(libc::EIO);
            let mut message = [0u8; 5];
            message[0] = step;
            message[1..].copy_from_slice(&number.to_ne_bytes());
            let _ = rustix::io::write(&error_write, &message);
            Ok(())
        };
        let _ = work();
        // SAFETY: ends the child without running the keeper's destructors.
        unsafe { libc::_exit(127) };
    }
    drop((error_write, output_write, passed, console));
    let pid = pid as u32;
    let mut message = [0u8; 5];
    // End-of-file: the program was executed, which closed the other end.
    let got = loop {
        match rustix::io::read(&error_read, &mut message) {
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => break 0,
            Ok(n) => break n,
        }
    };
    if got > 0 {
        // SAFETY: reaps the child that is about to exit.
        unsafe { libc::waitpid(pid as i32, std::ptr::null_mut(), 0) };
        let number = i32::from_ne_bytes([message[1], message[2], message[3], message[4]]);
        let step = STEPS.get(message[0] as usize).copied().unwrap_or("preparing");
        return Err(format!("{step} ({}): {}", spec.program.display(), io::Error::from_raw_os_error(number)));
    }
    let pidfd = rustix::process::Pid::from_raw(pid as i32)
        .ok_or(rustix::io::Errno::SRCH)
        .and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()))
        .map_err(|e| format!("pidfd: {e}"))?;
    sys::nonblocking(&output_read);
    Ok(Main { pid, pidfd, output: output_read })
}

fn prepare(
    spec: &Spec,
    mut passed: Vec<OwnedFd>,
    console: &ChildEnd,
    output: &OwnedFd,
    above: RawFd,
    keeper: Option<rustix::process::Pid>,
    step: &mut u8,
) -> io::Result<()> {
    rustix::process::setsid()?;
    // SAFETY: plain calls on descriptors that live to the exec; all sets are initialised.
    unsafe {
        // What the keeper ignores or blocks is not the program's business.
        let mut empty = MaybeUninit::<libc::sigset_t>::zeroed().assume_init();
        libc::sigemptyset(&mut empty);
        libc::sigprocmask(libc::SIG_SETMASK, &empty, std::ptr::null_mut());
        for s in 1..=64 {
            libc::signal(s, libc::SIG_DFL);
        }
        libc::umask(0o022);

        *step = 1;
        libc::dup2(output.as_raw_fd(), 1);
        libc::dup2(output.as_raw_fd(), 2);
        let mut handed: Vec<(OwnedFd, RawFd)> = vec![];
        match console {
            ChildEnd::None => {}
            ChildEnd::Pty(slave) => {
                sys::check(libc::dup2(slave.as_raw_fd(), 0))?;
                sys::check(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
            }
            ChildEnd::Socket(fd, number) => {
                handed.push((sys::move_above(fd.try_clone()?, above)?, *number));
            }
        }

        *step = 2;
        for dir in &spec.cgroups {
            sys::write_file(&dir.join("cgroup.procs"), b"0")?;
        }
        // A lower value than ours is not permitted without a capability; then the default is right as well.
        let _ = sys::write_file(
            std::path::Path::new("/proc/self/oom_score_adj"),
            spec.oom_score_adj.to_string().as_bytes(),
        );

        if spec.mount_namespace {
            // After the cgroups, whose places need not be the same in there.
            *step = 12;
            let namespace = passed.remove(0);
            sys::check(libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNS))?;
        }
        if spec.network_namespace {
            *step = 13;
            let namespace = passed.remove(0);
            sys::check(libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET))?;
        }
        let mut user_namespace = None;
        if spec.user_namespace {
            *step = 14;
            // Out of the way of the numbers that are given now.
            user_namespace = Some(sys::move_above(passed.remove(0), above)?);
        }

        *step = 9;
        for (fd, number) in passed.into_iter().zip(&spec.fds) {
            handed.push((sys::move_above(fd, above)?, *number));
        }
        sys::check(
            libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) as libc::c_int
        )?;
        for (fd, number) in &handed {
            sys::check(libc::dup2(fd.as_raw_fd(), *number))?;
        }
        std::mem::forget(handed); // closed by exec

        // After the descriptors, whose temporary numbers may lie above a low limit of open files.
        *step = 3;
        for (resource, soft, hard) in &spec.rlimits {
            let limit = libc::rlimit { rlim_cur: *soft, rlim_max: *hard };
            sys::check(libc::setrlimit(*resource as _, &limit))?;
        }

        *step = 4;
        if spec.clear_capabilities {
            libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
            for capability in 0..64 {
                if libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) < 0 {
                    let e = io::Error::last_os_error();
                    if e.raw_os_error() == Some(libc::EINVAL) {
                        break; // beyond the last one
                    }
                    return Err(e);
                }
            }
        }

        if let Some(namespace) = &user_namespace {
            // Last of all that root does; no group of the host goes along.
            *step = 14;
            sys::check(libc::setgroups(0, std::ptr::null()))?;
            sys::check(libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWUSER))?;
        }

        *step = 5;
        if let Some((uid, gid, groups)) = &spec.user {
            sys::check(libc::setgroups(groups.len(), groups.as_ptr()))?;
            sys::check(libc::setresgid(*gid, *gid, *gid))?;
            sys::check(libc::setresuid(*uid, *uid, *uid))?;
        }

        *step = 6;
        if spec.clear_capabilities {
            // Version 3 of capset: header with version and pid, then two blocks of three words.
            let header: [u32; 2] = [0x2008_0522, 0];
            let empty = [0u32; 6];
            sys::check(libc::syscall(libc::SYS_capset, header.as_ptr(), empty.as_ptr()) as libc::c_int)?;
        }

        *step = 7;
        if spec.no_new_privs {
            sys::check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        }

        // After the change of user, which clears it.
        *step = 8;
        sys::check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0))?;
        if rustix::process::getppid() != keeper {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
    }
    Ok(())
}
