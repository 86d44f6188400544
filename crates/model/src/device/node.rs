//! Device nodes of the host in containers: `unix-char`, `unix-block` and `gpu`.

use super::{Keys, UsbMatch, disk::plain_path, other_keys::keys_of};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// A device node, or the nodes of a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeDevice {
    /// Which device of the host.
    pub source: NodeOrigin,
    /// Where it is in the guest; a GPU's nodes are where the host has them.
    pub path: Option<String>,
    /// Owner in the guest.
    pub uid: u32,
    /// Group in the guest.
    pub gid: u32,
    /// Permission bits.
    pub mode: u32,
    /// One that is missing at the start is an error rather than left out.
    pub required: bool,
}

/// Which device of the host; all are granted by the host's policy only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum NodeOrigin {
    /// The device that a path is.
    Path {
        /// A block device, not a character device.
        block: bool,
        /// Absolute.
        path: String,
    },
    /// By its numbers.
    Number {
        /// A block device, not a character device.
        block: bool,
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A device on USB, or all that are the same.
    Usb(UsbMatch),
    /// A graphics card, or all.
    Gpu {
        /// Number of the card (`0` of `/dev/dri/card0`).
        card: Option<u32>,
        /// PCI address.
        pci: Option<String>,
    },
}

impl NodeDevice {
    pub(super) fn parse_unix(keys: &Keys<'_>, block: bool) -> Result<Self> {
        keys.known(&keys_of(if block { "unix-block" } else { "unix-char" }))?;
        let absolute = |key: &str| {
            let Some(path) = keys.get(key) else { return Ok(None) };
            if !path.starts_with('/') {
                return Err(Error::invalid(keys.field(key), format!("{path:?} is not an absolute path")));
            }
            plain_path(&keys.field(key), path).map(Some)
        };
        let (source, path) = (absolute("source")?, absolute("path")?);
        let number = (keys.number("major")?, keys.number("minor")?);
        let source = match (number, source.clone().or_else(|| path.clone())) {
            ((Some(major), Some(minor)), _) => NodeOrigin::Number { block, major, minor },
            ((None, None), Some(path)) => NodeOrigin::Path { block, path },
            ((None, None), None) => {
                return Err(Error::invalid(
                    keys.field("source"),
                    "a device needs a source or a path of the host",
                ));
            }
            _ => return Err(Error::invalid(keys.field("minor"), "major and minor belong together")),
        };
        let path = match (path, &source) {
            (Some(path), _) => Some(path),
            (None, NodeOrigin::Path { path, .. }) => Some(path.clone()),
            _ => {
                return Err(Error::invalid(
                    keys.field("path"),
                    "a device needs the path it has in the guest",
                ));
            }
        };
        let required = keys.get("required").is_none() || keys.boolean("required")?;
        Self::owned(keys, source, path, required)
    }

    pub(super) fn parse_gpu(keys: &Keys<'_>) -> Result<Self> {
        keys.known(&keys_of("gpu"))?;
        keys.one_of("gputype", &[("physical", ())])?;
        let source = NodeOrigin::Gpu { card: keys.number("id")?, pci: keys.get("pci").map(str::to_owned) };
        Self::owned(keys, source, None, true)
    }

    fn owned(keys: &Keys<'_>, source: NodeOrigin, path: Option<String>, required: bool) -> Result<Self> {
        let mode = match keys.get("mode") {
            None => 0o660,
            Some(text) => u32::from_str_radix(text, 8).ok().filter(|m| *m <= 0o777).ok_or_else(|| {
                let text = format!("{text:?} are no permissions; write them as 0660");
                Error::invalid(keys.field("mode"), text)
            })?,
        };
        let id = |key| Ok::<_, Error>(keys.number(key)?.unwrap_or(0));
        Ok(Self { source, path, uid: id("uid")?, gid: id("gid")?, mode, required })
    }
}
