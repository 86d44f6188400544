//! What the host's kernel counts of QEMU: the time and swap of its group, memory and disks of the process. It is asked for
//! every few seconds, so what is read is held open while the process lives. A held file is that of its process for ever:
//! of another one that gets its number it tells nothing.

use karst_host::cgroup::{Cgroups, CountedGroup};
use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::{Mutex, PoisonError},
};

/// Figures of one moment; what is not known is `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Counted {
    /// Nanoseconds.
    pub(crate) cpu_ns: Option<u64>,
    /// Bytes.
    pub(crate) swap: Option<u64>,
    /// Resident memory, bytes.
    pub(crate) memory: Option<u64>,
    /// Its peak.
    pub(crate) memory_peak: Option<u64>,
    /// What it read from disks of the host, bytes. Control groups of v1 do not tell all of it.
    pub(crate) disk_read: Option<u64>,
    /// What it wrote to them.
    pub(crate) disk_written: Option<u64>,
}

/// What the samples of one machine are made with.
#[derive(Debug, Default)]
pub(crate) struct Kept(Mutex<Option<Process>>);

#[derive(Debug)]
struct Process {
    pid: Option<u32>,
    group: CountedGroup,
    status: Option<File>,
    io: Option<File>,
}

impl Kept {
    /// Figures of the group and of the process; without one those of the group alone.
    pub(crate) fn counted(&self, cgroups: &Cgroups, group: &str, pid: Option<u32>) -> Counted {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let process = match kept.take() {
            Some(process) if process.pid == pid => process,
            _ => {
                let open = |file: &str| File::open(format!("/proc/{}/{file}", pid?)).ok();
                Process { pid, group: cgroups.counted(group), status: open("status"), io: open("io") }
            }
        };
        kept.insert(process).counted()
    }
}

impl Process {
    fn counted(&self) -> Counted {
        let (cpu_ns, swap) = self.group.processor_and_swap();
        let status = text(self.status.as_ref());
        let resident = |key: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(key))?;
            line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|k| k << 10)
        };
        let io = text(self.io.as_ref());
        let moved = |key: &str| io.lines().find_map(|l| l.strip_prefix(key)?.trim().parse::<u64>().ok());
        Counted {
            cpu_ns,
            swap,
            memory: resident("VmRSS:"),
            memory_peak: resident("VmHWM:"),
            disk_read: moved("read_bytes:"),
            disk_written: moved("write_bytes:"),
        }
    }
}

/// What a file tells now, as far as a page goes: what is looked for stands before.
fn text(file: Option<&File>) -> String {
    let mut bytes = vec![0; 4096];
    let length = file.and_then(|f| f.read_at(&mut bytes, 0).ok()).unwrap_or(0);
    String::from_utf8_lossy(&bytes[..length]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_read_again_and_another_is_not_taken_for_it() {
        let cgroups = Cgroups::parse("29 23 0:26 / /nonexistent rw - cgroup2 cgroup2 rw").unwrap();
        let kept = Kept::default();
        let first = kept.counted(&cgroups, "g", Some(std::process::id()));
        assert!(first.memory > Some(1 << 20) && first.memory_peak >= first.memory, "{first:?}");
        assert!(first.disk_read.is_some() && first.cpu_ns.is_none(), "{first:?}");
        // As much as is seen of it in any case.
        let much = std::hint::black_box(vec![7u8; 64 << 20]);
        let later = kept.counted(&cgroups, "g", Some(std::process::id()));
        assert!(later.memory > first.memory.map(|bytes| bytes + (32 << 20)), "{first:?} {later:?}");
        drop(much);
        assert_eq!(kept.counted(&cgroups, "g", Some(u32::MAX)), Counted::default());
        assert_eq!(kept.counted(&cgroups, "g", None), Counted::default());
        assert!(kept.counted(&cgroups, "g", Some(std::process::id())).memory.is_some());
    }
}
