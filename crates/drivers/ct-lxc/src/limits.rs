//! The model's limits as a control group's.

use karst_guest::{ResolvedDisk, ResolvedGuest};
use karst_host::{
    cgroup::{CgroupLimits, IoLimit, parse_cpus},
    mountns as mount, numa,
};
use karst_model::{
    InstanceId, Result,
    device::{DiskLimits, DiskRate},
    spec::{CpuAllowance, CpuLimit, Limits, SwapLimit},
};
use std::collections::BTreeMap;

/// Which CPUs of this host a container may have.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Place {
    /// How many, or which.
    pub(crate) limit: Option<CpuLimit>,
    /// Out of these; all when absent.
    pub(crate) within: Option<Vec<u32>>,
}

impl Place {
    /// # Errors
    /// Invalid for a NUMA node that this host does not have.
    pub(crate) fn of(limits: &Limits) -> Result<Self> {
        let within = limits.cpu_nodes.as_deref().map(numa::cpus_of).transpose()?;
        let limit = match (&limits.cpu, &within) {
            (None, Some(cpus)) => Some(CpuLimit::Set { cpus: cpus.clone() }),
            (limit, _) => limit.clone(),
        };
        Ok(Self { limit, within })
    }
}

/// The model's limits as a control group's.
///
/// Rates of disks are the block devices': those of several disks on one device add up.
pub(crate) fn limits(guest: &ResolvedGuest, place: &Place) -> CgroupLimits {
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    let disks = std::iter::once(&guest.root).chain(&guest.disks);
    let rates = disks.filter(|d| d.io.limits != DiskLimits::default());
    CgroupLimits {
        io: rates_of(rates.filter_map(|d| Some((device(d)?, d.io.limits)))),
        ..control_limits(guest.instance, &guest.limits, place, &parse_cpus(&online))
    }
}

fn device(disk: &ResolvedDisk) -> Option<String> {
    let device = mount::block_device(&disk.path);
    if device.is_none() {
        tracing::warn!(
            disk = disk.name,
            "its file system lies on no block device, so its rates are not limited"
        );
    }
    device
}

fn rates_of(disks: impl Iterator<Item = (String, DiskLimits)>) -> Vec<IoLimit> {
    let mut devices: BTreeMap<String, IoLimit> = BTreeMap::new();
    for (device, limits) in disks {
        let entry = devices.entry(device.clone()).or_insert_with(|| IoLimit { device, ..IoLimit::default() });
        let add = |sum: &mut Option<u64>, n: u64| *sum = Some(sum.unwrap_or(0).saturating_add(n));
        match limits.read {
            Some(DiskRate::Bytes { per_second }) => add(&mut entry.read_bytes, per_second),
            Some(DiskRate::Operations { per_second }) => add(&mut entry.read_operations, per_second),
            None => {}
        }
        match limits.write {
            Some(DiskRate::Bytes { per_second }) => add(&mut entry.write_bytes, per_second),
            Some(DiskRate::Operations { per_second }) => add(&mut entry.write_operations, per_second),
            None => {}
        }
    }
    devices.into_values().collect()
}

fn control_limits(instance: InstanceId, limits: &Limits, place: &Place, online: &[u32]) -> CgroupLimits {
    let all = place.within.as_deref().unwrap_or(online);
    let cpus = match &place.limit {
        // So many CPUs: a set of that size, so that programs inside count right. Where it begins is spread over the
        // host by the instance's id, which is random.
        Some(CpuLimit::Count { n }) if (*n as usize) < all.len() => {
            let start = (instance.uuid().as_u128() % all.len() as u128) as usize;
            let mut set: Vec<u32> = all.iter().cycle().skip(start).take(*n as usize).copied().collect();
            set.sort_unstable();
            Some(set)
        }
        Some(CpuLimit::Set { cpus }) => Some(cpus.clone()),
        _ => place.within.clone(),
    };
    CgroupLimits {
        memory: limits.memory.map(|m| m.bytes()),
        processes: limits.processes,
        cpus,
        cpu_quota: match limits.cpu_allowance {
            Some(CpuAllowance::Quota { quota_us, period_us }) => Some((quota_us, period_us)),
            _ => None,
        },
        cpu_share: match limits.cpu_allowance {
            Some(CpuAllowance::Share { percent }) => Some(percent),
            _ => None,
        },
        cpu_priority: limits.cpu_priority,
        io: vec![],
        memory_soft: limits.memory_soft,
        swap: match limits.swap {
            None | Some(SwapLimit::Allowed) => None,
            Some(SwapLimit::Forbidden) => Some(0),
            Some(SwapLimit::Bytes { bytes }) => Some(bytes),
        },
        // 60 is the kernel's own.
        swappiness: limits.swap_priority.map(|p| 60 - p.min(10) * 6),
        io_weight: limits.disk_priority.map(|p| (p.min(10) * 100).max(10)),
        hugepages: limits.hugepages.iter().map(|(size, n)| (size.clone(), n.bytes())).collect(),
        // Of machines.
        ..CgroupLimits::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_of_one_device_add_up() {
        let rate = |per_second| Some(DiskRate::Bytes { per_second });
        let disks = [
            ("8:0", DiskLimits { read: rate(5), write: None }),
            ("8:0", DiskLimits { read: rate(7), write: Some(DiskRate::Operations { per_second: 3 }) }),
            ("8:16", DiskLimits { read: None, write: rate(1) }),
        ];
        let all = rates_of(disks.into_iter().map(|(d, l)| (d.to_owned(), l)));
        assert_eq!(
            (all[0].read_bytes, all[0].write_operations, all[0].write_bytes),
            (Some(12), Some(3), None)
        );
        assert_eq!((all[1].device.as_str(), all[1].write_bytes), ("8:16", Some(1)));
    }

    #[test]
    fn a_count_of_cpus_is_a_set_of_that_size() {
        let id = "00000000-0000-4000-8000-000000000003".parse().unwrap();
        let count = |n| {
            let place = Place { limit: Some(CpuLimit::Count { n }), within: None };
            control_limits(id, &Limits::default(), &place, &[0, 1, 2, 3]).cpus
        };
        let within = |n| {
            let place = Place { limit: Some(CpuLimit::Count { n }), within: Some(vec![1, 3]) };
            control_limits(id, &Limits::default(), &place, &[0, 1, 2, 3]).cpus
        };
        assert_eq!((within(1), within(4)), (Some(vec![3]), Some(vec![1, 3])));
        let node = Place::of(&Limits { cpu_nodes: Some(vec![1023]), ..Limits::default() });
        assert_eq!(node.unwrap_err().field.as_deref(), Some("config.limits.cpu.nodes"));
        assert_eq!(count(2), Some(vec![0, 3]));
        assert_eq!(count(4), None);
        assert_eq!(count(9), None, "more than there are is no limit");
    }
}
