//! Places of a virtual machine's devices: bus slots and PCI addresses, recorded in the identities so that a later change of
//! this scheme touches new machines only.
//!
//! A q35 machine has root ports (`03:00.0` is behind port 3), which let devices come and go while it runs. Machines made
//! before there were ports, and i440FX machines, have their devices on the root bus, from `00:08.0`.

use karst_model::{
    device::DiskBus,
    instance::{DeviceIdentity, Hardware},
};
use std::collections::BTreeSet;

/// Root ports of new q35 machines.
pub const PORTS: u8 = 16;

/// The version of a machine type that a new machine gets: `newest` is the host's newest q35, and i440FX has the same
/// versions.
pub fn versioned(wanted: Option<&str>, newest: &str) -> String {
    match wanted {
        None | Some("q35") => newest.to_owned(),
        Some("pc") => newest.replacen("pc-q35-", "pc-i440fx-", 1),
        Some(version) => version.to_owned(),
    }
}

/// The root ports of a new machine of this type.
pub fn ports(machine: &str) -> u8 {
    if machine.starts_with("pc-q35-") { PORTS } else { 0 }
}

/// Is the machine of the type that is asked for?
pub fn is_of(machine: &str, wanted: &str) -> bool {
    match wanted {
        "q35" => machine.starts_with("pc-q35-"),
        "pc" => machine.starts_with("pc-i440fx-"),
        version => machine == version,
    }
}

/// Ports of the SATA controller.
const SATA_PORTS: u32 = 6;
/// Slots of roots that their guests do not see.
pub const HIDDEN: &str = "hidden";

/// First and last slot for devices on the root bus.
const FIRST: u8 = 0x08;
const LAST: u8 = 0x17;
const ROOT: &str = "00:04.0";

/// Is there such a place for devices in this machine?
pub fn fits(hardware: &Hardware, pci: &str) -> bool {
    match hardware.ports {
        // Where roots once were, nothing is chosen, and what asks for it may be.
        0 => *pci == *ROOT || (FIRST..=LAST).any(|n| *pci == format!("00:{n:02x}.0")),
        ports => (1..=ports).any(|n| *pci == format!("{n:02x}:00.0")),
    }
}

/// How the slots of a bus begin.
pub fn prefix(bus: DiskBus) -> &'static str {
    match bus {
        DiskBus::VirtioScsi => "scsi",
        DiskBus::VirtioBlk => "virtio",
        DiskBus::Nvme => "nvme",
        DiskBus::Sata => "sata",
        DiskBus::Ide => "ide",
        DiskBus::Floppy => "floppy",
        DiskBus::Usb => "usb",
        DiskBus::Virtiofs | DiskBus::Plan9 => "fs",
    }
}

/// The letters of a slot.
pub fn kind_of(slot: &str) -> &str {
    slot.trim_end_matches(|c: char| c.is_ascii_digit())
}

/// What is free; the lowest is given first, and what devices that went away had may be given again.
pub struct Free {
    slots: BTreeSet<String>,
    addresses: BTreeSet<String>,
    machine: Option<(bool, u8)>,
}

impl Free {
    /// Beside the devices that stay.
    pub fn of<'a>(hardware: Option<&Hardware>, kept: impl Iterator<Item = &'a DeviceIdentity>) -> Self {
        let (mut slots, mut addresses) = (BTreeSet::new(), BTreeSet::new());
        for identity in kept {
            slots.insert(identity.slot.clone());
            addresses.extend(identity.pci.clone());
        }
        let machine = hardware.map(|h| (h.machine.starts_with("pc-i440fx-"), h.ports));
        Self { slots, addresses, machine }
    }

    /// A slot of a kind. Disks of SCSI and SATA have the same names (`sda` is the first of either) in libvirt's documents, so
    /// as long as the controller's ports suffice they have different numbers.
    pub fn slot(&mut self, kind: &str) -> String {
        let free = |kind: &str, n: u32| !self.slots.contains(&format!("{kind}{n}"));
        let apart = match kind {
            "scsi" => (0..).find(|n| free(kind, *n) && free("sata", *n)),
            "sata" => (0..SATA_PORTS).find(|n| free(kind, *n) && free("scsi", *n)),
            _ => None,
        };
        let number = apart.or_else(|| (0..).find(|n| free(kind, *n))).unwrap_or_default();
        let slot = format!("{kind}{number}");
        self.slots.insert(slot.clone());
        slot
    }

    /// A PCI address; `None` for containers, and when all are taken.
    pub fn pci(&mut self) -> Option<String> {
        let (pc, ports) = self.machine?;
        let ported = (1..=ports).map(|n| format!("{n:02x}:00.0"));
        let plain = (FIRST..=LAST).map(|n| format!("00:{n:02x}.0"));
        let found = if !pc && ports > 0 {
            ported.into_iter().find(|a| !self.addresses.contains(a))
        } else {
            plain.into_iter().find(|a| !self.addresses.contains(a))
        };
        self.addresses.extend(found.clone());
        found
    }

    /// Slot and address of a disk; those behind a controller have no address.
    pub fn disk(&mut self, bus: DiskBus) -> (String, Option<String>) {
        let slot = self.slot(prefix(bus));
        let pci = match bus {
            DiskBus::VirtioScsi | DiskBus::Sata | DiskBus::Ide | DiskBus::Floppy | DiskBus::Usb => None,
            _ => self.pci(),
        };
        (slot, pci)
    }

    /// Slot and address of a shared directory.
    pub fn share(&mut self) -> (String, Option<String>) {
        (self.slot("fs"), self.pci())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_both_families() {
        assert_eq!(versioned(None, "pc-q35-10.0"), "pc-q35-10.0");
        assert_eq!(versioned(Some("pc"), "pc-q35-10.0"), "pc-i440fx-10.0");
        assert_eq!(versioned(Some("pc-q35-7.2"), "pc-q35-10.0"), "pc-q35-7.2");
        assert_eq!((ports("pc-q35-7.2"), ports("pc-i440fx-7.2")), (PORTS, 0));
        assert!(
            is_of("pc-i440fx-7.2", "pc")
                && !is_of("pc-i440fx-7.2", "q35")
                && is_of("pc-q35-7.2", "pc-q35-7.2")
        );
    }

    #[test]
    fn disks_of_scsi_and_sata_have_different_numbers() {
        let mut free = Free::of(None, [].iter());
        let kinds =
            ["scsi", "sata", "sata", "scsi", "virtio", "sata", "sata", "scsi", "scsi", "sata", "sata"];
        let given: Vec<_> = kinds.map(|kind| free.slot(kind)).into();
        let wanted = [
            "scsi0", "sata1", "sata2", "scsi3", "virtio0", "sata4", "sata5", "scsi6", "scsi7", "sata0",
            "sata3",
        ];
        assert_eq!(given, wanted);
    }

    #[test]
    fn addresses_end() {
        let hardware = |machine: &str, ports| Hardware {
            machine: machine.into(),
            cpu_model: "max".into(),
            firmware: karst_model::instance::Firmware::Bios,
            ports,
            display: false,
            balloon: false,
            uuid: uuid::Uuid::nil(),
            cloud_init_id: uuid::Uuid::nil(),
        };
        for (machine, ports, first, many) in [
            ("pc-q35-7.2", 16, "01:00.0", 16),
            ("pc-q35-7.2", 0, "00:08.0", 16),
            ("pc-i440fx-7.2", 0, "00:08.0", 16),
        ] {
            let hardware = hardware(machine, ports);
            let mut free = Free::of(Some(&hardware), [].iter());
            let all: Vec<_> = std::iter::from_fn(|| free.pci()).collect();
            assert_eq!((all[0].as_str(), all.len()), (first, many), "{machine}");
        }
        assert_eq!(Free::of(None, [].iter()).pci(), None);
        let q35 = hardware("pc-q35-7.2", 16);
        assert!(fits(&q35, "10:00.0") && !fits(&q35, "11:00.0") && !fits(&q35, "00:08.0"));
        let pc = hardware("pc-i440fx-7.2", 0);
        assert!(
            fits(&pc, "00:08.0") && fits(&pc, "00:04.0") && !fits(&pc, "00:02.0") && !fits(&pc, "01:00.0")
        );
    }
}
