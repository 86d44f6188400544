//! A place for one test: a disk of its own, a bridge of a unique name, a driver; all removed at the end.
#![allow(dead_code)] // each test binary uses its part
#![allow(clippy::disallowed_methods)] // deals with the real world

pub mod console;

use karst_guest::{
    DiskFormat, GuestDriver, IdRange, ResolvedDisk, ResolvedGuest, ResolvedNic, StopMode, samples,
};
use karst_model::{
    ByteSize, InstanceId,
    instance::{Generation, InstanceKind},
    spec::{CloudInit, CpuLimit, Limits},
};
use karst_vm_qemu::{QemuDriver, QemuOptions};
use std::{
    os::unix::fs::{FileExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
};

/// Runs a program that must succeed.
pub fn run(program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).output().unwrap();
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn target() -> PathBuf {
    // target/debug/deps/NAME
    std::env::current_exe().unwrap().ancestors().nth(3).unwrap().to_owned()
}

const SIZE_MIB: u64 = 1200;

/// Root file system to bootable disk: MBR with GRUB behind it and one ext4 partition, made without mounting anything.
fn make_disk(root: &Path, disk: &Path) {
    let boot = |prefix: &str| {
        let entries = std::fs::read_dir(root.join("boot")).unwrap();
        let mut names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
        names.find(|n| n.starts_with(prefix)).unwrap()
    };
    let grub = root.join("boot/grub");
    std::fs::create_dir_all(&grub).unwrap();
    let config = format!(
        "linux /boot/{} root=/dev/vda1 rw console=ttyS0\ninitrd /boot/{}\nboot\n",
        boot("vmlinuz-"),
        boot("initrd.img-")
    );
    std::fs::write(grub.join("grub.cfg"), config).unwrap();
    let part = disk.with_extension("part");
    let core = disk.with_extension("core");
    let _ = std::fs::remove_file(&part);
    // Features that GRUB 2.06 does not read are left out.
    let features = "^metadata_csum_seed,^orphan_file";
    let (size, offset) = (format!("{SIZE_MIB}M"), "offset=1048576".to_owned());
    let file = std::fs::File::create(disk).unwrap();
    file.set_len((SIZE_MIB + 1) << 20).unwrap();
    run(
        "mke2fs",
        &[
            "-q",
            "-F",
            "-t",
            "ext4",
            "-O",
            features,
            "-E",
            &offset,
            "-d",
            root.to_str().unwrap(),
            disk.to_str().unwrap(),
            &size,
        ],
    );
    run(
        "grub-mkimage",
        &[
            "-O",
            "i386-pc",
            "-p",
            "(hd0,msdos1)/boot/grub",
            "-o",
            core.to_str().unwrap(),
            "biosdisk",
            "part_msdos",
            "ext2",
            "linux",
            "normal",
            "configfile",
            "boot",
        ],
    );
    let mut mbr = std::fs::read("/usr/lib/grub/i386-pc/boot.img").unwrap();
    mbr[446..510].fill(0);
    mbr[446] = 0x80;
    mbr[450] = 0x83;
    mbr[454..458].copy_from_slice(&2048u32.to_le_bytes());
    mbr[458..462].copy_from_slice(&((SIZE_MIB as u32) * 2048).to_le_bytes());
    mbr[510..512].copy_from_slice(&[0x55, 0xaa]);
    let file = std::fs::File::options().write(true).open(disk).unwrap();
    file.write_all_at(&mbr, 0).unwrap();
    file.write_all_at(&std::fs::read(&core).unwrap(), 512).unwrap();
    let _ = std::fs::remove_file(core);
}

/// What the system inside brings to be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inside {
    /// What images of our recipes have; the kernel has no 9p.
    Karst,
    /// The QEMU guest agent alone.
    Qemu,
    /// What images made for Incus have: a unit that copies `incus-agent` from the share `config`. A kernel with 9p.
    Incus,
}

impl Inside {
    fn name(self) -> &'static str {
        match self {
            Self::Karst => "karst",
            Self::Qemu => "qemu",
            Self::Incus => "incus",
        }
    }

    fn packages(self) -> &'static str {
        match self {
            Self::Karst => "linux-image-cloud-amd64",
            Self::Qemu => "linux-image-cloud-amd64,qemu-guest-agent",
            Self::Incus => "linux-image-amd64",
        }
    }

    /// Run with the root as `$1`.
    fn hook(self, top: &Path) -> String {
        match self {
            Self::Karst => format!(
                "mkdir -p \"$1/usr/lib/karst-agent\"
install -m 0755 {0}/karst-agent-setup \"$1/usr/lib/karst-agent/setup\"
install -m 0644 {0}/karst-agent.service \"$1/etc/systemd/system/\"
install -m 0644 {0}/99-karst-agent.rules \"$1/etc/udev/rules.d/\"",
                top.join("crates/guest-agent/delivery").display()
            ),
            Self::Qemu => "true".into(),
            Self::Incus => {
                let script = top.join("crates/drivers/vm-qemu/tests/common/incus-loader.sh");
                format!("sh {} \"$1\"", script.display())
            }
        }
    }
}

/// The cached disk, or why there is none.
fn disk(inside: Inside) -> Result<PathBuf, String> {
    if !rustix::process::geteuid().is_root() {
        return Err("not root".into());
    }
    for file in [
        "/usr/bin/qemu-system-x86_64",
        "/usr/bin/mmdebstrap",
        "/usr/bin/grub-mkimage",
        "/usr/lib/grub/i386-pc/boot.img",
        "/dev/net/tun",
    ] {
        if !Path::new(file).exists() {
            return Err(format!(
                "{file} is missing (packages qemu-system-x86, mmdebstrap, grub-pc-bin, grub-common)"
            ));
        }
    }
    run(env!("CARGO"), &["build", "-q", "-p", "karst-keeper"]);
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(3).unwrap();
    run(
        top.join("scripts/build-guest-agent").to_str().unwrap(),
        &[std::env::current_exe().unwrap().ancestors().nth(2).unwrap().to_str().unwrap()],
    );
    let cache = target().join("test-cache");
    std::fs::create_dir_all(&cache).unwrap();
    // Grows with each change of the recipe.
    let disk = cache.join(format!("vm-bookworm-{}-4.raw", inside.name()));
    let lock = std::fs::File::create(cache.join("vm-lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    if !disk.exists() {
        let root = cache.join("vm-making");
        let _ = std::fs::remove_dir_all(&root);
        let agent = inside.hook(top);
        let packages =
            format!("--include={},initramfs-tools,systemd-sysv,udev,dbus,iproute2", inside.packages());
        let hook = r#"printf 'virtio_pci\nvirtio_blk\next4\n' >> "$1/etc/initramfs-tools/modules"
printf 'MODULES=list\nCOMPRESS=gzip\n' > "$1/etc/initramfs-tools/conf.d/test"
chroot "$1" update-initramfs -u
chroot "$1" passwd -d root
for u in apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer fstrim.timer dpkg-db-backup.timer systemd-timesyncd.service getty@tty1.service e2scrub_reap.service; do
  ln -sf /dev/null "$1/etc/systemd/system/$u"
done
echo test > "$1/etc/hostname"
echo '/dev/vda1 / ext4 rw 0 0' > "$1/etc/fstab""#;
        run(
            "mmdebstrap",
            &[
                "--variant=minbase",
                &packages,
                "--dpkgopt=path-exclude=/usr/share/doc/*",
                "--dpkgopt=path-exclude=/usr/share/man/*",
                "--dpkgopt=path-exclude=/usr/share/locale/*",
                &format!("--customize-hook={agent}"),
                &format!("--customize-hook={hook}"),
                "bookworm",
                root.to_str().unwrap(),
            ],
        );
        let making = cache.join("vm-making.raw");
        make_disk(&root, &making);
        let _ = std::fs::remove_dir_all(&root);
        std::fs::rename(making, &disk).unwrap();
    }
    Ok(disk)
}

/// The cached disk of `small-machine.sh`, or why there is none.
fn small_disk() -> Result<PathBuf, String> {
    if !rustix::process::geteuid().is_root() {
        return Err("not root".into());
    }
    let needed = ["qemu-system-x86_64", "mcopy", "grub-mkimage", "busybox"];
    if let Some(program) = needed.iter().find(|p| !Path::new("/usr/bin").join(p).exists()) {
        return Err(format!("{program} is missing (scripts/install-dependencies test)"));
    }
    run(env!("CARGO"), &["build", "-q", "-p", "karst-keeper"]);
    let cache = target().join("test-cache");
    std::fs::create_dir_all(&cache).unwrap();
    // Grows with each change of the script.
    let disk = cache.join("vm-small-1.raw");
    let lock = std::fs::File::create(cache.join("vm-small-lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    if !disk.exists() {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../tests/small-machine.sh");
        run(script, &["disk", disk.to_str().unwrap()]);
    }
    Ok(disk)
}

/// One test's things.
pub struct Place {
    pub dir: PathBuf,
    pub bridge: String,
    pub daemon: String,
    owner: bool,
}

impl Place {
    /// `None`, having said why, where it cannot be.
    pub fn new(test: &str) -> Option<Self> {
        Self::with(test, Inside::Karst)
    }

    /// The same with another system inside.
    pub fn with(test: &str, inside: Inside) -> Option<Self> {
        Self::on(test, disk(inside))
    }

    /// The same with the small Linux, whose shell is on the console.
    pub fn small(test: &str) -> Option<Self> {
        Self::on(test, small_disk())
    }

    fn on(test: &str, disk: Result<PathBuf, String>) -> Option<Self> {
        let disk = match disk {
            Ok(d) => d,
            Err(why) => {
                super::backends::missing(&why);
                return None;
            }
        };
        let unique = format!("{:05x}{}", std::process::id() & 0xf_ffff, &test[..1]);
        let place = Place {
            dir: target().join(format!("vm-test-{unique}")),
            bridge: format!("ktv{unique}"),
            daemon: format!("tv{unique}"),
            owner: true,
        };
        std::fs::create_dir_all(place.guests()).unwrap();
        // Closed to QEMU's user: it gets by without.
        std::fs::set_permissions(&place.dir, PermissionsExt::from_mode(0o700)).unwrap();
        let copy = place.dir.join("root.raw");
        run("cp", &["--reflink=auto", "--sparse=always", disk.to_str().unwrap(), copy.to_str().unwrap()]);
        std::fs::set_permissions(&copy, PermissionsExt::from_mode(0o600)).unwrap();
        run("ip", &["link", "add", &place.bridge, "type", "bridge"]);
        run("ip", &["link", "set", &place.bridge, "up"]);
        Some(place)
    }

    /// The same place, seen from a child process.
    pub fn of_parent(dir: &str, bridge: &str, daemon: &str) -> Self {
        Place { dir: dir.into(), bridge: bridge.into(), daemon: daemon.into(), owner: false }
    }

    pub fn guests(&self) -> PathBuf {
        self.dir.join("guests")
    }

    pub fn options(&self) -> QemuOptions {
        QemuOptions { daemon_id: self.daemon.clone(), guests_dir: self.guests() }
    }

    pub fn driver(&self) -> QemuDriver {
        QemuDriver::new(self.options()).unwrap()
    }

    pub fn tap(&self) -> String {
        self.bridge.replace("ktv", "ktw")
    }

    pub fn guest(&self, n: u128) -> ResolvedGuest {
        let instance = InstanceId(uuid::Uuid::from_u128(0x1234_0000 + n));
        let state_dir = self.guests().join(instance.to_string());
        std::fs::create_dir_all(&state_dir).unwrap();
        let disk = samples::disk("root", "virtio0", self.dir.join("root.raw"), DiskFormat::Raw);
        let root = ResolvedDisk { pci: Some("00:04.0".into()), ..disk };
        let nic = samples::nic("10:66:6a:00:00:07", &self.tap(), &self.bridge);
        ResolvedGuest {
            instance,
            generation: Generation { incarnation: 1, n: 1 },
            spec_version: 3,
            domain_id: 8,
            daemon_id: self.daemon.clone(),
            state_dir,
            ids: IdRange { base: 1_234_567, count: 1 },
            machine: Some(samples::machine(0xabcd)),
            limits: Limits {
                cpu: Some(CpuLimit::Count { n: 2 }),
                memory: Some(ByteSize::mib(512)),
                ..Limits::default()
            },
            nics: vec![ResolvedNic { pci: Some("00:08.0".into()), ..nic }],
            cloud_init: CloudInit {
                instance_id: "first".into(),
                user_data: Some("#cloud-config\nsecret: xyzzy\n".into()),
                ..CloudInit::default()
            },
            environment: [("FROM_RECORD".to_owned(), "yes".to_owned())].into(),
            ..samples::guest(InstanceKind::VirtualMachine, root)
        }
    }

    /// Nothing of the daemon's is left outside the place.
    pub fn assert_clean(&self) {
        self.assert_clean_of("");
    }

    /// Nothing of this instance is left outside the place.
    pub fn assert_clean_of(&self, instance: &str) {
        assert!(!Path::new("/sys/class/net").join(self.tap()).exists(), "the tap is left");
        for hierarchy in std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            let group = hierarchy.path().join(format!("karst-{}", self.daemon));
            let left: Vec<_> = std::fs::read_dir(&group)
                .into_iter()
                .flatten()
                .flatten()
                .filter(|e| e.path().is_dir() && e.file_name().to_string_lossy().starts_with(instance))
                .map(|e| e.path())
                .collect();
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.owner {
            return;
        }
        // Also after a panic: every guest is ended, from a runtime of its own.
        let (options, dir) = (self.options(), self.guests());
        let _ = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let driver = QemuDriver::new(options).unwrap();
                for found in karst_guest::keeper::find_all(&dir).unwrap_or_default() {
                    if let Ok(id) = found.status.instance.parse() {
                        let _ = driver.stop(id, StopMode::Force).await;
                        let _ = driver.destroy(id).await;
                    }
                }
            });
        })
        .join();
        let _ = Command::new("ip").args(["link", "del", &self.bridge]).output();
        for hierarchy in std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let _ = std::fs::remove_dir(hierarchy.path().join(format!("karst-{}", self.daemon)));
        }
        let _ = std::fs::remove_dir(format!("/sys/fs/cgroup/karst-{}", self.daemon));
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
