//! What the firmware tells of a machine, what draws its screens, and the threads of QEMU's main one. Pure. The tests below are also of
//! memory and sound, which are above.

use crate::argv::word;
use karst_model::{
    Error, Result,
    board::{Board, SMBIOS_FIELDS, SMBIOS_STRINGS},
};
use serde_json::{Value, json};

/// What the firmware tells of the machine: of each structure what is said, and of the machine itself who it is.
pub fn smbios(board: &Board, uuid: uuid::Uuid) -> Vec<String> {
    // A comma in a text is written twice.
    let escaped = |text: &str| text.replace(',', ",,");
    let said = |property: &str| {
        let field = SMBIOS_FIELDS.iter().find(|f| f.kind == 1 && f.property == property);
        field.and_then(|f| board.smbios.get(f.key))
    };
    let mut all = vec![];
    for kind in [1, 0, 2, 3] {
        let mut told = String::new();
        if kind == 1 {
            for (property, usual) in [("manufacturer", "Karst"), ("product", "Virtual Machine")] {
                if said(property).is_none() {
                    told += &format!(",{property}={usual}");
                }
            }
        }
        for field in SMBIOS_FIELDS.iter().filter(|f| f.kind == kind) {
            if let Some(text) = board.smbios.get(field.key) {
                told += &format!(",{}={}", field.property, escaped(text));
            }
        }
        if kind == 1 {
            told += &format!(",uuid={uuid}");
        }
        if !told.is_empty() {
            all.push(format!("type={kind}{told}"));
        }
    }
    for text in board.smbios.get(SMBIOS_STRINGS).into_iter().flat_map(|all| all.lines()) {
        all.push(format!("type=11,value={}", escaped(text)));
    }
    all
}

/// What draws the screens: nothing of the host's, or a graphics card.
///
/// # Errors
/// Invalid for what names none, as one that its host was to choose.
pub fn display(board: &Board) -> Result<String> {
    const KEY: &str = "config.hardware.video.render";
    match board.render.as_deref() {
        None => Ok("none".to_owned()),
        Some(path) if path.starts_with("/dev/dri/") => {
            Ok(format!("egl-headless,rendernode={}", word(KEY, path, "/")?))
        }
        Some(_) => Err(Error::invalid(KEY, "this host has no graphics card for it")),
    }
}

/// The main thread, where it is not as usual.
pub fn main_thread(board: &Board) -> Option<Value> {
    let (least, most) = board.main_pool?;
    let mut object = json!({"qom-type": "main-loop", "id": "main-loop"});
    for (property, value) in [("thread-pool-min", least), ("thread-pool-max", most)] {
        if let Some(n) = value {
            object[property] = n.into();
        }
    }
    Some(object)
}

#[cfg(test)]
mod tests {
    use super::super::{
        devices, memory, more_scsi, screens, scsi_options,
        tests::{accepted, lines},
    };
    use super::*;
    use crate::devices::Layout;

    const PC: Layout = Layout { pc: true, ports: 0 };

    fn board(pairs: &[(&str, &str)]) -> Board {
        Board::of(&pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()).unwrap()
    }

    #[test]
    fn the_firmware_tells_what_is_said() {
        let uuid = uuid::Uuid::from_u128(5);
        assert_eq!(
            smbios(&Board::default(), uuid),
            ["type=1,manufacturer=Karst,product=Virtual Machine,uuid=00000000-0000-0000-0000-000000000005"]
        );
        let said = board(&[
            ("hardware.smbios.system.manufacturer", "Red, Hat"),
            ("hardware.smbios.system.serial", "a,uuid=x"),
            ("hardware.smbios.chassis.sku", "S"),
            ("hardware.smbios.strings", "one\ntwo, three"),
        ]);
        assert_eq!(
            smbios(&said, uuid),
            [
                "type=1,product=Virtual Machine,manufacturer=Red,, Hat,serial=a,,uuid=x,uuid=00000000-0000-0000-0000-000000000005",
                "type=3,sku=S",
                "type=11,value=one",
                "type=11,value=two,, three",
            ]
        );
    }

    #[test]
    fn a_graphics_card_draws_where_it_is_named() {
        assert_eq!(display(&Board::default()).unwrap(), "none");
        let of = |render: &str| {
            board(&[("hardware.video", "virtio-gl,virtio-gl"), ("hardware.video.render", render)])
        };
        let named = of("/dev/dri/renderD128");
        assert_eq!(display(&named).unwrap(), "egl-headless,rendernode=/dev/dri/renderD128");
        assert!(display(&of("auto")).is_err(), "the host says which");
        insta::assert_snapshot!(lines(screens(&named, PC).unwrap()), @r#"
        -device {"driver":"virtio-vga-gl","id":"video","bus":"pci.0","addr":"0x1b.0x0","multifunction":true}
        -device {"driver":"virtio-gpu-gl-pci","id":"video1","bus":"pci.0","addr":"0x1b.0x1"}
        "#);
    }

    #[test]
    fn memory_is_on_the_disk_of_the_host_but_for_huge_pages() {
        let all = board(&[
            ("hardware.memory", "disk,shared"),
            ("hardware.numa", "0:64MiB;1:64MiB"),
            ("hardware.numa.memory", "1=private+hugepages=2MiB"),
        ]);
        insta::assert_snapshot!(lines(memory(&all, 128 << 20).unwrap()), @r#"
        -object {"qom-type":"memory-backend-file","id":"memory0","size":67108864,"share":true,"mem-path":"/proc/self/fd/37"}
        -numa node,nodeid=0,cpus=0,memdev=memory0
        -object {"qom-type":"memory-backend-memfd","id":"memory1","size":67108864,"share":false,"hugetlb":true,"hugetlbsize":2097152}
        -numa node,nodeid=1,cpus=1,memdev=memory1
        "#);
    }

    #[test]
    fn sound_cards_have_their_codecs() {
        let board =
            board(&[("hardware.sound", "ac97,ich9"), ("hardware.sound.codecs", "1=micro+duplex+output")]);
        insta::assert_snapshot!(lines(devices(&board, PC, false).unwrap()), @r#"
        -audiodev {"driver":"none","id":"audio"}
        -device {"driver":"AC97","id":"sound0","audiodev":"audio","bus":"pci.0","addr":"0x19.0x0","multifunction":true}
        -device {"driver":"ich9-intel-hda","id":"sound1","bus":"pci.0","addr":"0x19.0x1"}
        -device {"driver":"hda-micro","id":"sound1-codec0","bus":"sound1.0","cad":0,"audiodev":"audio"}
        -device {"driver":"hda-duplex","id":"sound1-codec1","bus":"sound1.0","cad":1,"audiodev":"audio"}
        -device {"driver":"hda-output","id":"sound1-codec2","bus":"sound1.0","cad":2,"audiodev":"audio"}
        "#);
    }

    #[tokio::test]
    async fn qemu_itself_takes_what_documents_wish() {
        if karst_host::Program::QemuSystemX86.path().is_err() {
            return crate::backends::missing("QEMU is not installed");
        }
        let all = board(&[
            ("hardware.smbios.system.manufacturer", "Red, Hat"),
            ("hardware.smbios.bios.vendor", "Made"),
            ("hardware.smbios.bios.version", "6FET82WW (3.12 )"),
            ("hardware.smbios.board.location", "Upside down"),
            ("hardware.smbios.chassis.sku", "S"),
            ("hardware.smbios.strings", "one\ntwo, three=4"),
            ("hardware.main_thread.pool", "8-16"),
            ("hardware.sound", "ich9"),
            ("hardware.sound.codecs", "0=micro+duplex+output"),
            (
                "hardware.scsi",
                "virtio-scsi+queues=2,virtio-scsi+queues=8+per-disk=50+sectors=512+packed,lsilogic,lsisas1068,lsisas1078,vmpvscsi",
            ),
        ]);
        let told = smbios(&all, uuid::Uuid::from_u128(5));
        let mut arguments: Vec<(&'static str, String)> =
            told.into_iter().map(|told| ("-smbios", told)).collect();
        arguments.extend(main_thread(&all).map(|object| ("-object", object.to_string())));
        arguments.extend(devices(&all, PC, false).unwrap());
        let mut first = json!({"driver": "virtio-scsi-pci", "id": "scsi", "bus": "pci.0", "addr": "0x3.0x0", "multifunction": true});
        scsi_options(&mut first, &all.scsi[0]);
        arguments.push(("-device", first.to_string()));
        let more = more_scsi(&all.scsi[1..], PC, "00:03.0", None).unwrap();
        arguments.extend(more.into_iter().map(|device| ("-device", device.to_string())));
        let nic =
            json!({"driver": "virtio-net-pci", "rss": true, "hash": true, "bus": "pci.0", "addr": "0x8.0x0"});
        arguments.push(("-device", nic.to_string()));
        accepted("pc-i440fx-7.2", &arguments).await.unwrap();
    }
}
