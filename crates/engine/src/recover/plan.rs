//! What is to be made of a description. Nothing that it says is believed: each value is checked as if a user had asked for
//! it, and what the host itself knows (content, size, which snapshots there are, what runs) counts instead of it.

use super::{
    describe::{DescribedInstance, Description},
    saga::VolumePlan,
};
use crate::{
    EngineInner, Records,
    backups::import::usable_mac,
    compute::{create::check_devices, disks::check_disks, expand},
    db::Tx,
    snapshots::Taken,
    tenancy::limits::{Planned, admit},
    volumes,
};
use karst_agent::{FoundVolume, VolumeRef};
use karst_model::{
    Config, Error, InstanceId, Name, ProfileId, Result, SnapshotId, Vmid,
    device::Devices,
    guest::Observed,
    instance::{
        DesiredPower, DeviceIdentity, Generation, Hardware, Instance, InstanceKind, Lifecycle, RuntimeState,
    },
    keys, keys_machine,
    profile::expand as expand_profiles,
    project::Project,
    snapshot::{Snapshot, VolumeSnapshot},
    storage::{Pool, Volume, VolumeContent, VolumeOwner, check_volume_config},
};
use std::collections::{BTreeMap, BTreeSet};

/// Most root ports that a machine can have on its bus.
const MOST_PORTS: u8 = 32;

/// What of a description is made again at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// A custom volume.
    Volume,
    /// An instance; with its root, if that is its own.
    Instance,
}

impl Part {
    pub fn is_in(self, said: &Description) -> bool {
        match self {
            Self::Volume => said.volume.owner == VolumeOwner::Custom,
            Self::Instance => said.instance.is_some(),
        }
    }

    pub fn word(self) -> &'static str {
        match self {
            Self::Volume => "custom volume",
            Self::Instance => "instance",
        }
    }

    pub fn title(self) -> &'static str {
        match self {
            Self::Volume => "Recovering storage volume",
            Self::Instance => "Recovering instance",
        }
    }
}

/// The description is one of this volume.
///
/// # Errors
/// Invalid.
pub(super) fn demand_of(found: &FoundVolume, said: Description) -> Result<Description> {
    let wrong = |text: &str| Err(Error::invalid("description", format!("its description {text}")));
    if said.volume.id != found.volume {
        return wrong("is that of another volume");
    }
    if said.volume.content != found.content {
        return wrong("says that it holds something else");
    }
    match (&said.volume.owner, &said.instance) {
        (VolumeOwner::Image { .. }, _) => return wrong("says that it is an image's"),
        (VolumeOwner::Instance { .. }, None) => return wrong("does not describe its instance"),
        (VolumeOwner::Instance { instance }, Some(i)) if *instance != i.instance.id => {
            return wrong("describes another instance than its own");
        }
        _ => {}
    }
    if let Some(i) = &said.instance {
        let wanted = match i.instance.kind {
            InstanceKind::Container => VolumeContent::Filesystem,
            InstanceKind::VirtualMachine => VolumeContent::Block,
        };
        if i.instance.root != found.volume || wanted != found.content {
            return wrong("describes an instance that cannot run from it");
        }
    }
    Ok(said)
}

/// Devices with those of the profiles that there are.
pub(super) fn expanded_devices(records: &Records, project: &Project, of: &DescribedInstance) -> Devices {
    let home = records.home(project, "features.profiles");
    let profiles = of.profiles.iter().filter_map(|name| records.profile(home, name).ok());
    let profiles = profiles.map(|p| (&p.config, &p.devices));
    expand_profiles(of.instance.kind, profiles, (&of.instance.config, &of.instance.devices)).1
}

/// The pool is used from now on.
fn use_pool(records: &Records, tx: &mut Tx, pool: &Pool) -> Result<()> {
    let row = records.pools.get(&pool.id);
    let row = row.ok_or_else(|| Error::not_found(format!("storage pool {:?} is gone", &*pool.name)))?;
    tx.expect(row);
    tx.expect_unlocked(&crate::storage::pool_lock(row.id));
    tx.touch(&crate::storage::pool_lock(row.id));
    Ok(())
}

/// A name for a snapshot that is on the pool, and of which nothing is said.
fn unsaid(id: SnapshotId) -> Result<Name> {
    Name::parse("name", &format!("recovered-{}", &id.to_string()[..8]))
}

fn in_words(name: &str) -> impl Fn(Error) -> Error {
    move |e| Error { message: format!("snapshot {name:?}: {}", e.message), ..e }
}

/// Snapshots on the pool that neither the volume nor its instance describes.
fn others<'a>(found: &'a FoundVolume, said: &'a Description) -> impl Iterator<Item = SnapshotId> + 'a {
    let of_instance = |id: SnapshotId| {
        let all = said.instance.iter().flat_map(|i| &i.snapshots);
        all.flat_map(|(s, _)| &s.volumes).any(|(v, s)| *v == found.volume && *s == id)
    };
    let ids = found.snapshots.iter().map(|s| s.snapshot);
    ids.filter(move |id| !said.snapshots.iter().any(|s| s.id == *id) && !of_instance(*id))
}

/// A custom volume.
pub(super) fn plan_volume(
    inner: &EngineInner,
    records: &Records,
    tx: &mut Tx,
    pool: &Pool,
    found: &FoundVolume,
    said: &Description,
) -> Result<VolumePlan> {
    let project = records.project(&said.project)?;
    tx.expect(project);
    use_pool(records, tx, pool)?;
    if records.volumes.contains_key(&found.volume) {
        return Err(Error::conflict("the database knows it by now"));
    }
    let name = Name::parse("name", &said.volume.name)?;
    volumes::demand_free(records, project, pool, &name)?;
    let owner = records.volume_project(project.id);
    let config = said.volume.config.clone();
    let size = check_volume_config(&config, found.content)?;
    let mut volume = Volume {
        id: found.volume,
        pool: pool.id,
        project: owner,
        name: name.to_string(),
        content: found.content,
        owner: VolumeOwner::Custom,
        description: said.volume.description.clone(),
        size: None,
        config,
        spec_version: said.volume.spec_version.max(1),
        created_at: said.volume.created_at,
        layers: said.volume.layers.clone(),
    };
    // What was found is the container, where it is encrypted.
    volume.size = found.size.map(|stored| volume.shown(stored)).or(size);
    admit(records, tx, owner, &Planned { volume: Some(&volume), ..Default::default() })?;
    let (mut taken, mut names) = (vec![], BTreeSet::new());
    let size_of = |id: SnapshotId| found.snapshots.iter().find(|s| s.snapshot == id);
    for snapshot in &said.snapshots {
        // One that the pool does not have any more is none.
        let Some(there) = size_of(snapshot.id) else { continue };
        check_volume_config(&snapshot.config, found.content).map_err(in_words(&snapshot.name))?;
        if !names.insert(snapshot.name.to_string()) || records.volume_snapshots.contains_key(&snapshot.id) {
            return Err(Error::conflict(format!("it has the snapshot {:?} twice", &*snapshot.name)));
        }
        taken.push(VolumeSnapshot {
            volume: volume.id,
            size: there.size.map(|s| volume.shown(s)),
            ..snapshot.clone()
        });
    }
    for id in others(found, said) {
        taken.push(VolumeSnapshot {
            id,
            volume: volume.id,
            name: unsaid(id)?,
            description: String::new(),
            size: size_of(id).and_then(|s| s.size).map(|s| volume.shown(s)),
            config: volume.config.clone(),
            created_at: inner.env.now(),
            expires_at: None,
            scheduled: false,
            spec_version: 1,
        });
    }
    Ok(VolumePlan {
        path: volumes::path(records, &volume),
        node: inner.node,
        at: VolumeRef { pool: pool.id, volume: found.volume },
        volume: Some(volume),
        instance: None,
        taken: taken.into_iter().map(|s| Taken::Volume { snapshot: Box::new(s) }).collect(),
        observed: None,
    })
}

/// Profiles by their names.
fn profiles(records: &Records, tx: &mut Tx, project: &Project, names: &[String]) -> Result<Vec<ProfileId>> {
    let home = records.home(project, "features.profiles");
    let mut ids = vec![];
    for name in names {
        let row = records.profile(home, name).map_err(|e| e.at("profiles"))?;
        if ids.contains(&row.id) {
            return Err(Error::invalid("profiles", format!("profile {name:?} is named twice")));
        }
        tx.expect(row);
        crate::tenancy::profiles::demand_idle(records, tx, row.id)?;
        tx.touch(&crate::tenancy::profile_uses(row.id));
        ids.push(row.id);
    }
    Ok(ids)
}

/// Keys that the platform keeps, of one prefix.
fn kept(all: &Config, prefix: &str) -> Result<Config> {
    for (key, value) in all {
        if !key.starts_with(prefix) {
            return Err(Error::invalid(format!("config.{key}"), format!("is no key of {prefix}*")));
        }
        keys::check_free(key, value)?;
    }
    Ok(all.clone())
}

/// Virtual hardware as QEMU may get it.
fn hardware(said: &Instance, config: &Config) -> Result<Option<Hardware>> {
    let Some(hardware) = said.hardware.clone().filter(|_| said.kind == InstanceKind::VirtualMachine) else {
        if said.kind == InstanceKind::VirtualMachine {
            return Err(Error::invalid(
                "hardware",
                "the description does not say what the machine is made of",
            ));
        }
        return Ok(None);
    };
    // Checked as the keys that a user would set.
    let mut keys = config.clone();
    keys.insert("hardware.machine".into(), hardware.machine.clone());
    keys.insert("hardware.cpu.model".into(), hardware.cpu_model.clone());
    keys.retain(|k, _| k.starts_with("hardware."));
    keys_machine::hardware(&keys)?;
    let versioned = ["pc-q35-", "pc-i440fx-"].iter().any(|p| hardware.machine.starts_with(p));
    if !versioned || hardware.cpu_model.is_empty() || hardware.ports > MOST_PORTS {
        return Err(Error::invalid("hardware", "the description says of the machine what cannot be"));
    }
    Ok(Some(hardware))
}

/// Identities of devices, without what is not one or belongs to another by now.
fn identities(
    inner: &EngineInner,
    records: &Records,
    said: &BTreeMap<String, DeviceIdentity>,
    root: karst_model::VolumeId,
) -> BTreeMap<String, DeviceIdentity> {
    let word = |text: &str, extra: &[u8]| {
        let good = |b: u8| b.is_ascii_alphanumeric() || extra.contains(&b);
        (1..=64).contains(&text.len()) && text.bytes().all(good)
    };
    let interfaces: BTreeSet<&str> = records
        .instances
        .values()
        .flat_map(|i| i.identities.values())
        .filter_map(|i| i.host_interface.as_deref())
        .collect();
    let mut macs = BTreeSet::new();
    let mut all = BTreeMap::new();
    for (name, identity) in said {
        let pci = identity.pci.as_deref();
        if !word(&identity.slot, b"")
            || !word(&identity.alias, b"-_.:")
            || !pci.is_none_or(|p| word(p, b":."))
        {
            continue;
        }
        let mut identity = identity.clone();
        identity.volume = identity.volume.filter(|v| *v == root);
        identity.mac = identity.mac.map(|m| m.to_ascii_lowercase());
        identity.mac = identity.mac.filter(|m| usable_mac(records, m) && macs.insert(m.clone()));
        if let Some(interface) = &identity.host_interface {
            let ours = karst_agent::names::is_guest_interface(&inner.daemon_id, interface);
            if !ours || interfaces.contains(&**interface) {
                let mut suffix = [0u8; 4];
                inner.env.fill_random(&mut suffix);
                identity.host_interface = Some(expand::host_interface(&inner.daemon_id, suffix));
            }
        }
        all.insert(name.clone(), identity);
    }
    all
}

/// The root device says which pool: the one that it was found on.
fn root_on(devices: &mut Devices, expanded: &Devices, pool: &str) {
    let is =
        |keys: &BTreeMap<String, String>, key: &str, value: &str| keys.get(key).is_some_and(|v| v == value);
    let root = expanded.iter().find(|(_, keys)| is(keys, "type", "disk") && is(keys, "path", "/"));
    let (name, mut keys) = match root {
        Some((_, keys)) if is(keys, "pool", pool) => return,
        Some((name, keys)) => (name.clone(), keys.clone()),
        None => {
            let keys = [("type", "disk"), ("path", "/")].map(|(k, v)| (k.to_owned(), v.to_owned()));
            ("root".to_owned(), keys.into())
        }
    };
    keys.insert("pool".into(), pool.into());
    devices.insert(name, keys);
}

/// Snapshots of an instance that its volume still has, their tree as far as it is one.
fn snapshots(
    inner: &EngineInner,
    records: &Records,
    tx: &mut Tx,
    project: &Project,
    instance: &Instance,
    found: &FoundVolume,
    said: &Description,
) -> Result<Vec<Snapshot>> {
    let mut all: Vec<Snapshot> = vec![];
    let mut names = BTreeSet::new();
    let there = |id: SnapshotId| found.snapshots.iter().any(|s| s.snapshot == id);
    let described = said.instance.iter().flat_map(|i| &i.snapshots);
    for (snapshot, named) in described {
        let of_root = snapshot.volumes.iter().find(|(v, s)| *v == found.volume && there(*s));
        let Some(of_root) = of_root.copied() else { continue };
        let wrong = in_words(&snapshot.name);
        keys::check(&snapshot.config, Some(instance.kind)).map_err(&wrong)?;
        check_devices(&snapshot.devices).map_err(&wrong)?;
        if !names.insert(snapshot.name.to_string()) || records.snapshots.contains_key(&snapshot.id) {
            return Err(Error::conflict(format!("it has the snapshot {:?} twice", &*snapshot.name)));
        }
        let home = records.home(project, "features.profiles");
        let ids = named.iter().map(|p| {
            let row = records.profile(home, p)?;
            tx.expect(row);
            Ok(row.id)
        });
        all.push(Snapshot {
            instance: instance.id,
            profiles: ids.collect::<Result<_>>().map_err(&wrong)?,
            volumes: vec![of_root],
            ..snapshot.clone()
        });
    }
    // Those of a custom root that nobody describes are the volume's own.
    if said.volume.owner != VolumeOwner::Custom {
        for id in others(found, said) {
            all.push(Snapshot {
                id,
                instance: instance.id,
                name: unsaid(id)?,
                parent: None,
                description: String::new(),
                note: String::new(),
                ephemeral: false,
                profiles: instance.profiles.clone(),
                config: instance.config.clone(),
                devices: instance.devices.clone(),
                hardware: None,
                volumes: vec![(found.volume, id)],
                stateful: false,
                created_at: inner.env.now(),
                expires_at: None,
                scheduled: false,
                spec_version: 1,
                external: None,
            });
        }
    }
    let parents: BTreeMap<SnapshotId, Option<SnapshotId>> = all.iter().map(|s| (s.id, s.parent)).collect();
    for snapshot in &mut all {
        let (mut next, mut steps) = (snapshot.parent, 0);
        while let Some(parent) = next.and_then(|id| parents.get(&id)).filter(|_| steps <= parents.len()) {
            next = *parent;
            steps += 1;
        }
        // A parent that is gone, or a circle.
        let known = snapshot.parent.is_none_or(|p| parents.contains_key(&p));
        if !known || steps > parents.len() {
            snapshot.parent = None;
        }
    }
    Ok(all)
}

/// An instance, with its root where that is its own.
pub(super) fn plan_instance(
    inner: &EngineInner,
    records: &Records,
    tx: &mut Tx,
    pool: &Pool,
    found: &FoundVolume,
    said: &Description,
    observed: &BTreeMap<InstanceId, Observed>,
) -> Result<VolumePlan> {
    let of = said.instance.as_ref().ok_or_else(|| Error::invalid("description", "describes no instance"))?;
    let was = &of.instance;
    let project = records.project(&of.project)?;
    tx.expect(project);
    use_pool(records, tx, pool)?;
    inner.demand_free_name(records, project.id, &was.name)?;
    if let Some(other) = records.instances.get(&was.id) {
        return Err(Error::conflict(format!(
            "instance {:?} has the id {} already: is the pool a copy of one that is in use?",
            &*other.name, was.id
        )));
    }
    if was.architecture != "x86_64" {
        return Err(Error::unsupported(format!("the instance is one for {:?}", was.architecture)));
    }
    let profiles = profiles(records, tx, project, &of.profiles)?;
    if let Some(key) = was.config.keys().find(|k| k.starts_with("volatile.")) {
        return Err(Error::invalid(format!("config.{key}"), "volatile keys are not set by users"));
    }
    keys::check(&was.config, Some(was.kind))?;
    check_devices(&was.devices)?;
    if let Some(metadata) = &was.metadata {
        metadata.check()?;
        metadata.templates.check("templates")?;
    }
    let seen = observed.get(&was.id);
    let runs = |o: &&Observed| !o.state.is_down();
    let running = seen.filter(runs);
    let taken = records.taken_vmids.contains(&was.vmid.0) || !Vmid::RANGE.contains(&was.vmid.0);
    let mut instance = Instance {
        project: project.id,
        vmid: if taken { inner.take_vmid(records, tx) } else { was.vmid },
        vmid_chosen: was.vmid_chosen && !taken,
        profiles,
        image: was.image.filter(|id| records.images.contains_key(id)),
        image_properties: kept(&was.image_properties, "image.")?,
        volatile: kept(&was.volatile, "volatile.")?,
        identities: BTreeMap::new(),
        hardware: None,
        pool: pool.id,
        root: found.volume,
        node: inner.node,
        // Whatever the host remembers of its starts: the next one is newer.
        generation: seen.map_or(Generation { incarnation: records.incarnation, n: 0 }, |o| o.generation),
        power: match running.map(|o| o.state) {
            None => DesiredPower::Stopped,
            Some(RuntimeState::Paused) => DesiredPower::Paused,
            Some(_) => DesiredPower::Running,
        },
        // The memory that was kept lies with the host.
        stateful: was.stateful && seen.is_some(),
        spec_version: was.spec_version.max(1),
        lifecycle: Lifecycle::Creating,
        ..was.clone()
    };
    let expanded = records.expanded(&instance).1;
    root_on(&mut instance.devices, &expanded, &pool.name);
    let (config, devices) = records.expanded(&instance);
    keys::check(&config, Some(instance.kind))?;
    instance.hardware = hardware(was, &config)?;
    let parsed = expand::parse_devices(&devices)?;
    if parsed.root.1.source.is_some() != (said.volume.owner == VolumeOwner::Custom) {
        return Err(Error::conflict(
            "its profiles say of its root disk whether it is a custom volume otherwise than when it was described",
        ));
    }
    check_disks(records, tx, &instance, &parsed)?;
    let kept = identities(inner, records, &was.identities, found.volume);
    instance.identities =
        inner.assign_identities(records, &kept, &parsed, instance.hardware.as_ref(), instance.root);
    inner.check_nics(records, tx, &instance, &parsed)?;
    let volume = (said.volume.owner != VolumeOwner::Custom).then(|| Volume {
        id: found.volume,
        pool: pool.id,
        project: project.id,
        name: instance.name.to_string(),
        content: found.content,
        owner: VolumeOwner::Instance { instance: instance.id },
        description: said.volume.description.clone(),
        size: found.size,
        config: Config::new(),
        spec_version: said.volume.spec_version.max(1),
        created_at: said.volume.created_at,
        layers: said.volume.layers.clone(),
    });
    if volume.is_some() && records.volumes.contains_key(&found.volume) {
        return Err(Error::conflict("the database knows its root by now"));
    }
    let planned = Planned { instance: Some(&instance), root: found.size, ..Default::default() };
    admit(records, tx, project.id, &planned)?;
    inner.guest_spec(records, &instance, 0)?;
    let taken = snapshots(inner, records, tx, project, &instance, found, said)?;
    instance.current_snapshot = instance.current_snapshot.filter(|id| taken.iter().any(|s| s.id == *id));
    Ok(VolumePlan {
        path: crate::compute::path(&project.name, &instance.name),
        node: inner.node,
        at: VolumeRef { pool: pool.id, volume: found.volume },
        volume,
        instance: Some(Box::new(instance)),
        taken: taken.into_iter().map(|s| Taken::Instance { snapshot: Box::new(s) }).collect(),
        observed: running.cloned(),
    })
}
