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

#[cfg(test)]
mod tests {
    use super::*;

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
