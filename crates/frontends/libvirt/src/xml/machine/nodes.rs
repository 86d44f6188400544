//! What a domain says of single nodes of its machine's memory ([`karst_model::board::CellMemory`] and its like), both ways: the
//! pages of each in `<memoryBacking>`, who sees it and how far it is from others in `<cpu>`, and where on the host it is in
//! `<numatune>`.

use super::{refuse, tuning, wrong};
use crate::{
    error::VirError,
    xml::{Element, domain, machine::read::kib},
};
use karst_model::{
    ByteSize,
    board::{
        Board, CellMemory, Distance, HostNodes, Module, NodePolicy, Placement, Slots, parse_ranges, ranges,
    },
};
use std::collections::BTreeMap;

/// A set such as `1-2,5-7,^6` as ranges; nothing of what is none.
fn set(text: &str) -> Option<Vec<(u32, u32)>> {
    parse_ranges(&domain::ranges(&tuning::set(text)?))
}

/// The size of a page, whatever its unit; nothing of one that processors do not have.
pub fn page(e: &Element) -> Option<ByteSize> {
    let size = Element::text("page", e.attribute("size")?).with("unit", e.attribute("unit").unwrap_or("KiB"));
    let size = kib(&size).ok().filter(|kib| kib.is_multiple_of(1024)).map(|kib| ByteSize::mib(kib / 1024))?;
    [ByteSize::mib(2), ByteSize::gib(1)].contains(&size).then_some(size)
}

/// Is it a page as all memory has them? libvirt takes it for the word that there are no huge ones.
pub fn is_small(e: &Element) -> bool {
    let Some(text) = e.attribute("size") else { return false };
    let size = Element::text("page", text).with("unit", e.attribute("unit").unwrap_or("KiB"));
    kib(&size).is_ok_and(|kib| kib == 4)
}

/// Can its huge pages be had: of one size for all, and of another for single nodes?
pub fn is_possible(hugepages: &Element) -> bool {
    let all = hugepages.elements();
    let whole = all.iter().filter(|p| p.attribute("nodeset").is_none()).count();
    let mut seen = vec![];
    let good = |p: &Element| {
        let nodes = match p.attribute("nodeset") {
            None => Some(vec![]),
            Some(text) => tuning::set(text),
        };
        let Some(nodes) = nodes else { return false };
        let again = nodes.iter().any(|n| seen.contains(n));
        seen.extend(nodes);
        let known = |(name, _): (&str, &str)| matches!(name, "size" | "unit" | "nodeset");
        let small = p.attribute("nodeset").is_none() && is_small(p);
        !again && p.name() == "page" && p.attributes().all(known) && (small || page(p).is_some())
    };
    whole <= 1 && all.iter().all(good)
}

/// The pages of single nodes that a `<memoryBacking>` says.
pub fn pages(backing: &Element) -> Vec<(u32, ByteSize)> {
    let mut all = vec![];
    for e in backing.find("hugepages").map(Element::elements).unwrap_or_default() {
        let nodes = e.attribute("nodeset").and_then(tuning::set).unwrap_or_default();
        all.extend(page(e).into_iter().flat_map(|size| nodes.iter().map(move |n| (*n, size))));
    }
    all.sort_unstable_by_key(|(node, _)| *node);
    all
}

/// Those that a board has.
pub fn pages_of(board: &Board) -> Vec<(u32, ByteSize)> {
    board.numa_memory.iter().filter_map(|(node, cell)| Some((*node, cell.pages?))).collect()
}

/// They as `<page>`.
pub fn shown_pages(all: &[(u32, ByteSize)]) -> Vec<Element> {
    let mut by_size: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
    for (node, size) in all {
        by_size.entry(size.bytes()).or_default().push(*node);
    }
    let one = |(size, nodes): (u64, Vec<u32>)| {
        let e = Element::new("page").with("size", size / 1024).with("unit", "KiB");
        e.with("nodeset", domain::ranges(&nodes))
    };
    by_size.into_iter().map(one).collect()
}

/// What the cells of a `<cpu>` say beside processors and size: which are seen by others, or not, and distances.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Cells {
    /// By node.
    pub shared: Vec<(u32, bool)>,
    /// Of pairs of nodes.
    pub distances: Vec<Distance>,
}

fn id(e: &Element, name: &str, usual: Option<u32>) -> Result<u32, VirError> {
    match e.attribute(name) {
        Some(text) => {
            text.parse().map_err(|_| wrong(format!("'{name}' of <{}> is no number: '{text}'", e.name())))
        }
        None => usual.ok_or_else(|| wrong(format!("<{}> has no {name}", e.name()))),
    }
}

/// What a `<cpu>` says.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub fn cells(cpu: &Element) -> Result<Cells, VirError> {
    let mut found = Cells::default();
    for (n, e) in (0u32..).zip(cpu.find("numa").into_iter().flat_map(|numa| numa.all("cell"))) {
        let from = id(e, "id", Some(n))?;
        match e.attribute("memAccess") {
            None => {}
            Some("shared") => found.shared.push((from, true)),
            Some("private") => found.shared.push((from, false)),
            Some(other) => return Err(refuse("numa cell", format!("memAccess '{other}' is not there"))),
        }
        // Whether what is in the page cache is dropped at the end: no memory of Karst's machines is a file with a name.
        if let Some(other) = e.attribute("discard").filter(|d| !matches!(*d, "yes" | "no")) {
            return Err(refuse("numa cell", format!("discard '{other}' is not there")));
        }
        for sibling in e.find("distances").map(Element::elements).unwrap_or_default() {
            let value = id(sibling, "value", None)?;
            let value = u8::try_from(value).ok().filter(|v| (10..=254).contains(v));
            let value = value.ok_or_else(|| refuse("numa cell distances", "a distance is 10 to 254"))?;
            found.distances.push(Distance { from, to: id(sibling, "id", None)?, value });
        }
    }
    found.shared.sort_unstable_by_key(|(node, _)| *node);
    found.distances.sort_unstable();
    Ok(found)
}

/// What a board has of it.
pub fn cells_of(board: &Board) -> Cells {
    let shared = board.numa_memory.iter().filter_map(|(node, cell)| Some((*node, cell.shared?))).collect();
    Cells { shared, distances: board.numa_distances.clone() }
}

/// Says of a shown `<cell>` what its board has.
pub fn show_cell(cell: &mut Element, node: u32, board: &Board) {
    let all = cells_of(board);
    if let Some((_, shared)) = all.shared.iter().find(|(n, _)| *n == node) {
        cell.set("memAccess", if *shared { "shared" } else { "private" });
    }
    let from = all.distances.iter().filter(|d| d.from == node);
    let siblings: Vec<_> =
        from.map(|d| Element::new("sibling").with("id", d.to).with("value", d.value)).collect();
    if !siblings.is_empty() {
        cell.push(Element::new("distances").children(siblings));
    }
}

/// How a `<numatune>` wants the memory of a machine to keep to its nodes of the host; `None`: to no others.
///
/// # Errors
/// CONFIG_UNSUPPORTED, naming the mode.
pub fn policy(numatune: &Element) -> Result<Option<NodePolicy>, VirError> {
    match numatune.find("memory").and_then(|m| m.attribute("mode")).unwrap_or("strict") {
        "strict" | "restrictive" => Ok(None),
        "interleave" => Ok(Some(NodePolicy::Interleave)),
        "preferred" => Ok(Some(NodePolicy::Preferred)),
        other => Err(refuse("numatune mode", format!("'{other}' is not there"))),
    }
}

/// What a `<vcpu>` and a `<numatune>` leave to the host to choose: `placement='auto'`. Each of them means it too where it says nothing
/// and the other does, as libvirt has it.
///
/// # Errors
/// XML error for memory that is placed nowhere.
pub fn placement(vcpu: Option<&Element>, numatune: Option<&Element>) -> Result<Placement, VirError> {
    let memory = numatune.and_then(|n| n.find("memory"));
    let said = |e: Option<&Element>| e.and_then(|e| e.attribute("placement")).map(|word| word == "auto");
    let has = |e: Option<&Element>, name: &str| e.is_some_and(|e| e.attribute(name).is_some());
    let set = has(memory, "nodeset");
    let of_memory = said(memory).or(set.then_some(false));
    let cpu = said(vcpu).unwrap_or(of_memory == Some(true) && !has(vcpu, "cpuset"));
    let of_memory = of_memory.unwrap_or(cpu);
    match memory.is_some() && !of_memory && !set {
        true => Err(wrong("nodeset for NUMA memory tuning must be set if 'placement' is 'static'")),
        false => Ok(Placement { cpu, memory: of_memory }),
    }
}

/// Where a `<numatune>` wants single nodes.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub fn host(numatune: &Element) -> Result<Vec<(u32, HostNodes)>, VirError> {
    let mut all = vec![];
    for e in numatune.all("memnode") {
        let policy = match e.attribute("mode").unwrap_or("strict") {
            "strict" | "restrictive" => NodePolicy::Bind,
            "preferred" => NodePolicy::Preferred,
            "interleave" => NodePolicy::Interleave,
            other => {
                let text = format!(
                    "'{other}' is not there for single nodes; strict, restrictive, preferred and interleave are"
                );
                return Err(refuse("numatune memnode", text));
            }
        };
        let text = e.attribute("nodeset").unwrap_or_default();
        let nodes =
            set(text).ok_or_else(|| wrong(format!("invalid value '{text}' of nodeset in <memnode>")))?;
        all.push((id(e, "cellid", None)?, HostNodes { policy, nodes }));
    }
    all.sort_by_key(|(node, _)| *node);
    match all.windows(2).all(|w| w[0].0 < w[1].0) {
        true => Ok(all),
        false => Err(wrong("multiple memnode elements with the same cellid")),
    }
}

/// They as `<memnode>`.
pub fn shown_host(all: &[(u32, HostNodes)]) -> Vec<Element> {
    let one = |(node, host): &(u32, HostNodes)| {
        let mode = if host.policy == NodePolicy::Bind { "strict" } else { host.policy.as_str() };
        let e = Element::new("memnode").with("cellid", node).with("mode", mode);
        e.with("nodeset", ranges(&host.nodes))
    };
    all.iter().map(one).collect()
}

/// The least and the most threads of a pool.
pub type Pool = (Option<u32>, Option<u32>);

/// The threads that a `<defaultiothread>` says that QEMU's main one has for what blocks.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub fn main_pool(e: &Element) -> Result<Option<Pool>, VirError> {
    let of = |name: &str| e.attribute(name).map(|_| id(e, name, None)).transpose();
    if let Some((other, _)) =
        e.attributes().find(|(n, _)| !matches!(*n, "thread_pool_min" | "thread_pool_max"))
    {
        return Err(refuse("defaultiothread", format!("{other} is not there")));
    }
    let (least, most) = (of("thread_pool_min")?, of("thread_pool_max")?);
    let large = least.max(most).is_some_and(|n| n > 65_535) || most == Some(0);
    match large || least.is_some_and(|least| least > most.unwrap_or(64)) {
        true => {
            Err(wrong("thread_pool_min must be smaller or equal to thread_pool_max, which is 1 to 65535"))
        }
        false => Ok(Some((least, most)).filter(|pool| *pool != (None, None))),
    }
}

/// As an element.
pub fn shown_main_pool((least, most): Pool) -> Element {
    let e = Element::new("defaultiothread").with_some("thread_pool_min", least);
    e.with_some("thread_pool_max", most)
}

/// The room for modules that a `<maxMemory>` says.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub fn slots(e: &Element) -> Result<Slots, VirError> {
    let slots = id(e, "slots", None)?;
    if !(1..=256).contains(&slots) {
        return Err(refuse("maxMemory", format!("{slots} slots are not there; 1 to 256 are")));
    }
    Ok(Slots { slots, most: ByteSize::mib(kib(e)?.div_ceil(1024)) })
}

/// As an element.
pub fn shown_slots(one: Slots) -> Element {
    Element::text("maxMemory", one.most.bytes() / 1024).with("slots", one.slots).with("unit", "KiB")
}

/// What a `<memory>` among devices is.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub fn module(e: &Element) -> Result<Module, VirError> {
    if let Some(other) = e.attribute("model").filter(|m| *m != "dimm") {
        return Err(refuse("memory model", format!("'{other}' is not there; dimm is")));
    }
    let target = e.find("target").ok_or_else(|| wrong("missing target information for a memory module"))?;
    let part = |name: &str| target.find(name).ok_or_else(|| wrong(format!("a memory module has no {name}")));
    let node = part("node")?
        .body()
        .trim()
        .parse()
        .map_err(|_| wrong("the <node> of a memory module is no number"))?;
    if let Some(other) = target.elements().iter().find(|t| !matches!(t.name(), "size" | "node")) {
        return Err(refuse("memory target", format!("<{}> is not there", other.name())));
    }
    let mut memory = CellMemory::default();
    match e.attribute("access") {
        None => {}
        Some("shared") => memory.shared = Some(true),
        Some("private") => memory.shared = Some(false),
        Some(other) => return Err(refuse("memory access", format!("'{other}' is not there"))),
    }
    // As with nodes: no memory is a file with a name.
    if let Some(other) = e.attribute("discard").filter(|d| !matches!(*d, "yes" | "no")) {
        return Err(refuse("memory discard", format!("'{other}' is not there")));
    }
    let mut host = None;
    for part in e.find("source").map(Element::elements).unwrap_or_default() {
        let text = part.body().trim();
        match part.name() {
            "nodemask" => {
                let nodes = set(text).ok_or_else(|| wrong(format!("invalid value '{text}' of nodemask")))?;
                host = Some(HostNodes { policy: NodePolicy::Bind, nodes });
            }
            "pagesize" => {
                let size = Element::new("page").with("size", text);
                let size = page(&size.with("unit", part.attribute("unit").unwrap_or("KiB")));
                memory.pages =
                    Some(size.ok_or_else(|| refuse("memory source pagesize", "is 2 MiB or 1 GiB"))?);
            }
            other => return Err(refuse("memory source", format!("<{other}> is not there"))),
        }
    }
    let address = e.find("address").filter(|a| a.attribute("type") == Some("dimm"));
    let slot = match address.and_then(|a| a.attribute("slot")) {
        None => None,
        Some(_) => Some(id(address.unwrap_or(e), "slot", None)?),
    };
    Ok(Module { size: ByteSize::mib(kib(part("size")?)?.div_ceil(1024)), node, slot, memory, host })
}

/// As an element.
pub fn shown_module(one: &Module) -> Element {
    let access = one.memory.shared.map(|on| if on { "shared" } else { "private" });
    let mut e = Element::new("memory").with("model", "dimm").with_some("access", access);
    let mut source = Element::new("source");
    source.push_some(one.host.as_ref().map(|host| Element::text("nodemask", ranges(&host.nodes))));
    source
        .push_some(one.memory.pages.map(|s| Element::text("pagesize", s.bytes() / 1024).with("unit", "KiB")));
    if !source.elements().is_empty() {
        e.push(source);
    }
    let size = Element::text("size", one.size.bytes() / 1024).with("unit", "KiB");
    e.push(Element::new("target").child(size).child(Element::text("node", one.node)));
    e.push_some(one.slot.map(|n| Element::new("address").with("type", "dimm").with("slot", n)));
    e
}

/// How single nodes are had of the host, of both elements that say it.
pub fn memory(pages: &[(u32, ByteSize)], shared: &[(u32, bool)]) -> Vec<(u32, CellMemory)> {
    let mut all: BTreeMap<u32, CellMemory> = BTreeMap::new();
    for (node, size) in pages {
        all.entry(*node).or_default().pages = Some(*size);
    }
    for (node, on) in shared {
        all.entry(*node).or_default().shared = Some(*on);
    }
    all.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml::read::document;

    #[test]
    fn what_is_left_to_the_host_is_said_by_either_element() {
        let of = |vcpu: &str, memory: &str| {
            let root = document(&format!("<domain>{vcpu}<numatune>{memory}</numatune></domain>")).unwrap();
            let found = placement(root.find("vcpu"), root.find("numatune")).map_err(|e| e.text)?;
            Ok::<_, String>((found.cpu, found.memory))
        };
        let (auto, fixed) = ("<vcpu placement='auto'>2</vcpu>", "<vcpu placement='static'>2</vcpu>");
        for (vcpu, memory, wanted) in [
            ("<vcpu>2</vcpu>", "", (false, false)),
            (auto, "", (true, true)),
            (auto, "<memory mode='preferred'/>", (true, true)),
            (auto, "<memory nodeset='0'/>", (true, false)),
            (fixed, "<memory placement='auto'/>", (false, true)),
            (fixed, "<memory placement='auto' nodeset='3'/>", (false, true)),
            ("<vcpu>2</vcpu>", "<memory placement='auto'/>", (true, true)),
            ("<vcpu cpuset='0-1'>2</vcpu>", "<memory placement='auto'/>", (false, true)),
        ] {
            assert_eq!(of(vcpu, memory), Ok(wanted), "{vcpu}{memory}");
        }
        for memory in ["<memory/>", "<memory placement='static'/>"] {
            assert!(of(fixed, memory).unwrap_err().contains("nodeset"), "{memory}");
        }
    }

    #[test]
    fn pages_of_single_nodes() {
        let backing = |text: &str| {
            document(&format!("<memoryBacking><hugepages>{text}</hugepages></memoryBacking>")).unwrap()
        };
        let text = "<page size='2048' unit='KiB' nodeset='1'/><page size='1' unit='G' nodeset='0,2-3'/><page size='2048'/>";
        let given = backing(text);
        assert!(is_possible(given.find("hugepages").unwrap()));
        let (small, large) = (ByteSize::mib(2), ByteSize::gib(1));
        let found = pages(&given);
        assert_eq!(found, [(0, large), (1, small), (2, large), (3, large)]);
        let again = Element::new("hugepages").children(shown_pages(&found));
        assert_eq!(pages(&Element::new("memoryBacking").child(again)), found);
        for bad in [
            "<page size='2048'/><page size='1' unit='G'/>",
            "<page size='2048' nodeset='0'/><page size='2048' nodeset='0-1'/>",
            "<page size='2048' nodeset='x'/>",
            "<page size='4096' nodeset='0'/>",
        ] {
            assert!(!is_possible(backing(bad).find("hugepages").unwrap()), "{bad}");
        }
        // Pages as all memory has them are none that are huge.
        let usual = backing("<page size='4' unit='KiB'/><page size='2048' nodeset='1'/>");
        assert!(is_possible(usual.find("hugepages").unwrap()));
        assert_eq!(pages(&usual), [(1, small)]);
        assert_eq!(
            memory(&[(1, small)], &[(0, true), (1, false)]),
            [
                (0, CellMemory { shared: Some(true), pages: None }),
                (1, CellMemory { shared: Some(false), pages: Some(small) }),
            ]
        );
    }

    #[test]
    fn modules_are_read_and_shown_the_same() {
        let text = "<memory model='dimm' access='private'><source><nodemask>1-3</nodemask><pagesize unit='KiB'>2048</pagesize></source>\
            <target><size unit='KiB'>524288</size><node>0</node></target><address type='dimm' slot='2'/></memory>";
        let given = document(text).unwrap();
        let found = module(&given).unwrap();
        assert_eq!((found.size, found.slot), (ByteSize::mib(512), Some(2)));
        assert_eq!(shown_module(&found), given);
        let room = document("<maxMemory slots='16' unit='KiB'>4194304</maxMemory>").unwrap();
        assert_eq!(shown_slots(slots(&room).unwrap()), room);
        for (bad, word) in [
            ("<memory model='nvdimm'/>", "memory model: "),
            ("<memory model='dimm'/>", "missing target"),
            ("<memory model='dimm'><target><size>1</size></target></memory>", "a memory module has no node"),
            (
                "<memory model='dimm'><source><path>/x</path></source><target><size>1</size><node>0</node></target></memory>",
                "memory source: ",
            ),
            (
                "<memory model='dimm'><target><size>1</size><node>0</node><label/></target></memory>",
                "memory target: ",
            ),
        ] {
            let e = module(&document(bad).unwrap()).unwrap_err();
            assert!(e.text.starts_with(word), "{bad}: {}", e.text);
        }
    }

    #[test]
    fn cells_and_places_are_read_and_shown_the_same() {
        let text = "<cpu><numa><cell id='0' memAccess='shared' discard='yes'><distances><sibling id='1' value='21'/></distances></cell>\
            <cell id='1' memAccess='private'/><cell id='2'/></numa></cpu>";
        let found = cells(&document(text).unwrap()).unwrap();
        assert_eq!(found.shared, [(0, true), (1, false)]);
        assert_eq!(found.distances, [Distance { from: 0, to: 1, value: 21 }]);
        let board = Board {
            numa_memory: memory(&[], &found.shared),
            numa_distances: found.distances.clone(),
            ..Board::default()
        };
        let shown = (0..3).map(|n| {
            let mut e = Element::new("cell").with("id", n);
            show_cell(&mut e, n, &board);
            e
        });
        let shown = Element::new("cpu").child(Element::new("numa").children(shown));
        assert_eq!(cells(&shown).unwrap(), found);
        let text = "<numatune><memnode cellid='2' mode='strict' nodeset='1-2,5-7,^6'/><memory/>\
            <memnode cellid='0' mode='preferred' nodeset='3'/></numatune>";
        let found = host(&document(text).unwrap()).unwrap();
        assert_eq!(found[0], (0, HostNodes { policy: NodePolicy::Preferred, nodes: vec![(3, 3)] }));
        assert_eq!(found[1].1.nodes, [(1, 2), (5, 5), (7, 7)]);
        assert_eq!(host(&Element::new("numatune").children(shown_host(&found))).unwrap(), found);
        for bad in [
            "<memnode cellid='0' mode='near' nodeset='0'/>",
            "<memnode cellid='0' nodeset='x'/>",
            "<memnode nodeset='0'/>",
            "<memnode cellid='0' nodeset='0'/><memnode cellid='0' nodeset='1'/>",
        ] {
            assert!(host(&document(&format!("<numatune>{bad}</numatune>")).unwrap()).is_err(), "{bad}");
        }
    }
}
