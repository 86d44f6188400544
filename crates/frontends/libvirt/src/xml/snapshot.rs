//! Snapshots as XML.

use super::Element;
use crate::{
    error::{Code, Part, VirError},
    session::Call,
};
use karst_engine::{InstanceView, compute::expand::parse_devices};
use karst_model::{
    device::{DISK_BUSES, DiskBus},
    instance::Instance,
    snapshot::Snapshot,
};

/// A snapshot to take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Name; the time when absent.
    pub name: Option<String>,
    /// What its user says of it.
    pub description: String,
    /// With the memory of a running machine; as it runs when absent.
    pub memory: Option<bool>,
    /// Disks that it names, by target or path of the source, and whether they are to be in it as the pool keeps them.
    pub disks: Vec<(String, bool)>,
    /// It is external: disks that it names, and where they are to go on, if that is said.
    pub external: Option<Vec<(String, Option<String>)>>,
}

/// A disk of a domain, as far as it matters to snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OfDomain {
    /// Name in libvirt's words.
    pub target: String,
    /// Path of what it shows.
    pub path: Option<String>,
    /// Snapshots of the domain hold what is on it.
    pub held: bool,
    /// The guest may write to it.
    pub written: bool,
}

/// Are the disks of a domain treated as a document of a snapshot says? What it does not say is as libvirt has it: all that the
/// guest may write to are in the snapshot, the others are not.
///
/// # Errors
/// CONFIG_UNSUPPORTED, naming the disk.
pub fn check_disks(said: &[(String, bool)], disks: &[OfDomain]) -> Result<(), VirError> {
    let is = |disk: &OfDomain, name: &str| disk.target == name || disk.path.as_deref() == Some(name);
    if let Some((name, _)) = said.iter().find(|(name, _)| !disks.iter().any(|d| is(d, name))) {
        return Err(refuse(&format!("no disk named '{name}'")));
    }
    for disk in disks {
        let asked = said.iter().find(|(name, _)| is(disk, name)).map(|(_, wanted)| *wanted);
        let target = &disk.target;
        match (asked.unwrap_or(disk.written), disk.held) {
            (true, true) | (false, false) => {}
            (true, false) if !disk.written => {
                return Err(refuse(&format!(
                    "disk snapshot: the guest only reads {target}; say snapshot='no' of it, or nothing"
                )));
            }
            (true, false) => {
                return Err(refuse(&format!(
                    "disk snapshot: {target} is a volume that does not belong to the domain, and no snapshot of the \
                     domain holds what is on it; leave it out by --diskspec {target},snapshot=no without the memory \
                     (--memspec snapshot=no), and take one of the volume by itself"
                )));
            }
            (false, true) => {
                return Err(refuse(&format!(
                    "disk snapshot: a snapshot without {target} is not there; the domain's own disk is always in it"
                )));
            }
        }
    }
    Ok(())
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

/// Reads the document of a snapshot to take; `disk_only`: disks of which it says nothing go on in other files.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element, for what the pool does not do.
pub fn read(text: &str, disk_only: bool) -> Result<NewSnapshot, VirError> {
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
    let mut disks: Vec<(String, bool)> = vec![];
    let mut external: Vec<(String, Option<String>)> = vec![];
    for disk in root.find("disks").into_iter().flat_map(|d| d.all("disk")) {
        let dev = disk.attribute("name").filter(|n| !n.is_empty());
        let dev = dev.ok_or_else(|| wrong("missing name from disk snapshot element"))?;
        if disks.iter().map(|(n, _)| n).chain(external.iter().map(|(n, _)| n)).any(|known| known == dev) {
            return Err(wrong(format!("disk '{dev}' specified twice")));
        }
        let wanted = match disk.attribute("snapshot") {
            kind if kind == Some("external")
                || (kind.is_none() && (disk_only || disk.find("source").is_some())) =>
            {
                external.push((dev.to_owned(), layer(disk, dev)?));
                continue;
            }
            None | Some("internal") => true,
            Some("no") => false,
            Some(other) => {
                return Err(refuse(&format!(
                    "disk snapshot: '{other}' of {dev} is not there; no, internal and external are"
                )));
            }
        };
        disks.push((dev.to_owned(), wanted));
    }
    let external = (disk_only || !external.is_empty()).then_some(external);
    Ok(NewSnapshot { name, description, memory, disks, external })
}

/// Where a disk is to go on, if its document says.
fn layer(disk: &Element, dev: &str) -> Result<Option<String>, VirError> {
    if disk.attribute("type").is_some_and(|kind| kind != "file") {
        return Err(refuse(&format!("disk type: {dev} goes on in a file of its pool")));
    }
    if let Some(other) = disk.find("driver").and_then(|d| d.attribute("type")).filter(|t| *t != "qcow2") {
        return Err(refuse(&format!(
            "disk driver: {dev} goes on in a file of the format qcow2, not '{other}'"
        )));
    }
    let source = disk.find("source");
    if source.is_some_and(|s| s.attribute("file").is_none() || !s.elements().is_empty()) {
        return Err(refuse(&format!("disk source: {dev} goes on in a file")));
    }
    Ok(source.and_then(|s| s.attribute("file")).map(str::to_owned))
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
    let external = snapshot.external.as_ref();
    let state = match (snapshot.stateful, external) {
        (true, _) => "running",
        (false, Some(external)) if external.running => "disk-snapshot",
        (false, _) => "shutoff",
    };
    e.push(Element::text("state", state));
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
    // What is in it of disks is the root, the only one that an instance's snapshots hold.
    let (name, device) = parse_devices(&devices)?.root;
    let bus = device.io.bus.unwrap_or(DiskBus::VirtioScsi);
    let root = view
        .instance
        .identities
        .get(&name)
        .filter(|i| !super::machine::is_no_drive(i))
        .map(|i| super::machine::target(&i.slot, bus).0);
    let domain = super::domain::document_of(call, view, &config, &devices, false, (None, &[]))?;
    let domain = super::read::document(&domain)?;
    let mut disks = Element::new("disks");
    for disk in domain.find("devices").into_iter().flat_map(|d| d.all("disk")) {
        let dev = disk.find("target").and_then(|t| t.attribute("dev")).unwrap_or_default();
        let target = |device: &str| {
            let identity = view.instance.identities.get(device)?;
            let said = devices.get(device).and_then(|k| k.get("io.bus"));
            let bus = DISK_BUSES.iter().find(|(name, _)| Some(*name) == said.map(String::as_str));
            Some(super::machine::target(&identity.slot, bus.map_or(DiskBus::VirtioScsi, |(_, bus)| *bus)).0)
        };
        let went = external.into_iter().flat_map(|e| &e.disks);
        if let Some(layer) = went.into_iter().find(|d| target(&d.device).as_deref() == Some(dev)) {
            let path = super::machine::layers::path(&layer.pool, &layer.layer);
            let shown =
                Element::new("disk").with("name", dev).with("snapshot", "external").with("type", "file");
            let driver = Element::new("driver").with("type", "qcow2");
            disks.push(shown.child(driver).child(Element::new("source").with("file", path)));
            continue;
        }
        let kind = if external.is_none() && root.as_deref() == Some(dev) { "internal" } else { "no" };
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
        let of = |inner: &str, only| read(&format!("<domainsnapshot>{inner}</domainsnapshot>"), only);
        let inner = |text: &str| of(text, false);
        let none = NewSnapshot {
            name: None,
            description: String::new(),
            memory: None,
            disks: vec![],
            external: None,
        };
        assert_eq!(inner(""), Ok(none));
        let whole = inner(
            "<name>s1</name><description>a &lt;b</description><memory snapshot='no'/><disks><disk name='vda' snapshot='internal'/><disk name='vdb' snapshot='no'/></disks>",
        );
        let said = NewSnapshot {
            name: Some("s1".into()),
            description: "a <b".into(),
            memory: Some(false),
            disks: vec![("vda".into(), true), ("vdb".into(), false)],
            external: None,
        };
        assert_eq!(whole, Ok(said));
        for (text, word) in [
            ("<memory snapshot='external' file='/x'/>", "memory file"),
            ("<disks><disk name='vda' snapshot='manual'/></disks>", "of vda"),
            ("<disks><disk name='vda' type='block' snapshot='external'/></disks>", "disk type"),
            (
                "<disks><disk name='vda' snapshot='external'><driver type='raw'/></disk></disks>",
                "disk driver",
            ),
            (
                "<disks><disk name='vda' snapshot='external'><source dev='/dev/x'/></disk></disks>",
                "disk source",
            ),
        ] {
            let e = inner(text).unwrap_err();
            assert!(e.code == Code::ConfigUnsupported && e.text.contains(word), "{e:?}");
        }
        assert_eq!(read("<domain/>", false).unwrap_err().code, Code::XmlError);
        let named = "<disks><disk name='vda'><source file='/karst/p/x'/></disk><disk name='vdb' snapshot='no'/></disks>";
        for only in [false, true] {
            let new = of(named, only).unwrap();
            assert_eq!(new.external, Some(vec![("vda".into(), Some("/karst/p/x".into()))]));
            assert_eq!(new.disks, [("vdb".to_owned(), false)]);
        }
        let plain = of("<disks><disk name='vda'/></disks>", true).unwrap();
        assert_eq!((plain.external, plain.disks), (Some(vec![("vda".into(), None)]), vec![]));
        assert_eq!(of("", true).unwrap().external, Some(vec![]));
        for text in ["<disk snapshot='no'/>", "<disk name='vda'/><disk name='vda'/>"] {
            assert_eq!(inner(&format!("<disks>{text}</disks>")).unwrap_err().code, Code::XmlError, "{text}");
        }
    }

    #[test]
    fn a_disk_that_is_not_in_a_snapshot_is_named() {
        let disk = |target: &str, held: bool, written: bool| {
            let path = Some(format!("/karst/default/{target}"));
            OfDomain { target: target.into(), path, held, written }
        };
        let disks = [disk("vda", true, true), disk("vdb", false, true), disk("sda", false, false)];
        let check = |said: &[(&str, bool)]| {
            let said: Vec<_> = said.iter().map(|(n, w)| ((*n).to_owned(), *w)).collect();
            check_disks(&said, &disks).map_err(|e| e.text)
        };
        assert_eq!(check(&[("vdb", false)]), Ok(()));
        assert_eq!(check(&[("/karst/default/vdb", false), ("vda", true), ("sda", false)]), Ok(()));
        for (said, word) in [
            (&[][..], "vdb is a volume"),
            (&[("vdb", true)], "vdb is a volume"),
            (&[("vdb", false), ("vda", false)], "without vda"),
            (&[("vdb", false), ("sda", true)], "only reads sda"),
            (&[("vdb", false), ("vdc", false)], "no disk named 'vdc'"),
        ] {
            let text = check(said).unwrap_err();
            assert!(text.contains(word), "{text}");
        }
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
