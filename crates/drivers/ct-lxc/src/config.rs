//! The configuration that `lxc-start` gets. A pure function of the resolved guest and of what the host has.
//!
//! Vocabulary: `lxc.container.conf(5)` of LXC 5 and 6.

use karst_guest::ResolvedGuest;
use karst_model::{Error, Result, syscalls::DeniedCall};
use std::{
    fmt::Write,
    path::{Path, PathBuf},
};

/// What of this host the configuration depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostFeatures {
    /// All control groups are on v2.
    pub unified_cgroups: bool,
    /// AppArmor is on and takes profiles.
    pub apparmor: bool,
}

impl HostFeatures {
    /// Looks at this host.
    pub fn detect(unified_cgroups: bool) -> Self {
        Self { unified_cgroups, apparmor: crate::apparmor::usable() }
    }
}

/// Names of a guest's control groups, relative to each hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Groups {
    /// Limits, freezer and figures; the container's own groups lie below and it cannot reach this one.
    pub(crate) limits: String,
    /// The keeper.
    pub(crate) keeper: String,
    /// `lxc-start`.
    pub(crate) monitor: String,
    /// Where `lxc-start` goes while it removes the others; shared by all guests of the daemon.
    pub(crate) pivot: String,
}

impl Groups {
    pub(crate) fn of(daemon_id: &str, instance: karst_model::InstanceId) -> Self {
        let base = format!("karst-{daemon_id}");
        Self {
            limits: format!("{base}/{instance}"),
            keeper: format!("{base}/{instance}.keeper"),
            monitor: format!("{base}/{instance}.monitor"),
            pivot: format!("{base}/pivot"),
        }
    }

    /// The group that LXC makes for the container.
    pub(crate) fn container(&self) -> String {
        format!("{}/guest", self.limits)
    }

    /// The root of what the container sees.
    pub(crate) fn inner(&self) -> String {
        format!("{}/guest/ns", self.limits)
    }
}

/// Devices that a container may use, besides making nodes of any (which without a mapped owner is not permitted anyway):
/// null, zero, full, random, urandom, tty, console, ptmx, pts, fuse, tun.
const DEVICES: &[&str] = &[
    "c *:* m",
    "b *:* m",
    "c 1:3 rwm",
    "c 1:5 rwm",
    "c 1:7 rwm",
    "c 1:8 rwm",
    "c 1:9 rwm",
    "c 5:0 rwm",
    "c 5:1 rwm",
    "c 5:2 rwm",
    "c 136:* rwm",
    "c 10:229 rwm",
    "c 10:200 rwm",
];

/// Is a device, as control groups name it, every container's?
pub(crate) fn always_permitted(rule: &str) -> bool {
    DEVICES.contains(&rule)
}

/// The system call filter, in liblxc's format: what is refused even to a root without rights on the host. The helper that
/// enters containers applies the same.
pub(crate) const SECCOMP: &str = "\
2
denylist
reject_force_umount
[all]
kexec_load errno 1
kexec_file_load errno 1
open_by_handle_at errno 1
init_module errno 1
finit_module errno 1
delete_module errno 1
";

fn line(value: &str, field: &str) -> Result<()> {
    // The format has one setting a line and no escapes.
    if value.contains(['\n', '\r', '\0']) {
        return Err(Error::invalid(field, "must not contain line breaks or NUL"));
    }
    Ok(())
}

fn path(value: &Path, field: &str) -> Result<String> {
    let text = value.to_str().ok_or_else(|| Error::invalid(field, "is no UTF-8 path"))?;
    line(text, field)?;
    Ok(text.to_owned())
}

/// The configuration file of a guest.
///
/// # Errors
/// Invalid, with the field, for a value that the format cannot hold.
pub fn render(guest: &ResolvedGuest, host: HostFeatures) -> Result<String> {
    let groups = Groups::of(&guest.daemon_id, guest.instance);
    let mut out = String::new();
    // Writing to a string does not fail.
    let mut set = |key: &str, value: &str| {
        let _ = writeln!(out, "{key} = {value}");
    };
    line(&guest.hostname, "name")?;
    set("lxc.uts.name", &guest.hostname);
    let root = crate::disks::root(guest);
    set("lxc.rootfs.path", &format!("dir:{}", path(&root, "devices.root")?));
    for kind in ["u", "g"].into_iter().filter(|_| !guest.security.privileged) {
        let ids = guest.ids;
        set("lxc.idmap", &format!("{kind} 0 {} {}", ids.base, ids.count));
    }

    set("lxc.cgroup.dir.container", &groups.container());
    set("lxc.cgroup.dir.container.inner", "ns");
    set("lxc.cgroup.dir.monitor", &groups.monitor);
    set("lxc.cgroup.dir.monitor.pivot", &groups.pivot);
    let devices = if host.unified_cgroups { "lxc.cgroup2.devices" } else { "lxc.cgroup.devices" };
    set(&format!("{devices}.deny"), "a");
    for device in DEVICES {
        set(&format!("{devices}.allow"), device);
    }
    for disk in crate::disks::wanted(guest)? {
        if let Some(rule) = disk.node.map(|n| n.rule()).filter(|r| !always_permitted(r)) {
            set(&format!("{devices}.allow"), &rule);
        }
    }

    set("lxc.autodev", "1");
    set("lxc.tty.max", "0");
    set("lxc.pty.max", "1024");
    set("lxc.mount.auto", "proc:mixed sys:mixed cgroup:mixed");
    for device in ["fuse", "net/tun"] {
        set("lxc.mount.entry", &format!("/dev/{device} dev/{device} none bind,create=file,optional 0 0"));
    }
    if guest.security.guest_api.is_some() {
        path(&guest.state_dir, "state directory")?;
        for mount in crate::guest_api::mounts(&guest.state_dir) {
            set("lxc.mount.entry", &mount);
        }
    }
    if let Some(application) = &guest.application {
        let program = &application.program;
        line(&program.cwd, "config.oci.cwd")?;
        set("lxc.init.cwd", &program.cwd);
        if let Some(n) = program.stop_signal.filter(|n| !karst_model::signal::is_signal(*n)) {
            return Err(Error::invalid("config.image.stop_signal", format!("{n} is no signal")));
        }
        for (key, id) in [("uid", program.uid), ("gid", program.gid)] {
            if id >= guest.inside().count {
                let text = format!("the container has users and groups below {} only", guest.inside().count);
                return Err(Error::invalid(format!("config.oci.{key}"), text));
            }
            set(&format!("lxc.init.{key}"), &id.to_string());
        }
        // What an init would have mounted.
        set("lxc.mount.entry", "tmpfs dev/shm tmpfs nosuid,nodev,noexec,mode=1777,size=64m,create=dir 0 0");
    }
    if guest.security.nesting {
        // The kernel lets a nested user namespace mount a fresh proc and sysfs only where a full one is visible.
        set("lxc.mount.entry", "proc dev/.lxc/proc proc create=dir,optional 0 0");
        set("lxc.mount.entry", "sys dev/.lxc/sys sysfs create=dir,optional 0 0");
    }

    set("lxc.mount.fstab", &path(&crate::disks::fstab(&guest.state_dir), "state directory")?);

    set("lxc.cap.drop", "sys_time sys_module sys_rawio mac_admin mac_override");
    set("lxc.seccomp.profile", &path(&seccomp_file(&guest.state_dir), "state directory")?);
    if host.apparmor {
        set("lxc.apparmor.profile", &crate::apparmor::profile(&guest.daemon_id, guest.security.privileged));
    }

    if let Some(priority) = guest.limits.oom_priority {
        set("lxc.proc.oom_score_adj", &priority.min(1000).to_string());
    }
    for (name, value) in &guest.security.sysctls {
        let field = format!("config.linux.sysctl.{name}");
        line(name, &field)?;
        line(value, &field)?;
        set(&format!("lxc.sysctl.{name}"), value);
    }
    for (name, limit) in &guest.limits.kernel {
        if !karst_model::spec::KERNEL_LIMITS.contains(&name.as_str()) {
            return Err(Error::invalid(
                format!("config.limits.kernel.{name}"),
                "is no resource of the kernel",
            ));
        }
        let text = |n: Option<u64>| n.map_or("unlimited".to_owned(), |n| n.to_string());
        set(&format!("lxc.prlimit.{name}"), &format!("{}:{}", text(limit.soft), text(limit.hard)));
    }

    // The others are made by us (`nics`).
    let ports: Vec<_> = guest.nics.iter().filter_map(|n| Some((n, n.bridge()?))).collect();
    if ports.is_empty() {
        set("lxc.net.0.type", "empty");
    }
    for (i, (nic, bridge)) in ports.into_iter().enumerate() {
        for (value, field) in [
            (bridge, "network"),
            (nic.guest_name.as_str(), "name"),
            (nic.mac.as_str(), "hwaddr"),
            (nic.host_interface.as_str(), "host_name"),
        ] {
            line(value, &format!("devices.{}.{field}", nic.name))?;
        }
        let mut net = |key: &str, value: &str| set(&format!("lxc.net.{i}.{key}"), value);
        net("type", "veth");
        net("veth.pair", &nic.host_interface);
        net("link", bridge);
        net("name", &nic.guest_name);
        net("hwaddr", &nic.mac);
        net("flags", "up");
        if let Some(mtu) = nic.mtu {
            net("mtu", &mtu.to_string());
        }
        let given = guest.application.as_ref().and_then(|a| a.addresses.get(&nic.name));
        if let Some((address, gateway)) = given {
            net("ipv4.address", &address.to_string());
            if let Some(gateway) = gateway {
                net("ipv4.gateway", &gateway.to_string());
            }
        }
    }
    if !guest.environment.contains_key("PATH") {
        set("lxc.environment", &format!("PATH={}", crate::attach::PATH));
    }
    for (k, v) in &guest.environment {
        let field = format!("config.environment.{k}");
        line(k, &field)?;
        line(v, &field)?;
        set("lxc.environment", &format!("{k}={v}"));
    }
    // Last, as the administrator of the host has granted it: it may say anything.
    if let Some(raw) = &guest.security.raw_lxc {
        out.push_str(raw);
        out.push('\n');
    }
    Ok(out)
}

/// The system call filter of a guest, in liblxc's format.
pub(crate) fn seccomp(denied: &[DeniedCall]) -> String {
    let line = |call: &DeniedCall| match call.errno {
        Some(n) => format!("{} errno {n}\n", call.name),
        None => format!("{} kill\n", call.name),
    };
    SECCOMP.to_owned() + &denied.iter().map(line).collect::<String>()
}

/// Where the system call filter of a guest lies.
pub(crate) fn seccomp_file(state_dir: &Path) -> PathBuf {
    state_dir.join("lxc.seccomp")
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_guest::{DiskFormat, IdRange, ResolvedLink, ResolvedNic, samples};
    use karst_model::instance::{Generation, InstanceKind};

    fn guest() -> ResolvedGuest {
        let root = samples::disk("root", "scsi0", "/var/lib/karst/volumes/v/rootfs", DiskFormat::Directory);
        let nic = samples::nic("00:16:3e:01:02:03", "vab12cd0001", "karstbr0");
        ResolvedGuest {
            instance: "6c0f7f0e-0000-4000-8000-000000000001".parse().unwrap(),
            generation: Generation { incarnation: 1, n: 3 },
            spec_version: 7,
            domain_id: 2,
            daemon_id: "ab12cd".into(),
            hostname: "c1".into(),
            state_dir: "/var/lib/karst/guests/x".into(),
            ids: IdRange { base: 1_000_000, count: 65_536 },
            nics: vec![ResolvedNic { mtu: Some(1400), ..nic }],
            environment: [("A".to_owned(), "b c".to_owned())].into(),
            ..samples::guest(InstanceKind::Container, root)
        }
    }

    #[test]
    fn configuration_on_hybrid_control_groups() {
        let host = HostFeatures { unified_cgroups: false, apparmor: false };
        insta::assert_snapshot!(render(&guest(), host).unwrap());
    }

    #[test]
    fn configuration_on_v2_with_apparmor_and_nesting_and_no_nic() {
        let host = HostFeatures { unified_cgroups: true, apparmor: true };
        let mut guest = guest();
        guest.security.nesting = true;
        guest.security.guest_api = Some(Default::default());
        guest.nics.clear();
        insta::assert_snapshot!(render(&guest, host).unwrap());
    }

    #[test]
    fn a_privileged_container_has_no_map_and_keeps_its_confinement() {
        for unified_cgroups in [false, true] {
            let host = HostFeatures { unified_cgroups, apparmor: true };
            let mut guest = guest();
            let ordinary = render(&guest, host).unwrap();
            guest.security.privileged = true;
            let text = render(&guest, host).unwrap();
            let lost: Vec<_> = ordinary.lines().filter(|l| !text.lines().any(|t| t == *l)).collect();
            let profile = "lxc.apparmor.profile = lxc-karst-ab12cd";
            assert_eq!(lost, ["lxc.idmap = u 0 1000000 65536", "lxc.idmap = g 0 1000000 65536", profile]);
            let new: Vec<_> = text.lines().filter(|l| !ordinary.lines().any(|o| o == *l)).collect();
            assert_eq!(new, [format!("{profile}-privileged")]);
            for kept in ["lxc.cap.drop = sys_time sys_module", "lxc.seccomp.profile"] {
                assert!(text.contains(kept), "{kept}");
            }
        }
    }

    #[test]
    fn settings_of_the_kernel_and_what_the_host_granted() {
        let host = HostFeatures { unified_cgroups: true, apparmor: false };
        let mut guest = guest();
        guest.limits.oom_priority = Some(500);
        guest.security.sysctls.insert("net.ipv4.ip_forward".into(), "1".into());
        guest.security.raw_lxc = Some("lxc.mount.auto = cgroup:rw".into());
        let text = render(&guest, host).unwrap();
        assert!(
            text.contains("\nlxc.proc.oom_score_adj = 500\nlxc.sysctl.net.ipv4.ip_forward = 1\n"),
            "{text}"
        );
        assert!(text.ends_with("\nlxc.mount.auto = cgroup:rw\n"), "{text}");
        guest.security.sysctls.insert("net.x".into(), "1\nlxc.idmap =".into());
        let e = render(&guest, host).unwrap_err();
        assert_eq!(e.field.as_deref(), Some("config.linux.sysctl.net.x"));
        let calls = karst_model::syscalls::parse("x", "keyctl errno 38\nptrace").unwrap();
        assert!(seccomp(&calls).ends_with("delete_module errno 1\nkeyctl errno 38\nptrace kill\n"));
    }

    #[test]
    fn an_application_has_its_program_and_addresses() {
        let host = HostFeatures { unified_cgroups: true, apparmor: false };
        let mut guest = guest();
        let program = karst_model::image::Application {
            command: vec!["/bin/x".into()],
            cwd: "/srv".into(),
            uid: 101,
            gid: 102,
            environment: Default::default(),
            stop_signal: None,
        };
        let address = ("10.1.2.3/24".parse().unwrap(), Some("10.1.2.1".parse().unwrap()));
        guest.application = Some(karst_guest::ResolvedApplication {
            program,
            addresses: [("eth0".to_owned(), address)].into(),
            ..Default::default()
        });
        let text = render(&guest, host).unwrap();
        for line in [
            "lxc.init.cwd = /srv",
            "lxc.init.uid = 101",
            "lxc.init.gid = 102",
            "lxc.net.0.ipv4.address = 10.1.2.3/24",
            "lxc.net.0.ipv4.gateway = 10.1.2.1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}: {text}");
        }
        guest.application.as_mut().unwrap().program.uid = 70_000;
        assert_eq!(render(&guest, host).unwrap_err().field.as_deref(), Some("config.oci.uid"));
    }

    #[test]
    fn a_value_cannot_smuggle_in_a_setting() {
        let host = HostFeatures { unified_cgroups: true, apparmor: false };
        let mut bad = guest();
        bad.environment.insert("X".into(), "1\nlxc.hook.start-host = /bin/evil".into());
        let e = render(&bad, host).unwrap_err();
        assert_eq!(e.field.as_deref(), Some("config.environment.X"));
        let mut bad = guest();
        bad.nics[0].link = ResolvedLink::Bridge("br0\nlxc.idmap =".into());
        assert_eq!(render(&bad, host).unwrap_err().field.as_deref(), Some("devices.eth0.network"));
    }
}
