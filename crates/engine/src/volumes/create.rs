//! Creating custom volumes.

use super::{begin_new, lock, path, scope};
use crate::{
    Engine, EngineInner,
    context::Context,
    db::Tx,
    keys,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    tenancy::limits::{Planned, admit},
};
use async_trait::async_trait;
use karst_agent::VolumeRef;
use karst_model::{
    Config, Name, NodeId, ProjectId, Result, VolumeId,
    encryption::{Encryption, SECRET},
    spec::{VolumeSource, VolumeSpec},
    storage::{DEFAULT_BLOCK_SIZE, Volume, VolumeContent, VolumeOwner, check_volume_config},
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What a user wants created.
#[derive(Debug, Clone)]
pub struct CreateVolume {
    /// Name, unique in project and pool.
    pub name: String,
    /// What it holds.
    pub content: VolumeContent,
    /// User's text.
    pub description: String,
    /// Configuration as written.
    pub config: Config,
}

impl Engine {
    /// Creates a custom volume in a pool.
    ///
    /// # Errors
    /// Invalid by field, not found (pool), conflict (taken name), forbidden.
    pub async fn volume_create(
        &self,
        context: &Context,
        project: &str,
        pool: &str,
        request: CreateVolume,
    ) -> Result<LiveOperation> {
        let project = self.volume_home(context, project)?;
        let inner = self.inner();
        let name = Name::parse("name", &request.name)?;
        check_volume_config(&request.config, request.content)?;
        if let Some((secret, _)) = Encryption::of(&request.config)? {
            // Looked up again when it is made; said now, before anything is.
            inner.passphrase(&[project.id], secret).map_err(|e| e.at(format!("config.{SECRET}")))?;
        }
        runner::start::<VolumeCreate>(inner, context, |tx| {
            let records = inner.inventory.read();
            let pool = records.pool(pool)?;
            let owner = begin_new(&records, tx, &project, pool, &name)?;
            let config = pool.volume_config(&request.config, request.content);
            let size = check_volume_config(&config, request.content)?;
            let size = size.or((request.content != VolumeContent::Filesystem).then_some(DEFAULT_BLOCK_SIZE));
            let volume = Volume {
                id: VolumeId(inner.env.uuid()),
                pool: pool.id,
                project: owner,
                name: name.to_string(),
                content: request.content,
                owner: VolumeOwner::Custom,
                description: request.description.clone(),
                size,
                config,
                spec_version: 1,
                created_at: inner.env.now(),
                layers: Default::default(),
            };
            // Decided when it is there; said now, before anything is made.
            let planned = Planned { volume: Some(&volume), ..Default::default() };
            admit(&records, &mut Tx::default(), owner, &planned)?;
            let path = path(&records, &volume);
            let plan =
                VolumePlan { volume, asked_in: Some(project.id), node: inner.node, path: path.clone() };
            Ok((
                plan,
                NewOperation::task("Creating storage volume", Some(project.id), "storage_volumes", path),
            ))
        })
        .await
    }
}

/// Plan of [`VolumeCreate`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VolumePlan {
    volume: Volume,
    /// The project in which it was asked for, and in which its secret is.
    #[serde(default)]
    asked_in: Option<ProjectId>,
    node: NodeId,
    path: String,
}

/// Makes the volume on its host, then the record. The name is taken from the beginning.
pub struct VolumeCreate;

#[async_trait]
impl Saga for VolumeCreate {
    const NAME: &'static str = "volume-create";
    const STEPS: &'static [&'static str] = &["volume"];
    type Plan = VolumePlan;
    type Outputs = ();

    fn locks(plan: &VolumePlan) -> Vec<String> {
        vec![lock(plan.volume.id)]
    }
    fn begin(plan: &VolumePlan, _: &EngineInner, tx: &mut Tx) -> Result<()> {
        let volume = &plan.volume;
        tx.take_name("volumes", &scope(volume), &volume.name, &volume.id.to_string());
        Ok(())
    }
    async fn run(cx: &StepContext, plan: &VolumePlan, _: &mut (), _: usize) -> Result<()> {
        let agent = cx.agent(plan.node)?;
        let source = match plan.volume.encryption() {
            None => VolumeSource::Empty,
            Some((secret, encryption)) => {
                let projects: Vec<_> = plan.asked_in.into_iter().chain([plan.volume.project]).collect();
                keys::hand_for_volume(cx, &*agent, &projects, secret, plan.volume.id).await?;
                VolumeSource::Encrypted { encryption }
            }
        };
        let spec = VolumeSpec {
            id: plan.volume.id,
            pool: plan.volume.pool,
            content: plan.volume.content,
            size: plan.volume.stored_size(),
            source,
        };
        agent.volume_create(&cx.mutate(Duration::from_secs(600)), spec).await
    }
    async fn undo(cx: &StepContext, plan: &VolumePlan, _: &(), _: usize) -> Result<()> {
        let volume = VolumeRef { pool: plan.volume.pool, volume: plan.volume.id };
        cx.agent(plan.node)?.volume_delete(&cx.mutate(Duration::from_secs(300)), volume).await
    }
    fn commit(plan: &VolumePlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let records = engine.inventory.read();
        let planned = Planned { volume: Some(&plan.volume), ..Default::default() };
        admit(&records, tx, plan.volume.project, &planned)?;
        tx.create(&plan.volume);
        Ok(())
    }
    fn abort(plan: &VolumePlan, _: &(), _: &EngineInner, tx: &mut Tx) -> Result<()> {
        let volume = &plan.volume;
        tx.release_name("volumes", &scope(volume), &volume.name, &volume.id.to_string());
        Ok(())
    }
    fn announce(plan: &VolumePlan) -> Vec<(&'static str, String)> {
        vec![("storage-volume-created", plan.path.clone())]
    }
}
