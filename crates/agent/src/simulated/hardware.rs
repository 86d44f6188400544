//! The cards of a simulated host: one of each kind.

use karst_model::{node::StorageDriver, storage::PoolKind};

use crate::resources::{
    CpuModel, DiskResources, HostResources, MemoryResources, MergingResources, NetworkResources,
    PciResources, SystemResources, UsbResources,
};

/// Kinds of pools, one of which cannot be had.
pub(super) fn storage() -> Vec<StorageDriver> {
    let driver = |kind: &PoolKind| StorageDriver {
        kind: *kind,
        version: "1".into(),
        missing: (*kind == PoolKind::Zfs)
            .then(|| "zfs is not installed on this host; install the package zfsutils-linux".into()),
    };
    PoolKind::ALL.iter().map(driver).collect()
}

/// Two PCI functions, of which one is a network card, a disk and a USB device.
pub(super) fn cards() -> HostResources {
    let function = |address: &str, product: &str, class: &str| PciResources {
        address: address.into(),
        driver: "virtio-pci".into(),
        vendor_id: "1af4".into(),
        product_id: product.into(),
        class: class.into(),
        numa_node: 0,
        iommu_group: None,
    };
    HostResources {
        pci: vec![function("0000:00:02.0", "1041", "0x020000"), function("0000:00:1f.2", "1042", "0x010000")],
        network: vec![NetworkResources {
            name: "eth0".into(),
            mac: "52:54:00:00:00:01".into(),
            driver: "virtio_net".into(),
            pci_address: "0000:00:02.0".into(),
            vendor_id: "1af4".into(),
            product_id: "1041".into(),
            link: true,
            speed: 1000,
            duplex: "full".into(),
        }],
        disks: vec![DiskResources {
            name: "vda".into(),
            device: "253:0".into(),
            kind: "virtio".into(),
            serial: "S1".into(),
            size: 64 << 30,
            block_size: 512,
            ..DiskResources::default()
        }],
        usb: vec![UsbResources {
            bus: 1,
            device: 2,
            vendor: "Maker".into(),
            vendor_id: "1d6b".into(),
            product: "Stick".into(),
            product_id: "0002".into(),
            ..UsbResources::default()
        }],
        system: SystemResources {
            vendor: "Karst".into(),
            product: "simulated".into(),
            kind: "physical".into(),
            ..SystemResources::default()
        },
        ..HostResources::default()
    }
}

/// Memory, all of it free; some of its huge pages are used, and equal pages could be kept once.
pub(super) fn memory(total: u64) -> MemoryResources {
    MemoryResources {
        total,
        free: total,
        page_size: 4096,
        huge_pages: vec![(2 << 20, 512, 384), (1 << 30, 0, 0)],
        merging: Some(MergingResources {
            pages_to_scan: 100,
            sleep: 20,
            full_scans: 7,
            across_nodes: Some(true),
            ..MergingResources::default()
        }),
        ..MemoryResources::default()
    }
}

/// What the kernel of a simulated host lists of its processor.
pub(super) const CPU_FLAGS: &str = "fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr \
    sse sse2 syscall nx lm nopl pni ssse3 cx16 sse4_1 sse4_2 popcnt hypervisor lahf_lm aes";

/// CPU models of a simulated host's QEMU.
pub(super) fn cpu_models() -> Vec<CpuModel> {
    let base = "fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 syscall \
        nx lm pni cx16 hypervisor";
    let nehalem = "ssse3 sse4.1 sse4.2 popcnt lahf-lm";
    let model = |name: &str, vendor: &str, more: &str, missing: &str| CpuModel {
        name: name.into(),
        vendor: vendor.into(),
        features: format!("{base} {more}").split_whitespace().map(str::to_owned).collect(),
        missing: missing.split_whitespace().map(str::to_owned).collect(),
    };
    let (intel, amd) = ("GenuineIntel", "AuthenticAMD");
    vec![
        model("max", intel, &format!("{nehalem} aes"), ""),
        model("host", intel, &format!("{nehalem} aes"), ""),
        model("qemu64", amd, "lahf-lm svm", "svm"),
        model("kvm64", intel, "", ""),
        model("Nehalem", intel, nehalem, ""),
        model("Haswell", intel, &format!("{nehalem} aes avx avx2"), "avx avx2"),
        model("Opteron_G3", amd, "sse4a abm lahf-lm popcnt", "sse4a abm"),
    ]
}
