//! Control groups: v1 with its controllers, the hybrid of both, and pure v2. The only place that writes them.
//!
//! Paths are relative to the root of each hierarchy (`karst-ab12cd/UUID`); limits are set on a group that the guest cannot
//! reach, because its own groups lie below. Interfaces: the kernel's `cgroup-v1/*` and `cgroup-v2` documents.

mod moved;

use karst_model::{Error, Result};
use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

/// The controllers that Karst uses, as the kernel names them.
const USED: &[&str] = &["cpu", "cpuset", "memory", "pids", "io", "hugetlb"];

/// Sizes of huge pages, as control groups name them.
pub const HUGE_PAGES: &[&str] = &["64KB", "1MB", "2MB", "1GB"];

/// How this host mounts its hierarchies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroups {
    /// Mounts of v1 hierarchies: their controllers (or `name=systemd`) and where they lie.
    v1: Vec<(Vec<String>, PathBuf)>,
    /// Mount of the v2 hierarchy, if there is one.
    v2: Option<PathBuf>,
}

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
    /// Rates of block devices.
    pub io: Vec<IoLimit>,
    /// Memory is limited when the host is short of it only.
    pub memory_soft: bool,
    /// Bytes of swap.
    pub swap: Option<u64>,
    /// 0 to 100, the lower the less is swapped out; v1 only.
    pub swappiness: Option<u32>,
    /// Weight when disks are contended: 1 to 1000, where 100 is the default.
    pub io_weight: Option<u32>,
    /// Bytes in huge pages, by their size (one of [`HUGE_PAGES`]).
    pub hugepages: std::collections::BTreeMap<String, u64>,
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

fn failed(what: &str, path: &Path, e: io::Error) -> Error {
    Error::internal("a control group could not be changed", format!("{what} {}: {e}", path.display()))
}

fn write(path: &Path, value: &str) -> io::Result<()> {
    use io::Write;
    // Never created: a missing file means a missing controller.
    fs::File::options().write(true).open(path)?.write_all(value.as_bytes())
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|s| s.trim().to_owned())
}

fn number(path: &Path) -> Option<u64> {
    read(path)?.parse().ok()
}

/// The value of a line `key value` in a flat file such as `memory.stat`.
fn field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
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
    /// Reads the mounts of this process. Groups are made below that of process 1, as liblxc does it: it is not the root
    /// of the hierarchy when process 1 is that of a container, such as a CI runner's.
    ///
    /// # Errors
    /// Unsupported when no hierarchy is mounted.
    pub fn detect() -> Result<Self> {
        let mut found = Self::parse(&fs::read_to_string("/proc/self/mountinfo")?)?;
        found.descend(&fs::read_to_string("/proc/1/cgroup").unwrap_or_default());
        Ok(found)
    }

    /// Moves the bases to the groups that a text in the format of `/proc/PID/cgroup` names, where they can be seen.
    fn descend(&mut self, groups: &str) {
        for line in groups.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else { continue };
            // systemd's own group is beside those that it makes, not above.
            let group = group.strip_suffix("/init.scope").unwrap_or(group).trim_start_matches('/');
            let mount = if controllers.is_empty() {
                self.v2.as_mut()
            } else {
                let listed = |c: &String| controllers.split(',').any(|l| l == c);
                self.v1.iter_mut().find(|(known, _)| known.iter().any(listed)).map(|(_, mount)| mount)
            };
            if let Some(mount) = mount
                && !group.is_empty()
                && !group.split('/').any(|part| part == "..")
                && mount.join(group).is_dir()
            {
                *mount = mount.join(group);
            }
        }
    }

    /// Out of a text in the format of `/proc/PID/mountinfo`.
    ///
    /// # Errors
    /// Unsupported when it names no hierarchy.
    pub fn parse(mountinfo: &str) -> Result<Self> {
        let mut found = Self { v1: vec![], v2: None };
        for line in mountinfo.lines() {
            let Some((left, right)) = line.split_once(" - ") else {
                continue;
            };
            let left: Vec<_> = left.split(' ').collect();
            let right: Vec<_> = right.split(' ').collect();
            // Only a mount of a hierarchy's root: others are views of a part, such as a container engine's.
            let (Some(&"/"), Some(mount), Some(kind)) = (left.get(3), left.get(4), right.first()) else {
                continue;
            };
            let mount = PathBuf::from(mount);
            match *kind {
                "cgroup2" if found.v2.is_none() => found.v2 = Some(mount),
                "cgroup" => {
                    let known = |o: &&str| {
                        o.starts_with("name=")
                            || matches!(
                                *o,
                                "cpu"
                                    | "cpuacct"
                                    | "cpuset"
                                    | "memory"
                                    | "pids"
                                    | "freezer"
                                    | "devices"
                                    | "blkio"
                                    | "hugetlb"
                            )
                    };
                    let controllers: Vec<String> =
                        right.get(2).unwrap_or(&"").split(',').filter(known).map(str::to_owned).collect();
                    if !found.v1.iter().any(|(c, _)| *c == controllers) {
                        found.v1.push((controllers, mount));
                    }
                }
                _ => {}
            }
        }
        if found.v1.is_empty() && found.v2.is_none() {
            return Err(Error::unsupported("control groups are not mounted on this host"));
        }
        Ok(found)
    }

    /// Is everything on v2?
    pub fn is_unified(&self) -> bool {
        !self.v1.iter().any(|(c, _)| c.iter().any(|c| c == "memory" || c == "cpu"))
    }

    /// The directory of `group` for a v1 controller.
    fn v1(&self, controller: &str, group: &str) -> Option<PathBuf> {
        self.v1.iter().find(|(c, _)| c.iter().any(|c| c == controller)).map(|(_, m)| m.join(group))
    }

    fn v2(&self, group: &str) -> Option<PathBuf> {
        self.v2.as_ref().map(|m| m.join(group))
    }

    /// The directories of `group`, one a hierarchy: what a process enters.
    pub fn dirs(&self, group: &str) -> Vec<PathBuf> {
        self.v1.iter().map(|(_, m)| m).chain(&self.v2).map(|m| m.join(group)).collect()
    }

    /// Makes `group` and its parents in every hierarchy; fine when they are there.
    ///
    /// # Errors
    /// Internal, with the path, when the kernel refuses.
    pub fn create(&self, group: &str) -> Result<()> {
        let steps: Vec<&str> = group.match_indices('/').map(|(i, _)| &group[..i]).chain([group]).collect();
        for (controllers, mount) in &self.v1 {
            for step in &steps {
                let dir = mount.join(step);
                make(&dir)?;
                // A new cpuset is empty and takes no process.
                if controllers.iter().any(|c| c == "cpuset") {
                    // And so that groups made below are filled by the kernel.
                    let _ = write(&dir.join("cgroup.clone_children"), "1");
                    for file in ["cpuset.cpus", "cpuset.mems"] {
                        let parent = dir.parent().map(|p| p.join(file));
                        if read(&dir.join(file)).is_some_and(|s| s.is_empty())
                            && let Some(value) = parent.as_deref().and_then(read)
                        {
                            write(&dir.join(file), &value)
                                .map_err(|e| failed("writing", &dir.join(file), e))?;
                        }
                    }
                }
            }
        }
        if let Some(mount) = &self.v2 {
            let mut parent = mount.clone();
            for step in &steps {
                // One by one: a controller that v1 holds is not there, which is no reason to miss the others.
                for controller in USED {
                    let _ = write(&parent.join("cgroup.subtree_control"), &format!("+{controller}"));
                }
                parent = mount.join(step);
                make(&parent)?;
            }
        }
        Ok(())
    }

    /// Lets groups below `group` have controllers of their own on v2. Not for a group that holds processes.
    pub fn delegate(&self, group: &str) {
        if let Some(dir) = self.v2(group) {
            for controller in USED {
                let _ = write(&dir.join("cgroup.subtree_control"), &format!("+{controller}"));
            }
        }
    }

    /// Makes a group for processes that enter a guest from outside, in every hierarchy, and answers its directories. On
    /// v1 that is `group` itself; on v2, where only leaves may hold processes, a leaf below.
    ///
    /// # Errors
    /// Internal when the kernel refuses.
    pub fn entry(&self, group: &str, leaf: &str) -> Result<Vec<PathBuf>> {
        let nearest = |mount: &PathBuf| {
            let mut dir = mount.join(group);
            // Where the guest has no groups of its own it is in the one above.
            while !dir.exists() && dir.pop() && dir != *mount {}
            dir
        };
        let mut dirs: Vec<PathBuf> = self.v1.iter().map(|(_, m)| nearest(m)).collect();
        if let Some(dir) = self.v2(group) {
            let dir = dir.join(leaf);
            make(&dir)?;
            dirs.push(dir);
        }
        Ok(dirs)
    }

    /// Sets all limits of `group`, and takes away those that are `None`.
    ///
    /// # Errors
    /// Invalid for a CPU that is not there; conflict when memory in use cannot be brought below the limit; unsupported
    /// when a limit is asked for whose controller this host does not have.
    pub fn limit(&self, group: &str, limits: &CgroupLimits) -> Result<()> {
        self.check_cpus(group, limits.cpus.as_deref().unwrap_or_default())?;
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
        let asked = limits.cpu_share.is_some() || limits.cpu_priority.is_some();
        self.set("cpu", group, "cpu.shares", "cpu.weight", &shares, &weight, asked)?;
        self.limit_cpus(group, limits.cpus.as_deref())?;
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

    fn limit_hugepages(&self, group: &str, limits: &std::collections::BTreeMap<String, u64>) -> Result<()> {
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

    /// Permits or forbids a device (`c 10:200 rwm`) to a group and all below, where devices are governed by files (v1);
    /// answers whether they are.
    ///
    /// # Errors
    /// Internal when the kernel refuses.
    pub fn permit_device(&self, group: &str, rule: &str, permit: bool) -> Result<bool> {
        let Some(dir) = self.v1("devices", group) else { return Ok(false) };
        let file = if permit { "devices.allow" } else { "devices.deny" };
        // From the top: below nothing can be permitted that is not above.
        for dir in tree(&dir) {
            let path = dir.join(file);
            match write(&path, rule) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("writing", &path, e)),
                _ => {}
            }
        }
        Ok(true)
    }

    fn has_io_weight(&self, group: &str) -> bool {
        let v1 = ["blkio.bfq.weight", "blkio.weight"];
        let v2 = ["io.bfq.weight", "io.weight"];
        let has = |dir: Option<PathBuf>, files: [&str; 2]| {
            dir.is_some_and(|dir| files.iter().any(|f| dir.join(f).exists()))
        };
        has(self.v1("blkio", group), v1) || has(self.v2(group), v2)
    }

    /// Where a v1 hierarchy of disks' rates and nothing else is mounted. Its limits hold for the processes of one group, not
    /// for groups below.
    pub fn io_alone(&self) -> Option<PathBuf> {
        self.v1.iter().find(|(c, _)| c.iter().all(|c| c == "blkio") && !c.is_empty()).map(|(_, m)| m.clone())
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
        let soft = limits.memory.filter(|_| limits.memory_soft);
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

    /// Freezes or thaws everything in `group` and below; answers when it is done.
    ///
    /// # Errors
    /// Timeout when something does not freeze within 10 s (it is thawed again then).
    pub async fn freeze(&self, group: &str, freeze: bool) -> Result<()> {
        let Some((file, value)) = self.freezer(group, freeze) else {
            return Err(Error::unsupported("this host's kernel cannot freeze processes"));
        };
        write(&file, value).map_err(|e| failed("writing", &file, e))?;
        let wait = async {
            // The kernel has no event for v1; freezing takes a few hundred microseconds.
            let mut pause = Duration::from_micros(200);
            while self.is_frozen(group) != freeze {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(20));
                if freeze && self.v1("freezer", group).is_some() {
                    write(&file, value).map_err(|e| failed("writing", &file, e))?;
                }
            }
            Ok(())
        };
        match tokio::time::timeout(Duration::from_secs(10), wait).await {
            Ok(r) => r,
            Err(_) => {
                if let Some((file, value)) = self.freezer(group, false) {
                    let _ = write(&file, value);
                }
                Err(Error::timeout("the guest could not be frozen within 10 s"))
            }
        }
    }

    /// Thaws without waiting, by the file and value of [`Cgroups::freezer`].
    ///
    /// # Errors
    /// Internal when the kernel refuses.
    pub fn thaw_now(&self, file: &Path, value: &str) -> Result<()> {
        write(file, value).map_err(|e| failed("writing", file, e))
    }

    /// Makes `group` where processes are only kept apart, not limited: v2, or systemd's named hierarchy. Answers its
    /// directories. Entering one costs the kernel a pause of all, so this enters as few as possible.
    ///
    /// # Errors
    /// Internal when the kernel refuses.
    pub fn create_tracking(&self, group: &str) -> Result<Vec<PathBuf>> {
        let named = self.v1.iter().filter(|(c, _)| c.iter().any(|c| c.starts_with("name=")));
        let dirs: Vec<PathBuf> = named.map(|(_, m)| m.join(group)).chain(self.v2(group)).collect();
        for dir in &dirs {
            if let Some(parent) = dir.parent() {
                make(parent)?;
            }
            make(dir)?;
        }
        Ok(dirs)
    }

    /// The file and value that freeze or thaw `group`.
    pub fn freezer(&self, group: &str, freeze: bool) -> Option<(PathBuf, &'static str)> {
        match (self.v1("freezer", group), self.v2(group)) {
            (Some(dir), _) => Some((dir.join("freezer.state"), if freeze { "FROZEN" } else { "THAWED" })),
            (None, Some(dir)) => Some((dir.join("cgroup.freeze"), if freeze { "1" } else { "0" })),
            (None, None) => None,
        }
    }

    /// Is `group` wholly frozen?
    pub fn is_frozen(&self, group: &str) -> bool {
        match (self.v1("freezer", group), self.v2(group)) {
            (Some(dir), _) => read(&dir.join("freezer.state")).as_deref() == Some("FROZEN"),
            (None, Some(dir)) => {
                read(&dir.join("cgroup.events")).and_then(|t| field(&t, "frozen")) == Some(1)
            }
            (None, None) => false,
        }
    }

    /// Process ids in `group` and below.
    pub fn processes(&self, group: &str) -> Vec<u32> {
        let dir = self
            .v1("pids", group)
            .or_else(|| self.v2(group))
            .or_else(|| self.v1.first().map(|(_, m)| m.join(group)));
        let mut pids = vec![];
        for dir in dir.map(|d| tree(&d)).unwrap_or_default() {
            let list = read(&dir.join("cgroup.procs")).unwrap_or_default();
            pids.extend(list.lines().filter_map(|l| l.parse::<u32>().ok()).filter(|p| *p > 1));
        }
        pids
    }

    /// Kills everything in `group` and below and waits until it is gone.
    ///
    /// # Errors
    /// Timeout when something does not die within 10 s.
    pub async fn kill(&self, group: &str) -> Result<()> {
        let work = async {
            let mut pause = Duration::from_millis(1);
            loop {
                let pids = self.processes(group);
                if pids.is_empty() {
                    return;
                }
                for pid in pids {
                    if let Some(pid) = rustix::process::Pid::from_raw(pid as i32) {
                        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                    }
                }
                if let Some((file, value)) = self.freezer(group, false) {
                    let _ = write(&file, value);
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(50));
            }
        };
        tokio::time::timeout(Duration::from_secs(10), work)
            .await
            .map_err(|_| Error::timeout("processes of the guest do not end").with_context(group))
    }

    /// Removes `group` and all below from every hierarchy; fine when it is not there.
    ///
    /// # Errors
    /// Conflict when processes are in it.
    pub async fn remove(&self, group: &str) -> Result<()> {
        for dir in self.dirs(group) {
            // A process that has just ended may hold its group for a moment longer.
            let mut pause = Duration::from_micros(500);
            for attempt in 0.. {
                let busy = tree(&dir).iter().rev().find_map(|d| match fs::remove_dir(d) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => Some((d.clone(), e)),
                    _ => None,
                });
                match busy {
                    None => break,
                    Some(_) if attempt < 12 => tokio::time::sleep(pause).await,
                    Some((d, e)) => {
                        return Err(Error::conflict("a control group is still in use")
                            .with_context(format!("{}: {e}", d.display())));
                    }
                }
                pause = (pause * 2).min(Duration::from_millis(100));
            }
        }
        Ok(())
    }

    /// Does `group` exist in any hierarchy?
    pub fn exists(&self, group: &str) -> bool {
        self.dirs(group).iter().any(|d| d.exists())
    }

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

fn in_use() -> Error {
    Error::conflict("the guest uses more memory than the new limit; stop it or free memory first")
        .at("limits.memory")
}

/// A group that everyone may pass through, whatever our umask: a container mounts its own below as another user.
fn make(dir: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    match fs::create_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failed("making", dir, e)),
        // Also of one that is there: an earlier version made it for root alone.
        _ => {}
    }
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).map_err(|e| failed("opening", dir, e))
}

fn groups_root(file: &Path) -> PathBuf {
    file.parent().map(Path::to_owned).unwrap_or_default()
}

/// `dir` and all directories below, parents first.
fn tree(dir: &Path) -> Vec<PathBuf> {
    let mut found = vec![dir.to_owned()];
    let mut i = 0;
    while i < found.len() {
        if let Ok(entries) = fs::read_dir(&found[i]) {
            let dirs =
                entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path());
            found.extend(dirs.collect::<Vec<_>>());
        }
        i += 1;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
30 25 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
34 30 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
35 30 0:30 /docker/x /elsewhere rw - cgroup cgroup rw,memory";

    #[test]
    fn mounts_are_understood() {
        let hybrid = Cgroups::parse(HYBRID).unwrap();
        assert!(!hybrid.is_unified());
        assert_eq!(hybrid.dirs("a/b").len(), 4);
        assert_eq!(hybrid.v1("cpuacct", "a"), Some("/sys/fs/cgroup/cpu,cpuacct/a".into()));
        let pure = Cgroups::parse("29 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate").unwrap();
        assert!(pure.is_unified());
        assert_eq!(pure.dirs("a"), [PathBuf::from("/sys/fs/cgroup/a")]);
        assert!(Cgroups::parse("1 2 0:1 / /proc rw - proc proc rw").is_err());
        assert_eq!(parse_cpus("0-2,7\n"), [0, 1, 2, 7]);
    }

    #[test]
    fn groups_lie_below_that_of_process_1() {
        let root = tempfile::tempdir().unwrap();
        let (memory, cpu, v2) = (root.path().join("m"), root.path().join("c"), root.path().join("u"));
        fs::create_dir_all(memory.join("engine/x")).unwrap();
        fs::create_dir_all(v2.join("engine")).unwrap();
        let mut cgroups = Cgroups {
            v1: vec![
                (vec!["memory".into()], memory.clone()),
                (vec!["cpu".into(), "cpuacct".into()], cpu.clone()),
            ],
            v2: Some(v2.clone()),
        };
        cgroups.descend("4:memory:/engine/x\n3:cpu,cpuacct:/unseen\n0::/engine/init.scope\n");
        assert_eq!(cgroups.dirs("g"), [memory.join("engine/x/g"), cpu.join("g"), v2.join("engine/g")]);
        let before = cgroups.clone();
        cgroups.descend("4:memory:/../../etc\n0::/init.scope\n1:name=systemd:/\n");
        assert_eq!(cgroups, before);
    }

    #[test]
    fn groups_are_open_to_pass_through() {
        use std::os::unix::fs::PermissionsExt;
        let root = tempfile::tempdir().unwrap();
        let cgroups = Cgroups { v1: vec![], v2: Some(root.path().to_owned()) };
        // As one that a process with a umask of 077 made.
        fs::create_dir(root.path().join("karst-x")).unwrap();
        fs::set_permissions(root.path().join("karst-x"), fs::Permissions::from_mode(0o700)).unwrap();
        cgroups.create("karst-x/guest").unwrap();
        for group in ["karst-x", "karst-x/guest"] {
            let mode = fs::metadata(root.path().join(group)).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, 0o755, "{group}");
        }
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
