//! What hardware a host has, as its kernel shows it. Sizes in bytes, speeds in Mbit/s, frequencies in MHz; what the kernel
//! does not tell is empty, 0 or `None`, never guessed.

use serde::{Deserialize, Serialize};

/// A host's hardware.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)] // the fields' names say it
pub struct HostResources {
    pub sockets: Vec<CpuSocket>,
    pub memory: MemoryResources,
    pub disks: Vec<DiskResources>,
    pub network: Vec<NetworkResources>,
    pub pci: Vec<PciResources>,
    pub usb: Vec<UsbResources>,
    pub system: SystemResources,
    /// What processors did since the start: all of them first, then each that is online.
    pub times: Vec<CpuTimes>,
    /// Average load of 1, 5 and 15 minutes.
    pub load: [f64; 3],
    pub processes: u64,
}

/// A processor.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct CpuSocket {
    pub socket: u32,
    pub vendor: String,
    pub name: String,
    pub cores: Vec<CpuCore>,
    /// Level, kind (`Data`, `Instruction`, `Unified`), size.
    pub cache: Vec<(u32, String, u64)>,
    pub frequency: u64,
}

/// A core of a processor.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct CpuCore {
    pub core: u32,
    pub frequency: u64,
    pub flags: Vec<String>,
    /// CPU numbers with their NUMA node and whether they are online.
    pub threads: Vec<(u32, u32, bool)>,
}

/// A CPU model that the host's QEMU has. Features are in QEMU's words, with its aliases.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CpuModel {
    /// As `-cpu` takes it, such as `EPYC-Rome`; those of a version (`EPYC-Rome-v2`) are left out.
    pub name: String,
    /// As the processor says it (CPUID leaf 0), such as `AuthenticAMD`.
    pub vendor: String,
    /// All that a guest of this model sees (`query-cpu-model-expansion`).
    pub features: Vec<String>,
    /// Of these, what the host's accelerator cannot give.
    pub missing: Vec<String>,
}

/// What a processor spent its time with, in nanoseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct CpuTimes {
    /// Its number; none of all together.
    pub cpu: Option<u32>,
    /// Interrupts included.
    pub kernel: u64,
    pub user: u64,
    pub idle: u64,
    /// Idle, while something waited for a disk.
    pub waiting: u64,
}

/// Memory.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct MemoryResources {
    pub total: u64,
    /// Not counted what the kernel would give back.
    pub used: u64,
    /// Used for nothing at all.
    pub free: u64,
    pub buffers: u64,
    pub cached: u64,
    pub hugepages_total: u64,
    pub hugepages_used: u64,
    pub hugepages_size: u64,
    /// NUMA node, total, used.
    pub nodes: Vec<(u32, u64, u64)>,
    /// Of an ordinary page.
    pub page_size: u64,
    /// Sizes of huge pages, with how many there are and how many of them are free.
    pub huge_pages: Vec<(u64, u64, u64)>,
    /// `None` where the kernel cannot.
    pub merging: Option<MergingResources>,
}

/// How the kernel keeps pages of the same content once, and what it saves (KSM); pages, where nothing else is said.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct MergingResources {
    pub pages_to_scan: u64,
    /// Between two looks, milliseconds.
    pub sleep: u64,
    pub shared: u64,
    pub sharing: u64,
    pub unshared: u64,
    pub volatile: u64,
    /// How often it has looked at everything.
    pub full_scans: u64,
    /// Also of different NUMA nodes; `None` where there are no nodes.
    pub across_nodes: Option<bool>,
}

/// A disk.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct DiskResources {
    pub name: String,
    /// `8:0`.
    pub device: String,
    /// `nvme`, `virtio`, `scsi`, …
    pub kind: String,
    pub model: String,
    pub serial: String,
    pub read_only: bool,
    pub removable: bool,
    pub rotational: bool,
    pub size: u64,
    pub block_size: u64,
    pub partitions: Vec<PartitionResources>,
}

/// A partition.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct PartitionResources {
    pub name: String,
    pub device: String,
    pub number: u64,
    pub size: u64,
    pub read_only: bool,
}

/// A network interface of the hardware.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct NetworkResources {
    pub name: String,
    pub mac: String,
    pub driver: String,
    pub pci_address: String,
    pub vendor_id: String,
    pub product_id: String,
    pub link: bool,
    pub speed: u64,
    pub duplex: String,
}

/// A PCI device.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct PciResources {
    pub address: String,
    pub driver: String,
    pub vendor_id: String,
    pub product_id: String,
    /// PCI class, such as `0x030000`.
    pub class: String,
    pub numa_node: u32,
    pub iommu_group: Option<u32>,
}

/// A USB device.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct UsbResources {
    pub bus: u32,
    pub device: u32,
    pub vendor: String,
    pub vendor_id: String,
    pub product: String,
    pub product_id: String,
    pub serial: String,
    pub speed: f64,
}

/// The machine as its firmware describes it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct SystemResources {
    pub uuid: String,
    pub vendor: String,
    pub product: String,
    pub family: String,
    pub version: String,
    pub sku: String,
    pub serial: String,
    /// `physical` or `virtual-machine`.
    pub kind: String,
    /// Vendor, version, date.
    pub firmware: [String; 3],
    /// Vendor, product, version, serial.
    pub motherboard: [String; 4],
    /// Vendor, version, serial.
    pub chassis: [String; 3],
}
