//! Copies of instances: the root with its snapshots, the configuration with what the request changes, and a new identity
//! (UUID, addresses, cloud-init id).

use super::{
    create::{CreateInstance, CreatePlan, InstanceSource, plan as plan_create},
    expand, lock, path,
    power::force_stop,
    states::Twin,
    templates,
};
use crate::{
    Engine, EngineInner,
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    snapshots::{
        demand_welcome,
        pause::{PausedGuest, guest, pause, release, resume},
        restore::hardware_of,
    },
    tenancy::limits::{Planned, admit},
};
use async_trait::async_trait;
use karst_agent::{HostAgent, MachineStateSave, VolumeRef, VolumeRefresh, VolumeSnapshotRef};
use karst_model::{
    Config, Error, InstanceId, Name, NodeId, Result, SnapshotId, VolumeId,
    access::Permission,
    guest::Observed,
    instance::{Hardware, InstanceKind, Lifecycle},
    snapshot::Snapshot,
    spec::{VolumeSource, VolumeSpec},
    template::Trigger,
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, time::Duration};

/// What a user wants copied, and what is to be different.
#[derive(Debug, Clone)]
pub struct CopyInstance {
    /// Project of the original.
    pub project: String,
    /// Name of the original.
    pub name: String,
    /// As it was then; `None`: now, with its snapshots unless `instance_only`.
    pub snapshot: Option<String>,
    /// Without the snapshots.
    pub instance_only: bool,
    /// A copy that is there already becomes what the original is; nothing else of what is said of it counts then.
    pub refresh: bool,
    /// A refresh leaves snapshots out that are older than the newest one of the copy.
    pub exclude_older: bool,
    /// The copy: what is said of configuration, devices and profiles (`None`: those of the original) goes over what the
    /// original has. Its kind and source are the original's whatever is said.
    pub copy: CreateInstance,
}

const LONG: Duration = Duration::from_secs(3600);
/// All data of a volume may have to be written anew: a day is what a host works on one call at most.
pub(super) const WHOLE: Duration = Duration::from_secs(24 * 3600);
const CALL: Duration = Duration::from_secs(30);

impl Engine {
    /// Copies an instance; answers the name of the copy and the operation. A guest that runs is paused for the moment in
    /// which its state is taken.
    ///
    /// # Errors
    /// Invalid by field, not found, conflict (taken name, busy), forbidden.
    pub async fn instance_copy(
        &self,
        context: &Context,
        project: &str,
        request: CopyInstance,
    ) -> Result<(String, LiveOperation)> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        super::vmids::demand_choice(context, request.copy.vmid)?;
        super::disks::demand_drives(context, &Default::default(), &request.copy.devices)?;
        if let Some(name) = self.copy_there(&project, &request) {
            let operation = self.instance_refresh(context, &project, &name, &request).await?;
            return Ok((name, operation));
        }
        let origin = self
            .project(context, &request.project, Permission::InstanceUse)
            .map_err(|e| e.at("source.project"))?;
        let inner = self.inner();
        let mut chosen = String::new();
        let operation = runner::start::<InstanceCopy>(inner, context, |tx| {
            let records = inner.inventory.read();
            let source = records.instance(&origin, &request.name).map_err(|e| e.at("source.source"))?;
            if source.lifecycle != Lifecycle::Ready {
                return Err(Error::conflict(format!("instance {:?} is being made or deleted", request.name)));
            }
            tx.expect(source);
            if request.snapshot.is_none() {
                crate::layers::demand_one_of(&records, source, "which a copy would not have")?;
            }
            let all = records.snapshots_of(source.id);
            let at = match request.snapshot.as_deref() {
                None => None,
                Some(name) => Some(all.iter().find(|s| *s.name == *name).ok_or_else(|| {
                    Error::not_found(format!("snapshot {name:?} of instance {:?} not found", request.name))
                        .at("source.source")
                })?),
            };
            if let Some(at) = at.filter(|s| s.external.is_some()) {
                let text = format!(
                    "snapshot {:?} is the moment in which the disks went on in new layers, and holds nothing that could be copied; copy \
                     the instance itself when its disks are one file each",
                    &*at.name
                );
                return Err(Error::unsupported(text).at("source.source"));
            }
            let name = match request.copy.name.as_deref().filter(|n| !n.is_empty()) {
                Some(name) => Name::parse("name", name)?,
                None => return Err(Error::invalid("name", "a copy needs a name")),
            };
            chosen = name.to_string();
            tx.expect(&project);
            crate::keys::demand_open_root(&records, source)?;
            let (config, devices, profiles) = match at {
                Some(s) => (&s.config, &s.devices, &s.profiles),
                None => (&source.config, &source.devices, &source.profiles),
            };
            let mut copy = request.copy.clone();
            copy.kind = source.kind;
            copy.source = match source.is_application() {
                true => InstanceSource::Application,
                false => InstanceSource::None,
            };
            let own = |k: &str| k.starts_with("volatile.") || k.starts_with("image.");
            let mut merged: Config = config.clone();
            merged.extend(copy.config.into_iter().filter(|(k, _)| !own(k)));
            merged.retain(|_, v| !v.is_empty());
            copy.config = merged;
            records.demand_seen_acls(context, &project, &copy.devices)?;
            let mut all_devices = devices.clone();
            expand::own_root(&mut all_devices);
            all_devices.append(&mut copy.devices);
            copy.devices = all_devices;
            // What the original has, or had when it was taken, was not given to this one.
            super::disks::demand_drives(context, &Default::default(), &copy.devices)?;
            if copy.profiles.is_none() {
                let name = |id| records.profiles.get(id).map(|p| p.name.to_string());
                copy.profiles = Some(profiles.iter().filter_map(name).collect());
            }
            if copy.description.is_empty() {
                copy.description.clone_from(&source.description);
            }
            let mut create = plan_create(inner, &records, tx, &project, name.clone(), &copy)?;
            create.demand_own_root()?;
            let instance = &mut create.instance;
            if instance.node != source.node {
                return Err(Error::unsupported("copies to another node are not there yet").at("target"));
            }
            instance.image = source.image;
            instance.image_properties = source.image_properties.clone();
            if let Some(base) = source.volatile.get("volatile.base_image") {
                instance.volatile.insert("volatile.base_image".into(), base.clone());
            }
            let parsed = expand::parse_devices(&records.expanded(instance).1)?;
            if let Some(now) = &source.hardware {
                // A snapshot's variables go with the firmware of then.
                let hardware = match at {
                    Some(s) => {
                        hardware_of(now, s, &records.expanded(source).0, &records.expanded(instance).0)?
                    }
                    None => now.clone(),
                };
                let (uuid, cloud_init_id) = (instance.id.uuid(), inner.env.uuid());
                instance.hardware = Some(Hardware { uuid, cloud_init_id, ..hardware });
                // The buses are those of the original's machine.
                instance.identities = inner.assign_identities(
                    &records,
                    &BTreeMap::new(),
                    &parsed,
                    instance.hardware.as_ref(),
                    instance.root,
                );
            }
            instance.metadata = source.metadata.clone();
            templates::defer(instance, Trigger::Copy);
            if let Some(start) = &mut create.start {
                start.spec = inner.start_spec(&records, instance, start.spec.domain_id)?;
            }
            let root = records
                .volumes
                .get(&source.root)
                .ok_or_else(|| Error::not_found("the root volume is gone"))?;
            create.volume.size = match (parsed.root.1.size, root.size, source.kind) {
                (Some(wanted), Some(now), InstanceKind::VirtualMachine) if wanted < now => {
                    let field = format!("devices.{}.size", parsed.root.0);
                    return Err(Error::invalid(
                        field,
                        format!("a copy cannot be smaller than the original, which has {now}"),
                    ));
                }
                (wanted, now, _) => wanted.or(now),
            };
            // It was admitted with the size that is written, and is as large as the original.
            let planned =
                Planned { instance: Some(&create.instance), root: create.volume.size, ..Default::default() };
            admit(&records, tx, project.id, &planned)?;
            // Its files are called as those of the original: what is put over them is counted on from there.
            create.volume.layers.made = root.layers.made;
            let from = VolumeRef { pool: root.pool, volume: root.id };
            let (history, states, snapshots) = match at.is_some() || request.instance_only {
                true => (vec![], vec![], vec![]),
                false => history(inner, &all, from.volume, create.instance.id, create.volume.id),
            };
            demand_welcome(
                &records,
                tx,
                project.id,
                snapshots.len(),
                "copy it without its snapshots (instance_only)",
            )?;
            let ids: BTreeMap<SnapshotId, SnapshotId> = states.iter().copied().collect();
            let parents = all.iter().map(|s| (s.id, s.parent)).collect();
            create.instance.current_snapshot = among(source.current_snapshot, &parents, &ids);
            let paused = if at.is_none() { guest(&records, source) } else { None };
            let frozen = paused.map(|_| SnapshotId(inner.env.uuid()));
            let machine = Twin::of((&source.value, create.instance.id), frozen, at.map(|s| s.id), states);
            let at = at.and_then(|s| s.volumes.iter().find(|(v, _)| *v == from.volume)).map(|(_, s)| *s);
            let plan = CopyPlan {
                guest: paused,
                frozen,
                source: source.id,
                copy: VolumeCopy {
                    spec: VolumeSpec {
                        id: create.volume.id,
                        pool: create.volume.pool,
                        content: create.volume.content,
                        size: create.volume.size,
                        source: VolumeSource::Empty,
                    },
                    from,
                    history,
                    last: frozen.or(at),
                    full: records
                        .pools
                        .get(&create.volume.pool)
                        .is_some_and(|p| p.full_copy(&create.volume.config)),
                },
                machine,
                snapshots,
                node: source.node,
                create,
            };
            let mut new = NewOperation::task(
                "Copying instance",
                Some(project.id),
                "instances",
                path(&project.name, &name),
            );
            new.may_cancel = true;
            Ok((plan, new))
        })
        .await?;
        Ok((chosen, operation))
    }
}

/// The nearest of a line of snapshots that a copy has too, as it is called there. `parents` are those of the original, `ids` those that
/// the copy has.
pub(super) fn among(
    mut from: Option<SnapshotId>,
    parents: &BTreeMap<SnapshotId, Option<SnapshotId>>,
    ids: &BTreeMap<SnapshotId, SnapshotId>,
) -> Option<SnapshotId> {
    // A line is no longer than all.
    for _ in 0..=parents.len() {
        let id = from?;
        if let Some(new) = ids.get(&id) {
            return Some(*new);
        }
        from = parents.get(&id).copied().flatten();
    }
    None
}

/// The snapshots of a copy, after the ids of those of the root and of the instance that they are made of, oldest first.
#[allow(clippy::type_complexity)] // two lists of pairs of the same type
fn history(
    inner: &EngineInner,
    all: &[&crate::Row<Snapshot>],
    old_root: VolumeId,
    instance: InstanceId,
    root: VolumeId,
) -> (Vec<(SnapshotId, SnapshotId)>, Vec<(SnapshotId, SnapshotId)>, Vec<Snapshot>) {
    let kept = |s: &Snapshot| s.volumes.iter().find(|(v, _)| *v == old_root).map(|(_, at)| *at);
    let ids: BTreeMap<SnapshotId, SnapshotId> =
        all.iter().filter(|s| kept(s).is_some()).map(|s| (s.id, SnapshotId(inner.env.uuid()))).collect();
    let parents = all.iter().map(|s| (s.id, s.parent)).collect();
    let (mut history, mut states, mut snapshots) = (vec![], vec![], vec![]);
    for old in all {
        let (Some(at), Some(id)) = (kept(old), ids.get(&old.id)) else { continue };
        history.push((at, *id));
        states.push((old.id, *id));
        snapshots.push(Snapshot {
            id: *id,
            instance,
            parent: among(old.parent, &parents, &ids),
            volumes: vec![(root, *id)],
            // Memory is that of the original: it has other addresses and another UUID.
            stateful: false,
            spec_version: 1,
            ..old.value.clone()
        });
    }
    (history, states, snapshots)
}

/// A volume that becomes a copy of another with its snapshots.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct VolumeCopy {
    /// The new one; its source is set by what is copied first.
    pub(crate) spec: VolumeSpec,
    pub(crate) from: VolumeRef,
    /// Snapshots of the original and what those of the copy are called, oldest first.
    pub(crate) history: Vec<(SnapshotId, SnapshotId)>,
    /// What the copy is in the end: the original at this snapshot, or now.
    pub(crate) last: Option<SnapshotId>,
    /// It shares nothing with the original.
    #[serde(default)]
    pub(crate) full: bool,
}

impl VolumeCopy {
    /// Makes it. May be called again after a crash: each snapshot is taken once, and in the end the content is brought to
    /// where it belongs.
    pub(crate) async fn run(&self, cx: &StepContext, agent: &dyn HostAgent) -> Result<()> {
        let first = self.history.first().map(|(old, _)| *old).or(self.last);
        let VolumeRef { pool, volume } = self.from;
        let source = VolumeSource::Copy { pool, volume, snapshot: first, full: self.full };
        agent.volume_create(&cx.mutate(WHOLE), VolumeSpec { source, ..self.spec.clone() }).await?;
        let volume = VolumeRef { pool: self.spec.pool, volume: self.spec.id };
        for (n, (old, new)) in self.history.iter().enumerate() {
            if n > 0 {
                let (from, full) = (self.from, self.full);
                let refresh = VolumeRefresh { volume, from, snapshot: Some(*old), full };
                agent.volume_refresh(&cx.mutate(WHOLE), refresh).await?;
            }
            let at = VolumeSnapshotRef { pool: volume.pool, volume: volume.volume, snapshot: *new };
            agent.volume_snapshot_create(&cx.mutate(LONG), at).await?;
        }
        if !self.history.is_empty() {
            let (from, full) = (self.from, self.full);
            let refresh = VolumeRefresh { volume, from, snapshot: self.last, full };
            agent.volume_refresh(&cx.mutate(WHOLE), refresh).await?;
        }
        Ok(())
    }

    pub(crate) async fn undo(&self, cx: &StepContext, agent: &dyn HostAgent) -> Result<()> {
        let volume = VolumeRef { pool: self.spec.pool, volume: self.spec.id };
        agent.volume_delete(&cx.mutate(Duration::from_secs(300)), volume).await
    }
}

/// Plan of [`InstanceCopy`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CopyPlan {
    create: CreatePlan,
    copy: VolumeCopy,
    /// The original, when it runs.
    guest: Option<PausedGuest>,
    /// A snapshot of the running original, gone in the end.
    frozen: Option<SnapshotId>,
    source: InstanceId,
    /// What a virtual machine is beside its disk.
    #[serde(default)]
    machine: Option<Twin>,
    snapshots: Vec<Snapshot>,
    node: NodeId,
}

impl CopyPlan {
    fn frozen(&self) -> Option<VolumeSnapshotRef> {
        let VolumeRef { pool, volume } = self.copy.from;
        self.frozen.map(|snapshot| VolumeSnapshotRef { pool, volume, snapshot })
    }
}

/// Outputs of [`InstanceCopy`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CopyOutputs {
    resumed: Vec<Observed>,
    started: Option<Observed>,
}

/// Freezes the state of an original that runs, copies the volume with its snapshots, writes their records, and drops what
/// was frozen; then the copy is there, and started when asked to.
pub struct InstanceCopy;

#[async_trait]
impl Saga for InstanceCopy {
    const NAME: &'static str = "instance-copy";
    const STEPS: &'static [&'static str] =
        &["pause", "freeze", "resume", "volume", "snapshots", "drop", "start"];
    type Plan = CopyPlan;
    type Outputs = CopyOutputs;

    fn has(plan: &CopyPlan, step: usize) -> bool {
        match step {
            0..=2 | 5 => plan.frozen.is_some(),
            4 => !plan.snapshots.is_empty(),
            6 => plan.create.start.is_some(),
            _ => true,
        }
    }

    fn locks(plan: &CopyPlan) -> Vec<String> {
        vec![lock(plan.create.instance.id), lock(plan.source)]
    }

    fn begin(plan: &CopyPlan, _: &EngineInner, tx: &mut Tx) -> Result<()> {
        plan.create.begin(tx);
        Ok(())
    }

    async fn run(cx: &StepContext, plan: &CopyPlan, outputs: &mut CopyOutputs, step: usize) -> Result<()> {
        let agent = cx.agent(plan.node)?;
        let paused: &[PausedGuest] = plan.guest.as_slice();
        match (step, plan.frozen()) {
            (0, _) => drop(pause(cx, paused).await?),
            (1, Some(at)) => {
                agent.volume_snapshot_create(&cx.mutate(LONG), at).await?;
                if let Some(at) = plan.machine.as_ref().and_then(Twin::frozen) {
                    let save = MachineStateSave { at, memory: false };
                    agent.machine_state_save(&cx.mutate(LONG), save).await?;
                }
            }
            (2, _) => outputs.resumed = resume(cx, paused).await?,
            (3, _) => {
                plan.copy.run(cx, &*agent).await?;
                if let Some(machine) = &plan.machine {
                    machine.run(&*agent, &cx.mutate(LONG)).await?;
                }
            }
            (4, _) => {
                for some in plan.snapshots.chunks(40) {
                    cx.engine
                        .transact(|records, tx| {
                            for snapshot in some.iter().filter(|s| !records.snapshots.contains_key(&s.id)) {
                                tx.create(snapshot);
                                let scope = snapshot.instance.to_string();
                                tx.take_name("snapshots", &scope, &snapshot.name, &snapshot.id.to_string());
                            }
                            Ok(())
                        })
                        .await?;
                }
            }
            (5, Some(at)) => {
                agent.volume_snapshot_delete(&cx.mutate(LONG), at).await?;
                if let Some(at) = plan.machine.as_ref().and_then(Twin::frozen) {
                    agent.machine_state_delete(&cx.mutate(LONG), at).await?;
                }
            }
            (6, _) => {
                if let Some(start) = &plan.create.start {
                    cx.engine.ensure_networks(cx, plan.node, &start.networks).await?;
                    let project = plan.create.instance.project;
                    crate::keys::hand_for_start(cx, &*agent, project, &start.spec).await?;
                    let started =
                        agent.guest_start(&cx.mutate(Duration::from_secs(120)), start.spec.clone()).await?;
                    outputs.started = Some(started);
                }
            }
            _ => {}
        }
        Ok(())
    }

    async fn undo(cx: &StepContext, plan: &CopyPlan, _: &CopyOutputs, step: usize) -> Result<()> {
        let agent = cx.agent(plan.node)?;
        let instance = &plan.create.instance;
        match (step, plan.frozen()) {
            (0, _) => release(cx, plan.guest.as_slice()).await?,
            (1, Some(at)) => {
                agent.volume_snapshot_delete(&cx.mutate(LONG), at).await?;
                if let Some(at) = plan.machine.as_ref().and_then(Twin::frozen) {
                    agent.machine_state_delete(&cx.mutate(LONG), at).await?;
                }
            }
            (3, _) => {
                plan.copy.undo(cx, &*agent).await?;
                if plan.machine.is_some() {
                    agent.guest_destroy(&cx.mutate(CALL), instance.id).await?;
                }
            }
            (4, _) => cx.engine.forget_snapshots(Some(instance.id), None).await?,
            (6, _) if plan.create.start.is_some() => {
                force_stop(cx, plan.node, instance.id, instance.generation).await?;
                agent.guest_destroy(&cx.mutate(Duration::from_secs(60)), instance.id).await?;
            }
            _ => {}
        }
        Ok(())
    }

    fn commit(plan: &CopyPlan, outputs: &CopyOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let row = engine.instance_row(plan.create.instance.id)?;
        let mut instance = row.value.clone();
        instance.lifecycle = Lifecycle::Ready;
        if plan.create.start.is_some() {
            instance = templates::started(&instance).unwrap_or(instance);
        }
        tx.replace(&row, &instance);
        let records = engine.inventory.read();
        if let Some(observed) = &outputs.started {
            tx.put(&engine.runtime_of(&records, observed));
        }
        engine.note_resumed(&records, &outputs.resumed, tx);
        Ok(())
    }

    fn abort(plan: &CopyPlan, _: &CopyOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        super::delete::remove_records(engine, tx, plan.create.instance.id)
    }

    fn announce(plan: &CopyPlan) -> Vec<(&'static str, String)> {
        plan.create.announce()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_copied_is_nobodys_parent() {
        let id = |n: u128| SnapshotId(uuid::Uuid::from_u128(n));
        // 1 - 2 - 3 - 4, of which the copy has the first and the last.
        let parents = (1..=4).map(|n| (id(n), (n > 1).then(|| id(n - 1)))).collect();
        let ids = BTreeMap::from([(id(1), id(11)), (id(4), id(14))]);
        assert_eq!(among(Some(id(4)), &parents, &ids), Some(id(14)));
        assert_eq!(among(Some(id(3)), &parents, &ids), Some(id(11)));
        assert_eq!(among(None, &parents, &ids), None);
        assert_eq!(among(Some(id(9)), &parents, &ids), None, "it is gone");
        assert_eq!(among(Some(id(3)), &parents, &BTreeMap::new()), None);
        let ring = BTreeMap::from([(id(1), Some(id(2))), (id(2), Some(id(1)))]);
        assert_eq!(among(Some(id(1)), &ring, &BTreeMap::new()), None);
    }
}
