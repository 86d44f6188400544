//! Where pools lie on this host, how they are made usable, and how they leave nothing.
//!
//! ```text
//! DIR/host/pools/ID/       a dir pool, or where a pool of our own is mounted
//! DIR/host/pools/ID.img    its file system, in a sparse file
//! ```
//! The pool's record is written before anything is made. Each step finds what an interrupted one left: a file system is
//! made in `ID.img.new` and gets its name when it is whole; a mount that is there already is used.

use crate::agent::blocking;
use karst_host::{
    Program,
    mount::{self, is_mount_point},
    run,
    sandbox::Launcher,
};
use karst_model::{
    ByteSize, Error, PoolId, Result,
    spec::{PoolSource, PoolSpec},
    storage::PoolKind,
};
use karst_storage::{FilePool, PoolDriver};
use std::{
    fs::File,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

/// Smallest file system that is worth its name; btrfs refuses less than about 110 MiB.
const SMALLEST: u64 = 256 << 20;

/// A pool's place.
#[derive(Debug, Clone)]
pub(crate) struct PoolPlace {
    directory: PathBuf,
    image: PathBuf,
    launcher: Launcher,
}

impl PoolPlace {
    pub fn new(pools: &Path, id: PoolId, launcher: Launcher) -> Self {
        let directory = pools.join(id.0.to_string());
        Self { image: directory.with_extension("img"), directory, launcher }
    }

    /// Makes what is missing and opens it.
    pub async fn open(&self, spec: &PoolSpec) -> Result<Arc<dyn PoolDriver>> {
        let PoolSource::Own { size } = &spec.source else {
            return Err(Error::forbidden(
                "this host grants no places for pools (pool_sources of host-policy.toml); leave the source out",
            )
            .at("source"));
        };
        match spec.kind {
            PoolKind::Dir => Ok(Arc::new(FilePool::directory(&self.directory, self.launcher.clone()).await?)),
            PoolKind::Btrfs => {
                self.make_directory().await?;
                if !is_mount_point(&self.directory)? {
                    self.make_image(*size).await?;
                    self.mount_image("btrfs").await?;
                }
                Ok(Arc::new(FilePool::btrfs(&self.directory, self.launcher.clone()).await?))
            }
        }
    }

    async fn make_directory(&self) -> Result<()> {
        let directory = self.directory.clone();
        blocking(move || Ok(std::fs::DirBuilder::new().recursive(true).mode(0o711).create(directory)?)).await
    }

    async fn make_image(&self, size: Option<ByteSize>) -> Result<()> {
        if self.image.exists() {
            return Ok(());
        }
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
        run(Program::MkfsBtrfs).arg("--quiet").arg(&fresh).timeout(Duration::from_secs(120)).ok().await?;
        let image = self.image.clone();
        blocking(move || {
            File::open(&fresh)?.sync_all()?;
            Ok(std::fs::rename(fresh, image)?)
        })
        .await
    }

    async fn mount_image(&self, kind: &'static str) -> Result<()> {
        let (image, directory) = (self.image.clone(), self.directory.clone());
        blocking(move || {
            let device = mount::attach(&image).map_err(|e| {
                Error::unsupported("this host has no loop devices for the pool's file").with_context(e)
            })?;
            mount::mount(&device.path, &directory, kind, "")
                .map_err(|e| Error::unsupported(format!("this host cannot mount {kind}")).with_context(e))
        })
        .await
    }

    /// Undoes what makes it usable; its content stays.
    pub async fn close(&self) -> Result<()> {
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

    /// Removes it with all that is in it.
    pub async fn remove(&self, _spec: &PoolSpec) -> Result<()> {
        self.close().await?;
        let place = self.clone();
        blocking(move || {
            let gone = |outcome: std::io::Result<()>| match outcome {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
                _ => Ok(()),
            };
            gone(std::fs::remove_dir_all(&place.directory))?;
            gone(std::fs::remove_file(&place.image))?;
            gone(std::fs::remove_file(place.image.with_extension("img.new")))?;
            Ok(())
        })
        .await
    }
}

/// A fifth of the free space, 5 to 30 GiB; the file is sparse.
fn usual_size(below: &Path) -> Result<u64> {
    let space = rustix::fs::statvfs(below).map_err(std::io::Error::from)?;
    let free = space.f_bavail * space.f_frsize;
    Ok((free / 5).clamp(5 << 30, 30 << 30).next_multiple_of(1 << 20))
}
