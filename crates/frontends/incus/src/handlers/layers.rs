//! `/1.0/karst/instances/{name}/layers`: layers of disks of virtual machines, which Incus has not.

use crate::{
    app::{Call, running},
    respond::{Reply, sync},
};
use karst_engine::{
    compute::disk_copy::merge::{LayerName, MergeDisk, MergeLayers},
    layers::create::{CreateLayers, NewLayer},
};
use karst_model::{Error, Result};
use serde_json::{Value, json};

/// `GET …/layers`: the disks that a machine writes to: `[{"device", "pool", "volume", "owned", "layers": [{"name", "number", "created_at"}]}]`,
/// of each its layers over the file that the volume was made with, lowest first; `[]` of a container.
///
/// # Errors
/// Those of the engine.
pub async fn list(call: Call) -> Result<Reply> {
    let disks = call.engine().disk_layers(&call.context, call.project(), call.param(0))?;
    let shown: Vec<Value> = disks
        .into_iter()
        .map(|disk| {
            let layer = |l: &karst_model::layer::Layer| {
                json!({"name": l.name, "number": l.number, "created_at": l.created_at.to_string()})
            };
            json!({
                "device": disk.device, "pool": disk.pool, "volume": disk.volume, "owned": disk.owned,
                "layers": disk.layers.iter().map(layer).collect::<Vec<_>>(),
            })
        })
        .collect();
    sync(&shown)
}

/// `POST …/layers`: lets disks go on in new layers, all at one moment: `{"device", "name", "snapshot", "description", "quiesce"}`; without
/// a device all disks.
///
/// # Errors
/// Those of the engine.
pub async fn create(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let (device, name) = (f.text("device")?, f.text("name")?);
    let (snapshot, note) = (f.text("snapshot")?, f.text("description")?.unwrap_or_default());
    let quiesce = f.flag("quiesce")?;
    f.finish(&[])?;
    if device.is_none() && name.is_some() {
        return Err(Error::invalid("name", "a name is of one layer; say of which device"));
    }
    let disks = device.map(|device| vec![NewLayer { device, name }]);
    let snapshot = snapshot.filter(|s| !s.is_empty());
    let request = CreateLayers { snapshot, note, disks, quiesce };
    running(&call.engine().layers_create(&call.context, call.project(), call.param(0), request).await?)
}

fn bandwidth(said: Option<i64>) -> Result<u64> {
    let speed = u64::try_from(said.unwrap_or(0));
    speed.map_err(|_| Error::invalid("bandwidth", "bytes a second are 0 (as fast as it goes) or more"))
}

/// `POST …/layers/commit`: puts layers of a disk into what lies below them: `{"device", "top", "base", "bandwidth"}`; without a top from the
/// active one on, without a base down to the lowest file.
///
/// # Errors
/// Those of the engine.
pub async fn commit(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let (device, top, base) = (f.text("device")?, f.text("top")?, f.text("base")?);
    let speed = bandwidth(f.integer("bandwidth")?)?;
    f.finish(&[])?;
    let what = MergeLayers::Commit { top, base: base.map_or(LayerName::Lowest, LayerName::Layer) };
    let request = MergeDisk { device, what, hold: false, speed };
    running(&call.engine().layers_merge(&call.context, call.project(), call.param(0), request).await?)
}

/// `POST …/layers/pull`: puts what lies below the active layer of a disk into it: `{"device", "base", "bandwidth"}`; down to `base`, which
/// stays, or all, also the image that the disk was made of.
///
/// # Errors
/// Those of the engine.
pub async fn pull(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let (device, base) = (f.text("device")?, f.text("base")?);
    let speed = bandwidth(f.integer("bandwidth")?)?;
    f.finish(&[])?;
    let request = MergeDisk {
        device,
        what: MergeLayers::Pull { base: base.map(LayerName::Layer) },
        hold: false,
        speed,
    };
    running(&call.engine().layers_merge(&call.context, call.project(), call.param(0), request).await?)
}
