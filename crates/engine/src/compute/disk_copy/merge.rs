//! Layers of a disk that are merged while its machine runs: what is in some goes into the one below them (a commit), or what is below
//! into the active one (a pull). It is the saga of a copy with the disk's own volume as what it is copied to: the host's part is of the
//! same kind, and so is its end.

use super::{
    METADATA, Origin, origin,
    saga::{CopyPlan, DiskCopying},
};
use crate::{
    Engine, Records, Row,
    compute::path,
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::runner,
};
use karst_agent::{GuestRef, VolumeRef};
use karst_model::{
    Error, Result, VolumeId,
    access::Permission,
    instance::{Instance, InstanceKind, Lifecycle},
    layer::{Base, Merge},
    project::Project,
    storage::Volume,
};
use serde::{Deserialize, Serialize};

/// A file of a disk in layers, as users name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerName {
    /// The file that the volume was made with.
    Lowest,
    /// A layer.
    Layer(String),
}

/// What is to be merged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MergeLayers {
    /// What is in the layers over `base`, up to `top`, is put into `base`, and they go.
    Commit {
        /// A layer; the active one when absent.
        top: Option<String>,
        /// Where it goes.
        base: LayerName,
    },
    /// What is below the active layer is put into it, and goes; down to `base`, which stays, or all when absent, also the image
    /// that the volume was made of.
    Pull {
        /// The highest that stays below.
        base: Option<LayerName>,
    },
}

/// Layers of a disk to be merged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MergeDisk {
    /// Its device; `None`: the root.
    pub device: Option<String>,
    /// What.
    pub what: MergeLayers,
    /// A commit of the active layer waits, once it is ready, until [`Engine::disk_copy_end`] says how it is to end; else the machine
    /// goes on from what it was put into.
    pub hold: bool,
    /// Bytes a second at most; 0: as fast as it goes.
    pub speed: u64,
}

/// What a merge does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Into the active layer.
    Pull,
    /// Into one below, of layers to which the guest does not write.
    Commit,
    /// Into one below, of the active layer too.
    ActiveCommit,
}

/// The part of a plan that is about layers.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct MergePlan {
    pub(super) merge: Merge,
    pub(super) active: bool,
}

impl MergePlan {
    pub(super) fn work(self) -> Work {
        match (self.merge, self.active) {
            (Merge::Pull { .. }, _) => Work::Pull,
            (Merge::Commit { .. }, false) => Work::Commit,
            (Merge::Commit { .. }, true) => Work::ActiveCommit,
        }
    }

    /// Lets the volume's record have what is left; done already when it does.
    pub(super) fn switch(
        &self,
        records: &Records,
        tx: &mut Tx,
        instance: &Row<Instance>,
        volume: VolumeId,
    ) -> Result<()> {
        let row = records.volumes.get(&volume).ok_or_else(|| Error::not_found("the volume is gone"))?;
        let left = self.merge.left(&row.layers.chain());
        let mut volume = row.value.clone();
        volume.layers.keep(&left);
        if volume.layers == row.layers {
            return Ok(());
        }
        tx.replace(row, &volume);
        // As when they were put there: whoever decided by them decides anew.
        tx.replace(instance, &instance.value);
        Ok(())
    }
}

impl Engine {
    /// Merges layers of a disk of a running virtual machine.
    ///
    /// # Errors
    /// Invalid by field, not found, conflict (not running, busy, no such layers), unsupported for containers and for what is no disk of
    /// its own; forbidden.
    pub async fn layers_merge(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        request: MergeDisk,
    ) -> Result<LiveOperation> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        let inner = self.inner();
        runner::start::<DiskCopying>(inner, context, |tx| {
            prepare(&inner.inventory.read(), tx, &project, name, &request)
        })
        .await
    }
}

fn prepare(
    records: &Records,
    tx: &mut Tx,
    project: &Row<Project>,
    name: &str,
    request: &MergeDisk,
) -> Result<(CopyPlan, NewOperation)> {
    let row = records.instance(project, name)?;
    if row.kind != InstanceKind::VirtualMachine {
        let text = format!("instance {name:?} is a container; disks of virtual machines have layers");
        return Err(Error::unsupported(text));
    }
    let runtime = records.runtimes.get(&row.id);
    let status = row.status(runtime.map(|r| &r.value));
    if row.lifecycle != Lifecycle::Ready || !status.is_up() {
        let text =
            format!("instance {name:?} is not running; layers are merged while it does: start it first");
        return Err(Error::conflict(text));
    }
    tx.expect(row);
    tx.expect(project);
    let Origin { device, keys, root, volume, .. } = origin(records, row, request.device.as_deref())?;
    tx.expect(volume);
    crate::checkpoints::demand_none(records, volume.id, "which would not know what was merged")?;
    let merge = chosen(volume, &request.what)?;
    let chain = volume.layers.chain();
    merge.check(&chain)?;
    let active = merge.is_active(&chain);
    if request.hold && !active {
        let text = "only a commit of the active layer waits for a word; all else ends by itself";
        return Err(Error::invalid("hold", text));
    }
    let pool = records.pools.get(&volume.pool).ok_or_else(|| Error::not_found("the pool is gone"))?;
    let generation = runtime.map_or(row.generation, |r| r.generation);
    let path = path(&project.name, name);
    let plan = CopyPlan {
        guest: GuestRef { instance: row.id, generation },
        node: row.node,
        device,
        root,
        // Nothing is made or dropped with the saga: the volume stays what it is.
        owned: false,
        made: false,
        hold: request.hold,
        speed: request.speed,
        synchronous: false,
        stays: None,
        from: VolumeRef { pool: volume.pool, volume: volume.id },
        to: volume.value.clone(),
        history: vec![],
        full: false,
        snapshots: vec![],
        pool: pool.name.to_string(),
        after: keys,
        path: path.clone(),
        volume_path: None,
        merge: Some(MergePlan { merge, active }),
    };
    let mut new = NewOperation::task("Merging layers of disk", Some(project.id), "instances", path);
    new.may_cancel = true;
    new.metadata.insert(METADATA.into(), plan.told(false));
    Ok((plan, new))
}

/// The layers by their numbers.
fn chosen(volume: &Volume, what: &MergeLayers) -> Result<Merge> {
    let layers = &volume.layers;
    let base = |name: &LayerName| match name {
        LayerName::Lowest => Ok(Base::Lowest),
        // The file that it was made with goes by the volume's own name.
        LayerName::Layer(name) if *name == volume.name && layers.all.iter().all(|l| l.name != *name) => {
            Ok(Base::Lowest)
        }
        LayerName::Layer(name) => layers.demand("base", name).map(|l| Base::Layer(l.number)),
    };
    Ok(match what {
        MergeLayers::Pull { base: wanted } => Merge::Pull { base: wanted.as_ref().map(base).transpose()? },
        MergeLayers::Commit { top, base: wanted } => {
            let top = match top {
                Some(name) => layers.demand("top", name)?,
                None => layers.all.last().ok_or_else(|| {
                    Error::conflict("the disk has no layers: there is nothing to commit").at("device")
                })?,
            };
            Merge::Commit { top: top.number, base: base(wanted)? }
        }
    })
}
