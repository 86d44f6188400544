//! Paths of the host that a virtual machine has: drives, in the format that their devices say, and directories that it mounts.

use karst_guest::{DiskFormat, ResolvedDisk};
use karst_model::{
    Error, Result,
    device::{DriveFormat, DriveMedia},
};
use rustix::fs::{Mode, OFlags};
use std::os::fd::AsRawFd;

/// Makes a path of the host a drive, in the format that its device says, and a disc when that or its name says so. Its format is
/// never found out; of qcow2 it is made sure that it is one, and refers to no other file.
pub(crate) fn to_drive(
    disk: &mut ResolvedDisk,
    path: &str,
    format: DriveFormat,
    media: Option<DriveMedia>,
) -> Result<()> {
    if disk.format != DiskFormat::Raw {
        let text =
            format!("{path:?} is a directory, which a virtual machine mounts somewhere; set path, or tag");
        return Err(Error::invalid(format!("devices.{}.path", disk.name), text));
    }
    disk.cdrom = karst_model::device::is_disc(path, media);
    if let (DriveFormat::Qcow2, Some(opened)) = (format, &disk.opened) {
        let name = format!("/proc/self/fd/{}", opened.0.as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::open(name, flags, Mode::empty()).map_err(std::io::Error::from)?;
        karst_image::qcow2::check(&format!("devices.{}.source", disk.name), &file.into())?;
        disk.format = DiskFormat::Qcow2;
    }
    Ok(())
}

/// Of the host's paths a virtual machine mounts directories, and those where it can mount them.
pub(crate) fn demand_directory(disk: &ResolvedDisk) -> Result<()> {
    let field = |key: &str| format!("devices.{}.{key}", disk.name);
    if disk.format != DiskFormat::Directory {
        let text = format!(
            "{:?} is not a directory; a virtual machine mounts directories of the host, and a drive has no path and no tag",
            disk.path
        );
        return Err(Error::unsupported(text).at(field("source")));
    }
    if disk.mount_point.is_none() && disk.share.tag.is_none() {
        let text = "a directory needs the path where the virtual machine mounts it, or a tag";
        return Err(Error::invalid(field("path"), text));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_guest::Opened;
    use std::sync::Arc;

    #[test]
    fn of_the_hosts_paths_a_machine_gets_directories_that_it_can_mount() {
        let disk = |format: DiskFormat, at: Option<&str>| ResolvedDisk {
            mount_point: at.map(str::to_owned),
            foreign: true,
            ..karst_guest::samples::disk("data", "fs0", "/srv/shared", format)
        };
        demand_directory(&disk(DiskFormat::Directory, Some("/mnt"))).unwrap();
        let share = karst_model::device::Share { tag: Some("data".into()), ..Default::default() };
        demand_directory(&ResolvedDisk { share, ..disk(DiskFormat::Directory, None) }).unwrap();
        let field = |disk| demand_directory(&disk).unwrap_err().field.unwrap();
        assert_eq!(field(disk(DiskFormat::Directory, None)), "devices.data.path");
        assert_eq!(field(disk(DiskFormat::Raw, Some("/mnt"))), "devices.data.source");
        assert_eq!(field(disk(DiskFormat::Raw, None)), "devices.data.source");
        // Without a place it is a drive, and a disc by its name or by its device's word.
        let drive = |path: &str, media: Option<DriveMedia>| {
            let mut drive = disk(DiskFormat::Raw, None);
            to_drive(&mut drive, path, DriveFormat::Raw, media).map(|()| drive.cdrom)
        };
        assert_eq!((drive("/srv/disk.img", None), drive("/srv/Debian.ISO", None)), (Ok(false), Ok(true)));
        assert_eq!(drive("/dev/cdrom", Some(DriveMedia::Cdrom)), Ok(true));
        assert_eq!(drive("/srv/Debian.ISO", Some(DriveMedia::Disk)), Ok(false));
        let mut directory = disk(DiskFormat::Directory, None);
        let refused = to_drive(&mut directory, "/srv/shared", DriveFormat::Raw, None).unwrap_err();
        assert_eq!(refused.field.as_deref(), Some("devices.data.path"));
    }

    #[test]
    fn a_drive_in_qcow2_is_one_and_refers_to_nothing() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("disk");
        // Version 2, of 1 MiB in clusters of 64 KiB.
        let mut header = vec![0u8; 512];
        header[..4].copy_from_slice(b"QFI\xfb");
        (header[7], header[23], header[29]) = (2, 16, 0x10);
        let take = |header: &[u8]| {
            std::fs::write(&path, header).unwrap();
            let opened = Opened(Arc::new(std::fs::File::open(&path).unwrap().into()));
            let mut drive = ResolvedDisk {
                foreign: true,
                opened: Some(opened),
                ..karst_guest::samples::disk("data", "scsi1", &path, DiskFormat::Raw)
            };
            to_drive(&mut drive, "/srv/disk", DriveFormat::Qcow2, None).map(|()| drive.format)
        };
        assert_eq!(take(&header).unwrap(), DiskFormat::Qcow2);
        let mut below = header.clone();
        below[19] = 8;
        for (bad, word) in [(&below[..], "backing"), (&[0u8; 512][..], "not in qcow2")] {
            let e = take(bad).unwrap_err();
            assert!(e.message.contains(word) && e.field.as_deref() == Some("devices.data.source"), "{e}");
        }
    }
}
