//! Block jobs. A disk of a running machine is copied into a volume, and the machine goes on from the copy, or it is left as the disk
//! was. What is begun to layers of a disk ([`super::layers`]) is looked at and ended here as well.
//!
//! The disk that an instance owns has the instance's name in its pool (`/karst/POOL/instances/NAME`): copied to that name in another
//! pool it moves there with its snapshots when the machine goes on from it.

use super::{
    Answered, Named,
    devices::{disk_of, number, typed},
    domain::is_running,
    nothing,
    storage::volumes_of,
};
use crate::{
    error::{Code, Part, VirError},
    session::{Call, Driver},
    xdr::{Typed, Writer},
    xml::{
        self,
        machine::{Source, read, refuse},
    },
};
use karst_engine::{
    InstanceView,
    compute::disk_copy::{CopyDisk, CopyTarget, DiskCopyView, merge::Work},
};
use karst_model::{
    Error, ErrorKind,
    guest::{DiskCopyEnd, DiskCopyPhase},
};
use std::sync::Arc;

/// `VIR_DOMAIN_BLOCK_JOB_TYPE_*`, of what is copied or merged.
pub(crate) fn job_type(work: Option<Work>) -> i32 {
    match work {
        Some(Work::Pull) => 1,
        None => 2,
        Some(Work::Commit) => 3,
        Some(Work::ActiveCommit) => 4,
    }
}

/// `VIR_DOMAIN_BLOCK_COPY_*`, of which those of `VIR_DOMAIN_BLOCK_REBASE_*` have the first two too.
const SHALLOW: u32 = 1;
const REUSE: u32 = 2;
const TRANSIENT_JOB: u32 = 4;
const SYNCHRONOUS: u32 = 8;
/// `VIR_DOMAIN_BLOCK_REBASE_*`
const RAW: u32 = 4;
const REBASE_COPY: u32 = 8;
const RELATIVE: u32 = 16;
const DEVICE: u32 = 32;
const REBASE_BYTES: u32 = 64;
/// `VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES`, `VIR_DOMAIN_BLOCK_JOB_INFO_BANDWIDTH_BYTES`
const BYTES: u32 = 1;
/// `VIR_DOMAIN_BLOCK_JOB_ABORT_*`
const ASYNC: u32 = 1;
const PIVOT: u32 = 2;

const NO_CHAIN: &str = "a disk is copied whole, with all that its chain of layers has";

/// The domain, which runs and is a machine, and the device of a disk of it.
pub(super) fn disk(call: &Call, named: &Named, path: &str) -> Result<(Arc<InstanceView>, String), VirError> {
    if call.opened()?.driver == Driver::Lxc {
        return Err(VirError::no_support(crate::table::name_of(call.header.program, call.header.procedure)));
    }
    let view = call.guest(named)?;
    if !is_running(&view) {
        return Err(VirError::state("domain is not running"));
    }
    let device = match disk_of(&view, path) {
        Ok(device) => device,
        // The path of a layer.
        Err(e) => super::layers::by_path(call, &view, path)?.ok_or(e)?,
    };
    Ok((view, device))
}

/// The copy of that disk, if one goes on.
pub(super) async fn going(
    call: &Call,
    view: &InstanceView,
    device: &str,
) -> Result<Option<DiskCopyView>, VirError> {
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let found = engine.disk_copy(context, &view.project.name, &view.instance.name).await?;
    Ok(found.filter(|f| f.device == device))
}

/// Bytes a second of what clients say in MiB, unless they say `bytes`.
pub(super) fn speed(bandwidth: u64, bytes: bool) -> Result<u64, VirError> {
    let said = if bytes { Some(bandwidth) } else { bandwidth.checked_mul(1 << 20) };
    let said = said.filter(|n| i64::try_from(*n).is_ok());
    said.ok_or_else(|| VirError::argument(format!("bandwidth must be less than {}", i64::MAX >> 20)))
}

/// What the engine refuses of a copy, in libvirt's words.
pub(super) fn refused(e: Error) -> VirError {
    match e.kind {
        ErrorKind::Unsupported => VirError::new(Code::ConfigUnsupported, Part::Qemu, e.to_string()),
        _ => e.into(),
    }
}

/// Begins a copy.
async fn begin(
    call: &Call,
    (view, device): (&InstanceView, String),
    to: Option<Source>,
    reuse: bool,
    (speed, synchronous): (u64, bool),
) -> Answered {
    let Some(Source::Volume { pool, volume }) = to else {
        let text =
            "a disk is copied to a volume of a pool: <disk type='volume'>, or the path /karst/POOL/NAME";
        return Err(refuse("disk source", text));
    };
    if going(call, view, &device).await?.is_some() {
        let text = "another block job is active on this disk";
        return Err(VirError::new(Code::BlockCopyActive, Part::Qemu, text));
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let keys = view.expanded_devices.get(&device);
    let owned = keys.is_some_and(|k| !k.contains_key("source"));
    let there = match engine.pools(context)?.into_iter().find(|p| *p.name == *pool) {
        Some(found) => volumes_of(call, &found)?.iter().any(|f| f.name == volume),
        None => {
            let text = format!("no storage pool with matching name '{pool}'");
            return Err(VirError::new(Code::NoStoragePool, Part::Storage, text));
        }
    };
    let moves = owned && volume == xml::machine::owned(&view.instance.name);
    if there && !reuse {
        let text = format!(
            "external destination file for disk {device} already exists and is not a block device: /karst/{pool}/{volume}"
        );
        return Err(VirError::new(Code::ConfigUnsupported, Part::Qemu, text));
    }
    if reuse && (moves || !there) {
        let text = format!("missing destination file for disk {device}: /karst/{pool}/{volume}");
        return Err(VirError::new(Code::OperationFailed, Part::Qemu, text));
    }
    let to = match moves {
        true => CopyTarget::Pool(pool),
        false => CopyTarget::Volume { pool, name: volume, new: !reuse },
    };
    let request = CopyDisk { device: Some(device), to, hold: true, speed, synchronous };
    let (project, name) = (&view.project.name, &view.instance.name);
    engine.disk_copy_begin(context, project, name, request).await.map_err(refused)?;
    Ok(nothing())
}

/// `DOMAIN_BLOCK_COPY`
pub async fn copy(call: Call) -> Answered {
    let (named, path, text, all, flags) = call.arguments(|r| {
        Ok((Named::read_domain(r)?, r.string()?, r.string()?, r.array(16, typed)?, r.u32()?))
    })?;
    call.known_flags(flags, SHALLOW | REUSE | TRANSIENT_JOB | SYNCHRONOUS)?;
    let (view, device) = disk(&call, &named, &path)?;
    if flags & SHALLOW != 0 {
        return Err(refuse("shallow", NO_CHAIN));
    }
    let mut bandwidth = 0;
    for (field, value) in &all {
        let n = number(value).filter(|_| !matches!(value, Typed::Int(_) | Typed::Llong(_)));
        let n = n.ok_or_else(|| VirError::argument(format!("{field} is no number of its type")))?;
        match field.as_str() {
            "bandwidth" => bandwidth = speed(n, true)?,
            "granularity" | "buf-size" if n == 0 => {}
            "granularity" | "buf-size" => {
                return Err(refuse(field, "copies have QEMU's own granularity and buffers"));
            }
            _ => return Err(VirError::argument(format!("parameter '{field}' not supported"))),
        }
    }
    let e = xml::read::document(&text)?;
    if e.name() != "disk" {
        let text = format!("unexpected root element <{}>, expecting <disk>", e.name());
        return Err(VirError::new(Code::XmlError, Part::Domain, text));
    }
    if e.find("backingStore").is_some_and(|b| !b.elements().is_empty()) {
        return Err(refuse("backingStore", NO_CHAIN));
    }
    match e.find("driver").and_then(|d| d.attribute("type")) {
        None | Some("raw") => {}
        Some(other) => return Err(refuse("driver", format!("'{other}' is not there: a copy is raw"))),
    }
    if xml::encryption::of_disk(&e)?.is_some() {
        let text = "a copy that a machine goes on from is not encrypted; leave it out";
        return Err(refuse(xml::encryption::NAME, text));
    }
    let to = read::source(&e)?;
    begin(&call, (&*view, device), to, flags & REUSE != 0, (bandwidth, flags & SYNCHRONOUS != 0)).await
}

/// `DOMAIN_BLOCK_REBASE`: a copy, or without COPY a pull.
pub async fn rebase(call: Call) -> Answered {
    let (named, path, base, bandwidth, flags) = call.arguments(|r| {
        Ok((Named::read_domain(r)?, r.string()?, r.option(|r| r.string())?, r.u64()?, r.u32()?))
    })?;
    call.known_flags(flags, SHALLOW | REUSE | RAW | REBASE_COPY | RELATIVE | DEVICE | REBASE_BYTES)?;
    let (view, device) = disk(&call, &named, &path)?;
    if flags & (SHALLOW | RELATIVE) != 0 {
        return Err(refuse("block rebase", NO_CHAIN));
    }
    if flags & REBASE_COPY == 0 {
        let speed = speed(bandwidth, flags & REBASE_BYTES != 0)?;
        return super::layers::pull_to(&call, (&*view, device), base.as_deref(), speed).await;
    }
    let base = base.ok_or_else(|| VirError::argument("base cannot be NULL when copying"))?;
    let mut source = xml::Element::new("source");
    source.set("file", &base);
    let to = read::source(&xml::Element::new("disk").with("type", "file").child(source))?;
    let speed = speed(bandwidth, flags & REBASE_BYTES != 0)?;
    begin(&call, (&*view, device), to, flags & REUSE != 0, (speed, false)).await
}

fn no_job(path: &str) -> VirError {
    VirError::state(format!("disk {path} does not have an active block job"))
}

/// `DOMAIN_BLOCK_JOB_ABORT`: also how one ends well.
pub async fn abort(call: Call) -> Answered {
    let (named, path, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.u32()?)))?;
    call.known_flags(flags, ASYNC | PIVOT)?;
    let (view, device) = disk(&call, &named, &path)?;
    let found = going(&call, &view, &device).await?.ok_or_else(|| no_job(&path))?;
    let ready = matches!(found.state.phase, DiskCopyPhase::Ready | DiskCopyPhase::Pivoted);
    let how = match (flags & PIVOT != 0, ready) {
        (true, true) => DiskCopyEnd::Pivot,
        (true, false) => {
            let text = format!("disk '{path}' not ready for pivot yet");
            return Err(VirError::new(Code::BlockCopyActive, Part::Qemu, text));
        }
        // What is complete is left.
        (false, true) => DiskCopyEnd::Finish,
        (false, false) => DiskCopyEnd::Cancel,
    };
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let (project, name) = (&view.project.name, &view.instance.name);
    let wait = flags & ASYNC == 0;
    engine.disk_copy_end(context, project, name, &device, how, wait).await.map_err(refused)?;
    Ok(nothing())
}

/// How far a job is, in libvirt's words: the end is reached when it is ready, and not before.
fn reached(found: &DiskCopyView) -> (u64, u64) {
    let (done, total) = (found.state.done, found.state.total.max(1));
    match found.state.phase {
        DiskCopyPhase::Ready | DiskCopyPhase::Pivoted => (total, total),
        DiskCopyPhase::Gone => (0, 1),
        DiskCopyPhase::Copying | DiskCopyPhase::Failed { .. } => (done.min(total - 1), total),
    }
}

/// `DOMAIN_GET_BLOCK_JOB_INFO`
pub async fn info(call: Call) -> Answered {
    let (named, path, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.u32()?)))?;
    call.known_flags(flags, BYTES)?;
    let (view, device) = disk(&call, &named, &path)?;
    let mut w = Writer::new();
    match going(&call, &view, &device).await? {
        None => w.i32(0).i32(0).u64(0).u64(0).u64(0),
        Some(found) => {
            let bytes = found.state.speed;
            let bandwidth = if flags & BYTES != 0 { bytes } else { bytes.div_ceil(1 << 20) };
            let (done, total) = reached(&found);
            w.i32(1).i32(job_type(found.work)).u64(bandwidth).u64(done).u64(total)
        }
    };
    Ok(w.finish().into())
}

/// `DOMAIN_BLOCK_JOB_SET_SPEED`
pub async fn set_speed(call: Call) -> Answered {
    let (named, path, bandwidth, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.u64()?, r.u32()?)))?;
    call.known_flags(flags, BYTES)?;
    let speed = speed(bandwidth, flags & BYTES != 0)?;
    let (view, device) = disk(&call, &named, &path)?;
    going(&call, &view, &device).await?.ok_or_else(|| no_job(&path))?;
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let (project, name) = (&view.project.name, &view.instance.name);
    engine.disk_copy_speed(context, project, name, &device, speed).await.map_err(refused)?;
    Ok(nothing())
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::{OperationId, guest::DiskCopyState};

    #[test]
    fn speeds_are_mebibytes_unless_said_otherwise() {
        assert_eq!((speed(3, false), speed(3, true)), (Ok(3 << 20), Ok(3)));
        assert_eq!(speed(u64::MAX, false).unwrap_err().code, Code::InvalidArg);
        assert_eq!(speed(u64::MAX, true).unwrap_err().code, Code::InvalidArg);
    }

    #[test]
    fn the_end_is_reached_when_it_is_ready() {
        let at = |phase, done, total| {
            let state = DiskCopyState { phase, done, total, speed: 0 };
            let operation = OperationId(uuid::Uuid::nil());
            reached(&DiskCopyView { device: "root".into(), state, operation, work: None })
        };
        assert_eq!(at(DiskCopyPhase::Copying, 10, 10), (9, 10), "virsh takes the end for ready");
        assert_eq!(at(DiskCopyPhase::Ready, 10, 12), (12, 12));
        assert_eq!(at(DiskCopyPhase::Ready, 0, 0), (1, 1));
        assert_eq!(at(DiskCopyPhase::Gone, 0, 0), (0, 1), "it has not begun");
    }
}
