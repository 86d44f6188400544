//! Domains as XML: an instance's expanded configuration in libvirt's words.

use super::{
    Element,
    machine::{
        ShownGuard, owned,
        places::Places,
        sizes::{self, Cpus},
        write::Shown,
    },
};
use crate::{
    calls::{
        connect::facts,
        domain::{TITLE, is_running},
    },
    domain_id, domain_uuid,
    error::VirError,
    limits,
    session::{Call, Driver},
};
use karst_engine::{
    InstanceView,
    compute::expand::{ParsedDevices, parse_devices},
    screens::ScreenListener,
};
use karst_model::{
    Config,
    device::{Devices, DiskOrigin},
    instance::DeviceIdentity,
    keys::CRASH_ACTION,
    keys_machine,
    node::{AcceleratorKind, HostFacts},
    screens::{ScreenOptions, Screens},
    storage::VolumeContent,
    uplink::NetworkKind,
};

/// A NIC with what the instance's record keeps of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// Name of the network; empty when it is on none.
    pub network: String,
    /// MAC address.
    pub mac: String,
    /// The host's interface.
    pub host_interface: String,
}

/// NICs of a guest: those that it runs with, else those of its next start.
///
/// # Errors
/// Invalid, when its devices are.
pub fn nics(view: &InstanceView) -> Result<Vec<Nic>, VirError> {
    let devices = view.run().map_or(&view.expanded_devices, |run| &run.devices);
    let parsed = parse_devices(devices)?;
    let with = |name: &str| view.identity(name, devices);
    Ok(parsed
        .nics
        .iter()
        .filter_map(|(name, nic)| {
            let identity = with(name)?;
            Some(Nic {
                network: nic.network().unwrap_or_default().to_owned(),
                mac: identity.mac.clone()?,
                host_interface: identity.host_interface.clone().unwrap_or_default(),
            })
        })
        .collect())
}

/// The document of a domain; `inactive`: as it will be at the next start.
///
/// # Errors
/// Invalid, when its configuration is; those of the engine.
pub fn document(call: &Call, view: &InstanceView, inactive: bool) -> Result<String, VirError> {
    shown(call, view, inactive, false)
}

/// The same; `secure`: with the password of the screen, for who may change the domain.
///
/// # Errors
/// Those of [`document`], and access denied.
pub fn shown(call: &Call, view: &InstanceView, inactive: bool, secure: bool) -> Result<String, VirError> {
    let live = is_running(view) && !inactive;
    // What it runs with may differ from what it will start with.
    let applied = view.runtime.as_ref().and_then(|r| r.applied.as_ref()).filter(|_| live);
    let config = applied.map_or(&view.expanded_config, |a| &a.config);
    let devices = applied.map_or(&view.expanded_devices, |a| &a.devices);
    let session = &call.session;
    let (engine, context) = (&session.front.engine, &session.context);
    let (project, name) = (&view.project.name, &view.instance.name);
    let state = engine.display_state(context, project, name)?;
    let guard = match (state.password, secure) {
        (false, _) => None,
        (true, false) => Some(ShownGuard { password: None, valid_to: state.valid_to }),
        (true, true) => engine
            .display_password(context, project, name)?
            .map(|guard| ShownGuard { password: Some(guard.password), valid_to: guard.valid_to }),
    };
    document_of(call, view, config, devices, live, (guard, &state.listeners))
}

/// The document of a domain with these keys and devices, expanded.
///
/// # Errors
/// Invalid, when they are; those of the engine.
pub fn document_of(
    call: &Call,
    view: &InstanceView,
    config: &Config,
    devices: &Devices,
    live: bool,
    (guard, listeners): (Option<ShownGuard>, &[ScreenListener]),
) -> Result<String, VirError> {
    let driver = call.opened()?.driver;
    let facts = facts(call)?;
    let limits = limits::of_config(view.instance.kind, config)?;
    let (memory, current) = (limits.most_memory_kib(call)?, limits.memory_kib(call)?);
    let cpus = Cpus { current: limits.cpus(call)?, most: limits.most_cpus(call)? };
    let pinned = limits.pinned().map(ranges);
    let instance = &view.instance;
    let records = call.session.front.engine.inner().inventory.read();
    let bridge = |network: &str| {
        let found = records.network(instance.project, network).ok();
        let of_host =
            found.filter(|n| n.kind == NetworkKind::HostBridge).and_then(|n| n.config.get("parent"));
        of_host.map_or(found.map_or(network, |n| n.interface()), String::as_str).to_owned()
    };
    let bridge: &dyn Fn(&str) -> String = &bridge;
    if let (Driver::Qemu, Some(hardware)) = (driver, &instance.hardware) {
        let kind = match view.runtime.as_ref().and_then(|r| r.accelerator.as_deref()) {
            Some("kvm") => "kvm",
            None if facts.accelerator.kind == AcceleratorKind::Kvm => "kvm",
            _ => "qemu",
        };
        let disc = |pool: &str, volume: &str| {
            let found = records.custom_volume(instance.project, pool, volume);
            found.is_some_and(|v| v.content == VolumeContent::Iso)
        };
        let layers = |pool: &str, volume: &str| {
            let own = volume == super::machine::owned(&instance.name);
            let found = match own {
                true => records.volumes.get(&instance.root),
                false => records.custom_volume(instance.project, pool, volume),
            };
            let all = found.map(|v| v.layers.all.as_slice()).unwrap_or_default();
            all.iter().map(|l| l.name.clone()).collect::<Vec<_>>()
        };
        let layers = &layers;
        let id = Some(domain_id(view)).filter(|_| live);
        let disc = &disc;
        let spice = hardware.display && speaks_spice(config, live.then_some(&facts));
        let places = Places { screens: Screens::of(config)?, options: ScreenOptions::of(config) };
        let listeners = live.then_some(listeners);
        let shown = Shown {
            view,
            hardware,
            config,
            devices,
            kind,
            id,
            memory,
            current,
            cpus,
            pinned,
            spice,
            places,
            listeners,
            guard,
            layers,
            disc,
            bridge,
        };
        return super::machine::write::document(&shown);
    }
    let mut e = Element::new("domain")
        .with("type", "lxc")
        .with_some("id", Some(domain_id(view)).filter(|_| live))
        .child(Element::text("name", &instance.name))
        .child(Element::text("uuid", domain_uuid(view)));
    if let Some(title) = config.get(TITLE) {
        e.push(Element::text("title", title));
    }
    if !instance.description.is_empty() {
        e.push(Element::text("description", &instance.description));
    }
    e.push_some(super::machine::write::metadata(config));
    e.push(Element::text("memory", memory).with("unit", "KiB"));
    e.push(Element::text("currentMemory", current).with("unit", "KiB"));
    e.push(sizes::shown(cpus, pinned.as_ref(), false));
    container(&mut e, &facts, &parse_devices(devices)?, view, live.then_some(bridge));
    Ok(e.document())
}

/// Is the screen of a machine of this configuration there by SPICE too? A host that cannot starts it without.
pub fn speaks_spice(config: &Config, running_on: Option<&HostFacts>) -> bool {
    keys_machine::spice(config) && running_on.is_none_or(|facts| facts.spice)
}

/// `0,1,2,5` as `0-2,5`.
pub fn ranges(cpus: &[u32]) -> String {
    let mut parts: Vec<(u32, u32)> = vec![];
    for cpu in cpus {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == *cpu => *last = *cpu,
            _ => parts.push((*cpu, *cpu)),
        }
    }
    let one = |(a, b): &(u32, u32)| if a == b { a.to_string() } else { format!("{a}-{b}") };
    parts.iter().map(one).collect::<Vec<_>>().join(",")
}

/// The key that says whether a guest that crashed starts again.
pub const AUTORESTART: &str = "boot.autorestart";

/// Does a guest of this configuration start again when it crashed?
pub fn restarts(config: &Config) -> bool {
    karst_model::keys::optional_flag(config, AUTORESTART) == Some(true)
}

/// The key that says what comes of a system that restarts its machine.
pub const REBOOT_ACTION: &str = "boot.reboot_action";

/// Does a guest of this configuration end when it restarts?
pub fn ends_on_reboot(config: &Config) -> bool {
    config.get(REBOOT_ACTION).is_some_and(|a| a == "stop")
}

/// What becomes of a guest of this configuration that crashed, in libvirt's words.
pub fn on_crash(config: &Config) -> &'static str {
    match config.get(CRASH_ACTION).is_some_and(|action| action == "halt") {
        true => "preserve",
        false if restarts(config) => "restart",
        false => "destroy",
    }
}

/// What happens when a guest ends.
pub fn ends(e: &mut Element, config: &Config) {
    e.push(Element::new("clock").with("offset", "utc"));
    e.push(Element::text("on_poweroff", "destroy"));
    e.push(Element::text("on_reboot", if ends_on_reboot(config) { "destroy" } else { "restart" }));
    e.push(Element::text("on_crash", on_crash(config)));
}

/// `bridge`: of one that runs, the bridge of a network.
fn container(
    e: &mut Element,
    facts: &HostFacts,
    parsed: &ParsedDevices,
    view: &InstanceView,
    bridge: Option<&dyn Fn(&str) -> String>,
) {
    let kind = Element::text("type", "exe").with("arch", &facts.architecture);
    e.push(Element::new("os").child(kind).child(Element::text("init", "/sbin/init")));
    ends(e, &view.expanded_config);
    let mut devices = Element::new("devices");
    devices.push(Element::text("emulator", "/usr/bin/lxc-start"));
    // Owners of what is a container's own are in its range of ids; those of a path of the host are what they are, unless shifted.
    let mounted = |(kind, source, shifted): (&str, Element, bool), path: &str, readonly: bool| {
        let mut f = Element::new("filesystem")
            .with("type", kind)
            .with("accessmode", if shifted { "mapped" } else { "passthrough" })
            .child(source)
            .child(Element::new("target").with("dir", path));
        if readonly {
            f.push(Element::new("readonly"));
        }
        f
    };
    let volume = |pool: &str, volume: &str| Element::new("source").with("pool", pool).with("volume", volume);
    let root = volume(&parsed.root.1.pool, &owned(&view.instance.name));
    devices.push(mounted(("volume", root, true), "/", false));
    for (_, device) in parsed.disks.iter().filter(|(_, d)| d.attached) {
        let Some(path) = &device.path else { continue };
        let what = match &device.source {
            DiskOrigin::Volume { pool, volume: name } => ("volume", volume(pool, name), true),
            DiskOrigin::Host { path } => ("mount", Element::new("source").with("dir", path), device.shift),
            DiskOrigin::Memory { size } => {
                // Without a size it is half of the host's memory.
                let size = size.map_or(facts.memory / 2, |s| s.bytes()) / 1024;
                ("ram", Element::new("source").with("usage", size).with("units", "KiB"), true)
            }
        };
        devices.push(mounted(what, path, device.readonly));
    }
    for (name, nic) in parsed.nics.iter().filter(|(_, nic)| nic.attached) {
        let Some(identity) = view.instance.identities.get(name) else { continue };
        let guest = nic.name.as_ref().unwrap_or(name);
        let network = nic.network().unwrap_or_default();
        let bridge = bridge.map(|of| of(network));
        let i =
            interface(identity, network, bridge.as_deref()).child(Element::new("guest").with("dev", guest));
        devices.push(i);
    }
    devices.push(
        Element::new("console")
            .with("type", "pty")
            .child(Element::new("target").with("type", "lxc").with("port", 0)),
    );
    e.push(devices);
}

/// What interfaces of both kinds of guests have; of those that run also the `bridge`.
pub(super) fn interface(identity: &DeviceIdentity, network: &str, bridge: Option<&str>) -> Element {
    let mut e = Element::new("interface").with("type", "network");
    e.push(Element::new("mac").with("address", identity.mac.as_deref().unwrap_or_default()));
    e.push(Element::new("source").with("network", network).with_some("bridge", bridge));
    if let Some(name) = identity.host_interface.as_deref().filter(|_| bridge.is_some()) {
        e.push(Element::new("target").with("dev", name));
    }
    e
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_cpus() {
        assert_eq!(ranges(&[0, 1, 2, 5]), "0-2,5");
        assert_eq!(ranges(&[]), "");
    }
}
