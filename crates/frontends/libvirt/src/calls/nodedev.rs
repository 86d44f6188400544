//! The host's hardware, to be looked at: node devices, interfaces, what its firmware says, what its processors do. Nothing
//! of it can be changed here: guests get devices of the host by the policy of that host.

use super::{Answered, LIST_MAX, flag, int, listed, names, text};
use crate::{
    error::{Code, Part, VirError},
    session::Call,
    xdr::{Reader, Writer},
    xml::nodedev::{self, Device, KINDS},
};
use karst_engine::health::resources::{HostResources, NetworkResources};
use karst_model::access::Permission;

/// Active and inactive devices, as lists ask for them.
const ACTIVE: u32 = 1 << 31;
const INACTIVE: u32 = 1 << 30;
/// Every kind that libvirt knows.
const ALL_KINDS: u32 = (1 << 21) - 1;

async fn host(call: &Call) -> Result<HostResources, VirError> {
    Ok(call.session.front.engine.host_resources(&call.session.context).await?)
}

/// Who is shown serial numbers and hardware addresses?
fn inspects(call: &Call) -> bool {
    call.session.context.principal().may(Permission::ServerInspect, None)
}

async fn all(call: &Call) -> Result<Vec<Device>, VirError> {
    call.opened()?;
    Ok(nodedev::devices(&host(call).await?, inspects(call)))
}

async fn find(call: &Call, name: &str) -> Result<Device, VirError> {
    let missing = || {
        let text = format!("no node device with matching name '{name}'");
        VirError::new(Code::NoNodeDevice, Part::Nodedev, text)
    };
    all(call).await?.into_iter().find(|d| d.name == name).ok_or_else(missing)
}

/// `CONNECT_LIST_ALL_NODE_DEVICES`: all of them are active.
pub async fn list(call: Call) -> Answered {
    let (need_results, flags) = call.arguments(|r| Ok((r.i32()?, r.u32()?)))?;
    call.known_flags(flags, ALL_KINDS | ACTIVE | INACTIVE)?;
    let kinds = flags & ALL_KINDS;
    let wanted = |d: &Device| {
        let of_kind = kinds == 0 || KINDS.iter().any(|(kind, bit)| *kind == d.kind && kinds & bit != 0);
        of_kind && flags & (ACTIVE | INACTIVE) != INACTIVE
    };
    let found: Vec<Device> = all(&call).await?.into_iter().filter(wanted).collect();
    listed(found, need_results, |w, d| {
        w.string(&d.name);
    })
}

async fn of_kind(call: &Call, kind: Option<String>) -> Result<Vec<Device>, VirError> {
    let mut found = all(call).await?;
    found.retain(|d| kind.as_ref().is_none_or(|k| k == d.kind));
    Ok(found)
}

/// `NODE_NUM_OF_DEVICES`
pub async fn count(call: Call) -> Answered {
    let (kind, flags) = call.arguments(|r| Ok((r.option(Reader::string)?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    Ok(int(of_kind(&call, kind).await?.len() as i32))
}

/// `NODE_LIST_DEVICES`
pub async fn name_list(call: Call) -> Answered {
    let (kind, max, flags) = call.arguments(|r| Ok((r.option(Reader::string)?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let found = of_kind(&call, kind).await?;
    names(found.iter().map(|d| d.name.as_str()), max)
}

/// `NODE_DEVICE_LOOKUP_BY_NAME`
pub async fn by_name(call: Call) -> Answered {
    let name = call.arguments(|r| r.string())?;
    Ok(text(&find(&call, &name).await?.name))
}

/// `NODE_DEVICE_GET_XML_DESC`
pub async fn xml(call: Call) -> Answered {
    let (name, flags) = call.arguments(|r| Ok((r.string()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    Ok(text(&find(&call, &name).await?.document()))
}

/// `NODE_DEVICE_GET_PARENT`
pub async fn parent(call: Call) -> Answered {
    let name = call.arguments(|r| r.string())?;
    let mut w = Writer::new();
    w.optional(find(&call, &name).await?.parent.as_deref());
    Ok(w.finish().into())
}

/// `NODE_DEVICE_NUM_OF_CAPS`: each has one.
pub async fn count_kinds(call: Call) -> Answered {
    let name = call.arguments(|r| r.string())?;
    find(&call, &name).await?;
    Ok(int(1))
}

/// `NODE_DEVICE_LIST_CAPS`
pub async fn kinds(call: Call) -> Answered {
    let (name, max) = call.arguments(|r| Ok((r.string()?, r.i32()?)))?;
    names([find(&call, &name).await?.kind], max)
}

/// `NODE_DEVICE_IS_ACTIVE`
pub async fn is_active(call: Call) -> Answered {
    let name = call.arguments(|r| r.string())?;
    find(&call, &name).await?;
    Ok(flag(true))
}

/// `NODE_DEVICE_IS_PERSISTENT`, `NODE_DEVICE_GET_AUTOSTART`: hardware is defined by nobody.
pub async fn is_persistent(call: Call) -> Answered {
    let name = call.arguments(|r| r.string())?;
    find(&call, &name).await?;
    Ok(flag(false))
}

fn mac(card: &NetworkResources, secrets: bool) -> &str {
    if secrets { &card.mac } else { "" }
}

fn write_interface(w: &mut Writer, card: &NetworkResources, secrets: bool) {
    w.string(&card.name).string(mac(card, secrets));
}

async fn cards(call: &Call) -> Result<Vec<NetworkResources>, VirError> {
    call.opened()?;
    Ok(host(call).await?.network)
}

async fn card(
    call: &Call,
    what: &str,
    is: impl Fn(&NetworkResources) -> bool,
) -> Result<NetworkResources, VirError> {
    let missing =
        || VirError::new(Code::NoInterface, Part::Interface, format!("couldn't find interface {what}"));
    cards(call).await?.into_iter().find(is).ok_or_else(missing)
}

/// `CONNECT_LIST_ALL_INTERFACES`: one whose cable is plugged is active.
pub async fn list_interfaces(call: Call) -> Answered {
    let (need_results, flags) = call.arguments(|r| Ok((r.i32()?, r.u32()?)))?;
    call.known_flags(flags, 1 | 2)?;
    let wanted = |c: &NetworkResources| match flags {
        1 => !c.link,
        2 => c.link,
        _ => true,
    };
    let secrets = inspects(&call);
    let found: Vec<_> = cards(&call).await?.into_iter().filter(wanted).collect();
    listed(found, need_results, |w, c| write_interface(w, &c, secrets))
}

/// `CONNECT_NUM_OF_INTERFACES`
pub async fn count_interfaces(call: Call) -> Answered {
    Ok(int(cards(&call).await?.iter().filter(|c| c.link).count() as i32))
}

/// `CONNECT_NUM_OF_DEFINED_INTERFACES`
pub async fn count_idle_interfaces(call: Call) -> Answered {
    Ok(int(cards(&call).await?.iter().filter(|c| !c.link).count() as i32))
}

async fn interface_names(call: Call, link: bool) -> Answered {
    let max = call.arguments(|r| r.i32())?;
    let all = cards(&call).await?;
    names(all.iter().filter(|c| c.link == link).map(|c| c.name.as_str()), max)
}

/// `CONNECT_LIST_INTERFACES`
pub async fn active_interfaces(call: Call) -> Answered {
    interface_names(call, true).await
}

/// `CONNECT_LIST_DEFINED_INTERFACES`
pub async fn idle_interfaces(call: Call) -> Answered {
    interface_names(call, false).await
}

/// `INTERFACE_LOOKUP_BY_NAME`
pub async fn interface_by_name(call: Call) -> Answered {
    let name = call.arguments(|r| r.string())?;
    let card = card(&call, &format!("named '{name}'"), |c| c.name == name).await?;
    let mut w = Writer::new();
    write_interface(&mut w, &card, inspects(&call));
    Ok(w.finish().into())
}

/// `INTERFACE_LOOKUP_BY_MAC_STRING`
pub async fn interface_by_mac(call: Call) -> Answered {
    let address = call.arguments(|r| r.string())?;
    let secrets = inspects(&call);
    let is = |c: &NetworkResources| !c.mac.is_empty() && mac(c, secrets).eq_ignore_ascii_case(&address);
    let card = card(&call, &format!("with MAC address '{address}'"), is).await?;
    let mut w = Writer::new();
    write_interface(&mut w, &card, secrets);
    Ok(w.finish().into())
}

/// `remote_nonnull_interface`, of which the name says which.
fn interface_named(r: &mut Reader<'_>) -> Result<String, VirError> {
    let name = r.string()?;
    r.string()?;
    Ok(name)
}

/// `INTERFACE_GET_XML_DESC`; the inactive document is the same.
pub async fn interface_xml(call: Call) -> Answered {
    let (name, flags) = call.arguments(|r| Ok((interface_named(r)?, r.u32()?)))?;
    call.known_flags(flags, 1)?;
    let card = card(&call, &format!("named '{name}'"), |c| c.name == name).await?;
    Ok(text(&nodedev::interface(&card, inspects(&call))))
}

/// `INTERFACE_IS_ACTIVE`
pub async fn interface_is_active(call: Call) -> Answered {
    let name = call.arguments(interface_named)?;
    Ok(flag(card(&call, &format!("named '{name}'"), |c| c.name == name).await?.link))
}

/// `CONNECT_GET_SYSINFO`
pub async fn sysinfo(call: Call) -> Answered {
    let flags = call.arguments(|r| r.u32())?;
    call.known_flags(flags, 0)?;
    call.opened()?;
    Ok(text(&nodedev::sysinfo(&host(&call).await?.system, inspects(&call))))
}

/// `NODE_GET_CPU_STATS`, nanoseconds: of all processors (-1) or one.
pub async fn cpu_stats(call: Call) -> Answered {
    let (cpu, wanted, flags) = call.arguments(|r| Ok((r.i32()?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let times = host(&call).await?.times;
    let of = match cpu {
        -1 => None,
        cpu => Some(u32::try_from(cpu).map_err(|_| invalid_cpu())?),
    };
    let times = times.into_iter().find(|t| t.cpu == of).ok_or_else(invalid_cpu)?;
    let all =
        [("kernel", times.kernel), ("user", times.user), ("idle", times.idle), ("iowait", times.waiting)];
    Ok(super::host::figures(&all, wanted))
}

fn invalid_cpu() -> VirError {
    VirError::argument("Invalid cpuNum in virNodeGetCPUStats")
}

/// `CONNECT_GET_CPU_MODEL_NAMES`: those that the domain capabilities name.
pub async fn cpu_models(call: Call) -> Answered {
    let (arch, need_results, flags) = call.arguments(|r| Ok((r.string()?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let facts = super::connect::facts(&call)?;
    if arch != facts.architecture {
        return Err(VirError::argument(format!("'{arch}' is not the architecture of this host")));
    }
    let all = super::cpu::catalogue(&call).await?.models;
    let shown = if need_results == 0 { &[][..] } else { &all[..all.len().min(LIST_MAX)] };
    let mut w = Writer::new();
    w.array(shown, |w, model| {
        w.string(&model.name);
    });
    w.i32(all.len() as i32);
    Ok(w.finish().into())
}
