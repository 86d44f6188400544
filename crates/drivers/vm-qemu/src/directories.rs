//! Directories that a machine shares with its host, by virtiofs ([`crate::virtiofs`]) or by 9p, which QEMU has itself: file systems
//! of volumes and paths of the host.
//!
//! Each is a mount that is nowhere: a clone of the directory's own mount in which owners are mapped, so that the user that QEMU
//! runs as stands for root; of a path of the host only where that was asked for (`shift`). It is made at the start and handed to
//! QEMU or virtiofsd as a descriptor, and goes with the last process that has it, however that ends. So nothing is attached on the
//! host, and nothing can stay behind. No such device is plugged while the machine runs: what changes waits for the next start, and
//! the record says what it was started with.
//!
//! Why it is as it is: ADR 0058 and ADR 0065.

use crate::{
    argv::fd,
    devices::{self, Layout},
    inside::SharedDirectory,
    owners,
};
use karst_guest::{DiskFormat, ResolvedDisk, ResolvedGuest};
use karst_guest_agent::message;
use karst_host::mountns::{self as mount, MountOptions};
use karst_model::{
    Error, Result,
    device::{DiskBus, DiskLimits, DiskRate, Share, ShareAccess, share_tag},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

/// Directories of one machine.
pub const MAX_DIRECTORIES: usize = 16;
/// Requests that a guest can have under way at virtiofsd.
const QUEUE: u32 = 1024;

/// How a directory is shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By 9p, which QEMU has itself. With `mapped` what the guest says of owners and modes is kept beside the files, which are
    /// QEMU's own then; else a file is what it is.
    Plan9 {
        /// Beside the files.
        mapped: bool,
    },
    /// By virtiofs: QEMU has a connection to the process that serves it.
    Virtiofs,
}

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
    /// Where Karst's agent mounts it; empty where that is left to the guest.
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
    /// How it is to be shared; as is best here when nothing is said.
    #[serde(default)]
    pub bus: Option<DiskBus>,
    /// Its tag, and what of how it is shared is not as usual.
    #[serde(default, skip_serializing_if = "Share::is_usual")]
    pub share: Share,
    /// Boot order, higher first; 0 where nothing is booted from it.
    #[serde(default)]
    pub boot_priority: u32,
}

/// Is it a directory to share, not a drive?
pub(crate) fn is_directory(disk: &ResolvedDisk) -> bool {
    disk.format == DiskFormat::Directory && (disk.mount_point.is_some() || disk.share.tag.is_some())
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
            bus: d.io.bus,
            share: d.share.clone(),
            boot_priority: d.boot_priority,
        })
        .collect()
}

/// The devices that wait for the next start: those of either list that are not the same in both, and those that are shared in
/// another way than is said now. `virtiofs`: the slots of those of `now` that are shared by it.
pub(crate) fn pending(
    now: &[Directory],
    wanted: &[Directory],
    virtiofs: &BTreeSet<String>,
) -> BTreeSet<String> {
    let as_said =
        |d: &Directory| d.bus.is_none_or(|bus| (bus == DiskBus::Virtiofs) == virtiofs.contains(&d.slot));
    // Where nothing is said of it, every way is right.
    let same = |a: &Directory, b: &Directory| *a == Directory { bus: a.bus, ..b.clone() };
    let stays = |a: &Directory, b: &Directory| same(a, b) && as_said(b);
    let old = now.iter().filter(|d| !wanted.iter().any(|w| stays(d, w)));
    let new = wanted.iter().filter(|w| !now.iter().any(|d| stays(d, w)));
    old.chain(new).map(|d| format!("devices.{}", d.name)).collect()
}

/// What the agent inside mounts, one that lies in another after that. Those without a place are the guest's own to mount.
pub(crate) fn mounts(directories: &[Directory], virtiofs: &BTreeSet<String>) -> Vec<SharedDirectory> {
    let one = |d: &Directory| SharedDirectory {
        mount: message::Mount { tag: d.tag(), path: d.at.clone(), readonly: d.readonly },
        virtiofs: virtiofs.contains(&d.slot),
    };
    let mut all: Vec<_> = directories.iter().filter(|d| !d.at.is_empty()).map(one).collect();
    all.sort_by(|a, b| a.mount.path.cmp(&b.mount.path));
    all
}

/// What a directory is on the host.
pub(crate) fn source(guest: &ResolvedGuest, directory: &Directory) -> Result<OwnedFd> {
    let resolved = guest.disks.iter().find(|d| d.name == directory.name);
    match resolved.and_then(|d| d.opened.as_ref()) {
        Some(opened) => Ok(opened.0.try_clone()?),
        None => mount::open_path(&directory.source),
    }
}

/// A directory as the machine is to see it, mounted nowhere; `ids` is the user namespace of its range.
pub(crate) fn tree(guest: &ResolvedGuest, directory: &Directory, ids: BorrowedFd<'_>) -> Result<OwnedFd> {
    let opened = || -> Result<OwnedFd> {
        let source = source(guest, directory)?;
        let shifted = !directory.foreign || directory.shift;
        if !shifted {
            demand_readable(&source, guest.ids.base)?;
        }
        let options =
            MountOptions { readonly: directory.readonly, recursive: directory.recursive, follow: false };
        mount::detached(source.as_fd(), options, shifted.then_some(ids))
    };
    opened().map_err(|e| e.at(format!("devices.{}.source", directory.name)))
}

/// How each is shared at a start, in the order of `directories`, and what QEMU has of those that it shares itself. Blocks.
pub(crate) fn open(
    guest: &ResolvedGuest,
    directories: &[Directory],
    virtiofs: &BTreeSet<String>,
) -> Result<Vec<(Option<OwnedFd>, Way)>> {
    let served = |d: &Directory| virtiofs.contains(&d.slot);
    if directories.iter().all(served) {
        return Ok(directories.iter().map(|_| (None, Way::Virtiofs)).collect());
    }
    // Making it copies this process, so once for all.
    let ids = mount::user_namespace(guest.ids.base, guest.ids.count)?;
    let one = |directory: &Directory| -> Result<(Option<OwnedFd>, Way)> {
        if served(directory) {
            return Ok((None, Way::Virtiofs));
        }
        let opened = tree(guest, directory, ids.as_fd())?;
        // Of the volume, whoever reads: what a machine wrote there is what it says beside it.
        let mapped = match directory.share.options.access {
            Some(access) => access == ShareAccess::Mapped,
            None => !directory.foreign && owners::can_be_beside(&opened),
        };
        if mapped && !directory.foreign && !directory.readonly {
            owners::mark(&opened, true);
        }
        Ok((Some(opened), Way::Plan9 { mapped }))
    };
    directories.iter().map(one).collect()
}

/// A directory is read as the user `uid`, who is in no group of the host.
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

impl Directory {
    fn field(&self) -> String {
        format!("devices.{}", self.name)
    }

    /// The name by which the guest mounts it.
    pub fn tag(&self) -> String {
        self.share.tag.clone().unwrap_or_else(|| share_tag(&self.name, &self.slot))
    }

    /// QEMU's id of its device and of its host side.
    ///
    /// # Errors
    /// Invalid for the slot of something else.
    pub(crate) fn id(&self) -> Result<String> {
        let number = self.slot.strip_prefix("fs").and_then(|n| n.parse::<u8>().ok());
        let number = number.ok_or_else(|| {
            let text = format!("{:?} is not a slot of a shared directory", self.slot);
            Error::invalid(self.field(), text)
        })?;
        Ok(format!("directory-fs{number}"))
    }

    /// Its host side, by the `n`th descriptor of a directory: the option and its value.
    ///
    /// # Errors
    /// Invalid for the slot of something else.
    pub fn host(&self, n: usize, way: Way) -> Result<(&'static str, String)> {
        let (id, number) = (self.id()?, fd::DIRECTORY + n as i32);
        let mapped = match way {
            Way::Virtiofs => return Ok(("-chardev", format!("socket,id={id},fd={number}"))),
            Way::Plan9 { mapped } => mapped,
        };
        let options = &self.share.options;
        let model = match options.access {
            Some(ShareAccess::Passthrough) => "passthrough",
            _ if mapped => "mapped-xattr",
            _ => "none",
        };
        let several = options.devices.map_or("remap", |d| d.as_str());
        let mut text =
            format!("local,id={id},path=/proc/self/fd/{number},security_model={model},multidevs={several}");
        for (name, mode) in [("fmode", options.file_mode), ("dmode", options.directory_mode)] {
            if let Some(mode) = mode {
                text.push_str(&format!(",{name}={mode:04o}"));
            }
        }
        if options.immediate {
            text.push_str(",writeout=immediate");
        }
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
        Ok(("-fsdev", text))
    }

    /// The device.
    ///
    /// # Errors
    /// Invalid, naming the device, for what does not fit; conflict where no PCI address was left for it.
    pub fn device(&self, layout: Layout, way: Way) -> Result<Value> {
        let id = self.id()?;
        let mut device = match way {
            Way::Plan9 { .. } => json!({
                "driver": "virtio-9p-pci", "id": id, "fsdev": id, "mount_tag": self.tag(), "disable-legacy": "on",
            }),
            // It has no legacy to disable.
            Way::Virtiofs => json!({
                "driver": "vhost-user-fs-pci", "id": id, "chardev": id, "tag": self.tag(),
                "queue-size": self.share.options.queue_size.map_or(QUEUE, u32::from),
            }),
        };
        if way == Way::Virtiofs && self.boot_priority > 0 {
            // After the drives and NICs of the same priority.
            let number = self.slot.trim_start_matches("fs").parse().unwrap_or(0);
            device["bootindex"] = devices::boot_index(self.boot_priority, 900 + number).into();
        }
        devices::virtio(&mut device, &self.share.options.virtio);
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
    use karst_model::device::ShareOptions;

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
            bus: None,
            share: Share::default(),
            boot_priority: 0,
        }
    }

    const PLAN9: Way = Way::Plan9 { mapped: false };
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
        let told = mounts(&[Directory { readonly: true, ..directory("config", "fs0") }], &BTreeSet::new());
        let mount = message::Mount { tag: "karst-fs0".into(), path: "/mnt/data".into(), readonly: true };
        assert_eq!(told, [SharedDirectory { mount, virtiofs: false }]);
        let below = Directory { at: "/mnt/data/below".into(), ..directory("a", "fs0") };
        let told = mounts(&[below, directory("b", "fs1")], &["fs0".to_owned()].into());
        let told = told.into_iter().map(|d| (d.mount.path, d.virtiofs));
        assert_eq!(
            told.collect::<Vec<_>>(),
            [("/mnt/data".to_owned(), false), ("/mnt/data/below".to_owned(), true)]
        );
    }

    #[test]
    fn what_has_a_tag_is_known_by_it_and_mounted_where_it_has_a_place() {
        let share = Share { tag: Some("/import/from/host".into()), ..Share::default() };
        let own = Directory { at: String::new(), share, ..directory("filesystem0", "fs0") };
        assert_eq!(own.tag(), "/import/from/host");
        assert!(mounts(std::slice::from_ref(&own), &BTreeSet::new()).is_empty());
        let placed = Directory { at: "/mnt".into(), ..own.clone() };
        assert_eq!(mounts(&[placed], &BTreeSet::new())[0].mount.tag, "/import/from/host");
        let device = own.device(Q35, PLAN9).unwrap();
        assert_eq!(device["mount_tag"], json!("/import/from/host"));
        let other =
            Directory { share: Share { tag: Some("other".into()), ..Share::default() }, ..own.clone() };
        assert_eq!(
            pending(&[own], &[other], &BTreeSet::new()),
            BTreeSet::from(["devices.filesystem0".to_owned()])
        );
    }

    #[test]
    fn options_are_said_to_qemu() {
        let with = |text: &str, bus: DiskBus| {
            let options = ShareOptions::parse("f", text, Some(bus)).unwrap();
            Directory { share: Share { tag: None, options }, bus: Some(bus), ..directory("data", "fs2") }
        };
        let host =
            |text: &str, mapped: bool| with(text, DiskBus::Plan9).host(0, Way::Plan9 { mapped }).unwrap().1;
        let all = host("access=mapped,file-mode=640,directory-mode=0750,devices=forbid,immediate", true);
        assert_eq!(
            all,
            "local,id=directory-fs2,path=/proc/self/fd/200,security_model=mapped-xattr,multidevs=forbid,fmode=0640,dmode=0750,\
             writeout=immediate"
        );
        assert!(host("access=passthrough", false).contains("security_model=passthrough,multidevs=remap"));
        assert!(host("access=squash,devices=warn", false).contains("security_model=none,multidevs=warn"));
        let device = with("packed,iommu", DiskBus::Plan9).device(Q35, PLAN9).unwrap();
        assert_eq!((&device["packed"], &device["iommu_platform"]), (&json!(true), &json!(true)));
        let mut served = with("queue-size=256,ats", DiskBus::Virtiofs);
        let device = served.device(Q35, Way::Virtiofs).unwrap();
        assert_eq!((&device["queue-size"], &device["ats"]), (&json!(256), &json!(true)));
        assert_eq!(device.get("bootindex"), None);
        served.boot_priority = 998;
        assert!(served.device(Q35, Way::Virtiofs).unwrap()["bootindex"].is_u64());
        assert_eq!(served.device(Q35, PLAN9).unwrap().get("bootindex"), None, "9p has no such property");
    }

    #[test]
    fn host_sides_and_devices() {
        let mut d = directory("data", "fs1");
        assert_eq!(
            d.host(1, Way::Plan9 { mapped: true }).unwrap(),
            (
                "-fsdev",
                "local,id=directory-fs1,path=/proc/self/fd/201,security_model=mapped-xattr,multidevs=remap"
                    .to_owned()
            )
        );
        let socket = ("-chardev", "socket,id=directory-fs1,fd=203".to_owned());
        assert_eq!(d.host(3, Way::Virtiofs).unwrap(), socket);
        d.readonly = true;
        d.limits.read = Some(DiskRate::Bytes { per_second: 1 << 20 });
        d.limits.write = Some(DiskRate::Operations { per_second: 50 });
        assert_eq!(
            d.host(0, PLAN9).unwrap().1,
            "local,id=directory-fs1,path=/proc/self/fd/200,security_model=none,multidevs=remap,readonly=on,\
             throttling.bps-read=1048576,throttling.iops-write=50"
        );
        let device = d.device(Q35, PLAN9).unwrap();
        assert_eq!((&device["bus"], &device["mount_tag"]), (&json!("port3"), &json!("data")));
        let device = d.device(Q35, Way::Virtiofs).unwrap();
        assert_eq!((&device["bus"], &device["tag"]), (&json!("port3"), &json!("data")));
        assert_eq!(device["chardev"], device["id"]);
        for (slot, pci) in [("scsi0", Some("03:00.0")), ("fs0,x=y", Some("03:00.0")), ("fs0", None)] {
            let d = Directory { pci: pci.map(str::to_owned), ..directory("data", slot) };
            for way in [PLAN9, Way::Virtiofs] {
                assert_eq!(d.device(Q35, way).unwrap_err().field.as_deref(), Some("devices.data"), "{slot}");
            }
        }
        for way in [PLAN9, Way::Virtiofs] {
            assert!(directory("data", "fs1,path=/etc").host(0, way).is_err());
        }
    }

    #[test]
    fn whatever_of_a_directory_changes_waits() {
        let (a, b) = (directory("a", "fs0"), directory("b", "fs1"));
        let now = [a.clone(), b.clone()];
        let none = BTreeSet::new();
        assert!(pending(&now, &now, &none).is_empty());
        let names = |wanted: &[Directory]| pending(&now, wanted, &none).into_iter().collect::<Vec<_>>();
        assert_eq!(names(std::slice::from_ref(&a)), ["devices.b"]);
        let moved = Directory { at: "/srv".into(), ..b.clone() };
        let new = Directory { source: "/srv/new".into(), ..directory("c", "fs2") };
        assert_eq!(names(&[a, moved, new]), ["devices.b", "devices.c"]);
    }

    #[test]
    fn a_way_that_is_not_the_one_that_was_said_waits() {
        let by = |bus: Option<DiskBus>| Directory { bus, ..directory("a", "fs0") };
        let (plan9, virtiofs) = (BTreeSet::new(), BTreeSet::from(["fs0".to_owned()]));
        for (said, served, waits) in [
            (None, &plan9, false),
            (None, &virtiofs, false),
            (Some(DiskBus::Plan9), &plan9, false),
            (Some(DiskBus::Plan9), &virtiofs, true),
            (Some(DiskBus::Virtiofs), &plan9, true),
            (Some(DiskBus::Virtiofs), &virtiofs, false),
        ] {
            // Whatever was said when it started, also by an earlier version, which wrote nothing down of it.
            for before in [None, Some(DiskBus::Plan9), Some(DiskBus::Virtiofs)] {
                let found = pending(&[by(before)], &[by(said)], served);
                assert_eq!(!found.is_empty(), waits, "{before:?}, {said:?}, {served:?}");
            }
        }
        let old = r#"{"name":"a","slot":"fs0","pci":null,"source":"/srv","at":"/mnt","readonly":false,
            "recursive":false,"foreign":false,"limits":{"read":null,"write":null}}"#;
        assert_eq!(serde_json::from_str::<Directory>(old).unwrap().bus, None);
    }
}
