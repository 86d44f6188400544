//! Layers of disks of virtual machines: ids and numbers become files, which a pool's record names before a machine writes to them, and
//! no record any more before they go.

use crate::{
    RealAgent,
    agent::{as_state, has_volume},
    drives::format,
};
use karst_agent::{FASTEST, MOST_AT_ONCE, MachineLayersAdd, MachineMergeBegin, MachineMergeEnd};
use karst_guest::{DiskChain, DiskCopyEnd, DiskMerge, DiskMerges, GuestDriver, LowerFile, NewLayer};
use karst_model::{Error, Result, VolumeId, layer::Merge, spec::GuestSpec, storage::VolumeContent};
use karst_storage::{ChainFile, DiskLayers, FileChain, PoolDriver};
use std::{collections::BTreeSet, sync::Arc};
use tokio::sync::OwnedMutexGuard;

fn merges(driver: &Arc<dyn GuestDriver>) -> Result<&dyn DiskMerges> {
    driver.disk_merges().ok_or_else(|| Error::unsupported("only disks of virtual machines have layers"))
}

fn layers(pool: &dyn PoolDriver) -> Result<&dyn DiskLayers> {
    pool.disk_layers().ok_or_else(|| {
        Error::unsupported(format!(
            "volumes of a pool of kind {} are no files, and have no layers; pools of kind dir and btrfs can",
            pool.kind().as_str()
        ))
    })
}

/// The files of a disk, as a driver of guests knows them.
pub(crate) fn chain(found: FileChain) -> DiskChain {
    let lower = |f: ChainFile| LowerFile { number: f.number, path: f.path, format: format(f.format) };
    DiskChain { number: found.number, below: found.below.into_iter().map(lower).collect() }
}

impl RealAgent {
    /// The locks of all volumes of a request, in the order of their ids; the caller holds its instance's.
    async fn lock_all(&self, request: &MachineLayersAdd) -> Vec<OwnedMutexGuard<()>> {
        let mut ids: BTreeSet<VolumeId> = request.layers.iter().map(|l| l.volume.volume).collect();
        // Whoever calls a volume by the instance's id waits for nobody: that lock is held, and there is no such volume.
        ids.remove(&VolumeId(request.instance.0));
        let mut locks = vec![];
        for id in ids {
            locks.push(self.lock(id.0).await);
        }
        locks
    }

    /// Refuses what is no disk, has no layers, or is somebody else's.
    async fn demand_layers(&self, request: &MachineLayersAdd, running: bool) -> Result<()> {
        let id = request.instance;
        let volumes: BTreeSet<VolumeId> = request.layers.iter().map(|l| l.volume.volume).collect();
        if volumes.len() != request.layers.len() || volumes.is_empty() || volumes.len() > MOST_AT_ONCE {
            let text = format!("one call puts one layer over each of 1 to {MOST_AT_ONCE} disks");
            return Err(Error::invalid("layers", text));
        }
        for layer in &request.layers {
            let volume = layer.volume.volume;
            let pool = self.pool(layer.volume.pool)?;
            let content = pool.inspect(volume).await?.content;
            if content != VolumeContent::Block {
                return Err(Error::invalid("layers", "only disks have layers, no discs and no file systems"));
            }
            layers(&*pool)?;
            if running {
                let (record, _) = self.known(id)?;
                if record.root != volume && !record.volumes.contains(&volume) {
                    return Err(Error::not_found(format!("volume {volume} is not a disk of instance {id}")));
                }
            }
            let by_all = self.user(has_volume(volume)).await?;
            if let Some(user) = by_all.filter(|user| *user != id) {
                return Err(Error::conflict(format!("the volume is in use by instance {user}, which runs")));
            }
        }
        Ok(())
    }

    /// The layers of a request that volumes have, as a driver knows them.
    async fn new_layers(&self, request: &MachineLayersAdd) -> Result<Vec<NewLayer>> {
        let user = self.guest(request.instance).map(|record| record.ids.base);
        let mut all = vec![];
        for layer in &request.layers {
            let located = self.locate(layer.volume, user).await?;
            let below = located.chain.below.first();
            if let Some(below) = below.filter(|_| located.chain.number == layer.number) {
                let (disk, number) = (below.path.clone(), layer.number);
                all.push(NewLayer { disk, path: located.path, number });
            }
        }
        Ok(all)
    }

    pub(crate) async fn add_layers(&self, request: MachineLayersAdd) -> Result<()> {
        let id = request.instance;
        let _lock = self.lock(id.0).await;
        if let Some(guest) = request.guest.filter(|_| self.guest(id).is_some()) {
            self.meant(guest)?;
        }
        let running = self.runs(id).await?;
        if running && request.guest.is_none() {
            return Err(Error::conflict(format!("instance {id} is running")));
        }
        let _volumes = self.lock_all(&request).await;
        self.demand_layers(&request, running).await?;
        let Err(e) = self.put_layers(&request, running).await else { return Ok(()) };
        // All or nothing, also of a machine that did more than it told, or has ended meanwhile.
        match self.drop_layers(&request).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(e),
            Err(left) => {
                tracing::warn!(instance = %id, error = %left, context = left.context, "what is left of layers that could not be put over disks");
                Err(e)
            }
        }
    }

    async fn put_layers(&self, request: &MachineLayersAdd, running: bool) -> Result<()> {
        let id = request.instance;
        for layer in &request.layers {
            let pool = self.pool(layer.volume.pool)?;
            layers(&*pool)?.add(layer.volume.volume, layer.number).await?;
        }
        let new = self.new_layers(request).await?;
        if new.len() != request.layers.len() {
            return Err(Error::conflict("another layer lies over the disk"));
        }
        if !running {
            return Ok(());
        }
        let (_, driver) = self.known(id)?;
        merges(driver)?.add(id, new).await.map_err(as_state(id))
    }

    /// Takes back what there is of layers; answers whether the disks have them all the same. The caller holds the locks.
    async fn drop_layers(&self, request: &MachineLayersAdd) -> Result<bool> {
        let id = request.instance;
        let there = self.new_layers(request).await?;
        if self.runs(id).await? {
            let (_, driver) = self.known(id)?;
            if merges(driver)?.take_back(id, there).await? {
                return Ok(true);
            }
        } else if request.guest.is_some() && there.len() == request.layers.len() {
            // It may have gone on in them before it ended; if it did not, they are empty, and the disks are what they were.
            return Ok(true);
        }
        for layer in &request.layers {
            let pool = self.pool(layer.volume.pool)?;
            layers(&*pool)?.take_back(layer.volume.volume, layer.number).await?;
        }
        Ok(false)
    }

    pub(crate) async fn take_layers_back(&self, request: MachineLayersAdd) -> Result<bool> {
        let _lock = self.lock(request.instance.0).await;
        let _volumes = self.lock_all(&request).await;
        self.drop_layers(&request).await
    }

    /// Lets the pools have what merges have left of a guest's disks, before it is started from them: whoever merged may not have come
    /// to that.
    pub(crate) async fn settle_merges(&self, spec: &GuestSpec) -> Result<()> {
        let Some(driver) = self.driver(spec.kind)?.disk_merges() else { return Ok(()) };
        for merged in driver.merged(spec.instance).await? {
            let root = (spec.root.volume == merged.volume).then_some(spec.root.pool);
            let mut disks = spec.disks.iter().filter_map(|d| d.volume());
            let pool = root.or_else(|| disks.find(|(_, v)| *v == merged.volume).map(|(pool, _)| pool));
            let Some(pool) = pool else { continue };
            let pool = self.pool(pool)?;
            let Some(layers) = pool.disk_layers() else { continue };
            let chain = layers.chain(merged.volume).await?;
            // Only of a chain that is as it was before: numbers are given once, so what has another has been written down since, or
            // is another disk by now.
            if merged.before.iter().all(|n| chain.contains(n)) {
                let left: Vec<u32> = chain.into_iter().filter(|n| !merged.gone.contains(n)).collect();
                layers.keep(merged.volume, &left).await?;
            }
        }
        Ok(())
    }

    pub(crate) async fn begin_merge(&self, request: MachineMergeBegin) -> Result<()> {
        let MachineMergeBegin { guest, volume: at, merge, speed } = request;
        let id = guest.instance;
        if speed > FASTEST {
            return Err(Error::invalid("speed", "no merge is as fast as that"));
        }
        let _lock = self.lock(id.0).await;
        let (record, driver) = self.meant(guest)?;
        let driver = merges(driver)?;
        if !self.runs(id).await? {
            return Err(Error::conflict(format!("instance {id} is not running")));
        }
        if record.root != at.volume && !record.volumes.contains(&at.volume) {
            return Err(Error::not_found(format!("volume {} is not a disk of instance {id}", at.volume)));
        }
        let _volume = self.lock(at.volume.0).await;
        let pool = self.pool(at.pool)?;
        merge.check(&layers(&*pool)?.chain(at.volume).await?)?;
        let path = self.locate(at, Some(record.ids.base)).await?.path;
        let merge = DiskMerge { volume: at.volume, path, merge, speed };
        driver.merge(id, merge).await.map_err(as_state(id))
    }

    pub(crate) async fn end_merge(&self, request: MachineMergeEnd) -> Result<()> {
        let MachineMergeEnd { instance, volume: at, merge, end } = request;
        let _lock = self.lock(instance.0).await;
        let Ok((_, driver)) = self.known(instance) else {
            return match end {
                DiskCopyEnd::Cancel => Ok(()),
                _ => Err(Error::conflict(format!("instance {instance} is not running"))),
            };
        };
        merges(driver)?;
        let copies = driver.disk_copies();
        let copies = copies.ok_or_else(|| Error::unsupported("this host merges no layers"))?;
        copies.end(instance, at.volume, end).await.map_err(as_state(instance))?;
        if end != DiskCopyEnd::Pivot {
            return Ok(());
        }
        // The guest's disk is what is left: nothing else is to be found by whoever starts it next.
        let _volume = self.lock(at.volume.0).await;
        let pool = self.pool(at.pool)?;
        let layers = layers(&*pool)?;
        let chain = layers.chain(at.volume).await?;
        layers.keep(at.volume, &merge.left(&chain)).await?;
        match merge {
            Merge::Pull { base: None } => layers.leave_base(at.volume).await,
            _ => Ok(()),
        }
    }
}
