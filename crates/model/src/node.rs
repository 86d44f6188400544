//! Nodes: hosts that run guests, and what they report of themselves.

use crate::{InstanceId, Name, NodeId};
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
    /// `v1`, `hybrid` or `v2`.
    pub cgroup_layout: String,
    /// Number of usable CPUs.
    pub cpus: u32,
    /// Total memory in bytes.
    pub memory: u64,
    /// What is wrong or missing, in words, each with the fix.
    pub warnings: Vec<String>,
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
