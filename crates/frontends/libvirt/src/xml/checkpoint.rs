//! Checkpoints as XML.

use super::Element;
use crate::{
    error::{Code, Part, VirError},
    session::Call,
};
use karst_engine::InstanceView;
use karst_model::{checkpoint::Checkpoint, instance::Instance};

/// A checkpoint to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewCheckpoint {
    /// Name; the time when absent.
    pub name: Option<String>,
    /// What its user says of it.
    pub description: String,
    /// Its disks, as clients name them; all that are written to when absent.
    pub disks: Option<Vec<String>>,
}

fn wrong(text: impl Into<String>) -> VirError {
    VirError::new(Code::XmlError, Part::Domain, text)
}

fn refuse(text: &str) -> VirError {
    VirError::new(Code::ConfigUnsupported, Part::Qemu, text)
}

fn root(text: &str) -> Result<Element, VirError> {
    let root = super::read::document(text)?;
    if root.name() != "domaincheckpoint" {
        let text = format!("unexpected root element <{}>, expecting <domaincheckpoint>", root.name());
        return Err(wrong(text));
    }
    Ok(root)
}

fn name(root: &Element) -> Option<String> {
    root.find("name").map(|n| n.body().trim()).filter(|n| !n.is_empty()).map(str::to_owned)
}

fn description(root: &Element) -> String {
    root.find("description").map(|d| d.body().to_owned()).unwrap_or_default()
}

/// Reads the document of a checkpoint that is there: it, and the name.
///
/// # Errors
/// XML error, also without a name.
pub fn named(text: &str) -> Result<(Element, String), VirError> {
    let root = root(text)?;
    let name = name(&root).ok_or_else(|| wrong("a redefined checkpoint must have a name"))?;
    Ok((root, name))
}

/// The description that a document gives a checkpoint which is there. `now` is the document that it has: what else the new one says
/// is as it is.
///
/// # Errors
/// CONFIG_UNSUPPORTED, naming the element that differs.
pub fn described(new: &Element, now: &Element) -> Result<String, VirError> {
    let free = |e: &&Element| matches!(e.name(), "name" | "description");
    match new.elements().iter().filter(|e| !free(e)).find(|e| !now.all(e.name()).any(|n| n == *e)) {
        None => Ok(description(new)),
        Some(other) => Err(refuse(&format!(
            "{}: a checkpoint says what was there when it was made; of one that is there the description may be another, \
             all else stays as it is",
            other.name()
        ))),
    }
}

/// Reads the document of a checkpoint to make.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element, for what Karst does not do.
pub fn read(text: &str) -> Result<NewCheckpoint, VirError> {
    let root = root(text)?;
    let (name, description) = (name(&root), description(&root));
    let mut disks = vec![];
    for disk in root.find("disks").into_iter().flat_map(|d| d.all("disk")) {
        let dev = disk.attribute("name").filter(|n| !n.is_empty());
        let dev = dev.ok_or_else(|| wrong("missing name from disk checkpoint element"))?;
        match disk.attribute("checkpoint") {
            None | Some("bitmap") => disks.push(dev.to_owned()),
            Some("no") => {}
            Some(other) => return Err(wrong(format!("unknown disk checkpoint setting '{other}'"))),
        }
        if let Some(bitmap) = disk.attribute("bitmap")
            && Some(bitmap) != name.as_deref()
        {
            return Err(refuse(&format!(
                "bitmap: '{bitmap}' of {dev}: a bitmap is called as its checkpoint; leave it out"
            )));
        }
    }
    let said = root.find("disks").is_some_and(|d| !d.elements().is_empty());
    if said && disks.is_empty() {
        return Err(refuse("disks: a checkpoint has a disk at least"));
    }
    Ok(NewCheckpoint { name, description, disks: said.then_some(disks) })
}

/// What a document of a checkpoint is made of.
pub struct Shown<'a> {
    /// The domain now.
    pub view: &'a InstanceView,
    /// The checkpoint.
    pub checkpoint: &'a Checkpoint,
    /// Name of the one that it descends from.
    pub parent: Option<&'a str>,
    /// Bytes that changed, by device.
    pub sizes: Option<&'a [(String, u64)]>,
    /// With the domain as it was.
    pub domain: bool,
}

/// The document of a checkpoint.
///
/// # Errors
/// Invalid, when its configuration was.
pub fn document(call: &Call, shown: &Shown<'_>) -> Result<String, VirError> {
    let Shown { view, checkpoint, .. } = shown;
    let mut e = Element::new("domaincheckpoint").child(Element::text("name", &checkpoint.name));
    if !checkpoint.note.is_empty() {
        e.push(Element::text("description", &checkpoint.note));
    }
    if let Some(parent) = shown.parent {
        e.push(Element::new("parent").child(Element::text("name", parent)));
    }
    e.push(Element::text("creationTime", checkpoint.created_at.as_second()));
    let then = Instance {
        config: checkpoint.config.clone(),
        devices: checkpoint.devices.clone(),
        profiles: checkpoint.profiles.clone(),
        ..view.instance.value.clone()
    };
    let (config, devices) = call.session.front.engine.inner().inventory.read().expanded(&then);
    let domain = super::domain::document_of(call, view, &config, &devices, false, (None, &[]))?;
    let domain = super::read::document(&domain)?;
    let mut disks = Element::new("disks");
    for disk in domain.find("devices").into_iter().flat_map(|d| d.all("disk")) {
        let dev = disk.find("target").and_then(|t| t.attribute("dev")).unwrap_or_default();
        let slot = checkpoint.disks.iter().find(|d| {
            let device = crate::calls::checkpoints::device(view, dev);
            device.as_deref() == Some(&*d.device)
        });
        let kind = if slot.is_some() { "bitmap" } else { "no" };
        let size = slot.zip(shown.sizes).map(|(disk, sizes)| {
            sizes.iter().find(|(device, _)| *device == disk.device).map_or(0, |(_, bytes)| *bytes)
        });
        disks.push(
            Element::new("disk")
                .with("name", dev)
                .with("checkpoint", kind)
                .with_some("bitmap", slot.map(|_| &checkpoint.name))
                .with_some("size", size),
        );
    }
    if !disks.elements().is_empty() {
        e.push(disks);
    }
    if shown.domain {
        e.push(domain);
    }
    Ok(e.document())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_are_read() {
        let inner = |inner: &str| read(&format!("<domaincheckpoint>{inner}</domaincheckpoint>"));
        let none = NewCheckpoint { name: None, description: String::new(), disks: None };
        assert_eq!(inner(""), Ok(none));
        let whole = inner(
            "<name>c1</name><description>a &lt;b</description><disks><disk name='vda' checkpoint='bitmap' bitmap='c1'/>\
             <disk name='vdb' checkpoint='no'/><disk name='vdc'/></disks>",
        );
        let disks = Some(vec!["vda".to_owned(), "vdc".to_owned()]);
        let said = NewCheckpoint { name: Some("c1".into()), description: "a <b".into(), disks };
        assert_eq!(whole, Ok(said));
        for (text, code, word) in [
            ("<disks><disk name='vda' bitmap='x'/></disks>", Code::ConfigUnsupported, "bitmap"),
            ("<disks><disk name='vda' checkpoint='no'/></disks>", Code::ConfigUnsupported, "disks"),
            ("<disks><disk name='vda' checkpoint='maybe'/></disks>", Code::XmlError, "maybe"),
            ("<disks><disk/></disks>", Code::XmlError, "name"),
        ] {
            let e = inner(text).unwrap_err();
            assert!(e.code == code && e.text.contains(word), "{e:?}");
        }
        assert_eq!(read("<domain/>").unwrap_err().code, Code::XmlError);
    }

    #[test]
    fn of_one_that_is_there_only_the_description_changes() {
        let text = |inner: &str| format!("<domaincheckpoint><name>c1</name>{inner}</domaincheckpoint>");
        let (now, _) = named(&text("<creationTime>5</creationTime>")).unwrap();
        let to = |inner: &str| described(&named(&text(inner)).unwrap().0, &now);
        assert_eq!(to("<description>a</description><creationTime>5</creationTime>").unwrap(), "a");
        assert_eq!(to("").unwrap(), "");
        let e = to("<creationTime>6</creationTime>").unwrap_err();
        assert!(e.code == Code::ConfigUnsupported && e.text.starts_with("creationTime: "), "{e:?}");
        assert_eq!(named("<domaincheckpoint/>").unwrap_err().code, Code::XmlError);
    }
}
