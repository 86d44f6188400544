//! What control groups count: the figures of every sample, and those that monitoring alone reads. What is dear to read is
//! read for the latter only; what was read for the former is not read again.

use super::{Cgroups, field, moved};
use rustix::fs::{self, Mode, OFlags};
use std::{collections::BTreeMap, fs::File, io::Read, os::fd::OwnedFd, path::Path};

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

/// What monitoring reads of a group beside [`CgroupStats`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CgroupDetails {
    /// Number of a processor and its time in user mode and in the kernel, nanoseconds. A v2 hierarchy tells the sum of all,
    /// as 0.
    pub processors: Vec<(u32, u64, u64)>,
    /// Parts of its memory in bytes, by the names that Incus' families have.
    pub memory: BTreeMap<&'static str, u64>,
    /// Processes that were killed for want of memory.
    pub oom_kills: Option<u64>,
    /// Of disks by the kernel's name: bytes read, reads, bytes written, writes.
    pub disks: BTreeMap<String, [u64; 4]>,
}

/// Parts of memory: their name, and that in `memory.stat` of v1 and of v2.
const MEMORY: &[(&str, &str, &str)] = &[
    ("Active_anon", "total_active_anon", "active_anon"),
    ("Active_file", "total_active_file", "active_file"),
    ("Cached", "total_cache", "file"),
    ("Dirty", "total_dirty", "file_dirty"),
    ("Inactive_anon", "total_inactive_anon", "inactive_anon"),
    ("Inactive_file", "total_inactive_file", "inactive_file"),
    ("Mapped", "total_mapped_file", "file_mapped"),
    ("RSS", "total_rss", "anon"),
    ("Shmem", "total_shmem", "shmem"),
    ("Unevictable", "total_unevictable", "unevictable"),
    ("Writeback", "total_writeback", "file_writeback"),
];

/// A group whose figures are asked for again and again. Its directories are held, so that no path is walked for each file:
/// that cost more than all that is read. Of a group that is gone there are no figures.
#[derive(Debug)]
pub struct CountedGroup {
    processors: Option<Directory>,
    memory: Option<Directory>,
    processes: Option<Directory>,
    disks: Option<Directory>,
}

/// A group in the hierarchy of one controller.
#[derive(Debug)]
struct Directory {
    v1: bool,
    fd: OwnedFd,
}

/// Texts of a sample that details are made of.
#[derive(Default)]
struct Texts {
    memory: String,
    cpu: String,
    disks: String,
}

impl Directory {
    /// One look as a rule: these files are short and do not tell their size, by which the standard library would begin with
    /// 32 bytes.
    fn read(&self, file: &str) -> Option<String> {
        let opened = fs::openat(&self.fd, file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let mut bytes = Vec::with_capacity(4096);
        File::from(opened).take(u64::MAX).read_to_end(&mut bytes).ok()?;
        bytes.truncate(bytes.trim_ascii_end().len());
        String::from_utf8(bytes).ok()
    }

    fn number(&self, file: &str) -> Option<u64> {
        let opened = fs::openat(&self.fd, file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        // More than any number has: a single look tells it.
        let mut bytes = [0; 64];
        let length = rustix::io::read(&opened, &mut bytes).ok()?;
        std::str::from_utf8(&bytes[..length]).ok()?.trim().parse().ok()
    }
}

impl Cgroups {
    /// `group`, for reading its figures.
    pub fn counted(&self, group: &str) -> CountedGroup {
        let directory = |controller: &str| {
            let (v1, path) = match self.v1(controller, group) {
                Some(path) => (true, path),
                None => (false, self.v2(group)?),
            };
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            Some(Directory { v1, fd: fs::open(path, flags, Mode::empty()).ok()? })
        };
        CountedGroup {
            processors: directory("cpuacct"),
            memory: directory("memory"),
            processes: directory("pids"),
            disks: directory("blkio"),
        }
    }
}

impl CountedGroup {
    /// Figures of the group.
    pub fn stats(&self) -> CgroupStats {
        self.read().0
    }

    /// Figures of the group with details.
    pub fn detailed(&self) -> (CgroupStats, CgroupDetails) {
        let (stats, texts) = self.read();
        let mut d = CgroupDetails::default();
        if let Some(dir) = &self.memory {
            d.memory = memory(&texts.memory, dir.v1);
            let kills = dir.read(if dir.v1 { "memory.oom_control" } else { "memory.events" });
            d.oom_kills = kills.and_then(|text| field(&text, "oom_kill"));
        }
        d.processors = match &self.processors {
            Some(dir) if dir.v1 => by_processor(&dir.read("cpuacct.usage_all").unwrap_or_default()),
            _ => {
                let time = |key| field(&texts.cpu, key).map(|us| us * 1000);
                time("user_usec").zip(time("system_usec")).map(|(u, s)| (0, u, s)).into_iter().collect()
            }
        };
        let disks = match &self.disks {
            Some(dir) if dir.v1 => {
                let requests = dir.read("blkio.throttle.io_serviced_recursive");
                moved::devices_v1(&texts.disks, &requests.unwrap_or_default())
            }
            _ => moved::devices_v2(&texts.disks),
        };
        d.disks = disks.into_iter().map(|(number, counters)| (name_of(&number), counters)).collect();
        (stats, d)
    }

    fn read(&self) -> (CgroupStats, Texts) {
        let (mut s, mut texts) = (CgroupStats::default(), Texts::default());
        match &self.processors {
            Some(dir) if dir.v1 => s.cpu_ns = dir.number("cpuacct.usage"),
            Some(dir) => {
                texts.cpu = dir.read("cpu.stat").unwrap_or_default();
                s.cpu_ns = field(&texts.cpu, "usage_usec").map(|us| us * 1000);
            }
            None => {}
        }
        if let Some(dir) = &self.memory {
            texts.memory = dir.read("memory.stat").unwrap_or_default();
            let counted = |key| field(&texts.memory, key);
            let (used, cache) = match dir.v1 {
                true => ("memory.usage_in_bytes", "total_inactive_file"),
                false => ("memory.current", "inactive_file"),
            };
            let cache = counted(cache).unwrap_or(0);
            s.memory = dir.number(used).map(|n| n.saturating_sub(cache));
            if dir.v1 {
                s.memory_peak = dir.number("memory.max_usage_in_bytes");
                s.swap = counted("total_swap");
                // It shows "none" as a number near 2^63.
                s.memory_limit = dir.number("memory.limit_in_bytes").filter(|n| *n < 1 << 60);
            } else {
                s.memory_peak = dir.number("memory.peak");
                s.swap = dir.number("memory.swap.current");
                s.memory_limit = dir.number("memory.max");
            }
        }
        s.processes = self.processes.as_ref().and_then(|dir| dir.number("pids.current"));
        if let Some(dir) = &self.disks {
            let file = if dir.v1 { "blkio.throttle.io_service_bytes_recursive" } else { "io.stat" };
            if let Some(text) = dir.read(file) {
                let (read, written) = match dir.v1 {
                    true => (moved::v1(&text, "Read"), moved::v1(&text, "Write")),
                    false => (moved::v2(&text, "rbytes="), moved::v2(&text, "wbytes=")),
                };
                (s.disk_read, s.disk_written) = (Some(read), Some(written));
                texts.disks = text;
            }
        }
        (s, texts)
    }
}

/// One pass over `memory.stat`; `Active` and `Inactive` are sums.
fn memory(text: &str, v1: bool) -> BTreeMap<&'static str, u64> {
    let mut found = BTreeMap::new();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(' ') else { continue };
        let part = MEMORY.iter().find(|(_, old, new)| key == if v1 { *old } else { *new });
        if let (Some((name, _, _)), Ok(value)) = (part, value.trim().parse::<u64>()) {
            found.insert(*name, value);
        }
    }
    for (sum, anonymous, file) in
        [("Active", "Active_anon", "Active_file"), ("Inactive", "Inactive_anon", "Inactive_file")]
    {
        if let Some((a, f)) = found.get(anonymous).copied().zip(found.get(file).copied()) {
            found.insert(sum, a + f);
        }
    }
    found
}

/// Lines `PROCESSOR USER SYSTEM` below a head, nanoseconds.
fn by_processor(text: &str) -> Vec<(u32, u64, u64)> {
    let line = |l: &str| {
        let mut words = l.split_whitespace();
        Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

/// The name of a block device by its numbers (`8:0`), which stand for it where it is gone.
fn name_of(number: &str) -> String {
    let link = std::fs::read_link(Path::new("/sys/dev/block").join(number));
    let name = link.ok().and_then(|l| Some(l.file_name()?.to_string_lossy().into_owned()));
    name.unwrap_or_else(|| number.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_memory_in_both_hierarchies() {
        let old = "cache 1\nrss 2\ntotal_cache 100\ntotal_rss 7\ntotal_active_anon 3\ntotal_active_file 4\nhierarchical_memory_limit 9\n";
        let parts = memory(old, true);
        assert_eq!((parts["Cached"], parts["RSS"], parts["Active"]), (100, 7, 7));
        assert!(!parts.contains_key("Inactive"), "a sum of what is not known is not known");
        let new = "anon 7\nfile 100\nfile_dirty 5\ninactive_anon 1\ninactive_file 2\ntotal_rss 99\n";
        let parts = memory(new, false);
        assert_eq!((parts["RSS"], parts["Dirty"], parts["Inactive"]), (7, 5, 3));
    }

    #[test]
    fn times_of_processors() {
        assert_eq!(by_processor("cpu user system\n0 11 22\n1 33 44\n2 x 1\n"), [(0, 11, 22), (1, 33, 44)]);
    }

    /// A pure v2 tree of plain files.
    #[test]
    fn details_of_a_group() {
        let root = tempfile::tempdir().unwrap();
        let cgroups = Cgroups { v1: vec![], v2: Some(root.path().to_owned()) };
        let dir = root.path().join("g");
        std::fs::create_dir(&dir).unwrap();
        for (file, text) in [
            ("cpu.stat", "usage_usec 30\nuser_usec 20\nsystem_usec 10\n"),
            ("memory.stat", "anon 7\nfile 100\ninactive_file 40\n"),
            ("memory.current", "107\n"),
            ("memory.events", "low 0\noom 3\noom_kill 2\n"),
            (
                "io.stat",
                "4095:7 rbytes=4096 wbytes=512 rios=1 wios=2 dbytes=0 dios=0\n7:0 rbytes=1 wbytes=1 rios=1 wios=1\n",
            ),
        ] {
            std::fs::write(dir.join(file), text).unwrap();
        }
        let group = cgroups.counted("g");
        let (stats, details) = group.detailed();
        assert_eq!(stats, group.stats());
        assert_eq!((stats.cpu_ns, stats.memory), (Some(30_000), Some(67)));
        assert_eq!(details.processors, [(0, 20_000, 10_000)]);
        assert_eq!(details.oom_kills, Some(2));
        // No such device is on this machine, so its numbers stand for it; loops are of no interest.
        assert_eq!(details.disks, BTreeMap::from([("4095:7".to_owned(), [4096, 1, 512, 2])]));
        // What is held of it tells nothing when it is gone, also when another has come in its place.
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(group.detailed(), Default::default());
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("memory.current"), "5\n").unwrap();
        assert_eq!(group.stats(), CgroupStats::default());
        assert_eq!(cgroups.counted("g").stats().memory, Some(5));
    }
}
