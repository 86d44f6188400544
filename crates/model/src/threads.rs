//! Threads of a virtual machine's process: those that serve disks beside the main one, and which CPUs of the host each of
//! them runs on. What their keys mean (the rows are in [`crate::keys`]).

use crate::{
    ByteSize, Config, Error, Result,
    key_values::parse_set,
    keys::set,
    maximum,
    spec::{CpuLimit, MemoryLimit},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt};

/// The key that says which threads serve disks.
pub const IOTHREADS: &str = "hardware.iothreads";
/// The key that says which of them serves the disks on virtio-scsi.
pub const SCSI_IOTHREAD: &str = "hardware.scsi.iothread";
/// What keys of pins begin with.
pub const PIN: &str = "limits.cpu.pin.";
/// The largest number of such a thread.
pub const MAX_IOTHREAD: u32 = 65_535;
/// How many a machine has at most.
pub const MAX_IOTHREADS: usize = 64;
/// Threads that one of them keeps for what blocks, at most.
const MAX_POOL: u32 = 256;
/// The largest number of a CPU of the host.
const MAX_CPU: u32 = 4095;
/// What QEMU needs beside the memory of its machine before a limit of both would be its end.
pub const BESIDE: ByteSize = ByteSize::mib(256);

/// A thread that serves disks. What is absent is QEMU's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct IoThread {
    /// Its number, from 1.
    pub id: u32,
    /// Longest time that it looks for work before it sleeps, nanoseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub poll_max_ns: Option<u32>,
    /// By what the time grows while looking finds work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub poll_grow: Option<u32>,
    /// By what it shrinks while it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub poll_shrink: Option<u32>,
    /// Threads that it keeps for what blocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thread_pool_min: Option<u32>,
    /// Most of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thread_pool_max: Option<u32>,
}

/// Properties of a thread that serves disks, as keys, documents and QEMU's commands name them.
pub const PROPERTIES: [&str; 5] =
    ["poll_max_ns", "poll_grow", "poll_shrink", "thread_pool_min", "thread_pool_max"];

impl IoThread {
    /// One without any wish.
    pub fn new(id: u32) -> Self {
        Self { id, ..Self::default() }
    }

    /// The value of a property (one of [`PROPERTIES`]), and what QEMU has where nothing is said.
    pub fn property(&self, name: &str) -> (Option<u32>, u32) {
        match name {
            "poll_max_ns" => (self.poll_max_ns, 32_768),
            "poll_grow" => (self.poll_grow, 0),
            "poll_shrink" => (self.poll_shrink, 0),
            "thread_pool_min" => (self.thread_pool_min, 0),
            _ => (self.thread_pool_max, 64),
        }
    }

    fn property_mut(&mut self, name: &str) -> Option<&mut Option<u32>> {
        Some(match name {
            "poll_max_ns" => &mut self.poll_max_ns,
            "poll_grow" => &mut self.poll_grow,
            "poll_shrink" => &mut self.poll_shrink,
            "thread_pool_min" => &mut self.thread_pool_min,
            "thread_pool_max" => &mut self.thread_pool_max,
            _ => return None,
        })
    }
}

/// A thread, or several that are placed together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Thread {
    /// All that are not named.
    Default,
    /// That of a virtual CPU, from 0.
    Vcpu(u32),
    /// All that serve neither a virtual CPU nor, apart, disks.
    Emulator,
    /// One that serves disks.
    Io(u32),
}

impl fmt::Display for Thread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::Vcpu(n) => write!(f, "{n}"),
            Self::Emulator => f.write_str("emulator"),
            Self::Io(n) => write!(f, "iothread{n}"),
        }
    }
}

impl Thread {
    /// The key that says where it runs.
    pub fn key(self) -> String {
        format!("{PIN}{self}")
    }

    fn parse(field: &str, text: &str) -> Result<Self> {
        let found = match (text, text.strip_prefix("iothread")) {
            ("default", _) => Some(Self::Default),
            ("emulator", _) => Some(Self::Emulator),
            (_, Some(n)) => n.parse().ok().filter(|n| (1..=MAX_IOTHREAD).contains(n)).map(Self::Io),
            _ => text.parse().ok().filter(|n| *n <= MAX_CPU).map(Self::Vcpu),
        };
        // Written in one way only.
        found.filter(|thread| thread.to_string() == text).ok_or_else(|| {
            let why = format!(
                "{text:?} is no thread of a machine; there are 0 (the first virtual CPU) and so on, emulator, iothread1 and \
                 so on, and default"
            );
            Error::invalid(field, why)
        })
    }
}

/// Where a thread runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// Which.
    pub thread: Thread,
    /// CPUs of the host, sorted.
    pub cpus: Vec<u32>,
}

/// The CPUs that pins say of a thread; `None`: all that the machine has.
pub fn pinned(pins: &[Pin], thread: Thread) -> Option<&[u32]> {
    let of = |thread| pins.iter().find(|p| p.thread == thread).map(|p| p.cpus.as_slice());
    of(thread).or_else(|| of(Thread::Default))
}

fn parse_pin(field: &str, text: &str) -> Result<Vec<u32>> {
    let wrong =
        || Error::invalid(field, format!("{text:?} is no set of CPUs of the host such as 1 or 0-1,3"));
    parse_set(text, MAX_CPU).ok_or_else(wrong)
}

/// The pins of an expanded configuration, each within the CPUs that `cpu` names.
///
/// # Errors
/// Invalid, naming the key.
pub fn pins(config: &Config, cpu: Option<&CpuLimit>) -> Result<Vec<Pin>> {
    let mut pins = vec![];
    for (key, value) in config.iter().filter(|(_, v)| !v.is_empty()) {
        let Some(thread) = key.strip_prefix(PIN) else { continue };
        let field = format!("config.{key}");
        let pin = Pin { thread: Thread::parse(&field, thread)?, cpus: parse_pin(&field, value)? };
        if let Some(CpuLimit::Set { cpus }) = cpu
            && let Some(other) = pin.cpus.iter().find(|c| !cpus.contains(c))
        {
            let why = format!(
                "names CPU {other}, which is not of limits.cpu; make that a number of CPUs, or a set with it"
            );
            return Err(Error::invalid(field, why));
        }
        pins.push(pin);
    }
    pins.sort_by_key(|p| p.thread);
    Ok(pins)
}

/// Parses `hardware.iothreads`: numbers of threads, sorted.
///
/// # Errors
/// Invalid, naming `field`.
pub fn parse_iothreads(field: &str, text: &str) -> Result<Vec<u32>> {
    let ids = match text.parse::<u32>() {
        Ok(n) => (1..=n.min(MAX_IOTHREADS as u32 + 1)).collect(),
        Err(_) => parse_set(text, MAX_IOTHREAD).unwrap_or_else(|| vec![0]),
    };
    if ids.contains(&0) {
        let why = format!(
            "{text:?} is neither a number of threads nor a set of theirs such as 1-2,4, from 1 to {MAX_IOTHREAD}"
        );
        return Err(Error::invalid(field, why));
    }
    if ids.len() > MAX_IOTHREADS {
        return Err(Error::invalid(field, format!("a machine has {MAX_IOTHREADS} such threads at most")));
    }
    Ok(ids)
}

/// The value of `hardware.iothreads` for threads of these numbers; nothing for none.
pub fn iothreads_text(ids: &[u32]) -> Option<String> {
    match ids {
        [] => None,
        // A set of one would read as how many there are.
        [one] if *one != 1 => Some(format!("{one}-{one}")),
        ids if ids.iter().copied().eq(1..=ids.len() as u32) => Some(ids.len().to_string()),
        ids => Some(ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")),
    }
}

/// The number and property that a key `hardware.iothreads.…` is about.
fn property_of(field: &str, rest: &str) -> Result<(u32, &'static str)> {
    let found = rest.split_once('.').and_then(|(id, name)| {
        let id = id.parse().ok().filter(|n: &u32| (1..=MAX_IOTHREAD).contains(n) && n.to_string() == id)?;
        Some((id, *PROPERTIES.iter().find(|p| **p == name)?))
    });
    found.ok_or_else(|| {
        let known = PROPERTIES.join(", ");
        Error::invalid(
            field,
            format!("{rest:?} is not the number of a thread with a property; known are {known}"),
        )
    })
}

fn parse_property(field: &str, name: &str, text: &str) -> Result<u32> {
    let least = u32::from(name == "thread_pool_max");
    // QEMU makes those of a pool at once, and nothing else bounds how many threads of the host a machine has.
    let most = if name.starts_with("thread_pool") { MAX_POOL } else { i32::MAX.cast_unsigned() };
    text.parse().ok().filter(|n| (least..=most).contains(n)).ok_or_else(|| {
        Error::invalid(field, format!("{text:?} is not a whole number from {least} to {most}"))
    })
}

/// The threads that serve disks out of an expanded configuration, by number.
///
/// # Errors
/// Invalid, naming the key: also a property of a thread that is not there.
pub fn iothreads(config: &Config) -> Result<Vec<IoThread>> {
    let ids = match set(config, IOTHREADS) {
        Some(text) => parse_iothreads(&format!("config.{IOTHREADS}"), text)?,
        None => vec![],
    };
    let mut all: BTreeMap<u32, IoThread> = ids.into_iter().map(|id| (id, IoThread::new(id))).collect();
    for (key, value) in config.iter().filter(|(_, v)| !v.is_empty()) {
        let Some(rest) = key.strip_prefix(IOTHREADS).and_then(|r| r.strip_prefix('.')) else { continue };
        let field = format!("config.{key}");
        let (id, name) = property_of(&field, rest)?;
        let Some(thread) = all.get_mut(&id) else {
            return Err(Error::invalid(field, format!("there is no thread {id} in {IOTHREADS}")));
        };
        if let Some(property) = thread.property_mut(name) {
            *property = Some(parse_property(&field, name, value)?);
        }
    }
    for thread in all.values() {
        let of = |name| match thread.property(name) {
            (Some(n), _) | (None, n) => n,
        };
        let (least, most) = (of("thread_pool_min"), of("thread_pool_max"));
        if least > most {
            let field = format!("config.{IOTHREADS}.{}.thread_pool_min", thread.id);
            return Err(Error::invalid(
                field,
                format!("{least} is more than thread_pool_max, which is {most}"),
            ));
        }
    }
    Ok(all.into_values().collect())
}

/// Which thread serves the disks on virtio-scsi, out of an expanded configuration; `None`: the main one.
///
/// # Errors
/// Invalid, naming the key, for one that is not there.
pub fn scsi_iothread(config: &Config, threads: &[IoThread]) -> Result<Option<u32>> {
    let Some(id) = set(config, SCSI_IOTHREAD).and_then(|v| v.parse().ok()) else { return Ok(None) };
    demand(&format!("config.{SCSI_IOTHREAD}"), threads, id)?;
    Ok(Some(id))
}

/// Is it there?
///
/// # Errors
/// Invalid, naming `field`.
pub fn demand(field: &str, threads: &[IoThread], id: u32) -> Result<()> {
    match threads.iter().any(|t| t.id == id) {
        true => Ok(()),
        false => {
            Err(Error::invalid(field, format!("there is no thread {id} in {IOTHREADS}; add it there first")))
        }
    }
}

/// Checks keys whose form the table does not say.
pub(crate) fn check(name: &str, field: &str, value: &str) -> Result<()> {
    if name == IOTHREADS {
        return parse_iothreads(field, value).map(drop);
    }
    if let Some(rest) = name.strip_prefix(IOTHREADS).and_then(|r| r.strip_prefix('.')) {
        let (_, property) = property_of(field, rest)?;
        return parse_property(field, property, value).map(drop);
    }
    match name.strip_prefix(PIN) {
        Some(thread) => Thread::parse(field, thread).and_then(|_| parse_pin(field, value)).map(drop),
        None => Ok(()),
    }
}

/// Refuses a limit of a machine with its QEMU that would end the machine, which has so much memory.
///
/// # Errors
/// Invalid, naming the key.
pub fn demand_hard(hard: ByteSize, memory: ByteSize) -> Result<()> {
    let least = ByteSize(memory.bytes().saturating_add(BESIDE.bytes()));
    if hard >= least {
        return Ok(());
    }
    let why = format!(
        "{hard} would be the end of the machine, which has {memory}, and QEMU needs memory beside; give at least {least}"
    );
    Err(Error::invalid("config.limits.memory.hard", why))
}

/// What the host gives a machine of memory at most, and what it has when the host is short of it.
///
/// # Errors
/// Invalid, naming the key, for a limit that would end the machine. How much a share of the host's memory is its host knows.
pub fn memory_limits(
    config: &Config,
    memory: Option<MemoryLimit>,
) -> Result<(Option<ByteSize>, Option<ByteSize>)> {
    let size = |key: &str| set(config, key).map(|v| ByteSize::parse(&format!("config.{key}"), v)).transpose();
    let (hard, soft) = (size("limits.memory.hard")?, size("limits.memory.soft")?);
    let memory = memory.unwrap_or(MemoryLimit::Size { size: ByteSize::gib(1) });
    if let (Some(hard), MemoryLimit::Size { size }) = (hard, memory) {
        demand_hard(hard, maximum::memory(config)?.map_or(size, |most| most.max(size)))?;
    }
    if let (Some(hard), Some(soft)) = (hard, soft)
        && soft > hard
    {
        return Err(Error::invalid(
            "config.limits.memory.soft",
            format!("{soft} is more than the hard limit, {hard}"),
        ));
    }
    Ok((hard, soft))
}

/// Texts of rows.
pub(crate) mod text {
    pub(crate) const IOTHREADS: &str = "Threads that serve disks beside the main one: how many, or their numbers such as 1-2,4. \
        A disk names its own by io.thread.";
    pub(crate) const PROPERTIES: &str = "A property of such a thread by its number: hardware.iothreads.1.poll_max_ns, poll_grow, \
        poll_shrink, thread_pool_min, thread_pool_max.";
    pub(crate) const SCSI: &str = "The thread of hardware.iothreads that serves the disks on virtio-scsi.";
    pub(crate) const PIN: &str = "CPUs of the host, such as 1 or 0-1,3, that a thread runs on: limits.cpu.pin.0 of the first \
        virtual CPU, emulator, iothread1, and default of those that are not named. Within limits.cpu where that is a set.";
    pub(crate) const SHARES: &str = "Part of the CPUs when they are contended, beside the 1024 of others.";
    pub(crate) const HARD: &str = "Most memory that the host gives the machine and QEMU together; at least 256MiB more than \
        limits.memory.";
    pub(crate) const SOFT: &str = "What of it the machine keeps when the host is short of memory.";
    pub(crate) const NODES: &str = "NUMA nodes of the host that its memory is on, such as 0 or 0-1.";
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(pairs: &[(&str, &str)]) -> Config {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    #[test]
    fn threads_are_a_number_or_named() {
        assert_eq!(parse_iothreads("x", "2").unwrap(), [1, 2]);
        assert_eq!(parse_iothreads("x", "1-2,7").unwrap(), [1, 2, 7]);
        assert_eq!(parse_iothreads("x", "0").unwrap(), Vec::<u32>::new());
        for bad in ["0-1", "x", "65", "1-65", "65536-65536", "-1", ""] {
            assert!(parse_iothreads("x", bad).is_err(), "{bad}");
        }
        for ids in [&[][..], &[1], &[1, 2], &[4], &[2, 3]] {
            let text = iothreads_text(ids).unwrap_or_else(|| "0".into());
            assert_eq!(parse_iothreads("x", &text).unwrap(), ids, "{text}");
        }
    }

    #[test]
    fn properties_belong_to_threads_that_are_there() {
        let all = iothreads(&config(&[
            ("hardware.iothreads", "2"),
            ("hardware.iothreads.2.poll_max_ns", "0"),
            ("hardware.iothreads.2.thread_pool_max", "8"),
        ]));
        let wanted = IoThread { poll_max_ns: Some(0), thread_pool_max: Some(8), ..IoThread::new(2) };
        assert_eq!(all.unwrap(), [IoThread::new(1), wanted]);
        assert_eq!(
            (wanted.property("thread_pool_max"), wanted.property("poll_grow")),
            ((Some(8), 64), (None, 0))
        );
        for (key, value) in [
            ("hardware.iothreads.3.poll_grow", "1"),
            ("hardware.iothreads.1.poll", "1"),
            ("hardware.iothreads.01.poll_grow", "1"),
            ("hardware.iothreads.1.poll_grow", "-1"),
            ("hardware.iothreads.1.thread_pool_max", "0"),
            ("hardware.iothreads.1.thread_pool_min", "65"),
        ] {
            let e = iothreads(&config(&[("hardware.iothreads", "2"), (key, value)])).unwrap_err();
            assert_eq!(e.field.unwrap(), format!("config.{key}"), "{value}");
        }
        let threads = [IoThread::new(1)];
        assert_eq!(scsi_iothread(&config(&[(SCSI_IOTHREAD, "1")]), &threads).unwrap(), Some(1));
        assert!(scsi_iothread(&config(&[(SCSI_IOTHREAD, "2")]), &threads).is_err());
    }

    #[test]
    fn pins_are_of_threads_and_within_the_set() {
        let some = config(&[
            ("limits.cpu.pin.0", "1"),
            ("limits.cpu.pin.emulator", "0-1"),
            ("limits.cpu.pin.iothread2", "3"),
            ("limits.cpu.pin.default", "2-3"),
        ]);
        let all = pins(&some, None).unwrap();
        assert_eq!(pinned(&all, Thread::Vcpu(0)), Some(&[1][..]));
        assert_eq!(pinned(&all, Thread::Vcpu(1)), Some(&[2, 3][..]));
        assert_eq!(pinned(&all, Thread::Io(2)), Some(&[3][..]));
        assert_eq!(pinned(&all, Thread::Emulator), Some(&[0, 1][..]));
        assert_eq!(pinned(&[], Thread::Emulator), None);
        let e = pins(&some, Some(&CpuLimit::Set { cpus: vec![0, 1, 2] })).unwrap_err();
        assert_eq!(e.field.as_deref(), Some("config.limits.cpu.pin.default"));
        for (thread, cpus) in [("00", "1"), ("iothread0", "1"), ("x", "1"), ("0", "all"), ("0", "4096")] {
            let field = format!("{PIN}{thread}");
            assert!(check(&field, &field, cpus).is_err(), "{thread} {cpus}");
        }
        assert_eq!(Thread::Io(3).key(), "limits.cpu.pin.iothread3");
    }

    #[test]
    fn a_limit_of_memory_is_no_end_of_the_machine() {
        let size = MemoryLimit::Size { size: ByteSize::mib(512) };
        let of = |hard: &str, soft: &str| {
            memory_limits(&config(&[("limits.memory.hard", hard), ("limits.memory.soft", soft)]), Some(size))
        };
        assert_eq!(of("768MiB", "512MiB").unwrap(), (Some(ByteSize::mib(768)), Some(ByteSize::mib(512))));
        assert_eq!(of("767MiB", "").unwrap_err().field.as_deref(), Some("config.limits.memory.hard"));
        assert_eq!(of("1GiB", "2GiB").unwrap_err().field.as_deref(), Some("config.limits.memory.soft"));
        assert_eq!(of("", "1MiB").unwrap(), (None, Some(ByteSize::mib(1))));
    }
}
