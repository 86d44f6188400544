//! Copies of custom volumes: to another name, pool or project, with their snapshots.

use super::{attached, begin_new, create::CreateVolume, lock, path, scope};
use crate::{
    Engine, EngineInner,
    compute::copy::VolumeCopy,
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    snapshots::{
        Taken, demand_welcome,
        pause::{PausedGuest, guest, pause, release, resume},
    },
    tenancy::limits::{Planned, admit},
};
use async_trait::async_trait;
use karst_agent::{VolumeRef, VolumeSnapshotRef};
use karst_model::{
    Error, Name, NodeId, Result, SnapshotId, VolumeId,
    access::Permission,
    guest::Observed,
    layer::Layers,
    snapshot::VolumeSnapshot,
    spec::{VolumeSource, VolumeSpec},
    storage::{Volume, VolumeContent, VolumeOwner, check_volume_config},
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(86_400);

/// What a user wants copied.
#[derive(Debug, Clone)]
pub struct CopyVolume {
    /// Project of the original.
    pub project: String,
    /// Pool of the original.
    pub pool: String,
    /// Name of the original.
    pub name: String,
    /// As it was then; `None`: now, with its snapshots unless `volume_only`.
    pub snapshot: Option<String>,
    /// Without the snapshots.
    pub volume_only: bool,
    /// A copy that is there already becomes what the original is; nothing else of what is said of it counts then.
    pub refresh: bool,
    /// A refresh leaves snapshots out that are older than the newest one of the copy.
    pub exclude_older: bool,
    /// The copy: what is said of its configuration goes over what the original has; its content is the original's.
    pub copy: CreateVolume,
}

impl Engine {
    /// Copies a custom volume into a pool. What uses it and runs is paused for the moment in which its state is taken.
    ///
    /// # Errors
    /// Invalid by field, not found, conflict (taken name, busy), forbidden.
    pub async fn volume_copy(
        &self,
        context: &Context,
        project: &str,
        pool: &str,
        request: CopyVolume,
    ) -> Result<LiveOperation> {
        let project = self.volume_home(context, project)?;
        let origin = self
            .project(context, &request.project, Permission::InstanceUse)
            .map_err(|e| e.at("source.project"))?;
        let inner = self.inner();
        let name = Name::parse("name", &request.copy.name)?;
        if request.refresh && inner.inventory.read().custom_volume(project.id, pool, &name).is_some() {
            return self.volume_refresh(context, &project, pool, &name, &request).await;
        }
        runner::start::<VolumeCopying>(inner, context, |tx| {
            let records = inner.inventory.read();
            let source = records
                .demand_volume(origin.id, &request.pool, &request.name)
                .map_err(|e| e.at("source.name"))?;
            tx.expect(source);
            if request.snapshot.is_none() {
                crate::layers::demand_one(&records, source.id, "which a copy would not have")?;
            }
            let pool = records.pool(pool)?;
            let owner = begin_new(&records, tx, &project, pool, &name)?;
            let all = records.volume_snapshots_of(source.id);
            let at = match request.snapshot.as_deref() {
                None => None,
                Some(name) => Some(all.iter().find(|s| *s.name == *name).ok_or_else(|| {
                    Error::not_found(format!("snapshot {name:?} of volume {:?} not found", request.name))
                        .at("source.name")
                })?),
            };
            let mut config = at.map_or(&source.config, |s| &s.config).clone();
            config.extend(request.copy.config.clone());
            config.retain(|_, v| !v.is_empty());
            let size = check_volume_config(&config, source.content)?;
            crate::keys::demand_same(at.map_or(&source.config, |s| &s.config), &config)?;
            let now = at.map_or(source.size, |s| s.size);
            if source.content != VolumeContent::Filesystem && size.is_some() && size < now {
                return Err(Error::invalid("config.size", "a copy cannot be smaller than the original"));
            }
            if source.content == VolumeContent::Iso && size.is_some() && size != now {
                let text =
                    "a disc (ISO volume) is as large as its file, and so is a copy; leave the size out";
                return Err(Error::invalid("config.size", text));
            }
            let description = match request.copy.description.is_empty() {
                true => source.description.clone(),
                false => request.copy.description.clone(),
            };
            let volume = Volume {
                id: VolumeId(inner.env.uuid()),
                pool: pool.id,
                project: owner,
                name: name.to_string(),
                content: source.content,
                owner: VolumeOwner::Custom,
                description,
                size: size.or(now),
                config,
                spec_version: 1,
                created_at: inner.env.now(),
                // Its files are called as those of the original: what is put over them is counted on from there.
                layers: Layers { made: source.layers.made, ..Default::default() },
            };
            let planned = Planned { volume: Some(&volume), ..Default::default() };
            admit(&records, &mut Tx::default(), owner, &planned)?;
            let mut guests: Vec<PausedGuest> = vec![];
            if at.is_none() {
                for user in attached(&records, source) {
                    guests.extend(guest(&records, &user));
                }
            }
            let frozen = (!guests.is_empty()).then(|| SnapshotId(inner.env.uuid()));
            let kept = if at.is_some() || request.volume_only { vec![] } else { all.clone() };
            let snapshots: Vec<VolumeSnapshot> = kept
                .iter()
                .map(|s| VolumeSnapshot {
                    id: SnapshotId(inner.env.uuid()),
                    volume: volume.id,
                    spec_version: 1,
                    ..s.value.clone()
                })
                .collect();
            let without = "copy it without its snapshots (volume_only)";
            demand_welcome(&records, tx, project.id, snapshots.len(), without)?;
            let mut locks = vec![lock(volume.id), lock(source.id)];
            locks.extend(guests.iter().map(|g| crate::compute::lock(g.at.instance)));
            locks.sort();
            locks.dedup();
            let path = path(&records, &volume);
            let plan = CopyPlan {
                copy: VolumeCopy {
                    spec: VolumeSpec {
                        id: volume.id,
                        pool: volume.pool,
                        content: volume.content,
                        size: volume.stored_size(),
                        source: VolumeSource::Empty,
                    },
                    from: VolumeRef { pool: source.pool, volume: source.id },
                    history: kept.iter().zip(&snapshots).map(|(old, new)| (old.id, new.id)).collect(),
                    last: frozen.or(at.map(|s| s.id)),
                    full: pool.full_copy(&volume.config),
                },
                volume,
                snapshots,
                guests,
                frozen,
                locks,
                node: inner.node,
                path: path.clone(),
            };
            let mut new =
                NewOperation::task("Copying storage volume", Some(project.id), "storage_volumes", path);
            new.may_cancel = true;
            Ok((plan, new))
        })
        .await
    }
}

/// Plan of [`VolumeCopying`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CopyPlan {
    volume: Volume,
    copy: VolumeCopy,
    snapshots: Vec<VolumeSnapshot>,
    /// Those that use it and run.
    guests: Vec<PausedGuest>,
    /// A snapshot of the original in use, gone in the end.
    frozen: Option<SnapshotId>,
    locks: Vec<String>,
    node: NodeId,
    path: String,
}

impl CopyPlan {
    fn frozen(&self) -> Option<VolumeSnapshotRef> {
        let VolumeRef { pool, volume } = self.copy.from;
        self.frozen.map(|snapshot| VolumeSnapshotRef { pool, volume, snapshot })
    }
}

/// Outputs of [`VolumeCopying`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CopyOutputs {
    resumed: Vec<Observed>,
}

/// Freezes the state of an original in use, copies it with its snapshots, writes their records and drops what was frozen;
/// then the copy is there. Its name is taken from the beginning.
pub struct VolumeCopying;

#[async_trait]
impl Saga for VolumeCopying {
    const NAME: &'static str = "volume-copy";
    const STEPS: &'static [&'static str] = &["pause", "freeze", "resume", "volume", "snapshots", "drop"];
    type Plan = CopyPlan;
    type Outputs = CopyOutputs;

    fn has(plan: &CopyPlan, step: usize) -> bool {
        match step {
            0..=2 | 5 => plan.frozen.is_some(),
            4 => !plan.snapshots.is_empty(),
            _ => true,
        }
    }

    fn locks(plan: &CopyPlan) -> Vec<String> {
        plan.locks.clone()
    }

    fn begin(plan: &CopyPlan, _: &EngineInner, tx: &mut Tx) -> Result<()> {
        let volume = &plan.volume;
        tx.take_name("volumes", &scope(volume), &volume.name, &volume.id.to_string());
        Ok(())
    }

    async fn run(cx: &StepContext, plan: &CopyPlan, outputs: &mut CopyOutputs, step: usize) -> Result<()> {
        let agent = cx.agent(plan.node)?;
        match (step, plan.frozen()) {
            (0, _) => drop(pause(cx, &plan.guests).await?),
            (1, Some(at)) => agent.volume_snapshot_create(&cx.mutate(LONG), at).await?,
            (2, _) => outputs.resumed = resume(cx, &plan.guests).await?,
            (3, _) => plan.copy.run(cx, &*agent).await?,
            (4, _) => {
                let taken = plan.snapshots.iter().map(|s| Taken::Volume { snapshot: Box::new(s.clone()) });
                crate::backups::import::record(cx, taken.collect()).await?;
            }
            (5, Some(at)) => agent.volume_snapshot_delete(&cx.mutate(LONG), at).await?,
            _ => {}
        }
        Ok(())
    }

    async fn undo(cx: &StepContext, plan: &CopyPlan, _: &CopyOutputs, step: usize) -> Result<()> {
        let agent = cx.agent(plan.node)?;
        match (step, plan.frozen()) {
            (0, _) => release(cx, &plan.guests).await?,
            (1, Some(at)) => agent.volume_snapshot_delete(&cx.mutate(LONG), at).await?,
            (3, _) => plan.copy.undo(cx, &*agent).await?,
            (4, _) => cx.engine.forget_snapshots(None, Some(plan.volume.id)).await?,
            _ => {}
        }
        Ok(())
    }

    fn commit(plan: &CopyPlan, outputs: &CopyOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let records = engine.inventory.read();
        let planned = Planned { volume: Some(&plan.volume), ..Default::default() };
        admit(&records, tx, plan.volume.project, &planned)?;
        tx.create(&plan.volume);
        engine.note_resumed(&records, &outputs.resumed, tx);
        Ok(())
    }

    fn abort(plan: &CopyPlan, _: &CopyOutputs, _: &EngineInner, tx: &mut Tx) -> Result<()> {
        let volume = &plan.volume;
        tx.release_name("volumes", &scope(volume), &volume.name, &volume.id.to_string());
        Ok(())
    }

    fn announce(plan: &CopyPlan) -> Vec<(&'static str, String)> {
        vec![("storage-volume-created", plan.path.clone())]
    }
}
