//! Defining virtual machines by their hardware: UUID and places of devices are given rather than chosen, because whoever
//! describes a machine so (libvirt's clients) knows it by them afterwards.

use super::{
    create::{CreateInstance, InstanceCreate, plan},
    expand, path, slots,
};
use crate::{
    Engine, EngineInner, Records,
    context::Context,
    operations::{LiveOperation, NewOperation},
    saga::runner,
};
use karst_model::{
    ByteSize, DeviceId, Error, InstanceId, Name, Result,
    access::Permission,
    device::{Devices, DiskBus},
    instance::{DesiredPower, DeviceIdentity, Instance, InstanceKind},
    project::Project,
    storage::{Volume, VolumeOwner},
};
use std::collections::BTreeMap;
use uuid::Uuid;

/// A virtual machine with its hardware.
#[derive(Debug, Clone)]
pub struct DefineMachine {
    /// As any other instance.
    pub create: CreateInstance,
    /// The UUID that its firmware shows, which becomes that of the instance; one is made up when absent.
    pub uuid: Option<Uuid>,
    /// Where its devices are, by their names.
    pub places: BTreeMap<String, Place>,
    /// When it is started, it stands still before its first instruction.
    pub paused: bool,
    /// When it is started, it goes on from memory in this file of its host; for administrators of the server.
    pub memory: Option<String>,
}

/// Where a device is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    /// Bus slot, such as `scsi0` or `net1`.
    pub slot: String,
    /// libvirt's alias; the slot when absent.
    pub alias: Option<String>,
    /// PCI address such as `03:00.0`. One that this machine has not, or that is taken, is chosen anew.
    pub pci: Option<String>,
}

impl Engine {
    /// Defines a virtual machine; answers its name and the operation.
    ///
    /// # Errors
    /// Those of [`Engine::instance_create`]; conflict when the UUID is taken.
    pub async fn machine_define(
        &self,
        context: &Context,
        project: &str,
        request: DefineMachine,
    ) -> Result<(String, LiveOperation)> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        let inner = self.inner();
        let name = Name::parse("name", request.create.name.as_deref().unwrap_or_default())?;
        if request.create.kind != InstanceKind::VirtualMachine {
            return Err(Error::unsupported("containers are made of images, not defined by their hardware"));
        }
        super::disks::demand_drives(context, &Devices::new(), &request.create.devices)?;
        if let Some(file) = &request.memory {
            context.demand_server(Permission::ServerEdit)?;
            karst_agent::check_memory_path(file)?;
        }
        let operation = runner::start::<InstanceCreate>(inner, context, |tx| {
            let records = inner.inventory.read();
            tx.expect(&project);
            records.demand_seen_acls(context, &project, &request.create.devices)?;
            let mut create = request.create.clone();
            give_root(&records, &project, &mut create.devices)?;
            let mut plan = plan(inner, &records, tx, &project, name.clone(), &create)?;
            if let Some(uuid) = request.uuid {
                demand_free(&records, uuid)?;
                identify(&mut plan.instance, uuid);
                if plan.volume.owner != VolumeOwner::Custom {
                    plan.volume.owner = VolumeOwner::Instance { instance: plan.instance.id };
                }
            }
            place(inner, &records, &mut plan.instance, &request.places)?;
            let domain_id = plan.start.as_ref().map_or(0, |s| s.spec.domain_id);
            let spec = inner.guest_spec(&records, &plan.instance, domain_id)?;
            if let Some(start) = &mut plan.start {
                super::disks::demand_idle(&records, tx, &spec)?;
                start.spec = spec;
                if let Some(file) = &request.memory {
                    start.go_on_from(file);
                }
                if request.paused {
                    start.pause();
                    plan.instance.power = DesiredPower::Paused;
                }
            }
            let path = path(&project.name, &name);
            Ok((plan, NewOperation::task("Defining instance", Some(project.id), "instances", path)))
        })
        .await?;
        Ok((name.to_string(), operation))
    }
}

/// Size of a root that no guest ever saw.
const BARE: ByteSize = ByteSize::mib(1);

/// Is it the root of a machine that has none to its guest, as [`give_root`] made it? Nothing is on it.
pub(crate) fn is_bare(devices: &Devices, volume: &Volume) -> bool {
    let hidden = devices.values().any(|keys| {
        let is = |key: &str, value: &str| keys.get(key).is_some_and(|v| v == value);
        is("type", "disk") && is("path", "/") && is("attached", "false")
    });
    hidden && volume.size == Some(BARE)
}

/// A machine without a disk that can be its root, or with none at all, is kept by a small volume that its guest does not see:
/// snapshots, copies and quotas go by the root of an instance.
fn give_root(records: &Records, project: &Project, devices: &mut Devices) -> Result<()> {
    let is =
        |keys: &BTreeMap<String, String>, key: &str, value: &str| keys.get(key).is_some_and(|v| v == value);
    let root = |keys: &BTreeMap<String, String>| is(keys, "type", "disk") && is(keys, "path", "/");
    if devices.values().any(root) {
        return Ok(());
    }
    let usual = records.profiles.values().find(|p| p.project == project.id && &*p.name == "default");
    let usual = usual.and_then(|p| p.devices.values().find(|keys| root(keys))?.get("pool").cloned());
    let active = records.pools.values().filter(|p| !p.life.stopped);
    let any = || active.map(|p| p.name.to_string()).min();
    let pool = usual.or_else(any).ok_or_else(|| {
        let text =
            "a machine without a disk of a pool is kept in a pool all the same, and there is none; make one";
        Error::invalid("devices", text)
    })?;
    let name = (0..).map(|n| if n == 0 { "root".to_owned() } else { format!("root{n}") });
    let name = name.into_iter().find(|name| !devices.contains_key(name)).unwrap_or_default();
    let size = BARE.to_string();
    let keys = [("type", "disk"), ("path", "/"), ("pool", &*pool), ("size", &*size), ("attached", "false")];
    devices.insert(name, keys.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    Ok(())
}

fn demand_free(records: &Records, uuid: Uuid) -> Result<()> {
    let has = |i: &Instance| i.id.uuid() == uuid || i.hardware.as_ref().is_some_and(|h| h.uuid == uuid);
    match uuid.is_nil() || records.instances.values().any(|i| has(i)) {
        true => Err(Error::conflict(format!("the UUID {uuid} is taken")).at("uuid")),
        false => Ok(()),
    }
}

fn identify(instance: &mut Instance, uuid: Uuid) {
    instance.id = InstanceId(uuid);
    instance.volatile.insert("volatile.uuid".into(), uuid.to_string());
    if let Some(hardware) = &mut instance.hardware {
        hardware.uuid = uuid;
    }
}

/// Gives devices the places that were asked for, and all others what that leaves free.
fn place(
    inner: &EngineInner,
    records: &Records,
    instance: &mut Instance,
    places: &BTreeMap<String, Place>,
) -> Result<()> {
    let parsed = expand::parse_devices(&records.expanded(instance).1)?;
    let hardware = instance.hardware.as_ref();
    let mut given: BTreeMap<String, DeviceIdentity> = BTreeMap::new();
    for (name, place) in places {
        let known = instance.identities.get(name);
        let known = known.ok_or_else(|| Error::invalid("devices", format!("there is no device {name:?}")))?;
        if let Some((other, _)) = given.iter().find(|(_, i)| i.slot == place.slot) {
            return Err(Error::invalid(
                format!("devices.{name}"),
                format!("both {other:?} and {name:?} are at {}", place.slot),
            ));
        }
        let free = |pci: &&String| !given.values().any(|i| i.pci.as_ref() == Some(*pci));
        let fits = |pci: &&String| hardware.is_some_and(|h| slots::fits(h, pci));
        given.insert(
            name.clone(),
            DeviceIdentity {
                id: DeviceId(inner.env.uuid()),
                slot: place.slot.clone(),
                alias: place.alias.clone().unwrap_or_else(|| place.slot.clone()),
                pci: place.pci.as_ref().filter(fits).filter(free).cloned(),
                ..known.clone()
            },
        );
    }
    let mut free = slots::Free::of(hardware, given.values());
    for (name, identity) in given.iter_mut().filter(|(_, i)| i.pci.is_none()) {
        let disk = parsed.disks.iter().find(|(n, _)| n == name).map(|(_, d)| d.io.bus);
        let disk = disk.or_else(|| (parsed.root.0 == *name).then_some(parsed.root.1.io.bus));
        let behind = |bus: Option<DiskBus>| {
            matches!(
                bus.unwrap_or(DiskBus::VirtioScsi),
                DiskBus::VirtioScsi | DiskBus::Sata | DiskBus::Ide | DiskBus::Floppy | DiskBus::Usb
            )
        };
        if !disk.is_some_and(behind) {
            identity.pci = free.pci();
        }
    }
    instance.identities = inner.assign_identities(records, &given, &parsed, hardware, instance.root);
    Ok(())
}
