//! Importing backups, of Karst or of Incus: an instance or custom volume with its snapshots; and discs.

use super::{CALL, index, kind_of, lock as upload_lock};
use crate::{
    Engine, EngineInner, Records,
    compute::{
        self,
        addresses::free_mac,
        create::{CreateInstance, CreatePlan, InstanceSource, plan as plan_create},
        expand,
    },
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    snapshots::{Taken, demand_welcome},
    tenancy::limits::{Planned, admit, grows},
    volumes,
};
use async_trait::async_trait;
use karst_agent::{
    BackupKind, CallContext, HostAgent, MachineFill, VolumeFill, VolumeRef, VolumeResize, VolumeSnapshotRef,
};
use karst_model::{
    BackupId, ByteSize, Config, Error, InstanceId, Name, NodeId, Result, SnapshotId, VolumeId,
    access::Permission,
    instance::{Firmware, InstanceKind, Lifecycle},
    keys,
    snapshot::{Snapshot, VolumeSnapshot},
    spec::{VolumeSource, VolumeSpec},
    storage::{DEFAULT_BLOCK_SIZE, Volume, VolumeContent, VolumeOwner, check_volume_config},
    template::Templates,
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(86_400);
const WITHOUT: &str = "export it without its snapshots (instance_only, volume_only)";

/// An uploaded backup of an instance.
#[derive(Debug, Clone)]
pub struct ImportInstance {
    /// What was uploaded.
    pub upload: BackupId,
    /// Another name than the backup's.
    pub name: Option<String>,
    /// Pool for its root instead of the one that it names.
    pub pool: Option<String>,
}

/// An uploaded backup of a custom volume, or a disc.
#[derive(Debug, Clone)]
pub struct ImportVolume {
    /// What was uploaded.
    pub upload: BackupId,
    /// Another name than the backup's; a disc needs one.
    pub name: Option<String>,
    /// It is the content of a disc.
    pub disc: bool,
}

impl EngineInner {
    async fn index_of(&self, upload: BackupId) -> Result<index::Index> {
        let facts = self.agents.get(self.node)?.backup_inspect(&CallContext::read(CALL), upload).await?;
        index::read(facts.index)
    }
}

fn details(index: &index::Index) -> Result<&index::Details> {
    index.config.as_ref().ok_or_else(|| Error::invalid("backup", "the backup has no configuration"))
}

/// It is a guest's, and no other instance's interface has it.
pub(crate) fn usable_mac(records: &Records, mac: &str) -> bool {
    let looks_right = mac.len() == 17
        && mac.bytes().enumerate().all(|(n, b)| if n % 3 == 2 { b == b':' } else { b.is_ascii_hexdigit() })
        && u8::from_str_radix(&mac[..2], 16).is_ok_and(|first| first & 1 == 0);
    looks_right && free_mac(records, mac)
}

/// Snapshots of the backup that it describes, oldest first as the backup has them.
fn described<'a>(names: &[String], all: &'a [index::Described]) -> Result<Vec<(Name, &'a index::Described)>> {
    let mut found: Vec<(Name, &index::Described)> = vec![];
    for name in names {
        let name = Name::parse("backup", name).map_err(|e| e.with_context("a snapshot of the backup"))?;
        if found.iter().any(|(n, _)| *n == name) {
            return Err(Error::invalid("backup", format!("the backup has the snapshot {:?} twice", &*name)));
        }
        let of = all.iter().find(|d| d.name == *name || d.name.rsplit('/').next() == Some(&*name));
        let of = of.ok_or_else(|| {
            Error::invalid("backup", format!("the backup does not describe its snapshot {:?}", &*name))
        })?;
        found.push((name, of));
    }
    Ok(found)
}

impl Engine {
    /// Makes an instance of an uploaded backup, with its snapshots. Its addresses are those that it had, where no other
    /// instance has them.
    ///
    /// # Errors
    /// Invalid by field (what the backup says counts as if it were requested), not found (profile, pool), conflict (taken
    /// name), unsupported, forbidden; what is wrong with the content comes as the operation's failure.
    pub async fn instance_import(
        &self,
        context: &Context,
        project: &str,
        request: ImportInstance,
    ) -> Result<LiveOperation> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        let inner = self.inner();
        let index = inner.index_of(request.upload).await?;
        let kind = match index.kind.as_str() {
            "container" | "" => InstanceKind::Container,
            "virtual-machine" => InstanceKind::VirtualMachine,
            "custom" => {
                return Err(Error::invalid(
                    "backup",
                    "this is the backup of a custom volume; import it with: incus storage volume import",
                ));
            }
            other => return Err(Error::unsupported(format!("the backup is one of a {other:?}")).at("backup")),
        };
        let all = details(&index)?;
        let of = all.container.as_ref();
        let of = of.ok_or_else(|| Error::invalid("backup", "the backup does not describe an instance"))?;
        if !matches!(of.architecture.as_str(), "" | "x86_64") {
            return Err(
                Error::unsupported(format!("the instance is one for {:?}", of.architecture)).at("backup")
            );
        }
        let (config, own) = of.config()?;
        let mut devices = of.devices()?;
        // The root becomes a volume of the instance's own.
        expand::own_root(&mut devices);
        compute::disks::demand_drives(context, &Default::default(), &devices)?;
        let wanted = request.name.as_deref().filter(|n| !n.is_empty());
        let name = Name::parse("name", wanted.unwrap_or(&index.name))?;
        runner::start::<InstanceImport>(inner, context, |tx| {
            let records = inner.inventory.read();
            tx.expect(&project);
            if let Some(pool) = request.pool.as_deref().filter(|p| !p.is_empty()) {
                records.pool(pool).map_err(|e| e.at("pool"))?;
                root_in(&records, &project, of, &mut devices, pool)?;
            }
            let create = CreateInstance {
                name: Some(name.to_string()),
                kind,
                description: of.description.clone(),
                ephemeral: of.ephemeral,
                config: config.clone(),
                devices: devices.clone(),
                profiles: Some(of.profiles.clone().unwrap_or_default()),
                source: match own.get(karst_model::application::MARK).map(String::as_str) {
                    Some("true") => InstanceSource::Application,
                    _ => InstanceSource::None,
                },
                start: false,
                target: None,
                vmid: None,
            };
            records.demand_seen_acls(context, &project, &create.devices)?;
            let mut create = plan_create(inner, &records, tx, &project, name.clone(), &create)?;
            create.demand_own_root()?;
            let instance = &mut create.instance;
            instance.image_properties = own
                .iter()
                .filter(|(k, _)| k.starts_with("image."))
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect();
            if let Some(base) = own.get("volatile.base_image") {
                instance.volatile.insert("volatile.base_image".into(), base.clone());
            }
            if let Some(at) = of.created_at() {
                instance.created_at = at;
            }
            let written = records.expanded(instance).1;
            let mut took = vec![];
            for (device, identity) in &mut instance.identities {
                let chosen = written.get(device).is_some_and(|d| d.contains_key("hwaddr"));
                if let Some(mac) =
                    own.get(&format!("volatile.{device}.hwaddr")).map(|m| m.to_ascii_lowercase())
                    && identity.mac.is_some()
                    && !chosen
                    && usable_mac(&records, &mac)
                {
                    identity.mac = Some(mac);
                    took.push(device.clone());
                }
            }
            let parsed = expand::parse_devices(&written)?;
            // Of two imports of one backup at once one has its addresses.
            for (device, nic) in parsed.nics.iter().filter(|(device, _)| took.contains(device)) {
                if let Some((_, network)) = compute::nics::network_of(&records, project.id, device, nic)? {
                    tx.expect_untouched(&records, &crate::network::lock(network.id));
                }
            }
            if kind == InstanceKind::VirtualMachine
                && parsed.root.1.size.is_none()
                && let Some(size) = all.volume.as_ref().map(index::Described::config).transpose()?
                && let Some(size) = size.0.get("size").filter(|s| !s.is_empty())
            {
                create.volume.size = Some(ByteSize::parse("backup", size)?);
            }
            let planned =
                Planned { instance: Some(&create.instance), root: create.volume.size, ..Default::default() };
            admit(&records, tx, project.id, &planned)?;
            let mut snapshots: Vec<Snapshot> = vec![];
            let named = index.snapshots.as_deref().unwrap_or_default();
            for (name, of) in described(named, all.snapshots.as_deref().unwrap_or_default())? {
                let id = SnapshotId(inner.env.uuid());
                let in_words = |e: Error| e.with_context(format!("snapshot {:?} of the backup", &*name));
                let config = of.config()?.0;
                keys::check(&config, Some(kind)).map_err(in_words)?;
                let devices = of.devices()?;
                compute::create::check_devices(&devices).map_err(in_words)?;
                let home = records.home(&project, "features.profiles");
                let profiles = of.profiles.as_deref().unwrap_or_default();
                let profiles =
                    profiles.iter().map(|p| Ok(records.profile(home, p)?.id)).collect::<Result<_>>();
                snapshots.push(Snapshot {
                    id,
                    instance: create.instance.id,
                    parent: snapshots.last().map(|s| s.id),
                    description: of.description.clone(),
                    note: String::new(),
                    ephemeral: of.ephemeral,
                    profiles: profiles.map_err(in_words)?,
                    config,
                    devices,
                    hardware: None,
                    volumes: vec![(create.volume.id, id)],
                    stateful: false,
                    created_at: of.created_at().unwrap_or_else(|| inner.env.now()),
                    expires_at: of.expires_at(),
                    scheduled: false,
                    spec_version: 1,
                    external: None,
                    name,
                });
            }
            demand_welcome(&records, tx, project.id, snapshots.len(), WITHOUT)?;
            create.instance.current_snapshot = snapshots.last().map(|s| s.id);
            let instance = &create.instance;
            let tpm_at = |s: &Snapshot| compute::states::tpm_at(&records, instance, s);
            let machine = instance.hardware.as_ref().map(|hardware| FilledMachine {
                instance: instance.id,
                firmware: hardware.firmware,
                tpm: compute::states::tpm(&records, instance),
                snapshots: snapshots.iter().map(|s| (s.id, tpm_at(s))).collect(),
            });
            let fill = Fill {
                machine,
                upload: request.upload,
                kind: kind_of(kind),
                volume: VolumeRef { pool: create.volume.pool, volume: create.volume.id },
                content: create.volume.content,
                size: create.volume.size,
                snapshots: snapshots.iter().map(|s| (s.name.clone(), s.id)).collect(),
            };
            let node = create.instance.node;
            let path = compute::path(&project.name, &name);
            let plan = ImportPlan { create, fill, snapshots, node };
            let mut new = NewOperation::task("Restoring backup", Some(project.id), "instances", path);
            new.may_cancel = true;
            Ok((plan, new))
        })
        .await
    }

    /// Makes a custom volume of an uploaded backup, with its snapshots, or a disc of the file itself.
    ///
    /// # Errors
    /// Invalid by field, not found (pool), conflict (taken name), unsupported, forbidden; what is wrong with the content
    /// comes as the operation's failure.
    pub async fn volume_import(
        &self,
        context: &Context,
        project: &str,
        pool: &str,
        request: ImportVolume,
    ) -> Result<LiveOperation> {
        let project = self.volume_home(context, project)?;
        let inner = self.inner();
        let index = match request.disc {
            true => None,
            false => Some(inner.index_of(request.upload).await?),
        };
        let nothing = vec![];
        let (mut name, mut content, mut config, mut description) =
            (String::new(), VolumeContent::Iso, Config::new(), String::new());
        let mut taken: Vec<(Name, &index::Described)> = vec![];
        if let Some(index) = &index {
            if index.kind != "custom" {
                return Err(Error::invalid(
                    "backup",
                    "this is the backup of an instance; import it with: incus import",
                ));
            }
            let all = details(index)?;
            let of = all.volume.as_ref();
            let of = of.ok_or_else(|| Error::invalid("backup", "the backup does not describe a volume"))?;
            content = match of.content_type.as_str() {
                "filesystem" | "" => VolumeContent::Filesystem,
                "block" => VolumeContent::Block,
                other => {
                    return Err(Error::unsupported(format!("volumes of content {other:?} have no backup"))
                        .at("backup"));
                }
            };
            name.clone_from(&index.name);
            config = of.config()?.0;
            config.retain(|_, v| !v.is_empty());
            description.clone_from(&of.description);
            let named = index.snapshots.as_deref().unwrap_or_default();
            taken = described(named, all.volume_snapshots.as_ref().unwrap_or(&nothing))?;
        }
        if let Some(wanted) = request.name.as_deref().filter(|n| !n.is_empty()) {
            name = wanted.to_owned();
        }
        let name = Name::parse("name", &name)?;
        let size = check_volume_config(&config, content)?;
        let size = size.or(match content {
            VolumeContent::Filesystem => None,
            VolumeContent::Block => Some(DEFAULT_BLOCK_SIZE),
            // It becomes as large as what came.
            VolumeContent::Iso => Some(ByteSize::mib(1)),
        });
        runner::start::<VolumeImport>(inner, context, |tx| {
            let records = inner.inventory.read();
            let pool = records.pool(pool)?;
            let owner = volumes::begin_new(&records, tx, &project, pool, &name)?;
            let volume = Volume {
                id: VolumeId(inner.env.uuid()),
                pool: pool.id,
                project: owner,
                name: name.to_string(),
                content,
                owner: VolumeOwner::Custom,
                description: description.clone(),
                size,
                config: config.clone(),
                spec_version: 1,
                created_at: inner.env.now(),
                layers: Default::default(),
            };
            let planned = Planned { volume: Some(&volume), ..Default::default() };
            admit(&records, &mut Tx::default(), owner, &planned)?;
            let mut snapshots = vec![];
            for (name, of) in &taken {
                let config = of.config()?.0;
                snapshots.push(VolumeSnapshot {
                    id: SnapshotId(inner.env.uuid()),
                    volume: volume.id,
                    name: name.clone(),
                    description: of.description.clone(),
                    size: check_volume_config(&config, content)?.or(size),
                    config,
                    created_at: of.created_at().unwrap_or_else(|| inner.env.now()),
                    expires_at: of.expires_at(),
                    scheduled: false,
                    spec_version: 1,
                });
            }
            demand_welcome(&records, tx, project.id, snapshots.len(), WITHOUT)?;
            let fill = Fill {
                machine: None,
                upload: request.upload,
                kind: match content {
                    VolumeContent::Filesystem => BackupKind::Filesystem,
                    VolumeContent::Block => BackupKind::Block,
                    VolumeContent::Iso => BackupKind::Raw,
                },
                volume: VolumeRef { pool: volume.pool, volume: volume.id },
                content,
                size: volume.stored_size(),
                snapshots: snapshots.iter().map(|s| (s.name.clone(), s.id)).collect(),
            };
            let path = volumes::path(&records, &volume);
            let plan = VolumeImportPlan { volume, fill, snapshots, node: inner.node, path: path.clone() };
            let mut new =
                NewOperation::task("Restoring custom volume", Some(project.id), "storage_volumes", path);
            new.may_cancel = true;
            Ok((plan, new))
        })
        .await
    }
}

/// Puts the root into another pool, whether it is the instance's own device or a profile's.
fn root_in(
    records: &Records,
    project: &karst_model::project::Project,
    of: &index::Described,
    devices: &mut karst_model::device::Devices,
    pool: &str,
) -> Result<()> {
    let is_root = |d: &std::collections::BTreeMap<String, String>| {
        d.get("type").is_some_and(|t| t == "disk") && d.get("path").is_some_and(|p| p == "/")
    };
    if let Some((_, root)) = devices.iter_mut().find(|(_, d)| is_root(d)) {
        root.insert("pool".into(), pool.into());
        return Ok(());
    }
    let home = records.home(project, "features.profiles");
    for profile in of.profiles.iter().flatten().rev() {
        let profile = records.profile(home, profile).map_err(|e| e.at("profiles"))?;
        if let Some((name, root)) = profile.devices.iter().find(|(_, d)| is_root(d)) {
            let mut root = root.clone();
            root.insert("pool".into(), pool.into());
            root.remove("source");
            devices.insert(name.clone(), root);
            return Ok(());
        }
    }
    let root = [("type", "disk"), ("path", "/"), ("pool", pool)];
    devices.insert("root".into(), root.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    Ok(())
}

/// A new volume that takes its content and snapshots from an upload.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Fill {
    upload: BackupId,
    kind: BackupKind,
    volume: VolumeRef,
    content: VolumeContent,
    size: Option<ByteSize>,
    /// Oldest first.
    snapshots: Vec<(Name, SnapshotId)>,
    #[serde(default)]
    machine: Option<FilledMachine>,
}

/// What of a virtual machine comes beside its disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct FilledMachine {
    instance: InstanceId,
    firmware: Firmware,
    /// Name of the device that is its TPM.
    tpm: Option<String>,
    /// The same at its snapshots.
    snapshots: Vec<(SnapshotId, Option<String>)>,
}

impl FilledMachine {
    fn at(&self, at: Option<SnapshotId>) -> MachineFill {
        let tpm = match at {
            None => self.tpm.clone(),
            Some(at) => self.snapshots.iter().find(|(id, _)| *id == at).and_then(|(_, tpm)| tpm.clone()),
        };
        MachineFill { instance: self.instance, at, firmware: self.firmware, tpm }
    }
}

impl Fill {
    async fn create(&self, cx: &StepContext, agent: &dyn HostAgent) -> Result<()> {
        let spec = VolumeSpec {
            id: self.volume.volume,
            pool: self.volume.pool,
            content: self.content,
            size: self.size,
            source: VolumeSource::Empty,
        };
        agent.volume_create(&cx.mutate(LONG), spec).await
    }

    /// Answers the size in the end, and templates that came with it. May be called again after a crash: snapshots that were taken are not taken again.
    async fn run(&self, cx: &StepContext, agent: &dyn HostAgent) -> Result<(Option<ByteSize>, Templates)> {
        let VolumeRef { pool, volume } = self.volume;
        let there = agent.volume_snapshots(&CallContext::read(CALL), self.volume).await?;
        for (name, id) in &self.snapshots {
            if there.iter().any(|s| s.snapshot == *id) {
                continue;
            }
            let fill = self.of(Some((name.clone(), *id)));
            agent.volume_fill(&cx.mutate(LONG), fill).await?;
            let at = VolumeSnapshotRef { pool, volume, snapshot: *id };
            agent.volume_snapshot_create(&cx.mutate(LONG), at).await?;
        }
        let filled = agent.volume_fill(&cx.mutate(LONG), self.of(None)).await?;
        match (filled.size, self.size) {
            (Some(now), Some(wanted)) if self.content == VolumeContent::Block && now < wanted => {
                let resize = VolumeResize { volume: self.volume, size: wanted };
                agent.volume_resize(&cx.mutate(LONG), resize).await?;
                Ok((Some(wanted), filled.templates))
            }
            (now, _) => Ok((now, filled.templates)),
        }
    }

    fn of(&self, snapshot: Option<(Name, SnapshotId)>) -> VolumeFill {
        let (snapshot, at) = snapshot.unzip();
        let machine = self.machine.as_ref().map(|m| m.at(at));
        VolumeFill { volume: self.volume, backup: self.upload, kind: self.kind, snapshot, machine }
    }

    /// The volume goes with its snapshots, and the upload too.
    async fn undo(&self, cx: &StepContext, agent: &dyn HostAgent) -> Result<()> {
        agent.volume_delete(&cx.mutate(Duration::from_secs(300)), self.volume).await?;
        if let Some(machine) = &self.machine {
            agent.guest_destroy(&cx.mutate(CALL), machine.instance).await?;
        }
        self.drop(cx, agent).await
    }

    async fn drop(&self, cx: &StepContext, agent: &dyn HostAgent) -> Result<()> {
        agent.backup_delete(&cx.mutate(CALL), self.upload).await
    }
}

/// Writes the records of snapshots that came with a volume, in as many transactions as that takes.
pub(crate) async fn record(cx: &StepContext, taken: Vec<Taken>) -> Result<()> {
    for some in taken.chunks(40) {
        cx.engine
            .transact(|records, tx| {
                for one in some {
                    match one {
                        Taken::Instance { snapshot } if !records.snapshots.contains_key(&snapshot.id) => {
                            tx.create(&**snapshot);
                            one.take_name(tx);
                        }
                        Taken::Volume { snapshot }
                            if !records.volume_snapshots.contains_key(&snapshot.id) =>
                        {
                            tx.create(&**snapshot);
                            one.take_name(tx);
                        }
                        _ => {}
                    }
                }
                Ok(())
            })
            .await?;
    }
    Ok(())
}

/// Plan of [`InstanceImport`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImportPlan {
    create: CreatePlan,
    fill: Fill,
    snapshots: Vec<Snapshot>,
    node: NodeId,
}

impl ImportPlan {
    fn instance(&self) -> InstanceId {
        self.create.instance.id
    }
}

/// Outputs of an import.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ImportOutputs {
    size: Option<ByteSize>,
    #[serde(default)]
    templates: Templates,
}

/// Makes the volume, fills it with each snapshot and takes it, then with the content; writes the snapshots' records and
/// drops the upload. Then the instance is there.
pub struct InstanceImport;

#[async_trait]
impl Saga for InstanceImport {
    const NAME: &'static str = "instance-import";
    const STEPS: &'static [&'static str] = &["volume", "content", "snapshots", "drop"];
    type Plan = ImportPlan;
    type Outputs = ImportOutputs;

    fn has(plan: &ImportPlan, step: usize) -> bool {
        step != 2 || !plan.snapshots.is_empty()
    }

    fn locks(plan: &ImportPlan) -> Vec<String> {
        vec![compute::lock(plan.instance()), upload_lock(plan.fill.upload)]
    }

    fn begin(plan: &ImportPlan, _: &EngineInner, tx: &mut Tx) -> Result<()> {
        plan.create.begin(tx);
        Ok(())
    }

    async fn run(
        cx: &StepContext,
        plan: &ImportPlan,
        outputs: &mut ImportOutputs,
        step: usize,
    ) -> Result<()> {
        let agent = cx.agent(plan.node)?;
        match step {
            0 => plan.fill.create(cx, &*agent).await,
            1 => {
                (outputs.size, outputs.templates) = plan.fill.run(cx, &*agent).await?;
                Ok(())
            }
            2 => {
                let taken = plan.snapshots.iter().map(|s| Taken::Instance { snapshot: Box::new(s.clone()) });
                record(cx, taken.collect()).await
            }
            _ => plan.fill.drop(cx, &*agent).await,
        }
    }

    async fn undo(cx: &StepContext, plan: &ImportPlan, _: &ImportOutputs, step: usize) -> Result<()> {
        match step {
            0 => plan.fill.undo(cx, &*cx.agent(plan.node)?).await,
            2 => cx.engine.forget_snapshots(Some(plan.instance()), None).await,
            _ => Ok(()),
        }
    }

    fn commit(plan: &ImportPlan, outputs: &ImportOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let row = engine.instance_row(plan.instance())?;
        let mut instance = row.value.clone();
        instance.lifecycle = Lifecycle::Ready;
        let records = engine.inventory.read();
        compute::templates::bring(&mut instance, &records, &outputs.templates);
        tx.replace(&row, &instance);
        if plan.fill.content.is_disk()
            && outputs.size.is_some()
            && let Some(row) = records.volumes.get(&plan.fill.volume.volume)
        {
            if grows(row.size, outputs.size) {
                // The disk in the backup is larger than the backup says.
                let planned = Planned { instance: Some(&instance), root: outputs.size, ..Default::default() };
                admit(&records, tx, instance.project, &planned)?;
            }
            tx.replace(row, &Volume { size: outputs.size, ..row.value.clone() });
        }
        Ok(())
    }

    fn abort(plan: &ImportPlan, _: &ImportOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        compute::delete::remove_records(engine, tx, plan.instance())
    }

    fn announce(plan: &ImportPlan) -> Vec<(&'static str, String)> {
        plan.create.announce()
    }
}

/// Plan of [`VolumeImport`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VolumeImportPlan {
    volume: Volume,
    fill: Fill,
    snapshots: Vec<VolumeSnapshot>,
    node: NodeId,
    path: String,
}

/// The same of a custom volume. The name is taken from the beginning, the record is there in the end.
pub struct VolumeImport;

#[async_trait]
impl Saga for VolumeImport {
    const NAME: &'static str = "volume-import";
    const STEPS: &'static [&'static str] = &["volume", "content", "snapshots", "drop"];
    type Plan = VolumeImportPlan;
    type Outputs = ImportOutputs;

    fn has(plan: &VolumeImportPlan, step: usize) -> bool {
        step != 2 || !plan.snapshots.is_empty()
    }

    fn locks(plan: &VolumeImportPlan) -> Vec<String> {
        vec![volumes::lock(plan.volume.id), upload_lock(plan.fill.upload)]
    }

    fn begin(plan: &VolumeImportPlan, _: &EngineInner, tx: &mut Tx) -> Result<()> {
        let volume = &plan.volume;
        tx.take_name("volumes", &volumes::scope(volume), &volume.name, &volume.id.to_string());
        Ok(())
    }

    async fn run(
        cx: &StepContext,
        plan: &VolumeImportPlan,
        outputs: &mut ImportOutputs,
        step: usize,
    ) -> Result<()> {
        let agent = cx.agent(plan.node)?;
        match step {
            0 => plan.fill.create(cx, &*agent).await,
            1 => {
                outputs.size = plan.fill.run(cx, &*agent).await?.0;
                Ok(())
            }
            2 => {
                let taken = plan.snapshots.iter().map(|s| Taken::Volume { snapshot: Box::new(s.clone()) });
                record(cx, taken.collect()).await
            }
            _ => plan.fill.drop(cx, &*agent).await,
        }
    }

    async fn undo(cx: &StepContext, plan: &VolumeImportPlan, _: &ImportOutputs, step: usize) -> Result<()> {
        match step {
            0 => plan.fill.undo(cx, &*cx.agent(plan.node)?).await,
            2 => cx.engine.forget_snapshots(None, Some(plan.volume.id)).await,
            _ => Ok(()),
        }
    }

    fn commit(
        plan: &VolumeImportPlan,
        outputs: &ImportOutputs,
        engine: &EngineInner,
        tx: &mut Tx,
    ) -> Result<()> {
        let mut volume = plan.volume.clone();
        if volume.content.is_disk() {
            volume.size = outputs.size.map(|stored| volume.shown(stored)).or(volume.size);
        }
        let records = engine.inventory.read();
        admit(&records, tx, volume.project, &Planned { volume: Some(&volume), ..Default::default() })?;
        tx.create(&volume);
        Ok(())
    }

    fn abort(plan: &VolumeImportPlan, _: &ImportOutputs, _: &EngineInner, tx: &mut Tx) -> Result<()> {
        let volume = &plan.volume;
        tx.release_name("volumes", &volumes::scope(volume), &volume.name, &volume.id.to_string());
        Ok(())
    }

    fn announce(plan: &VolumeImportPlan) -> Vec<(&'static str, String)> {
        vec![("storage-volume-created", plan.path.clone())]
    }
}
