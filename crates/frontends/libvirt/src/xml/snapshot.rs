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
    /// With the memory of a running machine; as it runs when absent.
    pub memory: Option<bool>,
}

/// Reads the document of a snapshot to take.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element, for what the pool does not do.
pub fn read(text: &str) -> Result<NewSnapshot, VirError> {
    let root = super::read::document(text)?;
    let wrong = |text: String| VirError::new(Code::XmlError, Part::Domain, text);
    if root.name() != "domainsnapshot" {
        return Err(wrong(format!("unexpected root element <{}>, expecting <domainsnapshot>", root.name())));
    }
    let refuse = |text: &str| VirError::new(Code::ConfigUnsupported, Part::Qemu, text);
    let name = root.find("name").map(|n| n.body().trim()).filter(|n| !n.is_empty()).map(str::to_owned);
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
    Ok(NewSnapshot { name, memory })
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
    let mut e = Element::new("domainsnapshot")
        .child(Element::text("name", &snapshot.name))
        .child(Element::text("state", if snapshot.stateful { "running" } else { "shutoff" }));
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
        assert_eq!(inner(""), Ok(NewSnapshot { name: None, memory: None }));
        let whole = inner(
            "<name>s1</name><memory snapshot='no'/><disks><disk name='vda' snapshot='internal'/></disks>",
        );
        assert_eq!(whole, Ok(NewSnapshot { name: Some("s1".into()), memory: Some(false) }));
        for (text, word) in [
            ("<memory snapshot='external' file='/x'/>", "memory file"),
            ("<disks><disk name='vda' snapshot='external'/></disks>", "of vda"),
        ] {
            let e = inner(text).unwrap_err();
            assert!(e.code == Code::ConfigUnsupported && e.text.contains(word), "{e:?}");
        }
        assert_eq!(read("<domain/>").unwrap_err().code, Code::XmlError);
    }
}
