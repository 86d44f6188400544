//! Work on foreign data without privileges: a process in its own user, mount, pid, network, ipc and uts namespaces.
//!
//! The daemon executes itself again (a hidden subcommand that calls [`main`]); that process sets the room up while it
//! is still root and single-threaded, enters it, gives everything up and then either executes one program or calls one
//! function. What the room has:
//! - a user namespace that maps ids 0..count onto an unused host range; no host id is reachable;
//! - an empty root (tmpfs, read-only) with the granted directories and files and, for programs, the host's `/usr`
//!   read-only. No `/proc`, `/dev`, `/sys`, no network, no other process;
//! - granted directories are *id-mapped mounts* of the same namespace: what the worker stores as id 0 lies on disk as
//!   id 0 and no privilege outside is needed for it (mount_setattr(2), `MOUNT_ATTR_IDMAP`; ext4, xfs, btrfs, tmpfs). Where one of
//!   them is on a file system that takes no such mounts (NFS, FAT, FUSE), the namespace maps the host's first ids onto themselves:
//!   then it is the room alone that keeps a worker, without rights outside, from everything else;
//! - the five capabilities that storing a tree takes, over its own namespace only; `no_new_privs`; a seccomp filter
//!   without mounts, namespaces, sockets, tracing, keys, bpf, io_uring; limits of memory, time, file size, descriptors.
//!
//! When the daemon dies its end of the lifeline pipe closes and the worker is killed.

use crate::seccomp;
use karst_model::{Error, Result};
use serde::{Deserialize, Serialize};
use std::{
    ffi::{CString, OsString},
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::{ffi::OsStrExt, fs::FileTypeExt, process::ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::io::AsyncReadExt;

/// First descriptor number of granted objects in the setup process; the lifeline lies just below.
const FIRST_FD: RawFd = 10;
const LIFELINE_FD: RawFd = FIRST_FD - 1;

/// How to execute the process that becomes the worker: an executable that calls [`main`] when given these arguments.
#[derive(Debug, Clone)]
pub struct Launcher {
    /// Executable.
    pub program: PathBuf,
    /// Arguments before the plan, such as `sandbox`.
    pub args: Vec<OsString>,
    /// First of 65,536 host ids that nothing else uses; two workers at a time may share them.
    pub id_base: u32,
}

impl Launcher {
    /// The running executable with a hidden subcommand.
    ///
    /// # Errors
    /// Internal when the executable cannot be found.
    pub fn own(subcommand: &str, id_base: u32) -> Result<Self> {
        Ok(Self { program: crate::exec::own_program()?, args: vec![subcommand.into()], id_base })
    }
}

/// Number of ids that a worker maps: 0..65536.
pub const ID_COUNT: u32 = 65_536;

/// Limits of a worker.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Limits {
    /// Address space in bytes.
    pub memory: u64,
    /// Processor time in seconds.
    pub cpu_seconds: u64,
    /// Largest file in bytes.
    pub file_size: u64,
    /// Wall-clock time.
    pub timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { memory: 2 << 30, cpu_seconds: 1800, file_size: 1 << 42, timeout: Duration::from_secs(1800) }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Grant {
    name: String,
    writable: bool,
    /// The descriptor is a mount that is nowhere yet, with the room's ids already.
    mounted: bool,
}

#[derive(Debug, Serialize, Deserialize)]
enum Job {
    Exec { argv: Vec<String> },
    Call { name: String, argument: serde_json::Value },
    Contained { argv: Vec<String>, cwd: PathBuf, env: Vec<(String, String)> },
}

#[derive(Debug, Serialize, Deserialize)]
struct Plan {
    id_base: u32,
    grants: Vec<Grant>,
    limits: Limits,
    job: Job,
}

/// Called with each line that a worker writes to standard error.
pub type OnLine = Box<dyn FnMut(&str) + Send>;

/// A worker in the making.
pub struct Sandbox {
    launcher: Launcher,
    grants: Vec<(Grant, OwnedFd)>,
    limits: Limits,
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    on_line: Option<OnLine>,
}

/// How a worker ended.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Exit code; 128 + n when signal n ended it.
    pub code: i32,
    /// Standard output (at most 1 MiB), empty when it was redirected.
    pub stdout: Vec<u8>,
    /// Standard error (at most 64 KiB).
    pub stderr: Vec<u8>,
}

impl Ended {
    /// Standard output when the exit code is 0.
    ///
    /// # Errors
    /// Internal with what the worker wrote to standard error as context.
    pub fn ok(self, what: &str) -> Result<Vec<u8>> {
        if self.code == 0 {
            return Ok(self.stdout);
        }
        let said = String::from_utf8_lossy(&self.stderr);
        Err(Error::internal(format!("{what} failed"), format!("exit code {}: {}", self.code, said.trim())))
    }
}

impl Sandbox {
    /// A worker that is granted nothing yet.
    pub fn new(launcher: &Launcher) -> Self {
        Self {
            launcher: launcher.clone(),
            grants: vec![],
            limits: Limits::default(),
            stdin: None,
            stdout: None,
            on_line: None,
        }
    }

    /// Tells each line of its standard error as it comes.
    pub fn on_line(mut self, f: OnLine) -> Self {
        self.on_line = Some(f);
        self
    }

    /// Grants a directory or file, to be seen as `/name`, for reading and writing, with ids unshifted on disk.
    pub fn writable(mut self, name: &str, what: OwnedFd) -> Self {
        let name = name.to_owned();
        self.grants.push((Grant { name, writable: true, mounted: false }, what));
        self
    }

    /// Grants a directory or file, to be seen as `/name`, for reading.
    pub fn readable(mut self, name: &str, what: OwnedFd) -> Self {
        let name = name.to_owned();
        self.grants.push((Grant { name, writable: false, mounted: false }, what));
        self
    }

    /// Grants a mount that is nowhere yet, to be seen as `/name`: one with the owners of [`Sandbox::ids`], of a file system that
    /// cannot be mounted with other owners again.
    pub fn mounted(mut self, name: &str, mount: OwnedFd) -> Self {
        let name = name.to_owned();
        self.grants.push((Grant { name, writable: false, mounted: true }, mount));
        self
    }

    /// The host's ids that the worker's ids are.
    pub fn ids(&self) -> crate::overlay::Mapped {
        crate::overlay::Mapped { base: self.launcher.id_base, count: ID_COUNT }
    }

    /// Limits other than the default.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Its standard input (default: empty).
    pub fn stdin(mut self, fd: OwnedFd) -> Self {
        self.stdin = Some(fd);
        self
    }

    /// Its standard output (default: kept and answered).
    pub fn stdout(mut self, fd: OwnedFd) -> Self {
        self.stdout = Some(fd);
        self
    }

    /// Executes a program of the host's table inside, argv as given; paths are the sandbox's own.
    ///
    /// # Errors
    /// Unsupported when the program is missing; timeout; internal when the room cannot be made.
    pub async fn exec<S: AsRef<str>>(self, program: crate::Program, args: &[S]) -> Result<Ended> {
        let mut argv = vec![program.path()?.to_string_lossy().into_owned()];
        argv.extend(args.iter().map(|a| a.as_ref().to_owned()));
        self.run(Job::Exec { argv }).await
    }

    /// Calls the function `name` of the launcher's table (see [`main`]) inside.
    ///
    /// # Errors
    /// Timeout; internal when the room cannot be made.
    pub async fn call(self, name: &str, argument: serde_json::Value) -> Result<Ended> {
        let name = name.to_owned();
        self.run(Job::Call { name, argument }).await
    }

    /// Executes a trusted program **as root on the host's file systems**, but in pid, mount and ipc namespaces of its own,
    /// so that whatever it started and mounted is gone when it ends, is killed, or this process dies. For programs that
    /// need the network and root, such as mmdebstrap; grants and limits other than the timeout do not apply.
    ///
    /// # Errors
    /// As [`Sandbox::exec`].
    pub async fn contained<S: AsRef<str>>(
        self,
        program: crate::Program,
        args: &[S],
        cwd: &Path,
        env: &[(&str, &str)],
    ) -> Result<Ended> {
        let mut argv = vec![program.path()?.to_string_lossy().into_owned()];
        argv.extend(args.iter().map(|a| a.as_ref().to_owned()));
        let env = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        self.run(Job::Contained { argv, cwd: cwd.to_owned(), env }).await
    }

    async fn run(self, job: Job) -> Result<Ended> {
        let limits = self.limits;
        let what = match &job {
            Job::Exec { argv } | Job::Contained { argv, .. } => argv.join(" "),
            Job::Call { name, .. } => name.clone(),
        };
        let (grants, fds): (Vec<_>, Vec<_>) = self.grants.into_iter().unzip();
        let plan = Plan { id_base: self.launcher.id_base, grants, limits, job };
        // Out of the way of the numbers that the child gives them.
        let high = |fd: &OwnedFd| -> Result<OwnedFd> {
            Ok(rustix::io::fcntl_dupfd_cloexec(fd, 100).map_err(io::Error::from)?)
        };
        let (lifeline, lifeline_ours) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(io::Error::from)?;
        let lifeline = high(&lifeline)?;
        let fds = fds.iter().map(high).collect::<Result<Vec<_>>>()?;
        let mut command = tokio::process::Command::new(&self.launcher.program);
        command
            .args(&self.launcher.args)
            .arg(serde_json::to_string(&plan)?)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C.UTF-8")
            .current_dir("/")
            .kill_on_drop(true)
            .stdin(self.stdin.map_or_else(Stdio::null, Stdio::from))
            .stdout(self.stdout.map_or_else(Stdio::piped, Stdio::from))
            .stderr(Stdio::piped());
        let numbers: Vec<RawFd> =
            std::iter::once(lifeline.as_raw_fd()).chain(fds.iter().map(AsRawFd::as_raw_fd)).collect();
        // SAFETY: the closure calls dup2 only, which is async-signal-safe, and touches no lock or allocation.
        unsafe {
            command.pre_exec(move || {
                for (i, fd) in numbers.iter().enumerate() {
                    if libc::dup2(*fd, LIFELINE_FD + i as RawFd) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let started = std::time::Instant::now();
        let mut child = command
            .spawn()
            .map_err(|e| Error::internal("a worker could not be started", e).with_context(&what))?;
        drop((command, lifeline, fds));
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let work = async {
            let (out, err, status) =
                tokio::join!(keep(stdout, 1 << 20, None), keep(stderr, 64 << 10, self.on_line), child.wait());
            status.map(|s| (out, err, s))
        };
        let done = tokio::time::timeout(limits.timeout, work).await;
        drop(lifeline_ours);
        match done {
            Ok(Ok((stdout, stderr, status))) => {
                let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
                tracing::debug!(worker = %what, code, ms = started.elapsed().as_millis() as u64, "worker ended");
                Ok(Ended { code, stdout, stderr })
            }
            Ok(Err(e)) => Err(Error::internal("a worker could not be waited for", e).with_context(what)),
            Err(_) => {
                let _ = child.kill().await;
                Err(Error::timeout(format!("the work did not end within {:?}", limits.timeout))
                    .with_context(what))
            }
        }
    }
}

async fn keep(
    source: Option<impl tokio::io::AsyncRead + Unpin>,
    cap: usize,
    mut on_line: Option<OnLine>,
) -> Vec<u8> {
    let (mut kept, mut line) = (Vec::new(), Vec::new());
    let Some(mut source) = source else { return kept };
    let mut buffer = vec![0u8; 16 << 10];
    while let Ok(n @ 1..) = source.read(&mut buffer).await {
        let room = cap.saturating_sub(kept.len()).min(n);
        kept.extend_from_slice(&buffer[..room]);
        if let Some(f) = &mut on_line {
            for byte in &buffer[..n] {
                match byte {
                    b'\n' | b'\r' => f(&String::from_utf8_lossy(&std::mem::take(&mut line))),
                    _ if line.len() < 1024 => line.push(*byte),
                    _ => {}
                }
            }
        }
    }
    kept
}

/// A function that a worker can call: takes its argument, reads standard input, answers its standard output, and the
/// exit code.
pub type Call = fn(&str, serde_json::Value) -> i32;

/// Entry point of the worker process; call it first thing in `main`, before any thread exists, with the plan (the last
/// argument). `call` is the table of functions that [`Sandbox::call`] names. Ends the process.
pub fn main(plan: &str, call: Call) -> ! {
    let code = match serde_json::from_str::<Plan>(plan) {
        Ok(plan) => match enter(plan, call) {
            Ok(code) => code,
            Err(e) => {
                let _ = writeln!(io::stderr(), "sandbox: {e}");
                125
            }
        },
        Err(e) => {
            let _ = writeln!(io::stderr(), "sandbox: the plan is malformed: {e}");
            125
        }
    };
    std::process::exit(code)
}

fn check(what: &str, r: libc::c_long) -> io::Result<libc::c_long> {
    if r < 0 {
        let e = io::Error::last_os_error();
        return Err(io::Error::new(e.kind(), format!("{what}: {e}")));
    }
    Ok(r)
}

fn c(s: impl AsRef<Path>) -> io::Result<CString> {
    CString::new(s.as_ref().as_os_str().as_bytes()).map_err(io::Error::other)
}

const EMPTY: &std::ffi::CStr = c"";
const MOUNT_ATTR_RDONLY: u64 = 0x1;
const MOUNT_ATTR_NOSUID: u64 = 0x2;
const MOUNT_ATTR_NODEV: u64 = 0x4;
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;
const OPEN_TREE_CLONE: libc::c_uint = 1;
const AT_RECURSIVE: libc::c_uint = 0x8000;

#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

/// A detached copy of the mount at `fd` (and `path` below it), with attributes, mapped through `userns` when given.
fn detached(
    fd: RawFd,
    path: &CString,
    recursive: bool,
    attributes: u64,
    userns: Option<RawFd>,
) -> io::Result<OwnedFd> {
    let empty = path.as_bytes().is_empty();
    let at = if empty { libc::AT_EMPTY_PATH as libc::c_uint } else { 0 }
        | if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: plain system call with valid pointers.
    let tree = unsafe {
        libc::syscall(
            libc::SYS_open_tree,
            fd,
            path.as_ptr(),
            OPEN_TREE_CLONE | libc::O_CLOEXEC as libc::c_uint | at,
        )
    };
    // SAFETY: a new descriptor that nobody else owns.
    let tree = unsafe { OwnedFd::from_raw_fd(check("open_tree", tree)? as RawFd) };
    let attr = MountAttr {
        set: attributes | if userns.is_some() { MOUNT_ATTR_IDMAP } else { 0 },
        clear: 0,
        propagation: 0,
        userns_fd: userns.unwrap_or(0) as u64,
    };
    // SAFETY: attr is the kernel's struct mount_attr, version 0.
    check("mount_setattr (does this file system take id-mapped mounts?)", unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            EMPTY.as_ptr(),
            libc::AT_EMPTY_PATH as libc::c_uint | if recursive { AT_RECURSIVE } else { 0 },
            &raw const attr,
            size_of::<MountAttr>(),
        )
    })?;
    Ok(tree)
}

fn attach(tree: &OwnedFd, target: &Path) -> io::Result<()> {
    let target = c(target)?;
    // SAFETY: plain system call with valid pointers. 4 is MOVE_MOUNT_F_EMPTY_PATH.
    check("move_mount", unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            EMPTY.as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            4u32,
        )
    })?;
    Ok(())
}

/// A user namespace that maps 0..count onto base..base+count, made by a short-lived child.
fn user_namespace(base: u32) -> io::Result<OwnedFd> {
    let (mut ready, ready_w) = io::pipe()?;
    let (done_r, done) = io::pipe()?;
    // SAFETY: the process has one thread; the child only calls unshare, write, read, _exit.
    let pid = unsafe { libc::fork() };
    check("fork", pid.into())?;
    if pid == 0 {
        drop(done);
        let mut byte = [u8::from(unsafe { libc::unshare(libc::CLONE_NEWUSER) } == 0)];
        let _ = (&ready_w).write_all(&byte);
        let _ = (&done_r).read(&mut byte);
        // SAFETY: leaves without running destructors of the parent's state.
        unsafe { libc::_exit(0) };
    }
    drop((ready_w, done_r));
    let map = (|| {
        let mut byte = [0u8];
        ready.read_exact(&mut byte)?;
        if byte[0] == 0 {
            return Err(io::Error::other("this kernel refuses user namespaces"));
        }
        let line = format!("0 {base} {ID_COUNT}\n");
        std::fs::write(format!("/proc/{pid}/uid_map"), &line)?;
        std::fs::write(format!("/proc/{pid}/gid_map"), &line)?;
        Ok(OwnedFd::from(std::fs::File::open(format!("/proc/{pid}/ns/user"))?))
    })();
    drop(done);
    let mut status = 0;
    // SAFETY: our own child.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    map
}

/// The room of [`Sandbox::contained`].
fn contain(argv: &[String], cwd: &Path, env: &[(String, String)]) -> io::Result<i32> {
    // SAFETY: system calls on our own process, which has one thread.
    unsafe {
        let spaces = libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWPID;
        check("unshare", libc::unshare(spaces).into())?;
        let (none, private) = (std::ptr::null(), libc::MS_REC | libc::MS_PRIVATE);
        check("mount", libc::mount(none, c"/".as_ptr(), none, private, none.cast()).into())?;
        let pid = libc::fork();
        check("fork", pid.into())?;
        if pid != 0 {
            return supervise(pid);
        }
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::close_range(3, u32::MAX, 0);
        let (proc, flags) = (c"proc".as_ptr(), libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC);
        let mounted = libc::mount(proc, c"/proc".as_ptr(), proc, flags, none.cast());
        // Pid 1 must reap and must not be the program itself, which expects the default signal actions.
        let program = if mounted < 0 { -1 } else { libc::fork() };
        if program == 0 {
            use std::os::unix::process::CommandExt;
            let envs = env.iter().map(|(k, v)| (k, v));
            let e = std::process::Command::new(&argv[0]).args(&argv[1..]).envs(envs).current_dir(cwd).exec();
            let _ = writeln!(io::stderr(), "sandbox: {}: {e}", argv[0]);
            libc::_exit(126);
        }
        if program < 0 {
            libc::_exit(125);
        }
        for fd in 0..=1 {
            libc::close(fd);
        }
        loop {
            let mut status = 0;
            let ended = libc::waitpid(-1, &raw mut status, 0);
            if ended == program {
                let code = if libc::WIFEXITED(status) {
                    libc::WEXITSTATUS(status)
                } else {
                    128 + libc::WTERMSIG(status)
                };
                libc::_exit(code);
            }
            if ended < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                libc::_exit(125);
            }
        }
    }
}

fn enter(plan: Plan, call: Call) -> io::Result<i32> {
    if let Job::Contained { argv, cwd, env } = &plan.job {
        return contain(argv, cwd, env);
    }
    let mapped = user_namespace(plan.id_base)?;
    let empty = CString::default();
    let mut plain = false;
    for (i, _) in plan.grants.iter().enumerate().filter(|(_, grant)| !grant.mounted) {
        match detached(FIRST_FD + i as RawFd, &empty, false, MOUNT_ATTR_NOSUID, Some(mapped.as_raw_fd())) {
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => plain = true,
            other => drop(other?),
        }
    }
    if plain && plan.grants.iter().any(|grant| grant.mounted) {
        return Err(io::Error::other(
            "what is granted is partly on a file system that takes no id-mapped mounts",
        ));
    }
    let userns = if plain { user_namespace(0)? } else { mapped };
    let mut mounts = Vec::new();
    for (i, grant) in plan.grants.iter().enumerate() {
        let fd = FIRST_FD + i as RawFd;
        let read_only = if grant.writable { 0 } else { MOUNT_ATTR_RDONLY };
        let found = std::fs::metadata(format!("/proc/self/fd/{fd}"))?;
        let is_dir = found.is_dir();
        // A disk may be a device, which was granted to be read as one; in a tree there are none to be opened.
        let devices = if found.file_type().is_block_device() { 0 } else { MOUNT_ATTR_NODEV };
        let attributes = MOUNT_ATTR_NOSUID | devices | read_only;
        if grant.mounted {
            // SAFETY: as above; nobody else owns it.
            mounts.push((unsafe { OwnedFd::from_raw_fd(fd) }, grant.name.clone(), is_dir));
            continue;
        }
        mounts.push((
            detached(fd, &empty, false, attributes, (!plain).then(|| userns.as_raw_fd()))?,
            grant.name.clone(),
            is_dir,
        ));
    }
    let mut links = Vec::new();
    if matches!(plan.job, Job::Exec { .. }) {
        for name in ["usr", "bin", "sbin", "lib", "lib64"] {
            let path = Path::new("/").join(name);
            if let Ok(target) = std::fs::read_link(&path) {
                links.push((name, target));
            } else if path.is_dir() {
                let attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_RDONLY;
                mounts.push((
                    detached(libc::AT_FDCWD, &c(&path)?, true, attributes, None)?,
                    name.to_owned(),
                    true,
                ));
            }
        }
    }
    // SAFETY: system calls on our own process, which has one thread.
    unsafe {
        check("setns", libc::setns(userns.as_raw_fd(), libc::CLONE_NEWUSER).into())?;
        check("setgroups", libc::setgroups(0, std::ptr::null()).into())?;
        check("setresgid", libc::setresgid(0, 0, 0).into())?;
        check("setresuid", libc::setresuid(0, 0, 0).into())?;
        let spaces = libc::CLONE_NEWNS
            | libc::CLONE_NEWNET
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWUTS
            | libc::CLONE_NEWPID
            | libc::CLONE_NEWCGROUP;
        check("unshare", libc::unshare(spaces).into())?;
        let none = std::ptr::null();
        let private = libc::MS_REC | libc::MS_PRIVATE;
        check("mount", libc::mount(none, c"/".as_ptr(), none, private, none.cast()).into())?;
        let (tmpfs, flags) = (c"tmpfs".as_ptr(), libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC);
        let options = c"mode=0755,size=1m,nr_inodes=64";
        check(
            "mount tmpfs",
            libc::mount(tmpfs, c"/tmp".as_ptr(), tmpfs, flags, options.as_ptr().cast()).into(),
        )?;
    }
    let root = Path::new("/tmp");
    for (tree, name, is_dir) in &mounts {
        let target = root.join(name);
        if *is_dir {
            std::fs::create_dir(&target)?;
        } else {
            std::fs::File::create(&target)?;
        }
        attach(tree, &target)?;
    }
    for (name, target) in links {
        std::os::unix::fs::symlink(target, root.join(name))?;
    }
    drop(mounts);
    // SAFETY: system calls with valid pointers on our own namespaces.
    unsafe {
        check("chdir", libc::chdir(c"/tmp".as_ptr()).into())?;
        check("pivot_root", libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()))?;
        check("umount", libc::umount2(c".".as_ptr(), libc::MNT_DETACH).into())?;
        check("chdir", libc::chdir(c"/".as_ptr()).into())?;
        let none = std::ptr::null();
        let flags = libc::MS_REMOUNT
            | libc::MS_BIND
            | libc::MS_RDONLY
            | libc::MS_NOSUID
            | libc::MS_NODEV
            | libc::MS_NOEXEC;
        check("remount", libc::mount(none, c"/".as_ptr(), none, flags, none.cast()).into())?;
    }
    drop(userns);
    // SAFETY: one thread; the child goes on with ordinary code, which is fine after fork in a single-threaded process.
    let pid = unsafe { libc::fork() };
    check("fork", pid.into())?;
    if pid == 0 {
        let code = inside(plan, call).unwrap_or_else(|e| {
            let _ = writeln!(io::stderr(), "sandbox: {e}");
            125
        });
        // SAFETY: ends the child.
        unsafe { libc::_exit(code) };
    }
    supervise(pid)
}

/// Waits for the worker or the end of the daemon, whichever comes first.
fn supervise(pid: libc::pid_t) -> io::Result<i32> {
    // SAFETY: system calls on our own child and descriptors.
    unsafe {
        libc::close_range(FIRST_FD as u32, u32::MAX, 0);
        for fd in 0..=1 {
            libc::close(fd); // the worker's ends must close when the worker ends
        }
        let pidfd = check("pidfd_open", libc::syscall(libc::SYS_pidfd_open, pid, 0))? as RawFd;
        let mut polled = [
            libc::pollfd { fd: pidfd, events: libc::POLLIN, revents: 0 },
            libc::pollfd { fd: LIFELINE_FD, events: libc::POLLIN, revents: 0 },
        ];
        while libc::poll(polled.as_mut_ptr(), 2, -1) < 0 {}
        if polled[0].revents == 0 {
            libc::kill(pid, libc::SIGKILL);
        }
        let mut status = 0;
        while libc::waitpid(pid, &raw mut status, 0) < 0 {
            if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 128 + libc::WTERMSIG(status) })
    }
}

/// Capabilities that storing a foreign tree takes: chown, `dac_override`, fowner, fsetid, setfcap.
const KEPT_CAPABILITIES: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 31;

fn inside(plan: Plan, call: Call) -> io::Result<i32> {
    // SAFETY: system calls on our own process.
    unsafe {
        check("prctl", libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL).into())?;
        libc::close_range(3, u32::MAX, 0);
        libc::umask(0);
        libc::setsid();
        let limit = |resource, n: u64| {
            let l = libc::rlimit { rlim_cur: n, rlim_max: n };
            check("setrlimit", libc::setrlimit(resource, &raw const l).into())
        };
        limit(libc::RLIMIT_AS, plan.limits.memory)?;
        limit(libc::RLIMIT_CPU, plan.limits.cpu_seconds)?;
        limit(libc::RLIMIT_FSIZE, plan.limits.file_size)?;
        limit(libc::RLIMIT_NOFILE, 256)?;
        limit(libc::RLIMIT_CORE, 0)?;
        limit(libc::RLIMIT_MEMLOCK, 64 << 10)?;
        for capability in 0..64 {
            if KEPT_CAPABILITIES & (1u64 << capability) == 0
                && libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) < 0
            {
                break; // past the last one that this kernel knows
            }
        }
        #[repr(C)]
        struct Header {
            version: u32,
            pid: i32,
        }
        let header = Header { version: 0x2008_0522, pid: 0 };
        let (low, high) = (KEPT_CAPABILITIES as u32, (KEPT_CAPABILITIES >> 32) as u32);
        let data: [[u32; 3]; 2] = [[low, low, 0], [high, high, 0]];
        check("capset", libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()))?;
        check("no_new_privs", libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
    }
    seccomp::confine()?;
    match plan.job {
        Job::Call { name, argument } => Ok(call(&name, argument)),
        Job::Exec { argv } => {
            use std::os::unix::process::CommandExt;
            let mut command = std::process::Command::new(&argv[0]);
            Err(command.args(&argv[1..]).exec())
        }
        Job::Contained { .. } => Err(io::Error::other("not a job for this room")),
    }
}
