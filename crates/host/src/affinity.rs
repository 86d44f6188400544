//! Which CPUs the threads of a process run on (`sched_setaffinity(2)`), within those that its control group has.

use karst_model::{Error, Result};
use rustix::{
    io::Errno,
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};
use std::collections::BTreeSet;

/// Numbers of the threads of a process; none when it has ended.
pub fn threads(pid: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks.filter_map(|t| t.file_name().to_str()?.parse().ok()).collect()
}

fn id(thread: u32) -> Result<rustix::thread::Pid> {
    i32::try_from(thread)
        .ok()
        .and_then(rustix::thread::Pid::from_raw)
        .ok_or_else(|| Error::internal("a thread could not be pinned", format!("{thread} is no thread")))
}

/// Lets a thread run on these CPUs only; fine when it has ended.
///
/// # Errors
/// Invalid when none of them is there for it.
pub fn pin(thread: u32, cpus: &[u32]) -> Result<()> {
    let mut set = CpuSet::new();
    for cpu in cpus.iter().filter(|cpu| (**cpu as usize) < CpuSet::MAX_CPU) {
        set.set(*cpu as usize);
    }
    match sched_setaffinity(Some(id(thread)?), &set) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(Errno::INVAL) => {
            let text = "names no CPU that this host lets the guest use";
            Err(Error::invalid("config.limits.cpu.pin", text).with_context(format!("{cpus:?}")))
        }
        Err(e) => Err(Error::internal("a thread could not be pinned", format!("{thread}: {e}"))),
    }
}

/// The CPUs that a thread may run on.
///
/// # Errors
/// Not found when it has ended.
pub fn of(thread: u32) -> Result<Vec<u32>> {
    let set = sched_getaffinity(Some(id(thread)?))
        .map_err(|e| Error::not_found("there is no such thread").with_context(e))?;
    Ok((0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).map(|cpu| cpu as u32).collect())
}

/// CPUs of this host that are at work.
pub fn online() -> BTreeSet<u32> {
    let list = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    crate::cgroup::parse_cpus(&list).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_runs_where_it_is_pinned() {
        let thread = std::thread::spawn(|| {
            let me = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
            assert!(threads(std::process::id()).contains(&me));
            let all = of(me).unwrap();
            let last = *all.last().unwrap();
            pin(me, &[last]).unwrap();
            assert_eq!(of(me).unwrap(), [last]);
            pin(me, &all).unwrap();
            assert_eq!(of(me).unwrap(), all);
            let e = pin(me, &[1023, 5000]).unwrap_err();
            assert!(e.is(karst_model::ErrorKind::Invalid), "{e:?}");
        });
        thread.join().unwrap();
        assert!(!online().is_empty() && threads(0).is_empty());
    }
}
