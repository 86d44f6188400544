//! What becomes of the XML of a machine that the typed form does not hold: one row for each element and attribute that
//! libvirt knows. It is shown again when nothing of the guest depends on it, or when it says what Karst does anyway; else
//! it is refused by its name. What no row names is refused too: nothing is accepted that has no effect and was meant to
//! have one.
//!
//! The tools of libvirt write some things unasked (a sound card, ports for USB over SPICE, the model of the screen). Those
//! are kept: a guest without them does what it does, and the tools stay usable.

use super::{board, hostdevs, plugs, ports, refuse, shares};
use crate::{error::VirError, xml::Element};

/// What is done with an element or attribute.
#[derive(Clone, Copy)]
enum Rule {
    /// Shown again, or held by the typed form.
    Kept,
    /// Kept when it says what Karst does.
    When(fn(&Element) -> bool),
    /// Refused.
    Never,
}
use Rule::{Kept, Never, When};

/// A row: the name of an element, `@` and that of an attribute, what is done with it, and why it is refused.
type Row = (&'static str, Rule, &'static str);

fn said<'a>(e: &'a Element, name: &str) -> Option<&'a str> {
    e.attribute(name)
}

/// No attribute, or one of these values.
fn is(e: &Element, name: &str, values: &[&str]) -> bool {
    said(e, name).is_none_or(|v| values.contains(&v))
}

fn text_is(e: &Element, values: &[&str]) -> bool {
    values.contains(&e.body().trim())
}

/// It says nothing.
fn empty(e: &Element) -> bool {
    e.elements().is_empty() && e.body().trim().is_empty()
}

fn off(e: &Element) -> bool {
    is(e, "state", &["off", "no"]) && said(e, "state").is_some()
}

fn no(e: &Element) -> bool {
    is(e, "enabled", &["no"])
}

/// Elements of a domain.
const DOMAIN: &[Row] = &[
    ("name", Kept, ""),
    ("uuid", Kept, ""),
    ("title", Kept, ""),
    ("description", Kept, ""),
    ("metadata", Kept, ""),
    ("memory", When(|e| is(e, "dumpCore", &["off"])), "the memory of guests is in no core"),
    ("currentMemory", Kept, ""),
    // What is in these, and in modules, is looked at by `nodes`.
    ("maxMemory", Kept, ""),
    ("vcpu", When(|e| is(e, "placement", &["static", "auto"])), "placement is static or auto"),
    // What is in it is looked at by `sizes`.
    ("vcpus", Kept, ""),
    ("iothreads", Kept, ""),
    ("iothreadids", Kept, ""),
    // What is in it is looked at by `nodes`.
    ("defaultiothread", Kept, ""),
    // What is in these is looked at by `tuning`.
    ("cputune", Kept, ""),
    ("memtune", Kept, ""),
    ("blkiotune", Kept, ""),
    ("numatune", Kept, ""),
    (
        "memoryBacking",
        When(board::is_backing),
        "huge pages of one size for all of it, or of single nodes, source, access, allocation, discard, locked and nosharepages are taken",
    ),
    (
        "resource",
        When(|e| e.elements().iter().all(|p| p.name() == "partition" && text_is(p, &["/machine"]))),
        "guests are in groups of their own",
    ),
    // What is in it is looked at by `sysinfo`, where the system has it told.
    ("sysinfo", When(|e| is(e, "type", &["smbios"])), "what the firmware tells is of the type smbios"),
    ("genid", Kept, ""),
    ("bootloader", Never, "virtual machines start by their firmware"),
    ("bootloader_args", Never, "virtual machines start by their firmware"),
    ("os", Kept, ""),
    // It maps the ids of containers; no virtual machine of libvirt's has any of it either.
    ("idmap", Kept, ""),
    ("features", Kept, ""),
    ("cpu", Kept, ""),
    ("clock", Kept, ""),
    (
        "on_poweroff",
        When(|e| text_is(e, &["destroy"])),
        "a machine that is switched off is off; destroy is there",
    ),
    ("on_reboot", When(|e| text_is(e, &["restart", "destroy"])), "restart and destroy are there"),
    (
        "on_crash",
        When(|e| text_is(e, &["restart", "destroy", "preserve"])),
        "restart, destroy and preserve are there",
    ),
    ("on_lockfailure", Never, "there is no lock manager"),
    ("pm", When(|e| e.elements().iter().all(|s| is(s, "enabled", &["yes", "no"]))), "is yes or no"),
    ("perf", When(|e| e.elements().iter().all(no)), "the host's counters are not told"),
    ("devices", Kept, ""),
    // What libvirt found for it on another host; Karst confines its guests by itself.
    (
        "seclabel",
        When(|e| {
            // That a guest has no label, of a host that has none either: not of another that would confine it by one.
            let none = said(e, "type") == Some("none") && is(e, "model", &["none"]);
            none || is(e, "type", &["dynamic"]) && is(e, "relabel", &["yes"])
        }),
        "how guests are confined is not said by their document",
    ),
    ("launchSecurity", Never, "encrypted memory is not there"),
    ("keywrap", Never, "is for s390"),
    ("throttlegroups", Never, "disks have rates of their own"),
    ("qemu:commandline", Never, "arguments of QEMU are not passed on"),
    ("qemu:override", Never, "properties of QEMU's devices are not passed on"),
    ("qemu:deprecation", Never, "is not passed on"),
    ("qemu:capabilities", Never, "QEMU's capabilities are not overridden"),
];

/// What is in an `<os>`.
const OS: &[Row] = &[
    ("type", Kept, ""),
    ("@firmware", Kept, ""),
    ("loader", Kept, ""),
    ("nvram", When(nvram), "the variables are kept by the host, whatever file is named"),
    ("firmware", When(enrolled), "secure boot comes with its keys enrolled"),
    (
        "boot",
        When(|e| is(e, "dev", &["hd", "cdrom", "network", "fd"])),
        "hd, cdrom, network and fd are there",
    ),
    ("bootmenu", Kept, ""),
    ("kernel", Kept, ""),
    ("initrd", Kept, ""),
    ("cmdline", Kept, ""),
    (
        "smbios",
        When(|e| is(e, "mode", &["emulate", "sysinfo"])),
        "the firmware tells what the document says, or what Karst does, and nothing of the host",
    ),
    (
        "bios",
        When(|e| is(e, "useserial", &["no"])),
        "the firmware speaks on the serial port where there is no screen",
    ),
    ("acpi", Never, "tables of a file of the host are not passed on"),
    ("dtb", When(empty), "is for other architectures"),
    ("shim", Never, "a kernel is started by the firmware alone"),
    ("init", Never, "is for containers"),
    ("initarg", Never, "is for containers"),
];

/// The name of a file, in either of the forms that libvirt has for it: a name only, as the host keeps the variables by the
/// machine's UUID.
fn nvram(e: &Element) -> bool {
    let name = |s: &Element| s.elements().is_empty() && s.attributes().all(|(n, _)| n == "file");
    is(e, "type", &["file"]) && e.all("source").all(name)
}

fn enrolled(e: &Element) -> bool {
    let has = |name: &str, enabled: &str| {
        e.all("feature").any(|f| said(f, "name") == Some(name) && said(f, "enabled") == Some(enabled))
    };
    !(has("secure-boot", "yes") && has("enrolled-keys", "no"))
}

/// What is in `<features>`.
const FEATURES: &[Row] = &[
    ("acpi", Kept, ""),
    ("apic", Kept, ""),
    // What 32 bits see of memory is the model's to say, which has it.
    ("pae", Kept, ""),
    ("hyperv", When(|e| is(e, "mode", &["custom", "passthrough"])), "is custom or passthrough"),
    (
        "kvm",
        When(|e| {
            let known = ["hidden", "hint-dedicated", "poll-control", "pv-ipi", "dirty-ring"];
            e.elements().iter().all(|f| off(f) || known.contains(&f.name()))
        }),
        "hidden, hint-dedicated, poll-control, pv-ipi and dirty-ring are there",
    ),
    ("vmport", When(off), "there is none"),
    (
        "smm",
        When(|e| is(e, "state", &["on", "off"])),
        "is on or off; it comes with secure boot, or with a tseg",
    ),
    ("pmu", Kept, ""),
    ("vmcoreinfo", When(|e| is(e, "state", &["on", "off"])), "is on or off"),
    ("pvspinlock", Kept, ""),
    ("ioapic", When(|e| is(e, "driver", &["kvm", "qemu"])), "interrupts are KVM's or QEMU's"),
    ("msrs", Never, "accesses to unknown registers are QEMU's to answer"),
    (
        "tcg",
        When(|e| e.elements().iter().all(|inner| inner.name() == "tb-cache")),
        "the size of its cache is what can be said",
    ),
    ("async-teardown", Never, "is not there"),
    ("ps2", When(|e| is(e, "state", &["on"])), "it is there"),
    ("hap", Never, "is for Xen"),
    ("viridian", Never, "is for Xen"),
    ("xen", Never, "is for Xen"),
    ("privnet", Never, "is for containers"),
    ("capabilities", Never, "is for containers"),
    ("gic", Never, "is for other architectures"),
    ("hpt", Never, "is for other architectures"),
    ("htm", Never, "is for other architectures"),
];

/// What Karst tells a guest of Hyper-V, in libvirt's words.
pub const HYPER_V: &[&str] = &[
    "relaxed",
    "vapic",
    "spinlocks",
    "vpindex",
    "runtime",
    "synic",
    "stimer",
    "frequencies",
    "reset",
    "tlbflush",
    "ipi",
];

/// Does a `<hyperv>` ask for no more than is told all together by a key?
pub fn usual_hyper_v(e: &Element) -> bool {
    is(e, "mode", &["custom"])
        && e.elements().iter().all(|f| {
            let told = HYPER_V.contains(&f.name());
            off(f) || told && is(f, "retries", &["8191"]) && f.find("direct").is_none_or(off)
        })
}

/// Does a `<features>` ask for what Hyper-V tells its guests?
pub fn asks_for_hyper_v(features: &Element) -> bool {
    let usual = features.find("hyperv").filter(|h| usual_hyper_v(h));
    usual.is_some_and(|h| h.elements().iter().any(|f| said(f, "state") == Some("on")))
}

/// What is in a `<cpu>`.
const CPU: &[Row] = &[
    ("@mode", Kept, ""),
    (
        "@match",
        When(|e| is(e, "match", &["exact", "minimum", "strict"])),
        "exact, minimum and strict are there",
    ),
    ("@check", Kept, ""),
    ("@migratable", When(|e| is(e, "migratable", &["on", "off"])), "is on or off"),
    ("model", Kept, ""),
    // Whose CPU the model is.
    ("vendor", Kept, ""),
    ("feature", Kept, ""),
    ("topology", Kept, ""),
    ("cache", Kept, ""),
    ("maxphysaddr", Kept, ""),
    ("numa", Kept, ""),
];

/// What is in a `<clock>`.
const CLOCK: &[Row] = &[
    (
        "@offset",
        When(|e| is(e, "offset", &["utc", "localtime", "absolute", "timezone"])),
        "utc, localtime, timezone and absolute are there",
    ),
    ("@adjustment", When(|e| is(e, "adjustment", &["0", "reset"])), "the clock begins with the host's time"),
    ("@basis", Never, "the clock begins with the host's time"),
    ("@timezone", When(|e| said(e, "offset") == Some("timezone")), "is of the offset timezone"),
    ("@start", When(|e| said(e, "offset") == Some("absolute")), "is of the offset absolute"),
    ("timer", When(timer), "the timers are those of the machine"),
];

fn timer(e: &Element) -> bool {
    let present = is(e, "present", &["yes"]) && e.find("catchup").is_none();
    let there = present && is(e, "track", &["wall"]);
    match said(e, "name") {
        // How ticks that were missed are made up for, as tools write it for every guest.
        Some("rtc") => {
            present && is(e, "track", &["wall", "realtime"]) && is(e, "tickpolicy", &["catchup", "delay"])
        }
        Some("pit") => there && is(e, "tickpolicy", &["delay", "discard"]),
        Some("hpet") => is(e, "present", &["yes", "no"]),
        Some("kvmclock") => is(e, "present", &["yes", "no"]),
        Some("hypervclock") => is(e, "present", &["yes", "no"]),
        Some("tsc") => there && is(e, "mode", &["auto"]),
        _ => false,
    }
}

/// Devices.
const DEVICES: &[Row] = &[
    ("emulator", Kept, ""),
    ("disk", Kept, ""),
    ("interface", Kept, ""),
    (
        "controller",
        When(controller),
        "the controllers are those of the machine; of scsi virtio-scsi, lsilogic, lsisas1068, lsisas1078 and vmpvscsi are there",
    ),
    (
        "input",
        When(|e| match said(e, "bus") {
            // Looked at by `hostdevs`.
            _ if hostdevs::is(e) => true,
            Some("ps2") => is(e, "type", &["mouse", "keyboard"]),
            _ => {
                is(e, "bus", &["usb", "virtio"])
                    && is(e, "type", &["mouse", "keyboard", "tablet"])
                    && virtio(e, said(e, "bus") == Some("virtio"))
            }
        }),
        "mouse, keyboard and tablet are there, on usb or virtio (with its options), and but for the tablet on ps2; passthrough and evdev of the host",
    ),
    // What is in these is looked at by `ports`.
    ("serial", Kept, ""),
    ("console", Kept, ""),
    ("parallel", Kept, ""),
    ("channel", Kept, ""),
    (
        "graphics",
        When(graphics),
        "a machine has a screen of vnc, and one of spice, at an address or by a descriptor, without TLS and sockets, and egl-headless",
    ),
    (
        "video",
        When(|e| {
            let drawn = e.find("model").and_then(|m| said(m, "type")) == Some("virtio");
            let plain = |a: &Element| {
                let of = if drawn { &["no", "yes"][..] } else { &["no"] };
                is(a, "accel3d", of) && is(a, "accel2d", &["no"]) && said(a, "rendernode").is_none()
            };
            e.find("driver").is_none_or(|d| d.attributes().all(|at| at == ("name", "qemu")))
                && e.find("model").and_then(|m| m.find("acceleration")).is_none_or(plain)
        }),
        "those of virtio alone are accelerated (accel3d, with graphics of type egl-headless), and QEMU's are without options",
    ),
    ("audio", When(|e| is(e, "type", &["none", "spice"])), "sound goes nowhere"),
    ("sound", Kept, ""),
    // Those that are not SPICE's are looked at by `plugs`, and so is the filter by `board`.
    (
        "redirdev",
        When(|e| plugs::is(e) || is(e, "type", &["spicevmc"]) && e.find("boot").is_none()),
        "no machine boots from what a viewer has on USB",
    ),
    ("redirfilter", Kept, ""),
    ("memballoon", When(balloon), "there is the one of virtio, or none"),
    ("rng", When(rng), "is one of virtio on /dev/urandom"),
    (
        "tpm",
        When(|e| {
            is(e, "model", &["tpm-crb", "tpm-tis"])
                // What is in it is looked at by `encryption`.
                && e.find("backend").is_none_or(|b| b.elements().iter().all(|e| e.name() == "encryption"))
        }),
        "there are emulated ones of the models tpm-crb and tpm-tis, whose state may be encrypted",
    ),
    (
        "watchdog",
        When(board::is_watchdog),
        "i6300esb and ib700 are there, with reset, shutdown, poweroff, pause, none and inject-nmi",
    ),
    ("panic", When(panic), "there are the one of model isa at 0x505, and hyperv"),
    // What is in it is looked at by `hostdevs`.
    ("vsock", Kept, ""),
    // What is in it is looked at by `parts`.
    ("iommu", Kept, ""),
    // What is in it is looked at by `plugs`.
    ("smartcard", Kept, ""),
    ("hub", When(|e| is(e, "type", &["usb"])), "is one of usb"),
    ("pstore", Never, "is not there"),
    // What is in it is looked at by `hostdevs`.
    ("hostdev", Kept, ""),
    // What is in it is looked at by `shares`.
    ("filesystem", Kept, ""),
    ("lease", Never, "there is no lock manager"),
    ("shmem", Never, "shared memory is not there"),
    ("memory", When(|e| is(e, "model", &["dimm"])), "modules of the model dimm are there"),
    ("crypto", Never, "is not there"),
    ("nvram", Never, "is for other architectures"),
];

fn controller(e: &Element) -> bool {
    let scsi = said(e, "type") == Some("scsi");
    let own = scsi || said(e, "type") == Some("virtio-serial");
    let done = |(name, value): (&str, &str)| {
        let of_scsi = matches!(name, "iothread" | "queues" | "cmd_per_lun" | "max_sectors")
            || name == "ioeventfd" && matches!(value, "on" | "off");
        name == "name" || scsi && of_scsi || own && of_virtio((name, value))
    };
    let plain = e.find("driver").is_none_or(|d| d.attributes().all(done) && d.elements().is_empty());
    plain
        && match said(e, "type") {
            Some("usb" | "pci" | "virtio-serial" | "sata" | "ide" | "fdc") => true,
            // Which of them is looked at by `scsi`.
            Some("scsi") => is(
                e,
                "model",
                &[
                    "virtio-scsi",
                    "virtio-non-transitional",
                    "auto",
                    "lsilogic",
                    "lsisas1068",
                    "lsisas1078",
                    "vmpvscsi",
                ],
            ),
            // It comes with its card, which `plugs` looks at.
            Some("ccid") => is(e, "index", &["0"]),
            _ => false,
        }
}

/// An attribute that the `<driver>` of any device of virtio can have.
fn of_virtio((name, value): (&str, &str)) -> bool {
    matches!(name, "iommu" | "ats" | "packed" | "page_per_vq") && matches!(value, "on" | "off")
}

/// It has no `<driver>`, or one of virtio's options where it is of virtio.
fn virtio(e: &Element, is: bool) -> bool {
    let plain = |d: &Element| d.elements().is_empty() && d.attributes().all(|at| is && of_virtio(at));
    e.find("driver").is_none_or(plain)
}

fn is_spice(e: &Element) -> bool {
    said(e, "type").is_some() && is(e, "type", &["spice"])
}

fn graphics(e: &Element) -> bool {
    if said(e, "type") == Some("egl-headless") {
        return e
            .elements()
            .iter()
            .all(|gl| gl.name() == "gl" && gl.attributes().all(|(n, _)| n == "rendernode"));
    }
    // Where it listens is looked at by `places`.
    is(e, "type", &["vnc", "spice"])
        && is(e, "tlsPort", &["-1"])
        && said(e, "socket").is_none()
        // That of SPICE is refused by its own name.
        && (is_spice(e) || e.find("gl").is_none_or(|g| is(g, "enable", &["no"])))
        && e.all("listen").all(|l| is(l, "type", &["address", "none"]))
}

fn panic(e: &Element) -> bool {
    let place = e.find("address");
    match said(e, "model") {
        Some("hyperv") => place.is_none(),
        _ => {
            is(e, "model", &["isa"])
                && place.is_none_or(|a| is(a, "type", &["isa"]) && is(a, "iobase", &["0x505"]))
        }
    }
}

fn balloon(e: &Element) -> bool {
    is(e, "model", &["virtio", "virtio-non-transitional", "none"])
        && is(e, "autodeflate", &["off", "on"])
        && is(e, "freePageReporting", &["on"])
        && virtio(e, said(e, "model") != Some("none"))
}

fn rng(e: &Element) -> bool {
    let backend = e.find("backend");
    is(e, "model", &["virtio", "virtio-non-transitional"])
        && virtio(e, true)
        // Numbers of others are looked at by `plugs`.
        && (plugs::is(e)
            || backend.is_none_or(|b| {
                is(b, "model", &["random", "builtin"])
                    && matches!(b.body().trim(), "" | "/dev/urandom" | "/dev/random")
            }))
}

/// What is in a `<disk>`.
const DISK: &[Row] = &[
    ("@type", Kept, ""),
    ("@device", Kept, ""),
    (
        "@model",
        When(|e| is(e, "model", &["virtio", "virtio-non-transitional"])),
        "a disk is a modern device of virtio",
    ),
    (
        "@snapshot",
        When(|e| is(e, "snapshot", &["internal"]) || e.find("readonly").is_some()),
        "what is in a snapshot is said when it is taken",
    ),
    ("@rawio", When(|e| is(e, "rawio", &["no"])), "commands do not reach devices of the host"),
    ("@sgio", When(|e| is(e, "sgio", &["filtered"])), "commands do not reach devices of the host"),
    (
        "driver",
        When(driver),
        "what is said of it is name, type, cache, io, iothread, discard, detect_zeroes, copy_on_read, policies of errors, and of \
         virtio queues, queue_size, ioeventfd, event_idx, iommu, ats, packed and page_per_vq",
    ),
    (
        "source",
        When(|e| is(e, "startupPolicy", &["mandatory", "optional"])),
        "a disk is there at each start, or not (optional)",
    ),
    ("target", When(|e| is(e, "removable", &["off", "on"])), "is removable or not"),
    ("backingStore", When(empty), "a disk is one volume, without others below it"),
    ("readonly", Kept, ""),
    ("shareable", Never, "a volume is of several machines by security.shared of the volume"),
    ("transient", Never, "changes are kept"),
    ("mirror", Never, "is the state of a job"),
    // What is in it is looked at by `iotune`.
    ("iotune", Kept, ""),
    ("throttlefilters", Never, "disks have rates of their own (iotune)"),
    // What is in these is looked at by `options`.
    ("serial", Kept, ""),
    ("wwn", Kept, ""),
    ("vendor", Kept, ""),
    ("product", Kept, ""),
    ("geometry", Kept, ""),
    (
        "blockio",
        When(|e| e.attributes().all(|(n, _)| matches!(n, "logical_block_size" | "physical_block_size"))),
        "logical_block_size and physical_block_size are there",
    ),
    ("auth", Never, "volumes are the host's"),
    // What is in it is looked at by `encryption`.
    ("encryption", Kept, ""),
    ("reservations", Never, "is not there for disks"),
    ("slices", Never, "is not there for disks"),
    ("ssl", Never, "is not there for disks"),
    ("cookies", Never, "is not there for disks"),
    ("boot", Kept, ""),
    ("alias", Kept, ""),
    ("address", Kept, ""),
];

fn driver(e: &Element) -> bool {
    e.elements().is_empty()
        && e.attributes().all(|(name, value)| match name {
            // How the host reads and writes, and what space it gives back: the guest sees nothing of it.
            "name" | "type" | "cache" | "io" | "discard" | "detect_zeroes" | "iothread" => true,
            // Looked at by `options`.
            "error_policy" | "rerror_policy" | "queues" | "queue_size" => true,
            "copy_on_read" | "ioeventfd" | "event_idx" | "iommu" | "ats" | "packed" | "page_per_vq" => {
                matches!(value, "on" | "off")
            }
            _ => false,
        })
}

fn nic_driver(e: &Element) -> bool {
    let known = |(name, value): (&str, &str)| match name {
        "name" => matches!(value, "vhost" | "qemu"),
        "txmode" => matches!(value, "iothread" | "timer"),
        "queues" => value == "1",
        // Looked at by `options`.
        "rx_queue_size" => true,
        "ioeventfd" | "event_idx" | "iommu" | "ats" | "packed" | "page_per_vq" | "rss"
        | "rss_hash_report" => {
            matches!(value, "on" | "off")
        }
        _ => false,
    };
    e.attributes().all(known)
        && e.elements().iter().all(|side| match side.name() {
            "host" | "guest" => side.attributes().all(|(_, value)| matches!(value, "on" | "off")),
            _ => false,
        })
}

/// A ROM is the one that QEMU has for the card, or none.
fn rom(e: &Element) -> bool {
    is(e, "bar", &["on"]) && is(e, "enabled", &["no", "yes"]) && is(e, "file", &[""])
}

/// What is in an `<interface>`.
const INTERFACE: &[Row] = &[
    ("@type", Kept, ""),
    (
        "@trustGuestRxFilters",
        When(|e| is(e, "trustGuestRxFilters", &["no"])),
        "a guest's addresses are its own",
    ),
    ("@managed", Kept, ""),
    ("mac", When(|e| is(e, "type", &["generated", "static"])), "its type is generated or static"),
    ("source", When(|e| said(e, "portgroup").is_none_or(|p| !p.is_empty())), "a portgroup has a name"),
    // The name that the host gave it, which it gives anew.
    ("target", Kept, ""),
    ("guest", Never, "the guest names its interfaces"),
    ("model", Kept, ""),
    (
        "driver",
        When(nic_driver),
        "an interface has one queue; name, txmode, rx_queue_size, ioeventfd, event_idx, iommu, ats, packed, page_per_vq, rss, \
         rss_hash_report, and offloads of host and guest are what is said of it",
    ),
    ("backend", Never, "interfaces of the host are Karst's"),
    ("filterref", Kept, ""),
    (
        "bandwidth",
        When(|e| {
            e.elements().iter().all(|d| {
                let known = |n: &str| matches!(n, "average" | "peak" | "burst");
                matches!(d.name(), "inbound" | "outbound") && d.attributes().all(|(n, _)| known(n))
            })
        }),
        "a rate is an average, a peak and a burst; nothing is set aside for one interface (floor)",
    ),
    ("boot", When(|e| said(e, "loadparm").is_none()), "is for s390"),
    ("link", Kept, ""),
    ("mtu", Kept, ""),
    ("port", Kept, ""),
    ("rom", When(rom), "the ROM of an interface is QEMU's, or there is none"),
    ("coalesce", Never, "is not there"),
    ("acpi", Never, "interfaces have no number in the tables of ACPI"),
    ("vlan", Never, "tags are not set by XML"),
    ("virtualport", Never, "bridges are Linux bridges"),
    // What is in it is looked at by `options`.
    ("ip", Kept, ""),
    ("route", Never, "routes are given by the network"),
    ("teaming", Never, "is not there"),
    ("script", Never, "programs of the host are not started"),
    ("downscript", Never, "programs of the host are not started"),
    ("tune", Never, "is not there"),
    ("alias", Kept, ""),
    ("address", Kept, ""),
];

/// All that is in an element, by the rows for it. `of` names the element where its own name does not say enough.
fn check(e: &Element, of: &str, rows: &[Row]) -> Result<(), VirError> {
    let named = |name: &str| match of {
        "" => name.to_owned(),
        of => format!("{of} {name}"),
    };
    let row = |name: &str| rows.iter().find(|(known, _, _)| *known == name);
    for inner in e.elements() {
        one(row(inner.name()), inner, &named(inner.name()))?;
    }
    // Elements with rows for their attributes have one for each.
    if rows.iter().any(|(name, _, _)| name.starts_with('@')) {
        for (name, _) in e.attributes().filter(|(n, _)| !n.starts_with("xmlns")) {
            let at = rows.iter().find(|(known, _, _)| known.strip_prefix('@') == Some(name));
            one(at, e, &named(name))?;
        }
    }
    Ok(())
}

fn one(row: Option<&Row>, e: &Element, name: &str) -> Result<(), VirError> {
    match row {
        Some((_, Kept, _)) => Ok(()),
        Some((_, When(good), _)) if good(e) => Ok(()),
        Some((_, _, why)) => Err(refuse(name, why)),
        None => Err(refuse(name, "is not known")),
    }
}

/// Takes out of a disk or an interface what is refused of it.
pub fn without_refused(e: &mut Element) {
    let rows = if e.name() == "disk" { DISK } else { INTERFACE };
    let row = |name: &str| rows.iter().find(|(known, _, _)| *known == name);
    let bad: Vec<String> = e
        .attributes()
        .map(|(name, _)| name.to_owned())
        .filter(|name| one(row(&format!("@{name}")), &*e, name).is_err())
        .collect();
    bad.iter().for_each(|name| e.unset(name));
    if !e.elements().is_empty() {
        e.elements_mut().retain(|inner| one(row(inner.name()), inner, inner.name()).is_ok());
    }
}

/// One element of a domain, with what is in it.
///
/// # Errors
/// CONFIG_UNSUPPORTED, naming what Karst does not do.
pub fn part(e: &Element) -> Result<(), VirError> {
    one(DOMAIN.iter().find(|(name, _, _)| *name == e.name()), e, e.name())?;
    match e.name() {
        "os" => check(e, "os", OS),
        "features" => check(e, "features", FEATURES),
        "cpu" => check(e, "cpu", CPU),
        "clock" => check(e, "clock", CLOCK),
        "devices" => devices(e),
        _ => super::tuning::check(e),
    }
}

/// A whole domain.
///
/// # Errors
/// Those of [`part`].
pub fn domain(root: &Element) -> Result<(), VirError> {
    root.elements().iter().try_for_each(part)
}

fn devices(all: &Element) -> Result<(), VirError> {
    all.elements().iter().try_for_each(device)?;
    match all.all("memballoon").count() {
        0 | 1 => Ok(()),
        _ => Err(refuse("memballoon", "a machine has one")),
    }
}

/// One device; what is in a disk or an interface too.
///
/// # Errors
/// CONFIG_UNSUPPORTED, naming what Karst does not do.
pub fn device(e: &Element) -> Result<(), VirError> {
    one(DEVICES.iter().find(|(name, _, _)| *name == e.name()), e, e.name())?;
    match e.name() {
        "disk" => disk(e),
        "interface" => interface(e),
        _ if ports::is(e) => ports::check(e),
        shares::ELEMENT => shares::read(e).map(drop),
        _ if hostdevs::is(e) => hostdevs::read(e).map(drop),
        _ => Ok(()),
    }
}

/// What is in a disk.
///
/// # Errors
/// CONFIG_UNSUPPORTED, naming what Karst does not do.
pub fn disk(e: &Element) -> Result<(), VirError> {
    check(e, "disk", DISK)
}

/// What is in an interface.
///
/// # Errors
/// CONFIG_UNSUPPORTED, naming what Karst does not do.
pub fn interface(e: &Element) -> Result<(), VirError> {
    check(e, "interface", INTERFACE)
}

#[cfg(test)]
mod tests;
