//! External snapshots: the disks of a machine go on in new layers at one moment, which the snapshot is the record of. What the disks were then
//! lies below; nothing leads back to it, and a snapshot that is deleted with its data has its layers committed.

use super::{
    copies::refused,
    domain::is_running,
    layers::{chain_of, layered, target_of},
    power::ended,
    snapshots::{QUIESCE, disks},
    storage::volumes_of,
};
use crate::{
    error::{Code, Part, VirError},
    session::Call,
    xml::{machine::layers, snapshot::NewSnapshot},
};
use karst_engine::{
    InstanceView,
    compute::disk_copy::merge::{LayerName, MergeDisk, MergeLayers},
    layers::create::{CreateLayers, NewLayer},
};
use karst_model::snapshot::Snapshot;

/// `VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY`, `_NO_METADATA`
const DISK: u32 = 16;
const NO_META: u32 = 4;

fn unsupported(text: impl Into<String>) -> VirError {
    VirError::new(Code::ConfigUnsupported, Part::Qemu, text)
}

/// Which disks go on in which layers.
fn chosen(
    call: &Call,
    view: &InstanceView,
    new: &NewSnapshot,
    snapshot: &str,
) -> Result<Vec<NewLayer>, VirError> {
    let said = new.external.as_deref().unwrap_or_default();
    let all = layered(call, view)?;
    let of_domain = disks(call, view)?;
    let is = |target: &str, path: Option<&str>, name: &str| target == name || path == Some(name);
    let names = said.iter().map(|(name, _)| name).chain(new.disks.iter().map(|(name, _)| name));
    let mut known: Vec<(String, Vec<String>)> = vec![];
    for disk in &all {
        known.push((target_of(view, &disk.device).unwrap_or_default(), chain_of(view, disk)));
    }
    for name in names {
        let layered = known.iter().any(|(t, chain)| is(t, chain.first().map(String::as_str), name));
        if !layered && !of_domain.iter().any(|d| is(&d.target, d.path.as_deref(), name)) {
            return Err(unsupported(format!("no disk named '{name}'")));
        }
    }
    let left_out = |target: &str, path: Option<&str>| new.disks.iter().any(|(n, _)| is(target, path, n));
    for disk in of_domain.iter().filter(|d| d.written) {
        let in_pool = known.iter().any(|(t, _)| *t == disk.target);
        if !in_pool && !left_out(&disk.target, disk.path.as_deref()) {
            return Err(unsupported(format!(
                "disk snapshot: {target} has no layers, because it is no volume of a pool or of this run only; leave it out by --diskspec {target},snapshot=no",
                target = disk.target
            )));
        }
    }
    let mut layers: Vec<NewLayer> = vec![];
    let mut paths: Vec<String> = vec![];
    for (disk, (target, chain)) in all.iter().zip(&known) {
        let active = chain.first().map(String::as_str);
        if left_out(target, active) {
            continue;
        }
        let path = said.iter().find(|(n, _)| is(target, active, n)).and_then(|(_, path)| path.clone());
        let path = path.unwrap_or_else(|| self::layers::beside(active.unwrap_or_default(), snapshot));
        let name = self::layers::named(target, &disk.pool, &path)?;
        let session = &call.session;
        let pools = session.front.engine.pools(&session.context)?;
        let pool = pools.into_iter().find(|p| *p.name == *disk.pool);
        let volume = match &pool {
            Some(pool) => volumes_of(call, pool)?.iter().any(|v| v.name == name),
            None => false,
        };
        if volume || paths.contains(&path) || known.iter().any(|(_, chain)| chain.contains(&path)) {
            return Err(unsupported(format!(
                "external snapshot file for disk {target} already exists and is not a block device: {path}"
            )));
        }
        paths.push(path);
        layers.push(NewLayer { device: disk.device.clone(), name: Some(name) });
    }
    match layers.is_empty() {
        true => Err(unsupported("nothing selected for snapshot")),
        false => Ok(layers),
    }
}

/// Takes one. Answers whether it has a record.
///
/// # Errors
/// CONFIG_UNSUPPORTED for what goes with no external snapshot of ours; those of the engine.
pub(super) async fn create(
    call: &Call,
    view: &InstanceView,
    new: NewSnapshot,
    (name, flags): (&str, u32),
) -> Result<(), VirError> {
    let (running, still) = (is_running(view), flags & QUIESCE != 0);
    if view.instance.hardware.is_none() {
        return Err(VirError::new(
            Code::OperationUnsupported,
            Part::Qemu,
            "a container has no layers of disks; take the snapshot without --disk-only",
        ));
    }
    let mixed = new.disks.iter().any(|(_, wanted)| *wanted)
        || (running && flags & DISK == 0 && new.memory != Some(false))
        || new.memory == Some(true);
    if mixed {
        return Err(unsupported(
            "mixing internal and external targets for a snapshot is not yet supported: with --disk-only, or --memspec snapshot=no, \
             the disks alone are in it",
        ));
    }
    if still && !running {
        return Err(VirError::state("domain is not running"));
    }
    let disks = chosen(call, view, &new, name)?;
    let request = CreateLayers {
        snapshot: (flags & NO_META == 0).then(|| name.to_owned()),
        note: new.description,
        disks: Some(disks),
        quiesce: still,
    };
    let session = &call.session;
    let (project, instance) = (&view.project.name, &view.instance.name);
    let begun = session.front.engine.layers_create(&session.context, project, instance, request).await;
    ended(begun.map_err(refused)?).await
}

/// Deletes the data of one that no other descends from: its layers are committed into what lies below them.
///
/// # Errors
/// CONFIG_UNSUPPORTED of a domain that does not run; those of the engine.
pub(super) async fn commit(call: &Call, view: &InstanceView, snapshot: &Snapshot) -> Result<(), VirError> {
    let of = snapshot.external.as_ref().map(|e| e.disks.as_slice()).unwrap_or_default();
    let session = &call.session;
    for disk in of {
        let all = layered(call, view)?;
        let Some(now) = all.into_iter().find(|d| d.device == disk.device && d.pool == disk.pool) else {
            continue;
        };
        // One that was merged before is no more.
        let Some(place) = now.layers.iter().position(|l| l.name == disk.layer) else { continue };
        if !is_running(view) {
            return Err(unsupported(
                "deletion of an external snapshot of a domain that does not run is not supported: start it, or delete the record \
                 alone (--metadata)",
            ));
        }
        let base = match place.checked_sub(1).and_then(|n| now.layers.get(n)) {
            Some(layer) => LayerName::Layer(layer.name.clone()),
            None => LayerName::Lowest,
        };
        let what = MergeLayers::Commit { top: Some(disk.layer.clone()), base };
        let request = MergeDisk { device: Some(disk.device.clone()), what, hold: false, speed: 0 };
        let (project, name) = (&view.project.name, &view.instance.name);
        let begun = session.front.engine.layers_merge(&session.context, project, name, request).await;
        ended(begun.map_err(refused)?).await?;
    }
    Ok(())
}
