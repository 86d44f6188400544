//! Snapshots as XML.

use super::Element;
use crate::{
    error::{Code, Part, VirError},
    session::Call,
};
use karst_engine::InstanceView;
use karst_model::{instance::Instance, snapshot::Snapshot};

/// A snapshot to take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Name; the time when absent.
    pub name: Option<String>,
    /// What its user says of it.
    pub description: String,
    /// With the memory of a running machine; as it runs when absent.
    pub memory: Option<bool>,
}

fn wrong(text: impl Into<String>) -> VirError {
    VirError::new(Code::XmlError, Part::Domain, text)
}

fn refuse(text: &str) -> VirError {
    VirError::new(Code::ConfigUnsupported, Part::Qemu, text)
}

fn root(text: &str) -> Result<Element, VirError> {
    let root = super::read::document(text)?;
    if root.name() != "domainsnapshot" {
        return Err(wrong(format!("unexpected root element <{}>, expecting <domainsnapshot>", root.name())));
    }
    Ok(root)
}

fn name(root: &Element) -> Option<String> {
    root.find("name").map(|n| n.body().trim()).filter(|n| !n.is_empty()).map(str::to_owned)
}

fn description(root: &Element) -> String {
    root.find("description").map(|d| d.body().to_owned()).unwrap_or_default()
}

/// Reads the document of a snapshot that is there: it, and the name.
///
/// # Errors
/// XML error, also without a name.
pub fn named(text: &str) -> Result<(Element, String), VirError> {
    let root = root(text)?;
    let name = name(&root).ok_or_else(|| wrong("a redefined snapshot must have a name"))?;
    Ok((root, name))
}

/// The description that a document gives a snapshot which is there. `now` is the document that it has: what else the new one
/// says is as it is.
///
/// # Errors
/// CONFIG_UNSUPPORTED, naming the element that differs.
pub fn described(new: &Element, now: &Element) -> Result<String, VirError> {
    // Whether it is the current one libvirt reads nowhere but in files of its own.
    let free = |e: &&Element| matches!(e.name(), "name" | "description" | "active");
    match new.elements().iter().filter(|e| !free(e)).find(|e| !now.all(e.name()).any(|n| n == *e)) {
        None => Ok(description(new)),
        Some(other) => Err(refuse(&format!(
            "{}: a snapshot says what was there when it was taken; of one that is there the description may be \
             another, all else stays as it is",
            other.name()
        ))),
    }
}

/// Reads the document of a snapshot to take.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element, for what the pool does not do.
pub fn read(text: &str) -> Result<NewSnapshot, VirError> {
    let root = root(text)?;
    let (name, description) = (name(&root), description(&root));
    let memory = root.find("memory");
    if memory.is_some_and(|m| m.attribute("file").is_some()) {
        return Err(refuse("memory file: the memory is kept with the snapshot"));
    }
    let memory = match memory.and_then(|m| m.attribute("snapshot")) {
        None => None,
        Some("no") => Some(false),
        Some("internal") => Some(true),
        Some(other) => {
            return Err(refuse(&format!("memory snapshot: '{other}' is not there; no and internal are")));
        }
    };
    for disk in root.find("disks").into_iter().flat_map(|d| d.all("disk")) {
        let dev = disk.attribute("name").unwrap_or_default();
        match disk.attribute("snapshot") {
            None | Some("internal") => {}
            // The pool takes all disks of the instance's own at once.
            Some(other) => {
                return Err(refuse(&format!("disk snapshot: '{other}' of {dev} is not there; internal is")));
            }
        }
    }
    Ok(NewSnapshot { name, description, memory })
}

/// The document of a snapshot, with the domain as it was.
///
/// # Errors
/// Invalid, when its configuration was.
pub fn document(
    call: &Call,
    view: &InstanceView,
    snapshot: &Snapshot,
    parent: Option<&str>,
) -> Result<String, VirError> {
    let mut e = Element::new("domainsnapshot").child(Element::text("name", &snapshot.name));
    if !snapshot.note.is_empty() {
        e.push(Element::text("description", &snapshot.note));
    }
    e.push(Element::text("state", if snapshot.stateful { "running" } else { "shutoff" }));
    if let Some(parent) = parent {
        e.push(Element::new("parent").child(Element::text("name", parent)));
    }
    e.push(Element::text("creationTime", snapshot.created_at.as_second()));
    e.push(Element::new("memory").with("snapshot", if snapshot.stateful { "internal" } else { "no" }));
    let then = Instance {
        config: snapshot.config.clone(),
        devices: snapshot.devices.clone(),
        profiles: snapshot.profiles.clone(),
        ..view.instance.value.clone()
    };
    let (config, devices) = call.session.front.engine.inner().inventory.read().expanded(&then);
    let domain = super::domain::document_of(call, view, &config, &devices, false, None)?;
    let domain = super::read::document(&domain)?;
    let mut disks = Element::new("disks");
    for disk in domain.find("devices").into_iter().flat_map(|d| d.all("disk")) {
        let dev = disk.find("target").and_then(|t| t.attribute("dev")).unwrap_or_default();
        // Those of others are not part of it: the root's is the instance's own.
        let own = disk.find("readonly").is_none() && disk.find("source").is_some();
        let kind = if own && disks.elements().is_empty() { "internal" } else { "no" };
        disks.push(Element::new("disk").with("name", dev).with("snapshot", kind));
    }
    if !disks.elements().is_empty() {
        e.push(disks);
    }
    e.push(domain);
    Ok(e.document())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_are_read() {
        let inner = |inner: &str| read(&format!("<domainsnapshot>{inner}</domainsnapshot>"));
        let none = NewSnapshot { name: None, description: String::new(), memory: None };
        assert_eq!(inner(""), Ok(none));
        let whole = inner(
            "<name>s1</name><description>a &lt;b</description><memory snapshot='no'/><disks><disk name='vda' snapshot='internal'/></disks>",
        );
        let said = NewSnapshot { name: Some("s1".into()), description: "a <b".into(), memory: Some(false) };
        assert_eq!(whole, Ok(said));
        for (text, word) in [
            ("<memory snapshot='external' file='/x'/>", "memory file"),
            ("<disks><disk name='vda' snapshot='external'/></disks>", "of vda"),
        ] {
            let e = inner(text).unwrap_err();
            assert!(e.code == Code::ConfigUnsupported && e.text.contains(word), "{e:?}");
        }
        assert_eq!(read("<domain/>").unwrap_err().code, Code::XmlError);
    }

    #[test]
    fn of_one_that_is_there_only_the_description_changes() {
        let text = |inner: &str| format!("<domainsnapshot><name>s1</name>{inner}</domainsnapshot>");
        let (now, _) =
            named(&text("<state>shutoff</state><domain type='lxc'><name>v</name></domain>")).unwrap();
        let to = |inner: &str| described(&named(&text(inner)).unwrap().0, &now);
        let same = "<description>a\nb</description><state>shutoff</state><active>1</active>\n\
                    <domain type='lxc'>\n<name>v</name></domain>";
        assert_eq!(to(same).unwrap(), "a\nb");
        assert_eq!(to("").unwrap(), "");
        for (inner, word) in [
            ("<state>running</state>", "state: "),
            ("<domain type='lxc'><name>w</name></domain>", "domain: "),
            ("<parent><name>s0</name></parent>", "parent: "),
        ] {
            let e = to(inner).unwrap_err();
            assert!(e.code == Code::ConfigUnsupported && e.text.starts_with(word), "{e:?}");
        }
        assert_eq!(named("<domainsnapshot/>").unwrap_err().code, Code::XmlError);
    }
}
