//! Disks in layers in documents: the active one is the source, and `backingStore` has those below it, as libvirt shows them. A layer has the
//! path of a volume of its name in the pool, `/karst/POOL/NAME`.

use super::{Source, read::VOLUMES};
use crate::{
    error::VirError,
    xml::{Element, machine::refuse},
};

/// Path of a layer.
pub fn path(pool: &str, layer: &str) -> String {
    format!("{VOLUMES}{pool}/{layer}")
}

/// Paths of all files of a disk in layers, the active one first; of a disk that is one file, its own.
pub fn chain(pool: &str, volume: &str, layers: &[String]) -> Vec<String> {
    let lowest = [path(pool, volume)];
    layers.iter().rev().map(|layer| path(pool, layer)).chain(lowest).collect()
}

/// Lets a disk that is written show its layers (lowest first); of one that runs also what lies below the active one.
pub fn show(disk: &mut Element, source: Option<&Source>, layers: &[String], live: bool) {
    let (Some(Source::Volume { pool, volume }), false) = (source, layers.is_empty()) else { return };
    let chain = chain(pool, volume, layers);
    disk.set("type", "file");
    // What the lowest is depends on what it was made of, and counts nowhere.
    let format = |n: usize| if n + 1 < chain.len() { "qcow2" } else { "raw" };
    let mut below = Element::new("backingStore");
    for (n, path) in chain.iter().enumerate().skip(1).rev() {
        below = Element::new("backingStore")
            .with("type", "file")
            .with("index", n)
            .child(Element::new("format").with("type", format(n)))
            .child(Element::new("source").with("file", path))
            .child(below);
    }
    if let Some(driver) = disk.elements_mut().iter_mut().find(|e| e.name() == "driver") {
        driver.set("type", "qcow2");
    }
    let mut active = Element::new("source");
    if let Some(path) = chain.first() {
        active.set("file", path);
    }
    let all = disk.elements_mut();
    all.retain(|e| !matches!(e.name(), "source" | "backingStore"));
    let after = all.iter().position(|e| e.name() == "driver").map_or(0, |n| n + 1);
    all.insert(after, active);
    if live {
        all.insert(after + 1, below);
    }
}

/// Is that what [`show`] shows below a source? It is how the host keeps a disk, not what a document asks for.
fn is_shown(below: &Element) -> bool {
    let path = below.find("source").and_then(|s| s.attribute("file"));
    let rest = below.find("backingStore");
    path.is_some_and(|p| p.starts_with(VOLUMES))
        && rest.is_none_or(|e| e.elements().is_empty() || is_shown(e))
}

/// A disk as a document asks for it, without what was shown below its source.
pub fn without(disk: &mut Element) {
    disk.elements_mut().retain(|e| e.name() != "backingStore" || !is_shown(e));
}

/// The same of all disks of a domain.
pub fn without_all(domain: &mut Element) {
    let devices = domain.elements_mut().iter_mut().find(|e| e.name() == "devices");
    let disks = devices.into_iter().flat_map(|d| d.elements_mut().iter_mut());
    disks.filter(|e| e.name() == "disk").for_each(without);
}

/// The place of a file in a chain by what a client calls it: its path, `vda[2]`, or nothing. `from` is where one begins to look.
///
/// # Errors
/// Invalid argument, as libvirt says it.
pub fn place(
    chain: &[String],
    target: &str,
    from: usize,
    name: Option<&str>,
) -> Result<Option<usize>, VirError> {
    let start = chain.first().map(String::as_str).unwrap_or_default();
    let Some(name) = name.filter(|n| !n.is_empty()) else { return Ok(None) };
    let indexed = name.strip_suffix(']').and_then(|n| n.split_once('['));
    if let Some((disk, number)) = indexed {
        let number =
            number.parse::<usize>().ok().filter(|n| disk == target && *n >= from && *n < chain.len());
        let missing = || {
            let text = format!("could not find backing store index '{name}' in chain for '{start}'");
            VirError::argument(text)
        };
        return number.map(Some).ok_or_else(missing);
    }
    let found = chain.iter().enumerate().skip(from).find(|(_, path)| *path == name).map(|(n, _)| n);
    found.map(Some).ok_or_else(|| {
        VirError::argument(match from {
            0 => format!("could not find image '{name}' in chain for '{start}'"),
            n => format!("could not find image '{name}' beneath '{}' in chain for '{start}'", chain[n - 1]),
        })
    })
}

/// The name of a layer that a client wants at a path, in the pool of its disk.
///
/// # Errors
/// CONFIG_UNSUPPORTED for any other place.
pub fn named(target: &str, pool: &str, path: &str) -> Result<String, VirError> {
    let name = path.strip_prefix(VOLUMES).and_then(|p| p.split_once('/')).filter(|(p, _)| *p == pool);
    name.map(|(_, name)| name.to_owned()).ok_or_else(|| {
        refuse(
            "disk source",
            format!(
                "what {target} goes on in lies in the pool of the disk: a path like {VOLUMES}{pool}/NAME, where no volume of that \
                 name is; '{path}' is not there"
            ),
        )
    })
}

/// The path that libvirt gives a layer of which nobody says one: that of the active one, with the name of the snapshot instead of what is
/// behind its last dot.
pub fn beside(active: &str, snapshot: &str) -> String {
    let stem = active.rsplit_once('.').filter(|(_, end)| !end.contains('/')).map_or(active, |(stem, _)| stem);
    format!("{stem}.{snapshot}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    fn source() -> Source {
        Source::Volume { pool: "p".into(), volume: "instances/v1".into() }
    }

    fn disk() -> Element {
        Element::new("disk")
            .with("type", "volume")
            .child(Element::new("driver").with("name", "qemu"))
            .child(Element::new("source").with("pool", "p").with("volume", "instances/v1"))
            .child(Element::new("target").with("dev", "vda"))
    }

    #[test]
    fn the_active_layer_is_the_source_and_the_others_lie_below() {
        let layers = ["instances/v1.s1".to_owned(), "x".to_owned()];
        let mut shown = disk();
        show(&mut shown, Some(&source()), &layers, true);
        let text = shown.document();
        for part in [
            "<disk type='file'>",
            "<driver name='qemu' type='qcow2'/>",
            "<source file='/karst/p/x'/>",
            "<backingStore type='file' index='1'>",
            "<source file='/karst/p/instances/v1.s1'/>",
            "<backingStore type='file' index='2'>",
            "<source file='/karst/p/instances/v1'/>",
            "<backingStore/>",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        // What was shown is no wish; what somebody else wrote there stays, and is refused where it is read.
        without(&mut shown);
        assert!(shown.find("backingStore").is_none());
        let mut foreign = disk().child(
            Element::new("backingStore")
                .with("type", "file")
                .child(Element::new("source").with("file", "/tmp/x")),
        );
        without(&mut foreign);
        assert!(foreign.find("backingStore").is_some());
        let mut defined = disk();
        show(&mut defined, Some(&source()), &layers, false);
        assert!(defined.find("backingStore").is_none() && defined.document().contains("/karst/p/x"));
        let mut plain = disk();
        show(&mut plain, Some(&source()), &[], true);
        assert_eq!(plain, disk());
    }

    #[test]
    fn files_are_found_by_path_and_by_number() {
        let chain = chain("p", "v", &["a".into(), "b".into()]);
        assert_eq!(chain, ["/karst/p/b", "/karst/p/a", "/karst/p/v"]);
        let at = |from, name| place(&chain, "vda", from, name).map_err(|e| (e.code, e.text));
        assert_eq!(at(0, None), Ok(None));
        assert_eq!(at(0, Some("/karst/p/a")), Ok(Some(1)));
        assert_eq!(at(1, Some("vda[2]")), Ok(Some(2)));
        for (from, name) in
            [(0, "/karst/p/c"), (2, "/karst/p/a"), (0, "vda[3]"), (0, "vdb[1]"), (2, "vda[1]"), (0, "vda[x]")]
        {
            assert_eq!(at(from, Some(name)).unwrap_err().0, Code::InvalidArg, "{name}");
        }
    }

    #[test]
    fn layers_are_called_as_libvirt_calls_them() {
        assert_eq!(beside("/karst/p/v", "s1"), "/karst/p/v.s1");
        assert_eq!(beside("/karst/p/v.s1", "s2"), "/karst/p/v.s2");
        assert_eq!(beside("/karst/a.b/v", "s"), "/karst/a.b/v.s");
        assert_eq!(named("vda", "p", "/karst/p/instances/x").unwrap(), "instances/x");
        for path in ["/tmp/x", "/karst/q/x", "/karst/p"] {
            assert_eq!(named("vda", "p", path).unwrap_err().code, Code::ConfigUnsupported, "{path}");
        }
    }
}
