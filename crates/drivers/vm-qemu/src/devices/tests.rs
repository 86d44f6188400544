//! Names, sets, places and properties of disks and NICs.

use super::*;

const Q35: Layout = Layout { pc: false, ports: 16 };

pub(crate) fn disk(slot: &str) -> Disk {
    Disk {
        name: "data".into(),
        slot: slot.into(),
        side: Side::First,
        format: DiskFormat::Raw,
        block_device: false,
        cloned: false,
        readonly: false,
        cdrom: false,
        ejected: false,
        shared: false,
        cache: None,
        limits: Rates::default(),
        thread: None,
        options: DiskOptions::default(),
        pci: None,
        boot_priority: 0,
        serial: true,
        encrypted: false,
        layer: 0,
        below: vec![],
    }
}

#[test]
fn places_are_on_the_root_bus_or_behind_a_port() {
    assert_eq!(Q35.place("x", "00:04.0").unwrap(), ("pcie.0".into(), "0x4.0x0".into()));
    assert_eq!(Q35.place("x", "10:00.0").unwrap(), ("port16".into(), "0x0".into()));
    let old = Layout { ports: 0, ..Q35 };
    for (layout, pci) in [(Q35, "11:00.0"), (Q35, "01:01.0"), (old, "01:00.0"), (Q35, "00:1f.0"), (Q35, "")] {
        assert_eq!(layout.place("devices.x", pci).unwrap_err().field.unwrap(), "devices.x", "{pci}");
    }
    assert!(Layout::of("q35", 16).is_err());
    assert!(!Layout::of("pc-q35-7.2", 0).unwrap().hotplug());
    assert_eq!(Layout::of("pc-i440fx-7.2", 16).unwrap().root_bus(), "pci.0");
}

#[test]
fn every_slot_has_sets_and_an_order_of_its_own() {
    let mut sets = std::collections::BTreeSet::new();
    let mut order = std::collections::BTreeSet::new();
    for kind in ["scsi", "virtio", "nvme"] {
        for n in 0..MAX_DISKS {
            let mut d = disk(&format!("{kind}{n}"));
            d.pci = Some("01:00.0".into());
            for side in Side::BOTH {
                d.side = side;
                let (a, b) = d.fd_sets().unwrap();
                assert!(sets.insert(a) && sets.insert(b));
            }
            assert!(order.insert(d.device(Q35).unwrap()["bootindex"].as_u64().unwrap()));
        }
    }
    assert!(
        disk("scsi64").bus().is_err()
            && disk("sata6").bus().is_err()
            && disk("ide4").bus().is_err()
            && disk("floppy2").bus().is_err()
    );
    // A higher priority comes before everything of a lower one.
    let first = Disk { boot_priority: 1, ..disk("sata5") }.device(Q35).unwrap();
    assert!(first["bootindex"].as_u64() < order.first().copied());
}

#[test]
fn a_copy_has_names_of_its_own_and_qemu_says_which_is_driven() {
    let first = Disk { cloned: true, format: DiskFormat::Qcow2, ..disk("scsi1") };
    let second = Disk { side: Side::Second, ..first.clone() };
    let names = |d: &Disk| -> Vec<String> {
        let nodes = d.nodes().unwrap();
        nodes.iter().map(|n| n["node-name"].as_str().unwrap().to_owned()).collect()
    };
    assert!(names(&first).iter().all(|n| !names(&second).contains(n)));
    let mut made = names(&second);
    made.reverse();
    assert_eq!(made, Disk::node_names("scsi1", Side::Second), "the order of removal");
    assert_eq!(second.nodes().unwrap()[3]["backing"], "b-scsi1.2");
    assert_eq!((second.group()["id"].as_str(), second.top().as_str()), (Some("t-scsi1.2"), "d-scsi1.2"));
    let drives = |node: &str| Side::of(&json!([{"device": ""}, {"inserted": {"node-name": node}}]), "scsi1");
    assert_eq!(drives("d-scsi1"), Some(Side::First));
    assert_eq!(drives("m-scsi1"), Some(Side::First), "while it is copied");
    assert_eq!(drives("d-scsi1.2"), Some(Side::Second));
    assert_eq!((drives("d-scsi10"), Side::Second.other()), (None, Side::First));
}

#[test]
fn files_of_a_disk_in_layers_lie_over_each_other() {
    let layered = Disk {
        format: DiskFormat::Qcow2,
        layer: 7,
        below: vec![(3, DiskFormat::Qcow2), (0, DiskFormat::Raw)],
        ..disk("scsi1")
    };
    let nodes = layered.nodes().unwrap();
    let said = |name: &str| nodes.iter().find(|n| n["node-name"] == name).unwrap();
    let names: Vec<_> = nodes.iter().map(|n| n["node-name"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        ["f-scsi1", "i-scsi1", "f-scsi1.l3", "i-scsi1.l3", "f-scsi1.l7", "i-scsi1.l7", "d-scsi1"]
    );
    assert_eq!((&said("i-scsi1")["driver"], said("i-scsi1").get("backing")), (&json!("raw"), None));
    for (node, below, readonly) in [("i-scsi1.l3", "i-scsi1", true), ("i-scsi1.l7", "i-scsi1.l3", false)] {
        assert_eq!(
            (&said(node)["backing"], &said(node)["read-only"]),
            (&json!(below), &json!(readonly)),
            "{node}"
        );
    }
    assert_eq!(said("i-scsi1")["read-only"], true);
    // What a merge writes to is opened for it from the beginning.
    assert!(nodes.iter().filter(|n| n["driver"] == "file").all(|n| n["read-only"] == false));
    assert_eq!(said("d-scsi1")["file"], "i-scsi1.l7");
    let sets: std::collections::BTreeSet<_> = nodes.iter().filter_map(|n| n["filename"].as_str()).collect();
    assert_eq!(sets.len(), 3);
    let all: Vec<String> = names.iter().map(|n| (*n).to_owned()).chain(["i-scsi10.l9".to_owned()]).collect();
    let layers = Disk::layer_names("scsi1", Side::First, &all);
    assert_eq!(layers, ["i-scsi1.l7", "f-scsi1.l7", "i-scsi1.l3", "f-scsi1.l3"]);
    assert!(Disk::layer_names("scsi1", Side::Second, &all).is_empty());
    assert!(
        layer_set(1999, MOST_MADE) > layer_set(100, 1)
            && layer_set(100, 1) > 2100
            && layer_set(100, 0) == 100
    );
    // The lowest of a clone lies over its image.
    let clone = Disk { cloned: true, below: vec![(0, DiskFormat::Qcow2)], ..layered };
    let nodes = clone.nodes().unwrap();
    assert_eq!(nodes.iter().find(|n| n["node-name"] == "i-scsi1").unwrap()["backing"], "b-scsi1");
}

#[test]
fn limits_cache_and_drives() {
    let mut d = disk("scsi3");
    d.limits = Rates::parse("f", "read-bytes=1048576,write-operations=50").unwrap();
    let group = d.group();
    assert_eq!((&group["limits"]["bps-read"], &group["limits"]["iops-write"]), (&json!(1 << 20), &json!(50)));
    assert_eq!((&group["limits"]["iops-read"], &group["limits"]["bps-write"]), (&json!(0), &json!(0)));
    assert_eq!(group["limits"].as_object().unwrap().len(), 4);
    d.limits = Rates::parse("f", "total-bytes=5/9/3,read-operations=7,operation-size=512").unwrap();
    let limits = d.group()["limits"].clone();
    let said = ["bps-total", "bps-total-max", "bps-total-max-length", "iops-read", "iops-size"];
    assert_eq!(said.map(|name| limits[name].clone()), [5, 9, 3, 7, 512].map(|n| json!(n)));
    assert_eq!(limits.as_object().unwrap().len(), 8);
    // A change says all of it, so that nothing of before stays.
    let (all, none) = (d.throttle(), disk("scsi3").throttle());
    let names = |limits: &Value| limits.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!((names(&all).len(), names(&all)), (19, names(&none)));
    d.cache = Some(DiskCache::None);
    assert_eq!(d.nodes().unwrap()[0]["aio"], "native");
    d.cache = Some(DiskCache::Unsafe);
    assert_eq!(d.nodes().unwrap()[0]["cache"], json!({"direct": false, "no-flush": true}));
    for (mode, direct) in [(DiskCache::Writethrough, false), (DiskCache::Directsync, true)] {
        d.cache = Some(mode);
        assert_eq!(d.nodes().unwrap()[0]["cache"], json!({"direct": direct, "no-flush": false}));
        assert_eq!(d.device(Q35).unwrap()["write-cache"], "off");
        let nvme = Disk { slot: "nvme0".into(), pci: Some("01:00.0".into()), ..d.clone() };
        assert_eq!(nvme.device(Q35).unwrap_err().field.unwrap(), "devices.data.io.cache");
    }
    d.cdrom = true;
    d.readonly = true;
    assert_eq!(d.device(Q35).unwrap()["driver"], "scsi-cd");
    d.slot = "nvme0".into();
    assert_eq!(d.device(Q35).unwrap_err().field.unwrap(), "devices.data.io.bus");
    assert!(disk("virtio1").device(Q35).unwrap_err().message.contains("no free PCI slot"));
    assert!(!disk("sata1").hotplug(Q35).unwrap() && disk("scsi1").hotplug(Q35).unwrap());
}

/// A disk and a NIC with nearly all options that there are.
pub(crate) fn with_options() -> (Disk, Nic) {
    let text = "iommu,ats,packed,page-per-queue,event-index=off,ioeventfd=off,queues=2,queue-size=256,write-errors=stop,\
                read-errors=ignore,geometry=100/16/63,blocks=512/4096";
    let bus = Some(karst_model::device::DiskBus::VirtioBlk);
    let options = DiskOptions::parse("f", text, bus).unwrap();
    let disk = Disk { options, pci: Some("00:09.0".into()), ..disk("virtio1") };
    let text = "iommu,packed,event-index=off,ioeventfd=off,rom=off,tx=timer,ipv4=10.1.2.0/24,ipv6=fd01::/64,rx-queue-size=512,csum=off,guest-ufo=off";
    let nic = Nic {
        name: "eth0".into(),
        slot: "net0".into(),
        model: NicModel::Virtio,
        mac: "10:66:6a:12:34:56".into(),
        pci: Some("00:08.0".into()),
        mtu: None,
        boot_priority: 0,
        user: true,
        options: NicOptions::parse("f", text, true).unwrap(),
    };
    (disk, nic)
}

#[test]
fn options_are_said_and_nothing_else_changes() {
    let pc = Layout { pc: true, ports: 0 };
    let (on, nic) = with_options();
    let off = Disk { options: DiskOptions::default(), ..on.clone() };
    let (mut device, plain) = (on.device(pc).unwrap(), off.device(pc).unwrap());
    assert_eq!((&plain["werror"], &plain["rerror"]), (&json!("enospc"), &json!("report")));
    for (property, value) in [
        ("iommu_platform", json!(true)),
        ("ats", json!(true)),
        ("packed", json!(true)),
        ("page-per-vq", json!(true)),
        ("event_idx", json!(false)),
        ("ioeventfd", json!(false)),
        ("num-queues", json!(2)),
        ("queue-size", json!(256)),
        ("cyls", json!(100)),
        ("heads", json!(16)),
        ("secs", json!(63)),
        ("logical_block_size", json!(512)),
        ("physical_block_size", json!(4096)),
    ] {
        assert_eq!(device[property], value, "{property}");
        assert_eq!(plain.get(property), None, "{property}");
        without(&mut device, &[property]);
    }
    assert_eq!((&device["werror"], &device["rerror"]), (&json!("stop"), &json!("ignore")));
    (device["werror"], device["rerror"]) = (json!("enospc"), json!("report"));
    assert_eq!(device, plain);
    let host = nic.host("");
    assert_eq!((&host["net"], &host["ipv6-prefix"]), (&json!("10.1.2.0/24"), &json!("fd01::")));
    let said = nic.device(pc).unwrap();
    assert_eq!(
        (&said["tx"], &said["romfile"], &said["rx_queue_size"]),
        (&json!("timer"), &json!(""), &json!(512))
    );
    assert_eq!(
        (&said["csum"], &said["guest_ufo"], &said["event_idx"]),
        (&json!(false), &json!(false), &json!(false))
    );
    let disc = Disk { cdrom: true, readonly: true, slot: "sata0".into(), ..on };
    assert_eq!(disc.device(Q35).unwrap_err().field.unwrap(), "devices.data.io.options");
}

#[test]
fn only_what_is_shared_may_be_written_by_others() {
    for slot in ["scsi1", "virtio1", "nvme1", "sata1"] {
        let mut d = disk(slot);
        d.pci = Some("01:00.0".into());
        assert_eq!(d.device(Q35).unwrap().get("share-rw"), None, "{slot}");
        d.shared = true;
        assert_eq!(d.device(Q35).unwrap()["share-rw"], true, "{slot}");
        let nodes = d.nodes().unwrap();
        assert!(nodes.iter().all(|n| n.get("locking").is_none()), "{slot}: its image stays locked");
    }
}
