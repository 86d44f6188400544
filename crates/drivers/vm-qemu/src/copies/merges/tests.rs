//! What QEMU is told, and what is left of a disk.

use super::*;
use karst_guest::DiskFormat;

fn disk() -> ResolvedDisk {
    let mut disk = karst_guest::samples::disk("root", "scsi0", "/l5", DiskFormat::Qcow2);
    let lower = |number, path: &str| LowerFile { number, path: path.into(), format: DiskFormat::Qcow2 };
    disk.backing = Some("/image".into());
    disk.chain.number = 5;
    disk.chain.below = vec![lower(2, "/l2"), lower(0, "/disk")];
    disk
}

#[test]
fn a_disk_is_what_is_left_of_it() {
    assert_eq!(chain(&disk()), [0, 2, 5]);
    let left = |merge| {
        let now = after(&disk(), merge);
        (chain(&now), now.path.to_str().unwrap().to_owned(), now.backing.is_some())
    };
    let commit = |top, base| Merge::Commit { top, base };
    assert_eq!(left(commit(5, Base::Lowest)), (vec![0], "/disk".into(), true));
    assert_eq!(left(commit(2, Base::Lowest)), (vec![0, 5], "/l5".into(), true));
    assert_eq!(left(Merge::Pull { base: Some(Base::Lowest) }), (vec![0, 5], "/l5".into(), true));
    assert_eq!(left(Merge::Pull { base: Some(Base::Layer(2)) }), (vec![0, 2, 5], "/l5".into(), true));
    assert_eq!(left(Merge::Pull { base: None }), (vec![5], "/l5".into(), false), "the image is not needed");
    let mut clone = disk();
    clone.chain = Default::default();
    assert_eq!(after(&clone, Merge::Pull { base: None }).backing, None);
}

#[test]
fn commands_name_the_nodes_of_the_files() {
    let said = |merge, side| command("scsi0", side, &Merging { merge, chain: vec![0, 2, 5] }, 7);
    let (name, commit) = said(Merge::Commit { top: 5, base: Base::Lowest }, Side::First);
    assert_eq!(
        (name, commit),
        (
            "block-commit",
            json!({
                "job-id": "copy-scsi0", "filter-node-name": "m-scsi0", "speed": 7, "on-error": "report",
                "auto-dismiss": false, "device": "d-scsi0", "top-node": "i-scsi0.l5", "base-node": "i-scsi0",
            })
        )
    );
    let (name, pull) = said(Merge::Pull { base: Some(Base::Layer(2)) }, Side::Second);
    assert_eq!((name, &pull["device"]), ("block-stream", &json!("i-scsi0.2.l5")));
    assert_eq!(pull["base-node"], "i-scsi0.2.l2");
    assert!(said(Merge::Pull { base: None }, Side::First).1.get("base-node").is_none());
}
