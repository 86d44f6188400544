//! Devices of the host that a machine is given, both ways: those on USB (`<hostdev>`), those that somebody types and points with
//! (`<input type='passthrough'>`, `<input type='evdev'>`), and sockets (`<vsock>`). They are devices of the types `usb`, `input` and `vsock`,
//! which the host's policy grants. Those on PCI and SCSI, and mediated ones, are refused by name.

use super::{Opaque, board, options, read, refuse, write, wrong};
use crate::{error::VirError, xml::Element};
use karst_model::{
    device::{
        Device, Devices, FIXED_CIDS, HostDevice, INPUT_TOGGLES, InputEnd, InputHostDevice, UsbHostDevice,
        UsbMatch, VsockHostDevice, is_fixed_cid, own_cid,
    },
    instance::DeviceIdentity,
    options::Virtio,
};
use std::collections::BTreeMap;

type Keys = BTreeMap<String, String>;

/// Is it an element of one?
pub fn is(e: &Element) -> bool {
    match e.name() {
        "hostdev" | "vsock" => true,
        "input" => matches!(e.attribute("type"), Some("passthrough" | "evdev")),
        _ => false,
    }
}

/// Is it one on USB?
pub fn is_usb(e: &Element) -> bool {
    e.name() == "hostdev" && e.attribute("type") == Some("usb")
}

fn demand_known(e: &Element, attributes: &[&str], elements: &[&str]) -> Result<(), VirError> {
    let of = if e.name() == "source" { "hostdev source" } else { e.name() };
    if let Some((name, _)) = e.attributes().find(|(name, _)| !attributes.contains(name)) {
        return Err(refuse(&format!("{of} {name}"), "is not there for this device"));
    }
    match e.elements().iter().find(|inner| !elements.contains(&inner.name())) {
        Some(inner) => Err(refuse(&format!("{of} {}", inner.name()), "is not there for this device")),
        None => Ok(()),
    }
}

fn number(e: &Element, name: &str) -> Result<u16, VirError> {
    let text = e.attribute(name).unwrap_or_default();
    let found = match text.strip_prefix("0x") {
        Some(hex) => u16::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    };
    found.ok_or_else(|| wrong(format!("cannot parse usb {} {name} '{text}'", e.name())))
}

/// Which device of the host a `<source>` means.
fn which(source: &Element) -> Result<UsbMatch, VirError> {
    let id = |name: &str| source.find(name).map(|e| number(e, "id")).transpose();
    let place = |e: &Element| {
        if e.attribute("port").is_some() {
            return Err(refuse("hostdev source address", "a device is named by its bus and number"));
        }
        Ok((number(e, "bus")?, number(e, "device")?))
    };
    let (vendor, product) = (id("vendor")?, id("product")?);
    if vendor.is_some() != product.is_some() {
        return Err(wrong("missing vendor or product of a USB hostdev"));
    }
    let at = source.find("address").map(place).transpose()?;
    let found = UsbMatch { vendor, product, at, serial: None };
    match found == UsbMatch::default() {
        true => Err(refuse("hostdev", "a device on USB is named by vendor and product, or by its address")),
        false => Ok(found),
    }
}

fn usb(e: &Element) -> Result<HostDevice, VirError> {
    demand_known(e, &["mode", "type", "managed"], &["source", "boot", "alias", "address"])?;
    let none = Element::new("source");
    let source = e.find("source").unwrap_or(&none);
    demand_known(source, &["startupPolicy", "guestReset"], &["vendor", "product", "address"])?;
    let required = match source.attribute("startupPolicy") {
        None | Some("mandatory" | "requisite" | "default") => true,
        Some("optional") => false,
        Some(other) => return Err(wrong(format!("unknown startup policy '{other}'"))),
    };
    // Once the guest resets it, as QEMU does.
    if let Some(other) = source.attribute("guestReset").filter(|r| *r != "uninitialized") {
        return Err(refuse("hostdev source guestReset", format!("'{other}' is not there; uninitialized is")));
    }
    Ok(HostDevice::Usb(UsbHostDevice {
        which: which(source)?,
        required,
        uid: 0,
        gid: 0,
        mode: 0o660,
        port: board::place(e)?,
        boot_priority: read::own_order(e)?,
    }))
}

fn path<'a>(e: &'a Element, attribute: &str) -> Result<&'a str, VirError> {
    let path = e.find("source").and_then(|s| s.attribute(attribute)).filter(|p| !p.is_empty());
    let path = path.ok_or_else(|| wrong("missing source of an input device"))?;
    match path.starts_with('/') {
        true => Ok(path),
        false => Err(wrong(format!("'{path}' is no absolute path"))),
    }
}

fn input(e: &Element) -> Result<HostDevice, VirError> {
    let known = ["type", "bus", "model"];
    demand_known(e, &known, &["source", "driver", "alias", "address"])?;
    let usual = |name: &str, values: &[&str]| match e.attribute(name).filter(|v| !values.contains(v)) {
        Some(other) => {
            Err(refuse(&format!("input {name}"), format!("'{other}' is not there for this device")))
        }
        None => Ok(()),
    };
    if e.attribute("type") == Some("passthrough") {
        usual("bus", &["virtio"])?;
        usual("model", &["virtio", "virtio-non-transitional"])?;
        let virtio = options::virtio(e.find("driver"));
        let to = InputEnd::Device { virtio };
        return Ok(HostDevice::Input(InputHostDevice { path: path(e, "evdev")?.to_owned(), to }));
    }
    usual("bus", &["none"])?;
    usual("model", &[])?;
    if e.find("driver").is_some() {
        return Err(refuse("input driver", "a device of the seat is on no bus"));
    }
    let of = |name: &str| e.find("source").and_then(|s| s.attribute(name));
    let grab_all = match of("grab") {
        None => false,
        Some("all") => true,
        Some(other) => return Err(refuse("input source grab", format!("'{other}' is not there; all is"))),
    };
    let repeat = match of("repeat") {
        None | Some("off") => false,
        Some("on") => true,
        Some(other) => return Err(wrong(format!("invalid value '{other}' of repeat of an input device"))),
    };
    let toggle = of("grabToggle").map(str::to_owned);
    if let Some(other) = toggle.as_ref().filter(|t| !INPUT_TOGGLES.contains(&t.as_str())) {
        return Err(refuse("input source grabToggle", format!("'{other}' is not there")));
    }
    let to = InputEnd::Seat { grab_all, repeat, toggle };
    Ok(HostDevice::Input(InputHostDevice { path: path(e, "dev")?.to_owned(), to }))
}

fn vsock(e: &Element) -> Result<HostDevice, VirError> {
    demand_known(e, &["model"], &["cid", "alias", "address"])?;
    if let Some(other) = e.attribute("model").filter(|m| !["virtio", "virtio-non-transitional"].contains(m)) {
        return Err(refuse("vsock model", format!("'{other}' is not there; virtio is")));
    }
    let cid = e.find("cid");
    let of = |name: &str| cid.and_then(|c| c.attribute(name));
    let cid = match (of("auto"), of("address")) {
        // What is said beside is that of a run.
        (Some("yes"), _) | (None, None) => None,
        (None | Some("no"), Some(text)) => {
            // Above are those of machines whose number is each run's own.
            let cid = text.parse().ok().filter(|n: &u32| is_fixed_cid(*n));
            Some(cid.ok_or_else(|| wrong(format!("guest CIDs must be >= 3, {FIXED_CIDS}: '{text}'")))?)
        }
        (Some("no"), None) => return Err(wrong("missing address of a <cid> that is not auto")),
        (Some(other), _) => return Err(wrong(format!("invalid value '{other}' of auto in <cid>"))),
    };
    Ok(HostDevice::Vsock(VsockHostDevice { cid }))
}

/// What an element of one says.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element or attribute.
pub fn read(e: &Element) -> Result<HostDevice, VirError> {
    match e.name() {
        "input" => return input(e),
        "vsock" => return vsock(e),
        _ => {}
    }
    if let Some(other) = e.attribute("mode").filter(|m| *m != "subsystem") {
        return Err(refuse("hostdev mode", format!("'{other}' is for containers")));
    }
    match e.attribute("type") {
        Some("usb") => usb(e),
        Some("pci") => Err(refuse("hostdev", "devices on PCI are not passed through; those on USB are")),
        Some("scsi" | "scsi_host") => {
            let text =
                "devices on SCSI are not passed through; a disk of the host is given as a disk, by its path";
            Err(refuse("hostdev", text))
        }
        Some("mdev") => Err(refuse("hostdev", "mediated devices are not passed through")),
        Some(other) => Err(refuse("hostdev type", format!("'{other}' is not there; usb is"))),
        None => Err(refuse("hostdev", "it says no type; usb is there")),
    }
}

/// Those of a document.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the element.
pub fn all(devices: &[Element]) -> Result<Vec<HostDevice>, VirError> {
    let without = |e: &Element| {
        e.name() == "controller" && e.attribute("type") == Some("usb") && e.attribute("model") == Some("none")
    };
    if devices.iter().any(is_usb) && devices.iter().any(without) {
        return Err(refuse("hostdev", "there is no controller of USB that it could be at"));
    }
    let mut found: Vec<HostDevice> = vec![];
    for e in devices.iter().filter(|e| is(e)) {
        let one = read(e)?;
        if found.iter().any(|other| same(other, &one)) {
            return Err(wrong(format!("<{}> is given twice", e.name())));
        }
        found.push(one);
    }
    // In the order in which they are shown.
    found.sort_by_key(|one| match one {
        HostDevice::Input(_) => 0,
        HostDevice::Usb(_) => 1,
        HostDevice::Vsock(_) => 2,
    });
    Ok(found)
}

/// Is it the same device of the host?
pub fn same(a: &HostDevice, b: &HostDevice) -> bool {
    match (a, b) {
        (HostDevice::Usb(a), HostDevice::Usb(b)) => a.which == b.which,
        (HostDevice::Input(a), HostDevice::Input(b)) => a.path == b.path,
        // There is one.
        (HostDevice::Vsock(_), HostDevice::Vsock(_)) => true,
        _ => false,
    }
}

/// Has libvirt words for it?
fn has_words(device: &HostDevice) -> bool {
    match device {
        HostDevice::Usb(usb) => {
            let UsbMatch { vendor, product, at, serial } = &usb.which;
            serial.is_none() && vendor.is_some() == product.is_some() && (vendor.is_some() || at.is_some())
        }
        HostDevice::Input(_) | HostDevice::Vsock(_) => true,
    }
}

/// What a device is in the words of a document: a machine has no node whose owner could be said.
pub fn now(device: &HostDevice) -> Option<HostDevice> {
    let mut device = device.clone();
    if let HostDevice::Usb(usb) = &mut device {
        (usb.uid, usb.gid, usb.mode) = (0, 0, 0o660);
    }
    has_words(&device).then_some(device)
}

/// The keys of a device.
pub fn keys(device: &HostDevice) -> Keys {
    let mut all: Vec<(&str, String)> = vec![];
    match device {
        HostDevice::Usb(usb) => {
            all.push(("type", "usb".into()));
            all.extend(usb.which.vendor.map(|n| ("vendorid", format!("{n:04x}"))));
            all.extend(usb.which.product.map(|n| ("productid", format!("{n:04x}"))));
            if let Some((bus, number)) = usb.which.at {
                all.extend([("busnum", bus.to_string()), ("devnum", number.to_string())]);
            }
            all.extend(usb.which.serial.clone().map(|text| ("serial", text)));
            all.extend(usb.required.then(|| ("required", "true".into())));
            all.extend(usb.port.as_ref().map(|(bus, port)| ("port", format!("{bus}:{port}"))));
            all.extend(usb.boot_priority.map(|n| ("boot.priority", n.to_string())));
        }
        HostDevice::Vsock(vsock) => {
            all.push(("type", "vsock".into()));
            all.extend(vsock.cid.map(|n| ("cid", n.to_string())));
        }
        HostDevice::Input(input) => {
            all.extend([("type", "input".into()), ("source", input.path.clone())]);
            match &input.to {
                InputEnd::Device { virtio } => {
                    let words = virtio.words().join(",");
                    all.extend((!words.is_empty()).then_some(("io.options", words)));
                }
                InputEnd::Seat { grab_all, repeat, toggle } => {
                    all.push(("to", "seat".into()));
                    all.extend(grab_all.then(|| ("grab", "all".into())));
                    all.extend(repeat.then(|| ("repeat", "true".into())));
                    all.extend(toggle.clone().map(|keys| ("toggle", keys)));
                }
            }
        }
    }
    all.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// What a device of these keys is in the words of a document; nothing of others.
pub fn of(keys: &Keys) -> Option<HostDevice> {
    match Device::parse("d", keys) {
        Ok(Device::Usb(device)) => now(&HostDevice::Usb(device)),
        Ok(Device::Input(device)) => now(&HostDevice::Input(device)),
        Ok(Device::Vsock(device)) => now(&HostDevice::Vsock(device)),
        _ => None,
    }
}

/// Brings the devices of a machine from what its document said to what it is to say; `expanded` are all that it has.
pub fn change(devices: &mut Devices, expanded: &Devices, old: &[HostDevice], new: &[HostDevice]) {
    let gone = |keys: &Keys| of(keys).is_some_and(|device| !new.contains(&device));
    for (name, _) in expanded.iter().filter(|(_, keys)| gone(keys)) {
        if devices.remove(name).is_none() {
            // Of a profile: masked.
            devices.insert(name.clone(), [("type".to_owned(), "none".to_owned())].into());
        }
    }
    for one in new.iter().filter(|one| !old.contains(one)) {
        let kind = match one {
            HostDevice::Usb(_) => "hostdev",
            HostDevice::Input(_) => "input",
            HostDevice::Vsock(_) => "vsock",
        };
        let free = |name: &String| !devices.contains_key(name) && !expanded.contains_key(name);
        let name = (0..).map(|n| format!("{kind}{n}")).find(free).unwrap_or_default();
        devices.insert(name, keys(one));
    }
}

/// The element of a document that still says what is there.
pub fn kept<'a>(devices: &'a [Element], now: &HostDevice) -> Option<&'a Element> {
    devices.iter().find(|e| is(e) && read(e).is_ok_and(|said| said == *now))
}

/// A device of the host. Of one that runs its place is told, else what the document wished.
pub fn element(
    (name, identity): (&str, Option<&DeviceIdentity>),
    now: &HostDevice,
    boot: Option<u32>,
    run: Option<i32>,
    opaque: &Opaque,
) -> Element {
    let (said, live) = (kept(&opaque.devices, now), run.is_some());
    let mut e = said.cloned().unwrap_or_else(|| shown(now));
    if said.is_none() {
        e.push_some(boot.map(|order| Element::new("boot").with("order", order)));
    }
    if live && e.find("alias").is_none() {
        e.push(Element::new("alias").with("name", identity.map_or(name, |i| i.alias.as_str())));
    }
    if let Some(place) = identity.and_then(write::placed).filter(|_| live || said.is_none()) {
        e.elements_mut().retain(|inner| inner.name() != "address");
        e.push(place);
    }
    if let (HostDevice::Vsock(VsockHostDevice { cid: None }), Some(id)) = (now, run) {
        // That of this run.
        e.elements_mut().retain(|inner| inner.name() != "cid");
        e.push(Element::new("cid").with("auto", "yes").with("address", own_cid(id.max(0) as u32)));
    }
    write::sort(&mut e, &["driver", "source", "cid", "boot", "alias", "address"]);
    e
}

/// As an element, without boot order and alias.
pub fn shown(device: &HostDevice) -> Element {
    match device {
        HostDevice::Usb(usb) => {
            let policy = (!usb.required).then_some("optional");
            let mut source = Element::new("source").with_some("startupPolicy", policy);
            for (name, id) in [("vendor", usb.which.vendor), ("product", usb.which.product)] {
                source.push_some(id.map(|id| Element::new(name).with("id", format!("0x{id:04x}"))));
            }
            let address =
                |(bus, device): (u16, u16)| Element::new("address").with("bus", bus).with("device", device);
            source.push_some(usb.which.at.map(address));
            let mut e =
                Element::new("hostdev").with("mode", "subsystem").with("type", "usb").with("managed", "no");
            e.push(source);
            e.push_some(usb.port.as_ref().map(|(bus, port)| {
                Element::new("address").with("type", "usb").with("bus", bus).with("port", port)
            }));
            e
        }
        HostDevice::Vsock(vsock) => {
            let cid = Element::new("cid").with("auto", if vsock.cid.is_some() { "no" } else { "yes" });
            Element::new("vsock").with("model", "virtio").child(cid.with_some("address", vsock.cid))
        }
        HostDevice::Input(input) => match &input.to {
            InputEnd::Device { virtio } => {
                let mut e = Element::new("input").with("type", "passthrough").with("bus", "virtio");
                if *virtio != Virtio::default() {
                    let mut driver = Element::new("driver");
                    options::show_virtio(&mut driver, *virtio);
                    e.push(driver);
                }
                e.child(Element::new("source").with("evdev", &input.path))
            }
            InputEnd::Seat { grab_all, repeat, toggle } => Element::new("input").with("type", "evdev").child(
                Element::new("source")
                    .with("dev", &input.path)
                    .with_some("grab", grab_all.then_some("all"))
                    .with_some("grabToggle", toggle.as_ref())
                    .with_some("repeat", repeat.then_some("on")),
            ),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml::read::document;

    fn one(text: &str) -> Result<HostDevice, VirError> {
        read(&document(text).unwrap())
    }

    /// Those of libvirt's own documents that are taken, with the keys of their devices.
    const TAKEN: &[(&str, &str)] = &[
        (
            "<hostdev mode='subsystem' type='usb' managed='no'><source guestReset='uninitialized'><address bus='14' device='6'/></source>\
             <boot order='1'/></hostdev>",
            "boot.priority=999 busnum=14 devnum=6 required=true type=usb",
        ),
        (
            "<hostdev mode='subsystem' type='usb'><source><address bus='14' device='7'/></source>\
             <address type='usb' bus='2' port='2'/></hostdev>",
            "busnum=14 devnum=7 port=2:2 required=true type=usb",
        ),
        (
            "<hostdev mode='subsystem' type='usb'><source startupPolicy='optional'><vendor id='0x1234'/><product id='0xbeef'/></source></hostdev>",
            "productid=beef type=usb vendorid=1234",
        ),
        (
            "<input type='passthrough' bus='virtio'><driver iommu='on' packed='on'/><source evdev='/dev/input/event1234'/></input>",
            "io.options=iommu,packed source=/dev/input/event1234 type=input",
        ),
        (
            "<input type='evdev'><source dev='/dev/input/event1234' grab='all' grabToggle='alt-alt' repeat='on'/></input>",
            "grab=all repeat=true source=/dev/input/event1234 to=seat toggle=alt-alt type=input",
        ),
        (
            "<input type='evdev'><source dev='/dev/input/event5'/></input>",
            "source=/dev/input/event5 to=seat type=input",
        ),
        ("<vsock model='virtio'><cid auto='no' address='4'/></vsock>", "cid=4 type=vsock"),
        ("<vsock><cid auto='yes'/></vsock>", "type=vsock"),
    ];

    #[test]
    fn documents_become_devices_and_are_shown_in_the_same_meaning() {
        for (text, wanted) in TAKEN {
            let said = one(text).unwrap();
            let keys = keys(&said);
            let line: Vec<String> = keys.iter().map(|(k, v)| format!("{k}={v}")).collect();
            assert_eq!(line.join(" "), *wanted, "{text}");
            let parsed = match Device::parse("d", &keys).unwrap() {
                Device::Usb(device) => HostDevice::Usb(device),
                Device::Input(device) => HostDevice::Input(device),
                Device::Vsock(device) => HostDevice::Vsock(device),
                other => panic!("{other:?}"),
            };
            assert_eq!(now(&parsed).as_ref(), Some(&said));
            let written = [document(text).unwrap()];
            assert_eq!(kept(&written, &said), Some(&written[0]));
            let mut again = read(&shown(&said)).unwrap();
            if let (HostDevice::Usb(again), HostDevice::Usb(said)) = (&mut again, &said) {
                again.boot_priority = said.boot_priority;
            }
            assert_eq!(again, said, "{text}");
        }
    }

    #[test]
    fn only_what_changes_is_changed() {
        let of = |n: usize| one(TAKEN[n].0).unwrap();
        let mut devices = Devices::new();
        change(&mut devices, &Devices::new(), &[], &[of(0), of(3), of(2)]);
        assert_eq!(devices.keys().collect::<Vec<_>>(), ["hostdev0", "hostdev1", "input0"]);
        // What libvirt has no word for stays, and so does what is the same by another name.
        let serial = [("type", "usb"), ("serial", "A1")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        devices.insert("mine".into(), serial.into());
        let mut expanded = devices.clone();
        expanded.insert("profiled".into(), keys(&of(1)));
        let old = [of(0), of(3), of(2), of(1)];
        change(&mut devices, &expanded, &old, &[of(2), of(4)]);
        assert_eq!(devices.keys().collect::<Vec<_>>(), ["hostdev1", "input1", "mine", "profiled"]);
        assert_eq!(devices["profiled"]["type"], "none");
    }

    #[test]
    fn what_is_not_there_is_named() {
        let usb = |inner: &str| format!("<hostdev mode='subsystem' type='usb'>{inner}</hostdev>");
        let address = "<address bus='14' device='6'/>";
        for (text, word) in [
            ("<hostdev/>".to_owned(), "hostdev: "),
            ("<hostdev mode='capabilities' type='misc'/>".to_owned(), "hostdev mode: "),
            ("<hostdev mode='subsystem' type='pci'/>".to_owned(), "hostdev: devices on PCI"),
            ("<hostdev mode='subsystem' type='scsi'/>".to_owned(), "hostdev: devices on SCSI"),
            ("<hostdev mode='subsystem' type='mdev' model='vfio-pci'/>".to_owned(), "hostdev: mediated"),
            ("<hostdev mode='subsystem' type='nvme'/>".to_owned(), "hostdev type: 'nvme'"),
            (usb(""), "hostdev: a device on USB is named"),
            (usb("<source><vendor id='1'/></source>"), "missing vendor or product"),
            (usb("<source><address bus='1'/></source>"), "device"),
            (usb(&format!("<source guestReset='off'>{address}</source>")), "hostdev source guestReset: "),
            (usb(&format!("<source>{address}</source><rom bar='off'/>")), "hostdev rom: "),
            ("<input type='passthrough' bus='usb'><source evdev='/x'/></input>".to_owned(), "input bus: "),
            ("<input type='passthrough' bus='virtio'/>".to_owned(), "missing source"),
            ("<input type='evdev'/>".to_owned(), "missing source"),
            ("<vsock model='virtio-transitional'/>".to_owned(), "vsock model: "),
            ("<vsock><cid auto='no' address='2'/></vsock>".to_owned(), "must be >= 3"),
            ("<vsock><cid auto='no' address='1258291200'/></vsock>".to_owned(), "from 3 to 1258291199"),
            ("<vsock><cid auto='no'/></vsock>".to_owned(), "missing address"),
            ("<vsock><driver iommu='on'/></vsock>".to_owned(), "vsock driver: "),
            ("<input type='evdev'><source dev='event5'/></input>".to_owned(), "absolute path"),
            ("<input type='evdev'><source dev='/x' grabToggle='space'/></input>".to_owned(), "grabToggle: "),
        ] {
            let e = one(&text).unwrap_err();
            assert!(e.text.contains(word), "{text}: {}", e.text);
        }
        let devices = |text: &str| {
            let root = document(&format!("<devices>{text}</devices>")).unwrap();
            all(root.elements()).map(|all| all.len()).map_err(|e| e.text)
        };
        let good = usb(&format!("<source>{address}</source>"));
        assert_eq!(devices(&good), Ok(1));
        assert!(devices(&format!("{good}{good}")).unwrap_err().contains("twice"));
        let none = devices(&format!("<controller type='usb' model='none'/>{good}"));
        assert!(none.unwrap_err().starts_with("hostdev: there is no controller"));
    }
}
