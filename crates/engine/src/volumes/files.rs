//! Files of custom volumes that are trees, whoever uses them: read, written and deleted one by one, as those of guests.
//!
//! The host reaches them as those of a container that does not run, beneath the root of the tree; what a guest that has the volume
//! sees of it at once. Owners are those that guests see.

use crate::{
    Engine,
    compute::guest::{FileUpload, OpenFile, check_file_path, check_write},
    context::Context,
};
use karst_agent::{CallContext, FileRef, FileWriteRequest, HostAgent, VolumeRef};
use karst_model::{Error, InstanceId, Result, access::Permission, guest::FileWrite, instance::InstanceKind};
use std::{sync::Arc, time::Duration};

const CALL: Duration = Duration::from_secs(60);

/// A custom volume as it is named.
#[derive(Debug, Clone, Copy)]
pub struct VolumeAt<'a> {
    /// Project that asks.
    pub project: &'a str,
    /// Pool.
    pub pool: &'a str,
    /// Name.
    pub name: &'a str,
}

impl Engine {
    fn volume_file(
        &self,
        context: &Context,
        at: VolumeAt<'_>,
        path: &str,
    ) -> Result<(FileRef, Arc<dyn HostAgent>)> {
        let project = self.project(context, at.project, Permission::InstanceUse)?;
        let inner = self.inner();
        let records = inner.inventory.read();
        // A project without volumes of its own uses those of another: who may only use that one changes nothing in it.
        let owner = records.volume_project(project.id);
        if owner != project.id && !context.principal().may(Permission::ResourceEdit, Some(owner)) {
            return Err(Error::forbidden(format!(
                "the custom volumes of project {:?} are those of another project; their files are reached by who may change them there",
                at.project
            )));
        }
        let row = records.demand_volume(project.id, at.pool, at.name)?;
        if row.content.is_disk() {
            let text =
                format!("volume {:?} is a disk, which has no files; attach it to an instance", at.name);
            return Err(Error::unsupported(text));
        }
        check_file_path(path)?;
        let file = FileRef {
            instance: InstanceId(row.id.uuid()),
            kind: InstanceKind::Container,
            root: VolumeRef { pool: row.pool, volume: row.id },
            path: path.to_owned(),
        };
        Ok((file, inner.agents.get(inner.node)?))
    }

    /// Opens a file of a custom volume.
    ///
    /// # Errors
    /// Not found, invalid path, forbidden; unsupported for a disk.
    pub async fn volume_file_open(
        &self,
        context: &Context,
        at: VolumeAt<'_>,
        path: &str,
    ) -> Result<OpenFile> {
        let (file, agent) = self.volume_file(context, at, path)?;
        let answer = agent.file_open(&CallContext::read(CALL), file).await?;
        Ok(OpenFile { opened: answer.value, content: answer.fds.into_iter().next() })
    }

    /// Writes a file, directory or link in a custom volume. For a regular file the content goes into the answer's sink.
    ///
    /// # Errors
    /// Not found, invalid path or mode, forbidden; unsupported for a disk.
    pub async fn volume_file_write(
        &self,
        context: &Context,
        at: VolumeAt<'_>,
        write: FileWrite,
    ) -> Result<FileUpload> {
        check_write(&write)?;
        let (file, agent) = self.volume_file(context, at, &write.path)?;
        let answer = agent.file_write(&CallContext::read(CALL), FileWriteRequest { file, write }).await?;
        let session = answer.value.map(|id| self.session(agent, id));
        Ok(FileUpload::new(answer.fds.into_iter().next(), session))
    }

    /// Deletes a file or an empty directory of a custom volume.
    ///
    /// # Errors
    /// Not found, invalid path, forbidden; unsupported for a disk.
    pub async fn volume_file_delete(&self, context: &Context, at: VolumeAt<'_>, path: &str) -> Result<()> {
        let (file, agent) = self.volume_file(context, at, path)?;
        agent.file_delete(&CallContext::read(CALL), file).await
    }
}
