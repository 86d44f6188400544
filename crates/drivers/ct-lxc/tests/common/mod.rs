//! A place for one test: a root file system of its own, a bridge of a unique name, a driver; all removed at the end.
#![allow(clippy::disallowed_methods)] // tests live in the real world
#![allow(dead_code)] // each test binary uses its part

use karst_ct_lxc::{LxcDriver, LxcOptions};
use karst_guest::{
    DiskFormat, ExecRequest, GuestDriver, IdRange, ResolvedDisk, ResolvedGuest, ResolvedNic, StopMode,
    contract::{Ran, collect},
    samples,
};
use karst_model::{
    InstanceId,
    instance::{Generation, InstanceKind},
};
use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

fn run(program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).output().unwrap();
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn target() -> PathBuf {
    // target/debug/deps/NAME
    std::env::current_exe().unwrap().ancestors().nth(3).unwrap().to_owned()
}

/// The cached root file system, or why there is none.
fn image() -> Result<&'static Path, String> {
    static IMAGE: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let made = IMAGE.get_or_init(|| {
        if !rustix::process::geteuid().is_root() {
            return Err("not root".into());
        }
        for tool in ["lxc-start", "mmdebstrap"] {
            if !Path::new("/usr/bin").join(tool).exists() {
                return Err(format!("{tool} is not installed"));
            }
        }
        run(env!("CARGO"), &["build", "-q", "-p", "karst-keeper"]);
        if let Some(path) = std::env::var_os("KARST_TEST_ROOTFS") {
            return Ok(path.into());
        }
        let include = "systemd-sysv,dbus,iproute2,ifupdown,isc-dhcp-client";
        let cache = target().join("test-cache");
        std::fs::create_dir_all(&cache).unwrap();
        let image = cache.join(format!("bookworm-minbase-{}", include.replace(',', "-")));
        // One of the test processes makes it, the others wait.
        let lock = std::fs::File::create(cache.join("lock")).unwrap();
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
        if !image.exists() {
            let making = cache.join("making");
            let _ = std::fs::remove_dir_all(&making);
            let include = format!("--include={include}");
            run("mmdebstrap", &["--variant=minbase", &include, "bookworm", making.to_str().unwrap()]);
            std::fs::rename(&making, &image).unwrap();
        }
        Ok(image)
    });
    made.as_deref().map_err(Clone::clone)
}

/// One test's place.
pub struct Place {
    pub dir: tempfile::TempDir,
    pub daemon_id: String,
    pub bridge: String,
    pub guests: PathBuf,
}

impl Place {
    /// `None`, with the reason printed, where the test cannot run.
    pub fn new() -> Option<Self> {
        if let Err(reason) = image() {
            super::backends::missing(&reason);
            return None;
        }
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let daemon_id = format!("t{:x}{n:x}", std::process::id());
        let bridge = format!("kt{:x}{n:x}", std::process::id());
        run("ip", &["link", "add", &bridge, "type", "bridge"]);
        run("ip", &["link", "set", &bridge, "up"]);
        let base = target().join("test-cache");
        std::fs::create_dir_all(&base).unwrap();
        // Beside the image: on the same file system, which can be id-mapped.
        let dir = tempfile::Builder::new().prefix("ct-").tempdir_in(base).unwrap();
        let guests = dir.path().join("guests");
        std::fs::create_dir(&guests).unwrap();
        for d in [dir.path(), &guests] {
            use std::os::unix::fs::PermissionsExt;
            std::fs::set_permissions(d, std::fs::Permissions::from_mode(0o711)).unwrap();
        }
        Some(Self { dir, daemon_id, bridge, guests })
    }

    pub fn options(&self) -> LxcOptions {
        LxcOptions { daemon_id: self.daemon_id.clone(), guests_dir: self.guests.clone() }
    }

    pub fn driver(&self) -> LxcDriver {
        LxcDriver::new(self.options()).unwrap()
    }

    /// A guest with a root file system of its own.
    pub fn guest(&self, n: u32) -> ResolvedGuest {
        let root = self.dir.path().join(format!("root-{n}"));
        run("cp", &["-a", image().unwrap().to_str().unwrap(), root.to_str().unwrap()]);
        // Of the image's recipe, as Karst's own will do it.
        let interfaces = "auto lo\niface lo inet loopback\nauto eth0\niface eth0 inet manual\n";
        std::fs::write(root.join("etc/network/interfaces"), interfaces).unwrap();
        let mut guest = bare_guest(&self.daemon_id, &self.guests, n);
        std::fs::create_dir(&guest.state_dir).unwrap();
        guest.root.path = root;
        guest.nics[0].link = karst_guest::ResolvedLink::Bridge(self.bridge.clone());
        guest
    }

    /// Nothing of this daemon is left outside its directory. What ended by itself is cleared up a moment after it was told.
    pub fn assert_clean(&self) {
        let end = std::time::Instant::now() + Duration::from_secs(120);
        loop {
            let left = self.left();
            if left.is_empty() {
                return;
            }
            assert!(std::time::Instant::now() < end, "{left:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn left(&self) -> Vec<String> {
        let links = std::fs::read_dir("/sys/class/net").unwrap();
        let mine = format!("v{}", self.daemon_id);
        let mut left: Vec<_> = links
            .map(|l| l.unwrap().file_name().into_string().unwrap())
            .filter(|l| l.starts_with(&mine))
            .collect();
        let cgroups = karst_host::cgroup::Cgroups::detect().unwrap();
        for dir in cgroups.dirs(&format!("karst-{}", self.daemon_id)) {
            // An entry may go between being listed and being looked at.
            for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
                let name = entry.file_name().into_string().unwrap();
                if entry.file_type().is_ok_and(|t| t.is_dir()) && name != "pivot" {
                    left.push(format!("{}/{name}", dir.display()));
                }
            }
        }
        left
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let (guests, options, id) = (self.guests.clone(), self.options(), self.daemon_id.clone());
        let place = guests.clone();
        // Drop may run inside a runtime: this has one of its own.
        let cleared = std::thread::spawn(move || {
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
                let driver: Arc<dyn GuestDriver> = Arc::new(LxcDriver::new(options).unwrap());
                for entry in std::fs::read_dir(guests).unwrap().flatten() {
                    if let Ok(id) = entry.file_name().to_string_lossy().parse() {
                        let _ = driver.stop(id, StopMode::Force).await;
                        let _ = driver.destroy(id).await;
                    }
                }
                let cgroups = karst_host::cgroup::Cgroups::detect().unwrap();
                let _ = cgroups.remove(&format!("karst-{id}")).await;
                let _ = karst_ct_lxc::locks::leave(&place);
            })
        });
        let _ = cleared.join();
        let _ = Command::new("ip").args(["link", "delete", &self.bridge]).output();
    }
}

/// Waits for a condition, at most 20 s.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = std::time::Instant::now() + Duration::from_secs(120);
    while !condition() {
        assert!(std::time::Instant::now() < end, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A guest without root file system and bridge.
pub fn bare_guest(daemon_id: &str, guests: &Path, n: u32) -> ResolvedGuest {
    let instance = InstanceId::from(uuid::Uuid::new_v4());
    let nic = samples::nic(&format!("00:16:3e:00:00:{n:02x}"), &format!("v{daemon_id}{n}"), "");
    ResolvedGuest {
        instance,
        generation: Generation { incarnation: 1, n: 1 },
        spec_version: 5,
        domain_id: 40 + n,
        daemon_id: daemon_id.to_owned(),
        hostname: format!("c{n}"),
        state_dir: guests.join(instance.to_string()),
        ids: IdRange { base: 1_000_000 + n * 65_536, count: 65_536 },
        nics: vec![ResolvedNic { mtu: Some(1400), ..nic }],
        environment: [("FROM_CONFIG".to_owned(), "yes".to_owned())].into(),
        ..samples::guest(InstanceKind::Container, bare_disk("root"))
    }
}

/// A directory without a path.
pub fn bare_disk(name: &str) -> ResolvedDisk {
    samples::disk(name, "scsi0", "", DiskFormat::Directory)
}

/// Runs a script inside.
pub async fn shell(driver: &dyn GuestDriver, guest: &ResolvedGuest, script: &str) -> Ran {
    let r = ExecRequest {
        command: vec!["sh".into(), "-c".into(), script.into()],
        environment: Default::default(),
        uid: 0,
        gid: 0,
        cwd: None,
        terminal: None,
        term: None,
    };
    collect(driver.exec(guest.instance, r).await.unwrap(), b"").await
}

/// What a script prints that must succeed.
pub async fn inside(driver: &dyn GuestDriver, guest: &ResolvedGuest, script: &str) -> String {
    let ran = shell(driver, guest, script).await;
    assert_eq!(ran.code, 0, "{script}: {ran:?}");
    ran.stdout.trim().to_owned()
}
