//! The saga that copies a disk of a running machine.
//!
//! Up to the moment in which the machine goes on from the copy everything is undone by ending the copy and dropping what was made
//! for it. From that moment on nothing leads back, because what the guest writes is in the copy alone: the host keeps it on disk
//! that it is so, a step whose answer is lost is asked again until it is known, an undo that finds it so lets the records follow,
//! and even a saga that fails or is abandoned then leaves records that say where the machine is.

use super::{
    super::{copy::VolumeCopy, lock, relocate::pin},
    merge::MergePlan,
};
use crate::{
    EngineInner, Records,
    db::Tx,
    saga::{Saga, StepContext},
    volumes,
};
use async_trait::async_trait;
use karst_agent::{
    CallContext, GuestRef, MachineCopyBegin, MachineCopyEnd, MachineMergeBegin, MachineMergeEnd,
    VolumeRebuild, VolumeRef,
};
use karst_env::EnvExt;
use karst_model::{
    Config, Error, ErrorKind, NodeId, Result, SnapshotId,
    device::Devices,
    guest::{DiskCopyEnd, DiskCopyPhase, DiskCopyState},
    spec::{VolumeSource, VolumeSpec},
    storage::Volume,
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

const CALL: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_secs(86_400);
/// Time for the end of a copy, for which the host may have to let the machine stand still.
const END: Duration = Duration::from_secs(180);
/// Between two looks at how far it is.
const LOOK: Duration = Duration::from_millis(250);
/// The same once it is ready and waits for a word, by which it is woken.
const LOOK_READY: Duration = Duration::from_secs(2);
/// How long a host may be silent before a copy is given up; one that is started anew is back before.
const SILENCE: Duration = Duration::from_secs(300);
/// Tries of a change-over that the host says it did not do.
const TRIES: u32 = 5;
/// Tries of one that the host did and cannot bring to its end, such as on a full disk.
const UNFINISHED: u32 = 60;

/// Plan of [`DiskCopying`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CopyPlan {
    pub(super) guest: GuestRef,
    pub(super) node: NodeId,
    pub(super) device: String,
    /// It is the root disk.
    pub(super) root: bool,
    /// The instance owns what is copied: it moves, with its snapshots.
    pub(super) owned: bool,
    /// The copy's volume is made.
    pub(super) made: bool,
    pub(super) hold: bool,
    pub(super) speed: u64,
    pub(super) synchronous: bool,
    /// Why the machine cannot go on from it.
    pub(super) stays: Option<String>,
    pub(super) from: VolumeRef,
    pub(super) to: Volume,
    /// Snapshots of the volume, oldest first, with what they are called in the new one.
    pub(super) history: Vec<(SnapshotId, SnapshotId)>,
    /// They share nothing with what they are of, as the disk itself, which is written out.
    #[serde(default)]
    pub(super) full: bool,
    /// Snapshots of the instance that go along.
    pub(super) snapshots: Vec<SnapshotId>,
    /// Name of the copy's pool.
    pub(super) pool: String,
    /// Keys of the device when the machine goes on from the copy.
    pub(super) after: Config,
    pub(super) path: String,
    /// Path of the custom volume that the copy is.
    pub(super) volume_path: Option<String>,
    /// It is no copy: layers of the disk are merged, and `to` is the disk's own volume.
    #[serde(default)]
    pub(super) merge: Option<MergePlan>,
}

/// Outputs of [`DiskCopying`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CopyOutputs {
    /// The machine goes on from the copy.
    pivoted: bool,
    /// The copy was left as the disk was.
    finished: bool,
    /// The old volume could not be dropped.
    left: bool,
}

impl CopyPlan {
    fn at(&self) -> VolumeRef {
        VolumeRef { pool: self.to.pool, volume: self.to.id }
    }

    fn ending(&self, end: DiskCopyEnd) -> MachineCopyEnd {
        MachineCopyEnd { instance: self.guest.instance, from: self.from, to: self.at(), end }
    }

    /// Lets the host end it.
    async fn end(&self, cx: &StepContext, how: DiskCopyEnd) -> Result<()> {
        let agent = cx.agent(self.node)?;
        match &self.merge {
            Some(plan) => {
                let (instance, volume, merge) = (self.guest.instance, self.from, plan.merge);
                let end = MachineMergeEnd { instance, volume, merge, end: how };
                agent.machine_merge_end(&cx.mutate(END), end).await
            }
            None => agent.machine_copy_end(&cx.mutate(END), self.ending(how)).await,
        }
    }

    /// Makes the volume: with the snapshots of the old one, and else empty, of exactly its size.
    async fn make(&self, cx: &StepContext) -> Result<()> {
        let agent = cx.agent(self.node)?;
        let spec = VolumeSpec {
            id: self.to.id,
            pool: self.to.pool,
            content: self.to.content,
            size: self.to.size,
            source: VolumeSource::Empty,
        };
        if self.history.is_empty() {
            return agent.volume_create(&cx.mutate(LONG), spec).await;
        }
        let last = self.history.last().map(|(old, _)| *old);
        // Each snapshot has the size of its time.
        let spec = VolumeSpec { size: None, ..spec };
        let history = self.history.clone();
        let copy = VolumeCopy { spec, from: self.from, history, last, full: self.full };
        copy.run(cx, &*agent).await?;
        let rebuild = VolumeRebuild { volume: self.at(), source: VolumeSource::Empty, size: self.to.size };
        agent.volume_rebuild(&cx.mutate(LONG), rebuild).await
    }

    /// How far the copy is, asked again while the host is silent.
    async fn look(&self, cx: &StepContext, silent: &mut Duration) -> Result<Option<DiskCopyState>> {
        let asked = match cx.agent(self.node) {
            Ok(agent) => agent.machine_copy_state(&CallContext::read(CALL), self.copy()).await,
            Err(e) => Err(e),
        };
        match asked {
            Err(e) if matches!(e.kind, ErrorKind::Unavailable | ErrorKind::Timeout) && *silent < SILENCE => {
                *silent += LOOK;
                Ok(None)
            }
            other => {
                *silent = Duration::ZERO;
                other.map(Some)
            }
        }
    }

    /// Copies until the copy is what the disk is, and, where somebody wants to say so, until it is said how it is to end.
    async fn mirror(&self, cx: &StepContext, outputs: &mut CopyOutputs) -> Result<()> {
        let agent = cx.agent(self.node)?;
        match &self.merge {
            Some(plan) => {
                let (guest, volume, merge, speed) = (self.guest, self.from, plan.merge, self.speed);
                let begin = MachineMergeBegin { guest, volume, merge, speed };
                agent.machine_merge_begin(&cx.mutate(CALL), begin).await?;
            }
            None => {
                let begin = MachineCopyBegin {
                    guest: self.guest,
                    from: self.from,
                    to: self.at(),
                    speed: self.speed,
                    synchronous: self.synchronous,
                };
                agent.machine_copy_begin(&cx.mutate(CALL), begin).await?;
            }
        }
        drop(agent);
        let (mut silent, mut told) = (Duration::ZERO, None);
        loop {
            let word = cx.engine.copy_words.next();
            let mut wait = LOOK;
            let successor =
                cx.engine.inventory.read().sagas.get(&cx.saga).is_some_and(|s| s.epoch > cx.engine.epoch);
            if successor {
                return Err(Error::conflict("another daemon goes on with this"));
            }
            if let Some(state) = self.look(cx, &mut silent).await? {
                match &state.phase {
                    DiskCopyPhase::Copying | DiskCopyPhase::Ready => {}
                    // By an earlier executor.
                    DiskCopyPhase::Pivoted => return Ok(()),
                    DiskCopyPhase::Failed { reason } => {
                        let what = match self.merge {
                            Some(_) => "layers of the disk could not be merged",
                            None => "the disk could not be copied",
                        };
                        return Err(Error::conflict(format!("{what}: {reason}")));
                    }
                    DiskCopyPhase::Gone => {
                        return Err(Error::conflict("the virtual machine ended before its disk was copied"));
                    }
                }
                let ready = state.phase == DiskCopyPhase::Ready;
                wait = if ready { LOOK_READY } else { LOOK };
                self.tell(cx, &state, &mut told);
                match cx.engine.copy_words.of(cx.saga) {
                    _ if !ready => {}
                    _ if !self.hold => return Ok(()),
                    Some(DiskCopyEnd::Pivot) => return Ok(()),
                    Some(DiskCopyEnd::Finish) => {
                        self.end(cx, DiskCopyEnd::Finish).await?;
                        outputs.finished = true;
                        return Ok(());
                    }
                    Some(DiskCopyEnd::Cancel) | None => {}
                }
            }
            // A word, or the time for the next look.
            let _ = cx.engine.env.timeout(wait, word).await;
        }
    }

    /// Tells of the progress: when a percent more is done, at most once a second.
    fn tell(&self, cx: &StepContext, state: &DiskCopyState, told: &mut Option<(Duration, u64, bool)>) {
        let (now, ready) = (cx.engine.env.monotonic(), state.phase == DiskCopyPhase::Ready);
        let percent = match ready {
            true => 100,
            false => (state.done / (state.total / 100).max(1)).min(99),
        };
        let (last, before, was) = told.unwrap_or((Duration::ZERO, u64::MAX, false));
        let soon = now.saturating_sub(last) < Duration::from_secs(1);
        if (percent, ready) == (before, was) || (soon && ready == was && before != u64::MAX) {
            return;
        }
        *told = Some((now, percent, ready));
        cx.engine.operations.progress(&cx.operation, |m| {
            m.insert("disk_copy_progress".into(), format!("{}: {percent}%", self.device).into());
            m.insert(super::METADATA.into(), self.told(ready));
        });
    }

    /// Lets the machine go on from the copy. Ends with an error only when it certainly does not.
    async fn pivot(&self, cx: &StepContext) -> Result<()> {
        let (mut refused, mut unfinished) = (0, 0);
        loop {
            let Err(e) = self.end(cx, DiskCopyEnd::Pivot).await else { return Ok(()) };
            let mut silent = Duration::ZERO;
            match self.look(cx, &mut silent).await {
                Ok(Some(state)) => match state.phase {
                    // Nothing leads back, but the machine may stand still until the host has brought it to its end.
                    DiskCopyPhase::Pivoted => {
                        unfinished += 1;
                        tracing::warn!(instance = %self.guest.instance, error = %e, context = e.context, "a machine goes over to the copy of its disk, and the host does not bring that to its end");
                        // What is left of a disk in layers has to be with its pool before anybody starts from it.
                        if unfinished >= UNFINISHED && self.merge.is_none() {
                            return Ok(());
                        }
                    }
                    DiskCopyPhase::Gone | DiskCopyPhase::Failed { .. } => return Err(e),
                    DiskCopyPhase::Copying | DiskCopyPhase::Ready => {
                        refused += 1;
                        if refused >= TRIES {
                            return Err(e);
                        }
                    }
                },
                // Nothing is decided without the host.
                Ok(None) | Err(_) => {
                    tracing::warn!(instance = %self.guest.instance, error = %e, "a host does not say whether a machine goes on from the copy of its disk; asking again");
                }
            }
            cx.engine.env.sleep(LOOK * 4).await;
        }
    }

    /// Does the machine go on from the copy after all? Then the records say so as well, whatever becomes of the rest.
    async fn follow(&self, cx: &StepContext) -> Result<bool> {
        let agent = cx.agent(self.node)?;
        let state = agent.machine_copy_state(&CallContext::read(CALL), self.copy()).await?;
        if state.phase != DiskCopyPhase::Pivoted {
            return Ok(false);
        }
        if let Err(e) = self.end(cx, DiskCopyEnd::Pivot).await {
            if self.merge.is_some() {
                return Err(e);
            }
            tracing::warn!(instance = %self.guest.instance, error = %e, context = e.context, "a machine may stand still for the end of a copy of its disk; stop it and start it again");
        }
        cx.engine.transact(|records, tx| self.switch(records, tx)).await?;
        Ok(true)
    }

    /// Do the records say that the machine goes on from the copy?
    fn is_switched(&self, records: &Records) -> bool {
        let row = records.instances.get(&self.guest.instance);
        self.merge.is_none() && row.is_some_and(|row| row.devices.get(&self.device) == Some(&self.after))
    }

    /// Lets instance, snapshots and what is known of the running guest be as they are when it goes on from the copy; done
    /// already when they are.
    fn switch(&self, records: &Records, tx: &mut Tx) -> Result<()> {
        let row = records.instances.get(&self.guest.instance);
        let row = row.ok_or_else(|| Error::not_found("the instance is gone"))?;
        if let Some(plan) = &self.merge {
            return plan.switch(records, tx, row, self.from.volume);
        }
        if row.devices.get(&self.device) == Some(&self.after) {
            return Ok(());
        }
        let mut instance = row.value.clone();
        instance.devices.insert(self.device.clone(), self.after.clone());
        instance.spec_version += 1;
        if self.root {
            (instance.pool, instance.root) = (self.to.pool, self.to.id);
            if let Some(identity) = instance.identities.get_mut(&self.device) {
                identity.volume = identity.volume.map(|_| self.to.id);
            }
        }
        tx.replace(row, &instance);
        for id in &self.snapshots {
            let Some(row) = records.snapshots.get(id) else { continue };
            let mut snapshot = row.value.clone();
            for (of, _) in snapshot.volumes.iter_mut().filter(|(of, _)| *of == self.from.volume) {
                *of = self.to.id;
            }
            let now = Devices::from([(self.device.clone(), self.after.clone())]);
            pin(&mut snapshot.devices, &now, &self.device, &self.pool);
            tx.replace(row, &snapshot);
        }
        if let Some(row) = records.runtimes.get(&self.guest.instance)
            && row.generation == self.guest.generation
            && row.applied.is_some()
        {
            let mut runtime = row.value.clone();
            if let Some(applied) = &mut runtime.applied
                && let Some(keys) = applied.devices.get_mut(&self.device)
            {
                for key in ["pool", "source"] {
                    if let Some(value) = self.after.get(key) {
                        keys.insert(key.into(), value.clone());
                    }
                }
                let (config, devices) = records.expanded(&instance);
                if applied.pending(&config, &devices).is_empty() {
                    runtime.applied_spec_version = instance.spec_version;
                }
            }
            runtime.seq += 1;
            tx.replace(row, &runtime);
        }
        Ok(())
    }
}

/// Makes the volume, copies until the copy is what the disk is, lets the machine go on from it, lets the records refer to it, and
/// drops what the instance owned before.
pub struct DiskCopying;

#[async_trait]
impl Saga for DiskCopying {
    const NAME: &'static str = "instance-disk-copy";
    const STEPS: &'static [&'static str] = &["volume", "mirror", "pivot", "switch", "drop"];
    type Plan = CopyPlan;
    type Outputs = CopyOutputs;

    // From the third on nothing leads back.
    fn retries(step: usize) -> u32 {
        if step >= 2 { 5 } else { 0 }
    }

    fn has(plan: &CopyPlan, step: usize) -> bool {
        match step {
            0 => plan.made,
            4 => plan.owned && plan.stays.is_none(),
            _ => true,
        }
    }

    fn locks(plan: &CopyPlan) -> Vec<String> {
        let mut locks = vec![lock(plan.guest.instance)];
        if !plan.owned {
            locks.push(volumes::lock(plan.from.volume));
        }
        if plan.volume_path.is_some() {
            locks.push(volumes::lock(plan.to.id));
        }
        locks
    }

    fn begin(plan: &CopyPlan, _: &EngineInner, tx: &mut Tx) -> Result<()> {
        if !plan.made {
            return Ok(());
        }
        if plan.volume_path.is_some() {
            let to = &plan.to;
            tx.take_name("volumes", &volumes::scope(to), &to.name, &to.id.to_string());
        }
        tx.create(&plan.to);
        Ok(())
    }

    async fn run(cx: &StepContext, plan: &CopyPlan, outputs: &mut CopyOutputs, step: usize) -> Result<()> {
        match step {
            0 => plan.make(cx).await,
            1 => plan.mirror(cx, outputs).await,
            _ if outputs.finished => Ok(()),
            2 => {
                plan.pivot(cx).await?;
                outputs.pivoted = true;
                Ok(())
            }
            3 => cx.engine.transact(|records, tx| plan.switch(records, tx)).await,
            _ => {
                let dropped = cx.agent(plan.node)?.volume_delete(&cx.mutate(LONG), plan.from).await;
                outputs.left = dropped.is_err();
                // What refers to the new one is right, whatever became of the old one.
                if let Err(e) = dropped {
                    tracing::warn!(instance = %plan.guest.instance, error = %e, "the volume that a disk was moved from stays until the instance is deleted");
                }
                Ok(())
            }
        }
    }

    async fn undo(cx: &StepContext, plan: &CopyPlan, outputs: &CopyOutputs, step: usize) -> Result<()> {
        if outputs.pivoted {
            return Ok(());
        }
        let agent = cx.agent(plan.node)?;
        match step {
            0 => {
                let switched = plan.is_switched(&cx.engine.inventory.read());
                match switched {
                    true => Ok(()),
                    false => agent.volume_delete(&cx.mutate(LONG), plan.at()).await,
                }
            }
            1 => {
                let cancelled = plan.end(cx, DiskCopyEnd::Cancel).await;
                match cancelled.is_err() && plan.follow(cx).await.unwrap_or(false) {
                    true => Ok(()),
                    false => cancelled,
                }
            }
            // What nothing takes back is followed.
            2 => plan.follow(cx).await.map(drop),
            _ => Ok(()),
        }
    }

    fn commit(plan: &CopyPlan, outputs: &CopyOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let records = engine.inventory.read();
        if plan.owned
            && outputs.pivoted
            && !outputs.left
            && let Some(row) = records.volumes.get(&plan.from.volume)
        {
            tx.delete(row);
        }
        Ok(())
    }

    fn abort(plan: &CopyPlan, outputs: &CopyOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let records = engine.inventory.read();
        if outputs.pivoted || plan.is_switched(&records) {
            return plan.switch(&records, tx);
        }
        if !plan.made {
            return Ok(());
        }
        if plan.volume_path.is_some() {
            let to = &plan.to;
            tx.release_name("volumes", &volumes::scope(to), &to.name, &to.id.to_string());
        }
        if let Some(row) = records.volumes.get(&plan.to.id) {
            tx.delete(row);
        }
        Ok(())
    }

    fn announce(plan: &CopyPlan) -> Vec<(&'static str, String)> {
        let volume = plan.volume_path.clone().filter(|_| plan.made);
        let volume = volume.map(|path| ("storage-volume-created", path));
        [("instance-updated", plan.path.clone())].into_iter().chain(volume).collect()
    }
}
