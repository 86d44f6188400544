//! Shares of the host: processors, memory, disks, nodes. What Karst has a key for is shown and set by it; the rest is shown
//! as libvirt shows what is not limited, and refused when it would be set.

use super::{
    Answered, Named,
    devices::{CONFIG, LIVE, live, number, parameters, typed, write},
    domain::is_running,
    figures::{cpu_map, map_length},
    nothing,
};
use crate::{
    error::VirError,
    limits,
    session::{Call, Driver},
    xdr::{Reader, Typed, Writer},
    xml::machine::{refuse, spec},
};
use karst_engine::InstanceView;
use karst_model::{
    keys,
    spec::{CpuAllowance, Limits},
};

/// Strings among parameters are fine.
const STRINGS: u32 = 4;
/// What libvirt shows of memory that is not limited, KiB.
const UNLIMITED: u64 = 9_007_199_254_740_991;
/// Shares of a group without any of its own.
const SHARES: u64 = 1024;
/// Period that quotas refer to where none is set, microseconds.
const PERIOD: u64 = 100_000;

fn limits_of(view: &InstanceView) -> Result<Limits, VirError> {
    Ok(keys::limits(&view.expanded_config)?)
}

/// `DOMAIN_GET_SCHEDULER_TYPE`
pub async fn scheduler_type(call: Call) -> Answered {
    let view = call.only_guest()?;
    let mut w = Writer::new();
    w.string("posix").i32(scheduler_fields(&call, &view)?.len() as i32);
    Ok(w.finish().into())
}

fn scheduler_fields(call: &Call, view: &InstanceView) -> Result<Vec<(&'static str, Typed)>, VirError> {
    // Of one that does not run there is nothing but what was set.
    let (mut shares, mut period, mut quota) = match is_running(view) {
        true => (SHARES, PERIOD, -1),
        false => (0, 0, 0),
    };
    let (none, unlimited) = (period, quota);
    match limits_of(view)?.cpu_allowance {
        Some(CpuAllowance::Share { percent }) => shares = SHARES * u64::from(percent) / 100,
        Some(CpuAllowance::Quota { quota_us, period_us }) => {
            (period, quota) = (period_us, quota_us as i64);
        }
        None => {}
    }
    let mut all = vec![("cpu_shares", Typed::Ullong(shares))];
    match call.opened()?.driver {
        Driver::Lxc => {
            all.extend([("vcpu_period", Typed::Ullong(period)), ("vcpu_quota", Typed::Llong(quota))])
        }
        Driver::Qemu => {
            for (period, quota) in [
                ("vcpu_period", "vcpu_quota"),
                ("emulator_period", "emulator_quota"),
                ("global_period", "global_quota"),
                ("iothread_period", "iothread_quota"),
            ] {
                all.extend([(period, Typed::Ullong(none)), (quota, Typed::Llong(unlimited))]);
            }
        }
    }
    Ok(all)
}

async fn scheduler_of(call: &Call, named: &Named, wanted: i32, flags: u32) -> Answered {
    call.known_flags(flags, LIVE | CONFIG | STRINGS)?;
    let view = call.guest(named)?;
    live(&view, flags & 3)?;
    let all = scheduler_fields(call, &view)?;
    let wanted = usize::try_from(wanted).unwrap_or(0);
    let mut w = Writer::new();
    w.array(all.into_iter().take(wanted).collect::<Vec<_>>(), |w, (field, value)| {
        w.typed(field, &value);
    });
    Ok(w.finish().into())
}

/// `DOMAIN_GET_SCHEDULER_PARAMETERS`
pub async fn scheduler(call: Call) -> Answered {
    let (named, wanted) = call.arguments(|r| Ok((Named::read_domain(r)?, r.i32()?)))?;
    scheduler_of(&call, &named, wanted, 0).await
}

/// `DOMAIN_GET_SCHEDULER_PARAMETERS_FLAGS`
pub async fn scheduler_flags(call: Call) -> Answered {
    let (named, wanted, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.i32()?, r.u32()?)))?;
    scheduler_of(&call, &named, wanted, flags).await
}

type Parameters = Vec<(String, Typed)>;

fn read(r: &mut Reader<'_>) -> Result<(Named, Parameters), VirError> {
    Ok((Named::read_domain(r)?, r.array(64, typed)?))
}

/// The allowance that parameters of the scheduler mean; nothing is none.
fn allowance(all: &Parameters) -> Result<Option<String>, VirError> {
    let (mut shares, mut period, mut quota) = (None, PERIOD, None);
    for (field, value) in all {
        let wrong = || VirError::argument(format!("{field} is out of range"));
        match field.as_str() {
            "cpu_shares" => shares = Some(number(value).ok_or_else(wrong)?),
            "vcpu_period" => {
                period = number(value).filter(|n| (1000..=1_000_000).contains(n)).ok_or_else(wrong)?
            }
            "vcpu_quota" => match value {
                Typed::Llong(n) if *n <= 0 => quota = None,
                other => quota = Some(number(other).ok_or_else(wrong)?),
            },
            other => {
                return Err(refuse(other, "a container has cpu_shares, or vcpu_quota with vcpu_period"));
            }
        }
    }
    match (shares, quota) {
        (Some(_), Some(_)) => Err(refuse("cpu_shares", "a container has a share or a quota, not both")),
        (None, Some(quota)) => {
            let (quota, period) = (quota / 1000, period / 1000);
            if quota == 0 {
                return Err(VirError::argument("vcpu_quota is at least 1000"));
            }
            Ok(Some(format!("{quota}ms/{period}ms")))
        }
        (Some(shares), None) if shares > SHARES => {
            Err(refuse("cpu_shares", "a container has at most 1024, which is all of its part"))
        }
        (Some(SHARES), None) | (None, None) => Ok(None),
        (Some(shares), None) => Ok(Some(format!("{}%", (shares * 100).div_ceil(SHARES).max(1)))),
    }
}

/// Sets keys of a container.
async fn set(
    call: &Call,
    view: &InstanceView,
    flags: u32,
    key: &str,
    value: Option<String>,
) -> Result<(), VirError> {
    let live = live(view, flags)?;
    let mut config = view.instance.config.clone();
    match value {
        Some(value) => drop(config.insert(key.to_owned(), value)),
        None => drop(config.remove(key)),
    }
    let devices = view.instance.devices.clone();
    write(call, view, spec::Updated { config, devices, slots: Default::default() }, live, &[key.to_owned()])
        .await
}

async fn set_scheduler_to(call: &Call, (named, all): (Named, Parameters), flags: u32) -> Answered {
    call.known_flags(flags, LIVE | CONFIG)?;
    let view = call.guest(&named)?;
    if call.opened()?.driver == Driver::Qemu {
        let why = "the processors of a machine have no share or quota on this host; limits.cpu is their number, or which \
                   of the host's they run on";
        return Err(refuse("schedinfo", why));
    }
    set(call, &view, flags, "limits.cpu.allowance", allowance(&all)?).await?;
    Ok(nothing())
}

/// `DOMAIN_SET_SCHEDULER_PARAMETERS`
pub async fn set_scheduler(call: Call) -> Answered {
    let arguments = call.arguments(read)?;
    set_scheduler_to(&call, arguments, 0).await
}

/// `DOMAIN_SET_SCHEDULER_PARAMETERS_FLAGS`
pub async fn set_scheduler_flags(call: Call) -> Answered {
    let (arguments, flags) = call.arguments(|r| Ok((read(r)?, r.u32()?)))?;
    set_scheduler_to(&call, arguments, flags).await
}

fn asked(call: &Call) -> Result<(std::sync::Arc<InstanceView>, i32), VirError> {
    let (named, wanted, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, LIVE | CONFIG | STRINGS)?;
    let view = call.guest(&named)?;
    live(&view, flags & 3)?;
    Ok((view, wanted))
}

/// `DOMAIN_GET_MEMORY_PARAMETERS`, KiB: of a machine its memory is all there is.
pub async fn memory(call: Call) -> Answered {
    let (view, wanted) = asked(&call)?;
    let limits = limits_of(&view)?;
    let size = limits.memory.filter(|_| call.opened().is_ok_and(|o| o.driver == Driver::Lxc));
    let size = size.map(|s| s.bytes() / 1024);
    let kept = |is: bool| Typed::Ullong(size.filter(|_| is).unwrap_or(UNLIMITED));
    let all = vec![
        ("hard_limit", kept(!limits.memory_soft)),
        ("soft_limit", kept(limits.memory_soft)),
        ("swap_hard_limit", Typed::Ullong(UNLIMITED)),
    ];
    parameters(all, wanted)
}

/// `DOMAIN_SET_MEMORY_PARAMETERS`
pub async fn set_memory(call: Call) -> Answered {
    let ((named, all), flags) = call.arguments(|r| Ok((read(r)?, r.u32()?)))?;
    call.known_flags(flags, LIVE | CONFIG)?;
    let view = call.guest(&named)?;
    let limited = |value: &Typed| number(value).filter(|n| *n < UNLIMITED);
    if call.opened()?.driver == Driver::Qemu {
        return match all.iter().find(|(_, value)| limited(value).is_some()) {
            None => Ok(nothing()),
            Some((field, _)) => Err(refuse(field, "a machine has its memory (setmem), and no limit beside")),
        };
    }
    for (field, value) in &all {
        match (field.as_str(), limited(value)) {
            ("hard_limit", size) => {
                let size = size.map(|kib| format!("{kib}KiB"));
                set(&call, &view, flags, "limits.memory", size).await?;
            }
            (_, None) => {}
            (other, Some(_)) => {
                return Err(refuse(
                    other,
                    "a container has hard_limit; limits.memory.enforce makes it a soft one",
                ));
            }
        }
    }
    Ok(nothing())
}

/// `DOMAIN_GET_BLKIO_PARAMETERS`
pub async fn disks(call: Call) -> Answered {
    let (view, wanted) = asked(&call)?;
    let weight = limits_of(&view)?.disk_priority.map_or(0, |p| (p * 100).max(10));
    let mut all = vec![("weight", Typed::Uint(weight))];
    for field in [
        "device_weight",
        "device_read_iops_sec",
        "device_write_iops_sec",
        "device_read_bytes_sec",
        "device_write_bytes_sec",
    ] {
        all.push((field, Typed::Text(String::new())));
    }
    parameters(all, wanted)
}

/// `DOMAIN_SET_BLKIO_PARAMETERS`
pub async fn set_disks(call: Call) -> Answered {
    let ((named, all), flags) = call.arguments(|r| Ok((read(r)?, r.u32()?)))?;
    call.known_flags(flags, LIVE | CONFIG)?;
    let view = call.guest(&named)?;
    for (field, value) in &all {
        match (field.as_str(), call.opened()?.driver) {
            ("weight", Driver::Lxc) => {
                let weight = number(value).filter(|n| (10..=1000).contains(n));
                let weight = weight.ok_or_else(|| VirError::argument("weight is 10 to 1000"))?;
                let priority = (weight / 100).to_string();
                set(&call, &view, flags, "limits.disk.priority", Some(priority)).await?;
            }
            ("weight", Driver::Qemu) => {
                return Err(refuse("weight", "machines have rates for each disk (blkdeviotune)"));
            }
            (other, _) => return Err(refuse(other, "disks have rates of their own (blkdeviotune)")),
        }
    }
    Ok(nothing())
}

/// `DOMAIN_GET_NUMA_PARAMETERS`
pub async fn nodes(call: Call) -> Answered {
    let (_, wanted) = asked(&call)?;
    parameters(vec![("numa_mode", Typed::Int(0)), ("numa_nodeset", Typed::Text(String::new()))], wanted)
}

/// `DOMAIN_SET_NUMA_PARAMETERS`
pub async fn set_nodes(call: Call) -> Answered {
    let ((named, _), flags) = call.arguments(|r| Ok((read(r)?, r.u32()?)))?;
    call.known_flags(flags, LIVE | CONFIG)?;
    call.guest(&named)?;
    Err(refuse("numatune", "memory is where the host's kernel puts it"))
}

fn pins(call: &Call, named: &Named, length: i32, flags: u32) -> Result<(Vec<u8>, u32), VirError> {
    call.known_flags(flags, LIVE | CONFIG)?;
    let length = map_length(length)?;
    let view = call.guest(named)?;
    live(&view, flags)?;
    let limits = limits::of(&view)?;
    let host = super::connect::facts(call)?.cpus;
    Ok((cpu_map(limits.pinned(), host, length), limits.cpus(call)?))
}

/// `DOMAIN_GET_VCPU_PIN_INFO`: `limits.cpu` names those of all processors together.
pub async fn vcpu_pins(call: Call) -> Answered {
    let (named, count, length, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.i32()?, r.i32()?, r.u32()?)))?;
    let (map, cpus) = pins(&call, &named, length, flags)?;
    let count = usize::try_from(count).unwrap_or(0).min(cpus as usize);
    let mut w = Writer::new();
    w.opaque(&map.repeat(count)).i32(count as i32);
    Ok(w.finish().into())
}

/// `DOMAIN_GET_EMULATOR_PIN_INFO`
pub async fn emulator_pin(call: Call) -> Answered {
    let (named, length, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.i32()?, r.u32()?)))?;
    let (map, _) = pins(&call, &named, length, flags)?;
    let mut w = Writer::new();
    w.opaque(&map).i32(1);
    Ok(w.finish().into())
}

/// The processors that a map names.
fn chosen(map: &[u8]) -> Vec<u32> {
    let bits = 0..(map.len() as u32 * 8);
    bits.filter(|n| map[*n as usize / 8] >> (n % 8) & 1 == 1).collect()
}

async fn pin(call: &Call, named: &Named, map: &[u8], flags: u32) -> Answered {
    call.known_flags(flags, LIVE | CONFIG)?;
    let view = call.guest(named)?;
    let host = super::connect::facts(call)?.cpus;
    let mut wanted = chosen(map);
    wanted.retain(|cpu| *cpu < host);
    if wanted.is_empty() {
        return Err(VirError::argument("Empty cpu list for pinning"));
    }
    let limits = limits::of(&view)?;
    let cpus = limits.cpus(call)? as usize;
    let now: Vec<u32> = limits.pinned().map_or_else(|| (0..host).collect(), <[u32]>::to_vec);
    if wanted == now {
        return Ok(nothing());
    }
    if wanted.len() == host as usize && wanted.len() != cpus {
        set(call, &view, flags, "limits.cpu", Some(cpus.to_string())).await?;
        return Ok(nothing());
    }
    // Several processors that share what they run on are one set, and as many as it has.
    if wanted.len() != cpus {
        let why = format!(
            "processors are pinned together, to as many of the host's as there are ({cpus}): limits.cpu is the set"
        );
        return Err(refuse("vcpupin", why));
    }
    // A set of one would read as a number of processors.
    let text = match wanted.as_slice() {
        [one] => format!("{one}-{one}"),
        all => all.iter().map(u32::to_string).collect::<Vec<_>>().join(","),
    };
    set(call, &view, flags, "limits.cpu", Some(text)).await?;
    Ok(nothing())
}

/// `DOMAIN_PIN_VCPU`
pub async fn pin_vcpu(call: Call) -> Answered {
    let (named, _, map) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?, r.opaque(2048)?.to_vec())))?;
    pin(&call, &named, &map, LIVE).await
}

/// `DOMAIN_PIN_VCPU_FLAGS`
pub async fn pin_vcpu_flags(call: Call) -> Answered {
    let (named, vcpu, map, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?, r.opaque(2048)?.to_vec(), r.u32()?)))?;
    let cpus = limits::of(&*call.guest(&named)?)?.cpus(&call)?;
    if vcpu >= cpus {
        return Err(VirError::argument(format!("vcpu {vcpu} is out of range of {cpus}")));
    }
    pin(&call, &named, &map, flags).await
}

/// `DOMAIN_PIN_EMULATOR`
pub async fn pin_emulator(call: Call) -> Answered {
    let (named, map, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.opaque(2048)?.to_vec(), r.u32()?)))?;
    pin(&call, &named, &map, flags).await
}

/// `DOMAIN_GET_IOTHREAD_INFO`: disks are served by the machine's main thread.
pub async fn iothreads(call: Call) -> Answered {
    let (named, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?)))?;
    call.known_flags(flags, LIVE | CONFIG)?;
    live(&*call.guest(&named)?, flags)?;
    let mut w = Writer::new();
    w.u32(0).u32(0);
    Ok(w.finish().into())
}

fn no_iothreads() -> VirError {
    refuse("iothreads", "disks are served by the machine's main thread")
}

/// `DOMAIN_ADD_IOTHREAD`, `DOMAIN_DEL_IOTHREAD`
pub async fn change_iothread(call: Call) -> Answered {
    let (named, _, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?, r.u32()?)))?;
    call.known_flags(flags, LIVE | CONFIG)?;
    call.guest(&named)?;
    Err(no_iothreads())
}

/// `DOMAIN_SET_IOTHREAD_PARAMS`
pub async fn set_iothread(call: Call) -> Answered {
    let (named, _, _, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.u32()?, r.array(64, typed)?, r.u32()?)))?;
    call.known_flags(flags, LIVE | CONFIG)?;
    call.guest(&named)?;
    Err(no_iothreads())
}

/// `DOMAIN_PIN_IOTHREAD`
pub async fn pin_iothread(call: Call) -> Answered {
    let named = call.arguments(|r| {
        let named = Named::read_domain(r)?;
        r.u32()?;
        r.opaque(2048)?;
        r.u32()?;
        Ok(named)
    })?;
    call.guest(&named)?;
    Err(no_iothreads())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(all: &[(&str, Typed)]) -> Result<Option<String>, VirError> {
        allowance(&all.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect())
    }

    #[test]
    fn allowances() {
        assert_eq!(of(&[("cpu_shares", Typed::Ullong(512))]).unwrap().as_deref(), Some("50%"));
        assert_eq!(of(&[("cpu_shares", Typed::Ullong(1024))]).unwrap(), None);
        let quota = [("vcpu_period", Typed::Ullong(50_000)), ("vcpu_quota", Typed::Llong(25_000))];
        assert_eq!(of(&quota).unwrap().as_deref(), Some("25ms/50ms"));
        assert_eq!(of(&[("vcpu_quota", Typed::Llong(-1))]).unwrap(), None);
        assert!(of(&[("cpu_shares", Typed::Ullong(2048))]).is_err());
        assert!(of(&[("emulator_quota", Typed::Llong(2048))]).is_err());
        assert!(of(&[("vcpu_period", Typed::Ullong(7))]).is_err());
    }

    #[test]
    fn maps_name_processors() {
        assert_eq!(chosen(&[0b101, 0b1]), [0, 2, 8]);
        assert!(chosen(&[]).is_empty());
    }
}
