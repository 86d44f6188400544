//! The in-memory inventory: every record, fed by one watch over the whole prefix, applied per revision.
//!
//! Reads come from here. Decisions (uniqueness, ownership, quota, locks) never do by themselves: a use case takes the
//! revision it saw into the compares of its transaction, and a mutation answers only when the inventory has reached its
//! revision, so that whoever got an answer sees its effect in the next read.

use crate::audit::AuditPending;
use crate::network::own::Place;
use futures::StreamExt;
use karst_env::{Env, EnvExt};
use karst_model::{
    AclId, AddressSetId, BackupId, CheckpointId, Config, Error, ImageId, InstanceId, Missing, NetworkId,
    NodeId, OperationId, PoolId, ProfileId, ProjectId, Result, SnapshotId, VolumeId,
    applied::AppliedSpec,
    backup::Backup,
    checkpoint::{Checkpoint, in_line},
    device::{Device, Devices, NicDevice},
    display::DisplayLock,
    firewall::{AddressSet, NetworkAcl, NetworkForward},
    image::{Image, ImageAlias},
    instance::{DeviceIdentity, Instance, Runtime, Status},
    network::Network,
    node::Node,
    operation::Operation,
    profile::{Profile, expand},
    project::Project,
    registry::RegistryLogin,
    secret::Secret,
    snapshot::{Snapshot, VolumeSnapshot},
    spec::{NameView, NetworkHost, PortSpec},
    storage::{Pool, Volume, VolumeOwner},
};
use karst_store::{
    Change, ROOT, Record, Revision, Store, StoreError, Stored, Table, WatchItem, key_part, list_prefix,
    records::alias_id,
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry},
    sync::{Arc, Mutex, RwLock, RwLockReadGuard},
    time::Duration,
};
use tokio::sync::watch;

/// A record as read: cheap to clone. What it dereferences to carries the revision for the compares of a transaction.
#[derive(Debug)]
pub struct Row<T>(Arc<Stored<T>>);

impl<T> Row<T> {
    pub(crate) fn new(stored: Stored<T>) -> Self {
        Self(Arc::new(stored))
    }

    /// The record with its revision and what this version does not know of it.
    pub fn stored(&self) -> &Stored<T> {
        &self.0
    }
}

impl<T> Clone for Row<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> std::ops::Deref for Row<T> {
    type Target = Stored<T>;
    fn deref(&self) -> &Stored<T> {
        &self.0
    }
}

/// An instance with all that belongs to it, as front ends show it.
#[derive(Debug, Clone)]
pub struct InstanceView {
    /// The record.
    pub instance: Row<Instance>,
    /// What the host last saw.
    pub runtime: Option<Row<Runtime>>,
    /// Its project.
    pub project: Row<Project>,
    /// Its profiles, in order of application.
    pub profiles: Vec<Row<Profile>>,
    /// Configuration with the profiles' under it.
    pub expanded_config: Config,
    /// Devices with the profiles' under them.
    pub expanded_devices: Devices,
    /// Status out of desired and observed.
    pub status: Status,
    /// Why it is so, in words, where nobody asked for it: what halted it, or how it ended by itself.
    pub reason: Option<String>,
    /// Name of its node.
    pub location: String,
    /// Name of its root's pool.
    pub pool: String,
    /// Its NICs as networks know them: what each is on, and the guest there.
    pub(crate) nics: Vec<(Place, NetworkHost)>,
}

impl InstanceView {
    /// What its guest runs with, as far as that is known; none when it does not run.
    pub fn run(&self) -> Option<&AppliedSpec> {
        self.runtime.as_ref().and_then(|r| r.applied.as_ref())
    }

    /// What one of these devices is known by: those of the record, or those of its run.
    pub fn identity(&self, name: &str, devices: &Devices) -> Option<&DeviceIdentity> {
        let run = self.run().filter(|run| run.devices.get(name) == devices.get(name));
        run.and_then(|run| run.identities.get(name)).or_else(|| self.instance.identities.get(name))
    }

    /// What its devices are known by, those that only its run has too; of a device that the run has otherwise than the record, as
    /// the run has it.
    pub fn run_identities(&self) -> BTreeMap<String, DeviceIdentity> {
        match self.run() {
            Some(run) => run.known_by(&self.instance.identities),
            None => self.instance.identities.clone(),
        }
    }
}

/// A lock on an aggregate root.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Lock {
    /// What is locked, such as `instances/UUID`.
    pub target: String,
    /// Who holds it.
    pub saga: karst_model::SagaId,
    /// The operation that users see.
    pub operation: OperationId,
    /// What it does, in words.
    pub description: String,
}

/// Changes whenever something begins to use `target`: who deletes the target compares it, because a new user does not
/// change the target itself.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Uses {
    /// What is used, such as `profiles/UUID`.
    pub target: String,
}

impl Record for Uses {
    const TABLE: &'static str = "uses";
    fn record_id(&self) -> String {
        self.target.clone()
    }
}

/// Last VMID that was drawn and may have come back; see [`Records::highest_vmid`].
pub(crate) const VMID_KEY: &str = "/karst/v1/meta/highest-vmid";

/// Where each VMID stands that a client chose beyond those that were drawn, and that has come back.
pub(crate) const RETIRED_VMIDS: &str = "/karst/v1/meta/retired-vmids/";

/// Incarnation of this store: 1, and one more each time when it is restored from a backup, so that no generation that was
/// ordered after that backup is ordered again.
pub(crate) const INCARNATION_KEY: &str = "/karst/v1/meta/incarnation";

/// All records at one revision.
#[derive(Debug, Default)]
pub struct Records {
    /// Revision of the store up to which everything is applied.
    pub revision: Revision,
    /// Nodes.
    pub nodes: BTreeMap<NodeId, Row<Node>>,
    /// Projects.
    pub projects: BTreeMap<ProjectId, Row<Project>>,
    /// Profiles.
    pub profiles: BTreeMap<ProfileId, Row<Profile>>,
    /// Pools.
    pub pools: BTreeMap<PoolId, Row<Pool>>,
    /// Volumes.
    pub volumes: BTreeMap<VolumeId, Row<Volume>>,
    /// Volumes by their names, which several pools and projects may have.
    volumes_by_name: HashMap<String, BTreeSet<VolumeId>>,
    /// Networks.
    pub networks: BTreeMap<NetworkId, Row<Network>>,
    /// Network ACLs.
    pub acls: BTreeMap<AclId, Row<NetworkAcl>>,
    /// Address sets.
    pub address_sets: BTreeMap<AddressSetId, Row<AddressSet>>,
    /// Forwards, by key.
    pub forwards: BTreeMap<String, Row<NetworkForward>>,
    /// Passwords of displays.
    pub display_locks: BTreeMap<InstanceId, Row<DisplayLock>>,
    /// Who projects are at registries, by key.
    pub registry_logins: BTreeMap<String, Row<RegistryLogin>>,
    /// Secrets that are written, by key.
    pub secrets: BTreeMap<String, Row<Secret>>,
    /// Images.
    pub images: BTreeMap<ImageId, Row<Image>>,
    aliases: BTreeMap<String, Row<ImageAlias>>,
    /// Instances.
    pub instances: BTreeMap<InstanceId, Row<Instance>>,
    /// Instances by project and name.
    pub instance_names: BTreeMap<(ProjectId, String), InstanceId>,
    /// Instances by the MAC addresses of their NICs, so that a new one is not compared with each.
    instances_by_mac: HashMap<String, BTreeSet<InstanceId>>,
    /// Instances by the sources of their own disks, of whatever pool; by nothing those that start with a kernel.
    instances_by_source: HashMap<String, BTreeSet<InstanceId>>,
    /// Instances by project and DNS label, of which names are several.
    instances_by_label: HashMap<(ProjectId, String), BTreeSet<InstanceId>>,
    /// Snapshots of instances.
    pub snapshots: BTreeMap<SnapshotId, Row<Snapshot>>,
    snapshots_by_instance: HashMap<InstanceId, BTreeSet<SnapshotId>>,
    /// Checkpoints of instances.
    pub checkpoints: BTreeMap<CheckpointId, Row<Checkpoint>>,
    /// Snapshots of custom volumes.
    pub volume_snapshots: BTreeMap<SnapshotId, Row<VolumeSnapshot>>,
    snapshots_by_volume: HashMap<VolumeId, BTreeSet<SnapshotId>>,
    /// Backups.
    pub backups: BTreeMap<BackupId, Row<Backup>>,
    /// Runtimes.
    pub runtimes: BTreeMap<InstanceId, Row<Runtime>>,
    /// Operations.
    pub operations: BTreeMap<OperationId, Row<Operation>>,
    locks: BTreeMap<String, Row<Lock>>,
    uses: BTreeMap<String, Row<Uses>>,
    /// Who asked for changes that the audit log may not have yet.
    pub(crate) audits: BTreeMap<String, Row<AuditPending>>,
    project_names: HashMap<String, ProjectId>,
    /// Highest VMID that was drawn for any instance that is or was here; at least 99. Chosen ones may lie above it.
    pub highest_vmid: u32,
    /// VMIDs of the instances that are here.
    pub(crate) taken_vmids: BTreeSet<u32>,
    /// VMIDs that were chosen and have come back.
    pub(crate) retired_vmids: BTreeSet<u32>,
    /// What the store says of it, and the revision of that: written when a number comes back.
    pub(crate) vmid_mark: (u32, Option<Revision>),
    /// Incarnation of the store; 0 until its first start has written it.
    pub incarnation: u64,
    /// Certificates, tokens, the server's configuration.
    pub tenancy: crate::tenancy::records::TenancyRecords,
    /// Sagas that have not ended.
    pub sagas: BTreeMap<karst_model::SagaId, Row<crate::saga::SagaRecord>>,
}

impl Records {
    /// Project by name.
    pub fn project(&self, name: &str) -> Result<&Row<Project>> {
        self.project_names
            .get(name)
            .and_then(|id| self.projects.get(id))
            .ok_or_else(|| Error::not_found(format!("project {name:?} not found")))
    }

    /// Instance by name.
    pub fn instance(&self, project: &Project, name: &str) -> Result<&Row<Instance>> {
        self.instance_names
            .get(&(project.id, name.to_owned()))
            .and_then(|id| self.instances.get(id))
            .ok_or_else(|| {
                Error::not_found(format!("instance {name:?} not found in project {:?}", &*project.name))
            })
    }

    /// Alias by name.
    pub fn alias(&self, project: ProjectId, name: &str) -> Option<&Row<ImageAlias>> {
        self.aliases.get(&key_part(&alias_id(project, name)))
    }

    /// All aliases.
    pub fn aliases(&self) -> impl Iterator<Item = &Row<ImageAlias>> {
        self.aliases.values()
    }

    /// Who holds `target`.
    pub fn lock(&self, target: &str) -> Option<&Row<Lock>> {
        self.locks.get(&key_part(target))
    }

    /// The mark of uses of `target`.
    pub(crate) fn uses(&self, target: &str) -> Option<&Row<Uses>> {
        self.uses.get(&key_part(target))
    }

    /// Profile by name.
    pub fn profile(&self, project: ProjectId, name: &str) -> Result<&Row<Profile>> {
        self.profiles
            .values()
            .find(|p| p.project == project && &*p.name == name)
            .ok_or_else(|| Error::not_found(format!("profile {name:?} not found")))
    }

    /// Pool by name.
    pub fn pool(&self, name: &str) -> Result<&Row<Pool>> {
        self.pools
            .values()
            .find(|p| &*p.name == name)
            .ok_or_else(|| Error::missing(Missing::Pool, format!("storage pool {name:?} not found")))
    }

    /// Whose custom volumes instances and users of a project have: its own, or those of the default project.
    pub fn volume_project(&self, project: ProjectId) -> ProjectId {
        self.projects.get(&project).map_or(project, |row| self.home(row, "features.storage.volumes"))
    }

    /// Custom volume that a project has, by the names of its pool and its own.
    pub fn custom_volume(&self, project: ProjectId, pool: &str, name: &str) -> Option<&Row<Volume>> {
        let project = self.volume_project(project);
        let pool = self.pool(pool).ok()?.id;
        let named = self.volumes_by_name.get(name).into_iter().flatten();
        named
            .filter_map(|id| self.volumes.get(id))
            .find(|v| v.pool == pool && v.project == project && v.owner == VolumeOwner::Custom)
    }

    /// Snapshots of an instance, oldest first.
    pub fn snapshots_of(&self, instance: InstanceId) -> Vec<&Row<Snapshot>> {
        let ids = self.snapshots_by_instance.get(&instance).into_iter().flatten();
        let mut all: Vec<_> = ids.filter_map(|id| self.snapshots.get(id)).collect();
        all.sort_by_key(|s| (s.created_at, s.id));
        all
    }

    /// Checkpoints of an instance, in the order in which they descend from each other.
    pub fn checkpoints_of(&self, instance: InstanceId) -> Vec<&Row<Checkpoint>> {
        let all: Vec<&Row<Checkpoint>> =
            self.checkpoints.values().filter(|c| c.instance == instance).collect();
        let line = in_line(all.iter().map(|row| &row.value));
        line.iter().filter_map(|c| all.iter().find(|row| row.id == c.id).copied()).collect()
    }

    /// Snapshots of a custom volume, oldest first.
    pub fn volume_snapshots_of(&self, volume: VolumeId) -> Vec<&Row<VolumeSnapshot>> {
        let ids = self.snapshots_by_volume.get(&volume).into_iter().flatten();
        let mut all: Vec<_> = ids.filter_map(|id| self.volume_snapshots.get(id)).collect();
        all.sort_by_key(|s| (s.created_at, s.id));
        all
    }

    /// Image by fingerprint, a unique prefix of at least 4 characters of it, or alias.
    pub fn image(&self, project: ProjectId, reference: &str) -> Result<&Row<Image>> {
        if let Some(alias) = self.alias(project, reference)
            && let Some(image) = self.images.get(&alias.image)
        {
            return Ok(image);
        }
        let missing = || Error::not_found(format!("image {reference:?} not found"));
        if reference.len() < 4 || !reference.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(missing());
        }
        let lower = reference.to_ascii_lowercase();
        let mut found =
            self.images.values().filter(|i| i.project == project && i.fingerprint.starts_with(&lower));
        match (found.next(), found.next()) {
            (Some(image), None) => Ok(image),
            (Some(_), Some(_)) => Err(Error::invalid(
                "fingerprint",
                format!("{reference:?} is the beginning of several fingerprints; write more of it"),
            )),
            _ => Err(missing()),
        }
    }

    /// Devices of all instances with their owner, for uses of networks and pools.
    pub fn expanded<'a>(&'a self, instance: &'a Instance) -> (Config, Devices) {
        let profiles =
            instance.profiles.iter().filter_map(|id| self.profiles.get(id)).map(|p| (&p.config, &p.devices));
        expand(instance.kind, profiles, (&instance.config, &instance.devices))
    }

    /// The devices of an instance, with those that only its running guest has.
    pub(crate) fn devices_in_use(&self, instance: &Instance) -> Devices {
        let devices = self.expanded(instance).1;
        match self.runtimes.get(&instance.id).and_then(|r| r.applied.as_ref()) {
            Some(run) => run.in_use(&devices),
            None => devices,
        }
    }

    fn view(&self, id: InstanceId) -> Option<InstanceView> {
        let instance = self.instances.get(&id)?.clone();
        let runtime = self.runtimes.get(&id).cloned();
        let (expanded_config, expanded_devices) = self.expanded(&instance);
        Some(InstanceView {
            status: instance.status(runtime.as_ref().map(|r| &r.value)),
            reason: self.why(&instance),
            nics: match runtime.as_ref().and_then(|r| r.applied.as_ref()) {
                Some(run) if !run.held.is_empty() => self.nics_of(
                    &Instance { identities: run.known_by(&instance.identities), ..instance.value.clone() },
                    &run.in_use(&expanded_devices),
                ),
                _ => self.nics_of(&instance, &expanded_devices),
            },
            runtime,
            project: self.projects.get(&instance.project)?.clone(),
            profiles: instance.profiles.iter().filter_map(|p| self.profiles.get(p).cloned()).collect(),
            expanded_config,
            expanded_devices,
            location: self.nodes.get(&instance.node).map(|n| n.name.to_string()).unwrap_or_default(),
            pool: self.pools.get(&instance.pool).map(|p| p.name.to_string()).unwrap_or_default(),
            instance,
        })
    }

    /// An instance's NICs on networks with what its project demands of them: guests of restricted projects do not forge
    /// senders, whatever their NICs say.
    pub(crate) fn nics_of(&self, instance: &Instance, devices: &Devices) -> Vec<(Place, NetworkHost)> {
        let mut found = nics(instance, devices);
        let Some(project) = self.projects.get(&instance.project).filter(|_| !found.is_empty()) else {
            return found;
        };
        let filters = crate::visible::rules(project).filters();
        for port in found.iter_mut().filter_map(|(_, host)| host.port.as_mut()) {
            crate::visible::put_filters(port, filters);
        }
        found
    }

    /// The filters that a project's NICs have whatever they say.
    pub(crate) fn filters_of(&self, project: ProjectId) -> &'static [&'static str] {
        self.projects.get(&project).map(|row| crate::visible::rules(row).filters()).unwrap_or_default()
    }

    /// The instances that have a NIC with this MAC address.
    pub(crate) fn with_mac(&self, mac: &str) -> impl Iterator<Item = InstanceId> {
        self.instances_by_mac.get(mac).into_iter().flatten().copied()
    }

    /// The instances of a project whose names give this DNS label.
    pub(crate) fn with_label(&self, project: ProjectId, label: &str) -> impl Iterator<Item = InstanceId> {
        self.instances_by_label.get(&(project, label.to_owned())).into_iter().flatten().copied()
    }

    /// Keeps the index of instances by DNS label.
    fn follow_labels(&mut self, id: InstanceId, old: Option<&Instance>, new: Option<&Instance>) {
        let of = |instance: &Instance| (instance.project, instance.name.dns_label());
        let (old, new) = (old.map(of), new.map(of));
        if old == new {
            return;
        }
        if let Some(old) = old
            && let Some(ids) = self.instances_by_label.get_mut(&old)
        {
            ids.remove(&id);
            if ids.is_empty() {
                self.instances_by_label.remove(&old);
            }
        }
        if let Some(new) = new {
            self.instances_by_label.entry(new).or_default().insert(id);
        }
    }

    /// Instances of which a device of their own may be a volume of this name: all that are, and perhaps more.
    pub(crate) fn instances_naming(&self, volume: &str) -> impl Iterator<Item = InstanceId> {
        let named = [volume, ""].map(|name| self.instances_by_source.get(name));
        named.into_iter().flatten().flatten().copied()
    }

    /// Keeps the index of instances by the sources of their disks.
    fn follow_sources(&mut self, id: InstanceId, old: Option<&Instance>, new: Option<&Instance>) {
        let of = |instance: Option<&Instance>| -> BTreeSet<String> {
            let devices = instance.into_iter().flat_map(|i| i.devices.values());
            devices
                .filter_map(|keys| match keys.get("type")?.as_str() {
                    "disk" => keys.get("source").filter(|s| !s.is_empty()).cloned(),
                    "kernel" => Some(String::new()),
                    _ => None,
                })
                .collect()
        };
        let (old, new) = (of(old), of(new));
        for source in old.difference(&new) {
            if let Some(ids) = self.instances_by_source.get_mut(source) {
                ids.remove(&id);
                if ids.is_empty() {
                    self.instances_by_source.remove(source);
                }
            }
        }
        for source in new.difference(&old) {
            self.instances_by_source.entry(source.clone()).or_default().insert(id);
        }
    }

    /// Keeps the index of instances by MAC address.
    fn follow_macs(&mut self, id: InstanceId, old: Option<&Instance>, new: Option<&Instance>) {
        let of = |instance: Option<&Instance>| -> BTreeSet<String> {
            let identities = instance.into_iter().flat_map(|i| i.identities.values());
            identities.filter_map(|i| i.mac.clone()).collect()
        };
        let (old, new) = (of(old), of(new));
        for mac in old.difference(&new) {
            if let Some(ids) = self.instances_by_mac.get_mut(mac) {
                ids.remove(&id);
                if ids.is_empty() {
                    self.instances_by_mac.remove(mac);
                }
            }
        }
        for mac in new.difference(&old) {
            self.instances_by_mac.entry(mac.clone()).or_default().insert(id);
        }
    }

    fn apply(&mut self, change: &Change) -> Touched {
        let key = match change {
            Change::Put(kv) => &kv.key,
            Change::Delete { key } => key,
        };
        let Some((table, id)) = key.strip_prefix(ROOT).and_then(|k| k.split_once('/')) else {
            return Touched::Nothing;
        };
        // A record that this build cannot read must not take the daemon down: it is logged and left out.
        macro_rules! put {
            ($map:expr, $key:expr) => {{
                let Some(key) = $key else {
                    tracing::error!(%key, "a key of the store is malformed");
                    return Touched::Nothing;
                };
                match change {
                    Change::Put(kv) => match Table::new().decode(kv) {
                        Ok(row) => drop($map.insert(key, Row(Arc::new(row)))),
                        Err(e) => tracing::error!(key = %kv.key, error = ?e, "a record cannot be read"),
                    },
                    Change::Delete { .. } => drop($map.remove(&key)),
                }
            }};
        }
        fn parse<T: std::str::FromStr>(s: &str) -> Option<T> {
            s.parse().ok()
        }
        match table {
            t if t == Node::TABLE => {
                put!(self.nodes, parse(id));
                Touched::All
            }
            t if t == Project::TABLE => {
                let id = parse::<ProjectId>(id);
                if let Some(old) = id.and_then(|id| self.projects.get(&id)) {
                    self.project_names.remove(old.name.as_str());
                }
                put!(self.projects, id);
                if let Some(new) = id.and_then(|id| self.projects.get(&id)) {
                    self.project_names.insert(new.name.to_string(), new.id);
                }
                Touched::All
            }
            t if t == Profile::TABLE => {
                put!(self.profiles, parse(id));
                Touched::All
            }
            t if t == Pool::TABLE => {
                put!(self.pools, parse(id));
                Touched::All
            }
            t if t == Volume::TABLE => {
                let Some(id) = parse::<VolumeId>(id) else {
                    return Touched::Nothing;
                };
                let old = self.volumes.get(&id).map(|v| v.name.clone());
                put!(self.volumes, Some(id));
                let new = self.volumes.get(&id).map(|v| v.name.clone());
                if old != new {
                    if let Some(old) = old
                        && let Entry::Occupied(mut named) = self.volumes_by_name.entry(old)
                    {
                        named.get_mut().remove(&id);
                        if named.get().is_empty() {
                            named.remove();
                        }
                    }
                    if let Some(new) = new {
                        self.volumes_by_name.entry(new).or_default().insert(id);
                    }
                }
                Touched::Nothing
            }
            t if t == Network::TABLE => {
                put!(self.networks, parse(id));
                Touched::Nothing
            }
            t if t == NetworkAcl::TABLE => {
                put!(self.acls, parse(id));
                Touched::Nothing
            }
            t if t == AddressSet::TABLE => {
                put!(self.address_sets, parse(id));
                Touched::Nothing
            }
            t if t == NetworkForward::TABLE => {
                put!(self.forwards, Some(id.to_owned()));
                Touched::Nothing
            }
            t if t == DisplayLock::TABLE => {
                put!(self.display_locks, parse(id));
                Touched::Nothing
            }
            t if t == RegistryLogin::TABLE => {
                put!(self.registry_logins, Some(id.to_owned()));
                Touched::Nothing
            }
            t if t == Secret::TABLE => {
                put!(self.secrets, Some(id.to_owned()));
                Touched::Nothing
            }
            t if t == Image::TABLE => {
                put!(self.images, parse(id));
                Touched::Nothing
            }
            t if t == ImageAlias::TABLE => {
                put!(self.aliases, Some(id.to_owned()));
                Touched::Nothing
            }
            t if t == Instance::TABLE => {
                let Some(id) = parse::<InstanceId>(id) else {
                    return Touched::Nothing;
                };
                let old = self.instances.get(&id).cloned();
                if let Some(old) = &old {
                    self.instance_names.remove(&(old.project, old.name.to_string()));
                    self.taken_vmids.remove(&old.vmid.0);
                }
                put!(self.instances, Some(id));
                let new = self.instances.get(&id).cloned();
                self.follow_macs(id, old.as_deref().map(|i| &**i), new.as_deref().map(|i| &**i));
                self.follow_sources(id, old.as_deref().map(|i| &**i), new.as_deref().map(|i| &**i));
                self.follow_labels(id, old.as_deref().map(|i| &**i), new.as_deref().map(|i| &**i));
                if let Some(new) = new {
                    self.taken_vmids.insert(new.vmid.0);
                    if !new.vmid_chosen {
                        self.highest_vmid = self.highest_vmid.max(new.vmid.0);
                    }
                    self.instance_names.insert((new.project, new.name.to_string()), id);
                }
                Touched::Instance(id)
            }
            t if t == Snapshot::TABLE => {
                let Some(id) = parse::<SnapshotId>(id) else {
                    return Touched::Nothing;
                };
                let old = self.snapshots.get(&id).map(|s| s.instance);
                put!(self.snapshots, Some(id));
                let new = self.snapshots.get(&id).map(|s| s.instance);
                follow(&mut self.snapshots_by_instance, id, old, new)
            }
            t if t == Checkpoint::TABLE => {
                put!(self.checkpoints, parse(id));
                Touched::Nothing
            }
            t if t == VolumeSnapshot::TABLE => {
                let Some(id) = parse::<SnapshotId>(id) else {
                    return Touched::Nothing;
                };
                let old = self.volume_snapshots.get(&id).map(|s| s.volume);
                put!(self.volume_snapshots, Some(id));
                let new = self.volume_snapshots.get(&id).map(|s| s.volume);
                follow(&mut self.snapshots_by_volume, id, old, new)
            }
            t if t == Backup::TABLE => {
                put!(self.backups, parse(id));
                Touched::Nothing
            }
            t if t == Runtime::TABLE => {
                let id = parse::<InstanceId>(id);
                put!(self.runtimes, id);
                id.map_or(Touched::Nothing, Touched::Instance)
            }
            t if t == Operation::TABLE => {
                put!(self.operations, parse(id));
                Touched::Nothing
            }
            t if t == Lock::TABLE => {
                put!(self.locks, Some(id.to_owned()));
                Touched::Nothing
            }
            t if t == Uses::TABLE => {
                put!(self.uses, Some(id.to_owned()));
                Touched::Nothing
            }
            t if t == AuditPending::TABLE => {
                put!(self.audits, Some(id.to_owned()));
                Touched::Nothing
            }
            "meta" if *key == VMID_KEY => {
                if let Change::Put(kv) = change {
                    let value = std::str::from_utf8(&kv.value).ok().and_then(|s| s.parse().ok());
                    self.vmid_mark = (value.unwrap_or(99), Some(kv.mod_revision));
                    self.highest_vmid = self.highest_vmid.max(self.vmid_mark.0);
                }
                Touched::Nothing
            }
            "meta" if key.starts_with(RETIRED_VMIDS) => {
                self.retired_vmids.extend(key[RETIRED_VMIDS.len()..].parse::<u32>().ok());
                Touched::Nothing
            }
            "meta" if *key == INCARNATION_KEY => {
                if let Change::Put(kv) = change {
                    let value = std::str::from_utf8(&kv.value).ok().and_then(|s| s.parse().ok());
                    self.incarnation = self.incarnation.max(value.unwrap_or_default());
                }
                Touched::Nothing
            }
            t if t == crate::saga::SagaRecord::TABLE => {
                put!(self.sagas, parse(id));
                Touched::Nothing
            }
            _ => {
                self.tenancy.apply(table, id, change);
                Touched::Nothing
            }
        }
    }
}

/// An instance's NICs on networks: what each is on, and what a network is told of them as they are written.
fn nics(instance: &Instance, devices: &Devices) -> Vec<(Place, NetworkHost)> {
    let mut found = vec![];
    for (name, keys) in devices {
        let Ok(Device::Nic(NicDevice { kind, ipv4, ipv6, routes, port, .. })) = Device::parse(name, keys)
        else {
            continue;
        };
        let Some(place) = Place::of(&kind) else { continue };
        let identity = instance.identities.get(name);
        if let Some(mac) = identity.and_then(|i| i.mac.clone()) {
            let hostname = instance.name.dns_label();
            let interface = identity.and_then(|i| i.host_interface.clone()).unwrap_or_default();
            let port = Some(PortSpec { interface, ..port }).filter(|p| !p.interface.is_empty());
            let view = Some(NameView { project: instance.project, port: 0 });
            let given = instance.is_application();
            found.push((place, NetworkHost { mac, hostname, ipv4, ipv6, routes, port, view, given }));
        }
    }
    found
}

/// Keeps the index of snapshots by what they are of.
fn follow<K: std::hash::Hash + Eq + Copy>(
    index: &mut HashMap<K, BTreeSet<SnapshotId>>,
    id: SnapshotId,
    old: Option<K>,
    new: Option<K>,
) -> Touched {
    if let Some(old) = old.filter(|o| Some(*o) != new)
        && let Some(ids) = index.get_mut(&old)
    {
        ids.remove(&id);
        if ids.is_empty() {
            index.remove(&old);
        }
    }
    if let Some(new) = new {
        index.entry(new).or_default().insert(id);
    }
    Touched::Nothing
}

/// Which cached views a change makes stale.
enum Touched {
    Nothing,
    Instance(InstanceId),
    All,
}

/// The inventory.
pub struct Inventory {
    records: RwLock<Records>,
    views: Mutex<HashMap<InstanceId, Arc<InstanceView>>>,
    reached: watch::Sender<Revision>,
    env: Arc<dyn Env>,
}

impl std::fmt::Debug for Inventory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Inventory at {}", *self.reached.borrow())
    }
}

impl Inventory {
    /// Reads everything and keeps following the store until dropped.
    ///
    /// # Errors
    /// Unavailable when the store does not answer.
    pub async fn open(env: Arc<dyn Env>, store: Arc<dyn Store>) -> Result<Arc<Self>> {
        let (records, revision) = list(&*store).await?;
        let this = Arc::new(Self {
            records: RwLock::new(records),
            views: Mutex::default(),
            reached: watch::channel(revision).0,
            env: env.clone(),
        });
        let weak = Arc::downgrade(&this);
        let task_env = env.clone();
        env.spawn_task("inventory", async move {
            let mut from = revision + 1;
            loop {
                match store.watch(ROOT, from).await {
                    Ok(mut stream) => loop {
                        let item = stream.next().await;
                        let Some(this) = weak.upgrade() else { return };
                        match item {
                            Some(Ok(item)) => {
                                from = item.revision() + 1;
                                this.advance(item);
                            }
                            Some(Err(StoreError::Compacted { .. })) => break,
                            Some(Err(e)) => {
                                tracing::warn!(error = %e, "the watch ended; beginning again");
                                break;
                            }
                            None => break,
                        }
                    },
                    Err(e) => tracing::warn!(error = %e, "the store cannot be watched"),
                }
                let Some(this) = weak.upgrade() else { return };
                // Whatever ended the watch: list at one revision and swap.
                match list(&*store).await {
                    Ok((records, revision)) => {
                        from = revision + 1;
                        this.swap(records, revision);
                    }
                    Err(_) => {
                        drop(this);
                        task_env.sleep(Duration::from_millis(200)).await;
                    }
                }
            }
        });
        Ok(this)
    }

    fn advance(&self, item: WatchItem) {
        let revision = item.revision();
        if let WatchItem::Batch(batch) = item {
            let mut records = self.records.write().unwrap_or_else(|e| e.into_inner());
            let mut views = self.views.lock().unwrap_or_else(|e| e.into_inner());
            for event in &batch.events {
                match records.apply(&event.change) {
                    Touched::Nothing => {}
                    Touched::Instance(id) => drop(views.remove(&id)),
                    Touched::All => views.clear(),
                }
            }
            records.revision = revision;
        }
        self.reached.send_if_modified(|r| {
            let newer = revision > *r;
            *r = (*r).max(revision);
            newer
        });
    }

    fn swap(&self, records: Records, revision: Revision) {
        *self.records.write().unwrap_or_else(|e| e.into_inner()) = records;
        self.views.lock().unwrap_or_else(|e| e.into_inner()).clear();
        self.reached.send_replace(revision);
    }

    /// Reads; hold the guard shortly and never across an await.
    pub fn read(&self) -> RwLockReadGuard<'_, Records> {
        self.records.read().unwrap_or_else(|e| e.into_inner())
    }

    /// An instance as front ends show it.
    pub fn view(&self, records: &Records, id: InstanceId) -> Option<Arc<InstanceView>> {
        let mut views = self.views.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(view) = views.get(&id) {
            return Some(view.clone());
        }
        let view = Arc::new(records.view(id)?);
        views.insert(id, view.clone());
        Some(view)
    }

    /// Waits until the inventory has reached `revision`.
    ///
    /// # Errors
    /// Unavailable after 10 s: the store no longer sends changes.
    pub async fn wait_for(&self, revision: Revision) -> Result<()> {
        let mut reached = self.reached.subscribe();
        if *reached.borrow() >= revision {
            return Ok(());
        }
        match self
            .env
            .timeout(
                Duration::from_secs(10),
                async move { reached.wait_for(|r| *r >= revision).await.is_ok() },
            )
            .await
        {
            Ok(true) => Ok(()),
            _ => Err(Error::unavailable(
                "the state database is not sending changes; the change was made, but is not visible yet",
            )),
        }
    }

    /// Completes when the inventory has reached `revision`.
    pub(crate) async fn reaches(&self, revision: Revision) {
        // The sender lives as long as `self`.
        let _ = self.reached.subscribe().wait_for(|r| *r >= revision).await;
    }

    /// Hears of every change of the revision, for reconcilers.
    pub fn changes(&self) -> watch::Receiver<Revision> {
        self.reached.subscribe()
    }
}

async fn list(store: &dyn Store) -> Result<(Records, Revision)> {
    let (kvs, revision) = list_prefix(store, ROOT).await?;
    let mut records = Records { revision, highest_vmid: 99, vmid_mark: (99, None), ..Default::default() };
    for kv in kvs {
        records.apply(&Change::Put(kv));
    }
    Ok((records, revision))
}
