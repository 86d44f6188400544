//! Compares what the agent keeps with what the machine has.

use crate::{
    RealAgent,
    agent::{WORKER, blocking},
    registry::GuestRecord,
};
use karst_agent::{SelfCheck, names::is_guest_interface};
use karst_guest::GuestDriver;
use karst_model::{InstanceId, Result};
use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

impl RealAgent {
    pub(crate) async fn self_check_now(&self) -> Result<SelfCheck> {
        let mut check = SelfCheck {
            sessions: self.sessions.count() as u32,
            images: self.images.list().await?.into_iter().map(|(id, _)| id).collect(),
            networks: self.networks.list().await?.into_iter().map(|(id, _)| id).collect(),
            ..SelfCheck::default()
        };
        for (_, pool) in self.all_pools() {
            for volume in pool.list().await? {
                check.volumes.push(volume.id);
                if let Some(snapshots) = pool.snapshots() {
                    let all = snapshots.list(volume.id).await?;
                    check.snapshots.extend(all.into_iter().map(|(snapshot, _)| (volume.id, snapshot)));
                }
            }
        }
        for name in names(&self.registry.path("backups")) {
            match name.parse() {
                Ok(id) => check.backups.push(id),
                Err(_) => check.leaks.push(format!("unfinished backup {name}")),
            }
        }
        let guests: BTreeMap<InstanceId, GuestRecord> = self.all_guests().into_iter().collect();
        check.guests = guests.keys().copied().collect();
        let mut running = BTreeSet::new();
        for (id, record) in &guests {
            let driver: Result<&Arc<dyn GuestDriver>> = self.driver(record.kind);
            let observed = match driver {
                Ok(driver) => driver.observe(*id).await,
                Err(e) => Err(e),
            };
            match observed {
                Ok(o) if o.state.is_down() => {}
                Ok(_) => {
                    running.insert(*id);
                }
                // What there is of it may be in use: only the guest itself is named, and all the rest is looked at.
                Err(e) => {
                    tracing::warn!(instance = %id, error = %e, context = e.context, "a guest cannot be observed");
                    check.leaks.push(format!("guest {id} cannot be observed: {e}"));
                    running.insert(*id);
                }
            }
            if !check.volumes.contains(&record.root) {
                check.leaks.push(format!("guest {id} without its root volume"));
            }
        }
        for (id, _) in self.registry.guests()?.iter().filter(|(id, _)| !guests.contains_key(id)) {
            match self.registry.arrived(*id) {
                true => check.guests.push(*id),
                false => check.leaks.push(format!("state directory of an unknown guest {id}")),
            }
        }
        for (id, kept) in self.registry.memory_places() {
            if !kept && !running.contains(&id) {
                check.leaks.push(format!("a part of a file with the memory of guest {id}"));
            }
        }
        for claim in self.ids.claims()? {
            let known =
                claim.owner.parse().is_ok_and(|id| guests.get(&id).is_some_and(|r| r.ids == claim.range));
            if !known && claim.owner != WORKER {
                check.leaks.push(format!("id range {} of {}", claim.range.base, claim.owner));
            }
        }
        let pools: BTreeSet<String> = self.registry.pools()?.iter().map(|p| p.id.0.to_string()).collect();
        let root = self.registry.path("");
        let daemon = self.options.daemon_id.clone();
        let staging = self.staging.clone();
        let found = blocking(move || {
            let mut found = look(&root, &daemon, &pools, &guests, &running);
            found.extend(staging.strays()?);
            Ok(found)
        })
        .await?;
        check.leaks.extend(found);
        check.leaks.extend(self.networks.strays().await?);
        Ok(check)
    }
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().into_string().ok()).collect()
}

/// What lies about on the machine that no running guest accounts for.
fn look(
    root: &Path,
    daemon_id: &str,
    pools: &BTreeSet<String>,
    guests: &BTreeMap<InstanceId, GuestRecord>,
    running: &BTreeSet<InstanceId>,
) -> Vec<String> {
    let mut leaks = vec![];
    let unknown = names(&root.join("pools"))
        .into_iter()
        .filter(|n| !pools.contains(n.strip_suffix(".img").unwrap_or(n)));
    leaks.extend(unknown.map(|n| format!("directory of an unknown pool {n}")));

    let used: BTreeSet<&String> =
        running.iter().filter_map(|id| guests.get(id)).flat_map(|r| &r.interfaces).collect();
    let links = names(Path::new("/sys/class/net")).into_iter();
    let stray = links.filter(|n| is_guest_interface(daemon_id, n) && !used.contains(n));
    leaks.extend(stray.map(|n| format!("interface {n}")));

    let locks = karst_ct_lxc::locks::kept(&root.join("guests")).into_iter();
    let stray = locks.filter(|n| !n.parse().is_ok_and(|id| guests.contains_key(&id)));
    leaks.extend(stray.map(|n| format!("lock of liblxc for no guest: {n}")));

    let of_running = |text: &str| running.iter().any(|id| text.contains(&id.0.to_string()));
    for group in control_groups(&format!("karst-{daemon_id}")) {
        let stray = directories(&group).into_iter().filter(|n| looks_like_an_id(n) && !of_running(n));
        leaks.extend(stray.map(|n| format!("control group {}/{n}", group.display())));
    }
    // A pool's own mount or file, or one of its volumes where each is a file system.
    let of_pool = |p: &Path| {
        let mut parts = p.strip_prefix(root.join("pools")).into_iter().flatten();
        let own = parts.next().map(|n| n.to_string_lossy().into_owned());
        own.is_some_and(|n| pools.contains(n.strip_suffix(".img").unwrap_or(&n)))
    };
    let accounted = |p: &Path| of_running(&p.to_string_lossy()) || of_pool(p);
    let places = karst_host::mountns::entries(None).unwrap_or_default().into_iter().map(|m| m.at);
    let stray = places.filter(|p| p.starts_with(root) && !accounted(p));
    leaks.extend(stray.map(|p| format!("mount {}", p.display())));
    let loops = karst_host::mount::loops().into_iter();
    let stray = loops.filter(|(_, file)| file.starts_with(root) && !accounted(file));
    leaks.extend(
        stray.map(|(device, file)| format!("loop device {} of {}", device.display(), file.display())),
    );
    leaks.extend(
        karst_ct_lxc::apparmor::strays(daemon_id).into_iter().map(|p| format!("AppArmor profile {p}")),
    );
    leaks.extend(stray_processes(root, &of_running));
    leaks
}

fn looks_like_an_id(name: &str) -> bool {
    name.get(..36).is_some_and(|id| id.parse::<uuid::Uuid>().is_ok())
}

fn directories(at: &Path) -> Vec<String> {
    names(at).into_iter().filter(|n| at.join(n).is_dir()).collect()
}

/// Groups of this daemon, where they are made and at the top of each hierarchy.
fn control_groups(name: &str) -> Vec<PathBuf> {
    let top = Path::new("/sys/fs/cgroup");
    let hierarchies = names(top).into_iter().map(|n| top.join(n)).chain([top.to_owned()]);
    let made = karst_host::cgroup::Cgroups::detect().map(|c| c.dirs(name)).unwrap_or_default();
    let all: BTreeSet<PathBuf> = hierarchies.map(|h| h.join(name)).chain(made).collect();
    // Controllers that are mounted together have one directory under several names.
    let mut seen = BTreeSet::new();
    all.into_iter()
        .filter(|p| std::fs::metadata(p).is_ok_and(|m| m.is_dir() && seen.insert((m.dev(), m.ino()))))
        .collect()
}

/// Programs of guests.
const PROGRAMS: &[&str] =
    &["karst-keeper", "qemu-system-", "lxc-start", "[lxc monitor]", "swtpm", "virtiofsd"];

/// Programs of guests that are not known to run: their command line names the guest's directory.
fn stray_processes(root: &Path, of_running: &dyn Fn(&str) -> bool) -> Vec<String> {
    let guests = root.join("guests").to_string_lossy().into_owned();
    let processes = names(Path::new("/proc")).into_iter().filter_map(|n| n.parse::<u32>().ok());
    processes
        .filter_map(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            let program = line.split('/').any(|part| PROGRAMS.iter().any(|p| part.starts_with(p)));
            (program && line.contains(&guests) && !of_running(&line))
                .then(|| format!("process {pid}: {}", line.trim()))
        })
        .collect()
}
