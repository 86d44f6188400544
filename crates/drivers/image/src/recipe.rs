//! Recipes: images made here with mmdebstrap from the archives of distributions (see `sources`).
//!
//! A build runs in a directory of its own; mmdebstrap is contained (own pid and mount namespace), so that a kill or crash
//! leaves only that directory, which the next start removes. No loop device and no mount of the host is used: file
//! systems and disks are written as plain files.

use crate::{
    disk,
    metadata::Metadata,
    sources::{self, Archive},
};
use karst_guest_agent::delivery;
use karst_host::{
    Program,
    sandbox::{Launcher, Sandbox},
};
use karst_model::{Error, Result, error::nearest, instance::InstanceKind};
use std::{
    fs::File,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

/// Told as a build goes on: what it does now, and how far it is in percent.
pub type Progress = Arc<dyn Fn(&str, u8) + Send + Sync>;

/// What the systems of a distribution differ in.
#[derive(Debug, PartialEq, Eq)]
struct Distribution {
    archive: Archive,
    /// As the boot menu calls it.
    title: &'static str,
    /// Where its signed GRUB looks for a configuration.
    efi_stub: &'static str,
    /// Packages of virtual machines that others call otherwise or have not.
    machine: &'static [&'static str],
    /// What writes a network's configuration for cloud-init, the best first.
    renderers: &'static str,
    /// Before the first package is unpacked.
    begin: &'static [&'static str],
}

const DEBIAN: Distribution = Distribution {
    archive: sources::DEBIAN,
    title: "Debian GNU/Linux",
    efi_stub: "EFI/DEBIAN/GRUB.CFG",
    machine: &["linux-image-cloud-amd64"],
    renderers: "networkd",
    begin: &[],
};

const UBUNTU: Distribution = Distribution {
    archive: sources::UBUNTU,
    title: "Ubuntu",
    efi_stub: "EFI/UBUNTU/GRUB.CFG",
    machine: &["linux-image-virtual", "netplan.io"],
    renderers: "netplan, networkd",
    begin: &[MERGED_USR],
};

/// Ubuntu's packages of one release lie both below `/usr` and beside it. Which of them is unpacked first is up to mmdebstrap, so
/// the links are there before all of them.
const MERGED_USR: &str =
    "for d in bin sbin lib lib64; do mkdir -p \"$1/usr/$d\" && ln -s \"usr/$d\" \"$1/$d\" || exit 1; done";

/// A recipe.
#[derive(Debug, PartialEq, Eq)]
pub struct Recipe {
    /// As the user names it.
    pub name: &'static str,
    suite: &'static str,
    release: &'static str,
    /// Name resolution, where systemd's is a package of its own.
    resolved: &'static [&'static str],
    distribution: Distribution,
}

const RESOLVED: &[&str] = &["systemd-resolved"];
const RECIPES: &[Recipe] = &[
    Recipe { name: "debian/12", suite: "bookworm", release: "12", resolved: RESOLVED, distribution: DEBIAN },
    Recipe { name: "debian/13", suite: "trixie", release: "13", resolved: RESOLVED, distribution: DEBIAN },
    Recipe { name: "ubuntu/22.04", suite: "jammy", release: "22.04", resolved: &[], distribution: UBUNTU },
    Recipe {
        name: "ubuntu/24.04",
        suite: "noble",
        release: "24.04",
        resolved: RESOLVED,
        distribution: UBUNTU,
    },
];

/// Virtual size of the disk of virtual machine images: 2 GiB; instances grow it.
const DISK_SIZE: u64 = 2 << 30;

const PACKAGES: &[&str] =
    &["systemd-sysv", "dbus", "iproute2", "libnss-resolve", "netbase", "ca-certificates", "iputils-ping"];
/// Of virtual machines, beside these.
const VM_PACKAGES: &[&str] = &[
    "udev",
    "e2fsprogs",
    "fdisk",
    "zstd",
    "sudo",
    "initramfs-tools",
    "grub-pc-bin",
    "cloud-init",
    "cloud-guest-utils",
];

/// Fetches the signed boot loaders with the host's network and the new system's package lists.
const VM_DOWNLOAD: &str = "mkdir \"$1/karst/deb\" && cd \"$1/karst/deb\" && \
    APT_CONFIG=\"$MMDEBSTRAP_APT_CONFIG\" apt-get -q download shim-signed grub-efi-amd64-signed";

const RUN_SETUP: &str = "chroot \"$1\" /bin/sh /karst/setup.sh";

const CONTAINER_SETUP: &str = include_str!("../recipes/container.sh");
const VM_SETUP: &str = include_str!("../recipes/vm.sh");
const ETH0_NETWORK: &str = include_str!("../recipes/eth0.network");
const CLOUD_CFG: &str = include_str!("../recipes/cloud.cfg");
const GRUB_CFG: &str = include_str!("../recipes/grub.cfg");
const ESP_GRUB_CFG: &str = include_str!("../recipes/esp-grub.cfg");

/// What fetches Karst's guest agent from the host: place, content, mode.
const AGENT: [(&str, &str, u32); 3] = [
    ("usr/lib/karst-agent/setup", delivery::SETUP.1, 0o755),
    ("etc/systemd/system/karst-agent.service", delivery::UNIT.1, 0o644),
    ("etc/udev/rules.d/99-karst-agent.rules", delivery::RULES.1, 0o644),
];

/// What a build made: two files of Incus' split format.
#[derive(Debug, Clone)]
pub struct Built {
    /// `metadata.yaml` in a tar.
    pub metadata: PathBuf,
    /// Root file system (tar, zstd) or disk (qcow2).
    pub rootfs: PathBuf,
}

impl Recipe {
    /// All of them.
    pub fn all() -> &'static [Recipe] {
        RECIPES
    }

    /// By name.
    ///
    /// # Errors
    /// Not found, offering the nearest.
    pub fn find(name: &str) -> Result<&'static Recipe> {
        RECIPES.iter().find(|r| r.name == name).ok_or_else(|| {
            let names = RECIPES.iter().map(|r| r.name);
            let hint = nearest(name, names).unwrap_or("debian/12");
            Error::not_found(format!("there is no recipe {name:?}; {hint:?} is one")).at("recipe")
        })
    }

    /// Everything that decides what comes out, but for the packages' versions, which the date stands for.
    pub fn key(&self, kind: InstanceKind, date: &str) -> String {
        use sha2::Digest;
        let mut h = sha2::Sha256::new();
        let kind_name = format!("{kind:?}");
        let packages = self.packages(kind);
        let cloud_cfg = self.cloud_cfg();
        let grub_cfg = self.grub_cfg("@ROOT@");
        let mut parts: Vec<&str> = vec![self.name, self.suite, &kind_name, date, &packages];
        parts.extend(self.distribution.begin);
        match kind {
            InstanceKind::Container => parts.extend([CONTAINER_SETUP, ETH0_NETWORK]),
            InstanceKind::VirtualMachine => {
                parts.extend([VM_DOWNLOAD, VM_SETUP, cloud_cfg.as_str(), grub_cfg.as_str(), ESP_GRUB_CFG]);
                parts.push(self.distribution.efi_stub);
                parts.extend(AGENT.map(|(_, text, _)| text));
            }
        }
        for part in parts {
            h.update((part.len() as u64).to_le_bytes());
            h.update(part);
        }
        format!("{:x}", h.finalize())
    }

    /// Separated by commas, as mmdebstrap wants them.
    fn packages(&self, kind: InstanceKind) -> String {
        let mut all = [PACKAGES, self.resolved].concat();
        if kind == InstanceKind::VirtualMachine {
            all.extend([VM_PACKAGES, self.distribution.machine].concat());
        }
        all.join(",")
    }

    fn cloud_cfg(&self) -> String {
        CLOUD_CFG.replace("@RENDERERS@", self.distribution.renderers)
    }

    /// `root` is the UUID of the root file system.
    fn grub_cfg(&self, root: &str) -> String {
        GRUB_CFG.replace("@TITLE@", self.distribution.title).replace("@ROOT@", root)
    }

    /// Builds into the existing empty directory `work`. `said` are the sources of the host's policy.
    ///
    /// # Errors
    /// Unsupported when a tool or the keys of the distribution's archive are missing; timeout; internal with the tool's words
    /// as context.
    pub async fn build(
        &self,
        kind: InstanceKind,
        date: &str,
        said: &[String],
        work: &Path,
        launcher: &Launcher,
        progress: &Progress,
    ) -> Result<Built> {
        if std::env::consts::ARCH != "x86_64" {
            return Err(Error::unsupported(
                "image recipes are there for x86_64 hosts only; import an image instead",
            ));
        }
        progress("reading the host's package sources", 0);
        let lines = self.distribution.archive.lines(self.suite, said, Path::new("/etc/apt"))?;
        let built = Built { metadata: work.join("metadata.tar"), rootfs: work.join("rootfs") };
        match kind {
            InstanceKind::Container => self.container(&lines, work, &built, launcher, progress).await?,
            InstanceKind::VirtualMachine => {
                self.virtual_machine(&lines, work, &built, launcher, progress).await?
            }
        }
        let metadata = self.metadata(kind, date).to_yaml()?;
        write_tar(&built.metadata, &[("metadata.yaml", metadata.as_bytes(), 0o644)])?;
        progress("built", 100);
        Ok(built)
    }

    fn metadata(&self, kind: InstanceKind, date: &str) -> Metadata {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let serial = date.replace('-', "");
        let os = self.distribution.archive.name;
        let what = match kind {
            InstanceKind::Container => "",
            InstanceKind::VirtualMachine => " disk",
        };
        let properties = [
            ("os", os.to_owned()),
            ("release", self.suite.to_owned()),
            ("version", self.release.to_owned()),
            ("variant", "default".to_owned()),
            ("architecture", "amd64".to_owned()),
            ("serial", serial.clone()),
            ("type", if what.is_empty() { "tar.zst" } else { "disk-kvm.img" }.to_owned()),
            ("description", format!("{os} {} ({}) amd64{what} {serial}", self.release, self.suite)),
        ];
        Metadata {
            architecture: "x86_64".into(),
            creation_date: now.map_or(0, |d| d.as_secs() as i64),
            expiry_date: 0,
            properties: properties.into_iter().map(|(k, v)| (k.to_owned(), v)).collect(),
            templates: Default::default(),
        }
    }

    async fn container(
        &self,
        lines: &[String],
        work: &Path,
        built: &Built,
        launcher: &Launcher,
        progress: &Progress,
    ) -> Result<()> {
        let overlay = [
            ("karst/setup.sh", CONTAINER_SETUP.as_bytes(), 0o755),
            ("etc/systemd/network/50-karst.network", ETH0_NETWORK.as_bytes(), 0o644),
        ];
        write_tar(&work.join("overlay.tar"), &overlay)?;
        // mmdebstrap picks the compressor by the name.
        let hooks = [RUN_SETUP, "rm -r \"$1/karst\""];
        let arguments = self.arguments(InstanceKind::Container, &hooks, "rootfs.tar.zst");
        self.bootstrap(lines, work, &arguments, launcher, progress, (2, 98)).await?;
        std::fs::rename(work.join("rootfs.tar.zst"), &built.rootfs)?;
        Ok(())
    }

    async fn virtual_machine(
        &self,
        lines: &[String],
        work: &Path,
        built: &Built,
        launcher: &Launcher,
        progress: &Progress,
    ) -> Result<()> {
        let uuid = uuid::Uuid::new_v4();
        let root = uuid.to_string();
        let (grub_cfg, cloud_cfg) = (self.grub_cfg(&root), self.cloud_cfg());
        let fstab = format!("UUID={root} / ext4 defaults,errors=remount-ro 0 1\n");
        let mut overlay = vec![
            ("karst/setup.sh", VM_SETUP.as_bytes(), 0o755),
            ("etc/cloud/cloud.cfg.d/90_karst.cfg", cloud_cfg.as_bytes(), 0o644),
            ("boot/grub/grub.cfg", grub_cfg.as_bytes(), 0o644),
            ("etc/fstab", fstab.as_bytes(), 0o644),
        ];
        overlay.extend(AGENT.map(|(place, text, mode)| (place, text.as_bytes(), mode)));
        write_tar(&work.join("overlay.tar"), &overlay)?;
        let arguments = self.arguments(InstanceKind::VirtualMachine, &[VM_DOWNLOAD, RUN_SETUP], "tree");
        self.bootstrap(lines, work, &arguments, launcher, progress, (2, 75)).await?;
        let tree = work.join("tree");
        let read = |name: &str| {
            std::fs::read(tree.join("karst").join(name))
                .map_err(|e| Error::internal("the recipe left no boot loader", e).with_context(name))
        };
        let (boot_img, core_img) = (read("bios/boot.img")?, read("bios/core.img")?);
        let stub = ESP_GRUB_CFG.replace("@ROOT@", &root).into_bytes();
        let efi = [
            ("EFI/BOOT/BOOTX64.EFI", read("esp/shim")?),
            ("EFI/BOOT/GRUBX64.EFI", read("esp/grub")?),
            (self.distribution.efi_stub, stub),
        ];
        std::fs::remove_dir_all(tree.join("karst"))?;

        progress("making the root file system", 78);
        let disks = work.join("disk");
        std::fs::create_dir(&disks)?;
        let file = File::create_new(disks.join("disk.raw"))?;
        file.set_len(DISK_SIZE)?;
        let size = format!("{}k", (DISK_SIZE - disk::ROOT_OFFSET - disk::TAIL) >> 10);
        let offset = format!("offset={},lazy_itable_init=1,lazy_journal_init=0", disk::ROOT_OFFSET);
        let args = [
            "-q",
            "-F",
            "-t",
            "ext4",
            "-I",
            "256",
            "-O",
            "metadata_csum,64bit,resize_inode",
            "-U",
            &root,
            "-L",
            "root",
            "-m",
            "1",
            "-E",
            &offset,
            "-d",
            "/tree",
            "/disk/disk.raw",
            &size,
        ];
        Sandbox::new(launcher)
            .readable("tree", open_dir(&tree)?)
            .writable("disk", open_dir(&disks)?)
            .exec(Program::MkfsExt4, &args)
            .await?
            .ok("making the root file system of the image")?;
        disk::write(&file, DISK_SIZE, &disk::Boot { boot_img: &boot_img, core_img: &core_img, efi: &efi })?;
        drop(file);

        progress("converting the disk", 88);
        Sandbox::new(launcher)
            .writable("disk", open_dir(&disks)?)
            .exec(
                Program::QemuImg,
                &["convert", "-f", "raw", "-O", "qcow2", "/disk/disk.raw", "/disk/disk.qcow2"],
            )
            .await?
            .ok("converting the disk of the image")?;
        std::fs::rename(disks.join("disk.qcow2"), &built.rootfs)?;
        progress("cleaning up", 96);
        let (disks, tree) = (disks.clone(), tree.clone());
        tokio::task::spawn_blocking(move || {
            std::fs::remove_dir_all(disks)?;
            std::fs::remove_dir_all(tree)
        })
        .await
        .map_err(|e| Error::internal("a task ended unexpectedly", e))??;
        Ok(())
    }

    /// Those of mmdebstrap, in a directory with `overlay.tar`, which is laid over the packages before the hooks, and
    /// `sources.list`.
    fn arguments(&self, kind: InstanceKind, hooks: &[&str], target: &str) -> Vec<String> {
        // Hooks are shell text by mmdebstrap's design; these are constants. Paths are relative to the work directory.
        let mut all = vec!["--mode=root".to_owned(), "--variant=minbase".to_owned()];
        all.push(format!("--include={}", self.packages(kind)));
        let fixed = [
            "--aptopt=APT::Install-Recommends \"false\"",
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
            "--dpkgopt=path-exclude=/usr/share/info/*",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-include=/usr/share/doc/*/copyright",
        ];
        all.extend(fixed.map(str::to_owned));
        all.extend(self.distribution.begin.iter().map(|h| format!("--setup-hook={h}")));
        all.push("--customize-hook=tar-in overlay.tar /".to_owned());
        all.extend(hooks.iter().map(|h| format!("--customize-hook={h}")));
        all.extend([self.suite, target, "sources.list"].map(str::to_owned));
        all
    }

    /// Runs mmdebstrap in `work`.
    async fn bootstrap(
        &self,
        lines: &[String],
        work: &Path,
        arguments: &[String],
        launcher: &Launcher,
        progress: &Progress,
        (from, to): (u8, u8),
    ) -> Result<()> {
        std::fs::write(work.join("sources.list"), lines.join("\n") + "\n")?;
        let report = progress.clone();
        let steps = [
            ("running apt-get update", "reading package lists", 3),
            ("downloading packages with apt", "downloading the base packages", 8),
            ("extracting archives", "unpacking the base packages", 20),
            ("installing essential packages", "installing the base packages", 30),
            ("installing remaining packages", "downloading and installing packages", 45),
            ("running --customize-hook", "setting the system up", 80),
            ("cleaning package lists", "cleaning", 92),
            ("creating tarball", "packing", 94),
        ];
        let on_line = move |line: &str| {
            if let Some((_, text, percent)) = steps.iter().find(|(mark, ..)| line.contains(mark)) {
                let span = u16::from(to - from);
                report(text, from + (span * percent / 100) as u8);
            }
        };
        let tmp = work.join("tmp");
        std::fs::create_dir(&tmp)?;
        let env = [("TMPDIR", tmp.to_string_lossy()), ("DEBIAN_FRONTEND", "noninteractive".into())];
        let env: Vec<(&str, &str)> = env.iter().map(|(k, v)| (*k, v.as_ref())).collect();
        let limits = karst_host::sandbox::Limits { timeout: Duration::from_secs(1800), ..Default::default() };
        Sandbox::new(launcher)
            .limits(limits)
            .on_line(Box::new(on_line))
            .contained(Program::Mmdebstrap, arguments, work, &env)
            .await?
            .ok("mmdebstrap")
            .map_err(reason)?;
        Ok(())
    }
}

/// Is it a line of sources.list that recipes can use?
///
/// # Errors
/// Invalid, `recipes.sources`, with what is wrong with it.
pub fn check_source(line: &str) -> Result<()> {
    sources::check(line)
}

/// With what mmdebstrap and apt gave as the reason: who asked for an image can mend a mirror or a missing package, and has
/// no other way to learn of it.
fn reason(mut error: Error) -> Error {
    let said = error.context.as_deref().unwrap_or_default();
    let mut reasons: Vec<&str> = said.lines().filter_map(|line| line.trim().strip_prefix("E: ")).collect();
    reasons.dedup();
    if !reasons.is_empty() {
        let text: String = reasons[..reasons.len().min(3)].join("; ").chars().take(400).collect();
        error.message = format!("{}: {text}", error.message);
    }
    error
}

/// A directory as a descriptor.
pub(crate) fn open_dir(path: &Path) -> Result<OwnedFd> {
    Ok(File::open(path)?.into())
}

/// A tar with files of root.
pub(crate) fn write_tar(to: &Path, files: &[(&str, &[u8], u32)]) -> Result<()> {
    let mut tar = tar::Builder::new(File::create(to)?);
    for (path, content, mode) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(*mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_entry_type(tar::EntryType::Regular);
        tar.append_data(&mut header, path, *content)?;
    }
    tar.into_inner()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_build_says_what_the_program_gave_as_the_reason() {
        let context = "exit code 25: I: chroot architecture amd64\nW: gpg\nE: cannot exec zstd: No such file\nE: failed to start zstd";
        let told = reason(Error::internal("mmdebstrap failed", context));
        assert_eq!(told.message, "mmdebstrap failed: cannot exec zstd: No such file; failed to start zstd");
        assert_eq!(
            reason(Error::internal("mmdebstrap failed", "exit code 1: ")).message,
            "mmdebstrap failed"
        );
        let long = format!("E: {}", "x".repeat(5000));
        assert!(reason(Error::internal("mmdebstrap failed", long)).message.len() < 450);
    }

    #[test]
    fn a_recipe_is_found_by_name_and_keyed_by_content_and_date() {
        let r = Recipe::find("debian/12").unwrap();
        let e = Recipe::find("debian/21").unwrap_err();
        assert!(e.message.contains("debian/12") || e.message.contains("debian/13"), "{e}");
        let a = r.key(InstanceKind::Container, "2026-01-01");
        assert_eq!(a, r.key(InstanceKind::Container, "2026-01-01"));
        assert_ne!(a, r.key(InstanceKind::VirtualMachine, "2026-01-01"));
        assert_ne!(a, r.key(InstanceKind::Container, "2026-01-02"));
        assert_ne!(a, Recipe::find("debian/13").unwrap().key(InstanceKind::Container, "2026-01-01"));
    }

    #[test]
    fn ubuntu_differs_from_debian_where_it_must() {
        let find = |name: &str| Recipe::find(name).unwrap();
        let (debian, noble, jammy) = (find("debian/12"), find("ubuntu/24.04"), find("ubuntu/22.04"));
        assert_eq!(Recipe::find("ubuntu/24.10").unwrap_err().field.as_deref(), Some("recipe"));
        let machine = InstanceKind::VirtualMachine;
        let has = |r: &Recipe, kind, package: &str| r.packages(kind).split(',').any(|p| p == package);
        for kind in [InstanceKind::Container, machine] {
            assert!(has(debian, kind, "systemd-resolved") && has(noble, kind, "systemd-resolved"));
            assert!(!has(jammy, kind, "systemd-resolved"), "there it is part of systemd's own package");
            let keys: Vec<_> = RECIPES.iter().map(|r| r.key(kind, "2026-01-01")).collect();
            let apart: std::collections::BTreeSet<_> = keys.iter().collect();
            assert_eq!(apart.len(), RECIPES.len());
        }
        assert!(has(debian, machine, "linux-image-cloud-amd64") && !has(debian, machine, "netplan.io"));
        assert!(has(noble, machine, "linux-image-virtual") && has(noble, machine, "netplan.io"));
        assert!(!has(noble, InstanceKind::Container, "linux-image-virtual"));

        let arguments = noble.arguments(machine, &[VM_DOWNLOAD, RUN_SETUP], "tree");
        assert_eq!(arguments[arguments.len() - 3..], ["noble", "tree", "sources.list"]);
        let place = |start: &str| arguments.iter().position(|a| a.starts_with(start)).unwrap();
        assert!(
            place("--setup-hook=for d in bin sbin lib lib64;")
                < place("--customize-hook=tar-in overlay.tar /")
        );
        assert!(
            place("--customize-hook=tar-in") < place("--customize-hook=mkdir")
                && place("--customize-hook=mkdir") < place("--customize-hook=chroot"),
            "{arguments:?}"
        );
        let of_debian = debian.arguments(machine, &[VM_DOWNLOAD, RUN_SETUP], "tree");
        assert!(!of_debian.iter().any(|a| a.starts_with("--setup-hook")), "{of_debian:?}");

        assert!(noble.cloud_cfg().contains("renderers: [netplan, networkd]"));
        assert!(debian.cloud_cfg().contains("renderers: [networkd]"));
        let menu = noble.grub_cfg("1234-abcd");
        assert!(menu.contains("menuentry 'Ubuntu' {") && menu.contains("root=UUID=1234-abcd"), "{menu}");
        for text in [menu, debian.grub_cfg("1"), noble.cloud_cfg()] {
            assert!(!text.contains('@'), "{text}");
        }
        assert_eq!(noble.distribution.efi_stub, "EFI/UBUNTU/GRUB.CFG");
        let properties = noble.metadata(machine, "2026-01-02").properties;
        let of = |key: &str| properties[key].as_str();
        assert_eq!((of("os"), of("release"), of("version")), ("Ubuntu", "noble", "24.04"));
        assert_eq!(of("description"), "Ubuntu 24.04 (noble) amd64 disk 20260102");
    }
}
