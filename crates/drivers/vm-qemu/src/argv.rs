//! QEMU's arguments: a pure function of what was resolved, valid for QEMU 7.2 to 10.
//!
//! Nothing is left to QEMU's defaults (`-nodefaults`, versioned machine type, explicit image formats, fixed PCI
//! addresses), because they change between versions and a guest must keep its hardware. Files, taps and sockets are
//! descriptors that the keeper hands on: QEMU runs as a user that could open none of them.

use crate::{
    board,
    devices::{Bus, Disk, Layout, MAX_DISKS, MAX_NICS, Nic, layer_set, virtio},
    directories::{Directory, MAX_DIRECTORIES, Way},
    given, ports, threads,
};
use karst_model::{
    Error, Result,
    board::{Rng, Sound, UsbKind},
    device::{PortEnd, PortPlace},
    instance::Firmware,
    keys_machine::MOST_STRINGS,
    node::AcceleratorKind,
    screens::ScreenOptions,
    spec::{CpuLimit, LineSpec, MachineSpec},
};
use serde_json::{Value, json};

/// PCI slots of the machine's own devices on the root bus; disks and NICs carry theirs in the record.
mod slot {
    use super::Layout;
    pub(super) const SHARE: &str = "00:07.0";

    /// Random numbers, each a function. i440FX has its own devices at 01.
    pub(super) fn rng(layout: Layout, function: usize) -> String {
        format!("{}.{function}", if layout.pc { "00:1d" } else { "00:01" })
    }
    /// Controller of the USB devices that belong to SPICE.
    pub(super) const USB: &str = "00:1e.0";
    pub(super) const BALLOON: &str = "00:05.0";
    pub(super) const SERIAL: &str = "00:02.0";
    pub(super) const SCSI: &str = "00:03.0";
    // After a virtio root disk at 04, which is thus vda.
    pub(super) const SEED: &str = "00:06.0";
    /// SATA controller of i440FX; q35 has one built in.
    pub(super) const SATA: &str = "00:1c.0";
}

/// Descriptor numbers in QEMU's process.
pub mod fd {
    /// Listening QMP socket.
    pub const QMP: i32 = 10;
    /// Listening socket of the QEMU guest agent.
    pub const AGENT: i32 = 11;
    /// Listening socket of Karst's own guest agent.
    pub const LINK: i32 = 18;
    /// Directory of the share `config`.
    pub const SHARE: i32 = 19;
    /// Listening QMP socket of who follows the events.
    pub const EVENTS: i32 = 17;
    /// Console, one end of a socket pair whose other end the keeper drains.
    pub const CONSOLE: i32 = 12;
    /// Control socket of the TPM, connected.
    pub const TPM: i32 = 13;
    /// cloud-init seed.
    pub const SEED: i32 = 14;
    /// UEFI variables.
    pub const VARS: i32 = 15;
    /// Kernel.
    pub const KERNEL: i32 = 16;
    /// Initial file system of the kernel.
    pub const INITRD: i32 = 36;
    /// Directory of the files that its memory is in.
    pub const MEMORY: i32 = 37;
    /// First string of the SMBIOS.
    pub const STRINGS: i32 = 240;
    /// First tap.
    pub const NIC: i32 = 20;
    /// Of the first disk; each has this and the next, which is of the file below a clone.
    pub const DISK: i32 = 40;
    /// First shared directory.
    pub const DIRECTORY: i32 = 200;
    /// What opens the first disk, where it is encrypted.
    pub const KEY: i32 = 600;
    /// Of the first file below another one, of all disks in layers.
    pub const LAYER: i32 = 500;
    /// Of the first port; each has this and the next, which is of its log.
    pub const PORT: i32 = 300;
    /// First device of the host.
    pub const GIVEN: i32 = 400;
}

/// What Windows wants to know of its hypervisor.
pub const HYPER_V: &str = ",hv-relaxed,hv-vapic,hv-spinlocks=0x1fff,hv-vpindex,hv-runtime,hv-synic,hv-stimer,hv-time,hv-frequencies,\
    hv-reset,hv-tlbflush,hv-ipi";

/// Default size of a guest's memory where no limit is set.
pub const DEFAULT_MEMORY: u64 = 1 << 30;
/// What the arguments are made of.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Name of the process in QEMU's own messages: the instance's UUID.
    pub name: String,
    /// Virtual hardware.
    pub spec: MachineSpec,
    /// How it executes.
    pub accelerator: AcceleratorKind,
    /// CPUs.
    pub cpus: u32,
    /// CPUs that it can have later.
    pub max_cpus: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Disks, the root first.
    pub disks: Vec<Disk>,
    /// Shared directories.
    pub directories: Vec<(Directory, Way)>,
    /// NICs.
    pub nics: Vec<Nic>,
    /// Has a cloud-init seed.
    pub seed: bool,
    /// UEFI code, from the firmware package; `None` for SeaBIOS.
    pub firmware_code: Option<String>,
    /// Waits for `cont` before its first instruction.
    pub hold: bool,
    /// The screen is there by SPICE too.
    pub spice: bool,
    /// Its number among those that the host has sockets with, where no other is said.
    pub own_cid: u32,
}

/// USB devices of a viewer's that a machine can have at a time.
const REDIRECTED: usize = 3;

impl Machine {
    /// Where its devices can be.
    ///
    /// # Errors
    /// Invalid for a machine type that is none of ours.
    pub fn layout(&self) -> Result<Layout> {
        Layout::of(&self.spec.machine, self.spec.ports)
    }
}

/// How the screen is served by VNC.
fn vnc(screen: &ScreenOptions) -> Result<String> {
    let mut value = "none,password=on".to_owned();
    if let Some(share) = &screen.share {
        value += &format!(",share={}", word("config.screen.vnc.share", share, "")?);
    }
    if screen.power_control {
        value += ",power-control=on";
    }
    Ok(value)
}

/// How many virtual CPUs a limit means.
pub fn cpu_count(limit: Option<&CpuLimit>) -> u32 {
    match limit {
        None => 1,
        Some(CpuLimit::Count { n }) => (*n).max(1),
        Some(CpuLimit::Set { cpus }) => (cpus.len() as u32).max(1),
    }
}

/// Only what QEMU's option parser cannot mistake: a comma would begin another property.
pub(crate) fn word<'a>(field: &str, s: &'a str, extra: &str) -> Result<&'a str> {
    let ok = !s.is_empty()
        && s.len() <= 512
        && s.bytes().all(|b| {
            b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-') || extra.as_bytes().contains(&b)
        });
    if ok { Ok(s) } else { Err(Error::invalid(field, format!("{s:?} is not usable here"))) }
}

/// The arguments after the program's name.
///
/// # Errors
/// Invalid, naming the field, for values that do not fit (machine type, addresses, too many NICs).
pub fn argv(m: &Machine) -> Result<Vec<String>> {
    let mut a: Vec<String> = vec![];
    let mut opt = |name: &str, value: String| {
        a.push(name.to_owned());
        if !value.is_empty() {
            a.push(value);
        }
    };
    let machine = word("hardware.machine", &m.spec.machine, "")?;
    let layout = m.layout()?;
    let secure = m.spec.firmware == Firmware::UefiSecure;
    opt("-name", format!("guest={},debug-threads=on", word("instance", &m.name, "")?));
    for flag in ["-nodefaults", "-no-user-config"] {
        opt(flag, String::new());
    }
    opt("-display", board::display(&m.spec.board)?);
    opt("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into());
    opt("-msg", "timestamp=on".into());

    // graphics=off is what -nographic means for the firmware: SeaBIOS then speaks on the serial port.
    // System management mode costs at every firmware call. Secure boot needs it, and so does the screen of a q35 with SeaBIOS: that
    // opens the mode's memory, which lies over the text of the screen and without the mode is never closed again.
    let text = m.spec.firmware == Firmware::Bios && m.spec.display && !layout.pc;
    let on = |on: bool| if on { "on" } else { "off" };
    let features = m.spec.board.features.unwrap_or_default();
    let mut machine = format!(
        "{machine},graphics=off,usb=off,vmport=off,hpet={},dump-guest-core=off,smm={}",
        on(m.spec.board.hpet),
        on(secure || text || features.tseg.is_some())
    );
    if m.spec.board.sound.contains(&Sound::Pcspk) {
        machine.push_str(&format!(",pcspk-audiodev={}", board::AUDIO));
    }
    // Who serves a directory by virtiofs reads and writes in the guest's memory.
    let served = m.directories.iter().any(|(_, way)| *way == Way::Virtiofs);
    let with_memory = m.spec.board.clone();
    let with_memory = if served { board::shared(with_memory) } else { with_memory };
    if with_memory.memory.as_ref().is_some_and(|memory| memory.unmerged) {
        machine.push_str(",mem-merge=off");
    }
    if board::has_backend(&with_memory) {
        machine.push_str(&format!(",memory-backend={}", board::MEMORY));
    }
    if m.firmware_code.is_some() {
        machine.push_str(",pflash0=firmware-code,pflash1=firmware-vars");
    }
    opt("-machine", machine);
    opt(
        "-accel",
        match m.accelerator {
            AcceleratorKind::Kvm => board::kvm(&features),
            AcceleratorKind::Tcg => board::tcg(&features),
        },
    );
    let mut cpu = word("hardware.cpu_model", &m.spec.cpu_model, ",=+ ")?.to_owned();
    if m.spec.windows && m.accelerator == AcceleratorKind::Kvm {
        // Without them Windows waits in busy loops. TCG knows none of them.
        cpu.push_str(HYPER_V);
    }
    if features.hyper_v_panic && m.accelerator == AcceleratorKind::Kvm {
        cpu.push_str(",hv-crash");
    }
    opt("-cpu", cpu);
    let (cpus, most) = (m.cpus.max(1), m.max_cpus.max(m.cpus).max(1));
    opt("-smp", board::processors(m.spec.board.topology.as_ref(), cpus, most)?);
    if m.memory < 64 << 20 || !m.memory.is_multiple_of(1 << 20) {
        return Err(Error::invalid(
            "config.limits.memory",
            "the memory of a virtual machine is a multiple of 1MiB, at least 64MiB",
        ));
    }
    let (size, base) = board::size(&m.spec.board, m.memory)?;
    opt("-m", size);
    if m.spec.board.memory.is_some_and(|memory| memory.locked) {
        opt("-overcommit", "mem-lock=on".into());
    }
    for (option, value) in board::memory(&with_memory, base)? {
        opt(option, value);
    }
    for (option, value) in board::modules(&with_memory) {
        opt(option, value);
    }
    opt("-uuid", m.spec.uuid.to_string());
    for told in board::smbios(&m.spec.board, m.spec.uuid) {
        opt("-smbios", told);
    }
    if m.spec.strings.len() > MOST_STRINGS {
        let text = format!("a machine has at most {MOST_STRINGS} strings of its SMBIOS");
        return Err(Error::invalid("config.smbios11", text));
    }
    for i in 0..m.spec.strings.len() {
        // By a descriptor: some are secrets, and everybody reads a command line. Sets of descriptors are not there yet.
        opt("-smbios", format!("type=11,path=/proc/self/fd/{}", fd::STRINGS + i as i32));
    }
    opt("-rtc", board::clock(&m.spec.board, m.spec.local_time));
    let mut boot = match m.spec.boot_menu {
        true => format!("menu=on,splash-time={}", m.spec.board.menu_timeout.unwrap_or(5000)),
        false => "menu=off".to_owned(),
    };
    if let Some(retry) = m.spec.board.boot_retry {
        boot.push_str(&format!(",reboot-timeout={retry}"));
    }
    opt("-boot", format!("{boot},strict=on"));
    let power = if layout.pc { "PIIX4_PM" } else { "ICH9-LPC" };
    opt("-global", format!("{power}.disable_s3={}", u8::from(!m.spec.board.sleeps)));
    opt("-global", format!("{power}.disable_s4={}", u8::from(!m.spec.board.hibernates)));
    if m.spec.ends_on_reboot {
        opt("-no-reboot", String::new());
    }
    if m.spec.halts_on_crash {
        opt("-action", "panic=pause".to_owned());
    }
    if let Some(kernel) = &m.spec.kernel {
        // QEMU opens them by a name, which sets of descriptors are none of here.
        opt("-kernel", format!("/proc/self/fd/{}", fd::KERNEL));
        if kernel.initrd.is_some() {
            opt("-initrd", format!("/proc/self/fd/{}", fd::INITRD));
        }
        if let Some(line) = kernel.cmdline.as_ref().filter(|l| !l.is_empty()) {
            if line.chars().any(char::is_control) {
                return Err(Error::invalid(format!("devices.{}.cmdline", kernel.name), "it is one line"));
            }
            opt("-append", line.clone());
        }
    }
    if let Some(size) = features.tseg {
        if layout.pc {
            return Err(Error::invalid("config.hardware.features", "machines of type q35 have a tseg"));
        }
        opt("-global", format!("mch.extended-tseg-mbytes={size}"));
    }
    if m.hold || m.spec.resume {
        opt("-S", String::new());
    }
    if m.spec.resume {
        opt("-incoming", "defer".into());
    }
    if secure {
        opt("-global", "driver=cfi.pflash01,property=secure,value=on".into());
    }

    // Every device is written as JSON: QEMU makes those of the older notation first, whatever their order.
    let fixed = |field: &str, mut device: Value, pci: &str| -> Result<String> {
        device["disable-legacy"] = "on".into();
        layout.put(&mut device, field, pci)?;
        Ok(device.to_string())
    };
    let mut sets = vec![];
    if let Some(code) = &m.firmware_code {
        opt(
            "-blockdev",
            json!({"driver": "file", "node-name": "firmware-code-file", "filename": code, "read-only": true})
                .to_string(),
        );
        opt(
            "-blockdev",
            json!({"driver": "raw", "node-name": "firmware-code", "file": "firmware-code-file", "read-only": true}).to_string(),
        );
        sets.push((3, fd::VARS, "firmware-vars"));
        opt(
            "-blockdev",
            json!({"driver": "file", "node-name": "firmware-vars-file", "filename": "/dev/fdset/3"})
                .to_string(),
        );
        opt(
            "-blockdev",
            json!({"driver": "raw", "node-name": "firmware-vars", "file": "firmware-vars-file"}).to_string(),
        );
    }

    // What translates the addresses of the others is there before them.
    if let Some(iommu) = &m.spec.board.iommu {
        opt("-device", board::iommu(iommu, layout)?.to_string());
    }
    if features.vmcoreinfo {
        opt("-device", json!({"driver": "vmcoreinfo", "id": "vmcoreinfo"}).to_string());
    }
    let usual = [Rng::default()];
    let rngs = if m.spec.board.rngs.is_empty() { &usual[..] } else { &m.spec.board.rngs };
    let ports = ports::options(&m.spec.lines, m.spice, m.spec.board.usb_filter.as_deref())?;
    let many = rngs.len() + ports.random.len();
    if many > 8 {
        return Err(Error::invalid("devices", "a virtual machine has random numbers from 8 places at most"));
    }
    for (n, rng) in rngs.iter().enumerate() {
        let id = format!("rng{n}");
        opt("-object", format!("rng-random,id={id},filename=/dev/urandom"));
        let mut device = json!({"driver": "virtio-rng-pci", "id": id, "rng": id});
        if let Some((bytes, period)) = rng.rate {
            (device["max-bytes"], device["period"]) = (bytes.into(), period.into());
        }
        if n == 0 && many > 1 {
            device["multifunction"] = true.into();
        }
        virtio(&mut device, &rng.virtio);
        opt("-device", fixed("rng", device, &slot::rng(layout, n))?);
    }

    opt("-chardev", format!("socket,id=console,fd={}", fd::CONSOLE));
    if !ports.first_serial {
        opt("-serial", "chardev:console".into());
    }
    opt("-chardev", format!("socket,id=qmp,fd={},server=on,wait=off", fd::QMP));
    opt("-mon", "chardev=qmp,mode=control".into());
    opt("-chardev", format!("socket,id=events,fd={},server=on,wait=off", fd::EVENTS));
    opt("-mon", "chardev=events,mode=control".into());
    opt("-chardev", format!("socket,id=agent,fd={},server=on,wait=off", fd::AGENT));
    let of_part = |device: &mut Value, part: &str| {
        if let Some(options) = m.spec.board.virtio.get(part) {
            virtio(device, options);
        }
    };
    let mut serial = json!({"driver": "virtio-serial-pci", "id": "serial0", "max_ports": 16});
    let on_pci = m.spec.lines.iter().any(|l| matches!(l.device.place, PortPlace::Pci { .. }));
    if m.spec.board.scsi.len() > board::SCSI_BESIDE || on_pci {
        serial["multifunction"] = true.into();
    }
    of_part(&mut serial, "serial");
    opt("-device", fixed("serial", serial, slot::SERIAL)?);
    let port = |nr: u32, id: &str, chardev: Option<&str>, name: &str| {
        let mut port =
            json!({"driver": "virtserialport", "bus": "serial0.0", "nr": nr, "id": id, "name": name});
        if let Some(chardev) = chardev {
            port["chardev"] = chardev.into();
        }
        port.to_string()
    };
    opt("-device", port(1, "agent", Some("agent"), "org.qemu.guest_agent.0"));
    opt("-chardev", format!("socket,id=karst,fd={},server=on,wait=off", fd::LINK));
    opt("-device", port(2, "karst", Some("karst"), karst_guest_agent::PORT));
    // Images made for Incus and LXD look into the share when they find a port of this name; nothing flows through it.
    for (number, loader) in [(3, "incus"), (4, "lxd")] {
        let name = format!("org.linuxcontainers.{loader}");
        opt("-device", port(number, &format!("loader-{loader}"), None, &name));
    }
    // QEMU saves no machine that has mounted such a share.
    if !m.spec.stateful {
        // By its descriptor, so that QEMU's user needs no way to it.
        opt(
            "-fsdev",
            format!("local,id=config,path=/proc/self/fd/{},readonly=on,security_model=none", fd::SHARE),
        );
        let share =
            json!({"driver": "virtio-9p-pci", "id": "config", "fsdev": "config", "mount_tag": "config"});
        opt("-device", fixed("share", share, slot::SHARE)?);
    }
    if m.spec.balloon {
        // What the guest frees goes back to the host by itself.
        let mut balloon =
            json!({"driver": "virtio-balloon-pci", "id": "balloon", "free-page-reporting": true});
        if m.spec.board.balloon_deflates {
            balloon["deflate-on-oom"] = true.into();
        }
        of_part(&mut balloon, "balloon");
        opt("-device", fixed("balloon", balloon, slot::BALLOON)?);
    }
    if m.spec.tpm {
        opt("-chardev", format!("socket,id=tpm,fd={}", fd::TPM));
        opt("-tpmdev", "emulator,id=tpm0,chardev=tpm".into());
        let driver = if features.tpm_tis { "tpm-tis" } else { "tpm-crb" };
        opt("-device", json!({"driver": driver, "id": "tpm", "tpmdev": "tpm0"}).to_string());
    }

    let want_usb = given::want_usb(&m.spec.given) || ports.on_usb;
    let usb_buses = m.spec.board.usb.iter().filter(|c| !c.is_companion()).count() as u32;
    if m.spec.display {
        // Shown to whoever is handed a connection; it listens nowhere. Which of them are asked for a password, and for which one,
        // is said with each.
        opt("-vnc", vnc(&m.spec.screen)?);
        if let Some(keymap) = &m.spec.screen.keymap {
            opt("-k", word("config.screen.keymap", keymap, "")?.to_owned());
        }
        for (option, value) in board::screens(&m.spec.board, layout)? {
            opt(option, value);
        }
        if m.spec.spice {
            let twice = |l: &&LineSpec| matches!(l.device.to, PortEnd::Agent { .. });
            if let Some(line) = m.spec.lines.iter().find(twice) {
                let text =
                    "SPICE is at the other end of that channel; unset hardware.spice, or take this port away";
                return Err(Error::invalid(format!("devices.{}.to", line.name), text));
            }
            // The port of the guest's agent for clipboard and size is there also without SPICE: then nobody is at its other end.
            opt("-device", port(5, "vdagent", m.spice.then_some("vdagent"), "com.redhat.spice.0"));
        }
    }
    if m.spice {
        // Port 0 is none: it listens nowhere either, and is handed connections as VNC is. Video is not streamed as such: GStreamer
        // would start programs, for which the sandbox ends QEMU.
        opt("-spice", "port=0,streaming-video=off,seamless-migration=off".into());
        opt("-chardev", "spicevmc,id=vdagent,name=vdagent".into());
        let mut usb = json!({"driver": "qemu-xhci", "id": "usb"});
        if want_usb && usb_buses == 0 {
            // All that it has are taken below.
            (usb["p2"], usb["p3"]) = (8.into(), 8.into());
        }
        layout.put(&mut usb, "hardware.spice", slot::USB)?;
        opt("-device", usb.to_string());
        // Without it a pointer only moves relatively, until the guest has SPICE's agent.
        if !m.spec.board.usb_devices.iter().any(|d| d.kind == UsbKind::Tablet) {
            let tablet = json!({"driver": "usb-tablet", "id": "tablet", "bus": "usb.0", "port": "1"});
            opt("-device", tablet.to_string());
        }
        for n in 0..REDIRECTED {
            let id = format!("redirect{n}");
            opt("-chardev", format!("spicevmc,id={id},name=usbredir"));
            let port = (n + 2).to_string();
            let mut device =
                json!({"driver": "usb-redir", "id": id, "chardev": id, "bus": "usb.0", "port": port});
            if let Some(filter) = &m.spec.board.usb_filter {
                device["filter"] = filter.as_str().into();
            }
            opt("-device", device.to_string());
        }
    }
    for (option, value) in board::devices(&m.spec.board, layout, m.spice)? {
        opt(option, value);
    }
    if want_usb && usb_buses == 0 && !m.spice {
        let mut usb = json!({"driver": "qemu-xhci", "id": "usb", "p2": 8, "p3": 8});
        layout.put(&mut usb, "devices", slot::USB)?;
        opt("-device", usb.to_string());
    }
    sets.extend(ports.sets);
    for (option, value) in ports.options {
        opt(option, value);
    }
    for (n, device) in ports.random.into_iter().enumerate() {
        opt("-device", fixed("devices", device, &slot::rng(layout, rngs.len() + n))?);
    }
    threads::demand_few(&m.spec.iothreads)?;
    if let Some(object) = board::main_thread(&m.spec.board) {
        opt("-object", object.to_string());
    }
    for thread in &m.spec.iothreads {
        opt("-object", threads::object(thread).to_string());
    }
    for port in layout.root_ports() {
        opt("-device", port.to_string());
    }
    let given = given::options(&m.spec.given, layout, usb_buses, m.own_cid)?;
    sets.extend(given.sets);
    for (option, value) in given.options {
        opt(option, value);
    }
    if m.disks.len() > MAX_DISKS {
        return Err(Error::invalid("devices", format!("a virtual machine has {MAX_DISKS} disks at most")));
    }
    let buses = m.disks.iter().map(Disk::bus).collect::<Result<Vec<_>>>()?;
    // Machines that devices can be plugged into have the controller also when nothing is behind it yet.
    let more = m.spec.board.scsi.get(1..).unwrap_or_default();
    if layout.hotplug() || !more.is_empty() || buses.iter().any(|b| matches!(b, Bus::Scsi(_))) {
        // An older machine's root behind virtio-scsi carries the address of the controller.
        let old = m.disks.first().filter(|d| layout.ports == 0 && d.slot.starts_with("scsi"));
        let at = old.and_then(|d| d.pci.as_deref()).unwrap_or(slot::SCSI);
        let mut controller = json!({"driver": "virtio-scsi-pci", "id": "scsi"});
        if let Some(thread) = m.spec.scsi_iothread {
            controller["iothread"] = threads::id(thread).into();
        }
        of_part(&mut controller, "scsi");
        if let Some(first) = m.spec.board.scsi.first() {
            board::scsi_options(&mut controller, first);
        }
        if !more.is_empty() {
            controller["multifunction"] = true.into();
        }
        opt("-device", fixed("devices.root", controller, at)?);
        for device in board::more_scsi(more, layout, at, m.spec.scsi_iothread)? {
            opt("-device", device.to_string());
        }
    }
    for disk in &m.disks {
        board::demand_scsi(&m.spec.board, disk)?;
    }
    if layout.pc && buses.iter().any(|b| matches!(b, Bus::Sata(_))) {
        let mut controller = json!({"driver": "ich9-ahci", "id": "sata"});
        layout.put(&mut controller, "devices", slot::SATA)?;
        opt("-device", controller.to_string());
    }
    if !layout.pc && buses.iter().any(|b| matches!(b, Bus::Floppy(_))) {
        // Machines of type pc have one.
        opt("-device", json!({"driver": "isa-fdc", "id": "fdc"}).to_string());
    }
    if m.spec.board.usb.is_empty() && buses.iter().any(|b| matches!(b, Bus::Usb(_))) {
        let text = "there is no controller of USB that a disk could be at; set hardware.usb";
        return Err(Error::invalid("config.hardware.usb", text));
    }
    let mut lower = fd::LAYER;
    for (i, disk) in m.disks.iter().enumerate() {
        let (file_set, base_set) = disk.fd_sets()?;
        let number = fd::DISK + 2 * i as i32;
        opt("-object", disk.group().to_string());
        if !disk.ejected {
            if disk.encrypted {
                opt("-object", disk.key(fd::KEY + i as i32).to_string());
            }
            sets.push((layer_set(file_set, disk.layer), number, "disk"));
            for (layer, _) in &disk.below {
                sets.push((layer_set(file_set, *layer), lower, "layer"));
                lower += 1;
            }
            if disk.cloned {
                sets.push((base_set, number + 1, "base"));
            }
            for node in disk.nodes()? {
                opt("-blockdev", node.to_string());
            }
        }
        if let Some(property) = disk.boots_by_controller()? {
            opt("-global", property);
        }
        opt("-device", disk.device(layout)?.to_string());
    }
    if m.directories.len() > MAX_DIRECTORIES {
        let text = format!("a virtual machine shares {MAX_DIRECTORIES} directories at most");
        return Err(Error::invalid("devices", text));
    }
    for (i, (directory, way)) in m.directories.iter().enumerate() {
        let (option, host) = directory.host(i, *way)?;
        opt(option, host);
        opt("-device", directory.device(layout, *way)?.to_string());
    }

    if m.seed {
        sets.push((2, fd::SEED, "seed"));
        opt(
            "-blockdev",
            json!({"driver": "file", "node-name": "seed-file", "filename": "/dev/fdset/2", "read-only": true}).to_string(),
        );
        opt(
            "-blockdev",
            json!({"driver": "raw", "node-name": "seed", "file": "seed-file", "read-only": true}).to_string(),
        );
        let seed = json!({"driver": "virtio-blk-pci", "drive": "seed", "id": "seed", "serial": "cidata"});
        opt("-device", fixed("seed", seed, slot::SEED)?);
    }

    if m.nics.len() > MAX_NICS {
        return Err(Error::invalid("devices", format!("a virtual machine has {MAX_NICS} NICs at most")));
    }
    for (i, nic) in m.nics.iter().enumerate() {
        let device = nic.device(layout)?;
        opt("-netdev", nic.host(&(fd::NIC + i as i32).to_string()).to_string());
        opt("-device", device.to_string());
    }

    // Descriptor sets come before what opens them.
    let mut with_sets = vec![];
    for (set, number, name) in sets {
        with_sets.extend(["-add-fd".to_owned(), format!("set={set},fd={number},opaque={name}")]);
    }
    with_sets.extend(a);
    Ok(with_sets)
}

#[cfg(test)]
pub(crate) mod tests;
