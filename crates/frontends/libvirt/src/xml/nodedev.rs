//! The host's hardware as libvirt's node devices and interfaces. Without side effects.
//!
//! Devices hang below the machine, or below the PCI function that they are said to belong to; the tree of buses between
//! is not told. Serial numbers and hardware addresses are shown to whom they are given.

use super::Element;
use karst_engine::health::resources::{
    DiskResources, HostResources, NetworkResources, PciResources, SystemResources, UsbResources,
};

/// Kinds of devices, by the bit that lists ask for them with (`virConnectListAllNodeDeviceFlags`).
pub const KINDS: [(&str, u32); 5] =
    [("system", 1), ("pci", 1 << 1), ("usb_device", 1 << 2), ("net", 1 << 4), ("storage", 1 << 8)];
/// The machine itself, above all others.
const COMPUTER: &str = "computer";

/// A device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Name.
    pub name: String,
    /// Name of what it hangs below; the machine below nothing.
    pub parent: Option<String>,
    /// Kind, one of [`KINDS`].
    pub kind: &'static str,
    capability: Element,
    driver: String,
}

impl Device {
    /// The document.
    pub fn document(&self) -> String {
        let mut e = Element::new("device").child(Element::text("name", &self.name));
        e.push_some(self.parent.as_ref().map(|p| Element::text("parent", p)));
        if !self.driver.is_empty() {
            e.push(Element::new("driver").child(Element::text("name", &self.driver)));
        }
        e.push(self.capability.clone());
        e.document()
    }
}

/// `a-b:c` as part of a device's name.
fn word(text: &str) -> String {
    text.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}

fn capability(kind: &'static str) -> Element {
    Element::new("capability").with("type", kind)
}

/// An element, of a text that is there.
fn said(name: &'static str, text: &str) -> Option<Element> {
    (!text.is_empty()).then(|| Element::text(name, text))
}

/// All devices; `secrets`: with serial numbers and hardware addresses.
pub fn devices(host: &HostResources, secrets: bool) -> Vec<Device> {
    let mut all = vec![computer(&host.system, secrets)];
    all.extend(host.pci.iter().filter_map(pci));
    all.extend(host.usb.iter().map(usb));
    let parent_of = |address: &str| {
        let name = pci_name(address);
        if host.pci.iter().any(|p| p.address == address) { name } else { COMPUTER.to_owned() }
    };
    all.extend(host.network.iter().map(|n| net(n, parent_of(&n.pci_address), secrets)));
    all.extend(host.disks.iter().map(|d| disk(d, secrets)));
    all
}

fn computer(system: &SystemResources, secrets: bool) -> Device {
    let mut hardware = Element::new("hardware");
    hardware.push_some(said("vendor", &system.vendor));
    hardware.push_some(said("version", &system.version));
    if secrets {
        hardware.push_some(said("serial", &system.serial));
        hardware.push_some(said("uuid", &system.uuid));
    }
    let [vendor, version, date] = &system.firmware;
    let mut firmware = Element::new("firmware");
    firmware.push_some(said("vendor", vendor));
    firmware.push_some(said("version", version));
    firmware.push_some(said("release_date", date));
    let mut capability = capability("system");
    capability.push_some(said("product", &system.product));
    let capability = capability.child(hardware).child(firmware);
    Device { name: COMPUTER.into(), parent: None, kind: "system", capability, driver: String::new() }
}

fn pci_name(address: &str) -> String {
    format!("pci_{}", word(address))
}

fn pci(device: &PciResources) -> Option<Device> {
    let (domain, rest) = device.address.split_once(':')?;
    let (bus, rest) = rest.split_once(':')?;
    let (slot, function) = rest.split_once('.')?;
    let number = |text: &str| u32::from_str_radix(text, 16).ok();
    let mut capability = capability("pci");
    capability.push_some(said("class", &device.class));
    for (name, text) in [("domain", domain), ("bus", bus), ("slot", slot), ("function", function)] {
        capability.push(Element::text(name, number(text)?));
    }
    for (name, id) in [("product", &device.product_id), ("vendor", &device.vendor_id)] {
        capability.push(Element::new(name).with("id", format!("0x{id}")));
    }
    if let Some(group) = device.iommu_group {
        let at = Element::new("address")
            .with("domain", format!("0x{domain}"))
            .with("bus", format!("0x{bus}"))
            .with("slot", format!("0x{slot}"))
            .with("function", format!("0x{function}"));
        capability.push(Element::new("iommuGroup").with("number", group).child(at));
    }
    capability.push(Element::new("numa").with("node", device.numa_node));
    Some(Device {
        name: pci_name(&device.address),
        parent: Some(COMPUTER.into()),
        kind: "pci",
        capability,
        driver: device.driver.clone(),
    })
}

fn usb(device: &UsbResources) -> Device {
    let named = |name: &'static str, id: &str, text: &str| match text {
        "" => Element::new(name).with("id", format!("0x{id}")),
        text => Element::text(name, text).with("id", format!("0x{id}")),
    };
    Device {
        name: format!("usb_{}_{}", device.bus, device.device),
        parent: Some(COMPUTER.into()),
        kind: "usb_device",
        capability: capability("usb_device")
            .child(Element::text("bus", device.bus))
            .child(Element::text("device", device.device))
            .child(named("product", &device.product_id, &device.product))
            .child(named("vendor", &device.vendor_id, &device.vendor)),
        driver: String::new(),
    }
}

fn link(card: &NetworkResources) -> Element {
    let speed = Some(card.speed).filter(|s| *s > 0 && card.link);
    Element::new("link").with_some("speed", speed).with("state", if card.link { "up" } else { "down" })
}

fn net(card: &NetworkResources, parent: String, secrets: bool) -> Device {
    let mut capability = capability("net").child(Element::text("interface", &card.name));
    if secrets {
        capability.push_some(said("address", &card.mac));
    }
    capability.push(link(card));
    capability.push(Element::new("capability").with("type", "80203"));
    let name = format!("net_{}", word(&card.name));
    Device { name, parent: Some(parent), kind: "net", capability, driver: String::new() }
}

fn disk(disk: &DiskResources, secrets: bool) -> Device {
    let sizes = |capability: Element| {
        let capability = capability.child(Element::text("size", disk.size));
        match disk.block_size {
            0 => capability,
            block => capability
                .child(Element::text("logical_block_size", block))
                .child(Element::text("num_blocks", disk.size / block)),
        }
    };
    let mut capability = capability("storage").child(Element::text("block", format!("/dev/{}", disk.name)));
    capability.push_some(said("bus", &disk.kind));
    capability.push(Element::text("drive_type", if disk.name.starts_with("sr") { "cdrom" } else { "disk" }));
    capability.push_some(said("model", &disk.model));
    if secrets {
        capability.push_some(said("serial", &disk.serial));
    }
    let capability = match disk.removable {
        false => sizes(capability),
        true => {
            let there = Element::text("media_available", u8::from(disk.size > 0));
            let media = Element::text("media_size", disk.size);
            capability.child(capability_of_removable(there, media))
        }
    };
    let name = format!("block_{}", word(&disk.name));
    Device { name, parent: Some(COMPUTER.into()), kind: "storage", capability, driver: String::new() }
}

fn capability_of_removable(there: Element, media: Element) -> Element {
    capability("removable").child(there).child(media)
}

/// The document of an interface of the host's hardware.
pub fn interface(card: &NetworkResources, secrets: bool) -> String {
    let mut e = Element::new("interface").with("type", "ethernet").with("name", &card.name);
    if secrets && !card.mac.is_empty() {
        e.push(Element::new("mac").with("address", &card.mac));
    }
    e.push(link(card));
    e.document()
}

/// The machine as its firmware describes it.
pub fn sysinfo(system: &SystemResources, secrets: bool) -> String {
    let entry =
        |name: &str, text: &str| (!text.is_empty()).then(|| Element::text("entry", text).with("name", name));
    let group = |name: &'static str, entries: &[(&str, &str)]| {
        let mut e = Element::new(name);
        entries.iter().for_each(|(name, text)| e.push_some(entry(name, text)));
        (!e.elements().is_empty()).then_some(e)
    };
    let hidden = |text: &str| if secrets { text.to_owned() } else { String::new() };
    let [firmware, version, date] = &system.firmware;
    let [maker, board, board_version, board_serial] = &system.motherboard;
    let [chassis, chassis_version, chassis_serial] = &system.chassis;
    let mut e = Element::new("sysinfo").with("type", "smbios");
    e.push_some(group("bios", &[("vendor", firmware), ("version", version), ("date", date)]));
    e.push_some(group(
        "system",
        &[
            ("manufacturer", &system.vendor),
            ("product", &system.product),
            ("version", &system.version),
            ("serial", &hidden(&system.serial)),
            ("uuid", &hidden(&system.uuid)),
            ("sku", &system.sku),
            ("family", &system.family),
        ],
    ));
    e.push_some(group(
        "baseBoard",
        &[
            ("manufacturer", maker),
            ("product", board),
            ("version", board_version),
            ("serial", &hidden(board_serial)),
        ],
    ));
    e.push_some(group(
        "chassis",
        &[("manufacturer", chassis), ("version", chassis_version), ("serial", &hidden(chassis_serial))],
    ));
    e.document()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_hangs_below_its_function_and_keeps_its_address_from_viewers() {
        let host = HostResources {
            pci: vec![PciResources {
                address: "0000:00:1f.2".into(),
                vendor_id: "8086".into(),
                product_id: "10d3".into(),
                class: "0x020000".into(),
                driver: "e1000e".into(),
                iommu_group: Some(3),
                ..Default::default()
            }],
            network: vec![NetworkResources {
                name: "enp0s31".into(),
                mac: "52:54:00:00:00:01".into(),
                pci_address: "0000:00:1f.2".into(),
                link: true,
                speed: 1000,
                ..Default::default()
            }],
            ..Default::default()
        };
        let all = devices(&host, true);
        let names: Vec<_> = all.iter().map(|d| (d.name.as_str(), d.parent.as_deref())).collect();
        let function = "pci_0000_00_1f_2";
        assert_eq!(
            names,
            [("computer", None), (function, Some("computer")), ("net_enp0s31", Some(function))]
        );
        let pci = all[1].document();
        assert!(pci.contains("<slot>31</slot>") && pci.contains("<vendor id='0x8086'/>"), "{pci}");
        assert!(pci.contains("<iommuGroup number='3'>") && pci.contains("<name>e1000e</name>"), "{pci}");
        assert!(all[2].document().contains("<address>52:54:00:00:00:01</address>"));
        assert!(all[2].document().contains("<link speed='1000' state='up'/>"));
        assert!(!devices(&host, false)[2].document().contains("52:54"));
        assert!(!interface(&host.network[0], false).contains("52:54"));
    }
}
