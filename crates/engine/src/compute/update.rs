//! Changing instances: configuration, devices, profiles, name.

use super::{
    create::{check_devices, networks_of},
    disks::check_disks,
    expand, lock, path,
    run::{Live, MachineChange, RunPlan, Running, Wanted, as_run, of_run_only},
};
use crate::{
    Engine, EngineInner,
    context::Context,
    db::Tx,
    events::OLD_NAME,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    tenancy::limits::{Planned, admit},
};
use async_trait::async_trait;
use karst_agent::{VolumeRef, VolumeResize};
use karst_model::{
    Config, DeviceId, Error, ErrorKind, Name, NodeId, ProfileId, Result, VolumeId,
    access::Permission,
    device::{Devices, DiskBus, RootDevice},
    guest::Applied,
    instance::{DeviceIdentity, Hardware, Instance, InstanceKind, Status},
    keys,
    keys_machine::{self, HardwareChoice},
    project::Project,
    spec::GuestSpec,
    storage::{PoolKind, Volume, VolumeContent, VolumeOwner},
    template::Trigger,
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, time::Duration};

/// How long a guest may take to give devices back and take others.
const UPDATE: Duration = Duration::from_secs(180);

/// The whole of what a user may set of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpdateInstance {
    /// User's text.
    pub description: String,
    /// Removed when it stops.
    pub ephemeral: bool,
    /// Configuration as written; `volatile.*` and `image.*` are taken from the record whatever is said here.
    pub config: Config,
    /// Devices as written.
    pub devices: Devices,
    /// Profile names.
    pub profiles: Vec<String>,
    /// `spec_version` that was read (If-Match).
    pub if_version: Option<u64>,
}

/// In the metadata of a change of a running guest: the keys that take effect with its next start.
pub const PENDING: &str = "karst_pending";

impl Engine {
    /// Replaces what a user may set of an instance. A running guest gets at once what can change live.
    ///
    /// # Errors
    /// Invalid by field, not found, precondition failed, conflict when busy, forbidden.
    pub async fn instance_update(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        request: UpdateInstance,
    ) -> Result<LiveOperation> {
        let wanted = Wanted { definition: Some(&request), live: Live::Follow, slots: &BTreeMap::new() };
        self.change_instance(context, project, name, wanted).await
    }

    /// Replaces what a user may set of an instance from its next start on: a running guest keeps what it has.
    ///
    /// # Errors
    /// Those of [`Engine::instance_update`].
    pub async fn instance_configure(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        request: UpdateInstance,
    ) -> Result<LiveOperation> {
        let wanted = Wanted { definition: Some(&request), live: Live::Leave, slots: &BTreeMap::new() };
        self.change_instance(context, project, name, wanted).await
    }

    /// As [`Engine::instance_update`], or as [`Engine::instance_configure`] unless `now`, with the bus slots of new disks
    /// (`sdb` is `scsi1`) by the names of their devices. One that is taken is chosen anew.
    ///
    /// # Errors
    /// Those of [`Engine::instance_update`].
    pub async fn machine_update(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        request: UpdateInstance,
        now: bool,
        slots: &BTreeMap<String, String>,
    ) -> Result<LiveOperation> {
        let live = if now { Live::Follow } else { Live::Leave };
        self.change_instance(context, project, name, Wanted { definition: Some(&request), live, slots }).await
    }

    /// Changes what the next start takes, what runs, or both, each as is said. What is changed of the run only ends with it.
    ///
    /// # Errors
    /// Those of [`Engine::instance_update`]; conflict when the guest does not run, precondition failed when what it runs with
    /// has changed since it was read.
    pub async fn machine_change(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        change: MachineChange,
    ) -> Result<LiveOperation> {
        let live = change.run.as_ref().map_or(Live::Leave, Live::Given);
        let wanted = Wanted { definition: change.definition.as_ref(), live, slots: &change.slots };
        self.change_instance(context, project, name, wanted).await
    }

    async fn change_instance(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        wanted: Wanted<'_>,
    ) -> Result<LiveOperation> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        let inner = self.inner();
        runner::start::<InstanceUpdate>(inner, context, |tx| {
            let records = inner.inventory.read();
            let row = records.instance(&project, name)?;
            tx.expect(row);
            let mut instance = row.value.clone();
            if let Some(request) = wanted.definition {
                redefine(context, &records, tx, (&project, row), request, &mut instance)?;
            }
            let (config, devices) = records.expanded(&instance);
            keys::check(&config, Some(instance.kind))?;
            keys::limits(&config)?;
            crate::screens::demand(&records, &instance, &records.expanded(row).0, &config)?;
            let parsed = expand::parse_devices(&devices)?;
            // Decided when it is written; said now, before anything is touched.
            let planned = Planned { instance: Some(&instance), ..Default::default() };
            admit(&records, &mut Tx::default(), project.id, &planned)?;
            let grown = check_root(&records, &instance, &parsed)?.filter(|_| wanted.definition.is_some());
            // It gets its size, and may have to get back the one that it has.
            crate::storage::use_pools(&records, tx, grown.iter().map(|volume| volume.pool))?;
            check_disks(&records, tx, &instance, &parsed)?;
            let runtime = records.runtimes.get(&row.id);
            let running = row.status(runtime.map(|r| &r.value)).is_up();
            let run = runtime.filter(|_| running).and_then(|r| r.applied.as_ref());
            if let (Live::Given(_), false) = (wanted.live, running) {
                return Err(Error::conflict(format!("instance {name:?} is not running; start it first")));
            }
            // A profile may have got devices since the last start: they are no change of this request.
            let mut before = row.value.clone();
            let defined = records.expanded(&before);
            let only = of_run_only(run, &before, &defined.1);
            let assign = |from: &Instance, parsed: &expand::ParsedDevices| {
                let of = (&from.identities, &only);
                inner.assign_beside(&records, of, parsed, from.hardware.as_ref(), from.root)
            };
            before.identities = assign(&before, &expand::parse_devices(&defined.1)?);
            for (name, identity) in &only {
                before.identities.entry(name.clone()).or_insert_with(|| identity.clone());
            }
            let mut placed = before.clone();
            place_disks(inner, &mut placed, &parsed, wanted.slots);
            instance.identities = assign(&placed, &parsed);
            inner.check_nics(&records, tx, &instance, &parsed)?;
            inner.demand_own_label(&records, &instance, "devices")?;
            change_hardware(&mut instance, &defined.0, &config, running, name)?;
            let domain_id = runtime.and_then(|r| r.domain_id).unwrap_or(0);
            let after = inner.guest_spec(&records, &instance, domain_id)?;
            let (mut run_plan, mut live) = (None, None);
            if let Some(runtime) = runtime.filter(|_| running) {
                let as_is = Running {
                    runtime,
                    before: &before,
                    defined: (&defined.0, &defined.1),
                    after: (&config, &devices),
                };
                (run_plan, live) =
                    inner.plan_run(&records, (context, &project), &as_is, &mut instance, &wanted)?;
            }
            if running && run.is_none() {
                // What the guest still has keeps what it is known by until the next start.
                for (name, identity) in &before.identities {
                    instance.identities.entry(name.clone()).or_insert_with(|| identity.clone());
                }
            }
            if running && live.is_none() && grown.is_some() {
                return Err(Error::conflict(format!(
                    "the root disk of instance {name:?} changes its size at once; stop the instance first or change it live"
                ))
                .at(format!("devices.{}.size", parsed.root.0)));
            }
            if let (Some(plan), Some(has)) = (run_plan.as_ref().filter(|plan| plan.given), run) {
                // Decided when it is written, and held until then by what it compares.
                inner.check_run(&records, tx, &instance, &plan.wanted, has)?;
            }
            if let Some((before, after)) = &live {
                crate::network::life::demand_active_for(&records, before, after)?;
            }
            let path = path(&project.name, name);
            let spec = live.as_ref().map_or(&after, |(_, after)| after);
            let plan = UpdatePlan {
                networks: networks_of(spec),
                instance,
                live,
                run: run_plan,
                grown,
                path: path.clone(),
            };
            Ok((plan, NewOperation::task("Updating instance", Some(project.id), "instances", path)))
        })
        .await
    }

    /// Renames a stopped instance.
    ///
    /// # Errors
    /// Invalid name, not found, conflict (taken, running, busy), forbidden.
    pub async fn instance_rename(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        new: &str,
    ) -> Result<()> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        let inner = self.inner();
        let new = Name::parse("name", new)?;
        inner
            .transact(|records, tx| {
                let row = records.instance(&project, name)?;
                if *row.name == *new {
                    return Ok(());
                }
                if row.status(records.runtimes.get(&row.id).map(|r| &r.value)) != Status::Stopped {
                    return Err(Error::conflict(format!(
                        "instance {name:?} is running; stop it before it is renamed"
                    )));
                }
                inner.demand_free_name(records, project.id, &new)?;
                runner::demand_unlocked(records, &[lock(row.id)])?;
                tx.expect_unlocked(&lock(row.id));
                let mut instance = row.value.clone();
                instance.name = new.clone();
                inner.demand_own_label(records, &instance, "name")?;
                instance.spec_version += 1;
                super::templates::defer(&mut instance, Trigger::Rename);
                tx.replace(row, &instance);
                tx.release_name("instances", &project.id.to_string(), &row.name, &row.id.to_string());
                tx.take_name("instances", &project.id.to_string(), &new, &row.id.to_string());
                Ok(())
            })
            .await?;
        let source = path(&project.name, &new);
        let told = BTreeMap::from([(OLD_NAME.to_owned(), serde_json::Value::from(name))]);
        inner.announce_with(context, Some(project.id), "instance-renamed", source, told);
        Ok(())
    }
}

/// What a request says of the definition of an instance.
fn redefine(
    context: &Context,
    records: &crate::Records,
    tx: &mut Tx,
    (project, row): (&Project, &Instance),
    request: &UpdateInstance,
    instance: &mut Instance,
) -> Result<()> {
    if request.if_version.is_some_and(|v| v != row.spec_version) {
        return Err(Error::precondition_failed(format!(
            "instance {:?} has changed since it was read; read it again",
            &*row.name
        )));
    }
    super::disks::demand_drives(context, &row.devices, &request.devices)?;
    instance.description = request.description.clone();
    instance.ephemeral = request.ephemeral;
    let platform = |k: &str| k.starts_with("volatile.") || k.starts_with("image.");
    instance.config = request
        .config
        .iter()
        .filter(|(k, v)| !platform(k) && !v.is_empty())
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    keys::check(&instance.config, Some(instance.kind))?;
    check_devices(&request.devices)?;
    records.demand_seen_acls(context, project, &request.devices)?;
    instance.devices = request.devices.clone();
    instance.profiles = profiles(records, tx, records.home(project, "features.profiles"), &request.profiles)?;
    instance.spec_version += 1;
    Ok(())
}

/// Gives new disks the slots that were asked for.
pub(super) fn place_disks(
    inner: &EngineInner,
    instance: &mut Instance,
    parsed: &expand::ParsedDevices,
    slots: &BTreeMap<String, String>,
) {
    for (name, slot) in slots {
        let taken = |i: &DeviceIdentity| i.slot == *slot;
        let Some((_, disk)) = parsed.disks.iter().find(|(n, _)| n == name) else { continue };
        if instance.identities.contains_key(name) || instance.identities.values().any(taken) {
            continue;
        }
        let pci = match disk.io.bus {
            Some(DiskBus::VirtioBlk | DiskBus::Nvme) => {
                super::slots::Free::of(instance.hardware.as_ref(), instance.identities.values()).pci()
            }
            _ => None,
        };
        let identity = DeviceIdentity {
            id: DeviceId(inner.env.uuid()),
            alias: slot.clone(),
            slot: slot.clone(),
            pci,
            mac: None,
            host_interface: None,
            volume: None,
        };
        instance.identities.insert(name.clone(), identity);
    }
}

fn profiles(
    records: &crate::Records,
    tx: &mut Tx,
    project: karst_model::ProjectId,
    names: &[String],
) -> Result<Vec<ProfileId>> {
    let mut ids = vec![];
    for (n, name) in names.iter().enumerate() {
        let row = records.profile(project, name).map_err(|e| e.at(format!("profiles[{n}]")))?;
        if ids.contains(&row.id) {
            return Err(Error::invalid(format!("profiles[{n}]"), format!("profile {name:?} is named twice")));
        }
        tx.expect(row);
        crate::tenancy::profiles::demand_idle(records, tx, row.id)?;
        ids.push(row.id);
    }
    Ok(ids)
}

/// The root stays on its pool; a disk grows only, and what a tree holds its host knows. Answers the volume as it is to be when its
/// size changes.
pub(crate) fn check_root(
    records: &crate::Records,
    instance: &Instance,
    parsed: &expand::ParsedDevices,
) -> Result<Option<Volume>> {
    let (name, RootDevice { pool, size, .. }) = &parsed.root;
    let custom = super::disks::custom_root(records, instance, parsed)?.map(|v| v.id);
    let own = records.volumes.get(&instance.root).is_some_and(|v| v.owner != VolumeOwner::Custom);
    if custom.is_some() == own || custom.is_some_and(|id| id != instance.root) {
        return Err(Error::unsupported(
            "an instance keeps its root disk; make a new instance with the other one",
        )
        .at(format!("devices.{name}.source")));
    }
    let pool = records.pool(pool).map_err(|e| e.at(format!("devices.{name}.pool")))?;
    if pool.id != instance.pool {
        return Err(Error::new(ErrorKind::Unsupported, "an instance cannot change its pool this way")
            .at(format!("devices.{name}.pool")));
    }
    let (Some(new), Some(volume)) = (size, records.volumes.get(&instance.root)) else { return Ok(None) };
    let disk = instance.kind == InstanceKind::VirtualMachine;
    if !disk && pool.kind == PoolKind::Dir && volume.size.is_none() {
        // Not every file system of a directory limits a tree: its host refuses what is new. What was written at a time when it was
        // passed over in silence keeps nothing else from being changed.
        let row = records.instances.get(&instance.id);
        let said = row.and_then(|row| expand::parse_devices(&records.expanded(row).1).ok());
        if said.and_then(|said| said.root.1.size) == Some(*new) {
            return Ok(None);
        }
    }
    match volume.size {
        Some(now) if disk && *new < now => {
            Err(Error::invalid(format!("devices.{name}.size"), format!("a disk cannot shrink; it has {now}")))
        }
        Some(now) if *new == now => Ok(None),
        _ => {
            crate::checkpoints::demand_none(records, volume.id, "with backups of the size that the disk has")
                .map_err(|e| e.at(format!("devices.{name}.size")))?;
            Ok(Some(Volume { size: Some(*new), ..volume.value.clone() }))
        }
    }
}

/// Firmware and CPU model of a stopped machine follow a change of the keys that say them; its type never changes, for the
/// system inside knows its devices by it. A key that stays as it was changes nothing: defaults may differ from those of
/// the time when the machine was made.
fn change_hardware(
    instance: &mut Instance,
    before: &Config,
    config: &Config,
    running: bool,
    name: &str,
) -> Result<()> {
    let Some(now) = instance.hardware.clone() else { return Ok(()) };
    let choice = keys_machine::hardware(config)?;
    if let Some(wanted) = &choice.machine
        && !super::slots::is_of(&now.machine, wanted)
    {
        return Err(Error::conflict(format!(
            "the machine type of instance {name:?} is {} and fixed since it was made; make a new instance",
            now.machine
        ))
        .at("config.hardware.machine"));
    }
    let new = follow_keys(&now, before, &choice);
    if running && new != now {
        let key = if new.firmware == now.firmware { "hardware.cpu.model" } else { "security.secureboot" };
        return Err(Error::conflict(format!(
            "instance {name:?} is running; stop it before its firmware or CPU model changes"
        ))
        .at(format!("config.{key}")));
    }
    instance.hardware = Some(new);
    Ok(())
}

/// Hardware whose firmware and CPU model follow the keys, as far as these change.
pub(crate) fn follow_keys(now: &Hardware, before: &Config, choice: &HardwareChoice) -> Hardware {
    let mut new = now.clone();
    if keys_machine::hardware(before).map_or(true, |old| old.firmware != choice.firmware) {
        new.firmware = choice.firmware;
    }
    if let Some(model) = &choice.cpu_model {
        new.cpu_model.clone_from(model);
    }
    new
}

/// Plan of [`InstanceUpdate`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UpdatePlan {
    instance: Instance,
    /// What the running guest has, and what it is to have.
    live: Option<(GuestSpec, GuestSpec)>,
    /// What is kept of the run afterwards.
    #[serde(default)]
    run: Option<RunPlan>,
    /// The root volume as it is to be, when it grows.
    #[serde(default)]
    grown: Option<Volume>,
    networks: Vec<karst_model::NetworkId>,
    path: String,
}

impl UpdatePlan {
    /// The instance as its networks are to know it: with the NICs of the definition and those of the run only.
    fn on_networks(&self, engine: &EngineInner) -> Instance {
        let Some(run) = self.run.as_ref().map(|plan| &plan.wanted) else { return self.instance.clone() };
        let (config, devices) = engine.inventory.read().expanded(&self.instance);
        let identities = run.known_by(&self.instance.identities);
        as_run(&self.instance, config, run.in_use(&devices), identities)
    }
}

/// Outputs of [`InstanceUpdate`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct UpdateOutputs {
    applied: Option<Applied>,
}

/// Gives a tree the limit of its record again. More than that may have been written meanwhile, and a file system on a device does
/// not shrink: then it stays as it is. So it does where nothing limits a tree any more.
pub(crate) async fn limit_again(cx: &StepContext, node: NodeId, root: VolumeId) -> Result<()> {
    let found = cx.engine.inventory.read().volumes.get(&root).map(|v| v.value.clone());
    let Some(Volume { id, pool, content: VolumeContent::Filesystem, size: Some(size), .. }) = found else {
        return Ok(());
    };
    let resize = VolumeResize { volume: VolumeRef { pool, volume: id }, size };
    match cx.agent(node)?.volume_resize(&cx.mutate(Duration::from_secs(120)), resize).await {
        Err(e) if e.is(ErrorKind::Invalid) || e.is(ErrorKind::Unsupported) => Ok(()),
        other => other,
    }
}

/// Applies to the running guest what can change live, gives the root its size, then writes the record. A disk that grew stays so
/// when the saga is undone: it cannot shrink, and the record's smaller size lets it grow again. A tree gets its limit back: room
/// that its project has not is not kept.
pub struct InstanceUpdate;

#[async_trait]
impl Saga for InstanceUpdate {
    const NAME: &'static str = "instance-update";
    const STEPS: &'static [&'static str] = &["apply"];
    type Plan = UpdatePlan;
    type Outputs = UpdateOutputs;

    fn locks(plan: &UpdatePlan) -> Vec<String> {
        vec![lock(plan.instance.id)]
    }

    fn begin(_: &UpdatePlan, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }

    async fn run(cx: &StepContext, plan: &UpdatePlan, outputs: &mut UpdateOutputs, _: usize) -> Result<()> {
        if let Some((before, after)) = &plan.live {
            let agent = cx.agent(plan.instance.node)?;
            // What a NIC may send is settled before it comes.
            if before.nics != after.nics {
                let instance = plan.on_networks(&cx.engine);
                let (instances, from) = (std::slice::from_ref(&instance), plan.instance.project);
                cx.engine
                    .ensure_networks_for(cx, plan.instance.node, from, instances, &plan.networks)
                    .await?;
            }
            crate::keys::hand_for_change(cx, &*agent, plan.instance.project, after).await?;
            outputs.applied = Some(agent.guest_update(&cx.mutate(UPDATE), after.clone()).await?);
        }
        if let Some((root, size)) = plan.grown.as_ref().and_then(|v| Some((v, v.stored_size()?))) {
            let volume = VolumeRef { pool: root.pool, volume: root.id };
            let resize = VolumeResize { volume, size };
            cx.agent(plan.instance.node)?.volume_resize(&cx.mutate(Duration::from_secs(120)), resize).await?;
        }
        Ok(())
    }

    async fn undo(cx: &StepContext, plan: &UpdatePlan, _: &UpdateOutputs, _: usize) -> Result<()> {
        if let Some(root) = &plan.grown {
            limit_again(cx, plan.instance.node, root.id).await?;
        }
        if let Some((before, after)) = &plan.live {
            let agent = cx.agent(plan.instance.node)?;
            crate::keys::hand_for_change(cx, &*agent, plan.instance.project, before).await?;
            match agent.guest_update(&cx.mutate(UPDATE), before.clone()).await {
                // A guest that ended meanwhile needs no undo.
                Err(e) if matches!(e.kind, ErrorKind::NotFound | ErrorKind::Conflict) => {}
                other => drop(other?),
            }
            if before.nics != after.nics {
                cx.engine.ensure_networks(cx, plan.instance.node, &plan.networks).await?;
            }
        }
        Ok(())
    }

    fn commit(plan: &UpdatePlan, outputs: &UpdateOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let row = engine.instance_row(plan.instance.id)?;
        // The lock keeps others from the specification; power may have been observed to change.
        let instance = Instance { power: row.power, generation: row.generation, ..plan.instance.clone() };
        // The lock holds the instance only: what it refers to may have changed or gone while the step ran.
        let records = engine.inventory.read();
        for id in &instance.profiles {
            let profile = records.profiles.get(id);
            tx.expect(profile.ok_or_else(|| Error::conflict("a profile was deleted meanwhile"))?);
            tx.touch(&crate::tenancy::profile_uses(*id));
        }
        admit(&records, tx, instance.project, &Planned { instance: Some(&instance), ..Default::default() })?;
        let (config, devices) = records.expanded(&instance);
        let parsed = expand::parse_devices(&devices)?;
        check_root(&records, &instance, &parsed)?;
        check_disks(&records, tx, &instance, &parsed)?;
        engine.check_nics(&records, tx, &instance, &parsed)?;
        tx.replace(&row, &instance);
        if let (Some(grown), Some(volume)) = (&plan.grown, records.volumes.get(&plan.instance.root)) {
            tx.replace(volume, grown);
        }
        if let Some(run) = &plan.run
            && let Some(runtime) = records.runtimes.get(&plan.instance.id)
            && runtime.generation == run.generation
            && let Some(has) = &runtime.applied
        {
            if run.given {
                engine.check_run(&records, tx, &instance, &run.wanted, has)?;
            }
            // What the host left for the next start nobody holds apart, unless it was so before.
            let mut wanted = run.wanted.clone();
            let left = outputs.applied.iter().flat_map(|applied| &applied.pending);
            for key in left.filter(|key| !run.held.contains(*key)) {
                wanted.held.remove(key);
            }
            let applied = outputs.applied.as_ref().filter(|_| plan.live.is_some());
            engine.note_applied(tx, runtime, &instance, (&config, &devices), &wanted, applied);
        }
        Ok(())
    }

    /// What waits for the next start: clients that do not ask for it see it here.
    fn result(
        _: &UpdatePlan,
        outputs: &UpdateOutputs,
        _: &EngineInner,
    ) -> serde_json::Map<String, serde_json::Value> {
        let waits = outputs.applied.iter().filter(|a| !a.pending.is_empty());
        waits.map(|a| (PENDING.to_owned(), a.pending.clone().into())).collect()
    }

    fn abort(_: &UpdatePlan, _: &UpdateOutputs, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }

    fn announce(plan: &UpdatePlan) -> Vec<(&'static str, String)> {
        vec![("instance-updated", plan.path.clone())]
    }
}
