//! Limits of control groups: one meaning, in the vocabularies of v1 and v2. What a host cannot limit is refused when it is
//! asked for, and before anything is written where that can be known.

use super::{Cgroups, failed, field, read, tree, write};
use karst_model::{Error, Result};
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

/// Sizes of huge pages, as control groups name them.
pub const HUGE_PAGES: &[&str] = &["64KB", "1MB", "2MB", "1GB"];

/// Limits of a group; `None` means without limit.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CgroupLimits {
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// Processes and threads.
    pub processes: Option<u32>,
    /// CPUs it may use.
    pub cpus: Option<Vec<u32>>,
    /// Microseconds of CPU time per period of microseconds.
    pub cpu_quota: Option<(u64, u64)>,
    /// Share when CPUs are contended: 1 to 100, where 100 is the default.
    pub cpu_share: Option<u32>,
    /// Between groups of the same share: 0 to 10, where 10 is the default.
    pub cpu_priority: Option<u32>,
    /// The same as one number, in place of both: 2 to 262,144, where 1024 is the default.
    pub cpu_shares: Option<u32>,
    /// NUMA nodes that its memory is on.
    pub nodes: Option<Vec<u32>>,
    /// Rates of block devices.
    pub io: Vec<IoLimit>,
    /// Memory is limited when the host is short of it only.
    pub memory_soft: bool,
    /// Bytes of memory beside the limit, to which it is brought when the host is short of it.
    pub memory_high: Option<u64>,
    /// Bytes of swap.
    pub swap: Option<u64>,
    /// 0 to 100, the lower the less is swapped out; v1 only.
    pub swappiness: Option<u32>,
    /// Weight when disks are contended: 1 to 1000, where 100 is the default.
    pub io_weight: Option<u32>,
    /// Bytes in huge pages, by their size (one of [`HUGE_PAGES`]).
    pub hugepages: BTreeMap<String, u64>,
}

/// Rates of a block device, each a second; `None` means without limit.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct IoLimit {
    /// `major:minor` of the whole disk.
    pub device: String,
    /// Bytes read.
    pub read_bytes: Option<u64>,
    /// Bytes written.
    pub write_bytes: Option<u64>,
    /// Reads.
    pub read_operations: Option<u64>,
    /// Writes.
    pub write_operations: Option<u64>,
}

/// Parses `0-3,8` into numbers.
pub fn parse_cpus(list: &str) -> Vec<u32> {
    list.trim()
        .split(',')
        .filter_map(|part| {
            let (a, b) = part.split_once('-').unwrap_or((part, part));
            Some(a.trim().parse::<u32>().ok()?..=b.trim().parse().ok()?)
        })
        .flatten()
        .collect()
}

fn cpu_list(cpus: &[u32]) -> String {
    cpus.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

impl Cgroups {
    /// Sets all limits of `group`, and takes away those that are `None`.
    ///
    /// # Errors
    /// Invalid for a CPU that is not there; conflict when memory in use cannot be brought below the limit; unsupported
    /// when a limit is asked for whose controller this host does not have.
    pub fn limit(&self, group: &str, limits: &CgroupLimits) -> Result<()> {
        self.check_cpus(group, limits.cpus.as_deref().unwrap_or_default())?;
        self.check_nodes(group, limits.nodes.as_deref().unwrap_or_default())?;
        self.limit_memory(group, limits)?;
        let processes = limits.processes.map_or("max".to_owned(), |n| n.to_string());
        self.set("pids", group, "pids.max", "pids.max", &processes, &processes, limits.processes.is_some())?;
        let (quota, period) =
            limits.cpu_quota.map_or((-1, 100_000), |(q, p)| (i64::try_from(q).unwrap_or(i64::MAX), p));
        if self.v1("cpu", group).is_some() {
            // A period is refused while the old quota does not fit it: lift the quota first.
            let asked = limits.cpu_quota.is_some();
            self.set("cpu", group, "cpu.cfs_quota_us", "", "-1", "", asked)?;
            let period = period.to_string();
            self.set("cpu", group, "cpu.cfs_period_us", "", &period, "", asked)?;
        }
        let v2 = if quota < 0 { format!("max {period}") } else { format!("{quota} {period}") };
        let asked = limits.cpu_quota.is_some();
        self.set("cpu", group, "cpu.cfs_quota_us", "cpu.max", &quota.to_string(), &v2, asked)?;
        let share = limits.cpu_share.unwrap_or(100).clamp(1, 100);
        // A step of priority is as little as can be told apart.
        let below = 10 - limits.cpu_priority.unwrap_or(10).min(10);
        let shares = (share * 1024 / 100).saturating_sub(below).max(2).to_string();
        let weight = share.saturating_sub(below).max(1).to_string();
        let (shares, weight) = match limits.cpu_shares {
            Some(n) => (n.to_string(), (u64::from(n) * 100 / 1024).clamp(1, 10_000).to_string()),
            None => (shares, weight),
        };
        let asked = [limits.cpu_share, limits.cpu_priority, limits.cpu_shares].iter().any(Option::is_some);
        self.set("cpu", group, "cpu.shares", "cpu.weight", &shares, &weight, asked)?;
        self.limit_cpus(group, limits.cpus.as_deref())?;
        self.limit_nodes(group, limits.nodes.as_deref())?;
        let weight = limits.io_weight.unwrap_or(100);
        let v1 = weight.clamp(10, 1000).to_string();
        self.set("blkio", group, "blkio.bfq.weight", "io.bfq.weight", &v1, &v1, false)?;
        self.set("blkio", group, "blkio.weight", "io.weight", &v1, &weight.to_string(), false)?;
        if limits.io_weight.is_some() && !self.has_io_weight(group) {
            return Err(Error::unsupported(
                "this host's disks have no scheduler with priorities (bfq, or io.weight)",
            )
            .at("config.limits.disk.priority"));
        }
        self.limit_hugepages(group, &limits.hugepages)?;
        self.limit_io(group, &limits.io)
    }

    fn limit_hugepages(&self, group: &str, limits: &BTreeMap<String, u64>) -> Result<()> {
        if let Some(other) = limits.keys().find(|size| !HUGE_PAGES.contains(&size.as_str())) {
            let text = format!("{other:?} is no size of huge pages; there are {}", HUGE_PAGES.join(", "));
            return Err(Error::invalid("config.limits.hugepages", text));
        }
        for size in HUGE_PAGES {
            let wanted = limits.get(*size);
            let (v1, v2) = (format!("hugetlb.{size}.limit_in_bytes"), format!("hugetlb.{size}.max"));
            let number = |none: &str| wanted.map_or(none.to_owned(), u64::to_string);
            let field = format!("config.limits.hugepages.{size}");
            let there =
                self.v1("hugetlb", group).map(|d| d.join(&v1)).or_else(|| Some(self.v2(group)?.join(&v2)));
            if wanted.is_some() && !there.is_some_and(|file| file.exists()) {
                let text = format!(
                    "this host's kernel has no control group for huge pages of {size}, so the limit cannot be set"
                );
                return Err(Error::unsupported(text).at(field));
            }
            // Where reservations are counted too, a program is refused them; else it is killed at its first use.
            let (reserved1, reserved2) =
                (v1.replace(".limit", ".rsvd.limit"), v2.replace(".max", ".rsvd.max"));
            for (v1, v2, asked) in [(&v1, &v2, wanted.is_some()), (&reserved1, &reserved2, false)] {
                self.set("hugetlb", group, v1, v2, &number("-1"), &number("max"), asked)
                    .map_err(|e| e.at(&field))?;
            }
        }
        Ok(())
    }

    fn has_io_weight(&self, group: &str) -> bool {
        let v1 = ["blkio.bfq.weight", "blkio.weight"];
        let v2 = ["io.bfq.weight", "io.weight"];
        let has = |dir: Option<PathBuf>, files: [&str; 2]| {
            dir.is_some_and(|dir| files.iter().any(|f| dir.join(f).exists()))
        };
        has(self.v1("blkio", group), v1) || has(self.v2(group), v2)
    }

    fn limit_io(&self, group: &str, limits: &[IoLimit]) -> Result<()> {
        let unsupported = |path: &Path| {
            Error::unsupported("this host's kernel cannot limit rates of disks, so the limit cannot be set")
                .with_context(path.display())
        };
        // What the file names already and what is wanted, so that a limit that is no longer wanted goes.
        let set = |path: &Path, value: &dyn Fn(&str, Option<&IoLimit>) -> String| -> Result<()> {
            let Ok(now) = fs::read_to_string(path) else {
                return if limits.is_empty() { Ok(()) } else { Err(unsupported(path)) };
            };
            let mut devices: Vec<&str> = now.lines().filter_map(|l| l.split(' ').next()).collect();
            devices.extend(limits.iter().map(|l| l.device.as_str()));
            devices.retain(|d| d.contains(':'));
            devices.sort_unstable();
            devices.dedup();
            for device in devices {
                let limit = limits.iter().find(|l| l.device == device);
                match write(path, &value(device, limit)) {
                    // A disk that is gone needs no limit to be taken away.
                    Err(e) if limit.is_none() && e.raw_os_error() == Some(libc::ENODEV) => {}
                    other => other.map_err(|e| failed("writing", path, e))?,
                }
            }
            Ok(())
        };
        if let Some(dir) = self.v1("blkio", group) {
            type Part = fn(&IoLimit) -> Option<u64>;
            let files: [(&str, Part); 4] = [
                ("read_bps", |l| l.read_bytes),
                ("write_bps", |l| l.write_bytes),
                ("read_iops", |l| l.read_operations),
                ("write_iops", |l| l.write_operations),
            ];
            for (name, part) in files {
                let value = |device: &str, limit: Option<&IoLimit>| {
                    format!("{device} {}", limit.and_then(part).unwrap_or(0))
                };
                set(&dir.join(format!("blkio.throttle.{name}_device")), &value)?;
            }
            return Ok(());
        }
        let Some(dir) = self.v2(group) else { return Ok(()) };
        let number = |n: Option<u64>| n.map_or("max".to_owned(), |n| n.to_string());
        set(&dir.join("io.max"), &|device, limit| {
            let l = limit.cloned().unwrap_or_default();
            format!(
                "{device} rbps={} wbps={} riops={} wiops={}",
                number(l.read_bytes),
                number(l.write_bytes),
                number(l.read_operations),
                number(l.write_operations)
            )
        })
    }

    /// Writes one limit, in the hierarchy that has the controller.
    #[allow(clippy::too_many_arguments)] // two vocabularies for one thing
    fn set(
        &self,
        controller: &str,
        group: &str,
        v1: &str,
        v2: &str,
        a: &str,
        b: &str,
        asked: bool,
    ) -> Result<()> {
        let (path, value) = match (self.v1(controller, group), self.v2(group)) {
            (Some(dir), _) => (dir.join(v1), a),
            (None, Some(dir)) if !v2.is_empty() => (dir.join(v2), b),
            _ => return Ok(()),
        };
        match write(&path, value) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound && !asked => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(Error::unsupported(format!(
                "this host's kernel has no {controller} controller, so the limit cannot be set"
            ))
            .with_context(path.display())),
            Err(e) => Err(failed("writing", &path, e).with_context(value)),
        }
    }

    fn limit_memory(&self, group: &str, limits: &CgroupLimits) -> Result<()> {
        let soft = limits.memory_high.or(limits.memory.filter(|_| limits.memory_soft));
        let memory = limits.memory.filter(|_| !limits.memory_soft);
        let number = |n: Option<u64>, none: &str| n.map_or(none.to_owned(), |n| n.to_string());
        let (v1, v2) = (number(soft, "-1"), number(soft, "max"));
        self.set("memory", group, "memory.soft_limit_in_bytes", "memory.high", &v1, &v2, soft.is_some())?;
        // On v1 the sum of memory and swap is limited, never below memory: lifted first, set last.
        let swap_v1 = self.v1("memory", group).is_some();
        if swap_v1 {
            self.set("memory", group, "memory.memsw.limit_in_bytes", "", "-1", "", false)?;
        }
        self.limit_hard_memory(group, memory)?;
        let asked = limits.swap.is_some();
        if swap_v1 {
            if let (Some(swap), Some(memory)) = (limits.swap, memory) {
                let sum = memory.saturating_add(swap).to_string();
                self.set("memory", group, "memory.memsw.limit_in_bytes", "", &sum, "", asked)?;
            }
            // Without a limit of memory there is none of the sum: swapping is discouraged as far as can be.
            let none = limits.swap == Some(0);
            let swappiness = if none { 0 } else { limits.swappiness.unwrap_or(60) }.to_string();
            let asked = none || limits.swappiness.is_some();
            return self.set("memory", group, "memory.swappiness", "", &swappiness, "", asked);
        }
        let swap = number(limits.swap, "max");
        self.set("memory", group, "", "memory.swap.max", "", &swap, asked && limits.swap != Some(0))
    }

    fn limit_hard_memory(&self, group: &str, memory: Option<u64>) -> Result<()> {
        let v1 = memory.map_or("-1".to_owned(), |n| n.to_string());
        let v2 = memory.map_or("max".to_owned(), |n| n.to_string());
        // v2 takes any limit and then reclaims or kills; v1 refuses what it cannot reclaim. Refuse in both.
        if let (Some(limit), None, Some(dir)) = (memory, self.v1("memory", group), self.v2(group))
            && let Some(stat) = read(&dir.join("memory.stat"))
            && field(&stat, "anon").is_some_and(|anon| anon > limit)
        {
            return Err(in_use());
        }
        self.set("memory", group, "memory.limit_in_bytes", "memory.max", &v1, &v2, memory.is_some()).map_err(
            |e| match &e.context {
                Some(c) if c.contains("Device or resource busy") => in_use().with_context(c),
                _ => e,
            },
        )
    }

    /// Asked before anything is written. The kernel refuses a CPU only where it could never be: v2 takes one that is just not
    /// there, and lets the group use all others.
    fn check_cpus(&self, group: &str, cpus: &[u32]) -> Result<()> {
        let file = if self.v1("cpuset", group).is_some() { "cpuset.cpus" } else { "cpuset.cpus.effective" };
        let dir = self.v1("cpuset", group).or_else(|| self.v2(group));
        let Some(all) = dir.as_deref().and_then(Path::parent).and_then(|d| read(&d.join(file))) else {
            return Ok(()); // no controller: said where the limit is set
        };
        let there = parse_cpus(&all);
        match cpus.iter().find(|cpu| !there.contains(cpu)) {
            Some(cpu) => Err(Error::invalid(
                "limits.cpu",
                format!("names CPU {cpu}, which this host does not have; there are {all}"),
            )),
            None => Ok(()),
        }
    }

    /// The file of a group's NUMA nodes, and what its parent has of them; nothing without the controller.
    fn nodes_of(&self, group: &str) -> Option<(PathBuf, String)> {
        let (dir, file) = match (self.v1("cpuset", group), self.v2(group)) {
            (Some(dir), _) => (dir, "cpuset.mems"),
            (None, Some(dir)) => (dir, "cpuset.mems.effective"),
            (None, None) => return None,
        };
        let above = read(&dir.parent()?.join(file))?;
        Some((dir.join("cpuset.mems"), above))
    }

    /// Asked before anything is written.
    fn check_nodes(&self, group: &str, nodes: &[u32]) -> Result<()> {
        const FIELD: &str = "config.limits.memory.nodes";
        if nodes.is_empty() {
            return Ok(());
        }
        let Some((_, above)) = self.nodes_of(group) else {
            let text = "this host's kernel has no cpuset controller, so the nodes of memory cannot be set";
            return Err(Error::unsupported(text).at(FIELD));
        };
        let there = parse_cpus(&above);
        match nodes.iter().find(|node| !there.contains(node)) {
            Some(node) => {
                let text = format!("names node {node}, which has no memory here; those that have: {above}");
                Err(Error::invalid(FIELD, text))
            }
            None => Ok(()),
        }
    }

    /// Keeps the memory of the processes of `group` itself on these nodes, or on those of its parent. What is elsewhere moves.
    fn limit_nodes(&self, group: &str, nodes: Option<&[u32]>) -> Result<()> {
        let Some((path, above)) = self.nodes_of(group) else { return Ok(()) };
        let now = read(&path).unwrap_or_default();
        let wanted = nodes.map_or_else(|| above.clone(), cpu_list);
        // An empty list is the parent's.
        let now = if now.is_empty() { above } else { now };
        if parse_cpus(&now) == parse_cpus(&wanted) {
            return Ok(());
        }
        if self.v1("cpuset", group).is_some() {
            let moves = path.with_file_name("cpuset.memory_migrate");
            write(&moves, "1").map_err(|e| failed("writing", &moves, e))?;
        }
        write(&path, &wanted).map_err(|e| failed("writing", &path, e).with_context(&wanted))
    }

    /// CPUs that `group` may use; `None` when it is not there, or nothing limits CPUs here.
    pub fn cpus(&self, group: &str) -> Option<Vec<u32>> {
        let dir = self.v1("cpuset", group).or_else(|| self.v2(group))?;
        // An empty list of its own (v2) is what its parent has.
        let own = read(&dir.join("cpuset.cpus")).filter(|list| !list.is_empty());
        own.or_else(|| read(&dir.join("cpuset.cpus.effective"))).map(|list| parse_cpus(&list))
    }

    /// Limits `group` and all below to these CPUs, or to those of its parent.
    ///
    /// # Errors
    /// Invalid when the host has not all of them; internal when the kernel refuses.
    pub fn limit_cpus(&self, group: &str, cpus: Option<&[u32]>) -> Result<()> {
        let Some(dir) = self.v1("cpuset", group) else {
            let list = match (cpus, self.v2(group)) {
                (Some(cpus), _) => cpu_list(cpus),
                // The kernel lets no group with processes go back to an empty list: then it is all that the parent has.
                (None, Some(dir)) => {
                    if read(&dir.join("cpuset.cpus")).is_none_or(|now| now.is_empty()) {
                        return Ok(());
                    }
                    let all = dir.parent().and_then(|p| read(&p.join("cpuset.cpus.effective")));
                    all.filter(|list| !list.is_empty()).unwrap_or_else(|| "\n".to_owned())
                }
                (None, None) => return Ok(()),
            };
            return self.set("cpuset", group, "", "cpuset.cpus", "", &list, cpus.is_some());
        };
        // v1 wants every child's set within its parent's at any time: widen from the top, then narrow from the bottom.
        let parent = dir.parent().and_then(|p| read(&p.join("cpuset.cpus"))).unwrap_or_default();
        let new = cpus.map_or_else(|| parse_cpus(&parent), <[u32]>::to_vec);
        let now = parse_cpus(&read(&dir.join("cpuset.cpus")).unwrap_or_default());
        let mut both: Vec<u32> = now.iter().chain(&new).copied().collect();
        both.sort_unstable();
        both.dedup();
        let groups = tree(&dir);
        for (set, groups) in
            [(&both, groups.iter().collect::<Vec<_>>()), (&new, groups.iter().rev().collect())]
        {
            for dir in groups {
                let path = dir.join("cpuset.cpus");
                match write(&path, &cpu_list(set)) {
                    Ok(()) => {}
                    Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                        return Err(Error::invalid("limits.cpu", "names a CPU that this host does not have")
                            .with_context(cpu_list(set)));
                    }
                    // A child that was removed meanwhile.
                    Err(e) if e.kind() == io::ErrorKind::NotFound && dir != &groups_root(&path) => {}
                    Err(e) => return Err(failed("writing", &path, e)),
                }
            }
        }
        Ok(())
    }
}

fn in_use() -> Error {
    Error::conflict("the guest uses more memory than the new limit; stop it or free memory first")
        .at("limits.memory")
}

fn groups_root(file: &Path) -> PathBuf {
    file.parent().map(Path::to_owned).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_ranges_and_numbers() {
        assert_eq!(parse_cpus("0-2,7\n"), [0, 1, 2, 7]);
    }

    /// A pure v2 tree of plain files: what is written where, without a kernel behind it.
    #[test]
    fn v2_files_and_values() {
        let root = tempfile::tempdir().unwrap();
        let cgroups = Cgroups { v1: vec![], v2: Some(root.path().to_owned()) };
        let dir = root.path().join("karst-x/guest");
        fs::create_dir_all(&dir).unwrap();
        for file in ["memory.max", "pids.max", "cpu.max", "cpu.weight", "cpuset.cpus"] {
            fs::write(dir.join(file), "").unwrap();
        }
        let limits = CgroupLimits {
            memory: Some(1 << 20),
            processes: Some(50),
            cpus: Some(vec![1, 3]),
            cpu_quota: Some((25_000, 50_000)),
            cpu_share: Some(20),
            io: vec![IoLimit {
                device: "8:0".into(),
                read_bytes: Some(1000),
                write_operations: Some(7),
                ..Default::default()
            }],
            swap: Some(4096),
            io_weight: Some(300),
            ..CgroupLimits::default()
        };
        for file in [
            "io.max",
            "io.weight",
            "memory.swap.max",
            "memory.high",
            "hugetlb.2MB.max",
            "hugetlb.2MB.rsvd.max",
        ] {
            fs::write(dir.join(file), "").unwrap();
        }
        cgroups.limit("karst-x/guest", &limits).unwrap();
        let get = |f: &str| read(&dir.join(f)).unwrap();
        assert_eq!(get("memory.max"), "1048576");
        assert_eq!(get("pids.max"), "50");
        assert_eq!(get("cpu.max"), "25000 50000");
        assert_eq!(get("cpu.weight"), "20");
        assert_eq!(get("cpuset.cpus"), "1,3");
        assert_eq!((get("memory.swap.max").as_str(), get("memory.high").as_str()), ("4096", "max"));
        assert_eq!(get("io.weight"), "300");
        assert_eq!(get("io.max"), "8:0 rbps=1000 wbps=max riops=max wiops=7");
        assert_eq!(get("hugetlb.2MB.max"), "max");
        let huge = |size: &str| CgroupLimits { hugepages: [(size.into(), 4 << 20)].into(), ..limits.clone() };
        cgroups.limit("karst-x/guest", &huge("2MB")).unwrap();
        assert_eq!(
            (get("hugetlb.2MB.max").as_str(), get("hugetlb.2MB.rsvd.max").as_str()),
            ("4194304", "4194304")
        );
        let e = cgroups.limit("karst-x/guest", &huge("2MB/../x")).unwrap_err();
        assert!(e.is(karst_model::ErrorKind::Invalid), "{e:?}");
        let e = cgroups.limit("karst-x/guest", &huge("1GB")).unwrap_err();
        assert!(e.is(karst_model::ErrorKind::Unsupported), "{e:?}");
        assert_eq!(e.field.as_deref(), Some("config.limits.hugepages.1GB"));
        cgroups.limit("karst-x/guest", &CgroupLimits { io: vec![], ..limits.clone() }).unwrap();
        assert!(get("io.max").starts_with("8:0 rbps=max wbps=max riops=max wiops=max"), "taken away again");
        fs::write(root.path().join("karst-x/cpuset.mems.effective"), "0-1\n").unwrap();
        fs::write(dir.join("cpuset.mems"), "").unwrap();
        let machine = CgroupLimits {
            cpu_shares: Some(2048),
            memory_high: Some(4096),
            nodes: Some(vec![1]),
            ..limits.clone()
        };
        cgroups.limit("karst-x/guest", &machine).unwrap();
        assert_eq!((get("cpu.weight").as_str(), get("cpuset.mems").as_str()), ("200", "1"));
        assert_eq!((get("memory.high").as_str(), get("memory.max").as_str()), ("4096", "1048576"));
        let e =
            cgroups.limit("karst-x/guest", &CgroupLimits { nodes: Some(vec![2]), ..machine }).unwrap_err();
        assert_eq!(e.field.as_deref(), Some("config.limits.memory.nodes"), "{e:?}");
        cgroups.limit("karst-x/guest", &limits).unwrap();
        assert!(get("cpuset.mems").starts_with("0-1"), "those of its parent again");
        fs::write(root.path().join("karst-x/cpuset.cpus.effective"), "0-3\n").unwrap();
        let absent = CgroupLimits { cpus: Some(vec![3, 4]), processes: Some(7), ..limits.clone() };
        let e = cgroups.limit("karst-x/guest", &absent).unwrap_err();
        assert!(e.message.contains("CPU 4") && e.field.as_deref() == Some("limits.cpu"), "{e:?}");
        assert_eq!((get("pids.max").as_str(), get("cpuset.cpus").as_str()), ("50", "1,3"), "nothing changed");
        fs::write(dir.join("cpuset.cpus"), "1,3").unwrap();
        cgroups.limit("karst-x/guest", &CgroupLimits::default()).unwrap();
        // A file takes what is written over what was there; the kernel does not.
        assert!(
            get("cpuset.cpus").starts_with("0-3"),
            "all of the parent's, as the kernel takes no empty list"
        );
        fs::remove_file(dir.join("memory.max")).unwrap();
        let e = cgroups.limit("karst-x/guest", &limits).unwrap_err();
        assert!(e.is(karst_model::ErrorKind::Unsupported), "{e:?}");
        fs::write(dir.join("memory.stat"), "anon 5000000\nfile 1\n").unwrap();
        fs::write(dir.join("memory.max"), "max").unwrap();
        let e = cgroups.limit("karst-x/guest", &limits).unwrap_err();
        assert!(e.is(karst_model::ErrorKind::Conflict), "{e:?}");
        assert_eq!(get("memory.max"), "max", "refused before it was written");
    }
}
