//! Block jobs of disks in layers: what is below the active layer is pulled into it, or layers are committed into the one below them. A layer
//! has the path of a volume of its name in the pool ([`xml::machine::layers`]).

use super::{
    Answered,
    copies::{disk, going, refused, speed},
    nothing,
};
use crate::{
    error::{Code, Part, VirError},
    session::Call,
    xml::{
        self,
        machine::{layers, refuse},
    },
};
use karst_engine::{
    InstanceView,
    compute::disk_copy::merge::{LayerName, MergeDisk, MergeLayers},
    layers::LayeredDisk,
};
use karst_model::device::{DISK_BUSES, DiskBus};

/// `VIR_DOMAIN_BLOCK_COMMIT_*`
const SHALLOW: u32 = 1;
const DELETE: u32 = 2;
const ACTIVE: u32 = 4;
const RELATIVE: u32 = 8;
const COMMIT_BYTES: u32 = 16;
/// `VIR_DOMAIN_BLOCK_PULL_BANDWIDTH_BYTES`
const PULL_BYTES: u32 = 64;

/// What clients call a disk, by its device.
pub(super) fn target_of(view: &InstanceView, device: &str) -> Option<String> {
    let identity = view.instance.identities.get(device)?;
    let keys = view.expanded_devices.get(device);
    let said = keys.and_then(|k| k.get("io.bus"));
    let bus = DISK_BUSES.iter().find(|(name, _)| Some(*name) == said.map(String::as_str));
    Some(xml::machine::target(&identity.slot, bus.map_or(DiskBus::VirtioScsi, |(_, bus)| *bus)).0)
}

/// The disks of a machine that may have layers.
pub(super) fn layered(call: &Call, view: &InstanceView) -> Result<Vec<LayeredDisk>, VirError> {
    let session = &call.session;
    Ok(session.front.engine.disk_layers(&session.context, &view.project.name, &view.instance.name)?)
}

/// The paths of all files of a disk, the active one first.
pub(super) fn chain_of(view: &InstanceView, disk: &LayeredDisk) -> Vec<String> {
    let volume = match disk.owned {
        true => xml::machine::owned(&view.instance.name),
        false => disk.volume.clone(),
    };
    let names: Vec<String> = disk.layers.iter().map(|l| l.name.clone()).collect();
    layers::chain(&disk.pool, &volume, &names)
}

/// The device of the disk whose active layer has this path.
pub(super) fn by_path(call: &Call, view: &InstanceView, path: &str) -> Result<Option<String>, VirError> {
    let active = |disk: &LayeredDisk| chain_of(view, disk).first().is_some_and(|active| active == path);
    Ok(layered(call, view)?.into_iter().find(active).map(|disk| disk.device))
}

/// The file at a place of a chain.
fn file(disk: &LayeredDisk, place: usize) -> LayerName {
    match disk.layers.len().checked_sub(place + 1).and_then(|n| disk.layers.get(n)) {
        Some(layer) => LayerName::Layer(layer.name.clone()),
        None => LayerName::Lowest,
    }
}

/// A disk of a domain that runs, with what there is of it.
struct Found {
    disk: LayeredDisk,
    target: String,
    chain: Vec<String>,
}

fn found(call: &Call, view: &InstanceView, device: &str) -> Result<Found, VirError> {
    let target = target_of(view, device).unwrap_or_default();
    let disk = layered(call, view)?.into_iter().find(|d| d.device == device);
    let disk = disk.ok_or_else(|| {
        let text = format!("{target} is no volume of a pool that the guest writes to, and has no layers");
        VirError::new(Code::ConfigUnsupported, Part::Qemu, text)
    })?;
    let chain = chain_of(view, &disk);
    Ok(Found { disk, target, chain })
}

/// Begins a merge.
async fn begin(
    call: &Call,
    view: &InstanceView,
    device: String,
    what: MergeLayers,
    (hold, speed): (bool, u64),
) -> Answered {
    if going(call, view, &device).await?.is_some() {
        let text = "another block job is active on this disk";
        return Err(VirError::new(Code::BlockCopyActive, Part::Qemu, text));
    }
    let session = &call.session;
    let (project, name) = (&view.project.name, &view.instance.name);
    let request = MergeDisk { device: Some(device), what, hold, speed };
    session.front.engine.layers_merge(&session.context, project, name, request).await.map_err(refused)?;
    Ok(nothing())
}

/// Pulls into the active layer what is below it, down to `base`.
pub(super) async fn pull_to(
    call: &Call,
    (view, device): (&InstanceView, String),
    base: Option<&str>,
    speed: u64,
) -> Answered {
    let found = found(call, view, &device)?;
    let base = layers::place(&found.chain, &found.target, 1, base)?.map(|n| file(&found.disk, n));
    begin(call, view, device, MergeLayers::Pull { base }, (false, speed)).await
}

/// `DOMAIN_BLOCK_PULL`
pub async fn pull(call: Call) -> Answered {
    let (named, path, bandwidth, flags) =
        call.arguments(|r| Ok((super::Named::read_domain(r)?, r.string()?, r.u64()?, r.u32()?)))?;
    call.known_flags(flags, PULL_BYTES)?;
    let speed = speed(bandwidth, flags & PULL_BYTES != 0)?;
    let (view, device) = disk(&call, &named, &path)?;
    pull_to(&call, (&*view, device), None, speed).await
}

/// The places in a chain that a commit is from and to.
fn ends(
    chain: &[String],
    target: &str,
    (base, top): (Option<&str>, Option<&str>),
    flags: u32,
) -> Result<(usize, usize), VirError> {
    let active = chain.first().map(String::as_str).unwrap_or_default();
    let top = layers::place(chain, target, 0, top.filter(|top| *top != target))?.unwrap_or(0);
    if top == 0 && flags & ACTIVE == 0 {
        return Err(VirError::argument(format!("commit of '{target}' active layer requires active flag")));
    }
    if top != 0 && flags & ACTIVE != 0 {
        return Err(VirError::argument(format!(
            "active commit requested but '{}' is not active",
            chain[top]
        )));
    }
    let last = chain.len().saturating_sub(1);
    if top >= last {
        let text = format!("top '{}' in chain for '{active}' has no backing file", chain[top]);
        return Err(VirError::argument(text));
    }
    let shallow = flags & SHALLOW != 0;
    let base = layers::place(chain, target, top + 1, base)?.unwrap_or(if shallow { top + 1 } else { last });
    if shallow && base != top + 1 {
        return Err(VirError::argument(format!(
            "base '{}' is not immediately below '{}' in chain for '{active}'",
            chain[base], chain[top]
        )));
    }
    Ok((base, top))
}

/// `DOMAIN_BLOCK_COMMIT`. What was committed goes, whether that is asked for or not.
pub async fn commit(call: Call) -> Answered {
    let (named, path, base, top, bandwidth, flags) = call.arguments(|r| {
        let (named, path) = (super::Named::read_domain(r)?, r.string()?);
        let (base, top) = (r.option(|r| r.string())?, r.option(|r| r.string())?);
        Ok((named, path, base, top, r.u64()?, r.u32()?))
    })?;
    call.known_flags(flags, SHALLOW | DELETE | ACTIVE | RELATIVE | COMMIT_BYTES)?;
    let speed = speed(bandwidth, flags & COMMIT_BYTES != 0)?;
    let (view, device) = disk(&call, &named, &path)?;
    if flags & RELATIVE != 0 {
        return Err(refuse(
            "relative names",
            "a layer names nothing below it: the pool knows what lies there",
        ));
    }
    let found = found(&call, &view, &device)?;
    let (base, top) = ends(&found.chain, &found.target, (base.as_deref(), top.as_deref()), flags)?;
    let LayerName::Layer(layer) = file(&found.disk, top) else {
        return Err(VirError::argument("the lowest file of a disk lies over nothing"));
    };
    let what = MergeLayers::Commit { top: Some(layer), base: file(&found.disk, base) };
    begin(&call, &view, device, what, (top == 0, speed)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_is_from_and_to_what_libvirt_takes() {
        let chain = ["/karst/p/b", "/karst/p/a", "/karst/p/v"].map(str::to_owned);
        let ends = |base, top, flags| ends(&chain, "vda", (base, top), flags).map_err(|e| e.text);
        assert_eq!(ends(None, None, ACTIVE), Ok((2, 0)));
        assert_eq!(ends(None, Some("vda"), ACTIVE | SHALLOW), Ok((1, 0)));
        assert_eq!(ends(Some("/karst/p/a"), None, ACTIVE | SHALLOW), Ok((1, 0)));
        assert_eq!(ends(None, Some("/karst/p/a"), 0), Ok((2, 1)));
        assert_eq!(ends(Some("vda[2]"), Some("vda[1]"), 0), Ok((2, 1)));
        for (base, top, flags, word) in [
            (None, None, 0, "requires active flag"),
            (None, Some("/karst/p/a"), ACTIVE, "is not active"),
            (None, Some("/karst/p/v"), 0, "has no backing file"),
            (Some("/karst/p/v"), None, ACTIVE | SHALLOW, "not immediately below"),
            (Some("/karst/p/b"), Some("/karst/p/a"), 0, "could not find image"),
            (None, Some("/x"), 0, "could not find image"),
        ] {
            let text = ends(base, top, flags).unwrap_err();
            assert!(text.contains(word), "{text}");
        }
        let one = ["/karst/p/v".to_owned()];
        let alone = super::ends(&one, "vda", (None, None), ACTIVE).unwrap_err();
        assert!(alone.text.contains("has no backing file"), "{}", alone.text);
    }
}
