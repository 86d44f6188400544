//! What the firmware of a machine tells of it (`<sysinfo type='smbios'>`), both ways. It counts where the `<os>` says so
//! (`<smbios mode='sysinfo'/>`); else it is kept, and has no effect, as with libvirt.

use super::refuse;
use crate::{error::VirError, xml::Element};
use karst_model::board::{SMBIOS_FIELDS, SMBIOS_STRINGS};
use std::collections::BTreeMap;

/// Elements, and what stands for them in keys.
const PARTS: [(&str, &str); 4] =
    [("bios", "bios"), ("system", "system"), ("baseBoard", "board"), ("chassis", "chassis")];

fn key_of(part: &str, entry: &str) -> Option<&'static str> {
    let wanted = |key: &str| key.strip_prefix("hardware.smbios.") == Some(format!("{part}.{entry}").as_str());
    SMBIOS_FIELDS.iter().map(|field| field.key).find(|key| wanted(key))
}

/// Does the `<os>` have it told?
pub fn is_told(os: Option<&Element>) -> bool {
    os.and_then(|os| os.find("smbios")).and_then(|s| s.attribute("mode")) == Some("sysinfo")
}

/// What a `<sysinfo>` says; `uuid` is the machine's own.
///
/// # Errors
/// CONFIG_UNSUPPORTED, naming the element.
pub fn read(e: &Element, uuid: Option<&str>) -> Result<BTreeMap<String, String>, VirError> {
    let mut all = BTreeMap::new();
    for inner in e.elements() {
        let name = inner.name();
        if e.all(name).count() > 1 {
            return Err(refuse(&format!("sysinfo {name}"), "there is one"));
        }
        if name == "oemStrings" {
            let strings: Vec<&str> =
                inner.all("entry").map(Element::body).filter(|s| !s.is_empty()).collect();
            if strings.iter().any(|s| s.contains(['\n', '\r'])) {
                return Err(refuse("sysinfo oemStrings", "a string is one line"));
            }
            if !strings.is_empty() {
                all.insert(SMBIOS_STRINGS.to_owned(), strings.join("\n"));
            }
            continue;
        }
        let Some((_, part)) = PARTS.iter().find(|(element, _)| *element == name) else {
            return Err(refuse(
                &format!("sysinfo {name}"),
                "is not there; bios, system, baseBoard, chassis and oemStrings are",
            ));
        };
        for entry in inner.all("entry") {
            let field = entry.attribute("name").unwrap_or_default();
            let text = entry.body().trim();
            if (name, field) == ("system", "uuid") {
                if uuid.is_none_or(|own| !own.eq_ignore_ascii_case(text)) {
                    return Err(refuse(
                        "sysinfo system",
                        "the uuid is that of the domain; say it in both places, or leave it out",
                    ));
                }
                continue;
            }
            let key = key_of(part, field)
                .ok_or_else(|| refuse(&format!("sysinfo {name}"), format!("'{field}' is not there")))?;
            if !text.is_empty() {
                all.insert(key.to_owned(), text.to_owned());
            }
        }
    }
    Ok(all)
}

/// What a domain says of it.
///
/// # Errors
/// Those of [`read`].
pub fn of(root: &Element) -> Result<BTreeMap<String, String>, VirError> {
    let uuid = root.find("uuid").map(|u| u.body().trim());
    let said = root.find("sysinfo").filter(|_| is_told(root.find("os")));
    Ok(said.map(|e| read(e, uuid)).transpose()?.unwrap_or_default())
}

/// As an element.
pub fn shown(all: &BTreeMap<String, String>) -> Element {
    let mut e = Element::new("sysinfo").with("type", "smbios");
    for (element, part) in PARTS {
        let prefix = format!("hardware.smbios.{part}.");
        let entries = all.iter().filter_map(|(key, value)| Some((key.strip_prefix(&prefix)?, value)));
        let entries: Vec<_> =
            entries.map(|(name, value)| Element::text("entry", value).with("name", name)).collect();
        if !entries.is_empty() {
            e.push(Element::new(element).children(entries));
        }
    }
    if let Some(strings) = all.get(SMBIOS_STRINGS) {
        e.push(Element::new("oemStrings").children(strings.lines().map(|s| Element::text("entry", s))));
    }
    e
}

/// Corrects what an `<os>` says of whether it is told.
pub fn show_told(os: &mut Element, told: bool) {
    if is_told(Some(os)) != told {
        os.elements_mut().retain(|e| e.name() != "smbios");
        if told {
            os.push(Element::new("smbios").with("mode", "sysinfo"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml::read::document;

    #[test]
    fn what_is_told_is_read_and_shown_the_same() {
        let text = "<domain><uuid>c7a5fdbd-edaf-9455-926a-d65c16db1809</uuid><sysinfo type='smbios'>\
            <bios><entry name='vendor'>LENOVO</entry></bios><system><entry name='serial'>1,2</entry>\
            <entry name='uuid'>C7A5FDBD-edaf-9455-926a-d65c16db1809</entry></system>\
            <baseBoard><entry name='location'>Upside down</entry></baseBoard><chassis><entry name='sku'>S</entry></chassis>\
            <oemStrings><entry>Hello</entry><entry>a, b=c</entry></oemStrings></sysinfo><os><smbios mode='sysinfo'/></os></domain>";
        let root = document(text).unwrap();
        let found = of(&root).unwrap();
        let keys: Vec<_> =
            found.iter().map(|(k, v)| format!("{}={v}", &k["hardware.smbios.".len()..])).collect();
        let wanted = [
            "bios.vendor=LENOVO",
            "board.location=Upside down",
            "chassis.sku=S",
            "strings=Hello\na, b=c",
            "system.serial=1,2",
        ];
        assert_eq!(keys, wanted);
        assert_eq!(read(&shown(&found), None).unwrap(), found);
        // Without the word of the system nothing is told.
        assert!(
            of(&document(&text.replace("mode='sysinfo'", "mode='emulate'")).unwrap()).unwrap().is_empty()
        );
        let mut os = document("<os><smbios mode='emulate'/></os>").unwrap();
        show_told(&mut os, true);
        assert!(is_told(Some(&os)));
        show_told(&mut os, false);
        assert!(os.find("smbios").is_none());
        for bad in [
            "<system><entry name='owner'>x</entry></system>",
            "<system><entry name='uuid'>c7a5fdbd-edaf-9455-926a-d65c16db1800</entry></system>",
            "<memory/>",
            "<bios/><bios/>",
        ] {
            let e = read(&document(&format!("<sysinfo>{bad}</sysinfo>")).unwrap(), Some("c7")).unwrap_err();
            assert!(e.text.starts_with("sysinfo "), "{bad}: {}", e.text);
        }
    }
}
