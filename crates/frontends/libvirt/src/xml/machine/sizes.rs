//! How much memory a machine has and can have, and how many processors: `<memory>`, `<currentMemory>`, `<vcpu>` and `<vcpus>`.
//! Processors are in use from the first one on, without gaps.

use super::{Machine, read, refuse, tuning, wrong};
use crate::{
    error::VirError,
    xml::{Element, domain::ranges},
};
use karst_model::{Config, maximum};

/// CPUs of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpus {
    /// At the start.
    pub current: u32,
    /// That it can have.
    pub most: u32,
}

/// What its balloon leaves a machine that has so many KiB.
///
/// # Errors
/// XML error.
pub fn memory(root: &Element, memory: u64, balloon: bool) -> Result<u64, VirError> {
    // As with libvirt: none is all of it, and so is more than there is.
    let said = root.find("currentMemory").filter(|e| balloon && e.body().trim() != "0");
    let Some(now) = said.map(read::kib).transpose()? else { return Ok(memory) };
    // What is of whole MiB had been rounded up.
    Ok(if now > memory.saturating_sub(1024) { memory } else { now })
}

/// How many CPUs a `<vcpu>` means, and those of the host that it pins them to.
///
/// # Errors
/// XML error.
pub fn vcpu(e: &Element) -> Result<(Cpus, Option<String>), VirError> {
    let most: u32 =
        e.body().trim().parse().ok().filter(|n| *n > 0).ok_or_else(|| wrong("vcpu is no number of CPUs"))?;
    let current = match e.attribute("current") {
        None => most,
        Some(n) => n
            .parse()
            .ok()
            .filter(|n| (1..=most).contains(n))
            .ok_or_else(|| wrong(format!("current vcpus '{n}' must be 1 to {most}")))?,
    };
    // The host chooses them: what the document names beside counts for nothing, as with libvirt.
    let named = e.attribute("cpuset").filter(|_| e.attribute("placement") != Some("auto"));
    let pinned = named.map(|text| -> Result<String, VirError> {
        let set = tuning::set(text).ok_or_else(|| wrong(format!("Invalid value '{text}' of vcpu cpuset")))?;
        Ok(ranges(&set))
    });
    Ok((Cpus { current, most }, pinned.transpose()?))
}

/// How many of so many CPUs a `<vcpus>` has in use; nothing of one that names none.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED for one that leaves a gap.
pub fn vcpus(e: &Element, most: u32) -> Result<Option<u32>, VirError> {
    // Those that are not named are not in use.
    let mut used = std::collections::BTreeSet::new();
    let mut named = false;
    for one in e.all("vcpu") {
        named = true;
        let id: u32 = one
            .attribute("id")
            .and_then(|id| id.parse().ok())
            .ok_or_else(|| wrong("a <vcpu> of <vcpus> has no id, or none that is a number"))?;
        if id >= most {
            return Err(wrong(format!("vcpu id '{id}' is out of range of maximum vcpu count")));
        }
        for name in ["enabled", "hotpluggable"] {
            let value = one.attribute(name);
            if !matches!(value, Some("yes" | "no")) && (value.is_some() || name == "enabled") {
                return Err(wrong(format!("{name} of vcpu '{id}' is yes or no")));
            }
        }
        match one.attribute("enabled") {
            Some("yes") => used.insert(id),
            _ => used.remove(&id),
        };
    }
    if !named {
        return Ok(None);
    }
    let count = used.len() as u32;
    if !used.contains(&0) {
        return Err(wrong("vcpu 0 can't be offline"));
    }
    match used.last() == Some(&(count - 1)) {
        true => Ok(Some(count)),
        false => Err(refuse("vcpus", "processors are in use from the first one on, without gaps")),
    }
}

/// The CPUs that a domain says, and those of the host that they are pinned to.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub fn cpus(root: &Element) -> Result<(Cpus, Option<String>), VirError> {
    let (said, pinned) = root.find("vcpu").map_or(Ok((Cpus { current: 1, most: 1 }, None)), vcpu)?;
    // Which are in use is said by each, where that is said at all.
    let each = root.find("vcpus").map(|e| vcpus(e, said.most)).transpose()?.flatten();
    Ok((Cpus { current: each.unwrap_or(said.current), ..said }, pinned))
}

/// Does what was written of each CPU still hold?
pub fn still(kept: &Element, now: Cpus) -> bool {
    vcpus(kept, now.most).is_ok_and(|count| count.is_none_or(|count| count == now.current))
}

/// A `<vcpu>`; `chosen`: the host chooses the CPUs.
pub fn shown(now: Cpus, pinned: Option<&String>, chosen: bool) -> Element {
    let placement = if chosen { "auto" } else { "static" };
    let e = Element::text("vcpu", now.most).with("placement", placement).with_some("cpuset", pinned);
    e.with_some("current", (now.current < now.most).then_some(now.current))
}

fn less(machine: &Machine) -> (bool, bool) {
    // The places of a topology are said by that.
    let places = machine.cpus < machine.most_cpus && machine.board.topology.is_none();
    (machine.current < machine.memory, places)
}

/// The most that a machine can have, as keys: of a new one, or of one that is there. Where one of them had to be said it stays said,
/// so that no profile says another.
pub fn change(config: &mut Config, old: Option<&Machine>, new: &Machine) {
    let (memory, places) = less(new);
    let (had_memory, had_places) = old.map(less).unwrap_or_default();
    let said = |config: &Config, key: &str| config.contains_key(key);
    let memory = memory || had_memory || said(config, maximum::MEMORY);
    let places = new.board.topology.is_none() && (places || had_places || said(config, maximum::CPUS));
    for (key, value) in [
        (maximum::MEMORY, memory.then(|| format!("{}KiB", new.memory))),
        (maximum::CPUS, places.then(|| new.most_cpus.to_string())),
    ] {
        match value {
            Some(value) => drop(config.insert(key.to_owned(), value)),
            None => drop(config.remove(key)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml::read::document;

    fn of(text: &str) -> Result<(Cpus, Option<String>), VirError> {
        cpus(&document(&format!("<domain>{text}</domain>")).unwrap())
    }

    #[test]
    fn processors_are_in_use_from_the_first_on() {
        let some = |current, most| Ok((Cpus { current, most }, None));
        assert_eq!(of(""), some(1, 1));
        assert_eq!(of("<vcpu>4</vcpu>"), some(4, 4));
        assert_eq!(of("<vcpu current='2'>4</vcpu>"), some(2, 4));
        assert_eq!(of("<vcpu current='2'>4</vcpu><vcpus/>"), some(2, 4));
        let each = "<vcpu id='0' enabled='yes' hotpluggable='no' order='1'/><vcpu id='1' enabled='yes' hotpluggable='yes'/>\
            <vcpu id='2' enabled='yes'/><vcpu id='3' enabled='no'/>";
        assert_eq!(of(&format!("<vcpu current='1'>4</vcpu><vcpus>{each}</vcpus>")), some(3, 4));
        for (vcpus, word) in [
            ("<vcpu id='0' enabled='yes'/><vcpu id='2' enabled='yes'/>", "vcpus: "),
            ("<vcpu id='1' enabled='yes'/>", "vcpu 0 can't be offline"),
            ("<vcpu id='4' enabled='yes'/>", "vcpu id '4' is out of range"),
            ("<vcpu id='0'/>", "enabled of vcpu '0'"),
            ("<vcpu id='0' enabled='maybe'/>", "enabled of vcpu '0'"),
            ("<vcpu id='0' enabled='yes' hotpluggable='x'/>", "hotpluggable of vcpu '0'"),
            ("<vcpu enabled='yes'/>", "has no id"),
        ] {
            let e = of(&format!("<vcpu>4</vcpu><vcpus>{vcpus}</vcpus>")).unwrap_err();
            assert!(e.text.contains(word), "{vcpus}: {e:?}");
        }
        for text in ["<vcpu current='0'>4</vcpu>", "<vcpu current='5'>4</vcpu>", "<vcpu>0</vcpu>"] {
            assert!(of(text).is_err(), "{text}");
        }
        let kept = document(&format!("<vcpus>{each}</vcpus>")).unwrap();
        assert!(still(&kept, Cpus { current: 3, most: 4 }) && !still(&kept, Cpus { current: 2, most: 4 }));
        assert!(!still(&kept, Cpus { current: 3, most: 3 }));
        let text = shown(Cpus { current: 2, most: 4 }, Some(&"0-1".to_owned()), false).document();
        assert_eq!(text.trim(), "<vcpu placement='static' cpuset='0-1' current='2'>4</vcpu>");
        assert_eq!(
            shown(Cpus { current: 4, most: 4 }, None, false).document().trim(),
            "<vcpu placement='static'>4</vcpu>"
        );
    }

    #[test]
    fn a_balloon_leaves_what_is_said_of_the_memory() {
        let of = |text: &str, balloon: bool| {
            memory(&document(&format!("<domain>{text}</domain>")).unwrap(), 262_144, balloon)
        };
        assert_eq!(of("", true), Ok(262_144));
        assert_eq!(of("<currentMemory unit='MiB'>128</currentMemory>", true), Ok(131_072));
        // More than there is, nothing, and what was rounded up.
        for all in ["1048576", "0", "262144", "261121"] {
            assert_eq!(of(&format!("<currentMemory>{all}</currentMemory>"), true), Ok(262_144), "{all}");
        }
        assert_eq!(of("<currentMemory>261120</currentMemory>", true), Ok(261_120));
        assert_eq!(of("<currentMemory>1</currentMemory>", false), Ok(262_144), "nothing would hold it");
        assert!(of("<currentMemory>x</currentMemory>", true).is_err());
    }
}
