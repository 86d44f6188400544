//! What the firmware tells of a machine, what draws its screens, and the threads of QEMU's main one. Pure.

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
    use super::super::{screens, tests::lines};
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
}
