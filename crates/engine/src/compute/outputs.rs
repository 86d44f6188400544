//! What programs print that run in guests while nobody listens (`record-output`): kept by the guest's host, bounded.

use super::guest::ExecSession;
use crate::{Engine, context::Context};
use karst_agent::{CallContext, ExecOutput};
use karst_model::{Error, ErrorKind, OperationId, Result, access::Permission};
use std::{os::fd::OwnedFd, time::Duration};

pub use karst_agent::OutputStream;

const CALL: Duration = Duration::from_secs(60);

impl Engine {
    /// Has the host keep what is written into one descriptor, as what the program of an operation prints; it is whole when the
    /// session has ended after the descriptor was closed.
    ///
    /// # Errors
    /// Not found, forbidden; those of the host.
    pub async fn exec_output_keep(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        operation: OperationId,
        stream: OutputStream,
    ) -> Result<ExecSession> {
        let view = self.find(context, project, name, Permission::InstanceUse)?;
        let agent = self.inner().agents.get(view.instance.node)?;
        let output = ExecOutput { instance: view.instance.id, operation, stream };
        let kept = agent.exec_output_keep(&CallContext::read(CALL), output).await?;
        Ok(ExecSession { fds: kept.fds, session: self.session(agent, kept.value) })
    }

    /// What is kept of an instance, the oldest first, by name; nothing of one that never ran.
    ///
    /// # Errors
    /// Not found, forbidden; those of the host.
    pub async fn exec_outputs(&self, context: &Context, project: &str, name: &str) -> Result<Vec<String>> {
        let view = self.find(context, project, name, Permission::InstanceUse)?;
        let agent = self.inner().agents.get(view.instance.node)?;
        match agent.exec_outputs(&CallContext::read(CALL), view.instance.id).await {
            // The host has not heard of it yet.
            Err(e) if e.is(ErrorKind::NotFound) => Ok(vec![]),
            all => Ok(all?.iter().map(ExecOutput::name).collect()),
        }
    }

    /// Opens what is kept under a name, for reading.
    ///
    /// # Errors
    /// Not found, forbidden; those of the host.
    pub async fn exec_output(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        output: &str,
    ) -> Result<OwnedFd> {
        let view = self.find(context, project, name, Permission::InstanceUse)?;
        let agent = self.inner().agents.get(view.instance.node)?;
        let output = named(&view.instance, output)?;
        let opened = agent.exec_output_open(&CallContext::read(CALL), output).await?;
        let file = opened.fds.into_iter().next();
        file.ok_or_else(|| Error::internal("the host kept nothing to read", output.name()))
    }

    /// Deletes what is kept under a name.
    ///
    /// # Errors
    /// Not found, forbidden; those of the host.
    pub async fn exec_output_delete(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        output: &str,
    ) -> Result<()> {
        let view = self.find(context, project, name, Permission::InstanceUse)?;
        let agent = self.inner().agents.get(view.instance.node)?;
        let output = named(&view.instance, output)?;
        agent.exec_output_delete(&CallContext::read(CALL), output).await
    }
}

fn named(instance: &karst_model::instance::Instance, name: &str) -> Result<ExecOutput> {
    let missing = || Error::not_found(format!("log {name:?} not found"));
    ExecOutput::named(instance.id, name).ok_or_else(missing)
}
