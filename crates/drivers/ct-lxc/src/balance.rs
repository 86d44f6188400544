//! Containers that may use so many CPUs (`limits.cpu=2`) get a set of that size, of those with the fewest others on them; the
//! sets are chosen anew when a container starts, stops or is changed, and when CPUs come or go. Containers pinned to a set
//! keep it and count as load.
//!
//! What a container was given is the file `cpus` in its state directory, so that a new process of the daemon goes on with
//! it. What it has now is what its control group says: nothing is written that is there already.

use crate::limits::Place;
use karst_host::cgroup::{Cgroups, parse_cpus};
use karst_model::{InstanceId, Result, spec::CpuLimit};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, Weak},
    time::Duration,
};
use tokio::sync::Notify;

const FILE: &str = "cpus";
const ONLINE: &str = "/sys/devices/system/cpu/online";
/// How often CPUs are counted: only a listener to the kernel's device events would be told.
const LOOK: Duration = Duration::from_secs(15);

/// A container to be balanced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) limit: CpuLimit,
    /// Out of these (those of its NUMA nodes); all when absent.
    pub(crate) within: Option<Vec<u32>>,
    /// What it has now.
    pub(crate) now: Vec<u32>,
}

/// Chooses a set for every container that has a count, out of the `online` CPUs; `None`: all of them.
///
/// The largest choose first. Each takes the CPUs with the fewest containers on them; among equals those that it has, so
/// that nothing moves without need, then the lowest.
pub(crate) fn choose(
    online: &[u32],
    all: &BTreeMap<InstanceId, Load>,
) -> BTreeMap<InstanceId, Option<Vec<u32>>> {
    let mut load: BTreeMap<u32, u32> = online.iter().map(|cpu| (*cpu, 0)).collect();
    let mut counted: Vec<(u32, InstanceId, &Load)> = vec![];
    for (id, container) in all {
        match &container.limit {
            CpuLimit::Set { cpus } => {
                for cpu in cpus {
                    load.entry(*cpu).and_modify(|n| *n += 1);
                }
            }
            CpuLimit::Count { n } => counted.push((*n, *id, container)),
        }
    }
    counted.sort_by_key(|(n, id, _)| (std::cmp::Reverse(*n), *id));
    let mut chosen = BTreeMap::new();
    for (n, id, container) in counted {
        let within = |cpu: &u32| container.within.as_ref().is_none_or(|w| w.contains(cpu));
        let mut cpus: Vec<u32> = load.keys().copied().filter(within).collect();
        if n as usize >= load.len() && cpus.len() == load.len() || cpus.is_empty() {
            // On all of them, it makes none worse than another. Where all of its own are gone it has any.
            chosen.insert(id, None);
            continue;
        }
        cpus.sort_by_key(|cpu| (load[cpu], !container.now.contains(cpu), *cpu));
        cpus.truncate(n as usize);
        cpus.sort_unstable();
        for cpu in &cpus {
            load.entry(*cpu).and_modify(|n| *n += 1);
        }
        chosen.insert(id, Some(cpus));
    }
    chosen
}

/// What is noted of a container.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Noted {
    #[serde(flatten)]
    limit: CpuLimit,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    within: Option<Vec<u32>>,
}

/// Notes what a container may have, before it starts and when that changes.
pub(crate) fn note(state_dir: &Path, place: &Place) -> Result<()> {
    let file = state_dir.join(FILE);
    match place.limit.clone() {
        Some(limit) => {
            let noted = Noted { limit, within: place.within.clone() };
            karst_guest::keeper::write_private(&file, &serde_json::to_vec(&noted)?)
        }
        None => match std::fs::remove_file(file) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
            _ => Ok(()),
        },
    }
}

/// What a container with a count is given until it is balanced: what it has, where that is of the right size.
pub(crate) fn keep(place: &Place, wanted: &mut Option<Vec<u32>>, cgroups: &Cgroups, group: &str) {
    if let (Some(CpuLimit::Count { n }), Some(now)) = (&place.limit, cgroups.cpus(group))
        && wanted.is_some()
        && now.len() == *n as usize
        && place.within.as_ref().is_none_or(|w| now.iter().all(|cpu| w.contains(cpu)))
    {
        *wanted = Some(now);
    }
}

/// Balances the containers of a daemon.
#[derive(Debug)]
pub(crate) struct Balancer {
    cgroups: Arc<Cgroups>,
    guests: PathBuf,
    daemon_id: String,
    changed: Notify,
    running: Mutex<bool>,
}

impl Balancer {
    pub(crate) fn new(cgroups: Arc<Cgroups>, guests: PathBuf, daemon_id: String) -> Arc<Self> {
        Arc::new(Self { cgroups, guests, daemon_id, changed: Notify::new(), running: Mutex::default() })
    }

    /// Something started, stopped or changed.
    pub(crate) fn wake(self: &Arc<Self>) {
        self.changed.notify_one();
        let mut running = self.running.lock().unwrap_or_else(|e| e.into_inner());
        if !std::mem::replace(&mut *running, true) {
            tokio::spawn(follow(Arc::downgrade(self)));
        }
    }

    fn containers(&self) -> BTreeMap<InstanceId, Load> {
        let entries = std::fs::read_dir(&self.guests).into_iter().flatten().flatten();
        let load = |entry: std::fs::DirEntry| {
            let id: InstanceId = entry.file_name().to_str()?.parse().ok()?;
            let noted: Noted = serde_json::from_slice(&std::fs::read(entry.path().join(FILE)).ok()?).ok()?;
            // Without its group it does not run.
            let now = self.cgroups.cpus(&self.group(id))?;
            Some((id, Load { limit: noted.limit, within: noted.within, now }))
        };
        entries.filter_map(load).collect()
    }

    fn group(&self, id: InstanceId) -> String {
        crate::config::Groups::of(&self.daemon_id, id).limits
    }

    /// Blocks: a few small files for each container.
    fn balance(&self) {
        let online = parse_cpus(&std::fs::read_to_string(ONLINE).unwrap_or_default());
        let containers = self.containers();
        for (id, wanted) in choose(&online, &containers) {
            let now: BTreeSet<u32> = containers[&id].now.iter().copied().collect();
            let set: BTreeSet<u32> = wanted.as_ref().unwrap_or(&online).iter().copied().collect();
            if now == set {
                continue;
            }
            // Groups come and go below it, which the kernel may refuse the first time.
            let limit = || self.cgroups.limit_cpus(&self.group(id), wanted.as_deref());
            match limit().or_else(|_| limit()).or_else(|_| limit()) {
                Ok(()) => tracing::debug!(instance = %id, cpus = ?set, "balanced"),
                // It may have ended at this moment.
                Err(_) if self.cgroups.cpus(&self.group(id)).is_none() => {}
                Err(e) => {
                    tracing::warn!(instance = %id, error = %e, context = e.context, "CPUs could not be balanced");
                }
            }
        }
    }
}

async fn follow(weak: Weak<Balancer>) {
    let mut known = String::new();
    loop {
        let Some(balancer) = weak.upgrade() else { return };
        let told = tokio::time::timeout(LOOK, balancer.changed.notified()).await.is_ok();
        let online = std::fs::read_to_string(ONLINE).unwrap_or_default();
        if told || online != known {
            known = online;
            let work = balancer.clone();
            if tokio::task::spawn_blocking(move || work.balance()).await.is_err() {
                tracing::warn!("balancing CPUs was broken off");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u128) -> InstanceId {
        InstanceId(uuid::Uuid::from_u128(n))
    }

    fn count(n: u32, now: &[u32]) -> Load {
        Load { limit: CpuLimit::Count { n }, within: None, now: now.to_vec() }
    }

    fn pinned(cpus: &[u32]) -> Load {
        Load { limit: CpuLimit::Set { cpus: cpus.to_vec() }, within: None, now: cpus.to_vec() }
    }

    fn of(all: &[(u128, Load)]) -> BTreeMap<InstanceId, Load> {
        all.iter().map(|(n, l)| (id(*n), l.clone())).collect()
    }

    fn sets(online: &[u32], all: &[(u128, Load)]) -> Vec<Option<Vec<u32>>> {
        choose(online, &of(all)).into_values().collect()
    }

    #[test]
    fn the_least_used_are_taken_and_pins_are_respected() {
        let online = [0, 1, 2, 3];
        assert_eq!(
            sets(&online, &[(1, count(2, &[])), (2, count(2, &[]))]),
            [Some(vec![0, 1]), Some(vec![2, 3])]
        );
        // Two are pinned to the first CPUs: who is counted goes elsewhere, and the pins are nobody's to change.
        let all = [(1, pinned(&[0, 1])), (2, pinned(&[1])), (3, count(2, &[0, 1])), (4, count(1, &[]))];
        assert_eq!(sets(&online, &all), [Some(vec![2, 3]), Some(vec![0])]);
        // As many as there are, or more, is no limit, and burdens nobody.
        assert_eq!(
            sets(&online, &[(1, count(4, &[])), (2, count(9, &[])), (3, count(1, &[]))])[2],
            Some(vec![0])
        );
        // A pin to a CPU that is gone counts for nothing.
        assert_eq!(sets(&[4, 6], &[(1, pinned(&[5])), (2, count(1, &[]))]), [Some(vec![4])]);
        assert_eq!(sets(&[], &[(1, count(1, &[]))]), [None]);
    }

    #[test]
    fn those_of_a_node_stay_there() {
        let online = [0, 1, 2, 3];
        let on = |n, cpus: &[u32]| Load { within: Some(cpus.to_vec()), ..count(n, &[]) };
        assert_eq!(
            sets(&online, &[(1, on(1, &[2, 3])), (2, on(1, &[2, 3])), (3, count(1, &[]))]),
            [Some(vec![2]), Some(vec![3]), Some(vec![0])]
        );
        // More than the node has is all of the node; a node that is gone holds nobody.
        assert_eq!(sets(&online, &[(1, on(9, &[2, 3])), (2, on(1, &[7]))]), [Some(vec![2, 3]), None]);
        // What an earlier version noted is understood.
        let old: Noted = serde_json::from_str(r#"{"kind":"count","n":2}"#).unwrap();
        assert_eq!((old.limit, old.within), (CpuLimit::Count { n: 2 }, None));
    }

    #[test]
    fn nothing_moves_without_need() {
        let online = [0, 1, 2, 3];
        let two = |a: &[u32], b: &[u32]| sets(&online, &[(1, count(2, a)), (2, count(2, b))]);
        assert_eq!(two(&[1, 3], &[0, 2]), [Some(vec![1, 3]), Some(vec![0, 2])]);
        // One of them has stopped meanwhile, and one CPU went: only what must moves.
        assert_eq!(sets(&online, &[(2, count(2, &[0, 2]))]), [Some(vec![0, 2])]);
        assert_eq!(sets(&[0, 1, 3], &[(2, count(2, &[0, 2]))]), [Some(vec![0, 1])]);
    }

    #[test]
    fn loads_differ_by_one_at_most() {
        for cpus in 1..9u32 {
            let online: Vec<u32> = (0..cpus).map(|n| n * 3).collect();
            for containers in 0..12u128 {
                let all: Vec<_> =
                    (0..containers).map(|n| (n + 1, count(1 + (n as u32 * 7) % cpus, &[]))).collect();
                let mut load = vec![0; cpus as usize];
                for (id, set) in choose(&online, &of(&all)) {
                    let n = 1 + ((id.0.as_u128() - 1) as u32 * 7) % cpus;
                    assert_eq!(set.is_none(), n == cpus);
                    for cpu in set.iter().flatten() {
                        load[(cpu / 3) as usize] += 1;
                    }
                    assert!(set.is_none_or(|s| s.len() == n as usize));
                }
                let (least, most) = (load.iter().min().unwrap(), load.iter().max().unwrap());
                assert!(most - least <= 1, "{cpus} CPUs, {containers} containers: {load:?}");
            }
        }
    }
}
