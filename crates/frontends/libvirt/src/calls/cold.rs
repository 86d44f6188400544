//! What a machine gets and gives back at a start alone: directories that it shares (ADR 58, ADR 65), devices of the host. Each is attached to
//! its definition and detached from it; no running machine gets or gives one.

use super::{devices::missing, sides::Affects};
use crate::{
    error::VirError,
    xml::{
        Element,
        machine::{Machine, hostdevs, refuse, shares},
    },
};
use karst_model::{
    board::{UsbController, UsbModel},
    device::{DiskBus, HostDevice},
};

/// Is it such a device?
pub(super) fn is(e: &Element) -> bool {
    e.name() == shares::ELEMENT || hostdevs::is(e)
}

/// Refuses a change of what runs.
pub(super) fn demand_definition(affects: Affects, element: &str) -> Result<(), VirError> {
    match affects.run {
        true => Err(refuse(
            element,
            "what a machine has of its host is fixed at its start; change it for the next one (--config)",
        )),
        false => Ok(()),
    }
}

fn tag_of(e: &Element) -> Result<&str, VirError> {
    let tag = e.find("target").and_then(|t| t.attribute("dir"));
    tag.ok_or_else(|| VirError::argument("the filesystem names no target"))
}

/// Adds one.
pub(super) fn attach(machine: &mut Machine, e: &Element) -> Result<(), VirError> {
    if e.name() != shares::ELEMENT {
        let one = hostdevs::read(e)?;
        if machine.given.iter().any(|had| hostdevs::same(had, &one)) {
            return Err(VirError::state("the machine has this device of the host already"));
        }
        if hostdevs::is_usb(e) && machine.board.usb.is_empty() {
            // As a document has it that says none.
            machine.board.usb.push(UsbController { model: UsbModel::Piix3Uhci, ports: None });
        }
        machine.given.push(one);
        machine.opaque.devices.push(e.clone());
        // Where a document says that there is no controller, there is none for this either.
        return hostdevs::all(&machine.opaque.devices).map(drop);
    }
    let one = shares::read(e)?;
    if machine.filesystems.iter().any(|f| f.tag == one.tag) {
        return Err(VirError::state(format!("target {} already exists", one.tag)));
    }
    if one.bus == DiskBus::Virtiofs && !shares::memory_is_shared(&machine.board) {
        let text = "'virtiofs' requires shared memory; say <access mode='shared'/> in the definition first";
        return Err(refuse("memoryBacking", text));
    }
    machine.opaque.devices.push(e.clone());
    machine.filesystems.push(one);
    Ok(())
}

/// Takes one away: a directory by its tag, a device by which of the host's it is.
pub(super) fn detach(machine: &mut Machine, e: &Element) -> Result<(), VirError> {
    if e.name() != shares::ELEMENT {
        let one = hostdevs::read(e)?;
        return match machine.given.iter().any(|had| hostdevs::same(had, &one)) {
            true => {
                forget_device(machine, &one);
                Ok(())
            }
            false => Err(missing("the machine has no such device of the host".into())),
        };
    }
    let tag = tag_of(e)?;
    match machine.filesystems.iter().any(|f| f.tag == tag) {
        true => {
            forget(machine, tag);
            Ok(())
        }
        false => Err(missing(format!("no filesystem with target {tag} was found"))),
    }
}

/// Takes a directory away, where it is there.
pub(super) fn forget(machine: &mut Machine, tag: &str) {
    machine.filesystems.retain(|f| f.tag != tag);
    let is = |e: &Element| e.name() == shares::ELEMENT && tag_of(e).is_ok_and(|t| t == tag);
    machine.opaque.devices.retain(|e| !is(e));
}

/// Takes a device of the host away, where it is there.
pub(super) fn forget_device(machine: &mut Machine, device: &HostDevice) {
    machine.given.retain(|had| !hostdevs::same(had, device));
    let is =
        |e: &Element| hostdevs::is(e) && hostdevs::read(e).is_ok_and(|said| hostdevs::same(&said, device));
    machine.opaque.devices.retain(|e| !is(e));
}

/// As libvirt has it, none is changed.
pub(super) fn update(e: &Element) -> Result<(), VirError> {
    Err(refuse(e.name(), "none is changed; detach it and attach another"))
}
