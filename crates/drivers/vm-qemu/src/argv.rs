//! QEMU's arguments: a pure function of what was resolved, valid for QEMU 7.2 to 10.
//!
//! Nothing is left to QEMU's defaults (`-nodefaults`, versioned machine type, explicit image formats, fixed PCI
//! addresses), because they change between versions and a guest must keep its hardware. Files, taps and sockets are
//! descriptors that the keeper hands on: QEMU runs as a user that could open none of them.

use karst_guest::DiskFormat;
use karst_model::{
    Error, Result,
    instance::Firmware,
    node::AcceleratorKind,
    spec::{CpuLimit, MachineSpec},
};
use serde_json::json;

/// PCI slots of the machine's own devices on `pcie.0`; disks and NICs carry theirs in the record.
mod slot {
    pub(super) const RNG: &str = "00:01.0";
    pub(super) const SERIAL: &str = "00:02.0";
    pub(super) const SHARE: &str = "00:07.0";

    pub(super) const ROOT: &str = "00:04.0";
    // After the root disk, which is thus vda.
    pub(super) const SEED: &str = "00:06.0";
    pub(super) const NIC: usize = 8;
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
    /// Root disk.
    pub const ROOT: i32 = 13;
    /// cloud-init seed.
    pub const SEED: i32 = 14;
    /// UEFI variables.
    pub const VARS: i32 = 15;
    /// The file below a cloned root disk, read-only.
    pub const BASE: i32 = 16;
    /// First tap.
    pub const NIC: i32 = 20;
}

/// Default size of a guest's memory where no limit is set.
pub const DEFAULT_MEMORY: u64 = 1 << 30;
/// NICs that fit behind the fixed addresses.
pub const MAX_NICS: usize = 16;

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
    /// Bytes of memory.
    pub memory: u64,
    /// Root disk.
    pub root: Disk,
    /// NICs.
    pub nics: Vec<Nic>,
    /// Has a cloud-init seed.
    pub seed: bool,
    /// UEFI code, from the firmware package; `None` for SeaBIOS.
    pub firmware_code: Option<String>,
}

/// The root disk.
#[derive(Debug, Clone)]
pub struct Disk {
    /// Bus slot; `scsi0` is behind a virtio-scsi controller, anything else virtio-blk.
    pub slot: String,
    /// Format, stated.
    pub format: DiskFormat,
    /// The path is a block device.
    pub block_device: bool,
    /// It is a clone: the qcow2 file below it comes as [`fd::BASE`].
    pub cloned: bool,
    /// PCI address of disk or controller.
    pub pci: Option<String>,
    /// Boot order, higher first.
    pub boot_priority: u32,
}

/// A NIC.
#[derive(Debug, Clone)]
pub struct Nic {
    /// Bus slot.
    pub slot: String,
    /// MAC address.
    pub mac: String,
    /// PCI address.
    pub pci: Option<String>,
    /// MTU to tell the guest.
    pub mtu: Option<u32>,
    /// Boot order, higher first.
    pub boot_priority: u32,
}

/// How many virtual CPUs a limit means.
pub fn cpu_count(limit: Option<&CpuLimit>) -> u32 {
    match limit {
        None => 1,
        Some(CpuLimit::Count { n }) => (*n).max(1),
        Some(CpuLimit::Set { cpus }) => (cpus.len() as u32).max(1),
    }
}

/// `00:04.0` as properties of a device on the root bus.
fn address(field: &str, pci: &str) -> Result<String> {
    let wrong = || Error::invalid(field, format!("{pci:?} is not a PCI address on bus 00, such as 00:04.0"));
    let (slot, function) = pci.strip_prefix("00:").and_then(|a| a.split_once('.')).ok_or_else(wrong)?;
    let slot = u8::from_str_radix(slot, 16).ok().filter(|s| (1..0x1f).contains(s)).ok_or_else(wrong)?;
    let function = function.parse::<u8>().ok().filter(|f| *f < 8).ok_or_else(wrong)?;
    Ok(format!("bus=pcie.0,addr=0x{slot:x}.0x{function:x}"))
}

/// Only what QEMU's option parser cannot mistake: a comma would begin another property.
fn word<'a>(field: &str, s: &'a str, extra: &str) -> Result<&'a str> {
    let ok = !s.is_empty()
        && s.len() <= 256
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
    if !machine.starts_with("pc-q35-") {
        return Err(Error::invalid(
            "hardware.machine",
            format!("{machine:?} is not a versioned q35 machine type, such as pc-q35-7.2"),
        ));
    }
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
    let mut machine = format!(
        "{machine},graphics=off,usb=off,vmport=off,hpet=off,dump-guest-core=off,smm={}",
        if secure { "on" } else { "off" }
    );
    if m.firmware_code.is_some() {
        machine.push_str(",pflash0=firmware-code,pflash1=firmware-vars");
    }
    opt("-machine", machine);
    opt(
        "-accel",
        match m.accelerator {
            AcceleratorKind::Kvm => "kvm".into(),
            AcceleratorKind::Tcg => "tcg,thread=multi".into(),
        },
    );
    opt("-cpu", word("hardware.cpu_model", &m.spec.cpu_model, ",=+")?.to_owned());
    opt("-smp", format!("cpus={0},sockets=1,cores={0},threads=1", m.cpus.max(1)));
    if m.memory < 64 << 20 || !m.memory.is_multiple_of(1 << 20) {
        return Err(Error::invalid(
            "config.limits.memory",
            "the memory of a virtual machine is a multiple of 1MiB, at least 64MiB",
        ));
    }
    opt("-m", format!("size={}M", m.memory >> 20));
    opt("-uuid", m.spec.uuid.to_string());
    opt("-smbios", format!("type=1,manufacturer=Karst,product=Virtual Machine,uuid={}", m.spec.uuid));
    opt("-rtc", "base=utc".into());
    opt("-boot", "menu=off,strict=on".into());
    opt("-global", "ICH9-LPC.disable_s3=1".into());
    opt("-global", "ICH9-LPC.disable_s4=1".into());
    if secure {
        opt("-global", "driver=cfi.pflash01,property=secure,value=on".into());
    }

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

    opt("-object", "rng-random,id=rng0,filename=/dev/urandom".into());
    opt(
        "-device",
        format!("virtio-rng-pci,id=rng0,rng=rng0,disable-legacy=on,{}", address("rng", slot::RNG)?),
    );

    opt("-chardev", format!("socket,id=console,fd={}", fd::CONSOLE));
    opt("-serial", "chardev:console".into());
    opt("-chardev", format!("socket,id=qmp,fd={},server=on,wait=off", fd::QMP));
    opt("-mon", "chardev=qmp,mode=control".into());
    opt("-chardev", format!("socket,id=events,fd={},server=on,wait=off", fd::EVENTS));
    opt("-mon", "chardev=events,mode=control".into());
    opt("-chardev", format!("socket,id=agent,fd={},server=on,wait=off", fd::AGENT));
    opt(
        "-device",
        format!(
            "virtio-serial-pci,id=serial0,max_ports=16,disable-legacy=on,{}",
            address("serial", slot::SERIAL)?
        ),
    );
    opt(
        "-device",
        "virtserialport,bus=serial0.0,nr=1,chardev=agent,id=agent,name=org.qemu.guest_agent.0".into(),
    );
    opt("-chardev", format!("socket,id=karst,fd={},server=on,wait=off", fd::LINK));
    opt(
        "-device",
        format!("virtserialport,bus=serial0.0,nr=2,chardev=karst,id=karst,name={}", karst_guest_agent::PORT),
    );
    // Images made for Incus and LXD look into the share when they find a port of this name; nothing flows through it.
    for (number, loader) in [(3, "incus"), (4, "lxd")] {
        opt(
            "-device",
            format!(
                "virtserialport,bus=serial0.0,nr={number},id=loader-{loader},name=org.linuxcontainers.{loader}"
            ),
        );
    }
    // By its descriptor, so that QEMU's user needs no way to it.
    opt(
        "-fsdev",
        format!("local,id=config,path=/proc/self/fd/{},readonly=on,security_model=none", fd::SHARE),
    );
    opt(
        "-device",
        format!(
            "virtio-9p-pci,id=config,fsdev=config,mount_tag=config,disable-legacy=on,{}",
            address("share", slot::SHARE)?
        ),
    );

    // Higher priority boots first; QEMU counts from 1 upwards. Disks come before NICs of the same priority.
    let mut order: Vec<(u32, usize)> = vec![(m.root.boot_priority, 0)];
    order.extend(m.nics.iter().enumerate().map(|(i, n)| (n.boot_priority, i + 1)));
    order.sort_by_key(|(priority, i)| (std::cmp::Reverse(*priority), *i));
    let bootindex = |which: usize| 1 + order.iter().position(|(_, i)| *i == which).unwrap_or(0);

    sets.push((1, fd::ROOT, "root"));
    if m.root.cloned {
        sets.push((4, fd::BASE, "base"));
        opt(
            "-blockdev",
            json!({"driver": "file", "node-name": "base-file", "filename": "/dev/fdset/4", "read-only": true}).to_string(),
        );
        let base = json!({
            "driver": "qcow2", "node-name": "base", "file": "base-file", "read-only": true, "backing": null,
        });
        opt("-blockdev", base.to_string());
    }
    // Files keep the host's page cache and honour the guest's flushes; a block device has its cache in the guest.
    let direct = m.root.block_device;
    let cache = json!({"direct": direct, "no-flush": false});
    opt(
        "-blockdev",
        json!({
            "driver": if m.root.block_device { "host_device" } else { "file" },
            "node-name": "root-file", "filename": "/dev/fdset/1", "aio": if direct { "native" } else { "threads" },
            "cache": cache, "discard": "unmap",
        })
        .to_string(),
    );
    let mut node = json!({
        "driver": "raw", "node-name": "root", "file": "root-file", "cache": cache,
        "discard": "unmap", "detect-zeroes": "unmap",
    });
    match m.root.format {
        DiskFormat::Raw => {}
        DiskFormat::Qcow2 => {
            node["driver"] = "qcow2".into();
            // A backing file that an image names is not opened; the one below a clone is the agent's word.
            node["backing"] = if m.root.cloned { "base".into() } else { serde_json::Value::Null };
        }
        DiskFormat::Directory => {
            return Err(Error::invalid(
                "root",
                "the root of a virtual machine is a disk image, not a directory",
            ));
        }
    }
    opt("-blockdev", node.to_string());
    let at = address("devices.root", m.root.pci.as_deref().unwrap_or(slot::ROOT))?;
    let common = format!(
        "drive=root,id=disk-root,bootindex={},write-cache=on,werror=enospc,rerror=report",
        bootindex(0)
    );
    if m.root.slot.starts_with("scsi") {
        opt("-device", format!("virtio-scsi-pci,id=scsi,disable-legacy=on,{at}"));
        opt("-device", format!("scsi-hd,bus=scsi.0,channel=0,scsi-id=0,lun=0,{common}"));
    } else {
        opt("-device", format!("virtio-blk-pci,{common},disable-legacy=on,{at}"));
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
        opt(
            "-device",
            format!(
                "virtio-blk-pci,drive=seed,id=seed,serial=cidata,disable-legacy=on,{}",
                address("seed", slot::SEED)?
            ),
        );
    }

    if m.nics.len() > MAX_NICS {
        return Err(Error::invalid("devices", format!("a virtual machine has {MAX_NICS} NICs at most")));
    }
    for (i, nic) in m.nics.iter().enumerate() {
        let field = format!("devices.{}", nic.slot);
        let id = word(&field, &nic.slot, "")?;
        let pci = nic.pci.clone().unwrap_or_else(|| format!("00:{:02x}.0", slot::NIC + i));
        opt("-netdev", format!("tap,id=host-{id},fd={},vhost=off", fd::NIC + i as i32));
        let mtu = nic.mtu.map(|m| format!(",host_mtu={m}")).unwrap_or_default();
        opt(
            "-device",
            format!(
                "virtio-net-pci,netdev=host-{id},id={id},mac={},bootindex={},disable-legacy=on{mtu},{}",
                word(&field, &nic.mac, ":")?,
                bootindex(i + 1),
                address(&field, &pci)?
            ),
        );
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

    pub(crate) fn machine() -> Machine {
        Machine {
            name: "0b3c1f9e-7f2c-4d0a-9a53-3a3f6f0f0001".into(),
            spec: MachineSpec {
                machine: "pc-q35-7.2".into(),
                cpu_model: "max".into(),
                firmware: Firmware::Bios,
                uuid: uuid::Uuid::from_u128(0x42),
                accelerator: None,
            },
            accelerator: AcceleratorKind::Tcg,
            cpus: 2,
            memory: 1 << 30,
            root: Disk {
                slot: "virtio0".into(),
                format: DiskFormat::Qcow2,
                block_device: false,
                cloned: false,
                pci: Some("00:04.0".into()),
                boot_priority: 0,
            },
            nics: vec![Nic {
                slot: "net0".into(),
                mac: "10:66:6a:12:34:56".into(),
                pci: Some("00:08.0".into()),
                mtu: None,
                boot_priority: 0,
            }],
            seed: true,
            firmware_code: None,
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
        m.root = Disk {
            slot: "scsi0".into(),
            format: DiskFormat::Raw,
            block_device: true,
            cloned: false,
            pci: None,
            boot_priority: 1,
        };
        m.nics.push(Nic {
            slot: "net1".into(),
            mac: "10:66:6a:12:34:57".into(),
            pci: None,
            mtu: Some(1400),
            boot_priority: 5,
        });
        m.seed = false;
        insta::assert_snapshot!(lines(&m));
    }

    #[test]
    fn a_clone_names_the_file_below_it() {
        let mut m = machine();
        m.root.cloned = true;
        let text = lines(&m);
        assert!(text.contains("set=4,fd=16,opaque=base") && text.contains(r#""backing":"base""#), "{text}");
    }

    #[test]
    fn descriptor_numbers_differ() {
        let mut all = vec![
            fd::LINK,
            fd::SHARE,
            fd::QMP,
            fd::EVENTS,
            fd::AGENT,
            fd::CONSOLE,
            fd::ROOT,
            fd::BASE,
            fd::SEED,
            fd::VARS,
        ];
        all.extend((0..MAX_NICS as i32).map(|i| fd::NIC + i));
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
            "devices.net0"
        );
        for pci in ["00:00.0", "00:1f.0", "01:04.0", "00:04.8", "4", "00:04.0,x=y"] {
            assert_eq!(bad(&|m| m.root.pci = Some(pci.into())).field.unwrap(), "devices.root", "{pci}");
        }
        assert_eq!(bad(&|m| m.memory = 1000).field.unwrap(), "config.limits.memory");
        assert!(bad(&|m| m.root.format = DiskFormat::Directory).message.contains("disk image"));
    }
}
