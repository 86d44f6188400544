//! Resolved specifications: things of this machine in place of ids.

use ipnet::{IpNet, Ipv4Net};
use karst_host::overlay::Layers;
use karst_model::{
    Error, InstanceId, Result,
    device::{DiskIo, NicModel, ParentLink, PortVlans, RoutedLink, Share},
    encryption::Passphrase,
    image::Application,
    instance::{Generation, InstanceKind},
    node::AcceleratorKind,
    options::NicOptions,
    spec::{CloudInit, GuestFile, Limits, MachineSpec, ProxySpec, Security},
};
use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    os::fd::OwnedFd,
    path::PathBuf,
    sync::Arc,
};

/// A range of host user and group ids that belongs to one guest alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct IdRange {
    /// First host id.
    pub base: u32,
    /// How many; containers map guest id 0..count onto it, a virtual machine's QEMU runs as `base`.
    pub count: u32,
}

impl IdRange {
    /// The host's own ids, as they are.
    pub const HOST: Self = Self { base: 0, count: u32::MAX };

    /// What the users of a container are on the host that this range belongs to.
    pub fn inside(self, privileged: bool) -> Self {
        if privileged { Self::HOST } else { self }
    }
}

/// A guest with everything resolved, as drivers take it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedGuest {
    /// Which instance; also the name of its cgroup, container and unit (with the daemon's short id in front).
    pub instance: InstanceId,
    /// Kind.
    pub kind: InstanceKind,
    /// Generation of this start.
    pub generation: Generation,
    /// Version of the desired record this was made of.
    pub spec_version: u64,
    /// libvirt's domain id of this start.
    pub domain_id: u32,
    /// Short id of the daemon's instance: prefix of what lies outside DIR (cgroups, container names).
    pub daemon_id: String,
    /// Host name for the guest.
    pub hostname: String,
    /// State directory of this guest, root-owned, mode 0711, exists: sockets, console log, generated configuration.
    pub state_dir: PathBuf,
    /// Id range. A privileged container has it too, for the helpers beside it.
    pub ids: IdRange,
    /// Virtual hardware.
    pub machine: Option<MachineSpec>,
    /// How virtual machines execute here.
    pub accelerator: AcceleratorKind,
    /// Limits.
    pub limits: Limits,
    /// Security switches.
    pub security: Security,
    /// Root disk: a directory (container, mounted or plain) or an image file or block device (virtual machine).
    pub root: ResolvedDisk,
    /// The root is an overlay of these (containers); its `path` is only where its pool keeps it.
    pub root_layers: Option<Layers>,
    /// Other disks in bus order.
    pub disks: Vec<ResolvedDisk>,
    /// What a virtual machine is started with in place of what its disks would boot; its command line is in `machine`.
    pub kernel: Option<ResolvedKernel>,
    /// What its ports lead to, and their logs, by the names of their devices; none for what the driver makes itself.
    pub ports: BTreeMap<String, ResolvedPort>,
    /// Devices of the host that a virtual machine is given, open to be read and written, by the names of their devices. One that is
    /// missing and may be is not here.
    pub given: BTreeMap<String, Opened>,
    /// Device nodes (containers).
    pub nodes: Vec<ResolvedNode>,
    /// Proxies (containers).
    pub proxies: Vec<ProxySpec>,
    /// NICs in bus order.
    pub nics: Vec<ResolvedNic>,
    /// First-boot data.
    pub cloud_init: CloudInit,
    /// Files that are made at this start (containers).
    pub files: Vec<GuestFile>,
    /// Environment seen inside the guest.
    pub environment: BTreeMap<String, String>,
    /// The program that runs in place of an init (application containers).
    pub application: Option<ResolvedApplication>,
    /// This start goes on from memory in a file of the host.
    pub memory: Option<ResolvedMemory>,
    /// What the state of its TPM is encrypted with, where its hardware says a secret. In no record.
    pub tpm_key: Option<Passphrase>,
}

/// Memory in a file of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedMemory {
    /// The file, opened for reading where the memory begins.
    pub file: Opened,
    /// The driver's words for the machine when it was saved ([`MemoryShape`](crate::MemoryShape)).
    pub shape: String,
}

/// An application container's program, and what an init would have found out for it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ResolvedApplication {
    /// How it is run.
    pub program: Application,
    /// IPv4 addresses by the names of NICs, each with its gateway.
    pub addresses: BTreeMap<String, (Ipv4Net, Option<Ipv4Addr>)>,
    /// Name servers.
    pub nameservers: Vec<IpAddr>,
    /// Domains in which short names are searched.
    pub search: Vec<String>,
}

impl ResolvedGuest {
    /// What the guest's users are on the host.
    pub fn inside(&self) -> IdRange {
        self.ids.inside(self.security.privileged)
    }

    /// For a driver that attaches the root only.
    ///
    /// # Errors
    /// Unsupported, naming the first other disk.
    pub fn demand_no_disks(&self) -> Result<()> {
        match self.disks.first() {
            None => Ok(()),
            Some(disk) => {
                Err(Error::unsupported(format!("a {} on this host has a root disk only", self.kind))
                    .at(format!("devices.{}", disk.name)))
            }
        }
    }
}

/// What is at the other end of a port of a virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ResolvedPort {
    /// A file to be written, a device, a socket that listens, or one that is connected.
    pub end: Option<Opened>,
    /// A file to be written.
    pub log: Option<Opened>,
}

/// A kernel and its initial file system: open to be read, and readable by the user that QEMU runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedKernel {
    /// The kernel.
    pub kernel: Opened,
    /// Its initial file system.
    pub initrd: Option<Opened>,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ResolvedDisk {
    /// Device name in the configuration.
    pub name: String,
    /// Bus slot, such as `scsi0`.
    pub slot: String,
    /// Where it is.
    pub path: PathBuf,
    /// Format of the file; stated, never probed.
    pub format: DiskFormat,
    /// The qcow2 file below a clone, which never changes; what the clone itself names is not followed.
    pub backing: Option<PathBuf>,
    /// Where a file system is mounted in the guest; absolute, without `..`. The root has none.
    pub mount_point: Option<String>,
    /// The guest cannot write.
    pub readonly: bool,
    /// The tree's owners are the host's, not a guest's: shifted into the container's range when asked, else left alone.
    pub foreign: bool,
    /// The owners of a foreign tree are shifted.
    pub shift: bool,
    /// A path of the host as it was opened beneath what the host grants; `path` is only its name then, and others may have
    /// changed what it leads to.
    #[serde(skip)]
    pub opened: Option<Opened>,
    /// What opens it, when it is a container of LUKS ([`DiskIo::secret`]) that is about to be opened. In no record.
    #[serde(skip)]
    pub key: Option<Passphrase>,
    /// What is mounted below the path is seen as well (containers).
    #[serde(default)]
    pub recursive: bool,
    /// So is what the host mounts there later (containers).
    #[serde(default)]
    pub follow: bool,
    /// A drive of discs; the guest cannot write.
    pub cdrom: bool,
    /// The drive is empty.
    pub ejected: bool,
    /// Other machines may write it at the same time; only what is raw can be so.
    #[serde(default)]
    pub shared: bool,
    /// Rates, bus and cache.
    pub io: DiskIo,
    /// PCI address in the guest.
    pub pci: Option<String>,
    /// Boot order, higher first.
    pub boot_priority: u32,
    /// Of a directory that a virtual machine shares: its tag, and how it is shared.
    #[serde(default, skip_serializing_if = "Share::is_usual")]
    pub share: Share,
    /// The files below the one at `path`, of a disk in layers.
    #[serde(default)]
    pub chain: DiskChain,
}

/// Files of a disk in layers, beside the one that is written.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DiskChain {
    /// The number of the one that is written.
    pub number: u32,
    /// Those below it, the next one first.
    pub below: Vec<LowerFile>,
}

/// A file of a disk in layers.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LowerFile {
    /// Its number.
    pub number: u32,
    /// Where.
    pub path: PathBuf,
    /// Form.
    pub format: DiskFormat,
}

/// An open path of the host. Two are equal when they are the same descriptor.
#[derive(Debug, Clone)]
pub struct Opened(pub Arc<OwnedFd>);

impl PartialEq for Opened {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Opened {}

/// Format of what lies at a disk's path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// A directory tree whose files carry unshifted owners (guest id 0 is id 0 on disk): to be id-mapped at mount.
    Directory,
    /// Raw image or block device.
    Raw,
    /// qcow2.
    Qcow2,
    /// An empty file system in memory, of at most so many bytes (containers).
    Memory(Option<u64>),
}

/// A device node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedNode {
    /// Device name in the configuration; a device may have several nodes.
    pub name: String,
    /// Where it is in the guest; absolute.
    pub path: String,
    /// Which device.
    pub device: karst_host::mountns::DeviceNumber,
    /// Owner in the guest.
    pub uid: u32,
    /// Group in the guest.
    pub gid: u32,
    /// Permission bits.
    pub mode: u32,
}

/// What a NIC is attached to.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResolvedLink {
    /// A bridge.
    Bridge(String),
    /// An address of its own on an interface of the host.
    Macvlan(ParentLink),
    /// An interface of the host itself.
    Physical(ParentLink),
    /// A cable between host and guest, and subnets that are reached over it.
    PointToPoint(Vec<IpNet>),
    /// A cable with addresses that the host answers for, and subnets that are reached over it.
    Routed {
        /// The addresses.
        #[serde(flatten)]
        link: RoutedLink,
        /// The subnets.
        routes: Vec<IpNet>,
    },
    /// What QEMU reaches as a program of the host.
    User {},
}

/// A NIC: an interface of the host that exists.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ResolvedNic {
    /// Device name in the configuration.
    pub name: String,
    /// Bus slot, such as `net0`.
    pub slot: String,
    /// Interface name in the guest (containers).
    pub guest_name: String,
    /// MAC address.
    pub mac: String,
    /// Host interface: for a container the driver makes a veth of this name and puts it into `bridge`; for a virtual
    /// machine a tap of this name.
    pub host_interface: String,
    /// What it is attached to.
    #[serde(flatten)]
    pub link: ResolvedLink,
    /// MTU.
    pub mtu: Option<u32>,
    /// What a virtual machine sees.
    pub model: NicModel,
    /// What of it is not as usual there.
    #[serde(default)]
    pub options: NicOptions,
    /// The cable is unplugged (virtual machines).
    pub disconnected: bool,
    /// PCI address in the guest.
    pub pci: Option<String>,
    /// Boot order, higher first.
    pub boot_priority: u32,
    /// Another name of the host's interface.
    #[serde(default)]
    pub host_name: Option<String>,
    /// Packets that may wait to be sent, on the host's side.
    #[serde(default)]
    pub queue_length: Option<u32>,
    /// VLANs of a port of a bridge.
    #[serde(default)]
    pub vlans: PortVlans,
}

impl ResolvedNic {
    /// The bridge whose port it is.
    pub fn bridge(&self) -> Option<&str> {
        match &self.link {
            ResolvedLink::Bridge(bridge) => Some(bridge),
            _ => None,
        }
    }
}
