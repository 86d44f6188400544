//! Disks in place of ids: volumes of pools, paths that the host's policy grants, and memory.

use crate::{
    agent::RealAgent,
    host_paths::{demand_directory, to_drive},
};
use karst_agent::VolumeRef;
use karst_guest::{DiskFormat, Opened, ResolvedDisk};
use karst_model::{
    ByteSize, Error, ErrorKind, InstanceId, Result,
    spec::{DiskSource, DiskSpec},
    storage::VolumeContent,
};
use karst_storage::Format;
use std::{path::Path, sync::Arc};

impl RealAgent {
    /// A disk of this machine in place of ids; `user`: of a virtual machine, who its QEMU is.
    pub(crate) async fn resolve_disk(
        &self,
        instance: InstanceId,
        disk: DiskSpec,
        user: Option<u32>,
    ) -> Result<Option<ResolvedDisk>> {
        let key = self.keys.of_disk(instance, &disk.io);
        let (pool, volume) = match disk.source {
            DiskSource::Volume { pool, volume } => (pool, volume),
            DiskSource::Host { ref path } => {
                let drive = user.is_some() && disk.path.is_none() && disk.share.tag.is_none();
                let mut found = self.resolve_path(&disk, path, drive)?;
                if let Some(found) = &mut found {
                    found.key = key;
                }
                match &mut found {
                    Some(found) if drive => to_drive(found, path, disk.format, disk.media)?,
                    Some(found) if user.is_some() => demand_directory(found)?,
                    _ => {}
                }
                return Ok(found);
            }
            DiskSource::Memory { size } => return Ok(Some(in_memory(disk, size))),
        };
        let content = self.pool(pool)?.inspect(volume).await?.content;
        let at = VolumeRef { pool, volume };
        let mut located = self.locate(at, user).await?;
        if located.layers.is_some() {
            // A copy of a container's root: beside the root there are plain trees only.
            self.pool(pool)?.flatten(volume).await?;
            located = self.locate(at, user).await?;
        }
        if disk.shared {
            demand_raw(&disk.name, located.format)?;
        }
        Ok(Some(ResolvedDisk {
            name: disk.name,
            slot: disk.slot,
            path: located.path,
            backing: located.backing,
            chain: crate::layers::chain(located.chain),
            format: format(located.format),
            mount_point: disk.path,
            readonly: disk.readonly,
            foreign: false,
            shift: disk.shift,
            opened: None,
            key,
            recursive: false,
            follow: false,
            cdrom: content == VolumeContent::Iso,
            ejected: disk.ejected,
            shared: disk.shared,
            io: disk.io,
            pci: disk.pci,
            boot_priority: disk.boot_priority,
            share: disk.share,
        }))
    }

    /// A path of the host, which its policy must grant; `None` when it is not there and may be left out.
    fn resolve_path(&self, disk: &DiskSpec, path: &str, drive: bool) -> Result<Option<ResolvedDisk>> {
        let field = || format!("devices.{}.source", disk.name);
        let policy = &self.options.policy;
        let granted = if drive { &policy.disk_paths } else { &policy.path_prefixes };
        if drive && !granted.iter().any(|prefix| Path::new(path).starts_with(prefix)) {
            return Err(Error::forbidden(format!(
                "this host gives no virtual machine {path:?} as a drive; its administrator can, with disk_paths in \
                 host-policy.toml"
            ))
            .at(field()));
        }
        let opened = match karst_host::mountns::open_beneath(granted, Path::new(path)) {
            Ok(opened) => opened,
            Err(e) if disk.optional && e.is(ErrorKind::NotFound) => return Ok(None),
            Err(e) => return Err(e.at(field())),
        };
        let stat = rustix::fs::fstat(&opened).map_err(std::io::Error::from)?;
        let format = match rustix::fs::FileType::from_raw_mode(stat.st_mode) {
            rustix::fs::FileType::Directory => DiskFormat::Directory,
            rustix::fs::FileType::RegularFile | rustix::fs::FileType::BlockDevice => DiskFormat::Raw,
            _ => {
                let text = format!("{path:?} is neither a directory nor a file nor a block device");
                return Err(Error::invalid(field(), text));
            }
        };
        Ok(Some(ResolvedDisk {
            name: disk.name.clone(),
            slot: disk.slot.clone(),
            path: path.into(),
            backing: None,
            chain: Default::default(),
            format,
            mount_point: disk.path.clone(),
            readonly: disk.readonly,
            foreign: true,
            shift: disk.shift,
            opened: Some(Opened(Arc::new(opened))),
            key: None,
            recursive: disk.recursive,
            follow: disk.follow,
            cdrom: false,
            ejected: disk.ejected,
            shared: false,
            io: disk.io,
            pci: disk.pci.clone(),
            boot_priority: disk.boot_priority,
            share: disk.share.clone(),
        }))
    }
}

/// What several machines write is raw: of qcow2 each of them would keep its own idea of where things are.
pub(crate) fn demand_raw(device: &str, format: Format) -> Result<()> {
    match format {
        Format::Raw => Ok(()),
        Format::Qcow2 | Format::Directory => Err(Error::conflict(
            "the volume shares blocks with what it was made of, and so several machines cannot write it; export it and import it again, \
             or unset security.shared",
        )
        .at(format!("devices.{device}.source"))),
    }
}

/// A file system in memory: nothing of the host to resolve.
fn in_memory(disk: DiskSpec, size: Option<ByteSize>) -> ResolvedDisk {
    ResolvedDisk {
        name: disk.name,
        slot: disk.slot,
        path: "tmpfs:".into(),
        backing: None,
        chain: Default::default(),
        format: DiskFormat::Memory(size.map(|s| s.bytes())),
        mount_point: disk.path,
        readonly: disk.readonly,
        foreign: true,
        shift: false,
        opened: None,
        key: None,
        recursive: false,
        follow: false,
        cdrom: false,
        ejected: disk.ejected,
        shared: false,
        io: disk.io,
        pci: disk.pci,
        boot_priority: disk.boot_priority,
        share: Default::default(),
    }
}

pub(crate) fn format(format: Format) -> DiskFormat {
    match format {
        Format::Directory => DiskFormat::Directory,
        Format::Raw => DiskFormat::Raw,
        Format::Qcow2 => DiskFormat::Qcow2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_several_machines_write_is_raw() {
        demand_raw("data", Format::Raw).unwrap();
        for format in [Format::Qcow2, Format::Directory] {
            let e = demand_raw("data", format).unwrap_err();
            assert!(e.is(ErrorKind::Conflict) && e.message.contains("security.shared"), "{e}");
            assert_eq!(e.field.as_deref(), Some("devices.data.source"));
        }
    }
}
