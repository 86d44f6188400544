//! Nodes: hosts that run guests, and what they report of themselves.

use crate::{Error, InstanceId, Name, NodeId, Result, screens::ScreenGrants, storage::PoolKind};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// A host of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Reference.
    pub id: NodeId,
    /// Name in lists (`location`).
    pub name: Name,
    /// What the host last said of itself.
    pub facts: Option<HostFacts>,
    /// What is still to start after a boot that [`Self::facts`] do not tell of yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub starting: Option<Starting>,
}

/// What starts with its host after one boot. Whom it concerns is fixed when the boot is seen first: who is made, or stopped, since
/// then is left to its user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Starting {
    /// [`HostFacts::boot_id`] of the boot.
    pub boot_id: String,
    /// Those that neither run yet nor were given up.
    pub left: BTreeSet<InstanceId>,
}

/// What an agent says of its machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct HostFacts {
    /// Host name.
    pub hostname: String,
    /// Identifies this run of the kernel: guests of another one are gone.
    #[serde(default)]
    pub boot_id: String,
    /// `x86_64`.
    pub architecture: String,
    /// `Linux`' release.
    pub kernel: String,
    /// Operating system (`Debian GNU/Linux`) and version (`12`).
    pub os_name: String,
    /// Version of the operating system.
    pub os_version: String,
    /// Accelerator for virtual machines.
    pub accelerator: Accelerator,
    /// QEMU's version, `None` when it is not installed.
    pub qemu: Option<String>,
    /// liblxc's version, `None` when it is not installed.
    pub lxc: Option<String>,
    /// Machine type that new virtual machines get, such as `pc-q35-7.2`.
    pub default_machine: Option<String>,
    /// QEMU of this host serves screens by SPICE too.
    #[serde(default)]
    pub spice: bool,
    /// It has a virtiofsd that directories can be shared by.
    #[serde(default)]
    pub virtiofs: bool,
    /// Where screens of machines may listen.
    #[serde(default, skip_serializing_if = "ScreenGrants::is_empty")]
    pub screens: ScreenGrants,
    /// `v1`, `hybrid` or `v2`.
    pub cgroup_layout: String,
    /// Number of usable CPUs.
    pub cpus: u32,
    /// Total memory in bytes.
    pub memory: u64,
    /// Kinds of storage pools; none: it has not said yet.
    #[serde(default)]
    pub storage: Vec<StorageDriver>,
    /// What is wrong or missing, in words, each with the fix.
    pub warnings: Vec<String>,
}

impl HostFacts {
    /// Kinds of pools that the host can have.
    pub fn storage_kinds(&self) -> impl Iterator<Item = &StorageDriver> {
        self.storage.iter().filter(|d| d.missing.is_none())
    }

    /// Refuses a kind of pools that the host cannot have.
    ///
    /// # Errors
    /// Unsupported at `driver`, saying what is missing and what to do.
    pub fn demand_storage(&self, kind: PoolKind) -> Result<()> {
        // Directories are everywhere.
        if kind == PoolKind::Dir || self.storage_kinds().any(|d| d.kind == kind) {
            return Ok(());
        }
        let why = self.storage.iter().find(|d| d.kind == kind).and_then(|d| d.missing.as_deref());
        let why = why.unwrap_or("it does not say that it can");
        let text = format!("no pools of the storage driver {:?} on this host: {why}", kind.as_str());
        Err(Error::unsupported(text).at("driver"))
    }
}

/// A kind of storage pools on a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorageDriver {
    /// Which.
    pub kind: PoolKind,
    /// Version of its tools, or of the kernel's module; empty where nothing tells.
    pub version: String,
    /// What is missing for it, with the fix; `None`: such pools can be made.
    pub missing: Option<String>,
}

/// How virtual machines are executed here, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accelerator {
    /// `kvm` or `tcg`.
    pub kind: AcceleratorKind,
    /// Why, in words.
    pub reason: String,
}

impl Default for Accelerator {
    fn default() -> Self {
        Self { kind: AcceleratorKind::Tcg, reason: "not probed yet".into() }
    }
}

/// QEMU's accelerators that Karst uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AcceleratorKind {
    /// Hardware virtualization by the kernel.
    Kvm,
    /// Software emulation.
    Tcg,
}

impl AcceleratorKind {
    /// QEMU's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_say_which_pools_they_can_have() {
        let driver = |kind, missing: Option<&str>| StorageDriver {
            kind,
            version: String::new(),
            missing: missing.map(str::to_owned),
        };
        let mut facts = HostFacts::default();
        facts.demand_storage(PoolKind::Dir).unwrap();
        assert!(facts.demand_storage(PoolKind::Btrfs).is_err(), "it has said nothing yet");
        facts.storage =
            vec![driver(PoolKind::Dir, None), driver(PoolKind::Zfs, Some("install zfsutils-linux"))];
        facts.demand_storage(PoolKind::Dir).unwrap();
        assert_eq!(facts.storage_kinds().count(), 1);
        let e = facts.demand_storage(PoolKind::Zfs).unwrap_err();
        assert!(e.is(crate::ErrorKind::Unsupported) && e.field.as_deref() == Some("driver"), "{e:?}");
        assert!(e.message.contains("\"zfs\"") && e.message.ends_with("install zfsutils-linux"), "{e}");
    }
}
