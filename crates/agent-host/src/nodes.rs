//! Device nodes of the host that guests are given: what the policy grants, and which nodes a graphics card has.

use crate::HostPolicy;
use karst_guest::ResolvedNode;
use karst_host::mountns::{DeviceNumber, device_number};
use karst_model::{Error, ErrorKind, Result, device::NodeOrigin, spec::NodeSpec};
use std::path::{Path, PathBuf};

/// The nodes of a device; none for one that is missing and may be left out.
///
/// # Errors
/// Forbidden when the policy does not grant it; not found; invalid when it is of another kind.
pub(crate) fn resolve(policy: &HostPolicy, spec: &NodeSpec) -> Result<Vec<ResolvedNode>> {
    let found = find(policy, spec, Path::new("/sys/class/drm"), Path::new("/dev/dri"));
    let named = |e: Error| match e.field.as_deref() {
        Some(field) if field.starts_with("devices.") => e,
        _ => e.at(format!("devices.{}.source", spec.name)),
    };
    match found.map_err(named) {
        Err(e) if e.is(ErrorKind::NotFound) && !spec.device.required => Ok(vec![]),
        other => other,
    }
}

/// `device_classes` of the policy: a class (`unix-char`), or one device of it (`unix-char:/dev/ttyUSB0`).
pub(crate) fn demand(policy: &HostPolicy, class: &str, device: Option<&str>) -> Result<()> {
    let one = device.map(|d| format!("{class}:{d}"));
    if policy.device_classes.iter().any(|c| c == class || Some(c) == one.as_ref()) {
        return Ok(());
    }
    let entry = one.unwrap_or_else(|| class.to_owned());
    Err(Error::forbidden(format!(
        "this host grants no guest such a device; its administrator can, with device_classes = [{entry:?}] in host-policy.toml"
    )))
}

/// `raw_keys` of the policy: configuration that reaches liblxc or dnsmasq as it is written. Of dnsmasq's, lines that would
/// make whoever writes them the host's root are refused all the same.
pub(crate) fn demand_raw(policy: &HostPolicy, key: &str) -> Result<()> {
    if policy.raw_keys.iter().any(|k| k == key) {
        return Ok(());
    }
    let what = match key {
        "raw.lxc" => "no guest raw.lxc, which would make it the host's root".to_owned(),
        key => format!("no {key}"),
    };
    Err(Error::forbidden(format!(
        "this host grants {what}; its administrator can, with raw_keys = [{key:?}] in host-policy.toml"
    ))
    .at(format!("config.{key}")))
}

/// `privileged_containers` of the policy.
pub(crate) fn demand_privileged(policy: &HostPolicy) -> Result<()> {
    if policy.privileged_containers {
        return Ok(());
    }
    Err(Error::forbidden(
        "this host grants no privileged containers, whose root is the host's root; its administrator can, with \
         privileged_containers = true in host-policy.toml",
    )
    .at("config.security.privileged"))
}

/// Modules that the kernel has neither loaded nor built in.
///
/// # Errors
/// Conflict, naming what loads them.
pub(crate) fn demand_modules(modules: &[String], sys: &Path, lib: &Path) -> Result<()> {
    if modules.is_empty() {
        return Ok(());
    }
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    // Without the list (as in containers) whatever is not loaded may be built in.
    let Ok(built_in) = std::fs::read_to_string(lib.join(release).join("modules.builtin")) else {
        return Ok(());
    };
    let same = |a: &str, b: &str| a.replace('-', "_") == b.replace('-', "_");
    let there = |name: &str| {
        sys.join(name.replace('-', "_")).is_dir()
            || built_in.lines().any(|l| {
                let file = l.rsplit('/').next().unwrap_or_default();
                file.strip_suffix(".ko").is_some_and(|n| same(n, name))
            })
    };
    let missing: Vec<&str> = modules.iter().map(String::as_str).filter(|m| !there(m)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    Err(Error::conflict(format!(
        "the host's kernel has not loaded {}; its administrator can: modprobe -a {names} (and for good in /etc/modules-load.d)",
        missing.join(", ")
    ))
    .at("config.linux.kernel_modules"))
}

fn find(policy: &HostPolicy, spec: &NodeSpec, drm: &Path, dri: &Path) -> Result<Vec<ResolvedNode>> {
    let device = &spec.device;
    let node = |name: String, path: String, number: DeviceNumber| ResolvedNode {
        name,
        path,
        device: number,
        uid: device.uid,
        gid: device.gid,
        mode: device.mode,
    };
    let class = |block: bool| if block { "unix-block" } else { "unix-char" };
    let path = || {
        let missing =
            || Error::invalid(format!("devices.{}.path", spec.name), "the path in the guest is missing");
        device.path.clone().ok_or_else(missing)
    };
    match &device.source {
        NodeOrigin::Path { block, path: source } => {
            demand(policy, class(*block), Some(source))?;
            let number = device_number(Path::new(source))?;
            if number.block != *block {
                return Err(Error::invalid(
                    format!("devices.{}.type", spec.name),
                    format!("{source:?} is a device of type {}", class(number.block)),
                ));
            }
            Ok(vec![node(spec.name.clone(), path()?, number)])
        }
        NodeOrigin::Number { block, major, minor } => {
            demand(policy, class(*block), Some(&format!("{major}:{minor}")))?;
            let number = DeviceNumber { block: *block, major: *major, minor: *minor };
            Ok(vec![node(spec.name.clone(), path()?, number)])
        }
        NodeOrigin::Usb(which) => {
            let mut nodes = vec![];
            for (name, path) in crate::given::usb_nodes(policy, which)? {
                let number = device_number(&path)?;
                let path = path.to_string_lossy().into_owned();
                nodes.push(node(format!("{}.{name}", spec.name), path, number));
            }
            Ok(nodes)
        }
        NodeOrigin::Gpu { card, pci } => {
            demand(policy, "gpu", pci.as_deref())?;
            let mut nodes = vec![];
            for name in cards(drm, *card, pci.as_deref())? {
                let path = dri.join(&name);
                let number = device_number(&path)?;
                let path = path.to_string_lossy().into_owned();
                nodes.push(node(format!("{}.{name}", spec.name), path, number));
            }
            if nodes.is_empty() {
                return Err(Error::not_found("this host has no such graphics card"));
            }
            Ok(nodes)
        }
    }
}

/// Names of the nodes (`card0`, `renderD128`) of the cards that are meant.
fn cards(drm: &Path, card: Option<u32>, pci: Option<&str>) -> Result<Vec<String>> {
    let entries = match std::fs::read_dir(drm) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => return Err(e.into()),
    };
    let mut all: Vec<(String, PathBuf)> = vec![];
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let number = name.strip_prefix("card").or_else(|| name.strip_prefix("renderD"));
        if number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
            && let Ok(device) = std::fs::canonicalize(entry.path().join("device"))
        {
            all.push((name, device));
        }
    }
    all.sort();
    let wanted = card.map(|n| format!("card{n}"));
    let meant = |device: &Path| {
        let address = device.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        pci.is_none_or(|pci| address == pci)
            && wanted.as_ref().is_none_or(|w| all.iter().any(|(name, d)| name == w && d == device))
    };
    Ok(all.iter().filter(|(_, d)| meant(d)).map(|(n, _)| n.clone()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::device::{NodeDevice, UsbMatch};

    fn spec(source: NodeOrigin) -> NodeSpec {
        let path = Some("/dev/thing".into());
        let device = NodeDevice { source, path, uid: 1, gid: 2, mode: 0o600, required: true };
        NodeSpec { name: "d".into(), device }
    }

    #[test]
    fn privileged_containers_are_the_policys_to_grant() {
        let e = demand_privileged(&HostPolicy::default()).unwrap_err();
        assert!(
            e.is(ErrorKind::Forbidden)
                && e.message.contains("privileged_containers = true in host-policy.toml")
        );
        assert_eq!(e.field.as_deref(), Some("config.security.privileged"));
        demand_privileged(&HostPolicy { privileged_containers: true, ..HostPolicy::default() }).unwrap();
    }

    #[test]
    fn only_what_the_policy_grants() {
        let null = |block| spec(NodeOrigin::Path { block, path: "/dev/null".into() });
        let grants = |classes: &[&str]| HostPolicy {
            device_classes: classes.iter().map(|c| (*c).to_owned()).collect(),
            ..HostPolicy::default()
        };
        for classes in [&[][..], &["unix-block"], &["unix-char:/dev/zero"]] {
            let e = resolve(&grants(classes), &null(false)).unwrap_err();
            assert!(e.is(ErrorKind::Forbidden) && e.message.contains("unix-char:/dev/null"), "{e}");
        }
        for classes in [["unix-char"], ["unix-char:/dev/null"]] {
            let found = resolve(&grants(&classes), &null(false)).unwrap().remove(0);
            assert_eq!((found.device.major, found.device.minor, found.path.as_str()), (1, 3, "/dev/thing"));
        }
        let e = resolve(&grants(&["unix-block"]), &null(true)).unwrap_err();
        assert_eq!(e.field.as_deref(), Some("devices.d.type"), "{e}");
        let mut missing = spec(NodeOrigin::Path { block: false, path: "/dev/none".into() });
        assert!(resolve(&grants(&["unix-char"]), &missing).unwrap_err().is(ErrorKind::NotFound));
        missing.device.required = false;
        assert_eq!(resolve(&grants(&["unix-char"]), &missing).unwrap(), []);
        let unplugged = UsbMatch { at: Some((999, 999)), ..UsbMatch::default() };
        missing.device.source = NodeOrigin::Usb(unplugged);
        assert_eq!(resolve(&grants(&["usb"]), &missing).unwrap(), []);
    }

    #[test]
    fn modules_are_there_or_named() {
        let dir = tempfile::tempdir().unwrap();
        let (sys, lib) = (dir.path().join("sys"), dir.path().join("lib"));
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        std::fs::create_dir_all(sys.join("br_netfilter")).unwrap();
        let check = |names: &[&str]| {
            demand_modules(&names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>(), &sys, &lib)
        };
        check(&["whatever"]).unwrap();
        std::fs::create_dir_all(lib.join(&release)).unwrap();
        std::fs::write(lib.join(&release).join("modules.builtin"), "kernel/fs/overlayfs/over-lay.ko\n")
            .unwrap();
        check(&["br-netfilter", "over_lay"]).unwrap();
        let e = check(&["over_lay", "wireguard"]).unwrap_err();
        assert!(e.message.contains("modprobe -a wireguard"), "{e}");
        let e = demand_raw(&HostPolicy::default(), "raw.lxc").unwrap_err();
        assert!(e.is(ErrorKind::Forbidden) && e.message.contains("raw_keys"), "{e}");
        demand_raw(&HostPolicy { raw_keys: vec!["raw.lxc".into()], ..HostPolicy::default() }, "raw.lxc")
            .unwrap();
    }

    #[test]
    fn a_card_is_all_its_nodes() {
        let dir = tempfile::tempdir().unwrap();
        let drm = dir.path().join("drm");
        let known = [("0000:01:00.0", ["card0", "renderD128"]), ("0000:02:00.0", ["card1", "renderD129"])];
        for (address, names) in known {
            std::fs::create_dir_all(dir.path().join(address)).unwrap();
            for name in names {
                std::fs::create_dir_all(drm.join(name)).unwrap();
                let link = drm.join(name).join("device");
                std::os::unix::fs::symlink(dir.path().join(address), link).unwrap();
            }
        }
        std::fs::create_dir_all(drm.join("card0-HDMI-A-1")).unwrap();
        assert_eq!(cards(&drm, Some(1), None).unwrap(), ["card1", "renderD129"]);
        assert_eq!(cards(&drm, None, Some("0000:01:00.0")).unwrap(), ["card0", "renderD128"]);
        assert_eq!(cards(&drm, None, None).unwrap().len(), 4);
        assert_eq!(cards(&drm, Some(7), None).unwrap(), [""; 0]);
    }
}
