//! How the memory of a machine is had of its host.

use super::wrong;
use crate::{ByteSize, Result};
use serde::{Deserialize, Serialize};

pub(super) const MEMORY: &str = "hardware.memory";

/// How the memory of a machine is had of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Memory {
    /// It is a file without a name, in memory.
    pub file: bool,
    /// It is a file without a name beside what the host has of the machine: on its disk.
    #[serde(default)]
    pub disk: bool,
    /// None of it is swapped out.
    #[serde(default)]
    pub locked: bool,
    /// Others whom QEMU hands it to see what is written there.
    pub shared: bool,
    /// All of it is there from the start.
    pub allocated: bool,
    /// It is not merged with that of others that is the same.
    pub unmerged: bool,
    /// It is in huge pages: of this size, or of the host's usual one.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "there")]
    pub pages: Option<Option<ByteSize>>,
}

/// What is there and says nothing is not what is absent.
fn there<'de, D: serde::Deserializer<'de>>(
    from: D,
) -> std::result::Result<Option<Option<ByteSize>>, D::Error> {
    Option::<ByteSize>::deserialize(from).map(Some)
}

impl Memory {
    /// Are its pages of a size that processors have?
    pub fn is_possible(&self) -> bool {
        self.pages.flatten().is_none_or(|s| [ByteSize::mib(2), ByteSize::gib(1)].contains(&s))
    }

    pub(super) fn parse(text: &str) -> Result<Self> {
        let mut found = Self::default();
        for part in text.split(',') {
            match part.trim().split_once('=').unwrap_or((part.trim(), "")) {
                ("file", "") => found.file = true,
                ("disk", "") => found.disk = true,
                ("locked", "") => found.locked = true,
                ("shared", "") => found.shared = true,
                ("allocated", "") => found.allocated = true,
                ("unmerged", "") => found.unmerged = true,
                ("hugepages", "") => found.pages = Some(None),
                ("hugepages", size) => {
                    found.pages = Some(Some(ByteSize::parse(&format!("config.{MEMORY}"), size)?));
                }
                _ => {
                    let text = format!(
                        "{part:?} is not there; file, disk, locked, shared, allocated, unmerged and hugepages=2MiB are"
                    );
                    return Err(wrong(MEMORY, text));
                }
            }
        }
        if found.disk && (found.file || found.pages.is_some()) {
            return Err(wrong(
                MEMORY,
                "disk is beside file and hugepages, which are in the host's memory; say one of them",
            ));
        }
        match found.is_possible() {
            true => Ok(found),
            false => Err(wrong(MEMORY, "huge pages have 2MiB or 1GiB")),
        }
    }

    pub(super) fn text(&self) -> String {
        let words = [
            (self.file, "file".to_owned()),
            (self.disk, "disk".into()),
            (self.locked, "locked".into()),
            (self.shared, "shared".into()),
            (self.allocated, "allocated".into()),
            (self.unmerged, "unmerged".into()),
            (
                self.pages.is_some(),
                match self.pages.flatten() {
                    Some(size) => format!("hugepages={}MiB", size.bytes() >> 20),
                    None => "hugepages".into(),
                },
            ),
        ];
        words.into_iter().filter(|(on, _)| *on).map(|(_, word)| word).collect::<Vec<_>>().join(",")
    }
}
