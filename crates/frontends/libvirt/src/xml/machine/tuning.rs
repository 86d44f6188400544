//! Threads, pins and limits of a machine's process: in a document, as keys, and in a document again.

use super::{Machine, nodes, read, refuse, wrong};
use crate::{
    error::VirError,
    xml::{Element, domain::ranges},
};
use karst_model::{
    ByteSize, Config, Error,
    board::Board,
    keys,
    spec::{CpuAllowance, SwapLimit},
    threads::{self, IOTHREADS, IoThread, MAX_IOTHREAD, SCSI_IOTHREAD, Thread},
};
use std::collections::{BTreeMap, BTreeSet};

/// Keys that calls change too.
pub const SHARES: &str = "limits.cpu.shares";
/// See [`SHARES`].
pub const ALLOWANCE: &str = "limits.cpu.allowance";
/// See [`SHARES`].
pub const WEIGHT: &str = "limits.disk.priority";
/// See [`SHARES`].
pub const NODES: &str = "limits.memory.nodes";
/// See [`SHARES`].
pub const HARD: &str = "limits.memory.hard";
/// See [`SHARES`].
pub const SOFT: &str = "limits.memory.soft";
/// See [`SHARES`].
pub const SWAP: &str = "limits.memory.swap";
/// What libvirt shows of memory that is not limited, KiB.
pub const UNLIMITED: u64 = 9_007_199_254_740_991;
/// Elements of a domain that are held here.
pub const ELEMENTS: &[&str] = &["iothreads", "iothreadids", "cputune", "memtune", "blkiotune", "numatune"];
/// Why parts of a machine are not limited apart.
pub const AS_A_WHOLE: &str =
    "the processors, the disks' threads and QEMU itself are limited together: global_period and global_quota";

/// What a document says of threads, pins and limits.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tuning {
    /// Part of the processors when they are contended, beside the 1024 of others.
    pub shares: Option<u32>,
    /// Microseconds of processor time, and of how many.
    pub quota: Option<(u64, u64)>,
    /// Where threads run, those that the `<vcpu>` pins apart.
    pub pins: BTreeMap<Thread, Vec<u32>>,
    /// Most memory of the machine and QEMU, KiB.
    pub hard: Option<u64>,
    /// What of it they keep when the host is short of memory, KiB.
    pub soft: Option<u64>,
    /// Most memory and swap, KiB.
    pub swap: Option<u64>,
    /// Weight when disks are contended.
    pub weight: Option<u32>,
    /// NUMA nodes of the host.
    pub nodes: Option<Vec<u32>>,
    /// Threads that serve disks, by number.
    pub iothreads: Vec<IoThread>,
    /// Which of them serves the disks on virtio-scsi.
    pub scsi: Option<u32>,
}

/// The processors, or nodes, that `0-3,^2,7` names; nothing of what is no such set, or is empty.
pub fn set(text: &str) -> Option<Vec<u32>> {
    let mut all = BTreeSet::new();
    for part in text.split(',') {
        let part = part.trim();
        if let Some(not) = part.strip_prefix('^') {
            all.remove(&not.parse().ok()?);
            continue;
        }
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if last < first || last > 4095 {
            return None;
        }
        all.extend(first..=last);
    }
    (!all.is_empty()).then(|| all.into_iter().collect())
}

fn demand_set(e: &Element, name: &str) -> Result<Vec<u32>, VirError> {
    let text = e.attribute(name).unwrap_or_default();
    set(text).ok_or_else(|| wrong(format!("invalid value '{text}' of {name} in <{}>", e.name())))
}

fn number<T: std::str::FromStr>(e: &Element, name: &str) -> Result<T, VirError> {
    let text = e.attribute(name).unwrap_or_default();
    text.parse().map_err(|_| wrong(format!("invalid value '{text}' of {name} in <{}>", e.name())))
}

/// Parameters of the scheduler as documents and calls name them; the others are refused by their names.
///
/// # Errors
/// CONFIG_UNSUPPORTED, naming the parameter.
pub fn demand_shares(name: &str, shares: u64) -> Result<u32, VirError> {
    let good = u32::try_from(shares).ok().filter(|n| (2..=262_144).contains(n));
    good.ok_or_else(|| refuse(name, format!("{shares} is not 2 to 262144")))
}

/// A limit of processor time.
///
/// # Errors
/// CONFIG_UNSUPPORTED, naming the parameter.
pub fn demand_quota(quota: u64, period: u64) -> Result<(u64, u64), VirError> {
    if !(1000..=1_000_000).contains(&period) {
        return Err(refuse("global_period", format!("{period} is not 1000 to 1000000 microseconds")));
    }
    if !(1000..=1_000_000_000).contains(&quota) {
        return Err(refuse("global_quota", format!("{quota} is not 1000 to 1000000000 microseconds")));
    }
    Ok((quota, period))
}

/// A weight of disks as the priority that it is.
///
/// # Errors
/// CONFIG_UNSUPPORTED for one between the steps.
pub fn priority(weight: u64) -> Result<u32, VirError> {
    match weight {
        10 => Ok(0),
        n if (100..=1000).contains(&n) && n.is_multiple_of(100) => Ok((n / 100) as u32),
        other => Err(refuse(
            "weight",
            format!("{other} is between the steps of limits.disk.priority: 10, or 100 to 1000 in hundreds"),
        )),
    }
}

/// The modes of NUMA that keep memory where it is said, which is what is done.
///
/// # Errors
/// CONFIG_UNSUPPORTED, naming the mode.
pub fn demand_mode(mode: &str) -> Result<(), VirError> {
    match mode {
        "strict" | "restrictive" => Ok(()),
        other => Err(refuse("numatune mode", format!("'{other}' is not there; strict and restrictive are"))),
    }
}

fn cputune(e: &Element, all: &mut Tuning) -> Result<(), VirError> {
    let (mut quota, mut period) = (None, None);
    for part in e.elements() {
        let value = || -> Result<i64, VirError> {
            let text = part.body().trim();
            text.parse().map_err(|_| wrong(format!("<{}> is no number: '{text}'", part.name())))
        };
        let mut pin = |thread, cpus| match all.pins.insert(thread, cpus) {
            None => Ok(()),
            Some(_) => Err(wrong(format!("duplicate {} of one thread", part.name()))),
        };
        match part.name() {
            "shares" => {
                all.shares = Some(demand_shares("cputune shares", u64::try_from(value()?).unwrap_or(0))?);
            }
            "global_quota" => quota = Some(value()?),
            "global_period" => period = Some(u64::try_from(value()?).unwrap_or(0)),
            "vcpupin" => pin(Thread::Vcpu(number(part, "vcpu")?), demand_set(part, "cpuset")?)?,
            "emulatorpin" => pin(Thread::Emulator, demand_set(part, "cpuset")?)?,
            "iothreadpin" => pin(Thread::Io(number(part, "iothread")?), demand_set(part, "cpuset")?)?,
            other => {
                let why = match other {
                    "vcpusched" | "iothreadsched" | "emulatorsched" => "threads have the host's scheduler",
                    "cachetune" | "memorytune" => "caches and memory's bandwidth are not divided",
                    "period" | "quota" | "emulator_period" | "emulator_quota" | "iothread_period"
                    | "iothread_quota" => AS_A_WHOLE,
                    _ => "is not known",
                };
                return Err(refuse(&format!("cputune {other}"), why));
            }
        }
    }
    match (quota.filter(|q| *q > 0), period) {
        (Some(quota), period) => {
            all.quota = Some(demand_quota(quota.cast_unsigned(), period.unwrap_or(100_000))?);
        }
        // Without a quota there is nothing that a period would be of.
        (None, Some(period)) => drop(demand_quota(1000, period)?),
        (None, None) => {}
    }
    Ok(())
}

fn memtune(e: &Element, all: &mut Tuning) -> Result<(), VirError> {
    for part in e.elements() {
        let size = match part.name() {
            "hard_limit" => &mut all.hard,
            "soft_limit" => &mut all.soft,
            "swap_hard_limit" => &mut all.swap,
            "min_guarantee" => return Err(refuse("memtune min_guarantee", "nothing guarantees memory")),
            other => return Err(refuse(&format!("memtune {other}"), "is not known")),
        };
        *size = Some(read::kib(part)?).filter(|kib| *kib < UNLIMITED);
    }
    swap_of(all.hard, all.swap).map(drop)
}

/// Refuses a limit that would be the end of a machine with so much memory, KiB.
///
/// # Errors
/// CONFIG_UNSUPPORTED, naming the limit.
pub fn demand_room(name: &str, hard: Option<u64>, memory: u64) -> Result<(), VirError> {
    let least = memory.saturating_add(threads::BESIDE.bytes() / 1024);
    match hard.filter(|hard| *hard < least) {
        None => Ok(()),
        Some(hard) => Err(refuse(
            name,
            format!(
                "{hard} KiB would be the end of the machine, which has {memory} KiB, and QEMU needs memory beside; give at least \
                 {least} KiB"
            ),
        )),
    }
}

/// The swap that a limit of memory and swap together leaves, KiB.
///
/// # Errors
/// CONFIG_UNSUPPORTED without a limit of memory, or with a larger one.
pub fn swap_of(hard: Option<u64>, both: Option<u64>) -> Result<Option<u64>, VirError> {
    match (hard, both) {
        (_, None) => Ok(None),
        (Some(hard), Some(both)) if hard <= both => Ok(Some(both - hard)),
        _ => {
            Err(refuse("swap_hard_limit", "is of memory and swap: set hard_limit too, to no more than that"))
        }
    }
}

fn blkiotune(e: &Element, all: &mut Tuning) -> Result<(), VirError> {
    for part in e.elements() {
        match part.name() {
            "weight" => {
                let text = part.body().trim();
                let n = text.parse().map_err(|_| wrong(format!("<weight> is no number: '{text}'")))?;
                priority(n).map_err(|e| refuse("blkiotune", e.text))?;
                all.weight = Some(n as u32);
            }
            "device" => {
                let why = "disks have rates of their own (blkdeviotune); devices of the host have none of a machine";
                return Err(refuse("blkiotune device", why));
            }
            other => return Err(refuse(&format!("blkiotune {other}"), "is not known")),
        }
    }
    Ok(())
}

fn numatune(e: &Element, all: &mut Tuning) -> Result<(), VirError> {
    nodes::host(e)?;
    for part in e.elements() {
        match part.name() {
            "memory" => {}
            // Those are the board's.
            "memnode" => continue,
            other => return Err(refuse(&format!("numatune {other}"), "is not known")),
        }
        nodes::policy(e)?;
        // Whether one that names none leaves it to the host is said by the processors too: [`nodes::placement`].
        let named = match part.attribute("placement") {
            None | Some("static") => part.attribute("nodeset"),
            Some("auto") => None,
            Some(other) => {
                return Err(refuse(
                    "numatune placement",
                    format!("'{other}' is not there; static and auto are"),
                ));
            }
        };
        all.nodes = named.map(|_| demand_set(part, "nodeset")).transpose()?;
    }
    Ok(())
}

fn iothreads(e: &Element) -> Result<u32, VirError> {
    let text = e.body().trim();
    let n = text.parse::<u32>().map_err(|_| wrong(format!("invalid iothreads count '{text}'")))?;
    match n as usize <= threads::MAX_IOTHREADS {
        true => Ok(n),
        false => Err(refuse("iothreads", format!("a machine has {} at most", threads::MAX_IOTHREADS))),
    }
}

fn iothreadids(e: &Element) -> Result<Vec<IoThread>, VirError> {
    let mut all: Vec<IoThread> = vec![];
    for part in e.elements() {
        if part.name() != "iothread" {
            return Err(refuse(&format!("iothreadids {}", part.name()), "is not known"));
        }
        let id: u32 = number(part, "id")?;
        if id == 0 || id > MAX_IOTHREAD {
            return Err(refuse("iothreadids iothread", format!("'{id}' is not 1 to {MAX_IOTHREAD}")));
        }
        if all.iter().any(|t| t.id == id) {
            return Err(wrong(format!("duplicate iothread id '{id}' found")));
        }
        let optional = |e: &Element, name: &str| e.attribute(name).map(|_| number(e, name)).transpose();
        let poll = part.find("poll");
        let of_poll = |name: &str| poll.map(|p| optional(p, name)).transpose().map(Option::flatten);
        all.push(IoThread {
            id,
            poll_max_ns: of_poll("max")?,
            poll_grow: of_poll("grow")?,
            poll_shrink: of_poll("shrink")?,
            thread_pool_min: optional(part, "thread_pool_min")?,
            thread_pool_max: optional(part, "thread_pool_max")?,
        });
    }
    all.sort_by_key(|t| t.id);
    Ok(all)
}

/// One of [`ELEMENTS`].
fn part(e: &Element, all: &mut Tuning) -> Result<(), VirError> {
    match e.name() {
        "cputune" => cputune(e, all),
        "memtune" => memtune(e, all),
        "blkiotune" => blkiotune(e, all),
        "numatune" => numatune(e, all),
        "iothreads" => iothreads(e).map(drop),
        "iothreadids" => iothreadids(e).map(|ids| all.iothreads = ids),
        _ => Ok(()),
    }
}

/// Is all that one of [`ELEMENTS`] says done?
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming what Karst does not do.
pub fn check(e: &Element) -> Result<(), VirError> {
    part(e, &mut Tuning::default())
}

/// What a domain says.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming what Karst does not do.
pub fn of(root: &Element) -> Result<Tuning, VirError> {
    let mut all = Tuning::default();
    root.elements().iter().try_for_each(|e| part(e, &mut all))?;
    if let Some(memory) = root.find("memory").filter(|_| all.hard.is_some()) {
        demand_room("memtune hard_limit", all.hard, read::kib(memory)?)?;
    }
    // Those that are counted and not numbered have the lowest numbers that are free.
    let count = root.find("iothreads").map_or(Ok(0), iothreads)? as usize;
    for id in 1..=MAX_IOTHREAD {
        if all.iothreads.len() >= count {
            break;
        }
        if all.iothreads.iter().all(|t| t.id != id) {
            all.iothreads.push(IoThread::new(id));
        }
    }
    all.iothreads.sort_by_key(|t| t.id);
    let most = root.find("vcpu").and_then(|v| v.body().trim().parse().ok()).unwrap_or(1);
    for thread in all.pins.keys() {
        match thread {
            Thread::Vcpu(n) if *n >= most => {
                let why = format!("there is no processor {n}; the machine has {most}");
                return Err(refuse("cputune vcpupin", why));
            }
            Thread::Io(n) if all.iothreads.iter().all(|t| t.id != *n) => {
                return Err(wrong(format!("Cannot find 'iothread' : {n}")));
            }
            _ => {}
        }
    }
    for driver in root.find("devices").into_iter().flat_map(|d| d.all("controller")).filter_map(scsi_driver) {
        let id = thread_of(driver, "controller driver iothread")?;
        match (all.scsi, id) {
            (Some(one), Some(other)) if one != other => {
                return Err(refuse("controller driver iothread", "disks on scsi are on one controller"));
            }
            (was, id) => all.scsi = id.or(was),
        }
    }
    if let Some(id) = all.scsi.filter(|id| all.iothreads.iter().all(|t| t.id != *id)) {
        return Err(wrong(format!("Controller iothread '{id}' not defined in iothreadid")));
    }
    Ok(all)
}

fn is_scsi(e: &Element) -> bool {
    e.name() == "controller" && e.attribute("type") == Some("scsi")
}

fn scsi_driver(e: &Element) -> Option<&Element> {
    e.find("driver").filter(|_| is_scsi(e))
}

/// The thread that a `<driver>` names.
///
/// # Errors
/// XML error, when it is none.
pub fn thread_of(driver: &Element, what: &str) -> Result<Option<u32>, VirError> {
    let Some(text) = driver.attribute("iothread") else { return Ok(None) };
    let id = text.parse().ok().filter(|n| (1..=MAX_IOTHREAD).contains(n));
    id.map(Some).ok_or_else(|| wrong(format!("invalid value '{text}' of {what}")))
}

/// `12ms/50ms`, or as finely as is needed.
pub fn allowance(quota: u64, period: u64) -> String {
    let time = |us: u64| match us.is_multiple_of(1000) {
        true => format!("{}ms", us / 1000),
        false => format!("{us}us"),
    };
    format!("{}/{}", time(quota), time(period))
}

/// Does `limits.cpu` name the processors of the host that a machine runs on? It can where they are as many as the machine's,
/// and no thread runs elsewhere.
pub fn is_set(machine: &Machine) -> bool {
    let Some(cpus) = machine.pinned.as_deref().and_then(set) else { return false };
    let within = |pin: &Vec<u32>| pin.iter().all(|cpu| cpus.contains(cpu));
    cpus.len() == machine.cpus as usize && machine.tuning.pins.values().all(within)
}

/// What a machine's document means, as keys.
fn keys_of(machine: &Machine) -> Config {
    let all = &machine.tuning;
    let mut config = Config::new();
    let mut set = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            config.insert(key.to_owned(), value);
        }
    };
    set(SHARES, all.shares.map(|n| n.to_string()));
    set(ALLOWANCE, all.quota.map(|(quota, period)| allowance(quota, period)));
    if !is_set(machine) {
        set(&Thread::Default.key(), machine.pinned.clone());
    }
    for (thread, cpus) in &all.pins {
        set(&thread.key(), Some(ranges(cpus)));
    }
    let kib = |n: Option<u64>| n.map(|n| format!("{n}KiB"));
    set(HARD, kib(all.hard));
    set(SOFT, kib(all.soft));
    // Read before: it is not below the hard limit.
    set(SWAP, swap_of(all.hard, all.swap).ok().flatten().map(swap));
    set(WEIGHT, all.weight.and_then(|n| priority(n.into()).ok()).map(|n| n.to_string()));
    set(NODES, all.nodes.as_deref().map(ranges));
    let ids: Vec<u32> = all.iothreads.iter().map(|t| t.id).collect();
    set(IOTHREADS, threads::iothreads_text(&ids));
    for thread in &all.iothreads {
        for name in threads::PROPERTIES {
            let key = format!("{IOTHREADS}.{}.{name}", thread.id);
            set(&key, thread.property(name).0.map(|n| n.to_string()));
        }
    }
    set(SCSI_IOTHREAD, all.scsi.map(|n| n.to_string()));
    config
}

/// The value of `limits.memory.swap` for so many KiB.
pub fn swap(kib: u64) -> String {
    if kib == 0 { "false".to_owned() } else { format!("{kib}KiB") }
}

/// Changes the keys of which a document says something else than the one before.
pub fn change(config: &mut Config, before: Option<&Machine>, new: &Machine) {
    let moved = before.is_some_and(|before| before.pinned != new.pinned);
    let (old, new) = (before.map(keys_of).unwrap_or_default(), keys_of(new));
    if moved && !new.contains_key(&Thread::Default.key()) {
        // A document shows it as it shows the set of `limits.cpu`.
        config.remove(&Thread::Default.key());
    }
    if old.get(SHARES) != new.get(SHARES) && config.get(ALLOWANCE).is_some_and(|a| a.ends_with('%')) {
        // It said the same as the shares.
        config.remove(ALLOWANCE);
    }
    for key in old.keys().chain(new.keys()).filter(|key| old.get(*key) != new.get(*key)) {
        match new.get(key) {
            Some(value) => drop(config.insert(key.clone(), value.clone())),
            None => drop(config.remove(key)),
        }
    }
}

/// What the keys of a machine mean.
///
/// # Errors
/// Invalid, naming the key.
pub fn of_config(config: &Config) -> Result<Tuning, Error> {
    let limits = keys::limits(config)?;
    let iothreads = threads::iothreads(config)?;
    let kib = |size: ByteSize| size.bytes() / 1024;
    let hard = limits.memory_hard.map(kib);
    let swap = match limits.swap {
        Some(SwapLimit::Forbidden) => Some(0),
        Some(SwapLimit::Bytes { bytes }) => Some(bytes / 1024),
        Some(SwapLimit::Allowed) | None => None,
    };
    let (share, quota) = match limits.cpu_allowance {
        Some(CpuAllowance::Share { percent }) => (Some(percent * 1024 / 100), None),
        Some(CpuAllowance::Quota { quota_us, period_us }) => (None, Some((quota_us, period_us))),
        None => (None, None),
    };
    let apart = limits.pins.into_iter().filter(|p| p.thread != Thread::Default);
    Ok(Tuning {
        shares: limits.cpu_shares.or(share),
        quota,
        pins: apart.map(|p| (p.thread, p.cpus)).collect(),
        hard,
        soft: limits.memory_high.map(kib),
        swap: hard.zip(swap).map(|(hard, swap)| hard + swap),
        weight: limits.disk_priority.map(|p| (p * 100).max(10)),
        nodes: limits.memory_nodes,
        scsi: threads::scsi_iothread(config, &iothreads)?,
        iothreads,
    })
}

/// Adds what keys mean to a domain; `kept` are its elements as they were written.
///
/// # Errors
/// Invalid, naming the key.
pub fn show(e: &mut Element, config: &Config, board: &Board, kept: &[Element]) -> Result<(), Error> {
    let all = of_config(config)?;
    let section = |e: &mut Element, name: &'static str, parts: Vec<Element>| {
        if !parts.is_empty() {
            e.push(Element::new(name).children(parts));
        }
    };
    section(e, "blkiotune", all.weight.map(|n| Element::text("weight", n)).into_iter().collect());
    let size = |name: &'static str, n: Option<u64>| n.map(|n| Element::text(name, n).with("unit", "KiB"));
    let memory = [("hard_limit", all.hard), ("soft_limit", all.soft), ("swap_hard_limit", all.swap)];
    section(e, "memtune", memory.into_iter().filter_map(|(name, n)| size(name, n)).collect());
    if !all.iothreads.is_empty() {
        e.push(Element::text("iothreads", all.iothreads.len()));
        let plain = all.iothreads.iter().copied().eq((1..).take(all.iothreads.len()).map(IoThread::new));
        if !plain {
            e.push(Element::new("iothreadids").children(all.iothreads.iter().map(shown_thread)));
        }
    }
    let mut cputune = vec![];
    cputune.extend(all.shares.map(|n| Element::text("shares", n)));
    if let Some((quota, period)) = all.quota {
        cputune.extend([Element::text("global_period", period), Element::text("global_quota", quota)]);
    }
    for (thread, cpus) in &all.pins {
        let pin = match thread {
            Thread::Vcpu(n) => Element::new("vcpupin").with("vcpu", n),
            Thread::Io(n) => Element::new("iothreadpin").with("iothread", n),
            Thread::Emulator | Thread::Default => Element::new("emulatorpin"),
        };
        cputune.push(pin.with("cpuset", ranges(cpus)));
    }
    section(e, "cputune", cputune);
    // The mode that it was said with, of those that mean the same.
    let mut same = Tuning::default();
    let written = kept.iter().find(|k| k.name() == "numatune" && numatune(k, &mut same).is_ok());
    let vcpu = kept.iter().find(|k| k.name() == "vcpu");
    let holds = |written: &&Element| {
        same.nodes == all.nodes
            && nodes::host(written).is_ok_and(|host| host == board.numa_host)
            && nodes::policy(written).is_ok_and(|policy| policy == board.numa_policy)
            && nodes::placement(vcpu, Some(*written)).is_ok_and(|p| p.memory == board.placement.memory)
    };
    match written.filter(holds) {
        Some(written) => e.push(written.clone()),
        None => {
            let mode = board.numa_policy.map_or("strict", |policy| policy.as_str());
            let memory = || Element::new("memory").with("mode", mode);
            let memory = match (&all.nodes, board.placement.memory) {
                (Some(nodes), _) => Some(memory().with("nodeset", ranges(nodes))),
                (None, true) => Some(memory().with("placement", "auto")),
                (None, false) => None,
            };
            section(e, "numatune", memory.into_iter().chain(nodes::shown_host(&board.numa_host)).collect());
        }
    }
    Ok(())
}

fn shown_thread(thread: &IoThread) -> Element {
    let mut e = Element::new("iothread").with("id", thread.id);
    for name in ["thread_pool_min", "thread_pool_max"] {
        e = e.with_some(name, thread.property(name).0);
    }
    let poll = [("max", thread.poll_max_ns), ("grow", thread.poll_grow), ("shrink", thread.poll_shrink)];
    if poll.iter().any(|(_, n)| n.is_some()) {
        let with = |e: Element, (name, n): (&'static str, Option<u32>)| e.with_some(name, n);
        e.push(poll.into_iter().fold(Element::new("poll"), with));
    }
    e
}

/// Shows the thread of the disks on virtio-scsi at their controllers, of which there is one then.
///
/// # Errors
/// Invalid, naming the key.
pub fn show_controller(devices: &mut Element, config: &Config) -> Result<(), Error> {
    let thread = of_config(config)?.scsi;
    let of_virtio = |e: &Element| e.attribute("model").is_none_or(|m| m == "auto" || m.starts_with("virtio"));
    for controller in devices.elements_mut().iter_mut().filter(|e| is_scsi(e) && of_virtio(e)) {
        let there = controller.elements().iter().position(|e| e.name() == "driver");
        match (there, thread) {
            (Some(at), Some(id)) => controller.elements_mut()[at].set("iothread", id),
            (Some(at), None) => {
                controller.elements_mut()[at].unset("iothread");
                if controller.elements()[at].attributes().next().is_none() {
                    controller.elements_mut().remove(at);
                }
            }
            (None, Some(id)) => {
                controller.elements_mut().insert(0, Element::new("driver").with("iothread", id));
            }
            (None, None) => {}
        }
    }
    if let Some(id) = thread.filter(|_| !devices.elements().iter().any(is_scsi)) {
        let controller = Element::new("controller").with("type", "scsi").with("index", 0);
        let driver = Element::new("driver").with("iothread", id);
        devices.push(controller.with("model", "virtio-scsi").child(driver));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{error::Code, xml::read::document};

    fn read_of(parts: &str) -> Result<Tuning, VirError> {
        of(&document(&format!("<domain><vcpu>2</vcpu>{parts}</domain>")).unwrap())
    }

    #[test]
    fn sets_have_exceptions() {
        assert_eq!(set("0-3,^2,7").unwrap(), [0, 1, 3, 7]);
        assert_eq!(set("5").unwrap(), [5]);
        for bad in ["", "x", "3-1", "0-5000", "1,^1", "^"] {
            assert_eq!(set(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_document_is_the_same_after_being_keys() {
        let parts = "<blkiotune><weight>800</weight></blkiotune>\
            <memtune><hard_limit unit='GiB'>2</hard_limit><soft_limit unit='KiB'>1048576</soft_limit>\
            <swap_hard_limit unit='GiB'>3</swap_hard_limit></memtune>\
            <iothreads>3</iothreads>\
            <iothreadids><iothread id='2' thread_pool_max='8'><poll max='0'/></iothread></iothreadids>\
            <cputune><shares>2048</shares><global_period>50000</global_period><global_quota>12345</global_quota>\
            <vcpupin vcpu='1' cpuset='0-3,^2'/><emulatorpin cpuset='1'/><iothreadpin iothread='3' cpuset='2'/></cputune>\
            <numatune><memory mode='restrictive' nodeset='0'/></numatune>\
            <devices><controller type='scsi' model='virtio-scsi'><driver iothread='2'/></controller></devices>";
        let read = read_of(parts).unwrap();
        let ids: Vec<_> = read.iothreads.iter().map(|t| (t.id, t.poll_max_ns, t.thread_pool_max)).collect();
        assert_eq!(ids, [(1, None, None), (2, Some(0), Some(8)), (3, None, None)]);
        assert_eq!((read.hard, read.swap, read.scsi), (Some(2 << 20), Some(3 << 20), Some(2)));
        let text = "<domain type='qemu'><name>v</name><memory>1048576</memory><vcpu cpuset='0-7'>2</vcpu>\
            <os><type>hvm</type></os>";
        let machine = read::machine(&format!("{text}{parts}</domain>")).unwrap();
        assert_eq!(machine.tuning, read);
        let mut config = Config::new();
        change(&mut config, None, &machine);
        for (key, value) in [
            ("limits.cpu.shares", "2048"),
            ("limits.cpu.allowance", "12345us/50ms"),
            ("limits.cpu.pin.default", "0-7"),
            ("limits.cpu.pin.1", "0-1,3"),
            ("limits.memory.swap", "1048576KiB"),
            ("limits.disk.priority", "8"),
            ("hardware.iothreads", "3"),
            ("hardware.iothreads.2.thread_pool_max", "8"),
            ("hardware.scsi.iothread", "2"),
        ] {
            assert_eq!(config.get(key).map(String::as_str), Some(value), "{key}");
        }
        assert_eq!(of_config(&config).unwrap(), read);
        let mut shown = Element::new("domain").child(Element::text("vcpu", 2));
        show(&mut shown, &config, &Board::default(), &machine.opaque.domain).unwrap();
        let mut devices = Element::new("devices");
        show_controller(&mut devices, &config).unwrap();
        shown.push(devices);
        assert!(shown.document().contains("mode='restrictive'"), "{}", shown.document());
        assert_eq!(of(&shown).unwrap(), read, "{}", shown.document());
        // Without any of it nothing of it is left, also of what was said otherwise.
        config.insert(ALLOWANCE.into(), "50%".into());
        let none = Machine { tuning: Tuning::default(), pinned: None, ..machine.clone() };
        change(&mut config, Some(&machine), &none);
        assert_eq!(config, Config::new());
    }

    #[test]
    fn processors_of_all_threads_are_a_set_where_it_says_the_same() {
        let text = "<domain type='qemu'><name>v</name><memory>1048576</memory><vcpu cpuset='2,3'>2</vcpu>\
            <os><type>hvm</type></os>";
        let mut machine = read::machine(&format!("{text}</domain>")).unwrap();
        assert!(is_set(&machine) && keys_of(&machine).is_empty());
        let mut config = Config::from([(Thread::Default.key(), "2-3".to_owned())]);
        change(&mut config, Some(&machine), &machine);
        assert_eq!(config.len(), 1, "nothing has changed");
        change(&mut config, Some(&machine), &Machine { pinned: None, ..machine.clone() });
        assert_eq!(config, Config::new());
        machine.tuning.pins.insert(Thread::Vcpu(0), vec![3]);
        assert!(is_set(&machine));
        machine.tuning.pins.insert(Thread::Emulator, vec![0]);
        assert!(!is_set(&machine));
        assert_eq!(keys_of(&machine)["limits.cpu.pin.default"], "2-3");
    }

    #[test]
    fn what_is_not_done_is_refused_by_its_name() {
        for (parts, code, word) in [
            ("<cputune><quota>1000</quota></cputune>", Code::ConfigUnsupported, "cputune quota"),
            (
                "<cputune><vcpusched scheduler='fifo'/></cputune>",
                Code::ConfigUnsupported,
                "cputune vcpusched",
            ),
            ("<cputune><shares>1</shares></cputune>", Code::ConfigUnsupported, "cputune shares"),
            ("<cputune><global_period>1</global_period></cputune>", Code::ConfigUnsupported, "global_period"),
            ("<cputune><vcpupin vcpu='2' cpuset='0'/></cputune>", Code::ConfigUnsupported, "cputune vcpupin"),
            ("<cputune><vcpupin vcpu='0' cpuset='x'/></cputune>", Code::XmlError, "cpuset"),
            ("<cputune><iothreadpin iothread='1' cpuset='0'/></cputune>", Code::XmlError, "iothread"),
            ("<memtune><min_guarantee>1</min_guarantee></memtune>", Code::ConfigUnsupported, "min_guarantee"),
            (
                "<memtune><swap_hard_limit>9</swap_hard_limit></memtune>",
                Code::ConfigUnsupported,
                "swap_hard_limit",
            ),
            ("<blkiotune><weight>850</weight></blkiotune>", Code::ConfigUnsupported, "blkiotune"),
            (
                "<blkiotune><device><path>/dev/sda</path></device></blkiotune>",
                Code::ConfigUnsupported,
                "blkiotune device",
            ),
            (
                "<numatune><memory mode='near' nodeset='0'/></numatune>",
                Code::ConfigUnsupported,
                "numatune mode",
            ),
            (
                "<numatune><memnode cellid='0' mode='near' nodeset='0'/></numatune>",
                Code::ConfigUnsupported,
                "numatune memnode",
            ),
            (
                "<numatune><memory placement='near'/></numatune>",
                Code::ConfigUnsupported,
                "numatune placement",
            ),
            ("<iothreads>65</iothreads>", Code::ConfigUnsupported, "iothreads"),
            ("<iothreadids><iothread id='0'/></iothreadids>", Code::ConfigUnsupported, "iothreadids"),
            ("<iothreadids><iothread id='2'/><iothread id='2'/></iothreadids>", Code::XmlError, "duplicate"),
            (
                "<devices><controller type='scsi'><driver iothread='1'/></controller></devices>",
                Code::XmlError,
                "Controller iothread",
            ),
        ] {
            let e = read_of(parts).unwrap_err();
            assert!(e.code == code && e.text.contains(word), "{parts}: {e:?}");
        }
    }
}
