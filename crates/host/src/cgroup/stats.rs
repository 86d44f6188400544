//! What control groups count: the figures of every sample, and those that monitoring alone reads. What is dear to read is
//! read for the latter only; what was read for the former is not read again.

use super::{
    Cgroups, field,
    held::{self, Held},
    moved,
};
use std::{
    cell::OnceCell,
    collections::BTreeMap,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

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

/// A group whose figures are asked for again and again. What is read of it is held open: to walk a path and to open each file
/// cost more than all that is read. Of a group that is gone there are no figures.
#[derive(Debug)]
pub struct CountedGroup(Mutex<Parts>);

/// The group in the hierarchies of its controllers; one look at a time.
#[derive(Debug)]
struct Parts {
    processors: Option<Held>,
    memory: Option<Held>,
    processes: Option<Held>,
    disks: Option<Held>,
}

/// Texts of a sample that details are made of.
#[derive(Default)]
struct Texts {
    memory: String,
    cpu: String,
    disks: String,
}

impl Cgroups {
    /// `group`, for reading its figures.
    pub fn counted(&self, group: &str) -> CountedGroup {
        let unified = OnceCell::new();
        let part = |controller: &str| match self.v1(controller, group) {
            Some(path) => Some(Held::new(true, held::open(&path)?)),
            None => {
                let directory = unified.get_or_init(|| held::open(&self.v2(group)?));
                Some(Held::new(false, directory.clone()?))
            }
        };
        CountedGroup(Mutex::new(Parts {
            processors: part("cpuacct"),
            memory: part("memory"),
            processes: part("pids"),
            disks: part("blkio"),
        }))
    }
}

impl CountedGroup {
    fn parts(&self) -> MutexGuard<'_, Parts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Figures of the group.
    pub fn stats(&self) -> CgroupStats {
        self.parts().read().0
    }

    /// Its CPU time in nanoseconds and its swap in bytes, without a look at anything else.
    pub fn processor_and_swap(&self) -> (Option<u64>, Option<u64>) {
        let mut parts = self.parts();
        let swap = parts.memory.as_mut().and_then(|part| match part.v1 {
            true => field(&part.text("memory.stat")?, "total_swap"),
            false => part.number("memory.swap.current"),
        });
        (parts.cpu(&mut String::new()), swap)
    }

    /// Figures of the group with details.
    pub fn detailed(&self) -> (CgroupStats, CgroupDetails) {
        self.parts().detailed()
    }
}

impl Parts {
    fn detailed(&mut self) -> (CgroupStats, CgroupDetails) {
        let (stats, texts) = self.read();
        let mut d = CgroupDetails::default();
        if let Some(part) = &mut self.memory {
            d.memory = memory(&texts.memory, part.v1);
            let kills = part.text(if part.v1 { "memory.oom_control" } else { "memory.events" });
            d.oom_kills = kills.and_then(|text| field(&text, "oom_kill"));
        }
        d.processors = match &mut self.processors {
            Some(part) if part.v1 => by_processor(&part.text("cpuacct.usage_all").unwrap_or_default()),
            _ => {
                let time = |key| field(&texts.cpu, key).map(|us| us * 1000);
                time("user_usec").zip(time("system_usec")).map(|(u, s)| (0, u, s)).into_iter().collect()
            }
        };
        let disks = match &mut self.disks {
            Some(part) if part.v1 => {
                let requests = part.text("blkio.throttle.io_serviced_recursive");
                moved::devices_v1(&texts.disks, &requests.unwrap_or_default())
            }
            _ => moved::devices_v2(&texts.disks),
        };
        d.disks = disks.into_iter().map(|(number, counters)| (name_of(&number), counters)).collect();
        (stats, d)
    }

    /// CPU time; the text that it is of, where there is one.
    fn cpu(&mut self, text: &mut String) -> Option<u64> {
        let part = self.processors.as_mut()?;
        if part.v1 {
            return part.number("cpuacct.usage");
        }
        *text = part.text("cpu.stat").unwrap_or_default();
        field(text, "usage_usec").map(|us| us * 1000)
    }

    fn read(&mut self) -> (CgroupStats, Texts) {
        let (mut s, mut texts) = (CgroupStats::default(), Texts::default());
        s.cpu_ns = self.cpu(&mut texts.cpu);
        if let Some(part) = &mut self.memory {
            texts.memory = part.text("memory.stat").unwrap_or_default();
            let counted = |key| field(&texts.memory, key);
            let (used, cache) = match part.v1 {
                true => ("memory.usage_in_bytes", "total_inactive_file"),
                false => ("memory.current", "inactive_file"),
            };
            let cache = counted(cache).unwrap_or(0);
            s.memory = part.number(used).map(|n| n.saturating_sub(cache));
            if part.v1 {
                s.memory_peak = part.number("memory.max_usage_in_bytes");
                s.swap = counted("total_swap");
                // The lowest of its own and of those above. Without one it is a number near 2^63.
                s.memory_limit = counted("hierarchical_memory_limit").filter(|n| *n < 1 << 60);
            } else {
                s.memory_peak = part.number("memory.peak");
                s.swap = part.number("memory.swap.current");
                s.memory_limit = part.number("memory.max");
            }
        }
        s.processes = self.processes.as_mut().and_then(|part| part.number("pids.current"));
        if let Some(part) = &mut self.disks {
            let file = if part.v1 { "blkio.throttle.io_service_bytes_recursive" } else { "io.stat" };
            if let Some(text) = part.text(file) {
                let (read, written) = match part.v1 {
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

/// The name of a block device by its numbers (`8:0`), which stand for it where it is gone. All guests of a host have few of
/// them in common: each is looked up once a minute, by which another may have come to its numbers.
fn name_of(number: &str) -> String {
    static KNOWN: Mutex<Names> = Mutex::new(Names(BTreeMap::new()));
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    known.get(number, Instant::now(), |number| {
        let link = std::fs::read_link(Path::new("/sys/dev/block").join(number));
        let name = link.ok().and_then(|l| Some(l.file_name()?.to_string_lossy().into_owned()));
        name.unwrap_or_else(|| number.to_owned())
    })
}

/// Names by numbers, and when they were found.
struct Names(BTreeMap<String, (Instant, String)>);

impl Names {
    const KEPT: Duration = Duration::from_secs(60);

    fn get(&mut self, number: &str, now: Instant, find: impl Fn(&str) -> String) -> String {
        if let Some((found, name)) = self.0.get(number)
            && now.saturating_duration_since(*found) < Self::KEPT
        {
            return name.clone();
        }
        // So there are never more than a host had within a minute.
        self.0.retain(|_, (found, _)| now.saturating_duration_since(*found) < Self::KEPT);
        let name = find(number);
        self.0.insert(number.to_owned(), (now, name.clone()));
        name
    }
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
        assert_eq!(group.processor_and_swap(), (Some(30_000), None));
        assert_eq!(details.processors, [(0, 20_000, 10_000)]);
        assert_eq!(details.oom_kills, Some(2));
        // No such device is on this machine, so its numbers stand for it; loops are of no interest.
        assert_eq!(details.disks, BTreeMap::from([("4095:7".to_owned(), [4096, 1, 512, 2])]));
        // The next look tells what is there then.
        std::fs::write(dir.join("memory.current"), "50\n").unwrap();
        std::fs::write(dir.join("cpu.stat"), "usage_usec 31\n").unwrap();
        let (stats, details) = group.detailed();
        assert_eq!((stats.cpu_ns, stats.memory), (Some(31_000), Some(10)));
        assert!(details.processors.is_empty(), "{details:?}");
        assert_eq!(cgroups.counted("gone").detailed(), Default::default());
    }

    /// A v1 tree of plain files, each controller mounted by itself.
    #[test]
    fn figures_of_a_group_of_v1() {
        let root = tempfile::tempdir().unwrap();
        let mount = |controller: &str| (vec![controller.to_owned()], root.path().join(controller));
        let cgroups = Cgroups { v1: ["cpuacct", "memory", "pids", "blkio"].map(mount).into(), v2: None };
        for (file, text) in [
            ("cpuacct/g/cpuacct.usage", "30\n"),
            ("cpuacct/g/cpuacct.usage_all", "cpu user system\n0 20 10\n"),
            (
                "memory/g/memory.stat",
                "hierarchical_memory_limit 4096\ntotal_inactive_file 40\ntotal_swap 3\ntotal_rss 7\n",
            ),
            ("memory/g/memory.usage_in_bytes", "107\n"),
            ("memory/g/memory.max_usage_in_bytes", "200\n"),
            ("memory/g/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
            ("pids/g/pids.current", "5\n"),
            ("blkio/g/blkio.throttle.io_service_bytes_recursive", "4095:7 Read 4096\n4095:7 Write 512\n"),
            ("blkio/g/blkio.throttle.io_serviced_recursive", "4095:7 Read 3\n"),
        ] {
            let path = root.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let group = cgroups.counted("g");
        let (stats, details) = group.detailed();
        let expected = CgroupStats {
            cpu_ns: Some(30),
            memory: Some(67),
            memory_peak: Some(200),
            swap: Some(3),
            memory_limit: Some(4096),
            processes: Some(5),
            disk_read: Some(4096),
            disk_written: Some(512),
        };
        assert_eq!((&stats, &group.stats()), (&expected, &expected));
        assert_eq!(group.processor_and_swap(), (Some(30), Some(3)));
        assert_eq!((details.processors, details.oom_kills), (vec![(0, 20, 10)], Some(2)));
        assert_eq!((details.memory["RSS"], details.disks["4095:7"]), (7, [4096, 3, 512, 0]));
        // As the kernel writes that there is none.
        std::fs::write(
            root.path().join("memory/g/memory.stat"),
            "hierarchical_memory_limit 9223372036854771712\n",
        )
        .unwrap();
        assert_eq!(group.stats().memory_limit, None);
    }

    #[test]
    fn names_of_devices_are_found_anew_each_minute() {
        let (mut names, start) = (Names(BTreeMap::new()), Instant::now());
        let asked = std::cell::Cell::new(0);
        let mut get = |number: &str, seconds| {
            let find = |number: &str| {
                asked.set(asked.get() + 1);
                format!("{number}-{}", asked.get())
            };
            names.get(number, start + Duration::from_secs(seconds), find)
        };
        assert_eq!([get("8:0", 0), get("8:0", 59), get("8:16", 59)], ["8:0-1", "8:0-1", "8:16-2"]);
        assert_eq!([get("8:0", 60), get("8:16", 61)], ["8:0-3", "8:16-2"]);
        assert_eq!(names.0.len(), 2);
    }
}
