//! What disks and NICs are said to have beside what is usual ([`karst_model::options`]), both ways: attributes of `<driver>`, the
//! geometry, blocks and rotation of a disk, offloads and the ROM of an interface.

use super::{Source, refuse, scsi};
use crate::{error::VirError, xml::Element};
use karst_model::{
    device::DiskBus,
    label::Label,
    options::{DiskOptions, NicOptions, NicSender, OFFLOADS, OnError, Virtio},
};

/// Attributes of a `<driver>`, and the words of what is said by them.
const VIRTIO: [(&str, &str); 4] =
    [("iommu", "iommu"), ("ats", "ats"), ("packed", "packed"), ("page_per_vq", "page-per-queue")];
/// The same of what is there unless it is said to be off.
const USUAL: [(&str, &str); 2] = [("event_idx", "event-index"), ("ioeventfd", "ioeventfd")];
/// What a disk shows of itself, each in an element of its own.
const NAMES: [&str; 4] = ["serial", "wwn", "vendor", "product"];
/// What a `<driver>` of an interface says of hashes, and the words of it.
const HASHES: [(&str, &str); 2] = [("rss", "rss"), ("rss_hash_report", "hash")];
/// What else a `<driver>` of a disk says that is held here.
const OF_DISKS: [&str; 4] = ["queues", "queue_size", "error_policy", "rerror_policy"];

fn of<'a>(e: Option<&'a Element>, name: &str) -> Option<&'a str> {
    e.and_then(|e| e.attribute(name))
}

/// Words that a `<driver>` of any device of virtio means.
fn common(driver: Option<&Element>) -> Vec<String> {
    let on =
        VIRTIO.iter().filter(|(name, _)| of(driver, name) == Some("on")).map(|(_, word)| (*word).to_owned());
    let off = USUAL.iter().filter(|(name, _)| of(driver, name) == Some("off"));
    on.chain(off.map(|(_, word)| format!("{word}=off"))).collect()
}

/// Options of any device of virtio, as its `<driver>` says them.
pub fn virtio(driver: Option<&Element>) -> Virtio {
    let mut found = Virtio::default();
    for (name, word) in VIRTIO {
        if of(driver, name) == Some("on") {
            found.take(word);
        }
    }
    found
}

/// Says them in a `<driver>`.
pub fn show_virtio(driver: &mut Element, options: Virtio) {
    for word in options.words() {
        if let Some((name, _)) = VIRTIO.iter().find(|(_, known)| *known == word) {
            driver.set(*name, "on");
        }
    }
}

/// What becomes of errors; nothing of what becomes of them anyway.
fn errors(driver: Option<&Element>) -> Result<Vec<String>, VirError> {
    let policy = |name: &str| match of(driver, name) {
        None | Some("default") => Ok(None),
        Some(text) => {
            let known = OnError::named(text).filter(|p| name == "error_policy" || *p != OnError::Enospace);
            known.map(Some).ok_or_else(|| refuse("disk driver", format!("'{text}' of {name} is not there")))
        }
    };
    let (write, read) = (policy("error_policy")?, policy("rerror_policy")?);
    // Without a word of its own, an error of reading is like one of writing, but that it takes no space.
    let read = read.or(write.filter(|w| *w != OnError::Enospace));
    let write = write.filter(|w| *w != OnError::Enospace).map(|w| format!("write-errors={}", w.as_str()));
    let read = read.filter(|r| *r != OnError::Report).map(|r| format!("read-errors={}", r.as_str()));
    Ok(write.into_iter().chain(read).collect())
}

/// What a `<disk>` says of its options.
///
/// # Errors
/// CONFIG_UNSUPPORTED, naming the element, for what a disk on this bus has not.
pub fn of_disk(
    e: &Element,
    bus: DiskBus,
    cdrom: bool,
    source: Option<&Source>,
) -> Result<DiskOptions, VirError> {
    let driver = e.find("driver");
    if of(driver, "copy_on_read") == Some("on") && matches!(source, Some(Source::Volume { .. })) {
        // A path of the host has no file below it from which anything could be copied.
        return Err(refuse("driver copy_on_read", "what a volume is a clone of is not copied by reading"));
    }
    let mut of_driver = common(driver);
    of_driver.extend(of(driver, "queues").map(|n| format!("queues={n}")));
    of_driver.extend(of(driver, "queue_size").map(|n| format!("queue-size={n}")));
    of_driver.extend(errors(driver)?);
    let rotation = of(e.find("target"), "rotation_rate").map(|n| format!("rotation={n}"));
    let removable = of(e.find("target"), "removable").filter(|r| *r == "on").map(|_| "removable".to_owned());
    let geometry = e.find("geometry").map(|g| {
        let number = |name: &str| g.attribute(name).unwrap_or_default().to_owned();
        let translation = g.attribute("trans").map(|t| format!("/{t}")).unwrap_or_default();
        format!("geometry={}/{}/{}{translation}", number("cyls"), number("heads"), number("secs"))
    });
    let blocks = e.find("blockio").and_then(|b| {
        let (logical, physical) = (b.attribute("logical_block_size"), b.attribute("physical_block_size"));
        let first = logical.or(physical.map(|_| "512"))?;
        Some(format!("blocks={first}/{}", physical.unwrap_or(first)))
    });
    let text = |name: &str| e.find(name).map(|inner| inner.body().trim_end()).filter(|t| !t.is_empty());
    let mut all = vec![];
    for name in NAMES {
        let Some(said) = text(name) else { continue };
        let element = format!("disk {name}");
        // In a list it would begin another option.
        if said.contains(',') {
            return Err(refuse(&element, "has no comma"));
        }
        let said = if name == "wwn" { said.trim_start_matches("0x") } else { said };
        let word = format!("{name}={said}");
        DiskOptions::parse("", &word, Some(bus)).map_err(|e| refuse(&element, e.message))?;
        all.push(word);
    }
    if bus == DiskBus::VirtioScsi {
        all.extend(scsi::of_disk(e)?.map(|n| format!("controller={n}")));
    }
    for (element, words) in [
        ("disk driver", of_driver),
        ("disk target", rotation.into_iter().chain(removable).collect()),
        ("disk geometry", geometry.into_iter().collect()),
        ("disk blockio", blocks.into_iter().collect()),
    ] {
        if words.is_empty() {
            continue;
        }
        if cdrom {
            return Err(refuse(element, "a drive of discs has none of it"));
        }
        DiskOptions::parse("", &words.join(","), Some(bus)).map_err(|e| refuse(element, e.message))?;
        all.extend(words);
    }
    match all.is_empty() {
        true => Ok(DiskOptions::default()),
        false => {
            DiskOptions::parse("", &all.join(","), Some(bus)).map_err(|e| refuse("disk driver", e.message))
        }
    }
}

/// What an `<interface>` says of its options; `virtio`: it is one of virtio.
///
/// # Errors
/// CONFIG_UNSUPPORTED, naming the element, for what such a NIC has not.
pub fn of_nic(e: &Element, virtio: bool) -> Result<NicOptions, VirError> {
    let driver = e.find("driver");
    let mut all = common(driver);
    match of(driver, "txmode") {
        Some("timer") => all.push("tx=timer".into()),
        Some(_) => all.push("tx=loop".into()),
        None => {}
    }
    all.extend(of(driver, "rx_queue_size").map(|n| format!("rx-queue-size={n}")));
    for (name, word) in HASHES {
        all.extend((of(driver, name) == Some("on")).then(|| word.to_owned()));
    }
    for (side, prefix) in [("host", ""), ("guest", "guest-")] {
        let Some(side) = driver.and_then(|d| d.find(side)) else { continue };
        for (name, _) in side.attributes().filter(|(_, value)| *value == "off") {
            all.push(format!("{prefix}{}=off", name.replace('_', "-")));
        }
    }
    for ip in e.all("ip") {
        let address = ip.attribute("address").unwrap_or_default();
        let (word, usual) =
            if ip.attribute("family") == Some("ipv6") { ("ipv6", "64") } else { ("ipv4", "24") };
        let network = format!("{word}={address}/{}", ip.attribute("prefix").unwrap_or(usual));
        if e.attribute("type") != Some("user") {
            return Err(refuse("interface ip", "addresses are given by the network"));
        }
        NicOptions::parse("", &network, virtio).map_err(|e| refuse("interface ip", e.message))?;
        all.push(network);
    }
    let rom = e.find("rom");
    let mut found = match all.is_empty() {
        true => NicOptions::default(),
        false => NicOptions::parse("", &all.join(","), virtio)
            .map_err(|e| refuse("interface driver", e.message))?,
    };
    found.no_rom = of(rom, "enabled") == Some("no") || of(rom, "file") == Some("");
    Ok(found)
}

/// Puts an inner element into its parent where it says anything.
fn put(e: &mut Element, inner: Element) {
    if !inner.elements().is_empty() || inner.attributes().next().is_some() {
        e.push(inner);
    }
}

/// Takes the first element of a name out, to be written anew.
fn taken(e: &mut Element, name: &'static str) -> Element {
    let found = e.find(name).cloned().unwrap_or_else(|| Element::new(name));
    if !e.elements().is_empty() {
        e.elements_mut().retain(|inner| inner.name() != name);
    }
    found
}

/// Takes out of a `<driver>` what any device of virtio is said to have.
pub fn bare(driver: &mut Element) {
    for name in VIRTIO.iter().chain(&USUAL).map(|(name, _)| *name) {
        driver.unset(name);
    }
}

fn say(driver: &mut Element, options: Virtio, no_event_index: bool, no_ioeventfd: bool) {
    show_virtio(driver, options);
    for (off, name) in [(no_event_index, "event_idx"), (no_ioeventfd, "ioeventfd")] {
        if off {
            driver.set(name, "off");
        }
    }
}

/// A `<disk>` as it was written, with the options that it has now; what it shows is a `source`.
pub fn disk_now(kept: Option<&Element>, now: &DiskOptions, bus: DiskBus, cdrom: bool) -> Element {
    let mut e = kept.cloned().unwrap_or_else(|| Element::new("disk"));
    if of_disk(&e, bus, cdrom, None).is_ok_and(|said| said == *now) {
        return e;
    }
    let mut driver = taken(&mut e, "driver");
    bare(&mut driver);
    OF_DISKS.iter().for_each(|name| driver.unset(name));
    say(&mut driver, now.virtio, now.no_event_index, now.no_ioeventfd);
    for (name, value) in [("queues", now.queues), ("queue_size", now.queue_size)] {
        if let Some(n) = value {
            driver.set(name, n);
        }
    }
    if now.write_errors.is_some() || now.read_errors.is_some() {
        driver.set("error_policy", now.write_errors.unwrap_or(OnError::Enospace).as_str());
        driver.set("rerror_policy", now.read_errors.unwrap_or(OnError::Report).as_str());
    }
    put(&mut e, driver);
    for name in ["geometry", "blockio"] {
        taken(&mut e, name);
    }
    e.push_some(now.geometry.map(|g| {
        let numbers =
            Element::new("geometry").with("cyls", g.cylinders).with("heads", g.heads).with("secs", g.sectors);
        numbers.with_some("trans", g.translation.map(|t| t.as_str()))
    }));
    e.push_some(now.blocks.map(|(logical, physical)| {
        Element::new("blockio").with("logical_block_size", logical).with("physical_block_size", physical)
    }));
    for name in NAMES {
        taken(&mut e, name);
    }
    let text =
        |name: &'static str, label: &Option<Label>| label.as_ref().map(|l| Element::text(name, l.as_str()));
    e.push_some(text("serial", &now.serial));
    e.push_some(now.wwn.map(|n| Element::text("wwn", format!("{n:016x}"))));
    e.push_some(text("vendor", &now.vendor));
    e.push_some(text("product", &now.product));
    e
}

/// An `<interface>` as it was written, with the options that it has now.
pub fn nic_now(kept: Option<&Element>, now: &NicOptions, virtio: bool) -> Element {
    let mut e = kept.cloned().unwrap_or_else(|| Element::new("interface"));
    if of_nic(&e, virtio).is_ok_and(|said| said == *now) {
        return e;
    }
    let mut driver = taken(&mut e, "driver");
    bare(&mut driver);
    ["txmode", "rx_queue_size", "rss", "rss_hash_report"].iter().for_each(|name| driver.unset(name));
    for side in ["host", "guest"] {
        taken(&mut driver, side);
    }
    say(&mut driver, now.virtio, now.no_event_index, now.no_ioeventfd);
    match now.sender {
        Some(NicSender::Loop) => driver.set("txmode", "iothread"),
        Some(NicSender::Timer) => driver.set("txmode", "timer"),
        None => {}
    }
    if let Some(size) = now.receive_queue {
        driver.set("rx_queue_size", size);
    }
    for ((name, _), on) in HASHES.into_iter().zip([now.rss, now.hash]) {
        if on {
            driver.set(name, "on");
        }
    }
    let (mut host, mut guest) = (Element::new("host"), Element::new("guest"));
    for (word, _) in OFFLOADS.into_iter().filter(|known| now.without().any(|off| off == *known)) {
        match word.strip_prefix("guest-") {
            Some(word) => guest.set(word, "off"),
            None => host.set(word.replace('-', "_"), "off"),
        }
    }
    put(&mut driver, host);
    put(&mut driver, guest);
    put(&mut e, driver);
    for name in ["rom", "ip"] {
        taken(&mut e, name);
    }
    let ip = |family: &'static str, address: String, prefix: u8| {
        Element::new("ip").with("family", family).with("address", address).with("prefix", prefix)
    };
    e.push_some(now.ipv4.map(|net| ip("ipv4", net.network().to_string(), net.prefix_len())));
    e.push_some(now.ipv6.map(|net| ip("ipv6", net.network().to_string(), net.prefix_len())));
    e.push_some(now.no_rom.then(|| Element::new("rom").with("enabled", "no")));
    e
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml::read::document;

    #[test]
    fn disks_say_what_they_have_and_are_shown_the_same() {
        for (text, bus, words) in [
            ("<disk/>", DiskBus::VirtioBlk, None),
            (
                "<disk><driver name='qemu' ioeventfd='on' event_idx='on' ats='off'/></disk>",
                DiskBus::VirtioBlk,
                None,
            ),
            ("<disk><driver error_policy='enospace' rerror_policy='report'/></disk>", DiskBus::Sata, None),
            (
                "<disk><driver iommu='on' page_per_vq='on' event_idx='off' queues='4' queue_size='256'/></disk>",
                DiskBus::VirtioBlk,
                Some("iommu,page-per-queue,event-index=off,queues=4,queue-size=256"),
            ),
            (
                "<disk><driver error_policy='stop'/></disk>",
                DiskBus::Ide,
                Some("write-errors=stop,read-errors=stop"),
            ),
            (
                "<disk><driver error_policy='report' rerror_policy='ignore'/></disk>",
                DiskBus::Ide,
                Some("write-errors=report,read-errors=ignore"),
            ),
            ("<disk><target rotation_rate='1'/></disk>", DiskBus::VirtioScsi, Some("rotation=1")),
            ("<disk><target removable='on'/></disk>", DiskBus::Usb, Some("removable")),
            (
                "<disk><geometry cyls='100' heads='16' secs='63' trans='lba'/><blockio physical_block_size='4096'/></disk>",
                DiskBus::Ide,
                Some("geometry=100/16/63/lba,blocks=512/4096"),
            ),
        ] {
            let given = document(text).unwrap();
            let found = of_disk(&given, bus, false, None).unwrap();
            assert_eq!(found.text().as_deref(), words, "{text}");
            assert_eq!(disk_now(Some(&given), &found, bus, false), given, "{text}");
            if found.rotation.is_none() && !found.removable {
                let shown = disk_now(None, &found, bus, false);
                assert_eq!(of_disk(&shown, bus, false, None).unwrap(), found, "{text}");
            }
            // What it has no more is not shown.
            let plain = DiskOptions {
                rotation: found.rotation,
                removable: found.removable,
                ..DiskOptions::default()
            };
            let shown = disk_now(Some(&given), &plain, bus, false);
            assert_eq!(of_disk(&shown, bus, false, None).unwrap(), plain, "{text}");
        }
    }

    #[test]
    fn interfaces_say_what_they_have_and_are_shown_the_same() {
        for (text, words) in [
            ("<interface/>", None),
            ("<interface><driver name='vhost' ioeventfd='on'/><rom bar='on'/></interface>", None),
            ("<interface><driver rss='on' rss_hash_report='on'/></interface>", Some("rss,hash")),
            ("<interface><driver rss='off' rss_hash_report='off'/></interface>", None),
            (
                "<interface><driver txmode='iothread' packed='on' event_idx='off'/><rom file=''/></interface>",
                Some("packed,event-index=off,rom=off,tx=loop"),
            ),
            (
                "<interface type='user'><ip family='ipv4' address='10.1.2.0' prefix='24'/>\
                 <ip family='ipv6' address='fd01::' prefix='64'/></interface>",
                Some("ipv4=10.1.2.0/24,ipv6=fd01::/64"),
            ),
            (
                "<interface><driver txmode='timer' rx_queue_size='512'><host csum='off' mrg_rxbuf='off' gso='on'/>\
                 <guest ufo='off'/></driver></interface>",
                Some("tx=timer,rx-queue-size=512,csum=off,mrg-rxbuf=off,guest-ufo=off"),
            ),
        ] {
            let given = document(text).unwrap();
            let found = of_nic(&given, true).unwrap();
            assert_eq!(found.text().as_deref(), words, "{text}");
            assert_eq!(nic_now(Some(&given), &found, true), given, "{text}");
            let mut shown = nic_now(None, &found, true);
            shown.set("type", "user");
            assert_eq!(of_nic(&shown, true).unwrap(), found, "{text}");
            let shown = nic_now(Some(&given), &NicOptions::default(), true);
            assert_eq!(of_nic(&shown, true).unwrap(), NicOptions::default(), "{text}");
        }
    }

    #[test]
    fn what_a_device_has_not_names_its_element() {
        for (text, bus, cdrom, element) in [
            ("<disk><driver ats='on'/></disk>", DiskBus::Sata, false, "disk driver: "),
            ("<disk><driver queues='many'/></disk>", DiskBus::VirtioBlk, false, "disk driver: "),
            ("<disk><driver error_policy='shout'/></disk>", DiskBus::Sata, false, "disk driver: "),
            ("<disk><driver rerror_policy='enospace'/></disk>", DiskBus::Sata, false, "disk driver: "),
            ("<disk><driver error_policy='stop'/></disk>", DiskBus::Sata, true, "disk driver: "),
            ("<disk><target rotation_rate='7200'/></disk>", DiskBus::VirtioBlk, false, "disk target: "),
            ("<disk><target removable='on'/></disk>", DiskBus::Sata, false, "disk target: "),
            ("<disk><geometry cyls='1'/></disk>", DiskBus::Ide, false, "disk geometry: "),
            ("<disk><blockio logical_block_size='100'/></disk>", DiskBus::Ide, false, "disk blockio: "),
        ] {
            let e = of_disk(&document(text).unwrap(), bus, cdrom, None).unwrap_err();
            assert!(e.text.starts_with(element), "{text}: {}", e.text);
        }
        let copies = document("<disk><driver copy_on_read='on'/></disk>").unwrap();
        let volume = Source::Volume { pool: "p".into(), volume: "v".into() };
        let e = of_disk(&copies, DiskBus::VirtioBlk, false, Some(&volume)).unwrap_err();
        assert!(e.text.starts_with("driver copy_on_read: "), "{}", e.text);
        let path = Source::Path("/var/a.qcow2".into());
        assert_eq!(of_disk(&copies, DiskBus::VirtioBlk, false, Some(&path)).unwrap(), DiskOptions::default());
        for (text, virtio) in [
            ("<interface><driver iommu='on'/></interface>", false),
            ("<interface><driver><guest speed='off'/></driver></interface>", true),
        ] {
            let e = of_nic(&document(text).unwrap(), virtio).unwrap_err();
            assert!(e.text.starts_with("interface driver: "), "{text}: {}", e.text);
        }
    }
}
