//! Resolved specifications for tests: whole ones without anything special, of which a test states only what it is about.
//! Feature `testing`. Nothing that they name is there.

use crate::{DiskFormat, IdRange, ResolvedDisk, ResolvedGuest, ResolvedLink, ResolvedNic};
use karst_model::{
    InstanceId,
    instance::{Firmware, InstanceKind},
    node::AcceleratorKind,
    spec::MachineSpec,
};
use std::path::PathBuf;

/// A guest that runs nothing but its root.
pub fn guest(kind: InstanceKind, root: ResolvedDisk) -> ResolvedGuest {
    ResolvedGuest {
        instance: InstanceId(uuid::Uuid::from_u128(1)),
        kind,
        generation: Default::default(),
        spec_version: 1,
        domain_id: 1,
        daemon_id: "t".into(),
        hostname: "v1".into(),
        state_dir: "/nonexistent".into(),
        ids: IdRange { base: 1, count: 1 },
        machine: None,
        accelerator: AcceleratorKind::Tcg,
        limits: Default::default(),
        security: Default::default(),
        root,
        root_layers: None,
        disks: vec![],
        kernel: None,
        ports: Default::default(),
        given: Default::default(),
        nodes: vec![],
        proxies: vec![],
        nics: vec![],
        cloud_init: Default::default(),
        files: vec![],
        environment: Default::default(),
        application: None,
        memory: None,
        tpm_key: None,
    }
}

/// A disk that can be written.
pub fn disk(name: &str, slot: &str, path: impl Into<PathBuf>, format: DiskFormat) -> ResolvedDisk {
    ResolvedDisk {
        name: name.into(),
        slot: slot.into(),
        path: path.into(),
        format,
        backing: None,
        mount_point: None,
        readonly: false,
        foreign: false,
        shift: false,
        opened: None,
        key: None,
        recursive: false,
        follow: false,
        cdrom: false,
        ejected: false,
        shared: false,
        io: Default::default(),
        pci: None,
        boot_priority: 0,
        share: Default::default(),
        chain: Default::default(),
    }
}

/// The first NIC, `eth0`, at a port of a bridge.
pub fn nic(mac: &str, host_interface: &str, bridge: &str) -> ResolvedNic {
    ResolvedNic {
        name: "eth0".into(),
        slot: "net0".into(),
        guest_name: "eth0".into(),
        mac: mac.into(),
        host_interface: host_interface.into(),
        link: ResolvedLink::Bridge(bridge.into()),
        mtu: None,
        model: Default::default(),
        options: Default::default(),
        disconnected: false,
        pci: None,
        boot_priority: 0,
        host_name: None,
        queue_length: None,
        vlans: Default::default(),
    }
}

/// Hardware without ports, screen, balloon and TPM, which any host can emulate.
pub fn machine(uuid: u128) -> MachineSpec {
    MachineSpec {
        machine: "pc-q35-7.2".into(),
        cpu_model: "max".into(),
        firmware: Firmware::Bios,
        uuid: uuid::Uuid::from_u128(uuid),
        ports: 0,
        display: false,
        spice: false,
        screen: Default::default(),
        balloon: false,
        board: Default::default(),
        tpm: false,
        tpm_secret: None,
        stateful: false,
        boot_menu: false,
        windows: false,
        local_time: false,
        ends_on_reboot: false,
        halts_on_crash: false,
        iothreads: vec![],
        scsi_iothread: None,
        kernel: None,
        strings: vec![],
        lines: vec![],
        given: vec![],
        resume: false,
        paused: false,
        fresh_firmware: false,
        accelerator: None,
    }
}
