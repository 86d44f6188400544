//! Snapshots of instances and of custom volumes: the use cases. One set of sagas serves both; [`Taken`] says which.
//!
//! The snapshots of an instance are a tree: each descends from the one that the instance descended from when it was taken,
//! a restore moves that pointer, and deletion lets the children descend from the parent. On the host they do not depend on
//! each other. All volumes of one snapshot are of one instant: running guests are paused around it.

pub mod change;
pub mod create;
pub mod delete;
pub(crate) mod pause;
pub mod restore;
pub mod restore_running;
pub mod schedule;

use crate::{
    Engine, EngineInner, Records, Row, compute::disks::custom_root, compute::expand::parse_devices,
    context::Context, db::Tx, tenancy::restricted, tenancy::rules::ProjectRules,
};
use jiff::Timestamp;
use karst_agent::VolumeSnapshotRef;
use karst_model::{
    Config, Error, InstanceId, ProjectId, Result, SnapshotId, VolumeId,
    access::Permission,
    device::{Devices, DiskOrigin},
    instance::{Instance, InstanceKind},
    project::{DEFAULT_PROJECT, Project},
    schedule::{self as calendar, Span},
    snapshot::{Snapshot, VolumeSnapshot},
    storage::{Volume, VolumeContent, VolumeOwner},
};
use serde::{Deserialize, Serialize};

/// A snapshot of an instance or of a custom volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "of", rename_all = "snake_case")]
pub enum Taken {
    /// Of an instance.
    Instance {
        /// Its record.
        snapshot: Box<Snapshot>,
    },
    /// Of a custom volume.
    Volume {
        /// Its record.
        snapshot: Box<VolumeSnapshot>,
    },
}

/// What a snapshot is of, by the names of the API.
#[derive(Debug, Clone, Copy)]
pub enum Origin<'a> {
    /// An instance of a project.
    Instance {
        /// Project.
        project: &'a str,
        /// Name.
        name: &'a str,
    },
    /// A custom volume of a project.
    Volume {
        /// Project.
        project: &'a str,
        /// Pool.
        pool: &'a str,
        /// Name.
        name: &'a str,
    },
}

impl Origin<'_> {
    /// The project, for a request that changes snapshots.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub(crate) fn editor(&self, engine: &crate::Engine, context: &Context) -> Result<Row<Project>> {
        match self {
            Self::Instance { project, .. } => engine.project(context, project, Permission::ResourceEdit),
            Self::Volume { project, .. } => engine.volume_home(context, project),
        }
    }

    /// The project.
    pub fn project(&self) -> &str {
        match self {
            Self::Instance { project, .. } | Self::Volume { project, .. } => project,
        }
    }

    pub(crate) fn find(&self, records: &Records, project: ProjectId) -> Result<Found> {
        match self {
            Self::Instance { name, .. } => {
                let project = records.projects.get(&project);
                let project = project.ok_or_else(|| Error::not_found("the project is gone"))?;
                Ok(Found::Instance(records.instance(project, name)?.clone()))
            }
            Self::Volume { pool, name, .. } => {
                Ok(Found::Volume(records.demand_volume(project, pool, name)?.clone()))
            }
        }
    }
}

/// Snapshots that come along with a copy, an import or a move are allowed where snapshots may be taken: what a project may
/// not make it does not get in another way either. `leave_out` says how to come without them.
///
/// # Errors
/// Forbidden, naming the restriction.
pub(crate) fn demand_welcome(
    records: &Records,
    tx: &mut Tx,
    project: ProjectId,
    brought: usize,
    leave_out: &str,
) -> Result<()> {
    if brought == 0 {
        return Ok(());
    }
    let row = records.projects.get(&project).ok_or_else(|| Error::not_found("the project is gone"))?;
    tx.expect(row);
    restricted::check_snapshot(&ProjectRules::parse(&row.config)?).map_err(|e| {
        let message = format!("{}, and {brought} would come along; {leave_out}", e.message);
        Error { message, ..e }
    })
}

/// What an [`Origin`] leads to.
#[derive(Debug, Clone)]
pub(crate) enum Found {
    Instance(Row<Instance>),
    Volume(Row<Volume>),
}

impl Found {
    pub(crate) fn lock(&self) -> String {
        match self {
            Self::Instance(i) => crate::compute::lock(i.id),
            Self::Volume(v) => crate::volumes::lock(v.id),
        }
    }

    pub(crate) fn expect(&self, tx: &mut Tx) {
        match self {
            Self::Instance(i) => tx.expect(i),
            Self::Volume(v) => tx.expect(v),
        }
    }

    /// Its own snapshots, oldest first.
    pub(crate) fn taken(&self, records: &Records) -> Vec<Row2> {
        match self {
            Self::Instance(i) => {
                records.snapshots_of(i.id).into_iter().map(|row| Row2::Instance(row.clone())).collect()
            }
            Self::Volume(v) => {
                records.volume_snapshots_of(v.id).into_iter().map(|row| Row2::Volume(row.clone())).collect()
            }
        }
    }

    pub(crate) fn demand(&self, records: &Records, name: &str) -> Result<Row2> {
        let found = self.taken(records).into_iter().find(|s| s.name() == name);
        found.ok_or_else(|| Error::not_found(format!("snapshot {name:?} of {} not found", self.words())))
    }

    pub(crate) fn words(&self) -> String {
        match self {
            Self::Instance(i) => format!("instance {:?}", &*i.name),
            Self::Volume(v) => format!("volume {:?}", v.name),
        }
    }

    /// Path of a snapshot of it in the API.
    pub(crate) fn path(&self, records: &Records, snapshot: &str) -> String {
        let project = match self {
            Self::Instance(i) => i.project,
            Self::Volume(v) => v.project,
        };
        let project = records.projects.get(&project).map(|p| p.name.to_string()).unwrap_or_default();
        let base = match self {
            Self::Instance(i) => format!("/1.0/instances/{}", i.name),
            Self::Volume(v) => {
                let pool = records.pools.get(&v.pool).map(|p| p.name.to_string()).unwrap_or_default();
                format!("/1.0/storage-pools/{pool}/volumes/custom/{}", v.name)
            }
        };
        let suffix = if project == DEFAULT_PROJECT { String::new() } else { format!("?project={project}") };
        format!("{base}/snapshots/{snapshot}{suffix}")
    }

    /// Kind of resource in operations.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Instance(_) => "instances_snapshots",
            Self::Volume(_) => "storage_volume_snapshots",
        }
    }

    /// The keys that govern its snapshots.
    pub(crate) fn config(&self, records: &Records) -> Config {
        match self {
            Self::Instance(i) => records.expanded(i).0,
            Self::Volume(v) => v.config.clone(),
        }
    }
}

/// A record of either kind as read.
#[derive(Debug, Clone)]
pub(crate) enum Row2 {
    Instance(Row<Snapshot>),
    Volume(Row<VolumeSnapshot>),
}

impl Row2 {
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Instance(s) => &s.name,
            Self::Volume(s) => &s.name,
        }
    }
    pub(crate) fn expires_at(&self) -> Option<Timestamp> {
        match self {
            Self::Instance(s) => s.expires_at,
            Self::Volume(s) => s.expires_at,
        }
    }
    pub(crate) fn scheduled(&self) -> bool {
        match self {
            Self::Instance(s) => s.scheduled,
            Self::Volume(s) => s.scheduled,
        }
    }
    pub(crate) fn id(&self) -> SnapshotId {
        match self {
            Self::Instance(s) => s.id,
            Self::Volume(s) => s.id,
        }
    }
    pub(crate) fn created_at(&self) -> Timestamp {
        match self {
            Self::Instance(s) => s.created_at,
            Self::Volume(s) => s.created_at,
        }
    }
    pub(crate) fn spec_version(&self) -> u64 {
        match self {
            Self::Instance(s) => s.spec_version,
            Self::Volume(s) => s.spec_version,
        }
    }
    pub(crate) fn taken(&self) -> Taken {
        match self {
            Self::Instance(s) => Taken::Instance { snapshot: Box::new(s.value.clone()) },
            Self::Volume(s) => Taken::Volume { snapshot: Box::new(s.value.clone()) },
        }
    }
    pub(crate) fn expect(&self, tx: &mut Tx) {
        match self {
            Self::Instance(s) => tx.expect(s),
            Self::Volume(s) => tx.expect(s),
        }
    }
}

impl Taken {
    pub(crate) fn id(&self) -> SnapshotId {
        match self {
            Self::Instance { snapshot } => snapshot.id,
            Self::Volume { snapshot } => snapshot.id,
        }
    }

    /// Table and scope of its name.
    pub(crate) fn index(&self) -> (&'static str, String, &str) {
        match self {
            Self::Instance { snapshot } => ("snapshots", snapshot.instance.to_string(), &snapshot.name),
            Self::Volume { snapshot } => ("volume_snapshots", snapshot.volume.to_string(), &snapshot.name),
        }
    }

    pub(crate) fn take_name(&self, tx: &mut Tx) {
        let (table, scope, name) = self.index();
        tx.take_name(table, &scope, name, &self.id().to_string());
    }

    pub(crate) fn release_name(&self, tx: &mut Tx) {
        let (table, scope, name) = self.index();
        tx.release_name(table, &scope, name, &self.id().to_string());
    }

    /// What is kept of it on the host.
    pub(crate) fn volumes(&self, records: &Records) -> Vec<VolumeSnapshotRef> {
        let at = |volume: VolumeId, snapshot| {
            let pool = records.volumes.get(&volume)?.pool;
            Some(VolumeSnapshotRef { pool, volume, snapshot })
        };
        match self {
            Self::Instance { snapshot } => snapshot.volumes.iter().filter_map(|(v, s)| at(*v, *s)).collect(),
            Self::Volume { snapshot } => at(snapshot.volume, snapshot.id).into_iter().collect(),
        }
    }
}

/// The volumes that a snapshot of an instance covers, the root first: those that it owns, and its root if that is a custom
/// volume.
pub(crate) fn owned(records: &Records, instance: &Instance) -> Vec<Row<Volume>> {
    let mut all: Vec<_> = records
        .volumes
        .values()
        .filter(|v| v.owner == VolumeOwner::Instance { instance: instance.id } || v.id == instance.root)
        .cloned()
        .collect();
    all.sort_by_key(|v| (v.id != instance.root, v.id));
    all
}

/// Names of the devices that are drives of a virtual machine to which its guest may write, and whose volumes are none of
/// `covered`: a snapshot of the instance holds nothing of what is on them. Discs are never written.
///
/// # Errors
/// Those of the devices.
pub(crate) fn uncovered(
    records: &Records,
    instance: &Instance,
    devices: &Devices,
    covered: &[VolumeId],
) -> Result<Vec<String>> {
    if instance.kind != InstanceKind::VirtualMachine {
        return Ok(vec![]);
    }
    let parsed = parse_devices(devices)?;
    let root = custom_root(records, instance, &parsed)?.map_or(instance.root, |volume| volume.id);
    let mut names: Vec<String> =
        (!covered.contains(&root)).then(|| parsed.root.0.clone()).into_iter().collect();
    for (name, disk) in &parsed.disks {
        if disk.is_directory() || disk.readonly || !disk.attached {
            continue;
        }
        let held = match &disk.source {
            DiskOrigin::Volume { pool, volume } => records
                .custom_volume(instance.project, pool, volume)
                .is_some_and(|v| v.content == VolumeContent::Iso || covered.contains(&v.id)),
            DiskOrigin::Host { .. } => disk.is_disc(),
            DiskOrigin::Memory { .. } => false,
        };
        if !held {
            names.push(name.clone());
        }
    }
    Ok(names)
}

/// The same of a snapshot that would be taken now: of the record's devices, and of those that a running guest still has.
pub(crate) fn uncovered_now(records: &Records, instance: &Instance) -> Result<Vec<String>> {
    let covered: Vec<_> = owned(records, instance).iter().map(|v| v.id).collect();
    let mut names = uncovered(records, instance, &records.expanded(instance).1, &covered)?;
    let runtime = records.runtimes.get(&instance.id).filter(|_| crate::volumes::runs(records, instance));
    if let Some(applied) = runtime.and_then(|r| r.applied.as_ref()) {
        names.extend(uncovered(records, instance, &applied.devices, &covered)?);
    }
    names.sort();
    names.dedup();
    Ok(names)
}

/// When a snapshot taken now goes by itself.
pub(crate) fn expiry(config: &Config, manual: bool, now: Timestamp) -> Result<Option<Timestamp>> {
    let set = |key: &'static str| config.get(key).filter(|v| !v.is_empty()).map(|v| (key, v));
    let own = manual.then(|| set("snapshots.expiry.manual")).flatten();
    match own.or_else(|| set("snapshots.expiry")) {
        Some((key, value)) => Ok(Span::parse(&format!("config.{key}"), value)?.after(now)),
        None => Ok(None),
    }
}

/// Longest text of a snapshot, bytes.
const NOTE: usize = 64 << 10;

pub(crate) fn check_note(text: &str) -> Result<()> {
    match text.len() <= NOTE {
        true => Ok(()),
        false => Err(Error::invalid(
            "description",
            format!("the text of a snapshot or checkpoint has at most {} KiB; shorten it", NOTE >> 10),
        )),
    }
}

/// A free name by the pattern of the configuration, `snap%d` without one.
pub(crate) fn automatic_name(config: &Config, taken: &[Row2], now: Timestamp) -> Result<String> {
    let pattern =
        config.get("snapshots.pattern").map(String::as_str).filter(|p| !p.is_empty()).unwrap_or("snap%d");
    let taken: Vec<&str> = taken.iter().map(Row2::name).collect();
    calendar::name("config.snapshots.pattern", pattern, now, &taken)
}

impl Engine {
    /// Snapshots of an instance or custom volume, oldest first.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn snapshots(&self, context: &Context, origin: Origin<'_>) -> Result<Vec<Taken>> {
        let project = self.project(context, origin.project(), Permission::ProjectView)?;
        let records = self.inner().inventory.read();
        let found = origin.find(&records, project.id)?;
        Ok(found.taken(&records).iter().map(Row2::taken).collect())
    }

    /// Names of the devices of an instance that are drives its guest may write to and of which no snapshot of it holds
    /// anything: custom volumes have snapshots of their own.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn snapshot_gaps(&self, context: &Context, project: &str, name: &str) -> Result<Vec<String>> {
        let project = self.project(context, project, Permission::ProjectView)?;
        let records = self.inner().inventory.read();
        uncovered_now(&records, records.instance(&project, name)?)
    }

    /// A snapshot by name.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn snapshot(&self, context: &Context, origin: Origin<'_>, name: &str) -> Result<Taken> {
        let project = self.project(context, origin.project(), Permission::ProjectView)?;
        let records = self.inner().inventory.read();
        origin.find(&records, project.id)?.demand(&records, name).map(|row| row.taken())
    }
}

impl EngineInner {
    /// Forgets the snapshots of what is being deleted, after its volumes went: in as many transactions as that takes.
    pub(crate) async fn forget_snapshots(
        &self,
        instance: Option<InstanceId>,
        volume: Option<VolumeId>,
    ) -> Result<()> {
        loop {
            let more = self
                .transact(|records, tx| {
                    let mut rows: Vec<Row2> = vec![];
                    if let Some(id) = instance {
                        rows.extend(records.snapshots_of(id).into_iter().cloned().map(Row2::Instance));
                    }
                    if let Some(id) = volume {
                        rows.extend(records.volume_snapshots_of(id).into_iter().cloned().map(Row2::Volume));
                    }
                    for row in rows.iter().take(40) {
                        match row {
                            Row2::Instance(s) => tx.delete(s),
                            Row2::Volume(s) => tx.delete(s),
                        }
                        row.taken().release_name(tx);
                    }
                    Ok(rows.len() > 40)
                })
                .await?;
            if !more {
                return Ok(());
            }
        }
    }
}
