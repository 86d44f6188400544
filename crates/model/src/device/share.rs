//! Directories that virtual machines share with their hosts: by what name the guest knows one (`tag`), and what of how it is shared is
//! not as usual (`share.options`). Each option has one form in text, which is written as it is read.
//!
//! A directory with a `path` is mounted there by Karst's agent. One with a `tag` alone is the guest's own to mount.

use super::{DiskBus, Keys};
use crate::{Error, Result, options::Virtio};
use serde::{Deserialize, Serialize};

/// Longest tag of a directory that may be shared by 9p.
pub const MAX_TAG: usize = 31;
/// The same of one that is shared by virtiofs and in no other way.
pub const MAX_VIRTIOFS_TAG: usize = 36;

fn is_false(flag: &bool) -> bool {
    !flag
}

/// What a directory has that drives have not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Share {
    /// The name by which the guest mounts it; one made of its device's when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// What of how it is shared is not as usual.
    #[serde(skip_serializing_if = "ShareOptions::is_usual")]
    pub options: ShareOptions,
}

impl Share {
    /// Does it say nothing?
    pub fn is_usual(&self) -> bool {
        *self == Self::default()
    }
}

/// As whom a guest reads and writes what is shared by 9p.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShareAccess {
    /// Owners and modes become true of the files, as far as QEMU's user may: what it may not fails.
    Passthrough,
    /// They are kept beside the files, which are QEMU's user's.
    Mapped,
    /// As passthrough, and what QEMU's user may not is passed over.
    Squash,
}

/// Names of the ways of access.
pub const SHARE_ACCESS: &[(&str, ShareAccess)] = &[
    ("passthrough", ShareAccess::Passthrough),
    ("mapped", ShareAccess::Mapped),
    ("squash", ShareAccess::Squash),
];

/// What becomes of files of several file systems below one directory shared by 9p, whose numbers may be the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShareDevices {
    /// They get others.
    Remap,
    /// Files of another file system than the first are not there.
    Forbid,
    /// QEMU's log is told, once.
    Warn,
}

/// Names of those.
pub const SHARE_DEVICES: &[(&str, ShareDevices)] =
    &[("remap", ShareDevices::Remap), ("forbid", ShareDevices::Forbid), ("warn", ShareDevices::Warn)];

/// What a guest keeps of a directory by virtiofs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShareCache {
    /// Nothing.
    None,
    /// Everything, as if nobody else wrote there.
    Always,
}

/// Names of those.
pub const SHARE_CACHES: &[(&str, ShareCache)] = &[("none", ShareCache::None), ("always", ShareCache::Always)];

/// What of how a directory is shared is not as usual.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct ShareOptions {
    /// Of its device.
    #[serde(flatten)]
    pub virtio: Virtio,
    /// As whom (9p).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access: Option<ShareAccess>,
    /// Mode of new files on the host (9p, mapped).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_mode: Option<u16>,
    /// Mode of new directories on the host (9p, mapped).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub directory_mode: Option<u16>,
    /// What becomes of several file systems below it (9p); remap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub devices: Option<ShareDevices>,
    /// What is written begins to go to the disk at once (9p).
    #[serde(skip_serializing_if = "is_false")]
    pub immediate: bool,
    /// Entries of its queues (virtiofs); 1024.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_size: Option<u16>,
    /// What the guest keeps (virtiofs); what others wrote is seen within a second when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<ShareCache>,
    /// Files have no extended attributes (virtiofs).
    #[serde(skip_serializing_if = "is_false")]
    pub no_attributes: bool,
    /// Threads that serve it (virtiofs).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<u16>,
}

fn named<T: Copy>(known: &[(&str, T)], name: &str) -> Option<T> {
    known.iter().find(|(word, _)| *word == name).map(|(_, value)| *value)
}

fn name_of<T: Copy + PartialEq>(known: &[(&'static str, T)], value: T) -> &'static str {
    known.iter().find(|(_, one)| *one == value).map_or("", |(word, _)| word)
}

impl ShareAccess {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        name_of(SHARE_ACCESS, self)
    }
}

impl ShareDevices {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        name_of(SHARE_DEVICES, self)
    }
}

impl ShareCache {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        name_of(SHARE_CACHES, self)
    }
}

fn mode(text: &str) -> Option<u16> {
    let digits = (3..=4).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
    u16::from_str_radix(text, 8).ok().filter(|mode| digits && *mode <= 0o777)
}

impl ShareOptions {
    /// Is it shared as directories are without a word?
    pub fn is_usual(&self) -> bool {
        *self == Self::default()
    }

    /// Does it say what 9p alone has?
    fn is_of_plan9(&self) -> bool {
        self.access.is_some()
            || self.file_mode.is_some()
            || self.directory_mode.is_some()
            || self.devices.is_some()
            || self.immediate
    }

    /// Does it say what virtiofs alone has?
    fn is_of_virtiofs(&self) -> bool {
        self.queue_size.is_some() || self.cache.is_some() || self.no_attributes || self.threads.is_some()
    }

    /// Out of a list; `bus` is how the directory is said to be shared.
    ///
    /// # Errors
    /// Invalid, naming `field`, for what is no option, or none of a directory that is shared so.
    pub fn parse(field: &str, text: &str, bus: Option<DiskBus>) -> Result<Self> {
        let mut found = Self::default();
        for word in text.split(',').map(str::trim) {
            let wrong = |why: &str| Error::invalid(field, format!("{word:?}: {why}"));
            let number = |text: &str, least: u16, most: u16| {
                let n = text.parse().ok().filter(|n: &u16| (least..=most).contains(n));
                n.ok_or_else(|| wrong(&format!("a number from {least} to {most} is possible")))
            };
            let permissions =
                |text: &str| mode(text).map(Some).ok_or_else(|| wrong("write a mode as in 0640, up to 0777"));
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            match (name, value) {
                (word, "") if found.virtio.take(word) => {}
                ("immediate", "") => found.immediate = true,
                ("attributes", "off") => found.no_attributes = true,
                ("access", name) => {
                    let access = named(SHARE_ACCESS, name);
                    found.access =
                        Some(access.ok_or_else(|| wrong("passthrough, mapped and squash are possible"))?);
                }
                ("devices", name) => {
                    let devices = named(SHARE_DEVICES, name);
                    found.devices =
                        Some(devices.ok_or_else(|| wrong("remap, forbid and warn are possible"))?);
                }
                ("cache", name) => {
                    let cache = named(SHARE_CACHES, name);
                    found.cache = Some(cache.ok_or_else(|| wrong("none and always are possible"))?);
                }
                ("file-mode", text) => found.file_mode = permissions(text)?,
                ("directory-mode", text) => found.directory_mode = permissions(text)?,
                ("queue-size", n) => {
                    let size = number(n, 2, 1024)?;
                    if !size.is_power_of_two() {
                        return Err(wrong("it is a power of two"));
                    }
                    found.queue_size = Some(size);
                }
                ("threads", n) => found.threads = Some(number(n, 1, 256)?),
                _ => {
                    return Err(wrong(
                        "is no option; access=, file-mode=, directory-mode=, devices= and immediate of io.bus=9p, queue-size=, cache=, \
                         attributes=off and threads= of io.bus=virtiofs, iommu, ats, packed and page-per-queue are",
                    ));
                }
            }
        }
        found.demand_bus(field, bus)?;
        Ok(found)
    }

    fn demand_bus(&self, field: &str, bus: Option<DiskBus>) -> Result<()> {
        let no = |text: &str| Err(Error::invalid(field, text));
        if self.is_of_plan9() && bus != Some(DiskBus::Plan9) {
            return no("access, file-mode, directory-mode, devices and immediate are said of io.bus=9p");
        }
        if self.is_of_virtiofs() && bus != Some(DiskBus::Virtiofs) {
            return no("queue-size, cache, attributes and threads are said of io.bus=virtiofs");
        }
        let modes = self.file_mode.is_some() || self.directory_mode.is_some();
        if modes && self.access != Some(ShareAccess::Mapped) {
            return no("modes of new files are said with access=mapped; else the guest says them");
        }
        Ok(())
    }

    /// As it is written; nothing of a usual directory.
    pub fn text(&self) -> Option<String> {
        let mut all: Vec<String> = self.virtio.words().into_iter().map(str::to_owned).collect();
        all.extend(self.immediate.then(|| "immediate".to_owned()));
        let mut say = |name: &str, value: Option<String>| all.extend(value.map(|v| format!("{name}={v}")));
        say("access", self.access.map(|a| a.as_str().to_owned()));
        say("file-mode", self.file_mode.map(|m| format!("{m:04o}")));
        say("directory-mode", self.directory_mode.map(|m| format!("{m:04o}")));
        say("devices", self.devices.map(|d| d.as_str().to_owned()));
        say("queue-size", self.queue_size.map(|n| n.to_string()));
        say("cache", self.cache.map(|c| c.as_str().to_owned()));
        say("attributes", self.no_attributes.then(|| "off".to_owned()));
        say("threads", self.threads.map(|n| n.to_string()));
        (!all.is_empty()).then(|| all.join(","))
    }
}

/// The tag of a directory that has none of its own: the name of its device, where that can be one and is not that of the share with
/// Karst's agent; else one made of its slot.
pub fn share_tag(device: &str, slot: &str) -> String {
    let plain = device.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    let fits = (1..=MAX_TAG).contains(&device.len()) && plain && !is_own(device);
    if fits { device.to_owned() } else { format!("karst-{slot}") }
}

/// Why it can be no tag of a directory; `bus` is how that is said to be shared.
pub fn tag_fault(tag: &str, bus: Option<DiskBus>) -> Option<String> {
    let most = if bus == Some(DiskBus::Virtiofs) { MAX_VIRTIOFS_TAG } else { MAX_TAG };
    if tag.is_empty() {
        Some("is empty".to_owned())
    } else if is_own(tag) {
        Some("is the name of a share of Karst's own".to_owned())
    } else if tag.len() > most {
        Some(format!("is longer than the {most} bytes of a tag"))
    } else if !tag.bytes().all(|b| b.is_ascii_graphic()) {
        Some("has other characters than those of ASCII that are printed, without spaces".to_owned())
    } else {
        None
    }
}

/// Is it the tag of the share with Karst's agent, or one that Karst makes up?
fn is_own(tag: &str) -> bool {
    tag == "config" || tag.starts_with("karst-")
}

impl Share {
    /// Out of the keys of a disk.
    ///
    /// # Errors
    /// Invalid, naming the key.
    pub(super) fn parse(keys: &Keys<'_>, bus: Option<DiskBus>) -> Result<Self> {
        let tag = keys.get("tag").map(|tag| match tag_fault(tag, bus) {
            None => Ok(tag.to_owned()),
            Some(why) => Err(Error::invalid(keys.field("tag"), format!("{tag:?} {why}; choose another"))),
        });
        let tag = tag.transpose()?;
        let options = match keys.get("share.options") {
            Some(_) if tag.is_none() && keys.get("path").is_none() => {
                let text = "is said of a directory, which has a path or a tag; a drive has io.options";
                return Err(Error::invalid(keys.field("share.options"), text));
            }
            Some(text) => ShareOptions::parse(&keys.field("share.options"), text, bus)?,
            None => ShareOptions::default(),
        };
        Ok(Self { tag, options })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    const PLAN9: Option<DiskBus> = Some(DiskBus::Plan9);
    const VIRTIOFS: Option<DiskBus> = Some(DiskBus::Virtiofs);

    #[test]
    fn options_are_written_as_they_are_read() {
        for (text, bus) in [
            ("access=passthrough", PLAN9),
            ("access=squash,devices=warn", PLAN9),
            (
                "iommu,ats,packed,page-per-queue,immediate,access=mapped,file-mode=0640,directory-mode=0755,devices=forbid",
                PLAN9,
            ),
            ("queue-size=512,cache=always,attributes=off,threads=16", VIRTIOFS),
            ("cache=none", VIRTIOFS),
            ("packed", None),
        ] {
            let found = ShareOptions::parse("f", text, bus).unwrap();
            assert_eq!(found.text().as_deref(), Some(text));
            let kept = serde_json::to_string(&found).unwrap();
            assert_eq!(serde_json::from_str::<ShareOptions>(&kept).unwrap(), found, "{kept}");
        }
        assert_eq!(ShareOptions::default().text(), None);
        let short = ShareOptions::parse("f", "access=mapped,file-mode=644", PLAN9).unwrap();
        assert_eq!(short.text().as_deref(), Some("access=mapped,file-mode=0644"));
    }

    #[test]
    fn what_a_directory_has_not_is_refused() {
        for (text, bus, word) in [
            ("access=root", PLAN9, "squash"),
            ("access=mapped", None, "io.bus=9p"),
            ("immediate", VIRTIOFS, "io.bus=9p"),
            ("cache=none", PLAN9, "io.bus=virtiofs"),
            ("threads=16", None, "io.bus=virtiofs"),
            ("file-mode=0644", PLAN9, "access=mapped"),
            ("access=mapped,file-mode=1777", PLAN9, "0640"),
            ("access=mapped,file-mode=+644", PLAN9, "0640"),
            ("access=mapped,directory-mode=9", PLAN9, "0640"),
            ("queue-size=1000", VIRTIOFS, "power of two"),
            ("queue-size=0", VIRTIOFS, "2 to 1024"),
            ("cache=auto", VIRTIOFS, "none and always"),
            ("devices=all", PLAN9, "forbid"),
            ("attributes=on", VIRTIOFS, "is no option"),
            ("colour=red", None, "is no option"),
        ] {
            let e = ShareOptions::parse("f", text, bus).unwrap_err();
            assert!(e.message.contains(word), "{text}: {e}");
            assert_eq!(e.field.as_deref(), Some("f"));
        }
    }

    #[test]
    fn tags_are_words_and_none_of_karsts() {
        let parse = |tag: &str, bus: Option<DiskBus>| {
            let keys = BTreeMap::from([("tag".to_owned(), tag.to_owned())]);
            Share::parse(&Keys { name: "d", keys: &keys }, bus).map(|share| share.tag)
        };
        for good in ["data", "/import/from/host", "a,b", "x".repeat(31).as_str()] {
            assert_eq!(parse(good, None).unwrap().as_deref(), Some(good));
        }
        assert_eq!(parse("", None).unwrap(), None);
        parse(&"x".repeat(36), VIRTIOFS).expect("virtiofs has longer ones");
        for bad in ["config", "karst-fs0", "two words", "tür", "x".repeat(32).as_str()] {
            assert_eq!(parse(bad, None).unwrap_err().field.as_deref(), Some("devices.d.tag"), "{bad}");
        }
        parse(&"x".repeat(37), VIRTIOFS).unwrap_err();
        assert_eq!((share_tag("data", "fs0"), share_tag("a,b", "fs1")), ("data".into(), "karst-fs1".into()));
        assert_eq!(
            (share_tag("config", "fs2"), share_tag("karst-fs1", "fs3")),
            ("karst-fs2".into(), "karst-fs3".into())
        );
        assert_eq!(share_tag(&"x".repeat(32), "fs1"), "karst-fs1");
    }
}
