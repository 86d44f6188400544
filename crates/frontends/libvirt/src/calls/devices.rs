//! Devices of a machine that is there: attached, detached, changed; rates. How much memory and how many processors it has is in
//! [`super::sizes`].
//!
//! Each is a change of the domain's document, or of some keys, of the sides that its flags name (see [`super::sides`]), brought to
//! the engine as one.

pub(super) use super::sides::{CONFIG, LIVE, live};
use super::{
    Answered, Named, cold,
    domain::is_running,
    nothing,
    power::ended,
    sides::{Affects, Edits, Side, affects, asked, edits, write},
    told,
};
use crate::{
    error::{Code, VirError},
    session::{Call, Driver},
    xdr::{Reader, Typed, Writer},
    xml::{
        self, Element,
        machine::{Machine, hostdevs, iotune, read, refuse, shares, spec},
    },
};
use karst_engine::{InstanceView, volumes::update::UpdateVolume};
use karst_model::{
    Config, device::Rates, instance::DeviceIdentity, keys::optional_flag, options::DiskOptions,
    storage::VolumeContent,
};
use std::collections::BTreeMap;

fn failed(text: impl Into<String>) -> VirError {
    VirError::new(Code::OperationFailed, crate::error::Part::Qemu, text)
}

/// Changes the document of a machine: of its run, of its definition, or of both.
async fn change(
    call: &Call,
    view: &InstanceView,
    flags: u32,
    edit: impl Fn(&Side<'_>, &mut Machine) -> Result<(), VirError>,
) -> Result<(), VirError> {
    let (edits, touched) = documents(call, view, flags, edit)?;
    write(call, view, edits, &touched).await
}

/// What an edit of its document makes of a machine, and which devices of its run that changes.
fn documents(
    call: &Call,
    view: &InstanceView,
    flags: u32,
    edit: impl Fn(&Side<'_>, &mut Machine) -> Result<(), VirError>,
) -> Result<(Edits, Vec<String>), VirError> {
    if call.opened()?.driver != Driver::Qemu {
        return Err(refuse("domain type", "devices of containers are changed by their instances"));
    }
    let edits = edits(view, affects(view, flags)?, |side| {
        let text = match side.run {
            // In the form of a definition: what a run has beside is none of its document's.
            true => {
                xml::domain::document_of(call, view, side.all_config, side.all_devices, false, (None, &[]))?
            }
            false => xml::domain::document(call, view, true)?,
        };
        let now = read::machine(&text)?;
        let mut new = now.clone();
        edit(side, &mut new)?;
        super::define::demand_discs(call, &new)?;
        let present = spec::Present {
            machine: &now,
            config: side.config,
            devices: side.devices,
            expanded: side.all_devices,
            identities: &side.identities,
        };
        spec::update(&present, &new)
    })?;
    let mut touched: Vec<String> = vec![];
    if let (Some(new), Some(was)) = (&edits.run, view.run()) {
        let names = new.devices.keys().chain(was.devices.keys());
        let changed = names.filter(|name| new.devices.get(*name) != was.devices.get(*name));
        touched.extend(changed.map(|name| format!("devices.{name}")));
    }
    Ok((edits, touched))
}

/// A device as a document of its own.
fn device(text: &str) -> Result<Element, VirError> {
    let e = xml::read::document(text)?;
    match e.name() {
        "disk" | "interface" => Ok(e),
        _ if cold::is(&e) => Ok(e),
        other => {
            Err(refuse(other, "comes and goes with the definition; disks and interfaces come and go live"))
        }
    }
}

fn attach_to(machine: &mut Machine, e: &Element) -> Result<(), VirError> {
    if cold::is(e) {
        return cold::attach(machine, e);
    }
    if e.name() == "disk" {
        let disk = read::disk_alone(e)?;
        if machine.disks.iter().any(|d| d.target == disk.target) {
            return Err(VirError::state(format!("target {} already exists", disk.target)));
        }
        if machine.disks.iter().any(|d| d.slot == disk.slot) {
            return Err(failed(format!("the place of {} is taken", disk.target)));
        }
        machine.opaque.disks.insert(disk.target.clone(), e.clone());
        machine.disks.push(disk);
        // One that it is at and nobody named comes with it.
        xml::machine::scsi::complete(&mut machine.board.scsi, &machine.disks);
        return Ok(());
    }
    let nic = read::nic_alone(e)?;
    if nic.mac.is_some() && machine.nics.iter().any(|n| n.mac == nic.mac) {
        return Err(failed(format!(
            "network device with mac {} already exists",
            nic.mac.unwrap_or_default()
        )));
    }
    if let Some(mac) = &nic.mac {
        machine.opaque.nics.insert(mac.clone(), e.clone());
    }
    machine.nics.push(nic);
    Ok(())
}

pub(super) fn missing(text: String) -> VirError {
    VirError::new(Code::DeviceMissing, crate::error::Part::Qemu, text)
}

fn target_of(e: &Element) -> Result<String, VirError> {
    let target = e.find("target").and_then(|t| t.attribute("dev"));
    target.map(str::to_owned).ok_or_else(|| VirError::argument("the disk names no target"))
}

/// The index of the interface that a document means: by its MAC address, else the only one of its network.
fn nic_of(machine: &Machine, e: &Element) -> Result<usize, VirError> {
    let mac = e.find("mac").and_then(|m| m.attribute("address")).map(str::to_ascii_lowercase);
    let network = e.find("source").and_then(|s| s.attribute("network").or(s.attribute("bridge")));
    let is = |n: &xml::machine::Nic| match (&mac, network) {
        (Some(mac), _) => n.mac.as_ref() == Some(mac),
        (None, Some(network)) => n.network.as_deref() == Some(network),
        (None, None) => true,
    };
    let found: Vec<usize> = (0..machine.nics.len()).filter(|n| is(&machine.nics[*n])).collect();
    match (found.as_slice(), mac) {
        ([one], _) => Ok(*one),
        ([], Some(mac)) => Err(missing(format!("no device found with MAC address {mac}"))),
        ([], None) => Err(missing("no matching network device was found".into())),
        _ => Err(failed("multiple devices match; give the MAC address")),
    }
}

fn detach_from(machine: &mut Machine, e: &Element) -> Result<(), VirError> {
    if cold::is(e) {
        return cold::detach(machine, e);
    }
    if e.name() == "disk" {
        let target = target_of(e)?;
        let before = machine.disks.len();
        machine.disks.retain(|d| d.target != target);
        machine.opaque.disks.remove(&target);
        return match machine.disks.len() < before {
            true => Ok(()),
            false => Err(missing(format!("no target device {target}"))),
        };
    }
    let gone = machine.nics.remove(nic_of(machine, e)?);
    if let Some(mac) = gone.mac {
        machine.opaque.nics.remove(&mac);
    }
    Ok(())
}

fn update_in(machine: &mut Machine, e: &Element) -> Result<(), VirError> {
    if cold::is(e) {
        return cold::update(e);
    }
    if e.name() == "disk" {
        let target = target_of(e)?;
        let at = machine.disks.iter().position(|d| d.target == target);
        let at = at.ok_or_else(|| missing(format!("no target device {target}")))?;
        let new = read::disk_alone(e)?;
        let old = &machine.disks[at];
        if (new.cdrom, &new.slot) != (old.cdrom, &old.slot) {
            return Err(failed(format!("the bus and kind of {target} stay")));
        }
        if !new.cdrom && new.source != old.source {
            return Err(refuse(
                "disk source",
                format!("what {target} shows stays; that of a drive of discs changes"),
            ));
        }
        // What is left out stays.
        if ![DiskOptions::default(), old.options].contains(&new.options) {
            return Err(failed("cannot modify the driver attributes of a disk"));
        }
        let rates = if new.rates == Rates::default() { old.rates } else { new.rates };
        let (boot, options) = (new.boot.or(old.boot), old.options);
        let (alias, pci) = (old.alias.clone(), old.pci.clone());
        machine.disks[at] = xml::machine::Disk { boot, options, rates, alias, pci, ..new };
        machine.opaque.disks.insert(target, e.clone());
        return Ok(());
    }
    let at = nic_of(machine, e)?;
    let new = read::nic_alone(e)?;
    let old = &machine.nics[at];
    if new.model != old.model {
        return Err(failed("cannot modify network device model"));
    }
    if new.options != old.options {
        return Err(failed("cannot modify virtio network device driver attributes"));
    }
    let (boot, mac) = (new.boot.or(old.boot), old.mac.clone());
    if let Some(mac) = &mac {
        machine.opaque.nics.insert(mac.clone(), e.clone());
    }
    let new = xml::machine::Nic { boot, mac, alias: old.alias.clone(), pci: old.pci.clone(), ..new };
    machine.nics[at] = new;
    Ok(())
}

async fn with_device(
    call: Call,
    named: Named,
    text: String,
    flags: u32,
    edit: fn(&mut Machine, &Element) -> Result<(), VirError>,
) -> Answered {
    // The third is force, which changes nothing here.
    call.known_flags(flags, LIVE | CONFIG | 4)?;
    let view = call.guest(&named)?;
    let e = device(&super::encryption::by_uuid(&call, &text)?)?;
    if cold::is(&e) {
        cold::demand_definition(affects(&view, flags)?, e.name())?;
    }
    change(&call, &view, flags, |_, machine| edit(machine, &e)).await?;
    Ok(nothing())
}

fn plain(call: &Call) -> Result<(Named, String), VirError> {
    call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?)))
}

fn flagged(call: &Call) -> Result<(Named, String, u32), VirError> {
    call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.u32()?)))
}

/// `DOMAIN_ATTACH_DEVICE`: to a guest that runs.
pub async fn attach(call: Call) -> Answered {
    let (named, text) = plain(&call)?;
    with_device(call, named, text, LIVE, attach_to).await
}

/// `DOMAIN_ATTACH_DEVICE_FLAGS`
pub async fn attach_flags(call: Call) -> Answered {
    let (named, text, flags) = flagged(&call)?;
    with_device(call, named, text, flags, attach_to).await
}

/// `DOMAIN_DETACH_DEVICE`: from a guest that runs.
pub async fn detach(call: Call) -> Answered {
    let (named, text) = plain(&call)?;
    with_device(call, named, text, LIVE, detach_from).await
}

/// `DOMAIN_DETACH_DEVICE_FLAGS`
pub async fn detach_flags(call: Call) -> Answered {
    let (named, text, flags) = flagged(&call)?;
    with_device(call, named, text, flags, detach_from).await
}

/// `DOMAIN_DETACH_DEVICE_ALIAS`
pub async fn detach_alias(call: Call) -> Answered {
    let (named, alias, flags) = flagged(&call)?;
    call.known_flags(flags, LIVE | CONFIG)?;
    let view = call.guest(&named)?;
    let affects = affects(&view, flags)?;
    let edit = |side: &Side<'_>, machine: &mut Machine| {
        let mut all = side.identities.iter();
        let found = all.find(|(name, i)| i.alias == alias && side.all_devices.contains_key(*name));
        // Devices of the host that have no place of their own are called as they are named.
        let named = found.map_or(&alias, |(name, _)| name);
        if let Some(device) = side.all_devices.get(named).and_then(hostdevs::of) {
            cold::demand_definition(affects, "hostdev")?;
            cold::forget_device(machine, &device);
            return Ok(());
        }
        let (name, found) = found.ok_or_else(|| missing(format!("no device found with alias {alias}")))?;
        let tag = side.all_devices.get(name).and_then(|keys| shares::tag_of(name, keys, found));
        if let Some(tag) = &tag {
            cold::demand_definition(affects, shares::ELEMENT)?;
            cold::forget(machine, tag);
            return Ok(());
        }
        machine.disks.retain(|d| d.slot != found.slot);
        machine.nics.retain(|n| found.mac.is_none() || n.mac != found.mac);
        Ok(())
    };
    change(&call, &view, flags, edit).await?;
    Ok(nothing())
}

/// `DOMAIN_UPDATE_DEVICE_FLAGS`
pub async fn update(call: Call) -> Answered {
    let (named, text, flags) = flagged(&call)?;
    let e = xml::read::document(&text)?;
    match e.name() {
        "graphics" => super::graphics::update(&call, &named, &e, flags).await,
        _ => with_device(call, named, text, flags, update_in).await,
    }
}

/// The device of a disk by its target or by the path of its volume: of what runs, else of what is defined.
pub(super) fn disk_of(view: &InstanceView, disk: &str) -> Result<String, VirError> {
    disk_in(view, &asked(view, 0)?, disk)
}

/// The same of one side.
fn disk_in(view: &InstanceView, side: &Side<'_>, disk: &str) -> Result<String, VirError> {
    let of_volume = disk.strip_prefix(read::VOLUMES).and_then(|p| p.split_once('/'));
    let found = side.all_devices.iter().find(|(name, keys)| {
        let Some(identity) = side.identities.get(*name) else { return false };
        let is = |key: &str| keys.get(key).map(String::as_str);
        if is("type") != Some("disk") || xml::machine::is_no_drive(identity) {
            return false;
        }
        let bus = karst_model::device::DISK_BUSES.iter().find(|(n, _)| Some(*n) == is("io.bus"));
        let bus = bus.map_or(karst_model::device::DiskBus::VirtioScsi, |(_, b)| *b);
        let source = is("source").map_or_else(|| xml::machine::owned(&view.instance.name), str::to_owned);
        xml::machine::target(&identity.slot, bus).0 == disk
            || of_volume == Some((is("pool").unwrap_or_default(), source.as_str()))
    });
    let missing = || VirError::argument(format!("invalid path {disk} not assigned to domain"));
    found.map(|(name, _)| name.clone()).ok_or_else(missing)
}

/// Keys of a device, with their new values.
type DeviceKeys = (String, Vec<(&'static str, Option<String>)>);

/// Changes keys of one device of each side that is affected.
async fn set_device(
    call: &Call,
    view: &InstanceView,
    affects: Affects,
    keys: impl Fn(&Side<'_>) -> Result<DeviceKeys, VirError>,
) -> Result<(), VirError> {
    let (edits, touched) = of_device(view, affects, keys)?;
    write(call, view, edits, &touched).await
}

fn of_device(
    view: &InstanceView,
    affects: Affects,
    keys: impl Fn(&Side<'_>) -> Result<DeviceKeys, VirError>,
) -> Result<(Edits, Vec<String>), VirError> {
    let touched = std::cell::RefCell::new(vec![]);
    let edits = edits(view, affects, |side| {
        let (device, keys) = keys(side)?;
        let mut devices = side.devices.clone();
        let mut all = side.all_devices.get(&device).cloned().unwrap_or_default();
        for (key, value) in keys {
            match value {
                Some(value) => drop(all.insert(key.to_owned(), value)),
                None => drop(all.remove(key)),
            }
        }
        touched.borrow_mut().push(format!("devices.{device}"));
        devices.insert(device, all);
        Ok(spec::Updated { config: side.config.clone(), devices, slots: Default::default() })
    })?;
    Ok((edits, touched.into_inner()))
}

/// `DOMAIN_GET_BLOCK_INFO`: what the disk's volume has and takes.
pub async fn block_info(call: Call) -> Answered {
    let (named, disk, flags) = call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    let view = call.guest(&named)?;
    let engine = &call.session.front.engine;
    let missing = || VirError::argument(format!("invalid path {disk} not assigned to domain"));
    let found = super::figures::disk(&call, &view, &disk).ok_or_else(missing)?.volume;
    let volume = found.ok_or_else(|| VirError::argument(format!("disk {disk} is empty")))?;
    let usage = engine.volume_usage(&volume).await?;
    let capacity = volume.size.map_or(usage.total, |s| s.bytes());
    let mut w = Writer::new();
    w.u64(usage.used).u64(capacity).u64(usage.used);
    Ok(w.finish().into())
}

/// `DOMAIN_BLOCK_RESIZE`
pub async fn block_resize(call: Call) -> Answered {
    let (named, disk, size, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.u64()?, r.u32()?)))?;
    // In bytes rather than KiB.
    call.known_flags(flags, 1)?;
    let view = call.guest(&named)?;
    if !is_running(&view) {
        return Err(VirError::state("domain is not running"));
    }
    let bytes = if flags & 1 != 0 { Some(size) } else { size.checked_mul(1024) };
    let bytes = bytes.ok_or_else(|| VirError::argument("size must be less than 2^64 bytes"))?;
    let device = disk_of(&view, &disk)?;
    let keys = asked(&view, 0)?.all_devices.get(&device).cloned().unwrap_or_default();
    if let Some(source) = keys.get("source") {
        return grow_volume(&call, (&disk, &keys, source), bytes).await;
    }
    // A disk grows for good: both sides know.
    let both = Affects { run: true, definition: true };
    set_device(&call, &view, both, |_| Ok((device.clone(), vec![("size", Some(bytes.to_string()))]))).await?;
    Ok(nothing())
}

/// Grows the volume of a disk, as vol-resize does: all that run with it have it so.
async fn grow_volume(call: &Call, (disk, keys, source): (&str, &Config, &str), bytes: u64) -> Answered {
    let part = call.opened()?.driver.part();
    let unsupported = |text: String| VirError::new(Code::OperationUnsupported, part, text);
    let fixed = || unsupported(format!("can't resize empty or readonly disk '{disk}'"));
    let Some(pool) = keys.get("pool") else {
        return Err(unsupported(format!(
            "'{source}' is a path of the host, which has the size that it has there"
        )));
    };
    if optional_flag(keys, "readonly") == Some(true) || optional_flag(keys, "attached") == Some(false) {
        return Err(fixed());
    }
    let session = &call.session;
    let (engine, context, project) = (&session.front.engine, &session.context, &session.opened()?.project);
    let volume = engine.custom_volume(context, project, pool, source)?;
    if volume.content == VolumeContent::Iso {
        return Err(fixed());
    }
    if volume.size.is_some_and(|now| now.bytes() > bytes) {
        let text = "volumes cannot shrink: what is beyond their end would be lost";
        return Err(unsupported(text.to_owned()));
    }
    let mut config = volume.config.clone();
    config.insert("size".into(), bytes.to_string());
    let request = UpdateVolume {
        description: volume.description.clone(),
        config,
        if_version: Some(volume.spec_version),
    };
    ended(engine.volume_update(context, project, pool, source, request).await?).await?;
    Ok(nothing())
}

pub(super) fn typed(r: &mut Reader<'_>) -> Result<(String, Typed), VirError> {
    let field = r.string()?;
    let value = match r.u32()? {
        1 => Typed::Int(r.i32()?),
        2 => Typed::Uint(r.u32()?),
        3 => Typed::Llong(r.u64()?.cast_signed()),
        4 => Typed::Ullong(r.u64()?),
        5 => Typed::Double(f64::from_bits(r.u64()?)),
        6 => Typed::Boolean(r.u32()? != 0),
        7 => Typed::Text(r.string()?),
        n => return Err(VirError::rpc(format!("unknown parameter type: {n}"))),
    };
    Ok((field, value))
}

pub(super) fn number(value: &Typed) -> Option<u64> {
    match value {
        Typed::Int(n) => u64::try_from(*n).ok(),
        Typed::Uint(n) => Some(u64::from(*n)),
        Typed::Llong(n) => u64::try_from(*n).ok(),
        Typed::Ullong(n) => Some(*n),
        _ => None,
    }
}

/// Parameters, or how many there are when none are asked for.
pub(super) fn parameters(all: Vec<(&str, Typed)>, wanted: i32) -> Answered {
    let mut w = Writer::new();
    let n = all.len() as i32;
    if wanted == 0 {
        w.u32(0).i32(n);
        return Ok(w.finish().into());
    }
    let all: Vec<_> = all.into_iter().take(wanted.max(0) as usize).collect();
    let n = all.len() as i32;
    w.array(all, |w, (field, value)| {
        w.typed(field, &value);
    });
    w.i32(n);
    Ok(w.finish().into())
}

/// The rates of a disk.
fn rates_of(side: &Side<'_>, device: &str) -> Result<Rates, VirError> {
    let parsed = karst_engine::compute::expand::parse_devices(side.all_devices)?;
    let root = std::iter::once((&parsed.root.0, parsed.root.1.io));
    let all = root.chain(parsed.disks.iter().map(|(name, disk)| (name, disk.io)));
    let io = all.into_iter().find(|(name, _)| *name == device).map(|(_, io)| io).unwrap_or_default();
    Ok(io.rates.unwrap_or_else(|| Rates::of(&io.limits)))
}

/// `DOMAIN_GET_BLOCK_IO_TUNE`
pub async fn block_tuning(call: Call) -> Answered {
    let (named, disk, wanted, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.option(|r| r.string())?, r.i32()?, r.u32()?)))?;
    // Strings among them are fine.
    call.known_flags(flags, LIVE | CONFIG | 4)?;
    let view = call.guest(&named)?;
    let side = asked(&view, flags)?;
    let mut rates = match disk {
        Some(disk) => rates_of(&side, &disk_in(&view, &side, &disk)?)?,
        None => Rates::default(),
    };
    // A burst has a second unless it says more.
    rates.all.iter_mut().filter(|r| r.burst > 0).for_each(|r| r.seconds = r.seconds.max(1));
    let mut number = |name: &'static str| {
        let n = iotune::number(&mut rates, name).map_or(0, |n| *n);
        (name, Typed::Ullong(n))
    };
    let mut all: Vec<_> = iotune::AVERAGES.into_iter().chain(iotune::BURSTS).map(&mut number).collect();
    // There are no groups.
    all.extend([number(iotune::SIZE), ("group_name", Typed::Text(String::new()))]);
    all.extend(iotune::LENGTHS.map(number));
    parameters(all, wanted)
}

/// `DOMAIN_SET_BLOCK_IO_TUNE`
pub async fn set_block_tuning(call: Call) -> Answered {
    let (named, disk, all, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.array(32, typed)?, r.u32()?)))?;
    call.known_flags(flags, LIVE | CONFIG)?;
    let view = call.guest(&named)?;
    set_device(&call, &view, affects(&view, flags)?, |side| {
        let device = disk_in(&view, side, &disk)?;
        let rates = tuned(rates_of(side, &device)?, &all)?;
        Ok((device, spec::rates(&rates).into()))
    })
    .await?;
    let which = ("blkdeviotune.disk".to_owned(), Typed::Text(disk));
    let words = std::iter::once(which).chain(told::named("blkdeviotune", &all)).collect();
    told::tuned(&call, &view, flags, words);
    Ok(nothing())
}

/// Rates with those that a client says.
fn tuned(mut rates: Rates, all: &[(String, Typed)]) -> Result<Rates, VirError> {
    // As with libvirt: who says one of bytes, or of operations, or of their bursts, says all of them.
    for names in [iotune::AVERAGES, iotune::BURSTS, iotune::LENGTHS] {
        for part in [&names[..3], &names[3..]] {
            if all.iter().any(|(field, _)| part.contains(&field.as_str())) {
                part.iter()
                    .filter_map(|name| iotune::number(&mut rates, name).map(|n| *n = 0))
                    .for_each(drop);
            }
        }
    }
    for (field, value) in all {
        if field == "group_name" {
            return Err(refuse("group_name", "each disk has rates of its own"));
        }
        let n = number(value).ok_or_else(|| VirError::argument(format!("{field} is no number")))?;
        match iotune::number(&mut rates, field) {
            Some(number) => *number = n,
            None => return Err(refuse(field, "is no rate of a disk")),
        }
    }
    // What was there of a burst goes with its rate; what is said of one without a rate is refused below.
    let said = |name: &str| all.iter().any(|(field, _)| field == name);
    for (n, rate) in rates.all.iter_mut().enumerate() {
        if rate.average == 0 && !said(iotune::BURSTS[n]) {
            rate.burst = 0;
        }
        if rate.burst == 0 && (rate.seconds == 1 || !said(iotune::LENGTHS[n])) {
            rate.seconds = 0;
        }
    }
    if rates.all[3..].iter().all(|r| r.average == 0) && !said(iotune::SIZE) {
        rates.operation_size = 0;
    }
    rates.demand_sense("iotune").map_err(|e| refuse("iotune", e.message))?;
    Ok(rates)
}

/// The device of an interface by its MAC address or the name of the host's interface.
fn interface_of(side: &Side<'_>, which: &str) -> Result<String, VirError> {
    let is = |i: &DeviceIdentity| {
        i.host_interface.as_deref() == Some(which)
            || i.mac.as_deref().is_some_and(|m| m.eq_ignore_ascii_case(which))
    };
    let all = side.identities.iter();
    let mut found = all.filter(|(name, i)| side.all_devices.contains_key(*name) && is(i));
    let missing = || VirError::argument(format!("can't find device {which}"));
    found.next().map(|(name, _)| name.clone()).ok_or_else(missing)
}

const BANDWIDTH: [&str; 7] = [
    "inbound.average",
    "inbound.peak",
    "inbound.burst",
    "inbound.floor",
    "outbound.average",
    "outbound.peak",
    "outbound.burst",
];

/// `DOMAIN_GET_INTERFACE_PARAMETERS`: KiB a second.
pub async fn interface_tuning(call: Call) -> Answered {
    let (named, which, wanted, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, LIVE | CONFIG | 4)?;
    let view = call.guest(&named)?;
    let side = asked(&view, flags)?;
    let name = interface_of(&side, &which)?;
    let parsed = karst_engine::compute::expand::parse_devices(side.all_devices)?;
    let port = parsed.nics.iter().find(|(n, _)| *n == name).map(|(_, nic)| &nic.port);
    let rate = |bits: Option<u64>| Typed::Uint(bits.map_or(0, |b| (b / 8192) as u32));
    let burst = |bytes: Option<u64>| Typed::Uint(bytes.map_or(0, |b| (b / 1024) as u32));
    let of = |field: &str| match field {
        "inbound.average" => rate(port.and_then(|p| p.ingress_limit)),
        "inbound.peak" => rate(port.and_then(|p| p.ingress.peak)),
        "inbound.burst" => burst(port.and_then(|p| p.ingress.burst)),
        "outbound.average" => rate(port.and_then(|p| p.egress_limit)),
        "outbound.peak" => rate(port.and_then(|p| p.egress.peak)),
        "outbound.burst" => burst(port.and_then(|p| p.egress.burst)),
        _ => Typed::Uint(0),
    };
    parameters(BANDWIDTH.map(|f| (f, of(f))).into(), wanted)
}

/// `DOMAIN_SET_INTERFACE_PARAMETERS`
pub async fn set_interface_tuning(call: Call) -> Answered {
    let (named, which, all, flags) =
        call.arguments(|r| Ok((Named::read_domain(r)?, r.string()?, r.array(16, typed)?, r.u32()?)))?;
    call.known_flags(flags, LIVE | CONFIG)?;
    let view = call.guest(&named)?;
    let mut keys = BTreeMap::from([("limits.max", None)]);
    // A direction is said whole: without its peak and burst it has none.
    for (average, all_of) in [
        ("inbound.average", ["limits.ingress", "limits.ingress.burst", "limits.ingress.peak"]),
        ("outbound.average", ["limits.egress", "limits.egress.burst", "limits.egress.peak"]),
    ] {
        if all.iter().any(|(field, _)| field == average) {
            keys.extend(all_of.map(|key| (key, None)));
        }
    }
    for (field, value) in &all {
        let n = number(value).ok_or_else(|| VirError::argument(format!("{field} is no number")))?;
        let (key, size) = match field.as_str() {
            "inbound.average" => ("limits.ingress", false),
            "inbound.peak" => ("limits.ingress.peak", false),
            "inbound.burst" => ("limits.ingress.burst", true),
            "outbound.average" => ("limits.egress", false),
            "outbound.peak" => ("limits.egress.peak", false),
            "outbound.burst" => ("limits.egress.burst", true),
            known if BANDWIDTH.contains(&known) && n == 0 => continue,
            other => return Err(refuse(other, "nothing is set aside for one interface")),
        };
        let kbit = || format!("{}kbit", n.saturating_mul(8192).div_ceil(1000));
        keys.insert(key, (n > 0).then(|| if size { format!("{n}KiB") } else { kbit() }));
    }
    let keys: Vec<_> = keys.into_iter().collect();
    let affects = affects(&view, flags)?;
    set_device(&call, &view, affects, |side| Ok((interface_of(side, &which)?, keys.clone()))).await?;
    Ok(nothing())
}
