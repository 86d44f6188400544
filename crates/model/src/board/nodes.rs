//! What is said of single nodes of a machine's memory: how they are had of the host, on which of its nodes, and how far they are
//! apart. Lists are in the order of their nodes.

use super::{number, wrong};
use crate::{ByteSize, Result};
use serde::{Deserialize, Serialize};

pub(super) const CELLS: &str = "hardware.numa.memory";
pub(super) const HOST: &str = "hardware.numa.host";
pub(super) const DISTANCES: &str = "hardware.numa.distances";

/// How a node's memory is had of the host, where that is not as with the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct CellMemory {
    /// Others whom QEMU hands it to see what is written there, or do not.
    pub shared: Option<bool>,
    /// It is in huge pages of this size.
    pub pages: Option<ByteSize>,
}

/// How memory keeps to nodes of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodePolicy {
    /// It is there or nowhere.
    Bind,
    /// It is there where it can be.
    Preferred,
    /// It is on them in turn.
    Interleave,
}

/// Names of the policies as users write them, which are QEMU's.
pub const NODE_POLICIES: &[(&str, NodePolicy)] = &[
    ("bind", NodePolicy::Bind),
    ("preferred", NodePolicy::Preferred),
    ("interleave", NodePolicy::Interleave),
];

impl NodePolicy {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        NODE_POLICIES.iter().find(|(_, value)| *value == self).map_or("bind", |(name, _)| name)
    }
}

/// Where on the host a node's memory is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostNodes {
    /// How strictly.
    pub policy: NodePolicy,
    /// The nodes of the host, sorted ranges of first and last.
    pub nodes: Vec<(u32, u32)>,
}

/// How far a node is from another, in tenths of what is near.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Distance {
    /// The one.
    pub from: u32,
    /// The other.
    pub to: u32,
    /// 10 to 254.
    pub value: u8,
}

/// `0=TEXT;1=TEXT`, each node once.
fn by_node<T>(key: &str, text: &str, one: impl Fn(&str) -> Result<T>) -> Result<Vec<(u32, T)>> {
    let mut all: Vec<(u32, T)> = vec![];
    for part in text.split(';') {
        let odd = || wrong(key, format!("{part:?}: write the number of a node, =, and what is said of it"));
        let (node, text) = part.trim().split_once('=').ok_or_else(odd)?;
        all.push((number(key, node)?, one(text)?));
    }
    all.sort_by_key(|(node, _)| *node);
    match all.windows(2).all(|w| w[0].0 < w[1].0) {
        true => Ok(all),
        false => Err(wrong(key, "a node is named once")),
    }
}

fn written<T>(all: &[(u32, T)], one: impl Fn(&T) -> String) -> Option<String> {
    let part = |(node, value): &(u32, T)| format!("{node}={}", one(value));
    (!all.is_empty()).then(|| all.iter().map(part).collect::<Vec<_>>().join(";"))
}

/// `0=shared;1=private+hugepages=2MiB`.
pub(super) fn cells(text: &str) -> Result<Vec<(u32, CellMemory)>> {
    by_node(CELLS, text, |text| {
        let mut found = CellMemory::default();
        for word in text.split('+') {
            match word.trim().split_once('=').unwrap_or((word.trim(), "")) {
                ("shared", "") => found.shared = Some(true),
                ("private", "") => found.shared = Some(false),
                ("hugepages", size) => {
                    let size = ByteSize::parse(&format!("config.{CELLS}"), size)?;
                    if ![ByteSize::mib(2), ByteSize::gib(1)].contains(&size) {
                        return Err(wrong(CELLS, "huge pages have 2MiB or 1GiB"));
                    }
                    found.pages = Some(size);
                }
                _ => {
                    let text = format!("{word:?} is not there; shared, private and hugepages=2MiB are");
                    return Err(wrong(CELLS, text));
                }
            }
        }
        Ok(found)
    })
}

pub(super) fn cells_text(all: &[(u32, CellMemory)]) -> Option<String> {
    written(all, |cell| {
        let shared = cell.shared.map(|on| if on { "shared" } else { "private" }.to_owned());
        let pages = cell.pages.map(|size| format!("hugepages={}MiB", size.bytes() >> 20));
        shared.into_iter().chain(pages).collect::<Vec<_>>().join("+")
    })
}

/// `0=bind:0-1;1=preferred:3`.
pub(super) fn host(text: &str) -> Result<Vec<(u32, HostNodes)>> {
    by_node(HOST, text, |text| {
        let odd = || {
            wrong(
                HOST,
                format!("{text:?}: write bind, preferred or interleave and nodes of the host, bind:0-1"),
            )
        };
        let (policy, nodes) = text.split_once(':').ok_or_else(odd)?;
        let policy =
            NODE_POLICIES.iter().find(|(name, _)| *name == policy).map(|(_, p)| *p).ok_or_else(odd)?;
        let nodes = super::parse_ranges(nodes).ok_or_else(odd)?;
        if nodes.last().is_some_and(|(_, last)| *last > 127) {
            return Err(wrong(HOST, "a host has the nodes 0 to 127 at most"));
        }
        Ok(HostNodes { policy, nodes })
    })
}

pub(super) fn host_text(all: &[(u32, HostNodes)]) -> Option<String> {
    written(all, |one| format!("{}:{}", one.policy.as_str(), super::ranges(&one.nodes)))
}

/// `0-1=21,0-2=31`.
pub(super) fn distances(text: &str) -> Result<Vec<Distance>> {
    let mut all = vec![];
    for part in text.split(',') {
        let odd = || {
            wrong(DISTANCES, format!("{part:?}: write two nodes and their distance, 10 to 254, as in 0-1=21"))
        };
        let (pair, value) = part.trim().split_once('=').ok_or_else(odd)?;
        let (from, to) = pair.split_once('-').ok_or_else(odd)?;
        let value = value.parse().ok().filter(|v| (10..=254).contains(v)).ok_or_else(odd)?;
        all.push(Distance { from: number(DISTANCES, from)?, to: number(DISTANCES, to)?, value });
    }
    all.sort_unstable();
    match all.windows(2).all(|w| (w[0].from, w[0].to) < (w[1].from, w[1].to)) {
        true => Ok(all),
        false => Err(wrong(DISTANCES, "each pair has one distance")),
    }
}

pub(super) fn distances_text(all: &[Distance]) -> Option<String> {
    super::joined(all, |d| format!("{}-{}={}", d.from, d.to, d.value))
}
