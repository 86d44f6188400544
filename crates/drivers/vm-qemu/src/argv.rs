//! QEMU's arguments: a pure function of what was resolved, valid for QEMU 7.2 to 10.
//!
//! Nothing is left to QEMU's defaults (`-nodefaults`, versioned machine type, explicit image formats, fixed PCI
//! addresses), because they change between versions and a guest must keep its hardware. Files, taps and sockets are
//! descriptors that the keeper hands on: QEMU runs as a user that could open none of them.

use crate::{
    board,
    devices::{Bus, Disk, Layout, MAX_DISKS, MAX_NICS, Nic, virtio},
    directories::{Directory, MAX_DIRECTORIES, Way},
    ports, threads,
};
use karst_model::{
    Error, Result,
    board::{Rng, Sound, UsbKind},
    instance::Firmware,
    keys_machine::MOST_STRINGS,
    node::AcceleratorKind,
    screens::ScreenOptions,
    spec::{CpuLimit, MachineSpec},
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
    /// First string of the SMBIOS.
    pub const STRINGS: i32 = 300;
    /// First tap.
    pub const NIC: i32 = 20;
    /// Of the first disk; each has this and the next, which is of the file below a clone.
    pub const DISK: i32 = 40;
    /// First shared directory.
    pub const DIRECTORY: i32 = 200;
    /// Of the first port; each has this and the next, which is of its log.
    pub const PORT: i32 = 300;
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
fn word<'a>(field: &str, s: &'a str, extra: &str) -> Result<&'a str> {
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
    opt("-display", "none".into());
    opt("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into());
    opt("-msg", "timestamp=on".into());

    // graphics=off is what -nographic means for the firmware: SeaBIOS then speaks on the serial port.
    // System management mode is needed by secure boot alone and costs at every firmware call.
    let on = |on: bool| if on { "on" } else { "off" };
    let features = m.spec.board.features.unwrap_or_default();
    let mut machine = format!(
        "{machine},graphics=off,usb=off,vmport=off,hpet={},dump-guest-core=off,smm={}",
        on(m.spec.board.hpet),
        on(secure || features.tseg.is_some())
    );
    if m.spec.board.sound.contains(&Sound::Pcspk) {
        machine.push_str(&format!(",pcspk-audiodev={}", board::AUDIO));
    }
    // Who serves a directory by virtiofs reads and writes in the guest's memory.
    let served = m.directories.iter().any(|(_, way)| *way == Way::Virtiofs);
    let with_memory = m.spec.board.clone();
    let with_memory = if served { board::shared(with_memory) } else { with_memory };
    if let Some(memory) = &with_memory.memory {
        if memory.unmerged {
            machine.push_str(",mem-merge=off");
        }
        if m.spec.board.numa.is_empty() {
            machine.push_str(&format!(",memory-backend={}", board::MEMORY));
        }
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
    for (option, value) in board::memory(&with_memory, base)? {
        opt(option, value);
    }
    for (option, value) in board::modules(&with_memory) {
        opt(option, value);
    }
    opt("-uuid", m.spec.uuid.to_string());
    opt("-smbios", format!("type=1,manufacturer=Karst,product=Virtual Machine,uuid={}", m.spec.uuid));
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
    for (n, rng) in rngs.iter().enumerate() {
        let id = format!("rng{n}");
        opt("-object", format!("rng-random,id={id},filename=/dev/urandom"));
        let mut device = json!({"driver": "virtio-rng-pci", "id": id, "rng": id});
        if let Some((bytes, period)) = rng.rate {
            (device["max-bytes"], device["period"]) = (bytes.into(), period.into());
        }
        if n == 0 && rngs.len() > 1 {
            device["multifunction"] = true.into();
        }
        virtio(&mut device, &rng.virtio);
        opt("-device", fixed("rng", device, &slot::rng(layout, n))?);
    }

    opt("-chardev", format!("socket,id=console,fd={}", fd::CONSOLE));
    let ports = ports::options(&m.spec.lines)?;
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
            let device =
                json!({"driver": "usb-redir", "id": id, "chardev": id, "bus": "usb.0", "port": port});
            opt("-device", device.to_string());
        }
    }
    for (option, value) in board::devices(&m.spec.board, layout, m.spice)? {
        opt(option, value);
    }
    sets.extend(ports.sets);
    for (option, value) in ports.options {
        opt(option, value);
    }
    threads::demand_few(&m.spec.iothreads)?;
    for thread in &m.spec.iothreads {
        opt("-object", threads::object(thread).to_string());
    }
    for port in layout.root_ports() {
        opt("-device", port.to_string());
    }
    if m.disks.len() > MAX_DISKS {
        return Err(Error::invalid("devices", format!("a virtual machine has {MAX_DISKS} disks at most")));
    }
    let buses = m.disks.iter().map(Disk::bus).collect::<Result<Vec<_>>>()?;
    // Machines that devices can be plugged into have the controller also when nothing is behind it yet.
    if layout.hotplug() || buses.iter().any(|b| matches!(b, Bus::Scsi(_))) {
        // An older machine's root behind virtio-scsi carries the address of the controller.
        let old = m.disks.first().filter(|d| layout.ports == 0 && d.slot.starts_with("scsi"));
        let at = old.and_then(|d| d.pci.as_deref()).unwrap_or(slot::SCSI);
        let mut controller = json!({"driver": "virtio-scsi-pci", "id": "scsi"});
        if let Some(thread) = m.spec.scsi_iothread {
            controller["iothread"] = threads::id(thread).into();
        }
        of_part(&mut controller, "scsi");
        opt("-device", fixed("devices.root", controller, at)?);
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
    for (i, disk) in m.disks.iter().enumerate() {
        let (file_set, base_set) = disk.fd_sets()?;
        let number = fd::DISK + 2 * i as i32;
        opt("-object", disk.group().to_string());
        if !disk.ejected {
            sets.push((file_set, number, "disk"));
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
pub(crate) mod tests {
    use super::*;
    use crate::{devices::tests::disk, directories::tests::directory};
    use karst_guest::DiskFormat;
    use karst_model::{device::NicModel, threads::IoThread};

    pub(crate) fn machine() -> Machine {
        Machine {
            name: "0b3c1f9e-7f2c-4d0a-9a53-3a3f6f0f0001".into(),
            spec: karst_guest::samples::machine(0x42),
            accelerator: AcceleratorKind::Tcg,
            cpus: 2,
            max_cpus: 4,
            memory: 1 << 30,
            disks: vec![Disk { pci: Some("00:04.0".into()), format: DiskFormat::Qcow2, ..disk("virtio0") }],
            directories: vec![],
            nics: vec![Nic {
                name: "eth0".into(),
                slot: "net0".into(),
                model: NicModel::Virtio,
                mac: "10:66:6a:12:34:56".into(),
                pci: Some("00:08.0".into()),
                mtu: None,
                boot_priority: 0,
                user: false,
                options: Default::default(),
            }],
            seed: true,
            firmware_code: None,
            hold: false,
            spice: false,
        }
    }

    fn lines(m: &Machine) -> String {
        let mut out = String::new();
        for a in argv(m).unwrap() {
            out.push_str(if a.starts_with('-') && !out.is_empty() { "\n" } else { " " });
            out.push_str(&a);
        }
        out.trim_start().to_owned()
    }

    #[test]
    fn a_bios_guest_under_tcg() {
        insta::assert_snapshot!(lines(&machine()));
    }

    #[test]
    fn a_uefi_guest_under_kvm_on_a_block_device_behind_scsi() {
        let mut m = machine();
        m.accelerator = AcceleratorKind::Kvm;
        m.spec.cpu_model = "host".into();
        m.spec.firmware = Firmware::UefiSecure;
        m.firmware_code = Some("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd".into());
        m.spec.ports = 16;
        m.disks = vec![Disk { block_device: true, boot_priority: 1, ..disk("scsi0") }];
        m.disks.push(Disk { pci: Some("01:00.0".into()), ..disk("nvme0") });
        m.disks.push(Disk { cdrom: true, readonly: true, ejected: true, ..disk("sata0") });
        m.nics.push(Nic {
            name: "eth1".into(),
            slot: "net1".into(),
            model: NicModel::E1000e,
            pci: Some("02:00.0".into()),
            mtu: Some(1400),
            boot_priority: 5,
            user: false,
            options: Default::default(),
            mac: "10:66:6a:12:34:57".into(),
        });
        m.seed = false;
        insta::assert_snapshot!(lines(&m));
    }

    #[test]
    fn floppy_disks_and_disks_on_usb() {
        let mut m = machine();
        let place = |kind: &str| Disk { pci: None, ..disk(kind) };
        m.disks.extend([place("floppy0"), place("usb3")]);
        assert_eq!(argv(&m).unwrap_err().field.as_deref(), Some("config.hardware.usb"));
        let keys = [("hardware.usb".to_owned(), "qemu-xhci".to_owned())];
        m.spec.board = karst_model::board::Board::of(&keys.into()).unwrap();
        let has = |m: &Machine, text: &str| argv(m).unwrap().iter().any(|a| a.contains(text));
        assert!(
            has(&m, "\"driver\":\"isa-fdc\"") && has(&m, "\"driver\":\"usb-storage\",\"bus\":\"usb0.0\"")
                || has(&m, "usb-storage")
        );
        m.spec.machine = "pc-i440fx-7.2".into();
        assert!(!has(&m, "\"driver\":\"isa-fdc\""));
    }

    #[test]
    fn what_is_not_as_usual_is_said() {
        let mut m = machine();
        let before = argv(&m).unwrap();
        let keys = [
            ("hardware.features", "vmcoreinfo,hyperv-panic,tpm-tis,rtc-realtime,tseg=48,tcg-cache=100"),
            ("hardware.rng", "plain,rate=1024/1000+iommu"),
            ("hardware.virtio", "balloon=ats,scsi=packed,serial=iommu"),
            ("hardware.sound", "pcspk"),
            ("hardware.clock.start", "253402300799"),
        ];
        let keys = keys.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned()));
        m.spec.board = karst_model::board::Board::of(&keys.collect()).unwrap();
        (m.spec.balloon, m.spec.tpm, m.spec.ports) = (true, true, 16);
        let after = argv(&m).unwrap();
        for text in [
            "dump-guest-core=off,smm=on,pcspk-audiodev=audio",
            "tcg,thread=multi,tb-size=100",
            "mch.extended-tseg-mbytes=48",
            "base=9999-12-31T23:59:59,clock=rt",
            "{\"driver\":\"vmcoreinfo\"",
            "{\"driver\":\"tpm-tis\"",
            "rng-random,id=rng1,filename=/dev/urandom",
            "\"max-bytes\":1024,\"period\":1000,\"iommu_platform\":true",
            "\"id\":\"balloon\",\"free-page-reporting\":true,\"ats\":true",
            "\"id\":\"scsi\",\"packed\":true",
            "\"max_ports\":16,\"iommu_platform\":true",
        ] {
            assert!(after.iter().any(|a| a.contains(text)), "{text} in {after:?}");
            assert!(!before.iter().any(|a| a.contains(text)), "{text} in {before:?}");
        }
        // Of Hyper-V's there is nothing without KVM.
        let crashes = |m: &Machine| argv(m).unwrap().iter().any(|a| a.contains(",hv-crash"));
        assert!(!crashes(&m));
        m.accelerator = AcceleratorKind::Kvm;
        assert!(crashes(&m));
        m.spec.machine = "pc-i440fx-7.2".into();
        assert_eq!(argv(&m).unwrap_err().field.as_deref(), Some("config.hardware.features"));
    }

    #[test]
    fn a_machine_for_windows() {
        let mut m = machine();
        m.accelerator = AcceleratorKind::Kvm;
        m.spec.cpu_model = "host".into();
        m.spec.firmware = Firmware::UefiSecure;
        m.firmware_code = Some("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd".into());
        m.spec.ports = 16;
        (m.spec.tpm, m.spec.display) = (true, true);
        m.disks = vec![disk("sata0"), Disk { cdrom: true, readonly: true, ..disk("sata1") }];
        m.nics[0] = Nic { model: NicModel::E1000e, pci: Some("01:00.0".into()), ..m.nics[0].clone() };
        let plain = lines(&m);
        m.spec.windows = true;
        m.spec.local_time = true;
        let text = lines(&m);
        let changed: Vec<&str> = text.lines().filter(|l| !plain.lines().any(|p| p == *l)).collect();
        assert_eq!(text.lines().count(), plain.lines().count());
        insta::assert_snapshot!(changed.join("\n"), @r"
        -cpu host,hv-relaxed,hv-vapic,hv-spinlocks=0x1fff,hv-vpindex,hv-runtime,hv-synic,hv-stimer,hv-time,hv-frequencies,hv-reset,hv-tlbflush,hv-ipi
        -rtc base=localtime
        ");
        // What its installer has drivers for, and what its newer ones demand.
        for part in [
            r#""bus":"ide.0""#,
            r#""bus":"ide.1""#,
            r#""driver":"e1000e""#,
            r#""driver":"tpm-crb""#,
            "smm=on",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        // Emulated, there is no Hyper-V.
        m.accelerator = AcceleratorKind::Tcg;
        assert!(!lines(&m).contains("hv-"));
    }

    #[test]
    fn a_clone_names_the_file_below_it() {
        let mut m = machine();
        m.disks[0].cloned = true;
        let text = lines(&m);
        assert!(text.contains("fd=41,opaque=base") && text.contains(r#""backing":"b-virtio0""#), "{text}");
    }

    #[test]
    fn disks_are_served_by_threads_that_are_made_before() {
        let mut m = machine();
        m.spec.iothreads = vec![IoThread::new(1), IoThread { poll_grow: Some(2), ..IoThread::new(4) }];
        m.spec.scsi_iothread = Some(4);
        m.disks[0].thread = Some(1);
        m.disks.push(disk("scsi1"));
        let text = lines(&m);
        let objects = "-object {\"qom-type\":\"iothread\",\"id\":\"iothread1\"}\n\
            -object {\"qom-type\":\"iothread\",\"id\":\"iothread4\",\"poll-grow\":2}";
        let at = |part: &str| text.find(part).unwrap_or_else(|| panic!("{part}: {text}"));
        let controller = "\"driver\":\"virtio-scsi-pci\",\"id\":\"scsi\",\"iothread\":\"iothread4\"";
        assert!(at(objects) < at(controller) && at(controller) < at("\"iothread\":\"iothread1\""));
        m.disks[1].thread = Some(1);
        assert_eq!(argv(&m).unwrap_err().field.as_deref(), Some("devices.data.io.thread"));
        m.disks.pop();
        m.spec.iothreads = (1..=65).map(IoThread::new).collect();
        assert_eq!(argv(&m).unwrap_err().field.as_deref(), Some("config.hardware.iothreads"));
    }

    #[test]
    fn directories_are_descriptors_with_a_tag() {
        let mut m = machine();
        let first = Directory { pci: Some("00:09.0".into()), ..directory("data", "fs0") };
        let second = Directory {
            pci: Some("00:0a.0".into()),
            readonly: true,
            foreign: true,
            ..directory("config", "fs1")
        };
        m.directories = vec![(first, Way::Plan9 { mapped: true }), (second, Way::Plan9 { mapped: false })];
        let text = lines(&m);
        let from = text.find("-fsdev local,id=directory-fs0").unwrap();
        let shown: Vec<&str> = text[from..].lines().take(4).collect();
        assert_eq!(
            shown.join("\n"),
            "-fsdev local,id=directory-fs0,path=/proc/self/fd/200,security_model=mapped-xattr,multidevs=remap\n\
             -device {\"driver\":\"virtio-9p-pci\",\"id\":\"directory-fs0\",\"fsdev\":\"directory-fs0\",\
             \"mount_tag\":\"data\",\"disable-legacy\":\"on\",\"bus\":\"pcie.0\",\"addr\":\"0x9.0x0\"}\n\
             -fsdev local,id=directory-fs1,path=/proc/self/fd/201,security_model=none,multidevs=remap,readonly=on\n\
             -device {\"driver\":\"virtio-9p-pci\",\"id\":\"directory-fs1\",\"fsdev\":\"directory-fs1\",\
             \"mount_tag\":\"karst-fs1\",\"disable-legacy\":\"on\",\"bus\":\"pcie.0\",\"addr\":\"0xa.0x0\"}"
        );
        // Neither the path of the host nor the place inside is QEMU's to know.
        assert!(!text.contains("/srv/data") && !text.contains("/mnt/data"), "{text}");
        // One that is served by another process: a connection to it, and memory that it is handed.
        let without: Vec<String> = text.lines().map(str::to_owned).collect();
        m.directories[0].1 = Way::Virtiofs;
        let served = lines(&m);
        assert!(served.contains("virtio-9p-pci\",\"id\":\"directory-fs1\""), "the other stays: {served}");
        let new: Vec<&str> = served.lines().filter(|l| !without.iter().any(|w| w == l)).collect();
        let machine = without.iter().find(|l| l.starts_with("-machine")).unwrap();
        assert_eq!(
            new.join("\n"),
            format!("{machine},memory-backend=memory\n")
                + "-object {\"qom-type\":\"memory-backend-memfd\",\"id\":\"memory\",\"size\":1073741824,\"share\":true}\n\
                   -chardev socket,id=directory-fs0,fd=200\n\
                   -device {\"driver\":\"vhost-user-fs-pci\",\"id\":\"directory-fs0\",\"chardev\":\"directory-fs0\",\
                   \"tag\":\"data\",\"queue-size\":1024,\"bus\":\"pcie.0\",\"addr\":\"0x9.0x0\"}"
        );
        let many = (0..17).map(|n| (directory("data", &format!("fs{n}")), Way::Plan9 { mapped: false }));
        m.directories = many.collect();
        assert_eq!(argv(&m).unwrap_err().field.as_deref(), Some("devices"));
    }

    #[test]
    fn an_i440fx_machine_has_its_devices_on_its_one_bus() {
        let mut m = machine();
        m.spec.machine = "pc-i440fx-7.2".into();
        m.disks.push(disk("sata1"));
        let text = lines(&m);
        assert!(!text.contains("pcie") && !text.contains("ICH9-LPC"), "{text}");
        assert!(text.contains(r#""bus":"sata.1""#) && text.contains(r#""id":"scsi""#), "{text}");
    }

    #[test]
    fn strings_of_the_firmware_are_in_no_argument() {
        let mut m = machine();
        m.spec.strings = vec!["role=web".into(), "io.systemd.credential:key=sesame".into()];
        let args = argv(&m).unwrap();
        let named: Vec<_> = args.iter().filter(|a| a.starts_with("type=11")).collect();
        assert_eq!(named, ["type=11,path=/proc/self/fd/300", "type=11,path=/proc/self/fd/301"]);
        assert!(!args.iter().any(|a| a.contains("sesame") || a.contains("role")), "{args:?}");
        m.spec.strings = vec!["a=b".into(); MOST_STRINGS + 1];
        assert_eq!(argv(&m).unwrap_err().field.as_deref(), Some("config.smbios11"));
    }

    #[test]
    fn a_kernel_is_named_by_its_descriptor_and_its_line_is_one_argument() {
        let mut m = machine();
        m.spec.ends_on_reboot = true;
        m.spec.kernel = Some(karst_model::spec::KernelSpec {
            name: "boot".into(),
            kernel: karst_model::spec::DiskSource::Host { path: "/etc/shadow".into() },
            initrd: None,
            cmdline: Some("console=ttyS0 a,b=c -kernel /x".into()),
        });
        let args = argv(&m).unwrap();
        let after = |name: &str| args.iter().position(|a| a == name).map(|n| args[n + 1].as_str());
        assert_eq!(after("-kernel"), Some("/proc/self/fd/16"));
        assert_eq!((after("-initrd"), after("-append")), (None, Some("console=ttyS0 a,b=c -kernel /x")));
        assert!(args.iter().any(|a| a == "-no-reboot") && !args.iter().any(|a| a.contains("shadow")));
        m.spec.kernel.as_mut().unwrap().cmdline = Some("a\nb".into());
        assert_eq!(argv(&m).unwrap_err().field.as_deref(), Some("devices.boot.cmdline"));
    }

    #[test]
    fn a_screen_listens_nowhere_however_it_is_served() {
        let mut m = machine();
        m.spec.display = true;
        let has = |m: &Machine, text: &str| lines(m).lines().any(|line| line == text);
        assert!(has(&m, "-vnc none,password=on") && !lines(&m).contains("\n-k "));
        m.spec.screen = ScreenOptions {
            share: Some("force-shared".into()),
            power_control: true,
            keymap: Some("de-ch".into()),
        };
        assert!(has(&m, "-vnc none,password=on,share=force-shared,power-control=on"), "{}", lines(&m));
        assert!(has(&m, "-k de-ch"));
        m.spec.screen.keymap = Some("de,x".into());
        assert_eq!(argv(&m).unwrap_err().field.as_deref(), Some("config.screen.keymap"));
    }

    #[test]
    fn spice_listens_nowhere_and_what_the_guest_has_of_it_does_not_hang_on_the_host() {
        const VGA: &str =
            r#"-device {"driver":"VGA","id":"video","vgamem_mb":16,"bus":"pcie.0","addr":"0x1b.0x0"}"#;
        let mut m = machine();
        m.spec.display = true;
        let without = lines(&m);
        assert!(!without.contains("spice") && !without.contains("xhci"), "{without}");
        // Wanted of a QEMU that has none: the port alone, with nobody behind it.
        m.spec.spice = true;
        let wanted = lines(&m);
        let port = "-device {\"driver\":\"virtserialport\",\"bus\":\"serial0.0\",\"nr\":5,\"id\":\"vdagent\",\
             \"name\":\"com.redhat.spice.0\"";
        assert_eq!(wanted, without.replacen(VGA, &format!("{VGA}\n{port}}}"), 1));
        m.spice = true;
        let text = lines(&m);
        let from = text.find(port).unwrap();
        let shown: Vec<&str> = text[from..].lines().take(11).collect();
        assert_eq!(
            shown.join("\n"),
            format!("{port},\"chardev\":\"vdagent\"}}\n")
                + "-spice port=0,streaming-video=off,seamless-migration=off\n\
                   -chardev spicevmc,id=vdagent,name=vdagent\n\
                   -device {\"driver\":\"qemu-xhci\",\"id\":\"usb\",\"bus\":\"pcie.0\",\"addr\":\"0x1e.0x0\"}\n\
                   -device {\"driver\":\"usb-tablet\",\"id\":\"tablet\",\"bus\":\"usb.0\",\"port\":\"1\"}\n\
                   -chardev spicevmc,id=redirect0,name=usbredir\n\
                   -device {\"driver\":\"usb-redir\",\"id\":\"redirect0\",\"chardev\":\"redirect0\",\"bus\":\"usb.0\",\"port\":\"2\"}\n\
                   -chardev spicevmc,id=redirect1,name=usbredir\n\
                   -device {\"driver\":\"usb-redir\",\"id\":\"redirect1\",\"chardev\":\"redirect1\",\"bus\":\"usb.0\",\"port\":\"3\"}\n\
                   -chardev spicevmc,id=redirect2,name=usbredir\n\
                   -device {\"driver\":\"usb-redir\",\"id\":\"redirect2\",\"chardev\":\"redirect2\",\"bus\":\"usb.0\",\"port\":\"4\"}"
        );
        m.spec.machine = "pc-i440fx-7.2".into();
        assert!(lines(&m).contains(r#""id":"usb","bus":"pci.0","addr":"0x1e.0x0""#));
    }

    #[test]
    fn the_clock_and_what_hyper_v_says_are_chosen_apart() {
        let mut m = machine();
        m.accelerator = AcceleratorKind::Kvm;
        let says = |m: &Machine| {
            let text = lines(m);
            (text.contains("-rtc base=localtime"), text.contains("hv-relaxed"))
        };
        assert_eq!(says(&m), (false, false));
        m.spec.local_time = true;
        assert_eq!(says(&m), (true, false));
        m.spec.windows = true;
        assert_eq!(says(&m), (true, true));
        // TCG knows none of it.
        m.accelerator = AcceleratorKind::Tcg;
        assert_eq!(says(&m), (true, false));
    }

    #[test]
    fn descriptor_numbers_differ() {
        let mut all = vec![
            fd::TPM,
            fd::LINK,
            fd::SHARE,
            fd::QMP,
            fd::EVENTS,
            fd::AGENT,
            fd::CONSOLE,
            fd::SEED,
            fd::VARS,
            fd::KERNEL,
            fd::INITRD,
        ];
        all.extend((0..MAX_NICS as i32).map(|i| fd::NIC + i));
        all.extend((0..MOST_STRINGS as i32).map(|i| fd::STRINGS + i));
        all.extend((0..2 * MAX_DISKS as i32).map(|i| fd::DISK + i));
        all.extend((0..MAX_DIRECTORIES as i32).map(|i| fd::DIRECTORY + i));
        let n = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), n);
    }

    #[test]
    fn nothing_slips_a_property_in() {
        let bad = |f: &dyn Fn(&mut Machine)| {
            let mut m = machine();
            f(&mut m);
            argv(&m).unwrap_err()
        };
        assert_eq!(bad(&|m| m.spec.machine = "q35".into()).field.unwrap(), "hardware.machine");
        assert_eq!(
            bad(&|m| m.spec.machine = "pc-q35-7.2,kernel=/etc/shadow".into()).field.unwrap(),
            "hardware.machine"
        );
        assert_eq!(
            bad(&|m| m.nics[0].mac = "10:66:6a:12:34:56,romfile=/x".into()).field.unwrap(),
            "devices.eth0.hwaddr"
        );
        for pci in ["00:00.0", "00:1f.0", "01:04.0", "00:04.8", "4", "00:04.0,x=y"] {
            assert_eq!(bad(&|m| m.disks[0].pci = Some(pci.into())).field.unwrap(), "devices.data", "{pci}");
        }
        assert_eq!(bad(&|m| m.memory = 1000).field.unwrap(), "config.limits.memory");
        assert!(bad(&|m| m.disks[0].format = DiskFormat::Directory).message.contains("disk image"));
    }
}
