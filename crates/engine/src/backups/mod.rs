//! Backups of instances and custom volumes, in Incus' format: the use cases. A backup is a file that its node keeps; its
//! record says what it is of and when it goes. What is imported is uploaded to the node first, and taken apart there by a
//! worker without privileges: control sees what `index.yaml` says, and nothing of the content.

pub mod create;
pub mod import;
pub(crate) mod index;

use crate::{
    Engine, EngineInner, Records, Row,
    context::Context,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    snapshots::{Found, Origin},
};
use async_trait::async_trait;
use karst_agent::{BackupFacts, BackupKind, CallContext, WithFds};
use karst_model::{
    BackupId, Error, ErrorKind, Name, NodeId, Result,
    access::Permission,
    backup::{Backup, BackupOwner},
    instance::InstanceKind,
};
use serde::{Deserialize, Serialize};
use std::{os::fd::OwnedFd, sync::Weak, time::Duration};

pub(crate) const CALL: Duration = Duration::from_secs(60);

/// Lock target of a backup.
pub(crate) fn lock(id: BackupId) -> String {
    format!("backups/{id}")
}

/// How the parts of an instance's backup are laid out.
pub(crate) fn kind_of(kind: InstanceKind) -> BackupKind {
    match kind {
        InstanceKind::Container => BackupKind::Container,
        InstanceKind::VirtualMachine => BackupKind::VirtualMachine,
    }
}

impl Found {
    pub(crate) fn owner(&self) -> BackupOwner {
        match self {
            Self::Instance(i) => BackupOwner::Instance { instance: i.id },
            Self::Volume(v) => BackupOwner::Volume { volume: v.id },
        }
    }

    /// Path of a backup of it in the API.
    pub(crate) fn backup_path(&self, records: &Records, backup: &str) -> String {
        self.path(records, "\0").replace("/snapshots/\0", &format!("/backups/{backup}"))
    }
}

impl Records {
    /// Backups of one thing, oldest first.
    pub(crate) fn backups_of(&self, owner: BackupOwner) -> Vec<&Row<Backup>> {
        let mut all: Vec<_> = self.backups.values().filter(|b| b.owner == owner).collect();
        all.sort_by_key(|b| (b.created_at, b.id));
        all
    }
}

fn demand<'a>(records: &'a Records, found: &Found, name: &str) -> Result<&'a Row<Backup>> {
    let mut all = records.backups_of(found.owner()).into_iter();
    all.find(|b| *b.name == *name)
        .ok_or_else(|| Error::not_found(format!("backup {name:?} of {} not found", found.words())))
}

impl Engine {
    /// Backups of an instance or custom volume, oldest first.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn backups(&self, context: &Context, origin: Origin<'_>) -> Result<Vec<Row<Backup>>> {
        let project = self.project(context, origin.project(), Permission::ProjectView)?;
        let records = self.inner().inventory.read();
        let found = origin.find(&records, project.id)?;
        Ok(records.backups_of(found.owner()).into_iter().cloned().collect())
    }

    /// A backup by name.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn backup(&self, context: &Context, origin: Origin<'_>, name: &str) -> Result<Row<Backup>> {
        let project = self.project(context, origin.project(), Permission::ProjectView)?;
        let records = self.inner().inventory.read();
        let found = origin.find(&records, project.id)?;
        demand(&records, &found, name).cloned()
    }

    /// Opens the file of a backup for reading. It holds everything that the owner holds, so it takes the right to change
    /// it.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub async fn backup_open(
        &self,
        context: &Context,
        origin: Origin<'_>,
        name: &str,
    ) -> Result<WithFds<BackupFacts>> {
        let project = origin.editor(self, context)?;
        let inner = self.inner();
        let (node, id) = {
            let records = inner.inventory.read();
            let found = origin.find(&records, project.id)?;
            let row = demand(&records, &found, name)?;
            (row.node, row.id)
        };
        inner.agents.get(node)?.backup_open(&CallContext::read(CALL), id).await
    }

    /// Renames a backup.
    ///
    /// # Errors
    /// Invalid name, not found, conflict (taken, busy), forbidden.
    pub async fn backup_rename(
        &self,
        context: &Context,
        origin: Origin<'_>,
        name: &str,
        new: &str,
    ) -> Result<()> {
        let project = origin.editor(self, context)?;
        let new = Name::parse("name", new)?;
        let inner = self.inner();
        let path = inner
            .transact(|records, tx| {
                let found = origin.find(records, project.id)?;
                let row = demand(records, &found, name)?;
                if demand(records, &found, &new).is_ok() {
                    return Err(Error::conflict(format!(
                        "{} has a backup {:?} already",
                        found.words(),
                        &*new
                    ))
                    .at("name"));
                }
                tx.expect_unlocked(&lock(row.id));
                let (scope, id) = (row.owner.scope(), row.id.to_string());
                tx.release_name("backups", &scope, &row.name, &id);
                tx.take_name("backups", &scope, &new, &id);
                tx.replace(
                    row,
                    &Backup { name: new.clone(), spec_version: row.spec_version + 1, ..row.value.clone() },
                );
                Ok(found.backup_path(records, &new))
            })
            .await?;
        inner.announce(context, Some(project.id), "instance-backup-renamed", path);
        Ok(())
    }

    /// Deletes a backup.
    ///
    /// # Errors
    /// Not found, conflict (busy), forbidden.
    pub async fn backup_delete(
        &self,
        context: &Context,
        origin: Origin<'_>,
        name: &str,
    ) -> Result<LiveOperation> {
        let project = origin.editor(self, context)?;
        let inner = self.inner();
        runner::start::<BackupDelete>(inner, context, |tx| {
            let records = inner.inventory.read();
            let found = origin.find(&records, project.id)?;
            let row = demand(&records, &found, name)?;
            tx.expect(row);
            let path = found.backup_path(&records, name);
            let plan = DeletePlan { id: row.id, node: row.node, path: path.clone() };
            Ok((plan, NewOperation::task("Deleting backup", Some(project.id), "backups", path)))
        })
        .await
    }

    /// Begins the upload of a file that is to be imported.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn backup_upload(&self, context: &Context, project: &str) -> Result<BackupId> {
        self.project(context, project, Permission::ResourceEdit)?;
        Ok(BackupId(self.inner().env.uuid()))
    }

    /// Opens the staging file of an upload: write the data there and close it.
    ///
    /// # Errors
    /// Unavailable, forbidden.
    pub async fn backup_upload_open(
        &self,
        context: &Context,
        project: &str,
        upload: BackupId,
    ) -> Result<OwnedFd> {
        self.project(context, project, Permission::ResourceEdit)?;
        let inner = self.inner();
        let agent = inner.agents.get(inner.node)?;
        let answer = agent.backup_stage(&inner.reconcile_context(CALL), upload).await?;
        let fd = answer.fds.into_iter().next();
        fd.ok_or_else(|| Error::internal("the host opened no staging file", upload))
    }

    /// Drops an upload that will not be imported.
    pub async fn backup_upload_abandon(&self, upload: BackupId) {
        let inner = self.inner();
        if let Ok(agent) = inner.agents.get(inner.node)
            && let Err(e) = agent.backup_delete(&inner.reconcile_context(CALL), upload).await
        {
            tracing::warn!(%upload, error = %e, "an abandoned upload stays until the host drops it");
        }
    }

    /// Deletes what has expired; called by the clock.
    pub(crate) async fn expire_backups(&self, now: jiff::Timestamp) {
        let due: Vec<(BackupId, NodeId, String)> = {
            let records = self.inner().inventory.read();
            let over = records.backups.values().filter(|b| b.expires_at.is_some_and(|t| t <= now));
            over.map(|b| (b.id, b.node, b.name.to_string())).collect()
        };
        for (id, node, name) in due {
            let inner = self.inner();
            let started = runner::start::<BackupDelete>(inner, &Context::system(), |tx| {
                let records = inner.inventory.read();
                let row = records.backups.get(&id).ok_or_else(|| Error::not_found("the backup is gone"))?;
                tx.expect(row);
                let owner = match row.owner {
                    BackupOwner::Instance { instance } => {
                        records.instances.get(&instance).cloned().map(Found::Instance)
                    }
                    BackupOwner::Volume { volume } => {
                        records.volumes.get(&volume).cloned().map(Found::Volume)
                    }
                };
                let path = owner.map(|o| o.backup_path(&records, &name)).unwrap_or_default();
                let plan = DeletePlan { id, node, path: path.clone() };
                Ok((plan, NewOperation::task("Deleting expired backup", None, "backups", path)))
            })
            .await;
            let done = match started {
                Ok(operation) => operation.ended().await.error.clone().map_or(Ok(()), Err),
                Err(e) => Err(e),
            };
            match done {
                Ok(()) => {}
                // Busy or gone meanwhile: the next look will do.
                Err(e) if matches!(e.kind, ErrorKind::Conflict | ErrorKind::NotFound) => {}
                Err(e) => tracing::warn!(backup = %name, error = %e, "an expired backup was not deleted"),
            }
        }
    }
}

/// How often it is looked for backups that have expired.
const LOOK: Duration = Duration::from_secs(15);

/// Deletes what has expired, until the engine ends.
pub(crate) async fn follow(weak: Weak<EngineInner>) {
    loop {
        let Some(inner) = weak.upgrade() else { return };
        let env = inner.env.clone();
        Engine { inner }.expire_backups(env.now()).await;
        env.sleep(LOOK).await;
    }
}

impl EngineInner {
    /// Deletes the backups of what is being deleted, files and records. The caller holds the owner's lock, so none is
    /// made meanwhile.
    pub(crate) async fn forget_backups(&self, cx: &StepContext, owner: BackupOwner) -> Result<()> {
        loop {
            let some: Vec<(BackupId, NodeId)> = {
                let records = self.inventory.read();
                records.backups_of(owner).into_iter().take(40).map(|b| (b.id, b.node)).collect()
            };
            if some.is_empty() {
                return Ok(());
            }
            for (id, node) in &some {
                cx.agent(*node)?.backup_delete(&cx.mutate(CALL), *id).await?;
            }
            self.transact(|records, tx| {
                for row in some.iter().filter_map(|(id, _)| records.backups.get(id)) {
                    tx.delete(row);
                    tx.release_name("backups", &row.owner.scope(), &row.name, &row.id.to_string());
                }
                Ok(())
            })
            .await?;
        }
    }
}

/// Plan of [`BackupDelete`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeletePlan {
    id: BackupId,
    node: NodeId,
    path: String,
}

/// Deletes the file, then the record. The file cannot be brought back: the step has no undo, and a failure leaves a backup
/// that can be deleted again.
pub struct BackupDelete;

#[async_trait]
impl Saga for BackupDelete {
    const NAME: &'static str = "backup-delete";
    const STEPS: &'static [&'static str] = &["file"];
    type Plan = DeletePlan;
    type Outputs = ();

    fn retries(_: usize) -> u32 {
        5
    }
    fn locks(plan: &DeletePlan) -> Vec<String> {
        vec![lock(plan.id)]
    }
    fn begin(_: &DeletePlan, _: &EngineInner, _: &mut crate::db::Tx) -> Result<()> {
        Ok(())
    }
    async fn run(cx: &StepContext, plan: &DeletePlan, _: &mut (), _: usize) -> Result<()> {
        cx.agent(plan.node)?.backup_delete(&cx.mutate(CALL), plan.id).await
    }
    async fn undo(_: &StepContext, _: &DeletePlan, _: &(), _: usize) -> Result<()> {
        Ok(())
    }
    fn commit(plan: &DeletePlan, _: &(), engine: &EngineInner, tx: &mut crate::db::Tx) -> Result<()> {
        let records = engine.inventory.read();
        if let Some(row) = records.backups.get(&plan.id) {
            tx.delete(row);
            tx.release_name("backups", &row.owner.scope(), &row.name, &row.id.to_string());
        }
        Ok(())
    }
    fn abort(_: &DeletePlan, _: &(), _: &EngineInner, _: &mut crate::db::Tx) -> Result<()> {
        Ok(())
    }
    fn announce(plan: &DeletePlan) -> Vec<(&'static str, String)> {
        vec![("instance-backup-deleted", plan.path.clone())]
    }
}
