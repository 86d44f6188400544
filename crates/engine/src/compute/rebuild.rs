//! Rebuilding: a stopped instance begins anew, of an image or empty, and keeps its name, configuration, addresses and
//! snapshots.

use super::{create::InstanceSource, lock, path};
use crate::{
    Engine, EngineInner,
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    volumes,
};
use async_trait::async_trait;
use karst_agent::{VolumeRebuild, VolumeRef};
use karst_model::{
    Config, Error, ImageId, InstanceId, NodeId, Result,
    access::Permission,
    image::Application,
    instance::{InstanceKind, Lifecycle},
    spec::VolumeSource,
    template::{Templates, Trigger},
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

impl Engine {
    /// Replaces the root of a stopped instance.
    ///
    /// # Errors
    /// Not found (instance, image), invalid (an image for another kind), conflict when it runs or is busy, forbidden.
    pub async fn instance_rebuild(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        source: InstanceSource,
    ) -> Result<LiveOperation> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        self.demand_source(context, &source)?;
        let inner = self.inner();
        runner::start::<InstanceRebuild>(inner, context, |tx| {
            let records = inner.inventory.read();
            let row = records.instance(&project, name)?;
            if row.lifecycle != Lifecycle::Ready {
                return Err(Error::conflict(format!("instance {name:?} is being made or deleted")));
            }
            if volumes::runs(&records, row) {
                return Err(Error::conflict(format!("instance {name:?} is running; stop it to rebuild it")));
            }
            if row.stateful {
                let text =
                    format!("instance {name:?} keeps its memory over its stop; start it and stop it without");
                return Err(Error::conflict(text));
            }
            crate::checkpoints::demand_none_of(&records, row.id, "and would get another disk")?;
            crate::layers::demand_one_of(&records, row, "and would get another disk")?;
            crate::keys::demand_open_root(&records, row)?;
            tx.expect(row);
            tx.expect(&project);
            let image = inner.source_image(&records, &project, &source, row.kind)?;
            if let Some(image) = &image {
                if row.is_application() != image.application.is_some() {
                    let text = "application containers are rebuilt of images of the OCI, and only they are";
                    return Err(Error::invalid("source.alias", text));
                }
                tx.expect_unlocked(&crate::images::lock(image.id));
                tx.expect(image);
            }
            let root = records.volumes.get(&row.root);
            let root = root.ok_or_else(|| Error::not_found("the root volume is gone"))?;
            let machine = row.kind == InstanceKind::VirtualMachine;
            let path = path(&project.name, name);
            let plan = RebuildPlan {
                instance: row.id,
                node: row.node,
                volume: VolumeRebuild {
                    volume: VolumeRef { pool: root.pool, volume: root.id },
                    source: match &image {
                        Some(image) => VolumeSource::Image {
                            image: image.id,
                            full: records.pools.get(&root.pool).is_some_and(|p| p.full_copy(&root.config)),
                        },
                        None => VolumeSource::Empty,
                    },
                    size: root.size.filter(|_| machine),
                },
                fresh: machine && records.snapshots_of(row.id).is_empty(),
                image: image.as_ref().map(|i| i.id),
                application: image.as_ref().and_then(|i| i.application.clone()),
                fingerprint: image.as_ref().map(|i| i.fingerprint.clone()),
                properties: image
                    .iter()
                    .flat_map(|i| i.properties.iter().map(|(k, v)| (format!("image.{k}"), v.clone())))
                    .collect(),
                templates: image.map(|i| i.templates.clone()).unwrap_or_default(),
                path: path.clone(),
            };
            Ok((plan, NewOperation::task("Rebuilding instance", Some(project.id), "instances", path)))
        })
        .await
    }
}

/// Plan of [`InstanceRebuild`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RebuildPlan {
    instance: InstanceId,
    node: NodeId,
    volume: VolumeRebuild,
    /// A virtual machine's firmware variables and TPM begin anew too; those of snapshots would go with them.
    fresh: bool,
    image: Option<ImageId>,
    fingerprint: Option<String>,
    properties: Config,
    /// How the image is run.
    #[serde(default)]
    application: Option<Application>,
    #[serde(default)]
    templates: Templates,
    path: String,
}

/// Replaces the content of the root in one step of the host, then the record says of what it was made. What was there
/// cannot be brought back but by a snapshot: the step has no undo, and should it fail to its end the instance is as it was
/// and can be rebuilt again.
pub struct InstanceRebuild;

#[async_trait]
impl Saga for InstanceRebuild {
    const NAME: &'static str = "instance-rebuild";
    const STEPS: &'static [&'static str] = &["content"];
    type Plan = RebuildPlan;
    type Outputs = ();

    fn retries(_: usize) -> u32 {
        5
    }
    fn locks(plan: &RebuildPlan) -> Vec<String> {
        vec![lock(plan.instance)]
    }
    fn begin(_: &RebuildPlan, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    async fn run(cx: &StepContext, plan: &RebuildPlan, _: &mut (), _: usize) -> Result<()> {
        let agent = cx.agent(plan.node)?;
        agent.volume_rebuild(&cx.mutate(super::copy::WHOLE), plan.volume.clone()).await?;
        if plan.fresh {
            agent.guest_destroy(&cx.mutate(Duration::from_secs(60)), plan.instance).await?;
        }
        Ok(())
    }
    async fn undo(_: &StepContext, _: &RebuildPlan, _: &(), _: usize) -> Result<()> {
        Ok(())
    }
    fn commit(plan: &RebuildPlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let row = engine.instance_row(plan.instance)?;
        let mut instance = row.value.clone();
        instance.image = plan.image;
        instance.image_properties = plan.properties.clone();
        match &plan.fingerprint {
            Some(f) => drop(instance.volatile.insert("volatile.base_image".into(), f.clone())),
            None => drop(instance.volatile.remove("volatile.base_image")),
        }
        if let Some(application) = &plan.application {
            // As the image has it, whatever was set of it; further variables of the user's stay.
            instance.config.retain(|k, _| !k.starts_with("oci."));
            karst_model::application::fill_in(&mut instance.config, application);
        }
        super::templates::take(&mut instance, &engine.inventory.read(), &plan.templates, Trigger::Create);
        // It descends from no snapshot any more.
        instance.current_snapshot = None;
        instance.spec_version += 1;
        tx.replace(&row, &instance);
        Ok(())
    }
    fn abort(_: &RebuildPlan, _: &(), _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    fn announce(plan: &RebuildPlan) -> Vec<(&'static str, String)> {
        vec![("instance-rebuilt", plan.path.clone())]
    }
}
