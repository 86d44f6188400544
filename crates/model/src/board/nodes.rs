//! What is said of single nodes of a machine's memory: how they are had of the host, on which of its nodes, and how far they are
//! apart. Lists are in the order of their nodes.

use super::{number, wrong};
use crate::{ByteSize, Result};
use serde::{Deserialize, Serialize};

pub(super) const CELLS: &str = "hardware.numa.memory";
pub(super) const HOST: &str = "hardware.numa.host";
pub(super) const DISTANCES: &str = "hardware.numa.distances";
pub(super) const SLOTS: &str = "hardware.memory.slots";
pub(super) const MODULES: &str = "hardware.memory.modules";

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

/// Room for memory that is in modules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slots {
    /// Modules at most.
    pub slots: u32,
    /// All memory of the machine at most, whole MiB.
    pub most: ByteSize,
}

/// A module of memory, beside what the nodes have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Module {
    /// Its size, whole MiB.
    pub size: ByteSize,
    /// The node that it is of.
    pub node: u32,
    /// Its slot; the first that is free.
    #[serde(default)]
    pub slot: Option<u32>,
    /// How it is had of the host, where that is not as with the rest.
    #[serde(default)]
    pub memory: CellMemory,
    /// Where on the host it is.
    #[serde(default)]
    pub host: Option<HostNodes>,
}

/// Whole MiB, at least one.
fn whole(key: &str, text: &str) -> Result<ByteSize> {
    let size = ByteSize::parse(&format!("config.{key}"), text)?;
    match size.bytes() > 0 && size.bytes().is_multiple_of(1 << 20) {
        true => Ok(size),
        false => Err(wrong(key, format!("{text:?} is no multiple of 1MiB"))),
    }
}

/// `16:64GiB`.
pub(super) fn slots(text: &str) -> Result<Slots> {
    let odd =
        || wrong(SLOTS, format!("{text:?}: write 1 to 256 modules and all memory at most, as in 16:64GiB"));
    let (slots, most) = text.split_once(':').ok_or_else(odd)?;
    let slots = slots.parse().ok().filter(|n| (1..=256).contains(n)).ok_or_else(odd)?;
    Ok(Slots { slots, most: whole(SLOTS, most)? })
}

pub(super) fn slots_text(one: Slots) -> String {
    format!("{}:{}MiB", one.slots, one.most.bytes() >> 20)
}

/// `512MiB@0+slot=2;1GiB@1+shared+hugepages=2MiB+bind:0-1`.
pub(super) fn modules(text: &str) -> Result<Vec<Module>> {
    let one = |part: &str| {
        let odd = || {
            let why = "write its size and node, and with + slot=, shared, private, hugepages=2MiB and nodes of the host, as in \
                       512MiB@0+slot=1+bind:0-1";
            wrong(MODULES, format!("{part:?}: {why}"))
        };
        let mut words = part.split('+').map(str::trim);
        let (size, node) = words.next().unwrap_or_default().split_once('@').ok_or_else(odd)?;
        let mut found = Module {
            size: whole(MODULES, size)?,
            node: number(MODULES, node)?,
            slot: None,
            memory: CellMemory::default(),
            host: None,
        };
        for word in words {
            match word.strip_prefix("slot=") {
                Some(n) => found.slot = Some(number(MODULES, n)?),
                None if word.contains(':') => found.host = Some(place(MODULES, word)?),
                None => cell_word(MODULES, word, &mut found.memory)?,
            }
        }
        Ok(found)
    };
    text.split(';').map(|part| one(part.trim())).collect()
}

pub(super) fn modules_text(all: &[Module]) -> Option<String> {
    let one = |m: &Module| {
        let mut words = vec![format!("{}MiB@{}", m.size.bytes() >> 20, m.node)];
        words.extend(m.slot.map(|n| format!("slot={n}")));
        words.extend(cell_words(&m.memory));
        words.extend(m.host.as_ref().map(place_text));
        words.join("+")
    };
    (!all.is_empty()).then(|| all.iter().map(one).collect::<Vec<_>>().join(";"))
}

/// Do modules fit into their room, and belong to nodes that are there?
pub(super) fn demand_room(all: &[Module], room: Option<Slots>, cells: &[super::NumaCell]) -> Result<()> {
    if all.is_empty() {
        return Ok(());
    }
    let Some(room) = room else {
        return Err(wrong(MODULES, "there is no room for them; set hardware.memory.slots"));
    };
    let sizes = cells.iter().map(|c| c.memory).chain(all.iter().map(|m| m.size));
    let whole = sizes.fold(0u64, |all, size| all.saturating_add(size.bytes()));
    let mut taken: Vec<u32> = all.iter().filter_map(|m| m.slot).collect();
    taken.sort_unstable();
    let beyond = taken.last().is_some_and(|n| *n >= room.slots) || all.len() > room.slots as usize;
    let text = match () {
        () if all.iter().any(|m| m.node as usize >= cells.len()) => "a module is of a node of hardware.numa",
        () if beyond => "hardware.memory.slots has fewer slots",
        () if taken.windows(2).any(|w| w[0] == w[1]) => "two modules are in one slot",
        () if whole > room.most.bytes() => "hardware.memory.slots has less room than nodes and modules need",
        () => return Ok(()),
    };
    Err(wrong(MODULES, text))
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

fn cell_word(key: &str, word: &str, found: &mut CellMemory) -> Result<()> {
    match word.split_once('=').unwrap_or((word, "")) {
        ("shared", "") => found.shared = Some(true),
        ("private", "") => found.shared = Some(false),
        ("hugepages", size) => {
            let size = ByteSize::parse(&format!("config.{key}"), size)?;
            if ![ByteSize::mib(2), ByteSize::gib(1)].contains(&size) {
                return Err(wrong(key, "huge pages have 2MiB or 1GiB"));
            }
            found.pages = Some(size);
        }
        _ => {
            let text = format!("{word:?} is not there; shared, private and hugepages=2MiB are");
            return Err(wrong(key, text));
        }
    }
    Ok(())
}

fn cell_words(cell: &CellMemory) -> Vec<String> {
    let shared = cell.shared.map(|on| if on { "shared" } else { "private" }.to_owned());
    let pages = cell.pages.map(|size| format!("hugepages={}MiB", size.bytes() >> 20));
    shared.into_iter().chain(pages).collect()
}

/// `0=shared;1=private+hugepages=2MiB`.
pub(super) fn cells(text: &str) -> Result<Vec<(u32, CellMemory)>> {
    by_node(CELLS, text, |text| {
        let mut found = CellMemory::default();
        text.split('+').try_for_each(|word| cell_word(CELLS, word.trim(), &mut found))?;
        Ok(found)
    })
}

pub(super) fn cells_text(all: &[(u32, CellMemory)]) -> Option<String> {
    written(all, |cell| cell_words(cell).join("+"))
}

/// `bind:0-1`.
fn place(key: &str, text: &str) -> Result<HostNodes> {
    let odd = || {
        wrong(key, format!("{text:?}: write bind, preferred or interleave and nodes of the host, bind:0-1"))
    };
    let (policy, nodes) = text.split_once(':').ok_or_else(odd)?;
    let policy = NODE_POLICIES.iter().find(|(name, _)| *name == policy).map(|(_, p)| *p).ok_or_else(odd)?;
    let nodes = super::parse_ranges(nodes).ok_or_else(odd)?;
    match nodes.last().is_some_and(|(_, last)| *last > 127) {
        true => Err(wrong(key, "a host has the nodes 0 to 127 at most")),
        false => Ok(HostNodes { policy, nodes }),
    }
}

fn place_text(one: &HostNodes) -> String {
    format!("{}:{}", one.policy.as_str(), super::ranges(&one.nodes))
}

/// `0=bind:0-1;1=preferred:3`.
pub(super) fn host(text: &str) -> Result<Vec<(u32, HostNodes)>> {
    by_node(HOST, text, |text| place(HOST, text))
}

pub(super) fn host_text(all: &[(u32, HostNodes)]) -> Option<String> {
    written(all, place_text)
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
        let value: u8 = value.parse().ok().filter(|v| (10..=254).contains(v)).ok_or_else(odd)?;
        let (from, to) = (number(DISTANCES, from)?, number(DISTANCES, to)?);
        if from == to && value != 10 {
            return Err(wrong(DISTANCES, "a node is 10 from itself"));
        }
        all.push(Distance { from, to, value });
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
