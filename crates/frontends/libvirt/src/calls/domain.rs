//! Domains: lists, lookups, and what is recorded of them.

use super::{Answered, Named, flag, int, listed, names, nothing, text, write_domain};
use crate::{
    domain_id,
    error::{Code, VirError},
    events::Described,
    limits,
    session::{Call, Driver},
    xdr::Writer,
    xml,
};
use karst_engine::{InstanceView, compute::update::UpdateInstance};
use karst_model::{
    instance::{ExitReason, HaltReason, InstanceKind, Since, Status},
    keys::parse_bool,
};
use std::{collections::BTreeSet, sync::Arc};

/// The user key that holds libvirt's title.
pub const TITLE: &str = "user.libvirt.title";
/// Begins the user keys that hold applications' metadata; the rest is their namespace.
pub const METADATA: &str = "user.libvirt.metadata.";
/// The user key that holds what of a domain's document has no field here.
pub const OPAQUE: &str = "user.libvirt.xml";
const AUTOSTART: &str = "boot.autostart";

/// `virDomainState` with its reason.
pub fn state_of(view: &InstanceView) -> (i32, i32) {
    match view.status {
        Status::Running | Status::Starting => match view.runtime.as_ref().and_then(|r| r.since) {
            // Booted, restored, from a snapshot, unpaused.
            None | Some(Since::Start) => (1, 1),
            Some(Since::Memory) => (1, 3),
            Some(Since::Snapshot) => (1, 4),
            Some(Since::Pause) => (1, 5),
        },
        // By the user.
        Status::Frozen => (3, 1),
        Status::Error => match view.runtime.as_ref().and_then(|r| r.halt.as_ref()) {
            // By an error of IO, the watchdog, a crash of the system inside; else nobody knows.
            None | Some(HaltReason::Disk { .. }) => (3, 5),
            Some(HaltReason::Watchdog) => (3, 6),
            Some(HaltReason::Panicked) => (3, 10),
            Some(HaltReason::Internal | HaltReason::Unknown { .. }) => (3, 0),
        },
        Status::Stopping => (4, 1),
        // Saved.
        Status::Stopped if view.instance.stateful => (5, 5),
        Status::Stopped => match view.runtime.as_ref().and_then(|r| r.exit.as_ref()) {
            Some(ExitReason::Shutdown) => (5, 1),
            Some(ExitReason::Forced) => (5, 2),
            Some(ExitReason::Crashed { .. }) => (5, 3),
            None => (5, 0),
        },
    }
}

/// Has it a process?
pub fn is_running(view: &InstanceView) -> bool {
    view.status != Status::Stopped
}

fn starts_by_itself(view: &InstanceView) -> bool {
    view.expanded_config.get(AUTOSTART).is_some_and(|v| parse_bool(AUTOSTART, v).unwrap_or(false))
}

/// Which domains of a list are wanted (`VIR_CONNECT_LIST_DOMAINS_*`): within a group any of the flags, and each group that
/// has one.
fn accepts(view: &InstanceView, snapshots: bool, flags: u32) -> bool {
    let running = is_running(view);
    let (state, _) = state_of(view);
    let saved = view.instance.stateful && !running;
    let groups = [
        [(1, running), (2, !running), (0, false), (0, false)],
        [(4, !view.instance.ephemeral), (8, view.instance.ephemeral), (0, false), (0, false)],
        [(16, state == 1), (32, state == 3), (64, state == 5), (128, !matches!(state, 1 | 3 | 5))],
        [(256, saved), (512, !saved), (0, false), (0, false)],
        [(1024, starts_by_itself(view)), (2048, !starts_by_itself(view)), (0, false), (0, false)],
        [(4096, snapshots), (8192, !snapshots), (0, false), (0, false)],
        [(16384, false), (32768, true), (0, false), (0, false)],
    ];
    groups.iter().all(|group| {
        let asked = group.iter().any(|(flag, _)| flags & flag != 0);
        !asked || group.iter().any(|(flag, is)| flags & flag != 0 && *is)
    })
}

/// `CONNECT_LIST_ALL_DOMAINS`
pub async fn list(call: Call) -> Answered {
    let (need_results, flags) = call.arguments(|r| Ok((r.i32()?, r.u32()?)))?;
    call.known_flags(flags, 0xffff)?;
    let mut all = call.session.guests()?;
    if flags != 0 {
        let with_snapshots: BTreeSet<_> = {
            let records = call.session.front.engine.inner().inventory.read();
            all.iter().map(|v| v.instance.id).filter(|id| !records.snapshots_of(*id).is_empty()).collect()
        };
        all.retain(|v| accepts(v, with_snapshots.contains(&v.instance.id), flags));
    }
    listed(all, need_results, |w, view| write_domain(w, &view))
}

fn of_state(call: &Call, running: bool) -> Result<Vec<Arc<InstanceView>>, VirError> {
    let mut all = call.session.guests()?;
    all.retain(|v| is_running(v) == running);
    Ok(all)
}

/// `CONNECT_NUM_OF_DOMAINS`
pub async fn count(call: Call) -> Answered {
    Ok(int(of_state(&call, true)?.len() as i32))
}

/// `CONNECT_NUM_OF_DEFINED_DOMAINS`
pub async fn count_defined(call: Call) -> Answered {
    Ok(int(of_state(&call, false)?.len() as i32))
}

/// `CONNECT_LIST_DOMAINS`: numbers of those that run.
pub async fn ids(call: Call) -> Answered {
    let max = call.arguments(|r| r.i32())?.max(0) as usize;
    let mut ids: Vec<i32> = of_state(&call, true)?.iter().map(|v| domain_id(v)).collect();
    ids.sort_unstable();
    ids.truncate(max);
    let mut w = Writer::new();
    w.array(ids, |w, id| {
        w.i32(id);
    });
    Ok(w.finish().into())
}

/// `CONNECT_LIST_DEFINED_DOMAINS`: names of those that do not run.
pub async fn defined_names(call: Call) -> Answered {
    let max = call.arguments(|r| r.i32())?;
    let all = of_state(&call, false)?;
    names(all.iter().map(|v| &*v.instance.name), max)
}

fn domain(view: &InstanceView) -> Answered {
    let mut w = Writer::new();
    write_domain(&mut w, view);
    Ok(w.finish().into())
}

/// `DOMAIN_LOOKUP_BY_ID`
pub async fn by_id(call: Call) -> Answered {
    let id = call.arguments(|r| r.i32())?;
    let found = call.session.guests()?.into_iter().find(|v| is_running(v) && domain_id(v) == id);
    let part = call.opened()?.driver.part();
    let missing = || VirError::new(Code::NoDomain, part, format!("no domain with matching id {id}"));
    domain(&*found.ok_or_else(missing)?)
}

/// `DOMAIN_LOOKUP_BY_NAME`
pub async fn by_name(call: Call) -> Answered {
    let name = call.arguments(|r| r.string())?;
    domain(&*call.session.guest(&name)?)
}

/// `DOMAIN_LOOKUP_BY_UUID`
pub async fn by_uuid(call: Call) -> Answered {
    let uuid = call.arguments(|r| r.uuid())?;
    domain(&*call.session.guest_by_uuid(uuid)?)
}

/// `DOMAIN_GET_STATE`
pub async fn state(call: Call) -> Answered {
    let (state, reason) = state_of(&*call.guest_without_flags()?);
    let mut w = Writer::new();
    w.i32(state).i32(reason);
    Ok(w.finish().into())
}

/// `DOMAIN_GET_CONTROL_INFO`: nobody waits for its monitor here.
pub async fn control_info(call: Call) -> Answered {
    let view = call.guest_without_flags()?;
    if !is_running(&view) {
        return Err(VirError::state("domain is not running"));
    }
    let mut w = Writer::new();
    w.u32(0).u32(0).u64(0);
    Ok(w.finish().into())
}

/// `DOMAIN_GET_INFO`
pub async fn info(call: Call) -> Answered {
    let view = call.only_guest()?;
    let limits = limits::of(&view)?;
    let used = match is_running(&view) {
        false => None,
        true => call.session.front.engine.all_metrics().await.get(&view.instance.id).and_then(|m| m.cpu_ns),
    };
    let most = limits.most_memory_kib(&call)?;
    let has = limits.memory_kib(&call)?;
    let now = super::stats::balloon_of(&call, &view).await?.map_or(has, |b| b.actual / 1024);
    let mut w = Writer::new();
    w.u32(state_of(&view).0 as u32).u64(most).u64(now);
    w.u32(limits.cpus(&call)?).u64(used.unwrap_or(0));
    Ok(w.finish().into())
}

/// `DOMAIN_GET_OS_TYPE`
pub async fn os_type(call: Call) -> Answered {
    call.only_guest()?;
    Ok(text(match call.opened()?.driver {
        Driver::Qemu => "hvm",
        Driver::Lxc => "exe",
    }))
}

/// `DOMAIN_GET_XML_DESC`
pub async fn xml(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?)))?;
    // Secure, inactive, with an updated CPU, migratable.
    call.known_flags(flags, 1 | 2 | 4 | 8)?;
    // What migrates is whole, what is secret included.
    if flags & (1 | 8) != 0 && call.session.read_only() {
        let text = "virDomainGetXMLDesc with secure flag";
        return Err(VirError::new(Code::OperationDenied, call.opened()?.driver.part(), text));
    }
    let view = call.guest(&named)?;
    Ok(text(&xml::domain::shown(&call, &view, flags & 2 != 0, flags & 1 != 0)?))
}

/// `DOMAIN_IS_ACTIVE`
pub async fn is_active(call: Call) -> Answered {
    Ok(flag(is_running(&*call.only_guest()?)))
}

/// `DOMAIN_IS_PERSISTENT`
pub async fn is_persistent(call: Call) -> Answered {
    Ok(flag(!call.only_guest()?.instance.ephemeral))
}

/// `DOMAIN_IS_UPDATED`: does it run with another configuration than the recorded one?
pub async fn is_updated(call: Call) -> Answered {
    let view = call.only_guest()?;
    let applied = view.runtime.as_ref().map(|r| r.applied_spec_version);
    Ok(flag(is_running(&view) && applied.is_some_and(|v| v != view.instance.spec_version)))
}

/// `DOMAIN_GET_AUTOSTART`
pub async fn autostart(call: Call) -> Answered {
    Ok(flag(starts_by_itself(&*call.only_guest()?)))
}

/// Changes keys of a guest: a value that is `None` is taken away.
pub async fn set_keys(
    call: &Call,
    view: &InstanceView,
    keys: Vec<(String, Option<String>)>,
    description: Option<String>,
) -> Result<(), VirError> {
    let mut config = view.instance.config.clone();
    for (key, value) in keys {
        match value {
            Some(value) => drop(config.insert(key, value)),
            None => drop(config.remove(&key)),
        }
    }
    let request = UpdateInstance {
        description: description.unwrap_or_else(|| view.instance.description.clone()),
        ephemeral: view.instance.ephemeral,
        config,
        devices: view.instance.devices.clone(),
        profiles: view.profiles.iter().map(|p| p.name.to_string()).collect(),
        if_version: Some(view.instance.spec_version),
    };
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let operation = engine.instance_update(context, &view.project.name, &view.instance.name, request).await?;
    super::power::ended(operation).await
}

/// `DOMAIN_SET_AUTOSTART`
pub async fn set_autostart(call: Call) -> Answered {
    let (named, wanted) = call.arguments(|r| Ok((Named::read_domain(r)?, r.i32()?)))?;
    let view = call.guest(&named)?;
    if view.instance.ephemeral {
        return Err(VirError::state("cannot set autostart for transient domain"));
    }
    if starts_by_itself(&view) != (wanted != 0) {
        let value = Some((wanted != 0).to_string());
        set_keys(&call, &view, vec![(AUTOSTART.into(), value)], None).await?;
    }
    Ok(nothing())
}

/// Kinds of metadata (`virDomainMetadataType`).
const DESCRIPTION: i32 = 0;
const TITLES: i32 = 1;
const ELEMENT: i32 = 2;

/// `DOMAIN_GET_METADATA`
pub async fn metadata(call: Call) -> Answered {
    let (named, kind, uri, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.i32()?, r.option(|r| r.string())?, r.u32()?)))?;
    call.known_flags(flags, 3)?;
    let view = call.guest(&named)?;
    let config = &view.instance.config;
    let (what, found) = match kind {
        DESCRIPTION => ("description", Some(&view.instance.description).filter(|d| !d.is_empty())),
        TITLES => ("title", config.get(TITLE)),
        ELEMENT => {
            let uri =
                uri.ok_or_else(|| VirError::argument("uri in virDomainGetMetadata must not be NULL"))?;
            ("metadata element", config.get(&format!("{METADATA}{uri}")))
        }
        n => return Err(VirError::argument(format!("unknown metadata type '{n}'"))),
    };
    let part = call.opened()?.driver.part();
    let missing = || VirError::new(Code::NoDomainMetadata, part, format!("Requested {what} is not present"));
    let found = found.ok_or_else(missing)?;
    Ok(text(match found.split_once('\n') {
        // The first line of an element is the prefix that it is shown with.
        Some((_, element)) if kind == ELEMENT => element,
        _ => found,
    }))
}

/// `DOMAIN_SET_METADATA`
pub async fn set_metadata(call: Call) -> Answered {
    let (named, kind, value, key, uri, flags) = call.arguments(|r| {
        let named = Named::read_domain(r)?;
        let kind = r.i32()?;
        let [value, key, uri] =
            [r.option(|r| r.string())?, r.option(|r| r.string())?, r.option(|r| r.string())?];
        Ok((named, kind, value, key, uri, r.u32()?))
    })?;
    call.known_flags(flags, 3)?;
    let view = call.guest(&named)?;
    let value = value.filter(|v| !v.is_empty());
    let said =
        Described { instance: view.instance.id, about: kind, uri: uri.clone().filter(|_| kind == ELEMENT) };
    match kind {
        DESCRIPTION => set_keys(&call, &view, vec![], Some(value.unwrap_or_default())).await?,
        TITLES if value.as_ref().is_some_and(|v| v.contains('\n')) => {
            return Err(VirError::argument("metadata title can't contain newlines"));
        }
        TITLES => set_keys(&call, &view, vec![(TITLE.into(), value)], None).await?,
        ELEMENT => {
            let uri =
                uri.ok_or_else(|| VirError::argument("uri in virDomainSetMetadata must not be NULL"))?;
            if let Some(value) = &value {
                xml::read::document(value)?;
            }
            let value = match (value, key) {
                (Some(_), Some(key)) if !xml::is_prefix(&key) => {
                    let text =
                        format!("key in virDomainSetMetadata is to be a prefix of XML, which {key:?} is not");
                    return Err(VirError::argument(text));
                }
                (Some(value), Some(key)) => Some(format!("{key}\n{value}")),
                (Some(_), None) => {
                    return Err(VirError::argument("key in virDomainSetMetadata must not be NULL"));
                }
                (None, _) => None,
            };
            set_keys(&call, &view, vec![(format!("{METADATA}{uri}"), value)], None).await?;
        }
        n => return Err(VirError::argument(format!("unknown metadata type '{n}'"))),
    }
    // An error only says that nobody listens.
    let _ = call.session.front.described.send(said);
    Ok(nothing())
}

/// `DOMAIN_GET_MESSAGES`: whether it is tainted, and why it is halted or how it ended by itself.
pub async fn messages(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?)))?;
    // Deprecations, of which nothing is known, and what was done past the record (`VIR_DOMAIN_MESSAGE_TAINTING`).
    call.known_flags(flags, 3)?;
    let view = call.guest(&named)?;
    let mut said = vec![];
    if (flags == 0 || flags & 2 != 0)
        && is_running(&view)
        && view.instance.kind == InstanceKind::VirtualMachine
    {
        let session = &call.session;
        let (engine, context) = (&session.front.engine, &session.context);
        let figures = engine.machine_figures(context, &view.project.name, &view.instance.name).await?;
        if figures.is_some_and(|f| f.monitored) {
            said.push("tainted: custom monitor control commands issued".to_owned());
        }
    }
    // libvirt has no other place for it that its clients show.
    if flags == 0
        && let Some(reason) = &view.reason
    {
        said.push(reason.clone());
    }
    let mut w = Writer::new();
    w.array(said, |w, m| {
        w.string(&m);
    });
    Ok(w.finish().into())
}
