//! What the driver keeps of a guest in its state directory (`machine.json`): enough to adopt it.

use crate::{
    argv::{DEFAULT_MEMORY, cpu_count},
    directories::{self, Directory},
    placement::Placed,
    resize::most_cpus,
};
use karst_guest::{IdRange, ResolvedDisk, ResolvedGuest, ResolvedNic};
use karst_model::{
    InstanceId, Result,
    instance::{ExitReason, Firmware, Generation},
    keys::CRASH_ACTION,
    node::AcceleratorKind,
    spec::{CpuLimit, MachineSpec},
    threads::{Pin, SCSI_IOTHREAD},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

const FILE: &str = "machine.json";

/// A NIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Nic {
    pub(crate) name: String,
    pub(crate) mac: String,
    pub(crate) host_interface: String,
    pub(crate) bridge: String,
}

/// Disks and NICs as they are plugged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Devices {
    pub(crate) machine: String,
    pub(crate) ports: u8,
    #[serde(default)]
    pub(crate) display: bool,
    /// The root first. One that is about to be plugged is here before, one that is about to go until it is gone: what
    /// QEMU really has decides.
    pub(crate) disks: Vec<ResolvedDisk>,
    pub(crate) nics: Vec<ResolvedNic>,
}

impl Devices {
    /// A disk as it is written down, and kept as long as the machine is.
    pub(crate) fn without_key(disk: &ResolvedDisk) -> ResolvedDisk {
        ResolvedDisk { key: None, ..disk.clone() }
    }

    pub(crate) fn of(guest: &ResolvedGuest) -> Option<Self> {
        let machine = guest.machine.as_ref()?;
        Some(Self {
            machine: machine.machine.clone(),
            ports: machine.ports,
            display: machine.display,
            disks: directories::drives(guest).map(Self::without_key).collect(),
            nics: guest.nics.clone(),
        })
    }
}

/// The record of the last start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Of this file's format.
    pub(crate) version: u32,
    pub(crate) instance: InstanceId,
    pub(crate) daemon_id: String,
    pub(crate) generation: Generation,
    pub(crate) spec_version: u64,
    pub(crate) domain_id: u32,
    pub(crate) hostname: String,
    pub(crate) ids: IdRange,
    pub(crate) accelerator: AcceleratorKind,
    pub(crate) memory: u64,
    pub(crate) cpus: u32,
    /// Processors that it can have without a new start; 0 of a start by an earlier version.
    #[serde(default)]
    pub(crate) max_cpus: u32,
    /// What its balloon leaves it of `memory`.
    #[serde(default)]
    pub(crate) balloon: Option<u64>,
    pub(crate) cpu: Option<CpuLimit>,
    /// Where its threads run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) pins: Vec<Pin>,
    /// Nodes of the host for its memory, as limits said them at its start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) memory_nodes: Option<Vec<u32>>,
    /// Nodes of the host that were found for it.
    #[serde(default)]
    pub(crate) placed: Placed,
    pub(crate) root: PathBuf,
    pub(crate) nics: Vec<Nic>,
    #[serde(default)]
    pub(crate) environment: BTreeMap<String, String>,
    /// Its hardware as far as it can change while it runs; unknown of a start by an earlier version.
    #[serde(default)]
    pub(crate) devices: Option<Devices>,
    /// The directories that it shares since its start.
    #[serde(default)]
    pub(crate) directories: Vec<Directory>,
    /// Slots of those that are shared by virtiofs; the others are by 9p, as all were once.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub(crate) virtiofs: BTreeSet<String>,
    /// What it was made of; unknown of a start by an earlier version.
    #[serde(default)]
    pub(crate) hardware: Option<MachineSpec>,
    /// Its screen is there by SPICE since its start: it was wanted, and QEMU could.
    #[serde(default)]
    pub(crate) spice: bool,
    /// Its memory is being loaded: it has executed nothing since its start.
    #[serde(default)]
    pub(crate) resuming: bool,
    /// That memory is in a file of the host.
    #[serde(default)]
    pub(crate) from_file: bool,
    /// It was started to stand still, or was reset while it did: it is not on its way up.
    #[serde(default)]
    pub(crate) held: bool,
    /// An error halted it, and it was asked to stand still then: it does not go on by itself until it is resumed.
    #[serde(default)]
    pub(crate) kept_halted: bool,
    /// How often it tells of its memory, seconds, where that was asked for.
    #[serde(default)]
    pub(crate) memory_period: Option<u32>,
    /// It was asked to boot anew: when it shuts down it is reset.
    #[serde(default)]
    pub(crate) anew: bool,
    /// Why it ended, where the host saw more than the keeper can know.
    #[serde(default)]
    pub(crate) exit: Option<ExitReason>,
}

/// Bytes of memory that it begins with, in whole MiB.
fn first_memory(guest: &ResolvedGuest) -> u64 {
    guest.limits.memory.map_or(DEFAULT_MEMORY, |m| m.round_up(1 << 20).bytes())
}

/// Bytes of memory that are set aside, in whole MiB.
pub(crate) fn memory(guest: &ResolvedGuest) -> u64 {
    let first = first_memory(guest);
    guest.limits.memory_maximum.map_or(first, |most| most.round_up(1 << 20).bytes().max(first))
}

/// What its balloon leaves it of that from its first instruction on, where that is less.
pub(crate) fn first_balloon(guest: &ResolvedGuest) -> Option<u64> {
    Some(first_memory(guest)).filter(|first| *first < memory(guest))
}

/// The places for processors that it was said to have; with secure boot there are none beside those that it begins with
/// ([`most_cpus`]).
fn room(guest: &ResolvedGuest) -> Option<u32> {
    let machine = guest.machine.as_ref().filter(|m| m.firmware != Firmware::UefiSecure);
    let topology = machine.and_then(|m| m.board.topology);
    let said = guest.limits.cpu_maximum.filter(|_| machine.is_some());
    let said = said.map(|most| most.max(cpu_count(guest.limits.cpu.as_ref())));
    topology.map(|t| t.processors()).or(said)
}

impl Record {
    pub(crate) fn new(guest: &ResolvedGuest) -> Self {
        Self {
            version: 1,
            instance: guest.instance,
            daemon_id: guest.daemon_id.clone(),
            generation: guest.generation,
            spec_version: guest.spec_version,
            domain_id: guest.domain_id,
            hostname: guest.hostname.clone(),
            ids: guest.ids,
            accelerator: guest.accelerator,
            memory: memory(guest),
            cpus: cpu_count(guest.limits.cpu.as_ref()),
            max_cpus: match room(guest) {
                Some(room) => room,
                None => most_cpus(
                    guest.machine.as_ref().map(|m| m.firmware),
                    cpu_count(guest.limits.cpu.as_ref()),
                ),
            },
            balloon: first_balloon(guest),
            cpu: guest.limits.cpu.clone(),
            pins: guest.limits.pins.clone(),
            memory_nodes: guest.limits.memory_nodes.clone(),
            placed: Placed::default(),
            root: guest.root.path.clone(),
            nics: guest
                .nics
                .iter()
                .map(|n| Nic {
                    name: n.name.clone(),
                    mac: n.mac.clone(),
                    host_interface: n.host_interface.clone(),
                    bridge: n.bridge().unwrap_or_default().to_owned(),
                })
                .collect(),
            environment: guest.environment.clone(),
            devices: Devices::of(guest),
            directories: directories::of(guest),
            virtiofs: BTreeSet::new(),
            hardware: guest.machine.clone(),
            spice: false,
            resuming: guest.machine.as_ref().is_some_and(|m| m.resume),
            from_file: false,
            held: false,
            kept_halted: false,
            memory_period: guest.machine.as_ref().and_then(|m| m.board.balloon_period),
            anew: false,
            exit: None,
        }
    }

    /// Keys whose new value waits for the next start.
    pub(crate) fn pending(&self, new: &Record) -> Vec<String> {
        let shared = directories::pending(&self.directories, &new.directories, &self.virtiofs);
        let mut pending = Vec::from_iter(shared);
        let elsewhere = self.memory_nodes != new.memory_nodes;
        if let (Some(now), Some(new)) = (&self.hardware, &new.hardware) {
            let changes = [
                ("devices.tpm", now.tpm != new.tpm),
                ("migration.stateful", now.stateful != new.stateful),
                ("boot.reboot_action", now.ends_on_reboot != new.ends_on_reboot),
                (CRASH_ACTION, now.halts_on_crash != new.halts_on_crash),
                ("hardware.boot_menu", now.boot_menu != new.boot_menu),
                ("hardware.spice", now.spice != new.spice),
                ("hardware.clock", now.local_time != new.local_time),
                ("hardware.hyperv", now.windows != new.windows),
                ("hardware.balloon", now.balloon != new.balloon),
                ("smbios11", now.strings != new.strings),
                (SCSI_IOTHREAD, now.scsi_iothread != new.scsi_iothread),
                // QEMU has spread it over them; nothing is moved.
                ("limits.memory.nodes", now.board.numa_policy.is_some() && elsewhere),
            ];
            pending.extend(crate::ports::pending(&now.lines, &new.lines));
            pending.extend(crate::given::pending(&now.given, &new.given));
            pending.extend(now.screen.differences(&new.screen).into_iter().map(str::to_owned));
            pending.extend(now.board.differences(&new.board).into_iter().map(str::to_owned));
            if now.kernel != new.kernel {
                let names = [&now.kernel, &new.kernel].into_iter().flatten().map(|k| &k.name);
                let names: std::collections::BTreeSet<_> = names.collect();
                pending.extend(names.into_iter().map(|name| format!("devices.{name}")));
            }
            pending.extend(changes.iter().filter(|(_, changed)| *changed).map(|(key, _)| (*key).to_owned()));
        }
        pending
    }

    /// Reads it; `None` when there is none.
    pub(crate) fn read(dir: &Path) -> Result<Option<Self>> {
        karst_guest::record::read(dir, FILE)
    }

    /// Replaces it by rename; root's alone.
    pub(crate) fn write(&self, dir: &Path) -> Result<()> {
        let temporary = dir.join("machine.json.new");
        let mut file =
            std::fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        std::fs::rename(temporary, dir.join(FILE))?;
        Ok(())
    }
}
