//! Directories that a machine shares with its host (9p by QEMU itself): file systems of volumes and paths of the host.
//!
//! Each is a mount that is nowhere: a clone of the directory's own mount in which owners are mapped, so that the user that QEMU
//! runs as stands for root; of a path of the host only where that was asked for (`shift`). It is made at the start and handed to
//! QEMU as a descriptor, and goes with the last process that has it, however that ends. So nothing is attached on the host, and
//! nothing can stay behind. QEMU plugs no such device while the machine runs: what changes waits for the next start, and the
//! record says what it was started with.
//!
//! Why it is as it is: ADR 0058.

use crate::{argv::fd, devices::Layout};
use karst_guest::{DiskFormat, ResolvedDisk, ResolvedGuest};
use karst_guest_agent::message;
use karst_host::mountns::{self as mount, MountOptions};
use karst_model::{
    Error, Result,
    device::{DiskLimits, DiskRate},
};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::PathBuf,
};

/// Directories of one machine.
pub const MAX_DIRECTORIES: usize = 16;
/// Longest tag that the guest's kernel knows.
const MAX_TAG: usize = 31;
/// Where QEMU keeps owners and modes that the guest gives: those of this name are the owners.
const OWNERS: &str = "user.virtfs.uid";

/// A directory, as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    /// Device name.
    pub name: String,
    /// Slot, such as `fs0`.
    pub slot: String,
    /// PCI address.
    pub pci: Option<String>,
    /// Where it is on the host; only a name where a descriptor was opened.
    pub source: PathBuf,
    /// Where the guest mounts it.
    pub at: String,
    /// The guest cannot write.
    pub readonly: bool,
    /// With what is mounted below.
    pub recursive: bool,
    /// A path of the host rather than a volume.
    pub foreign: bool,
    /// QEMU's user stands for root there, as in every volume. Else it is in a path of the host what it is on the host: nobody.
    #[serde(default)]
    pub shift: bool,
    /// Limits of rates.
    pub limits: DiskLimits,
}

/// Is it a directory to share, not a drive?
pub(crate) fn is_directory(disk: &ResolvedDisk) -> bool {
    disk.format == DiskFormat::Directory && disk.mount_point.is_some()
}

/// The disks that QEMU drives, the root first where the guest sees it.
pub(crate) fn drives(guest: &ResolvedGuest) -> impl Iterator<Item = &ResolvedDisk> {
    let root = std::iter::once(&guest.root).filter(|d| !d.ejected);
    root.chain(guest.disks.iter().filter(|d| !is_directory(d)))
}

/// A guest's directories.
pub(crate) fn of(guest: &ResolvedGuest) -> Vec<Directory> {
    let wanted = guest.disks.iter().filter(|d| is_directory(d) && !d.ejected);
    wanted
        .map(|d| Directory {
            name: d.name.clone(),
            slot: d.slot.clone(),
            pci: d.pci.clone(),
            source: d.path.clone(),
            at: d.mount_point.clone().unwrap_or_default(),
            readonly: d.readonly,
            recursive: d.recursive && d.foreign,
            foreign: d.foreign,
            shift: d.shift,
            limits: d.io.limits,
        })
        .collect()
}

/// The devices that wait for the next start: those of either list that are not the same in both.
pub(crate) fn pending(now: &[Directory], wanted: &[Directory]) -> BTreeSet<String> {
    let stays = |d: &Directory| now.contains(d) && wanted.contains(d);
    let changed = now.iter().chain(wanted).filter(|d| !stays(d));
    changed.map(|d| format!("devices.{}", d.name)).collect()
}

/// What the agent inside mounts, one that lies in another after that.
pub(crate) fn mounts(directories: &[Directory]) -> Vec<message::Mount> {
    let one = |d: &Directory| message::Mount { tag: d.tag(), path: d.at.clone(), readonly: d.readonly };
    let mut all: Vec<_> = directories.iter().map(one).collect();
    all.sort_by(|a, b| a.path.cmp(&b.path));
    all
}

/// The mounts for a start, and which of them keep owners beside their files; in the order of `directories`. Blocks.
pub(crate) fn open(guest: &ResolvedGuest, directories: &[Directory]) -> Result<Vec<(OwnedFd, bool)>> {
    if directories.is_empty() {
        return Ok(vec![]);
    }
    // Making it copies this process, so once for all.
    let ids = mount::user_namespace(guest.ids.base, guest.ids.count)?;
    let one = |directory: &Directory| -> Result<(OwnedFd, bool)> {
        let field = || format!("devices.{}.source", directory.name);
        let resolved = guest.disks.iter().find(|d| d.name == directory.name);
        let source = match resolved.and_then(|d| d.opened.as_ref()) {
            Some(opened) => opened.0.try_clone()?,
            None => mount::open_path(&directory.source).map_err(|e| e.at(field()))?,
        };
        let options =
            MountOptions { readonly: directory.readonly, recursive: directory.recursive, follow: false };
        let shifted = !directory.foreign || directory.shift;
        if !shifted {
            demand_readable(&source, guest.ids.base).map_err(|e| e.at(field()))?;
        }
        let ids = shifted.then(|| ids.as_fd());
        let opened = mount::detached(source.as_fd(), options, ids).map_err(|e| e.at(field()))?;
        // Of the volume, whoever reads: what a machine wrote there is what it says beside it.
        let mapped = !directory.foreign && keeps_owners(&opened);
        Ok((opened, mapped))
    };
    directories.iter().map(one).collect()
}

/// QEMU reads a directory as the user `uid`, who is in no group of the host.
fn demand_readable(directory: &OwnedFd, uid: u32) -> Result<()> {
    let found = rustix::fs::fstat(directory).map_err(std::io::Error::from)?;
    let needed = if found.st_uid == uid { 0o500 } else { 0o005 };
    if found.st_mode & needed == needed {
        return Ok(());
    }
    let text = format!(
        "the machine's user ({uid}) may not read the directory; let others read it (chmod o+rx), or set shift=true, \
         which makes the machine's root as good as the host's root there"
    );
    Err(Error::invalid("source", text))
}

/// Can a file there have attributes of users? A file system in memory has none on older kernels.
fn keeps_owners(directory: &OwnedFd) -> bool {
    let path = format!("/proc/self/fd/{}", directory.as_raw_fd());
    let mut value = [0u8; 64];
    !matches!(rustix::fs::getxattr(path.as_str(), OWNERS, &mut value[..]), Err(Errno::OPNOTSUPP))
}

impl Directory {
    fn field(&self) -> String {
        format!("devices.{}", self.name)
    }

    /// The name by which the guest mounts it: the device's, where that can be one and is not that of the share with the agent.
    pub fn tag(&self) -> String {
        let own = self.name == "config" || self.name.starts_with("karst-");
        let plain = self.name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        let fits = (1..=MAX_TAG).contains(&self.name.len()) && plain && !own;
        if fits { self.name.clone() } else { format!("karst-{}", self.slot) }
    }

    /// QEMU's id of its device and of its host side.
    ///
    /// # Errors
    /// Invalid for the slot of something else.
    fn id(&self) -> Result<String> {
        let number = self.slot.strip_prefix("fs").and_then(|n| n.parse::<u8>().ok());
        let number = number.ok_or_else(|| {
            let text = format!("{:?} is not a slot of a shared directory", self.slot);
            Error::invalid(self.field(), text)
        })?;
        Ok(format!("directory-fs{number}"))
    }

    /// Its host side: the `n`th descriptor of a directory. With `mapped` what the guest says of owners and modes is kept beside
    /// the files, which are QEMU's own then; else a file is what it is.
    ///
    /// # Errors
    /// Invalid for the slot of something else.
    pub fn host(&self, n: usize, mapped: bool) -> Result<String> {
        let model = if mapped { "mapped-xattr" } else { "none" };
        let mut text = format!(
            "local,id={},path=/proc/self/fd/{},security_model={model},multidevs=remap",
            self.id()?,
            fd::DIRECTORY + n as i32
        );
        if self.readonly {
            text.push_str(",readonly=on");
        }
        for (what, rate) in [("read", self.limits.read), ("write", self.limits.write)] {
            match rate {
                Some(DiskRate::Bytes { per_second }) => {
                    text.push_str(&format!(",throttling.bps-{what}={per_second}"));
                }
                Some(DiskRate::Operations { per_second }) => {
                    text.push_str(&format!(",throttling.iops-{what}={per_second}"));
                }
                None => {}
            }
        }
        Ok(text)
    }

    /// The device.
    ///
    /// # Errors
    /// Invalid, naming the device, for what does not fit; conflict where no PCI address was left for it.
    pub fn device(&self, layout: Layout) -> Result<Value> {
        let id = self.id()?;
        let mut device = json!({
            "driver": "virtio-9p-pci", "id": id, "fsdev": id, "mount_tag": self.tag(), "disable-legacy": "on",
        });
        let pci = self.pci.as_deref().ok_or_else(|| {
            Error::conflict(
                "the virtual machine has no free PCI slot for a shared directory; remove another device",
            )
            .at(self.field())
        })?;
        layout.put(&mut device, &self.field(), pci)?;
        Ok(device)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn directory(name: &str, slot: &str) -> Directory {
        Directory {
            name: name.into(),
            slot: slot.into(),
            pci: Some("03:00.0".into()),
            source: "/srv/data".into(),
            at: "/mnt/data".into(),
            readonly: false,
            recursive: false,
            foreign: false,
            shift: false,
            limits: DiskLimits::default(),
        }
    }

    const Q35: Layout = Layout { pc: false, ports: 16 };

    #[test]
    fn tags_are_names_where_they_can_be_and_never_twice() {
        let tag = |name: &str, slot: &str| directory(name, slot).tag();
        assert_eq!(tag("data", "fs0"), "data");
        assert_eq!(tag(&"x".repeat(31), "fs0"), "x".repeat(31));
        assert_eq!(tag(&"x".repeat(32), "fs1"), "karst-fs1");
        assert_eq!(tag("a,b", "fs1"), "karst-fs1");
        // Neither the agent's share nor the tag of another.
        assert_eq!((tag("config", "fs2"), tag("karst-fs1", "fs3")), ("karst-fs2".into(), "karst-fs3".into()));
        let told = mounts(&[Directory { readonly: true, ..directory("config", "fs0") }]);
        let wanted = message::Mount { tag: "karst-fs0".into(), path: "/mnt/data".into(), readonly: true };
        assert_eq!(told, [wanted]);
        let below = Directory { at: "/mnt/data/below".into(), ..directory("a", "fs0") };
        let paths = mounts(&[below, directory("b", "fs1")]).into_iter().map(|m| m.path);
        assert_eq!(paths.collect::<Vec<_>>(), ["/mnt/data", "/mnt/data/below"]);
    }

    #[test]
    fn host_sides_and_devices() {
        let mut d = directory("data", "fs1");
        assert_eq!(
            d.host(1, true).unwrap(),
            "local,id=directory-fs1,path=/proc/self/fd/201,security_model=mapped-xattr,multidevs=remap"
        );
        d.readonly = true;
        d.limits.read = Some(DiskRate::Bytes { per_second: 1 << 20 });
        d.limits.write = Some(DiskRate::Operations { per_second: 50 });
        assert_eq!(
            d.host(0, false).unwrap(),
            "local,id=directory-fs1,path=/proc/self/fd/200,security_model=none,multidevs=remap,readonly=on,\
             throttling.bps-read=1048576,throttling.iops-write=50"
        );
        let device = d.device(Q35).unwrap();
        assert_eq!((&device["bus"], &device["mount_tag"]), (&json!("port3"), &json!("data")));
        for (slot, pci) in [("scsi0", Some("03:00.0")), ("fs0,x=y", Some("03:00.0")), ("fs0", None)] {
            let d = Directory { pci: pci.map(str::to_owned), ..directory("data", slot) };
            assert_eq!(d.device(Q35).unwrap_err().field.as_deref(), Some("devices.data"), "{slot}");
        }
        assert!(directory("data", "fs1,path=/etc").host(0, false).is_err());
    }

    #[test]
    fn whatever_of_a_directory_changes_waits() {
        let (a, b) = (directory("a", "fs0"), directory("b", "fs1"));
        let now = [a.clone(), b.clone()];
        assert!(pending(&now, &now).is_empty());
        let names = |wanted: &[Directory]| pending(&now, wanted).into_iter().collect::<Vec<_>>();
        assert_eq!(names(std::slice::from_ref(&a)), ["devices.b"]);
        let moved = Directory { at: "/srv".into(), ..b.clone() };
        let new = Directory { source: "/srv/new".into(), ..directory("c", "fs2") };
        assert_eq!(names(&[a, moved, new]), ["devices.b", "devices.c"]);
    }
}
