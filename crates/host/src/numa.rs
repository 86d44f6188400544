//! NUMA nodes: which CPUs belong to which, as `/sys/devices/system/node` shows it.

use crate::cgroup::parse_cpus;
use karst_model::{Error, Result};
use std::{collections::BTreeSet, path::Path};

/// The CPUs of these nodes, sorted.
///
/// # Errors
/// Invalid, naming the first node that this host does not have or that has no CPUs.
pub fn cpus_of(nodes: &[u32]) -> Result<Vec<u32>> {
    below(Path::new("/sys/devices/system/node"), nodes)
}

fn below(root: &Path, nodes: &[u32]) -> Result<Vec<u32>> {
    let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
    let mut all = BTreeSet::new();
    for node in nodes {
        // Those that are online.
        let cpus = parse_cpus(&read(&root.join(format!("node{node}/cpulist"))));
        if cpus.is_empty() {
            let there = read(&root.join("has_cpu"));
            return Err(Error::invalid(
                "config.limits.cpu.nodes",
                format!(
                    "names node {node}, which has no CPUs here; those of this host that have: {}",
                    there.trim()
                ),
            ));
        }
        all.extend(cpus);
    }
    Ok(all.into_iter().collect())
}

/// Nodes of this host for a guest that needs so much memory and so many CPUs: those with the most memory that is free or a cache's,
/// as few as will do, sorted. All that have memory where they will not do; `None` where the kernel knows of none.
pub fn with_room(memory: u64, cpus: u32) -> Option<Vec<u32>> {
    choose(Path::new("/sys/devices/system/node"), memory, cpus)
}

fn choose(root: &Path, memory: u64, cpus: u32) -> Option<Vec<u32>> {
    let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
    let room = |node: u32| {
        let told = read(&root.join(format!("node{node}/meminfo")));
        // `Node 0 MemFree:  123 kB`
        let kib = |name: &str| {
            let line = told
                .lines()
                .find_map(|l| l.split_once(name)?.1.trim().strip_suffix("kB")?.trim().parse().ok());
            line.unwrap_or(0u64)
        };
        kib(" MemFree:")
            .saturating_add(kib(" Active(file):"))
            .saturating_add(kib(" Inactive(file):"))
            .saturating_mul(1024)
    };
    let mut all: Vec<(u64, u32)> =
        parse_cpus(&read(&root.join("has_memory"))).into_iter().map(|node| (room(node), node)).collect();
    // The fullest last; of those that are as full the lower number first.
    all.sort_by_key(|(room, node)| (std::cmp::Reverse(*room), *node));
    let (mut chosen, mut bytes, mut processors) = (vec![], 0u64, 0usize);
    for (room, node) in all {
        if bytes >= memory && processors >= cpus as usize && !chosen.is_empty() {
            break;
        }
        bytes = bytes.saturating_add(room);
        processors += parse_cpus(&read(&root.join(format!("node{node}/cpulist")))).len();
        chosen.push(node);
    }
    // One whose nodes have no processors could run nowhere.
    chosen.sort_unstable();
    Some(chosen).filter(|nodes| !nodes.is_empty() && processors > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nodes_with_the_most_room_are_chosen() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(choose(root.path(), 1, 1), None);
        for (node, cpus, free, cache) in [(0, "0-1", 100, 0), (1, "2-3", 50, 250), (2, "4-5", 200, 0)] {
            let dir = root.path().join(format!("node{node}"));
            std::fs::create_dir(&dir).unwrap();
            std::fs::write(dir.join("cpulist"), cpus).unwrap();
            let told = format!(
                "Node {node} MemTotal:  9999 kB\nNode {node} MemFree:  {free} kB\nNode {node} Active(file):  0 kB\n\
                 Node {node} Inactive(file):  {cache} kB\n"
            );
            std::fs::write(dir.join("meminfo"), told).unwrap();
        }
        std::fs::write(root.path().join("has_memory"), "0-2\n").unwrap();
        let of = |kib: u64, cpus: u32| choose(root.path(), kib * 1024, cpus).unwrap();
        assert_eq!(of(250, 1), [1], "what a cache holds can be had");
        assert_eq!(of(350, 1), [1, 2]);
        assert_eq!(of(10, 3), [1, 2], "with as many processors");
        assert_eq!(of(9999, 1), [0, 1, 2]);
    }

    #[test]
    fn nodes_are_sets_of_cpus() {
        let root = tempfile::tempdir().unwrap();
        for (node, cpus) in [(0, "0-1,4\n"), (1, "2-3\n"), (2, "\n")] {
            let dir = root.path().join(format!("node{node}"));
            std::fs::create_dir(&dir).unwrap();
            std::fs::write(dir.join("cpulist"), cpus).unwrap();
        }
        std::fs::write(root.path().join("has_cpu"), "0-1\n").unwrap();
        assert_eq!(below(root.path(), &[1, 0]).unwrap(), [0, 1, 2, 3, 4]);
        assert_eq!(below(root.path(), &[1]).unwrap(), [2, 3]);
        for missing in [2, 7] {
            let e = below(root.path(), &[0, missing]).unwrap_err();
            assert!(e.message.contains(&format!("node {missing}")) && e.message.ends_with("0-1"), "{e}");
        }
    }
}
