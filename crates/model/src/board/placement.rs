//! On which nodes of its host a machine is, where the host chooses them, and how its memory keeps to the nodes that it has there.

use super::{NODE_POLICIES, NodePolicy, word, wrong};
use crate::{Config, Result, keys::set};
use serde::{Deserialize, Serialize};

pub(super) const PLACEMENT: &str = "hardware.numa.placement";
pub(super) const POLICY: &str = "hardware.numa.policy";

/// What of a machine its host chooses nodes for, at each start: those with the most memory that is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Placement {
    /// Its processors run on theirs.
    pub cpu: bool,
    /// Its memory is on them.
    pub memory: bool,
}

const PLACEMENTS: &[(&str, Placement)] = &[
    ("cpu", Placement { cpu: true, memory: false }),
    ("memory", Placement { cpu: false, memory: true }),
    ("both", Placement { cpu: true, memory: true }),
];

impl Placement {
    /// Is nothing chosen?
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    pub(super) fn parse(text: &str) -> Result<Self> {
        word(PLACEMENT, text, PLACEMENTS)
    }

    pub(super) fn text(self) -> Option<String> {
        PLACEMENTS.iter().find(|(_, known)| *known == self).map(|(name, _)| (*name).to_owned())
    }
}

/// `bind` is how memory keeps to nodes without a word.
pub(super) fn policy(text: &str) -> Result<Option<NodePolicy>> {
    Ok(Some(word(POLICY, text, NODE_POLICIES)?).filter(|p| *p != NodePolicy::Bind))
}

/// Does it fit what limits say of nodes?
pub(super) fn demand_sense(config: &Config, placement: Placement, policy: Option<NodePolicy>) -> Result<()> {
    let nodes = set(config, "limits.memory.nodes").is_some();
    if placement.memory && nodes {
        return Err(wrong(
            PLACEMENT,
            "limits.memory.nodes names the nodes of its memory; unset one of the two",
        ));
    }
    let named = set(config, "limits.cpu").is_some_and(|v| v.parse::<u32>().is_err());
    if placement.cpu && (named || set(config, "limits.cpu.nodes").is_some()) {
        let text = "limits.cpu or limits.cpu.nodes says where its processors are; unset one of the two";
        return Err(wrong(PLACEMENT, text));
    }
    match policy.is_some() && !nodes && !placement.memory {
        true => Err(wrong(
            POLICY,
            "is of the nodes that limits.memory.nodes names, or that hardware.numa.placement=memory finds",
        )),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::Board;

    fn of(pairs: &[(&str, &str)]) -> Result<Board> {
        Board::of(&pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect())
    }

    #[test]
    fn what_the_host_chooses_is_not_said_twice() {
        let board = of(&[(PLACEMENT, "both"), (POLICY, "interleave"), ("limits.cpu", "2")]).unwrap();
        assert_eq!(board.placement, Placement { cpu: true, memory: true });
        assert_eq!(board.numa_policy, Some(NodePolicy::Interleave));
        let keys = board.keys();
        assert!(
            keys.contains(&(PLACEMENT, Some("both".into())))
                && keys.contains(&(POLICY, Some("interleave".into())))
        );
        assert_eq!(serde_json::from_str::<Board>(&serde_json::to_string(&board).unwrap()).unwrap(), board);
        let spread = of(&[(POLICY, "preferred"), ("limits.memory.nodes", "0"), (PLACEMENT, "cpu")]).unwrap();
        assert_eq!((spread.numa_policy, spread.placement.memory), (Some(NodePolicy::Preferred), false));
        assert_eq!(of(&[(POLICY, "bind")]).unwrap().numa_policy, None, "as memory keeps to nodes anyway");
        for (pairs, key) in [
            (&[(PLACEMENT, "some")][..], PLACEMENT),
            (&[(PLACEMENT, "memory"), ("limits.memory.nodes", "0")], PLACEMENT),
            (&[(PLACEMENT, "both"), ("limits.cpu.nodes", "0")], PLACEMENT),
            (&[(PLACEMENT, "cpu"), ("limits.cpu", "0-1")], PLACEMENT),
            (&[(POLICY, "interleave")], POLICY),
            (&[(POLICY, "interleave"), (PLACEMENT, "cpu")], POLICY),
            (&[(POLICY, "strict"), ("limits.memory.nodes", "0")], POLICY),
        ] {
            assert_eq!(of(pairs).unwrap_err().field, Some(format!("config.{key}")), "{pairs:?}");
        }
    }
}
