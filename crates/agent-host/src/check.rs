//! Compares what the agent keeps with what the machine has.

use crate::{
    RealAgent,
    agent::{WORKER, blocking},
    registry::GuestRecord,
};
use karst_agent::{SelfCheck, names::interface_prefix};
use karst_guest::GuestDriver;
use karst_model::{InstanceId, Result, instance::RuntimeState};
use std::{
    collections::{BTreeMap, BTreeSet},
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
            let driver: &Arc<dyn GuestDriver> = self.driver(record.kind)?;
            if !matches!(driver.observe(*id).await?.state, RuntimeState::Stopped | RuntimeState::Error) {
                running.insert(*id);
            }
            if !check.volumes.contains(&record.root) {
                check.leaks.push(format!("guest {id} without its root volume"));
            }
        }
        let on_disk = self.registry.guests()?;
        check.leaks.extend(
            on_disk
                .iter()
                .filter(|(id, _)| !guests.contains_key(id))
                .map(|(id, _)| format!("state directory of an unknown guest {id}")),
        );
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
        let found = blocking(move || Ok(look(&root, &daemon, &pools, &guests, &running))).await?;
        check.leaks.extend(found);
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
    leaks.extend(names(&root.join("staging")).into_iter().map(|n| format!("staged part {n}")));

    let prefix = interface_prefix(daemon_id);
    let used: BTreeSet<&String> =
        running.iter().filter_map(|id| guests.get(id)).flat_map(|r| &r.interfaces).collect();
    let links = names(Path::new("/sys/class/net")).into_iter();
    let stray = links.filter(|n| n.starts_with(&prefix) && n.len() == 15 && !used.contains(n));
    leaks.extend(stray.map(|n| format!("interface {n}")));

    let of_running = |text: &str| running.iter().any(|id| text.contains(&id.0.to_string()));
    for group in control_groups(&format!("karst-{daemon_id}")) {
        let stray = names(&group).into_iter().filter(|n| looks_like_an_id(n) && !of_running(n));
        leaks.extend(stray.map(|n| format!("control group {}/{n}", group.display())));
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let places = mounts.lines().filter_map(|l| l.split(' ').nth(4)).map(PathBuf::from);
    // A pool's own mount, or one of its volumes where each is a file system.
    let of_pool = |p: &Path| {
        let Ok(below) = p.strip_prefix(root.join("pools")) else { return false };
        let mut parts = below.iter().filter_map(|part| part.to_str());
        let known = parts.next().is_some_and(|id| pools.iter().any(|n| n == id));
        match (known, parts.next(), parts.next(), parts.next()) {
            (known, None, _, _) => known,
            (known, Some("volumes" | "work"), Some(id), None) => known && looks_like_an_id(id),
            _ => false,
        }
    };
    let stray = places.filter(|p| p.starts_with(root) && !of_running(&p.to_string_lossy()) && !of_pool(p));
    leaks.extend(stray.map(|p| format!("mount {}", p.display())));
    leaks.extend(stray_processes(root, &of_running));
    leaks
}

fn looks_like_an_id(name: &str) -> bool {
    name.get(..36).is_some_and(|id| id.parse::<uuid::Uuid>().is_ok())
}

/// Groups of this daemon: at the top of each hierarchy.
fn control_groups(name: &str) -> Vec<PathBuf> {
    let top = Path::new("/sys/fs/cgroup");
    let hierarchies = names(top).into_iter().map(|n| top.join(n)).chain([top.to_owned()]);
    hierarchies.map(|h| h.join(name)).filter(|p| p.is_dir()).collect()
}

/// Keepers whose guest is not known to run: their command line names its directory.
fn stray_processes(root: &Path, of_running: &dyn Fn(&str) -> bool) -> Vec<String> {
    let guests = root.join("guests").to_string_lossy().into_owned();
    let processes = names(Path::new("/proc")).into_iter().filter_map(|n| n.parse::<u32>().ok());
    processes
        .filter_map(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            (line.contains(&guests) && line.contains("karst-keeper") && !of_running(&line))
                .then(|| format!("process {pid}: {}", line.trim()))
        })
        .collect()
}
