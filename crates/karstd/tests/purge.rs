//! `karstd purge` of a daemon that does not follow: each of its processes stopped, so that it hears no request to end; and of a
//! DIR that is a mount point.
#![allow(clippy::disallowed_methods)] // real processes, real time

#[path = "../../testkit/src/backends.rs"]
mod backends;

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

const LONG: Duration = Duration::from_secs(120);
/// An existing user of every Debian without processes that matter here.
const USER: &str = "nobody";

fn karstd(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_karstd"));
    command.arg("--dir").arg(dir).stdin(Stdio::null());
    command
}

fn purge(dir: &Path) -> Output {
    karstd(dir).args(["purge", "--grace", "1"]).output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

struct Daemon {
    child: Child,
    dir: PathBuf,
    base: tempfile::TempDir,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if self.dir.exists() {
            let _ = purge(&self.dir);
        }
        let _ = Command::new("umount").arg("-l").arg(&self.dir).stderr(Stdio::null()).status();
    }
}

impl Daemon {
    /// `None`, said aloud, without root.
    fn start(mounted: bool) -> Option<Self> {
        if !backends::root() {
            return None;
        }
        let base = tempfile::Builder::new().prefix("karstd-").tempdir().unwrap();
        // The control process passes through it.
        fs::set_permissions(base.path(), PermissionsExt::from_mode(0o711)).unwrap();
        let dir = base.path().join("k");
        if mounted {
            fs::create_dir(&dir).unwrap();
            let mount = ["-t", "tmpfs", "-o", "mode=0711", "none"];
            assert!(Command::new("mount").args(mount).arg(&dir).status().unwrap().success());
        }
        let child = karstd(&dir).args(["--user", USER]).stderr(Stdio::null()).spawn().unwrap();
        let daemon = Self { child, dir, base };
        let end = Instant::now() + LONG;
        while daemon.pid("host").is_none() || daemon.pid("control").is_none() {
            assert!(Instant::now() < end, "the daemons do not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        Some(daemon)
    }

    fn pid(&self, role: &str) -> Option<i32> {
        if role == "launcher" {
            return Some(self.child.id() as i32);
        }
        let record: serde_json::Value =
            serde_json::from_slice(&fs::read(self.dir.join("run/daemons.json")).ok()?).ok()?;
        Some(record["daemons"][role]["pid"].as_u64()? as i32)
    }
}

fn hangs(role: &str) {
    let Some(mut daemon) = Daemon::start(false) else { return };
    let pid = daemon.pid(role).unwrap();
    // SAFETY: a process of this test.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGSTOP) }, 0);
    let purged = purge(&daemon.dir);
    assert!(purged.status.success(), "{}", text(&purged));
    assert!(text(&purged).contains("killing it"), "{}", text(&purged));
    assert!(!daemon.dir.exists());
    assert_eq!(daemon.child.wait().unwrap().signal(), Some(libc::SIGKILL));
}

#[test]
fn a_launcher_that_hangs_is_killed() {
    hangs("launcher");
}

#[test]
fn a_launcher_that_waits_for_a_hanging_control_is_killed_with_it() {
    hangs("control");
}

#[test]
fn a_dir_that_is_a_mount_point_is_emptied_and_stays() {
    let Some(daemon) = Daemon::start(true) else { return };
    let below = daemon.dir.join("disk");
    fs::create_dir(&below).unwrap();
    assert!(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&below).status().unwrap().success());
    fs::write(below.join("somebodys"), "").unwrap();
    let refused = purge(&daemon.dir);
    let kept = below.join("somebodys").exists() && daemon.dir.join("id").exists();
    assert!(Command::new("umount").arg(&below).status().unwrap().success());
    assert!(!refused.status.success() && kept, "{}", text(&refused));
    assert!(text(&refused).contains(below.to_str().unwrap()), "{}", text(&refused));

    let purged = purge(&daemon.dir);
    assert!(purged.status.success(), "{}", text(&purged));
    assert!(text(&purged).contains("the directory itself stays"), "{}", text(&purged));
    assert_eq!(fs::read_dir(&daemon.dir).unwrap().count(), 0);
    assert!(Command::new("umount").arg(&daemon.dir).status().unwrap().success());
    fs::remove_dir(&daemon.dir).unwrap();
    assert_eq!(fs::read_dir(daemon.base.path()).unwrap().count(), 0);
}
