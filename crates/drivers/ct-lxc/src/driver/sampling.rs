//! Figures of a running container. They are asked for every few seconds of every guest, so what does not change while its
//! init lives (who it is, where its groups lie, the way into its network) is kept: a sample reads files of its control
//! groups and asks its network namespace, and wakes no other process.

use super::{Shared, lock};
use crate::{proc::Init, record::Nic};
use karst_guest::{Interface, Metrics};
use karst_host::{cgroup::Cgroups, netns::NetnsProbe};
use karst_model::{InstanceId, Result};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, OnceLock},
};

/// What samples of one life of a guest are made with.
#[derive(Debug)]
pub(super) struct Sampled {
    init: Init,
    group: String,
    nics: Vec<Nic>,
    /// One question at a time.
    probe: Mutex<NetnsProbe>,
}

impl Sampled {
    fn sample(&self, cgroups: &Cgroups) -> Result<Metrics> {
        let s = cgroups.stats(&self.group);
        Ok(Metrics {
            cpu_ns: s.cpu_ns,
            memory: s.memory,
            memory_peak: s.memory_peak,
            swap: s.swap,
            memory_total: s.memory_limit.or_else(host_memory),
            processes: s.processes,
            disk_read: s.disk_read,
            disk_written: s.disk_written,
            interfaces: self.interfaces()?,
            ..Metrics::default()
        })
    }

    fn interfaces(&self) -> Result<BTreeMap<String, Interface>> {
        let links = lock(&self.probe).links()?.into_iter().map(|link| {
            let host = self.nics.iter().find(|n| n.mac.eq_ignore_ascii_case(&link.mac));
            let interface = Interface {
                mac: link.mac,
                host_name: host.map(|n| n.host_interface.clone()).unwrap_or_default(),
                mtu: link.mtu,
                up: link.up,
                loopback: link.loopback,
                addresses: link.addresses,
                counters: link.counters,
            };
            (link.name, interface)
        });
        Ok(links.collect())
    }
}

impl Shared {
    /// A sample of a guest that runs.
    pub(super) async fn sample(&self, instance: InstanceId) -> Result<Metrics> {
        let guest = self.guest(instance);
        let kept = lock(&guest.sampled).clone().filter(|s| s.init.lives());
        if let Some(kept) = kept {
            return kept.sample(&self.cgroups);
        }
        let running = self.running(instance).await?;
        let Some(init) = running.init() else {
            // Between two lives: no network, and what the groups say is still the guest's.
            let s = self.cgroups.stats(&running.groups.limits);
            return Ok(Metrics {
                cpu_ns: s.cpu_ns,
                memory: s.memory,
                memory_peak: s.memory_peak,
                swap: s.swap,
                memory_total: s.memory_limit.or_else(host_memory),
                processes: s.processes,
                disk_read: s.disk_read,
                disk_written: s.disk_written,
                ..Metrics::default()
            });
        };
        let sampled = Arc::new(Sampled {
            probe: NetnsProbe::open(&init.pidfd)?.into(),
            init,
            group: running.groups.limits.clone(),
            nics: running.record.nics.clone(),
        });
        *lock(&guest.sampled) = Some(sampled.clone());
        sampled.sample(&self.cgroups)
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
