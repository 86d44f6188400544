//! What the host can do.

use super::Element;
use crate::{cpu::Model, session::Driver};
use karst_model::node::{AcceleratorKind, HostFacts};
use uuid::Uuid;

/// What a processor is called: model, vendor, and features beyond the model.
pub type Described = (Element, Option<Element>, Vec<Element>);

/// The capabilities document; `pages` are the sizes of the host's, KiB.
pub fn document(
    driver: Driver,
    facts: &HostFacts,
    node: Uuid,
    called: Option<Described>,
    pages: &[u64],
) -> String {
    let cpus = facts.cpus.max(1);
    let topology =
        Element::new("topology").with("sockets", 1).with("dies", 1).with("cores", cpus).with("threads", 1);
    let mut cpu = Element::new("cpu").child(Element::text("arch", &facts.architecture));
    match called {
        Some((model, vendor, features)) => {
            cpu.push(model);
            cpu.push_some(vendor);
            cpu = cpu.child(topology).children(features);
        }
        None => cpu.push(topology),
    }
    cpu = cpu.children(pages.iter().map(|kib| Element::new("pages").with("unit", "KiB").with("size", kib)));
    let cell = Element::new("cell")
        .with("id", 0)
        .child(Element::text("memory", facts.memory / 1024).with("unit", "KiB"))
        .child(Element::new("cpus").with("num", cpus).children((0..cpus).map(|n| {
            Element::new("cpu")
                .with("id", n)
                .with("socket_id", 0)
                .with("die_id", 0)
                .with("core_id", n)
                .with("siblings", n)
        })));
    let host = Element::new("host")
        .child(Element::text("uuid", node))
        .child(cpu)
        .child(Element::new("power_management"))
        .child(Element::new("topology").child(Element::new("cells").with("num", 1).child(cell)));
    Element::new("capabilities").child(host).child(guest(driver, facts)).document()
}

fn choices(name: &str, all: &[&str]) -> Element {
    Element::new("enum").with("name", name).children(all.iter().map(|v| Element::text("value", v)))
}

fn supported(name: &'static str, is: bool) -> Element {
    Element::new(name).with("supported", if is { "yes" } else { "no" })
}

/// What domains of a kind can have; `machine` is the type that they are to have, versioned.
pub fn domain(facts: &HostFacts, kind: &str, machine: &str, most: i32, models: &[Model]) -> String {
    let kvm = facts.accelerator.kind == AcceleratorKind::Kvm;
    let loader = supported("loader", true)
        .child(choices("type", &["rom", "pflash"]))
        .child(choices("readonly", &["yes"]))
        .child(choices("secure", &["yes", "no"]));
    let os = supported("os", true).child(choices("firmware", &["bios", "efi"])).child(loader);
    let mode = |name: &str, is: bool| {
        Element::new("mode").with("name", name).with("supported", if is { "yes" } else { "no" })
    };
    let model = |m: &Model| {
        let usable = if m.missing.is_empty() { "yes" } else { "no" };
        Element::text("model", &m.name).with("usable", usable).with("vendor", m.vendor.unwrap_or("unknown"))
    };
    let cpu = Element::new("cpu")
        .child(mode("host-passthrough", kvm).child(choices("hostPassthroughMigratable", &["on"])))
        .child(mode("maximum", true).child(choices("maximumMigratable", &["on"])))
        .child(mode("host-model", false))
        .child(mode("custom", true).children(models.iter().map(model)));
    let (kinds, buses): (&[&str], &[&str]) = match machine.starts_with("pc-i440fx-") {
        true => (&["disk", "cdrom", "floppy"], &["ide", "fdc", "scsi", "virtio", "sata"]),
        false => (&["disk", "cdrom"], &["scsi", "virtio", "sata"]),
    };
    let disk = supported("disk", true)
        .child(choices("diskDevice", kinds))
        .child(choices("bus", buses))
        .child(choices("model", &["virtio"]));
    let tpm = supported("tpm", true)
        .child(choices("model", &["tpm-crb"]))
        .child(choices("backendModel", &["emulator"]))
        .child(choices("backendVersion", &["2.0"]));
    let rng = supported("rng", true)
        .child(choices("model", &["virtio"]))
        .child(choices("backendModel", &["random"]));
    // Of what a viewer has beside the screen by SPICE there is nothing without it.
    let (screens, channels): (&[&str], &[&str]) = match facts.spice {
        true => (&["vnc", "spice"], &["unix", "spicevmc"]),
        false => (&["vnc"], &["unix"]),
    };
    let redirected = match facts.spice {
        true => supported("redirdev", true).child(choices("bus", &["usb"])),
        false => supported("redirdev", false),
    };
    let directories: &[&str] = if facts.virtiofs { &["path", "virtiofs"] } else { &["path"] };
    let cards: &[&str] = match facts.spice {
        true => &["vga", "cirrus", "vmvga", "qxl", "virtio", "none", "bochs"],
        false => &["vga", "cirrus", "vmvga", "virtio", "none", "bochs"],
    };
    let devices = Element::new("devices")
        .child(disk)
        .child(supported("graphics", true).child(choices("type", screens)))
        .child(supported("video", true).child(choices("modelType", cards)))
        .child(
            supported("hostdev", true)
                .child(choices("mode", &["subsystem"]))
                .child(choices("startupPolicy", &["default", "mandatory", "requisite", "optional"]))
                .child(choices("subsysType", &["usb"])),
        )
        .child(rng)
        .child(supported("filesystem", true).child(choices("driverType", directories)))
        .child(tpm)
        .child(redirected)
        .child(supported("channel", true).child(choices("type", channels)));
    let features = Element::new("features")
        .child(supported("gic", false))
        .child(supported("vmcoreinfo", false))
        .child(supported("genid", true))
        .child(supported("backingStoreInput", false))
        .child(supported("backup", true))
        .child(supported("sev", false));
    Element::new("domainCapabilities")
        .child(Element::text("path", format!("/usr/bin/qemu-system-{}", facts.architecture)))
        .child(Element::text("domain", kind))
        .child(Element::text("machine", machine))
        .child(Element::text("arch", &facts.architecture))
        .child(Element::new("vcpu").with("max", most))
        .child(supported("iothreads", true))
        .child(os)
        .child(cpu)
        .child(supported("memoryBacking", false))
        .child(devices)
        .child(features)
        .document()
}

fn guest(driver: Driver, facts: &HostFacts) -> Element {
    let bits = if facts.architecture.contains("64") { 64 } else { 32 };
    let arch = Element::new("arch").with("name", &facts.architecture).child(Element::text("wordsize", bits));
    match driver {
        Driver::Lxc => Element::new("guest").child(Element::text("os_type", "exe")).child(
            arch.child(Element::text("emulator", "/usr/bin/lxc-start"))
                .child(Element::new("domain").with("type", "lxc")),
        ),
        Driver::Qemu => {
            let emulator = format!("/usr/bin/qemu-system-{}", facts.architecture);
            let machine = facts.default_machine.clone().unwrap_or_default();
            let mut arch = arch.child(Element::text("emulator", emulator));
            if !machine.is_empty() {
                arch.push(Element::text("machine", &machine).with("maxCpus", 288));
                arch.push(Element::text("machine", "q35").with("canonical", &machine).with("maxCpus", 288));
            }
            arch.push(Element::new("domain").with("type", "qemu"));
            if facts.accelerator.kind == AcceleratorKind::Kvm {
                arch.push(Element::new("domain").with("type", "kvm"));
            }
            let toggle = |name| Element::new(name).with("default", "on").with("toggle", "no");
            let features = Element::new("features").child(toggle("acpi")).child(toggle("apic"));
            Element::new("guest").child(Element::text("os_type", "hvm")).child(arch).child(features)
        }
    }
}
