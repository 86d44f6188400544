//! Running programs of the host: a fixed table, argv only, cleared environment, timeout, output cap.

use karst_model::{Error, Result};
use std::{
    ffi::{OsStr, OsString},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

/// Programs that Karst may execute on a host. Nothing else is ever run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Program {
    /// `apparmor_parser`: the profile of containers.
    ApparmorParser,
    /// `dnsmasq`: DHCP and DNS of managed networks.
    Dnsmasq,
    /// `ip`: links and addresses.
    Ip,
    /// `lxc-cgroup`: what a running container may use of devices, on control groups v2.
    LxcCgroup,
    /// `lxc-start`: a container.
    LxcStart,
    /// `lvm`: volume groups and thin volumes of LVM pools.
    Lvm,
    /// `mkfs.btrfs`: file systems of btrfs pools.
    MkfsBtrfs,
    /// `mkfs.ext4`: file systems of disk images.
    MkfsExt4,
    /// `mkfs.xfs`: file systems of LVM pools' volumes.
    MkfsXfs,
    /// `mmdebstrap`: Debian root file systems.
    Mmdebstrap,
    /// `nft`: firewall.
    Nft,
    /// `qemu-img`: disk images.
    QemuImg,
    /// `qemu-system-x86_64`.
    QemuSystemX86,
    /// `resize2fs`: growth of ext4.
    Resize2fs,
    /// `sqfs2tar`: a squashfs image as a tar stream.
    Sqfs2tar,
    /// `swtpm`: the TPM of a virtual machine.
    Swtpm,
    /// `thin_check`: with which LVM looks at a thin pool before it uses one.
    ThinCheck,
    /// `virtiofsd`, the one written in Rust: directories that virtual machines share with their host.
    Virtiofsd,
    /// `iptables-nft`: the rules of Docker, ufw and others, kept by the kernel's nftables.
    IptablesNft,
    /// `iptables-nft-restore`: several of them in one transaction.
    IptablesNftRestore,
    /// `iptables-legacy`: the same in the kernel's older tables.
    IptablesLegacy,
    /// `iptables-legacy-restore`.
    IptablesLegacyRestore,
    /// The same four for IPv6: `ip6tables-nft`.
    Ip6tablesNft,
    /// `ip6tables-nft-restore`.
    Ip6tablesNftRestore,
    /// `ip6tables-legacy`.
    Ip6tablesLegacy,
    /// `ip6tables-legacy-restore`.
    Ip6tablesLegacyRestore,
    /// `firewall-cmd`: firewalld.
    FirewallCmd,
    /// `xfs_growfs`: growth of XFS.
    XfsGrowfs,
    /// `zfs`: data sets and zvols.
    Zfs,
    /// `zpool`: pools of ZFS.
    Zpool,
    /// Karst's own keeper, beside the daemon's executable.
    Keeper,
}

impl Program {
    /// File name.
    pub fn name(self) -> &'static str {
        match self {
            Self::ApparmorParser => "apparmor_parser",
            Self::Dnsmasq => "dnsmasq",
            Self::Ip => "ip",
            Self::LxcCgroup => "lxc-cgroup",
            Self::LxcStart => "lxc-start",
            Self::Lvm => "lvm",
            Self::MkfsBtrfs => "mkfs.btrfs",
            Self::MkfsExt4 => "mkfs.ext4",
            Self::MkfsXfs => "mkfs.xfs",
            Self::Mmdebstrap => "mmdebstrap",
            Self::Nft => "nft",
            Self::QemuImg => "qemu-img",
            Self::QemuSystemX86 => "qemu-system-x86_64",
            Self::Resize2fs => "resize2fs",
            Self::Sqfs2tar => "sqfs2tar",
            Self::Swtpm => "swtpm",
            Self::ThinCheck => "thin_check",
            Self::Virtiofsd => "virtiofsd",
            Self::IptablesNft => "iptables-nft",
            Self::IptablesNftRestore => "iptables-nft-restore",
            Self::IptablesLegacy => "iptables-legacy",
            Self::IptablesLegacyRestore => "iptables-legacy-restore",
            Self::Ip6tablesNft => "ip6tables-nft",
            Self::Ip6tablesNftRestore => "ip6tables-nft-restore",
            Self::Ip6tablesLegacy => "ip6tables-legacy",
            Self::Ip6tablesLegacyRestore => "ip6tables-legacy-restore",
            Self::FirewallCmd => "firewall-cmd",
            Self::XfsGrowfs => "xfs_growfs",
            Self::Zfs => "zfs",
            Self::Zpool => "zpool",
            Self::Keeper => "karst-keeper",
        }
    }

    /// Debian's package that brings it.
    pub fn package(self) -> &'static str {
        match self {
            Self::ApparmorParser => "apparmor",
            Self::Dnsmasq => "dnsmasq-base",
            Self::Ip => "iproute2",
            Self::LxcCgroup | Self::LxcStart => "lxc",
            Self::MkfsBtrfs => "btrfs-progs",
            Self::MkfsExt4 | Self::Resize2fs => "e2fsprogs",
            Self::Lvm => "lvm2",
            Self::MkfsXfs | Self::XfsGrowfs => "xfsprogs",
            Self::Zfs | Self::Zpool => "zfsutils-linux",
            Self::Mmdebstrap => "mmdebstrap",
            Self::Sqfs2tar => "squashfs-tools-ng",
            Self::Swtpm => "swtpm",
            Self::ThinCheck => "thin-provisioning-tools",
            Self::Virtiofsd => "virtiofsd",
            Self::Nft => "nftables",
            Self::QemuImg => "qemu-utils",
            Self::QemuSystemX86 => "qemu-system-x86",
            Self::IptablesNft
            | Self::IptablesNftRestore
            | Self::IptablesLegacy
            | Self::IptablesLegacyRestore
            | Self::Ip6tablesNft
            | Self::Ip6tablesNftRestore
            | Self::Ip6tablesLegacy
            | Self::Ip6tablesLegacyRestore => "iptables",
            Self::FirewallCmd => "firewalld",
            Self::Keeper => "karst",
        }
    }

    /// Where it may lie. What is no command of anybody's lies apart; QEMU's older virtiofsd (`/usr/lib/qemu`) is another program.
    fn places(self) -> &'static [&'static str] {
        match self {
            Self::Virtiofsd => &["/usr/libexec", "/usr/local/libexec", "/usr/sbin", "/usr/bin"],
            _ => &["/usr/sbin", "/usr/bin", "/sbin", "/bin"],
        }
    }

    /// Absolute path: only root-owned system directories are searched, never `PATH`; the keeper lies beside the daemon.
    ///
    /// # Errors
    /// Unsupported, naming the package to install.
    pub fn path(self) -> Result<PathBuf> {
        if self == Self::Keeper {
            return keeper_path();
        }
        self.places().iter().map(|d| Path::new(d).join(self.name())).find(|p| p.is_file()).ok_or_else(|| {
            Error::unsupported(format!(
                "{} is not installed on this host; install the package {}",
                self.name(),
                self.package()
            ))
        })
    }
}

/// The file of this program by name. After an upgrade the kernel calls the old file `NAME (deleted)`; the new one of that
/// name is meant.
///
/// # Errors
/// When the kernel does not tell.
pub fn own_program() -> Result<PathBuf> {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let path = std::env::current_exe()?;
    let name = path.as_os_str().as_bytes();
    Ok(match name.strip_suffix(b" (deleted)") {
        Some(name) if !path.exists() => PathBuf::from(OsString::from_vec(name.to_vec())),
        _ => path,
    })
}

/// A program of ours that lies beside the daemon.
fn beside(name: &str) -> Result<PathBuf> {
    let own = own_program()?;
    // Tests run from target/debug/deps; the programs lie one directory up.
    own.ancestors().skip(1).take(2).map(|d| d.join(name)).find(|p| p.is_file()).ok_or_else(|| {
        Error::unsupported(format!("{name} is missing beside the daemon; install Karst again"))
    })
}

fn keeper_path() -> Result<PathBuf> {
    beside("karst-keeper")
}

/// The agent for virtual machines: a file to hand on, never executed on the host.
///
/// # Errors
/// Unsupported when it is not beside the daemon.
pub fn guest_agent() -> Result<PathBuf> {
    beside("karst-guest-agent")
}

/// A program call in the making.
#[derive(Debug)]
pub struct Command {
    program: Program,
    args: Vec<OsString>,
    env: Vec<(&'static str, OsString)>,
    timeout: Duration,
    output_cap: usize,
    stdin: Option<Vec<u8>>,
    stdin_fd: Option<OwnedFd>,
    stdout_fd: Option<OwnedFd>,
    cwd: PathBuf,
}

/// What a program left behind.
#[derive(Debug, Clone, Default)]
pub struct Output {
    /// Exit code; 128 + n when signal n ended it.
    pub code: i32,
    /// Standard output, capped.
    pub stdout: Vec<u8>,
    /// Standard error, capped.
    pub stderr: Vec<u8>,
}

/// Begins a call of `program`.
pub fn run(program: Program) -> Command {
    Command {
        program,
        args: vec![],
        env: vec![],
        timeout: Duration::from_secs(30),
        output_cap: 1 << 20,
        stdin: None,
        stdin_fd: None,
        stdout_fd: None,
        cwd: PathBuf::from("/"),
    }
}

impl Command {
    /// One argument.
    pub fn arg(mut self, a: impl AsRef<OsStr>) -> Self {
        self.args.push(a.as_ref().to_owned());
        self
    }
    /// Several arguments.
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, a: I) -> Self {
        self.args.extend(a.into_iter().map(|s| s.as_ref().to_owned()));
        self
    }
    /// A variable; the environment is otherwise `PATH`, `LC_ALL=C.UTF-8` and nothing else.
    pub fn env(mut self, k: &'static str, v: impl AsRef<OsStr>) -> Self {
        self.env.push((k, v.as_ref().to_owned()));
        self
    }
    /// Killed after this time (default 30 s).
    pub fn timeout(mut self, t: Duration) -> Self {
        self.timeout = t;
        self
    }
    /// Bytes kept of each output stream (default 1 MiB); more is read and dropped.
    pub fn output_cap(mut self, n: usize) -> Self {
        self.output_cap = n;
        self
    }
    /// Text for its standard input (default: `/dev/null`).
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }
    /// A descriptor as its standard input.
    pub fn stdin_fd(mut self, fd: OwnedFd) -> Self {
        self.stdin_fd = Some(fd);
        self
    }
    /// A descriptor as its standard output.
    pub fn stdout_fd(mut self, fd: OwnedFd) -> Self {
        self.stdout_fd = Some(fd);
        self
    }
    /// Working directory (default `/`).
    pub fn cwd(mut self, d: impl Into<PathBuf>) -> Self {
        self.cwd = d.into();
        self
    }

    fn describe(&self) -> String {
        let mut s = self.program.name().to_owned();
        for a in &self.args {
            s.push(' ');
            s.push_str(&a.to_string_lossy());
        }
        s
    }

    /// Runs it and answers whatever it exits with.
    ///
    /// # Errors
    /// Unsupported when the program is missing, timeout when it had to be killed, internal when it could not be started.
    pub async fn output(mut self) -> Result<Output> {
        let what = self.describe();
        let path = self.program.path()?;
        let mut cmd = tokio::process::Command::new(path);
        cmd.args(&self.args)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C.UTF-8")
            .envs(self.env.iter().map(|(k, v)| (k, v)))
            .current_dir(&self.cwd)
            .kill_on_drop(true)
            .stderr(Stdio::piped())
            .stdout(match self.stdout_fd.take() {
                Some(fd) => Stdio::from(fd),
                None => Stdio::piped(),
            })
            .stdin(match (self.stdin_fd.take(), &self.stdin) {
                (Some(fd), _) => Stdio::from(fd),
                (None, Some(_)) => Stdio::piped(),
                (None, None) => Stdio::null(),
            });
        let started = std::time::Instant::now();
        let mut child = cmd.spawn().map_err(|e| {
            Error::internal(format!("{} could not be started", self.program.name()), e).with_context(&what)
        })?;
        drop(cmd); // closes our copies of the descriptors it was given
        let input = self.stdin.take().zip(child.stdin.take());
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let cap = self.output_cap;
        let work = async {
            let feed = async {
                if let Some((bytes, mut pipe)) = input {
                    // A program that does not read its input is its own matter; the exit code tells.
                    let _ = pipe.write_all(&bytes).await;
                }
            };
            let (_, out, err, status) =
                tokio::join!(feed, read_capped(stdout, cap), read_capped(stderr, cap), child.wait());
            status.map(|s| (s, out, err))
        };
        match tokio::time::timeout(self.timeout, work).await {
            Ok(Ok((status, stdout, stderr))) => {
                use std::os::unix::process::ExitStatusExt;
                let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
                tracing::debug!(argv = %what, code, ms = started.elapsed().as_millis() as u64, "ran");
                Ok(Output { code, stdout, stderr })
            }
            Ok(Err(e)) => Err(Error::internal(format!("{} could not be waited for", self.program.name()), e)
                .with_context(what)),
            Err(_) => {
                let _ = child.kill().await;
                Err(Error::timeout(format!("{} did not end within {:?}", self.program.name(), self.timeout))
                    .with_context(what))
            }
        }
    }

    /// Runs it and answers its standard output; any other exit code than 0 is an error with stderr as context.
    ///
    /// # Errors
    /// As [`Command::output`], and internal for a failure exit.
    pub async fn ok(self) -> Result<Vec<u8>> {
        let (what, program) = (self.describe(), self.program);
        let out = self.output().await?;
        if out.code == 0 {
            return Ok(out.stdout);
        }
        let stderr = String::from_utf8_lossy(&out.stderr);
        Err(Error::internal(
            format!("{} failed", program.name()),
            format!("{what}: exit code {}: {}", out.code, stderr.trim()),
        ))
    }
}

async fn read_capped(source: Option<impl AsyncRead + Unpin>, cap: usize) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(mut source) = source else { return kept };
    let mut buffer = [0u8; 8192];
    while let Ok(n @ 1..) = source.read(&mut buffer).await {
        let room = cap.saturating_sub(kept.len()).min(n);
        kept.extend_from_slice(&buffer[..room]);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn argv_reaches_the_program_unsplit_and_errors_carry_it() {
        let out = run(Program::Ip).args(["-V"]).output().await.unwrap();
        assert_eq!(out.code, 0);
        let e = run(Program::Ip).args(["link", "show", "no such; link"]).ok().await.unwrap_err();
        let context = e.context.unwrap();
        assert!(context.contains("ip link show no such; link") && context.contains("exit code"), "{context}");
        assert!(!e.message.contains("no such"), "argv is private context");
    }

    #[tokio::test]
    async fn a_program_that_hangs_is_killed() {
        let e =
            run(Program::Ip).args(["monitor"]).timeout(Duration::from_millis(50)).output().await.unwrap_err();
        assert!(e.is(karst_model::ErrorKind::Timeout));
    }

    #[test]
    fn the_missing_package_is_named() {
        let e = Program::Keeper.path();
        if let Err(e) = e {
            assert!(e.message.contains("install"));
        }
        assert_eq!(Program::LxcStart.package(), "lxc");
        // What came with QEMU 7.2 is another program of the same name.
        assert!(Program::Virtiofsd.places().iter().all(|place| !place.contains("qemu")));
        assert!(Program::Virtiofsd.places().contains(&"/usr/libexec"));
    }
}
