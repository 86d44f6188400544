//! What the driver keeps of a guest in its state directory (`guest.json`): enough to adopt it.

use karst_guest::{IdRange, ResolvedGuest, ResolvedNic, keeper::write_private};
use karst_host::mountns::{DeviceNumber, MountKey};
use karst_model::{
    InstanceId, Result,
    image::Application,
    instance::Generation,
    spec::{KernelLimit, ProxySpec},
    syscalls::DeniedCall,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

const FILE: &str = "guest.json";

/// A NIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Nic {
    pub(crate) guest_name: String,
    pub(crate) mac: String,
    pub(crate) host_interface: String,
    /// All of it; unknown of a start by an earlier version.
    #[serde(default)]
    pub(crate) spec: Option<ResolvedNic>,
    /// It was made by us and not by `lxc-start`.
    #[serde(default)]
    pub(crate) plugged: bool,
    /// Of an interface of the host, how it was there.
    #[serde(default)]
    pub(crate) home: Option<Home>,
}

impl Nic {
    pub(crate) fn of(nic: &ResolvedNic) -> Self {
        Self {
            guest_name: nic.guest_name.clone(),
            mac: nic.mac.clone(),
            host_interface: nic.host_interface.clone(),
            spec: Some(nic.clone()),
            plugged: !crate::nics::by_lxc(nic),
            home: None,
        }
    }
}

/// An interface of the host as it was before a container got it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Home {
    pub(crate) name: String,
    pub(crate) mac: String,
    pub(crate) permanent: Option<String>,
    pub(crate) mtu: u32,
    pub(crate) up: bool,
}

/// A disk beside the root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Disk {
    /// Device name.
    pub(crate) name: String,
    /// Where it is mounted inside.
    pub(crate) at: String,
    pub(crate) source: PathBuf,
    pub(crate) readonly: bool,
    /// Owners are mapped into the guest's ids.
    pub(crate) mapped: bool,
    pub(crate) recursive: bool,
    pub(crate) follow: bool,
    /// A file, not a directory.
    pub(crate) file: bool,
    /// A file system in memory of at most so many bytes; 0: as the kernel likes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) memory: Option<u64>,
    /// It is a device node.
    #[serde(default)]
    pub(crate) node: Option<Node>,
    /// What the kernel calls it, once it is mounted; before, it is only intended.
    pub(crate) key: Option<MountKey>,
}

/// A device node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Node {
    pub(crate) device: DeviceNumber,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mode: u32,
}

impl Node {
    /// As control groups name it.
    pub(crate) fn rule(&self) -> String {
        let DeviceNumber { block, major, minor } = self.device;
        format!("{} {major}:{minor} rwm", if block { 'b' } else { 'c' })
    }
}

impl Disk {
    /// The same disk in the same way, mounted or not.
    pub(crate) fn same(&self, other: &Self) -> bool {
        Self { key: None, ..self.clone() } == Self { key: None, ..other.clone() }
    }
}

/// Settings that take effect at a start only.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Fixed {
    kernel: BTreeMap<String, KernelLimit>,
    oom_priority: Option<u32>,
    sysctls: BTreeMap<String, String>,
    pub(crate) denied: Vec<DeniedCall>,
    raw: Option<String>,
    pub(crate) program: Option<Application>,
}

impl Fixed {
    fn of(guest: &ResolvedGuest) -> Self {
        Self {
            kernel: guest.limits.kernel.clone(),
            oom_priority: guest.limits.oom_priority,
            sysctls: guest.security.sysctls.clone(),
            denied: guest.security.denied_calls.clone(),
            raw: guest.security.raw_lxc.clone(),
            program: guest.application.as_ref().map(|a| a.program.clone()),
        }
    }

    /// Keys by which the other differs.
    pub(crate) fn differ(&self, other: &Self) -> Vec<String> {
        let keys = [
            ("limits.kernel", self.kernel != other.kernel),
            ("limits.memory.oom_priority", self.oom_priority != other.oom_priority),
            ("linux.sysctl", self.sysctls != other.sysctls),
            ("security.syscalls.deny", self.denied != other.denied),
            ("raw.lxc", self.raw != other.raw),
            ("oci", self.program != other.program),
        ];
        keys.into_iter().filter(|(_, differs)| *differs).map(|(k, _)| k.to_owned()).collect()
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
    pub(crate) ids: IdRange,
    pub(crate) root: PathBuf,
    pub(crate) nics: Vec<Nic>,
    /// Ports that `lxc-start` makes at each reboot though they were unplugged.
    #[serde(default)]
    pub(crate) gone: Vec<String>,
    #[serde(default)]
    pub(crate) disks: Vec<Disk>,
    #[serde(default)]
    pub(crate) proxies: Vec<ProxySpec>,
    #[serde(default)]
    pub(crate) environment: BTreeMap<String, String>,
    /// Host name that was written into the root file system.
    #[serde(default)]
    pub(crate) hostname: String,
    /// Hash of the first-boot data that was written.
    #[serde(default)]
    pub(crate) seed: u64,
    /// Nested containers allowed.
    #[serde(default)]
    pub(crate) nesting: bool,
    /// Its ids are the host's own.
    #[serde(default)]
    pub(crate) privileged: bool,
    /// The guest's own API is served.
    #[serde(default)]
    pub(crate) guest_api: bool,
    /// What takes effect at a start only.
    #[serde(default)]
    pub(crate) fixed: Fixed,
    /// It runs one program, and no init.
    #[serde(default)]
    pub(crate) application: bool,
    /// The container makes groups of its own in the hierarchy of disks' rates (v1), which rates do not reach.
    #[serde(default)]
    pub(crate) free_rates: bool,
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
            ids: guest.ids,
            root: guest.root.path.clone(),
            nics: guest.nics.iter().map(Nic::of).collect(),
            gone: vec![],
            disks: vec![],
            proxies: guest.proxies.clone(),
            environment: guest.environment.clone(),
            hostname: guest.hostname.clone(),
            seed: 0,
            nesting: guest.security.nesting,
            privileged: guest.security.privileged,
            guest_api: guest.security.guest_api.is_some(),
            fixed: Fixed::of(guest),
            application: guest.application.is_some(),
            free_rates: false,
        }
    }

    /// What the users of this life are on the host.
    pub(crate) fn inside(&self) -> IdRange {
        self.ids.inside(self.privileged)
    }

    /// Reads it; `None` when there is none.
    pub(crate) fn read(dir: &Path) -> Result<Option<Self>> {
        karst_guest::record::read(dir, FILE)
    }

    pub(crate) fn write(&self, dir: &Path) -> Result<()> {
        write_private(&dir.join(FILE), &serde_json::to_vec(self)?)
    }
}
