//! Layers of disks of virtual machines: the use cases. A disk goes on in a new file, and what it was lies below that; files are made one
//! again by [`Engine::layers_merge`]. The snapshot that is taken by the way ([`karst_model::snapshot::External`]) is a record of the moment
//! and holds nothing itself.
//!
//! A volume's record says which layers it has ([`karst_model::layer`]), its host keeps the files. As long as there are any, what would make another
//! disk of the volume, or would read a part of it, is refused (`demand_one`).

pub mod create;

use crate::{Engine, Records, Row, checkpoints, compute::expand, context::Context};
use karst_model::{
    Error, Result, VolumeId,
    access::Permission,
    device::DiskOrigin,
    instance::{Instance, InstanceKind},
    layer::Layer,
    storage::{Volume, VolumeContent, VolumeOwner},
};

/// Refuses what is not done to a disk in layers. `why` ends the sentence: what that does not do.
///
/// # Errors
/// Conflict, naming the highest layer and the ways out.
pub(crate) fn demand_one(records: &Records, volume: VolumeId, why: &str) -> Result<()> {
    let Some(volume) = records.volumes.get(&volume) else { return Ok(()) };
    let Some(layer) = volume.layers.all.last() else { return Ok(()) };
    let what = match volume.owner {
        VolumeOwner::Custom => format!("volume {:?}", volume.name),
        _ => format!("the disk of instance {:?}", volume.name),
    };
    Err(Error::conflict(format!(
        "{what} has layer {:?}, {why}; make it one file first, while its virtual machine runs: `karst disk pull` or `karst disk commit` \
         (virsh blockpull, virsh blockcommit)",
        layer.name
    )))
}

/// The same of the disks that an instance owns, and its root.
///
/// # Errors
/// Conflict, naming the highest layer of the first.
pub(crate) fn demand_one_of(records: &Records, instance: &Instance, why: &str) -> Result<()> {
    for volume in crate::snapshots::owned(records, instance) {
        demand_one(records, volume.id, why)?;
    }
    Ok(())
}

/// A disk of a virtual machine with its layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayeredDisk {
    /// Its device.
    pub device: String,
    /// Its pool.
    pub pool: String,
    /// The volume, by its name.
    pub volume: String,
    /// The instance owns it.
    pub owned: bool,
    /// What lies over the file that the volume was made with, lowest first; the last is the one that the guest writes to.
    pub layers: Vec<Layer>,
}

/// The volumes that are disks of a machine which its guest writes to, with their devices, by its record.
pub(crate) fn disks<'a>(records: &'a Records, row: &Instance) -> Result<Vec<(String, &'a Row<Volume>)>> {
    let devices = records.expanded(row).1;
    let parsed = expand::parse_devices(&devices)?;
    let mut all = vec![];
    if let Some(volume) = records.volumes.get(&row.root).filter(|_| parsed.root.1.attached) {
        all.push((parsed.root.0.clone(), volume));
    }
    for (device, disk) in &parsed.disks {
        if let DiskOrigin::Volume { pool, volume } = &disk.source
            && !disk.readonly
            && let Some(volume) = records.custom_volume(row.project, pool, volume)
        {
            all.push((device.clone(), volume));
        }
    }
    all.retain(|(_, v)| v.content == VolumeContent::Block);
    Ok(all)
}

impl Engine {
    /// The disks of a virtual machine that its guest writes to, with their layers. A container has none.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn disk_layers(&self, context: &Context, project: &str, name: &str) -> Result<Vec<LayeredDisk>> {
        let project = self.project(context, project, Permission::ProjectView)?;
        let records = self.inner().inventory.read();
        let row = records.instance(&project, name)?;
        if row.kind != InstanceKind::VirtualMachine {
            return Ok(vec![]);
        }
        let view = |(device, volume): (String, &Row<Volume>)| LayeredDisk {
            device,
            pool: records.pools.get(&volume.pool).map(|p| p.name.to_string()).unwrap_or_default(),
            volume: volume.name.clone(),
            owned: volume.owner != VolumeOwner::Custom,
            layers: volume.layers.all.clone(),
        };
        Ok(disks(&records, row)?.into_iter().map(view).collect())
    }
}

/// The disks of a machine that runs, as it runs with them; of one that does not, by its record.
fn chosen<'a>(
    records: &'a Records,
    row: &Row<Instance>,
    runs: bool,
    wanted: Option<&[String]>,
) -> Result<Vec<(String, &'a Row<Volume>)>> {
    if runs {
        let all = checkpoints::disks(records, row, wanted)?;
        return Ok(all.into_iter().map(|d| (d.device, d.volume)).collect());
    }
    let mut all = disks(records, row)?;
    if let Some(wanted) = wanted {
        for device in wanted {
            if !all.iter().any(|(d, _)| d == device) {
                let text = format!("{device:?} is no disk of the instance, in a pool, that it writes to");
                return Err(Error::invalid("disks", text));
            }
        }
        all.retain(|(d, _)| wanted.contains(d));
    }
    if all.is_empty() {
        return Err(Error::invalid("disks", "there is no disk that the guest writes to"));
    }
    Ok(all)
}
