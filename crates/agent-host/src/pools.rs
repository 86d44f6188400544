//! Where pools lie on this host, how they are made usable, and how they leave nothing.
//!
//! ```text
//! DIR/host/pools/ID/       a dir pool, or where a pool is mounted
//! DIR/host/pools/ID.img    its file system, in a sparse file
//! SOURCE/karst-ID/         a pool in a directory that the host's policy grants
//! ```
//! The pool's record is written before anything is made. Each step finds what an interrupted one left: a file system is
//! made in `ID.img.new` and gets its name when it is whole; on a block device it carries the pool's id as its own; a mount
//! that is there already is used. Of what is granted only that is ever removed that carries the pool's id.

use crate::{HostPolicy, agent::blocking};
use karst_host::{
    Program,
    mount::{self, is_mount_point},
    run,
    sandbox::Launcher,
};
use karst_model::{
    Error, PoolId, Result,
    spec::{PoolSource, PoolSpec},
    storage::PoolKind,
};
use karst_storage::{FilePool, PoolDriver};
use std::{
    fs::File,
    os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

/// Smallest file system that is worth its name; btrfs refuses less than about 110 MiB.
const SMALLEST: u64 = 256 << 20;
/// Where btrfs keeps its first superblock, and in it the file system's id and the magic number.
const SUPERBLOCK: u64 = 64 << 10;
const MAGIC: &[u8; 8] = b"_BHRfS_M";

/// A pool's place.
#[derive(Debug, Clone)]
pub(crate) struct PoolPlace {
    id: PoolId,
    directory: PathBuf,
    image: PathBuf,
    launcher: Launcher,
}

/// What a pool is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To use it; what is missing is made.
    Make,
    /// To use it; what is missing is an error, because what was once made is only hidden, by a file system that is not
    /// mounted, say.
    Use,
    /// To see what it has, and change nothing.
    Look,
}

/// What a granted source is.
pub(crate) enum Granted {
    Directory(PathBuf),
    Device(PathBuf),
    /// A data set or volume group.
    Name(String),
}

impl PoolPlace {
    pub fn new(pools: &Path, id: PoolId, launcher: Launcher) -> Self {
        let directory = pools.join(id.0.to_string());
        Self { id, image: directory.with_extension("img"), directory, launcher }
    }

    pub(crate) fn id(&self) -> PoolId {
        self.id
    }
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }
    pub(crate) fn image(&self) -> &Path {
        &self.image
    }
    pub(crate) fn launcher(&self) -> &Launcher {
        &self.launcher
    }

    /// Opens it for `purpose`.
    pub async fn open(
        &self,
        spec: &PoolSpec,
        policy: &HostPolicy,
        purpose: Purpose,
    ) -> Result<Arc<dyn PoolDriver>> {
        let source = match &spec.source {
            PoolSource::Own { .. } => None,
            PoolSource::Granted { source } => {
                policy.check_pool_source(spec.kind, source)?;
                if source.starts_with('/') {
                    crate::reach::answers(Path::new(source)).await?;
                }
                Some(look(spec.kind, source).await?)
            }
        };
        if purpose != Purpose::Make {
            self.demand_made(spec.kind, source.as_ref())?;
        }
        let launcher = self.launcher.clone();
        let root = match (spec.kind, source) {
            (PoolKind::Zfs | PoolKind::Lvm, Some(Granted::Directory(_))) => {
                return Err(Error::invalid(
                    "source",
                    "a pool of this kind lies on a block device or in something of its own kind, not in a directory",
                ));
            }
            (PoolKind::Zfs, source) => {
                make_directory(self.directory.clone()).await?;
                return Ok(Arc::new(self.open_zfs(spec, source, purpose).await?));
            }
            (PoolKind::Lvm, source) => {
                make_directory(self.directory.clone()).await?;
                return Ok(Arc::new(self.open_lvm(spec, source, purpose).await?));
            }
            (_, Some(Granted::Name(name))) => {
                return Err(Error::invalid("source", format!("{name:?} is not an absolute path")));
            }
            (PoolKind::Dir, None) => self.directory.clone(),
            (PoolKind::Dir | PoolKind::Btrfs, Some(Granted::Directory(source))) => {
                let place = self.within(&source);
                make_directory(place.clone()).await?;
                place
            }
            (PoolKind::Dir, Some(Granted::Device(_))) => {
                return Err(Error::invalid("source", "a dir pool lies in a directory, not on a device"));
            }
            (PoolKind::Btrfs, device) => {
                make_directory(self.directory.clone()).await?;
                if !is_mount_point(&self.directory)? {
                    match device {
                        Some(Granted::Device(device)) => {
                            self.make_on_device(&device).await?;
                            self.mount_device(device).await?;
                        }
                        _ => {
                            self.make_image(spec).await?;
                            self.mount_image().await?;
                        }
                    }
                }
                self.directory.clone()
            }
        };
        Ok(match spec.kind {
            kind if purpose == Purpose::Look => Arc::new(FilePool::look(kind, root, launcher).await?),
            PoolKind::Btrfs => Arc::new(FilePool::btrfs(root, launcher).await?),
            _ => Arc::new(FilePool::directory(root, launcher).await?),
        })
    }

    /// Refuses a pool of which nothing is there.
    fn demand_made(&self, kind: PoolKind, source: Option<&Granted>) -> Result<()> {
        let (there, place) = match (kind, source) {
            // What is not in a file of ours is looked for when it is opened.
            (PoolKind::Zfs | PoolKind::Lvm, Some(_)) | (_, Some(Granted::Name(_))) => return Ok(()),
            (_, Some(Granted::Directory(source))) => (self.within(source).is_dir(), self.within(source)),
            (_, Some(Granted::Device(device))) => (self.is_ours(device)?, device.clone()),
            (PoolKind::Dir, None) => (self.directory.is_dir(), self.directory.clone()),
            (_, None) => (self.image.is_file(), self.image.clone()),
        };
        if there {
            return Ok(());
        }
        Err(not_there(place.display()))
    }

    fn within(&self, source: &Path) -> PathBuf {
        source.join(format!("karst-{}", self.id))
    }

    /// Pools that were made in a source, whoever made them, each with what it says of itself where that can be read as it
    /// is. Nothing says of what kind a pool in a directory is: it is taken to be of `kind`, and opening it tells.
    pub async fn at(source: String, kind: PoolKind) -> Result<Vec<(PoolSpec, Option<String>)>> {
        let granted = look(kind, &source).await?;
        if kind.has_names() {
            return crate::block_pools::at(source, kind, granted).await;
        }
        blocking(move || {
            let granted_source = || PoolSource::Granted { source: source.clone() };
            let spec = |id| PoolSpec { source: granted_source(), ..PoolSpec::own(id, kind) };
            let mut found = vec![];
            match granted {
                Granted::Device(device) => {
                    let mut block = [0u8; 4096];
                    File::open(device)?.read_exact_at(&mut block, SUPERBLOCK)?;
                    if &block[0x40..0x48] == MAGIC && kind == PoolKind::Btrfs {
                        let id = uuid::Uuid::from_slice(&block[0x20..0x30]).unwrap_or_default();
                        found.push((spec(PoolId(id)), None));
                    }
                }
                Granted::Name(_) => {}
                Granted::Directory(directory) => {
                    for entry in std::fs::read_dir(directory)?.flatten() {
                        let name = entry.file_name();
                        let id = name.to_str().and_then(|n| n.strip_prefix("karst-")?.parse().ok());
                        if let Some(id) = id.filter(|_| entry.file_type().is_ok_and(|t| t.is_dir())) {
                            let most = karst_agent::MAX_DESCRIPTION;
                            found.push((spec(id), karst_storage::pool_description(&entry.path(), most)?));
                        }
                    }
                }
            }
            found.sort_by_key(|(spec, _)| spec.id);
            Ok(found)
        })
        .await
    }

    async fn make_image(&self, spec: &PoolSpec) -> Result<()> {
        if self.image.exists() {
            return Ok(());
        }
        let fresh = self.fresh_image(spec).await?;
        self.make_file_system(&fresh).ok().await?;
        self.finish_image(fresh).await
    }

    /// The file of a pool in the making: sparse, of its size, empty.
    pub(crate) async fn fresh_image(&self, spec: &PoolSpec) -> Result<PathBuf> {
        let size = match &spec.source {
            PoolSource::Own { size } => *size,
            PoolSource::Granted { .. } => None,
        };
        let fresh = self.image.with_extension("img.new");
        let making = fresh.clone();
        blocking(move || {
            let below = making.parent().unwrap_or(&making);
            let bytes = match size {
                Some(size) => size.bytes(),
                None => usual_size(below)?,
            };
            if bytes < SMALLEST {
                return Err(Error::invalid("size", "a pool of this kind has at least 256MiB"));
            }
            let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&making)?;
            Ok(file.set_len(bytes)?)
        })
        .await?;
        Ok(fresh)
    }

    /// It is whole.
    pub(crate) async fn finish_image(&self, fresh: PathBuf) -> Result<()> {
        let image = self.image.clone();
        blocking(move || {
            File::open(&fresh)?.sync_all()?;
            Ok(std::fs::rename(fresh, image)?)
        })
        .await
    }

    fn make_file_system(&self, on: &Path) -> karst_host::Command {
        run(Program::MkfsBtrfs)
            .args(["--quiet", "--uuid", &self.id.to_string()])
            .arg(on)
            .timeout(Duration::from_secs(120))
    }

    async fn make_on_device(&self, device: &Path) -> Result<()> {
        if self.is_ours(device)? {
            return Ok(()); // an interrupted call made it
        }
        // It refuses a device on which it sees anything, or that is in use.
        self.make_file_system(device).ok().await.map(drop).map_err(|e| {
            Error::conflict(format!(
                "{} is in use or holds something; if it may be lost, clear it first (wipefs -a)",
                device.display()
            ))
            .at("source")
            .with_context(e.context.unwrap_or_default())
        })
    }

    /// Does the device hold this pool's file system?
    fn is_ours(&self, device: &Path) -> Result<bool> {
        let mut block = [0u8; 4096];
        File::open(device)?.read_exact_at(&mut block, SUPERBLOCK)?;
        Ok(&block[0x40..0x48] == MAGIC && block[0x20..0x30] == *self.id.0.as_bytes())
    }

    async fn mount_image(&self) -> Result<()> {
        let (image, directory) = (self.image.clone(), self.directory.clone());
        blocking(move || {
            let device = mount::attach(&image).map_err(|e| {
                Error::unsupported("this host has no loop devices for the pool's file").with_context(e)
            })?;
            mount_btrfs(&device.path, &directory)
        })
        .await
    }

    async fn mount_device(&self, device: PathBuf) -> Result<()> {
        let directory = self.directory.clone();
        blocking(move || mount_btrfs(&device, &directory)).await
    }

    /// Takes away what the file system of DIR keeps of the pool beside its files, which are about to go with DIR.
    pub async fn release_limits(&self, spec: &PoolSpec) -> Result<()> {
        if spec.kind != PoolKind::Dir || matches!(spec.source, PoolSource::Granted { .. }) {
            return Ok(());
        }
        let directory = self.directory.clone();
        blocking(move || {
            karst_storage::release_limits(&directory);
            Ok(())
        })
        .await
    }

    /// Undoes what makes it usable; its content stays.
    pub async fn close(&self, spec: &PoolSpec) -> Result<()> {
        if spec.kind.has_names() {
            return self.close_objects(spec).await;
        }
        let directory = self.directory.clone();
        blocking(move || {
            if mount::unmount(&directory, false).is_err() {
                // Somebody looks into it: it goes when he leaves.
                mount::unmount(&directory, true)?;
            }
            Ok(())
        })
        .await
    }

    /// Removes it with all that is in it. What a source holds beside the pool is not touched.
    pub async fn remove(&self, spec: &PoolSpec) -> Result<()> {
        match spec.kind {
            PoolKind::Zfs | PoolKind::Lvm => {
                self.remove_objects(spec).await?;
                return self.remove_files().await;
            }
            PoolKind::Dir | PoolKind::Btrfs => {}
        }
        if let PoolSource::Granted { source } = &spec.source {
            crate::reach::answers(Path::new(source)).await?;
            let place = self.within(Path::new(source));
            // A source that is a device has nothing below it, which the system calls "not a directory".
            if tokio::fs::metadata(&place).await.is_ok_and(|found| found.is_dir()) {
                // Volumes that are still in it go with it, also as subvolumes.
                let pool = match spec.kind {
                    PoolKind::Btrfs => FilePool::btrfs(&place, self.launcher.clone()).await?,
                    _ => FilePool::directory(&place, self.launcher.clone()).await?,
                };
                pool.clear().await?;
            }
        }
        self.release_limits(spec).await?;
        self.close(spec).await?;
        let (place, spec) = (self.clone(), spec.clone());
        blocking(move || {
            if let PoolSource::Granted { source } = &spec.source {
                let device = std::fs::metadata(source).is_ok_and(|m| m.file_type().is_block_device());
                if !device {
                    gone(std::fs::remove_dir_all(place.within(Path::new(source))))?;
                }
                if device && place.is_ours(Path::new(source))? {
                    let device = File::options().write(true).open(source)?;
                    device.write_all_at(&[0; 4096], SUPERBLOCK)?;
                    device.sync_all()?;
                }
            }
            Ok(())
        })
        .await?;
        self.remove_files().await
    }

    /// What of it is below DIR.
    async fn remove_files(&self) -> Result<()> {
        let place = self.clone();
        blocking(move || {
            gone(std::fs::remove_dir_all(&place.directory))?;
            gone(std::fs::remove_file(&place.image))?;
            Ok(gone(std::fs::remove_file(place.image.with_extension("img.new")))?)
        })
        .await
    }
}

/// What a pool was made of is hidden or lost.
pub(crate) fn not_there(place: impl std::fmt::Display) -> Error {
    Error::unavailable("what it is made of is not there; is its disk attached and mounted?")
        .with_context(place)
}

/// What is not there is gone already.
fn gone(outcome: std::io::Result<()>) -> std::io::Result<()> {
    match outcome {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

async fn look(kind: PoolKind, source: &str) -> Result<Granted> {
    if kind.has_names() && !source.starts_with('/') {
        return Ok(Granted::Name(source.to_owned()));
    }
    let path = PathBuf::from(source);
    let field = source.to_owned();
    blocking(move || {
        let wrong = |text: &str| Error::invalid("source", format!("{field:?} {text}"));
        let found = std::fs::metadata(&path).map_err(|e| wrong("is not on this host").with_context(e))?;
        if found.file_type().is_block_device() {
            return Ok(Granted::Device(path));
        }
        if !found.is_dir() {
            return Err(wrong("is neither a directory nor a block device"));
        }
        if found.mode() & 0o022 != 0 || !is_roots(&path, &found) {
            return Err(wrong("must be a directory of root that nobody else can write"));
        }
        Ok(Granted::Directory(path))
    })
    .await
}

/// Does a directory belong to root, or to the user that root is to its file system? An NFS export that squashes root has one.
fn is_roots(directory: &Path, found: &std::fs::Metadata) -> bool {
    if found.uid() == 0 {
        return true;
    }
    let trial = directory.join(format!(".karst-{}", uuid::Uuid::new_v4()));
    let made = File::options().write(true).create_new(true).mode(0o600).open(&trial);
    let acts_as = made.and_then(|file| file.metadata()).map(|m| m.uid());
    // One that could not be made is not there.
    let _ = std::fs::remove_file(&trial);
    acts_as.is_ok_and(|uid| uid == found.uid() && uid != 0)
}

async fn make_directory(path: PathBuf) -> Result<()> {
    blocking(move || Ok(std::fs::DirBuilder::new().recursive(true).mode(0o711).create(path)?)).await
}

fn mount_btrfs(device: &Path, directory: &Path) -> Result<()> {
    mount::mount(device, directory, "btrfs", "")
        .map_err(|e| Error::unsupported("this host cannot mount btrfs").with_context(e))
}

/// A fifth of the free space, 5 to 30 GiB; the file is sparse.
fn usual_size(below: &Path) -> Result<u64> {
    let space = rustix::fs::statvfs(below).map_err(std::io::Error::from)?;
    let free = space.f_bavail * space.f_frsize;
    Ok((free / 5).clamp(5 << 30, 30 << 30).next_multiple_of(1 << 20))
}
