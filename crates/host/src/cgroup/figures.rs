//! What a control group used, out of the files of v1 or v2.

use super::{Cgroups, field, moved, number, read};

/// Figures of a group and all below; a missing one is `None`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CgroupStats {
    /// CPU time used, nanoseconds.
    pub cpu_ns: Option<u64>,
    /// Memory in use without reclaimable file cache, bytes.
    pub memory: Option<u64>,
    /// Highest memory use including cache, bytes.
    pub memory_peak: Option<u64>,
    /// Swap in use, bytes.
    pub swap: Option<u64>,
    /// Memory limit, bytes.
    pub memory_limit: Option<u64>,
    /// Processes and threads.
    pub processes: Option<u64>,
    /// Read from block devices, bytes.
    pub disk_read: Option<u64>,
    /// Written to block devices, bytes; in v1 hierarchies without what went through the page cache.
    pub disk_written: Option<u64>,
}

impl Cgroups {
    /// Figures of `group`.
    pub fn stats(&self, group: &str) -> CgroupStats {
        let mut s = CgroupStats::default();
        let unlimited = |n: &u64| *n < 1 << 60; // v1 shows "none" as a number near 2^63
        if let Some(dir) = self.v1("cpuacct", group) {
            s.cpu_ns = number(&dir.join("cpuacct.usage"));
        } else if let Some(dir) = self.v2(group) {
            s.cpu_ns = read(&dir.join("cpu.stat")).and_then(|t| field(&t, "usage_usec")).map(|us| us * 1000);
        }
        if let Some(dir) = self.v1("memory", group) {
            let stat = read(&dir.join("memory.stat")).unwrap_or_default();
            let cache = field(&stat, "total_inactive_file").unwrap_or(0);
            s.memory = number(&dir.join("memory.usage_in_bytes")).map(|n| n.saturating_sub(cache));
            s.memory_peak = number(&dir.join("memory.max_usage_in_bytes"));
            s.swap = field(&stat, "total_swap");
            s.memory_limit = number(&dir.join("memory.limit_in_bytes")).filter(unlimited);
        } else if let Some(dir) = self.v2(group) {
            let stat = read(&dir.join("memory.stat")).unwrap_or_default();
            let cache = field(&stat, "inactive_file").unwrap_or(0);
            s.memory = number(&dir.join("memory.current")).map(|n| n.saturating_sub(cache));
            s.memory_peak = number(&dir.join("memory.peak"));
            s.swap = number(&dir.join("memory.swap.current"));
            s.memory_limit = number(&dir.join("memory.max"));
        }
        if let Some(dir) = self.v1("pids", group).or_else(|| self.v2(group)) {
            s.processes = number(&dir.join("pids.current"));
        }
        let moved = match (self.v1("blkio", group), self.v2(group)) {
            (Some(dir), _) => {
                let text = read(&dir.join("blkio.throttle.io_service_bytes_recursive"));
                text.map(|t| (moved::v1(&t, "Read"), moved::v1(&t, "Write")))
            }
            (None, Some(dir)) => {
                let text = read(&dir.join("io.stat"));
                text.map(|t| (moved::v2(&t, "rbytes="), moved::v2(&t, "wbytes=")))
            }
            (None, None) => None,
        };
        (s.disk_read, s.disk_written) = moved.unzip();
        s
    }
}
