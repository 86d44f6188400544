//! Threads of QEMU: those that serve disks come and go while the machine runs, and each thread runs where it is pinned.
//!
//! What QEMU really has decides, as with devices. The record names a thread before it is made and until it is gone. One that a
//! disk has stays until the disk goes, or the machine ends: QEMU would not give it away.

use crate::{launch, machine::Inner, qmp::Qmp};
use karst_host::{
    affinity,
    cgroup::{CgroupLimits, Cgroups},
};
use karst_model::{
    Error, Result,
    threads::{IOTHREADS, IoThread, MAX_IOTHREADS, PROPERTIES, Pin, Thread, pinned},
};
use serde_json::{Value, json};
use std::{collections::BTreeMap, time::Duration};
use tokio::time::{Instant, sleep};

const GREETING: Duration = Duration::from_secs(5);
/// Between two tries to take away a thread that a device has just let go of.
const LOOK: Duration = Duration::from_millis(50);

/// QEMU's name of a thread that serves disks.
pub(crate) fn id(number: u32) -> String {
    format!("iothread{number}")
}

/// A thread that serves disks, as QEMU makes it at the start and later.
pub(crate) fn object(thread: &IoThread) -> Value {
    let mut object = json!({"qom-type": "iothread", "id": id(thread.id)});
    for name in PROPERTIES {
        if let (Some(n), _) = thread.property(name) {
            object[name.replace('_', "-")] = n.into();
        }
    }
    object
}

/// Refuses more than a machine can have.
///
/// # Errors
/// Invalid, naming the key.
pub(crate) fn demand_few(threads: &[IoThread]) -> Result<()> {
    match threads.len() > MAX_IOTHREADS || threads.iter().any(|t| t.id == 0) {
        true => {
            let text = format!("a machine has {MAX_IOTHREADS} such threads at most, numbered from 1");
            Err(Error::invalid(format!("config.{IOTHREADS}"), text))
        }
        false => Ok(()),
    }
}

/// What the record says that the machine has; `None` of a start by an earlier version.
fn written(machine: &Inner) -> Option<Vec<IoThread>> {
    machine.record().hardware.as_ref().map(|h| h.iothreads.clone())
}

fn note(machine: &Inner, change: impl FnOnce(&mut Vec<IoThread>)) -> Result<()> {
    let mut record = machine.record();
    if let Some(hardware) = &mut record.hardware {
        change(&mut hardware.iothreads);
    }
    record.write(&machine.dir)
}

async fn connect(machine: &Inner) -> Result<Qmp> {
    Ok(Qmp::connect(&machine.dir, launch::QMP, GREETING).await?.0)
}

/// The threads that QEMU has, with what it says of them, and their numbers in the kernel.
fn parse(told: &Value) -> Vec<(IoThread, Option<u32>)> {
    let number = |thread: &Value, key: &str| thread.get(key)?.as_u64().and_then(|n| u32::try_from(n).ok());
    let one = |thread: &Value| {
        let id = thread.get("id")?.as_str()?.strip_prefix("iothread")?.parse().ok()?;
        let found = IoThread {
            poll_max_ns: number(thread, "poll-max-ns"),
            poll_grow: number(thread, "poll-grow"),
            poll_shrink: number(thread, "poll-shrink"),
            ..IoThread::new(id)
        };
        Some((found, number(thread, "thread-id")))
    };
    let mut all: Vec<_> = told.as_array().into_iter().flatten().filter_map(one).collect();
    all.sort_by_key(|(thread, _)| thread.id);
    all
}

async fn ask(qmp: &Qmp) -> Result<Vec<(IoThread, Option<u32>)>> {
    Ok(parse(&qmp.execute("query-iothreads", json!({})).await?))
}

/// The threads of a running machine as they are at work.
///
/// # Errors
/// Those of QEMU's monitor.
pub(crate) async fn figures(machine: &Inner, qmp: &Qmp) -> Result<Vec<IoThread>> {
    if written(machine).is_none_or(|threads| threads.is_empty()) {
        return Ok(vec![]);
    }
    Ok(ask(qmp).await?.into_iter().map(|(thread, _)| thread).collect())
}

/// Makes the threads that a running machine lacks, and gives those that stay their properties; disks may have them then.
///
/// # Errors
/// What QEMU refuses.
pub(crate) async fn add(machine: &Inner, wanted: &[IoThread]) -> Result<()> {
    demand_few(wanted)?;
    let Some(now) = written(machine) else { return Ok(()) };
    if wanted.is_empty() {
        return Ok(());
    }
    let qmp = connect(machine).await?;
    let there = ask(&qmp).await?;
    let has = |id: u32| there.iter().any(|(t, _)| t.id == id);
    for thread in wanted.iter().filter(|w| !(now.contains(w) && has(w.id))) {
        if has(thread.id) {
            // Written down when QEMU has all of it: else the next change would find nothing to do.
            set(&qmp, thread).await?;
        }
        note(machine, |all| {
            all.retain(|t| t.id != thread.id);
            all.push(*thread);
            all.sort_by_key(|t| t.id);
        })?;
        if has(thread.id) {
            continue;
        }
        if let Err(e) = qmp.execute("object-add", object(thread)).await {
            note(machine, |all| all.retain(|t| t.id != thread.id))?;
            return Err(e.at(format!("config.{IOTHREADS}")));
        }
    }
    Ok(())
}

/// The properties of a thread that is there, in an order in which no least is above its most.
async fn set(qmp: &Qmp, thread: &IoThread) -> Result<()> {
    let path = format!("/objects/{}", id(thread.id));
    let of = |name: &str| match thread.property(name) {
        (Some(n), _) | (None, n) => (name.replace('_', "-"), n),
    };
    let mut all = vec![("thread-pool-min".to_owned(), 0)];
    all.extend(["poll_max_ns", "poll_grow", "poll_shrink", "thread_pool_max", "thread_pool_min"].map(of));
    for (name, value) in all {
        let property = json!({"path": path, "property": name, "value": value});
        qmp.execute("qom-set", property)
            .await
            .map_err(|e| e.at(format!("config.{IOTHREADS}.{}.{}", thread.id, name.replace('-', "_"))))?;
    }
    Ok(())
}

/// Takes away the threads that a running machine is not to have any more; answers the key when one waits for the next start,
/// because a disk has it.
///
/// # Errors
/// What QEMU refuses.
pub(crate) async fn remove(machine: &Inner, wanted: &[IoThread]) -> Result<Vec<String>> {
    let Some(now) = written(machine) else {
        // Of a start by an earlier version nobody knows what it has.
        return Ok(if wanted.is_empty() { vec![] } else { vec![IOTHREADS.to_owned()] });
    };
    let gone: Vec<u32> = now.iter().map(|t| t.id).filter(|id| wanted.iter().all(|w| w.id != *id)).collect();
    if gone.is_empty() {
        return Ok(vec![]);
    }
    let used = |id: u32| {
        let record = machine.record();
        let mut disks = record.devices.iter().flat_map(|d| &d.disks);
        disks.any(|d| d.io.thread == Some(id))
            || record.hardware.as_ref().is_some_and(|h| h.scsi_iothread == Some(id))
    };
    let qmp = connect(machine).await?;
    let there = ask(&qmp).await?;
    let mut pending = vec![];
    for number in gone {
        if used(number) {
            pending.push(IOTHREADS.to_owned());
            continue;
        }
        if there.iter().any(|(t, _)| t.id == number) {
            delete(&qmp, number).await?;
        }
        note(machine, |all| all.retain(|t| t.id != number))?;
    }
    pending.dedup();
    Ok(pending)
}

async fn delete(qmp: &Qmp, number: u32) -> Result<()> {
    let until = Instant::now() + GREETING;
    // A device that has gone lets go of its thread a little later.
    while let Err(e) = qmp.execute("object-del", json!({"id": id(number)})).await {
        let busy = e.context.as_deref().is_some_and(|c| c.contains("in use"));
        if !busy || Instant::now() >= until {
            return Err(e.at(format!("config.{IOTHREADS}")));
        }
        sleep(LOOK).await;
    }
    Ok(())
}

/// The CPUs that a machine has with these limits, of which pins choose.
pub(crate) fn cpus(limits: &CgroupLimits, cgroups: &Cgroups, group: &str) -> Vec<u32> {
    let above = || group.rsplit_once('/').and_then(|(parent, _)| cgroups.cpus(parent));
    limits.cpus.clone().or_else(above).unwrap_or_else(|| affinity::online().into_iter().collect())
}

/// Do pins name only CPUs that the machine has?
///
/// # Errors
/// Invalid, naming the key.
pub(crate) fn demand(pins: &[Pin], all: &[u32]) -> Result<()> {
    for pin in pins {
        let field = format!("config.{}", pin.thread.key());
        if let Some(other) = pin.cpus.iter().find(|cpu| !all.contains(cpu)) {
            let there = all.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
            let text =
                format!("names CPU {other}, which the machine does not have on this host; there are {there}");
            return Err(Error::invalid(field, text));
        }
        if pin.cpus.is_empty() {
            return Err(Error::invalid(field, "names no CPU"));
        }
    }
    Ok(())
}

/// Puts every thread of QEMU where it is pinned; `all` are the CPUs of those that are not.
///
/// # Errors
/// Those of QEMU's monitor, and invalid for CPUs that have gone.
pub(crate) async fn place(qmp: &Qmp, pid: u32, pins: &[Pin], all: &[u32]) -> Result<()> {
    let cpus = qmp.execute("query-cpus-fast", json!({})).await?;
    let mut named = vcpus(&cpus);
    named.extend(ask(qmp).await?.into_iter().filter_map(|(t, thread)| Some((thread?, Thread::Io(t.id)))));
    // Twice: one that began meanwhile is where the one is that began it.
    for _ in 0..2 {
        for number in affinity::threads(pid) {
            let thread = named.get(&number).copied().unwrap_or(Thread::Emulator);
            affinity::pin(number, pinned(pins, thread).unwrap_or(all))
                .map_err(|e| e.at(format!("config.{}", thread.key())))?;
        }
    }
    Ok(())
}

/// Threads of virtual CPUs by their numbers in the kernel.
fn vcpus(cpus: &Value) -> BTreeMap<u32, Thread> {
    let number = |cpu: &Value, key: &str| cpu.get(key)?.as_u64().and_then(|n| u32::try_from(n).ok());
    let one = |cpu: &Value| Some((number(cpu, "thread-id")?, Thread::Vcpu(number(cpu, "cpu-index")?)));
    cpus.as_array().into_iter().flatten().filter_map(one).collect()
}

/// The same of a running machine whose limits or threads have changed; nothing when it has no pins and had none.
///
/// # Errors
/// Those of [`place`].
pub(crate) async fn place_anew(machine: &Inner, pins: &[Pin], all: &[u32]) -> Result<()> {
    let pid = machine.observed.borrow().pid;
    let Some(pid) = pid.filter(|_| !pins.is_empty() || !machine.record().pins.is_empty()) else {
        return Ok(());
    };
    {
        // Before: one that breaks off is done again, or taken back, by the next change.
        let mut record = machine.record();
        if !pins.is_empty() && record.pins != pins {
            record.pins = pins.to_vec();
            record.write(&machine.dir)?;
        }
    }
    // The kernel remembers what was asked for, and gives no more of it when the group has more: without pins it is all that
    // there can be.
    let everywhere: Vec<u32> = (0..1024).collect();
    let rest = if pins.is_empty() { &everywhere[..] } else { all };
    place(&connect(machine).await?, pid, pins, rest).await?;
    let mut record = machine.record();
    if pins.is_empty() {
        record.pins.clear();
        record.write(&machine.dir)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_said_of_a_thread_is_qemus() {
        assert_eq!(object(&IoThread::new(3)).to_string(), r#"{"qom-type":"iothread","id":"iothread3"}"#);
        let some = IoThread { poll_max_ns: Some(0), thread_pool_max: Some(8), ..IoThread::new(1) };
        let text = r#"{"qom-type":"iothread","id":"iothread1","poll-max-ns":0,"thread-pool-max":8}"#;
        assert_eq!(object(&some).to_string(), text);
        assert!(demand_few(&[IoThread::new(0)]).is_err() && demand_few(&[some]).is_ok());
        let many: Vec<_> = (1..=65).map(IoThread::new).collect();
        assert_eq!(demand_few(&many).unwrap_err().field.as_deref(), Some("config.hardware.iothreads"));
    }

    #[test]
    fn threads_are_told_by_number() {
        let told = json!([
            {"id": "iothread2", "thread-id": 12, "poll-max-ns": 32768, "poll-grow": 0, "poll-shrink": 0, "aio-max-batch": 0},
            {"id": "iothread1", "thread-id": 11, "poll-max-ns": 5, "poll-grow": 1, "poll-shrink": 2},
            {"id": "mon_iothread", "thread-id": 10},
        ]);
        let shown: Vec<_> =
            parse(&told).iter().map(|(t, n)| (t.id, t.poll_max_ns, t.poll_shrink, *n)).collect();
        assert_eq!(shown, [(1, Some(5), Some(2), Some(11)), (2, Some(32768), Some(0), Some(12))]);
        let cpus =
            json!([{"cpu-index": 1, "thread-id": 22}, {"cpu-index": 0, "thread-id": 21}, {"thread-id": 3}]);
        assert_eq!(vcpus(&cpus), BTreeMap::from([(21, Thread::Vcpu(0)), (22, Thread::Vcpu(1))]));
    }

    #[test]
    fn pins_choose_of_what_there_is() {
        let pin = |thread, cpus: &[u32]| Pin { thread, cpus: cpus.to_vec() };
        demand(&[pin(Thread::Vcpu(0), &[1]), pin(Thread::Emulator, &[0, 1])], &[0, 1]).unwrap();
        let e = demand(&[pin(Thread::Io(2), &[1, 4000])], &[0, 1]).unwrap_err();
        assert_eq!(e.field.as_deref(), Some("config.limits.cpu.pin.iothread2"));
        assert!(e.message.contains("CPU 4000") && e.message.ends_with("0,1"), "{e}");
        assert!(demand(&[pin(Thread::Default, &[])], &[0]).is_err());
    }
}
