//! Power and names of domains.

use super::{
    Answered, Named,
    domain::is_running,
    int,
    machine::{goes_on_paused, note_paused},
    nothing, write_domain,
};
use crate::{
    error::{Code, Part, VirError},
    session::{Call, Driver, Session},
    xdr::Writer,
    xml::domain::{AUTORESTART, REBOOT_ACTION, ends_on_reboot, on_crash, restarts},
};
use karst_engine::{InstanceView, LiveOperation, compute::power::PowerRequest};
use karst_model::{
    guest::{AskedBy, GuestWish},
    instance::{InstanceKind, PowerAction, Status},
    keys::CRASH_ACTION,
};
use std::{sync::Arc, time::Duration};

/// How long a container may take to end before it starts again; the call itself answers at once, as libvirt's does.
const SHUTDOWN: Duration = Duration::from_secs(600);

/// How often, and after which pause, it is looked whether a transient domain is gone.
const GONE: usize = 100;
const LOOK: Duration = Duration::from_millis(30);

/// Waits for an operation's end.
///
/// # Errors
/// The operation's.
pub async fn ended(operation: LiveOperation) -> Result<(), VirError> {
    match operation.ended().await.error.clone() {
        Some(e) => Err(e.into()),
        None => Ok(()),
    }
}

async fn begin(
    call: &Call,
    view: &InstanceView,
    action: PowerAction,
    force: bool,
) -> Result<LiveOperation, VirError> {
    let request =
        PowerRequest { action, force, timeout: Some(SHUTDOWN), stateful: action == PowerAction::Start };
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    Ok(engine.instance_power(context, &view.project.name, &view.instance.name, request).await?)
}

fn demand_running(view: &InstanceView) -> Result<(), VirError> {
    match is_running(view) {
        true => Ok(()),
        false => Err(VirError::state("domain is not running")),
    }
}

/// Starts it; from where its memory was kept, if it was.
///
/// # Errors
/// Those of the engine.
pub async fn start(call: &Call, view: &InstanceView) -> Result<(), VirError> {
    start_as(call, view, true, false).await
}

/// Starts it to stand still before its first instruction; from where its memory was kept, if it was.
///
/// # Errors
/// Those of the engine.
pub async fn start_paused(call: &Call, view: &InstanceView) -> Result<(), VirError> {
    start_as(call, view, true, true).await
}

/// `VIR_DOMAIN_START_*`, of which to read past the cache changes nothing here.
pub(super) const PAUSED: u32 = 1;
const AUTODESTROY: u32 = 2;
const BYPASS_CACHE: u32 = 4;
const FORCE_BOOT: u32 = 8;
const RESET_NVRAM: u32 = 32;
/// Those that a start knows.
pub(super) const START: u32 = PAUSED | AUTODESTROY | BYPASS_CACHE | FORCE_BOOT | RESET_NVRAM;

/// Starts it as flags say.
pub(super) async fn start_with(call: &Call, view: &InstanceView, flags: u32) -> Result<(), VirError> {
    if flags & RESET_NVRAM != 0 {
        start_fresh(call, view, flags).await?;
    } else {
        start_as(call, view, flags & FORCE_BOOT == 0, flags & PAUSED != 0).await?;
    }
    if flags & AUTODESTROY != 0 {
        doom(call, &*call.session.guest(&view.instance.name)?, flags);
    }
    Ok(())
}

/// Starts it without what its firmware kept. That is a part of memory that was saved, which it would go on from.
async fn start_fresh(call: &Call, view: &InstanceView, flags: u32) -> Result<(), VirError> {
    if is_running(view) {
        return Err(VirError::state("domain is already running"));
    }
    if view.instance.stateful && flags & FORCE_BOOT == 0 {
        let text = "the variables of the firmware are part of what was saved; start the domain without it (--force-boot)";
        return Err(VirError::new(Code::OperationUnsupported, Part::Qemu, text));
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let (project, name) = (&view.project.name, &view.instance.name);
    let started = engine.machine_start_fresh(context, project, name, flags & PAUSED != 0).await?;
    ended(started).await
}

/// One that runs ends with the connection, where flags say so.
pub(super) fn doom(call: &Call, view: &InstanceView, flags: u32) {
    if flags & AUTODESTROY != 0 {
        let start = (view.instance.id, view.instance.generation);
        call.session.doomed.lock().unwrap_or_else(|e| e.into_inner()).push(start);
    }
}

/// Ends what was to end with a connection that is over, unless that has been started anew since.
pub async fn end_doomed(session: Arc<Session>) {
    let doomed = std::mem::take(&mut *session.doomed.lock().unwrap_or_else(|e| e.into_inner()));
    for (id, generation) in doomed {
        let all = session.guests().unwrap_or_default();
        let same = |v: &&Arc<InstanceView>| v.instance.id == id && v.instance.generation == generation;
        let Some(view) = all.iter().find(same).filter(|v| is_running(v)) else { continue };
        let (engine, context) = (&session.front.engine, &session.context);
        let request = PowerRequest { action: PowerAction::Stop, force: true, timeout: None, stateful: false };
        let name = &view.instance.name;
        let ended = match engine.instance_power(context, &view.project.name, name, request).await {
            Ok(operation) => operation.ended().await.error.clone(),
            Err(e) => Some(e),
        };
        if let Some(e) = ended {
            tracing::warn!(instance = %id, error = %e, "a domain outlives the connection that it was to end with");
        }
    }
}

async fn start_as(call: &Call, view: &InstanceView, stateful: bool, paused: bool) -> Result<(), VirError> {
    if is_running(view) {
        return Err(VirError::state("domain is already running"));
    }
    let (project, name) = (&view.project.name, &view.instance.name);
    if paused || stateful && goes_on_paused(view) {
        let session = &call.session;
        let (engine, context) = (&session.front.engine, &session.context);
        ended(engine.machine_start_paused(context, project, name, stateful).await?).await?;
    } else {
        let request = PowerRequest { action: PowerAction::Start, force: false, timeout: None, stateful };
        ask_power(call, view, request).await?;
    }
    // It was said of this start. Who may start it need not be let change it; the next one that keeps its memory says it anew.
    if let Ok(now) = call.session.guest(name)
        && let Err(e) = note_paused(call, &now, false).await
    {
        tracing::debug!(error = %e.text, "a domain is still said to stand still when its memory is loaded");
    }
    Ok(())
}

/// Keeps its memory and stops it.
///
/// # Errors
/// Those of the engine: the machine must have been prepared for it.
pub async fn save(call: &Call, view: &InstanceView) -> Result<(), VirError> {
    let request = PowerRequest { action: PowerAction::Stop, force: false, timeout: None, stateful: true };
    ask_power(call, view, request).await
}

async fn ask_power(call: &Call, view: &InstanceView, request: PowerRequest) -> Result<(), VirError> {
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    ended(engine.instance_power(context, &view.project.name, &view.instance.name, request).await?).await
}

async fn freeze(call: &Call, view: &InstanceView) -> Result<(), VirError> {
    ended(begin(call, view, PowerAction::Freeze, false).await?).await
}

/// `DOMAIN_CREATE`
pub async fn create(call: Call) -> Answered {
    start(&call, &*call.only_guest()?).await?;
    Ok(nothing())
}

/// `DOMAIN_CREATE_WITH_FLAGS`
pub async fn create_with_flags(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?)))?;
    call.known_flags(flags, START)?;
    let view = call.guest(&named)?;
    start_with(&call, &view, flags).await?;
    let mut w = Writer::new();
    write_domain(&mut w, &*call.guest(&named)?);
    Ok(w.finish().into())
}

/// Ends it by force.
///
/// # Errors
/// Those of the engine.
pub async fn kill(call: &Call, view: &InstanceView) -> Answered {
    demand_running(view)?;
    ended(begin(call, view, PowerAction::Stop, true).await?).await?;
    if view.instance.ephemeral {
        gone(call, view).await;
    }
    Ok(nothing())
}

/// Waits a moment for a transient domain to go, as it does by itself after its end: who destroyed it does not look for it.
pub(super) async fn gone(call: &Call, view: &InstanceView) {
    let engine = &call.session.front.engine;
    for _ in 0..GONE {
        if !engine.inner().inventory.read().instances.contains_key(&view.instance.id) {
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// `DOMAIN_DESTROY`
pub async fn destroy(call: Call) -> Answered {
    kill(&call, &*call.only_guest()?).await
}

/// `DOMAIN_DESTROY_FLAGS`: gracefully means that the process is asked first.
pub async fn destroy_flags(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?)))?;
    call.known_flags(flags, 1 | 2)?;
    kill(&call, &*call.guest(&named)?).await
}

/// Flags of `virDomainShutdownFlagValues` and `virDomainRebootFlagValues`: the drivers of libvirt know two each.
const BUTTON: u32 = 1;
const AGENT: u32 = 2;
const INITCTL: u32 = 4;
const SIGNAL: u32 = 8;

/// By which way a guest is to be asked: of several any, and without one all.
fn asked_by(call: &Call, flags: u32) -> Result<AskedBy, VirError> {
    let known = match call.opened()?.driver {
        Driver::Qemu => BUTTON | AGENT,
        Driver::Lxc => INITCTL | SIGNAL,
    };
    call.known_flags(flags, known)?;
    Ok(match flags {
        AGENT => AskedBy::Agent,
        BUTTON => AskedBy::Button,
        _ => AskedBy::Any,
    })
}

/// Asks the guest, which may take its time or not heed it: nobody waits for it, and whoever wants may ask again, or end it.
async fn ask(call: &Call, view: &InstanceView, wish: GuestWish, by: AskedBy) -> Answered {
    demand_running(view)?;
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let asked = engine.instance_ask(context, &view.project.name, &view.instance.name, wish, by).await;
    match asked {
        Err(e) if by == AskedBy::Agent => Err(super::inside::failed(e)),
        other => other.map(|()| nothing()).map_err(Into::into),
    }
}

/// `DOMAIN_SHUTDOWN`
pub async fn shutdown(call: Call) -> Answered {
    ask(&call, &*call.only_guest()?, GuestWish::Shutdown, AskedBy::Any).await
}

/// `DOMAIN_SHUTDOWN_FLAGS`
pub async fn shutdown_flags(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?)))?;
    let by = asked_by(&call, flags)?;
    ask(&call, &*call.guest(&named)?, GuestWish::Shutdown, by).await
}

/// `DOMAIN_REBOOT`: a machine goes on as the same domain; a container is stopped and started.
pub async fn reboot(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?)))?;
    let by = asked_by(&call, flags)?;
    let view = call.guest(&named)?;
    if view.instance.kind == InstanceKind::VirtualMachine {
        return ask(&call, &view, GuestWish::Reboot, by).await;
    }
    demand_running(&view)?;
    begin(&call, &view, PowerAction::Restart, false).await?;
    Ok(nothing())
}

/// `DOMAIN_RESET`: at once, without asking the guest.
pub async fn reset(call: Call) -> Answered {
    let view = call.guest_without_flags()?;
    demand_running(&view)?;
    if view.instance.kind == InstanceKind::VirtualMachine {
        let session = &call.session;
        let (engine, context) = (&session.front.engine, &session.context);
        engine.machine_reset(context, &view.project.name, &view.instance.name).await?;
        return Ok(nothing());
    }
    ended(begin(&call, &view, PowerAction::Restart, true).await?).await?;
    Ok(nothing())
}

/// `DOMAIN_SUSPEND`
pub async fn suspend(call: Call) -> Answered {
    let view = call.only_guest()?;
    demand_running(&view)?;
    // What an error halted stands still already, which libvirt calls paused.
    if !matches!(view.status, Status::Frozen | Status::Error) {
        freeze(&call, &view).await?;
    }
    Ok(nothing())
}

/// `DOMAIN_RESUME`
pub async fn resume(call: Call) -> Answered {
    let view = call.only_guest()?;
    demand_running(&view)?;
    match view.status {
        Status::Frozen | Status::Error => {
            ended(begin(&call, &view, PowerAction::Unfreeze, false).await?).await?;
        }
        _ => return Err(VirError::state("domain is already running")),
    }
    Ok(nothing())
}

/// `DOMAIN_RENAME`
pub async fn rename(call: Call) -> Answered {
    let (named, new, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.option(|r| r.string())?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let view = call.guest(&named)?;
    let new = new.ok_or_else(|| VirError::argument("new_name in virDomainRename must not be NULL"))?;
    if is_running(&view) {
        return Err(VirError::state("cannot rename active domain"));
    }
    if *view.instance.name == *new {
        return Err(VirError::argument("Can't rename domain to itself"));
    }
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    engine.instance_rename(context, &view.project.name, &view.instance.name, &new).await?;
    Ok(int(0))
}

/// `VIR_DOMAIN_AFFECT_CONFIG`
const CONFIG: u32 = 2;
/// Names of `virDomainLifecycle` and `virDomainLifecycleAction`.
const LIFECYCLES: [&str; 3] = ["on_poweroff", "on_reboot", "on_crash"];
const ACTIONS: [&str; 6] =
    ["destroy", "restart", "rename-restart", "preserve", "coredump-destroy", "coredump-restart"];

fn as_started(kind: &str) -> VirError {
    let text = format!("{kind}: is as it was when the domain was started; give --config alone");
    VirError::new(Code::OperationUnsupported, Part::Domain, text)
}

/// `DOMAIN_SET_LIFECYCLE_ACTION`: after a crash a guest starts again or does not, and a machine that restarts ends or does
/// not; all else is as it is.
pub async fn set_lifecycle_action(call: Call) -> Answered {
    let (named, kind, action, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?, r.u32()?, r.u32()?)))?;
    // Live, configured, or both: the record says both.
    call.known_flags(flags, 3)?;
    let of = |all: &[&'static str], n: u32, what: &str| {
        let found = usize::try_from(n).ok().and_then(|n| all.get(n).copied());
        found.ok_or_else(|| VirError::argument(format!("unknown lifecycle {what} '{n}'")))
    };
    let (kind, action) = (of(&LIFECYCLES, kind, "type")?, of(&ACTIONS, action, "action")?);
    let view = call.guest(&named)?;
    match (kind, action) {
        ("on_poweroff", "destroy") => {}
        ("on_reboot", "restart" | "destroy")
            if ends_on_reboot(&view.expanded_config) == (action == "destroy") => {}
        ("on_reboot", "restart" | "destroy") if view.instance.kind == InstanceKind::VirtualMachine => {
            // Without a flag it is what runs that is meant.
            if flags != CONFIG && is_running(&view) {
                return Err(as_started(kind));
            }
            let value = Some(if action == "destroy" { "stop" } else { "restart" }.to_owned());
            super::domain::set_keys(&call, &view, vec![(REBOOT_ACTION.into(), value)], None).await?;
        }
        ("on_crash", _) if on_crash(&view.expanded_config) == action => {}
        ("on_crash", "destroy" | "restart" | "preserve")
            if action != "preserve" || view.instance.kind == InstanceKind::VirtualMachine =>
        {
            let preserved = on_crash(&view.expanded_config) == "preserve";
            let mut keys = vec![];
            if preserved != (action == "preserve") {
                if flags != CONFIG && is_running(&view) {
                    return Err(as_started(kind));
                }
                let value = if preserved { "stop" } else { "halt" };
                keys.push((CRASH_ACTION.to_owned(), Some(value.to_owned())));
            }
            if restarts(&view.expanded_config) != (action == "restart") {
                keys.push((AUTORESTART.to_owned(), Some((action == "restart").to_string())));
            }
            super::domain::set_keys(&call, &view, keys, None).await?;
        }
        _ => {
            let text = format!(
                "{kind} '{action}': a guest that is off is off, one that reboots goes on or (a machine) is destroyed, \
                and one that crashed is destroyed, restarted or (a machine) preserved"
            );
            return Err(VirError::new(Code::ConfigUnsupported, Part::Domain, text));
        }
    }
    Ok(nothing())
}
