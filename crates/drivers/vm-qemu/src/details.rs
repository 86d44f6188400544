//! What monitoring reads of a running machine: what Karst's agent inside tells, else what QEMU and the host count.

use crate::{figures, line::printable, machine::Machine};
use karst_guest::{Details, DiskCounters, FilesystemFigures, ProcessorTimes};
use karst_guest_agent::message::{Figures, MEMORY_PARTS, MODES};
use std::collections::BTreeMap;

/// At most this many of each kind are taken from a guest.
const MOST: usize = 64;

/// Of what the agent tells, which is text and numbers of the guest.
pub(crate) fn of_guest(figures: Figures) -> Details {
    // An agent of an older version tells the first of them only.
    let first = ["MemTotal", "MemAvailable", "MemFree", "Cached"];
    let known =
        first.into_iter().zip(&figures.memory).chain(MEMORY_PARTS.iter().copied().zip(&figures.memory_parts));
    let memory = known.map(|(name, bytes)| (name.to_owned(), *bytes)).collect();
    let modes = |times: &[u64]| -> BTreeMap<String, u64> {
        MODES.iter().zip(times).map(|(mode, ns)| ((*mode).to_owned(), *ns)).collect()
    };
    // Each once: what is told twice would be one series with two values.
    let processor = |number, times: &[u64]| (number, ProcessorTimes { number, modes: modes(times) });
    let processors: BTreeMap<u32, ProcessorTimes> = match figures.processors.is_empty() {
        true => [processor(0, &figures.cpu)].into(),
        false => figures.processors.iter().take(MOST).map(|p| processor(p.number, &p.times)).collect(),
    };
    let disk = |d: &karst_guest_agent::message::Disk| {
        let [reads, read_bytes, writes, written_bytes] = d.counters.first_chunk::<4>().copied()?;
        let counters = DiskCounters { read_bytes, reads: Some(reads), written_bytes, writes: Some(writes) };
        Some((printable(&d.name, 64), counters))
    };
    let filesystem = |f: &karst_guest_agent::message::Filesystem| {
        let [size, free, available] = f.bytes.first_chunk::<3>().copied()?;
        let found = FilesystemFigures {
            device: printable(&f.device, 128),
            kind: printable(&f.kind, 64),
            mount_point: printable(&f.mount, 128),
            size,
            free,
            available,
        };
        Some(((found.device.clone(), found.kind.clone(), found.mount_point.clone()), found))
    };
    // Of those that are mounted twice at a place the last one covers the others.
    let filesystems: BTreeMap<_, _> = figures.filesystems.iter().take(MOST).filter_map(filesystem).collect();
    Details {
        processors: processors.into_values().collect(),
        memory,
        oom_kills: figures.oom_kills,
        disks: figures.disks.iter().take(MOST).filter_map(disk).collect(),
        filesystems: filesystems.into_values().collect(),
        nics: BTreeMap::new(),
    }
}

/// Of a machine without Karst's agent.
pub(crate) async fn of_host(machine: &Machine, total: u64, resident: Option<u64>) -> Details {
    let mut details = Details::default();
    if let Some(resident) = resident {
        let free = total.saturating_sub(resident);
        details.memory = [("MemAvailable".to_owned(), free), ("MemFree".to_owned(), free)].into();
    }
    let figures = match figures::of(machine).await {
        Ok(figures) => figures,
        Err(e) => {
            // It is about to end, or QEMU is busy: what is known is told.
            tracing::debug!(error = %e, "a machine does not tell what it has done");
            return details;
        }
    };
    // All the time of a thread is the guest's, or is spent for it.
    let processor = |v: &karst_model::guest::VcpuFigures| ProcessorTimes {
        number: v.index,
        modes: [("user".to_owned(), v.time_ns)].into(),
    };
    details.processors = figures.vcpus.iter().map(processor).collect();
    let disk = |(slot, d): (String, karst_model::guest::DiskFigures)| {
        let counters = DiskCounters {
            read_bytes: d.read_bytes,
            reads: Some(d.read_requests),
            written_bytes: d.write_bytes,
            writes: Some(d.write_requests),
        };
        (slot, counters)
    };
    details.disks = figures.disks.into_iter().map(disk).collect();
    let names: BTreeMap<String, String> =
        machine.record().nics.iter().map(|n| (n.host_interface.clone(), n.name.clone())).collect();
    details.nics = figures
        .nics
        .into_iter()
        .map(|(host, nic)| (names.get(&host).cloned().unwrap_or(host), nic))
        .collect();
    details
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_guest_agent::message::{Disk, Filesystem, Processor};

    #[test]
    fn what_a_guest_tells_is_bounded_and_may_be_short() {
        // Of an older agent, and one that cuts its lists.
        let old = Figures { memory: vec![10, 5, 4], cpu: vec![1; 3], ..Figures::default() };
        let d = of_guest(old);
        assert_eq!((d.memory["MemFree"], d.memory.get("Cached"), d.oom_kills), (4, None, None));
        assert_eq!(d.processors[0].modes.len(), 3);
        let disk = |n: usize| Disk { name: format!("vd\n{n}"), counters: vec![1, 2, 3, 4] };
        let new = Figures {
            memory: vec![10, 5, 4, 3],
            memory_parts: vec![7; 2],
            processors: (0..1000).map(|number| Processor { number, times: vec![9; 100] }).collect(),
            disks: (0..1000).map(disk).chain([Disk::default()]).collect(),
            filesystems: vec![Filesystem { mount: "/".into(), bytes: vec![3, 2], ..Filesystem::default() }],
            oom_kills: Some(1),
            ..Figures::default()
        };
        let d = of_guest(new);
        assert_eq!((d.processors.len(), d.processors[0].modes.len()), (MOST, MODES.len()));
        assert_eq!((d.disks.len(), d.filesystems.len(), d.oom_kills), (MOST, 0, Some(1)));
        assert_eq!(
            d.disks["vd 0"],
            DiskCounters { read_bytes: 2, reads: Some(1), written_bytes: 4, writes: Some(3) }
        );
        let twice = Figures {
            processors: vec![Processor { number: 3, times: vec![9] }; 2],
            filesystems: [[3, 2, 1], [9, 8, 7]]
                .map(|bytes| Filesystem { mount: "/".into(), bytes: bytes.into(), ..Filesystem::default() })
                .into(),
            ..Figures::default()
        };
        let twice = of_guest(twice);
        assert_eq!((twice.processors.len(), twice.filesystems.len()), (1, 1));
        assert_eq!(twice.filesystems[0].size, 9);
        assert_eq!(d.memory[MEMORY_PARTS[1]], 7);
        assert_eq!(d.memory.len(), 6);
    }
}
