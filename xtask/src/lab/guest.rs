//! One lab guest: its QEMU, its disk, and the ssh connection over QEMU's user network that commands go through.

use super::{
    Result, Up,
    image::{ensure, tail},
    lab_dir, mkdir, output, target, volatile, wait_for,
};
use crate::root;
use std::{
    fs, io,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

/// Programs of ours that go into every guest.
const PROGRAMS: &[&str] = &["karst", "karstd", "karst-keeper", "karst-guest-agent"];

/// How long a boot may take under emulation on a busy machine.
const BOOT: Duration = Duration::from_secs(420);

/// A guest, there or not.
pub struct Guest {
    name: String,
    dir: PathBuf,
}

/// The images that overlays stand on.
pub fn images_in_use() -> Vec<PathBuf> {
    let entries = fs::read_dir(lab_dir().join("run")).into_iter().flatten().flatten();
    entries.filter_map(|e| Some(PathBuf::from(fs::read_to_string(e.path().join("image")).ok()?))).collect()
}

/// Prints what there is.
pub fn list() -> Result<()> {
    for entry in fs::read_dir(lab_dir().join("run")).into_iter().flatten().flatten() {
        let guest = Guest::named(&entry.file_name().to_string_lossy())?;
        let state =
            guest.process().map_or("off".to_owned(), |p| format!("process {p}, port {}", guest.port()));
        let image = fs::read_to_string(guest.dir.join("image")).unwrap_or_default();
        let image = Path::new(&image).file_name().unwrap_or_default().display().to_string();
        println!("{}\t{state}\t{image}", guest.name);
    }
    Ok(())
}

impl Guest {
    /// By name.
    pub fn named(name: &str) -> Result<Guest> {
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
            return Err(format!("{name:?}: a guest's name is letters, digits and dashes"));
        }
        Ok(Guest { name: name.to_owned(), dir: lab_dir().join("run").join(name) })
    }

    fn file(&self, name: &str) -> String {
        fs::read_to_string(self.dir.join(name)).unwrap_or_default().trim().to_owned()
    }

    fn port(&self) -> String {
        self.file("port")
    }

    /// Its QEMU, when that runs: a process of this number whose command line names this guest's directory.
    fn process(&self) -> Option<u32> {
        let id: u32 = self.file("pid").parse().ok()?;
        let line = fs::read(format!("/proc/{id}/cmdline")).ok()?;
        let mark = self.dir.join("console.log");
        String::from_utf8_lossy(&line).contains(&*mark.to_string_lossy()).then_some(id)
    }

    /// Boots it and waits until it takes commands.
    pub fn up(&self, up: &Up) -> Result<()> {
        if let Some(id) = self.process() {
            return Err(format!("{} runs already (process {id})", self.name));
        }
        let image = match self.file("image") {
            kept if !kept.is_empty() => PathBuf::from(kept),
            _ => {
                let image = ensure(&up.variant)?;
                mkdir(&self.dir)?;
                fs::write(self.dir.join("image"), image.display().to_string()).map_err(|e| e.to_string())?;
                image
            }
        };
        if !self.dir.join("disk.qcow2").exists() && !volatile::is(&self.dir) {
            let base = image.join("disk.qcow2").display().to_string();
            self.payload(up)?;
            for (n, gib) in up.disks.iter().enumerate() {
                output("truncate", &["-s", &format!("{gib}G"), &format!("extra{n}.raw")], &self.dir)?;
            }
            if up.volatile {
                volatile::make(&self.dir, Path::new(&base))?;
            } else {
                output(
                    "qemu-img",
                    &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", "disk.qcow2"],
                    &self.dir,
                )?;
            }
        }
        // The port is free now, which another may take until QEMU does: then once more.
        for _ in 0..3 {
            self.boot(&image, up)?;
            if wait_for(Duration::from_secs(10), || self.process().is_some() || self.refused())
                && !self.refused()
            {
                break;
            }
        }
        let ready = wait_for(BOOT, || {
            self.process().is_none()
                || self.ssh(20, true).args(["systemctl", "is-system-running", "--wait"]).status().is_ok_and(
                    |s| {
                        // Degraded or not: it has started what it starts. 255 is ssh's own failure.
                        !matches!(s.code(), None | Some(255 | 124))
                    },
                )
        });
        if !ready || self.process().is_none() {
            let text = format!(
                "the guest does not take commands:\n{}\n{}",
                tail(&self.dir.join("qemu.log"), 5),
                tail(&self.dir.join("console.log"), 20)
            );
            self.end()?;
            return Err(text);
        }
        Ok(())
    }

    fn refused(&self) -> bool {
        self.file("qemu.log").contains("Could not set up host forwarding rule")
    }

    fn boot(&self, image: &Path, up: &Up) -> Result<()> {
        let free =
            TcpListener::bind(("127.0.0.1", 0)).and_then(|l| l.local_addr()).map_err(|e| e.to_string())?;
        let port = free.port();
        fs::write(self.dir.join("port"), port.to_string()).map_err(|e| e.to_string())?;
        let _ = fs::remove_file(self.dir.join("pid")); // of the boot before, if there was one
        let at = |name: &str| self.dir.join(name).display().to_string();
        let (mut root, mut drives) = (vec![], vec![]);
        if volatile::is(&self.dir) {
            root = volatile::begin(&self.dir)?;
        } else {
            let disk = at("disk.qcow2");
            drives.push(format!("file={disk},if=virtio,format=qcow2,cache=unsafe,discard=unmap"));
        }
        drives.push(format!("file={},if=virtio,format=raw,cache=unsafe,readonly=on", at("payload.raw")));
        drives.extend(
            (0..16)
                .map(|n| at(&format!("extra{n}.raw")))
                .filter(|f| Path::new(f).exists())
                .map(|f| format!("file={f},if=virtio,format=raw,cache=unsafe,discard=unmap")),
        );
        let log = fs::File::create(self.dir.join("qemu.log")).map_err(|e| e.to_string())?;
        let errors = log.try_clone().map_err(|e| e.to_string())?;
        let mut command = Command::new("setsid");
        command
            .args(["--fork", "timeout", "-k", "5", &up.limit.to_string(), "qemu-system-x86_64"])
            .args(["-name", &format!("karst-lab-{}", self.name), "-nodefaults", "-no-user-config"])
            .args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max"])
            .args(["-smp", &up.cpus.to_string(), "-m", &up.memory.to_string()])
            .args(["-display", "none", "-serial", &format!("file:{}", at("console.log"))])
            .args(["-pidfile", &at("pid"), "-rtc", "base=utc"])
            .arg("-kernel")
            .arg(image.join("vmlinuz"))
            .arg("-initrd")
            .arg(image.join("initrd.img"))
            .args(["-append", "root=/dev/vda rw console=ttyS0 net.ifnames=0 panic=-1 apparmor=1 security=apparmor mitigations=off"])
            .args(["-netdev", &format!("user,id=net,hostfwd=tcp:127.0.0.1:{port}-:22")])
            .args(["-device", "virtio-net-pci,netdev=net,romfile="])
            .args(["-device", "virtio-rng-pci"])
            .args(root);
        for drive in &drives {
            command.args(["-drive", drive]);
        }
        command.stdin(Stdio::null()).stdout(log).stderr(errors);
        let status = command.status().map_err(|e| format!("setsid: {e}"))?;
        if status.success() { Ok(()) } else { Err(format!("QEMU could not be started: {status}")) }
    }

    /// The file system with our programs, the repository, and what was asked for: `/lab` in the guest.
    fn payload(&self, up: &Up) -> Result<()> {
        let stage = self.dir.join("stage");
        let _ = fs::remove_dir_all(&stage); // of an interrupted start
        for dir in ["bin", "src", "tests", "files"] {
            mkdir(&stage.join(dir))?;
        }
        let programs = std::env::var_os("KARST_BIN").map_or_else(|| target().join("debug"), PathBuf::from);
        for program in PROGRAMS {
            let from = programs.join(program);
            if !from.exists() {
                return Err(format!(
                    "{} is missing: cargo build --bins and scripts/build-guest-agent, or say KARST_BIN",
                    from.display()
                ));
            }
            strip(&from, &stage.join("bin").join(program))?;
        }
        for krate in &up.tests {
            for (name, from) in test_programs(krate)? {
                strip(&from, &stage.join("tests").join(format!("{krate}-{name}")))?;
            }
        }
        let src = stage.join("src").display().to_string();
        let copy = "git ls-files -z --cached --others --exclude-standard | \
                    tar -c --null --ignore-failed-read -T - | tar -x -C \"$1\"";
        output("sh", &["-c", copy, "sh", &src], &root())?;
        for file in &up.files {
            let from = fs::canonicalize(file).map_err(|e| format!("{}: {e}", file.display()))?;
            output("cp", &["-a", &from.display().to_string(), "files/"], &stage)?;
        }
        let used = output("du", &["-sm", "."], &stage)?;
        let mib: u64 = used.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(1024);
        let size = format!("{}M", mib + mib / 8 + 64);
        output(
            "mke2fs",
            &["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d", "stage", "payload.raw", &size],
            &self.dir,
        )?;
        fs::remove_dir_all(&stage).map_err(|e| e.to_string())
    }

    /// An ssh to the guest, ready for the words of a command; given up after so many seconds.
    fn ssh(&self, seconds: u64, quiet: bool) -> Command {
        let image = PathBuf::from(self.file("image"));
        let mut command = Command::new("timeout");
        command
            .current_dir(&self.dir)
            .args(["--foreground", "-k", "5", &seconds.to_string(), "ssh", "-F", "none", "-q"])
            .arg("-i")
            .arg(image.join("key"))
            .args(["-p", &self.port(), "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes"])
            .args(["-o", "HostKeyAlias=lab", "-o", "StrictHostKeyChecking=yes"])
            .arg("-o")
            .arg(format!("UserKnownHostsFile={}", image.join("known_hosts").display()))
            .args(["-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=12"])
            // One connection for all commands: a handshake under emulation takes a second.
            .args(["-o", "ControlMaster=auto", "-o", "ControlPath=./ssh", "-o", "ControlPersist=600"])
            .args(["root@127.0.0.1", "--"]);
        if quiet {
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        }
        command
    }

    /// Runs a command with our streams; its exit code.
    pub fn run(&self, words: &[String], seconds: u64) -> Result<u8> {
        self.demand()?;
        let line: Vec<_> = words.iter().map(|w| quote(w)).collect();
        let status =
            self.ssh(seconds, false).arg(line.join(" ")).status().map_err(|e| format!("ssh: {e}"))?;
        Ok(u8::try_from(status.code().unwrap_or(255)).unwrap_or(255))
    }

    fn demand(&self) -> Result<()> {
        if self.process().is_none() {
            return Err(format!("the guest {} does not run: cargo xtask lab up", self.name));
        }
        Ok(())
    }

    /// Copies files into a directory of it.
    pub fn put(&self, files: &[PathBuf], to: &str) -> Result<()> {
        self.demand()?;
        for file in files {
            let from = fs::canonicalize(file).map_err(|e| format!("{}: {e}", file.display()))?;
            let (dir, name) = (from.parent().unwrap_or(Path::new("/")), from.file_name().unwrap_or_default());
            let mut tar = Command::new("tar")
                .arg("-C")
                .arg(dir)
                .arg("-c")
                .arg(name)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()
                .map_err(|e| format!("tar: {e}"))?;
            let bytes = tar.stdout.take().ok_or("tar has no output")?;
            let line = format!("mkdir -p {0} && tar -C {0} -x --no-same-owner", quote(to));
            let put =
                self.ssh(600, false).stdin(bytes).arg(line).status().map_err(|e| format!("ssh: {e}"))?;
            let packed = tar.wait().map_err(|e| e.to_string())?;
            if !put.success() || !packed.success() {
                return Err(format!("{} could not be copied", file.display()));
            }
        }
        Ok(())
    }

    /// Waits for another boot than `id`.
    pub fn await_reboot(&self, id: &str, seconds: u64) -> Result<()> {
        let again = wait_for(Duration::from_secs(seconds), || {
            // The connection of the boot before is dead, which ssh does not know.
            let script = "cat /proc/sys/kernel/random/boot_id";
            let out = self.ssh(20, false).stdin(Stdio::null()).stderr(Stdio::null()).arg(script).output();
            let now = out.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default();
            let other = now.len() == id.len() && now != id;
            if !other {
                self.hang_up();
            }
            other
        });
        if again { Ok(()) } else { Err("the guest did not come back".into()) }
    }

    /// Ends the connection that commands share.
    fn hang_up(&self) {
        if self.dir.join("ssh").exists() {
            let _ = Command::new("timeout") // none there is fine
                .current_dir(&self.dir)
                .args(["5", "ssh", "-q", "-F", "none", "-o", "ControlPath=./ssh", "-O", "exit", "lab"])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
            let _ = fs::remove_file(self.dir.join("ssh"));
        }
    }

    /// Ends its QEMU as a power cut would.
    pub fn end(&self) -> Result<()> {
        if self.dir.exists() {
            self.hang_up();
        }
        if let Some(id) = self.process() {
            output("kill", &["-KILL", &id.to_string()], Path::new("/"))?;
            if !wait_for(Duration::from_secs(20), || self.process().is_none()) {
                return Err(format!("QEMU (process {id}) does not end"));
            }
        }
        volatile::settle(&self.dir)
    }

    /// Ends it and removes what it had.
    pub fn remove(&self) -> Result<()> {
        self.end()?;
        match fs::remove_dir_all(&self.dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(format!("{}: {e}", self.dir.display())),
            _ => Ok(()),
        }
    }

    /// What the console printed.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.dir.join("console.log")).unwrap_or_default()).into_owned()
    }
}

/// A word for the guest's shell.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=@%+,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

/// A copy without what debuggers want: a fifth of the size.
fn strip(from: &Path, to: &Path) -> Result<()> {
    output(
        "objcopy",
        &["--strip-debug", &from.display().to_string(), &to.display().to_string()],
        Path::new("/"),
    )?;
    Ok(())
}

/// Names and places of a crate's test programs, built.
fn test_programs(krate: &str) -> Result<Vec<(String, PathBuf)>> {
    let out = Command::new(env!("CARGO"))
        .args(["test", "--no-run", "--quiet", "--message-format=json", "-p", krate])
        .current_dir(root())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|e| format!("cargo: {e}"))?;
    if !out.status.success() {
        return Err(format!("the tests of {krate} do not build"));
    }
    let text = String::from_utf8_lossy(&out.stdout);
    let messages = text.lines().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok());
    Ok(messages
        .filter(|m| m["profile"]["test"] == true)
        .filter_map(|m| {
            Some((m["target"]["name"].as_str()?.to_owned(), PathBuf::from(m["executable"].as_str()?)))
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_guests_shell_as_they_are() {
        let words = ["a b", "it's", "", "$(x)", "plain-1.2", "two\nlines", "*", "a'b'"];
        let line = words.map(quote).join(" ");
        let out = output("sh", &["-c", &format!("printf '<%s>' {line}")], Path::new("/")).unwrap();
        assert_eq!(out, words.map(|w| format!("<{w}>")).concat());
    }

    #[test]
    fn a_name_is_no_path() {
        for bad in ["", "../x", "a/b", "a b"] {
            assert!(Guest::named(bad).is_err(), "{bad}");
        }
    }
}
