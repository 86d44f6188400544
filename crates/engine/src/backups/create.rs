//! Making backups. What runs is paused for the moment in which its state is frozen; the file is packed from what was
//! frozen while the guest goes on.

use super::{CALL, index, kind_of};
use crate::{
    Engine, EngineInner,
    compute::states,
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    snapshots::{
        Found, Origin, Row2,
        pause::{PausedGuest, guest, pause, release, resume},
    },
    tenancy::{restricted, rules::ProjectRules},
    volumes,
};
use async_trait::async_trait;
use jiff::Timestamp;
use karst_agent::{
    BackupCreate as Packing, BackupKind, HostAgent, MachineStateRef, MachineStateSave, VolumeRef,
    VolumeSnapshotRef,
};
use karst_model::{
    BackupId, Error, Name, Result, SnapshotId,
    backup::{Backup, Compression},
    guest::Observed,
    storage::VolumeContent,
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(86_400);
/// Backups of one instance or volume. What all of a host may take, its policy says.
pub const MOST: usize = 128;

/// What a user wants.
#[derive(Debug, Clone, Default)]
pub struct CreateBackup {
    /// Name; one is made up when absent.
    pub name: Option<String>,
    /// When it goes.
    pub expires_at: Option<Timestamp>,
    /// Without the snapshots.
    pub without_snapshots: bool,
    /// How it is compressed; `None`: as the project, or the server, says.
    pub compression: Option<Compression>,
}

impl Engine {
    /// Makes a backup of an instance or custom volume; answers its name and the operation.
    ///
    /// # Errors
    /// Invalid by field, not found, conflict (taken name, busy), unsupported (discs), forbidden.
    pub async fn backup_create(
        &self,
        context: &Context,
        origin: Origin<'_>,
        request: CreateBackup,
    ) -> Result<(String, LiveOperation)> {
        let project = origin.editor(self, context)?;
        let inner = self.inner();
        restricted::check_backup(&ProjectRules::parse(&project.config)?)?;
        let compression =
            request.compression.unwrap_or_else(|| self.settings_in(&project).backup_compression);
        let mut chosen = String::new();
        let operation = runner::start::<BackupCreate>(inner, context, |tx| {
            let records = inner.inventory.read();
            let found = origin.find(&records, project.id)?;
            found.demand_ready()?;
            found.expect(tx);
            tx.expect(&project);
            let whole = "which a backup would not hold";
            match &found {
                Found::Instance(row) => crate::layers::demand_one_of(&records, row, whole)?,
                Found::Volume(row) => crate::layers::demand_one(&records, row.id, whole)?,
            }
            let there = records.backups_of(found.owner());
            if there.len() >= MOST {
                return Err(Error::quota(format!(
                    "{} has {MOST} backups, as many as there may be of one; delete some, or give them an end (expires_at)",
                    found.words()
                )));
            }
            let taken = |name: &str| there.iter().any(|b| *b.name == *name);
            let name = match request.name.as_deref().filter(|n| !n.is_empty()) {
                Some(name) => name.to_owned(),
                None => {
                    let free = (0..=there.len()).map(|n| format!("backup{n}")).find(|n| !taken(n));
                    free.unwrap_or_default()
                }
            };
            let name = Name::parse("name", &name)?;
            if taken(&name) {
                return Err(Error::conflict(format!("{} has a backup {:?} already", found.words(), &*name))
                    .at("name"));
            }
            let now = inner.env.now();
            if request.expires_at.is_some_and(|t| t <= now) {
                return Err(Error::invalid("expires_at", "the time at which it goes is over already"));
            }
            chosen = name.to_string();
            let id = BackupId(inner.env.uuid());
            let snapshots = if request.without_snapshots { vec![] } else { found.taken(&records) };
            let mut guests = vec![];
            let (kind, volume, node, (metadata, templates)) = match &found {
                Found::Instance(row) => {
                    crate::keys::demand_open_root(&records, row)?;
                    guests.extend(guest(&records, row));
                    let root = records.volumes.get(&row.root);
                    let root = root.ok_or_else(|| Error::not_found("the root volume is gone"))?;
                    let volume = VolumeRef { pool: root.pool, volume: root.id };
                    let (metadata, templates) = index::metadata(&records, row);
                    (kind_of(row.kind), volume, row.node, (Some(metadata), templates))
                }
                Found::Volume(row) => {
                    for user in volumes::attached(&records, row) {
                        guests.extend(guest(&records, &user));
                    }
                    let kind = match row.content {
                        VolumeContent::Filesystem => BackupKind::Filesystem,
                        VolumeContent::Block => BackupKind::Block,
                        VolumeContent::Iso => {
                            return Err(Error::unsupported(
                                "a disc has no backup; it is what was imported as it",
                            ));
                        }
                    };
                    (kind, VolumeRef { pool: row.pool, volume: row.id }, inner.node, Default::default())
                }
            };
            let kept = |row: &Row2| match row {
                Row2::Instance(s) => {
                    s.volumes.iter().find(|(v, _)| *v == volume.volume).map(|(_, id)| (s.name.clone(), *id))
                }
                Row2::Volume(s) => Some((s.name.clone(), s.id)),
            };
            let machine = match &found {
                Found::Instance(row) => {
                    let kept = |s: &&Row2| kept(s).is_some();
                    let of = |s: &'_ Row2| match s {
                        Row2::Instance(s) => Some(s.value.clone()),
                        Row2::Volume(_) => None,
                    };
                    let taken: Vec<_> = snapshots.iter().filter(kept).filter_map(of).collect();
                    states::backup(&records, row, &taken.iter().collect::<Vec<_>>())
                }
                Found::Volume(_) => None,
            };
            let mut locks = vec![found.lock()];
            locks.extend(guests.iter().map(|g| crate::compute::lock(g.at.instance)));
            locks.sort();
            locks.dedup();
            let frozen = (!guests.is_empty()).then(|| SnapshotId(inner.env.uuid()));
            let path = found.backup_path(&records, &name);
            let plan = BackupPlan {
                backup: Backup {
                    id,
                    owner: found.owner(),
                    node,
                    name,
                    instance_only: request.without_snapshots,
                    size: 0,
                    created_at: now,
                    expires_at: request.expires_at,
                    spec_version: 1,
                },
                packing: Packing {
                    id,
                    kind,
                    volume,
                    at: frozen,
                    snapshots: snapshots.iter().filter_map(kept).collect(),
                    index: index::write(&records, &found, &snapshots),
                    metadata,
                    templates,
                    compression,
                    machine,
                },
                guests,
                frozen,
                locks,
                path: path.clone(),
            };
            let mut new = NewOperation::task("Backing up", Some(project.id), "backups", path);
            new.may_cancel = true;
            Ok((plan, new))
        })
        .await?;
        Ok((chosen, operation))
    }
}

/// Plan of [`BackupCreate`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BackupPlan {
    backup: Backup,
    packing: Packing,
    /// Those that run.
    guests: Vec<PausedGuest>,
    /// A snapshot of what runs, gone in the end.
    frozen: Option<SnapshotId>,
    locks: Vec<String>,
    path: String,
}

impl BackupPlan {
    fn frozen(&self) -> Option<VolumeSnapshotRef> {
        let VolumeRef { pool, volume } = self.packing.volume;
        self.frozen.map(|snapshot| VolumeSnapshotRef { pool, volume, snapshot })
    }

    async fn drop_frozen(
        &self,
        cx: &StepContext,
        agent: &dyn HostAgent,
        at: VolumeSnapshotRef,
    ) -> Result<()> {
        agent.volume_snapshot_delete(&cx.mutate(LONG), at).await?;
        match self.frozen_machine() {
            Some(at) => agent.machine_state_delete(&cx.mutate(LONG), at).await,
            None => Ok(()),
        }
    }

    fn frozen_machine(&self) -> Option<MachineStateRef> {
        let machine = self.packing.machine.as_ref()?;
        self.frozen.map(|snapshot| MachineStateRef { instance: machine.instance, snapshot })
    }
}

/// Outputs of [`BackupCreate`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct BackupOutputs {
    resumed: Vec<Observed>,
    size: u64,
}

/// Freezes the state of what runs, packs the file, drops what was frozen; then the record is there.
pub struct BackupCreate;

#[async_trait]
impl Saga for BackupCreate {
    const NAME: &'static str = "backup-create";
    const STEPS: &'static [&'static str] = &["pause", "freeze", "resume", "file", "drop"];
    type Plan = BackupPlan;
    type Outputs = BackupOutputs;

    fn has(plan: &BackupPlan, step: usize) -> bool {
        step == 3 || plan.frozen.is_some()
    }

    fn locks(plan: &BackupPlan) -> Vec<String> {
        plan.locks.clone()
    }

    fn begin(plan: &BackupPlan, _: &EngineInner, tx: &mut Tx) -> Result<()> {
        let backup = &plan.backup;
        tx.take_name("backups", &backup.owner.scope(), &backup.name, &backup.id.to_string());
        Ok(())
    }

    async fn run(
        cx: &StepContext,
        plan: &BackupPlan,
        outputs: &mut BackupOutputs,
        step: usize,
    ) -> Result<()> {
        let agent = cx.agent(plan.backup.node)?;
        match (step, plan.frozen()) {
            (0, _) => drop(pause(cx, &plan.guests).await?),
            (1, Some(at)) => {
                agent.volume_snapshot_create(&cx.mutate(LONG), at).await?;
                if let Some(at) = plan.frozen_machine() {
                    let save = MachineStateSave { at, memory: false };
                    agent.machine_state_save(&cx.mutate(LONG), save).await?;
                }
            }
            (2, _) => outputs.resumed = resume(cx, &plan.guests).await?,
            (3, _) => {
                outputs.size = agent.backup_create(&cx.mutate(LONG), plan.packing.clone()).await?.size;
            }
            (4, Some(at)) => plan.drop_frozen(cx, &*agent, at).await?,
            _ => {}
        }
        Ok(())
    }

    async fn undo(cx: &StepContext, plan: &BackupPlan, _: &BackupOutputs, step: usize) -> Result<()> {
        let agent = cx.agent(plan.backup.node)?;
        match (step, plan.frozen()) {
            (0, _) => release(cx, &plan.guests).await?,
            (1, Some(at)) => plan.drop_frozen(cx, &*agent, at).await?,
            (3, _) => agent.backup_delete(&cx.mutate(CALL), plan.backup.id).await?,
            _ => {}
        }
        Ok(())
    }

    fn commit(plan: &BackupPlan, outputs: &BackupOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        tx.create(&Backup { size: outputs.size, ..plan.backup.clone() });
        engine.note_resumed(&engine.inventory.read(), &outputs.resumed, tx);
        Ok(())
    }

    fn abort(plan: &BackupPlan, _: &BackupOutputs, _: &EngineInner, tx: &mut Tx) -> Result<()> {
        let backup = &plan.backup;
        tx.release_name("backups", &backup.owner.scope(), &backup.name, &backup.id.to_string());
        Ok(())
    }

    fn announce(plan: &BackupPlan) -> Vec<(&'static str, String)> {
        vec![("instance-backup-created", plan.path.clone())]
    }
}
