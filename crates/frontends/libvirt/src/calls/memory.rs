//! Memory of domains in files of the host: `virsh save`, `restore`, `dump --memory-only` and `save-image-*`; and what is told of these as
//! of a domain's job. Paths are an administrator's, and the host's policy grants them (`save_paths`).
//!
//! A file has the domain's document before its memory. A domain that is defined goes on as it is defined, which must be what the
//! document says of all that its guest sees, and of its disks; one that is not is there again as a transient domain by the document.

use super::{
    Answered, Named,
    define::{create_from_memory, present, read},
    devices::typed,
    domain::is_running,
    nothing,
    power::{ended, gone},
    text,
};
use crate::{
    error::{Code, Part, VirError},
    session::{Call, Driver},
    xdr::Typed,
    xml::{
        self,
        domain::document_of,
        machine::{Disk, Machine, Nic, Screen, refuse},
    },
};
use karst_engine::{
    InstanceView,
    compute::memory_files::{AfterDump, DumpMemory, METADATA, MemoryView, SaveMemory},
};
use karst_model::{
    Error, ErrorKind,
    memory::{DumpFormat, SavedMemory},
    operation::Operation,
};

/// `VIR_DOMAIN_SAVE_*`; to read or write past the cache changes nothing here.
const BYPASS_CACHE: u32 = 1;
const RUNNING: u32 = 2;
const PAUSED: u32 = 4;
const RESET_NVRAM: u32 = 8;
/// `VIR_DUMP_*`
const CRASH: u32 = 1;
const LIVE: u32 = 2;
const DUMP_BYPASS_CACHE: u32 = 4;
const RESET: u32 = 8;
const MEMORY_ONLY: u32 = 16;
/// `VIR_DOMAIN_JOB_OPERATION_SAVE`, `_DUMP`
pub(super) const SAVES: i32 = 2;
const DUMPS: i32 = 8;

/// What the engine refuses, in libvirt's words.
fn refused(e: Error) -> VirError {
    match e.kind {
        ErrorKind::Unsupported => VirError::new(Code::ConfigUnsupported, Part::Qemu, e.to_string()),
        ErrorKind::Invalid | ErrorKind::TooLarge if e.field.as_deref() == Some("path") => {
            VirError::new(Code::OperationFailed, Part::Qemu, e.to_string())
        }
        _ => e.into(),
    }
}

/// What flags say of whether it is to run.
pub(super) fn wanted_state(call: &Call, flags: u32, known: u32) -> Result<Option<bool>, VirError> {
    call.known_flags(flags, known | RUNNING | PAUSED)?;
    match flags & (RUNNING | PAUSED) {
        0 => Ok(None),
        RUNNING => Ok(Some(false)),
        PAUSED => Ok(Some(true)),
        _ => Err(VirError::argument("a domain is either running or paused: give one of the two flags")),
    }
}

fn demand_machines(call: &Call) -> Result<(), VirError> {
    match call.opened()?.driver {
        Driver::Qemu => Ok(()),
        Driver::Lxc => {
            Err(VirError::no_support(crate::table::name_of(call.header.program, call.header.procedure)))
        }
    }
}

/// What differs of what a guest sees, and of its disks if `sources`, in the words of documents.
fn differs(old: &Machine, new: &Machine, sources: bool) -> Option<String> {
    let plain = [
        ("name", old.name == new.name),
        ("uuid", old.uuid == new.uuid),
        ("memory", old.memory == new.memory),
        ("vcpu", (old.cpus, old.most_cpus) == (new.cpus, new.most_cpus)),
        ("os firmware", old.firmware == new.firmware),
        ("cpu", old.cpu_model == new.cpu_model),
        ("features hyperv", old.hyper_v == new.hyper_v),
        ("tpm", old.tpm == new.tpm),
        ("filesystem", old.filesystems == new.filesystems),
        ("hostdev", old.given == new.given),
        ("graphics type 'spice'", old.spice == new.spice),
        ("os type machine", fits(&old.machine, &new.machine)),
    ];
    if let Some((what, _)) = plain.iter().find(|(_, same)| !same) {
        return Some((*what).to_owned());
    }
    let disk = |a: &Disk, b: &Disk| {
        let same = (&a.slot, a.bus, a.cdrom, a.readonly) == (&b.slot, b.bus, b.cdrom, b.readonly);
        same && a.options == b.options
            && fits(&a.pci, &b.pci)
            && (!sources || a.cdrom || a.source == b.source)
    };
    for a in &old.disks {
        if !new.disks.iter().any(|b| a.target == b.target && disk(a, b)) {
            return Some(format!("disk {}", a.target));
        }
    }
    let nic = |a: &Nic, b: &Nic| {
        (&a.mac, a.model, a.options) == (&b.mac, b.model, b.options) && fits(&a.pci, &b.pci)
    };
    for a in &old.nics {
        if !new.nics.iter().any(|b| nic(a, b)) {
            return Some(format!("interface {}", a.mac.as_deref().unwrap_or_default()));
        }
    }
    let more = new.disks.len() != old.disks.len() || new.nics.len() != old.nics.len();
    more.then(|| "devices".to_owned())
}

/// What one of the two does not say is what the other says.
fn fits(a: &Option<String>, b: &Option<String>) -> bool {
    a.is_none() || b.is_none() || a == b
}

fn demand_same(old: &Machine, new: &Machine) -> Result<(), VirError> {
    match differs(old, new, false) {
        None => Ok(()),
        Some(what) => Err(refuse(
            &what,
            "is another than that of the domain whose memory was saved, and its guest would see that; what differs may be the \
             host's side only",
        )),
    }
}

/// Refuses a document of a domain whose memory is kept that says something else of what its guest sees, or of its disks.
///
/// # Errors
/// CONFIG_UNSUPPORTED, naming what differs.
pub(super) fn demand_unchanged(old: &Machine, new: &Machine) -> Result<(), VirError> {
    let Some(what) = differs(old, new, true) else { return Ok(()) };
    let why = "is another than that of the domain whose memory is kept, which goes on as it was; remove its memory \
        (managedsave-remove) to change that";
    Err(refuse(&what, why))
}

/// The document of a domain as it runs, in the form of a definition.
fn document(call: &Call, view: &InstanceView) -> Result<String, VirError> {
    let applied = view.runtime.as_ref().and_then(|r| r.applied.as_ref());
    let config = applied.map_or(&view.expanded_config, |a| &a.config);
    let devices = applied.map_or(&view.expanded_devices, |a| &a.devices);
    document_of(call, view, config, devices, false, (None, &[]))
}

/// What is stored of a document has no password in it: records and files have it in clear.
fn demand_no_secret(machine: &Machine) -> Result<(), VirError> {
    match machine.screen {
        Screen::Guarded(_) => {
            let text = "is in no file with memory; leave it out, and set it when the domain runs";
            Err(refuse("graphics passwd", text))
        }
        Screen::Unsaid | Screen::Open => Ok(()),
    }
}

async fn save_to(call: &Call, named: &Named, path: String, dxml: Option<String>, flags: u32) -> Answered {
    demand_machines(call)?;
    let paused = wanted_state(call, flags, BYPASS_CACHE)?;
    let view = call.guest(named)?;
    if !is_running(&view) {
        return Err(VirError::state("domain is not running"));
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let (project, name) = (&view.project.name, &view.instance.name);
    if view.instance.ephemeral && engine.display_state(context, project, name)?.password {
        let text = "graphics: the password of its screen is in no file, and a transient domain would be there again without; \
            remove the password, or define the domain";
        return Err(VirError::new(Code::ConfigUnsupported, Part::Qemu, text));
    }
    let mut document = document(call, &view)?;
    // What could not be read again would be lost: the machine ends.
    let own = read(call, &document)?;
    if let Some(new) = dxml {
        let wanted = read(call, &new)?;
        demand_no_secret(&wanted)?;
        demand_same(&own, &wanted)?;
        document = new;
    }
    let request = SaveMemory { path, document, paused };
    let operation = engine.machine_save(context, project, name, request).await.map_err(refused)?;
    ended(operation).await?;
    if view.instance.ephemeral {
        gone(call, &view).await;
    }
    Ok(nothing())
}

/// `DOMAIN_SAVE`
pub async fn save(call: Call) -> Answered {
    let (named, to) = call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?)))?;
    save_to(&call, &named, to, None, 0).await
}

/// `DOMAIN_SAVE_FLAGS`
pub async fn save_flags(call: Call) -> Answered {
    let (named, to, dxml, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.option(|r| r.string())?, r.u32()?)))?;
    save_to(&call, &named, to, dxml, flags).await
}

/// File and document out of parameters.
fn of_params(all: Vec<(String, Typed)>) -> Result<(String, Option<String>), VirError> {
    let (mut file, mut dxml) = (None, None);
    for (field, value) in all {
        match (field.as_str(), value) {
            ("file", Typed::Text(value)) => file = Some(value),
            ("dxml", Typed::Text(value)) => dxml = Some(value),
            ("image_format", Typed::Text(value)) if value == "raw" => {}
            ("image_format", _) => {
                let text = "image_format: memory is written as it is, which is the format 'raw'";
                return Err(VirError::new(Code::ConfigUnsupported, Part::Qemu, text));
            }
            _ => {
                return Err(VirError::argument(format!(
                    "parameter '{field}' not supported, or not of its type"
                )));
            }
        }
    }
    let file =
        file.ok_or_else(|| VirError::argument("the parameter 'file' is needed: no place is chosen for it"))?;
    Ok((file, dxml))
}

/// `DOMAIN_SAVE_PARAMS`
pub async fn save_params(call: Call) -> Answered {
    let (named, params, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.array(64, typed)?, r.u32()?)))?;
    let (file, dxml) = of_params(params)?;
    save_to(&call, &named, file, dxml, flags).await
}

/// What a file says of itself.
async fn saved(call: &Call, path: &str) -> Result<(SavedMemory, Machine), VirError> {
    demand_machines(call)?;
    let session = &call.session;
    let saved = session.front.engine.memory_file(&session.context, path).await.map_err(refused)?;
    let machine = xml::machine::read::machine(&saved.document)?;
    if machine.uuid != Some(saved.uuid) {
        let text = format!("the document in '{path}' is not of the domain whose memory is there");
        return Err(VirError::new(Code::OperationFailed, Part::Qemu, text));
    }
    Ok((saved, machine))
}

async fn restore_from(call: &Call, path: String, dxml: Option<String>, flags: u32) -> Answered {
    if flags & RESET_NVRAM != 0 {
        let text =
            "the variables of the firmware are part of what was saved; start the domain without it instead";
        return Err(VirError::new(Code::OperationUnsupported, Part::Qemu, text));
    }
    let wanted = wanted_state(call, flags, BYPASS_CACHE)?;
    let (saved, old) = saved(call, &path).await?;
    let wanted_machine = match &dxml {
        Some(text) => {
            let new = read(call, text)?;
            demand_same(&old, &new)?;
            new
        }
        None => read(call, &saved.document)?,
    };
    let paused = wanted.unwrap_or(saved.paused);
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    match present(call, &wanted_machine)? {
        Some(view) if is_running(&view) => {
            return Err(VirError::state(format!("domain '{}' is already active", &*view.instance.name)));
        }
        Some(view) => {
            let now = xml::machine::read::machine(&xml::domain::document(call, &view, true)?)?;
            if let Some(what) = differs(&wanted_machine, &now, true) {
                let why = "of the domain as it is defined is another than in the file or document; a domain that is defined goes on as \
                    it is: change its definition, or the document (save-image-edit)";
                return Err(refuse(&what, why));
            }
            let (project, name) = (&view.project.name, &view.instance.name);
            let operation =
                engine.machine_restore(context, project, name, &path, paused).await.map_err(refused)?;
            ended(operation).await?;
        }
        None => create_from_memory(call, wanted_machine, path, paused).await?,
    }
    Ok(nothing())
}

/// `DOMAIN_RESTORE`
pub async fn restore(call: Call) -> Answered {
    let from = call.arguments(|r| r.string())?;
    restore_from(&call, from, None, 0).await
}

/// `DOMAIN_RESTORE_FLAGS`
pub async fn restore_flags(call: Call) -> Answered {
    let (from, dxml, flags) = call.arguments(|r| Ok((r.string()?, r.option(|r| r.string())?, r.u32()?)))?;
    restore_from(&call, from, dxml, flags).await
}

/// `DOMAIN_RESTORE_PARAMS`
pub async fn restore_params(call: Call) -> Answered {
    let (params, flags) = call.arguments(|r| Ok((r.array(64, typed)?, r.u32()?)))?;
    let (file, dxml) = of_params(params)?;
    restore_from(&call, file, dxml, flags).await
}

/// `DOMAIN_SAVE_IMAGE_GET_XML_DESC`: nothing secret is in it.
pub async fn image_xml(call: Call) -> Answered {
    let (file, flags) = call.arguments(|r| Ok((r.string()?, r.u32()?)))?;
    call.known_flags(flags, 1)?;
    Ok(text(&saved(&call, &file).await?.0.document))
}

/// `DOMAIN_SAVE_IMAGE_DEFINE_XML`
pub async fn image_define(call: Call) -> Answered {
    let (file, dxml, flags) = call.arguments(|r| Ok((r.string()?, r.string()?, r.u32()?)))?;
    let wanted = wanted_state(&call, flags, 0)?;
    let (saved, old) = saved(&call, &file).await?;
    let new = read(&call, &dxml)?;
    demand_no_secret(&new)?;
    demand_same(&old, &new)?;
    let paused = wanted.unwrap_or(saved.paused);
    let session = &call.session;
    let engine = &session.front.engine;
    let changed = engine.memory_file_change(&session.context, &file, saved.uuid, dxml, paused).await;
    changed.map_err(refused)?;
    Ok(nothing())
}

async fn dump_to(call: &Call, named: &Named, path: String, format: u32, flags: u32) -> Answered {
    demand_machines(call)?;
    call.known_flags(flags, CRASH | LIVE | DUMP_BYPASS_CACHE | RESET | MEMORY_ONLY)?;
    let format = match format {
        0 => DumpFormat::Elf,
        1 => DumpFormat::KdumpZlib,
        2 => DumpFormat::KdumpLzo,
        3 => DumpFormat::KdumpSnappy,
        4 => DumpFormat::WinDmp,
        n => return Err(VirError::argument(format!("unknown dump format {n}"))),
    };
    if flags & MEMORY_ONLY == 0 {
        let text = "a dump is of the memory alone (--memory-only); to go on from there, save the domain";
        return Err(VirError::new(Code::ConfigUnsupported, Part::Qemu, text));
    }
    let after = match flags & (CRASH | LIVE | RESET) {
        // QEMU lets it stand still for so long, whether that is asked for or not.
        0 | LIVE => AfterDump::GoesOn,
        CRASH => AfterDump::Ends,
        RESET => AfterDump::Reset,
        _ => return Err(VirError::argument("crash, reset and live flags are mutually exclusive")),
    };
    let view = call.guest(named)?;
    if !is_running(&view) {
        return Err(VirError::state("domain is not running"));
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let (project, name) = (&view.project.name, &view.instance.name);
    let request = DumpMemory { path, format, after };
    let operation = engine.machine_dump(context, project, name, request).await.map_err(refused)?;
    ended(operation).await?;
    if view.instance.ephemeral && after == AfterDump::Ends {
        gone(call, &view).await;
    }
    Ok(nothing())
}

/// `DOMAIN_CORE_DUMP`
pub async fn dump(call: Call) -> Answered {
    let (named, to, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.u32()?)))?;
    dump_to(&call, &named, to, 0, flags).await
}

/// `DOMAIN_CORE_DUMP_WITH_FORMAT`
pub async fn dump_with_format(call: Call) -> Answered {
    let (named, to, format, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.u32()?, r.u32()?)))?;
    dump_to(&call, &named, to, format, flags).await
}

/// The memory of a domain that is being written, if it is.
pub(super) async fn going(call: &Call, view: &InstanceView) -> Result<Option<MemoryView>, VirError> {
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    Ok(engine.memory_writing(context, &view.project.name, &view.instance.name).await?)
}

/// Breaks it off, unless it is a dump, which libvirt does not break off either.
pub(super) async fn abort(call: &Call, view: &InstanceView, job: &MemoryView) -> Answered {
    if job.kind == "dump" {
        return Err(VirError::state("cannot abort memory-only dump"));
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    engine.memory_writing_abort(context, &view.project.name, &view.instance.name).await?;
    Ok(nothing())
}

/// `virDomainJobOperation`
pub(super) fn operation(kind: &str) -> i32 {
    if kind == "dump" { DUMPS } else { SAVES }
}

/// Figures of it.
pub(super) fn figures(kind: &str, took: u64, done: u64, total: u64) -> Vec<(&'static str, Typed)> {
    let left = total.saturating_sub(done);
    let all = [
        ("time_elapsed", took),
        ("data_total", total),
        ("data_processed", done),
        ("data_remaining", left),
        ("memory_total", total),
        ("memory_processed", done),
        ("memory_remaining", left),
    ];
    let of = ("operation", Typed::Int(operation(kind)));
    std::iter::once(of).chain(all.map(|(name, value)| (name, Typed::Ullong(value)))).collect()
}

/// What an operation says of memory that it writes: its kind, and bytes that are done of all.
pub(super) fn said(operation: &Operation) -> Option<(String, u64, u64)> {
    let said = operation.metadata.get(METADATA)?;
    let number = |key: &str| said.get(key).and_then(serde_json::Value::as_u64).unwrap_or(0);
    Some((said.get("kind")?.as_str()?.to_owned(), number("done"), number("total")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(more: &str, devices: &str) -> Machine {
        let text = format!(
            "<domain type='qemu'><name>v1</name><uuid>6c0f7f0e-0000-4000-8000-000000000001</uuid><memory>524288</memory>{more}\
             <vcpu>1</vcpu><os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os><devices>{devices}</devices></domain>"
        );
        xml::machine::read::machine(&text).unwrap()
    }

    fn disk(volume: &str, target: &str) -> String {
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/karst/default/{volume}'/>\
             <target dev='{target}' bus='virtio'/></disk>"
        )
    }

    #[test]
    fn what_a_guest_sees_stays_and_the_hosts_side_may_change() {
        let old = machine("", &disk("a", "vda"));
        assert_eq!(differs(&old, &machine("<title>other</title>", &disk("a", "vda")), true), None);
        let moved = machine("", &disk("b", "vda"));
        assert_eq!(differs(&old, &moved, false), None);
        assert_eq!(differs(&old, &moved, true).as_deref(), Some("disk vda"));
        assert_eq!(differs(&old, &machine("", &disk("a", "vdb")), false).as_deref(), Some("disk vda"));
        let more = disk("a", "vda") + &disk("b", "vdb");
        assert_eq!(differs(&old, &machine("", &more), false).as_deref(), Some("devices"));
        let larger = Machine { memory: 1 << 20, ..machine("", &disk("a", "vda")) };
        assert_eq!(differs(&old, &larger, false).as_deref(), Some("memory"));
        let other = Machine { name: "v2".into(), ..machine("", &disk("a", "vda")) };
        assert!(demand_same(&old, &other).unwrap_err().text.starts_with("name: "));
    }

    #[test]
    fn parameters_are_taken_or_named() {
        let text = |name: &str, value: &str| (name.to_owned(), Typed::Text(value.into()));
        let all = vec![text("file", "/a"), text("dxml", "<domain/>"), text("image_format", "raw")];
        assert_eq!(of_params(all).unwrap(), ("/a".into(), Some("<domain/>".into())));
        let format = of_params(vec![text("file", "/a"), text("image_format", "sparse")]).unwrap_err();
        assert!(format.code == Code::ConfigUnsupported && format.text.contains("image_format"));
        assert!(
            of_params(vec![("parallel.channels".into(), Typed::Int(4))])
                .unwrap_err()
                .text
                .contains("parallel")
        );
        assert!(of_params(vec![]).unwrap_err().text.contains("'file'"));
    }
}
