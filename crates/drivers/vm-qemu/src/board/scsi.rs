//! Controllers of SCSI beside the first, and the disks that are at them. Pure.

use crate::{
    devices::{Bus, Disk, Layout, virtio},
    threads,
};
use karst_model::{
    Error, Result,
    board::{Board, ScsiController, ScsiModel},
    options::DiskOptions,
};
use serde_json::{Value, json};

/// Controllers of SCSI that are functions of one device; more are beside the controller of serial ports.
pub const SCSI_BESIDE: usize = 8;
const MORE_SCSI: &str = "00:02";

/// What of a controller of SCSI of virtio is not as usual.
pub fn scsi_options(device: &mut Value, one: &ScsiController) {
    let numbers = [("num_queues", one.queues), ("cmd_per_lun", one.per_disk), ("max_sectors", one.sectors)];
    for (property, value) in numbers {
        if let Some(n) = value {
            device[property] = n.into();
        }
    }
    if one.no_ioeventfd {
        device["ioeventfd"] = false.into();
    }
    virtio(device, &one.virtio);
}

/// The controllers of SCSI beside the first, which is at `first`: the functions of its device, then those of the controller of serial
/// ports.
///
/// # Errors
/// Invalid for an address that is none.
pub fn more_scsi(
    all: &[ScsiController],
    layout: Layout,
    first: &str,
    thread: Option<u32>,
) -> Result<Vec<Value>> {
    let slot = first.split_once('.').map_or(first, |(slot, _)| slot);
    let mut devices = vec![];
    for (n, one) in (1..).zip(all) {
        let driver = match one.model {
            ScsiModel::Virtio => "virtio-scsi-pci",
            ScsiModel::LsiLogic => "lsi53c895a",
            ScsiModel::LsiSas1068 => "mptsas1068",
            ScsiModel::LsiSas1078 => "megasas",
            ScsiModel::Vmpvscsi => "pvscsi",
        };
        let mut device = json!({"driver": driver, "id": format!("scsi{n}")});
        if one.model == ScsiModel::Virtio {
            device["disable-legacy"] = "on".into();
            if let Some(thread) = thread {
                device["iothread"] = threads::id(thread).into();
            }
            scsi_options(&mut device, one);
        }
        let (slot, function) = if n < SCSI_BESIDE { (slot, n) } else { (MORE_SCSI, n + 1 - SCSI_BESIDE) };
        layout.put(&mut device, "hardware.scsi", &format!("{slot}.{function}"))?;
        devices.push(device);
    }
    Ok(devices)
}

/// What a disk shows of itself, in the place of what is made of its name. On SCSI it is told by its serial number twice.
pub fn show_identity(device: &mut Value, options: &DiskOptions, scsi: bool) {
    for (property, text) in
        [("serial", &options.serial), ("vendor", &options.vendor), ("product", &options.product)]
    {
        if let Some(text) = text {
            device[property] = text.as_str().into();
        }
    }
    if let Some(serial) = options.serial.as_ref().filter(|_| scsi) {
        device["device_id"] = serial.as_str().into();
    }
    if let Some(wwn) = options.wwn {
        device["wwn"] = wwn.into();
    }
}

/// Refuses a disk at a controller that is not there, or has no room for it.
///
/// # Errors
/// Invalid, naming the disk.
pub fn demand_scsi(board: &Board, disk: &Disk) -> Result<()> {
    let (Some(number), Bus::Scsi(target)) = (disk.options.controller, disk.bus()?) else { return Ok(()) };
    let field = format!("devices.{}.io.options", disk.name);
    let Some(controller) = board.scsi.get(usize::from(number)) else {
        let there = board.scsi.len().max(1);
        let text =
            format!("there is no controller {number} of SCSI; hardware.scsi has {there}, numbered from 0");
        return Err(Error::invalid(field, text));
    };
    let most = controller.model.most_targets();
    match target < most {
        true => Ok(()),
        false => {
            let (name, last) = (controller.model.as_str(), most - 1);
            let text = format!("at a controller of the model {name} there are the disks scsi0 to scsi{last}");
            Err(Error::invalid(field, text))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PC: Layout = Layout { pc: true, ports: 0 };

    fn board(pairs: &[(&str, &str)]) -> Board {
        Board::of(&pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()).unwrap()
    }

    #[test]
    fn controllers_of_scsi_are_functions_and_have_disks() {
        let all = board(&[(
            "hardware.scsi",
            "virtio-scsi,virtio-scsi+queues=8+sectors=512+packed,lsilogic,lsisas1068,lsisas1078,vmpvscsi,virtio-scsi+per-disk=50,\
             virtio-scsi+ioeventfd=off,virtio-scsi",
        )]);
        let devices = more_scsi(&all.scsi[1..], PC, "00:03.0", Some(2)).unwrap();
        insta::assert_snapshot!(devices.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"), @r#"
        {"driver":"virtio-scsi-pci","id":"scsi1","disable-legacy":"on","iothread":"iothread2","num_queues":8,"max_sectors":512,"packed":true,"bus":"pci.0","addr":"0x3.0x1"}
        {"driver":"lsi53c895a","id":"scsi2","bus":"pci.0","addr":"0x3.0x2"}
        {"driver":"mptsas1068","id":"scsi3","bus":"pci.0","addr":"0x3.0x3"}
        {"driver":"megasas","id":"scsi4","bus":"pci.0","addr":"0x3.0x4"}
        {"driver":"pvscsi","id":"scsi5","bus":"pci.0","addr":"0x3.0x5"}
        {"driver":"virtio-scsi-pci","id":"scsi6","disable-legacy":"on","iothread":"iothread2","cmd_per_lun":50,"bus":"pci.0","addr":"0x3.0x6"}
        {"driver":"virtio-scsi-pci","id":"scsi7","disable-legacy":"on","iothread":"iothread2","ioeventfd":false,"bus":"pci.0","addr":"0x3.0x7"}
        {"driver":"virtio-scsi-pci","id":"scsi8","disable-legacy":"on","iothread":"iothread2","bus":"pci.0","addr":"0x2.0x1"}
        "#);
        let options = |text: &str| DiskOptions::parse("f", text, None).unwrap();
        let at = |slot: &str, text: &str| {
            let resolved = karst_guest::samples::disk("d", slot, "/a", karst_guest::DiskFormat::Raw);
            Disk { options: options(text), ..Disk::new(&resolved, false, true) }
        };
        assert!(demand_scsi(&all, &at("scsi6", "controller=2")).is_ok());
        for (slot, text) in [("scsi7", "controller=2"), ("scsi8", "controller=3"), ("scsi0", "controller=9")]
        {
            let e = demand_scsi(&all, &at(slot, text)).unwrap_err();
            assert_eq!(e.field.as_deref(), Some("devices.d.io.options"), "{slot} {text}");
        }
        let disc = at("scsi1", "controller=1,serial=WD 1,wwn=5000c50015ea71ac,vendor=SEA,product=ST6");
        let device = Disk { cdrom: true, readonly: true, ..disc }.device(PC).unwrap();
        let of = |name: &str| device[name].clone();
        assert_eq!(
            (of("driver"), of("bus"), of("device_id")),
            ("scsi-cd".into(), "scsi1.0".into(), "WD 1".into())
        );
        assert_eq!((of("serial"), of("vendor"), of("product")), ("WD 1".into(), "SEA".into(), "ST6".into()));
        assert_eq!(device["wwn"].as_u64(), Some(0x5000_c500_15ea_71ac));
    }
}
