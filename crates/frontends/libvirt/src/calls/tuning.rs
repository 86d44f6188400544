//! Shares of the host: processors, memory, disks, nodes. What Karst has a key for is shown and set by it; the rest is shown
//! as libvirt shows what is not limited, and refused when it would be set.

use super::{
    Answered, Named,
    connect::facts,
    devices::{number, parameters, typed},
    domain::is_running,
    memtune, nothing,
    sides::{CONFIG, LIVE, Side, affects, asked, edits, write},
    told,
};
use crate::{
    error::VirError,
    session::{Call, Driver},
    xdr::{Reader, Typed, Writer},
    xml::{
        domain::ranges,
        machine::{
            refuse, spec,
            tuning::{
                ALLOWANCE, AS_A_WHOLE, HARD, NODES, SHARES as SHARES_KEY, SOFT, SWAP, Tuning, UNLIMITED,
                WEIGHT, allowance as allowance_text, demand_mode, demand_quota, demand_room, demand_shares,
                of_config, priority, swap, swap_of,
            },
        },
    },
};
use karst_engine::InstanceView;
use karst_model::{
    Config,
    board::{Board, NodePolicy},
    keys,
    spec::{CpuAllowance, Limits},
};

/// Strings among parameters are fine.
const STRINGS: u32 = 4;
/// Shares of a group without any of its own.
const SHARES: u64 = 1024;
/// Period that quotas refer to where none is set, microseconds.
const PERIOD: u64 = 100_000;

fn limits_of(config: &Config) -> Result<Limits, VirError> {
    Ok(keys::limits(config)?)
}

/// The keys that a question is about: those that a running guest has, or those of its next start.
pub(super) fn config_of(view: &InstanceView, flags: u32) -> Result<&Config, VirError> {
    Ok(asked(view, flags & (LIVE | CONFIG))?.all_config)
}

/// `DOMAIN_GET_SCHEDULER_TYPE`
pub async fn scheduler_type(call: Call) -> Answered {
    let view = call.only_guest()?;
    let mut w = Writer::new();
    w.string("posix").i32(scheduler_fields(&call, &view, 0)?.len() as i32);
    Ok(w.finish().into())
}

fn scheduler_fields(
    call: &Call,
    view: &InstanceView,
    flags: u32,
) -> Result<Vec<(&'static str, Typed)>, VirError> {
    // Of one that does not run there is nothing but what was set.
    let (mut shares, mut period, mut quota) = match is_running(view) {
        true => (SHARES, PERIOD, -1),
        false => (0, 0, 0),
    };
    let (none, unlimited) = (period, quota);
    let limits = limits_of(config_of(view, flags)?)?;
    match limits.cpu_allowance {
        Some(CpuAllowance::Share { percent }) => shares = SHARES * u64::from(percent) / 100,
        Some(CpuAllowance::Quota { quota_us, period_us }) => {
            (period, quota) = (period_us, quota_us as i64);
        }
        None => {}
    }
    shares = limits.cpu_shares.map_or(shares, u64::from);
    let mut all = vec![("cpu_shares", Typed::Ullong(shares))];
    match call.opened()?.driver {
        Driver::Lxc => {
            all.extend([("vcpu_period", Typed::Ullong(period)), ("vcpu_quota", Typed::Llong(quota))])
        }
        Driver::Qemu => {
            for (of, its_quota) in [
                ("vcpu_period", "vcpu_quota"),
                ("emulator_period", "emulator_quota"),
                ("global_period", "global_quota"),
                ("iothread_period", "iothread_quota"),
            ] {
                let (period, quota) = if of == "global_period" { (period, quota) } else { (none, unlimited) };
                all.extend([(of, Typed::Ullong(period)), (its_quota, Typed::Llong(quota))]);
            }
        }
    }
    Ok(all)
}

async fn scheduler_of(call: &Call, named: &Named, wanted: i32, flags: u32) -> Answered {
    call.known_flags(flags, LIVE | CONFIG | STRINGS)?;
    let view = call.guest(named)?;
    let all = scheduler_fields(call, &view, flags)?;
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

/// Sets a key of a guest, or takes it away.
pub(super) async fn set(
    call: &Call,
    view: &InstanceView,
    flags: u32,
    key: &str,
    value: Option<String>,
) -> Result<(), VirError> {
    let keys = vec![(key.to_owned(), value)];
    set_sides(call, view, flags, &[key.to_owned()], |_| Ok(keys.clone())).await
}

/// Keys with their new values; without one a key is taken away.
pub(super) type Keys = Vec<(String, Option<String>)>;

/// The same of several, all of them or none, where what is set depends on what the side has; `touched` are those that a running
/// guest must have taken.
pub(super) async fn set_sides(
    call: &Call,
    view: &InstanceView,
    flags: u32,
    touched: &[String],
    keys: impl Fn(&Side<'_>) -> Result<Keys, VirError>,
) -> Result<(), VirError> {
    let edits = edits(view, affects(view, flags)?, |side| {
        let mut config = side.config.clone();
        for (key, value) in keys(side)? {
            match value {
                Some(value) => drop(config.insert(key, value)),
                None => drop(config.remove(&key)),
            }
        }
        Ok(spec::Updated { config, devices: side.devices.clone(), slots: Default::default() })
    })?;
    write(call, view, edits, touched).await
}

/// The same, where the run must have taken all that is said.
async fn set_limits(
    call: &Call,
    view: &InstanceView,
    flags: u32,
    keys: impl Fn(&Side<'_>) -> Result<Keys, VirError>,
) -> Result<(), VirError> {
    let said = keys(&asked(view, flags)?)?;
    let touched: Vec<String> = said.into_iter().map(|(key, _)| key).collect();
    set_sides(call, view, flags, &touched, keys).await
}

/// What parameters of a machine's scheduler mean, beside what it has.
fn machine_shares(all: &Parameters, now: &Tuning) -> Result<Vec<(String, Option<String>)>, VirError> {
    let mut keys = vec![];
    let (mut period, mut quota) = (None, None);
    for (field, value) in all {
        let none = matches!(value, Typed::Llong(n) if *n <= 0);
        let n = number(value).unwrap_or(0);
        match field.as_str() {
            "cpu_shares" => {
                keys.push((SHARES_KEY.to_owned(), Some(demand_shares(field, n)?.to_string())));
                if now.shares.is_some() && now.quota.is_none() {
                    // It may have been said in percent.
                    keys.push((ALLOWANCE.to_owned(), None));
                }
            }
            "global_period" => period = Some(n),
            "global_quota" => quota = Some((!none).then_some(n)),
            "vcpu_quota" | "emulator_quota" | "iothread_quota" if none => {}
            other if other.ends_with("_quota") || other.ends_with("_period") => {
                return Err(refuse(other, AS_A_WHOLE));
            }
            other => return Err(VirError::argument(format!("parameter '{other}' not supported"))),
        }
    }
    match (quota, period, now.quota) {
        (Some(None), _, _) => keys.push((ALLOWANCE.to_owned(), None)),
        (Some(Some(quota)), period, before) => {
            let period = period.or(before.map(|(_, period)| period)).unwrap_or(PERIOD);
            let (quota, period) = demand_quota(quota, period)?;
            keys.push((ALLOWANCE.to_owned(), Some(allowance_text(quota, period))));
        }
        (None, Some(period), Some((quota, _))) => {
            let (quota, period) = demand_quota(quota, period)?;
            keys.push((ALLOWANCE.to_owned(), Some(allowance_text(quota, period))));
        }
        (None, Some(_), None) => {
            return Err(refuse("global_period", "is of a global_quota, which is not set"));
        }
        (None, None, _) => {}
    }
    Ok(keys)
}

async fn set_scheduler_to(call: &Call, (named, all): (Named, Parameters), flags: u32) -> Answered {
    call.known_flags(flags, LIVE | CONFIG)?;
    let view = call.guest(&named)?;
    if call.opened()?.driver == Driver::Qemu {
        set_limits(call, &view, flags, |side| machine_shares(&all, &of_config(side.all_config)?)).await?;
    } else {
        set(call, &view, flags, "limits.cpu.allowance", allowance(&all)?).await?;
    }
    told::tuned(call, &view, flags, told::named("cputune", &all));
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

fn asked_for(call: &Call) -> Result<(Config, i32), VirError> {
    let (named, wanted, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, LIVE | CONFIG | STRINGS)?;
    let view = call.guest(&named)?;
    Ok((config_of(&view, flags)?.clone(), wanted))
}

/// `DOMAIN_GET_MEMORY_PARAMETERS`, KiB: of a machine what it and its QEMU have together.
pub async fn memory(call: Call) -> Answered {
    let (config, wanted) = asked_for(&call)?;
    if call.opened()?.driver == Driver::Qemu {
        let all = of_config(&config)?;
        let of = |size: Option<u64>| Typed::Ullong(size.unwrap_or(UNLIMITED));
        let all = vec![
            ("hard_limit", of(all.hard)),
            ("soft_limit", of(all.soft)),
            ("swap_hard_limit", of(all.swap)),
        ];
        return parameters(all, wanted);
    }
    let limits = memtune::Limits::of(&config, facts(&call)?.memory)?;
    let of = |size: Option<u64>| Typed::Ullong(size.unwrap_or(UNLIMITED));
    let all = vec![
        ("hard_limit", of(limits.hard)),
        ("soft_limit", of(limits.soft)),
        ("swap_hard_limit", of(limits.both)),
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
        set_limits(&call, &view, flags, |side| {
            let now = of_config(side.all_config)?;
            let (mut hard, mut soft, mut both) = (now.hard, now.soft, now.swap);
            for (field, value) in &all {
                let size = match field.as_str() {
                    "hard_limit" => &mut hard,
                    "soft_limit" => &mut soft,
                    "swap_hard_limit" => &mut both,
                    other => return Err(VirError::argument(format!("parameter '{other}' not supported"))),
                };
                *size = limited(value);
            }
            let limits = crate::limits::of_config(view.instance.kind, side.all_config)?;
            demand_room("hard_limit", hard, limits.most_memory_kib(&call)?)?;
            let kib = |n: Option<u64>| n.map(|n| format!("{n}KiB"));
            let mut keys = vec![(HARD.to_owned(), kib(hard)), (SOFT.to_owned(), kib(soft))];
            if both.is_some() || now.swap.is_some() {
                keys.push((SWAP.to_owned(), swap_of(hard, both)?.map(swap)));
            }
            Ok(keys)
        })
        .await?;
        return Ok(nothing());
    }
    let fields: Vec<_> = all.iter().map(|(field, value)| (field.clone(), limited(value))).collect();
    let host = facts(&call)?.memory;
    set_limits(&call, &view, flags, |side| memtune::Limits::of(side.all_config, host)?.changed(&fields))
        .await?;
    Ok(nothing())
}

/// `DOMAIN_GET_BLKIO_PARAMETERS`
pub async fn disks(call: Call) -> Answered {
    let (config, wanted) = asked_for(&call)?;
    let weight = limits_of(&config)?.disk_priority.map_or(0, |p| (p * 100).max(10));
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
    if let Some((other, _)) = all.iter().find(|(field, _)| field != "weight") {
        return Err(refuse(other, "disks have rates of their own (blkdeviotune)"));
    }
    for (_, value) in &all {
        match call.opened()?.driver {
            Driver::Lxc => {
                let weight = number(value).filter(|n| (10..=1000).contains(n));
                let weight = weight.ok_or_else(|| VirError::argument("weight is 10 to 1000"))?;
                let priority = (weight / 100).to_string();
                set(&call, &view, flags, "limits.disk.priority", Some(priority)).await?;
            }
            Driver::Qemu => {
                let priority = priority(number(value).unwrap_or(0))?.to_string();
                set(&call, &view, flags, WEIGHT, Some(priority)).await?;
            }
        }
    }
    Ok(nothing())
}

/// `DOMAIN_GET_NUMA_PARAMETERS`
pub async fn nodes(call: Call) -> Answered {
    let (config, wanted) = asked_for(&call)?;
    let nodes = limits_of(&config)?.memory_nodes.as_deref().map(ranges).unwrap_or_default();
    let mode = numa_mode(Board::of(&config)?.numa_policy);
    parameters(vec![("numa_mode", Typed::Int(mode)), ("numa_nodeset", Typed::Text(nodes))], wanted)
}

/// libvirt's number of a mode.
fn numa_mode(policy: Option<NodePolicy>) -> i32 {
    match policy {
        None | Some(NodePolicy::Bind) => 0,
        Some(NodePolicy::Preferred) => 1,
        Some(NodePolicy::Interleave) => 2,
    }
}

/// `DOMAIN_SET_NUMA_PARAMETERS`
pub async fn set_nodes(call: Call) -> Answered {
    let ((named, all), flags) = call.arguments(|r| Ok((read(r)?, r.u32()?)))?;
    call.known_flags(flags, LIVE | CONFIG)?;
    let view = call.guest(&named)?;
    if call.opened()?.driver != Driver::Qemu {
        return Err(refuse("numatune", "the memory of containers is where the host's kernel puts it"));
    }
    let mut keys = vec![];
    for (field, value) in &all {
        match (field.as_str(), value) {
            // As it is.
            ("numa_mode", Typed::Int(mode))
                if *mode == numa_mode(Board::of(config_of(&view, flags)?)?.numa_policy) => {}
            ("numa_mode", Typed::Int(_)) if Board::of(config_of(&view, flags)?)?.numa_policy.is_some() => {
                let text = "memory is spread as the domain's document says it, from one start to the next";
                return Err(refuse("numatune mode", text));
            }
            ("numa_mode", Typed::Int(mode)) => {
                let modes = ["strict", "preferred", "interleave", "restrictive"];
                let mode = usize::try_from(*mode).ok().and_then(|n| modes.get(n)).copied();
                demand_mode(mode.ok_or_else(|| VirError::argument("unsupported numatune mode"))?)?;
            }
            ("numa_nodeset", Typed::Text(text)) => {
                let nodes = match text.as_str() {
                    "" => None,
                    text => {
                        let set = crate::xml::machine::tuning::set(text);
                        Some(ranges(&set.ok_or_else(|| VirError::argument("nodeset is no set of nodes"))?))
                    }
                };
                keys.push((NODES.to_owned(), nodes));
            }
            (other, _) => return Err(VirError::argument(format!("parameter '{other}' not supported"))),
        }
    }
    set_limits(&call, &view, flags, |_| Ok(keys.clone())).await?;
    Ok(nothing())
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
}
