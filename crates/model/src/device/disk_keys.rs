//! What the keys of disks mean.

/// Name, whether root disks and whether others have it, and text; by name.
pub const DISK_KEYS: &[(&str, bool, bool, &str)] = &[
    (
        "attached",
        true,
        true,
        "`false`: a disc is ejected, a disk is described and not there; the root of a virtual machine is kept and not shown to its guest (true).",
    ),
    (
        "boot.priority",
        true,
        true,
        "Virtual machines: the higher, the earlier it is booted from; the root has 1 unless it says otherwise.",
    ),
    (
        "encryption.secret",
        true,
        true,
        "Virtual machines: it is a container of LUKS, which the value of this secret of the project (its UUID) opens; an encrypted volume \
         says its secret itself. Of a root disk only where that is a custom volume.",
    ),
    (
        "format",
        false,
        true,
        "Virtual machines, of a path of the host: `raw` (the default), or `qcow2` without a file below it. It is never found out.",
    ),
    (
        "initial.full_copy",
        true,
        false,
        "The volume is made, and made anew, as a full copy of its image or original; said when it is created, without effect later (as the pool says: `volume.full_copy`).",
    ),
    (
        "io.bus",
        true,
        true,
        "Virtual machines: `virtio-scsi` (the default), `virtio-blk`, `nvme`, `sata`, `ide` (machines of type `pc`), `floppy`, `usb` (with `hardware.usb`); of directories `auto` (the default: `virtiofs` where the host has it and memory can be shared, else `9p`), `virtiofs`, `9p`.",
    ),
    (
        "io.cache",
        true,
        true,
        "Virtual machines: `none` (the default), `writeback`, `writethrough`, `directsync`, `unsafe`.",
    ),
    (
        "io.options",
        true,
        true,
        "Virtual machines: what of it is not as usual, a list of `iommu`, `ats`, `packed`, `page-per-queue`, `event-index=off`, `ioeventfd=off`, `queues=`, `queue-size=` (all of `virtio-blk`), `write-errors=` and `read-errors=` (`stop`, `report`, `ignore`), `rotation=`, `removable` (`usb`), `geometry=16383/16/63`, `blocks=512/4096`, `controller=` (of `hardware.scsi`, beside the first), `serial=`, `wwn=` (16 digits), `vendor=`, `product=` (both of SCSI).",
    ),
    (
        "io.thread",
        true,
        true,
        "Virtual machines: the thread of `hardware.iothreads` that serves a disk on `virtio-blk`.",
    ),
    ("limits.max", true, true, "Both `limits.read` and `limits.write`."),
    (
        "limits.rates",
        true,
        true,
        "Virtual machines: all that can be said of rates, a second, with a burst and its seconds: `total-bytes=5000/10000/3`, and so of `read-`, `write-` and `-operations`, with `operation-size=`; live.",
    ),
    ("limits.read", true, true, "Bytes a second such as `10MiB`, or operations such as `100iops`; live."),
    ("limits.write", true, true, "The same of writing."),
    (
        "media",
        false,
        true,
        "Virtual machines, of a path of the host: `disk` or `cdrom` (what its name says: `cdrom` of `.iso`).",
    ),
    (
        "path",
        true,
        true,
        "Where it is mounted: `/` is the root disk. A virtual machine shares a directory there; without it, and without a `tag`, it has a drive.",
    ),
    ("pool", true, true, "Pool of the root disk, or of the custom volume that `source` names."),
    (
        "propagation",
        false,
        true,
        "Mounts of the host that appear below later: `private` (the default) or `slave`, and their `r` forms.",
    ),
    ("readonly", false, true, "Nobody writes through it (false)."),
    ("recursive", false, true, "Mounts below a directory of the host are there too (false)."),
    ("required", false, true, "`false`: the instance starts without it where it is missing (true)."),
    (
        "share.options",
        false,
        true,
        "Virtual machines, of a directory: what of how it is shared is not as usual, a list of `access=` (`passthrough`, `mapped`, `squash`), `file-mode=0644` and `directory-mode=0755` (with `access=mapped`), `devices=` (`remap`, `forbid`, `warn`) and `immediate` of `io.bus=9p`, `queue-size=`, `cache=` (`none`, `always`), `attributes=off` and `threads=` of `io.bus=virtiofs`, and `iommu`, `ats`, `packed`, `page-per-queue`.",
    ),
    ("shift", false, true, "Owners of a directory of the host are mapped into the container's ids (false)."),
    ("size", true, true, "Size of the root disk, or of a file system in memory."),
    (
        "source",
        true,
        true,
        "A custom volume of the pool, a path of the host that `path_prefixes` of host-policy.toml grants, or `tmpfs:`.",
    ),
    (
        "tag",
        false,
        true,
        "Virtual machines, of a directory: the name by which the guest mounts it itself, or Karst's agent where there is a `path` too (the device's name).",
    ),
    ("type", true, true, "`disk`."),
];

#[cfg(test)]
mod tests {
    use super::{
        super::disk::{IO_KEYS, OTHER_KEYS, ROOT_KEYS},
        *,
    };

    #[test]
    fn all_and_no_others() {
        assert!(DISK_KEYS.windows(2).all(|w| w[0].0 < w[1].0));
        let sorted = |keys: &[&'static str]| {
            let mut all = [keys, &IO_KEYS].concat();
            all.sort_unstable();
            all
        };
        let of = |root: bool| -> Vec<&str> {
            let has = |key: &&(&str, bool, bool, &str)| if root { key.1 } else { key.2 };
            DISK_KEYS.iter().filter(has).map(|key| key.0).collect()
        };
        assert_eq!((of(true), of(false)), (sorted(ROOT_KEYS), sorted(OTHER_KEYS)));
    }
}
