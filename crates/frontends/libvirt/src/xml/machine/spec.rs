//! From the typed form to the engine's words: keys, devices and places of a new machine, or of one that is there. Of one that
//! is there only what the document changes is changed, so that what libvirt has no word for stays.

use super::{Disk, Kernel, Machine, Nic, Source, hostdevs, places::Places, refuse, shares, sizes, tuning};
use crate::{
    calls::domain::{METADATA, OPAQUE, TITLE},
    error::VirError,
    xml::domain::{AUTORESTART, REBOOT_ACTION},
};
use karst_engine::compute::define::Place;
use karst_model::{
    Config,
    board::Board,
    device::{
        DISK_BUSES, DISK_CACHES, DRIVE_FORMATS, Devices, DiskRate, DriveFormat, NIC_MODELS, NicModel, Rates,
        is_disc_name,
    },
    encryption::SECRET,
    instance::{DeviceIdentity, Firmware},
    keys::CRASH_ACTION,
    keys_machine::SPICE,
};
use std::collections::BTreeMap;

type Keys = BTreeMap<String, String>;

/// The key that says that the memory of a machine can be kept.
const STATEFUL: &str = "migration.stateful";

/// A new machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Created {
    /// Configuration.
    pub config: Config,
    /// Devices.
    pub devices: Devices,
    /// Where they are.
    pub places: BTreeMap<String, Place>,
}

/// What is there already.
pub struct Present<'a> {
    /// As its document says now.
    pub machine: &'a Machine,
    /// Its own configuration.
    pub config: &'a Config,
    /// Its own devices.
    pub devices: &'a Devices,
    /// All its devices, those of profiles too.
    pub expanded: &'a Devices,
    /// What they are.
    pub identities: &'a BTreeMap<String, DeviceIdentity>,
}

fn set(keys: &mut Keys, key: impl Into<String>, value: Option<impl ToString>) {
    match value {
        Some(value) => drop(keys.insert(key.into(), value.to_string())),
        None => drop(keys.remove(&key.into())),
    }
}

fn yes(flag: bool) -> Option<&'static str> {
    flag.then_some("true")
}

fn firmware(config: &mut Config, firmware: Firmware) {
    let (csm, secure) = match firmware {
        Firmware::Bios => ("true", "false"),
        Firmware::Uefi => ("false", "false"),
        Firmware::UefiSecure => ("false", "true"),
    };
    set(config, "security.csm", Some(csm));
    set(config, "security.secureboot", Some(secure));
}

fn cpus(machine: &Machine) -> String {
    match machine.pinned.as_ref().filter(|_| tuning::is_set(machine)) {
        // A set of one would read as a number of processors.
        Some(one) if one.trim().parse::<u32>().is_ok() => format!("{0}-{0}", one.trim()),
        Some(set) => set.clone(),
        None => machine.cpus.to_string(),
    }
}

fn memory(machine: &Machine) -> String {
    format!("{}KiB", machine.current)
}

/// The key that keeps an element of applications, and its value.
fn metadata(uri: &str, prefix: &str, e: &crate::xml::Element) -> (String, String) {
    (format!("{METADATA}{uri}"), format!("{prefix}\n{}", e.document().trim_end()))
}

fn disk(keys: &mut Keys, disk: &Disk, root: bool) {
    set(keys, "type", Some("disk"));
    set(keys, "attached", disk.source.is_none().then_some("false"));
    match &disk.source {
        Some(Source::Volume { pool, volume }) => {
            set(keys, "pool", Some(pool));
            set(keys, "source", Some(volume));
        }
        Some(Source::Path(path)) => {
            set(keys, "pool", None::<&str>);
            set(keys, "source", Some(path));
        }
        // What was in the drive stays named, and is not in it.
        None => {}
    }
    set(keys, "io.bus", DISK_BUSES.iter().find(|(_, b)| *b == disk.bus).map(|(n, _)| n));
    set(keys, "io.cache", DISK_CACHES.iter().find(|(_, c)| Some(*c) == disk.cache).map(|(n, _)| n));
    set(keys, "io.thread", disk.thread);
    set(keys, "io.options", disk.options.text());
    set(keys, SECRET, disk.secret.as_ref());
    for (key, value) in rates(&disk.rates) {
        set(keys, key, value);
    }
    set(keys, "boot.priority", disk.boot);
    if let Some(source) = &disk.source {
        let path = match source {
            Source::Path(path) => Some(path),
            Source::Volume { .. } => None,
        };
        let format = DRIVE_FORMATS.iter().find(|(_, f)| path.is_some() && *f == disk.format);
        set(keys, "format", format.filter(|(_, f)| *f != DriveFormat::Raw).map(|(name, _)| name));
        // Said where its name says something else.
        let media = path.filter(|p| is_disc_name(p) != disk.cdrom);
        set(keys, "media", media.map(|_| if disk.cdrom { "cdrom" } else { "disk" }));
    }
    match root {
        true => set(keys, "path", Some("/")),
        // Drives of discs are read-only by nature.
        false => {
            set(keys, "readonly", yes(disk.readonly && !disk.cdrom));
            set(keys, "required", disk.optional.then_some("false"));
        }
    }
}

/// Keys of a disk that limit its rates, with their values: of all of them, so that none of before stays.
pub fn rates(all: &Rates) -> [(&'static str, Option<String>); 4] {
    let limit = |limit: Option<DiskRate>| {
        limit.map(|limit| match limit {
            DiskRate::Bytes { per_second } => per_second.to_string(),
            DiskRate::Operations { per_second } => format!("{per_second}iops"),
        })
    };
    let (read, write, text) = match all.plain() {
        Some(limits) => (limit(limits.read), limit(limits.write), None),
        None => (None, None, all.text()),
    };
    [("limits.max", None), ("limits.read", read), ("limits.write", write), ("limits.rates", text)]
}

fn nic(keys: &mut Keys, nic: &Nic) {
    set(keys, "type", Some("nic"));
    keys.retain(|k, _| !matches!(k.as_str(), "nictype" | "parent" | "limits.max"));
    set(keys, "network", nic.network.as_ref());
    set(keys, "nictype", nic.network.is_none().then_some("user"));
    if let Some(mac) = &nic.mac {
        set(keys, "hwaddr", Some(mac));
    }
    let model = NIC_MODELS.iter().find(|(_, m)| nic.model != NicModel::Virtio && *m == nic.model);
    set(keys, "io.bus", model.map(|(name, _)| name));
    set(keys, "io.options", nic.options.text());
    set(keys, "connected", (!nic.connected).then_some("false"));
    set(keys, "mtu", nic.mtu);
    set(keys, "boot.priority", nic.boot);
    set(keys, "security.mac_filtering", yes(nic.mac_filter));
    set(keys, "security.ipv4_filtering", yes(nic.ip_filter));
    set(keys, "security.ipv6_filtering", yes(nic.ip_filter));
    // Without a word the reserved ones stay, which have a document of their own: the network's.
    if let Some(address) = nic.addresses.0 {
        set(keys, "ipv4.address", Some(address));
    }
    if let Some(address) = nic.addresses.1 {
        set(keys, "ipv6.address", Some(address));
    }
    set(keys, "security.port_isolation", yes(nic.isolated));
    set(keys, "portgroup", nic.group.as_ref());
    let kbit = |n: Option<u64>| n.map(|n| format!("{n}kbit"));
    let kib = |n: Option<u64>| n.map(|n| format!("{n}KiB"));
    let [to, from] = nic.limits;
    set(keys, "limits.ingress", kbit(to.average));
    set(keys, "limits.ingress.peak", kbit(to.peak));
    set(keys, "limits.ingress.burst", kib(to.burst));
    set(keys, "limits.egress", kbit(from.average));
    set(keys, "limits.egress.peak", kbit(from.peak));
    set(keys, "limits.egress.burst", kib(from.burst));
}

fn kernel(keys: &mut Keys, kernel: &Kernel) {
    *keys = Keys::from([("type".to_owned(), "kernel".to_owned())]);
    let mut pool_of_kernel = None;
    match &kernel.kernel {
        Source::Volume { pool, volume } => {
            pool_of_kernel = Some(pool);
            set(keys, "pool", Some(pool));
            set(keys, "source", Some(volume));
        }
        Source::Path(path) => set(keys, "source", Some(path)),
    }
    match &kernel.initrd {
        Some(Source::Volume { pool, volume }) => {
            set(keys, "initrd", Some(volume));
            set(keys, "initrd.pool", Some(pool).filter(|p| Some(*p) != pool_of_kernel));
        }
        Some(Source::Path(path)) => set(keys, "initrd", Some(path)),
        None => {}
    }
    set(keys, "cmdline", kernel.cmdline.as_ref());
}

/// The disk that is the root: of the volumes that can be written the one that boots first. A machine without one gets a root
/// that its guest does not see.
fn root(machine: &Machine) -> Option<&Disk> {
    let can =
        |d: &&Disk| !d.cdrom && !d.readonly && !d.optional && matches!(d.source, Some(Source::Volume { .. }));
    machine.disks.iter().filter(can).reduce(|a, b| if b.boot > a.boot { b } else { a })
}

/// Can the memory of such a machine be kept? What it shares with its host, what of the host's it has, and devices whose other end speaks
/// of them are another thing later.
fn can_be_kept(machine: &Machine) -> bool {
    let spoken_of = machine.ports.iter().any(|port| port.device.place.is_device());
    machine.filesystems.is_empty() && machine.given.is_empty() && !spoken_of
}

/// The keys of what is on its board, as it is to be.
fn board(config: &mut Config, was: &Board, is: &Board) {
    change_keys(config, was.keys(), is.keys());
}

/// Those of where its screens listen.
fn screens(config: &mut Config, was: &Places, is: &Places) {
    change_keys(config, was.screens.keys(), is.screens.keys());
    change_keys(config, was.options.keys(), is.options.keys());
}

fn change_keys<T: IntoIterator<Item = (&'static str, Option<String>)>>(config: &mut Config, was: T, is: T) {
    for ((key, was), (_, is)) in was.into_iter().zip(is) {
        if was != is {
            // An empty value takes back what a profile says.
            let none = is.is_none() && !config.contains_key(key);
            set(config, key, is.or_else(|| none.then(String::new)));
        }
    }
}

/// A new machine.
///
/// # Errors
/// None as yet.
pub fn create(machine: &Machine) -> Result<Created, VirError> {
    let mut config = Config::new();
    let mut devices = Devices::new();
    let mut places = BTreeMap::new();
    set(&mut config, "limits.memory", Some(memory(machine)));
    set(&mut config, "limits.cpu", Some(cpus(machine)));
    sizes::change(&mut config, None, machine);
    set(&mut config, "hardware.machine", Some(machine.machine.as_deref().unwrap_or("pc")));
    set(&mut config, "hardware.cpu.model", machine.cpu_model.as_ref());
    board(&mut config, &Board::default(), &machine.board);
    set(&mut config, "hardware.balloon", (!machine.balloon).then_some("false"));
    set(&mut config, "hardware.boot_menu", yes(machine.boot_menu));
    set(&mut config, SPICE, yes(machine.spice));
    screens(&mut config, &Places::default(), &machine.places);
    set(&mut config, "hardware.clock", machine.local_time.then_some("localtime"));
    set(&mut config, "hardware.hyperv", yes(machine.hyper_v));
    set(&mut config, AUTORESTART, yes(machine.restarts));
    set(&mut config, CRASH_ACTION, machine.preserved.then_some("halt"));
    set(&mut config, REBOOT_ACTION, machine.ends_on_reboot.then_some("stop"));
    tuning::change(&mut config, None, machine);
    firmware(&mut config, machine.firmware);
    // So that saving and snapshots with memory are there, as they are with libvirt: of a machine that has something of its host's they are not.
    set(&mut config, STATEFUL, Some(can_be_kept(machine).to_string()));
    set(&mut config, TITLE, machine.title.as_ref());
    for (uri, (prefix, e)) in &machine.metadata {
        let (key, value) = metadata(uri, prefix, e);
        set(&mut config, key, Some(value));
    }
    set(&mut config, OPAQUE, Some(machine.opaque.document()));
    let root = root(machine).map(|disk| &disk.target);
    for one in machine.disks.iter().filter(|d| d.source.is_some()) {
        disk(devices.entry(one.target.clone()).or_default(), one, Some(&one.target) == root);
        let (alias, pci) = (one.alias.clone(), one.pci.clone());
        places.insert(one.target.clone(), Place { slot: one.slot.clone(), alias, pci });
    }
    for (n, one) in machine.nics.iter().enumerate() {
        let name = format!("net{n}");
        nic(devices.entry(name.clone()).or_default(), one);
        places.insert(name.clone(), Place { slot: name, alias: one.alias.clone(), pci: one.pci.clone() });
    }
    if let Some(one) = &machine.kernel {
        kernel(devices.entry("kernel0".into()).or_default(), one);
    }
    if machine.tpm {
        let keys = devices.entry("tpm0".into()).or_default();
        set(keys, "type", Some("tpm"));
        set(keys, SECRET, machine.tpm_secret);
    }
    devices.extend(machine.ports.iter().map(|port| (port.name.clone(), port.keys())));
    for (n, one) in machine.filesystems.iter().enumerate() {
        let name = format!("filesystem{n}");
        shares::set(devices.entry(name.clone()).or_default(), one, None);
        let (slot, alias, pci) = (format!("fs{n}"), one.alias.clone(), one.pci.clone());
        places.insert(name, Place { slot, alias, pci });
    }
    hostdevs::change(&mut devices, &Devices::new(), &[], &machine.given);
    Ok(Created { config, devices, places })
}

/// A machine that is there, as a new document wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Updated {
    /// Its own configuration.
    pub config: Config,
    /// Its own devices.
    pub devices: Devices,
    /// Slots of new disks, by their devices.
    pub slots: BTreeMap<String, String>,
}

/// What a new document makes of a machine that is there.
///
/// # Errors
/// CONFIG_UNSUPPORTED for what is fixed since it was made.
pub fn update(present: &Present<'_>, new: &Machine) -> Result<Updated, VirError> {
    let old = present.machine;
    let mut config = present.config.clone();
    if old.current != new.current {
        set(&mut config, "limits.memory", Some(memory(new)));
    }
    if cpus(old) != cpus(new) {
        set(&mut config, "limits.cpu", Some(cpus(new)));
    }
    let most = |m: &Machine| (m.memory, m.current, m.cpus, m.most_cpus, m.board.topology);
    if most(old) != most(new) {
        sizes::change(&mut config, Some(old), new);
    }
    tuning::change(&mut config, Some(old), new);
    let family = |m: &str| if m.starts_with("pc-q35-") || m == "q35" { "q35" } else { "pc" };
    let (was, is) = (old.machine.as_deref().unwrap_or("pc"), new.machine.as_deref());
    if is.is_some_and(|is| is != was && is != family(was)) {
        return Err(refuse("os machine", format!("it is {was} and fixed since the machine was made")));
    }
    if old.cpu_model != new.cpu_model {
        set(&mut config, "hardware.cpu.model", new.cpu_model.as_ref());
    }
    board(&mut config, &old.board, &new.board);
    if old.balloon != new.balloon {
        set(&mut config, "hardware.balloon", Some(new.balloon.to_string()));
    }
    if old.boot_menu != new.boot_menu {
        set(&mut config, "hardware.boot_menu", yes(new.boot_menu));
    }
    if old.spice != new.spice {
        set(&mut config, SPICE, Some(new.spice.to_string()));
    }
    screens(&mut config, &old.places, &new.places);
    if old.local_time != new.local_time {
        set(&mut config, "hardware.clock", Some(if new.local_time { "localtime" } else { "utc" }));
    }
    if old.hyper_v != new.hyper_v {
        set(&mut config, "hardware.hyperv", Some(new.hyper_v.to_string()));
    }
    if old.restarts != new.restarts {
        set(&mut config, AUTORESTART, Some(new.restarts.to_string()));
    }
    if old.preserved != new.preserved {
        set(&mut config, CRASH_ACTION, Some(if new.preserved { "halt" } else { "stop" }));
    }
    if old.ends_on_reboot != new.ends_on_reboot {
        set(&mut config, REBOOT_ACTION, Some(if new.ends_on_reboot { "stop" } else { "restart" }));
    }
    if old.firmware != new.firmware {
        firmware(&mut config, new.firmware);
    }
    match (can_be_kept(old), can_be_kept(new)) {
        (true, false) => set(&mut config, STATEFUL, Some("false")),
        // Only what was taken back is given again.
        (false, true) if config.get(STATEFUL).is_some_and(|v| v == "false") => {
            set(&mut config, STATEFUL, Some("true"));
        }
        _ => {}
    }
    set(&mut config, TITLE, new.title.as_ref());
    for uri in old.metadata.keys().filter(|uri| !new.metadata.contains_key(*uri)) {
        config.remove(&format!("{METADATA}{uri}"));
    }
    for (uri, (prefix, e)) in new.metadata.iter().filter(|(uri, m)| old.metadata.get(*uri) != Some(m)) {
        let (key, value) = metadata(uri, prefix, e);
        set(&mut config, key, Some(value));
    }
    set(&mut config, OPAQUE, Some(new.opaque.document()));
    let devices = devices(present, new)?;
    let is_new = |name: &String| devices.contains_key(name) && !present.expanded.contains_key(name);
    let slots = new.disks.iter().filter(|d| is_new(&d.target)).map(|d| (d.target.clone(), d.slot.clone()));
    Ok(Updated { config, slots: slots.collect(), devices })
}

/// The name of the device at a slot, or with a MAC address.
fn device_of<'a>(present: &'a Present<'_>, is: impl Fn(&DeviceIdentity) -> bool) -> Option<&'a String> {
    present.identities.iter().find(|(n, i)| present.expanded.contains_key(*n) && is(i)).map(|(n, _)| n)
}

fn devices(present: &Present<'_>, new: &Machine) -> Result<Devices, VirError> {
    let old = present.machine;
    let mut devices = present.devices.clone();
    let mut wanted: BTreeMap<String, Option<Keys>> = BTreeMap::new();
    let is_root = |keys: &Keys| keys.get("path").is_some_and(|p| p == "/");
    for one in &new.disks {
        let name = device_of(present, |i| i.slot == one.slot).unwrap_or(&one.target);
        let mut keys = present.expanded.get(name).cloned().unwrap_or_default();
        let before = old.disks.iter().find(|d| d.slot == one.slot);
        let same = |d: &Disk| Disk { alias: None, pci: None, ..d.clone() };
        if before.map(same) == Some(same(one)) {
            wanted.insert(name.clone(), None);
            continue;
        }
        if keys.is_empty() && one.source.is_none() {
            // An empty drive that the machine does not have yet.
            continue;
        }
        let (is_root, own) = (is_root(&keys), !keys.contains_key("source"));
        disk(&mut keys, one, is_root);
        if is_root && own && before.is_some_and(|b| b.source == one.source) {
            // It is shown by the name of the instance and has none of its own.
            keys.remove("source");
        }
        wanted.insert(name.clone(), Some(keys));
    }
    for one in &new.nics {
        let known = one.mac.as_ref().and_then(|mac| device_of(present, |i| i.mac.as_ref() == Some(mac)));
        let before = old.nics.iter().find(|n| n.mac.is_some() && n.mac == one.mac);
        let same = |n: &Nic| Nic { alias: None, pci: None, ..n.clone() };
        match known {
            Some(name) if before.map(same) == Some(same(one)) => drop(wanted.insert(name.clone(), None)),
            Some(name) => {
                let mut keys = present.expanded.get(name).cloned().unwrap_or_default();
                nic(&mut keys, one);
                wanted.insert(name.clone(), Some(keys));
            }
            None => {
                let taken = |n: &String| present.expanded.contains_key(n) || wanted.contains_key(n);
                let name = (0..).map(|n| format!("net{n}")).find(|n| !taken(n)).unwrap_or_default();
                let mut keys = Keys::new();
                nic(&mut keys, one);
                wanted.insert(name, Some(keys));
            }
        }
    }
    let known: BTreeMap<String, &String> = present
        .expanded
        .iter()
        .filter_map(|(name, keys)| Some((shares::tag_of(name, keys, present.identities.get(name)?)?, name)))
        .collect();
    for one in &new.filesystems {
        match known.get(&one.tag) {
            Some(name) if old.filesystems.iter().any(|f| f.is(one)) => {
                wanted.insert((*name).clone(), None);
            }
            Some(name) => {
                let mut keys = present.expanded.get(*name).cloned().unwrap_or_default();
                let own = keys.contains_key("tag");
                shares::set(&mut keys, one, Some(one.tag.as_str()).filter(|_| !own));
                wanted.insert((*name).clone(), Some(keys));
            }
            None => {
                let taken = |n: &String| present.expanded.contains_key(n) || wanted.contains_key(n);
                let name = (0..).map(|n| format!("filesystem{n}")).find(|n| !taken(n)).unwrap_or_default();
                let mut keys = Keys::new();
                shares::set(&mut keys, one, None);
                wanted.insert(name, Some(keys));
            }
        }
    }
    for (name, keys) in present.expanded {
        let shown = match keys.get("type").map(String::as_str) {
            // Its guest does not see it.
            Some("disk") if is_root(keys) && keys.get("attached").is_some_and(|a| a == "false") => false,
            Some("disk") if is_root(keys) => !wanted.contains_key(name),
            Some("disk") if keys.contains_key("path") || keys.contains_key("tag") => {
                known.values().any(|known| *known == name)
            }
            Some("disk") => true,
            Some("nic") => true,
            Some("tpm") => {
                if new.tpm {
                    let mut changed = keys.clone();
                    set(&mut changed, SECRET, new.tpm_secret);
                    wanted.insert(name.clone(), (changed != *keys).then_some(changed));
                }
                true
            }
            _ => false,
        };
        if !shown || wanted.contains_key(name) {
            continue;
        }
        if is_root(keys) {
            return Err(refuse(
                "disk",
                "the root disk of a machine stays; detach it by undefining the machine",
            ));
        }
        devices.remove(name);
        // Of a profile: masked.
        wanted.insert(name.clone(), Some([("type".to_owned(), "none".to_owned())].into()));
        if present.devices.contains_key(name) {
            wanted.remove(name);
        }
    }
    if new.kernel != old.kernel {
        let is = |keys: &Keys| keys.get("type").is_some_and(|t| t == "kernel");
        let there = present.expanded.iter().find(|(_, keys)| is(keys)).map(|(name, _)| name.clone());
        match (&new.kernel, there) {
            (Some(one), there) => {
                kernel(devices.entry(there.unwrap_or_else(|| "kernel0".into())).or_default(), one);
            }
            (None, Some(name)) if present.devices.contains_key(&name) => drop(devices.remove(&name)),
            // Of a profile: masked.
            (None, Some(name)) => {
                drop(devices.insert(name, [("type".to_owned(), "none".to_owned())].into()));
            }
            (None, None) => {}
        }
    }
    if new.ports != old.ports {
        let is = |keys: &Keys| keys.get("type").is_some_and(|t| t == "port");
        for (name, _) in present.expanded.iter().filter(|(_, keys)| is(keys)) {
            match present.devices.contains_key(name) {
                true => drop(devices.remove(name)),
                // Of a profile: masked.
                false => drop(devices.insert(name.clone(), [("type".to_owned(), "none".to_owned())].into())),
            }
        }
        devices.extend(new.ports.iter().map(|port| (port.name.clone(), port.keys())));
    }
    if new.given != old.given {
        hostdevs::change(&mut devices, present.expanded, &old.given, &new.given);
    }
    if new.tpm && !old.tpm {
        let mut keys = Keys::from([("type".to_owned(), "tpm".to_owned())]);
        set(&mut keys, SECRET, new.tpm_secret);
        devices.insert("tpm0".into(), keys);
    }
    for (name, keys) in wanted {
        if let Some(keys) = keys {
            devices.insert(name, keys);
        }
    }
    Ok(devices)
}
