//! On which nodes of the host a machine is, where its keys leave that to the host, or spread its memory over them.

use karst_guest::ResolvedGuest;
use karst_host::numa;
use karst_model::board::{Board, HostNodes};
use serde::{Deserialize, Serialize};

/// What was found for a machine when it started, for as long as it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub(crate) struct Placed {
    /// Nodes that were chosen for its processors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cpu: Option<Vec<u32>>,
    /// Those of its memory: chosen, or said where it is spread over them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) memory: Option<Vec<u32>>,
}

impl Placed {
    /// For a machine with so much memory and so many processors, as the host is now. A host without nodes has no choice.
    pub(crate) fn of(guest: &ResolvedGuest, memory: u64, cpus: u32) -> Self {
        let Some(board) = guest.machine.as_ref().map(|m| &m.board) else { return Self::default() };
        let wanted = board.placement;
        let chosen = if wanted.is_none() { None } else { numa::with_room(memory, cpus) };
        let said = guest.limits.memory_nodes.clone().filter(|_| board.numa_policy.is_some());
        Self { memory: if wanted.memory { chosen.clone() } else { said }, cpu: chosen.filter(|_| wanted.cpu) }
    }

    /// The nodes that a machine's control group keeps its memory to: none where QEMU spreads it, which it may only do beyond them.
    pub(crate) fn limit(&self, guest: &ResolvedGuest) -> Option<Vec<u32>> {
        match guest.machine.as_ref().and_then(|m| m.board.numa_policy) {
            Some(_) => None,
            None => guest.limits.memory_nodes.clone().or_else(|| self.memory.clone()),
        }
    }

    /// A board on which all memory that is nowhere in particular is spread as it is said. That of a machine without nodes of its own is
    /// that of a first one.
    pub(crate) fn spread(&self, mut board: Board) -> Board {
        let (Some(policy), Some(nodes)) = (board.numa_policy, &self.memory) else { return board };
        let host = HostNodes { policy, nodes: nodes.iter().map(|n| (*n, *n)).collect() };
        for node in 0..board.numa.len().max(1) as u32 {
            if !board.numa_host.iter().any(|(n, _)| *n == node) {
                board.numa_host.push((node, host.clone()));
            }
        }
        board.numa_host.sort_by_key(|(node, _)| *node);
        for module in &mut board.modules {
            module.host.get_or_insert_with(|| host.clone());
        }
        board
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::board::NodePolicy;

    fn board(pairs: &[(&str, &str)]) -> Board {
        let more = [("limits.memory.nodes", "0-1"), ("hardware.numa.policy", "interleave")];
        Board::of(&more.iter().chain(pairs).map(|(k, v)| (k.to_string(), v.to_string())).collect()).unwrap()
    }

    #[test]
    fn memory_without_a_place_is_spread() {
        let placed = Placed { cpu: None, memory: Some(vec![0, 1]) };
        let plain = placed.spread(board(&[]));
        assert_eq!(plain.numa_host.len(), 1);
        assert_eq!(
            plain.numa_host[0].1,
            HostNodes { policy: NodePolicy::Interleave, nodes: vec![(0, 0), (1, 1)] }
        );
        let cells = board(&[("hardware.numa", "0:64MiB;1:64MiB;:64MiB"), ("hardware.numa.host", "1=bind:3")]);
        let cells = placed.spread(cells);
        let policies: Vec<_> = cells.numa_host.iter().map(|(n, host)| (*n, host.policy)).collect();
        let spread = NodePolicy::Interleave;
        assert_eq!(policies, [(0, spread), (1, NodePolicy::Bind), (2, spread)]);
        let none = Placed::default();
        assert_eq!(none.spread(board(&[])), board(&[]), "a host without nodes has none to spread it over");
    }
}
