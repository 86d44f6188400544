//! What a domain says of options of its machine that are no devices of their own ([`karst_model::board::Features`]), and of the
//! devices of virtio that each machine has, both ways.

use super::{hostdevs, options, refuse, wrong};
use crate::{
    error::VirError,
    xml::{Element, machine::read::kib},
};
use karst_model::{
    board::{Board, Features, Iommu, IommuModel, Rng},
    options::Virtio,
};
use std::collections::BTreeMap;

const MIB: u64 = 1024;

fn is_on(e: Option<&Element>) -> bool {
    e.is_some_and(|e| e.attribute("state").is_none_or(|state| state == "on"))
}

fn mib(e: &Element, usual: &str) -> Result<u32, VirError> {
    let size =
        Element::text(e.name().to_owned(), e.body()).with("unit", e.attribute("unit").unwrap_or(usual));
    Ok(u32::try_from(kib(&size)?.div_ceil(MIB)).unwrap_or(u32::MAX))
}

/// What a `<features>` says that is held by the board.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub fn features(e: &Element) -> Result<Features, VirError> {
    let ring =
        e.find("kvm").and_then(|k| k.find("dirty-ring")).filter(|r| r.attribute("state") == Some("on"));
    let dirty_ring = ring.map(|r| {
        let size = r.attribute("size").unwrap_or("4096").parse().ok();
        let good = size.filter(|n: &u32| (1024..=65_536).contains(n) && n.is_power_of_two());
        good.ok_or_else(|| wrong("dirty ring must be power of 2 and ranges [1024, 65536]"))
    });
    let tseg = e.find("smm").filter(|s| s.attribute("state") != Some("off")).and_then(|s| s.find("tseg"));
    let cache = e.find("tcg").and_then(|t| t.find("tb-cache"));
    let (tseg, translations) =
        (tseg.map(|t| mib(t, "MiB")).transpose()?, cache.map(|t| mib(t, "KiB")).transpose()?);
    if tseg.max(translations).is_some_and(|n| n > 4095) {
        return Err(refuse("features", "a tseg and a tb-cache have 4095 MiB at most"));
    }
    Ok(Features {
        vmcoreinfo: is_on(e.find("vmcoreinfo")),
        split_irqchip: e.find("ioapic").is_some_and(|i| i.attribute("driver") == Some("qemu")),
        dirty_ring: dirty_ring.transpose()?,
        tseg,
        translations,
        ..Features::default()
    })
}

/// Of those of a board, what a `<features>` says.
pub fn said_by_features(all: &Features) -> Features {
    Features { hyper_v_panic: false, tpm_tis: false, real_time_clock: false, ..*all }
}

/// Says it in a `<features>` that says nothing of it.
pub fn show_features(e: &mut Element, all: &Features) {
    if all.vmcoreinfo {
        e.push(Element::new("vmcoreinfo").with("state", "on"));
    }
    if all.split_irqchip {
        e.push(Element::new("ioapic").with("driver", "qemu"));
    }
    e.push_some(all.dirty_ring.map(|size| {
        Element::new("kvm").child(Element::new("dirty-ring").with("state", "on").with("size", size))
    }));
    e.push_some(all.tseg.map(|size| {
        Element::new("smm").with("state", "on").child(Element::text("tseg", size).with("unit", "MiB"))
    }));
    e.push_some(all.translations.map(|size| {
        Element::new("tcg").child(Element::text("tb-cache", u64::from(size) * MIB).with("unit", "KiB"))
    }));
}

/// An `<iommu>`.
///
/// # Errors
/// CONFIG_UNSUPPORTED, naming the element.
pub fn iommu(e: &Element) -> Result<Iommu, VirError> {
    let mut found = match e.attribute("model") {
        Some("intel") => Iommu::of(IommuModel::Intel),
        Some("virtio") => Iommu::of(IommuModel::Virtio),
        other => {
            let text = format!("'{}' is not there; intel and virtio are", other.unwrap_or_default());
            return Err(refuse("iommu model", text));
        }
    };
    let Some(driver) = e.find("driver") else { return Ok(found) };
    if found.model == IommuModel::Virtio {
        return Err(refuse("iommu driver", "that of virtio has no options"));
    }
    for (name, value) in driver.attributes() {
        let on = match value {
            "on" => Some(true),
            "off" => Some(false),
            _ => None,
        };
        match (name, on, value) {
            ("intremap", Some(on), _) => found.interrupts = Some(on),
            ("eim", Some(on), _) => found.extended = Some(on),
            ("caching_mode", Some(on), _) => found.caching = on,
            ("iotlb", Some(on), _) => found.iotlb = on,
            ("aw_bits", _, "39") => found.width = Some(39),
            ("aw_bits", _, "48") => found.width = Some(48),
            _ => return Err(refuse("iommu driver", format!("'{value}' of {name} is not there"))),
        }
    }
    Ok(found)
}

/// As an element.
pub fn shown_iommu(one: &Iommu) -> Element {
    let model = if one.model == IommuModel::Intel { "intel" } else { "virtio" };
    let switch = |on: bool| if on { "on" } else { "off" };
    let driver = Element::new("driver")
        .with_some("intremap", one.interrupts.map(switch))
        .with_some("caching_mode", one.caching.then_some("on"))
        .with_some("eim", one.extended.map(switch))
        .with_some("iotlb", one.iotlb.then_some("on"))
        .with_some("aw_bits", one.width);
    let e = Element::new("iommu").with("model", model);
    if driver.attributes().next().is_some() { e.child(driver) } else { e }
}

/// An `<rng>`.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub fn rng(e: &Element) -> Result<Rng, VirError> {
    let rate = match e.find("rate") {
        None => None,
        Some(rate) => {
            let number = |name: &str, usual: &str| rate.attribute(name).unwrap_or(usual).parse::<u64>().ok();
            let bytes = number("bytes", "").filter(|n| *n > 0);
            let period = number("period", "1000").and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0);
            Some(bytes.zip(period).ok_or_else(|| wrong("invalid RNG rate bytes value, or period"))?)
        }
    };
    Ok(Rng { rate, virtio: options::virtio(e.find("driver")) })
}

/// As an element.
pub fn shown_rng(one: &Rng) -> Element {
    let mut e = Element::new("rng").with("model", "virtio");
    e.push_some(
        one.rate.map(|(bytes, period)| Element::new("rate").with("bytes", bytes).with("period", period)),
    );
    e.push(Element::text("backend", "/dev/urandom").with("model", "random"));
    if !one.virtio.is_usual() {
        let mut driver = Element::new("driver");
        options::show_virtio(&mut driver, one.virtio);
        e.push(driver);
    }
    e
}

/// The device of virtio of each machine's that an element is of: the place among `<input>` elements of virtio is counted in
/// `inputs`.
fn part(e: &Element, inputs: &mut usize) -> Option<String> {
    let first = || e.attribute("index").is_none_or(|n| n == "0");
    match (e.name(), e.attribute("type")) {
        ("memballoon", _) => Some("balloon".into()),
        ("controller", Some("scsi")) if first() => Some("scsi".into()),
        ("controller", Some("virtio-serial")) if first() => Some("serial".into()),
        ("input", _) if e.attribute("bus") == Some("virtio") && !hostdevs::is(e) => {
            *inputs += 1;
            Some(format!("input{}", *inputs - 1))
        }
        _ => None,
    }
}

/// What devices say of those that each machine has.
///
/// # Errors
/// CONFIG_UNSUPPORTED, naming the element, for controllers beside them.
pub fn virtio(all: &[Element]) -> Result<BTreeMap<String, Virtio>, VirError> {
    let (mut found, mut inputs) = (BTreeMap::new(), 0);
    for e in all {
        let options = options::virtio(e.find("driver"));
        match part(e, &mut inputs) {
            _ if options.is_usual() => {}
            Some(part) => drop(found.insert(part, options)),
            // They have their own: [`super::scsi`].
            None if e.attribute("type") == Some("scsi") => {}
            None if e.name() == "controller" => {
                return Err(refuse("controller driver", "the controllers beside the first have no options"));
            }
            None => {}
        }
    }
    Ok(found)
}

/// Corrects what devices are shown to say of it.
pub fn show_virtio(devices: &mut Element, board: &Board) {
    let (mut seen, mut inputs) = (vec![], 0);
    for e in devices.elements_mut() {
        let Some(part) = part(e, &mut inputs) else { continue };
        let now = board.virtio.get(&part).copied().unwrap_or_default();
        if options::virtio(e.find("driver")) != now {
            let mut driver = e.find("driver").cloned().unwrap_or_else(|| Element::new("driver"));
            e.elements_mut().retain(|inner| inner.name() != "driver");
            options::bare(&mut driver);
            options::show_virtio(&mut driver, now);
            if driver.attributes().next().is_some() {
                e.elements_mut().insert(0, driver);
            }
        }
        seen.push(part);
    }
    for (part, kind, model) in [("scsi", "scsi", Some("virtio-scsi")), ("serial", "virtio-serial", None)] {
        let Some(now) = board.virtio.get(part).filter(|_| !seen.iter().any(|s| s == part)) else { continue };
        let mut driver = Element::new("driver");
        options::show_virtio(&mut driver, *now);
        let e = Element::new("controller").with("type", kind).with("index", 0).with_some("model", model);
        devices.push(e.child(driver));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml::read::document;

    #[test]
    fn features_are_read_and_shown_the_same() {
        let text = "<features><acpi/><kvm><dirty-ring state='on' size='4096'/></kvm><vmcoreinfo/><ioapic driver='qemu'/>\
            <smm state='on'><tseg>48</tseg></smm><tcg><tb-cache unit='KiB'>102400</tb-cache></tcg></features>";
        let found = features(&document(text).unwrap()).unwrap();
        let expected = Features {
            vmcoreinfo: true,
            split_irqchip: true,
            dirty_ring: Some(4096),
            tseg: Some(48),
            translations: Some(100),
            ..Features::default()
        };
        assert_eq!(found, expected);
        let mut shown = Element::new("features");
        show_features(&mut shown, &found);
        assert_eq!(features(&shown).unwrap(), found);
        let off = "<features><vmcoreinfo state='off'/><kvm><dirty-ring state='off'/></kvm><ioapic driver='kvm'/></features>";
        assert_eq!(features(&document(off).unwrap()).unwrap(), Features::default());
        for bad in [
            "<kvm><dirty-ring state='on' size='5000'/></kvm>",
            "<tcg><tb-cache unit='GiB'>4</tb-cache></tcg>",
            "<smm state='on'><tseg unit='GiB'>4</tseg></smm>",
        ] {
            assert!(features(&document(&format!("<features>{bad}</features>")).unwrap()).is_err(), "{bad}");
        }
    }

    #[test]
    fn iommus_and_random_numbers_are_read_and_shown_the_same() {
        for text in [
            "<iommu model='intel'/>",
            "<iommu model='virtio'/>",
            "<iommu model='intel'><driver intremap='on' caching_mode='on' eim='off' iotlb='on' aw_bits='48'/></iommu>",
        ] {
            let given = document(text).unwrap();
            assert_eq!(shown_iommu(&iommu(&given).unwrap()), given);
        }
        for bad in [
            "<iommu model='smmuv3'/>",
            "<iommu model='virtio'><driver eim='on'/></iommu>",
            "<iommu model='intel'><driver aw_bits='40'/></iommu>",
        ] {
            assert!(iommu(&document(bad).unwrap()).unwrap_err().text.starts_with("iommu "), "{bad}");
        }
        for text in [
            "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>",
            "<rng model='virtio'><rate bytes='123' period='1234'/><backend model='random'>/dev/urandom</backend>\
             <driver iommu='on' packed='on'/></rng>",
        ] {
            let given = document(text).unwrap();
            assert_eq!(shown_rng(&rng(&given).unwrap()), given);
        }
        assert_eq!(rng(&document("<rng><rate bytes='5'/></rng>").unwrap()).unwrap().rate, Some((5, 1000)));
        assert!(rng(&document("<rng><rate period='5'/></rng>").unwrap()).is_err());
    }

    #[test]
    fn devices_of_virtio_say_what_they_have_and_are_corrected() {
        let text = "<devices><controller type='scsi' index='0'><driver iommu='on' iothread='1'/></controller>\
            <controller type='scsi' index='1'><driver iommu='off'/></controller><input type='mouse' bus='ps2'/>\
            <input type='mouse' bus='virtio'/><input type='keyboard' bus='virtio'><driver packed='on'/></input>\
            <memballoon model='virtio'><driver ats='on'/></memballoon></devices>";
        let mut given = document(text).unwrap();
        let found = virtio(given.elements()).unwrap();
        assert_eq!(found.keys().map(String::as_str).collect::<Vec<_>>(), ["balloon", "input1", "scsi"]);
        let mut board = Board { virtio: found, ..Board::default() };
        show_virtio(&mut given, &board);
        assert_eq!(given, document(text).unwrap(), "nothing is to be corrected");
        board.virtio.remove("scsi");
        board.virtio.insert("serial".into(), Virtio { page_per_queue: true, ..Virtio::default() });
        show_virtio(&mut given, &board);
        assert_eq!(virtio(given.elements()).unwrap(), board.virtio);
        assert!(given.elements()[0].find("driver").is_some_and(|d| d.attribute("iothread") == Some("1")));
        let second = "<devices><controller type='scsi' index='1'><driver ats='on'/></controller></devices>";
        assert!(virtio(document(second).unwrap().elements()).unwrap().is_empty(), "it has its own");
        let second = second.replace("'scsi'", "'virtio-serial'");
        let e = virtio(document(&second).unwrap().elements()).unwrap_err();
        assert!(e.text.starts_with("controller driver: "), "{}", e.text);
    }
}
