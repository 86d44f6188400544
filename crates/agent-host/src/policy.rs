//! `host-policy.toml`: what this host grants beyond ordinary guests. Root writes it, on this machine; control cannot, so a
//! compromised control process gets no further than what stands there. Without the file nothing is granted.

use karst_agent::check_memory_path;
use karst_model::{Error, Result, screens::ScreenGrants, storage::PoolKind};
use serde::Deserialize;
use std::{
    fs::File,
    io::Read,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

/// Name of the file.
pub const FILE: &str = "host-policy.toml";
const LARGEST: u64 = 64 << 10;
/// Kinds of pools whose own contract was kept on real kernels, and on which guests have not lived long enough to be promised.
const ON_TRIAL: &[PoolKind] = &[PoolKind::Zfs, PoolKind::Lvm];

/// What the host grants.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HostPolicy {
    /// Containers whose root is the host's root.
    pub privileged_containers: bool,
    /// Directories of the host whose content may be given to guests; absolute, without `..`.
    pub path_prefixes: Vec<PathBuf>,
    /// Images and block devices of the host, each as it stands there, and those below directories, that virtual machines may have
    /// as drives: raw, opened as root. What a machine writes there nobody else may have mounted.
    pub disk_paths: Vec<PathBuf>,
    /// Directories of the host below which administrators may have the memory of virtual machines written into files (`virsh save`,
    /// `virsh dump`), and start machines from there. The files are root's alone.
    pub save_paths: Vec<PathBuf>,
    /// Classes of devices of the host that containers may have (`gpu`, `unix-block`, `unix-char`, and `proxy` for its sockets with
    /// abstract names), or one device of a class (`unix-char:/dev/ttyUSB0`, `gpu:0000:01:00.0`, `proxy:@NAME`). Those on USB both kinds of
    /// guests may have (`usb`, `usb:046d:c31c`), and what somebody types and points with virtual machines (`input`,
    /// `input:/dev/input/event3`). `vsock`: virtual machines may have sockets to the host, where what listens for all of them is reached.
    pub device_classes: Vec<String>,
    /// `raw.*` keys that are passed on: `raw.lxc` of containers, `raw.dnsmasq` of networks.
    pub raw_keys: Vec<String>,
    /// Interfaces of the host that networks and guests may have (`eth1`, …; `*`: all).
    pub network_interfaces: Vec<String>,
    /// May virtual machines reach networks as a program of the host does (NICs of type `user`)? No firewall of Karst's is before
    /// that, and what listens on the host for itself alone is reached too.
    pub user_networking: bool,
    /// Addresses and subnets that the host routes to guests (NICs of type `routed`, routes of `p2p`): `192.0.2.0/24`, ….
    pub routed_subnets: Vec<ipnet::IpNet>,
    /// PCI addresses (`0000:01:00.0`) that may be passed through; no device is as yet.
    pub pci: Vec<String>,
    /// Directories and block devices that storage pools may be made of: each as it stands there, and directories below. Also
    /// data sets of ZFS (`zfs:tank/guests`, and those below) and volume groups of LVM (`lvm:vg0`).
    pub pool_sources: Vec<PathBuf>,
    /// Kinds of pools that may be made here although guests on them are still on trial: `zfs`, `lvm`; `dir`: containers and file systems
    /// on directories whose file system cannot mount them with other owners (NFS, FUSE). What was made stays.
    pub trial_pools: Vec<PoolKind>,
    /// Commands of QEMU's monitor that administrators may run in virtual machines (`query-status`; `query-*`: all that begin
    /// so; `*`: all). Text for its human monitor is `human-monitor-command`. They can do what QEMU's own user can.
    pub qemu_monitor: Vec<String>,
    /// May administrators follow the events of QEMU's monitors?
    pub qemu_events: bool,
    /// Addresses of the host at which screens of virtual machines may listen for viewers (`127.0.0.1`, `::1`, …; `*`: all). Whoever
    /// reaches such an address and knows a screen's password uses that screen.
    pub screen_listen: Vec<String>,
    /// Those of them at which a screen may listen also when it has no password: every user and every program that reaches the
    /// address uses it then, and on the loopback these are all of the host.
    pub screen_listen_open: Vec<String>,
    /// Files, sockets and devices of the host that ports of virtual machines may lead to, each as it stands there, and those below
    /// directories. Files are made and written as root, whose they are. What a guest writes to one is not bounded: a directory of
    /// files wants a quota, or a file system of its own.
    pub port_paths: Vec<PathBuf>,
    /// Addresses that they may listen at and connect to: `127.0.0.1:4555`, `127.0.0.1` for all its ports, `*` for all.
    pub port_addresses: Vec<String>,
    /// Render nodes of the host's graphics cards (`/dev/dri/renderD128`) with which QEMU may draw the screens of virtual machines. Whoever
    /// gets out of such a machine has the driver of the card before him.
    pub render_nodes: Vec<PathBuf>,
    /// What uploads of images may take.
    pub uploads: crate::staging::UploadLimits,
    /// What backups may take.
    pub backups: crate::backup_room::BackupLimits,
    /// Where images are built of.
    pub recipes: RecipeSources,
}

/// Where recipes take their packages from, before the host's own apt sources: the table `recipes`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RecipeSources {
    /// Lines as sources.list(5) has them: `deb [signed-by=/etc/karst/mirror.gpg] http://mirror.example/ubuntu noble main universe`.
    /// What they offer becomes part of images with root's rights in them.
    pub sources: Vec<String>,
}

impl HostPolicy {
    /// Refuses a kind of pools that is on trial and not asked for.
    ///
    /// # Errors
    /// Unsupported, naming what to write.
    pub fn check_pool_kind(&self, kind: PoolKind) -> Result<()> {
        if !ON_TRIAL.contains(&kind) || self.trial_pools.contains(&kind) {
            return Ok(());
        }
        Err(Error::unsupported(format!(
            "guests on pools of kind {0} are on trial; the administrator of this host who wants them adds \"{0}\" to trial_pools in {FILE}",
            kind.as_str()
        )))
    }

    /// The file of the first of `directories` that has one; nothing granted when none has.
    ///
    /// # Errors
    /// A file that is not root's alone to write, or that says something unknown: never guessed at.
    pub fn load(directories: &[&Path]) -> Result<Self> {
        for directory in directories {
            let path = directory.join(FILE);
            match File::options().read(true).custom_flags_nofollow().open(&path) {
                Ok(file) => return Self::read(&path, file),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => {
                    return Err(
                        Error::forbidden(format!("{} cannot be read", path.display())).with_context(e)
                    );
                }
            }
        }
        Ok(Self::default())
    }

    fn read(path: &Path, mut file: File) -> Result<Self> {
        let found = file.metadata()?;
        if !found.is_file() || found.uid() != 0 || found.mode() & 0o022 != 0 {
            return Err(Error::forbidden(format!(
                "{} must be a file of root that nobody else can write; `chown root:root` and `chmod 0644` it, or remove it",
                path.display()
            )));
        }
        let mut text = String::new();
        Read::take(&mut file, LARGEST + 1).read_to_string(&mut text)?;
        if text.len() as u64 > LARGEST {
            return Err(Error::too_large(format!("{} is larger than {LARGEST} bytes", path.display())));
        }
        let policy: Self = toml::from_str(&text).map_err(|e| {
            Error::invalid(FILE, format!("{}: {}", path.display(), e.message())).with_context(e.to_string())
        })?;
        for line in &policy.recipes.sources {
            karst_image::recipe::check_source(line).map_err(|mut e| {
                e.message = format!("{}: {}", path.display(), e.message);
                e
            })?;
        }
        policy.screens().check().map_err(|e| {
            let text = format!("{}: {}", path.display(), e.message);
            Error::invalid(e.field.as_deref().unwrap_or(FILE), text)
        })?;
        policy.check_ports().map_err(|e| {
            let text = format!("{}: {}", path.display(), e.message);
            Error::invalid(e.field.as_deref().unwrap_or(FILE), text)
        })?;
        let places = policy.path_prefixes.iter().map(|p| ("path_prefixes", p));
        let places = places.chain(policy.disk_paths.iter().map(|p| ("disk_paths", p)));
        let places = places.chain(policy.save_paths.iter().map(|p| ("save_paths", p)));
        let places = places.chain(policy.port_paths.iter().map(|p| ("port_paths", p)));
        let named = |p: &&PathBuf| p.to_str().is_some_and(|p| p.starts_with("zfs:") || p.starts_with("lvm:"));
        let sources = policy.pool_sources.iter().filter(|p| !named(p));
        for (field, prefix) in places.chain(sources.map(|p| ("pool_sources", p))) {
            if !plain(prefix) {
                return Err(Error::invalid(
                    field,
                    format!("{}: {:?} is not an absolute path without \"..\"", path.display(), prefix),
                ));
            }
        }
        Ok(policy)
    }
}

/// An absolute path without `..`.
fn plain(path: &Path) -> bool {
    let named = |c| matches!(c, std::path::Component::RootDir | std::path::Component::Normal(_));
    path.is_absolute() && path.components().all(named)
}

impl HostPolicy {
    /// May a pool be made of this? A path that stands in the policy is taken as root wrote it; of one below it no part is a
    /// symbolic link.
    ///
    /// # Errors
    /// Invalid for what is no plain path, forbidden for what is not granted.
    pub fn check_pool_source(&self, kind: PoolKind, source: &str) -> Result<()> {
        if kind.has_names() && !source.starts_with('/') {
            return self.check_pool_name(kind, source);
        }
        let path = Path::new(source);
        if !plain(path) || source.len() > 4000 {
            return Err(Error::invalid(
                "source",
                format!("{source:?} is not an absolute path without \"..\""),
            ));
        }
        if self.pool_sources.iter().any(|granted| granted == path) {
            return Ok(());
        }
        let below =
            self.pool_sources.iter().filter_map(|granted| Some((granted, path.strip_prefix(granted).ok()?)));
        for (granted, rest) in below {
            let Some(rest) = rest.to_str() else { continue };
            let opened = File::open(granted).and_then(|dir| {
                karst_host::fs::open_beneath(
                    dir,
                    rest,
                    rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY,
                )
            });
            return opened.map(drop).map_err(|e| {
                Error::invalid(
                    "source",
                    format!("{source:?} is not a directory of this host, or leads through a link"),
                )
                .with_context(e)
            });
        }
        Err(Error::forbidden(format!(
            "this host does not grant {source:?} for pools; its administrator adds it to pool_sources in {FILE}"
        ))
        .at("source"))
    }
}

impl HostPolicy {
    /// Where screens may listen. A port is control's to take: it listens, and tells nobody of it whom the host did not let.
    pub fn screens(&self) -> ScreenGrants {
        ScreenGrants { listen: self.screen_listen.clone(), open: self.screen_listen_open.clone() }
    }

    /// May this command of QEMU's monitor be run?
    ///
    /// # Errors
    /// Forbidden, with the line that grants it.
    pub fn check_monitor(&self, command: &str) -> Result<()> {
        let granted = |pattern: &String| match pattern.strip_suffix('*') {
            Some(beginning) => command.starts_with(beginning),
            None => pattern == command,
        };
        if self.qemu_monitor.iter().any(granted) {
            return Ok(());
        }
        Err(Error::forbidden(format!(
            "this host grants no {command} of QEMU's monitor, which could do what QEMU's own user can; its administrator can, with \
             qemu_monitor = [{command:?}] in {FILE}"
        )))
    }

    /// May the events of QEMU's monitors be followed?
    ///
    /// # Errors
    /// Forbidden, with the line that grants it.
    pub fn check_monitor_events(&self) -> Result<()> {
        match self.qemu_events {
            true => Ok(()),
            false => Err(Error::forbidden(format!(
                "this host does not show the events of QEMU's monitors; its administrator can, with qemu_events = true in {FILE}"
            ))),
        }
    }
}

impl HostPolicy {
    /// The directory of a file for memory, below one that is granted and reached without links, and the file's name.
    ///
    /// # Errors
    /// Invalid for what is no plain path, forbidden for what is not granted or leads through a link, not found.
    pub fn save_place(&self, path: &str) -> Result<(OwnedFd, String)> {
        check_memory_path(path)?;
        let at = |e: Error| e.at("path");
        let whole = Path::new(path);
        let parts = whole.parent().zip(whole.file_name().and_then(|n| n.to_str()));
        let (parent, name) = parts.ok_or_else(|| at(Error::invalid("path", "a path names a file")))?;
        let below = |granted: &&PathBuf| parent.starts_with(granted);
        let granted = self.save_paths.iter().filter(below).max_by_key(|p| p.components().count());
        let granted = granted.ok_or_else(|| {
            at(Error::forbidden(format!(
                "this host grants no file {path:?} for memory of virtual machines; its administrator can, with save_paths in {FILE}"
            )))
        })?;
        let failed = |e: std::io::Error| match e.kind() {
            std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => {
                at(Error::not_found(format!("{:?} is no directory of the host", parent.display())))
            }
            _ => at(Error::forbidden(format!(
                "{path:?} leads through a link, or out of what this host grants"
            )))
            .with_context(e),
        };
        let top = File::open(granted).map_err(failed)?;
        let rest = parent.strip_prefix(granted).ok().and_then(Path::to_str).unwrap_or_default();
        let rest = if rest.is_empty() { "." } else { rest };
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY;
        let directory = karst_host::fs::open_beneath(top, rest, flags).map_err(failed)?;
        Ok((directory, name.to_owned()))
    }
}

impl HostPolicy {
    /// A file without a name for memory of a virtual machine, where there is the most room of what is granted.
    ///
    /// # Errors
    /// Forbidden when nothing is granted, not found when none of it is there.
    pub fn save_room(&self) -> Result<File> {
        use rustix::{
            fs::{AtFlags, Mode, OFlags, fstatvfs, openat, unlinkat},
            io::Errno,
        };
        if self.save_paths.is_empty() {
            return Err(Error::forbidden(format!(
                "this host grants no place for memory of virtual machines; its administrator can, with save_paths in {FILE}"
            )));
        }
        let there = self.save_paths.iter().filter_map(|path| {
            let directory = File::open(path).ok()?;
            let space = fstatvfs(&directory).ok()?;
            directory
                .metadata()
                .ok()?
                .is_dir()
                .then(|| (space.f_bavail.saturating_mul(space.f_frsize), directory))
        });
        let (_, directory) = there.max_by_key(|(room, _)| *room).ok_or_else(|| {
            Error::not_found(format!("no directory of save_paths in {FILE} is there on the host"))
        })?;
        let mode = Mode::from_raw_mode(0o600);
        let access = OFlags::RDWR | OFlags::CLOEXEC;
        let made = match openat(&directory, ".", access | OFlags::TMPFILE, mode) {
            // File systems without that: a name for a moment.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT) => {
                let name = format!(".karst-{}.part", uuid::Uuid::new_v4());
                let new = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
                openat(&directory, name.as_str(), access | new, mode).and_then(|made| {
                    unlinkat(&directory, name.as_str(), AtFlags::empty())?;
                    Ok(made)
                })
            }
            other => other,
        };
        Ok(made.map_err(std::io::Error::from)?.into())
    }

    fn check_pool_name(&self, kind: PoolKind, source: &str) -> Result<()> {
        karst_model::storage::check_source_name(kind, "source", source)?;
        let wanted = format!("{}:{source}", kind.as_str());
        let granted = self.pool_sources.iter().filter_map(|p| p.to_str()).any(|granted| {
            wanted.strip_prefix(granted).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        });
        if granted {
            return Ok(());
        }
        Err(Error::forbidden(format!(
            "this host does not grant {source:?} for pools; its administrator adds {wanted:?} to pool_sources in {FILE}"
        ))
        .at("source"))
    }
}

trait NoFollow {
    fn custom_flags_nofollow(&mut self) -> &mut Self;
}

impl NoFollow for std::fs::OpenOptions {
    fn custom_flags_nofollow(&mut self) -> &mut Self {
        use std::os::unix::fs::OpenOptionsExt;
        let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::NONBLOCK;
        self.custom_flags(flags.bits() as i32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, chown};

    #[test]
    fn commands_of_the_monitor_are_granted_by_name() {
        let policy: HostPolicy =
            toml::from_str("qemu_monitor = [\"query-*\", \"stop\"]\nqemu_events = true").unwrap();
        policy.check_monitor_events().unwrap();
        for granted in ["query-status", "query-", "stop"] {
            policy.check_monitor(granted).unwrap();
        }
        for not in ["quit", "human-monitor-command", "stop2", "querystatus", ""] {
            let e = policy.check_monitor(not).unwrap_err();
            assert!(e.is(karst_model::ErrorKind::Forbidden), "{not}");
            assert!(e.message.contains(&format!("qemu_monitor = [{not:?}] in host-policy.toml")), "{e}");
        }
        let all: HostPolicy = toml::from_str("qemu_monitor = [\"*\"]").unwrap();
        all.check_monitor("quit").unwrap();
        let e = all.check_monitor_events().unwrap_err();
        assert!(e.message.contains("qemu_events = true in host-policy.toml"), "{e}");
        assert!(HostPolicy::default().check_monitor("query-status").is_err());
    }

    #[test]
    fn memory_is_written_below_what_is_granted_only() {
        use karst_model::ErrorKind::{Forbidden, Invalid, NotFound};
        let dir = tempfile::tempdir().unwrap();
        let (granted, other) = (dir.path().join("granted"), dir.path().join("other"));
        std::fs::create_dir_all(granted.join("below")).unwrap();
        std::fs::create_dir(&other).unwrap();
        std::os::unix::fs::symlink(&other, granted.join("link")).unwrap();
        let policy = HostPolicy { save_paths: vec![granted.clone()], ..HostPolicy::default() };
        let place = |path: PathBuf| {
            let found = policy.save_place(path.to_str().unwrap());
            found.map(|(_, name)| name).map_err(|e| (e.kind, e.field))
        };
        let refused = |kind| Err((kind, Some("path".to_owned())));
        assert_eq!(place(granted.join("a.save")), Ok("a.save".into()));
        assert_eq!(place(granted.join("below/a.save")), Ok("a.save".into()));
        assert_eq!(place(granted.join("link/a.save")), refused(Forbidden));
        assert_eq!(place(granted.join("none/a.save")), refused(NotFound));
        assert_eq!(place(granted.join("below/../a.save")), refused(Invalid));
        assert_eq!(place(granted.clone()), refused(Forbidden), "the directory itself is no file below it");
        assert_eq!(place(other.join("a.save")), refused(Forbidden));
        assert_eq!(place(dir.path().join("granted2/a.save")), refused(Forbidden));
        let e = HostPolicy::default().save_place("/srv/a").unwrap_err();
        assert!(e.message.contains("save_paths in host-policy.toml"), "{e}");
    }

    #[test]
    fn memory_has_room_where_it_is_granted() {
        use std::io::{Read, Seek, Write};
        let dir = tempfile::tempdir().unwrap();
        let e = HostPolicy::default().save_room().unwrap_err();
        assert!(e.is(karst_model::ErrorKind::Forbidden) && e.message.contains("save_paths"), "{e}");
        let none = HostPolicy { save_paths: vec![dir.path().join("none")], ..HostPolicy::default() };
        assert!(none.save_room().is_err_and(|e| e.is(karst_model::ErrorKind::NotFound)));
        let paths = vec![dir.path().join("none"), dir.path().to_owned()];
        let policy = HostPolicy { save_paths: paths, ..HostPolicy::default() };
        let mut file = policy.save_room().unwrap();
        file.write_all(b"memory").unwrap();
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "memory");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "it has no name");
    }

    #[test]
    fn kinds_of_pools_on_trial_are_asked_for() {
        let policy: HostPolicy = toml::from_str("trial_pools = [\"zfs\"]").unwrap();
        for kind in [PoolKind::Dir, PoolKind::Btrfs, PoolKind::Zfs] {
            policy.check_pool_kind(kind).unwrap();
        }
        let e = policy.check_pool_kind(PoolKind::Lvm).unwrap_err();
        assert!(e.message.contains("adds \"lvm\" to trial_pools in host-policy.toml"), "{e}");
        assert!(HostPolicy::default().check_pool_kind(PoolKind::Zfs).is_err());
    }

    #[test]
    fn pools_are_made_of_what_is_granted_only() {
        let dir = tempfile::tempdir().unwrap();
        let (granted, other) = (dir.path().join("granted"), dir.path().join("other"));
        std::fs::create_dir_all(granted.join("below")).unwrap();
        std::fs::create_dir(&other).unwrap();
        std::os::unix::fs::symlink(&other, granted.join("link")).unwrap();
        let policy = HostPolicy { pool_sources: vec![granted.clone()], ..HostPolicy::default() };
        let check =
            |path: &Path| policy.check_pool_source(PoolKind::Dir, path.to_str().unwrap()).map_err(|e| e.kind);
        use karst_model::ErrorKind::{Forbidden, Invalid};
        assert_eq!(check(&granted), Ok(()));
        assert_eq!(check(&granted.join("below")), Ok(()));
        assert_eq!(check(&granted.join("link")), Err(Invalid));
        assert_eq!(check(&granted.join("link/x")), Err(Invalid));
        assert_eq!(check(&granted.join("below/../../other")), Err(Invalid));
        assert_eq!(check(Path::new("relative")), Err(Invalid));
        assert_eq!(check(&other), Err(Forbidden));
        assert_eq!(check(Path::new("/")), Err(Forbidden));
        let named =
            HostPolicy { pool_sources: vec!["zfs:tank/g".into(), "lvm:vg0".into()], ..HostPolicy::default() };
        let named = |kind, name| named.check_pool_source(kind, name).map_err(|e| e.kind);
        assert_eq!(named(PoolKind::Zfs, "tank/g"), Ok(()));
        assert_eq!(named(PoolKind::Zfs, "tank/g/below"), Ok(()));
        assert_eq!(named(PoolKind::Lvm, "vg0"), Ok(()));
        for (kind, name) in [
            (PoolKind::Zfs, "tank"),
            (PoolKind::Zfs, "tank/guests"),
            (PoolKind::Zfs, "vg0"),
            (PoolKind::Lvm, "vg1"),
        ] {
            assert_eq!(named(kind, name), Err(Forbidden), "{name}");
        }
        for (kind, name) in [
            (PoolKind::Zfs, "tank/g@s"),
            (PoolKind::Zfs, "-r"),
            (PoolKind::Zfs, "tank/g/../x"),
            (PoolKind::Lvm, "vg0/x"),
        ] {
            assert!(named(kind, name).is_err(), "{name}");
        }
        assert_eq!(HostPolicy::default().check_pool_source(PoolKind::Dir, "/").unwrap_err().kind, Forbidden);
    }

    #[test]
    fn only_roots_word_counts() {
        if !crate::backends::root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let load = || HostPolicy::load(&[Path::new("/nonexistent"), dir.path()]);
        assert_eq!(load().unwrap(), HostPolicy::default());
        let file = dir.path().join(FILE);
        std::fs::write(&file, "privileged_containers = true\npath_prefixes = [\"/srv/share\"]\n").unwrap();
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o644)).unwrap();
        let policy = load().unwrap();
        assert!(policy.privileged_containers && policy.raw_keys.is_empty());
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o664)).unwrap();
        assert!(load().unwrap_err().message.contains("chmod"));
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o644)).unwrap();
        chown(&file, Some(1234), None).unwrap();
        assert!(load().is_err());
        chown(&file, Some(0), None).unwrap();
        std::fs::write(&file, "privileged_container = true\n").unwrap();
        assert!(load().unwrap_err().to_string().contains("privileged_container"));
        std::fs::write(&file, "path_prefixes = [\"/srv/../etc\"]\n").unwrap();
        assert!(load().is_err());
        std::fs::write(&file, "screen_listen = [\"eth0\"]\n").unwrap();
        assert_eq!(load().unwrap_err().field.as_deref(), Some("screen_listen"));
        std::fs::write(&file, "screen_listen = [\"::1\"]\n").unwrap();
        assert!(load().unwrap().screens().demand("::1".parse().unwrap()).is_ok());
        std::fs::write(&file, "pool_sources = [\"srv\"]\n").unwrap();
        assert_eq!(load().unwrap_err().field.as_deref(), Some("pool_sources"));
        let mirror = "deb [signed-by=/etc/karst/mirror.gpg] http://mirror.example/ubuntu noble main universe";
        std::fs::write(&file, format!("[recipes]\nsources = [\"{mirror}\"]\n")).unwrap();
        assert_eq!(load().unwrap().recipes.sources, [mirror]);
        std::fs::write(&file, "[recipes]\nsources = [\"http://mirror.example/ubuntu\"]\n").unwrap();
        let e = load().unwrap_err();
        assert_eq!(e.field.as_deref(), Some("recipes.sources"));
        assert!(e.message.contains(FILE) && e.message.contains("noble main universe"), "{e}");
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &file).unwrap();
        assert!(load().is_err(), "never through a link");
    }
}
