//! ZFS: a tree is a data set, a disk a sparse zvol, clones are clones.
//!
//! A clone depends on the snapshot that it was made of, and that on its data set. Each clone is made of a snapshot of its own,
//! destroyed at once but deferred: it goes with the clone. What is removed while clones need it hands its snapshots to the
//! latest of them (`zfs promote`) and is gone itself, so that nothing deleted keeps space, also not an image.
//!
//! Trees need id-mapped mounts, which OpenZFS has from 2.2 on. Where the module has none, or on demand (`zfs.block_mode`), a
//! tree is a file system on a zvol.

use super::{
    Hold, Object, ObjectPool,
    backend::{Backend, FileSystem, Kept, PATIENCE, done, until},
};
use async_trait::async_trait;
use karst_host::{Program, mount, run, sandbox::Launcher, zvol};
use karst_model::{
    ByteSize, Error, Result,
    storage::{PoolKind, Usage, VolumeContent},
};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};
use uuid::Uuid;

const CONTENT: &str = "karst:content";
const FILE_SYSTEM: &str = "karst:filesystem";
/// Size of a tree on a zvol without one; it takes only what is written.
const USUAL: ByteSize = ByteSize::gib(10);

/// How a pool of ZFS is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ZfsOptions {
    /// Trees on zvols with this file system, instead of data sets.
    pub block_mode: Option<FileSystem>,
    /// `volblocksize` of zvols in bytes; `None`: the module's own.
    pub block_size: Option<u64>,
}

#[derive(Debug)]
struct Zfs {
    /// The data set that all objects are children of.
    parent: String,
    options: ZfsOptions,
}

/// What all objects of a pool inherit. The kernel does not look for partitions on disks: they are a guest's.
const INHERITED: [&str; 6] =
    ["mountpoint=legacy", "canmount=noauto", "acltype=posixacl", "xattr=sa", "atime=off", "volmode=dev"];

/// Opens the pool in the data set `parent`, which is made when it is not there; `root` is a directory for its mounts.
///
/// # Errors
/// The program is missing, or ZFS refuses.
pub async fn open(
    parent: &str,
    root: impl Into<PathBuf>,
    options: ZfsOptions,
    worker: Launcher,
    hold: Arc<Hold>,
) -> Result<ObjectPool> {
    let found = zfs(["list", "-H", "-o", "name", parent]).output().await?;
    if found.code != 0 {
        let set = INHERITED.iter().flat_map(|p| ["-o", p]);
        done(zfs(["create"]).args(set).arg(parent)).await?;
    }
    let backend = Arc::new(Zfs { parent: parent.to_owned(), options });
    ObjectPool::open(root.into(), backend, worker, hold).await
}

/// Opens the pool in the data set `parent` to look at what it has, and changes nothing.
///
/// # Errors
/// The program is missing, or there is no such data set.
pub async fn look(
    parent: &str,
    root: impl Into<PathBuf>,
    worker: Launcher,
    hold: Arc<Hold>,
) -> Result<ObjectPool> {
    done(zfs(["list", "-H", "-o", "name", parent])).await?;
    let backend = Arc::new(Zfs { parent: parent.to_owned(), options: ZfsOptions::default() });
    Ok(ObjectPool::look(root.into(), backend, worker, hold))
}

/// Removes the data set `parent` and all that is in it; one that is not there is gone already.
///
/// # Errors
/// Something in it is in use.
pub async fn clear(parent: &str) -> Result<()> {
    gone(done(zfs(["destroy", "-r", parent])).await).map(drop)
}

/// Can the module map the ids of mounts? From OpenZFS 2.2 on.
pub fn maps_ids() -> bool {
    let version = std::fs::read_to_string("/sys/module/zfs/version").unwrap_or_default();
    let mut parts = version.split(['.', '-']).map(|p| p.parse::<u32>().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (2, 2)
}

fn zfs<'a>(args: impl IntoIterator<Item = &'a str>) -> karst_host::Command {
    run(Program::Zfs).args(args).timeout(PATIENCE).output_cap(64 << 20)
}

/// Failures in ZFS' words.
fn said(e: &Error, words: &str) -> bool {
    e.context.as_ref().is_some_and(|c| c.contains(words))
}

/// What is not there is gone; what is in use says so.
fn gone(outcome: Result<String>) -> Result<bool> {
    match outcome {
        Ok(_) => Ok(true),
        Err(e) if said(&e, "does not exist") || said(&e, "could not find any snapshots") => Ok(true),
        Err(e) if said(&e, "busy") => {
            Err(Error::conflict("the volume is still in use").with_context(e.context.unwrap_or_default()))
        }
        Err(e) => Err(e),
    }
}

impl Zfs {
    fn name(&self, object: Object) -> String {
        format!("{}/{}", self.parent, object.text())
    }

    /// In whole blocks of the zvol, of which none is larger than this.
    fn step(&self) -> u64 {
        self.options.block_size.unwrap_or(0).max(64 << 10)
    }

    fn properties(&self, kept: Kept) -> Vec<String> {
        let mut set = vec![format!("{CONTENT}={}", kept.content.as_str())];
        match (kept.on, kept.content.is_disk()) {
            (None, false) => {
                let limit = kept.size.map_or("none".to_owned(), |s| s.0.to_string());
                set.push(format!("refquota={limit}"));
            }
            (Some(on), _) => set.push(format!("{FILE_SYSTEM}={}", on.as_str())),
            (None, true) => {}
        }
        set.into_iter().flat_map(|p| ["-o".to_owned(), p]).collect()
    }

    async fn rows(&self, what: &[&str]) -> Result<Vec<(Object, Kept)>> {
        let columns = format!("name,{CONTENT},{FILE_SYSTEM},volsize,refquota");
        let fixed = ["list", "-Hp", "-t", "filesystem,volume", "-o", &columns];
        let out = done(zfs(fixed).args(what)).await?;
        Ok(out.lines().filter_map(|line| row(&self.parent, line)).collect())
    }

    /// The clone that takes over what `name` cannot take with it.
    async fn heir(&self, name: &str) -> Result<Option<String>> {
        let list = ["list", "-Hp", "-t", "snapshot", "-d", "1", "-s", "createtxg", "-o", "clones", name];
        let out = done(zfs(list)).await?;
        let last = out.lines().rev().map(str::trim).find(|c| !c.is_empty() && *c != "-");
        Ok(last.and_then(|clones| clones.split(',').next()).map(str::to_owned))
    }
}

/// A snapshot that a clone was to be made of, and that nobody gave up: by a line of the list. Those of others are left alone.
fn left<'a>(parent: &str, line: &'a str) -> Option<&'a str> {
    let (name, deferred) = line.split_once('\t')?;
    let (of, snapshot) = name.strip_prefix(parent)?.strip_prefix('/')?.split_once('@')?;
    Object::parse(of)?;
    let ours = snapshot.len() == 32 && snapshot.parse::<Uuid>().is_ok();
    (ours && deferred == "off").then_some(name)
}

/// A line of `zfs list`.
fn row(parent: &str, line: &str) -> Option<(Object, Kept)> {
    let mut fields = line.split('\t');
    let name = fields.next()?.strip_prefix(parent)?.strip_prefix('/')?;
    let object = Object::parse(name)?;
    let content = match fields.next()? {
        "filesystem" => VolumeContent::Filesystem,
        "block" => VolumeContent::Block,
        "iso" => VolumeContent::Iso,
        _ => return None,
    };
    let on = FileSystem::parse(fields.next()?);
    let number = |text: &str| text.parse::<u64>().ok().filter(|n| *n > 0).map(ByteSize);
    let (volume, limit) = (number(fields.next()?), number(fields.next()?));
    Some((object, Kept { content, on, size: volume.or(limit) }))
}

#[async_trait]
impl Backend for Zfs {
    fn kind(&self) -> PoolKind {
        PoolKind::Zfs
    }

    async fn list(&self) -> Result<Vec<(Object, Kept)>> {
        self.rows(&["-d", "1", &self.parent]).await
    }

    async fn find(&self, object: Object) -> Result<Option<Kept>> {
        match self.rows(&[&self.name(object)]).await {
            Ok(rows) => Ok(rows.first().map(|(_, kept)| *kept)),
            Err(e) if said(&e, "does not exist") => Ok(None),
            Err(e) => Err(e),
        }
    }

    async fn tidy(&self) -> Result<()> {
        let list = ["list", "-Hp", "-t", "snapshot", "-d", "2", "-o", "name,defer_destroy", &self.parent];
        let out = done(zfs(list)).await?;
        for snapshot in out.lines().filter_map(|line| left(&self.parent, line)) {
            gone(done(zfs(["destroy", "-d", snapshot])).await)?;
        }
        Ok(())
    }

    fn texts(&self) -> Kept {
        Kept { content: VolumeContent::Filesystem, size: None, on: None }
    }

    fn tree(&self, size: Option<ByteSize>) -> Kept {
        let on = self.options.block_mode;
        let size = if on.is_some() { Some(size.unwrap_or(USUAL)) } else { size };
        Kept { content: VolumeContent::Filesystem, size, on }
    }

    async fn make(&self, object: Object, kept: Kept) -> Result<()> {
        let mut create = zfs(["create"]).args(self.properties(kept));
        if kept.on.is_some() || kept.content.is_disk() {
            let size = kept.size.unwrap_or_default().0.next_multiple_of(self.step());
            create = create.args(["-s", "-V", &size.to_string()]);
            if let Some(block) = self.options.block_size {
                create = create.args(["-b", &block.to_string()]);
            }
        }
        done(create.arg(self.name(object))).await.map(drop)
    }

    async fn clone(&self, from: Object, to: Object, kept: Kept) -> Result<()> {
        let snapshot = format!("{}@{}", self.name(from), Uuid::new_v4().simple());
        let taking = zfs(["snapshot", &snapshot]);
        let cloning = zfs(["clone"]).args(self.properties(kept)).arg(&snapshot).arg(self.name(to));
        // As one, whoever stops waiting for it: what is taken and not given up keeps space.
        let cloned = tokio::spawn(async move {
            done(taking).await?;
            let cloned = done(cloning).await;
            // Deferred: it goes with its clone, or now where there is none.
            gone(done(zfs(["destroy", "-d", &snapshot])).await)?;
            cloned.map(drop)
        });
        cloned.await.map_err(|e| Error::internal("a task ended unexpectedly", e))?
    }

    async fn rename(&self, from: Object, to: Object) -> Result<()> {
        let (before, after) = (self.name(from), self.name(to));
        let asked = before.clone();
        let device = super::blocking(move || Ok(zvol::find(&asked, false))).await?;
        done(zfs(["rename", &before, &after])).await?;
        let Some(device) = device else { return Ok(()) };
        // The kernel tells a zvol its new name a moment later: until then it would be found by the old one.
        until(|_| {
            let (device, before) = (device.clone(), before.clone());
            super::blocking(move || {
                let still = zvol::name(&device).is_ok_and(|n| n == before);
                Ok((!still).then_some(()))
            })
        })
        .await
    }

    async fn remove(&self, object: Object) -> Result<bool> {
        let name = self.name(object);
        for _ in 0..16 {
            match done(zfs(["destroy", "-r", &name])).await {
                Err(e) if said(&e, "dependent clones") => {
                    let Some(heir) = self.heir(&name).await? else { return Ok(false) };
                    done(zfs(["promote", &heir])).await?;
                }
                other => return gone(other),
            }
        }
        Ok(false)
    }

    async fn resize(&self, object: Object, kept: Kept) -> Result<()> {
        let value = match (kept.size, kept.on.is_some() || kept.content.is_disk()) {
            (Some(size), true) => format!("volsize={}", size.0.next_multiple_of(self.step())),
            (Some(size), false) => format!("refquota={}", size.0),
            (None, _) => "refquota=none".to_owned(),
        };
        done(zfs(["set", &value, &self.name(object)])).await.map(drop)
    }

    async fn rounded(&self, size: ByteSize) -> Result<ByteSize> {
        Ok(ByteSize(size.0.next_multiple_of(self.step())))
    }

    async fn device(&self, object: Object) -> Result<PathBuf> {
        let name = self.name(object);
        // All zvols are asked now and then only: there may be many, and the link is there as a rule.
        until(|tried| {
            let name = name.clone();
            super::blocking(move || Ok(zvol::find(&name, tried % 20 == 10)))
        })
        .await
    }

    async fn mount(&self, object: Object, at: &Path, read_only: bool) -> Result<()> {
        let (name, at) = (PathBuf::from(self.name(object)), at.to_owned());
        let mount = if read_only { mount::mount_read_only } else { mount::mount };
        super::blocking(move || Ok(mount(&name, &at, "zfs", "")?)).await
    }

    async fn used(&self, object: Object, _: Kept) -> Result<u64> {
        let out = done(zfs(["list", "-Hp", "-o", "referenced", &self.name(object)])).await?;
        Ok(out.trim().parse().unwrap_or(0))
    }

    async fn space(&self) -> Result<Usage> {
        let out = done(zfs(["list", "-Hp", "-o", "used,available", &self.parent])).await?;
        let mut numbers = out.split_whitespace().map(|n| n.parse::<u64>().unwrap_or(0));
        let (used, available) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        Ok(Usage { used, total: used + available, ..Usage::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::VolumeId;

    #[test]
    fn only_snapshots_of_our_own_that_nobody_gave_up_are_left() {
        let volume = Object::Volume(VolumeId(Uuid::from_u128(5))).text();
        let taken = Uuid::from_u128(7).simple();
        let ours = format!("tank/k/{volume}@{taken}");
        assert_eq!(left("tank/k", &format!("{ours}\toff")), Some(&*ours));
        for other in [
            format!("{ours}\ton"),
            format!("tank/k@{taken}\toff"),
            format!("tank/k/theirs@{taken}\toff"),
            format!("tank/other/{volume}@{taken}\toff"),
            format!("tank/k/{volume}@daily-2026\toff"),
            String::new(),
        ] {
            assert_eq!(left("tank/k", &other), None, "{other}");
        }
    }

    #[test]
    fn lines_of_the_list_are_read() {
        let v = VolumeId(Uuid::from_u128(5));
        let name = format!("tank/k/{}", Object::Volume(v).text());
        let read = |rest: &str| {
            row("tank/k", &format!("{name}\t{rest}")).map(|(object, kept)| {
                assert_eq!(object, Object::Volume(v));
                kept
            })
        };
        let tree = |size, on| Kept { content: VolumeContent::Filesystem, size, on };
        assert_eq!(read("filesystem\t-\t-\t0"), Some(tree(None, None)));
        assert_eq!(read("filesystem\t-\t-\t8192"), Some(tree(Some(ByteSize(8192)), None)));
        assert_eq!(
            read("filesystem\text4\t65536\t-"),
            Some(tree(Some(ByteSize(65536)), Some(FileSystem::Ext4)))
        );
        let disc = Kept { content: VolumeContent::Iso, size: Some(ByteSize(65536)), on: None };
        assert_eq!(read("iso\t-\t65536\t-"), Some(disc));
        assert_eq!(read("-\t-\t-\t0"), None, "not made by us");
        assert_eq!(row("tank/k", "tank/k\tfilesystem\t-\t-\t0"), None);
        assert_eq!(row("tank/k", "tank/kx/volume_1\tfilesystem\t-\t-\t0"), None);
    }
}
