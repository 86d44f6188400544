//! Refreshing a copy: an instance or custom volume that is there becomes what its original is, with the original's snapshots.
//! Snapshots that both have (by name and time) stay; what only the copy has goes; what it lacks is taken over.
//!
//! What the copy was is kept in a snapshot until the end, so that a refresh that fails leaves the copy as it was. Only the
//! last step destroys: it drops that snapshot, and those that went.

use super::{
    copy::{CopyInstance, among},
    lock, path,
    states::Twin,
    templates,
};
use crate::{
    Engine, EngineInner, Records, Row,
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    snapshots::{
        Row2, Taken, demand_welcome,
        pause::{PausedGuest, guest, pause, release, resume},
    },
    tenancy::limits::{Planned, admit, grows},
    volumes::{self, copy::CopyVolume, runs},
};
use async_trait::async_trait;
use karst_agent::{
    CallContext, HostAgent, MachineStateRef, MachineStateRestore, MachineStateSave, VolumeRef, VolumeRefresh,
    VolumeResize, VolumeSnapshotRef,
};
use karst_model::{
    ByteSize, Error, InstanceId, Name, NodeId, Result, SnapshotId,
    access::Permission,
    guest::Observed,
    instance::{Instance, InstanceKind, Lifecycle},
    project::Project,
    snapshot::{Snapshot, VolumeSnapshot},
    storage::{Volume, VolumeContent},
    template::{InstanceMetadata, Trigger},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

const LONG: Duration = Duration::from_secs(86_400);
const CALL: Duration = Duration::from_secs(30);

impl Engine {
    /// The instance that a copy with `refresh` would be, when it is there already.
    pub(super) fn copy_there(&self, project: &Project, request: &CopyInstance) -> Option<String> {
        let name = request.copy.name.as_deref()?;
        let records = self.inner().inventory.read();
        let there = request.refresh && records.instance(project, name).is_ok();
        there.then(|| name.to_owned())
    }

    pub(super) async fn instance_refresh(
        &self,
        context: &Context,
        project: &Row<Project>,
        name: &str,
        request: &CopyInstance,
    ) -> Result<LiveOperation> {
        let origin = self
            .project(context, &request.project, Permission::InstanceUse)
            .map_err(|e| e.at("source.project"))?;
        let inner = self.inner();
        runner::start::<ContentRefresh>(inner, context, |tx| {
            let records = inner.inventory.read();
            let source = records.instance(&origin, &request.name).map_err(|e| e.at("source.source"))?;
            let target = records.instance(project, name)?;
            for row in [source, target] {
                if row.lifecycle != Lifecycle::Ready {
                    return Err(Error::conflict(format!(
                        "instance {:?} is being made or deleted",
                        &*row.name
                    )));
                }
                tx.expect(row);
            }
            if source.id == target.id {
                return Err(Error::invalid("source.source", "an instance cannot be refreshed from itself"));
            }
            if source.kind != target.kind || source.node != target.node {
                let text =
                    format!("instance {name:?} is a {} and no copy of {:?}", target.kind, request.name);
                return Err(Error::conflict(text).at("source.source"));
            }
            if runs(&records, target) {
                let text = format!("instance {name:?} runs; stop it before it is refreshed");
                return Err(Error::conflict(text));
            }
            crate::checkpoints::demand_none_of(&records, target.id, "and would get another disk")?;
            crate::layers::demand_one_of(&records, target, "and would get another disk")?;
            crate::keys::demand_open_root(&records, source)?;
            crate::keys::demand_open_root(&records, target)?;
            let (from, to) = (root(&records, source)?, root(&records, target)?);
            crate::storage::use_pools(&records, tx, [from.pool, to.pool])?;
            let taken = |i: &Instance| records.snapshots_of(i.id).into_iter().cloned().collect::<Vec<_>>();
            let (theirs, ours) = (taken(source), taken(target));
            let mut then = None;
            let at = match request.snapshot.as_deref() {
                None => None,
                Some(wanted) => {
                    let found = theirs.iter().find(|s| *s.name == *wanted);
                    then = found.map(|s| s.id);
                    let kept = found.and_then(|s| s.volumes.iter().find(|(v, _)| *v == from.id));
                    let missing = || {
                        let text = format!("snapshot {wanted:?} of instance {:?} not found", request.name);
                        Error::not_found(text).at("source.source")
                    };
                    Some(kept.ok_or_else(missing)?.1)
                }
            };
            let alone = at.is_some() || request.instance_only;
            let shared: BTreeMap<_, _> =
                ours.iter().map(|s| ((s.name.clone(), s.created_at), s.id)).collect();
            let newest = ours.iter().map(|s| s.created_at).max();
            let of_root = |s: &Snapshot| s.volumes.iter().find(|(v, _)| *v == from.id).map(|(_, at)| *at);
            let older = |s: &Snapshot| request.exclude_older && newest.is_some_and(|n| s.created_at < n);
            // Those that the copy has or gets.
            let mut ids: BTreeMap<SnapshotId, SnapshotId> = BTreeMap::new();
            for s in &theirs {
                if let Some(same) = shared.get(&(s.name.clone(), s.created_at)) {
                    ids.insert(s.id, *same);
                } else if of_root(s).is_some() && !older(s) {
                    ids.insert(s.id, SnapshotId(inner.env.uuid()));
                }
            }
            let parents = theirs.iter().map(|s| (s.id, s.parent)).collect();
            let (mut missing, mut made, mut gone) = (vec![], vec![], vec![]);
            let mut history = vec![];
            if !alone {
                let kept: BTreeSet<SnapshotId> = ids.values().copied().collect();
                gone = ours.iter().filter(|s| !kept.contains(&s.id)).collect();
                for old in theirs.iter().filter(|s| !shared.contains_key(&(s.name.clone(), s.created_at))) {
                    let (Some(then), Some(id)) = (of_root(old), ids.get(&old.id).copied()) else { continue };
                    missing.push((then, id));
                    history.push((old.id, id));
                    made.push(Taken::Instance {
                        snapshot: Box::new(Snapshot {
                            id,
                            instance: target.id,
                            parent: among(old.parent, &parents, &ids),
                            volumes: vec![(to.id, id)],
                            stateful: false,
                            spec_version: 1,
                            ..old.value.clone()
                        }),
                    });
                }
            }
            let without = "refresh it without its snapshots (instance_only)";
            demand_welcome(&records, tx, project.id, made.len(), without)?;
            let machine = target.kind == InstanceKind::VirtualMachine;
            let states = gone
                .iter()
                .filter(|_| machine)
                .map(|s| MachineStateRef { instance: target.id, snapshot: s.id });
            let states = states.collect();
            let tip =
                if alone { target.current_snapshot } else { among(source.current_snapshot, &parents, &ids) };
            let gone: Vec<Taken> = gone.into_iter().cloned().map(|s| Row2::Instance(s).taken()).collect();
            let paused = if at.is_none() { guest(&records, source) } else { None };
            let frozen = paused.map(|_| SnapshotId(inner.env.uuid()));
            let path = path(&project.name, name);
            let kept = SnapshotId(inner.env.uuid());
            let machine =
                Twin::of((&source.value, target.id), frozen, then, history).map(|twin| RefreshedMachine {
                    twin,
                    kept: MachineStateRef { instance: target.id, snapshot: kept },
                    memory: target.stateful,
                });
            let plan = RefreshPlan {
                machine,
                to: to.value.clone(),
                from: VolumeRef { pool: from.pool, volume: from.id },
                size: from.size,
                full: is_full(&records, to),
                kept,
                last: frozen.or(at),
                missing,
                gone,
                made,
                states,
                instance: Some((target.id, tip, Some(Box::new(templates::metadata(&records, source))))),
                guests: paused.into_iter().collect(),
                frozen,
                locks: sorted(vec![lock(source.id), lock(target.id)]),
                node: source.node,
                path: path.clone(),
            };
            if plan.grows() {
                let planned =
                    Planned { instance: Some(&target.value), root: plan.size(), ..Default::default() };
                admit(&records, tx, project.id, &planned)?;
            }
            let mut new = NewOperation::task("Refreshing instance", Some(project.id), "instances", path);
            new.may_cancel = true;
            Ok((plan, new))
        })
        .await
    }

    /// Refreshes a custom volume that is there.
    pub(crate) async fn volume_refresh(
        &self,
        context: &Context,
        project: &Row<Project>,
        pool: &str,
        name: &Name,
        request: &CopyVolume,
    ) -> Result<LiveOperation> {
        let origin = self
            .project(context, &request.project, Permission::InstanceUse)
            .map_err(|e| e.at("source.project"))?;
        let inner = self.inner();
        runner::start::<ContentRefresh>(inner, context, |tx| {
            let records = inner.inventory.read();
            let source = records
                .demand_volume(origin.id, &request.pool, &request.name)
                .map_err(|e| e.at("source.name"))?;
            let target = records.demand_volume(project.id, pool, name)?;
            tx.expect(source);
            tx.expect(target);
            if source.id == target.id {
                return Err(Error::invalid("source.name", "a volume cannot be refreshed from itself"));
            }
            crate::checkpoints::demand_none(&records, target.id, "and would get another disk")?;
            crate::keys::demand_same(&target.config, &source.config).map_err(|e| e.at("source.name"))?;
            if source.encryption() != target.encryption() {
                // What opens the original opens what it becomes.
                let text = format!(
                    "volume {:?} is opened by another secret than {:?}, which it would become; give it that one's first: karst storage \
                     volume set {pool} {} encryption.secret=UUID",
                    &**name, request.name, &**name
                );
                return Err(Error::conflict(text).at("source.name"));
            }
            crate::layers::demand_one(&records, target.id, "and would get another disk")?;
            if source.content != target.content {
                let text = format!(
                    "volume {:?} holds {}, and {:?} {}",
                    &**name,
                    target.content.as_str(),
                    request.name,
                    source.content.as_str()
                );
                return Err(Error::conflict(text).at("source.name"));
            }
            crate::storage::use_pools(&records, tx, [source.pool, target.pool])?;
            tx.expect_untouched(&records, &volumes::lock(target.id));
            let mut locks = vec![volumes::lock(source.id), volumes::lock(target.id)];
            for user in volumes::users(&records, target).instances {
                if runs(&records, &user) {
                    let text =
                        format!("instance {:?} runs with volume {:?}; stop it first", &*user.name, &**name);
                    return Err(Error::conflict(text));
                }
                let target = lock(user.id);
                runner::demand_unlocked(&records, std::slice::from_ref(&target))?;
                tx.expect_unlocked(&target);
                tx.expect(&user);
            }
            let taken =
                |v: &Volume| records.volume_snapshots_of(v.id).into_iter().cloned().collect::<Vec<_>>();
            let (theirs, ours) = (taken(source), taken(target));
            let at = match request.snapshot.as_deref() {
                None => None,
                Some(wanted) => {
                    let found = theirs.iter().find(|s| *s.name == *wanted);
                    let missing = || {
                        let text = format!("snapshot {wanted:?} of volume {:?} not found", request.name);
                        Error::not_found(text).at("source.name")
                    };
                    Some(found.ok_or_else(missing)?.id)
                }
            };
            let same =
                |a: &VolumeSnapshot, b: &VolumeSnapshot| (&a.name, a.created_at) == (&b.name, b.created_at);
            let newest = ours.iter().map(|s| s.created_at).max();
            let (mut missing, mut made, mut gone) = (vec![], vec![], vec![]);
            if at.is_none() && !request.volume_only {
                let lost = ours.iter().filter(|s| !theirs.iter().any(|t| same(s, t)));
                gone = lost.cloned().map(|s| Row2::Volume(s).taken()).collect();
                for old in theirs.iter().filter(|t| !ours.iter().any(|s| same(s, t))) {
                    if request.exclude_older && newest.is_some_and(|n| old.created_at < n) {
                        continue;
                    }
                    let id = SnapshotId(inner.env.uuid());
                    missing.push((old.id, id));
                    let new = VolumeSnapshot { id, volume: target.id, spec_version: 1, ..old.value.clone() };
                    made.push(Taken::Volume { snapshot: Box::new(new) });
                }
            }
            let without = "refresh it without its snapshots (volume_only)";
            demand_welcome(&records, tx, project.id, made.len(), without)?;
            let mut guests: Vec<PausedGuest> = vec![];
            if at.is_none() {
                for user in volumes::attached(&records, source) {
                    guests.extend(guest(&records, &user));
                }
            }
            locks.extend(guests.iter().map(|g| lock(g.at.instance)));
            let frozen = (!guests.is_empty()).then(|| SnapshotId(inner.env.uuid()));
            let path = volumes::path(&records, target);
            let plan = RefreshPlan {
                machine: None,
                to: target.value.clone(),
                from: VolumeRef { pool: source.pool, volume: source.id },
                size: source.size,
                full: is_full(&records, target),
                kept: SnapshotId(inner.env.uuid()),
                last: frozen.or(at),
                missing,
                gone,
                made,
                states: vec![],
                instance: None,
                guests,
                frozen,
                locks: sorted(locks),
                node: inner.node,
                path: path.clone(),
            };
            if plan.grows() {
                let grown = Volume { size: plan.size(), ..target.value.clone() };
                let planned = Planned { volume: Some(&grown), ..Default::default() };
                admit(&records, tx, target.project, &planned)?;
            }
            let mut new =
                NewOperation::task("Refreshing storage volume", Some(project.id), "storage_volumes", path);
            new.may_cancel = true;
            Ok((plan, new))
        })
        .await
    }
}

fn sorted(mut locks: Vec<String>) -> Vec<String> {
    locks.sort();
    locks.dedup();
    locks
}

fn root<'a>(records: &'a Records, instance: &Instance) -> Result<&'a Row<Volume>> {
    records.volumes.get(&instance.root).ok_or_else(|| Error::not_found("the root volume is gone"))
}

/// A virtual machine that becomes what its original is beside its disk, too.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct RefreshedMachine {
    twin: Twin,
    /// What it was, gone in the end.
    kept: MachineStateRef,
    /// It keeps its memory over its stop now.
    memory: bool,
}

/// Is what is in it a full copy of what it is of?
fn is_full(records: &Records, volume: &Volume) -> bool {
    records.pools.get(&volume.pool).is_some_and(|pool| pool.full_copy(&volume.config))
}

/// Plan of [`ContentRefresh`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RefreshPlan {
    /// The volume that becomes another.
    to: Volume,
    from: VolumeRef,
    /// Size of the original.
    size: Option<ByteSize>,
    /// It shares nothing with the original.
    #[serde(default)]
    full: bool,
    /// A snapshot of what it was, gone in the end.
    kept: SnapshotId,
    /// What it becomes: the original at this snapshot, or now.
    last: Option<SnapshotId>,
    /// Snapshots of the original that it lacks, and what they are called here, oldest first.
    missing: Vec<(SnapshotId, SnapshotId)>,
    /// Snapshots that only it has.
    gone: Vec<Taken>,
    /// Those that it lacks.
    made: Vec<Taken>,
    /// What is kept of a virtual machine with those that go.
    states: Vec<MachineStateRef>,
    /// Whose root it is, the snapshot that it descends from then, and the metadata of the original.
    instance: Option<(InstanceId, Option<SnapshotId>, Option<Box<InstanceMetadata>>)>,
    /// Those that run from the original.
    guests: Vec<PausedGuest>,
    /// A snapshot of an original in use, gone in the end.
    frozen: Option<SnapshotId>,
    locks: Vec<String>,
    node: NodeId,
    path: String,
    #[serde(default)]
    machine: Option<RefreshedMachine>,
}

impl RefreshPlan {
    fn frozen_machine(&self) -> Option<MachineStateRef> {
        self.machine.as_ref().and_then(|m| m.twin.frozen())
    }

    fn volume(&self) -> VolumeRef {
        VolumeRef { pool: self.to.pool, volume: self.to.id }
    }

    fn refresh(&self, snapshot: Option<SnapshotId>) -> VolumeRefresh {
        VolumeRefresh { volume: self.volume(), from: self.from, snapshot, full: self.full }
    }

    fn at(&self, snapshot: SnapshotId) -> VolumeSnapshotRef {
        VolumeSnapshotRef { pool: self.to.pool, volume: self.to.id, snapshot }
    }

    fn frozen(&self) -> Option<VolumeSnapshotRef> {
        let VolumeRef { pool, volume } = self.from;
        self.frozen.map(|snapshot| VolumeSnapshotRef { pool, volume, snapshot })
    }

    /// The size in the end: a disk never gets smaller, and the limit of a tree is its own.
    fn size(&self) -> Option<ByteSize> {
        match self.to.content {
            VolumeContent::Filesystem => self.to.size,
            _ => self.to.size.max(self.size),
        }
    }

    /// Its project has to have room for it. The size is recorded from the beginning, so that nobody else takes that room.
    fn grows(&self) -> bool {
        grows(self.to.size, self.size())
    }

    /// Makes it what the original is. May be called again after a crash: each snapshot is taken once.
    async fn content(&self, cx: &StepContext, agent: &dyn HostAgent) -> Result<()> {
        let there = agent.volume_snapshots(&CallContext::read(CALL), self.volume()).await?;
        for (old, new) in &self.missing {
            if there.iter().any(|s| s.snapshot == *new) {
                continue;
            }
            let refresh = self.refresh(Some(*old));
            agent.volume_refresh(&cx.mutate(LONG), refresh).await?;
            agent.volume_snapshot_create(&cx.mutate(LONG), self.at(*new)).await?;
        }
        let refresh = self.refresh(self.last);
        agent.volume_refresh(&cx.mutate(LONG), refresh).await?;
        match self.size() {
            Some(size) if self.size() != self.size => {
                let resize = VolumeResize { volume: self.volume(), size: self.to.stored(size) };
                agent.volume_resize(&cx.mutate(LONG), resize).await
            }
            _ => Ok(()),
        }
    }
}

/// Lets the records of `gone` go and those of `made` come; done already where they are so.
async fn swap(cx: &StepContext, gone: &[Taken], made: &[Taken]) -> Result<()> {
    for some in gone.chunks(40) {
        cx.engine
            .transact(|records, tx| {
                for one in some {
                    let id = one.id();
                    match one {
                        Taken::Instance { .. } => match records.snapshots.get(&id) {
                            Some(row) => tx.delete(row),
                            None => continue,
                        },
                        Taken::Volume { .. } => match records.volume_snapshots.get(&id) {
                            Some(row) => tx.delete(row),
                            None => continue,
                        },
                    }
                    one.release_name(tx);
                }
                Ok(())
            })
            .await?;
    }
    crate::backups::import::record(cx, made.to_vec()).await
}

/// Outputs of [`ContentRefresh`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct RefreshOutputs {
    resumed: Vec<Observed>,
}

/// Freezes the state of an original in use, keeps what the copy was, makes it what the original is, lets the records follow,
/// and drops what is not needed any more.
pub struct ContentRefresh;

#[async_trait]
impl Saga for ContentRefresh {
    const NAME: &'static str = "content-refresh";
    const STEPS: &'static [&'static str] =
        &["pause", "freeze", "resume", "keep", "content", "records", "drop"];
    type Plan = RefreshPlan;
    type Outputs = RefreshOutputs;

    fn retries(step: usize) -> u32 {
        if step == 6 { 5 } else { 0 }
    }

    fn has(plan: &RefreshPlan, step: usize) -> bool {
        match step {
            0..=2 => plan.frozen.is_some(),
            5 => !plan.gone.is_empty() || !plan.made.is_empty(),
            _ => true,
        }
    }

    fn locks(plan: &RefreshPlan) -> Vec<String> {
        plan.locks.clone()
    }

    fn begin(plan: &RefreshPlan, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        if plan.grows() {
            let row = engine.volume_row(plan.to.id)?;
            let spec_version = row.spec_version + 1;
            tx.replace(&row, &Volume { size: plan.size(), spec_version, ..row.value.clone() });
        }
        Ok(())
    }

    async fn run(
        cx: &StepContext,
        plan: &RefreshPlan,
        outputs: &mut RefreshOutputs,
        step: usize,
    ) -> Result<()> {
        let agent = cx.agent(plan.node)?;
        match (step, plan.frozen()) {
            (0, _) => drop(pause(cx, &plan.guests).await?),
            (1, Some(at)) => {
                agent.volume_snapshot_create(&cx.mutate(LONG), at).await?;
                if let Some(at) = plan.frozen_machine() {
                    let save = MachineStateSave { at, memory: false };
                    agent.machine_state_save(&cx.mutate(LONG), save).await?;
                }
            }
            (2, _) => outputs.resumed = resume(cx, &plan.guests).await?,
            (3, _) => {
                agent.volume_snapshot_create(&cx.mutate(LONG), plan.at(plan.kept)).await?;
                if let Some(machine) = &plan.machine {
                    let save = MachineStateSave { at: machine.kept, memory: false };
                    agent.machine_state_save(&cx.mutate(LONG), save).await?;
                }
            }
            (4, _) => {
                plan.content(cx, &*agent).await?;
                if let Some(machine) = &plan.machine {
                    machine.twin.run(&*agent, &cx.mutate(LONG)).await?;
                }
            }
            (5, _) => swap(cx, &plan.gone, &plan.made).await?,
            (6, frozen) => {
                let of = |taken: &Taken| match taken {
                    Taken::Volume { snapshot } => Some(snapshot.id),
                    Taken::Instance { snapshot } => {
                        snapshot.volumes.iter().find(|(v, _)| *v == plan.to.id).map(|(_, id)| *id)
                    }
                };
                let lost = plan.gone.iter().filter_map(of).chain([plan.kept]).map(|id| plan.at(id));
                for at in lost.chain(frozen) {
                    agent.volume_snapshot_delete(&cx.mutate(LONG), at).await?;
                }
                let kept = plan.machine.as_ref().map(|m| m.kept);
                for state in plan.states.iter().copied().chain(kept).chain(plan.frozen_machine()) {
                    agent.machine_state_delete(&cx.mutate(LONG), state).await?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    async fn undo(cx: &StepContext, plan: &RefreshPlan, _: &RefreshOutputs, step: usize) -> Result<()> {
        let agent = cx.agent(plan.node)?;
        match (step, plan.frozen()) {
            (0, _) => release(cx, &plan.guests).await?,
            (1, Some(at)) => {
                agent.volume_snapshot_delete(&cx.mutate(LONG), at).await?;
                if let Some(at) = plan.frozen_machine() {
                    agent.machine_state_delete(&cx.mutate(LONG), at).await?;
                }
            }
            (3, _) => {
                agent.volume_snapshot_delete(&cx.mutate(LONG), plan.at(plan.kept)).await?;
                if let Some(machine) = &plan.machine {
                    agent.machine_state_delete(&cx.mutate(LONG), machine.kept).await?;
                }
            }
            (4, _) => {
                if let Some(machine) = &plan.machine {
                    let restore = MachineStateRestore { at: machine.kept, memory: machine.memory };
                    agent.machine_state_restore(&cx.mutate(LONG), restore).await?;
                    for state in machine.twin.made() {
                        agent.machine_state_delete(&cx.mutate(LONG), state).await?;
                    }
                }
                agent.volume_snapshot_restore(&cx.mutate(LONG), plan.at(plan.kept)).await?;
                for (_, new) in &plan.missing {
                    agent.volume_snapshot_delete(&cx.mutate(LONG), plan.at(*new)).await?;
                }
            }
            (5, _) => swap(cx, &plan.made, &plan.gone).await?,
            _ => {}
        }
        Ok(())
    }

    fn commit(plan: &RefreshPlan, outputs: &RefreshOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let records = engine.inventory.read();
        if let Some(row) = records.volumes.get(&plan.to.id) {
            let mut volume = row.value.clone();
            volume.size = plan.size();
            // Its files are called as those of the original now.
            let made = records.volumes.get(&plan.from.volume).map_or(0, |from| from.layers.made);
            volume.layers.made = volume.layers.made.max(made);
            if volume != row.value {
                volume.spec_version += 1;
                tx.replace(row, &volume);
            }
        }
        if let Some((id, tip, metadata)) = &plan.instance {
            let row = engine.instance_row(*id)?;
            let mut instance = row.value.clone();
            instance.current_snapshot = *tip;
            instance.stateful = false;
            if let Some(metadata) = metadata {
                templates::bring(&mut instance, &records, &metadata.templates);
                templates::defer(&mut instance, Trigger::Copy);
            }
            tx.replace(&row, &instance);
        }
        engine.note_resumed(&records, &outputs.resumed, tx);
        Ok(())
    }

    fn abort(plan: &RefreshPlan, _: &RefreshOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        if plan.grows() {
            let row = engine.volume_row(plan.to.id)?;
            let spec_version = row.spec_version + 1;
            tx.replace(&row, &Volume { size: plan.to.size, spec_version, ..row.value.clone() });
        }
        Ok(())
    }

    fn announce(plan: &RefreshPlan) -> Vec<(&'static str, String)> {
        let action = if plan.instance.is_some() { "instance-updated" } else { "storage-volume-updated" };
        vec![(action, plan.path.clone())]
    }
}
