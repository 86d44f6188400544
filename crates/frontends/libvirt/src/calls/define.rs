//! Defining domains by XML, starting transient ones, and undefining.

use super::{Answered, Named, connect::facts, domain::is_running, graphics, nothing, power, write_domain};
use crate::{
    domain_uuid,
    error::{Code, Part, VirError},
    session::{Call, Driver},
    xdr::Writer,
    xml::{
        self,
        machine::{Machine, Source, refuse, spec},
    },
};
use karst_engine::{
    InstanceView,
    compute::{
        create::{CreateInstance, InstanceSource},
        define::DefineMachine,
        update::UpdateInstance,
    },
};
use karst_model::{
    Error, ErrorKind,
    instance::{Firmware, InstanceKind},
    node::AcceleratorKind,
    storage::{VolumeContent, VolumeOwner},
};
use std::sync::Arc;

/// What an engine does not do of a definition is an unsupported configuration to libvirt's clients.
pub fn of_definition(e: Error) -> VirError {
    match e.kind {
        ErrorKind::Unsupported => VirError::new(Code::ConfigUnsupported, Part::Qemu, e.to_string()),
        ErrorKind::Conflict => VirError::new(Code::OperationFailed, Part::Qemu, e.to_string()),
        _ => e.into(),
    }
}

pub(super) fn read(call: &Call, text: &str) -> Result<Machine, VirError> {
    if call.opened()?.driver != Driver::Qemu {
        return Err(refuse("domain type", "containers are made of images, not defined by XML"));
    }
    let machine = xml::machine::read::machine(&super::encryption::by_uuid(call, text)?)?;
    if machine.kvm && facts(call)?.accelerator.kind != AcceleratorKind::Kvm {
        return Err(refuse("domain type", "'kvm' is not usable on this host; 'qemu' is"));
    }
    demand_discs(call, &machine)?;
    graphics::demand_settable(call, &machine.screen)?;
    graphics::demand_places(call, &machine)?;
    Ok(machine)
}

/// A drive of discs has a disc in it, and a disk is none: what a guest may write is not decided by a word of its document
/// alone. Whether a volume is there at all is the engine's to say.
pub(super) fn demand_discs(call: &Call, machine: &Machine) -> Result<(), VirError> {
    let session = &call.session;
    let project = &session.opened()?.project;
    for disk in &machine.disks {
        let (pool, volume) = match &disk.source {
            Some(Source::Volume { pool, volume }) => (pool, volume),
            _ => continue,
        };
        let Ok(found) = session.front.engine.custom_volume(&session.context, project, pool, volume) else {
            continue;
        };
        match (disk.cdrom, found.content == VolumeContent::Iso) {
            (true, false) => {
                let text = format!(
                    "volume '{volume}' of {} is no disc; make one with the format 'iso' or a name that ends in .iso",
                    disk.target
                );
                return Err(refuse("disk device", text));
            }
            (false, true) => {
                let text = format!("volume '{volume}' of {} is a disc; use device='cdrom'", disk.target);
                return Err(refuse("disk device", text));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The domain that a document is about, when there is one; a name and a UUID of two are a mistake.
pub(super) fn present(call: &Call, machine: &Machine) -> Result<Option<Arc<InstanceView>>, VirError> {
    let failed = |text: String| VirError::new(Code::OperationFailed, Part::Qemu, text);
    if let Some(view) = machine.uuid.and_then(|uuid| call.session.guest_by_uuid(uuid).ok()) {
        return match *view.instance.name == *machine.name {
            true => Ok(Some(view)),
            false => Err(failed(format!(
                "domain '{}' is already defined with uuid {}",
                &*view.instance.name,
                domain_uuid(&view)
            ))),
        };
    }
    match call.session.guest(&machine.name) {
        Ok(view) => {
            Err(failed(format!("domain '{}' already exists with uuid {}", machine.name, domain_uuid(&view))))
        }
        Err(_) => Ok(None),
    }
}

/// How a new domain begins.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Begins {
    /// Defined, and off.
    Off,
    /// Transient, and running.
    Running,
    /// Transient, and still before its first instruction.
    Paused,
}

/// A transient domain that goes on from memory in a file of the host.
pub(super) async fn create_from_memory(
    call: &Call,
    machine: Machine,
    file: String,
    paused: bool,
) -> Result<(), VirError> {
    let begins = if paused { Begins::Paused } else { Begins::Running };
    make(call, machine, begins, Some(file)).await
}

async fn create(call: &Call, machine: Machine, begins: Begins) -> Result<(), VirError> {
    make(call, machine, begins, None).await
}

async fn make(call: &Call, machine: Machine, begins: Begins, memory: Option<String>) -> Result<(), VirError> {
    let transient = begins != Begins::Off;
    let created = spec::create(&machine)?;
    let name = machine.name.clone();
    let request = DefineMachine {
        create: CreateInstance {
            name: Some(machine.name),
            kind: InstanceKind::VirtualMachine,
            description: machine.description,
            ephemeral: transient,
            config: created.config,
            devices: created.devices,
            profiles: Some(vec![]),
            source: InstanceSource::None,
            start: transient,
            target: None,
            vmid: None,
        },
        uuid: machine.uuid,
        places: created.places,
        paused: begins == Begins::Paused,
        memory,
    };
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let (_, operation) =
        engine.machine_define(context, &session.opened()?.project, request).await.map_err(of_definition)?;
    if let Some(e) = operation.ended().await.error.clone() {
        return Err(of_definition(e));
    }
    graphics::set(call, &session.opened()?.project, &name, machine.screen).await
}

async fn change(call: &Call, view: &InstanceView, machine: Machine) -> Result<(), VirError> {
    let now = xml::machine::read::machine(&xml::domain::document(call, view, true)?)?;
    let instance = &view.instance;
    let present = spec::Present {
        machine: &now,
        config: &instance.config,
        devices: &instance.devices,
        expanded: &view.expanded_devices,
        identities: &instance.identities,
    };
    let spec::Updated { config, devices, slots } = spec::update(&present, &machine)?;
    let request = UpdateInstance {
        description: machine.description,
        ephemeral: false,
        config,
        devices,
        profiles: view.profiles.iter().map(|p| p.name.to_string()).collect(),
        if_version: Some(instance.spec_version),
    };
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let (project, name) = (&view.project.name, &instance.name);
    let changed = engine.machine_update(context, project, name, request, false, &slots).await;
    if let Some(e) = changed.map_err(of_definition)?.ended().await.error.clone() {
        return Err(of_definition(e));
    }
    graphics::set(call, project, name, machine.screen).await
}

/// Changes the definition of a domain whose memory is kept, which goes on by it: all but what its guest sees, and its disks.
///
/// # Errors
/// Those of a definition; CONFIG_UNSUPPORTED for what stays, by its name.
pub(super) async fn redefine_saved(call: &Call, view: &InstanceView, text: &str) -> Result<(), VirError> {
    let machine = read(call, text)?;
    let now = xml::machine::read::machine(&xml::domain::document(call, view, true)?)?;
    super::memory::demand_unchanged(&now, &machine)?;
    change(call, view, machine).await
}

async fn defined(call: &Call, text: &str) -> Answered {
    let machine = read(call, text)?;
    let name = machine.name.clone();
    match present(call, &machine)? {
        Some(view) => change(call, &view, machine).await?,
        None => create(call, machine, Begins::Off).await?,
    }
    domain(call, &name)
}

fn domain(call: &Call, name: &str) -> Answered {
    let mut w = Writer::new();
    write_domain(&mut w, &*call.session.guest(name)?);
    Ok(w.finish().into())
}

/// `DOMAIN_DEFINE_XML`
pub async fn define(call: Call) -> Answered {
    defined(&call, &call.arguments(|r| r.string())?).await
}

/// `DOMAIN_DEFINE_XML_FLAGS`: what is not known is refused or kept anyway.
pub async fn define_flags(call: Call) -> Answered {
    let (text, flags) = call.arguments(|r| Ok((r.string()?, r.u32()?)))?;
    // To be checked against the schema.
    call.known_flags(flags, 1)?;
    defined(&call, &text).await
}

/// `DOMAIN_CREATE_XML`: a transient domain is an ephemeral instance. One that is defined is started, by a document that says the
/// same, and stays defined.
pub async fn create_xml(call: Call) -> Answered {
    let (text, flags) = call.arguments(|r| Ok((r.string()?, r.u32()?)))?;
    // Checked against the schema.
    call.known_flags(flags, power::START | 16)?;
    let machine = read(&call, &text)?;
    let name = machine.name.clone();
    match present(&call, &machine)? {
        Some(view) if is_running(&view) => {
            return Err(VirError::state(format!("domain is already active as '{name}'")));
        }
        Some(view) => {
            let now = xml::machine::read::machine(&xml::domain::document(&call, &view, true)?)?;
            // Its password is not shown, and stays what it is.
            if (Machine { screen: now.screen.clone(), ..machine }) != now {
                let text = "a domain that is defined starts as that says: change its definition, then start it; or give \
                    the document another name and UUID";
                return Err(refuse("domain", text));
            }
            power::start_with(&call, &view, flags).await?;
        }
        None => {
            let begins = if flags & power::PAUSED != 0 { Begins::Paused } else { Begins::Running };
            create(&call, machine, begins).await?;
            power::doom(&call, &*call.session.guest(&name)?, flags);
        }
    }
    domain(&call, &name)
}

/// `VIR_DOMAIN_UNDEFINE_*`
const MANAGED_SAVE: u32 = 1;
const SNAPSHOTS: u32 = 2;
const NVRAM: u32 = 4;
const KEEP_NVRAM: u32 = 8;
const CHECKPOINTS: u32 = 16;
const TPM: u32 = 32;
const KEEP_TPM: u32 = 64;

/// `DOMAIN_UNDEFINE`
pub async fn undefine(call: Call) -> Answered {
    forget(&call, &*call.only_guest()?, 0).await
}

/// `DOMAIN_UNDEFINE_FLAGS`
pub async fn undefine_flags(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?)))?;
    call.known_flags(flags, MANAGED_SAVE | SNAPSHOTS | NVRAM | KEEP_NVRAM | CHECKPOINTS | TPM | KEEP_TPM)?;
    if flags & NVRAM != 0 && flags & KEEP_NVRAM != 0 || flags & TPM != 0 && flags & KEEP_TPM != 0 {
        return Err(VirError::argument("what is removed cannot be kept: give one of the two flags"));
    }
    forget(&call, &*call.guest(&named)?, flags).await
}

/// Disks stay, as volumes of their pools: what is undefined is the machine.
async fn forget(call: &Call, view: &InstanceView, flags: u32) -> Answered {
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let (project, instance) = (&view.project.name, &view.instance);
    let part = call.opened()?.driver.part();
    if instance.ephemeral {
        return Err(VirError::state("cannot undefine transient domain"));
    }
    if flags & (KEEP_NVRAM | KEEP_TPM) != 0 {
        let text = "what the firmware and the TPM keep goes with the domain; give --nvram and --tpm, or keep a copy of the \
            domain (virt-clone)";
        return Err(VirError::new(Code::OperationUnsupported, part, text));
    }
    let (snapshots, checkpoints, own) = {
        let records = engine.inner().inventory.read();
        let root = records.volumes.get(&instance.root);
        let checkpoints = records.checkpoints_of(instance.id).len();
        (
            records.snapshots_of(instance.id).len(),
            checkpoints,
            root.is_none_or(|v| v.owner != VolumeOwner::Custom),
        )
    };
    let hidden = view.expanded_devices.values().any(|keys| {
        let is = |key: &str, value: &str| keys.get(key).is_some_and(|v| v == value);
        is("path", "/") && is("attached", "false")
    });
    if is_running(view) {
        if own && !hidden {
            return Err(VirError::state(
                "the disk of this running domain is its own and would go with it; destroy it before it is undefined",
            ));
        }
        let request = UpdateInstance {
            description: instance.description.clone(),
            ephemeral: true,
            config: instance.config.clone(),
            devices: instance.devices.clone(),
            profiles: view.profiles.iter().map(|p| p.name.to_string()).collect(),
            if_version: Some(instance.spec_version),
        };
        power::ended(engine.instance_configure(context, project, &instance.name, request).await?).await?;
        return Ok(nothing());
    }
    if snapshots > 0 && flags & SNAPSHOTS == 0 {
        return Err(VirError::state(format!("cannot delete inactive domain with {snapshots} snapshots")));
    }
    if checkpoints > 0 && flags & CHECKPOINTS == 0 {
        let text = format!("cannot delete inactive domain with {checkpoints} checkpoints");
        return Err(VirError::state(text));
    }
    if instance.stateful && flags & MANAGED_SAVE == 0 {
        return Err(VirError::state("Refusing to undefine while domain managed save image exists"));
    }
    let keeps = instance.hardware.as_ref().is_some_and(|h| h.firmware != Firmware::Bios);
    if keeps && instance.generation.n > 0 && flags & NVRAM == 0 {
        return Err(VirError::state("cannot undefine domain with nvram"));
    }
    power::ended(engine.instance_undefine(context, project, &instance.name).await?).await?;
    Ok(nothing())
}
