//! A table of nftables as data: what is wanted, and the transaction that leads there from what is.
//!
//! A change of one guest's port must not write the rules of a thousand others anew, nor forget the connections that the
//! kernel remembers in dynamic sets: so the difference is applied, chain by chain and element by element.

use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

/// A chain: its hook, if it has one, and rules.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Chain {
    pub hook: Option<String>,
    pub rules: Vec<String>,
}

/// A set or map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Set {
    /// `set` or `map`.
    pub kind: &'static str,
    /// `type ifname; flags interval;`
    pub header: String,
    /// The kernel fills it; its elements are left alone.
    pub dynamic: bool,
    pub elements: BTreeSet<String>,
}

/// A table.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Table {
    pub family: &'static str,
    pub name: String,
    pub chains: BTreeMap<String, Chain>,
    pub sets: BTreeMap<String, Set>,
}

impl Table {
    pub fn new(family: &'static str, name: String) -> Self {
        Self { family, name, ..Default::default() }
    }

    pub fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.sets.is_empty()
    }

    /// A base chain.
    pub fn base(&mut self, name: &str, hook: &str) -> &mut Vec<String> {
        let chain = self.chains.entry(name.to_owned()).or_default();
        chain.hook = Some(hook.to_owned());
        &mut chain.rules
    }

    /// A chain without a hook.
    pub fn chain(&mut self, name: &str) -> &mut Vec<String> {
        &mut self.chains.entry(name.to_owned()).or_default().rules
    }

    fn new_set(
        &mut self,
        kind: &'static str,
        name: &str,
        header: &str,
        dynamic: bool,
    ) -> &mut BTreeSet<String> {
        let set = Set { kind, header: header.to_owned(), dynamic, elements: BTreeSet::new() };
        &mut self.sets.entry(name.to_owned()).or_insert(set).elements
    }

    pub fn set(&mut self, name: &str, header: &str) -> &mut BTreeSet<String> {
        self.new_set("set", name, header, false)
    }

    pub fn map(&mut self, name: &str, header: &str) -> &mut BTreeSet<String> {
        self.new_set("map", name, header, false)
    }

    pub fn dynamic(&mut self, name: &str, header: &str) {
        self.new_set("set", name, header, true);
    }

    fn at(&self) -> String {
        format!("{} {}", self.family, self.name)
    }

    fn declare_chain(&self, text: &mut String, name: &str) {
        let hook = self.chains[name].hook.as_ref().map(|h| format!(" {{ type {h}; }}")).unwrap_or_default();
        let _ = writeln!(text, "add chain {} {name}{hook}", self.at());
    }

    fn declare_set(&self, text: &mut String, name: &str) {
        let set = &self.sets[name];
        let _ = writeln!(text, "add {} {} {name} {{ {} }}", set.kind, self.at(), set.header);
    }

    fn fill(&self, text: &mut String, verb: &str, name: &str, elements: &[&String]) {
        // nft's parser is quick with long lists and slow with many commands.
        for part in elements.chunks(2000) {
            let list: Vec<&str> = part.iter().map(|e| e.as_str()).collect();
            let _ = writeln!(text, "{verb} element {} {name} {{ {} }}", self.at(), list.join(", "));
        }
    }

    fn rules(&self, text: &mut String, name: &str) {
        for rule in &self.chains[name].rules {
            let _ = writeln!(text, "add rule {} {name} {rule}", self.at());
        }
    }

    /// The transaction that makes the table anew, whatever stands in it now (`there`, as nft lists it); what the kernel
    /// remembers in dynamic sets stays.
    pub fn replace(&self, there: &[Value]) -> String {
        let at = self.at();
        if self.is_empty() {
            return if there.is_empty() {
                String::new()
            } else {
                format!("add table {at}\ndelete table {at}\n")
            };
        }
        let mut text = format!("add table {at}\n");
        if !there.is_empty() {
            let _ = writeln!(text, "flush table {at}");
        }
        for kind in ["map", "set"] {
            for set in there.iter().filter_map(|o| o.get(kind)) {
                let Some(name) = set["name"].as_str() else { continue };
                let keeps = self.sets.get(name).is_some_and(|s| s.dynamic) && is_dynamic(set);
                if !keeps {
                    let _ = writeln!(text, "delete {kind} {at} {name}");
                }
            }
        }
        for chain in there.iter().filter_map(|o| o["chain"]["name"].as_str()) {
            let _ = writeln!(text, "delete chain {at} {chain}");
        }
        self.chains.keys().for_each(|c| self.declare_chain(&mut text, c));
        self.sets.keys().for_each(|s| self.declare_set(&mut text, s));
        self.chains.keys().for_each(|c| self.rules(&mut text, c));
        for (name, set) in &self.sets {
            self.fill(&mut text, "add", name, &set.elements.iter().collect::<Vec<_>>());
        }
        text
    }

    /// The transaction that leads from `before`, which is in the kernel, to this; `None` when only [`Table::replace`] does.
    pub fn change(&self, before: &Self) -> Option<String> {
        if self == before {
            return Some(String::new());
        }
        if before.is_empty() || self.is_empty() {
            return None;
        }
        let at = self.at();
        for (name, chain) in &self.chains {
            if before.chains.get(name).is_some_and(|old| old.hook != chain.hook) {
                return None;
            }
        }
        for (name, set) in &self.sets {
            if before.sets.get(name).is_some_and(|old| old.header != set.header || old.kind != set.kind) {
                return None;
            }
        }
        let mut text = String::new();
        let fresh = |c: &&String| !before.chains.contains_key(*c);
        self.chains.keys().filter(fresh).for_each(|c| self.declare_chain(&mut text, c));
        self.sets
            .keys()
            .filter(|s| !before.sets.contains_key(*s))
            .for_each(|s| self.declare_set(&mut text, s));
        for (name, chain) in &self.chains {
            match before.chains.get(name) {
                Some(old) if old == chain => continue,
                Some(old) if !old.rules.is_empty() => {
                    let _ = writeln!(text, "flush chain {at} {name}");
                }
                _ => {}
            }
            self.rules(&mut text, name);
        }
        for (name, set) in self.sets.iter().filter(|(_, s)| !s.dynamic) {
            let none = BTreeSet::new();
            let old = before.sets.get(name).map_or(&none, |s| &s.elements);
            self.fill(&mut text, "delete", name, &old.difference(&set.elements).collect::<Vec<_>>());
            self.fill(&mut text, "add", name, &set.elements.difference(old).collect::<Vec<_>>());
        }
        // What goes is emptied first, so that nothing that goes refers to another that does.
        let gone: Vec<&String> = before.chains.keys().filter(|c| !self.chains.contains_key(*c)).collect();
        for chain in &gone {
            let _ = writeln!(text, "flush chain {at} {chain}");
        }
        for (name, set) in before.sets.iter().filter(|(n, _)| !self.sets.contains_key(*n)) {
            let _ = writeln!(text, "delete {} {at} {name}", set.kind);
        }
        for chain in &gone {
            let _ = writeln!(text, "delete chain {at} {chain}");
        }
        Some(text)
    }
}

fn is_dynamic(set: &Value) -> bool {
    set["flags"].as_array().is_some_and(|f| f.iter().any(|x| x == "dynamic"))
}

/// A listing without what changes by itself: handles, and what the kernel remembers.
pub(crate) fn comparable(listing: &[Value]) -> Vec<Value> {
    let objects = listing.iter().filter(|o| o.get("metainfo").is_none()).cloned();
    objects
        .map(|mut object| {
            for value in object.as_object_mut().into_iter().flat_map(|o| o.values_mut()) {
                let dynamic = is_dynamic(value);
                if let Some(fields) = value.as_object_mut() {
                    fields.remove("handle");
                    if dynamic {
                        fields.remove("elem");
                    }
                }
            }
            object
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(ports: &[&str], chains: &[(&str, &str)]) -> Table {
        let mut t = Table::new("bridge", "karst_x".into());
        t.base("prerouting", "filter hook prerouting priority -200").push("iifname vmap @from".into());
        for (name, rule) in chains {
            t.chain(name).push((*rule).to_owned());
        }
        let map = t.map("from", "type ifname : verdict;");
        map.extend(ports.iter().map(|p| (*p).to_owned()));
        t.dynamic("est", "type ipv4_addr; flags dynamic,timeout;");
        t
    }

    #[test]
    fn differences() {
        let one = table(&["\"a\" : goto p1"], &[("p1", "drop")]);
        let two = table(&["\"a\" : goto p1", "\"b\" : goto p2"], &[("p1", "drop"), ("p2", "accept")]);
        insta::assert_snapshot!(two.change(&one).unwrap(), @r#"
        add chain bridge karst_x p2
        add rule bridge karst_x p2 accept
        add element bridge karst_x from { "b" : goto p2 }
        "#);
        let three = table(&["\"b\" : goto p2"], &[("p2", "drop")]);
        insta::assert_snapshot!(three.change(&two).unwrap(), @r#"
        flush chain bridge karst_x p2
        add rule bridge karst_x p2 drop
        delete element bridge karst_x from { "a" : goto p1 }
        flush chain bridge karst_x p1
        delete chain bridge karst_x p1
        "#);
        assert_eq!(three.change(&three).unwrap(), "");
        assert!(three.change(&Table::new("bridge", "karst_x".into())).is_none());
    }

    #[test]
    fn a_replacement_keeps_what_the_kernel_remembers() {
        let there = [
            serde_json::json!({"set": {"name": "est", "flags": ["timeout", "dynamic"], "elem": ["10.0.0.1"]}}),
            serde_json::json!({"map": {"name": "old"}}),
            serde_json::json!({"chain": {"name": "p9"}}),
        ];
        let text = table(&[], &[("p1", "drop")]).replace(&there);
        assert!(!text.contains("delete set") && text.contains("delete map bridge karst_x old"), "{text}");
        assert!(text.contains("delete chain bridge karst_x p9") && text.contains("flush table"), "{text}");
        assert!(!comparable(&there)[0].to_string().contains("10.0.0.1"));
        assert_eq!(Table::new("inet", "x".into()).replace(&[]), "");
    }
}
