//! Uploads of images: parts that control writes to the host's staging files.
//!
//! An upload that is not handed to a saga is dropped with its handle, also when its client went away in mid-transfer, and
//! those that an earlier process left are dropped when the engine opens: a staged part belongs to a handle, to a saga, or
//! to nobody.

use crate::{Engine, EngineInner, context::Context, images};
use karst_agent::{CallContext, HostAgent, ImagePart, ImageStage};
use karst_env::EnvExt;
use karst_model::{Error, ImageId, Result, access::Permission, size::ByteSize};
use std::{
    collections::BTreeSet,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, Weak},
};

/// Uploads that this process carries on.
pub(crate) type Open = Mutex<BTreeSet<ImageId>>;

/// An upload in progress; dropping it drops what was uploaded.
#[derive(Debug)]
pub struct ImageUpload {
    id: ImageId,
    engine: Weak<EngineInner>,
    given: bool,
}

/// Where a part of an image is written to.
#[derive(Debug)]
pub struct PartUpload {
    /// To write to, and to close.
    pub file: OwnedFd,
    /// Bytes that it may have.
    pub limit: u64,
}

impl PartUpload {
    /// Refuses more than the part may have.
    ///
    /// # Errors
    /// Quota, naming the limit.
    pub fn check(&self, written: u64) -> Result<()> {
        if written <= self.limit {
            return Ok(());
        }
        Err(Error::quota(format!(
            "the upload is larger than the {} that this host takes now (uploads in host-policy.toml)",
            ByteSize(self.limit)
        )))
    }
}

impl ImageUpload {
    /// The image to be.
    pub fn id(&self) -> ImageId {
        self.id
    }

    /// A saga has taken it over.
    pub(crate) fn given(&mut self) {
        self.given = true;
        self.close();
    }

    fn close(&self) {
        if let Some(inner) = self.engine.upgrade() {
            inner.uploads.lock().unwrap_or_else(|e| e.into_inner()).remove(&self.id);
        }
    }
}

impl Drop for ImageUpload {
    fn drop(&mut self) {
        let Some(inner) = self.engine.upgrade().filter(|_| !self.given) else { return };
        let (weak, id) = (self.engine.clone(), self.id);
        // Detached: it ends by itself, and the host drops the parts too when this fails.
        drop(inner.env.spawn_task("upload-abandon", async move {
            if let Some(inner) = weak.upgrade() {
                abandon(&inner, id).await;
                inner.uploads.lock().unwrap_or_else(|e| e.into_inner()).remove(&id);
            }
        }));
    }
}

async fn abandon(inner: &Arc<EngineInner>, id: ImageId) {
    let Ok(agent) = inner.agents.get(inner.node) else { return };
    if let Err(e) = agent.image_delete(&inner.reconcile_context(images::CALL), id).await {
        tracing::warn!(image = %id, error = %e, "an abandoned upload stays until the host drops it");
    }
}

impl Engine {
    /// Begins an upload.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn image_upload(&self, context: &Context, project: &str) -> Result<ImageUpload> {
        self.project_of(context, project, images::FEATURE, Permission::ResourceEdit)?;
        let inner = self.inner();
        let id = ImageId(inner.env.uuid());
        inner.uploads.lock().unwrap_or_else(|e| e.into_inner()).insert(id);
        Ok(ImageUpload { id, engine: Arc::downgrade(inner), given: false })
    }

    /// Opens the staging file of a part.
    ///
    /// # Errors
    /// Unavailable; quota when the host has enough uploads, naming its limit.
    pub async fn image_upload_part(
        &self,
        context: &Context,
        project: &str,
        upload: &ImageUpload,
        part: ImagePart,
    ) -> Result<PartUpload> {
        self.project_of(context, project, images::FEATURE, Permission::ResourceEdit)?;
        let inner = self.inner();
        let agent = inner.agents.get(inner.node)?;
        let request = ImageStage { image: upload.id, part };
        let answer = agent.image_stage(&inner.reconcile_context(images::CALL), request).await?;
        let limit = answer.value.limit;
        let file = answer.fds.into_iter().next();
        let file = file.ok_or_else(|| Error::internal("the host opened no staging file", upload.id))?;
        Ok(PartUpload { file, limit })
    }
}

/// Staged images of the host that belong to no handle and no saga.
pub(crate) async fn stale(inner: &EngineInner, agent: &dyn HostAgent) -> Result<Vec<ImageId>> {
    let staged = agent.image_staged(&CallContext::read(images::CALL), ()).await?;
    let open = inner.uploads.lock().unwrap_or_else(|e| e.into_inner()).clone();
    let records = inner.inventory.read();
    let stale = |id: &ImageId| !open.contains(id) && records.lock(&images::lock(*id)).is_none();
    Ok(staged.into_iter().filter(stale).collect())
}

/// Drops what an earlier process was uploading to its own host when it ended.
pub(crate) async fn drop_stale(inner: &Arc<EngineInner>, agent: &dyn HostAgent) {
    match stale(inner, agent).await {
        Ok(stale) => {
            for id in stale {
                tracing::info!(image = %id, "an upload that nobody will finish is dropped");
                abandon(inner, id).await;
            }
        }
        Err(e) => tracing::warn!(error = %e, "stale uploads could not be looked for"),
    }
}
