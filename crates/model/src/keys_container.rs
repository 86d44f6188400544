//! What the keys of a container's security and kernel settings mean together, and those that are told inside a guest (the
//! rows are in [`crate::keys`]).

use crate::{
    Config, Error, Result,
    keys::{flag, set},
    spec::{CloudInit, Security},
    syscalls,
};

/// Keys of Incus that Karst has not, and what to do instead; a name, or a prefix ending in `.`.
const MISSING: &[(&str, &str)] = &[
    ("agent.nic_config", "NICs inside are named and addressed by cloud-init.network-config"),
    ("cluster.evacuate", "the server is not clustered"),
    ("limits.memory.hotplug", "memory grows and shrinks by limits.memory, as far as hardware.balloon goes"),
    ("limits.memory.hugepages", "huge pages are had by hardware.memory"),
    ("limits.network.priority", "each NIC has its own limits.priority"),
    ("migration.incremental.", "containers move when they are stopped"),
    ("nvidia.", "a card is given by a device of type gpu, and its libraries by a disk"),
    ("oci.dns.", "names are resolved as the network says: dns.* of the network"),
    ("raw.apparmor", "every container has the same profile"),
    ("raw.idmap", "a path of the host keeps its owners with shift=true of its disk"),
    (
        "raw.qemu",
        "machines are described by hardware.* and devices; qemu_monitor of host-policy.toml grants QEMU's commands",
    ),
    (
        "raw.qemu.",
        "machines are described by hardware.* and devices; qemu_monitor of host-policy.toml grants QEMU's commands",
    ),
    ("raw.seccomp", "name the calls in security.syscalls.deny"),
    ("security.agent.metrics", "figures are the host's, and the agent is not asked for others"),
    ("security.bpffs.", "containers load no programs into the kernel"),
    ("security.iommu", "a machine's IOMMU is hardware.iommu"),
    ("security.selinux.", "containers are confined by AppArmor"),
    ("security.sev", "memory is not encrypted by the processor here"),
    ("security.sev.", "memory is not encrypted by the processor here"),
    ("security.syscalls.allow", "name what is refused in security.syscalls.deny"),
    ("security.syscalls.intercept.", "calls are not intercepted; devices and mounts are given by devices"),
];

/// What to do in place of a key of Incus that is not there.
pub(crate) fn missing(name: &str) -> Option<&'static str> {
    let is = |known: &str| name == known || known.ends_with('.') && name.starts_with(known);
    MISSING.iter().find(|(known, _)| is(known)).map(|(_, why)| *why)
}

/// Checks values whose form the table does not say.
pub(crate) fn check(name: &str, field: &str, value: &str) -> Result<()> {
    match name {
        "security.syscalls.deny" => syscalls::parse(field, value).map(drop),
        "linux.kernel_modules" => modules(field, value).map(drop),
        _ => match name.strip_prefix("linux.sysctl.") {
            Some(setting) => sysctl(field, setting, value),
            None => Ok(()),
        },
    }
}

fn modules(field: &str, text: &str) -> Result<Vec<String>> {
    let names = text.split(',').map(str::trim).filter(|n| !n.is_empty());
    let good = |n: &str| n.len() < 64 && n.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
    names
        .map(|n| match good(n) {
            true => Ok(n.to_owned()),
            false => Err(Error::invalid(field, format!("{n:?} is not the name of a module"))),
        })
        .collect()
}

/// Settings that the kernel keeps for each network or each group of processes with a memory of messages of its own. The
/// others are the host's.
const OWN: &[&str] = &["net.", "fs.mqueue.", "kernel.msg", "kernel.sem", "kernel.shm"];

fn sysctl(field: &str, setting: &str, value: &str) -> Result<()> {
    let plain = setting.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-/".contains(&b))
        && !setting.split(['.', '/']).any(str::is_empty);
    if !plain || !OWN.iter().any(|own| setting.starts_with(own)) {
        return Err(Error::invalid(
            field,
            format!(
                "{setting:?} is the host's own; containers have settings of {} of their own",
                OWN.join(", ")
            ),
        ));
    }
    match value.chars().any(char::is_control) || value.len() > 1024 {
        true => Err(Error::invalid(field, "the value of a setting is one line")),
        false => Ok(()),
    }
}

/// Security switches and kernel settings out of an expanded configuration.
pub fn security(config: &Config) -> Result<Security> {
    let ids = |key: &str| {
        let Some(n) = set(config, key).and_then(|v| v.parse::<u32>().ok()) else { return Ok(None) };
        if n % 65_536 == 0 {
            return Ok(Some(n));
        }
        Err(Error::invalid(format!("config.{key}"), format!("{n} is not a multiple of 65536")))
    };
    let deny = "security.syscalls.deny";
    let needed = "linux.kernel_modules";
    Ok(Security {
        nesting: flag(config, "security.nesting")?,
        privileged: flag(config, "security.privileged")?,
        idmap_base: ids("security.idmap.base")?,
        idmap_size: ids("security.idmap.size")?,
        guest_api: None,
        denied_calls: match set(config, deny) {
            Some(text) => syscalls::parse(&format!("config.{deny}"), text)?,
            None => vec![],
        },
        modules: match set(config, needed) {
            Some(text) => modules(&format!("config.{needed}"), text)?,
            None => vec![],
        },
        sysctls: config
            .iter()
            .filter(|(_, v)| !v.is_empty())
            .filter_map(|(k, v)| Some((k.strip_prefix("linux.sysctl.")?.to_owned(), v.clone())))
            .collect(),
        raw_lxc: set(config, "raw.lxc").map(str::to_owned),
    })
}

/// What the guest API shows of an expanded configuration, without the large keys that [`cloud_init`] answers; `None` when it
/// is switched off.
pub fn guest_api(config: &Config) -> Result<Option<Config>> {
    if set(config, "security.guestapi").is_some() && !flag(config, "security.guestapi")? {
        return Ok(None);
    }
    let elsewhere = ["cloud-init.network-config", "cloud-init.user-data", "cloud-init.vendor-data"];
    let shown = |k: &str| k.starts_with("user.") || k.starts_with("cloud-init.") && !elsewhere.contains(&k);
    Ok(Some(
        config
            .iter()
            .filter(|(k, v)| shown(k) && !v.is_empty())
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect(),
    ))
}

/// cloud-init data out of an expanded configuration.
pub fn cloud_init(config: &Config, instance_id: String) -> CloudInit {
    // The older names are under `user.`; Incus still reads them.
    let text = |k: &str| {
        set(config, &format!("cloud-init.{k}"))
            .or_else(|| set(config, &format!("user.{k}")))
            .map(str::to_owned)
    };
    CloudInit {
        instance_id,
        user_data: text("user-data"),
        vendor_data: text("vendor-data"),
        network_config: text("network-config"),
    }
}

/// `environment.*` without its prefix.
pub fn environment(config: &Config) -> std::collections::BTreeMap<String, String> {
    config.iter().filter_map(|(k, v)| Some((k.strip_prefix("environment.")?.to_owned(), v.clone()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ErrorKind, keys};

    #[test]
    fn what_is_not_there_is_said_with_what_is() {
        let refused = |k: &str, v: &str| {
            let config = Config::from([(k.to_owned(), v.to_owned())]);
            let e = keys::check(&config, None).unwrap_err();
            assert_eq!(e.field, Some(format!("config.{k}")), "{e}");
            (e.kind, e.message)
        };
        for (key, word) in [
            ("raw.idmap", "shift=true"),
            ("security.syscalls.intercept.mknod", "intercepted"),
            ("security.syscalls.allow", "deny"),
            ("nvidia.runtime", "gpu"),
            ("limits.network.priority", "limits.priority"),
        ] {
            let (kind, message) = refused(key, "x");
            assert!(kind == ErrorKind::Unsupported && message.contains(word), "{key}: {message}");
        }
        for (key, value, word) in [
            ("linux.sysctl.kernel.panic", "1", "host's own"),
            ("linux.sysctl.net..x", "1", "host's own"),
            ("linux.sysctl.net.ipv4.ip_forward", "1\nx", "one line"),
            ("linux.kernel_modules", "br_netfilter,../x", "module"),
            ("security.syscalls.deny", "nosuchcall", "system call"),
            ("security.privileged", "maybe", "boolean"),
            ("limits.memory.oom_priority", "-5", "whole number"),
        ] {
            let (kind, message) = refused(key, value);
            assert!(kind == ErrorKind::Invalid && message.contains(word), "{key}: {message}");
        }
    }

    /// Of Incus 6: what the table has not is refused with a reason, and never as a slip of the pen.
    #[test]
    fn each_key_of_incus_is_there_or_has_a_reason() {
        for key in [
            "agent.nic_config",
            "cluster.evacuate",
            "limits.memory.hotplug",
            "limits.memory.hugepages",
            "migration.incremental.memory",
            "migration.incremental.memory.goal",
            "migration.incremental.memory.iterations",
            "nvidia.driver.capabilities",
            "nvidia.require.cuda",
            "nvidia.require.driver",
            "oci.dns.domain",
            "oci.dns.nameservers",
            "oci.dns.search",
            "raw.qemu",
            "raw.qemu.conf",
            "raw.qemu.qmp.early",
            "raw.qemu.qmp.post-start",
            "raw.qemu.qmp.pre-start",
            "raw.qemu.scriptlet",
            "security.agent.metrics",
            "security.bpffs.delegate_cmds",
            "security.bpffs.path",
            "security.iommu",
            "security.selinux.domain",
            "security.selinux.type",
            "security.sev",
            "security.sev.policy.es",
            "security.sev.session.data",
            "security.syscalls.intercept.bpf",
            "security.syscalls.intercept.mount.allowed",
            "security.syscalls.intercept.sysinfo",
        ] {
            let e = keys::check(&Config::from([(key.to_owned(), "1".to_owned())]), None).unwrap_err();
            assert_eq!(
                (e.kind, e.field),
                (ErrorKind::Unsupported, Some(format!("config.{key}"))),
                "{}",
                e.message
            );
        }
        for (key, value) in [
            ("smbios11.io.example:a", "b"),
            ("systemd.credential.a", "b"),
            ("systemd.credential-binary.a", "Yg=="),
            ("cloud-init.user-data", "x"),
            ("user.network-config", "x"),
            ("volatile.vm.rtc_offset", "1"),
        ] {
            keys::check(&Config::from([(key.to_owned(), value.to_owned())]), None).unwrap();
        }
    }

    #[test]
    fn kernel_settings() {
        let config = Config::from([
            ("linux.sysctl.net.ipv4.ip_forward".to_owned(), "1".to_owned()),
            ("linux.kernel_modules".to_owned(), "br_netfilter, overlay".to_owned()),
            ("security.syscalls.deny".to_owned(), "keyctl errno 38".to_owned()),
            ("security.privileged".to_owned(), "yes".to_owned()),
        ]);
        keys::check(&config, None).unwrap();
        assert!(keys::check(&config, Some(crate::instance::InstanceKind::VirtualMachine)).is_err());
        let security = security(&config).unwrap();
        assert_eq!(security.sysctls["net.ipv4.ip_forward"], "1");
        assert_eq!(security.modules, ["br_netfilter", "overlay"]);
        assert_eq!(security.denied_calls[0].errno, Some(38));
        assert!(security.privileged && !super::security(&Config::new()).unwrap().privileged);
    }
}
