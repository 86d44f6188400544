//! Threads of a domain: which CPUs of the host they run on, and those of a machine that serve its disks.
//!
//! A container's processes are pinned together (`limits.cpu`), a machine's threads one by one (`limits.cpu.pin.*`).

use super::{
    Answered, Named,
    devices::{number, typed},
    figures::{cpu_map, map_length},
    nothing,
    sides::{self, CONFIG, LIVE, Side, affects},
    told::tuned,
    tuning::{Keys, config_of, set, set_sides},
};
use crate::{
    error::{Code, VirError},
    limits,
    session::{Call, Driver},
    xdr::{Typed, Writer},
    xml::{domain::ranges, machine::refuse},
};
use karst_engine::InstanceView;
use karst_model::threads::{self, IOTHREADS, MAX_IOTHREAD, PROPERTIES, SCSI_IOTHREAD, Thread};
use std::collections::BTreeMap;

/// Limits of a domain and the host's CPUs, of a length that maps of them have.
fn asked(
    call: &Call,
    named: &Named,
    length: i32,
    flags: u32,
) -> Result<(limits::Limits, u32, usize), VirError> {
    call.known_flags(flags, LIVE | CONFIG)?;
    let length = map_length(length)?;
    let view = call.guest(named)?;
    let limits = limits::of_config(view.instance.kind, config_of(&view, flags)?)?;
    Ok((limits, super::connect::facts(call)?.cpus, length))
}

/// `DOMAIN_GET_VCPU_PIN_INFO`
pub async fn vcpu_pins(call: Call) -> Answered {
    let (named, count, length, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.i32()?, r.i32()?, r.u32()?)))?;
    let (limits, host, length) = asked(&call, &named, length, flags)?;
    let count = u32::try_from(count).unwrap_or(0).min(limits.most_cpus(&call)?);
    let map = |n| cpu_map(limits.runs_on(Thread::Vcpu(n)), host, length);
    let maps: Vec<u8> = (0..count).flat_map(map).collect();
    let mut w = Writer::new();
    w.opaque(&maps).i32(count as i32);
    Ok(w.finish().into())
}

/// `DOMAIN_GET_EMULATOR_PIN_INFO`
pub async fn emulator_pin(call: Call) -> Answered {
    let (named, length, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.i32()?, r.u32()?)))?;
    let (limits, host, length) = asked(&call, &named, length, flags)?;
    let mut w = Writer::new();
    w.opaque(&cpu_map(limits.runs_on(Thread::Emulator), host, length)).i32(1);
    Ok(w.finish().into())
}

/// The processors that a map names.
fn chosen(map: &[u8]) -> Vec<u32> {
    let bits = 0..(map.len() as u32 * 8);
    bits.filter(|n| map[*n as usize / 8] >> (n % 8) & 1 == 1).collect()
}

async fn pin(call: &Call, named: &Named, thread: Thread, map: &[u8], flags: u32) -> Answered {
    call.known_flags(flags, LIVE | CONFIG)?;
    let view = call.guest(named)?;
    let host = super::connect::facts(call)?.cpus;
    let mut wanted = chosen(map);
    wanted.retain(|cpu| *cpu < host);
    if wanted.is_empty() {
        return Err(VirError::argument("Empty cpu list for pinning"));
    }
    match call.opened()?.driver {
        Driver::Lxc => {
            let limits = limits::of_config(view.instance.kind, config_of(&view, flags)?)?;
            pin_together(call, &view, &limits, &wanted, host, flags).await?;
        }
        Driver::Qemu => {
            let keys = |side: &Side<'_>| -> Result<Keys, VirError> {
                let limits = limits::of_config(view.instance.kind, side.all_config)?;
                Ok(pins(&limits, thread, &wanted, host))
            };
            set_sides(call, &view, flags, &[thread.key()], keys).await?;
        }
    }
    let which = match thread {
        Thread::Vcpu(n) => format!("vcpupin{n}"),
        Thread::Io(id) => format!("iothreadpin{id}"),
        Thread::Emulator | Thread::Default => "emulatorpin".to_owned(),
    };
    tuned(call, &view, flags, vec![(format!("cputune.{which}"), Typed::Text(ranges(&wanted)))]);
    Ok(nothing())
}

/// The keys that pin a thread of a machine. Where `limits.cpu` names CPUs without some of those, it becomes their number, and the
/// others run where they did.
fn pins(limits: &limits::Limits, thread: Thread, wanted: &[u32], host: u32) -> Keys {
    let mut keys = vec![];
    if let Some(set) = limits.set().filter(|set| wanted.iter().any(|cpu| !set.contains(cpu))) {
        keys.push(("limits.cpu".to_owned(), Some(set.len().to_string())));
        if limits.pinned() == Some(set) {
            keys.push((Thread::Default.key(), Some(ranges(set))));
        }
    }
    let usual = match limits.pinned() {
        Some(set) => set == wanted,
        None => wanted.len() == host as usize,
    };
    keys.push((thread.key(), (!usual).then(|| ranges(wanted))));
    keys
}

/// Pins all of a container, whose CPUs are as many as it is pinned to.
async fn pin_together(
    call: &Call,
    view: &InstanceView,
    limits: &limits::Limits,
    wanted: &[u32],
    host: u32,
    flags: u32,
) -> Result<(), VirError> {
    let cpus = limits.cpus(call)? as usize;
    let now: Vec<u32> = limits.pinned().map_or_else(|| (0..host).collect(), <[u32]>::to_vec);
    if wanted == now {
        return Ok(());
    }
    if wanted.len() == host as usize && wanted.len() != cpus {
        return set(call, view, flags, "limits.cpu", Some(cpus.to_string())).await;
    }
    // Several processors that share what they run on are one set, and as many as it has.
    if wanted.len() != cpus {
        let why = format!(
            "processors are pinned together, to as many of the host's as there are ({cpus}): limits.cpu is the set"
        );
        return Err(refuse("vcpupin", why));
    }
    // A set of one would read as a number of processors.
    let text = match wanted {
        [one] => format!("{one}-{one}"),
        all => all.iter().map(u32::to_string).collect::<Vec<_>>().join(","),
    };
    set(call, view, flags, "limits.cpu", Some(text)).await
}

/// `DOMAIN_PIN_VCPU`
pub async fn pin_vcpu(call: Call) -> Answered {
    let (named, vcpu, map) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?, r.opaque(2048)?.to_vec())))?;
    pin_vcpu_to(&call, &named, vcpu, &map, LIVE).await
}

/// `DOMAIN_PIN_VCPU_FLAGS`
pub async fn pin_vcpu_flags(call: Call) -> Answered {
    let (named, vcpu, map, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?, r.opaque(2048)?.to_vec(), r.u32()?)))?;
    pin_vcpu_to(&call, &named, vcpu, &map, flags).await
}

async fn pin_vcpu_to(call: &Call, named: &Named, vcpu: u32, map: &[u8], flags: u32) -> Answered {
    let view = call.guest(named)?;
    let cpus = limits::of_config(view.instance.kind, config_of(&view, flags)?)?.most_cpus(call)?;
    if vcpu >= cpus {
        return Err(VirError::argument(format!("vcpu {vcpu} is out of range of {cpus}")));
    }
    pin(call, named, Thread::Vcpu(vcpu), map, flags).await
}

/// `DOMAIN_PIN_EMULATOR`
pub async fn pin_emulator(call: Call) -> Answered {
    let (named, map, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.opaque(2048)?.to_vec(), r.u32()?)))?;
    pin(&call, &named, Thread::Emulator, &map, flags).await
}

/// `DOMAIN_GET_IOTHREAD_INFO`
pub async fn iothreads(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?)))?;
    call.known_flags(flags, LIVE | CONFIG)?;
    let view = call.guest(&named)?;
    let config = config_of(&view, flags)?;
    let limits = limits::of_config(view.instance.kind, config)?;
    let host = super::connect::facts(&call)?.cpus;
    let all = threads::iothreads(config)?;
    let count = all.len() as u32;
    let mut w = Writer::new();
    w.array(all, |w, thread| {
        let map = cpu_map(limits.runs_on(Thread::Io(thread.id)), host, host.div_ceil(8) as usize);
        w.u32(thread.id).opaque(&map);
    });
    w.u32(count);
    Ok(w.finish().into())
}

/// A machine whose threads are to change.
fn machine(call: &Call, named: &Named, flags: u32) -> Result<std::sync::Arc<InstanceView>, VirError> {
    call.known_flags(flags, LIVE | CONFIG)?;
    let view = call.guest(named)?;
    if call.opened()?.driver != Driver::Qemu {
        return Err(refuse("iothreads", "the disks of containers are served by the host's kernel"));
    }
    // Refused before anything else is said of it.
    affects(&view, flags)?;
    Ok(view)
}

/// The numbers of the threads of one side.
fn ids(side: &Side<'_>) -> Result<Vec<u32>, VirError> {
    Ok(threads::iothreads(side.all_config)?.into_iter().map(|t| t.id).collect())
}

fn demand_number(id: u32) -> Result<(), VirError> {
    match id {
        0 => Err(VirError::argument("invalid value of 0 for iothread_id")),
        1..=MAX_IOTHREAD => Ok(()),
        _ => Err(refuse("iothread_id", format!("threads are numbered from 1 to {MAX_IOTHREAD}"))),
    }
}

fn missing(id: u32) -> VirError {
    VirError::argument(format!("cannot find IOThread '{id}' in iothreadids"))
}

/// `DOMAIN_ADD_IOTHREAD`
pub async fn add_iothread(call: Call) -> Answered {
    let (named, id, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?, r.u32()?)))?;
    let view = machine(&call, &named, flags)?;
    demand_number(id)?;
    let keys = |side: &Side<'_>| -> Result<Keys, VirError> {
        let mut ids = ids(side)?;
        if ids.contains(&id) {
            return Err(VirError::argument(format!("an IOThread is already using iothread_id '{id}'")));
        }
        ids.push(id);
        ids.sort_unstable();
        Ok(vec![(IOTHREADS.to_owned(), threads::iothreads_text(&ids))])
    };
    set_sides(&call, &view, flags, &[IOTHREADS.to_owned()], keys).await?;
    Ok(nothing())
}

/// `DOMAIN_DEL_IOTHREAD`
pub async fn delete_iothread(call: Call) -> Answered {
    let (named, id, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?, r.u32()?)))?;
    let view = machine(&call, &named, flags)?;
    demand_number(id)?;
    let keys = |side: &Side<'_>| -> Result<Keys, VirError> {
        let mut ids = ids(side)?;
        if !ids.contains(&id) {
            return Err(missing(id));
        }
        demand_unused(side, id)?;
        ids.retain(|other| *other != id);
        let properties = PROPERTIES.iter().map(|name| format!("{IOTHREADS}.{id}.{name}"));
        let gone = properties.chain([Thread::Io(id).key()]).map(|key| (key, None));
        Ok(gone.chain([(IOTHREADS.to_owned(), threads::iothreads_text(&ids))]).collect())
    };
    set_sides(&call, &view, flags, &[IOTHREADS.to_owned()], keys).await?;
    Ok(nothing())
}

/// No disk of a side is served by the thread.
fn demand_unused(side: &Side<'_>, id: u32) -> Result<(), VirError> {
    let text = id.to_string();
    let used = |key: &str, keys: &BTreeMap<String, String>| keys.get(key) == Some(&text);
    let disk = side.all_devices.iter().find(|(_, keys)| used("io.thread", keys));
    let user = match disk {
        Some((name, _)) => Some(format!("disk '{}'", target_of(side, name))),
        None => used(SCSI_IOTHREAD, side.all_config).then(|| "the controller of disks on scsi".to_owned()),
    };
    match user {
        None => Ok(()),
        Some(user) => {
            let why = format!("cannot remove IOThread {id} since it is being used by {user}");
            Err(VirError::argument(why))
        }
    }
}

/// The name that documents have of a disk.
fn target_of(side: &Side<'_>, device: &str) -> String {
    let slot = side.identities.get(device).map_or(device, |i| i.slot.as_str());
    crate::xml::machine::target(slot, karst_model::device::DiskBus::VirtioBlk).0
}

/// `DOMAIN_SET_IOTHREAD_PARAMS`
pub async fn set_iothread(call: Call) -> Answered {
    let (named, id, all, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?, r.array(64, typed)?, r.u32()?)))?;
    let view = machine(&call, &named, flags)?;
    demand_number(id)?;
    let mut keys: Vec<(String, Option<String>)> = vec![];
    for (field, value) in &all {
        if !PROPERTIES.contains(&field.as_str()) {
            return Err(VirError::argument(format!("parameter '{field}' not supported")));
        }
        let value = match value {
            // The usual size of the pool.
            Typed::Int(-1) if field.starts_with("thread_pool") => None,
            value => {
                let n = number(value).filter(|n| *n <= i32::MAX as u64);
                Some(n.ok_or_else(|| VirError::argument(format!("{field} is out of range")))?.to_string())
            }
        };
        keys.push((format!("{IOTHREADS}.{id}.{field}"), value));
    }
    let touched: Vec<String> = keys.iter().map(|(key, _)| key.clone()).collect();
    let keys = |side: &Side<'_>| -> Result<Keys, VirError> {
        match ids(side)?.contains(&id) {
            true => Ok(keys.clone()),
            false => Err(missing(id)),
        }
    };
    set_sides(&call, &view, flags, &touched, keys).await?;
    Ok(nothing())
}

/// `DOMAIN_PIN_IOTHREAD`
pub async fn pin_iothread(call: Call) -> Answered {
    let (named, id, map, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?, r.opaque(2048)?.to_vec(), r.u32()?)))?;
    let view = machine(&call, &named, flags)?;
    if !ids(&sides::asked(&view, flags)?)?.contains(&id) {
        let text = format!("iothread {id} not found");
        return Err(VirError::new(Code::InvalidArg, Driver::Qemu.part(), text));
    }
    pin(&call, &named, Thread::Io(id), &map, flags).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::{Config, instance::InstanceKind};

    #[test]
    fn maps_name_processors() {
        assert_eq!(chosen(&[0b101, 0b1]), [0, 2, 8]);
        assert!(chosen(&[]).is_empty());
    }

    #[test]
    fn a_thread_leaves_the_set_and_the_others_stay() {
        let of = |pairs: &[(&str, &str)], thread, wanted: &[u32]| {
            let config: Config = pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            let limits = limits::of_config(InstanceKind::VirtualMachine, &config).unwrap();
            let keys = pins(&limits, thread, wanted, 4);
            keys.into_iter().map(|(k, v)| format!("{k}={}", v.unwrap_or_default())).collect::<Vec<_>>()
        };
        assert_eq!(of(&[], Thread::Vcpu(1), &[2]), ["limits.cpu.pin.1=2"]);
        assert_eq!(of(&[("limits.cpu.pin.1", "2")], Thread::Vcpu(1), &[0, 1, 2, 3]), ["limits.cpu.pin.1="]);
        assert_eq!(of(&[("limits.cpu", "0-1")], Thread::Vcpu(0), &[1]), ["limits.cpu.pin.0=1"]);
        assert_eq!(of(&[("limits.cpu", "0-1")], Thread::Vcpu(0), &[0, 1]), ["limits.cpu.pin.0="]);
        assert_eq!(
            of(&[("limits.cpu", "0-1")], Thread::Emulator, &[3]),
            ["limits.cpu=2", "limits.cpu.pin.default=0-1", "limits.cpu.pin.emulator=3"]
        );
        let placed = [("limits.cpu", "0-1"), ("limits.cpu.pin.default", "1")];
        assert_eq!(of(&placed, Thread::Io(2), &[3]), ["limits.cpu=2", "limits.cpu.pin.iothread2=3"]);
    }
}
