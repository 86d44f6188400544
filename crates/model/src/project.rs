//! Projects: the boundary between tenants.

use crate::{Config, Name, ProjectId};
use serde::{Deserialize, Serialize};

/// A project.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Project {
    /// Reference.
    pub id: ProjectId,
    /// Unique name.
    pub name: Name,
    /// User's text.
    #[serde(default)]
    pub description: String,
    /// As written.
    #[serde(default)]
    pub config: Config,
    /// Grows with each change.
    pub spec_version: u64,
}

/// The project that always exists.
pub const DEFAULT_PROJECT: &str = "default";

/// Switches by which a project has something of its own (`true`) or shares the default project's, and what a new project
/// begins with.
pub const FEATURES: &[(&str, &str)] = &[
    ("features.images", "true"),
    ("features.networks", "false"),
    (ZONES, "false"),
    ("features.profiles", "true"),
    ("features.storage.buckets", "true"),
    ("features.storage.volumes", "true"),
];

/// There are no DNS zones that a project could have of its own: the key is known, and written into no project.
const ZONES: &str = "features.networks.zones";

/// The features that are written into a new project, and what they begin with.
pub fn new_features() -> impl Iterator<Item = (&'static str, &'static str)> {
    FEATURES.iter().copied().filter(|(key, _)| *key != ZONES)
}

/// Settings of the server that a project may have otherwise, and what else is no limit.
pub const SETTINGS: &[&str] = &[
    "backups.compression_algorithm",
    "images.auto_update_cached",
    "images.auto_update_interval",
    "images.compression_algorithm",
    "images.default_architecture",
    "images.remote_cache_expiry",
];

/// Keys of Incus that nothing here could follow, and why: they are refused rather than taken and not kept.
pub const REFUSED: &[(&str, &str)] = &[
    ("network.hwaddr_pattern", "MAC addresses are drawn here; give a NIC its own by hwaddr"),
    (
        "restricted.cluster.groups",
        "hosts have no groups here; restricted.cluster.target says who may choose one",
    ),
    ("restricted.idmap.gid", "raw.idmap is not there, so no id of the host can be mapped"),
    ("restricted.idmap.uid", "raw.idmap is not there, so no id of the host can be mapped"),
    ("restricted.networks.integrations", "networks are joined to no other cluster here"),
    (
        "restricted.networks.subnets",
        "networks of a project have no uplink whose subnets they could take; theirs are chosen for them",
    ),
    ("restricted.networks.uplinks", "networks of a project are bridges, which have no uplink"),
    ("restricted.networks.zones", "DNS zones are not there"),
];

/// Limits, and what they are: a number or a size.
pub const LIMITS: &[(&str, &str)] = &[
    ("limits.containers", "number"),
    ("limits.cpu", "number"),
    ("limits.disk", "size"),
    ("limits.disk.pool.*", "size"),
    ("limits.instances", "number"),
    ("limits.memory", "size"),
    ("limits.networks", "number"),
    ("limits.processes", "number"),
    ("limits.virtual-machines", "number"),
];

/// Restrictions: key, values, and the value when it is not written. Without values it is a list of names.
pub const RESTRICTIONS: &[(&str, &[&str], &str)] = &[
    ("restricted.backups", &["allow", "block"], "block"),
    ("restricted.cluster.target", &["allow", "block"], "block"),
    ("restricted.containers.interception", &["allow", "block", "full"], "block"),
    ("restricted.containers.lowlevel", &["allow", "block"], "block"),
    ("restricted.containers.nesting", &["allow", "block"], "block"),
    ("restricted.containers.privilege", &["unprivileged", "isolated", "allow"], "unprivileged"),
    ("restricted.devices.disk", &["allow", "block", "managed"], "managed"),
    ("restricted.devices.disk.paths", &[], ""),
    ("restricted.devices.gpu", &["allow", "block"], "block"),
    ("restricted.devices.infiniband", &["allow", "block"], "block"),
    ("restricted.devices.nic", &["allow", "block", "managed"], "managed"),
    ("restricted.devices.pci", &["allow", "block"], "block"),
    ("restricted.devices.proxy", &["allow", "block"], "block"),
    ("restricted.devices.unix-block", &["allow", "block"], "block"),
    ("restricted.devices.unix-char", &["allow", "block"], "block"),
    ("restricted.devices.unix-hotplug", &["allow", "block"], "block"),
    ("restricted.devices.usb", &["allow", "block"], "block"),
    ("restricted.images.servers", &[], ""),
    ("restricted.networks.access", &[], ""),
    ("restricted.networks.spoofing", &["allow", "block", "ipv6"], "block"),
    ("restricted.snapshots", &["allow", "block"], "block"),
    ("restricted.storage-pools.access", &[], ""),
    ("restricted.virtual-machines.lowlevel", &["allow", "block"], "block"),
    ("restricted.virtual-machines.nesting", &["allow", "block"], "allow"),
];

/// What each key means.
pub const TEXTS: &[(&str, &str)] = &[
    ("features.images", "Images of its own; else those of the default project."),
    (
        "features.networks",
        "Networks of its own, with their ACLs and address sets; else those of the default project.",
    ),
    ("features.networks.zones", "DNS zones of its own. Only `false`: there are no zones."),
    ("features.profiles", "Profiles of its own; else those of the default project."),
    ("features.storage.buckets", "Buckets of its own. Only `true` as yet."),
    ("features.storage.volumes", "Custom volumes of its own; else those of the default project."),
    ("limits.containers", "Containers."),
    ("limits.cpu", "Sum of `limits.cpu`; each instance has to say its own then."),
    ("limits.disk", "Sum of the sizes of root disks and custom volumes; each has to have one then."),
    ("limits.disk.pool.*", "The same of one pool, by its name."),
    ("limits.instances", "Containers and virtual machines together."),
    ("limits.memory", "Sum of `limits.memory`; each instance has to say its own then."),
    ("limits.networks", "Networks."),
    ("limits.processes", "Sum of `limits.processes` of containers; each has to say its own then."),
    ("limits.virtual-machines", "Virtual machines."),
    (
        "restricted",
        "What reaches into the host is refused, as the keys below say; without it they say nothing.",
    ),
    ("restricted.backups", "Backups of instances and volumes."),
    (
        "restricted.cluster.target",
        "The choice of a host. On a single host there is none to make, and it restricts nothing.",
    ),
    ("restricted.containers.interception", "Keys that intercept calls of the kernel."),
    (
        "restricted.containers.lowlevel",
        "Keys such as `raw.lxc`, `linux.kernel_modules`, `linux.sysctl.*`, `security.idmap.base`.",
    ),
    ("restricted.containers.nesting", "`security.nesting`."),
    (
        "restricted.containers.privilege",
        "The most privileged that containers may be: with ids that others may have too, with ids of their own (`isolated`), or also privileged.",
    ),
    (
        "restricted.devices.disk",
        "Disks beside the root: of pools (`managed`), none, or paths of the host too.",
    ),
    (
        "restricted.devices.disk.paths",
        "Paths below which disks of the host may lie, comma-separated; all when empty.",
    ),
    ("restricted.devices.gpu", "GPUs."),
    ("restricted.devices.infiniband", "InfiniBand."),
    ("restricted.devices.nic", "NICs: on networks (`managed`), none, or on interfaces of the host too."),
    ("restricted.devices.pci", "PCI devices."),
    ("restricted.devices.proxy", "Proxies."),
    ("restricted.devices.unix-block", "Block devices."),
    ("restricted.devices.unix-char", "Character devices."),
    ("restricted.devices.unix-hotplug", "Devices that come and go."),
    ("restricted.devices.usb", "USB devices."),
    (
        "restricted.images.servers",
        "Servers that images may be fetched from, comma-separated; all when empty.",
    ),
    ("restricted.networks.access", "Networks that may be used, comma-separated; all when empty."),
    (
        "restricted.networks.spoofing",
        "Sending under others' addresses on networks that projects share: of IPv6 only, of all, or none.",
    ),
    ("restricted.snapshots", "Snapshots of instances and volumes."),
    ("restricted.storage-pools.access", "Pools that may be used, comma-separated; all when empty."),
    ("restricted.virtual-machines.lowlevel", "Keys such as `raw.qemu`."),
    (
        "restricted.virtual-machines.nesting",
        "Virtual machines in virtual machines: blocked, `hardware.cpu.model` has to end in the flags `-vmx,-svm`.",
    ),
    ("backups.compression_algorithm", "How its backups are compressed: none, gzip, zstd, xz, bzip2."),
    ("images.auto_update_cached", "Whether images that were fetched for its instances follow their server."),
    ("images.auto_update_interval", "Hours after which newer images are looked for; never when 0."),
    (
        "images.compression_algorithm",
        "How images published in it are compressed: none, gzip, zstd, xz, bzip2.",
    ),
    ("images.default_architecture", "Architecture of its images; one that its host runs."),
    (
        "images.remote_cache_expiry",
        "Days after which an image that was fetched for an instance goes when nobody uses it; never when 0.",
    ),
];

/// What a key means.
pub fn text_of(key: &str) -> &'static str {
    TEXTS.iter().find(|(k, _)| *k == key).map_or("", |(_, text)| text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_says_what_it_means() {
        let two = FEATURES.iter().chain(LIMITS).map(|(k, _)| *k);
        let three = two.chain(["restricted"]).chain(RESTRICTIONS.iter().map(|(k, ..)| *k));
        let all: Vec<&str> = three.chain(SETTINGS.iter().copied()).collect();
        let said: Vec<&str> = TEXTS.iter().map(|(k, _)| *k).collect();
        assert_eq!(all, said);
        assert!(TEXTS.iter().all(|(_, text)| text.ends_with('.')));
        assert!(REFUSED.iter().all(|(key, _)| !said.contains(key)), "what is refused does nothing");
        assert_eq!(new_features().count() + 1, FEATURES.len());
    }
}
