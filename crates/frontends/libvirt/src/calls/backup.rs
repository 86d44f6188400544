//! Backups of disks of domains that run, and what is told of them, and of memory that is written, as of a domain's job. There are no
//! other jobs: whoever asks for other work waits for its end.

use super::{
    Answered, Named,
    checkpoints::{machine, new, now, targets},
    devices::disk_of,
    domain::is_running,
    memory, nothing, text,
};
use crate::{
    error::{Code, Part, VirError},
    session::{Call, Session},
    xdr::{Typed, Writer},
    xml::{self, backup::NewDisk},
};
use karst_engine::{
    InstanceView,
    checkpoints::backup::{self, BackupDisk, BackupTarget, BeginBackup, DiskBackupView, METADATA, Since},
};
use karst_model::{
    Error, ErrorKind,
    operation::{Operation, OperationState},
};

/// `VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL`
const REUSE: u32 = 1;
/// `VIR_DOMAIN_JOB_UNBOUNDED`, `_COMPLETED`, `_FAILED`, `_CANCELLED`
const UNBOUNDED: i32 = 2;
const COMPLETED: i32 = 3;
const FAILED: i32 = 4;
const CANCELLED: i32 = 5;
/// `VIR_DOMAIN_JOB_OPERATION_BACKUP`
const OPERATION: i32 = 9;
/// `VIR_DOMAIN_JOB_STATS_COMPLETED`, `_KEEP_COMPLETED`
const OF_COMPLETED: u32 = 1;
const KEEP: u32 = 2;

/// What the engine refuses of a backup, in libvirt's words.
fn refused(e: Error) -> VirError {
    match e.kind {
        ErrorKind::Unsupported => VirError::new(Code::ConfigUnsupported, Part::Qemu, e.to_string()),
        _ => e.into(),
    }
}

/// The backup of a domain's disks, if one goes on.
async fn going(call: &Call, view: &InstanceView) -> Result<Option<DiskBackupView>, VirError> {
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    Ok(engine.disk_backup(context, &view.project.name, &view.instance.name).await?)
}

/// The disks of a domain that runs and are backed up when none are named: those that it writes to.
fn all_disks(call: &Call, view: &InstanceView) -> Vec<NewDisk> {
    let plain = |name: String| NewDisk { name, since: None, target: None, export: None, bitmap: None };
    let keys = |device: &str| view.expanded_devices.get(device);
    let written = |device: &str| keys(device).is_some_and(|k| k.get("readonly").is_none_or(|v| v != "true"));
    let shown = super::figures::disks(&call.session.front.engine.inner().inventory.read(), view);
    let is_disk = |target: &str| {
        let found = shown.iter().find(|d| d.target == target).and_then(|d| d.volume.as_ref());
        found.is_some_and(|v| v.content == karst_model::storage::VolumeContent::Block)
    };
    let all = targets(call, view).into_iter();
    all.filter(|(t, device)| written(device) && is_disk(t)).map(|(t, _)| plain(t)).collect()
}

/// `DOMAIN_BACKUP_BEGIN`
pub async fn begin(call: Call) -> Answered {
    let (named, document, checkpoint, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.option(|r| r.string())?, r.u32()?)))?;
    call.known_flags(flags, REUSE)?;
    let view = machine(&call, &named)?;
    if !is_running(&view) {
        let text = "cannot perform disk backup for inactive domain";
        return Err(VirError::new(Code::OperationUnsupported, Part::Qemu, text));
    }
    let wanted = xml::backup::read(&document)?;
    let checkpoint = checkpoint.map(|text| new(&view, &text)).transpose()?;
    if going(&call, &view).await?.is_some() {
        return Err(VirError::state("another backup job is already running"));
    }
    let reuse = flags & REUSE != 0;
    if reuse && wanted.listen.is_some() {
        let text = "what the guest overwrites while it is read is kept in a place of the pool's own: there is none to reuse";
        return Err(VirError::new(Code::ConfigUnsupported, Part::Qemu, text));
    }
    let by_name = targets(&call, &view);
    let mut disks = vec![];
    for disk in wanted.disks.unwrap_or_else(|| all_disks(&call, &view)) {
        let device = disk_of(&view, &disk.name)?;
        let target = by_name.iter().find(|(_, d)| *d == device).map_or(&disk.name, |(t, _)| t);
        let since = match (disk.since, &wanted.since) {
            (Some(xml::backup::Since::Whole), _) | (None, None) => Since::Whole,
            (Some(xml::backup::Since::Checkpoint(name)), _) => Since::Checkpoint(name),
            (None, Some(name)) => Since::Checkpoint(name.clone()),
        };
        let to = match (wanted.listen, disk.target) {
            (Some(_), _) => None,
            (None, Some((pool, name))) => Some(BackupTarget { pool, name, new: !reuse }),
            (None, None) if reuse => {
                let text = format!("missing target of disk {target}, which is to be reused");
                return Err(VirError::new(Code::ConfigUnsupported, Part::Qemu, text));
            }
            // As libvirt does it: beside the disk, by its name and the time.
            (None, None) => {
                let pool = view.expanded_devices.get(&device).and_then(|k| k.get("pool")).cloned();
                let name = format!("{}-{target}.{}", &*view.instance.name, now());
                Some(BackupTarget { pool: pool.unwrap_or_default(), name, new: true })
            }
        };
        disks.push(BackupDisk {
            since,
            target: to,
            export: disk.export.unwrap_or_else(|| target.clone()),
            bitmap: disk.bitmap.unwrap_or_else(|| format!("backup-{target}")),
            device,
        });
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let request = BeginBackup { disks, checkpoint, listen: wanted.listen, limit: None };
    let (project, name) = (&view.project.name, &view.instance.name);
    let operation = engine.disk_backup_begin(context, project, name, request).await.map_err(refused)?;
    // Who is answered may read it.
    backup::begun(engine, &operation).await.map_err(refused)?;
    Ok(nothing())
}

/// `DOMAIN_BACKUP_GET_XML_DESC`
pub async fn xml(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let view = machine(&call, &named)?;
    let missing = || VirError::new(Code::NoDomainBackup, Part::Qemu, "no domain backup job present");
    let found = going(&call, &view).await?.ok_or_else(missing)?;
    Ok(text(&xml::backup::document(&found, &targets(&call, &view))))
}

fn demand_running(view: &InstanceView) -> Result<(), VirError> {
    match is_running(view) {
        true => Ok(()),
        false => Err(VirError::state("domain is not running")),
    }
}

/// Milliseconds since an operation began, until now or until its end.
fn elapsed(operation: &Operation) -> u64 {
    let end = if operation.state.is_final() { operation.updated_at } else { jiff::Timestamp::now() };
    u64::try_from(end.as_millisecond() - operation.created_at.as_millisecond()).unwrap_or(0)
}

fn operation(session: &Session, id: karst_model::OperationId) -> Option<Operation> {
    let records = session.front.engine.inner().inventory.read();
    records.operations.get(&id).map(|o| o.value.clone())
}

/// `DOMAIN_GET_JOB_INFO`
pub async fn job_info(call: Call) -> Answered {
    let view = call.only_guest()?;
    demand_running(&view)?;
    let mut w = Writer::new();
    if let Some(found) = memory::going(&call, &view).await? {
        let (done, total) = (found.state.done, found.state.total);
        let took = operation(&call.session, found.operation).map_or(0, |o| elapsed(&o));
        let of_memory = [total, done, total.saturating_sub(done)];
        w.i32(UNBOUNDED).u64(took).u64(0);
        for figure in of_memory.into_iter().chain(of_memory).chain([0; 3]) {
            w.u64(figure);
        }
        return Ok(w.finish().into());
    }
    match going(&call, &view).await? {
        None => {
            w.i32(0);
            for _ in 0..11 {
                w.u64(0);
            }
        }
        Some(found) => {
            let (done, total) = (found.state.done, found.state.total);
            let took = operation(&call.session, found.operation).map_or(0, |o| elapsed(&o));
            let of_files = [total, done, total.saturating_sub(done)];
            w.i32(UNBOUNDED).u64(took).u64(0);
            for figure in of_files.into_iter().chain([0; 3]).chain(of_files) {
                w.u64(figure);
            }
        }
    }
    Ok(w.finish().into())
}

type Params = Vec<(&'static str, Typed)>;

fn figures(took: u64, done: u64, total: u64) -> Params {
    vec![
        ("operation", Typed::Int(OPERATION)),
        ("time_elapsed", Typed::Ullong(took)),
        ("disk_total", Typed::Ullong(total)),
        ("disk_processed", Typed::Ullong(done)),
        ("disk_remaining", Typed::Ullong(total.saturating_sub(done))),
    ]
}

/// What is told of a backup, or of memory that was written, when it has ended: a `virDomainJobType` with its parameters. Nothing of another operation.
pub(crate) fn completed(operation: &Operation) -> Option<(i32, Params)> {
    let kind = match operation.state {
        OperationState::Success => COMPLETED,
        OperationState::Cancelled => CANCELLED,
        OperationState::Failure | OperationState::NeedsAttention => FAILED,
        _ => return None,
    };
    let took = elapsed(operation);
    let mut params = match (operation.metadata.get(METADATA), memory::said(operation)) {
        (Some(said), _) => {
            let number = |key: &str| said.get(key).and_then(serde_json::Value::as_u64).unwrap_or(0);
            let (done, total) = (number("done"), number("total"));
            figures(took, if kind == COMPLETED { total } else { done }, total)
        }
        (None, Some((what, done, total))) => {
            memory::figures(&what, took, if kind == COMPLETED { total } else { done }, total)
        }
        (None, None) => return None,
    };
    params.push(("success", Typed::Boolean(kind == COMPLETED)));
    if let Some(error) = operation.error.as_ref().filter(|_| kind == FAILED) {
        params.push(("errmsg", Typed::Text(error.to_string())));
    }
    Some((kind, params))
}

/// The instance of which an operation says that it is a job of its.
pub(crate) fn instance_of(operation: &Operation) -> Option<&str> {
    let keys = [METADATA, karst_engine::compute::memory_files::METADATA];
    keys.iter().find_map(|key| operation.metadata.get(*key)?.get("instance")?.as_str())
}

/// `DOMAIN_GET_JOB_STATS`
pub async fn job_stats(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?)))?;
    call.known_flags(flags, OF_COMPLETED | KEEP)?;
    let view = call.guest(&named)?;
    let (kind, params) = if flags & OF_COMPLETED != 0 {
        let id = view.instance.id.to_string();
        let records = call.session.front.engine.inner().inventory.read();
        let of_it = |o: &&karst_engine::Row<Operation>| instance_of(o) == Some(&*id) && o.state.is_final();
        let last = records.operations.values().filter(of_it).max_by_key(|o| o.updated_at);
        last.and_then(|o| completed(o)).unwrap_or_default()
    } else {
        demand_running(&view)?;
        let written = memory::going(&call, &view).await?;
        match going(&call, &view).await? {
            None if written.is_some() => written.map_or_else(Default::default, |found| {
                let took = operation(&call.session, found.operation).map_or(0, |o| elapsed(&o));
                (UNBOUNDED, memory::figures(&found.kind, took, found.state.done, found.state.total))
            }),
            None => (0, vec![]),
            Some(found) => {
                let took = operation(&call.session, found.operation).map_or(0, |o| elapsed(&o));
                (UNBOUNDED, figures(took, found.state.done, found.state.total))
            }
        }
    };
    let mut w = Writer::new();
    w.i32(kind).array(&params, |w, (field, value)| {
        w.typed(field, value);
    });
    Ok(w.finish().into())
}

/// `DOMAIN_ABORT_JOB`: also how a backup that is read ends well.
pub async fn abort(call: Call) -> Answered {
    let view = call.only_guest()?;
    demand_running(&view)?;
    if let Some(found) = memory::going(&call, &view).await? {
        return memory::abort(&call, &view, &found).await;
    }
    if going(&call, &view).await?.is_none() {
        return Err(VirError::state("no job is active on the domain"));
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    engine.disk_backup_end(context, &view.project.name, &view.instance.name).await.map_err(refused)?;
    Ok(nothing())
}
