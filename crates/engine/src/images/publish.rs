//! Images made of instances and of their snapshots. What runs is paused for the moment in which its state is frozen; the
//! image is packed from what was frozen while the guest goes on.

use super::{FEATURE, ImageOptions, check_options, commit_new, demand_unlike, lock, path, told};
use crate::{
    Engine, EngineInner,
    backups::index,
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    snapshots::pause::{PausedGuest, guest, pause, release, resume},
};
use async_trait::async_trait;
use karst_agent::{ImagePublish as Packing, VolumeRef, VolumeSnapshotRef};
use karst_model::{
    Error, ImageId, NodeId, ProjectId, Result, SnapshotId, access::Permission, backup::Compression,
    guest::Observed, image::ImageFacts, instance::Lifecycle,
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(86_400);
const CALL: Duration = Duration::from_secs(60);

/// What a user wants published.
#[derive(Debug, Clone, Default)]
pub struct PublishImage {
    /// Project of the instance; `None`: that of the image.
    pub project: Option<String>,
    /// Name of the instance.
    pub name: String,
    /// As it was at this snapshot; `None`: now.
    pub snapshot: Option<String>,
    /// How the archive is compressed; `None`: as the project of the image, or the server, says.
    pub compression: Option<Compression>,
    /// What is said of the image; properties go over those of the instance's own image.
    pub options: ImageOptions,
}

impl Engine {
    /// Makes an image of an instance or of a snapshot of one.
    ///
    /// # Errors
    /// Invalid by field, not found, conflict (busy, alias taken), forbidden; what fails later comes with the operation.
    pub async fn image_publish(
        &self,
        context: &Context,
        project: &str,
        request: PublishImage,
    ) -> Result<LiveOperation> {
        let target = self.project_of(context, project, FEATURE, Permission::ResourceEdit)?;
        let origin = request.project.as_deref().filter(|p| !p.is_empty()).unwrap_or(project);
        let origin =
            self.project(context, origin, Permission::InstanceUse).map_err(|e| e.at("source.project"))?;
        check_options(&request.options)?;
        let compression = match request.compression {
            Some(compression) => compression,
            None => {
                let named = self.project(context, project, Permission::ProjectView)?;
                self.settings_in(&named).image_compression
            }
        };
        let inner = self.inner();
        runner::start::<ImagePublish>(inner, context, |tx| {
            let records = inner.inventory.read();
            let source = records.instance(&origin, &request.name).map_err(|e| e.at("source.name"))?;
            if source.lifecycle != Lifecycle::Ready {
                return Err(Error::conflict(format!("instance {:?} is being made or deleted", request.name)));
            }
            tx.expect(source);
            tx.expect(&target);
            if request.snapshot.is_none() {
                crate::layers::demand_one_of(&records, source, "which an image would not have")?;
            }
            crate::keys::demand_open_root(&records, source)?;
            let mut options = request.options.clone();
            let now = inner.env.now();
            if options.expires_at.is_some_and(|t| t <= now) {
                return Err(Error::invalid("expires_at", "the time at which it expires is over already"));
            }
            demand_unlike(&records, target.id, &options)?;
            let root = records.volumes.get(&source.root);
            let root = root.ok_or_else(|| Error::not_found("the root volume is gone"))?;
            let volume = VolumeRef { pool: root.pool, volume: root.id };
            let paused = if request.snapshot.is_none() { guest(&records, source) } else { None };
            let at = match request.snapshot.as_deref() {
                None => paused.map(|_| SnapshotId(inner.env.uuid())),
                Some(name) => {
                    let all = records.snapshots_of(source.id);
                    let found = all.iter().find(|s| *s.name == *name);
                    let kept = found.and_then(|s| s.volumes.iter().find(|(v, _)| *v == root.id));
                    let missing = || {
                        let text = format!("snapshot {name:?} of instance {:?} not found", request.name);
                        Error::not_found(text).at("source.name")
                    };
                    Some(kept.ok_or_else(missing)?.1)
                }
            };
            let (mut metadata, templates) = index::metadata(&records, source);
            metadata["creation_date"] = now.as_second().into();
            metadata["expiry_date"] = options.expires_at.map_or(0, |t| t.as_second()).into();
            if let Some(properties) = metadata["properties"].as_object_mut() {
                properties.extend(options.properties.iter().map(|(k, v)| (k.clone(), v.clone().into())));
                properties.entry("architecture").or_insert_with(|| source.architecture.clone().into());
                let text = format!("{} {}", source.kind, request.name);
                properties.entry("description").or_insert_with(|| text.into());
            }
            let id = ImageId(inner.env.uuid());
            if options.filename.is_empty() {
                options.filename = format!("{}.tar", request.name);
            }
            let plan = PublishPlan {
                packing: Packing {
                    image: id,
                    kind: source.kind,
                    volume,
                    at,
                    metadata,
                    templates,
                    compression,
                },
                frozen: paused.is_some(),
                guest: paused,
                project: target.id,
                node: source.node,
                lock: crate::compute::lock(source.id),
                options,
            };
            let mut new =
                NewOperation::task("Publishing instance", Some(target.id), "images", path(&id.to_string()));
            new.may_cancel = true;
            Ok((plan, new))
        })
        .await
    }
}

/// Plan of [`ImagePublish`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PublishPlan {
    packing: Packing,
    /// What is packed is a snapshot of what runs, gone in the end.
    frozen: bool,
    /// The instance, when it runs.
    guest: Option<PausedGuest>,
    project: ProjectId,
    node: NodeId,
    /// Of the instance.
    lock: String,
    options: ImageOptions,
}

impl PublishPlan {
    fn frozen(&self) -> Option<VolumeSnapshotRef> {
        let VolumeRef { pool, volume } = self.packing.volume;
        self.packing.at.filter(|_| self.frozen).map(|snapshot| VolumeSnapshotRef { pool, volume, snapshot })
    }
}

/// Outputs of [`ImagePublish`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct PublishOutputs {
    resumed: Vec<Observed>,
    facts: Option<ImageFacts>,
}

/// Freezes the state of what runs, packs it as an image, drops what was frozen; then record and aliases are there.
pub struct ImagePublish;

#[async_trait]
impl Saga for ImagePublish {
    const NAME: &'static str = "image-publish";
    const STEPS: &'static [&'static str] = &["pause", "freeze", "resume", "content", "drop"];
    type Plan = PublishPlan;
    type Outputs = PublishOutputs;

    fn has(plan: &PublishPlan, step: usize) -> bool {
        step == 3 || plan.frozen
    }

    fn locks(plan: &PublishPlan) -> Vec<String> {
        vec![lock(plan.packing.image), plan.lock.clone()]
    }

    fn begin(_: &PublishPlan, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }

    async fn run(
        cx: &StepContext,
        plan: &PublishPlan,
        outputs: &mut PublishOutputs,
        step: usize,
    ) -> Result<()> {
        let agent = cx.agent(plan.node)?;
        match (step, plan.frozen()) {
            (0, _) => drop(pause(cx, plan.guest.as_slice()).await?),
            (1, Some(at)) => agent.volume_snapshot_create(&cx.mutate(LONG), at).await?,
            (2, _) => outputs.resumed = resume(cx, plan.guest.as_slice()).await?,
            (3, _) => {
                let facts = agent.image_publish(&cx.mutate(LONG), plan.packing.clone()).await?;
                super::check_new(cx, plan.project, &plan.options, &facts)?;
                outputs.facts = Some(facts);
            }
            (4, Some(at)) => agent.volume_snapshot_delete(&cx.mutate(LONG), at).await?,
            _ => {}
        }
        Ok(())
    }

    async fn undo(cx: &StepContext, plan: &PublishPlan, _: &PublishOutputs, step: usize) -> Result<()> {
        let agent = cx.agent(plan.node)?;
        match (step, plan.frozen()) {
            (0, _) => release(cx, plan.guest.as_slice()).await?,
            (1, Some(at)) => agent.volume_snapshot_delete(&cx.mutate(LONG), at).await?,
            (3, _) => agent.image_delete(&cx.mutate(CALL), plan.packing.image).await?,
            _ => {}
        }
        Ok(())
    }

    fn commit(plan: &PublishPlan, outputs: &PublishOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let facts = outputs.facts.as_ref();
        let facts =
            facts.ok_or_else(|| Error::internal("an image's facts are missing", plan.packing.image))?;
        commit_new(engine, tx, (plan.packing.image, plan.project), &plan.options, facts)?;
        engine.note_resumed(&engine.inventory.read(), &outputs.resumed, tx);
        Ok(())
    }

    fn abort(_: &PublishPlan, _: &PublishOutputs, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }

    fn result(
        _: &PublishPlan,
        outputs: &PublishOutputs,
        _: &EngineInner,
    ) -> serde_json::Map<String, serde_json::Value> {
        outputs.facts.as_ref().map(|f| told(&f.fingerprint, f.size)).unwrap_or_default()
    }

    fn announce(plan: &PublishPlan) -> Vec<(&'static str, String)> {
        vec![("image-created", path(&plan.packing.image.to_string()))]
    }
}
