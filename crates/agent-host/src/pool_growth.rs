//! Pools in files of their own that grow while they are in use: the file first, then what lies in it, layer by layer.
//!
//! Each layer takes what it is given and what it has taken already once more, so that an interrupted call is repeated. What has
//! grown does not shrink: nothing here makes anything smaller.

use crate::{RealAgent, agent::blocking, pools::PoolPlace};
use karst_agent::PoolGrow;
use karst_host::{Command, Program, btrfs, mount, run};
use karst_model::{
    ByteSize, Error, Result,
    spec::{PoolSource, PoolSpec},
    storage::PoolKind,
};
use std::{
    fs::File,
    path::{Path, PathBuf},
    time::Duration,
};

fn command(program: Program) -> Command {
    run(program).timeout(Duration::from_secs(600))
}

/// Gives a file the size, and the loop device that it may be attached to.
fn grow_file(image: &Path, size: ByteSize) -> Result<Option<PathBuf>> {
    let file = File::options().write(true).open(image)?;
    let now = file.metadata()?.len();
    if size.bytes() < now {
        let text = format!("a pool only grows; this one has {}", ByteSize(now));
        return Err(Error::conflict(text).at("config.size"));
    }
    if size.bytes() > now {
        file.set_len(size.bytes()).map_err(|e| {
            Error::quota(format!("what the pool's file lies on takes no file of {size}"))
                .at("config.size")
                .with_context(e)
        })?;
        file.sync_all()?;
    }
    let device = mount::attached(image);
    if let Some(device) = &device {
        mount::grown(device)?;
    }
    Ok(device)
}

impl PoolPlace {
    /// Grows the pool's own file and what is in it. The pool is open.
    async fn grow(&self, spec: &PoolSpec, size: ByteSize) -> Result<()> {
        let image = self.image().to_owned();
        let device = blocking(move || grow_file(&image, size)).await?;
        match spec.kind {
            // It has no file of its own.
            PoolKind::Dir => Ok(()),
            PoolKind::Btrfs => {
                let directory = self.directory().to_owned();
                blocking(move || Ok(btrfs::fill_device(&directory)?)).await
            }
            PoolKind::Zfs => {
                let image = self.image().to_owned();
                // As it is named in the zpool, which was imported by its real path.
                let image = blocking(move || Ok(std::fs::canonicalize(image)?)).await?;
                let online = command(Program::Zpool).args(["online", "-e"]).arg(self.zpool()).arg(image);
                online.ok().await.map(drop)
            }
            PoolKind::Lvm => {
                let device = device.ok_or_else(|| {
                    Error::unavailable("the pool's file is attached to no loop device; restart the daemon")
                })?;
                let place = self.group(spec);
                place.command(["pvresize"]).arg(device).ok().await?;
                let free = command(Program::Lvm).args(["vgs", "--noheadings", "-o", "vg_free_count"]);
                let free = free.arg(&place.group).ok().await?;
                if String::from_utf8_lossy(&free).trim() == "0" {
                    return Ok(());
                }
                let thin = format!("{}/{}", place.group, place.thin_pool);
                place.command(["lvextend", "-l", "+100%FREE", &thin]).ok().await.map(drop)
            }
        }
    }
}

impl RealAgent {
    pub(crate) async fn grow_pool(&self, request: PoolGrow) -> Result<()> {
        let PoolGrow { pool, size } = request;
        let _lock = self.lock(pool.0).await;
        let missing = || Error::not_found(format!("pool {pool} is not on this host"));
        let old = self.registry.pool(pool)?.ok_or_else(missing)?;
        if old.kind == PoolKind::Dir || !matches!(old.source, PoolSource::Own { .. }) {
            let text = "only a pool in a file of its own has a size; a source has its own";
            return Err(Error::unsupported(text).at("config.size"));
        }
        self.pool(pool)?;
        self.pool_place(pool).grow(&old, size).await?;
        let new = PoolSpec { source: PoolSource::Own { size: Some(size) }, ..old.clone() };
        if new != old {
            let registry = self.registry.clone();
            blocking(move || registry.put_pool(&new)).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::ErrorKind;

    #[test]
    fn files_grow_and_never_shrink() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let size = || std::fs::metadata(file.path()).unwrap().len();
        for _ in 0..2 {
            assert_eq!(grow_file(file.path(), ByteSize::mib(2)).unwrap(), None, "no device has it");
            assert_eq!(size(), 2 << 20);
        }
        let e = grow_file(file.path(), ByteSize::mib(1)).unwrap_err();
        assert!(e.kind == ErrorKind::Conflict && e.message.contains("2MiB"), "{e}");
        assert_eq!(size(), 2 << 20);
    }
}
