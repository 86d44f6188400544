//! Figures of a running container. They are asked for every few seconds of every guest, so what does not change while its
//! init lives (who it is, its groups, the way into its network) is kept: a sample reads files of its control
//! groups and of its network namespace that are held open, and wakes no other process.

use super::{Shared, lock, not_running};
use crate::{proc::Init, record::Nic, spaces::Spaces};
use karst_guest::{Details, DiskCounters, Interface, Metrics, ProcessorTimes, keeper};
use karst_host::{
    cgroup::{CgroupDetails, CgroupStats, CountedGroup},
    netns::NetnsProbe,
};
use karst_model::{ErrorKind, InstanceId, Result};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, Instant},
};

/// One that was found not to run is not looked for again before this, unless somebody starts it: there may be many more that
/// are stopped than run.
const STOPPED: Duration = Duration::from_secs(20);

/// What samples of one life of a guest are made with.
#[derive(Debug)]
pub(super) struct Sampled {
    init: Init,
    group: CountedGroup,
    nics: Vec<Nic>,
    /// One question at a time.
    probe: Mutex<NetnsProbe>,
    spaces: Spaces,
}

impl Sampled {
    async fn sample(&self, detailed: bool) -> Result<Metrics> {
        let metrics = counted(&self.group, detailed);
        let mut metrics = Metrics { interfaces: self.interfaces()?, ..metrics };
        if let Some(details) = &mut metrics.details {
            details.filesystems = self.spaces.figures().await;
        }
        Ok(metrics)
    }

    fn interfaces(&self) -> Result<BTreeMap<String, Interface>> {
        let mut probe = lock(&self.probe);
        let links = probe.links()?.iter().map(|link| {
            let host = self.nics.iter().find(|n| n.mac.eq_ignore_ascii_case(&link.mac));
            let interface = Interface {
                mac: link.mac.clone(),
                host_name: host.map(|n| n.host_interface.clone()).unwrap_or_default(),
                mtu: link.mtu,
                up: link.up,
                loopback: link.loopback,
                addresses: link.addresses.clone(),
                counters: link.counters,
                losses: link.losses,
            };
            (link.name.clone(), interface)
        });
        Ok(links.collect())
    }
}

impl Shared {
    /// A sample of a guest that runs.
    pub(super) async fn sample(&self, instance: InstanceId, detailed: bool) -> Result<Metrics> {
        let guest = self.guest(instance);
        let kept = {
            let mut sampled = lock(&guest.sampled);
            // What is held of a life that is over holds its network too.
            sampled.take_if(|s| !s.init.lives());
            sampled.clone()
        };
        if let Some(kept) = kept {
            return kept.sample(detailed).await;
        }
        let unwatched = lock(&guest.watched).is_none();
        if unwatched && lock(&guest.stopped).is_some_and(|found| found.elapsed() < STOPPED) {
            return Err(not_running());
        }
        let running = match self.running(instance).await {
            Err(e) if e.is(ErrorKind::NotFound) && !keeper::is_alive(&self.dir(instance)) => {
                *lock(&guest.stopped) = Some(Instant::now());
                return Err(e);
            }
            other => other?,
        };
        let group = self.cgroups.counted(&running.groups.limits);
        let Some(init) = running.init() else {
            // Between two lives: no network, and what the groups say is still the guest's.
            return Ok(counted(&group, detailed));
        };
        let sampled = Arc::new(Sampled {
            probe: NetnsProbe::open(&init.pidfd)?.into(),
            init,
            group,
            nics: running.record.nics.clone(),
            spaces: Spaces::of(&running.record),
        });
        *lock(&guest.sampled) = Some(sampled.clone());
        sampled.sample(detailed).await
    }
}

/// What the groups of a guest count.
fn counted(group: &CountedGroup, detailed: bool) -> Metrics {
    let (s, details) = match detailed {
        true => {
            let (stats, details) = group.detailed();
            let details = details_of(&stats, details);
            (stats, Some(Box::new(details)))
        }
        false => (group.stats(), None),
    };
    Metrics {
        cpu_ns: s.cpu_ns,
        memory: s.memory,
        memory_peak: s.memory_peak,
        swap: s.swap,
        memory_total: s.memory_limit.or_else(host_memory),
        processes: s.processes,
        disk_read: s.disk_read,
        disk_written: s.disk_written,
        details,
        ..Metrics::default()
    }
}

fn details_of(stats: &CgroupStats, counted: CgroupDetails) -> Details {
    let mut memory: BTreeMap<String, u64> =
        counted.memory.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect();
    // What is free of the limit: file cache is used memory here, and available all the same.
    if let Some((total, used)) = stats.memory_limit.or_else(host_memory).zip(stats.memory) {
        let reclaimable = memory.get("Inactive_file").copied().unwrap_or(0);
        let cached = memory.get("Cached").copied().unwrap_or(0);
        let free = total.saturating_sub(used + reclaimable);
        memory.insert("MemFree".to_owned(), free);
        memory.insert("MemAvailable".to_owned(), (free + cached).min(total));
    }
    let processor = |(number, user, system): (u32, u64, u64)| ProcessorTimes {
        number,
        modes: [("system".to_owned(), system), ("user".to_owned(), user)].into(),
    };
    let disk = |(name, [read_bytes, reads, written_bytes, writes]): (String, [u64; 4])| {
        (name, DiskCounters { read_bytes, reads: Some(reads), written_bytes, writes: Some(writes) })
    };
    Details {
        processors: counted.processors.into_iter().map(processor).collect(),
        memory,
        oom_kills: counted.oom_kills,
        disks: counted.disks.into_iter().map(disk).collect(),
        ..Details::default()
    }
}

/// The host's memory, bytes: what a guest without a limit can have.
fn host_memory() -> Option<u64> {
    static MEMORY: OnceLock<Option<u64>> = OnceLock::new();
    *MEMORY.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/meminfo").ok()?;
        let kib: u64 = text
            .lines()
            .find_map(|l| l.strip_prefix("MemTotal:")?.trim().trim_end_matches(" kB").parse().ok())?;
        Some(kib * 1024)
    })
}
