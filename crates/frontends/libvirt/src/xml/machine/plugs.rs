//! Devices of others behind a character device, both ways: on USB by usbredir (`<redirdev>` but for those of SPICE, which come with the
//! screen), smart cards (`<smartcard mode='passthrough'>`), random numbers by EGD (`<rng>`). They are devices of the type `port`
//! ([`super::ports`]). Beside them the filter of what is taken on USB (`<redirfilter>`).

use super::{ports, refuse, wrong};
use crate::{error::VirError, xml::Element};
use karst_model::device::{PortDevice, PortEnd, PortPlace};

/// Is it an element of one?
pub fn is(e: &Element) -> bool {
    match e.name() {
        "smartcard" => true,
        "redirdev" => e.attribute("type") != Some("spicevmc"),
        "rng" => e.find("backend").is_some_and(|b| b.attribute("model") == Some("egd")),
        _ => false,
    }
}

/// Refuses what is said beside the other end.
fn demand_plain(e: &Element, attributes: &[&str], elements: &[&str]) -> Result<(), VirError> {
    if let Some((name, _)) = e.attributes().find(|(name, _)| !attributes.contains(name)) {
        return Err(refuse(&format!("{} {name}", e.name()), "is not there for this device"));
    }
    let other = e.elements().iter().find(|inner| !elements.contains(&inner.name()));
    other.map_or(Ok(()), |inner| {
        Err(refuse(&format!("{} {}", e.name(), inner.name()), "is not there for this device"))
    })
}

/// What an element of one says.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub fn read(e: &Element) -> Result<PortDevice, VirError> {
    let common = ["source", "protocol", "alias", "address"];
    let (place, end) = match e.name() {
        "rng" => {
            demand_plain(e, &["model"], &["backend", "alias", "address"])?;
            let backend = e.find("backend").cloned().unwrap_or_else(|| Element::new("backend"));
            (PortPlace::Random {}, backend.renamed("rng"))
        }
        "smartcard" => {
            match e.attribute("mode") {
                Some("passthrough") => {}
                Some(mode @ ("host" | "host-certificates")) => {
                    let text = format!(
                        "'{mode}': cards and certificates of the host are not given; passthrough is there"
                    );
                    return Err(refuse("smartcard mode", text));
                }
                mode => return Err(wrong(format!("unknown smartcard mode '{}'", mode.unwrap_or_default()))),
            }
            demand_plain(e, &["mode", "type"], &common)?;
            (PortPlace::Smartcard {}, e.clone())
        }
        _ => {
            if e.attribute("bus").is_some_and(|bus| bus != "usb") {
                return Err(refuse("redirdev bus", "is usb"));
            }
            demand_plain(e, &["bus", "type"], &common)?;
            (PortPlace::Redirect {}, e.clone())
        }
    };
    let viewer = place == (PortPlace::Smartcard {}) && e.attribute("type") == Some("spicevmc");
    let to = if viewer { PortEnd::Spice {} } else { ports::end(&end)?.0 };
    match &to {
        PortEnd::Spice {} | PortEnd::Stream {} | PortEnd::Unix { .. } => {}
        PortEnd::Tcp { telnet: false, .. } => {}
        _ => {
            let text = "who is at the other end speaks; unix, tcp and pty are there";
            return Err(refuse(&format!("{} type", e.name()), text));
        }
    }
    Ok(PortDevice { place, to, log: None })
}

/// Those of a document, with the names of their devices.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub fn all(devices: &[Element]) -> Result<Vec<(String, PortDevice)>, VirError> {
    let mut found: Vec<(String, PortDevice)> = vec![];
    for e in devices.iter().filter(|e| is(e)) {
        let one = read(e)?;
        let number = found.iter().filter(|(_, had)| had.place == one.place).count();
        if number > 0 && !one.place.may_repeat() {
            return Err(refuse(e.name(), "a machine has one"));
        }
        found.push((format!("{}{number}", one.place.kind()), one));
    }
    // Whatever the order of the document.
    found.sort_by(|(_, a), (_, b)| a.place.cmp(&b.place));
    let reader = |e: &&Element| e.name() == "controller" && e.attribute("type") == Some("ccid");
    let readers = devices.iter().filter(reader).count();
    let cards = found.iter().filter(|(_, one)| one.place == (PortPlace::Smartcard {})).count();
    match readers > cards {
        true => Err(refuse(
            "controller",
            "a reader of smart cards (ccid) comes with its card, and there is one of each",
        )),
        false => Ok(found),
    }
}

/// As an element.
pub fn shown(port: &PortDevice) -> Element {
    let as_port = ports::shown(&PortDevice { place: PortPlace::Channel { name: None }, ..port.clone() });
    let kind = match &port.to {
        PortEnd::Spice {} => "spicevmc".to_owned(),
        _ => as_port.attribute("type").unwrap_or_default().to_owned(),
    };
    let inner: Vec<Element> =
        as_port.elements().iter().filter(|e| matches!(e.name(), "source" | "protocol")).cloned().collect();
    match &port.place {
        PortPlace::Random {} => {
            let backend = Element::new("backend").with("model", "egd").with("type", kind);
            Element::new("rng").with("model", "virtio").child(backend.children(inner))
        }
        PortPlace::Smartcard {} => {
            Element::new("smartcard").with("mode", "passthrough").with("type", kind).children(inner)
        }
        _ => Element::new("redirdev").with("bus", "usb").with("type", kind).children(inner),
    }
}

/// A number of a rule, in usbredir's words.
fn part(e: &Element, name: &str, digits: usize) -> Result<String, VirError> {
    let text = match e.attribute(name) {
        None | Some("-1") => return Ok("-1".to_owned()),
        Some(text) => text,
    };
    let number = match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    };
    let number = number.filter(|n| *n < 1 << (4 * digits));
    let number = number.ok_or_else(|| wrong(format!("Cannot parse USB {name} {text}")))?;
    Ok(format!("0x{number:0digits$X}"))
}

/// A version such as `1.10`, of which USB has two digits before the point and two after it.
fn version(e: &Element) -> Result<String, VirError> {
    let text = match e.attribute("version") {
        None | Some("-1") => return Ok("-1".to_owned()),
        Some(text) => text,
    };
    let odd = || wrong(format!("Cannot parse USB version {text}"));
    let (major, minor) = text.split_once('.').unwrap_or((text, ""));
    let digits = |part: &str| part.len() <= 2 && part.bytes().all(|b| b.is_ascii_digit());
    if major.is_empty() || !digits(major) || !digits(minor) {
        return Err(odd());
    }
    Ok(format!("0x{major:0>2}{minor:0<2}"))
}

/// What a `<redirfilter>` says.
///
/// # Errors
/// XML error.
pub fn filter(e: &Element) -> Result<String, VirError> {
    let rule = |e: &Element| {
        let allow = match e.attribute("allow") {
            Some("yes") => 1,
            Some("no") => 0,
            _ => return Err(wrong("A USB redir filter device 'allow' attribute is yes or no")),
        };
        let (class, vendor, product) = (part(e, "class", 2)?, part(e, "vendor", 4)?, part(e, "product", 4)?);
        Ok(format!("{class}:{vendor}:{product}:{}:{allow}", version(e)?))
    };
    if let Some(other) = e.elements().iter().find(|inner| inner.name() != "usbdev") {
        return Err(refuse(&format!("redirfilter {}", other.name()), "is not known"));
    }
    let rules = e.elements().iter().map(rule).collect::<Result<Vec<_>, _>>()?;
    match rules.is_empty() {
        true => Err(refuse("redirfilter", "it has no rule; leave it out")),
        false => Ok(rules.join("|")),
    }
}

/// As an element.
pub fn shown_filter(text: &str) -> Element {
    let rule = |rule: &str| {
        let mut parts = rule.split(':').map(str::to_owned);
        let mut e = Element::new("usbdev");
        for name in ["class", "vendor", "product"] {
            e.set(name, parts.next().unwrap_or_default());
        }
        // 0x0110 is 1.10.
        let version = parts.next().unwrap_or_default();
        let digits = version.strip_prefix("0x").map(|digits| format!("{digits:0>4}"));
        e.set("version", digits.map_or(version, |d| format!("{}.{}", &d[..2], &d[2..])));
        e.set("allow", if parts.next().as_deref() == Some("1") { "yes" } else { "no" });
        e
    };
    Element::new("redirfilter").children(text.split('|').map(rule))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml::read::document;

    fn devices(text: &str) -> Vec<Element> {
        document(&format!("<devices>{text}</devices>")).unwrap().elements().to_vec()
    }

    /// Those of libvirt's own documents that are taken, with the keys of their devices.
    const TAKEN: &[(&str, &str)] = &[
        (
            "<redirdev bus='usb' type='unix'><source mode='bind' path='/tmp/listen.socket'/><protocol type='raw'/></redirdev>",
            "redirect0: port=redirect to=unix path=/tmp/listen.socket mode=listen",
        ),
        (
            "<smartcard mode='passthrough' type='tcp'><source mode='bind' host='127.0.0.1' service='2001'/><protocol type='raw'/></smartcard>",
            "smartcard0: port=smartcard to=tcp address=127.0.0.1:2001 mode=listen",
        ),
        (
            "<controller type='ccid' index='0'/><smartcard mode='passthrough' type='spicevmc'><address type='ccid' controller='0' slot='0'/></smartcard>",
            "smartcard0: port=smartcard to=spice",
        ),
        (
            "<rng model='virtio'><backend model='egd' type='tcp'><source mode='connect' host='1.2.3.4' service='1234'/><protocol type='raw'/></backend></rng>",
            "random0: port=random to=tcp address=1.2.3.4:1234 mode=connect",
        ),
    ];

    #[test]
    fn documents_become_ports_and_are_shown_in_the_same_meaning() {
        for (text, wanted) in TAKEN {
            let said = all(&devices(text)).unwrap();
            let line = |(name, port): &(String, PortDevice)| {
                let keys = port.keys().into_iter().map(|(k, v)| format!("{k}={v}"));
                format!("{name}: {}", keys.collect::<Vec<_>>().join(" "))
            };
            assert_eq!(said.iter().map(line).collect::<Vec<_>>(), [*wanted], "{text}");
            let again: Vec<_> = said.iter().map(|(_, port)| shown(port)).collect();
            assert_eq!(all(&again).unwrap(), said, "{text}");
        }
        let plain =
            "<redirdev bus='usb' type='spicevmc'/><rng model='virtio'><backend model='random'/></rng>";
        assert!(all(&devices(plain)).unwrap().is_empty(), "they are none of these");
    }

    #[test]
    fn what_is_not_there_is_named() {
        for (text, word) in [
            ("<smartcard mode='host'/>", "smartcard mode: 'host'"),
            (
                "<smartcard mode='host-certificates'><certificate>a</certificate></smartcard>",
                "smartcard mode: ",
            ),
            ("<smartcard/>", "unknown smartcard mode"),
            ("<smartcard mode='passthrough' type='file'><source path='/x'/></smartcard>", "smartcard type: "),
            ("<redirdev bus='usb' type='spiceport'/>", "redirdev type: "),
            (
                "<redirdev bus='usb' type='tcp'><source mode='connect' host='localhost' service='1'/></redirdev>",
                "redirdev source host",
            ),
            ("<redirdev bus='usb' type='pty'><boot order='1'/></redirdev>", "redirdev boot: "),
            ("<redirdev bus='pci' type='pty'/>", "redirdev bus: "),
            ("<rng model='virtio'><rate bytes='5'/><backend model='egd' type='pty'/></rng>", "rng rate: "),
            ("<rng model='virtio'><backend model='egd' type='udp'/></rng>", "rng type: "),
            ("<controller type='ccid' index='0'/>", "controller: a reader"),
        ] {
            let e = all(&devices(text)).unwrap_err();
            assert!(e.text.contains(word), "{text}: {}", e.text);
        }
        let two = "<smartcard mode='passthrough' type='spicevmc'/>".repeat(2);
        assert!(all(&devices(&two)).unwrap_err().text.contains("a machine has one"));
    }

    #[test]
    fn filters_are_read_as_usbredir_has_them_and_shown_in_the_same_meaning() {
        let text = "<redirfilter><usbdev class='0x08' vendor='0x15E1' product='0x2007' version='1.09' allow='yes'/>\
            <usbdev class='8' vendor='0x15E1' product='0x2007' version='9.4' allow='yes'/><usbdev allow='no'/></redirfilter>";
        let found = filter(&document(text).unwrap()).unwrap();
        assert_eq!(found, "0x08:0x15E1:0x2007:0x0109:1|0x08:0x15E1:0x2007:0x0940:1|-1:-1:-1:-1:0");
        assert_eq!(karst_model::device::usb_filter("f", &found).unwrap(), found);
        assert_eq!(filter(&shown_filter(&found)).unwrap(), found);
        for bad in [
            "<usbdev/>",
            "<usbdev allow='no' class='256'/>",
            "<usbdev allow='no' version='1.100'/>",
            "<usbdev allow='no' version='x'/>",
            "",
        ] {
            let e = document(&format!("<redirfilter>{bad}</redirfilter>")).unwrap();
            assert!(filter(&e).is_err(), "{bad}");
        }
    }
}
