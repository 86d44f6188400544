//! Where pools of ZFS and LVM lie: a zpool or volume group of their own in a sparse file or on a granted device, or a part of
//! one that is there and that the host's policy grants by name.
//!
//! A zpool or group that is made is named after the pool's id, and the file that it is in gets its name when it is whole: an
//! interrupted call knows its own work. Of a granted data set or group only what carries the pool's id is ever touched.
//! Whoever touches it holds the pool's lock, which all daemons of the machine see.

use crate::{
    agent::blocking,
    pool_kinds,
    pools::{Granted, PoolPlace, Purpose, not_there},
};
use karst_host::{Command, Program, mount, run};
use karst_model::{
    Error, ErrorKind, PoolId, Result,
    spec::{PoolOptions, PoolSource, PoolSpec},
    storage::PoolKind,
};
use karst_storage::{
    Hold, ObjectPool, hold_by_id,
    objects::{FileSystem, lvm, zfs},
};
use std::{
    fs::File,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

/// Name of the thin pool in a group of our own.
const THIN_POOL: &str = "thin";

fn command(program: Program) -> Command {
    run(program).timeout(Duration::from_secs(900))
}

async fn succeeds(command: Command) -> Result<bool> {
    Ok(command.output().await?.code == 0)
}

/// How often what is in use is tried again, and how long apart: mounts and disks of guests go some time after their processes.
const TRIES: u32 = 30;
const PAUSE: Duration = Duration::from_millis(500);

/// Does it until what was in use a moment ago is so no more.
async fn patiently<F: Future<Output = Result<()>>>(act: impl Fn() -> F) -> Result<()> {
    let words = ["busy", "in use", "used by another", "is open"];
    let in_use = |e: &Error| {
        e.is(ErrorKind::Conflict)
            || e.context.as_ref().is_some_and(|context| words.iter().any(|w| context.contains(w)))
    };
    for _ in 1..TRIES {
        match act().await {
            Err(e) if in_use(&e) => tokio::time::sleep(PAUSE).await,
            other => return other,
        }
    }
    act().await
}

fn options(options: &PoolOptions) -> zfs::ZfsOptions {
    // Containers need id-mapped mounts of their trees.
    let block_mode = options.block_mode.unwrap_or(!zfs::maps_ids());
    zfs::ZfsOptions {
        block_mode: block_mode.then(|| file_system(options)),
        block_size: options.block_size.map(|s| s.bytes()),
    }
}

fn file_system(options: &PoolOptions) -> FileSystem {
    options.file_system.as_deref().and_then(FileSystem::parse).unwrap_or(FileSystem::Ext4)
}

/// What makes and grows file systems of volumes, where these lie on devices.
fn demand_tools(options: &PoolOptions) -> Result<()> {
    let programs = match file_system(options) {
        FileSystem::Ext4 => [Program::MkfsExt4, Program::Resize2fs],
        FileSystem::Xfs => [Program::MkfsXfs, Program::XfsGrowfs],
    };
    programs.iter().try_for_each(|program| program.path().map(drop))
}

/// A group of ours is active when we open it, not from the start of the host, which would also keep a copy of its description in
/// /etc. Tools before 2.03.12 do not know how: there it is as LVM has it.
async fn opened_by_us_alone(place: &lvm::LvmPlace) -> Result<()> {
    succeeds(place.command(["vgchange", "--setautoactivation", "n", &place.group])).await.map(drop)
}

/// Where the labels of a zpool are that was made on `from`: on a whole disk ZFS makes partitions, and is in the first.
fn label_places(from: &Path) -> Vec<PathBuf> {
    let real = std::fs::canonicalize(from).unwrap_or_else(|_| from.to_owned());
    let mut partition = real.clone().into_os_string();
    if real.to_string_lossy().ends_with(|c: char| c.is_ascii_digit()) {
        partition.push("p");
    }
    partition.push("1");
    let partition = PathBuf::from(partition);
    let is_device = |p: &Path| std::fs::metadata(p).is_ok_and(|m| m.file_type().is_block_device());
    let partition = (is_device(&real) && is_device(&partition)).then_some(partition);
    std::iter::once(real).chain(partition).collect()
}

fn occupied(device: &Path) -> impl FnOnce(Error) -> Error {
    let device = device.display().to_string();
    move |e| {
        Error::conflict(format!(
            "{device} is in use or holds something; if it may be lost, clear it first (wipefs -a)"
        ))
        .at("source")
        .with_context(e.context.unwrap_or_default())
    }
}

/// Name of a zpool of ours, and of a data set in a granted one.
fn zfs_name(id: PoolId) -> String {
    format!("karst-{id}")
}

/// Name of a group of ours.
fn group_name(id: PoolId) -> String {
    lvm::own_group(id.0)
}

/// Name of a thin pool of ours in a granted group.
fn thin_name(id: PoolId) -> String {
    format!("karst_{}", short(id))
}

fn short(id: PoolId) -> String {
    id.0.simple().to_string()[..12].to_owned()
}

/// Pools that were made in a source, whoever made them. What they say of themselves is not to be had without opening them.
pub(crate) async fn at(
    source: String,
    kind: PoolKind,
    granted: Granted,
) -> Result<Vec<(PoolSpec, Option<String>)>> {
    pool_kinds::ready(kind).await?;
    let found = match (kind, granted) {
        (PoolKind::Zfs, granted) => zfs_at(granted).await?.into_iter().map(|id| (id, None)).collect(),
        (_, granted) => lvm_at(granted).await?,
    };
    let mut specs: Vec<_> = found
        .into_iter()
        .map(|(id, thin_pool)| PoolSpec {
            source: PoolSource::Granted { source: source.clone() },
            options: PoolOptions { thin_pool, ..PoolOptions::default() },
            ..PoolSpec::own(id, kind)
        })
        .collect();
    specs.sort_by_key(|spec| spec.id);
    specs.dedup_by_key(|spec| spec.id);
    Ok(specs.into_iter().map(|spec| (spec, None)).collect())
}

async fn zfs_at(granted: Granted) -> Result<Vec<PoolId>> {
    let ours = |name: &str| name.strip_prefix("karst-").and_then(|id| id.parse().ok());
    match granted {
        Granted::Directory(_) => Ok(vec![]),
        Granted::Name(parent) => {
            let list = ["list", "-H", "-d", "1", "-t", "filesystem", "-o", "name", &parent];
            let out = command(Program::Zfs).args(list).ok().await?;
            let out = String::from_utf8_lossy(&out).into_owned();
            let children = out.lines().filter_map(|l| l.strip_prefix(&parent)?.strip_prefix('/'));
            Ok(children.filter_map(ours).collect())
        }
        Granted::Device(device) => {
            let mut found = vec![];
            // Those that are imported, by the device that they are on, and those that could be.
            let listed = command(Program::Zpool).args(["list", "-H", "-P", "-L", "-v"]).output().await?;
            let places: Vec<String> = label_places(&device).iter().map(|p| p.display().to_string()).collect();
            let mut pool = None;
            for line in String::from_utf8_lossy(&listed.stdout).lines() {
                let first = line.split_whitespace().next().unwrap_or_default();
                if !line.starts_with(char::is_whitespace) {
                    pool = ours(first);
                } else if places.iter().any(|p| p == first) {
                    found.extend(pool);
                }
            }
            let mut import = command(Program::Zpool).arg("import");
            for place in label_places(&device) {
                import = import.arg("-d").arg(place);
            }
            let out = import.output().await?; // none to be had is said by its code
            let out = String::from_utf8_lossy(&out.stdout).into_owned();
            found.extend(out.lines().filter_map(|l| ours(l.trim().strip_prefix("pool:")?.trim())));
            Ok(found)
        }
    }
}

async fn lvm_at(granted: Granted) -> Result<Vec<(PoolId, Option<String>)>> {
    let (group, named) = match granted {
        Granted::Directory(_) => return Ok(vec![]),
        Granted::Name(group) => (group, true),
        Granted::Device(device) => {
            let list = command(Program::Lvm).args(["pvs", "--noheadings", "-o", "vg_name"]).arg(device);
            let out = list.output().await?;
            match String::from_utf8_lossy(&out.stdout).trim() {
                "" => return Ok(vec![]),
                group => (group.to_owned(), false),
            }
        }
    };
    let found = lvm::pools(&group).await?.into_iter().map(|(id, thin)| (PoolId(id), thin));
    // On a device a pool has a group of its own, and its thin pool one name.
    let ours = found.filter(|(id, _)| named || group == group_name(*id));
    Ok(ours.map(|(id, thin)| (id, (named && thin != thin_name(id)).then_some(thin))).collect())
}

impl PoolPlace {
    pub(crate) fn zpool(&self) -> String {
        zfs_name(self.id())
    }

    async fn hold(&self) -> Result<Arc<Hold>> {
        let id = self.id().0;
        blocking(move || hold_by_id(id)).await
    }

    /// The data set of all that is in the pool.
    fn data_set(&self, spec: &PoolSpec) -> String {
        match &spec.source {
            PoolSource::Granted { source } if !source.starts_with('/') => {
                format!("{source}/{}", self.zpool())
            }
            _ => format!("{}/karst", self.zpool()),
        }
    }

    /// Opens it for `purpose`.
    pub(crate) async fn open_zfs(
        &self,
        spec: &PoolSpec,
        granted: Option<Granted>,
        purpose: Purpose,
    ) -> Result<ObjectPool> {
        pool_kinds::ready(PoolKind::Zfs).await?;
        demand_tools(&spec.options)?;
        let hold = self.hold().await?;
        let make = purpose == Purpose::Make;
        let name = self.zpool();
        let mut there = match &granted {
            Some(Granted::Name(parent)) => {
                if !succeeds(command(Program::Zfs).args(["list", "-H", "-o", "name", parent])).await? {
                    return Err(Error::invalid("source", format!("{parent:?} is no data set of this host")));
                }
                true
            }
            _ => succeeds(command(Program::Zpool).args(["list", "-H", &name])).await?,
        };
        let fresh = self.image().with_extension("img.new");
        if there && make && granted.is_none() && !self.image().exists() && fresh.exists() {
            // An interrupted call made it, and its file has not got its name.
            command(Program::Zpool).args(["export", &name]).ok().await?;
            self.finish_image(fresh).await?;
            there = false;
        }
        match granted {
            _ if there => {}
            Some(Granted::Device(device)) => {
                if !self.imported(&device, purpose).await? {
                    if !make {
                        return Err(not_there(device.display()));
                    }
                    self.make_zpool(&device).await.map_err(occupied(&device))?;
                }
            }
            _ => {
                if !self.image().exists() {
                    let fresh = self.fresh_image(spec).await?;
                    self.make_zpool(&fresh).await?;
                    command(Program::Zpool).args(["export", &name]).ok().await?;
                    self.finish_image(fresh).await?;
                }
                if !self.imported(self.image(), purpose).await? {
                    return Err(Error::unavailable("the pool's file holds no zpool that can be imported"));
                }
            }
        }
        let parent = self.data_set(spec);
        if !make && !succeeds(command(Program::Zfs).args(["list", "-H", "-o", "name", &parent])).await? {
            return Err(not_there(parent));
        }
        let launcher = self.launcher().clone();
        if purpose == Purpose::Look {
            return zfs::look(&parent, self.directory(), launcher, hold).await;
        }
        zfs::open(&parent, self.directory(), options(&spec.options), launcher, hold).await
    }

    async fn make_zpool(&self, on: &Path) -> Result<()> {
        // Imported by us alone: not by the host at its start, which does not know the file yet.
        let create =
            ["create", "-m", "none", "-o", "cachefile=none", "-O", "compression=on", "-O", "atime=off"];
        command(Program::Zpool).args(create).arg(self.zpool()).arg(on).ok().await.map(drop)
    }

    async fn imported(&self, from: &Path, purpose: Purpose) -> Result<bool> {
        let mut import = command(Program::Zpool).args(["import", "-N", "-f", "-o", "cachefile=none"]);
        if purpose == Purpose::Look {
            import = import.args(["-o", "readonly=on"]);
        }
        for place in label_places(from) {
            import = import.arg("-d").arg(place);
        }
        succeeds(import.arg(self.zpool())).await
    }

    pub(crate) fn group(&self, spec: &PoolSpec) -> lvm::LvmPlace {
        let id = self.id();
        let named = spec.options.thin_pool.clone();
        let (group, thin_pool) = match &spec.source {
            PoolSource::Granted { source } if !source.starts_with('/') => {
                (source.clone(), named.unwrap_or_else(|| thin_name(id)))
            }
            _ => (group_name(id), named.unwrap_or_else(|| THIN_POOL.to_owned())),
        };
        lvm::LvmPlace { group, thin_pool, id: id.0 }
    }

    async fn group_there(&self, group: &str) -> Result<bool> {
        succeeds(command(Program::Lvm).args(["vgs", "--noheadings", "-o", "vg_name", group])).await
    }

    /// Opens it for `purpose`.
    pub(crate) async fn open_lvm(
        &self,
        spec: &PoolSpec,
        granted: Option<Granted>,
        purpose: Purpose,
    ) -> Result<ObjectPool> {
        pool_kinds::ready(PoolKind::Lvm).await?;
        demand_tools(&spec.options)?;
        let hold = self.hold().await?;
        let make = purpose == Purpose::Make;
        let place = self.group(spec);
        // The loop device is held by what is active on it, from when that is.
        let mut held = None;
        match granted {
            _ if self.group_there(&place.group).await? => {}
            Some(Granted::Name(name)) => {
                return Err(Error::invalid("source", format!("{name:?} is no volume group of this host")));
            }
            Some(Granted::Device(device)) if !make => return Err(not_there(device.display())),
            Some(Granted::Device(device)) => {
                // It asks before it overwrites anything, and nobody answers.
                let create = place.command(["vgcreate", &place.group]).arg(&device);
                create.ok().await.map_err(occupied(&device))?;
                opened_by_us_alone(&place).await?;
            }
            _ => {
                let (file, make) = match self.image().exists() {
                    true => (self.image().to_owned(), false),
                    false => (self.fresh_image(spec).await?, true),
                };
                let attached = file.clone();
                let device = blocking(move || {
                    mount::attach(&attached).map_err(|e| {
                        Error::unsupported("this host has no loop devices for the pool's file")
                            .with_context(e)
                    })
                })
                .await?;
                if make {
                    place.command(["vgcreate", &place.group]).arg(&device.path).ok().await?;
                    opened_by_us_alone(&place).await?;
                    self.finish_image(file).await?;
                } else {
                    // Where nobody runs udev nothing has told LVM of the device.
                    let scan = command(Program::Lvm).args(["pvscan", "--cache"]).arg(&device.path);
                    scan.ok().await?;
                }
                held = Some(device);
            }
        }
        let (on, launcher) = (file_system(&spec.options), self.launcher().clone());
        let opened = match purpose {
            Purpose::Look => lvm::look(place, self.directory(), launcher, hold).await,
            _ => lvm::open(place, self.directory(), on, launcher, hold).await,
        };
        drop(held);
        opened
    }

    /// Takes the mounts and devices of a pool away; its content stays.
    pub(crate) async fn close_objects(&self, spec: &PoolSpec) -> Result<()> {
        self.unmount_volumes().await?;
        let _hold = match self.hold().await {
            // It is open, and another daemon's.
            Err(e) if e.is(ErrorKind::Conflict) => return Ok(()),
            other => other?,
        };
        let own = matches!(&spec.source, PoolSource::Own { .. })
            || matches!(&spec.source, PoolSource::Granted { source } if source.starts_with('/'));
        if spec.kind == PoolKind::Lvm {
            let place = self.group(spec);
            if self.group_there(&place.group).await? {
                let close = || async {
                    let close = match own {
                        true => place.command(["vgchange", "-an", &place.group]),
                        false => place.command(["lvchange", "-an", &place.selector()]),
                    };
                    close.ok().await.map(drop)
                };
                patiently(close).await?;
            }
        } else if own && succeeds(command(Program::Zpool).args(["list", "-H", &self.zpool()])).await? {
            let name = self.zpool();
            let export = || async { command(Program::Zpool).args(["export", &name]).ok().await.map(drop) };
            patiently(export).await?;
        }
        // Of a pool that was only looked at nothing else is here.
        for place in [self.directory().join("meta"), self.directory().to_owned()] {
            let _ = tokio::fs::remove_dir(place).await; // it is not empty
        }
        Ok(())
    }

    /// Removes what the pool made of its source, and only that.
    pub(crate) async fn remove_objects(&self, spec: &PoolSpec) -> Result<()> {
        self.unmount_volumes().await?;
        let _hold = self.hold().await?;
        // Each finds what it has removed already.
        match spec.kind {
            PoolKind::Lvm => patiently(|| self.remove_lvm(spec)).await,
            _ => patiently(|| self.remove_zfs(spec)).await,
        }
    }

    async fn remove_zfs(&self, spec: &PoolSpec) -> Result<()> {
        match &spec.source {
            PoolSource::Granted { source } if !source.starts_with('/') => {
                zfs::clear(&self.data_set(spec)).await
            }
            _ => {
                let name = self.zpool();
                if let PoolSource::Granted { source } = &spec.source {
                    // One that could not be opened at the start is ours all the same.
                    let listed = command(Program::Zpool).args(["list", "-H", &name]);
                    if !succeeds(listed).await? && Path::new(source).exists() {
                        self.imported(Path::new(source), Purpose::Use).await?;
                    }
                }
                if succeeds(command(Program::Zpool).args(["list", "-H", &name])).await? {
                    command(Program::Zpool).args(["destroy", &name]).ok().await?;
                }
                Ok(())
            }
        }
    }

    async fn remove_lvm(&self, spec: &PoolSpec) -> Result<()> {
        let place = self.group(spec);
        // The loop device goes with what is last open of it, and what LVM knows of the group with that.
        let image = self.image().to_owned();
        let held = blocking(move || Ok(mount::attached(&image).and_then(|device| File::open(device).ok())));
        let _held = held.await?;
        lvm::clear(&place).await?;
        let device = match &spec.source {
            PoolSource::Granted { source } if !source.starts_with('/') => return Ok(()),
            PoolSource::Granted { source } => Some(source.clone()),
            PoolSource::Own { .. } => None,
        };
        if self.group_there(&place.group).await? {
            place.command(["vgremove", "-f", &place.group]).ok().await?;
        }
        if let Some(device) = device
            && succeeds(command(Program::Lvm).args(["pvs", "-S", "vg_name=\"\"", &device])).await?
        {
            command(Program::Lvm).args(["pvremove", &device]).ok().await?;
        }
        Ok(())
    }

    /// Unmounts whatever volumes are mounted below the pool's directory.
    async fn unmount_volumes(&self) -> Result<()> {
        let directory = self.directory().to_owned();
        blocking(move || {
            let mut places = vec![directory.join("meta")];
            for below in ["volumes", "work"] {
                let Ok(entries) = std::fs::read_dir(directory.join(below)) else { continue };
                places.extend(entries.flatten().map(|entry| entry.path()));
            }
            for place in places {
                if mount::unmount(&place, false).is_err() {
                    mount::unmount(&place, true)?;
                }
            }
            Ok(())
        })
        .await
    }
}
