//! Descriptions in a pool of objects: in an object of its own, a small file system that is mounted while the pool is open.
//!
//! ```text
//! POOL/meta/                     where it is mounted
//! POOL/meta/descriptions/…       as in the pools of directories
//! ```
//! It is made with the first description. A pool that is only looked at has it mounted for reading.

use super::{Object, ObjectPool, blocking};
use crate::{Descriptions, descriptions};
use async_trait::async_trait;
use karst_host::mount;
use karst_model::{Result, VolumeId};
use std::{collections::HashSet, path::PathBuf};

impl ObjectPool {
    /// Where the texts are, mounted; `None` where there are none and `make` does not say to make them.
    async fn texts(&self, make: bool) -> Result<Option<PathBuf>> {
        let at = self.inner.root.join("meta");
        let place = at.clone();
        if blocking(move || Ok(mount::is_mount_point(&place).unwrap_or(false))).await? {
            return Ok(Some(at));
        }
        let _one = self.inner.taking.lock().await;
        let kept = match self.backend().find(Object::Descriptions).await? {
            Some(kept) => kept,
            None if !make => return Ok(None),
            None => {
                let (work, kept) = (self.work(), self.backend().texts());
                self.make(work.object(), kept).await?;
                self.backend().rename(work.object(), Object::Descriptions).await?;
                kept
            }
        };
        self.mount(Object::Descriptions, kept, at.clone()).await?;
        Ok(Some(at))
    }

    /// What is said of volumes that are not there goes.
    pub(super) async fn sweep_texts(&self, volumes: HashSet<VolumeId>) -> Result<()> {
        let Some(at) = self.texts(false).await? else { return Ok(()) };
        let known = move |of: &str| of.parse().is_ok_and(|id| volumes.contains(&id));
        blocking(move || descriptions::sweep_but(&at, known)).await
    }

    /// The volume is gone.
    pub(super) async fn forget_text(&self, volume: VolumeId) -> Result<()> {
        let Some(at) = self.texts(false).await? else { return Ok(()) };
        blocking(move || Ok(descriptions::forget(&at, volume)?)).await
    }
}

#[async_trait]
impl Descriptions for ObjectPool {
    async fn describe(&self, own: Option<String>, volumes: Vec<(VolumeId, String)>) -> Result<()> {
        let Some(at) = self.texts(true).await? else { return Ok(()) };
        let found = self.backend().list().await?.into_iter();
        let known: HashSet<VolumeId> = found
            .filter_map(|(object, _)| match object {
                Object::Volume(v) | Object::Next(v) => Some(v),
                _ => None,
            })
            .collect();
        blocking(move || {
            let own = own.map(|text| (None, text)).into_iter();
            let all = own.chain(volumes.into_iter().map(|(id, text)| (Some(id), text)));
            Ok(descriptions::describe_known(&at, all.collect(), |id| known.contains(&id))?)
        })
        .await
    }

    async fn description(&self, volume: Option<VolumeId>, most: usize) -> Result<Option<String>> {
        let Some(at) = self.texts(false).await? else { return Ok(None) };
        blocking(move || Ok(descriptions::said(&at, volume, most)?)).await
    }
}
