//! The typed specification of a guest as it travels from the engine to a host's agent. Ids travel, which the host resolves from
//! its own registry; no argv and no nft text. What names something of the host itself ([`DiskSource::Host`], [`NodeSpec`],
//! interfaces of NICs) and `raw.lxc` are granted or refused by the host's policy.

use crate::{
    ByteSize, DeviceId, ImageId, InstanceId, NetworkId, PoolId, ProjectId, Result, SnapshotId, VolumeId,
    board::Board,
    device::{
        DiskIo, DriveFormat, DriveMedia, HostDevice, NicModel, NodeDevice, ParentLink, PortDevice, PortVlans,
        ProxyDevice, RoutedLink, Share,
    },
    encryption::Encryption,
    firewall::{AclSpec, AddressSetSpec, ForwardSpec, Policy},
    image::Application,
    instance::{Firmware, Generation, InstanceKind},
    key_values, maximum,
    network::BridgeSpec,
    network_ports::RateMore,
    options::NicOptions,
    screens::ScreenOptions,
    storage::{PoolKind, VolumeContent},
    syscalls::DeniedCall,
    threads::{self, IoThread, Pin},
};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

/// Everything the host needs to run one guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestSpec {
    /// Which instance.
    pub instance: InstanceId,
    /// Kind.
    pub kind: InstanceKind,
    /// The start this belongs to; the agent refuses an older one.
    pub generation: Generation,
    /// `spec_version` of the record it was made of.
    pub spec_version: u64,
    /// The guest's host name (a DNS label).
    pub hostname: String,
    /// libvirt's domain id for this start.
    pub domain_id: u32,
    /// Virtual hardware, virtual machines only.
    pub machine: Option<MachineSpec>,
    /// Limits.
    pub limits: Limits,
    /// Security switches of containers.
    #[serde(default)]
    pub security: Security,
    /// Root disk.
    pub root: RootSpec,
    /// Other disks, in bus order. One that is added or removed in an update is plugged live.
    #[serde(default)]
    pub disks: Vec<DiskSpec>,
    /// Device nodes of the host, containers only. One that is added or removed in an update is plugged live.
    #[serde(default)]
    pub nodes: Vec<NodeSpec>,
    /// Proxies, containers only. One that is added or removed in an update is started or ended live.
    #[serde(default)]
    pub proxies: Vec<ProxySpec>,
    /// NICs in bus order.
    pub nics: Vec<NicSpec>,
    /// First-boot configuration.
    pub cloud_init: CloudInit,
    /// Files that are made at this start.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<GuestFile>,
    /// Environment of the guest's init and of exec (`environment.*`), seen inside the guest only.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// The program that runs in place of an init (application containers).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub application: Option<Application>,
    /// This start of a virtual machine goes on from memory in this file of the host, which its policy must grant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
}

/// Virtual hardware.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// Versioned machine type.
    pub machine: String,
    /// CPU model.
    pub cpu_model: String,
    /// Firmware.
    pub firmware: Firmware,
    /// SMBIOS UUID.
    pub uuid: uuid::Uuid,
    /// PCIe root ports, at which devices come and go while the machine runs; none in machines that were made before.
    #[serde(default)]
    pub ports: u8,
    /// It has a screen; machines that were made before have none.
    #[serde(default)]
    pub display: bool,
    /// Its screen is served by SPICE too, where the host's QEMU can do that; with what SPICE's viewers use beside it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub spice: bool,
    /// How its screen is served.
    #[serde(default, skip_serializing_if = "ScreenOptions::is_usual")]
    pub screen: ScreenOptions,
    /// It has a balloon: its memory can shrink and grow back while it runs.
    #[serde(default)]
    pub balloon: bool,
    /// What else it is made of.
    #[serde(default, skip_serializing_if = "Board::is_usual")]
    pub board: Board,
    /// It has a TPM 2.0.
    #[serde(default)]
    pub tpm: bool,
    /// The secret whose value the state of that is encrypted with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm_secret: Option<uuid::Uuid>,
    /// Its memory can be saved: it has no devices that QEMU cannot save.
    #[serde(default)]
    pub stateful: bool,
    /// The firmware offers its menu of what to boot.
    #[serde(default)]
    pub boot_menu: bool,
    /// It is told what Hyper-V tells its guests, as Windows wants it.
    #[serde(default)]
    pub windows: bool,
    /// The clock of the hardware is in local time, not UTC.
    #[serde(default)]
    pub local_time: bool,
    /// A guest that reboots ends instead.
    #[serde(default, skip_serializing_if = "is_false")]
    pub ends_on_reboot: bool,
    /// A guest that tells that it crashed halts rather than ends.
    #[serde(default, skip_serializing_if = "is_false")]
    pub halts_on_crash: bool,
    /// Threads that serve disks beside the main one, by number. One that is added or removed in an update comes or goes live.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub iothreads: Vec<IoThread>,
    /// Which of them serves the disks on virtio-scsi; the main one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scsi_iothread: Option<u32>,
    /// What it is started with in place of what its disks would boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelSpec>,
    /// Strings of its SMBIOS (type 11), at most [`crate::keys_machine::MOST_STRINGS`]; some may be secrets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub strings: Vec<String>,
    /// Ports beside its console.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lines: Vec<LineSpec>,
    /// Devices of the host that it is given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub given: Vec<GivenSpec>,
    /// This start goes on where the machine was when its memory was saved.
    #[serde(default)]
    pub resume: bool,
    /// This start ends before the first instruction: the machine stands still until it is told to go on.
    #[serde(default, skip_serializing_if = "is_false")]
    pub paused: bool,
    /// This start has the variables of the firmware as they come with it: what it kept is gone.
    #[serde(default, skip_serializing_if = "is_false")]
    pub fresh_firmware: bool,
    /// Pass the accelerator explicitly only when a test or the user forces one; otherwise the host chooses.
    pub accelerator: Option<crate::node::AcceleratorKind>,
}

/// A port of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LineSpec {
    /// Name of its device.
    pub name: String,
    /// What it is.
    pub device: PortDevice,
}

/// A device of the host that a machine is given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GivenSpec {
    /// Name of the device.
    pub name: String,
    /// What it is.
    pub device: HostDevice,
    /// PCI address in the guest, of one that is seen there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci: Option<String>,
}

/// A kernel that a virtual machine is started with. The host reads the files at the start and not again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelSpec {
    /// Device name in the configuration.
    pub name: String,
    /// The kernel.
    pub kernel: DiskSource,
    /// Its initial file system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<DiskSource>,
    /// Command line: one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
}

impl KernelSpec {
    /// The volumes that it is read from.
    pub fn volumes(&self) -> impl Iterator<Item = (PoolId, VolumeId)> + '_ {
        [Some(&self.kernel), self.initrd.as_ref()].into_iter().flatten().filter_map(DiskSource::volume)
    }
}

/// Limits of a guest, parsed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Limits {
    /// CPUs.
    pub cpu: Option<CpuLimit>,
    /// NUMA nodes of the host whose CPUs these are; all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_nodes: Option<Vec<u32>>,
    /// CPUs that a virtual machine can have without a new start; as its host likes when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_maximum: Option<u32>,
    /// Memory in huge pages (containers), by their size as control groups name it: `2MB`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub hugepages: BTreeMap<String, ByteSize>,
    /// Share or limit of CPU time.
    pub cpu_allowance: Option<CpuAllowance>,
    /// Which of the host's CPUs threads of a virtual machine run on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pins: Vec<Pin>,
    /// Part of the CPUs when they are contended (virtual machines), beside the 1024 of others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_shares: Option<u32>,
    /// Most memory of a virtual machine and its QEMU together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_hard: Option<ByteSize>,
    /// What of it they keep when the host is short of memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_high: Option<ByteSize>,
    /// NUMA nodes of the host that a virtual machine's memory is on; all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_nodes: Option<Vec<u32>>,
    /// Memory in bytes; for virtual machines its size.
    pub memory: Option<ByteSize>,
    /// Memory as a share of the host's, percent, instead: what it is there its host puts into `memory` at each start and change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_share: Option<u32>,
    /// Memory that is set aside at the start of a virtual machine; what it begins with when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_maximum: Option<ByteSize>,
    /// Processes (containers).
    pub processes: Option<u32>,
    /// Priority when CPUs are contended (containers): 0 to 10, where 10 is the default.
    #[serde(default)]
    pub cpu_priority: Option<u32>,
    /// The limit of memory holds when the host is short of it only (containers).
    #[serde(default)]
    pub memory_soft: bool,
    /// Swap.
    #[serde(default)]
    pub swap: Option<SwapLimit>,
    /// How unwillingly memory is swapped out (containers): 0 to 10, where 10 is the default.
    #[serde(default)]
    pub swap_priority: Option<u32>,
    /// Priority when disks are contended: 0 to 10.
    #[serde(default)]
    pub disk_priority: Option<u32>,
    /// How early its processes are killed when the host is out of memory (containers): 0 to 1000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oom_priority: Option<u32>,
    /// Resource limits of the container's processes by their names (`nofile`); see [`KERNEL_LIMITS`].
    #[serde(default)]
    pub kernel: BTreeMap<String, KernelLimit>,
}

/// `limits.memory`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryLimit {
    /// So much.
    Size {
        /// How much.
        size: ByteSize,
    },
    /// A share of the host's.
    Share {
        /// 1 to 100.
        percent: u32,
    },
}

impl Limits {
    /// The memory on a host that has so many bytes: what was said, or the share of it in whole MiB.
    pub fn memory_on(&self, host: u64) -> Option<ByteSize> {
        let Some(percent) = self.memory_share else { return self.memory };
        let bytes = host.saturating_mul(percent.into()) / 100;
        Some(ByteSize(bytes - bytes % (1 << 20)))
    }

    /// Makes of a share of memory what it is on a host that has so many bytes.
    ///
    /// # Errors
    /// Invalid, naming the key, when it is too little there, or more than the limit of the machine with its QEMU allows.
    pub fn resolve_share(&mut self, host: u64) -> Result<()> {
        let Some(memory) = self.memory_on(host).filter(|_| self.memory_share.is_some()) else {
            return Ok(());
        };
        key_values::demand_memory("config.limits.memory", memory)?;
        if let Some(most) = self.memory_maximum {
            maximum::demand(most, memory)?;
        }
        if let Some(hard) = self.memory_hard {
            threads::demand_hard(hard, self.memory_maximum.unwrap_or(memory))?;
        }
        self.memory = Some(memory);
        Ok(())
    }
}

/// `limits.memory.swap`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum SwapLimit {
    /// As the host likes.
    Allowed,
    /// None.
    Forbidden,
    /// So many bytes.
    Bytes {
        /// How many.
        bytes: u64,
    },
}

/// `limits.kernel.*`: a soft and a hard limit; `None` is unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelLimit {
    /// What programs have.
    pub soft: Option<u64>,
    /// What they may raise it to.
    pub hard: Option<u64>,
}

/// Names of the resource limits, as `setrlimit(2)` has them in lower case.
pub const KERNEL_LIMITS: &[&str] = &[
    "as",
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

/// Which or how many CPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum CpuLimit {
    /// So many.
    Count {
        /// At least one.
        n: u32,
    },
    /// Pinned to this set of host CPUs, sorted.
    Set {
        /// CPU numbers.
        cpus: Vec<u32>,
    },
}

/// `limits.cpu.allowance`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum CpuAllowance {
    /// `50%`: a soft share when CPUs are contended.
    Share {
        /// 1 to 100.
        percent: u32,
    },
    /// `25ms/100ms`: a hard limit.
    Quota {
        /// Microseconds per period.
        quota_us: u64,
        /// Period in microseconds.
        period_us: u64,
    },
}

/// Security switches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Security {
    /// Nested containers allowed.
    #[serde(default)]
    pub nesting: bool,
    /// Its ids are the host's own, which the host's policy must grant.
    #[serde(default, skip_serializing_if = "is_false")]
    pub privileged: bool,
    /// First host id of the guest's range; chosen by the host when absent.
    #[serde(default)]
    pub idmap_base: Option<u32>,
    /// How many ids the guest has, a multiple of 65,536; that when absent.
    #[serde(default)]
    pub idmap_size: Option<u32>,
    /// What the guest's own API shows; none is served when absent.
    #[serde(default)]
    pub guest_api: Option<GuestApi>,
    /// System calls that are refused besides those that no container may make.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub denied_calls: Vec<DeniedCall>,
    /// Modules that the host's kernel must have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub modules: Vec<String>,
    /// Settings of the kernel for the guest's own namespaces.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sysctls: BTreeMap<String, String>,
    /// `raw.lxc`, which the host's policy must grant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw_lxc: Option<String>,
}

/// What a guest is shown of itself. The host passes it on and acts on none of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct GuestApi {
    /// Name of the instance.
    pub name: String,
    /// Name of the host.
    pub location: String,
    /// `user.*` and `cloud-init.*`.
    pub config: BTreeMap<String, String>,
    /// Devices by name, without the paths of the host.
    pub devices: BTreeMap<String, BTreeMap<String, String>>,
}

/// The root disk: always a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootSpec {
    /// Device.
    pub device: DeviceId,
    /// Device name in the configuration.
    pub name: String,
    /// Bus slot such as `scsi0`.
    pub slot: String,
    /// Pool of the volume.
    pub pool: PoolId,
    /// Volume.
    pub volume: VolumeId,
    /// It is a custom volume that other machines may write at the same time.
    #[serde(default)]
    pub shared: bool,
    /// Rates, bus and cache.
    #[serde(default)]
    pub io: DiskIo,
    /// PCI address in the guest, virtual machines only.
    #[serde(default)]
    pub pci: Option<String>,
    /// Boot order, higher first.
    #[serde(default)]
    pub boot_priority: u32,
    /// The guest does not see it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub detached: bool,
}

/// A disk that is not the root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// Device.
    pub device: DeviceId,
    /// Device name in the configuration.
    pub name: String,
    /// Bus slot such as `scsi0`.
    pub slot: String,
    /// What it shows.
    pub source: DiskSource,
    /// Where a file system is mounted in the guest; absolute, without `..`.
    #[serde(default)]
    pub path: Option<String>,
    /// The guest cannot write.
    #[serde(default)]
    pub readonly: bool,
    /// What is mounted below a path of the host is seen as well.
    #[serde(default)]
    pub recursive: bool,
    /// So is what the host mounts there later.
    #[serde(default)]
    pub follow: bool,
    /// Owners of a path of the host are shifted into the container's id range.
    #[serde(default)]
    pub shift: bool,
    /// Rates, bus and cache.
    #[serde(default)]
    pub io: DiskIo,
    /// A drive of discs without its disc.
    #[serde(default)]
    pub ejected: bool,
    /// It is a block volume that other machines may write at the same time.
    #[serde(default)]
    pub shared: bool,
    /// Left out, rather than an error, when a path of the host is not there at the start.
    #[serde(default)]
    pub optional: bool,
    /// PCI address in the guest, virtual machines only.
    #[serde(default)]
    pub pci: Option<String>,
    /// Boot order, higher first.
    #[serde(default)]
    pub boot_priority: u32,
    /// How what is at a path of the host is written down.
    #[serde(default)]
    pub format: DriveFormat,
    /// What a path of the host is shown as, where its name is not to say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media: Option<DriveMedia>,
    /// Of a directory that a virtual machine shares: its tag, and how it is shared.
    #[serde(default, skip_serializing_if = "Share::is_usual")]
    pub share: Share,
}

impl DiskSpec {
    /// The volume that it shows, when it is one.
    pub fn volume(&self) -> Option<(PoolId, VolumeId)> {
        self.source.volume()
    }
}

/// What a disk shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum DiskSource {
    /// A volume.
    Volume {
        /// Pool of the volume.
        pool: PoolId,
        /// Volume.
        volume: VolumeId,
    },
    /// A directory, image file or block device of the host, which opens it beneath a prefix that its policy grants, or
    /// refuses.
    Host {
        /// Absolute, without `..`.
        path: String,
    },
    /// An empty file system in memory (containers).
    Memory {
        /// At most so much; half of the host's memory when absent.
        size: Option<ByteSize>,
    },
}

impl DiskSource {
    /// The volume that it is, when it is one.
    pub fn volume(&self) -> Option<(PoolId, VolumeId)> {
        match *self {
            Self::Volume { pool, volume } => Some((pool, volume)),
            Self::Host { .. } | Self::Memory { .. } => None,
        }
    }
}

/// A device node, which the host's policy must grant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSpec {
    /// Device name in the configuration.
    pub name: String,
    /// What it is.
    pub device: NodeDevice,
}

/// A proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxySpec {
    /// Device name in the configuration.
    pub name: String,
    /// What it passes on.
    pub device: ProxyDevice,
}

/// A NIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicSpec {
    /// Device.
    pub device: DeviceId,
    /// Device name in the configuration.
    pub name: String,
    /// Bus slot such as `net0`.
    pub slot: String,
    /// Interface name in the guest (containers).
    pub guest_name: String,
    /// MAC address, lower case.
    pub mac: String,
    /// What it is attached to.
    #[serde(flatten)]
    pub link: NicLink,
    /// The host's interface; chosen by the engine, recorded before it is made, checked by the host to carry its prefix.
    pub host_interface: String,
    /// Static address from the configuration.
    #[serde(default)]
    pub ipv4: Option<Ipv4Addr>,
    /// Static address from the configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Ipv6Addr>,
    /// MTU.
    #[serde(default)]
    pub mtu: Option<u32>,
    /// What a virtual machine sees.
    #[serde(default)]
    pub model: NicModel,
    /// What of it is not as usual there.
    #[serde(default, skip_serializing_if = "usual")]
    pub options: NicOptions,
    /// The cable is unplugged (virtual machines).
    #[serde(default)]
    pub disconnected: bool,
    /// PCI address in the guest, virtual machines only.
    #[serde(default)]
    pub pci: Option<String>,
    /// Boot order, higher first.
    #[serde(default)]
    pub boot_priority: u32,
    /// Another name of the host's interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_name: Option<String>,
    /// Packets that may wait to be sent, on the host's side.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_length: Option<u32>,
    /// VLANs of a port of a bridge.
    #[serde(default, skip_serializing_if = "PortVlans::is_empty")]
    pub vlans: PortVlans,
    /// What it lets through, where no network says it ([`NetworkHost::port`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<PortSpec>,
}

fn usual(options: &NicOptions) -> bool {
    *options == NicOptions::default()
}

/// What a NIC is attached to. Interfaces of the host and addresses that the host is to route must be granted by its policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NicLink {
    /// A network of this platform that is a bridge.
    Network(NetworkId),
    /// A bridge of the host.
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

impl NicSpec {
    /// The network of this platform that it is on.
    pub fn network(&self) -> Option<NetworkId> {
        match self.link {
            NicLink::Network(id) => Some(id),
            _ => None,
        }
    }
}

/// A file of a guest that is written before it starts.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GuestFile {
    /// Absolute path inside; missing directories are made.
    pub path: String,
    /// What it holds.
    pub content: String,
    /// Not where there is such a file already.
    #[serde(default)]
    pub create_only: bool,
    /// Owner of one that is made.
    pub uid: u32,
    /// Group of one that is made.
    pub gid: u32,
    /// Permission bits of one that is made.
    pub mode: u32,
}

/// cloud-init data (NoCloud).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct CloudInit {
    /// `instance-id`; a change makes cloud-init run afresh.
    pub instance_id: String,
    /// `cloud-init.user-data`.
    #[serde(default)]
    pub user_data: Option<String>,
    /// `cloud-init.vendor-data`.
    #[serde(default)]
    pub vendor_data: Option<String>,
    /// `cloud-init.network-config`.
    #[serde(default)]
    pub network_config: Option<String>,
}

/// A pool for a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolSpec {
    /// Reference.
    pub id: PoolId,
    /// Kind.
    pub kind: PoolKind,
    /// What it is made of.
    #[serde(default)]
    pub source: PoolSource,
    /// What only some kinds have.
    #[serde(default)]
    pub options: PoolOptions,
}

impl PoolSpec {
    /// The same pool, whatever size its own file has by now?
    pub fn is_same_pool(&self, other: &PoolSpec) -> bool {
        let any = |spec: &PoolSpec| match spec.source {
            PoolSource::Own { .. } => PoolSpec { source: PoolSource::default(), ..spec.clone() },
            PoolSource::Granted { .. } => spec.clone(),
        };
        any(self) == any(other)
    }
}

/// What only some kinds of pools have; `None` is the host's choice.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolOptions {
    /// `lvm.thinpool_name`: the thin pool in the volume group.
    #[serde(default)]
    pub thin_pool: Option<String>,
    /// `volume.zfs.block_mode`: trees on zvols with a file system.
    #[serde(default)]
    pub block_mode: Option<bool>,
    /// `volume.zfs.blocksize`: blocks of zvols, in bytes.
    #[serde(default)]
    pub block_size: Option<ByteSize>,
    /// `volume.block.filesystem`: of trees on devices (`ext4`, `xfs`).
    #[serde(default)]
    pub file_system: Option<String>,
}

impl PoolOptions {
    /// The keys of a pool's configuration that say the same.
    pub fn config(&self) -> impl Iterator<Item = (&'static str, String)> {
        let size = self.block_size.map(|s| s.bytes().to_string());
        [
            ("lvm.thinpool_name", self.thin_pool.clone()),
            ("volume.zfs.block_mode", self.block_mode.map(|b| b.to_string())),
            ("volume.zfs.blocksize", size),
            ("volume.block.filesystem", self.file_system.clone()),
        ]
        .into_iter()
        .filter_map(|(key, value)| Some((key, value?)))
    }
}

impl PoolSpec {
    /// A pool that the host makes in its own directory, without a limit of its own.
    pub fn own(id: PoolId, kind: PoolKind) -> Self {
        Self { id, kind, source: PoolSource::default(), options: PoolOptions::default() }
    }
}

/// What a pool is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum PoolSource {
    /// The host's own directory: a directory for `dir`, for the others a sparse file of this size.
    Own {
        /// Size of the file; `None`: the host chooses (20% of the free space, 5 to 30 GiB).
        #[serde(default)]
        size: Option<ByteSize>,
    },
    /// Something of the host that its policy grants (`pool_sources`): a directory, a block device, a ZFS dataset, a
    /// volume group. The text is compared with what root wrote there; without an entry nothing is touched.
    Granted {
        /// As the user wrote it.
        source: String,
    },
}

impl Default for PoolSource {
    fn default() -> Self {
        Self::Own { size: None }
    }
}

/// A volume for a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// Reference.
    pub id: VolumeId,
    /// Pool.
    pub pool: PoolId,
    /// What it holds.
    pub content: VolumeContent,
    /// Size limit.
    pub size: Option<ByteSize>,
    /// What it begins as.
    pub source: VolumeSource,
}

/// What a new volume begins as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum VolumeSource {
    /// Nothing in it.
    Empty,
    /// The same, in a container of LUKS, whose passphrase is handed over before. Its size is the container's.
    Encrypted {
        /// What it is made with.
        encryption: Encryption,
    },
    /// A clone of an image's content.
    Image {
        /// Which.
        image: ImageId,
        /// A full copy instead: it shares nothing with the image, and does not need it.
        #[serde(default, skip_serializing_if = "is_false")]
        full: bool,
    },
    /// A copy of another volume of the same content, in this or another pool of the same host; it shares blocks where the
    /// pool can. Of a volume that a running guest writes the same holds as for a snapshot.
    Copy {
        /// Pool of the other.
        pool: PoolId,
        /// Which.
        volume: VolumeId,
        /// Its state then; `None`: now.
        #[serde(default)]
        snapshot: Option<SnapshotId>,
        /// A full copy: it shares nothing with the other.
        #[serde(default, skip_serializing_if = "is_false")]
        full: bool,
    },
}

/// A network for a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    /// Reference.
    pub id: NetworkId,
    /// Bridge interface.
    pub bridge: String,
    /// How it is configured.
    pub spec: BridgeSpec,
    /// Known guests: DHCP reservations, names, and what their NICs let through.
    pub hosts: Vec<NetworkHost>,
    /// ACLs that the network and its NICs name.
    #[serde(default)]
    pub acls: Vec<AclSpec>,
    /// Address sets that those ACLs name.
    #[serde(default)]
    pub sets: Vec<AddressSetSpec>,
    /// Forwards to its guests.
    #[serde(default)]
    pub forwards: Vec<ForwardSpec>,
    /// The project whose own it is: between it and networks of others nothing passes. `None`: projects share it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<ProjectId>,
}

/// A guest on a network.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, Default)]
pub struct NetworkHost {
    /// MAC address.
    pub mac: String,
    /// DNS label.
    pub hostname: String,
    /// Static address.
    pub ipv4: Option<Ipv4Addr>,
    /// Static address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Ipv6Addr>,
    /// Subnets that are reached over it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<IpNet>,
    /// What its port lets through; `None`: everything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<PortSpec>,
    /// It asks nobody for its address: the host chooses one and gives it that.
    #[serde(default, skip_serializing_if = "is_false")]
    pub given: bool,
    /// Its project, when that is not the network's: names are kept apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub view: Option<NameView>,
}

fn is_false(b: &bool) -> bool {
    !b
}

/// The names of one project on a network that is another's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NameView {
    /// Whose.
    pub project: ProjectId,
    /// Where the host serves them; its own business.
    #[serde(default)]
    pub port: u16,
}

/// What a guest's port on a bridge lets through.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct PortSpec {
    /// The host's interface.
    pub interface: String,
    /// Only the guest's own MAC address as sender.
    pub mac_filter: bool,
    /// Only the guest's own IPv4 address as sender.
    pub ipv4_filter: bool,
    /// Only the guest's own IPv6 addresses as sender.
    pub ipv6_filter: bool,
    /// No traffic with other isolated ports.
    pub isolated: bool,
    /// Towards the guest, bits a second.
    pub ingress_limit: Option<u64>,
    /// From the guest, bits a second.
    pub egress_limit: Option<u64>,
    /// What the former is beside its average.
    #[serde(skip_serializing_if = "RateMore::is_usual")]
    pub ingress: RateMore,
    /// What the latter is beside its average.
    #[serde(skip_serializing_if = "RateMore::is_usual")]
    pub egress: RateMore,
    /// The group of ports that it names; the engine's business, which says what follows of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Priority of the guest's packets on the host (`SO_PRIORITY`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<u32>,
    /// ACLs.
    pub policy: Option<Policy>,
}

impl PortSpec {
    /// Rules or filters depend on the guest's address: it must be known before the guest asks for one.
    pub fn needs_address(&self) -> bool {
        self.ipv4_filter || self.policy.is_some()
    }
}
