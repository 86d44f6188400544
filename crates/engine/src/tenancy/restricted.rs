//! Restrictions of projects (`restricted.*`): what configuration and devices may not say there, whoever says it.
//!
//! They look at keys as written, so that a key or device type that is new to the platform is refused until it is
//! allowed.

use super::rules::{ProjectRules, SPOOFING};
use karst_model::{Config, Error, Result, device::Devices, instance::InstanceKind, keys, screens};

const CONTAINER_LOWLEVEL: &[&str] = &[
    "boot.host_shutdown_",
    "linux.kernel_modules",
    "linux.sysctl.",
    "raw.apparmor",
    "raw.idmap",
    "raw.lxc",
    "raw.seccomp",
    "security.guestapi.images",
    "security.idmap.base",
    "security.idmap.size",
];
const MACHINE_LOWLEVEL: &[&str] = &[
    "boot.host_shutdown_",
    // Properties of threads; how many there are is free.
    "hardware.iothreads.",
    "hardware.main_thread.pool",
    "hardware.memory",
    "hardware.numa.host",
    "hardware.numa.memory",
    "hardware.numa.placement",
    "hardware.numa.policy",
    "hardware.video.render",
    "limits.cpu.shares",
    "limits.memory.hugepages",
    "limits.memory.nodes",
    "raw.apparmor",
    "raw.idmap",
    "raw.qemu",
];
/// What takes virtualization from a processor, whatever its model: Intel's and AMD's.
const NO_NESTING: &[&str] = &["-vmx", "-svm"];
/// Keys by which a machine has ports of the host.
const SCREENS: &[&str] = &[screens::SPICE, screens::VNC, screens::WEBSOCKET];
/// Interceptions that `allow` includes; the others need `full`.
const HARMLESS_INTERCEPTION: &[&str] = &[
    "security.syscalls.intercept.mknod",
    "security.syscalls.intercept.setxattr",
    "security.syscalls.intercept.sysinfo",
    "security.syscalls.intercept.sched_setscheduler",
];

fn refusal(field: String, restriction: &str, what: &str) -> Error {
    Error::forbidden(format!("{what} is not allowed in this project (its {restriction})")).at(field)
}

fn is_on(config: &Config, key: &str) -> bool {
    config.get(key).is_some_and(|v| !v.is_empty() && keys::parse_bool(key, v).unwrap_or(true))
}

/// Demands that expanded configuration and devices conform. Without a kind (a profile) they must for both.
///
/// # Errors
/// Forbidden, naming the key or device and the restriction.
pub(crate) fn check(
    rules: &ProjectRules,
    kind: Option<InstanceKind>,
    config: &Config,
    devices: &Devices,
) -> Result<()> {
    if rules.restricted.is_none() {
        return Ok(());
    }
    if kind != Some(InstanceKind::VirtualMachine) {
        containers(rules, kind, config)?;
    }
    if kind != Some(InstanceKind::Container) {
        machines(rules, kind, config)?;
    }
    for (name, keys) in devices {
        device(rules, name, keys)?;
    }
    Ok(())
}

fn lowlevel(rules: &ProjectRules, restriction: &str, list: &[&str], config: &Config) -> Result<()> {
    if rules.restriction(restriction) == Some("allow") {
        return Ok(());
    }
    let low = |k: &&String| list.iter().any(|l| k.starts_with(l));
    match config.iter().filter(|(_, v)| !v.is_empty()).map(|(k, _)| k).find(low) {
        Some(key) => Err(refusal(format!("config.{key}"), restriction, &format!("{key:?}"))),
        None => Ok(()),
    }
}

fn containers(rules: &ProjectRules, kind: Option<InstanceKind>, config: &Config) -> Result<()> {
    lowlevel(rules, "restricted.containers.lowlevel", CONTAINER_LOWLEVEL, config)?;
    let nesting = "restricted.containers.nesting";
    // A profile may be meant for virtual machines, where nesting is another matter.
    if kind.is_some() && rules.restriction(nesting) == Some("block") && is_on(config, "security.nesting") {
        return Err(refusal("config.security.nesting".into(), nesting, "nesting of containers"));
    }
    let privilege = "restricted.containers.privilege";
    let level = rules.restriction(privilege);
    if level != Some("allow") && is_on(config, "security.privileged") {
        return Err(refusal("config.security.privileged".into(), privilege, "a privileged container"));
    }
    if level == Some("isolated") && kind.is_some() && !is_on(config, "security.idmap.isolated") {
        let what = "a container without security.idmap.isolated=true";
        return Err(refusal("config.security.idmap.isolated".into(), privilege, what));
    }
    let interception = "restricted.containers.interception";
    let allowed = rules.restriction(interception).unwrap_or("full");
    for key in config.keys().filter(|k| k.starts_with("security.syscalls.intercept.") && is_on(config, k)) {
        let harmless = HARMLESS_INTERCEPTION.contains(&key.as_str());
        if allowed == "block" || (allowed == "allow" && !harmless) {
            return Err(refusal(format!("config.{key}"), interception, &format!("{key:?}")));
        }
    }
    Ok(())
}

fn machines(rules: &ProjectRules, kind: Option<InstanceKind>, config: &Config) -> Result<()> {
    let low = "restricted.virtual-machines.lowlevel";
    lowlevel(rules, low, MACHINE_LOWLEVEL, config)?;
    // Ports of the host. Without a word of where, a screen listens in projects that may only.
    let port = |(key, value): &(&String, &String)| {
        SCREENS.contains(&key.as_str()) && !value.is_empty() && *value != "auto"
    };
    if let (false, Some((key, _))) = (may_listen(rules), config.iter().find(port)) {
        return Err(refusal(format!("config.{key}"), low, "a port of the host"));
    }
    // They are memory of the host beside what the limits count.
    let sized = |word: &str| ["tcg-cache=", "dirty-ring="].iter().any(|name| word.trim().starts_with(name));
    if rules.restriction(low) != Some("allow")
        && config.get("hardware.features").is_some_and(|all| all.split(',').any(sized))
    {
        return Err(refusal("config.hardware.features".into(), low, "a size of QEMU's own memory"));
    }
    // A profile need not say the model. Nothing after these flags brings virtualization back: QEMU takes what `-` takes last.
    let nesting = "restricted.virtual-machines.nesting";
    let flags = config.get("hardware.cpu.model").map_or("", String::as_str).split(',').skip(1);
    let lacks = |flag: &str| flags.clone().all(|f| f != flag);
    if kind.is_some() && rules.restriction(nesting) == Some("block") && NO_NESTING.iter().copied().any(lacks)
    {
        let what = "a processor with virtualization (without it: hardware.cpu.model=host,-vmx,-svm)";
        return Err(refusal("config.hardware.cpu.model".into(), nesting, what));
    }
    Ok(())
}

/// May screens of the project's machines take ports of the host?
pub(crate) fn may_listen(rules: &ProjectRules) -> bool {
    let low = "restricted.virtual-machines.lowlevel";
    rules.restricted.is_none() || rules.restriction(low) == Some("allow")
}

/// Demands that backups may be made in the project: they leave it whole.
///
/// # Errors
/// Forbidden.
pub(crate) fn check_backup(rules: &ProjectRules) -> Result<()> {
    let key = "restricted.backups";
    match rules.restriction(key) {
        None | Some("allow") => Ok(()),
        Some(_) => Err(Error::forbidden(format!("a backup is not allowed in this project (its {key})"))),
    }
}

/// Demands that snapshots may be taken in the project.
///
/// # Errors
/// Forbidden.
pub(crate) fn check_snapshot(rules: &ProjectRules) -> Result<()> {
    let key = "restricted.snapshots";
    match rules.restriction(key) {
        None | Some("allow") => Ok(()),
        Some(_) => Err(Error::forbidden(format!("a snapshot is not allowed in this project (its {key})"))),
    }
}

/// Demands that the project may fetch from an image server: `https://HOST[:PORT][/PATH]`. A host that is listed without a
/// port may be asked at any.
///
/// # Errors
/// Forbidden.
pub(crate) fn check_image_server(rules: &ProjectRules, server: &str) -> Result<()> {
    let key = "restricted.images.servers";
    let rest = server.split_once("://").map_or(server, |(_, rest)| rest);
    let place = rest.split('/').next().unwrap_or_default();
    let host = match place.rsplit_once(':') {
        // Not within the brackets of an IPv6 address.
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => place,
    };
    let listed = |name: &str| rules.lists_ignoring_case(key, name);
    match listed(place) || listed(host) {
        true => Ok(()),
        false => Err(refusal("source.server".into(), key, &format!("the image server {place:?}"))),
    }
}

/// Demands that the project may use a pool.
///
/// # Errors
/// Forbidden.
pub(crate) fn check_pool(rules: &ProjectRules, pool: &str) -> Result<()> {
    let key = "restricted.storage-pools.access";
    match rules.lists(key, pool) {
        true => Ok(()),
        false => Err(refusal("pool".into(), key, &format!("the storage pool {pool:?}"))),
    }
}

fn device(rules: &ProjectRules, name: &str, keys: &std::collections::BTreeMap<String, String>) -> Result<()> {
    let get = |k: &str| keys.get(k).map_or("", String::as_str);
    let field = |k: &str| format!("devices.{name}.{k}");
    let pool = get("pool");
    if !pool.is_empty() && !rules.lists("restricted.storage-pools.access", pool) {
        let what = format!("the storage pool {pool:?}");
        return Err(refusal(field("pool"), "restricted.storage-pools.access", &what));
    }
    match get("type") {
        "none" => Ok(()),
        // Its own, which every instance has; a custom volume in its place is a disk as any other.
        "disk" if get("path") == "/" && get("source").is_empty() => Ok(()),
        // In the guest's own memory.
        "disk"
            if get("source") == "tmpfs:" && rules.restriction("restricted.devices.disk") != Some("block") =>
        {
            Ok(())
        }
        "disk" => {
            let restriction = "restricted.devices.disk";
            match rules.restriction(restriction).unwrap_or("allow") {
                "allow" if pool.is_empty() => disk_path(rules, field("source"), get("source")),
                "managed" if pool.is_empty() => {
                    Err(refusal(field("source"), restriction, "a disk that is no volume of a pool"))
                }
                "block" if get("path") == "/" => {
                    Err(refusal(field("source"), restriction, "a root disk that is a custom volume"))
                }
                "block" => Err(refusal(field("type"), restriction, "a disk beside the root")),
                _ => Ok(()),
            }
        }
        // What it is read from is as much the host's as a disk.
        "kernel" => {
            let restriction = "restricted.devices.disk";
            let initrd_pool = get("initrd.pool");
            if !initrd_pool.is_empty() && !rules.lists("restricted.storage-pools.access", initrd_pool) {
                let what = format!("the storage pool {initrd_pool:?}");
                return Err(refusal(field("initrd.pool"), "restricted.storage-pools.access", &what));
            }
            for key in ["source", "initrd"].into_iter().filter(|k| get(k).starts_with('/')) {
                match rules.restriction(restriction).unwrap_or("allow") {
                    "allow" => disk_path(rules, field(key), get(key))?,
                    _ => return Err(refusal(field(key), restriction, "a file of the host")),
                }
            }
            match rules.restriction(restriction) {
                Some("block") => Err(refusal(field("type"), restriction, "a kernel beside the root")),
                _ => Ok(()),
            }
        }
        "nic" => {
            let restriction = "restricted.devices.nic";
            let network = get("network");
            match rules.restriction(restriction).unwrap_or("allow") {
                "block" => return Err(refusal(field("type"), restriction, "a NIC")),
                "managed" if network.is_empty() => {
                    return Err(refusal(field("network"), restriction, "a NIC without a managed network"));
                }
                _ => {}
            }
            // They are on there whatever is said; whoever wants them off is told.
            let off = |k: &&&str| keys.get(**k).is_some_and(|v| !v.is_empty() && !is_on(keys, k));
            if let Some(key) = rules.filters().iter().find(off).filter(|_| !network.is_empty()) {
                return Err(refusal(field(key), SPOOFING, &format!("a NIC without {key}")));
            }
            let on = if network.is_empty() { get("parent") } else { network };
            match on.is_empty() || rules.lists("restricted.networks.access", on) {
                true => Ok(()),
                false => {
                    let what = format!("the network {on:?}");
                    Err(refusal(field("network"), "restricted.networks.access", &what))
                }
            }
        }
        // To who attaches, or to nobody; what leads to the host is as a port of the host's.
        "port" if ["path", "address", "log"].iter().all(|key| get(key).is_empty()) || may_listen(rules) => {
            Ok(())
        }
        "port" => {
            let low = "restricted.virtual-machines.lowlevel";
            Err(refusal(field("to"), low, "a port that leads to the host"))
        }
        // What is typed and pointed at the host, and what listens there for all machines, is nearer to it than a port.
        "input" | "vsock" if may_listen(rules) => Ok(()),
        "input" | "vsock" => {
            let low = "restricted.virtual-machines.lowlevel";
            Err(refusal(field("type"), low, "a device of input, or sockets, of the host"))
        }
        other => {
            let restriction = format!("restricted.devices.{other}");
            match rules.restriction(&restriction) {
                Some("allow") => Ok(()),
                _ => Err(refusal(field("type"), &restriction, &format!("a device of type {other:?}"))),
            }
        }
    }
}

/// Paths of the host below those that the project lists; whether the host grants them is its own policy's business.
fn disk_path(rules: &ProjectRules, field: String, source: &str) -> Result<()> {
    let key = "restricted.devices.disk.paths";
    let list = rules.restriction(key).unwrap_or_default();
    let below = |prefix: &str| {
        let prefix = prefix.trim().trim_end_matches('/');
        source == prefix || source.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('/'))
    };
    match list.trim().is_empty() || list.split(',').any(below) {
        true => Ok(()),
        false => Err(refusal(field, key, &format!("the path {source:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> std::collections::BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
    }

    fn rules(pairs: &[(&str, &str)]) -> ProjectRules {
        let mut config = map(pairs);
        config.insert("restricted".into(), "true".into());
        ProjectRules::parse(&config).unwrap()
    }

    fn refused(
        rules: &ProjectRules,
        kind: Option<InstanceKind>,
        config: &[(&str, &str)],
        keys: &[(&str, &str)],
    ) -> Option<String> {
        let devices = if keys.is_empty() { Devices::new() } else { Devices::from([("d".into(), map(keys))]) };
        check(rules, kind, &map(config), &devices).err().map(|e| e.field.unwrap_or_default())
    }

    #[test]
    fn backups_are_made_where_they_are_allowed() {
        let rules = |pairs: &[(&str, &str)]| ProjectRules::parse(&map(pairs)).unwrap();
        check_backup(&rules(&[("restricted.backups", "block")])).expect("it is not restricted");
        check_backup(&rules(&[("restricted", "true"), ("restricted.backups", "allow")])).unwrap();
        for pairs in
            [&[("restricted", "true")][..], &[("restricted", "true"), ("restricted.backups", "block")]]
        {
            let e = check_backup(&rules(pairs)).unwrap_err();
            assert!(e.message.contains("restricted.backups"), "{e}");
        }
    }

    #[test]
    fn snapshots_and_image_servers_are_those_that_are_allowed() {
        let free = ProjectRules::parse(&map(&[
            ("restricted.snapshots", "block"),
            ("restricted.images.servers", "images.example"),
        ]))
        .unwrap();
        check_snapshot(&free).expect("it is not restricted");
        check_image_server(&free, "https://elsewhere.example").expect("nor is this");
        check_snapshot(&rules(&[("restricted.snapshots", "allow")])).unwrap();
        assert!(check_snapshot(&rules(&[])).unwrap_err().message.contains("restricted.snapshots"));
        check_image_server(&rules(&[]), "https://any.example/x").expect("without a list all are");
        let list =
            rules(&[("restricted.images.servers", "Images.example, [2001:db8::1], other.example:8443")]);
        for (server, fine) in [
            ("https://images.example", true),
            ("https://IMAGES.example:8443/path", true),
            ("https://images.example.evil.example", false),
            ("https://evil.example/images.example", false),
            ("https://other.example:8443", true),
            ("https://other.example", false),
            ("https://[2001:db8::1]:443/x", true),
            ("https://[2001:db8::2]", false),
        ] {
            let said = check_image_server(&list, server);
            assert_eq!(said.is_ok(), fine, "{server}");
            if let Err(e) = said {
                assert_eq!(e.field.as_deref(), Some("source.server"));
            }
        }
    }

    #[test]
    fn by_default_only_what_is_harmless_and_managed() {
        let strict = rules(&[]);
        let ct = Some(InstanceKind::Container);
        let vm = Some(InstanceKind::VirtualMachine);
        for (kind, config) in [
            (ct, ("security.privileged", "true")),
            (ct, ("security.nesting", "true")),
            (ct, ("raw.lxc", "x")),
            (ct, ("linux.sysctl.net.ipv4.ip_forward", "1")),
            (ct, ("security.syscalls.intercept.mount", "true")),
            (vm, ("raw.qemu.conf", "x")),
            (vm, ("hardware.features", "vmcoreinfo, tcg-cache=4095")),
            (None, ("hardware.features", "dirty-ring=65536")),
            (None, ("security.privileged", "true")),
            (None, ("raw.qemu", "x")),
        ] {
            assert_eq!(refused(&strict, kind, &[config], &[]), Some(format!("config.{}", config.0)));
        }
        for (kind, config) in [
            (ct, ("security.privileged", "false")),
            (vm, ("security.nesting", "true")),
            (vm, ("hardware.features", "vmcoreinfo")),
            (ct, ("limits.memory", "1GiB")),
            (ct, ("raw.lxc", "")),
        ] {
            assert_eq!(refused(&strict, kind, &[config], &[]), None, "{config:?}");
        }
        for (keys, field) in [
            (&[("type", "disk"), ("path", "/"), ("pool", "p")][..], None),
            (&[("type", "disk"), ("path", "/d"), ("pool", "p"), ("source", "v")], None),
            (&[("type", "disk"), ("path", "/d"), ("source", "/etc")], Some("devices.d.source")),
            (&[("type", "nic"), ("network", "n")], None),
            (&[("type", "nic"), ("network", "n"), ("security.mac_filtering", "true")], None),
            (
                &[("type", "nic"), ("network", "n"), ("security.mac_filtering", "false")],
                Some("devices.d.security.mac_filtering"),
            ),
            (
                &[("type", "nic"), ("network", "n"), ("security.ipv6_filtering", "0")],
                Some("devices.d.security.ipv6_filtering"),
            ),
            (&[("type", "nic"), ("nictype", "bridged"), ("parent", "br0")], Some("devices.d.network")),
            (&[("type", "gpu")], Some("devices.d.type")),
            (&[("type", "proxy")], Some("devices.d.type")),
            (&[("type", "kernel"), ("source", "k"), ("pool", "default")], None),
            (&[("type", "kernel"), ("source", "/k")], Some("devices.d.source")),
            (
                &[("type", "kernel"), ("source", "k"), ("pool", "default"), ("initrd", "/i")],
                Some("devices.d.initrd"),
            ),
            (&[("type", "port"), ("port", "serial"), ("number", "1")], None),
            (&[("type", "port"), ("port", "serial"), ("to", "null"), ("log", "/l")], Some("devices.d.to")),
            (
                &[("type", "port"), ("port", "serial"), ("to", "tcp"), ("address", "::1")],
                Some("devices.d.to"),
            ),
            (&[("type", "disk"), ("tag", "t"), ("source", "/etc")], Some("devices.d.source")),
            (&[("type", "usb"), ("vendorid", "046d")], Some("devices.d.type")),
            (&[("type", "input"), ("source", "/dev/input/event3")], Some("devices.d.type")),
            (&[("type", "vsock")], Some("devices.d.type")),
            (&[("type", "something-new")], Some("devices.d.type")),
            (&[("type", "none")], None),
        ] {
            assert_eq!(refused(&strict, ct, &[], keys).as_deref(), field, "{keys:?}");
        }
    }

    #[test]
    fn machines_in_machines_need_a_processor_that_can() {
        let blocked = rules(&[("restricted.virtual-machines.nesting", "block")]);
        let vm = Some(InstanceKind::VirtualMachine);
        let field = Some("config.hardware.cpu.model".to_owned());
        assert_eq!(
            refused(&blocked, vm, &[], &[]),
            field,
            "the model that a machine has by itself is the host's"
        );
        for model in
            ["host", "host,-vmx", "EPYC-v4,-svm", "host,-vmx,+svm", "host,vmx=off,svm=off", "-vmx,-svm"]
        {
            assert_eq!(refused(&blocked, vm, &[("hardware.cpu.model", model)], &[]), field, "{model}");
        }
        for model in ["host,-vmx,-svm", "max,+avx2,-svm,-vmx"] {
            assert_eq!(refused(&blocked, vm, &[("hardware.cpu.model", model)], &[]), None, "{model}");
        }
        for kind in [None, Some(InstanceKind::Container)] {
            assert_eq!(refused(&blocked, kind, &[], &[]), None, "{kind:?}");
        }
        assert_eq!(refused(&rules(&[]), vm, &[], &[]), None, "allowed where nothing is said");
    }

    #[test]
    fn ports_of_the_host_are_allowed_with_other_low_level_keys() {
        let strict = rules(&[]);
        let vm = Some(InstanceKind::VirtualMachine);
        for key in [screens::VNC, screens::WEBSOCKET] {
            let field = format!("config.{key}");
            assert_eq!(refused(&strict, vm, &[(key, "5901")], &[]), Some(field), "{key}");
            assert_eq!(refused(&strict, vm, &[(key, "auto")], &[]), None, "it listens nowhere");
        }
        let low = rules(&[("restricted.virtual-machines.lowlevel", "allow")]);
        assert_eq!(refused(&low, vm, &[(screens::VNC, "127.0.0.1:5901")], &[]), None);
        assert!(may_listen(&low) && !may_listen(&strict));
    }

    #[test]
    fn where_disks_are_blocked_the_root_is_the_instances_own() {
        let blocked = rules(&[("restricted.devices.disk", "block")]);
        let own = [("type", "disk"), ("path", "/"), ("pool", "p")];
        let custom = [("type", "disk"), ("path", "/"), ("pool", "p"), ("source", "v")];
        for kind in [None, Some(InstanceKind::VirtualMachine)] {
            assert_eq!(refused(&blocked, kind, &[], &own), None);
            assert_eq!(refused(&blocked, kind, &[], &custom).as_deref(), Some("devices.d.source"));
            assert_eq!(refused(&rules(&[]), kind, &[], &custom), None, "managed includes it");
        }
        let host = [("type", "disk"), ("path", "/"), ("source", "/dev/sda")];
        assert_eq!(refused(&rules(&[]), None, &[], &host).as_deref(), Some("devices.d.source"));
    }

    #[test]
    fn what_is_allowed_is_allowed_as_far_as_it_says() {
        let r = rules(&[
            ("restricted.containers.privilege", "isolated"),
            ("restricted.containers.interception", "allow"),
            ("restricted.devices.disk", "allow"),
            ("restricted.devices.disk.paths", "/srv/a,/srv/b/"),
            ("restricted.networks.access", "n1"),
            ("restricted.storage-pools.access", "p1"),
            ("restricted.devices.gpu", "allow"),
        ]);
        let ct = Some(InstanceKind::Container);
        let isolated = ("security.idmap.isolated", "true");
        assert_eq!(refused(&r, ct, &[], &[]).as_deref(), Some("config.security.idmap.isolated"));
        assert_eq!(refused(&r, ct, &[isolated], &[]), None);
        let mknod = ("security.syscalls.intercept.mknod", "true");
        assert_eq!(refused(&r, ct, &[isolated, mknod], &[]), None);
        let mount = ("security.syscalls.intercept.mount", "true");
        assert!(refused(&r, ct, &[isolated, mount], &[]).is_some());
        for (keys, fine) in [
            (&[("type", "disk"), ("path", "/d"), ("source", "/srv/a/x")][..], true),
            (&[("type", "disk"), ("path", "/d"), ("source", "/srv/b")], true),
            (&[("type", "disk"), ("path", "/d"), ("source", "/srv/ax")], false),
            (&[("type", "disk"), ("path", "/"), ("pool", "p2")], false),
            (&[("type", "nic"), ("network", "n1")], true),
            (&[("type", "nic"), ("network", "n2")], false),
            (&[("type", "gpu")], true),
            (&[("type", "kernel"), ("source", "/srv/a/k"), ("initrd", "/srv/b/i")], true),
            (&[("type", "kernel"), ("source", "/srv/a/k"), ("initrd", "/srv/c/i")], false),
            (&[("type", "kernel"), ("source", "/srv/a/k"), ("initrd", "i"), ("initrd.pool", "p2")], false),
        ] {
            assert_eq!(refused(&r, ct, &[isolated], keys).is_none(), fine, "{keys:?}");
        }
    }
}
