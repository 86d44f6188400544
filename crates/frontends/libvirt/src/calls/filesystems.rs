//! Directories of a machine that is there: attached to its definition and detached from it. No running machine gets or gives one:
//! which it shares is fixed at its start (ADR 58, ADR 65).

use super::{devices::missing, sides::Affects};
use crate::{
    error::VirError,
    xml::{
        Element,
        machine::{Machine, refuse, shares},
    },
};
use karst_model::device::DiskBus;

/// Refuses a change of what runs.
pub(super) fn demand_cold(affects: Affects) -> Result<(), VirError> {
    match affects.run {
        true => Err(refuse(
            shares::ELEMENT,
            "what a machine shares is fixed at its start; change it for the next one (--config)",
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

/// Takes one away, by its tag.
pub(super) fn detach(machine: &mut Machine, e: &Element) -> Result<(), VirError> {
    let tag = tag_of(e)?;
    match machine.filesystems.iter().any(|f| f.tag == tag) {
        true => {
            forget(machine, tag);
            Ok(())
        }
        false => Err(missing(format!("no filesystem with target {tag} was found"))),
    }
}

/// The same, where it is there.
pub(super) fn forget(machine: &mut Machine, tag: &str) {
    machine.filesystems.retain(|f| f.tag != tag);
    let is = |e: &Element| e.name() == shares::ELEMENT && tag_of(e).is_ok_and(|t| t == tag);
    machine.opaque.devices.retain(|e| !is(e));
}

/// As libvirt has it, none is changed.
pub(super) fn update() -> Result<(), VirError> {
    Err(refuse(shares::ELEMENT, "none is changed; detach it and attach another"))
}
