//! Announces that processes are about to change their control group.
//!
//! The first process that enters a group after a quiet time waits for a grace period of the kernel, five to twenty
//! milliseconds; those that follow soon do not (`cgroup_threadgroup_rwsem`, whose writers pass while one has just been
//! there). Whoever knows that a guest is about to start or a program to enter one lets that time begin while it still
//! prepares. It changes nothing: this process moves into the group that it is in.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

/// The file in which this process would write itself down, if it can see its group.
fn own() -> Option<&'static PathBuf> {
    static OWN: OnceLock<Option<PathBuf>> = OnceLock::new();
    let find = || {
        let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        find(&groups, &mounts)
    };
    OWN.get_or_init(find).as_ref()
}

/// Out of texts in the formats of `/proc/PID/cgroup` and `/proc/PID/mountinfo`: one hierarchy is enough, they share the
/// lock.
fn find(groups: &str, mounts: &str) -> Option<PathBuf> {
    // The whole of a hierarchy only: mount, type, options of the file system.
    let mounts = mounts.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let (root, at) = (left.next()?, left.next()?);
        let mut right = right.split(' ');
        let (kind, options) = (right.next()?, right.nth(1)?);
        (root == "/").then_some((at, kind, options))
    });
    let of = |controllers: &str| {
        mounts.clone().find(|(_, kind, options)| match controllers {
            "" => *kind == "cgroup2",
            _ => *kind == "cgroup" && controllers.split(',').all(|c| options.split(',').any(|o| o == c)),
        })
    };
    let mut places = groups.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, group) = (fields.next()?, fields.next()?);
        if group.split('/').any(|part| part == "..") {
            return None;
        }
        let mut place = PathBuf::from(of(controllers)?.0);
        place.extend(group.split('/').filter(|part| !part.is_empty()));
        Some(place.join("cgroup.procs"))
    });
    // On a hybrid of both the second version comes last.
    places.next_back()
}

/// Moves this process to where it is. Blocks for the grace period.
fn enter(file: &Path) -> io::Result<()> {
    use io::Write;
    fs::File::options().write(true).open(file)?.write_all(b"0")
}

/// How long after the first one the second move follows: less than a grace period, so that the time in which others pass
/// goes on without a gap, and ends later.
const AGAIN: std::time::Duration = std::time::Duration::from_millis(4);

/// Begins the waiting, in a thread of its own; nothing to do while one waits already. For the threads of a runtime.
pub fn anticipate() {
    static WAITS: AtomicBool = AtomicBool::new(false);
    let Some(file) = own() else { return };
    let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
    if WAITS.swap(true, Ordering::AcqRel) {
        return;
    }
    runtime.spawn_blocking(move || {
        // Only time is lost when it fails.
        let twice = || {
            enter(file)?;
            std::thread::sleep(AGAIN);
            enter(file)
        };
        if let Err(e) = twice() {
            tracing::debug!(file = %file.display(), error = %e, "a move was not announced");
        }
        WAITS.store(false, Ordering::Release);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_group_is_found_in_each_layout() {
        let v2 = "30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        let found = find("0::/system.slice/karst.service\n", v2);
        assert_eq!(found, Some("/sys/fs/cgroup/system.slice/karst.service/cgroup.procs".into()));
        let hybrid = "31 1 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                      32 1 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        let found = find("5:memory:/x\n0::/\n", hybrid);
        assert_eq!(found, Some("/sys/fs/cgroup/unified/cgroup.procs".into()));
        let v1 = "32 1 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        assert_eq!(find("5:memory:/x\n", v1), Some("/sys/fs/cgroup/memory/x/cgroup.procs".into()));
        // Out of what this process can see, or not mounted.
        assert_eq!(find("0::/../other\n", v2), None);
        assert_eq!(find("0::/\n", v1), None);
    }

    #[test]
    fn it_leaves_the_process_where_it_is() {
        let groups = || fs::read_to_string("/proc/self/cgroup").unwrap();
        let before = groups();
        // Who may not, as a test without privileges, is refused; it moves nowhere either.
        let _ = own().map(|file| enter(file));
        assert_eq!(groups(), before);
    }
}
