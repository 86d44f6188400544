//! Control groups: v1 with its controllers, the hybrid of both, and pure v2. The only place that writes them.
//!
//! Paths are relative to the root of each hierarchy (`karst-ab12cd/UUID`); limits are set on a group that the guest cannot
//! reach, because its own groups lie below. Interfaces: the kernel's `cgroup-v1/*` and `cgroup-v2` documents. Here is which
//! groups there are and what is in them; what they are limited to is in `limits`, what they used in `stats`.

mod held;
mod limits;
mod moved;
mod stats;

pub use limits::{CgroupLimits, HUGE_PAGES, IoLimit, parse_cpus};
pub use stats::{CgroupDetails, CgroupStats, CountedGroup};

use karst_model::{Error, Result};
use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

/// The controllers that Karst uses, as the kernel names them.
const USED: &[&str] = &["cpu", "cpuset", "memory", "pids", "io", "hugetlb"];

/// How this host mounts its hierarchies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroups {
    /// Mounts of v1 hierarchies: their controllers (or `name=systemd`) and where they lie.
    v1: Vec<(Vec<String>, PathBuf)>,
    /// Mount of the v2 hierarchy, if there is one.
    v2: Option<PathBuf>,
}

fn failed(what: &str, path: &Path, e: io::Error) -> Error {
    Error::internal("a control group could not be changed", format!("{what} {}: {e}", path.display()))
}

fn write(path: &Path, value: &str) -> io::Result<()> {
    use io::Write;
    // Never created: a missing file means a missing controller.
    fs::File::options().write(true).open(path)?.write_all(value.as_bytes())
}

/// One look as a rule: these files are short and do not tell their size, by which the standard library would begin with 32 bytes.
fn read(path: &Path) -> Option<String> {
    use io::Read;
    let mut bytes = Vec::with_capacity(4096);
    fs::File::open(path).ok()?.take(u64::MAX).read_to_end(&mut bytes).ok()?;
    Some(std::str::from_utf8(&bytes).ok()?.trim().to_owned())
}

/// The value of a line `key value` in a flat file such as `memory.stat`.
fn field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
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

    /// Where a v1 hierarchy of disks' rates and nothing else is mounted. Its limits hold for the processes of one group, not
    /// for groups below.
    pub fn io_alone(&self) -> Option<PathBuf> {
        self.v1.iter().find(|(c, _)| c.iter().all(|c| c == "blkio") && !c.is_empty()).map(|(_, m)| m.clone())
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
}
