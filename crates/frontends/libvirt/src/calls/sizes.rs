//! How much memory a domain has and how many processors, and how much and how many it can have: `setmem`, `setmaxmem`, `setvcpus`,
//! `setvcpu`, `vcpucount`.
//!
//! Of a machine what it can have is `limits.memory.maximum` and `limits.cpu.maximum`, or the topology of its processors; without these
//! it is what it has. A container has one size of each.

use super::{
    Answered, Named, inside,
    inside::processors,
    int, nothing,
    sides::{CONFIG, LIVE, Side, asked, live},
    tuning::{config_of, set, set_sides},
};
use crate::{
    error::{Code, VirError},
    limits,
    session::{Call, Driver},
    xdr::Writer,
};
use karst_engine::InstanceView;
use karst_model::{keys::optional_flag, maximum};
use std::collections::BTreeSet;

const MEMORY: &str = "limits.memory";
const CPUS: &str = "limits.cpu";
/// `VIR_DOMAIN_MEM_MAXIMUM`, `VIR_DOMAIN_VCPU_MAXIMUM`
const MAXIMUM: u32 = 4;
/// `VIR_DOMAIN_VCPU_GUEST`
const GUEST: u32 = 8;
/// `VIR_DOMAIN_VCPU_HOTPLUGGABLE`, which all are.
const HOTPLUGGABLE: u32 = 16;

fn of_side(view: &InstanceView, side: &Side<'_>) -> Result<limits::Limits, VirError> {
    limits::of_config(view.instance.kind, side.all_config)
}

fn says(side: &Side<'_>, key: &str) -> bool {
    side.all_config.get(key).is_some_and(|value| !value.is_empty())
}

fn unsupported(call: &Call, text: impl Into<String>) -> VirError {
    match call.opened() {
        Ok(opened) => VirError::new(Code::OperationUnsupported, opened.driver.part(), text),
        Err(e) => e,
    }
}

/// `DOMAIN_GET_MAX_MEMORY`
pub async fn max_memory(call: Call) -> Answered {
    let view = call.only_guest()?;
    let mut w = Writer::new();
    w.u64(limits::of(&view)?.most_memory_kib(&call)?);
    Ok(w.finish().into())
}

/// `DOMAIN_GET_MAX_VCPUS`
pub async fn max_vcpus(call: Call) -> Answered {
    let view = call.only_guest()?;
    Ok(int(limits::of(&view)?.most_cpus(&call)? as i32))
}

/// `DOMAIN_GET_VCPUS_FLAGS`: those it has or can have, live or configured, or as the guest sees them.
pub async fn vcpus(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?)))?;
    call.known_flags(flags, LIVE | CONFIG | MAXIMUM | GUEST)?;
    let view = call.guest(&named)?;
    if flags & GUEST != 0 {
        if call.session.read_only() {
            let text = "read only access prevents virDomainGetVcpusFlags with the guest flag";
            return Err(VirError::new(Code::OperationDenied, call.opened()?.driver.part(), text));
        }
        let all = inside::processors_of(&call, &view).await?;
        let count = all.iter().filter(|cpu| flags & MAXIMUM != 0 || cpu.online).count();
        return Ok(int(count as i32));
    }
    let limits = limits::of_config(view.instance.kind, config_of(&view, flags)?)?;
    let count = if flags & MAXIMUM != 0 { limits.most_cpus(&call)? } else { limits.cpus(&call)? };
    Ok(int(count as i32))
}

async fn set_memory_to(call: &Call, named: &Named, kib: u64, flags: u32) -> Answered {
    call.known_flags(flags, LIVE | CONFIG | MAXIMUM)?;
    let view = call.guest(named)?;
    if kib == 0 {
        return Err(VirError::argument("memory must be greater than zero"));
    }
    let of_most = flags & MAXIMUM != 0;
    if of_most && live(&view, flags)? {
        return Err(VirError::state("cannot resize the maximum memory on an active domain"));
    }
    let size = |kib: u64| Some(format!("{kib}KiB"));
    if call.opened()?.driver == Driver::Lxc {
        set(call, &view, flags & (LIVE | CONFIG), MEMORY, size(kib)).await?;
        return Ok(nothing());
    }
    set_sides(call, &view, flags & (LIVE | CONFIG), &[MEMORY.to_owned()], |side| {
        let limits = of_side(&view, side)?;
        let (now, most) = (limits.memory_kib(call)?, limits.most_memory_kib(call)?);
        if !of_most {
            if kib > most {
                return Err(VirError::argument("cannot set memory higher than max memory"));
            }
            if side.run && optional_flag(side.all_config, "hardware.balloon") == Some(false) {
                let text = "Unable to change memory of active domain without the balloon device and guest OS balloon driver";
                return Err(VirError::state(text));
            }
            // What it can have is written down before it would become less.
            let mut keys = vec![(MEMORY.to_owned(), size(kib))];
            if kib < most || says(side, maximum::MEMORY) {
                keys.push((maximum::MEMORY.to_owned(), size(most)));
            }
            return Ok(keys);
        }
        if side.all_config.get("hardware.numa").is_some_and(|nodes| !nodes.is_empty()) {
            let text = "initial memory size of a domain with NUMA nodes cannot be modified with this API";
            return Err(VirError::state(text));
        }
        // Of one without a balloon there is one size.
        let balloon = optional_flag(side.all_config, "hardware.balloon") != Some(false);
        let kib = kib.checked_next_multiple_of(1024);
        let kib = kib.ok_or_else(|| VirError::argument("memory must be less than 2^64 KiB"))?;
        let has = if balloon { now.min(kib) } else { kib };
        Ok(vec![(MEMORY.to_owned(), size(has)), (maximum::MEMORY.to_owned(), size(kib))])
    })
    .await?;
    Ok(nothing())
}

/// `DOMAIN_SET_MEMORY`: of a guest that runs.
pub async fn set_memory(call: Call) -> Answered {
    let (named, kib) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u64()?)))?;
    set_memory_to(&call, &named, kib, LIVE).await
}

/// `DOMAIN_SET_MEMORY_FLAGS`
pub async fn set_memory_flags(call: Call) -> Answered {
    let (named, kib, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u64()?, r.u32()?)))?;
    set_memory_to(&call, &named, kib, flags).await
}

/// `DOMAIN_SET_MAX_MEMORY`
pub async fn set_max_memory(call: Call) -> Answered {
    let (named, kib) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u64()?)))?;
    set_memory_to(&call, &named, kib, MAXIMUM).await
}

/// Refuses a number of processors that a machine cannot have.
fn demand_most_cpus(call: &Call, limits: &limits::Limits, n: u32) -> Result<(), VirError> {
    if limits.topology().is_some_and(|room| room != n) {
        return Err(VirError::argument("CPU topology doesn't match the desired vcpu count"));
    }
    let most = super::connect::MAX_VCPUS as u32;
    if n > most {
        let text = format!("requested vcpus is greater than max allowable vcpus for a domain: {n} > {most}");
        return Err(unsupported(call, text));
    }
    Ok(())
}

async fn set_cpus_to(call: &Call, named: &Named, n: u32, flags: u32) -> Answered {
    call.known_flags(flags, LIVE | CONFIG | MAXIMUM | GUEST | HOTPLUGGABLE)?;
    let view = call.guest(named)?;
    if n == 0 {
        return Err(VirError::argument("nvcpus must be greater than zero"));
    }
    let sides = flags & (LIVE | CONFIG);
    if call.opened()?.driver == Driver::Lxc {
        if flags & (MAXIMUM | GUEST) != 0 {
            let text = "a container has one number of processors, which its host gives it; set that";
            return Err(unsupported(call, text));
        }
        set(call, &view, sides, CPUS, Some(n.to_string())).await?;
        return Ok(nothing());
    }
    if flags & GUEST != 0 {
        return in_guest(call, &view, n, flags).await;
    }
    let of_most = flags & MAXIMUM != 0;
    if of_most && live(&view, flags)? {
        return Err(unsupported(call, "maximum vcpu count of a live domain can't be modified"));
    }
    set_sides(call, &view, sides, &[CPUS.to_owned()], |side| {
        let limits = of_side(&view, side)?;
        let (now, most) = (limits.cpus(call)?, limits.most_cpus(call)?);
        let places = |most: u32| match limits.topology() {
            Some(_) => vec![],
            None => vec![(maximum::CPUS.to_owned(), Some(most.to_string()))],
        };
        let mut keys = vec![];
        if of_most {
            demand_most_cpus(call, &limits, n)?;
            keys.extend(places(n));
            // As many as are left; a set of the host's stays where it still is what is meant.
            keys.extend((now > n).then(|| (CPUS.to_owned(), Some(n.to_string()))));
            return Ok(keys);
        }
        if n > most {
            let which = if side.run { "live" } else { "persistent" };
            let text = format!(
                "requested vcpus is greater than max allowable vcpus for the {which} domain: {n} > {most}"
            );
            return Err(VirError::argument(text));
        }
        keys.push((CPUS.to_owned(), Some(n.to_string())));
        if n < most || says(side, maximum::CPUS) {
            keys.extend(places(most));
        }
        Ok(keys)
    })
    .await?;
    Ok(nothing())
}

/// Has the guest take processors that it has into use, or out of it: as the agent in it can.
async fn in_guest(call: &Call, view: &InstanceView, n: u32, flags: u32) -> Answered {
    if flags & (CONFIG | MAXIMUM | HOTPLUGGABLE) != 0 {
        return Err(VirError::argument("the guest flag goes with no flag but live"));
    }
    let has = limits::of(view)?.cpus(call)?;
    if n > has {
        let text = format!(
            "requested vcpu count is greater than the count of enabled vcpus in the domain: {n} > {has}"
        );
        return Err(VirError::argument(text));
    }
    let all = inside::processors_of(call, view).await?;
    let changes = changes(&all, n as usize)?;
    inside::use_processors(call, view, &changes).await?;
    Ok(nothing())
}

/// Which processors go into use, or out of it, so that so many are; in libvirt's order. The first stays where others can go.
fn changes(all: &[inside::Processor], n: usize) -> Result<Vec<(u64, bool)>, VirError> {
    let mut online = all.iter().filter(|cpu| cpu.online).count();
    let can_go = |cpu: &&inside::Processor| cpu.online && cpu.can_go;
    let every = all.iter().filter(can_go).count() == online;
    let goes = |cpu: &&inside::Processor| can_go(cpu) && !(every && cpu.id == 0);
    if n > all.len() {
        return Err(VirError::new(
            Code::InternalError,
            crate::error::Part::Qemu,
            "guest agent reports less cpu than requested",
        ));
    }
    if n < online - all.iter().filter(goes).count() {
        return Err(VirError::argument("Cannot offline enough CPUs"));
    }
    let mut changed = vec![];
    for cpu in all {
        if n < online && goes(&cpu) {
            changed.push((cpu.id, false));
            online -= 1;
        } else if n > online && !cpu.online {
            changed.push((cpu.id, true));
            online += 1;
        }
    }
    Ok(changed)
}

/// `DOMAIN_SET_VCPUS`: of a guest that runs.
pub async fn set_vcpus(call: Call) -> Answered {
    let (named, n) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?)))?;
    set_cpus_to(&call, &named, n, LIVE).await
}

/// `DOMAIN_SET_VCPUS_FLAGS`
pub async fn set_vcpus_flags(call: Call) -> Answered {
    let (named, n, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?, r.u32()?)))?;
    set_cpus_to(&call, &named, n, flags).await
}

/// `DOMAIN_SET_VCPU`: some processors by their numbers. They are plugged in order, so it has to be the next ones, or the last.
pub async fn set_vcpu(call: Call) -> Answered {
    let (named, map, state, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, LIVE | CONFIG)?;
    let view = call.guest(&named)?;
    let side = asked(&view, flags)?;
    let limits = of_side(&view, &side)?;
    let (now, most) = (u64::from(limits.cpus(&call)?), u64::from(limits.most_cpus(&call)?));
    let wanted: BTreeSet<u64> = processors(&map)?.into_iter().collect();
    let (first, last) = match (wanted.first(), wanted.last()) {
        (Some(first), Some(last)) => (*first, *last),
        _ => return Err(VirError::argument("no vcpus selected for modification")),
    };
    if last >= most {
        let which = if side.run { "live" } else { "persistent" };
        return Err(VirError::argument(format!("vcpu {last} is not present in {which} config")));
    }
    let whole = wanted.len() as u64 == last - first + 1;
    let n = match state != 0 {
        true if whole && first == now => last + 1,
        false if whole && last + 1 == now && first > 0 => first,
        plug => {
            let what = if plug { "plugged from the next one on" } else { "unplugged from the last one on" };
            let text = format!("processors are {what}; there are 0 to {} now", now.saturating_sub(1));
            return Err(unsupported(&call, text));
        }
    };
    set_cpus_to(&call, &named, n as u32, flags).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use inside::Processor;

    #[test]
    fn a_guest_uses_so_many_of_its_processors() {
        let cpu = |id, online, can_go| Processor { id, online, can_go };
        let all = [cpu(0, true, true), cpu(1, true, true), cpu(2, false, true)];
        assert_eq!(changes(&all, 2).unwrap(), []);
        assert_eq!(changes(&all, 3).unwrap(), [(2, true)]);
        // The first stays.
        assert_eq!(changes(&all, 1).unwrap(), [(1, false)]);
        assert!(changes(&all, 0).is_err());
        assert!(changes(&all, 4).unwrap_err().text.contains("less cpu than requested"));
        let fixed = [cpu(0, true, false), cpu(1, true, false), cpu(2, true, true)];
        assert_eq!(changes(&fixed, 2).unwrap(), [(2, false)]);
        assert!(changes(&fixed, 1).unwrap_err().text.contains("Cannot offline enough CPUs"));
    }
}
