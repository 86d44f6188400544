//! Threads of simulated machines: which serve disks, and what changes of them and of what a machine is given while it runs.

use super::state::Guest;
use karst_model::{
    ByteSize, Error, Result, maximum,
    spec::{DiskSpec, GuestSpec, Limits},
    threads::{IOTHREADS, IoThread, SCSI_IOTHREAD},
};
use std::collections::BTreeSet;

/// Takes of a new specification what a running machine takes at once; answers what waits for its next start. Its disks are still
/// those from before; the `drives` that it gets keep the threads that they have.
pub(super) fn update(guest: &mut Guest, new: &GuestSpec, drives: &mut [DiskSpec]) -> Vec<String> {
    let mut pending = vec![];
    let before = std::iter::once((&guest.spec.root.slot, guest.spec.root.io.thread))
        .chain(guest.spec.disks.iter().map(|d| (&d.slot, d.io.thread)));
    let before: Vec<(String, Option<u32>)> = before.map(|(slot, thread)| (slot.clone(), thread)).collect();
    let after = std::iter::once((&new.root.name, &new.root.slot, new.root.io.thread))
        .chain(new.disks.iter().map(|d| (&d.name, &d.slot, d.io.thread)));
    let mut used = BTreeSet::new();
    for (name, slot, thread) in after {
        match before.iter().find(|(s, _)| s == slot) {
            Some((_, had)) if *had != thread => {
                used.extend(*had);
                pending.push(format!("devices.{name}"));
            }
            _ => used.extend(thread),
        }
    }
    for drive in drives {
        if let Some((_, had)) = before.iter().find(|(slot, _)| *slot == drive.slot) {
            drive.io.thread = *had;
        }
    }
    let Limits { cpu, memory, memory_share, cpu_maximum, memory_maximum, .. } = guest.spec.limits.clone();
    let set_aside = Limits { cpu, memory, memory_share, cpu_maximum, memory_maximum, ..new.limits.clone() };
    guest.spec.limits = set_aside;
    let (Some(machine), Some(wanted)) = (&mut guest.spec.machine, &new.machine) else { return pending };
    used.extend(machine.scsi_iothread);
    if machine.scsi_iothread != wanted.scsi_iothread {
        pending.push(SCSI_IOTHREAD.to_owned());
    }
    let is_wanted = |thread: &IoThread| wanted.iothreads.iter().any(|w| w.id == thread.id);
    let (kept, _): (Vec<IoThread>, Vec<IoThread>) =
        machine.iothreads.iter().filter(|t| !is_wanted(t)).partition(|t| used.contains(&t.id));
    if !kept.is_empty() {
        pending.push(IOTHREADS.to_owned());
    }
    machine.iothreads = wanted.iothreads.iter().copied().chain(kept).collect();
    machine.iothreads.sort_by_key(|t| t.id);
    pending
}

/// Gives a machine processors and memory within what its start has set aside, where a key says how much that is; answers the keys
/// that wait for the next start. Each of its guests follows at once.
pub(super) fn resize(now: &mut GuestSpec, wanted: &GuestSpec) -> Vec<String> {
    let (has, new) = (&mut now.limits, &wanted.limits);
    let mut pending = vec![];
    let memory = |limits: &Limits| limits.memory.unwrap_or(ByteSize::gib(1));
    let set_aside = has.memory_maximum.unwrap_or(memory(has));
    if new.memory_maximum == Some(set_aside) && memory(new) <= set_aside {
        (has.memory, has.memory_share, has.memory_maximum) = (new.memory, new.memory_share, Some(set_aside));
    } else if new.memory != has.memory {
        pending.push("limits.memory".to_owned());
    }
    if new.memory_maximum.is_some_and(|most| most != set_aside) {
        pending.push(maximum::MEMORY.to_owned());
    }
    let count = |limits: &Limits| maximum::count(limits.cpu.as_ref());
    let places = has.cpu_maximum.unwrap_or(count(has));
    if new.cpu_maximum.is_some_and(|most| most <= places) && count(new) <= places {
        (has.cpu, has.cpu_maximum) = (new.cpu.clone(), Some(places));
    } else if new.cpu != has.cpu {
        pending.push("limits.cpu".to_owned());
    }
    if new.cpu_maximum.is_some_and(|most| most > places) {
        pending.push(maximum::CPUS.to_owned());
    }
    pending
}

/// A host of one NUMA node has so many CPUs.
pub(super) fn demand(spec: &GuestSpec, cpus: u32) -> Result<()> {
    for pin in &spec.limits.pins {
        if let Some(other) = pin.cpus.iter().find(|cpu| **cpu >= cpus) {
            let text = format!("names CPU {other}, which this host does not have; there are 0-{}", cpus - 1);
            return Err(Error::invalid(format!("config.{}", pin.thread.key()), text));
        }
    }
    match spec.limits.memory_nodes.iter().flatten().find(|node| **node > 0) {
        Some(node) => {
            let text = format!("names node {node}, which has no memory here; those that have: 0");
            Err(Error::invalid("config.limits.memory.nodes", text))
        }
        None => Ok(()),
    }
}

/// What is told of those that serve disks.
pub(super) fn figures(spec: &GuestSpec) -> Vec<IoThread> {
    let told = |thread: &IoThread| {
        let of = |name: &str| match thread.property(name) {
            (Some(n), _) | (None, n) => Some(n),
        };
        IoThread {
            poll_max_ns: of("poll_max_ns"),
            poll_grow: of("poll_grow"),
            poll_shrink: of("poll_shrink"),
            ..IoThread::new(thread.id)
        }
    };
    spec.machine.iter().flat_map(|m| &m.iothreads).map(told).collect()
}
